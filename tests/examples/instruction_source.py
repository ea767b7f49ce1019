"""An instruction source of your own: questions about cooking videos, from one CSV file.

Put this file into the folder in which you run ``make``, convert the dataset, and list the result under
``data.init_args.sources`` of stage 3::

    make egoit SOURCE=instruction_source:CookingQuestions ROOT=/data/cooking OUT=data/egoit/cooking.jsonl

Every field of the class is an option of the command: ``ARGS="--splits train val"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.io.annotations import (
    Counts,
    Official,
    SourceError,
    number_of,
    option,
    read_csv,
    shuffled,
    text_of,
    try_parse,
)


@dataclass(frozen=True)
class CookingQuestions:
    """Questions about seconds of cooking videos.

    ``questions.csv`` has the columns ``video``, ``start`` and ``end`` (seconds), ``question``, ``answer``, ``wrong``
    (wrong answers with ``|`` between them; empty for a question that is answered in words) and ``split``.
    """

    root: Path
    splits: tuple[str, ...] = option(("train",), "splits to read", ("train", "val"))
    videos: str = option("cooking", "folder below the data root that holds <video>.mp4")

    name: ClassVar[str] = "cooking"

    def official(self) -> dict[str, Official]:
        """Return the number of rows that the authors state; the command warns if it finds another one."""
        return {"rows": Official(4)}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each row of the chosen splits, or the error of an invalid row."""
        rows = read_csv(self.root / "questions.csv")
        _, columns = next(rows)
        for number, (where, cells) in enumerate(rows):
            counts.add("rows")
            row = dict(zip(columns, cells, strict=False))
            if row.get("split") in self.splits:
                yield try_parse(self._record, row, number, where)

    def _record(self, row: Mapping[str, str], number: int, where: str) -> InstructionRecord:
        """Convert a row. The helpers raise a ``SourceError`` that names the file, the line and the field."""
        start_s, end_s = number_of(row, "start", where), number_of(row, "end", where)
        if not 0 <= start_s < end_s:
            raise SourceError(f"{where}: from {start_s} to {end_s} s: correct the times")
        question, answer = text_of(row, "question", where), text_of(row, "answer", where)
        # The same in every run: templates are drawn by the id, and here options are shuffled by it.
        record_id = f"{self.name}/{number:06d}"
        if row.get("wrong"):
            options = shuffled(record_id, [answer, *row["wrong"].split("|")])
            prompt = PromptFields("mcq", question, answer, options)
        else:
            prompt = PromptFields("qa", question, answer)
        return InstructionRecord(
            id=record_id,
            video=f"{self.videos}/{text_of(row, 'video', where)}.mp4",
            prompt=prompt,
            source=self.name,
            window_s=(start_s, end_s),
            split=row["split"],
            where=where,
        )
