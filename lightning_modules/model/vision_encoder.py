"""CLIP vision tower: frames -> patch features. One instance per view (Exo2Ego's exo and ego encoders).

Letters: `B` clips, `T` frames, `H` and `W` pixels, `h` and `w` patch rows and columns, `D` encoder width, `N` frames
that belong to no particular clip, `P` values in one patch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

_POSITION_AMPLITUDE = 0.5


@dataclass
class EncoderConfig:
    """Shape of a CLIP vision transformer and the pixel statistics it expects.

    Attributes:
        image_size: side of the square input, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: D.
        layers: blocks of the CLIP tower (24 for ViT-L). The last one is not built, see `VisionEncoder`.
        heads: attention heads.
        mlp_ratio: hidden over model width in the MLPs.
        quick_gelu: activation of OpenAI's CLIP, and so of VideoLLaMA2. False: exact GELU.
        image_mean, image_std: RGB, on the 0-1 scale; CLIP's by default.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
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
        if problems:
            raise ValueError("encoder: " + "; ".join(problems))


class VisionEncoder(nn.Module):
    """Patch features of a CLIP tower, taken as in VideoLLaMA2 (arXiv 2406.07476).

    The output is that of the second-to-last block, without class token and final norm. The last block, the final
    norm and the projection head are removed, so every parameter left receives a gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            act_layer=QuickGELU if config.quick_gelu else nn.GELU,
        )
        self.tower.prune_intermediate_layers([config.layers - 2], prune_norm=True, prune_head=True)
        for name, statistic in (("mean", config.image_mean), ("std", config.image_std)):
            self.register_buffer(name, 255 * torch.tensor(statistic).view(3, 1, 1), persistent=False)

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
        last = len(self.tower.transformer.resblocks) - 1
        outputs = self.tower.forward_intermediates(pixels, indices=[last], intermediates_only=True, output_fmt="NLC")
        features: Tensor = outputs["image_intermediates"][0]  # [B * T, h * w, D]
        return features.reshape(batch, frames, *self.grid, self.dim)

    def load_clip(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole CLIP tower under open_clip's names, leaving out the parts that are removed here.

        Args:
            state: names as in `open_clip.transformer.VisionTransformer`, see `hf_clip_to_open_clip`.

        Raises:
            RuntimeError: names or shapes differ from this tower's.
        """
        last = f"transformer.resblocks.{self.config.layers - 1}."
        removed = (last, "ln_post.", "proj")
        self.tower.load_state_dict({name: value for name, value in state.items() if not name.startswith(removed)})

    @torch.no_grad()
    def whiten_patches(self, frames: Tensor, generator: torch.Generator) -> None:
        """Initialise patch filters and positions from data, for training from scratch.

        Filters become the principal directions of the patches, scaled to equal output power, strongest first
        (directions far below 1 % of the mean power are damped as noise). Where the width exceeds P, the other filters
        are random unit combinations of them. The second moment is whitened, not the covariance, because the
        convolution has no bias that could take off the mean. Positions become 2-D sine-cosine codes of amplitude
        0.5 (zero for the class token), and patch tokens get the same root mean square as these.

        Args:
            frames: uint8 [N, H, W, 3], a sample of the training frames.
            generator: source of the random combinations, on the CPU.
        """
        conv = self.tower.conv1
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
        conv.weight.copy_(filters.view_as(conv.weight))
        positions = get_2d_sincos_pos_embed(self.dim, self.grid[0], cls_token=True)
        self.tower.positional_embedding.copy_(_POSITION_AMPLITUDE * torch.from_numpy(positions))

    def _normalise(self, frames: Tensor) -> Tensor:
        """Uint8 [N, H, W, 3] to float [N, 3, H, W] with CLIP's pixel statistics."""
        size = self.config.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(
                f"encoder: got {frames.dtype} frames of shape {tuple(frames.shape[1:])}, expected torch.uint8 of shape "
                f"{(size, size, 3)}: make the datamodule's image_size and the encoder's image_size agree"
            )
        dtype = self.tower.conv1.weight.dtype
        return (frames.permute(0, 3, 1, 2).to(dtype) - self.mean.to(dtype)) / self.std.to(dtype)


_RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def hf_clip_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a Hugging Face CLIP vision tower to open_clip's.

    Args:
        state: state dict of a `CLIPVisionModel`, with or without the `vision_model.` prefix of transformers 4, and
            with or without `visual_projection`. Query, key and value are joined; `position_ids` is left out.

    Returns:
        State dict of an `open_clip.transformer.VisionTransformer`.

    Raises:
        ValueError: a name does not belong to a CLIP vision tower, or a part of an attention is missing.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    stripped = {name.removeprefix("vision_model."): value for name, value in state.items()}
    for name, value in stripped.items():
        if name == "embeddings.position_ids":
            continue
        if name == "visual_projection.weight":
            renamed["proj"] = value.T
        elif name in _RENAMED:
            renamed[_RENAMED[name]] = value
        elif name.startswith("encoder.layers."):
            index, _, inner = name.removeprefix("encoder.layers.").partition(".")
            part, _, kind = inner.rpartition(".")
            target = f"transformer.resblocks.{index}."
            qkv = [f"encoder.layers.{index}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if name in qkv and all(key in stripped for key in qkv):
                renamed[f"{target}attn.in_proj_{kind}"] = torch.cat([stripped[key] for key in qkv])
            elif part in _RENAMED:
                renamed[f"{target}{_RENAMED[part]}.{kind}"] = value
            else:
                unknown.append(name)
        elif name.rpartition(".")[0] in ("pre_layrnorm", "post_layernorm"):
            part, _, kind = name.rpartition(".")
            renamed[f"{_RENAMED[part]}.{kind}"] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"not a CLIP vision tower: cannot place {', '.join(sorted(unknown)[:5])} ({len(unknown)} names)"
        )
    return renamed
