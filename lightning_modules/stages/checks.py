"""Check before training that the data suit the model and that the weights a stage starts from exist and fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_modules.model.language_model import transformers_config
from lightning_modules.model.quantize import require_bitsandbytes

if TYPE_CHECKING:
    from datamodules.clips.dataset import ClipConfig
    from lightning_modules.stages.base import Stage


def check_stage(stage: Stage, clips: ClipConfig, max_text_tokens: int) -> None:
    """Check a stage against its data, and tell it the number of frames of a clip.

    No weights are read; their names and shapes are compared with the model.

    Args:
        stage: to check; ``num_frames`` is set.
        clips: frames of a clip of the data.
        max_text_tokens: longest text of the data.

    Raises:
        ValueError: image size, tokenizer or length of the input do not suit the model, or weights are missing or do
            not fit; the message names the key to change or the command to run.
    """
    network, encoder = stage.network, stage.network.encoder_shape
    if clips.image_size != encoder.image_size:
        own = network.encoder.type
        where = "network.encoder.image_size" if own is None else f"that of {own} (network.encoder.type)"
        raise ValueError(
            f"clips.image_size: got {clips.image_size}, but {where} is {encoder.image_size}: make them agree"
        )

    # The embedding table must have a row for every token: its size is overridden, or comes with released weights.
    tokens = len(stage.tokenizer)
    if tokens > stage.vocab_size:
        raise ValueError(
            f"tokenizer: {stage.tokenizer_name} has {tokens} tokens, but "
            f"network.language_model.overrides.vocab_size is {stage.vocab_size}: make them agree"
        )
    settings = transformers_config(network.language_model, stage.vocab_size)
    if settings.vocab_size < tokens:
        raise ValueError(
            f"network.language_model.pretrained: {network.language_model.pretrained} has {settings.vocab_size} tokens, "
            f"the tokenizer {tokens}; make network.language_model.pretrained and tokenizer agree"
        )

    # Visual tokens and text must fit into the positions of the language model.
    visual = network.visual_tokens(clips.num_frames) * stage.num_visual_inputs
    longest = settings.max_position_embeddings
    if visual + max_text_tokens > longest:
        raise ValueError(
            f"data.max_text_tokens: {max_text_tokens} of text and {visual} visual tokens exceed the "
            f"{longest} positions of the language model: lower data.init_args.max_text_tokens to at most "
            f"{longest - visual}"
        )

    if stage.quantization == "nf4":
        require_bitsandbytes("model.init_args.frozen_dtype: nf4")
    if stage.optim.algorithm == "adamw8bit":
        require_bitsandbytes("model.init_args.optim.algorithm: adamw8bit")
    if stage.quantization is not None and "language_model" not in (*stage.init, *stage.trained):
        raise ValueError(
            f"model.init_args.frozen_dtype: {stage.quantization} is for a language model that is read from files, but "
            "this one is drawn at random and could not be exported: name its weights in "
            "model.init_args.init.language_model or network.language_model.pretrained, or use bfloat16"
        )

    stage.num_frames = clips.num_frames
    stage.check_sources()
