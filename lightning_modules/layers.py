"""Read layers of a configuration from YAML files and from the command line, and merge them.

A layer is a nested dictionary. Where a later layer names a key of earlier ones,

- a section is merged with the earlier one, key by key;
- an empty section, ``{}``, or one with ``_delete_: true`` (as in MMEngine), replaces the earlier one;
- any other value replaces the earlier one, also a list and null;
- ``_delete_`` in place of a value removes the key; on the command line it is written ``~key`` (as in Hydra).

Naming ``network.encoder.type`` or ``network.language_model.pretrained`` also drops the keys of earlier layers that do
not go with it, see ``_ALTERNATIVES``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

DELETE = "_delete_"
"""Removes a key as its value, and replaces a section as a key in it."""

COMMAND_LINE = "command line"
"""Source of the layers that are overrides."""

_ALTERNATIVES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "network.encoder": {"type": None},
    "network.language_model": {"pretrained": ("architecture", "overrides"), "architecture": ("pretrained",)},
}
"""Keys of sections that, once named, drop other keys of earlier layers; None: all keys except ``args``."""


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the file or key and how to fix it."""


@dataclass(frozen=True)
class Layer:
    """A part of a configuration.

    Attributes:
        source: the file, or ``COMMAND_LINE``.
        content: nested keys; interpolations are strings.
    """

    source: str
    content: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them: ``1e-3`` is one, ``12:00:00:00`` is not (in YAML 1.1 it has base 60)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice, of which YAML would silently take the last."""
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Write texts that ``_Loader`` or another reader would take for something else in quotes."""


_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?)$")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in found if not tag.endswith((":float", ":int", ":timestamp"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))  # type: ignore[no-untyped-call]
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _INFINITE, list("-+."))  # type: ignore[no-untyped-call]
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))  # type: ignore[no-untyped-call]


def load_yaml(file: Path) -> dict[str, Any]:
    """Read keys and values from a YAML file.

    Raises:
        ConfigError: the file is missing, no YAML, or no mapping at the top level.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}): name a YAML file") from None
    try:
        content = _parse(text)
        OmegaConf.create(content)  # checks the form of interpolations
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values at the top level")
    return content


def dump_yaml(content: Any) -> str:
    """Return content as YAML, in the order of its keys."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_override(text: str) -> Layer:
    """Read ``key=value``, with dots between keys and a value in YAML, or ``~key``.

    Raises:
        ConfigError: the text has another form.
    """
    key, equals, value = text.partition("=")
    deleted = text.startswith("~")
    if deleted == bool(equals) or not all(key.removeprefix("~").split(".")):
        raise ConfigError(f"override {text!r}: expected key=value, e.g. trainer.max_steps=100, or ~key to remove a key")
    if "[" in key:
        whole = key.partition("[")[0]
        raise ConfigError(f"override {text!r}: a list is given as a whole: {whole}=[...]")
    try:
        content: Any = DELETE if deleted else _parse(value)
        for name in reversed(key.removeprefix("~").split(".")):
            content = {name: content}
        OmegaConf.create(content)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {text!r}: the value is no YAML ({' '.join(str(error).split())})") from None
    return Layer(COMMAND_LINE, content)


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Merge layers, the later ones winning; interpolations stay.

    Raises:
        ConfigError: a layer removes a key that is not there, or ``_delete_`` has a value other than true.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge_section(merged, layer.content, merged, layer.source)
    _drop_replaced(merged, layers)
    return merged


def resolve(merged: dict[str, Any], source: str) -> dict[str, Any]:
    """Replace interpolations by values.

    Args:
        merged: from ``merge``.
        source: file to name in errors.

    Raises:
        ConfigError: an interpolation finds nothing.
    """
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]} (key {error.full_key})") from None
    return {str(key): value for key, value in resolved.items()}


def refers_to(content: Any, key: str) -> bool:
    """Return True if an interpolation in nested content names a key or one below it."""
    if isinstance(content, dict):
        return any(refers_to(value, key) for value in content.values())
    if isinstance(content, list):
        return any(refers_to(value, key) for value in content)
    return isinstance(content, str) and re.search(rf"\$\{{{re.escape(key)}[.}}\[]", content) is not None


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _merge_section(section: dict[str, Any], layer: dict[str, Any], root: dict[str, Any], where: str) -> None:
    """Merge a section of a layer into the same section of earlier layers, in place.

    Args:
        section: of the earlier layers.
        layer: of the later one.
        root: the earlier layers' top level, to look up interpolations.
        where: source and key of the section, for errors.
    """
    if DELETE in layer:
        if layer[DELETE] is not True:
            raise ConfigError(f"{where}: {DELETE}: got {layer[DELETE]}, allowed: true, to replace the whole section")
        section.clear()
    for key, value in layer.items():
        if key == DELETE:
            continue
        if value == DELETE:
            if key not in section:
                known = ", ".join(map(str, section)) or "nothing"
                raise ConfigError(f"{where}: {key} is to be removed but is not set there; set: {known}")
            del section[key]
        elif isinstance(value, dict) and value:
            section[key] = _as_section(section.get(key), root, f"{where}: {key}")
            _merge_section(section[key], value, root, f"{where}: {key}")
        else:
            section[key] = copy.deepcopy(value)


def _as_section(value: Any, root: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the section that a later layer changes: a copy of the target where it is an interpolation."""
    while isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        value = select(root, found[1])
        if value is None:
            raise ConfigError(f"{where}: is ${{{found[1]}}}, which has no value yet: set {found[1]} instead")
        value = copy.deepcopy(value)
    return value if isinstance(value, dict) else {}


def select(content: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None."""
    value: Any = content
    for name in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _drop_replaced(merged: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Drop keys that do not go with one that a later layer names, such as the sizes of a built-in encoder with a class.

    Keys in the layer that names it, or after it, stay: they are a mistake, which the section's class refuses. All
    overrides together count as one layer.

    Args:
        merged: all layers; changed in place.
        layers: one by one.
    """
    groups = [list(group) for _, group in groupby(layers, key=lambda layer: layer.source)]
    for path, alternatives in _ALTERNATIVES.items():
        section = select(merged, path)
        if not isinstance(section, dict):
            continue
        given: list[dict[str, Any]] = []  # what each group sets in the section
        for group in groups:
            found = [select(layer.content, path) for layer in group]
            given.append({key: value for each in found if isinstance(each, dict) for key, value in each.items()})
        for chosen, replaced in alternatives.items():
            naming = [n for n, keys in enumerate(given) if keys.get(chosen) not in (None, DELETE)]
            if not naming or section.get(chosen) is None:
                continue
            kept = {chosen, "args"}.union(*given[naming[-1] :])
            for key in set(section if replaced is None else replaced) - kept:
                section.pop(key, None)
