r"""The record of instruction data, and how a file of them is written so that every reader takes it.

One JSON object a line::

    id             str            <source>/<unique key>
    video          str            below the data root; a file or a folder of pictures
    start, end     float          seconds in that file; a file of trimmed clips has them on no row
    conversations  [{from, value}]  human and gpt in turn, "<video>\n" first
    source         str            whose bank of templates is used; channel repeats it, ms-swift logs a loss for each
    task           str            action, qa, mcq, description
    prompt_level   str            base, task, task_ego
    template_id    int            0 to 9
    query          str            the question as annotated; "" for a task that asks none
    options        str            candidates of an mcq, one a line; "" else
    target         str            the answer as annotated
    video_uid      str            the recording that the video was cut out of, for splits and leaks; "" if unknown
    duration       float          seconds of the file, -1.0 if unknown
    split          str            official name

Readers that infer a type for each column from the first rows fail on later ones that differ. So every row has the same
keys, of the same types, none is null, and no key is one that a reader gives a meaning to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.egoit.datamodule import VIDEO_TAG, Wording
from datamodules.egoit.templates import Templates, draw

RESERVED = frozenset({"label", "rejected_response", "tools", "objects", "images", "audios", "margin"})
"""Keys that ms-swift gives a meaning to."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question about one clip.

    Attributes:
        key: unique in its source and the same in every run.
        video: path below the data root.
        wording: what the conversation is made from.
        split: official name.
        video_uid: the recording that the video was cut out of; "" if unknown.
        window_s: start and end in seconds; None for the whole file.
        duration_s: of the file, in seconds; -1 if unknown.
        where: file and line, or entry, that it was read from, for messages.
    """

    key: str
    video: str
    wording: Wording
    split: str
    video_uid: str
    window_s: tuple[float, float] | None = None
    duration_s: float = -1.0
    where: str = field(default="a record without a place", compare=False)

    @property
    def name(self) -> str:
        """The record's id."""
        return f"{self.wording.source}/{self.key}"


def row(record: Record, templates: Templates, level: str, seed: int) -> dict[str, Any]:
    """A record as a JSON object, worded by the template that epoch 0 of a run with the same seed draws."""
    template = draw(seed, 0, record.name)
    question, answer = templates.turn(record.wording, level, template)
    window = {} if record.window_s is None else dict(zip(("start", "end"), map(float, record.window_s), strict=True))
    return {
        "id": record.name,
        "video": record.video,
        **window,
        "conversations": [
            {"from": "human", "value": f"{VIDEO_TAG}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
        "source": record.wording.source,
        "channel": record.wording.source,
        "task": record.wording.task,
        "prompt_level": level,
        "template_id": template,
        "query": record.wording.query,
        "options": "\n".join(record.wording.options),
        "target": record.wording.target,
        "video_uid": record.video_uid,
        "duration": float(record.duration_s),
        "split": record.split,
    }


def targets(files: Sequence[Path], folder: Path, suffix: str) -> list[Path]:
    """Where the counterparts of some files go: their names in a folder, with a suffix.

    Raises:
        ValueError: two files have one name, or a file would be written over one that is read.
    """
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"{', '.join(map(str, files))}: two have one name: rename one")
    found = [folder / f"{file.stem}{suffix}" for file in files]
    read = {file.resolve() for file in files}
    for target in found:
        if target.resolve() in read:
            raise ValueError(f"{target}: is read from and would be overwritten: give another folder")
    return found


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], array: bool = False) -> int:
    """Write rows that every reader takes; the file appears whole or not at all.

    Args:
        file: made with its folder, replaced if it is there.
        rows: JSON objects.
        array: write one JSON array, an entry a line, rather than JSON Lines.

    Returns:
        The number of rows.

    Raises:
        ValueError: two rows have one id; or a row has other keys or types than the first, a null, a time that is no
            finite number, or a key in ``RESERVED``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.partial")
    kinds: dict[str, type] = {}
    names: set[str] = set()
    count = 0
    try:
        with unfinished.open("w", encoding="utf-8") as out:
            out.write("[\n" if array else "")
            for item in rows:
                kinds = kinds or _kinds(item, file)
                _check(item, kinds, file)
                if "id" in item:
                    if item["id"] in names:
                        raise ValueError(f"{file}: id {item['id']!r} is given twice: each record needs its own")
                    names.add(item["id"])
                out.write((",\n" if array and count else "") + json.dumps(item) + ("" if array else "\n"))
                count += 1
            out.write("\n]\n" if array else "")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def _kinds(first: Mapping[str, Any], file: Path) -> dict[str, type]:
    if reserved := sorted(RESERVED & first.keys()):
        raise ValueError(f"{file}: field {', '.join(reserved)}: other readers give it a meaning of theirs: rename it")
    return {key: type(value) for key, value in first.items()}


def _check(item: Mapping[str, Any], kinds: Mapping[str, type], file: Path) -> None:
    name = f"{file}: record {item.get('id', '?')}"
    if item.keys() != kinds.keys():
        differing = ", ".join(sorted(item.keys() ^ kinds.keys()))
        raise ValueError(f"{name}: has other fields than the first record ({differing}): make them agree")
    for key, value in item.items():
        if type(value) is not kinds[key] or value is None:
            raise ValueError(
                f"{name}: field {key!r} is {type(value).__name__}, {kinds[key].__name__} in the first record: "
                "make them agree, without null"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: field {key!r} is {value}: give a finite number")
