"""A vision encoder of the user's own, in one file, trained by the command line: the example of docs/extending.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.model.encoders import EncoderConfig, VisionEncoder, build_encoder, encoder_shape
from lightning_modules.run import build
from lightning_modules.weights.handoff import read_manifest

TOY = str(tiny.EXPERIMENTS / "toy")
ENCODER = ["network.encoder.type=encoder.ConvEncoder", f"network.encoder.args={{image_size: {tiny.SIZE}, dim: 24}}"]
FROM_SCRATCH = ["start.encoder=null", "start.projector=null", "start.language_model=null"]


@pytest.fixture(autouse=True)
def example_on_the_python_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "examples"))


@pytest.fixture
def arguments(toy_world, tmp_path):
    """Arguments after the stage's name: the tiny network with the example's encoder."""
    overrides = [override for override in tiny.OVERRIDES if not override.startswith("network.encoder.")]
    return [*overrides, f"data_root={toy_world}", f"runs={tmp_path}", *ENCODER, *FROM_SCRATCH]


def test_stages_1_and_2_train_it_and_hand_its_weights_on(arguments, tmp_path):
    assert main(["fit", TOY, "stage1", *arguments]) == 0
    demonstrator = load_file(tmp_path / "toy" / "stage1" / "handoff" / "exo_encoder.safetensors")
    config = EncoderConfig(type="encoder.ConvEncoder", args={"image_size": tiny.SIZE, "dim": 24})
    shapes = {name: parameter.shape for name, parameter in build_encoder(config).named_parameters()}
    assert {name: tensor.shape for name, tensor in demonstrator.items()} == shapes

    assert main(["fit", TOY, "stage2", *arguments]) == 0
    learner = load_file(tmp_path / "toy" / "stage2" / "handoff" / "ego_encoder.safetensors")
    assert {name: tensor.shape for name, tensor in learner.items()} == shapes
    assert any(not torch.equal(learner[name], demonstrator[name]) for name in learner)
    for name, start in demonstrator.items():
        assert (learner[name] - start).abs().max() < 5e-3  # Adam moves at most about the learning rate a step
    started_from = read_manifest(tmp_path / "toy" / "stage2" / "handoff")["started_from"]
    assert started_from["ego_encoder"] == read_manifest(tmp_path / "toy" / "stage1" / "handoff")["digest"]


def test_its_sizes_come_from_its_interface(arguments):
    stage = build(compose(tiny.EXPERIMENTS / "toy", "stage1", arguments)).stage
    assert stage.network.encoder_shape.dim == 24
    assert stage.network.encoder_shape.grid == (2, 2)
    stage.configure_model()
    assert stage.model.exo_encoder.blocks() == list(stage.model.exo_encoder.layers)
    assert stage.model.exo_encoder(tiny.video(2, seed=0)).shape == (2, tiny.FRAMES, 2, 2, 24)


class WithBatchNorm(VisionEncoder):
    def __init__(self):
        super().__init__(tiny.SIZE, 4, (1, 1))
        self.norm = nn.BatchNorm2d(3)

    def encode(self, pixels):
        return self.norm(pixels)


class WithConstant(WithBatchNorm):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()
        self.register_buffer("scale", torch.ones(3), persistent=False)


@pytest.mark.parametrize(
    ("type_", "args", "message"),
    [
        ("no_such.Encoder", {}, r"network.encoder.type: cannot import no_such.Encoder \(No module named 'no_such'\)"),
        ("encoder.NoSuch", {}, r"network.encoder.type: cannot import encoder.NoSuch"),
        ("encoder.ResidualBlock", {}, r"network.encoder.type: encoder.ResidualBlock is no subclass of .*VisionEncoder"),
        ("encoder.ConvEncoder", {"size": 1}, r"network.encoder.args: encoder.ConvEncoder\(image_size.*: missing a"),
        ("test_door_encoder.WithBatchNorm", {}, r"network.encoder.type: .*WithBatchNorm: buffer norm.running_mean .*"),
        ("test_door_encoder.WithConstant", {}, r"network.encoder.type: .*WithConstant: buffer scale .*device='cpu'"),
    ],
)
def test_unusable_classes_are_refused(type_, args, message):
    with pytest.raises(ValueError, match=message):
        encoder_shape(EncoderConfig(type=type_, args=args))


def test_arguments_without_a_class_are_refused():
    with pytest.raises(ValueError, match=r"network.encoder: .*args are given without type"):
        EncoderConfig(args={"dim": 3})


def test_settings_of_the_encoder_that_it_replaces_are_dropped():
    encoder = compose(tiny.EXPERIMENTS / "toy", "stage1", ENCODER)["model"]["init_args"]["network"]["encoder"]
    assert encoder == {"type": "encoder.ConvEncoder", "args": {"image_size": tiny.SIZE, "dim": 24}}
    back = compose(tiny.EXPERIMENTS / "toy", "stage1", [*ENCODER, "network.encoder.type=null"])["network"]["encoder"]
    assert (back["type"], back["patch_size"]) == (None, 8)


@pytest.mark.parametrize("position", [0, 2])
def test_settings_next_to_a_class_that_would_be_ignored_are_refused(arguments, position, capsys):
    overrides = [*ENCODER]
    overrides[position:position] = ["network.encoder.width=48", "network.encoder.image_mean=[0.5, 0.5, 0.5]"]
    assert main(["fit", TOY, "stage1", *arguments, *overrides]) == 2
    message = (
        "network.encoder: width, image_mean would be ignored, as type is encoder.ConvEncoder: remove them, or put them "
        "into args if it takes them"
    )
    assert message in capsys.readouterr().err


def test_a_class_and_its_defaults_are_accepted():
    EncoderConfig(type="encoder.ConvEncoder", image_mean=list(EncoderConfig.image_mean), timm=None, width=0)
