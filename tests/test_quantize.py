"""Frozen weights in 8 and 4 bits, the 8-bit optimiser, and parameters kept on the CPU."""

import importlib.util

import lightning as L
import pytest
import tiny
import torch
from test_stages import fit, moved, trainer, values
from torch import nn
from torch.utils.data import DataLoader

from datamodules import ClipConfig
from lightning_modules.callbacks.checkpoint import Checkpoints, newest
from lightning_modules.model import quantize
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.model.lora import LoRAConfig, LoRALinear, add_lora, merge_lora
from lightning_modules.model.quantize import QuantizedLinear, quantize_linears, stored_parameters
from lightning_modules.stages.base import Stage
from lightning_modules.stages.checks import check_stage
from lightning_modules.stages.optim import OptimConfig

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not has_bitsandbytes, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=needs_bitsandbytes)]
WEIGHT_ERROR = {"int8": 0.01, "nf4": 0.12}
"""Largest relative error of weights that are normally distributed; measured: 0.0068 and 0.092."""


def two_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_input_gradients_are_those_of_the_dequantised_weights(kind):
    plain, quantised = two_layers(), two_layers()
    quantize_linears(quantised, kind)
    for ours, theirs in zip(quantised[::2], plain[::2], strict=True):
        error = (ours.weight - theirs.weight).norm() / theirs.weight.norm()
        assert 0 < error < WEIGHT_ERROR[kind]
        theirs.weight.data.copy_(ours.weight)
    inputs = [torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((quantised, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert not any(parameter.requires_grad for parameter in quantised.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_stored_weight_is_held_for_the_backward_pass(kind):
    layer = nn.Sequential(nn.Linear(64, 128, bias=False))
    quantize_linears(layer, kind)
    held = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(held.append, lambda tensor: tensor):
        y = layer(x)
    assert not held and y.requires_grad
    stored = sum(p.numel() * p.element_size() for p in stored_parameters(layer))
    assert stored == {"int8": 64 * 128 + 4 * 128, "nf4": 64 * 128 * quantize.BITS["nf4"] / 8}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_quantised_layers(kind):
    model = two_layers()
    add_lora(model, LoRAConfig(rank=4, alpha=8, dropout=0.0))
    quantize_linears(model, kind)
    assert all(isinstance(layer, LoRALinear) and isinstance(layer, QuantizedLinear) for layer in model[::2])
    x = torch.randn(4, 64)
    before = model(x)
    model(x).square().sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in model[::2])
    with torch.no_grad():
        for layer in model[::2]:
            layer.lora_B -= 0.1 * layer.lora_B.grad
    assert not torch.allclose(model(x), before)
    with pytest.raises(ValueError, match="quantised"):
        merge_lora(model)


def test_layers_without_linear_weights_are_refused():
    with pytest.raises(ValueError, match=r"frozen_dtype: int8 is for nn.Linear, of which Sequential has none"):
        quantize_linears(nn.Sequential(nn.LayerNorm(3)), "int8")


FIRST_LOSS = {"int8": 0.01, "nf4": 0.15}
"""Largest difference of the loss, near 4.4, to that with frozen parts in bfloat16; measured: 0.004 and 0.080."""
TRAINED_LOSS = {"int8": 0.02, "nf4": 0.15}
"""The same after four steps, near 3.4; measured: 0.007 and 0.051."""


@pytest.fixture(scope="module")
def network(toy_tokenizer, tmp_path_factory):
    """A network whose language model starts from files."""
    folder = tmp_path_factory.mktemp("language_model")
    plain = tiny.make_stage("stage1", toy_tokenizer)
    plain.configure_model()
    tiny.scatter(plain.model)
    plain.model.language_model.causal_lm.save_pretrained(folder)
    network = tiny.network(dropout=0.0)
    network.language_model = LanguageModelConfig(pretrained=str(folder))
    return network


def text_loss(stage):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return float(stage.losses(tiny.clip_batch())["vtg"])


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_a_quantised_stage_trains_as_one_in_bfloat16(toy_tokenizer, network, name):
    first, trained, counts = {}, {}, {}
    for frozen in ("bfloat16", "int8", *(["nf4"] if has_bitsandbytes else [])):
        stage = tiny.make_stage(name, toy_tokenizer, network=network, frozen_dtype=frozen)
        stage.configure_model()
        layers = [layer for layer in stage.model.modules() if isinstance(layer, QuantizedLinear)]
        assert len(layers) == (0 if frozen == "bfloat16" else 14)
        counts[frozen] = {part: stage.model.count(part) for part in stage.model.parts}
        first[frozen] = text_loss(stage)
        if name == "stage3":
            before = values(stage)
            fit(stage, steps=4, precision="bf16-mixed")
            assert moved(before, values(stage)) == set(stage.trains)
            trained[frozen] = text_loss(stage)
            assert trained[frozen] < first[frozen] - 0.3
    print(name, first, trained)
    for losses, tolerance in ((first, FIRST_LOSS), (trained, TRAINED_LOSS)):
        usual = losses.pop("bfloat16", None)
        assert all(0 < abs(loss - usual) < tolerance[kind] for kind, loss in losses.items())
    usual = counts.pop("bfloat16")
    assert all(count == usual for count in counts.values())


def test_a_layer_is_quantised_before_the_next_is_read(toy_tokenizer, network, monkeypatch):
    """So that no process holds the whole model in bfloat16."""
    stage = tiny.make_stage("stage1", toy_tokenizer, network=network, frozen_dtype="int8")
    held = []

    def look(unit, quantization):
        parameters = [p for model in models for p in model.language_model.parameters()]
        held.append(sum(p.nbytes for p in parameters if not p.is_meta and p.dtype == torch.bfloat16))
        quantize_linears(unit, quantization)

    models = []
    monkeypatch.setattr(Stage, "attach", lambda self, model: (models.append(model), setattr(self, "model", model)))
    monkeypatch.setattr("lightning_modules.weights.loading.quantize_linears", look)
    stage.configure_model()
    norms = 2 * 32 * 2  # of the first layer, in bfloat16
    assert held[0] > 10 * norms and held == [held[0], held[0] + norms]


def test_a_trained_language_model_stays_in_float32(toy_tokenizer):
    stage = tiny.make_stage("stage0", toy_tokenizer, frozen_dtype="int8")
    stage.configure_model()
    assert not stored_parameters(stage.model)
    assert {p.dtype for p in stage.model.part("language_model").values()} == {torch.float32}


class StopAfter(L.Callback):
    """Interrupt a run after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.steps


@needs_bitsandbytes
def test_moments_in_8_bits_train_as_those_in_32_and_are_resumed(toy_tokenizer, tmp_path):
    def train(algorithm, name, *callbacks):
        optim = OptimConfig(learning_rate=1e-2, warmup_fraction=0.0, algorithm=algorithm)
        network = tiny.network(width=64)  # bitsandbytes keeps 32 bits below 4096 numbers
        stage = tiny.make_stage("stage1", toy_tokenizer, network=network, optim=optim)
        run = trainer(4, [Checkpoints(tmp_path / name, every_n_steps=2), *callbacks])
        run.fit(stage, DataLoader([tiny.clip_batch()] * 4, batch_size=None), ckpt_path=newest(tmp_path / name))
        with torch.no_grad():
            return stage, run, float(stage.losses(tiny.clip_batch())["vtg"])

    _, _, usual = train("adamw", "usual")
    whole, run, loss = train("adamw8bit", "whole")
    assert {state["state1"].dtype for state in run.optimizers[0].state.values()} == {torch.uint8, torch.float32}
    *_, halfway = train("adamw8bit", "cut", StopAfter(2))
    resumed, run, _ = train("adamw8bit", "cut")
    assert run.global_step == 4
    assert not moved(values(whole), values(resumed))
    print(halfway, loss, usual)
    assert loss < halfway - 0.005 and abs(loss - usual) < 0.002  # measured: 0.0001


def test_a_random_language_model_is_refused_before_anything_is_read(toy_tokenizer):
    """Its weights would be exported, and packed ones cannot be."""
    clips = ClipConfig(num_frames=tiny.FRAMES, image_size=tiny.SIZE)
    with pytest.raises(ValueError, match=r"frozen_dtype: int8 is for .* read from files, .*init.language_model"):
        check_stage(tiny.make_stage("stage1", toy_tokenizer, frozen_dtype="int8"), clips, 16)
    check_stage(tiny.make_stage("stage0", toy_tokenizer, frozen_dtype="int8"), clips, 16)  # trains it


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"frozen_dtype": "nf4"}, "model.init_args.frozen_dtype: nf4"),
        (
            {"optim": OptimConfig(learning_rate=1e-2, algorithm="adamw8bit")},
            "model.init_args.optim.algorithm: adamw8bit",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_command_before_anything_is_read(toy_tokenizer, monkeypatch, changes, key):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    stage = tiny.make_stage("stage1", toy_tokenizer, **changes)
    clips = ClipConfig(num_frames=tiny.FRAMES, image_size=tiny.SIZE)
    with pytest.raises(ValueError, match=f"{key} needs the package bitsandbytes: pip install -e '.\\[small\\]'"):
        check_stage(stage, clips, 16)
