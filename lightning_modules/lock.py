"""Let one process at a time write to a run's folder, on any file system that the machines of a cluster share."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

NAME = "lock.json"
BEAT_S = 30.0
STALE_S = 300.0
"""Age of the last sign of life after which a process on another machine counts as gone."""


class RunLocked(ValueError):
    """Another process writes to the run; the message names it and what to do."""


class RunLock:
    """Context in which this process alone writes to a run's folder.

    The file ``lock.json`` names the process; of several processes one creates it, on network file systems too. A thread
    touches it every half minute. It is stale if its process is gone from this machine, or was silent for five minutes
    on another one; a job that a cluster has requeued waits for that.

    Args:
        folder: of the run; made if it is missing, and removed at the end if it is empty then.

    Raises:
        RunLocked: on entering, if another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self._own = _describe_process()
        self._over = threading.Event()
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        self._made = [path for path in (self.file.parent, *self.file.parent.parents) if not path.exists()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + STALE_S + BEAT_S
        while not self._create(self._own):
            holder = _read(self.file)
            if holder is None:  # released meanwhile
                continue
            if self._is_stale(holder):
                self._remove(holder)
            elif not self._is_requeued(holder) or time.monotonic() > deadline:
                raise RunLocked(self._message(holder))
            else:
                print(f"{self.file}: waits until this job's earlier process on {holder['host']} is gone", flush=True)
                time.sleep(BEAT_S / 3)
        threading.Thread(target=self._beat, daemon=True, name="run-lock").start()
        _held.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock, unless it is another process's by now, and folders that are still empty."""
        self._over.set()
        if self in _held:
            _held.remove(self)
        if _read(self.file) == self._own:
            self.file.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _create(self, holder: dict[str, Any]) -> bool:
        """Create the lock; return False if there is one."""
        try:
            with self.file.open("x", encoding="utf-8") as stream:  # O_EXCL
                stream.write(json.dumps(holder, indent=1) + "\n")
        except FileExistsError:
            return False
        return True

    def _remove(self, stale: dict[str, Any]) -> None:
        """Remove a stale lock, unless another process is doing so or has its own lock there by now."""
        guard = self.file.with_name(f".{NAME}.taken_over")
        try:
            guard.touch(exist_ok=False)  # O_EXCL
        except FileExistsError:
            if self._silent_s(guard) > BEAT_S:  # its process was killed meanwhile
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
            return
        try:
            if _read(self.file) == stale:
                self.file.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        if holder.get("machine") == self._own["machine"]:
            return bool(_started(int(holder["pid"])) != holder["started"])
        return self._silent_s(self.file) > STALE_S

    def _silent_s(self, file: Path) -> float:
        """Return the seconds since a file was touched, by the clock of the file system."""
        probe = self.file.with_name(f".{NAME}.{uuid.uuid4().hex}")
        try:
            probe.touch()
            return probe.stat().st_mtime - file.stat().st_mtime
        except FileNotFoundError:  # removed meanwhile
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _is_requeued(self, holder: dict[str, Any]) -> bool:
        same_job = holder.get("job") is not None and holder["job"] == self._own["job"]
        return same_job and holder["machine"] != self._own["machine"]

    def _message(self, holder: dict[str, Any]) -> str:
        job = f" of job {holder['job']}" if holder.get("job") else ""
        return (
            f"{self.file.parent}: process {holder.get('pid')}{job} on {holder.get('host')} writes to this run since "
            f"{holder.get('time')}: wait until it ends, or set another run_dir; if it is gone, delete {self.file}"
        )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(OSError):  # a network file system that is away for a moment
                holder = _read(self.file)
                if holder not in (None, self._own):
                    sys.stderr.write(f"error: {self._message(holder or {})} (this process was taken for gone)\n")
                    sys.stderr.flush()
                    os._exit(2)
                os.utime(self.file)


_held: list[RunLock] = []


def release_all() -> None:
    """Release the locks of this process, which is about to end at once."""
    for lock in list(_held):
        lock.release()


def _read(file: Path) -> dict[str, Any] | None:
    """Return who holds a lock; None if there is none."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # created, and not written yet
        holder = None
    return holder if isinstance(holder, dict) else {"host": "an unknown machine", "machine": None, "pid": "unknown"}


def _describe_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID") or os.environ.get("PBS_JOBID"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "started": _started(pid),
    }


def _machine() -> str:
    """Return what two processes share if one can see whether the other lives: host, boot and process namespace."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def _started(pid: int) -> str | None:
    """Return when a process was started, which tells it from a later one of the same number; None if it is gone."""
    try:
        state, *_, started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else started
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def is_rank_zero() -> bool:
    """Return whether this is the first process of a run, before the processes meet."""
    names = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)
