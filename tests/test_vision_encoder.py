"""The CLIP towers against open_clip's own and Hugging Face's."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from lightning_modules.model.vision_encoder import EncoderConfig, VisionEncoder, hf_clip_to_open_clip

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "clip_rename.json"
CONFIG = EncoderConfig(image_size=28, patch_size=7, width=64, layers=3, heads=2)


def random_video(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 28, 28, 3), dtype=torch.uint8, generator=generator)


def hugging_face_tower() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower


def normalised(video: Tensor) -> Tensor:
    mean, std = torch.tensor(CONFIG.image_mean), torch.tensor(CONFIG.image_std)
    return ((video / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_equals_hugging_face_second_to_last_hidden_state(prefix):
    video, reference = random_video(2, 3), hugging_face_tower()
    state = {prefix + name.removeprefix("vision_model."): value for name, value in reference.state_dict().items()}
    encoder = VisionEncoder(CONFIG).eval()
    encoder.load_clip(hf_clip_to_open_clip(state))
    with torch.no_grad():
        hidden = reference(normalised(video.flatten(0, 1)), output_hidden_states=True).hidden_states[-2]
        features = encoder(video)
    torch.testing.assert_close(features, hidden[:, 1:].reshape(2, 3, 4, 4, 64), atol=1e-4, rtol=1e-4)


def test_equals_open_clip_with_its_own_preprocessing():
    torch.manual_seed(0)
    vision = {"image_size": 28, "patch_size": 7, "width": 64, "layers": 3, "head_width": 32}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    video = random_video(1, 2)
    preprocess = open_clip.image_transform(28, is_train=False)
    pixels = torch.stack([preprocess(Image.fromarray(frame.numpy())) for frame in video[0]])
    encoder = VisionEncoder(CONFIG).eval()
    encoder.load_clip(clip.visual.state_dict())
    with torch.no_grad():
        outputs = clip.visual.forward_intermediates(pixels, indices=[1], intermediates_only=True, output_fmt="NLC")
        features = encoder(video)
    torch.testing.assert_close(features, outputs["image_intermediates"][0].reshape(1, 2, 4, 4, 64))


def test_every_parameter_gets_a_gradient():
    encoder = VisionEncoder(CONFIG)
    encoder(random_video(1, 1)).square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parameter_count_of_vit_l_336():
    with torch.device("meta"):
        encoder = VisionEncoder(EncoderConfig(image_size=336, patch_size=14, width=1024, layers=24, heads=16))
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 290.91
    assert (encoder.grid, encoder.dim) == ((24, 24), 1024)


def test_features_take_the_dtype_of_the_parameters_and_buffers_stay_out_of_checkpoints():
    encoder = VisionEncoder(CONFIG).to(torch.bfloat16)
    assert encoder(random_video(1, 1)).dtype == torch.bfloat16
    assert all(name.startswith("tower.") for name in encoder.state_dict())


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(1, 1, 28, 27, 3, dtype=torch.uint8),
        torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(1, 1, 28, 28, 3),
    ],
)
def test_rejects_other_sizes_and_types(video):
    with pytest.raises(ValueError, match=r"expected torch.uint8 of shape \(28, 28, 3\)"):
        VisionEncoder(CONFIG)(video)


def test_config_problems_come_in_one_message():
    with pytest.raises(ValueError, match=r"image_size 30 .* heads 3.*layers is 1"):
        EncoderConfig(image_size=30, patch_size=7, width=64, layers=1, heads=3)


@pytest.mark.parametrize("width", [32, 64, 192])
def test_whitened_filters_give_uncorrelated_tokens_as_strong_as_positions(width):
    # 3 x 7 x 7 patches have 147 values, so 192 filters need random combinations.
    frames = random_video(400)
    encoder = VisionEncoder(EncoderConfig(image_size=28, patch_size=7, width=width, layers=2, heads=2))
    encoder.whiten_patches(frames, torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = F.conv2d(normalised(frames), encoder.tower.conv1.weight, stride=7).flatten(2)  # [N, D, h * w]
    tokens = tokens.transpose(1, 2).flatten(0, 1)  # [N * h * w, D]
    positions = encoder.tower.positional_embedding.detach()[1:]
    assert math.isclose(positions.square().mean().sqrt(), 0.5 / math.sqrt(2), rel_tol=1e-5)
    assert math.isclose(tokens.square().mean().sqrt(), 0.5 / math.sqrt(2), rel_tol=1e-3)
    assert not encoder.tower.positional_embedding[0].any()
    correlation = tokens[:, : min(width, 147)].T @ tokens[:, : min(width, 147)] / len(tokens)
    off_diagonal = correlation - correlation.diag().diag()
    assert off_diagonal.abs().max() < 1e-3 * correlation.diag().mean()


def test_whitened_filters_start_with_the_strongest_direction():
    # Brightness alone varies between patches, with a little noise on top.
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randint(0, 250, (200, 4, 1, 4, 1, 1), generator=generator).expand(-1, -1, 7, -1, 7, 3)
    noise = torch.randint(0, 5, (200, 28, 28, 3), generator=generator)
    encoder = VisionEncoder(CONFIG)
    encoder.whiten_patches((brightness.reshape(200, 28, 28, 3) + noise).to(torch.uint8), generator)
    filters = F.normalize(encoder.tower.conv1.weight.flatten(1), dim=1)
    flat = F.normalize((1 / torch.tensor(CONFIG.image_std)).repeat_interleave(49), dim=0)
    assert (filters[0] @ flat).abs() > 0.95
    assert (filters[1:] @ flat).abs().max() < 0.3


def test_positions_are_distinct_and_repeatable():
    encoders = [VisionEncoder(EncoderConfig(28, 7, 192, 2, 2)) for _ in range(2)]
    for encoder in encoders:
        encoder.whiten_patches(random_video(8), torch.Generator().manual_seed(3))
    first, second = (encoder.tower for encoder in encoders)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    positions = first.positional_embedding[1:]
    distances = torch.cdist(positions, positions) + 10 * torch.eye(16)
    assert distances.min() > 0.1


def test_rename_follows_the_reference_map():
    if not GOLDEN.exists():
        pytest.skip("the reference map is not part of the repository")
    entries = json.loads(GOLDEN.read_text())["map"]
    names = [name for entry in entries for name in entry["hf"]]
    state = {name: torch.full((2, 3) if "visual_projection" in name else (2,), i) for i, name in enumerate(names)}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)
    renamed = hf_clip_to_open_clip(state)
    assert renamed.keys() == {entry["open_clip"] for entry in entries}
    for entry in entries:
        sources = [state[name] for name in entry["hf"]]
        expected = sources[0].T if entry["op"] == "transpose_optional" else torch.cat(sources)
        assert torch.equal(renamed[entry["open_clip"]], expected), entry


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_rename_rejects_an_incomplete_attention(missing):
    state = hugging_face_tower().state_dict()
    name = next(key for key in state if key.endswith(f"layers.1.self_attn.{missing}_proj.bias"))
    del state[name]
    with pytest.raises(ValueError, match="self_attn"):
        hf_clip_to_open_clip(state)


def test_rename_rejects_other_models():
    with pytest.raises(ValueError, match=r"cannot place text_model\.final_layer_norm\.bias"):
        hf_clip_to_open_clip({"text_model.final_layer_norm.bias": torch.zeros(2)})
