"""The base class of all benchmarks, and helpers for reading official files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.egobench.samples import Candidate, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, find_file, number_of, text_of

FAST_SAMPLES = 300
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark(ABC):
    """A benchmark read from its official files.

    Subclasses set ``name`` and ``task`` and implement ``read``; everything else has a default. Fields of the dataclass
    are keys of an entry in ``egobench.benchmarks``.

    Attributes:
        annotations: folder of the official files, or the file with the questions; further files are then next to it.
        videos: folder that the clips' files are below.
    """

    annotations: Path
    videos: Path

    name: ClassVar[str]
    """Name in configurations, files and tables."""
    task: ClassVar[TaskName]
    """Type of the questions, which decides requests and scores."""
    egocentric: ClassVar[bool] = True
    """True if all clips are egocentric, which the prompts of ``egobench.style: ego`` state."""
    renamed: ClassVar[Mapping[str, tuple[str, Mapping[Any, Any]]]] = {}
    """Keys of earlier versions: their new name, and new names of values."""

    @abstractmethod
    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield every sample in the order of the file; for an invalid row its error.

        Args:
            counts: collects numbers for ``official`` and ``remarks``.

        Raises:
            SourceError: a file is missing, or none of its rows can be parsed.
        """

    def candidates(self) -> Sequence[Candidate]:
        """Return the texts that all samples share, for ``vocabulary`` and ``rank_texts``."""
        return ()

    def official(self) -> Mapping[str, Official]:
        """Return known totals of the numbers that ``read`` counts, and of ``samples`` and ``candidates``."""
        return {}

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Return notes for readers of the scores, from the numbers that ``read`` counted."""
        return []

    def fast(self, samples: Sequence[Sample], candidates: Sequence[Candidate]) -> tuple[list[Sample], list[Candidate]]:
        """Return a fixed subset for curves during training, with the candidates of its samples or of none."""
        subset = self.fast_samples(samples)
        ids = {sample.id for sample in subset}
        return subset, [each for each in candidates if not each.of or each.of in ids]

    def fast_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples of the fixed subset: some hundred, drawn with a constant seed."""
        return fixed_subset(samples, FAST_SAMPLES)

    def submission(self, samples: Sequence[Sample], predictions: Mapping[str, int]) -> dict[str, str]:
        """Return the files that the authors' server takes, as text by name; none where there is no server.

        Args:
            samples: all of the benchmark.
            predictions: index of the chosen option, for each of them.
        """
        return {}

    def main_file(self, names: Sequence[str], description: str) -> Path:
        """Return the file with the questions.

        Raises:
            SourceError: there is none of these names.
        """
        return self.annotations if self.annotations.is_file() else find_file(self.annotations, names, description)

    def other_file(self, names: Sequence[str], description: str) -> Path:
        """Return a further file in the folder.

        Raises:
            SourceError: there is none of these names.
        """
        folder = self.annotations.parent if self.annotations.is_file() else self.annotations
        return find_file(folder, names, description)


def fixed_subset(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return at most ``count`` samples in their order, drawn with a constant seed."""
    if len(samples) <= count:
        return list(samples)
    chosen = np.random.default_rng(0).permutation(len(samples))[:count]
    return [samples[number] for number in sorted(chosen.tolist())]


def one_line(record: Any, key: str, where: str) -> str:
    """Return a field that must be a text, with line breaks and repeated spaces as single spaces.

    Raises:
        SourceError: the field is no text, or empty.
    """
    return " ".join(text_of(record, key, where).split())


def whole_number(record: Any, key: str, where: str) -> int:
    """Return a field that must be a whole number of at least 0.

    Raises:
        SourceError: the field is something else.
    """
    number = number_of(record, key, where)
    if number < 0 or number != int(number):
        raise SourceError(f"{where}: field {key!r} is {number:g}, expected a whole number from 0: correct it")
    return int(number)


def mapping_of(record: Any, key: str, where: str) -> Mapping[str, Any]:
    """Return a field that must be a JSON object.

    Raises:
        SourceError: the field is something else.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, Mapping):
        raise SourceError(f"{where}: field {key!r} is {value!r}, expected a JSON object: correct it")
    return value


def table_rows(rows: Iterator[tuple[str, list[str]]], columns: Sequence[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table as mappings by column name, with their place; for a row of wrong length its error.

    Args:
        rows: cells of each row with their place, the header first.
        columns: columns that must exist.
        file: for messages.

    Raises:
        SourceError: a column is missing.
    """
    _, header = next(rows, ("", []))
    missing = [name for name in columns if name not in header]
    if missing:
        raise SourceError(f"{file}: column {', '.join(missing)} is missing: fetch the official file again")
    for where, cells in rows:
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            yield where, SourceError(f"{where}: {len(cells)} cells under {len(header)} columns: fix this line")
