"""Arrange runs in TensorBoard: groups of curves in order, a page of key curves, final scores with their settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from lightning_modules.validation.report import GROUPS as TASKS
from lightning_modules.validation.report import consistency_table, score_table

GROUPS = ("train", "val", "final", "eval", "guidance", "optim", "perf", "data")
"""Groups of curves in the order of TensorBoard's pages, which sort by name."""
_CHARTS = {
    "losses": r"train/loss",
    "validation, egocentric": r"val/ego_(caption|choice|qa)$",
    "validation, exocentric": r"val/exo_(caption|choice|qa)$",
    "validation loss": r"val/(ego|exo)_loss",
    "KL(y || F(x)), and its bars": r"guidance/kl",
    "change by F and G": r"guidance/mapping_change",
    "cycle consistency": r"guidance/cycle",
    "learning rate": r"optim/lr",
    "norm of the gradients": r"optim/grad_norm",
    "samples per second": r"perf/samples_per_s",
    "share of time waiting for data": r"perf/data_wait$",
}
_NOT_SETTINGS = ("handoffs", "judge", "plan", "run_dir", "runs", "trainer.logger")
"""Keys that say where and how a run is kept, not how it is trained."""


class StageLogger(TensorBoardLogger):
    """A ``TensorBoardLogger`` whose groups of curves appear in the order of ``GROUPS``: ``1_train/loss``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Write values under numbered tags."""
        super().log_metrics({numbered(name): value for name, value in metrics.items()}, step)


def numbered(name: str) -> str:
    """Return a curve's tag, with the number of its group in front; other names are left alone."""
    group = name.partition("/")[0]
    return f"{GROUPS.index(group) + 1}_{name}" if group in GROUPS else name


def write_layout(writer: SummaryWriter) -> None:
    """Define the page "Custom scalars": the key curves of all stages."""
    charts = {title: ["Multiline", [rf"(\d_)?{tags}"]] for title, tags in _CHARTS.items()}
    writer.add_custom_scalars({"stages": charts})


def write_image(writer: Any, name: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
    """Write an image that is encoded already; TensorBoard shows an animated GIF as one.

    Args:
        writer: the run's ``SummaryWriter``.
        name: of the image.
        encoded: content of a GIF, PNG or JPEG file.
        size: width and height in pixels.
        step: optimiser step.
    """
    width, height = size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=numbered(name), image=image)]), step)


def write_final_scores(
    logger: TensorBoardLogger,
    config: Mapping[str, Any],
    scores: Mapping[str, tuple[float, int]],
    chance: Mapping[str, float],
    consistency: Mapping[str, Mapping[str, float]],
    step: int,
) -> None:
    """Write the scores of all validation questions, and the settings of the run, so that runs can be sorted by both.

    Of the consistency, the shares of questions with the same answer from every visual input, and with a right one from
    each of them, are scores; all of its numbers are in a table.

    They are a run of their own in TensorBoard, ``<run>/scores``, whose earlier content is replaced. The page
    "HParams" then has a column for each setting and each score, and no other curves.

    Args:
        logger: of the run.
        config: resolved configuration.
        scores: mean and number of answers of each score, by name.
        chance: the best score that ignores the clips, by name without the view.
        consistency: see ``validation.consistency.shares``; empty for stages without a learner.
        step: optimiser steps of the run.
    """
    folder = Path(logger.log_dir) / "scores"
    shutil.rmtree(folder, ignore_errors=True)
    writer: Any
    with SummaryWriter(str(folder)) as writer:
        # Without torch's summary of the experiment, whose columns are those of the first run, TensorBoard joins the
        # settings of all runs.
        _, start, end = hparams(settings(config), {})
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(end)
        for name, (mean, _) in scores.items():
            writer.add_scalar(numbered(f"final/{name}"), mean, step)
        writer.add_text("final/scores", score_table(scores, chance), step)
        for task in [task for task in TASKS if task in consistency]:
            for name in ("same", "right"):
                writer.add_scalar(numbered(f"final/consistency_{task}_{name}"), consistency[task][name], step)
        if consistency:
            content = {"chance": chance, "consistency": consistency}
            writer.add_text("final/consistency", consistency_table({str(config["stage"]): content}), step)


def settings(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the configuration as numbers and texts by dotted key.

    Arguments of the stage or of the data that repeat a shared key, such as ``network``, are left out.
    """
    found = {key: value for key, value in _flat(config) if not f"{key}.".startswith(_dotted(_NOT_SETTINGS))}
    for key in list(found):
        shared = key.removeprefix("model.init_args.").removeprefix("data.init_args.")
        if shared != key and found.get(shared, not found[key]) == found[key]:
            del found[key]
    return found


def _dotted(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{key}." for key in keys)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, bool | float | str]]:
    leaves: list[tuple[str, bool | float | str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves += _flat(value, f"{prefix}{key}.")
        else:
            plain = value if isinstance(value, bool | int | float | str) else json.dumps(value)
            leaves.append((f"{prefix}{key}", plain))
    return leaves
