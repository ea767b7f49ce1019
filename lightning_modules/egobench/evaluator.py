"""Run the requests of a benchmark through a model.

Clips are evaluated one at a time, so that no result depends on which clips share a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import (
    VIDEO_TOKEN_ID,
    BenchmarkBatch,
    GenerateUntilRequest,
    LoglikelihoodRequest,
    MultipleChoiceRequest,
    Request,
    TokenIds,
)
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.model.language_model import LanguageModel
from lightning_modules.model.prefix_cache import SharedPrefix

DIGITS = 6
"""Decimals of a log-probability in predictions files; every metric is computed from the rounded values."""


@torch.no_grad()
def evaluate_clip(
    model: Exo2EgoModel, tokenizer: PreTrainedTokenizerBase, batch: BenchmarkBatch
) -> list[dict[str, Any]]:
    """Encode the clips of a batch, if it has any, and run all requests about them, see ``Evaluator``.

    An exocentric clip goes through the exocentric encoder where the model has one, else through the egocentric one.
    """
    visual = []
    if batch.video is not None:
        for clip, view in zip(batch.video, batch.views, strict=True):
            encoder = view if f"{view}_encoder" in model.parts else "ego"
            visual.append(model.encode(clip[None], encoder)[0])
    return Evaluator(model.language_model, tokenizer).evaluate(batch, visual)


class Evaluator:
    """Compute the results of benchmark requests with a language model.

    Args:
        language_model: reads the clips' visual tokens and the requests.
        tokenizer: decodes generated answers.
    """

    def __init__(self, language_model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.language_model, self.tokenizer = language_model, tokenizer

    @torch.no_grad()
    def evaluate(self, batch: BenchmarkBatch, visual: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Run all requests about one clip, or about several that are read one after the other.

        Args:
            batch: the instances.
            visual: float [N, D], the visual tokens of each clip; empty without a clip.

        Returns:
            For each instance a JSON object with ``id``, ``clip`` and a field for each request: log-probabilities, float
            [contexts][choices], of a ``MultipleChoiceRequest``; mean log-likelihoods, float [continuations], of a
            ``LoglikelihoodRequest``; the text of a ``GenerateUntilRequest``. If the clip could not be decoded, the only
            other field is ``problem``.
        """
        if batch.error:
            return [{"id": each.sample_id, "clip": each.clip, "problem": batch.error} for each in batch.instances]
        # The clips are read once, and their key-value cache is shared by all requests.
        clip = SharedPrefix(self.language_model, self._embed_clips(batch.prefix, visual)) if visual else None
        answers = iter(self._generate(batch, clip))
        results = []
        for instance in batch.instances:
            result: dict[str, Any] = {"id": instance.sample_id, "clip": instance.clip}
            for name, request in instance.requests.items():
                is_generated = isinstance(request, GenerateUntilRequest)
                result[name] = next(answers) if is_generated else self._run(request, batch.prefix, clip)
            results.append(result)
        return results

    def _generate(self, batch: BenchmarkBatch, clip: SharedPrefix | None) -> list[str]:
        """Return the text of every ``GenerateUntilRequest`` about a clip, all decoded together."""
        each = [request for instance in batch.instances for request in instance.requests.values()]
        requests = [request for request in each if isinstance(request, GenerateUntilRequest)]
        if not requests:
            return []
        tokens: dict[int, list[int]] = {}
        for limit in {request.max_new_tokens for request in requests}:
            numbers = [n for n, request in enumerate(requests) if request.max_new_tokens == limit]
            rows = [requests[n].context for n in numbers]
            answers = _given(clip).greedy_each(rows, limit, int(self.tokenizer.eos_token_id))
            tokens |= zip(numbers, answers, strict=True)
        ordered = [tokens[n] for n in range(len(requests))]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ordered]

    def _run(self, request: Request, prefix: TokenIds, clip: SharedPrefix | None) -> Any:
        if isinstance(request, LoglikelihoodRequest) and request.without_video:
            text = SharedPrefix(self.language_model, self._embed(prefix + request.context))
            return self._mean_log_likelihoods(text, request.continuations)
        clip = _given(clip)
        match request:
            case MultipleChoiceRequest():
                logits = clip.next_logits(request.contexts)
                rows = enumerate(request.choices)
                return [_rounded(logits[row, list(choices)].log_softmax(-1)) for row, choices in rows]
            case LoglikelihoodRequest():
                with clip.extended(request.context) as context:
                    return self._mean_log_likelihoods(context, request.continuations)

    @staticmethod
    def _mean_log_likelihoods(context: SharedPrefix, continuations: tuple[TokenIds, ...]) -> list[float]:
        lengths = torch.tensor([len(tokens) for tokens in continuations], device=context.last.device)
        return _rounded(context.log_likelihoods(continuations) / lengths)

    def _embed_clips(self, prefix: TokenIds, visual: Sequence[Tensor]) -> Tensor:
        """Return the text before each clip and the visual tokens of the clip, one after the other: float [P, D]."""
        parts, rest = [], list(prefix)
        for tokens in visual:
            end = rest.index(VIDEO_TOKEN_ID) if VIDEO_TOKEN_ID in rest else len(rest)
            before = self._embed(tuple(rest[:end]))
            parts += [before, tokens.to(before.dtype)]
            rest = rest[end + 1 :]
        return torch.cat(parts)

    def _embed(self, ids: TokenIds) -> Tensor:
        device = self.language_model.causal_lm.get_input_embeddings().weight.device
        return self.language_model.embed(torch.tensor(ids, dtype=torch.int64, device=device))


def _given(clip: SharedPrefix | None) -> SharedPrefix:
    if clip is None:
        raise ValueError("the batch has no clip, but a request needs one: decode the clip, or ask without_video")
    return clip


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.double().tolist()]
