"""Where a part starts: a hand-off of another stage, or weights that others released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from datamodules.text import is_hub_name
from lightning_modules.model.exo2ego import PARTS, NetworkConfig
from lightning_modules.weights.handoff import open_stage_weights, read_manifest
from lightning_modules.weights.released import (
    OPEN_CLIP,
    PartAbsent,
    ReleasedPart,
    fetch_from_hub,
    open_open_clip,
    open_released,
)
from lightning_modules.weights.tensors import StoredTensor, WeightsError, differences


@dataclass(frozen=True)
class FoundWeights:
    """A part in files, not read yet.

    Attributes:
        part: name of the part that starts there.
        where: the source, for messages.
        tensors: by their names inside the part.
        digest: tells whether the source is still the same.
        line: what a run prints about it.
        mend: what to do if it does not fit.
    """

    part: str
    where: str
    tensors: dict[str, StoredTensor]
    digest: str
    line: str
    mend: str

    def require_fit(self, into: Mapping[str, Tensor]) -> None:
        """Compare names and shapes with the parameters to fill.

        Raises:
            WeightsError: they differ; the message names what is missing, unexpected or mis-shaped.
        """
        if problems := differences(into, self.tensors):
            raise WeightsError(
                f"{self.where}: does not fit {self.part} of this model: {'; '.join(problems)}. {self.mend}"
            )


def find_weights(sources: Sequence[str], part: str, network: NetworkConfig) -> FoundWeights:
    """Find a part in the first source that holds it.

    Args:
        sources: each a hand-off folder ``<folder>`` or ``<folder>:<part>``, a folder of released weights (see
            ``weights.released``), ``owner/name`` on the Hugging Face hub, or ``open_clip:<model>/<tag>``.
            A local folder never touches the network.
        part: what starts there.
        network: shapes, which tell how released weights are to be read.

    Raises:
        WeightsError: a source is missing, or none holds the part.
    """
    absent: list[str] = []
    for source in sources:
        try:
            found = _open(source, part, network)
        except PartAbsent as error:
            absent.append(str(error))
            continue
        notes = f" ({'; '.join(absent)})" if absent else ""
        return FoundWeights(found.part, found.where, found.tensors, found.digest, found.line + notes, found.mend)
    raise WeightsError(f"{'; '.join(absent)}: name another source in model.init_args.init.{part}, or a list of sources")


def split_source(source: str, part: str) -> tuple[Path, str]:
    """Folder, and name of the part in it, of ``<folder>`` or ``<folder>:<part>``."""
    folder_name, _, named = source.rpartition(":")
    return (Path(folder_name), named) if named in PARTS and folder_name else (Path(source), part)


def _open(source: str, part: str, network: NetworkConfig) -> FoundWeights:
    if source.startswith(OPEN_CLIP):
        return _released(open_open_clip(source, part, network), part, source)
    if is_hub_name(source):
        return _released(open_released(fetch_from_hub(source), part, network), part, source)
    folder, named = split_source(source, part)
    if folder.name == "handoff" or (folder / "manifest.json").is_file():
        manifest = read_manifest(folder, named)
        mend = (
            f"It was written by {manifest['stage']}: give both the same `network`, or run "
            f"`make {folder.parent.name} FORCE=1`"
        )
        tensors = open_stage_weights(folder, named)
        line = f"{part}: {len(tensors)} tensors of {folder} ({manifest['stage']})"
        return FoundWeights(part, f"hand-off {folder}", tensors, str(manifest["digest"]), line, mend)
    return _released(open_released(folder, named, network), part, str(folder))


def _released(found: ReleasedPart, part: str, where: str) -> FoundWeights:
    line = f"{part}: {found.found} tensors of {where}"
    mend = "Make `network` describe these weights, or name others"
    return FoundWeights(part, where, found.tensors, found.digest, line, mend)
