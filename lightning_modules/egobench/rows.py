"""Answers of a model as rows of a predictions file, from which every score can be computed, see ``scores``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from datamodules.egobench import Loaded
from datamodules.egobench.item import Item
from lightning_modules.egobench.scores import Score, score

Answer = dict[str, Any]
"""What ``examine`` gives for one request."""


def item_row(loaded: Loaded, item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    """A line of the predictions, from the answers about each of an item's clips in their order."""
    row: dict[str, Any] = {"id": item.id}
    if loaded.task == "rank_texts":
        row["labels"] = item.labels
    else:
        row |= {"groups": item.groups, "answer": item.answer}
    if loaded.task == "choice":
        row["options"] = item.options
    if loaded.task in ("open", "vocabulary"):
        row["question"] = item.text
    if loaded.task == "rank_clips":
        return row | {"scores": [answer["scores"][0] for answer in answers]}
    return row | {key: value for key, value in answers[0].items() if key not in ("id", "clip")}


def text_rows(loaded: Loaded, priors: Sequence[float] | None) -> list[dict[str, Any]]:
    """Lines of the candidates that all items share."""
    return [
        {"text": text.text, "labels": text.labels, "prior": None if priors is None else priors[number]}
        for number, text in enumerate(loaded.texts)
    ]


def header(loaded: Loaded, missing: dict[str, str], settings: dict[str, Any], invented: bool = False) -> dict[str, Any]:
    """What the rows do not say.

    Args:
        loaded: the benchmark.
        missing: items that could not be asked, and why.
        settings: how the others were.
        invented: the items are of a generated world.
    """
    return {
        "benchmark": loaded.name,
        "task": loaded.task,
        "total": loaded.total,
        "missing": missing,
        "settings": settings,
        "invented": invented,
    }


def score_answers(loaded: Loaded, answers: Iterable[Answer]) -> list[Score]:
    """Score what was answered so far; items of which something is not do not count."""
    found: dict[str, dict[int, Answer]] = defaultdict(dict)
    for answer in answers:
        if "problem" not in answer:
            found[answer["id"]][answer["clip"]] = answer
    whole = [item for item in loaded.items if len(found[item.id]) == len(item.clips)]
    rows = [item_row(loaded, item, [found[item.id][place] for place in range(len(item.clips))]) for item in whole]
    priors = found[""][0]["priors"] if "" in found else None
    missing = {item.id: "not asked" for item in loaded.items if len(found[item.id]) < len(item.clips)}
    return score(header(loaded, missing, {}), rows, text_rows(loaded, priors))
