"""Validation clips with questions: a caption, a choice among options, or a short answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import Question, QuestionBatch
from datamodules.clips.dataset import VIEWS, ClipConfig, Span, read_span
from datamodules.io.jsonl import read_records
from datamodules.io.validate import Record, validate
from datamodules.text import TextEncoder, UnusableText
from datamodules.video.reader import ClipReader


class QuestionRecord(Record):
    """A question about a validation clip; see ``datamodules.batch.Question`` for the fields.

    The answer of a question with options is one of them.
    """

    task: str = Field(min_length=1)
    question: str
    answer: str
    options: list[str] = []
    parts: dict[str, str] = {}


class ValidationRecord(Record):
    """A line of the file of validation clips.

    Attributes:
        id: name of the clip.
        views: path of each view below the data root; every line has the same views.
        start, end: the span in seconds.
        ego_visible: the egocentric camera sees the action.
        questions: at least one.
    """

    id: str
    views: dict[Literal["ego", "exo"], str] = Field(min_length=1)
    start: float = Field(ge=0)
    end: float
    ego_visible: bool = True
    questions: list[QuestionRecord] = Field(min_length=1)


_RECORD = TypeAdapter(ValidationRecord)


@dataclass(frozen=True)
class ValidationClip:
    """A validation clip.

    Attributes:
        name: its ``id``.
        span: files and seconds of its frames.
        ego_visible: the egocentric camera sees the action.
        questions: questions about it, with ``clip`` 0.
    """

    name: str
    span: Span
    ego_visible: bool
    questions: tuple[Question, ...]


class ValidationDataset(Dataset[tuple[ValidationClip, dict[str, Tensor]]]):
    """Validation clips with questions.

    Args:
        root: folder that the paths of the file are below.
        file: JSON Lines or a JSON array, a ``ValidationRecord`` a line.
        clips: frames of a clip.
        encoder: text to tokens.
        timeout_s: longest wait for one video file.

    Raises:
        ValueError: a line is invalid; names file, line and field.
    """

    def __init__(
        self, root: Path, file: Path, clips: ClipConfig, encoder: TextEncoder, timeout_s: float | None = None
    ) -> None:
        self.clips, self.encoder, self.reader = clips, encoder, ClipReader(timeout_s=timeout_s)
        self.items: list[ValidationClip] = []
        for where, row in read_records(file):
            if isinstance(row, ValueError):
                raise row
            record = validate(_RECORD, row, where)
            views = self.items[0].span.paths.keys() if self.items else record.views.keys()
            _check(record, where, views, encoder)
            self.items.append(_clip(record, root))
        if not self.items:
            raise ValueError(f"{file}: holds no validation clip: add one, or set data.init_args.held_out to null")

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[ValidationClip, dict[str, Tensor]]:
        """Return a clip and its frames, uint8 [T, S, S, 3] for each view.

        Raises:
            ClipDecodeError: a file cannot be read; scores over fewer clips would not be comparable.
        """
        return self.items[index], read_span(self.reader, self.items[index].span, self.clips)

    def all_questions(self) -> list[Question]:
        """Return the questions about every clip, each with ``clip`` 0."""
        return [question for item in self.items for question in item.questions]

    def collate(self, samples: list[tuple[ValidationClip, dict[str, Tensor]]]) -> QuestionBatch:
        """Join clips and encode their questions."""
        questions = []
        for row, (item, _) in enumerate(samples):
            questions += [replace(question, clip=row) for question in item.questions]
        # Open questions become prompts that the answer is generated for; each option of a choice is a row to be scored.
        open_ended = [question for question in questions if not question.options]
        options = [(question, option) for question in questions for option in question.options]
        videos = {view: torch.stack([clip[view] for _, clip in samples]) for view in VIEWS if view in samples[0][1]}
        return QuestionBatch(
            ids=[item.name for item, _ in samples],
            ego_visible=[item.ego_visible for item, _ in samples],
            questions=questions,
            prompts=self.encoder.batch([self.encoder.prompt(q.question) for q in open_ended]),
            prompt_clip=torch.tensor([q.clip for q in open_ended], dtype=torch.int64),
            options=self.encoder.batch([self.encoder.conversation([(q.question, option)]) for q, option in options]),
            option_clip=torch.tensor([q.clip for q, _ in options], dtype=torch.int64),
            ego_video=videos.get("ego"),
            exo_video=videos.get("exo"),
        )


def _check(record: ValidationRecord, where: str, views: Collection[str], encoder: TextEncoder) -> None:
    """Check that fields agree with each other, and that the texts can be encoded.

    Args:
        record: of one line.
        where: file and line, for messages.
        views: views of the first line.
        encoder: text to tokens.

    Raises:
        ValueError: they do not; names file, line and field.
    """
    if record.end <= record.start:
        raise ValueError(f"{where}: field 'end' is {record.end}, expected more than 'start' {record.start}: correct it")
    for view, path in record.views.items():
        if not path.strip():
            raise ValueError(f"{where}: field 'views.{view}' is {path!r}, expected the path of a video: correct it")
    if record.views.keys() != set(views):
        raise ValueError(
            f"{where}: field 'views' has {', '.join(sorted(record.views))}, expected {', '.join(sorted(views))} as in "
            "the first line: give all clips the same views"
        )
    for number, question in enumerate(record.questions):
        field = f"questions[{number}]"
        if not question.answer.strip():
            raise ValueError(f"{where}: field '{field}.answer' is {question.answer!r}, expected a text: correct it")
        options = question.options
        if options and question.answer not in options:
            raise ValueError(f"{where}: field '{field}.answer' is {question.answer!r}, none of the options: correct it")
        if len(set(options)) < len(options):
            raise ValueError(f"{where}: field '{field}.options' is {options}, which repeats one: correct it")
        try:
            encoder.prompt(question.question)
            for option in options:
                encoder.conversation([(question.question, option)])
        except UnusableText as error:
            raise ValueError(f"{where}: field '{field}': {error}") from None


def _clip(record: ValidationRecord, root: Path) -> ValidationClip:
    span = Span({view: root / path for view, path in record.views.items()}, record.start, record.end)
    questions = tuple(Question(0, q.task, q.question, q.answer, tuple(q.options), q.parts) for q in record.questions)
    return ValidationClip(record.id, span, record.ego_visible, questions)
