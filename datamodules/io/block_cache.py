"""Keep blocks of remote files in a folder that processes, of several machines too, share.

A block gets its name when it is complete, and carries a checksum. Whoever writes a block also removes, now and then,
those that were used least recently. Nothing may depend on a block being there.

Two variables of the environment configure it, since a cluster's local disk may have another name in each job:

    EXO2EGO_CACHE: the folder, ``~/.cache/exo2ego`` by default.
    EXO2EGO_CACHE_GB: its size in gigabytes, 20 by default.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import re
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_SCANS = 64  # the folder is looked through about so often while as much as its limit is written
_KEEP = 0.9  # of the limit, when blocks are removed
_USED_S = 60.0  # a block is marked as used at most so often
_ABANDONED_S = 3600.0  # an unfinished block that is older belongs to a process that was killed
_BLOCK_NAME = re.compile(r"[0-9a-f]{32}-\d+|\..*\.partial")
_CHECKSUM_BYTES = 4
_LEAST_GB = 0.01
_draw = random.Random()  # of its own: training draws from the shared one
_warned = False


@dataclass(frozen=True)
class BlockCache:
    """Blocks of files in a folder that processes share, the least recently used of them removed above a limit.

    Attributes:
        folder: blocks lie below its folder ``blocks``.
        limit_bytes: size; on average it is exceeded by a 64th before blocks are removed.
    """

    folder: Path
    limit_bytes: int

    @classmethod
    def from_environment(cls) -> BlockCache:
        """Return the cache that the environment describes.

        Raises:
            ValueError: the size is not a number, or too small.
        """
        folder = os.environ.get("EXO2EGO_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "exo2ego"
        )
        text = os.environ.get("EXO2EGO_CACHE_GB", "20")
        try:
            limit_bytes = float(text) * 1e9
        except ValueError:
            limit_bytes = math.nan
        if not _LEAST_GB * 1e9 <= limit_bytes < math.inf:
            raise ValueError(f"EXO2EGO_CACHE_GB: got {text}, allowed: a number of gigabytes, at least {_LEAST_GB}")
        return cls(Path(folder).expanduser(), int(limit_bytes))

    def check(self) -> None:
        """Write a file, as a block would be.

        Raises:
            ValueError: that is not possible.
        """
        trial = self.folder / "blocks" / f".{uuid.uuid4().hex}.partial"
        try:
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"")
            trial.unlink()
        except OSError as error:
            raise ValueError(
                f"EXO2EGO_CACHE: cannot write to {self.folder} ({error.strerror}): name a folder on a local disk"
            ) from error

    def read(self, name: str, length: int) -> bytes | None:
        """Return a block, or None if it is not there as it was written."""
        try:
            with open(self._file(name), "rb") as file:
                content = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > _USED_S:
                    os.utime(file.name)
        except OSError:  # on network file systems, also if another machine removes it at this moment
            return None
        block, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return block if len(block) == length and _checksum(block) == checksum else None

    def write(self, name: str, block: bytes) -> None:
        """Keep a block; if that is not possible, warn once."""
        file = self._file(name)
        partial = file.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(block + _checksum(block))
            os.replace(partial, file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            self._warn(error)
            self.remove_oldest()  # the disk may be full
            return
        # A share of the writes, drawn at random, bounds the excess without counting in common.
        if _draw.random() * self.limit_bytes < len(block) * _SCANS:
            self.remove_oldest()

    def remove_oldest(self) -> None:
        """Remove the least recently used blocks if all together exceed the limit."""
        with self._turn() as is_ours:
            if not is_ours:
                return
            found = sorted(self._blocks())
            total = sum(size for _, size, _ in found)
            target = self.limit_bytes if total <= self.limit_bytes else self.limit_bytes * _KEEP
            for used_s, size, path in found:
                is_partial = path.endswith(".partial")
                if total <= target and not is_partial:
                    continue
                if is_partial and time.time() - used_s < _ABANDONED_S:
                    continue
                with suppress(OSError):  # a reader that has it open reads it to its end
                    os.unlink(path)
                    total -= size

    def _file(self, name: str) -> Path:
        return self.folder / "blocks" / name[:2] / name

    def _blocks(self) -> Iterator[tuple[float, int, str]]:
        """Yield time of last use in seconds, size in bytes, and path of every file."""
        for folder in os.scandir(self.folder / "blocks"):
            if not re.fullmatch("[0-9a-f]{2}", folder.name):
                continue
            for entry in os.scandir(folder.path):
                if _BLOCK_NAME.fullmatch(entry.name):
                    with suppress(OSError):
                        status = entry.stat()
                        yield status.st_mtime, status.st_size, entry.path

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Yield False if another process is removing blocks; where files cannot be locked, several may."""
        try:
            descriptor = os.open(self.folder / "blocks" / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass
            yield True
        finally:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        global _warned
        if not _warned:
            _warned = True
            print(
                f"warning: EXO2EGO_CACHE: cannot write to {self.folder} ({error.strerror}), so each block is fetched "
                "whenever it is read: free space, or lower EXO2EGO_CACHE_GB",
                file=sys.stderr,
            )


def _checksum(block: bytes) -> bytes:
    return zlib.crc32(block).to_bytes(_CHECKSUM_BYTES, "big")
