"""Write the first validation clips to TensorBoard as images, with correct and generated answers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.tensorboard.writer import SummaryWriter

from datamodules.batch import BenchmarkBatch, QuestionBatch
from lightning_modules.validation.scores import Prediction


class SamplePanel(L.Callback):
    """Write the frames of the first validation clips, egocentric left and exocentric right, and a table of answers.

    Args:
        clips: number of clips.
    """

    def __init__(self, clips: int = 4) -> None:
        self.clips = clips

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: QuestionBatch | list[BenchmarkBatch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first clips of the first batch."""
        if batch_idx or not isinstance(batch, QuestionBatch) or not trainer.is_global_zero or not trainer.loggers:
            return
        writer: Any = getattr(trainer.loggers[0], "experiment", None)
        if not isinstance(writer, SummaryWriter):
            return

        # Lay the frames of a clip out in a row, views next to each other and clips below each other.
        views = [video[: self.clips] for video in (batch.ego_video, batch.exo_video) if video is not None]
        rows = [view.permute(0, 2, 1, 3, 4).flatten(2, 3) for view in views]  # [clips, S, T * S, 3] each
        image = torch.cat(rows, dim=2).flatten(0, 1).cpu()
        writer.add_image("validation/clips", image, trainer.global_step, dataformats="HWC")

        lines = ["| clip | view | task | question | correct | generated |", "|---|---|---|---|---|---|"]
        predictions: list[Prediction] = outputs["predictions"]
        for p in predictions:
            row = batch.ids.index(p.clip)
            if row < self.clips:
                lines.append(f"| {row} | {p.view} | {p.task} | {p.question} | {p.answer} | {p.prediction} |")
        writer.add_text("validation/answers", "\n".join(lines), trainer.global_step)
