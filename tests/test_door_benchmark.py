"""A benchmark of the user's own, in one file, evaluated by the command line: the example of docs/extending.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny

from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import load, select_entries
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.io.jsonl import InvalidRecords
from datamodules.text import TextEncoder
from lightning_modules.cli import main
from lightning_modules.egobench.results import read_scores
from lightning_modules.egobench.scoring import score_results
from lightning_modules.egobench.tasks import TASKS

EXAMPLES = Path(__file__).parent / "examples"
TOY = str(tiny.EXPERIMENTS / "toy")
FROM_SCRATCH = [f"model.init_args.init.{part}=null" for part in ("ego_encoder", "ego_to_exo", "projector")]


@pytest.fixture(autouse=True)
def example_in_the_working_directory(monkeypatch):
    """The commands run in the folder of the example, which alone makes it importable."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(EXAMPLES)])
    sys.modules.pop("benchmark", None)
    yield
    sys.modules.pop("benchmark", None)


@pytest.fixture
def videos(toy_world):
    return toy_world / "egobench" / "egoschema" / "videos"


def question(number, video, **changes):
    asked = {"question": "What does the camera-wearer do first?", "options": ["taps", "shakes"], "answer": number % 2}
    room = "kitchen" if number < 2 else "hall"
    return {"id": f"q{number}", "video": video.name, "start_s": 0.0, "end_s": 1.0, **asked, "room": room, **changes}


@pytest.fixture
def questions(tmp_path, videos):
    file = tmp_path / "questions.jsonl"
    rows = [question(number, video) for number, video in enumerate(sorted(videos.iterdir())[:3])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def entry(questions, videos):
    return {"name": "benchmark:Chores", "annotations": str(questions), "videos": str(videos)}


def test_it_is_read_like_any_other(entry):
    loaded = load(entry)
    assert (loaded.name, loaded.task, loaded.total) == ("chores", "choice", 3)
    assert [(sample.id, sample.answer, sample.groups) for sample in loaded.samples] == [
        ("q0", 0, ("kitchen",)),
        ("q1", 1, ("kitchen",)),
        ("q2", 0, ("hall",)),
    ]
    kitchen = load({**entry, "room": "kitchen"})
    assert [sample.id for sample in kitchen.samples] == ["q0", "q1"]
    assert kitchen.notes == ["chores: 1 questions of other rooms are left out"]
    by_class = {"class" if key == "name" else key: value for key, value in entry.items()}
    assert load(by_class).samples == loaded.samples


def test_invalid_lines_are_all_named(entry, questions, videos):
    video = next(videos.iterdir())
    rows = [question(0, video, answer=2), question(1, video), question(2, video, options="taps")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidRecords) as raised:
        load(entry)
    assert "questions.jsonl line 1: field 'answer' is 2, expected an option's index" in str(raised.value)
    assert "questions.jsonl line 3: field 'options' is 'taps', expected 2 to 5 texts" in str(raised.value)


def test_a_model_answers_it(entry, toy_world):
    loaded = load(entry)
    encoder = TextEncoder(str(toy_world / "tokenizer"), 400)
    config = EgoBenchConfig(prompts=str(toy_world / "templates" / "egobench.yaml"))
    dataset = BenchmarkDataset(loaded, TASKS[loaded.task], config, ClipConfig(tiny.FRAMES, tiny.SIZE), encoder)
    dataset.check()
    stage = tiny.make_stage("stage3", toy_world / "tokenizer")
    stage.configure_model()
    stage.eval()
    results = [result for index in range(len(dataset)) for result in stage.predict_step(dataset[index])]
    assert [len(result["letters"][0]) for result in results] == [2, 2, 2]
    scores = {score.metric: score for score in score_results(loaded, results)}
    assert {"accuracy", "accuracy/kitchen", "accuracy/hall", "accuracy_likelihood"} <= scores.keys()
    assert (scores["accuracy"].n, scores["accuracy"].chance) == (3, 0.5)


def test_the_commands_score_it(entry, toy_world, tmp_path, capsys):
    listed = f"[{{name: 'benchmark:Chores', annotations: {entry['annotations']}, videos: {entry['videos']}}}]"
    arguments = [
        TOY,
        "stage3",
        *tiny.OVERRIDES,
        f"data_root={toy_world}",
        f"runs={tmp_path}",
        "start.language_model=null",
    ]
    arguments += [*FROM_SCRATCH, "data.init_args.held_out=null", f"egobench.benchmarks={listed}"]
    assert main(["fit", *arguments]) == 0
    assert main(["evaluate", *arguments, "--benchmarks", "chores"]) == 0
    scores = {score.metric: score for score in read_scores(tmp_path / "toy" / "stage3" / "egobench")}
    assert (scores["accuracy"].n, scores["accuracy/kitchen"].n, scores["accuracy/hall"].n) == (3, 2, 1)
    assert "| chores" in capsys.readouterr().out


def test_names_on_the_command_line(entry):
    other = {"name": "vlnqa", "annotations": "a", "videos": "v"}
    entries = [other, entry]
    assert select_entries(entries, None) == entries
    assert select_entries(entries, ["chores"]) == select_entries(entries, ["benchmark:Chores"]) == [entry]
    assert select_entries(entries, ["benchmark:Chores", "vlnqa"]) == entries
    assert select_entries([other], ["benchmark:Chores"]) == [{"name": "benchmark:Chores"}]
    with pytest.raises(ValueError, match=r"benchmark nowhere: not in egobench.benchmarks: vlnqa, chores, or module:"):
        select_entries(entries, ["nowhere"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "benchmark:Nothing",
            "got 'benchmark:Nothing', which cannot be imported (module 'benchmark' has no attribute 'Nothing')",
        ),
        ("no_such_file:Chores", "got 'no_such_file:Chores', which cannot be imported (No module named 'no_such_file')"),
        ("pathlib:Path", "pathlib:Path: is no benchmark: derive it from datamodules.egobench.Benchmark"),
        (
            "datamodules.egobench:Benchmark",
            "datamodules.egobench:Benchmark: set its name, and its task to one of choice",
        ),
    ],
)
def test_wrong_classes_are_refused(name, message):
    with pytest.raises(ValueError) as raised:
        load({"name": name})
    assert message in str(raised.value)


def test_paths_without_defaults_are_required():
    with pytest.raises(ValueError, match="benchmarks: chores: annotations is missing; videos is missing"):
        load({"name": "benchmark:Chores"})
