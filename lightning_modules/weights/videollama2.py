"""VideoLLaMA2's released checkpoints: language model, STC projector, CLIP tower (no tower in ``-Base`` folders)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING

from lightning_modules.model.encoders import EncoderConfig
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig, ProjectorConfig
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.model.projector import stc_tokens
from lightning_modules.weights.clip import ENCODERS, require_form, to_encoder, to_hf_clip
from lightning_modules.weights.language_model import find_language_model
from lightning_modules.weights.tensors import FoundWeights, Release, WeightsError

KIND = "videollama2"
"""Beginning of the model types of VideoLLaMA2."""
_PROJECTOR, _TOWER = "model.mm_projector.", "model.vision_tower.vision_tower."
_HEAD_WIDTH = 64  # of every CLIP tower, no file states it
_PADDING = {"stc_connector": 1, "stc_connector_v35": 0}


def find_videollama2(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find a part in a checkpoint of VideoLLaMA2; None for other formats.

    Raises:
        WeightsError: the part is of another form than ``network`` describes.
    """
    if not release.kind.startswith(KIND):
        return None
    if part == "projector":
        return _find_projector(release, network)
    if part in ENCODERS:
        return _find_tower(release, part, network)
    if part != "language_model":
        return release.found(part, {}, f"holds no {part}")
    others = (_PROJECTOR, "model.vision_tower.")
    tensors = {name: tensor for name, tensor in release.tensors.items() if not name.startswith(others)}
    if not tensors:
        base = release.settings.get("_name_or_path", "mistralai/Mistral-7B-Instruct-v0.2")
        return release.found(part, {}, f"holds no language model, its base is {base}")
    return find_language_model(replace(release, tensors=tensors), part)


def videollama2_network(release: Release) -> NetworkConfig:
    """Return the shapes of a whole checkpoint of VideoLLaMA2, from its configuration and its tensors.

    Raises:
        WeightsError: it lacks a part, or has one that cannot be built.
    """
    _require_tower(release)
    tower = {name.removeprefix("vision_model."): t.shape for name, t in release.below(_TOWER).items()}
    projector = release.below(_PROJECTOR)
    try:
        width, _, patch, _ = tower["embeddings.patch_embedding.weight"]
        positions, _ = tower["embeddings.position_embedding.weight"]
        hidden, _ = tower["encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise WeightsError(
            f"{release.where}: holds no vision tower ({error.args[0]} is missing), so it cannot answer alone. Name a "
            "checkpoint that has one, such as VideoLLaMA2-7B-16F and not its -Base form."
        ) from None
    encoder = EncoderConfig(
        image_size=patch * math.isqrt(positions - 1),  # one position is that of the class token
        patch_size=patch,
        width=width,
        layers=_count(tower, "encoder.layers."),
        heads=max(1, width // _HEAD_WIDTH),
        mlp_ratio=hidden / width,
    )
    connector = ProjectorConfig(
        depth=_count(projector, "s1."),
        mlp_depth=sum(name.startswith("readout.") and name.endswith(".weight") for name in projector),
        padding=_PADDING[_projector_kind(release)],
    )
    architecture = release.kind.removeprefix(KIND).lstrip("_") or "mistral"
    if architecture not in CONFIG_MAPPING:
        raise WeightsError(f"{release.where}/config.json: model_type is {release.kind}, which transformers lacks.")
    known = {*CONFIG_MAPPING[architecture]().to_dict(), "rope_theta"} - {"architectures", "dtype", "model_type"}
    overrides = {key: value for key, value in release.settings.items() if key in known and key[0] != "_"}
    return NetworkConfig(encoder, LanguageModelConfig(architecture, None, overrides), connector)


def _count(names: Iterable[str], prefix: str) -> int:
    """Return the number of different next components of the names that start with a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def videollama2_tensors(model: Exo2EgoModel) -> dict[str, Tensor]:
    """Return the parameters of a demonstrator by the names of VideoLLaMA2."""
    tower = to_hf_clip(model.part("exo_encoder"))
    tensors = {f"{_TOWER}{name}": tensor for name, tensor in tower.items()}
    tensors |= {f"{_PROJECTOR}{name}": tensor for name, tensor in model.part("projector").items()}
    return tensors | model.part("language_model")


def videollama2_settings(network: NetworkConfig, num_frames: int) -> dict[str, Any]:
    """Return the keys of VideoLLaMA2's ``config.json`` that describe frames, tower and projector.

    Raises:
        WeightsError: VideoLLaMA2 has no tower of this form.
    """
    encoder = network.encoder
    if encoder.type is not None or encoder.timm is not None or not encoder.quick_gelu:
        raise WeightsError(
            "network.encoder: VideoLLaMA2 has a CLIP tower with quick_gelu, not this one. Export it for transformers."
        )
    kinds = {padding: kind for kind, padding in _PADDING.items()}
    return {
        "mm_projector_type": kinds[network.projector.padding],
        "mm_vision_tower": f"openai/clip-vit-large-patch{encoder.patch_size}-{encoder.image_size}",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": encoder.width,
        "image_aspect_ratio": "pad",
        "num_frames": num_frames,
        "use_mm_proj": True,
    }


def _projector_kind(release: Release) -> str:
    kind = str(release.settings.get("mm_projector_type"))
    if kind not in _PADDING:
        raise WeightsError(
            f"{release.where}/config.json: mm_projector_type is {kind}, only {', '.join(_PADDING)} can be built. "
            "Start the projector from another source."
        )
    return kind


def _require_tower(release: Release) -> None:
    """Refuse a tower that cannot be built.

    Raises:
        WeightsError: it is SigLIP's, or its features are taken from another layer.
    """
    name = str(release.settings.get("mm_vision_tower", ""))
    if "siglip" in name:
        raise WeightsError(
            f"{release.where}: its vision tower {name} cannot be read. Start the encoders from its open_clip form."
        )
    layer = release.settings.get("mm_vision_select_layer", -2)
    if layer != -2:
        raise WeightsError(
            f"{release.where}/config.json: mm_vision_select_layer is {layer}, only -2 can be built. "
            "Start the encoders from another source."
        )


def _find_projector(release: Release, network: NetworkConfig) -> FoundWeights:
    tensors = release.below(_PROJECTOR)
    if not tensors:
        return release.found("projector", {}, "holds no projector")
    kind = _projector_kind(release)
    # Both connectors have the same weights, so only the number of tokens tells them apart.
    frames = int(release.settings.get("num_frames", 16))
    theirs = stc_tokens(_PADDING[kind], frames, *network.encoder_shape.grid)
    ours = network.visual_tokens(frames)
    if theirs != ours:
        raise WeightsError(
            f"network.projector.padding: {network.projector.padding} gives {ours} visual tokens for {frames} frames, "
            f"but the {kind} of {release.where} gives {theirs}. Set it to {_PADDING[kind]}."
        )
    return release.found("projector", tensors)


def _find_tower(release: Release, part: str, network: NetworkConfig) -> FoundWeights:
    _require_tower(release)
    require_form(network.encoder, release.where, {"timm": None, "quick_gelu": True})
    tower = release.below(_TOWER)
    if not tower:
        return release.found(part, {}, "holds no vision tower")
    return release.found(part, to_encoder(tower, network.encoder, release.where), count=len(tower))
