"""Samples of one clip and one text, read a micro-batch at a time.

A training sample that cannot be read, or whose text supervises no token, is masked out of its batch, never replaced.
The batch holds the reason, and too many corrupt samples stop the run. In evaluation such a clip is an error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch
from datamodules.clips.sampler import BatchRequest
from datamodules.text import EncodedText, TextEncoder, UnusableText
from datamodules.video.convert import RGB, Fit
from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import read_views

VIEWS = ("ego", "exo")
NOTHING_TO_LEARN = EncodedText([VIDEO_TOKEN_ID], [IGNORE_INDEX])


@dataclass(frozen=True)
class ClipConfig:
    """Number, size and fit of the frames that a span of video is sampled at.

    Attributes:
        num_frames: T, at the middles of T equal parts of the span.
        image_size: S, side of the square frames in pixels.
        frame_fit: ``pad`` to a square, ``crop`` the middle, or ``squash``; the same in training and evaluation.
        pad_rgb: colour that ``pad`` fills with, 0-255. None: the mean colour of the vision encoder in a run of an
            experiment, and CLIP's elsewhere.
    """

    num_frames: int
    image_size: int
    frame_fit: Fit = "pad"
    pad_rgb: RGB | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for impossible values."""
        for name in ("num_frames", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"clips.{name}: got {getattr(self, name)}, allowed: 1 or more")
        if self.pad_rgb is not None and not all(0 <= value <= 255 for value in self.pad_rgb):
            raise ValueError(f"clips.pad_rgb: got {list(self.pad_rgb)}, allowed: three values from 0 to 255")


@dataclass(frozen=True)
class Span:
    """Files and seconds of a sample's frames: one file for each view, and a span on the clock that they share.

    Attributes:
        paths: video file of each view; empty for text without video.
        start_s, end_s: the span in seconds; an end of infinity stands for the end of the shortest file.
        offsets_s: time on the shared clock at which a view's file begins, 0 where a view is not named.
    """

    paths: dict[str, Path]
    start_s: float
    end_s: float
    offsets_s: dict[str, float] = field(default_factory=dict)


class ClipTextDataset(Dataset[ClipBatch], ABC):
    """Samples of one clip, in one or both views, and one text.

    Attributes:
        source_names: names of the sources that the samples are mixed from, for the curves; empty without a mix.
        view_names: names of the views; by default those of the first sample. Needed where a span may have no video.
        other_views: names of further exocentric views that a sample's span may have.
        pad_to_multiple_of: lengths of the texts of a micro-batch are multiples of this.
    """

    source_names: tuple[str, ...] = ()
    view_names: tuple[str, ...] = ()
    other_views: tuple[str, ...] = ()
    pad_to_multiple_of = 1

    def __init__(self, clips: ClipConfig, encoder: TextEncoder) -> None:
        self.clips = clips
        self.encoder = encoder
        self.reader = ClipReader()
        self._encoded: tuple[Any, dict[int, EncodedText], dict[int, str]] = (None, {}, {})

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the stable name of a sample."""

    @abstractmethod
    def span(self, index: int, epoch: int) -> Span:
        """Return files and seconds of a sample's frames in an epoch, without touching a file."""

    @abstractmethod
    def text(self, index: int, epoch: int) -> EncodedText:
        """Return the text of a sample in an epoch."""

    def words(self, index: int, epoch: int) -> list[str]:
        """Return the text of a sample before it is encoded, in pieces, to look for words that the tokenizer lacks.

        By default there are none, and nothing is looked for.
        """
        return []

    @property
    def prompt(self) -> list[int] | None:
        """Tokens before the text of every sample, or None if they differ."""
        return None

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return len(self)

    def epoch_samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch, not shuffled; some may be missing or repeated."""
        return np.arange(len(self))

    def source(self, index: int) -> int:
        """Return the index of a sample's source in ``source_names``."""
        return 0

    def problem(self, index: int, epoch: int) -> str | None:
        """Return why a sample cannot be used, if that is known before its videos are read."""
        return None

    def narrated_samples(self, indices: Sequence[int]) -> list[bool] | None:
        """Return for some samples if their text is used; None if that of every sample in the dataset is."""
        return None

    def groups(self) -> NDArray[np.integer[Any]] | None:
        """Return a number for each sample, equal for samples that read the same files; None without such groups."""
        return None

    def videos(self, span: Span) -> dict[str, Tensor]:
        """Read the frames of each view of a span, uint8 [T, S, S, 3].

        Raises:
            ClipDecodeError: a file is missing, damaged or too short; never another clip in its place.
        """
        return read_span(self.reader, span, self.clips)

    def __getitems__(self, request: BatchRequest) -> ClipBatch:
        """Read a micro-batch; corrupt samples are masked."""
        texts, failed = self._texts(request.epoch, request.global_indices)
        for index in request.indices:
            if problem := self.problem(index, request.epoch):
                failed[index] = problem
        spans = [self.span(index, request.epoch) for index in request.indices]
        shape = (len(spans), self.clips.num_frames, self.clips.image_size, self.clips.image_size, 3)
        # Corrupt samples keep their place in the batch, with zeros as frames and nothing to learn.
        # Text without video has zeros as frames, so that every process runs every module; no loss depends on them.
        views = [view for view in self.view_names or spans[0].paths if view not in self.other_views]
        frames = {view: _zeros(shape) for view in views}
        others = _zeros((shape[0], len(self.other_views), *shape[1:])) if self.other_views else None
        for row, (index, span) in enumerate(zip(request.indices, spans, strict=True)):
            if index in failed or not span.paths:
                continue
            try:
                for view, video in self.videos(span).items():
                    if view in frames:
                        frames[view][row] = video
                    elif others is not None:
                        others[row, self.other_views.index(view)] = video
            except ClipDecodeError as error:
                failed[index] = str(error)
        narrated = self.narrated_samples(request.indices)
        rows = [NOTHING_TO_LEARN if index in failed else texts[index] for index in request.indices]
        return ClipBatch(
            ids=[self.name(index) for index in request.indices],
            text=self.encoder.batch(rows, self.pad_to_multiple_of),
            label_tokens=max(1, self._label_tokens(texts, request.global_indices)) / request.micro_batches,
            source_names=self.source_names,
            source=torch.tensor([self.source(i) for i in request.indices]) if self.source_names else None,
            valid=torch.tensor([index not in failed for index in request.indices]),
            corrupt=[f"{self.name(index)}: {failed[index]}" for index in request.indices if index in failed],
            prompt=None if self.prompt is None else torch.tensor(self.prompt),
            narrated=None if narrated is None else torch.tensor(narrated),
            ego_video=frames.get("ego"),
            exo_video=frames.get("exo"),
            other_exo_video=others,
            other_exo=None if others is None else _has(spans, self.other_views),
        )

    @staticmethod
    def _label_tokens(texts: dict[int, EncodedText], indices: list[int]) -> int:
        """Count the supervised tokens of a global batch, in which a sample may occur more than once."""
        return sum(texts[index].label_tokens for index in indices if index in texts)

    def _texts(self, epoch: int, indices: list[int]) -> tuple[dict[int, EncodedText], dict[int, str]]:
        """Return texts of a global batch by sample, and the problems of the others.

        Both are kept for the other micro-batches of the global batch.
        """
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


def read_span(reader: ClipReader, span: Span, clips: ClipConfig) -> dict[str, Tensor]:
    """Read the frames of each view of a span, uint8 [T, S, S, 3].

    Raises:
        ClipDecodeError: a file is missing, damaged or too short.
    """
    read = read_views(
        reader,
        span.paths,
        span.start_s,
        span.end_s,
        clips.num_frames,
        clips.image_size,
        clips.frame_fit,
        span.offsets_s,
        clips.pad_rgb,
    )
    return {view: clip.frames for view, clip in read.items()}


def _has(spans: Sequence[Span], views: Sequence[str]) -> Tensor:
    """Return bool [spans, views], true where a span has a view."""
    return torch.tensor([[view in span.paths for view in views] for span in spans], dtype=torch.bool)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Return uint8 zeros; in a reading process they are in shared memory, so that sending them costs no copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collation does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
