"""Released causal language models, as transformers stores them."""

from __future__ import annotations

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_modules.weights.tensors import FoundWeights, Release


def find_language_model(release: Release, part: str) -> FoundWeights:
    """Find the language model in a folder of transformers, of any type of causal language model."""
    if release.kind in CONFIG_MAPPING and release.kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fix = "give CLIP, SigLIP or DINO weights for an encoder"
        if part == "language_model":
            fix = "give a causal language model"
        return release.found(part, {}, f"holds a {release.kind} model, no {part}: {fix}")
    if part != "language_model":
        return release.found(part, {}, f"holds a language model ({release.kind}), no {part}")
    # A tied head, and the rotary frequencies of old checkpoints, are no parameters.
    tied = release.settings.get("tie_word_embeddings")
    left_out = ("lm_head.weight", "inv_freq") if tied else ("inv_freq",)
    tensors = {name: tensor for name, tensor in release.tensors.items() if not name.endswith(left_out)}
    return release.found(part, tensors, count=len(release.tensors))
