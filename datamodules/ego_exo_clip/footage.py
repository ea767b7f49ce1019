"""The video files of takes: which exist, which can be opened, and how long a take is by its files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from datamodules.ego_exo_clip.index import FilterCounts, Group, View
from datamodules.io.annotations import SourceError
from datamodules.io.parallel import parallel_map
from datamodules.video.errors import ClipDecodeError

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Footage:
    """A usable video file; values are None if it was not opened."""

    num_frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None

    @property
    def duration_s(self) -> float | None:
        """Length in seconds."""
        return None if self.num_frames is None or self.fps is None else self.num_frames / self.fps


def find_footage(paths: list[Path], probe_workers: int) -> dict[Path, Footage]:
    """Return the files that exist and are not empty; those that do not open are reported on stderr and left out.

    Args:
        paths: video files.
        probe_workers: processes that open every file; 0 opens none.
    """
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly
        sizes = list(tqdm(pool.map(_size, paths), total=len(paths), desc="files", unit="file", mininterval=1))
    present = [path for path, size in zip(paths, sizes, strict=True) if size]
    if not probe_workers:
        return dict.fromkeys(present, Footage())
    opened = dict(zip(present, parallel_map(probe_file, present, probe_workers, "opening", "file"), strict=True))
    problems = [found for found in opened.values() if isinstance(found, str)]
    for message in problems[:_SHOWN_PROBLEMS]:
        print(f"left out: {message}", file=sys.stderr)
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"left out: {len(problems) - _SHOWN_PROBLEMS} more files", file=sys.stderr)
    return {path: found for path, found in opened.items() if not isinstance(found, str)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else int(path.is_dir() and any(path.iterdir()))
    except OSError:
        return 0


def probe_file(path: Path) -> Footage | str:
    """Return the claims of a file's header, or the reason why it cannot be used."""
    from datamodules.video.probe import probe  # PyAV comes with it; a build without probing needs none

    try:
        info = probe(path)
    except ClipDecodeError as error:
        return str(error)
    if not info.num_frames:
        return f"{path}: no frames"
    width, height = (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    return Footage(info.num_frames, info.fps, width, height)


def with_footage(
    group: Group,
    root: Path,
    footage: Mapping[Path, Footage],
    offsets: Mapping[str, int],
    min_exo_views: int,
    usable: str,
    counts: FilterCounts,
) -> Group | None:
    """Return a group with the views that have footage and the length of the shortest; None if too few are left.

    Args:
        group: the take.
        root: folder that its paths are relative to.
        footage: the usable files.
        offsets: frames by which cameras' files lag.
        min_exo_views: fewest exocentric views.
        usable: the criterion in words, such as ``on disk``.
        counts: gets the numbers before and after each filter.

    Raises:
        SourceError: an offset is given for a camera that the take does not have, or the videos of a take with files on
            clocks of their own were not opened.
    """
    listed = {view.cam for view in (*group.egos, *group.exos)}
    if not offsets.keys() <= listed:
        unknown = ", ".join(sorted(offsets.keys() - listed))
        raise SourceError(
            f"frame offset of {group.group_id}: no camera {unknown}, allowed: {', '.join(sorted(listed))}"
        )

    def usable_views(views: Iterable[View]) -> list[View]:
        found = [(view, footage.get(root / view.path)) for view in views]
        return [_with_facts(view, shot, group.lag_s is not None) for view, shot in found if shot is not None]

    egos = usable_views(group.egos)[:1]
    if not counts.keep("takes", f"ego video {usable}", bool(egos)):
        return None
    exos = usable_views(group.exos)
    for view in group.exos:
        counts.keep("exo views", usable, root / view.path in footage)
    if not counts.keep("takes", f"{min_exo_views} or more exo videos {usable}", len(exos) >= min_exo_views):
        return None
    cameras = {view.cam for view in (*egos, *exos)}
    kept = replace(
        group,
        egos=tuple(egos),
        exos=tuple(exos),
        frame_offset={camera: frames for camera, frames in offsets.items() if camera in cameras},
    )
    shots = [footage[root / view.path] for view in (*egos, *exos)]
    lengths_s = [shot.duration_s for shot in shots if shot.duration_s is not None]
    if not lengths_s and group.lag_s is not None:
        raise SourceError(f"{root}: rates and lengths of its videos differ: open the videos with --probe")
    if not lengths_s:
        return kept
    fps = shots[0].fps or group.fps
    if group.lag_s is None:
        return replace(kept, duration_s=min(lengths_s), fps=fps)
    return _on_own_clocks(kept, group.lag_s, fps, counts)


def _with_facts(view: View, shot: Footage, on_own_clock: bool) -> View:
    """Return a view with the facts of its file; rate and length only if they may differ from the take's."""
    view = replace(view, width=shot.width, height=shot.height)
    return replace(view, fps=shot.fps, duration_s=shot.duration_s) if on_own_clock else view


def _on_own_clocks(group: Group, lag_s: Mapping[str, float], fps: float, counts: FilterCounts) -> Group | None:
    """Return a take of files that differ in rate, length or start, with the seconds that all of them cover.

    Args:
        group: the take with its usable views; frame offsets that it has go before ``lag_s``.
        lag_s: seconds by which cameras' files lag, put into frame offsets here.
        fps: frames per second that the take is counted in, those of the egocentric file.
        counts: gets the number of takes whose files cover a second together.

    Returns:
        The take; None if its files have no frame in common.
    """
    views = (*group.egos, *group.exos)
    frames = {view.cam: round(lag_s[view.cam] * fps) for view in views if lag_s.get(view.cam)} | dict(
        group.frame_offset
    )
    begins_s = [-frames.get(view.cam, 0) / fps for view in views]
    ends_s = [begin + view.duration_s for begin, view in zip(begins_s, views, strict=True) if view.duration_s]
    begin_s, end_s = max(0.0, *begins_s), min(ends_s)
    if not counts.keep("takes", "of videos that overlap", end_s - begin_s >= 1 / fps):
        return None
    frames = {camera: offset for camera, offset in frames.items() if offset}
    return replace(group, frame_offset=frames, begin_s=begin_s, duration_s=end_s, fps=fps)
