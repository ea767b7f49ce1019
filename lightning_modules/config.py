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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_modules.layers import (
    DELETE,
    ConfigError,
    Layer,
    dump_yaml,
    load_yaml,
    merge,
    parse_override,
    refers_to,
    resolve,
)

__all__ = [
    "RENAMED_KEYS",
    "Composition",
    "ConfigError",
    "Renamed",
    "compose",
    "config_hash",
    "read_layers",
    "stage_names",
]

LAYERS_FILE = "layers.yaml"
"""Name of the file with the layers of a run's ``config.yaml``, in the same folder."""

INTERPOLATED_KEYS = (
    "experiment",
    "stage",
    "runs",
    "run_dir",
    "handoffs",
    "start",
    "weights",
    "data_root",
    "tokenizer",
    "seed_everything",
    "network",
    "clips",
)
"""Top-level keys that the experiments of this repository interpolate into others."""

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs", DELETE)
_LAYERS_HEAD = """\
# The layers that config.yaml was composed of, the winning ones last, before interpolations were resolved. Overrides of
# config.yaml are applied to them, so that they reach every key. If you edit config.yaml, it is used as it is instead.
"""


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


@dataclass(frozen=True)
class Composition:
    """The layers of a stage's configuration before they are merged.

    Attributes:
        stage: name of the stage; None for a complete file without layers.
        layers: content of the files, the winning ones last.
        overrides: ``key=value`` and ``~key`` of the command line, which win over all files.
    """

    stage: str | None
    layers: tuple[Layer, ...]
    overrides: tuple[str, ...]

    def resolve(self) -> dict[str, Any]:
        """Merge the layers and replace interpolations by values.

        Raises:
            ConfigError: an override is invalid, or would not reach the keys that depend on it, or an interpolation
                finds nothing.
        """
        layers = list(self.layers)
        if self.stage is not None:
            layers.insert(0, Layer("", {"stage": self.stage}))
        stage = self.stage or layers[-1].content.get("stage")
        for text in self.overrides:
            override = parse_override(text)
            content = normalize_keys(override.content, f"override {text}", stage)
            if self.stage is None:
                self._check_reach(text, next(iter(content)))
            layers.append(Layer(override.source, content))
        return resolve(merge(layers), self.layers[-1].source)

    def _check_reach(self, override: str, key: str) -> None:
        """Refuse to change a shared key of a file in which everything that depends on it is resolved already."""
        (file,) = self.layers
        if key in INTERPOLATED_KEYS and not refers_to(file.content, key):
            raise ConfigError(
                f"override {override!r}: {file.source} repeats {key} in other keys, which would keep their values, and "
                f"has no {LAYERS_FILE} that belongs to it: give the override with the experiment instead, e.g. "
                f"`fit experiments/toy stage1 {override}`, or edit the file in all places"
            )

    def save(self, folder: Path) -> None:
        """Write the layers next to the resolved ``config.yaml`` of a run, so that overrides of it reach every key."""
        content = {
            "config_sha256": _digest(folder / "config.yaml"),
            "stage": self.stage,
            "layers": [asdict(layer) for layer in self.layers],
            "overrides": list(self.overrides),
        }
        (folder / LAYERS_FILE).write_text(_LAYERS_HEAD + dump_yaml(content), encoding="utf-8")


def compose(experiment: Path, stage: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose and resolve.

    Args:
        experiment: folder of the experiment, or one complete file such as a run's ``config.yaml``.
        stage: name of the stage, such as ``stage1``; None for a complete file.
        overrides: ``key=value`` with dots between keys and values as in YAML, or ``~key`` to remove a key.

    Raises:
        ConfigError: a file is missing or no YAML, an override has another form, or an interpolation finds nothing.
    """
    return read_layers(experiment, stage, overrides).resolve()


def read_layers(experiment: Path, stage: str | None, overrides: Sequence[str] = ()) -> Composition:
    """Read the layers of a stage, for arguments as those of ``compose``.

    The layers of a run's ``config.yaml`` are those that it was composed of, unless it was edited since.

    Raises:
        ConfigError: a file is missing or no YAML.
    """
    if stage is None and (saved := _saved_layers(experiment)):
        return replace(saved, overrides=(*saved.overrides, *overrides))
    files = [experiment] if stage is None else _experiment_files(experiment, f"{stage}.yaml")
    layers = []
    for file in files:
        content = load_yaml(file)
        if content.pop("extends", None) is not None and file.name != "experiment.yaml":
            raise ConfigError(f"{file}: extends: only an experiment.yaml extends others: move it there")
        layers.append(Layer(str(file), normalize_keys(content, str(file), stage)))
    return Composition(stage, tuple(layers), tuple(overrides))


def _saved_layers(config_file: Path) -> Composition | None:
    """Read the layers that lie next to a run's ``config.yaml``, if they are those of its present content."""
    file = config_file.with_name(LAYERS_FILE)
    if not config_file.is_file() or not file.is_file():
        return None
    saved = load_yaml(file)
    if saved.get("config_sha256") != _digest(config_file):
        return None
    stage, layers = saved["stage"], []
    for each in saved["layers"]:
        layers.append(Layer(each["source"], normalize_keys(each["content"], each["source"], stage)))
    return Composition(stage, tuple(layers), tuple(saved["overrides"]))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def normalize_keys(content: dict[str, Any], source: str, stage: str | None) -> dict[str, Any]:
    """Return a layer with the present name of every key.

    ``model.kl`` and ``data.root`` are short for ``model.init_args.kl`` and ``data.init_args.root``.

    Args:
        content: one layer of nested keys, before interpolation; it is not changed.
        source: file or override, for messages.
        stage: stage that the layer is used for, if known.

    Raises:
        ConfigError: a key is given under two names.
    """
    written_out = copy.deepcopy(content)
    for top in ("model", "data"):
        section = written_out.get(top)
        if not isinstance(section, dict):
            continue
        for key in [key for key in section if key not in _CLASS_KEYS]:
            value = section.pop(key)
            if not isinstance(section.get("init_args"), dict):
                section["init_args"] = {}
            if key in section["init_args"]:
                raise ConfigError(f"{source}: {top}.{key} is short for {top}.init_args.{key}: remove one of them")
            section["init_args"][key] = value
    return rename_keys(written_out, source, stage or content.get("stage"))


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
    names = {file.stem for file in _experiment_files(experiment, "stage*.yaml") if file.stem.startswith("stage")}
    return sorted(names, key=lambda name: (len(name), name))


def _experiment_files(folder: Path, stage_files: str, chain: tuple[Path, ...] = ()) -> list[Path]:
    """Return the files of an experiment, the winning ones last.

    Args:
        folder: the experiment's.
        stage_files: pattern of the stages' files to include, such as ``stage1.yaml``.
        chain: the experiments that extend this one.
    """
    head = folder / "experiment.yaml"
    if folder in chain:
        shown = " -> ".join(map(str, (*chain[chain.index(folder) :], folder)))
        raise ConfigError(f"{head}: extends: the experiment extends itself ({shown}): remove one of these lines")
    if not head.is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/experiment.yaml"))
        by = f", which {chain[-1]}/experiment.yaml extends" if chain else ""
        raise ConfigError(f"no experiment {folder}{by}: no such file {head}; there are: {', '.join(known) or 'none'}")
    bases = load_yaml(head).get("extends") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{head}: extends: got {bases}, allowed: a list of files and of folders of experiments")
    files: list[Path] = []
    for name in bases:
        base = Path(os.path.normpath(folder / name))
        if base.name == "experiment.yaml":
            base = base.parent
        files += [base] if base.suffix in (".yaml", ".yml") else _experiment_files(base, stage_files, (*chain, folder))
    return [*files, head, *sorted(folder.glob(stage_files))]
