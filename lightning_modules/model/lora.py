"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, under the layers' own parameter names.

`peft.inject_adapter_in_model` would rename the layers' own weights (`base_layer`) in checkpoints and draw more random
numbers.

Letters: `r` rank, `I` and `O` input and output width of a linear layer.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

_PEFT_PREFIX, _PEFT_SUFFIX = "base_model.model.", ".weight"


@dataclass
class LoRAConfig:
    """Size of the adapters.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: on the input of the update, in training only.
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"network.lora: got rank={self.rank}, dropout={self.dropout}; "
                "rank must be at least 1, dropout in [0, 1)"
            )


class LoRALinear(nn.Linear):
    """W x + b + alpha / r * B A dropout(x), where A (`lora_A` [r, I]) and B (`lora_B` [O, r]) are the adapter.

    Made from an existing layer by `add_lora`: `weight` and `bias` stay where they are, so that checkpoints of the
    plain model load with and without adapters.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora: LoRAConfig

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., I] to float [..., O]."""
        reduced = F.linear(F.dropout(x, self.lora.dropout, self.training), self.lora_A)
        # Scaled where it is r wide instead of O; with a power of two as factor the result is the same to the bit.
        update = F.linear(reduced * self.scale, self.lora_B)
        # Last: recomputation of a block ends before its last product, which should be the large one.
        return super().forward(x) + update

    @property
    def scale(self) -> float:
        """Return the factor alpha / r of the update."""
        return self.lora.alpha / self.lora.rank


def add_lora(module: nn.Module, config: LoRAConfig) -> list[str]:
    """Add an adapter to every `nn.Linear` inside `module`, except one named `lm_head`. Nothing is frozen.

    A is Kaiming-uniform and B zero, so outputs do not change at first. Both are float32 and on the default device,
    whatever the layers are.

    Args:
        module: language model, changed in place. Before sharding, as the parameters are new.
        config: size of the adapters.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: there are adapters already, or nothing to adapt.
    """
    if _adapted(module):
        raise ValueError("the module has LoRA adapters already: merge_lora removes them")
    names = []
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or name.rpartition(".")[2] == "lm_head":
            continue
        layer.__class__ = LoRALinear
        assert isinstance(layer, LoRALinear)
        layer.lora = config
        layer.lora_A = nn.Parameter(torch.empty(config.rank, layer.in_features, dtype=torch.float32))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        names.append(name)
    if not names:
        raise ValueError("the module has no nn.Linear to add LoRA to")
    return names


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Fold the adapters inside `module` into their layers, which become plain `nn.Linear` again.

    Raises:
        ValueError: there are no adapters, or a layer's weight is quantised.
    """
    if any(not isinstance(layer.weight, nn.Parameter) for layer in _require_adapted(module).values()):
        raise ValueError("adapters cannot be folded into quantised weights: load the model with frozen_dtype bfloat16")
    for layer in _require_adapted(module).values():
        update = layer.lora_B.float() @ layer.lora_A.float() * layer.scale
        layer.weight.copy_(layer.weight.float() + update)
        del layer.lora_A, layer.lora_B, layer.lora
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def save_peft_adapter(
    adapters: Mapping[str, Tensor], config: LoRAConfig, folder: str | Path, base_model: str | None = None
) -> None:
    """Write adapters as PEFT does, for `peft.PeftModel.from_pretrained(base, folder)`.

    Args:
        adapters: `lora_A` and `lora_B` of every adapted layer, by their names inside the transformers model.
        config: their size.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        base_model: folder or hub name of the language model without adapters, for `AutoPeftModelForCausalLM`.
    """
    layers = {name.rpartition(".")[0] for name in adapters}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PEFT_PREFIX}{name}{_PEFT_SUFFIX}": tensor for name, tensor in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def from_peft_name(name: str) -> str:
    """Return the name of an adapter matrix inside the transformers model from its name in PEFT's file."""
    return name.removeprefix(_PEFT_PREFIX).removesuffix(_PEFT_SUFFIX)


def _adapted(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def _require_adapted(module: nn.Module) -> dict[str, LoRALinear]:
    layers = _adapted(module)
    if not layers:
        raise ValueError("the module has no LoRA adapters: add_lora adds them")
    return layers
