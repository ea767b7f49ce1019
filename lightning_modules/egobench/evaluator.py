"""Run the requests of a benchmark through a model.

Clips are evaluated one at a time, so that no result depends on which clips share a process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import (
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
    """Encode the egocentric clip of a batch, if it has one, and run all requests about it, see ``Evaluator``."""
    visual = None if batch.video is None else model.encode(batch.video)[0]
    return Evaluator(model.language_model, tokenizer).evaluate(batch, visual)


class Evaluator:
    """Compute the results of benchmark requests with a language model.

    Args:
        language_model: reads the clip's visual tokens and the requests.
        tokenizer: decodes generated answers.
    """

    def __init__(self, language_model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.language_model, self.tokenizer = language_model, tokenizer

    @torch.no_grad()
    def evaluate(self, batch: BenchmarkBatch, visual: Tensor | None) -> list[dict[str, Any]]:
        """Run all requests about one clip.

        Args:
            batch: the instances.
            visual: float [N, D], the clip's visual tokens; None without a clip.

        Returns:
            For each instance a JSON object with ``id``, ``clip`` and a field for each request: log-probabilities, float
            [contexts][choices], of a ``MultipleChoiceRequest``; mean log-likelihoods, float [continuations], of a
            ``LoglikelihoodRequest``; the text of a ``GenerateUntilRequest``. If the clip could not be decoded, the only
            other field is ``problem``.
        """
        if batch.error:
            return [{"id": each.sample_id, "clip": each.clip, "problem": batch.error} for each in batch.instances]
        # The clip is read once, and its key-value cache is shared by all requests.
        clip = None
        if visual is not None:
            before = self._embed(batch.prefix)
            clip = SharedPrefix(self.language_model, torch.cat([before, visual.to(before.dtype)]))
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

    def _embed(self, ids: TokenIds) -> Tensor:
        device = self.language_model.causal_lm.get_input_embeddings().weight.device
        return self.language_model.embed(torch.tensor(ids, dtype=torch.int64, device=device))


def _given(clip: SharedPrefix | None) -> SharedPrefix:
    if clip is None:
        raise ValueError("the batch has no clip, but a request needs one: decode the clip, or ask without_video")
    return clip


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.double().tolist()]
