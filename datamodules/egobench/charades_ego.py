"""Charades-Ego: find the actions of a video of about thirty seconds among 157 classes.

Read: ``CharadesEgo_v1_test_only1st.csv`` (``id``, ``actions``, ...) and ``Charades_v1_classes.txt``, lines
``c000 Holding some clothes``. Actions are ``c012 3.50 9.10;c045 0.00 22.00``; there may be none, and some twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, table_rows
from datamodules.egobench.samples import Candidate, Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, option, read_csv, read_text, text_of, try_parse

CLASSES = 157
_FILES = {"first": "_only1st", "third": "_only3rd", "both": ""}
_ACTION = re.compile(r"c(\d{3}) [0-9.]+ [0-9.]+")
_CLASS = re.compile(r"c(\d{3}) (.+)")
_EMPTY, _OLD = "videos without an action, which do not count", "videos of version 0"


@dataclass(frozen=True)
class CharadesEgo(Benchmark):
    """The videos of the test split and all classes; each sample shows a whole video."""

    view: str = option("first", "videos of the first person, of the third person, or both", tuple(_FILES))
    classes: Path | None = option(None, "Charades_v1_classes.txt, if it is not next to the annotations")

    name: ClassVar[str] = "charades_ego"
    task: ClassVar[TaskName] = "rank_texts"

    def official(self) -> dict[str, Official]:
        """Return the number of classes."""
        return {"candidates": Official(CLASSES)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each video; its labels are the classes, each once."""
        file = self.main_file([f"CharadesEgo_v1_test{_FILES[self.view]}.csv"], "the labels of Charades-Ego")
        classes = len(self.candidates())
        for where, row in table_rows(read_csv(file), ("id", "actions"), file):
            sample = row if isinstance(row, SourceError) else try_parse(self._sample, row, where, classes)
            if isinstance(sample, Sample):
                counts.add(_EMPTY, sample.labels == {"classes": []})
                counts.add(_OLD, "_v0_" in file.name)
            yield sample

    def _sample(self, row: Any, where: str, classes: int) -> Sample:
        video = text_of(row, "id", where)
        if self.view != "both" and video.endswith("EGO") != (self.view == "first"):
            raise SourceError(
                f"{where}: video {video} is not of the {self.view} person: give CharadesEgo_v1_test{_FILES[self.view]}"
                ".csv, or another view"
            )
        actions = [action.strip() for action in row["actions"].split(";") if action.strip()]
        found = [_ACTION.fullmatch(action) for action in actions]
        numbers = {int(action[1]) for action in found if action}
        if None in found or max(numbers, default=0) >= classes:
            raise SourceError(
                f"{where}: 'actions' is {row['actions']!r}, expected c012 3.50 9.10;... of {classes}: correct it"
            )
        return Sample(video, (Clip(f"{video}.mp4"),), labels={"classes": sorted(numbers)})

    def candidates(self) -> Sequence[Candidate]:
        """Return all classes in their order."""
        file = self.classes or self.other_file(["Charades_v1_classes.txt"], "the classes of Charades")
        if not file.is_file():
            raise SourceError(f"{file}: no such file: correct classes")
        found = [_CLASS.fullmatch(line.strip()) for line in read_text(file).splitlines() if line.strip()]
        if not found or [line and int(line[1]) for line in found] != list(range(len(found))):
            raise SourceError(f"{file}: expected lines 'c000 ...', 'c001 ...' and so on: fetch the file again")
        return [Candidate(line[2].strip(), {"class": int(line[1])}) for line in found if line]

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Note videos that do not count, and labels that publications do not use."""
        lines = [f"{self.name}: {counts[_EMPTY]:,} {_EMPTY}"] if counts.get(_EMPTY) else []
        if counts.get(_OLD):
            lines.append(f"{self.name}: labels are of version 0, published scores of version 1")
        return lines
