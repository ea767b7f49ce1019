"""Instruction files of other stacks: conversions are counted, and every invalid row is named."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import InstructionRecord, PromptFields, RecordStore, output_files, to_json, write_rows
from datamodules.io.jsonl import InvalidRecords
from datamodules.tools.data_check import main as check

HUMAN = {"from": "human", "value": "<video>\nWhat is cut?"}
GPT = {"from": "gpt", "value": "A tomato."}
OURS = {"id": "a", "video": "a.mp4", "conversations": [HUMAN, GPT]}
PROMPT = {"id": "p", "video": "a.mp4", "prompt": {"task": "qa", "query": "What is cut?", "target": "a tomato"}}
EXPECTED = InstructionRecord("a", "a.mp4", turns=(("What is cut?", "A tomato."),))


def without(*names, **changes):
    return {name: value for name, value in {**OURS, **changes}.items() if name not in names}


def read(tmp_path, text):
    file = ConversationFile(tmp_path / "some.jsonl")
    file.path.write_text(text if isinstance(text, str) else "".join(json.dumps(record) + "\n" for record in text))
    return file, list(file)


def messages(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.parametrize(
    ("record", "changes"),
    [
        (OURS, []),
        (without(video=["a.mp4"]), ["field 'video' was a list of one"]),
        (without("video", videos=["a.mp4"]), ["field 'videos' read as 'video'", "field 'videos' was a list of one"]),
        (without("video", image={"video": "a.mp4"}), ["field 'image.video' read as 'video'"]),
        (without("video", image="a.mp4"), ["field 'image' read as 'video'"]),
        (without(start=None, end=None, videos=None), []),
        (
            without("conversations", messages=messages("<video>What is cut?", "A tomato.")),
            ["field 'messages' read as 'conversations'", "'role' and 'content' read as 'from' and 'value'"],
        ),
        (
            without(conversations=[{"from": "user", "value": "What is cut?\n<video>"}, GPT]),
            ["<video> moved to the front"],
        ),
        (
            without(conversations=[{"from": "human", "value": "<image>\nWhat is cut?"}, GPT]),
            ["<image> read as <video>"],
        ),
        (
            without(conversations=[{"from": "human", "value": "What is cut?\n<image>"}, GPT]),
            ["<image> read as <video>", "<video> moved to the front"],
        ),
        (
            without(conversations=[{"from": "human", "value": "<image>\n<video>\nWhat is cut?"}, GPT]),
            ["<image> next to <video> dropped"],
        ),
        (
            without(conversations=[{"from": "human", "value": "What is cut?"}, GPT]),
            ["a missing <video> put in front"],
        ),
        (
            without(conversations=[{"from": "system", "value": "Be brief."}, HUMAN, GPT]),
            ["a system text dropped: set it in data.init_args.prompt.system"],
        ),
        (
            without(
                "conversations",
                "video",
                messages=messages(
                    [
                        {"type": "video_url", "video_url": {"url": "a.mp4"}, "text": None},
                        {"type": "text", "text": "What is cut?", "video_url": None},
                    ],
                    [{"type": "text", "text": "A tomato."}],
                ),
            ),
            [
                "field 'messages' read as 'conversations'",
                "'role' and 'content' read as 'from' and 'value'",
                "contents in pieces joined to one text",
                "the video's path taken out of the contents",
            ],
        ),
    ],
)
def test_forms_of_other_stacks_are_read_alike_and_changes_are_counted(tmp_path, record, changes):
    file, found = read(tmp_path, [record, {**record, "id": "b"}])
    assert found == [EXPECTED, replace(EXPECTED, id="b")]
    assert file.problems == []
    assert set(file.changes) == set(changes)
    report = file.report()
    assert report.startswith(f"{file.path}: " if changes else "") and "\n" not in report
    assert all(change in report for change in changes)


def test_a_json_array_is_read_like_lines(tmp_path):
    file, found = read(tmp_path, json.dumps([OURS, without(id="b", start=1, end=2.5)], indent=1))
    assert [(record.id, record.window_s) for record in found] == [("a", None), ("b", (1.0, 2.5))]
    assert file.report() == f"{file.path}: a JSON array, read like JSON Lines (1x)"


def test_entries_of_an_array_are_named_by_line_and_number(tmp_path):
    file, found = read(
        tmp_path, f"[\n {json.dumps(OURS)},\n\n [],\n {json.dumps(without('video'))} , {json.dumps(OURS)}\n]"
    )
    assert len(found) == 2
    assert file.problems == [
        f"{file.path} line 4 entry 2: expected a JSON object, got list",
        f"{file.path} line 5 entry 3: field 'video' is missing",
    ]


def test_nothing_is_read_after_a_broken_entry_of_an_array(tmp_path):
    file, found = read(tmp_path, f"[\n{json.dumps(OURS)},\n{{'x'}},\n{json.dumps(OURS)}]")
    assert len(found) == 1
    (problem,) = file.problems
    assert problem.startswith(f"{file.path} line 3 entry 2: invalid JSON")
    assert "nothing after it was read" in problem


INVALID = {
    "not JSON": "{",
    "cut off": json.dumps(OURS)[:-5],
    "a list": "[]",
    "a number": "3",
    "no UTF-8": b"\xff\xfe",
    "half of a character": json.dumps(without(id="\ud800")),
    "a number of too many digits": json.dumps(OURS)[:-1] + ', "x": ' + "1" * 5000 + "}",
    "lists in lists without end": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "no video": without("video"),
    "video is null": without(video=None),
    "video is empty": without(video=" "),
    "video is a number": without(video=3),
    "two videos": without(video=["a.mp4", "b.mp4"]),
    "no list element": without("video", videos=[]),
    "image without video": without("video", image={"path": "a.png"}),
    "no conversation": without("conversations"),
    "a conversation that is none": without(conversations="hello"),
    "an empty conversation": without(conversations=[]),
    "an odd conversation": without(conversations=[HUMAN]),
    "only a system text": without(conversations=[{"from": "system", "value": "x"}]),
    "speakers exchanged": without(conversations=[GPT, HUMAN]),
    "an unknown speaker": without(conversations=[{"from": "robot", "value": "<video> x"}, GPT]),
    "no speaker": without(conversations=[{"value": "<video> x"}, GPT]),
    "a turn that is no object": without(conversations=[HUMAN, "A tomato."]),
    "a value that is a number": without(conversations=[HUMAN, {"from": "gpt", "value": 3}]),
    "a piece that is no text": without("conversations", messages=messages([{"type": "image", "image": "x"}], "y")),
    "two tags of images": without(conversations=[{"from": "human", "value": "<image>\n<image> x"}, GPT]),
    "a tag of an image in the answer": without(conversations=[HUMAN, {"from": "gpt", "value": "<image>"}]),
    "a tag in prompt fields": {**PROMPT, "prompt": {**PROMPT["prompt"], "query": "What does <video> show?"}},
    "two tags": without(conversations=[{"from": "human", "value": "<video><video> x"}, GPT]),
    "a tag in the answer": without(conversations=[HUMAN, {"from": "gpt", "value": "<video>"}]),
    "a start alone": without(start=1.0),
    "an end alone": without(end=1.0),
    "a start that is a text": without(start="00:01", end=2.0),
    "an end that is a flag": without(start=0.0, end=True),
    "a window backwards": without(start=2.0, end=1.0),
    "a window of no length": without(start=2.0, end=2.0),
    "a window before the file": without(start=-1.0, end=2.0),
    "a window that is no number": '{"video": "a.mp4", "start": NaN, "end": 1.0, "conversations": '
    + json.dumps([HUMAN, GPT])
    + "}",
    "a window without end": without(start=0.0, end=1e999),
    "a time of too many digits": without(start=0.0, end=10**400),
    "an empty answer": without(conversations=[HUMAN, {"from": "gpt", "value": " "}]),
    "two fields for the video": without(videos=["b.mp4"]),
    "another image next to the video": without(image="a.png"),
    "two conversations": without(messages=messages("<video>What is cut?", "An onion.")),
    "a path in the contents of a second conversation": without(
        messages=messages([{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "What is cut?"}], "A tomato.")
    ),
    "prompt fields without an answer": PROMPT | {"prompt": {"task": "qa", "query": "What?"}},
    "prompt fields without a task": PROMPT | {"prompt": {"query": "What?", "target": "that"}},
    "a query that is a number": PROMPT | {"prompt": {"task": "qa", "query": 3, "target": "that"}},
    "options that are a text": PROMPT | {"prompt": {"task": "mcq", "options": "a, b", "target": "a"}},
    "a target that is no option": PROMPT | {"prompt": {"task": "mcq", "options": ["a", "b"], "target": "c"}},
    "a prompt that is a text": PROMPT | {"prompt": "What?"},
    "a path in the contents that is another": without(
        conversations=[
            {"from": "human", "value": [{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "What?"}]},
            GPT,
        ]
    ),
}


def as_bytes(line):
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


def test_two_hundred_invalid_rows_of_all_kinds_are_each_named(tmp_path, capsys):
    rng = random.Random(0)
    kinds = [*INVALID, *rng.choices([*INVALID], k=200 - len(INVALID))]
    lines = [INVALID[kind] for kind in kinds] + [OURS] * 50
    order = rng.sample(range(250), 250)
    file = tmp_path / "users.jsonl"
    file.write_bytes(b"".join(as_bytes(lines[place]) + b"\n" for place in order))
    wrong = [number for number, place in enumerate(order, 1) if place < 200]

    read = ConversationFile(file)
    assert len(list(read)) == 50
    assert len(read.problems) == len(wrong) == 200
    for number, problem in zip(wrong, read.problems, strict=True):
        assert problem.startswith(f"{file} line {number}: "), problem
        assert "\n" not in problem

    message = str(InvalidRecords(read.problems))
    assert message.startswith(read.problems[0])
    assert message.count(str(file)) == 5
    assert message.endswith("and 195 more: `make data-check INDEX=<file>` names every one")

    assert check([str(file), "--root", str(tmp_path), "--workers", "1"]) == 1  # and this is what that command prints
    assert capsys.readouterr().out.splitlines()[:200] == read.problems


def test_every_kind_of_invalid_row_is_refused_by_itself(tmp_path):
    for kind, line in INVALID.items():
        file = tmp_path / "one.jsonl"
        file.write_bytes(as_bytes(line))
        if kind != "a list":  # alone in a file, an empty array of records
            read = ConversationFile(file)
            assert (list(read), len(read.problems)) == ([], 1), kind


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_row_in_front_is_named_and_the_others_are_read(tmp_path, kind):
    file = tmp_path / "users.jsonl"
    file.write_bytes(b"\n".join(map(as_bytes, [INVALID[kind], OURS, without(id="b")])))
    read = ConversationFile(file)
    assert [record.id for record in read] == ["a", "b"]
    (problem,) = read.problems
    assert problem.startswith(f"{file} line 1: ")


@pytest.mark.parametrize(
    ("text", "names", "problems"),
    [
        ("[1, 2]\n{0}\n{1}", ["a", "b"], ["line 1: expected a JSON object, got list"]),
        ("[{0}, {1}]\n{0}\n", ["a"], ["line 1: expected a JSON object, got list"]),
        ("[{0},\n {1}]\n\n{0}\n{1}", ["a", "b"], ["line 4: what follows the end of the array was not read"]),
        ("[{0}][{1}]", ["a"], ["line 1: what follows the end of the array was not read"]),
        ("[{0}]\n\n", ["a"], []),
        ("[{0}, {1}", ["a"], ["line 1 entry 2: invalid JSON (Expecting ',' delimiter at line 1"]),
        ("[\n{0},\n1" + 5000 * "1" + "]", ["a"], ["line 3 entry 2: invalid JSON (Exceeds the limit"]),
        ("[\n{0},\n" + 100_000 * "[", ["a"], ["line 3 entry 2: invalid JSON (maximum recursion depth"]),
    ],
)
def test_text_around_an_array_is_reported(tmp_path, text, names, problems):
    rows = (json.dumps(OURS), json.dumps(without(id="b")))
    file, found = read(tmp_path, text.replace("{0}", rows[0]).replace("{1}", rows[1]))
    assert [record.id for record in found] == names
    assert len(file.problems) == len(problems)
    assert all(f"{file.path} {wanted}" in problem for wanted, problem in zip(problems, file.problems, strict=True))


def test_a_byte_order_mark_is_ignored(tmp_path):
    for text in (json.dumps(OURS), json.dumps([OURS]), json.dumps([OURS], indent=1)):
        file, found = read(tmp_path, "\ufeff" + text)
        assert (found, file.problems) == ([EXPECTED], [])


def test_repeated_ids_are_made_unique_and_counted(tmp_path):
    file, found = read(tmp_path, [OURS, OURS, without("id"), without(id="b"), OURS])
    assert [record.id for record in found] == ["a", "a (line 2)", f"{file.path} line 3", "b", "a (line 5)"]
    assert file.report() == f"{file.path}: a repeated id, made unique by its line (2x)"


def test_one_video_or_conversation_may_stand_in_two_fields(tmp_path):
    both = without(videos=["a.mp4"], messages=messages("<video>What is cut?", "A tomato."))
    file, found = read(tmp_path, [both])
    assert (found, file.problems) == ([EXPECTED], [])


# --------------------------------------------------------------------------------------------------------------------
# rows that are written


RECORD = InstructionRecord(
    "mine/7",
    "v.mp4",
    PromptFields("qa", "What?", "that"),
    source="mine",
    window_s=(1.0, 2.0),
    split="train",
    video_uid="session",
)


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        replace(RECORD, prompt=PromptFields("mcq", "Which?", "b", ("a", "b")), duration_s=30.0),
        replace(RECORD, prompt=PromptFields("action", "", "cut"), window_s=None, split=None, video_uid=None),
        replace(RECORD, prompt=None, turns=(("What?", "That."), ("And then?", "This."))),
    ],
)
def test_a_record_is_read_back_as_it_was_written(tmp_path, record):
    write_rows(tmp_path / "x.jsonl", [to_json(record)])
    file = ConversationFile(tmp_path / "x.jsonl")
    assert list(file) == [record]
    assert (file.problems, file.changes) == ([], {})


def test_rows_of_earlier_versions_are_read_with_and_without_prompt_fields(tmp_path):
    """They hold the rendered text, and next to it the fields that it was rendered from."""
    turns = [{"from": "human", "value": "<video>\nAnswer briefly. Which?"}, {"from": "gpt", "value": "(B) b"}]
    fields = {"task": "mcq", "prompt_level": "task", "template_id": 3, "query": "Which?", "target": "b"}
    place = {"id": "mine/7", "video": "v.mp4", "start": 1.0, "end": 2.0, "source": "mine", "channel": "mine"}
    rest = {"video_uid": "session", "duration": -1.0, "split": "train"}
    whole = {**place, "conversations": turns, **fields, "options": "a\nb", **rest}
    without_fields = {key: value for key, value in whole.items() if key != "template_id"}
    of_a_person = {**whole, "template_id": -1}
    file, found = read(tmp_path, [whole, without_fields | {"id": "8"}, of_a_person | {"id": "9"}])
    assert (file.problems, file.changes) == ([], {})
    text = (("Answer briefly. Which?", "(B) b"),)
    first = replace(RECORD, prompt=PromptFields("mcq", "Which?", "b", ("a", "b")), turns=text)
    assert found == [first, replace(first, id="8", prompt=None), replace(first, id="9", prompt=None)]


def test_prompt_fields_may_be_written_by_hand(tmp_path):
    (record,) = read(tmp_path, [PROMPT])[1]
    assert record == InstructionRecord("p", "a.mp4", PromptFields("qa", "What is cut?", "a tomato"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "x": 1.0}, {"id": "a", "x": 1.0}], "id 'a' is given twice"),
        ([{"x": 1.0}, {"x": 1}], r"field 'x' is int, float in the first record"),
        ([{"x": "a"}, {"x": None}], r"field 'x' is NoneType, str in the first record"),
        ([{"x": None}], r"field 'x' is NoneType"),
        ([{"x": "a"}, {"y": "a"}], r"other fields than the first record \(x, y\)"),
        ([{"x": float("nan")}], r"field 'x' is nan"),
        ([{"x": "a", "label": "b"}], r"field label: other readers give it a meaning"),
    ],
)
def test_rows_that_some_readers_cannot_read_are_refused(tmp_path, rows, message):
    (tmp_path / "x.jsonl").write_text("before")
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "x.jsonl", rows)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.jsonl", "before")]


# --------------------------------------------------------------------------------------------------------------------
# the store


def test_the_store_returns_the_records_that_were_appended():
    text = (("?", "!"),)
    fixed = InstructionRecord("a", "x.mp4", turns=(("q\n", "ä"), ("r", "s")))
    made = InstructionRecord("b", "y.mp4", PromptFields("mcq", "which", "b", ("a", "b")), text, "mine", (1.5, 2.0))
    other = InstructionRecord("c", "x.mp4", PromptFields("qa", "what", "that"), text, "mine", (0.0, 1.0))
    store = RecordStore()
    for record in (fixed, made, other):
        store.append(record)
    store.freeze()
    assert [store.id_of(index) for index in range(len(store))] == ["a", "b", "c"]
    assert [store[index] for index in range(3)] == [fixed, replace(made, turns=()), replace(other, turns=())]
    assert store.video_numbers().tolist() == [0, 1, 0]
    np.testing.assert_array_equal(store.windows_s(), [[-1, -1], [1.5, 2.0], [0, 1]])
    raw = RecordStore(raw=True)
    raw.append(made)
    assert raw[0] == replace(made, prompt=None)


def test_the_rows_of_the_documentation_are_read_alike(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "data.md"
    block = page.read_text(encoding="utf-8").partition("### Your own files")[2].partition("```json\n")[2]
    file, found = read(tmp_path, block.partition("```")[0])
    assert file.problems == []
    assert [record.turns for record in found] == [(("What do I hold?", "A ladle."),)] * 2
    assert [(record.video, record.window_s) for record in found] == [("kitchen/0001.mp4", (3.0, 5.5))] * 2
    assert len(file.changes) == 4


# --------------------------------------------------------------------------------------------------------------------
# forms of files


ROW = without("id")
LINE = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "pretty.json",
            json.dumps(ROW, indent=2).encode(),
            "a JSON object over several lines: write one record a line",
        ),
        (
            "two.json",
            json.dumps(ROW, indent=2).encode() * 2,
            "a JSON object over several lines: write one record a line",
        ),
        ("wrapped.json", json.dumps({"data": [ROW]}).encode(), "holds the records as an array under 'data': write one"),
        (
            "deep.json",
            json.dumps({"info": {}, "rows": [ROW]}, indent=1).encode(),
            "as an array under 'rows': write one",
        ),
        ("by_id.json", json.dumps({"0": ROW, "1": ROW}).encode(), "holds the records by id: write one a line, `jq -c"),
        ("table.parquet", b"PAR1" + bytes(20), "table.parquet: a Parquet file: convert it"),
        ("old_mac.jsonl", LINE + b"\r" + LINE, r"its lines end with \r alone: convert it, `tr"),
        ("cut.jsonl.gz", gzip.compress(LINE)[:-9], "damaged gzip file"),
        ("packed.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "packed by zstd: unpack it"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ],
)
def test_a_file_of_another_form_is_one_problem_that_names_it(tmp_path, capsys, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    conversations = ConversationFile(file)
    assert list(conversations) == []
    (problem,) = conversations.problems
    assert problem.startswith(f"{file}: ")
    assert message in problem
    assert check([str(file), "--root", str(tmp_path), "--clean", str(tmp_path / "clean")]) == 2
    assert capsys.readouterr().err == f"error: {problem}\n"


@pytest.mark.parametrize("content", [LINE + b"\n" + LINE, json.dumps([ROW, ROW], indent=1).encode()])
def test_files_packed_by_gzip_are_read(tmp_path, content):
    file = tmp_path / "packed.jsonl.gz"
    file.write_bytes(gzip.compress(content))
    assert [record.video for record in ConversationFile(file)] == ["a.mp4", "a.mp4"]
    assert output_files([file], tmp_path / "out", ".json") == [tmp_path / "out" / "packed.json"]


def test_a_file_of_one_record_is_no_other_form(tmp_path):
    file = tmp_path / "one.jsonl"
    for content in (LINE, b"\xef\xbb\xbf" + LINE + b"\r\n", b"\n" + LINE + b"\n\n"):
        file.write_bytes(content)
        assert len(list(ConversationFile(file))) == 1


def test_data_check_names_the_conversions(tmp_path, capsys):
    file = tmp_path / "llava.jsonl"
    row = without(conversations=[{"from": "human", "value": "<image>\n<video>\nWhat?"}, GPT])
    file.write_text(json.dumps(row) + "\n")
    check([str(file), "--root", str(tmp_path), "--workers", "1"])
    assert f"{file}: <image> next to <video> dropped (1x)\n" in capsys.readouterr().out
