"""An Ego-Exo4D release folder, read into narrated clips that ego and exo cameras saw at the same time.

These clips are the Ego-ExoClip data of Exo2Ego (arXiv 2503.09143). The folder is the one ``egoexo`` downloads (release
V2, docs.ego-exo4d-data.org), or any with the same layout: ``takes.json``, ``annotations/`` and ``takes/<take_name>/``.
Times are seconds from the start of a take; one frame index is one instant in every camera of that take.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

FPS = 30.0
"""Frame rate of Ego-Exo4D's frame-aligned videos; a take whose record has a ``fps`` field uses that."""

_FUNNEL = (
    "takes_listed",
    "takes_in_split",
    "takes_narrated",
    "takes_with_ego",
    "takes_with_exo",
    "takes",
    "exo_views_listed",
    "exo_views",
    "annotated_takes_listed",
    "annotated_takes",
    "annotations_listed",
    "annotations",
    "narrations_listed",
    "narrations_distinct",
    "narrations_in_take",
    "narrations_with_video",
    "narrations_in_video",
    "narrations_with_text",
    "narrations_of_subjects",
    "narrations_ego_visible",
    "clips",
)


class ReleaseError(ValueError):
    """A release folder that cannot be read; one line that names the file, the field and what to do."""


@dataclass(frozen=True, slots=True)
class View:
    """One camera of a take: its name in the annotations (``cam02``) and its video, relative to the release folder."""

    cam_id: str
    path: str


@dataclass(frozen=True, slots=True)
class Take:
    """One recording: the wearer's RGB camera and at least one exo camera, frame-aligned.

    ``duration_s`` is that of the shortest stream where frames were counted, else the record's ``duration_sec``;
    ``exos`` is sorted by camera name; ``best_exo`` is the camera name the record gives, which may not be among them.
    """

    take_uid: str
    take_name: str
    ego: View
    exos: tuple[View, ...]
    duration_s: float
    fps: float
    best_exo: str | None


@dataclass(frozen=True, slots=True)
class NarratedClip:
    """One narration and the seconds of its take it describes.

    ``clip_id`` is ``<take_uid>/<annotation index>/<description index>``: its place in the annotation file, so filters
    do not change it. ``take_index`` points into ``Release.takes``. ``time_s`` is the annotated instant, ``start_s`` and
    ``end_s`` bound the clip around it. ``raw_text`` is as annotated and ``text`` as ``camera_wearer_text`` rewrote it.
    A flag that the file leaves out reads as visible and sure.
    """

    clip_id: str
    take_index: int
    take_uid: str
    start_s: float
    end_s: float
    time_s: float
    text: str
    raw_text: str
    subject: str | None
    ego_visible: bool
    unsure: bool
    best_exo: str | None


@dataclass(frozen=True)
class Release:
    """What ``read_release`` found: the takes that have a clip, their clips in take and time order, and the counts.

    ``alpha`` is the mean narration gap in seconds that was used (pass it on to read the validation split). In
    ``funnel``, names with the same first word count what is left after each filter, in order.
    """

    takes: tuple[Take, ...]
    clips: tuple[NarratedClip, ...]
    alpha: float
    funnel: dict[str, int]


def read_release(
    root: Path | str,
    split: Literal["train", "val"],
    alpha: float | None = None,
    num_frames: Callable[[Path], int] | None = None,
    *,
    resolution: str | None = "448",
    clip_scale: float = 1.0,
    min_clip_s: float = 0.0,
    max_clip_s: float | None = None,
    require_ego_visible: bool = False,
    drop_unsure: bool = False,
    subjects: Collection[str] | None = None,
) -> Release:
    """Read one split of a release into synchronised, narrated clips.

    Clip lengths depend on the annotations alone: neither the filters below nor which videos are on disk change a gap or
    alpha, so a partial download gives the same clips as a full one.

    Args:
        root: the release folder, which holds ``takes.json``.
        split: takes of this split in ``annotations/splits.json``; without that file, those that
            ``annotations/atomic_descriptions_<split>.json`` names.
        alpha: mean narration gap in seconds that clip lengths are relative to. Left out, it is fitted on this split,
            which must then be "train"; "val" takes the training split's ``Release.alpha``.
        num_frames: counts the frames of a video file. Given, a take lasts as long as its shortest stream and a file
            without frames counts as missing; left out, ``duration_sec`` is trusted and files need only exist.
        resolution: read ``frame_aligned_videos/downscaled/<resolution>``; None reads the full-size videos.
        clip_scale: factor on every clip length (see ``clip_span``, like the next two).
        min_clip_s: shortest clip, seconds.
        max_clip_s: longest clip, seconds; None for no limit.
        require_ego_visible: keep only narrations marked as visible to the wearer's camera.
        drop_unsure: leave out narrations whose annotator doubted the object's name.
        subjects: keep only these subjects, such as ``{"C"}`` for the wearer; None keeps all.

    Raises:
        ReleaseError: a file or field is missing or wrong, or no clip is left.
        ValueError: an option is out of range.
    """
    if alpha is None and split != "train":
        raise ValueError(f"alpha is fitted on 'train' alone: for {split!r} pass read_release(root, 'train').alpha")
    if isinstance(subjects, str):
        raise ValueError(f"subjects={subjects!r} is one string, expected a collection such as {{{subjects!r}}}")
    root = Path(root)
    if not root.is_dir():
        raise ReleaseError(f"{root}: no such folder; give the Ego-Exo4D release folder, the one that holds takes.json")
    funnel = dict.fromkeys(_FUNNEL, 0)
    records, tracks = _read_split(root, split, funnel)
    if not tracks:
        raise _nothing_left(root, split, resolution, funnel)
    if alpha is None:
        alpha = fit_alpha(track.times_s for of_take in tracks.values() for track in of_take)

    takes: list[Take] = []
    clips: list[NarratedClip] = []
    for take_uid, of_take in tracks.items():
        take = _read_take(records[take_uid], root, resolution, num_frames, funnel)
        if take is None:
            continue
        before = len(clips)
        for track in of_take:
            gap_s = mean_gap_s(track.times_s)
            for narration in track.narrations:
                funnel["narrations_with_video"] += 1
                if narration.time_s > take.duration_s:
                    continue
                funnel["narrations_in_video"] += 1
                text = camera_wearer_text(narration.raw_text)
                if text is None:
                    continue
                funnel["narrations_with_text"] += 1
                if subjects is not None and narration.subject not in subjects:
                    continue
                funnel["narrations_of_subjects"] += 1
                if require_ego_visible and not narration.ego_visible:
                    continue
                funnel["narrations_ego_visible"] += 1
                if drop_unsure and narration.unsure:
                    continue
                start_s, end_s = clip_span(
                    narration.time_s,
                    gap_s,
                    alpha,
                    take.duration_s,
                    fps=take.fps,
                    clip_scale=clip_scale,
                    min_clip_s=min_clip_s,
                    max_clip_s=max_clip_s,
                )
                clips.append(
                    NarratedClip(
                        clip_id=f"{take_uid}/{track.index}/{narration.index}",
                        take_index=len(takes),
                        take_uid=take_uid,
                        start_s=start_s,
                        end_s=end_s,
                        time_s=narration.time_s,
                        text=text,
                        raw_text=narration.raw_text,
                        subject=narration.subject,
                        ego_visible=narration.ego_visible,
                        unsure=narration.unsure,
                        best_exo=narration.best_exo,
                    )
                )
        if len(clips) > before:
            takes.append(take)
            clips[before:] = sorted(clips[before:], key=lambda clip: clip.time_s)
    funnel["takes"], funnel["clips"] = len(takes), len(clips)
    if not clips:
        raise _nothing_left(root, split, resolution, funnel)
    return Release(tuple(takes), tuple(clips), alpha, funnel)


def exo_views(
    take: Take,
    clip: NarratedClip,
    policy: Literal["all", "best", "random"],
    rng: np.random.Generator | None = None,
) -> tuple[View, ...]:
    """The exo cameras to pair with a clip's ego camera.

    Args:
        take: the clip's take, ``release.takes[clip.take_index]``.
        clip: the narrated clip.
        policy: "all" cameras, one pair each (the paper's 1.1 M pairs count so); "best", the narration's best exo
            camera, else the take's, else the first, skipping those without a video; "random", one drawn from ``rng``.
        rng: needed by "random".
    """
    if policy == "all":
        return take.exos
    if policy == "best":
        by_name = {view.cam_id: view for view in take.exos}
        return (by_name.get(clip.best_exo or "") or by_name.get(take.best_exo or "") or take.exos[0],)
    if policy != "random":
        raise ValueError(f"exo policy {policy!r}: expected 'all', 'best' or 'random'")
    if rng is None:
        raise ValueError("exo policy 'random' needs rng, a numpy.random.Generator")
    return (take.exos[int(rng.integers(len(take.exos)))],)


def mean_gap_s(times_s: Sequence[float]) -> float | None:
    """Mean seconds between one annotator's narrations of one take, in any order (EgoVLP, arXiv 2206.01670: beta).

    None where it is undefined: fewer than two narrations, or all at one time.
    """
    if len(times_s) < 2 or min(times_s) == max(times_s):
        return None
    return (max(times_s) - min(times_s)) / (len(times_s) - 1)


def fit_alpha(tracks: Iterable[Sequence[float]]) -> float:
    """Mean over tracks of their mean gap, in seconds (EgoVLP, arXiv 2206.01670: alpha); fit it on training takes.

    Args:
        tracks: narration times in seconds, one sequence per annotator and take. Two annotators of a take stay apart:
            merging them would halve the gap of that take alone. Tracks without a gap are left out.

    Raises:
        ReleaseError: no track has a gap.
    """
    gaps = [gap for track in tracks if (gap := mean_gap_s(track)) is not None]
    if not gaps:
        raise ReleaseError(
            "annotations: no annotator of a take has two different timestamps, so alpha cannot be fitted; pass alpha"
        )
    return math.fsum(gaps) / len(gaps)


def clip_span(
    time_s: float,
    gap_s: float | None,
    alpha: float,
    duration_s: float,
    *,
    fps: float = FPS,
    clip_scale: float = 1.0,
    min_clip_s: float = 0.0,
    max_clip_s: float | None = None,
) -> tuple[float, float]:
    """Start and end in seconds of the clip around one narration (EgoVLP, arXiv 2206.01670).

    The clip is ``beta / alpha`` seconds long, centred on the narration: about a second on average, shorter where an
    annotator wrote densely. It is then cut to the take; where less than ``min_clip_s`` or one frame is left, it is
    widened to that, staying inside the take.

    Args:
        time_s: the narration's time, within [0, duration_s].
        gap_s: its annotator's ``mean_gap_s`` (beta); None stands for alpha, a one-second clip.
        alpha: ``fit_alpha`` of the training split, seconds, above 0.
        duration_s: the take's length.
        fps: the take's frame rate.
        clip_scale: factor on the length, above 0. Annotators only had to be within 1 to 2 s of the action, so a longer
            clip can be worth having.
        min_clip_s: shortest clip, holds at the take's ends too.
        max_clip_s: longest clip, None for no limit.
    """
    if not 0 <= time_s <= duration_s:
        raise ValueError(f"time_s={time_s} is outside the take, [0, {duration_s}] s")
    if not 0 < alpha < math.inf or not 0 < clip_scale < math.inf:
        raise ValueError(f"alpha={alpha} and clip_scale={clip_scale}: both must be above 0 and finite")
    shortest_s = max(min_clip_s, 1 / fps)
    if max_clip_s is not None and max_clip_s < shortest_s:
        raise ValueError(f"max_clip_s={max_clip_s} is below the shortest clip, {shortest_s:.4g} s: raise it")
    length_s = clip_scale * (1.0 if gap_s is None else gap_s / alpha)
    if max_clip_s is not None:
        length_s = min(length_s, max_clip_s)
    start_s, end_s = max(0.0, time_s - length_s / 2), min(duration_s, time_s + length_s / 2)
    if end_s - start_s < shortest_s:
        start_s = max(0.0, min(time_s - shortest_s / 2, duration_s - shortest_s))
        end_s = min(duration_s, start_s + shortest_s)
    return start_s, end_s


_TAG = re.compile(r"#[CO](?=\s|$)", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_WEARER = re.compile(
    r"(?<![\w'\u2019#-])C(?![\w#-])"
    r"(?!\s+(?i:major|minor|chord|note|string|sharp|flat|clamp|scale)(?![\w'\u2019-]))"
)
_SENTENCE_START = re.compile(r"(?:^|[.!?]\s+)[\"“(]*$")


def camera_wearer_text(raw: str) -> str | None:
    """A narration as training text: the letter C spelled out as the camera-wearer (the form Exo2Ego's examples show).

    Ego4D's ``#C`` and ``#O`` tags go, spaces collapse and one period ends the text. C stays where it names a tone or a
    tool: before exactly major, minor, chord, note, string, sharp, flat, clamp or scale, in ``C#``, or next to a hyphen.
    Letters of other people stay, as does the case of the rest.

    Returns:
        The text, or None for a narration to leave out: marked ``#unsure``, or of fewer than three words.
    """
    if "#unsure" in raw.lower():
        return None
    text = " ".join(_TAG.sub(" ", raw).split()).rstrip(" .!?,;:")
    if len(_WORD.findall(text)) < 3:
        return None

    def spelled_out(match: re.Match[str]) -> str:
        return "Camera-wearer" if _SENTENCE_START.search(text[: match.start()]) else "the camera-wearer"

    return _WEARER.sub(spelled_out, text) + "."


def is_ego_camera(cam_id: str, ego_flags: Mapping[str, bool]) -> bool:
    """Whether a camera is worn: what the capture's camera list says, or for a camera it lacks, an Aria by its name.

    The list goes first because some ``camXX`` are head-mounted GoPros and not every wearer's camera is ``aria01``.
    """
    return ego_flags.get(cam_id, cam_id.lower().startswith("aria"))


@dataclass(frozen=True, slots=True)
class _Narration:
    index: int
    time_s: float
    raw_text: str
    subject: str | None
    ego_visible: bool
    unsure: bool
    best_exo: str | None


@dataclass(frozen=True, slots=True)
class _Track:
    """What one annotator wrote about one take, without repeats and times outside the take."""

    index: int
    narrations: tuple[_Narration, ...]

    @property
    def times_s(self) -> list[float]:
        return [narration.time_s for narration in self.narrations]


class _Json:
    """A JSON value that knows its file and its path there, so that whatever is wrong with it can be named."""

    __slots__ = ("_file", "_key", "_parent", "_value")

    def __init__(self, value: object, file: Path, parent: _Json | None = None, key: str = "") -> None:
        self._value, self._file, self._parent, self._key = value, file, parent, key

    @classmethod
    def load(cls, file: Path, download: str) -> _Json:
        """Parse a file; ``download`` is the command that fetches it when it is missing or damaged."""
        if not file.is_file():
            raise ReleaseError(f"{file}: no such file; fetch it with `{download}`, or correct the release folder")
        try:
            return cls(json.loads(file.read_bytes()), file)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        except UnicodeDecodeError as error:
            where = f"not UTF-8 text at byte {error.start}"
        raise ReleaseError(f"{file}: malformed JSON, {where}; correct it there, or fetch it again with `{download}`")

    @property
    def path(self) -> str:
        above = self._parent.path if self._parent else ""
        return above + self._key if above else self._key.removeprefix(".")

    def at(self, name: str) -> _Json:
        found = self.get(name)
        if found is None:
            path = f"{self.path}.{name}".removeprefix(".")
            mend = f"add it, or fetch a V2 {self._file.name}"
            raise ReleaseError(f"{self._file}: field {path} is missing or null; {mend}")
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

    def wrong(self, expected: str) -> ReleaseError:
        shown = repr(self._value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        where = f"field {self.path}" if self.path else "the top level"
        mend = f"correct it, or fetch a V2 {self._file.name}"
        return ReleaseError(f"{self._file}: {where} is {shown}, expected {expected}; {mend}")


def _read_split(root: Path, split: str, funnel: dict[str, int]) -> tuple[dict[str, _Json], dict[str, list[_Track]]]:
    """Take records and narration tracks by take_uid, tracks for narrated takes of the split, in the records' order."""
    records: dict[str, _Json] = {}
    for record in _Json.load(root / "takes.json", f"egoexo -o {root} --parts metadata").elements():
        identifier = record.at("take_uid")
        if records.setdefault(identifier.text(), record) is not record:
            raise identifier.wrong("an identifier used once in the file")
    download = f"egoexo -o {root} --parts annotations"
    annotations = _Json.load(root / "annotations" / f"atomic_descriptions_{split}.json", download).at("annotations")
    annotated = dict(annotations.members())
    members = set(annotated)
    splits_file = root / "annotations" / "splits.json"
    if splits_file.exists():
        listed = _Json.load(splits_file, download).at("split_to_take_uids").at(split)
        members = {uid.text() for uid in listed.elements()}
    in_split = [take_uid for take_uid in records if take_uid in members]
    funnel["takes_listed"] = len(records)
    funnel["takes_in_split"] = len(in_split)
    funnel["annotated_takes_listed"] = len(annotated)

    tracks: dict[str, list[_Track]] = {}
    for take_uid in in_split:
        if take_uid not in annotated:
            continue
        funnel["annotated_takes"] += 1
        duration_s = records[take_uid].at("duration_sec").positive()
        of_take = [
            _read_track(index, annotation, duration_s, funnel)
            for index, annotation in enumerate(annotated[take_uid].elements())
        ]
        if any(track.narrations for track in of_take):
            tracks[take_uid] = of_take
            funnel["takes_narrated"] += 1
    return records, tracks


def _read_track(index: int, annotation: _Json, duration_s: float, funnel: dict[str, int]) -> _Track:
    funnel["annotations_listed"] += 1
    if _flag(annotation, "rejected", default=False):
        return _Track(index, ())
    funnel["annotations"] += 1
    narrations: dict[tuple[float, str], _Narration] = {}
    for position, description in enumerate(annotation.at("descriptions").elements()):
        funnel["narrations_listed"] += 1
        subject, best_exo = description.get("subject", "narration_subject"), description.get("best_exo")
        narration = _Narration(
            index=position,
            time_s=description.at("timestamp").number(),
            raw_text=description.at("text").text(),
            subject=subject.text() if subject else None,
            ego_visible=_flag(description, "ego_visible", default=True),
            unsure=_flag(description, "unsure", default=False),
            best_exo=best_exo.name() if best_exo else None,
        )
        narrations.setdefault((narration.time_s, narration.raw_text), narration)
    inside = tuple(narration for narration in narrations.values() if 0 <= narration.time_s <= duration_s)
    funnel["narrations_distinct"] += len(narrations)
    funnel["narrations_in_take"] += len(inside)
    return _Track(index, inside)


def _flag(record: _Json, name: str, *, default: bool) -> bool:
    value = record.get(name)
    return default if value is None else value.flag()


def _read_take(
    record: _Json,
    root: Path,
    resolution: str | None,
    num_frames: Callable[[Path], int] | None,
    funnel: dict[str, int],
) -> Take | None:
    """The take with the videos that are on disk, or None without an ego video or any exo video."""
    folder = PurePosixPath(record.at("root_dir").text()) / "frame_aligned_videos"
    if resolution is not None:
        folder = folder / "downscaled" / resolution
    ego_listed, exos_listed = _listed_views(record, folder)
    frame_counts: list[int] = []

    def has_video(view: View) -> bool:
        if not (root / view.path).is_file():
            return False
        if num_frames is None:
            return True
        count = num_frames(root / view.path)
        if count > 0:
            frame_counts.append(count)
        return count > 0

    ego = next(filter(has_video, ego_listed), None)
    if ego is None:
        return None
    funnel["takes_with_ego"] += 1
    exos = tuple(filter(has_video, exos_listed))
    funnel["exo_views_listed"] += len(exos_listed)
    funnel["exo_views"] += len(exos)
    if not exos:
        return None
    funnel["takes_with_exo"] += 1
    fps_field, best_exo = record.get("fps"), record.get("best_exo")
    fps = fps_field.positive() if fps_field else FPS
    return Take(
        take_uid=record.at("take_uid").text(),
        take_name=record.at("take_name").text(),
        ego=ego,
        exos=exos,
        duration_s=min(frame_counts) / fps if frame_counts else record.at("duration_sec").number(),
        fps=fps,
        best_exo=best_exo.name() if best_exo else None,
    )


def _listed_views(record: _Json, folder: PurePosixPath) -> tuple[list[View], list[View]]:
    """Ego RGB and exo cameras a record lists, by name; the walk-around GoPro, spelled two ways, is neither."""
    capture = record.get("capture")
    cameras = capture.get("cameras") if capture else None
    ego_flags: dict[str, bool] = {}
    for camera in cameras.elements() if cameras else ():
        is_ego = camera.get("is_ego")
        if is_ego is not None:
            ego_flags[camera.at("cam_id").text()] = is_ego.flag()

    ego: list[View] = []
    exos: list[View] = []
    for cam_id, streams in sorted(record.at("frame_aligned_videos").members(), key=lambda item: item[0]):
        if cam_id in ("collage", "best_exo") or cam_id.lower().startswith(("mobile", "moblie")):
            continue
        worn = is_ego_camera(cam_id, ego_flags)
        files = {name: path for name, stream in streams.members() if (path := stream.get("relative_path"))}
        file = files.get("rgb") if worn else next(iter(files.values()), None)
        if file is not None:
            view = View(cam_id, str(folder / PurePosixPath(file.text()).name))
            (ego if worn else exos).append(view)
    return ego, exos


def _nothing_left(root: Path, split: str, resolution: str | None, funnel: Mapping[str, int]) -> ReleaseError:
    counts = ", ".join(f"{name} {count}" for name, count in funnel.items())
    if funnel["takes_narrated"] and not funnel["takes_with_exo"]:
        part = f"downscaled_takes/{resolution}" if resolution else "takes"
        mend = f"fetch the videos with `egoexo -o {root} --parts {part}`, or change resolution={resolution!r}"
    else:
        mend = "loosen the filter after which nothing is left, or correct annotations/ and takes.json"
    return ReleaseError(f"{root}: no clip is left in split {split!r} ({counts}); {mend}")
