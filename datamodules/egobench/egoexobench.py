"""EgoExoBench: questions with four options about egocentric and exocentric clips together, in 11 tasks.

Read: ``EgoExoBench_MCQ.tsv``, the table that VLMEvalKit evaluates, with columns ``index``, ``question``, ``options``
(lines ``A. ...``), ``answer`` (a letter), ``subtask_type`` and ``medias``, a Python list of ``{"type": "video",
"video_path", "video_start", "video_end"}`` or ``{"type": "image" | "frames", "image_paths"}``. ``<video>`` and
``<image>`` in question and options stand for these in their order, so that options may be videos themselves.

The authors publish a file for each medium of a question, ``processed_videos/question<index>_video<n>.mp4`` (``.jpg``
for an image), except for those of Ego-Exo4D, which are cut out of its takes, ``EgoExo4D/takes/...``.

All clips stand in front of the question, numbered, and the text says "video 1" for the first. The table does not tell
their views; the names of files tell those of Ego-Exo4D (``cam01``, ``gp01``) and LEMMA (``master``), and every other
clip counts as egocentric, which decides only which encoder reads it in a stage that has both.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from datamodules.egobench.base import LETTERS, Benchmark, table_rows
from datamodules.egobench.samples import Clip, Sample, TaskName, VideoInput, View
from datamodules.io.annotations import Counts, Official, SourceError, number_of, read_csv, text_of, try_parse

_COLUMNS = ("index", "question", "options", "answer", "subtask_type", "medias")
_MARK = re.compile(r"<(?:video|image)>")
_OPTION = re.compile(r"^\(?([A-Z])[.):]\s*", re.MULTILINE)
_EXO = re.compile(r"(cam|gp)\d+|master")
_TAKES = "EgoExo4D/"


@dataclass(frozen=True)
class EgoExoBench(Benchmark):
    """All questions; their groups are the tasks."""

    name: ClassVar[str] = "egoexobench"
    task: ClassVar[TaskName] = "choice"
    egocentric: ClassVar[bool] = False

    def official(self) -> dict[str, Official]:
        """Return the rounded number of questions that the authors give, and the number of tasks."""
        return {"samples": Official(7300, exact=False), "tasks": Official(11)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question."""
        file = self.main_file(["EgoExoBench_MCQ.tsv"], "EgoExoBench's questions")
        for where, row in table_rows(read_csv(file, delimiter="\t"), _COLUMNS, file):
            sample = row if isinstance(row, SourceError) else try_parse(_sample, row, where)
            if isinstance(sample, Sample):
                counts.add_distinct("tasks", sample.groups[0])
            yield sample


def _sample(row: Any, where: str) -> Sample:
    key, kind, letter = (text_of(row, name, where) for name in ("index", "subtask_type", "answer"))
    media = _media(row["medias"], where)
    question, named = _numbered(text_of(row, "question", where), 0)
    options = []
    letters, texts = _lettered(text_of(row, "options", where))
    for text in texts:
        option, named = _numbered(text, named)
        options.append(" ".join(option.split()))
    if len(options) < 2 or letters != LETTERS[: len(options)] or len(set(options)) != len(options):
        raise SourceError(
            f"{where}: field 'options' is {row['options']!r}, expected lines 'A. ...' of own texts: fix it"
        )
    if letter not in letters or len(letter) != 1:
        raise SourceError(f"{where}: field 'answer' is {letter!r}, expected a letter of {letters}: correct it")
    if named != len(media):
        raise SourceError(f"{where}: {named} marks <video> or <image>, but {len(media)} in 'medias': make them agree")
    clips = tuple(_clip(each, key, n, f"{where} medium {n + 1}") for n, each in enumerate(media))
    shown = VideoInput(clips, tuple(f"Video {number}:" for number in range(1, len(clips) + 1)))
    return Sample(key, clips, question, tuple(options), letters.index(letter), (kind,), shown=(shown,))


def _media(text: str, where: str) -> Sequence[Any]:
    """Return the list that a cell holds as Python code."""
    try:
        media = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        media = None
    if not isinstance(media, list) or not media:
        raise SourceError(f"{where}: field 'medias' is {text[:80]!r}, expected a list of media: fetch the file again")
    return media


def _numbered(text: str, before: int) -> tuple[str, int]:
    """Return a text with the number of a video for each mark, and the number of videos so far."""
    head, *rest = _MARK.split(text)
    for number, after in enumerate(rest, before + 1):
        head += f"video {number}{after}"
    return head.strip(), before + len(rest)


def _lettered(text: str) -> tuple[str, list[str]]:
    """Return the letters and the texts of lines ``A. text``; an option may take several lines."""
    _, *parts = _OPTION.split(text)
    return "".join(parts[::2]), parts[1::2]


def _clip(medium: Any, key: str, number: int, where: str) -> Clip:
    kind = medium.get("type") if isinstance(medium, Mapping) else None
    if kind not in ("video", "image", "frames"):
        raise SourceError(f"{where}: 'type' is {kind!r}, expected video, image or frames: correct it")
    source = _source(medium, kind, where)
    view: View = "exo" if _EXO.fullmatch(PurePosixPath(source).stem) else "ego"
    if not source.startswith(_TAKES):
        return Clip(f"processed_videos/question{key}_video{number}.{'jpg' if kind == 'image' else 'mp4'}", view=view)
    if kind != "video":
        raise SourceError(f"{where}: {kind} of Ego-Exo4D, expected a video: fetch the file again")
    if medium.get("video_start") is None or medium.get("video_end") is None:
        return Clip(source, view=view)
    start_s, end_s = number_of(medium, "video_start", where), number_of(medium, "video_end", where)
    if not 0 <= start_s < end_s < math.inf:
        raise SourceError(f"{where}: 'video_start' and 'video_end' give {start_s:g} to {end_s:g} s: correct them")
    return Clip(source, start_s, end_s, view=view)


def _source(medium: Mapping[str, Any], kind: str, where: str) -> str:
    """Return the path of a medium in the dataset that it comes from; of images the first."""
    if kind == "video":
        return text_of(medium, "video_path", where)
    paths = medium.get("image_paths")
    if not isinstance(paths, list) or not paths:
        raise SourceError(f"{where}: field 'image_paths' is {paths!r}, expected a list of paths: correct it")
    return text_of({"image_paths": paths[0]}, "image_paths", where)
