"""docs/extending.md: a loss and a fourth stage are one file and two YAML files of the user's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lightning_modules.cli import main

EXAMPLES = Path(__file__).parent / "examples"


def fit_as_a_user(words):
    """Run a command in a process of its own, with the examples' folder on the Python path."""
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_modules", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_loss_and_a_fourth_stage(toy_world, toy_runs, tmp_path, monkeypatch):
    for stage in ("stage0", "stage1"):
        shutil.copytree(toy_runs / "toy" / stage, tmp_path / "toy" / stage)
    mine, options = tmp_path / "mine", [*tiny.OVERRIDES, f"data_root={toy_world}", f"runs={tmp_path}"]
    fit_as_a_user(["fit", str(EXAMPLES / "mine"), "stage2", *options])
    stage2 = curves(mine / "stage2")
    tags = ("1_train/loss_kl", "5_guidance/kl", "5_guidance/cosine")
    for kl, feature_kl, cosine in zip(*(stage2[tag] for tag in tags), strict=True):
        assert 0 < cosine < 2
        assert kl == pytest.approx(10 * (feature_kl + 0.2 * cosine), rel=1e-5)  # `kl.weight` of the default experiment
    monkeypatch.syspath_prepend(EXAMPLES)
    for stage in ("stage3", "stage4"):
        assert main(["fit", str(EXAMPLES / "mine"), stage, *options]) == 0
    manifest = json.loads((mine / "stage4" / "handoff" / "manifest.json").read_text())
    assert manifest["stage"] == "stage4"
    assert list(manifest["parts"]) == ["projector"]
    assert (mine / "stage4" / "metrics.json").is_file()
