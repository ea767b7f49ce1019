"""Sample the same moments from every view of a take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datamodules.video.convert import RGB, Fit
    from datamodules.video.reader import Clip, ClipReader


def segment_midpoints(start_s: float, end_s: float, num_frames: int) -> np.ndarray:
    """Return the middles of ``num_frames`` equal parts of a span, ``start + (i + 0.5) (end - start) / n``.

    Args:
        start_s: start of the span in seconds.
        end_s: its end.
        num_frames: N, at least 1.

    Returns:
        float64 [N], seconds, ascending, strictly inside the span.

    Raises:
        ValueError: ``num_frames`` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, allowed: 1 or more")
    return start_s + (np.arange(num_frames, dtype=np.float64) + 0.5) * ((end_s - start_s) / num_frames)


def read_views(
    reader: ClipReader,
    paths: Mapping[str, Path],
    start_s: float,
    end_s: float,
    num_frames: int,
    size: int,
    fit: Fit,
    offsets_s: Mapping[str, float] | None = None,
    pad_rgb: RGB | None = None,
) -> dict[str, Clip]:
    """Read the same moments from every view of a take.

    All views are sampled at the same take times, so views of equal frame rate and offset carry equal frame numbers.
    If the span ends less than one frame past the shortest view, it ends with that view for all of them.

    Args:
        reader: this process's reader.
        paths: video file of each view.
        start_s: start of the span in seconds on the take's clock.
        end_s: its end, not included; infinity stands for the end of the shortest view.
        num_frames: N, at the middles of N equal parts of the span.
        size: side of the square output in pixels.
        fit: how frames are made square, see ``ClipReader.read``.
        offsets_s: take time at which each view's file begins, 0 where a view is not named.
        pad_rgb: colour of the padding, CLIP's mean colour by default.

    Returns:
        One clip of N frames per view, under the keys of ``paths``; times on each file's own clock.

    Raises:
        ClipDecodeError: a view could not be read; the span in the message is on that file's clock.
        ValueError: ``num_frames``, ``size`` or ``fit`` is not usable.
    """
    shifts_s = {view: (offsets_s or {}).get(view, 0.0) for view in paths}
    common_end_s = end_s
    for view, path in paths.items():
        shift_s = shifts_s[view]
        usable_end_s = reader.usable_end_s(path, start_s - shift_s, end_s - shift_s) + shift_s
        common_end_s = min(common_end_s, usable_end_s)
    times_s = segment_midpoints(start_s, common_end_s, num_frames)
    clips = {}
    for view, path in paths.items():
        shift_s = shifts_s[view]
        span_s = (start_s - shift_s, end_s - shift_s)
        clips[view] = reader.read(path, times_s - shift_s, size, fit, span_s, pad_rgb)
    return clips
