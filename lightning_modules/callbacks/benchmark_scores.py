"""Score the benchmarks that are asked during validation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning as L

from lightning_modules.distributed import gather_objects
from lightning_modules.egobench.scoring import score_results


class BenchmarkScores(L.Callback):
    """Collect the answers to benchmarks of a validation and log their scores.

    The datamodule's ``benchmarks`` are asked; their loaders come after that of the validation questions.
    """

    def __init__(self) -> None:
        self.answers: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard earlier answers."""
        self.answers.clear()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of a benchmark."""
        if isinstance(batch, list):
            self.answers[dataloader_idx] += outputs["predictions"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores over all ranks as ``val/<benchmark>_<metric>``."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not getattr(datamodule, "benchmarks", None):
            return
        found: dict[str, float] = {}
        for number, dataset in enumerate(datamodule.benchmarks, start=int(datamodule.held_out is not None)):
            answers: list[dict[str, Any]] = []
            for of_rank in gather_objects(self.answers[number]):
                answers += of_rank
            for score in score_results(dataset.loaded, answers):
                found[f"val/{dataset.loaded.name}_{score.metric}"] = score.value
        pl_module.log_dict(found, logger=False)
        if not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
