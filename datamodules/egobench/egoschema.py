"""EgoSchema: a question with five options about three minutes of Ego4D.

Read: ``questions.json``, a list of ``q_uid``, ``question`` and ``option 0`` to ``option 4``; ``subset_answers.json``,
``{q_uid: 0 to 4}`` of the 500 whose answers are public; and, to cut videos out of Ego4D, ``uid_to_ego4d.json``,
``{q_uid: {video_uid, starting_sec, ending_sec}}``. All other answers are known to the authors' server only.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, mapping_of, one_line
from datamodules.egobench.samples import Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, number_of, option, read_json, text_of, try_parse

_OPTIONS = [f"option {number}" for number in range(5)]


@dataclass(frozen=True)
class EgoSchema(Benchmark):
    """All questions, or those whose answers are public."""

    part: str = option("all", "all questions, or those with public answers", ("all", "subset"))
    cut: bool = option(False, "videos are whole recordings of Ego4D, <video_uid>.mp4, cut by uid_to_ego4d.json")

    name: ClassVar[str] = "egoschema"
    task: ClassVar[TaskName] = "choice"

    def official(self) -> dict[str, Official]:
        """Return the numbers of questions and public answers."""
        return {"samples": Official(5031 if self.part == "all" else 500), "public answers": Official(500)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question; those with a public answer are in the group ``subset``."""
        file = self.main_file(["questions.json"], "EgoSchema's questions")
        rows = read_json(file, list)
        if not all(isinstance(row, dict) and "question" in row for row in rows):
            raise SourceError(f"{file}: rows without 'question': this is an early version, fetch the one of 5,031 rows")
        answers = _answers(self.other_file(["subset_answers.json"], "EgoSchema's public answers"))
        map_file = self.other_file(["uid_to_ego4d.json"], "EgoSchema's spans in Ego4D") if self.cut else None
        spans = None if map_file is None else read_json(map_file, dict)
        for number, row in enumerate(rows, 1):
            sample = try_parse(self._sample, row, answers, spans, f"{file} entry {number}")
            if isinstance(sample, Sample):
                counts.add("public answers", sample.answer is not None)
                if self.part == "subset" and sample.answer is None:
                    continue
            yield sample

    def _sample(self, row: Any, answers: Mapping[str, int], spans: Mapping[str, Any] | None, where: str) -> Sample:
        uid = text_of(row, "q_uid", where)
        options = tuple(one_line(row, key, where) for key in _OPTIONS)
        groups = ("subset",) if uid in answers else ()
        clip = Clip(f"{uid}.mp4") if spans is None else _span(spans, uid)
        return Sample(uid, (clip,), one_line(row, "question", where), options, answers.get(uid), groups)

    def fast_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with public answers."""
        return [sample for sample in samples if sample.answer is not None]

    def submission(self, samples: Sequence[Sample], predictions: Mapping[str, int]) -> dict[str, str]:
        """Return ``submission.csv`` for Kaggle and ``submission.json`` for the authors' server, with ``part: all``."""
        if self.part != "all":
            return {}
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["q_uid", "answer"])
        rows.writerows((sample.id, predictions[sample.id]) for sample in samples)
        chosen = {sample.id: predictions[sample.id] for sample in samples}
        return {"submission.csv": table.getvalue(), "submission.json": json.dumps(chosen, indent=1)}


def _answers(file: Path) -> dict[str, int]:
    answers: dict[str, int] = read_json(file, dict)
    for uid, answer in answers.items():
        if type(answer) is not int or not 0 <= answer < len(_OPTIONS):
            raise SourceError(f"{file}: the answer of {uid} is {answer!r}, expected 0 to 4: fetch the file again")
    return answers


def _span(spans: Mapping[str, Any], uid: str) -> Clip:
    where = f"uid_to_ego4d.json: {uid}"
    span = mapping_of(spans, uid, "uid_to_ego4d.json")
    start_s, end_s = number_of(span, "starting_sec", where), number_of(span, "ending_sec", where)
    if not 0 <= start_s < end_s:
        raise SourceError(f"{where}: 'starting_sec' and 'ending_sec' give {start_s:g} to {end_s:g} s: correct them")
    return Clip(f"{text_of(span, 'video_uid', where)}.mp4", start_s, end_s)
