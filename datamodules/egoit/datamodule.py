"""Conversations about clips, read from the forms that training stacks write them in.

A record of our own files (see ``datamodules/egoit/records.py``) is read as it stands. Files of other stacks are brought
to that form, and ``ConversationFile.changes`` says what it took: JSON arrays; ``messages`` of roles and contents;
contents in pieces; lists of one video; ``{"image": {"video": path}}``; system texts; a tag that is not in front; an id
that a record before has. Whatever cannot be read is kept as a problem that names file and line; nothing is left out
without one.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.ego_exo_clip.index import Strings
from datamodules.io.jsonl import is_array, read_records, require, seconds

VIDEO_TAG = "<video>"
"""Stands for the clip in a conversation's first question."""
Turn = tuple[str, str]
"""A question and its answer."""
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True, slots=True)
class Wording:
    """What a question and its answer were worded from by a template, so that another one can word them anew.

    Attributes:
        task: ``action``, ``qa``, ``mcq`` or ``description``.
        source: whose bank of templates is preferred, such as ``ssv2``.
        query: the question as annotated; for a task that asks none, a further request or nothing.
        options: candidates of an ``mcq``, in the order of their letters.
        target: the answer as annotated.
    """

    task: str
    source: str
    query: str
    options: tuple[str, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record.

    Attributes:
        name: its id, or its place in the file.
        video: path below the data root, of a file or a folder of pictures.
        start_s, end_s: the seconds that are shown; None for the whole file.
        turns: questions and answers, the clip's tag taken off.
        wording: None if the text is not from a template.
        split: of its data set; None if it names none.
        video_uid: the recording that the video was cut out of; None if it names none.
    """

    name: str
    video: str
    start_s: float | None
    end_s: float | None
    turns: tuple[Turn, ...]
    wording: Wording | None = None
    split: str | None = None
    video_uid: str | None = None


class ConversationFile:
    """Records of a file of conversations, in its order.

    Args:
        path: the file.
        texts: every record must hold a conversation; else this holds from the first one on that does, so that a file of
            videos alone is read too.

    Attributes:
        changes: what was done to bring records to our form, and to how many; complete once all were read.
        problems: a line for each record that cannot be read; so too.
    """

    def __init__(self, path: Path, texts: bool = True) -> None:
        self.path, self.texts = path, texts
        self.changes: Counter[str] = Counter()
        self.problems: list[str] = []

    def entries(self) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
        """Every record in our form, or why it cannot be read, with its place; fields unknown here are kept."""
        if is_array(self.path):
            self.changes["a JSON array, read like JSON Lines"] = 1
        names: set[str] = set()
        for where, record in read_records(self.path):
            try:
                if isinstance(record, ValueError):
                    raise record
                record = self._normalised(record, where)
                if "id" in record:
                    if str(record["id"]) in names:  # as where a video's id is given to each question about it
                        record["id"] = f"{record['id']} ({where.removeprefix(f'{self.path} ')})"
                        self.changes["an id that a record before has, made one of its own by the line"] += 1
                    names.add(str(record["id"]))
            except ValueError as error:
                self.problems.append(str(error))
                record = error
            yield where, record

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every record that can be read, as ``entries`` gives it."""
        for where, record in self.entries():
            if not isinstance(record, ValueError):
                yield where, record

    def __iter__(self) -> Iterator[Conversation]:
        """Every record that can be read."""
        for where, record in self.records():
            yield conversation(record, where)

    def report(self) -> str:
        """What was changed, on one line; empty if nothing was."""
        changes = "; ".join(f"{what} ({count:,}x)" for what, count in self.changes.items())
        return f"{self.path}: {changes}" if changes else ""

    def _normalised(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        changed: list[str] = []
        given = {key: value for key, value in record.items() if value is not None}  # readers by column fill with null
        turns: list[Turn] = []
        paths: list[str] = []
        self.texts = self.texts or any(key in given for key in _CONVERSATION_KEYS)
        if self.texts:
            turns, paths = _turns(given, where, changed.append)
        places = dict.fromkeys(_CONVERSATION_KEYS, "conversations") | dict.fromkeys(_VIDEO_KEYS, "video")
        ours = {places.get(key, key): value for key, value in given.items()}  # fields keep their order
        ours["video"] = _video(given, paths, where, changed.append)
        ours["conversations"] = [
            {"from": speaker, "value": (f"{VIDEO_TAG}\n" if index == 0 and speaker == "human" else "") + value}
            for index, turn in enumerate(turns)
            for speaker, value in zip(("human", "gpt"), turn, strict=True)
        ]
        _check_window(ours, where)
        self.changes.update(changed)
        return ours


_CONVERSATION_KEYS = ("conversations", "conversation", "messages")
_VIDEO_KEYS = ("video", "videos", "image")


def conversation(record: dict[str, Any], where: str) -> Conversation:
    """A record that ``ConversationFile.records`` gave."""
    values = [entry["value"] for entry in record["conversations"]]
    values[0] = values[0].removeprefix(f"{VIDEO_TAG}\n")
    start_s, end_s = (None if record.get(key) is None else float(record[key]) for key in ("start", "end"))
    return Conversation(
        str(record.get("id", where)),
        record["video"],
        start_s,
        end_s,
        tuple(zip(values[::2], values[1::2], strict=True)),
        _wording(record),
        split=None if record.get("split") is None else str(record["split"]),
        video_uid=None if record.get("video_uid") is None else str(record["video_uid"]),
    )


def _wording(record: dict[str, Any]) -> Wording | None:
    """What the text was made from; None unless everything is there and it is one question."""
    template, options = record.get("template_id"), record.get("options", "")
    texts = [record.get(key) for key in ("task", "source", "query", "target")]
    templated = isinstance(template, int) and template >= 0 and len(record["conversations"]) == 2
    if not templated or not all(isinstance(text, str) for text in (*texts, options)):
        return None
    task, source, query, target = map(str, texts)
    return Wording(task, source, query, tuple(options.split("\n")) if options else (), target)


def _check_window(record: dict[str, Any], where: str) -> None:
    if ("start" in record) != ("end" in record):
        raise ValueError(f"{where}: only one of 'start' and 'end' is given: give both, or neither for the whole file")
    if "start" not in record:
        return
    start, end = seconds(record, "start", where), seconds(record, "end", where)
    if not (0 <= start < end < math.inf):
        raise ValueError(f"{where}: fields 'start' and 'end' are {start} and {end}: expected 0 <= start < end, seconds")


def _turns(record: dict[str, Any], where: str, note: Callable[[str], None]) -> tuple[list[Turn], list[str]]:
    """Questions and answers without the clip's tag, and paths of videos that stand inside contents."""
    first, *others = [key for key in _CONVERSATION_KEYS if key in record] or ["conversations"]
    turns, paths = _turns_in(record, first, where, note)
    for key in others:
        again, more_paths = _turns_in(record, key, where, note)
        if again != turns:
            raise ValueError(f"{where}: fields {first!r} and {key!r} say different things: keep one of them")
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
        note("a system text left out: data.init_args.prompt.system gives one")
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
    if VIDEO_TAG not in texts[0]:
        raise ValueError(f"{where}: {key}[0].value lacks {VIDEO_TAG}, the place of the clip")
    if texts[0].count(VIDEO_TAG) > 1 or any(VIDEO_TAG in text for text in texts[1:]):
        raise ValueError(f"{where}: {VIDEO_TAG} stands for the one clip: only {key}[0].value may hold it, once")
    if not texts[0].startswith(VIDEO_TAG):
        note(f"{VIDEO_TAG} moved to the front")
    texts[0] = texts[0].replace(VIDEO_TAG, "").strip()
    return list(zip(texts[::2], texts[1::2], strict=True)), paths


def _speaker(entry: dict[str, Any]) -> str | None:
    name = entry.get("from", entry.get("role"))
    return _SPEAKERS.get(name) if isinstance(name, str) else None


def _text(entry: dict[str, Any], paths: list[str], note: Callable[[str], None]) -> str | None:
    """What an entry says, with the tag in the place of a video among its pieces; None if it is no text."""
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
    """Path of the one video, wherever it stands; it may stand in several places, but be only one."""
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


class ConversationStore:
    """Many conversations without an object for each: a few arrays, which forked processes share as they are.

    What is needed only while reading, ``split`` and ``video_uid``, is not kept.

    Args:
        worded: keep what templated questions were made from, not their text.
    """

    def __init__(self, worded: bool) -> None:
        self.worded = worded
        self._names, self._videos, self._texts = Strings(), Strings(), Strings()
        self._windows, self._video_of, self._kind_of = array("d"), array("i"), array("i")
        self._video_numbers: dict[str, int] = {}
        self._kind_numbers: dict[tuple[str, str] | None, int] = {}
        self._kinds: list[tuple[str, str] | None] = []

    def append(self, record: Conversation) -> None:
        """Add one at the end."""
        if record.video not in self._video_numbers:
            self._video_numbers[record.video] = len(self._videos)
            self._videos.append(record.video)
        made = record.wording if self.worded else None
        kind = None if made is None else (made.task, made.source)
        content = [*map(list, record.turns)] if made is None else [made.query, made.target, *made.options]
        self._names.append(record.name)
        self._texts.append(json.dumps(content, ensure_ascii=False))
        self._windows.extend(-1.0 if value is None else value for value in (record.start_s, record.end_s))
        self._video_of.append(self._video_numbers[record.video])
        if kind not in self._kind_numbers:
            self._kind_numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        self._kind_of.append(self._kind_numbers[kind])

    def freeze(self) -> ConversationStore:
        """Forget what only ``append`` needs."""
        self._video_numbers = {}
        return self

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)

    def name(self, index: int) -> str:
        """Name of one, by a number from 0."""
        return self._names[index]

    def video(self, index: int) -> tuple[str, tuple[float, float] | None]:
        """Path and window of one, None for the whole file."""
        start_s, end_s = self._windows[2 * index], self._windows[2 * index + 1]
        return self._videos[self._video_of[index]], None if start_s < 0 else (start_s, end_s)

    def content(self, index: int) -> Wording | tuple[Turn, ...]:
        """What one says: what its question is made from, or its turns."""
        kind = self._kinds[self._kind_of[index]]
        content = json.loads(self._texts[index])
        if kind is None:
            return tuple((question, answer) for question, answer in content)
        query, target, *options = content
        return Wording(*kind, query, tuple(options), target)

    def video_numbers(self) -> NDArray[np.int32]:
        """For each the number of its video, equal for equal paths, int32 [len]."""
        return np.frombuffer(self._video_of, dtype=np.int32)

    def windows_s(self) -> NDArray[np.float64]:
        """For each its start and end in seconds, -1 for the whole file, float64 [len, 2]."""
        return np.frombuffer(self._windows, dtype=np.float64).reshape(-1, 2)
