"""Proofs with real weights and a real video: ``make test-real WEIGHTS=folder VIDEO=file``.

WEIGHTS holds a DINOv2-S/14 tower, ``facebook/dinov2-small`` as on the hub or ``dinov2_vits14`` in open_clip's form, and
``HuggingFaceTB/SmolLM2-135M-Instruct`` or ``smollm2_135m_instruct``.
"""

import json
import os

import av
import pytest
import timm
import tiny
import torch
from PIL import Image
from transformers import AutoModel

from datamodules.text import load_tokenizer
from datamodules.toy_world.release import Settings, generate
from lightning_modules import Exo2Ego
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.inference.export import export_model
from lightning_modules.model.encoders import build_encoder
from lightning_modules.model.language_model import LanguageModel, LanguageModelConfig
from lightning_modules.run import build_stage
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import open_tensors

VIDEO = os.environ.get("EXO2EGO_VIDEO") or ""
TOWER, LANGUAGE_MODEL = tiny.real_weights() or (None, None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        TOWER is None, reason=f"no DINOv2-S and SmolLM2-135M in {tiny.REAL_WEIGHTS}: make test-real WEIGHTS=folder"
    ),
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Start toy_real from the real weights."""
    folder = tmp_path_factory.mktemp("weights")
    for names, found in zip(tiny.REAL_PARTS, (TOWER, LANGUAGE_MODEL), strict=True):
        (folder / names[0]).parent.mkdir()
        (folder / names[0]).symlink_to(found.resolve())
    return [f"weights={folder}"]


def real_frame(size):
    if not VIDEO:
        pytest.skip("no video: make test-real WEIGHTS=folder VIDEO=file")
    with av.open(VIDEO) as container:
        frame = next(container.decode(video=0)).to_image()
    pixels = frame.resize((size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(1, 1, size, size, 3)


def features_of_its_own_library(folder, pixels):
    """Return the output of the second-to-last block, without the class token."""
    if (folder / "config.json").is_file():
        model = AutoModel.from_pretrained(folder).eval()
        return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    stored = open_tensors(folder / "open_clip_model.safetensors", "Download it again")
    size = pixels.shape[-1]
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0).eval()
    model.load_state_dict({name.removeprefix("visual.trunk."): tensor.read() for name, tensor in stored.items()})
    return model.forward_intermediates(pixels, indices=[10], intermediates_only=True, output_fmt="NLC")[0]


def test_the_tower_is_that_of_its_library(overrides):
    own_size = "clips.image_size=224"  # at that of toy_real, 112 px, positions would be resampled
    network = build_stage(compose(tiny.EXPERIMENTS / "toy_real", "stage0", [*overrides, own_size])).network
    encoder = build_encoder(network.encoder).eval()
    found = find_weights([str(TOWER)], "exo_encoder", network)
    encoder.load_state_dict({name: tensor.read() for name, tensor in found.tensors.items()})
    frame = real_frame(network.encoder.image_size)
    with torch.no_grad():
        ours = encoder(frame).flatten(1, 3)
        theirs = features_of_its_own_library(TOWER, encoder.normalise(frame.flatten(0, 1)))
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_language_model_knows_the_capital_of_france():
    folder = str(LANGUAGE_MODEL)
    model = LanguageModel(LanguageModelConfig(pretrained=folder), 0).eval()
    tensors = open_tensors(LANGUAGE_MODEL / "model.safetensors", "Download it again")
    model.causal_lm.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, strict=False)
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    eos = tokenizer.eos_token_id
    with torch.no_grad():
        (answer,) = model.generate(ids, torch.ones_like(ids).bool(), torch.zeros(1, 1, model.dim), 12, eos, eos)
    assert "Paris" in tokenizer.decode(answer)


def test_all_stages_run_and_the_exported_model_answers_the_same(overrides, tmp_path):
    world = tmp_path / "rich"
    takes = {"train_takes": 2, "val_takes": 1, "initialisation_takes": 2, "practice_takes": 2, "benchmark_takes": 1}
    generate(world, Settings(preset="rich", size=64, **takes), workers=1)
    few = ["trainer.max_steps=1", "data.init_args.global_batch_size=2", "data.init_args.micro_batch_size=2"]
    few += ["model.init_args.optim.learning_rate=1e-5"]  # a step at full rate makes the likeliest answer an empty one
    few += ["data.init_args.held_out=null", "threads=1", f"data_root={world}", f"runs={tmp_path}"]
    for stage in tiny.STAGES:
        assert main(["fit", str(tiny.EXPERIMENTS / "toy_real"), stage, *overrides, *few]) == 0
        manifest = json.loads((tmp_path / "toy_real" / stage / "handoff" / "manifest.json").read_text())
        assert manifest["stage"] == stage
    trained = tmp_path / "toy_real" / "stage3"
    export_model(trained, tmp_path / "exported")
    video = str(next((world / "practice").glob("*.mp4")))
    answers = [
        Exo2Ego.from_pretrained(source).answer(video, "What does the camera-wearer do?", max_new_tokens=8)
        for source in (trained, tmp_path / "exported")
    ]
    assert answers[0] == answers[1] and answers[0]
