"""Charades-Ego (arXiv 1804.09626) as pairs: a script acted twice, for a fixed camera and then for one on the head.

Expected below the root, as distributed by the Allen Institute (prior.allenai.org/projects/charades-ego)::

    CharadesEgo/CharadesEgo_v1_{train,test}.csv   id,...,actions,length (or next to the root's other files)
    CharadesEgo/Charades_v1_classes.txt           c000 Holding some clothes
    CharadesEgo_v1_480/<id>.mp4

Licence: non-commercial use; videos and annotations are the institute's and are not part of this repository.

Traps:

- The videos of a pair are **not synchronised**: one person does the same things twice. A pair here is one action, cut
  from both videos by its own times, centred and as long as the shorter one. The index says ``synchronised: false``, and
  losses that compare instants are refused.
- The egocentric video of ``ABCDE`` is ``ABCDEEGO``; some videos have no partner.
- In version 0 of the labels (``CharadesEgo_v0_test.csv``), the partners of all 103 egocentric test videos are listed
  without actions: only version 1 gives pairs.
- Actions may end after the video, may be there twice, and ``actions`` may be empty.
- Class names are gerunds ("Opening a door"), and five begin with "Someone is".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, find_file, option, read_csv, read_text

_ACTION = re.compile(r"c(\d{3}) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)")
_CLASS = re.compile(r"c(\d{3}) (.+)")
_EGO = "EGO"
_NOMINAL_FPS = 30.0

_Spans = dict[int, list[tuple[float, float]]]
"""Start and end of each occurrence of an action class in a video."""


@dataclass
class CharadesEgo:
    """A ``PairSource`` of the actions that both videos of a Charades-Ego pair show.

    The n-th occurrence of a class in one video belongs to the n-th in the other.

    Args:
        root: folder that holds the annotations and the videos.
        split: train or test.
        files: the label files; by default those of version 1.
        videos: folder of the videos below the root.
    """

    root: Path
    split: str = option("train", "videos of this split", ("train", "test"))
    files: tuple[str, ...] = option((), "label files below the root (default: CharadesEgo_v1_<split>.csv)")
    videos: str = option("CharadesEgo_v1_480", "folder of the videos below the root")

    opens_videos: ClassVar[bool] = True
    synchronised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Read the options of the command line."""
        self.root, self.files = Path(self.root), tuple(self.files)

    @property
    def description(self) -> dict[str, str]:
        """Description for ``index.json``."""
        return {"name": "Charades-Ego", "split": self.split, "files": " ".join(self.files)}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield a take for each action that both videos of a pair show.

        Raises:
            SourceError: a file or a column is missing, or a value is wrong.
        """
        classes = self._classes()
        actions = self._actions(len(classes))
        for ego in (video for video in actions if video.endswith(_EGO)):
            exo = ego.removesuffix(_EGO)
            if not counts.keep("egocentric videos", "with a video of the third person", exo in actions):
                continue
            for number, spans_s in actions[ego].items():
                others_s = actions[exo].get(number, [])
                for occurrence, ego_s in enumerate(spans_s):
                    if counts.keep("actions", "in both videos", occurrence < len(others_s)):
                        name = f"{exo}/c{number:03d}/{occurrence}"
                        yield self._pair(name, exo, ego_s, others_s[occurrence], classes[number])

    def _pair(
        self, name: str, exo: str, ego_s: tuple[float, float], exo_s: tuple[float, float], action: str
    ) -> tuple[Group, list[Narration]]:
        ego_middle_s, exo_middle_s = sum(ego_s) / 2, sum(exo_s) / 2
        half_s = min(ego_s[1] - ego_s[0], exo_s[1] - exo_s[0]) / 2
        group = Group(
            group_id=name,
            egos=(View(f"{exo}{_EGO}", f"{self.videos}/{exo}{_EGO}.mp4"),),
            exos=(View(exo, f"{self.videos}/{exo}.mp4"),),
            duration_s=ego_s[1],
            fps=_NOMINAL_FPS,
            scenario="Home",
            lag_s={exo: exo_middle_s - ego_middle_s},
        )
        narration = Narration(
            clip_id=name,
            annotator="Charades-Ego",
            time_s=ego_middle_s,
            text=action_text(action),
            raw_text=action,
            span_s=(ego_middle_s - half_s, ego_middle_s + half_s),
            subject="C",
        )
        return group, [narration]

    def _classes(self) -> list[str]:
        names = ["Charades_v1_classes.txt", "CharadesEgo/Charades_v1_classes.txt"]
        file = find_file(self.root, names, "the classes of Charades")
        found = [_CLASS.fullmatch(line.strip()) for line in read_text(file).splitlines() if line.strip()]
        if [line and int(line[1]) for line in found] != list(range(len(found))):
            raise SourceError(f"{file}: expected lines 'c000 ...', 'c001 ...' and so on: fetch the file again")
        return [line[2].strip() for line in found if line]

    def _actions(self, classes: int) -> dict[str, _Spans]:
        """Return the actions of every video of the split."""
        default = f"CharadesEgo_v1_{self.split}.csv"
        actions: dict[str, _Spans] = {}
        for name in self.files or (default,):
            file = find_file(self.root, [name, f"CharadesEgo/{name}"], "the labels of Charades-Ego")
            rows = read_csv(file)
            _, columns = next(rows, ("", []))
            missing = [column for column in ("id", "actions") if column not in columns]
            if missing:
                raise SourceError(f"{file}: column {', '.join(missing)} is missing: fetch the file again")
            for where, cells in rows:
                row = dict(zip(columns, cells, strict=False))
                actions[row["id"]] = _spans(row, classes, where)
        return actions


def _spans(row: Mapping[str, str], classes: int, where: str) -> _Spans:
    spans_s: _Spans = defaultdict(list)
    for action in filter(None, map(str.strip, row.get("actions", "").split(";"))):
        found = _ACTION.fullmatch(action)
        if found is None or int(found[1]) >= classes:
            raise SourceError(f"{where}: 'actions' holds {action!r}, expected c012 3.50 9.10 of {classes}: correct it")
        start_s, end_s = float(found[2]), float(found[3])
        if start_s < end_s:  # some have no length
            spans_s[int(found[1])].append((start_s, end_s))
    return {number: sorted(spans) for number, spans in spans_s.items()}


def action_text(name: str) -> str:
    """Return a class as a sentence: "Opening a door" becomes "Camera-wearer is opening a door."."""
    words = name.removeprefix("Someone is ").strip().rstrip(".")
    return f"Camera-wearer is {words[:1].lower()}{words[1:]}."
