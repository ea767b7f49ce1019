"""Evaluate a finished stage: on the validation questions, and on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_modules.callbacks.tensorboard import write_final_scores
from lightning_modules.config import single_visual_inputs
from lightning_modules.egobench.loading import load_benchmarks
from lightning_modules.egobench.predictions import BenchmarkDataModule, Predictions, predict, write_submissions
from lightning_modules.egobench.results import score_folder, stages_table
from lightning_modules.run import Run, build
from lightning_modules.validation.consistency import of_all_ranks, shares
from lightning_modules.validation.report import write_metrics, write_predictions, write_report
from lightning_modules.validation.scores import chance_levels
from lightning_modules.weights.handoff import read_manifest


def evaluate(config: dict[str, Any], handoff: Path | None = None) -> None:
    """Answer the validation questions with a finished stage.

    Args:
        config: resolved configuration of the stage.
        handoff: folder of stage weights to use instead of the stage's own.

    Raises:
        WeightsError: the stage has no weights.
    """
    run, manifest = trained_run(config, handoff)
    answer_validation(run, manifest["step"])


def evaluate_benchmarks(config: dict[str, Any], names: Sequence[str] | None = None, force: bool = False) -> None:
    """Answer benchmarks with a finished stage, score them, and print the table of all stages.

    Args:
        config: resolved configuration of the stage.
        names: benchmarks of the configuration; None for all.
        force: discard predictions that exist.

    Raises:
        WeightsError: the stage has no weights.
        ValueError: a file of a benchmark is missing or invalid, or predictions were made in another way.
    """
    run, manifest = trained_run(config)
    benchmarks = load_benchmarks(run.egobench, names, run.datamodule)
    model = {
        "model": run.stage.started_from(),
        "visual_inputs": run.stage.network.visual_inputs,
        "text": {key: run.config["data"]["init_args"].get(key) for key in ("tokenizer", "prompt", "max_text_tokens")},
        "precision": [str(run.trainer.precision), run.stage.quantization or str(run.stage.frozen_dtype)],
    }
    out = run.folder / "egobench"
    predictions = [Predictions(benchmark, out / "predictions", model) for benchmark in benchmarks]
    if not force:
        for kept in predictions:
            kept.require_same()
    if run.trainer.is_global_zero:
        for kept in predictions:
            notes = () if kept.dataset.config.invented else kept.loaded.notes
            print(*notes, kept.summary(), sep="\n")
    predict(run.trainer, run.stage, BenchmarkDataModule(predictions, run.datamodule.num_workers, force))

    if run.trainer.is_global_zero:
        scores = score_folder(out, run.judge)
        for logger in run.trainer.loggers:
            logger.log_metrics({f"eval/{s.benchmark}/{s.metric}": s.value for s in scores}, step=manifest["step"])
            logger.save()
        write_submissions(predictions, out / "submissions")
        print(stages_table(run.folder.parent))


def evaluate_single_inputs(config: dict[str, Any], again: bool) -> None:
    """Answer the validation questions from x alone and from F(x) alone, for a finished stage that reads both.

    The other input is left out rather than set to zero: in stage 1 the language model has learned to read one input,
    but never zeros.

    Args:
        config: resolved configuration of the stage.
        again: also where answers of these stage weights exist. Answers of earlier weights are always replaced.
    """
    handoff = Path(config["run_dir"]) / "handoff"
    for changed in single_visual_inputs(config).values():
        if again or not is_answered(Path(changed["run_dir"]), handoff):
            evaluate(changed, handoff)


def is_answered(folder: Path, handoff: Path) -> bool:
    """Return whether validation QA was answered in a folder, and not before stage weights were last written."""
    metrics, manifest = folder / "metrics.json", handoff / "manifest.json"
    return metrics.is_file() and manifest.is_file() and metrics.stat().st_mtime_ns >= manifest.stat().st_mtime_ns


def answer_validation(run: Run, step: int) -> None:
    """Answer the validation questions with a trained stage, and write answers, metrics and the table of all stages.

    Args:
        run: of the stage.
        step: optimiser steps that the weights were trained for.
    """
    if run.datamodule.held_out is None:
        return
    run.trainer.test(run.stage, datamodule=run.datamodule, verbose=False)
    scores, predictions = run.stage.results.means_and_counts(), run.stage.results.all_predictions()
    comparisons = of_all_ranks(run.stage.comparisons)
    if run.trainer.is_global_zero:
        metrics = {name: mean for name, (mean, _) in scores.items()}
        run.folder.mkdir(parents=True, exist_ok=True)
        write_predictions(run.folder / "predictions.jsonl", predictions)
        if comparisons:
            write_predictions(run.folder / "consistency.jsonl", comparisons)
        consistency = shares(comparisons)
        held_out = run.datamodule.held_out_set()
        chance = chance_levels(held_out.all_questions())
        write_metrics(run.folder, run.name, len(held_out), metrics, chance, consistency)
        for logger in run.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_final_scores(logger, run.full_config, scores, chance, consistency, step)
        print(write_report(run.folder.parent))


def report(runs: Path) -> None:
    """Print the scores of every stage of an experiment: on the validation questions, then on benchmarks.

    Args:
        runs: folder of the experiment's runs, with a folder for each stage.

    Raises:
        ValueError: no stage has been evaluated.
    """
    benchmarks = stages_table(runs)
    if not benchmarks or any(runs.glob("*/metrics.json")):
        print(write_report(runs))
    if benchmarks:
        print(f"\n{benchmarks}")


def trained_run(config: dict[str, Any], handoff: Path | None = None) -> tuple[Run, dict[str, Any]]:
    """Build a run that starts from its own stage weights; return it with their manifest."""
    folder = handoff or Path(str(config.get("run_dir", ""))) / "handoff"
    manifest = read_manifest(folder)
    run = build(config)
    run.stage.start_from({part: str(folder) for part in manifest["parts"]})
    return run, manifest
