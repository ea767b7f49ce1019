"""What every data module shares: the order of samples, batches of clips with text, and the held-out questions.

The order of samples is a function of (seed, epoch) alone, so a run goes on exactly where it stopped: the loader's state
is an epoch and a position, equal on all ranks.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.batch import ClipBatch, Question, QuestionBatch
from datamodules.clip_stream import ClipReader, Fit, read_views
from datamodules.text import EncodedText, TextEncoder

VIEWS = ("ego", "exo")


@dataclass(frozen=True)
class ClipConfig:
    """How a span of video becomes frames.

    Attributes:
        num_frames: T, at the middles of T equal parts of the span.
        image_size: S, side of the square pictures in pixels.
        frame_fit: ``pad`` to a square, ``crop`` the middle, or ``squash``; the same in training and evaluation.
    """

    num_frames: int
    image_size: int
    frame_fit: Fit = "pad"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("num_frames", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"clips.{name}: got {getattr(self, name)}, allowed: 1 or more")


@dataclass(frozen=True)
class Span:
    """Where a sample's pictures are: one file for each view, and seconds on the clock that they share."""

    paths: dict[str, Path]
    start_s: float
    end_s: float


@dataclass(frozen=True)
class _Request:
    """One micro-batch: the samples to read, and the global batch they belong to."""

    epoch: int
    indices: list[int]
    global_indices: list[int]
    micro_batches: int


class ClipTextDataset(Dataset[ClipBatch], ABC):
    """Samples of one clip, in one or both views, and one text."""

    def __init__(self, clips: ClipConfig, encoder: TextEncoder) -> None:
        self.clips = clips
        self.encoder = encoder
        self.reader = ClipReader()

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Stable name of a sample."""

    @abstractmethod
    def span(self, index: int, epoch: int) -> Span:
        """Where the sample's pictures are in this epoch."""

    @abstractmethod
    def text(self, index: int, epoch: int) -> EncodedText:
        """The sample's text in this epoch."""

    def videos(self, span: Span) -> dict[str, Tensor]:
        """Uint8 [T, S, S, 3] for each view of a span.

        Raises:
            ClipDecodeError: a file is missing, damaged or too short; never another clip in its place.
        """
        c = self.clips
        read = read_views(self.reader, span.paths, span.start_s, span.end_s, c.num_frames, c.image_size, c.frame_fit)
        return {view: clip.frames for view, clip in read.items()}

    def __getitems__(self, request: _Request) -> ClipBatch:
        """Read one micro-batch."""
        texts = {index: self.text(index, request.epoch) for index in request.global_indices}
        read = [self.videos(self.span(index, request.epoch)) for index in request.indices]
        return ClipBatch(
            ids=[self.name(index) for index in request.indices],
            text=self.encoder.batch([texts[index] for index in request.indices]),
            label_tokens=sum(text.label_tokens for text in texts.values()) / request.micro_batches,
            **{f"{view}_video": torch.stack([videos[view] for videos in read]) for view in VIEWS if view in read[0]},
        )


class GlobalBatchSampler(Sampler[_Request]):
    """Shuffled global batches, split over ranks and accumulated micro-batches; the last incomplete one is left out.

    The set of samples in each global batch depends on (seed, epoch) only, not on how it is split.
    """

    def __init__(self, samples: int, global_batch_size: int, accumulate: int, rank: int, world: int, seed: int) -> None:
        self.samples, self.global_batch_size, self.accumulate = samples, global_batch_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.samples // self.global_batch_size * self.accumulate

    def __iter__(self) -> Iterator[_Request]:
        """Requests from micro-batch ``start`` of ``epoch`` on."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples).tolist()
        parts = self.world * self.accumulate
        size = self.global_batch_size // parts
        for position in range(self.start, len(self)):
            batch, micro = divmod(position, self.accumulate)
            together = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]
            first = (micro * self.world + self.rank) * size
            yield _Request(self.epoch, together[first : first + size], together, parts)


class ResumableLoader(DataLoader[ClipBatch]):
    """A loader whose state is (epoch, micro-batches handed out); Lightning saves and restores it."""

    def __init__(self, dataset: ClipTextDataset, sampler: GlobalBatchSampler, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            timeout=300 if num_workers else 0,
        )
        self.order = sampler
        self.epoch = self.position = 0

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """The rest of the epoch, then whole epochs."""
        if self.position >= len(self):  # the Trainer stops at the length and never exhausts the iterator
            self.epoch, self.position = self.epoch + 1, 0
        self.order.epoch, self.order.start = self.epoch, self.position
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self.epoch, self.position = state["epoch"], state["position"]


class ClipDataModule(L.LightningDataModule, ABC):
    """Training samples of a stage, and the held-out questions every stage is judged by.

    Args:
        root: folder that all video paths are relative to.
        tokenizer: folder or hub name of a Hugging Face tokenizer.
        clips: frames of a clip.
        global_batch_size: samples of one optimiser step, over all ranks and accumulated micro-batches.
        held_out: JSON Lines of held-out clips with questions; null for none.
        seed: of the order of samples.
        num_workers: decoding processes per rank; 0 decodes in the training process.
        max_text_tokens: longest text, the clip counted as one token.

    Raises:
        ValueError: ``root`` or ``held_out`` is missing.
    """

    def __init__(
        self,
        root: str,
        tokenizer: str,
        clips: ClipConfig,
        global_batch_size: int,
        held_out: str | None = None,
        seed: int = 0,
        num_workers: int = 1,
        max_text_tokens: int = 2048,
    ) -> None:
        super().__init__()
        if global_batch_size < 1:
            raise ValueError(f"data.global_batch_size: got {global_batch_size}, allowed: 1 or more")
        if not Path(root).is_dir():
            raise ValueError(f"data.root: no folder {root}: run `make data`, or set data.init_args.root")
        if held_out is not None and not Path(held_out).is_file():
            raise ValueError(f"data.held_out: no file {held_out}: run `make data`, or set data.init_args.held_out")
        self.root, self.held_out = Path(root), None if held_out is None else Path(held_out)
        self.clips, self.global_batch_size, self.seed, self.num_workers = clips, global_batch_size, seed, num_workers
        self.encoder = TextEncoder(tokenizer, max_text_tokens)
        self.train_set: ClipTextDataset | None = None

    @abstractmethod
    def read(self) -> ClipTextDataset:
        """Read annotations and make the training samples; no video is decoded."""

    @abstractmethod
    def annotation_files(self) -> list[Path]:
        """Files that decide what is trained on; their bytes make the fingerprint."""

    def setup(self, stage: str) -> None:
        """Read the annotations once, for training only."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self.read()
            if len(self.train_set) < self.global_batch_size:
                raise ValueError(
                    f"data.global_batch_size: got {self.global_batch_size}, but there are only {len(self.train_set)} "
                    "training samples"
                )

    def fingerprint(self) -> str:
        """SHA-256 over the annotation files, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for file in self.annotation_files():
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        assert self.train_set is not None, "setup() comes first"
        return len(self.train_set) // self.global_batch_size

    def sample_frames(self, clips: int) -> Tensor:
        """Frames of evenly spread training clips, uint8 [clips * T, S, S, 3]."""
        assert self.train_set is not None, "setup() comes first"
        chosen = torch.linspace(0, len(self.train_set) - 1, clips).long().tolist()
        return torch.cat(
            [frames for i in chosen for frames in self.train_set.videos(self.train_set.span(i, 0)).values()]
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled micro-batches of this rank."""
        assert self.train_set is not None and self.trainer is not None, "the Trainer calls this"
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if self.global_batch_size % (accumulate * world):
            raise ValueError(
                f"data.global_batch_size: {self.global_batch_size} does not split into {world} ranks times "
                f"{accumulate} accumulated micro-batches (trainer.accumulate_grad_batches)"
            )
        sampler = GlobalBatchSampler(
            len(self.train_set), self.global_batch_size, accumulate, self.trainer.global_rank, world, self.seed
        )
        return ResumableLoader(self.train_set, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out questions in a fixed order, the share of this rank."""
        if self.held_out is None:
            return []
        assert self.trainer is not None, "the Trainer calls this"
        dataset = self.held_out_set()
        order = np.random.default_rng(0).permutation(len(dataset))  # so that the first batches show many takes
        mine = order[self.trainer.global_rank :: self.trainer.world_size].tolist()
        return DataLoader(
            dataset, sampler=mine, batch_size=32, collate_fn=dataset.collate, num_workers=self.num_workers
        )

    test_dataloader = val_dataloader

    def held_out_set(self) -> HeldOutDataset:
        """The held-out clips.

        Raises:
            ValueError: there are none.
        """
        if self.held_out is None:
            raise ValueError("data.held_out: got null, but held-out clips are asked for: set data.init_args.held_out")
        return HeldOutDataset(self.root, self.held_out, self.clips, self.encoder)


@dataclass(frozen=True)
class _HeldOutClip:
    name: str
    span: Span
    ego_visible: bool
    questions: list[dict[str, Any]]


class HeldOutDataset(Dataset[tuple[_HeldOutClip, dict[str, Tensor]]]):
    """Held-out clips with questions.

    A line of the file: ``id``, ``views`` (paths of ``ego`` and ``exo`` below the root), ``start``, ``end`` in seconds,
    ``ego_visible``, and ``questions``: each a ``task``, ``question``, ``answer``, and ``options`` (a choice) or
    ``parts`` (words of a caption scored by themselves).

    Raises:
        ValueError: a line that is no JSON, or lacks a field; the message names file, line and field.
    """

    def __init__(self, root: Path, file: Path, clips: ClipConfig, encoder: TextEncoder) -> None:
        self.clips, self.encoder, self.reader = clips, encoder, ClipReader()
        self.items = [_held_out_clip(root, record, where) for where, record in read_jsonl(file)]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[_HeldOutClip, dict[str, Tensor]]:
        """A clip's questions and its pictures, uint8 [T, S, S, 3] for each view."""
        span, c = self.items[index].span, self.clips
        read = read_views(self.reader, span.paths, span.start_s, span.end_s, c.num_frames, c.image_size, c.frame_fit)
        return self.items[index], {view: clip.frames for view, clip in read.items()}

    def all_questions(self) -> list[Question]:
        """Questions about every clip."""
        return [_question(0, q) for item in self.items for q in item.questions]

    def collate(self, samples: list[tuple[_HeldOutClip, dict[str, Tensor]]]) -> QuestionBatch:
        """Join clips and encode their questions."""
        questions = [_question(row, q) for row, (item, _) in enumerate(samples) for q in item.questions]
        open_ended = [q for q in questions if not q.options]
        offered = [(q, option) for q in questions for option in q.options]
        return QuestionBatch(
            ids=[item.name for item, _ in samples],
            ego_visible=[item.ego_visible for item, _ in samples],
            questions=questions,
            prompts=self.encoder.batch([self.encoder.prompt(q.question) for q in open_ended]),
            prompt_clip=torch.tensor([q.clip for q in open_ended], dtype=torch.int64),
            options=self.encoder.batch([self.encoder.conversation([(q.question, option)]) for q, option in offered]),
            option_clip=torch.tensor([q.clip for q, _ in offered], dtype=torch.int64),
            **{
                f"{view}_video": torch.stack([videos[view] for _, videos in samples])
                for view in VIEWS
                if view in samples[0][1]
            },
        )


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a JSON Lines file with their place, ``<file> line <n>``; empty lines are passed over.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: no UTF-8 text ({error.reason}): save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: malformed JSON ({error.msg} at column {error.colno}): mend the line"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record


def require(record: dict[str, Any], field: str, where: str) -> Any:
    """A field of a record.

    Raises:
        ValueError: it is missing.
    """
    if field not in record:
        raise ValueError(f"{where}: field {field!r} is missing")
    return record[field]


def seconds(record: dict[str, Any], field: str, where: str) -> float:
    """A time of a record.

    Raises:
        ValueError: it is missing or no number.
    """
    value = require(record, field, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: field {field!r} is {value!r}, expected seconds")
    return float(value)


def _question(clip: int, q: dict[str, Any]) -> Question:
    return Question(clip, q["task"], q["question"], q["answer"], tuple(q.get("options", ())), q.get("parts", {}))


def _held_out_clip(root: Path, record: dict[str, Any], where: str) -> _HeldOutClip:
    paths = {view: root / path for view, path in require(record, "views", where).items()}
    span = Span(paths, seconds(record, "start", where), seconds(record, "end", where))
    questions = require(record, "questions", where)
    for question in questions:
        for field in ("task", "question", "answer"):
            require(question, field, where)
    return _HeldOutClip(str(require(record, "id", where)), span, bool(record.get("ego_visible", True)), questions)


def _as_is(batch: Any) -> Any:
    return batch
