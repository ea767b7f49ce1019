"""Show the progress of a stage: a bar where the output is a terminal, a line now and then in a file or in CI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lightning_modules.callbacks.throughput import TrainingMonitor

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

_REFRESH_S = 0.5


class StageProgress(ProgressBar):
    """Show one bar over the optimiser steps of a stage, with the values that ``TrainingMonitor`` wrote last.

    Everything else that is printed appears above the bar. The bar is drawn by the training thread, at most twice a
    second, and reads no tensor, so that no step waits for it. Elsewhere than in a terminal a line is printed for new
    values at most every ``interval_s`` seconds, in long runs every hundredth of the time that has passed.

    Args:
        name: of the stage, such as ``stage1``.
        interval_s: shortest time between two lines, in seconds.
    """

    def __init__(self, name: str = "steps", interval_s: float = 10.0) -> None:
        super().__init__()
        self.name, self.interval_s = name, interval_s
        self._enabled = True
        self._bar: _Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began = self._printed = self._drawn = time.monotonic()
        self._first_step = 0
        self._printed_values: Mapping[str, float] = {}

    def disable(self) -> None:
        """Show nothing; the Trainer calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the progress again."""
        self._enabled = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the bar."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the bar, so that the error is printed below it."""
        self._end()

    # ------------------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar at the step that training resumes from."""
        stage: Stage = pl_module  # type: ignore[assignment]
        self._first_step = trainer.global_step
        self._begin(self.name, stage.total_steps(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance after every optimiser step."""
        if not self._enabled or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stage: Stage = pl_module  # type: ignore[assignment]
        step, total, now = trainer.global_step, stage.total_steps(), time.monotonic()
        values = _last_values(trainer)
        if self._bar is not None:
            self._bar.status = describe(values)
            self._advance(self.name, step, step == total)
        elif step == total or (
            values
            and values is not self._printed_values
            and now - self._printed >= max(self.interval_s, (now - self._began) / 100)
        ):
            self._printed, self._printed_values = now, values
            left_s = (now - self._began) / max(1, step - self._first_step) * (total - step)
            print(f"{self.name} {step}/{total}, {_clock(left_s)} left: {describe(values)}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar."""
        self._end()

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a bar for the validation below that of the steps."""
        if trainer.state.fn != "fit":
            self._begin("validation", _total(trainer.num_val_batches))
        elif self._bar is not None:
            self._tasks["validation"] = self._bar.add_task("validation", total=_total(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        self._advance("validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar of the validation."""
        task = self._tasks.pop("validation", None)
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar of the validation questions."""
        self._begin("validation questions", _total(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        self._advance("validation questions")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar."""
        self._end()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar of a benchmark's clips."""
        self._begin("benchmark clips", _total(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance."""
        self._advance("benchmark clips")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar."""
        self._end()

    # -------------------------------------------------------------------------------------------------------- drawing

    def _begin(self, task: str, total: float | None, completed: int = 0) -> None:
        self._end()
        self._began = self._printed = time.monotonic()
        if not self._enabled or not in_terminal():
            return
        # No thread draws the bar: a loader process forked while one draws would inherit the lock of the output.
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(),
            auto_refresh=False,
        )
        self._bar.start()
        self._bar.console.show_cursor(True)  # a killed process could not bring it back
        self._tasks = {task: self._bar.add_task(task, total=total, completed=completed)}
        self._bar.refresh()

    def _advance(self, task: str, completed: int | None = None, now: bool = False) -> None:
        if self._bar is None or task not in self._tasks:
            return
        self._bar.update(self._tasks[task], completed=completed, advance=1 if completed is None else None)
        if now or time.monotonic() - self._drawn >= _REFRESH_S:
            self._bar.refresh()
            self._drawn = time.monotonic()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._tasks = None, {}


class _Bar(Progress):
    """Bars with a status line below them."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is drawn, from top to bottom."""
        yield self.make_tasks_table(self.tasks)
        if self.status:
            yield Text(self.status, style="dim")


def in_terminal() -> bool:
    """Return whether the standard output is a terminal that can redraw its last lines."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def describe(values: Mapping[str, float]) -> str:
    """Return the values of a write on one line: loss and its parts, learning rates, speed, waiting and memory.

    Args:
        values: of ``TrainingMonitor``, by name; may be empty.
    """
    if "train/loss" not in values:
        return "nothing is written yet"
    parts = {name[len("train/loss_") :]: v for name, v in values.items() if name.startswith("train/loss_")}
    terms = " + ".join(f"{name} {value:.3f}" for name, value in parts.items())
    rates = ", ".join(f"{value:.1e}" for name, value in values.items() if name.startswith("optim/lr"))
    return ", ".join(
        [
            f"loss {values['train/loss']:.3f}" + (f" = {terms}" if len(parts) > 1 else ""),
            f"lr {rates}",
            f"{values['perf/samples_per_s']:.1f} samples/s",
            f"data wait {100 * values['perf/data_wait']:.0f} %",
            f"{values['perf/peak_memory_gib']:.1f} GiB",
        ]
    )


def _last_values(trainer: L.Trainer) -> Mapping[str, float]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.written for callback in callbacks if isinstance(callback, TrainingMonitor)), {})


def _total(batches: list[int | float] | int | float) -> float | None:
    """Return the number of batches of all loaders, or None if one has no length."""
    total = float(sum(batches)) if isinstance(batches, list) else float(batches)
    return None if total == float("inf") else total


def _clock(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{round(seconds) % 60:02d}"
