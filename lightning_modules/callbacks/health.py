"""What stops a run that cannot go on: losses that are no numbers, processes that hang or are gone."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

MicroBatches = list[tuple[list[str], Tensor]]
_SHOWN = 16
_RANKS_SHOWN = 4
_ANSWER_S = 5.0


class Diverged(RuntimeError):
    """A loss or gradient is not finite; the message names step and samples."""


class FiniteCheck:
    """Stops before an optimiser step whose gradients are not finite.

    The norm of all gradients tells. A GPU is not waited for: there the step before is looked at, so that one step too
    many may be computed, but ``settle`` comes before anything is saved.
    """

    def __init__(self) -> None:
        self._open: tuple[int, Tensor, torch.cuda.Event | None, MicroBatches] | None = None

    def expect(self, step: int, norm: Tensor, micro_batches: MicroBatches) -> None:
        """Look at a step.

        Args:
            step: optimiser steps made before.
            norm: float scalar, of the gradients of all processes.
            micro_batches: names of the samples of each, and its loss on this process.

        Raises:
            Diverged: on all processes alike.
        """
        self.settle()
        copied = None
        if norm.is_cuda:
            norm, copied = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._open = step, norm, copied, micro_batches
        if copied is None:
            self.settle()

    def settle(self) -> None:
        """Look at the step that is still open.

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
        mine = [(ids, float(loss)) for ids, loss in micro_batches]
        everywhere = [mine]
        if dist.is_initialized():
            everywhere = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, mine)
        batches = [(rank, ids, loss) for rank, of_rank in enumerate(everywhere) for ids, loss in of_rank]
        wrong = [batch for batch in batches if not math.isfinite(batch[2])]
        found = "; ".join(f"rank {rank}: loss {loss} on {_some(ids)}" for rank, ids, loss in wrong)
        all_ids = [name for _, ids, _ in batches for name in ids]
        raise Diverged(
            f"step {step + 1}: the norm of the gradients is {float(norm)} "
            f"({found or f'all losses are finite, the batch is {_some(all_ids)}'}): nothing of it is saved; look at "
            "these samples or lower model.init_args.optim.learning_rate, then call it again"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class StallWatch(L.Callback):
    """Ends all processes of a run when one of them is gone or makes no progress.

    Every process says in the store that they all share where it is. A thread watches: where nothing was said for
    ``timeout_s``, it prints which rank is behind, at which step and with which samples, and ends the process.

    Args:
        timeout_s: longest time without a step or a validation batch; longer than one may take to read. Waiting for each
            other at the start ends half a minute later.
    """

    def __init__(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"stall_timeout_s: got {timeout_s}, allowed: above 0")
        self.timeout_s = timeout_s
        self._store: Any = None
        self._said: dict[str, Any] = {}
        self._over = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to watch, where there are others."""
        if trainer.world_size == 1:
            return
        self._over = threading.Event()
        self._store = PrefixStore("whereabouts", distributed_c10d._get_default_store())
        self._rank, self._world, self._trainer = trainer.global_rank, trainer.world_size, trainer
        self._parent = os.getppid() if trainer.local_rank else None
        self._say(trainer, "starting")
        threading.Thread(target=self._watch, args=(self._over,), daemon=True, name="stall-watch").start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch has arrived."""
        self._say(trainer, "computing", batch.ids)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is done."""
        self._say(trainer, "waiting for the batch after", batch.ids)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Note that a batch of validation questions, or a list of benchmark batches, has arrived."""
        batches = batch if isinstance(batch, list) else [batch]
        ids = [name for each in batches for name in each.ids]
        self._say(trainer, "answering questions about", ids)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """A batch of questions has arrived."""
        self._say(trainer, "answering questions about", batch.ids)

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """A clip of a benchmark has arrived."""
        self._say(trainer, "answering questions about", batch.ids)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last save and the hand-off may take their time."""
        self._say(trainer, "ending")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where every process was."""
        if self._store is not None:
            self._over.set()
            _print(f"rank {self._rank} stopped by an error; {self._places()}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End watching; answering after training begins anew."""
        self._over.set()
        self._store = None

    def _say(self, trainer: L.Trainer, doing: str, ids: list[str] | None = None) -> None:
        if self._store is None:
            return
        # A list and a number per batch; the store is a dictionary on the first process.
        self._said = {"at": time.time(), "step": trainer.global_step + 1, "doing": doing, "ids": (ids or [])[:_SHOWN]}
        self._said_at = time.monotonic()
        with suppress(RuntimeError):  # the first process, which holds the store, may have left before this one
            self._store.set(str(self._rank), json.dumps(self._said))

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.timeout_s / 4)):
            if self._parent is not None and os.getppid() != self._parent:
                self._end("the process that started this one is gone")
            if time.monotonic() - self._said_at > self.timeout_s:
                self._end(f"nothing was done for {self.timeout_s:g} s (stall_timeout_s)")

    def _end(self, why: str) -> None:
        """End this process and those it started, whatever they wait for."""
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(frame)[-8:])
        _print(f"error: {why}; {self._places()}; rank {self._rank} is at\n{stack}")
        launcher: Any = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(1)

    def _places(self) -> str:
        """Where the processes are, the one that was heard of last first; the first process may not answer any more."""
        heard = {self._rank: self._said}

        def ask() -> None:
            for rank in range(self._world):
                if rank != self._rank and self._store.check([str(rank)]):
                    heard[rank] = json.loads(self._store.get(str(rank)))

        def ask_quietly() -> None:
            with suppress(RuntimeError):
                ask()

        asking = threading.Thread(target=ask_quietly, daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        now, late = time.time(), sorted(heard, key=lambda rank: float(heard[rank]["at"]))
        places = [f"rank {r} {now - heard[r]['at']:.0f} s ago in step {_place(heard[r])}" for r in late[:_RANKS_SHOWN]]
        lost = [str(rank) for rank in range(self._world) if rank not in heard]
        if lost:
            places.insert(0, f"nothing is known of rank {', '.join(lost[:_RANKS_SHOWN])} (rank 0 does not answer)")
        return "; ".join(places)


def _print(text: str) -> None:
    """In one piece, since other processes print there too."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _place(said: dict[str, Any]) -> str:
    return f"{said['step']}, {said['doing']} {', '.join(said['ids'])}".rstrip()
