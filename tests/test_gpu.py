"""Properties that only a GPU shows; skipped where there is none. ``pytest -m gpu`` runs them alone."""

import lightning as L
import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_modules.callbacks.finite_check import FiniteCheck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]
DEVICE = "cuda"
STAGES = ["stage1", "stage2", "stage3"]


def ready(name, tokenizer, **changes):
    """Return a stage on the GPU, its parameters moved off their initial values."""
    stage = tiny.make_stage(name, tokenizer, network=tiny.network(dropout=0.0), **changes)
    stage.configure_model()
    tiny.scatter(stage.model)
    return stage.to(DEVICE).train()


def step(stage, precision=torch.bfloat16, batch=None):
    """Run forward and backward, and return the loss and all gradients as one vector."""
    stage.zero_grad()
    with torch.autocast(DEVICE, precision, enabled=precision != torch.float32):
        loss = stage.training_step(batch or tiny.clip_batch().to(DEVICE), 0)
    loss.backward()
    gradients = [parameter.grad.flatten() for _, _, parameter in stage.trainable() if parameter.grad is not None]
    return loss.detach(), torch.cat(gradients)


def assert_same_direction(one, other, at_least):
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > at_least
    assert 0.97 < one.norm() / other.norm() < 1.03


@pytest.mark.parametrize("name", STAGES)
def test_a_step_never_waits_for_the_gpu(toy_tokenizer, name):
    stage = ready(name, toy_tokenizer)
    optimizer = stage.optim.optimizer(((part, parameter) for part, _, parameter in stage.trainable()), fused=True)
    batch = tiny.clip_batch().to(DEVICE)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast(DEVICE, torch.bfloat16):
                stage.training_step(batch, 0).backward()
            stage.on_before_optimizer_step(optimizer)
            gradients = [p.grad for _, _, p in stage.trainable() if p.grad is not None]
            stage.gradient_norm = torch.nn.utils.get_total_norm(gradients)
            stage.gradient_norm.to("cpu", non_blocking=True)  # as FiniteCheck looks at it one step later
            stage.configure_gradient_clipping(optimizer, 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STAGES)
def test_compiled_blocks_give_the_same_losses_and_gradients(toy_tokenizer, name):
    torch._dynamo.reset()
    loss, gradients = step(ready(name, toy_tokenizer, compile_blocks=True, activation_checkpointing=True))
    expected, eager = step(ready(name, toy_tokenizer))
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert_same_direction(gradients, eager, 0.99)


@pytest.mark.parametrize("name", STAGES)
def test_bfloat16_gives_the_losses_and_gradients_of_float32(toy_tokenizer, name):
    stage = ready(name, toy_tokenizer)
    loss, gradients = step(stage)
    expected, exact = step(stage, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-2)
    assert_same_direction(gradients, exact, 0.98)


@pytest.mark.parametrize("name", STAGES)
def test_attention_of_a_step_runs_in_the_flash_kernel(toy_tokenizer, name):
    stage = ready(name, toy_tokenizer, frozen_dtype="bfloat16")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot
        loss, _ = step(stage)
    assert loss.isfinite()


@pytest.mark.parametrize("compiled", [False, True])
def test_one_sharded_gpu_learns_what_an_unsharded_one_does(toy_tokenizer, tmp_path, compiled):
    """Over NCCL: parameters are gathered in bfloat16, and the optimiser is fused."""
    weights = []
    for strategy in ("auto", "fsdp2"):
        stage = tiny.make_stage(
            "stage2", toy_tokenizer, learning_rate=1e-3, compile_blocks=compiled, activation_checkpointing=True
        )
        trainer = L.Trainer(
            accelerator="gpu" if DEVICE == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            precision="bf16-mixed",
            max_steps=3,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            callbacks=[FiniteCheck()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
            default_root_dir=tmp_path,
        )
        batches = [tiny.clip_batch(seed) for seed in range(3)]
        trainer.fit(stage, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
        assert DEVICE == "cpu" or trainer.optimizers[0].param_groups[0]["fused"]
        tensors = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in stage.parameters()]
        weights.append(torch.cat([tensor.detach().flatten().cpu() for tensor in tensors]))
    # Three steps of 1e-3, of which rounding may turn the sign where a gradient is nearly zero.
    assert ((weights[0] - weights[1]).abs() < 2e-3).float().mean() > 0.99
    assert (weights[0] - weights[1]).abs().max() < 7e-3
