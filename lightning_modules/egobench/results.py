"""Scores of a folder of predictions, and tables next to the numbers of the paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datamodules.io.jsonl import read_jsonl
from lightning_modules.egobench.fields import PlacedRow
from lightning_modules.egobench.judge import JudgeConfig, judge
from lightning_modules.egobench.published import AVERAGED, MARKS, PAPER, Reported
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.scoring import score_rows, task_of
from lightning_modules.egobench.tasks import TASKS
from lightning_modules.egobench.tasks.open_ended import OpenEnded
from lightning_modules.validation.report import markdown_table

AVERAGE = ("average", "mean of the ten")
SUMMARY = re.compile(
    r"(accuracy|map|ndcg|accuracy_e[gx]o|same_answer|right_in_both)(_likelihood)?|accuracy/int(er|ra)|asked|em|rougeL"
    r"|judge_.*"
)
"""Metrics in the table over stages, complete or partial; each stage's own table has all."""
NO_JUDGE = JudgeConfig()


def score_folder(folder: Path, config: JudgeConfig = NO_JUDGE) -> list[Score]:
    """Score all of ``<folder>/predictions``, and write ``<folder>/metrics.json`` and ``<folder>/results.md``.

    Args:
        folder: has a folder ``predictions`` with files as ``lightning_modules.egobench.scores`` describes them.
        config: the judge of open answers.

    Raises:
        ValueError: there are no predictions, or some are invalid; the message names file, line, field and how to fix
            it.
    """
    predictions = folder / "predictions"
    headers = sorted(predictions.glob("*.header.json"))
    if not headers:
        raise ValueError(f"{predictions}: holds no <benchmark>.header.json: evaluate a benchmark first")
    scores: list[Score] = []
    for file in headers:
        scores += _score_file(file, config)
    content = [asdict(number) for number in scores]
    (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table({"ours": scores}, not _invented(folder)) + "\n", encoding="utf-8")
    return scores


def score_stages(runs: Path, config: JudgeConfig = NO_JUDGE) -> None:
    """Score the predictions of every stage again.

    Args:
        runs: folder of one experiment, with a folder for each stage.
        config: the judge of open answers.

    Raises:
        ValueError: no stage has predictions, or some are invalid.
    """
    folders = [folder for folder in sorted(runs.glob("*/egobench")) if folder.is_dir()]
    if not folders:
        raise ValueError(f"{runs}: no stage has answered a benchmark: run `make evaluate BENCHMARKS=all` first")
    for folder in folders:
        score_folder(folder, config)


def stages_table(runs: Path) -> str:
    """Write ``egobench.md``, the metrics of ``SUMMARY`` with a column per stage; return it, or "" without any scores.

    Args:
        runs: folder of one experiment, with a folder for each stage.
    """
    folders = {file.parents[1].name: file.parent for file in sorted(runs.glob("*/egobench/metrics.json"))}
    if not folders:
        return ""
    shown = {
        stage: [s for s in read_scores(folder) if SUMMARY.fullmatch(s.metric.replace("_partial", ""))]
        for stage, folder in folders.items()
    }
    text = table(shown, paper=not any(map(_invented, folders.values())))
    (runs / "egobench.md").write_text(text + "\n", encoding="utf-8")
    return text


def read_scores(folder: Path) -> list[Score]:
    """Read the scores that ``score_folder`` wrote.

    Raises:
        ValueError: the folder was not scored, or by another version.
    """
    file = folder / "metrics.json"
    try:
        return [Score(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError):
        names = ", ".join(known.name for known in fields(Score))
        raise ValueError(f"{file}: holds no list of scores ({names}): score the folder first") from None


def table(columns: Mapping[str, Sequence[Score]], paper: bool = True) -> str:
    """Return a Markdown table with a column per model or stage, in per cent (scores of judges in points).

    There is a row for each benchmark and metric. Partial scores have rows of their own, so that none is compared with a
    score of all samples. Each column is followed by its standard errors. The mean of the paper's ten numbers is shown
    for models that have all ten of all samples.

    Args:
        columns: title of a model to its scores.
        paper: whether to show the paper's numbers and its average, which mean nothing for a generated world.
    """
    found = {title: {(s.benchmark, s.metric): s for s in scores} for title, scores in columns.items()}
    keys: dict[tuple[str, str], None] = {}
    for scores in found.values():
        keys |= dict.fromkeys(scores)
    order = list(dict.fromkeys(benchmark for benchmark, _ in keys))
    reported = {key: number for key, number in PAPER.items() if paper and key[0] in order}
    rows = [["benchmark", "metric", *_pairs(columns), *(["paper"] if paper else []), "chance", "n of N"]]
    # Scores that only the paper has come after ours of the same benchmark.
    for key in sorted(dict.fromkeys([*keys, *reported]), key=lambda key: order.index(key[0])):
        cells: list[str] = []
        chance: dict[str, None] = {}
        counts: dict[str, None] = {}
        for scores in found.values():
            score = scores.get(key)
            cells += _cells(score)
            if score is not None:
                chance[_shown(score.chance, score.unit)] = None
                counts[f"{score.n} of {'?' if score.total is None else score.total}"] = None
        if paper:
            cells.append(_reported(reported.get(key)))
        rows.append([*key, *cells, " / ".join(filter(None, chance)), " / ".join(counts)])
    means = [_mean(scores) for scores in found.values()]
    if any(means):
        cells = []
        for mean in means:
            cells += [mean, ""]
        if paper:
            cells.append(f"{sum(PAPER[key].value for key in AVERAGED) / len(AVERAGED):.1f}")
        rows.append([*AVERAGE, *cells, "", ""])
    marks = dict.fromkeys(number.mark for number in reported.values() if number.mark)
    notes = [f"{mark} {MARKS[mark]}." for mark in marks]
    return "\n\n".join([markdown_table(rows, left=2), *notes])


def _invented(folder: Path) -> bool:
    """Return whether samples are of a generated world, so that the paper's numbers mean nothing."""
    headers = (folder / "predictions").glob("*.header.json")
    return any(json.loads(file.read_text(encoding="utf-8")).get("invented", False) for file in headers)


def _score_file(file: Path, config: JudgeConfig) -> list[Score]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: invalid JSON ({error}): evaluate the benchmark again") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(record).__name__}: evaluate the benchmark again")
    header = Header.read(record, str(file))
    name = file.name.removesuffix(".header.json")
    if header.benchmark != name:
        raise ValueError(f"{file}: field 'benchmark' is {header.benchmark!r}, expected {name!r} as in the file's name")
    rows, texts = (file.with_name(f"{name}{ending}") for ending in (".jsonl", ".texts.jsonl"))
    if not rows.is_file():  # the evaluation has not finished
        task_of(header, str(file))
        return [header.asked(0)]
    candidates: list[PlacedRow] = list(read_jsonl(texts)) if texts.is_file() else []
    scores = score_rows(header, read_jsonl(rows), candidates, str(file))
    if isinstance(TASKS[header.task], OpenEnded) and config.kind != "none":
        scores += judge(header, list(read_jsonl(rows)), file.parent, config)
    return scores


def _pairs(columns: Mapping[str, Any]) -> Iterator[str]:
    for title in columns:
        yield from (title, "±")


def _cells(number: Score | None) -> tuple[str, str]:
    if number is None:
        return "", ""
    return _shown(number.value, number.unit), _shown(number.standard_error, number.unit)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if unit == "share" else f"{value:.2f}"


def _reported(number: Reported | None) -> str:
    return "" if number is None else f"{number.value:.1f}{number.mark}"


def _mean(scores: Mapping[tuple[str, str], Score]) -> str:
    if any(key not in scores for key in AVERAGED):
        return ""
    return _shown(sum(scores[key].value for key in AVERAGED) / len(AVERAGED), "share")
