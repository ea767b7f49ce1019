"""Exo2Ego as a ``PreTrainedModel`` of transformers.

Letters: ``B`` clips, ``T`` frames, ``S`` side of a frame, ``L`` text tokens, ``P`` positions with visual tokens, ``V``
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_modules.inference.transformers_code.configuration_exo2ego import Exo2EgoConfig
from lightning_modules.model.encoders.base import EncoderConfig, VisionEncoder
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig, ProjectorConfig
from lightning_modules.model.language_model import VIDEO_TOKEN_ID, LanguageModelConfig
from lightning_modules.model.lora import LoRAConfig
from lightning_modules.model.mapping import MapperConfig
from lightning_modules.model.prefix_cache import SharedPrefix

_SECTIONS = {
    "encoder": EncoderConfig,
    "language_model": LanguageModelConfig,
    "projector": ProjectorConfig,
    "mapper": MapperConfig,
    "lora": LoRAConfig,
}


def _build(config: Exo2EgoConfig) -> Exo2EgoModel:
    description = config.description
    network = dict(description["network"])
    for name, section in _SECTIONS.items():
        known = {each.name for each in fields(section)}
        network[name] = section(**{key: value for key, value in network[name].items() if key in known})
    return Exo2EgoModel(NetworkConfig(**network), description["vocab_size"], description["parts"])


class Exo2EgoForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An exported model that answers questions about video; its parts are those of training."""

    config_class = Exo2EgoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: Exo2EgoConfig) -> None:
        super().__init__(config)
        self.model = _build(config)
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

    @torch.no_grad()
    def log_likelihoods(
        self, input_ids: Tensor, pixel_values_videos: Tensor, answers: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Score given answers to one question about one clip, which is read once.

        Args:
            input_ids: int64 [1, L], the question with the clip's placeholder.
            pixel_values_videos: uint8 [1, T, S, S, 3].
            answers: tokens of each answer with its end token, see ``Exo2EgoProcessor.encode_answers``.

        Returns:
            Log-likelihoods, float32 [R], sums over the tokens of an answer; and bool [R], True for an answer that
            greedy decoding gives.
        """
        language_model = self.model.language_model
        mask = torch.ones_like(input_ids)
        spliced = language_model.splice(input_ids, mask, None, self.model.encode(pixel_values_videos))
        question = SharedPrefix(language_model, spliced.embeds[0])
        log_p = question.log_likelihoods(answers)
        end = int(self.generation_config.eos_token_id)
        greedy = (*question.greedy(max(map(len, answers)), end), end)
        return log_p, torch.tensor([answer == greedy[: len(answer)] for answer in answers])


class Exo2EgoPromptModel(PreTrainedModel):  # type: ignore[misc]
    """The vision parts and the embedding of text, for servers that run the language model, such as vLLM.

    They turn a question about a clip into the embeddings that the language model reads.
    """

    config_class = Exo2EgoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: Exo2EgoConfig) -> None:
        super().__init__(config)
        self.model = _build(config)
        self.embed_tokens = self.model.language_model.causal_lm.get_input_embeddings()
        # ``from_pretrained`` builds without memory, so that the language model costs none.
        del self.model.language_model
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Restore the pixel statistics, which are in no file."""
        if isinstance(module, VisionEncoder):
            module.restore_buffers()

    @torch.no_grad()
    def forward(self, input_ids: Tensor, pixel_values_videos: Tensor, **ignored: Any) -> Tensor:
        """Embed one question about one clip.

        Args:
            input_ids: int64 [1, L], with the clip's placeholder.
            pixel_values_videos: uint8 [1, T, S, S, 3], RGB, as the processor returns it.
            **ignored: options of transformers without a meaning here.

        Returns:
            float [P, D].
        """
        (place,) = (input_ids[0] == VIDEO_TOKEN_ID).nonzero().flatten().tolist()
        before, after = (self.embed_tokens(ids) for ids in (input_ids[0, :place], input_ids[0, place + 1 :]))
        visual = self.model.encode(pixel_values_videos)[0].to(before.dtype)
        return torch.cat([before, visual, after])
