"""OpenEQA: questions about scans of rooms, each shown as a folder of frames.

Read below the root, or in its ``data``: ``open-eqa-v0.json``, a list of ``question``, ``answer``, ``category``,
``question_id``, ``episode_history`` and, for one category, ``extra_answers``. The frames of an episode are the
``*-rgb.png`` of ``frames/<episode_history>``, which users make from ScanNet and HM3D themselves.

It is a benchmark without a training split: do not report OpenEQA as zero-shot for a model trained on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.annotations import Counts, Official, SourceError, find_file, option, read_json, text_of, try_parse

_SCAN = re.compile(r"^\d+-(hm3d|scannet)-|_\d\d$")  # number and dataset before a scene, and the number of its scan


@dataclass(frozen=True)
class OpenEQA:
    """OpenEQA: all questions, or all but those that are kept for evaluation."""

    root: Path
    hold_out: Path | None = option(None, "list of question_ids to leave out, such as open-eqa-v0-184-questions.json")
    videos: str = option("openeqa/frames", "folder below the data root that holds <episode_history>")
    encoded: bool = option(False, "episodes are videos, <episode_history>-0.mp4, as data/frames2videos.py makes them")

    name: ClassVar[str] = "openeqa"

    def official(self) -> dict[str, Official]:
        """Return rows, episodes and rows with extra answers."""
        return {"rows": Official(1636), "episodes": Official(152), "rows with extra answers": Official(263)}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each question."""
        file = find_file(self.root, ["open-eqa-v0.json", "data/open-eqa-v0.json"], "OpenEQA's questions")
        left_out = {f"{self.name}/{key}" for key in _names(self.hold_out)}
        for number, entry in enumerate(read_json(file, list), 1):
            counts.add("rows")
            record = try_parse(self._record, entry, f"{file} entry {number}")
            if isinstance(record, InstructionRecord):
                counts.add_distinct("episodes", record.video)
                counts.add("rows with extra answers", bool(entry.get("extra_answers")))
                if record.id in left_out:
                    counts.add("rows held out")
                    continue
            yield record

    def _record(self, entry: Any, where: str) -> InstructionRecord:
        question, answer, key, episode = (
            text_of(entry, field, where) for field in ("question", "answer", "question_id", "episode_history")
        )
        video = f"{self.videos}/{episode}{'-0.mp4' if self.encoded else ''}"
        return InstructionRecord(
            id=f"{self.name}/{key}",
            video=video,
            prompt=PromptFields("qa", query=question, target=answer),
            source=self.name,
            split="v0",
            video_uid=scene_of(episode),
            where=where,
        )


def _names(file: Path | None) -> frozenset[str]:
    names = [] if file is None else read_json(file, list)
    if not all(isinstance(name, str) for name in names):
        raise SourceError(f"{file}: expected a list of question_ids: give one to --hold-out")
    return frozenset(names)


def scene_of(episode: str) -> str:
    """Return the scene in which an episode was recorded: ``scannet-v0/002-scannet-scene0709_00`` is of scene0709."""
    return _SCAN.sub("", episode.rpartition("/")[2])
