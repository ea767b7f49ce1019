"""Spatio-temporal convolution connector: patch features of a clip -> visual tokens for the language model.

Letters: `B` clips, `T` frames, `H` and `W` patch rows and columns, `C` encoder width, `D` language model width,
`N` visual tokens.
"""

from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn


class STCConnector(nn.Module):
    """STC connector of VideoLLaMA2 (arXiv 2406.07476), shared by both views in Exo2Ego.

    A RegNet stage per frame, a strided 3-D convolution that halves time and both sides, a second RegNet stage per
    remaining time step, and an MLP. Parameter names are those of the released VideoLLaMA2 checkpoints.

    Args:
        in_dim: C, width of the encoder features.
        out_dim: D, width of the language model.
        depth: blocks in each RegNet stage.
        mlp_depth: linear layers in the read-out.
        padding: of the 3-D convolution. 1 is the released `stc_connector` (an axis of n becomes n // 2 + 1), 0 is
            `stc_connector_v35` (n // 2). Both have the same weights, so only the token count tells them apart.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int = 4, mlp_depth: int = 2, padding: int = 1) -> None:
        super().__init__()
        if depth < 1 or mlp_depth < 1 or padding not in (0, 1):
            raise ValueError(
                f"network.projector: got depth={depth}, mlp_depth={mlp_depth}, padding={padding}; "
                "depth and mlp_depth must be at least 1, padding 0 or 1"
            )
        self.padding = padding
        self.s1 = _reg_stage(depth, in_dim, out_dim)
        self.sampler = nn.Sequential(
            nn.Conv3d(out_dim, out_dim, kernel_size=2, stride=2, padding=padding, bias=True), nn.SiLU()
        )
        self.s2 = _reg_stage(depth, out_dim, out_dim)
        self.readout = nn.Sequential(nn.Linear(out_dim, out_dim))
        for _ in range(mlp_depth - 1):
            self.readout.extend([nn.GELU(), nn.Linear(out_dim, out_dim)])

    def num_tokens(self, num_frames: int, rows: int, columns: int) -> int:
        """Return N for a clip, see `stc_tokens`."""
        return stc_tokens(self.padding, num_frames, rows, columns)

    def blocks(self) -> list[nn.Module]:
        """Return the RegNet blocks of both stages, the units of activation checkpointing and sharding."""
        return [*self.s1.children(), *self.s2.children()]

    def forward(self, features: Tensor) -> Tensor:
        """Turn patch features into visual tokens.

        Args:
            features: float [B, T, H, W, C].

        Returns:
            float [B, N, D], time-major, then rows, then columns.
        """
        batch, frames, rows, columns, _ = features.shape
        expected = self.num_tokens(frames, rows, columns)
        x = self.s1(features.flatten(0, 1).permute(0, 3, 1, 2))  # [B * T, D, H, W]
        x = self.sampler(x.unflatten(0, (batch, frames)).transpose(1, 2))  # [B, D, T', H', W']
        steps = x.shape[2]
        x = self.s2(x.transpose(1, 2).flatten(0, 1))  # [B * T', D, H', W']
        x = x.unflatten(0, (batch, steps)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        assert x.shape[1] == expected, (x.shape, expected)
        tokens: Tensor = self.readout(x)
        return tokens


def stc_tokens(padding: int, num_frames: int, rows: int, columns: int) -> int:
    """Return N of an `STCConnector` for a clip of `num_frames` frames of `rows` x `columns` patches.

    Raises:
        ValueError: an axis is too short, so no token would be left.
    """
    count = 1
    for name, size in (("frames", num_frames), ("patch rows", rows), ("patch columns", columns)):
        if size + 2 * padding < 2:
            raise ValueError(
                f"network.projector: {size} {name} with padding {padding}; at least 2 are needed: raise "
                "clips.num_frames or clips.image_size, or set network.projector.padding to 1"
            )
        count *= (size + 2 * padding) // 2
    return count


def _reg_stage(depth: int, in_dim: int, out_dim: int) -> RegStage:
    return RegStage(depth, in_dim, out_dim, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
