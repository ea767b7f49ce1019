"""Train a stage: start it, resume it, or recognise that it is finished."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_modules.callbacks.checkpoint import (
    CheckpointError,
    check_files,
    newest,
    read_state,
    read_tensors,
    signalled,
    stopped_early,
    stored_tensors,
)
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.config import LAYERS_FILE, Composition, config_hash, stage_names
from lightning_modules.demonstrations import use_demonstrations
from lightning_modules.distributed import gather_objects
from lightning_modules.egobench.loading import load_benchmarks
from lightning_modules.evaluation import answer_validation, evaluate
from lightning_modules.inference.description import answering_files, describe_config
from lightning_modules.layers import dump_yaml
from lightning_modules.plan.stages import StagePlan, flops_per_sample, plan_stage
from lightning_modules.resume import check_resumable, check_same_start, discard_run
from lightning_modules.run import Run, build, build_stage
from lightning_modules.weights.handoff import write_stage_weights


class Interrupted(RuntimeError):
    """Training stopped before its last step."""


def fit(config: dict[str, Any], force: bool = False, layers: Composition | None = None) -> None:
    """Train a stage, resume an interrupted one, or report that it is finished; then answer the validation questions.

    Every rank calls this. Rank 0 alone checks and changes files in the run's folder; the others wait for it in their
    first collective operation.

    Args:
        config: resolved configuration of the stage.
        force: discard what earlier runs left, and train from scratch.
        layers: the layers of the configuration, to save with the run.

    Raises:
        ConfigError: the folder contains a run with a different configuration.
        Interrupted: training stopped early; the same call resumes it.
        CheckpointError: training stopped early, and no checkpoint could be written to resume from.
        ValueError: something the stage needs is missing or invalid.
    """
    run = build(config)
    if fast := run.egobench.fast:
        data = run.datamodule
        datasets = load_benchmarks(run.egobench, fast, data.clips, data.encoder, data.decode_timeout_s)
        run.datamodule.benchmarks = [dataset.fast() for dataset in datasets]
    folder, is_rank_zero = run.folder, run.trainer.is_global_zero
    if force and is_rank_zero:
        discard_run(folder)
    finished = not force and (folder / "handoff" / "manifest.json").is_file()
    checkpoint = None if force or finished else newest(folder / "checkpoints")
    if is_rank_zero:
        if finished or checkpoint:
            check_resumable(folder, config, "finished" if finished else "interrupted")
        if checkpoint:
            check_files(checkpoint)
            print(f"{run.name} of {config['experiment']} resumes from {checkpoint}")

    if finished:
        check_same_start(folder, run.stage)
        if not (folder / "metrics.json").is_file():
            evaluate(config)
        print(f"{run.name} of {config['experiment']} is finished ({folder}/handoff); FORCE=1 trains it from scratch")
        if is_rank_zero:
            print(_next_commands(config))
        return

    use_demonstrations(run)
    _limit_steps(run)
    if is_rank_zero:
        _prepare_folder(run, layers)
        _enable_mfu(run)
    _choose_recomputation(run)
    try:
        run.trainer.fit(run.stage, datamodule=run.datamodule, ckpt_path=checkpoint)
        late = any(gather_objects(signalled(run.trainer)))
    except RuntimeError as error:
        if run.trainer.world_size == 1 or not signalled(run.trainer):
            raise
        # The signal reached other processes while they had nothing to save, so they did not wait for this one.
        reason = str(error).partition("\n")[0][:200]
        raise Interrupted(f"{run.name} stopped, others before it ({reason}); run it again to resume") from error
    if stopped_early(run.trainer, run.stage):
        _require_progress(run, checkpoint)
        raise Interrupted(f"{run.name} stopped at step {run.trainer.global_step}; run it again to resume")
    if run.trainer.global_step < run.stage.total_steps() and is_rank_zero:
        print(f"{run.name} is complete at step {run.trainer.global_step}: a callback of trainer.callbacks ended it")

    if late:
        raise Interrupted(f"{run.name} is trained; run it again for what is left")
    if checkpoint and int(checkpoint.name) == run.trainer.global_step:
        # The checkpoint was the last one and only the stage weights were missing: the Trainer may not have read it.
        if is_rank_zero:
            _export(checkpoint, config, folder / "handoff")
        run.trainer.strategy.barrier()
        del run  # before its successor takes memory
        evaluate(config)
    else:
        answer_validation(run, run.trainer.global_step)
    if is_rank_zero:
        print(f"{config['stage']} of {config['experiment']} is finished, its weights are in {folder}/handoff")
        print(_next_commands(config))


def _next_commands(config: dict[str, Any]) -> str:
    """Return a line with the commands that follow a finished stage: the next stage, or those that use the last one.

    Args:
        config: resolved configuration of the finished stage.
    """
    experiment, stage, runs = str(config["experiment"]), str(config["stage"]), str(config.get("runs", "runs"))
    folder = Path("experiments") / experiment
    stages = stage_names(folder) if (folder / "experiment.yaml").is_file() else []
    variables = "" if experiment == "toy" else f" EXPERIMENT={experiment}"
    everywhere = "" if runs == "runs" else f" RUNS={shlex.quote(runs)}"
    if stage not in stages:  # of an experiment elsewhere
        return f"next: make tensorboard{everywhere}"
    later = stages[stages.index(stage) + 1 :]
    if not later:
        commands = (f"chat VIDEO=file{variables}", f"evaluate{variables}", "tensorboard")
        return "next: " + " | ".join(f"make {command}{everywhere}" for command in commands)
    run_dir = Path(str(config["run_dir"]))
    if run_dir != Path(runs, experiment, stage):
        variables += " ARGS=" + shlex.quote(f"handoffs.{stage}={run_dir}/handoff")
    return f"next: make {later[0]}{variables}{everywhere} | make tensorboard{everywhere}"


def consolidate(config: dict[str, Any]) -> None:
    """Export stage weights from the last checkpoint of an unfinished stage, written by any number of processes.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = Path(str(config["run_dir"]))
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{folder}/checkpoints: no checkpoint: run `make {config['stage']}` first")
    check_resumable(folder, config, "interrupted")
    check_files(checkpoint)
    out = folder / f"handoff_{checkpoint.name}"
    parts = _export(checkpoint, config, out)
    print(f"{out} holds {', '.join(parts)} after step {int(checkpoint.name)}: handoffs.{config['stage']}={out}")


def _limit_steps(run: Run) -> None:
    """Express ``max_epochs`` in steps: a checkpoint of an epoch's last step does not count that epoch as done."""
    epochs = run.trainer.max_epochs
    if epochs is None or epochs < 0:
        return
    run.datamodule.setup("fit")
    in_epochs = run.datamodule.steps_per_epoch() * epochs
    loop = run.trainer.fit_loop
    loop.epoch_loop.max_steps = in_epochs if loop.max_steps < 0 else min(loop.max_steps, in_epochs)
    loop.max_epochs = -1


def _require_progress(run: Run, resumed_from: Path | None) -> None:
    """Require that a repeated call resumes from a later step than this one, else it would be repeated for ever.

    Raises:
        CheckpointError: no checkpoint was written.
    """
    if run.trainer.interrupted:
        return
    # Rank 0 looks for all, since files may appear later on other nodes.
    last = newest(run.folder / "checkpoints") if run.trainer.is_global_zero else None
    saved = run.trainer.strategy.broadcast(last is not None and last != resumed_from)
    if not saved:
        raise CheckpointError(
            f"{run.folder}/checkpoints: {run.name} was stopped at step {run.trainer.global_step}, but no checkpoint "
            "could be written: free space or permit writing there, and run it again"
        )


def _prepare_folder(run: Run, layers: Composition | None) -> None:
    """Remove checkpoints that were interrupted while being written, and save the configuration."""
    for torn in (run.folder / "checkpoints").glob(".*.new"):
        shutil.rmtree(torn)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_yaml(run.full_config), encoding="utf-8")
    if layers is None:
        (run.folder / LAYERS_FILE).unlink(missing_ok=True)
    else:
        layers.save(run.folder)


def _enable_mfu(run: Run) -> None:
    """Let the monitor log model FLOPs utilisation, if ``plan.peak_tflops`` is set."""
    if run.plan.peak_tflops is None:
        return
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    (monitor,) = (callback for callback in callbacks if isinstance(callback, TrainingMonitor))
    monitor.flops = flops_per_sample(run.config, build_stage(run.config))
    monitor.peak_flops = run.plan.peak_tflops * 1e12


class _Recomputation(L.Callback):
    """Resolves ``activation_checkpointing: auto`` alike on all ranks: they have to gather the same units in step.

    The memory of the smallest device counts, or ``plan.gpu_memory_gib`` where there is no GPU.

    Args:
        plan: of the stage, on rank 0; None on the others, which take its choice.
        memory_gib: of this rank's device, if that is no GPU; None for unknown.
    """

    def __init__(self, plan: StagePlan | None, memory_gib: float | None) -> None:
        self.plan, self.memory_gib = plan, memory_gib

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose before the model is built; the processes are connected by now."""
        device, memory_gib = trainer.strategy.root_device, self.memory_gib
        if device.type == "cuda":
            memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        known = [memory for memory in gather_objects(memory_gib) if memory is not None]
        chosen: list[str] = []
        if self.plan is not None:
            chosen = list(self.plan.least_recomputation(min(known, default=None)))
            print(f"activation checkpointing: blocks of {', '.join(chosen) or 'no part'} are recomputed")
        pl_module.activation_checkpointing = trainer.strategy.broadcast(chosen)  # type: ignore[assignment]


def _choose_recomputation(run: Run) -> None:
    """Let the Trainer resolve ``activation_checkpointing: auto`` when its processes are connected."""
    if run.stage.activation_checkpointing == "auto":
        plan = plan_stage(run.config, build_stage(run.config)) if run.trainer.is_global_zero else None
        callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(_Recomputation(plan, run.plan.gpu_memory_gib))


def _export(checkpoint: Path, config: dict[str, Any], out: Path) -> list[str]:
    """Write the trained parts of a checkpoint as stage weights; return the names of the parts."""
    stage, state, stored = build_stage(config), read_state(checkpoint), stored_tensors(checkpoint)
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
        "started_from": state["started_from"],
        "metrics": {},
    }
    whole = ((part, {n: tensors[name] for n, name in of_part.items()}) for part, of_part in parts.items())
    more = answering_files(describe_config(config, stage.uses, stage.vocab_size), stage)
    write_stage_weights(out, whole, stage.network.lora, manifest, more)
    return list(parts)
