"""Private parts of lightning and torch that this project needs, each in a function that checks that it is still there.

Read in lightning 2.6.6 and torch 2.15.0. No other file of ``lightning_modules`` uses a private name of these packages,
so an upgrade that breaks one is repaired here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils import _pytree

_TESTED = {"lightning": "2.6.6", "torch": "2.15.0"}
_EXPECTED_WARNINGS = (
    "LeafSpec",
    "in eval mode at the start of training",
    "is smaller than the logging interval",
    "does not have many workers",
    "exists and is not empty",
    "sync_dist=True",
    "across ranks is zero",
    "assuming the intent is to save",
    "assuming the intent is to load",
    "returned a view tensor",
    "Grad strides do not match bucket view strides",
)
"""Parts of warnings of lightning and torch that do not concern our runs."""


def silence_expected_warnings() -> None:
    """Hide Lightning's notes about absent devices and warnings that are expected in our runs."""
    for name in ("lightning.fabric.utilities.seed", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")


def ignore_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, which ``Checkpoints`` does.

    Lightning's handler talks to other processes from inside a signal handler, and its loop waits for all of them after
    every batch.
    """
    connector, epoch_loop = _get(trainer, "_signal_connector"), trainer.fit_loop.epoch_loop
    _replace(connector, "register_signal_handlers", lambda: None)
    _replace(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def set_process_group_timeout(strategy: DDPStrategy | ModelParallelStrategy, timeout: timedelta) -> None:
    """Set how long the processes wait for each other; must come before they meet."""
    _replace(strategy, "_timeout", timeout)


def needs_every_gradient(strategy: Strategy) -> bool:
    """Return whether a step in which some trained parameters get no gradient would hang or fail."""
    return isinstance(strategy, DDPStrategy) and not _get(strategy, "_ddp_kwargs").get("find_unused_parameters")


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Use every process for data parallelism; Lightning's default is tensor parallelism inside a node."""
    _replace(strategy, "_data_parallel_size", strategy.num_nodes * strategy.num_processes)
    _replace(strategy, "_tensor_parallel_size", 1)


def communicate_on_cpu_too(strategy: ModelParallelStrategy) -> None:
    """Let processes exchange tensors of the CPU (gloo) in addition to those of their GPUs; before they meet."""
    _replace(strategy, "_process_group_backend", "cpu:gloo,cuda:nccl")


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer of a module, or None; the public ``trainer`` raises where there is none."""
    trainer: L.Trainer | None = _get(module, "_trainer")
    return trainer


def micro_batches_done(trainer: L.Trainer) -> int:
    """Return the number of training batches of this process since the start of the stage, over all epochs."""
    return int(_get(trainer.fit_loop.epoch_loop, "total_batch_idx"))


def recount_micro_batches(checkpoint: dict[str, Any], accumulated_before: int, accumulated_now: int) -> None:
    """Rewrite a checkpoint's number of training batches for another number of accumulated micro-batches.

    Args:
        checkpoint: as Lightning's Trainer writes it; changed in place.
        accumulated_before: micro-batches of an optimiser step in the run that wrote it.
        accumulated_now: the same for the run that reads it.
    """
    progress = _item(_item(_item(checkpoint, "loops"), "fit_loop"), "epoch_loop.batch_progress")
    for counts in (_item(progress, "total"), _item(progress, "current")):
        before = _item(counts, "processed")
        shift = before // accumulated_before * accumulated_now - before
        for event in ("ready", "started", "processed", "completed"):
            counts[event] = _item(counts, event) + shift


def default_store() -> Any:
    """Return the key-value store through which the processes of a run met."""
    return _get(distributed_c10d, "_get_default_store")()


def storage_id(tensor: Tensor) -> int:
    """Return a number that tensors over the same memory share; tensors on the meta device have no addresses."""
    return int(_get(tensor.untyped_storage(), "_cdata"))


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dictionaries."""
    leaves: list[Any] = _get(_pytree, "tree_leaves")(tree)
    return leaves


def allow_compiled_shapes(count: int) -> None:
    """Set for how many shapes ``torch.compile`` makes code of one function before it runs the others as they are."""
    from torch._dynamo import config  # loads the compiler, which few runs need

    _replace(config, "recompile_limit", count)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run the fused attention operator of GPUs, also on the meta device."""
    attended: Tensor = _get(torch.ops.aten, "_scaled_dot_product_flash_attention")(query, key, value)[0]
    return attended


def flash_attention_backward() -> Callable[..., Any]:
    """Return the operator of the backward pass of ``flash_attention``."""
    operator: Callable[..., Any] = _get(torch.ops.aten, "_scaled_dot_product_flash_attention_backward")
    return operator


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise AttributeError(_changed(owner, name))
    return getattr(owner, name)


def _replace(owner: Any, name: str, value: Any) -> None:
    _get(owner, name)
    setattr(owner, name, value)


def _item(state: Any, key: str) -> Any:
    if not isinstance(state, dict) or key not in state:
        raise AttributeError(_changed(state, key))
    return state[key]


def _changed(owner: Any, name: str) -> str:
    kind = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
    versions = " and ".join(f"{package} {version}" for package, version in _TESTED.items())
    return f"{kind} has no {name} any more: use {versions}, or adapt lightning_modules/compat.py"
