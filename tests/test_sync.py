"""Cameras that are shifted in time are found, and cameras in sync are left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from datamodules.ego_exo_clip.build import _frame_offsets
from datamodules.ego_exo_clip.index import Group, NarratedClip, Narration, Take, View, write_index
from datamodules.tools.sync import main
from datamodules.toy_world.render import Camera
from datamodules.toy_world.video import encode
from datamodules.video.motion import _standardised, read_signal
from datamodules.video.synchrony import Detector, TakeFiles, correlate

FPS = 30
CAMS = ("aria01", "cam01", "cam02", "cam03")


def signals(seed, frames=1800, noise=1.0):
    """Return signals of four cameras that see the same motion, each with noise of its own."""
    rng = np.random.default_rng(seed)
    motion = rng.standard_normal(frames)
    return [_standardised(motion + noise * rng.standard_normal(frames), FPS) for _ in CAMS]


def take(name, offsets=(0, 0, 0, 0)):
    return TakeFiles(name, FPS, CAMS, tuple(f"{name}/{cam}.mp4" for cam in CAMS), offsets)


@pytest.fixture(scope="module")
def detector():
    return Detector({f"take {seed}": signals(seed) for seed in range(4)}, "packets", FPS)


def off(findings):
    return {found.cam: found for found in findings if found.verdict not in ("in sync", "unclear")}


def test_a_correlation_peaks_at_the_frames_by_which_a_file_lags():
    first, second = signals(9)[:2]
    assert correlate(first, np.pad(second, (7, 0)), 20).argmax() - 20 == 7
    assert correlate(first, second[7:], 20).argmax() - 20 == -7


@pytest.mark.parametrize("camera", [0, 2])
@pytest.mark.parametrize("frames", [-30, -5, 5, 30])
def test_a_shift_is_found_and_added_to_the_offset_of_the_index(detector, camera, frames):
    cameras = signals(1)
    cameras[camera] = np.pad(cameras[camera], (frames, 0)) if frames > 0 else cameras[camera][-frames:]
    known = [0, 0, 0, 0]
    known[camera] = 2
    found = off(detector.compare(take("take 1", tuple(known)), cameras))
    assert list(found) == [CAMS[camera]]
    assert found[CAMS[camera]].verdict == "shifted" and found[CAMS[camera]].offset == frames + 2
    assert f"{CAMS[camera]}.mp4: shifted by {frames + 2:+d} frames" in found[CAMS[camera]].line()


def test_cameras_in_sync_and_unrelated_ones_are_not_reported(detector):
    for seed in range(8):
        findings = detector.compare(take(f"take {seed}"), signals(seed))
        assert {found.verdict for found in findings} == {"in sync"}, seed
        other = signals(seed)
        other[2] = signals(seed + 100)[2]
        assert off(detector.compare(take(f"take {seed}"), other)) == {}, seed


def test_drifts_and_lost_frames_are_not_reported_as_shifts(detector):
    cameras = signals(2)
    cameras[1] = np.delete(cameras[1], np.linspace(0, 1799, 22).astype(int)[1:-1])
    found = off(detector.compare(take("take 2"), cameras))
    assert list(found) == ["cam01"] and found["cam01"].verdict == "drift"
    assert abs(found["cam01"].offset) <= 3 and abs(found["cam01"].last_offset + 20) <= 3
    cameras = signals(2)
    cameras[3] = np.delete(cameras[3], np.arange(900, 915))
    found = off(detector.compare(take("take 2"), cameras))
    assert list(found) == ["cam03"] and found["cam03"].verdict == "jump"
    assert (found["cam03"].offset, found["cam03"].last_offset) == (0, -15)
    assert abs(found["cam03"].change_s - 30) <= 5


def write_takes(root, late):
    """Write two takes of three cameras in which more or less of the frame changes; one camera is late."""
    rng = np.random.default_rng(0)
    frames, cameras = 450, CAMS[:3]
    takes = []
    for name in ("one", "two"):
        rows = np.repeat(rng.integers(1, 32, frames // 5), 5)
        for cam in cameras:
            images = np.full((frames, 64, 64, 3), 100, np.uint8)
            for at in range(frames):
                images[at, : rows[at]] += rng.integers(0, 60, (rows[at], 64, 1), dtype=np.uint8)
            shown = images[late:] if (name, cam) == ("two", "cam02") else images
            encode(root / name / f"{cam}.mp4", shown, Camera(*[np.zeros((1, 3))] * 3, 50.0, 64, 64), FPS)
        views = [View(cam, f"{name}/{cam}.mp4", 64, 64) for cam in cameras]
        group = Group(name, (views[0],), tuple(views[1:]), (frames - late) / FPS, FPS)
        takes.append(Take(group, (NarratedClip(Narration(f"{name} 1", "a", 2.0, "C walks.", "C walks."), 1.0, 3.0),)))
    write_index(root / "index", takes, "train", {})


METHODS = ["packets", pytest.param("motion", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_the_command_writes_offsets_that_the_index_builder_reads(tmp_path, method, capsys):
    write_takes(tmp_path, late=12)
    before = (tmp_path / "index" / "groups.jsonl").read_bytes()
    words = [str(tmp_path / "index"), "--root", str(tmp_path), "--workers", "1", "--methods", method]
    written = tmp_path / "offsets.json"
    assert main([*words, "--offsets", str(written), "--report", str(tmp_path / "report.jsonl")]) == 1
    assert _frame_offsets(written) == {"two": {"cam02": -12}}
    assert "two/cam02.mp4: shifted by -12 frames (-400 ms) (" + method in capsys.readouterr().out
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "index" / "groups.jsonl").read_bytes() == before
    # An index that knows the offset is in sync.
    groups = [json.loads(line) for line in before.decode().splitlines()]
    groups[1]["frame_offset"] = {"cam02": -12}
    (tmp_path / "index" / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    assert main(words) == 0


def test_files_without_the_signal_are_named(tmp_path, toy_world, capsys):
    index = str(toy_world / "ego_exo_clip")
    assert main([index, "--root", str(toy_world), "--workers", "1", "--methods", "sound"]) == 1
    assert "no sound compared: the file has no sound" in capsys.readouterr().out
    assert main([index, "--root", str(toy_world), "--tolerance", "-1"]) == 2
    assert "--tolerance: got -1, allowed" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_no_false_alarm_in_the_generated_world(toy_world, method):
    words = [str(toy_world / "ego_exo_clip"), "--root", str(toy_world), "--workers", "1", "--methods", method]
    assert main(words) == 0


def test_frames_that_differ_from_the_one_before_are_motion(tmp_path):
    rng = np.random.default_rng(0)
    frames = np.full((120, 64, 64, 3), 100, np.uint8)
    for at in (20, 47, 80):
        frames[at:] = rng.integers(0, 255, (64, 64, 1), dtype=np.uint8)
    encode(tmp_path / "video.mp4", frames, Camera(*[np.zeros((1, 3))] * 3, 50.0, 64, 64), FPS)
    signal = read_signal(tmp_path / "video.mp4", "motion", FPS)
    assert len(signal) == 120
    for at in (20, 47, 80):
        assert abs(int(signal[at - 8 : at + 8].argmax()) - 8) <= 2, at


def test_the_loudness_of_sound_is_a_signal(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    rng = np.random.default_rng(0)
    onsets = [20, 47, 80]
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=FPS), container.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for _ in range(120):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode())
        samples = np.full(4 * 16000, 1e-4, np.float32)
        for onset in onsets:
            begin = onset * 16000 // FPS
            samples[begin : begin + 1600] += 0.3 * rng.standard_normal(1600).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    signal = read_signal(path, "sound", FPS)
    peaks = [int(signal[max(0, onset - 8) : onset + 8].argmax()) + max(0, onset - 8) for onset in onsets]
    assert all(abs(peak - onset) <= 3 for peak, onset in zip(peaks, onsets, strict=True)), peaks
