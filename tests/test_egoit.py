"""The five sources of EgoIT: counts and oddities of the official files, every trap, and the command.

Real files are read from a folder next to the repository, and never copied; all others are invented.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from datamodules.egoit.__main__ import main
from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import InstructionRecord
from datamodules.egoit.sources import egotimeqa
from datamodules.egoit.sources.base import convert, expand_window
from datamodules.egoit.sources.egoexolearn import EgoExoLearn, read_fine
from datamodules.egoit.sources.egotimeqa import EgoTimeQA, read_clips
from datamodules.egoit.sources.egtea import Egtea, action_text, clip_parts, read_labels
from datamodules.egoit.sources.openeqa import OpenEQA, scene_of
from datamodules.egoit.sources.ssv2 import SomethingSomething
from datamodules.egoit.templates import Templates
from datamodules.io.annotations import Counts, SourceError
from datamodules.io.jsonl import InvalidRecords

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "egoit"


def sample(name):
    if not (SAMPLES / name).exists():
        pytest.skip(f"needs the official files in {SAMPLES / name}, which are not part of the repository")
    return SAMPLES / name


def read(source):
    """Return records and problems of a source, and its counts."""
    counts, records, problems = Counts(), [], []
    for record in source.read(counts):
        (records if isinstance(record, InstructionRecord) else problems).append(record)
    return records, [str(problem) for problem in problems], counts.totals


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# --------------------------------------------------------------------------------------------------------------------
# the official files


def test_real_egtea():
    records, problems, counts = read(Egtea(sample("egtea"), ("train_split1", "test_split1")))
    assert problems == []
    assert len({record.id for record in records}) == len(records) == counts["clips"] == 10_321
    assert Counter(record.split for record in records) == {"train_split1": 8_299, "test_split1": 2_022}
    actions = read_labels(sample("egtea") / "action_idx.txt")
    assert list(actions) == list(range(1, 107))
    assert {record.prompt.target for record in records} == {action_text(label) for label in actions.values()}
    name = "P04-R06-GreekSalad-69970-77130-F001662-F001869"
    (one,) = [record for record in records if record.id == f"egtea/{name}"]
    assert one.prompt.target == "inspect/read recipe"
    assert one.video == f"egtea/cropped_clips/P04-R06-GreekSalad/{name}.mp4"
    assert one.window_s is None
    session, start_s, end_s = clip_parts(name)
    assert (session, round(end_s - start_s, 6)) == ("P04-R06-GreekSalad", 7.16)
    with (sample("egtea") / "cls_label_index.csv").open() as lines:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=";")][1:]
    assert {int(number) + 1: label for number, label, *_ in rows} == actions  # that file counts from 0


def test_real_egtea_splits_have_the_official_sizes():
    for split in (1, 2, 3):
        source = Egtea(sample("egtea"), (f"train_split{split}", f"test_split{split}"))
        records, problems, counts = read(source)
        assert (len(records), problems) == (10_321, [])
        assert {name: counts[name] for name in source.official()} == {
            name: known.count for name, known in source.official().items()
        }


def test_real_ssv2():
    source = SomethingSomething(sample("ssv2"), ("validation",))
    records, problems, counts = read(source)
    assert (len(records), problems, counts["classes"]) == (24_777, [], 174)
    classes, _, _ = read(SomethingSomething(sample("ssv2"), ("validation",), answer="template"))
    assert len({record.prompt.target for record in classes}) == 174
    assert all("[" not in record.prompt.target for record in classes)
    assert {record.id: record.prompt.target for record in records}[
        "ssv2/74225"
    ] == "spinning cube that quickly stops spinning"


def test_real_egotimeqa(tmp_path):
    content = (sample("egotimeqa") / "one_record_from_issue9.json").read_text()
    write(tmp_path / "annotations.EgoTimeQA.json", content)
    clips = write(
        tmp_path / "clips.json",
        {
            "clips": [
                {
                    "clip_uid": json.loads(content)[0]["video_id"],
                    "video_uid": "v",
                    "video_start_sec": 10.0,
                    "video_end_sec": 490.0,
                }
            ]
        },
    )
    moment = egotimeqa.moment_s(json.loads(content)[0], "here", 3.0)
    start_s, end_s = moment.annotated_s
    assert ((start_s + end_s) / 2, end_s - start_s) == pytest.approx((124.317, 8.538), abs=5e-4)
    (record,), problems, _ = read(EgoTimeQA(tmp_path, clips=(clips,)))
    assert problems == []
    start_s, end_s = record.window_s
    assert ((start_s + end_s) / 2, end_s - start_s) == pytest.approx((124.317, 3 * 8.538), abs=2e-3)
    assert (record.video_uid, record.duration_s) == ("v", 480.0)
    (closed,), _, _ = read(EgoTimeQA(tmp_path, form="closed"))
    assert len(set(closed.prompt.options)) == 4
    assert closed.prompt.target in closed.prompt.options


def test_real_openeqa():
    records, problems, counts = read(OpenEQA(sample("openeqa")))
    assert (len(records), problems) == (1_636, [])
    assert (counts["episodes"], counts["rows with extra answers"]) == (152, 263)
    hold_out = sample("openeqa") / "open-eqa-v0-184-questions.json"
    assert len(read(OpenEQA(sample("openeqa"), hold_out=hold_out))[0]) == 1_636 - 184
    assert {record.video_uid.startswith("scene") for record in records if "/scannet-v0/" in record.video} == {True}


def test_real_egoexolearn_test_file():
    rows = [row for _, row in read_fine(sample("egoexolearn") / "fine_annotation_test.csv", "scene")]  # no texts
    assert Counter(row["view"] for row in rows) == {"ego": 18_244, "exo": 4_930}
    assert all(row["annotation_uid"] for row in rows)
    assert sum(float(row["end_sec"]) <= float(row["start_sec"]) for row in rows) == 0


def test_real_egoexolearn_narrations(tmp_path):
    """The texts of the association benchmark, put under the header of the fine annotations."""
    with (sample("egoexolearn") / "association_exo_train.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    texts = ("narration_en", "narration_en_hand_prompt", "narration_en_no_hand_prompt")
    with (tmp_path / "fine_annotation_trainval_en.csv").open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["video_uid", "annotation_uid", "subset", "view", "scene", "start_sec", "end_sec", *texts])
        for row in rows:
            place = [row["video_uid"], row["annotation_id"], "train", "exo", row["scenario"]]
            table.writerow([*place, row["start_sec"], row["end_sec"], *(row[text] for text in texts)])
    records, problems, counts = read(EgoExoLearn(tmp_path, views=("exo",)))
    assert (len(records), problems, counts["exo rows of train"]) == (6_270, [], 6_270)
    assert [record.prompt.target for record in records] == [row[texts[2]].strip() for row in rows]
    assert min(end - start for start, end in (record.window_s for record in records)) > 0.4999
    assert read(EgoExoLearn(tmp_path))[0] == []  # no ego row


def test_real_egoexolearn_segments_and_questions():
    segments, problems, counts = read(EgoExoLearn(sample("egoexolearn"), part="coarse"))
    assert (problems, counts["videos"], counts["segments"]) == ([], 316, 6_691)
    assert len(segments) == 6_691 - counts["segments of no length, left out"] == 6_689
    asked, problems, counts = read(EgoExoLearn(sample("egoexolearn"), part="mcq"))
    assert (len(asked), problems, counts["videos"]) == (6_832, [], 707)
    assert counts["answers in words, given their option's letter"] == 2
    letters = Counter("ABCDEF"[record.prompt.options.index(record.prompt.target)] for record in asked)
    assert [round(100 * letters[letter] / len(asked)) for letter in "ABCD"] == [27, 34, 30, 8]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Egtea(sample("egtea"), ("train_split1", "test_split1")),
        lambda: SomethingSomething(sample("ssv2"), ("validation",)),
        lambda: OpenEQA(sample("openeqa")),
        lambda: EgoExoLearn(sample("egoexolearn"), part="mcq"),
        lambda: EgoExoLearn(sample("egoexolearn"), part="coarse"),
    ],
    ids=["egtea", "ssv2", "openeqa", "egoexolearn_mcq", "egoexolearn_coarse"],
)
def test_real_files_are_written_and_read_back_without_a_warning(tmp_path, make):
    source = make()
    out = tmp_path / "out.jsonl"
    done = convert(source, out)
    assert done.warnings == []
    file = ConversationFile(out)
    found = list(file)
    assert (len(found), file.problems, file.changes) == (done.records, [], {})
    assert len({record.id for record in found}) == done.records > 1000
    assert all(record.prompt is not None and record.turns == () for record in found)


# --------------------------------------------------------------------------------------------------------------------
# EGTEA


CLIP = "P99-R01-PastaSalad-12000-14500-F000285-F000351"


@pytest.fixture
def egtea(tmp_path):
    write(tmp_path / "action_annotation/action_idx.txt", "Inspect/Read recipe 1\nTurn on faucet 2\nCut bell_pepper 3\n")
    write(tmp_path / "action_annotation/train_split1.txt", f"{CLIP} 3 4 4\n\n{CLIP.replace('99', '98')} 1 1 1 2\n")
    write(tmp_path / "action_annotation/test_split1.txt", f"{CLIP} 3 4 4\n")
    return tmp_path


def test_egtea_ids_start_at_one_and_labels_have_spaces(egtea):
    records, problems, counts = read(Egtea(egtea, ("train_split1", "test_split1"), videos="here"))
    assert problems == []
    assert [(record.id, record.prompt.target, record.split) for record in records] == [
        (f"egtea/{CLIP}", "cut bell pepper", "train_split1"),
        (f"egtea/{CLIP.replace('99', '98')}", "inspect/read recipe", "train_split1"),
    ]
    assert counts["clips"] == 2  # the one of both splits once
    assert records[0].video == f"here/cropped_clips/P99-R01-PastaSalad/{CLIP}.mp4"
    (whole, _), _, _ = read(Egtea(egtea, untrimmed=True))
    assert (whole.video, whole.window_s) == ("egtea/P99-R01-PastaSalad.mp4", (12.0, 14.5))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{CLIP} 0 4 4", "action id 0 is not in action_idx.txt, whose ids go from 1 to 3"),
        (f"{CLIP} 4 4 4", "action id 4 is not in"),
        (f"{CLIP} 3", r"ids are \['3'\], expected those of an action, a verb and nouns"),
        (f"{CLIP} 3 x 4", "ids are"),
        (f"{CLIP} {'1' * 5000} 4 4", "ids are"),
        (f"{CLIP.replace('12000', '1' * 5000)} 3 4 4", "is not <session>-<start ms>-<end ms>"),
        ("P99-R01-PastaSalad-12000-F000285 3 4 4", "clip 'P99-R01-PastaSalad-12000-F000285' is not <session>"),
        (f"{CLIP.replace('14500', '11000')} 3 4 4", "is not <session>-<start ms>-<end ms>"),
    ],
)
def test_egtea_wrong_lines_are_named(egtea, line, message):
    file = write(egtea / "action_annotation/train_split1.txt", f"{CLIP} 3 4 4\n{line}\n")
    _, (problem,), _ = read(Egtea(egtea))
    assert problem.startswith(f"{file} line 2: ")
    assert re.search(message, problem)


def test_egtea_labels_that_count_from_zero_are_refused(egtea):
    write(egtea / "action_annotation/action_idx.txt", "Inspect/Read recipe 0\nTurn on faucet 1\n")
    with pytest.raises(SourceError, match=r"action_idx\.txt: ids begin at 0, expected 1"):
        read(Egtea(egtea))


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("Turn on faucet", "turn on faucet"),
        ("Mix mixture,eating_utensil", "mix mixture and eating utensil"),
        ("Pour oil,oil_container,pan", "pour oil, oil container and pan"),
        ("Divide/Pull Apart paper_towel", "divide/pull apart paper towel"),
    ],
)
def test_egtea_actions_as_text(label, text):
    assert action_text(label) == text


def test_egtea_labels_of_one_clip_that_differ_are_a_problem(egtea):
    file = write(egtea / "action_annotation/test_split1.txt", f"{CLIP} 2 4 4\n")
    records, (problem,), _ = read(Egtea(egtea, ("train_split1", "test_split1")))
    assert len(records) == 2
    first = file.with_name("train_split1.txt")
    assert problem == (
        f"{file} line 1: egtea/{CLIP} is 'turn on faucet', but 'cut bell pepper' in {first} line 1: correct one"
    )


# --------------------------------------------------------------------------------------------------------------------
# Something-Something


@pytest.fixture
def ssv2(tmp_path):
    write(
        tmp_path / "labels/labels.json", {"Moving something closer to something": "0", "Pouring part of something": "1"}
    )
    rows = [
        {
            "id": "7",
            "label": "moving red cup closer to plate",
            "template": "Moving [something] closer to [something]",
            "placeholders": ["red cup", "plate"],
        },
        {
            "id": "8",
            "label": "pouring part of the milk",
            "template": "Pouring [part] of [something]",
            "placeholders": ["part", "the milk"],
        },
    ]
    write(tmp_path / "labels/train.json", rows)
    return tmp_path


def test_ssv2_brackets_of_all_kinds_lead_to_the_class(ssv2):
    records, problems, _ = read(SomethingSomething(ssv2))
    assert problems == []
    assert [record.prompt.target for record in records] == [
        "moving red cup closer to plate",
        "pouring part of the milk",
    ]
    assert records[0].video == "ssv2/20bn-something-something-v2/7.webm"
    classes, _, _ = read(SomethingSomething(ssv2, answer="template"))
    assert [record.prompt.target for record in classes] == [
        "moving something closer to something",
        "pouring part of something",
    ]


def test_ssv2_answers_of_the_test_split(ssv2):
    write(ssv2 / "labels/test-answers.csv", "5;Pouring part of something\n")
    with pytest.raises(SourceError, match="the test split has classes only: add --answer template"):
        read(SomethingSomething(ssv2, ("test",)))
    # its classes carry no brackets, and so no fillings
    ((record,), problems, _) = read(SomethingSomething(ssv2, ("test",), answer="template"))
    assert (record.id, record.prompt.target, problems) == ("ssv2/5", "pouring part of something", [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Moving [something]"}, "class 'Moving something' of field 'template' is not in labels.json"),
        (
            {"placeholders": ["cup"]},
            "field 'placeholders' is ['cup'], but 'Moving [something] closer to [something]' has 2",
        ),
        ({"id": 7}, "field 'id' is 7, expected a text"),
        ({"label": ""}, "field 'label' is '', expected a text"),
    ],
)
def test_ssv2_wrong_rows_are_named(ssv2, change, message):
    file = ssv2 / "labels/train.json"
    rows = json.loads(file.read_text())
    write(file, [rows[1], rows[0] | change])
    records, (problem,), _ = read(SomethingSomething(ssv2))
    assert len(records) == 1
    assert problem.startswith(f"{file} entry 2: {message}")


@pytest.mark.parametrize("content", ['5;Pouring "part" of\n6;"x\n7;x\n', '5;x\n6;"x"y\n'])
def test_a_stray_quote_does_not_swallow_rows(ssv2, content):
    file = write(ssv2 / "labels/test-answers.csv", content)
    with pytest.raises(SourceError, match=rf"^{file} line 2: no row of a table \(.*\): double its quotes"):
        read(SomethingSomething(ssv2, ("test",), answer="template"))


# --------------------------------------------------------------------------------------------------------------------
# EgoTimeQA


def asked(start_s, end_s, **changes):
    row = {
        "video_id": "clip",
        "sample_id": "clip",
        "question": "Where did l put the knife?",
        "answer": "in the drawer",
        "moment_start_frame": 30 * start_s,
        "moment_end_frame": 30 * end_s,
        "wrong_answers": ["on the table", "in the sink", "on the shelf"],
    }
    return row | changes


def egotimeqa_of(tmp_path, *rows, **options):
    write(tmp_path / "data/unified/annotations.EgoTimeQA.json", list(rows))
    return read(EgoTimeQA(tmp_path, **options))


@pytest.mark.parametrize(
    ("moment", "options", "window"),
    [
        ((99.0, 101.0), {}, (97.0, 103.0)),  # 2 means wide, three times that around 100 s
        ((99.0, 101.0), {"stretch": 2.0}, (98.0, 102.0)),
        ((99.9, 100.1), {}, (98.0, 102.0)),  # no shorter than 4 s
        ((90.0, 110.0), {}, (85.0, 115.0)),  # no longer than 30 s
        ((0.5, 2.5), {}, (0.0, 4.5)),  # not before the clip
        ((498.0, 500.0), {}, (496.0, 500.0)),  # and not past its known end
    ],
)
def test_egotimeqa_windows(tmp_path, moment, options, window):
    records, problems, _ = egotimeqa_of(tmp_path, asked(*moment), asked(498.0, 500.0), **options)
    assert problems == []
    assert records[0].window_s == pytest.approx(window)


def test_egotimeqa_seconds_are_taken_as_they_are_and_expanded_to_half_a_second(tmp_path):
    rows = [asked(0, 1, start_sec=100.0, end_sec=101.5), asked(0, 1, start_sec=50.0, end_sec=50.1)]
    records, _, _ = egotimeqa_of(tmp_path, *rows)
    assert [record.window_s for record in records] == [pytest.approx((100.0, 101.5)), pytest.approx((49.8, 50.3))]


def test_egotimeqa_ids_are_places_and_questions_use_i(tmp_path):
    records, _, counts = egotimeqa_of(tmp_path, asked(1, 2), asked(1, 2, answer="Person A has it"))
    assert [record.id for record in records] == ["egotimeqa/000000", "egotimeqa/000001"]
    assert records[0].prompt.query == "Where did I put the knife?"
    assert counts["rows with a Person A, B, ... whom the clip does not name"] == 1
    assert counts["rows without an Ego4D video (--clips names them)"] == 2


def test_egotimeqa_choices_are_balanced_and_stay(tmp_path):
    rows = [asked(1, 2)] * 2000
    records, _, _ = egotimeqa_of(tmp_path, *rows, form="closed")
    places = Counter(record.prompt.options.index("in the drawer") for record in records)
    assert {record.prompt.task for record in records} == {"mcq"}
    assert all(abs(places[place] - 500) < 80 for place in range(4))  # four standard deviations
    again, _, _ = egotimeqa_of(tmp_path, *rows, form="closed")
    assert again == records
    mixed, _, _ = egotimeqa_of(tmp_path, *rows, form="mixed")
    assert abs(sum(record.prompt.task == "mcq" for record in mixed) - 1000) < 90


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"question": " "}, {}, "field 'question' is ' ', expected a text"),
        ({"video_id": None}, {}, "field 'video_id' is None"),
        ({"moment_end_frame": "soon"}, {}, "field 'moment_end_frame' is 'soon', expected a number"),
        ({"moment_end_frame": 1.0}, {}, "fields moment_start_frame and moment_end_frame give 1.000 to 0.033 s"),
        (
            {"wrong_answers": ["a", "b"]},
            {"form": "closed"},
            "['in the drawer', 'a', 'b'] are not four different answers",
        ),
        ({"wrong_answers": ["a", "a", "b"]}, {"form": "closed"}, "are not four different answers"),
        ({"wrong_answers": "a"}, {"form": "closed"}, "field 'wrong_answers' is 'a', expected three texts"),
        ({"video_id": ["clip"]}, {}, "field 'video_id' is ['clip'], expected a text"),
        ({"moment_end_frame": 10**400}, {}, "expected a number"),
        ({"answer": "\ud800"}, {}, "field 'answer' is '\\ud800', expected a text"),
        ({"wrong_answers": ["a", "b", "\ud800"]}, {"form": "closed"}, "expected three texts"),
    ],
)
def test_egotimeqa_wrong_rows_are_named(tmp_path, change, options, message):
    records, (problem,), _ = egotimeqa_of(tmp_path, asked(1, 2), asked(1, 2, **change), **options)
    assert len(records) == 1
    assert problem.startswith(f"{tmp_path}/data/unified/annotations.EgoTimeQA.json entry 2: ")
    assert message in problem


def test_egotimeqa_ids_are_trimmed_and_texts_stand_on_one_line(tmp_path):
    (record,), problems, _ = egotimeqa_of(tmp_path, asked(1, 2, video_id=" c1 ", question="What did\n I  do?"))
    assert problems == []
    assert (record.video, record.prompt.query) == ("ego4d/clips/c1.mp4", "What did I do?")


def test_egotimeqa_spelling_does_not_give_the_answer_away(tmp_path):
    row = asked(1, 2, answer="where l\nput it", wrong_answers=["where l sat", "what l cut", "what l did"])
    (record,), problems, _ = egotimeqa_of(tmp_path, row, form="closed")
    assert problems == []
    assert sorted(record.prompt.options) == ["what I cut", "what I did", "where I put it", "where I sat"]
    question, answer = Templates().render(record, "task_ego", 0)
    assert answer in question.split("\n")


@pytest.mark.parametrize("stretch", ["nan", "-1", "0", "inf"])
def test_egotimeqa_impossible_factors_are_refused(tmp_path, stretch):
    with pytest.raises(SourceError, match=r"--stretch: got .*, allowed: above 0"):
        EgoTimeQA(tmp_path, stretch=float(stretch))


@pytest.mark.parametrize("content", [{"videos": 5}, {"videos": [{"video_uid": "v", "clips": 5}]}])
def test_a_list_of_clips_of_another_type_is_refused(tmp_path, content):
    with pytest.raises(SourceError, match=r"x\.json: field '(videos|clips)' is 5, expected a list: give ego4d\.json"):
        read_clips((write(tmp_path / "x.json", content),))


def test_egotimeqa_clips_lead_to_videos_and_lengths(tmp_path):
    metadata = {"clips": [{"clip_uid": "clip", "video_uid": "v1", "video_start_sec": 60.0, "video_end_sec": 160.0}]}
    nlq = {"videos": [{"video_uid": "v2", "clips": [{"clip_uid": "other"}]}]}
    files = (write(tmp_path / "ego4d.json", metadata), write(tmp_path / "nlq_train.json", nlq))
    assert read_clips(files) == {"clip": ("v1", 100.0), "other": ("v2", -1.0)}
    records, problems, _ = egotimeqa_of(tmp_path, asked(98, 100), asked(101, 102), clips=files)
    assert (records[0].video_uid, records[0].duration_s) == ("v1", 100.0)
    assert records[0].window_s == pytest.approx((96.0, 100.0))
    assert "begins at 101.000 s of a clip of 100.000 s" in problems[0]
    with pytest.raises(SourceError, match=r"x\.json: names no clips: give ego4d\.json"):
        read_clips((write(tmp_path / "x.json", {"videos": []}),))


# --------------------------------------------------------------------------------------------------------------------
# OpenEQA


def test_openeqa_shows_whole_episodes_and_knows_the_scene(tmp_path):
    row = {
        "question": "What is left of the sink?",
        "answer": "A rack",
        "category": "object localization",
        "question_id": "q1",
        "episode_history": "scannet-v0/999-scannet-scene9999_02",
        "extra_answers": ["Drying rack"],
    }
    file = write(
        tmp_path / "data/open-eqa-v0.json",
        [row, row | {"question_id": "q2", "extra_answers": None}, row | {"answer": 3}],
    )
    records, problems, counts = read(OpenEQA(tmp_path))
    assert [record.id for record in records] == ["openeqa/q1", "openeqa/q2"]
    assert (records[0].video, records[0].window_s) == (f"openeqa/frames/{row['episode_history']}", None)
    assert records[0].video_uid == "scene9999"
    assert counts["rows with extra answers"] == 1
    assert problems == [f"{file} entry 3: field 'answer' is 3, expected a text: correct it"]
    hold_out = write(tmp_path / "some.json", ["q1"])
    records, _, counts = read(OpenEQA(tmp_path, hold_out=hold_out, encoded=True))
    assert [record.video for record in records] == [f"openeqa/frames/{row['episode_history']}-0.mp4"]
    assert counts["rows held out"] == 1


@pytest.mark.parametrize(
    ("episode", "scene"),
    [("hm3d-v0/000-hm3d-BFRyYbPCCPE", "BFRyYbPCCPE"), ("scannet-v0/002-scannet-scene0709_00", "scene0709"), ("x", "x")],
)
def test_openeqa_scenes(episode, scene):
    assert scene_of(episode) == scene


@pytest.mark.parametrize(
    ("content", "message"),
    [([{"question_id": "a"}], "expected a list of question_ids"), (None, "no such file: correct the path")],
)
def test_invalid_hold_outs_of_openeqa_are_refused(tmp_path, content, message):
    write(tmp_path / "open-eqa-v0.json", [])
    file = tmp_path / "held.json"
    if content is not None:
        write(file, content)
    with pytest.raises(SourceError, match=f"^{file}: {message}"):
        read(OpenEQA(tmp_path, hold_out=file))


# --------------------------------------------------------------------------------------------------------------------
# EgoExoLearn


FINE = "video_uid,{},subset,view,scene,start_sec,end_sec"
FINE += ",narration_en,narration_en_hand_prompt,narration_en_no_hand_prompt\n"
ROWS = (
    "bee0,a1,train,ego,kitchen,12.4,15.1,Use your right hand.,The right hand takes the pan.,Take the pan.\n"
    "bee0,a2,train,ego,kitchen,20.0,20.2,x,x,Stir.\n"
    "bee0,a3,val,ego,kitchen,19.0,20.3,x,x,Wait.\n"
    "cee0,a4,train,exo,lab,1,2,x,x,Shake.\n"
)


@pytest.mark.parametrize("key", ["annotation_uid", "annotation_id"])
def test_egoexolearn_both_headers_and_three_texts(tmp_path, key):
    write(tmp_path / "annotations/fine_annotation_trainval_en.csv", FINE.format(key) + ROWS)
    records, problems, counts = read(EgoExoLearn(tmp_path))
    assert problems == []
    assert [(record.id, record.video, record.prompt.target) for record in records] == [
        ("egoexolearn/a1", "egoexolearn/bee0.mp4", "Take the pan."),
        ("egoexolearn/a2", "egoexolearn/bee0.mp4", "Stir."),
    ]
    assert records[0].window_s == (12.4, 15.1)
    assert records[1].window_s == pytest.approx((19.8, 20.3))  # half a second, not past the last annotation
    assert counts == {"ego rows of train": 2, "ego rows of val": 1, "exo rows of train": 1}
    for text, target in (("hand", "The right hand takes the pan."), ("raw", "Use your right hand.")):
        (first, _), _, _ = read(EgoExoLearn(tmp_path, text=text))
        assert first.prompt.target == target
        assert "hand" in first.prompt.query
    everything, _, _ = read(EgoExoLearn(tmp_path, splits=("train", "val"), views=("ego", "exo")))
    assert [record.id for record in everything] == [f"egoexolearn/a{n}" for n in (1, 2, 3, 4)]


def test_egoexolearn_wrong_rows_are_named(tmp_path):
    rows = (
        "v,b1,train,ego,lab,3,3,x,x,Go.\nv,b2,train,ego,lab,x,3,x,x,Go.\nv,b3,train,ego,lab,1,3,x,x,\nv,b4,train,ego\n"
    )
    file = write(tmp_path / "fine_annotation_trainval_en.csv", FINE.format("annotation_uid") + ROWS + rows)
    records, problems, _ = read(EgoExoLearn(tmp_path))
    assert len(records) == 2
    assert [problem.partition(": ")[0] for problem in problems] == [f"{file} line {number}" for number in (6, 7, 8, 9)]
    assert "'start_sec' and 'end_sec' are 3.0 and 3.0" in problems[0]
    assert "'start_sec' is 'x'" in problems[1]
    assert "'narration_en_no_hand_prompt' is ''" in problems[2]
    write(file, "video_uid,subset\n")
    with pytest.raises(SourceError, match="column view, start_sec, end_sec, annotation_uid is missing"):
        read(EgoExoLearn(tmp_path))


def test_egoexolearn_rows_that_are_cut_or_of_no_split_are_named(tmp_path):
    rows = (
        "v,b1,train,ego,lab,1,3,x,x,Go, then stop.\nv,b2,Train,ego,lab,1,3,x,x,Go.\nv,b3,train,Ego ,lab,1,3,x,x,Go.\n"
    )
    file = write(tmp_path / "fine_annotation_trainval_en.csv", FINE.format("annotation_uid") + ROWS + rows)
    records, problems, _ = read(EgoExoLearn(tmp_path))
    assert len(records) == 2
    assert problems == [
        f"{file} line 6: 11 cells in 10 columns: quote texts that hold a comma, or add the missing cells",
        f"{file} line 7: subset is 'Train' and view is 'ego', allowed: train, val, test and ego, exo",
        f"{file} line 8: subset is 'train' and view is 'Ego ', allowed: train, val, test and ego, exo",
    ]


def test_egoexolearn_names_a_missing_column_once(tmp_path):
    header = "video_uid,annotation_uid,subset,view,scene,start_sec,end_sec\n"
    write(tmp_path / "fine_annotation_trainval_en.csv", header + "v,b1,train,ego,lab,1,3\n" * 3)
    with pytest.raises(SourceError, match="column narration_en_no_hand_prompt is missing: take a file"):
        read(EgoExoLearn(tmp_path))


def archive_of(file, content):
    with tarfile.open(file, "w:gz") as archive:
        entry = tarfile.TarInfo("l1/bee0.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file


def test_invalid_archives_of_egoexolearn_are_named(tmp_path):
    file = tmp_path / "coarse_annotations.tar.gz"
    whole = archive_of(file, bytes(range(256)) * 400).read_bytes()
    for content in (b"text", whole[: len(whole) // 2], b"\x1f\x8b" + bytes(50)):
        file.write_bytes(content)
        with pytest.raises(SourceError, match=rf"^{file}: cannot be unpacked \(.*\): fetch the file again$"):
            read(EgoExoLearn(tmp_path, part="coarse"))
    for content, message in ((b"null", "expected a JSON list, got NoneType"), (b"[" * 100_000, "invalid JSON")):
        archive_of(file, content)
        _, (problem,), _ = read(EgoExoLearn(tmp_path, part="coarse"))
        assert problem.startswith(f"{file} l1/bee0.json: {message}")


def test_egoexolearn_segments(tmp_path):
    good = {"start": 1, "end": 7.5, "duration": 7.0, "id": "s1", "textAttribute_en": "1. Go.\n 2. Stop. \n"}
    segments = [good, {**good, "id": "s2", "start": 5, "end": 5, "duration": None}, {**good, "start": 8}]
    content = json.dumps(segments).encode()
    archive_of(tmp_path / "coarse_annotations.tar.gz", content)
    (record,), (problem,), counts = read(EgoExoLearn(tmp_path, part="coarse"))
    assert (record.window_s, record.duration_s, record.prompt.target) == ((1.0, 7.0), 7.0, "1. Go.\n2. Stop.")
    assert "l1/bee0.json entry 3: from 8.0 to 7.5 s of a video of 7.0 s" in problem
    assert counts["segments of no length, left out"] == 1


def mcq(answer, *options, number=0):
    value = "<video>\nWhat now?\n" + "".join(f"{option}\n" for option in options)
    value += "Answer with the option's letter from the given choices directly."
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": f"v_{number}", "conversations": turns, "image": {"video": "v.mp4"}}) + "\n"


def test_egoexolearn_questions_with_letters_and_words(tmp_path):
    rows = mcq("B", "(A) Go", "(B) Stop") + mcq("Stop", "(A) Go", "(B) Stop", number=1)
    rows += mcq("C", "(A) Go", "(B) Stop") + mcq("A", "(B) Go", "(A) Stop") + "{}\n"
    file = write(tmp_path / "Video_QA/x_mcq.jsonl", rows)
    records, problems, counts = read(EgoExoLearn(tmp_path, part="mcq"))
    for record in records:
        assert (record.prompt.query, record.prompt.options, record.prompt.target) == (
            "What now?",
            ("Go", "Stop"),
            "Stop",
        )
        assert (record.video, record.window_s) == ("egoexolearn/v.mp4", None)
    assert [record.id for record in records] == ["egoexolearn/mcq/v_0", "egoexolearn/mcq/v_1"]
    assert counts["answers in words, given their option's letter"] == 1
    assert [problem.partition(": ")[0] for problem in problems] == [f"{file} line {number}" for number in (3, 4, 5)]
    assert "answer 'C' is neither a letter nor an option" in problems[0]
    write(tmp_path / "Video_QA/x_qa.jsonl", mcq("He stops."))
    ((record,), _, _) = read(EgoExoLearn(tmp_path, part="qa"))
    assert (record.prompt.task, record.prompt.query, record.prompt.target) == ("qa", "What now?", "He stops.")


# --------------------------------------------------------------------------------------------------------------------
# converting


@pytest.mark.parametrize(
    ("window", "expanded"),
    [((1.0, 2.0), (1.0, 2.0)), ((5.0, 5.1), (4.8, 5.3)), ((0.0, 0.1), (0.0, 0.5)), ((9.8, 9.9), (9.5, 10.0))],
)
def test_short_windows_are_expanded_inside_the_file(window, expanded):
    assert expand_window(*window, min_length_s=0.5, last_s=10.0) == pytest.approx(expanded)


def test_wrong_rows_stop_a_conversion_and_are_all_named_or_left_out_with_a_warning(egtea, tmp_path):
    write(egtea / "action_annotation/train_split1.txt", f"{CLIP} 9 4 4\n{CLIP} 3 4 4\nx 3 4 4\n")
    out = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRecords) as caught:
        convert(Egtea(egtea), out)
    assert len(caught.value.problems) == 2
    write(egtea / "action_annotation/train_split1.txt", f"{CLIP} 9 4 4\n" * 6)
    with pytest.raises(InvalidRecords, match=r"and 1 more: --skip-invalid \(which also writes the others\) names"):
        convert(Egtea(egtea), out)
    write(egtea / "action_annotation/train_split1.txt", f"{CLIP} 9 4 4\n{CLIP} 3 4 4\nx 3 4 4\n")
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    done = convert(Egtea(egtea), out, skip_invalid=True)
    assert (done.records, len(out.read_text().splitlines())) == (1, 1)
    assert [warning for warning in done.warnings if warning.startswith("left out: ")] == [
        f"left out: {problem}" for problem in caught.value.problems
    ]


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("question", "What does the <video> show?", "entry 2: field 'prompt.query' holds <video>, which stands for"),
        ("answer", "An <image> tag", "entry 2: field 'prompt.target' holds <image>, which stands for the clip"),
    ],
)
def test_a_conversion_names_rows_that_the_reader_would_refuse(tmp_path, field, text, message):
    row = {"question": "What?", "answer": "A cat", "category": "c", "episode_history": "hm3d-v0/000-hm3d-BFRyYbPCCPE"}
    rows = [row | {"question_id": "q1"}, row | {"question_id": "q2", field: text}]
    write(tmp_path / "open-eqa-v0.json", rows)
    out = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRecords, match=message):
        convert(OpenEQA(tmp_path), out)
    assert not out.exists()
    assert convert(OpenEQA(tmp_path), out, skip_invalid=True).records == 1
    read = ConversationFile(out)
    assert [record.id for record in read] == ["openeqa/q1"] and not read.problems


def test_repeated_ids_are_named_with_both_lines(tmp_path):
    row = "v,b1,train,ego,lab,1,3,x,x,Go.\n"
    file = write(tmp_path / "fine_annotation_trainval_en.csv", FINE.format("annotation_uid") + row * 3)
    with pytest.raises(InvalidRecords) as caught:
        convert(EgoExoLearn(tmp_path), tmp_path / "out.jsonl")
    assert caught.value.problems == [
        f"{file} line {number}: 'egoexolearn/b1' is the id of {file} line 2 too: give each its own" for number in (3, 4)
    ]
    done = convert(EgoExoLearn(tmp_path), tmp_path / "out.jsonl", skip_invalid=True)
    assert done.records == 1
    assert sum(warning.startswith("left out: ") for warning in done.warnings) == 2


def test_files_with_a_byte_order_mark_are_read(egtea, ssv2, tmp_path):
    write(tmp_path / "fine_annotation_trainval_en.csv", FINE.format("annotation_uid") + ROWS)
    write(ssv2 / "labels/test-answers.csv", "5;Pouring part of something\n")
    sources = [
        Egtea(tmp_path),
        SomethingSomething(tmp_path, ("train", "test"), answer="template"),
        EgoExoLearn(tmp_path),
    ]
    before = [read(source) for source in sources]
    for file in (*tmp_path.rglob("*.csv"), *tmp_path.rglob("*.txt"), *tmp_path.rglob("*.json")):
        file.write_text("\ufeff" + file.read_text())
    assert [read(source) for source in sources] == before
    assert all(records and not problems for records, problems, _ in before)


def test_files_of_another_encoding_are_named(egtea, ssv2, tmp_path):
    write(tmp_path / "fine_annotation_trainval_en.csv", FINE.format("annotation_uid") + ROWS)
    write(ssv2 / "labels/test-answers.csv", "5;Pouring part of something\n")
    for source, name in (
        (Egtea(tmp_path), "action_annotation/train_split1.txt"),
        (Egtea(tmp_path), "action_annotation/action_idx.txt"),
        (SomethingSomething(tmp_path, ("test",), answer="template"), "labels/test-answers.csv"),
        (EgoExoLearn(tmp_path), "fine_annotation_trainval_en.csv"),
    ):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n\xe9\n")
        with pytest.raises(SourceError, match=rf"^{tmp_path / name} line \d+: no UTF-8 text"):
            read(source)


def test_the_command_prints_counts_and_missing_rows(egtea, tmp_path, capsys):
    out = tmp_path / "out" / "egtea.jsonl"
    arguments = ["convert", "egtea", "--root", str(egtea), "--splits", "train_split1", "test_split1", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()[1:3]] == [
        ["actions", "3", "106"],
        ["rows", "of", "train_split1", "2", "8,299"],
    ]
    assert printed.out.endswith(f"2 records written to {out}\n")
    assert "warning: egtea: 8,297 of 8,299 rows of train_split1 are missing: fetch the file again\n" in printed.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(rows[0]) == [
        *("id", "video", "source", "prompt", "video_uid", "duration", "split"),
    ]
    assert rows[0]["prompt"] == {"task": "action", "query": "", "options": [], "target": "cut bell pepper"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "source: got 'nothing', allowed: egtea, ssv2, egotimeqa, openeqa, egoexolearn, or module:Class"),
        (["no_such:Thing"], "source: got 'no_such:Thing', which cannot be imported"),
        (["os:path"], "source: 'os:path' lacks the dataclass field root, name, official, read: add it to the class"),
        (
            ["datamodules.egoit.mix:MixConfig"],
            "source: 'datamodules.egoit.mix:MixConfig' lacks the dataclass field root",
        ),
        (["openeqa"], "holds none of open-eqa-v0.json, data/open-eqa-v0.json: put OpenEQA's questions there"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, arguments, message):
    words = [word.format(root=tmp_path) for word in arguments]
    root = [] if "source: " in message else ["--root", str(tmp_path)]
    assert main(["convert", *words, *root]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("words", [["--splits", "trian"], ["--views", "Ego"]])
def test_unknown_splits_and_views_are_refused(tmp_path, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "egoexolearn", "--root", str(tmp_path), *words])
    assert f"invalid choice: '{words[1]}'" in capsys.readouterr().err


def test_a_source_of_ones_own_is_one_file(tmp_path, monkeypatch, capsys):
    write(
        tmp_path / "my_sources.py",
        """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.annotations import Official, option


@dataclass(frozen=True)
class Mine:
    root: Path
    times: int = option(2, "how many")
    name: ClassVar[str] = "mine"

    def official(self):
        return {"rows": Official(2)}

    def read(self, counts):
        for number in range(self.times):
            counts.add("rows")
            prompt = PromptFields("qa", query="What?", target="that")
            yield InstructionRecord(f"mine/{number}", "v.mp4", prompt, source=self.name)
""",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "my_sources:Mine", "--root", str(tmp_path), "--times", "3"]) == 0
    assert len(list(ConversationFile(tmp_path / "data/egoit/mine.jsonl"))) == 3
    assert "1 rows more than the official 2: another release?" in capsys.readouterr().err


def test_converting_needs_neither_torch_nor_a_video_library():
    code = "import sys, datamodules.egoit.__main__; print({'torch', 'lightning', 'av'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
