"""Scores of prediction files: by hand, at chance, under the invariances of ranking, and as a table."""

import ast
import csv
import json
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from datamodules.egobench import TaskName
from lightning_modules.egobench.published import AVERAGED, PAPER
from lightning_modules.egobench.results import read_scores, score_folder, table
from lightning_modules.egobench.scores import Score
from lightning_modules.egobench.scoring import score
from lightning_modules.egobench.tasks import TASKS
from lightning_modules.egobench.tasks.multiple_choice import parse_choice

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "benchmarks"
samples_only = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs the annotations of {SAMPLES}")


def test_every_task_name_has_a_task():
    assert tuple(TASKS) == get_args(TaskName)


def header(task, total, **more):
    return {"benchmark": "toy", "task": task, "total": total, "missing": {}, "settings": {}, **more}


def by_name(scores):
    return {number.metric: number for number in scores}


def values(scores):
    return {number.metric: number.value for number in scores}


def choice(number, letters, answer, generated=None, **more):
    cross_check = {} if generated is None else {"said": generated}
    return {"id": f"q{number}", "groups": [], "answer": answer, "letters": letters, **cross_check, **more}


CHOICES = [
    choice(0, [[-1.0, -2.0]], 0, likelihood=[-2.0, -1.0], generated="(A)", groups=["seen"]),
    choice(1, [[-1.0, -2.0]], 1, likelihood=[-2.0, -1.0], generated="B) the mug", groups=["seen"]),
    choice(2, [[-2.0, -1.0]], 1, likelihood=[-2.0, -1.0], generated="the red mug", options=["a mug", "a red mug"]),
    choice(3, [[-2.0, -1.0, -3.0, -3.0]], 1, likelihood=[-2.0, -3.0, -4.0, -5.0], generated="either A or B"),
]


def test_choices_by_hand():
    found = by_name(score(header("choice", 4), CHOICES))
    assert list(found) == [
        "accuracy",
        "accuracy/seen",
        "accuracy_likelihood",
        "accuracy_likelihood/seen",
        "parse_fail_rate",
        "agreement",
    ]
    error = pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert found["accuracy"] == Score("toy", "accuracy", 0.75, error, (3 / 2 + 1 / 4) / 4, 4, 4)
    assert found["accuracy/seen"] == Score("toy", "accuracy/seen", 0.5, pytest.approx(0.125**0.5), 0.5, 2, 2)
    assert found["accuracy_likelihood"].value == 0.5
    assert found["parse_fail_rate"].value == 0.25
    assert found["agreement"].value == 0.5  # of q0 and q2; q1 named the other letter, q3 none


def test_generation_is_compared_with_what_it_saw():
    rotated = [[-1.0, -2.0], [-1.0, -9.0]]  # A where A is shown first, but B on the mean
    found = values(score(header("choice", 1), [choice(0, rotated, 1, generated="(A)")]))
    assert found == {"accuracy": 1.0, "parse_fail_rate": 0.0, "agreement": 1.0}
    turned = [[-2.0, -1.0], [-1.0, -9.0]]
    found = values(score(header("choice", 1), [choice(0, turned, 1, generated="(B)")]))
    assert found == {"accuracy": 1.0, "parse_fail_rate": 0.0, "agreement": 1.0}


def test_a_part_is_never_under_the_plain_name():
    rows = [*CHOICES[:3], choice(3, [[-1.0, -2.0]], None)]
    found = by_name(score(header("choice", 6, missing={"q9": "no such file"}), rows))
    assert {"accuracy", "accuracy/seen", "accuracy_likelihood"}.isdisjoint(found)
    assert (found["accuracy_partial"].n, found["accuracy_partial"].total) == (3, 6)
    assert (found["accuracy_partial/seen"].n, found["accuracy_partial/seen"].total) == (2, None)
    assert (found["asked"].value, found["asked"].n, found["asked"].total) == (4 / 6, 4, 6)


def test_how_many_texts_a_part_leaves_out_is_not_known():
    found = by_name(score(header("rank_texts", 30), clips_of_mir(), texts_of_mir()))
    totals = {name: (found[f"map{name}_partial"].n, found[f"map{name}_partial"].total) for name in ("", "_v2t", "_t2v")}
    assert totals == {"": (24, 30), "_v2t": (24, 30), "_t2v": (12, None)}


def test_hidden_answers_are_not_scored():
    found = by_name(score(header("choice", 4), [*CHOICES[:3], choice(3, [[-1.0, -2.0]], None)]))
    assert "accuracy" not in found
    assert (found["accuracy_partial"].value, found["accuracy_partial"].n) == (pytest.approx(2 / 3), 3)
    assert "asked" not in found
    assert score(header("choice", 1), [choice(0, [[-1.0, -2.0]], None)]) == []


@pytest.mark.parametrize("task", ["choice", "open", "vocabulary", "rank_texts", "rank_clips"])
def test_nothing_asked_yet(task):
    texts = {"vocabulary": VOCABULARY, "rank_texts": CLASSES}.get(task, ())
    assert score(header(task, 3), [], texts) == [Score("toy", "asked", 0.0, None, None, 0, 3)]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(B)", 1),
        ("b", 1),
        (" C. ", 2),
        ("B) stop", 1),
        ("I pick (a), of course", 0),
        ("(A) or (B)", None),
        ("Stop.", 1),
        ("Turn left and move forward", 2),
        ("move forward", 0),
        ("stop, then turn left", 1),
        ("stop, then move forward", None),
        ("(D)", None),
        ("A dog", None),
        ("", None),
        ("B, because (A) is wrong", 1),
        ("B, because (A) and (C) show another room.", 1),
        ("B. (A) would need a cup.", 1),
        ("B because A is a dog", 1),
        ("Answer: B", 1),
        ("answer: b.", 1),
        ("The answer is B.", 1),
        ("The correct answer is (B), not (A).", 1),
        ("**Answer:** (C)", 2),
        ("Best option: (C) since (A) comes later", 2),
        ("Option B", 1),
        ("(A) is wrong, so the answer is B", 1),
        ("Because (A) is wrong, the answer is (C).", 2),
        ("Stop, because (A) is wrong", 1),
        ("It is (B), not (A).", 1),
        ("Answer: A or B", None),
        ("A, B", None),
        ("A and C", None),
        ("Either A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("The answer is a dog", None),
        ("The answer is not A", None),
        ("Answer: stop", 1),
    ],
)
def test_generated_choices_are_read_strictly(text, choice):
    assert parse_choice(text, 3, ["Move forward", "Stop", "Turn left and move forward"]) == choice


def test_open_answers_by_hand():
    pairs = [("two cups", "2 cups"), ("a table", "Table."), ("no", "yes"), ("yes", "yes")]
    rows = [
        {"id": f"o{n}", "groups": [], "question": "?", "answer": right, "prediction": prediction}
        for n, (prediction, right) in enumerate(pairs)
    ]
    found = by_name(score(header("open", 4), rows))
    assert list(found) == ["em", "plain_acc", "rouge1", "rouge2", "rougeL", "bleu"]
    assert (found["em"].value, found["em"].chance) == (0.75, 0.5)
    assert (found["plain_acc"].value, found["plain_acc"].chance) == (0.25, 0.5)
    assert found["rougeL"].value == pytest.approx((1 / 2 + 2 / 3 + 0 + 1) / 4)
    assert "em_partial" in by_name(score(header("open", 5), rows))


VOCABULARY = [{"text": text} for text in ("yes", "no", "cup")]


def answer(number, right, scores, priors, **more):
    return {
        "id": f"v{number}",
        "groups": ["direct"],
        "question": "?",
        "answer": right,
        "scores": scores,
        "priors": priors,
    } | more


def test_vocabulary_by_hand():
    rows = [
        answer(0, "cup", [-1.0, -2.0, -3.0], [-1.0, -2.0, -5.0], prediction="A cup."),  # right with the prior only
        answer(1, "yes", [-2.0, -3.0, -1.0], [-1.0, -1.0, -1.0], prediction="no"),  # right among yes and no
        answer(2, "yes", [-2.0, -1.0, -1.5], [-2.0, -0.5, -0.5], prediction="yes"),
        answer(3, "a jug", [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], prediction="jug"),  # not in the vocabulary
    ]
    found = by_name(score(header("vocabulary", 4), rows, VOCABULARY))
    assert {name: number.value for name, number in found.items()} == {
        "accuracy": 0.5,
        "accuracy/direct": 0.5,
        "accuracy_likelihood": 0.0,
        "accuracy_likelihood/direct": 0.0,
        "accuracy_binary": 0.5,
        "em": 0.75,
    }
    assert (found["accuracy"].chance, found["accuracy"].n) == (0.5, 4)  # always yes
    assert (found["accuracy_binary"].chance, found["accuracy_binary"].n) == (1.0, 2)


CLASSES = [{"text": f"class {n}", "labels": {"class": n}, "prior": -float(n)} for n in range(5)]


def clips_of_classes(n=40, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "id": f"{i:03}",
            "labels": {"classes": np.flatnonzero(generator.random(5) < 0.4).tolist()},
            "scores": generator.standard_normal(5).tolist(),
        }
        for i in range(n)
    ]


def texts_of_mir(n=12, seed=1):
    generator = np.random.default_rng(seed)
    return [
        {"text": f"t{j}", "labels": {"verb": j % 3, "nouns": [j % 4]}, "prior": float(generator.standard_normal())}
        for j in range(n)
    ]


def clips_of_mir(n=24, texts=12, seed=2):
    generator = np.random.default_rng(seed)
    return [
        {
            "id": f"{i:03}",
            "labels": {"verb": i % 3, "nouns": [i % 4]},
            "scores": generator.standard_normal(texts).tolist(),
        }
        for i in range(n)
    ]


def shifted(rows, by):
    return [row | {"scores": (np.array(row["scores"]) + by(number)).tolist()} for number, row in enumerate(rows)]


def under_shifts(texts, rows):
    """Scores as they are, with a constant added for each text, and with one for each clip."""
    of_text, of_clip = (np.random.default_rng(5).standard_normal(n) * 3 for n in (len(texts), len(rows)))
    changed = rows, shifted(rows, lambda _: of_text), shifted(rows, lambda number: of_clip[number])
    return [values(score(header("rank_texts", len(rows)), each, texts)) for each in changed]


def test_which_shift_changes_which_class_score():
    plain, of_text, of_clip = under_shifts(CLASSES, clips_of_classes())
    assert of_text["map"] == pytest.approx(plain["map"])
    assert of_text["map_calibrated"] != pytest.approx(plain["map_calibrated"], abs=1e-3)  # by the sum over texts
    assert plain["map_likelihood"] == pytest.approx(plain["map"])  # the prior is a constant of the text
    assert of_clip["map"] != pytest.approx(plain["map"], abs=1e-3)
    assert of_clip["map_calibrated"] == pytest.approx(plain["map_calibrated"])
    assert plain["map_calibrated"] != pytest.approx(plain["map"], abs=1e-3)


@pytest.mark.parametrize("metric", ["map", "ndcg"])
def test_which_shift_changes_which_retrieval_score(metric):
    plain, of_text, of_clip = under_shifts(texts_of_mir(), clips_of_mir())
    v2t, t2v = f"{metric}_v2t", f"{metric}_t2v"
    assert of_text[t2v] == pytest.approx(plain[t2v])
    assert of_text[v2t] != pytest.approx(plain[v2t], abs=1e-3)
    assert of_clip[v2t] == pytest.approx(plain[v2t])
    assert of_clip[t2v] != pytest.approx(plain[t2v], abs=1e-3)
    assert plain[f"{v2t}_calibrated"] == pytest.approx(plain[v2t])
    assert plain[f"{t2v}_calibrated"] != pytest.approx(plain[t2v], abs=1e-3)
    assert plain[f"{t2v}_likelihood"] == pytest.approx(plain[t2v])
    assert plain[f"{v2t}_likelihood"] != pytest.approx(plain[v2t], abs=1e-3)
    assert of_clip[f"{t2v}_calibrated"] == pytest.approx(plain[f"{t2v}_calibrated"])
    assert plain[metric] == pytest.approx((plain[v2t] + plain[t2v]) / 2)


def test_a_constant_of_the_text_changes_no_choice_among_clips():
    generator = np.random.default_rng(7)
    rows = [
        {"id": str(n), "groups": ["ab"[n % 2]], "answer": n % 5, "scores": generator.standard_normal(5).tolist()}
        for n in range(50)
    ]
    plain = values(score(header("rank_clips", 50), rows))
    assert list(plain) == ["accuracy/a", "accuracy/b"]  # no average
    constants = generator.standard_normal(50)
    assert values(score(header("rank_clips", 50), shifted(rows, lambda n: constants[n]))) == plain


def test_without_priors_only_the_likelihood_is_scored():
    texts = [row | {"prior": None} for row in texts_of_mir()]
    found = values(score(header("rank_texts", 24), clips_of_mir(), texts))
    kinds = {name.removeprefix("map").removeprefix("ndcg").removeprefix("_v2t").removeprefix("_t2v") for name in found}
    assert kinds == {"_likelihood", "_likelihood_calibrated"}
    halfway = [*texts[:3], texts_of_mir()[3]]
    rows = [row | {"scores": row["scores"][:4]} for row in clips_of_mir()]
    with pytest.raises(ValueError, match="text 1: field 'prior' is null, in other lines it is not: give all texts"):
        score(header("rank_texts", 24), rows, halfway)


def test_absent_classes_are_reported():
    rows = [row | {"labels": {"classes": [0, 1]}} for row in clips_of_classes(5)]
    with pytest.warns(UserWarning, match="3 of 5 classes occur in no scored clip and are left out"):
        score(header("rank_texts", 5), rows, CLASSES)


def test_order_of_rows_changes_nothing():
    rows = [row | {"scores": np.round(row["scores"]).tolist()} for row in clips_of_classes()]  # with ties
    expected = score(header("rank_texts", 40), rows, CLASSES)
    assert score(header("rank_texts", 40), rows[::-1], CLASSES) == expected
    assert score(header("choice", 4), CHOICES[::-1]) == score(header("choice", 4), CHOICES)


def near_chance(number, sigmas=4):
    assert abs(number.value - number.chance) < sigmas * number.standard_error, number


def random_choices(answers, options, seed=0):
    generator = np.random.default_rng(seed)
    return [choice(n, [generator.standard_normal(options).tolist()], right) for n, right in enumerate(answers)]


def test_random_scores_land_on_chance():
    generator = np.random.default_rng(8)
    near_chance(score(header("choice", 2000), random_choices([n % 4 for n in range(2000)], 4))[0])
    clips = [
        {"id": str(n), "groups": ["intra"], "answer": n % 5, "scores": generator.standard_normal(5).tolist()}
        for n in range(2000)
    ]
    near_chance(score(header("rank_clips", 2000), clips)[0])
    answers = ["yes", "no", "cup", "cup"] * 500
    rows = [answer(n, right, generator.standard_normal(3).tolist(), [0.0] * 3) for n, right in enumerate(answers)]
    found = by_name(score(header("vocabulary", 2000), rows, VOCABULARY))
    assert abs(found["accuracy"].value - 1 / 3) < 4 * found["accuracy"].standard_error
    near_chance(found["accuracy_binary"])
    constant = [row | {"scores": [0.0, 0.0, 1.0]} for row in rows]
    assert (
        found["accuracy"].chance == values(score(header("vocabulary", 2000), constant, VOCABULARY))["accuracy"] == 0.5
    )
    texts = texts_of_mir()
    found = by_name(score(header("rank_texts", 600), clips_of_mir(600), [text | {"prior": 0.0} for text in texts]))
    for name in ("map_v2t", "ndcg_v2t"):
        near_chance(found[name])
    found = by_name(score(header("rank_texts", 600), clips_of_classes(600), CLASSES))
    near_chance(found["map"])


@samples_only
def test_random_scores_of_real_choices_land_on_chance():
    letters = "ABCDE"
    egoschema = json.loads((SAMPLES / "egoschema" / "subset_answers.json").read_text())
    vln = json.loads((SAMPLES / "vlnqa" / "vlnqa.json").read_text())
    plans = json.loads((SAMPLES / "egoplan" / "egoplan2.json").read_text())
    tasks = json.loads((SAMPLES / "egotaskqa" / "egotaskqa_mcq.json").read_text())
    cases = (
        (500, 5, list(egoschema.values())),
        (200, 4, [letters.index(row["gt"]) for row in vln]),
        (1321, 4, [letters.index(row["golden_choice_idx"]) for row in plans]),
        (8783, 5, [letters.index(row["a"]) for row in tasks]),
    )
    for count, options, answers in cases:
        number = score(header("choice", len(answers)), random_choices(answers, options))[0]
        assert (number.n, number.chance) == (count, pytest.approx(1 / options))
        near_chance(number)


@samples_only
def test_random_scores_of_real_clips_land_on_chance():
    generator = np.random.default_rng(0)
    with (SAMPLES / "epic100_mir" / "EPIC_100_retrieval_test.csv").open(encoding="utf-8") as file:
        labels = [
            {"verb": int(row["verb_class"]), "nouns": ast.literal_eval(row["all_noun_classes"])}
            for row in list(csv.DictReader(file))[:1000]
        ]
    texts = [{"text": str(n), "labels": label, "prior": 0.0} for n, label in enumerate(labels[::3])]
    rows = [
        {"id": str(n), "labels": label, "scores": generator.standard_normal(len(texts)).tolist()}
        for n, label in enumerate(labels)
    ]
    found = by_name(score(header("rank_texts", 9668), rows, texts))
    for name in ("map_v2t", "map_t2v", "ndcg_v2t", "ndcg_t2v"):
        assert found[f"{name}_partial"].value == pytest.approx(found[f"{name}_partial"].chance, rel=0.05)
        assert found[f"{name}_partial"].chance > 0.01


BAD = {
    "choice": (
        CHOICES[0],
        (),
        [
            ({"letters": [[-1.0], [-2.0, -3.0]]}, "field 'letters' has rotations of different lengths"),
            ({"letters": [-1.0, -2.0]}, r"field 'letters\[0\]' is -1.0, expected a valid list"),
            ({"letters": [[-1.0, -2.0, -3.0]] * 2}, "field 'letters' has 2 rotations of 3 options, expected 1 or 3"),
            ({"letters": [[-1.0, float("nan")]]}, r"field 'letters\[0\]\[1\]' is nan, expected a finite number"),
            ({"likelihood": [-1.0]}, "field 'likelihood' has 1 numbers, expected 2, one for each option"),
            ({"answer": 2}, "field 'answer' is 2, expected a number from 0 to 1"),
            ({"answer": "A"}, "field 'answer' is 'A', expected a whole number"),
            ({"answer": True}, "field 'answer' is True, expected a whole number"),
            ({"groups": "seen"}, "field 'groups' is 'seen', 'str' instances are not allowed"),
            ({"options": ["a"]}, "field 'options' has 1 texts, expected 2"),
            ({"id": 7}, "field 'id' is 7, expected a text"),
            ({"letters": None}, "field 'letters' is None, expected a valid list"),
        ],
    ),
    "vocabulary": (
        answer(0, "cup", [-1.0] * 3, [-1.0] * 3),
        VOCABULARY,
        [
            ({"scores": [-1.0]}, "field 'scores' has 1 numbers, expected 3, one for each line of the texts file"),
            ({"priors": ["x"] * 3}, r"field 'priors\[0\]' is 'x', expected a valid number"),
            ({"answer": 3}, "field 'answer' is 3, expected a text"),
        ],
    ),
    "rank_texts": (
        clips_of_classes(1)[0],
        CLASSES,
        [
            ({"labels": {"classes": [9]}}, r"field 'labels' has classes \[9\] that no text has: fix either file"),
            ({"labels": {"class": 1}}, "labels: field 'classes' is missing"),
            ({"labels": [1]}, r"field 'labels' is \[1\], expected a valid dictionary"),
        ],
    ),
    "rank_clips": (
        {"id": "a", "groups": ["inter"], "answer": 0, "scores": [-1.0, -2.0]},
        (),
        [
            ({"groups": []}, "field 'groups' is empty, and only groups are scored"),
            ({"answer": None}, "field 'answer' is None"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("task", "change", "message"), [(task, *case) for task, (_, _, cases) in BAD.items() for case in cases]
)
def test_wrong_rows_are_named(task, change, message):
    row, texts, _ = BAD[task]
    with pytest.raises(ValueError, match=f"^row 1:? .*{message}|^row 1: {message}"):
        score(header(task, 1), [row | change], texts)
    for field in change:
        if field not in ("likelihood", "options"):
            with pytest.raises(ValueError, match=f"^row 1: field '{field}' is missing"):
                score(header(task, 1), [{name: value for name, value in row.items() if name != field}], texts)


def test_rows_and_header_that_disagree_are_named():
    with pytest.raises(ValueError, match="row 2: field 'id' is 'q0' as in row 1: remove one"):
        score(header("choice", 4), [CHOICES[0], CHOICES[0]])
    with pytest.raises(ValueError, match="toy: 4 rows, but the header's field 'total' is 3"):
        score(header("choice", 3), CHOICES)
    with pytest.raises(ValueError, match="row 1: field 'id' is 'q0', which the header lists as missing"):
        score(header("choice", 4, missing={"q0": "gone"}), CHOICES)
    with pytest.raises(ValueError, match="header: field 'task' is 'guess', expected one of choice, open, vocabulary"):
        score(header("guess", 4), CHOICES)
    with pytest.raises(ValueError, match="header: field 'total' is '4', expected a whole number"):
        score(header("choice", "4"), CHOICES)
    with pytest.raises(ValueError, match="toy: task is rank_texts, and the texts file is missing or empty"):
        score(header("rank_texts", 4), [])
    with pytest.raises(ValueError, match="toy: the texts file holds a text twice"):
        score(header("vocabulary", 4), [answer(0, "cup", [-1.0] * 2, [-1.0] * 2)], [{"text": "cup"}] * 2)


def write(folder, name, head, rows, texts=()):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.header.json").write_text(json.dumps(head | {"benchmark": name}))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if texts:
        (folder / f"{name}.texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_folder_is_scored(tmp_path):
    write(tmp_path / "predictions", "egoschema", header("choice", 4), CHOICES)
    write(tmp_path / "predictions", "charades_ego", header("rank_texts", 100), clips_of_classes(), CLASSES)
    scores = score_folder(tmp_path)
    charades = score(header("rank_texts", 100, benchmark="charades_ego"), clips_of_classes(), CLASSES)
    assert scores == charades + score(header("choice", 4, benchmark="egoschema"), CHOICES)
    assert read_scores(tmp_path) == scores
    rows = cells((tmp_path / "results.md").read_text())
    assert rows[0] == ["benchmark", "metric", "ours", "±", "paper", "chance", "n of N"]
    assert ["egoschema", "accuracy", "75.0", "21.7", "61.3", "43.8", "4 of 4"] in rows
    assert ["charades_ego", "map", "", "", "70.9*", "", ""] in rows  # never next to a partial score
    partial = next(row for row in rows if row[1] == "map_partial")
    assert (partial[4], partial[6]) == ("", "40 of 100")
    assert "\n* reported, protocol unknown" in (tmp_path / "results.md").read_text()


def test_a_benchmark_without_answers_yet_does_not_hold_up_others(tmp_path):
    write(tmp_path / "predictions", "egoschema", header("choice", 4), CHOICES)
    write(tmp_path / "predictions", "charades_ego", header("rank_texts", 100), [])
    (tmp_path / "predictions" / "charades_ego.jsonl").unlink()
    scores = score_folder(tmp_path)
    assert scores[0] == Score("charades_ego", "asked", 0.0, None, None, 0, 100)
    assert scores[1:] == score(header("choice", 4, benchmark="egoschema"), CHOICES)


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = tmp_path / "predictions"
    with pytest.raises(ValueError, match=r"predictions: holds no <benchmark>.header.json: evaluate a benchmark first"):
        score_folder(tmp_path)
    write(folder, "egoplan", header("choice", 4), [*CHOICES[:1], CHOICES[1] | {"answer": 5}])
    with pytest.raises(ValueError, match=r"egoplan.jsonl line 2: field 'answer' is 5, expected a number from 0 to 1"):
        score_folder(tmp_path)
    (folder / "egoplan.jsonl").write_text('{"id": "q0"\n')
    with pytest.raises(ValueError, match=r"egoplan.jsonl line 1: invalid JSON .*: fix this line"):
        score_folder(tmp_path)
    (folder / "egoplan.header.json").write_text("[]")
    with pytest.raises(ValueError, match=r"egoplan.header.json: expected a JSON object, got list"):
        score_folder(tmp_path)
    (folder / "egoplan.header.json").write_text(json.dumps(header("choice", 4)))
    with pytest.raises(ValueError, match="field 'benchmark' is 'toy', expected 'egoplan' as in the file's name"):
        score_folder(tmp_path)
    write(folder, "egoplan", header("rank_texts", 4), clips_of_classes(1), [*CLASSES[:4], {"text": "x", "prior": 0.0}])
    with pytest.raises(ValueError, match=r"egoplan.texts.jsonl line 5: field 'labels' is missing"):
        score_folder(tmp_path)
    with pytest.raises(ValueError, match=r"metrics.json: holds no list of scores .*: score the folder first"):
        read_scores(tmp_path)


def full(value, keys=AVERAGED):
    return [Score(name, metric, value, 0.01, 0.2, 100, 100) for name, metric in keys]


def test_stages_stand_side_by_side():
    second = [
        Score("vlnqa", "accuracy", 0.5, 0.035, 0.25, 200, 200),
        Score("new", "judge_me_score", 2.5, 0.1, None, 7, 7, "points"),
    ]
    text = table({"stage1": [Score("vlnqa", "accuracy", 0.25, None, 0.25, 200, 200)], "stage2": second})
    assert cells(text)[0] == ["benchmark", "metric", "stage1", "±", "stage2", "±", "paper", "chance", "n of N"]
    assert cells(text)[2:] == [
        ["vlnqa", "accuracy", "25.0", "", "50.0", "3.5", "44.5", "25.0", "200 of 200"],
        ["new", "judge_me_score", "", "", "2.50", "0.10", "", "", "7 of 7"],
    ]
    part = [Score("egomcq", "accuracy_partial/inter", 0.5, 0.1, 0.2, 7, None)]
    assert cells(table({"stage1": part}, paper=False))[2:] == [
        ["egomcq", "accuracy_partial/inter", "50.0", "10.0", "20.0", "7 of ?"]
    ]
    assert [row[1] for row in cells(table({"stage1": part}))[2:]] == [
        "accuracy_partial/inter",
        "accuracy/inter",
        "accuracy/intra",
    ]


def test_the_mean_needs_all_ten_in_full():
    assert len(AVERAGED) == 10
    last = cells(table({"ours": full(0.4), "less": full(0.9, AVERAGED[:9])}))[-1]
    assert last == ["average", "mean of the ten", "40.0", "", "", "", "55.6", "", ""]
    assert "average" not in table({"ours": full(0.4, AVERAGED[1:])})
    part = [Score(*AVERAGED[0][:1], "accuracy_partial", 0.4, 0.01, 0.2, 50, 100)]
    assert "average" not in table({"ours": [*full(0.4, AVERAGED[1:]), *part]})


def test_marks_of_published_numbers():
    marked = Counter(number.mark for number in PAPER.values())
    assert marked == {"": 5, "*": 6, "†": 2}
    assert {key[1] for key, number in PAPER.items() if number.mark == "†"} == {"judge_acc", "judge_score"}
