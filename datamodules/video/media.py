"""Open files with FFmpeg and set up their decoders, the same way for every part that reads video."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from datamodules.video.errors import Mirrored

_REFERS_TO_FILES = frozenset(
    {"concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "vobsub", "webm_dash_manifest"}
)
# FFmpeg can only be given the names of all others.
_SELF_CONTAINED = ",".join(sorted(av.formats_available - _REFERS_TO_FILES))
_CHECKS_BITSTREAM = frozenset({"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"})


def media_url(path: str) -> str:
    """Return the name under which FFmpeg opens a local file; without ``file:``, ``12:30.mp4`` would be a protocol."""
    return f"file:{path}"


def open_input(path: str, options: Mapping[str, str] | None = None) -> InputContainer:
    """Open a local file for reading.

    Playlists and other files that refer to files or addresses are refused: a video that somebody sent could make the
    process read others.

    Args:
        path: the file; it may be relative and hold colons.
        options: options of FFmpeg's demuxer.

    Raises:
        av.error.FFmpegError: the file is missing or cannot be opened as a video.
    """
    options = {"format_whitelist": _SELF_CONTAINED, **(options or {})}
    return av.open(media_url(path), "r", options=options, metadata_errors="ignore")


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
