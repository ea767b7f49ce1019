"""Released causal language models, as transformers stores them."""

from __future__ import annotations

from lightning_modules.weights.tensors import FoundWeights, Release, Tensors


def find_language_model(release: Release, part: str) -> FoundWeights:
    """Find the language model in a folder of transformers, of any model type."""
    if part != "language_model":
        return release.found(part, {}, f"holds a language model ({release.kind}), no {part}")
    tied = bool(release.settings.get("tie_word_embeddings"))
    tensors = causal_lm_tensors(release.tensors, tied)
    return release.found(part, tensors, count=len(release.tensors))


def causal_lm_tensors(stored: Tensors, tied: bool) -> Tensors:
    """Leave out stored tensors that are no parameters: a tied head, and rotary frequencies of old checkpoints."""
    left_out = ("lm_head.weight",) if tied else ()
    return {name: t for name, t in stored.items() if name not in left_out and not name.endswith("inv_freq")}
