"""Prompt templates: ten per task in three styles, and the draw that picks one.

A bank is a list of ten entries in a YAML file named after its task::

    answer: phrase         # phrase: as annotated; sentence: with a capital and a full stop; letter: of the right option
    order: [ego, base, task]          # order in which pieces are joined; an entry may have its own
    join: " "
    default:
      - {id: 0, base: What is done here?, task: Answer with a verb and an object., ego: You wear the camera.}
      ...                             # ten entries
    ssv2: [...]                       # ten other entries for records of one source

Style ``base`` uses the base piece only, ``task`` adds the expected form of the answer, and ``task_ego`` (the paper's
best) adds the first-person viewpoint. ``{question}`` and ``{options}`` in a piece are replaced by the record's. Every
base piece of ``qa`` holds the first and every one of ``mcq`` holds both, since style ``base`` has no other piece.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.conversation import Turn

TASKS = ("action", "qa", "mcq", "description")
STYLES = {"base": ("base",), "task": ("base", "task"), "task_ego": ("base", "task", "ego")}
BANK_SIZE = 10
FOLDER = Path(__file__).with_name("templates")
"""The banks of this repository."""
_PIECES = ("ego", "base", "task")
_ANSWERS = ("phrase", "sentence", "letter")
_REQUIRED = {"qa": {"question"}, "mcq": {"question", "options"}}
_SLOT = re.compile(r"\{(\w+)\}")


def draw(seed: int, epoch: int, name: str) -> int:
    """Return the number of the template of a record in an epoch.

    It depends on the arguments only, so neither the number of ranks nor a resumed run changes a prompt.

    Args:
        seed: seed of the run.
        epoch: from 0.
        name: id of the record.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BANK_SIZE


@dataclass(frozen=True)
class _Bank:
    """The ten templates of one list of a file: pieces by name, and the order in which they are joined."""

    entries: tuple[tuple[Mapping[str, str], tuple[str, ...]], ...]
    join: str
    answer: str


class Templates:
    """The template banks of a folder.

    Args:
        folder: holds ``<task>.yaml`` for every task that records have.

    Raises:
        ValueError: the folder or a file is invalid; names file, bank, entry and the allowed values.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        files = [file for task in TASKS if (file := folder / f"{task}.yaml").is_file()]
        if not files:
            names = ", ".join(f"{task}.yaml" for task in TASKS)
            raise ValueError(f"{folder}: holds no templates: give a folder with any of {names}")
        self._banks: dict[tuple[str, str], _Bank] = {}
        for file in files:
            for name, bank in _read(file).items():
                self._banks[file.stem, name] = bank

    def render(self, record: InstructionRecord, style: str, template: int) -> Turn:
        """Render the question and the answer of a record with prompt fields.

        Args:
            record: gives the prompt fields, and the source whose bank is preferred.
            style: key of ``STYLES``.
            template: number from 0 to 9, see ``draw``.

        Raises:
            ValueError: there is no bank for the task, or the answer to a choice is none of its options.
        """
        prompt = record.prompt
        assert prompt is not None, "a record without prompt fields has nothing to render"
        bank = self._banks.get((prompt.task, record.source)) or self._banks.get((prompt.task, "default"))
        if bank is None:
            known = ", ".join(sorted({task for task, _ in self._banks}))
            raise ValueError(f"{self.folder}: no templates for task {prompt.task!r}, there are: {known}")
        pieces, order = bank.entries[template]
        slots = {"question": prompt.query, "options": _lettered(prompt.options)}
        texts = [_SLOT.sub(lambda slot: slots[slot[1]], pieces[name]) for name in order if name in STYLES[style]]
        question = bank.join.join(text.strip() for text in texts if text.strip())
        return question, _answer(prompt, bank.answer)


def _lettered(options: Sequence[str]) -> str:
    return "\n".join(f"({letter(index)}) {option}" for index, option in enumerate(options))


def letter(index: int) -> str:
    """Return the letter of an option by its number from 0."""
    return chr(ord("A") + index)


def _answer(prompt: PromptFields, form: str) -> str:
    """Return the target in the form that the task's bank asks for."""
    text = prompt.target.strip()
    if form == "letter":
        if text not in prompt.options:
            raise ValueError(f"target {text!r} is none of the options {list(prompt.options)}: make them agree")
        return f"({letter(prompt.options.index(text))}) {text}"
    if form == "sentence":
        return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")
    return text


def _read(file: Path) -> dict[str, _Bank]:
    try:
        loaded = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: invalid YAML ({' '.join(str(error).split())}): fix this file") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: expected keys and values at the top level")
    answer, order, join = loaded.pop("answer", None), loaded.pop("order", list(_PIECES)), loaded.pop("join", " ")
    if answer not in _ANSWERS:
        raise ValueError(f"{file}: answer is {answer!r}, allowed: {', '.join(_ANSWERS)}")
    if not isinstance(join, str) or not loaded:
        raise ValueError(f"{file}: join is {join!r} and there are {len(loaded)} banks: give a text and a bank")
    return {
        str(name): _Bank(
            tuple(_entries(entries, order, _REQUIRED.get(file.stem, set()), f"{file}: {name}")), join, answer
        )
        for name, entries in loaded.items()
    }


def _entries(entries: Any, order: Any, required: set[str], where: str) -> list[tuple[dict[str, str], tuple[str, ...]]]:
    if not isinstance(entries, list):
        raise ValueError(f"{where}: got {entries!r}, expected a list of {BANK_SIZE} entries")
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if ids != list(range(BANK_SIZE)):
        raise ValueError(f"{where}: ids are {ids}, expected 0 to {BANK_SIZE - 1} in order")
    checked: list[tuple[dict[str, str], tuple[str, ...]]] = []
    numbers: dict[str, int] = {}
    for entry in entries:
        own = entry.get("order", order)
        texts = {name: entry.get(name) for name in _PIECES}
        ordered = isinstance(own, list) and sorted(map(str, own)) == sorted(_PIECES)
        if not ordered or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{where}[{entry['id']}]: expected texts {', '.join(_PIECES)} and an order of these three")
        slots = set(_SLOT.findall(" ".join(texts.values())))
        unknown = slots - {"question", "options"}
        if unknown:
            raise ValueError(f"{where}[{entry['id']}]: slot {', '.join(sorted(unknown))}: allowed: question, options")
        if missing := sorted(required - set(_SLOT.findall(texts["base"]))):
            raise ValueError(f"{where}[{entry['id']}]: base lacks {', '.join(missing)} in braces: add it")
        first = numbers.setdefault(texts["base"].strip(), entry["id"])
        if first != entry["id"]:
            raise ValueError(f"{where}[{entry['id']}]: base equals that of [{first}]: write {BANK_SIZE} different ones")
        checked.append((texts, tuple(own)))
    return checked
