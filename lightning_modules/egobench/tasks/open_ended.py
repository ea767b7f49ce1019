"""Open-ended questions: QAEgo4D open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import TypeAdapter

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import PlacedRow, Row
from lightning_modules.egobench.metrics import Estimate, OpenAnswers, majority, normalise_answer
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, requested

ANSWER_TOKENS = 32


class OpenRow(Record):
    """A row of ``OpenEnded``."""

    id: str
    groups: Sequence[str]
    question: str
    answer: str
    prediction: str


_ROW = TypeAdapter(OpenRow)


class OpenEnded(Task):
    """Answer a question in a few words.

    Row: ``{"id", "groups", "question", "answer": "words", "prediction": "words"}``.

    Scores: those of ``OpenAnswers``; a language model can judge the rows in addition, see ``judge``.
    """

    name: ClassVar[str] = "open"

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for an answer."""
        return {"prediction": encoder.generate_until(encoder.prompts.open(sample), ANSWER_TOKENS)}

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        known = {"id": sample.id, "groups": sample.groups, "answer": sample.answer, "question": sample.text}
        return known | requested(results[0])

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        texts = {"question": parsed.question, "answer": parsed.answer, "prediction": parsed.prediction}
        return Prediction(parsed.id, where, parsed.groups, parsed.answer, texts=texts)

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        return [header.score(name, number, number.n) for name, number in text_estimates(predictions).items()]


def text_estimates(predictions: Sequence[Prediction]) -> dict[str, Estimate]:
    """Compare the generated texts with the answers; chance is that of the most frequent answer."""
    generated = [each.texts["prediction"] for each in predictions]
    answers = [each.texts["answer"] for each in predictions]
    metric = OpenAnswers(alone=True)
    metric.update(range(len(predictions)), generated, answers)
    estimates = metric.compute()
    for name, form in (("em", normalise_answer), ("plain_acc", str)):
        estimates[name] = estimates[name]._replace(chance=majority(answers, form))
    return estimates
