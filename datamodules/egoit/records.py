"""The instruction record: one form from a source's annotations to the prompt, with its JSON form and a compact store.

A source makes an ``InstructionRecord`` of each annotation. It holds the prompt fields (task, question, options, answer)
and no finished text: a template renders them when a sample is drawn, see ``templates.Templates.render``. A record may
hold a finished conversation instead, as those of other files do.

In a file, a record is one JSON object a line::

    {"id": "egotimeqa/000017", "video": "ego4d/clips/0a1b.mp4", "start": 28.0, "end": 34.5, "source": "egotimeqa",
     "prompt": {"task": "qa", "query": "Where did I put the knife?", "options": [], "target": "in the drawer"},
     "video_uid": "77ff", "duration": 480.0, "split": "train"}

    id          str    <source>/<unique key>
    video       str    path below the data root, of a file or a folder of frames; not there for text without video
    start, end  float  seconds in that file; a file of trimmed clips has them on no row
    source      str    source whose templates are used
    prompt      dict   prompt fields, see ``PromptFields``
    video_uid   str    recording that the video was cut out of, for splits and leak checks; "" if unknown
    duration    float  length of the file in seconds, -1.0 if unknown
    split       str    official name of the split

``reader.ConversationFile`` also reads records with ``conversations``, and so every file that earlier versions wrote.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from datamodules.ego_exo_clip.index import Strings
from datamodules.io.atomic import atomic_path
from datamodules.io.conversation import IMAGE_TAG, VIDEO_TAG, Turn
from datamodules.io.validate import Record, validate

RESERVED = frozenset({"label", "rejected_response", "tools", "objects", "images", "audios", "margin"})
"""Keys to which ms-swift gives a meaning of its own."""


@dataclass(frozen=True, slots=True)
class PromptFields:
    """The parts from which a template renders a question and its answer.

    Attributes:
        task: ``action``, ``qa``, ``mcq`` or ``description``; a task of your own needs templates of your own.
        query: question as annotated; for a task that asks no question, an additional request or "".
        target: answer as annotated.
        options: candidate answers of an ``mcq``, in the order of their letters; the target is one of them.

    Raises:
        ValueError: there are options, but the target is not among them.
    """

    task: str
    query: str
    target: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the target against the options."""
        if self.options and self.target.strip() not in self.options:
            raise ValueError(f"target {self.target!r} is none of the options {list(self.options)}: make them agree")


@dataclass(frozen=True, slots=True)
class InstructionRecord:
    """One instruction about one clip: prompt fields, or a finished conversation.

    Attributes:
        id: unique and the same in every run, ``<source>/<key>`` in files that a source writes.
        video: path below the data root, of a file, an image or a folder of frames; "" for text without video.
        prompt: fields that a template renders; None if the text is not to be rendered.
        turns: questions and answers as the file has them, without the clip's tag; empty if it has only prompt fields.
        source: source whose templates are preferred; "" for the default ones.
        window_s: start and end in seconds; None for the whole file.
        split: official name of the split; None if unknown.
        video_uid: recording that the video was cut out of; None if unknown.
        duration_s: length of the file in seconds; None if unknown.
        where: file and line, or entry, that the record was read from, for messages.
    """

    id: str
    video: str
    prompt: PromptFields | None = None
    turns: tuple[Turn, ...] = ()
    source: str = ""
    window_s: tuple[float, float] | None = None
    split: str | None = None
    video_uid: str | None = None
    duration_s: float | None = None
    where: str = field(default="a record without a place", compare=False)


def window_of(record: InstructionRecord) -> dict[str, float]:
    """Return the fields ``start`` and ``end`` of a record's JSON form; empty for the whole file."""
    if record.window_s is None:
        return {}
    start_s, end_s = record.window_s
    return {"start": float(start_s), "end": float(end_s)}


def entries_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return turns as human and gpt entries, the clip's tag at the front of the first."""
    entries = []
    for number, (question, answer) in enumerate(turns):
        entries.append({"from": "human", "value": question if number else f"{VIDEO_TAG}\n{question}"})
        entries.append({"from": "gpt", "value": answer})
    return entries


def to_json(record: InstructionRecord) -> dict[str, Any]:
    """Return the JSON form of a record: with its prompt fields, or else with its finished conversation.

    Every row of a file has the same keys and types, since some readers infer a type for each column from the first
    rows.
    """
    prompt = record.prompt
    text: dict[str, Any]
    if prompt is None:
        text = {"conversations": entries_of(record.turns)}
    else:
        text = {
            "prompt": {
                "task": prompt.task,
                "query": prompt.query,
                "options": list(prompt.options),
                "target": prompt.target,
            }
        }
    return {
        "id": record.id,
        "video": record.video,
        **window_of(record),
        "source": record.source,
        **text,
        "video_uid": record.video_uid or "",
        "duration": -1.0 if record.duration_s is None else float(record.duration_s),
        "split": record.split or "",
    }


def from_json(row: Mapping[str, Any], where: str) -> InstructionRecord:
    """Return the record of a row that ``reader.ConversationFile.rows`` yields.

    Raises:
        ValueError: its prompt fields are invalid; names the place.
    """
    values = [entry["value"] for entry in row.get("conversations", [])]
    if values:
        values[0] = values[0].removeprefix(f"{VIDEO_TAG}\n")
    duration_s = row.get("duration")
    known = isinstance(duration_s, int | float) and not isinstance(duration_s, bool) and duration_s > 0
    return InstructionRecord(
        id=str(row.get("id", where)),
        video=row.get("video", ""),
        prompt=prompt_of(row, where),
        turns=tuple(zip(values[::2], values[1::2], strict=True)),
        source=row["source"] if isinstance(row.get("source"), str) else "",
        window_s=(float(row["start"]), float(row["end"])) if "start" in row else None,
        split=str(row["split"]) if row.get("split") else None,
        video_uid=str(row["video_uid"]) if row.get("video_uid") else None,
        duration_s=float(duration_s) if known else None,  # type: ignore[arg-type]
        where=where,
    )


def prompt_of(row: Mapping[str, Any], where: str) -> PromptFields | None:
    """Return the prompt fields of a row; None if its text is not from a template.

    Raises:
        ValueError: a field is missing, has the wrong type, or contradicts another; names the place.
    """
    if isinstance(row.get("prompt"), dict):
        given = {key: value for key, value in row["prompt"].items() if value is not None}
    elif _is_templated(row):
        # Exported rows, and rows of earlier versions: the same fields side by side, options one a line.
        given = {key: row[key] for key in ("task", "query", "target")}
        given["options"] = row["options"].split("\n") if row.get("options") else []
    else:
        return None
    prompt = validate(_ROW, {"prompt": given}, where).prompt
    for name, text in (("query", prompt.query), ("target", prompt.target), *(("options", o) for o in prompt.options)):
        for tag in (VIDEO_TAG, IMAGE_TAG):
            if tag in text:
                raise ValueError(f"{where}: field 'prompt.{name}' holds {tag}, which stands for the clip: respell it")
    try:
        return PromptFields(prompt.task, prompt.query, prompt.target, tuple(prompt.options))
    except ValueError as error:
        raise ValueError(f"{where}: field 'prompt': {error}") from None


class _PromptRow(Record):
    task: str = Field(min_length=1)
    query: str = ""
    target: str = Field(min_length=1)
    options: list[str] = []


class _Row(Record):
    prompt: _PromptRow


_ROW = TypeAdapter(_Row)


def _is_templated(row: Mapping[str, Any]) -> bool:
    """Return True if a row names the template of its text, with all fields, and holds a single question."""
    template = row.get("template_id")
    texts = [row.get(key) for key in ("task", "source", "query", "target")]
    single = len(row.get("conversations", [])) == 2
    complete = all(isinstance(text, str) for text in (*texts, row.get("options", "")))
    return isinstance(template, int) and template >= 0 and single and complete


def output_files(files: Sequence[Path], folder: Path, suffix: str) -> list[Path]:
    """Return the paths in a folder to which the counterparts of some files are written.

    Raises:
        ValueError: two files have one name, or an input would be overwritten.
    """
    stems = [Path(file.name.removesuffix(".gz")).stem for file in files]
    if len(set(stems)) < len(files):
        raise ValueError(f"{', '.join(map(str, files))}: two have one name: rename one")
    outputs = [folder / f"{stem}{suffix}" for stem in stems]
    inputs = {file.resolve() for file in files}
    for output in outputs:
        if output.resolve() in inputs:
            raise ValueError(f"{output}: is read from and would be overwritten: give another folder")
    return outputs


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], array: bool = False) -> int:
    """Write rows that every reader accepts; the file appears whole or not at all.

    Args:
        file: made with its folder, replaced if it exists.
        rows: JSON objects.
        array: write one JSON array, an entry a line, instead of JSON Lines.

    Returns:
        The number of rows.

    Raises:
        ValueError: two rows have one id; or a row has other keys or types than the first, a null, a time that is not
            finite, or a key in ``RESERVED``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    types: dict[str, type] = {}
    ids: set[str] = set()
    count = 0
    with atomic_path(file) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        out.write("[\n" if array else "")
        for row in rows:
            types = types or _types_of(row, file)
            _check_row(row, types, file)
            if "id" in row:
                if row["id"] in ids:
                    raise ValueError(f"{file}: id {row['id']!r} is given twice: each record needs its own")
                ids.add(row["id"])
            out.write((",\n" if array and count else "") + json.dumps(row) + ("" if array else "\n"))
            count += 1
        out.write("\n]\n" if array else "")
    return count


def _types_of(first: Mapping[str, Any], file: Path) -> dict[str, type]:
    if reserved := sorted(RESERVED & first.keys()):
        raise ValueError(f"{file}: field {', '.join(reserved)}: other readers give it a meaning of theirs: rename it")
    return {key: type(value) for key, value in first.items()}


def _check_row(row: Mapping[str, Any], types: Mapping[str, type], file: Path) -> None:
    name = f"{file}: record {row.get('id', '?')}"
    if row.keys() != types.keys():
        differing = ", ".join(sorted(row.keys() ^ types.keys()))
        raise ValueError(f"{name}: has other fields than the first record ({differing}): make them agree")
    for key, value in row.items():
        if type(value) is not types[key] or value is None:
            raise ValueError(
                f"{name}: field {key!r} is {type(value).__name__}, {types[key].__name__} in the first record: "
                "make them agree, without null"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: field {key!r} is {value}: give a finite number")


class RecordStore:
    """Many records in a few arrays, without an object for each, so that worker processes share their memory.

    Fields that are needed only while files are read (``split``, ``video_uid``, ``duration_s``, ``where``) are dropped.
    Of a record with prompt fields only these are kept, unless ``raw`` is set.

    Args:
        raw: keep finished conversations and drop prompt fields.
    """

    def __init__(self, raw: bool = False) -> None:
        self.raw = raw
        self._ids, self._videos, self._texts = Strings(), Strings(), Strings()
        self._windows, self._video_of, self._kind_of = array("d"), array("i"), array("i")
        self._video_numbers: dict[str, int] = {}
        self._kind_numbers: dict[tuple[str | None, str], int] = {}
        self._kinds: list[tuple[str | None, str]] = []  # task (None for a finished conversation) and source

    def append(self, record: InstructionRecord) -> None:
        """Add a record at the end."""
        if record.video not in self._video_numbers or not record.video:  # texts without video have nothing in common
            self._video_numbers[record.video] = len(self._videos)
            self._videos.append(record.video)
        prompt = None if self.raw else record.prompt
        kind = (None if prompt is None else prompt.task, record.source)
        if prompt is None:
            content: list[Any] = [list(turn) for turn in record.turns]
        else:
            content = [prompt.query, prompt.target, *prompt.options]
        self._ids.append(record.id)
        self._texts.append(json.dumps(content, ensure_ascii=False))
        self._windows.extend(record.window_s or (-1.0, -1.0))
        self._video_of.append(self._video_numbers[record.video])
        if kind not in self._kind_numbers:
            self._kind_numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        self._kind_of.append(self._kind_numbers[kind])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as numpy arrays, which worker processes find in shared memory; nothing can be appended there."""
        numbers = np.frombuffer(self._kind_of, dtype=np.int32)
        return vars(self) | {
            "_windows": self.windows_s().ravel(),
            "_video_of": self.video_numbers(),
            "_kind_of": numbers,
        }

    def freeze(self) -> RecordStore:
        """Release the memory that only ``append`` needs, and return the store."""
        self._video_numbers = {}
        return self

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._ids)

    def id_of(self, index: int) -> str:
        """Return the id of a record by its number from 0."""
        return self._ids[index]

    def __getitem__(self, index: int) -> InstructionRecord:
        """Return a record by its number from 0."""
        task, source = self._kinds[self._kind_of[index]]
        content = json.loads(self._texts[index])
        prompt: PromptFields | None = None
        turns: tuple[Turn, ...] = ()
        if task is None:
            turns = tuple((question, answer) for question, answer in content)
        else:
            query, target, *options = content
            prompt = PromptFields(task, query, target, tuple(options))
        start_s, end_s = float(self._windows[2 * index]), float(self._windows[2 * index + 1])
        window_s = None if start_s < 0 else (start_s, end_s)
        video = self._videos[self._video_of[index]]
        return InstructionRecord(self._ids[index], video, prompt, turns, source, window_s)

    def video_numbers(self) -> NDArray[np.int32]:
        """Return for each record the number of its video, equal for equal paths, int32 [len]."""
        return np.frombuffer(self._video_of, dtype=np.int32)

    def windows_s(self) -> NDArray[np.float64]:
        """Return for each record start and end in seconds, -1 for the whole file, float64 [len, 2]."""
        return np.frombuffer(self._windows, dtype=np.float64).reshape(-1, 2)
