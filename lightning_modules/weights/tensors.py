"""Tensors in files, opened by name and read one at a time, so that weights never lie in memory twice.

`torch.distributed.checkpoint`'s Hugging Face reader would lose `.bin` files, joined query, key and value, and messages
that name what does not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "mm_projector.bin",
)


def use_mode_of(file: Path, folder: Path) -> None:
    """Give all safetensors files below a folder the mode of a file that follows the umask.

    safetensors makes files that only their owner can read.
    """
    mode = file.stat().st_mode
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(mode)


class WeightsError(ValueError):
    """Weights are missing or do not fit; the message names the place, the problem and how to fix it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape now, its values when ``read`` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def joined(cls, pieces: list[StoredTensor]) -> StoredTensor:
        """Join pieces along the first dimension."""
        first, *others = pieces
        if not others:
            return first
        rows = sum(piece.shape[0] for piece in pieces)
        return cls((rows, *first.shape[1:]), lambda: torch.cat([piece.read() for piece in pieces]))

    def mapped(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> StoredTensor:
        """Return a tensor of another shape that is computed from this one when it is read."""
        return StoredTensor(shape, lambda: change(self.read()))


Tensors = dict[str, StoredTensor]


@dataclass(frozen=True)
class FoundWeights:
    """Weights of one part, found in files and not read yet.

    Attributes:
        part: part of the model that starts from them.
        where: the source, for messages.
        tensors: by their names inside the part; empty if the source holds nothing for the part.
        digest: of the source, 16 hexadecimal digits, equal as long as the source is.
        note: about the source, for the summary; for empty tensors, the reason.
        count: number of tensors in the files, before joining and leaving out.
        fix: how to fix weights that do not fit, for messages.
    """

    part: str
    where: str
    tensors: Tensors
    digest: str
    note: str = ""
    count: int = 0
    fix: str = "Make `network` describe these weights, or name others"

    @property
    def summary(self) -> str:
        """One line for the output of a run."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.part}: {self.count or len(self.tensors)} tensors of {self.where}{note}"


@dataclass(frozen=True)
class Release:
    """Weights in the form in which others released them.

    Attributes:
        where: the folder or name, for messages.
        kind: ``open_clip``, ``timm``, or the model type of transformers, such as ``mistral``.
        settings: content of the configuration file.
        tensors: by the names of the release.
        digest: of configuration and file sizes, 16 hexadecimal digits.
        preprocessing: content of the file that describes the pixels, empty if there is none.
    """

    where: str
    kind: str
    settings: dict[str, Any]
    tensors: Tensors
    digest: str
    preprocessing: dict[str, Any] = field(default_factory=dict)

    def found(self, part: str, tensors: Tensors, note: str = "", count: int = 0) -> FoundWeights:
        """Return the tensors of a part, renamed to ours."""
        return FoundWeights(part, self.where, tensors, self.digest, note, count)

    def below(self, prefix: str) -> Tensors:
        """Return the tensors whose names start with a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def open_release(folder: Path, fix: str) -> Release:
    """Open a folder of released weights; nothing is read but configuration, names and shapes.

    Args:
        folder: with a ``config.json`` of transformers or timm, or an ``open_clip_config.json``.
        fix: how to fix missing or damaged files, for messages.

    Raises:
        WeightsError: the folder or one of its files is missing or damaged.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder. {fix}.")

    # The configuration tells the format.
    file = folder / "open_clip_config.json"
    if not file.is_file():
        file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. {fix}.")
    settings = _read_json(file, fix)
    pixels = folder / "preprocessor_config.json"
    preprocessing = _read_json(pixels, fix) if pixels.is_file() else {}
    kind = str(settings.get("model_type", "timm" if "architecture" in settings else "model"))
    if file.name == "open_clip_config.json":
        kind = "open_clip"

    # One file of tensors, or several with an index.
    present = [name for name in (*_INDEX_FILES, *_WEIGHT_FILES) if (folder / name).is_file()]
    if not present:
        raise WeightsError(f"{folder}: no weights (none of {', '.join((*_INDEX_FILES, *_WEIGHT_FILES))}). {fix}.")
    weights = folder / present[0]
    tensors = open_sharded(weights, fix) if present[0] in _INDEX_FILES else open_tensors(weights, fix)
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    return Release(str(folder), kind, settings, tensors, release_digest(settings, files), preprocessing)


def _read_json(file: Path, fix: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: invalid JSON ({error}). {fix}.") from None
    return content


def open_tensors(file: Path, fix: str) -> Tensors:
    """Open a ``.safetensors`` file, or a state dict that ``torch.save`` wrote; nothing else is unpickled.

    Args:
        file: to open.
        fix: how to fix a missing or damaged file, for messages.

    Raises:
        WeightsError: the file is missing or damaged; ``StoredTensor.read`` raises it too.
    """
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. {fix}.")
    try:
        if file.suffix != ".safetensors":
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            return {name: StoredTensor(tuple(value.shape), value.detach) for name, value in state.items()}
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise WeightsError(f"{file}: cannot be read ({' '.join(str(error).split())}). {fix}.") from None

    def read(name: str) -> Tensor:
        # A file that stays open stays mapped, and every page that was read counts as memory of the process.
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file}: cannot be read ({error}). {fix}.") from None
        return tensor

    return {name: StoredTensor(shape, partial(read, name)) for name, shape in shapes.items()}


def open_sharded(index: Path, fix: str) -> Tensors:
    """Open a checkpoint in several files by its ``*.index.json``.

    Args:
        index: the index file.
        fix: how to fix a missing or damaged file, for messages.

    Raises:
        WeightsError: the index or one of its files is missing or damaged, or lacks a tensor that the index names.
    """
    try:
        file_names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: no index of weights ({type(error).__name__}: {error}). {fix}.") from None
    shards = {name: open_tensors(index.parent / name, fix) for name in sorted(set(file_names.values()))}
    for tensor, name in sorted(file_names.items()):
        if tensor not in shards[name]:
            raise WeightsError(f"{index.parent / name}: lacks {tensor}, which {index.name} lists. {fix}.")
    return {tensor: shards[name][tensor] for tensor, name in file_names.items()}


def release_digest(settings: Any, files: list[Path]) -> str:
    """Return 16 hexadecimal digits that change with the configuration and with the names and sizes of files."""
    sizes = sorted((file.name, file.stat().st_size) for file in files)
    return hashlib.sha256(json.dumps([settings, sizes], sort_keys=True).encode()).hexdigest()[:16]


def content_digest(tensors: Tensors) -> str:
    """Return 16 hexadecimal digits that change with names, shapes and values of tensors, wherever they are stored.

    Of each tensor about a thousand values count, evenly spread: training changes practically all of them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.read().detach().flatten()
        spread = values[:: max(1, len(values) // 1024)].float()
        digest.update(json.dumps([name, tensor.shape]).encode())
        digest.update(spread.numpy().tobytes())
    return digest.hexdigest()[:16]


def file_digest(file: Path) -> bytes:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
