"""Decoded frames to small RGB squares, with filters and scalers that are set up once per frame size and format."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, cast

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from datamodules.video.media import quarter_turns

Fit = Literal["pad", "crop", "squash"]
FITS: tuple[Fit, ...] = ("pad", "crop", "squash")
RGB = tuple[int, int, int]
PAD_RGB: RGB = (122, 116, 104)  # CLIP's mean colour, so that padding is about zero after normalisation

# Pixel formats that are scaled in YUV and then converted to RGB without scaling, which is cheaper than one step.
_YUV_STEP = {"yuv420p": "yuv420p", "yuvj420p": "yuvj420p", "yuv420p10le": "yuv420p"}


class FrameConverter:
    """Convert decoded frames of one size and format to RGB squares."""

    def __init__(
        self, width: int, height: int, pixel_format: str, pixel_aspect: float, size: int, fit: Fit, pad_rgb: RGB
    ) -> None:
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
        self._pad = np.tile(np.array(pad_rgb, dtype=np.uint8), (size, 1))  # one row of the border
        self._scale = VideoReformatter()
        self._to_rgb = VideoReformatter()

    def write(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Convert ``frame`` and write it to the centre of ``out``, uint8 [size, size, 3], on the padding."""
        pixels = self._scaled_rgb(frame)
        top, left = (out.shape[0] - pixels.shape[0]) // 2, (out.shape[1] - pixels.shape[1]) // 2
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        for border in (out[:top], out[bottom:], out[top:bottom, :left], out[top:bottom, right:]):
            border[:] = self._pad[: border.shape[1]]
        out[top:bottom, left:right] = pixels

    def _scaled_rgb(self, frame: VideoFrame) -> np.ndarray:
        """Return the upright scaled frame, uint8 [height, width, 3]."""
        turns = quarter_turns(frame)
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
        return np.rot90(pixels, turns) if turns else pixels


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def _fit_inside(width: float, height: float, size: int) -> tuple[int, int]:
    """Return the scaled (width, height) whose long side is ``size``; the short side even if ``size`` is."""
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
