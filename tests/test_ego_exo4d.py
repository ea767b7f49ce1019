"""Reading an Ego-Exo4D release: invented folders with the oddities of the real one, and real camera names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.ego_exo4d import (
    NarratedClip,
    ReleaseError,
    Take,
    View,
    camera_wearer_text,
    clip_span,
    exo_views,
    fit_alpha,
    is_ego_camera,
    mean_gap_s,
    read_release,
)

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples/ego_exo"
ARIA_STREAMS = {"slam-left": "1201-1", "slam-right": "1201-2", "rgb": "214-1", "et": "211-1"}


def stream(file: str | None) -> dict[str, Any]:
    return {"relative_path": file and f"frame_aligned_videos/{file}"}


def take_record(uid: str, *, aria: str = "aria01", exos: tuple[str, ...] = ("cam01", "cam02"), **fields: Any) -> Any:
    videos: dict[str, Any] = {cam: {"0": stream(f"{cam}.mp4")} for cam in exos}
    videos[aria] = {name: stream(f"{aria}_{number}.mp4") for name, number in ARIA_STREAMS.items()}
    cameras = [{"cam_id": cam, "is_ego": cam == aria} for cam in videos]
    record = {
        "take_uid": uid,
        "take_name": f"name_{uid}",
        "root_dir": f"takes/name_{uid}",
        "duration_sec": 10.0,
        "best_exo": None,
        "capture": {"cameras": cameras},
        "frame_aligned_videos": videos,
    }
    return record | fields


def said(timestamp: Any, text: str = "C lifts the kettle.", **fields: Any) -> dict[str, Any]:
    flags = {"subject": "C", "ego_visible": True, "unsure": False, "best_exo": None}
    return {"text": text, "timestamp": timestamp} | flags | fields


def by(*descriptions: Any, rejected: Any = False) -> dict[str, Any]:
    return {"annotation_uid": "a", "annotator_id": "9", "rejected": rejected, "descriptions": list(descriptions)}


def write_release(
    root: Path, takes: Any, annotations: Any, *, split: str = "train", splits: Any = None, missing: tuple[str, ...] = ()
) -> Path:
    """A release with an empty file for every listed video, except the ``missing`` file names."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "takes.json").write_text(json.dumps(takes))
    described = json.dumps({"ds": "240301", "annotations": annotations})
    (root / f"annotations/atomic_descriptions_{split}.json").write_text(described)
    if splits is not None:
        (root / "annotations/splits.json").write_text(json.dumps({"split_to_take_uids": splits}))
    for take in takes if isinstance(takes, list) else ():
        folder = root / take.get("root_dir", "") / "frame_aligned_videos/downscaled/448"
        folder.mkdir(parents=True, exist_ok=True)
        for streams in take.get("frame_aligned_videos", {}).values():
            for listed in (streams or {}).values():
                if listed and listed["relative_path"] and Path(listed["relative_path"]).name not in missing:
                    (folder / Path(listed["relative_path"]).name).touch()
    return root


def lengths(clips: tuple[NarratedClip, ...]) -> list[float]:
    return [clip.end_s - clip.start_s for clip in clips]


# --- From narration times to clips ------------------------------------------------------------------------------------

A, B = (0.0, 2.0, 4.0, 6.0), (1.0, 5.0, 9.0)


def test_gaps_of_the_worked_example():
    assert (mean_gap_s(A), mean_gap_s(B)) == (2.0, 4.0)
    assert fit_alpha([A, B]) == 3.0
    assert clip_span(4.0, 2.0, 3.0, 10.0) == pytest.approx((4 - 1 / 3, 4 + 1 / 3))
    assert clip_span(5.0, 4.0, 3.0, 10.0) == pytest.approx((5 - 2 / 3, 5 + 2 / 3))


def test_gap_ignores_order():
    assert mean_gap_s((6.0, 0.0, 4.0, 2.0)) == 2.0


@pytest.mark.parametrize("times_s", [(), (3.0,), (3.0, 3.0, 3.0)])
def test_track_without_a_gap_gives_one_second_clips_and_no_part_of_alpha(times_s):
    assert mean_gap_s(times_s) is None
    assert fit_alpha([A, times_s, B]) == 3.0
    assert clip_span(5.0, mean_gap_s(times_s), 3.0, 10.0) == (4.5, 5.5)


def test_mean_length_over_tracks_is_one_second():
    tracks = [A, B, (0.0, 0.5, 7.0)]
    alpha = fit_alpha(tracks)
    spans = [clip_span(50.0, mean_gap_s(track), alpha, 100.0) for track in tracks]
    assert np.mean([end_s - start_s for start_s, end_s in spans]) == pytest.approx(1.0)


def test_alpha_needs_a_gap():
    with pytest.raises(ReleaseError, match="timestamps, so alpha cannot be fitted; pass alpha"):
        fit_alpha([(1.0,), (2.0, 2.0)])


@pytest.mark.parametrize(
    ("time_s", "options", "expected"),
    [
        (0.2, {}, (0.0, 0.7)),  # cut at the start
        (9.8, {}, (9.3, 10.0)),  # cut at the end
        (10.0, {}, (9.5, 10.0)),  # on the last instant
        (5.0, {"clip_scale": 2.0}, (4.0, 6.0)),
        (5.0, {"min_clip_s": 3.0}, (3.5, 6.5)),
        (0.5, {"min_clip_s": 3.0}, (0.0, 3.0)),  # widened inwards
        (9.5, {"min_clip_s": 3.0}, (7.0, 10.0)),
        (5.0, {"min_clip_s": 30.0}, (0.0, 10.0)),  # a take shorter than the shortest clip
        (5.0, {"max_clip_s": 0.5}, (4.75, 5.25)),
        (5.0, {"clip_scale": 0.01, "fps": 10.0}, (4.95, 5.05)),  # 10 ms widened to a frame
        (0.0, {"clip_scale": 0.01, "fps": 10.0}, (0.0, 0.1)),
        (10.0, {"clip_scale": 0.01, "fps": 10.0}, (9.9, 10.0)),
    ],
)
def test_span_at_the_edges(time_s, options, expected):
    assert clip_span(time_s, 3.0, 3.0, 10.0, **options) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10.1, 1.0, 1.0, 10.0), {}, "time_s=10.1 is outside the take"),
        ((-0.1, 1.0, 1.0, 10.0), {}, "time_s=-0.1 is outside the take"),
        ((1.0, 1.0, 0.0, 10.0), {}, "alpha=0.0"),
        ((1.0, 1.0, 1.0, 10.0), {"clip_scale": -1.0}, "clip_scale=-1.0"),
        ((1.0, 1.0, 1.0, 10.0), {"min_clip_s": 2.0, "max_clip_s": 1.0}, "max_clip_s=1.0 is below .* raise it"),
    ],
)
def test_span_refuses_what_it_cannot_cut(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        clip_span(*arguments, **options)


def test_read_spans_and_alpha_of_the_worked_example(tmp_path):
    annotations = {"u1": [by(*(said(t) for t in (6, 0, 4, 2)))], "u2": [by(*(said(t) for t in B))]}
    release = read_release(write_release(tmp_path, [take_record("u1"), take_record("u2")], annotations), "train")
    assert release.alpha == 3.0
    assert [clip.time_s for clip in release.clips] == [0, 2, 4, 6, 1, 5, 9]
    assert lengths(release.clips) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 4 / 3, 4 / 3, 4 / 3])
    assert [clip.clip_id for clip in release.clips[:4]] == ["u1/0/1", "u1/0/3", "u1/0/2", "u1/0/0"]
    assert [release.takes[clip.take_index].take_uid for clip in release.clips] == ["u1"] * 4 + ["u2"] * 3


def test_two_annotators_of_a_take_keep_their_own_gaps(tmp_path):
    annotations = {"u1": [by(*(said(t) for t in A)), by(*(said(t) for t in B))]}
    release = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train")
    assert release.alpha == 3.0
    assert [clip.time_s for clip in release.clips] == [0, 1, 2, 4, 5, 6, 9]
    middle = {clip.time_s: clip for clip in release.clips}
    assert lengths((middle[4], middle[5])) == pytest.approx([2 / 3, 4 / 3])


def test_repeats_and_times_outside_the_take_change_no_gap(tmp_path):
    twice = [said(4, "C lifts the lid."), said(4, "C lifts the lid."), said(4, "C turns the tap.")]
    annotations = {"u1": [by(said(0), *twice, said(-1), said(10.5), said(8))]}
    release = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train")
    assert [clip.clip_id for clip in release.clips] == ["u1/0/0", "u1/0/1", "u1/0/3", "u1/0/6"]
    assert release.alpha == pytest.approx(8 / 3)  # 0, 4, 4, 8
    funnel = release.funnel
    assert (funnel["narrations_listed"], funnel["narrations_distinct"], funnel["narrations_in_take"]) == (7, 6, 4)


def test_validation_reuses_the_training_alpha(tmp_path):
    takes = [take_record("u1"), take_record("u2")]
    write_release(tmp_path, takes, {"u1": [by(*(said(t) for t in A))]})
    write_release(tmp_path, takes, {"u2": [by(*(said(t) for t in B))]}, split="val")
    train = read_release(tmp_path, "train")
    val = read_release(tmp_path, "val", alpha=train.alpha)
    assert (train.alpha, val.alpha) == (2.0, 2.0)
    assert lengths(val.clips)[1] == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"for 'val' pass read_release\(root, 'train'\)\.alpha"):
        read_release(tmp_path, "val")


def test_options_reach_the_clips(tmp_path):
    root = write_release(tmp_path, [take_record("u1", fps=10)], {"u1": [by(said(2), said(4), said(6))]})
    assert lengths(read_release(root, "train", clip_scale=1.5).clips) == pytest.approx([1.5] * 3)
    assert lengths(read_release(root, "train", max_clip_s=0.5).clips) == pytest.approx([0.5] * 3)
    assert lengths(read_release(root, "train", min_clip_s=2.0).clips) == pytest.approx([2.0] * 3)
    assert lengths(read_release(root, "train", alpha=1e6).clips) == pytest.approx([0.1] * 3)  # a frame of 10 fps


# --- Text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "C cracks the egg open in the bowl on the countertop with both hands.",
            "Camera-wearer cracks the egg open in the bowl on the countertop with both hands.",
        ),
        ("#C C picks a bag from the table", "Camera-wearer picks a bag from the table."),
        ("#c C picks a bag", "Camera-wearer picks a bag."),
        ("#O The man X hands C a cup", "The man X hands the camera-wearer a cup."),
        ("C's left hand holds Y's arm.", "Camera-wearer's left hand holds Y's arm."),
        ("The woman Y points at C's mug.", "The woman Y points at the camera-wearer's mug."),
        ("Y moves C\u2019s mug.", "Y moves the camera-wearer\u2019s mug."),
        ("Y looks at C. C waves back", "Y looks at the camera-wearer. Camera-wearer waves back."),
        ("C,  smiling ,\tlifts\nthe cup . ", "Camera-wearer, smiling , lifts the cup."),
        ("C lifts the cup...", "Camera-wearer lifts the cup."),
        ("C plays a C major chord.", "Camera-wearer plays a C major chord."),
        ("C plays the C Minor scale", "Camera-wearer plays the C Minor scale."),
        ("C plays a C chord on the guitar", "Camera-wearer plays a C chord on the guitar."),
        ("C presses the C note, then the C string", "Camera-wearer presses the C note, then the C string."),
        ("C plays C sharp and C flat", "Camera-wearer plays C sharp and C flat."),
        ("C plays C# twice", "Camera-wearer plays C# twice."),
        ("C tightens the C clamp", "Camera-wearer tightens the C clamp."),
        ("C tightens the C-clamp", "Camera-wearer tightens the C-clamp."),
        ("C clamps the wood", "Camera-wearer clamps the wood."),  # not exactly "clamp"
        ("C notes the time", "Camera-wearer notes the time."),
        ("X passes C's note", "X passes the camera-wearer's note."),
        ("CC lifts the CD", "CC lifts the CD."),
        ("C lifts it", "Camera-wearer lifts it."),
        ("C lifts.", None),
        ("#C C lifts", None),
        ("C lifts , .", None),
        ("", None),
        (" . ", None),
        ("#C C picks the #unsure from the table", None),
        ("C picks the #Unsure", None),
    ],
)
def test_text(raw, expected):
    assert camera_wearer_text(raw) == expected


# --- Cameras and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cam_id", "flags", "ego"),
    [
        ("aria02", {}, True),
        ("Aria07", {}, True),
        ("cam01", {}, False),
        ("gp03", {}, False),
        ("cam05", {"cam05": True}, True),
        ("aria02", {"aria02": False}, False),
    ],
)
def test_camera_list_beats_the_name(cam_id, flags, ego):
    assert is_ego_camera(cam_id, flags) is ego


def test_only_the_rgb_stream_and_the_fixed_cameras_are_views(tmp_path):
    record = take_record("u1", aria="aria02", exos=("gp02", "cam01", "mobile", "moblie", "cam05"), best_exo="gp02")
    record["frame_aligned_videos"] |= {
        "collage": {"0": stream("collage.mp4")},
        "best_exo": {"0": stream(None)},
        "cam08": {"0": stream(None)},
        "cam09": None,
    }
    next(camera for camera in record["capture"]["cameras"] if camera["cam_id"] == "cam05")["is_ego"] = "1"
    (take,) = read_release(write_release(tmp_path, [record], {"u1": [by(said(1), said(2))]}), "train").takes
    folder = "takes/name_u1/frame_aligned_videos/downscaled/448"
    exos = (View("cam01", f"{folder}/cam01.mp4"), View("gp02", f"{folder}/gp02.mp4"))
    assert take == Take("u1", "name_u1", View("aria02", f"{folder}/aria02_214-1.mp4"), exos, 10.0, 30.0, "gp02")


@pytest.mark.parametrize("capture", [None, {}, {"cameras": None}, {"cameras": []}])
def test_without_a_camera_list_names_decide(tmp_path, capture):
    record = take_record("u1", aria="Aria03", capture=capture)
    (take,) = read_release(write_release(tmp_path, [record], {"u1": [by(said(1), said(2))]}), "train").takes
    assert take.ego.cam_id == "Aria03"
    assert [view.cam_id for view in take.exos] == ["cam01", "cam02"]


def test_full_size_videos(tmp_path):
    root = write_release(tmp_path, [take_record("u1")], {"u1": [by(said(1), said(2))]})
    with pytest.raises(ReleaseError, match=r"--parts takes`, or change resolution=None"):
        read_release(root, "train", resolution=None)
    for name in ("aria01_214-1.mp4", "cam02.mp4"):
        (root / "takes/name_u1/frame_aligned_videos" / name).touch()
    (take,) = read_release(root, "train", resolution=None).takes
    assert take.ego.path == "takes/name_u1/frame_aligned_videos/aria01_214-1.mp4"
    assert [view.cam_id for view in take.exos] == ["cam02"]


def test_missing_videos_drop_the_view_or_the_take_but_change_no_clip(tmp_path):
    takes = [take_record("u1"), take_record("u2", aria="aria09"), take_record("u3", exos=("cam07",))]
    annotations = {"u1": [by(said(2), said(4))], "u2": [by(said(1), said(9))], "u3": [by(said(1), said(6))]}
    missing = ("cam01.mp4", "aria09_214-1.mp4", "cam07.mp4")
    release = read_release(write_release(tmp_path, takes, annotations, missing=missing), "train")
    assert [(take.take_uid, [view.cam_id for view in take.exos]) for take in release.takes] == [("u1", ["cam02"])]
    assert release.alpha == 5.0  # gaps 2, 8 and 5: of the annotations, not of the downloads
    counts = ("takes_narrated", "takes_with_ego", "takes_with_exo", "takes", "exo_views_listed", "exo_views")
    assert [release.funnel[name] for name in counts] == [3, 2, 1, 1, 3, 1]
    complete = read_release(write_release(tmp_path, takes, annotations), "train")
    assert [clip for clip in complete.clips if clip.take_uid == "u1"] == list(release.clips)


def test_shortest_stream_bounds_the_take(tmp_path):
    frames = {"aria01_214-1.mp4": 300, "cam01.mp4": 299, "cam02.mp4": 0}
    root = write_release(tmp_path, [take_record("u1")], {"u1": [by(said(9), said(9.96), said(9.98))]})
    release = read_release(root, "train", num_frames=lambda path: frames[path.name])
    (take,) = release.takes
    assert take.duration_s == pytest.approx(299 / 30)
    assert [view.cam_id for view in take.exos] == ["cam01"]
    assert [clip.time_s for clip in release.clips] == [9, 9.96]
    assert release.clips[-1].end_s == take.duration_s
    assert (release.funnel["narrations_with_video"], release.funnel["narrations_in_video"]) == (3, 2)
    assert read_release(root, "train").takes[0].duration_s == 10.0


def test_frame_rate_of_the_record(tmp_path):
    root = write_release(tmp_path, [take_record("u1", fps=10)], {"u1": [by(said(1), said(2))]})
    (take,) = read_release(root, "train", num_frames=lambda path: 95).takes
    assert (take.fps, take.duration_s) == (10.0, 9.5)


# --- Annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "flag"), [(True, True), (False, False), ("1", True), ("0", False), (1, True)])
def test_flags_as_booleans_and_strings(tmp_path, written, flag):
    annotations = {"u1": [by(said(1, ego_visible=written, unsure=written), said(2), rejected="0")]}
    clip = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train").clips[0]
    assert (clip.ego_visible, clip.unsure) == (flag, flag)


def test_missing_flags_and_subject(tmp_path):
    annotations = {"u1": [{"descriptions": [{"text": "C lifts a cup", "timestamp": t} for t in (1, 2)]}]}
    clip = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train").clips[0]
    assert (clip.subject, clip.ego_visible, clip.unsure, clip.best_exo) == (None, True, False, None)


def test_both_spellings_of_subject_and_every_form_of_best_exo(tmp_path):
    other = said(2, narration_subject="O", best_exo={"raw_cam_id": "2", "cam_id": "cam02"})
    del other["subject"]
    annotations = {"u1": [by(said(1), other, said(3, best_exo="cam01"), said(4, best_exo={"cam_id": None}))]}
    clips = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train").clips
    assert [clip.subject for clip in clips] == ["C", "O", "C", "C"]
    assert [clip.best_exo for clip in clips] == [None, "cam02", "cam01", None]


@pytest.mark.parametrize("rejected", [True, "1"])
def test_rejected_annotations_are_skipped_unread(tmp_path, rejected):
    annotations = {"u1": [by("not even an object", rejected=rejected), by(said(1), said(3))]}
    release = read_release(write_release(tmp_path, [take_record("u1")], annotations), "train")
    assert [clip.clip_id for clip in release.clips] == ["u1/1/0", "u1/1/1"]
    assert (release.funnel["annotations_listed"], release.funnel["annotations"]) == (2, 1)


def test_filters_are_off_by_default_and_leave_spans_alone(tmp_path):
    descriptions = [said(1), said(2, ego_visible="0"), said(4, unsure="1"), said(5, subject="O"), said(7, "C lifts.")]
    root = write_release(tmp_path, [take_record("u1")], {"u1": [by(*descriptions)]})
    release = read_release(root, "train")
    assert [clip.time_s for clip in release.clips] == [1, 2, 4, 5]
    strict = read_release(root, "train", require_ego_visible=True, drop_unsure=True, subjects={"C"})
    assert strict.clips == release.clips[:1]
    chain = ("in_video", "with_text", "of_subjects", "ego_visible")
    assert [strict.funnel[f"narrations_{name}"] for name in chain] == [5, 4, 3, 2]
    assert strict.funnel["clips"] == 1
    assert [clip.time_s for clip in read_release(root, "train", subjects=["O"]).clips] == [5]
    with pytest.raises(ValueError, match="subjects='C' is one string"):
        read_release(root, "train", subjects="C")


def test_unknown_takes_are_joined_away(tmp_path):
    annotations = {"ghost": [by("anything")], "u1": [by(said(1), said(2))], "empty": None}
    release = read_release(write_release(tmp_path, [take_record("u1"), take_record("u2")], annotations), "train")
    assert [take.take_uid for take in release.takes] == ["u1"]
    counts = ("takes_listed", "takes_in_split", "annotated_takes_listed", "annotated_takes")
    assert [release.funnel[name] for name in counts] == [2, 1, 2, 1]


def test_splits_file_decides_when_present(tmp_path):
    takes = [take_record(uid) for uid in ("u1", "u2", "u3")]
    annotations = {uid: [by(said(1), said(2))] for uid in ("u1", "u2", "u3")}
    splits = {"train": ["u3", "u1", "ghost"], "val": ["u2"], "test": []}
    release = read_release(write_release(tmp_path, takes, annotations, splits=splits), "train")
    assert [take.take_uid for take in release.takes] == ["u1", "u3"]
    assert (release.funnel["takes_listed"], release.funnel["takes_in_split"]) == (3, 2)


# --- Exo choice -------------------------------------------------------------------------------------------------------


def test_exo_policies():
    one, two, three = (View(f"cam0{n}", f"cam0{n}.mp4") for n in (1, 2, 3))
    take = Take("u1", "n", View("aria01", "aria01.mp4"), (one, two, three), 10.0, 30.0, best_exo="cam02")
    clip = NarratedClip("u1/0/0", 0, "u1", 1.0, 2.0, 1.5, "t", "t", "C", True, False, best_exo="cam03")
    assert exo_views(take, clip, "all") == (one, two, three)
    assert exo_views(take, clip, "best") == (three,)
    unset = dataclasses.replace(clip, best_exo=None)
    absent = dataclasses.replace(clip, best_exo="cam09")
    assert exo_views(take, unset, "best") == exo_views(take, absent, "best") == (two,)
    assert exo_views(dataclasses.replace(take, best_exo=None), absent, "best") == (one,)
    drawn = [exo_views(take, clip, "random", np.random.default_rng(seed)) for seed in range(40)]
    assert set(drawn) == {(one,), (two,), (three,)}
    assert drawn == [exo_views(take, clip, "random", np.random.default_rng(seed)) for seed in range(40)]
    with pytest.raises(ValueError, match="'random' needs rng"):
        exo_views(take, clip, "random")
    with pytest.raises(ValueError, match="'first': expected 'all', 'best' or 'random'"):
        exo_views(take, clip, "first")  # type: ignore[arg-type]


# --- Errors name the file, the field and the mend ---------------------------------------------------------------------


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(ReleaseError, match=r"nowhere: no such folder; give the Ego-Exo4D release folder"):
        read_release(tmp_path / "nowhere", "train")
    with pytest.raises(ReleaseError, match=r"takes\.json: no such file; fetch it with `egoexo .* --parts metadata`"):
        read_release(tmp_path, "train")
    write_release(tmp_path, [], {}, split="val")
    with pytest.raises(ReleaseError, match=r"atomic_descriptions_train\.json: no such file; .* --parts annotations`"):
        read_release(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b'[{"take_uid": "u1",\n  oops}]', r"line 2, column 3"), (b"", "line 1, column 1"), (b'["\xff"]', "at byte 2")],
)
def test_malformed_json(tmp_path, content, problem):
    (tmp_path / "takes.json").write_bytes(content)
    with pytest.raises(
        ReleaseError, match=rf"takes\.json: malformed JSON, .*{problem}.*; correct it there, or fetch it"
    ):
        read_release(tmp_path, "train")


def broken(**fields: Any) -> Any:
    """A take's annotations whose second annotator's third description lacks the fields given as None, or has others."""
    good = said(3) | fields
    return [by(said(1)), by(said(1), said(2), {name: value for name, value in good.items() if value is not None})]


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"timestamp": None}, "timestamp", "is missing or null; add it"),
        ({"timestamp": "3.0"}, "timestamp", "is '3.0', expected a finite number; correct it"),
        ({"timestamp": True}, "timestamp", "is True, expected a finite number"),
        ({"timestamp": float("nan")}, "timestamp", "is nan, expected a finite number"),
        ({"text": None}, "text", "is missing or null"),
        ({"text": 7}, "text", "is 7, expected a string"),
        ({"ego_visible": "yes"}, "ego_visible", """is 'yes', expected true, false, "0" or "1";"""),
        ({"unsure": 2}, "unsure", "is 2, expected true, false"),
        ({"unsure": []}, "unsure", "is [], expected true, false"),
        ({"subject": 1}, "subject", "is 1, expected a string"),
        ({"best_exo": {"cam_id": 2}}, "best_exo.cam_id", "is 2, expected a string"),
    ],
)
def test_wrong_narration_fields(tmp_path, fields, field, problem):
    write_release(tmp_path, [take_record("u-1")], {"u-1": broken(**fields)})
    with pytest.raises(ReleaseError) as caught:
        read_release(tmp_path, "train")
    message = str(caught.value)
    file = tmp_path / "annotations/atomic_descriptions_train.json"
    assert message.startswith(f"{file}: field annotations.u-1[1].descriptions[2].{field} {problem}")
    assert message.endswith("or fetch a V2 atomic_descriptions_train.json")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("takes", "problem"),
    [
        ({"u1": {}}, "the top level is {'u1': {}}, expected a list; correct it"),
        (["u1"], "[0] is 'u1', expected an object"),
        ([{"take_name": "x"}], "field [0].take_uid is missing or null; add it"),
        ([take_record("u1"), take_record("u1")], "field [1].take_uid is 'u1', expected an identifier used once"),
        ([take_record("u1", duration_sec=None)], "field [0].duration_sec is missing or null"),
        ([take_record("u1", duration_sec=0)], "field [0].duration_sec is 0, expected a number above 0"),
        ([take_record("u1", fps="30")], "field [0].fps is '30', expected a finite number"),
        ([take_record("u1", frame_aligned_videos={"cam01": ["x" * 99]})], "frame_aligned_videos.cam01 is ['xxx"),
        ([take_record("u1", capture={"cameras": [{"is_ego": True}]})], "[0].capture.cameras[0].cam_id is missing"),
    ],
)
def test_wrong_take_fields(tmp_path, takes, problem):
    root = tmp_path / "release"
    good = [take_record("u1")]
    write_release(root, good, {"u1": [by(said(1), said(2))]})
    (root / "takes.json").write_text(json.dumps(takes))
    with pytest.raises(ReleaseError) as caught:
        read_release(root, "train")
    assert str(caught.value).startswith(f"{root / 'takes.json'}: ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith("or fetch a V2 takes.json")


def test_wrong_splits_and_annotations(tmp_path):
    write_release(tmp_path, [take_record("u1")], {"u1": [by(said(1))]}, splits={"val": []})
    with pytest.raises(ReleaseError, match=r"splits\.json: field split_to_take_uids\.train is missing or null; add it"):
        read_release(tmp_path, "train")
    (tmp_path / "annotations/splits.json").unlink()
    (tmp_path / "annotations/atomic_descriptions_train.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"atomic_descriptions_train\.json: field annotations is missing or null"):
        read_release(tmp_path, "train")


def test_nothing_left_says_where_it_went(tmp_path):
    annotations = {"u1": [by(said(1), said(2))]}
    root = write_release(tmp_path, [take_record("u1")], annotations, missing=("cam01.mp4", "cam02.mp4"))
    with pytest.raises(ReleaseError, match=r"takes_with_ego 1, takes_with_exo 0.*--parts downscaled_takes/448`"):
        read_release(root, "train")
    write_release(tmp_path, [take_record("u1")], annotations)
    with pytest.raises(ReleaseError, match=r"narrations_of_subjects 0.*loosen the filter"):
        read_release(root, "train", subjects=["O"])
    write_release(tmp_path, [take_record("u1")], {"ghost": []})
    with pytest.raises(ReleaseError, match=r"takes_in_split 0.*correct annotations/ and takes\.json"):
        read_release(root, "train")


# --- Real names -------------------------------------------------------------------------------------------------------


def test_real_take_and_stream_names_without_camera_lists(tmp_path):
    """Names and times of 125 real takes (RuipingL/EgoExoMem, CC BY 4.0); 46 of them were worn as aria02 to aria07."""
    file = SAMPLES / "egoexomem_egoexo4d_qa.json"
    if not file.is_file():
        pytest.skip(f"needs {file.name}, a sample that is not part of this repository")
    streams: dict[str, set[str]] = {}
    times: dict[str, set[float]] = {}
    for question in json.loads(file.read_text()):
        name, evidence = question["take_name"], question["verification"]
        frames = [Path(frame).stem.rpartition("_")[0] for frame in evidence.get("keyframes") or []]
        streams.setdefault(name, set()).update(frames)
        times.setdefault(name, set()).update(float(time_s) for time_s in evidence.get("timestamps") or [])
    takes, annotations = [], {}
    for name, frames in streams.items():
        videos: dict[str, Any] = {}
        for frame in frames:
            file_stem = frame.removeprefix("ego_").removeprefix("exo_")
            videos[file_stem.split("_")[0]] = {"rgb" if "_214-1" in file_stem else "0": stream(f"{file_stem}.mp4")}
        takes.append(take_record(name, frame_aligned_videos=videos, capture=None, duration_sec=1e4))
        annotations[name] = [by(*(said(time_s) for time_s in times[name]))]
    release = read_release(write_release(tmp_path, takes, annotations), "train")

    assert len(streams) == 125
    worn = [
        f"ego_{Path(take.ego.path).stem}" in streams[take.take_name.removeprefix("name_")] for take in release.takes
    ]
    assert all(worn)
    assert {take.ego.cam_id for take in release.takes} == {f"aria0{n}" for n in range(1, 8)}
    assert sum(take.ego.cam_id != "aria01" for take in release.takes) == 46
    assert {view.cam_id for take in release.takes for view in take.exos} == {"cam01"}
    assert all(0 <= clip.start_s <= clip.time_s <= clip.end_s for clip in release.clips)
    assert len(release.clips) == sum(map(len, times.values()))
