"""Fully sharded training: every unit of the model is cut over all processes and gathered while it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    # Gathered and computed with in bfloat16; gradients are summed in, and kept for, float32 weights.
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}
"""What ``trainer.precision`` means for sharded parameters."""


def shard(module: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Cut the parameters of a module, those of modules already cut excepted, over the processes of a mesh.

    Frozen and trained parameters mix freely; the trained ones of one module must share a type.

    Args:
        module: gathered when its forward begins, cut again when that ends.
        mesh: of the strategy, with a dimension ``data_parallel``.
        precision: one of ``POLICIES``.
    """
    fully_shard(module, mesh=mesh["data_parallel"], mp_policy=POLICIES[precision])
    if hasattr(module, "run"):
        register_fsdp_forward_method(module, "run")


class FSDP2(ModelParallelStrategy):
    """``trainer.strategy: fsdp2``: torch's ``fully_shard`` over all processes, on GPUs or, with gloo, on CPUs.

    Held-out clips and benchmarks are answered by whole parameters on every process: answers differ in length and
    processes in their number of clips, so gathering while they compute would leave some waiting for others for good.
    """

    def setup_environment(self) -> None:
        """Join the processes; all of them share one set of parameters."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Every tensor by name, each process its share."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As every other strategy, each process its share."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Every process takes part, see ``CheckpointFolders``."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """See ``CheckpointFolders``."""
        return self.checkpoint_io.load_checkpoint(Path(checkpoint_path))

    def on_validation_start(self) -> None:
        """Gather everything."""
        self._gather()

    def on_validation_end(self) -> None:
        """Cut everything again."""
        self._release()

    def on_test_start(self) -> None:
        """Gather everything."""
        self._gather()

    def on_test_end(self) -> None:
        """Cut everything again."""
        self._release()

    def on_predict_start(self) -> None:
        """Gather everything."""
        self._gather()

    def on_predict_end(self) -> None:
        """Cut everything again."""
        self._release()

    def _sharded(self) -> tuple[FSDPModule, list[FSDPModule]]:
        """The root, and the sharded modules inside."""
        assert self.model is not None
        found: list[FSDPModule] = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        return found[0], found[1:]

    def _gather(self) -> None:
        root, inside = self._sharded()
        root.run(lambda: None)  # type: ignore[attr-defined]  # tells the modules inside that they are not roots themselves
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
