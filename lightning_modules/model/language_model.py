"""Causal language model, with visual tokens spliced into its input embeddings.

Letters: `B` clips, `L` text tokens, `N` visual tokens, `S` = L - 1 + N positions after splicing, `D` width,
`V` vocabulary, `M` supervised positions in the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

VIDEO_TOKEN_ID = -201
"""Stands in the text where the visual tokens go; never in the vocabulary."""

IGNORE_INDEX = -100
"""Label of positions without supervision."""


@dataclass
class LanguageModelConfig:
    """Shape of the language model: exactly one of `architecture` and `pretrained`.

    Attributes:
        architecture: model type in transformers ("mistral", "qwen3", "llama", ...).
        pretrained: folder or hub name of a causal language model; a stage also starts from its weights.
        overrides: settings of `architecture` that differ from its defaults, by their names in transformers. Without
            `vocab_size`, that of the tokenizer is taken.
    """

    architecture: str | None = None
    pretrained: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if (self.architecture is None) == (self.pretrained is None):
            problems.append(
                f"give exactly one of architecture and pretrained, got {self.architecture!r} and {self.pretrained!r}"
            )
        if self.pretrained is not None and self.overrides:
            problems.append(f"overrides ({', '.join(self.overrides)}) go with architecture, not with pretrained")
        if problems:
            raise ValueError("network.language_model: " + "; ".join(problems))


def transformers_config(config: LanguageModelConfig, vocab_size: int) -> Any:
    """Return the transformers configuration of a language model, without its weights.

    Raises:
        ValueError: the architecture is unknown to transformers, one of its overrides to the architecture, or a model
            named by `pretrained` cannot be read.
    """
    if config.pretrained is not None:
        local = Path(config.pretrained).is_dir()
        try:
            return AutoConfig.from_pretrained(config.pretrained, local_files_only=local)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"network.language_model.pretrained: {config.pretrained} cannot be read ({reason}): "
                "give a folder or hub name of a causal language model"
            ) from None
    assert config.architecture is not None
    try:
        known = {*AutoConfig.for_model(config.architecture).to_dict(), "rope_theta"}
    except ValueError:
        raise ValueError(
            f"network.language_model.architecture: {config.architecture} is no model type of transformers: give one, "
            "such as mistral"
        ) from None
    if unknown := sorted(config.overrides.keys() - known):
        raise ValueError(
            f"network.language_model.overrides: {', '.join(unknown)} unknown to {config.architecture}, "
            f"which has {', '.join(sorted(known))}"
        )
    return AutoConfig.for_model(config.architecture, **{"vocab_size": vocab_size, **config.overrides})


class Spliced(NamedTuple):
    """Input of the language model after splicing.

    Attributes:
        embeds: float [B, S, D].
        attention_mask: bool [B, S], False at padding.
        labels: int64 [B, S], -100 at visual tokens, padding and unsupervised text.
    """

    embeds: Tensor
    attention_mask: Tensor
    labels: Tensor


class LanguageModel(nn.Module):
    """Causal language model of transformers that reads text and visual tokens; its weights are drawn at random.

    Architectures whose logits are `lm_head(hidden)`, without scaling or capping, as in Llama, Mistral and Qwen.

    Args:
        config: the model to build.
        vocab_size: V, where `config` does not give it.

    Raises:
        ValueError: the architecture is unknown to transformers, or one of its overrides to the architecture.
    """

    causal_lm: Any  # a PreTrainedModel that generates; its own annotations are too incomplete to check against

    def __init__(self, config: LanguageModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.causal_lm = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            transformers_config(config, vocab_size), dtype=torch.float32
        )
        # A released model's defaults (sampling, repetition penalty) would leak into greedy decoding.
        self.causal_lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def restore_buffers(self) -> None:
        """Compute the buffers, which no checkpoint holds, after the model was built on the meta device."""
        for module in self.causal_lm.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                for name, buffer in type(module)(module.config).named_buffers(recurse=False):
                    setattr(module, name, buffer)

    def blocks(self) -> list[nn.Module]:
        """Return the decoder layers, the units of activation checkpointing and sharding."""
        return list(self.causal_lm.get_decoder().layers)

    @property
    def dim(self) -> int:
        """D, width of the input embeddings."""
        return int(self.causal_lm.config.hidden_size)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens: int64 [B, L] to float [B, L, D]."""
        embeds: Tensor = self.causal_lm.get_input_embeddings()(input_ids)
        return embeds

    def splice(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, visual: Tensor) -> Spliced:
        """Put the visual tokens of each row in the place of its `VIDEO_TOKEN_ID`.

        Args:
            input_ids: int64 [B, L], padded on either side, with at most one `VIDEO_TOKEN_ID` per row.
            attention_mask: bool [B, L], False at padding.
            labels: int64 [B, L], -100 where not supervised, or None for no supervision at all.
            visual: float [B, N, D], N >= 1.

        Returns:
            S = L - 1 + N positions. A row without placeholder takes no visual tokens and is padded on the right; its
            `visual` gets zero gradients rather than none, so that all ranks use the same parameters.

        Raises:
            ValueError: several placeholders in one row, or shapes that do not fit.
        """
        batch, length = input_ids.shape
        is_placeholder = input_ids == VIDEO_TOKEN_ID
        count = is_placeholder.sum(1)
        if visual.ndim != 3 or visual.shape[0] != batch or visual.shape[1] < 1 or visual.shape[2] != self.dim:
            raise ValueError(f"visual: got {tuple(visual.shape)}, expected ({batch}, at least 1, {self.dim})")
        if not count.is_cuda and bool((count > 1).any()):  # looking would make a GPU wait
            raise ValueError(f"input_ids: {int(count.max())} video placeholders in one row, at most 1 is allowed")
        num_visual = visual.shape[1]

        # Each output position takes one column of [text | visual | padding].
        position = torch.arange(length - 1 + num_visual, device=input_ids.device)[None]  # [1, S]
        has_video = count[:, None] == 1
        start = torch.where(has_video, is_placeholder.int().argmax(1, keepdim=True), length)  # [B, 1]
        end = start + num_visual
        column = torch.where(position < start, position, length + position - start)
        column = torch.where(position >= end, position - num_visual + 1, column)
        column = torch.where(~has_video & (position >= length), length + num_visual, column)  # [B, S]

        text = self.embed(input_ids.masked_fill(is_placeholder, 0))
        visual = visual.to(text.dtype)
        sources = torch.cat([text, visual, text.new_zeros(batch, 1, self.dim)], dim=1)
        embeds = sources.gather(1, column[..., None].expand(-1, -1, self.dim))

        def place(values: Tensor, at_visual: int, at_padding: int) -> Tensor:
            extra = values.new_full((batch, num_visual + 1), at_visual)
            extra[:, -1] = at_padding
            return torch.cat([values, extra], dim=1).gather(1, column)

        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        return Spliced(
            embeds=embeds,
            attention_mask=place(attention_mask.bool(), at_visual=True, at_padding=False),
            labels=place(labels, at_visual=IGNORE_INDEX, at_padding=IGNORE_INDEX),
        )

    def supervised_logits(self, spliced: Spliced) -> tuple[Tensor, Tensor]:
        """Return next-token logits where there is a label; the head is not applied elsewhere.

        Args:
            spliced: from `splice`, of rows padded on the right.

        Returns:
            logits float32 [M, V] and their targets int64 [M], row by row. The logits at position s predict the label
            at s + 1.

        Raises:
            ValueError: a row is padded on the left (checked on the CPU only, since a GPU would have to wait).
        """
        mask = spliced.attention_mask
        if not mask.is_cuda and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("attention_mask: a row is padded on the left, training and scoring need it on the right")
        hidden = self._hidden_states(spliced.embeds)
        targets = spliced.labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden[:, :-1][supervised])
        return logits.float(), targets[supervised]

    def answer_logits(self, prompt: Tensor, visual: Tensor, answers: Tensor) -> Tensor:
        """Return next-token logits at every token of answers to one prompt.

        Args:
            prompt: int64 [L], with a `VIDEO_TOKEN_ID`.
            visual: float [B, N, D].
            answers: int64 [B, M].

        Returns:
            float32 [B, M, V], which predict each token of the answers.
        """
        ids = torch.cat([prompt.expand(len(answers), -1), answers], dim=1)
        spliced = self.splice(ids, torch.ones_like(ids, dtype=torch.bool), None, visual)
        hidden = self._hidden_states(spliced.embeds)
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden[:, -answers.shape[1] - 1 : -1])
        return logits.float()

    def token_log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, visual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score given answers: log p of the supervised tokens, summed per row.

        Args:
            input_ids, attention_mask, labels, visual: as in `splice`.

        Returns:
            sum of log p, float32 [B], and number of supervised tokens, int64 [B].
        """
        spliced = self.splice(input_ids, attention_mask, labels, visual)
        logits, targets = self.supervised_logits(spliced)
        log_p = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        supervised = spliced.labels[:, 1:] != IGNORE_INDEX
        row = supervised.nonzero()[:, 0]
        return log_p.new_zeros(len(input_ids)).index_add(0, row, log_p), supervised.sum(1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual: Tensor,
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> list[list[int]]:
        """Continue prompts greedily.

        Args:
            input_ids, attention_mask, visual: as in `splice`.
            max_new_tokens: longest answer.
            eos_token_id: ends an answer.
            pad_token_id: fills shorter answers inside the batch.

        Returns:
            The new token ids of each row, without `eos_token_id` and what follows it.
        """
        spliced = self.splice(input_ids, attention_mask, None, visual)
        # Decoding appends at the right end, so padding has to move to the left.
        mask, order = spliced.attention_mask.int().sort(dim=1, stable=True)
        embeds = spliced.embeds.gather(1, order[..., None].expand(-1, -1, self.dim))
        longest = int(mask.sum(1).max())
        generated: Tensor = self.causal_lm.generate(
            inputs_embeds=embeds[:, -longest:],
            attention_mask=mask[:, -longest:],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        return [_until(eos_token_id, row) for row in generated.tolist()]

    def _hidden_states(self, embeds: Tensor) -> Tensor:
        """Return the final hidden states, float [B, S, D], of rows that are padded on the right, if at all.

        No padding mask is passed: what follows a token cannot reach it through causal attention, and without a mask
        PyTorch chooses its flash kernel.
        """
        outputs = self.causal_lm.get_decoder()(inputs_embeds=embeds, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden


def _until(stop: int, tokens: Sequence[int]) -> list[int]:
    return list(tokens[: tokens.index(stop)] if stop in tokens else tokens)
