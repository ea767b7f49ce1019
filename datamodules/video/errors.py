"""Errors of reading video: each names the file, the span, the cause and how to fix it."""

from __future__ import annotations

import os
from pathlib import Path


class ClipDecodeError(ValueError):
    """A clip cannot be read. The message is one line: file, span, cause and how to fix it.

    Attributes:
        path: the file, or None if the error was rebuilt from its message alone, as DataLoader workers do.
        start_s, end_s: the requested span in seconds on the file's clock, or None if the whole file is concerned.
        reason: the cause, in the decoder's words if it gives any.
    """

    fix = ""

    def __init__(
        self,
        reason: str,
        path: str | os.PathLike[str] | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> None:
        """Build the message from its parts; without a path, ``reason`` is the whole message."""
        self.path = path if path is None or isinstance(path, Path) else Path(path)
        self.start_s = start_s
        self.end_s = end_s
        self.reason = reason
        message = reason
        if path is not None:
            span = "" if start_s is None or end_s is None else f" [{start_s:.3f}, {end_s:.3f}) s"
            message = f"{os.fspath(path)}{span}: {reason}{'; ' if self.fix else ''}{self.fix}"
        super().__init__(" ".join(message.split()) if path is not None else message)


class FileMissing(ClipDecodeError):
    """The file does not exist."""

    fix = "download it, correct the path or remove the take"


class NotAVideo(ClipDecodeError):
    """The file cannot be opened as a video: empty, text, a folder, or cut before its header."""

    fix = "re-download it or remove the take"


class NoVideoStream(ClipDecodeError):
    """The file opens but has no video stream (sound only, or a cover image)."""

    fix = "check the path or remove the take"


class EmptySpan(ClipDecodeError):
    """The span is empty: end <= start, no frames, or a time that is not a finite number."""

    fix = "correct the annotation"


class SpanOutsideFile(ClipDecodeError):
    """The span begins before the first frame or ends more than one frame after the last."""

    fix = "correct the annotation or the view's offset"


class FrameMissing(ClipDecodeError):
    """The file lists a frame that the decoder never returns, even from the start of the file."""

    fix = "re-encode it or remove the take"


class NoTimes(ClipDecodeError):
    """The file does not say when its frames are displayed, such as a raw stream; it need not be damaged."""

    fix = "write it with times, by ffmpeg -i IN -c:v libx264 -crf 16 -an OUT.mp4 (raw streams: -r RATE before -i)"


class Mirrored(ClipDecodeError):
    """The display matrix or the EXIF orientation mirrors the frames, which is not supported."""

    fix = "write it upright, such as by ffmpeg -i IN -c:v libx264 -crf 16 -an OUT.mp4"


class Damaged(ClipDecodeError):
    """A packet or frame that the clip depends on is corrupt, or the file is shorter than its header claims."""

    fix = "re-download it or remove the take"


class Changed(ClipDecodeError):
    """A remote file was replaced while it was read."""

    fix = "keep the files of a run as they are, and write new ones under new names"


class Unreachable(ClipDecodeError):
    """The storage of a remote file does not answer, or refuses to."""

    fix = "check the address, the network and the credentials"


class TimedOut(ClipDecodeError):
    """Reading did not finish within the reader's time limit."""

    fix = "check the disk or network that holds the file, re-encode it or remove the take"


def error_text(error: Exception) -> str:
    """Return the operating system's or FFmpeg's description of an error, without its number."""
    return str(getattr(error, "strerror", None) or error)
