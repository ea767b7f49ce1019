"""What every data module shares: the order of samples, batches of clips with text, and the held-out questions.

The order of samples is a function of (seed, epoch) alone, so a run goes on exactly where it stopped: the loader's state
is an epoch and a position, equal on all ranks.

A sample of training that cannot be read, or whose text leaves nothing to learn, is masked out of its batch, never
replaced; its batch says why, and too many of them stop the run. In evaluation it is an error.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, BenchmarkBatch, ClipBatch, Question, QuestionBatch
from datamodules.io.jsonl import read_jsonl, require, seconds
from datamodules.text import CHAT, EncodedText, PromptConfig, TextEncoder, UnusableText
from datamodules.video.convert import Fit
from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import read_views

VIEWS = ("ego", "exo")
NOTHING_TO_LEARN = EncodedText([VIDEO_TOKEN_ID], [IGNORE_INDEX])
SHARE_IS_OVER = 200
"""Samples that the fraction of corrupt ones is at least taken over, so that a single one at the start stops nothing."""
HELD_OUT_BATCH = 32
IN_A_ROW = 20
"""Corrupt samples one after another that stop a run whatever their fraction: a disk or a network is gone."""


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
    """Where a sample's pictures are: one file for each view, and seconds on the clock that they share.

    Attributes:
        paths: video file of each view.
        start_s, end_s: the seconds; an end of infinity stands for the end of the shortest file.
        offsets_s: time on the shared clock at which a view's file begins, 0 where a view is not named.
    """

    paths: dict[str, Path]
    start_s: float
    end_s: float
    offsets_s: dict[str, float] = field(default_factory=dict)


class TooManyCorrupt(ValueError):
    """More samples cannot be used than the configuration allows."""


class ReadingStopped(ValueError):
    """The reading processes give no batch any more."""


@dataclass(frozen=True)
class _Request:
    """One micro-batch: the samples to read, and the global batch they belong to."""

    epoch: int
    indices: list[int]
    global_indices: list[int]
    micro_batches: int


class ClipTextDataset(Dataset[ClipBatch], ABC):
    """Samples of one clip, in one or both views, and one text.

    Attributes:
        source_names: what the samples are mixed from, for the curves; empty if nothing is mixed.
    """

    source_names: tuple[str, ...] = ()

    def __init__(self, clips: ClipConfig, encoder: TextEncoder) -> None:
        self.clips = clips
        self.encoder = encoder
        self.reader = ClipReader()
        self._encoded: tuple[Any, dict[int, EncodedText], dict[int, str]] = (None, {}, {})

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Stable name of a sample."""

    @abstractmethod
    def span(self, index: int, epoch: int) -> Span:
        """Where the sample's pictures are in this epoch; no file is touched."""

    @abstractmethod
    def text(self, index: int, epoch: int) -> EncodedText:
        """The sample's text in this epoch."""

    @property
    def prompt(self) -> list[int] | None:
        """Tokens before every sample's text, if they are the same."""
        return None

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return len(self)

    def epoch_samples(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, not shuffled; any of them may be missing or come several times."""
        return np.arange(len(self))

    def source(self, index: int) -> int:
        """Place of a sample's source in ``source_names``."""
        return 0

    def groups(self) -> NDArray[np.integer[Any]] | None:
        """A number for each sample, equal for samples that read the same files; None if there is no such grouping."""
        return None

    def videos(self, span: Span) -> dict[str, Tensor]:
        """Uint8 [T, S, S, 3] for each view of a span.

        Raises:
            ClipDecodeError: a file is missing, damaged or too short; never another clip in its place.
        """
        return _videos(self.reader, span, self.clips)

    def __getitems__(self, request: _Request) -> ClipBatch:
        """Read one micro-batch; samples that cannot be read are masked."""
        texts, failed = self._texts(request.epoch, request.global_indices)
        spans = [self.span(index, request.epoch) for index in request.indices]
        shape = (len(spans), self.clips.num_frames, self.clips.image_size, self.clips.image_size, 3)
        frames = {view: _zeros(shape) for view in spans[0].paths}
        for row, (index, span) in enumerate(zip(request.indices, spans, strict=True)):
            if index in failed:
                continue
            try:
                for view, video in self.videos(span).items():
                    frames[view][row] = video
            except ClipDecodeError as error:
                failed[index] = str(error)
        rows = [NOTHING_TO_LEARN if index in failed else texts[index] for index in request.indices]
        return ClipBatch(
            ids=[self.name(index) for index in request.indices],
            text=self.encoder.batch(rows),
            label_tokens=max(1, self._label_tokens(texts, request.global_indices)) / request.micro_batches,
            source_names=self.source_names,
            source=torch.tensor([self.source(i) for i in request.indices]) if self.source_names else None,
            valid=torch.tensor([index not in failed for index in request.indices]),
            corrupt=[f"{self.name(index)}: {failed[index]}" for index in request.indices if index in failed],
            prompt=None if self.prompt is None else torch.tensor(self.prompt),
            **{f"{view}_video": frames[view] for view in frames},
        )

    @staticmethod
    def _label_tokens(texts: dict[int, EncodedText], indices: list[int]) -> int:
        """Supervised tokens of a global batch, in which a sample may come more than once."""
        return sum(texts[index].label_tokens for index in indices if index in texts)

    def _texts(self, epoch: int, indices: list[int]) -> tuple[dict[int, EncodedText], dict[int, str]]:
        """Texts of a global batch, and why others cannot be used; kept for its other micro-batches."""
        if self._encoded[0] != (epoch, indices):
            texts: dict[int, EncodedText] = {}
            unusable: dict[int, str] = {}
            for index in indices:
                try:
                    texts[index] = self.text(index, epoch)
                except UnusableText as error:
                    unusable[index] = str(error)
            self._encoded = (epoch, indices), texts, unusable
        return self._encoded[1], dict(self._encoded[2])


class GlobalBatchSampler(Sampler[_Request]):
    """Shuffled global batches, split over ranks and accumulated micro-batches; the last incomplete one is left out.

    The set of samples in each global batch depends on (seed, epoch) only, not on how it is split.

    Args:
        samples: number of samples of an epoch.
        global_batch_size: samples of one optimiser step.
        accumulate: micro-batches of a step on each rank.
        rank, world: this rank, and how many there are.
        seed: of the order.
        groups: integer [samples], equal where samples read the same files.
        block_groups: where above 0, groups are shuffled, and samples within blocks of so many groups.
        epoch_samples: which samples an epoch has, given its number; each of them once if None.
    """

    def __init__(
        self,
        samples: int,
        global_batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int,
        groups: NDArray[np.integer[Any]] | None = None,
        block_groups: int = 0,
        epoch_samples: Callable[[int], NDArray[np.int64]] | None = None,
    ) -> None:
        self.epoch_samples = epoch_samples
        self.samples, self.global_batch_size, self.accumulate = samples, global_batch_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.groups, self.block_groups = groups, block_groups
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.samples // self.global_batch_size * self.accumulate

    def __iter__(self) -> Iterator[_Request]:
        """Requests from micro-batch ``start`` of ``epoch`` on."""
        order = self._order()
        parts = self.world * self.accumulate
        size = self.global_batch_size // parts
        for position in range(self.start, len(self)):
            batch, micro = divmod(position, self.accumulate)
            together = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size].tolist()
            first = (micro * self.world + self.rank) * size
            yield _Request(self.epoch, together[first : first + size], together, parts)

    def _order(self) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.samples)
        if self.epoch_samples is not None:
            order = self.epoch_samples(self.epoch)[order]
        if self.groups is None or not self.block_groups:
            return order
        found, number = np.unique(self.groups, return_inverse=True)
        block = rng.permutation(len(found))[number] // self.block_groups
        return order[np.argsort(block[order], kind="stable")]


class ResumableLoader(DataLoader[ClipBatch]):
    """A loader whose state is (epoch, global batches handed out); Lightning saves and restores it.

    The state is the same on all ranks, and another number of them, or of accumulated micro-batches, goes on from it.

    Corrupt samples are counted over the batches handed out since the process started. A run stops when more than
    ``max_corrupt_fraction`` of this rank's samples (of the first 200 while there are fewer) are corrupt, or 20 in a
    row.

    Args:
        dataset: the samples.
        sampler: their order.
        num_workers: processes that read; 0 reads in this one.
        max_corrupt_fraction: largest fraction of corrupt samples that is tolerated.
        timeout_s: longest wait for one batch of the processes, None for no limit.

    Raises:
        TooManyCorrupt: while iterating.
        ReadingStopped: while iterating: a process hangs or has died; the message names samples.
    """

    def __init__(
        self,
        dataset: ClipTextDataset,
        sampler: GlobalBatchSampler,
        num_workers: int,
        max_corrupt_fraction: float = 0.01,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            timeout=(timeout_s or 0) if num_workers else 0,
        )
        self.samples, self.order, self.max_corrupt_fraction = dataset, sampler, max_corrupt_fraction
        self.epoch = self.position = 0
        self.seen = self.corrupt = self.in_a_row = 0
        self.last_corrupt: deque[str] = deque(maxlen=3)

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """The rest of the epoch, then whole epochs."""
        if self.position >= len(self):  # the Trainer stops at the length and never exhausts the iterator
            self.epoch, self.position = self.epoch + 1, 0
        self.order.epoch, self.order.start = self.epoch, self.position
        try:
            for batch in super().__iter__():
                self._watch(batch)
                self.position += 1
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise
            self.order.start = self.position
            names = ", ".join(self.samples.name(index) for index in next(iter(self.order)).indices)
            raise ReadingStopped(
                f"{error}; the batch waited for holds {names}: check these with `make data-check`, or raise "
                "data.init_args.decode_timeout_s"
            ) from error

    def _watch(self, batch: ClipBatch) -> None:
        self.seen += len(batch.ids)
        self.corrupt += len(batch.corrupt)
        self.last_corrupt += batch.corrupt
        outage = False
        for valid in batch.valid.tolist():
            self.in_a_row = 0 if valid else self.in_a_row + 1
            outage = outage or self.in_a_row >= IN_A_ROW
        too_many = self.corrupt > self.max_corrupt_fraction * max(self.seen, SHARE_IS_OVER)
        if too_many or outage:
            limit = f"data.max_corrupt_fraction allows {self.max_corrupt_fraction:.1%}"
            raise TooManyCorrupt(
                f"{self.corrupt} of {self.seen} samples of this rank could not be used "
                f"({limit if too_many else f'{IN_A_ROW} of them in a row'}), the last ones: "
                f"{' | '.join(self.last_corrupt)}: run `make data-check`, or raise data.init_args.max_corrupt_fraction"
            )

    def state_dict(self) -> dict[str, int]:
        """Position of the next global batch."""
        return {"epoch": self.epoch, "global_batch": self.position // self.order.accumulate}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self.epoch, self.position = state["epoch"], state["global_batch"] * self.order.accumulate


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
        max_text_tokens: longest text, the clip not counted.
        prompt: how questions and answers are written.
        micro_batch_size: samples on a device at a time, how many are accumulated follows; null for what
            ``trainer.accumulate_grad_batches`` leaves of the global batch.
        shuffle_block_groups: shuffle recordings, and samples within blocks of so many, so that open files are used
            again; 0 shuffles all samples together.
        max_corrupt_fraction: fraction of samples that may be corrupt before training stops, see ``ResumableLoader``.
        decode_timeout_s: longest wait for one video file, in seconds; a clip that takes longer counts as corrupt.

    Raises:
        ValueError: ``root`` or ``held_out`` is missing, or a number is impossible.
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
        prompt: PromptConfig = CHAT,
        micro_batch_size: int | None = None,
        shuffle_block_groups: int = 0,
        max_corrupt_fraction: float = 0.01,
        decode_timeout_s: float = 60.0,
    ) -> None:
        super().__init__()
        for key, number, least in (
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("shuffle_block_groups", shuffle_block_groups, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"data.{key}: got {number}, allowed: {least} or more")
        if not 0 <= max_corrupt_fraction <= 1:
            raise ValueError(f"data.max_corrupt_fraction: got {max_corrupt_fraction}, allowed: from 0 to 1")
        if not decode_timeout_s > 0:
            raise ValueError(f"data.decode_timeout_s: got {decode_timeout_s}, allowed: above 0")
        if not Path(root).is_dir():
            raise ValueError(
                f"data.root: no folder {root}: run `make data` if it is of the generated world, else put your "
                "videos there, or set data.init_args.root"
            )
        if held_out is not None and not Path(held_out).is_file():
            raise ValueError(f"data.held_out: no file {held_out}: run `make data`, or set data.init_args.held_out")
        self.root, self.held_out = Path(root), None if held_out is None else Path(held_out)
        self.clips, self.global_batch_size, self.seed, self.num_workers = clips, global_batch_size, seed, num_workers
        self.micro_batch_size, self.shuffle_block_groups = micro_batch_size, shuffle_block_groups
        self.max_corrupt_fraction, self.decode_timeout_s = max_corrupt_fraction, decode_timeout_s
        self.encoder = TextEncoder(tokenizer, max_text_tokens, prompt)
        self.train_set: ClipTextDataset | None = None
        self.benchmarks: list[Dataset[BenchmarkBatch]] = []  # evaluated at every validation
        # There may be fewer held-out clips than ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True

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
            self.train_set.reader = ClipReader(timeout_s=self.decode_timeout_s)
            samples = self.train_set.epoch_length
            if samples < self.global_batch_size:
                raise ValueError(
                    f"data.global_batch_size: got {self.global_batch_size}, but there are only {samples} "
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
        return self.train_set.epoch_length // self.global_batch_size

    def accumulation(self, world: int) -> int:
        """Micro-batches of one optimiser step on each of ``world`` ranks, if ``micro_batch_size`` is set.

        Raises:
            ValueError: the global batch does not split so.
        """
        together, size = self.global_batch_size, self.micro_batch_size
        assert size is not None, "without micro_batch_size the Trainer says how many are accumulated"
        if together % (world * size):
            below, share = together // (world * size) * world * size, together // world
            fits = [f"global_batch_size {n}" for n in (below, below + world * size) if n]
            if together % world == 0:
                sizes = [n for n in range(1, share + 1) if share % n == 0]
                fits += [f"micro_batch_size {n}" for n in sorted(sorted(sizes, key=lambda n: abs(n - size))[:2])]
            raise ValueError(
                f"data.global_batch_size: {together} does not split into {world} ranks times micro-batches of "
                f"{size} (data.micro_batch_size); near it, these do: {', '.join(fits)}"
            )
        return together // (world * size)

    def sample_frames(self, clips: int) -> Tensor:
        """Frames of evenly spread training clips, uint8 [at most clips * views * T, S, S, 3].

        Clips that cannot be read are left out here, and reported when their turn in training comes.

        Raises:
            ClipDecodeError: none of them can be read.
        """
        assert self.train_set is not None, "setup() comes first"
        frames: list[Tensor] = []
        failure: ClipDecodeError | None = None
        for index in torch.linspace(0, len(self.train_set) - 1, clips).long().tolist():
            try:
                frames += self.train_set.videos(self.train_set.span(index, 0)).values()
            except ClipDecodeError as error:
                failure = error
        if failure is not None and not frames:
            raise failure
        return torch.cat(frames)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled micro-batches of this rank."""
        assert self.train_set is not None and self.trainer is not None, "the Trainer calls this"
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if self.global_batch_size % (accumulate * world):
            raise ValueError(
                f"data.global_batch_size: {self.global_batch_size} does not split into {world} ranks times "
                f"{accumulate} accumulated micro-batches (trainer.accumulate_grad_batches)"
            )
        if self.micro_batch_size is not None and accumulate != self.accumulation(world):
            raise ValueError(
                f"trainer.accumulate_grad_batches: got {accumulate}, but data.micro_batch_size {self.micro_batch_size} "
                f"needs {self.accumulation(world)}: set it to that"
            )
        sampler = GlobalBatchSampler(
            self.train_set.epoch_length,
            self.global_batch_size,
            accumulate,
            self.trainer.global_rank,
            world,
            self.seed,
            self.train_set.groups() if self.shuffle_block_groups else None,
            self.shuffle_block_groups,
            self.train_set.epoch_samples,
        )
        longest_s = self._longest_wait_s(self.global_batch_size // (accumulate * world))
        return ResumableLoader(self.train_set, sampler, self.num_workers, self.max_corrupt_fraction, longest_s)

    def _longest_wait_s(self, clips: int) -> float:
        """For a batch; files are bounded by themselves: this is for all else, and must not come before."""
        return 300 + self.decode_timeout_s * clips

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Held-out questions, then the samples of each benchmark."""
        return [*self.test_dataloader(), *(self._share(benchmark, list) for benchmark in self.benchmarks)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Held-out questions, if there are any."""
        if self.held_out is None:
            return []
        dataset = self.held_out_set()
        return [self._share(dataset, dataset.collate)]

    def _share(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        """This rank's share of clips in a fixed order in which the first batches show many takes."""
        assert self.trainer is not None, "the Trainer calls this"
        order = np.random.default_rng(0).permutation(len(dataset))  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            sampler=order[self.trainer.global_rank :: self.trainer.world_size].tolist(),
            batch_size=HELD_OUT_BATCH,
            collate_fn=collate,
            num_workers=self.num_workers,
            timeout=self._longest_wait_s(HELD_OUT_BATCH) if self.num_workers else 0,
        )

    def held_out_set(self) -> HeldOutDataset:
        """The held-out clips.

        Raises:
            ValueError: there are none.
        """
        if self.held_out is None:
            raise ValueError("data.held_out: got null, but held-out clips are asked for: set data.init_args.held_out")
        return HeldOutDataset(self.root, self.held_out, self.clips, self.encoder, self.decode_timeout_s)


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

    Args:
        root: folder that the paths are below.
        file: the lines.
        clips: frames of a clip.
        encoder: text to tokens.
        timeout_s: longest wait for one video file.

    Raises:
        ValueError: a line that is no JSON, or lacks a field; the message names file, line and field.
    """

    def __init__(
        self, root: Path, file: Path, clips: ClipConfig, encoder: TextEncoder, timeout_s: float | None = None
    ) -> None:
        self.clips, self.encoder, self.reader = clips, encoder, ClipReader(timeout_s=timeout_s)
        self.items = [_held_out_clip(root, record, where) for where, record in read_jsonl(file)]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[_HeldOutClip, dict[str, Tensor]]:
        """A clip's questions and its pictures, uint8 [T, S, S, 3] for each view.

        Raises:
            ClipDecodeError: a file cannot be read; scores over fewer clips would not be comparable.
        """
        return self.items[index], _videos(self.reader, self.items[index].span, self.clips)

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


def _question(clip: int, q: dict[str, Any]) -> Question:
    return Question(clip, q["task"], q["question"], q["answer"], tuple(q.get("options", ())), q.get("parts", {}))


def _held_out_clip(root: Path, record: dict[str, Any], where: str) -> _HeldOutClip:
    paths = {view: root / path for view, path in require(record, "views", where).items()}
    span = Span(paths, seconds(record, "start", where), seconds(record, "end", where))
    questions = require(record, "questions", where)
    for question in questions:
        for key in ("task", "question", "answer"):
            require(question, key, where)
    return _HeldOutClip(str(require(record, "id", where)), span, bool(record.get("ego_visible", True)), questions)


def _videos(reader: ClipReader, span: Span, c: ClipConfig) -> dict[str, Tensor]:
    read = read_views(
        reader, span.paths, span.start_s, span.end_s, c.num_frames, c.image_size, c.frame_fit, span.offsets_s
    )
    return {view: clip.frames for view, clip in read.items()}


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Uint8 zeros; in a reading process in shared memory, where they need no copying to be handed over."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collation does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _as_is(batch: Any) -> Any:
    return batch
