"""A vision encoder of your own: a small convolutional network.

Name it in any experiment by its import path; the folder of this file has to be on the Python path, as the current
folder is::

    network:
      encoder:
        type: encoder.ConvEncoder
        args: { image_size: "${clips.image_size}", dim: 96 }
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_modules.model.encoders import VisionEncoder


class ConvEncoder(VisionEncoder):
    """Encode every frame by convolutions: one that cuts it into patches, and residual blocks that mix these.

    Args:
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels, a divisor of ``image_size``.
        dim: width of the features.
        depth: number of residual blocks.
    """

    def __init__(self, image_size: int, patch_size: int = 8, dim: int = 96, depth: int = 2) -> None:
        side = image_size // patch_size
        super().__init__(image_size, dim, grid=(side, side))
        self.stem = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.layers = nn.ModuleList(ResidualBlock(dim) for _ in range(depth))

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn normalised frames, float [N, 3, H, W], into patch features, float [N, h * w, dim]."""
        features = self.stem(pixels)  # [N, dim, h, w]
        for layer in self.layers:
            features = layer(features)
        return features.flatten(2).transpose(1, 2)

    def blocks(self) -> list[nn.Module]:
        """Return the units whose activations can be checkpointed and whose parameters are sharded one by one."""
        return list(self.layers)


class ResidualBlock(nn.Module):
    """Mix neighbouring patches, then channels. GroupNorm, because the statistics of BatchNorm are no parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.spatial = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.channels = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map float [N, dim, h, w] to the same shape."""
        residual: Tensor = self.channels(self.spatial(self.norm(x)))
        return x + residual
