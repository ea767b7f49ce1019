"""JSON Lines, read so that whatever is wrong can be named by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a JSON Lines file with their place, ``<file> line <n>``; empty lines are passed over.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: no UTF-8 text ({error.reason}): save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: malformed JSON ({error.msg} at column {error.colno}): mend the line"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record


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
