"""The interface of an instruction source, and its conversion to a file.

A source of your own is one class in a file of your own::

    @dataclass(frozen=True)
    class MyVideos:
        root: Path
        splits: tuple[str, ...] = option(("train",), "splits to read")
        name: ClassVar[str] = "my_videos"

        def official(self) -> dict[str, Official]: ...
        def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]: ...

``make egoit SOURCE=my_module:MyVideos ROOT=folder`` converts it; every field is an option of that command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datamodules.egoit.reader import accept
from datamodules.egoit.records import InstructionRecord, to_json, write_rows
from datamodules.io.annotations import Counts, Official, SourceError, differences
from datamodules.io.jsonl import InvalidRecords

MIN_WINDOW_S = 0.5
"""Shortest window in seconds; shorter ones are expanded around their middle."""


class InstructionSource(Protocol):
    """A dataset that is converted to instruction records.

    Its class is a dataclass whose fields are options of the command line; ``root`` is the folder of its annotations.
    """

    name: ClassVar[str]
    """Name of the source: the file's name, the ``source`` of its records, and the first part of their ids."""

    def official(self) -> Mapping[str, Official]:
        """Return the official numbers of the things that ``read`` counts, by name; empty if none are known."""

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for every annotation, or the error of an invalid one.

        Errors are yielded, not raised, so that all of them can be reported at once.

        Args:
            counts: receives the numbers that are compared with ``official``.

        Raises:
            SourceError: a file is missing or none of its rows can be read.
        """


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        records: number of records written.
        table: numbers found next to the official ones, as text.
        warnings: a line for each number that differs, and for each row that was left out.
    """

    records: int
    table: str
    warnings: list[str]


def convert(source: InstructionSource, out: Path, skip_invalid: bool = False) -> Conversion:
    """Write the records of a source as JSON Lines.

    Args:
        source: source to read.
        out: file to write.
        skip_invalid: leave invalid rows out, with a warning for each, instead of stopping.

    Raises:
        SourceError: a file is missing.
        InvalidRecords: rows are invalid; nothing is written.
    """
    counts = Counts()
    problems: list[str] = []
    places: dict[str, str] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for record in source.read(counts):
            if isinstance(record, SourceError):
                problems.append(str(record))
            elif record.id in places:
                first = places[record.id]
                problems.append(f"{record.where}: {record.id!r} is the id of {first} too: give each its own")
            else:
                places[record.id] = record.where
                row = to_json(record)
                try:
                    (row,) = accept([(record.where, row)])
                except ValueError as error:
                    problems.append(str(error))
                    continue
                if skip_invalid or not problems:
                    yield row
        # Raised from within the writer, which then leaves no file.
        if problems and not skip_invalid:
            raise InvalidRecords(problems, "--skip-invalid (which also writes the others)")

    records = write_rows(out, rows())
    official = source.official()
    left_out = [f"left out: {problem}" for problem in problems]
    return Conversion(records, _table(counts, official), differences(source.name, counts, official) + left_out)


def _table(counts: Counts, official: Mapping[str, Official]) -> str:
    names = [*counts.totals, *(name for name in official if name not in counts.totals)]
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}  {'found':>9}  {'official':>9}"]
    for name in names:
        known = official.get(name)
        shown = "" if known is None else f"{known.count:,}" if known.exact else f">= {known.count:,}"
        lines.append(f"{name:{width}}  {counts.totals[name]:>9,}  {shown:>9}".rstrip())
    return "\n".join(lines)


def expand_window(start_s: float, end_s: float, min_length_s: float, last_s: float) -> tuple[float, float]:
    """Return a window of at least a length around the same middle, shifted where it would leave [0, ``last_s``].

    Args:
        start_s: start of the window in seconds.
        end_s: end of the window in seconds.
        min_length_s: shortest length in seconds.
        last_s: time that the file is known to reach, in seconds.
    """
    last_s, length_s = max(last_s, end_s), max(min_length_s, end_s - start_s)
    begin_s = max(0.0, min((start_s + end_s - length_s) / 2, last_s - length_s))
    return round(begin_s, 6), round(min(last_s, begin_s + length_s), 6)
