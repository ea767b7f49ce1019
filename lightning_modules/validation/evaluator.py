"""Answer validation questions about clips: free answers greedily, choices by the likelihood of their options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import QuestionBatch, TextBatch
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.validation.scores import Prediction, score_choice, score_text

MAX_ANSWER_TOKENS = 32


class QAEvaluator:
    """Answers the questions of batches and scores the answers.

    Args:
        model: encodes clips and answers.
        tokenizer: turns answers into text.
        views: views that every question is asked about, as far as the batch has them.
    """

    def __init__(self, model: Exo2EgoModel, tokenizer: PreTrainedTokenizerBase, views: Sequence[str]) -> None:
        self.model, self.tokenizer, self.views = model, tokenizer, views

    @torch.no_grad()
    def answer(self, batch: QuestionBatch) -> list[Prediction]:
        """Answer all questions of a batch about every view; call it inside ``Exo2EgoModel.run``.

        Returns:
            Views one after another, each with the questions in their order.
        """
        predictions: list[Prediction] = []
        for view in self.views:
            video = batch.ego_video if view == "ego" else batch.exo_video
            if video is None:
                continue
            visual = self.model.encode(video, view)
            texts = iter(self.generate(batch.prompts, visual[batch.prompt_clip]))
            scores = iter(self.score(batch.options, visual[batch.option_clip]))
            for question in batch.questions:
                row = question.clip
                clip = {"clip": batch.ids[row], "ego_visible": batch.ego_visible[row], "view": view}
                if question.options:
                    log_p = [next(scores) for _ in question.options]
                    predictions.append(score_choice(question, log_p, **clip))
                else:
                    predictions.append(score_text(question, next(texts), **clip))
        return predictions

    def generate(self, prompts: TextBatch, visual: Tensor) -> list[str]:
        """Answer R prompts greedily.

        Args:
            prompts: R rows that end where the answer begins.
            visual: float [R, N, D], the clip of each row.
        """
        if not len(prompts.input_ids):
            return []
        eos = int(self.tokenizer.eos_token_id)
        ids = self.model.language_model.generate(
            prompts.input_ids, prompts.attention_mask, visual, MAX_ANSWER_TOKENS, eos, eos
        )
        return [str(text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def score(self, options: TextBatch, visual: Tensor) -> list[tuple[float, int]]:
        """Return log-likelihood in nats and number of tokens of R given answers.

        Args:
            options: R rows with labels on the answer.
            visual: float [R, N, D], the clip of each row.
        """
        if not len(options.input_ids):
            return []
        log_p, count = self.model.language_model.token_log_likelihood(
            options.input_ids, options.attention_mask, options.labels, visual
        )
        return list(zip(log_p.tolist(), count.tolist(), strict=True))
