"""Reading an Ego-Exo4D release: invented folders with the oddities of the real one, and real camera names."""

import json
from pathlib import Path
from typing import Any

import pytest
from release_files import by, clips_of, counts, description, lengths, select, stream, take_record, write_release

from datamodules.ego_exo_clip.build import training_alpha
from datamodules.ego_exo_clip.index import Group, View
from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D, camera_wearer_text, is_ego_camera
from datamodules.io.annotations import SourceError

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples/ego_exo"


def narrations(selection):
    return [clip.narration for clip in clips_of(selection)]


def times(selection):
    return [narration.time_s for narration in narrations(selection)]


# --- From narration times to clips ------------------------------------------------------------------------------------

A, B = (0.0, 2.0, 4.0, 6.0), (1.0, 5.0, 9.0)


def test_spans_and_alpha_of_the_worked_example(tmp_path):
    annotations = {"u1": [by(*(description(t) for t in (6, 0, 4, 2)))], "u2": [by(*(description(t) for t in B))]}
    selection = select(write_release(tmp_path, [take_record("u1"), take_record("u2")], annotations))
    assert selection.alpha == 3.0
    assert times(selection) == [0, 2, 4, 6, 1, 5, 9]
    assert lengths(clips_of(selection)) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 4 / 3, 4 / 3, 4 / 3])
    assert [description.clip_id for description in narrations(selection)[:4]] == [
        "u1/0/1",
        "u1/0/3",
        "u1/0/2",
        "u1/0/0",
    ]
    assert [(take.group.group_id, len(take.clips)) for take in selection.takes] == [("u1", 4), ("u2", 3)]


@pytest.mark.parametrize("annotators", [("7", "8"), ("7", "7"), (7, None)])
def test_two_annotations_of_a_take_keep_their_own_gaps(tmp_path, annotators):
    lists = [
        by(*(description(t) for t in times), annotator=name) for times, name in zip((A, B), annotators, strict=True)
    ]
    selection = select(write_release(tmp_path, [take_record("u1")], {"u1": lists}))
    assert selection.alpha == 3.0
    assert times(selection) == [0, 1, 2, 4, 5, 6, 9]
    middle = {clip.narration.time_s: clip for clip in clips_of(selection)}
    assert lengths([middle[4], middle[5]]) == pytest.approx([2 / 3, 4 / 3])
    assert middle[4].narration.annotator == "7" != middle[5].narration.annotator


def test_repeats_and_times_outside_the_take_change_no_gap(tmp_path):
    twice = [description(4, "C lifts the lid."), description(4, "C lifts the lid."), description(4, "C turns the tap.")]
    annotations = {"u1": [by(description(0), *twice, description(-1), description(10.5), description(8))]}
    selection = select(write_release(tmp_path, [take_record("u1")], annotations))
    assert [description.clip_id for description in narrations(selection)] == ["u1/0/0", "u1/0/1", "u1/0/3", "u1/0/6"]
    assert selection.alpha == pytest.approx(8 / 3)  # 0, 4, 4, 8
    assert counts(selection)["narrations", "not repeated"] == (7, 6)
    assert counts(selection)["narrations", "within the take"] == (6, 4)


def test_validation_reuses_the_training_alpha(tmp_path):
    takes = [take_record("u1"), take_record("u2")]
    write_release(tmp_path, takes, {"u1": [by(*(description(t) for t in A))]})
    write_release(tmp_path, takes, {"u2": [by(*(description(t) for t in B))]}, split="val")
    alpha = training_alpha(EgoExo4D(tmp_path))
    assert alpha == select(tmp_path).alpha == 2.0
    val = select(tmp_path, "val", alpha=alpha)
    assert val.alpha == 2.0
    assert lengths(clips_of(val))[1] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="alpha is fitted on 'train' alone: for 'val' pass training_alpha"):
        select(tmp_path, "val")


def test_length_options_reach_the_clips(tmp_path):
    root = write_release(
        tmp_path, [take_record("u1", fps=10)], {"u1": [by(description(2), description(4), description(6))]}
    )
    assert lengths(clips_of(select(root, clip_scale=1.5))) == pytest.approx([1.5] * 3)
    assert lengths(clips_of(select(root, max_clip_s=0.5))) == pytest.approx([0.5] * 3)
    assert lengths(clips_of(select(root, min_clip_s=2.0))) == pytest.approx([2.0] * 3)
    assert lengths(clips_of(select(root, alpha=1e6))) == pytest.approx([0.1] * 3)  # a frame of 10 fps


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
        # The letter as a thing.
        ("C presses the C key with his thumb", "Camera-wearer presses the C key with his thumb."),
        ("C plugs the USB C cable into the camera", "Camera-wearer plugs the USB C cable into the camera."),
        ("C plugs USB C cables into the hub", "Camera-wearer plugs USB C cables into the hub."),
        ("C plugs a type C charger in", "Camera-wearer plugs a type C charger in."),
        ("C sets the oven to 200 \u00b0C", "Camera-wearer sets the oven to 200 \u00b0C."),
        ("C sets the oven to 200 \u00b0 C or 180C", "Camera-wearer sets the oven to 200 \u00b0 C or 180C."),
        ("C cools it to 4 C in the fridge", "Camera-wearer cools it to 4 C in the fridge."),
        ("C heats it to 90 degrees C", "Camera-wearer heats it to 90 degrees C."),
        ("C picks two C clamps and 4 C batteries", "Camera-wearer picks two C clamps and 4 C batteries."),
        ("C looks at the C line of the test", "Camera-wearer looks at the C line of the test."),
        ("C picks a C from the letters", "Camera-wearer picks a C from the letters."),
        ('C writes the letter C, then "C" and (C) again', 'Camera-wearer writes the letter C, then "C" and (C) again.'),
        ("C takes vitamin C tablets", "Camera-wearer takes vitamin C tablets."),
        ("C opens drawer A, B and C", "Camera-wearer opens drawer A, B and C."),
        ("C opens drawer C and closes it", "Camera-wearer opens drawer C and closes it."),
        ("C types A, B, C, D on the keyboard", "Camera-wearer types A, B, C, D on the keyboard."),
        ("C plays C, D and E", "Camera-wearer plays C, D and E."),
        ("C presses the A and C keys", "Camera-wearer presses the A and C keys."),
        ("C writes code in C++ today", "Camera-wearer writes code in C++ today."),
        ("C turns off the A.C in the room", "Camera-wearer turns off the A.C in the room."),
        # The letter as a person.
        ("X points at the key C holds", "X points at the key the camera-wearer holds."),
        ("X, Y and C lift the table", "X, Y and the camera-wearer lift the table."),
        ("A, B and C carry the table", "A, B and the camera-wearer carry the table."),
        ("C and D carry the table", "Camera-wearer and D carry the table."),
        ("C hands a cup to B, C lifts a plate", "Camera-wearer hands a cup to B, the camera-wearer lifts a plate."),
        ("At step 3 C lifts the cup", "At step 3 the camera-wearer lifts the cup."),
        ("X sees that C lifts it", "X sees that the camera-wearer lifts it."),
        ('"C lifts the cup", X says', '"Camera-wearer lifts the cup", X says.'),
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
    record |= {"parent_task_name": "Cooking", "parent_task_id": 1000, "task_name": "Make tea", "validated": True}
    record["frame_aligned_videos"] |= {
        "collage": {"0": stream("collage.mp4")},
        "best_exo": {"0": stream(None)},
        "cam08": {"0": stream(None)},
        "cam09": None,
    }
    next(camera for camera in record["capture"]["cameras"] if camera["cam_id"] == "cam05")["is_ego"] = "1"
    root = write_release(tmp_path, [record], {"u1": [by(description(1), description(2))]})
    folder = "takes/name_u1/frame_aligned_videos/downscaled/448"
    assert select(root).takes[0].group == Group(
        group_id="u1",
        egos=(View("aria02", f"{folder}/aria02_214-1.mp4"),),
        exos=(View("cam01", f"{folder}/cam01.mp4"), View("gp02", f"{folder}/gp02.mp4")),
        duration_s=10.0,
        fps=30.0,
        scenario="Cooking",
        task="Make tea",
        best_exo="gp02",
        validated=True,
    )


@pytest.mark.parametrize("capture", [None, {}, {"cameras": None}, {"cameras": []}])
def test_without_a_camera_list_names_decide(tmp_path, capture):
    record = take_record("u1", aria="Aria03", capture=capture, capture_uid="c1")
    (take,) = select(write_release(tmp_path, [record], {"u1": [by(description(1), description(2))]})).takes
    assert [view.cam for view in take.group.egos] == ["Aria03"]
    assert [view.cam for view in take.group.exos] == ["cam01", "cam02"]


def test_captures_file_decides_where_the_take_has_no_camera_list(tmp_path):
    record = take_record("u1", aria="glasses", exos=("cam01", "aria02"), capture=None, capture_uid="c1")
    root = write_release(tmp_path, [record], {"u1": [by(description(1), description(2))]})
    cameras = [{"cam_id": "glasses", "is_ego": "1"}, {"cam_id": "aria02", "is_ego": False}]
    others = [{"capture_uid": "c0", "cameras": []}, {"capture_uid": "c1", "cameras": cameras}]
    (root / "captures.json").write_text(json.dumps(others))
    (take,) = select(root).takes
    assert [view.cam for view in take.group.egos] == ["glasses"]
    assert [view.cam for view in take.group.exos] == ["aria02", "cam01"]


def test_full_size_videos(tmp_path):
    root = write_release(tmp_path, [take_record("u1")], {"u1": [by(description(1), description(2))]})
    with pytest.raises(
        SourceError, match=r"takes ego video on disk: 0 of 1; fetch the videos, or choose the resolution"
    ):
        select(root, resolution=None)
    for name in ("aria01_214-1.mp4", "cam02.mp4"):
        (root / "takes/name_u1/frame_aligned_videos" / name).write_bytes(b"0")
    (take,) = select(root, resolution=None).takes
    assert take.group.egos[0].path == "takes/name_u1/frame_aligned_videos/aria01_214-1.mp4"
    assert [view.cam for view in take.group.exos] == ["cam02"]


def test_frame_rate_of_the_record(tmp_path):
    root = write_release(tmp_path, [take_record("u1", fps=10)], {"u1": [by(description(1), description(2))]})
    assert select(root).takes[0].group.fps == 10.0


def test_takes_of_no_scenario_are_left_out(tmp_path):
    tasks = {"u1": 1000, "u2": 0, "u3": 3000, "u4": None}
    takes = [take_record(uid, parent_task_id=task) for uid, task in tasks.items()]
    selection = select(write_release(tmp_path, takes, {uid: [by(description(1), description(2))] for uid in tasks}))
    assert [take.group.group_id for take in selection.takes] == ["u1", "u4"]
    assert counts(selection)["takes", "of a scenario"] == (4, 2)


# --- Annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "flag"), [(True, True), (False, False), ("1", True), ("0", False), (1, True)])
def test_flags_as_booleans_and_strings(tmp_path, written, flag):
    annotations = {"u1": [by(description(1, ego_visible=written, unsure=written), description(2), rejected="0")]}
    first = narrations(select(write_release(tmp_path, [take_record("u1")], annotations)))[0]
    assert (first.ego_visible, first.unsure) == (flag, flag)


def test_missing_flags_and_subject(tmp_path):
    annotations = {"u1": [{"descriptions": [{"text": "C lifts a cup", "timestamp": t} for t in (1, 2)]}]}
    first = narrations(select(write_release(tmp_path, [take_record("u1")], annotations)))[0]
    assert (first.subject, first.ego_visible, first.unsure, first.best_exo) == (None, True, False, None)
    assert first.annotator == "0"  # its place


def test_both_spellings_of_subject_and_every_form_of_best_exo(tmp_path):
    other = description(2, narration_subject="O", best_exo={"raw_cam_id": "2", "cam_id": "cam02"})
    del other["subject"]
    annotations = {
        "u1": [by(description(1), other, description(3, best_exo="cam01"), description(4, best_exo={"cam_id": None}))]
    }
    read = narrations(select(write_release(tmp_path, [take_record("u1")], annotations)))
    assert [narration.subject for narration in read] == ["C", "O", "C", "C"]
    assert [narration.best_exo for narration in read] == [None, "cam02", "cam01", None]


@pytest.mark.parametrize("rejected", [True, "1"])
def test_rejected_annotations_are_skipped_unread(tmp_path, rejected):
    annotations = {"u1": [by("not even an object", rejected=rejected), by(description(1), description(3))]}
    selection = select(write_release(tmp_path, [take_record("u1")], annotations))
    assert [narration.clip_id for narration in narrations(selection)] == ["u1/1/0", "u1/1/1"]
    assert counts(selection)["annotations", "not rejected"] == (2, 1)


def test_unknown_takes_are_joined_away(tmp_path):
    annotations = {"ghost": [by("anything")], "u1": [by(description(1), description(2))], "empty": None}
    selection = select(write_release(tmp_path, [take_record("u1"), take_record("u2")], annotations))
    assert [take.group.group_id for take in selection.takes] == ["u1"]
    assert counts(selection)["annotated takes", "listed in takes.json"] == (2, 1)
    assert counts(selection)["takes", "in split train"] == (2, 1)


def test_splits_file_decides_when_present(tmp_path):
    takes = [take_record(uid) for uid in ("u1", "u2", "u3", "u4")]
    annotations = {uid: [by(description(1), description(2))] for uid in ("u1", "u2", "u3")}
    splits = {"train": ["u3", "u1", "ghost", "u4"], "val": ["u2"], "test": []}
    selection = select(write_release(tmp_path, takes, annotations, splits=splits))
    assert [take.group.group_id for take in selection.takes] == ["u1", "u3"]
    assert counts(selection)["takes", "in split train"] == (4, 3)
    assert counts(selection)["takes", "annotated"] == (3, 2)


# --- Errors name the file, the field and the fix ----------------------------------------------------------------------


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere: no such folder; give the Ego-Exo4D release folder"):
        select(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"takes\.json: no such file; fetch it with `egoexo .* --parts metadata`"):
        select(tmp_path)
    write_release(tmp_path, [], {}, split="val")
    with pytest.raises(SourceError, match=r"atomic_descriptions_train\.json: no such file; .* --parts annotations`"):
        select(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b'[{"take_uid": "u1",\n  oops}]', r"line 2, column 3"), (b"", "line 1, column 1"), (b'["\xff"]', "at byte 2")],
)
def test_malformed_json(tmp_path, content, problem):
    (tmp_path / "takes.json").write_bytes(content)
    with pytest.raises(SourceError, match=rf"takes\.json: invalid JSON, .*{problem}.*; correct it there, or fetch it"):
        select(tmp_path)


def broken(**fields: Any) -> Any:
    """A take's annotations whose second annotator's third description lacks the fields given as None, or has others."""
    good = description(3) | fields
    return [
        by(description(1)),
        by(description(1), description(2), {name: value for name, value in good.items() if value is not None}),
    ]


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
    with pytest.raises(SourceError) as caught:
        select(tmp_path)
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
    write_release(root, good, {"u1": [by(description(1), description(2))]})
    (root / "takes.json").write_text(json.dumps(takes))
    with pytest.raises(SourceError) as caught:
        select(root)
    assert str(caught.value).startswith(f"{root / 'takes.json'}: ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith("or fetch a V2 takes.json")


def test_wrong_splits_and_annotations(tmp_path):
    write_release(tmp_path, [take_record("u1")], {"u1": [by(description(1))]}, splits={"val": []})
    with pytest.raises(SourceError, match=r"splits\.json: field split_to_take_uids\.train is missing or null; add it"):
        select(tmp_path)
    (tmp_path / "annotations/splits.json").unlink()
    (tmp_path / "annotations/atomic_descriptions_train.json").write_text("{}")
    with pytest.raises(SourceError, match=r"atomic_descriptions_train\.json: field annotations is missing or null"):
        select(tmp_path)


# --- Real names -------------------------------------------------------------------------------------------------------


def test_real_take_and_stream_names_without_camera_lists(tmp_path):
    """Names and times of 125 real takes (RuipingL/EgoExoMem, CC BY 4.0); 46 of them were worn as aria02 to aria07."""
    file = SAMPLES / "egoexomem_egoexo4d_qa.json"
    if not file.is_file():
        pytest.skip(f"needs {file.name}, a sample that is not part of this repository")
    streams: dict[str, set[str]] = {}
    annotated: dict[str, set[float]] = {}
    for question in json.loads(file.read_text()):
        name, evidence = question["take_name"], question["verification"]
        frames = [Path(frame).stem.rpartition("_")[0] for frame in evidence.get("keyframes") or []]
        streams.setdefault(name, set()).update(frames)
        annotated.setdefault(name, set()).update(float(time_s) for time_s in evidence.get("timestamps") or [])
    takes, annotations = [], {}
    for name, frames in streams.items():
        videos: dict[str, Any] = {}
        for frame in frames:
            file_stem = frame.removeprefix("ego_").removeprefix("exo_")
            videos[file_stem.split("_")[0]] = {"rgb" if "_214-1" in file_stem else "0": stream(f"{file_stem}.mp4")}
        takes.append(take_record(name, frame_aligned_videos=videos, capture=None, duration_sec=1e4))
        annotations[name] = [by(*(description(time_s) for time_s in annotated[name]))]
    selection = select(write_release(tmp_path, takes, annotations))

    assert len(streams) == 125
    groups = [take.group for take in selection.takes]
    assert all(f"ego_{Path(group.egos[0].path).stem}" in streams[group.group_id] for group in groups)
    assert {group.egos[0].cam for group in groups} == {f"aria0{n}" for n in range(1, 8)}
    assert sum(group.egos[0].cam != "aria01" for group in groups) == 46
    assert {view.cam for group in groups for view in group.exos} == {"cam01"}
    clips = clips_of(selection)
    assert all(0 <= clip.start_s <= clip.narration.time_s <= clip.end_s for clip in clips)
    assert len(clips) == sum(map(len, annotated.values()))
