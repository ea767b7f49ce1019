"""EgoTimeQA (GroundVQA): questions about moments of Ego4D clips, generated from their narrations.

Read below the root, or in its ``data/unified``: ``annotations.EgoTimeQA.json``, a list of ``video_id`` (an Ego4D clip,
not a video), ``question``, ``answer``, ``wrong_answers`` (three), ``moment_start_frame`` and ``moment_end_frame``.

Frames count 30 a second whatever the rate of the file. Only the middle of a window is reliable: the authors divided the
lengths of windows by their mean, so a length is in units of that mean and not in seconds. It is multiplied by a factor,
limited to 4 to 30 s, and cut at the ends of the clip. ``start_sec`` and ``end_sec`` are used as they are, if present.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.egoit.sources.base import MIN_WINDOW_S, expand_window
from datamodules.egoit.templates import draw
from datamodules.io.annotations import (
    Counts,
    Official,
    SourceError,
    find_file,
    number_of,
    option,
    read_json,
    shuffled,
    text_of,
    try_parse,
)
from datamodules.io.jsonl import is_text

FPS = 30.0
SHORTEST_S, LONGEST_S = 4.0, 30.0
_LONE_L = re.compile(r"\bl\b")


@dataclass(frozen=True)
class EgoTimeQA:
    """EgoTimeQA: questions, answered in words or by a choice of four.

    A window stays inside the clip. Without ``clips``, a clip is assumed to end at the latest moment that is asked
    about, and records have no Ego4D video.
    """

    root: Path
    form: str = option(
        "open", "answer in words, choose one of four, or each of them for half of the rows", ("open", "closed", "mixed")
    )
    stretch: float = option(3.0, "factor on the length of windows that are not in seconds")
    clips: tuple[Path, ...] = option((), "files that name the Ego4D video of a clip: ego4d.json, nlq_train.json, ...")
    videos: str = option("ego4d/clips", "folder below the data root that holds <clip>.mp4")

    def __post_init__(self) -> None:
        """Check the factor."""
        if not 0 < self.stretch < float("inf"):
            raise SourceError(f"--stretch: got {self.stretch}, allowed: above 0")

    name: ClassVar[str] = "egotimeqa"

    def official(self) -> dict[str, Official]:
        """Return the number of rows that VideoMind's code mentions."""
        return {"rows": Official(302_500, exact=False)}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each row, numbered by its place in the file, since the file's own ids are not unique."""
        names = [f"{folder}annotations.EgoTimeQA.json" for folder in ("", "data/unified/")]
        file = find_file(self.root, names, "GroundVQA's file of EgoTimeQA")
        entries = read_json(file, list)
        known = read_clips(self.clips)
        # A clip of unknown length reaches at least its latest moment.
        ends_s: dict[str, float] = {}
        for entry in entries:
            clip, ends = try_parse(text_of, entry, "video_id", ""), try_parse(moment_s, entry, "", self.stretch)
            if not isinstance(clip, SourceError) and not isinstance(ends, SourceError):
                ends_s[clip] = max(ends_s.get(clip, 0.0), ends.annotated_s[1])
        for number, entry in enumerate(entries):
            where = f"{file} entry {number + 1}"
            counts.add("rows")
            record = try_parse(self._record, entry, f"{number:06d}", known, ends_s, where)
            if isinstance(record, InstructionRecord):
                counts.add_distinct("clips", record.video)
                if not record.video_uid:
                    counts.add("rows without an Ego4D video (--clips names them)")
                if record.prompt and "Person" in record.prompt.query + record.prompt.target:
                    counts.add("rows with a Person A, B, ... whom the clip does not name")
            yield record

    def _record(
        self, entry: Any, key: str, known: Mapping[str, tuple[str, float]], ends_s: Mapping[str, float], where: str
    ) -> InstructionRecord:
        clip = text_of(entry, "video_id", where)
        question, answer = (_spelled(text_of(entry, field, where)) for field in ("question", "answer"))
        # The window, cut at the ends of the clip.
        moment = moment_s(entry, where, self.stretch)
        video_uid, duration_s = known.get(clip, ("", -1.0))
        last_s = duration_s if duration_s > 0 else ends_s[clip]
        if moment.annotated_s[0] >= last_s:
            raise SourceError(
                f"{where}: begins at {moment.annotated_s[0]:.3f} s of a clip of {last_s:.3f} s: correct it"
            )
        start_s, end_s = max(0.0, moment.window_s[0]), min(last_s, moment.window_s[1])
        # A draw by the key decides which half of a mixed file is closed.
        closed = self.form == "closed" or (self.form == "mixed" and draw(0, 0, f"form of {key}") % 2 == 1)
        options: tuple[str, ...] = ()
        if closed:
            wrong = entry.get("wrong_answers")
            if not isinstance(wrong, list) or not all(is_text(text) and text.strip() for text in wrong):
                raise SourceError(f"{where}: field 'wrong_answers' is {wrong!r}, expected three texts: correct it")
            others = [_spelled(text) for text in wrong]
            if len({answer, *others}) != 4 or len(others) != 3:
                raise SourceError(f"{where}: {[answer, *others]} are not four different answers: correct them")
            options = shuffled(f"{self.name}/{key}", [answer, *others])
        return InstructionRecord(
            id=f"{self.name}/{key}",
            video=f"{self.videos}/{clip}.mp4",
            prompt=PromptFields("mcq" if closed else "qa", query=question, target=answer, options=options),
            source=self.name,
            window_s=expand_window(start_s, end_s, MIN_WINDOW_S, last_s),
            split="train",
            video_uid=video_uid or None,
            duration_s=duration_s if duration_s > 0 else None,
            where=where,
        )


def _spelled(text: str) -> str:
    """Return a text on one line with a lone l replaced by I, for right and wrong answers alike."""
    return _LONE_L.sub("I", " ".join(text.split()))


@dataclass(frozen=True)
class Moment:
    """Start and end of a moment in seconds of the clip: as annotated, and as its clip shows it."""

    annotated_s: tuple[float, float]
    window_s: tuple[float, float]


def moment_s(entry: Any, where: str, stretch: float) -> Moment:
    """Return the moment of a row; its window is not yet limited by the clip's length.

    Raises:
        SourceError: its times are missing or not numbers, or the end is not after the start.
    """
    is_seconds = isinstance(entry, Mapping) and entry.get("start_sec") is not None and entry.get("end_sec") is not None
    keys, scale = (("start_sec", "end_sec"), 1.0) if is_seconds else (("moment_start_frame", "moment_end_frame"), FPS)
    start_s, end_s = (number_of(entry, key, where) / scale for key in keys)
    if not 0 <= start_s < end_s:
        raise SourceError(f"{where}: fields {' and '.join(keys)} give {start_s:.3f} to {end_s:.3f} s: correct them")
    if is_seconds:
        return Moment((start_s, end_s), (start_s, end_s))
    middle_s, half_s = (start_s + end_s) / 2, min(max(stretch * (end_s - start_s), SHORTEST_S), LONGEST_S) / 2
    return Moment((start_s, end_s), (middle_s - half_s, middle_s + half_s))


def read_clips(files: tuple[Path, ...]) -> dict[str, tuple[str, float]]:
    """Return Ego4D video and length in seconds (-1 if unknown) by clip, from Ego4D's own files.

    Args:
        files: the metadata ``ego4d.json`` (``clips`` with ``clip_uid``, ``video_uid`` and their seconds), or
            annotations such as ``nlq_train.json`` (``videos`` with ``clips``).

    Raises:
        SourceError: a file holds no clips.
    """
    found: dict[str, tuple[str, float]] = {}
    for file in files:
        whole, before = read_json(file, dict), len(found)
        for holder in [whole, *(video for video in _list(whole, "videos", file) if isinstance(video, dict))]:
            for number, clip in enumerate(_list(holder, "clips", file)):
                where = f"{file} clip {number + 1}"
                uid = holder if "video_uid" in holder else clip
                length_s = -1.0
                if isinstance(clip, dict) and clip.get("video_end_sec") is not None:
                    ends = (number_of(clip, key, where) for key in ("video_end_sec", "video_start_sec"))
                    length_s = next(ends) - next(ends)
                found[text_of(clip, "clip_uid", where)] = (text_of(uid, "video_uid", where), length_s)
        if len(found) == before:
            raise SourceError(f"{file}: names no clips: give ego4d.json or nlq_train.json to --clips")
    return found


def _list(holder: Mapping[str, Any], key: str, file: Path) -> list[Any]:
    value = holder.get(key) or []
    if not isinstance(value, list):
        raise SourceError(f"{file}: field {key!r} is {value!r}, expected a list: give ego4d.json or nlq_train.json")
    return value
