"""Assembly101 as pairs: invented annotations of the documented form, and small generated videos."""

from __future__ import annotations

import csv
import json

import av
import numpy as np
import pytest

from datamodules.clips.dataset import ClipConfig
from datamodules.ego_exo_clip.build import build_index, main, select_clips
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataset
from datamodules.ego_exo_clip.index import FilterCounts, PairIndex
from datamodules.ego_exo_clip.sources.assembly101 import Assembly101, action_text
from datamodules.io.annotations import SourceError

SEGMENT = "id video start_frame end_frame action_id verb_id noun_id action_cls verb_cls noun_cls"
COLUMNS = f"{SEGMENT} toy_id toy_name is_shared is_RGB"
FIXED, SECOND = "C10095_rgb", "C10404_rgb"
E1, E3 = "HMC_21176875_mono10bit", "HMC_21110305_mono10bit"  # by name, e3 comes first
VIEWS = (FIXED, SECOND, E1, E3)
SIDE, FPS = 64, 60


def rows(sequence, *segments, views=VIEWS):
    """A row for each view of each segment (first frame, last frame, action), as the files have them."""
    for start, end, action in segments:
        for view in views:
            verb, _, noun = action.partition(" ")
            named = {"action_cls": action, "verb_cls": verb, "noun_cls": noun, "toy_id": "a30", "toy_name": "suv"}
            frames = {"start_frame": f"{start:09d}", "end_frame": f"{end:09d}"}
            yield {"video": f"{sequence}/{view}.mp4", **frames, **named, "is_shared": 0, "is_RGB": int("rgb" in view)}


def write_annotations(root, listed, split="train", columns=COLUMNS):
    folder = root / "fine-grained-annotations"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns.split(), restval=0, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(listed)
    return root


def write_video(path, frames, grey):
    """Every frame holds its number in eight blocks, lowest bit left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "g": "30"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "gray" if grey else "yuv420p"
        for number in range(frames):
            bits = [255 * (number >> bit & 1) for bit in range(8)]
            row = np.repeat(np.array(bits, dtype=np.uint8), SIDE // 8)
            image = np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def numbers_on(frames):
    bits = frames[:, SIDE // 2, SIDE // 16 :: SIDE // 8].float().mean(dim=-1) > 128
    return [sum(1 << bit for bit, on in enumerate(row) if on) for row in bits.tolist()]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two seconds of four views; one ego stream three frames short."""
    root = tmp_path_factory.mktemp("assembly101")
    write_annotations(root, rows("s1", (15, 29, "pick up screw"), (40, 59, "unscrew chassis with hand")))
    for view in VIEWS:
        write_video(root / "recordings" / "s1" / f"{view}.mp4", 117 if view == E1 else 120, grey="mono" in view)
    return root


def read(root, **options):
    return list(Assembly101(root, **options).read(FilterCounts()))


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("pick up screwdriver", "Camera-wearer picks up screwdriver."),
        ("unscrew chassis with screwdriver", "Camera-wearer unscrews chassis with screwdriver."),
        ("pass cabin to other hand", "Camera-wearer passes cabin to other hand."),
        ("push screw", "Camera-wearer pushes screw."),
        ("attempt to put down screw", "Camera-wearer attempts to put down screw."),
        ("carry box", "Camera-wearer carries box."),
        ("play drum", "Camera-wearer plays drum."),
        ("clap", "Camera-wearer claps."),
    ],
)
def test_actions_become_sentences(action, text):
    assert action_text(action) == text


def test_a_segment_of_all_views_is_one_narration(recordings):
    ((group, narrations),) = read(recordings)
    assert (group.group_id, group.fps, group.duration_s) == ("s1", 60.0, 2.0)
    assert [view.cam for view in group.egos] == [E1, E3]
    assert [view.path for view in group.exos] == [f"recordings/s1/{cam}.mp4" for cam in (FIXED, SECOND)]
    assert [(narration.clip_id, narration.text, narration.raw_text) for narration in narrations] == [
        ("s1/15-29/pick_up_screw", "Camera-wearer picks up screw.", "pick up screw"),
        (
            "s1/40-59/unscrew_chassis_with_hand",
            "Camera-wearer unscrews chassis with hand.",
            "unscrew chassis with hand",
        ),
    ]
    assert [narration.span_s for narration in narrations] == [(0.5, 1.0), (40 / 30, 2.0)]  # the last frame is in it
    assert [narration.time_s for narration in narrations] == pytest.approx([0.75, 5 / 3])


def test_rows_of_one_recording_need_not_be_together(tmp_path):
    listed = [*rows("s1", (0, 5, "clap hand")), *rows("s2", (9, 9, "push screw")), *rows("s1", (6, 8, "push screw"))]
    write_annotations(tmp_path, listed)
    assert [(group.group_id, len(narrations)) for group, narrations in read(tmp_path)] == [("s1", 2), ("s2", 1)]


def test_another_ego_view_can_be_preferred(recordings):
    ((group, _),) = read(recordings, ego_view="e3")
    assert [view.cam for view in group.egos] == [E3, E1]
    with pytest.raises(ValueError, match="ego_view: got 'e5', allowed: e1, e2, e3, e4"):
        Assembly101(recordings, ego_view="e5")


def test_pairs_show_the_same_instants_in_all_views(recordings, tmp_path):
    header = build_index(Assembly101(recordings), tmp_path, probe_workers=1)
    assert (header["groups"], header["clips"], header["pairs"], header["alpha"]) == (1, 2, 4, None)
    (group,) = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert (group["fps"], group["num_frames"], group["duration"]) == (60.0, 117, 1.95)
    pairs = EgoExoClipDataset(
        PairIndex.read(tmp_path),
        recordings,
        ["ego", "exo"],
        "all",
        None,
        0,
        ClipConfig(4, SIDE, "squash"),
        encoder=None,
    )
    first, last_s = [33, 41, 48, 56], [80 + (117 - 80) / 8 * n for n in (1, 3, 5, 7)]
    for index, expected in enumerate((first, first, np.floor(last_s).tolist(), np.floor(last_s).tolist())):
        videos = pairs.videos(pairs.span(index, 0))
        assert numbers_on(videos["ego"]) == numbers_on(videos["exo"]) == expected
    assert {pairs.span(index, 0).paths["exo"].stem for index in (0, 1)} == {FIXED, SECOND}


def test_validation_needs_no_alpha(tmp_path, recordings):
    write_annotations(tmp_path, rows("s1", (15, 29, "clap hand")), split="validation")
    (tmp_path / "recordings").symlink_to(recordings / "recordings")
    assert len(select_clips(Assembly101(tmp_path, "validation")).takes) == 1


def test_the_command(recordings, tmp_path, capsys):
    out = tmp_path / "index"
    assert main(["assembly101", str(recordings), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["1 takes, 2 clips, 4 ego-exo pairs", f"written to {out}"]
    moved = tmp_path / "annotations"
    moved.mkdir()
    (moved / "train.csv").write_bytes((recordings / "fine-grained-annotations" / "train.csv").read_bytes())
    assert main(["assembly101", str(recordings), "--annotations", str(moved), "--out", str(tmp_path / "again")]) == 0
    for name in ("groups.jsonl", "clips.jsonl", "index.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"video": "s1.mp4"}, "video is 's1.mp4', expected <sequence>/<view>.mp4"),
        ({"video": "s1/a/b.mp4"}, "video is 's1/a/b.mp4', expected"),
        ({"is_RGB": "yes"}, "is_RGB is 'yes', expected 0 or 1"),
        ({"start_frame": "1.5"}, "start_frame is '1.5', expected a frame number"),
        ({"end_frame": "-3"}, "end_frame is '-3', expected a frame number"),
        ({"start_frame": "30"}, "'clap hand' from frame 30 to 29, expected an action and an end"),
        ({"action_cls": ""}, "'' from frame 15 to 29, expected an action"),
    ],
)
def test_wrong_rows_are_named(tmp_path, fields, problem):
    listed = list(rows("s1", (15, 29, "clap hand")))
    listed[2] |= fields
    file = write_annotations(tmp_path, listed) / "fine-grained-annotations" / "train.csv"
    with pytest.raises(SourceError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{file} line 4: {problem}")


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(
        SourceError, match=r"train\.csv: no such file; put Assembly101's fine-grained annotations there"
    ):
        read(tmp_path)
    write_annotations(tmp_path, [], columns="id video start_frame end_frame action_cls")
    with pytest.raises(SourceError, match=r"train\.csv: column is_RGB is missing; fetch the file again"):
        read(tmp_path)
