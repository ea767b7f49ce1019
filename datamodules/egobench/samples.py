"""Samples of a benchmark, as they come from its official files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TaskName = Literal["choice", "open", "vocabulary", "rank_texts", "rank_clips"]
"""``choice``: choose one of the sample's options. ``open``: answer in a few words. ``vocabulary``: choose one of the
benchmark's candidates as the answer. ``rank_texts``: rank the benchmark's candidates as descriptions of the clip.
``rank_clips``: choose the clip that the sample's text describes."""


@dataclass(frozen=True)
class Clip:
    """The part of a video that a sample shows.

    Attributes:
        video: file below the benchmark's folder of videos.
        start_s, end_s: seconds; an end of infinity stands for the end of the file.
        last_at_end: the last frame is the one at ``end_s``, and no later frame is ever decoded.
    """

    video: str
    start_s: float = 0.0
    end_s: float = math.inf
    last_at_end: bool = False


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        id: unique within the benchmark.
        clips: the choices of ``rank_clips``, else one clip.
        text: the question; the text whose clip is sought; "" in ``rank_texts``.
        options: of a ``choice``, in the order in which they are shown.
        answer: index of the right option or clip, or the answer in words; None if it is hidden or not a single one.
        groups: names of the sub-scores that the sample counts in, such as ``intra`` or ``direct``.
        labels: source of the relevance in ``rank_texts``, as JSON: Charades-Ego ``{"classes": [3, 77]}``, MIR
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
    """A text of ``vocabulary`` or ``rank_texts`` that all samples share.

    Attributes:
        text: the words.
        labels: like those of a sample; Charades-Ego ``{"class": 3}``.
        of: id of the sample that it was written for; "" for none.
    """

    text: str
    labels: Mapping[str, Any] | None = None
    of: str = ""
