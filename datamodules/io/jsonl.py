"""Read JSON Lines and arrays with the place of each record, so that errors name file, line and field.

Files packed by gzip are read as they are. Other forms (a record over several lines, an object around the records,
Parquet and so on) are one error for the whole file, which names the form and the command that converts it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

_SHOWN = 5
_GZIP = b"\x1f\x8b"
_PARQUET_FIX = (
    "convert it, `python -c \"import pandas; pandas.read_parquet('FILE').to_json('NEW.jsonl', orient='records', "
    'lines=True)"`'
)
_FORMS = {
    b"PAR1": ("a Parquet file", _PARQUET_FIX),
    b"ARROW1": ("an Arrow file", "convert it to JSON Lines"),
    b"PK\x03\x04": ("a zip archive (or a table of Excel)", "unpack it, or save the table as JSON Lines"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it with `unzstd`"),
    b"BZh": ("packed by bzip2", "unpack it with `bunzip2`"),
    b"\xfd7zXZ": ("packed by xz", "unpack it with `unxz`"),
    b"SQLite format 3": ("an SQLite database", "convert it to JSON Lines"),
    b"version https://git-lfs": ("a pointer of Git LFS and not the file", "fetch it with `git lfs pull`"),
    "\ufeff{".encode("utf-16-le"): ("text in UTF-16", "save the file as UTF-8"),
    "\ufeff[".encode("utf-16-le"): ("text in UTF-16", "save the file as UTF-8"),
    "\ufeff{".encode("utf-16-be"): ("text in UTF-16", "save the file as UTF-8"),
    "\ufeff[".encode("utf-16-be"): ("text in UTF-16", "save the file as UTF-8"),
}
"""First bytes of files of other forms: the form, and how to fix it."""
_RECORD_KEYS = frozenset(
    {"video", "videos", "image", "conversations", "conversation", "messages", "prompt", "views", "questions"}
)
"""Keys by which an object is a record itself, and nothing around records."""


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
    try:
        _, first = next(lines, (0, b""))
        if not first.lstrip().startswith(b"["):
            return False
        if next(lines, None) is None:
            return True
    except ValueError:  # of a damaged or foreign file, which is an error when its records are read
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def open_bytes(file: Path) -> IO[bytes]:
    """Open a file for reading; a file packed by gzip as its content.

    Raises:
        ValueError: the file has a form that is not text, such as Parquet; names it and how to fix it.
    """
    with file.open("rb") as opened:
        begin = opened.read(32)
    if begin.startswith(_GZIP):
        return cast(IO[bytes], gzip.open(file))
    for first_bytes, (form, fix) in _FORMS.items():
        if begin.startswith(first_bytes):
            raise ValueError(f"{file}: {form}: {fix.replace('FILE', str(file))}")
    return file.open("rb")


def read_bytes(file: Path) -> bytes:
    """Return the content of a file, unpacked if it is packed by gzip.

    Raises:
        ValueError: as ``open_bytes``, or the packed file is damaged.
    """
    with open_bytes(file) as opened:
        try:
            return opened.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: damaged gzip file ({error}): fetch it again") from None


def raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers from 1, without empty ones and without a byte order mark.

    Raises:
        ValueError: as ``read_bytes``.
    """
    with open_bytes(file) as opened:
        try:
            for number, line in enumerate(opened, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: damaged gzip file ({error}): fetch it again") from None


def _other_form(file: Path, first: bytes, is_only_line: bool) -> str | None:
    """Return the problem of a file of JSON whose records do not stand a line each; None if they seem to.

    Args:
        file: the file, for the message and to be read if its first line is no JSON.
        first: its first line that is not empty.
        is_only_line: no other one follows.
    """
    if b"\r" in first.strip() and is_only_line:
        return f"{file}: its lines end with \\r alone: convert it, `tr '\\r' '\\n' < {file} > NEW.jsonl`"
    if not first.lstrip().startswith(b"{"):
        return None
    value, rest = _first_value(first)
    if value is None and not is_only_line:
        text = read_bytes(file).removeprefix(codecs.BOM_UTF8)
        value, rest = _first_value(text)
    elif not is_only_line or rest:
        return None
    if not isinstance(value, dict):
        return None
    is_record = bool(_RECORD_KEYS & value.keys()) or any(key.lower().endswith("id") for key in value)
    if not is_record and not rest:
        lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        if lists:
            held = f"{lists[0]!r}" if len(lists) == 1 else f"one of {', '.join(map(repr, lists))}"
            fix = f"write one a line, `jq -c '.\"{lists[0]}\"[]' {file} > NEW.jsonl`"
            return f"{file}: one JSON object that holds the records as an array under {held}: {fix}"
        if value and all(isinstance(held, dict) for held in value.values()):
            fix = f"write one a line, `jq -c '.[]' {file} > NEW.jsonl`"
            return f"{file}: one JSON object that holds the records by id: {fix}"
    if is_only_line:
        return None
    return (
        f"{file}: a JSON object over several lines: write one record a line, `jq -c . {file} > NEW.jsonl`, or put the "
        "records into one array"
    )


def _first_value(text: bytes) -> tuple[Any, str]:
    """Return the JSON value at the start of a text, and the text after it; None if there is none."""
    try:
        decoded = text.decode().lstrip()
        value, end = json.JSONDecoder().raw_decode(decoded)
    except (ValueError, RecursionError):
        return None, ""
    return value, decoded[end:].strip()


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    lines = raw_lines(file)
    try:
        begin = list(islice(lines, 2))
        problem = _other_form(file, begin[0][1], len(begin) == 1) if begin else None
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        yield str(file), ValueError(problem)
        return
    numbered = chain(begin, lines)
    while True:
        try:
            number, line = next(numbered)
        except StopIteration:
            return
        except ValueError as error:  # the packed file is damaged from here on
            yield str(file), error
            return
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
    try:
        content = read_bytes(file).removeprefix(codecs.BOM_UTF8)
    except ValueError as error:
        yield str(file), error
        return
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
