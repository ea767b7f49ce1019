"""Banks of wordings: ten different ones for each task and level, filled, joined and drawn as they should be."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import yaml

from datamodules.egoit.datamodule import VIDEO_TAG, Wording
from datamodules.egoit.records import Record, row
from datamodules.egoit.templates import BANK_SIZE, FOLDER, LEVELS, TASKS, Templates, draw

SOURCES = ("egtea", "ssv2", "egotimeqa", "openeqa", "egoexolearn", "somebody_elses")
OPTIONS = ("on the table", "in the sink", "in the drawer", "on the shelf")
VIEWPOINT = re.compile(
    r"ego|first.person|wear|camera|head|filming|films|viewer|\bown\b|\bI\b|\bmy\b|\bme\b|\byou\b|\byour\b",
    re.IGNORECASE,
)


def wording(task, source):
    question = {"qa": "Where did I put the knife?", "mcq": "Where did I put the knife?", "description": "Name hands."}
    options = OPTIONS if task == "mcq" else ()
    return Wording(task, source, question.get(task, ""), options, "in the drawer")


@pytest.fixture(scope="module")
def templates():
    return Templates()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("task", TASKS)
def test_ten_wordings_differ_and_are_filled(templates, task, source, level):
    made = wording(task, source)
    questions = [templates.turn(made, level, number)[0] for number in range(BANK_SIZE)]
    assert len(set(questions)) == 10
    for question in questions:
        assert not re.search(r"[{}]|  | \n|\n\n", question) and question == question.strip() != ""
        assert VIDEO_TAG not in question
        if task == "qa":
            assert question.endswith(made.query)
        if task == "mcq":
            assert question.count(made.query) == 1
            assert "\n(A) on the table\n(B) in the sink\n(C) in the drawer\n(D) on the shelf" in question
        if task == "description":
            assert (made.query in question) == (level != "base")
        if level == "base":
            assert not VIEWPOINT.search(question.replace(made.query, ""))
    if level == "task_ego":
        assert sum(bool(VIEWPOINT.search(question.replace(made.query, ""))) for question in questions) >= 8


def test_levels_add_to_each_other(templates):
    for task in TASKS:
        for number in range(BANK_SIZE):
            base, more, ego = (templates.turn(wording(task, "egtea"), level, number)[0] for level in LEVELS)
            assert set(base.split()) <= set(more.split()) <= set(ego.split())
            assert len(base) < len(more) < len(ego)


def test_sources_have_their_own_banks(templates):
    kitchen, motion, other = (templates.turn(wording("action", s), "task_ego", 0)[0] for s in ("egtea", "ssv2", "x"))
    assert "kitchen" in kitchen and "direction and outcome" in motion
    assert len({kitchen, motion, other}) == 3
    rooms = [templates.turn(wording("qa", "openeqa"), "task_ego", n)[0] for n in range(BANK_SIZE)]
    assert not any(re.search(r"\bhands?\b", room) for room in rooms)  # a scan of rooms shows none
    for number in range(BANK_SIZE):
        text, _ = templates.turn(wording("action", "ssv2"), "task", number)
        assert re.search(r"direction|where|way they end|leads", text), text


@pytest.mark.parametrize(
    ("task", "target", "answer"),
    [
        ("action", "cut tomato", "cut tomato"),
        ("qa", "in the drawer", "In the drawer."),
        ("qa", "Yes!", "Yes!"),
        ("description", "take the pan", "Take the pan."),
        ("mcq", "in the drawer", "(C) in the drawer"),
    ],
)
def test_answers_have_the_form_of_their_task(templates, task, target, answer):
    made = Wording(task, "x", "?", OPTIONS if task == "mcq" else (), target)
    assert {templates.turn(made, level, n)[1] for level in LEVELS for n in range(BANK_SIZE)} == {answer}


def test_a_row_holds_the_clip_once_and_what_it_was_made_from(templates):
    made = wording("mcq", "egotimeqa")
    written = row(Record("9", "v.mp4", made, "train", "", (0, 1)), templates, "task", seed=4)
    assert written["conversations"][0]["value"].count(VIDEO_TAG) == 1
    assert written["conversations"][0]["value"].startswith(f"{VIDEO_TAG}\n")
    assert written["template_id"] == draw(4, 0, "egotimeqa/9")
    assert (
        written["conversations"][0]["value"]
        == f"{VIDEO_TAG}\n" + templates.turn(made, "task", draw(4, 0, "egotimeqa/9"))[0]
    )
    assert (written["start"], written["end"]) == (0.0, 1.0)
    assert all(type(written[key]) is float for key in ("start", "end", "duration"))


def test_draws_depend_on_seed_epoch_and_name_only():
    assert [draw(0, 0, "egtea/a"), draw(0, 1, "egtea/a"), draw(1, 0, "egtea/a")] == [5, 2, 5]  # sha256sum, modulo 10
    counts = Counter(draw(0, 0, f"egtea/{number}") for number in range(10_000))
    assert set(counts) == set(range(10))
    assert all(abs(count - 1000) < 120 for count in counts.values())  # four standard deviations
    same = sum(draw(0, 0, f"{number}") == draw(0, 1, f"{number}") for number in range(10_000))
    assert abs(same - 1000) < 120  # another epoch is another draw


def entries(**changes):
    pieces = {"task": "t", "ego": "e"}
    return [{"id": n, "base": f"b{n} {{question}}", **pieces} | (changes if n == 3 else {}) for n in range(10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", r"qa\.yaml: no YAML"),
        ("[]", r"qa\.yaml: expected keys and values"),
        ({"default": entries()}, r"answer is None, allowed: phrase, sentence, letter"),
        ({"answer": "phrase"}, "there are 0 banks"),
        ({"answer": "phrase", "default": entries()[:9]}, r"default: ids are \[0, 1, .*, 8\], expected 0 to 9 in order"),
        ({"answer": "phrase", "default": entries(ego=3)}, r"default\[3\]: expected texts ego, base, task"),
        ({"answer": "phrase", "default": entries(order=["base"])}, r"default\[3\]: expected texts .* and an order"),
        ({"answer": "phrase", "default": entries(task="{answer}")}, r"default\[3\]: slot answer: allowed: question"),
        ({"answer": "phrase", "default": entries(order=5)}, r"default\[3\]: expected texts .* and an order"),
        ({"answer": "phrase", "order": 5, "default": entries()}, r"default\[0\]: expected texts .* and an order"),
        ({"answer": "phrase", "default": 5}, r"default: got 5, expected a list of 10 entries"),
        ({"answer": "phrase", "default": entries(base="What?")}, r"default\[3\]: base lacks question in braces"),
        ({"answer": "phrase", "default": entries(base="b1 {question}")}, r"default\[3\]: base is that of \[1\]"),
    ],
)
def test_banks_that_cannot_be_used_are_refused(tmp_path, content, message):
    (tmp_path / "qa.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        Templates(tmp_path)


def test_a_bank_of_choices_must_show_them(tmp_path):
    (tmp_path / "mcq.yaml").write_text(yaml.safe_dump({"answer": "letter", "default": entries()}))
    with pytest.raises(ValueError, match=r"mcq\.yaml: default\[0\]: base lacks options in braces"):
        Templates(tmp_path)


@pytest.mark.parametrize("count", [2, 5])
def test_prompts_of_choices_do_not_count_them(templates, count):
    options = tuple("abcde"[:count])
    made = Wording("mcq", "mine", "Which?", options, "b")
    said = " ".join(templates.turn(made, "task_ego", number)[0] for number in range(BANK_SIZE))
    assert not re.search(r"\b(two|three|four|five) of\b", said)


def test_missing_banks_and_impossible_choices_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: holds no templates: give a folder with any of action\.yaml"):
        Templates(tmp_path)
    (tmp_path / "qa.yaml").write_text(yaml.safe_dump({"answer": "phrase", "mine": entries()}))
    own = Templates(tmp_path)
    assert own.turn(wording("qa", "mine"), "task_ego", 3) == (f"e b3 {wording('qa', 'mine').query} t", "in the drawer")
    with pytest.raises(ValueError, match=r"no templates for task 'action', there are: qa"):
        own.turn(wording("action", "mine"), "base", 0)
    with pytest.raises(ValueError, match=r"no templates for task 'qa'"):
        own.turn(wording("qa", "other"), "base", 0)
    wrong = Wording("mcq", "x", "?", OPTIONS, "elsewhere")
    with pytest.raises(ValueError, match="target 'elsewhere' is none of the options"):
        Templates().turn(wrong, "base", 0)


def test_the_banks_come_with_the_package():
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(TASKS)
