"""Samples of a benchmark by the clips they show, which are decoded once, with all requests about them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.batch import BenchmarkBatch, Instance
from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import LoadedBenchmark
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.requests import RequestBuilder, RequestEncoder
from datamodules.egobench.samples import Clip, Sample, VideoInput
from datamodules.text import TextEncoder, UnusableText
from datamodules.video.convert import PAD_RGB
from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints

MIN_COVERAGE = 0.5
"""Fraction of a span that a file must cover: official spans may reach past the end of a recording. If the question is
about the last frame, the file must cover all of it."""


@dataclass(frozen=True)
class InputUses:
    """One clip, or several that are read at once, and the samples that show them.

    Attributes:
        shown: None for the entry of requests without a clip.
        uses: pairs of a sample's index and the input's index within the sample.
    """

    shown: VideoInput | None
    uses: tuple[tuple[int, int], ...]


class BenchmarkDataset(Dataset[BenchmarkBatch]):
    """One entry for each distinct video input, and one without a clip for the priors of shared candidates.

    Args:
        loaded: the benchmark.
        task: builds the requests of a sample.
        config: prompts and options.
        clips: frames of a clip.
        encoder: text to token ids.
        timeout_s: longest time to wait for one video file.

    Raises:
        ValueError: the prompts file is invalid, or a candidate does not fit ``max_text_tokens``.
    """

    def __init__(
        self,
        loaded: LoadedBenchmark,
        task: RequestBuilder,
        config: EgoBenchConfig,
        clips: ClipConfig,
        encoder: TextEncoder,
        timeout_s: float | None = None,
    ) -> None:
        self.loaded, self.task, self.config, self.clips, self.encoder = loaded, task, config, clips, encoder
        self.timeout_s, self.reader = timeout_s, ClipReader(timeout_s=timeout_s)
        self.requests = RequestEncoder(loaded, config, encoder, task.asks_for_captions)
        # Samples may share clips, which are then decoded once.
        uses: dict[VideoInput, list[tuple[int, int]]] = {}
        for number, sample in enumerate(loaded.samples):
            for place, shown in enumerate(sample.inputs):
                uses.setdefault(shown, []).append((number, place))
        self.entries = [InputUses(shown, tuple(samples)) for shown, samples in uses.items()]
        try:
            self.prior_requests = task.prior_requests(self.requests)
        except UnusableText as error:
            raise ValueError(f"{loaded.name}: candidates: {error}") from None
        if self.prior_requests:
            self.entries.append(InputUses(None, ()))
        checked = np.random.default_rng(0).permutation(len(loaded.samples))[: config.cross_check]
        self.cross_checked = frozenset(checked.tolist()) if task.cross_checks else frozenset()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.entries)

    def remaining(self, done: Collection[tuple[str, int]]) -> list[int]:
        """Return the entries with an instance that is not done.

        Args:
            done: pairs of a sample's id and the input's index within the sample; ("", 0) for the priors.
        """
        remaining = []
        for number, entry in enumerate(self.entries):
            instances = [(self.loaded.samples[sample].id, place) for sample, place in entry.uses] or [("", 0)]
            if not all(instance in done for instance in instances):
                remaining.append(number)
        return remaining

    def fast(self) -> BenchmarkDataset:
        """Return the benchmark's fixed subset for curves during training."""
        config = replace(self.config, cross_check=0)
        return BenchmarkDataset(self.loaded.fast(), self.task, config, self.clips, self.encoder, self.timeout_s)

    def settings(self) -> dict[str, Any]:
        """Return everything besides model and samples that the results depend on, as JSON."""
        clips = asdict(self.clips)
        if self.clips.pad_rgb in (None, PAD_RGB):  # as before the colour could be chosen
            del clips["pad_rgb"]
        return {
            "prompts": self.requests.prompts.templates(),
            "caption": self.config.caption,
            "cyclic": self.config.cyclic,
            "cross_check": len(self.cross_checked),
            "clips": clips,
        }

    def check(self) -> None:
        """Encode every question once, so that one that does not fit is found before any computation.

        Raises:
            ValueError: a question does not fit ``max_text_tokens``, or the tokenizer does not tell letters apart; the
                message names the sample.
        """
        for sample in self.loaded.samples:
            self._instance(sample, 0, cross_check=False)

    def __getitem__(self, index: int) -> BenchmarkBatch:
        """Decode clips and encode the requests about them; ``error`` tells why one cannot be decoded."""
        entry = self.entries[index]
        if entry.shown is None:
            return BenchmarkBatch(self.requests.prefix, [Instance("", 0, self.prior_requests)])
        instances = []
        for number, place in entry.uses:
            instances.append(self._instance(self.loaded.samples[number], place, number in self.cross_checked))
        clips = entry.shown.clips
        batch = BenchmarkBatch(self.requests.prefix_of(entry.shown), instances, views=tuple(c.view for c in clips))
        try:
            batch.video = torch.cat([self._decode(clip) for clip in clips])
        except ClipDecodeError as error:
            batch.error = " ".join(str(error).split())
        return batch

    def _instance(self, sample: Sample, place: int, cross_check: bool) -> Instance:
        try:
            return Instance(sample.id, place, self.task.requests(sample, self.requests, cross_check))
        except UnusableText as error:
            raise ValueError(f"{self.loaded.name}: sample {sample.id}: {error}") from None

    def _decode(self, clip: Clip) -> torch.Tensor:
        """Return the frames of a clip, uint8 [1, T, S, S, 3]."""
        path, c = self.loaded.videos / clip.video, self.clips
        file_end_s = self.reader.usable_end_s(path, clip.start_s, math.inf)
        end_s = min(clip.end_s, file_end_s)
        least = 1.0 if clip.last_at_end else MIN_COVERAGE
        if math.isfinite(clip.end_s) and end_s - clip.start_s < least * (clip.end_s - clip.start_s):
            self.reader.usable_end_s(path, clip.start_s, clip.end_s)  # raises the error that names file and times
        times_s = segment_midpoints(clip.start_s, end_s, c.num_frames)
        if clip.last_at_end:
            times_s[-1] = end_s
        return self.reader.read(path, times_s, c.image_size, c.frame_fit, (clip.start_s, end_s), c.pad_rgb).frames[None]
