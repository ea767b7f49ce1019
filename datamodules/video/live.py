"""Frames of a camera, a stream or a file as if live: a window of the last seconds, decoded by a thread.

Nothing waits for the user of the frames: those that are not fetched in time are dropped. Nothing waits for the decoder
either: when it falls behind, it decodes key frames alone until it has caught up.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from datamodules.video.convert import PAD_RGB, RGB, Fit, FrameConverter
from datamodules.video.errors import ClipDecodeError, Damaged, FileMissing, NotAVideo, NoVideoStream, error_text
from datamodules.video.media import open_input
from datamodules.video.sampling import segment_midpoints

_TIMEOUT_S = 10.0
"""Longest time that opening a stream, or a single read, may take."""
_ANALYSED_US = 500_000
"""Microseconds of a stream that are read before its first frame."""
_BEHIND_S = 1.0
"""Lag of the decoder above which frames are skipped until it has caught up."""
_DENSITY = 32
"""Frames kept for each frame of a clip, at most; those closer together are dropped."""
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}


class LiveStopped(ClipDecodeError):
    """The source broke off: an error of the network, the device or the file."""

    fix = "check the source and start again"


def check_window(every_s: float, window_s: float) -> None:
    """Check the times of a ``LiveReader``.

    Raises:
        ValueError: ``every_s`` is not above 0, or ``window_s`` is below it.
    """
    if not 0 < every_s < math.inf:
        raise ValueError(f"every: got {every_s}, allowed: above 0 seconds")
    if not every_s <= window_s < math.inf:
        raise ValueError(f"window: got {window_s}, allowed: {every_s} (every) or more seconds")


@dataclass(frozen=True)
class Window:
    """Frames of a span of a live source.

    Attributes:
        start_s, end_s: the span, in seconds after the first frame.
        frames: uint8 [N, S, S, 3], at the middles of N equal parts of the span.
        ended: ``time.monotonic()`` at the end of the span, as seconds pass at the source.
        dropped: frames since the window before that are in no window, or were not decoded.
    """

    start_s: float
    end_s: float
    frames: Tensor
    ended: float
    dropped: int


class _Kept(NamedTuple):
    """A frame of the buffer: its time in seconds, how many frames came before it, and uint8 [S, S, 3]."""

    time_s: float
    number: int
    pixels: np.ndarray


class LiveReader:
    """Reader of the newest window of a source, which decodes in a thread of its own.

    Args:
        source: number of a camera, such as ``0``; device or address (``rtsp://...``, ``rtmp://...``) that FFmpeg
            opens; or a file, whose frames come at the pace at which they are displayed.
        every_s: windows end at multiples of it.
        window_s: length of a window, at least ``every_s``; the first ones may be shorter.
        num_frames: N, frames of a window.
        size: side of the square frames in pixels.
        fit: how frames are made square, see ``ClipReader.read``.
        pad_rgb: colour of the padding.

    Raises:
        ValueError: see ``check_window``.
    """

    def __init__(
        self,
        source: str | int | Path,
        every_s: float,
        window_s: float,
        num_frames: int,
        size: int,
        fit: Fit = "pad",
        pad_rgb: RGB | None = None,
    ) -> None:
        check_window(every_s, window_s)
        self.source, self.every_s, self.window_s, self.num_frames = str(source), every_s, window_s, num_frames
        self._square = (size, fit, pad_rgb or PAD_RGB)
        self._gap_s = window_s / (_DENSITY * num_frames)
        self._change = threading.Condition()
        self._stopped = False
        # Written by the thread.
        self._kept: deque[_Kept] = deque()
        self._first_s = self._newest_s = self._end_s = 0.0
        self._received = self._skipped = 0
        self._offset_s = math.inf
        self._over = False
        self._error: ClipDecodeError | None = None
        # Of the window before.
        self._last_end_s, self._fetched, self._skipped_before = 0.0, 0, 0
        self._thread = threading.Thread(target=self._run, name=f"live {self.source}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, which closes the source. A thread that waits for the network ends within 10 s."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join(1.0)

    # ----------------------------------------------------------------------------------------------------- the windows

    def next_window(self) -> Window | None:
        """Wait for the newest window that ends after the one before.

        A rest at the end that is shorter than half of ``every_s`` belongs to no window, unless there was none.

        Returns:
            The window; None when the source has ended.

        Raises:
            ClipDecodeError: the source cannot be opened, or broke off.
        """
        due_s = self._last_end_s + self.every_s
        with self._change:
            self._change.wait_for(lambda: self._over or self._newest_s >= due_s)
            if self._newest_s >= due_s:
                end_s = max(due_s, math.floor(self._newest_s / self.every_s + 1e-6) * self.every_s)
            elif self._error is not None:
                raise self._error
            elif self._received and self._end_s - self._last_end_s >= (self.every_s / 2 if self._last_end_s else 0):
                end_s = self._end_s
            else:
                return None
            return self._window(end_s)

    def _window(self, end_s: float) -> Window:
        start_s = max(0.0, end_s - self.window_s)
        kept = list(self._kept)
        chosen = []
        for time_s in segment_midpoints(start_s, end_s, self.num_frames).tolist():
            # The last frame displayed by then; times are rounded, as in ``ClipReader``.
            shown = [frame for frame in kept if frame.time_s <= time_s + 1e-3]
            chosen.append((shown or kept)[-1 if shown else 0].pixels)
        first = next((frame.number for frame in kept if frame.time_s >= start_s - 1e-3), self._received)
        after = next((frame.number for frame in kept if frame.time_s >= end_s - 1e-3), self._received)
        dropped = max(0, first - self._fetched) + self._skipped - self._skipped_before
        self._last_end_s, self._fetched, self._skipped_before = end_s, after, self._skipped
        return Window(start_s, end_s, torch.from_numpy(np.stack(chosen)), self._offset_s + end_s, dropped)

    # ------------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._read()
        except ClipDecodeError as error:
            self._error = type(error)(error.reason, self.source)
        except (av.error.FFmpegError, OSError) as error:
            late = isinstance(error, av.error.ExitError)
            reason = f"nothing came within {_TIMEOUT_S:g} s" if late else error_text(error)
            self._error = _error_kind(error, bool(self._received))(reason, self.source)
        finally:
            with self._change:
                self._over = True
                self._change.notify_all()

    def _read(self) -> None:
        container, is_file = _open(self.source)
        with container:
            if not container.streams.video:
                raise NoVideoStream("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # threads that decode different frames would delay all of them
            converters: dict[tuple[int, int, str], FrameConverter] = {}
            aspect = float(stream.sample_aspect_ratio or 1)
            for frame in self._decode(container, stream):
                time_s = self._time_s(frame)
                if is_file and self._wait_until(time_s):
                    return
                key = (frame.width, frame.height, frame.format.name)
                if key not in converters:
                    converters = {key: FrameConverter(*key, aspect, *self._square)}
                self._keep(frame, time_s, converters[key])
                lag_s = time.monotonic() - self._offset_s - time_s
                if lag_s > _BEHIND_S:
                    stream.codec_context.skip_frame = "NONKEY"
                elif lag_s < _BEHIND_S / 2:
                    stream.codec_context.skip_frame = "DEFAULT"
            if not self._received and not self._stopped:
                raise Damaged("it ended before its first frame")
            if is_file:  # its last frame is shown until then
                self._wait_until(self._end_s)

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Decode until the source ends or the reader is closed, and count frames that are skipped."""
        for packet in container.demux(stream):
            try:
                frames: list[VideoFrame] = packet.decode()
            except av.error.InvalidDataError:  # such as the first packets of a stream that began earlier
                frames = []
            if self._stopped:
                return
            if packet.size and not frames and stream.codec_context.skip_frame == "NONKEY":
                self._skipped += 1
            yield from frames

    def _time_s(self, frame: VideoFrame) -> float:
        """Return the time of a frame after the first one."""
        if frame.time is None:
            raise Damaged("its frames have no times")
        if not self._received:
            self._first_s = frame.time
        time_s = frame.time - self._first_s
        if time_s < self._newest_s:
            raise LiveStopped(f"its times run backwards, from {self._newest_s:.3f} s to {time_s:.3f} s")
        return time_s

    def _wait_until(self, time_s: float) -> bool:
        """Wait until a frame of a file is due; return True if the reader was closed meanwhile."""
        if not self._received:
            self._offset_s = time.monotonic()
        with self._change:
            left_s = self._offset_s + time_s - time.monotonic()
            return self._change.wait_for(lambda: self._stopped, left_s) if left_s > 0 else self._stopped

    def _keep(self, frame: VideoFrame, time_s: float, converter: FrameConverter) -> None:
        pixels = None
        if not self._kept or time_s - self._kept[-1].time_s >= self._gap_s:
            size = self._square[0]
            pixels = np.empty((size, size, 3), dtype=np.uint8)
            converter.write(frame, pixels)
        with self._change:
            # The frame that came with the least delay tells when time began at the source.
            self._offset_s = min(self._offset_s, time.monotonic() - time_s)
            if pixels is not None:
                self._kept.append(_Kept(time_s, self._received, pixels))
            self._received += 1
            # A frame is shown as long as the one before it was.
            self._end_s = time_s + (time_s - self._newest_s)
            self._newest_s = time_s
            while len(self._kept) > 1 and self._kept[1].time_s < time_s - self.window_s - self.every_s:
                self._kept.popleft()
            self._change.notify_all()


def _error_kind(error: Exception, has_begun: bool) -> type[ClipDecodeError]:
    if isinstance(error, FileNotFoundError) and not has_begun:
        return FileMissing
    if isinstance(error, av.error.InvalidDataError) and not has_begun:
        return NotAVideo
    return LiveStopped


def _open(source: str) -> tuple[InputContainer, bool]:
    """Open a source; return True for a file, whose frames wait until they are due."""
    if source.isdecimal():
        if sys.platform not in _CAMERAS:
            raise FileMissing("cameras have no numbers here: name a device that FFmpeg opens")
        device_format, name = _CAMERAS[sys.platform]
        return av.open(name.format(source), "r", format=device_format, timeout=_TIMEOUT_S), False
    if source.startswith("/dev/"):
        return av.open(source, "r", format="v4l2", timeout=_TIMEOUT_S), False
    if "://" in source:
        options = {"analyzeduration": str(_ANALYSED_US), "fpsprobesize": "0"}
        if source.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        return av.open(source, "r", options=options, timeout=_TIMEOUT_S), False
    return open_input(source), True
