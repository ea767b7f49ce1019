"""Open files with FFmpeg and set up their decoders, the same way for every part that reads video."""

from __future__ import annotations

from collections.abc import Mapping

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext

_CHECKS_BITSTREAM = frozenset({"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"})


def media_url(path: str) -> str:
    """Return the name under which FFmpeg opens a local file; without ``file:``, ``12:30.mp4`` would be a protocol."""
    return f"file:{path}"


def open_input(path: str, options: Mapping[str, str] | None = None) -> InputContainer:
    """Open a local file for reading.

    Args:
        path: the file; it may be relative and hold colons.
        options: options of FFmpeg's demuxer.

    Raises:
        av.error.FFmpegError: the file is missing or cannot be opened as a video.
    """
    return av.open(media_url(path), "r", options=dict(options or {}), metadata_errors="ignore")


def set_up_decoder(codec: VideoCodecContext) -> None:
    """Make a decoder run in the caller's thread and report all damage that it detects.

    Call it before the first packet is decoded. VP8, VP9, AV1, HEVC and FFV1 can decode damaged data without an error.
    """
    codec.thread_type = "NONE"  # parallelism comes from workers, and this avoids deadlocks
    codec.thread_count = 1
    # For other codecs, "bitstream" refuses stuffing that encoders add on purpose.
    checks = "crccheck+explode+bitstream" if codec.name in _CHECKS_BITSTREAM else "crccheck+explode"
    codec.options = {**codec.options, "err_detect": checks}
