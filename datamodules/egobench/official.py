"""What the benchmarks share in reading their official files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datamodules.egobench.item import Item, Task, Text
from datamodules.io.annotations import Counts, Official, SourceError, find_file, number_of, text_of

FAST_ITEMS = 300
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
    def read(self, counts: Counts) -> Iterator[Item | SourceError]:
        """See ``Benchmark``."""

    def texts(self) -> Sequence[Text]:
        """None."""
        return ()

    def fast(self, items: Sequence[Item], texts: Sequence[Text]) -> tuple[list[Item], list[Text]]:
        """Some items, and the texts that are theirs or nobody's."""
        taken = self.fast_items(items)
        ids = {item.id for item in taken}
        return taken, [text for text in texts if not text.of or text.of in ids]

    def fast_items(self, items: Sequence[Item]) -> list[Item]:
        """Some hundred, by a seed that never changes."""
        return sample(items, FAST_ITEMS)

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Nothing to remark."""
        return []

    def submission(self, items: Sequence[Item], predictions: Mapping[str, int]) -> dict[str, str]:
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


def sample(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many items in their order, by a seed that never changes."""
    if len(items) <= count:
        return list(items)
    chosen = np.random.default_rng(0).permutation(len(items))[:count]
    return [items[number] for number in sorted(chosen.tolist())]


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
