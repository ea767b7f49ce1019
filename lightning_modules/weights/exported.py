"""Exported models of this project: one folder for transformers, see ``lightning_modules/inference/export.py``."""

from __future__ import annotations

from lightning_modules.model.exo2ego import NetworkConfig
from lightning_modules.weights.tensors import FoundWeights, Release

MODEL_TYPE = "exo2ego"


def stored_name(part: str, name: str) -> str:
    """Return the name in an exported folder of a part's parameter."""
    module = "language_model.causal_lm" if part in ("language_model", "lora") else part
    return f"model.{module}.{name}"


def find_exported(release: Release, part: str, network: NetworkConfig) -> FoundWeights | None:
    """Find a part in an exported model; None for other formats."""
    if release.kind != MODEL_TYPE:
        return None
    tensors = release.below(stored_name(part, ""))
    if part in ("language_model", "lora"):
        adapters = (".lora_A", ".lora_B")
        tensors = {name: t for name, t in tensors.items() if name.endswith(adapters) == (part == "lora")}
    return release.found(part, tensors, "" if tensors else f"holds no {part}")
