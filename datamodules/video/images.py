"""Folders of images, and single images, read as videos: ``IMAGES_FPS`` images a second in the order of their names."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import av
from av.video.frame import VideoFrame

from datamodules.video.errors import Damaged, NotAVideo, SpanOutsideFile, error_text
from datamodules.video.media import open_bytes, open_input, refuse_mirrored_image, set_up_decoder

IMAGES_FPS = 30.0
"""Frame rate of a folder of images, the one at which OpenEQA's own script encodes its episodes."""
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder at the time it was listed, or a single image.

    Attributes:
        path: the folder, or the image.
        stamp: its modification time in nanoseconds.
        names: file names in natural order (2 before 10); empty for a single image.
    """

    path: str
    stamp: int
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return max(1, len(self.names))

    @property
    def end_s(self) -> float:
        """End of the last image in seconds."""
        return len(self) / IMAGES_FPS

    def number_shown_by(self, time_s: float) -> int:
        """Return the number of the last image displayed at or before a time up to one frame past the end."""
        number = math.floor((time_s + 1e-3) * IMAGES_FPS)
        if not 0 <= number <= len(self):
            raise SpanOutsideFile(f"{time_s:.3f} s is outside its {len(self)} images, {self.end_s:.3f} s")
        return min(number, len(self) - 1)

    def frame(self, number: int) -> VideoFrame:
        """Decode one image.

        Raises:
            Damaged: it cannot be decoded.
        """
        file = os.path.join(self.path, self.names[number]) if self.names else self.path
        name = os.path.basename(file)
        try:
            with open_input(file) as container:
                set_up_decoder(container.streams.video[0].codec_context)
                frame = next(container.decode(video=0))
        except (av.error.FFmpegError, StopIteration, IndexError) as error:
            raise Damaged(f"image {name}: {error_text(error)}", self.path) from error
        with open_bytes(file) as opened:
            refuse_mirrored_image(opened.read(1 << 16), name, self.path)
        if frame.is_corrupt:
            raise Damaged(f"image {name} is corrupt", self.path)
        return frame


def is_image(path: str) -> bool:
    """Return whether a path names a single image, by its ending."""
    return os.path.splitext(path)[1].lower() in _IMAGE_SUFFIXES and not os.path.isdir(path)


def list_images(folder: str) -> tuple[str, ...]:
    """List a folder's images in natural order; only those ending in ``-rgb`` if there are any (OpenEQA adds depth).

    Raises:
        NotAVideo: the folder cannot be listed or has no images.
    """
    try:
        listed = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=_natural_key)
    except OSError as error:
        raise NotAVideo(error_text(error), folder) from error
    names = [name for name in listed if os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES]
    colour = [name for name in names if os.path.splitext(name)[0].endswith("-rgb")]
    if not names:
        raise NotAVideo("the folder holds no images (.png, .jpg)", folder)
    return tuple(colour or names)


def _natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers in names by their value."""
    parts = re.split("([0-9]+)", name)  # texts and numbers alternate
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
