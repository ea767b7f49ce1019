"""The check of a dataset finds every kind of bad file, and no file stops it."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_clip_stream import KINDS, SIDE, make_avi, make_video, numbers_on, painted

from datamodules.io.parallel import Failure, run_tasks
from datamodules.tools.data_check import (
    VideoFile,
    check_file,
    decode_whole,
    main,
    read_annotations,
    sampled,
)
from datamodules.tools.reencode import Encoding, reencode
from datamodules.tools.trim import cut
from datamodules.video.errors import Damaged, NoTimes, SpanOutsideFile
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader

FAST_START = {"movflags": "faststart"}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
NUM_FRAMES = 30  # 3 s at 10 frames per second


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_index(folder: Path, views: dict[str, list[str]], clips: list[tuple[str, str, float, float]], **group) -> Path:
    """An index written by hand: takes of 3 s at 10 frames per second, the first of their videos the egocentric one."""
    folder.mkdir()
    takes = [
        {"group_id": name, "fps": 10.0, "num_frames": NUM_FRAMES, "duration": 3.0, "frame_offset": {}}
        | {"views": {"ego": {"path": paths[0], "cam": "aria"}}}
        | group
        for name, paths in views.items()
    ]
    for take, paths in zip(takes, views.values(), strict=True):
        take["views"]["exo"] = [{"path": path, "cam": f"cam{i}"} for i, path in enumerate(paths[1:])]
    write_jsonl(folder / "groups.jsonl", takes)
    narrated = [
        {"clip_id": clip, "group_id": name, "start": start, "end": end, "text": "C waits."}
        for clip, name, start, end in clips
    ]
    write_jsonl(folder / "clips.jsonl", narrated)
    (folder / "index.json").write_text(json.dumps({"schema_version": 1, "groups": len(takes), "clips": len(clips)}))
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three ways to lay out an MP4: header first, header last, header in pieces."""
    folder = tmp_path_factory.mktemp("clean")
    return [
        make_video(folder / "first.mp4", NUM_FRAMES, container_options=FAST_START),
        make_video(folder / "last.mp4", NUM_FRAMES, gop=30, b_frames=3),
        make_video(folder / "pieces.mp4", NUM_FRAMES, container_options=FRAGMENTED),
    ]


# --------------------------------------------------------------------------------------------------------------------
# one file


@pytest.mark.parametrize("kind", ["b_frames", "open_gop", "edit_list", "start_offset", "fragmented", "hevc", "mpeg_ts"])
def test_every_displayed_frame_of_a_sound_file_is_decoded_once(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    ticks = [frame.pts for frame in decode_whole(path)]
    assert len(ticks) == {"edit_list": 35}.get(kind, 40)
    assert ticks == sorted(set(ticks))
    spans = [(0.0, 1.0), (2.0, float("inf"))]
    assert check_file(VideoFile(path.name, fps=10, spans_s=spans), tmp_path, decode_all=True) is None


def test_claims_are_held_against_the_file(clean: list[Path]) -> None:
    root, name = clean[0].parent, clean[0].name  # 30 frames in 3 s

    def problem(**claims) -> tuple[str, str] | None:
        found = check_file(VideoFile(name, **claims), root, decode_all=False)
        return None if found is None else (found.kind, found.reason)

    assert problem(fps=10.0, num_frames=30, duration_s=3.0) is None
    assert problem(num_frames=31) is None and problem(duration_s=3.1) is None  # a stream may be a frame short
    assert problem(fps=10.05) is None
    assert problem(fps=30.0) == ("WrongRate", "10 frames per second, the annotations say 30")
    assert problem(num_frames=32) == ("WrongLength", "30 frames, the annotations say 32")
    assert problem(duration_s=3.2) == ("WrongLength", "the video ends at 3.000 s, the annotations say 3.200 s")
    assert problem(spans_s=[(0.5, 1.0), (2.5, 3.1)]) is None
    beyond = problem(spans_s=[(0.5, 1.0), (2.5, 3.2)])
    assert beyond == ("SpanOutsideFile", "[2.500, 3.200) s: the video ends at 3.000 s")
    assert problem(spans_s=[(1.0, 1.0)])[0] == "EmptySpan"


def test_damage_outside_the_sampled_clips_is_found_by_decoding_all(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 40, gop=10, container_options=FAST_START)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    file = VideoFile(path.name, spans_s=[(0.0, 0.5)])
    assert check_file(file, tmp_path, decode_all=False) is None
    found = check_file(file, tmp_path, decode_all=True)
    assert found.kind == "Damaged" and "\n" not in found.reason
    found = check_file(VideoFile(path.name, spans_s=[(0.0, 0.5), (0.5, 3.5)]), tmp_path, decode_all=False)
    assert found.kind == "Damaged" and found.reason.startswith("[0.500, 3.500) s: ")


def test_a_block_that_was_never_written_is_found_though_it_decodes(tmp_path: Path) -> None:
    path = KINDS["hevc"](tmp_path)
    with av.open(str(path)) as container:
        torn = next(packet for packet in container.demux(video=0) if packet.is_keyframe and packet.pts > 0)
    content = bytearray(path.read_bytes())
    content[torn.pos + torn.size // 3 : torn.pos + torn.size // 2] = bytes(torn.size // 2 - torn.size // 3)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = list(container.decode(video=0))
    assert len(frames) == 40 and not any(frame.is_corrupt for frame in frames)
    assert check_file(VideoFile(path.name, spans_s=[(0.0, 0.5)]), tmp_path, decode_all=False) is None
    found = check_file(VideoFile(path.name), tmp_path, decode_all=True)
    assert found.kind == "Damaged" and found.reason.startswith("corrupt packet after")


def test_a_packet_without_a_frame_is_found(tmp_path: Path) -> None:
    quiet = {"x265-params": "pools=none:frame-threads=1:log-level=none"}
    source = make_video(tmp_path / "source.mp4", codec="libx265", gop=1, b_frames=0, codec_options=quiet)
    path = tmp_path / "v.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.dts is not None:
                kept = packet
                if number == 20:  # only a delimiter, which the decoder passes over in silence
                    kept = av.Packet(b"\x00\x00\x00\x03\x46\x01\x50")
                    kept.pts, kept.dts, kept.time_base = packet.pts, packet.dts, packet.time_base
                kept.stream = stream
                new.mux(kept)
    found = check_file(VideoFile(path.name), tmp_path, decode_all=True)
    assert (found.kind, found.reason) == ("FrameMissing", "1 frames are never decoded, the first at 2.000 s")


def test_an_end_before_the_one_that_the_header_promises_is_found(tmp_path: Path) -> None:
    path = KINDS["matroska"](tmp_path)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        third = [packet.pos for packet in container.demux(video=0) if packet.size and packet.is_keyframe][2]
    path.write_bytes(content[:third])
    found = check_file(VideoFile(path.name), tmp_path, decode_all=True)
    reason = f"truncated: {third} bytes, but its header lists {len(content)}"
    assert (found.kind, found.reason) == ("Damaged", reason)
    segment = content.index(bytes.fromhex("18538067")) + 4  # its size is unknown in a recording
    path.write_bytes(content[:segment] + b"\x01" + 7 * b"\xff" + content[segment + 8 : third])
    found = check_file(VideoFile(path.name), tmp_path, decode_all=True)
    assert (found.kind, found.reason) == ("Damaged", "frames end at 2.400 s, the header promises 4.000 s")


VP9 = ("libvpx-vp9", "libopus", {"deadline": "realtime", "cpu-used": "8"}, 0)
CONTAINERS = {
    ".mkv": ("libx264", "aac", {}, 2),
    ".webm": VP9,
    ".flv": ("libx264", "aac", {}, 2),
    ".mp4": ("libx264", "aac", {}, 2),
}
TIMES_MS = {
    "sound outlasts the frames": [*range(0, 2000, 100)],
    "the first frame comes late": [*range(700, 2700, 100)],
    "one frame is very long": [*range(0, 1000, 100), *range(6000, 7000, 100)],
}


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("kind", TIMES_MS)
def test_the_length_is_that_of_the_frames(suffix: str, kind: str, tmp_path: Path) -> None:
    codec, sound_codec, options, b_frames = CONTAINERS[suffix]
    times_ms, path = TIMES_MS[kind], tmp_path / f"v{suffix}"
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=10, options=options)
        video.width = video.height = SIDE
        video.pix_fmt, video.codec_context.max_b_frames = "yuv420p", b_frames
        video.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream(sound_codec, rate=48000)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(painted(number, SIDE, SIDE), "rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        size = sound.codec_context.frame_size
        for number in range((times_ms[-1] + 1500) * 48 // size):
            samples = np.zeros((1, size), np.float32 if "flt" in sound.format.name else np.int16)
            silence = av.AudioFrame.from_ndarray(samples, sound.format.name, "mono")
            silence.rate, silence.pts, silence.time_base = 48000, number * size, Fraction(1, 48000)
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    length_s = (times_ms[-1] - times_ms[0]) / 1000
    assert probe(path).duration_s == pytest.approx(length_s, abs=0.4)
    assert probe(path).duration_s > length_s
    assert check_file(VideoFile(path.name, spans_s=[(0.0, math.inf)]), tmp_path, decode_all=True) is None
    clip = ClipReader().read(path, [length_s + 0.05, 0.05], SIDE, "squash")
    assert numbers_on(clip) == [len(times_ms) - 1, 0]
    assert reencode(path, tmp_path / "out.mp4", Encoding(preset="ultrafast"))


@pytest.mark.parametrize(
    ("codec", "b_frames", "pixel_format"),
    [("libx264", 0, "yuv420p"), ("libx264", 2, "yuv420p"), ("mpeg4", 2, "yuv420p"), ("mpeg4", 0, "yuv420p")],
)
def test_a_container_without_display_times_is_read_in_order(
    codec: str, b_frames: int, pixel_format: str, tmp_path: Path
) -> None:
    path = make_avi(tmp_path / "v.avi", codec, b_frames, pixel_format)
    assert check_file(VideoFile(path.name, spans_s=[(0.0, math.inf)]), tmp_path, decode_all=True) is None
    reader = ClipReader()
    wanted = [5, 0, 12, 12, 39, 2]
    clip = reader.read(path, [number / 10 + 0.05 for number in wanted], SIDE, "squash")
    assert numbers_on(clip) == wanted == clip.frame_numbers.tolist()
    assert reader.usable_end_s(path, 0.0, math.inf) == pytest.approx(4.0)
    with pytest.raises(SpanOutsideFile):
        reader.read(path, [4.3], SIDE)
    assert reencode(path, tmp_path / "out.mp4", Encoding())
    assert cut(tmp_path, tmp_path, (path.name, 0.3, 0.9, "clip.mp4")) == ""
    assert numbers_on(reader.read(tmp_path / "out.mp4", [number / 10 + 0.05 for number in wanted], SIDE)) == wanted
    assert numbers_on(reader.read(tmp_path / "clip.mp4", [0.05, 0.55], SIDE)) == [3, 8]


@pytest.mark.parametrize("suffix", [".avi", ".mov"])
def test_palettes_are_read_in_order(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("msrle", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = "pal8", 12
        grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, axis=1)
        grey[:, 0] = 255
        for number in range(20):
            frame = av.VideoFrame.from_ndarray((painted(number, SIDE, SIDE)[..., 0], grey), "pal8")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert check_file(VideoFile(path.name, spans_s=[(0.0, math.inf)]), tmp_path, decode_all=True) is None
    reader = ClipReader()
    for number in (15, 3, 0, 19):
        assert numbers_on(reader.read(path, [number / 10 + 0.05], SIDE, "squash")) == [number]


def test_a_raw_stream_is_refused_by_name(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.h264")
    found = check_file(VideoFile(path.name, spans_s=[(0.0, 1.0)]), tmp_path, decode_all=True)
    assert found.kind == "NoTimes"
    with pytest.raises(NoTimes, match=r"a raw stream .h264. does not say .*ffmpeg -i IN"):
        ClipReader().read(path, [0.5], SIDE)


@pytest.mark.parametrize(("codec", "pixel_format"), [("mjpeg", "yuvj420p"), ("wmv2", "yuv420p")])
def test_damage_that_the_decoder_can_detect_is_found(codec: str, pixel_format: str, tmp_path: Path) -> None:
    path = make_avi(tmp_path / "v.avi", codec, pixel_format=pixel_format)
    file = VideoFile(path.name)
    assert check_file(file, tmp_path, decode_all=True) is None
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for packet in packets[12:24]:
        half, end = packet.pos + packet.size // 2, packet.pos + packet.size
        content[half:end] = np.random.default_rng(packet.pos).bytes(end - half)
    path.write_bytes(content)
    assert check_file(file, tmp_path, decode_all=True).kind == "Damaged"
    with pytest.raises(Damaged):
        ClipReader().read(path, [number / 10 + 0.05 for number in range(24)], SIDE)
    with pytest.raises(Damaged):
        reencode(path, tmp_path / "out.mp4", Encoding(preset="ultrafast"))


def test_samples_are_spread_and_hold_the_clip_that_ends_last() -> None:
    spans = [(float(i), i + 1.5) for i in range(10)]
    spans = [*reversed(spans), (0.0, 99.0)]
    assert sampled(spans, 1) == [(0.0, 99.0)]
    assert sampled(spans, 3) == [(2.0, 3.5), (6.0, 7.5), (0.0, 99.0)]
    assert len(sampled(spans, 20)) == len(sampled(spans, None)) == 11


# --------------------------------------------------------------------------------------------------------------------
# annotations


def test_an_index_is_read_on_the_clock_of_each_file(tmp_path: Path) -> None:
    folder = write_index(
        tmp_path / "index",
        {"take": ["ego.mp4", "exo.mp4"]},
        [("a", "take", 0.0, 1.0), ("b", "take", 1.0, 2.0)],
        frame_offset={"cam0": 5},
    )
    read = read_annotations(folder)
    assert read.file == folder / "clips.jsonl"
    assert read.paths_by_line == [("ego.mp4", "exo.mp4")] * 2
    assert read.files["ego.mp4"] == VideoFile("ego.mp4", 10.0, NUM_FRAMES, 3.0, [(0.0, 1.0), (1.0, 2.0)])
    assert read.files["exo.mp4"].spans_s == [(0.5, 1.5), (1.5, 2.5)]  # five frames late


def test_instructions_with_and_without_a_window(tmp_path: Path) -> None:
    records = [{"video": "a.mp4", "start": 1, "end": 2.5}, {"video": "b.mp4"}, {"video": "a.mp4", "start": 0, "end": 1}]
    read = read_annotations(write_jsonl(tmp_path / "it.jsonl", records))
    assert read.files["a.mp4"].spans_s == [(1.0, 2.5), (0.0, 1.0)]
    assert read.files["b.mp4"].spans_s == [(0.0, float("inf"))]
    assert read.paths_by_line == [("a.mp4",), ("b.mp4",), ("a.mp4",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"start": 0}', "it.jsonl line 1: field 'video' is missing"),
        ('{"video": "a.mp4", "start": "0", "end": 1}', "field 'start' is '0', expected seconds"),
        ('{"video": "a.mp4", "start": 0}', "only one of 'start' and 'end' is given"),
        ("{", "it.jsonl line 1: invalid JSON"),
    ],
)
def test_wrong_lines_are_named_and_the_others_checked(line: str, message: str, tmp_path: Path, capsys) -> None:
    file, clean = tmp_path / "it.jsonl", tmp_path / "clean.jsonl"
    make_video(tmp_path / "good.mp4", 10)
    good = '{"video": "good.mp4", "start": 0.0, "end": 0.5}\n'
    file.write_text(f"{line}\n\n{good}")
    assert main([str(file), "--root", str(tmp_path), "--clean", str(clean), "--workers", "1"]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert message in first
    assert rest == ["0 of 1 files are bad", "1 of 2 lines of it.jsonl are clean"]
    assert clean.read_text() == good


def test_wrong_arguments_stop_with_one_line(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nothing"), "--root", str(tmp_path)]) == 2
    assert "nothing: no such file or folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--root", str(tmp_path), "--samples", "0"]) == 2
    assert "--samples" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# the command


def test_lists_of_clean_lines_and_bad_files(clean: list[Path], tmp_path: Path, capsys) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a_ego.mp4", "a_exo.mp4", "b_ego.mp4"):
        (root / name).write_bytes(clean[0].read_bytes())
    (root / "b_exo.mp4").write_bytes(clean[0].read_bytes()[:9000])
    index = write_index(
        tmp_path / "index",
        {"a": ["a_ego.mp4", "a_exo.mp4"], "b": ["b_ego.mp4", "b_exo.mp4", "b_missing.mp4"]},
        [("1", "b", 0.0, 1.0), ("2", "a", 0.0, 1.0), ("3", "b", 1.0, 2.0), ("4", "a", 2.0, 3.0)],
    )
    lists = ["--clean", str(tmp_path / "clean.jsonl"), "--bad", str(tmp_path / "bad.jsonl")]
    assert main([str(index), "--root", str(root), "--workers", "2", *lists]) == 1
    lines = (index / "clips.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "clean.jsonl").read_bytes() == lines[1] + lines[3]
    bad = read_lines(tmp_path / "bad.jsonl")
    assert [(record["path"], record["kind"], record["lines"]) for record in bad] == [
        ("b_exo.mp4", "Damaged", 2),
        ("b_missing.mp4", "FileMissing", 2),
    ]
    assert "truncated: 9000 bytes" in bad[0]["reason"] and "No such file" in bad[1]["reason"]
    printed = capsys.readouterr().out
    assert "b_missing.mp4: FileMissing: No such file or directory" in printed
    assert "2 of 5 files are bad (Damaged 1, FileMissing 1)\n2 of 4 lines of clips.jsonl are clean\n" in printed


def test_a_sound_data_set_has_exit_status_0(clean: list[Path], tmp_path: Path, capsys) -> None:
    records = [{"video": path.name, "start": 0.5, "end": 3.0} for path in clean]
    source = write_jsonl(tmp_path / "it.jsonl", records)
    lists = ["--clean", str(tmp_path / "clean.jsonl"), "--bad", str(tmp_path / "bad.jsonl")]
    assert main([str(source), "--root", str(clean[0].parent), "--all", *lists]) == 0
    assert (tmp_path / "clean.jsonl").read_bytes() == source.read_bytes()
    assert (tmp_path / "bad.jsonl").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "clean.jsonl", "it.jsonl"]


def test_the_command_starts_without_torch() -> None:
    code = "import sys, datamodules.tools.data_check, datamodules.tools.reencode; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"


# --------------------------------------------------------------------------------------------------------------------
# processes that hang or die


def behave(item: str, beat) -> str:
    """Do what the item says."""
    if item == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "fail":
        raise KeyError("an unknown problem")
    if item == "slow":
        for _ in range(60):
            time.sleep(0.05)
            beat()
    return f"{item} done"


def test_a_hanging_or_crashing_task_costs_its_item_only() -> None:
    items = ["hang", "first", "crash", "fail", "slow", "last"]
    outcomes = dict(run_tasks(behave, items, workers=2, patience_s=2.0))
    assert outcomes == {
        "hang": Failure("TimedOut", "no progress for 2 s"),
        "first": "first done",
        "crash": Failure("Crashed", "the process died with exit status -11"),
        "fail": Failure("KeyError", "'an unknown problem'"),
        "slow": "slow done",  # 3 s, but with signs of life
        "last": "last done",
    }
    assert multiprocessing.active_children() == []


# --------------------------------------------------------------------------------------------------------------------
# damaged files

DAMAGES = ("truncated", "zeroed", "flipped", "text", "empty", "missing")


def damage(content: bytes, kind: str, rng: np.random.Generator) -> bytes | None:
    """Damage a file in one of the ways of ``DAMAGES``; None for a missing one."""
    damaged = bytearray(content)
    if kind == "truncated":
        return content[: rng.integers(1, len(content))]
    if kind == "zeroed":
        length = int(rng.integers(1, len(content) // 4))
        start = int(rng.integers(len(content) - length))
        damaged[start : start + length] = bytes(length)
    if kind == "flipped":
        for position in rng.integers(len(content), size=rng.integers(1, 9)):
            damaged[position] ^= 1 << int(rng.integers(8))
    if kind == "text":
        return b"<html><body>404 not found</body></html>\n" * int(rng.integers(1, 500))
    if kind == "empty":
        return b""
    return None if kind == "missing" else bytes(damaged)


def decodes_whole(path: Path) -> bool:
    """Return True if a plain decode gives every frame and the decoder flags none: a reference without the tool."""
    shown = 0
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                return False
            stream.codec_context.thread_type = "NONE"
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    return False
                for frame in stream.codec_context.decode(packet if packet.size or packet.dts is not None else None):
                    if frame.is_corrupt:
                        return False
                    shown += 1
    except (av.error.FFmpegError, IndexError):
        return False
    return shown == NUM_FRAMES


def make_damaged(root: Path, clean: list[Path], count: int) -> dict[str, str]:
    """Fill a folder with damaged files, and one sound file for every ten of them; kinds by name."""
    rng = np.random.default_rng(1)
    kinds = {f"{number:04d}.mp4": DAMAGES[number % len(DAMAGES)] for number in range(count)}
    kinds |= {f"sound{number}.mp4": "sound" for number in range(count // 10)}
    contents = [path.read_bytes() for path in clean]
    for name, kind in kinds.items():
        content = contents[rng.integers(len(contents))]
        damaged = content if kind == "sound" else damage(content, kind, rng)
        if damaged is not None:
            (root / name).write_bytes(damaged)
    return kinds


def check_damaged(root: Path, clean: list[Path], out: Path, count: int) -> None:
    kinds = make_damaged(root, clean, count)
    source = write_jsonl(out / "it.jsonl", [{"video": name, "start": 0.0, "end": 3.0} for name in kinds])
    options = ["--all", "--workers", "2", "--bad", str(out / "bad.jsonl"), "--clean", str(out / "clean.jsonl")]
    assert main([str(source), "--root", str(root), *options]) == 1
    reasons = {record["path"]: (record["kind"], record["reason"]) for record in read_lines(out / "bad.jsonl")}
    assert {record["video"] for record in read_lines(out / "clean.jsonl")} == set(kinds) - set(reasons)
    for name, kind in kinds.items():
        if kind == "sound":
            assert name not in reasons
        elif kind in ("text", "empty", "missing"):
            assert reasons[name][0] == ("FileMissing" if kind == "missing" else "NotAVideo")
        elif name not in reasons:
            assert decodes_whole(root / name), (name, kind)
    assert all(reason and "\n" not in reason for _, reason in reasons.values())
    assert not {kind for kind, _ in reasons.values()} & {"TimedOut", "Crashed"}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_descriptors_and_memory(root: Path, clean: list[Path], count: int) -> None:
    """Decode the files in this process, none of their clips, only all of their frames."""
    kinds = make_damaged(root, clean, count)
    descriptors, resident = [], []
    for number, name in enumerate(kinds):
        problem = check_file(VideoFile(name, duration_s=3.0), root, decode_all=True)
        assert problem is not None or decodes_whole(root / name), (name, kinds[name])
        if number % (count // 10) == 0:
            gc.collect()
            descriptors.append(len(os.listdir("/proc/self/fd")))
            resident.append(resident_bytes())
    assert len(set(descriptors)) == 1
    assert resident[-1] - resident[3] < 10e6


def test_every_damaged_file_is_reported(clean: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    check_damaged(tmp_path / "data", clean, tmp_path, 120)


def test_damaged_files_leave_no_descriptors_and_no_memory_behind(clean: list[Path], tmp_path: Path) -> None:
    check_descriptors_and_memory(tmp_path, clean, 120)


@pytest.mark.slow
def test_a_thousand_damaged_files_are_reported(clean: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    check_damaged(tmp_path / "data", clean, tmp_path, 1000)
    (tmp_path / "again").mkdir()
    check_descriptors_and_memory(tmp_path / "again", clean, 1000)


def test_folders_of_images_are_checked_too(tmp_path: Path, capsys) -> None:
    for name in ("good", "damaged", "empty"):
        (tmp_path / name).mkdir()
    for number in range(5):
        for name in ("good", "damaged"):
            Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / name / f"{number}-rgb.png")
    (tmp_path / "damaged" / "1-rgb.png").write_bytes(b"text")  # not among those that a clip of one frame shows
    source = write_jsonl(tmp_path / "it.jsonl", [{"video": name} for name in ("good", "damaged", "empty")])
    assert main([str(source), "--root", str(tmp_path), "--all", "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "empty: NotAVideo: the folder holds no images" in printed
    assert "damaged: Damaged: " in printed and "image 1-rgb.png" in printed
    assert "2 of 3 files are bad" in printed


def test_clips_outside_a_file_cost_their_own_lines_only(tmp_path: Path, capsys) -> None:
    make_video(tmp_path / "a.mp4", 30)  # 3 s
    windows = [(0, 1), (30, 31), (1, 2), (2, 99), (0, 1)]
    records = [{"video": "a.mp4", "start": start, "end": end} for start, end in windows]
    source, clean, bad = write_jsonl(tmp_path / "it.jsonl", records), tmp_path / "clean.jsonl", tmp_path / "bad.jsonl"
    lists = ["--clean", str(clean), "--bad", str(bad), "--samples", "1"]
    assert main([str(source), "--root", str(tmp_path), "--workers", "1", *lists]) == 1
    assert read_lines(clean) == [records[0], records[2], records[4]]
    reason = "[2.000, 99.000) s: the video ends at 3.000 s"
    assert read_lines(bad) == [
        {"path": "a.mp4", "kind": "SpanOutsideFile", "reason": reason, "spans_s": [[2, 99], [30, 31]], "lines": 2}
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"a.mp4: SpanOutsideFile: {reason}",
        f"{source} line 2: its clip lies outside a.mp4",
        f"{source} line 4: its clip lies outside a.mp4",
        "1 of 1 files are bad (SpanOutsideFile 1)",
        "3 of 5 lines of it.jsonl are clean",
    ]


def test_clips_outside_a_file_do_not_hide_damage(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 40, gop=10, container_options=FAST_START)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(content)
    file = VideoFile(path.name, spans_s=[(0.0, 0.5), (50.0, 51.0)])
    assert check_file(file, tmp_path, decode_all=False).kind == "SpanOutsideFile"
    assert check_file(file, tmp_path, decode_all=True).kind == "Damaged"


def test_entries_of_an_array_are_kept_as_lines(tmp_path: Path) -> None:
    make_video(tmp_path / "good.mp4", 10)
    source = tmp_path / "it.json"
    source.write_text(json.dumps([{"video": "good.mp4"}, {"video": 3}, {"video": ["good.mp4"]}], indent=2))
    clean = tmp_path / "clean.jsonl"
    assert main([str(source), "--root", str(tmp_path), "--clean", str(clean), "--workers", "1"]) == 1
    assert read_lines(clean) == [{"video": "good.mp4"}, {"video": ["good.mp4"]}]
    source.write_text('[{"video": "good.mp4"},\n{"video": 3,}]')
    assert main([str(source), "--root", str(tmp_path), "--clean", str(clean), "--workers", "1"]) == 1
    assert read_lines(clean) == [{"video": "good.mp4"}]
