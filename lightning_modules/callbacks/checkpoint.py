"""Checkpoints that an interrupted stage resumes from: folders of sharded tensors, complete or absent.

::

    <run>/checkpoints/0000300/      after 300 optimiser steps
      manifest.json                 format, and a digest of every other file
      state.pt                      loops, schedule, position in the data, counts; no tensors
      .metadata, *.distcp           trained weights and optimiser, by name (torch.distributed.checkpoint)

Tensors are stored by name and shard, so that any strategy with any number of processes resumes from what another one
wrote. A folder is written under another name first and renamed when all of it is on the disk; the last two are kept.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from datamodules.io.processes import STOP_SIGNALS
from lightning_modules.compat import ignore_signals, recount_micro_batches
from lightning_modules.distributed import gather_objects
from lightning_modules.signals import take_pending
from lightning_modules.weights.tensors import file_digest, sync

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

FORMAT = 1
KEPT = 2
_FULL_BYTES = 2**20
_ECHO_S = 2.0
TENSORS = ("state_dict", "optimizer")
"""Keys of a checkpoint that hold tensors: by name, and by name and kind of state."""


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not belong to this run; the message names the file and how to fix it."""


def newest(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None."""
    return max((manifest.parent for manifest in folder.glob("[0-9]*/manifest.json")), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """Read everything of a checkpoint except its tensors.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = manifest["format"]
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True) if found == FORMAT else {}
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise CheckpointError(f"{_damaged(folder, 'it')} ({' '.join(str(error).split())[:200]})") from None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format is {found}, this version reads {FORMAT}: use FORCE=1")
    return state


def check_files(folder: Path) -> None:
    """Compare every file with the manifest's digests.

    Raises:
        CheckpointError: one is missing or differs, or the manifest is damaged itself.
    """
    try:
        digests: dict[str, str] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(folder, f"its manifest.json ({type(error).__name__}: {error})")) from None
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            raise CheckpointError(_damaged(folder, f"{name}, which {'differs' if file.is_file() else 'is missing'},"))


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name, those of the optimiser as ``optimizer.<name>.<kind>``.

    Raises:
        CheckpointError: the list is damaged.
    """
    entries = _stored(folder)
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _stored(folder: Path) -> dict[str, Any]:
    """Return what ``torch.distributed.checkpoint`` knows of everything in a checkpoint, by name."""
    try:
        return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)
    except Exception as error:  # unpickling raises whatever the damage leads to
        raise CheckpointError(f"{_damaged(folder, 'its .metadata')} ({error})") from None


def read_tensors(folder: Path, into: dict[str, Any], alone: bool = False) -> None:
    """Fill tensors, sharded or not, from a checkpoint of any number of processes.

    Args:
        folder: of the checkpoint.
        into: tensors, nested as they were saved.
        alone: this process reads by itself, even if there are others.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        state_dict_loader.load(
            into, storage_reader=FileSystemReader(folder), no_dist=alone or not dist.is_initialized()
        )
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{_damaged(folder, 'it')} ({_reason(error)})") from None


class CheckpointFolders(CheckpointIO):
    """Write checkpoints in the background from copies; all processes of a sharded run write together.

    A save that fails is reported, keeps earlier checkpoints, and does not stop the run.

    Attributes:
        last: the newest complete checkpoint that this process knows of.
    """

    def __init__(self) -> None:
        self.last: Path | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._group: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy the tensors, and write them in the background once the previous save is done."""
        self.wait()
        sharded = checkpoint.pop("sharded")
        if sharded and self._group is None:  # writers must not disturb the collectives of training
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        tensors = {key: checkpoint.pop(key) for key in TENSORS}
        copies: Any = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
        if self._writer is None:  # on the same device as this thread, else each process would use the first one
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._writer = ThreadPoolExecutor(1, "checkpoint", None if device is None else partial(_use, device))
        self._pending = self._writer.submit(self._write, Path(path), copies, checkpoint, sharded)

    def wait(self, at_most_s: float | None = None) -> None:
        """Wait for the save that is in progress.

        Raises:
            TimeoutError: it takes longer than ``at_most_s``.
            RuntimeError: another process is gone.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result(at_most_s)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read everything except the tensors, which ``Checkpoints`` reads when the model is in its final form."""
        self.last = Path(path)
        return read_state(self.last) | {"state_dict": {}, "optimizer_states": []}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder."""
        shutil.rmtree(path, ignore_errors=True)

    def _write(self, path: Path, tensors: dict[str, Any], state: dict[str, Any], sharded: bool) -> None:
        rank = dist.get_rank() if sharded else 0
        new = path.with_name(f".{path.name}.new")
        digests: dict[str, str] = {}

        def begin() -> None:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            packed = io.BytesIO()
            torch.save(state, packed)
            _write_synced(new / "state.pt", packed.getbuffer())

        def write() -> None:
            writer = FileSystemWriter(new)
            state_dict_saver.save(tensors, storage_writer=writer, process_group=self._group, no_dist=not sharded)
            digests.update({file.name: _digest(file) for file in new.glob(f"__{rank}_*")})

        def finish() -> None:
            files = {name: digest for of_rank in everywhere for name, digest in of_rank.items()}
            files |= {name: _digest(new / name) for name in (".metadata", "state.pt")}
            text = json.dumps({"format": FORMAT, "step": state["global_step"], "files": files}, indent=1)
            _write_synced(new / "manifest.json", text.encode())
            sync(new)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(new, path)
            sync(path.parent)
            for old in sorted(path.parent.glob("[0-9]*"))[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

        failure = self._together(begin if rank == 0 else None, path.parent, sharded)
        failure = failure or self._together(write, path.parent, sharded)
        if failure is None:
            everywhere = gather_objects(digests, self._group) if sharded else [digests]
            failure = self._together(finish if rank == 0 else None, path.parent, sharded)
        if failure is None:
            self.last = path
        elif rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            kept = f"{self.last} is kept" if self.last else "there is none before it"
            print(f"checkpoint {path} could not be written: {failure}; {kept}, training continues", file=sys.stderr)

    def _together(self, work: Callable[[], None] | None, folder: Path, sharded: bool) -> str | None:
        """Do this process's share, if any; return why it failed here or elsewhere, or None."""
        failure = None
        try:
            if work is not None:
                work()
        except (Exception, CheckpointException) as error:
            failure = _reason(error)
            with suppress(OSError):
                if shutil.disk_usage(folder).free < _FULL_BYTES:  # libraries have messages of their own
                    failure = f"No space left on device ({failure})"
        failures = gather_objects(failure, self._group) if sharded else [failure]
        return next(filter(None, failures), None)


class Checkpoints(L.Callback):
    """Save every so many optimiser steps and when the process is asked to stop; restore what a resumed run needs.

    A checkpoint holds the trained parameters, the stage's own buffers and the optimiser's state, all by name. It is
    written through the plugin ``CheckpointFolders``.

    SIGTERM, SIGUSR1 (as SLURM sends it ahead of a time limit or a preemption) and SIGINT stop all processes after the
    same optimiser step. A request to stop reaches the other processes one step later, so that no step waits for this
    message. A signal more than two seconds after the first has its usual effect; earlier ones are echoes, since make
    and timeout pass on what the whole process group received. The time limit of ``Trainer(max_time=...)`` is such a
    request too: it counts from the start of each call, so that the next call resumes.

    The last step is saved too, so that nothing is lost where the stage weights cannot be written.

    Args:
        folder: folder of all checkpoints.
        every_n_steps: optimiser steps between two checkpoints; 0 saves only when asked to stop.

    Raises:
        ValueError: ``every_n_steps`` is negative.

    Attributes:
        stopped: training was asked to stop, and a checkpoint was saved to resume from.
        signalled: this process received a signal.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        if every_n_steps < 0:
            raise ValueError(f"checkpoint_every_n_steps: got {every_n_steps}, allowed: 0 or more")
        self.folder, self.every_n_steps = folder, every_n_steps
        self.stopped = False
        self.signalled = False
        self._signalled_at = float("inf")
        self._max_time_s: float | None = None
        self._deadline = float("inf")
        self._group: Any = None
        self._pending_all_reduce: tuple[Tensor, Any] | None = None
        self._usual_handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take signals and the time limit over from Lightning; allow checkpoints without frozen parameters."""
        ignore_signals(trainer)
        # Lightning's Timer stops between micro-batches, without a checkpoint, and counts the time of earlier calls.
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        limits = [limit for limit in (timer.time_remaining() for timer in timers) if limit is not None]
        if limits:
            self._max_time_s = min(limits)
            trainer.callbacks = [c for c in trainer.callbacks if c not in timers]  # type: ignore[attr-defined]
        pl_module.strict_loading = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore weights and optimiser, and install the signal handlers."""
        self._usual_handlers = {number: signal.signal(number, self.on_signal) for number in STOP_SIGNALS}
        self.signalled = take_pending()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._require_same_step(trainer)
        if trainer.ckpt_path:
            _restore(Path(trainer.ckpt_path), pl_module, trainer.optimizers[0])
        if self._max_time_s is not None:
            self._deadline = time.monotonic() + self._max_time_s

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimiser step if it is due, and stop if asked to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self.stop_requested()
        step, every = trainer.global_step, self.every_n_steps
        stage: Stage = pl_module  # type: ignore[assignment]
        if stop or (every and (step % every == 0 or step == stage.total_steps())):
            trainer.save_checkpoint(self.folder / f"{step:07d}", weights_only=False)
        if stop:
            self.stopped = trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate once more, which may take longer than is left

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep trained parameters and the stage's own buffers, and name the optimiser's state by parameters."""
        stage: Stage = pl_module  # type: ignore[assignment]
        names = {id(parameter): name for name, parameter in stage.named_parameters()}
        kept = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
        kept |= {name for name, _ in stage.named_buffers() if not name.startswith("model.")}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}
        optimizer = trainer.optimizers[0]
        checkpoint["optimizer"] = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
        checkpoint["learning_rates"] = {group["name"]: group["lr"] for group in optimizer.param_groups}
        del checkpoint["optimizer_states"]
        checkpoint["started_from"] = stage.started_from()
        checkpoint["accumulate"] = trainer.accumulate_grad_batches
        checkpoint["sharded"] = stage.device_mesh is not None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count micro-batches as this run accumulates them.

        Raises:
            CheckpointError: the run started from other weights than those that are there now.
        """
        stage: Stage = pl_module  # type: ignore[assignment]
        before, now = checkpoint["started_from"], stage.started_from()
        if changed := sorted(part for part in now if before.get(part) != now[part]):
            raise CheckpointError(
                f"checkpoint: it started from a different {', '.join(changed)} than "
                f"{stage.sources[changed[0]].where} contains: train from scratch with FORCE=1"
            )
        recount_micro_batches(checkpoint, checkpoint["accumulate"], trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last save."""
        self._close(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Wait for the last save, unless it needs a process that is gone; the exception itself is the message."""
        with suppress(Exception):
            self._close(trainer, at_most_s=20)

    def on_signal(self, number: int, frame: Any) -> None:
        """Request a stop after the current step; a later signal has its usual effect."""
        if not self.signalled:
            self.signalled, self._signalled_at = True, time.monotonic()
        elif time.monotonic() > self._signalled_at + _ECHO_S:
            signal.signal(number, self._usual_handlers[number])
            signal.raise_signal(number)

    def stop_requested(self) -> bool:
        """Return whether this process, or any of several up to the previous step, was asked to stop."""
        asked = self.signalled or time.monotonic() >= self._deadline
        if self._group is None:
            return asked
        requested = False
        if self._pending_all_reduce is not None:
            flag, work = self._pending_all_reduce
            work.wait()
            requested = bool(flag)
        flag = torch.tensor(int(asked))
        self._pending_all_reduce = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return requested

    def _close(self, trainer: L.Trainer, at_most_s: float | None = None) -> None:
        folders: Any = trainer.strategy.checkpoint_io
        try:
            folders.wait(at_most_s)
        finally:
            for number, handler in self._usual_handlers.items():
                signal.signal(number, handler)
            self._usual_handlers = {}

    def _require_same_step(self, trainer: L.Trainer) -> None:
        if self._group is None:
            return
        steps = sorted(set(gather_objects(trainer.global_step, self._group)))
        if len(steps) > 1:
            raise CheckpointError(
                f"checkpoints {self.folder}: the processes resume from different steps ({steps}): every node must see "
                "the same files; wait until they do, and start again"
            )


def stopped_early(trainer: L.Trainer, stage: Stage) -> bool:
    """Return whether training was asked to stop before its last step; another callback may end it: it is complete."""
    if trainer.interrupted:
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    stopped = any(callback.stopped for callback in callbacks if isinstance(callback, Checkpoints))
    return stopped and trainer.global_step < stage.total_steps()


def signalled(trainer: L.Trainer) -> bool:
    """Return whether this process received a signal during training."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(callback.signalled for callback in callbacks if isinstance(callback, Checkpoints))


def _restore(folder: Path, stage: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Fill trained parameters, the stage's own buffers and the optimiser's state in place."""
    stored = stored_tensors(folder)
    parameters = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    if missing := sorted(name for name in parameters if f"state_dict.{name}" not in stored):
        raise CheckpointError(
            f"checkpoint {folder}: {len(missing)} trained tensors are missing, e.g. {missing[0]}: it was written by "
            "another configuration; train from scratch with FORCE=1"
        )
    tensors = {name: tensor for name, tensor in stage.state_dict().items() if f"state_dict.{name}" in stored}
    states: dict[str, dict[str, Any]] = {}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, entry in _stored(folder).items():
        if key.startswith("optimizer."):
            name, _, kind = key.removeprefix("optimizer.").rpartition(".")
            states.setdefault(name, {})[kind] = _empty_state(entry, parameters[name].detach(), fused)
    read_tensors(folder, {"state_dict": tensors, "optimizer": states})
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
    rates = read_state(folder)["learning_rates"]
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def _empty_state(entry: Any, parameter: Tensor, fused: bool) -> Any:
    """Return a value to fill for an entry of a parameter's optimiser state."""
    if not isinstance(entry, TensorStorageMetadata):
        return 0  # bitsandbytes counts steps in a number
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    # AdamW counts steps on the CPU, unless it is fused; other tensors are used where the parameter is.
    on_cpu = not len(entry.size) and not fused
    return torch.zeros(entry.size, dtype=dtype, device=None if on_cpu else parameter.device)


def _use(device: int) -> None:
    torch.cuda.set_device(device)


def _reason(error: BaseException) -> str:
    """Return the first cause as one line."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return " ".join(str(error).split()) or type(error).__name__


def _damaged(folder: Path, what: str) -> str:
    others = sorted(other.parent for other in folder.parent.glob("[0-9]*/manifest.json") if other.parent != folder)
    then = f"to resume from {others[-1].name}" if others else "to train the stage from scratch"
    return f"checkpoint {folder}: damaged, {what} cannot be used: delete the folder {then}"


def _write_synced(file: Path, content: bytes | memoryview) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(file: Path) -> str:
    return file_digest(file).hex()
