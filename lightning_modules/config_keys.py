"""List the keys of a configuration, one a line, with value, type, default and a sentence from the docstring."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any, get_args, get_type_hints

from docstring_parser import parse

from lightning_modules.config_check import constructor_parameters, describe_type


def key_lines(config: Mapping[str, Any], types: Mapping[str, Any], help_texts: Mapping[str, str]) -> list[str]:
    """Return a line such as ``model.kl.tau = 1.0  # float: temperature of both distributions`` for every key.

    Keys that repeat a shared section, such as ``model.network``, are left out. Arguments of the stage and of the
    datamodule have their short names.

    Args:
        config: resolved configuration with all defaults.
        types: type of each top-level key.
        help_texts: a sentence for top-level keys whose type has no docstring about them.
    """
    lines: list[str] = []
    for key, value in config.items():
        _add(lines, key, value, types[key], inspect.Parameter.empty, help_texts.get(key, ""))
    repeated = [f"{top}.{key}" for top in ("model", "data") for key in config if key not in ("model", "data")]
    return [line for line in lines if not line.startswith(tuple(f"{key}{end}" for key in repeated for end in ". "))]


def _add(lines: list[str], key: str, value: Any, hint: Any, default: Any, text: str) -> None:
    """Append the lines of a key and of everything below it."""
    if isinstance(value, dict) and "class_path" in value:
        module, _, name = value["class_path"].rpartition(".")
        lines.append(_line(f"{key}.class_path", value["class_path"], str, inspect.Parameter.empty, text))
        below = key if key in ("model", "data") else f"{key}.init_args"
        _add_parameters(lines, below, value.get("init_args") or {}, getattr(import_module(module), name))
        return
    kind = _structure(hint)
    if kind is not None and isinstance(value, dict):
        _add_parameters(lines, key, value, kind)
    else:
        lines.append(_line(key, value, hint, default, text))


def _add_parameters(lines: list[str], above: str, values: dict[str, Any], kind: Any) -> None:
    """Append the lines of the arguments of a class or the fields of a dataclass or TypedDict."""
    hints, defaults = _parameters(kind)
    texts = _texts(kind)
    for name, value in values.items():
        empty = inspect.Parameter.empty
        _add(lines, f"{above}.{name}", value, hints.get(name, Any), defaults.get(name, empty), texts.get(name, ""))


def _parameters(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return type hints and defaults of the arguments of a class, by name."""
    if typing.is_typeddict(kind):
        return get_type_hints(kind), {}
    if not is_dataclass(kind):
        parameters, _ = constructor_parameters(kind)
        return (
            {name: hint for name, (hint, _) in parameters.items()},
            {name: default for name, (_, default) in parameters.items()},
        )
    defaults = {}
    for field in fields(kind):
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    return get_type_hints(kind), defaults


def _structure(hint: Any) -> Any:
    """Return the type with named keys in a hint: the hint itself, or the only such alternative of a union."""
    for alternative in (hint, *get_args(hint)):
        if is_dataclass(alternative) or typing.is_typeddict(alternative):
            return alternative
        if inspect.isclass(alternative) and alternative.__module__.startswith(("lightning", "datamodules")):
            return alternative
    return None


def _texts(kind: Any) -> dict[str, str]:
    """Return the first sentence about each argument in the docstrings of a class, its bases and their constructors."""
    texts: dict[str, str] = {}
    for base in inspect.getmro(kind):
        for documented in (base, vars(base).get("__init__")):
            for parameter in parse(getattr(documented, "__doc__", None) or "").params:
                sentence = " ".join((parameter.description or "").split()).partition(". ")[0]
                for name in parameter.arg_name.split(", "):
                    texts.setdefault(name, sentence.removesuffix("."))
    return texts


def _line(key: str, value: Any, hint: Any, default: Any, text: str) -> str:
    shown = value if isinstance(value, str) and value else json.dumps(value)
    kind = describe_type(hint)
    if default is not inspect.Parameter.empty and _plain(default) != value:
        kind += f", default {json.dumps(_plain(default), default=str)}"
    return f"{key} = {shown}  # {kind}{': ' if text else ''}{text}"


def _plain(value: Any) -> Any:
    """Return a default as it would be in YAML."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return list(value) if isinstance(value, tuple) else value
