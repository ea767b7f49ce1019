"""Open a video file and describe it from its header."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from datamodules.video.errors import Damaged, FileMissing, Mirrored, NotAVideo, NoTimes, NoVideoStream, error_text
from datamodules.video.images import IMAGES_FPS, ImageFolder, is_image, list_images
from datamodules.video.media import open_bytes, open_input, quarter_turns, set_up_decoder
from datamodules.video.remote import is_remote, remote_stamp

_HEADER_ONLY = {"skip_frame": "all", "analyzeduration": "1"}  # keeps FFmpeg from decoding frames while it opens a file
_NO_TIMES = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS


@dataclass(frozen=True)
class VideoInfo:
    """Description of a video file.

    Attributes:
        width, height: stored frame in pixels, before rotation.
        fps: average frames per second.
        duration_s: seconds from the first displayed frame to the end, as the header claims.
        num_frames: frames in the file, as the header claims.
        codec: decoder name, such as ``h264``; ``images`` for a folder of images.
        start_s: time stamp of the first displayed frame in the file; the file's clock subtracts it.
        rotation: degrees counter-clockwise by which a stored frame is turned for display: 0, 90, 180 or 270.
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
class OpenVideo:
    """An open video file. Ticks count the stream's time base and include the start offset.

    Attributes:
        path: the file.
        stamp: its modification time in nanoseconds and its size when it was opened.
        container, stream, codec: PyAV's objects.
        codec_name: such as ``h264``.
        tick_s: seconds of one tick.
        start_tick: time stamp of the first displayed frame.
        fps: average frames per second.
        header_end_s: end of the last frame by the file's header, in seconds after the first displayed frame; where the
            header has only the end of all streams together, by the last packet.
        is_whole: the file has all the bytes that its header lists, so a last frame may be displayed until
            ``header_end_s``; otherwise frames that end earlier mean that it was cut.
        pixel_aspect: width of a stored pixel over its height.
        in_order_only: it must be decoded from its start, since packets have no display times or depend on an earlier
            palette. Frames are displayed at the decode times, in the order in which the decoder returns them.
        nal_length_bytes: see the function of that name.
    """

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
    is_whole: bool
    pixel_aspect: float
    in_order_only: bool
    nal_length_bytes: int | None

    @property
    def frame_s(self) -> float:
        """Mean seconds of one frame."""
        return 1.0 / self.fps

    def time_s(self, tick: int) -> float:
        """Convert ticks to seconds after the first displayed frame."""
        return (tick - self.start_tick) * self.tick_s

    def last_tick_shown_by(self, time_s: float) -> int:
        """Return the last tick at which a frame may begin to be the one displayed at a time."""
        tolerance_s = min(1e-3, 0.1 * self.frame_s)
        return self.start_tick + math.floor((time_s + tolerance_s) / self.tick_s)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video file from its header and its first frame, the only one decoded (for the rotation).

    Args:
        path: video file, image, or folder of images.

    Returns:
        The description; duration and frame count are the header's claims.

    Raises:
        ClipDecodeError: the file is missing, is not a video, or its first frame is damaged.
    """
    name = os.fspath(path)
    if os.path.isdir(name) or is_image(name):
        images = (
            ImageFolder(name, 0, list_images(name)) if os.path.isdir(name) else ImageFolder(name, file_stamp(name)[0])
        )
        first = images.frame(0)
        return VideoInfo(first.width, first.height, IMAGES_FPS, images.end_s, len(images), "images", 0.0, 0)
    video = open_video(name, file_stamp(name))
    try:
        return VideoInfo(
            width=video.stream.width,
            height=video.stream.height,
            fps=video.fps,
            duration_s=video.header_end_s,
            num_frames=video.stream.frames or round(video.header_end_s * video.fps),
            codec=video.codec_name,
            start_s=video.start_tick * video.tick_s,
            rotation=90 * quarter_turns(next(video.container.decode(video.stream))),
        )
    except Mirrored as error:
        raise Mirrored(error.reason, path) from None
    except StopIteration:
        raise Damaged("the file holds no frame", path) from None
    except av.error.FFmpegError as error:
        raise Damaged(error_text(error), path) from error
    finally:
        video.container.close()


def file_stamp(name: str) -> tuple[int, int]:
    """Return modification time and size of a file; they tell whether it was replaced since it was opened.

    Raises:
        FileMissing: there is no such file.
        NotAVideo: it is empty or no regular file.
        Unreachable: the storage of a remote file does not answer.
    """
    if is_remote(name):
        return remote_stamp(name)
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileMissing(error_text(error), name) from error
    except OSError as error:
        raise NotAVideo(error_text(error), name) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise NotAVideo("no regular file", name)
    if status.st_size == 0:
        raise NotAVideo("the file is empty (0 bytes)", name)
    return status.st_mtime_ns, status.st_size


def open_video(name: str, stamp: tuple[int, int], thorough: bool = False) -> OpenVideo:
    """Open a file, by its header alone if that suffices, as in MP4; this takes a tenth of the time.

    Args:
        name: path of the file.
        stamp: its ``file_stamp``.
        thorough: decode some frames, which shows how far streams with sparse headers reorder their frames.

    Raises:
        ClipDecodeError: the file is not a video, or is truncated.
    """
    try:
        container = open_input(name, {} if thorough else _HEADER_ONLY)
    except av.error.FFmpegError as error:
        raise NotAVideo(error_text(error), name) from error
    try:
        if thorough or "mp4" in container.format.name:
            return _describe(name, stamp, container)
        container.close()
        return open_video(name, stamp, thorough=True)
    except BaseException:
        container.close()
        raise


def _describe(name: str, stamp: tuple[int, int], container: InputContainer) -> OpenVideo:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise NoVideoStream("the file has no video stream", name)
    if container.format.flags & _NO_TIMES:
        raise NoTimes(f"a raw stream ({container.format.name}) does not say when its frames are displayed", name)
    codec = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    if codec is None or not stream.width or not rate or stream.time_base is None:
        raise NotAVideo("the video stream has no known codec, frame size or frame rate", name)
    # A file that is shorter than its index was cut: its last clips would end early without any error.
    index = stream.index_entries
    size_bytes = _listed_bytes(name, container.format.name)
    if size_bytes is not None and size_bytes > stamp[1]:
        raise Damaged(f"truncated: {stamp[1]} bytes, but its header lists {size_bytes}", name)
    if len(index):
        last = index[len(index) - 1]
        if last.pos + last.size > stamp[1]:
            raise Damaged(f"truncated: {stamp[1]} bytes, but its index reaches byte {last.pos + last.size}", name)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    set_up_decoder(codec)
    start_tick = stream.start_time or 0
    claims_s = [(stream.duration or 0) * stream.time_base, Fraction(container.duration or 0, 10**6)]
    if not stream.duration:  # one duration for the whole file, counted from time 0: see below
        claims_s = [claims_s[1] - start_tick * stream.time_base]
    video = OpenVideo(
        path=name,
        stamp=stamp,
        container=container,
        stream=stream,
        codec=codec,
        codec_name=codec.name,
        tick_s=float(stream.time_base),
        start_tick=start_tick,
        fps=float(rate),
        header_end_s=float(min((claim_s for claim_s in claims_s if claim_s > 0), default=0)),
        is_whole=size_bytes is not None or 0 < stream.frames == len(index),
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        in_order_only=_in_order_only(container, codec),
        nal_length_bytes=nal_length_bytes(codec),
    )
    # Sound and subtitles may outlast the frames, so the duration of the file is not that of the video.
    if not stream.duration and (video.is_whole or len(container.streams) > 1 or not video.header_end_s):
        with open_input(name) as again:  # the position of the first one stays at its first packet
            elsewhere = replace(video, container=again, stream=cast(VideoStream, again.streams[stream.index]))
            video.header_end_s = max(last_frame_end_s(elsewhere), float(_tagged_end_s(stream)))
    return video


def _in_order_only(container: InputContainer, codec: VideoCodecContext) -> bool:
    """Return True for an AVI whose frames may be reordered, and for palettes, which only some packets carry."""
    if codec.pix_fmt == "pal8" and codec.name not in ("png", "gif"):
        return True
    return container.format.name == "avi" and (codec.name in ("h264", "hevc") or bool(codec.has_b_frames))


def _listed_bytes(name: str, format_name: str) -> int | None:
    """Return the size of a Matroska, WebM or FLV file as its own bytes list it; None for others and for recordings."""
    with open_bytes(name) as file:
        if "matroska" in format_name:
            # Two elements follow each other, the header and the segment; each has an identity of four bytes and a size.
            end = 0
            for _ in range(2):
                file.seek(end + 4)
                first = file.read(1) or b"\0"
                length = 9 - first[0].bit_length()  # of the size, 1-8 bytes
                if length > 8:
                    return None
                size = int.from_bytes(bytes([first[0] & (0xFF >> length)]) + file.read(length - 1), "big")
                if size == (1 << 7 * length) - 1:  # of unknown size, as in a recording
                    return None
                end += 4 + length + size
            return end
        if format_name == "flv":
            # Each tag is followed by its size, which stands at the beginning of the tag as well.
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 4))
            tag_bytes = int.from_bytes(file.read(4), "big")
            if 11 <= tag_bytes <= end - 4:
                file.seek(end - 4 - tag_bytes)
                head = file.read(4)
                if head[0] in (8, 9, 18) and int.from_bytes(head[1:], "big") == tag_bytes - 11:
                    return end
    return None


def _tagged_end_s(stream: VideoStream) -> Fraction:
    """Return the end of a Matroska track by its own tag, in seconds after its first frame; 0 if it has none."""
    parts = stream.metadata.get("DURATION", "").split(":")
    start_s = (stream.start_time or 0) * cast(Fraction, stream.time_base)
    try:
        hours, minutes, seconds = (Fraction(part) for part in parts)
    except ValueError:
        return Fraction(0)
    return max(Fraction(0), 3600 * hours + 60 * minutes + seconds - start_s)


def nal_length_bytes(codec: VideoCodecContext) -> int | None:
    """Return the bytes of the length before each unit of H.264 and HEVC packets in MP4 or Matroska; None for others."""
    at = {"h264": 4, "hevc": 21}.get(codec.name)
    extra = codec.extradata or b""
    if at is None or len(extra) <= at or extra[0] != 1:  # without a configuration record, start codes divide the units
        return None
    return 1 + (extra[at] & 3)


def last_frame_end_s(video: OpenVideo) -> float:
    """Demux the last group of frames and return the time at which its last frame ends."""
    claimed_tick = video.start_tick + math.ceil(video.header_end_s / video.tick_s)
    packets: list[Packet[VideoStream]] = []
    try:
        for tick in (claimed_tick, video.start_tick):  # some containers, such as FLV, seek past their last packet
            video.container.seek(tick, stream=video.stream)
            packets = [p for p in video.container.demux(video.stream) if p.pts is not None and not p.is_discard]
            if packets:
                break
    except av.error.FFmpegError as error:
        raise Damaged(error_text(error), video.path) from error
    return max((packet_end_s(video, packet) for packet in packets), default=0.0)


def packet_end_s(video: OpenVideo, packet: Packet[VideoStream]) -> float:
    """Return the time at which a packet's frame ends, in seconds after the first displayed frame."""
    duration_s = (packet.duration or 0) * video.tick_s or video.frame_s
    begin = packet.dts if video.in_order_only else packet.pts
    return video.time_s(cast(int, begin)) + duration_s
