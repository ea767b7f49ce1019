"""Held-out questions: what counts as right, what guessing would score, and the mean over clips."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.batch import Question


@dataclass(frozen=True)
class Outcome:
    """How one question about one clip in one view was answered.

    Attributes:
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
        """As a JSON object."""
        return asdict(self)


def normalise(text: str) -> str:
    """Lower case, no punctuation but hyphens, single spaces."""
    return " ".join(re.findall(r"[\w-]+", text.lower()))


def judge_text(question: Question, prediction: str, **where: Any) -> Outcome:
    """Exact match after ``normalise``, and for each named part whether its words occur in the answer."""
    said = normalise(prediction)
    scores = {question.task: float(said == normalise(question.answer))}
    for name, words in question.parts.items():
        scores[f"{question.task}_{name}"] = float(f" {normalise(words)} " in f" {said} ")
    if question.task.startswith("qa_"):
        scores["qa"] = scores[question.task]
    return Outcome(
        task=question.task,
        question=question.question,
        answer=question.answer,
        prediction=prediction,
        scores=scores,
        **where,
    )


def judge_choice(question: Question, log_p: list[tuple[float, int]], **where: Any) -> Outcome:
    """The option with the highest mean log-likelihood per token is the answer; ``loss`` is that of the true one."""
    means = [total / max(count, 1) for total, count in log_p]
    best = max(range(len(means)), key=means.__getitem__)
    true = question.options.index(question.answer)
    return Outcome(
        task=question.task,
        question=question.question,
        answer=question.answer,
        prediction=question.options[best],
        scores={question.task: float(best == true), "loss": -means[true]},
        **where,
    )


def chance_levels(questions: Iterable[Question]) -> dict[str, float]:
    """What the best answer that ignores the clip scores: the most frequent one, or one of n options."""
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


def score_names(questions: Iterable[Question], views: Iterable[str]) -> list[str]:
    """``<view>_<score>`` of every score that the questions can get."""
    names: dict[str, None] = {}
    for question in questions:
        outcome = (
            judge_choice(question, [(0.0, 1)] * len(question.options), clip="", ego_visible=True, view="")
            if question.options
            else judge_text(question, "", clip="", ego_visible=True, view="")
        )
        names |= dict.fromkeys(outcome.scores)
    return [f"{view}_{name}" for view in views for name in names]


class HeldOutMeans(Metric):
    """Means of named scores, exact over ranks that saw different clips.

    Args:
        names: ``<view>_<score>`` of everything that can occur.
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.index = {name: position for position, name in enumerate(names)}
        self.add_state("total", torch.zeros(len(self.index), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.index), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.update([(f"{outcome.view}_{name}", score) for name, score in outcome.scores.items()])

    def update(self, scores: list[tuple[str, float]]) -> None:
        """Count scores by name."""
        for name, score in scores:
            self.total[self.index[name]] += score
            self.count[self.index[name]] += 1

    def compute(self) -> dict[str, Tensor]:
        """Means of the names that occurred."""
        pairs = zip(self.index, self.total, self.count, strict=True)
        return {name: (total / count).float() for name, total, count in pairs if count > 0}
