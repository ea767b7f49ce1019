"""Released vision towers of open_clip and timm, and CLIP's as transformers stores it.

====================================  ===========================================================================
``open_clip_config.json``             CLIP or SigLIP as open_clip stores it
``open_clip:<model>/<tag>``           the same, by open_clip's names, downloaded once into its cache
``config.json``, ``architecture``     any vision transformer of timm as timm stores it
``config.json``, ``clip*``            CLIP as transformers stores it; for others see ``transformers_vision.py``
====================================  ===========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from torch import Tensor

from datamodules.io.hub import download_command, use_cache_without_network
from lightning_modules.model.encoders import EncoderConfig
from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.weights.tensors import (
    FoundWeights,
    Release,
    StoredTensor,
    Tensors,
    WeightsError,
    open_tensors,
    release_digest,
)

OPEN_CLIP = "open_clip:"
ENCODERS = ("exo_encoder", "ego_encoder")

_RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_RENAMED_IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def download_open_clip(source: str) -> Release:
    """Open a tower by open_clip's names, ``open_clip:<model>/<tag>``; downloaded once into open_clip's cache.

    Raises:
        WeightsError: no such model or tag, or it cannot be downloaded.
    """
    model, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    settings, release = open_clip.get_model_config(model), get_pretrained_cfg(model, tag)
    if settings is None or not release:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "no tag of that model"
        raise WeightsError(f"{source}: open_clip knows {known}. Write open_clip:<model>/<tag>.")
    folder = f"weights/{release.get('hf_hub', '').strip('/')}"
    fix = f"Where there is a network, run `{download_command(Path(folder))}`, and give {folder} instead"
    unreachable = use_cache_without_network()
    try:
        file = Path(download_pretrained(release))
    except (OSError, ValueError) as error:
        reason = unreachable or " ".join(str(error).split())[:200]
        raise WeightsError(f"{source}: cannot be downloaded ({reason}). {fix}.") from None
    settings = {"model_cfg": settings, "preprocess_cfg": release}
    return Release(source, "open_clip", settings, open_tensors(file, fix), release_digest(settings, [file]))


def find_open_clip(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find the tower in a release of open_clip; None for other formats.

    Raises:
        WeightsError: the tower is of another form than ``network.encoder``.
    """
    if release.kind != "open_clip":
        return None
    if part not in ENCODERS:
        return release.found(part, {}, f"holds a vision tower, no {part}")
    model, preprocess = release.settings["model_cfg"], release.settings.get("preprocess_cfg", {})
    vision = model["vision_cfg"]
    expected: dict[str, Any] = {"timm": vision.get("timm_model_name")}
    if expected["timm"] is None:
        expected["quick_gelu"] = bool(model.get("quick_gelu") or preprocess.get("quick_gelu"))
        expected["heads"] = int(vision["width"]) // int(vision.get("head_width", 64))
    require_form(network.encoder, release.where, expected | _pixel_statistics(preprocess))
    return _found_tower(release, part, release.below("visual."), network)


def find_timm(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find the tower in a release of timm; None for other formats.

    Raises:
        WeightsError: the tower is of another form than ``network.encoder``.
    """
    if release.kind != "timm":
        return None
    if part not in ENCODERS:
        return release.found(part, {}, f"holds a vision tower, no {part}")
    statistics = _pixel_statistics(release.settings.get("pretrained_cfg", {}))
    require_form(network.encoder, release.where, {"timm": release.settings["architecture"], **statistics})
    return _found_tower(release, part, release.tensors, network)


def _pixel_statistics(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {f"image_{name}": preprocess[name] for name in ("mean", "std") if name in preprocess}


def _found_tower(release: Release, part: str, tower: Tensors, network: NetworkConfig) -> FoundWeights:
    kept = {ours: tower[theirs] for ours, theirs in tower_sources(tower, network.encoder).items()}
    return release.found(part, kept, count=len(tower))


def find_clip(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find the tower in a CLIP model of transformers; None for other formats.

    Raises:
        WeightsError: the tower is of another form than ``network.encoder``.
    """
    if not release.kind.startswith("clip"):
        return None
    if part not in ENCODERS:
        return release.found(part, {}, f"holds a vision tower, no {part}")
    vision = release.settings.get("vision_config", release.settings)
    expected: dict[str, Any] = {"quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu"}
    if "num_attention_heads" in vision:
        expected["heads"] = int(vision["num_attention_heads"])
    require_form(network.encoder, release.where, {"timm": None, **expected})
    others = ("text_model.", "logit_scale", "text_projection")
    tower = {name: tensor for name, tensor in release.tensors.items() if not name.startswith(others)}
    return release.found(part, to_encoder(tower, network.encoder, release.where), count=len(tower))


def require_form(encoder: EncoderConfig, where: str, expected: dict[str, Any]) -> None:
    """Compare an encoder with a released tower in all that the shapes of its tensors do not show.

    Args:
        encoder: the configured encoder.
        where: the release, for messages.
        expected: values of `EncoderConfig` that the tower was trained with.

    Raises:
        WeightsError: they differ.
    """
    if encoder.type is not None:
        raise WeightsError(
            f"network.encoder.type: got {encoder.type}, but {where} holds a vision tower for a built-in encoder. Set "
            "it to null, or start.encoder to null and let the class load its own weights."
        )
    for key, theirs in expected.items():
        ours = getattr(encoder, key)
        if key.startswith("image_"):
            equal = all(abs(a - b) <= 1e-4 for a, b in zip(theirs, ours, strict=True))
            ours = list(ours)
        else:
            equal = ours == theirs
        if not equal:
            raise WeightsError(
                f"network.encoder.{key}: got {json.dumps(ours)}, but the tower of {where} has {json.dumps(theirs)}. "
                f"Set it to {json.dumps(theirs)}."
            )


def to_encoder(tower: Tensors, encoder: EncoderConfig, where: str) -> Tensors:
    """Rename a tower of transformers to the parameters of an encoder, with query, key and value joined.

    Raises:
        WeightsError: this is no CLIP vision tower.
    """
    try:
        sources = hf_clip_sources(tower)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}. Give a folder of CLIP weights.") from None
    joined = {ours: StoredTensor.joined([tower[name] for name in names]) for ours, names in sources.items()}
    return {ours: joined[theirs] for ours, theirs in tower_sources(joined, encoder).items()}


def to_hf_clip(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of an encoder to a CLIP tower of transformers; the inverse of ``to_encoder``.

    The last layer and the final norm, which an encoder does not have, are missing.
    """
    outside = {ours: theirs for theirs, ours in _RENAMED.items()}
    inside = {ours: theirs for theirs, ours in _RENAMED_IN_LAYER.items()}
    tower: dict[str, Tensor] = {}
    for name, tensor in encoder.items():
        name = name.removeprefix("tower.")
        if name in outside:
            tower[f"vision_model.{outside[name]}"] = tensor
            continue
        index, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
        layer, (part, _, kind) = f"vision_model.encoder.layers.{index}", inner.rpartition(".")
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                tower[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.clone()  # so that it can be stored alone
        else:
            tower[f"{layer}.{inside[part]}.{kind}"] = tensor
    return tower


def tower_sources(names: Collection[str], config: EncoderConfig) -> dict[str, str]:
    """Map parameters of a built-in encoder to tensors of a whole released tower.

    Args:
        names: of the whole tower, as below `visual.` in open_clip; timm's, with or without open_clip's `trunk.`.
        config: shape of the encoder.

    Returns:
        Parameter of the encoder to one of `names`. The parts that the encoder does not keep are left out, see
        `VisionTransformerEncoder`; any other name is passed on, known or not.
    """
    last = config.layers - 1
    pruned: tuple[str, ...] = (f"transformer.resblocks.{last}.", "ln_post.", "proj")
    if config.timm is not None:
        pruned = (f"blocks.{last}.", "norm.", "attn_pool.", "fc_norm.", "head.")
    inside = {name.removeprefix("trunk."): name for name in names}
    return {f"tower.{ours}": name for ours, name in inside.items() if not ours.startswith(pruned)}


def hf_clip_sources(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Map tensors of open_clip's vision tower to those of Hugging Face's that make them up.

    Args:
        names: of a `CLIPVisionModel`, with or without the `vision_model.` prefix of transformers 4. `position_ids`
            and the head `visual_projection` are left out.

    Returns:
        Name in an `open_clip.transformer.VisionTransformer` to those of `names` that make it up; several (query, key,
        value) are joined along the first dimension in this order.

    Raises:
        ValueError: a name does not belong to a CLIP vision tower, or a part of an attention is missing.
    """
    stripped = {name.removeprefix("vision_model."): name for name in names}
    for name in ("embeddings.position_ids", "visual_projection.weight"):
        stripped.pop(name, None)
    sources: dict[str, tuple[str, ...]] = {}
    unknown = []
    for name in stripped:
        index, _, inner = name.removeprefix("encoder.layers.").partition(".")
        part, _, kind = inner.rpartition(".")
        block = f"transformer.resblocks.{index}"
        qkv = [f"encoder.layers.{index}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        if name in _RENAMED:
            sources[_RENAMED[name]] = (stripped[name],)
        elif name in qkv and stripped.keys() >= set(qkv):
            sources[f"{block}.attn.in_proj_{kind}"] = tuple(stripped[key] for key in qkv)
        elif name.startswith("encoder.layers.") and part in _RENAMED_IN_LAYER:
            sources[f"{block}.{_RENAMED_IN_LAYER[part]}.{kind}"] = (stripped[name],)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"not a CLIP vision tower: cannot place {', '.join(sorted(unknown)[:5])} ({len(unknown)} names)"
        )
    return sources
