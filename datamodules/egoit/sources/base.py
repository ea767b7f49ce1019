"""What a data set must say to become instruction data, and how it is converted.

A source of your own is one class like those beside this file::

    @dataclass(frozen=True)
    class MyVideos:
        root: Path
        splits: tuple[str, ...] = option(("train",), "splits to take")
        name: ClassVar[str] = "my_videos"

        def official(self) -> dict[str, Official]: ...
        def read(self, counts: Counts) -> Iterator[Record | SourceError]: ...

and ``python -m datamodules.egoit convert my_module:MyVideos --root ...`` converts it; every field is an option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datamodules.egoit.records import Record, row, write_rows
from datamodules.egoit.templates import Templates
from datamodules.io.annotations import Counts, Official, SourceError, differences
from datamodules.io.jsonl import InvalidRecords

MIN_WINDOW_S = 0.5
"""Shortest window; shorter ones grow around their middle."""


class InstructionSource(Protocol):
    """A data set that becomes records; its class is a dataclass whose fields are options of the command line."""

    name: ClassVar[str]
    """Of the source, as records carry it."""

    def official(self) -> Mapping[str, Official]:
        """Known numbers of what ``read`` counts, for the splits that are taken."""

    def read(self, counts: Counts) -> Iterator[Record | SourceError]:
        """Every record; a row that is wrong is given as its error, so that all of them can be named.

        Raises:
            SourceError: a file is missing or none of its rows can be read.
        """


@dataclass(frozen=True)
class Conversion:
    """What a conversion came to.

    Attributes:
        records: how many were written.
        table: counts beside the official ones, as text.
        warnings: a line for each number that differs, and for each row that was left out.
    """

    records: int
    table: str
    warnings: list[str]


def convert(
    source: InstructionSource, out: Path, templates: Templates, level: str, seed: int, skip_malformed: bool = False
) -> Conversion:
    """Write a source as JSON Lines.

    Args:
        source: what to read.
        out: the file.
        templates: wordings.
        level: of prompts, see ``templates.LEVELS``.
        seed: templates are drawn as epoch 0 of a run with this seed draws them.
        skip_malformed: leave wrong rows out, with a warning each, rather than stop.

    Raises:
        SourceError: a file is missing.
        InvalidRecords: rows are wrong; nothing is written.
    """
    counts = Counts()
    problems: list[str] = []
    places: dict[str, str] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for record in source.read(counts):
            if isinstance(record, SourceError):
                problems.append(str(record))
            elif record.name in places:
                before = places[record.name]
                problems.append(f"{record.where}: {record.name!r} is the id of {before} too: give each its own")
            else:
                places[record.name] = record.where
                if skip_malformed or not problems:
                    yield row(record, templates, level, seed)
        if problems and not skip_malformed:
            raise InvalidRecords(problems, "--skip-malformed (which also writes the others)")

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


def grown(start_s: float, end_s: float, least_s: float, last_s: float) -> tuple[float, float]:
    """A window of at least some seconds around the same middle, moved as far as 0 and ``last_s`` make it necessary.

    Args:
        start_s, end_s: the window.
        least_s: its least length.
        last_s: a time that the file is known to reach.
    """
    last_s, length_s = max(last_s, end_s), max(least_s, end_s - start_s)
    begin_s = max(0.0, min((start_s + end_s - length_s) / 2, last_s - length_s))
    return round(begin_s, 6), round(min(last_s, begin_s + length_s), 6)
