"""Compose the configuration of a stage from the layers of an experiment, and resolve it once.

An experiment is a folder with ``experiment.yaml`` and any ``stage*.yaml``, such as ``stage1.yaml``. Layers, later ones
winning: everything named by ``extends`` in ``experiment.yaml`` (fragments, or other experiments with their files for
the same stage), then ``experiment.yaml``, then the stage's file, then ``key=value`` from the command line.
Interpolations are resolved after all layers, so an overridden key reaches everything that refers to it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

VISUAL_INPUTS = ("ego", "mapped")


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the file or key and how to fix it."""


@dataclass(frozen=True)
class Renamed:
    """The new name of a configuration key.

    Attributes:
        new_key: dotted key that replaces the old one; the old one itself where only values changed.
        convert: maps an old value to a new one. A value that is an interpolation is moved without conversion.
        stages: the stages in which the old key meant this, such as ``("stage2",)``; None for all stages.
    """

    new_key: str
    convert: Callable[[Any], Any] | None = None
    stages: tuple[str, ...] | None = None


def _visual_inputs(reads: str) -> list[str]:
    """Convert ``learner_reads: both``, ``ego`` or ``mapped``."""
    return ["ego", "mapped"] if reads == "both" else [reads]


def _instruction_style(level: str) -> str:
    """Convert ``prompt_level: as_written``; the other values keep their names."""
    return "raw" if level == "as_written" else level


RENAMED_KEYS: dict[str, Renamed] = {
    "data.init_args.max_skipped_share": Renamed("data.init_args.max_corrupt_fraction"),
    "network.learner_reads": Renamed("network.visual_inputs", _visual_inputs),
    "model.init_args.network.learner_reads": Renamed("model.init_args.network.visual_inputs", _visual_inputs),
    "model.init_args.words_weight": Renamed("model.init_args.bow_weight"),
    "model.init_args.kl.answer_tokens": Renamed("model.init_args.answer_tokens"),
    "data.init_args.prompt_level": Renamed("data.init_args.instruction_style", _instruction_style),
}
"""Dotted keys of earlier versions that are still accepted, with their new names.

They are renamed in every YAML file, in every ``key=value`` override and in a run's ``config.yaml``, before layers are
merged. Name a key as the file has it: a resolved ``config.yaml`` repeats the values of ``network`` and ``clips`` below
``model.init_args`` and ``data.init_args``.
"""


def compose(experiment: Path, stage: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose and resolve.

    Args:
        experiment: folder of the experiment, or one complete file such as a run's ``config.yaml``.
        stage: name of the stage, such as ``stage1``; None for a complete file.
        overrides: ``key=value`` with dots between keys; values as in YAML.

    Raises:
        ConfigError: a file is missing or no YAML, an override has no ``=``, or an interpolation finds nothing.
    """
    files = [experiment] if stage is None else _layers(experiment, f"{stage}.yaml")
    merged: Any = OmegaConf.create({} if stage is None else {"stage": stage})
    layers: list[Any] = []
    for file in files:
        layer = _load(file)
        layer.pop("extends", None)
        layers.append(_with_new_keys(layer, str(file), stage))
        merged = OmegaConf.merge(merged, layers[-1])
    layers.append(OmegaConf.create())  # all overrides together
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, e.g. trainer.max_steps=100")
        try:
            layer = OmegaConf.from_dotlist([override])
            layer = _with_new_keys(layer, f"override {override}", stage or merged.get("stage"))
            layers[-1] = OmegaConf.merge(layers[-1], layer)
            merged = OmegaConf.merge(merged, layer)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: the value is no YAML ({' '.join(str(error).split())})") from None
    _drop_replaced_encoder(merged, layers)
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{files[-1]}: {_first_line(error)} (key {error.full_key})") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _drop_replaced_encoder(merged: Any, layers: Sequence[Any]) -> None:
    """Remove the settings of a built-in encoder if a later layer replaces it by a class.

    Settings in the layer that names the class, or after it, stay: they are a mistake, which the encoder refuses.

    Args:
        merged: all layers; changed in place.
        layers: one by one.
    """
    sections = [OmegaConf.select(layer, "network.encoder") or {} for layer in layers]
    naming = [number for number, section in enumerate(sections) if section.get("type") is not None]
    encoder = OmegaConf.select(merged, "network.encoder")
    if not naming or encoder.get("type") is None:
        return
    kept = {"type", "args"}.union(*sections[naming[-1] :])
    for key in set(encoder) - kept:
        del encoder[key]


def read_saved(file: Path) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run, written by this or an earlier version.

    Raises:
        ConfigError: the file is missing or no YAML.
    """
    saved = OmegaConf.to_container(_with_new_keys(_load(file), str(file), None), resolve=False)
    assert isinstance(saved, dict)
    return {str(key): value for key, value in saved.items()}


def rename_keys(content: dict[str, Any], source: str, stage: str | None) -> dict[str, Any]:
    """Apply ``RENAMED_KEYS``, and print a line to stderr for each old key.

    Args:
        content: one layer of nested keys, before interpolation; it is not changed.
        source: file or override, for the line and for errors.
        stage: stage that the layer is used for, if known.

    Raises:
        ConfigError: the old and the new name of a key both have a value.
    """
    renamed = copy.deepcopy(content)
    for old, entry in RENAMED_KEYS.items():
        if entry.stages is not None and stage not in entry.stages:
            continue
        moved, used = old != entry.new_key, False
        if moved:
            updated = _update_references(renamed, old, entry.new_key)
            used, renamed = updated != renamed, updated
        value = _pop(renamed, old)
        if value is not _ABSENT:
            interpolated = isinstance(value, str) and "${" in value
            new_value = value if entry.convert is None or interpolated else entry.convert(value)
            if not _put(renamed, entry.new_key, new_value):
                raise ConfigError(f"{source}: {old} is the old name of {entry.new_key}: remove one of them")
            if not moved and new_value != value:
                print(f"{source}: the value {value!r} of {old} is now {new_value!r}", file=sys.stderr)
            used = used or moved
        if used:
            print(f"{source}: {old} is now called {entry.new_key}", file=sys.stderr)
    _name_answer_guidance(renamed, source)
    return renamed


def _name_answer_guidance(layer: dict[str, Any], source: str) -> None:
    """Replace ``model.init_args.kl.where: answers`` of earlier versions by the class that has this loss, in place."""
    init_args = (layer.get("model") or {}).get("init_args") or {}
    kl = init_args.get("kl")
    if not isinstance(kl, dict) or kl.get("where") != "answers":
        return
    layer["model"]["class_path"] = "lightning_modules.AnswerGuidance"
    _pop(layer, "model.init_args.kl.where")
    print(
        f"{source}: model.init_args.kl.where: answers is now model.class_path: lightning_modules.AnswerGuidance",
        file=sys.stderr,
    )


_ABSENT = object()


def _pop(content: dict[str, Any], key: str) -> Any:
    """Remove a dotted key and sections that become empty; return its value, or ``_ABSENT``."""
    first, _, rest = key.partition(".")
    if first not in content:
        return _ABSENT
    if not rest:
        return content.pop(first)
    section = content[first]
    if not isinstance(section, dict):
        return _ABSENT
    value = _pop(section, rest)
    if value is not _ABSENT and not section:
        del content[first]
    return value


def _put(content: dict[str, Any], key: str, value: Any) -> bool:
    """Set a dotted key; False if it has a value, or cannot have one because a key above it is no section."""
    *above, last = key.split(".")
    section: Any = content
    for name in above:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return False
    if last in section:
        return False
    section[last] = value
    return True


def _update_references(value: Any, old: str, new: str) -> Any:
    """Replace ``${old}`` and ``${old.below}`` in all strings."""
    if isinstance(value, dict):
        return {key: _update_references(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_update_references(item, old, new) for item in value]
    if isinstance(value, str):
        return re.sub(rf"\$\{{{re.escape(old)}(?=[.}}\[])", "${" + new, value)
    return value


def _with_new_keys(layer: DictConfig, source: str, stage: str | None) -> DictConfig:
    content: Any = OmegaConf.to_container(layer, resolve=False)
    return OmegaConf.create(rename_keys(content, source, stage or content.get("stage")))


def single_visual_inputs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for a stage that reads x and F(x), configurations that read one of them, each with its own folder."""
    network = config["network"]
    if config["stage"] in ("stage0", "stage1") or len(network.get("visual_inputs", VISUAL_INPUTS)) < 2:
        return {}
    folder, found = Path(config["run_dir"]), {}
    for reads in VISUAL_INPUTS:
        changed = copy.deepcopy(config) | {"run_dir": str(folder.parent / f"reads_{reads}" / folder.name)}
        changed["model"]["init_args"]["network"] = changed["network"] = {**network, "visual_inputs": [reads]}
        changed["trainer"]["logger"] = False
        found[reads] = changed
    return found


def config_hash(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a resolved configuration, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def stage_names(experiment: Path) -> list[str]:
    """Return the names of an experiment's stages: those of the ``stage*.yaml`` files in its layers.

    Args:
        experiment: folder of the experiment.

    Raises:
        ConfigError: there is no such experiment, or one that it extends is missing.
    """
    names = {file.stem for file in _layers(experiment, "stage*.yaml") if file.stem.startswith("stage")}
    return sorted(names, key=lambda name: (len(name), name))


def _layers(folder: Path, stage_files: str) -> list[Path]:
    """Return the files of an experiment, the winning ones last.

    Args:
        folder: the experiment's.
        stage_files: pattern of the stages' files to include, such as ``stage1.yaml``.
    """
    head = folder / "experiment.yaml"
    if not head.is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/experiment.yaml"))
        raise ConfigError(f"no experiment {folder}: no such file {head}; there are: {', '.join(known) or 'none'}")
    files: list[Path] = []
    for name in _load(head).get("extends", []):
        base = Path(os.path.normpath(folder / name))
        files += _layers(base, stage_files) if base.is_dir() else [base]
    return [*files, head, *sorted(folder.glob(stage_files))]


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
