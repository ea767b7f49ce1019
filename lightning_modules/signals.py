"""End a run that is asked to stop while it has nothing to save: as it starts or answers questions."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from datamodules.io.processes import STOP_SIGNALS

STOPPED = 75
"""Exit status of a stage that was asked to stop and can be resumed: "try again" by convention (EX_TEMPFAIL)."""
_LAUNCHER_CHECK_S = 0.2
_CLUSTER_VARIABLES = {"SLURM_PROCID", "TORCHELASTIC_RUN_ID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK"}


class ExitOnSignal:
    """Context in which a signal of ``STOP_SIGNALS`` ends the process with status 75, whatever the process is doing.

    Whoever saves before it stops, as ``callbacks.checkpoint`` does, takes over with handlers of its own and restores
    these afterwards.

    A process that Lightning's launcher started next to rank 0 must not end before that one, which would be killed: it
    keeps the signal for ``take_pending``, and ends when rank 0 is gone.

    Outside of the main thread, where Python allows no handlers, the context has no effect.

    Args:
        leave: called before the end, with the signal's name.
    """

    def __init__(self, leave: Callable[[str], None]) -> None:
        self._leave = leave
        self._ending = threading.Lock()
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> ExitOnSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._launcher = os.getppid()
        # Python calls handlers between two operations of the main thread, which may wait for another process for
        # minutes. A thread that is woken through a pipe reacts at once.
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True, name="signals").start()
        self._usual = {number: signal.signal(number, self._end) for number in STOP_SIGNALS}
        self._usual_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._usual:
            signal.set_wakeup_fd(self._usual_wakeup, warn_on_full_buffer=True)
            for number, handler in self._usual.items():
                signal.signal(number, handler)
            os.close(self._write_end)
            take_pending()

    def _watch(self, read_end: int) -> None:
        while numbers := os.read(read_end, 64):
            for number in numbers:
                if number in STOP_SIGNALS and signal.getsignal(number) == self._end:
                    self._end(number, None)
        os.close(read_end)

    def _end(self, number: int, frame: Any = None) -> None:
        if not self._ending.acquire(blocking=False):
            return
        if _launched_by_rank_zero():
            _pending.append(number)
            threading.Thread(target=_end_with_launcher, args=(self._launcher,), daemon=True, name="launcher").start()
            return
        try:
            self._leave(signal.Signals(number).name)
        finally:
            os._exit(STOPPED)


_pending: list[int] = []


def take_pending() -> bool:
    """Return whether the process was asked to stop and has not reacted yet; the caller reacts."""
    found = bool(_pending)
    _pending.clear()
    return found


def _launched_by_rank_zero() -> bool:
    """Return whether Lightning's launcher started this process, not a cluster's."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and not _CLUSTER_VARIABLES & os.environ.keys()


def _end_with_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LAUNCHER_CHECK_S)
    os._exit(STOPPED)
