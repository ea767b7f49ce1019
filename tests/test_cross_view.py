"""Benchmarks that compare views: official files, prompts with several clips, and the agreement of answers."""

from __future__ import annotations

import ast
import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from datamodules.batch import VIDEO_TOKEN_ID
from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import load
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.io.jsonl import InvalidRecords
from datamodules.text import TextEncoder, load_tokenizer
from datamodules.toy_world.cross_view import write_cross_view
from datamodules.toy_world.questions import phrase
from datamodules.toy_world.release import SEEDS, generate
from datamodules.toy_world.scene import PRESETS, simulate
from datamodules.video.errors import ClipDecodeError, FileMissing
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints
from lightning_modules.config import compose
from lightning_modules.egobench.scoring import score
from lightning_modules.egobench.tasks import TASKS

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "ego_exo"
OFFICIAL = {
    "egoexomem_egoexo4d": ("egoexomem_egoexo4d_qa.json", 764, 7),
    "egoexomem_lemma": ("egoexomem_lemma_qa.json", 1824, 8),
}
NAMES = [*OFFICIAL]


def official(name):
    file = SAMPLES / OFFICIAL[name][0]
    if not file.exists():
        pytest.skip(f"needs the official file {file}, which is not part of the repository")
    return load({"name": name, "annotations": file, "videos": "/nowhere"})


def dataset_of(world, name, **changes):
    config = compose(tiny.EXPERIMENTS / "toy", "stage3", [f"data_root={world}"])["egobench"] | changes
    (entry,) = (entry for entry in config["benchmarks"] if entry["name"] == name)
    loaded, encoder = load(entry), TextEncoder(str(world / "tokenizer"), 400)
    return BenchmarkDataset(
        loaded, TASKS[loaded.task], EgoBenchConfig(**config), ClipConfig(tiny.FRAMES, tiny.SIZE), encoder
    )


def stage_of(world, name):
    stage = tiny.make_stage(name, world / "tokenizer")
    stage.configure_model()
    tiny.scatter(stage)
    return stage.eval()


# --------------------------------------------------------------------------------------------------------------------
# official files


@pytest.mark.parametrize("name", OFFICIAL)
def test_counts_of_the_official_files(name):
    loaded = official(name)
    _, questions, types = OFFICIAL[name]
    assert len(loaded.samples) == questions and not loaded.notes
    assert len({group for sample in loaded.samples for group in sample.groups if group.startswith("Q")}) == types
    for sample in loaded.samples:
        ego, exo, both = sample.inputs
        assert (ego.views, exo.views, both.views) == ("ego", "exo", "both")
        assert both.clips == (*ego.clips, *exo.clips) == sample.clips


def test_options_are_shown_in_the_order_of_the_official_evaluation():
    """In the authors' results the third option of the file's first question is the last one."""
    loaded = official("egoexomem_egoexo4d")
    assert loaded.samples[0].id == "cmu_bike02_2_Q1_001"
    assert loaded.samples[0].answer == 3
    # In the file the first option is right in two of three questions about LEMMA.
    places = np.bincount([sample.answer for sample in official("egoexomem_lemma").samples])
    assert places.min() > 1824 / 4 - 60 and places.max() < 1824 / 4 + 60


def test_glasses_are_those_of_the_take(tmp_path):
    loaded = official("egoexomem_egoexo4d")
    named = {clip.video.split("/")[-1] for sample in loaded.samples for clip in sample.clips if clip.view == "ego"}
    assert {"aria01_214-1.mp4", "aria02_214-1.mp4", "aria07_214-1.mp4"} <= named
    folder = tmp_path / "cmu_bike02_2" / "frame_aligned_videos"
    folder.mkdir(parents=True)
    (folder / "aria09_214-1.mp4").touch()
    file = SAMPLES / OFFICIAL["egoexomem_egoexo4d"][0]
    loaded = load({"name": "egoexomem_egoexo4d", "annotations": file, "videos": tmp_path})
    assert loaded.samples[0].clips[0].video == "cmu_bike02_2/frame_aligned_videos/aria09_214-1.mp4"


QUESTION = {
    "qa_id": "take_1_Q4_001",
    "qa_type": "Q4",
    "take_name": "take_1",
    "required_view": "ego",
    "question": "Where is it?",
    "options": ["left", "right", "above", "below"],
    "correct_answer": 2,
    "verification": {"keyframes": ["keyframes/take_1_Q4_001/ego_aria03_214-1_000065.jpg"]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qa_type": "Q9"}, "type is 'Q9', expected Q1 to Q8"),
        ({"required_view": "both"}, "field 'required_view' is 'both', expected ego, exo, either"),
        ({"options": ["left", "left", "above", "below"]}, "expected four different texts"),
        ({"options": "left"}, "expected four different texts"),
        ({"correct_answer": 4}, "expected four different texts and 0 to 3"),
        ({"correct_answer": None}, "field 'correct_answer' is None"),
        ({"question": ""}, "field 'question' is ''"),
        ({"take_name": 3}, "field 'take_name' is 3"),
    ],
)
def test_wrong_rows_are_named(tmp_path, changes, message):
    file = tmp_path / "qa_merged_v6.json"
    file.write_text(json.dumps([QUESTION, QUESTION | {"qa_id": "b"} | changes]))
    with pytest.raises(InvalidRecords) as refused:
        load({"name": "egoexomem_egoexo4d", "annotations": tmp_path, "videos": tmp_path})
    (problem,) = refused.value.problems
    assert f"{file} entry 2: " in problem and message in problem


def test_a_question_about_lemma_names_take_and_type_by_its_id(tmp_path):
    row = {key: QUESTION[key] for key in ("question", "options", "correct_answer")}
    rows = {"26k_11_2_Q7_001": row | {"status": "ok"}, "26k_11_2_Q7_002": row | {"status": "bad"}}
    (tmp_path / "qa_verified.json").write_text(json.dumps(rows))
    loaded = load({"name": "egoexomem_lemma", "annotations": tmp_path, "videos": tmp_path})
    (sample,) = loaded.samples
    assert [clip.video for clip in sample.clips] == ["26k-11-2/fpv1.mp4", "26k-11-2/master.mp4"]
    assert sample.groups == ("Q7",) and sample.options[sample.answer] == "above"
    (tmp_path / "qa_verified.json").write_text(json.dumps({"26k": row | {"status": "ok"}}))
    with pytest.raises(InvalidRecords) as refused:
        load({"name": "egoexomem_lemma", "annotations": tmp_path, "videos": tmp_path})
    assert "entry '26k': expected an object under a key <take>_Q1_001" in refused.value.problems[0]


CUT = {"type": "video", "video_path": "EgoExo4D/takes/t/frame_aligned_videos/cam03.mp4", "nframes": 8}
TABLE = {
    "index": "7",
    "question": "Which of these shows what <video> shows?",
    "options": "A. <video>\nB. <image>\nC. neither,\nnor the first",
    "response_format": "Answer with the letter.",
    "answer": "B",
    "subtask_type": "Action Relation",
    "medias": repr(
        [
            CUT | {"video_start": 2, "video_end": 4.5},
            {"type": "frames", "image_paths": ["CVMHAT/data/a/1.jpg", "CVMHAT/data/a/2.jpg"]},
            {"type": "image", "image_paths": ["TF2023/data/1.jpg"]},
        ]
    ),
}


def table(folder, *rows):
    with (folder / "EgoExoBench_MCQ.tsv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(TABLE), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return {"name": "egoexobench", "annotations": folder, "videos": folder}


def test_media_of_question_and_options_are_numbered_in_order(tmp_path):
    loaded = load(table(tmp_path, TABLE))
    (sample,) = loaded.samples
    assert sample.text == "Which of these shows what video 1 shows?"
    assert sample.options == ("video 2", "video 3", "neither, nor the first") and sample.answer == 1
    assert sample.groups == ("Action Relation",)
    cut, frames, image = sample.clips
    assert (cut.video, cut.start_s, cut.end_s, cut.view) == (CUT["video_path"], 2, 4.5, "exo")
    # Files of other datasets are those that the authors publish.
    assert (frames.video, image.video) == (
        "processed_videos/question7_video1.mp4",
        "processed_videos/question7_video2.jpg",
    )
    assert [(shown.clips, shown.labels) for shown in sample.inputs] == [
        (sample.clips, ("Video 1:", "Video 2:", "Video 3:"))
    ]
    assert loaded.notes == [
        "egoexobench: 7,299 of 7,300 samples are missing: fetch the file again",
        "egoexobench: 10 of 11 tasks are missing: fetch the file again",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"medias": "[1"}, "field 'medias' is '[1', expected a list of media"),
        ({"medias": "[]"}, "field 'medias' is '[]', expected a list of media"),
        ({"medias": repr([CUT])}, "3 marks <video> or <image>, but 1 in 'medias'"),
        ({"medias": repr([{"type": "sound"}] * 3)}, "medium 1: 'type' is 'sound'"),
        ({"medias": repr([{"type": "image", "image_paths": []}] * 3)}, "medium 1: field 'image_paths' is []"),
        (
            {"medias": repr([CUT | {"video_start": 4, "video_end": 2}] * 3)},
            "'video_start' and 'video_end' give 4 to 2 s",
        ),
        ({"answer": "D"}, "field 'answer' is 'D', expected a letter of ABC"),
        ({"options": "A. <video>\nC. <image>"}, "expected lines 'A. ...'"),
        ({"options": "A. same\nB. same"}, "expected lines 'A. ...' of own texts"),
        ({"subtask_type": ""}, "field 'subtask_type' is ''"),
    ],
)
def test_wrong_rows_of_the_table_are_named(tmp_path, changes, message):
    with pytest.raises(InvalidRecords) as refused:
        load(table(tmp_path, TABLE, TABLE | {"index": "8"} | changes))
    (problem,) = refused.value.problems
    assert "EgoExoBench_MCQ.tsv line " in problem and message in problem


def test_a_single_image_is_a_clip(tmp_path):
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:, :10] = 200
    Image.fromarray(pixels).save(tmp_path / "one.png")
    reader, info = ClipReader(), probe(tmp_path / "one.png")
    end_s = reader.usable_end_s(tmp_path / "one.png", 0.0, math.inf)
    assert (info.num_frames, info.codec, info.duration_s) == (1, "images", end_s)
    frames = reader.read(tmp_path / "one.png", segment_midpoints(0.0, end_s, 3), 20).frames.numpy()
    assert frames.shape == (3, 20, 20, 3) and abs(frames.astype(int) - pixels).max() <= 1
    with pytest.raises(FileMissing):
        reader.usable_end_s(tmp_path / "two.png", 0.0, math.inf)
    (tmp_path / "three.jpg").write_bytes(b"no image")
    with pytest.raises(ClipDecodeError, match=r"image three\.jpg"):
        reader.read(tmp_path / "three.jpg", [0.0], 20)


# --------------------------------------------------------------------------------------------------------------------
# prompts and scores of several clips


def test_clips_are_read_in_order_with_their_labels(toy_world):
    dataset = dataset_of(toy_world, "egoexomem_egoexo4d")
    sample = dataset.loaded.samples[0]
    ego, exo, both = (dataset.requests.prefix_of(shown) for shown in sample.inputs)
    assert ego == exo == dataset.requests.prefix
    first, second = both[: both.index(VIDEO_TOKEN_ID)], both[both.index(VIDEO_TOKEN_ID) + 1 :]
    read = dataset.encoder.tokenizer.decode
    assert read(first).endswith("the video with the camera-wearer:") and read(second).strip() == "the next video:"
    assert VIDEO_TOKEN_ID not in second
    # A sentence that all video is egocentric would be wrong.
    asked = dataset.requests.prompts.choice(sample)
    assert asked.startswith("use the video. What colour") and "camera-wearer" not in asked.split("What colour")[0]


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_scores_of_two_clips_equal_those_of_each_row_alone(name, toy_world):
    dataset, stage = dataset_of(toy_world, "egoexomem_lemma"), stage_of(toy_world, name)
    number = next(n for n, entry in enumerate(dataset.entries) if entry.shown.views == "both")
    batch = dataset[number]
    model, sample = stage.model, dataset.loaded.samples[dataset.entries[number].uses[0][0]]
    row = stage.predict_step(batch)[0]
    assert batch.video.shape[0] == 2 and batch.views == ("ego", "exo") and row["id"] == sample.id

    # The exocentric clip goes through the exocentric encoder where the stage has one.
    encode = {
        "stage1": lambda clip, view: model.demonstrator_tokens(clip),
        "stage2": lambda clip, view: model.learner_tokens(clip) if view == "ego" else model.demonstrator_tokens(clip),
        "stage3": lambda clip, view: model.learner_tokens(clip),
    }[name]
    with torch.no_grad():
        visual = [encode(clip[None], view)[0] for clip, view in zip(batch.video, batch.views, strict=True)]
    assert row["likelihood"] == pytest.approx(alone(dataset, model, sample, visual), abs=1e-5)


@torch.no_grad()
def alone(dataset, model, sample, visual):
    """Mean log-likelihood of each option, from a forward pass over the whole row without cache or tree."""
    language_model, encoder = model.language_model, dataset.encoder
    prefix = dataset.requests.prefix_of(sample.inputs[-1])
    cut = prefix.index(VIDEO_TOKEN_ID)
    scores = []
    for option in sample.options:
        text = encoder.conversation([(dataset.requests.prompts.open(sample), option)])
        rest = text.input_ids[text.input_ids.index(VIDEO_TOKEN_ID) + 1 :]
        embed = lambda ids: language_model.embed(torch.tensor(list(ids), dtype=torch.int64))  # noqa: E731
        row = torch.cat([embed(prefix[:cut]), visual[0], embed(prefix[cut + 1 :]), visual[1], embed(rest)])
        log_p = language_model.causal_lm(inputs_embeds=row[None]).logits[0].log_softmax(-1)
        first = len(row) - text.label_tokens
        answer = rest[-text.label_tokens :]
        scores.append(sum(float(log_p[first + n - 1, token]) for n, token in enumerate(answer)) / len(answer))
    return scores


def row_of(number, answer, **chosen):
    """A row in which each view chooses an option of four."""
    views = {}
    for view in ("ego", "exo", "both"):
        letters = np.full(4, -5.0)
        letters[chosen[view]] = -0.1
        views[view] = {"letters": [letters.tolist()], "likelihood": letters.tolist()}
    return {"id": str(number), "groups": ["Q1"], "answer": answer, "options": [], "views": views}


def by_name(rows, total):
    header = {"benchmark": "b", "task": "cross_view", "total": total}
    return {each.metric: each for each in score(header, rows)}


def test_agreement_by_hand():
    rows = [
        row_of(0, 1, ego=1, exo=1, both=1),
        row_of(1, 1, ego=1, exo=2, both=1),
        row_of(2, 1, ego=3, exo=3, both=1),
        row_of(3, 1, ego=1, exo=1, both=0),
    ]
    found = by_name(rows, 4)
    expected = {"accuracy": 0.75, "accuracy_ego": 0.75, "accuracy_exo": 0.5, "same_answer": 0.75, "right_in_both": 0.5}
    for name, value in expected.items():
        for ending in ("", "_likelihood"):
            assert found[name + ending].value == value
    assert found["accuracy_exo/Q1"].value == 0.5
    assert found["same_answer"].chance == 1 / 4 and found["right_in_both"].chance == 1 / 16
    assert found["right_in_both"].standard_error == pytest.approx(0.25) and found["right_in_both"].n == 4
    assert {name.partition("/")[0].endswith("_partial") for name in by_name(rows, 5) if name != "asked"} == {True}
    hidden = by_name([row | {"answer": None} for row in rows], 4)
    assert set(hidden) == {"same_answer", "same_answer_likelihood"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {}}, "field 'views' has none, expected both, ego, exo"),
        ({"answer": 4}, "row 1, view both: field 'answer' is 4"),
    ],
)
def test_wrong_predictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        by_name([row_of(0, 1, ego=1, exo=1, both=1) | changes], 1)


def test_random_scores_land_on_chance():
    generator = np.random.default_rng(0)
    rows = []
    for sample in official("egoexomem_egoexo4d").samples:
        letters = {view: {"letters": [generator.standard_normal(4).tolist()]} for view in ("ego", "exo", "both")}
        rows.append({"id": sample.id, "groups": sample.groups, "answer": sample.answer, "views": letters})
    found = by_name(rows, len(rows))
    for metric in ("accuracy", "accuracy_ego", "accuracy_exo", "same_answer", "right_in_both"):
        number = found[metric]
        assert number.n == len(rows) and abs(number.value - number.chance) < 4 * number.standard_error
    assert found["right_in_both"].chance == pytest.approx(1 / 16)


# --------------------------------------------------------------------------------------------------------------------
# the generated world


def test_answers_about_the_generated_world_are_true(tmp_path):
    root, takes = tmp_path / "egobench", [simulate(SEEDS["benchmark"] + n, PRESETS["easy"]) for n in range(4)]
    write_cross_view(root, PRESETS["easy"], [take.seed for take in takes], 32, False, workers=1)
    rows = json.loads((root / "egoexomem/EgoExo4D/qa_merged_v6.json").read_text())
    asked = [(int(row["take_name"][-4:]), row["qa_type"], row) for row in rows]
    with (root / "egoexobench/EgoExoBench_MCQ.tsv").open(newline="") as file:
        *relations, persons = csv.DictReader(file, delimiter="\t")
    for number, row in enumerate(relations):
        (chosen,) = (line[3:] for line in row["options"].split("\n") if line[0] == row["answer"])
        (start_s,) = {medium["video_start"] for medium in ast.literal_eval(row["medias"])}
        (action,) = (each for each in takes[number].actions if round(each.start_s, 4) == start_s)
        assert chosen == phrase(action.verb, takes[number].things[action.thing], action.hand)
    shown, *options = (medium["video_path"].split("/") for medium in ast.literal_eval(persons["medias"]))
    assert shown[1] == options["ABCD".index(persons["answer"])][1] and len({option[1] for option in options}) == 4
    for key, row in json.loads((root / "egoexomem/LEMMA/qa_verified.json").read_text()).items():
        asked.append((int(key.split("_")[1]), key.split("_")[2], row))
    assert sorted(number for number, _, _ in asked) == [0, 0, 1, 1, 2, 2, 3, 3]
    for number, kind, row in asked:
        take, answer = takes[number], row["options"][row["correct_answer"]]
        things = {thing.kind: thing.colour for thing in take.things}
        done = [phrase(action.verb, take.things[action.thing], action.hand) for action in take.actions[:2]]
        right = " and then ".join(done) if kind == "Q8" else things[row["question"].split()[-1].strip("?")]
        assert answer == right and row["options"].count(right) == 1 and len(set(row["options"])) == 4


def test_a_world_of_an_earlier_version_gets_them_and_nothing_else_changes(toy_world, toy_settings, tmp_path):
    world = shutil.copytree(toy_world, tmp_path / "toy")
    for name in ("egoexomem", "egoexobench"):
        shutil.rmtree(world / "egobench" / name)
    before = contents(world)
    assert generate(world, toy_settings, workers=1) is False
    after = contents(world)
    assert before.items() < after.items()
    assert after == contents(toy_world)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tokenizer_knows_every_text(toy_world):
    tokenizer = load_tokenizer(str(toy_world / "tokenizer"))
    for name in NAMES:
        for sample in dataset_of(toy_world, name).loaded.samples:
            labels = [label for shown in sample.inputs for label in shown.labels]
            for text in (sample.text, *sample.options, *labels):
                assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"], text
