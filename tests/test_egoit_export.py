"""Instruction files for other stacks, clips cut for them, and recordings that a mix shares with the benchmarks."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_clip_stream import make_video

from datamodules.egoit.__main__ import main as convert_main
from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import InstructionRecord, PromptFields, to_json, write_rows
from datamodules.egoit.templates import Templates, draw
from datamodules.io.atomic import atomic_path
from datamodules.io.jsonl import InvalidRecords
from datamodules.tools.export import FORMATS, clip_path, export
from datamodules.tools.export import main as export_main
from datamodules.tools.leaks import BENCHMARKS, benchmark_recordings, report
from datamodules.tools.leaks import main as leaks_main
from datamodules.tools.trim import cut
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"


def write(file, records):
    write_rows(file, [to_json(record) for record in records])
    return file


def record_of(source, key, video, prompt, window_s=None, **fields):
    return InstructionRecord(f"{source}/{key}", video, prompt, source=source, window_s=window_s, **fields)


@pytest.fixture
def windows(tmp_path):
    """Questions with and without options about windows of videos."""
    asked = PromptFields("qa", "What?", "that")
    choice = PromptFields("mcq", "Which?", "c", ("a", "b", "c", "d"))
    narration = PromptFields("description", "", 'Take the "pan", then — stop.')
    known = {"split": "train", "video_uid": "uid", "duration_s": 30.0}
    records = [
        record_of("egotimeqa", "0", "v/one.mp4", asked, (1.0, 2.5), **known),
        record_of("egotimeqa", "1", "v/one.mp4", choice, (0.0, 0.5), split="train"),
        record_of("egoexolearn", "2", "two.mp4", narration, (3.25, 3.75), split="val", video_uid="two"),
    ]
    return write(tmp_path / "mine.jsonl", records)


def read(file):
    found = ConversationFile(file)
    records = list(found)
    assert found.problems == []
    return records, found.changes


@pytest.mark.parametrize("to", FORMATS)
def test_every_form_is_read_back_unchanged(windows, tmp_path, to):
    lines = export([windows], to, tmp_path / "out")
    (file,) = [path for path in (tmp_path / "out").glob("mine.*")]
    expected, _ = read(windows)
    found, changes = read(file)
    assert [replace(record, turns=()) for record in found] == expected and len(found) == 3
    templates = Templates()
    rendered = [templates.render(record, "task_ego", draw(0, 0, record.id)) for record in expected]
    assert [record.turns for record in found] == [(turn,) for turn in rendered]
    assert bool(changes) == (to not in ("llamafactory", "swift"))  # what each form does to ours is undone, and said
    assert f"3 records written to {file}" in lines
    assert any("has windows, which readers of this form ignore: add --trim ROOT" in line for line in lines)


def test_forms_are_those_of_their_readers(windows, tmp_path):
    def written(to, name):
        export([windows], to, tmp_path / to)
        return (tmp_path / to / name).read_text()

    array = json.loads(written("videollama2", "mine.json"))
    assert [type(entry["video"]) for entry in array] == [str] * 3
    assert all(entry["conversations"][0]["value"].startswith("<video>\n") for entry in array)
    # LLaVA-NeXT puts visual tokens in the place of "<image>", whatever the medium is, and of nothing else.
    for entry, other in zip(json.loads(written("llava", "mine.json")), array, strict=True):
        text = entry["conversations"][0].pop("value")
        assert text.startswith("<image>\n") and (text.count("<image>"), text.count("<video>")) == (1, 0)
        assert text.replace("<image>", "<video>") == other["conversations"][0]["value"]
        assert entry["video"] == other["video"]
    lines = [json.loads(line) for line in written("videollama3", "mine.jsonl").splitlines()]
    assert [entry["video"] for entry in lines] == [["v/one.mp4"], ["v/one.mp4"], ["two.mp4"]]
    assert [json.loads(line) for line in written("swift", "mine.jsonl").splitlines()] == array
    first = json.loads(written("openai", "mine.jsonl").splitlines()[0])
    assert "conversations" not in first and "video" not in first
    asked, answered = first["messages"]
    assert asked["role"] == "user" and answered == {
        "role": "assistant",
        "content": [{"type": "text", "text": "That."}],
    }
    assert asked["content"][0] == {"type": "video_url", "video_url": {"url": "v/one.mp4"}}
    assert asked["content"][1]["type"] == "text" and "<video>" not in asked["content"][1]["text"]
    assert written("llamafactory", "mine.jsonl") == written("swift", "mine.jsonl")
    assert list(array[0]) == [
        *("id", "video", "start", "end", "conversations", "source", "channel", "task", "instruction_style"),
        *("template_id", "query", "options", "target", "video_uid", "duration", "split"),
    ]
    (tmp_path / "llamafactory" / "dataset_info.json").write_text('{"other": {"file_name": "other.json"}}')
    info = json.loads(written("llamafactory", "dataset_info.json"))
    assert info == {
        "other": {"file_name": "other.json"},
        "mine": {
            "file_name": "mine.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "videos": "video"},
        },
    }


def test_a_name_that_is_too_long_for_a_clip_is_shortened(tmp_path):
    names = [f"{'n' * 246}{number}.mp4" for number in range(2)]
    clips = {clip_path(f"v/{name}", 1.0, 2.5) for name in names}
    assert len(clips) == 2
    for clip in clips:
        assert clip.startswith("clips/v/nnn") and clip.endswith("_1.000000_2.500000.mp4")
        with atomic_path(tmp_path / Path(clip).name) as unfinished:
            unfinished.write_bytes(b"x")
        assert (tmp_path / Path(clip).name).read_bytes() == b"x"
    assert clip_path("v/a.mp4", 1.0, 2.5) == "clips/v/a.mp4_1.000000_2.500000.mp4"
    longest = tmp_path / f"{'n' * 249}.jsonl"
    assert write_rows(longest, [{"video": "a.mp4"}]) == 1
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [longest.name]


def test_users_files_are_exported_with_what_all_records_have(tmp_path):
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
    file = tmp_path / "users.json"
    file.write_text(
        json.dumps(
            [
                {"video": "a", "conversations": turns, "note": "x", "label": 1},
                {"videos": ["b"], "conversations": turns, "label": 2},
            ]
        )
    )
    lines = export([file], "swift", tmp_path / "out")
    assert any(
        "left out, since some records lack them or other readers reserve them: label, note" in line for line in lines
    )
    assert any("a JSON array, read like JSON Lines" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "out" / "users.jsonl").read_text().splitlines()]
    assert rows == [{"video": "a", "conversations": turns}, {"video": "b", "conversations": turns}]


def test_what_cannot_be_exported_is_named(windows, tmp_path, capsys):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n[]\n")
    with pytest.raises(InvalidRecords, match=r"wrong\.jsonl line 1: .*wrong\.jsonl line 2: "):
        export([windows, wrong], "llava", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first, *rest = windows.read_text().splitlines()
    without = {key: value for key, value in json.loads(first).items() if key not in ("start", "end")}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([json.dumps(without), *rest]))
    assert export_main([str(mixed), "--to", "llava", "--out", str(tmp_path / "out")]) == 2
    assert "mixed.jsonl: some records have 'start' and 'end' and others not" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# the reader of the datasets library, which several of those stacks are built on


@pytest.fixture
def load(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets library: pip install '.[readers]'")

    def load_json(file):
        return list(
            datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        )

    return load_json


def bare(value):
    """Return a value without the nulls that a reader by column fills in."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if item is not None}
    return [bare(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("to", [*FORMATS, None])
def test_the_datasets_library_reads_every_form(windows, tmp_path, load, to):
    file = windows
    if to is not None:
        export([windows], to, tmp_path / "out")
        (file,) = (tmp_path / "out").glob("mine.*")
    text = file.read_text()
    expected = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    assert [bare(record) for record in load(file)] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["egtea", "--splits", "train_split1", "test_split1"],
        ["ssv2", "--splits", "validation"],
        ["openeqa"],
        ["egoexolearn", "--part", "mcq"],
        ["egoexolearn", "--part", "coarse"],
    ],
    ids=" ".join,
)
def test_real_files_load_with_the_datasets_library(tmp_path, load, words):
    root = SAMPLES / "egoit" / words[0]
    if not root.is_dir():
        pytest.skip(f"needs the official files in {root}, which are not part of the repository")
    file = tmp_path / "out.jsonl"
    assert convert_main(["convert", *words, "--root", str(root), "--out", str(file)]) == 0
    expected = [json.loads(line) for line in file.read_text().splitlines()]
    assert load(file) == expected and len(expected) > 1000
    before, _ = read(file)
    for to in FORMATS:
        export([file], to, tmp_path / to)
        (exported,) = (tmp_path / to).glob("out.*")
        assert [replace(record, turns=()) for record in read(exported)[0]] == before


# --------------------------------------------------------------------------------------------------------------------
# cutting


def frames_of(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.pts * frame.time_base for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


@pytest.mark.parametrize(
    ("start_s", "end_s", "numbers"),
    [
        (1.0, 2.0, range(10, 20)),  # at 10 frames a second, the end not included
        (1.05, 1.95, range(10, 20)),  # begins with the frame that is shown at 1.05 s
        (0.0, 0.1, range(0, 1)),
        (3.9, 4.0, range(39, 40)),
        (3.55, 4.05, range(35, 40)),  # a frame past the end is let pass
    ],
)
@pytest.mark.parametrize("options", [{}, {"gop": 100, "b_frames": 3}, {"times_ms": [40 + 100 * n for n in range(40)]}])
def test_a_clip_has_the_frames_of_its_window(tmp_path, options, start_s, end_s, numbers):
    make_video(tmp_path / "v.mp4", 40, **options)
    assert cut(tmp_path, tmp_path, ("v.mp4", start_s, end_s, "clips/c.mp4")) == ""
    times, found = frames_of(tmp_path / "clips/c.mp4")
    _, source = frames_of(tmp_path / "v.mp4")
    assert times == [Fraction(n, 10) for n in range(len(numbers))]
    assert len(found) == len(numbers)
    for number, frame in zip(numbers, found, strict=True):
        distances = [np.abs(frame.astype(int) - other).mean() for other in source]
        assert int(np.argmin(distances)) == number and distances[number] < 3
    assert probe(tmp_path / "clips/c.mp4").duration_s == pytest.approx(len(numbers) / 10, abs=0.051)


def test_odd_sides_and_rotated_videos_are_cut(tmp_path):
    make_video(tmp_path / "odd.mp4", 10, width=65, height=49, codec="mpeg4", pixel_format="yuv420p")
    make_video(tmp_path / "turned.mp4", 10, width=96, height=64, rotation=90)
    for name, size in (("odd.mp4", (64, 48)), ("turned.mp4", (64, 96))):
        assert cut(tmp_path, tmp_path, (name, 0.2, 0.8, f"clips/{name}")) == ""
        info = probe(tmp_path / "clips" / name)
        assert (info.width, info.height, info.num_frames, info.rotation) == (*size, 6, 0)


def test_what_cannot_be_cut_is_named_and_leaves_nothing(tmp_path):
    good = make_video(tmp_path / "v.mp4", 40)
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[:4000])
    for name, window, words in (
        ("none.mp4", (0.0, 1.0), "No such file"),
        ("half.mp4", (0.0, 1.0), "half.mp4"),
        ("v.mp4", (3.0, 9.0), "[3.000, 9.000) s: the video ends at 4.000 s"),
    ):
        assert words in cut(tmp_path, tmp_path / "out", (name, *window, "clips/c.mp4"))
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_trimming_takes_the_windows_out(windows, tmp_path, capsys):
    root = tmp_path / "videos"
    (root / "v").mkdir(parents=True)
    make_video(root / "v" / "one.mp4", 40)
    make_video(root / "two.mp4", 40)
    out = tmp_path / "out"
    assert export_main([str(windows), "--to", "llava", "--out", str(out), "--trim", str(root)]) == 0
    assert "has windows" not in capsys.readouterr().out
    rows = json.loads((out / "mine.json").read_text())
    assert not any(key in entry for entry in rows for key in ("start", "end"))
    assert [entry["duration"] for entry in rows] == [1.5, 0.5, 0.5]
    before, _ = read(windows)
    after, _ = read(out / "mine.json")
    reader = ClipReader()
    for old, new in zip(before, after, strict=True):
        assert replace(new, video=old.video, window_s=old.window_s, duration_s=old.duration_s, turns=()) == old
        wanted = reader.read(root / old.video, [old.window_s[0] + 0.01], 32)
        found = reader.read(out / new.video, [0.01], 32)
        assert (wanted.frames.int() - found.frames.int()).abs().float().mean() < 4
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("*.mp4")}
    assert len(stamps) == 3
    export([windows], "swift", out, root)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.mp4")} == stamps  # cut once


def test_whole_videos_are_linked_next_to_cut_ones_and_failures_stop_the_export(windows, tmp_path):
    root, out = tmp_path / "videos", tmp_path / "out"
    with pytest.raises(InvalidRecords, match=r"two\.mp4 \[3\.250, 3\.750\) s: No such file .*one\.mp4"):
        export([windows], "llava", out, root)
    assert not (out / "mine.json").exists()
    whole = write(tmp_path / "whole.jsonl", [record_of("openeqa", "0", "scan/room", PromptFields("qa", "?", "x"))])
    (root / "scan" / "room").mkdir(parents=True)
    (root / "scan" / "room" / "0-rgb.png").write_bytes(b"x")
    export([whole], "swift", out, root)
    assert (out / "scan" / "room" / "0-rgb.png").read_bytes() == b"x"


def cut_record(key, video, window=(0.0, 1.0)):
    return record_of("mine", key, video, PromptFields("qa", "?", "x"), window)


@pytest.mark.parametrize("window", [(0.0, 1.0), None])
@pytest.mark.parametrize("video", ["{root}/v.mp4", "../v.mp4", "a/../../v.mp4"])
def test_nothing_is_cut_or_linked_outside_the_output(tmp_path, video, window):
    root, out = tmp_path / "videos", tmp_path / "deep" / "out"
    root.mkdir()
    make_video(root / "v.mp4", 20)
    file = write(tmp_path / "mine.jsonl", [cut_record("0", video.format(root=root), window)])
    with pytest.raises(InvalidRecords, match=rf"^{file} line 1: field 'video' is '.*v\.mp4', but clips are cut below"):
        export([file], "swift", out, root)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["mine.jsonl", "v.mp4"]


def test_videos_that_differ_in_their_suffix_are_cut_apart(tmp_path):
    make_video(tmp_path / "a.mp4", 20)
    make_video(tmp_path / "a.mkv", 20, width=64, height=48)
    file = write(tmp_path / "mine.jsonl", [cut_record("0", "a.mp4"), cut_record("1", "a.mkv")])
    export([file], "swift", tmp_path / "out", tmp_path)
    first, second = (tmp_path / "out" / record.video for record in read(tmp_path / "out" / "mine.jsonl")[0])
    assert (probe(first).width, probe(second).width) == (probe(tmp_path / "a.mp4").width, 64)
    assert first != second


def test_a_clip_of_another_root_is_cut_again(tmp_path):
    for root, width in (("one", 96), ("two", 64)):
        (tmp_path / root).mkdir()
        make_video(tmp_path / root / "v.mp4", 20, width=width, height=48)
        assert cut(tmp_path / root, tmp_path / "out", ("v.mp4", 0.0, 1.0, "clips/c.mp4")) == ""
        assert probe(tmp_path / "out/clips/c.mp4").width == width


def test_a_folder_of_frames_is_not_cut(tmp_path):
    (tmp_path / "scan").mkdir()
    file = write(tmp_path / "mine.jsonl", [cut_record("0", "scan")])
    with pytest.raises(InvalidRecords, match=r"scan \[0\.000, 1\.000\) s: a folder of images is not cut: encode it"):
        export([file], "swift", tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"invalid JSON \(.*\): fix or remove this file"), ("[]", "expected a JSON object, got list")],
)
def test_an_invalid_list_of_datasets_is_left_alone(windows, tmp_path, content, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset_info.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{out / 'dataset_info.json'}: {message}"):
        export([windows], "llamafactory", out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("dataset_info.json", content)]


# --------------------------------------------------------------------------------------------------------------------
# leaks


def official_files(root):
    """Small files of every benchmark in its own form; Ego4D videos are named e1, e2, ..."""
    root.mkdir()
    clip = {"clip_text": "#C C cuts", "video_uid": "e2"}
    contents = {
        "uid_to_ego4d.json": {"q": {"video_uid": "e1", "starting_sec": 0, "ending_sec": 180}},
        "annotations.QaEgo4D_test.json": [{"video_id": "c1", "question": "?"}, {"video_id": "c9", "video_uid": "e9"}],
        "test_qas.json": [{"interval": "9z-1-1-1|fpv1|480|960", "question": "?"}],
        "EgoPlan_validation.json": [
            {"sample_id": 1, "video_source": "Ego4D", "video_id": "e3"},
            {"sample_id": 2, "video_source": "EpicKitchens", "video_id": "P01_11"},
        ],
        "egoplan2.json": [{"sample_id": "e4_89"}],
        "vlnqa.json": [
            {"text": "?", "video_path": "left/4504_frame52.mp4", "gt": "B"},
            {"question": "?", "video": "4505_frame3.mp4", "candidates": ["a", "b", "c", "d"], "answer": "a"},
        ],
        "egomcq.json": {"0": {"query": clip, "choices": {"0": clip, "1": {**clip, "video_uid": "e5"}}, "answer": 0}},
        "open-eqa-v0.json": [{"episode_history": "hm3d-v0/000-hm3d-room"}],
    }
    for name, content in contents.items():
        (root / name).write_text(json.dumps(content))
    for name, column in (("CharadesEgo_v1_test_only1st.csv", "id"), ("EPIC_100_retrieval_test.csv", "video_id")):
        with (root / name).open("w", newline="") as out:
            csv.writer(out).writerows([[column, "x"], [column[:2].upper(), "y"]])
    return root


def test_recordings_of_every_benchmark(tmp_path):
    root = official_files(tmp_path / "b")
    found, notes = benchmark_recordings(root, {"c1": ("e7", 10.0)})
    assert found == {
        "egoschema": {("ego4d", "e1")},
        "qaego4d": {("ego4d", "e7"), ("ego4d", "e9")},
        "egotaskqa": {("lemma", "9z-1-1-1")},
        "charades_ego": {("charades_ego", "ID")},
        "epic100_mir": {("epic_kitchens", "VI")},
        "egoplan": {("ego4d", "e3"), ("epic_kitchens", "P01_11"), ("ego4d", "e4")},
        "vlnqa": {("r2r", "4504"), ("r2r", "4505")},
        "egomcq": {("ego4d", "e2"), ("ego4d", "e5")},
        "openeqa": {("scans", "room")},
    }
    assert found.keys() == BENCHMARKS.keys()
    assert notes == []
    found, notes = benchmark_recordings(root, {})
    assert found["qaego4d"] == {("ego4d", "e9")}
    file = root / "annotations.QaEgo4D_test.json"
    assert notes == [f"qaego4d: 1 of 2 rows of {file} name no recording and were not compared; for Ego4D, add --clips"]
    record = record_of("ssv2", "0", "a.mp4", PromptFields("qa", "?", "x"), video_uid="7")
    question = write(tmp_path / "x.jsonl", [record])
    assert notes[0] in report([question], root)


def test_names_of_another_collection_are_not_compared(tmp_path):
    root = official_files(tmp_path / "b")
    for source, shared in (("ssv2", "0"), ("egotimeqa", "0"), ("mine", "1 (1 records)")):
        record = record_of(source, "0", "a.webm", PromptFields("action", "", "x"), video_uid="4504")
        file = write(tmp_path / f"{source}.jsonl", [record])
        header, _, counts, *_ = report([file], root).splitlines()
        cells = dict(zip(header.strip("| ").split(" | "), counts.strip("| ").split(" | "), strict=True))
        assert cells["vlnqa"] == shared


@pytest.mark.parametrize(
    ("command", "options"),
    [(leaks_main, ["--benchmarks", "{b}", "--clean"]), (export_main, ["--to", "swift", "--out"])],
)
def test_files_that_are_read_are_never_written_over(mixed, tmp_path, capsys, command, options):
    root = official_files(tmp_path / "b")
    options = [word.format(b=root) for word in options]
    other = tmp_path / "other" / mixed.name
    other.parent.mkdir()
    other.write_bytes(mixed.read_bytes())
    (tmp_path / "link").symlink_to(tmp_path)
    for files, folder, message in (
        ([mixed], tmp_path, "is read from and would be overwritten: give another folder"),
        ([mixed], tmp_path / "link", "is read from and would be overwritten"),
        ([mixed, other], tmp_path / "new", "two have one name: rename one"),
    ):
        assert command([*map(str, files), *options, str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert mixed.read_bytes() == other.read_bytes() != b""
    assert not (tmp_path / "new").exists()


@pytest.fixture
def mixed(tmp_path):
    question = PromptFields("qa", "?", "x")
    uids = ["e1", "e1", "e5", "e6", "", ""]
    clips = ["c0", "c0", "c0", "c0", "c1", "c8"]
    records = [
        record_of("egotimeqa", str(n), f"ego4d/clips/{c}.mp4", question, (0, 1), video_uid=u or None)
        for n, (u, c) in enumerate(zip(uids, clips, strict=True))
    ]
    return write(tmp_path / "egotimeqa.jsonl", records)


def test_shared_recordings_are_counted_and_left_out(mixed, tmp_path, capsys):
    root = official_files(tmp_path / "b")
    (root / "vlnqa.json").unlink()
    clips = tmp_path / "ego4d.json"
    clips.write_text(json.dumps({"clips": [{"clip_uid": "c1", "video_uid": "e7"}]}))
    clean = tmp_path / "clean"
    words = [str(mixed), "--benchmarks", str(root), "--clips", str(clips), "--clean", str(clean)]
    assert leaks_main(words) == 0
    header, _, counts, _, *notes = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.strip("| ").split(" | "), counts.strip("| ").split(" | "), strict=True))
    assert cells == {
        "file": "egotimeqa.jsonl",
        "records": "6",
        "recordings": "4",
        "unknown": "1",
        "egoschema": "1 (2 records)",
        "qaego4d": "1 (1 records)",
        "egomcq": "1 (1 records)",
        **dict.fromkeys(("egotaskqa", "charades_ego", "epic100_mir", "egoplan", "openeqa"), "0"),
    }
    assert any(note.startswith("vlnqa: not compared, no vlnqa.json below") for note in notes)
    assert any("1 records name no recording and were not compared" in note for note in notes)
    kept, _ = read(clean / "egotimeqa.jsonl")
    assert [record.id for record in kept] == ["egotimeqa/3", "egotimeqa/5"]
    report([mixed], root, (), clean, ["egoschema"])
    kept, _ = read(clean / "egotimeqa.jsonl")
    assert [record.id for record in kept] == [f"egotimeqa/{n}" for n in (2, 3, 4, 5)]


def test_leaks_refuses_unknown_folders_benchmarks_and_files(mixed, tmp_path, capsys):
    assert leaks_main([str(mixed), "--benchmarks", str(tmp_path / "none")]) == 2
    assert "--benchmarks: no folder" in capsys.readouterr().err
    root = official_files(tmp_path / "b")
    with pytest.raises(ValueError, match=r"--only: got nothing, found below .*: egoschema, qaego4d"):
        report([mixed], root, (), tmp_path / "clean", ["nothing"])
    (root / "egomcq.json").write_text("[]")
    with pytest.raises(ValueError, match=r"egomcq\.json: not a file of egomcq \(.*\): remove it or fetch it again"):
        report([mixed], root)


def test_real_benchmark_files():
    root = SAMPLES / "benchmarks"
    if not root.is_dir():
        pytest.skip(f"needs the official files in {root}, which are not part of the repository")
    found, notes = benchmark_recordings(root, {})
    assert notes == []
    counts = {name: len(recordings) for name, recordings in found.items()}
    assert counts == {
        "egoschema": 1981,
        "egotaskqa": 306,
        "charades_ego": 103,
        "epic100_mir": 138,
        "egoplan": 1113,
        "vlnqa": counts["vlnqa"],
    }
    assert 0 < counts["vlnqa"] <= 200
    assert len(found["egoplan"] & found["egoschema"]) == 318  # both are cut out of Ego4D


def test_exporting_needs_no_torch_unless_it_cuts(windows, tmp_path):
    import subprocess

    code = (
        "import sys; from datamodules.tools.export import main; "
        f"main([{str(windows)!r}, '--to', 'llava', '--out', {str(tmp_path / 'o')!r}]); "
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("False\n")
