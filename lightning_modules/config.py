"""Experiment folders to one configuration: fragments laid over each other, then resolved once.

An experiment is a folder with ``experiment.yaml`` and any of ``stage0.yaml`` to ``stage3.yaml``. Layers, later ones
winning: everything named by ``extends`` in ``experiment.yaml`` (fragments, or other experiments with their files for
the same stage), then ``experiment.yaml``, then the stage's file, then ``key=value`` from the command line.
Interpolations are resolved after all layers, so an overridden key reaches everything that refers to it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

STAGES = ("stage0", "stage1", "stage2", "stage3")


class ConfigError(ValueError):
    """A configuration that cannot be used; one line naming file or key and the mend."""


def compose(experiment: Path, stage: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose and resolve.

    Args:
        experiment: folder of the experiment, or one complete file such as a run's ``config.yaml``.
        stage: ``stage0`` to ``stage3``; None for a complete file.
        overrides: ``key=value`` with dots between keys; values as in YAML.

    Raises:
        ConfigError: a file is missing or no YAML, an override has no ``=``, or an interpolation finds nothing.
    """
    files = [experiment] if stage is None else _layers(experiment, stage)
    merged: Any = OmegaConf.create()
    for file in files:
        layer = _load(file)
        layer.pop("extends", None)
        merged = OmegaConf.merge(merged, layer)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, e.g. trainer.max_steps=100")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: the value is no YAML ({' '.join(str(error).split())})") from None
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{files[-1]}: {_first_line(error)} (key {error.full_key})") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def single_streams(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a stage that reads x and F(x): configurations that read one of them, each with a folder of its own."""
    network = config["network"]
    if config["stage"] not in ("stage2", "stage3") or network.get("learner_reads", "both") != "both":
        return {}
    folder, found = Path(config["run_dir"]), {}
    for reads in ("ego", "mapped"):
        changed = copy.deepcopy(config) | {"run_dir": str(folder.parent / f"reads_{reads}" / folder.name)}
        changed["model"]["init_args"]["network"] = changed["network"] = {**network, "learner_reads": reads}
        changed["trainer"]["logger"] = False
        found[reads] = changed
    return found


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 over the resolved configuration, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _layers(folder: Path, stage: str) -> list[Path]:
    head = folder / "experiment.yaml"
    if not head.is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/experiment.yaml"))
        raise ConfigError(f"no experiment {folder}: no such file {head}; there are: {', '.join(known) or 'none'}")
    files: list[Path] = []
    for name in _load(head).get("extends", []):
        base = Path(os.path.normpath(folder / name))
        files += _layers(base, stage) if base.is_dir() else [base]
    own = folder / f"{stage}.yaml"
    return [*files, head, *([own] if own.is_file() else [])]


def _load(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file}: expected keys and values at the top level")
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
