"""Vision tower, CLIP or timm: frames -> patch features. One instance per view (Exo2Ego's exo and ego encoders).

Letters: `B` clips, `T` frames, `H` and `W` pixels, `h` and `w` patch rows and columns, `D` encoder width, `N` frames
that belong to no particular clip, `P` values in one patch.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_POSITION_AMPLITUDE = 0.5


@dataclass
class EncoderConfig:
    """Shape of a vision transformer and the pixel statistics it expects.

    Attributes:
        image_size: side of the square input, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: D.
        layers: blocks of the released tower (24 for ViT-L). The last one is not kept, see `VisionEncoder`.
        heads: attention heads.
        mlp_ratio: hidden over model width in the MLPs.
        timm: name of a vision transformer in timm that gives the form, as open_clip builds SigLIP's towers; the sizes
            are those stated here. None: CLIP's.
        quick_gelu: activation of OpenAI's CLIP, and so of VideoLLaMA2. False: exact GELU. Not used with `timm`, whose
            entry fixes the activation.
        image_mean, image_std: RGB, on the 0-1 scale. CLIP's by default, whatever the tower: SigLIP's are 0.5.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    timm: str | None = None
    quick_gelu: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            problems.append(f"width {self.width} is not a multiple of 4")
        if self.layers < 2:
            problems.append(f"layers is {self.layers}, at least 2 are needed since the last one is not used")
        if self.timm is not None and not is_model_in_modules(self.timm, ["vision_transformer"]):
            problems.append(f"timm {self.timm!r} is no vision transformer of timm {timm.__version__}")
        if problems:
            raise ValueError("encoder: " + "; ".join(problems))


class VisionEncoder(nn.Module):
    """Patch features of a vision tower, taken as in VideoLLaMA2 (arXiv 2406.07476).

    The output is that of the second-to-last block, without class token and final norm. The last block, the final
    norm and the projection or pooling head are removed, so every parameter left receives a gradient. Parameters are
    named as in open_clip's `VisionTransformer` or timm's, below `tower`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.timm is None:
            self.tower = VisionTransformer(
                image_size=config.image_size,
                patch_size=config.patch_size,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                act_layer=QuickGELU if config.quick_gelu else nn.GELU,
            )
        else:
            self.tower = timm.create_model(
                config.timm,
                img_size=config.image_size,
                patch_size=config.patch_size,
                embed_dim=config.width,
                depth=config.layers,
                num_heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                num_classes=0,
                global_pool="",
            )
        self.tower.prune_intermediate_layers([config.layers - 2], prune_norm=True, prune_head=True)
        for name, statistic in (("mean", config.image_mean), ("std", config.image_std)):
            # No checkpoint can fill these, so they have values even where parameters are built on the meta device.
            values = 255 * torch.tensor(statistic, device="cpu").view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def dim(self) -> int:
        """D, width of the features."""
        return self.config.width

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns (h, w)."""
        side = self.config.image_size // self.config.patch_size
        return side, side

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
        pixels = self._normalise(video.flatten(0, 1))
        last = len(self.blocks()) - 1
        outputs = self.tower.forward_intermediates(pixels, indices=[last], intermediates_only=True, output_fmt="NLC")
        features: Tensor = (outputs["image_intermediates"] if self.config.timm is None else outputs)[0]
        return features.reshape(batch, frames, *self.grid, self.dim)

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, the repeated units for activation checkpointing and sharding."""
        return list(self.tower.transformer.resblocks if self.config.timm is None else self.tower.blocks)

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
        conv = self._patch_conv
        patches = F.unfold(self._normalise(frames).float(), conv.kernel_size, stride=conv.stride)
        patches = patches.transpose(1, 2).flatten(0, 1)  # [N * h * w, P]
        moment = (patches.T @ patches / len(patches)).double()
        power, directions = torch.linalg.eigh(moment)
        power, directions = power.flip(0).clamp(min=0), directions.flip(1)
        filters = (directions / (power + 1e-2 * power.mean()).sqrt()).T[: self.dim]  # [min(D, P), P]
        missing = self.dim - len(filters)
        if missing > 0:
            mixture = torch.randn(missing, len(filters), generator=generator, dtype=torch.float64).to(filters.device)
            filters = torch.cat([filters, F.normalize(mixture, dim=1) @ filters])
        root_mean_square = (filters @ moment * filters).sum(1).mean().sqrt()
        filters *= _POSITION_AMPLITUDE / math.sqrt(2) / root_mean_square
        _assign(conv.weight, filters.view(conv.weight.shape))
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        codes = _POSITION_AMPLITUDE * torch.from_numpy(get_2d_sincos_pos_embed(self.dim, self.grid[0]))  # [h * w, D]
        positions = self.tower.positional_embedding if self.config.timm is None else self.tower.pos_embed
        length = positions.shape[-2]
        _assign(positions, F.pad(codes, (0, 0, length - len(codes), 0)).view(positions.shape))

    @property
    def _patch_conv(self) -> nn.Conv2d:
        conv: nn.Conv2d = self.tower.conv1 if self.config.timm is None else self.tower.patch_embed.proj
        return conv

    def _normalise(self, frames: Tensor) -> Tensor:
        """Uint8 [N, H, W, 3] to float [N, 3, H, W] with the tower's pixel statistics."""
        size = self.config.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(
                f"encoder: got {frames.dtype} frames of shape {tuple(frames.shape[1:])}, expected torch.uint8 of shape "
                f"{(size, size, 3)}: make the datamodule's image_size and the encoder's image_size agree"
            )
        pixels = frames.permute(0, 3, 1, 2).float()
        return ((pixels - self.mean.to(pixels)) / self.std.to(pixels)).to(self._patch_conv.weight.dtype)


def _assign(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, to values that all processes have."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def tower_sources(names: Collection[str], config: EncoderConfig) -> dict[str, str]:
    """Which tensor of a released tower becomes which parameter of a `VisionEncoder`.

    Args:
        names: of the whole tower, as below `visual.` in open_clip; timm's, with or without open_clip's `trunk.`.
        config: shape of the encoder.

    Returns:
        Parameter of the encoder to one of `names`. The parts that the encoder does not keep are left out, see
        `VisionEncoder`; any other name is passed on, known or not.
    """
    last = config.layers - 1
    pruned: tuple[str, ...] = (f"transformer.resblocks.{last}.", "ln_post.", "proj")
    if config.timm is not None:
        pruned = (f"blocks.{last}.", "norm.", "attn_pool.", "fc_norm.", "head.")
    inside = {name.removeprefix("trunk."): name for name in names}
    return {f"tower.{ours}": name for ours, name in inside.items() if not ours.startswith(pruned)}


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


def hf_clip_sources(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Which tensors of a Hugging Face CLIP vision tower make up which tensor of open_clip's.

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
