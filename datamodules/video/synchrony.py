"""Compare the cameras of a take in time: which one is shifted, drifts or loses frames, beyond what chance explains.

Cameras that film the same person see motion at the same time, so their signals (see ``motion``) correlate at the lag by
which they are shifted. Each camera is compared with the mean of the others of its take. How high such a correlation
rises by chance is measured on controls, the same cameras compared with other takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from datamodules.video.motion import unit

Array = NDArray[np.float64]

SEGMENT_S = 5.0  # of a take, for offsets that change
MARGIN = 2.0  # standard deviations by which a correlation must exceed those of lags that are in sync


# --------------------------------------------------------------------------------------------------------------------
# correlation


def correlate(reference: Array, signal: Array, window: int, span: tuple[int, int] | None = None) -> Array:
    """Correlate two signals at lags up to a window, in standard deviations of what independent signals have.

    Args:
        reference: float64 [T], mean 0 and variance 1.
        signal: float64 [S], likewise.
        window: largest lag W.
        span: frames of the reference to compare; None for all.

    Returns:
        float64 [2 W + 1]: entry W + n compares frame t of the reference with frame t + n of the signal.
    """
    begin, end = span or (0, len(reference))
    padded = np.pad(signal, (window, window + max(0, end - len(signal))))
    products = np.correlate(padded[begin : end + 2 * window], reference[begin:end], "valid")
    lags = np.arange(-window, window + 1)
    overlap = np.minimum(end, len(signal) - lags) - np.maximum(begin, -lags)
    # Bartlett's formula: signals that change slowly have fewer independent values.
    spread = float(_autocorrelation(reference, window) @ _autocorrelation(signal, window))
    return np.asarray(products / np.sqrt(np.maximum(overlap, 1) * max(spread, 0.1)))


def _autocorrelation(signal: Array, window: int) -> Array:
    """Return the autocorrelation at lags from -W to W, float64 [2 W + 1]."""
    return np.asarray(np.correlate(np.pad(signal, window), signal, "valid") / len(signal))


def _noise_correlation(reference: Array, signal: Array, window: int) -> Array:
    """Return how far correlations by chance at two lags depend on each other, by the distance of the lags up to 2 W."""
    both = np.convolve(_autocorrelation(reference, window), _autocorrelation(signal, window))[2 * window :]
    return np.clip(both / max(float(both[0]), 0.1), 0.0, 1.0)


def _composite(signals: Sequence[Array], offsets: Sequence[int] | None = None) -> Array:
    """Return the mean of some cameras' signals on the clock of the take, float64 [T] of the shortest."""
    total = np.zeros(min(len(signal) for signal in signals))
    for signal, offset in zip(signals, offsets or [0] * len(signals), strict=True):
        shifted = signal[max(0, offset) :][: len(total) - max(0, -offset)]
        total[max(0, -offset) :][: len(shifted)] += shifted
    return unit(total)


@dataclass(frozen=True)
class ChangingOffset:
    """An offset that may change along a take.

    Attributes:
        kind: ``drift`` for a constant rate, ``jump`` for one change.
        first, last: offset in frames at the start and at the end.
        at: fraction of the take at which it jumps.
        score: correlation along the path in standard deviations.
        gain: by how much the score is above that of the best constant offset.
    """

    kind: str
    first: int
    last: int
    at: float
    score: float
    gain: float


def best_change(reference: Array, signal: Array, window: int, segments: int) -> ChangingOffset:
    """Find the changing offset at which two signals correlate best, from their correlation in equal segments."""
    edges = np.linspace(0, len(reference), segments + 1).astype(int)
    z = np.stack([correlate(reference, signal, window, (a, b)) for a, b in pairwise(edges)])
    z /= math.sqrt(segments)
    sums = np.concatenate([np.zeros((1, z.shape[1])), z.cumsum(axis=0)])
    constant = float(sums[-1].max())
    # One jump: the best lag before and after each edge between segments.
    before, after = sums[1:-1], sums[-1] - sums[1:-1]
    edge = int((before.max(axis=1) + after.max(axis=1)).argmax())
    lags = int(before[edge].argmax()) - window, int(after[edge].argmax()) - window
    score = float(before[edge].max() + after[edge].max())
    best = ChangingOffset("jump", *lags, float(edges[edge + 1] / len(reference)), score, score - constant)
    # A constant rate: all pairs of a first and a last lag.
    rows, share = np.arange(segments)[:, None], (np.arange(segments)[:, None] + 0.5) / segments
    first = np.arange(2 * window + 1)[None]
    for last in range(2 * window + 1):
        scores = z[rows, np.rint(first + share * (last - first)).astype(int)].sum(axis=0)
        if scores.max() > best.score:
            score = float(scores.max())
            best = ChangingOffset("drift", int(scores.argmax()) - window, last - window, 0.0, score, score - constant)
    return best


@dataclass(frozen=True)
class Chance:
    """Distribution of the highest of many correlations that arise by chance (Gumbel), fitted to controls."""

    location: float
    scale: float

    @classmethod
    def fit(cls, peaks: Sequence[float], counts: Sequence[int]) -> Chance:
        """Fit the distribution to the highest correlation of each control and the number of lags it was sought at."""
        scale = max(float(np.std(peaks)) * math.sqrt(6) / math.pi, 1e-3)
        location = float(np.mean(np.array(peaks) - scale * np.log(counts)))
        return cls(location - 0.5772 * scale, scale)

    def probability(self, peak: float, count: int) -> float:
        """Return the probability that chance reaches a peak at one of ``count`` lags."""
        expected = math.exp(min(50.0, (self.location + self.scale * math.log(count) - peak) / self.scale))
        return -math.expm1(-expected)


# --------------------------------------------------------------------------------------------------------------------
# takes


@dataclass(frozen=True)
class TakeFiles:
    """The cameras of a take: names, paths relative to the data root, and the offsets that the index knows."""

    group_id: str
    fps: float
    cams: tuple[str, ...]
    paths: tuple[str, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """Result for a camera.

    Attributes:
        group_id, cam, path: the camera; the first camera of a take is the egocentric one.
        verdict: ``in sync``, ``shifted``, ``drift``, ``jump``, or ``unclear`` if nothing is significant.
        offset: frames by which the file lags, with the offset that the index knows; the first one if it changes.
        last_offset: the same at the end of the take.
        change_s: second of the take at which it jumps.
        fps: frames per second.
        probability: that chance explains it; of the camera's correlation with the others if it is in sync or unclear.
        method: signal that was compared.
        rival: another camera that may be the shifted one instead, by as much in the other direction.
    """

    group_id: str
    cam: str
    path: str
    verdict: str
    offset: int
    last_offset: int
    change_s: float | None
    fps: float
    probability: float
    method: str
    rival: str | None = None

    def line(self) -> str:
        """Describe what was found and how to fix it."""
        found = f"{_frames(self.offset, self.fps)}"
        source = f"({self.method}, false alarm in {self.probability:.0e} of cases)"
        if self.verdict == "shifted" and self.rival:
            return (
                f"{self.path}: shifted by {found}, or {self.rival} by as much in the other direction {source}: compare "
                "the two, and write the frame offset of the one that is off"
            )
        if self.verdict == "shifted":
            return f"{self.path}: shifted by {found} {source}: build the index with this frame offset"
        change = f"from {found} to {_frames(self.last_offset, self.fps)}"
        if self.verdict == "jump":
            change += f" at about {self.change_s:.0f} s"
        return f"{self.path}: {self.verdict} {change} {source}: repair the file or leave out the camera"


def _frames(offset: int, fps: float) -> str:
    return f"{offset:+d} frames ({1000 * offset / fps:+.0f} ms)"


class Detector:
    """Compare the cameras of takes with each other, and with other takes as controls.

    Args:
        controls: signals of some takes by group_id, each of them on the clock of its take.
        method: name of the signals.
        fps: their values per second.
        window: largest shift that is looked for, in frames; at most a quarter of a take.
        tolerance: largest shift in frames that is in sync.
        false_alarms: probability of reporting a camera that is in sync.
    """

    def __init__(
        self,
        controls: Mapping[str, Sequence[Array]],
        method: str,
        fps: float,
        window: int = 60,
        tolerance: int = 3,
        false_alarms: float = 0.01,
    ) -> None:
        self._method, self._fps, self._window = method, fps, window
        self._tolerance, self._false_alarms = tolerance, false_alarms
        self._others = {group_id: _composite(signals) for group_id, signals in controls.items()}
        peaks: list[tuple[float, int]] = []
        scores: list[float] = []
        gains: list[float] = []
        counts: list[int] = []
        for group_id, signals in controls.items():
            window = self._window_of(signals)
            segments = self._segments(signals)
            for number, signal in enumerate(signals):
                rest = _composite([*signals[:number], *signals[number + 1 :]])
                # The same camera with itself elsewhere in time, and with other takes less what these have in common.
                rolled = [np.roll(signal, len(signal) * part // 6) for part in (2, 3, 4)]
                unrelated = [correlate(rest, other, window) for other in (*rolled, signal[::-1])]
                of_takes = self._control_correlations(signal, window, group_id)
                if len(of_takes) > 1:
                    total, count = of_takes.sum(axis=0), len(of_takes)
                    unrelated += [(z - (total - z) / (count - 1)) / math.sqrt(1 + 1 / (count - 1)) for z in of_takes]
                peaks += [(float(z.max()), len(z)) for z in unrelated]
                for other in (rolled[1], signal[::-1]) if segments else ():
                    change = best_change(rest, other, window, segments)
                    scores.append(change.score)
                    gains.append(change.gain)
                    counts.append(2 * window + 1)
        self._peak = Chance.fit(*zip(*peaks, strict=True))
        self._score = Chance.fit(scores, counts) if scores else None
        self._gain = Chance.fit(gains, counts) if scores else None

    def compare(self, take: TakeFiles, signals: Sequence[Array]) -> list[Finding]:
        """Compare the cameras of a take.

        Args:
            take: the cameras; the offsets that the index knows are part of the result.
            signals: of each camera, on the clock of the take by these offsets.

        Returns:
            The findings in the order of the cameras.
        """
        window, segments = self._window_of(signals), self._segments(signals)
        changes = self._find_changes(signals, window, segments) if self._score else {}
        steady = [number for number in range(len(signals)) if number not in changes]
        offsets, rivals = self._find_shifts(signals, steady, window, take.group_id)
        findings = []
        for number, (cam, path, known) in enumerate(zip(take.cams, take.paths, take.offsets, strict=True)):
            if number in changes:
                change, probability = changes[number]
                duration_s = min(len(signal) for signal in signals) / self._fps
                at_s = round(change.at * duration_s, 1) if change.kind == "jump" else None
                verdict, first, last, rival = change.kind, change.first, change.last, None
            else:
                z = self._evidence(signals, steady, number, offsets, window, take.group_id)
                near = np.abs(np.arange(-window, window + 1) - offsets[number]) <= self._tolerance
                probability = self._peak.probability(float(z[near].max()), len(z))
                first = last = int(np.where(near, z, -np.inf).argmax()) - window
                at_s, rival = None, take.cams[rivals[number]] if number in rivals else None
                if offsets[number]:
                    verdict = "shifted"
                elif probability <= self._false_alarms:
                    verdict, first, last = "in sync", 0, 0
                else:
                    verdict, first, last = "unclear", 0, 0
            findings.append(
                Finding(
                    group_id=take.group_id,
                    cam=cam,
                    path=path,
                    verdict=verdict,
                    offset=known + first,
                    last_offset=known + last,
                    change_s=at_s,
                    fps=take.fps,
                    probability=probability,
                    method=self._method,
                    rival=rival,
                )
            )
        return findings

    def _window_of(self, signals: Sequence[Array]) -> int:
        return max(1, min(self._window, min(len(signal) for signal in signals) // 4))

    def _segments(self, signals: Sequence[Array]) -> int:
        """Return the number of segments in which offsets are compared; 0 for a take that is too short."""
        segments = int(min(len(signal) for signal in signals) / (SEGMENT_S * self._fps))
        return segments if segments >= 3 else 0

    def _control_correlations(self, signal: Array, window: int, group_id: str) -> Array:
        """Return the correlations of a camera with all control takes but its own, float64 [takes, 2 W + 1]."""
        found = [
            correlate(unit(reference[: len(signal)]), signal, window)
            for name, reference in self._others.items()
            if name != group_id
        ]
        return np.array(found).reshape(len(found), 2 * window + 1)

    def _evidence(
        self,
        signals: Sequence[Array],
        steady: Sequence[int],
        number: int,
        offsets: Sequence[int],
        window: int,
        group_id: str,
    ) -> Array:
        """Return the correlation of a camera with the mean of the others, less what it has in common with any take."""
        rest = [other for other in steady if other != number]
        if not rest:
            return np.zeros(2 * window + 1)
        reference = _composite([signals[other] for other in rest], [offsets[other] for other in rest])
        z = correlate(reference, signals[number], window)
        controls = self._control_correlations(signals[number], window, group_id)
        if len(controls) < 2:
            return z
        return np.asarray((z - controls.mean(axis=0)) / math.sqrt(1 + 1 / len(controls)))

    def _find_shifts(
        self, signals: Sequence[Array], steady: Sequence[int], window: int, group_id: str
    ) -> tuple[list[int], dict[int, int]]:
        """Return an offset for each camera, and by camera another one that may be the shifted one instead.

        Cameras stay at the offset of the index unless that is refuted: in turn, the camera that gains most is moved.
        """
        offsets = [0] * len(signals)
        rivals: dict[int, int] = {}
        lags = np.arange(-window, window + 1)
        # Of two cameras either may be the one that is off; offsets are given by convention to the exocentric one.
        movable = steady if len(steady) > 2 else steady[1:]
        for _ in steady:
            moves: list[tuple[float, int, int]] = []
            for number in movable:
                z = self._evidence(signals, steady, number, offsets, window, group_id)
                peak = int(z.argmax())
                near = np.flatnonzero(np.abs(lags - offsets[number]) <= self._tolerance)
                if self._peak.probability(float(z[peak]), len(z)) > self._false_alarms or peak in near:
                    continue
                noise = _noise_correlation(signals[number], signals[number], window)
                gains = (z[peak] - z[near]) / np.sqrt(2 * (1 - noise[np.abs(near - peak)]) + 1e-3)
                if gains.min() > MARGIN:
                    moves.append((float(z[peak] - z[near].max()), number, int(lags[peak])))
            if not moves:
                break
            gain, best, offset = max(moves)
            moved = offset - offsets[best]
            for other_gain, other, other_offset in moves:
                opposite = abs(other_offset - offsets[other] + moved) <= self._tolerance
                if other != best and opposite and gain - other_gain < MARGIN / 2:
                    rivals[best] = other
            offsets[best] = offset
        for number in steady:
            if abs(offsets[number]) <= self._tolerance:
                offsets[number] = 0
        return offsets, rivals

    def _find_changes(
        self, signals: Sequence[Array], window: int, segments: int
    ) -> dict[int, tuple[ChangingOffset, float]]:
        """Return the changing offset of each camera that has one, with the probability of a false alarm."""
        found: dict[int, tuple[ChangingOffset, float]] = {}
        count = 2 * window + 1
        assert self._score is not None and self._gain is not None
        while segments and len(signals) - len(found) > 1:
            steady = [number for number in range(len(signals)) if number not in found]
            candidates: list[tuple[float, int, ChangingOffset, float]] = []
            for number in steady if len(steady) > 2 else steady[1:]:
                reference = _composite([signals[other] for other in steady if other != number])
                change = best_change(reference, signals[number], window, segments)
                probability = max(
                    self._score.probability(change.score, count), self._gain.probability(change.gain, count)
                )
                if probability <= self._false_alarms and abs(change.last - change.first) > self._tolerance:
                    candidates.append((change.gain, number, change, probability))
            if not candidates:
                break
            _, best, change, probability = max(candidates, key=lambda candidate: candidate[0])
            found[best] = (change, probability)
        return found
