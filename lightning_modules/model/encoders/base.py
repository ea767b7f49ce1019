"""The interface of a vision encoder, and its configuration.

Letters: `B` clips, `T` frames, `H` and `W` pixels, `h` and `w` patch rows and columns, `D` encoder width, `N` frames
that belong to no particular clip, `P` values in one patch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import timm
import torch
import torch.nn.functional as F
from open_clip.pos_embed import get_2d_sincos_pos_embed
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_POSITION_AMPLITUDE = 0.5


@dataclass
class EncoderConfig:
    """Choice of a vision encoder: one of the built-in vision transformers, or a class of your own.

    Attributes:
        image_size: side of the square input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        width: D.
        layers: blocks of the released tower (24 for ViT-L). The last one is not kept, see `VisionTransformerEncoder`.
        heads: attention heads.
        mlp_ratio: hidden over model width in the MLPs.
        timm: name of a vision transformer in timm that gives the form, as open_clip builds SigLIP's towers; the sizes
            are those stated here. None: CLIP's.
        quick_gelu: activation of OpenAI's CLIP, and so of VideoLLaMA2. False: exact GELU. Not used with `timm`, whose
            entry fixes the activation.
        gelu_tanh: with `timm`, approximate GELU by tanh, as transformers does for SigLIP; timm's entries do not.
        resample_positions: adapt position embeddings of released weights to `image_size`, bicubically.
        image_mean: RGB, on the 0-1 scale. CLIP's by default, whatever the tower: SigLIP's is 0.5.
        image_std: RGB, on the 0-1 scale, as `image_mean`.
        type: import path of a subclass of `VisionEncoder`, such as `my_encoder.MyEncoder`, to build instead of a
            built-in one. The keys above are then refused.
        args: arguments of that class.
    """

    image_size: int = 0
    patch_size: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    timm: str | None = None
    quick_gelu: bool = True
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    type: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    gelu_tanh: bool = False
    resample_positions: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible sizes, and keys without effect."""
        problems = self._problems() if self.type is None else self._ignored()
        if self.args and self.type is None:
            problems.append("args are given without type, the import path of a class")
        if problems:
            raise ValueError("network.encoder: " + "; ".join(problems))

    def _ignored(self) -> list[str]:
        """Name the keys of the built-in encoders that are set although a class is built."""
        ignored = []
        for each in fields(self):
            value = getattr(self, each.name)
            value = tuple(value) if isinstance(value, list) else value
            if each.name not in ("type", "args") and value != each.default:
                ignored.append(each.name)
        if not ignored:
            return []
        names = ", ".join(ignored)
        return [
            f"{names} would be ignored, as type is {self.type}: remove them, or put them into args if it takes them"
        ]

    def _problems(self) -> list[str]:
        """Name the sizes that the built-in encoders cannot have."""
        problems = []
        if self.patch_size < 1 or self.image_size % self.patch_size or self.image_size < 1:
            problems.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.heads < 1 or self.width % self.heads or self.width < 1:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            problems.append(f"width {self.width} is not a multiple of 4")
        if self.layers < 2:
            problems.append(f"layers is {self.layers}, at least 2 are needed since the last one is not used")
        known = ["eva"] if "dinov3" in (self.timm or "") else ["vision_transformer"]
        if self.timm is not None and not is_model_in_modules(self.timm, known):
            problems.append(f"timm {self.timm!r} is no vision transformer of timm {timm.__version__}")
        if self.gelu_tanh and (self.timm is None or known == ["eva"]):
            problems.append("gelu_tanh goes with a vision transformer of timm, without DINOv3: set it to false")
        return problems


class VisionEncoder(nn.Module, ABC):
    """Base class of vision encoders, which turn every frame of a clip into a grid of patch features.

    A subclass calls ``super().__init__`` with its sizes and implements `encode`. Every parameter must get a gradient,
    since DDP and FSDP wait for all of them. `blocks` and `whiten_patches` are optional.

    Args:
        image_size: side of the square input in pixels.
        dim: D, width of the features.
        grid: patch rows and columns (h, w).
        image_mean: RGB, on the 0-1 scale.
        image_std: RGB, on the 0-1 scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int,
        dim: int,
        grid: tuple[int, int],
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.image_size, self.dim, self.grid = image_size, dim, grid
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        for name in ("mean", "std"):
            self.register_buffer(name, None, persistent=False)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Compute the buffers, which no checkpoint holds; they have values also where parameters are on meta."""
        for name, statistic in (("mean", self.image_mean), ("std", self.image_std)):
            setattr(self, name, 255 * torch.tensor(statistic, device="cpu").view(3, 1, 1))

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode frames, each by itself.

        Args:
            pixels: float [N, 3, H, W], normalised, in the type of the first parameter; H = W = `image_size`.

        Returns:
            float [N, h * w, D], row by row.
        """

    def blocks(self) -> list[nn.Module]:
        """Return the repeated units for activation checkpointing and sharding; none by default.

        The first parameter of the encoder must not belong to one of them.
        """
        return []

    def whiten_patches(self, frames: Tensor, generator: torch.Generator) -> None:
        """Initialise from data, for training from scratch; see `VisionTransformerEncoder`.

        Raises:
            ValueError: the encoder has no such initialisation.
        """
        raise ValueError(f"model.whiten_patches: {type(self).__name__} has no whiten_patches: set it to false")

    def forward(self, video: Tensor) -> Tensor:
        """Encode every frame by itself.

        Args:
            video: uint8 [B, T, H, W, 3], RGB 0-255, normalised inside; H = W = `image_size`.

        Returns:
            float [B, T, h, w, D] in the parameters' dtype.

        Raises:
            ValueError: wrong type or size.
        """
        batch, frames = video.shape[:2]
        features = self.encode(self.normalise(video.flatten(0, 1)))
        return features.reshape(batch, frames, *self.grid, self.dim)

    def normalise(self, frames: Tensor) -> Tensor:
        """Convert uint8 [N, H, W, 3] to normalised float [N, 3, H, W] in the type of the first parameter.

        Raises:
            ValueError: wrong type or size.
        """
        size = self.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(
                f"encoder: got {frames.dtype} frames of shape {tuple(frames.shape[1:])}, expected torch.uint8 of shape "
                f"{(size, size, 3)}: make the datamodule's image_size and the encoder's image_size agree"
            )
        pixels = frames.permute(0, 3, 1, 2).float()
        return ((pixels - self.mean.to(pixels)) / self.std.to(pixels)).to(next(self.parameters()).dtype)


class VisionTransformerEncoder(VisionEncoder):
    """Patch features of a vision transformer, taken as in VideoLLaMA2 (arXiv 2406.07476).

    The output is that of the second-to-last block, without class token and final norm. The last block, the final
    norm and the projection or pooling head are removed, so every parameter left receives a gradient. Parameters are
    named as in open_clip's `VisionTransformer` or timm's, below `tower`.
    """

    tower: Any

    def __init__(self, config: EncoderConfig) -> None:
        side = config.image_size // config.patch_size
        super().__init__(config.image_size, config.width, (side, side), config.image_mean, config.image_std)
        self.config = config

    @property
    @abstractmethod
    def patch_conv(self) -> nn.Conv2d:
        """Convolution that embeds the patches."""

    @property
    @abstractmethod
    def positions(self) -> nn.Parameter:
        """Position embeddings, float [..., class tokens + h * w, D]."""

    @torch.no_grad()
    def whiten_patches(self, frames: Tensor, generator: torch.Generator) -> None:
        """Initialise patch filters and positions from data, for training from scratch.

        Filters become the principal directions of the patches, scaled to equal output power, strongest first
        (directions far below 1 % of the mean power are damped as noise). Where the width exceeds P, the other filters
        are random unit combinations of them. The second moment is whitened, not the covariance, because CLIP's
        convolution has no bias that could take off the mean; a bias becomes zero. Positions become 2-D sine-cosine
        codes of amplitude 0.5 (zero for a class token), and patch tokens get the same root mean square as these.

        Args:
            frames: uint8 [N, H, W, 3], a sample of the training frames.
            generator: source of the random combinations, on the CPU.
        """
        # Principal directions of the patches.
        conv = self.patch_conv
        patches = F.unfold(self.normalise(frames).float(), conv.kernel_size, stride=conv.stride)
        patches = patches.transpose(1, 2).flatten(0, 1)  # [N * h * w, P]
        moment = (patches.T @ patches / len(patches)).double()
        power, directions = torch.linalg.eigh(moment)
        power, directions = power.flip(0).clamp(min=0), directions.flip(1)
        filters = (directions / (power + 1e-2 * power.mean()).sqrt()).T[: self.dim]  # [min(D, P), P]

        # More filters than directions: random combinations.
        missing = self.dim - len(filters)
        if missing > 0:
            mixture = torch.randn(missing, len(filters), generator=generator, dtype=torch.float64).to(filters.device)
            filters = torch.cat([filters, F.normalize(mixture, dim=1) @ filters])

        # Patch tokens as strong as the position codes.
        root_mean_square = (filters @ moment * filters).sum(1).mean().sqrt()
        filters *= _POSITION_AMPLITUDE / math.sqrt(2) / root_mean_square
        _assign(conv.weight, filters.view(conv.weight.shape))
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        codes = _POSITION_AMPLITUDE * torch.from_numpy(get_2d_sincos_pos_embed(self.dim, self.grid[0]))  # [h * w, D]
        positions = self.positions
        class_tokens = positions.shape[-2] - len(codes)
        _assign(positions, F.pad(codes, (0, 0, class_tokens, 0)).view(positions.shape))


def _assign(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, to values that all processes have."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
