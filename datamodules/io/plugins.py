"""Find classes by name or by import path, and turn their dataclass fields into command line options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints


def import_dataclass(name: str, known: Mapping[str, str], members: Iterable[str], noun: str) -> Any:
    """Return a dataclass by its short name or by its import path ``module:Class``.

    The working directory is importable.

    Args:
        name: short name or import path.
        known: import path of each short name.
        members: attributes that the class must have in addition to a field ``root``.
        noun: the kind of class, for messages.

    Raises:
        ValueError: there is no such class, or it lacks a field or member.
    """
    if ":" not in known.get(name, name):
        raise ValueError(f"{noun}: got {name!r}, allowed: {', '.join(known)}, or module:Class of your own")
    kind = import_class(known.get(name, name), noun)
    names = {item.name for item in fields(kind)} if isinstance(kind, type) and is_dataclass(kind) else set()
    missing = [member for member in members if member not in names and not hasattr(kind, member)]
    if "root" not in names or missing:
        lacking = ", ".join(missing if "root" in names else ["the dataclass field root", *missing])
        raise ValueError(f"{noun}: {name!r} lacks {lacking}: add it to the class")
    return kind


def import_class(path: str, noun: str) -> Any:
    """Return the class at an import path ``module:Class``; the working directory is importable.

    Args:
        path: the import path.
        noun: the kind of class, for messages.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{noun}: got {path!r}, which cannot be imported ({error}): run the command in the folder of its file"
        ) from None


def add_field_options(parser: argparse.ArgumentParser, kind: Any, root_help: str, root_is_option: bool = True) -> None:
    """Add the fields of a dataclass as options, parsed by their types.

    A field made with ``datamodules.io.annotations.option`` has a help text and may have choices.

    Args:
        parser: gets the options.
        kind: the dataclass.
        root_help: help text of the field ``root``.
        root_is_option: if false, ``root`` is a positional argument.
    """
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.name == "root" and not root_is_option:
            parser.add_argument("root", type=Path, help=root_help)
        elif item.init:
            _add_option(parser, item, hints[item.name], root_help)


def _add_option(parser: argparse.ArgumentParser, item: Field[Any], kind: Any, root_help: str) -> None:
    name, several = f"--{item.name.replace('_', '-')}", str(kind).startswith("tuple")
    help_text = item.metadata.get("help", root_help if item.name == "root" else None)
    if kind is bool:
        parser.add_argument(name, action="store_true", help=help_text)
        return
    if item.default is not MISSING and item.default not in ((), None):
        shown = " ".join(item.default) if several else item.default
        help_text = f"{help_text or ''} (default: {shown})".lstrip()
    parser.add_argument(
        name,
        type=Path if "Path" in str(kind) else kind if kind in (int, float) else str,
        nargs="+" if several else None,
        choices=item.metadata.get("choices"),
        required=item.default is MISSING,
        default=None if item.default is MISSING else item.default,
        help=help_text,
    )


def first_argument(words: Iterable[str] | None) -> str | None:
    """Return the first positional argument, which names the class whose fields become options."""
    names = argparse.ArgumentParser(add_help=False)
    names.add_argument("name", nargs="?")
    name: str | None = names.parse_known_args(None if words is None else list(words))[0].name
    return name
