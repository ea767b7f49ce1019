"""Run tasks in worker processes that are replaced when they hang or crash, and that end with the main process."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

from tqdm import tqdm

from datamodules.io.processes import end_with_parent, start_server

Item = TypeVar("Item")
Result = TypeVar("Result")
Beat = Callable[[], None]
"""Called by a task to show that it makes progress."""

_BEAT_S = 0.2  # between two signs of life
_START_S = 120.0  # for a worker process to start


@dataclass(frozen=True)
class Failure:
    """Outcome of a task that returned no result.

    Attributes:
        kind: name of the error's class; ``TimedOut`` or ``Crashed`` if the process hung or died.
        reason: the error's message in one line.
        error: the error, unless it cannot be pickled.
    """

    kind: str
    reason: str
    error: Exception | None = field(default=None, compare=False)


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, description: str, unit: str
) -> list[Result]:
    """Apply a function to every item, with a progress bar.

    Args:
        function: pickled, as are items and results, if there are several workers.
        items: arguments.
        workers: number of processes; 1 or fewer works in this process.
        description: of the progress bar.
        unit: of the progress bar, such as ``file``.

    Returns:
        The results in the order of ``items``.

    Raises:
        Exception: the first error of ``function``.
        RuntimeError: a process died.
    """
    bar: dict[str, Any] = {"total": len(items), "desc": description, "unit": unit, "mininterval": 1}
    if workers <= 1:
        return [function(item) for item in tqdm(items, **bar)]
    results: dict[int, Result] = {}
    task = partial(_apply_numbered, function)
    module = (function.func if isinstance(function, partial) else function).__module__
    preload = [] if module == "__main__" else [module]
    for (number, _), outcome in tqdm(run_tasks(task, enumerate(items), workers, preload=preload), **bar):
        if isinstance(outcome, Failure):
            raise outcome.error or RuntimeError(f"{description}: {outcome.kind}: {outcome.reason}")
        results[number] = outcome
    return [results[number] for number in range(len(items))]


def _apply_numbered(function: Callable[[Item], Result], numbered: tuple[int, Item], beat: Beat) -> Result:
    return function(numbered[1])


def run_tasks(
    task: Callable[..., Result],
    items: Iterable[Item],
    workers: int,
    patience_s: float = math.inf,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Item, Result | Failure]]:
    """Run a task on every item in processes that are killed and replaced when they hang.

    Args:
        task: called as ``task(item, beat=beat)``; calls ``beat()`` whenever it makes progress. It is pickled, as are
            items and results.
        items: arguments.
        workers: number of processes.
        patience_s: seconds without a sign of life after which a process is killed.
        preload: modules that are imported once for all processes, because importing them takes long.

    Yields:
        Every item and its result, in the order of completion; a failure if the task raised an error, hung or crashed.
    """
    queue = deque(items)
    pool = [_Worker[Item, Result](task, patience_s, preload) for _ in range(min(workers, len(queue)))]
    try:
        for worker in pool:
            worker.assign(queue.popleft())
        while pool:
            left_s = max(0.0, min(worker.deadline for worker in pool) - time.monotonic())
            wait([worker.pipe for worker in pool], left_s if math.isfinite(left_s) else None)
            for worker in list(pool):
                outcome = worker.poll()
                if outcome is None:
                    continue
                yield worker.item, outcome[0]
                if queue:
                    worker.assign(queue.popleft())
                else:
                    pool.remove(worker)
                    worker.stop()
    finally:
        for worker in pool:
            worker.stop()


class _Worker(Generic[Item, Result]):
    """A process that works on one item at a time, and is started again if it was stopped."""

    item: Item
    pipe: Connection
    deadline: float

    def __init__(self, task: Callable[..., Result], patience_s: float, preload: Sequence[str]) -> None:
        self._task, self._patience_s, self._preload = task, patience_s, preload
        self._process: BaseProcess | None = None

    def assign(self, item: Item) -> None:
        """Send the next item."""
        self.deadline = time.monotonic() + self._patience_s
        if self._process is None:
            start_server(self._preload)
            context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that threads hold
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._task, theirs), daemon=True)
            process.start()
            theirs.close()
            self._process = process
            self.deadline = time.monotonic() + max(self._patience_s, _START_S)
        self.item = item
        with suppress(OSError):  # if the process has died, poll reports it
            self.pipe.send(item)

    def poll(self) -> tuple[Result | Failure] | None:
        """Return the outcome, or None while the process is working."""
        while self.pipe.poll():
            try:
                outcome = self.pipe.recv()
            except (EOFError, OSError):
                return (Failure("Crashed", f"the process died with exit status {self.stop()}"),)
            self.deadline = time.monotonic() + self._patience_s
            if outcome is not None:
                return cast(tuple[Result | Failure], outcome)
        if time.monotonic() < self.deadline:
            return None
        self.stop()
        return (Failure("TimedOut", f"no progress for {self._patience_s:g} s"),)

    def stop(self) -> int | None:
        """End the process, whatever it is doing; return its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return None
        self.pipe.close()
        process.join(0.5)  # an idle or dead one ends by itself
        process.kill()
        process.join(5.0)
        return process.exitcode


def _serve(task: Callable[..., Any], pipe: Connection) -> None:
    """Answer items in a worker process until the other end of the pipe is closed."""
    end_with_parent()
    silent_since = -math.inf

    def beat() -> None:
        nonlocal silent_since
        if time.monotonic() > silent_since + _BEAT_S:
            pipe.send(None)
            silent_since = time.monotonic()

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            beat()
            item = pipe.recv()
            try:
                outcome = task(item, beat=beat)
            except Exception as error:
                outcome = _failure(error)
            pipe.send((outcome,))


def _failure(error: Exception) -> Failure:
    reason = " ".join(str(error).split())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # such as one whose arguments are not those of its constructor
        return Failure(type(error).__name__, reason)
    return Failure(type(error).__name__, reason, error)
