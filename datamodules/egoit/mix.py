"""How many samples of each source an epoch has, and which: a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MixSource:
    """One instruction file of a mix.

    Attributes:
        file: its path.
        splits: records of these official splits only; null for all.
        weight: share of the epoch relative to the other sources' weights; for all sources or none.
        samples: samples of an epoch; more than there are repeat some, fewer take turns from epoch to epoch.
    """

    file: str
    splits: list[str] | None = None
    weight: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"data.sources: {self.file}: weight is {self.weight}, allowed: above 0")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"data.sources: {self.file}: samples is {self.samples}, allowed: 1 or more")


@dataclass(frozen=True)
class MixConfig:
    """How sources share an epoch where neither ``weight`` nor ``samples`` says so.

    Attributes:
        alpha: a source of n samples has a share in proportion to n ** alpha; null takes every sample once.
        max_repeat: with ``alpha`` or weights, how often a sample comes in an epoch at most, on average over its source;
            what that takes from one source is given to the others.
    """

    alpha: float | None = None
    max_repeat: float = 4.0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"data.mix.alpha: got {self.alpha}, allowed: from 0 to 1")
        if not self.max_repeat >= 1:
            raise ValueError(f"data.mix.max_repeat: got {self.max_repeat}, allowed: 1 or more")


def mix_source(given: str | Mapping[str, Any] | MixSource, where: str) -> MixSource:
    """A source as a configuration names it: a path, or a mapping of the fields of ``MixSource``.

    Args:
        given: the value.
        where: its key, for messages.

    Raises:
        ValueError: a field is unknown or missing, or has the wrong type.
    """
    if isinstance(given, MixSource):
        return given
    if isinstance(given, str):
        return MixSource(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: got {given!r}, allowed: a path, or a mapping with a file")
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "file": ("a path", _is_text),
        "splits": ("a list of names or null", lambda value: _is(value, list) and all(map(_is_text, value or ()))),
        "weight": ("a number or null", lambda value: _is(value, int | float)),
        "samples": ("a whole number or null", lambda value: _is(value, int)),
    }
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ValueError(f"{where}.{unknown[0]}: no such key in {where}, allowed: {', '.join(kinds)}")
    for name, (expected, fits) in kinds.items():
        if (name in given or name == "file") and not fits(given.get(name)):
            raise ValueError(f"{where}.{name}: got {given.get(name)!r}, allowed: {expected}")
    return MixSource(**given)


def _is(value: Any, kind: Any) -> bool:
    return value is None or (isinstance(value, kind) and not isinstance(value, bool))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


NATURAL = MixConfig()
"""Every sample once."""


def epoch_counts(sizes: Sequence[int], sources: Sequence[MixSource], mix: MixConfig) -> list[int]:
    """Samples of each source in an epoch; together as many as there are, unless ``samples`` or the cap says otherwise.

    Args:
        sizes: samples that each source has.
        sources: with their weights or numbers.
        mix: for the rest.

    Raises:
        ValueError: weights, numbers and alpha exclude each other, or only some sources have a weight.
    """
    weighted = [source.file for source in sources if source.weight is not None]
    numbered = [source.file for source in sources if source.samples is not None]
    given = {"weight": bool(weighted), "samples": bool(numbered), "mix.alpha": mix.alpha is not None}
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise ValueError(f"data.sources: {' and '.join(chosen)} are given, but each decides alone: keep one of them")
    if weighted and len(weighted) < len(sources):
        without = ", ".join(source.file for source in sources if source.weight is None)
        raise ValueError(f"data.sources: no weight for {without}, but others have one: give it to all or to none")
    if not weighted and mix.alpha is None:
        return [size if source.samples is None else source.samples for size, source in zip(sizes, sources, strict=True)]
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
    whole = np.diff(np.rint(np.cumsum(np.concatenate([[0.0], counts]))))  # rounded so that the sum stays
    return [int(count) for count in np.minimum(whole, limits)]


class Mix:
    """Which samples an epoch has.

    The samples of a source take turns: they are drawn from one shuffled pass over the source after the other, epochs
    going on where the last one ended, so that no sample is ever more than one turn ahead of another of its source.

    Args:
        sizes: samples of each source; sources follow one another in the data set.
        counts: samples of each source in an epoch.
        seed: of the order in which samples take turns.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], seed: int) -> None:
        self.sizes, self.counts, self.seed = list(sizes), list(counts), seed

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the samples, source by source, not shuffled among each other."""
        offsets = np.cumsum([0, *self.sizes])
        parts = [
            offsets[which] + self._turns(which, size, count, epoch)
            for which, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True))
        ]
        return np.concatenate(parts).astype(np.int64)

    def _turns(self, which: int, size: int, count: int, epoch: int) -> NDArray[np.int64]:
        if not count:
            return np.zeros(0, dtype=np.int64)
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // size, -(-last // size))
        order = [np.random.default_rng([self.seed, which, number]).permutation(size) for number in passes]
        return np.concatenate(order)[first - passes.start * size :][:count]
