"""The eight benchmarks: counts and oddities of the official files, every trap, and errors of invalid files.

Real files are read in place, next to the repository, and never copied; all others are invented.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.egobench import BENCHMARKS, load
from datamodules.egobench.samples import Clip
from datamodules.io.annotations import SourceError
from datamodules.io.jsonl import InvalidRecords

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLES = SHARED / "samples" / "benchmarks"


def official_files(name):
    if not (SAMPLES / name).exists():
        pytest.skip(f"needs the official files in {SAMPLES / name}, which are not part of the repository")
    return SAMPLES / name


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return file


def read(name, annotations, **options):
    return load({"name": name, "annotations": str(annotations), "videos": "videos", **options})


def problem(name, annotations, **options):
    """Return the error of invalid files."""
    with pytest.raises((SourceError, InvalidRecords)) as raised:
        read(name, annotations, **options)
    return str(raised.value)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def test_the_names_are_those_of_the_paper_and_their_kin():
    assert {name: kind.task for name, kind in BENCHMARKS.items()} == {
        "egoschema": "choice",
        "qaego4d_closed": "choice",
        "qaego4d_open": "open",
        "egotaskqa_direct": "vocabulary",
        "egotaskqa_indirect": "vocabulary",
        "charades_ego": "rank_texts",
        "epic100_mir": "rank_texts",
        "egoplan": "choice",
        "vlnqa": "choice",
        "egomcq": "rank_clips",
        "egoplan_test": "choice",
        "egoplan2": "choice",
        "egotaskqa_mcq": "choice",
        "egoexomem_egoexo4d": "cross_view",
        "egoexomem_lemma": "cross_view",
        "egoexobench": "choice",
    }


# --------------------------------------------------------------------------------------------------------------------
# EgoSchema


def schema_rows(names):
    options = {f"option {n}": f"fixing\n bicycle {n}" for n in range(5)}
    return [{"q_uid": name, "google_drive_id": "x", "question": " What is C  doing?", **options} for name in names]


@pytest.fixture
def egoschema(tmp_path):
    write(tmp_path / "questions.json", schema_rows("abc"))
    write(tmp_path / "subset_answers.json", {"b": 4, "c": 0})
    span = {"video_uid": "v-1", "starting_sec": 240, "ending_sec": 420}
    write(tmp_path / "uid_to_ego4d.json", {name: span for name in "abc"})
    return tmp_path


def test_egoschema_of_whole_files(egoschema):
    loaded = read("egoschema", egoschema)
    first, second, third = loaded.samples
    assert (first.id, first.text, first.answer, first.groups) == ("a", "What is C doing?", None, ())
    assert first.options == tuple(f"fixing bicycle {n}" for n in range(5))
    assert (second.answer, third.answer, second.groups) == (4, 0, ("subset",))
    assert first.clips == (Clip("a.mp4", 0.0, math.inf),)
    assert loaded.notes == [
        "egoschema: 5,028 of 5,031 samples are missing: fetch the file again",
        "egoschema: 498 of 500 public answers are missing: fetch the file again",
    ]
    assert [sample.id for sample in loaded.fast().samples] == ["b", "c"]
    assert [sample.id for sample in read("egoschema", egoschema, part="subset").samples] == ["b", "c"]


def test_egoschema_cut_out_of_ego4d(egoschema):
    assert read("egoschema", egoschema / "questions.json", cut=True).samples[2].clips == (
        Clip("v-1.mp4", 240.0, 420.0),
    )
    write(egoschema / "uid_to_ego4d.json", {"a": {"video_uid": "v", "starting_sec": 9, "ending_sec": 9}, "b": 3})
    message = problem("egoschema", egoschema, cut=True)
    assert "uid_to_ego4d.json: a: 'starting_sec' and 'ending_sec' give 9 to 9 s: correct them" in message
    assert "uid_to_ego4d.json: field 'b' is 3, expected a JSON object" in message
    assert "field 'c' is None" in message


def test_real_spans_of_egoschema(tmp_path):
    answers = json.loads((official_files("egoschema") / "subset_answers.json").read_text())
    spans = json.loads((official_files("egoschema") / "uid_to_ego4d.json").read_text())
    for name, content in (("subset_answers", answers), ("uid_to_ego4d", spans), ("questions", schema_rows(spans))):
        write(tmp_path / f"{name}.json", content)
    loaded = read("egoschema", tmp_path, cut=True)
    assert loaded.notes == []
    assert {sample.clips[0].end_s - sample.clips[0].start_s for sample in loaded.samples} == {180.0}
    assert len({sample.clips[0].video for sample in loaded.samples}) == 1_981
    assert Counter(sample.answer for sample in loaded.fast().samples) == {0: 101, 1: 108, 2: 91, 3: 83, 4: 117}
    assert sum(sample.answer is None for sample in loaded.samples) == 5_031 - 500


def test_egoschema_refuses_early_and_wrong_files(egoschema):
    early = [without(row, "question") for row in schema_rows("a")]
    write(egoschema / "old" / "questions.json", early)
    message = problem("egoschema", egoschema / "old" / "questions.json")
    assert message.endswith(
        "questions.json: rows without 'question': this is an early version, fetch the one of 5,031 rows"
    )
    write(egoschema / "subset_answers.json", {"b": 5})
    assert "subset_answers.json: the answer of b is 5, expected 0 to 4" in problem("egoschema", egoschema)
    write(egoschema / "subset_answers.json", {"b": True})
    assert "the answer of b is True" in problem("egoschema", egoschema)
    write(egoschema / "subset_answers.json", {})
    write(egoschema / "questions.json", [*schema_rows("aa"), {**schema_rows("c")[0], "option 3": ""}])
    message = problem("egoschema", egoschema)
    assert "questions.json entry 3: field 'option 3' is '', expected a text" in message
    assert "egoschema: 'a' is the id of several samples: give each its own" in message
    (egoschema / "questions.json").unlink()
    assert "holds none of questions.json: put EgoSchema's questions there" in problem("egoschema", egoschema)


def test_egoschema_writes_what_kaggle_and_the_authors_take(egoschema):
    files = read("egoschema", egoschema).submission({"c": 2, "a": 1, "b": 0})
    assert files["submission.csv"] == "q_uid,answer\na,1\nb,0\nc,2\n"
    assert json.loads(files["submission.json"]) == {"a": 1, "b": 0, "c": 2}
    with pytest.raises(
        ValueError, match=r"^egoschema: 2 of 3 samples have no option chosen, such as b: a server takes all"
    ):
        read("egoschema", egoschema).submission({"a": 1, "b": 5})
    assert read("egoschema", egoschema, part="subset").submission({"b": 0, "c": 2}) == {}
    assert read("egoschema", egoschema, limit=2).submission({"a": 1, "b": 0, "c": 2}) == {}


# --------------------------------------------------------------------------------------------------------------------
# QAEgo4D


def qa_row(name="ab12_3", **changes):
    moment = {"moment_start_frame": 900, "moment_end_frame": 1020}
    asked = {"sample_id": name, "video_id": "clip-9", "question": "Where is the red mug?", "answer": "on the sink"}
    return {**asked, "wrong_answers": ["in the oven", "on the floor", "in the bag"], **moment, **changes}


def test_qaego4d_closed_orders_options_by_the_id_alone(tmp_path):
    rows = [qa_row(f"q_{number}") for number in range(200)]
    file = write(tmp_path / "annotations.QaEgo4D_test_close.json", rows)
    samples = read("qaego4d_closed", tmp_path).samples
    assert all(sample.options[sample.answer] == "on the sink" and len(set(sample.options)) == 4 for sample in samples)
    assert all(Counter(sample.answer for sample in samples)[letter] > 30 for letter in range(4))  # about as often
    write(file, rows[::-1])
    assert sorted(read("qaego4d_closed", tmp_path).samples, key=lambda sample: int(sample.id[2:])) == samples
    assert samples[0].clips == (Clip("clip-9.mp4", 0.0, math.inf),)  # all of it, not the moment


def test_qaego4d_closed_reports_questions_without_a_single_right_option(tmp_path):
    twice = qa_row("b", wrong_answers=["On the sink", "on the floor", "in the bag"])
    write(tmp_path / "annotations.QaEgo4D_test_close.json", [qa_row("a"), twice])
    loaded = read("qaego4d_closed", tmp_path)
    assert loaded.notes == ["qaego4d_closed: 1 questions whose four options are not all different"]
    assert loaded.samples[1].options[loaded.samples[1].answer] == "on the sink"
    write(tmp_path / "annotations.QaEgo4D_test_close.json", [qa_row(wrong_answers=["x", "y"])])
    assert (
        "test_close.json entry 1: field 'wrong_answers' is ['x', 'y'], expected three texts: take the file"
        in problem("qaego4d_closed", tmp_path)
    )


def nlq(*queries):
    asked = [{"annotation_uid": "ab12", "language_queries": [{"query": query} for query in queries]}]
    clip = {"clip_uid": "clip-9", "video_start_sec": 30.5, "video_end_sec": 510.5, "annotations": asked}
    return {"videos": [{"video_uid": "v-1", "clips": [clip]}]}


def test_qaego4d_open_in_each_of_its_forms(tmp_path):
    merged = write(tmp_path / "a" / "annotations.test.json", [qa_row()])
    ground = {"video_uid": "v-2", "video_start_sec": 1.0, "video_end_sec": 481.0}
    grounded = write(tmp_path / "b" / "annotations.QaEgo4D_test.json", [qa_row(**ground)])
    answers = {"train": {}, "test": {"ab12_1": "on, the\n sink"}}
    original = write(tmp_path / "c" / "answers.json", answers)
    write(tmp_path / "c" / "nlq_val.json", nlq(None, "Where, again,\nis the mug?"))
    (sample,) = read("qaego4d_open", merged.parent).samples
    assert (sample.text, sample.answer, sample.options) == ("Where is the red mug?", "on the sink", ())
    assert sample.clips == (Clip("clip-9.mp4", 0.0, math.inf),)
    assert read("qaego4d_open", grounded, cut=True).samples[0].clips == (Clip("v-2.mp4", 1.0, 481.0),)
    (sample,) = read("qaego4d_open", original.parent).samples
    assert (sample.id, sample.text, sample.answer) == ("ab12_1", "Where again is the mug?", "on the sink")
    assert sample.clips == (Clip("clip-9.mp4", 0.0, math.inf),)
    assert read("qaego4d_open", original, cut=True).samples[0].clips == (Clip("v-1.mp4", 30.5, 510.5),)
    other = str(original.parent / "nlq_val.json")
    assert read("qaego4d_open", merged, cut=True, nlq=other).samples[0].clips == (Clip("v-1.mp4", 30.5, 510.5),)


def test_qaego4d_names_the_problem(tmp_path):
    file = write(tmp_path / "annotations.test.json", [qa_row(), qa_row("b", answer=" "), qa_row("c", video_uid="v")])
    message = problem("qaego4d_open", tmp_path, cut=True)
    assert "entry 1: the place of clip clip-9 in its recording is unknown: set nlq to nlq_val.json" in message
    assert "entry 3: field 'video_start_sec' is None, expected a number" in message
    assert f"{file} entry 2: field 'answer' is ' ', expected a text" in problem("qaego4d_open", tmp_path)
    backwards = {"video_uid": "v", "video_start_sec": 5, "video_end_sec": 5}
    write(file, [qa_row(**backwards)])
    assert "clip clip-9 goes from 5 to 5 s" in problem("qaego4d_open", tmp_path, cut=True)
    file.unlink()
    write(tmp_path / "answers.json", {"test": {"ab12_0": "x", "ab12_7": "x"}})
    assert "holds none of nlq_val.json: put Ego4D's nlq_val.json of version 1" in problem("qaego4d_open", tmp_path)
    write(tmp_path / "nlq_val.json", nlq("Where?"))
    message = problem("qaego4d_open", tmp_path)
    assert "answers.json ab12_7: no such query in" in message
    assert "ab12_0" not in message
    write(tmp_path / "nlq_val.json", {"videos": [{"video_uid": "v", "clips": 3}]})
    assert "field 'clips' is no list of JSON objects: give Ego4D's nlq_val.json" in problem("qaego4d_open", tmp_path)
    write(tmp_path / "answers.json", {"val": {}})
    assert "answers.json: field 'test' is missing" in problem("qaego4d_open", tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# EgoTaskQA


def task_row(answer="clean", reference="direct", **changes):
    return {
        **{"interval": "9z-1-1-1|fpv1|480|960", "question": "What is the status of cup?", "answer": answer},
        **{"type": ["state"], "category": ["descriptive"], "semantic": "change", "structural": "query"},
        **{"reference": reference, "reasoning_type": f"state$descriptive$change$query${reference}", **changes},
    }


@pytest.fixture
def egotaskqa(tmp_path):
    train = [task_row(answer) for answer in ("wet", "clean", "wet", "yes")]
    for split, asked in (
        ("direct", [task_row(), task_row("yes", "indirect")]),
        ("indirect", [task_row("oily", "action")]),
    ):
        write(tmp_path / split / "train_qas.json", train)
        write(tmp_path / split / "test_qas.json", asked)
    return tmp_path


def test_egotaskqa_ranks_the_answers_of_the_training_file(egotaskqa):
    loaded = read("egotaskqa_direct", egotaskqa)
    assert [text.text for text in loaded.candidates] == ["wet", "clean", "yes"]
    first, second = loaded.samples
    assert (first.answer, first.options, first.text) == ("clean", (), "What is the status of cup?")
    assert first.clips == (Clip("9z-1-1-1|fpv1|480|960.mp4", 0.0, math.inf),)
    assert first.groups == ("direct", "open", "state", "descriptive", "change", "query")
    assert second.groups[:2] == ("indirect", "binary")
    assert loaded.notes == []
    (sample,) = read("egotaskqa_indirect", egotaskqa).samples
    assert sample.groups[:2] == ("indirect", "open")
    (note,) = read("egotaskqa_indirect", egotaskqa).notes
    assert note.startswith("egotaskqa_indirect: 1 questions whose answer no training question has")


def test_egotaskqa_joins_its_kinds_where_they_are_not_joined(egotaskqa):
    row = without(without(task_row(), "reasoning_type"), "reference")
    write(egotaskqa / "direct" / "test_qas.json", [{**row, "type": ["state", "direct"]}])
    (sample,) = read("egotaskqa_direct", egotaskqa / "direct").samples
    assert sample.groups == ("direct", "open", "state", "descriptive", "change", "query")


def test_egotaskqa_takes_the_encoded_files_of_the_baselines(egotaskqa):
    for part in ("train", "test"):
        file = egotaskqa / "direct" / f"{part}_qas.json"
        file.rename(file.with_name(f"formatted_{part}_qas_encode.json"))
    assert len(read("egotaskqa_direct", egotaskqa).samples) == 2


def test_egotaskqa_does_not_take_one_split_for_the_other(egotaskqa):
    message = problem("egotaskqa_indirect", egotaskqa / "direct")
    assert "references are direct and indirect, so this is not the test file of indirect: give that folder" in message
    message = problem("egotaskqa_direct", egotaskqa / "indirect")
    assert "references are indirect, so this is not the test file of direct: give that folder, not indirect" in message


@pytest.mark.parametrize("interval", ["9z|fpv1|480", "9z|fpv1|960|480", "9z|cam1|1|2", "../9z|fpv1|1|2"])
def test_egotaskqa_intervals_are_names_of_files(egotaskqa, interval):
    write(egotaskqa / "direct" / "test_qas.json", [task_row(interval=interval)])
    message = problem("egotaskqa_direct", egotaskqa)
    assert f"entry 1: field 'interval' is {interval!r}, expected <take>|fpv<n>|<start>|<end>" in message


def test_the_choices_of_egotaskqa_are_reported_to_leak_and_not_mistaken_for_it(egotaskqa):
    row = {"q": "Is it?", "video_path": "9z-1|P1|4|9.mp4", "a": "B", "option": {"A": "no", "B": "yes"}}
    file = write(egotaskqa / "egotaskqa_mcq.json", [row])
    loaded = read("egotaskqa_mcq", egotaskqa)
    assert (loaded.samples[0].options, loaded.samples[0].answer, loaded.samples[0].groups) == (
        ("no", "yes"),
        1,
        ("binary",),
    )
    assert "its options reveal the answer" in loaded.notes[-1]
    assert "never train on it" in loaded.notes[-1]
    message = problem("egotaskqa_direct", file)
    assert message == f"{file}: this is the version of five options: name it egotaskqa_mcq instead"
    file = write(egotaskqa / "egotaskqa_mcq.json", [{**row, "a": "C"}])
    assert "entry 1: answer 'C' of options {'A': 'no', 'B': 'yes'}" in problem("egotaskqa_mcq", file)


def test_real_choices_of_egotaskqa():
    loaded = read("egotaskqa_mcq", official_files("egotaskqa"))
    assert len(loaded.samples) == 8_783
    assert len(loaded.notes) == 1  # 8,783 and 2,128 videos, as they should be
    assert all(len(sample.options) == 5 for sample in loaded.samples)
    assert sum("binary" in sample.groups for sample in loaded.samples) == 2_698
    assert len({sample.options[sample.answer] for sample in loaded.samples}) == 895
    first = loaded.samples[0]
    assert first.clips[0].video == "27k-22-11-2|P1|4546|4986.mp4"
    assert first.options[first.answer] == "on top of plate"


def test_videos_with_bars_in_their_names_are_found(egotaskqa):
    loaded = load({"name": "egotaskqa_direct", "annotations": str(egotaskqa), "videos": str(egotaskqa / "qa_videos")})
    assert loaded.missing() == dict.fromkeys(("000001", "000002"), "9z-1-1-1|fpv1|480|960.mp4")
    write(egotaskqa / "qa_videos" / "9z-1-1-1|fpv1|480|960.mp4", "")
    assert loaded.missing() == {}


# --------------------------------------------------------------------------------------------------------------------
# Charades-Ego

COLUMNS = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length,charades_video"


def charades(folder, *rows, classes=157, file="CharadesEgo_v1_test_only1st.csv"):
    write(folder / "Charades_v1_classes.txt", "".join(f"c{n:03d} Doing thing {n}\n" for n in range(classes)))
    lines = [f'{name},S1,Kitchen,5,6,Yes,"A cup, a ""plate""",cup,"One, two.",{acts},28.5,X' for name, acts in rows]
    write(folder / file, "\r\n".join([COLUMNS, *lines]) + "\r\n")
    return folder


def test_charades_ego_labels_each_class_once(tmp_path):
    rows = [("AB1EGO", "c012 3.50 9.10;c045 0.00 22.00;c012 11.00 12.00"), ("AB2EGO", "")]
    loaded = read("charades_ego", charades(tmp_path, *rows))
    assert [sample.labels for sample in loaded.samples] == [{"classes": [12, 45]}, {"classes": []}]
    assert loaded.samples[0].clips == (Clip("AB1EGO.mp4", 0.0, math.inf),)
    assert [text.labels for text in loaded.candidates] == [{"class": number} for number in range(157)]
    assert loaded.candidates[45].text == "Doing thing 45"
    assert loaded.notes == ["charades_ego: 1 videos without an action, which do not count"]
    assert loaded.fast().candidates == loaded.candidates


def test_charades_ego_names_the_problem(tmp_path):
    charades(tmp_path, ("AB1EGO", "c157 1.0 2.0"), ("AB2EGO", "c001 1.0"), ("AB3", ""))
    message = problem("charades_ego", tmp_path)
    assert "only1st.csv line 2: 'actions' is 'c157 1.0 2.0', expected c012 3.50 9.10;... of 157: correct it" in message
    assert "line 3: 'actions' is 'c001 1.0'" in message
    wrong_person = "line 4: video AB3 is not of the first person: give CharadesEgo_v1_test_only1st.csv, or another view"
    assert wrong_person in message
    message = problem("charades_ego", charades(tmp_path / "b", ("AB1EGO", "c156 1.0 2.0"), classes=156))
    assert "'actions' is 'c156 1.0 2.0', expected c012 3.50 9.10;... of 156: correct it" in message
    gap = charades(tmp_path / "gap", ("AB1EGO", ""))
    classes = gap / "Charades_v1_classes.txt"
    classes.write_text(classes.read_text().replace("c007", "c008", 1))
    assert "Charades_v1_classes.txt: expected lines 'c000 ...', 'c001 ...' and so on" in problem("charades_ego", gap)
    other = str(tmp_path / "Charades_v1_classes.txt")
    file = write(tmp_path / "c" / "x.csv", "id,length\nAB1EGO,3\n")
    message = problem("charades_ego", file, classes=other)
    assert "x.csv: column actions is missing: fetch the official file again" in message
    file = write(tmp_path / "c" / "x.csv", "id,actions\nAB1EGO\n")
    assert "x.csv line 2: 1 cells under 2 columns: fix this line" in problem("charades_ego", file, classes=other)
    assert "no such file: correct classes" in problem(
        "charades_ego", charades(tmp_path / "d", ("AB1EGO", "")), classes="nowhere.txt"
    )


@pytest.mark.parametrize(
    ("file", "view", "videos", "present", "bits", "empty"),
    [
        ("CharadesEgo_v0_egocentric_test.csv", "first", 103, 154, 859, 0),
        ("CharadesEgo_v0_test.csv", "third", 2_043, 157, 16_285, 229),
    ],
)
def test_real_charades_ego(tmp_path, file, view, videos, present, bits, empty):
    official = official_files("charades_ego") / file
    charades(tmp_path)
    loaded = read("charades_ego", official, view=view, classes=str(tmp_path / "Charades_v1_classes.txt"))
    classes = [sample.labels["classes"] for sample in loaded.samples]
    assert (len(classes), sum(map(len, classes)), classes.count([])) == (videos, bits, empty)
    assert len({number for numbers in classes for number in numbers}) == present
    assert loaded.notes[-1] == "charades_ego: labels are of version 0, published scores of version 1"
    with official.open(newline="") as lines:
        assert [sample.id for sample in loaded.samples] == [row["id"] for row in csv.DictReader(lines)]


# --------------------------------------------------------------------------------------------------------------------
# EPIC-KITCHENS-100


def mir(folder, **changes):
    row = {
        **{"narration_id": "P01_11_0", "participant_id": "P01", "video_id": "P01_11", "start_timestamp": "01:02:03.50"},
        **{"stop_timestamp": "01:02:05.25", "start_frame": "1", "stop_frame": "2", "narration": "take plate, cup"},
        **{"verb_class": "3", "all_noun_classes": "[5, 2, 5]", **changes},
    }
    with write(folder / "EPIC_100_retrieval_test.csv", "").open("w", newline="") as out:
        table = csv.DictWriter(out, list(row))
        table.writeheader()
        table.writerow(row)
    write(folder / "EPIC_100_retrieval_test_sentence.csv", "narration_id,narration\nP01_11_0,another text\n")
    return folder


def test_mir_cuts_by_time_and_takes_captions_from_the_clips(tmp_path):
    loaded = read("epic100_mir", mir(tmp_path))
    (sample,), (text,) = loaded.samples, loaded.candidates
    assert sample.clips == (Clip("P01/P01_11.MP4", 3723.5, 3725.25),)
    assert sample.labels == text.labels == {"verb": 3, "nouns": [2, 5]}
    assert (sample.text, text.text, text.of) == ("", "take plate, cup", "P01_11_0")
    elsewhere = read("epic100_mir", tmp_path, file="{participant}/videos/{video}.mp4").samples[0]
    assert elsewhere.clips[0].video == "P01/videos/P01_11.mp4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_timestamp": "62:03"}, "line 2: column 'start_timestamp' is '62:03', expected hh:mm:ss.ff"),
        ({"stop_timestamp": "01:02:03.50"}, "line 2: from 3723.5 to 3723.5 s: correct its timestamps"),
        ({"all_noun_classes": "['cup']"}, "line 2: column 'all_noun_classes' is \"['cup']\", expected a list such as"),
        ({"all_noun_classes": "open('x')"}, "line 2: column 'all_noun_classes' is"),
        ({"all_noun_classes": "[]"}, "line 2: column 'all_noun_classes' is '[]'"),
        ({"verb_class": "1.5"}, "line 2: field 'verb_class' is 1.5, expected a whole number from 0"),
        ({"narration_id": "P01_11_9"}, "line 2: narration_id 'P01_11_0' is not in EPIC_100_retrieval_test.csv"),
    ],
)
def test_mir_names_the_problem(tmp_path, changes, message):
    assert message in problem("epic100_mir", mir(tmp_path, **changes))


def test_mir_slots_of_a_file(tmp_path):
    message = problem("epic100_mir", mir(tmp_path), file="{kitchen}.mp4")
    assert message == "file: got '{kitchen}.mp4', allowed slots: {participant}, {video}"


def test_real_mir():
    loaded = read("epic100_mir", official_files("epic100_mir"))
    assert loaded.notes == []  # 9,668 clips of 138 videos and 3,842 captions
    lengths = np.array([sample.clips[0].end_s - sample.clips[0].start_s for sample in loaded.samples])
    found = np.median(lengths), lengths.mean(), lengths.min(), lengths.max()
    np.testing.assert_allclose(found, (1.96, 3.7, 0.5, 147), rtol=0.03)
    with (official_files("epic100_mir") / "EPIC_100_retrieval_test_sentence.csv").open(newline="") as lines:
        sentences = list(csv.DictReader(lines))
    assert [text.of for text in loaded.candidates] == [row["narration_id"] for row in sentences]
    shifted = {t.of: t.text for t, row in zip(loaded.candidates, sentences, strict=True) if t.text != row["narration"]}
    assert len(shifted) == 6
    assert shifted["P22_04_144"] == "cut slice"
    assert shifted.keys() <= {row["narration_id"] for row in sentences[-7:]}


def test_real_mir_relevance_and_its_fast_part():
    if not (golden := SHARED / "golden" / "metrics_golden.npz").exists():
        pytest.skip(f"needs the reference values in {golden}, which are not part of the repository")
    loaded = read("epic100_mir", official_files("epic100_mir"))
    with np.load(golden, allow_pickle=False) as values:
        rows = {sample.id: number for number, sample in enumerate(loaded.samples)}
        assert [rows[text.of] for text in loaded.candidates] == values["ekreal_caption_row"].tolist()
        fast = loaded.fast()
        assert [rows[sample.id] for sample in fast.samples] == values["ekreal_rows"].tolist()
        assert fast.candidates == [loaded.candidates[column] for column in values["ekreal_cols"].tolist()]
        assert (len(fast.samples), len(fast.candidates), fast.total) == (400, 232, 9_668)

        def relevance(a, b):
            ours, theirs = set(a["nouns"]), set(b["nouns"])
            return 0.5 * (a["verb"] == b["verb"]) + 0.5 * len(ours & theirs) / len(ours | theirs)

        found = [[relevance(sample.labels, text.labels) for text in fast.candidates] for sample in fast.samples]
        np.testing.assert_allclose(found, values["ekreal_sub_relevancy"], atol=1e-6)


def test_real_frames_of_epic_kitchens_are_sixty_a_second_whatever_the_video_has():
    """EgoPlan's frames are numbers of the same extracted frames, so they are not divided by the video's rate."""
    with (official_files("epic100_mir") / "EPIC_100_video_info.csv").open(newline="") as lines:
        rates = {row["video_id"]: float(row["fps"]) for row in csv.DictReader(lines)}
    loaded = read("epic100_mir", official_files("epic100_mir"))
    with (official_files("epic100_mir") / "EPIC_100_retrieval_test.csv").open(newline="") as lines:
        frames = {row["narration_id"]: int(row["stop_frame"]) for row in csv.DictReader(lines)}
    clips = [(sample.clips[0], frames[sample.id]) for sample in loaded.samples]
    late = [(rates[Path(clip.video).stem], frame, clip.end_s) for clip, frame in clips if clip.end_s > 120]
    assert {round(rate) for rate, _, _ in late} == {30, 48, 60, 90}
    assert max(abs(frame - 60 * end_s) for _, frame, end_s in late) <= 1
    # at the rate of the file, and for most videos that is close to 60, a frame would be shown late
    assert min(frame / rate - end_s for rate, frame, end_s in late if rate < 60) > 0.1


# --------------------------------------------------------------------------------------------------------------------
# EgoPlan


def plan_row(**changes):
    steps = [{"narration_text": "take bag", "start_frame": s, "stop_frame": s + 60} for s in (601, 301, 900)]
    return {
        **{"sample_id": 9, "video_source": "Ego4D", "video_id": "u-1", "task_goal": "wash the car"},
        **{
            "question": "What next?",
            "choice_a": "rinse wheel",
            "choice_b": "dry",
            "choice_c": "wax",
            "choice_d": "stop",
        },
        **{
            "golden_choice_idx": "C",
            "answer": "wax",
            "current_observation_frame": 2400,
            "task_progress_metadata": steps,
        },
        **changes,
    }


def egoplan(folder, *rows, file="EgoPlan_validation.json"):
    write(folder / file, list(rows))
    return folder


def test_egoplan_ends_with_the_observation(tmp_path):
    (sample,) = read("egoplan", egoplan(tmp_path, plan_row())).samples
    assert (sample.id, sample.answer, sample.groups, sample.text) == ("Ego4D_9", 2, ("Ego4D",), "What next?")
    assert sample.options == ("rinse wheel", "dry", "wax", "stop")
    (clip,) = sample.clips
    assert clip == Clip("u-1.mp4", 301 / 30, 80.0, last_at_end=True)


@pytest.mark.parametrize(("video", "fps"), [("P01_13", 60), ("P04_101", 50)])
def test_egoplan_counts_frames_of_epic_kitchens_as_its_authors_did(tmp_path, video, fps):
    row = plan_row(video_source="EpicKitchens", video_id=video, current_observation_frame=1801)
    (sample,) = read("egoplan", egoplan(tmp_path, row)).samples
    assert sample.clips == (Clip(f"{video[:3]}/{video}.MP4", 300 / fps, 1800 / fps, last_at_end=True),)
    (sample,) = read("egoplan", tmp_path, epic_file="epic/{participant}/{video}.mp4").samples
    assert sample.clips[0].video == f"epic/{video[:3]}/{video}.mp4"
    (sample,) = read("egoplan", egoplan(tmp_path, without(row, "video_source"))).samples  # the files of before
    assert (sample.id, sample.clips[0].end_s) == ("9", 1800 / fps)


@pytest.mark.parametrize("steps", [None, [], [{"start_frame": 2400, "stop_frame": 2500}]])
def test_egoplan_without_a_past_shows_a_little_of_it(tmp_path, steps):
    loaded = read("egoplan", egoplan(tmp_path, plan_row(task_progress_metadata=steps)))
    assert loaded.samples[0].clips == (Clip("u-1.mp4", 76.0, 80.0, last_at_end=True),)
    assert loaded.notes == [
        "egoplan: 3,354 of 3,355 samples are missing: fetch the file again",
        "egoplan: 1 questions without a known step before the observation, which show the 4 s before it",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice_b": "wax"}, "choices are ['rinse wheel', 'wax', 'wax', 'stop'], expected four different ones"),
        ({"answer": "dry"}, "answer is 'dry', but choice C 'wax': correct one"),
        ({"golden_choice_idx": "E"}, "field 'golden_choice_idx' is 'E', expected A to D"),
        ({"golden_choice_idx": "N/A"}, "field 'golden_choice_idx' is 'N/A', expected A to D"),
        ({"video_source": "EPIC"}, "field 'video_source' is 'EPIC', expected Ego4D or EpicKitchens"),
        ({"video_source": "EpicKitchens"}, "field 'video_id' is 'u-1', no video of EpicKitchens"),
        ({"video_id": "P01_13"}, "field 'video_id' is 'P01_13', no video of Ego4D"),
        ({"current_observation_frame": -1}, "field 'current_observation_frame' is -1, expected a whole number from 0"),
        ({"task_progress_metadata": [{"stop_frame": 3}]}, "field 'start_frame' is None, expected a number"),
        ({"sample_id": None}, "field 'sample_id' is None, expected a number"),
        ({"task_progress_metadata": 3}, "field 'task_progress_metadata' is 3, expected a list"),
    ],
)
def test_egoplan_names_the_problem(tmp_path, changes, message):
    error = problem("egoplan", egoplan(tmp_path, plan_row(), plan_row(**{"sample_id": 10, **changes})))
    assert f"EgoPlan_validation.json entry 2: {message}" in error


def test_egoplan_test_hides_its_answers_and_writes_what_the_server_takes(tmp_path):
    rows = [without(without(plan_row(sample_id=n), "answer"), "golden_choice_idx") for n in (0, 1)]
    loaded = read("egoplan_test", egoplan(tmp_path, *rows, file="EgoPlan_test.json"))
    assert [(sample.id, sample.answer) for sample in loaded.samples] == [("0", None), ("1", None)]
    written = json.loads(loaded.submission({"1": 3, "0": 0})["submission.json"])
    assert written == [{"sample_id": 0, "label": "A"}, {"sample_id": 1, "label": "D"}]
    example = json.loads((official_files("egoplan") / "submission_validation.json").read_text())
    assert {tuple(row) for row in example} == {tuple(row) for row in written}
    assert [row["sample_id"] for row in example] == list(range(BENCHMARKS["egoplan_test"].num_samples))
    assert read("egoplan", egoplan(tmp_path, plan_row())).submission({"Ego4D_9": 1}) == {}
    egoplan(tmp_path, plan_row(sample_id="v_1"), file="EgoPlan_test.json")
    assert "entry 1: field 'sample_id' is 'v_1', expected a number" in problem("egoplan_test", tmp_path)


def test_egoplan_asks_for_the_goal_where_the_file_does_not(tmp_path):
    rows = [
        without(plan_row(sample_id=f"v_{n}", task_goal=goal), "question")
        for n, goal in enumerate(("wash it", "Washing it"))
    ]
    egoplan(tmp_path, *(without(without(row, "video_id"), "video_source") for row in rows), file="egoplan2.json")
    loaded = read("egoplan2", tmp_path)
    assert [sample.text for sample in loaded.samples] == [
        "What should I do next to wash it?",
        "What should I do next while Washing it?",
    ]
    assert {sample.clips[0].video for sample in loaded.samples} == {"v.mp4"}


def test_real_egoplan2():
    loaded = read("egoplan2", official_files("egoplan"))
    assert loaded.notes == []  # 1,321, each with a past
    assert Counter(sample.groups[0] for sample in loaded.samples) == {
        "Daily life": 439, "Work": 404, "Hobbies": 295, "Recreation": 183
    }  # fmt: skip
    assert Counter("ABCD"[sample.answer] for sample in loaded.samples) == {"A": 339, "B": 327, "C": 332, "D": 323}
    assert len({sample.clips[0].video for sample in loaded.samples}) == 1_113
    rows = {row["sample_id"]: row for row in json.loads((official_files("egoplan") / "egoplan2.json").read_text())}
    for sample in loaded.samples:
        (clip,), row = sample.clips, rows[sample.id]
        assert (clip.start_s * 30, clip.end_s * 30) == pytest.approx(
            (row["task_start_frame"], row["current_observation_frame"])
        )
        assert clip.last_at_end


# --------------------------------------------------------------------------------------------------------------------
# VLN-QA

WAYS = ("Move forward", "Stop", "Turn left and move forward", "Turn right and move forward")


def vln_text(question, options=WAYS):
    lines = "\n".join(f"{letter}: {option}" for letter, option in zip("ABCDE", options, strict=False))
    return f"Select the best answer.\nQuestion: {question}\nOption:\n{lines}\nOnly give the best option."


def test_vlnqa_parses_a_prompt_whose_instruction_looks_like_one(tmp_path):
    question = 'Agent follows: "Option:\r\nA: go to the sofa\r\nOption:\nB: stop there." What next?'
    rows = [{"text": vln_text(question), "video_path": "left/7_frame1.mp4", "gt": "C"}]
    (sample,) = read("vlnqa", write(tmp_path / "vlnqa.json", rows)).samples
    assert sample.text == question.replace("\r\n", "\n")
    assert (sample.options, sample.answer, sample.id) == (WAYS, 2, "7_frame1")
    assert sample.clips == (Clip("left/7_frame1.mp4", 0.0, math.inf),)


def test_vlnqa_options_begin_their_line(tmp_path):
    options = ("Stop, or E: go", *WAYS[1:])
    text = vln_text("x", options).replace("Only give the best option.", "Say one of A: to D: here.")
    rows = [{"text": text, "video_path": "left/7.mp4", "gt": "A"}]
    assert read("vlnqa", write(tmp_path / "vlnqa.json", rows)).samples[0].options == options


def test_vlnqa_in_the_form_of_mvbench(tmp_path):
    row = {"video": "left/7_frame1.mp4", "question": "Where?", "candidates": list(WAYS[::-1]), "answer": WAYS[0]}
    file = write(tmp_path / "egocentric_navigation.json", [row])
    (sample,) = read("vlnqa", tmp_path, folder="vlnqa").samples
    assert (sample.options, sample.answer, sample.text) == (WAYS[::-1], 3, "Where?")
    assert (sample.id, sample.clips) == ("7_frame1", (Clip("vlnqa/left/7_frame1.mp4", 0.0, math.inf),))
    write(file, [{**row, "answer": "Fly"}, {**row, "candidates": "ab"}, {**row, "candidates": [*WAYS[:3], WAYS[0]]}])
    message = problem("vlnqa", tmp_path)
    assert "egocentric_navigation.json entry 1: the answer 'Fly' is none of ['Turn right and move forward'" in message
    assert "entry 2: field 'candidates' is 'ab', expected a list of texts" in message
    assert "entry 3: options are ['Move forward', 'Stop', " in message
    assert "expected four different ones" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gt": "E"}, "field 'gt' is 'E' of options ABCD: correct it"),
        ({"text": "Question: where?"}, "field 'text' has no lines 'Question:' and 'Option:'"),
        (
            {"text": vln_text("x", WAYS[:3])},
            "options are ['Move forward', 'Stop', 'Turn left and move forward'], expected",
        ),
        ({"text": vln_text("x").replace("B: ", "D: ")}, "field 'gt' is 'C' of options ADC"),
    ],
)
def test_vlnqa_names_the_problem(tmp_path, changes, message):
    rows = [{"text": vln_text("x"), "video_path": "left/7.mp4", "gt": "C", **changes}]
    assert f"vlnqa.json entry 1: {message}" in problem("vlnqa", write(tmp_path / "vlnqa.json", rows))


def test_real_vlnqa():
    loaded = read("vlnqa", official_files("vlnqa"))
    assert loaded.notes == []
    assert {frozenset(sample.options) for sample in loaded.samples} == {frozenset(WAYS)}
    assert Counter(sample.options[sample.answer] for sample in loaded.samples) == dict.fromkeys(WAYS, 50)
    assert Counter("ABCD"[sample.answer] for sample in loaded.samples) == {"A": 50, "B": 46, "C": 44, "D": 60}
    folders = {"forward": WAYS[0], "stop": WAYS[1], "left": WAYS[2], "right": WAYS[3]}
    assert all(folders[Path(i.clips[0].video).parent.name] == i.options[i.answer] for i in loaded.samples)
    ends = [sample for sample in loaded.samples if not sample.text.endswith("What is the next action it should take?")]
    assert ends == []
    (broken,) = [sample.text for sample in loaded.samples if "\n" in sample.text]
    assert broken.count("\n") == 5
    assert "\nGo to the footstool\n" in broken


# --------------------------------------------------------------------------------------------------------------------
# EgoMCQ


def clip_of(video, start_s=5.0, end_s=6.0, text="#C C picks a cup"):
    return {"clip_text": text, "video_uid": video, "clip_start": start_s, "clip_end": end_s, "tag_verb": [1]}


def mcq(kind, videos, **changes):
    choices = {str(number): clip_of(video, 5.0 + number, 6.0 + number) for number, video in enumerate(videos)}
    return {"query": clip_of(videos[1]), "choices": choices, "answer": 1, "types": kind, **changes}


def egomcq(folder, *entries):
    return write(folder / "egomcq.json", {str(number): entry for number, entry in enumerate(entries)})


@pytest.mark.parametrize(("inter", "intra"), [(1, 2), (2, 1)])
def test_egomcq_sees_from_the_clips_which_type_is_which(tmp_path, inter, intra):
    loaded = read("egomcq", egomcq(tmp_path, mcq(inter, "abcde"), mcq(intra, "aaaaa"), mcq(inter, "abaaa")))
    assert [sample.groups for sample in loaded.samples] == [("inter",), ("intra",), ("inter",)]
    first = loaded.samples[0]
    assert (first.id, first.answer, first.text) == ("0", 1, "Camera-wearer picks a cup.")
    assert first.clips == tuple(Clip(f"{video}.mp4", 5.0 + n, 6.0 + n) for n, video in enumerate("abcde"))
    assert loaded.notes == ["egomcq: 38,997 of 39,000 samples are missing: fetch the file again"]


def test_egomcq_refuses_types_that_do_not_agree_with_the_clips(tmp_path):
    file = egomcq(tmp_path, mcq(1, "abcde"), mcq(1, "abcda"), mcq(1, "aaaaa"), mcq(2, "bbbbb"))
    message = problem("egomcq", file)
    assert message == f"{file} entry '2': clips are of one video, 'types' 1 has those of several videos: correct it"
    message = problem("egomcq", egomcq(tmp_path, mcq(1, "abcde"), mcq(2, "abcda")))
    assert message == f"{file}: 'types' 1 and 2 both have clips of several videos: fetch the file again"


def test_egomcq_clips_start_in_the_video_and_are_in_the_order_of_their_keys(tmp_path):
    entry = mcq(1, "abcde")
    entry["choices"] = dict(reversed(list(entry["choices"].items())))
    entry["choices"]["0"] = clip_of("a", -0.4, 0.6)
    (sample,) = read("egomcq", egomcq(tmp_path, entry)).samples
    assert [clip.video for clip in sample.clips] == [f"{video}.mp4" for video in "abcde"]
    assert (sample.clips[0].start_s, sample.clips[0].end_s) == (0.0, 0.6)


def test_egomcq_raw_narrations(tmp_path):
    short = mcq(1, "abcde", query=clip_of("a", text="#C  C walks"))
    file = egomcq(tmp_path, mcq(1, "abcde"), short)
    assert [sample.text for sample in read("egomcq", file, narrations="raw").samples] == [
        "#C C picks a cup",
        "#C C walks",
    ]
    assert read("egomcq", file).samples[1].text == "#C C walks"


def test_egomcq_takes_the_key_of_earlier_versions(tmp_path, capsys):
    file = egomcq(tmp_path, mcq(1, "abcde"))
    assert read("egomcq", file, wording="as_written").samples == read("egomcq", file, narrations="raw").samples
    assert "egobench.benchmarks: egomcq: wording is now called narrations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 5}, "'answer' is 5 and 'types' 1, expected 0 to 4 and 1 or 2"),
        ({"types": 3}, "'answer' is 1 and 'types' 3"),
        ({"answer": None}, "field 'answer' is None, expected a number"),
        ({"choices": {"0": clip_of("a")}}, "choices are 0, expected 0 to 4"),
        ({"query": {"clip_text": ""}}, "query: field 'clip_text' is '', expected a text"),
        (
            {"choices": {str(n): clip_of("a", -2.0, -1.0) for n in range(5)}},
            "'clip_start' and 'clip_end' give 0 to -1 s",
        ),
    ],
)
def test_egomcq_names_the_problem(tmp_path, changes, message):
    error = problem("egomcq", egomcq(tmp_path, mcq(1, "abcde"), mcq(1, "abcde", **changes)))
    assert re.search(rf"egomcq\.json entry '1'( choice 0)?:? {re.escape(message)}", error), error


def test_egomcq_fast_part_is_half_of_each_group(tmp_path):
    entries = [mcq(1, "abcde") for _ in range(1500)] + [mcq(2, "aaaaa") for _ in range(1200)]
    fast = read("egomcq", egomcq(tmp_path, *entries)).fast()
    assert Counter(sample.groups[0] for sample in fast.samples) == {"inter": 1000, "intra": 1000}
    assert [int(sample.id) for sample in fast.samples] == sorted(int(sample.id) for sample in fast.samples)


# --------------------------------------------------------------------------------------------------------------------
# an entry of the YAML list


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "egoschem"}, "benchmarks: name is 'egoschem', allowed: egoschema, qaego4d_closed, qaego4d_open, "),
        ({}, "benchmarks: name is None, allowed: egoschema"),
        (
            {"name": "vlnqa", "videos": "v", "video": 3},
            "benchmarks: vlnqa: unknown key 'video', allowed: name, annotations, videos, folder, limit; "
            "annotations is missing",
        ),
        (
            {"name": "egoschema", "annotations": "a", "videos": "v", "part": "half", "cut": "yes", "limit": 0},
            "benchmarks: egoschema: limit is 0, allowed: null or a number from 1; part is 'half', allowed: all, "
            "subset; cut is 'yes', allowed: bool",
        ),
        (
            {"name": "vlnqa", "annotations": 3, "videos": None},
            "annotations is 3, allowed: Path; videos is None, allowed",
        ),
        ({"name": ["vlnqa"]}, "benchmarks: name is ['vlnqa'], allowed: egoschema"),
    ],
)
def test_an_invalid_entry_is_refused_at_once(entry, message):
    with pytest.raises(ValueError) as raised:
        load(entry)
    assert message in str(raised.value)


def test_an_entry_may_leave_optional_paths_empty_and_limit_its_items(tmp_path):
    rows = [{"text": vln_text(str(n)), "video_path": f"left/{n}.mp4", "gt": "C"} for n in range(400)]
    file = write(tmp_path / "vlnqa.json", rows)
    loaded = read("vlnqa", file, limit=3)
    assert loaded.notes[-1] == "vlnqa: limited to 3 of 400 samples"
    assert loaded.notes[0] == "vlnqa: 200 samples more than the official 200: another release?"
    numbers = [int(sample.id) for sample in loaded.samples]
    assert numbers == sorted(numbers)
    assert len(numbers) == 3
    assert numbers != [0, 1, 2]  # not those that happen to come first
    assert read("vlnqa", file, limit=3).samples == loaded.samples
    assert len(read("vlnqa", file, limit=None).samples) == 400
    fast = [int(sample.id) for sample in read("vlnqa", file).fast().samples]
    assert fast == sorted(fast)
    assert len(set(fast)) == 300
    write(tmp_path / "annotations.test.json", [qa_row()])
    assert len(read("qaego4d_open", tmp_path, nlq=None).samples) == 1


def test_missing_videos_are_looked_for_once_each(tmp_path, monkeypatch):
    file = egomcq(tmp_path, mcq(2, "aaaaa"), mcq(1, "abbbb"), mcq(1, "accab"))
    write(tmp_path / "clips" / "a.mp4", "")
    write(tmp_path / "clips" / "b.mp4", "")
    loaded = load({"name": "egomcq", "annotations": str(file), "videos": str(tmp_path / "clips")})
    looked, exists = [], Path.exists

    def counted(path, **options):
        looked.append(path.name)
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", counted)
    assert loaded.missing() == {"2": "c.mp4"}
    assert sorted(looked) == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_file_that_asks_nothing_is_refused(tmp_path):
    assert problem("vlnqa", write(tmp_path / "vlnqa.json", [])) == "vlnqa: the file holds no samples: fetch it again"


JUNK = (None, True, -1, 1.5, "", "x", "\ud800", [], [None], {}, {"0": None}, float("nan"))


def spoiled(row):
    """A row with each of its fields, and of those inside it, replaced by junk or left out."""
    for key, value in row.items():
        yield without(row, key)
        yield from ({**row, key: junk} for junk in JUNK)
        if isinstance(value, dict):
            yield from ({**row, key: inner} for inner in spoiled(value))


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("egoschema", "questions.json", schema_rows("a")[0]),
        ("qaego4d_closed", "annotations.QaEgo4D_test_close.json", qa_row()),
        ("qaego4d_open", "annotations.test.json", qa_row(video_uid="v", video_start_sec=1, video_end_sec=2)),
        ("egotaskqa_direct", "test_qas.json", task_row()),
        ("egoplan", "EgoPlan_validation.json", plan_row()),
        ("egoplan_test", "EgoPlan_test.json", plan_row()),
        ("egoplan2", "egoplan2.json", without(without(plan_row(sample_id="v_1"), "video_source"), "video_id")),
        ("vlnqa", "vlnqa.json", {"text": vln_text("x"), "video_path": "left/7.mp4", "gt": "C"}),
        ("vlnqa", "vlnqa.json", {"video": "a/7.mp4", "question": "x", "candidates": list(WAYS), "answer": WAYS[0]}),
        ("egomcq", "egomcq.json", mcq(1, "abcde")),
    ],
)
def test_whatever_a_field_holds_an_error_names_the_file(tmp_path, name, file, row):
    write(tmp_path / "subset_answers.json", {})
    write(tmp_path / "train_qas.json", [task_row()])
    options = {"cut": True} if name == "qaego4d_open" else {}
    refused = 0
    for wrong in [*JUNK, *spoiled(row)]:
        path = write(tmp_path / file, {"0": wrong} if name == "egomcq" else [wrong])
        try:
            read(name, tmp_path, **options)
        except (SourceError, InvalidRecords) as error:
            assert str(error).startswith(str(path)), error
            refused += 1
    assert refused > 4 * len(JUNK)
