"""Instruction files of any common form, brought to the form of ``records.InstructionRecord``.

Rows of our own files are read as they are. Files of other training stacks are converted, and
``ConversationFile.changes`` counts the conversions: JSON arrays; ``messages`` of roles and contents; contents in
pieces; lists of one video; ``{"image": {"video": path}}``; system texts; ``<image>`` for the video; a tag that is
missing or not at the front; repeated ids; where asked for, text without video. A row that is invalid becomes a problem
that names file and line; no row is dropped without one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datamodules.egoit.records import InstructionRecord, entries_of, from_json, prompt_of
from datamodules.io.conversation import IMAGE_TAG, VIDEO_TAG, Turn
from datamodules.io.jsonl import is_array, is_text, read_records, require, seconds

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_CONVERSATION_KEYS = ("conversations", "conversation", "messages")
_VIDEO_KEYS = ("video", "videos", "image")
_MISSING_TAG = f"a missing {VIDEO_TAG} put in front"


class ConversationFile:
    """The records of an instruction file, in its order.

    Args:
        path: JSON Lines or a JSON array, which may be packed by gzip.
        texts: every row must hold a conversation or prompt fields. If False, this holds only from the first such row
            on, so that a list of videos without texts is accepted too.
        text_only: accept conversations without any video, too: rows that name none and hold no tag.

    Attributes:
        changes: conversions to our form, each with the number of rows; complete once all rows were read.
        problems: a line for each invalid row; complete once all rows were read.
    """

    def __init__(self, path: Path, texts: bool = True, text_only: bool = False) -> None:
        self.path, self.texts, self.text_only = path, texts, text_only
        self.changes: Counter[str] = Counter()
        self.problems: list[str] = []

    def entries(self) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
        """Yield the place of every row, and the row in our form or the error that makes it invalid.

        Unknown fields are kept.
        """
        if is_array(self.path):
            self.changes["a JSON array, read like JSON Lines"] = 1
        ids: set[str] = set()
        for where, row in read_records(self.path):
            try:
                if isinstance(row, ValueError):
                    raise row
                row = self._normalised(row, where)
                if "id" in row:
                    if str(row["id"]) in ids:  # some files repeat a video's id for each question about it
                        row["id"] = f"{row['id']} ({where.removeprefix(f'{self.path} ')})"
                        self.changes["a repeated id, made unique by its line"] += 1
                    ids.add(str(row["id"]))
            except ValueError as error:
                self.problems.append(str(error))
                row = error
            yield where, row

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place of every valid row, and the row in our form."""
        for where, row in self.entries():
            if not isinstance(row, ValueError):
                yield where, row

    def __iter__(self) -> Iterator[InstructionRecord]:
        """Yield the record of every valid row."""
        for where, row in self.rows():
            yield from_json(row, where)

    def report(self) -> str:
        """Return a line with all conversions; empty if there were none."""
        changes = "; ".join(f"{change} ({count:,}x)" for change, count in self.changes.items())
        return f"{self.path}: {changes}" if changes else ""

    def _normalised(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a row in our form, and count its conversions."""
        has_conversation = any(row.get(key) is not None for key in _CONVERSATION_KEYS)
        self.texts = self.texts or has_conversation or isinstance(row.get("prompt"), dict)
        ours, changed = normalise(row, where, self.texts, self.text_only)
        self.changes.update(changed)
        return ours


def normalise(
    row: dict[str, Any], where: str, texts: bool = True, text_only: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Bring a row of any common form to our form.

    Args:
        row: a JSON object.
        where: its place, for messages.
        texts: whether it must hold a conversation or prompt fields.
        text_only: whether it may name no video if it holds no tag.

    Returns:
        The row in our form, with its unknown fields, and a line for each conversion.

    Raises:
        ValueError: the row is invalid; names the place.
    """
    changed: list[str] = []
    given = {key: value for key, value in row.items() if value is not None}  # readers by column fill with null
    has_conversation = any(key in given for key in _CONVERSATION_KEYS)
    has_prompt = isinstance(given.get("prompt"), dict)
    turns: list[Turn] = []
    paths: list[str] = []
    if has_conversation or (texts and not has_prompt):
        turns, paths = _turns(given, where, changed.append)
    # Fields keep their order, so that a file of our own is exported byte for byte.
    names = dict.fromkeys(_CONVERSATION_KEYS, "conversations") | dict.fromkeys(_VIDEO_KEYS, "video")
    ours = {names.get(key, key): value for key, value in given.items()}
    names_video = bool(paths) or any(key in given for key in _VIDEO_KEYS)
    if text_only and not names_video and _MISSING_TAG in changed:
        changed[changed.index(_MISSING_TAG)] = "text without video"
    else:
        ours["video"] = _video(given, paths, where, changed.append)
    if turns:
        ours["conversations"] = entries_of(turns)
    _check_window(ours, where)
    prompt_of(ours, where)  # raises if prompt fields are invalid
    return ours, changed


def accept(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield rows that are about to be written, given with their places, once ``normalise`` takes them.

    Raises:
        ValueError: it refuses one, so that the written file would be refused; names the place.
    """
    for where, row in rows:
        normalise(row, where)
        if not is_text(json.dumps(row, ensure_ascii=False)):
            raise ValueError(f"{where}: a text holds half of a character (a lone surrogate): correct it")
        yield row


def _check_window(record: dict[str, Any], where: str) -> None:
    if ("start" in record) != ("end" in record):
        raise ValueError(f"{where}: only one of 'start' and 'end' is given: give both, or neither for the whole file")
    if "start" not in record:
        return
    start, end = seconds(record, "start", where), seconds(record, "end", where)
    if not (0 <= start < end < math.inf):
        raise ValueError(f"{where}: fields 'start' and 'end' are {start} and {end}: expected 0 <= start < end, seconds")


def _turns(record: dict[str, Any], where: str, note: Callable[[str], None]) -> tuple[list[Turn], list[str]]:
    """Return questions and answers without the clip's tag, and the paths of videos inside contents."""
    first, *others = [key for key in _CONVERSATION_KEYS if key in record] or ["conversations"]
    turns, paths = _turns_in(record, first, where, note)
    for key in others:
        again, more_paths = _turns_in(record, key, where, note)
        if again != turns:
            raise ValueError(f"{where}: fields {first!r} and {key!r} differ: keep one of them")
        paths += more_paths
    return turns, paths


def _turns_in(
    record: dict[str, Any], key: str, where: str, note: Callable[[str], None]
) -> tuple[list[Turn], list[str]]:
    values = require(record, key, where)
    if not isinstance(values, list):
        raise ValueError(f"{where}: field {key!r} must be a list of turns")
    if key != "conversations":
        note(f"field {key!r} read as 'conversations'")
    if values and isinstance(values[0], dict) and _speaker(values[0]) == "system":
        note("a system text dropped: set it in data.init_args.prompt.system")
        values = values[1:]
    if not values or len(values) % 2:
        raise ValueError(f"{where}: field {key!r} has {len(values)} entries: human and gpt must alternate")
    texts: list[str] = []
    paths: list[str] = []
    for number, entry in enumerate(values):
        wanted = ("human", "gpt")[number % 2]
        text = _text(entry, paths, note) if isinstance(entry, dict) and _speaker(entry) == wanted else None
        if text is None:
            raise ValueError(f"{where}: {key}[{number}] must be {{'from': '{wanted}', 'value': text}}")
        if wanted == "gpt" and not text.strip():
            raise ValueError(f"{where}: {key}[{number}] is an empty answer: give its text")
        texts.append(text)
    texts[0] = _with_tag(texts[0], f"{where}: {key}[0].value", note)
    for number, text in enumerate(texts):
        for tag in (VIDEO_TAG, IMAGE_TAG):
            if text.count(tag) > (number == 0 and tag == VIDEO_TAG):
                raise ValueError(f"{where}: {tag} stands for the one clip: only {key}[0].value may hold it, once")
    if not texts[0].startswith(VIDEO_TAG):
        note(f"{VIDEO_TAG} moved to the front")
    texts[0] = texts[0].replace(VIDEO_TAG, "").strip()
    return list(zip(texts[::2], texts[1::2], strict=True)), paths


def _with_tag(question: str, where: str, note: Callable[[str], None]) -> str:
    """Return the first question with the tag that this repository knows; a record is about one video."""
    if question.count(IMAGE_TAG) > 1:
        raise ValueError(f"{where} holds {question.count(IMAGE_TAG)} {IMAGE_TAG}: a record is about one video")
    if VIDEO_TAG in question:
        if IMAGE_TAG in question:
            note(f"{IMAGE_TAG} next to {VIDEO_TAG} dropped")
            question = re.sub(rf"{IMAGE_TAG}\n?", "", question)
        return question
    if IMAGE_TAG in question:
        note(f"{IMAGE_TAG} read as {VIDEO_TAG}")
        return question.replace(IMAGE_TAG, VIDEO_TAG)
    note(_MISSING_TAG)
    return f"{VIDEO_TAG}\n{question}"


def _speaker(entry: dict[str, Any]) -> str | None:
    name = entry.get("from", entry.get("role"))
    return _SPEAKERS.get(name) if isinstance(name, str) else None


def _text(entry: dict[str, Any], paths: list[str], note: Callable[[str], None]) -> str | None:
    """Return the text of an entry, with the tag in the place of a video among its pieces; None if it is no text."""
    value = entry.get("value", entry.get("content"))
    if "from" not in entry:
        note("'role' and 'content' read as 'from' and 'value'")
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    note("contents in pieces joined to one text")
    pieces = []
    for piece in value:
        kind = piece.get("type") if isinstance(piece, dict) else None
        given = piece.get(kind) if isinstance(kind, str) else None
        if isinstance(given, dict):
            given = given.get("url")
        if not isinstance(given, str) or kind not in ("text", "video", "video_url"):
            return None
        if kind != "text":
            if not given.strip():
                return None
            paths.append(given)
        pieces.append(given if kind == "text" else VIDEO_TAG)
    return "\n".join(pieces)


def _video(record: dict[str, Any], paths: list[str], where: str, note: Callable[[str], None]) -> str:
    """Return the path of the one video; several fields may name it, if they agree."""
    places = [(f"field {key!r}", _video_in(record, key, where, note)) for key in _VIDEO_KEYS if key in record]
    if not places and paths:
        note("the video's path taken out of the contents")
    places += [("a path in the contents", path) for path in paths]
    if not places:
        raise ValueError(f"{where}: field 'video' is missing")
    for place, path in places[1:]:
        if path != places[0][1]:
            raise ValueError(
                f"{where}: {places[0][0]} is {places[0][1]!r} and {place} is {path!r}: a record is about one video"
            )
    return places[0][1]


def _video_in(record: dict[str, Any], key: str, where: str, note: Callable[[str], None]) -> str:
    value = require(record, key, where)
    if key == "image" and isinstance(value, dict):
        key, value = "image.video", value.get("video")
    if key != "video":
        note(f"field {key!r} read as 'video'")
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{where}: field {key!r} lists {len(value)} videos: a record is about one")
        note(f"field {key!r} was a list of one")
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {key!r} is {value!r}, expected the path of a video below the data root")
    return value
