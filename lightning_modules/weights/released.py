"""Weights that others released: found by their own names, renamed to ours, read one tensor at a time.

What a folder holds is told by its configuration file:

====================================  ==================================================
``config.json``, ``videollama2_*``    VideoLLaMA2: language model, STC projector, CLIP tower (none in ``-Base`` folders)
``config.json``, ``clip*``            CLIP as transformers stores it: vision tower
``open_clip_config.json``             CLIP or SigLIP as open_clip stores it: vision tower
``config.json``, any other model      causal language model of transformers
====================================  ==================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import snapshot_download
from open_clip.pretrained import download_pretrained, get_pretrained_cfg

from datamodules.text import download_command
from lightning_modules.model.encoders.base import EncoderConfig, hf_clip_sources, tower_sources
from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.model.projector import stc_tokens
from lightning_modules.weights.tensors import StoredTensor, WeightsError, open_sharded, open_tensors

OPEN_CLIP = "open_clip:"
_ENCODERS = ("exo_encoder", "ego_encoder")
_VIDEOLLAMA2_PROJECTOR, _VIDEOLLAMA2_TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
_STC_PADDING = {"stc_connector": 1, "stc_connector_v35": 0}
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "mm_projector.bin",
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin")

Tensors = dict[str, StoredTensor]


class PartAbsent(WeightsError):
    """The weights are sound but hold nothing for a part."""


@dataclass(frozen=True)
class ReleasedPart:
    """What released weights hold for one part.

    Attributes:
        tensors: by their names inside our part.
        found: tensors under the names of the release, before joining and pruning.
        digest: of configuration and file sizes, 16 hexadecimal digits.
    """

    tensors: Tensors
    found: int
    digest: str


def open_released(folder: Path, part: str, network: NetworkConfig) -> ReleasedPart:
    """Find one part in a folder of released weights; nothing is read but names and shapes.

    Raises:
        PartAbsent: the folder has no such part.
        WeightsError: the folder or a file of it is missing, or the weights are of another kind than ``network`` says.
    """
    try:
        settings, kind = _settings(folder)
        stored = _open_folder(folder)
    except WeightsError as error:
        raise WeightsError(f"{error}: {_mend(folder)}") from None
    if kind == "open_clip":
        tensors, found = _open_clip_tower(stored, settings, part, network.encoder, str(folder))
    elif kind.startswith("videollama2"):
        tensors, found = _videollama2(stored, settings, part, network, folder)
    elif kind.startswith("clip"):
        _require_hugging_face_clip(settings.get("vision_config", settings), network.encoder, folder)
        tensors, found = _clip_tower(_without(stored, "text_model.", "logit_scale", "text_projection"), part, folder)
        tensors = _named(tensors, network.encoder)
    elif "siglip" in kind:
        raise WeightsError(f"{folder}: SigLIP as transformers stores it: give its open_clip form, a folder of timm/...")
    else:
        if part != "language_model":
            raise PartAbsent(f"{folder}: holds a language model ({kind}), no {part}")
        tensors, found = _language_model(stored, tied=bool(settings.get("tie_word_embeddings"))), len(stored)
    sizes = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    return ReleasedPart(tensors, found, _digest(settings, sizes))


def open_open_clip(source: str, part: str, network: NetworkConfig) -> ReleasedPart:
    """A vision tower by open_clip's names, ``open_clip:<model>/<tag>``; downloaded once into open_clip's cache.

    Raises:
        WeightsError: no such model or tag, it cannot be fetched, or it is of another kind than ``network`` says.
    """
    model, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    settings, release = open_clip.get_model_config(model), get_pretrained_cfg(model, tag)
    if settings is None or not release:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "no tag of that model"
        raise WeightsError(f"{source}: open_clip knows {known}: write open_clip:<model>/<tag>")
    try:
        file = Path(download_pretrained(release))
        stored = open_tensors(file)
    except (OSError, ValueError) as error:
        folder = f"weights/{release.get('hf_hub', '').strip('/')}"
        raise WeightsError(
            f"{source}: cannot be fetched ({' '.join(str(error).split())[:200]}): where there is a network, run "
            f"`{download_command(Path(folder))}`, and give {folder} instead"
        ) from None
    tensors, found = _open_clip_tower(
        stored, {"model_cfg": settings, "preprocess_cfg": release}, part, network.encoder, source
    )
    return ReleasedPart(tensors, found, _digest(settings, [(file.name, file.stat().st_size)]))


def fetch_from_hub(name: str) -> Path:
    """Folder of a repository of the Hugging Face hub, downloaded once into its cache.

    Raises:
        WeightsError: it cannot be fetched.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        folder = Path("weights") / name
        raise WeightsError(
            f"{name}: cannot be fetched from the hub ({' '.join(str(error).split())[:200]}): where there is a network, "
            f"run `{download_command(folder)}`, and give {folder} instead"
        ) from None


def _settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Configuration of a folder, and its kind: ``open_clip``, or the model type of transformers."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    file = folder / "open_clip_config.json"
    if not file.is_file():
        file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(f"{file}: no such file")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: invalid JSON ({error})") from None
    kind = "open_clip" if file.name == "open_clip_config.json" else str(settings.get("model_type", "model"))
    return settings, kind


def _open_folder(folder: Path) -> Tensors:
    for name in _SHARDED:
        if (folder / name).is_file():
            return open_sharded(folder / name)
    for name in _WHOLE:
        if (folder / name).is_file():
            return open_tensors(folder / name)
    raise WeightsError(f"{folder}: no weights there (none of {', '.join((*_SHARDED, *_WHOLE))})")


def _mend(folder: Path) -> str:
    command = download_command(folder)
    return f"run `{command}`" if command else "give a folder of released weights, or download it again"


def _videollama2(
    stored: Tensors, settings: dict[str, Any], part: str, network: NetworkConfig, folder: Path
) -> tuple[Tensors, int]:
    if part == "projector":
        tensors = _below(stored, _VIDEOLLAMA2_PROJECTOR)
        if not tensors:
            raise PartAbsent(f"{folder}: holds no projector")
        _require_stc(settings, network, folder)
        return tensors, len(tensors)
    if part == "language_model":
        tensors = _without(stored, _VIDEOLLAMA2_PROJECTOR, "model.vision_tower.")
        if not tensors:
            base = settings.get("_name_or_path", "mistralai/Mistral-7B-Instruct-v0.2")
            raise PartAbsent(f"{folder}: holds no language model (its base is {base})")
        return _language_model(tensors, tied=False), len(tensors)
    if part in _ENCODERS:
        tower = str(settings.get("mm_vision_tower", ""))
        if "siglip" in tower:
            raise WeightsError(f"{folder}: its vision tower is {tower}; start the encoders from its open_clip form")
        layer = settings.get("mm_vision_select_layer", -2)
        if layer != -2:
            raise WeightsError(f"{folder}/config.json: mm_vision_select_layer is {layer}, only -2 is built here")
        _require_activation(True, network.encoder, str(folder))
        tensors, found = _clip_tower(_below(stored, _VIDEOLLAMA2_TOWER), part, folder)
        return _named(tensors, network.encoder), found
    raise PartAbsent(f"{folder}: holds no {part}")


def _require_stc(settings: Mapping[str, Any], network: NetworkConfig, folder: Path) -> None:
    """Both forms of the connector have the same weights, so only the number of tokens tells them apart."""
    kind = settings.get("mm_projector_type")
    if kind not in _STC_PADDING:
        allowed = ", ".join(_STC_PADDING)
        raise WeightsError(f"{folder}/config.json: mm_projector_type is {kind}, only {allowed} are built here")
    frames, side = int(settings.get("num_frames", 16)), network.encoder.image_size // network.encoder.patch_size
    theirs, ours = stc_tokens(_STC_PADDING[kind], frames, side, side), network.visual_tokens(frames)
    if theirs != ours:
        raise WeightsError(
            f"network.projector.padding: {network.projector.padding} gives {ours} visual tokens for {frames} frames, "
            f"but the {kind} of {folder} gives {theirs}: set it to {_STC_PADDING[kind]}"
        )


def _clip_tower(stored: Tensors, part: str, folder: Path) -> tuple[Tensors, int]:
    """A tower under transformers' names, to open_clip's."""
    if part not in _ENCODERS:
        raise PartAbsent(f"{folder}: holds a vision tower, no {part}")
    if not stored:
        raise PartAbsent(f"{folder}: holds no vision tower")
    try:
        sources = hf_clip_sources(stored)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from None
    joined = {ours: StoredTensor.joined([stored[name] for name in theirs]) for ours, theirs in sources.items()}
    return joined, len(stored)


def _open_clip_tower(
    stored: Tensors, settings: dict[str, Any], part: str, encoder: EncoderConfig, where: str
) -> tuple[Tensors, int]:
    if part not in _ENCODERS:
        raise PartAbsent(f"{where}: holds a vision tower, no {part}")
    model, preprocess = settings["model_cfg"], settings.get("preprocess_cfg", {})
    timm_model = model["vision_cfg"].get("timm_model_name")
    if timm_model != encoder.timm:
        raise WeightsError(f"network.encoder.timm: got {encoder.timm}, but the tower of {where} is {timm_model}")
    if timm_model is None:
        _require_activation(bool(model.get("quick_gelu") or preprocess.get("quick_gelu")), encoder, where)
        width, head = int(model["vision_cfg"]["width"]), int(model["vision_cfg"].get("head_width", 64))
        _require_heads(width // head, encoder, where)
    for name in ("mean", "std"):
        ours = tuple(getattr(encoder, f"image_{name}"))
        if name in preprocess and any(abs(a - b) > 1e-4 for a, b in zip(preprocess[name], ours, strict=True)):
            raise WeightsError(
                f"network.encoder.image_{name}: got {list(ours)}, but {where} was trained with {list(preprocess[name])}"
            )
    tower = _below(stored, "visual.")
    return _named(tower, encoder), len(tower)


def _named(tower: Tensors, encoder: EncoderConfig) -> Tensors:
    """Names inside our encoder; what its pruning removed is left out."""
    return {ours: tower[theirs] for ours, theirs in tower_sources(tower, encoder).items()}


def _require_hugging_face_clip(vision: Mapping[str, Any], encoder: EncoderConfig, folder: Path) -> None:
    _require_activation(vision.get("hidden_act", "quick_gelu") == "quick_gelu", encoder, str(folder))
    if "num_attention_heads" in vision:
        _require_heads(int(vision["num_attention_heads"]), encoder, str(folder))


def _require_activation(quick_gelu: bool, encoder: EncoderConfig, where: str) -> None:
    if encoder.timm is not None:
        raise WeightsError(f"network.encoder.timm: got {encoder.timm}, but {where} holds a CLIP tower: set it to null")
    if encoder.quick_gelu != quick_gelu:
        raise WeightsError(
            f"network.encoder.quick_gelu: got {encoder.quick_gelu}, but {where} was trained with "
            f"{'QuickGELU' if quick_gelu else 'GELU'}: set it to {str(quick_gelu).lower()}"
        )


def _require_heads(heads: int, encoder: EncoderConfig, where: str) -> None:
    if encoder.heads != heads:
        raise WeightsError(
            f"network.encoder.heads: got {encoder.heads}, but {where} has {heads}, which its shapes do not show"
        )


def _language_model(stored: Tensors, tied: bool) -> Tensors:
    left_out = ["lm_head.weight"] if tied else []
    return {name: tensor for name, tensor in stored.items() if name not in left_out and not name.endswith("inv_freq")}


def _below(stored: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def _without(stored: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in stored.items() if not name.startswith(prefixes)}


def _digest(settings: Any, sizes: list[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps([settings, sizes], sort_keys=True).encode()).hexdigest()[:16]
