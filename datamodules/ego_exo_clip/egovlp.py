"""The clip rule of EgoVLP (arXiv 2206.01670): the seconds around a narration that are trained with it.

With ``beta`` the mean gap between one annotator's narrations of a take, and ``alpha`` the mean of those gaps over the
training split, a clip is ``beta / alpha`` seconds centred on its narration: about one second, less for an annotator who
wrote densely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from datamodules.io.annotations import SourceError


def mean_gap_s(times_s: Sequence[float]) -> float | None:
    """Return the mean seconds between one annotator's narrations of one take, in any order: beta.

    None if it is undefined: fewer than two narrations, or all at one time.
    """
    if len(times_s) < 2 or min(times_s) == max(times_s):
        return None
    return (max(times_s) - min(times_s)) / (len(times_s) - 1)


def fit_alpha(tracks: Iterable[Sequence[float]]) -> float:
    """Return the mean over tracks of their mean gap in seconds: alpha. Fit it on training takes.

    Args:
        tracks: narration times in seconds, one sequence per annotator and take. Two annotators of a take stay separate:
            merging them would halve the gap of that take alone. Tracks without a gap are left out.

    Raises:
        SourceError: no track has a gap.
    """
    gaps = [gap for track in tracks if (gap := mean_gap_s(track)) is not None]
    if not gaps:
        raise SourceError(
            "annotations: no annotator of a take has two different timestamps, so alpha cannot be fitted: pass alpha"
        )
    return math.fsum(gaps) / len(gaps)


def clip_length_s(gap_s: float | None, alpha: float | None) -> float:
    """Return the length of a clip in seconds, ``beta / alpha``.

    Args:
        gap_s: the annotator's ``mean_gap_s`` (beta); None stands for alpha, a one-second clip.
        alpha: ``fit_alpha`` of the training split, seconds, above 0.

    Raises:
        ValueError: alpha is not above 0.
    """
    if alpha is None or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha}, allowed: above 0")
    return 1.0 if gap_s is None else gap_s / alpha


def expand_window(
    time_s: float,
    length_s: float,
    duration_s: float,
    fps: float,
    scale: float = 1.0,
    min_clip_s: float = 0.0,
    max_clip_s: float | None = None,
) -> tuple[float, float]:
    """Return start and end in seconds of the clip around one narration.

    The scaled and bounded length is centred on the narration and cut to the take. If less than ``min_clip_s`` or one
    frame is left, the clip is widened to that, staying inside the take.

    Args:
        time_s: the narration's time, within [0, duration_s].
        length_s: length before scaling.
        duration_s: the take's length.
        fps: the take's frame rate.
        scale: factor on the length.
        min_clip_s: shortest clip; at least a frame in any case.
        max_clip_s: longest clip; None for no limit.

    Raises:
        ValueError: ``time_s`` is outside the take, or ``max_clip_s`` shorter than a frame.
    """
    if not 0 <= time_s <= duration_s:
        raise ValueError(f"time_s={time_s} is outside the take, [0, {duration_s}] s")
    shortest_s = max(min_clip_s, 1 / fps)
    length_s *= scale
    if max_clip_s is not None:
        if max_clip_s < shortest_s:
            raise ValueError(f"max_clip_s: got {max_clip_s}, allowed: {shortest_s:.4g} s, a frame, or more")
        length_s = min(length_s, max_clip_s)
    start_s, end_s = max(0.0, time_s - length_s / 2), min(duration_s, time_s + length_s / 2)
    if end_s - start_s < shortest_s:
        start_s = max(0.0, min(time_s - shortest_s / 2, duration_s - shortest_s))
        end_s = min(duration_s, start_s + shortest_s)
    return start_s, end_s
