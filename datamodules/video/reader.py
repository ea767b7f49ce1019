"""Random access to video files: the exact frames at given times, small and uint8, without decoding more than needed.

A folder of images is a video too: ``IMAGES_FPS`` images a second in the natural order of their names (2 before 10),
only those that end in ``-rgb`` if there are any (OpenEQA stores depth next to them). So is a single image.

Shapes: ``N`` frames of one clip, ``size`` the side of the square output frame in pixels.

Times are seconds on the file's own clock, 0 being its first displayed frame. The frame for time t is the last one
displayed at or before t, with a tolerance of a tenth of a frame (at most 1 ms) because annotations are rounded
decimals. The frames returned are identical to those of decoding the file from its start; a clip that cannot be decoded
without damage raises a ``ClipDecodeError``, it is never patched up with repeated or concealed frames.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar, cast

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from datamodules.video.convert import FITS, PAD_RGB, RGB, Fit, FrameConverter
from datamodules.video.decode import (
    NeedsFullDecode,
    choose_frames,
    decode_in_order,
    decode_packets,
    decode_segments,
    demux_span,
    split_at_key_frames,
    take_until,
)
from datamodules.video.errors import (
    ClipDecodeError,
    Damaged,
    EmptySpan,
    FrameMissing,
    SpanOutsideFile,
    TimedOut,
    error_text,
)
from datamodules.video.images import IMAGES_FPS, ImageFolder, is_image, list_images
from datamodules.video.probe import OpenVideo, file_stamp, last_frame_end_s, open_video

Result = TypeVar("Result")
_MAX_CONVERTERS = 32


@dataclass(frozen=True)
class Clip:
    """Frames of one file.

    Attributes:
        frames: uint8 [N, size, size, 3], contiguous, RGB.
        times_s: float64 [N], when each frame is displayed, on the file's clock (0 = first displayed frame).
        frame_numbers: int64 [N], presentation index, ``round(time * average_rate)``: exact for files of constant
            frame rate, an estimate otherwise. Equal numbers mean that the same frame was asked for twice.
    """

    frames: Tensor
    times_s: np.ndarray
    frame_numbers: np.ndarray


class ClipReader:
    """Reader of exact frames that keeps the most recently used files open.

    Make one per process and use it from one thread. A reader may be pickled or inherited by a forked process:
    it then starts again with no open files.
    """

    def __init__(self, max_open: int = 16, timeout_s: float | None = None) -> None:
        """Open nothing yet.

        Args:
            max_open: files kept open, at 5-25 MB each depending on the frame size.
            timeout_s: longest time that one call may take, None for no limit. With a limit, calls run in a thread of
                the reader's. A call that hangs in the operating system or in the decoder cannot be stopped: its thread
                is left behind with the files that were open, and the reader starts again without them.

        Raises:
            ValueError: ``max_open`` is below 1, or ``timeout_s`` is not above 0.
        """
        if max_open < 1:
            raise ValueError(f"max_open: got {max_open}, allowed: 1 or more")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s: got {timeout_s}, allowed: above 0 seconds, or None")
        self.max_open, self.timeout_s = max_open, timeout_s
        self._files = _OpenFiles(max_open)
        self._thread: _CallThread | None = None

    def __reduce__(self) -> tuple[type[ClipReader], tuple[int, float | None]]:
        """Pickle the settings only: open files belong to one process."""
        return ClipReader, (self.max_open, self.timeout_s)

    def close(self) -> None:
        """Close every file and end the reader's thread. The reader stays usable."""
        self._files.close()
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def read(
        self,
        path: str | os.PathLike[str],
        times_s: Sequence[float] | np.ndarray,
        size: int,
        fit: Fit = "pad",
        span_s: tuple[float, float] | None = None,
        pad_rgb: RGB | None = None,
    ) -> Clip:
        """Read the frames displayed at the given times.

        A time up to one frame past the end of the file gives its last frame.

        Args:
            path: video file, image, or folder of images.
            times_s: N times in seconds on the file's clock, in any order; several may fall on one frame.
            size: side of the square output in pixels.
            fit: ``pad`` scales the whole frame to fit and centres it on ``pad_rgb`` (its short side rounded to
                an even number of pixels when ``size`` is even), ``crop`` cuts the central square, ``squash``
                ignores the aspect ratio. The file's rotation is applied.
            span_s: (start, end) that the times were drawn from, for error messages; their range by default.
            pad_rgb: colour of the padding, 0-255: the mean colour of the vision encoder, CLIP's by default.

        Returns:
            The clip, frames in the order of ``times_s``.

        Raises:
            ClipDecodeError: one of its subclasses; the file is closed and opened again by the next read.
            ValueError: ``size`` or ``fit`` is not usable.
        """
        if size < 1 or fit not in FITS:
            raise ValueError(f"size {size!r}, fit {fit!r}: size must be a positive number and fit one of {FITS}")
        times = np.asarray(times_s, dtype=np.float64).ravel().tolist()
        if not times or not all(map(math.isfinite, times)):
            raise EmptySpan(f"cannot read frames at times {times}", path, *(span_s or (None, None)))
        span_s = span_s or (min(times), max(times))
        return self._bounded(
            path, span_s, lambda files: files.read(os.fspath(path), times, _Square(size, fit, pad_rgb or PAD_RGB))
        )

    def usable_end_s(self, path: str | os.PathLike[str], start_s: float, end_s: float) -> float:
        """Check a span against the file and clamp an end that lies less than one frame past it.

        Args:
            path: video file, image, or folder of images.
            start_s: start of the span in seconds on the file's clock.
            end_s: its end; infinity stands for the end of the file.

        Returns:
            ``end_s``, or the end of the file if that comes first.

        Raises:
            EmptySpan: the end is not after the start.
            SpanOutsideFile: the start is negative, or start or end lie too far past the end of the file.
            ClipDecodeError: the file cannot be opened.
        """
        if not (math.isfinite(start_s) and end_s > start_s):
            raise EmptySpan("the end must come after the start", path, start_s, end_s)
        return self._bounded(path, (start_s, end_s), lambda files: files.usable_end_s(os.fspath(path), start_s, end_s))

    def _bounded(
        self, path: str | os.PathLike[str], span_s: tuple[float, float], call: Callable[[_OpenFiles], Result]
    ) -> Result:
        """Call with the open files, within the time limit; errors name path and span."""
        try:
            return call(self._files) if self.timeout_s is None else self._call_in_thread(call, self.timeout_s)
        except (ClipDecodeError, av.error.FFmpegError) as error:
            self._files.drop(os.fspath(path))
            if isinstance(error, ClipDecodeError):
                raise type(error)(error.reason, path, *span_s) from error.__cause__
            raise Damaged(error_text(error), path, *span_s) from error

    def _call_in_thread(self, call: Callable[[_OpenFiles], Result], timeout_s: float) -> Result:
        if self._thread is None or self._thread.pid != os.getpid():  # a forked process inherits no threads
            self._thread = _CallThread()
        files, thread = self._files, self._thread
        thread.calls.put(lambda: call(files))
        outcome = None
        try:
            outcome = thread.outcomes.get(timeout=timeout_s)
        except Empty:
            raise TimedOut(f"no answer within {timeout_s:g} s") from None
        finally:
            if outcome is None:  # too late, or Ctrl-C: leave thread and files to each other
                thread.calls.put(files.close)
                thread.stop()
                self._thread, self._files = None, _OpenFiles(self.max_open)
        result, error = outcome
        if error is not None:
            raise error
        return cast(Result, result)


class _CallThread:
    """Daemon thread that runs one call after another, so that its user can stop waiting for one that hangs.

    Attributes:
        pid: process of the thread.
        calls: functions without arguments, run in order; None ends the thread.
        outcomes: result and error of each call.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.outcomes: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        thread = threading.Thread(target=_run_calls, args=(self.calls, self.outcomes), name="clip reader", daemon=True)
        thread.start()
        # The thread holds its queues only, so it ends with the reader that owns this object.
        self.stop = weakref.finalize(self, self.calls.put, None)


def _run_calls(
    calls: SimpleQueue[Callable[[], object] | None], outcomes: SimpleQueue[tuple[object, BaseException | None]]
) -> None:
    for call in iter(calls.get, None):
        try:
            outcome: tuple[object, BaseException | None] = (call(), None)
        except BaseException as error:
            outcome = (None, error)
        outcomes.put(outcome)
        del call, outcome  # keep no frames or files alive while waiting for the next call


class _Square(NamedTuple):
    """Form of the frames that a call returns."""

    size: int
    fit: Fit
    pad_rgb: RGB


class _OpenFiles:
    """Open videos with their decoders and scalers, used by one thread at a time."""

    _images: ImageFolder | None  # the folder that was used last

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._forget()

    def close(self) -> None:
        for video in self._videos.values():
            video.container.close()
        self._forget()

    def drop(self, name: str) -> None:
        if self._images is not None and self._images.path == name:
            self._images = None
        video = self._videos.pop(name, None)
        if video is not None:
            video.container.close()

    def read(self, name: str, times: list[float], square: _Square) -> Clip:
        if os.path.isdir(name) or is_image(name):
            return self._read_images(self._list(name), times, square)
        video = self._open(name)
        limits = [video.last_tick_shown_by(time_s) for time_s in times]
        if min(limits) < video.start_tick:
            raise SpanOutsideFile(f"{min(times):.3f} s is before the first frame at 0 s")
        return self._read_limits(video, limits, square)

    def usable_end_s(self, name: str, start_s: float, end_s: float) -> float:
        if os.path.isdir(name) or is_image(name):
            file_end_s, frame_s = self._list(name).end_s, 1 / IMAGES_FPS
        else:
            video = self._open(name)
            file_end_s, frame_s = video.header_end_s, video.frame_s
            if end_s > file_end_s:  # headers of variable-rate files may fall short of the last frame
                file_end_s = max(file_end_s, last_frame_end_s(video))
        if start_s < -min(1e-3, 0.1 * frame_s):
            raise SpanOutsideFile("the span begins before the first frame at 0 s")
        if start_s >= file_end_s or file_end_s + frame_s < end_s < math.inf:
            raise SpanOutsideFile(f"the video ends at {file_end_s:.3f} s")
        return min(end_s, file_end_s)

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._videos: OrderedDict[str, OpenVideo] = OrderedDict()
        self._images = None
        self._converters: dict[tuple[int, int, str, float, int, Fit, RGB], FrameConverter] = {}

    def _open(self, name: str, thorough: bool = False) -> OpenVideo:
        if self._pid != os.getpid():  # a forked process shares the file offsets of its parent: never read through them
            self.close()
        stamp = file_stamp(name)
        video = self._videos.get(name)
        if video is not None and video.stamp == stamp:
            self._videos.move_to_end(name)
            return video
        self.drop(name)
        while len(self._videos) >= self._max_open:
            self._videos.popitem(last=False)[1].container.close()
        video = open_video(name, stamp, thorough)
        self._videos[name] = video
        return video

    def _list(self, name: str) -> ImageFolder:
        stamp = file_stamp(name)[0] if is_image(name) else os.stat(name).st_mtime_ns
        if self._images is None or (self._images.path, self._images.stamp) != (name, stamp):
            self._images = ImageFolder(name, stamp, () if is_image(name) else list_images(name))
        return self._images

    def _read_images(self, images: ImageFolder, times: list[float], square: _Square) -> Clip:
        numbers = [images.number_shown_by(time_s) for time_s in times]
        canvas = np.empty((len(numbers), square.size, square.size, 3), dtype=np.uint8)
        for number in sorted(set(numbers)):
            first, *others = (row for row, wanted in enumerate(numbers) if wanted == number)
            frame = images.frame(number)
            self._converter(frame, 1.0, square).write(frame, canvas[first])
            for row in others:
                canvas[row] = canvas[first]
        frame_numbers = np.array(numbers, dtype=np.int64)
        return Clip(torch.from_numpy(canvas), frame_numbers / IMAGES_FPS, frame_numbers)

    def _read_limits(self, video: OpenVideo, limits: list[int], square: _Square) -> Clip:
        # Each frame is decoded and converted once, straight into its row; equal rows are copied.
        ascending = sorted(set(limits))
        canvas = np.empty((len(limits), square.size, square.size, 3), dtype=np.uint8)
        try:
            if video.in_order_only:
                chosen = self._decode_in_order(video, ascending, limits, canvas, square)
            else:
                chosen = self._decode_by_seeking(video, ascending, limits, canvas, square)
        except NeedsFullDecode:
            chosen = self._decode_from_start(video, ascending, limits, canvas, square)
        times_s = np.array([video.time_s(chosen[limit]) for limit in limits], dtype=np.float64)
        frame_numbers = np.rint(times_s * video.fps).astype(np.int64)
        return Clip(torch.from_numpy(canvas), times_s, frame_numbers)

    def _decode_by_seeking(
        self, video: OpenVideo, ascending: list[int], limits: list[int], canvas: np.ndarray, square: _Square
    ) -> dict[int, int]:
        chosen: dict[int, int] = {}
        for group in split_at_key_frames(video, ascending):
            packets, at_end = demux_span(video, group[0], group[-1])
            picks = choose_frames(video, packets, at_end, group)
            chosen.update(picks)
            frames = decode_segments(video, packets, sorted(set(picks.values())))
            self._place(video, frames, picks, limits, canvas, square)
        return chosen

    def _decode_in_order(
        self, video: OpenVideo, ascending: list[int], limits: list[int], canvas: np.ndarray, square: _Square
    ) -> dict[int, int]:
        self.drop(video.path)
        fresh = self._open(video.path, thorough=True)  # stands at its first packet
        picks: dict[int, int] = {}
        held: VideoFrame | None = None
        waiting = list(ascending)
        # The last frame before the first one that is displayed after a wanted tick is the frame of that tick.
        for frame in chain(decode_in_order(fresh), (None,)):
            if held is not None:
                passed = [tick for tick in waiting if frame is None or tick < cast(int, frame.pts)]
                if passed:
                    pts = cast(int, held.pts)
                    if (
                        frame is None
                        and fresh.time_s(passed[-1])
                        >= max(fresh.header_end_s, fresh.time_s(pts) + fresh.frame_s) + fresh.frame_s
                    ):
                        raise SpanOutsideFile(f"the video ends at {fresh.header_end_s:.3f} s", fresh.path)
                    shown = dict.fromkeys(passed, pts)
                    self._place(fresh, [held], shown, limits, canvas, square)
                    picks.update(shown)
                    waiting = waiting[len(passed) :]
            if not waiting:
                break
            held = frame
        if waiting:
            raise FrameMissing("the file holds no frame", fresh.path)
        return picks

    def _decode_from_start(
        self, video: OpenVideo, ascending: list[int], limits: list[int], canvas: np.ndarray, square: _Square
    ) -> dict[int, int]:
        self.drop(video.path)
        fresh = self._open(video.path, thorough=True)  # stands at its first packet, whatever its index knows
        packets, at_end = take_until(fresh, fresh.container.demux(fresh.stream), ascending[-1])
        picks = choose_frames(fresh, packets, at_end, ascending)
        wanted = set(picks.values())
        stop = 1 + max(i for i, packet in enumerate(packets) if packet.pts in wanted)
        try:
            self._place(
                fresh, decode_packets(fresh, packets[:stop], wanted, exact_start=False), picks, limits, canvas, square
            )
        except NeedsFullDecode:
            raise FrameMissing("the decoder did not return a frame that the file lists", fresh.path) from None
        return picks

    def _place(
        self,
        video: OpenVideo,
        frames: Iterable[VideoFrame],
        picks: dict[int, int],
        limits: list[int],
        canvas: np.ndarray,
        square: _Square,
    ) -> None:
        # Rows of the clip by the pts of their frame.
        rows: dict[int, list[int]] = {}
        for row, limit in enumerate(limits):
            if limit in picks:
                rows.setdefault(picks[limit], []).append(row)
        for frame in frames:
            first, *others = rows[cast(int, frame.pts)]
            self._converter(frame, video.pixel_aspect, square).write(frame, canvas[first])
            for row in others:
                canvas[row] = canvas[first]

    def _converter(self, frame: VideoFrame, pixel_aspect: float, square: _Square) -> FrameConverter:
        key = (frame.width, frame.height, frame.format.name, pixel_aspect, *square)
        converter = self._converters.get(key)
        if converter is None:
            if len(self._converters) >= _MAX_CONVERTERS:
                self._converters.clear()
            converter = self._converters[key] = FrameConverter(*key)
        return converter
