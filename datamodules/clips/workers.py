"""A DataLoader whose processes start safely next to threads and CUDA, share the dataset, and ignore stop signals."""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import context, popen_forkserver, reduction
from multiprocessing.process import BaseProcess
from typing import IO, Any, TypeVar

from torch.utils.data import DataLoader

from datamodules.io.processes import end_with_parent, start_server, stop_signals_blocked

Batch = TypeVar("Batch")
_CHECK_S = 5.0  # between two looks at whether the processes live
_ALIGNMENT = 64  # bytes, of arrays in shared memory


class WorkerLoader(DataLoader[Batch]):
    """DataLoader whose worker processes are forked from a server (see ``datamodules.io.processes``).

    Arrays of the dataset lie in memory that the processes share, and cannot be written there. A process that dies is
    noticed within seconds, whatever the ``timeout``.

    Raises:
        TypeError: while iterating: the dataset cannot be pickled.
        RuntimeError: while iterating: a process died, or no batch came within ``timeout`` seconds.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches."""
        if not self.num_workers:
            yield from super().__iter__()
            return
        batches = self._start()
        while True:
            try:
                batch = self._wait(batches)
            except StopIteration:
                return
            yield batch

    def _start(self) -> Iterator[Batch]:
        if self._iterator is None:  # else the processes of the previous epoch continue
            start_server(["datamodules.clips.dataset", type(self.dataset).__module__])
            self.multiprocessing_context = _SharingContext(self.dataset)
        # Torch looks at its processes when a wait is over: the wait is short here, and repeated up to the timeout.
        timeout, self.timeout = self.timeout, min(self.timeout or _CHECK_S, _CHECK_S)
        try:
            with stop_signals_blocked():
                return super().__iter__()
        finally:
            self.timeout = timeout

    def _wait(self, batches: Iterator[Batch]) -> Batch:
        begun = time.monotonic()
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if self.timeout and time.monotonic() - begun >= self.timeout:
                    raise RuntimeError(f"DataLoader timed out after {self.timeout:g} seconds") from None


class _Popen(popen_forkserver.Popen):
    """A process that is ended by SIGKILL, since it ignores SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _WorkerProcess(context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # type: ignore[override]
        return _Popen(process_obj)


class _SharingContext(context.ForkServerContext):
    """Makes processes that get a dataset as arrays in shared memory.

    Args:
        dataset: recognised among the arguments of a process.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self._dataset, self._shared = dataset, _Shared(dataset)

    def Process(self, target: Callable[..., object], args: tuple[Any, ...]) -> _WorkerProcess:  # type: ignore[override]
        """Return a process whose function gets its copy of the dataset."""
        return _WorkerProcess(target=_serve, args=(target, *self._replace(args)))

    def _replace(self, values: Iterable[Any]) -> list[Any]:
        """Return values with the shared form of the dataset, which newer versions of torch put in a list."""
        replaced = []
        for value in values:
            if isinstance(value, list):
                value = self._replace(value)
            replaced.append(self._shared if value is self._dataset else value)
        return replaced


def _serve(target: Callable[..., object], *arguments: Any) -> None:
    end_with_parent()
    target(*arguments)


class _Shared:
    """An object that another process unpickles with its arrays in shared memory.

    The arrays are numpy's, as pickle protocol 5 passes them out of band.
    """

    def __init__(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        try:
            self._head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        except Exception as error:  # whatever the object's classes raise
            raise TypeError(
                f"{type(value).__name__}: cannot be sent to worker processes ({error}): make it picklable, or set "
                "num_workers to 0"
            ) from error
        self._file = _memory_file()
        self._sizes = []
        for buffer in buffers:
            content = buffer.raw()
            self._file.write(content)
            self._file.write(bytes(-content.nbytes % _ALIGNMENT))
            self._sizes.append(content.nbytes)
        self._file.flush()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as the object itself."""
        return _unpack, (self._head, reduction.DupFd(self._file.fileno()), self._sizes)


def _unpack(head: bytes, file: Any, sizes: list[int]) -> Any:
    descriptor = file.detach()
    try:
        # Without arrays the file is empty, which cannot be mapped.
        memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if any(sizes) else b"")
    finally:
        os.close(descriptor)
    buffers, start = [], 0
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += size + -size % _ALIGNMENT
    return pickle.loads(head, buffers=buffers)


def _memory_file() -> IO[bytes]:
    """Return a file without a name, in memory where the system has such files: ``/dev/shm`` is small in containers."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dataset"), "w+b")
    return tempfile.TemporaryFile()
