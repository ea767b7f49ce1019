"""Curves and pictures: what a run writes to TensorBoard beside its losses."""

from __future__ import annotations

import time
from itertools import groupby
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, QuestionBatch, TextBatch

if TYPE_CHECKING:
    from lightning_modules.stage import Stage


class TrainingMonitor(L.Callback):
    """Losses, rates, gradient norm, throughput, data wait, skipped samples and sources, every few optimiser steps.

    Samples that were skipped are counted over all ranks from the start of the process on, and each is named once by the
    rank that met it. Where samples are mixed, each source's share of them and its loss per token are over all ranks and
    the steps since the last write. Values stay on the device until they are written, so it is synchronised once per
    write only.

    Args:
        every_n_steps: optimiser steps between two writes; losses and norms are averaged in between.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"monitor.every_n_steps: got {every_n_steps}, allowed: 1 or more")
        self.every_n_steps = every_n_steps
        self.batch_ended = self.window_began = self.validation_began = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self._clear()
        self.seen = self.skipped = 0
        self.named: set[str] = set()
        self.batch_ended = self.window_began = time.perf_counter()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.by_source: Tensor | None = None  # [S, 3]: sum of token losses, tokens, samples
        self.waited_s = 0.0
        self.samples = self.tokens = self.frames = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: ClipBatch, batch_idx: int
    ) -> None:
        """The batch has arrived: name what it lacks; the first one of a run is shown as the model reads it."""
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            stage: Stage = pl_module  # type: ignore[assignment]
            print(f"first sample, what is learned in brackets: {supervised_text(batch.text, 0, stage.tokenizer)}")
        self.seen += len(batch.ids)
        self.skipped += len(batch.skipped)
        for reason in batch.skipped:
            if reason not in self.named:
                self.named.add(reason)
                print(f"skipped sample {reason}")
        self.waited_s += time.perf_counter() - self.batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        """Collect, and write after every ``every_n_steps``-th optimiser step."""
        stage: Stage = pl_module  # type: ignore[assignment]
        for name, value in stage.step_log.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.samples += len(batch.ids)
        self.tokens += batch.text.input_ids.numel()
        self.frames += batch.num_frames
        self._collect_sources(stage, batch)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, stage.device)
        self.batch_ended = time.perf_counter()

    def _collect_sources(self, stage: Stage, batch: ClipBatch) -> None:
        if batch.source is None or stage.source_losses is None:
            return
        self.source_names = batch.source_names
        numbers = torch.arange(len(self.source_names), device=batch.source.device)
        samples = (batch.source == numbers[:, None]).sum(1, keepdim=True)
        collected = torch.cat([stage.source_losses, samples], dim=1)
        self.by_source = collected if self.by_source is None else self.by_source + collected

    def _write(self, trainer: L.Trainer, device: torch.device) -> None:
        seconds = time.perf_counter() - self.window_began
        values = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        for group in trainer.optimizers[0].param_groups:
            values[f"optim/lr_{group['name']}"] = group["lr"]
        per_second = {"samples": self.samples, "tokens": self.tokens, "frames": self.frames}
        values |= {f"perf/{name}_per_s": trainer.world_size * count / seconds for name, count in per_second.items()}
        values["perf/data_wait"] = self.waited_s / seconds
        counts: Any = trainer.strategy.reduce(torch.tensor([self.seen, self.skipped], device=device), reduce_op="sum")
        values |= {"data/skipped": float(counts[1]), "data/skipped_share": float(counts[1] / counts[0])}
        if self.by_source is not None:  # on all ranks or on none
            together: Any = trainer.strategy.reduce(self.by_source, reduce_op="sum")
            samples = sum(row[2] for row in together.tolist())
            for name, (loss, tokens, count) in zip(self.source_names, together.tolist(), strict=True):
                values[f"data/share_{name}"] = count / samples
                if tokens:
                    values[f"loss_by_source/{name}"] = loss / tokens
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._clear()
        self.window_began = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clocks."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the clocks."""
        self.window_began += time.perf_counter() - self.validation_began
        self.batch_ended = time.perf_counter()


class SamplePanel(L.Callback):
    """The first held-out clips as pictures, egocentric left and exocentric right, with true and generated text.

    Args:
        clips: how many.
    """

    def __init__(self, clips: int = 4) -> None:
        self.clips = clips

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: QuestionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first batch's first clips."""
        if batch_idx or not trainer.is_global_zero or not trainer.loggers:
            return
        writer: Any = getattr(trainer.loggers[0], "experiment", None)
        if not isinstance(writer, SummaryWriter):
            return
        stage: Stage = pl_module  # type: ignore[assignment]
        views = [video[: self.clips] for video in (batch.ego_video, batch.exo_video) if video is not None]
        rows = torch.cat(
            [view.permute(0, 2, 1, 3, 4).flatten(2, 3) for view in views], dim=2
        )  # [clips, S, views*T*S, 3]
        writer.add_image("held_out/clips", rows.flatten(0, 1).cpu(), trainer.global_step, dataformats="HWC")
        shown = set(batch.ids[: self.clips])
        lines = ["| clip | view | task | question | true | answer |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {batch.ids.index(o.clip)} | {o.view} | {o.task} | {o.question} | {o.answer} | {o.prediction} |"
            for o in stage.outcomes
            if o.clip in shown
        ]
        writer.add_text("held_out/answers", "\n".join(lines), trainer.global_step)


def supervised_text(text: TextBatch, row: int, tokenizer: Any) -> str:
    """A row as words, runs of supervised tokens in brackets."""
    real = text.attention_mask[row]
    ids, labels = text.input_ids[row][real].tolist(), text.labels[row][real].tolist()
    words = ["<video>" if token == VIDEO_TOKEN_ID else str(tokenizer.decode([token])) for token in ids]
    runs = groupby(zip(words, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    texts = [(supervised, " ".join(word for word, _ in run)) for supervised, run in runs]
    return " ".join(f"[{text}]" if supervised else text for supervised, text in texts)
