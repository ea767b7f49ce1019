"""Starting runs on clusters: torchrun, and SLURM with the example script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lightning_modules.signals import STOPPED
from lightning_modules.weights.handoff import read_manifest

SCRIPT = tiny.EXPERIMENTS / "hardware" / "slurm.sh"
ROOT = tiny.EXPERIMENTS.parent


@pytest.mark.parametrize(("status", "requeued"), [(0, []), (2, []), (STOPPED, ["requeue 7"])])
def test_the_slurm_script_requeues_a_stage_that_was_asked_to_stop(tmp_path, status, requeued):
    """srun and scontrol are small scripts that note how they were called."""
    for name, end in (("srun", f"exit {status}"), ("scontrol", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.txt\n{end}\n')
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | given
    run = subprocess.run(["bash", SCRIPT, "exo2ego_7b", "stage2", "seed_everything=3"], env=environment, check=False)
    assert run.returncode == status
    (called,) = (tmp_path / "srun.txt").read_text().splitlines()
    assert called.endswith(
        "-m lightning_modules fit experiments/exo2ego_7b stage2 trainer.num_nodes=2 trainer.devices=8 seed_everything=3"
    )
    noted = tmp_path / "scontrol.txt"
    assert (noted.read_text().splitlines() if noted.exists() else []) == requeued


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_starts_a_stage(toy_world, tmp_path, strategy):
    options = [f"data_root={toy_world}", f"runs={tmp_path}", "trainer.devices=2", f"trainer.strategy={strategy}"]
    words = ["-m", "lightning_modules", "fit", str(tiny.EXPERIMENTS / "toy"), "stage0", *tiny.OVERRIDES, *options]
    torchrun = Path(sys.executable).with_name("torchrun")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [torchrun, "--standalone", "--nproc-per-node=2", *words]
    subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert read_manifest(tmp_path / "toy" / "stage0" / "handoff")["step"] == 2
    assert (tmp_path / "toy" / "results.md").is_file()
