"""Turn an error into a message and an exit status, in one process or on every rank of a distributed run."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from lightning_modules.callbacks.finite_check import Diverged
from lightning_modules.compat import default_store
from lightning_modules.signals import STOPPED
from lightning_modules.training import Interrupted

_PATIENCE_S = 30.0  # that rank 0 waits for the others to end


def exit_status(error: Exception) -> int:
    """Print an error and return the exit status.

    In a distributed run the process ends here, since the other ranks may be gone.

    Raises:
        Exception: the error itself, if it is unexpected and the run is not distributed.
    """
    if isinstance(error, Interrupted):
        return _end_all_ranks(f"stopped: {error}", STOPPED, patience_s=0 if error.__cause__ else _PATIENCE_S)
    if isinstance(error, Diverged):
        return _end_all_ranks(f"error: {error}", 1)
    if isinstance(error, ValueError | OSError):
        if not dist.is_initialized():
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        print(f"error: rank {dist.get_rank()}: {_one_line(error)}", file=sys.stderr)
        _end(2)
    if isinstance(error, dist.DistError) and not dist.is_initialized():
        print(f"error: the processes did not connect (stall_timeout_s): {_one_line(error)}", file=sys.stderr)
        return 1
    if not dist.is_initialized():
        raise error
    traceback.print_exception(error)
    _end(1)


def _end_all_ranks(message: str, status: int, patience_s: float = _PATIENCE_S) -> int:
    """End a run whose ranks all raised the same error: rank 0 prints it, and ends after the others with the status."""
    if not dist.is_initialized():
        print(message, file=sys.stderr)
        return status
    store, rank = default_store(), dist.get_rank()
    if rank:
        with suppress(RuntimeError):
            store.set(f"left/{rank}", "")
        _end(0)
    with suppress(RuntimeError):
        store.wait([f"left/{other}" for other in range(1, dist.get_world_size())], timedelta(seconds=patience_s))
        time.sleep(0.5)
    print(message, file=sys.stderr)
    _end(status)


def _end(status: int) -> NoReturn:
    """Exit without waiting for other ranks, which may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _one_line(error: Exception) -> str:
    """Return an error's own message; one that comes from a DataLoader's worker has a traceback before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Caught ") else " ".join(lines)
    return re.sub(r"^[\w.]+(Error|Missing|Video|Stream|Span|File|Damaged): ", "", text)
