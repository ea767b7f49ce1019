"""Named tensors in files, read one at a time, so that weights never lie in memory twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class WeightsError(ValueError):
    """Weights are missing or do not fit; the message names the place, the problem and how to fix it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape now, its values when ``read`` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def joined(cls, pieces: list[StoredTensor]) -> StoredTensor:
        """Pieces joined along the first dimension."""
        first, *others = pieces
        if not others:
            return first
        rows = sum(piece.shape[0] for piece in pieces)
        return cls((rows, *first.shape[1:]), lambda: torch.cat([piece.read() for piece in pieces]))


def open_tensors(file: Path) -> dict[str, StoredTensor]:
    """Tensors of a ``.safetensors`` file, or of a state dict that ``torch.save`` wrote; nothing else is unpickled.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if not file.is_file():
        raise WeightsError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return _open_safetensors(file)
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise WeightsError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    return {name: StoredTensor(tuple(value.shape), partial(_itself, value)) for name, value in state.items()}


def open_sharded(index: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint in several files, by its ``*.index.json``.

    Raises:
        WeightsError: the index or one of its files is missing or damaged, or lacks a tensor that the index names.
    """
    try:
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: no index of weights ({type(error).__name__}: {error})") from None
    shards = {name: open_tensors(index.parent / name) for name in sorted(set(place.values()))}
    if lost := sorted(tensor for tensor, shard in place.items() if tensor not in shards[shard]):
        raise WeightsError(f"{index.parent / place[lost[0]]}: lacks {lost[0]}, which {index.name} says it holds")
    return {tensor: shards[shard][tensor] for tensor, shard in place.items()}


def differences(into: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> list[str]:
    """What keeps stored tensors from filling parameters: names missing, unexpected or of another shape."""
    wrong = [
        f"{name} is {list(tensor.shape)}, expected {list(into[name].shape)}"
        for name, tensor in stored.items()
        if name in into and tuple(into[name].shape) != tensor.shape
    ]
    groups = (
        ("missing", sorted(set(into) - set(stored))),
        ("unexpected", sorted(set(stored) - set(into))),
        ("mis-shaped", wrong),
    )
    return [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in groups
        if names
    ]


@torch.no_grad()
def fill(into: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Copy stored tensors into parameters of the same names and shapes, whatever their types; see ``differences``."""
    for name, tensor in stored.items():
        into[name].copy_(tensor.read())


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def sync(path: Path) -> None:
    """Let a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _itself(value: Tensor) -> Tensor:
    return value


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    opened = safe_open(file, framework="pt")

    def read(name: str) -> Tensor:
        try:
            tensor: Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"{file}: cannot be read ({error})") from None
        return tensor

    return {
        name: StoredTensor(tuple(opened.get_slice(name).get_shape()), partial(read, name)) for name in opened.keys()
    }
