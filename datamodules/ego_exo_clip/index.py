"""The index of synchronised pairs: the records of a dataset that become one, and its format, writer and reader.

An index is a folder of three files; ``python -m datamodules.ego_exo_clip.build`` makes it, any program or person may::

    groups.jsonl   a line per recording, a "take": group_id, split, fps, num_frames and duration (seconds) of the
                   shortest stream, scenario, task, best_exo (a camera), frame_offset, and views:
                   {"ego": view, "exo": [view, ...]} with view = {path, cam, width, height};
                   paths are relative to the data root, sizes in pixels. Views of files that differ in rate or length
                   also have fps and duration (seconds) of their own
    clips.jsonl    a line per narration: clip_id, group_id, annotator, t (the narrated instant), start, end, text,
                   raw_text, subject, ego_visible, unsure, best_exo (a camera); seconds from the start of the take. An
                   empty text stands for video without narration
    index.json     schema_version, groups and clips (lines of the two files), without_text (clips without narration,
                   if there are any), synchronised (false if the views of a clip show the same action at different
                   times), and how they were made: source, options, alpha, funnel (the filters with counts), pairs,
                   sha256

Unknown values are null. ``frame_offset`` maps a camera to the frames by which its file lags: frame n of the take is
frame n + offset of the file; cameras it does not name lag by 0. It may be edited by hand.

``index.json`` is removed first and written last, so a folder that has it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from datamodules.io.annotations import SourceError
from datamodules.io.atomic import atomic_path
from datamodules.io.jsonl import read_jsonl
from datamodules.io.validate import Record, validate

SCHEMA_VERSION = 1
FILTERS_KEY = "funnel"
"""Member of ``index.json`` that holds the rows of ``FilterCounts``."""


@dataclass(frozen=True, slots=True)
class View:
    """One camera of a take: its name and its video, relative to the data root.

    Size in pixels, frames per second and length in seconds are None where they are not known; the last two are known
    only for takes whose files differ in them.
    """

    cam: str
    path: str
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One take: cameras that ran together, frame n of each showing the same instant.

    Attributes:
        group_id: unique in its dataset.
        egos: egocentric views, best first; the first whose video is usable is taken.
        exos: exocentric views, in the order they are numbered by.
        duration_s: seconds; narrations after it are left out.
        fps: frames per second of the videos.
        scenario, task: the activity, in general and in particular.
        best_exo: name of the camera with the best view.
        frame_offset: by how many frames a camera's file lags; see the index format.
        validated: the synchronisation of the cameras was checked.
        lag_s: for files that differ in rate, length or start: by how many seconds a camera's file lags, second t of
            the take is second t + lag of the file; 0 for cameras that are not named. None for files that show the same
            instant in their equal frames.
        begin_s: seconds at which the last of the files begins.
    """

    group_id: str
    egos: tuple[View, ...]
    exos: tuple[View, ...]
    duration_s: float
    fps: float
    scenario: str | None = None
    task: str | None = None
    best_exo: str | None = None
    frame_offset: Mapping[str, int] = field(default_factory=dict)
    validated: bool = True
    lag_s: Mapping[str, float] | None = None
    begin_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Narration:
    """One annotator's sentence about an instant, or about a span, of a take.

    Attributes:
        clip_id: unique in its dataset, and independent of any filter.
        annotator: narrations of one annotator and take together decide how long their clips are.
        time_s: the instant in seconds from the start of the take; the middle of a span.
        text: training text; empty for video without narration, None leaves the narration out.
        raw_text: annotated text.
        span_s: start and end where they were annotated; None cuts the clip by the EgoVLP rule.
        subject: the acting person, such as ``C`` for the wearer.
        ego_visible: the wearer's camera sees it.
        unsure: the annotator was unsure.
        best_exo: name of the camera with the best view of it.
    """

    clip_id: str
    annotator: str
    time_s: float
    text: str | None
    raw_text: str
    span_s: tuple[float, float] | None = None
    subject: str | None = None
    ego_visible: bool = True
    unsure: bool = False
    best_exo: str | None = None


@dataclass(frozen=True, slots=True)
class NarratedClip:
    """A narration and the seconds of its take that it is trained with."""

    narration: Narration
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Take:
    """A group with a single egocentric view, all of whose views are usable, and its clips in order of time."""

    group: Group
    clips: tuple[NarratedClip, ...]


class FilterCounts:
    """Numbers before and after each filter, in the order in which the filters were met."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}

    def keep(self, unit: str, criterion: str, kept: bool) -> bool:
        """Count one ``unit`` (such as "takes") that is kept if it meets the criterion; return ``kept``."""
        counts = self._counts.setdefault((unit, criterion), [0, 0])
        counts[0] += 1
        counts[1] += kept
        return kept

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each filter, those of one unit together: of, filter, in, out."""
        units = dict.fromkeys(unit for unit, _ in self._counts)
        return [
            {"of": unit, "filter": criterion, "in": before, "out": after}
            for unit in units
            for (of, criterion), (before, after) in self._counts.items()
            if of == unit
        ]


class PairSource(Protocol):
    """A dataset of synchronised pairs.

    To add one, write a dataclass like this in a file of your own, and name it ``module:Class`` for the command
    ``python -m datamodules.ego_exo_clip.build``. Its fields become options of the command; one of them is ``root``.

    A source whose views show the same action, but not at the same time, has an attribute ``synchronised = False``:
    stages then refuse losses that compare the views instant by instant. One whose takes have a ``lag_s`` has an
    attribute ``opens_videos = True``, since lags are counted in frames of the files.

    A source whose takes have other names than their group_id may have a method ``take_ids() -> Mapping[str, str]``: the
    group_id by each name, for the takes of all splits. Frame offsets may then go by any of these names.
    """

    @property
    def root(self) -> Path:
        """The data root that paths of views are relative to."""

    @property
    def split(self) -> str:
        """Part of the dataset, such as "train"; for the command a field, or an attribute of the class."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Description for ``index.json``: the dataset's name, the split and other choices, but no folders."""

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield every take of the split with its narrations, without opening a video.

        Count the takes that are left out: ``if not counts.keep("takes", "in the split", condition): continue``.

        Raises:
            SourceError: a file or a field is missing or wrong.
        """


def write_index(folder: Path, takes: Iterable[Take], split: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """Write an index; interrupted at any moment, it leaves a folder without ``index.json`` or a complete index.

    Args:
        folder: made if missing; other files in it are left alone.
        takes: in the order of the index.
        split: of all takes.
        header: further members of ``index.json``.

    Returns:
        The content of ``index.json``.

    Raises:
        SourceError: two takes have one group_id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    counts = {"groups": 0, "clips": 0, "pairs": 0}
    seen: set[str] = set()
    without_text = 0
    with _Output(folder / "groups.jsonl") as groups, _Output(folder / "clips.jsonl") as clips:
        for take in takes:
            if take.group.group_id in seen:
                raise SourceError(f"group_id {take.group.group_id!r} is given twice: name every take differently")
            seen.add(take.group.group_id)
            groups.write_line(_group_record(take.group, split))
            for clip in take.clips:
                clips.write_line(_clip_record(clip, take.group.group_id))
            counts["groups"] += 1
            counts["clips"] += len(take.clips)
            counts["pairs"] += len(take.clips) * len(take.group.exos)
            without_text += sum(not clip.narration.text for clip in take.clips)
    if without_text:
        counts["without_text"] = without_text
    whole = {"schema_version": SCHEMA_VERSION, **header, **counts}
    whole["sha256"] = {output.path.name: output.digest.hexdigest() for output in (groups, clips)}
    with _Output(folder / "index.json") as index:
        index.write(json.dumps(whole, indent=1) + "\n")
    return whole


def read_header(folder: Path) -> dict[str, Any]:
    """Return ``index.json`` of a complete index.

    Raises:
        ValueError: there is none, or it cannot be used; names the command that builds it.
    """
    file = folder / "index.json"
    build = "`make ego-exoclip EGOEXO4D=<release folder>` builds it, `make data` that of the generated world"
    if not file.is_file():
        raise ValueError(f"no index in {folder} (index.json is missing): {build}")
    try:
        header = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: invalid JSON ({error}): {build}") from None
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file}: schema_version is {version!r}, expected {SCHEMA_VERSION}: {build} again")
    return dict(header)


class Strings:
    """Many strings without an object for each: their bytes in one array, and the start of each.

    Counting references to a million objects would make every worker process copy them.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._bytes, self._starts = bytearray(), array("q", [0])
        for value in values:
            self.append(value)

    def append(self, value: str) -> None:
        """Add a string at the end."""
        self._bytes += value.encode()
        self._starts.append(len(self._bytes))

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        """Return a string by its number from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bytes(memoryview(self._bytes)[self._starts[index] : self._starts[index + 1]]).decode()

    def sizes(self) -> NDArray[np.int64]:
        """Return the length of every string in bytes, int64 [len]."""
        return np.diff(np.asarray(self._starts))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as numpy arrays, which worker processes find in shared memory; nothing can be appended there."""
        return {
            "_bytes": np.frombuffer(self._bytes, dtype=np.uint8),
            "_starts": np.frombuffer(self._starts, dtype=np.int64),
        }


@dataclass(frozen=True)
class PairIndex:
    """An index in memory: about 170 bytes a narration, all in a few arrays.

    Letters: ``G`` takes, ``V`` views, ``C`` narrated clips. Views are numbered through all takes, within a take the
    egocentric one first.

    Attributes:
        first_view: int64 [G + 1], views of take g are those from ``first_view[g]`` to ``first_view[g + 1]``.
        view_paths: [V], relative to the data root.
        view_offsets_s: float64 [V], seconds of the take at which the view's file begins.
        clip_ids, texts: [C].
        clip_groups: int32 [C], the take.
        start_s, end_s: float64 [C], inside every file of the take, offsets included.
        best_views: int32 [C], the narration's best exocentric view, else its take's, else the first.
    """

    first_view: NDArray[np.int64]
    view_paths: Strings
    view_offsets_s: NDArray[np.float64]
    clip_ids: Strings
    texts: Strings
    clip_groups: NDArray[np.int32]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    best_views: NDArray[np.int32]

    @classmethod
    def read(cls, folder: Path) -> PairIndex:
        """Read and check an index; clips that an offset moves out of a file are moved back in.

        Raises:
            ValueError: there is no complete index in the folder, or a line is wrong; names file, line and field.
        """
        # Columns grow in arrays: an object for each of a million clips would be copied by every worker process.
        header = read_header(folder)
        groups = _read_groups(folder / "groups.jsonl")
        clip_ids, texts = Strings(), Strings()
        clip_groups, best_views = array("i"), array("i")
        start_s, end_s = array("d"), array("d")
        for where, record in read_jsonl(folder / "clips.jsonl"):
            clip = validate(_CLIP_RECORD, record, where)
            if not clip.text and not header.get("without_text"):
                raise ValueError(
                    f"{where}: field 'text' is '', expected a text that is not empty: correct it, or count the clips "
                    "without narration in index.json as without_text"
                )
            if clip.group_id not in groups.numbers:
                raise ValueError(
                    f"{where}: field 'group_id' is {clip.group_id!r}, which groups.jsonl lacks: correct either file"
                )
            if not clip.start < clip.end:
                raise ValueError(f"{where}: start {clip.start} and end {clip.end}: expected start < end, in seconds")
            clip_ids.append(clip.clip_id)
            texts.append(clip.text)
            group = groups.numbers[clip.group_id]
            clip_groups.append(group)
            start_s.append(clip.start)
            end_s.append(clip.end)
            best_views.append(groups.best_view(group, clip.best_exo))
        # Files that were copied in part have fewer lines than the header counts.
        for name, count in (("groups", len(groups.numbers)), ("clips", len(clip_ids))):
            if header.get(name) != count:
                raise ValueError(
                    f"{folder / name}.jsonl: {count} lines, but index.json says {name}: {header.get(name)}: copy or "
                    "build the index again, or correct the number if you edited the file"
                )
        index = cls(
            first_view=np.array(groups.first_view),
            view_paths=groups.paths,
            view_offsets_s=np.array(groups.offsets_s),
            clip_ids=clip_ids,
            texts=texts,
            clip_groups=np.array(clip_groups, dtype=np.int32),
            start_s=np.array(start_s),
            end_s=np.array(end_s),
            best_views=np.array(best_views, dtype=np.int32),
        )
        index._move_inside(np.array(groups.durations_s), np.array(groups.ends_s), 1 / np.array(groups.fps))
        return index

    def __len__(self) -> int:
        """Return the number of narrated clips."""
        return len(self.clip_ids)

    def num_exos(self) -> NDArray[np.int64]:
        """Return the number of exocentric views of each clip's take, int64 [C]."""
        return (np.diff(self.first_view) - 1)[self.clip_groups]

    def _move_inside(
        self, durations_s: NDArray[np.float64], ends_s: NDArray[np.float64], frames_s: NDArray[np.float64]
    ) -> None:
        """Keep clips of takes with offsets inside all files, one frame at least.

        Args:
            durations_s: of takes.
            ends_s: seconds of takes at which the first of their files ends; NaN where files are as long as the take.
            frames_s: seconds of a frame of takes.
        """
        if not len(self) or not self.view_offsets_s.any():
            return
        # The seconds that all files of a take cover begin with the last file and end with the first.
        latest_s = np.maximum.reduceat(self.view_offsets_s, self.first_view[:-1])
        earliest_s = np.minimum.reduceat(self.view_offsets_s, self.first_view[:-1])
        of = self.clip_groups
        all_end_s = np.where(np.isnan(ends_s), durations_s + np.minimum(earliest_s, 0), ends_s)
        low, high, frame_s = np.maximum(latest_s, 0)[of], all_end_s[of], frames_s[of]
        moved = (latest_s != 0)[of] | (earliest_s != 0)[of]
        start_s = np.clip(self.start_s, low, high - frame_s)
        np.copyto(self.start_s, start_s, where=moved)
        np.copyto(self.end_s, np.clip(self.end_s, start_s + frame_s, high), where=moved)


_Text = Annotated[str, Field(min_length=1)]
_Positive = Annotated[float, Field(gt=0)]


class _ViewRecord(Record):
    cam: _Text
    path: _Text
    fps: _Positive | None = None
    duration: _Positive | None = None


class _ViewsRecord(Record):
    ego: _ViewRecord
    exo: Annotated[list[_ViewRecord], Field(min_length=1)]


class GroupRecord(Record):
    """A line of ``groups.jsonl``: the fields that are read."""

    group_id: _Text
    fps: _Positive
    duration: _Positive
    num_frames: int | None = None
    views: _ViewsRecord
    best_exo: str | None = None
    frame_offset: dict[str, int] | None = None


class _ClipRecord(Record):
    """A line of ``clips.jsonl``: the fields that are read."""

    clip_id: _Text
    group_id: str
    start: Annotated[float, Field(ge=0)]
    end: float
    text: str
    best_exo: str | None = None


GROUP_RECORD, _CLIP_RECORD = TypeAdapter(GroupRecord), TypeAdapter(_ClipRecord)


@dataclass(frozen=True)
class _Groups:
    """Columns of ``groups.jsonl`` while it is read."""

    numbers: dict[str, int] = field(default_factory=dict)
    first_view: array[int] = field(default_factory=lambda: array("q", [0]))
    paths: Strings = field(default_factory=Strings)
    offsets_s: array[float] = field(default_factory=lambda: array("d"))
    durations_s: array[float] = field(default_factory=lambda: array("d"))
    ends_s: array[float] = field(default_factory=lambda: array("d"))
    fps: array[float] = field(default_factory=lambda: array("d"))
    exo_views: list[dict[str, int]] = field(default_factory=list)  # camera to number of the view
    best: list[str | None] = field(default_factory=list)

    def best_view(self, group: int, camera: str | None) -> int:
        views = self.exo_views[group]
        for name in (camera, self.best[group]):
            if name in views:
                return views[name]
        return next(iter(views.values()))


def _read_groups(file: Path) -> _Groups:
    groups = _Groups()
    for where, record in read_jsonl(file):
        group = validate(GROUP_RECORD, record, where)
        if groups.numbers.setdefault(group.group_id, len(groups.numbers)) != len(groups.fps):
            raise ValueError(
                f"{where}: field 'group_id' is {group.group_id!r} a second time: name every take differently"
            )
        # Number the views through all takes, within a take the egocentric one first.
        numbers: dict[str, int] = {}
        for view in (group.views.ego, *group.views.exo):
            numbers[view.cam] = len(groups.paths)
            groups.paths.append(view.path)
        if len(numbers) != 1 + len(group.views.exo):
            raise ValueError(f"{where}: field 'views' names a cam twice: name every camera of a take differently")
        offsets = group.frame_offset or {}
        unknown = sorted(set(offsets) - set(numbers))
        if unknown:
            raise ValueError(f"{where}: field 'frame_offset' names {', '.join(unknown)}, allowed: {', '.join(numbers)}")
        begins_s = [-offsets.get(camera, 0) / group.fps for camera in numbers]
        end_s = _first_end_s(group, begins_s)
        all_end_s = group.duration + min(0, *begins_s) if math.isnan(end_s) else end_s
        if (all_end_s - max(0, *begins_s)) * group.fps < 1 - 1e-6:
            raise ValueError(f"{where}: field 'frame_offset' leaves no frame of the take: correct it")
        groups.offsets_s.extend(begins_s)
        groups.ends_s.append(end_s)
        groups.first_view.append(len(groups.paths))
        groups.durations_s.append(group.duration)
        groups.fps.append(group.fps)
        del numbers[group.views.ego.cam]
        groups.exo_views.append(numbers)
        groups.best.append(group.best_exo)
    return groups


def _first_end_s(group: GroupRecord, begins_s: list[float]) -> float:
    """Return the second of a take at which the first of its files ends, NaN if the files have no lengths of their own.

    Args:
        group: the take.
        begins_s: seconds of the take at which its files begin, the egocentric one first.
    """
    lengths_s = [view.duration for view in (group.views.ego, *group.views.exo)]
    ends_s = [begin_s + length_s for begin_s, length_s in zip(begins_s, lengths_s, strict=True) if length_s is not None]
    return min(ends_s) if len(ends_s) == len(lengths_s) else math.nan


def _group_record(group: Group, split: str) -> dict[str, Any]:
    ego, exos = _view_record(group.egos[0]), [_view_record(view) for view in group.exos]
    return {
        "group_id": group.group_id,
        "split": split,
        "fps": group.fps,
        "num_frames": round(group.duration_s * group.fps),
        "duration": group.duration_s,
        "scenario": group.scenario,
        "task": group.task,
        "best_exo": group.best_exo,
        "frame_offset": dict(group.frame_offset),
        "views": {"ego": ego, "exo": exos},
    }


def _view_record(view: View) -> dict[str, Any]:
    record: dict[str, Any] = {"cam": view.cam, "path": view.path, "width": view.width, "height": view.height}
    if view.duration_s is not None:
        record |= {"fps": view.fps, "duration": view.duration_s}
    return record


def _clip_record(clip: NarratedClip, group_id: str) -> dict[str, Any]:
    narration = clip.narration
    return {
        "clip_id": narration.clip_id,
        "group_id": group_id,
        "annotator": narration.annotator,
        "t": narration.time_s,
        "start": clip.start_s,
        "end": clip.end_s,
        "text": narration.text,
        "raw_text": narration.raw_text,
        "subject": narration.subject,
        "ego_visible": narration.ego_visible,
        "unsure": narration.unsure,
        "best_exo": narration.best_exo,
    }


class _Output:
    """File that takes its name once it is complete and on disk, and computes its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, hashlib.sha256()

    def __enter__(self) -> _Output:
        self._atomic = atomic_path(self.path)
        self._file = self._atomic.__enter__().open("wb")
        return self

    def write_line(self, record: Mapping[str, Any]) -> None:
        self.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write(self, text: str) -> None:
        data = text.encode()
        self.digest.update(data)
        self._file.write(data)

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._atomic.__exit__(*error)
