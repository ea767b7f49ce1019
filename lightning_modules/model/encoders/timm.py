"""Vision transformers of timm, such as the towers of SigLIP."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_modules.model.encoders.base import EncoderConfig, VisionTransformerEncoder


class TimmEncoder(VisionTransformerEncoder):
    """Vision transformer of timm without its last block and head, see `VisionTransformerEncoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        assert config.timm is not None
        activation: dict[str, Any] = {"act_layer": "gelu_tanh"} if config.gelu_tanh else {}
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
            **activation,
        )
        self.tower.prune_intermediate_layers([config.layers - 2], prune_norm=True, prune_head=True)
        self._compute_buffers()

    def _compute_buffers(self) -> None:
        """Give DINOv3's buffers (rotary periods, the bias of keys) values also where parameters are on meta."""
        for module in self.tower.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
                module.init_non_persistent_buffers()

    def encode(self, pixels: Tensor) -> Tensor:
        """Compute the features of the last block: float [N, 3, H, W] to [N, h * w, D]."""
        for block in self.tower.blocks:
            if getattr(block.attn, "k_bias", None) is not None:  # a buffer, joined with biases that are parameters
                block.attn.k_bias = block.attn.k_bias.to(block.attn.q_bias)
        last = len(self.blocks()) - 1
        outputs = self.tower.forward_intermediates(pixels, indices=[last], intermediates_only=True, output_fmt="NLC")
        features: Tensor = outputs[0]
        return features

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks, the units of activation checkpointing and sharding."""
        return list(self.tower.blocks)

    @property
    def patch_conv(self) -> nn.Conv2d:
        """Convolution that embeds the patches."""
        conv: nn.Conv2d = self.tower.patch_embed.proj
        return conv

    @property
    def positions(self) -> nn.Parameter:
        """Position embeddings, float [1, class tokens + h * w, D].

        Raises:
            ValueError: DINOv3 has rotary ones.
        """
        if self.tower.pos_embed is None:
            raise ValueError(f"model.whiten_patches: {self.config.timm} has rotary positions: set it to false")
        positions: nn.Parameter = self.tower.pos_embed
        return positions
