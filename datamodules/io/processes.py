"""Start processes that read for a trainer: next to threads and CUDA, and deaf to the signals that stop a run.

A fork copies the locks that other threads hold at that moment, and nothing releases the copies. The processes are
therefore forked from a server, a process without threads of ours that has imported what they need.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to stop. Clusters send them to every process of a job, and a terminal sends Ctrl-C so."""


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block ``STOP_SIGNALS`` in this thread, and for good in the processes that it starts meanwhile.

    A signal that arrives is handled at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_server(modules: Sequence[str]) -> None:
    """Start the server that processes are forked from, if it is not running; returns at once.

    It and they block ``STOP_SIGNALS``: the process that started them ends them.

    Args:
        modules: imported by the server, so that no process has to import them.
    """
    forkserver.set_forkserver_preload([module for module in modules if module != "__main__"])
    # Python's own helper process comes first, because starting it unblocks signals.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with stop_signals_blocked():
            start()


def end_with_parent() -> None:
    """Let this process end when the one that started it is gone, even in the middle of a task."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent: this is no worker process: call it in one")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()
