"""Scores of validation answers by hand."""

import json

import pytest

from datamodules.batch import Question
from lightning_modules.validation.consistency import compare, shares
from lightning_modules.validation.report import write_metrics, write_report
from lightning_modules.validation.scores import (
    QAResults,
    chance_levels,
    normalise,
    score_choice,
    score_text,
)

CAPTION = Question(
    0,
    "caption",
    "Describe the video.",
    "Camera-wearer picks up the red cup.",
    parts={"verb": "picks up", "object": "cup", "colour": "red"},
)
OPTIONS = ("a", "b", "c", "d")
CHOICE = Question(0, "choice", "Which?", "c", options=OPTIONS)
WHERE = {"clip": "clip7", "ego_visible": False, "view": "ego"}


def test_normalise():
    assert normalise("  Camera-wearer  picks up,\nthe Red cup. ") == "camera-wearer picks up the red cup"


@pytest.mark.parametrize(
    ("prediction", "scores"),
    [
        ("camera-wearer picks up the red cup", (1, 1, 1, 1)),
        ("Camera-wearer picks up the red cup. .", (1, 1, 1, 1)),
        ("Camera-wearer picks the red cup up.", (0, 0, 1, 1)),  # the verb's words must stand together
        ("Camera-wearer picks up the cupboard, reddish.", (0, 1, 0, 0)),  # whole words only
        ("", (0, 0, 0, 0)),
    ],
)
def test_caption_by_hand(prediction, scores):
    outcome = score_text(CAPTION, prediction, **WHERE)
    names = ("caption", "caption_verb", "caption_object", "caption_colour")
    assert outcome.scores == dict(zip(names, map(float, scores), strict=True))
    record = outcome.record()
    assert {key: record[key] for key in WHERE} == WHERE
    assert (record["prediction"], record["answer"], record["task"]) == (prediction, CAPTION.answer, "caption")
    json.dumps(record)


def test_questions_count_once_more_together():
    assert score_text(Question(0, "qa_hand", "?", "left"), "Left.", **WHERE).scores == {"qa_hand": 1.0, "qa": 1.0}


def test_choice_is_by_mean_log_likelihood():
    log_p = [(-4.0, 2), (-3.0, 1), (-4.5, 3), (-9.0, 4)]  # -2, -3, -1.5, -2.25 a token
    right = score_choice(CHOICE, log_p, **WHERE)
    assert (right.prediction, right.scores) == ("c", {"choice": 1.0, "loss": 1.5})
    log_p[0] = (-2.0, 2)
    wrong = score_choice(CHOICE, log_p, **WHERE)
    assert (wrong.prediction, wrong.scores) == ("a", {"choice": 0.0, "loss": 1.5})


def test_chance_is_the_most_frequent_answer():
    questions = [
        *(Question(0, "qa_hand", "?", answer) for answer in ("left", "Left.", "right", "left")),
        *(Question(0, "qa_verb", "?", answer) for answer in ("taps", "lifts")),
        *(
            Question(0, "caption", "?", answer, parts={"verb": verb})
            for answer, verb in (("a", "x"), ("b", "x"), ("c", "y"))
        ),
        CHOICE,
        Question(0, "choice", "?", "a", options=("a", "b")),
    ]
    assert chance_levels(questions) == pytest.approx(
        {
            "qa_hand": 3 / 4,
            "qa_verb": 1 / 2,
            "qa": (3 + 1) / 6,
            "caption": 1 / 3,
            "caption_verb": 2 / 3,
            "choice": (1 / 4 + 1 / 2) / 2,
        }
    )


def test_means_by_hand():
    results = QAResults()
    results.predictions.append(score_choice(CHOICE, [(-2.0, 1), (-1.0, 1), (-1.5, 1), (-9.0, 1)], **WHERE))
    results.predictions.append(score_choice(CHOICE, [(-2.0, 1), (-1.0, 1), (-0.5, 1), (-9.0, 1)], **WHERE))
    for answer in ("left", "right", "right", "right"):
        exo = WHERE | {"view": "exo"}
        results.predictions.append(score_text(Question(0, "qa_hand", "?", "left"), answer, **exo))
    # Nothing that did not occur.
    assert results.means() == {"ego_choice": 0.5, "ego_loss": 1.0, "exo_qa_hand": 0.25, "exo_qa": 0.25}


def test_means_over_ranks_weigh_clips_not_ranks(monkeypatch):
    ranks = []
    for answers in (["left"] * 3, ["right"]):
        results = QAResults()
        results.predictions += [score_text(Question(0, "qa_hand", "?", "left"), answer, **WHERE) for answer in answers]
        ranks.append(results)
    monkeypatch.setattr("lightning_modules.validation.scores.gather_objects", lambda _: [r._sums() for r in ranks])
    assert ranks[0].means()["ego_qa"] == 0.75


def test_consistency_by_hand():
    def answers(*given):
        questions = [CHOICE, *(Question(0, f"qa_{kind}", "?", "left") for kind in ("hand", "side"))]
        scores = [[(-float(option != given[0]), 1) for option in OPTIONS], *given[1:]]
        first = score_choice(questions[0], scores[0], **WHERE)
        return [first, *(score_text(q, text, **WHERE) for q, text in zip(questions[1:], given[1:], strict=True))]

    by_input = {
        "y": answers("c", "left", "up"),
        "x": answers("a", "Left.", "up"),
        "both": answers("c", "left", "left"),
    }
    comparisons = compare(by_input)
    assert [c.same() for c in comparisons] == [False, True, False]
    assert [c.same("y", "x") for c in comparisons] == [False, True, True]
    assert comparisons[0].record()["right"] == {"y": True, "x": False, "both": True}
    found = shares(comparisons * 2)
    assert found.keys() == {"choice", "qa", "qa_hand", "qa_side"}
    assert found["choice"] == {
        **{"n": 2, "right_y": 1, "right_x": 0, "right_both": 1},
        **{"same_y": 1, "same_x": 0, "same": 0, "right": 0},
    }
    assert found["qa"] == {
        **{"n": 4, "right_y": 0.5, "right_x": 0.5, "right_both": 1},
        **{"same_y": 0.5, "same_x": 0.5, "same": 0.5, "right": 0.5},
    }


def test_table_of_consistency_names_the_inputs_that_stages_have(tmp_path):
    chance = {"choice": 0.25}
    three = {"n": 40.0, "right_x": 0.5, "right_mapped": 0.4, "right_both": 0.6, "same_x": 0.7, "same_mapped": 0.8}
    three |= {"same": 0.3, "right": 0.2}
    four = three | {"right_y": 0.9, "same_y": 1.0}
    for number, found in ((2, four), (3, three)):
        consistency = {"choice": found, "qa_hand": found}
        write_metrics(_stage(tmp_path, number), f"stage{number}", 40, {"ego_choice": 0.6}, chance, consistency)
    table = write_report(tmp_path).split("\n\n")[-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0][3:] == [
        *("right: y", "right: x", "right: F(x)", "right: both"),
        *("same: y", "same: x", "same: F(x)", "all same", "all right"),
    ]
    assert cells[2:] == [
        ["stage2", "four-way choice", "40", "90.0", "50.0", "40.0", "60.0", "100.0", "70.0", "80.0", "30.0", "20.0"],
        ["stage3", "four-way choice", "40", "", "50.0", "40.0", "60.0", "", "70.0", "80.0", "30.0", "20.0"],
    ]


def test_report_table(tmp_path):
    chance = {"caption": 0.1, "choice": 0.25, "qa": 0.5, "qa_hand": 0.5}
    write_metrics(_stage(tmp_path, 1), "stage1", 40, {"exo_caption": 0.5, "exo_choice": 1.0, "ego_choice": 0.3}, chance)
    write_metrics(
        _stage(tmp_path, 3), "stage3", 40, {"ego_choice": 0.875, "ego_qa_hand": 2 / 3, "ego_loss": 1.0}, chance
    )
    table = write_report(tmp_path)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["view", "held-out, 40 clips", "chance", "stage1", "stage3"]
    assert cells[2:] == [
        ["exocentric", "caption, exact match", "10.0", "50.0", ""],
        ["exocentric", "four-way choice", "25.0", "100.0", ""],
        ["egocentric", "four-way choice", "25.0", "30.0", "87.5"],
        ["egocentric", "questions, hand", "50.0", "", "66.7"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert (tmp_path / "results.md").read_text() == table + "\n"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stage3"]["metrics"] == {"ego_choice": 0.875, "ego_qa_hand": 2 / 3, "ego_loss": 1.0}


def test_a_run_in_a_folder_of_any_name_is_reported(tmp_path):
    (tmp_path / "tau2").mkdir()
    write_metrics(tmp_path / "tau2", "stage2", 40, {"ego_choice": 0.5}, {"choice": 0.25})
    assert "tau2" in write_report(tmp_path).splitlines()[0]


def test_report_without_stages_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no stage has been evaluated: run `make stage1` first"):
        write_report(tmp_path)


def _stage(folder, number):
    path = folder / f"stage{number}"
    path.mkdir()
    return path
