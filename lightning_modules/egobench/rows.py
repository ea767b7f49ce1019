"""Answers of a model as rows of a predictions file, from which every score can be computed, see ``scores``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from datamodules.egobench import LoadedBenchmark
from datamodules.egobench.samples import Sample
from lightning_modules.egobench.scores import Score, score

Answer = dict[str, Any]
"""What ``Evaluator.evaluate`` returns for one request."""


def sample_row(loaded: LoadedBenchmark, sample: Sample, answers: Sequence[Answer]) -> dict[str, Any]:
    """A line of the predictions, from the answers about each of a sample's clips in their order."""
    row: dict[str, Any] = {"id": sample.id}
    if loaded.task == "rank_texts":
        row["labels"] = sample.labels
    else:
        row |= {"groups": sample.groups, "answer": sample.answer}
    if loaded.task == "choice":
        row["options"] = sample.options
    if loaded.task in ("open", "vocabulary"):
        row["question"] = sample.text
    if loaded.task == "rank_clips":
        return row | {"scores": [answer["scores"][0] for answer in answers]}
    return row | {key: value for key, value in answers[0].items() if key not in ("id", "clip")}


def text_rows(loaded: LoadedBenchmark, priors: Sequence[float] | None) -> list[dict[str, Any]]:
    """Lines of the candidates that all samples share."""
    return [
        {"text": text.text, "labels": text.labels, "prior": None if priors is None else priors[number]}
        for number, text in enumerate(loaded.candidates)
    ]


def header(
    loaded: LoadedBenchmark, missing: dict[str, str], settings: dict[str, Any], invented: bool = False
) -> dict[str, Any]:
    """What the rows do not say.

    Args:
        loaded: the benchmark.
        missing: samples that could not be asked, and why.
        settings: how the others were.
        invented: the samples are of a generated world.
    """
    return {
        "benchmark": loaded.name,
        "task": loaded.task,
        "total": loaded.total,
        "missing": missing,
        "settings": settings,
        "invented": invented,
    }


def score_answers(loaded: LoadedBenchmark, answers: Iterable[Answer]) -> list[Score]:
    """Score what was answered so far; samples of which something is not do not count."""
    found: dict[str, dict[int, Answer]] = defaultdict(dict)
    for answer in answers:
        if "problem" not in answer:
            found[answer["id"]][answer["clip"]] = answer
    whole = [sample for sample in loaded.samples if len(found[sample.id]) == len(sample.clips)]
    rows = [
        sample_row(loaded, sample, [found[sample.id][place] for place in range(len(sample.clips))]) for sample in whole
    ]
    priors = found[""][0]["priors"] if "" in found else None
    missing = {sample.id: "not asked" for sample in loaded.samples if len(found[sample.id]) < len(sample.clips)}
    return score(header(loaded, missing, {}), rows, text_rows(loaded, priors))
