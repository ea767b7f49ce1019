"""What a data set must say to become instruction data, and how it is converted.

A source of your own is one class like those beside this file::

    @dataclass(frozen=True)
    class MyVideos:
        root: Path
        splits: tuple[str, ...] = option(("train",), "splits to take")
        name: ClassVar[str] = "my_videos"

        def official(self) -> dict[str, Official]: ...
        def read(self, tally: Tally) -> Iterator[Record | SourceError]: ...

and ``python -m datamodules.egoit convert my_module:MyVideos --root ...`` converts it; every field is an option.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from datamodules.conversations import MalformedRecords
from datamodules.egoit.record import Record, row, write_rows
from datamodules.egoit.templates import Templates
from datamodules.jsonl import is_text

Row = TypeVar("Row")
MIN_WINDOW_S = 0.5
"""Shortest window; shorter ones grow around their middle."""


class SourceError(ValueError):
    """Annotations that cannot be read; one line that names file, line, field and what to do."""


@dataclass(frozen=True)
class Official:
    """How many there are by the authors, or by a count of their files.

    Attributes:
        count: the number.
        exact: else there are at least so many.
    """

    count: int
    exact: bool = True


class Tally:
    """What was counted while a source was read; a name for each kind of thing."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seen: dict[str, set[str]] = {}

    def add(self, what: str, number: int = 1) -> None:
        """Count things."""
        self.counts[what] += number

    def distinct(self, what: str, name: str) -> bool:
        """Count a thing unless one of that name was; whether it is the first."""
        seen = self._seen.setdefault(what, set())
        first = name not in seen
        seen.add(name)
        self.counts[what] += first
        return first


class InstructionSource(Protocol):
    """A data set that becomes records; its class is a dataclass whose fields are options of the command line."""

    name: ClassVar[str]
    """Of the source, as records carry it."""

    def official(self) -> Mapping[str, Official]:
        """Known numbers of what ``read`` counts, for the splits that are taken."""

    def read(self, tally: Tally) -> Iterator[Record | SourceError]:
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
        MalformedRecords: rows are wrong; nothing is written.
    """
    tally = Tally()
    problems: list[str] = []
    places: dict[str, str] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for record in source.read(tally):
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
            raise MalformedRecords(problems, "--skip-malformed (which also writes the others)")

    records = write_rows(out, rows())
    official = source.official()
    left_out = [f"left out: {problem}" for problem in problems]
    return Conversion(records, _table(tally, official), _differences(source.name, tally, official) + left_out)


def _table(tally: Tally, official: Mapping[str, Official]) -> str:
    names = [*tally.counts, *(name for name in official if name not in tally.counts)]
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}  {'found':>9}  {'official':>9}"]
    for name in names:
        known = official.get(name)
        shown = "" if known is None else f"{known.count:,}" if known.exact else f">= {known.count:,}"
        lines.append(f"{name:{width}}  {tally.counts[name]:>9,}  {shown:>9}".rstrip())
    return "\n".join(lines)


def _differences(source: str, tally: Tally, official: Mapping[str, Official]) -> list[str]:
    lines = []
    for name, known in official.items():
        missing = known.count - tally.counts[name]
        if missing > 0:
            lines.append(f"{source}: {missing:,} of {known.count:,} {name} are missing: fetch the file again")
        elif missing < 0 and known.exact:
            lines.append(f"{source}: {-missing:,} {name} more than the official {known.count:,}: another release?")
    return lines


# --------------------------------------------------------------------------------------------------------------------
# what sources share


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a source: its default, what it is for, and allowed values."""
    return field(default=default, metadata={"help": text, "choices": choices})


def find_file(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of some paths below the root that exists.

    Raises:
        SourceError: none does; names all of them.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise SourceError(f"{root}: holds none of {', '.join(names)}: put {what} there")


def checked(make: Callable[..., Row], *arguments: Any) -> Row | SourceError:
    """What a call gives, or the error that it raised."""
    try:
        return make(*arguments)
    except SourceError as error:
        return error


def read_text(file: Path) -> str:
    """A text file; a byte order mark is no part of it.

    Raises:
        SourceError: it is not UTF-8.
    """
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{file} line {line}: no UTF-8 text ({error.reason}): save the file as UTF-8") from None


def read_csv(file: Path, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Cells of every row of a table with their place; empty lines are passed over.

    Raises:
        SourceError: it is not UTF-8; or a quote stands where none may, so that it cannot be told where rows end.
    """
    rows = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
    first = 1
    try:
        for cells in rows:
            if cells:
                yield f"{file} line {rows.line_num}", cells
            first = rows.line_num + 1
    except csv.Error as error:
        raise SourceError(
            f"{file} line {first}: no row of a table ({error}): double its quotes, or remove them"
        ) from None


def read_json(file: Path, kind: type[Row]) -> Row:
    """A JSON file whose top level is of a kind.

    Raises:
        SourceError: it is not there, or not such a file.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{file}: no such file: correct the path") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: malformed JSON ({error}): fetch the file again") from None
    if not isinstance(value, kind):
        raise SourceError(f"{file}: expected a JSON {kind.__name__}, got {type(value).__name__}: fetch the file again")
    return value


def text_of(record: Any, key: str, where: str) -> str:
    """A field that must be a text and not empty.

    Raises:
        SourceError: it is not.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not is_text(value) or not value.strip():
        raise SourceError(f"{where}: field {key!r} is {value!r}, expected a text: correct it")
    return value.strip()


def number_of(record: Any, key: str, where: str) -> float:
    """A field that must be a finite number, or a text of one.

    Raises:
        SourceError: it is not.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    try:
        number = float("nan" if value is None or isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not np.isfinite(number):
        raise SourceError(f"{where}: field {key!r} is {value!r}, expected a number: correct it")
    return number


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


def shuffled(name: str, options: Sequence[str]) -> tuple[str, ...]:
    """Options in an order that depends on the record's name only."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return tuple(options[index] for index in np.random.default_rng(seed).permutation(len(options)))
