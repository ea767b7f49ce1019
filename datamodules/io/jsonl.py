"""Read JSON Lines and arrays with the place of each record, so that errors name file, line and field."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

_SHOWN = 5


class InvalidRecords(ValueError):
    """Records of a file are invalid.

    Attributes:
        problems: a line for each record, with file and line. The message shows the first five and counts the others.
    """

    def __init__(self, problems: Iterable[str], more_from: str = "`make data-check INDEX=<file>`") -> None:
        """Build the message.

        Args:
            problems: a line for each record.
            more_from: the command that lists the problems that the message only counts.
        """
        self.problems = list(problems)
        shown, more = self.problems[:_SHOWN], len(self.problems) - _SHOWN
        rest = [f"and {more} more: {more_from} names every one"] if more > 0 else []
        super().__init__("; ".join([*shown, *rest]))


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a JSON Lines file with their place, ``<file> line <n>``; empty lines are passed over.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    for where, record in _lines(file):
        if isinstance(record, ValueError):
            raise record
        yield where, record


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yield the records of a JSON Lines file or of a JSON array with their place; an invalid one as its error.

    Entries of an array have the place ``<file> line <n> entry <m>``, both counted from 1.
    """
    return _entries(file) if is_array(file) else _lines(file)


def is_array(file: Path) -> bool:
    """Return True if a file holds one JSON array instead of a record a line.

    It does if it begins with a bracket, unless its first line is a whole list and others follow: then that line is one
    wrong record, and the others are records.
    """
    lines = raw_lines(file)
    _, first = next(lines, (0, b""))
    if not first.lstrip().startswith(b"["):
        return False
    if next(lines, None) is None:
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers from 1, without empty ones and without a byte order mark."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    for number, line in raw_lines(file):
        where = f"{file} line {number}"
        try:
            text = line.decode()
            yield where, _object(json.loads(text), text, where)
        except UnicodeDecodeError as error:
            yield where, ValueError(f"{where}: no UTF-8 text ({error.reason}): save the file as UTF-8")
        except json.JSONDecodeError as error:
            yield where, ValueError(f"{where}: invalid JSON ({error.msg} at column {error.colno}): fix this line")
        except (ValueError, RecursionError) as error:  # a number of too many digits, or lists in lists without end
            yield where, ValueError(f"{where}: invalid JSON ({error}): fix this line")


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"{file} line {line}"
        yield where, ValueError(f"{where}: no UTF-8 text ({error.reason}), nothing was read: save the file as UTF-8")
        return
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        where = f"{file} line {line} entry {number}"
        begin = at
        try:
            value, end = decoder.raw_decode(text, at)
            at = _after_space(text, end)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except (ValueError, RecursionError) as error:  # where the next entry begins cannot be told
            problem = str(error)
            if isinstance(error, json.JSONDecodeError):
                problem = f"{error.msg} at line {error.lineno} column {error.colno}"
            yield where, ValueError(f"{where}: invalid JSON ({problem}), nothing after it was read: fix this entry")
            return
        yield where, _object(value, text[begin:end], where)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    after = _after_space(text, at + 1)
    if after < len(text):
        line += text.count("\n", counted, after)
        where = f"{file} line {line}"
        yield where, ValueError(f"{where}: what follows the end of the array was not read: put it inside, or remove it")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "matches the empty text too"
    return found.end()


def _object(value: Any, text: str, where: str) -> dict[str, Any] | ValueError:
    if not isinstance(value, dict):
        return ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if _HALF.search(text) and not is_text(json.dumps(value, ensure_ascii=False)):
        return ValueError(f"{where}: holds half of a character (\\ud800 to \\udfff without its partner): correct it")
    return value


def is_text(value: Any) -> TypeGuard[str]:
    """Return True for a text that can be written as UTF-8; an escape in JSON can encode half of a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def require(record: dict[str, Any], field: str, where: str) -> Any:
    """Return a field of a record.

    Raises:
        ValueError: it is missing.
    """
    if field not in record:
        raise ValueError(f"{where}: field {field!r} is missing")
    return record[field]


def seconds(record: dict[str, Any], field: str, where: str) -> float:
    """Return a time of a record in seconds.

    Raises:
        ValueError: it is missing or no number.
    """
    value = require(record, field, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: field {field!r} is {value!r}, expected seconds")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: field {field!r} is an integer of too many digits, expected seconds") from None
