"""Vision encoders: the built-in ones, and classes of your own by their import path."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

import torch

from lightning_modules.model.encoders.base import EncoderConfig, VisionEncoder
from lightning_modules.model.encoders.clip import CLIPEncoder
from lightning_modules.model.encoders.timm import TimmEncoder

__all__ = ["EncoderConfig", "EncoderShape", "VisionEncoder", "build_encoder", "encoder_shape"]


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder's input and output.

    Attributes:
        image_size: side of the square input in pixels.
        dim: width of the features.
        grid: patch rows and columns.
        mean_rgb: mean colour of its inputs, 0-255 and rounded down; padding in it is about zero after normalisation.
    """

    image_size: int
    dim: int
    grid: tuple[int, int]
    mean_rgb: tuple[int, int, int]


def build_encoder(config: EncoderConfig) -> VisionEncoder:
    """Build an encoder with random weights.

    Raises:
        ValueError: `config.type` cannot be imported, is no `VisionEncoder`, does not take `config.args`, or has state
            that is no parameter.
    """
    if config.type is not None:
        encoder = _encoder_class(config)(**config.args)
        _check_buffers(encoder, config.type)
        return encoder
    return CLIPEncoder(config) if config.timm is None else TimmEncoder(config)


def encoder_shape(config: EncoderConfig) -> EncoderShape:
    """Return the sizes of an encoder without its memory; a class of your own is built on the meta device.

    Raises:
        ValueError: see `build_encoder`.
    """
    if config.type is None:
        side = config.image_size // config.patch_size
        return EncoderShape(
            config.image_size, config.width, (side, side), _rgb([255 * mean for mean in config.image_mean])
        )
    with torch.device("meta"):
        encoder = build_encoder(config)
    return EncoderShape(encoder.image_size, encoder.dim, encoder.grid, _rgb(encoder.mean.flatten().tolist()))


def _rgb(mean: list[float]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in mean)
    return red, green, blue


def _encoder_class(config: EncoderConfig) -> type[VisionEncoder]:
    """Import the class that `config.type` names, and compare its signature with `config.args`."""
    path = str(config.type)
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"network.encoder.type: cannot import {path} ({error}): give the import path of a class, such as "
            "my_encoder.MyEncoder for a class in my_encoder.py of this folder"
        ) from None
    if not (inspect.isclass(found) and issubclass(found, VisionEncoder)):
        raise ValueError(f"network.encoder.type: {path} is no subclass of {VisionEncoder.__module__}.VisionEncoder")
    try:
        inspect.signature(found).bind(**config.args)
    except TypeError as error:
        raise ValueError(f"network.encoder.args: {path}{inspect.signature(found)}: {error}") from None
    return found


def _check_buffers(encoder: VisionEncoder, path: str) -> None:
    """Refuse buffers that hold state, which stage weights do not keep, and those without values."""
    state = encoder.state_dict()
    for name, buffer in encoder.named_buffers():
        if name in state:
            raise ValueError(
                f"network.encoder.type: {path}: buffer {name} would be lost, as stage weights keep parameters only: "
                "use GroupNorm or LayerNorm instead of BatchNorm, and register constants with persistent=False"
            )
        if buffer.is_meta:
            raise ValueError(
                f"network.encoder.type: {path}: buffer {name} has no values where the encoder is built without memory: "
                "create it with device='cpu'"
            )
