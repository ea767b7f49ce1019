"""Build the Trainer, the stage and the datamodule of a run from one resolved configuration."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from datamodules.clips.datamodule import ClipDataModule
from datamodules.clips.dataset import ClipConfig
from datamodules.egobench.config import EgoBenchConfig
from datamodules.io.hub import is_hub_name, use_cache_without_network
from lightning_modules.callbacks.checkpoint import CheckpointFolders
from lightning_modules.callbacks.defaults import default_callbacks
from lightning_modules.callbacks.progress import StageProgress
from lightning_modules.callbacks.sample_panel import SamplePanel
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.compat import set_process_group_timeout
from lightning_modules.config import ConfigError, config_hash
from lightning_modules.config_check import check_config
from lightning_modules.config_keys import key_lines
from lightning_modules.egobench.judge import JudgeConfig
from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.plan.stages import PlanConfig
from lightning_modules.stages.base import Stage
from lightning_modules.stages.checks import check_stage
from lightning_modules.strategy import FSDP2, POLICIES

SHARED_KEYS: dict[str, Any] = {
    "experiment": str,
    "stage": str,
    "runs": str,
    "run_dir": str,
    "handoffs": dict[str, str],
    "weights": str,
    "start": dict[str, str | list[str] | None],
    "data_root": str,
    "tokenizer": str,
    "threads": int | None,
    "checkpoint_every_n_steps": int,
    "stall_timeout_s": float,
    "network": NetworkConfig,
    "clips": ClipConfig,
    "monitor": TrainingMonitor,
    "panel": SamplePanel,
    "plan": PlanConfig,
    "egobench": EgoBenchConfig,
    "judge": JudgeConfig,
}
"""Types of the keys that the stages of an experiment share."""
LIGHTNING_KEYS: dict[str, Any] = {
    "seed_everything": bool | int,
    "trainer": L.Trainer,
    "model": Stage,
    "data": ClipDataModule,
}
"""Types of the keys that LightningCLI declares."""
HELP = {
    "seed_everything": "seed of all random draws",
    "experiment": "name of the experiment, in the folder of its runs",
    "stage": "name of the stage",
    "runs": "folder of all runs",
    "run_dir": "folder of this run",
    "handoffs": "folders of the weights of earlier stages",
    "weights": "folder of released weights",
    "start": "initial weights of the stages: folders of weights, or lists of them of which the first is taken",
    "data_root": "folder of videos and annotations",
    "tokenizer": "folder or hub name of the tokenizer",
    "threads": "CPU threads of each process; null for the default of PyTorch",
    "checkpoint_every_n_steps": "optimiser steps between two checkpoints; 0 for none",
    "stall_timeout_s": "longest time in seconds without progress before a run is ended",
}
"""The meaning of keys that no docstring explains."""
DEFAULTS: dict[str, Any] = {
    "runs": "runs",
    "checkpoint_every_n_steps": 100,
    "stall_timeout_s": 1800.0,
    "plan": PlanConfig(),
    "egobench": EgoBenchConfig(),
    "judge": JudgeConfig(),
}
SEED = 0
"""Default of ``seed_everything``."""

REQUIRED = ("experiment", "stage", "run_dir", "tokenizer", "model", "data", "trainer")


class ExperimentCLI(LightningCLI):
    """LightningCLI over a resolved configuration.

    In addition to ``model``, ``data`` and ``trainer`` it has the keys that the stages of an experiment share.
    """

    def __init__(self, config: dict[str, Any] | list[str]) -> None:
        self.resolved: Any = config
        super().__init__(
            Stage,
            ClipDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=copy.deepcopy(config),  # the parser changes lists in place
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=SEED,
            parser_kwargs={"exit_on_error": False},
            trainer_defaults={"enable_checkpointing": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare the shared keys."""
        for key, kind in SHARED_KEYS.items():
            if isinstance(kind, type) and issubclass(kind, L.Callback):
                parser.add_lightning_class_args(kind, key)
            elif key in REQUIRED:
                parser.add_argument(f"--{key}", type=kind, required=True, help=HELP.get(key))
            else:
                parser.add_argument(f"--{key}", type=kind, default=DEFAULTS.get(key), help=HELP.get(key))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer with the callbacks and plugins that every run has."""
        parsed = self.config_init
        callbacks = default_callbacks(
            Path(parsed["run_dir"]),
            parsed["stage"],
            config_hash(self.resolved),
            parsed["checkpoint_every_n_steps"],
            parsed["stall_timeout_s"],
        )
        if parsed["trainer"]["enable_progress_bar"] is not False:
            callbacks.append(StageProgress(parsed["stage"]))
        self.trainer_defaults["callbacks"] = callbacks
        plugins = parsed["trainer"]["plugins"] or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), CheckpointFolders()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)


class _ParseOnlyCLI(ExperimentCLI):
    """Parse alone."""

    def instantiate_classes(self) -> None:
        pass


class _StageOnlyCLI(ExperimentCLI):
    """Instantiate the stage alone."""

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        config.pop("data")
        self.model = self.parser.instantiate_classes(config).model


@dataclass(frozen=True)
class Run:
    """One stage of one experiment, checked and ready; no weights or videos have been read.

    Attributes:
        config: the resolved configuration.
        full_config: the same with every default.
        trainer: the Trainer with all callbacks.
        stage: the LightningModule.
        datamodule: the data of the stage.
        egobench: how benchmarks are asked.
        judge: who scores open answers of benchmarks.
        plan: assumptions about the hardware.
    """

    config: dict[str, Any]
    full_config: dict[str, Any]
    trainer: L.Trainer
    stage: Stage
    datamodule: ClipDataModule
    egobench: EgoBenchConfig
    judge: JudgeConfig
    plan: PlanConfig

    @property
    def name(self) -> str:
        """Return the name of the stage, such as ``stage1``."""
        return str(self.config["stage"])

    @property
    def folder(self) -> Path:
        """Return the folder that all files of the run are written to."""
        return Path(self.config["run_dir"])


def build(config: dict[str, Any]) -> Run:
    """Check a resolved configuration and make Trainer, stage and datamodule from it.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
        ValueError: a value is impossible, or weights or data that the stage needs are missing.
    """
    cli = _parse(config, ExperimentCLI)
    parsed = cli.config_init
    _check_limits(parsed["trainer"])
    trainer, stage, datamodule = cli.trainer, cli.model, cli.datamodule
    if isinstance(trainer.strategy, DDPStrategy | FSDP2):
        # Ends hangs that StallWatch does not see, such as the rendezvous; later than StallWatch, which can name ranks.
        set_process_group_timeout(trainer.strategy, timedelta(seconds=parsed["stall_timeout_s"] + 30))
    if parsed["threads"]:
        torch.set_num_threads(parsed["threads"])
    if stage.frozen_dtype != torch.float32 and trainer.precision != "bf16-mixed":
        raise ConfigError(
            f"model.init_args.frozen_dtype: {config['model']['init_args']['frozen_dtype']} needs "
            f"trainer.precision: bf16-mixed, got {trainer.precision}"
        )
    if isinstance(trainer.strategy, FSDP2) and trainer.precision not in POLICIES:
        raise ConfigError(f"trainer.precision: got {trainer.precision}, allowed with fsdp2: {', '.join(POLICIES)}")
    if isinstance(trainer.strategy, FSDP2) and stage.optim.algorithm != "adamw":
        raise ConfigError(
            f"model.init_args.optim.algorithm: got {stage.optim.algorithm}, allowed with fsdp2: adamw, since "
            "bitsandbytes takes no shards; trainer.strategy=fsdp2_cpu_offload keeps the optimiser off the device"
        )
    if datamodule.clips.pad_rgb is None:
        datamodule.clips = replace(datamodule.clips, pad_rgb=stage.network.encoder_shape.mean_rgb)
    check_stage(stage, datamodule.clips, datamodule.encoder.max_text_tokens)
    stage.check_data(datamodule)
    if datamodule.micro_batch_size is not None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches: got {trainer.accumulate_grad_batches}, but it follows from "
                "data.init_args.micro_batch_size and the number of devices: remove one of them"
            )
        trainer.accumulate_grad_batches = datamodule.accumulation(trainer.world_size)
    if isinstance(trainer.val_check_interval, int):
        # The configuration counts optimiser steps, the Trainer counts micro-batches.
        trainer.val_check_interval *= trainer.accumulate_grad_batches
    full = _with_defaults(config, cli)
    return Run(config, full, trainer, stage, datamodule, parsed["egobench"], parsed["judge"], parsed["plan"])


def _check_limits(trainer: Mapping[str, Any]) -> None:
    """Refuse limits with which a stage would never be complete.

    Args:
        trainer: the Trainer's arguments.

    Raises:
        ConfigError: a limit is no number of steps, epochs or time, or there is none.
    """
    max_steps, max_epochs, max_time = (trainer.get(key) for key in ("max_steps", "max_epochs", "max_time"))
    for key, limit in (("max_steps", max_steps), ("max_epochs", max_epochs)):
        if limit == 0:
            raise ConfigError(f"trainer.{key}: got 0, allowed: 1 or more, or -1 for no limit")
    if max_steps in (None, -1) and max_epochs in (None, -1):
        raise ConfigError("trainer.max_steps: got no limit: set max_steps or max_epochs, the schedule depends on it")
    if max_time is not None and not (Timer(max_time).time_remaining() or 0) > 0:
        raise ConfigError(f"trainer.max_time: got {max_time}, allowed: above 0")
    for key, whole in (("limit_train_batches", 1.0), ("overfit_batches", 0), ("fast_dev_run", False)):
        value = trainer.get(key)
        if value is not None and (value != whole or (key == "limit_train_batches" and isinstance(value, int))):
            raise ConfigError(
                f"trainer.{key}: got {value}, but a stage reads whole epochs, so that it can be resumed: remove it, "
                "and set trainer.max_steps for a shorter run"
            )


def build_stage(config: dict[str, Any]) -> Stage:
    """Check a resolved configuration and make the stage alone; files that it names need not exist."""
    stage: Stage = _parse(config, _StageOnlyCLI).model
    return stage


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration with every default of its classes, of the Trainer and of the shared keys.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    without_seed = {"seed_everything": False}  # LightningCLI would seed all generators
    found = _with_defaults(config, _parse(config | without_seed, _ParseOnlyCLI))
    return found | {"seed_everything": config.get("seed_everything", SEED)}


def _with_defaults(config: dict[str, Any], cli: ExperimentCLI) -> dict[str, Any]:
    """Return what was parsed as plain values, keys of the configuration first."""
    parsed = json.loads(cli.parser.dump(cli.config, format="json", skip_none=False, skip_validation=True))
    ordered: dict[str, Any] = _in_order(parsed, config)
    return ordered


def _in_order(value: Any, like: Any) -> Any:
    if isinstance(value, dict) and isinstance(like, dict):
        keys = [key for key in like if key in value]
        keys += [key for key in value if key not in like]
        return {key: _in_order(value[key], like.get(key)) for key in keys}
    return value


def _parse(config: dict[str, Any], kind: type[ExperimentCLI]) -> ExperimentCLI:
    if missing := [key for key in REQUIRED if not config.get(key)]:
        raise ConfigError(f"configuration: {', '.join(missing)} missing: name an experiment folder and a stage")
    for top, key in (("model", "network"), ("data", "clips")):
        given = (config[top].get("init_args") or {}).get(key)
        if key in config and given is not None and given != config[key]:
            raise ConfigError(f"{top}.{key}: differs from {key}, which all stages share: change {key} instead")
    max_time = (config.get("trainer") or {}).get("max_time")
    if max_time is not None and not re.fullmatch(r"\d+(:\d\d?){3}", str(max_time)):
        raise ConfigError(
            f"trainer.max_time: got {max_time}, allowed: days:hours:minutes:seconds, e.g. trainer.max_time=00:11:30:00"
        )
    check_config(config, SHARED_KEYS | LIGHTNING_KEYS)
    seed = config.get("seed_everything")
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything: got {seed}, allowed: from 0 to {2**32 - 1}")
    language_model = (config.get("network") or {}).get("language_model") or {}
    if is_hub_name(str(language_model.get("pretrained"))):
        use_cache_without_network()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(config)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_root_message(error)) from None
    except (MisconfigurationException, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None


def print_keys(config: dict[str, Any]) -> None:
    """Print every key of a configuration with its value, type, default and meaning, one a line."""
    print(*key_lines(complete(config), SHARED_KEYS | LIGHTNING_KEYS, HELP), sep="\n")


def _root_message(error: BaseException) -> str:
    """Return the first error of a chain on one line: jsonargparse wraps constructors' errors in long reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
