"""Wrong input on the command line gives one line that names the change to make, and exit status 2."""

import json
import re
import shutil

import pytest
import tiny
import torch
import yaml

from datamodules.text import load_tokenizer
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.run import complete
from lightning_modules.weights.handoff import full_tensors, write_stage_weights

TOY = str(tiny.EXPERIMENTS / "toy")


@pytest.fixture
def refused(toy_world, tmp_path, capsys):
    """Run a command that must fail; gives its one line of error."""

    def run(command, stage, *overrides, experiment=TOY, world=toy_world):
        words = [command, experiment, *([stage] if stage else []), *tiny.OVERRIDES]
        status = main([*words, f"data_root={world}", f"runs={tmp_path / 'runs'}", *overrides])
        shown = capsys.readouterr().err
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert status == 2
        assert "Traceback" not in shown
        assert len(errors) == 1 and shown.splitlines()[-1] == errors[0], shown
        assert len(errors[0]) < 600
        return errors[0].removeprefix("error: ")

    return run


# ------------------------------------------------------------------------------------------------------ configuration


UNKNOWN = [
    ("stage0", "trainr.max_steps=3", r"trainr: no such key, did you mean: trainer$"),
    ("stage0", "trainer.max_stepz=3", r"trainer.max_stepz: no such key in trainer, did you mean: max_steps, "),
    (
        "stage0",
        "network.mapper.widht=3",
        r"network.mapper.widht: no such key in network.mapper, allowed: kind, width, ",
    ),
    (
        "stage0",
        "clips.num_frame=3",
        r"clips.num_frame: no such key in clips, allowed: num_frames, image_size, frame_fit, pad_rgb$",
    ),
    ("stage0", "model.init_args.word_weight=3", r"model.init_args.word_weight: no such key .*\bbow_weight\b"),
    ("stage0", "model.init_args.optim.lr=3", r"model.init_args.optim.lr: no such key .*\blearning_rate\b"),
    ("stage2", "model.init_args.kl.axes=channel", r"model.init_args.kl.axes: no such key .*\baxis\b"),
    ("stage1", "data.init_args.view=exo", r"data.init_args.view: no such key .*\bviews\b"),
    ("stage0", "monitor.every=3", r"monitor.every: no such key in monitor, allowed: every_n_steps$"),
]
WRONG = [
    ("stage0", "trainer.max_steps=many", r"trainer.max_steps: got many, allowed: int$"),
    ("stage0", "threads=all", r"threads: got all, allowed: int or null$"),
    ("stage0", "checkpoint_every_n_steps=often", r"checkpoint_every_n_steps: got often, allowed: int$"),
    ("stage0", "network.mapper.width=wide", r"network.mapper.width: got wide, allowed: int$"),
    (
        "stage0",
        "network.mapper.kind=unet",
        r"network.mapper.kind: got unet, allowed: resnet, cyclegan, attention",
    ),
    ("stage0", "clips.num_frames=2.5", r"clips.num_frames: got 2.5, allowed: int$"),
    ("stage0", "clips.frame_fit=stretch", r"clips.frame_fit: got stretch, allowed: pad, crop, squash$"),
    (
        "stage0",
        "model.init_args.optim.learning_rate=fast",
        r"model.init_args.optim.learning_rate: got fast, allowed: float$",
    ),
    ("stage0", "data.init_args.view=top", r"data.init_args.view: got top, allowed: ego, exo$"),
    ("stage2", "model.init_args.kl.axis=time", r"model.init_args.kl.axis: got time, allowed: channel, spatial$"),
    ("stage0", "clips.num_frames=0", r"clips.num_frames: got 0, allowed: 1 or more$"),
    ("stage0", "network.encoder.width=31", r"encoder: width 31 is not a multiple of heads 2"),
    ("stage0", "network.lora.rank=0", r"lora: got rank=0, .*rank must be at least 1"),
    ("stage0", "model.init_args.optim.learning_rate=-1", r"^model.optim.learning_rate: got -1.0, allowed: above 0$"),
    (
        "stage0",
        "model.init_args.train=[lora]",
        r"model.train: got lora, allowed: exo_encoder, projector, language_model$",
    ),
    ("stage0", "data.init_args.global_batch_size=0", r"data.global_batch_size: got 0, allowed: 1 or more$"),
    ("stage0", "data.init_args.num_workers=-1", r"data.num_workers: got -1, allowed: 0 or more$"),
    ("stage0", "data.init_args.seed=-1", r"data.seed: got -1, allowed: 0 or more$"),
    ("stage0", "seed_everything=-1", r"seed_everything: got -1, allowed: from 0 to 4294967295$"),
    ("stage0", "monitor.every_n_steps=0", r"monitor.every_n_steps: got 0, allowed: 1 or more$"),
    (
        "stage0",
        "model.class_path=lightning_modules.Nope",
        r"model.class_path: got lightning_modules.Nope, which does not exist",
    ),
    ("stage0", "data.class_path=datamodules.Nope", r"data.class_path: got datamodules.Nope, which does not exist"),
    ("stage0", "trainer.accelerator=abacus", r"invalid accelerator name: .*abacus.*Available names are: .*cpu"),
    ("stage0", "trainer.max_steps", r"override 'trainer.max_steps': expected key=value"),
    ("stage0", "trainer.max_steps=[1", r"override 'trainer.max_steps=\[1': the value is no YAML"),
    ("stage0", "data_root=${nowhere}", r"'nowhere' not found"),
    (
        "stage0",
        "trainer.max_time=12:00:00",
        r"trainer.max_time: got 12:00:00, allowed: days:hours:minutes:seconds, e.g.",
    ),
    ("stage0", "trainer.max_time=00:00:00:00", r"trainer.max_time: got 00:00:00:00, allowed: above 0$"),
    ("stage0", "trainer=null", r"configuration: trainer missing"),
    ("stage0", "trainer.fast_dev_run=true", r"trainer.fast_dev_run: got True, .*set trainer.max_steps"),
    (
        "stage0",
        "network.language_model.overrides=null",
        r"network.language_model.overrides: got null, allowed: keys with",
    ),
    (
        "stage0",
        "network.language_model.pretrained=x",
        r"overrides \(.*\) go with architecture, .*: remove one of the two$",
    ),
    (
        "stage0",
        "~trainer.max_stepz",
        r"command line: trainer: max_stepz is to be removed but is not set there; set: .*max_",
    ),
    ("stage7", "seed_everything=1", r"stage: got 'stage7', allowed: stage0, stage1, stage2, stage3$"),
]


@pytest.mark.parametrize(("stage", "override", "message"), UNKNOWN + WRONG, ids=[case[1] for case in UNKNOWN + WRONG])
def test_wrong_configuration(refused, tmp_path, stage, override, message):
    assert re.search(message, refused("show", stage, override))
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_stage_is_refused(refused):
    assert re.search(r"toy is a folder: name a stage after it, stage0, stage1, stage2, stage3$", refused("fit", None))


def test_unknown_experiment_lists_the_known_ones(refused):
    assert re.search(
        r"no experiment .*there are: .*\btoy\b", refused("fit", "stage0", experiment=str(tiny.EXPERIMENTS / "toi"))
    )


def test_show_prints_a_configuration_that_runs(toy_world, tmp_path, capsys):
    assert main(["show", TOY, "stage0", *tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path / 'runs'}"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert main(["show", str(tmp_path / "shown.yaml")]) == 0
    assert capsys.readouterr().out == (tmp_path / "shown.yaml").read_text()
    assert not (tmp_path / "runs").exists()


ADVICE = [
    (
        "network.language_model.architecture=llama",
        r"remove with (~network.language_model.overrides.sliding_window),",
        "network.language_model.architecture=llama {}",
    ),
    ("trainer.max_time=3600", r"e.g. (trainer.max_time=00:11:30:00)$", "{}"),
    ("trainer.max_time=3600", r"e.g. (trainer.max_time=00:11:30:00)$", "trainer.max_time=12:00:00:00"),
    ("model.class_path=Initialisation", r"such as (lightning_modules.Initialisation)$", "model.class_path={}"),
    ("--model.optim.learning_rate=-1", r"^(model.optim.learning_rate): got -1.0, allowed: above 0$", "--{}=1e-3"),
    ("--data.vew=ego", r"data.init_args.vew: no such key .*did you mean: (view)", "--data.{}=ego"),
    ("model.network.lora.rank=3", r"change (network) instead$", "{}.lora.rank=3"),
]


@pytest.mark.parametrize(("override", "message", "corrected"), ADVICE)
def test_the_advice_of_a_message_can_be_typed(refused, toy_world, tmp_path, override, message, corrected):
    advice = re.search(message, refused("show", "stage0", override))
    assert advice
    words = ["show", TOY, "stage0", *tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path}"]
    assert main([*words, *corrected.format(advice[1]).split()]) == 0


def test_every_key_is_listed_and_can_be_typed(capsys):
    assert main(["keys", TOY, "stage2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    form = r"[a-z_0-9.]+ = .+  # (.+)"
    assert [line for line in lines if not re.fullmatch(form, line)] == []
    assert "model.kl.tau = 1.0  # float: temperature" in lines
    assert any(line.startswith("trainer.max_steps = 180  # int, default -1: Stop training") for line in lines)
    assert "data.exo_policy = all  # all, best, random, best_first, best_last, mean: which exocentric" in "\n".join(
        lines
    )
    config = compose(tiny.EXPERIMENTS / "toy", "stage2")
    overrides = [line.partition("  # ")[0].replace(" = ", "=", 1) for line in lines]
    full = complete(config)
    assert complete(compose(tiny.EXPERIMENTS / "toy", "stage2", overrides)) == full
    assert complete(full) == full


def test_traceback_on_request(toy_world, tmp_path):
    with pytest.raises(ValueError, match=r"clips.num_frames: got 0"):
        words = ["show", TOY, "stage0", *tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path}"]
        main([*words, "clips.num_frames=0", "--traceback"])


def test_report_without_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no stage has been evaluated: run `make stage1` first\n"


# ------------------------------------------------------------------------------------------------------ stage weights


@pytest.mark.parametrize(("stage", "needed"), [("stage1", "stage0"), ("stage2", "stage1"), ("stage3", "stage2")])
def test_missing_handoff(refused, tmp_path, stage, needed):
    message = refused("fit", stage)
    assert message == f"No {needed} weights in {tmp_path}/runs/toy/{needed}/handoff. Run `make {needed}` first."


def test_evaluating_an_untrained_stage(refused):
    assert re.search(
        r"No stage0 weights in .*/toy/stage0/handoff. Run `make stage0` first.$", refused("evaluate", "stage0")
    )


def test_handoff_of_another_model_size(refused, toy_world, tmp_path):
    size = len(load_tokenizer(str(toy_world / "tokenizer")))
    parts = tiny.STAGES["stage0"].uses
    folder = tmp_path / "runs" / "toy" / "stage0" / "handoff"
    model = Exo2EgoModel(tiny.network(), size, parts)
    write_stage_weights(
        folder, ((part, full_tensors(model.part(part))) for part in parts), tiny.network().lora, {"stage": "stage0"}
    )
    message = refused("fit", "stage1", "network.encoder.width=64")
    assert f"{folder}: does not fit exo_encoder of this model" in message
    assert "mis-shaped (tower.class_embedding is [32], expected [64], " in message
    assert "written by stage0: give both the same `network`, or run `make stage0 FORCE=1`" in message
    assert not (tmp_path / "runs" / "toy" / "stage1" / "handoff").exists()


# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def broken_world(toy_world, tmp_path):
    return shutil.copytree(toy_world, tmp_path / "world")


def test_missing_data_folder(refused, toy_world, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert re.search(rf"{nowhere}.*run `make data`", refused("fit", "stage0", world=nowhere))
    message = refused("fit", "stage0", f"tokenizer={toy_world}/tokenizer", world=nowhere)
    assert message.startswith(f"data.root: no folder {nowhere}: run `make data` for the generated world, ")
    assert message.endswith(", or set data.init_args.root")


@pytest.mark.parametrize(("stage", "file"), [("stage0", "initialisation"), ("stage0", "held_out")])
def test_missing_data_file(refused, broken_world, stage, file):
    path = broken_world / "instructions" / f"{file}.jsonl"
    path.unlink()
    assert re.search(
        rf"no file {path}: run `make data`.*, or set data.init_args", refused("fit", stage, world=broken_world)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_video_names_the_file(refused, broken_world, tmp_path, workers):
    for path in (broken_world / "initialisation").rglob("*.mp4"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused("fit", "stage0", f"data.init_args.num_workers={workers}", world=broken_world)
    assert re.match(rf"{broken_world}/initialisation/toy_initialisation_\d+/[\w-]+\.mp4", message)
    assert not (tmp_path / "runs" / "toy" / "stage0" / "handoff").exists()


@pytest.mark.parametrize("file", ["initialisation", "held_out"])
def test_malformed_line_is_named(refused, broken_world, file):
    path = broken_world / "instructions" / f"{file}.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:40]
    path.write_text("\n".join(lines))
    assert re.match(rf"{path} line 3: invalid JSON \(", refused("fit", "stage0", world=broken_world))


def test_missing_field_is_named(refused, broken_world):
    path = broken_world / "instructions" / "initialisation.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[4]["video"]
    path.write_text("\n".join(map(json.dumps, records)))
    assert refused("fit", "stage0", world=broken_world) == f"{path} line 5: field 'video' is missing"


@pytest.mark.parametrize("file", ["index.json", "groups.jsonl", "clips.jsonl"])
def test_a_damaged_index_is_named(refused, broken_world, file):
    path = broken_world / "ego_exo_clip" / file
    path.write_text(path.read_text()[:-20])
    message = refused("fit", "stage1", "model.init_args.init=null", world=broken_world)
    assert re.search(rf"{path}\b.*(make data|fix this line)", message)


def test_too_few_samples_for_a_batch(refused):
    message = refused("fit", "stage0", "data.init_args.global_batch_size=1000")
    assert message == "data.global_batch_size: got 1000, but there are only 36 training samples"


def test_batch_that_does_not_split(refused):
    message = refused("fit", "stage0", "trainer.accumulate_grad_batches=3")
    assert re.match(r"data.global_batch_size: 4 does not split into 1 ranks times 3 accumulated", message)


def test_torch_threads_follow_the_configuration(toy_world, tmp_path):
    before = torch.get_num_threads()
    main(["show", TOY, "stage0", *tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path}", "threads=2"])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_keys_may_follow_options(toy_world, tmp_path, capsys):
    words = [*tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path}"]
    assert main(["show", TOY, "stage0", *words[:-2], "--traceback", *words[-2:]]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["runs"] == str(tmp_path)
    for wrong in ("--forced", "stage2"):
        with pytest.raises(SystemExit, match="2"):
            main(["show", TOY, "stage0", "--traceback", wrong])
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
