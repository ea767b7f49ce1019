"""OpenEQA: questions about scans of rooms, each shown as a folder of pictures.

Read below the root, or in its ``data``: ``open-eqa-v0.json``, a list of ``question``, ``answer``, ``category``,
``question_id``, ``episode_history`` and, for one category, ``extra_answers``. The pictures of an episode are the
``*-rgb.png`` of ``frames/<episode_history>``, which users make from ScanNet and HM3D themselves.

It is a benchmark without a training split: a model trained on it must not be scored on it as if it had not seen it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egoit.datamodule import Wording
from datamodules.egoit.records import Record
from datamodules.io.annotations import Counts, Official, SourceError, find_file, option, read_json, text_of, try_parse

_SCAN = re.compile(r"^\d+-(hm3d|scannet)-|_\d\d$")  # number and data set in front of a scene, and which of its scans


@dataclass(frozen=True)
class OpenEQA:
    """All questions, or all but some that are kept for evaluation."""

    root: Path
    hold_out: Path | None = option(None, "list of question_ids to leave out, such as open-eqa-v0-184-questions.json")
    videos: str = option("openeqa/frames", "folder below the data root that holds <episode_history>")
    encoded: bool = option(False, "episodes are videos, <episode_history>-0.mp4, as data/frames2videos.py makes them")

    name: ClassVar[str] = "openeqa"

    def official(self) -> dict[str, Official]:
        """Rows, episodes and rows with further answers."""
        return {"rows": Official(1636), "episodes": Official(152), "rows with extra answers": Official(263)}

    def read(self, counts: Counts) -> Iterator[Record | SourceError]:
        """A record for each question."""
        file = find_file(self.root, ["open-eqa-v0.json", "data/open-eqa-v0.json"], "OpenEQA's questions")
        left_out = _names(self.hold_out)
        for number, entry in enumerate(read_json(file, list), 1):
            counts.add("rows")
            record = try_parse(self._record, entry, f"{file} entry {number}")
            if isinstance(record, Record):
                counts.add_distinct("episodes", record.video)
                counts.add("rows with extra answers", bool(entry.get("extra_answers")))
                if record.key in left_out:
                    counts.add("rows held out")
                    continue
            yield record

    def _record(self, entry: Any, where: str) -> Record:
        question, answer, key, episode = (
            text_of(entry, field, where) for field in ("question", "answer", "question_id", "episode_history")
        )
        video = f"{self.videos}/{episode}{'-0.mp4' if self.encoded else ''}"
        return Record(key, video, Wording("qa", self.name, question, (), answer), "v0", scene_of(episode), where=where)


def _names(file: Path | None) -> frozenset[str]:
    names = [] if file is None else read_json(file, list)
    if not all(isinstance(name, str) for name in names):
        raise SourceError(f"{file}: expected a list of question_ids: give one to --hold-out")
    return frozenset(names)


def scene_of(episode: str) -> str:
    """The scene that an episode was recorded in: ``scannet-v0/002-scannet-scene0709_00`` is of scene0709."""
    return _SCAN.sub("", episode.rpartition("/")[2])
