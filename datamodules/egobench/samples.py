"""Samples of a benchmark, as they come from its official files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.io.conversation import VIDEO_TAG

TaskName = Literal["choice", "open", "vocabulary", "rank_texts", "rank_clips", "cross_view"]
"""``choice``: choose one of the sample's options. ``cross_view``: the same, from each view alone and from both.
``open``: answer in a few words. ``vocabulary``: choose one of the benchmark's candidates as the answer. ``rank_texts``:
rank the benchmark's candidates as descriptions of the clip. ``rank_clips``: choose the clip that the sample's text
describes."""
View = Literal["ego", "exo"]


@dataclass(frozen=True)
class Clip:
    """The part of a video that a sample shows.

    Attributes:
        video: file below the benchmark's folder of videos.
        start_s, end_s: seconds; an end of infinity stands for the end of the file.
        last_at_end: the last frame is the one at ``end_s``, and no later frame is ever decoded.
        view: camera that filmed it.
    """

    video: str
    start_s: float = 0.0
    end_s: float = math.inf
    last_at_end: bool = False
    view: View = field(default="ego", repr=False)  # predictions are recognised by the repr of their samples


@dataclass(frozen=True)
class VideoInput:
    """The clips that a model reads one after the other when it is asked once.

    Attributes:
        clips: in the order of the prompt.
        labels: text in front of each clip; none by default.
    """

    clips: tuple[Clip, ...]
    labels: tuple[str, ...] = ()

    @property
    def views(self) -> str:
        """Return ``ego``, ``exo`` or ``both``."""
        views = {clip.view for clip in self.clips}
        return "both" if len(views) > 1 else views.pop()

    @property
    def text(self) -> str:
        """Return the clips' tags with their labels, as they stand in front of a question."""
        labels = self.labels or [""] * len(self.clips)
        return "\n".join(f"{label} {VIDEO_TAG}".strip() for label in labels)


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        id: unique within the benchmark.
        clips: the choices of ``rank_clips``, else one clip, or all clips of ``shown``.
        text: the question; the text whose clip is sought; "" in ``rank_texts``.
        options: of a ``choice``, in the order in which they are shown.
        answer: index of the right option or clip, or the answer in words; None if it is hidden or not a single one.
        groups: names of the sub-scores that the sample counts in, such as ``intra`` or ``direct``.
        labels: source of the relevance in ``rank_texts``, as JSON: Charades-Ego ``{"classes": [3, 77]}``, MIR
            ``{"verb": 0, "nouns": [2, 5]}``.
        shown: the clips that are read at once, for each time that the sample is asked; by default each clip alone.
    """

    id: str
    clips: tuple[Clip, ...]
    text: str = ""
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    groups: tuple[str, ...] = ()
    labels: Mapping[str, Any] | None = None
    shown: tuple[VideoInput, ...] = field(default=(), repr=False)

    @property
    def inputs(self) -> tuple[VideoInput, ...]:
        """Return ``shown``, or each clip alone."""
        return self.shown or tuple(VideoInput((clip,)) for clip in self.clips)


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
