"""Causal language model, with visual tokens spliced into its input embeddings.

Letters: `B` clips, `L` text tokens, `N` visual tokens, `S` = L - 1 + N positions after splicing, `D` width,
`V` vocabulary, `M` supervised positions in the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, masking_utils

VIDEO_TOKEN_ID = -201
"""Stands in the text where the visual tokens go; never in the vocabulary."""

IGNORE_INDEX = -100
"""Label of positions without supervision."""

ARCHITECTURES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Supported model types of transformers. The tests compare logits, weights and generation of each with transformers."""

_LEARNED_POSITIONS = ("gpt2", "opt")
"""Model types with an embedding for each position, and none beyond."""


@dataclass
class LanguageModelConfig:
    """Shape of the language model: exactly one of `architecture` and `pretrained`.

    Attributes:
        architecture: model type in transformers, one of `ARCHITECTURES` ("mistral", "qwen3", "llama", ...).
        pretrained: folder or hub name of a causal language model; a stage also starts from its weights.
        overrides: settings of `architecture` that differ from its defaults, by their names in transformers. Without
            `vocab_size`, that of the tokenizer is taken.
        attn_implementation: attention of transformers, such as "sdpa" or "eager"; None: its own choice.
    """

    architecture: str | None = None
    pretrained: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        """Refuse contradicting keys."""
        problems = []
        if (self.architecture is None) == (self.pretrained is None):
            problems.append(
                f"give exactly one of architecture and pretrained, got {self.architecture!r} and {self.pretrained!r}"
            )
        if self.pretrained is not None and self.overrides:
            names = ", ".join(self.overrides)
            problems.append(f"overrides ({names}) go with architecture, not with pretrained: remove one of the two")
        if problems:
            raise ValueError("network.language_model: " + "; ".join(problems))


def transformers_config(config: LanguageModelConfig, vocab_size: int) -> Any:
    """Return the transformers configuration of a language model, without its weights.

    Raises:
        ValueError: the architecture is not supported or does not know one of its overrides, or a model named by
            `pretrained` cannot be read.
    """
    if config.pretrained is not None:
        key, found = "pretrained", _released_config(config.pretrained)
    else:
        key, found = "architecture", _config_from_scratch(config, vocab_size)
    if found.model_type not in ARCHITECTURES:
        raise ValueError(
            f"network.language_model.{key}: {config.pretrained or config.architecture}: model type {found.model_type} "
            f"is not supported, as its logits were not compared with those of transformers: use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return found


def _released_config(pretrained: str) -> Any:
    local = Path(pretrained).is_dir()
    try:
        return AutoConfig.from_pretrained(pretrained, local_files_only=local)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"network.language_model.pretrained: {pretrained} cannot be read ({reason}): "
            "give a folder or hub name of a causal language model"
        ) from None


def _config_from_scratch(config: LanguageModelConfig, vocab_size: int) -> Any:
    architecture = str(config.architecture)
    try:
        default = AutoConfig.for_model(architecture)
    except ValueError:
        raise ValueError(
            f"network.language_model.architecture: {architecture} is no model type of transformers: give one, "
            "such as mistral"
        ) from None
    if default.model_type not in ARCHITECTURES:
        return default
    known = {*default.to_dict(), "rope_theta"}
    if unknown := sorted(config.overrides.keys() - known):
        similar = sorted({close for name in unknown for close in get_close_matches(name, known)})
        hint = f" (similar: {', '.join(similar)})" if similar else ""
        raise ValueError(
            f"network.language_model.overrides: {', '.join(unknown)} unknown to {architecture}"
            f"{hint}: remove with "
            f"{' '.join(f'~network.language_model.overrides.{name}' for name in unknown)}, or replace all of them with "
            "network.language_model.overrides='{_delete_: true, ...}'"
        )
    settings = {"vocab_size": vocab_size, **config.overrides}
    # The default padding token belongs to the released vocabulary and may lie outside of a smaller one.
    padding = default.pad_token_id
    if padding is not None and padding >= settings["vocab_size"]:
        settings.setdefault("pad_token_id", None)
    return AutoConfig.for_model(architecture, **settings)


class Spliced(NamedTuple):
    """Input of the language model after splicing.

    Attributes:
        embeds: float [B, S, D].
        attention_mask: bool [B, S], False at padding.
        labels: int64 [B, S], -100 at visual tokens, padding and unsupervised text.
        supervised: int64 [M], places of the supervised tokens among the B * S.
    """

    embeds: Tensor
    attention_mask: Tensor
    labels: Tensor
    supervised: Tensor


class LanguageModel(nn.Module):
    """Causal language model of transformers that reads text and visual tokens; its weights are drawn at random.

    Its head computes in float32 whatever the precision, since logits of bfloat16 have eight bits: up to a tenth of all
    choices would be ties. Training, scoring and generation all use this head, see `logits`.

    Args:
        config: the model to build.
        vocab_size: V, where `config` does not give it.

    Raises:
        ValueError: the architecture is not supported, or does not know one of its overrides or the kind of attention.
    """

    causal_lm: Any  # a PreTrainedModel that generates; its own annotations are too incomplete to check against

    def __init__(self, config: LanguageModelConfig, vocab_size: int) -> None:
        super().__init__()
        settings = transformers_config(config, vocab_size)
        try:
            self.causal_lm = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, dtype=torch.float32, attn_implementation=config.attn_implementation
            )
        except (ImportError, ValueError) as error:
            if config.attn_implementation is None:
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"network.language_model.attn_implementation: {config.attn_implementation} is not possible with "
                f"{settings.model_type} ({reason}): use sdpa, eager, or null for the choice of transformers"
            ) from None
        # A released model's defaults (sampling, repetition penalty) would leak into greedy decoding.
        self.causal_lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        head = self.causal_lm.get_output_embeddings()
        head.forward = MethodType(_float32_head, head)

    def restore_buffers(self) -> None:
        """Compute the buffers, which no checkpoint holds, after the model was built on the meta device.

        Raises:
            ValueError: a module has buffers of an unknown kind.
        """
        for name, module in list(self.causal_lm.named_modules()):
            if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                continue
            if hasattr(module, "scalar_embed_scale"):  # Gemma's embeddings
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
            elif type(module).__name__.endswith("RotaryEmbedding"):
                self.causal_lm.set_submodule(name, type(module)(module.config))
            else:
                raise ValueError(
                    f"network.language_model: {self.causal_lm.config.model_type} has buffers in {name} that are in no "
                    "weights file and cannot be computed: use another architecture"
                )

    def blocks(self) -> list[nn.Module]:
        """Return the decoder layers, the units of activation checkpointing and sharding."""
        decoder = self.causal_lm.get_decoder()
        return list(decoder.h if self.causal_lm.config.model_type == "gpt2" else decoder.layers)

    @property
    def dim(self) -> int:
        """D, width of the input embeddings."""
        return int(self.causal_lm.get_input_embeddings().embedding_dim)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits, with the architecture's own scaling or capping, as `causal_lm` computes them.

        Args:
            hidden: final hidden states, float [..., D].

        Returns:
            float32 [..., V], also under autocast and for weights in bfloat16.
        """
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        config = self.causal_lm.config
        match config.model_type:
            case "granite":
                logits = logits / config.logits_scaling
            case "cohere":
                logits = logits * config.logit_scale
            case "gemma2" | "gemma3_text" if config.final_logit_softcapping is not None:
                logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def check_positions(self, total: int, cached: int = 0) -> None:
        """Refuse texts for which the position embeddings do not exist or change in the middle.

        Args:
            total: positions of the text, visual tokens included.
            cached: positions whose keys were computed before the rest was known.

        Raises:
            ValueError: the text is too long.
        """
        config = self.causal_lm.config
        limit = int(config.max_position_embeddings)
        problem = None
        if config.model_type in _LEARNED_POSITIONS and total > limit:
            problem = f"{config.model_type} has embeddings for {limit}"
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [each for each in rope.values() if isinstance(each, dict)]  # one for each type of layer
        for each in nested or [rope]:
            kind = each.get("rope_type")
            if kind == "dynamic" and total > limit:
                problem = f"rope type dynamic changes with the length beyond {limit}"
            elif kind == "longrope":
                switch = int(each["original_max_position_embeddings"])
                if 0 < cached <= switch < total:
                    problem = f"rope type longrope changes beyond {switch}, after keys of {cached} were computed"
        if problem is not None:
            raise ValueError(
                f"network.language_model: {total} positions, but {problem}: lower clips.num_frames, shorten the text, "
                "or use a model with other position embeddings"
            )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens: int64 [B, L] to float [B, L, D]."""
        embeds: Tensor = self.causal_lm.get_input_embeddings()(input_ids)
        return embeds

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        visual: Tensor,
        supervised: Tensor | None = None,
    ) -> Spliced:
        """Put the visual tokens of each row in the place of its `VIDEO_TOKEN_ID`.

        Args:
            input_ids: int64 [B, L], padded on either side, with at most one `VIDEO_TOKEN_ID` per row.
            attention_mask: bool [B, L], False at padding.
            labels: int64 [B, L], -100 where not supervised, or None for no supervision at all.
            visual: float [B, N, D], N >= 1.
            supervised: int64 [M], places of the supervised tokens among the B * L, see `TextBatch`. Without them they
                are looked up in `labels`, for which a GPU has to wait.

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
        if _at_hand(count) and bool((count > 1).any()):
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
            supervised = input_ids.new_empty(0)
        spliced_labels = place(labels, at_visual=IGNORE_INDEX, at_padding=IGNORE_INDEX)
        if supervised is not None:
            row, place_in_row = supervised // length, supervised % length
            moved = torch.where(place_in_row > start[row, 0], place_in_row + num_visual - 1, place_in_row)
            supervised = row * position.shape[1] + moved
        else:
            marked = spliced_labels != IGNORE_INDEX
            marked[:, :1] = False  # nothing predicts the first token
            supervised = marked.flatten().nonzero().flatten()
        return Spliced(
            embeds=embeds,
            attention_mask=place(attention_mask.bool(), at_visual=True, at_padding=False),
            labels=spliced_labels,
            supervised=supervised,
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
        if _at_hand(mask) and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("attention_mask: a row is padded on the left, training and scoring need it on the right")
        hidden = self._hidden_states(spliced.embeds)
        before = hidden.flatten(0, 1).index_select(0, spliced.supervised - 1)
        return self.logits(before), spliced.labels.flatten().index_select(0, spliced.supervised)

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
        row = spliced.supervised // spliced.labels.shape[1]
        counts = (spliced.labels[:, 1:] != IGNORE_INDEX).sum(1)
        return log_p.new_zeros(len(input_ids)).index_add(0, row, log_p), counts

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
        """Continue prompts greedily; where the model is sharded, its parameters have to be gathered before.

        Args:
            input_ids, attention_mask, visual: as in `splice`.
            max_new_tokens: longest answer.
            eos_token_id: ends an answer.
            pad_token_id: fills shorter answers inside the batch.

        Returns:
            The new token ids of each row, without `eos_token_id` and what follows it.
        """
        spliced = self.splice(input_ids, attention_mask, None, visual)
        embeds, mask = self.pad_left(spliced)
        # The last new token is not read again.
        self.check_positions(embeds.shape[1] + max_new_tokens - 1, cached=int(mask.sum(1).min()))
        generated: Tensor = self.causal_lm.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            synced_gpus=False,  # parameters are whole, and other ranks may have nothing to generate
        )
        return [_until(eos_token_id, row) for row in generated.tolist()]

    def pad_left(self, spliced: Spliced) -> tuple[Tensor, Tensor]:
        """Move padding to the left, since decoding appends at the right end.

        Returns:
            embeddings, float [B, P, D], and attention mask, int [B, P], with P positions of the longest row.
        """
        mask, order = spliced.attention_mask.int().sort(dim=1, stable=True)
        embeds = spliced.embeds.gather(1, order[..., None].expand(-1, -1, self.dim))
        longest = int(mask.sum(1).max())
        return embeds[:, -longest:], mask[:, -longest:]

    def _hidden_states(self, embeds: Tensor) -> Tensor:
        """Return the final hidden states, float [B, S, D], of rows that are padded on the right, if at all.

        No padding mask is passed: what follows a token cannot reach it through causal attention, and without a mask
        PyTorch chooses its flash kernel.
        """
        self.check_positions(embeds.shape[1])
        with _rows_not_packed():
            outputs = self.causal_lm.get_decoder()(inputs_embeds=embeds, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden


class _Float32Linear(torch.autograd.Function):
    """Linear map in float32 of weights in another type, of which no float32 copy is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """Map float [..., D] by float [V, D] to float32 [..., V]."""
        ctx.save_for_backward(hidden, weight)
        return F.linear(hidden.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the hidden states and of the weight, in their types."""
        (gradient,) = gradients
        hidden, weight = ctx.saved_tensors
        of_hidden = of_weight = None
        with _without_autocast(gradient):
            if ctx.needs_input_grad[0]:
                of_hidden = (gradient @ weight.float()).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = (gradient.flatten(0, -2).T @ hidden.flatten(0, -2).float()).to(weight.dtype)
        return of_hidden, of_weight


def _float32_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Compute the head, which has no bias in any supported architecture, in float32."""
    with _without_autocast(hidden):
        if head.weight.dtype == torch.float32:
            return F.linear(hidden.float(), head.weight)
        logits: Tensor = _Float32Linear.apply(hidden, head.weight)  # type: ignore[no-untyped-call]
        return logits


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _at_hand(tensor: Tensor) -> bool:
    """True if the values can be read at once; a GPU would have to wait, and other tensors have none."""
    return tensor.is_cpu and type(tensor) is Tensor


@contextmanager
def _rows_not_packed() -> Iterator[None]:
    """Keep transformers from looking for several texts in one row, for which it reads positions back from a GPU."""
    looked_up = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looked_up


def _until(stop: int, tokens: Sequence[int]) -> list[int]:
    return list(tokens[: tokens.index(stop)] if stop in tokens else tokens)
