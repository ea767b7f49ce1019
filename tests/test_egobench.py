"""Benchmarks evaluated with a model: requests, predictions, and their independence of processes and interruptions."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from ranks import run_together
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import VideoInput, load
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.text import TextEncoder
from datamodules.video.reader import ClipReader
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.egobench.evaluator import Evaluator
from lightning_modules.egobench.predictions import OtherPredictions, Predictions
from lightning_modules.egobench.results import read_scores
from lightning_modules.egobench.tasks import TASKS
from lightning_modules.stages.base import Stage

TOY = str(tiny.EXPERIMENTS / "toy")
NAMES = [
    *("egoschema", "qaego4d_closed", "qaego4d_open", "egotaskqa_direct", "egotaskqa_indirect"),
    *("charades_ego", "epic100_mir", "egoplan", "vlnqa", "egomcq"),
    *("egoexomem_egoexo4d", "egoexomem_lemma", "egoexobench"),
]


def command(kind, world, runs, stage, *more):
    return [kind, TOY, stage, *tiny.OVERRIDES, f"data_root={world}", f"runs={runs}", *more]


@pytest.fixture(scope="module")
def trained(toy_world, tmp_path_factory):
    """Runs with weights of stage 3 that differ from their initial values."""
    runs = tmp_path_factory.mktemp("trained")
    for stage in tiny.STAGES:
        assert main(command("fit", toy_world, runs, stage)) == 0
    return runs


@pytest.fixture
def runs(trained, tmp_path):
    """A copy to evaluate in."""
    return shutil.copytree(trained, tmp_path / "runs")


def evaluate(world, runs, *more, names="all"):
    return main([*command("evaluate", world, runs, "stage3"), *more, "--benchmarks", names])


@pytest.fixture(scope="module")
def evaluated(trained, toy_world, tmp_path_factory):
    """All benchmarks by one process without interruption."""
    runs = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "runs")
    assert evaluate(toy_world, runs, "egobench.cyclic=true") == 0
    return runs


def out(runs):
    return runs / "toy" / "stage3" / "egobench"


def contents(runs):
    """Predictions and scores by file."""
    files = [*sorted((out(runs) / "predictions").iterdir()), out(runs) / "metrics.json", out(runs) / "results.md"]
    return {file.name: file.read_text() for file in files}


def rows(runs, name):
    return [json.loads(line) for line in (out(runs) / "predictions" / f"{name}.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------------
# the command


def test_one_command_scores_all_benchmarks(evaluated, toy_world):
    scores = read_scores(out(evaluated))
    assert list(dict.fromkeys(score.benchmark for score in scores)) == sorted(NAMES)
    for name in NAMES:
        header = json.loads((out(evaluated) / "predictions" / f"{name}.header.json").read_text())
        answered = rows(evaluated, name)
        assert len(answered) == header["total"] > 0 and not header["missing"]
        assert len({row["id"] for row in answered}) == len(answered)
    assert not list((out(evaluated) / "predictions").glob("*.part*"))
    curves = EventAccumulator(str(evaluated / "toy" / "stage3")).Reload()
    (inter,) = curves.Scalars("4_eval/egomcq/accuracy/inter")
    (score,) = (s for s in scores if (s.benchmark, s.metric) == ("egomcq", "accuracy/inter"))
    assert inter.value == pytest.approx(score.value) and inter.step == 2  # optimiser steps of the stage
    assert "paper" not in (out(evaluated) / "results.md").read_text()  # of an invented world


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
def test_any_number_of_processes_gives_the_same_files(world, evaluated, runs, toy_world, tmp_path):
    strategy = ["trainer.strategy=fsdp2" if world == 2 else "trainer.strategy=ddp"] if world > 1 else []
    asked = command("evaluate", toy_world, runs, "stage3", f"trainer.devices={world}", *strategy)
    run_together(world, [[*asked, "egobench.cyclic=true", "--benchmarks", "all"]], tmp_path)
    assert contents(runs) == contents(evaluated)


def test_an_interrupted_evaluation_resumes_where_it_stopped(evaluated, runs, toy_world, monkeypatch):
    answer, answered = Stage.predict_step, []

    def killed(stage, batch, *args):
        if len(answered) == 25:
            raise KeyboardInterrupt
        answered.append(batch)
        return answer(stage, batch, *args)

    monkeypatch.setattr(Stage, "predict_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate(toy_world, runs, "egobench.cyclic=true")
    (part,) = (out(runs) / "predictions").glob("egoschema.part0.jsonl")
    part.write_bytes(part.read_bytes() + b'{"id": "torn by a')
    first = len(answered)
    monkeypatch.setattr(
        Stage, "predict_step", lambda stage, batch, *args: answered.append(batch) or answer(stage, batch, *args)
    )
    assert evaluate(toy_world, runs, "egobench.cyclic=true") == 0
    assert contents(runs) == contents(evaluated)
    assert first == 25
    assert len(answered) == sum(len(dataset_of(toy_world, name)) for name in NAMES), "nothing was asked twice"


def test_predictions_of_another_model_or_setting_are_kept(runs, toy_world, capsys):
    assert evaluate(toy_world, runs, names="egoschema") == 0
    before = contents(runs)
    assert evaluate(toy_world, runs, "egobench.style=base", names="egoschema") == 2
    assert "egoschema.jsonl: was made with different prompts: FORCE=1 evaluates again" in capsys.readouterr().err
    assert contents(runs) == before
    assert evaluate(toy_world, runs, "egobench.style=base", "--force", names="egoschema") == 0
    assert contents(runs) != before


def test_scores_follow_from_the_predictions_alone(evaluated, runs, capsys):
    shutil.copytree(out(evaluated), out(runs))
    before = contents(runs)
    for made in ("metrics.json", "results.md"):
        (out(runs) / made).unlink()
    capsys.readouterr()
    assert main(["score", str(runs / "toy")]) == 0
    assert contents(runs) == before
    printed = capsys.readouterr().out
    assert "| egomcq" in printed and "stage3" in printed


def test_videos_that_are_missing_or_damaged_are_counted(runs, toy_world, tmp_path, capsys):
    world = shutil.copytree(toy_world, tmp_path / "world")
    videos = sorted((world / "egobench" / "egoschema" / "videos").iterdir())
    videos[0].unlink()
    videos[1].write_bytes(videos[1].read_bytes()[:-2000])
    assert evaluate(world, runs, names="egoschema") == 0
    total = len(videos)
    assert f"egoschema: {total - 1} of {total} samples" in (printed := capsys.readouterr().out)
    assert str(videos[0]) in printed
    header = json.loads((out(runs) / "predictions" / "egoschema.header.json").read_text())
    assert list(header["missing"]) == [videos[0].stem, videos[1].stem]
    assert str(videos[1]) in header["missing"][videos[1].stem]
    assert all("_partial" in s.metric or "accuracy" not in s.metric for s in read_scores(out(runs)))
    shutil.copy(sorted((toy_world / "egobench" / "egoschema" / "videos").iterdir())[0], videos[0])
    shutil.copy(sorted((toy_world / "egobench" / "egoschema" / "videos").iterdir())[1], videos[1])
    assert evaluate(world, runs, names="egoschema") == 0  # only the missing ones are evaluated now
    assert json.loads((out(runs) / "predictions" / "egoschema.header.json").read_text())["missing"] == {}
    assert len(rows(runs, "egoschema")) == total


def test_items_whose_videos_are_gone_since_still_count(runs, toy_world, tmp_path):
    world = shutil.copytree(toy_world, tmp_path / "world")
    assert evaluate(world, runs, names="egoschema") == 0
    before = contents(runs)
    next((world / "egobench" / "egoschema" / "videos").iterdir()).unlink()
    assert evaluate(world, runs, names="egoschema") == 0
    assert contents(runs) == before
    assert (out(runs) / "submissions" / "egoschema" / "submission.csv").is_file()
    assert evaluate(world, runs, "--force", names="egoschema") == 0
    assert contents(runs) != before
    assert not (out(runs) / "submissions" / "egoschema").exists(), "it was of the predictions that were discarded"


def test_half_discarded_predictions_are_not_mistaken_for_another_models(toy_world, tmp_path, monkeypatch):
    settings = ({"model": "before"}, {"model": "now"})
    before, now = (Predictions(dataset_of(toy_world, "egoschema"), tmp_path, model) for model in settings)
    before.begin()
    before.part(0).write_text('{"id": "an answer of the model before", "clip": 0}\n')
    unlink = Path.unlink

    def killed(file, missing_ok=False):
        unlink(file, missing_ok)
        if ".part" in file.name or ".header" in file.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        now.discard()
    assert not before.part(0).exists()
    with pytest.raises(OtherPredictions):
        now.require_same()


def test_a_part_of_the_clips_is_no_benchmark_yet(evaluated, runs, toy_world):
    asked = "egoschema,epic100_mir,egomcq"
    with pytest.warns(UserWarning, match="egomcq: .* clips were not evaluated"):
        assert evaluate(toy_world, runs, "egobench.cyclic=true", "trainer.limit_predict_batches=3", names=asked) == 0
    assert {score.metric for score in read_scores(out(runs))} == {"asked"}
    assert evaluate(toy_world, runs, "egobench.cyclic=true", names=asked) == 0
    for name in asked.split(","):
        assert rows(runs, name) == rows(evaluated, name)


def test_wrong_names_and_keys_are_refused_at_once(runs, toy_world, capsys):
    assert evaluate(toy_world, runs, names="egoschema,egoskema") == 2
    assert "benchmark egoskema: not in egobench.benchmarks: egoschema" in capsys.readouterr().err
    assert evaluate(toy_world, runs, "egobench.stile=ego", names="egoschema") == 2
    assert "egobench.stile: no such key in egobench, allowed: benchmarks" in capsys.readouterr().err
    nowhere = f"egobench.benchmarks=[{{name: vlnqa, annotations: {toy_world}/egobench/vlnqa, videos: /nowhere}}]"
    assert evaluate(toy_world, runs, nowhere) == 2
    assert "vlnqa: none of its videos is below /nowhere, such as" in capsys.readouterr().err
    broken = "egobench.benchmarks=[{name: egoschema, annotations: /nowhere, videos: /nowhere}]"
    assert evaluate(toy_world, runs, broken) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_fixed_part_is_scored_while_stage_3_validates(runs, toy_world):
    starts = [f"handoffs.stage{n}={runs}/toy/stage{n}/handoff" for n in range(3)]
    options = ["experiment=fast", "egobench.fast=[egoschema,egomcq]", "data.init_args.held_out=null"]
    assert main([*command("fit", toy_world, runs, "stage3"), *starts, *options]) == 0
    tags = EventAccumulator(str(runs / "fast" / "stage3")).Reload().Tags()["scalars"]
    assert any(re.fullmatch("2_val/egoschema_accuracy.*", tag) for tag in tags), tags
    assert any(re.fullmatch("2_val/egomcq_accuracy.*/inter", tag) for tag in tags), tags


# --------------------------------------------------------------------------------------------------------------------
# dataset


def dataset_of(world, name, **changes):
    config = compose(tiny.EXPERIMENTS / "toy", "stage3", [f"data_root={world}"])["egobench"] | changes
    (entry,) = (entry for entry in config["benchmarks"] if entry["name"] == name)
    encoder = TextEncoder(str(world / "tokenizer"), 400)
    loaded, clips = load(entry), ClipConfig(tiny.FRAMES, tiny.SIZE)
    return BenchmarkDataset(loaded, TASKS[loaded.task], EgoBenchConfig(**config), clips, encoder)


def stage_of(world):
    stage = tiny.make_stage("stage3", world / "tokenizer")
    stage.configure_model()
    tiny.scatter(stage)
    return stage.eval()


def test_letters_equal_a_loop_over_rotations_and_letters(toy_world):
    dataset, stage = dataset_of(toy_world, "egoschema", cyclic=True), stage_of(toy_world)
    batch = dataset[0]
    (row,) = stage.predict_step(batch)
    sample, encoder, language_model = dataset.loaded.samples[0], dataset.encoder, stage.model.language_model
    assert np.array(row["letters"]).shape == (5, 5)
    visual = stage(batch.video, "ego")
    for shift in range(5):
        question = dataset.requests.prompts.choice(sample, [(p + shift) % 5 for p in range(5)])
        logits = []
        for letter in "ABCDE":
            text = encoder.conversation([(question, f"{dataset.requests.prompts.prefill}{letter}")])
            at = len(text.input_ids) - 2  # the letter stands before the end token
            batch = encoder.batch([text])
            labels = torch.full_like(batch.labels, -100)
            labels[0, at] = batch.input_ids[0, at]
            log_p, _ = language_model.token_log_likelihood(batch.input_ids, batch.attention_mask, labels, visual)
            logits.append(float(log_p))
        expected = torch.tensor(logits).log_softmax(-1)
        torch.testing.assert_close(torch.tensor(row["letters"][shift]), expected, atol=1e-5, rtol=0)


def test_a_question_or_an_answer_that_would_be_cut_is_refused(toy_world):
    dataset = dataset_of(toy_world, "egoschema")
    longest = 0
    for sample in dataset.loaded.samples:
        answers = [(dataset.requests.prompts.choice(sample), f"{dataset.requests.prompts.prefill}A)")]
        answers += [(dataset.requests.prompts.open(sample), option) for option in sample.options]
        longest = max(longest, *(len(dataset.encoder.conversation([turn]).input_ids) - 1 for turn in answers))
    dataset.encoder.max_text_tokens = longest
    dataset.check()
    for shorter in range(1, 6):
        dataset.encoder.max_text_tokens = longest - shorter
        with pytest.raises(ValueError, match=rf"egoschema: sample .* max_text_tokens={longest - shorter}: raise data"):
            dataset.check()


def test_ranking_equals_scoring_each_text_in_a_batch_of_its_own(toy_world):
    dataset, stage = dataset_of(toy_world, "epic100_mir"), stage_of(toy_world)
    batch = dataset[0]
    (row,) = stage.predict_step(batch)
    visual = stage(batch.video, "ego")
    for text, score in zip(dataset.loaded.candidates, row["scores"], strict=True):
        batch = dataset.encoder.batch([dataset.encoder.conversation([("Describe the video.", text.text)])])
        (one,) = stage.evaluator.score(batch, visual)
        assert score == pytest.approx(one[0] / one[1], abs=1e-5)


def test_priors_are_those_of_the_same_rows_without_the_clip(toy_world):
    dataset, stage = dataset_of(toy_world, "epic100_mir"), stage_of(toy_world)
    (row,) = stage.predict_step(dataset[len(dataset) - 1])
    assert row["id"] == ""
    decoder = stage.model.language_model.causal_lm
    for text, prior in zip(dataset.loaded.candidates[:5], row["priors"], strict=False):
        encoded = dataset.encoder.conversation([("Describe the video.", text.text)])
        ids = [token for token in encoded.input_ids if token >= 0]
        count = encoded.label_tokens
        log_p = decoder(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = range(len(ids) - count, len(ids))
        assert prior == pytest.approx(sum(float(log_p[n - 1, ids[n]]) for n in at) / count, abs=1e-5)


def test_nothing_after_the_observation_is_read(toy_world, monkeypatch):
    dataset, read, spans = dataset_of(toy_world, "egoplan"), ClipReader.read, []

    def counted(reader, path, times_s, *args):
        spans.append((float(min(times_s)), float(max(times_s)), len(times_s)))
        return read(reader, path, times_s, *args)

    monkeypatch.setattr(ClipReader, "read", counted)
    for number, entry in enumerate(dataset.entries):
        batch = dataset[number]
        assert batch.video is not None, batch.error
        first, last, count = spans[-1]
        (clip,) = entry.shown.clips
        assert clip.start_s <= first and last == clip.end_s and count == tiny.FRAMES


def test_a_video_that_ends_before_the_observation_is_not_asked_about(toy_world):
    dataset = dataset_of(toy_world, "egoplan")
    (clip,) = dataset.entries[0].shown.clips
    assert dataset[0].error == ""
    longer = VideoInput((replace(clip, end_s=clip.end_s + 60.0, start_s=0.0),))
    dataset.entries[0] = replace(dataset.entries[0], shown=longer)
    assert "the video ends at" in dataset[0].error


def test_a_clip_that_several_items_share_is_read_once(toy_world):
    dataset = dataset_of(toy_world, "egomcq")
    clips = {clip for sample in dataset.loaded.samples for clip in sample.clips}
    asked = sum(len(sample.clips) for sample in dataset.loaded.samples)
    requests = [request for number in range(len(dataset)) for request in dataset[number].instances]
    assert len(dataset) == len(clips) < asked == len({(request.sample_id, request.clip) for request in requests})


def test_no_prompt_names_a_file(toy_world):
    for name in ("egoschema", "vlnqa", "egoplan"):
        dataset = dataset_of(toy_world, name)
        for sample in dataset.loaded.samples:
            text = dataset.requests.prompts.choice(sample)
            assert sample.id not in text.split() and sample.clips[0].video not in text


def test_results_do_not_depend_on_earlier_clips(toy_world):
    dataset, stage = dataset_of(toy_world, "qaego4d_closed"), stage_of(toy_world)
    twice = [stage.predict_step(dataset[n]) for n in (0, 1, 0)]
    assert twice[0] == twice[2] != twice[1]
    batch = dataset[0]
    batch.error = "cannot be read"
    language_model, tokenizer = stage.model.language_model, stage.tokenizer
    assert Evaluator(language_model, tokenizer).evaluate(batch, []) == [
        {"id": request.sample_id, "clip": 0, "problem": "cannot be read"} for request in batch.instances
    ]
