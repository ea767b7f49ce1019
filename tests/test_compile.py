"""Compiled blocks: the same losses and gradients, few compilations, and only where training needs them."""

from functools import partialmethod

import lightning as L
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from datamodules.text import EncodedText, TextEncoder
from lightning_modules.model.exo2ego import Exo2EgoModel


@pytest.fixture
def without_compiler(monkeypatch):
    """Trace blocks as ``torch.compile`` does, and run the traced operators without generating code; count graphs."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(Exo2EgoModel, "compile_blocks", partialmethod(Exo2EgoModel.compile_blocks, backend))
    yield graphs
    torch._dynamo.reset()


def step(name, tokenizer, batch=None, **changes):
    stage = tiny.make_stage(name, tokenizer, network=tiny.network(dropout=0.0), **changes)
    stage.configure_model()
    tiny.scatter(stage.model)
    stage.train()
    loss = stage.training_step(batch or tiny.clip_batch(), 0)
    loss.backward()
    return stage, loss.detach(), {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        torch.testing.assert_close(
            gradient, other[2][name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("stage3", True),  # encoder, mapper, projector, and language model with adapters
        pytest.param("stage1", False, marks=pytest.mark.slow),
        pytest.param("stage2", False, marks=pytest.mark.slow),
        pytest.param("stage2", True, marks=pytest.mark.slow),
        pytest.param("stage3", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_the_same_losses_and_gradients(toy_tokenizer, without_compiler, name, checkpointing):
    compiled = step(name, toy_tokenizer, compile_blocks=True, activation_checkpointing=checkpointing)
    assert without_compiler
    assert_same(compiled, step(name, toy_tokenizer))


@pytest.mark.slow
def test_compiled_blocks_take_quantised_layers(toy_tokenizer, without_compiler):
    with torch.autocast("cpu", torch.bfloat16):
        compiled, usual = (
            step("stage3", toy_tokenizer, frozen_dtype="int8", compile_blocks=compile_blocks)
            for compile_blocks in (True, False)
        )
    assert without_compiler
    torch.testing.assert_close(compiled[1], usual[1], rtol=1e-3, atol=0)
    for name, gradient in usual[2].items():
        assert (compiled[2][name] - gradient).norm() < 0.02 * gradient.norm()  # measured: 0.003


def test_blocks_of_a_class_share_their_code_and_evaluation_runs_without(toy_tokenizer, without_compiler):
    stage, _, _ = step("stage1", toy_tokenizer, compile_blocks=True)
    made = len(without_compiler)
    blocks = sum(len(found) for found in stage.model.blocks().values())
    assert made <= blocks  # two decoder layers are one graph; the projector's blocks differ in shape
    stage.training_step(tiny.clip_batch(1), 0).backward()
    assert len(without_compiler) == made
    stage.eval()
    with torch.no_grad():
        stage.model(tiny.video(3, 0))
    assert len(without_compiler) == made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_generated_code_gives_the_same_losses_and_gradients(toy_tokenizer, name):
    compiled = step(name, toy_tokenizer, compile_blocks=True, activation_checkpointing=True)
    assert_same(compiled, step(name, toy_tokenizer))


def test_texts_are_padded_to_few_lengths():
    rows = [EncodedText([1] * length, [-100] * length) for length in (3, 17)]
    assert TextEncoder.batch(rows).input_ids.shape == (2, 17)
    padded = TextEncoder.batch(rows, 16)
    assert padded.input_ids.shape == padded.labels.shape == padded.attention_mask.shape == (2, 32)
    assert padded.attention_mask.sum(1).tolist() == [3, 17]


def test_more_padding_changes_no_loss(toy_tokenizer):
    batch, padded = tiny.clip_batch(), tiny.clip_batch()
    text = padded.text
    text.input_ids, text.attention_mask = (
        torch.nn.functional.pad(t, (0, 10)) for t in (text.input_ids, text.attention_mask)
    )
    text.labels = torch.nn.functional.pad(text.labels, (0, 10), value=-100)
    assert_same(step("stage1", toy_tokenizer, padded), step("stage1", toy_tokenizer, batch))


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("32-true", marks=pytest.mark.slow)])
def test_a_fused_optimiser_clips_and_learns_the_same(toy_tokenizer, monkeypatch, tmp_path, precision):
    """Lightning refuses to clip by norm with a fused optimiser; the stage does it itself."""
    weights = []
    for fused in (False, True):
        stage = tiny.make_stage("stage3", toy_tokenizer, network=tiny.network(dropout=0.0))
        usual = stage.optim.optimizer
        object.__setattr__(stage.optim, "optimizer", lambda parameters, _, f=fused, u=usual: u(parameters, f))
        trainer = L.Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=2,
            gradient_clip_val=0.1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        batches = [tiny.clip_batch(seed) for seed in range(2)]
        trainer.fit(stage, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
        assert trainer.optimizers[0].param_groups[0]["fused"] is (True if fused else None)
        weights.append([p.detach().clone() for p in stage.parameters()])
    one, other = (torch.cat([p.flatten() for p in each]) for each in weights)
    # Adam's first steps depend on the sign of gradients alone, also of those that are zero but for rounding.
    assert ((one - other).abs() < 1e-5).float().mean() > 0.999
