"""Puts exams to a model. One clip at a time, so that no answer depends on which clips a process was given beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import Exam, Letters, Rank, Request, Row
from lightning_modules.model.language_model import LanguageModel
from lightning_modules.model.prefix_cache import SharedPrefix

DIGITS = 6
"""Decimals of a log-probability that are kept; every metric is computed from these."""


@torch.no_grad()
def examine(
    language_model: LanguageModel, tokenizer: PreTrainedTokenizerBase, exam: Exam, visual: Tensor | None
) -> list[dict[str, Any]]:
    """Answer what is asked about one clip.

    Args:
        language_model: reads clip and questions.
        tokenizer: writes answers as text.
        exam: the questions.
        visual: float [N, D], the clip's tokens; None without a clip.

    Returns:
        For each request a JSON object with ``id`` and ``clip``, and a field for each thing asked: ``Letters`` give
        log-probabilities, float [rotations][K]; ``Rank`` mean log-likelihoods, float [answers]; ``Say`` a text. If the
        clip could not be read, ``problem`` stands in their place.
    """
    if exam.problem:
        return [{"id": request.item, "clip": request.clip, "problem": exam.problem} for request in exam.requests]
    return _Sitting(language_model, tokenizer, exam.lead, visual).answers(exam.requests)


class _Sitting:
    def __init__(
        self,
        language_model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        lead: Row,
        visual: Tensor | None,
    ) -> None:
        self.language_model, self.tokenizer, self.lead = language_model, tokenizer, lead
        before = self._embed(lead)
        seen = None if visual is None else torch.cat([before, visual.to(before.dtype)])
        self.seeing = None if seen is None else SharedPrefix(language_model, seen)

    def answers(self, requests: list[Request]) -> list[dict[str, Any]]:
        return [
            {
                "id": request.item,
                "clip": request.clip,
                **{name: self._answer(ask) for name, ask in request.asks.items()},
            }
            for request in requests
        ]

    def _answer(self, ask: Any) -> Any:
        match ask:
            case Letters():
                assert self.seeing is not None
                logits = self.seeing.next_logits(ask.contexts)
                chosen = [logits[n, list(letters)].log_softmax(-1) for n, letters in enumerate(ask.letters)]
                return [_rounded(log_p) for log_p in chosen]
            case Rank(context=context, answers=answers, blind=True):
                return self._ranked(SharedPrefix(self.language_model, self._embed(self.lead + context)), answers)
            case Rank():
                assert self.seeing is not None
                with self.seeing.extended(ask.context) as prefix:
                    return self._ranked(prefix, ask.answers)
            case _:
                assert self.seeing is not None
                with self.seeing.extended(ask.context) as prefix:
                    tokens = prefix.greedy(ask.max_new_tokens, int(self.tokenizer.eos_token_id))
                return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @staticmethod
    def _ranked(prefix: SharedPrefix, answers: tuple[Row, ...]) -> list[float]:
        lengths = torch.tensor([len(answer) for answer in answers], device=prefix.last.device)
        return _rounded(prefix.log_likelihoods(answers) / lengths)

    def _embed(self, ids: Row) -> Tensor:
        device = self.language_model.causal_lm.get_input_embeddings().weight.device
        return self.language_model.embed(torch.tensor(ids, dtype=torch.int64, device=device))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.double().tolist()]
