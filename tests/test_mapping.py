"""Test the mappings F and G: CycleGAN's generator exactly, and the forms made for features."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpointing import assert_checkpointing_changes_nothing
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.model.mapping import FeatureMapping, MapperConfig

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "cyclegan_resnet9.safetensors"
CLOSE = {"atol": 1e-5, "rtol": 0}
KINDS = ["resnet", "cyclegan", "attention", "linear"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip("reference tensors are not part of the repository")
    return load_file(GOLDEN)


def build_cyclegan(golden: dict[str, Tensor]) -> FeatureMapping:
    mapping = FeatureMapping(16, MapperConfig(kind="cyclegan", width=8)).eval()
    mapping.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    return mapping


def as_features(images: Tensor) -> Tensor:
    """Reorder [T, C, H, W] to [1, T, H, W, C]."""
    return images.permute(0, 2, 3, 1)[None]


def randomised(mapping: FeatureMapping) -> FeatureMapping:
    """Randomise every parameter, so that the mapping is not the identity."""
    for parameter in mapping.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mapping


def test_cyclegan_equals_the_reference(golden):
    mapping = build_cyclegan(golden)
    torch.testing.assert_close(mapping(as_features(golden["input"])), as_features(golden["output"]), **CLOSE)
    torch.testing.assert_close(mapping.model[:-1](golden["input"]), golden["output_pre_tanh"], **CLOSE)
    torch.testing.assert_close(mapping.model[:10](golden["input"]), golden["after_down"], **CLOSE)


def test_cyclegan_input_gradient_equals_the_reference(golden):
    features = as_features(golden["input"]).requires_grad_()
    build_cyclegan(golden)(features).square().mean().backward()
    torch.testing.assert_close(features.grad, as_features(golden["input_grad"]), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "dim", "width", "expected"),
    [
        ("resnet", 1024, 256, 182_233_088),
        ("resnet", 1024, 512, 727_796_736),
        ("resnet", 1152, 256, 182_298_752),
        ("cyclegan", 1024, 256, 207_377_920),
        # stem and head, and 12 w^2 + 13 w in each of nine layers
        ("attention", 1024, 256, 2 * 1024 * 256 + 256 + 1024 + 9 * (12 * 256**2 + 13 * 256)),
        ("linear", 1024, 256, 1024**2 + 1024),
    ],
)
def test_parameter_count_at_full_size(kind, dim, width, expected):
    with torch.device("meta"):
        mapping = FeatureMapping(dim, MapperConfig(kind=kind, width=width))
    assert sum(p.numel() for p in mapping.parameters()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_meta_device(kind):
    with torch.device("meta"):
        mapping = FeatureMapping(1152, MapperConfig(kind=kind))
        features = torch.empty(1, 2, 27, 27, 1152)
    mapped = mapping(features)
    assert mapped.is_meta and mapped.shape == features.shape


@pytest.mark.parametrize(("kind", "blocks"), [("resnet", 3), ("cyclegan", 3), ("attention", 3), ("linear", 0)])
def test_recomputing_the_blocks_changes_nothing(kind, blocks):
    torch.manual_seed(0)
    mapping = randomised(FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=3)))
    assert len(mapping.blocks()) == blocks
    assert_checkpointing_changes_nothing(mapping, torch.randn(1, 2, 9, 8, 6))


@pytest.mark.parametrize("kind", ["resnet", "attention", "linear"])
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_residual_mapping_starts_as_the_identity_and_can_leave_it(kind, norm):
    features = torch.randn(2, 3, 8, 8, 6)
    mapping = FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=1, norm=norm))
    assert torch.equal(mapping(features), features)
    optimizer = torch.optim.SGD(mapping.parameters(), lr=0.1)
    mapping(features).square().mean().backward()
    optimizer.step()
    assert not torch.equal(mapping(features), features)


@pytest.mark.parametrize("kind", ["resnet", "attention", "linear"])
def test_the_initial_scale_lets_a_residual_mapping_start_near_the_identity_or_at_random(kind):
    features, starts = torch.randn(2, 1, 8, 8, 6), {}
    for scale in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        mapping = FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=1, initial_scale=scale))
        starts[scale] = mapping(features) - features
    assert not starts[0.0].any()
    assert 0.05 < starts[1.0].norm() / features.norm() < 2
    torch.testing.assert_close(starts[0.1], 0.1 * starts[1.0], atol=1e-6, rtol=1e-4)


def test_in_mixed_precision_a_small_difference_is_added_in_float32():
    torch.manual_seed(0)
    features = 1 + torch.rand(1, 1, 8, 8, 6)
    mapping = FeatureMapping(6, MapperConfig(kind="linear", initial_scale=1e-3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = mapping(features.bfloat16())
    assert mapped.dtype == torch.float32
    difference = mapped - features.bfloat16().float()
    expected = mapping.model(features[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[None]
    torch.testing.assert_close(difference, expected, atol=1e-4, rtol=0.05)
    assert mapping.bfloat16()(features.bfloat16()).dtype == torch.bfloat16  # inference without autocast


def test_residual_adds_the_input():
    features = torch.randn(1, 1, 8, 8, 6)
    mapping = randomised(FeatureMapping(6, MapperConfig(width=8, num_blocks=1)))
    difference = mapping.model(features[:, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, None]
    torch.testing.assert_close(mapping(features), features + difference)


def test_linear_is_one_matrix_at_every_position():
    features = torch.randn(2, 3, 1, 5, 6)
    mapping = FeatureMapping(6, MapperConfig(kind="linear", residual=False))
    matrix, bias = mapping.model.weight[:, :, 0, 0], mapping.model.bias
    torch.testing.assert_close(mapping(features), torch.einsum("bthwc,dc->bthwd", features, matrix) + bias)


def test_attention_is_a_pre_norm_transformer_over_the_patches_of_a_frame():
    torch.manual_seed(0)
    features = torch.randn(1, 1, 2, 3, 6, dtype=torch.float64)
    mapping = randomised(FeatureMapping(6, MapperConfig(kind="attention", width=128, num_blocks=2))).double()
    x = mapping.model.stem(features.flatten(1, 3))  # [1, patches, width]
    for layer in mapping.model.layers:
        normed, attention = F.layer_norm(x, (128,), layer.norm1.weight, layer.norm1.bias), layer.self_attn
        qkv = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.reshape(1, 6, 3, 2, 64).permute(2, 0, 3, 1, 4)  # [1, heads, patches, 64] each
        mixed = torch.softmax(q @ k.transpose(2, 3) / 8, dim=3) @ v
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(layer.linear1(F.layer_norm(x, (128,), layer.norm2.weight, layer.norm2.bias)))
        x = x + layer.linear2(hidden)
    expected = features + mapping.model.head(x).view_as(features)
    torch.testing.assert_close(mapping(features), expected)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (27, 27)])
def test_attention_takes_any_grid_and_follows_a_permutation_of_the_patches(grid):
    torch.manual_seed(0)
    features = torch.randn(2, 1, *grid, 6, dtype=torch.float64)
    mapping = randomised(FeatureMapping(6, MapperConfig(kind="attention", width=8, num_blocks=1))).double()
    torch.testing.assert_close(mapping(features), mapping(features.flip(2, 3)).flip(2, 3))


@pytest.mark.parametrize("kind", ["resnet", "cyclegan", "attention"])
def test_frames_are_mapped_one_by_one(kind):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 8, 8, 6, dtype=torch.float64)
    mapping = randomised(FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=2))).double()
    expected = torch.stack([torch.cat([mapping(frame[None, None])[0] for frame in clip]) for clip in features])
    torch.testing.assert_close(mapping(features), expected)


@pytest.mark.parametrize("kind", ["resnet", "cyclegan"])
@pytest.mark.parametrize(("rows", "columns", "extended"), [(9, 10, (12, 12)), (27, 27, (28, 28)), (8, 11, (8, 12))])
def test_grid_that_does_not_divide_is_extended_by_its_border_and_cut_back(kind, rows, columns, extended):
    torch.manual_seed(0)
    features = torch.randn(1, 1, rows, columns, 6)
    mapping = randomised(FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=1)))
    row, column = (torch.arange(n).clamp(max=size - 1) for n, size in zip(extended, (rows, columns), strict=True))
    by_hand = mapping(features[:, :, row][:, :, :, column])[:, :, :rows, :columns]
    mapped = mapping(features)
    assert mapped.shape == features.shape
    torch.testing.assert_close(mapped, by_hand)


@pytest.mark.parametrize(
    ("kind", "num_downsamplings", "smallest"),
    [("resnet", 2, 8), ("resnet", 1, 4), ("resnet", 0, 2), ("cyclegan", 2, 8), ("cyclegan", 0, 4)],
)
def test_smallest_grid_runs_and_a_smaller_one_is_explained(kind, num_downsamplings, smallest):
    config = MapperConfig(kind=kind, width=8, num_blocks=1, num_downsamplings=num_downsamplings)
    mapping = FeatureMapping(6, config)
    assert mapping(torch.randn(1, 1, smallest, smallest, 6)).shape == (1, 1, smallest, smallest, 6)
    with pytest.raises(ValueError, match=rf"at least {smallest}x{smallest}.*mapper\.num_downsamplings"):
        mapping(torch.randn(1, 1, smallest, smallest - 1, 6))


@pytest.mark.parametrize("kind", ["resnet", "attention", "linear"])
def test_every_parameter_gets_a_gradient(kind):
    mapping = randomised(FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=2)))
    mapping(torch.randn(1, 2, 8, 8, 6)).square().mean().backward()
    assert [name for name, p in mapping.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_wrong_settings_come_in_one_message():
    with pytest.raises(ValueError, match=r"kind is 'gan', allowed: resnet.*num_blocks is 0") as error:
        MapperConfig(kind="gan", num_blocks=0)
    assert "width" not in str(error.value)
    with pytest.raises(ValueError, match="width is 24, allowed with group norm"):
        MapperConfig(width=24)
    with pytest.raises(ValueError, match="width is 200, not divisible by its 3 heads: use a multiple of 64"):
        MapperConfig(kind="attention", width=200)
