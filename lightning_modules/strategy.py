"""Fully sharded training: every unit of the model is sharded over all processes and gathered while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from lightning_modules.compat import communicate_on_cpu_too, shard_over_all_processes
from lightning_modules.model.quantize import stored_parameters

POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    # Gathered and computed with in bfloat16; gradients are summed in, and kept for, float32 weights.
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}
"""Mixed precision of sharded parameters by ``trainer.precision``."""


def shard(module: nn.Module, mesh: DeviceMesh, precision: str, cpu_offload: bool = False) -> None:
    """Shard the parameters of a module over the processes of a mesh, except those of modules sharded before.

    Frozen and trained parameters mix freely; the trained ones of one module must share a type. Quantised weights are
    not sharded: each device holds all of them, so that they are never gathered.

    Args:
        module: gathered when its ``forward`` or ``run`` begins, and sharded again when that ends.
        mesh: the strategy's, with a dimension ``data_parallel``.
        precision: one of ``POLICIES``.
        cpu_offload: keep shards, gradients and the optimiser in the memory of the CPU, and copy parameters to the
            device while they compute.
    """
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    fully_shard(
        module,
        mesh=mesh["data_parallel"],
        mp_policy=POLICIES[precision],
        offload_policy=offload,
        ignored_params=stored_parameters(module),
    )
    if hasattr(module, "run"):
        register_fsdp_forward_method(module, "run")


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the sharded ones among modules once, for as many forward passes as each process likes.

    All processes have to enter together, where gradients are off. Inside, the modules need no other process.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


class FSDP2(ModelParallelStrategy):
    """``trainer.strategy: fsdp2``: torch's ``fully_shard`` over all processes, on GPUs or, with gloo, on CPUs.

    Parameters stay gathered during evaluation: answers differ in length and processes in their number of clips, so that
    gathering during computation would leave some processes waiting for ever. Checkpoints need the plugin
    ``CheckpointFolders``.

    Args:
        cpu_offload: keep all parameters that are not quantised, gradients and the optimiser in the memory of the CPU,
            where the optimiser steps; ``trainer.strategy: fsdp2_cpu_offload``. For GPUs that cannot hold them.
        **settings: of Lightning's ``ModelParallelStrategy``.
    """

    def __init__(self, cpu_offload: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Connect the processes; all of them share one set of parameters."""
        shard_over_all_processes(self)
        if self.cpu_offload and self.root_device.type == "cuda":
            communicate_on_cpu_too(self)
        super().setup_environment()

    def model_to_device(self) -> None:
        """Leave offloaded parameters on the CPU; everything else is on the device since it was loaded."""
        if not self.cpu_offload:
            super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return every tensor by name, with the shard of this process."""
        return self._module().state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state with the shard of this process."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save with all processes, see ``CheckpointFolders``."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load everything except the tensors, see ``CheckpointFolders``."""
        return self.checkpoint_io.load_checkpoint(Path(checkpoint_path))

    def on_validation_start(self) -> None:
        """Gather all parameters."""
        self._gather()

    def on_validation_end(self) -> None:
        """Shard all parameters again."""
        self._release()

    def on_test_start(self) -> None:
        """Gather all parameters."""
        self._gather()

    def on_test_end(self) -> None:
        """Shard all parameters again."""
        self._release()

    def on_predict_start(self) -> None:
        """Gather all parameters."""
        self._gather()

    def on_predict_end(self) -> None:
        """Shard all parameters again."""
        self._release()

    def _module(self) -> L.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("FSDP2 is not connected to a LightningModule: use it through a Trainer")
        return self.lightning_module

    def _sharded(self) -> tuple[FSDPModule, list[FSDPModule]]:
        """Return the root of the sharded modules, and the others."""
        found: list[FSDPModule] = [module for module in self._module().modules() if isinstance(module, FSDPModule)]
        return found[0], found[1:]

    def _gather(self) -> None:
        root, inside = self._sharded()
        root.run(lambda: None)  # type: ignore[attr-defined]  # lets the modules inside know that they are not roots
        for module in (root, *inside):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def _release(self) -> None:
        root, inside = self._sharded()
        for module in inside:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        root.reshard()


StrategyRegistry.register("fsdp2", FSDP2, description="torch's fully_shard over all processes")
StrategyRegistry.register(
    "fsdp2_cpu_offload", FSDP2, description="fsdp2 with parameters and optimiser on the CPU", cpu_offload=True
)
