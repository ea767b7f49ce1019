"""Other datasets of pairs: small invented files in the form of the official ones."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from test_clip_stream import make_video, painted
from test_pair_file import pair_batch, shown

from datamodules.ego_exo_clip.build import build_index
from datamodules.ego_exo_clip.index import FilterCounts, read_header
from datamodules.ego_exo_clip.sources.charades_ego import CharadesEgo, action_text
from datamodules.ego_exo_clip.sources.egoexo_fitness import EgoExoFitness
from datamodules.ego_exo_clip.sources.egoexolearn import EgoExoLearn
from datamodules.io.annotations import SourceError


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def read(source):
    counts = FilterCounts()
    takes = list(source.read(counts))
    return takes, {(row["of"], row["filter"]): (row["in"], row["out"]) for row in counts.rows()}


# --------------------------------------------------------------------------------------------------------------------
# Charades-Ego

CHARADES_COLUMNS = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


def charades(root, *rows, split="train"):
    lines = [CHARADES_COLUMNS, *(f"{video},,,,,,,,,{actions},4.0" for video, actions in rows)]
    return write(
        root,
        {
            f"CharadesEgo/CharadesEgo_v1_{split}.csv": "\n".join(lines) + "\n",
            "CharadesEgo/Charades_v1_classes.txt": "c000 Holding some clothes\nc001 Someone is standing up\n",
        },
    )


def test_charades_ego_pairs_the_same_action_of_both_videos(tmp_path, toy_tokenizer):
    charades(
        tmp_path,
        ("AAAAAEGO", "c000 2.0 3.0;c001 0.0 9.0;c000 0.5 0.9;c001 1.0 1.0"),
        ("AAAAA", "c000 0.5 0.9"),
        ("BBBBBEGO", "c001 0.0 1.0"),
        ("CCCCCEGO", ""),
        ("CCCCC", "c001 0.0 1.0"),
    )
    takes, counts = read(CharadesEgo(tmp_path))
    assert [group.group_id for group, _ in takes] == ["AAAAA/c000/0"]
    assert counts["egocentric videos", "with a video of the third person"] == (3, 2)
    assert counts["actions", "in both videos"] == (3, 1)

    charades(tmp_path, ("AAAAAEGO", "c000 2.0 3.0"), ("AAAAA", "c000 0.5 0.9"))
    (tmp_path / "CharadesEgo_v1_480").mkdir()
    make_video(tmp_path / "CharadesEgo_v1_480" / "AAAAAEGO.mp4", 40)
    make_video(tmp_path / "CharadesEgo_v1_480" / "AAAAA.mp4", 20)
    build_index(CharadesEgo(tmp_path), tmp_path / "index", probe_workers=1)
    assert read_header(tmp_path / "index")["synchronised"] is False
    module, batch = pair_batch(tmp_path / "index", tmp_path, toy_tokenizer)
    assert module.synchronised is False
    assert module.train_set.pairs.texts[0] == "Camera-wearer is holding some clothes."
    # 0.4 s around the middle of each: 2.3 to 2.7 s of one, 0.5 to 0.9 s of the other.
    assert (shown(batch.ego_video[0]), shown(batch.exo_video[0])) == ([23, 24, 25, 26], [5, 6, 7, 8])


def test_charades_classes_become_sentences():
    assert action_text("Opening a door") == "Camera-wearer is opening a door."
    assert action_text("Someone is standing up from somewhere") == "Camera-wearer is standing up from somewhere."


@pytest.mark.parametrize("actions", ["c002 0.0 1.0", "c000 0.0", "c000 a b"])
def test_wrong_charades_actions_are_named(tmp_path, actions):
    charades(tmp_path, ("AAAAAEGO", actions))
    with pytest.raises(SourceError, match=rf"_train\.csv line 2: 'actions' holds '{actions}', expected c012 3.50 9.10"):
        read(CharadesEgo(tmp_path))
    with pytest.raises(SourceError, match=r"holds none of CharadesEgo_v1_test\.csv, CharadesEgo/CharadesEgo_v1_test"):
        read(CharadesEgo(tmp_path, "test"))


# --------------------------------------------------------------------------------------------------------------------
# EgoExoLearn

SEGMENTS = "action_anticipation_planning_benchmark/anticpation_annotation/balanced_full_annotation"
SEGMENT_COLUMNS = "video_id,annotation_id,start_sec,end_sec,verb,noun,scenario"


def egoexolearn(root, ego, exo):
    meta = [{"video_uid": uid, "view": uid[:3], "task": task} for uid, task in (("ego1", "t1"), ("exo1", "t1"))]
    meta.append({"video_uid": "exo2", "view": "exo", "task": "t2"})
    files = {"video_meta_downsampled.json": json.dumps(meta)}
    for view, rows in (("ego", ego), ("exo", exo)):
        files[f"{SEGMENTS}/{view}_train_valid.csv"] = "\n".join([SEGMENT_COLUMNS, *rows]) + "\n"
    fine = "video_uid,annotation_id,subset,view,scene,start_sec,end_sec,narration_en,narration_en_hand_prompt,"
    fine += (
        "narration_en_no_hand_prompt\nego1,a1,train,ego,lab,2,4,Take it with your left hand.,The left hand takes it.,"
    )
    files["annotations/fine_annotation_trainval_en.csv"] = fine + "Take it.\n"
    return write(root, files)


def test_egoexolearn_pairs_segments_of_the_same_actions(tmp_path):
    ego = (
        'ego1,a1,2.0,4.0,"[3, 1]",[7],lab',
        'ego1,a2,5.0,6.0,"[3, 1]",[8],lab',
        "ego1,a3,7.0,8.0,[2],[],lab",
    )
    exo = (
        'exo1,b1,10.0,11.0,"[1, 3]",[7],lab',
        'exo1,b2,20.0,21.8,"[3, 1]",[7],lab',
        'exo2,b3,1.0,3.0,"[3, 1]",[7],lab',
        "exo1,b4,30.0,30.5,[2],[],lab",
    )
    egoexolearn(tmp_path, ego, exo)
    takes, counts = read(EgoExoLearn(tmp_path))
    assert [group.group_id for group, _ in takes] == ["a1/b2", "a3/b4"]
    (group, (narration,)), (_, (silent,)) = takes
    assert (group.task, group.lag_s["exo"], narration.text, silent.text) == ("t1", pytest.approx(17.9), "Take it.", "")
    assert narration.span_s == (pytest.approx(2.1), pytest.approx(3.9))
    assert counts["egocentric segments", "with an exocentric one of the same actions"] == (3, 2)
    assert counts["egocentric segments of pairs", "with a text"] == (2, 1)
    assert [group.group_id for group, _ in read(EgoExoLearn(tmp_path, exos=2, text="hand"))[0]][:2] == [
        "a1/b2",
        "a1/b1",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ego9,a1,2.0,4.0,[1],[7],lab", "field 'video_id' is 'ego9', which video_meta_downsampled.json lacks"),
        ("ego1,a1,4.0,4.0,[1],[7],lab", "'start_sec' and 'end_sec' are 4.0 and 4.0: correct them"),
        ("ego1,a1,2.0,4.0,one,[7],lab", r"field 'verb' is 'one', expected \[1, 2\]: correct it"),
    ],
)
def test_wrong_egoexolearn_rows_are_named(tmp_path, row, message):
    egoexolearn(tmp_path, [row], ["exo1,b1,10.0,11.0,[1],[7],lab"])
    with pytest.raises(SourceError, match=rf"ego_train_valid\.csv line 2: {message}"):
        read(EgoExoLearn(tmp_path))


# --------------------------------------------------------------------------------------------------------------------
# EgoExo-Fitness


def fitness(root, judged, views=("ego_l", "ego_m", "exo_l", "exo_m"), frames=12):
    records = [
        {
            "record_id": name,
            "views": list(views),
            "frames": {view: {"path": f"frames_open/{name}/{view}", "num_frames": frames} for view in views},
        }
        for name in ("AAAAAA", "BBBBBB")
    ]
    subsets = {"AAAAAA_4-3-1_ego_m": {"subset": "train"}, "BBBBBB_4-3-1_ego_m": {"subset": "test"}}
    files = {
        "meta_records.json": {"records": records},
        "substep_level_annotations.json": {"classes": [], "database": subsets},
        "interpretable_action_judgement.json": judged,
    }
    return write(root, {name: json.dumps(content) for name, content in files.items()})


def judgement(start, end, *comments):
    named = [{"action_name": "Push-ups", "comment": text, "annotator": f"F{n}"} for n, text in enumerate(comments)]
    return {"annotations": named, "st_ed_frame": [start, end], "frame_root": "frames_open/AAAAAA"}


def test_egoexo_fitness_pairs_frames_of_all_views(tmp_path, toy_tokenizer):
    judged = {
        "AAAAAA_action_1": judgement(4, 8, "Back straight.", "Too fast."),
        "BBBBBB_action_1": judgement(0, 9, "A"),
    }
    fitness(tmp_path, judged)
    takes, counts = read(EgoExoFitness(tmp_path))
    assert counts["records", "in subset train"] == (2, 1)
    ((group, (narration,)),) = takes
    assert ([view.cam for view in group.egos], [view.cam for view in group.exos]) == (
        ["ego_m", "ego_l"],
        ["exo_l", "exo_m"],
    )
    assert (narration.text, narration.span_s) == ("Camera-wearer does push-ups.", (4 / 30, 8 / 30))
    ((_, comments),) = read(EgoExoFitness(tmp_path, text="comment"))[0]
    assert [each.text for each in comments] == ["Back straight.", "Too fast."]

    for view in ("ego_m", "exo_l"):
        (tmp_path / "frames_open/AAAAAA" / view).mkdir(parents=True)
        for number in range(12):
            image = Image.fromarray(painted(number, 96, 96))
            image.save(tmp_path / "frames_open/AAAAAA" / view / f"frame_{number + 1:010d}.jpg")
    header = build_index(EgoExoFitness(tmp_path), tmp_path / "index", probe_workers=1)
    assert (header["clips"], header["pairs"], "synchronised" in header) == (1, 1, False)
    _, batch = pair_batch(tmp_path / "index", tmp_path, toy_tokenizer)
    assert shown(batch.ego_video[0]) == shown(batch.exo_video[0]) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ({"AAAAAA_action_1": judgement(8, 8, "A")}, r"'st_ed_frame' is \[8, 8\], expected start < end: correct it"),
        ({"AAAAAA_action_1": judgement("8", 9, "A")}, r"'st_ed_frame' is \['8', 9\], expected two frames: correct it"),
        ({"AAAAAA_action_1": judgement(8, 9)}, r"'annotations' is \[\], expected a list: correct it"),
    ],
)
def test_wrong_fitness_judgements_are_named(tmp_path, judged, message):
    with pytest.raises(SourceError, match=rf"_judgement\.json AAAAAA_action_1: field {message}"):
        read(EgoExoFitness(fitness(tmp_path, judged)))
