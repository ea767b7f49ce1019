"""Read official annotation files, count their content, and report their errors by file, line and field."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datamodules.io.jsonl import is_text, read_bytes

Row = TypeVar("Row")


class SourceError(ValueError):
    """Annotations cannot be read; one line that names file, line, field and how to fix it."""


@dataclass(frozen=True)
class Official:
    """Number of things, published by the authors or counted in their files.

    Attributes:
        count: the number.
        exact: else there are at least so many.
    """

    count: int
    exact: bool = True


class Counts:
    """Numbers of the things met while a source is read, by name.

    Attributes:
        totals: number of things by name.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._seen: dict[str, set[str]] = {}

    def add(self, name: str, number: int = 1) -> None:
        """Add to the total of a name."""
        self.totals[name] += number

    def add_distinct(self, name: str, key: str) -> bool:
        """Add 1 to the total of a name if the key is new to it; return True if it is."""
        seen = self._seen.setdefault(name, set())
        is_new = key not in seen
        seen.add(key)
        self.totals[name] += is_new
        return is_new


def differences(name: str, counts: Counts, official: Mapping[str, Official]) -> list[str]:
    """Return a line for each number that differs from the official one."""
    lines = []
    for what, known in official.items():
        missing = known.count - counts.totals[what]
        if missing > 0:
            lines.append(f"{name}: {missing:,} of {known.count:,} {what} are missing: fetch the file again")
        elif missing < 0 and known.exact:
            lines.append(f"{name}: {-missing:,} {what} more than the official {known.count:,}: another release?")
    return lines


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with a default, a help text and allowed values."""
    return field(default=default, metadata={"help": text, "choices": choices})


def find_file(root: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of some paths below the root that exists, as it is or packed by gzip.

    Raises:
        SourceError: none does; names all of them.
    """
    for name in names:
        for file in (root / name, root / f"{name}.gz"):
            if file.is_file():
                return file
    raise SourceError(f"{root}: holds none of {', '.join(names)}: put {what} there")


def try_parse(make: Callable[..., Row], *arguments: Any) -> Row | SourceError:
    """Return the result of a call, or the ``SourceError`` that it raised."""
    try:
        return make(*arguments)
    except SourceError as error:
        return error


def _content(file: Path) -> bytes:
    try:
        return read_bytes(file)
    except ValueError as error:
        raise SourceError(str(error)) from None


def read_text(file: Path) -> str:
    """Return the content of a text file without its byte order mark.

    Raises:
        SourceError: it is not UTF-8.
    """
    content = _content(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{file} line {line}: no UTF-8 text ({error.reason}): save the file as UTF-8") from None


def read_csv(file: Path, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of every row of a table with their place; empty lines are passed over.

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
    """Return the content of a JSON file whose top level has a certain type.

    Raises:
        SourceError: it is not there, or not such a file.
    """
    try:
        value = json.loads(_content(file))
    except FileNotFoundError:
        raise SourceError(f"{file}: no such file: correct the path") from None
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: invalid JSON ({error}): fetch the file again") from None
    if not isinstance(value, kind):
        raise SourceError(f"{file}: expected a JSON {kind.__name__}, got {type(value).__name__}: fetch the file again")
    return value


def text_of(record: Any, key: str, where: str) -> str:
    """Return a field that must be a text and not empty.

    Raises:
        SourceError: it is not.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not is_text(value) or not value.strip():
        raise SourceError(f"{where}: field {key!r} is {value!r}, expected a text: correct it")
    return value.strip()


def number_of(record: Any, key: str, where: str) -> float:
    """Return a field that must be a finite number, or a text of one.

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


def shuffled(name: str, options: Sequence[str]) -> tuple[str, ...]:
    """Return options in an order that depends on a name only."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return tuple(options[index] for index in np.random.default_rng(seed).permutation(len(options)))
