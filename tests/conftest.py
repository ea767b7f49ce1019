"""Fixtures shared by several test files."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from datamodules.toy_world.questions import write_tokenizer
from datamodules.toy_world.release import Settings, generate


@pytest.fixture(scope="session")
def toy_settings():
    """Return the settings of a world small enough for tests; its nine training takes contain every planted defect."""
    counts = {"train_takes": 9, "val_takes": 2, "initialisation_takes": 6, "practice_takes": 4, "benchmark_takes": 8}
    return Settings(**counts, frame_counter=True)


@pytest.fixture(scope="session")
def toy_world(toy_settings, tmp_path_factory):
    """Generate the world once per session and return its folder: read it, or change a copy of it."""
    root = tmp_path_factory.mktemp("data") / "toy"
    generate(root, toy_settings, workers=2)
    return root


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory):
    """Write the tokenizer of the generated world, without the world, and return its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def toy_runs(toy_world, tmp_path_factory):
    """Train all four stages of ``toy`` for two steps each, and return the folder of runs: read it, or change a copy."""
    import tiny

    from lightning_modules.cli import main

    runs = tmp_path_factory.mktemp("runs")
    experiment = str(tiny.EXPERIMENTS / "toy")
    for stage in tiny.STAGES:
        assert main(["fit", experiment, stage, *tiny.OVERRIDES, f"data_root={toy_world}", f"runs={runs}"]) == 0
    return runs


@pytest.fixture(scope="session")
def noisy_runs(toy_runs, tmp_path_factory):
    """Copy ``toy_runs`` with noise on stages 0 and 3, since two steps of training leave a model that answers nothing.

    Both stages are evaluated again.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from lightning_modules.cli import main
    from lightning_modules.weights import handoff

    copy = shutil.copytree(toy_runs, tmp_path_factory.mktemp("noisy") / "runs")
    generator = torch.Generator().manual_seed(0)
    for folder in (copy / "toy" / "stage0" / "handoff", copy / "toy" / "stage3" / "handoff"):
        for file in folder.rglob("*.safetensors"):
            if file.parent.name != "frozen":
                noise = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
                save_file(noise, file)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["digest"] = handoff._digest(folder, time.time_ns())
        (folder / "manifest.json").write_text(json.dumps(manifest))
    for stage in ("stage0", "stage3"):
        assert main(["evaluate", str(toy_runs / "toy" / stage / "config.yaml"), f"run_dir={copy}/toy/{stage}"]) == 0
    return copy
