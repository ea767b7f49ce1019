"""Scores of validation questions: correct or not, the level of guessing, and means over clips and ranks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from datamodules.batch import Question
from lightning_modules.distributed import gather_objects


@dataclass(frozen=True)
class Prediction:
    """The answer to one question about one clip in one view.

    Attributes:
        clip: name of the clip.
        view: ``ego`` or ``exo``.
        ego_visible: whether the egocentric camera sees the action.
        task: ``caption``, ``choice`` or ``qa_<kind>``.
        question, answer: the question and its correct answer.
        prediction: the model's answer.
        scores: metric name (without the view) to 0 or 1; ``loss`` is in nats per token.
    """

    clip: str
    view: str
    ego_visible: bool
    task: str
    question: str
    answer: str
    prediction: str
    scores: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)


def normalise(text: str) -> str:
    """Convert to lower case without punctuation except hyphens, with single spaces."""
    return " ".join(re.findall(r"[\w-]+", text.lower()))


def score_text(question: Question, prediction: str, **clip: Any) -> Prediction:
    """Score a free answer: exact match after ``normalise``, and for each named part whether its words occur.

    Args:
        question: with the correct answer.
        prediction: the model's answer.
        **clip: fields of ``Prediction`` about the clip.
    """
    given = normalise(prediction)
    scores = {question.task: float(given == normalise(question.answer))}
    for name, words in question.parts.items():
        scores[f"{question.task}_{name}"] = float(f" {normalise(words)} " in f" {given} ")
    if question.task.startswith("qa_"):
        scores["qa"] = scores[question.task]
    return Prediction(
        task=question.task,
        question=question.question,
        answer=question.answer,
        prediction=prediction,
        scores=scores,
        **clip,
    )


def score_choice(question: Question, log_p: list[tuple[float, int]], **clip: Any) -> Prediction:
    """Choose the option with the highest mean log-likelihood per token; ``loss`` is that of the correct option.

    Args:
        question: with options.
        log_p: log-likelihood in nats and number of tokens of each option.
        **clip: fields of ``Prediction`` about the clip.
    """
    means = [total / max(count, 1) for total, count in log_p]
    best = max(range(len(means)), key=means.__getitem__)
    correct = question.options.index(question.answer)
    return Prediction(
        task=question.task,
        question=question.question,
        answer=question.answer,
        prediction=question.options[best],
        scores={question.task: float(best == correct), "loss": -means[correct]},
        **clip,
    )


def chance_levels(questions: Iterable[Question]) -> dict[str, float]:
    """Return the score of the best answer that ignores the clip: the most frequent one, or one of n options."""
    given: dict[str, list[str]] = defaultdict(list)
    choices: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        if question.options:
            choices[question.task].append(1 / len(question.options))
            continue
        given[question.task].append(normalise(question.answer))
        for name, words in question.parts.items():
            given[f"{question.task}_{name}"].append(normalise(words))
    levels = {task: sum(values) / len(values) for task, values in choices.items()}
    majority = {task: Counter(values).most_common(1)[0][1] for task, values in given.items()}
    levels |= {task: majority[task] / len(values) for task, values in given.items()}
    if kinds := [task for task in given if task.startswith("qa_")]:
        levels["qa"] = sum(majority[task] for task in kinds) / sum(len(given[task]) for task in kinds)
    return levels


class QAResults:
    """Predictions of one evaluation on this rank, with means and lists over all ranks."""

    def __init__(self) -> None:
        self.predictions: list[Prediction] = []

    def means(self) -> dict[str, float]:
        """Return the mean of every score as ``<view>_<score>``, weighted by clips; all ranks have to call this."""
        return {name: mean for name, (mean, _) in self.means_and_counts().items()}

    def means_and_counts(self) -> dict[str, tuple[float, int]]:
        """Return the mean of every score and the number of its answers; all ranks have to call this."""
        sums: dict[str, tuple[float, int]] = {}
        for of_rank in gather_objects(self._sums()):
            for name, (total, count) in of_rank.items():
                before, number = sums.get(name, (0.0, 0))
                sums[name] = before + total, number + count
        # Rounded to float32, as all metrics of a Trainer are.
        return {name: (float(torch.tensor(total / count)), count) for name, (total, count) in sums.items()}

    def all_predictions(self) -> list[Prediction]:
        """Return the predictions of all ranks, sorted by clip and view; all ranks have to call this."""
        gathered: list[Prediction] = []
        for of_rank in gather_objects(self.predictions):
            gathered += of_rank
        return sorted(gathered, key=lambda prediction: (prediction.clip, prediction.view))

    def _sums(self) -> dict[str, tuple[float, int]]:
        """Return sum and number of every score of this rank."""
        sums: dict[str, tuple[float, int]] = {}
        for prediction in self.predictions:
            for name, score in prediction.scores.items():
                total, count = sums.get(f"{prediction.view}_{name}", (0.0, 0))
                sums[f"{prediction.view}_{name}"] = total + score, count + 1
        return sums
