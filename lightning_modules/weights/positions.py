"""Position embeddings of released vision towers, resampled to another resolution of the frames."""

from __future__ import annotations

import math

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from lightning_modules.model.encoders import EncoderConfig
from lightning_modules.weights.tensors import Tensors

PATCH_FILTERS = {
    "tower.positional_embedding": "tower.conv1.weight",
    "tower.pos_embed": "tower.patch_embed.proj.weight",
}
"""Positions of the built-in encoders, and the patch filters whose size they go with."""


def square_side(count: int) -> int | None:
    """Return the patches on a side of a square frame, given its positions with or without one of a class token."""
    side = math.isqrt(count)
    return side if count - side**2 <= 1 else None


def resample_positions(tensors: Tensors, encoder: EncoderConfig, antialias: bool) -> Tensors:
    """Resample the positions of a tower to the patches of an encoder, bicubically; that of a class token stays.

    Args:
        tensors: of the tower, by the names of the encoder.
        encoder: gives the number of patches.
        antialias: use the kernel that smooths, as open_clip and timm do; transformers does not for most models.

    Returns:
        All tensors; those that need no resampling are the given ones.
    """
    side = encoder.image_size // encoder.patch_size
    found = dict(tensors)
    for name in PATCH_FILTERS.keys() & tensors.keys():
        stored = tensors[name]
        count, dim = stored.shape[-2:]
        before = square_side(count)
        if before is None or before == side:
            continue
        class_tokens = count - before**2
        shape = (*stored.shape[:-2], class_tokens + side**2, dim)

        def resample(positions: Tensor, class_tokens: int = class_tokens, shape: tuple[int, ...] = shape) -> Tensor:
            row = positions.view(1, *positions.shape[-2:])
            row = resample_abs_pos_embed(row, [side, side], num_prefix_tokens=class_tokens, antialias=antialias)
            resampled: Tensor = row.view(shape)
            return resampled

        found[name] = stored.mapped(shape, resample)
    return found
