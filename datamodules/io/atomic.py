"""Write files that appear under their name only when they are complete."""

from __future__ import annotations

import glob
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST_NAME = 230


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` that replaces it when the block ends without an error.

    The content is on disk before the name changes. After an error or a kill, ``path`` is as it was before; what a
    killed process left is removed by the next call.

    Args:
        path: the file; its folder exists.
    """
    name = path.name
    if len(name.encode()) > _LONGEST_NAME:  # the temporary name is longer, and file systems take 255 bytes
        name = hashlib.sha256(name.encode()).hexdigest()
    for leftover in path.parent.glob(f".{glob.escape(name)}.*.partial"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
