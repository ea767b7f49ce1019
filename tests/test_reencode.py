"""Re-encoded videos show the same at the same times, and nothing half-written is ever taken for one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from test_clip_stream import KINDS, decode_all, make_video, number_on, painted, red_green_blue

import datamodules.tools.reencode as module
from datamodules.tools.reencode import Encoding, ReencodeError, main, reencode
from datamodules.video.errors import Damaged, FileMissing
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader

SMALL = Encoding(short_side=64, preset="veryfast")


def key_frames(path: Path) -> list[int]:
    """Places of the key frames among the frames as they are displayed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = sorted((packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size)
    return [number for number, (_, is_key) in enumerate(packets) if is_key]


# --------------------------------------------------------------------------------------------------------------------
# output


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("b_pyramid", "long_gop", "all_key_frames")])
def test_every_frame_is_kept_with_its_time(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path)
    output = tmp_path / "out" / source.name
    assert reencode(source, output, SMALL)
    old_times_s, old_frames = decode_all(source)
    new_times_s, new_frames = decode_all(output)
    assert new_times_s == pytest.approx(old_times_s, abs=1e-9)
    assert [number_on(image) for image in new_frames] == [number_on(image) for image in old_frames]
    assert key_frames(output) == list(range(0, len(old_times_s), 8))
    before, after = probe(source), probe(output)
    assert (after.codec, after.width, after.height) == ("h264", 64, 64)
    assert after.start_s == pytest.approx(before.start_s)
    constant = kind != "variable_rate"
    assert after.duration_s == pytest.approx(before.duration_s, abs=0.001 if constant else 0.05)
    assert after.fps == pytest.approx(before.fps, rel=0 if constant else 0.01)
    assert [path.name for path in output.parent.iterdir()] == [source.name]


def test_a_last_frame_that_is_held_stays_as_long(tmp_path: Path) -> None:
    source = tmp_path / "v.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0", "preset": "veryfast"})
        stream.width = stream.height = 96
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(painted(number, 96, 96), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        packets = stream.encode()
        packets[-1].duration = 7
        container.mux(packets)
    assert probe(source).duration_s == pytest.approx(2.6)
    reencode(source, tmp_path / "out.mp4", Encoding(short_side=64))
    assert probe(tmp_path / "out.mp4").duration_s == pytest.approx(2.6)


def test_clips_of_both_data_roots_are_the_same_frames(tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mp4", 60, gop=60, b_frames=3)
    reencode(source, tmp_path / "out.mp4", SMALL)
    reader = ClipReader()
    times_s = np.random.default_rng(0).uniform(0, 6, 40)
    old, new = (reader.read(path, times_s, 64, "squash") for path in (source, tmp_path / "out.mp4"))
    assert np.array_equal(old.times_s, new.times_s) and np.array_equal(old.frame_numbers, new.frame_numbers)
    assert np.abs(old.frames.numpy().astype(int) - new.frames.numpy()).mean() < 4


def test_a_change_of_scene_adds_no_key_frame_and_sound_is_left_out(tmp_path: Path) -> None:
    def scenes(number: int, width: int, height: int) -> np.ndarray:
        return painted(number, width, height) if number // 5 % 2 else 255 - painted(number, width, height)

    video, source = make_video(tmp_path / "video.mp4", 30, gop=250, draw=scenes), tmp_path / "v.mp4"
    with av.open(str(video)) as old, av.open(str(source), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream("aac", rate=16000, layout="mono")
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
        for number in range(40):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 16000, 1024 * number
            new.mux(sound.encode(silence))
        new.mux(sound.encode())
    assert len(key_frames(source)) > 1  # the source has some at changes of scene
    reencode(source, tmp_path / "out.mp4", Encoding(short_side=64, gop=12))
    assert key_frames(tmp_path / "out.mp4") == [0, 12, 24]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        content = (tmp_path / "out.mp4").read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")  # the header comes first


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_frames_are_stored_upright(rotation: int, tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mp4", 3, width=160, height=96, rotation=rotation, draw=red_green_blue)
    reencode(source, tmp_path / "out.mp4", Encoding(short_side=64, crf=5))
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height, info.rotation) == ((64, 106, 0) if rotation in (90, 270) else (106, 64, 0))
    old, new = (ClipReader().read(path, [0.15], 64) for path in (source, tmp_path / "out.mp4"))
    assert np.abs(old.frames.numpy().astype(int) - new.frames.numpy()).mean() < 3


def make_coloured(path: Path, pixel_format: str, matrix: int = 2, aspect: Fraction | int = 1, width: int = 96) -> Path:
    """Two frames of 96 lines, black above and coloured below, with a colour matrix by its number in the standard."""
    image = red_green_blue(0, width, 96) // 2 + 60
    image[:48] = 16
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, 96, pixel_format
        stream.codec_context.colorspace = matrix
        stream.codec_context.sample_aspect_ratio = aspect
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            names = {1: "itu709", 5: "itu601"}
            frame = VideoReformatter().reformat(frame, format=pixel_format, dst_colorspace=names.get(matrix))
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("matrix", [1, 2, 5])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv420p10le", "yuv444p"])
def test_colours_are_kept(pixel_format: str, matrix: int, tmp_path: Path) -> None:
    source = make_coloured(tmp_path / "v.mp4", pixel_format, matrix)
    reencode(source, tmp_path / "out.mp4", Encoding(short_side=96, crf=1))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == matrix
        assert container.streams.video[0].pix_fmt == ("yuvj420p" if pixel_format == "yuvj420p" else "yuv420p")
    old, new = (decode_all(path)[1][0].astype(int) for path in (source, tmp_path / "out.mp4"))
    inside = np.s_[60:90, [10, 20, 40, 50, 75, 85]]  # away from the edges of colours, which 4:2:0 blurs
    assert np.abs(old[inside] - new[inside]).max() <= 4
    assert np.abs(old[5:40] - new[5:40]).max() <= 4


@pytest.mark.parametrize(
    ("width", "aspect", "short_side", "size"),
    [
        (96, Fraction(4, 3), 336, (128, 96)),  # shown wider than stored, not enlarged
        (96, Fraction(4, 3), 48, (64, 48)),
        (96, Fraction(1, 2), 336, (48, 96)),
        (97, 1, 336, (96, 96)),  # even
        (171, 1, 48, (86, 48)),  # 85.5
    ],
)
def test_pixels_become_square_and_sizes_even(width, aspect, short_side, size, tmp_path: Path) -> None:
    source = make_coloured(tmp_path / "v.mp4", "yuv444p", aspect=aspect, width=width)
    reencode(source, tmp_path / "out.mp4", Encoding(short_side=short_side))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == size
        assert (stream.sample_aspect_ratio or 1) == 1


def test_a_change_of_frame_size_is_refused(tmp_path: Path) -> None:
    parts = [make_video(tmp_path / "96.ts", 10, b_frames=0)]
    parts += [make_video(tmp_path / "64.ts", 10, width=64, b_frames=0, times_ms=range(1000, 2000, 100))]
    source = tmp_path / "v.ts"
    with av.open(str(source), "w") as joined:
        for number, part in enumerate(parts):
            with av.open(str(part)) as container:
                if number == 0:
                    stream = joined.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        joined.mux(packet)
    with pytest.raises(ReencodeError, match=r"other frame size or format from 1\.000 s on"):
        reencode(source, tmp_path / "out.mp4", SMALL)
    assert not (tmp_path / "out.mp4").exists()


# --------------------------------------------------------------------------------------------------------------------
# refused input


ALL = range(40)
FAULTS = {  # frames as they are read back, each with the place whose time it has and a shift of that time in ticks
    "39 frames for 40": [(i, i, 0) for i in ALL if i != 20],
    r"frame 30 at 3\.0000\d+ s for 3\.000000 s": [(i, i, int(i == 30)) for i in ALL],
    "frame 25 differs by": [(0 if i == 25 else i, i, 0) for i in ALL],
    "near number 10 shows its neighbour": [({10: 11, 11: 10}.get(i, i), i, 0) for i in ALL],
    "every frame shows its neighbour": [(max(0, i - 1), i, 0) for i in ALL],
    "the first frame has another time": [(i, i, 100) for i in ALL],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_what_was_written_are_found(fault: str, tmp_path: Path, monkeypatch) -> None:
    def sliding(number: int, width: int, height: int) -> np.ndarray:
        grey = 128 + contrast * np.sin((np.mgrid[:height, :width][1] + 4 * number) / 15)
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)

    contrast = 4 if fault.startswith("every") else 16  # neighbours differ by 0.7 and by 2.7 levels of 255
    source = make_video(tmp_path / "v.mp4", draw=painted if fault == "frame 25 differs by" else sliding)
    decode = module.decode_whole

    def faulty(path: Path) -> Iterator[av.VideoFrame]:
        if path == source:
            yield from decode(path)
            return
        frames = list(decode(path))
        ticks = [frame.pts for frame in frames]
        for number, place, shift in FAULTS[fault]:
            frames[number].pts = ticks[place] + shift
            yield frames[number]

    monkeypatch.setattr(module, "decode_whole", faulty)
    with pytest.raises(ReencodeError, match=fault) as caught:
        reencode(source, tmp_path / "out.mp4", Encoding(short_side=64, gop=40))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_key_frames_further_apart_than_asked_for_are_found(tmp_path: Path, monkeypatch) -> None:
    source = make_video(tmp_path / "v.mp4")
    monkeypatch.setattr(Encoding, "x264_options", {"preset": "veryfast", "g": "9"})
    with pytest.raises(ReencodeError, match="8 frames after a key frame none was written"):
        reencode(source, tmp_path / "out.mp4", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_bad_source_is_refused(tmp_path: Path) -> None:
    source = make_video(tmp_path / "v.mp4", container_options={"movflags": "faststart"})
    content = source.read_bytes()
    source.write_bytes(content[:-2000])
    with pytest.raises(Damaged, match="truncated"):
        reencode(source, tmp_path / "out" / "v.mp4", SMALL)
    with pytest.raises(FileMissing):
        reencode(tmp_path / "nothing.mp4", tmp_path / "out" / "v.mp4", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]  # refused before anything is written


@pytest.mark.parametrize(
    ("field", "value"), [("short_side", 335), ("short_side", 8), ("gop", 0), ("crf", 41), ("preset", "x"), ("tune", "")]
)
def test_impossible_settings_are_refused(field: str, value) -> None:
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} is {value!r}"):
        Encoding(**{field: value})


# --------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of five small videos in two folders."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("a/ego", "a/exo", "b/ego", "b/exo", "c")):
        (root / name).parent.mkdir(exist_ok=True)
        make_video(root / f"{name}.mp4", 20 + number)
    return root


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder but the manifests, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".jsonl")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def shown(folder: Path) -> dict[str, list[int]]:
    """Return the numbers on the frames of all videos below a folder; x264 does not repeat their bytes."""
    paths = sorted(folder.rglob("*.mp4"))
    return {path.relative_to(folder).as_posix(): [number_on(p) for p in decode_all(path)[1]] for path in paths}


def manifest(folder: Path, *without: str) -> dict[str, dict]:
    """Lines of all manifests by path, without the cost and other members; every path has one line."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    records = {record["path"]: record for record in map(json.loads, lines)}
    assert len(records) == len(lines)
    left_out = {"cpu_s", *without}
    return {path: {k: v for k, v in record.items() if k not in left_out} for path, record in records.items()}


def run(data: Path, out: Path, *options: str) -> int:
    paths = [str(path) for path in sorted(data.rglob("*.mp4"))]
    return main(["--root", str(data), "--files", *paths, "--out", str(out), "--short-side", "48", *options])


def test_a_second_run_finds_everything_done(data: Path, tmp_path: Path, capsys) -> None:
    assert run(data, tmp_path) == 0
    first = capsys.readouterr().out
    assert "5 files: 5 re-encoded, 0 done before, 0 failed" in first
    assert "storage: 0.000 GB before" in first and "reading a 0.68 s clip:" in first
    written, times = files(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert set(written) == set(files(data))
    records = manifest(tmp_path)
    assert records["c.mp4"] == {
        "path": "c.mp4",
        "source_bytes": len(files(data)["c.mp4"]),
        "output_bytes": len(written["c.mp4"]),
        "num_frames": 24,
        "duration_s": 2.4,
        "fps": 10.0,
        "width": 48,
        "height": 48,
    }
    assert run(data, tmp_path) == 0
    assert "5 files: 0 re-encoded, 5 done before, 0 failed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")} == times
    assert manifest(tmp_path) == records
    lines = tmp_path / "reencode.jsonl"
    lines.write_bytes(lines.read_bytes()[:-10])  # killed while it wrote the last line
    assert run(data, tmp_path) == 0
    assert manifest(tmp_path) == records
    assert run(data, tmp_path, "--short-side", "32") == 0
    assert [json.loads(line)["width"] for line in lines.read_text().splitlines()] == [48] * 5 + [32] * 5


def test_what_other_settings_or_a_fault_of_the_disk_left_is_written_again(data: Path, tmp_path: Path) -> None:
    source, output = data / "c.mp4", tmp_path / "c.mp4"
    assert reencode(source, output, SMALL)
    good = output.read_bytes()
    assert reencode(source, output, Encoding(short_side=48))
    assert probe(output).width == 48
    assert reencode(source, output, SMALL) and probe(output).width == 64
    output.write_bytes(good[:-500])
    assert reencode(source, output, SMALL) and shown(tmp_path) == {"c.mp4": list(range(24))}
    (tmp_path / ".c.mp4.0123abcd.partial").write_bytes(good[:1000])
    assert not reencode(source, output, SMALL)
    assert reencode(source, output, Encoding(short_side=48))
    assert [path.name for path in tmp_path.iterdir()] == ["c.mp4"]


def test_files_of_others_are_not_replaced(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "c.mp4").write_bytes((data / "c.mp4").read_bytes())
    assert run(data, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "exists and is not a re-encoded video" in printed
    assert "5 files: 4 re-encoded, 0 done before, 1 failed" in printed
    assert (tmp_path / "c.mp4").read_bytes() == (data / "c.mp4").read_bytes()
    assert run(data, data) == 2
    assert "sources are kept" in capsys.readouterr().err


def test_bad_sources_are_reported_and_the_others_done(data: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "good.mp4").write_bytes((data / "c.mp4").read_bytes())
    (root / "text.mp4").write_text("not a video")
    (root / "cut.mp4").write_bytes((data / "c.mp4").read_bytes()[:3000])
    names = ["cut.mp4", "good.mp4", "missing.mp4", "text.mp4"]
    assert main(["--root", str(root), "--files", *names, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "4 files: 1 re-encoded, 0 done before, 3 failed" in printed
    for name, kind in (("cut", "NotAVideo"), ("missing", "FileMissing"), ("text", "NotAVideo")):
        assert f"{name}.mp4: {kind}: {root / name}.mp4: " in printed
    assert set(files(tmp_path / "out")) == {"good.mp4"} == set(manifest(tmp_path / "out"))


def test_shards_are_disjoint_and_together_everything(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", [tmp_path / f"part{number}" for number in (1, 2, 3)]
    assert run(data, whole) == 0
    for number, part in enumerate(parts, 1):
        assert run(data, part, "--shard", f"{number}/3") == 0
        assert [path.name for path in part.glob("*.jsonl")] == [f"reencode.{number}-of-3.jsonl"]
    assert [len(files(part)) for part in parts] == [2, 2, 1]
    assert {path: numbers for part in parts for path, numbers in shown(part).items()} == shown(whole) == shown(data)
    records = {path: record for part in parts for path, record in manifest(part, "output_bytes").items()}
    assert records == manifest(whole, "output_bytes")


def test_an_index_names_the_files_and_they_keep_their_paths(data: Path, tmp_path: Path) -> None:
    index = tmp_path / "it.jsonl"
    index.write_text("".join(json.dumps({"video": video}) + "\n" for video in ("b/ego.mp4", "c.mp4", "b/ego.mp4")))
    assert main(["--root", str(data), "--index", str(index), "--out", str(tmp_path / "out")]) == 0
    assert set(files(tmp_path / "out")) == {"b/ego.mp4", "c.mp4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--files", "../x.mp4"], "../x.mp4: not below --root"),
        (["--files", "/etc/x.mp4"], "/etc/x.mp4: not below --root"),
        (["--index", "nowhere"], "nowhere: no such file or folder"),
        (["--files", "x.mp4", "--gop", "0"], "--gop is 0"),
        (["--files", "x.mp4", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_arguments_stop_with_one_line(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["--root", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and message in captured and captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_shards_are_numbered_from_1(shard: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path), "--out", str(tmp_path), "--files", "x.mp4", f"--shard={shard}"])
    assert "expected i/n with i from 1 to n" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# killed at random moments


def arguments(data: Path, out: Path) -> list[str]:
    names = [path.name for path in sorted(data.glob("*.mp4"))]
    return ["--root", str(data), "--out", str(out), "--workers", "2", "--short-side", "160", "--files", *names]


def partials(out: Path) -> set[Path]:
    return set(out.glob(".*.partial"))


def kill_at_work(data: Path, out: Path, scratch: str, delay_s: float, all_at_once: bool) -> None:
    """Run the command and kill it a while after it began its first file, at the latest when it has ended.

    It has a session of its own, so that all its processes are known. A scheduler kills all of them, a lack of memory
    one: then the others must end by themselves.
    """
    left_over = partials(out)
    process = subprocess.Popen(
        [sys.executable, "-m", "datamodules.tools.reencode", *arguments(data, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": scratch},
        start_new_session=True,
    )
    while not partials(out) - left_over and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay_s)
    (os.killpg if all_at_once else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(1000):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("processes were left behind")


def check_killed(tmp_path: Path, kills: int) -> None:
    data, whole, out = (tmp_path / name for name in ("data", "whole", "out"))
    data.mkdir()
    for number in range(5):
        make_video(data / f"{number}.mp4", 150 + 10 * number, width=256, height=192)
    assert main(arguments(data, whole)) == 0
    work_s = sum(json.loads(line)["cpu_s"] for line in (whole / "reencode.jsonl").read_text().splitlines()) / 2
    wanted = shown(data)
    assert shown(whole) == wanted
    rng = np.random.default_rng(0)
    cut_short = 0
    with tempfile.TemporaryDirectory() as scratch:  # sockets are made there, whose paths must be short
        for _ in range(kills):
            if wanted.keys() <= files(out).keys():
                shutil.rmtree(out)
            kill_at_work(data, out, scratch, rng.uniform(0, work_s), all_at_once=bool(rng.integers(2)))
            cut_short += bool(partials(out))
            assert shown(out).items() <= wanted.items()
    assert cut_short  # some were killed while they wrote
    assert main(arguments(data, out)) == 0
    assert files(out).keys() == wanted.keys() and shown(out) == wanted
    assert manifest(out, "output_bytes") == manifest(whole, "output_bytes")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    check_killed(tmp_path, kills=3)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path: Path) -> None:
    check_killed(tmp_path, kills=50)
