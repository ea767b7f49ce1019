"""EgoExoLearn (arXiv 2403.16182) as pairs: demonstrations, and people who follow them with a camera on the head.

Expected below the root, a clone of github.com/OpenGVLab/EgoExoLearn with the videos of its 320p archive or of
huggingface.co/datasets/hyf015/EgoExoLearn::

    video_meta_downsampled.json                    the task and the view of each video
    action_anticipation_planning_benchmark/anticpation_annotation/balanced_full_annotation/
        {ego,exo}_{train,val,test}_valid.csv       video_id,annotation_id,start_sec,end_sec,verb,noun,scenario
    annotations/fine_annotation_trainval_en.csv    texts of the same annotations; trainvaltest for the test split
    videos/<video_uid>.mp4

Licence: the repository is MIT; the videos have their own terms. The authors ask not to train on test.

Traps:

- The views are **not synchronised**: other people do the same task later. The dataset's cross-view association has
  questions for validation and test, but no pairs to train on; a pair here is an egocentric and an exocentric segment of
  one task with the same verbs and nouns, cut to the length of the shorter one. The index says ``synchronised: false``,
  and losses that compare instants are refused.
- Splits are by annotation: the same videos occur in all of them.
- ``anticpation_annotation`` is spelt so. The files of the association benchmark say ``video_uid`` for ``video_id``;
  both are read. ``exo_train.csv`` of that benchmark, with its texts, may stand in for ``exo_train_valid.csv``.
- Verbs and nouns are numbers of a taxonomy in no fixed order, and nouns may be missing (``[]``).
- Texts are imperatives ("Take the pan."), some of 100 words and more.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, find_file, number_of, option, read_csv, read_json, text_of

_SEGMENTS = "action_anticipation_planning_benchmark/anticpation_annotation/balanced_full_annotation"
_COLUMNS = ("annotation_id", "start_sec", "end_sec", "verb", "noun")
_TEXTS = {
    "no_hand": "narration_en_no_hand_prompt",
    "hand": "narration_en_hand_prompt",
    "raw": "narration_en",
}
_FPS = 25.0


@dataclass(frozen=True)
class _Segment:
    """An annotated action of a video.

    Attributes:
        actions: task, verbs and nouns.
    """

    name: str
    video: str
    start_s: float
    end_s: float
    actions: tuple[Any, ...]

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass
class EgoExoLearn:
    """A ``PairSource`` of egocentric segments and exocentric ones of the same task, verbs and nouns.

    Args:
        root: the clone, with the videos.
        split: train, val or test.
        text: which of the three texts of a segment; segments without one, as all are without the file of texts, become
            clips without narration.
        exos: exocentric segments that an egocentric one is paired with, those of the most similar length.
        videos: folder of the videos below the root.

    Raises:
        SourceError: ``exos`` is below 1.
    """

    root: Path
    split: str = option("train", "annotations of this split", ("train", "val", "test"))
    text: str = option("no_hand", "which of the three texts", tuple(_TEXTS))
    exos: int = option(1, "exocentric segments for each egocentric one at most")
    videos: str = option("videos", "folder of the videos below the root")

    opens_videos: ClassVar[bool] = True
    synchronised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise SourceError for an impossible number."""
        self.root = Path(self.root)
        if self.exos < 1:
            raise SourceError(f"exos: got {self.exos}, allowed: 1 or more")

    @property
    def description(self) -> dict[str, Any]:
        """Description for ``index.json``."""
        return {"name": "EgoExoLearn", "split": self.split, "text": self.text, "exos": self.exos}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield a take for each pair of segments.

        Raises:
            SourceError: a file or a column is missing, or a value is wrong.
        """
        tasks, texts = self._tasks(), self._texts()
        others: dict[tuple[Any, ...], list[_Segment]] = defaultdict(list)
        for segment in self._segments("exo", tasks):
            others[segment.actions].append(segment)
        for ego in self._segments("ego", tasks):
            same = sorted(others[ego.actions], key=lambda exo: (abs(exo.length_s - ego.length_s), exo.name))
            if not counts.keep("egocentric segments", "with an exocentric one of the same actions", bool(same)):
                continue
            counts.keep("egocentric segments of pairs", "with a text", ego.name in texts)
            for exo in same[: self.exos]:
                yield self._pair(ego, exo, texts.get(ego.name, ""))

    def _pair(self, ego: _Segment, exo: _Segment, text: str) -> tuple[Group, list[Narration]]:
        half_s = min(ego.length_s, exo.length_s) / 2
        group = Group(
            group_id=f"{ego.name}/{exo.name}",
            egos=(View("ego", f"{self.videos}/{ego.video}.mp4"),),
            exos=(View("exo", f"{self.videos}/{exo.video}.mp4"),),
            duration_s=ego.end_s,
            fps=_FPS,
            task=ego.actions[0],
            lag_s={"exo": exo.middle_s - ego.middle_s},
        )
        narration = Narration(
            clip_id=group.group_id,
            annotator="EgoExoLearn",
            time_s=ego.middle_s,
            text=text,
            raw_text=text,
            span_s=(ego.middle_s - half_s, ego.middle_s + half_s),
            subject="C",
        )
        return group, [narration]

    def _tasks(self) -> dict[str, str]:
        """Return the task of every video."""
        file = find_file(self.root, ["video_meta_downsampled.json"], "the list of EgoExoLearn's videos")
        records = enumerate(read_json(file, list), 1)
        return {
            text_of(record, "video_uid", f"{file} entry {number}"): text_of(record, "task", f"{file} entry {number}")
            for number, record in records
        }

    def _texts(self) -> dict[str, str]:
        """Return the texts of annotations; none if the file is not there, as texts are optional."""
        which = "trainvaltest" if self.split == "test" else "trainval"
        file = self.root / "annotations" / f"fine_annotation_{which}_en.csv"
        if not file.is_file():
            return {}
        column, texts = _TEXTS[self.text], {}
        rows = read_csv(file)
        _, columns = next(rows, ("", []))
        identifier = next((name for name in ("annotation_uid", "annotation_id") if name in columns), None)
        if identifier is None or column not in columns:
            raise SourceError(f"{file}: column annotation_uid or {column} is missing: fetch the file again")
        for _, cells in rows:
            row = dict(zip(columns, cells, strict=False))
            text = " ".join(row.get(column, "").split())
            if text:
                texts[row[identifier].strip()] = text
        return texts

    def _segments(self, view: str, tasks: dict[str, str]) -> Iterator[_Segment]:
        name = f"{view}_{self.split}_valid.csv"
        names = [f"{_SEGMENTS}/{name}", name]
        if view == "exo":
            names += ["association_benchmark/annotations/exo_train.csv"] if self.split == "train" else []
        file = find_file(self.root, names, f"the {view}centric segments of EgoExoLearn")
        rows = read_csv(file)
        _, columns = next(rows, ("", []))
        video = next((column for column in ("video_id", "video_uid") if column in columns), "video_id")
        missing = [column for column in (video, *_COLUMNS) if column not in columns]
        if missing:
            raise SourceError(f"{file}: column {', '.join(missing)} is missing: fetch the file again")
        for where, cells in rows:
            row = dict(zip(columns, cells, strict=False))
            uid = text_of(row, video, where)
            if uid not in tasks:
                raise SourceError(
                    f"{where}: field {video!r} is {uid!r}, which video_meta_downsampled.json lacks: add it"
                )
            start_s, end_s = number_of(row, "start_sec", where), number_of(row, "end_sec", where)
            if not 0 <= start_s < end_s:
                raise SourceError(f"{where}: 'start_sec' and 'end_sec' are {start_s} and {end_s}: correct them")
            actions = (tasks[uid], _numbers(row, "verb", where), _numbers(row, "noun", where))
            yield _Segment(text_of(row, "annotation_id", where), uid, start_s, end_s, actions)


def _numbers(row: dict[str, str], column: str, where: str) -> frozenset[int]:
    try:
        numbers = json.loads(row[column])
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError("no list of numbers")
    except (KeyError, ValueError):
        raise SourceError(f"{where}: field {column!r} is {row.get(column)!r}, expected [1, 2]: correct it") from None
    return frozenset(numbers)
