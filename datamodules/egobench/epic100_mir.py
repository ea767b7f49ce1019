"""EPIC-KITCHENS-100 multi-instance retrieval: find captions for clips, and clips for captions.

Read, also in ``retrieval_annotations``: ``EPIC_100_retrieval_test.csv``, the clips, and
``EPIC_100_retrieval_test_sentence.csv``, whose ``narration_id`` says which of the clips' narrations are captions. Its
own texts are not read: six of them are those of the row before. Clips are cut by their times, since their frame numbers
are those of frames extracted at 60 a second, whatever the frame rate of the video.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, one_line, table_rows, whole_number
from datamodules.egobench.samples import Candidate, Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, option, read_csv, text_of, try_parse

_CLIPS, _SENTENCES = "EPIC_100_retrieval_test.csv", "EPIC_100_retrieval_test_sentence.csv"
_COLUMNS = (
    *("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "narration"),
    *("verb_class", "all_noun_classes"),
)
_TIME = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d(?:\.\d+)?)")
_FAST_CLIPS = 400


@dataclass(frozen=True)
class Epic100Mir(Benchmark):
    """The clips and captions of the test split."""

    file: str = option("{participant}/{video}.MP4", "path of a video below videos")

    name: ClassVar[str] = "epic100_mir"
    task: ClassVar[TaskName] = "rank_texts"

    def official(self) -> dict[str, Official]:
        """Return the numbers of clips, captions and videos."""
        return {"samples": Official(9668), "candidates": Official(3842), "videos": Official(138)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each clip."""
        for where, row in self._table():
            sample = row if isinstance(row, SourceError) else try_parse(self._sample, row, where)
            if isinstance(sample, Sample):
                counts.add_distinct("videos", sample.clips[0].video)
            yield sample

    def _table(self) -> Iterator[tuple[str, Any]]:
        file = self.main_file([_CLIPS, f"retrieval_annotations/{_CLIPS}"], "the clips of the retrieval test")
        return table_rows(read_csv(file), _COLUMNS, file)

    def _sample(self, row: Any, where: str) -> Sample:
        participant, video = text_of(row, "participant_id", where), text_of(row, "video_id", where)
        start_s, end_s = _seconds(row, "start_timestamp", where), _seconds(row, "stop_timestamp", where)
        if start_s >= end_s:
            raise SourceError(f"{where}: from {start_s:g} to {end_s:g} s: correct its timestamps")
        clip = Clip(video_file(self.file, participant, video), start_s, end_s)
        return Sample(text_of(row, "narration_id", where), (clip,), labels=_labels(row, where))

    def candidates(self) -> Sequence[Candidate]:
        """Return the captions in the order of the sentence file."""
        narrated = {row["narration_id"]: (where, row) for where, row in self._table() if isinstance(row, dict)}
        file = self.other_file([_SENTENCES, f"retrieval_annotations/{_SENTENCES}"], "the captions of the test")
        texts = []
        for at, sentence in table_rows(read_csv(file), ("narration_id",), file):
            if isinstance(sentence, SourceError):
                raise sentence
            name = sentence["narration_id"]
            if name not in narrated:
                raise SourceError(f"{at}: narration_id {name!r} is not in {_CLIPS}: take both of one release")
            where, row = narrated[name]
            texts.append(Candidate(one_line(row, "narration", where), _labels(row, where), name))
        return texts

    def fast_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the first clips."""
        return list(samples[:_FAST_CLIPS])


def video_file(pattern: str, participant: str, video: str) -> str:
    """Return the path of a video.

    Raises:
        SourceError: the pattern has other slots than ``{participant}`` and ``{video}``.
    """
    try:
        return pattern.format(participant=participant, video=video)
    except (KeyError, IndexError, ValueError):
        raise SourceError(f"file: got {pattern!r}, allowed slots: {{participant}}, {{video}}") from None


def _seconds(row: Any, key: str, where: str) -> float:
    found = _TIME.fullmatch(text_of(row, key, where))
    if found is None:
        raise SourceError(f"{where}: column {key!r} is {row[key]!r}, expected hh:mm:ss.ff: correct it")
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


def _labels(row: Any, where: str) -> dict[str, Any]:
    given = text_of(row, "all_noun_classes", where)
    try:
        nouns = ast.literal_eval(given)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        nouns = None
    if not isinstance(nouns, list) or not nouns or not all(type(noun) is int for noun in nouns):
        raise SourceError(f"{where}: column 'all_noun_classes' is {given!r}, expected a list such as [2, 5]: fix it")
    return {"verb": whole_number(row, "verb_class", where), "nouns": sorted(set(nouns))}
