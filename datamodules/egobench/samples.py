"""What the eight benchmarks have in common once their official files are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from datamodules.io.annotations import Counts, Official, SourceError

Task = Literal["choice", "open", "vocabulary", "rank_texts", "rank_clips"]
"""``choice``: choose one of the sample's options. ``open``: answer in a few words. ``vocabulary``: choose one of the
benchmark's candidates as the answer. ``rank_texts``: rank the benchmark's candidates as descriptions of the clip.
``rank_clips``: choose the clip that the sample's text describes."""


@dataclass(frozen=True)
class Clip:
    """Pictures of a sample.

    Attributes:
        video: file below the benchmark's folder of videos.
        start_s, end_s: seconds; an end of infinity stands for the end of the file.
        last_at_end: the last picture is the one shown at ``end_s``, and none after it is ever read.
    """

    video: str
    start_s: float = 0.0
    end_s: float = math.inf
    last_at_end: bool = False


@dataclass(frozen=True)
class Sample:
    """One thing that is asked.

    Attributes:
        id: unique within the benchmark.
        clips: the candidates of ``rank_clips``, else one.
        text: the question; the text whose clip is sought; "" in ``rank_texts``.
        options: of a ``choice``, in the order in which they are shown.
        answer: number of the right option or clip, or the answer's words; None where it is hidden or not one thing.
        groups: names of the sub-scores that the sample counts in, such as ``intra`` or ``direct``.
        labels: what relevance is computed from in ``rank_texts``, as JSON: Charades-Ego ``{"classes": [3, 77]}``, MIR
            ``{"verb": 0, "nouns": [2, 5]}``.
    """

    id: str
    clips: tuple[Clip, ...]
    text: str = ""
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    groups: tuple[str, ...] = ()
    labels: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Candidate:
    """A candidate of ``vocabulary`` or ``rank_texts``.

    Attributes:
        text: the words.
        labels: as those of a sample; Charades-Ego ``{"class": 3}``.
        of: id of the sample that it was written for; "" for none.
    """

    text: str
    labels: Mapping[str, Any] | None = None
    of: str = ""


class Benchmark(Protocol):
    """A benchmark read from its official files; its class is a dataclass whose fields are keys of the YAML list.

    ``official.OfficialFiles`` has a default for all but ``read``.

    Attributes:
        videos: folder that the clips' files are below.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    videos: Path

    def official(self) -> Mapping[str, Official]:
        """Known numbers of what ``read`` counts, and of ``samples`` and ``candidates``."""

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Every sample in the order of the file; a row that is wrong is given as its error.

        Raises:
            SourceError: a file is missing or none of its rows can be read.
        """

    def candidates(self) -> Sequence[Candidate]:
        """Candidates that all samples share; none for ``choice``, ``open`` and ``rank_clips``."""

    def fast(self, samples: Sequence[Sample], candidates: Sequence[Candidate]) -> tuple[list[Sample], list[Candidate]]:
        """A fixed part for curves while training (and its candidates), drawn by a seed that never changes."""

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """What a reader of the scores should know, given what ``read`` counted."""

    def submission(self, samples: Sequence[Sample], predictions: Mapping[str, int]) -> dict[str, str]:
        """Files that the authors' server takes, by name; none where it has none.

        Args:
            samples: all of the benchmark.
            predictions: number of the option chosen, for each of them.
        """
