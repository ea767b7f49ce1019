"""Stop training before an optimiser step whose gradients are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.distributed import gather_objects

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

MicroBatches = list[tuple[list[str], Tensor]]
_SHOWN = 16


class Diverged(RuntimeError):
    """A loss or gradient is not finite; the message names the step and the samples."""


class FiniteCheck(L.Callback):
    """Compute the norm of all gradients before clipping, write it to the curves, and stop if it is not finite.

    The check does not wait for a GPU: there it looks at the previous step, so that one step too many may be computed.
    Nothing of it is saved, because the open check is made before a checkpoint is written and when training ends. Place
    this callback before those that save.
    """

    def __init__(self) -> None:
        self._micro_batches: MicroBatches = []
        self._ids: list[str] = []
        self._open: tuple[int, Tensor, torch.cuda.Event | None, MicroBatches] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the names of the samples."""
        self._ids = batch.ids

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the loss of the micro-batch."""
        self._micro_batches.append((self._ids, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compute the norm and begin the check; on a CPU, finish it.

        Raises:
            Diverged: on all ranks alike.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        stage: Stage = pl_module  # type: ignore[assignment]
        stage.gradient_norm = norm  # clipping need not compute it again
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        stage.step_log["optim/grad_norm"] = norm

        self.settle()
        copied = None
        if norm.is_cuda:
            norm, copied = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._open = trainer.global_step, norm, copied, self._micro_batches
        self._micro_batches = []
        if copied is None:
            self.settle()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finish the check before anything is saved."""
        self.settle()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the check before stage weights are exported."""
        self.settle()

    def settle(self) -> None:
        """Finish the check of the last step.

        Raises:
            Diverged: its gradients are not finite.
        """
        if self._open is None:
            return
        (step, norm, copied, micro_batches), self._open = self._open, None
        if copied is not None:
            copied.synchronize()
        if math.isfinite(norm):
            return
        own = [(ids, float(loss)) for ids, loss in micro_batches]
        wrong: list[str] = []
        all_ids: list[str] = []
        for rank, of_rank in enumerate(gather_objects(own)):
            for ids, loss in of_rank:
                all_ids += ids
                if not math.isfinite(loss):
                    wrong.append(f"rank {rank}: loss {loss} on {_shorten(ids)}")
        found = "; ".join(wrong) or f"all losses are finite, the batch is {_shorten(all_ids)}"
        raise Diverged(
            f"step {step + 1}: the norm of the gradients is {float(norm)} ({found}): nothing of it is saved; look at "
            "these samples or lower model.init_args.optim.learning_rate, then run it again"
        )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
