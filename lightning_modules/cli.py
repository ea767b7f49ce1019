"""``python -m lightning_modules fit|evaluate|...``: experiments from YAML, through LightningCLI.

::

    python -m lightning_modules fit experiments/toy stage1 trainer.max_steps=100
    python -m lightning_modules fit runs/toy/stage1/config.yaml
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import distributed_c10d

from datamodules.clips.dataset import ClipConfig, ClipDataModule
from datamodules.egobench import load
from datamodules.egobench.dataset import BenchmarkDataset, EgoBenchConfig
from lightning_modules.ablations.plan import all_jobs, read_plan
from lightning_modules.ablations.results import write_results
from lightning_modules.ablations.runner import RunsFailed, carry_out, is_finished
from lightning_modules.callbacks.checkpoint import (
    CheckpointError,
    CheckpointFolders,
    Checkpoints,
    check_files,
    newest,
    read_state,
    read_tensors,
    stored_tensors,
)
from lightning_modules.callbacks.health import Diverged, StallWatch
from lightning_modules.callbacks.throughput import SamplePanel, TrainingMonitor
from lightning_modules.config import STAGES, ConfigError, compose, config_hash, read_saved, single_visual_inputs
from lightning_modules.config_errors import explain
from lightning_modules.egobench.cost import cost_table
from lightning_modules.egobench.judge import JudgeConfig
from lightning_modules.egobench.predictions import BenchmarkDataModule, Predictions, predict, write_submissions
from lightning_modules.egobench.results import score_folder, score_stages, stages_table
from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.plan import PlanConfig, device_count, flops_per_sample, plan_stage, plan_table
from lightning_modules.stages.base import Stage
from lightning_modules.strategy import FSDP2, POLICIES
from lightning_modules.validation.report import write_metrics, write_predictions, write_report
from lightning_modules.validation.scores import chance_levels
from lightning_modules.weights.handoff import (
    StageHandoff,
    code_version,
    is_answered,
    read_manifest,
    write_stage_weights,
)

STOPPED = 75
"""Exit status of a stage that was told to stop and can go on: "try again" by convention (EX_TEMPFAIL)."""
HOW_IT_RUNS = (
    "checkpoint_every_n_steps",
    "data.init_args.decode_timeout_s",
    "data.init_args.max_corrupt_fraction",
    "data.init_args.micro_batch_size",
    "data.init_args.num_workers",
    "egobench",
    "judge",
    "model.init_args.activation_checkpointing",
    "monitor",
    "panel",
    "plan",
    "stall_timeout_s",
    "threads",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)
"""Keys that may differ when a run goes on: what is learned does not depend on them, but for rounding and dropout."""


class Interrupted(RuntimeError):
    """Training stopped before its last step."""


class ExperimentCLI(LightningCLI):
    """LightningCLI over a resolved configuration.

    Beside ``model``, ``data`` and ``trainer`` there are the keys that the stages of an experiment share, see
    ``add_arguments_to_parser``.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare the shared keys, so that they are checked like all others."""
        parser.add_argument("--experiment", type=str, required=True)
        parser.add_argument("--stage", type=str, required=True)
        parser.add_argument("--runs", type=str, default="runs")
        parser.add_argument("--run_dir", type=str, required=True)
        parser.add_argument("--handoffs", type=dict[str, str])
        parser.add_argument("--weights", type=str)
        parser.add_argument("--start", type=dict[str, str | list[str] | None])
        parser.add_argument("--data_root", type=str)
        parser.add_argument("--tokenizer", type=str, required=True)
        parser.add_argument("--threads", type=int | None, default=None)
        parser.add_argument("--checkpoint_every_n_steps", type=int, default=100)
        parser.add_argument("--stall_timeout_s", type=float, default=1800.0)
        parser.add_argument("--network", type=NetworkConfig)
        parser.add_argument("--clips", type=ClipConfig)
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(SamplePanel, "panel")
        parser.add_argument("--plan", type=PlanConfig, default=PlanConfig())
        parser.add_argument("--egobench", type=EgoBenchConfig, default=EgoBenchConfig())
        parser.add_argument("--judge", type=JudgeConfig, default=JudgeConfig())


@dataclass(frozen=True)
class Run:
    """One stage of one experiment, checked and ready; no weights or videos are read yet."""

    config: dict[str, Any]
    trainer: L.Trainer
    stage: Stage
    datamodule: ClipDataModule

    @property
    def name(self) -> str:
        """``stage0`` to ``stage3``."""
        return str(self.config["stage"])

    @property
    def folder(self) -> Path:
        """Where everything of this run goes."""
        return Path(self.config["run_dir"])


def build(config: dict[str, Any]) -> Run:
    """Check a resolved configuration and make Trainer, stage and data module.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
        ValueError: a value is impossible, or something the stage starts from is missing.
    """
    run_dir = Path(str(config.get("run_dir")))
    every, stall_s = config.get("checkpoint_every_n_steps", 100), config.get("stall_timeout_s", 1800.0)
    callbacks: list[L.Callback] = [
        StallWatch(stall_s if isinstance(stall_s, float | int) else 1.0),  # a wrong type is refused below
        Checkpoints(run_dir / "checkpoints", every if isinstance(every, int) else 0),
        StageHandoff(str(run_dir / "handoff"), str(config.get("stage")), config_hash(config)),
    ]
    if (config.get("trainer") or {}).get("enable_progress_bar") is not False:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    cli = _checked(config, ExperimentCLI, callbacks)
    if isinstance(cli.trainer.strategy, DDPStrategy | FSDP2):
        # Ends what the watch does not see, such as meeting at the start; later than the watch, which knows who is late.
        cli.trainer.strategy._timeout = timedelta(seconds=stall_s + 30)
    if config.get("threads"):
        torch.set_num_threads(config["threads"])
    trainer, stage, datamodule = cli.trainer, cli.model, cli.datamodule
    if stage.frozen_dtype != torch.float32 and trainer.precision != "bf16-mixed":
        raise ConfigError(
            f"model.init_args.frozen_dtype: {config['model']['init_args']['frozen_dtype']} needs "
            f"trainer.precision: bf16-mixed, got {trainer.precision}"
        )
    if isinstance(trainer.strategy, FSDP2) and trainer.precision not in POLICIES:
        raise ConfigError(f"trainer.precision: got {trainer.precision}, allowed with fsdp2: {', '.join(POLICIES)}")
    stage.check(datamodule.clips, datamodule.encoder.max_text_tokens)
    if datamodule.micro_batch_size is not None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches: got {trainer.accumulate_grad_batches}, but it follows from "
                "data.init_args.micro_batch_size and the number of devices: remove one of them"
            )
        trainer.accumulate_grad_batches = datamodule.accumulation(trainer.world_size)
    if isinstance(trainer.val_check_interval, int):  # in optimiser steps here, in micro-batches there
        trainer.val_check_interval *= trainer.accumulate_grad_batches
    return Run(config, trainer, stage, datamodule)


def _benchmark_datasets(
    config: dict[str, Any], datamodule: ClipDataModule, names: Sequence[str] | None
) -> list[BenchmarkDataset]:
    """BenchmarkDataModule of the configuration, all of them or the named ones, read and checked.

    Raises:
        ValueError: a name is unknown, or a file is missing or wrong.
    """
    bench = EgoBenchConfig(**(config.get("egobench") or {}))
    known = [str(entry.get("name")) for entry in bench.benchmarks]
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"benchmark {', '.join(unknown)}: not in egobench.benchmarks: {', '.join(known) or 'none'}")
    entries = [e for e, name in zip(bench.benchmarks, known, strict=True) if names is None or name in names]
    d = datamodule
    made = [BenchmarkDataset(load(entry), bench, d.clips, d.encoder, d.decode_timeout_s) for entry in entries]
    for dataset in made:
        dataset.check()
    return made


def stage_only(config: dict[str, Any]) -> Stage:
    """Check a resolved configuration and make the stage alone; nothing that it names needs to be there."""
    stage: Stage = _checked(config, _StageOnlyCLI, []).model
    return stage


class _StageOnlyCLI(ExperimentCLI):
    def instantiate_classes(self) -> None:
        config = self.config.clone()
        config.pop("data")
        self.model = self.parser.instantiate_classes(config).model


def _checked(config: dict[str, Any], kind: type[ExperimentCLI], callbacks: list[L.Callback]) -> ExperimentCLI:
    missing = [key for key in ("experiment", "stage", "run_dir", "model", "data") if not config.get(key)]
    if missing:
        raise ConfigError(f"configuration: {', '.join(missing)} missing: give an experiment folder and a stage")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(
                Stage,
                ClipDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                run=False,
                args=config,
                save_config_callback=None,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False},
                trainer_defaults={
                    "callbacks": callbacks,
                    "plugins": [CheckpointFolders()],
                    "enable_checkpointing": False,
                },
            )
    except (ArgumentError, ValueError) as error:
        raise ConfigError(explain(str(error), config)) from None
    except (MisconfigurationException, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None


def fit(config: dict[str, Any], force: bool) -> None:
    """Train a stage, go on with an interrupted one, or say that it is finished; then answer the held-out questions.

    All processes of a run come here; the first one alone changes and judges what lies in the folder, while the others
    wait for it in their first talk.
    """
    run = build(config)
    if fast := EgoBenchConfig(**(config.get("egobench") or {})).fast:
        run.datamodule.benchmarks = [dataset.fast() for dataset in _benchmark_datasets(config, run.datamodule, fast)]
    folder, first = run.folder, run.trainer.is_global_zero
    if force and first:
        _put_aside(folder)
    finished = not force and (folder / "handoff" / "manifest.json").is_file()
    checkpoint = None if force or finished else newest(folder / "checkpoints")
    if first:
        if finished or checkpoint:
            _same_configuration(folder, config, "finished" if finished else "interrupted")
        if checkpoint:
            check_files(checkpoint)
            print(f"{run.name} of {config['experiment']} goes on from {checkpoint}")
    if finished:
        _same_start(folder, run.stage)
        if not (folder / "metrics.json").is_file():
            evaluate(config)
        print(f"{run.name} of {config['experiment']} is finished ({folder}/handoff); FORCE=1 trains it anew")
        return
    if first:
        for torn in (folder / "checkpoints").glob(".*.new"):
            shutil.rmtree(torn)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        _know_peak(run)
    run.trainer.fit(run.stage, datamodule=run.datamodule, ckpt_path=checkpoint)
    if run.trainer.interrupted or run.trainer.global_step < run.stage.total_steps():
        raise Interrupted(f"{run.name} stopped at step {run.trainer.global_step}; call it again to go on")
    if checkpoint and int(checkpoint.name) == run.trainer.global_step:
        # All steps were made before, only the hand-off was not: the Trainer may not have read the weights at all.
        if first:
            _hand_off(checkpoint, config, folder / "handoff")
        run.trainer.strategy.barrier()
        del run
        evaluate(config)
        return
    _answer(run)


def _know_peak(run: Run) -> None:
    """Let the monitor compare with what the devices could do, if ``plan.peak_tflops`` says that."""
    peak = PlanConfig(**(run.config.get("plan") or {})).peak_tflops
    if peak is not None:
        (monitor,) = (callback for callback in run.trainer.callbacks if isinstance(callback, TrainingMonitor))  # type: ignore[attr-defined]
        monitor.flops, monitor.peak_flops = flops_per_sample(run.config, stage_only(run.config)), peak * 1e12


def evaluate(
    config: dict[str, Any], benchmarks: Sequence[str] | None = (), force: bool = False, handoff: Path | None = None
) -> None:
    """Answer the held-out questions with a finished stage, or those of benchmarks.

    Args:
        config: resolved configuration of the stage.
        benchmarks: names; None for all of the configuration, none for the held-out questions.
        force: forget predictions that are there.
        handoff: of the same parts, in place of the stage's own.
    """
    folder = handoff or Path(str(config.get("run_dir", ""))) / "handoff"
    manifest = read_manifest(folder)
    run = build(config)
    run.stage.start_from({part: str(folder) for part in manifest["parts"]})
    if benchmarks is not None and not benchmarks:
        _answer(run)
        return
    _run_benchmarks(run, _benchmark_datasets(config, run.datamodule, benchmarks), manifest["step"], force)


def _run_benchmarks(run: Run, datasets: Sequence[BenchmarkDataset], step: int, force: bool) -> None:
    model = {
        "model": run.stage.started_from(),
        "visual_inputs": run.stage.network.visual_inputs,
        "text": {key: run.config["data"]["init_args"].get(key) for key in ("tokenizer", "prompt", "max_text_tokens")},
        "precision": [str(run.trainer.precision), str(run.stage.frozen_dtype)],
    }
    out = run.folder / "egobench"
    predictions = [Predictions(dataset, out / "predictions", model) for dataset in datasets]
    if not force:
        for kept in predictions:
            kept.require_same()
    if run.trainer.is_global_zero:
        for kept in predictions:
            notes = () if kept.dataset.config.invented else kept.loaded.notes
            print(*notes, kept.line(), sep="\n")
    predict(run.trainer, run.stage, BenchmarkDataModule(predictions, run.datamodule.num_workers, force))
    if run.trainer.is_global_zero:
        scores = score_folder(out, JudgeConfig(**(run.config.get("judge") or {})))
        for logger in run.trainer.loggers:
            logger.log_metrics({f"eval/{s.benchmark}/{s.metric}": s.value for s in scores}, step=step)
            logger.save()
        write_submissions(predictions, out / "submissions")
        print(stages_table(run.folder.parent))


def answer_by_streams(config: dict[str, Any], anew: bool) -> None:
    """Answer the held-out questions by x alone and by F(x) alone, where a finished stage reads both.

    The input left out is absent, not zero: the language model knows one visual input from stage 1, but no zeros.

    Args:
        config: resolved configuration of the stage.
        anew: also where answers of this hand-off are there; those of an earlier one never count.
    """
    handoff = Path(config["run_dir"]) / "handoff"
    for changed in single_visual_inputs(config).values():
        if anew or not is_answered(Path(changed["run_dir"]), handoff):
            evaluate(changed, handoff=handoff)


def _answer(run: Run) -> None:
    if run.datamodule.held_out is None:
        return
    run.trainer.test(run.stage, datamodule=run.datamodule, verbose=False)
    metrics, outcomes = run.stage.held_out_metrics, run.stage.all_outcomes()
    if run.trainer.is_global_zero:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_predictions(run.folder / "predictions.jsonl", outcomes)
        held_out = run.datamodule.held_out_set()
        write_metrics(run.folder, run.name, len(held_out), metrics, chance_levels(held_out.all_questions()))
        print(write_report(run.folder.parent))


def report(runs: Path) -> None:
    """Print what every stage of an experiment scored: on the held-out questions, then on benchmarks.

    Raises:
        ValueError: no stage was asked anything.
    """
    benchmarks = stages_table(runs)
    if not benchmarks or any((runs / stage / "metrics.json").is_file() for stage in STAGES):
        print(write_report(runs))
    if benchmarks:
        print(f"\n{benchmarks}")


def consolidate(config: dict[str, Any]) -> None:
    """Make a hand-off out of the last checkpoint of an unfinished stage, whatever number of processes wrote it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = Path(str(config["run_dir"]))
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder}/checkpoints: no checkpoint: run `make {config['stage']}` first")
    _same_configuration(folder, config, "interrupted")
    check_files(checkpoint)
    out = folder / f"handoff_{checkpoint.name}"
    parts = _hand_off(checkpoint, config, out)
    print(f"{out} holds {', '.join(parts)} after step {int(checkpoint.name)}: handoffs.{config['stage']}={out}")


def _hand_off(checkpoint: Path, config: dict[str, Any], out: Path) -> list[str]:
    """Write what trains as a hand-off; names of the parts."""
    stage, state, stored = stage_only(config), read_state(checkpoint), stored_tensors(checkpoint)
    model = stage.on_meta()
    names = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}
    parts = {part: {n: names[id(p)] for n, p in model.part(part).items()} for part in stage.trained}
    wanted = [name for of_part in parts.values() for name in of_part.values()]
    tensors = {name: torch.empty(stored[f"state_dict.{name}"]) for name in wanted}
    read_tensors(checkpoint, {"state_dict": tensors}, alone=True)
    manifest = {
        "stage": config["stage"],
        "step": state["global_step"],
        "config_hash": config_hash(config),
        "code_version": code_version(),
        "started_from": state["started_from"],
        "metrics": {},
    }
    whole = ((part, {n: tensors[name] for n, name in of_part.items()}) for part, of_part in parts.items())
    write_stage_weights(out, whole, stage.network.lora, manifest)
    return list(parts)


def plan(experiment: Path, stages: Sequence[str], overrides: list[str]) -> None:
    """Print what stages cost.

    Raises:
        ConfigError: one does not fit its devices; the message names the keys to change.
    """
    configs = [compose(experiment, stage, overrides) for stage in stages]
    plans = [plan_stage(config, stage_only(config)) for config in configs]
    assumed = [PlanConfig(**(config.get("plan") or {})) for config in configs]
    print(plan_table(plans, assumed))
    if configs[-1]["stage"] == "stage3":
        num_frames, trainer = int(configs[-1]["clips"]["num_frames"]), configs[-1]["trainer"]
        print(f"\n{cost_table(stage_only(configs[-1]), num_frames, assumed[-1], device_count(trainer))}")
    problems = []
    for plan, assumption in zip(plans, assumed, strict=True):
        try:
            plan.require_fit(assumption.gpu_memory_gib)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def _add_ablations(commands: Any) -> None:
    """Declare the command that carries out a plan of runs."""
    text = "run what a plan of ablations lacks, then write tables and figures"
    cores = len(os.sched_getaffinity(0))
    command = commands.add_parser(
        "ablations", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("plan", type=Path, help="e.g. experiments/ablations/plan.yaml")
    command.add_argument("rest", nargs="*", metavar="key=value", help="overridden keys of every run")
    command.add_argument("--seeds", type=int, default=3, help="how many")
    command.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    command.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    command.add_argument("--results", type=Path, default=Path("runs/ablations/results"), help="of tables and figures")
    command.add_argument("--threads", type=int, default=1, help="of each run")
    command.add_argument("--jobs", type=int, default=cores, help="runs at a time; times threads at most the cores")
    command.add_argument("--dry-run", action="store_true", help="list the runs only")
    command.add_argument("--report", action="store_true", help="run nothing: tables and figures of what is finished")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def ablations(options: argparse.Namespace) -> int:
    """Carry out a plan and write what it shows; exit status."""
    plan = read_plan(options.plan)
    for name in ("seeds", "jobs", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: got {getattr(options, name)}, allowed: 1 or more")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    overrides = [f"threads={options.threads}", "trainer.enable_progress_bar=false", *options.rest]
    waves = all_jobs(options.plan, plan, seeds, options.out, overrides)
    if options.dry_run:
        print("\n".join(job.name for wave in waves for job in wave))
        return 0
    failure = None
    try:
        if not options.report:
            carry_out(waves, options.out, options.jobs, options.threads)
    except RunsFailed as error:
        failure = error
    except KeyboardInterrupt:
        print("stopped: told to; call it again to go on", file=sys.stderr)
        return STOPPED
    jobs = [job for wave in waves for job in wave]
    finished = [job for job in jobs if is_finished(job)]
    print(write_results(plan, finished, options.results, [job.name for job in jobs if job not in finished]))
    if failure:
        print(f"error: {failure}; call it again to go on", file=sys.stderr)
    return int(failure is not None)


def _same_configuration(folder: Path, config: dict[str, Any], state: str) -> None:
    file = folder / "config.yaml"
    before = read_saved(file) if file.is_file() else {}
    old, new = _flat(before), _flat(config)
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not f"{key}.".startswith(tuple(f"{free}." for free in HOW_IT_RUNS))
    ]
    if changed:
        shown = ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:3])
        raise ConfigError(
            f"{folder}: holds a run {state} with another configuration ({shown}{', ...' if len(changed) > 3 else ''}): "
            "FORCE=1 trains it anew, or set another `runs` folder"
        )


def _same_start(folder: Path, stage: Stage) -> None:
    started_from = read_manifest(folder / "handoff")["started_from"]
    changed = sorted(part for part, start in stage.started_from().items() if started_from.get(part) != start)
    if changed:
        raise ConfigError(
            f"{folder}: was trained from another {', '.join(changed)} than {stage.sources[changed[0]].where} holds: "
            "FORCE=1 trains it anew"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value)}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _put_aside(folder: Path) -> None:
    for name in ("checkpoints", "egobench", "metrics.json", "predictions.jsonl"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    previous = folder / "handoff.previous"
    if (folder / "handoff").exists():
        shutil.rmtree(previous, ignore_errors=True)
        (folder / "handoff").rename(previous)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0 done, 1 training failed, 2 wrong input, 75 told to stop before the end.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_modules", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "fit": "train a stage, or go on with it, then answer the held-out questions",
        "evaluate": "answer the held-out questions with a finished stage",
        "show": "print the resolved configuration and check it",
        "plan": "print what the stages cost, without allocating anything",
        "consolidate": "make a hand-off out of the last checkpoint of a stage that is not finished",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("experiment", type=Path, help="folder of the experiment, or a run's config.yaml")
        command.add_argument("rest", nargs="*", metavar="stage0|..|stage3 key=value", help="stage and overridden keys")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        if name in ("fit", "evaluate"):
            command.add_argument("--streams", action="store_true", help="also answer by x alone and by F(x) alone")
        if name == "fit":
            command.add_argument("--force", action="store_true", help="train anew even if finished or begun")
        if name == "evaluate":
            which = "ask benchmarks of the experiment instead: names with commas between, or all"
            command.add_argument("--benchmarks", metavar="NAMES", default="", help=which)
            command.add_argument("--force", action="store_true", help="forget their predictions that are there")
    again = {
        "report": "print the tables of all stages of a run",
        "score": "compute benchmark scores of all stages of a run anew, from their predictions alone",
    }
    for name, text in again.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("runs", type=Path, help="folder of an experiment's runs, e.g. runs/toy")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    command.add_argument("--judge", choices=("none", "file", "hf"), default="none", help="who judges open answers")
    command.add_argument("--judge-model", metavar="NAME", help="folder or hub name of the model, or who wrote the file")
    _add_ablations(commands)
    options, after = parser.parse_known_args(arguments)
    if after and ("rest" not in options or any("=" not in word or word.startswith("-") for word in after)):
        parser.error(f"unrecognized arguments: {' '.join(after)}")
    if after:  # argparse takes no more of a list after an option
        options.rest += after
    _quiet()
    try:
        if options.command in again:
            if options.command == "score":
                score_stages(options.runs, JudgeConfig(options.judge, options.judge_model))
            report(options.runs)
            return 0
        if options.command == "ablations":
            return ablations(options)
        stage = options.rest.pop(0) if options.rest and "=" not in options.rest[0] else None
        if stage is not None and stage not in STAGES:
            raise ConfigError(f"stage: got {stage!r}, allowed: {', '.join(STAGES)}")
        if options.command == "plan":
            plan(options.experiment, [stage] if stage else STAGES, options.rest)
            return 0
        if stage is None and options.experiment.is_dir():
            raise ConfigError(f"{options.experiment} is a folder: name a stage after it, {', '.join(STAGES)}")
        config = compose(options.experiment, stage, options.rest)
        if options.command == "fit":
            fit(config, options.force)
        elif options.command == "evaluate":
            asked = [name for name in options.benchmarks.split(",") if name]
            if not asked and config["data"]["init_args"].get("held_out") is None:
                raise ConfigError("data.held_out: got null, so nothing is asked: name benchmarks, `BENCHMARKS=all`")
            evaluate(config, None if asked == ["all"] else asked, options.force)
        elif options.command == "consolidate":
            consolidate(config)
        else:
            print(yaml.safe_dump(config, sort_keys=False), end="")
            build(config)
        if getattr(options, "streams", False):
            answer_by_streams(config, anew=options.command == "evaluate")
    except Interrupted as error:
        return _all_stop(f"stopped: {error}", STOPPED)
    except Diverged as error:
        return _all_stop(f"error: {error}", 1)
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        if not dist.is_initialized():
            print(f"error: {_last_line(error)}", file=sys.stderr)
            return 2
        print(f"error: rank {dist.get_rank()}: {_last_line(error)}", file=sys.stderr)
        _end(2)
    except Exception as error:
        if isinstance(error, dist.DistError) and not dist.is_initialized():
            print(f"error: the processes did not meet (stall_timeout_s): {_last_line(error)}", file=sys.stderr)
            return 1
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        _end(1)
    return 0


def _all_stop(message: str, status: int) -> int:
    """What all processes come to alike: the first one says so and its status counts; it leaves after the others."""
    if not dist.is_initialized():
        print(message, file=sys.stderr)
        return status
    store, rank = distributed_c10d._get_default_store(), dist.get_rank()
    if rank:
        store.set(f"left/{rank}", "")
        _end(0)
    with suppress(RuntimeError):
        store.wait([f"left/{other}" for other in range(1, dist.get_world_size())], timedelta(seconds=30))
        time.sleep(0.5)
    print(message, file=sys.stderr)
    _end(status)


def _end(status: int) -> NoReturn:
    """Leave without waiting for others, who may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _quiet() -> None:
    """Leave out what Lightning says about devices it did not find and about its own deprecations."""
    for name in ("lightning.fabric.utilities.seed", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    expected = ["LeafSpec", "does not have many workers", "exists and is not empty", "sync_dist=True"]
    expected += ["across ranks is zero", "assuming the intent is to save", "assuming the intent is to load"]
    expected += ["returned a view tensor", "Grad strides do not match bucket view strides"]
    for message in expected:
        warnings.filterwarnings("ignore", message=f".*{message}")


def _last_line(error: Exception) -> str:
    """An error's own words; one that comes from a loader's process carries a traceback before them."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Caught ") else " ".join(lines)
    return re.sub(r"^[\w.]+(Error|Missing|Video|Stream|Span|File|Damaged): ", "", text)
