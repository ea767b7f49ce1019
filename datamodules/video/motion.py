"""Reduce a video to a signal of how much moves, or sounds, over time: a value for each frame of a common clock."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from datamodules.io.parallel import Beat
from datamodules.video.errors import Damaged, NotAVideo, NoTimes, error_text
from datamodules.video.media import open_input
from datamodules.video.probe import file_stamp, open_video

Array = NDArray[np.float64]

HIGH_PASS_S = 1.0
SMOOTH_S = 0.13  # the frames between two P-frames at 30 per second, whose sizes depend on each other
MIN_MEMBERS = 12  # frames of a kind whose median size is subtracted
_SIDE = 64  # pixels
_BLOCKS_PER_S = 200  # of sound


def read_signal(path: Path, method: str, fps: float, beat: Beat = lambda: None) -> Array:
    """Read the motion or sound of a file over time.

    Args:
        path: video file.
        method: a key of ``METHODS``.
        fps: values per second.
        beat: called on progress.

    Returns:
        float64 [T], from the first displayed frame on, without slow changes and outliers; mean 0 and variance 1.

    Raises:
        ClipDecodeError: the file is not a video, is damaged, or has no such signal.
    """
    try:
        return _standardised(METHODS[method](path, fps, beat), fps)
    except av.error.FFmpegError as error:
        raise Damaged(error_text(error), path) from error


def _packets(path: Path, fps: float, beat: Beat) -> Array:
    """Return the log size of each frame's packet relative to packets of its kind, without decoding.

    Encoders repeat a pattern of key frames, B-frames and others that differ in size, and files encoded alike repeat it
    at the same frames: their sizes correlate at lag 0 whatever they show. So key frames are interpolated, and from the
    others the median size of frames of the same kind with the same neighbours is subtracted.
    """
    name = os.fspath(path)
    video = open_video(name, file_stamp(name))
    rows = []
    with video.container as container:
        for packet in container.demux(video.stream):
            time = packet.dts if video.in_order_only else packet.pts
            if time is None or packet.is_discard or not packet.size:
                continue
            rows.append((video.time_s(time), packet.size, packet.is_keyframe, packet.is_disposable))
            beat()
    # In the order of display; a frame displayed before one that came earlier in the file is a B-frame.
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    latest_s = np.concatenate([[-math.inf], np.maximum.accumulate(table[:, 0])[:-1]])
    kind = np.where(table[:, 2] > 0, 4, 2 * (table[:, 0] < latest_s) + table[:, 3]).astype(int)
    order = np.argsort(table[:, 0], kind="stable")
    times_s, log_size, kind = table[order, 0], np.log(table[order, 1]), kind[order]
    is_key = kind == 4
    if np.count_nonzero(~is_key) < 2:
        raise NoTimes("it has key frames only, whose sizes show no motion", path)
    around = 10 * np.concatenate([[5], kind[:-1]]) + np.concatenate([kind[1:], [5]])
    for one in np.unique(kind[~is_key]):
        values, counts = np.unique(around[kind == one], return_counts=True)
        common = np.isin(around, values[counts >= MIN_MEMBERS])
        rest = (kind == one) & ~common
        for value in values[counts >= MIN_MEMBERS]:
            members = (kind == one) & (around == value)
            log_size[members] -= np.median(log_size[members])
        if rest.any():
            log_size[rest] -= np.median(log_size[rest])
    return _resampled(times_s[~is_key], log_size[~is_key], float(times_s[-1]), fps)


def _motion(path: Path, fps: float, beat: Beat) -> Array:
    """Return the log of the mean absolute difference between successive frames, 64x64 and grey."""
    name = os.fspath(path)
    video = open_video(name, file_stamp(name), thorough=True)
    video.codec.options = {**video.codec.options, "skip_loop_filter": "all"}
    times_s: list[float] = []
    energy: list[float] = []
    before: NDArray[np.int16] | None = None
    with video.container as container:
        for frame in container.decode(video.stream):
            small = frame.reformat(width=_SIDE, height=_SIDE, format="gray", interpolation="AREA")
            pixels = small.to_ndarray().astype(np.int16)
            if before is not None and frame.pts is not None:
                times_s.append(video.time_s(frame.pts))
                energy.append(float(np.abs(pixels - before).mean()))
            before = pixels
            beat()
    if len(energy) < 2:
        raise NotAVideo("it has fewer than three frames", path)
    return _resampled(np.array(times_s), np.log(np.array(energy) + 0.05), times_s[-1], fps)


def _sound(path: Path, fps: float, beat: Beat) -> Array:
    """Return by how much the log loudness of the first sound track rises from frame to frame."""
    name = os.fspath(path)
    video = open_video(name, file_stamp(name))
    start_s = video.start_tick * video.tick_s
    video.container.close()
    times_s: list[float] = []
    power: list[float] = []
    with open_input(name) as container:
        if not container.streams.audio:
            raise NotAVideo("the file has no sound", path)
        for frame in container.decode(container.streams.audio[0]):
            if frame.time is None:
                continue
            samples = frame.to_ndarray()
            values = samples.astype(np.float64)
            if samples.dtype.kind == "i":
                values /= 2.0 ** (8 * samples.itemsize - 1)
            if not frame.format.is_planar:
                values = values.reshape(-1, len(frame.layout.channels)).T
            # The loudness of a video frame is the mean of several short blocks.
            count = max(1, round(_BLOCKS_PER_S * frame.samples / frame.sample_rate))
            blocks = np.array_split(values.mean(axis=0), count)
            length_s = frame.samples / frame.sample_rate / len(blocks)
            times_s += [frame.time - start_s + (number + 0.5) * length_s for number in range(len(blocks))]
            power += [float(np.square(block).mean()) for block in blocks]
            beat()
    if not power:
        raise NotAVideo("the sound track is empty", path)
    bins = np.floor(np.array(times_s) * fps).astype(int)
    inside = bins >= 0
    loudness = np.bincount(bins[inside], np.array(power)[inside]) / np.maximum(np.bincount(bins[inside]), 1)
    return np.maximum(np.diff(np.log(loudness + 1e-8), prepend=math.log(loudness[0] + 1e-8)), 0.0)


def _resampled(times_s: Array, values: Array, end_s: float, fps: float) -> Array:
    order = np.argsort(times_s, kind="stable")
    grid_s = np.arange(math.floor(end_s * fps + 1e-6) + 1) / fps
    return np.interp(grid_s, times_s[order], values[order])


def _standardised(signal: Array, fps: float) -> Array:
    """Return a signal without slow changes and outliers, slightly smoothed, with mean 0 and variance 1."""
    smooth = _running_mean(signal, max(1, round(SMOOTH_S * fps)))
    fast = smooth - _running_mean(smooth, max(3, round(HIGH_PASS_S * fps)))
    centred = fast - np.median(fast)
    limit = 4.5 * float(np.median(np.abs(centred))) + 1e-9  # three standard deviations of what is normal
    return unit(np.clip(centred, -limit, limit))


def _running_mean(signal: Array, width: int) -> Array:
    width = min(width, len(signal))
    padded = np.pad(signal, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1.0 / width), "valid")


def unit(signal: Array) -> Array:
    """Return a signal with mean 0 and variance 1; zeros for one that is constant."""
    centred = signal - signal.mean()
    return np.asarray(centred / (centred.std() + 1e-9))


METHODS: dict[str, Callable[[Path, float, Beat], Array]] = {"packets": _packets, "motion": _motion, "sound": _sound}
"""Signals by name, in order of cost."""
