"""Builds the index of synchronised pairs (Ego-ExoClip) out of a data set: which takes, which narrations, which seconds.

::

    python -m datamodules.ego_exo_clip.build ego-exo4d /data/egoexo4d --probe
    python -m datamodules.ego_exo_clip.build assembly101 /data/assembly101 --out /data/pairs

or, for any class that is a ``PairSource``::

    from datamodules import BuildOptions, EgoExo4D, build_index

    build_index(EgoExo4D("/data/egoexo4d"), "/data/egoexo4d/ego_exo_clip", BuildOptions(drop_unsure=True))

Clips are cut by the rule of EgoVLP (arXiv 2206.01670): with ``beta`` the mean gap between an annotator's narrations of
a take, and ``alpha`` the mean of those over the training split, a clip is ``beta / alpha`` seconds around its
narration. The same data set and options give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.ego_exo_clip.assembly101 import Assembly101
from datamodules.ego_exo_clip.ego_exo4d import EgoExo4D
from datamodules.ego_exo_clip.index import (
    Funnel,
    Group,
    NarratedClip,
    Narration,
    PairSource,
    SourceError,
    Take,
    View,
    read_header,
    write_index,
)
from datamodules.io.parallel import parallel_map
from datamodules.video.errors import ClipDecodeError

FrameOffsets = Mapping[str, Mapping[str, int]]
"""Frames by which a camera's file lags, by group_id and camera."""
_SHOWN_UNREADABLE = 20


@dataclass(frozen=True)
class BuildOptions:
    """Which takes and narrations become clips, and how long those are; the default keeps all and is the EgoVLP rule.

    Attributes:
        require_validated: only takes whose synchronisation somebody checked.
        min_exo_views: fewest exocentric videos of a take.
        subjects: only narrations about these, such as ``("C",)`` for the wearer; None keeps all.
        require_ego_visible: only narrations marked as visible to the wearer's camera.
        drop_unsure: leave out narrations whose annotator doubted what was named.
        clip_scale: factor on every clip's length. Annotators of Ego-Exo4D only had to be within 1 to 2 s of the action,
            so a longer clip can be worth having.
        min_clip_s: shortest clip in seconds; at least a frame in any case.
        max_clip_s: longest clip in seconds; None for no limit.

    Raises:
        ValueError: an impossible value.
    """

    require_validated: bool = False
    min_exo_views: int = 1
    subjects: tuple[str, ...] | None = None
    require_ego_visible: bool = False
    drop_unsure: bool = False
    clip_scale: float = 1.0
    min_clip_s: float = 0.0
    max_clip_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.min_exo_views < 1:
            raise ValueError(f"min_exo_views: got {self.min_exo_views}, allowed: 1 or more")
        if self.subjects is not None and (isinstance(self.subjects, str) or not self.subjects):
            raise ValueError(f"subjects: got {self.subjects!r}, allowed: some names such as ('C',), or None for all")
        if not 0 < self.clip_scale < math.inf:
            raise ValueError(f"clip_scale: got {self.clip_scale}, allowed: above 0")
        if not 0 <= self.min_clip_s < math.inf:
            raise ValueError(f"min_clip_s: got {self.min_clip_s}, allowed: 0 or more")
        if self.max_clip_s is not None and not max(self.min_clip_s, 0.0) < self.max_clip_s < math.inf:
            raise ValueError(f"max_clip_s: got {self.max_clip_s}, allowed: above min_clip_s={self.min_clip_s}, or None")


@dataclass(frozen=True)
class Selection:
    """The takes with at least one clip, in the source's order; alpha where the EgoVLP rule was used; the counts."""

    takes: tuple[Take, ...]
    alpha: float | None
    funnel: Funnel


def build_index(
    source: PairSource,
    out: Path | str,
    options: BuildOptions | None = None,
    *,
    alpha: float | None = None,
    frame_offsets: FrameOffsets | None = None,
    probe_workers: int = 0,
) -> dict[str, Any]:
    """Select clips and write the index; see ``select_clips`` and ``write_index``.

    Args:
        source: the data set.
        out: folder of the index; an index that is there is replaced.
        options: filters and clip lengths.
        alpha: see ``select_clips``.
        frame_offsets: see ``select_clips``.
        probe_workers: see ``select_clips``.

    Returns:
        What ``index.json`` holds: counts, alpha, funnel and so on.

    Raises:
        ValueError: the data set cannot be read, an option does not fit, or no clip is left.
    """
    options = options or BuildOptions()
    selection = select_clips(source, options, alpha=alpha, frame_offsets=frame_offsets, probe_workers=probe_workers)
    header = {
        "source": dict(source.description),
        "options": {
            **asdict(options),
            "alpha": alpha,
            "frame_offsets": {group_id: dict(cameras) for group_id, cameras in (frame_offsets or {}).items()},
            "probe": probe_workers > 0,
        },
        "alpha": selection.alpha,
        "funnel": selection.funnel.rows(),
    }
    return write_index(Path(out), selection.takes, source.split, header)


def select_clips(
    source: PairSource,
    options: BuildOptions | None = None,
    *,
    alpha: float | None = None,
    frame_offsets: FrameOffsets | None = None,
    probe_workers: int = 0,
) -> Selection:
    """Choose takes and narrations, and cut a clip around each.

    Clip lengths depend on the annotations alone: neither the filters nor which videos are on disk change a gap or
    alpha, so a partial download gives the same clips as a full one.

    Args:
        source: the data set.
        options: filters and clip lengths.
        alpha: mean gap between narrations in seconds that clip lengths are relative to. Left out, it is fitted on the
            source, whose split must then be "train"; other splits take that of the training split, ``training_alpha``.
        frame_offsets: corrections of the synchronisation, added to what the source knows.
        probe_workers: processes that open every video; a take then lasts as long as its shortest stream, and what does
            not open counts as missing. 0 only asks whether each file is there and not empty.

    Raises:
        ValueError: the data set cannot be read, an option does not fit, or no clip is left.
    """
    options, funnel = options or BuildOptions(), Funnel()
    narrated = [
        (group, tracks)
        for group, narrations in source.read(funnel)
        if funnel.keep("takes", "narrated", bool(tracks := _tracks(narrations, group.duration_s, funnel)))
    ]
    if alpha is None and any(said.span_s is None for _, tracks in narrated for said in _all(tracks)):
        if source.split != "train":
            raise ValueError(
                f"alpha is fitted on 'train' alone: for {source.split!r} pass training_alpha of the train split"
            )
        alpha = fit_alpha(_times(track) for _, tracks in narrated for track in tracks.values())
    if options.require_validated:
        narrated = [item for item in narrated if funnel.keep("takes", "synchronisation validated", item[0].validated)]
    views = [view for group, _ in narrated for view in (*group.egos, *group.exos)]
    footage = _look([source.root / view.path for view in views], probe_workers)
    seen = "that can be opened" if probe_workers else "on disk"
    takes = []
    for group, tracks in narrated:
        offsets = {**group.frame_offset, **(frame_offsets or {}).get(group.group_id, {})}
        filmed = _filmed(group, source.root, footage, offsets, options.min_exo_views, seen, funnel)
        for _ in _all(tracks):
            funnel.keep("narrations", "of takes that are left", filmed is not None)
        if filmed is None:
            continue
        clips = [clip for track in tracks.values() for clip in _cut(track, filmed, alpha, options, funnel)]
        if funnel.keep("takes", "with a clip", bool(clips)):
            takes.append(Take(filmed, tuple(sorted(clips, key=lambda clip: clip.narration.time_s))))
    if not takes:
        raise SourceError(f"{source.root}: no clip is left of {dict(source.description)} ({_where_it_went(funnel)})")
    return Selection(tuple(takes), alpha, funnel)


def training_alpha(source: PairSource) -> float:
    """``fit_alpha`` of a source, which is to be the training split.

    Raises:
        ValueError: the data set cannot be read, or no gap is in it.
    """
    funnel = Funnel()
    tracks = [_tracks(narrations, group.duration_s, funnel) for group, narrations in source.read(funnel)]
    return fit_alpha(_times(track) for of_take in tracks for track in of_take.values())


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
        SourceError: no track has a gap.
    """
    gaps = [gap for track in tracks if (gap := mean_gap_s(track)) is not None]
    if not gaps:
        raise SourceError(
            "annotations: no annotator of a take has two different timestamps, so alpha cannot be fitted; pass alpha"
        )
    return math.fsum(gaps) / len(gaps)


def clip_length_s(gap_s: float | None, alpha: float | None) -> float:
    """Seconds of a clip by the EgoVLP rule, ``beta / alpha``: about one, less where an annotator wrote densely.

    Args:
        gap_s: the annotator's ``mean_gap_s`` (beta); None stands for alpha, a one-second clip.
        alpha: ``fit_alpha`` of the training split, seconds, above 0.

    Raises:
        ValueError: alpha is not above 0.
    """
    if alpha is None or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha}, allowed: above 0")
    return 1.0 if gap_s is None else gap_s / alpha


def clip_span(
    time_s: float, length_s: float, duration_s: float, fps: float, options: BuildOptions
) -> tuple[float, float]:
    """Start and end in seconds of the clip around one narration.

    The length, scaled and bounded as the options say, is centred on the narration and cut to the take; where less than
    ``min_clip_s`` or one frame is left, it is widened to that, staying inside the take.

    Args:
        time_s: the narration's time, within [0, duration_s].
        length_s: length before scaling.
        duration_s: the take's length.
        fps: the take's frame rate.
        options: ``clip_scale``, ``min_clip_s`` and ``max_clip_s``.

    Raises:
        ValueError: ``time_s`` is outside the take, or ``max_clip_s`` shorter than a frame.
    """
    if not 0 <= time_s <= duration_s:
        raise ValueError(f"time_s={time_s} is outside the take, [0, {duration_s}] s")
    shortest_s = max(options.min_clip_s, 1 / fps)
    length_s *= options.clip_scale
    if options.max_clip_s is not None:
        if options.max_clip_s < shortest_s:
            raise ValueError(f"max_clip_s: got {options.max_clip_s}, allowed: {shortest_s:.4g} s, a frame, or more")
        length_s = min(length_s, options.max_clip_s)
    start_s, end_s = max(0.0, time_s - length_s / 2), min(duration_s, time_s + length_s / 2)
    if end_s - start_s < shortest_s:
        start_s = max(0.0, min(time_s - shortest_s / 2, duration_s - shortest_s))
        end_s = min(duration_s, start_s + shortest_s)
    return start_s, end_s


def funnel_table(header: Mapping[str, Any]) -> str:
    """The funnel of an index as a table, with what is left at its end."""
    rows = [
        ("", "filter", "in", "out"),
        *((r["of"], r["filter"], f"{r['in']:,}", f"{r['out']:,}") for r in header["funnel"]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines, previous = [], ""
    for of, criterion, before, after in rows:
        shown = of if of != previous else ""
        lines.append(f"{shown:<{widths[0]}}  {criterion:<{widths[1]}}  {before:>{widths[2]}}  {after:>{widths[3]}}")
        previous = of
    alpha = "" if header["alpha"] is None else f"; alpha {header['alpha']:.4f} s"
    lines.append(f"{header['groups']:,} takes, {header['clips']:,} clips, {header['pairs']:,} ego-exo pairs{alpha}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# filters


_Tracks = dict[str, list[Narration]]
"""Narrations of a take by annotator."""


def _tracks(narrations: Iterable[Narration], duration_s: float, funnel: Funnel) -> _Tracks:
    """Without repeats and times outside the take, which therefore change no gap."""
    tracks: _Tracks = {}
    seen: set[tuple[str, float, str]] = set()
    for said in narrations:
        key = (said.annotator, said.time_s, said.raw_text)
        if not funnel.keep("narrations", "said once", key not in seen):
            continue
        seen.add(key)
        if funnel.keep("narrations", "within the take", 0 <= said.time_s <= duration_s):
            tracks.setdefault(said.annotator, []).append(said)
    return tracks


def _all(tracks: _Tracks) -> Iterable[Narration]:
    return (said for track in tracks.values() for said in track)


def _times(track: list[Narration]) -> list[float]:
    return [said.time_s for said in track if said.span_s is None]


def _cut(
    track: list[Narration], group: Group, alpha: float | None, options: BuildOptions, funnel: Funnel
) -> Iterator[NarratedClip]:
    gap_s = mean_gap_s(_times(track))
    for said in track:
        if _wanted(said, group, options, funnel):
            length_s = clip_length_s(gap_s, alpha) if said.span_s is None else said.span_s[1] - said.span_s[0]
            yield NarratedClip(said, *clip_span(said.time_s, length_s, group.duration_s, group.fps, options))


def _wanted(said: Narration, group: Group, options: BuildOptions, funnel: Funnel) -> bool:
    return (
        funnel.keep("narrations", "within the shortest stream", said.time_s <= group.duration_s)
        and funnel.keep("narrations", "of three words or more, without #unsure", said.text is not None)
        and (
            options.subjects is None
            or funnel.keep("narrations", f"about {', '.join(options.subjects)}", said.subject in options.subjects)
        )
        and (not options.require_ego_visible or funnel.keep("narrations", "visible to the wearer", said.ego_visible))
        and (not options.drop_unsure or funnel.keep("narrations", "not marked as unsure", not said.unsure))
    )


def _where_it_went(funnel: Funnel) -> str:
    """The first filter that lets nothing through; takes without a clip left are explained by their narrations."""
    rows = [row for row in funnel.rows() if not row["out"] and row["filter"] != "with a clip"]
    row = next((row for unit in ("takes", "narrations") for row in rows if row["of"] == unit), None)
    if row is None:
        return "it holds no take"
    mend = "loosen that filter, or correct the annotations"
    if "video" in row["filter"]:
        mend = "fetch the videos, or choose the resolution that is there"
    return f"{row['of']} {row['filter']}: 0 of {row['in']}; {mend}"


# --------------------------------------------------------------------------------------------------------------------
# videos


@dataclass(frozen=True)
class _Footage:
    """A usable video file; None where it was not opened."""

    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None


def _filmed(
    group: Group,
    root: Path,
    footage: Mapping[Path, _Footage],
    offsets: Mapping[str, int],
    min_exo_views: int,
    seen: str,
    funnel: Funnel,
) -> Group | None:
    """The group with the views that have footage, its length that of the shortest; None if too few are left."""
    listed = {view.cam for view in (*group.egos, *group.exos)}
    if not offsets.keys() <= listed:
        unknown = ", ".join(sorted(offsets.keys() - listed))
        raise SourceError(
            f"frame offset of {group.group_id}: no camera {unknown}, allowed: {', '.join(sorted(listed))}"
        )

    def usable(views: Iterable[View]) -> list[View]:
        found = [(view, footage.get(root / view.path)) for view in views]
        return [replace(view, width=shot.width, height=shot.height) for view, shot in found if shot is not None]

    egos = usable(group.egos)[:1]
    if not funnel.keep("takes", f"ego video {seen}", bool(egos)):
        return None
    exos = usable(group.exos)
    for view in group.exos:
        funnel.keep("exo views", seen, root / view.path in footage)
    if not funnel.keep("takes", f"{min_exo_views} or more exo videos {seen}", len(exos) >= min_exo_views):
        return None
    cameras = {view.cam for view in (*egos, *exos)}
    kept = replace(
        group,
        egos=tuple(egos),
        exos=tuple(exos),
        frame_offset={camera: frames for camera, frames in offsets.items() if camera in cameras},
    )
    shots = [footage[root / view.path] for view in (*egos, *exos)]
    lengths_s = [shot.num_frames / shot.fps for shot in shots if shot.num_frames is not None and shot.fps is not None]
    if not lengths_s:
        return kept
    return replace(kept, duration_s=min(lengths_s), fps=shots[0].fps or group.fps)


def _look(paths: list[Path], probe_workers: int) -> dict[Path, _Footage]:
    """The files that are there and not empty, opened where there are workers for it."""
    with ThreadPoolExecutor(16) as pool:  # waiting for network file systems
        sizes = list(tqdm(pool.map(_size, paths), total=len(paths), desc="files", unit="file", mininterval=1))
    present = [path for path, size in zip(paths, sizes, strict=True) if size]
    if not probe_workers:
        return dict.fromkeys(present, _Footage())
    opened = dict(zip(present, parallel_map(_open, present, probe_workers, "opening", "file"), strict=True))
    unreadable = [found for found in opened.values() if isinstance(found, str)]
    for message in unreadable[:_SHOWN_UNREADABLE]:
        print(f"left out: {message}", file=sys.stderr)
    if len(unreadable) > _SHOWN_UNREADABLE:
        print(f"left out: {len(unreadable) - _SHOWN_UNREADABLE} more files", file=sys.stderr)
    return {path: found for path, found in opened.items() if not isinstance(found, str)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _open(path: Path) -> _Footage | str:
    """What the header says, or why the file cannot be used."""
    from datamodules.video.probe import probe  # PyAV comes with it; a build without probing needs none

    try:
        info = probe(path)
    except ClipDecodeError as error:
        return str(error)
    if not info.num_frames:
        return f"{path}: no frames"
    width, height = (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    return _Footage(info.num_frames, info.fps, width, height)


# --------------------------------------------------------------------------------------------------------------------
# command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.ego_exo_clip.build",
        description="Build the index of synchronised ego-exo pairs that stages 1 and 2 train on. Filters are off "
        "unless given; how many takes and narrations each leaves is printed and kept in index.json.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="{ego-exo4d,assembly101}")
    ego_exo4d = sources.add_parser("ego-exo4d", help="a release folder of Ego-Exo4D")
    ego_exo4d.add_argument("root", type=Path, help="release folder, the one that holds takes.json")
    ego_exo4d.add_argument(
        "--split", choices=("train", "val"), default="train", help="takes of this split (default: train)"
    )
    ego_exo4d.add_argument("--resolution", default="448", help="downscaled videos to use, or 'full' (default: 448)")
    ego_exo4d.add_argument(
        "--alpha",
        help="mean gap of the training split in seconds, or folder of a training index to take it from (default: "
        "fitted on the training annotations)",
    )
    ego_exo4d.add_argument("--require-validated", action="store_true", help="only takes whose timesync was checked")
    ego_exo4d.add_argument("--subjects", nargs="+", metavar="NAME", help="only narrations about these: C is the wearer")
    ego_exo4d.add_argument("--require-ego-visible", action="store_true", help="only what the wearer's camera sees")
    ego_exo4d.add_argument("--drop-unsure", action="store_true", help="leave out what the annotator doubted")

    assembly101 = sources.add_parser("assembly101", help="recordings and annotations of Assembly101")
    assembly101.add_argument("root", type=Path, help="folder that holds recordings/")
    assembly101.add_argument(
        "--split", choices=("train", "validation"), default="train", help="takes of this split (default: train)"
    )
    assembly101.add_argument(
        "--annotations", type=Path, help="folder of train.csv (default: <root>/fine-grained-annotations)"
    )

    defaults = BuildOptions()
    for command in (ego_exo4d, assembly101):
        command.add_argument(
            "--out", type=Path, help="folder of the index (default: <root>/ego_exo_clip, with _<split> unless train)"
        )
        command.add_argument("--probe", action="store_true", help="open every video, not only look whether it is there")
        command.add_argument(
            "--workers",
            type=int,
            default=len(os.sched_getaffinity(0)),
            help="processes that open videos (default: all cores)",
        )
        command.add_argument(
            "--frame-offsets", type=Path, metavar="JSON", help="{group_id: {camera: frames its file lags by}}"
        )
        command.add_argument(
            "--min-exo-views",
            type=int,
            default=defaults.min_exo_views,
            help="fewest exo videos of a take (default: %(default)s)",
        )
        command.add_argument(
            "--clip-scale",
            type=float,
            default=defaults.clip_scale,
            help="factor on clip lengths (default: %(default)s)",
        )
        command.add_argument(
            "--min-clip-s", type=float, default=defaults.min_clip_s, help="shortest clip, seconds (default: a frame)"
        )
        command.add_argument(
            "--max-clip-s", type=float, default=defaults.max_clip_s, help="longest clip, seconds (default: any)"
        )
    return parser


def _alpha(given: str | None, root: Path, split: str) -> float | None:
    if given is None:
        return None if split == "train" else training_alpha(EgoExo4D(root, "train"))
    try:
        return float(given)
    except ValueError:
        alpha = read_header(Path(given)).get("alpha")
    if not isinstance(alpha, float):
        raise ValueError(f"{given}/index.json: alpha is {alpha}: give the seconds, or an index cut by narration gaps")
    return alpha


def _frame_offsets(file: Path | None) -> dict[str, dict[str, int]]:
    if file is None:
        return {}
    try:
        offsets = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}: correct --frame-offsets") from None
    except ValueError as error:
        raise ValueError(f"{file}: malformed JSON ({error}): mend it") from None
    whole = isinstance(offsets, dict) and all(
        isinstance(cameras, dict) and all(type(frames) is int for frames in cameras.values())
        for cameras in offsets.values()
    )
    if not whole:
        raise ValueError(f"{file}: expected {{group_id: {{camera: whole frames}}}}")
    return dict(offsets)


def main(words: Sequence[str] | None = None) -> int:
    """Build an index and print its funnel; exit status 2 with one line when something does not fit."""
    given = _parser().parse_args(words)
    try:
        source: PairSource
        alpha = None
        options = {name: getattr(given, name) for name in ("min_exo_views", "clip_scale", "min_clip_s", "max_clip_s")}
        if given.source == "ego-exo4d":
            source = EgoExo4D(given.root, given.split, None if given.resolution == "full" else given.resolution)
            alpha = _alpha(given.alpha, given.root, given.split)
            options |= {
                name: getattr(given, name) for name in ("require_validated", "require_ego_visible", "drop_unsure")
            }
            options["subjects"] = given.subjects and tuple(given.subjects)
        else:
            source = Assembly101(given.root, given.split, given.annotations)
        suffix = "" if given.split == "train" else f"_{given.split}"
        out = given.out or given.root / f"ego_exo_clip{suffix}"
        offsets = _frame_offsets(given.frame_offsets)
        header = build_index(
            source,
            out,
            BuildOptions(**options),
            alpha=alpha,
            frame_offsets=offsets,
            probe_workers=max(1, given.workers) if given.probe else 0,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(funnel_table(header))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
