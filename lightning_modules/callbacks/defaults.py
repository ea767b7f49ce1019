"""The callbacks that every run of ours has, in the order in which they must be called."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_modules.callbacks.benchmark_scores import BenchmarkScores
from lightning_modules.callbacks.checkpoint import Checkpoints
from lightning_modules.callbacks.dropout_seed import DropoutSeed
from lightning_modules.callbacks.finite_check import FiniteCheck
from lightning_modules.callbacks.handoff import StageHandoff
from lightning_modules.callbacks.run_report import RunReport
from lightning_modules.callbacks.stall_watch import StallWatch


def default_callbacks(
    run_dir: Path, stage: str, config_hash: str, checkpoint_every_n_steps: int, stall_timeout_s: float
) -> list[L.Callback]:
    """Return the callbacks of a run; the Trainer also needs the plugin ``CheckpointFolders``.

    Args:
        run_dir: folder of the run.
        stage: name of the stage, such as ``stage1``.
        config_hash: hash of the resolved configuration.
        checkpoint_every_n_steps: optimiser steps between two checkpoints.
        stall_timeout_s: longest time without progress, in seconds.

    Raises:
        ValueError: a number is impossible.
    """
    return [
        StallWatch(stall_timeout_s),
        DropoutSeed(),
        RunReport(run_dir, stage),
        FiniteCheck(),
        BenchmarkScores(),
        Checkpoints(run_dir / "checkpoints", checkpoint_every_n_steps),
        StageHandoff(str(run_dir / "handoff"), stage, config_hash),
    ]
