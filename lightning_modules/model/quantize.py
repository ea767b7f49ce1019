"""Linear layers whose frozen weights are stored in 8 or 4 bits.

Only storage is quantised: a layer dequantises its weight when it computes and again in the backward pass, so that
gradients reach what is before it and no copy in bfloat16 is held in between. Activations are never quantised.

Letters: `I` and `O` input and output width of a linear layer.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.model.lora import LoRALinear

Quantization = Literal["int8", "nf4"]
"""`int8` has a scale for each output; `nf4` is QLoRA's type (arXiv 2305.14314), with a scale for 64 weights."""

BITS: dict[Quantization, float] = {"int8": 8.0, "nf4": 4.5}
"""Bits of a weight; `nf4` with its scales. The one scale for each row of `int8` is not counted."""

INSTALL_SMALL = "pip install -e '.[small]'"

_NF4_BLOCK = 64
_LAYERS = (nn.Linear, LoRALinear)


def require_bitsandbytes(key: str) -> None:
    """Check that bitsandbytes is installed, without importing it.

    Args:
        key: configuration key and value that need it, for the message.

    Raises:
        ValueError: it is not.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{key} needs the package bitsandbytes: {INSTALL_SMALL}")


class QuantizedLinear(nn.Linear):
    """Frozen linear layer that computes with a dequantised weight.

    Made from an existing layer by `quantize_linears`, which replaces the parameter `weight` by two others. They do not
    require gradients, and strategies that shard leave them whole (see `stored_parameters`).
    """

    packed: nn.Parameter
    """The weight: int8 [O, I], or two of its values in a uint8 [O * I / 2, 1]."""
    scales: nn.Parameter
    """float32 [O], or [O * I / 64]."""
    quantization: Quantization

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, float32 [O, I]; a new tensor, so that writing to it changes nothing."""
        return self.dequantize(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., I] to float [..., O], in the type of autocast if that is on, else in that of `x`."""
        result: Tensor = _DequantizedLinear.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, float [O, I]."""
        shape = torch.Size((self.out_features, self.in_features))
        if self.quantization == "int8":
            # One kernel, which multiplies in float32.
            weight = torch.empty(shape, dtype=dtype, device=self.packed.device)
            return torch.mul(self.packed.detach(), self.scales.detach()[:, None], out=weight)
        import bitsandbytes.functional as bnb

        state = bnb.QuantState(self.scales.detach(), shape, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
        restored: Tensor = bnb.dequantize_4bit(self.packed.detach(), state)
        return restored


class QuantizedLoRALinear(LoRALinear, QuantizedLinear):
    """Adapter on a quantised layer (QLoRA): W x is computed by `QuantizedLinear`, the update by `LoRALinear`."""


class _DequantizedLinear(torch.autograd.Function):
    """Linear map that keeps the stored weight for the backward pass instead of the dequantised one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        """Map float [..., I] to float [..., O]."""
        ctx.layer, ctx.x_dtype = layer, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), layer.dequantize(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input; the layer is frozen."""
        (gradient,) = gradients
        return (gradient @ ctx.layer.dequantize(gradient.dtype)).to(ctx.x_dtype), None


def quantizable(module: nn.Module) -> list[nn.Linear]:
    """Return the layers inside `module` that `quantize_linears` changes, with and without adapters."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) and type(layer) in _LAYERS]


@torch.no_grad()
def quantize_linears(module: nn.Module, quantization: Quantization) -> None:
    """Store the weights of all linear layers inside `module` in fewer bits, one layer after the other.

    Args:
        module: with layers that are `nn.Linear` or have adapters, which stay as they are; changed in place.
        quantization: how.

    Raises:
        ValueError: there are no such layers.
    """
    layers = quantizable(module)
    if not layers:
        raise ValueError(
            f"model.init_args.frozen_dtype: {quantization} is for nn.Linear, of which {type(module).__name__} has "
            "none: use bfloat16, or another language model"
        )
    for layer in layers:
        packed, scales = (_int8 if quantization == "int8" else _nf4)(layer.weight.detach())
        del layer.weight
        layer.__class__ = QuantizedLoRALinear if isinstance(layer, LoRALinear) else QuantizedLinear
        assert isinstance(layer, QuantizedLinear)
        layer.quantization = quantization
        layer.packed = nn.Parameter(packed, requires_grad=False)
        layer.scales = nn.Parameter(scales, requires_grad=False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)


def stored_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters inside `module` that hold quantised weights and their scales."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    return {parameter for layer in layers for parameter in (layer.packed, layer.scales)}


def hidden_count(module: nn.Module) -> int:
    """Return how many more weights are inside `module` than numbers that store them."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    return sum(x.in_features * x.out_features - x.packed.numel() - x.scales.numel() for x in layers)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of float [O, I] to 255 steps that are symmetric around zero."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax
