"""QAEgo4D: questions about clips of Ego4D of about eight minutes, answered in words or by choosing among four.

Read, whichever is there:

- GroundVQA's ``annotations.QaEgo4D_test.json``, and ``annotations.QaEgo4D_test_close.json`` with ``wrong_answers``:
  lists of ``video_id`` (an Ego4D clip), ``sample_id``, ``question``, ``answer``, ``video_uid``, ``video_start_sec`` and
  ``video_end_sec``. The latter was verified by hand in 2024, so releases differ in length.
- The authors' merged ``annotations.test.json``, the same without the last three.
- The authors' ``answers.json``, ``{split: {sample_id: answer}}``, with Ego4D's ``nlq_val.json`` of version 1; a
  ``sample_id`` is ``<annotation_uid>_<number of the query>``.

A sample shows the whole clip, not only the moment of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, one_line
from datamodules.egobench.samples import Clip, Sample, TaskName
from datamodules.io.annotations import Counts, SourceError, number_of, option, read_json, shuffled, text_of, try_parse
from datamodules.io.jsonl import is_text

Offsets = Mapping[str, tuple[str, float, float]]
"""Video, and start and end in it in seconds, by clip."""
_AMBIGUOUS = "questions whose four options are not all different"


@dataclass(frozen=True)
class _QAEgo4D(Benchmark):
    cut: bool = option(False, "videos are whole recordings of Ego4D, <video_uid>.mp4, not its clips, <clip_uid>.mp4")
    nlq: Path | None = option(None, "Ego4D's nlq_val.json, if it is not next to the annotations")

    def _offsets(self) -> Offsets:
        default = (self.annotations.parent if self.annotations.is_file() else self.annotations) / "nlq_val.json"
        file = self.nlq or (default if default.is_file() else None)
        return {} if file is None else {clip: place for clip, place, _ in _nlq_clips(file)}

    def _clip(self, row: Any, offsets: Offsets, where: str) -> Clip:
        uid = text_of(row, "video_id", where)
        if not self.cut:
            return Clip(f"{uid}.mp4")
        if row.get("video_uid") is not None:
            video = text_of(row, "video_uid", where)
            start_s, end_s = number_of(row, "video_start_sec", where), number_of(row, "video_end_sec", where)
        elif uid in offsets:
            video, start_s, end_s = offsets[uid]
        else:
            raise SourceError(f"{where}: the place of clip {uid} in its recording is unknown: set nlq to nlq_val.json")
        if not 0 <= start_s < end_s:
            raise SourceError(f"{where}: clip {uid} goes from {start_s:g} to {end_s:g} s: correct it")
        return Clip(f"{video}.mp4", start_s, end_s)


@dataclass(frozen=True)
class QAEgo4DOpen(_QAEgo4D):
    """The questions, answered in words."""

    name: ClassVar[str] = "qaego4d_open"
    task: ClassVar[TaskName] = "open"

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question of the test split."""
        names = ["annotations.QaEgo4D_test.json", "annotations.test.json", "answers.json"]
        file = self.main_file(names, "QAEgo4D's questions")
        offsets = self._offsets() if self.cut else {}
        for where, row in self._from_answers(file) if file.name == "answers.json" else _rows(file):
            yield row if isinstance(row, SourceError) else try_parse(self._sample, row, offsets, where)

    def _from_answers(self, file: Path) -> Iterator[tuple[str, Any]]:
        answers = read_json(file, dict).get("test")
        if not isinstance(answers, dict):
            raise SourceError(f"{file}: field 'test' is missing: fetch QAEgo4D's answers.json again")
        nlq = self.nlq or self.other_file(["nlq_val.json"], "Ego4D's nlq_val.json of version 1")
        queries: dict[str, dict[str, Any]] = {}
        for clip, (video, start_s, end_s), asked in _nlq_clips(nlq):
            place = {"video_id": clip, "video_uid": video, "video_start_sec": start_s, "video_end_sec": end_s}
            queries |= {name: {**place, "sample_id": name, "question": query} for name, query in asked.items()}
        for name, answer in answers.items():
            where = f"{file} {name}"
            if name in queries and is_text(answer):
                row = queries[name]
                yield where, {**row, "question": _converted(row["question"]), "answer": _converted(answer)}
            elif name in queries:
                yield where, {**queries[name], "answer": answer}
            else:
                yield where, SourceError(f"{where}: no such query in {nlq}: fetch that of Ego4D version 1")

    def _sample(self, row: Any, offsets: Offsets, where: str) -> Sample:
        clip = self._clip(row, offsets, where)
        return Sample(
            text_of(row, "sample_id", where),
            (clip,),
            one_line(row, "question", where),
            answer=one_line(row, "answer", where),
        )


@dataclass(frozen=True)
class QAEgo4DClosed(_QAEgo4D):
    """The questions with four options, in an order that depends only on the question's id."""

    name: ClassVar[str] = "qaego4d_closed"
    task: ClassVar[TaskName] = "choice"

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question."""
        file = self.main_file(["annotations.QaEgo4D_test_close.json"], "GroundVQA's closed test of QAEgo4D")
        offsets = self._offsets() if self.cut else {}
        for where, row in _rows(file):
            sample = try_parse(self._sample, row, offsets, where)
            if isinstance(sample, Sample):
                counts.add(_AMBIGUOUS, len({text.lower() for text in sample.options}) < len(sample.options))
            yield sample

    def _sample(self, row: Any, offsets: Offsets, where: str) -> Sample:
        clip, key = self._clip(row, offsets, where), text_of(row, "sample_id", where)
        wrong = row.get("wrong_answers")
        if not isinstance(wrong, list) or len(wrong) != 3 or not all(is_text(text) and text.strip() for text in wrong):
            raise SourceError(
                f"{where}: field 'wrong_answers' is {wrong!r}, expected three texts: take the file whose name ends in "
                "test_close"
            )
        texts = [one_line(row, "answer", where), *(" ".join(text.split()) for text in wrong)]
        order = [int(number) for number in shuffled(f"{self.name}/{key}", ["0", "1", "2", "3"])]
        options = tuple(texts[number] for number in order)
        return Sample(key, (clip,), one_line(row, "question", where), options, order.index(0))

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Note how many questions have no single right answer."""
        found = counts.get(_AMBIGUOUS, 0)
        return [f"{self.name}: {found:,} {_AMBIGUOUS}"] if found else []


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    return ((f"{file} entry {number}", row) for number, row in enumerate(read_json(file, list), 1))


def _converted(text: str) -> str:
    """Return a text without commas and line breaks, as in the authors' merged files."""
    return " ".join(text.replace(",", "").split())


def _nlq_clips(file: Path) -> Iterator[tuple[str, tuple[str, float, float], dict[str, Any]]]:
    """Yield the clips of Ego4D's natural language queries, with their place and their queries by ``sample_id``.

    Raises:
        SourceError: the file has another form.
    """
    for video in _list(read_json(file, dict), "videos", str(file)):
        uid = text_of(video, "video_uid", str(file))
        for clip in _list(video, "clips", f"{file} video {uid}"):
            name = text_of(clip, "clip_uid", f"{file} video {uid}")
            where = f"{file} clip {name}"
            start_s, end_s = (number_of(clip, key, where) for key in ("video_start_sec", "video_end_sec"))
            queries: dict[str, Any] = {}
            for annotation in _list(clip, "annotations", where):
                for number, query in enumerate(_list(annotation, "language_queries", where)):
                    queries[f"{text_of(annotation, 'annotation_uid', where)}_{number}"] = query.get("query")
            yield name, (uid, start_s, end_s), {key: query for key, query in queries.items() if is_text(query)}


def _list(holder: Any, key: str, where: str) -> list[Any]:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise SourceError(f"{where}: field {key!r} is no list of JSON objects: give Ego4D's nlq_val.json")
    return value
