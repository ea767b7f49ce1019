"""Benchmarks of the generated world: the official fields, answers that are true, and nothing that gives them away."""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import yaml

from datamodules.ego_exo_clip.sources.ego_exo4d import camera_wearer_text
from datamodules.egobench.egoplan import EgoPlan
from datamodules.io.annotations import Counts
from datamodules.text import load_tokenizer
from datamodules.toy_world import questions
from datamodules.toy_world.benchmarks import NEXT, write_benchmarks
from datamodules.toy_world.questions import BENCHMARK_PROMPTS, phrase
from datamodules.toy_world.release import SEEDS
from datamodules.toy_world.scene import COLOURS, KINDS, PRESETS, VERBS, simulate
from datamodules.video.probe import probe

TAKES = 60


@pytest.fixture(scope="module", params=["easy", "hard"])
def written(request, tmp_path_factory):
    """Folder of as many takes as by default, in the smallest frames, and the takes."""
    root = tmp_path_factory.mktemp(request.param) / "egobench"
    seeds = [SEEDS["benchmark"] + number for number in range(TAKES)]
    write_benchmarks(root, PRESETS[request.param], seeds, 32, False, workers=2)
    return root, [simulate(seed, PRESETS[request.param]) for seed in seeds]


def read(path):
    return json.loads(path.read_text())


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def phrase_of(take, action):
    return phrase(action.verb, take.things[action.thing], action.hand)


def frames(path):
    return probe(path).num_frames


def by_uid(root, takes):
    """Takes by the name that Ego4D's videos have; EgoMCQ has them all, in order."""
    uids = sorted(path.stem for path in (root / "egomcq/videos").iterdir())
    return dict(zip(uids, takes, strict=True))


def assert_even(places, options):
    counts = np.bincount(places, minlength=options)
    assert len(counts) == options
    assert counts.max() - counts.min() <= 1


def test_every_benchmark_has_its_official_files(written):
    root, _ = written
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".json", ".csv", ".txt")}
    assert found == {
        "charades_ego/CharadesEgo_v1_test_only1st.csv",
        "charades_ego/Charades_v1_classes.txt",
        "egomcq/egomcq.json",
        "egoplan/EgoPlan_validation.json",
        "egoschema/questions.json",
        "egoschema/subset_answers.json",
        "egoschema/uid_to_ego4d.json",
        "egotaskqa/direct/test_qas.json",
        "egotaskqa/direct/train_qas.json",
        "egotaskqa/indirect/test_qas.json",
        "egotaskqa/indirect/train_qas.json",
        "epic100_mir/EPIC_100_retrieval_test.csv",
        "epic100_mir/EPIC_100_retrieval_test_sentence.csv",
        "epic100_mir/EPIC_100_video_info.csv",
        "qaego4d/annotations.QaEgo4D_test.json",
        "qaego4d/annotations.QaEgo4D_test_close.json",
        "vlnqa/vlnqa.json",
    }


def test_egoschema_one_of_five_happens_in_the_clip(written):
    root, takes = written
    rows = read(root / "egoschema/questions.json")
    answers = read(root / "egoschema/subset_answers.json")
    cuts = read(root / "egoschema/uid_to_ego4d.json")
    recorded = by_uid(root, takes)
    assert len(rows) == 2 * TAKES
    assert len(answers) == 100  # as in the real one, some have no public answer
    right_things, places = [], []
    for row in rows:
        assert list(row) == ["q_uid", "google_drive_id", "question", *(f"option {n}" for n in range(5))]
        cut, options = cuts[row["q_uid"]], [row[f"option {n}"] for n in range(5)]
        take = recorded[cut["video_uid"]]
        span = [cut["starting_sec"], cut["ending_sec"]]
        shown = [a for a in take.actions if span[0] - 0.1 < a.start_s and a.end_s < span[1] + 0.1]
        assert len(shown) == 3
        assert frames(root / f"egoschema/videos/{row['q_uid']}.mp4") == (span[1] - span[0]) * 8
        happened = {
            f"{phrase_of(take, a)} and then {phrase_of(take, b)}" for n, a in enumerate(shown) for b in shown[n + 1 :]
        }
        (true,) = [number for number, option in enumerate(options) if option in happened]
        assert answers.get(row["q_uid"], true) == true
        places.append(true)
        assert len(set(options)) == 5
        things = {thing.phrase for thing in take.things}
        right_things += [any(t in o for t in things) for n, o in enumerate(options) if n != true]
    assert_even(places, 5)
    assert np.mean(right_things) == pytest.approx(0.5, abs=0.06)


def test_qaego4d_closed_is_part_of_the_open_one_with_wrong_answers(written):
    root, takes = written
    opened = read(root / "qaego4d/annotations.QaEgo4D_test.json")
    closed = read(root / "qaego4d/annotations.QaEgo4D_test_close.json")
    recorded = by_uid(root, takes)
    assert (len(opened), len(closed)) == (3 * TAKES, 2 * TAKES)
    assert len({row["sample_id"] for row in opened}) == len(opened)
    for row in opened:
        take, question = recorded[row["video_uid"]], row["question"]
        assert row["moment_start_frame"] < row["moment_end_frame"] <= 30 * row["video_end_sec"]
        assert frames(root / f"qaego4d/videos/{row['video_id']}.mp4") == take.num_frames
        if "What colour is the" in question:
            assert row["answer"] in [t.colour for t in take.things if f" {t.kind}?" in question]
        elif "Which object is" in question:
            assert row["answer"] in [t.kind for t in take.things if f" {t.colour}?" in question]
        else:
            assert row["answer"] == take.actions[0 if "first" in question else -1].verb
    for row in closed:
        wrong = row.pop("wrong_answers")
        assert row in opened
        assert len({row["answer"], *wrong}) == 4


def test_egotaskqa_has_every_answer_in_training_and_tells_references_apart(written):
    root, _ = written
    rows = {
        (name, split): read(root / f"egotaskqa/{name}/{split}_qas.json")
        for name in ("direct", "indirect")
        for split in ("train", "test")
    }
    fields = "interval question answer type category semantic structural reference program reasoning_type"
    for (name, split), some in rows.items():
        assert 30 <= len(some) <= 200, (name, split)
        for row in some:
            assert list(row) == [*fields.split(), "video_id", "question_id"]
            tags = [*row["type"], *row["category"], row["semantic"], row["structural"], row["reference"]]
            assert row["reasoning_type"] == "$".join(tags)
    for name in ("direct", "indirect"):
        known = {row["answer"] for row in rows[name, "train"]}
        assert {row["answer"] for row in rows[name, "test"]} <= known
        asked = [{row["question_id"] for row in rows[name, split]} for split in ("train", "test")]
        assert not asked[0] & asked[1]
    assert {row["reference"] for row in rows["direct", "test"]} == {"direct", "indirect"}
    assert {row["reference"] for row in rows["indirect", "train"]} == {"direct"}
    assert {row["reference"] for row in rows["indirect", "test"]} == {"indirect"}


def test_egotaskqa_answers_are_true(written):
    root, takes = written
    checked = Counter()
    for split in ("train", "test"):
        for row in read(root / f"egotaskqa/direct/{split}_qas.json"):
            name, view, start, end = row["interval"].split("|")
            take, question, answer = takes[int(name.removeprefix("toy-"))], row["question"], row["answer"]
            assert view == "fpv1"
            assert frames(root / f"egotaskqa/qa_videos/{row['interval']}.mp4") == (int(end) - int(start)) // 3
            half = [a for a in take.actions if int(start) / 24 - 0.1 < a.start_s and a.end_s < int(end) / 24 + 0.1]
            assert len(half) == 3
            things = [take.things[a.thing] for a in half]
            action = half[-1 if "last" in question else 0]
            thing = take.things[action.thing]
            if ", yes?" in question:
                expected = "yes" if f": {action.verb}," in question else "no"
            elif question.startswith("Does"):
                expected = "yes" if any(f" {t.phrase}?" in question for t in things) else "no"
            elif "first with the" in question:
                expected = next(a.verb for a, t in zip(half, things, strict=True) if f" {t.phrase}?" in question)
            elif question.startswith("What does"):
                expected = action.verb
            elif question.startswith("What colour is the object"):
                expected = thing.colour
            elif question.startswith("What colour"):
                expected = next(t.colour for t in things if f" {t.kind}?" in question)
            elif question.startswith("Which object is"):
                expected = next(t.kind for t in things if f" {t.colour}?" in question)
            else:
                expected = thing.kind
            assert answer == expected
            checked[question.split()[0], row["reference"]] += 1
    assert len(checked) == 5
    assert min(checked.values()) > 10


def test_charades_ego_classes_occur_and_actions_are_true(written):
    root, takes = written
    lines = (root / "charades_ego/Charades_v1_classes.txt").read_text().splitlines()
    assert [line[:5] for line in lines] == [f"c{number:03d} " for number in range(len(lines))]
    assert 60 <= len(lines) <= 157
    classes = {line[:4]: line[5:] for line in lines}
    rows = table(root / "charades_ego/CharadesEgo_v1_test_only1st.csv")
    header = "id subject scene quality relevance verified script objects descriptions actions length"
    assert list(rows[0]) == header.split()
    seen = set()
    for row, take in zip(rows, takes, strict=True):
        assert row["id"].endswith("EGO")
        assert frames(root / f"charades_ego/CharadesEgo_v1_480/{row['id']}.mp4") == take.num_frames
        for entry in filter(None, row["actions"].split(";")):
            name, start, _ = entry.split()
            (action,) = [a for a in take.actions if abs(a.start_s - float(start)) < 0.006]
            assert classes[name] == f"Camera-wearer {phrase_of(take, action)}."
            seen.add(name)
    assert seen == set(classes)


def test_epic_clips_captions_and_classes_agree(written):
    root, takes = written
    rows = table(root / "epic100_mir/EPIC_100_retrieval_test.csv")
    sentences = table(root / "epic100_mir/EPIC_100_retrieval_test_sentence.csv")
    clips = {row["narration_id"]: row for row in rows}
    assert len(clips) == len(rows) == 3 * TAKES
    assert all(clips[row["narration_id"]]["narration"] == row["narration"] for row in sentences)
    texts = [row["narration"] for row in sentences]
    assert len(set(texts)) == len(texts)
    assert {row["narration"] for row in rows} == set(texts)
    info = table(root / "epic100_mir/EPIC_100_video_info.csv")
    assert {(row["fps"], row["resolution"]) for row in info} == {("8.0", "32x32")}
    for row in rows:
        participant, video, ordinal = row["narration_id"].split("_")
        take = takes[10 * (int(participant[1:]) - 1) + int(video) - 1]
        action = take.actions[int(ordinal)]
        thing = take.things[action.thing]
        assert row["narration"] == questions.caption(take, action)
        assert VERBS[int(row["verb_class"])] == action.verb
        assert int(row["noun_class"]) == KINDS.index(thing.kind) * 6 + list(COLOURS).index(thing.colour)
        assert ast.literal_eval(row["all_noun_classes"]) == [int(row["noun_class"])]
        assert ast.literal_eval(row["all_nouns"]) == [f"{thing.kind}:{thing.colour}"]
        assert float(row["start_timestamp"].split(":")[-1]) == pytest.approx(action.start_s, abs=0.006)
        assert int(row["stop_frame"]) / 60 == pytest.approx(action.end_s, abs=0.02)
        assert frames(root / f"epic100_mir/videos/{participant}/{row['video_id']}.MP4") == take.num_frames


def test_egoplan_only_one_option_is_possible_and_the_next_action_is_not_shown(written):
    root, takes = written
    rows = read(root / "egoplan/EgoPlan_validation.json")
    epic = {f"P{number // 10 + 1:02d}_{number % 10 + 1:02d}": take for number, take in enumerate(takes)}
    recorded = by_uid(root, takes) | epic
    read_rows = EgoPlan(root / "egoplan", root / "egoplan/videos").read(Counts())
    assert [row["sample_id"] for row in rows] == list(range(2 * TAKES))
    assert {row["video_source"] for row in rows} == {"Ego4D", "EpicKitchens"}
    for row, sample in zip(rows, read_rows, strict=True):
        take, (clip,) = recorded[row["video_id"]], sample.clips
        options = [row[f"choice_{letter}"] for letter in "abcd"]
        assert options["ABCD".index(row["golden_choice_idx"])] == row["answer"]
        assert len(set(options)) == 4
        seen_s = clip.end_s
        assert (row["video_source"] == "EpicKitchens") == (row["video_id"] in epic)
        (step,) = [n for n, a in enumerate(take.actions) if a.start_s < seen_s <= a.end_s + 1e-9]
        after = round(take.actions[step + 1].start_s * 8)
        assert after - 1 <= seen_s * 8 < after  # the last frame before the next action
        assert clip.start_s == pytest.approx(take.actions[max(0, step - 1)].start_s, abs=0.12)
        assert frames(root / "egoplan/videos" / clip.video) == take.num_frames
        assert row["answer"] == phrase_of(take, take.actions[step + 1])
        held = take.actions[step].verb in ("picks up", "shakes")
        in_hand = take.things[take.actions[step].thing].phrase
        possible = [
            option
            for option in options
            if option.startswith(("puts down", "shakes")) == held
            and option.endswith((in_hand,) if held else tuple(thing.phrase for thing in take.things))
        ]
        assert possible == [row["answer"]]
        progress = row["task_progress_metadata"]
        assert [entry["narration_text"] for entry in progress] == [
            phrase_of(take, action) for action in take.actions[max(0, step - 1) : step + 1]
        ]
        assert progress[-1]["stop_frame"] == row["current_observation_frame"]
        assert all(entry["start_frame"] < entry["stop_frame"] for entry in progress)
    assert_even(["ABCD".index(row["golden_choice_idx"]) for row in rows], 4)


def test_vlnqa_asks_for_the_announced_action_that_follows_the_clip(written):
    root, takes = written
    rows = read(root / "vlnqa/vlnqa.json")
    assert set(Counter(row["answer"] for row in rows).values()) == {len(rows) // 4}
    assert 40 <= len(rows) <= 100
    for row in rows:
        assert list(row) == ["video", "question", "candidates", "answer"]
        assert sorted(row["candidates"]) == sorted(NEXT)
        number, _, end = row["video"].removesuffix(".mp4").replace("_frame", "-").split("-")
        take = takes[int(number)]
        following = next(a for a in take.actions if round(a.start_s * 8) == int(end))
        assert following.verb == row["answer"]
        assert phrase_of(take, following) in row["question"]
        assert 0 < frames(root / f"vlnqa/videos/{row['video']}") <= int(end)
    places = np.bincount([row["candidates"].index(row["answer"]) for row in rows], minlength=4)
    assert places.min() > len(rows) / 8


def test_egomcq_one_clip_of_five_matches_the_text(written):
    root, takes = written
    samples = read(root / "egomcq/egomcq.json")
    recorded = by_uid(root, takes)
    assert list(samples) == [str(number) for number in range(len(samples))]
    kinds = Counter(sample["types"] for sample in samples.values())
    assert kinds[1] == TAKES
    assert kinds[2] > 20
    for sample in samples.values():
        choices = [sample["choices"][str(number)] for number in range(5)]
        assert choices[sample["answer"]] == sample["query"]
        assert sum(choice["clip_text"] == sample["query"]["clip_text"] for choice in choices) == 1
        assert len({choice["video_uid"] for choice in choices}) == {1: 5, 2: 1}[sample["types"]]
        for choice in choices:
            take = recorded[choice["video_uid"]]
            (action,) = [a for a in take.actions if abs(a.start_s - choice["clip_start"]) < 1e-3]
            assert camera_wearer_text(choice["clip_text"]) == questions.caption(take, action)
    assert_even([sample["answer"] for sample in samples.values()], 5)


def test_takes_of_the_benchmarks_are_their_own():
    seeds = sorted(SEEDS.values())
    assert SEEDS["benchmark"] == 400_000
    assert {b - a for a, b in pairwise(seeds)} == {100_000}


def test_few_takes_leave_out_what_they_cannot_ask(tmp_path):
    write_benchmarks(tmp_path / "egobench", PRESETS["easy"], [400_000], 32, False, workers=1)
    assert all(sample["types"] == 2 for sample in read(tmp_path / "egobench/egomcq/egomcq.json").values())
    assert len(read(tmp_path / "egobench/egoschema/questions.json")) == 2


def test_generated_worlds_hold_them(toy_world, toy_settings):
    rows = table(toy_world / "egobench/charades_ego/CharadesEgo_v1_test_only1st.csv")
    assert len(rows) == toy_settings.benchmark_takes
    assert yaml.safe_load((toy_world / "templates/egobench.yaml").read_text()) == BENCHMARK_PROMPTS


def texts_of(root):
    """Everything a model could be shown: questions, options, answers, captions and classes."""
    for row in read(root / "egoschema/questions.json"):
        yield from [row["question"], *(row[f"option {n}"] for n in range(5))]
    for row in read(root / "qaego4d/annotations.QaEgo4D_test_close.json"):
        yield from [row["question"], row["answer"], *row["wrong_answers"]]
    for name in ("direct", "indirect"):
        for split in ("train", "test"):
            for row in read(root / f"egotaskqa/{name}/{split}_qas.json"):
                yield from [row["question"], row["answer"]]
    yield from (line[5:] for line in (root / "charades_ego/Charades_v1_classes.txt").read_text().splitlines())
    yield from (row["narration"] for row in table(root / "epic100_mir/EPIC_100_retrieval_test.csv"))
    for row in read(root / "egoplan/EgoPlan_validation.json"):
        yield from [row["question"], row["task_goal"], *(row[f"choice_{letter}"] for letter in "abcd")]
        yield from (entry["narration_text"] for entry in row["task_progress_metadata"])
    for row in read(root / "vlnqa/vlnqa.json"):
        yield from [row["question"], *row["candidates"]]
    for sample in read(root / "egomcq/egomcq.json").values():
        for choice in sample["choices"].values():
            yield str(camera_wearer_text(choice["clip_text"]))
            yield choice["clip_text"].removeprefix("#C C ")


def test_the_tokenizer_knows_every_text_and_prompt(written, toy_tokenizer):
    tokenizer = load_tokenizer(str(toy_tokenizer))
    texts = list(texts_of(written[0]))
    assert len(texts) > 2000
    templates = [text for name in ("choice", "open") for text in BENCHMARK_PROMPTS[name].values()]
    filled = [text.format(question="What?", options="(A) red\n(B) blue") for text in templates]
    for text in {*texts, *filled, BENCHMARK_PROMPTS["prefill"], "Best option: (A"}:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text


def test_letters_are_tokens_of_their_own_and_read_well(toy_tokenizer):
    tokenizer = load_tokenizer(str(toy_tokenizer))
    opening = tokenizer("(", add_special_tokens=False)["input_ids"]
    assert len(opening) == 1
    seconds = [tokenizer(f"({letter}) shakes", add_special_tokens=False)["input_ids"][1] for letter in "ABCDE"]
    assert len(set(seconds)) == 5
    for text in ("(B) shakes", "Options: (A) red (E) picks up", "Camera-wearer taps the red box."):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
