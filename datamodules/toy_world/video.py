"""Pictures to files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from datamodules.toy_world.render import Camera


def encode(path: Path, frames: Iterable[NDArray[np.uint8]], camera: Camera, fps: int, far_keys: bool = False) -> None:
    """H.264 yuv420p, a key frame a second; ``far_keys``: every 250 frames with B-frames, as plain ffmpeg would."""
    options = {"preset": "ultrafast", "crf": "20", "g": str(fps), "bf": "0"}
    if far_keys:
        options = {"preset": "medium", "crf": "20", "g": "250", "sc_threshold": "0"}
        options["x264-params"] = "no-mbtree=1"  # with AVX-512, x264's macroblock tree differs from one time to the next
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = camera.width, camera.height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
