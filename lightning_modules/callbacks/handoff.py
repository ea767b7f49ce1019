"""Export the trained parts of a stage for the next stages when training is complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from safetensors import SafetensorError
from torch import Tensor

from datamodules.clips.datamodule import ClipDataModule
from lightning_modules.callbacks.checkpoint import stopped_early
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.inference.description import (
    ModelDescription,
    answering_dtype,
    answering_files,
    describe,
    frozen_parts,
)
from lightning_modules.weights.handoff import full_tensors, write_stage_weights
from lightning_modules.weights.tensors import WeightsError

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

Parts = Iterable[tuple[str, dict[str, Tensor]]]


class StageHandoff(L.Callback):
    """Write the weights of a stage's trained parts when its training is complete, and what answering needs with them.

    With a datamodule that is no ``ClipDataModule``, frames and prompts are unknown, and only the trained parts are
    written. Place it after the callbacks that check gradients and save checkpoints.

    Args:
        folder: ``<run>/handoff``, the folder of exported stage weights.
        stage: name of the stage, such as ``stage1``.
        config_hash: hash of the resolved configuration.
    """

    def __init__(self, folder: str, stage: str, config_hash: str) -> None:
        self.folder, self.stage, self.config_hash = Path(folder), stage, config_hash

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write after the last step; an interrupted run writes nothing.

        Raises:
            WeightsError: the folder cannot be written.
        """
        stage: Stage = pl_module  # type: ignore[assignment]
        if stopped_early(trainer, stage):
            return
        # All ranks gather every tensor, one at a time and in the same order; rank 0 alone keeps and writes them.
        description = _describe(trainer, stage)
        trained = self._gather(trainer, stage, [part for part in stage.model.parts if part in stage.trained])
        unsourced = self._gather(trainer, stage, frozen_parts(description, stage)[1] if description else [])
        if trainer.is_global_zero:
            self._write(trainer, stage, trained, description, unsourced)
        else:
            deque(chain(trained, unsourced), maxlen=0)
        trainer.strategy.barrier()

    @staticmethod
    def _gather(trainer: L.Trainer, stage: Stage, parts: Iterable[str]) -> Parts:
        return ((part, full_tensors(stage.model.part(part), trainer.is_global_zero)) for part in parts)

    def _write(
        self,
        trainer: L.Trainer,
        stage: Stage,
        trained: Parts,
        description: ModelDescription | None,
        unsourced: Parts,
    ) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        manifest = {
            "stage": self.stage,
            "step": trainer.global_step,
            "config_hash": self.config_hash,
            "data_fingerprint": datamodule.fingerprint() if hasattr(datamodule, "fingerprint") else None,
            "started_from": stage.started_from(),
            "metrics": _metrics(trainer),
        }
        more = answering_files(description, stage, unsourced) if description else None
        try:
            write_stage_weights(self.folder, trained, stage.network.lora, manifest, more)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"{self.folder}: the stage weights could not be written ({error}): fix this and run the stage again, "
                "it resumes from its last checkpoint"
            ) from None


def _metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the last validation scores, and how the mappings stand at the end of training."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    curves = next((callback.written for callback in callbacks if isinstance(callback, TrainingMonitor)), {})
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return found | {name: float(value) for name, value in curves.items() if name.startswith("guidance/")}


def _describe(trainer: L.Trainer, stage: Stage) -> ModelDescription | None:
    """Describe the model that a stage trained; None if the Trainer's data do not tell frames and prompts."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, ClipDataModule):
        return None
    encoder = datamodule.encoder
    return describe(
        stage.network,
        stage.vocab_size,
        stage.uses,
        datamodule.clips,
        encoder.prompt_config,
        encoder.max_text_tokens,
        answering_dtype(trainer.precision),
    )
