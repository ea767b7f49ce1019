"""Write the scores of a stage, and a table of all stages of an experiment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.validation.consistency import INPUTS, Comparison
from lightning_modules.validation.scores import Prediction

VIEWS = {"exo": "exocentric", "ego": "egocentric"}
GROUPS = ("caption", "choice", "qa")
"""Kinds of validation questions in the order of the table."""
_CONSISTENCY = (
    "Per cent of answers that are right from y (exocentric), from x and F(x) alone and from both; that are the same as "
    "from all that the learner reads; and that are the same, or right, from each of these."
)
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def write_metrics(
    folder: Path,
    stage: str,
    clips: int,
    metrics: dict[str, float],
    chance: dict[str, float],
    consistency: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write ``metrics.json`` of one stage; ``consistency`` is what ``validation.consistency.shares`` returns."""
    content = {"stage": stage, "clips": clips, "metrics": metrics, "chance": chance}
    if consistency:
        content["consistency"] = consistency
    (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_predictions(file: Path, predictions: Iterable[Prediction | Comparison]) -> None:
    """Write every answer as a line of JSON."""
    file.write_text("".join(json.dumps(prediction.record()) + "\n" for prediction in predictions), encoding="utf-8")


def write_report(runs: Path) -> str:
    """Join the stages' metrics in ``results.json`` and ``results.md`` of the experiment.

    Args:
        runs: folder of an experiment, with a folder for each stage.

    Returns:
        The Markdown table, in per cent, and that of the consistency of answers if a stage has any.

    Raises:
        ValueError: no stage has been evaluated.
    """
    files = sorted(runs.glob("*/metrics.json"))
    stages = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if not stages:
        raise ValueError(f"{runs}: no stage has been evaluated: run `make stage1` first")
    table = "\n\n".join(filter(None, [_table(stages), consistency_table(stages)]))
    (runs / "results.json").write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    (runs / "results.md").write_text(table + "\n", encoding="utf-8")
    return table


def _table(stages: dict[str, dict[str, Any]]) -> str:
    first = next(iter(stages.values()))
    chance, clips = first["chance"], first["clips"]
    rows = [["view", f"held-out, {clips} clips", "chance", *stages]]
    for view, view_name in VIEWS.items():
        for score in _ordered(chance):
            values = [stage["metrics"].get(f"{view}_{score}") for stage in stages.values()]
            if any(value is not None for value in values):
                title = _title(score, chance[score])
                rows.append([view_name, title, *(_per_cent(value) for value in (chance[score], *values))])
    return markdown_table(rows, left=2)


def consistency_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of the answers from each visual input, with a line about it; empty without any.

    Args:
        stages: content of ``metrics.json`` by stage.
    """
    chosen = [
        (stage, task, found)
        for stage, content in stages.items()
        for task, found in content.get("consistency", {}).items()
        if task in GROUPS
    ]
    inputs = [name for name in INPUTS if any(f"right_{name}" in found for _, _, found in chosen)]
    alone = [name for name in inputs if any(f"same_{name}" in found for _, _, found in chosen)]
    right, same = [f"right: {INPUTS[name]}" for name in inputs], [f"same: {INPUTS[name]}" for name in alone]
    rows = [["stage", "questions", "n", *right, *same, "all same", "all right"]]
    keys = [*(f"right_{name}" for name in inputs), *(f"same_{name}" for name in alone), "same", "right"]
    for stage, task, found in chosen:
        title = _title(task, stages[stage]["chance"].get(task, 0.0))
        rows.append([stage, title, f"{found['n']:.0f}", *(_per_cent(found.get(key)) for key in keys)])
    return f"{_CONSISTENCY}\n\n{markdown_table(rows, left=2)}" if chosen else ""


def score_table(scores: Mapping[str, tuple[float, int]], chance: Mapping[str, float]) -> str:
    """Return a Markdown table of one stage's scores in per cent, with their standard errors.

    Args:
        scores: mean and number of answers, by name with the view, such as ``ego_choice``.
        chance: the best score that ignores the clips, by name without the view.
    """
    rows = [["view", "questions", "answers", "chance", "score", "standard error"]]
    for view, view_name in VIEWS.items():
        for score in _ordered(chance):
            if f"{view}_{score}" in scores:
                mean, count = scores[f"{view}_{score}"]
                error = math.sqrt(mean * (1 - mean) / count)
                cells = [_per_cent(value) for value in (chance[score], mean, error)]
                rows.append([view_name, _title(score, chance[score]), str(count), *cells])
    return markdown_table(rows, left=2)


def _ordered(scores: Iterable[str]) -> list[str]:
    """Sort scores by kind of question, the score of all questions of a kind first."""

    def key(score: str) -> tuple[int, bool]:
        kind, _, part = score.partition("_")
        return GROUPS.index(kind) if kind in GROUPS else len(GROUPS), bool(part)

    return sorted(scores, key=key)


def _title(score: str, chance: float) -> str:
    """Describe a score, such as ``caption_verb``."""
    kind, _, part = score.partition("_")
    if kind == "caption":
        return f"caption, {part or 'exact match'}"
    if kind == "qa":
        return f"questions, {part or 'all'}"
    ways = round(1 / chance) if chance else 0
    return f"{NUMBERS.get(ways, str(ways))}-way choice" if kind == "choice" else score


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with padded cells.

    Args:
        rows: cells; the first row is the head.
        left: number of columns that are aligned to the left; the others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if i < left else ":") for i, width in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
