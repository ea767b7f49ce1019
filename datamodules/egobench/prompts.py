"""Prompt templates of benchmark questions, from a YAML file that can be replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from datamodules.egobench.base import LETTERS
from datamodules.egobench.samples import Sample

STYLES = ("base", "task", "ego")
FILE = Path(__file__).with_name("prompts.yaml")
"""The templates of this repository."""
_SLOT = re.compile(r"\{(\w+)\}")
_ALLOWED = {"choice": {"context", "question", "options"}, "open": {"context", "question"}}
_KEYS = ("prefill", "choice", "open", "context")


class Prompts:
    """The prompt templates of one benchmark in one style.

    Args:
        path: a file of the form of ``prompts.yaml``; None for that file.
        benchmark: name, which selects the text of ``{context}``.
        style: ``base`` for the bare question, ``task`` with instructions, ``ego`` also with the point of view.

    Attributes:
        prefill: first words of the answer to a choice.

    Raises:
        ValueError: the file is invalid; the message names the file and lists all problems.
    """

    def __init__(self, path: str | Path | None, benchmark: str, style: str = "ego") -> None:
        if style not in STYLES:
            raise ValueError(f"style: got {style!r}, allowed: {', '.join(STYLES)}")
        given = _read(FILE if path is None else Path(path))
        self.prefill: str = given["prefill"]
        self._context: str = given["context"].get(benchmark, given["context"]["default"])
        self._templates: dict[str, str] = {kind: given[kind][style] for kind in _ALLOWED}

    def templates(self) -> dict[str, str]:
        """Return all templates and the prefill by name."""
        return {**self._templates, "context": self._context, "prefill": self.prefill}

    def choice(self, sample: Sample, order: Sequence[int] | None = None) -> str:
        """Return a question with its options, one per line as ``(A) text``.

        Args:
            sample: of a ``choice``.
            order: indices of the options in the order of display; None for their own order.

        Raises:
            ValueError: the order does not hold each option once.
        """
        shown = range(len(sample.options)) if order is None else order
        if sorted(shown) != list(range(len(sample.options))):
            raise ValueError(
                f"{sample.id}: order is {list(shown)}, expected each of {len(sample.options)} options once"
            )
        options = "\n".join(f"({letter}) {sample.options[n]}" for letter, n in zip(LETTERS, shown, strict=False))
        return self._filled("choice", question=sample.text, options=options)

    def open(self, sample: Sample) -> str:
        """Return a question to be answered in words."""
        return self._filled("open", question=sample.text)

    def _filled(self, kind: str, **slots: str) -> str:
        slots |= {"context": self._context}
        text = _SLOT.sub(lambda slot: slots[slot[1]], self._templates[kind])
        return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _read(file: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"prompts: no file {file}: correct the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: invalid YAML ({' '.join(str(error).split())}): fix it") from None
    if not isinstance(given, Mapping) or set(given) != set(_KEYS):
        keys = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"{file}: keys are {keys or 'none'}, expected {', '.join(_KEYS)}")
    problems = [] if _is_text(given["prefill"]) else [f"prefill is {given['prefill']!r}, expected a text"]
    for kind, allowed in _ALLOWED.items():
        problems += _problems(kind, given[kind], allowed)
    context = given["context"]
    if not isinstance(context, Mapping) or not all(isinstance(line, str) for line in context.values()):
        problems.append("context: expected a text for each name of a benchmark")
    elif "default" not in context:
        problems.append("context: default is missing, give it a text, or an empty one")
    elif slots := {slot for line in context.values() for slot in _SLOT.findall(line)}:
        problems.append(f"context: slot {', '.join(sorted(slots))}: it may have none")
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    return dict(given)


def _problems(kind: str, templates: Any, allowed: set[str]) -> list[str]:
    if not isinstance(templates, Mapping) or set(templates) != set(STYLES):
        return [f"{kind}: expected a text for each of {', '.join(STYLES)}"]
    problems = []
    for style, text in templates.items():
        slots = set(_SLOT.findall(text)) if _is_text(text) else set()
        if unknown := sorted(slots - allowed):
            problems.append(f"{kind}.{style}: slot {', '.join(unknown)}: allowed: {', '.join(sorted(allowed))}")
        if missing := sorted(allowed - {"context"} - slots):
            problems.append(f"{kind}.{style} lacks {', '.join(missing)} in braces, and would not ask it")
    return problems


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
