"""Clips that are cut out of videos hold the frames of their window, in the colours of the source."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_clip_stream import FPS, SIDE, make_video, numbers_on, painted

from datamodules.tools.data_check import decode_whole
from datamodules.tools.reencode import Encoding, ReencodeError, colours, reencode
from datamodules.tools.trim import cut
from datamodules.video.reader import ClipReader

BT601, BT709, BT2020 = 6, 1, 9
LIMITED, FULL = 1, 2
WINDOW_S = (0.3, 0.9)
WINDOW_NUMBERS = [3, 4, 5, 6, 7, 8]


def make_coloured_video(path: Path, pixel_format: str, matrix: int, color_range: int) -> Path:
    """Write red frames with all colour properties of a matrix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, codec = pixel_format, stream.codec_context
        codec.colorspace, codec.color_range = matrix, color_range
        codec.color_primaries = codec.color_trc = matrix if matrix != BT2020 else 1
        for number in range(20):
            image = painted(number, SIDE, SIDE)
            image[..., 1:] //= 3
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame = frame.reformat(format=pixel_format, dst_colorspace=matrix, dst_color_range=color_range)
            frame.colorspace, frame.color_range = matrix, color_range
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv", ".flv"])
def test_a_clip_holds_the_frames_of_its_window(suffix: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / f"v{suffix}")
    assert cut(tmp_path, tmp_path, (path.name, *WINDOW_S, "clip.mp4")) == ""
    times_s = [number / FPS + 0.05 for number in range(6)]
    assert numbers_on(ClipReader().read(tmp_path / "clip.mp4", times_s, SIDE, "squash")) == WINDOW_NUMBERS
    assert len(list(decode_whole(tmp_path / "clip.mp4"))) == 6


@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
@pytest.mark.parametrize(("pixel_format", "color_range"), [("yuv420p", LIMITED), ("yuvj420p", FULL)])
def test_colours_are_those_of_the_source(matrix: int, pixel_format: str, color_range: int, tmp_path: Path) -> None:
    path = make_coloured_video(tmp_path / "v.mp4", pixel_format, matrix, color_range)
    assert cut(tmp_path, tmp_path, (path.name, *WINDOW_S, "clip.mp4")) == ""
    reencode(path, tmp_path / "small.mp4", Encoding(crf=10))
    reader = ClipReader()
    source = reader.read(path, [0.35, 0.85], SIDE, "squash").frames.float()
    for name, begin_s in (("clip.mp4", 0.3), ("small.mp4", 0.0)):
        written = reader.read(tmp_path / name, [0.35 - begin_s, 0.85 - begin_s], SIDE, "squash").frames.float()
        assert (written - source).mean(dim=(0, 1, 2)).abs().max() < 1.0, name
        assert colours(next(decode_whole(tmp_path / name))) == colours(next(decode_whole(path)))
    assert colours(next(decode_whole(path)))[0] == matrix


def test_interlaced_frames_are_refused_by_name(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", codec_options={"x264-params": "interlaced=1:tff=1"})
    assert "its frames are interlaced" in cut(tmp_path, tmp_path, (path.name, *WINDOW_S, "clip.mp4"))
    with pytest.raises(ReencodeError, match="its frames are interlaced"):
        reencode(path, tmp_path / "small.mp4", Encoding())
    assert not (tmp_path / "clip.mp4").exists() and not (tmp_path / "small.mp4").exists()


def test_a_clip_that_misses_a_frame_of_its_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v.mp4")
    from datamodules.tools import trim

    shown = trim._shown
    monkeypatch.setattr(trim, "_shown", lambda *args: (f for i, f in enumerate(shown(*args)) if i != 2))
    assert "are not those of the window" in cut(tmp_path, tmp_path, (path.name, *WINDOW_S, "clip.mp4"))
    assert np.all([not file.name.startswith("clip") for file in tmp_path.iterdir()])
