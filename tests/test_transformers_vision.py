"""Compare encoders filled from vision folders of transformers with the models that wrote these folders."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lightning_modules.model.encoders import EncoderConfig, build_encoder
from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import WeightsError

SIZE, PATCH, WIDTH, LAYERS, HEADS = 32, 8, 64, 3, 2
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
}
MLP = {"intermediate_size": 4 * WIDTH}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

SIGLIP = {"timm": "vit_base_patch16_siglip_256", "gelu_tanh": True}
TOWERS = {
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, **MLP)), SIGLIP, 0),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, **MLP, hidden_act="quick_gelu")), {}, 1),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=4)), {"timm": "vit_small_patch14_dinov2"}, 1),
    "dinov2_swiglu": (
        lambda: Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=4, use_swiglu_ffn=True)),
        {"timm": "vit_giant_patch14_dinov2", "mlp_ratio": 5.5},  # 2 x 176 of SwiGLU
        1,
    ),
    "dinov2_registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=4, num_register_tokens=4)),
        {"timm": "vit_small_patch14_reg4_dinov2"},
        5,
    ),
    "dinov3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=4)),
        {"timm": "vit_small_patch16_dinov3_qkvb"},
        5,
    ),
    "dinov3_gated": (
        lambda: DINOv3ViTModel(
            DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
        ),
        {"timm": "vit_small_plus_patch16_dinov3_qkvb"},
        5,
    ),
}
RESAMPLING = ("siglip", "clip", "dinov2", "dinov2_registers")


def network(size=SIZE, **changes):
    encoder = EncoderConfig(size, PATCH, WIDTH, LAYERS, HEADS, image_mean=MEAN, image_std=STD, **changes)
    return NetworkConfig(encoder=encoder, language_model=LanguageModelConfig("llama"))


def written(name, folder):
    """Write a random tower to a folder and return it."""
    torch.manual_seed(0)
    model = TOWERS[name][0]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    pixels = {"image_mean": list(MEAN), "image_std": list(STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model


def filled(folder, net):
    """Build an encoder and fill it from a folder."""
    found = find_weights([str(folder)], "exo_encoder", net)
    encoder = build_encoder(net.encoder).eval()
    encoder.load_state_dict({key: tensor.read() for key, tensor in found.tensors.items()})
    assert {key: tensor.shape for key, tensor in found.tensors.items()} == {
        key: tuple(parameter.shape) for key, parameter in encoder.state_dict().items()
    }
    return encoder


def features(model, encoder, size, prefix_tokens, **options):
    """Return the features of both for the same frames, [B, T, h, w, D]."""
    video = torch.randint(0, 256, (2, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(encoder.normalise(video.flatten(0, 1)), output_hidden_states=True, **options)
        ours = encoder(video)
    return ours, outputs.hidden_states[-2][:, prefix_tokens:].reshape(ours.shape)


@pytest.mark.parametrize("name", TOWERS)
def test_features_equal_those_of_transformers(tmp_path, name):
    _, changes, prefix_tokens = TOWERS[name]
    model = written(name, tmp_path)
    ours, theirs = features(model, filled(tmp_path, network(**changes)), SIZE, prefix_tokens)
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("size", [2 * PATCH, 6 * PATCH])
@pytest.mark.parametrize("name", RESAMPLING)
def test_resampled_positions_are_those_of_transformers(tmp_path, name, size):
    _, changes, prefix_tokens = TOWERS[name]
    model = written(name, tmp_path)
    encoder = filled(tmp_path, network(size, **changes, resample_positions=True))
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    ours, theirs = features(model, encoder, size, prefix_tokens, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_rotary_positions_need_no_resampling(tmp_path):
    _, changes, prefix_tokens = TOWERS["dinov3"]
    model = written("dinov3", tmp_path)
    encoder = filled(tmp_path, network(6 * PATCH, **changes))
    ours, theirs = features(model, encoder, 6 * PATCH, prefix_tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_resampled_positions_of_open_clip_are_its_own(tmp_path):
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 1, "layers": 1}
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    state = open_clip.CLIP(**settings).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    net = network(2 * PATCH, resample_positions=True)
    found = find_weights([str(tmp_path)], "exo_encoder", net)
    smaller = open_clip.CLIP(**settings | {"vision_cfg": vision | {"image_size": 2 * PATCH}})
    resize_pos_embed(state, smaller)
    positions = found.tensors["tower.positional_embedding"]
    assert positions.shape == (5, WIDTH)
    torch.testing.assert_close(positions.read(), state["visual.positional_embedding"])


def test_a_tower_inside_a_whole_siglip(tmp_path):
    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**SHAPE, **MLP})).eval()
    model.save_pretrained(tmp_path)
    assert any(name.startswith("text_model.") for name in load_file(tmp_path / "model.safetensors"))
    ours, theirs = features(model.vision_model, filled(tmp_path, network(**SIGLIP)), SIZE, 0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_names_of_the_hub_are_read(tmp_path):
    """Released DINOv2 has the names of transformers 4, which transformers 5 writes as well."""
    written("dinov2", tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in names
    assert "encoder.layer.0.attention.output.dense.bias" in names


@pytest.mark.parametrize("name", ["dinov3", "dinov3_gated"])
def test_dinov3_gets_gradients_in_bfloat16_and_is_built_without_memory(tmp_path, name):
    changes = TOWERS[name][1]
    written(name, tmp_path)
    net = network(**changes)
    encoder = filled(tmp_path, net)
    with torch.device("meta"):
        empty = build_encoder(net.encoder)
    buffers = dict(empty.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())
    video = torch.zeros(1, 1, SIZE, SIZE, 3, dtype=torch.uint8)
    expected = encoder(video)
    encoder.bfloat16()(video).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert (encoder(video) - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match=r"model.whiten_patches: .* has rotary positions"):
        encoder.whiten_patches(video[0], torch.Generator())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"network.encoder.gelu_tanh: got false, but the tower of .* has true. Set it to true"),
        ({**SIGLIP, "image_mean": (0.5,) * 3}, r"network.encoder.image_mean: got \[0.5, 0.5, 0.5\], but .* \[0.4,"),
        ({**SIGLIP, "heads": 4}, r"network.encoder.heads: got 4, but the tower of .* has 2"),
    ],
)
def test_another_form_is_refused(tmp_path, changes, message):
    written("siglip", tmp_path)
    shape = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "heads": HEADS}
    encoder = EncoderConfig(**{**shape, "image_mean": MEAN, "image_std": STD, **changes})
    net = NetworkConfig(encoder=encoder, language_model=LanguageModelConfig("llama"))
    with pytest.raises(WeightsError, match=message):
        find_weights([str(tmp_path)], "exo_encoder", net)


def timm_folder(folder, name="vit_small_patch14_dinov2"):
    """Write a random tower as timm does for the hub and return it."""
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    model = timm.create_model(name, num_classes=0, **shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, folder, model_config={"pretrained_cfg": {"mean": MEAN, "std": STD}}, safe_serialization=True)
    return model


@pytest.mark.parametrize("size", [SIZE, 6 * PATCH])
def test_features_equal_those_of_timms_own_folder(tmp_path, size):
    model = timm_folder(tmp_path)
    changes = {"timm": "vit_small_patch14_dinov2", "resample_positions": size != SIZE}
    encoder = filled(tmp_path, network(size, **changes))
    if size != SIZE:
        model.set_input_size((size, size))
    video = torch.randint(0, 256, (2, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = encoder(video)
        (theirs,) = model.forward_intermediates(
            encoder.normalise(video.flatten(0, 1)), indices=[LAYERS - 2], intermediates_only=True, output_fmt="NLC"
        )
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_timms_folder_of_another_form_is_refused(tmp_path):
    timm_folder(tmp_path)
    with pytest.raises(WeightsError, match=r"network.encoder.timm: got null, but .* has \"vit_small_patch14_dinov2\""):
        find_weights([str(tmp_path)], "exo_encoder", network())
    with pytest.raises(WeightsError, match=r"holds a vision tower, no language_model"):
        find_weights([str(tmp_path)], "language_model", network())


def test_what_timm_does_not_have_is_refused(tmp_path):
    written("dinov2", tmp_path)
    with pytest.raises(WeightsError, match=r"network.encoder.timm: got null, but .* holds a dinov2 tower. Set it to"):
        find_weights([str(tmp_path)], "exo_encoder", network())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "siglip2_vision_model"}))
    with pytest.raises(WeightsError, match=r"frames of any shape \(NaFlex\) cannot be read"):
        find_weights([str(tmp_path)], "exo_encoder", network())
