"""Read an Ego-Exo4D release folder: takes of synchronised ego and exo cameras, and their narrations.

The clips of these narrations are the Ego-ExoClip data of Exo2Ego (arXiv 2503.09143). The folder is the one ``egoexo``
downloads (release V2, docs.ego-exo4d-data.org), or any with the same layout: ``takes.json``, ``annotations/`` and
``takes/<take_name>/``.
Times are seconds from the start of a take; one frame index is one instant in every camera of that take.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, option

FPS = 30.0
"""Frame rate of Ego-Exo4D's frame-aligned videos; a take whose record has a ``fps`` field uses that."""
_NO_SCENARIO = (0.0, 3000.0)
"""Parent tasks "Unknown" and "Campsite", in the release's table of labels but not among its eight scenarios."""


@dataclass
class EgoExo4D:
    """A ``PairSource`` of an Ego-Exo4D release: one split's takes, narrated by its atomic descriptions.

    ``clip_id`` is ``<take_uid>/<annotation index>/<description index>``: the narration's place in the annotation file.
    A flag that the file leaves out reads as visible and sure, and a take without ``validated`` as not validated.

    Args:
        root: the release folder, which holds ``takes.json``.
        split: takes of this split in ``annotations/splits.json``; without that file, those that
            ``annotations/atomic_descriptions_<split>.json`` names.
        resolution: videos of ``frame_aligned_videos/downscaled/<resolution>``; None or ``full`` for full-size ones.
    """

    root: Path
    split: Literal["train", "val"] = option("train", "takes of this split", ("train", "val"))
    resolution: str | None = option("448", "downscaled videos to use, or 'full'")

    def __post_init__(self) -> None:
        """Read the resolution ``full`` of the command line as None."""
        self.root = Path(self.root)
        if self.resolution == "full":
            self.resolution = None

    @property
    def description(self) -> dict[str, str | None]:
        """Description for ``index.json``."""
        return {"name": "Ego-Exo4D", "split": self.split, "resolution": self.resolution}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield the annotated takes of the split, in the order of ``takes.json``.

        Raises:
            SourceError: a file or field is missing or wrong.
        """
        root = self.root
        if not root.is_dir():
            raise SourceError(
                f"{root}: no such folder; give the Ego-Exo4D release folder, the one that holds takes.json"
            )
        records = self._records()
        download = f"egoexo -o {root} --parts annotations"
        file = root / "annotations" / f"atomic_descriptions_{self.split}.json"
        annotated = dict(_Json.load(file, download).at("annotations").members())
        members = set(annotated)
        splits_file = root / "annotations" / "splits.json"
        if splits_file.exists():
            listed = _Json.load(splits_file, download).at("split_to_take_uids").at(self.split)
            members = {uid.text() for uid in listed.elements()}
        for take_uid in annotated:
            counts.keep("annotated takes", "listed in takes.json", take_uid in records)
        captures = _Captures(root / "captures.json", f"egoexo -o {root} --parts metadata")
        for take_uid, record in records.items():
            parent = record.get("parent_task_id")
            if (
                counts.keep("takes", f"in split {self.split}", take_uid in members)
                and counts.keep("takes", "of a scenario", parent is None or parent.number() not in _NO_SCENARIO)
                and counts.keep("takes", "annotated", take_uid in annotated)
            ):
                yield (
                    self._group(take_uid, record, captures),
                    list(_narrations(take_uid, annotated[take_uid], counts)),
                )

    def take_ids(self) -> dict[str, str]:
        """Return the take_uid by take_uid and by take_name, for the takes of all splits."""
        records = self._records()
        ids: dict[str, str] = {}
        for take_uid, record in records.items():
            name = record.get("take_name")
            if name is not None and ids.setdefault(name.text(), take_uid) != take_uid:
                raise name.wrong("a name used once in the file")
        return ids | {take_uid: take_uid for take_uid in records}

    def _records(self) -> dict[str, _Json]:
        """Return the records of ``takes.json`` by take_uid."""
        records: dict[str, _Json] = {}
        for record in _Json.load(self.root / "takes.json", f"egoexo -o {self.root} --parts metadata").elements():
            identifier = record.at("take_uid")
            if records.setdefault(identifier.text(), record) is not record:
                raise identifier.wrong("an identifier used once in the file")
        return records

    def _group(self, take_uid: str, record: _Json, captures: _Captures) -> Group:
        folder = PurePosixPath(record.at("root_dir").text()) / "frame_aligned_videos"
        if self.resolution is not None:
            folder = folder / "downscaled" / self.resolution
        egos, exos = _listed_views(record, folder, captures.cameras(record))
        fps, best_exo = record.get("fps"), record.get("best_exo")
        scenario, task = record.get("parent_task_name"), record.get("task_name")
        return Group(
            group_id=take_uid,
            egos=tuple(egos),
            exos=tuple(exos),
            duration_s=record.at("duration_sec").positive(),
            fps=fps.positive() if fps else FPS,
            scenario=scenario.text() if scenario else None,
            task=task.text() if task else None,
            best_exo=best_exo.name() if best_exo else None,
            validated=_flag(record, "validated", default=False),
        )


_TAG = re.compile(r"#[CO](?=\s|$)", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_LETTER_C = re.compile(r"(?<![\w'\u2019#-])(?<!\b[A-Z]\.)C(?![\w#+-])")
_THINGS = (
    "major|minor|chord|note|string|sharp|flat|clamp|scale|key|button|cable|connector|port|charger|battery|batteries|"
    "cell|washer|bracket|shaped?"
)
_IS_THING = re.compile(rf"\s+(?i:{_THINGS})(?![\w'\u2019-])")
_ARE_THINGS = re.compile(rf"\s+(?i:{_THINGS})s?(?![\w'\u2019-])")
_DETERMINER = re.compile(
    r"\b(?:an?|the|this|these|those|another|each|every|his|her|its|their|your|my|our|no|some|any|which|whose|middle|"
    r"letters?|usb|type|vitamin|hepatitis|(?:key|chord|note|scale|letter)s? of|deg(?:rees?)?)\s+$|[\u00b0\u00ba]\s*$",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?:\d|\b(?:two|three|four|five|six|several|few))\s*$", re.IGNORECASE)
_LABELLED = re.compile(
    r"\b(?:(?:answer|block|box|button|camera|card|chord|choice|class|column|door|drawer|exercise|figure|grade|group|key|"
    r"level|line|model|note|number|option|page|paragraph|part|piece|plan|plate|point|position|row|room|section|shelf|"
    r"size|slot|step|switch|task|team|tile|tray|tube|version|zone)s?|labell?ed|marked|named|called)\s+$",
    re.IGNORECASE,
)
_VERB = re.compile(r"\s+(?!(?:as|is|was|across|towards|upwards|downwards)\b)[a-z]+s\b")
_BETWEEN = r"\s*(?:,\s*(?:and|or)\b|,|/|&|\band\b|\bor\b|\bto\b)\s*"
_LETTERS_BEFORE = re.compile(rf"(?:\b[A-Z]{_BETWEEN})+$")
_LETTER_AFTER = re.compile(rf"{_BETWEEN}D\b")
_SENTENCE_START = re.compile(r"(?:^|[.!?]\s+)[\"“(]*$")


def camera_wearer_text(raw: str) -> str | None:
    """Return a narration as training text: the letter C spelled out as the camera-wearer, as in Exo2Ego's examples.

    Ego4D's ``#C`` and ``#O`` tags go, spaces collapse and one period ends the text. C stays where it names a thing, see
    ``_names_thing``. Letters of other people stay, as does the case of the rest.

    Returns:
        The text, or None for a narration to leave out: marked ``#unsure``, or of fewer than three words.
    """
    if "#unsure" in raw.lower():
        return None
    text = " ".join(_TAG.sub(" ", raw).split()).rstrip(" .!?,;:")
    if len(_WORD.findall(text)) < 3:
        return None
    return spell_out_wearer(text) + "."


def spell_out_wearer(text: str) -> str:
    """Return a text with the letter C spelled out as the camera-wearer, except where it names a thing."""

    def spelled_out(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        if _names_thing(before, after):
            return "C"
        return "Camera-wearer" if _SENTENCE_START.search(before) else "the camera-wearer"

    return _LETTER_C.sub(spelled_out, text)


def _names_thing(before: str, after: str) -> bool:
    """Return True if the letter C between two texts stands for a thing, and not for the camera-wearer.

    It does after an article or another determiner, a degree sign or a number ("the C line", "200 °C"); after a word
    that letters label ("USB C", "drawer C"); before a thing that is named by it ("C major", "C cable"); in quotation
    marks or brackets of its own; and in a list with the letter before or after it ("A, B and C"). A verb after it
    makes it a person again ("the key C holds"), and so does a list that begins a sentence ("B and C carry the table").
    """
    if _DETERMINER.search(before) or _IS_THING.match(after):
        return True
    if before[-1:] + after[:1] in ('""', "\u201c\u201d", "''", "\u2018\u2019", "()", "[]"):
        return True
    is_subject = _VERB.match(after) is not None
    if _NUMBER.search(before):
        return not is_subject or _ARE_THINGS.match(after) is not None
    letters = _LETTERS_BEFORE.search(before)
    listed_after = before if letters is None else before[: letters.start()]
    if _SENTENCE_START.search(listed_after) or (is_subject and (letters is None or letters[0].rstrip().endswith(","))):
        return False
    if _DETERMINER.search(listed_after) or _LABELLED.search(listed_after):
        return True
    return (letters is not None and "B" in letters[0]) or _LETTER_AFTER.match(after) is not None


def is_ego_camera(cam_id: str, ego_flags: Mapping[str, bool]) -> bool:
    """Return True if a camera is worn, by the capture's camera list, or else if its name is that of an Aria.

    The list goes first because some ``camXX`` are head-mounted GoPros and not every wearer's camera is ``aria01``.
    """
    return ego_flags.get(cam_id, cam_id.lower().startswith("aria"))


class _Json:
    """A JSON value that knows its file and its path in it, for error messages."""

    __slots__ = ("_file", "_key", "_parent", "_value")

    def __init__(self, value: object, file: Path, parent: _Json | None = None, key: str = "") -> None:
        self._value, self._file, self._parent, self._key = value, file, parent, key

    @classmethod
    def load(cls, file: Path, download: str) -> _Json:
        """Parse a file; ``download`` is the command that fetches it when it is missing or damaged."""
        if not file.is_file():
            raise SourceError(f"{file}: no such file; fetch it with `{download}`, or correct the release folder")
        try:
            return cls(json.loads(file.read_bytes()), file)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        except UnicodeDecodeError as error:
            where = f"not UTF-8 text at byte {error.start}"
        raise SourceError(f"{file}: invalid JSON, {where}; correct it there, or fetch it again with `{download}`")

    @property
    def path(self) -> str:
        above = self._parent.path if self._parent else ""
        return above + self._key if above else self._key.removeprefix(".")

    def at(self, name: str) -> _Json:
        found = self.get(name)
        if found is None:
            path = f"{self.path}.{name}".removeprefix(".")
            fix = f"add it, or fetch a V2 {self._file.name}"
            raise SourceError(f"{self._file}: field {path} is missing or null; {fix}")
        return found

    def get(self, *names: str) -> _Json | None:
        """The first of these members that is present and not null."""
        members = self._members()
        for name in names:
            if members.get(name) is not None:
                return _Json(members[name], self._file, self, f".{name}")
        return None

    def _members(self) -> dict[str, object]:
        if not isinstance(self._value, dict):
            raise self.wrong("an object")
        return self._value

    def members(self) -> Iterator[tuple[str, _Json]]:
        """Names and values, without nulls."""
        for name in self._members():
            child = self.get(name)
            if child is not None:
                yield name, child

    def elements(self) -> list[_Json]:
        if not isinstance(self._value, list):
            raise self.wrong("a list")
        return [_Json(value, self._file, self, f"[{index}]") for index, value in enumerate(self._value)]

    def text(self) -> str:
        if not isinstance(self._value, str):
            raise self.wrong("a string")
        return self._value

    def name(self) -> str | None:
        """A camera, written as a string or as an object with a ``cam_id``."""
        if isinstance(self._value, dict):
            cam_id = self.get("cam_id")
            return cam_id.text() if cam_id else None
        return self.text()

    def label(self) -> str:
        """A name written as a string or as a whole number."""
        if isinstance(self._value, int) and not isinstance(self._value, bool):
            return str(self._value)
        return self.text()

    def number(self) -> float:
        value = self._value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong("a finite number")
        return float(value)

    def positive(self) -> float:
        if self.number() <= 0:
            raise self.wrong("a number above 0")
        return self.number()

    def flag(self) -> bool:
        """A boolean, which the release also writes as "0" and "1"."""
        flags: dict[object, bool] = {False: False, "0": False, "false": False, True: True, "1": True, "true": True}
        key = self._value.lower() if isinstance(self._value, str) else self._value
        if not isinstance(key, str | int) or key not in flags:
            raise self.wrong('true, false, "0" or "1"')
        return flags[key]

    def wrong(self, expected: str) -> SourceError:
        shown = repr(self._value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        where = f"field {self.path}" if self.path else "the top level"
        fix = f"correct it, or fetch a V2 {self._file.name}"
        return SourceError(f"{self._file}: {where} is {shown}, expected {expected}; {fix}")


class _Captures:
    """Camera lists of ``captures.json``, read when a take does not carry its own."""

    def __init__(self, file: Path, download: str) -> None:
        self._file, self._download = file, download
        self._by_uid: dict[str, _Json] | None = None

    def cameras(self, record: _Json) -> dict[str, bool]:
        """Return True or False for each camera of the take's capture that is known to be worn or not."""
        capture = record.get("capture")
        cameras = capture.get("cameras") if capture else None
        if cameras is None:
            uid = record.get("capture_uid")
            capture = self._listed().get(uid.text()) if uid else None
            cameras = capture.get("cameras") if capture else None
        flags: dict[str, bool] = {}
        for camera in cameras.elements() if cameras else ():
            is_ego = camera.get("is_ego")
            if is_ego is not None:
                flags[camera.at("cam_id").text()] = is_ego.flag()
        return flags

    def _listed(self) -> dict[str, _Json]:
        if self._by_uid is None:
            captures = _Json.load(self._file, self._download).elements() if self._file.is_file() else []
            self._by_uid = {capture.at("capture_uid").text(): capture for capture in captures}
        return self._by_uid


def _narrations(take_uid: str, annotations: _Json, counts: FilterCounts) -> Iterator[Narration]:
    annotators: set[str] = set()
    for index, annotation in enumerate(annotations.elements()):
        if not counts.keep("annotations", "not rejected", not _flag(annotation, "rejected", default=False)):
            continue
        identifier = annotation.get("annotator_id")
        annotator = identifier.label() if identifier else str(index)
        if annotator in annotators:  # described the take a second time, which is not one list twice as dense
            annotator = f"{annotator}/{index}"
        annotators.add(annotator)
        for position, description in enumerate(annotation.at("descriptions").elements()):
            subject, best_exo = description.get("subject", "narration_subject"), description.get("best_exo")
            raw_text = description.at("text").text()
            yield Narration(
                clip_id=f"{take_uid}/{index}/{position}",
                annotator=annotator,
                time_s=description.at("timestamp").number(),
                text=camera_wearer_text(raw_text),
                raw_text=raw_text,
                subject=subject.text() if subject else None,
                ego_visible=_flag(description, "ego_visible", default=True),
                unsure=_flag(description, "unsure", default=False),
                best_exo=best_exo.name() if best_exo else None,
            )


def _flag(record: _Json, name: str, *, default: bool) -> bool:
    value = record.get(name)
    return default if value is None else value.flag()


def _listed_views(record: _Json, folder: PurePosixPath, ego_flags: Mapping[str, bool]) -> tuple[list[View], list[View]]:
    """Ego RGB and exo cameras a record lists, by name; the walk-around GoPro, spelled two ways, is neither."""
    egos: list[View] = []
    exos: list[View] = []
    for cam_id, streams in sorted(record.at("frame_aligned_videos").members(), key=lambda item: item[0]):
        if cam_id in ("collage", "best_exo") or cam_id.lower().startswith(("mobile", "moblie")):
            continue
        worn = is_ego_camera(cam_id, ego_flags)
        files = {name: path for name, stream in streams.members() if (path := stream.get("relative_path"))}
        file = files.get("rgb") if worn else next(iter(files.values()), None)
        if file is not None:
            view = View(cam_id, str(folder / PurePosixPath(file.text()).name))
            (egos if worn else exos).append(view)
    return egos, exos
