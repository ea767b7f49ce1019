"""Released vision towers of transformers that timm has as well: SigLIP, SigLIP 2, DINOv2 and DINOv3.

Their tensors are renamed to those of timm's model, which is what the encoder is, see ``TimmEncoder``. CLIP's tower has
a form of its own, see ``clip.py``.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.weights.clip import ENCODERS, require_form, tower_sources
from lightning_modules.weights.tensors import FoundWeights, Release, StoredTensor, Tensors, WeightsError

_TYPES = {
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "dinov3_vit": "dinov3_vit",
}
"""Model types of a folder, and those of its tower. Released SigLIP 2 of a fixed resolution is of type ``siglip``."""

_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    **{
        f"embeddings.{name}.{kind}": f"patch_embed.proj.{kind}"
        for name in ("patch_embedding", "patch_embeddings", "patch_embeddings.projection")
        for kind in ("weight", "bias")
    },
}
_LAYER = re.compile(r"(?:encoder\.layers|encoder\.layer|model\.layer|layer)\.(\d+)\.(.+)\.(\w+)")
_IN_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_QKV = {
    f"{attention}.{name}": letter
    for attention, names in {
        "attention.attention": ("query", "key", "value"),
        "attention": ("q_proj", "k_proj", "v_proj"),
        "self_attn": ("q_proj", "k_proj", "v_proj"),
    }.items()
    for letter, name in zip("qkv", names, strict=True)
}
_UNUSED = ("embeddings.mask_token", "embeddings.position_ids", "layernorm.", "norm.", "post_layernorm.", "head.")


def find_transformers_tower(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find the tower in a folder of SigLIP, DINOv2 or DINOv3; None for other formats.

    Raises:
        WeightsError: the tower is of another form than ``network.encoder``, or of a form that timm does not have.
    """
    if release.kind.startswith("siglip2"):
        raise WeightsError(
            f"{release.where}: a tower for frames of any shape (NaFlex) cannot be read. Give a SigLIP 2 of a fixed "
            "resolution, such as google/siglip2-base-patch16-256."
        )
    if release.kind not in _TYPES:
        return None
    if part not in ENCODERS:
        return release.found(part, {}, f"holds a vision tower, no {part}")
    # Released configurations leave out what is the default.
    given = release.settings.get("vision_config", release.settings)
    given = {key: value for key, value in given.items() if key != "model_type"}
    settings = AutoConfig.for_model(_TYPES[release.kind], **given)
    expected: dict[str, Any] = {
        "heads": settings.num_attention_heads,
        "layers": settings.num_hidden_layers,
        "gelu_tanh": settings.hidden_act == "gelu_pytorch_tanh",
    }
    for name in ("image_mean", "image_std"):
        if name in release.preprocessing:
            expected[name] = release.preprocessing[name]
    require_form(network.encoder, release.where, expected)
    if network.encoder.timm is None:
        raise WeightsError(
            f"network.encoder.timm: got null, but {release.where} holds a {release.kind} tower. Set it to timm's name "
            "of it, such as vit_base_patch16_siglip_256, vit_small_patch14_dinov2 or vit_small_patch16_dinov3_qkvb."
        )
    tower = _timm_tensors(release)
    kept = {ours: tower[theirs] for ours, theirs in tower_sources(tower, network.encoder).items()}
    return release.found(part, kept, count=len(release.tensors))


def _timm_tensors(release: Release) -> Tensors:
    """Return the tensors of the tower by timm's names, with query, key and value joined.

    Raises:
        WeightsError: a tensor has no place in such a tower.
    """
    tower: Tensors = {}
    attention: dict[tuple[str, str], dict[str, StoredTensor]] = {}  # (block, weight or bias): query, key, value
    gated = any(".mlp.gate_proj." in name for name in release.tensors)
    unknown = []
    for stored, tensor in release.tensors.items():
        name = stored.removeprefix("vision_model.")
        if stored.startswith(("text_model.", "logit_")) or name.startswith(_UNUSED):
            continue
        layer = _LAYER.fullmatch(name)
        if name in _OUTSIDE:
            tower[_OUTSIDE[name]] = tensor
        elif layer is None:
            unknown.append(stored)
        else:
            index, inner, kind = layer.groups()
            block = f"blocks.{index}"
            if inner in _QKV:
                attention.setdefault((block, kind), {})[_QKV[inner]] = tensor
            elif inner in ("layer_scale1", "layer_scale2"):
                number = inner[-1]
                scale = f"gamma_{number}" if release.kind == "dinov3_vit" else f"ls{number}.gamma"
                tower[f"{block}.{scale}"] = tensor
            elif gated and inner in ("mlp.gate_proj", "mlp.up_proj"):
                tower[f"{block}.mlp.fc1_{'g' if inner == 'mlp.gate_proj' else 'x'}.{kind}"] = tensor
            elif inner in _IN_LAYER:
                tower[f"{block}.{_IN_LAYER[inner]}.{kind}"] = tensor
            else:
                unknown.append(stored)
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise WeightsError(
            f"{release.where}: not a {release.kind} tower: cannot place {shown} ({len(unknown)} names). "
            "Give another folder."
        )
    for (block, kind), pieces in attention.items():
        if pieces.keys() == set("qkv"):
            tower[f"{block}.attn.qkv.{kind}"] = StoredTensor.joined([pieces[letter] for letter in "qkv"])
        else:  # keys have no bias in DINOv3
            tower |= {f"{block}.attn.{letter}_{kind}": tensor for letter, tensor in pieces.items()}
    return _with_timm_positions(tower)


def _with_timm_positions(tower: Tensors) -> Tensors:
    """Give positions timm's shape [1, tokens, D]; where there are registers, that of the class is in its token."""
    if "pos_embed" not in tower:
        return tower
    positions = tower["pos_embed"]
    count, dim = positions.shape[-2:]
    if "reg_token" not in tower:
        return tower | {"pos_embed": positions.mapped((1, count, dim), lambda tensor: tensor.view(1, count, dim))}

    def class_token(token: Tensor) -> Tensor:
        return token + positions.read()[:, :1].to(token)

    return tower | {
        "cls_token": tower["cls_token"].mapped((1, 1, dim), class_token),
        "pos_embed": positions.mapped((1, count - 1, dim), lambda tensor: tensor[:, 1:]),
    }
