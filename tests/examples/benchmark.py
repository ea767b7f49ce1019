"""A benchmark of your own: multiple-choice questions about chores, from a JSON Lines file.

Each line of the file is one question::

    {"id": "q1", "video": "take3.mp4", "start_s": 2.0, "end_s": 6.5, "question": "What happens first?",
     "options": ["washing the cup", "drying the cup"], "answer": 0, "room": "kitchen"}

Name it in the experiment by its import path; the folder that you run the commands in is on the
Python path. Keys are the fields of the class::

    egobench:
      benchmarks:
        - name: benchmark:Chores
          annotations: data/chores/questions.jsonl
          videos: data/chores/videos

``make evaluate BENCHMARKS=chores`` then answers and scores it with every finished stage. If the class
gives ``annotations`` and ``videos`` defaults, ``make evaluate BENCHMARKS=benchmark:Chores`` does so
without an entry in the experiment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.egobench import Benchmark, Clip, Sample, TaskName
from datamodules.io.annotations import Counts, SourceError, number_of, option, text_of, try_parse
from datamodules.io.jsonl import read_jsonl


@dataclass(frozen=True)
class Chores(Benchmark):
    """Questions about chores, optionally of one room only."""

    room: str | None = option(None, "keep the questions of this room; null for all")

    name: ClassVar[str] = "chores"
    # The task type decides what the model is asked, what the predictions file holds, and the scores:
    # choice, open, vocabulary, rank_texts or rank_clips, see lightning_modules/egobench/tasks.
    task: ClassVar[TaskName] = "choice"

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each line of the file.

        An invalid line is yielded as its error, so that all of them are reported together.
        """
        file = self.main_file(["questions.jsonl"], "the questions about chores")
        for where, row in read_jsonl(file):
            sample = try_parse(self._sample, row, where)
            if isinstance(sample, Sample) and self.room is not None and self.room not in sample.groups:
                counts.add("questions of other rooms")
                continue
            yield sample

    def _sample(self, row: dict[str, Any], where: str) -> Sample:
        options = row.get("options")
        if not isinstance(options, list) or not 2 <= len(options) <= 5:
            raise SourceError(f"{where}: field 'options' is {options!r}, expected 2 to 5 texts")
        answer = row.get("answer")
        if answer not in range(len(options)):
            raise SourceError(f"{where}: field 'answer' is {answer!r}, expected an option's index")
        start_s = number_of(row, "start_s", where)
        end_s = number_of(row, "end_s", where)
        return Sample(
            id=text_of(row, "id", where),
            clips=(Clip(text_of(row, "video", where), start_s, end_s),),
            text=text_of(row, "question", where),
            options=tuple(options),
            answer=answer,
            groups=(text_of(row, "room", where),),  # accuracy is also reported for each room
        )

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Return the lines to print before the evaluation: how many questions were left out."""
        left_out = counts.get("questions of other rooms", 0)
        return [f"{self.name}: {left_out} questions of other rooms are left out"] if left_out else []
