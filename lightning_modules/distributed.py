"""Collective operations on Python objects that also work in a single process."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_objects(value: T, group: Any = None) -> list[T]:
    """Return the values of all ranks in the order of ranks; all of them have to call this.

    Args:
        value: of this rank, anything that can be pickled.
        group: process group; the default one if None.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group)
    return gathered
