"""The interface of a benchmark task type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from numpy.typing import NDArray

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from lightning_modules.egobench.fields import PlacedRow, Row
from lightning_modules.egobench.metrics import ChoiceAccuracy
from lightning_modules.egobench.scores import Header, Score

Result = dict[str, Any]
"""The output of ``Evaluator.evaluate`` for one instance: ``id``, ``clip`` and a field per request."""


@dataclass(frozen=True)
class Prediction:
    """One validated row of a predictions file.

    Attributes:
        id: the sample.
        where: place of the row, for messages.
        groups: sub-scores that the sample counts in.
        answer: the right answer as in ``Sample``; None if it is hidden.
        scores: fields of numbers, by name.
        texts: fields of text, by name.
        options: texts of the options, if the row has them.
        labels: of ``rank_texts``.
    """

    id: str
    where: str
    groups: Sequence[str] = ()
    answer: Any = None
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    labels: Row = field(default_factory=dict)


class Task(ABC):
    """A type of benchmark question: its requests to the model, its row in the predictions, and its scores.

    One object serves all benchmarks of the type; it holds no state.
    """

    name: ClassVar[str]
    """Name in benchmark classes and prediction files."""
    shares_candidates: ClassVar[bool] = False
    """Whether all samples are scored against the benchmark's own list of candidates."""
    asks_for_captions: ClassVar[bool] = False
    """Whether texts are scored as captions, after ``egobench.caption``, rather than as answers to a question."""
    cross_checks: ClassVar[bool] = False
    """Whether some samples are also answered by generation, see ``egobench.cross_check``."""

    @abstractmethod
    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Build the requests about one clip of a sample, by the name of the field that holds the result.

        Runs in the data workers.
        """

    def prior_requests(self, encoder: RequestEncoder) -> dict[str, Request]:
        """Build the requests without a clip that all samples share; none by default."""
        return {}

    @abstractmethod
    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return a sample's row of the predictions file, from the results for its clips in their order."""

    @abstractmethod
    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row that ``row`` wrote.

        Raises:
            ValueError: the message names place, field and how to fix it.
        """

    @abstractmethod
    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute all scores of a benchmark from at least one prediction, sorted by id.

        Raises:
            ValueError: a row of the candidates is wrong.
        """


def requested(result: Result) -> dict[str, Any]:
    """Return the fields of a result that hold outputs of requests."""
    return {name: value for name, value in result.items() if name not in ("id", "clip")}


def accuracies(header: Header, name: str, predictions: Sequence[Prediction], field_name: str) -> list[Score]:
    """Score the argmax of a field against the right option, over all samples and by group.

    Args:
        header: of the file.
        name: of the metric.
        predictions: those with a hidden answer, or without the field, are not counted.
        field_name: field of ``Prediction.scores``, float [rotations, options].
    """
    scored = [each for each in predictions if each.answer is not None and field_name in each.scores]
    if not scored:
        return []
    groups = sorted({group for each in scored for group in each.groups})
    metric = ChoiceAccuracy(groups, alone=True)
    for index, each in enumerate(scored):
        metric.update(index, each.scores[field_name], each.answer, each.groups)
    estimates = metric.compute()
    return [header.score(key.replace("accuracy", name, 1), number, len(scored)) for key, number in estimates.items()]
