"""VLN-QA: choose the next move of an agent, 200 questions; MVBench's "Egocentric Navigation".

Read in either of two forms. MVBench's ``egocentric_navigation.json`` has ``video``, ``question``, ``candidates`` (four)
and ``answer``. EgoThinker's ``vlnqa.json`` has ``video_path``, ``gt`` (a letter) and ``text``, a whole prompt with its
options on lines ``A: ...``. The folder of a video is the answer, so that only the clip of a sample holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, one_line
from datamodules.egobench.samples import Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, option, read_json, text_of, try_parse
from datamodules.io.jsonl import is_text

_PROMPT = re.compile(r"\A.*?^Question:(?P<question>.*)^Option:[ ]*\n(?P<options>.*)\Z", re.DOTALL | re.MULTILINE)
_OPTION = re.compile(r"^([A-Z]):[ ]*(.*\S)", re.MULTILINE)


@dataclass(frozen=True)
class VlnQA(Benchmark):
    """All questions; each is about a whole video."""

    folder: str = option("", "folder below videos that the paths of the file begin in, such as vlnqa")

    name: ClassVar[str] = "vlnqa"
    task: ClassVar[TaskName] = "choice"

    def official(self) -> dict[str, Official]:
        """Return the number of questions."""
        return {"samples": Official(200)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question, with the name of its video as id."""
        names = ["vlnqa.json", "egocentric_navigation.json", "json/egocentric_navigation.json"]
        file = self.main_file(names, "the questions of VLN-QA")
        for number, row in enumerate(read_json(file, list), 1):
            yield try_parse(self._sample, row, f"{file} entry {number}")

    def _sample(self, row: Any, where: str) -> Sample:
        parts = _parse_prompt(row, where) if isinstance(row, dict) and "text" in row else _parse_fields(row, where)
        video, question, options, answer = parts
        if len(options) != 4 or len(set(options)) != 4:
            raise SourceError(f"{where}: options are {list(options)}, expected four different ones: correct them")
        clip = Clip(str(PurePosixPath(self.folder) / video))
        return Sample(PurePosixPath(video).stem, (clip,), question, options, answer)


def _parse_prompt(row: Any, where: str) -> tuple[str, str, tuple[str, ...], int]:
    """Return video, question, options and answer of a row in EgoThinker's form."""
    prompt = _PROMPT.match(text_of(row, "text", where).replace("\r\n", "\n"))
    if prompt is None:
        raise SourceError(f"{where}: field 'text' has no lines 'Question:' and 'Option:': fetch the file again")
    lettered = dict(_OPTION.findall(prompt["options"]))
    letters, right = "".join(lettered), text_of(row, "gt", where)
    if letters != "ABCD"[: len(letters)] or right not in lettered:
        raise SourceError(f"{where}: field 'gt' is {right!r} of options {letters or 'none'}: correct it")
    options = tuple(lettered.values())
    return text_of(row, "video_path", where), prompt["question"].strip(), options, letters.index(right)


def _parse_fields(row: Any, where: str) -> tuple[str, str, tuple[str, ...], int]:
    """Return video, question, options and answer of a row in MVBench's form."""
    video, right = text_of(row, "video", where), one_line(row, "answer", where)
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not all(map(is_text, candidates)):
        raise SourceError(f"{where}: field 'candidates' is {candidates!r}, expected a list of texts: correct it")
    options = tuple(" ".join(text.split()) for text in candidates)
    if right not in options:
        raise SourceError(f"{where}: the answer {right!r} is none of {list(options)}: correct one")
    return video, text_of(row, "question", where).replace("\r\n", "\n"), options, options.index(right)
