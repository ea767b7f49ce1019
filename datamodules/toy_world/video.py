"""Write frames to H.264 files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from datamodules.toy_world.render import Camera


def encode(path: Path, frames: Iterable[NDArray[np.uint8]], camera: Camera, fps: int, far_keys: bool = False) -> None:
    """Write RGB frames as H.264 in yuv420p.

    Args:
        path: file to write; its folder is created.
        frames: uint8 [height, width, 3] each, RGB.
        camera: gives width and height in pixels.
        fps: frames per second.
        far_keys: a key frame every 250 frames and B-frames, as ffmpeg writes by default, not one every second.
    """
    options = {"preset": "ultrafast", "crf": "20", "g": str(fps), "bf": "0"}
    if far_keys:
        options = {"preset": "medium", "crf": "20", "g": "250", "sc_threshold": "0"}
        options["x264-params"] = "no-mbtree=1"  # with AVX-512, x264's macroblock tree differs between runs
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = camera.width, camera.height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
