"""Read videos on object storage and web servers in blocks, through a cache on disk that many processes share.

An address such as ``s3://bucket/takes`` stands wherever a folder of videos does: ``data_path`` makes a path of it, and
``RemoteFile`` reads a file below it. fsspec sends the requests; the packages for some kinds of storage are the user's
to install. See ``datamodules.io.block_cache`` for the cache.

A version of a file is its size and its ETag, or whatever else its storage tells versions apart by. Blocks are kept
under a name made of address, version and number, so that blocks of two versions never meet. After every request for
bytes the version is looked up again: bytes of a file that changed meanwhile are thrown away, and reading fails with
``Changed``.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, TypeVar, cast

from datamodules.io.block_cache import BlockCache
from datamodules.video.errors import Changed, FileMissing, NotAVideo, Unreachable

Result = TypeVar("Result")

BLOCK_BYTES = 512 * 1024
_READ_AHEAD = 4  # blocks, of a file that is read from start to end
_MOST_AT_ONCE = 64  # blocks of a request
_HELD = 4  # blocks in memory for each open file

_TRIES = 6
_FIRST_PAUSE_S = 0.1  # doubled after each try
_GIVE_UP_S = 30.0  # after this, a failure is not tried again; a reader's own limit is 60 s by default
_REQUEST_S = 20.0  # for one request
_TRUST_S = 300.0  # a version that was looked up counts for so long; requests for bytes look again in any case

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://[^/]")
_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]*):/+(?=[^/])")  # an address as a path holds it
_PINNED = re.compile(r"hf://[^@]*@[0-9a-f]{40}/")  # files of a commit never change
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_VERSION_FIELDS = ("ETag", "etag", "e_tag", "generation", "blob_id", "Content-MD5", "Digest", "Last-Modified")
_TIME_FIELDS = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")

# --------------------------------------------------------------------------------------------------------------------
# addresses


def is_remote(name: str) -> bool:
    """Return True for an address such as ``s3://bucket/takes``, False for a path."""
    return "://" in name and _ADDRESS.match(name) is not None


def data_path(name: str | os.PathLike[str]) -> Path:
    """Return a path, or an address in the form of a path."""
    return RemotePath(name) if is_remote(os.fspath(name)) else Path(name)


class RemotePath(PosixPath):
    """Address of a remote file or folder, to be joined and passed on like a path.

    Only files exist: storage has no folders.
    """

    def __str__(self) -> str:
        """Return the address with both of its slashes, of which a path keeps one."""
        return _COLLAPSED.sub(r"\1://", super().__str__(), count=1)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the size, and a number that differs between versions as the modification time.

        Raises:
            FileNotFoundError: there is no such file.
            ClipDecodeError: the storage cannot be reached.
        """
        if not is_remote(str(self)):
            return super().stat(follow_symlinks=follow_symlinks)
        try:
            number, size = remote_stamp(str(self))
        except (FileMissing, NotAVideo) as error:
            raise FileNotFoundError(error.reason) from error
        return os.stat_result((0o100444, 0, 0, 0, 0, 0, size, 0, 0, 0), {"st_mtime_ns": number})  # type: ignore[call-arg]

    def is_file(self) -> bool:  # type: ignore[override,unused-ignore]
        """Return True if the file exists and is not empty."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:  # type: ignore[override,unused-ignore]
        """Return True if the file exists and is not empty."""
        return self.is_file()

    def is_dir(self) -> bool:  # type: ignore[override,unused-ignore]
        """Return False."""
        return False


def require_reachable(root: str | os.PathLike[str], key: str) -> None:
    """Check what reading from an address needs on this machine; sends no request, and does nothing for a path.

    Args:
        root: folder of videos.
        key: the argument that names it, for messages.

    Raises:
        ValueError: the kind of storage is unknown, its package is not installed, or the cache cannot be used.
    """
    if not is_remote(os.fspath(root)):
        return
    _filesystem(os.fspath(root), key)
    BlockCache.from_environment().check()


# --------------------------------------------------------------------------------------------------------------------
# requests


class _Version(NamedTuple):
    """State of a remote file: size in bytes, and a text that differs between contents."""

    size: int
    tag: str


_filesystems: dict[tuple[int, str], Any] = {}
_versions: dict[str, tuple[float, _Version]] = {}
_jitter = random.Random()  # of its own: training draws from the shared one


def remote_stamp(address: str) -> tuple[int, int]:
    """Return a number for the version of a file, and its size in bytes.

    Raises:
        FileMissing: there is no such file.
        NotAVideo: it is empty or a folder.
        Unreachable: the storage does not answer, or refuses to.
    """
    version = _look_up(address)
    return int(hashlib.sha256(version.tag.encode()).hexdigest()[:12], 16), version.size


def _filesystem(address: str, key: str | None = None) -> Any:
    """Return the fsspec file system of an address, one for each process: connections do not survive a fork."""
    protocol = address.partition("://")[0]
    found = _filesystems.get((os.getpid(), protocol))
    if found is not None:
        return found
    import fsspec.asyn  # takes time that local files do not need

    thread = fsspec.asyn.iothread[0]
    if thread is not None and not thread.is_alive():  # it ran in the process that this one was forked from
        fsspec.asyn.reset_lock()
    problem = f"{key}: {address}" if key else address
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error)
        raise ValueError(f"{problem}: the package that reads {protocol}:// is not installed: {fix}") from None
    except ValueError:
        raise ValueError(
            f"{problem}: {protocol}:// is no kind of storage that fsspec knows: use s3://, gs://, hf:// or https://"
        ) from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("http", "https"):
        options["client_kwargs"] = {"trust_env": True}  # proxies and .netrc
    try:
        found = kind(**options)
    except Exception as error:  # whatever a package raises for wrong settings or credentials
        raise ValueError(f"{problem}: {_text(error)}: check the settings and credentials of {protocol}://") from error
    _filesystems[os.getpid(), protocol] = found
    return found


def _look_up(address: str, fresh: bool = False) -> _Version:
    """Return the version of a file; ``fresh`` asks the storage even if that was done a moment ago."""
    looked_up_s, version = _versions.get(address, (-math.inf, None))
    if version is not None and ((not fresh and time.monotonic() - looked_up_s < _TRUST_S) or _PINNED.match(address)):
        return version
    system = _filesystem(address)
    limits = {"timeout": _REQUEST_S} if system.async_impl else {}
    if address.startswith("hf://"):
        limits["refresh"] = True
    _versions.pop(address, None)
    info = _repeat(address, lambda: system.info(_quoted(address), **limits))
    if info.get("type") == "directory":
        raise NotAVideo("a folder: images are read from local disks only", address)
    size = info.get("size")
    if size is None:
        raise Unreachable("the server does not tell the size of the file", address)
    if not size:
        raise NotAVideo("the file is empty (0 bytes)", address)
    tags = [info[field] for field in (*_VERSION_FIELDS, *_TIME_FIELDS) if info.get(field)]
    version = _Version(int(size), str(tags[0]) if tags else "")
    _versions[address] = time.monotonic(), version
    return version


def _read_range(address: str, version: _Version, begin: int, end: int) -> bytes:
    """Return the bytes [begin, end) of a version of a file.

    Raises:
        Changed: the file has another version now.
        FileMissing, Unreachable: it is gone, or the storage does not answer.
    """
    system = _filesystem(address)
    options: dict[str, Any] = {"timeout": _REQUEST_S} if system.async_impl else {"cache_type": "none"}

    def request() -> bytes:
        content = cast(bytes, system.cat_file(_quoted(address), start=begin, end=end, **options))
        if len(content) == version.size > end - begin:
            raise PermissionError("the server ignores range requests")
        if len(content) != end - begin:
            raise OSError(f"{len(content)} bytes for {end - begin}")
        return content

    try:
        content: bytes | Unreachable = _repeat(address, request)
    except Unreachable as error:
        content = error
    # A failure may be due to a change as well, such as a range past the end of a shorter file.
    if _look_up(address, fresh=True) != version:
        raise Changed("the file changed while it was read", address) from None
    if isinstance(content, Unreachable):
        raise content
    return content


def _repeat(address: str, request: Callable[[], Result]) -> Result:
    """Send a request, again after longer and longer pauses if it fails.

    Raises:
        FileMissing: there is no such file.
        Unreachable: the request was refused, or failed each time.
    """
    begun_s = time.monotonic()
    for count in range(1, _TRIES + 1):
        try:
            return request()
        except Exception as error:  # packages of many authors send the requests
            cause, status = _cause(error)
            if isinstance(cause, FileNotFoundError):
                raise FileMissing("No such file or directory", address) from error
            refused = isinstance(cause, PermissionError) or (status // 100 == 4 and status not in (408, 425, 429))
            if refused:
                raise Unreachable(f"the storage refuses: {_text(cause)}", address) from error
            pause_s = _FIRST_PAUSE_S * 2 ** (count - 1) * _jitter.uniform(0.5, 1.5)
            if count == _TRIES or time.monotonic() + pause_s - begun_s > _GIVE_UP_S:
                raise Unreachable(f"{_text(cause)}, {count} times in a row", address) from error
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _cause(error: Exception) -> tuple[BaseException, int]:
    """Return the error of a request and its HTTP status, 0 if it has none."""
    cause: BaseException = error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec reports all failures of HTTP so
        cause = error.__cause__
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    status = status or getattr(getattr(cause, "response", None), "status_code", None)
    number = int(str(status)) if str(status).isdecimal() else 0  # some packages have it as text
    return (error, number) if number in (404, 410) else (cause, number)


def _text(error: BaseException) -> str:
    name = type(error).__name__
    if name == "FSTimeoutError":
        return f"no answer within {_REQUEST_S:g} s"
    message = " ".join(str(error).split())
    return f"{name}: {message}" if message else name


def _quoted(address: str) -> str:
    return address.replace("#", "%23") if address.startswith("http") else address


# --------------------------------------------------------------------------------------------------------------------
# files


class RemoteFile(io.RawIOBase):
    """One version of a remote file, opened for reading by one thread of one process.

    Reading raises a ``ClipDecodeError``: ``Changed``, ``FileMissing`` or ``Unreachable``.
    """

    def __init__(self, address: str) -> None:
        """Look up the version.

        Raises:
            ClipDecodeError: see ``remote_stamp``.
        """
        super().__init__()
        self.name = address
        self._version = _look_up(address)
        self._cache = BlockCache.from_environment()
        self._key = hashlib.sha256("\0".join((address, *map(str, self._version))).encode()).hexdigest()[:32]
        self._held: OrderedDict[int, bytes] = OrderedDict()
        self._at = 0
        self._next = -1  # block after the last one that was missing

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, without a request, and return the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._version.size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to byte {base + offset}, which is before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of a block; return the number of bytes, 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        if self._at >= self._version.size or not len(view):
            return 0
        number, offset = divmod(self._at, BLOCK_BYTES)
        block = self._block(number)
        count = min(len(view), len(block) - offset)
        view[:count] = block[offset : offset + count]
        self._at += count
        return count

    def prefetch(self, begin: int, end: int) -> None:
        """Read the blocks with the bytes [begin, end) into memory, with one request if they follow each other."""
        first, last = max(0, begin) // BLOCK_BYTES, (min(end, self._version.size) - 1) // BLOCK_BYTES
        self._fetch(first, min(last, first + _MOST_AT_ONCE - 1))

    def _block(self, number: int) -> bytes:
        if number in self._held:
            self._held.move_to_end(number)
        else:
            count = _READ_AHEAD if number == self._next else 1
            self._fetch(number, min(number + count - 1, (self._version.size - 1) // BLOCK_BYTES))
        return self._held[number]

    def _fetch(self, first: int, last: int) -> None:
        """Bring blocks into memory from the cache, and the others from the storage."""
        missing: list[int] = []
        for number in range(first, last + 1):
            if number not in self._held:
                block = self._cache.read(f"{self._key}-{number}", self._length(number))
                if block is None:
                    missing.append(number)
                else:
                    self._held[number] = block
        for begin, end in _runs(missing):
            self._download(begin, end)
            self._next = end + 1
        for number in range(first, last + 1):
            self._held.move_to_end(number)
        while len(self._held) > max(_HELD, last - first + 1):
            self._held.popitem(last=False)

    def _download(self, first: int, last: int) -> None:
        begin, end = first * BLOCK_BYTES, last * BLOCK_BYTES + self._length(last)
        content = _read_range(self.name, self._version, begin, end)
        for number in range(first, last + 1):
            offset = (number - first) * BLOCK_BYTES
            self._held[number] = content[offset : offset + self._length(number)]
            self._cache.write(f"{self._key}-{number}", self._held[number])

    def _length(self, number: int) -> int:
        return min(BLOCK_BYTES, self._version.size - number * BLOCK_BYTES)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last number of each group of ascending numbers without a gap."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[first], numbers[place - 1]
            first = place
