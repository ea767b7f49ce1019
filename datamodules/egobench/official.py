"""What the benchmarks share in reading their official files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.egobench.samples import Candidate, Sample, Task
from datamodules.io.annotations import Counts, Official, SourceError, find_file, number_of, text_of

FAST_SAMPLES = 300
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class OfficialFiles(ABC):
    """A benchmark, but for how its rows are read.

    Attributes:
        annotations: folder of the official files, or the file with the questions; others are then beside it.
        videos: folder that the clips' files are below.
    """

    annotations: Path
    videos: Path

    name: ClassVar[str]
    task: ClassVar[Task]

    def official(self) -> Mapping[str, Official]:
        """No number is known for certain."""
        return {}

    @abstractmethod
    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """See ``Benchmark``."""

    def candidates(self) -> Sequence[Candidate]:
        """None."""
        return ()

    def fast(self, samples: Sequence[Sample], candidates: Sequence[Candidate]) -> tuple[list[Sample], list[Candidate]]:
        """Some samples, and the texts that are theirs or nobody's."""
        taken = self.fast_samples(samples)
        ids = {sample.id for sample in taken}
        return taken, [each for each in candidates if not each.of or each.of in ids]

    def fast_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Some hundred, by a seed that never changes."""
        return fixed_subset(samples, FAST_SAMPLES)

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Nothing to remark."""
        return []

    def submission(self, samples: Sequence[Sample], predictions: Mapping[str, int]) -> dict[str, str]:
        """No file."""
        return {}

    def main_file(self, names: Sequence[str], what: str) -> Path:
        """The file with the questions.

        Raises:
            SourceError: there is none of these names.
        """
        return self.annotations if self.annotations.is_file() else find_file(self.annotations, names, what)

    def other_file(self, names: Sequence[str], what: str) -> Path:
        """A further file in the folder.

        Raises:
            SourceError: there is none of these names.
        """
        folder = self.annotations.parent if self.annotations.is_file() else self.annotations
        return find_file(folder, names, what)


def fixed_subset(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most so many samples in their order, by a seed that never changes."""
    if len(samples) <= count:
        return list(samples)
    chosen = np.random.default_rng(0).permutation(len(samples))[:count]
    return [samples[number] for number in sorted(chosen.tolist())]


def line_of(record: Any, key: str, where: str) -> str:
    """A field that must be a text, on one line.

    Raises:
        SourceError: it is not, or empty.
    """
    return " ".join(text_of(record, key, where).split())


def whole_of(record: Any, key: str, where: str) -> int:
    """A field that must be a whole number of at least 0.

    Raises:
        SourceError: it is not.
    """
    number = number_of(record, key, where)
    if number < 0 or number != int(number):
        raise SourceError(f"{where}: field {key!r} is {number:g}, expected a whole number from 0: correct it")
    return int(number)


def mapping_of(record: Any, key: str, where: str) -> Mapping[str, Any]:
    """A field that must be a JSON object.

    Raises:
        SourceError: it is not.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, Mapping):
        raise SourceError(f"{where}: field {key!r} is {value!r}, expected a JSON object: correct it")
    return value


def columns(rows: Iterator[tuple[str, list[str]]], wanted: Sequence[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table by the names of its columns, with their place; one of the wrong length is given as its error.

    Raises:
        SourceError: a column is missing.
    """
    _, header = next(rows, ("", []))
    if missing := [name for name in wanted if name not in header]:
        raise SourceError(f"{file}: column {', '.join(missing)} is missing: fetch the official file again")
    for where, cells in rows:
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            yield where, SourceError(f"{where}: {len(cells)} cells under {len(header)} columns: mend the line")
