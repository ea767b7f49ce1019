"""Open files with FFmpeg and set up their decoders, the same way for every part that reads video."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from datamodules.video.errors import ClipDecodeError, Mirrored
from datamodules.video.remote import RemoteFile, is_remote

_REFERS_TO_FILES = frozenset(
    {"concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "vobsub", "webm_dash_manifest"}
)
# FFmpeg can only be given the names of all others.
_SELF_CONTAINED = ",".join(sorted(av.formats_available - _REFERS_TO_FILES))
_BUFFER_BYTES = 16 * 1024  # FFmpeg reads so far ahead in a remote file
_CHECKS_BITSTREAM = frozenset({"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"})


def media_url(path: str) -> str:
    """Return the name under which FFmpeg opens a local file; without ``file:``, ``12:30.mp4`` would be a protocol."""
    return f"file:{path}"


def open_input(path: str, options: Mapping[str, str] | None = None) -> InputContainer:
    """Open a file for reading, which may be remote.

    Playlists and other files that refer to files or addresses are refused: a video that somebody sent could make the
    process read others.

    Args:
        path: the file; it may be relative and hold colons, or an address such as ``s3://bucket/take.mp4``.
        options: options of FFmpeg's demuxer.

    Raises:
        av.error.FFmpegError: the file is missing or cannot be opened as a video.
        ClipDecodeError: a remote file cannot be read.
    """
    options = {"format_whitelist": _SELF_CONTAINED, **(options or {})}
    if is_remote(path):
        return cast(InputContainer, _RemoteInput(path, options))
    return av.open(media_url(path), "r", options=options, metadata_errors="ignore")


def open_bytes(path: str) -> io.BufferedReader:
    """Open the bytes of a file, which may be remote."""
    return io.BufferedReader(RemoteFile(path)) if is_remote(path) else open(path, "rb")


def prefetch(container: InputContainer, stream: VideoStream, first_tick: int, last_tick: int) -> None:
    """Read the bytes that the frames between two display times need at once, if the file is remote and has an index."""
    if not isinstance(container, _RemoteInput) or not len(stream.index_entries):
        return
    # The index has decode times, which come before the display times where frames are reordered.
    index = stream.index_entries
    delay = max(0, (stream.start_time or 0) - index[0].timestamp)
    first = max(0, index.search_timestamp(first_tick - delay))
    last = index.search_timestamp(last_tick, any_frame=True)
    if first <= last:
        # The packet after the last one is read as well, which shows that the span is complete.
        end = index[min(last + 1, len(index) - 1)]
        container.source.prefetch(index[first].pos, end.pos + end.size + _BUFFER_BYTES)


class _RemoteSource:
    """A remote file in the form that PyAV reads.

    FFmpeg takes bytes that cannot be read for the end of the file, so the error is kept for ``check``.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        self._file = RemoteFile(address)
        self._error: ClipDecodeError | None = None
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, count: int) -> bytes:
        if self._error is None:
            try:
                return self._file.read(count) or b""
            except ClipDecodeError as error:
                self._error = error
        return b""

    def prefetch(self, begin: int, end: int) -> None:
        self._file.prefetch(begin, end)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class _RemoteInput:
    """A container of PyAV that raises the error of its remote file in place of what FFmpeg makes of missing bytes."""

    def __init__(self, address: str, options: Mapping[str, str]) -> None:
        self.source = _RemoteSource(address)
        with self._checked():
            self._container = av.open(
                self.source, "r", options=dict(options), metadata_errors="ignore", buffer_size=_BUFFER_BYTES
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def __enter__(self) -> _RemoteInput:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def seek(self, *arguments: Any, **options: Any) -> None:
        with self._checked():
            self._container.seek(*arguments, **options)

    def demux(self, *streams: Any, **chosen: Any) -> Iterator[Any]:
        return self._each(self._container.demux(*streams, **chosen))

    def decode(self, *streams: Any, **chosen: Any) -> Iterator[Any]:
        return self._each(self._container.decode(*streams, **chosen))

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._checked():
                item = next(items, None)
            if item is None:
                return
            yield item

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError:
            self.source.check()
            raise
        self.source.check()


def set_up_decoder(codec: VideoCodecContext) -> None:
    """Make a decoder run in the caller's thread and report all damage that it detects.

    Call it before the first packet is decoded. VP8, VP9, AV1, HEVC and FFV1 can decode damaged data without an error.
    """
    codec.thread_type = "NONE"  # parallelism comes from workers, and this avoids deadlocks
    codec.thread_count = 1
    # For other codecs, "bitstream" refuses stuffing that encoders add on purpose.
    checks = "crccheck+explode+bitstream" if codec.name in _CHECKS_BITSTREAM else "crccheck+explode"
    codec.options = {**codec.options, "err_detect": checks}


def quarter_turns(frame: VideoFrame) -> int:
    """Return the quarter turns counter-clockwise that make a frame upright, 0-3.

    Raises:
        Mirrored: its display matrix mirrors it.
    """
    try:
        matrix = cast(Any, frame.side_data).get("DISPLAYMATRIX")
    except ValueError:  # an image with EXIF data, which PyAV does not know: see ``refuse_mirrored_image``
        matrix = None
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
        if a * d - b * c < 0:
            raise Mirrored("its display matrix mirrors the frames")
    return (frame.rotation // 90) % 4


def refuse_mirrored_image(head: bytes, name: str, folder: str) -> None:
    """Check the EXIF orientation in the first bytes of a JPEG or PNG file.

    Raises:
        Mirrored: the orientation is 2, 4, 5 or 7.
    """
    at = max(head.find(b"Exif\0\0") + 6, head.find(b"eXIf") + 4)
    order = {b"II": "<", b"MM": ">"}.get(head[at : at + 2])
    if at < 8 or order is None:
        return
    try:
        (directory,) = struct.unpack_from(f"{order}I", head, at + 4)
        (count,) = struct.unpack_from(f"{order}H", head, at + directory)
        for number in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", head, at + directory + 2 + 12 * number)
            if tag == 0x112 and value in (2, 4, 5, 7):
                raise Mirrored(f"image {name}: its EXIF orientation {value} mirrors it", folder)
    except struct.error:
        return
