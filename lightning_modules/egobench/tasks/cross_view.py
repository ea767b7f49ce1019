"""The same choice from each view and from both: EgoExoMem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from numpy.typing import NDArray
from pydantic import TypeAdapter

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Index, PlacedRow, Row
from lightning_modules.egobench.metrics import Estimate, binomial_error, option_log_p
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, accuracies, requested
from lightning_modules.egobench.tasks.multiple_choice import MultipleChoice

VIEWS = ("both", "ego", "exo")
FIELDS = {"letters": "", "likelihood": "_likelihood"}
"""Fields of a view, and the endings of their scores."""


class CrossViewRow(Record):
    """A row of ``CrossView``."""

    id: str
    groups: Sequence[str]
    answer: Index | None
    options: Sequence[str] = ()
    views: dict[str, dict[str, Any]]


_ROW = TypeAdapter(CrossViewRow)


class CrossView(Task):
    """Choose one of the sample's options from egocentric video, from exocentric video, and from both.

    Row: ``{"id", "groups", "answer", "options", "views": {"ego": {"letters", "likelihood"}, "exo": ..., "both": ...}}``
    with the fields of ``MultipleChoice``.

    Scores: ``accuracy`` from both views, ``accuracy_ego`` and ``accuracy_exo`` from each alone, all also by group. Two
    scores compare the answers from each view alone: ``same_answer``, the share of samples that are answered alike, and
    ``right_in_both``, of those that are answered correctly twice. A model may be right in each view more often than it
    answers alike. Letters give the plain names, the likelihood of the options' texts those with ``_likelihood``.
    Chance is that of independent random answers: the mean of 1/K, and of 1/K^2 for ``right_in_both``.
    """

    name: ClassVar[str] = "cross_view"
    choice: ClassVar[MultipleChoice] = MultipleChoice()

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for the letters and for the likelihood of each option's text."""
        return self.choice.requests(sample, encoder, cross_check=False)

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        known = {"id": sample.id, "groups": sample.groups, "answer": sample.answer, "options": sample.options}
        views = [shown.views for shown in sample.inputs]
        return known | {"views": {view: requested(result) for view, result in zip(views, results, strict=True)}}

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        if sorted(parsed.views) != sorted(VIEWS):
            raise ValueError(
                f"{where}: field 'views' has {', '.join(parsed.views) or 'none'}, expected {', '.join(VIEWS)}: "
                "evaluate the sample again"
            )
        known = {"id": parsed.id, "groups": parsed.groups, "answer": parsed.answer, "options": parsed.options}
        scores: dict[str, NDArray[Any]] = {}
        for view in VIEWS:
            of_view = self.choice.parse(known | parsed.views[view], f"{where}, view {view}", candidates)
            scores |= {f"{name}_{view}": values for name, values in of_view.scores.items()}
        return Prediction(parsed.id, where, parsed.groups, parsed.answer, scores, options=parsed.options)

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        scores: list[Score] = []
        for view in VIEWS:
            named = "accuracy" if view == "both" else f"accuracy_{view}"
            for field, ending in FIELDS.items():
                scores += accuracies(header, named + ending, predictions, f"{field}_{view}")
        for field, ending in FIELDS.items():
            scores += _consistency(header, predictions, field, ending)
        return scores


def _consistency(header: Header, predictions: Sequence[Prediction], field: str, ending: str) -> list[Score]:
    """Compare the options that a field chooses from each view alone."""
    asked = [each for each in predictions if f"{field}_ego" in each.scores and f"{field}_exo" in each.scores]
    chosen = [[int(option_log_p(each.scores[f"{field}_{view}"]).argmax()) for view in ("ego", "exo")] for each in asked]
    options = [each.scores[f"{field}_ego"].shape[1] for each in asked]
    same = [ego == exo for ego, exo in chosen]
    scores = [_share(header, f"same_answer{ending}", same, [1 / count for count in options])]
    known = [n for n, each in enumerate(asked) if each.answer is not None]
    right = [chosen[n] == [asked[n].answer] * 2 for n in known]
    scores.append(_share(header, f"right_in_both{ending}", right, [options[n] ** -2 for n in known]))
    return [score for score in scores if score is not None]


def _share(header: Header, name: str, found: Sequence[bool], chances: Sequence[float]) -> Score | None:
    n = len(found)
    if not n:
        return None
    share = sum(found) / n
    return header.score(name, Estimate(share, binomial_error(share, n), sum(chances) / n, n), n)
