"""Choice among clips: EgoMCQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Index, Numbers, PlacedRow, Row, check_answer
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, accuracies


class ClipChoiceRow(Record):
    """A row of ``ClipChoice``."""

    id: str
    groups: Sequence[str]
    answer: Index
    scores: Numbers


_ROW = TypeAdapter(ClipChoiceRow)


class ClipChoice(Task):
    """Choose the clip that the sample's text describes.

    Row: ``{"id", "groups": [at least one], "answer": 2, "scores": [n mean token log-likelihoods of the text]}``.

    Scores: ``accuracy/<group>``; there is no average over groups, as in the official metric.
    """

    name: ClassVar[str] = "rank_clips"
    asks_for_captions: ClassVar[bool] = True

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for the likelihood of the text given this clip."""
        return {"scores": encoder.loglikelihood(encoder.config.caption, (sample.text,))}

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        scores = [result["scores"][0] for result in results]
        return {"id": sample.id, "groups": sample.groups, "answer": sample.answer, "scores": scores}

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        if not parsed.groups:
            raise ValueError(
                f"{where}: field 'groups' is empty, and only groups are scored: name the sample's, such as inter"
            )
        check_answer(parsed.answer, len(parsed.scores), where)
        scores = np.asarray(parsed.scores, dtype=np.float64)[None]
        return Prediction(parsed.id, where, parsed.groups, parsed.answer, {"scores": scores})

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        return [score for score in accuracies(header, "accuracy", predictions, "scores") if "/" in score.metric]
