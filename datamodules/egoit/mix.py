"""The mix of sources: number and choice of each source's samples in an epoch, from the seed and the epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from datamodules.io.validate import Record, validate


@dataclass(frozen=True)
class MixSource:
    """One instruction file of a mix.

    Attributes:
        file: path of the file.
        splits: official splits to read; null for all.
        weight: share of the epoch relative to the other sources' weights; for all sources or none.
        samples: number of samples in an epoch. If the source has fewer, some are repeated; if it has more, they take
            turns from epoch to epoch.
        videos: share of its videos that are used, for training with less text. Chosen by the seed of the data and the
            path of the video, so that sources about the same videos, and smaller shares, keep the same ones.
    """

    file: str
    splits: list[str] | None = None
    weight: float | None = None
    samples: int | None = None
    videos: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges of the values."""
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"data.sources: {self.file}: weight is {self.weight}, allowed: above 0")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"data.sources: {self.file}: samples is {self.samples}, allowed: 1 or more")
        if not 0 < self.videos <= 1:
            raise ValueError(f"data.sources: {self.file}: videos is {self.videos}, allowed: above 0, up to 1")

    def uses(self, video: str, seed: int) -> bool:
        """Return True if a video is one of those that are used; text without video ("") always is."""
        if self.videos == 1 or not video:
            return True
        digest = hashlib.sha256(f"{seed}/{video}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.videos * 2**64


@dataclass(frozen=True)
class MixConfig:
    """The shares of sources that have neither a ``weight`` nor ``samples``.

    Attributes:
        alpha: a source of n samples has a share in proportion to n ** alpha; null takes every sample once.
        max_repeat: with ``alpha`` or weights, the largest number of times that a sample comes in an epoch, on average
            over its source. The other sources fill the rest.
    """

    alpha: float | None = None
    max_repeat: float = 4.0

    def __post_init__(self) -> None:
        """Check the ranges of the values."""
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"data.mix.alpha: got {self.alpha}, allowed: from 0 to 1")
        if not self.max_repeat >= 1:
            raise ValueError(f"data.mix.max_repeat: got {self.max_repeat}, allowed: 1 or more")


class _SourceRecord(Record):
    model_config = ConfigDict(extra="forbid")

    file: str
    splits: list[str] | None = None
    weight: float | None = None
    samples: int | None = None
    videos: float = 1.0


_SOURCE = TypeAdapter(_SourceRecord)


def mix_source(given: str | Mapping[str, Any] | MixSource, key: str) -> MixSource:
    """Return the source that a configuration names by a path, or by a mapping of the fields of ``MixSource``.

    Args:
        given: value of the key.
        key: dotted key, for messages.

    Raises:
        ValueError: a field is unknown or missing, or has the wrong type.
    """
    if isinstance(given, MixSource):
        return given
    if isinstance(given, str):
        return MixSource(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{key}: got {given!r}, allowed: a path, or a mapping with a file")
    record = validate(_SOURCE, dict(given), key)
    return MixSource(record.file, record.splits, record.weight, record.samples, record.videos)


NATURAL = MixConfig()
"""The mix in which every sample comes once."""


def epoch_counts(sizes: Sequence[int], sources: Sequence[MixSource], mix: MixConfig) -> list[int]:
    """Return the number of samples of each source in an epoch.

    Together they are as many as all sources have, unless ``samples`` or the cap changes that.

    Args:
        sizes: number of samples that each source has.
        sources: the sources with their weights or numbers.
        mix: shares of sources without either.

    Raises:
        ValueError: weights, numbers and alpha exclude each other, or only some sources have a weight.
    """
    weighted = [source.file for source in sources if source.weight is not None]
    numbered = [source.file for source in sources if source.samples is not None]
    given = {"weight": bool(weighted), "samples": bool(numbered), "mix.alpha": mix.alpha is not None}
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise ValueError(f"data.sources: {' and '.join(chosen)} exclude each other: keep one of them")
    if weighted and len(weighted) < len(sources):
        without = ", ".join(source.file for source in sources if source.weight is None)
        raise ValueError(f"data.sources: no weight for {without}, but others have one: give it to all or to none")
    if not weighted and mix.alpha is None:
        return [size if source.samples is None else source.samples for size, source in zip(sizes, sources, strict=True)]
    # Share the samples of all sources. A source that exceeds its limit is fixed there, and the others share the rest;
    # this can push another one over its limit, so repeat.
    n = np.array(sizes, dtype=np.float64)
    wanted = np.array([source.weight for source in sources]) if weighted else n ** (mix.alpha or 0.0)
    limits, counts, open_ = mix.max_repeat * n, np.zeros(len(n)), np.ones(len(n), dtype=bool)
    while open_.any():  # at most once for each source
        left = n.sum() - counts[~open_].sum()
        counts[open_] = left * wanted[open_] / wanted[open_].sum()
        over = open_ & (counts > limits)
        if not over.any():
            break
        counts[over] = limits[over]
        open_ &= ~over
    # Round the cumulative sum, so that the sum of the counts stays.
    whole = np.diff(np.rint(np.cumsum(np.concatenate([[0.0], counts]))))
    return [int(count) for count in np.minimum(whole, limits)]


class Mix:
    """The choice of the samples of an epoch.

    The samples of a source take turns: they come from one shuffled pass over the source after the other. An epoch
    continues the pass in which the last one ended, so no sample is more than one turn ahead of another of its source.

    Args:
        sizes: number of samples of each source; sources follow one another in the dataset.
        counts: number of samples of each source in an epoch.
        seed: seed of the order in which samples take turns.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], seed: int) -> None:
        self.sizes, self.counts, self.seed = list(sizes), list(counts), seed

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return sum(self.counts)

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the numbers of the samples of an epoch, int64 [len], source by source, sources not shuffled."""
        offsets = np.cumsum([0, *self.sizes])
        parts = [
            offsets[which] + self._turns(which, size, count, epoch)
            for which, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True))
        ]
        return np.concatenate(parts).astype(np.int64)

    def _turns(self, which: int, size: int, count: int, epoch: int) -> NDArray[np.int64]:
        if not count:
            return np.zeros(0, dtype=np.int64)
        # The epoch's place in the endless sequence of shuffled passes over the source.
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // size, -(-last // size))
        order = [np.random.default_rng([self.seed, which, number]).permutation(size) for number in passes]
        return np.concatenate(order)[first - passes.start * size :][:count]
