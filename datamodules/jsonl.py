"""JSON Lines, read so that whatever is wrong can be named by file, line and field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a JSON Lines file with their place, ``<file> line <n>``; empty lines are passed over.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    for where, record in _lines(file):
        if isinstance(record, ValueError):
            raise record
        yield where, record


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Records of a JSON Lines file or of a JSON array with their place; one that cannot be read is the error saying so.

    Entries of an array have the place ``<file> line <n> entry <m>``, both counted from 1.
    """
    return _entries(file) if is_array(file) else _lines(file)


def is_array(file: Path) -> bool:
    """Whether a file holds one JSON array rather than a record a line."""
    with file.open("rb") as lines:
        return next((line.lstrip()[:1] for line in lines if line.strip()), b"") == b"["


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                yield where, _object(json.loads(line.decode()), where)
            except UnicodeDecodeError as error:
                yield where, ValueError(f"{where}: no UTF-8 text ({error.reason}): save the file as UTF-8")
            except json.JSONDecodeError as error:
                yield where, ValueError(f"{where}: malformed JSON ({error.msg} at column {error.colno}): mend the line")


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        yield str(file), ValueError(f"{file}: no UTF-8 text ({error.reason}): save the file as UTF-8")
        return
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        where = f"{file} line {line} entry {number}"
        try:
            value, end = decoder.raw_decode(text, at)
            at = _after_space(text, end)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except json.JSONDecodeError as error:  # where the next entry begins cannot be told
            problem = f"malformed JSON ({error.msg} at line {error.lineno} column {error.colno})"
            yield where, ValueError(f"{where}: {problem}, nothing after it was read: mend it")
            return
        yield where, _object(value, where)
        if text[at] == ",":
            at = _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "matches the empty text too"
    return found.end()


def _object(value: Any, where: str) -> dict[str, Any] | ValueError:
    if isinstance(value, dict):
        return value
    return ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")


def require(record: dict[str, Any], field: str, where: str) -> Any:
    """A field of a record.

    Raises:
        ValueError: it is missing.
    """
    if field not in record:
        raise ValueError(f"{where}: field {field!r} is missing")
    return record[field]


def seconds(record: dict[str, Any], field: str, where: str) -> float:
    """A time of a record.

    Raises:
        ValueError: it is missing or no number.
    """
    value = require(record, field, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: field {field!r} is {value!r}, expected seconds")
    return float(value)
