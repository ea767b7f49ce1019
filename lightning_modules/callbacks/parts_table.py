"""Print which parts of the model train, and warn about parameters that get no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_modules.validation.report import markdown_table

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage


class PartsTable(L.Callback):
    """Print the number of parameters of every part and how many of them train, and write the table to TensorBoard.

    Unlike Lightning's ModelSummary it counts adapters apart from the language model, and sharded parameters
    with their whole size.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and log the table."""
        stage: Stage = pl_module  # type: ignore[assignment]
        table = parts_table(stage)
        rank_zero_only(print)(table)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("model/parts", table, trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Warn in the first step about trained parameters without a gradient."""
        if trainer.global_step:
            return
        stage: Stage = pl_module  # type: ignore[assignment]
        idle = [f"{part}.{name}" for part, name, parameter in stage.trainable() if parameter.grad is None]
        if idle:
            rank_zero_warn(f"{len(idle)} trained parameters get no gradient, e.g. {', '.join(idle[:3])}")


def parts_table(stage: Stage) -> str:
    """Return a Markdown table with a row for each part: all parameters, and trained ones."""
    rows: list[tuple[str, int, int]] = []
    for part in stage.model.parts:
        total = sum(parameter.numel() for parameter in stage.model.part(part).values())
        rows.append((part, total, total if part in stage.trained else 0))
    rows.append(("together", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    cells: Any = [[part, f"{total:,}", f"{trained:,}"] for part, total, trained in rows]
    return markdown_table([["part", "parameters", "trained"], *cells])
