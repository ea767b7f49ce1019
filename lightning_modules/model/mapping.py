"""Mappings between the feature spaces of the two views: ego -> exo (paper F) and exo -> ego (paper G).

Letters: `B` clips, `T` frames, `H` and `W` patch rows and columns, `C` feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class MapperConfig:
    """Form of a `FeatureMapping`.

    Attributes:
        kind: `resnet`, residual blocks between strided and transposed convolutions, suited to features; `cyclegan`,
            the image generator of CycleGAN unchanged; `attention`, a transformer over the patches of a frame;
            `linear`, one fully connected layer per position.
        width: channels after the stem; each down-sampling doubles them. `attention` has one head per 64 of them.
            Not used by `linear`.
        num_blocks: residual blocks at the coarsest grid, or transformer layers. Not used by `linear`.
        num_downsamplings: halvings of the grid in `resnet` and `cyclegan`.
        residual: learn the difference D to the input, F(x) = x + D(x). `cyclegan` never does.
        initial_scale: factor on the initial weights of D's last layer: with 0 the mapping starts as the identity, with
            a small number near it, and with 1 D starts at random. Not used without `residual`.
        norm: normalisation in `resnet`. `cyclegan` always has `instance`, `attention` layer normalisation.
    """

    kind: Literal["resnet", "cyclegan", "attention", "linear"] = "resnet"
    width: int = 256
    num_blocks: int = 9
    num_downsamplings: int = 2
    residual: bool = True
    initial_scale: float = 0.0
    norm: Literal["group", "instance"] = "group"

    def __post_init__(self) -> None:
        kinds, norms = ("resnet", "cyclegan", "attention", "linear"), ("group", "instance")
        problems = [
            f"{key} is {getattr(self, key)!r}, allowed: {', '.join(allowed)}"
            for key, allowed in (("kind", kinds), ("norm", norms))
            if getattr(self, key) not in allowed
        ]
        problems += [
            f"{key} is {getattr(self, key)}, smallest allowed: {least}"
            for key, least in (("width", 1), ("num_blocks", 1), ("num_downsamplings", 0), ("initial_scale", 0))
            if getattr(self, key) < least
        ]
        if self.kind == "resnet" and self.norm == "group":
            widths = [self.width * 2**i for i in range(self.num_downsamplings + 1)]
            if any(width > 32 and width % 32 for width in widths):
                problems.append(f"width is {self.width}, allowed with group norm: multiples of 32 and powers of 2")
        if self.kind == "attention" and self.width % self.num_heads:
            problems.append(f"width is {self.width}, not divisible by its {self.num_heads} heads: use a multiple of 64")
        if problems:
            raise ValueError("network.mapper: " + "; ".join(problems))

    @property
    def num_heads(self) -> int:
        """Attention heads in `attention`."""
        return max(1, self.width // 64)


class FeatureMapping(nn.Module):
    """Map the patch features of one view into the space of the other (Exo2Ego, arXiv 2503.09143).

    Every frame is mapped by itself, as an image of C channels. The paper names a nine-block CycleGAN generator and
    leaves its use on features open. `resnet` departs from that generator where it is made for pixels: 1x1 stem and
    head, since patches are semantic already; no tanh, since features are unbounded; group instead of instance norm,
    which would erase each frame's channel means; and F(x) = x + D(x), by default with D = 0 at the start. `attention`
    (named as future work) adds no positions, since the features carry the encoder's, and so takes any grid.

    Args:
        dim: C.
        mapper: the form of the mapping.
    """

    def __init__(self, dim: int, mapper: MapperConfig) -> None:
        super().__init__()
        self.residual = mapper.residual and mapper.kind != "cyclegan"
        self.num_downsamplings = mapper.num_downsamplings if mapper.kind in ("resnet", "cyclegan") else 0
        self.stride = 2**self.num_downsamplings
        # Reflection padding needs more pixels than it adds: 1 in the blocks, 3 around CycleGAN's 7x7 kernels.
        self.min_size = {"resnet": 2 * self.stride, "cyclegan": max(4, 2 * self.stride)}.get(mapper.kind, 1)
        self.model: nn.Module
        last: nn.Module
        if mapper.kind == "linear":
            self.model = last = nn.Conv2d(dim, dim, kernel_size=1)
        elif mapper.kind == "attention":
            self.model = _PatchTransformer(dim, mapper)
            last = self.model.head
        elif mapper.kind == "resnet":
            norm = _group_norm if mapper.norm == "group" else nn.InstanceNorm2d
            layers, last = _generator(dim, mapper, kernel_size=1, norm=norm, bias=False)
            self.model = nn.Sequential(*layers, last)
        else:
            layers, last = _generator(dim, mapper, kernel_size=7, norm=nn.InstanceNorm2d, bias=True)
            self.model = nn.Sequential(*layers, last, nn.Tanh())
            self.model.apply(_init_cyclegan)
        if self.residual and mapper.initial_scale == 0:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        elif self.residual:
            with torch.no_grad():
                for parameter in last.parameters():
                    parameter.mul_(mapper.initial_scale)

    def blocks(self) -> list[nn.Module]:
        """Return residual blocks or transformer layers, the units of activation checkpointing and sharding."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | nn.TransformerEncoderLayer)]

    def forward(self, features: Tensor) -> Tensor:
        """Map features of one view.

        Args:
            features: float [B, T, H, W, C].

        Returns:
            float [B, T, H, W, C]. A grid that the down-samplings do not divide is extended by its border values and
            cut back afterwards.

        Raises:
            ValueError: the grid is too small for the down-samplings.
        """
        rows, columns = features.shape[2:4]
        if min(rows, columns) < self.min_size:
            raise ValueError(
                f"network.mapper: the patch grid is {rows}x{columns}; {self.num_downsamplings} down-samplings need at "
                f"least {self.min_size}x{self.min_size}: lower network.mapper.num_downsamplings or "
                "raise clips.image_size"
            )
        x = features.flatten(0, 1).permute(0, 3, 1, 2)  # [B * T, C, H, W]
        padding = (0, -columns % self.stride, 0, -rows % self.stride)
        mapped = self.model(F.pad(x, padding, mode="replicate") if any(padding) else x)[..., :rows, :columns]
        if self.residual:
            # In mixed precision the sum stays in float32: where half precision would lose a small D.
            kind = x.device.type  # ``meta`` when a stage is planned, which has no mixed precision
            is_mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            mapped = (x.float() if is_mixed else x) + mapped
        mapped_features: Tensor = mapped.permute(0, 2, 3, 1).reshape(features.shape)
        return mapped_features


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), 3x3 with reflection padding, each convolution normalised."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), norm(channels), nn.ReLU()]
        self.conv_block = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, C, H, W] to the same shape."""
        out: Tensor = x + self.conv_block(x)
        return out


class _PatchTransformer(nn.Module):
    """Pre-norm transformer over all patches of an image: float [B, C, H, W] to the same shape."""

    def __init__(self, dim: int, mapper: MapperConfig) -> None:
        super().__init__()
        self.stem = nn.Linear(dim, mapper.width)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    mapper.width,
                    mapper.num_heads,
                    dim_feedforward=4 * mapper.width,
                    dropout=0.0,
                    activation=F.gelu,
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(mapper.num_blocks)
            )
        )
        self.head = nn.Linear(mapper.width, dim)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.head(self.layers(self.stem(x.flatten(2).transpose(1, 2))))  # [B, H * W, C]
        mapped: Tensor = patches.transpose(1, 2).reshape(x.shape)
        return mapped


def _generator(
    dim: int, mapper: MapperConfig, kernel_size: int, norm: Callable[[int], nn.Module], bias: bool
) -> tuple[list[nn.Module], nn.Conv2d]:
    """Build the layers of CycleGAN's generator (junyanz/pytorch-CycleGAN-and-pix2pix), and separately its last one."""
    pad: list[nn.Module] = [nn.ReflectionPad2d(kernel_size // 2)] if kernel_size > 1 else []
    stem = nn.Conv2d(dim, mapper.width, kernel_size, bias=bias)
    layers: list[nn.Module] = [*pad, stem, norm(mapper.width), nn.ReLU()]
    widths = [mapper.width * 2**i for i in range(mapper.num_downsamplings + 1)]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=bias), norm(wide), nn.ReLU()]
    layers += [ResidualBlock(widths[-1], norm, bias) for _ in range(mapper.num_blocks)]
    for narrow, wide in reversed(list(pairwise(widths))):
        up = nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=1, bias=bias)
        layers += [up, norm(narrow), nn.ReLU()]
    return [*layers, *pad], nn.Conv2d(mapper.width, dim, kernel_size)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels)


def _init_cyclegan(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
