"""Something-Something-V2: one hand-object motion for each short clip.

Read below the root, or in its ``labels``: ``labels.json`` and ``<split>.json``, with or without the prefix
``something-something-v2-``; for the test split, ``test-answers.csv`` (``id;class``, no header). A row's class is its
template without brackets; brackets hold more than ``[something]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.annotations import (
    Counts,
    Official,
    SourceError,
    find_file,
    option,
    read_csv,
    read_json,
    text_of,
    try_parse,
)

_ROWS = {"train": 168_913, "validation": 24_777, "test": 27_157}
_CLASSES = 174
_BRACKETS = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True)
class SomethingSomething:
    """Something-Something-V2: clips of some splits."""

    root: Path
    splits: tuple[str, ...] = option(("train",), "splits to read; test has classes only", tuple(_ROWS))
    answer: str = option("label", "text of the answer: the crowd's label, or the class template", ("label", "template"))
    videos: str = option("ssv2/20bn-something-something-v2", "folder below the data root that holds <id>.webm")

    name: ClassVar[str] = "ssv2"

    def official(self) -> dict[str, Official]:
        """Return rows of the splits, and classes."""
        known = {f"rows of {split}": Official(_ROWS[split]) for split in self.splits if split in _ROWS}
        return {**known, "classes": Official(_CLASSES)}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each row."""
        classes = read_json(self._file("labels.json"), dict)
        counts.add("classes", len(classes))
        for split in self.splits:
            rows = self._answers() if split == "test" else self._rows(split)
            for where, entry in rows:
                counts.add(f"rows of {split}")
                yield try_parse(self._record, entry, split, classes, where)

    def _file(self, name: str) -> Path:
        prefixed = [name, f"something-something-v2-{name}"]
        names = [*prefixed, *(f"labels/{name}" for name in prefixed)]
        return find_file(self.root, names, f"Something-Something-V2's {name}")

    def _rows(self, split: str) -> Iterator[tuple[str, Any]]:
        file = self._file(f"{split}.json")
        for number, entry in enumerate(read_json(file, list), 1):
            yield f"{file} entry {number}", entry

    def _answers(self) -> Iterator[tuple[str, Any]]:
        if self.answer != "template":
            raise SourceError(f"{self.root}: the test split has classes only: add --answer template, or leave it out")
        for where, cells in read_csv(self._file("test-answers.csv"), delimiter=";"):
            if len(cells) == 2:
                yield where, {"id": cells[0], "template": cells[1], "placeholders": []}
            else:
                yield where, {}

    def _record(self, entry: Any, split: str, classes: Mapping[str, Any], where: str) -> InstructionRecord:
        identifier, template = text_of(entry, "id", where), text_of(entry, "template", where)
        name = re.sub(r"[\[\]]", "", template)
        if name not in classes:
            raise SourceError(f"{where}: class {name!r} of field 'template' is not in labels.json: fetch both again")
        brackets, fillings = _BRACKETS.findall(template), entry.get("placeholders")
        if not isinstance(fillings, list) or len(fillings) != len(brackets):
            raise SourceError(
                f"{where}: field 'placeholders' is {fillings!r}, but {template!r} has {len(brackets)} brackets: fix it"
            )
        target = text_of(entry, "label", where) if self.answer == "label" else name[:1].lower() + name[1:]
        return InstructionRecord(
            id=f"{self.name}/{identifier}",
            video=f"{self.videos}/{identifier}.webm",
            prompt=PromptFields("action", query="", target=target),
            source=self.name,
            split=split,
            video_uid=identifier,
            where=where,
        )
