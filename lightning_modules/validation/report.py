"""The table that shows what each stage brought: from every finished stage's ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.validation.scores import Prediction

SCORES = {
    "caption": "caption, exact match",
    "caption_verb": "caption, verb",
    "caption_object": "caption, object",
    "caption_colour": "caption, colour",
    "caption_hand": "caption, hand",
    "choice": "four-way choice",
    "qa": "questions, all",
}
VIEWS = {"exo": "exocentric", "ego": "egocentric"}


def write_metrics(folder: Path, stage: str, clips: int, metrics: dict[str, float], chance: dict[str, float]) -> None:
    """Write ``metrics.json`` of one stage."""
    content = {"stage": stage, "clips": clips, "metrics": metrics, "chance": chance}
    (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write every answer as a line of JSON."""
    file.write_text("".join(json.dumps(prediction.record()) + "\n" for prediction in predictions), encoding="utf-8")


def write_report(runs: Path) -> str:
    """Join the stages' metrics into ``results.json`` and ``results.md`` beside them.

    Args:
        runs: folder of one experiment, with a folder for each stage.

    Returns:
        The Markdown table, in per cent.

    Raises:
        ValueError: no stage has been evaluated.
    """
    files = sorted(runs.glob("stage*/metrics.json"))
    stages = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    if not stages:
        raise ValueError(f"{runs}: no stage has been evaluated: run `make stage1` first")
    table = _table(stages)
    (runs / "results.json").write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    (runs / "results.md").write_text(table + "\n", encoding="utf-8")
    return table


def _table(stages: dict[str, dict[str, Any]]) -> str:
    chance = next(iter(stages.values()))["chance"]
    names = SCORES | {name: f"questions, {name.removeprefix('qa_')}" for name in chance if name.startswith("qa_")}
    clips = next(iter(stages.values()))["clips"]
    rows = [["view", f"held-out, {clips} clips", "chance", *stages]]
    for view, view_name in VIEWS.items():
        for name, title in names.items():
            values = [stage["metrics"].get(f"{view}_{name}") for stage in stages.values()]
            if name in chance and any(value is not None for value in values):
                rows.append([view_name, title, *(_per_cent(value) for value in (chance[name], *values))])
    return markdown_table(rows, left=2)


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows, the head first, as a table that also reads well unrendered; all but ``left`` columns lean right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if i < left else ":") for i, width in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
