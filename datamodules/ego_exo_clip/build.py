"""Build the index of synchronised pairs (Ego-ExoClip) from a dataset: its takes, narrations and their seconds.

::

    python -m datamodules.ego_exo_clip.build ego-exo4d /data/egoexo4d --probe
    python -m datamodules.ego_exo_clip.build assembly101 /data/assembly101 --out /data/pairs
    python -m datamodules.ego_exo_clip.build pairs.csv /data/mine
    python -m datamodules.ego_exo_clip.build my_dataset:MyDataset /data/mine

A dataset of your own is a dataclass in a file of yours that follows ``PairSource``; its fields become options of the
command. The same from Python::

    from datamodules import BuildOptions, EgoExo4D, build_index

    build_index(EgoExo4D("/data/egoexo4d"), "/data/egoexo4d/ego_exo_clip", BuildOptions(drop_unsure=True))

Clips are cut by the rule of EgoVLP, see ``egovlp``. The same dataset and options give the same bytes.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datamodules.ego_exo_clip.egovlp import clip_length_s, expand_window, fit_alpha, mean_gap_s
from datamodules.ego_exo_clip.footage import find_footage, with_footage
from datamodules.ego_exo_clip.index import (
    FILTERS_KEY,
    FilterCounts,
    Group,
    NarratedClip,
    Narration,
    PairSource,
    Take,
    read_header,
    write_index,
)
from datamodules.ego_exo_clip.sources.pair_file import is_pair_file
from datamodules.io.annotations import SourceError
from datamodules.io.plugins import add_field_options, first_argument, import_dataclass
from datamodules.video.remote import data_path, require_reachable

FrameOffsets = Mapping[str, Mapping[str, int]]
"""Frames by which a camera's file lags, by group_id and camera."""
SOURCES = {
    "ego-exo4d": "datamodules.ego_exo_clip.sources.ego_exo4d:EgoExo4D",
    "assembly101": "datamodules.ego_exo_clip.sources.assembly101:Assembly101",
    "egoexo-fitness": "datamodules.ego_exo_clip.sources.egoexo_fitness:EgoExoFitness",
    "egoexolearn": "datamodules.ego_exo_clip.sources.egoexolearn:EgoExoLearn",
    "charades-ego": "datamodules.ego_exo_clip.sources.charades_ego:CharadesEgo",
}
PAIR_FILE = "datamodules.ego_exo_clip.sources.pair_file:PairFile"
"""The source that reads a table."""


@runtime_checkable
class _NamesTakes(Protocol):
    """A ``PairSource`` with the optional method ``take_ids``."""

    def take_ids(self) -> Mapping[str, str]:
        """Return the group_id by each name that a take goes by, for the takes of all splits."""


@dataclass(frozen=True)
class BuildOptions:
    """Filters of takes and narrations, and lengths of clips; by default all are kept and cut by the EgoVLP rule.

    Attributes:
        require_validated: only takes whose synchronisation was checked.
        min_exo_views: fewest exocentric videos of a take.
        subjects: only narrations about these, such as ``("C",)`` for the wearer; None keeps all.
        require_ego_visible: only narrations marked as visible to the wearer's camera.
        drop_unsure: leave out narrations whose annotator was unsure.
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
        """Raise ValueError for impossible values."""
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
    """The clips of a dataset.

    Attributes:
        takes: takes with at least one clip, in the source's order.
        alpha: mean gap between narrations in seconds; None if no clip was cut by the EgoVLP rule.
        counts: takes and narrations before and after each filter.
    """

    takes: tuple[Take, ...]
    alpha: float | None
    counts: FilterCounts


def build_index(
    source: PairSource,
    out: Path | str,
    options: BuildOptions | None = None,
    *,
    alpha: float | Callable[[], float] | None = None,
    frame_offsets: FrameOffsets | None = None,
    probe_workers: int = 0,
    videos: Path | str | None = None,
) -> dict[str, Any]:
    """Select clips and write the index; see ``select_clips`` and ``write_index``.

    Args:
        source: the dataset.
        out: folder of the index; an existing index is replaced.
        options: filters and clip lengths.
        alpha: see ``select_clips``.
        frame_offsets: see ``select_clips``.
        probe_workers: see ``select_clips``.
        videos: see ``select_clips``.

    Returns:
        The content of ``index.json``: counts, alpha, filters and so on.

    Raises:
        ValueError: the dataset cannot be read, an option does not fit, or no clip is left.
    """
    options = options or BuildOptions()
    selection = select_clips(
        source, options, alpha=alpha, frame_offsets=frame_offsets, probe_workers=probe_workers, videos=videos
    )
    header = {
        "source": dict(source.description),
        "options": {
            **asdict(options),
            "alpha": selection.alpha if callable(alpha) else alpha,
            "frame_offsets": {group_id: dict(cameras) for group_id, cameras in (frame_offsets or {}).items()},
            "probe": probe_workers > 0,
        },
        "alpha": selection.alpha,
        FILTERS_KEY: selection.counts.rows(),
    }
    if not getattr(source, "synchronised", True):
        header["synchronised"] = False
    return write_index(Path(out), selection.takes, source.split, header)


def select_clips(
    source: PairSource,
    options: BuildOptions | None = None,
    *,
    alpha: float | Callable[[], float] | None = None,
    frame_offsets: FrameOffsets | None = None,
    probe_workers: int = 0,
    videos: Path | str | None = None,
) -> Selection:
    """Choose takes and narrations, and cut a clip around each narration.

    Clip lengths depend on the annotations alone: neither the filters nor the videos on disk change a gap or alpha, so a
    partial download gives the same clips as a full one.

    Args:
        source: the dataset.
        options: filters and clip lengths.
        alpha: mean gap between narrations in seconds that clip lengths are relative to, or a function that is called
            for it if a narration has no span of its own. None fits it on the source, whose split must then be "train";
            other splits take that of the training split, see ``training_alpha``.
        frame_offsets: corrections of the synchronisation, added to those of the source; for a source with ``take_ids``
            a take may go by any of its names, and takes of other splits are passed over.
        probe_workers: processes that open every video; a take then lasts as long as its shortest stream, and a video
            that does not open counts as missing. With 0 a video only has to exist and not to be empty.
        videos: folder, or address such as ``s3://bucket/takes``, that the paths of the videos are below; None for the
            root of the source.

    Raises:
        ValueError: the dataset cannot be read, an option does not fit, an offset names no take or camera of the
            dataset, or no clip is left.
    """
    options, counts = options or BuildOptions(), FilterCounts()
    narrated: list[tuple[Group, _Tracks]] = []
    cameras: dict[str, set[str]] = {}
    for group, narrations in source.read(counts):
        cameras[group.group_id] = {view.cam for view in (*group.egos, *group.exos)}
        tracks = _tracks(narrations, group.duration_s, counts)
        if counts.keep("takes", "narrated", bool(tracks)):
            narrated.append((group, tracks))
    corrections = _corrections(frame_offsets, source, cameras) if frame_offsets else {}
    # Alpha comes before all other filters, which therefore do not change it.
    by_rule = any(narration.span_s is None for _, tracks in narrated for narration in _all(tracks))
    if callable(alpha):
        alpha = alpha() if by_rule else None
    elif alpha is None and by_rule:
        if source.split != "train":
            raise ValueError(
                f"alpha is fitted on 'train' alone: for {source.split!r} pass training_alpha of the train split"
            )
        alpha = fit_alpha(_times(track) for _, tracks in narrated for track in tracks.values())
    if options.require_validated:
        narrated = [item for item in narrated if counts.keep("takes", "synchronisation validated", item[0].validated)]
    # All files of all takes are looked at together, because a network file system answers slowly.
    views = [view for group, _ in narrated for view in (*group.egos, *group.exos)]
    root = source.root if videos is None else data_path(videos)
    require_reachable(root, "--videos")
    footage = find_footage(list(dict.fromkeys(root / view.path for view in views)), probe_workers)
    usable = "that can be opened" if probe_workers else "on disk"
    # Keep the takes with enough videos, and cut a clip around each of their wanted narrations.
    takes = []
    for group, tracks in narrated:
        offsets = {**group.frame_offset, **corrections.get(group.group_id, {})}
        kept = with_footage(group, root, footage, offsets, options.min_exo_views, usable, counts)
        for _ in _all(tracks):
            counts.keep("narrations", "of takes that are left", kept is not None)
        if kept is None:
            continue
        clips = [clip for track in tracks.values() for clip in _cut(track, kept, alpha, options, counts)]
        if counts.keep("takes", "with a clip", bool(clips)):
            takes.append(Take(kept, tuple(sorted(clips, key=lambda clip: clip.narration.time_s))))
    if not takes:
        raise SourceError(f"{source.root}: no clip is left of {dict(source.description)} ({_first_empty(counts)})")
    return Selection(tuple(takes), alpha, counts)


def training_alpha(source: PairSource) -> float:
    """Return ``fit_alpha`` of a source, which must be the training split.

    Raises:
        ValueError: the dataset cannot be read, or it has no gap.
    """
    counts = FilterCounts()
    tracks = [_tracks(narrations, group.duration_s, counts) for group, narrations in source.read(counts)]
    return fit_alpha(_times(track) for of_take in tracks for track in of_take.values())


def filter_table(header: Mapping[str, Any]) -> str:
    """Return the filters of an index as a table, followed by the numbers that are left."""
    rows = [
        ("", "filter", "in", "out"),
        *((row["of"], row["filter"], f"{row['in']:,}", f"{row['out']:,}") for row in header[FILTERS_KEY]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines, previous = [], ""
    for of, criterion, before, after in rows:
        shown = of if of != previous else ""
        lines.append(f"{shown:<{widths[0]}}  {criterion:<{widths[1]}}  {before:>{widths[2]}}  {after:>{widths[3]}}")
        previous = of
    alpha = "" if header["alpha"] is None else f"; alpha {header['alpha']:.4f} s"
    silent = f" ({header['without_text']:,} without narration)" if "without_text" in header else ""
    lines.append(
        f"{header['groups']:,} takes, {header['clips']:,} clips{silent}, {header['pairs']:,} ego-exo pairs{alpha}"
    )
    return "\n".join(lines)


def _corrections(given: FrameOffsets, source: PairSource, cameras: Mapping[str, set[str]]) -> FrameOffsets:
    """Return frame offsets by group_id.

    Args:
        given: offsets by group_id, or by another name that the source's ``take_ids`` knows.
        source: the dataset.
        cameras: the cameras of each take of the split, by group_id.

    Raises:
        SourceError: a name stands for no take of the dataset, a take is named twice, or a take of the split lacks a
            camera.
    """
    ids = dict(source.take_ids()) if isinstance(source, _NamesTakes) else {}
    ids |= {group_id: group_id for group_id in cameras}
    offsets: dict[str, Mapping[str, int]] = {}
    name_of: dict[str, str] = {}
    for name, of_cameras in given.items():
        if name not in ids:
            near = difflib.get_close_matches(name, ids, n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else "correct the name, or remove it"
            among = "take" if isinstance(source, _NamesTakes) else f"take of split {source.split!r}"
            raise SourceError(f"frame offset of {name}: no such {among} below {source.root}; {fix}")
        group_id = ids[name]
        if group_id in offsets:
            raise SourceError(f"frame offset of {name}: the same take as {name_of[group_id]}; remove one of the two")
        allowed = cameras.get(group_id)
        if allowed is not None and not of_cameras.keys() <= allowed:
            unknown = ", ".join(sorted(of_cameras.keys() - allowed))
            raise SourceError(f"frame offset of {name}: no camera {unknown}, allowed: {', '.join(sorted(allowed))}")
        offsets[group_id], name_of[group_id] = of_cameras, name
    return offsets


# --------------------------------------------------------------------------------------------------------------------
# narrations


_Tracks = dict[str, list[Narration]]
"""Narrations of a take by annotator."""


def _tracks(narrations: Iterable[Narration], duration_s: float, counts: FilterCounts) -> _Tracks:
    """Group narrations by annotator, without repeats and times outside the take, which therefore change no gap."""
    tracks: _Tracks = {}
    seen: set[tuple[Any, ...]] = set()
    for narration in narrations:
        key = (narration.annotator, narration.time_s, narration.span_s, narration.raw_text)
        if not counts.keep("narrations", "not repeated", key not in seen):
            continue
        seen.add(key)
        if counts.keep("narrations", "within the take", 0 <= narration.time_s <= duration_s):
            tracks.setdefault(narration.annotator, []).append(narration)
    return tracks


def _all(tracks: _Tracks) -> Iterable[Narration]:
    return (narration for track in tracks.values() for narration in track)


def _times(track: list[Narration]) -> list[float]:
    return [narration.time_s for narration in track if narration.span_s is None]


def _cut(
    track: list[Narration], group: Group, alpha: float | None, options: BuildOptions, counts: FilterCounts
) -> Iterator[NarratedClip]:
    gap_s = mean_gap_s(_times(track))
    for narration in track:
        if not _is_wanted(narration, group, options, counts):
            continue
        if narration.span_s is None:
            length_s = clip_length_s(gap_s, alpha)
        else:
            length_s = narration.span_s[1] - narration.span_s[0]
        start_s, end_s = expand_window(
            narration.time_s,
            length_s,
            group.duration_s,
            group.fps,
            options.clip_scale,
            options.min_clip_s,
            options.max_clip_s,
        )
        yield NarratedClip(narration, start_s, end_s)


def _is_wanted(narration: Narration, group: Group, options: BuildOptions, counts: FilterCounts) -> bool:
    is_inside = group.begin_s <= narration.time_s <= group.duration_s
    criteria = [
        ("within the shortest stream" if group.lag_s is None else "within all videos", is_inside),
        ("of three words or more, without #unsure", narration.text is not None),
    ]
    if options.subjects is not None:
        criteria.append((f"about {', '.join(options.subjects)}", narration.subject in options.subjects))
    if options.require_ego_visible:
        criteria.append(("visible to the wearer", narration.ego_visible))
    if options.drop_unsure:
        criteria.append(("not marked as unsure", not narration.unsure))
    return all(counts.keep("narrations", criterion, met) for criterion, met in criteria)


def _first_empty(counts: FilterCounts) -> str:
    """Return the first filter that leaves nothing; takes without a clip are explained by their narrations."""
    rows = [row for row in counts.rows() if not row["out"] and row["filter"] != "with a clip"]
    row = next((row for unit in ("takes", "narrations") for row in rows if row["of"] == unit), None)
    if row is None:
        return "it holds no take"
    fix = "loosen that filter, or correct the annotations"
    if "video" in row["filter"]:
        fix = "fetch the videos, or choose the resolution that was downloaded"
    return f"{row['of']} {row['filter']}: 0 of {row['in']}; {fix}"


# --------------------------------------------------------------------------------------------------------------------
# command line


def _parser(kind: Any | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.ego_exo_clip.build",
        description="Build the index of synchronised ego-exo pairs that stages 1 and 2 train on. Filters are off "
        "unless given; the takes and narrations that each leaves are printed and kept in index.json. Options of a "
        "source: `SOURCE --help`.",
    )
    parser.add_argument("source", help=f"pairs.csv or pairs.jsonl, {', '.join(SOURCES)}, or module:Class of your own")
    if kind is not None:
        add_field_options(parser, kind, "folder of the dataset", root_is_option=False)
    parser.add_argument(
        "--out", type=Path, help="folder of the index (default: <root>/ego_exo_clip, with _<split> unless train)"
    )
    parser.add_argument(
        "--videos",
        type=data_path,
        metavar="FOLDER",
        help="folder or address (s3://...) of the videos (default: <root>)",
    )
    parser.add_argument(
        "--alpha",
        help="mean gap of the training split in seconds, or folder of a training index to take it from (default: "
        "fitted on the training annotations)",
    )
    parser.add_argument("--probe", action="store_true", help="open every video instead of checking that it exists")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that open videos (default: all cores)",
    )
    parser.add_argument("--frame-offsets", type=Path, metavar="JSON", help="{take: {camera: frames its file lags by}}")
    defaults = BuildOptions()
    parser.add_argument(
        "--min-exo-views",
        type=int,
        default=defaults.min_exo_views,
        help="fewest exo videos of a take (default: %(default)s)",
    )
    parser.add_argument("--require-validated", action="store_true", help="only takes whose timesync was checked")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="only narrations about these: C is the wearer")
    parser.add_argument("--require-ego-visible", action="store_true", help="only actions the wearer's camera sees")
    parser.add_argument("--drop-unsure", action="store_true", help="leave out narrations marked as unsure")
    parser.add_argument(
        "--clip-scale", type=float, default=defaults.clip_scale, help="factor on clip lengths (default: %(default)s)"
    )
    parser.add_argument(
        "--min-clip-s", type=float, default=defaults.min_clip_s, help="shortest clip, seconds (default: a frame)"
    )
    parser.add_argument("--max-clip-s", type=float, default=defaults.max_clip_s, help="longest clip, seconds")
    return parser


def _alpha(given: str | None, source: Any) -> float | Callable[[], float] | None:
    if given is None:
        # Other splits are cut with the alpha of the training split, whose annotations are read only if it is needed.
        return None if source.split == "train" else lambda: training_alpha(replace(source, split="train"))
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
        raise ValueError(f"{file}: invalid JSON ({error}): fix this file") from None
    cameras = list(offsets.values()) if isinstance(offsets, dict) else [None]
    if not all(isinstance(of_take, dict) and all(type(n) is int for n in of_take.values()) for of_take in cameras):
        raise ValueError(f"{file}: expected {{take: {{camera: whole frames}}}}: correct it")
    return dict(offsets)


def main(words: Sequence[str] | None = None) -> int:
    """Build an index and print its filters; return exit status 2 after one line on stderr if it cannot be done."""
    try:
        name = first_argument(words)
        is_file = name is not None and is_pair_file(name)
        kind_name = PAIR_FILE if is_file else name
        members = ("split", "description", "read")
        kind = None if kind_name is None else import_dataclass(kind_name, SOURCES, members, "source")
        given = _parser(kind).parse_args(words)
        assert kind is not None, "the parser requires a source"
        if is_file:
            given.file = Path(given.source)
        source: PairSource = kind(**{item.name: getattr(given, item.name) for item in fields(kind) if item.init})
        options = {item.name: getattr(given, item.name) for item in fields(BuildOptions)}
        options["subjects"] = given.subjects and tuple(given.subjects)
        suffix = "" if source.split == "train" else f"_{source.split}"
        out = given.out or given.root / f"ego_exo_clip{suffix}"
        header = build_index(
            source,
            out,
            BuildOptions(**options),
            alpha=_alpha(given.alpha, source),
            frame_offsets=_frame_offsets(given.frame_offsets),
            probe_workers=max(1, given.workers) if given.probe or getattr(kind, "opens_videos", False) else 0,
            videos=given.videos,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(filter_table(header))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
