"""EgoTaskQA: questions about videos of household tasks (LEMMA), with the answers of the training file as candidates.

Read in ``direct`` or ``indirect`` below the annotations, or in that folder itself: ``train_qas.json`` and
``test_qas.json``, or ``formatted_<split>_qas_encode.json``, lists of ``interval``, ``question``, ``answer``,
``reference`` and ``reasoning_type``. The files of a split are fixed; the test file of ``direct`` asks about things
named directly and indirectly, that of ``indirect`` only the latter.

An interval is ``<take>|fpv<n>|<first frame>|<end frame>``, and its video ``<interval>.mp4``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egobench.base import LETTERS, Benchmark, mapping_of, one_line
from datamodules.egobench.samples import Candidate, Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, read_json, text_of, try_parse

_INTERVAL = re.compile(r"[^|/\\]+\|(?:fpv|P)\d+\|(\d{1,9})\|(\d{1,9})")
_YES_NO = frozenset({"yes", "no"})
_UNKNOWN = "questions whose answer no training question has, which cannot be answered correctly"
_TYPES = ("type", "category", "semantic", "structural")


@dataclass(frozen=True)
class _EgoTaskQA(Benchmark):
    task: ClassVar[TaskName] = "vocabulary"
    split: ClassVar[str]

    def _file(self, part: str, given: bool) -> Path:
        stems = [f"{part}_qas.json", f"formatted_{part}_qas_encode.json"]
        names = [f"{self.split}/{stem}" for stem in stems] + stems
        return (self.main_file if given else self.other_file)(names, f"EgoTaskQA's {part} questions ({self.split})")

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question of the test file; ids are places there, groups the authors' sub-scores."""
        file, vocabulary = self._file("test", given=True), {text.text for text in self.candidates()}
        rows = read_json(file, list)
        if any(isinstance(row, Mapping) and "option" in row for row in rows):
            raise SourceError(f"{file}: this is the version of five options: name it {EgoTaskQAMcq.name} instead")
        references = {_reference(row) for row in rows}
        other = {"direct": "indirect", "indirect": "direct"}[self.split]
        if references and (self.split not in references or (self.split == "indirect" and "direct" in references)):
            raise SourceError(
                f"{file}: references are {' and '.join(sorted(references))}, so this is not the test file of "
                f"{self.split}: give that folder, not {other}"
            )
        for number, row in enumerate(rows, 1):
            sample = try_parse(_sample, row, f"{number:06d}", f"{file} entry {number}")
            counts.add(_UNKNOWN, isinstance(sample, Sample) and sample.answer not in vocabulary)
            yield sample

    def candidates(self) -> Sequence[Candidate]:
        """Return the answers of the training file, each once."""
        file = self._file("train", given=False)
        answers = {one_line(row, "answer", f"{file} entry {n}"): None for n, row in enumerate(read_json(file, list), 1)}
        return [Candidate(answer) for answer in answers]

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Note how many questions cannot be answered."""
        found = counts.get(_UNKNOWN, 0)
        return [f"{self.name}: {found:,} {_UNKNOWN}"] if found else []


@dataclass(frozen=True)
class EgoTaskQADirect(_EgoTaskQA):
    """The normal split, with direct and indirect references."""

    name: ClassVar[str] = "egotaskqa_direct"
    split: ClassVar[str] = "direct"


@dataclass(frozen=True)
class EgoTaskQAIndirect(_EgoTaskQA):
    """The split that tests indirect references after training on direct ones."""

    name: ClassVar[str] = "egotaskqa_indirect"
    split: ClassVar[str] = "indirect"


@dataclass(frozen=True)
class EgoTaskQAMcq(Benchmark):
    """A version with five options by the authors of EgoThinker; the options reveal most answers: never train on it.

    Read: ``egotaskqa_mcq.json``, a list of ``q``, ``video_path``, ``a`` (a letter) and ``option``, texts by letter.
    """

    name: ClassVar[str] = "egotaskqa_mcq"
    task: ClassVar[TaskName] = "choice"

    def official(self) -> dict[str, Official]:
        """Return the numbers of questions and videos."""
        return {"samples": Official(8783), "videos": Official(2128)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question."""
        file = self.main_file(["egotaskqa_mcq.json", "egotaskqa.json"], "EgoThinker's choices of EgoTaskQA")
        for number, row in enumerate(read_json(file, list), 1):
            sample = try_parse(self._sample, row, f"{number:06d}", f"{file} entry {number}")
            if isinstance(sample, Sample):
                counts.add_distinct("videos", sample.clips[0].video)
            yield sample

    def _sample(self, row: Any, key: str, where: str) -> Sample:
        lettered, right = mapping_of(row, "option", where), text_of(row, "a", where)
        options = tuple(one_line(lettered, letter, where) for letter in sorted(lettered))
        if "".join(sorted(lettered)) != LETTERS[: len(options)] or right not in lettered or len(set(options)) < 2:
            raise SourceError(f"{where}: answer {right!r} of options {dict(lettered)}: correct it")
        answer = options[sorted(lettered).index(right)]
        video = _video(text_of(row, "video_path", where).removesuffix(".mp4"), "video_path", where)
        return Sample(key, (Clip(video),), one_line(row, "q", where), options, options.index(answer), (_form(answer),))

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Warn that the options reveal the answers."""
        return [
            f"{self.name}: its options reveal the answer; from them alone, without video and question, 91 % can be "
            "reached. Report it next to a run without video, and never train on it"
        ]


def _sample(row: Any, key: str, where: str) -> Sample:
    video = _video(text_of(row, "interval", where), "interval", where)
    answer = one_line(row, "answer", where)
    groups = [_reference(row), _form(answer), *_types(row)]
    return Sample(key, (Clip(video),), one_line(row, "question", where), (), answer, tuple(dict.fromkeys(groups)))


def _video(interval: str, field: str, where: str) -> str:
    found = _INTERVAL.fullmatch(interval)
    if found is None or int(found[1]) >= int(found[2]):
        raise SourceError(f"{where}: field {field!r} is {interval!r}, expected <take>|fpv<n>|<start>|<end>: correct it")
    return f"{interval}.mp4"


def _form(answer: str) -> str:
    return "binary" if answer.lower() in _YES_NO else "open"


def _reference(row: Any) -> str:
    """Return the kind of reference; training files lack the field but may list ``direct`` among the types."""
    named = row.get("reference") if isinstance(row, Mapping) else None
    return "direct" if named == "direct" or (named is None and "direct" in _types(row)) else "indirect"


def _types(row: Any) -> list[str]:
    if not isinstance(row, Mapping):
        return []
    joined = row.get("reasoning_type")
    if isinstance(joined, str):
        return [part.strip() for part in joined.split("$") if part.strip()]
    parts: list[Any] = []
    for key in _TYPES:
        value = row.get(key)
        parts += value if isinstance(value, list) else [value]
    return [part for part in parts if isinstance(part, str) and part.strip()]
