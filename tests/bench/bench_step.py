"""Measure the overhead of the Trainer over a bare loop that does the same work: ``make bench-step``.

The Trainer has the callbacks that a run of one process has in every step, and writes its curves every ten steps.

Both make the same optimiser steps of stage 2 of a small network on the same batch, in turns within one process. Ratios
are medians over pairs of turns, in CPU and in wall time. The number of clips in the batch makes steps long or short.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from datamodules.batch import ClipBatch, TextBatch
from datamodules.toy_world.questions import write_tokenizer
from lightning_modules import DemonstratorLearnerGuidance
from lightning_modules.callbacks.checkpoint import CheckpointFolders, Checkpoints
from lightning_modules.callbacks.progress import StageProgress
from lightning_modules.callbacks.sample_panel import SamplePanel
from lightning_modules.callbacks.stall_watch import StallWatch
from lightning_modules.callbacks.throughput import TrainingMonitor


def batch_of(clips: int) -> ClipBatch:
    """Return one batch that is already read, so that reading costs neither side anything."""
    one = tiny.clip_batch()
    times = (clips + 1) // 2
    fields = (one.text.input_ids, one.text.attention_mask, one.text.labels)
    text = TextBatch(*(field.repeat(times, 1)[:clips] for field in fields))
    return ClipBatch([str(i) for i in range(clips)], text, 5.0, tiny.video(clips, 0), tiny.video(clips, 1))


class Turns(L.Callback):
    """Measure the time of the Trainer's steps between the first and the last batch end of a turn."""

    def __init__(self, turn: int) -> None:
        self.turn, self.taken = turn, []
        self.began = (0.0, 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Take a measurement every ``turn`` steps; the bare loop takes its turn outside of the measured time."""
        if trainer.global_step % self.turn == 0:
            now = time.process_time(), time.perf_counter()
            if self.began[1]:
                self.taken.append([(end - begin) / self.turn for begin, end in zip(self.began, now, strict=True)])
            self.between()
            self.began = time.process_time(), time.perf_counter()

    def between(self) -> None:
        """Run between two turns."""


class Bare:
    """The same stage, batches, losses, clipping, optimiser and schedule, without a Trainer."""

    def __init__(self, stage: DemonstratorLearnerGuidance, batch: ClipBatch) -> None:
        self.stage, self.batch = stage, batch
        stage.configure_model()
        stage.train()
        self.parameters = [parameter for _, _, parameter in stage.trainable()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def steps(self, count: int) -> list[float]:
        """Make ``count`` steps and return CPU and wall seconds per step."""
        began = time.process_time(), time.perf_counter()
        for _ in range(count):
            torch.stack(list(self.stage.losses(self.batch).values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.stage.standardizer.update()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        ended = time.process_time(), time.perf_counter()
        return [(end - begin) / count for begin, end in zip(began, ended, strict=True)]


def measure(tokenizer: Path, clips: int, turn: int, turns: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return seconds per step of the bare loop and of the Trainer, CPU and wall, for each turn."""
    batch = batch_of(clips)
    bare = Bare(tiny.make_stage("stage2", tokenizer, learning_rate=1e-5), batch)
    loop: list[list[float]] = []
    clock = Turns(turn)
    clock.between = lambda: loop.append(bare.steps(turn))  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=turn * (turns + 2),
            gradient_clip_val=1.0,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=[
                StallWatch(600.0),
                Checkpoints(Path(folder) / "checkpoints", 0),
                StageProgress(),
                TrainingMonitor(every_n_steps=10),
                SamplePanel(),
                clock,
            ],
            plugins=[CheckpointFolders()],
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        stage = tiny.make_stage("stage2", tokenizer, learning_rate=1e-5)
        trainer.fit(stage, DataLoader([batch] * (turn * (turns + 2)), batch_size=None))
    return loop[1 : turns + 1], clock.taken[-turns:]


def clips_for(tokenizer: Path, target_s: float) -> int:
    """Return the number of clips in a batch whose step takes about ``target_s`` seconds."""
    few, many = 2, 64
    bare = {clips: Bare(tiny.make_stage("stage2", tokenizer), batch_of(clips)) for clips in (few, many)}
    seconds = [min(bare[clips].steps(3)[0] for _ in range(3)) for clips in (few, many)]
    slope = (seconds[1] - seconds[0]) / (many - few)
    return max(2, round(few + (target_s - seconds[0]) / slope))


def run() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="overhead of the Trainer over a bare loop")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name))
        print("| bare step, CPU ms | with the Trainer | ratio of CPU time | ratio of wall time | more, CPU ms |")
        print("|---:|---:|---:|---:|---:|")
        for target_s, turn in ((0.01, 50), (0.03, 30), (0.1, 10), (0.3, 10)):
            loop, trainer = measure(Path(name), clips_for(Path(name), target_s), turn, options.turns)
            pairs = list(zip(loop, trainer, strict=True))
            bare, ours = (1000 * statistics.median(side[0] for side in sides) for sides in (loop, trainer))
            cpu, wall = (statistics.median(t[clock] / b[clock] for b, t in pairs) for clock in (0, 1))
            print(f"| {bare:.1f} | {ours:.1f} | {cpu:.3f} | {wall:.3f} | {ours - bare:.2f} |", flush=True)


if __name__ == "__main__":
    run()
