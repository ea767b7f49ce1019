"""Compare low-rank adapters with PEFT's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.model.lora import LoRAConfig, LoRALinear, add_lora, merge_lora, save_peft_adapter

CONFIG = LoRAConfig(rank=4, alpha=12, dropout=0.5)
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def with_random_adapters(base: nn.Module) -> nn.Module:
    adapted = copy.deepcopy(base)
    add_lora(adapted, CONFIG)
    for layer in adapted.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.2)
    return adapted


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_outputs_do_not_change_at_initialisation(base):
    before = logits(base)
    add_lora(base, CONFIG)
    assert torch.equal(logits(base), before)


def test_update_by_hand():
    layer = nn.Sequential(nn.Linear(3, 2))
    add_lora(layer, LoRAConfig(rank=1, alpha=2, dropout=0.0))
    linear, x = layer[0], torch.tensor([[1.0, 2.0, 3.0]])
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    linear.lora_A.data = torch.tensor([[1.0, 0.0, -1.0]])
    linear.lora_B.data = torch.tensor([[10.0], [1.0]])
    torch.testing.assert_close(layer(x), torch.tensor([[-40.0, -4.0]]))


def test_adapts_every_linear_but_the_head_and_keeps_names(base):
    before = set(base.state_dict())
    names = add_lora(base, CONFIG)
    parts = ["self_attn." + p for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    parts += ["mlp." + p for p in ("gate_proj", "up_proj", "down_proj")]
    assert set(names) == {f"model.layers.{i}.{part}" for i in (0, 1) for part in parts}
    added = {f"{name}.{matrix}" for name in names for matrix in ("lora_A", "lora_B")}
    assert set(base.state_dict()) == before | added
    assert {name for name, _ in base.named_parameters() if name.endswith((".lora_A", ".lora_B"))} == added


def test_dropout_acts_on_the_update_and_in_training_only(base):
    adapted = with_random_adapters(base)
    assert torch.equal(logits(adapted), logits(adapted))
    adapted.train()
    assert not torch.equal(logits(adapted), logits(adapted))
    layer, x = adapted.model.layers[0].mlp.up_proj, torch.randn(5, 32)
    torch.manual_seed(7)
    out = layer(x)
    torch.manual_seed(7)
    expected = x @ layer.weight.T + F.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T * 3
    torch.testing.assert_close(out, expected)


def test_only_adapters_need_gradients_to_train(base):
    base.requires_grad_(False)
    names = add_lora(base, CONFIG)
    base(IDS).logits.square().mean().backward()
    assert all(base.get_submodule(name).lora_B.grad.any() for name in names)
    assert {name.rpartition(".")[2] for name, p in base.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }


def test_merge_keeps_outputs_and_leaves_plain_layers(base):
    adapted = with_random_adapters(base)
    before = logits(adapted)
    assert (before - logits(base)).abs().max() > 0.1
    merge_lora(adapted)
    torch.testing.assert_close(logits(adapted), before, atol=1e-4, rtol=1e-4)
    assert adapted.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in adapted.modules())


def test_peft_reads_the_saved_adapter(base, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = with_random_adapters(base)
    adapters = {name: p.detach() for name, p in adapted.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    save_peft_adapter(adapters, CONFIG, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reference), logits(adapted), atol=1e-5, rtol=1e-5)
    assert reference.peft_config["default"].lora_dropout == 0.5
    with reference.disable_adapter():
        assert (logits(reference) - logits(adapted)).abs().max() > 0.1


def test_misuse_is_explained(base):
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        merge_lora(base)
    add_lora(base, CONFIG)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(base, CONFIG)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        add_lora(nn.Sequential(nn.ReLU()), CONFIG)
    with pytest.raises(ValueError, match="got rank=0"):
        LoRAConfig(rank=0)


def test_scaling_inside_the_update_changes_no_bit():
    """The factor is a power of two in all experiments, so it may stand where the update is narrow."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 40))
    add_lora(module, LoRAConfig(rank=4, alpha=8, dropout=0.0))
    layer = module[0]
    nn.init.normal_(layer.lora_B)
    x, gradient = torch.randn(9, 24, requires_grad=True), torch.randn(9, 40)
    inputs = [x, layer.lora_A, layer.lora_B]
    outside = F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * 2.0
    assert torch.equal(layer(x), outside)
    pairs = zip(*(torch.autograd.grad(y, inputs, gradient) for y in (layer(x), outside)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_recomputation_repeats_the_narrow_products_alone():
    """The large product needs nothing that is saved after it, and recomputation ends before it if it is the last."""
    module = nn.Sequential(nn.Linear(24, 40))
    add_lora(module, LoRAConfig(rank=4, alpha=8, dropout=0.0))
    module[0].weight.requires_grad_(False)
    x, flops = torch.randn(9, 24, requires_grad=True), []
    for output in (module(x), checkpoint(module, x, use_reentrant=False)):
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        flops.append(counter.get_total_flops())
    assert 0 < flops[1] - flops[0] <= 2 * 9 * 4 * (24 + 40)
