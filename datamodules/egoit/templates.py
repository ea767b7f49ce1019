"""Instruction templates: banks of ten wordings for each task, in three levels, and how one is drawn.

A bank is a list of ten entries in a YAML file named after its task::

    answer: phrase         # phrase: as annotated; sentence: with a capital and a full stop; letter: of the right option
    order: [ego, base, task]          # how pieces are joined; an entry may have its own
    join: " "
    default:
      - {id: 0, base: What is done here?, task: Answer with a verb and an object., ego: You wear the camera.}
      ...                             # ten of them
    ssv2: [...]                       # ten others for records of one source

Level ``base`` says the base piece only, ``task`` adds what is asked for, and ``task_ego`` (the paper's best) also from
whose eyes the video is seen. ``{question}`` and ``{options}`` in a piece are filled from the record; every base piece
of ``qa`` holds the first and of ``mcq`` both, since it is all that is said at the lowest level.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datamodules.egoit.datamodule import Turn, Wording

TASKS = ("action", "qa", "mcq", "description")
LEVELS = {"base": ("base",), "task": ("base", "task"), "task_ego": ("base", "task", "ego")}
BANK_SIZE = 10
FOLDER = Path(__file__).with_name("templates")
"""The banks that come with this repository."""
_PIECES = ("ego", "base", "task")
_ANSWERS = ("phrase", "sentence", "letter")
_REQUIRED = {"qa": {"question"}, "mcq": {"question", "options"}}
_SLOT = re.compile(r"\{(\w+)\}")


def draw(seed: int, epoch: int, name: str) -> int:
    """The template of a record in an epoch, by nothing else, so that neither ranks nor a resumed run change a prompt.

    Training draws; whoever asks held-out questions in templates uses number 0.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BANK_SIZE


@dataclass(frozen=True)
class _Bank:
    """Entries of one list of a file: pieces by name, and the order in which they are joined."""

    entries: tuple[tuple[Mapping[str, str], tuple[str, ...]], ...]
    join: str
    answer: str


class Templates:
    """The banks of a folder.

    Args:
        folder: holds ``<task>.yaml`` for every task that records have.

    Raises:
        ValueError: the folder or a file cannot be used; names file, bank, entry and what is allowed.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        files = [file for task in TASKS if (file := folder / f"{task}.yaml").is_file()]
        if not files:
            names = ", ".join(f"{task}.yaml" for task in TASKS)
            raise ValueError(f"{folder}: holds no templates: give a folder with any of {names}")
        self._banks = {(file.stem, name): bank for file in files for name, bank in _read(file).items()}

    def turn(self, wording: Wording, level: str, template: int) -> Turn:
        """A question and its answer.

        Args:
            wording: what they are made from.
            level: in ``LEVELS``.
            template: from 0 to 9.

        Raises:
            ValueError: there is no bank for the task, or a choice's answer is none of its options.
        """
        bank = self._banks.get((wording.task, wording.source)) or self._banks.get((wording.task, "default"))
        if bank is None:
            known = ", ".join(sorted({task for task, _ in self._banks}))
            raise ValueError(f"{self.folder}: no templates for task {wording.task!r}, there are: {known}")
        pieces, order = bank.entries[template]
        slots = {"question": wording.query, "options": _lettered(wording.options)}
        said = [_SLOT.sub(lambda slot: slots[slot[1]], pieces[name]) for name in order if name in LEVELS[level]]
        question = bank.join.join(text.strip() for text in said if text.strip())
        return question, _answer(wording, bank.answer)


def _lettered(options: Sequence[str]) -> str:
    return "\n".join(f"({letter(index)}) {option}" for index, option in enumerate(options))


def letter(index: int) -> str:
    """Letter of an option by its number from 0."""
    return chr(ord("A") + index)


def _answer(wording: Wording, form: str) -> str:
    text = wording.target.strip()
    if form == "letter":
        if text not in wording.options:
            raise ValueError(f"target {text!r} is none of the options {list(wording.options)}: make them agree")
        return f"({letter(wording.options.index(text))}) {text}"
    if form == "sentence":
        return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")
    return text


def _read(file: Path) -> dict[str, _Bank]:
    try:
        loaded = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no YAML ({' '.join(str(error).split())}): mend it") from None
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
        unknown = {slot for text in texts.values() for slot in _SLOT.findall(text)} - {"question", "options"}
        if unknown:
            raise ValueError(f"{where}[{entry['id']}]: slot {', '.join(unknown)}: allowed: question, options")
        if missing := sorted(required - set(_SLOT.findall(texts["base"]))):
            raise ValueError(f"{where}[{entry['id']}]: base lacks {', '.join(missing)} in braces, and would not ask it")
        first = numbers.setdefault(texts["base"].strip(), entry["id"])
        if first != entry["id"]:
            raise ValueError(f"{where}[{entry['id']}]: base is that of [{first}]: write {BANK_SIZE} different ones")
        checked.append((texts, tuple(own)))
    return checked
