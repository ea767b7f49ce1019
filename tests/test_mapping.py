"""The mappings F and G: CycleGAN's generator exactly, and the form made for features."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.model.mapping import FeatureMapping, MapperConfig

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "cyclegan_resnet9.safetensors"
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


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
    """[T, C, H, W] to [1, T, H, W, C]."""
    return images.permute(0, 2, 3, 1)[None]


def randomised(mapping: FeatureMapping) -> FeatureMapping:
    """With every parameter random, so that the mapping is not the identity."""
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
    ("kind", "width", "expected"),
    [("resnet", 256, 182_233_088), ("resnet", 512, 727_796_736), ("cyclegan", 256, 207_377_920)],
)
def test_parameter_count_at_full_size(kind, width, expected):
    with torch.device("meta"):
        mapping = FeatureMapping(1024, MapperConfig(kind=kind, width=width))
    assert sum(p.numel() for p in mapping.parameters()) == expected


@pytest.mark.parametrize("kind", ["resnet", "linear"])
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_residual_mapping_starts_as_the_identity_and_can_leave_it(kind, norm):
    features = torch.randn(2, 3, 8, 8, 6)
    mapping = FeatureMapping(6, MapperConfig(kind=kind, width=8, num_blocks=1, norm=norm))
    assert torch.equal(mapping(features), features)
    optimizer = torch.optim.SGD(mapping.parameters(), lr=0.1)
    mapping(features).square().mean().backward()
    optimizer.step()
    assert not torch.equal(mapping(features), features)


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


def test_frames_are_mapped_one_by_one():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 8, 8, 6)
    mapping = randomised(FeatureMapping(6, MapperConfig(width=8, num_blocks=2)))
    expected = torch.stack([torch.cat([mapping(frame[None, None])[0] for frame in clip]) for clip in features])
    torch.testing.assert_close(mapping(features), expected, atol=1e-5, rtol=1e-4)


def test_grid_that_does_not_divide_is_extended_by_its_border_and_cut_back():
    torch.manual_seed(0)
    features = torch.randn(1, 1, 9, 10, 6)
    mapping = randomised(FeatureMapping(6, MapperConfig(width=8, num_blocks=1)))
    rows, columns = torch.arange(12).clamp(max=8), torch.arange(12).clamp(max=9)
    by_hand = mapping(features[:, :, rows][:, :, :, columns])[:, :, :9, :10]
    torch.testing.assert_close(mapping(features), by_hand)


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


def test_every_parameter_gets_a_gradient():
    mapping = randomised(FeatureMapping(6, MapperConfig(width=8, num_blocks=2)))
    mapping(torch.randn(1, 2, 8, 8, 6)).square().mean().backward()
    assert [name for name, p in mapping.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_wrong_settings_come_in_one_message():
    with pytest.raises(ValueError, match=r"kind is 'gan', allowed: resnet.*num_blocks is 0") as error:
        MapperConfig(kind="gan", num_blocks=0)
    assert "width" not in str(error.value)
    with pytest.raises(ValueError, match="width is 24, allowed with group norm"):
        MapperConfig(width=24)
