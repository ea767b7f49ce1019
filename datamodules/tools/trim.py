"""Cut a window out of a video as a file of its own, frame by frame.

Frames are encoded again, upright and with even sides, so that a cut may begin between key frames. A clip begins with
the frame that is displayed when its window begins, and that frame's time is its time 0. A file takes its name only
after its frames were read back and compared with those of the source, as ``ClipReader`` reads both.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from datamodules.io.atomic import atomic_path
from datamodules.tools.reencode import INTERLACED, Encoding, add_h264_stream, colours, header, upright
from datamodules.video.decode import decode_in_order
from datamodules.video.errors import ClipDecodeError, Damaged
from datamodules.video.media import media_url, open_input
from datamodules.video.probe import file_stamp, open_video, probe
from datamodules.video.reader import ClipReader

_WHOLE = 1 << 14  # pixels: no frame is made smaller
_THUMBNAIL = 16
_SAME_LEVELS = 8.0  # of 255: mean difference of thumbnails that show the same frame


def cut(root: Path, out: Path, job: tuple[str, float, float, str]) -> str:
    """Cut one clip, unless it exists and was cut from the same file.

    Args:
        root: folder that the video is below.
        out: folder that the clip goes below.
        job: video, start and end in seconds, and clip; paths relative to the two folders.

    Returns:
        The reason why it cannot be cut, on one line; empty if it was cut.
    """
    video, start_s, end_s, clip = job
    source, target = root / video, out / clip
    if source.is_dir():
        return f"{source} [{start_s:.3f}, {end_s:.3f}) s: a folder of images is not cut: encode it as a video first"
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = ClipReader(max_open=2)
    try:
        if target.is_file() and _origin_of(target) == _origin(source):
            return ""
        end_s = reader.usable_end_s(source, start_s, end_s)
        with atomic_path(target) as unfinished:
            times_s = _write(source, start_s, end_s, unfinished)
            _verify(reader, source, unfinished, np.array(times_s), start_s, end_s)
    except (ClipDecodeError, _CannotCut, av.error.FFmpegError, OSError) as error:
        words = " ".join(str(error).split())
        return words if isinstance(error, ClipDecodeError) else f"{source} [{start_s:.3f}, {end_s:.3f}) s: {words}"
    finally:
        reader.close()
    return ""


class _CannotCut(ValueError):
    """The source is sound, but a clip of it cannot be written."""


def _origin(source: Path) -> str:
    """Return a mark that differs for other sources, also for a changed one and one below another root."""
    status = source.stat()
    return f"cut out of {status.st_size} bytes of {status.st_mtime_ns}"


def _origin_of(clip: Path) -> str:
    with open_input(os.fspath(clip)) as container:
        return container.metadata.get("comment", "")


def _write(source: Path, start_s: float, end_s: float, unfinished: Path) -> list[float]:
    """Encode the frames of [start, end); return their times in the source, in seconds."""
    info = probe(source)
    rate, pixel_aspect = header(source)
    tolerance_s = min(1e-3, 0.1 / info.fps)
    times_s: list[float] = []
    with av.open(media_url(os.fspath(unfinished)), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = _origin(source)
        frames = _shown(source, info.start_s, start_s + tolerance_s, end_s - tolerance_s)
        first = next(frames)
        graph, width, height = upright(first, pixel_aspect, _WHOLE)
        options = {**Encoding(crf=18).x264_options, "bf": "0"}
        stream = add_h264_stream(container, first, rate, (width, height), options)
        tick_s = cast(Fraction, first.time_base)
        begin = cast(int, first.pts)
        lasts = max(1, round(1 / (rate * tick_s)))  # ticks
        # Every frame keeps its time relative to the first one; the last one lasts as long as the one before.
        for frame, following in pairwise(chain((first,), frames, (None,))):
            assert frame is not None, "only the last one is followed by none"
            if frame.interlaced_frame:
                raise _CannotCut(INTERLACED)
            pts = cast(int, frame.pts)
            times_s.append(pts * float(tick_s) - info.start_s)
            lasts = lasts if following is None else cast(int, following.pts) - pts
            graph.vpush(frame)
            small = graph.vpull()
            small.pict_type, small.pts, small.time_base = PictureType.NONE, pts - begin, tick_s
            _mux(container, stream.encode(small), lasts)
        _mux(container, stream.encode(None), lasts)
    return times_s


def _mux(container: av.container.OutputContainer, packets: list[Packet[VideoStream]], lasts: int) -> None:
    for packet in packets:
        packet.duration = lasts
        container.mux(packet)


def _shown(source: Path, first_s: float, start_s: float, end_s: float) -> Iterator[VideoFrame]:
    """Yield the frames displayed from the one at ``start_s`` to before ``end_s``; times count from ``first_s``."""
    frames = _decoded(source, first_s, start_s)
    held = next(frames, None)
    if held is None or held.time - first_s > start_s:
        # The seek went too far, as it may without an index: decode the file from its start.
        frames.close()
        frames = _decoded(source, first_s, None)
        held = next(frames, None)
    if held is None:
        raise Damaged("no frame can be decoded", source)
    # A frame is yielded when the next one shows that it was displayed at or after the start.
    with closing(frames):
        for frame in frames:
            time_s = frame.time - first_s
            if time_s > start_s:
                yield held
            held = frame
            if time_s >= end_s:
                return
        yield held


def _decoded(source: Path, first_s: float, start_s: float | None) -> Generator[VideoFrame, None, None]:
    """Yield the frames of a file from the key frame before a time, or from its first packet."""
    name = os.fspath(source)
    video = open_video(name, file_stamp(name), thorough=True)
    with video.container as container:
        if video.in_order_only:
            yield from decode_in_order(video)
            return
        if start_s is not None:
            try:
                container.seek(int((first_s + start_s) / video.tick_s), stream=video.stream)
            except av.error.FFmpegError:
                return
        for frame in container.decode(video.stream):
            if frame.is_corrupt:
                raise Damaged(f"corrupt frame at {frame.time - first_s:.3f} s", source)
            yield frame


def _verify(reader: ClipReader, source: Path, clip: Path, times_s: np.ndarray, start_s: float, end_s: float) -> None:
    """Compare the frames of a clip with those that the reader returns for its window.

    Raises:
        _CannotCut: they are not the same.
    """
    count = probe(clip).num_frames
    if count != len(times_s):
        raise _CannotCut(f"{count} frames were written for {len(times_s)}")
    # The frames displayed first, just before each next frame, and last are exactly those written.
    tolerance_s = 2 * min(1e-3, 0.1 / probe(source).fps)
    last_s = max(start_s, end_s - tolerance_s)
    moments_s = [start_s, *(times_s[1:] - tolerance_s), *times_s, last_s]
    wanted = reader.read(source, moments_s, _THUMBNAIL, "squash")
    expected_s = [times_s[0], *times_s[:-1], *times_s, times_s[-1]]
    if not np.allclose(wanted.times_s, expected_s, atol=1e-4):
        raise _CannotCut(f"the frames written, {times_s[0]:.3f}-{times_s[-1]:.3f} s, are not those of the window")
    found = reader.read(clip, times_s - times_s[0], _THUMBNAIL, "squash")
    shown = wanted.frames[count : 2 * count].int()
    apart = (shown - found.frames.int()).abs().float().mean(dim=(1, 2, 3))
    if float(apart.max()) > _SAME_LEVELS:
        worst = int(apart.argmax())
        raise _CannotCut(f"frame {worst} of the clip differs by {float(apart[worst]):.1f} levels")
    before, after = (colours(next(_decoded(file, 0.0, None))) for file in (source, clip))
    if before is not None and before != after:
        raise _CannotCut("the clip does not have the colours of its source")
