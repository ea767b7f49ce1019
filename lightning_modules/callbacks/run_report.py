"""Print what a run is about to do, and its validation scores as they come."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.callbacks.tensorboard import write_layout
from lightning_modules.validation.report import VIEWS, markdown_table

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage


class RunReport(L.Callback):
    """Print a banner when training starts, and a line of scores after each validation.

    The banner has the number of parameters of every part and how many of them train, the steps, the data, the devices
    and the folder. Unlike Lightning's ModelSummary it counts adapters apart from the language model, and sharded
    parameters with their whole size. It also warns about trained parameters that get no gradient.

    Args:
        run_dir: folder of the run.
        name: name of the stage, such as ``stage1``.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.run_dir, self.name = run_dir, name

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the banner, and write its table to TensorBoard."""
        if not trainer.is_global_zero:
            return
        stage: Stage = pl_module  # type: ignore[assignment]
        table = parts_table(stage)
        print("\n".join(["", *self._title(stage), table, *self._facts(trainer, stage), ""]))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("model/parts", table, trainer.global_step)
                write_layout(logger.experiment)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Warn in the first step of all losses about trained parameters without a gradient."""
        stage: Stage = pl_module  # type: ignore[assignment]
        if trainer.global_step != stage.partial_steps:
            return
        idle = [f"{part}.{name}" for part, name, parameter in stage.trainable() if parameter.grad is None]
        if idle:
            rank_zero_warn(f"{len(idle)} trained parameters get no gradient, e.g. {', '.join(idle[:3])}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the scores."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        scores = {k[len("val/") :]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if scores:
            print(f"{self.name} step {trainer.global_step}, validation: {score_line(scores)}")

    def _title(self, stage: Stage) -> list[str]:
        summary = (inspect.getdoc(type(stage)) or "").partition("\n")[0]
        return [f"==== {self.name}: {type(stage).__name__} ====", *([summary] if summary else [])]

    def _facts(self, trainer: L.Trainer, stage: Stage) -> list[str]:
        """Return lines about steps, data, devices and files."""
        total, done = stage.total_steps(), trainer.global_step
        steps = f"steps    {total:,}" + (f", {done:,} are done" if done else "")
        devices = (
            f"devices  {trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}, "
            f"{type(trainer.strategy).__name__}"
        )
        files = f"files    {self.run_dir}, curves: make tensorboard"
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "global_batch_size"):
            return [steps, devices, files]
        world, accumulated = trainer.world_size, trainer.accumulate_grad_batches
        steps += f"; {data.steps_per_epoch():,} an epoch, with {data.global_batch_size} samples each"
        if world * accumulated > 1:
            micro_batch = data.global_batch_size // (world * accumulated)
            steps += f" ({world} processes x {accumulated} micro-batches of {micro_batch})"
        samples = f"data     {data.root}, {data.train_set.epoch_length:,} samples an epoch"
        if data.held_out is not None:
            samples += f", validation questions {data.held_out}"
        return [steps, samples, devices, files]


def parts_table(stage: Stage) -> str:
    """Return a Markdown table with a row for each part: all parameters, and trained ones."""
    rows: list[tuple[str, int, int]] = []
    for part in stage.model.parts:
        total = stage.model.count(part)
        rows.append((part, total, total if part in stage.trained else 0))
    rows.append(("together", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    cells: Any = [[part, f"{total:,}", f"{trained:,}"] for part, total, trained in rows]
    return markdown_table([["part", "parameters", "trained"], *cells])


def score_line(scores: Mapping[str, float]) -> str:
    """Describe validation scores on one line: those of all questions of a kind, and of benchmarks.

    Args:
        scores: by name, such as ``ego_choice``; those of parts of an answer (``ego_caption_verb``) are left out.
    """
    groups: dict[str, list[str]] = {}
    for name, value in scores.items():
        view, _, score = name.partition("_")
        if view not in VIEWS:
            groups.setdefault("benchmarks", []).append(f"{name} {100 * value:.1f} %")
        elif score == "loss":
            groups.setdefault(VIEWS[view], []).append(f"loss {value:.3f}")
        elif "_" not in score:
            groups.setdefault(VIEWS[view], []).append(f"{score} {100 * value:.1f} %")
    return "; ".join(f"{group} {', '.join(found)}" for group, found in groups.items())
