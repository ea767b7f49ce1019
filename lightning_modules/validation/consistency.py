"""Compare the answers to one question that are read from y, from x, from F(x), and from x and F(x) together.

As in EgoExo-Con (arXiv 2510.26113), which asks about two synchronised views: a model may be right about each more often
than it gives the same answer to both. Captions are left out, as two of them hardly ever agree word for word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_modules.distributed import gather_objects
from lightning_modules.validation.scores import Prediction, normalise

INPUTS = {"y": "y", "x": "x", "mapped": "F(x)", "both": "both"}
"""Visual inputs that the language model may answer from, with their titles."""


@dataclass(frozen=True)
class Comparison:
    """The answers to one question from each visual input that a stage has, by the names of ``INPUTS``.

    Attributes:
        clip, ego_visible, task, question, answer: see ``Prediction``.
        given: the model's answers.
        right: which of them are correct.
    """

    clip: str
    ego_visible: bool
    task: str
    question: str
    answer: str
    given: dict[str, str]
    right: dict[str, bool]

    def record(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)

    def same(self, *inputs: str) -> bool:
        """Return whether some inputs, all by default, lead to the same answer, up to case and punctuation."""
        return len({normalise(self.given[name]) for name in inputs or self.given}) == 1


def compare(predictions: Mapping[str, Sequence[Prediction]]) -> list[Comparison]:
    """Join the answers to the same questions.

    Args:
        predictions: of each visual input, all about the same questions in the same order.
    """
    comparisons = []
    for answers in zip(*predictions.values(), strict=True):
        first, by_input = answers[0], dict(zip(predictions, answers, strict=True))
        given = {name: answer.prediction for name, answer in by_input.items()}
        right = {name: answer.scores[answer.task] == 1 for name, answer in by_input.items()}
        comparisons.append(
            Comparison(first.clip, first.ego_visible, first.task, first.question, first.answer, given, right)
        )
    return comparisons


def of_all_ranks(comparisons: list[Comparison]) -> list[Comparison]:
    """Return the comparisons of all ranks, sorted by clip; all ranks have to call this."""
    gathered: list[Comparison] = []
    for of_rank in gather_objects(comparisons):
        gathered += of_rank
    return sorted(gathered, key=lambda comparison: comparison.clip)


def shares(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float]]:
    """Return numbers by kind of question.

    Returns:
        For each task, and for ``qa``, which is every ``qa_<kind>`` together: ``n`` questions, and the shares of them
        that are answered correctly from each input (``right_<input>``) and from all (``right``), and alike from all
        (``same``) and from an input and all that the learner reads (``same_<input>``).
    """
    by_task: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_task.setdefault(comparison.task, []).append(comparison)
        if comparison.task.startswith("qa_"):
            by_task.setdefault("qa", []).append(comparison)
    return {task: _shares(by_task[task]) for task in sorted(by_task)}


def _shares(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Return the numbers of one kind of question."""
    count, inputs = len(comparisons), list(comparisons[0].given)
    found = {"n": float(count)}
    for name in inputs:
        found[f"right_{name}"] = sum(comparison.right[name] for comparison in comparisons) / count
    whole = inputs[-1]
    for name in inputs[:-1]:
        found[f"same_{name}"] = sum(comparison.same(name, whole) for comparison in comparisons) / count
    found["same"] = sum(comparison.same() for comparison in comparisons) / count
    found["right"] = sum(all(comparison.right.values()) for comparison in comparisons) / count
    return found
