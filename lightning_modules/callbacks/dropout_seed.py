"""Seed dropout by step, so that a resumed run draws the same numbers as an uninterrupted one."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_modules.compat import micro_batches_done


class DropoutSeed(L.Callback):
    """Seed the generator of the training device from (seed, micro-batch, rank) before every training step."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed with the stage's own ``seed``."""
        device, seed = pl_module.device, int(pl_module.seed)  # type: ignore[arg-type]
        on_gpu = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
        generator.manual_seed(seed + 1_000_003 * micro_batches_done(trainer) + trainer.global_rank)
