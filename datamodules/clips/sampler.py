"""The order of training samples: a function of (seed, epoch) alone, so that a run resumes exactly where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@dataclass(frozen=True)
class BatchRequest:
    """The samples of one micro-batch, and those of the global batch that it belongs to."""

    epoch: int
    indices: list[int]
    global_indices: list[int]
    micro_batches: int


class GlobalBatchSampler(Sampler[BatchRequest]):
    """Shuffled global batches, split over ranks and accumulated micro-batches; the last incomplete one is left out.

    The set of samples in each global batch depends on (seed, epoch) only, not on how it is split.

    Args:
        samples: number of samples of an epoch.
        global_batch_size: samples of one optimiser step.
        accumulate: micro-batches of a step on each rank.
        rank, world: this rank, and the number of ranks.
        seed: seed of the order.
        groups: integer [samples], equal where samples read the same files.
        block_groups: if above 0, groups are shuffled, and samples within blocks of that many groups.
        epoch_samples: samples of an epoch, given its number; each of them once if None.
    """

    def __init__(
        self,
        samples: int,
        global_batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int,
        groups: NDArray[np.integer[Any]] | None = None,
        block_groups: int = 0,
        epoch_samples: Callable[[int], NDArray[np.int64]] | None = None,
    ) -> None:
        self.epoch_samples = epoch_samples
        self.samples, self.global_batch_size, self.accumulate = samples, global_batch_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.groups, self.block_groups = groups, block_groups
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in an epoch."""
        return self.samples // self.global_batch_size * self.accumulate

    def __iter__(self) -> Iterator[BatchRequest]:
        """Yield requests from micro-batch ``start`` of ``epoch`` onwards."""
        order = self._order()
        parts = self.world * self.accumulate
        size = self.global_batch_size // parts
        # Consecutive parts of a global batch go to all ranks of micro-batch 0, then to all ranks of micro-batch 1 ...
        for position in range(self.start, len(self)):
            batch, micro = divmod(position, self.accumulate)
            together = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size].tolist()
            first = (micro * self.world + self.rank) * size
            yield BatchRequest(self.epoch, together[first : first + size], together, parts)

    def _order(self) -> NDArray[np.int64]:
        # Changing the order of draws would change the order of samples of existing runs.
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.samples)
        if self.epoch_samples is not None:
            order = self.epoch_samples(self.epoch)[order]
        if self.groups is None or not self.block_groups:
            return order
        # Shuffle the groups, cut their order into blocks, and sort the shuffled samples by the block of their group.
        found, number = np.unique(self.groups, return_inverse=True)
        block = rng.permutation(len(found))[number] // self.block_groups
        return order[np.argsort(block[order], kind="stable")]
