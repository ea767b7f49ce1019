"""All four stages on generated videos through the command line, and the files that they write."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams.backend_context import Context

from experiments.ablations.plan import read_plan
from lightning_modules import training
from lightning_modules.callbacks.checkpoint import newest, read_state
from lightning_modules.cli import main
from lightning_modules.config import compose, stage_names
from lightning_modules.signals import STOPPED
from lightning_modules.weights import handoff
from lightning_modules.weights.handoff import read_manifest

TOY = str(tiny.EXPERIMENTS / "toy")
STAGES = list(tiny.STAGES)


def arguments(stage, world, runs, *more, command="fit", experiment=TOY):
    return [command, experiment, stage, *tiny.OVERRIDES, f"data_root={world}", f"runs={runs}", *more]


def weights(folder):
    return {path.name: load_file(path) for path in sorted((folder / "handoff").rglob("*.safetensors"))}


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(one[file].keys() == other[file].keys() for file in one)
    return all(torch.equal(one[file][key], other[file][key]) for file in one for key in one[file])


def digest(folder):
    return read_manifest(folder / "handoff")["digest"]


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(toy_runs):
    """Folder of runs with all four stages of ``toy``, two steps each."""
    return toy_runs


@pytest.fixture
def runs(finished, tmp_path, toy_world):
    """A copy to change, with the paths in it moved along."""
    copy = shutil.copytree(finished, tmp_path / "runs")
    for file in copy.rglob("config.yaml"):
        file.write_text(file.read_text().replace(str(finished), str(copy)))
    return copy


def test_the_readme_uses_a_trained_stage(finished, toy_world, capsys):
    readme = (tiny.EXPERIMENTS.parent / "README.md").read_text()
    code = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    exec(code.replace('"runs/', f'"{finished}/').replace('"data/toy', f'"{toy_world}'), {})
    _, chances, first, *others = capsys.readouterr().out.splitlines()[-7:]
    assert sum(ast.literal_eval(chances).values()) == pytest.approx(1)
    assert first.startswith("0 to 2 s: ") and others


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("stage", STAGES)
def test_stage_leaves_what_it_trained(finished, stage):
    folder = finished / "toy" / stage
    manifest = read_manifest(folder / "handoff")
    assert set(manifest["parts"]) == set(tiny.STAGES[stage].trains)
    assert (manifest["stage"], manifest["step"]) == (stage, 2)
    assert len(manifest["config_hash"]) == len(manifest["data_fingerprint"]) == 16
    for part in set(manifest["parts"]) - {"lora"}:
        tensors = load_file(folder / "handoff" / f"{part}.safetensors")
        assert {name: list(t.shape) for name, t in tensors.items()} == {
            n: s for n, (_, s) in manifest["parts"][part].items()
        }
    assert manifest["metrics"].keys() >= {"val/ego_choice", "val/ego_loss", "val/ego_caption"}
    assert ("guidance/mapping_change" in manifest["metrics"]) == (stage == "stage2")


def test_stages_start_from_each_other(finished):
    """Frozen parts are not written again; what trains starts from the stage before, so small steps keep it close."""
    before, after = (
        load_file(finished / "toy" / s / "handoff" / "exo_encoder.safetensors") for s in ("stage0", "stage1")
    )
    learner = load_file(finished / "toy" / "stage2" / "handoff" / "ego_encoder.safetensors")
    for name, start in before.items():
        assert 0 < (after[name] - start).abs().max() < 5e-3  # Adam moves at most about the rate, 5e-4, a step
        assert (learner[name] - after[name]).abs().max() < 5e-3
    digests = {stage: digest(finished / "toy" / stage) for stage in STAGES}
    assert len(set(digests.values())) == 4
    assert read_manifest(finished / "toy" / "stage3" / "handoff")["started_from"] == {
        "ego_encoder": digests["stage2"],
        "ego_to_exo": digests["stage2"],
        "projector": digests["stage2"],
        "language_model": digests["stage0"],
    }


@pytest.mark.parametrize("stage", STAGES)
def test_stage_answers_every_held_out_question(finished, toy_world, stage):
    folder = finished / "toy" / stage
    views = tiny.STAGES[stage].views
    asked = [json.loads(line) for line in (toy_world / "instructions" / "held_out.jsonl").read_text().splitlines()]
    answered = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(answered) == len(views) * sum(len(clip["questions"]) for clip in asked)
    assert {(a["clip"], a["view"]) for a in answered} == {(clip["id"], view) for clip in asked for view in views}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["stage"], metrics["clips"]) == (stage, len(asked))
    for view in views:
        for name in ("choice", "loss", "caption", "qa"):
            scores = [a["scores"][name] for a in answered if a["view"] == view and name in a["scores"]]
            assert metrics["metrics"][f"{view}_{name}"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
    assert metrics["chance"]["choice"] == 0.25


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_a_learner_compares_its_visual_inputs(finished, stage):
    folder = finished / "toy" / stage
    file, metrics = folder / "consistency.jsonl", json.loads((folder / "metrics.json").read_text())
    inputs = {"stage2": ["y", "x", "mapped", "both"], "stage3": ["x", "mapped", "both"]}.get(stage)
    if inputs is None:
        assert not file.exists() and "consistency" not in metrics
        return
    compared = [json.loads(line) for line in file.read_text().splitlines()]
    answered = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    both = {(a["clip"], a["task"]): a for a in answered if a["task"] != "caption"}
    assert {(c["clip"], c["task"]) for c in compared} == both.keys() and len(compared) == len(both)
    for comparison in compared:
        assert list(comparison["given"]) == list(comparison["right"]) == inputs
        assert comparison["given"]["both"] == both[comparison["clip"], comparison["task"]]["prediction"]
    for task in ("choice", "qa"):
        found = metrics["consistency"][task]
        assert found["right_both"] == pytest.approx(metrics["metrics"][f"ego_{task}"], rel=1e-5)
        assert found["n"] == sum(c["task"].startswith(task) for c in compared)
    line = f"| {stage} | four-way choice | {found['n'] / 5:.0f} |"
    assert line in re.sub(" +", " ", (finished / "toy" / "results.md").read_text())


def test_report_joins_all_stages(finished, capsys):
    results = json.loads((finished / "toy" / "results.json").read_text())
    assert list(results) == STAGES
    table = (finished / "toy" / "results.md").read_text()
    (choice,) = [line for line in table.splitlines() if line.startswith("| egocentric | four-way choice ")]
    cells = [cell.strip() for cell in choice.strip("|").split("|")]
    assert cells[2:] == ["25.0", *(f"{100 * results[stage]['metrics']['ego_choice']:.1f}" for stage in STAGES)]
    assert main(["report", str(finished / "toy")]) == 0
    assert capsys.readouterr().out == table


LOSSES = {"stage0": {"vtg", "bow"}, "stage1": {"vtg"}, "stage2": {"vtg", "kl", "cycle"}, "stage3": {"vtg"}}


@pytest.mark.parametrize("stage", STAGES)
def test_curves_and_images(finished, stage):
    events = EventAccumulator(str(finished / "toy" / stage))
    events.Reload()
    tags = events.Tags()
    losses = {f"1_train/loss_{name}" for name in LOSSES[stage]}
    # All parts share a schedule, and but for F and G in stage 2 a rate.
    rates = {"6_optim/lr_ego_encoder", "6_optim/lr_ego_to_exo"} if stage == "stage2" else {"6_optim/lr"}
    speed = {f"7_perf/{name}" for name in ("samples_per_s", "tokens_per_s", "frames_per_s", "data_wait")}
    for tag in losses | rates | speed | {"1_train/loss", "6_optim/grad_norm"}:
        assert [event.step for event in events.Scalars(tag)] == [1, 2], tag
    for first in range(2):
        parts = sum(events.Scalars(tag)[first].value for tag in losses)
        assert events.Scalars("1_train/loss")[first].value == pytest.approx(parts, rel=1e-5)
    assert events.Scalars("6_optim/grad_norm")[0].value > 0
    assert 0 <= events.Scalars("7_perf/data_wait")[0].value < 1
    assert events.Scalars(min(rates))[1].value == 0.0  # after the last step
    manifest = read_manifest(finished / "toy" / stage / "handoff")
    for view in tiny.STAGES[stage].views:
        (event,) = events.Scalars(f"2_val/{view}_choice")
        assert event.step == 2
        assert event.value == pytest.approx(manifest["metrics"][f"val/{view}_choice"])
    (card,) = events.Images("2_val/clip_1")
    with Image.open(io.BytesIO(card.encoded_image_string)) as moving:
        assert (moving.format, moving.n_frames, moving.size) == ("GIF", tiny.FRAMES, (card.width, card.height))
    assert "2_val/answers/text_summary" in tags["tensors"]
    table = events.Tensors("2_val/answers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Describe the video." in table and "Camera-wearer" in table


def test_runs_are_sorted_by_settings_and_final_scores(finished):
    """TensorBoard's own page HParams: columns are the settings of all stages, and their final scores alone."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(finished)).Reload()
    provider = MultiplexerDataProvider(runs, str(finished))
    context = Context(TBContext(multiplexer=runs, data_provider=provider))
    request = RequestContext()
    found = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), context.hparams_from_data_provider(request, "", 9999)
    )
    columns = {info.name: info for info in found.hparam_infos}
    assert columns["model.class_path"].differs and len(columns["model.class_path"].domain_discrete) == len(STAGES)
    assert not columns["network.encoder.width"].differs
    assert "run_dir" not in columns and "model.init_args.network.encoder.width" not in columns
    scores = {info.name.tag for info in found.metric_infos}
    assert {"3_final/ego_choice", "3_final/exo_choice", "3_final/ego_caption"} <= scores
    assert {"3_final/consistency_choice_same", "3_final/consistency_qa_right"} <= scores
    assert all(tag.startswith("3_final/") for tag in scores)
    metrics = json.loads((finished / "toy" / "stage2" / "metrics.json").read_text())
    events = EventAccumulator(str(finished / "toy" / "stage2" / "scores")).Reload()
    for name, value in metrics["metrics"].items():
        assert events.Scalars(f"3_final/{name}")[0].value == pytest.approx(value)
    table = events.Tensors("final/scores/text_summary")[0].tensor_proto.string_val[0].decode()
    row = next(line for line in table.splitlines() if "four-way choice" in line)
    assert [cell.strip() for cell in row.split("|")][3:5] == [str(metrics["clips"]), "25.0"]


def test_the_page_of_key_curves(finished):
    runs = EventMultiplexer().AddRunsFromDirectory(str(finished)).Reload()
    context = TBContext(multiplexer=runs, data_provider=MultiplexerDataProvider(runs, str(finished)))
    plugin = CustomScalarsPlugin(context)
    (page,) = json.loads(plugin.layout_impl(RequestContext(), ""))["category"]
    charts = {chart["title"]: chart["multiline"]["tag"][0] for chart in page["chart"]}
    assert len(charts) == len(page["chart"])  # the same page for all stages
    for title, run in (("losses", "toy/stage1"), ("KL(y || F(x)), and its bars", "toy/stage2")):
        tags = runs.GetAccumulator(run).Tags()["tensors"]
        assert len([tag for tag in tags if re.match(charts[title], tag)]) >= 2, title


# ------------------------------------------------------------------------------------------------------ called again


def test_a_finished_stage_is_left_alone(finished, toy_world, capsys):
    before = contents(finished)
    assert main(arguments("stage1", toy_world, finished)) == 0
    shown = capsys.readouterr().out
    assert "stage1 of toy is finished" in shown and "FORCE=1" in shown
    assert shown.splitlines()[-1] == f"next: make stage2 RUNS={finished} | make tensorboard RUNS={finished}"
    assert contents(finished) == before


def test_the_saved_configuration_is_that_run(finished, capsys):
    before = contents(finished)
    assert main(["fit", str(finished / "toy" / "stage2" / "config.yaml")]) == 0
    assert "stage2 of toy is finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_changed_configuration_is_refused(finished, toy_world, capsys):
    before = contents(finished)
    assert main(arguments("stage1", toy_world, finished, "trainer.max_steps=3", "seed_everything=1")) == 2
    shown = capsys.readouterr().err
    assert "trainer.max_steps: 2 -> 3" in shown and "seed_everything" not in shown
    assert "FORCE=1" in shown and len(shown.splitlines()) == 1
    assert contents(finished) == before


CALLBACKS = "trainer.callbacks=[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]"


def test_a_saved_configuration_takes_overrides(finished, tmp_path, capsys):
    """They reach everything that depends on them, curves included, and the original run is left as it is."""
    before = contents(finished)
    command = ["fit", str(finished / "toy" / "stage2" / "config.yaml"), "network.mapper.kind=resnet"]
    assert main(command) == 2
    assert 'network.mapper.kind: "linear" -> "resnet"' in capsys.readouterr().err
    folder = tmp_path / "toy" / "stage2"
    assert main([*command, f"run_dir={folder}", "trainer.max_steps=1", CALLBACKS]) == 0
    assert contents(finished) == before
    assert list(folder.glob("events.out.tfevents.*"))
    parts = [read_manifest(run / "handoff")["parts"]["ego_to_exo"] for run in (folder, finished / "toy" / "stage2")]
    assert parts[0].keys() != parts[1].keys()

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["kl"]["tau"] == saved["model"]["init_args"]["cycle"]["weight"] == 1.0
    assert saved["trainer"]["gradient_clip_algorithm"] is None
    # A default that is written down is the same configuration, also for a run that wrote none.
    again = ["fit", str(folder / "config.yaml"), "model.kl.tau=1.0", "--model.cycle.weight=1", "data.exo_policy=all"]
    given = compose(folder / "config.yaml", None)
    assert main(again) == 0
    assert "stage2 of toy is finished" in capsys.readouterr().out
    shutil.rmtree(folder / "handoff")
    assert main([*again, CALLBACKS]) == 0
    assert "stage2 of toy resumes from" in capsys.readouterr().out
    (folder / "layers.yaml").unlink()
    (folder / "config.yaml").write_text(yaml.safe_dump(given))  # as earlier versions did
    assert main(again) == 0
    assert "stage2 of toy is finished" in capsys.readouterr().out


def test_the_advice_for_a_changed_configuration_works(runs, toy_world, capsys):
    changed = [*arguments("stage1", toy_world, runs), "trainer.max_steps=1"]
    before = contents(runs)
    assert main(changed) == 2
    (advice,) = re.findall(r"(run_dir=\S+)$", capsys.readouterr().err.strip())
    assert main([*changed, advice]) == 0
    assert contents(runs / "toy" / "stage1") == {k: v for k, v in before.items() if "stage1" in k.parts}


def test_force_trains_from_scratch(runs, toy_world):
    folder = runs / "toy" / "stage1"
    before = weights(folder)
    assert main([*arguments("stage1", toy_world, runs, "trainer.max_steps=3"), "--force"]) == 0
    assert read_manifest(folder / "handoff")["step"] == 3
    assert not equal(before, weights(folder))
    assert main([*arguments("stage1", toy_world, runs), "--force"]) == 0
    assert read_manifest(folder / "handoff")["step"] == 2
    assert equal(before, weights(folder))  # the same run, bit for bit
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("1_train/loss")] == [1, 2]  # no curve of the runs before


def test_a_stage_whose_initial_weights_changed_is_refused(runs, toy_world, capsys):
    changed = "model.init_args.optim.learning_rate=1e-4"
    assert main([*arguments("stage1", toy_world, runs, changed), "--force"]) == 0
    before = contents(runs / "toy" / "stage2")
    capsys.readouterr()
    assert main(["fit", str(runs / "toy" / "stage2" / "config.yaml")]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "was trained from a different ego_encoder, exo_encoder, projector than" in shown
    assert f"{runs}/toy/stage1/handoff" in shown and "FORCE=1" in shown
    assert contents(runs / "toy" / "stage2") == before


def test_evaluate_reproduces_the_metrics_exactly(runs, toy_world):
    for stage in STAGES:
        folder = runs / "toy" / stage
        before = [(folder / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")]
        for name in ("metrics.json", "predictions.jsonl"):
            (folder / name).unlink()
        assert main(arguments(stage, toy_world, runs, command="evaluate")) == 0
        assert [(folder / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")] == before


def test_a_stage_trained_but_not_evaluated_is_only_evaluated(runs, toy_world):
    folder = runs / "toy" / "stage3"
    metrics, trained = (folder / "metrics.json").read_bytes(), contents(folder / "handoff")
    (folder / "metrics.json").unlink()
    assert main(arguments("stage3", toy_world, runs)) == 0
    assert (folder / "metrics.json").read_bytes() == metrics
    assert contents(folder / "handoff") == trained


def test_sanity_validation_does_not_disturb_training(runs, toy_world):
    folder = runs / "toy" / "stage1"
    before = weights(folder)
    assert main([*arguments("stage1", toy_world, runs, "trainer.num_sanity_val_steps=1"), "--force"]) == 0
    assert equal(before, weights(folder))


# ------------------------------------------------------------------------------------------------------ interruptions


LONG = ["trainer.max_steps=30", "trainer.val_check_interval=10", "checkpoint_every_n_steps=4"]


def test_a_killed_stage_resumes_where_it_stopped(runs, toy_world, tmp_path, capsys):
    shutil.rmtree(runs / "toy" / "stage3")
    straight = shutil.copytree(runs, tmp_path / "straight")
    shared = [f"handoffs.{stage}={runs}/toy/{stage}/handoff" for stage in STAGES[:3]]
    words = arguments("stage3", toy_world, runs, *LONG, *shared)
    folder = runs / "toy" / "stage3"

    environment = os.environ | {"PYTHONPATH": str(tiny.EXPERIMENTS.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_modules", *words], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while newest(folder / "checkpoints") is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "handoff").exists()
    reached = read_state(newest(folder / "checkpoints"))["global_step"]
    assert 0 < reached < 30

    assert main([*words, "trainer.max_steps=31"]) == 2
    assert "interrupted with a different configuration (trainer.max_steps: 30 -> 31" in capsys.readouterr().err
    assert main(words) == 0
    assert f"stage3 of toy resumes from {folder}/checkpoints/" in capsys.readouterr().out
    assert main(arguments("stage3", toy_world, straight, *LONG, *shared)) == 0
    assert equal(weights(folder), weights(straight / "toy" / "stage3"))
    assert (folder / "predictions.jsonl").read_bytes() == (
        straight / "toy" / "stage3" / "predictions.jsonl"
    ).read_bytes()


def test_settings_that_do_not_change_results_may_differ_when_a_run_resumes(runs, toy_world, capsys):
    """Other micro-batches, checkpoints, threads and sample panels, but not the longest text."""
    folder = runs / "toy" / "stage1"
    shutil.rmtree(folder)
    assert main(arguments("stage1", toy_world, runs, "trainer.max_steps=4")) == 0
    straight = weights(folder)
    shutil.rmtree(folder / "handoff")
    shutil.rmtree(folder / "checkpoints" / "0000004")
    changed = ["data.init_args.micro_batch_size=2", "checkpoint_every_n_steps=7", "threads=2", "panel.clips=1"]
    assert main(arguments("stage1", toy_world, runs, "trainer.max_steps=4", *changed)) == 0
    assert f"resumes from {folder}/checkpoints/0000003" in capsys.readouterr().out
    resumed = weights(folder)
    for file, tensors in straight.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(resumed[file][name], tensor, atol=1e-5, rtol=0)
    assert main(arguments("stage1", toy_world, runs, "trainer.max_steps=4", "data.init_args.max_text_tokens=159")) == 2
    assert "data.init_args.max_text_tokens: 160 -> 159" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_touched(runs, toy_world, capsys):
    folder = runs / "toy" / "stage1"
    shutil.rmtree(folder / "handoff")
    file = newest(folder / "checkpoints") / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    before = contents(folder)
    capsys.readouterr()
    assert main(arguments("stage1", toy_world, runs)) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and "__0_0.distcp, which differs" in shown[0] and "delete the folder" in shown[0]
    assert contents(folder) == before


def test_a_stage_that_only_lacks_its_handoff_gets_it_without_training(runs, toy_world, capsys):
    folder = runs / "toy" / "stage3"
    written, scores = weights(folder), (folder / "predictions.jsonl").read_bytes()
    for name in ("handoff", "checkpoints/0000001"):
        shutil.rmtree(folder / name)
    for name in ("metrics.json", "predictions.jsonl"):
        (folder / name).unlink()
    assert main(arguments("stage3", toy_world, runs)) == 0
    assert equal(weights(folder), written)
    assert (folder / "predictions.jsonl").read_bytes() == scores
    assert read_manifest(folder / "handoff")["started_from"]["projector"] == digest(runs / "toy" / "stage2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_handoff_that_cannot_be_written_costs_no_step(runs, toy_world, monkeypatch, capsys, error):
    folder = runs / "toy" / "stage2"
    written = weights(folder)

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(handoff, "save_file", full)
        assert main([*arguments("stage2", toy_world, runs), "--force"]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert (
        shown.startswith(f"error: {folder}/handoff: the stage weights could not be written (")
        and "No space left" in shown
    )
    assert newest(folder / "checkpoints").name == "0000002"
    assert main(arguments("stage2", toy_world, runs)) == 0
    assert equal(weights(folder), written)


def test_consolidate_makes_a_handoff_of_an_unfinished_stage(runs, toy_world, capsys):
    folder = runs / "toy" / "stage2"
    (written,) = [weights(folder)]
    shutil.rmtree(folder / "handoff")
    capsys.readouterr()
    assert main(arguments("stage2", toy_world, runs, command="consolidate")) == 0
    assert f"handoffs.stage2={folder}/handoff_0000002" in capsys.readouterr().out
    manifest = read_manifest(folder / "handoff_0000002")
    assert (manifest["stage"], manifest["step"]) == ("stage2", 2)
    assert main(arguments("stage2", toy_world, runs, "trainer.max_steps=5", command="consolidate")) == 2
    assert "trainer.max_steps: 2 -> 5" in capsys.readouterr().err
    made = {path.name: load_file(path) for path in sorted((folder / "handoff_0000002").rglob("*.safetensors"))}
    assert made.keys() == written.keys()
    assert all(torch.equal(made[file][key], written[file][key]) for file in made for key in written[file])
    assert not (folder / "handoff").exists()  # the stage is not finished
    starts = f"handoffs.stage2={folder}/handoff_0000002"
    assert main([*arguments("stage3", toy_world, runs, starts), "--force"]) == 0
    assert main(arguments("stage2", toy_world, runs / "other", command="consolidate")) == 2
    assert "no checkpoint: run `make stage2` first" in capsys.readouterr().err


def test_a_stopped_stage_is_not_finished(runs, toy_world, monkeypatch, capsys):
    folder = runs / "toy" / "stage1"
    shutil.rmtree(folder)
    build = training.build

    def stopping(config):
        run = build(config)
        monkeypatch.setattr(run.stage, "on_train_batch_start", lambda *_: signal.raise_signal(signal.SIGTERM))
        return run

    with monkeypatch.context() as patched:
        patched.setattr(training, "build", stopping)
        assert main(arguments("stage1", toy_world, runs)) == STOPPED
    assert "stopped: stage1 stopped at step 1; run it again to resume" in capsys.readouterr().err
    assert not (folder / "handoff").exists() and not (folder / "metrics.json").exists()


def test_a_run_without_held_out_clips(toy_world, tmp_path):
    assert main(arguments("stage0", toy_world, tmp_path, "data.init_args.held_out=null")) == 0
    folder = tmp_path / "toy" / "stage0"
    assert read_manifest(folder / "handoff")["metrics"] == {}
    assert not (folder / "metrics.json").exists()
    before = contents(folder / "handoff")
    assert main(arguments("stage0", toy_world, tmp_path, "data.init_args.held_out=null")) == 0
    assert contents(folder / "handoff") == before


# -------------------------------------------------------------------------------------------------- other experiments


SWEEP = read_plan(tiny.EXPERIMENTS / "ablations" / "sweep.yaml")
# Rates and shares alone; a tenth of the videos of this small world is none.
NO_OTHER_PARTS = {"b_slow_encoder", "e_slow_encoder", "b_few_instructions", "e_few_instructions"}
ABLATIONS = sorted(SWEEP.variants.keys() - NO_OTHER_PARTS)


REMOVED = {
    **{name: {"ego_to_exo", "exo_to_ego"} for name in ("a_ego_only", "a_more_steps", "ego_preparation")},
    **{name: {"exo_to_ego"} for name in ABLATIONS if name[0] in "bd"},
    "e_without_lora": {"lora"},
    "paper_recipe": {"projector"},
    "paper_control": {"projector", "exo_to_ego"},
}
FAIR = str(tiny.EXPERIMENTS / "toy_fair")  # which the variants change


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_from_the_stages_before(finished, toy_world, tmp_path, name):
    shared = [f"handoffs.{stage}={finished}/toy/{stage}/handoff" for stage in ("stage0", "stage1")]
    few = ["data.init_args.held_out=null", "trainer.max_steps=1", *shared]
    second = tmp_path / "ablations" / name / "stage2"
    few += [f"experiment=ablations/{name}", f"handoffs.stage2={second}/handoff"]
    for stage in ("stage2", "stage3"):
        given = [*SWEEP.overrides_of(name, stage), *few]
        assert main(arguments(stage, toy_world, tmp_path, *given, experiment=FAIR)) == 0
        manifest = read_manifest(tmp_path / "ablations" / name / stage / "handoff")
        assert set(manifest["parts"]) == set(tiny.STAGES[stage].trains) - REMOVED.get(name, set())
    before = finished / "toy" / "stage1" if name.startswith("paper_") else second
    assert manifest["started_from"]["projector"] == digest(before)
    assert manifest["started_from"]["language_model"] == digest(finished / "toy" / "stage0")


@pytest.mark.parametrize(("reads", "name"), [("ego", "x"), ("mapped", "mapped")])
def test_answers_from_one_visual_input_are_those_of_a_model_that_reads_no_other(runs, toy_world, reads, name):
    alone = [f"network.visual_inputs=[{reads}]", *(f"handoffs.{s}={runs}/toy/{s}/handoff" for s in STAGES[:3])]
    shutil.copytree(runs / "toy" / "stage3" / "handoff", runs / reads / "toy" / "stage3" / "handoff")
    assert main(arguments("stage3", toy_world, runs / reads, *alone, command="evaluate")) == 0
    one, both = runs / reads / "toy" / "stage3", runs / "toy" / "stage3"
    assert _given(one, "choice") == _given(both, "choice", name)
    losses = [json.loads((folder / "metrics.json").read_text())["metrics"]["ego_loss"] for folder in (one, both)]
    assert losses[0] != losses[1]


def _given(folder, task, alone=None):
    """Answers to all questions of a kind: those of a run, or those it gave from one visual input alone."""
    file = folder / ("consistency.jsonl" if alone else "predictions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["clip"]: row["given"][alone] if alone else row["prediction"] for row in rows if row["task"] == task}


@pytest.mark.parametrize("name", ["toy_coarse", "toy_qwen3"])
def test_other_networks_train_from_the_beginning(toy_world, tmp_path, name):
    few = ["threads=1", "trainer.max_steps=1", "trainer.limit_val_batches=0", "data.init_args.global_batch_size=2"]
    few += ["network.mapper.width=8", "network.mapper.num_blocks=1", f"data_root={toy_world}", f"runs={tmp_path}"]
    few += ["data.init_args.held_out=null", "data.init_args.num_workers=0"]
    for stage in STAGES:
        assert main(["fit", str(tiny.EXPERIMENTS / name), stage, *few]) == 0
        assert set(read_manifest(tmp_path / name / stage / "handoff")["parts"]) == set(tiny.STAGES[stage].trains)


STAGE4 = """\
model:
  class_path: stage_of_mine.Refinement
  init_args:
    init:
      ego_encoder: ${handoffs.stage3}
      projector: ${handoffs.stage3}
      language_model: ${start.language_model}
    optim: { learning_rate: 1e-4 }
    extra: 2
data:
  class_path: datamodules.InstructionDataModule
  init_args: { view: ego, sources: ["${data_root}/instructions/egotimeqa.jsonl"] }
"""
REFINEMENT = """\
from lightning_modules import LearnerSelfPractice


class Refinement(LearnerSelfPractice):
    def __init__(self, extra: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
"""


def test_a_fourth_stage_is_a_file_of_the_experiment(runs, toy_world, tmp_path, monkeypatch, capsys):
    (tmp_path / "stage_of_mine.py").write_text(REFINEMENT)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    handoffs = "".join(f"  {stage}: {runs}/toy/{stage}/handoff\n" for stage in STAGES)
    (folder / "experiment.yaml").write_text(f"extends: [{TOY}]\nexperiment: toy\nhandoffs:\n{handoffs}")
    (folder / "stage4.yaml").write_text(STAGE4)
    assert stage_names(folder) == [*STAGES, "stage4"]
    assert main(arguments("stage5", toy_world, runs, experiment=str(folder))) == 2
    assert "stage: got 'stage5', allowed: stage0, stage1, stage2, stage3, stage4" in capsys.readouterr().err
    words = arguments("stage4", toy_world, runs, "model.init_args.extr=3", experiment=str(folder))
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "model.init_args.extr: no such key in model.init_args, allowed: network, " in shown and ", extra" in shown
    assert main(words[:-1]) == 0
    assert read_manifest(runs / "toy" / "stage4" / "handoff")["stage"] == "stage4"
    (runs / "toy" / "stage4" / "metrics.json").unlink()
    assert main(["evaluate", *words[1:-1]]) == 0
    capsys.readouterr()
    assert main(["report", str(runs / "toy")]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert [cell.strip() for cell in head.strip("|").split("|")][-5:] == [*STAGES, "stage4"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["toy", "toy_coarse", "toy_qwen3"])
def test_every_backbone_runs_at_its_own_size(experiment, toy_world, tmp_path):
    small = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.init_args.global_batch_size=4"]
    for stage in STAGES:
        folder = str(tiny.EXPERIMENTS / experiment)
        assert main(["fit", folder, stage, *small, f"data_root={toy_world}", f"runs={tmp_path}"]) == 0
    assert (tmp_path / experiment / "results.md").read_text().count("stage") == len(STAGES)
    for stage in STAGES:
        given = [f"data_root={toy_world}", f"runs={tmp_path}", "--benchmarks", "all"]
        assert main(["evaluate", folder, stage, *small, *given]) == 0
    table = (tmp_path / experiment / "egobench.md").read_text()
    assert table.splitlines()[0].count("stage") == len(STAGES)
    asked = compose(tiny.EXPERIMENTS / experiment, "stage3")["egobench"]["benchmarks"]
    assert len(asked) == 10 and all(f"| {entry['name']} " in table for entry in asked)
