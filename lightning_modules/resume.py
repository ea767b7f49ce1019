"""Decide whether a run in a folder may be resumed, and remove it when it is started from scratch."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.config import ConfigError, compose
from lightning_modules.run import complete
from lightning_modules.weights.handoff import read_manifest

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

RESUMABLE_KEYS = (
    "checkpoint_every_n_steps",
    "data.init_args.decode_timeout_s",
    "data.init_args.max_corrupt_fraction",
    "data.init_args.micro_batch_size",
    "data.init_args.num_workers",
    "data.init_args.pad_to_multiple_of",
    "egobench",
    "judge",
    "model.init_args.activation_checkpointing",
    "model.init_args.compile_blocks",
    "monitor",
    "panel",
    "plan",
    "stall_timeout_s",
    "threads",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.max_time",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)
"""Keys that may differ when a run is resumed: the result does not depend on them, except for rounding and dropout."""

SPLIT_KEYS = (
    "data.init_args.micro_batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
)
"""Those of ``RESUMABLE_KEYS`` that split a global batch, on which the contrastive loss depends."""


def check_resumable(folder: Path, config: dict[str, Any], state: str) -> None:
    """Compare the configuration of the run in a folder with the present one.

    Args:
        folder: the run's folder.
        config: the present resolved configuration. Defaults count as written down, in both.
        state: ``finished`` or ``interrupted``, for the message.

    Raises:
        ConfigError: a key outside ``RESUMABLE_KEYS`` differs, or one of ``SPLIT_KEYS`` with a contrastive loss.
    """
    file = folder / "config.yaml"
    before = compose(file, None) if file.is_file() else {}
    if before == config:
        return
    with suppress(ConfigError):  # a class of the earlier run may be gone: then defaults do not count
        before, config = complete(before), complete(config)
    old, new = _flatten(before), _flatten(config)
    contrastive = json.loads(new.get("model.init_args.contrastive.weight", "0"))
    free = tuple(f"{key}." for key in RESUMABLE_KEYS if not (contrastive and key in SPLIT_KEYS))
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not f"{key}.".startswith(free)
    ]
    if changed:
        shown = ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:3])
        more = ", ..." if len(changed) > 3 else ""
        raise ConfigError(
            f"{folder}: contains a run {state} with a different configuration ({shown}{more}): "
            f"pass FORCE=1 to train from scratch, or keep both with another folder, run_dir={folder}_2"
        )


def check_same_start(folder: Path, stage: Stage) -> None:
    """Compare the weights that a finished stage started from with those that are there now.

    Raises:
        ConfigError: the stage's weights were trained from others.
    """
    started_from = read_manifest(folder / "handoff")["started_from"]
    changed = sorted(part for part, start in stage.started_from().items() if started_from.get(part) != start)
    if changed:
        raise ConfigError(
            f"{folder}: was trained from a different {', '.join(changed)} than {stage.sources[changed[0]].where} "
            "contains: pass FORCE=1 to train from scratch"
        )


def discard_run(folder: Path) -> None:
    """Remove checkpoints, answers and curves of a run; its stage weights are kept as ``handoff.previous``."""
    for name in ("checkpoints", "egobench", "scores", "metrics.json", "predictions.jsonl", "consistency.jsonl"):
        _remove(folder / name)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    previous = folder / "handoff.previous"
    if (folder / "handoff").exists():
        _remove(previous)
        previous.unlink(missing_ok=True)  # a link whose folder was emptied
        (folder / "handoff").rename(previous)


def _remove(path: Path) -> None:
    """Remove a file or folder; of a link to a folder, such as one on another disk, empty that folder."""
    if path.is_symlink() and path.is_dir():
        for inside in path.iterdir():
            if inside.is_symlink():
                inside.unlink()
            else:
                _remove(inside)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return every leaf as JSON by its dotted key."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves
