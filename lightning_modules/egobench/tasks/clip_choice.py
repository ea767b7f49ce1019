"""Choice among clips: EgoMCQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from lightning_modules.egobench.fields import PlacedRow, Row, read_answer, read_array, read_text, read_texts
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, accuracies


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
        scores = read_array(row, "scores", where, np.float64)[None]
        groups = read_texts(row, "groups", where)
        if not groups:
            raise ValueError(
                f"{where}: field 'groups' is empty, and only groups are scored: name the sample's, such as inter"
            )
        answer = read_answer(row, where, scores.shape[1])
        return Prediction(read_text(row, "id", where), where, groups, answer, {"scores": scores})

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        return [score for score in accuracies(header, "accuracy", predictions, "scores") if "/" in score.metric]
