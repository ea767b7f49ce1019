"""Write the curves of a training run: losses, learning rates, throughput, memory, corrupt samples and sources.

Nothing is written that is the same in every write or on every curve: rates that parts share are one curve, ranks are
compared only if there are several, and corrupt samples appear once there is one.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, TextBatch

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage


class TrainingMonitor(L.Callback):
    """Log losses, learning rates, gradient norm, throughput, memory, corrupt samples and sources, and print a summary.

    Losses are averaged over steps and ranks. Corrupt samples are counted over all ranks from the start of the process,
    and each is printed once by its rank. If samples are mixed, the fraction and the loss per token of each source are
    over all ranks and the steps since the last write. Values stay on the device: one synchronisation and one reduction
    over ranks for each write, while Lightning's ThroughputMonitor synchronises a GPU in every batch and neither it nor
    LearningRateMonitor averages over steps and ranks.

    Args:
        every_n_steps: optimiser steps between two writes; losses and norms are averaged in between.

    Attributes:
        written: the values of the last write by name, for the progress bar; empty before the first one.
        flops: useful operations of one sample of the stage, forward and backward; None if MFU is not logged.
        peak_flops: peak operations of a device in a second.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"monitor.every_n_steps: got {every_n_steps}, allowed: 1 or more")
        self.every_n_steps = every_n_steps
        self.written: dict[str, float] = {}
        self.flops: int | None = None
        self.peak_flops = 0.0
        self.made = self.batch_ended = self.window_began = self.validation_began = time.perf_counter()
        self.windows: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks; print time and memory that the start took."""
        self._clear()
        self.seen = self.corrupt = 0
        self.named: set[str] = set()
        self.source_names: tuple[str, ...] = ()
        self.batch_ended = self.window_began = time.perf_counter()
        ready = self.window_began - self.made, _host_gib()
        seconds, host_gib = self._of_all_ranks(trainer, ready).amax(0).tolist()
        if trainer.is_global_zero:
            print(f"ready {seconds:.1f} s after reading the configuration, with at most {host_gib:.1f} GiB a process")

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.by_source: Tensor | None = None  # [S, 3]: sum of token losses, tokens, samples
        self.waited_s = 0.0
        self.samples = self.tokens = self.frames = self.steps = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: ClipBatch, batch_idx: int
    ) -> None:
        """Print corrupt samples of the batch, and the text of the first sample of a run as the model reads it."""
        stage: Stage = pl_module  # type: ignore[assignment]
        stage.measures = (trainer.global_step + 1) % self.every_n_steps == 0
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            print(f"first sample, supervised tokens in brackets: {supervised_text(batch.text, 0, stage.tokenizer)}")
        self.seen += len(batch.ids)
        self.corrupt += len(batch.corrupt)
        for reason in batch.corrupt:
            if reason not in self.named:
                self.named.add(reason)
                print(f"corrupt sample {reason}")
        self.waited_s += time.perf_counter() - self.batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: ClipBatch, batch_idx: int
    ) -> None:
        """Collect values, and write them after every ``every_n_steps``-th optimiser step."""
        stage: Stage = pl_module  # type: ignore[assignment]
        for name, value in stage.step_log.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.samples += len(batch.ids)
        self.tokens += batch.text.input_ids.numel()
        self.frames += batch.num_frames
        self._collect_sources(stage, batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps += 1
            if trainer.global_step % self.every_n_steps == 0:
                self._write(trainer)
        self.batch_ended = time.perf_counter()

    def _collect_sources(self, stage: Stage, batch: ClipBatch) -> None:
        if batch.source is None or stage.source_losses is None:
            return
        self.source_names = batch.source_names
        numbers = torch.arange(len(self.source_names), device=batch.source.device)
        samples = (batch.source == numbers[:, None]).sum(1, keepdim=True)
        collected = torch.cat([stage.source_losses, samples], dim=1)
        self.by_source = collected if self.by_source is None else self.by_source + collected

    def _write(self, trainer: L.Trainer) -> None:
        names = list(self.sums)
        means = torch.stack([self.sums[name].float() / self.counts[name] for name in names]).tolist()
        of_sources = [] if self.by_source is None else self.by_source.flatten().tolist()
        seconds = time.perf_counter() - self.window_began
        counted = (self.samples, self.tokens, self.frames, self.seen, self.corrupt)
        busy_ms = 1000 * (seconds - self.waited_s) / self.steps
        clocks = (busy_ms, self.waited_s / seconds, _peak_gib(trainer.strategy.root_device))
        kinds = (means, of_sources, counted, clocks)
        ranks = self._of_all_ranks(trainer, tuple(chain(*kinds))).split([len(kind) for kind in kinds], dim=1)
        values = dict(zip(names, ranks[0].mean(0).tolist(), strict=True))
        sources = ranks[1].sum(0).view(-1, 3)
        samples, tokens, frames, seen, corrupt = ranks[2].sum(0).tolist()
        busy, waiting, memory = ranks[3].unbind(1)
        speed = {
            "perf/samples_per_s": samples / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/frames_per_s": frames / seconds,
            "perf/step_ms": 1000 * seconds / self.steps,
            "perf/data_wait": float(waiting.mean()),
            "perf/peak_memory_gib": float(memory.max()),
        }
        if trainer.world_size > 1:
            speed["perf/busy_ms_spread"] = float(busy.max() - busy.min())
            speed["perf/data_wait_worst_rank"] = float(waiting.max())
        if self.flops is not None:
            speed["perf/mfu"] = speed["perf/samples_per_s"] * self.flops / (trainer.world_size * self.peak_flops)
        self.windows.append(speed)
        values |= learning_rates(trainer.optimizers[0]) | speed
        if corrupt:
            values |= {"data/corrupt": corrupt, "data/corrupt_fraction": corrupt / seen}
        for name, (loss, label_tokens, count) in zip(self.source_names, sources.tolist(), strict=True):
            values[f"data/share_{name}"] = count / samples
            if label_tokens:
                values[f"data/loss_{name}"] = loss / label_tokens
        self.written = values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._clear()
        self.window_began = time.perf_counter()

    def _of_all_ranks(self, trainer: L.Trainer, values: Sequence[float]) -> Tensor:
        """Return the values of all ranks, float64 [ranks, values]."""
        table = torch.zeros(trainer.world_size, len(values), dtype=torch.float64, device=trainer.strategy.root_device)
        table[trainer.global_rank] = torch.tensor(values, dtype=torch.float64)
        reduced: Any = trainer.strategy.reduce(table, reduce_op="sum")
        return torch.as_tensor(reduced).cpu()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the peak memory, medians without the first window, in which caches and allocators fill, and remarks."""
        stage: Stage = pl_module  # type: ignore[assignment]
        stage.measures = False
        windows = self.windows[1:] or self.windows
        if trainer.is_global_zero and windows:
            median = {name: statistics.median(window[name] for window in windows) for name in windows[0]}
            mfu = f", MFU {100 * median['perf/mfu']:.1f} %" if "perf/mfu" in median else ""
            spread = worst = ""
            if trainer.world_size > 1:
                spread = f" (without waiting for data, ranks differ by {median['perf/busy_ms_spread']:.0f})"
                worst = f" (worst rank {100 * median['perf/data_wait_worst_rank']:.0f} %)"
            print(
                f"{trainer.global_step} steps: {median['perf/step_ms']:.0f} ms a step{spread}, "
                f"{median['perf/samples_per_s']:.1f} samples/s{mfu}, "
                f"{100 * median['perf/data_wait']:.0f} % of the time waiting for data{worst}, "
                f"peak memory {self.windows[-1]['perf/peak_memory_gib']:.1f} GiB"
            )
            for remark in stage.remarks(self.written):
                print(f"note: {remark}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clocks during validation."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks again."""
        self.window_began += time.perf_counter() - self.validation_began
        self.batch_ended = time.perf_counter()


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates for the curves: one for all groups that share a schedule.

    Returns:
        ``optim/lr`` if all share one; else one for each, as ``optim/lr_<part>`` of the first part that has it.
    """
    rates: dict[float, tuple[str, float]] = {}
    for group in optimizer.param_groups:
        peak = group.get("initial_lr", group["lr"])
        rates.setdefault(peak, (f"optim/lr_{group['name'].removesuffix('_vectors')}", group["lr"]))
    if len(rates) == 1:
        return {"optim/lr": optimizer.param_groups[0]["lr"]}
    return dict(rates.values())


def _host_gib() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on a GPU, or of the process if it computes on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else _host_gib()


def supervised_text(text: TextBatch, row: int, tokenizer: Any) -> str:
    """Return a row as text with runs of supervised tokens in brackets."""
    real = text.attention_mask[row]
    ids, labels = text.input_ids[row][real].tolist(), text.labels[row][real].tolist()
    words = ["<video>" if token == VIDEO_TOKEN_ID else str(tokenizer.decode([token])) for token in ids]
    runs = groupby(zip(words, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    texts = [(supervised, " ".join(word for word, _ in run)) for supervised, run in runs]
    return " ".join(f"[{text}]" if supervised else text for supervised, text in texts)
