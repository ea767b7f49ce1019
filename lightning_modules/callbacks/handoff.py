"""Export the trained parts of a stage for the next stages when training is complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from safetensors import SafetensorError
from torch import Tensor

from lightning_modules.callbacks.checkpoint import stopped_early
from lightning_modules.weights.handoff import full_tensors, write_stage_weights
from lightning_modules.weights.tensors import WeightsError

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage


class StageHandoff(L.Callback):
    """Write the weights of a stage's trained parts when its training is complete.

    Place it after the callbacks that check gradients and save checkpoints.

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
        trained = [part for part in stage.model.parts if part in stage.trained]
        parts = ((part, full_tensors(stage.model.part(part), trainer.is_global_zero)) for part in trained)
        if trainer.is_global_zero:
            self._write(trainer, stage, parts)
        else:
            deque(parts, maxlen=0)
        trainer.strategy.barrier()

    def _write(self, trainer: L.Trainer, stage: Stage, parts: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        manifest = {
            "stage": self.stage,
            "step": trainer.global_step,
            "config_hash": self.config_hash,
            "data_fingerprint": datamodule.fingerprint() if hasattr(datamodule, "fingerprint") else None,
            "started_from": stage.started_from(),
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        }
        try:
            write_stage_weights(self.folder, parts, stage.network.lora, manifest)
        except (OSError, SafetensorError) as error:
            raise WeightsError(
                f"{self.folder}: the stage weights could not be written ({error}): fix this and run the stage again, "
                "it resumes from its last checkpoint"
            ) from None
