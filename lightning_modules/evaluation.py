"""Evaluate a finished stage on the validation questions, and any trained model on benchmarks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedTokenizerBase

from datamodules.batch import BenchmarkBatch
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.text import PromptConfig, vocabulary_digest
from lightning_modules.callbacks.tensorboard import write_final_scores
from lightning_modules.config_check import check_config
from lightning_modules.egobench.evaluator import evaluate_clip
from lightning_modules.egobench.judge import JudgeConfig
from lightning_modules.egobench.loading import load_benchmarks
from lightning_modules.egobench.predictions import BenchmarkDataModule, Predictions, predict, write_submissions
from lightning_modules.egobench.results import score_folder, stages_table
from lightning_modules.egobench.scores import Score
from lightning_modules.inference.loading import ModelFiles, build_model, open_model
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.run import LIGHTNING_KEYS, SHARED_KEYS, Run, build
from lightning_modules.validation.consistency import of_all_ranks, shares
from lightning_modules.validation.report import write_metrics, write_predictions, write_report
from lightning_modules.validation.scores import chance_levels
from lightning_modules.weights.handoff import read_manifest

DEVICES = ("accelerator", "devices", "num_nodes", "strategy", "limit_predict_batches")
"""Arguments of the Trainer that ``evaluate_model`` takes."""
READING = ("prompt", "num_workers", "decode_timeout_s")
"""Arguments of datamodules that ``evaluate_model`` takes: another prompt, and how clips are read."""


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
    data = run.datamodule
    benchmarks = load_benchmarks(run.egobench, names, data.clips, data.encoder, data.decode_timeout_s)
    model = {
        "model": run.stage.started_from(),
        "visual_inputs": run.stage.network.visual_inputs,
        "text": {key: run.config["data"]["init_args"].get(key) for key in ("tokenizer", "prompt", "max_text_tokens")},
        "precision": [str(run.trainer.precision), run.stage.quantization or str(run.stage.frozen_dtype)],
    }
    out = run.folder / "egobench"
    scores = _score(run.trainer, run.stage, benchmarks, model, out, run.judge, data.num_workers, force)
    if run.trainer.is_global_zero:
        for logger in run.trainer.loggers:
            logger.log_metrics({f"eval/{s.benchmark}/{s.metric}": s.value for s in scores}, step=manifest["step"])
            logger.save()
        print(stages_table(run.folder.parent))


def evaluate_model(
    source: str, config: Mapping[str, Any], out: Path, names: Sequence[str] | None = None, force: bool = False
) -> None:
    """Answer benchmarks with a trained model, wherever it comes from, score them, and print the table of all models.

    Frames, prompt and tokens are those that the model was trained with. On a GPU all parameters have the type of
    ``ModelDescription.dtype``.

    Args:
        source: see ``open_model``.
        config: the keys ``egobench`` and ``judge``; of ``trainer`` those of ``DEVICES``, and of ``data.init_args`` the
            keys of ``READING``. Other keys are ignored, so that a file of ``experiments/data`` or a run's
            ``config.yaml`` will do.
        out: folder of this model's results, next to those of other models.
        names: benchmarks of the configuration; None for all.
        force: discard predictions that exist.

    Raises:
        ValueError: there is no such model, a file of a benchmark is missing or invalid, or predictions were made in
            another way.
    """
    checked = ("egobench", "judge", "trainer")
    check_config({key: config[key] if key in checked else None for key in config}, SHARED_KEYS | LIGHTNING_KEYS)
    files = open_model(source)
    reading = (config.get("data") or {}).get("init_args") or {}
    if "prompt" in reading:
        check_config({"prompt": reading["prompt"]}, {"prompt": PromptConfig})
        files = replace(files, description=replace(files.description, prompt=PromptConfig(**reading["prompt"])))
    encoder, description = files.encoder(), files.description
    egobench, judge = EgoBenchConfig(**(config.get("egobench") or {})), JudgeConfig(**(config.get("judge") or {}))
    timeout_s = reading.get("decode_timeout_s", 60.0)
    benchmarks = load_benchmarks(egobench, names, description.clips, encoder, timeout_s)
    devices = {key: value for key, value in (config.get("trainer") or {}).items() if key in DEVICES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**{"devices": 1, **devices}, logger=False, enable_checkpointing=False)
    module = TrainedModel(files, encoder.tokenizer)
    model = {
        "model": {part: found.digest for part, found in files.found.items()},
        "visual_inputs": description.network.visual_inputs,
        "text": {
            "tokenizer": vocabulary_digest(encoder.tokenizer),
            "prompt": asdict(description.prompt),
            "max_text_tokens": description.max_text_tokens,
        },
        "precision": [str(module.dtype_on(trainer.strategy.root_device))],
    }
    _score(trainer, module, benchmarks, model, out / "egobench", judge, reading.get("num_workers", 1), force)
    if trainer.is_global_zero:
        print(stages_table(out.parent))


class TrainedModel(L.LightningModule):
    """A trained model that answers the requests of benchmarks; it is read when the Trainer knows the device.

    Args:
        files: of the model.
        tokenizer: decodes its answers.
    """

    model: Exo2EgoModel

    def __init__(self, files: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.files, self.tokenizer = files, tokenizer

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the type of all parameters on a device."""
        name = "float32" if device.type == "cpu" else self.files.description.dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def configure_model(self) -> None:
        """Read the weights, one unit of the model at a time."""
        if not hasattr(self, "model"):
            device = self.trainer.strategy.root_device
            self.model = build_model(self.files, device, self.dtype_on(device))

    def predict_step(self, batch: BenchmarkBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Run the requests about one egocentric clip."""
        return evaluate_clip(self.model, self.tokenizer, batch)


def _score(
    trainer: L.Trainer,
    module: L.LightningModule,
    benchmarks: Sequence[BenchmarkDataset],
    model: Mapping[str, Any],
    out: Path,
    judge: JudgeConfig,
    num_workers: int,
    force: bool,
) -> list[Score]:
    """Answer benchmarks and score them; the scores are there in the first process alone.

    Args:
        trainer: runs ``predict_step`` of ``module``.
        module: the model.
        benchmarks: to answer.
        model: JSON that identifies the model.
        out: folder of predictions, scores and submissions.
        judge: of open answers.
        num_workers: decoding processes of each process.
        force: discard predictions that exist.
    """
    predictions = [Predictions(benchmark, out / "predictions", model) for benchmark in benchmarks]
    if not force:
        for kept in predictions:
            kept.require_same()
    if trainer.is_global_zero:
        for kept in predictions:
            notes = () if kept.dataset.config.invented else kept.loaded.notes
            print(*notes, kept.summary(), sep="\n")
    predict(trainer, module, BenchmarkDataModule(predictions, num_workers, force))
    if not trainer.is_global_zero:
        return []
    scores = score_folder(out, judge)
    write_submissions(predictions, out / "submissions")
    return scores


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
