"""Questions answered from a closed vocabulary: EgoTaskQA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Numbers, PlacedRow, Row, to_array
from lightning_modules.egobench.metrics import ChoiceAccuracy, majority, normalise_answer
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, requested
from lightning_modules.egobench.tasks.open_ended import ANSWER_TOKENS, text_estimates

PER_CANDIDATE = "one for each line of the texts file"


class VocabularyRow(Record):
    """A row of ``Vocabulary``."""

    id: str
    groups: Sequence[str]
    question: str
    answer: str
    scores: Numbers
    priors: Numbers
    prediction: str | None = None


class VocabularyText(Record):
    """A row of the texts file."""

    text: str


_ROW, _TEXT = TypeAdapter(VocabularyRow), TypeAdapter(VocabularyText)


class Vocabulary(Task):
    """Choose the answer to a question among the benchmark's candidates.

    Row: ``{"id", "groups", "question", "answer": "words", "scores": [V mean token log-likelihoods], "priors": [V, the
    same without video]}`` and maybe ``"prediction": "generated words"``.

    Scores: ``accuracy`` of scores minus priors and ``accuracy_likelihood`` of scores, both also by group; an answer
    that is no candidate counts as wrong. ``accuracy_binary`` compares the scores of yes and no on the samples whose
    answer is one of them. ``em`` is that of the generated words.
    """

    name: ClassVar[str] = "vocabulary"
    shares_candidates: ClassVar[bool] = True

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for the likelihood of every candidate with and without the clip, and for an answer in words."""
        question = encoder.prompts.open(sample)
        return {
            "scores": encoder.candidate_loglikelihood(question),
            "priors": encoder.candidate_loglikelihood(question, without_video=True),
            "prediction": encoder.generate_until(question, ANSWER_TOKENS),
        }

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        known = {"id": sample.id, "groups": sample.groups, "answer": sample.answer, "question": sample.text}
        return known | requested(results[0])

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        count = len(candidates)
        scores = {
            "scores": to_array(parsed.scores, "scores", where, np.float32, count, PER_CANDIDATE),
            "priors": to_array(parsed.priors, "priors", where, np.float32, count, PER_CANDIDATE),
        }
        texts = {"question": parsed.question, "answer": parsed.answer}
        if parsed.prediction is not None:
            texts["prediction"] = parsed.prediction
        return Prediction(parsed.id, where, parsed.groups, parsed.answer, scores, texts)

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        vocabulary = [validate(_TEXT, row, where).text for where, row in candidates]
        index_of = {text: index for index, text in enumerate(vocabulary)}
        if len(index_of) < len(vocabulary):
            raise ValueError(f"{header.benchmark}: the texts file holds a text twice: remove one")
        chance = _majority_by_group(predictions)
        groups = sorted({group for each in predictions for group in each.groups})
        scores = []
        for name, prior_weight in (("accuracy", 1.0), ("accuracy_likelihood", 0.0)):
            metric = ChoiceAccuracy(groups, alone=True)
            for index, each in enumerate(predictions):
                corrected = each.scores["scores"] - prior_weight * each.scores["priors"]
                metric.update(index, corrected[None], index_of.get(each.answer, -1), each.groups)
            for key, estimate in metric.compute().items():
                estimate = estimate._replace(chance=chance[key.partition("/")[2]])
                scores.append(header.score(key.replace("accuracy", name), estimate, len(predictions)))
        scores += self._binary(header, predictions, index_of)
        generated = [each for each in predictions if "prediction" in each.texts]
        if generated:
            scores.append(header.score("em", text_estimates(generated)["em"], len(generated)))
        return scores

    @staticmethod
    def _binary(header: Header, predictions: Sequence[Prediction], index_of: Mapping[str, int]) -> list[Score]:
        yes = [index for text, index in index_of.items() if normalise_answer(text) == "yes"]
        no = [index for text, index in index_of.items() if normalise_answer(text) == "no"]
        sides = yes + no
        asked = [each for each in predictions if index_of.get(each.answer) in sides]
        if len(sides) != 2 or not asked:
            return []
        metric = ChoiceAccuracy(alone=True)
        for index, each in enumerate(asked):
            metric.update(index, each.scores["scores"][sides][None], sides.index(index_of[each.answer]))
        chance = majority(each.answer for each in asked)
        estimate = metric.compute()["accuracy"]._replace(chance=chance)
        return [header.score("accuracy_binary", estimate, len(predictions), subset=True)]


def _majority_by_group(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Fraction of the most frequent answer in each group; the key of all samples is ""."""
    answers = defaultdict(list)
    for each in predictions:
        for group in ("", *each.groups):
            answers[group].append(each.answer)
    return {group: majority(given) for group, given in answers.items()}
