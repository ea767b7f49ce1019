"""The reader returns the right frames, makes them square, and refuses files that cannot be read.

Every generated frame carries its number as a grid of black and white blocks, so a test reads from the pixels which
frame it was given.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from datamodules.video.convert import PAD_RGB, Fit
from datamodules.video.errors import (
    ClipDecodeError,
    Damaged,
    EmptySpan,
    FileMissing,
    Mirrored,
    NotAVideo,
    NoVideoStream,
    SpanOutsideFile,
)
from datamodules.video.probe import probe
from datamodules.video.reader import Clip, ClipReader
from datamodules.video.sampling import read_views, segment_midpoints

FPS = 10
BITS = 12  # 4 columns by 3 rows of blocks, lowest bit first
SIDE = 96


def painted(number: int, width: int, height: int) -> np.ndarray:
    """Uint8 [height, width, 3] image that shows ``number`` as 4 x 3 blocks, over a faint moving texture."""
    bits = np.array([(number >> bit) & 1 for bit in range(BITS)]).reshape(3, 4)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    texture = (np.arange(width)[None, :] * 3 + np.arange(height)[:, None] * 5 + number * 11) % 40
    grey = np.where(bits[rows[:, None], columns[None, :]], 215, 0) + texture
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def number_on(image: np.ndarray) -> int:
    """Read the number from a image of any size that shows the whole frame."""
    height, width = image.shape[:2]
    rows, columns = (np.arange(3) * 2 + 1) * height // 6, (np.arange(4) * 2 + 1) * width // 8
    bits = image[rows[:, None], columns[None, :]].mean(axis=-1) > 128
    return int((bits.ravel() * (1 << np.arange(BITS))).sum())


def numbers_on(clip: Clip) -> list[int]:
    return [number_on(frame) for frame in clip.frames.numpy()]


def make_video(
    path: Path,
    num_frames: int = 40,
    width: int = SIDE,
    height: int = SIDE,
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    times_ms: Sequence[int] | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    draw: Callable[[int, int, int], np.ndarray] = painted,
) -> Path:
    """Write a video at 10 frames per second, or at the given display times."""
    x264 = {"preset": "veryfast", "crf": "18"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        try:
            stream = container.add_stream(codec, rate=FPS, options=x264 | (codec_options or {}))
        except (av.error.FFmpegError, ValueError) as error:
            pytest.skip(f"this build of PyAV has no {codec}: {error}")
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width, height), "rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = number * 1000 // FPS if times_ms is None else times_ms[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_avi(path: Path, codec: str, b_frames: int = 0, pixel_format: str = "yuv420p", num_frames: int = 40) -> Path:
    """Write a video whose container has no display times, at 10 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"q:v": "3"} if codec != "libx264" else {"crf": "16"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size, stream.max_b_frames = pixel_format, 12, b_frames
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(painted(number, SIDE, SIDE), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_edit_list_video(path: Path) -> Path:
    """Copy a video's packets with the first half second at negative times, which an MP4 hides by an edit list."""
    source = make_video(path.with_suffix(".source.mp4"))
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None and packet.pts is not None:
                shift = round(0.5 / packet.time_base)
                packet.dts, packet.pts = packet.dts - shift, packet.pts - shift
                packet.stream = stream
                new.mux(packet)
    return path


def decode_all(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times (s, 0 = first) and unscaled RGB images of a plain decode from start to end."""
    times_s, images = [], []
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
        stream.codec_context.thread_type = "NONE"
        for frame in container.decode(stream):
            times_s.append(float(frame.pts * frame.time_base))
            images.append(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    return [time_s - times_s[0] for time_s in times_s], images


def make_covered_video(path: Path) -> Path:
    """A video with a cover image, which is a video stream of its own."""
    source = make_video(path.with_suffix(".source.mp4"))
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=FPS)
        cover.width = cover.height = SIDE
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        stream = new.add_stream_from_template(old.streams.video[0])
        new.mux(cover.encode(av.VideoFrame.from_ndarray(painted(4000, SIDE, SIDE), "rgb24")))
        new.mux(cover.encode())
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path


VARIABLE_MS = [0, *np.cumsum([100, 70, 230, 40, 310, 120, 60] * 6).tolist()]
X264_OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"}
X265 = "pools=none:frame-threads=1:log-level=none"
X265_OPEN_GOP = f"{X265}:open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "b_frames": lambda p: make_video(p / "v.mp4"),
    "b_pyramid": lambda p: make_video(p / "v.mp4", b_frames=4, codec_options={"x264-params": "b-pyramid=normal"}),
    "long_gop": lambda p: make_video(p / "v.mp4", num_frames=280, gop=250),
    "open_gop": lambda p: make_video(p / "v.mp4", gop=8, b_frames=3, codec_options=X264_OPEN_GOP),
    "intra_refresh": lambda p: make_video(p / "v.mp4", b_frames=0, codec_options={"x264-params": "intra-refresh=1"}),
    "variable_rate": lambda p: make_video(p / "v.mp4", len(VARIABLE_MS), times_ms=VARIABLE_MS),
    "start_offset": lambda p: make_video(p / "v.mp4", times_ms=[700 + 100 * i for i in range(40)]),
    "no_edit_list": lambda p: make_video(p / "v.mp4", container_options={"use_editlist": "0"}),
    "edit_list": lambda p: make_edit_list_video(p / "v.mp4"),
    "fragmented": lambda p: make_video(p / "v.mp4", container_options=FRAGMENTED),
    "one_frame": lambda p: make_video(p / "v.mp4", num_frames=1),
    "all_key_frames": lambda p: make_video(p / "v.mp4", gop=1, b_frames=0),
    "cover": lambda p: make_covered_video(p / "v.mp4"),
    "10_bit": lambda p: make_video(p / "v.mp4", pixel_format="yuv420p10le"),
    "hevc": lambda p: make_video(p / "v.mp4", codec="libx265", codec_options={"x265-params": X265}),
    "hevc_10_bit": lambda p: make_video(
        p / "v.mp4", codec="libx265", codec_options={"x265-params": X265}, pixel_format="yuv420p10le"
    ),
    "hevc_open_gop": lambda p: make_video(
        p / "v.mp4", gop=8, b_frames=3, codec="libx265", codec_options={"x265-params": X265_OPEN_GOP}
    ),
    "av1": lambda p: make_video(
        p / "v.mp4", 25, codec="libsvtav1", codec_options={"preset": "12", "svtav1-params": "lp=1"}
    ),
    "mpeg4": lambda p: make_video(p / "v.mp4", codec="mpeg4", codec_options={"qscale": "3"}),
    "mpeg_ts": lambda p: make_video(p / "v.ts"),
    "matroska": lambda p: make_video(p / "v.mkv"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_full_sequential_decode(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    times_s, images = decode_all(path)
    numbers = [number_on(image) for image in images]
    first = {"edit_list": 5}.get(kind, 0)
    assert numbers == list(range(first, first + len(numbers)))  # the reference itself, read from the pixels
    reader = ClipReader()
    ends_s = [*times_s[1:], times_s[-1] + 0.05]
    rng = np.random.default_rng(0)
    wanted = [rng.integers(len(times_s), size=1) for _ in range(15)]
    wanted += [np.sort(rng.integers(len(times_s), size=5)) for _ in range(15)]
    wanted += [np.arange(len(times_s)), np.array([0]), np.array([len(times_s) - 1])]
    for picks in wanted:
        middles_s = [(times_s[i] + ends_s[i]) / 2 for i in picks]
        clip = reader.read(path, middles_s, SIDE, "squash")
        assert numbers_on(clip) == [numbers[i] for i in picks]
        assert np.array_equal(clip.frames.numpy(), np.stack([images[i] for i in picks]))
        assert clip.times_s == pytest.approx([times_s[i] for i in picks], abs=1e-4)
        if kind != "variable_rate":
            assert clip.frame_numbers.tolist() == picks.tolist()


@pytest.mark.parametrize("kind", ["open_gop", "hevc_open_gop"])
def test_files_with_open_groups_have_frames_that_refer_behind_their_key_frame(kind: str, tmp_path: Path) -> None:
    with av.open(str(KINDS[kind](tmp_path))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert sum(packets[key + 1].pts < packets[key].pts for key in keys[1:-1]) >= 2


@pytest.mark.parametrize(("codec", "pixel_format"), [("libx264", "yuv444p"), ("mpeg4", "yuv420p")])
@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_odd_sizes(codec: str, pixel_format: str, fit: Fit, tmp_path: Path) -> None:
    options = {"qscale": "3"} if codec == "mpeg4" else {}
    path = make_video(tmp_path / "v.mp4", 20, 125, 93, codec=codec, codec_options=options, pixel_format=pixel_format)
    reader = ClipReader()
    for size in (64, 63):
        clip = reader.read(path, [0.35, 1.95, 0.05], size, fit)
        height = {"pad": 48 if size == 64 else 47, "squash": size}[fit]  # 64 x 47.6, even as the size; 63 x 46.9
        top = (size - height) // 2
        assert [number_on(frame[top : top + height]) for frame in clip.frames.numpy()] == [3, 19, 0]
        assert (clip.frames[:, :top] == torch.tensor(PAD_RGB)).all()
        assert (clip.frames[:, top + height :] == torch.tensor(PAD_RGB)).all()
    crop = reader.read(path, [0.35], 32, "crop").frames[0].numpy()
    assert crop.shape == (32, 32, 3)


def test_a_time_on_a_boundary_rounded_down_gives_the_frame_that_begins_there(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4")
    clip = ClipReader().read(path, [0.3, 0.2996, 0.398, 0.0], SIDE)
    assert numbers_on(clip) == [3, 3, 3, 0]
    assert clip.frame_numbers.tolist() == [3, 3, 3, 0]
    assert clip.times_s.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.0])
    assert clip.frames.dtype.is_floating_point is False and clip.frames.is_contiguous()
    assert clip.frames.shape == (4, SIDE, SIDE, 3)


def test_midpoints_of_equal_parts() -> None:
    assert segment_midpoints(2.0, 4.0, 4).tolist() == [2.25, 2.75, 3.25, 3.75]
    with pytest.raises(ValueError, match="num_frames: got 0, allowed: 1 or more"):
        segment_midpoints(0.0, 1.0, 0)


def red_green_blue(number: int, width: int, height: int) -> np.ndarray:
    """Uint8 [height, width, 3] with a red left, green middle and blue right third, darkening downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        image[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 200
    return image


@pytest.mark.parametrize("size", [64, 63])
def test_geometry_of_pad_crop_and_squash(size: int, tmp_path: Path) -> None:
    path = make_video(tmp_path / "wide.mp4", 3, width=192, height=96, draw=red_green_blue)
    reader = ClipReader()
    pad, crop, squash = (
        reader.read(path, [0.0], size, fit).frames[0].numpy().astype(int) for fit in ("pad", "crop", "squash")
    )
    fill = np.array(PAD_RGB)
    top = {64: 16, 63: 15}[size]  # 192 x 96 becomes 64 x 32 or 63 x 31.5, rounded to 32; an odd row goes below
    assert (pad[:top] == fill).all() and (pad[top + 32 :] == fill).all()
    assert not (pad[top : top + 32] == fill).all(axis=-1).any()
    for image in (pad[top : top + 32], squash):
        thirds = [image[:, round((k + 0.5) * size / 3)].mean(axis=0) for k in range(3)]
        assert [int(third.argmax()) for third in thirds] == [0, 1, 2]
        assert all(abs(third.max() - 200) < 12 for third in thirds)
    # the central 96 of 192 columns: 16 red, 64 green, 16 blue, so at 64 pixels a side 10.67, 42.67 and 10.67
    colours = crop[size // 2].argmax(axis=-1).tolist()
    assert abs(colours.count(0) - size / 6) < 1.5 and abs(colours.count(2) - size / 6) < 1.5
    assert colours == sorted(colours)


def test_the_colour_of_the_padding_can_be_chosen(tmp_path: Path) -> None:
    path, reader = make_video(tmp_path / "v.mp4", 3, width=64, height=32), ClipReader()
    grey, clip = (reader.read(path, [0.0], 64, pad_rgb=colour).frames[0] for colour in ((127, 127, 127), None))
    assert (grey[:16] == 127).all() and (clip[:16] == torch.tensor(PAD_RGB)).all()
    assert torch.equal(grey[16:48], clip[16:48])
    views = read_views(reader, {"ego": path}, 0.0, 0.3, 1, 64, "pad", pad_rgb=(1, 2, 3))
    assert (views["ego"].frames[0, :16] == torch.tensor((1, 2, 3))).all()


def test_portrait_is_padded_left_and_right_and_cut_at_top_and_bottom(tmp_path: Path) -> None:
    path = make_video(tmp_path / "tall.mp4", 12, width=96, height=160)
    reader = ClipReader()
    pad = reader.read(path, [0.55], 80, "pad").frames[0].numpy()  # 96 x 160 becomes 48 x 80, 16 columns each side
    assert (pad[:, :16] == PAD_RGB).all() and (pad[:, 64:] == PAD_RGB).all()
    assert number_on(pad[:, 16:64]) == 5
    crop = reader.read(path, [0.55], 96, "crop").frames[0].numpy()
    _, images = decode_all(path)
    assert np.array_equal(crop, images[5][32:128])


def test_a_frame_already_square_is_the_same_under_every_fit(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 3)
    reader = ClipReader()
    pad, crop, squash = (reader.read(path, [0.1], 48, fit).frames for fit in ("pad", "crop", "squash"))
    assert pad.equal(crop) and pad.equal(squash)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_the_rotation_in_the_file_is_applied(rotation: int, turns: int, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 3, width=128, height=64, rotation=rotation)
    stored = make_video(tmp_path / "stored.mp4", 3, width=128, height=64)
    reader = ClipReader()
    turned = reader.read(path, [0.1], 64, "pad").frames[0].numpy()
    plain = reader.read(stored, [0.1], 64, "pad").frames[0].numpy()
    assert np.array_equal(turned, np.rot90(plain, turns))
    assert probe(path).rotation == rotation
    assert probe(stored).rotation == 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirrored_display_matrix_is_refused(mirrored: bool, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 5)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix of the track: a, b, u, c, d
    assert data[at : at + 4] == b"\0\1\0\0"
    data[at : at + 4] = (-0x10000 if mirrored else 0x10000).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    if not mirrored:
        assert numbers_on(ClipReader().read(path, [0.35], SIDE)) == [3]
        return
    with pytest.raises(Mirrored, match="display matrix mirrors"):
        ClipReader().read(path, [0.35], SIDE)
    with pytest.raises(Mirrored, match=r"v\.mp4: its display matrix"):
        probe(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_by_their_orientation_or_refused(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = {1: 0, 3: 2, 6: 1, 8: 3}.get(orientation)
    image = np.rot90(painted(1234, SIDE, SIDE), turned or 0)  # so that the orientation makes it upright
    Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f"1{suffix}", exif=exif, quality=95)
    if turned is None:
        with pytest.raises(Mirrored, match=f"EXIF orientation {orientation} mirrors"):
            ClipReader().read(tmp_path, [0.0], SIDE)
    else:
        assert numbers_on(ClipReader().read(tmp_path, [0.0], SIDE)) == [1234]


def test_views_of_different_size_and_length_carry_equal_frame_numbers(tmp_path: Path) -> None:
    paths = {
        "ego": make_video(tmp_path / "ego.mp4", 30, width=96, height=96),
        "exo": make_video(tmp_path / "exo.mp4", 29, width=160, height=96, gop=7),
    }
    for start_s, end_s, num_frames in ((0.0, 3.0, 29), (0.4, 1.4, 4), (2.5, 3.0, 4), (1.23, 1.31, 3)):
        clips = read_views(ClipReader(), paths, start_s, end_s, num_frames, 96, "squash")
        assert numbers_on(clips["ego"]) == numbers_on(clips["exo"])
        assert clips["ego"].frame_numbers.tolist() == clips["exo"].frame_numbers.tolist() == numbers_on(clips["ego"])
    assert numbers_on(read_views(ClipReader(), paths, 0.4, 1.4, 4, 96, "squash")["exo"]) == [5, 7, 10, 12]


def test_an_offset_shifts_one_view(tmp_path: Path) -> None:
    paths = {"ego": make_video(tmp_path / "ego.mp4", 30), "exo": make_video(tmp_path / "exo.mp4", 30)}
    clips = read_views(ClipReader(), paths, 1.0, 2.0, 5, SIDE, "pad", {"exo": 0.5})
    assert numbers_on(clips["ego"]) == [11, 13, 15, 17, 19]
    assert numbers_on(clips["exo"]) == [6, 8, 10, 12, 14]


def test_an_end_past_the_file_is_clamped_within_one_frame_and_refused_beyond(tmp_path: Path) -> None:
    path = {"ego": make_video(tmp_path / "ego.mp4", 30)}
    reader = ClipReader()
    assert reader.usable_end_s(path["ego"], 2.0, 3.09) == pytest.approx(3.0)
    assert numbers_on(read_views(reader, path, 2.8, 3.09, 2, SIDE, "pad")["ego"]) == [28, 29]
    with pytest.raises(SpanOutsideFile, match=r"ego\.mp4.*2\.800.*3\.200.*ends at 3\.000 s"):
        read_views(reader, path, 2.8, 3.2, 2, SIDE, "pad")
    for start_s, end_s in ((3.0, 3.05), (50.0, 51.0), (-0.2, 0.5)):
        with pytest.raises(SpanOutsideFile, match=r"ego\.mp4"):
            read_views(reader, path, start_s, end_s, 2, SIDE, "pad")
    assert numbers_on(reader.read(path["ego"], [3.05], SIDE)) == [29]
    for time_s in (3.15, 9.0, -0.1):
        with pytest.raises(SpanOutsideFile, match=r"ego\.mp4"):
            reader.read(path["ego"], [time_s], SIDE)


def test_an_end_of_infinity_is_that_of_the_shortest_file(tmp_path: Path) -> None:
    paths = {"ego": make_video(tmp_path / "ego.mp4", 30), "exo": make_video(tmp_path / "exo.mp4", 24)}
    assert ClipReader().usable_end_s(paths["ego"], 1.0, math.inf) == pytest.approx(3.0)
    clips = read_views(ClipReader(), paths, 2.0, math.inf, 2, SIDE, "pad")
    assert numbers_on(clips["ego"]) == numbers_on(clips["exo"]) == [21, 23]


def test_an_empty_span_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 5)
    for start_s, end_s in ((0.3, 0.3), (0.4, 0.2), (0.0, float("nan"))):
        with pytest.raises(EmptySpan, match=r"v\.mp4"):
            read_views(ClipReader(), {"ego": path}, start_s, end_s, 2, SIDE, "pad")
    with pytest.raises(EmptySpan, match=r"v\.mp4"):
        ClipReader().read(path, [], SIDE)


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 2)
    with pytest.raises(ValueError, match="fit 'stretch'"):
        ClipReader().read(path, [0.0], SIDE, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_open: got 0"):
        ClipReader(max_open=0)
    with pytest.raises(ValueError, match="timeout_s: got 0"):
        ClipReader(timeout_s=0)


def broken_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "zero":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no_header":
        whole = make_video(folder / "whole.mp4").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("missing", FileMissing),
        ("zero", NotAVideo),
        ("text", NotAVideo),
        ("folder", NotAVideo),
        ("no_header", NotAVideo),
        ("sound", NoVideoStream),
    ],
)
def test_a_file_that_is_no_video_is_named_in_one_line(kind: str, error: type[ClipDecodeError], tmp_path: Path) -> None:
    path = broken_file(kind, tmp_path)
    with pytest.raises(error) as caught:
        ClipReader().read(path, [0.1, 0.4], SIDE)
    message = str(caught.value)
    assert str(path) in message and "[0.100, 0.400) s" in message and "\n" not in message
    assert message.endswith(error.fix) and error.fix
    assert (caught.value.path, caught.value.start_s, caught.value.end_s) == (path, 0.1, 0.4)
    with pytest.raises(error):
        probe(path)


def test_a_truncated_file_raises_wherever_it_is_read(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", container_options={"movflags": "faststart"})
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    for times_s in ([0.0], [1.9], [3.5], [0.0, 3.9]):
        with pytest.raises(Damaged, match=r"cut\.mp4.*truncated.*re-download"):
            ClipReader().read(path, times_s, SIDE)


@pytest.mark.parametrize(("suffix", "options"), [(".mp4", FRAGMENTED), (".mkv", {}), (".ts", {})])
def test_a_cut_file_of_any_container_gives_right_frames_or_an_error(
    suffix: str, options: dict[str, str], tmp_path: Path
) -> None:
    whole = make_video(tmp_path / f"whole{suffix}", container_options=options)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    refused = []
    for number in range(40):
        try:
            assert numbers_on(ClipReader().read(path, [number / FPS + 0.05], SIDE)) == [number]
        except ClipDecodeError as error:
            assert str(path) in str(error)
            refused.append(number)
    assert set(range(30, 40)) <= set(refused)


def test_damaged_bytes_never_give_a_wrong_frame(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", 60, gop=12)
    times_s, images = decode_all(whole)
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [p for p in container.demux(video=0) if p.pos is not None and p.size]
        ranges = [(p.pos, p.size) for p in packets if 24 <= round(float(p.pts * p.time_base) * FPS) < 36]
    rng = np.random.default_rng(1)
    for position, packet_bytes in ranges:
        for at in rng.integers(packet_bytes // 3, packet_bytes, size=4):
            data[position + int(at)] ^= 0xFF
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    reader = ClipReader()
    refused = []
    for number, time_s in enumerate(times_s):
        try:
            clip = reader.read(path, [time_s + 0.05], SIDE, "squash")
        except Damaged as error:
            refused.append(number)
            assert str(path) in str(error)
        else:
            assert np.array_equal(clip.frames[0].numpy(), images[number])
    assert refused and set(refused) <= set(range(22, 37))


@pytest.mark.parametrize(("codec", "options"), [("libx264", {}), ("libx265", {"x265-params": X265})])
def test_a_block_that_was_never_written_is_no_frame(codec: str, options: dict[str, str], tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", 36, gop=12, codec=codec, codec_options=options)
    _, images = decode_all(whole)
    with av.open(str(whole)) as container:
        packets = [p for p in container.demux(video=0) if p.pos is not None and p.size]
    numbers = [round(float(packet.pts * packet.time_base) * FPS) for packet in packets]
    at = max((i for i, n in enumerate(numbers) if 14 <= n < 20), key=lambda i: packets[i].size)
    data = bytearray(whole.read_bytes())
    begin = packets[at].pos + packets[at].size // 4
    data[begin : begin + packets[at].size // 3] = bytes(packets[at].size // 3)  # it decodes without complaint
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    reader = ClipReader()
    with pytest.raises(Damaged, match=r"hole\.mp4.*corrupt packet"):
        reader.read(path, [numbers[at] / FPS + 0.05], SIDE, "squash")
    for number in [*range(12), *range(24, 36)]:  # the other groups
        clip = reader.read(path, [number / FPS + 0.05], SIDE, "squash")
        assert np.array_equal(clip.frames[0].numpy(), images[number])


def test_a_relative_path_with_colons_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "v.mp4", 10).rename(tmp_path / "12:30:05.mp4")
    make_images(tmp_path / "scan:1", 4)
    monkeypatch.chdir(tmp_path)
    for path in (Path("12:30:05.mp4"), tmp_path / "12:30:05.mp4"):
        assert numbers_on(ClipReader().read(path, [0.35], SIDE, "squash")) == [3]
        assert probe(path).num_frames == 10
    assert numbers_on(ClipReader().read("scan:1", [3 / 30], SIDE)) == [3]


def test_open_files_stay_within_the_cache_and_recover_from_errors(tmp_path: Path) -> None:
    paths = [make_video(tmp_path / f"{i}.mp4", 12) for i in range(5)]
    reader = ClipReader(max_open=3)
    gc.collect()  # files that readers of other tests left open
    before = len(os.listdir("/proc/self/fd"))
    for i in range(100):
        reader.read(paths[i % 5], [0.05, 0.75], SIDE)
        assert len(os.listdir("/proc/self/fd")) - before <= 3
    with pytest.raises(SpanOutsideFile):
        reader.read(paths[0], [99.0], SIDE)
    assert numbers_on(reader.read(paths[0], [0.45], SIDE)) == [4]
    make_video(paths[0], 30, draw=lambda number, width, height: painted(number + 100, width, height))
    assert numbers_on(reader.read(paths[0], [0.45], SIDE)) == [104]  # a replaced file is opened again
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def _read_in_child(reader: ClipReader, path: Path, order: list[int], queue: multiprocessing.Queue[list[int]]) -> None:
    queue.put([numbers_on(reader.read(path, [number / FPS + 0.05], SIDE))[0] for number in order])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_in_use_works_in_other_processes(method: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 40)
    reader = ClipReader()
    assert numbers_on(reader.read(path, [1.05], SIDE)) == [10]
    context = multiprocessing.get_context(method)
    orders = [np.random.default_rng(seed).permutation(40).tolist() for seed in range(2 if method == "fork" else 1)]
    for order in orders:
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(reader, path, order, queue))
        child.start()
        for number in order:  # at the same time as the child
            assert numbers_on(reader.read(path, [number / FPS + 0.05], SIDE)) == [number]
        assert queue.get(timeout=60) == order
        child.join(timeout=60)
        assert child.exitcode == 0


def test_readers_and_errors_can_be_pickled(tmp_path: Path) -> None:
    reader = ClipReader(max_open=5, timeout_s=9.0)
    reader.read(make_video(tmp_path / "v.mp4", 3), [0.0], SIDE)
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.max_open, copy.timeout_s) == (5, 9.0)
    error = pickle.loads(pickle.dumps(Damaged("corrupt packet", tmp_path / "v.mp4", 1.0, 2.0)))
    assert str(error) == f"{tmp_path / 'v.mp4'} [1.000, 2.000) s: corrupt packet; re-download it or remove the take"
    assert (error.path, error.start_s, error.end_s, error.reason) == (tmp_path / "v.mp4", 1.0, 2.0, "corrupt packet")
    assert str(Damaged("a message passed on by a worker")) == "a message passed on by a worker"


def test_probe_reports_the_header(tmp_path: Path) -> None:
    info = probe(make_video(tmp_path / "v.mp4", 25, width=160, height=96, times_ms=[700 + 100 * i for i in range(25)]))
    assert (info.width, info.height, info.codec, info.num_frames, info.rotation) == (160, 96, "h264", 25, 0)
    assert (info.fps, info.duration_s, info.start_s) == pytest.approx((10.0, 2.5, 0.7))


# --------------------------------------------------------------------------------------------------------------------
# folders of images


def make_images(folder: Path, num_frames: int = 40, suffix: str = ".png", width: int = SIDE) -> Path:
    """Images named as OpenEQA names them, with depth images next to them."""
    folder.mkdir()
    for number in range(num_frames):
        Image.fromarray(painted(number, width, SIDE)).save(folder / f"{number:06d}-rgb{suffix}", quality=95)
        Image.new("I;16", (width, SIDE)).save(folder / f"{number:06d}-depth.png")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_folder_of_images_is_a_video_of_thirty_frames_per_second(suffix: str, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", suffix=suffix)
    info = probe(folder)
    assert (info.width, info.height, info.fps, info.num_frames, info.duration_s) == (SIDE, SIDE, 30.0, 40, 40 / 30)
    reader = ClipReader()
    assert reader.usable_end_s(folder, 0.0, math.inf) == 40 / 30
    times_s = [1.3, 0.0, 0.0, 12 / 30, 12.9 / 30, 1.34]  # in any order, repeated, the last one past the end
    clip = reader.read(folder, times_s, SIDE)
    assert numbers_on(clip) == [39, 0, 0, 12, 12, 39] == clip.frame_numbers.tolist()
    np.testing.assert_allclose(clip.times_s, np.array([39, 0, 0, 12, 12, 39]) / 30)
    views = read_views(reader, {"ego": folder}, 0.0, math.inf, 4, SIDE, "squash")
    assert numbers_on(views["ego"]) == [5, 15, 25, 35]  # the middles of four parts of ten


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_images_are_made_square_like_those_of_videos(fit: str, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", 1, width=2 * SIDE)
    still = ClipReader().read(folder, [0.0], 32, fit).frames[0].int()
    path = make_video(tmp_path / "v.mp4", 1, width=2 * SIDE, codec_options={"crf": "1"})
    moving = ClipReader().read(path, [0.0], 32, fit).frames[0].int()
    assert (still - moving).abs().float().mean() < 8


def test_without_images_named_rgb_all_are_taken_in_order_of_name(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", 3)
    for file in folder.glob("*-depth.png"):
        file.unlink()
    (folder / "notes.txt").write_text("no image")
    (folder / "000002-rgb.png").rename(folder / "000000.PNG")  # stands before 000000-rgb
    assert probe(folder).num_frames == 2  # two are named so
    for number in range(2):
        (folder / f"{number:06d}-rgb.png").rename(folder / f"{number + 1:06d}.png")
    assert numbers_on(ClipReader().read(folder, [0.0, 1 / 30, 2 / 30], SIDE)) == [2, 0, 1]


def test_images_are_sorted_by_their_numbers_and_hidden_files_are_none(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", 12)
    for number in range(12):
        (folder / f"{number:06d}-rgb.png").rename(folder / f"frame_{number + 1}-rgb.png")
        (folder / f"._frame_{number + 1}-rgb.png").write_bytes(b"of another system")
    assert numbers_on(ClipReader().read(folder, [number / 30 for number in range(12)], SIDE)) == [*range(12)]


def test_a_damaged_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", 4)
    whole = (folder / "000002-rgb.png").read_bytes()
    reader = ClipReader()
    for content in (whole[: len(whole) // 2], b"text", b"", whole[:60] + b"\xff" + whole[61:]):
        (folder / "000002-rgb.png").write_bytes(content)
        assert numbers_on(reader.read(folder, [0.0, 1 / 30, 3 / 30], SIDE)) == [0, 1, 3]
        with pytest.raises(Damaged, match=rf"^{folder} \[0\.067, 0\.067\) s: image 000002-rgb\.png: .*re-download"):
            reader.read(folder, [2 / 30], SIDE)


def test_a_jpeg_cut_in_half_is_damaged(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan", 4, suffix=".jpg")
    file = folder / "000002-rgb.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert numbers_on(ClipReader().read(folder, [0.0, 1 / 30, 3 / 30], SIDE)) == [0, 1, 3]
    with pytest.raises(Damaged, match=r"image 000002-rgb\.jpg"):
        ClipReader().read(folder, [2 / 30], SIDE)


@pytest.mark.parametrize(("start_s", "end_s"), [(-1.0, 0.1), (1.4, 1.5), (0.0, 1.5)])
def test_a_span_outside_the_images_is_refused(start_s: float, end_s: float, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "scan")
    with pytest.raises(SpanOutsideFile):
        ClipReader().usable_end_s(folder, start_s, end_s)
    with pytest.raises(SpanOutsideFile, match="is outside its 40 images"):
        ClipReader().read(folder, [start_s if start_s < 0 else end_s], SIDE)


def test_a_folder_that_changes_is_listed_again(tmp_path: Path) -> None:
    folder, reader = make_images(tmp_path / "scan", 3), ClipReader()
    assert reader.usable_end_s(folder, 0.0, math.inf) == 3 / 30
    (folder / "000002-rgb.png").unlink()
    os.utime(folder, ns=(0, 0))
    assert reader.usable_end_s(folder, 0.0, math.inf) == 2 / 30
