"""EGTEA Gaze+ (Georgia Tech): one cooking action for each trimmed clip.

Read below the root, or in its ``action_annotation``: ``action_idx.txt`` and a ``<split>.txt`` for each split. A line of
a split is ``<clip> <action id> <verb id> <noun id> ...``. These ids start at 1, those of the raw annotations at 0. A
clip is ``<session>-<start ms>-<end ms>-F<first>-F<last>``, and a session ``<subject>-R<number>-<recipe>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.annotations import Counts, Official, SourceError, find_file, option, read_text, try_parse

_CLIP = re.compile(r"(?P<session>\w+-R\d+-\w+)-(?P<start>\d{1,9})-(?P<end>\d{1,9})-F\d+-F\d+")
_ID = re.compile(r"\d{1,9}")
_ROWS = {"train_split1": 8299, "train_split2": 8299, "train_split3": 8300}
_ROWS |= {"test_split1": 2022, "test_split2": 2022, "test_split3": 2021}
_CLIPS, _ACTIONS = 10_321, 106  # clips of a train and a test split together


@dataclass(frozen=True)
class Egtea:
    """EGTEA Gaze+: trimmed clips of some splits. A clip that is in several splits is taken once, for the first."""

    root: Path
    splits: tuple[str, ...] = option(("train_split1",), "splits to read", tuple(_ROWS))
    videos: str = option("egtea", "folder below the data root that holds cropped_clips, or the whole sessions")
    untrimmed: bool = option(False, "videos are whole sessions, <session>.mp4, shown from start to end of the clip")

    name: ClassVar[str] = "egtea"

    def official(self) -> dict[str, Official]:
        """Return rows of the splits and classes, and clips where train and test of one split are taken."""
        known = {f"rows of {split}": Official(_ROWS[split]) for split in self.splits if split in _ROWS}
        if any({f"train_split{n}", f"test_split{n}"} <= set(self.splits) for n in (1, 2, 3)):
            known["clips"] = Official(_CLIPS)
        return {**known, "actions": Official(_ACTIONS)}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each clip."""
        contents = "EGTEA's action annotations"
        actions = read_labels(find_file(self.root, _places("action_idx"), contents))
        counts.add("actions", len(actions))
        known: dict[str, InstructionRecord] = {}
        for split in self.splits:
            file = find_file(self.root, _places(split), contents)
            for number, line in enumerate(read_text(file).splitlines(), 1):
                if not line.strip():
                    continue
                counts.add(f"rows of {split}")
                record = try_parse(self._record, line, split, actions, f"{file} line {number}")
                # Train and test lists may share a clip: keep the first, and report contradicting labels.
                if isinstance(record, InstructionRecord):
                    first = known.setdefault(record.id, record)
                    if first.prompt != record.prompt:
                        yield SourceError(
                            f"{record.where}: {record.id} is {_target(record)!r}, but {_target(first)!r} in "
                            f"{first.where}: correct one"
                        )
                    if not counts.add_distinct("clips", record.id):
                        continue
                yield record

    def _record(self, line: str, split: str, actions: dict[int, str], where: str) -> InstructionRecord:
        clip, *ids = line.split()
        parts = clip_parts(clip)
        if parts is None:
            raise SourceError(f"{where}: clip {clip!r} is not <session>-<start ms>-<end ms>-F<first>-F<last>: fix it")
        if len(ids) < 3 or not all(map(_ID.fullmatch, ids)):
            raise SourceError(f"{where}: ids are {ids}, expected those of an action, a verb and nouns: fix them")
        if int(ids[0]) not in actions:
            raise SourceError(
                f"{where}: action id {ids[0]} is not in action_idx.txt, whose ids go from {min(actions)} to "
                f"{max(actions)}: take the split files, not raw_annotations"
            )
        session, start_s, end_s = parts
        video = (
            f"{self.videos}/{session}.mp4" if self.untrimmed else f"{self.videos}/cropped_clips/{session}/{clip}.mp4"
        )
        return InstructionRecord(
            id=f"{self.name}/{clip}",
            video=video,
            prompt=PromptFields("action", query="", target=action_text(actions[int(ids[0])])),
            source=self.name,
            window_s=(start_s, end_s) if self.untrimmed else None,
            split=split,
            video_uid=session,
            where=where,
        )


def _target(record: InstructionRecord) -> str:
    assert record.prompt is not None, "made above"
    return record.prompt.target


def _places(stem: str) -> list[str]:
    return [f"{folder}{stem}.txt" for folder in ("", "action_annotation/")]


def clip_parts(clip: str) -> tuple[str, float, float] | None:
    """Return session, start and end in seconds from a clip's name; None if the name has another form."""
    found = _CLIP.fullmatch(clip)
    if found is None or int(found["start"]) >= int(found["end"]):
        return None
    return found["session"], int(found["start"]) / 1000, int(found["end"]) / 1000


def read_labels(file: Path) -> dict[int, str]:
    """Return labels by id from lines ``<label> <id>``; labels contain spaces.

    Raises:
        SourceError: a line does not end in an id, one is given twice, or they do not start at 1.
    """
    labels: dict[int, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        label, _, identifier = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not label or not _ID.fullmatch(identifier) or int(identifier) in labels:
            raise SourceError(f"{file} line {number}: {line!r} is not <label> <id of its own>: fetch the file again")
        labels[int(identifier)] = label.strip()
    if min(labels, default=0) != 1:
        raise SourceError(f"{file}: ids begin at {min(labels, default=None)}, expected 1: fetch action_idx.txt")
    return labels


def action_text(label: str) -> str:
    """Return the answer text of a class: ``Mix mixture,eating_utensil`` becomes "mix mixture and eating utensil"."""
    verb, _, nouns = label.rpartition(" ")
    *others, last = nouns.replace("_", " ").split(",")
    return f"{verb} {', '.join(others)}{' and ' if others else ''}{last}".lower()
