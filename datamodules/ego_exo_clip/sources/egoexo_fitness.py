"""EgoExo-Fitness (arXiv 2406.08877) as pairs: exercises filmed by cameras on the head and fixed ones, synchronised.

Expected below the root, as distributed (github.com/iSEE-Laboratory/EgoExo-Fitness, huggingface.co/datasets/Lymann)::

    meta_records.json                    the views of each record, and the folders of their frames
    interpretable_action_judgement.json  name, frames and judgements of each action
    substep_level_annotations.json       the subset (train or test) of each record
    frames_open/<record>/<view>/frame_0000000001.jpg

Licence: a licence agreement has to be signed before the download; nothing of the dataset is part of this repository.

Traps:

- The released videos are frames at 30 per second, the rate at which folders of images are read here. A frame is found
  by its place in the folder, not by the number in its name, so folders have to be complete.
- ``ego_*`` views are on the head, ``exo_*`` are fixed; not every record has all six. Frame n of each is one instant.
- ``action_level_annotations.json`` has action numbers without names, so that it is not read.
- Actions last 15 s and more: ``--max-clip-s 4`` keeps their middle.

The files were not at hand: this was tested on invented ones in the form that the dataset's README shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, option, read_json, text_of

FPS = 30.0
"""Frames per second of the released frames."""


@dataclass
class EgoExoFitness:
    """A ``PairSource`` of EgoExo-Fitness' actions.

    Args:
        root: folder that holds ``meta_records.json`` and ``frames_open``.
        split: train or test.
        text: ``name``: one sentence with the action's name; ``comment``: each annotator's comment on how it was done.
        ego_view: the view to prefer; the others replace it if it is missing.
    """

    root: Path
    split: str = option("train", "records of this subset", ("train", "test"))
    text: str = option("name", "sentence with the action's name, or the annotators' comments", ("name", "comment"))
    ego_view: str = option("ego_m", "preferred egocentric view", ("ego_m", "ego_l", "ego_r"))

    def __post_init__(self) -> None:
        """Read the root of the command line."""
        self.root = Path(self.root)

    @property
    def description(self) -> dict[str, str]:
        """Description for ``index.json``."""
        return {"name": "EgoExo-Fitness", "split": self.split, "text": self.text, "ego_view": self.ego_view}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield every record of the subset with its actions.

        Raises:
            SourceError: a file is missing, or a value is wrong.
        """
        subsets, narrations = self._subsets(), self._narrations()
        file = self.root / "meta_records.json"
        records = read_json(file, dict).get("records")
        if not isinstance(records, list):
            raise SourceError(f"{file}: field 'records' is {records!r}, expected a list: fetch the file again")
        for number, record in enumerate(records, 1):
            where = f"{file} record {number}"
            name = text_of(record, "record_id", where)
            if not counts.keep("records", f"in subset {self.split}", subsets.get(name, "").startswith(self.split)):
                continue
            group = self._group(name, record, where)
            if counts.keep("records", "with views of both kinds", bool(group.egos and group.exos)):
                yield group, narrations.get(name, [])

    def _group(self, name: str, record: dict[str, Any], where: str) -> Group:
        frames = record.get("frames")
        if not isinstance(frames, dict) or not all(isinstance(view, dict) for view in frames.values()):
            raise SourceError(f"{where}: field 'frames' is {frames!r}, expected the folder of each view: correct it")
        views = [View(view, text_of(frames[view], "path", f"{where} {view}").strip("/")) for view in sorted(frames)]
        egos = [view for view in views if view.cam.startswith("ego")]
        lengths = [view.get("num_frames") for view in frames.values()]
        if not lengths or not all(type(length) is int and length > 0 for length in lengths):
            raise SourceError(f"{where}: field 'num_frames' is {lengths}, expected numbers of frames: correct it")
        return Group(
            group_id=name,
            egos=tuple(sorted(egos, key=lambda view: view.cam != self.ego_view)),
            exos=tuple(view for view in views if view.cam.startswith("exo")),
            duration_s=min(lengths) / FPS,
            fps=FPS,
            scenario="Fitness",
        )

    def _subsets(self) -> dict[str, str]:
        """Return the subset of every record; entries are named <record>_<sequence>_<view>."""
        file = self.root / "substep_level_annotations.json"
        database = read_json(file, dict).get("database")
        if not isinstance(database, dict):
            raise SourceError(f"{file}: field 'database' is missing: fetch the file again")
        return {key.partition("_")[0]: text_of(entry, "subset", f"{file} {key}") for key, entry in database.items()}

    def _narrations(self) -> dict[str, list[Narration]]:
        """Return the actions of every record; entries are named <record>_action_<number>."""
        file = self.root / "interpretable_action_judgement.json"
        narrations: dict[str, list[Narration]] = defaultdict(list)
        for key, entry in read_json(file, dict).items():
            where, name = f"{file} {key}", key.partition("_action_")[0]
            frames = entry.get("st_ed_frame") if isinstance(entry, dict) else None
            if not isinstance(frames, list) or [type(frame) for frame in frames] != [int, int]:
                raise SourceError(f"{where}: field 'st_ed_frame' is {frames!r}, expected two frames: correct it")
            start_s, end_s = frames[0] / FPS, frames[1] / FPS
            if not 0 <= start_s < end_s:
                raise SourceError(f"{where}: field 'st_ed_frame' is {frames}, expected start < end: correct it")
            annotations = entry.get("annotations")
            if not isinstance(annotations, list) or not annotations:
                raise SourceError(f"{where}: field 'annotations' is {annotations!r}, expected a list: correct it")
            for number, annotation in enumerate(annotations if self.text == "comment" else annotations[:1]):
                action = text_of(annotation, "action_name", where)
                comment = text_of(annotation, "comment", where) if self.text == "comment" else None
                narrations[name].append(
                    Narration(
                        clip_id=f"{key}/{number}",
                        annotator=str(annotation.get("annotator", number)),
                        time_s=(start_s + end_s) / 2,
                        text=comment or f"Camera-wearer does {action[:1].lower()}{action[1:].rstrip('.')}.",
                        raw_text=comment or action,
                        span_s=(start_s, end_s),
                        subject="C",
                    )
                )
        return narrations
