"""Compute the scores of a benchmark from its prediction rows, or from results while a stage validates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from datamodules.egobench import LoadedBenchmark
from lightning_modules.egobench.fields import PlacedRow, Row
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks import TASKS, Task
from lightning_modules.egobench.tasks.base import Prediction, Result


def header_fields(
    loaded: LoadedBenchmark, missing: dict[str, str], settings: dict[str, Any], invented: bool = False
) -> dict[str, Any]:
    """Return the content of a header file, see ``scores``.

    Args:
        loaded: the benchmark.
        missing: samples that could not be evaluated, and why.
        settings: everything that the results depend on.
        invented: whether the samples are of a generated world.
    """
    return {
        "benchmark": loaded.name,
        "task": loaded.task,
        "total": loaded.total,
        "missing": missing,
        "settings": settings,
        "invented": invented,
    }


def candidate_rows(loaded: LoadedBenchmark, priors: Sequence[float] | None) -> list[dict[str, Any]]:
    """Return the rows of the texts file."""
    rows: list[dict[str, Any]] = []
    for index, candidate in enumerate(loaded.candidates):
        prior = None if priors is None else priors[index]
        rows.append({"text": candidate.text, "labels": candidate.labels, "prior": prior})
    return rows


def score_results(loaded: LoadedBenchmark, results: Iterable[Result]) -> list[Score]:
    """Score the results so far; samples of which a clip is missing do not count.

    Args:
        loaded: the benchmark.
        results: outputs of ``Evaluator.evaluate``, in any order.
    """
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for result in results:
        if "problem" not in result:
            found[result["id"]][result["clip"]] = result
    rows, missing = [], {}
    for sample in loaded.samples:
        clips = found[sample.id]
        if len(clips) == len(sample.inputs):
            rows.append(TASKS[loaded.task].row(sample, [clips[index] for index in range(len(clips))]))
        else:
            missing[sample.id] = "not asked"
    priors = found[""][0]["priors"] if "" in found else None
    return score(header_fields(loaded, missing, {}), rows, candidate_rows(loaded, priors))


def score(header: Row, rows: Iterable[Row], candidates: Iterable[Row] = ()) -> list[Score]:
    """Compute all scores of one benchmark; the order of the rows does not matter.

    Args:
        header: content of the header file.
        rows: of the predictions file.
        candidates: rows of the texts file.

    Raises:
        ValueError: the message names row, field and how to fix it.
    """
    return score_rows(
        Header.read(header, "header"),
        ((f"row {number}", row) for number, row in enumerate(rows, 1)),
        [(f"text {number}", row) for number, row in enumerate(candidates, 1)],
        "header",
    )


def task_of(header: Header, where: str) -> Task:
    """Return the task of a header.

    Raises:
        ValueError: there is no task of that name.
    """
    if header.task not in TASKS:
        raise ValueError(f"{where}: field 'task' is {header.task!r}, expected one of {', '.join(TASKS)}")
    return TASKS[header.task]


def score_rows(header: Header, rows: Iterable[PlacedRow], candidates: Sequence[PlacedRow], where: str) -> list[Score]:
    """Compute the same as ``score`` from rows with their places, which messages name; ``where`` is the header's.

    Raises:
        ValueError: the message names place, field and how to fix it.
    """
    task = task_of(header, where)
    if bool(candidates) != task.shares_candidates:
        problem = "which has no texts file" if candidates else "and the texts file is missing or empty"
        raise ValueError(f"{header.benchmark}: task is {header.task}, {problem}: evaluate the benchmark again")
    predictions: list[Prediction] = []
    places: dict[str, str] = {}
    for place, row in rows:
        prediction = task.parse(row, place, candidates)
        name = prediction.id
        if name in places:
            raise ValueError(f"{place}: field 'id' is {name!r} as in {places[name]}: remove one of the two")
        if name in header.missing:
            raise ValueError(
                f"{place}: field 'id' is {name!r}, which the header lists as missing: remove it from that list"
            )
        places[name] = place
        predictions.append(prediction)
    if len(predictions) > header.total:
        raise ValueError(
            f"{header.benchmark}: {len(predictions)} rows, but the header's field 'total' is {header.total}: fix it"
        )
    predictions.sort(key=lambda prediction: prediction.id)
    scores = task.score(header, predictions, candidates) if predictions else []
    if len(predictions) < header.total:
        scores.append(header.asked(len(predictions)))
    return scores
