"""Random access to video files: the exact frames at given times, small and uint8, without decoding more than needed.

A folder of pictures is a video too: ``PICTURES_FPS`` of its pictures a second in the order of their names (2 before
10), those that end in ``-rgb`` alone where there are such (OpenEQA keeps depth beside them).

Shapes: ``N`` frames of one clip, ``size`` the side of the square output picture in pixels.

Times are seconds on the file's own clock, 0 being its first displayed frame. The frame for time t is the last one
displayed at or before t, with a tolerance of a tenth of a frame (at most 1 ms) because annotations are rounded
decimals. What comes back is identical to decoding the file from its start; a clip that cannot be decoded without
damage raises a ``ClipDecodeError``, it is never patched up with repeated or concealed frames.
"""

from __future__ import annotations

import math
import os
import re
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

Fit = Literal["pad", "crop", "squash"]
Result = TypeVar("Result")

FITS: tuple[Fit, ...] = ("pad", "crop", "squash")
PAD_RGB = (122, 116, 104)  # CLIP's mean colour, so that padding is about zero after normalisation
PICTURES_FPS = 30.0
"""Frame rate of a folder of pictures, the one at which OpenEQA's own script encodes its episodes."""

# Pixel formats whose scaled picture stays in YUV until the cheap unscaled step to RGB; all others go in one step.
_YUV_STEP = {"yuv420p": "yuv420p", "yuvj420p": "yuvj420p", "yuv420p10le": "yuv420p"}
_SKIPS_UNREFERENCED = frozenset({"h264", "hevc"})  # decoders that honour skip_frame packet by packet
_HEADER_ONLY = {"skip_frame": "all", "analyzeduration": "1"}  # of FFmpeg's look at a file, which decodes pictures else
_RESEEK_GAP_S = 1.0  # below this, demuxing on is about as cheap as another seek
_MAX_CONVERTERS = 32
_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class ClipDecodeError(ValueError):
    """A clip could not be read. The message is one line: file, span, cause and what to do about it.

    Attributes:
        path: the file, or None if the error was rebuilt from its message alone (as DataLoader workers do).
        start_s, end_s: the span asked for in seconds on the file's clock, or None if it concerns the whole file.
        reason: the cause, in the decoder's words where it has any.
    """

    mend = ""

    def __init__(
        self,
        reason: str,
        path: str | os.PathLike[str] | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> None:
        """Build the message from its parts; ``reason`` alone is taken as the whole message."""
        self.path = None if path is None else Path(path)
        self.start_s = start_s
        self.end_s = end_s
        self.reason = reason
        message = reason
        if path is not None:
            span = "" if start_s is None or end_s is None else f" [{start_s:.3f}, {end_s:.3f}) s"
            message = f"{os.fspath(path)}{span}: {reason}{'; ' if self.mend else ''}{self.mend}"
        super().__init__(" ".join(message.split()) if path is not None else message)


class FileMissing(ClipDecodeError):
    """There is no such file."""

    mend = "download it, correct the path or remove the take"


class NotAVideo(ClipDecodeError):
    """The file cannot be opened as a video: empty, text, a folder, or cut before its header."""

    mend = "re-download it or remove the take"


class NoVideoStream(ClipDecodeError):
    """The file opens but holds no moving picture (sound only, or a cover image)."""

    mend = "check the path or remove the take"


class EmptySpan(ClipDecodeError):
    """No time is asked for: end <= start, no frames, or a time that is not a finite number."""

    mend = "correct the annotation"


class SpanOutsideFile(ClipDecodeError):
    """The span begins before the first frame or ends more than one frame after the last."""

    mend = "correct the annotation or the view's offset"


class FrameMissing(ClipDecodeError):
    """The file lists a frame that no decoding brings out, even from the start of the file."""

    mend = "re-encode it or remove the take"


class Damaged(ClipDecodeError):
    """A packet or picture that the clip depends on is corrupt, or the file is shorter than it says."""

    mend = "re-download it or remove the take"


class TimedOut(ClipDecodeError):
    """Reading did not come to an end within the reader's time limit."""

    mend = "check the disk or network that holds the file, re-encode it or remove the take"


class _NeedsFullDecode(Exception):
    """Seeking cannot produce the wanted frames; only decoding from the start of the file can."""


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


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header says.

    Attributes:
        width, height: stored picture in pixels, before rotation.
        fps: average frames per second.
        duration_s: seconds from the first displayed frame to the end.
        num_frames: frames in the file.
        codec: decoder name, such as ``h264``.
        start_s: time stamp of the first displayed frame in the file; the file's clock subtracts it.
        rotation: degrees counter-clockwise by which the stored picture is turned for display: 0, 90, 180 or 270.
    """

    width: int
    height: int
    fps: float
    duration_s: float
    num_frames: int
    codec: str
    start_s: float
    rotation: int


@dataclass(eq=False)
class _OpenVideo:
    """An open file; ticks count the stream's time base and include the start offset."""

    path: str
    stamp: tuple[int, int]
    container: InputContainer
    stream: VideoStream
    codec: VideoCodecContext
    codec_name: str
    tick_s: float
    start_tick: int
    fps: float
    header_end_s: float
    pixel_aspect: float
    nal_length_bytes: int | None

    @property
    def frame_s(self) -> float:
        return 1.0 / self.fps

    def time_s(self, tick: int) -> float:
        return (tick - self.start_tick) * self.tick_s

    def last_tick_shown_by(self, time_s: float) -> int:
        tolerance_s = min(1e-3, 0.1 * self.frame_s)
        return self.start_tick + math.floor((time_s + tolerance_s) / self.tick_s)


@dataclass(frozen=True)
class _Pictures:
    """A folder of pictures as it was when it was listed."""

    path: str
    stamp: int
    names: tuple[str, ...]

    @property
    def end_s(self) -> float:
        return len(self.names) / PICTURES_FPS

    def number_shown_by(self, time_s: float) -> int:
        """The last picture displayed at or before a time up to one picture past the end."""
        number = math.floor((time_s + 1e-3) * PICTURES_FPS)
        if not 0 <= number <= len(self.names):
            raise SpanOutsideFile(f"{time_s:.3f} s is outside its {len(self.names)} pictures, {self.end_s:.3f} s")
        return min(number, len(self.names) - 1)

    def picture(self, number: int) -> VideoFrame:
        name = self.names[number]
        try:
            with av.open(os.path.join(self.path, name), "r", metadata_errors="ignore") as container:
                frame = next(container.decode(video=0))
        except (av.error.FFmpegError, StopIteration, IndexError) as error:
            raise Damaged(f"picture {name}: {_words(error)}", self.path) from error
        if frame.is_corrupt:
            raise Damaged(f"picture {name} is corrupt", self.path)
        return frame


class ClipReader:
    """Reads exact frames from video files and keeps the files it used last open.

    Make one per process and use it from one thread. A reader may be pickled or inherited by a forked process:
    it then starts again with no open files.
    """

    def __init__(self, max_open: int = 16, timeout_s: float | None = None) -> None:
        """Open nothing yet.

        Args:
            max_open: files kept open, at 5-25 MB each depending on the picture size.
            timeout_s: longest time that one call may take, None for no limit. A limit costs a short-lived thread a
                call. One that hangs in the operating system or in the decoder cannot be stopped: its thread is left
                behind with the files that were open, and the reader starts again without them.

        Raises:
            ValueError: ``max_open`` is below 1, or ``timeout_s`` is not above 0.
        """
        if max_open < 1:
            raise ValueError(f"max_open is {max_open}; a reader needs to hold at least 1 file open")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; a time limit must be above 0 seconds")
        self.max_open, self.timeout_s = max_open, timeout_s
        self._files = _OpenFiles(max_open)

    def __reduce__(self) -> tuple[type[ClipReader], tuple[int, float | None]]:
        """Pickle the settings only: open files belong to one process."""
        return ClipReader, (self.max_open, self.timeout_s)

    def close(self) -> None:
        """Close every file. The reader stays usable."""
        self._files.close()

    def read(
        self,
        path: str | os.PathLike[str],
        times_s: Sequence[float] | np.ndarray,
        size: int,
        fit: Fit = "pad",
        span_s: tuple[float, float] | None = None,
    ) -> Clip:
        """Read the frames displayed at the given times.

        A time up to one frame past the end of the file gives its last frame.

        Args:
            path: video file, or folder of pictures.
            times_s: N times in seconds on the file's clock, in any order; several may fall on one frame.
            size: side of the square output in pixels.
            fit: ``pad`` scales the whole picture to fit and centres it on ``PAD_RGB`` (its short side rounded to
                an even number of pixels when ``size`` is even), ``crop`` cuts the central square, ``squash``
                ignores the aspect ratio. The file's rotation is applied.
            span_s: (start, end) that the times were drawn from, for error messages; their range by default.

        Returns:
            The clip, frames in the order of ``times_s``.

        Raises:
            ClipDecodeError: one of its subclasses; the file is closed and opened anew by the next read.
            ValueError: ``size`` or ``fit`` is not usable.
        """
        if size < 1 or fit not in FITS:
            raise ValueError(f"size {size!r}, fit {fit!r}: size must be a positive number and fit one of {FITS}")
        times = np.asarray(times_s, dtype=np.float64).ravel().tolist()
        if not times or not all(map(math.isfinite, times)):
            raise EmptySpan(f"cannot read frames at times {times}", path, *(span_s or (None, None)))
        span_s = span_s or (min(times), max(times))
        return self._bounded(path, span_s, lambda files: files.read(os.fspath(path), times, size, fit))

    def usable_end_s(self, path: str | os.PathLike[str], start_s: float, end_s: float) -> float:
        """Check a span against the file and clamp an end that lies less than one frame past it.

        Args:
            path: video file.
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
            raise Damaged(_words(error), path, *span_s) from error

    def _call_in_thread(self, call: Callable[[_OpenFiles], Result], timeout_s: float) -> Result:
        files = self._files
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call(files))
            except BaseException as error:
                errors.append(error)
            if files is not self._files:  # too late
                files.close()

        thread = threading.Thread(target=run, name="clip reader", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if errors:
            raise errors[0]
        if results:
            return results[0]
        self._files = _OpenFiles(self.max_open)
        raise TimedOut(f"no answer within {timeout_s:g} s")


class _OpenFiles:
    """Open videos with their decoders and scalers, used by one thread at a time."""

    _pictures: _Pictures | None  # the folder that was used last

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._forget()

    def close(self) -> None:
        for video in self._videos.values():
            video.container.close()
        self._forget()

    def drop(self, name: str) -> None:
        if self._pictures is not None and self._pictures.path == name:
            self._pictures = None
        video = self._videos.pop(name, None)
        if video is not None:
            video.container.close()

    def read(self, name: str, times: list[float], size: int, fit: Fit) -> Clip:
        if os.path.isdir(name):
            return self._read_pictures(self._list(name), times, size, fit)
        video = self._open(name)
        limits = [video.last_tick_shown_by(time_s) for time_s in times]
        if min(limits) < video.start_tick:
            raise SpanOutsideFile(f"{min(times):.3f} s is before the first frame at 0 s")
        return self._read_limits(video, limits, size, fit)

    def usable_end_s(self, name: str, start_s: float, end_s: float) -> float:
        if os.path.isdir(name):
            file_end_s, frame_s = self._list(name).end_s, 1 / PICTURES_FPS
        else:
            video = self._open(name)
            file_end_s, frame_s = video.header_end_s, video.frame_s
            if end_s > file_end_s:  # headers of variable-rate files may fall short of the last frame
                file_end_s = max(file_end_s, _last_frame_end_s(video))
        if start_s < -min(1e-3, 0.1 * frame_s):
            raise SpanOutsideFile("the span begins before the first frame at 0 s")
        if start_s >= file_end_s or file_end_s + frame_s < end_s < math.inf:
            raise SpanOutsideFile(f"the video ends at {file_end_s:.3f} s")
        return min(end_s, file_end_s)

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._videos: OrderedDict[str, _OpenVideo] = OrderedDict()
        self._pictures = None
        self._converters: dict[tuple[int, int, str, float, int, Fit], _Converter] = {}

    def _open(self, name: str, thorough: bool = False) -> _OpenVideo:
        if self._pid != os.getpid():  # a forked process shares the file offsets of its parent: never read through them
            self.close()
        stamp = _stamp(name)
        video = self._videos.get(name)
        if video is not None and video.stamp == stamp:
            self._videos.move_to_end(name)
            return video
        self.drop(name)
        while len(self._videos) >= self._max_open:
            self._videos.popitem(last=False)[1].container.close()
        video = _open_video(name, stamp, thorough)
        self._videos[name] = video
        return video

    def _list(self, name: str) -> _Pictures:
        stamp = os.stat(name).st_mtime_ns
        if self._pictures is None or (self._pictures.path, self._pictures.stamp) != (name, stamp):
            self._pictures = _Pictures(name, stamp, _picture_names(name))
        return self._pictures

    def _read_pictures(self, pictures: _Pictures, times: list[float], size: int, fit: Fit) -> Clip:
        numbers = [pictures.number_shown_by(time_s) for time_s in times]
        canvas = np.empty((len(numbers), size, size, 3), dtype=np.uint8)
        for number in sorted(set(numbers)):
            first, *others = (row for row, wanted in enumerate(numbers) if wanted == number)
            frame = pictures.picture(number)
            self._converter(frame, 1.0, size, fit).write(frame, canvas[first])
            for row in others:
                canvas[row] = canvas[first]
        frame_numbers = np.array(numbers, dtype=np.int64)
        return Clip(torch.from_numpy(canvas), frame_numbers / PICTURES_FPS, frame_numbers)

    def _read_limits(self, video: _OpenVideo, limits: list[int], size: int, fit: Fit) -> Clip:
        ascending = sorted(set(limits))
        canvas = np.empty((len(limits), size, size, 3), dtype=np.uint8)
        try:
            chosen = self._decode_by_seeking(video, ascending, limits, canvas, fit)
        except _NeedsFullDecode:
            chosen = self._decode_from_start(video, ascending, limits, canvas, fit)
        times_s = np.array([video.time_s(chosen[limit]) for limit in limits], dtype=np.float64)
        frame_numbers = np.rint(times_s * video.fps).astype(np.int64)
        return Clip(torch.from_numpy(canvas), times_s, frame_numbers)

    def _decode_by_seeking(
        self, video: _OpenVideo, ascending: list[int], limits: list[int], canvas: np.ndarray, fit: Fit
    ) -> dict[int, int]:
        chosen: dict[int, int] = {}
        for group in _split_at_key_frames(video, ascending):
            packets, at_end = _demux(video, group[0], group[-1])
            picks = _choose(video, packets, at_end, group)
            chosen.update(picks)
            frames = _decode_segments(video, packets, sorted(set(picks.values())))
            self._place(video, frames, picks, limits, canvas, fit)
        return chosen

    def _decode_from_start(
        self, video: _OpenVideo, ascending: list[int], limits: list[int], canvas: np.ndarray, fit: Fit
    ) -> dict[int, int]:
        self.drop(video.path)
        fresh = self._open(video.path, thorough=True)  # stands at its first packet, whatever its index knows
        packets, at_end = _take_until(fresh, fresh.container.demux(fresh.stream), ascending[-1])
        picks = _choose(fresh, packets, at_end, ascending)
        wanted = set(picks.values())
        stop = 1 + max(i for i, packet in enumerate(packets) if packet.pts in wanted)
        try:
            self._place(fresh, _decode(fresh, packets[:stop], wanted, exact_start=False), picks, limits, canvas, fit)
        except _NeedsFullDecode:
            raise FrameMissing("the decoder did not return a frame that the file lists", fresh.path) from None
        return picks

    def _place(
        self,
        video: _OpenVideo,
        frames: Iterable[VideoFrame],
        picks: dict[int, int],
        limits: list[int],
        canvas: np.ndarray,
        fit: Fit,
    ) -> None:
        rows: dict[int, list[int]] = {}
        for row, limit in enumerate(limits):
            if limit in picks:
                rows.setdefault(picks[limit], []).append(row)
        for frame in frames:
            first, *others = rows[cast(int, frame.pts)]
            self._converter(frame, video.pixel_aspect, canvas.shape[1], fit).write(frame, canvas[first])
            for row in others:
                canvas[row] = canvas[first]

    def _converter(self, frame: VideoFrame, pixel_aspect: float, size: int, fit: Fit) -> _Converter:
        key = (frame.width, frame.height, frame.format.name, pixel_aspect, size, fit)
        converter = self._converters.get(key)
        if converter is None:
            if len(self._converters) >= _MAX_CONVERTERS:
                self._converters.clear()
            converter = self._converters[key] = _Converter(*key)
        return converter


class _Converter:
    """Turns decoded pictures of one size and format into RGB squares, keeping the scalers' set-up."""

    def __init__(self, width: int, height: int, pixel_format: str, pixel_aspect: float, size: int, fit: Fit) -> None:
        self._crop: Graph | None = None
        self._scaled = (size, size)
        shown_width = width * pixel_aspect
        if fit == "pad":
            self._scaled = _fit_inside(shown_width, height, size)
        elif fit == "crop" and shown_width != height:
            side = min(shown_width, float(height))
            self._crop = _crop_graph(width, height, pixel_format, _even(side / pixel_aspect), _even(side))
        even = not (self._scaled[0] % 2 or self._scaled[1] % 2)
        self._step_format = _YUV_STEP.get(pixel_format) if even else None
        self._pad = np.tile(np.array(PAD_RGB, dtype=np.uint8), (size, 1))  # a row of the border
        self._scale = VideoReformatter()
        self._to_rgb = VideoReformatter()

    def write(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Convert ``frame`` and write it to the centre of ``out``, uint8 [size, size, 3], on ``PAD_RGB``."""
        pixels = self._scaled_rgb(frame)
        top, left = (out.shape[0] - pixels.shape[0]) // 2, (out.shape[1] - pixels.shape[1]) // 2
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        for border in (out[:top], out[bottom:], out[top:bottom, :left], out[top:bottom, right:]):
            border[:] = self._pad[: border.shape[1]]
        out[top:bottom, left:right] = pixels

    def _scaled_rgb(self, frame: VideoFrame) -> np.ndarray:
        """The upright picture, uint8 [height, width, 3]."""
        quarter_turns = (frame.rotation // 90) % 4
        if self._crop is not None:
            self._crop.vpush(frame)
            frame = self._crop.vpull()
        width, height = self._scaled
        if self._step_format is not None and (frame.width, frame.height) != self._scaled:
            frame = self._scale.reformat(
                frame, width, height, self._step_format, interpolation=Interpolation.BICUBIC, threads=1
            )
        rgb = self._to_rgb.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        plane = rgb.planes[0]
        rows = np.frombuffer(cast(Any, plane), dtype=np.uint8, count=height * plane.line_size)
        pixels = rows.reshape(height, plane.line_size)[:, : width * 3].reshape(height, width, 3)
        return np.rot90(pixels, quarter_turns) if quarter_turns else pixels


def segment_midpoints(start_s: float, end_s: float, num_frames: int) -> np.ndarray:
    """Middles of ``num_frames`` equal parts of a span, ``start + (i + 0.5) (end - start) / n``.

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
        raise ValueError(f"num_frames is {num_frames}; at least 1 is needed")
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
        fit: how pictures are made square, see ``ClipReader.read``.
        offsets_s: take time at which each view's file begins, 0 where a view is not named.

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
    return {
        view: reader.read(path, times_s - shifts_s[view], size, fit, (start_s - shifts_s[view], end_s - shifts_s[view]))
        for view, path in paths.items()
    }


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video file from its header and its first picture, the only one decoded (for the rotation).

    Args:
        path: video file, or folder of pictures.

    Returns:
        The description; duration and frame count are what the header claims.

    Raises:
        ClipDecodeError: the file is missing, is not a video, or its first picture is damaged.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        pictures = _Pictures(name, 0, _picture_names(name))
        first, count = pictures.picture(0), len(pictures.names)
        return VideoInfo(first.width, first.height, PICTURES_FPS, pictures.end_s, count, "pictures", 0.0, 0)
    video = _open_video(name, _stamp(name))
    try:
        return VideoInfo(
            width=video.stream.width,
            height=video.stream.height,
            fps=video.fps,
            duration_s=video.header_end_s,
            num_frames=video.stream.frames or round(video.header_end_s * video.fps),
            codec=video.codec_name,
            start_s=video.start_tick * video.tick_s,
            rotation=next(video.container.decode(video.stream)).rotation % 360,
        )
    except StopIteration:
        raise Damaged("the file holds no picture", path) from None
    except av.error.FFmpegError as error:
        raise Damaged(_words(error), path) from error
    finally:
        video.container.close()


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers in names by their value."""
    parts = re.split("([0-9]+)", name)  # texts and numbers by turns
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def _picture_names(folder: str) -> tuple[str, ...]:
    try:
        listed = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=_natural)
    except OSError as error:
        raise NotAVideo(_words(error), folder) from error
    names = [name for name in listed if os.path.splitext(name)[1].lower() in _PICTURE_SUFFIXES]
    colour = [name for name in names if os.path.splitext(name)[0].endswith("-rgb")]
    if not names:
        raise NotAVideo("the folder holds no pictures (.png, .jpg)", folder)
    return tuple(colour or names)


def _stamp(name: str) -> tuple[int, int]:
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileMissing(_words(error), name) from error
    except OSError as error:
        raise NotAVideo(_words(error), name) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise NotAVideo("no regular file", name)
    if status.st_size == 0:
        raise NotAVideo("the file is empty (0 bytes)", name)
    return status.st_mtime_ns, status.st_size


def _open_video(name: str, stamp: tuple[int, int], thorough: bool = False) -> _OpenVideo:
    """Open a file, by its header if that says all, as in MP4; this takes a tenth of the time.

    Args:
        name: path.
        stamp: of the file.
        thorough: decode some pictures, which tells how far a stream of few words displays them out of order.
    """
    try:
        container = av.open(name, "r", options={} if thorough else _HEADER_ONLY, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise NotAVideo(_words(error), name) from error
    try:
        if thorough or "mp4" in container.format.name:
            return _describe(name, stamp, container)
        container.close()
        return _open_video(name, stamp, thorough=True)
    except BaseException:
        container.close()
        raise


def _describe(name: str, stamp: tuple[int, int], container: InputContainer) -> _OpenVideo:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise NoVideoStream("the file has no video stream", name)
    codec = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    if codec is None or not stream.width or not rate or stream.time_base is None:
        raise NotAVideo("the video stream has no known codec, picture size or frame rate", name)
    index = stream.index_entries
    if len(index):
        last = index[len(index) - 1]
        if last.pos + last.size > stamp[1]:
            raise Damaged(f"truncated: {stamp[1]} bytes, but its index reaches byte {last.pos + last.size}", name)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    codec.thread_type = "NONE"  # parallelism comes from workers, and this avoids deadlocks
    codec.thread_count = 1
    claims_s = [(stream.duration or 0) * stream.time_base, Fraction(container.duration or 0, 10**6)]
    return _OpenVideo(
        path=name,
        stamp=stamp,
        container=container,
        stream=stream,
        codec=codec,
        codec_name=codec.name,
        tick_s=float(stream.time_base),
        start_tick=stream.start_time or 0,
        fps=float(rate),
        header_end_s=float(min((claim_s for claim_s in claims_s if claim_s > 0), default=0)),
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        nal_length_bytes=nal_length_bytes(codec),
    )


def nal_length_bytes(codec: VideoCodecContext) -> int | None:
    """Bytes of the length in front of each unit of H.264 and HEVC packets in MP4 or Matroska; None for others."""
    at = {"h264": 4, "hevc": 21}.get(codec.name)
    extra = codec.extradata or b""
    if at is None or len(extra) <= at or extra[0] != 1:  # without a configuration record, start codes divide the units
        return None
    return 1 + (extra[at] & 3)


def is_torn(packet: Packet[VideoStream], codec_name: str, length_bytes: int | None) -> bool:
    """Whether zeros stand where the coding rules them out, as where a block of the file was never written.

    A decoder takes them for a picture that hardly changes.

    Args:
        packet: with a picture, or the empty one at the end of a file.
        codec_name: ``h264``, ``hevc`` or another.
        length_bytes: ``nal_length_bytes``; without it nothing can be said.
    """
    if length_bytes is None:
        return False
    data, end = bytes(packet), 0
    while end < len(data):
        begin = end + length_bytes
        end = begin + int.from_bytes(data[end:begin], "big")
        if end == begin or end > len(data):
            return True
        is_picture = (data[begin] >> 1 & 63) < 32 if codec_name == "hevc" else (data[begin] & 31) < 6
        if is_picture and data.find(b"\0\0\0", begin, end - 8) >= 0:
            return True
    return False


def _last_frame_end_s(video: _OpenVideo) -> float:
    """Demux the last group of pictures and return the time at which its last frame ends."""
    try:
        video.container.seek(video.start_tick + math.ceil(video.header_end_s / video.tick_s), stream=video.stream)
        packets = [p for p in video.container.demux(video.stream) if p.pts is not None and not p.is_discard]
    except av.error.FFmpegError as error:
        raise Damaged(_words(error), video.path) from error
    return max((_end_s(video, packet) for packet in packets), default=0.0)


def _end_s(video: _OpenVideo, packet: Packet[VideoStream]) -> float:
    duration_s = (packet.duration or 0) * video.tick_s or video.frame_s
    return video.time_s(cast(int, packet.pts)) + duration_s


def _split_at_key_frames(video: _OpenVideo, ascending: list[int]) -> list[list[int]]:
    """Group ascending ticks so that a long gap with a key frame in it is skipped by seeking, not by demuxing."""
    groups = [[ascending[0]]]
    for tick in ascending[1:]:
        previous = groups[-1][-1]
        if (tick - previous) * video.tick_s > _RESEEK_GAP_S:
            entry = video.stream.index_entries.search_timestamp(tick)
            if entry >= 0 and video.stream.index_entries[entry].timestamp > previous:
                groups.append([tick])
                continue
        groups[-1].append(tick)
    return groups


def _demux(video: _OpenVideo, first_tick: int, last_tick: int) -> tuple[list[Packet[VideoStream]], bool]:
    """Packets in decode order from the key frame that ``first_tick`` needs to the last one shown by ``last_tick``.

    Seeking goes by decode time, so the key frame reached may be displayed after the target: then step back.
    """
    seek_tick, previous_dts = first_tick, None
    while True:
        try:
            video.container.seek(seek_tick, stream=video.stream)
        except av.error.FFmpegError as error:
            raise _NeedsFullDecode from error
        packets = video.container.demux(video.stream)
        head = next(packets, None)
        if head is None or head.pts is None:
            raise _NeedsFullDecode
        if head.is_keyframe and head.pts <= first_tick:
            return _take_until(video, chain((head,), packets), last_tick)
        if head.dts is None or (previous_dts is not None and head.dts >= previous_dts):
            raise _NeedsFullDecode
        previous_dts = head.dts
        seek_tick = head.dts - 1


def _take_until(
    video: _OpenVideo, packets: Iterable[Packet[VideoStream]], last_tick: int
) -> tuple[list[Packet[VideoStream]], bool]:
    """Packets up to the decode time ``last_tick``, and whether the file ended first."""
    taken: list[Packet[VideoStream]] = []
    for packet in packets:
        if packet.pts is None:
            if packet.size:
                raise Damaged("a packet has no time stamp", video.path)
            break
        if packet.dts is not None and packet.dts > last_tick:
            return taken, False
        taken.append(packet)
    return taken, True


def _choose(
    video: _OpenVideo, packets: list[Packet[VideoStream]], at_end: bool, ascending: list[int]
) -> dict[int, int]:
    """For every wanted tick the pts of the last frame displayed at or before it."""
    shown = sorted(cast(int, packet.pts) for packet in packets if not packet.is_discard)
    if not shown or shown[0] > ascending[0]:
        raise FrameMissing(f"no frame is displayed by {video.time_s(ascending[0]):.3f} s", video.path)
    if at_end:
        file_end_s = max(_end_s(video, packet) for packet in packets if not packet.is_discard)
        wanted_s = video.time_s(ascending[-1])
        if file_end_s <= wanted_s < video.header_end_s - video.frame_s:
            raise Damaged(
                f"pictures end at {file_end_s:.3f} s, the header promises {video.header_end_s:.3f} s", video.path
            )
        if wanted_s >= file_end_s + video.frame_s:
            raise SpanOutsideFile(f"the video ends at {file_end_s:.3f} s", video.path)
    return {tick: shown[bisect_right(shown, tick) - 1] for tick in ascending}


def _decode_segments(video: _OpenVideo, packets: list[Packet[VideoStream]], wanted: list[int]) -> Iterator[VideoFrame]:
    """Decode the wanted pts (ascending), each from its own key frame, passing over groups nobody asked for."""
    position = {packet.pts: i for i, packet in enumerate(packets) if not packet.is_discard}
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    segments: list[tuple[int, int, set[int]]] = []
    for pts in wanted:
        at = position[pts]
        key = next((k for k in reversed(keys) if k <= at and cast(int, packets[k].pts) <= pts), None)
        if key is None:
            raise _NeedsFullDecode
        if segments and key <= segments[-1][1]:
            first, last, members = segments[-1]
            segments[-1] = (first, max(last, at), members | {pts})
        else:
            segments.append((key, at, {pts}))
    for first, last, members in segments:
        yield from _decode(video, packets[first : last + 1], members, exact_start=True)


def _decode(
    video: _OpenVideo, packets: list[Packet[VideoStream]], wanted: set[int], exact_start: bool
) -> Iterator[VideoFrame]:
    """Feed packets and yield the frames whose pts is wanted.

    Args:
        video: an open file whose decoder is empty.
        packets: in decode order, from a key frame to the last wanted one.
        wanted: pts of the frames to yield.
        exact_start: the first packet is a key frame that nothing after it looks behind; pictures displayed before
            it are left out and unreferenced ones are skipped. Otherwise everything is decoded.

    Raises:
        Damaged: a packet or picture on the way is corrupt.
        _NeedsFullDecode: a wanted frame did not come out.
    """
    codec = video.codec
    may_skip = exact_start and video.codec_name in _SKIPS_UNREFERENCED
    codec.skip_frame = "DEFAULT"
    skipping = False
    first_pts = cast(int, packets[0].pts)
    missing = set(wanted)
    for packet in chain(packets, (None,)):
        if packet is not None:
            pts = cast(int, packet.pts)
            if packet.is_corrupt or is_torn(packet, video.codec_name, video.nal_length_bytes):
                raise Damaged(f"corrupt packet at {video.time_s(pts):.3f} s", video.path)
            if exact_start and pts < first_pts:
                continue
            if may_skip and skipping == (pts in wanted):
                skipping = not skipping
                codec.skip_frame = "NONREF" if skipping else "DEFAULT"
        for frame in codec.decode(packet):  # to the last one: wanted frames may refer to one that is displayed later
            if frame.is_corrupt:
                raise Damaged(f"corrupt picture at {video.time_s(cast(int, frame.pts)):.3f} s", video.path)
            if frame.pts in missing:
                missing.remove(frame.pts)
                yield frame
    codec.flush_buffers()
    if missing:
        raise _NeedsFullDecode


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def _fit_inside(width: float, height: float, size: int) -> tuple[int, int]:
    """Scaled (width, height) whose long side is ``size``; the short side even if ``size`` is."""
    short = min(width, height) * size / max(width, height)
    rounded = min(size, _even(short) if size % 2 == 0 else max(1, round(short)))
    return (size, rounded) if width >= height else (rounded, size)


def _crop_graph(width: int, height: int, pixel_format: str, crop_width: int, crop_height: int) -> Graph:
    crop_width, crop_height = min(crop_width, width), min(crop_height, height)
    left, top = (width - crop_width) // 4 * 2, (height - crop_height) // 4 * 2  # even: whole chroma samples
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat(pixel_format), time_base=Fraction(1, 1000)
    )
    crop = graph.add("crop", f"{crop_width}:{crop_height}:{left}:{top}")
    graph.link_nodes(source, crop, graph.add("buffersink")).configure()
    return graph
