"""The demonstrator's answers about pairs: computed once by ``make demonstrate``, read in stage 2.

::

    <folder>/
      manifest.json        everything that the answers depend on
      000012.safetensors   pairs 12 * 512 to 13 * 512 - 1, as many of them as are used; complete or absent

A pair is a narration and one of its exocentric cameras; they are numbered through the whole index. A shard holds
``pairs`` int64 [P], ``first`` int64 [P + 1], and by token ``words`` int32 [M], ``likeliest`` int32 [M, K],
``log_probs`` float32 [M, K] and ``log_rest`` float32 [M]: tokens ``first[n]`` to ``first[n + 1]`` are the answer about
pair n. An answer without tokens is about a clip that could not be read; the metadata give the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datamodules.io.atomic import atomic_path

FORMAT = 1
SHARD_PAIRS = 512
_OPEN_SHARDS = 32


class DemonstrationsError(ValueError):
    """Demonstrations are missing, damaged or of another demonstrator; the message gives the command to run."""


@dataclass(frozen=True)
class Answer:
    """The demonstrator's answer about one pair: the narration, or its own caption, with its distributions.

    Attributes:
        words: int64 [A], the tokens of the answer.
        likeliest: int64 [A, K], the likeliest tokens in the place of each.
        log_probs: float32 [A, K], of these.
        log_rest: float32 [A], of all other tokens together.
        problem: why there is no answer; "" if there is one.
    """

    words: Tensor
    likeliest: Tensor
    log_probs: Tensor
    log_rest: Tensor
    problem: str = ""


@dataclass(frozen=True)
class _Shard:
    pairs: NDArray[np.int64]
    first: Tensor
    problems: dict[str, str]
    tensors: Any


class Demonstrations:
    """The demonstrations in a folder; shards are opened when a pair of them is read.

    Args:
        folder: the files'.
        command: that computes them, for messages.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self._opened: OrderedDict[int, _Shard] = OrderedDict()
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out, which each process opens for itself."""
        return self.__dict__ | {"_opened": OrderedDict()}

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the manifest if there is none.

        Args:
            settings: JSON of everything that the answers depend on, by name.

        Raises:
            DemonstrationsError: the folder has demonstrations of other settings.
        """
        if (self.folder / "manifest.json").is_file():
            self.require_same(settings)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "settings": dict(settings)}
        with atomic_path(self.folder / "manifest.json") as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def is_complete(self, pairs: NDArray[np.int64]) -> bool:
        """Return True if ascending pairs have an answer each, whatever demonstrator it is of."""
        return (self.folder / "manifest.json").is_file() and not len(self.missing(pairs))

    def discard(self) -> None:
        """Delete all shards, then the manifest."""
        for file in (*self.folder.glob("[0-9]*.safetensors"), self.folder / "manifest.json"):
            file.unlink(missing_ok=True)

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the manifest.

        Raises:
            DemonstrationsError: there is no manifest, or it has other settings; the message names these.
        """
        before, now = self._settings(), json.loads(json.dumps(settings))
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if changed:
            raise DemonstrationsError(
                f"{self.folder}: these demonstrations were made with different {', '.join(changed)}: run "
                f"`{self.command} FORCE=1`, or set model.init_args.demonstrations to another folder"
            )

    def missing(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those among ascending pairs that have no answer yet."""
        absent = []
        for shard, wanted in split_by_shard(pairs):
            if not self._file(shard).is_file():
                absent.append(wanted)
                continue
            absent.append(wanted[~np.isin(wanted, self._shard(shard).pairs)])
        return np.concatenate(absent) if absent else pairs[:0]

    def require_all(self, pairs: NDArray[np.int64]) -> None:
        """Raise DemonstrationsError if ascending pairs lack an answer."""
        absent = self.missing(pairs)
        if len(absent):
            raise DemonstrationsError(
                f"{self.folder}: {len(absent):,} of {len(pairs):,} pairs have no demonstration: run `{self.command}`, "
                "which adds them"
            )

    def problem(self, pair: int) -> str | None:
        """Return why the demonstrator has no answer about a pair, or None if it has one."""
        return self._shard(pair // SHARD_PAIRS).problems.get(str(pair))

    def read(self, pair: int) -> Answer:
        """Read the answer about a pair.

        Raises:
            DemonstrationsError: it is missing or damaged.
        """
        shard = self._shard(pair // SHARD_PAIRS)
        place = int(np.searchsorted(shard.pairs, pair))
        if place == len(shard.pairs) or shard.pairs[place] != pair:
            raise DemonstrationsError(
                f"{self._file(pair // SHARD_PAIRS)}: pair {pair} is missing: run `{self.command}`"
            )
        begin, end = shard.first[place : place + 2].tolist()
        words, likeliest, log_probs, log_rest = (
            shard.tensors.get_slice(name)[begin:end] for name in ("words", "likeliest", "log_probs", "log_rest")
        )
        return Answer(words.long(), likeliest.long(), log_probs, log_rest, shard.problems.get(str(pair), ""))

    def write(self, pairs: Sequence[int], answers: Sequence[Answer]) -> None:
        """Write the shard of ascending pairs with their answers; its bytes depend on nothing else.

        The file appears complete or not at all, and replaces an earlier one.
        """
        first = np.cumsum([0, *(len(answer.words) for answer in answers)])
        tensors = {
            "pairs": torch.tensor(pairs),
            "first": torch.from_numpy(first),
            "words": torch.cat([answer.words for answer in answers]).int(),
            "likeliest": torch.cat([answer.likeliest for answer in answers]).int(),
            "log_probs": torch.cat([answer.log_probs for answer in answers]),
            "log_rest": torch.cat([answer.log_rest for answer in answers]),
        }
        problems = {str(pair): answer.problem for pair, answer in zip(pairs, answers, strict=True) if answer.problem}
        about = json.dumps({"settings": self.digest, "problems": problems})
        shard = pairs[0] // SHARD_PAIRS
        with atomic_path(self._file(shard)) as unfinished:
            unfinished.write_bytes(save(tensors, {"demonstrations": about}))  # one key, as several have no order
        self._opened.pop(shard, None)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the settings in the manifest."""
        if self._digest is None:
            content = json.dumps(self._settings(), sort_keys=True)
            self._digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self._digest

    def _settings(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        if not file.is_file():
            raise DemonstrationsError(f"No demonstrations in {self.folder}. Run `{self.command}` first.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found, settings = content["format"], content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise DemonstrationsError(f"{file}: cannot be read ({error}): run `{self.command} FORCE=1`") from None
        if found != FORMAT or not isinstance(settings, dict):
            raise DemonstrationsError(
                f"{file}: field format is {found}, this version reads {FORMAT}: run `{self.command} FORCE=1`"
            )
        return settings

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.safetensors"

    def _shard(self, number: int) -> _Shard:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        file = self._file(number)
        try:
            tensors = safe_open(file, framework="pt")
            about = json.loads(tensors.metadata()["demonstrations"])
            pairs, first = tensors.get_tensor("pairs").numpy(), tensors.get_tensor("first")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DemonstrationsError(
                f"{file}: cannot be read ({' '.join(str(error).split())}): delete it and run `{self.command}`"
            ) from None
        if about["settings"] != self.digest:
            raise DemonstrationsError(
                f"{file}: is not of the demonstrator that manifest.json describes: delete it and run `{self.command}`"
            )
        self._opened[number] = _Shard(pairs, first, about["problems"], tensors)
        if len(self._opened) > _OPEN_SHARDS:
            self._opened.popitem(last=False)
        return self._opened[number]


def split_by_shard(pairs: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Return the shards that hold ascending pairs, each with its pairs."""
    if not len(pairs):
        return []
    shards, starts = np.unique(pairs // SHARD_PAIRS, return_index=True)
    return list(zip(shards.tolist(), np.split(pairs, starts[1:]), strict=True))
