"""Compare models filled with released weights with the models that these come from."""

import json
import weakref

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM, ViTMAEConfig, ViTMAEModel

from lightning_modules.model.encoders import EncoderConfig
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig, ProjectorConfig
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.weights import tensors as stored
from lightning_modules.weights.loading import load_weights, require_fit
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import StoredTensor, WeightsError

SIZE, PATCH, FRAMES, VOCAB = 28, 7, 4, 40
PARTS = ("exo_encoder", "projector", "language_model")
LANGUAGE_MODEL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def network(padding=1, encoder=None, **changes):
    tower = EncoderConfig(image_size=SIZE, patch_size=PATCH, width=32, layers=3, heads=2)
    return NetworkConfig(
        encoder=encoder or tower,
        language_model=LanguageModelConfig("mistral", overrides={"vocab_size": VOCAB, **LANGUAGE_MODEL}),
        projector=ProjectorConfig(padding=padding),
        **changes,
    )


class STC(nn.Module):
    """VideoLLaMA2's connector, implemented independently from its description."""

    def __init__(self):
        super().__init__()

        def stage(width):
            return RegStage(4, width, 48, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)

        self.s1, self.s2 = stage(32), stage(48)
        self.sampler = nn.Sequential(nn.Conv3d(48, 48, 2, 2, padding=1), nn.SiLU())
        self.readout = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48))

    def forward(self, features):  # [T, h * w, C], one clip
        frames = self.s1(features.transpose(1, 2).unflatten(2, (4, 4)))  # [T, D, h, w]
        steps = self.s2(self.sampler(frames.transpose(0, 1)[None])[0].transpose(0, 1))  # [T', D, h', w']
        return self.readout(steps.permute(0, 2, 3, 1).flatten(0, 2))


def randomised(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def reference():
    """Return tower, connector and language model of a tiny VideoLLaMA2."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    mistral = MistralForCausalLM(MistralConfig(vocab_size=VOCAB, **LANGUAGE_MODEL))
    return randomised(CLIPVisionModel(vision), 1), randomised(STC(), 2), randomised(mistral, 3)


def tensors_of(reference, tower=True):
    vision, connector, mistral = reference
    state = dict(mistral.state_dict())
    state |= {f"model.mm_projector.{name}": value for name, value in connector.state_dict().items()}
    if tower:
        for name, value in vision.state_dict().items():
            state[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = value
    return {name: value.contiguous().clone() for name, value in state.items()}


def settings(**changes):
    return {
        "model_type": "videollama2_mistral",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "stc_connector",
        "mm_vision_select_layer": -2,
        "num_frames": FRAMES,
        **changes,
    }


def write_sharded(folder, tensors, config):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    shards = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    place = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def released(reference, tmp_path):
    """Write a tiny VideoLLaMA2 checkpoint in the layout of the released ones."""
    folder = tmp_path / "weights" / "DAMO-NLP-SG" / "VideoLLaMA2-7B-16F"
    return write_sharded(folder, tensors_of(reference), settings())


def load(sources, net=None, parts=PARTS):
    net = net or network()
    found = {part: find_weights(sources, part, net) for part in parts}
    model = Exo2EgoModel(net, VOCAB, parts, empty=parts).eval()
    for part, source in found.items():
        require_fit(source, model.part(part))
    load_weights(model, found, parts, torch.float32, torch.device("cpu"))
    return model, found


def test_videollama2_gives_the_same_hidden_states(reference, released):
    vision, connector, mistral = reference
    model, found = load([str(released)])
    assert [source.summary.split(" of ")[0] for source in found.values()] == [
        f"exo_encoder: {len(vision.state_dict())} tensors",
        "projector: 113 tensors",
        f"language_model: {len(mistral.state_dict())} tensors",
    ]
    generator = torch.Generator().manual_seed(5)
    video = torch.randint(0, 256, (1, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([[1, 7, 9, 11, 2]])
    pixels = (video[0] / 255 - torch.tensor(network().encoder.image_mean)) / torch.tensor(network().encoder.image_std)
    with torch.no_grad():
        features = vision(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2][:, 1:]
        visual = connector(features)[None]
        embeds = torch.cat([visual, mistral.get_input_embeddings()(ids)], dim=1)
        expected = mistral.model(inputs_embeds=embeds).last_hidden_state
        ours = model.demonstrator_tokens(video)
        embeds = torch.cat([ours, model.language_model.embed(ids)], dim=1)
        hidden = model.language_model.causal_lm.get_decoder()(inputs_embeds=embeds).last_hidden_state
    assert visual.shape == (1, 3 * 3 * 3, 48)
    torch.testing.assert_close(ours, visual, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


def test_one_tensor_at_a_time_is_in_memory(released, monkeypatch):
    alive, most = [], 0

    def watched(read):
        def watching():
            nonlocal alive, most
            tensor = read()
            alive = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
            most = max(most, len(alive))
            return tensor

        return watching

    monkeypatch.setattr(stored, "StoredTensor", lambda shape, read: StoredTensor(shape, watched(read)))
    load([str(released)])
    assert 1 <= most <= 3  # query, key and value of one attention, while they are joined


def test_both_encoders_get_the_tower(released):
    parts = ("exo_encoder", "ego_encoder")
    model, _ = load([str(released)], parts=(*parts, "projector", "language_model"))
    exo, ego = (model.part(part) for part in parts)
    assert exo.keys() == ego.keys() and all(torch.equal(exo[name], ego[name]) for name in exo)


def test_bfloat16_weights_fill_parameters_of_any_type(reference, tmp_path):
    tensors = {name: value.bfloat16() for name, value in tensors_of(reference).items()}
    folder = write_sharded(tmp_path / "bf16", tensors, settings())
    model, _ = load([str(folder)])
    weight = model.part("language_model")["model.norm.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["model.norm.weight"].float())


def test_buffers_that_no_checkpoint_holds_are_right(released):
    model, _ = load([str(released)])
    fresh = MistralForCausalLM(MistralConfig(vocab_size=VOCAB, **LANGUAGE_MODEL))
    expected, ours = dict(fresh.named_buffers()), dict(model.language_model.causal_lm.named_buffers())
    assert expected.keys() == ours.keys() and len(ours) >= 1
    assert all(torch.equal(expected[name], ours[name]) for name in ours)


def test_a_base_folder_without_tower_falls_back_and_is_reported(reference, tmp_path):
    vision, connector, _ = reference
    base, clip = tmp_path / "VideoLLaMA2-7B-16F-Base", tmp_path / "clip"
    base.mkdir()
    projector = {f"model.mm_projector.{name}": value for name, value in connector.state_dict().items()}
    torch.save(projector, base / "mm_projector.bin")
    (base / "config.json").write_text(json.dumps(settings(tune_mm_mlp_adapter=True)))
    vision.save_pretrained(clip)
    found = find_weights([str(base), str(clip)], "exo_encoder", network())
    assert found.where == str(clip)
    assert found.summary.endswith(f"tensors of {clip} ({base} holds no vision tower)")
    assert find_weights([str(base)], "projector", network()).tensors.keys() == connector.state_dict().keys()
    with pytest.raises(WeightsError, match=r"holds no vision tower\. Name another source"):
        find_weights([str(base)], "exo_encoder", network())
    with pytest.raises(WeightsError, match=r"holds no language model, its base is mistralai/Mistral-7B-Instruct-v0.2"):
        find_weights([str(base)], "language_model", network())


@pytest.mark.parametrize(("kind", "padding", "tokens"), [("stc_connector", 1, 27), ("stc_connector_v35", 0, 8)])
def test_the_wrong_projector_is_recognised_by_its_tokens(reference, tmp_path, kind, padding, tokens):
    folder = write_sharded(tmp_path / "x", tensors_of(reference), settings(mm_projector_type=kind))
    find_weights([str(folder)], "projector", network(padding=padding))
    with pytest.raises(WeightsError, match=rf"network.projector.padding: .* {kind} of .* gives {tokens}. Set it to"):
        find_weights([str(folder)], "projector", network(padding=1 - padding))


def test_another_connector_is_refused(reference, tmp_path):
    folder = write_sharded(tmp_path / "x", tensors_of(reference), settings(mm_projector_type="mlp2x_gelu"))
    with pytest.raises(WeightsError, match=r"mm_projector_type is mlp2x_gelu, only stc_connector"):
        find_weights([str(folder)], "projector", network())


def test_a_missing_folder_names_repository_and_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        find_weights(["weights/DAMO-NLP-SG/VideoLLaMA2-7B-16F"], "projector", network())
    assert str(caught.value) == (
        "weights/DAMO-NLP-SG/VideoLLaMA2-7B-16F: no such folder. Run `.venv/bin/hf download "
        "DAMO-NLP-SG/VideoLLaMA2-7B-16F --local-dir weights/DAMO-NLP-SG/VideoLLaMA2-7B-16F`."
    )


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_missing_file_names_itself_and_the_command(released, name):
    (released / name).unlink()
    with pytest.raises(WeightsError, match=rf"{name}: no such file. Run `.*hf download DAMO-NLP-SG/VideoLLaMA2-7B-16F"):
        find_weights([str(released)], "language_model", network())


def test_a_truncated_file_names_itself(released):
    file = released / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model-00001-of-00002.safetensors: cannot be read \(.+\). Run `"):
        find_weights([str(released)], "projector", network())


def test_missing_tensors_of_a_checkpoint_are_named(reference, tmp_path):
    tensors = tensors_of(reference)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = write_sharded(tmp_path / "x", tensors, settings())
    found = find_weights([str(folder)], "language_model", network())
    with torch.device("meta"):
        model = Exo2EgoModel(network(), VOCAB, PARTS)
    with pytest.raises(WeightsError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        require_fit(found, model.part("language_model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quick_gelu": False}, r"network.encoder.quick_gelu: got false, but the tower of .* has true. Set it"),
        (
            {"timm": "vit_so400m_patch14_siglip_378"},
            r"network.encoder.timm: got .vit_so400m.* has null. Set it",
        ),
        ({"type": "encoder.Own"}, r"network.encoder.type: got encoder.Own, but .* Set it to null, or start.encoder to"),
    ],
)
def test_another_tower_is_refused(released, changes, message):
    shape = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 3, "heads": 2}
    config = EncoderConfig(**changes) if "type" in changes else EncoderConfig(**shape | changes)
    with pytest.raises(WeightsError, match=message):
        find_weights([str(released)], "exo_encoder", network(encoder=config))


def test_heads_that_shapes_do_not_show_are_compared(reference, tmp_path):
    reference[0].save_pretrained(tmp_path / "clip")
    encoder = EncoderConfig(image_size=SIZE, patch_size=PATCH, width=32, layers=3, heads=4)
    with pytest.raises(WeightsError, match=r"network.encoder.heads: got 4, but the tower of .* has 2. Set it to 2"):
        find_weights([str(tmp_path / "clip")], "exo_encoder", network(encoder=encoder))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_folder(tmp_path, quick_gelu):
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()
    save_file(
        {name: value.contiguous() for name, value in clip.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    mean = list(network().encoder.image_mean)
    config = {
        "model_cfg": {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": mean},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = EncoderConfig(SIZE, PATCH, 32, 3, 2, quick_gelu=quick_gelu)
    net = network(encoder=encoder)
    found = find_weights([str(tmp_path)], "exo_encoder", net)
    model = Exo2EgoModel(net, VOCAB, PARTS, empty=["exo_encoder"]).eval()
    require_fit(found, model.part("exo_encoder"))
    load_weights(model, {"exo_encoder": found}, PARTS, torch.float32, torch.device("cpu"))
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = clip.visual.forward_intermediates(pixels, indices=[1], intermediates_only=True, output_fmt="NLC")
        ours = model.exo_encoder.tower.forward_intermediates(
            pixels, indices=[1], intermediates_only=True, output_fmt="NLC"
        )
    assert torch.equal(ours["image_intermediates"][0], expected["image_intermediates"][0])

    (tmp_path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    with pytest.raises(WeightsError, match=r"network.encoder.image_mean: got .* has \[0.5, 0.5, 0.5\]"):
        find_weights([str(tmp_path)], "exo_encoder", net)
    with pytest.raises(WeightsError, match=r"network.encoder.quick_gelu: got"):
        find_weights(
            [str(tmp_path)],
            "exo_encoder",
            network(encoder=EncoderConfig(SIZE, PATCH, 32, 3, 2, quick_gelu=not quick_gelu)),
        )


def test_a_causal_language_model_folder(reference, tmp_path):
    mistral = reference[2]
    mistral.save_pretrained(tmp_path / "mistral")
    model, _ = load([str(tmp_path / "mistral")], parts=["language_model"])
    ids = torch.tensor([[1, 4, 5, 2]])
    with torch.no_grad():
        assert torch.equal(model.language_model.causal_lm(ids).logits, mistral(ids).logits)
    with pytest.raises(WeightsError, match=r"holds a language model \(mistral\), no projector"):
        find_weights([str(tmp_path / "mistral")], "projector", network())


@pytest.mark.parametrize(
    ("part", "fix"),
    [
        ("language_model", "give a causal language model"),
        ("exo_encoder", "give CLIP, SigLIP or DINO weights for an encoder"),
    ],
)
def test_another_kind_of_model_is_called_by_its_name(tmp_path, part, fix):
    config = ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    ViTMAEModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"holds a vit_mae model, no {part}: {fix}"):
        find_weights([str(tmp_path)], part, network())


def test_positions_of_another_resolution_name_their_image_size(released):
    net = network(encoder=EncoderConfig(SIZE + 2 * PATCH, PATCH, 32, 3, 2))
    with pytest.raises(WeightsError, match=rf"frames of {SIZE} x {SIZE} pixels: set clips.image_size to {SIZE}, or "):
        load([str(released)], net)


def test_a_local_folder_never_touches_the_network(released, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    load([str(released)])


def test_unknown_open_clip_names_list_the_known_ones():
    with pytest.raises(WeightsError, match=r"open_clip knows .*openai.*. Write open_clip:<model>/<tag>"):
        find_weights(["open_clip:ViT-L-14-336-quickgelu/opena"], "exo_encoder", network())


def test_hub_names_without_a_network_name_the_download_command(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError,
        match=r"nobody/nothing: cannot be downloaded .*hf download nobody/nothing --local-dir weights/nobody/nothing`",
    ):
        find_weights(["nobody/nothing"], "language_model", network())
