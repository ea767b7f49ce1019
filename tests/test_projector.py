"""Compare the STC connector with VideoLLaMA2's."""

from pathlib import Path

import pytest
import torch
from checkpointing import assert_checkpointing_changes_nothing
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.model.projector import STCConnector, stc_tokens

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "stc_connector.safetensors"
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip("reference tensors are not part of the repository")
    return load_file(GOLDEN)


def build(golden: dict[str, Tensor], padding: int) -> STCConnector:
    projector = STCConnector(32, 48, padding=padding).eval()
    projector.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    return projector


@pytest.mark.parametrize(("padding", "output"), [(1, "output"), (0, "output_v35")])
def test_equals_videollama2(golden, padding, output):
    tokens = build(golden, padding)(golden["input"].unflatten(2, (8, 8)))
    torch.testing.assert_close(tokens, golden[output], **CLOSE)


def test_input_gradient_equals_videollama2(golden):
    features = golden["input"].unflatten(2, (8, 8)).requires_grad_()
    build(golden, padding=1)(features).square().mean().backward()
    torch.testing.assert_close(features.grad.flatten(2, 3), golden["input_grad"], atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    ("num_frames", "side", "padding", "expected"),
    [(1, 24, 1, 169), (8, 24, 1, 845), (16, 24, 1, 1521), (16, 24, 0, 1152), (16, 27, 1, 1764), (16, 27, 0, 1352)],
)
def test_tokens_at_full_size(num_frames, side, padding, expected):
    assert stc_tokens(padding, num_frames, side, side) == expected


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 2), (4, 5, 6)])
def test_num_tokens_equals_the_output_of_forward(padding, shape):
    projector = STCConnector(4, 6, depth=1, padding=padding)
    assert projector(torch.randn(2, *shape, 4)).shape == (2, projector.num_tokens(*shape), 6)


def test_clips_do_not_see_each_other():
    torch.manual_seed(0)
    projector, features = STCConnector(4, 6, depth=1), torch.randn(2, 3, 4, 5, 4)
    torch.testing.assert_close(projector(features)[1:], projector(features[1:]))


def test_full_size_on_the_meta_device():
    with torch.device("meta"):
        projector = STCConnector(1024, 4096)
        features = torch.empty(1, 16, 24, 24, 1024)
    assert sum(p.numel() for p in projector.parameters()) == 489_188_608
    tokens = projector(features)
    assert tokens.is_meta and tokens.shape == (1, 1521, 4096)


def test_recomputing_the_blocks_changes_nothing():
    torch.manual_seed(0)
    projector = STCConnector(4, 6, depth=2)
    assert len(projector.blocks()) == 4
    assert_checkpointing_changes_nothing(projector, torch.randn(2, 3, 4, 5, 4))


def test_rejects_a_clip_that_leaves_no_tokens():
    with pytest.raises(ValueError, match="1 frames with padding 0"):
        STCConnector(4, 4, depth=1, padding=0)(torch.zeros(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="1 patch columns with padding 0"):
        stc_tokens(0, 2, 2, 1)


@pytest.mark.parametrize("setting", [{"depth": 0}, {"mlp_depth": 0}, {"padding": 2}])
def test_rejects_settings_it_does_not_have(setting):
    with pytest.raises(ValueError, match="projector: got"):
        STCConnector(4, 4, **setting)
