"""The generated world: its files, their reproducibility, the planted defects, and the ground truth."""

from __future__ import annotations

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
import toy_views
from toy_views import image_position

from datamodules.ego_exo_clip.build import build_index, select_clips
from datamodules.ego_exo_clip.index import PairIndex
from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D
from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.egoit.sources.egotimeqa import EgoTimeQA
from datamodules.egoit.templates import STYLES, Templates
from datamodules.io.annotations import Counts
from datamodules.text import load_tokenizer
from datamodules.toy_world import questions, release
from datamodules.toy_world.release import SEEDS, Settings, WorldExists, generate
from datamodules.toy_world.render import ego_camera, exo_camera, render
from datamodules.toy_world.scene import PHRASINGS, PRESETS, SHAKE_M, VERBS, simulate
from datamodules.video.probe import probe

FPS = 8
SMALL = Settings(train_takes=2, val_takes=1, initialisation_takes=2, practice_takes=1, benchmark_takes=1, size=32)
NARRATION = re.compile(
    r"(?:C|Camera-wearer) (?P<verb>.+?) the (?P<colour>\w+) (?P<object>\w+) with the (?P<hand>\w+) hand\."
)


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def videos(root):
    """Return the training and validation videos; the benchmarks have the same takes under other names."""
    found = {name: value for name, value in contents(root).items() if name.endswith(".mp4")}
    return {name: value for name, value in found.items() if not name.startswith("egobench/")}


# --------------------------------------------------------------------------------------------------------------------
# generation


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "world"
    assert generate(root, SMALL, workers=2) is True
    return root


def test_an_interrupted_generation_leaves_nothing_and_the_next_one_the_same_world(small_world, tmp_path, monkeypatch):
    def interrupted(root, *_):
        assert list(root.rglob("*.mp4"))
        assert (root / "ego_exo_clip" / "index.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "_write_held_out", interrupted)  # the last but the tokenizer
    root = tmp_path / "data" / "world"
    with pytest.raises(KeyboardInterrupt):
        generate(root, SMALL, workers=1)
    assert not root.exists()
    monkeypatch.undo()
    assert generate(root, SMALL, workers=1) is True
    assert [path.name for path in root.parent.iterdir()] == ["world"]
    first, second = contents(small_world), contents(root)  # another number of workers
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_is_another_world(small_world, tmp_path):
    root = tmp_path / "world"
    generate(root, replace(SMALL, seed=1), workers=2)
    first, second = contents(small_world), contents(root)
    assert set(videos(small_world).values()).isdisjoint(videos(root).values())
    for name in (
        "takes.json",
        "annotations/atomic_descriptions_train.json",
        "instructions/initialisation.jsonl",
        "official/egotimeqa/annotations.EgoTimeQA.json",
    ):
        assert first[name] != second[name]
    same = [name for name in first if first[name] == second.get(name)]
    labels = {f"official/egtea/{name}_idx.txt" for name in ("action", "noun", "verb")}
    assert {name for name in same if name.split("/")[0] not in ("tokenizer", "templates", "egobench")} == labels
    assert not [name for name in same if name.startswith("egobench/") and name.endswith(("mp4", "MP4"))]


def test_no_two_videos_of_a_world_are_equal(toy_world):
    files = videos(toy_world)
    assert len([name for name in files if not name.startswith("takes/")]) == 6 + 4
    assert len(set(files.values())) == len(files) > 11 * 3 + 6 + 4 - 1  # three or more cameras a take, one without file


def test_takes_of_all_parts_and_seeds_are_different(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(release, "_render_all", lambda some, *_: jobs.extend(some) or [60] * len(some))
    for seed in range(3):
        settings = Settings(seed=seed, train_takes=5, val_takes=5, initialisation_takes=5, practice_takes=5)
        release._write_release(tmp_path / str(seed), settings, workers=1)
        release._write_conversations(tmp_path / str(seed), settings, workers=1)
        release._write_practice(tmp_path / str(seed), settings, workers=1)
    assert len({job.seed for job in jobs}) == len(jobs) == 3 * 4 * 5


def test_splits_share_no_take(toy_world):
    splits = json.loads((toy_world / "annotations" / "splits.json").read_text())["split_to_take_uids"]
    assert [len(splits[name]) for name in ("train", "val", "test")] == [9, 2, 0]
    assert not set(splits["train"]) & set(splits["val"])
    held_out = [json.loads(line) for line in (toy_world / "instructions" / "held_out.jsonl").read_text().splitlines()]
    assert {record["id"].split("/")[0] for record in held_out} == set(splits["val"])
    assert all("toy_val_" in path for record in held_out for path in record["views"].values())


def test_the_same_world_is_kept_and_another_one_refused(toy_world, toy_settings, tmp_path):
    before = contents(toy_world)
    assert generate(toy_world, toy_settings, workers=1) is False
    with pytest.raises(
        WorldExists, match=rf"^{toy_world}: holds a world with other settings \(size: 64, not 48\): remove"
    ):
        generate(toy_world, replace(toy_settings, size=48), workers=1)
    with pytest.raises(WorldExists, match=r"seed: 0, not 5; val_takes: 2, not 3"):
        generate(toy_world, replace(toy_settings, seed=5, val_takes=3), workers=1)
    assert contents(toy_world) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorldExists, match="is not a generated world"):
        generate(tmp_path, toy_settings, workers=1)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"preset": "none"}, "preset: got 'none', allowed: easy, hard, fair, rich, faint"),
        ({"val_takes": 0}, "val_takes: got 0, allowed: 1 or more"),
        ({"size": 33}, "size: got 33, allowed: multiples of 16 from 32"),
        ({"size": 16}, "size: got 16, allowed: multiples of 16 from 32"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Settings(**setting)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["toy_world", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("datamodules.toy_world", run_name="__main__")
    return end.value.code


def test_the_command_refuses_in_one_line(monkeypatch, capsys, tmp_path, toy_world):
    assert run(monkeypatch, "--root", tmp_path / "world", "--size", 33) == 2
    assert capsys.readouterr().err == "error: size: got 33, allowed: multiples of 16 from 32\n"
    assert not (tmp_path / "world").exists()
    assert run(monkeypatch, "--root", toy_world, "--preset", "hard") == 2
    assert re.fullmatch(r"error: .*preset: easy, not hard.*\n", capsys.readouterr().err)


def test_the_command_keeps_a_world_that_is_there(monkeypatch, capsys, toy_world):
    counts = (
        "--train-takes",
        9,
        "--val-takes",
        2,
        "--initialisation-takes",
        6,
        "--practice-takes",
        4,
        "--benchmark-takes",
        8,
    )
    assert run(monkeypatch, "--root", toy_world, *counts, "--frame-counter") == 0
    assert capsys.readouterr().out == f"{toy_world}: already there\n"


# --------------------------------------------------------------------------------------------------------------------
# planted defects


@pytest.fixture(scope="module")
def takes(toy_world):
    return {take["take_name"][-4:]: take for take in json.loads((toy_world / "takes.json").read_text())[:9]}


@pytest.fixture(scope="module")
def annotations(toy_world):
    return json.loads((toy_world / "annotations" / "atomic_descriptions_train.json").read_text())["annotations"]


@pytest.fixture(scope="module")
def read(toy_world):
    return select_clips(EgoExo4D(toy_world), probe_workers=1)


@pytest.fixture(scope="module")
def counts(read):
    return {(row["of"], row["filter"]): (row["in"], row["out"]) for row in read.counts.rows()}


def files_of(root, take):
    return {file.stem.split("_")[0]: file for file in (root / take["root_dir"]).rglob("*.mp4")}


def read_take(read, number):
    """The take whose name ends so, and its clips."""
    (take,) = (take for take in read.takes if f"toy_train_{number}/" in take.group.egos[0].path)
    return take.group, take.clips


def test_the_wearer_of_the_first_take_has_the_second_pair_of_glasses(toy_world, takes, read):
    assert "aria02" in files_of(toy_world, takes["0000"])
    assert read_take(read, "0000")[0].egos[0].cam == "aria02"
    assert {read_take(read, number)[0].egos[0].cam for number in sorted(takes)[1:]} == {"aria01"}
    assert all(take.group.egos[0].path.endswith("_214-1.mp4") for take in read.takes)


def test_one_camera_is_portrait(toy_world, takes, read):
    sizes = {}
    for number, take in takes.items():
        for cam, file in files_of(toy_world, take).items():
            sizes[number, cam] = (probe(file).width, probe(file).height)
    assert [key for key, size in sizes.items() if size == (64, 84)] == [("0001", "cam02")]
    others = {size for (_, cam), size in sizes.items() if cam.startswith("cam") and size != (64, 84)}
    assert others == {(84, 64)}
    assert {(view.width, view.height) for view in read_take(read, "0001")[0].exos} == {(84, 64), (64, 84)}


def test_one_listed_camera_has_no_file(toy_world, takes, read, counts):
    missing = {}
    for number, take in takes.items():
        listed = {cam for cam in take["frame_aligned_videos"] if cam.startswith("cam")}
        missing[number] = listed - set(files_of(toy_world, take))
    assert {number: cams for number, cams in missing.items() if cams} == {"0002": {"cam02"}}
    assert [view.cam for view in read_take(read, "0002")[0].exos] == ["cam01"]
    listed, opened = counts["exo views", "that can be opened"]
    assert listed - opened == 1


def test_one_stream_is_a_frame_short_and_its_take_has_no_best_camera(toy_world, takes, read):
    for number, take in takes.items():
        counts = {cam: probe(file).num_frames for cam, file in files_of(toy_world, take).items()}
        expected = dict.fromkeys(counts, take["duration_sec"] * FPS)
        if number == "0003":
            expected["cam01"] -= 1
        assert counts == expected
    assert read_take(read, "0003")[0].duration_s == takes["0003"]["duration_sec"] - 1 / FPS
    assert [number for number, take in takes.items() if take["best_exo"] is None] == ["0003"]


def test_annotators_rejected_doubled_and_of_one_narration(takes, annotations, read, counts):
    listed = {}
    for number, take in takes.items():
        listed[number] = [(len(a["descriptions"]), a["rejected"]) for a in annotations[take["take_uid"]]]
    special = {number: entry for number, entry in listed.items() if entry != [(6, False)]}
    assert special == {"0004": [(6, False), (6, True)], "0005": [(6, False), (3, False)], "0006": [(1, False)]}
    clips = {number: len(read_take(read, number)[1]) for number in takes}
    assert clips == {**dict.fromkeys(takes, 6), "0005": 9, "0006": 1}
    assert not any("something else" in clip.narration.text for take in read.takes for clip in take.clips)
    assert counts["annotations", "not rejected"] == (11, 10)
    (alone,) = read_take(read, "0006")[1]
    time_s = alone.narration.time_s
    assert (alone.start_s, alone.end_s) == (max(0.0, time_s - 0.5), time_s + 0.5)  # no gap: one second


def test_key_frames_are_a_second_apart_but_in_one_take(toy_world, takes):
    for number, take in takes.items():
        for file in files_of(toy_world, take).values():
            with av.open(str(file)) as container:
                packets = [packet for packet in container.demux(video=0) if packet.size]
            keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
            shown_in_order = all(a.pts < b.pts for a, b in pairwise(packets))
            assert keys == ([0] if number == "0007" else list(range(0, len(packets), FPS)))
            assert shown_in_order == (number != "0007")  # B-frames


def test_flags_written_as_strings(takes, annotations, read):
    flags = {}
    for number, take in takes.items():
        (first, *_) = annotations[take["take_uid"]]
        flags[number] = sorted(
            {type(d[flag]).__name__ for d in first["descriptions"] for flag in ("ego_visible", "unsure")}
        )
    assert flags == {number: ["str" if number == "0008" else "bool"] for number in takes}
    _, clips = read_take(read, "0008")
    simulated = simulate(SEEDS["train"] + 8, PRESETS["easy"]).actions
    assert [clip.narration.ego_visible for clip in clips] == [action.ego_visible for action in simulated]
    assert not any(clip.narration.unsure or clip.narration.best_exo for clip in clips)


def test_one_annotated_take_is_not_listed(toy_world, annotations, read, counts):
    listed = {take["take_uid"] for take in json.loads((toy_world / "takes.json").read_text())}
    assert len(set(annotations) - listed) == 1
    assert (counts["annotated takes", "listed in takes.json"], len(read.takes)) == ((10, 9), 9)


def test_validation_takes_have_no_defect(toy_world, read):
    val = select_clips(EgoExo4D(toy_world, "val"), alpha=read.alpha)
    assert [len(take.clips) for take in val.takes] == [6, 6]
    assert all(row["in"] == row["out"] for row in val.counts.rows() if row["filter"] != "in split val")


# --------------------------------------------------------------------------------------------------------------------
# the index of pairs


def test_the_index_is_the_one_that_a_release_is_built_into(toy_world, read, tmp_path):
    build_index(EgoExo4D(toy_world), tmp_path / "again", probe_workers=1)
    assert contents(tmp_path / "again") == contents(toy_world / "ego_exo_clip")
    index = PairIndex.read(toy_world / "ego_exo_clip")
    clips = [clip for take in read.takes for clip in take.clips]
    assert [index.clip_ids[n] for n in range(len(index))] == [clip.narration.clip_id for clip in clips]
    assert index.start_s.tolist() == [clip.start_s for clip in clips]
    assert index.end_s.tolist() == [clip.end_s for clip in clips]


@pytest.mark.slow
def test_killed_at_any_moment_there_is_no_world_and_the_next_one_is_the_same(small_world, tmp_path):
    """Fifty kills of the command and its workers, at moments spread at random over its run."""
    rng = random.Random(0)
    root, started = tmp_path / "data" / "world", time.monotonic()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items() if value is not False]
    command = [sys.executable, "-m", "datamodules.toy_world", "--root", str(root), "--workers", "2", *options]
    subprocess.run(command, check=True, capture_output=True)
    length_s = time.monotonic() - started
    expected = contents(small_world)
    assert contents(root) == expected
    shutil.rmtree(root)
    killed = 0
    for _ in range(50):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0, length_s))
        except subprocess.TimeoutExpired:
            process.kill()  # its workers are left to end by themselves
            process.wait()
            killed += 1
        if root.exists():
            assert contents(root) == expected
            shutil.rmtree(root)
    assert killed > 25
    subprocess.run(command, check=True, capture_output=True)
    assert contents(root) == expected
    assert [path.name for path in root.parent.iterdir()] == ["world"]


# --------------------------------------------------------------------------------------------------------------------
# questions


def test_held_out_answers_agree_with_the_narration(toy_world):
    val = json.loads((toy_world / "annotations" / "atomic_descriptions_val.json").read_text())["annotations"]
    records = [json.loads(line) for line in (toy_world / "instructions" / "held_out.jsonl").read_text().splitlines()]
    assert len(records) == 12
    for record in records:
        uid, annotator, description = record["id"].split("/")
        narrated = val[uid][int(annotator)]["descriptions"][int(description)]
        truth = NARRATION.fullmatch(narrated["text"]).groupdict()
        assert record["start"] <= narrated["timestamp"] <= record["end"]
        asked = {question["task"]: question for question in record["questions"]}
        assert asked["caption"]["answer"] == "Camera-wearer" + narrated["text"][1:]
        assert asked["caption"]["parts"] == truth
        assert {kind: asked[f"qa_{kind}"]["answer"] for kind in truth} == truth
        named = re.fullmatch(r"Does the camera-wearer use the (\w+ \w+)\?", asked["qa_check"]["question"]).group(1)
        assert asked["qa_check"]["answer"] == ("yes" if named == f"{truth['colour']} {truth['object']}" else "no")
        options = asked["choice"]["options"]
        assert len(options) == len(set(options)) == 4
        assert options.count(asked["caption"]["answer"]) == 1
        assert asked["choice"]["answer"] == asked["caption"]["answer"]


def actions(preset, seeds):
    for seed in range(seeds):
        take = simulate(seed, PRESETS[preset])
        for number, action in enumerate(take.actions):
            yield take, action, np.random.default_rng([seed, number])


@pytest.mark.parametrize("preset", PRESETS)
def test_options_differ_in_verb_and_object_and_the_place_of_the_true_one_is_even(preset):
    places = []
    for take, action, rng in actions(preset, 100):
        options, true = questions.options(take, action, rng)
        assert options[true] == questions.caption(take, action)
        read = [NARRATION.fullmatch(option).groupdict() for option in options]
        assert len({(r["verb"], r["colour"], r["object"]) for r in read}) == 4
        assert len({r["verb"] for r in read}) == len({(r["colour"], r["object"]) for r in read}) == 2
        assert {r["hand"] for r in read} == {action.hand}
        places.append(true)
    assert len(places) == 600
    assert all(abs(count - 150) < 40 for count in np.bincount(places, minlength=4))


@pytest.mark.parametrize("preset", PRESETS)
def test_yes_and_no_are_about_as_frequent_and_right(preset):
    replies = []
    for take, action, rng in actions(preset, 100):
        kind, question, answer = questions.answers(take, action, rng)[-1]
        assert kind == "check"
        asked = re.search(rf"the {take.things[action.thing].phrase}\b", question)
        assert (asked is not None) == (answer == "yes")
        replies.append(answer)
    assert abs(replies.count("yes") / len(replies) - 0.5) < 0.06


def test_comparisons_are_right_and_yes_is_as_frequent_as_no():
    replies, numbers = [], set()
    for take, action, rng in actions("rich", 60):
        truth = {**truth_of(take, action), "check": take.things[action.thing].phrase}
        rows = questions.comparisons(take, action, rng)
        for (question, answer, options), (kind, form) in zip(
            rows[:10], 2 * list(questions.YES_NO_QUESTIONS.items()), strict=True
        ):
            assert not options
            assert re.fullmatch(re.escape(form).replace(r"\{\}", ".+"), question)
            assert answer == ("yes" if question == form.format(truth[kind]) else "no")
            replies.append(answer)
        for (question, answer, options), kind in zip(rows[10:], questions.parts(take, action), strict=True):
            assert question in questions.PHRASED_QUESTIONS[kind] and answer == truth[kind]
            assert options.count(answer) == 1 and len(set(options)) == len(options)
            numbers.add(len(options))
    assert abs(replies.count("yes") / len(replies) - 0.5) < 0.06
    assert numbers == {2, 3, 4}


def truth_of(take, action):
    return {**questions.parts(take, action), "caption": questions.caption(take, action)}


def assert_true(question, answer, take, action):
    """Check an answer against the simulated action; return the kind of the question."""
    kind = {text: kind for kind, text in questions.QUESTIONS.items()}.get(question, "check")
    kind = "caption" if question == questions.CAPTION_INSTRUCTION else kind
    if kind == "check":
        assert (f"the {take.things[action.thing].phrase}?" in question) == (answer == "yes")
    else:
        assert answer == truth_of(take, action)[kind]
    return kind


def test_conversations_tell_the_truth_about_a_window_in_the_video(toy_world):
    asked = set()
    for line in (toy_world / "instructions" / "initialisation.jsonl").read_text().splitlines():
        record = json.loads(line)
        _, index, ordinal = re.split("[/-]", record["id"])
        take = simulate(SEEDS["initialisation"] + int(index), PRESETS["easy"])
        action = take.actions[int(ordinal)]
        assert 0 <= action.start_s <= record["start"] < record["end"] <= action.end_s
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<video>\n")
        for question, answer in zip(values[::2], values[1::2], strict=True):
            asked.add(assert_true(question.removeprefix("<video>\n"), answer, take, action))
    assert asked == {*questions.QUESTIONS, "caption"}


@pytest.fixture(scope="module")
def practice(toy_world):
    """Take and action of every converted record, and the records, by source."""

    def action_of(record):
        index = int(re.fullmatch(r"practice/P(\d{4})-R01-TableTop\.mp4", record.video)[1])
        take = simulate(SEEDS["practice"] + index, PRESETS["easy"])
        (action,) = [a for a in take.actions if a.start_s <= record.window_s[0] < record.window_s[1] <= a.end_s]
        return take, action

    files = {name: ConversationFile(toy_world / "instructions" / f"{name}.jsonl") for name in PRACTICE}
    read = {name: [(record, *action_of(record)) for record in file] for name, file in files.items()}
    assert all(file.problems == [] and file.changes == {} for file in files.values())
    return read


PRACTICE = ("egtea", "egotimeqa", "egoexolearn")


def test_practice_goes_through_the_converters_and_stays_true(practice):
    assert {name: len(records) for name, records in practice.items()} == {
        "egtea": 4 * 6,  # takes of six actions
        "egotimeqa": 4 * 6 * 5,  # five questions each
        "egoexolearn": 4 * 6,
    }
    for record, take, action in practice["egtea"]:
        thing = take.things[action.thing]
        assert record.prompt.target == f"{action.verb} {thing.colour} {thing.kind}"
    for record, take, action in practice["egoexolearn"]:
        assert record.prompt.target == questions.caption(take, action)
    kinds = [assert_true(r.prompt.query, r.prompt.target, take, action) for r, take, action in practice["egotimeqa"]]
    assert Counter(kinds) == dict.fromkeys(questions.QUESTIONS, 24)


def test_practice_clips_of_the_sources_show_the_same_seconds(practice):
    def windows(name):
        return sorted(
            {(record.video, *(round(time_s, 2) for time_s in record.window_s)) for record, *_ in practice[name]}
        )

    assert windows("egotimeqa") == windows("egoexolearn")
    for (video, *window), (other, *seconds) in zip(windows("egtea"), windows("egotimeqa"), strict=True):
        assert video == other and window == pytest.approx(seconds, abs=0.0101)  # clips are named in milliseconds


def test_the_official_files_have_the_oddities_of_the_real_ones(toy_world):
    official = toy_world / "official"
    assert (official / "egtea/action_idx.txt").read_text().startswith("Picks up red_bottle 1\n")
    rows = json.loads((official / "egotimeqa/annotations.EgoTimeQA.json").read_text())
    lengths = [(row["moment_end_frame"] - row["moment_start_frame"]) / 30 for row in rows]
    assert np.mean(lengths) == pytest.approx(1.0)  # in means, not in seconds
    assert all(len({row["answer"], *row["wrong_answers"]}) == 4 for row in rows)
    closed = list(EgoTimeQA(official / "egotimeqa", form="closed").read(Counts()))
    assert all(isinstance(record, InstructionRecord) and record.prompt.task == "mcq" for record in closed)
    header = (official / "egoexolearn/annotations/fine_annotation_trainval_en.csv").read_text().splitlines()[0]
    assert header.startswith("video_uid,annotation_id,subset,view,scene,start_sec,end_sec,narration_en,")


def test_the_worlds_templates_are_in_its_words_and_the_first_asks_as_held_out_clips_are_asked(toy_world, toy_tokenizer):
    templates, tokenizer = Templates(toy_world / "templates"), load_tokenizer(str(toy_tokenizer))
    question = questions.QUESTIONS["hand"]
    choices = ("right", "left", "both", "neither")
    lettered = f"{question}\nOptions:\n(A) right\n(B) left\n(C) both\n(D) neither"
    banks = {"qa": question, "description": questions.CAPTION_INSTRUCTION, "action": None, "mcq": lettered}
    for task, base in banks.items():
        query = question if task in ("qa", "mcq") else ""
        prompt = PromptFields(task, query, "left", choices if task == "mcq" else ())
        record = InstructionRecord("x/0", "v.mp4", prompt, source="x")
        assert task != "mcq" or templates.render(record, "base", 0)[1] == "(B) left"
        assert base is None or templates.render(record, "base", 0)[0] == base
        for style in STYLES:
            texts = [templates.render(record, style, number)[0] for number in range(10)]
            assert len(set(texts)) == 10
            ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert tokenizer.unk_token_id not in ids


def test_the_tokenizer_knows_every_word_of_its_world(toy_tokenizer, tmp_path):
    questions.write_tokenizer(tmp_path / "rich", PRESETS["rich"])
    for preset in PRESETS:
        tokenizer = load_tokenizer(str(tmp_path / "rich" if preset == "rich" else toy_tokenizer))
        for take, action, rng in actions(preset, 20):
            rows = questions.answers(take, action, rng)
            texts = [questions.caption(take, action), *(text for row in rows for text in row[1:])]
            if take.world.phrasings:
                texts += [question for question, _, _ in questions.comparisons(take, action, rng)]
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_the_rich_world_says_the_same_in_several_ways():
    forms: Counter[str] = Counter()
    asked = {kind: set() for kind in questions.QUESTIONS}
    kinds = set()
    for take, action, rng in actions("rich", 60):
        used = take.things[action.thing]
        kinds |= {thing.kind for thing in take.things}
        text = take.narration(action)
        forms[text.replace(used.phrase, "X").replace(action.verb, "V").replace(action.hand, "H")] += 1
        assert re.search(r"\bC\b", text)
        for kind, question, _ in questions.answers(take, action, rng):
            asked[kind].add(question)
    assert len(forms) == len(PHRASINGS) and min(forms.values()) > 60
    assert all(asked[kind] == set(questions.PHRASED_QUESTIONS[kind]) for kind in ("verb", "object", "colour", "hand"))
    assert kinds == set(PRESETS["rich"].named_kinds) and len(kinds) == 9


def test_the_rich_world_asks_some_questions_with_options_and_many_that_compare(tmp_path):
    generate(tmp_path / "rich", replace(SMALL, preset="rich"), workers=1)
    file = ConversationFile(tmp_path / "rich" / "instructions" / "egotimeqa.jsonl")
    prompts = [record.prompt for record in file]
    assert not file.problems
    assert all(len(prompt.options) == (4 if prompt.task == "mcq" else 0) for prompt in prompts)
    assert 5 <= sum(prompt.task == "mcq" for prompt in prompts) <= len(prompts) - 5

    comparisons = ConversationFile(tmp_path / "rich" / "instructions" / "comparisons.jsonl")
    forms = Counter(record.prompt.task for record in comparisons)
    assert not comparisons.problems
    assert forms == {"qa": 2 * len(prompts), "mcq": 4 * len(prompts) // 5}
    assert len({record.id for record in comparisons}) == forms.total()

    header = tmp_path / "rich" / "world.json"
    header.write_text(header.read_text().replace('"format": 7', '"format": 6'))
    with pytest.raises(WorldExists, match=r"rich: holds a world with other settings \(format: 6, not 7\): remove it"):
        generate(tmp_path / "rich", replace(SMALL, preset="rich"), workers=1)


def test_the_vocabulary_of_the_default_world_is_fixed(toy_tokenizer):
    """Its size is that of the default experiment's language model."""
    assert len(load_tokenizer(str(toy_tokenizer))) == 74


# --------------------------------------------------------------------------------------------------------------------
# physics


def frames_of(take, action):
    start = round(action.start_s * FPS)
    return start, min(round(action.end_s * FPS), take.num_frames)


@pytest.mark.parametrize("preset", PRESETS)
def test_verbs_move_the_object_as_they_claim(preset):
    moved, shaken = {verb: [] for verb in VERBS}, []
    for take, action, _ in actions(preset, 60):
        start, end = frames_of(take, action)
        path = take.positions[start:end, action.thing]
        before = take.positions[max(start - 1, 0), action.thing]
        moved[action.verb].append(path[-1] - before)
        if action.verb == "shakes":
            shaken.append(np.ptp(path[:, 0]))
            assert np.ptp(path[:, 1:], axis=0).max() < 1e-9
        others = np.delete(take.positions[start:end], action.thing, axis=1)
        assert (others == others[:1]).all()
        assert (np.abs(take.positions[..., 0]) < 0.62).all()
        assert ((take.positions[..., 1] > 0) & (take.positions[..., 1] < 0.74)).all()  # on the table
        assert (take.positions[..., 2] >= 0).all()
    expected = {
        "picks up": (0, 0, 0.24),
        "puts down": (0, 0, -0.24),
        "pushes": (0, 0.26, 0),
        "pulls": (0, -0.26, 0),
        "taps": (0, 0, 0),
        "shakes": (0, 0, 0),
    }
    for verb, offsets in moved.items():
        assert len(offsets) > 10, verb
        np.testing.assert_allclose(offsets, np.tile(expected[verb], (len(offsets), 1)), atol=1e-9)
    # two periods over a handful of frames: never at rest, mostly both ways
    assert min(shaken) > 0.5 * SHAKE_M
    assert np.median(shaken) > 1.5 * SHAKE_M


@pytest.mark.parametrize("preset", PRESETS)
def test_a_held_object_stays_in_the_hand_that_took_it(preset):
    checked = 0
    for seed in range(60):
        take = simulate(seed, PRESETS[preset])
        held = None
        for action in take.actions:
            start, end = frames_of(take, action)
            fifth = int(np.ceil(0.2 * (end - start)))
            if held is not None:
                assert action.verb in ("shakes", "puts down")
                assert (action.thing, action.hand) == held
            first = start if held is not None else start + fifth
            last = end - fifth if action.verb == "puts down" else end
            held = (action.thing, action.hand) if action.verb in ("picks up", "shakes") else None
            if action.verb in ("picks up", "shakes", "puts down"):
                between = take.hands[action.hand][first:last] - take.positions[first:last, action.thing]
                assert np.abs(between).max() < 1e-6
                checked += 1
    assert checked > 100


# --------------------------------------------------------------------------------------------------------------------
# the views of the cameras


@pytest.mark.parametrize("preset", PRESETS)
def test_object_and_hand_are_in_the_ego_frame_when_flagged_visible(preset):
    inside = {True: [], False: []}
    for seed in range(60):
        take = simulate(seed, PRESETS[preset])
        camera = ego_camera(take, 64)
        for action in take.actions:
            start, end = frames_of(take, action)
            margin = (end - start) // 6  # as in the clips, the middle of the action
            for point in (take.positions[:, action.thing], take.hands[action.hand]):
                at = image_position(camera, point)[start + margin : end - margin]
                inside[action.ego_visible].append((np.abs(at) < 1).all(axis=1).mean())
    assert min(inside[True]) > 0.6
    assert np.mean(inside[True]) > 0.98
    if PRESETS[preset].glance == 0:
        assert not inside[False]
        return
    assert len(inside[False]) > 20
    assert np.mean(inside[False]) < 0.5  # looking away does hide the action


def test_the_used_object_is_drawn_where_it_is():
    """Leaving it out changes the frame around its place, so it is neither elsewhere nor behind the hands."""
    seen = []
    for seed in range(3):
        take = simulate(seed, PRESETS["easy"])
        camera = ego_camera(take, 64)
        for thing in range(len(take.things)):
            away = take.positions.copy()
            away[:, thing] = (0.0, -50.0, 0.0)  # behind the camera
            with_it = np.stack(list(render(take, camera, wearer=False))).astype(int)
            without = np.stack(list(render(replace(take, positions=away), camera, wearer=False))).astype(int)
            changed = np.abs(with_it - without).max(axis=-1) > 24
            at = image_position(camera, take.positions[:, thing] + np.array([0.0, 0.0, 0.08]))
            for action in take.actions:
                if action.thing != thing or not action.ego_visible:
                    continue
                start, end = frames_of(take, action)
                for t in range(start + 1, end - 1):
                    pixels = np.argwhere(changed[t])[:, ::-1] / 32 - 1
                    nearest = np.linalg.norm(pixels - at[t], axis=1).min() if len(pixels) else np.inf
                    seen.append(len(pixels) >= 20 and nearest < 0.2)
    assert len(seen) > 80
    assert np.mean(seen) > 0.9


def test_exo_cameras_see_left_and_right_mirrored():
    take = simulate(0, PRESETS["easy"])
    cameras = {"ego": ego_camera(take, 64), **{f"cam0{n}": exo_camera(take, f"cam0{n}", 84, 64) for n in range(1, 5)}}
    for name, camera in cameras.items():
        left, right = (image_position(camera, np.tile([[x, 0.2, 0.1]], (take.num_frames, 1))) for x in (-0.2, 0.2))
        assert ((left[:, 0] < right[:, 0]) == (name == "ego")).all(), name


@pytest.mark.parametrize(("preset", "width", "height"), [("hard", 84, 64), ("hard", 64, 84), ("fair", 84, 64)])
@pytest.mark.parametrize("name", ["cam01", "cam02", "cam03", "cam04"])
def test_exo_cameras_see_object_and_hand(name, preset, width, height):
    inside = []
    for seed in range(20):
        take = simulate(seed, PRESETS[preset])
        camera = exo_camera(take, name, width, height)
        for action in take.actions:
            start, end = frames_of(take, action)
            for point in (take.positions[:, action.thing], take.hands[action.hand]):
                at = image_position(camera, point)[start:end]
                inside.append((np.abs(at) < 1).all(axis=1).mean())
    assert np.mean(inside) > 0.97


def test_in_the_fair_world_exo_cameras_see_more_and_the_glasses_less_than_in_the_default():
    def size_and_drift(preset, see):
        """Return the used object's width relative to half the frame, and its mean movement between frames."""
        widths, drifts = [], []
        for seed in range(20):
            take = simulate(seed, PRESETS[preset])
            camera = see(take)
            for action in take.actions:
                start, end = frames_of(take, action)
                at = take.positions[:, action.thing]
                here, shifted = (image_position(camera, at + np.array([x, 0.0, 0.0]))[start:end] for x in (0.0, 0.1))
                widths.append(np.abs(here - shifted)[:, 0].mean())
                drifts.append(np.linalg.norm(np.diff(here, axis=0), axis=1).mean())
        return np.mean(widths), np.mean(drifts)

    views = {"ego": lambda take: ego_camera(take, 64), "exo": lambda take: exo_camera(take, "cam02", 84, 64)}
    (width, _), (fair_width, _) = (size_and_drift(preset, views["exo"]) for preset in ("easy", "fair"))
    assert fair_width / width == pytest.approx(np.tan(np.radians(27)) / np.tan(np.radians(21)), rel=0.01)
    (_, drift), (_, fair_drift) = (size_and_drift(preset, views["ego"]) for preset in ("easy", "fair"))
    assert fair_drift > 1.5 * drift
    away = [
        np.mean([not a.ego_visible for seed in range(100) for a in simulate(seed, PRESETS[preset]).actions])
        for preset in ("easy", "fair")
    ]
    assert away[0] < 0.08 and 0.25 < away[1] < 0.35


def test_in_the_faint_world_the_glasses_see_every_action_but_small_off_the_middle_and_blurred():
    sizes, offsets = {"ego": [], "cam01": []}, {"easy": [], "faint": []}
    for seed in range(40):
        take = simulate(seed, PRESETS["faint"])
        cameras = {view: toy_views.camera_of(take, view) for view in sizes}
        for action in take.actions:
            assert action.ego_visible
            frames, at = toy_views.clip_frames(take, action), take.positions[:, action.thing]
            for point in (at, take.hands[action.hand]):  # in each frame that the model sees
                assert (np.abs(image_position(cameras["ego"], point)[frames]) < 0.97).all()
            for view, camera in cameras.items():
                ends = (image_position(camera, at + np.array([x, 0.0, 0.0]))[frames, 0] for x in (0.0, 0.15))
                sizes[view].append(np.abs(np.subtract(*ends)) * camera.width / 2)
        for preset, of_preset in offsets.items():
            same = simulate(seed, PRESETS[preset])
            at = same.positions[:, same.actions[0].thing]
            here, shifted = (image_position(ego_camera(same, 64), at + np.array([x, 0.0, 0.0])) for x in (0.0, 0.15))
            in_widths = np.linalg.norm(here, axis=1) / np.abs(here - shifted)[:, 0]
            of_preset.append(in_widths[toy_views.clip_frames(same, same.actions[0])].mean())
    pixels = {view: np.concatenate(of_view) for view, of_view in sizes.items()}
    assert pixels["ego"].min() > 3 and 1.8 * pixels["ego"].mean() < pixels["cam01"].mean()
    assert np.mean(offsets["faint"]) > 1.3 * np.mean(offsets["easy"])

    take = simulate(0, PRESETS["faint"])
    camera = ego_camera(take, 64)
    sharp = [frame.astype(int) for frame in render(take, replace(camera, exposure=1), wearer=False)]
    blurred = list(render(take, camera, wearer=False))
    assert np.array_equal(blurred[0], sharp[0])
    assert np.abs(blurred[9] - (sharp[8] + sharp[9]) / 2).max() <= 1


@pytest.mark.slow
def test_what_exo_cameras_show_clearly_in_the_faint_world_is_in_the_frames_of_the_glasses():
    found = toy_views.measure(PRESETS["faint"], takes=100, tested=40)
    exo, ego = found["cam01"], found["ego"]
    hard = [place for place, factor in enumerate(toy_views.FACTORS) if factor != "hand"]  # that is easy from both
    assert np.mean([exo["whole"][place] - ego["whole"][place] for place in hard]) > 0.05
    for place in range(len(toy_views.FACTORS)):
        # An oracle that knows where to look reads as much from the glasses as the reader from the better camera.
        assert ego["crops"][place] > max(ego["frequent"][place] + 0.2, exo["whole"][place] - 0.1)


def test_hands_of_the_fair_world_cover_more_of_the_ego_frame():
    take = simulate(1, PRESETS["easy"])
    large = replace(take, world=replace(take.world, hand_scale=1.5))
    covered = []
    for world in (take, large):
        away = replace(world, hands={hand: place - np.array([0.0, 50.0, 0.0]) for hand, place in world.hands.items()})
        camera = ego_camera(world, 64)
        rendered = (np.stack(list(render(t, camera, wearer=False))).astype(int) for t in (world, away))
        covered.append((np.abs(np.subtract(*rendered)).max(axis=-1) > 24).sum())
    assert covered[1] > 1.3 * covered[0]


def test_every_take_of_the_fair_world_has_four_exo_cameras_and_the_same_best_one(tmp_path):
    settings = Settings(preset="fair", train_takes=2, val_takes=1, initialisation_takes=1, practice_takes=1)
    generate(tmp_path / "fair", settings, workers=1)
    groups = [json.loads(line) for line in (tmp_path / "fair" / "ego_exo_clip" / "groups.jsonl").open()]
    assert [len(group["views"]["exo"]) for group in groups] == [4, 4]
    assert [group["best_exo"] for group in groups] == ["cam01", "cam01"]
