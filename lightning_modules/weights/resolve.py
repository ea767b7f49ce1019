"""Sources of weights: weights that another stage left, or weights that others released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download

from datamodules.io.hub import download_command, is_hub_name, use_cache_without_network
from lightning_modules.model.exo2ego import PARTS, NetworkConfig
from lightning_modules.weights.clip import ENCODERS, OPEN_CLIP, download_open_clip, find_clip, find_open_clip, find_timm
from lightning_modules.weights.exported import find_exported
from lightning_modules.weights.handoff import open_stage_weights
from lightning_modules.weights.language_model import find_language_model
from lightning_modules.weights.positions import resample_positions
from lightning_modules.weights.tensors import FoundWeights, WeightsError, open_release
from lightning_modules.weights.transformers_vision import find_transformers_tower
from lightning_modules.weights.videollama2 import find_videollama2

FORMATS = (find_exported, find_open_clip, find_timm, find_videollama2, find_clip, find_transformers_tower)
"""Readers of release formats, each of which returns None for other formats. All others are language models."""


def find_weights(sources: Sequence[str], part: str, network: NetworkConfig) -> FoundWeights:
    """Find a part in the first source that holds it; nothing is read but names and shapes.

    Args:
        sources: each a folder of stage weights ``<folder>`` or ``<folder>:<part>``, a folder of released weights (see
            the modules next to this one), ``owner/name`` on the Hugging Face hub, or ``open_clip:<model>/<tag>``.
            A local folder never touches the network.
        part: part of the model that starts from them.
        network: shapes, which tell how released weights are to be read.

    Raises:
        WeightsError: a source is missing, none holds the part, or it is of another form than ``network`` describes.
    """
    absent: list[str] = []
    for source in sources:
        found = _open_source(source, part, network)
        if found.tensors:
            notes = [note for note in (found.note, *absent) if note]
            return replace(found, note="; ".join(notes))
        absent.append(f"{found.where} {found.note}")
    raise WeightsError(
        f"{'; '.join(absent)}. Name another source in model.init_args.init.{part}, or a list of sources."
    )


def split_source(source: str, part: str) -> tuple[Path, str]:
    """Split ``<folder>`` or ``<folder>:<part>`` into the folder and the name of the part in it."""
    folder_name, _, named = source.rpartition(":")
    return (Path(folder_name), named) if named in PARTS and folder_name else (Path(source), part)


def _open_source(source: str, part: str, network: NetworkConfig) -> FoundWeights:
    folder, named = split_source(source, part)
    if source.startswith(OPEN_CLIP):
        release = download_open_clip(source)
    elif is_hub_name(source):
        release = replace(
            open_release(_download(source), "Remove it from the hub's cache, and run again"), where=source
        )
    elif folder.name == "handoff" or (folder / "manifest.json").is_file():
        return replace(open_stage_weights(folder, named), part=part)
    else:
        command = download_command(folder)
        release = open_release(folder, f"Run `{command}`" if command else "Give a folder of released weights")
    for find in FORMATS:
        found = find(release, named, network)
        if found is None:
            continue
        if named in ENCODERS and network.encoder.resample_positions:
            # Each as its own library does it.
            antialias = release.kind in ("open_clip", "timm", "dinov2_with_registers")
            found = replace(found, tensors=resample_positions(found.tensors, network.encoder, antialias))
        return replace(found, part=part)
    return replace(find_language_model(release, named), part=part)


def _download(name: str) -> Path:
    """Return the folder of a repository of the Hugging Face hub, downloaded once into its cache."""
    unreachable = use_cache_without_network()
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        folder, reason = Path("weights") / name, unreachable or " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{name}: cannot be downloaded from the hub ({reason}). Where there is a "
            f"network, run `{download_command(folder)}`, and give {folder} instead."
        ) from None
