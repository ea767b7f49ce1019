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
        return path.stat().st_size if path.is_file() else 0
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
        SourceError: an offset is given for a camera that the take does not have.
    """
    listed = {view.cam for view in (*group.egos, *group.exos)}
    if not offsets.keys() <= listed:
        unknown = ", ".join(sorted(offsets.keys() - listed))
        raise SourceError(
            f"frame offset of {group.group_id}: no camera {unknown}, allowed: {', '.join(sorted(listed))}"
        )

    def with_sizes(views: Iterable[View]) -> list[View]:
        found = [(view, footage.get(root / view.path)) for view in views]
        return [replace(view, width=shot.width, height=shot.height) for view, shot in found if shot is not None]

    egos = with_sizes(group.egos)[:1]
    if not counts.keep("takes", f"ego video {usable}", bool(egos)):
        return None
    exos = with_sizes(group.exos)
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
    lengths_s = [shot.num_frames / shot.fps for shot in shots if shot.num_frames is not None and shot.fps is not None]
    if not lengths_s:
        return kept
    return replace(kept, duration_s=min(lengths_s), fps=shots[0].fps or group.fps)
