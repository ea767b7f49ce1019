"""docs/extending.md: a loss and a fourth stage are one file and two YAML files of the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lightning_modules.cli import main

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture(scope="module")
def arguments(toy_world, tmp_path_factory):
    runs = tmp_path_factory.mktemp("loss") / "runs"
    options = [*tiny.OVERRIDES, f"data_root={toy_world}", f"runs={runs}"]
    for stage in ("stage0", "stage1"):
        assert main(["fit", str(tiny.EXPERIMENTS / "toy"), stage, *options]) == 0
    return options


def fit(stage, options):
    """Train a stage of the example experiment as a user does, with the examples' folder on the Python path."""
    command = [sys.executable, "-m", "lightning_modules", "fit", str(EXAMPLES / "mine"), stage, *options]
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    runs = Path(next(option for option in options if option.startswith("runs=")).removeprefix("runs="))
    return runs / "mine" / stage


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_loss_and_a_fourth_stage(arguments):
    stage2 = curves(fit("stage2", arguments))
    tags = ("1_train/loss_kl", "5_guidance/kl", "5_guidance/cosine")
    for kl, feature_kl, cosine in zip(*(stage2[tag] for tag in tags), strict=True):
        assert 0 < cosine < 2
        assert kl == pytest.approx(feature_kl + 0.2 * cosine, rel=1e-5)
    fit("stage3", arguments)
    stage4 = fit("stage4", arguments)
    manifest = json.loads((stage4 / "handoff" / "manifest.json").read_text())
    assert manifest["stage"] == "stage4"
    assert list(manifest["parts"]) == ["projector"]
    assert (stage4 / "metrics.json").is_file()
