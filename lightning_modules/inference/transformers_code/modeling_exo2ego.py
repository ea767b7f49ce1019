"""Exo2Ego as a ``PreTrainedModel`` of transformers.

Letters: ``B`` clips, ``T`` frames, ``S`` side of a frame, ``L`` text tokens, ``P`` positions with visual tokens, ``V``
vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_modules.inference.transformers_code.configuration_exo2ego import Exo2EgoConfig
from lightning_modules.model.encoders.base import EncoderConfig, VisionEncoder
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig, ProjectorConfig
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.model.lora import LoRAConfig
from lightning_modules.model.mapping import MapperConfig

_SECTIONS = {
    "encoder": EncoderConfig,
    "language_model": LanguageModelConfig,
    "projector": ProjectorConfig,
    "mapper": MapperConfig,
    "lora": LoRAConfig,
}


class Exo2EgoForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An exported model that answers questions about video; its parts are those of training."""

    config_class = Exo2EgoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: Exo2EgoConfig) -> None:
        super().__init__(config)
        description = config.description
        network = dict(description["network"])
        for name, section in _SECTIONS.items():
            known = {each.name for each in fields(section)}
            network[name] = section(**{key: value for key, value in network[name].items() if key in known})
        self.model = Exo2EgoModel(NetworkConfig(**network), description["vocab_size"], description["parts"])
        self.post_init()
        # transformers looks for tied weights in direct children only; the language model lies deeper.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def _init_weights(self, module: Any) -> None:
        """Restore the pixel statistics, which are in no file; an exported folder holds every weight."""
        if isinstance(module, VisionEncoder):
            module.restore_buffers()

    def get_input_embeddings(self) -> Any:
        """Return the embedding of text tokens."""
        return self.model.language_model.causal_lm.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor,
        attention_mask: Tensor | None = None,
        **ignored: Any,
    ) -> CausalLMOutput:
        """Compute next-token logits.

        Args:
            input_ids: int64 [B, L], with the clip's placeholder, padded on the right.
            pixel_values_videos: uint8 [B, T, S, S, 3], RGB, as the processor returns it.
            attention_mask: bool [B, L].
            **ignored: options of transformers without a meaning here.

        Returns:
            ``logits``, float32 [B, P, V].
        """
        language_model = self.model.language_model
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        spliced = language_model.splice(input_ids, mask, None, self.model.encode(pixel_values_videos))
        hidden = language_model.causal_lm.get_decoder()(inputs_embeds=spliced.embeds, use_cache=False)
        return CausalLMOutput(logits=language_model.logits(hidden.last_hidden_state))

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts about clips.

        Args:
            input_ids, pixel_values_videos, attention_mask: see ``forward``.
            generation_config: by default that of the exported folder, which is greedy.
            **options: options of ``GenerationMixin.generate``, such as ``max_new_tokens`` or ``do_sample``.

        Returns:
            int64 [B, new tokens], without the prompts.
        """
        language_model = self.model.language_model
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        spliced = language_model.splice(input_ids, mask, None, self.model.encode(pixel_values_videos))
        embeds, mask = language_model.pad_left(spliced)
        chosen = copy.deepcopy(generation_config or self.generation_config)
        others = chosen.update(**options)
        tokens: Tensor = language_model.causal_lm.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=chosen, **others
        )
        return tokens
