"""End all processes of a run when one of them hangs or is gone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import lightning as L
from torch.distributed.distributed_c10d import PrefixStore

from lightning_modules.compat import default_store
from lightning_modules.lock import release_all

_NAMES_SHOWN = 16
_RANKS_SHOWN = 4
_REPLY_TIMEOUT_S = 5.0


class StallWatch(L.Callback):
    """End all processes of a run when one of them is gone or makes no progress.

    Every process reports its progress to the key-value store that they share. A thread watches: after ``timeout_s``
    without progress it prints which rank is behind, at which step and with which samples, and ends the process.

    Args:
        timeout_s: longest time without a training step or a validation batch, in seconds; must be longer than it takes
            to read one. Waiting for the other processes at the start ends half a minute later.

    Raises:
        ValueError: ``timeout_s`` is not positive.
    """

    def __init__(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"stall_timeout_s: got {timeout_s}, allowed: above 0")
        self.timeout_s = timeout_s
        self._store: Any = None
        self._progress: dict[str, Any] = {}
        self._reported_at = 0.0
        self._over = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start to watch, where there are other processes."""
        if trainer.world_size == 1:
            return
        self._over = threading.Event()
        self._store = PrefixStore("whereabouts", default_store())
        self._rank, self._world, self._trainer = trainer.global_rank, trainer.world_size, trainer
        self._parent = os.getppid() if trainer.local_rank else None
        self._report(trainer, "starting")
        threading.Thread(target=self._watch, args=(self._over,), daemon=True, name="stall-watch").start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Report that a batch has arrived."""
        self._report(trainer, "computing", batch.ids)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report that a batch is done."""
        self._report(trainer, "waiting for the batch after", batch.ids)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Report that a batch of validation questions, or a list of benchmark batches, has arrived."""
        names: list[str] = []
        for each in batch if isinstance(batch, list) else [batch]:
            names += each.ids
        self._report(trainer, "answering questions about", names)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Report that a batch of validation questions has arrived."""
        self._report(trainer, "answering questions about", batch.ids)

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Report that a clip of a benchmark has arrived."""
        self._report(trainer, "answering questions about", batch.ids)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the end; the last checkpoint and the export of stage weights may take their time."""
        self._report(trainer, "ending")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Print the progress of every process."""
        if self._store is not None:
            self._over.set()
            _print(f"rank {self._rank} stopped by an error; {self._places()}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching; evaluation after training starts it again."""
        self._over.set()
        self._store = None

    def _report(self, trainer: L.Trainer, doing: str, ids: list[str] | None = None) -> None:
        if self._store is None:
            return
        # The store is a dictionary on rank 0; a report is one small entry for each batch.
        names = (ids or [])[:_NAMES_SHOWN]
        self._progress = {"at": time.time(), "step": trainer.global_step + 1, "doing": doing, "ids": names}
        self._reported_at = time.monotonic()
        with suppress(RuntimeError):  # rank 0, which holds the store, may have left before this one
            self._store.set(str(self._rank), json.dumps(self._progress))

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.timeout_s / 4)):
            if self._parent is not None and os.getppid() != self._parent:
                self._end("the process that started this one is gone")
            if time.monotonic() - self._reported_at > self.timeout_s:
                self._end(f"no progress for {self.timeout_s:g} s (stall_timeout_s)")

    def _end(self, reason: str) -> None:
        """End this process and those it started, also if they are blocked."""
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(frame)[-8:])
        _print(f"error: {reason}; {self._places()}; rank {self._rank} is at\n{stack}")
        release_all()
        launcher: Any = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(1)

    def _places(self) -> str:
        """Describe the progress of the ranks, the one that reported longest ago first."""
        known = {self._rank: self._progress}

        def read_store() -> None:
            with suppress(RuntimeError):
                for rank in range(self._world):
                    if rank != self._rank and self._store.check([str(rank)]):
                        known[rank] = json.loads(self._store.get(str(rank)))

        # Rank 0 holds the store and may not answer any more, so another thread asks.
        reader = threading.Thread(target=read_store, daemon=True)
        reader.start()
        reader.join(_REPLY_TIMEOUT_S)

        now = time.time()
        places = []
        for rank in sorted(known, key=lambda rank: float(known[rank]["at"]))[:_RANKS_SHOWN]:
            places.append(f"rank {rank} {now - known[rank]['at']:.0f} s ago in step {_describe(known[rank])}")
        lost = [str(rank) for rank in range(self._world) if rank not in known]
        if lost:
            places.insert(0, f"nothing is known of rank {', '.join(lost[:_RANKS_SHOWN])} (rank 0 does not answer)")
        return "; ".join(places)


def _print(text: str) -> None:
    """Print to stderr in one piece, since other processes print there too."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _describe(progress: dict[str, Any]) -> str:
    return f"{progress['step']}, {progress['doing']} {', '.join(progress['ids'])}".rstrip()
