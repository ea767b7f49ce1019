"""Mistakes that are found before torch is imported are those of the complete check, in the same words."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_modules.early_check as early
from lightning_modules.config import ConfigError, compose, stage_names

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(file.parent for file in (ROOT / "experiments").glob("*/experiment.yaml"))
NAMED = [folder for folder in EXPERIMENTS if folder.name != "base"]
MISTAKES = {
    "fit experiments/tyo stage1": "no experiment experiments/tyo: no such file",
    "fit experiments/toy stge1": "stage: got 'stge1', allowed: stage0, stage1, stage2, stage3",
    "fit experiments/toy": "experiments/toy is a folder: name a stage after it, stage0, stage1",
    "fit experiments/toy stage2 trainer.max_step=3": "trainer.max_step: no such key in trainer, did you",
    "fit experiments/toy stage2 tokenizr=x": "tokenizr: no such key, did you mean: tokenizer",
    "fit experiments/toy stage2 model.init_args.optim.lr=1": "model.init_args.optim.lr: no such key in mod",
    "fit experiments/toy stage2 network.mapper.knd=linear": "network.mapper.knd: no such key in network.mapper",
    "fit experiments/toy stage2 trainer.max_steps=many": "trainer.max_steps: got many, allowed: int",
    "fit experiments/toy stage2 model.class_path=lightning_modules.Stage9": "model.class_path: got lightning_m",
    "fit experiments/toy stage2 data_root=nowhere": "data.root: no folder nowhere: run `make data`",
    "fit experiments/toy stage2 data.init_args.root=. data.init_args.held_out=x.json": "data.held_out: no file x.json",
    "fit experiments/toy stage2 data_root=. data.init_args.held_out=null runs=none": "No stage1 weights in none/toy/st",
    "evaluate experiments/toy stage3 data_root=. data.init_args.held_out=null runs=none --benchmarks=all": "No stage3 ",
    "plan experiments/toy plan.mfus=0.5": "plan.mfus: no such key in plan, allowed: ",
    "check experiments/toy stage2 trainer.max_step=3 --force": "trainer.max_step: no such key",
    "chat nowhere.mp4 --model experiments": "nowhere.mp4: no such file: name a video, or a folder of images",
    "describe pyproject.toml --model no/such/run": "no/such/run: no such folder: name a run, an exported folder, or",
    "export no/such/run out": "no/such/run: no such folder: name a run",
    "serve no/such/run": "no/such/run: no such folder: name a run",
    "fit runs/none/config.yaml": "runs/none/config.yaml: no such file",
}


def late(config):
    """Return the message of the complete check, None if there is none."""
    import lightning as L

    from datamodules.clips.datamodule import ClipDataModule
    from lightning_modules.config_check import check_config
    from lightning_modules.run import SHARED_KEYS
    from lightning_modules.stages.base import Stage

    others = {"seed_everything": bool | int, "trainer": L.Trainer, "model": Stage, "data": ClipDataModule}
    return message(check_config, config, SHARED_KEYS | others)


def message(check, *arguments):
    try:
        check(*arguments)
    except ConfigError as error:
        return str(error)
    return None


def sections(value, path=()):
    if isinstance(value, dict):
        yield path
        for key, item in value.items():
            yield from sections(item, (*path, key))


@pytest.mark.parametrize("experiment", NAMED, ids=lambda folder: folder.name)
def test_right_configurations_are_not_refused(experiment):
    for stage in stage_names(experiment):
        early.check_early(compose(experiment, stage), "show")


@pytest.mark.parametrize(
    ("experiment", "stage"), [("toy", "stage2"), ("toy", "stage3"), ("exo2ego_7b_answer_kl", "stage2")]
)
@pytest.mark.parametrize("value", [1, "words", None])
def test_misspelt_keys_are_named_as_by_the_complete_check(experiment, stage, value):
    config = compose(ROOT / "experiments" / experiment, stage)
    sooner = []
    for path in sections(config):
        wrong = copy.deepcopy(config)
        section = wrong
        for key in path:
            section = section[key]
        section["misspelt"] = 1
        if found := message(early.check_early, wrong, "show"):
            assert found == late(wrong)
            sooner.append(".".join(path))
    assert {"", "trainer", "network", "network.mapper", "clips", "data.init_args", "model.init_args.optim"} <= {*sooner}


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=many",
        "trainer.gradient_clip_val=[1]",
        "checkpoint_every_n_steps=often",
        "clips.num_frames=few",
        "clips.frame_fit=stretch",
        "network.lora.rank=[1]",
        "model.init_args.frozen_dtype=float8",
        "model.init_args.optim.learning_rate=high",
        "seed_everything=x",
    ],
)
def test_values_of_a_wrong_type_are_named_as_by_the_complete_check(override):
    config = compose(ROOT / "experiments" / "toy", "stage2", [override])
    found, complete = message(early.check_early, config, "show"), late(config)
    assert complete is not None and found in (complete, None)
    assert found or override.startswith(("trainer.gradient_clip_val", "clips.frame_fit"))


def test_a_class_of_ones_own_may_take_any_arguments(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from lightning_modules import Stage\nimport elsewhere\n"
        "class Open(elsewhere.Base):\n    def __init__(self, a: int = 1, **more): ...\n"
        "class Shut(Stage):\n    def __init__(self, a: int = 1): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = compose(ROOT / "experiments" / "toy", "stage2")
    config["model"] = {"class_path": "mine.Open", "init_args": {"a": 2, "b": 3}}
    early.check_early(config, "show")
    config["model"]["class_path"] = "mine.Shut"
    assert message(early.check_early, config, "show") == "model.init_args.b: no such key in model.init_args, allowed: a"


def test_mistakes_are_named_before_torch_is_imported():
    program = (
        "import contextlib, io, json, sys\nfrom lightning_modules.cli import main\nfound = []\n"
        "for words in json.load(sys.stdin):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as text:\n"
        "        status = main(words.split())\n"
        "    found.append([status, text.getvalue()])\n"
        "heavy = sorted({'torch', 'lightning', 'transformers'} & sys.modules.keys())\n"
        "print(json.dumps([found, heavy]))"
    )
    command = [sys.executable, "-c", program]
    typed = json.dumps(list(MISTAKES))
    found, heavy = json.loads(
        subprocess.run(command, input=typed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    )
    assert heavy == []
    for (words, expected), (status, text) in zip(MISTAKES.items(), found, strict=True):
        assert status == 2 and text.startswith(f"error: {expected}"), (words, text)
        assert text.count("\n") == 1
