"""Template banks: ten different prompts for each task and style, filled, joined and drawn as documented."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from datamodules.egoit.records import InstructionRecord, PromptFields, to_json, write_rows
from datamodules.egoit.templates import BANK_SIZE, FOLDER, STYLES, TASKS, Templates, draw
from datamodules.io.conversation import VIDEO_TAG
from datamodules.tools.export import Rendering, export

SOURCES = ("egtea", "ssv2", "egotimeqa", "openeqa", "egoexolearn", "somebody_elses")
OPTIONS = ("on the table", "in the sink", "in the drawer", "on the shelf")
VIEWPOINT = re.compile(
    r"ego|first.person|wear|camera|head|filming|films|viewer|\bown\b|\bI\b|\bmy\b|\bme\b|\byou\b|\byour\b",
    re.IGNORECASE,
)


def record_of(task, source, query, target, options=()):
    return InstructionRecord("id", "v.mp4", PromptFields(task, query, target, options), source=source)


def sample(task, source):
    question = {"qa": "Where did I put the knife?", "mcq": "Where did I put the knife?", "description": "Name hands."}
    options = OPTIONS if task == "mcq" else ()
    return record_of(task, source, question.get(task, ""), "in the drawer", options)


@pytest.fixture(scope="module")
def templates():
    return Templates()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("task", TASKS)
def test_ten_prompts_differ_and_are_filled(templates, task, source, style):
    record = sample(task, source)
    query = record.prompt.query
    questions = [templates.render(record, style, number)[0] for number in range(BANK_SIZE)]
    assert len(set(questions)) == 10
    for question in questions:
        assert not re.search(r"[{}]|  | \n|\n\n", question) and question == question.strip() != ""
        assert VIDEO_TAG not in question
        if task == "qa":
            assert question.endswith(query)
        if task == "mcq":
            assert question.count(query) == 1
            assert "\n(A) on the table\n(B) in the sink\n(C) in the drawer\n(D) on the shelf" in question
        if task == "description":
            assert (query in question) == (style != "base")
        if style == "base":
            assert not VIEWPOINT.search(question.replace(query, ""))
    if style == "task_ego":
        assert sum(bool(VIEWPOINT.search(question.replace(query, ""))) for question in questions) >= 8


def test_styles_add_to_each_other(templates):
    for task in TASKS:
        for number in range(BANK_SIZE):
            base, more, ego = (templates.render(sample(task, "egtea"), style, number)[0] for style in STYLES)
            assert set(base.split()) <= set(more.split()) <= set(ego.split())
            assert len(base) < len(more) < len(ego)


def test_sources_have_their_own_banks(templates):
    kitchen, motion, other = (templates.render(sample("action", s), "task_ego", 0)[0] for s in ("egtea", "ssv2", "x"))
    assert "kitchen" in kitchen and "direction and outcome" in motion
    assert len({kitchen, motion, other}) == 3
    rooms = [templates.render(sample("qa", "openeqa"), "task_ego", n)[0] for n in range(BANK_SIZE)]
    assert not any(re.search(r"\bhands?\b", room) for room in rooms)  # a scan of rooms shows none
    for number in range(BANK_SIZE):
        text, _ = templates.render(sample("action", "ssv2"), "task", number)
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
    record = record_of(task, "x", "?", target, OPTIONS if task == "mcq" else ())
    assert {templates.render(record, style, n)[1] for style in STYLES for n in range(BANK_SIZE)} == {answer}


def test_an_exported_row_holds_the_clip_once_and_its_prompt_fields(templates, tmp_path):
    record = replace(sample("mcq", "egotimeqa"), id="egotimeqa/9", window_s=(0, 1))
    write_rows(tmp_path / "mine.jsonl", [to_json(record)])
    export([tmp_path / "mine.jsonl"], "swift", tmp_path / "out", rendering=Rendering(templates, "task", seed=4))
    row = json.loads((tmp_path / "out" / "mine.jsonl").read_text())
    text = row["conversations"][0]["value"]
    assert text.count(VIDEO_TAG) == 1
    assert text.startswith(f"{VIDEO_TAG}\n")
    assert row["template_id"] == draw(4, 0, "egotimeqa/9")
    assert text == f"{VIDEO_TAG}\n" + templates.render(record, "task", draw(4, 0, "egotimeqa/9"))[0]
    assert (row["task"], row["query"], row["options"].split("\n")) == ("mcq", record.prompt.query, [*OPTIONS])
    assert (row["start"], row["end"]) == (0.0, 1.0)
    assert all(type(row[key]) is float for key in ("start", "end", "duration"))


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
        ("a: [", r"qa\.yaml: invalid YAML"),
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
        ({"answer": "phrase", "default": entries(base="b1 {question}")}, r"default\[3\]: base equals that of \[1\]"),
    ],
)
def test_invalid_banks_are_refused(tmp_path, content, message):
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
    record = record_of("mcq", "mine", "Which?", "b", options)
    prompts = " ".join(templates.render(record, "task_ego", number)[0] for number in range(BANK_SIZE))
    assert not re.search(r"\b(two|three|four|five) of\b", prompts)


def test_missing_banks_and_impossible_choices_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: holds no templates: give a folder with any of action\.yaml"):
        Templates(tmp_path)
    (tmp_path / "qa.yaml").write_text(yaml.safe_dump({"answer": "phrase", "mine": entries()}))
    own = Templates(tmp_path)
    record = sample("qa", "mine")
    assert own.render(record, "task_ego", 3) == (f"e b3 {record.prompt.query} t", "in the drawer")
    with pytest.raises(ValueError, match=r"no templates for task 'action', there are: qa"):
        own.render(sample("action", "mine"), "base", 0)
    with pytest.raises(ValueError, match=r"no templates for task 'qa'"):
        own.render(sample("qa", "other"), "base", 0)
    with pytest.raises(ValueError, match="target 'elsewhere' is none of the options"):
        PromptFields("mcq", "?", "elsewhere", OPTIONS)
    with pytest.raises(ValueError, match=r"target 'x' is none of the options \[\]"):
        Templates().render(record_of("mcq", "x", "?", "x"), "base", 0)


ASSUMPTIONS = re.compile(r"\b(hands?|tools?|held|holds?|moved|changed|touch\w*|kitchen|cook\w*|rooms?|home|table)\b")


def pieces():
    """Yield task, bank, name of a piece and its text for every template of this repository."""
    for file in sorted(FOLDER.glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for bank, entries in content.items():
            if bank not in ("answer", "order", "join"):
                for entry in entries:
                    yield from ((file.stem, bank, name, entry[name]) for name in ("base", "task", "ego"))


@pytest.mark.parametrize(("task", "bank", "name", "text"), pieces())
def test_every_piece_is_a_plain_instruction(task, bank, name, text):
    """Pieces are sentences, have the slots of their task, and assume nothing that some question does not have."""
    assert text.endswith((".", "?", "{question}", "{options}"))
    assert len(text.split()) >= 3 or "{" in text
    slots = {
        ("qa", "base"): ["question"],
        ("mcq", "base"): ["question", "options"],
        ("description", "task"): ["question"],
    }
    assert re.findall(r"\{(\w+)\}", text) == slots.get((task, name), [])
    if bank == "default" or task == "qa":
        assert not ASSUMPTIONS.search(text)


def test_the_banks_come_with_the_package():
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(TASKS)
