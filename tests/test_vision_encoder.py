"""Compare the built-in encoders with the towers of open_clip, timm and Hugging Face."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from checkpointing import assert_checkpointing_changes_nothing
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from lightning_modules.model.encoders import EncoderConfig, VisionEncoder, build_encoder
from lightning_modules.weights.clip import hf_clip_sources, tower_sources

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "clip_rename.json"
CONFIG = EncoderConfig(image_size=28, patch_size=7, width=64, layers=3, heads=2)
SO400M = "vit_so400m_patch14_siglip_378"
SIGLIP = EncoderConfig(28, 7, 64, 3, 2, mlp_ratio=3.7362, timm=SO400M, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
TOWERS = pytest.mark.parametrize("config", [CONFIG, SIGLIP], ids=["clip", "timm"])


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


def load(encoder: VisionEncoder, tower: dict[str, Tensor]) -> VisionEncoder:
    """Load a whole released tower into an encoder."""
    encoder.load_state_dict({ours: tower[name] for ours, name in tower_sources(tower, encoder.config).items()})
    return encoder.eval()


def open_clip_timm_tower(config: EncoderConfig) -> TimmModel:
    """Build open_clip's wrapper around a tower of the size that the encoder has, with the pooling head."""
    with torch.device("meta"):
        tower = TimmModel(config.timm, embed_dim=1152, pool="map", proj="none")
    sizes = {"embed_dim": config.width, "depth": config.layers, "num_heads": config.heads}
    sizes |= {"img_size": config.image_size, "patch_size": config.patch_size, "mlp_ratio": config.mlp_ratio}
    tower.trunk = timm.create_model(config.timm, num_classes=0, global_pool="map", **sizes)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def normalised(video: Tensor) -> Tensor:
    mean, std = torch.tensor(CONFIG.image_mean), torch.tensor(CONFIG.image_std)
    return ((video / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_equals_hugging_face_second_to_last_hidden_state(prefix):
    video, reference = random_video(2, 3), hugging_face_tower()
    state = {prefix + name.removeprefix("vision_model."): value for name, value in reference.state_dict().items()}
    tower = {name: torch.cat([state[key] for key in keys]) for name, keys in hf_clip_sources(state).items()}
    encoder = load(build_encoder(CONFIG), tower)
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
    encoder = load(build_encoder(CONFIG), clip.visual.state_dict())
    with torch.no_grad():
        outputs = clip.visual.forward_intermediates(pixels, indices=[1], intermediates_only=True, output_fmt="NLC")
        features = encoder(video)
    torch.testing.assert_close(features, outputs["image_intermediates"][0].reshape(1, 2, 4, 4, 64))


@pytest.mark.parametrize("prefix", ["", "trunk."])
def test_timm_tower_equals_open_clips(prefix):
    torch.manual_seed(0)
    reference, video = open_clip_timm_tower(SIGLIP), random_video(2, 3)
    encoder = load(build_encoder(SIGLIP), {prefix + name: p for name, p in reference.trunk.state_dict().items()})
    pixels = (video.flatten(0, 1).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        outputs = reference.forward_intermediates(pixels, indices=[-2], intermediates_only=True, output_fmt="NLC")
        features = encoder(video)
    expected = outputs["image_intermediates"][0].reshape(2, 3, 4, 4, 64)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SIGLIP, EncoderConfig(28, 7, 64, 3, 2, timm="vit_base_patch16_224")])
def test_every_parameter_gets_a_gradient(config):
    encoder = build_encoder(config)
    encoder(random_video(1, 1)).square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_vit_l_336_is_filled_by_the_391_tensors_of_hugging_face():
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(image_size=336, patch_size=14, width=1024, layers=24, heads=16))
        released = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=336, patch_size=14)).state_dict()
    assert sum(p.numel() for p in encoder.parameters()) == 290_909_184
    assert (encoder.grid, encoder.dim) == ((24, 24), 1024)
    assert all(isinstance(block.mlp.gelu, QuickGELU) for block in encoder.blocks())
    assert len(released) == 391
    assert tower_sources(hf_clip_sources(released), encoder.config).keys() == encoder.state_dict().keys()


def test_siglip2_so400m_is_open_clips_without_the_parts_not_used():
    settings = open_clip.get_model_config("ViT-SO400M-14-SigLIP2-378")["vision_cfg"]
    assert settings["timm_model_name"] == SO400M
    config = EncoderConfig(378, 14, width=1152, layers=27, heads=16, mlp_ratio=3.7362, timm=SO400M)
    with torch.device("meta"):
        encoder = build_encoder(config)
        reference = TimmModel(SO400M, 1152, settings["image_size"], settings["timm_pool"], settings["timm_proj"])
    released, sources = reference.state_dict(), tower_sources(reference.state_dict(), config)
    shapes = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    assert {ours: released[name].shape for ours, name in sources.items()} == shapes
    assert shapes["tower.blocks.25.mlp.fc1.weight"] == (4304, 1152)
    pruned = {name.split(".")[1] for name in released.keys() - set(sources.values())}
    assert pruned == {"blocks", "norm", "attn_pool"}
    assert encoder.grid == (27, 27)
    assert sum(p.numel() for p in encoder.parameters()) == 397_745_440


def test_activation_follows_the_configuration():
    exact = EncoderConfig(28, 7, 64, 3, 2, quick_gelu=False)
    for config, activation in ((CONFIG, QuickGELU), (exact, torch.nn.GELU)):
        assert all(type(block.mlp.gelu) is activation for block in build_encoder(config).blocks())


@TOWERS
def test_recomputing_the_blocks_changes_nothing(config):
    torch.manual_seed(0)
    encoder = build_encoder(config)
    assert len(encoder.blocks()) == 2
    assert_checkpointing_changes_nothing(encoder, random_video(1, 2))


@TOWERS
def test_built_on_the_meta_device_only_the_pixel_statistics_have_values(config):
    with torch.device("meta"):
        encoder = build_encoder(config)
        video = torch.empty(2, 3, 28, 28, 3, dtype=torch.uint8)
    assert all(tensor.is_meta for tensor in encoder.state_dict().values())
    torch.testing.assert_close(encoder.mean.flatten(), 255 * torch.tensor(config.image_mean))
    torch.testing.assert_close(encoder.std.flatten(), 255 * torch.tensor(config.image_std))
    features = encoder(video)
    assert features.is_meta and features.shape == (2, 3, 4, 4, 64)
    assert encoder.to("meta").mean.is_meta


@TOWERS
def test_features_take_the_dtype_of_the_parameters_and_buffers_stay_out_of_checkpoints(config):
    encoder = build_encoder(config).to(torch.bfloat16)
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
        build_encoder(CONFIG)(video)


def test_config_problems_come_in_one_message():
    with pytest.raises(ValueError, match=r"image_size 30 .* heads 3.*layers is 1"):
        EncoderConfig(image_size=30, patch_size=7, width=64, layers=1, heads=3)


@pytest.mark.parametrize("name", ["resnet50", "hf-hub:timm/vit_base_patch16_siglip_224", "no_such_model"])
def test_timm_names_other_than_vision_transformers_are_refused(name):
    with pytest.raises(ValueError, match=f"timm '{name}' is no vision transformer of timm"):
        EncoderConfig(28, 7, 64, 3, 2, timm=name)


@pytest.mark.parametrize("width", [32, 64, 192])
def test_whitened_filters_give_uncorrelated_tokens_as_strong_as_positions(width):
    # 3 x 7 x 7 patches have 147 values, so 192 filters need random combinations.
    frames = random_video(400)
    encoder = build_encoder(EncoderConfig(image_size=28, patch_size=7, width=width, layers=2, heads=2))
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


@pytest.mark.parametrize(("name", "prefix_tokens"), [(SO400M, 0), ("vit_base_patch16_224", 1)])
def test_timm_tower_is_whitened_as_clips(name, prefix_tokens):
    clip, other = build_encoder(CONFIG), build_encoder(EncoderConfig(28, 7, 64, 3, 2, timm=name))
    for encoder in (clip, other):
        encoder.whiten_patches(random_video(8), torch.Generator().manual_seed(0))
    assert torch.equal(other.tower.patch_embed.proj.weight, clip.tower.conv1.weight)
    assert not other.tower.patch_embed.proj.bias.any()
    assert torch.equal(other.tower.pos_embed[0], clip.tower.positional_embedding[1 - prefix_tokens :])


def test_whitened_filters_start_with_the_strongest_direction():
    # Brightness alone varies between patches, with a little noise on top.
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randint(0, 250, (200, 4, 1, 4, 1, 1), generator=generator).expand(-1, -1, 7, -1, 7, 3)
    noise = torch.randint(0, 5, (200, 28, 28, 3), generator=generator)
    encoder = build_encoder(CONFIG)
    encoder.whiten_patches((brightness.reshape(200, 28, 28, 3) + noise).to(torch.uint8), generator)
    filters = F.normalize(encoder.tower.conv1.weight.flatten(1), dim=1)
    flat = F.normalize((1 / torch.tensor(CONFIG.image_std)).repeat_interleave(49), dim=0)
    assert (filters[0] @ flat).abs() > 0.95
    assert (filters[1:] @ flat).abs().max() < 0.3


def test_positions_are_distinct_and_repeatable():
    encoders = [build_encoder(EncoderConfig(28, 7, 192, 2, 2)) for _ in range(2)]
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
    expected = {entry["open_clip"]: tuple(entry["hf"]) for entry in entries if entry["op"] != "transpose_optional"}
    names = [name for entry in entries for name in entry["hf"]]
    assert "vision_model.post_layernorm.weight" in names and "visual_projection.weight" in names
    assert hf_clip_sources([*names, "vision_model.embeddings.position_ids"]) == expected


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_rename_rejects_an_incomplete_attention(missing):
    names = list(hugging_face_tower().state_dict())
    names.remove(next(name for name in names if name.endswith(f"layers.1.self_attn.{missing}_proj.bias")))
    with pytest.raises(ValueError, match="self_attn"):
        hf_clip_sources(names)


def test_rename_rejects_other_models():
    with pytest.raises(ValueError, match=r"cannot place text_model\.final_layer_norm\.bias"):
        hf_clip_sources(["text_model.final_layer_norm.bias"])


def test_only_the_parts_that_are_not_kept_are_left_out():
    blocks = [f"transformer.resblocks.{block}.ln_1.bias" for block in (1, 2, 3)]
    kept = {f"tower.{name}": name for name in (blocks[0], blocks[2], "ln_pre.bias")}
    assert tower_sources([*blocks, "ln_pre.bias", "ln_post.bias", "proj"], CONFIG) == kept
    blocks = [f"trunk.blocks.{block}.norm1.bias" for block in (1, 2, 3)]
    kept = {"tower.blocks.1.norm1.bias": blocks[0], "tower.blocks.3.norm1.bias": blocks[2], "tower.other": "other"}
    assert tower_sources([*blocks, "trunk.norm.bias", "head.proj.weight", "other"], SIGLIP) == kept
