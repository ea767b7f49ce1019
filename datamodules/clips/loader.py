"""The training loader: its position can be saved and restored, and it stops a run whose data is largely corrupt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from datamodules.batch import ClipBatch
from datamodules.clips.dataset import ClipTextDataset
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.clips.workers import WorkerLoader

FEWEST_SAMPLES = 200
"""The fraction of corrupt samples is taken over at least so many, so that a single one at the start stops nothing."""
MOST_IN_A_ROW = 20
"""Consecutive corrupt samples that stop a run whatever their fraction: a disk or a network is gone."""


class TooManyCorrupt(ValueError):
    """More samples cannot be used than the configuration allows."""


class ReadingStopped(ValueError):
    """The reading processes give no batch any more."""


class ResumableLoader(WorkerLoader[ClipBatch]):
    """Loader whose state is (epoch, global batches handed out); Lightning saves and restores it.

    The state is the same on all ranks; a run may resume from it with another number of ranks or micro-batches.

    Corrupt samples are counted over the batches handed out since the process started. A run stops when more than
    ``max_corrupt_fraction`` of this rank's samples (of the first 200 while there are fewer) are corrupt, or 20 in a
    row.

    Args:
        dataset: the samples.
        sampler: their order.
        num_workers: processes that read; 0 reads in this one.
        max_corrupt_fraction: largest fraction of corrupt samples that is tolerated.
        timeout_s: longest wait for a batch of the processes, None for no limit.

    Raises:
        TooManyCorrupt: while iterating.
        ReadingStopped: while iterating: a process hangs or has died; the message names samples.
    """

    def __init__(
        self,
        dataset: ClipTextDataset,
        sampler: GlobalBatchSampler,
        num_workers: int,
        max_corrupt_fraction: float = 0.01,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            timeout=(timeout_s or 0) if num_workers else 0,
        )
        self.samples, self.order, self.max_corrupt_fraction = dataset, sampler, max_corrupt_fraction
        self.epoch = self.position = 0
        self.seen = self.corrupt = self.in_a_row = 0
        self.last_corrupt: deque[str] = deque(maxlen=3)

    def __iter__(self) -> Iterator[ClipBatch]:  # type: ignore[override]
        """Yield the rest of the epoch; the next iteration yields the whole next epoch."""
        if self.position >= len(self):  # the Trainer stops at the length and never exhausts the iterator
            self.epoch, self.position = self.epoch + 1, 0
        self.order.epoch, self.order.start = self.epoch, self.position
        try:
            for batch in super().__iter__():
                self._count_corrupt(batch)
                self.position += 1
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise
            # A reading process hangs or died: the next request of the sampler is the batch that did not arrive.
            self.order.start = self.position
            names = ", ".join(self.samples.name(index) for index in next(iter(self.order)).indices)
            raise ReadingStopped(
                f"{error}; the batch waited for holds {names}: check these with `make data-check`, or raise "
                "data.init_args.decode_timeout_s"
            ) from error

    def _count_corrupt(self, batch: ClipBatch) -> None:
        self.seen += len(batch.ids)
        self.corrupt += len(batch.corrupt)
        self.last_corrupt += batch.corrupt
        outage = False
        for valid in batch.valid.tolist():
            self.in_a_row = 0 if valid else self.in_a_row + 1
            outage = outage or self.in_a_row >= MOST_IN_A_ROW
        too_many = self.corrupt > self.max_corrupt_fraction * max(self.seen, FEWEST_SAMPLES)
        if too_many or outage:
            limit = f"data.max_corrupt_fraction allows {self.max_corrupt_fraction:.1%}"
            raise TooManyCorrupt(
                f"{self.corrupt} of {self.seen} samples of this rank could not be used "
                f"({limit if too_many else f'{MOST_IN_A_ROW} of them in a row'}), the last ones: "
                f"{' | '.join(self.last_corrupt)}: run `make data-check`, or raise data.init_args.max_corrupt_fraction"
            )

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next global batch."""
        return {"epoch": self.epoch, "global_batch": self.position // self.order.accumulate}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved position."""
        self.epoch, self.position = state["epoch"], state["global_batch"] * self.order.accumulate


def _identity(batch: Any) -> Any:
    return batch
