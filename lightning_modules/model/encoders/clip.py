"""CLIP's vision transformer, as open_clip builds it."""

from __future__ import annotations

from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from lightning_modules.model.encoders.base import EncoderConfig, VisionTransformerEncoder


class CLIPEncoder(VisionTransformerEncoder):
    """CLIP vision tower without its last block and head, see `VisionTransformerEncoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
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

    def encode(self, pixels: Tensor) -> Tensor:
        """Compute the features of the last block: float [N, 3, H, W] to [N, h * w, D]."""
        last = len(self.blocks()) - 1
        outputs = self.tower.forward_intermediates(pixels, indices=[last], intermediates_only=True, output_fmt="NLC")
        features: Tensor = outputs["image_intermediates"][0]
        return features

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks, the units of activation checkpointing and sharding."""
        return list(self.tower.transformer.resblocks)

    @property
    def patch_conv(self) -> nn.Conv2d:
        """Convolution that embeds the patches, without bias."""
        conv: nn.Conv2d = self.tower.conv1
        return conv

    @property
    def positions(self) -> nn.Parameter:
        """Position embeddings, float [1 + h * w, D]."""
        positions: nn.Parameter = self.tower.positional_embedding
        return positions
