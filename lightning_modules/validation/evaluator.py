"""Answer validation questions about clips: free answers greedily, choices by the likelihood of their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import Question, QuestionBatch, TextBatch
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.validation.consistency import Comparison, compare
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
    def encode(self, batch: QuestionBatch) -> dict[str, Tensor]:
        """Return the visual tokens of every view, float [B, N, D]; call it inside ``Exo2EgoModel.run``."""
        videos = {"ego": batch.ego_video, "exo": batch.exo_video}
        wanted = ((view, videos[view]) for view in self.views)
        return {view: self.model.encode(video, view) for view, video in wanted if video is not None}

    @torch.no_grad()
    def answer(self, batch: QuestionBatch, visual: Mapping[str, Tensor]) -> list[Prediction]:
        """Answer all questions of a batch about every view; call it inside ``Exo2EgoModel.run``.

        Args:
            batch: the questions.
            visual: see ``encode``.

        Returns:
            Views one after another, each with the questions in their order.
        """
        predictions: list[Prediction] = []
        for view, tokens in visual.items():
            predictions += self._predict(batch, tokens, view)
        return predictions

    @torch.no_grad()
    def compare(
        self, batch: QuestionBatch, visual: Mapping[str, Tensor], predictions: Sequence[Prediction]
    ) -> list[Comparison]:
        """Answer the questions from each visual input alone, too; call it inside ``Exo2EgoModel.run``.

        Args:
            batch: the questions.
            visual: see ``encode``.
            predictions: see ``answer``.

        Returns:
            A comparison for each question but captions; none if the model has no learner, or reads one input in all.
        """
        if "ego_encoder" not in self.model.parts or "ego" not in visual:
            return []
        given: dict[str, list[Prediction]] = {}
        if "exo_encoder" in self.model.parts and batch.exo_video is not None:
            given["y"] = self._predict(batch, self.model.encode(batch.exo_video, "exo"), "exo", captions=False)
        names = [{"ego": "x", "mapped": "mapped"}[name] for name in self.model.visual_inputs]
        if len(names) > 1:
            for name, tokens in zip(names, visual["ego"].chunk(len(names), dim=1), strict=True):
                given[name] = self._predict(batch, tokens, "ego", captions=False)
        whole = "both" if len(names) > 1 else names[0]
        given[whole] = [p for p in predictions if p.view == "ego" and p.task != "caption"]
        return compare(given) if len(given) > 1 else []

    def _predict(self, batch: QuestionBatch, visual: Tensor, view: str, captions: bool = True) -> list[Prediction]:
        """Answer the questions of a batch, with or without captions, from visual tokens, float [B, N, D]."""
        asked = [question for question in batch.questions if captions or question.task != "caption"]
        prompts, clips = batch.prompts, batch.prompt_clip
        if len(asked) < len(batch.questions):
            prompts, clips = _without_captions(batch)
        texts = iter(self.generate(prompts, visual[clips]))
        scores = iter(self.score(batch.options, visual[batch.option_clip]))
        predictions: list[Prediction] = []
        for question in asked:
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


def _without_captions(batch: QuestionBatch) -> tuple[TextBatch, Tensor]:
    """Return the prompts of the open questions that ask for no caption, and the row of the clip of each."""
    open_ended: list[Question] = [question for question in batch.questions if not question.options]
    kept = [row for row, question in enumerate(open_ended) if question.task != "caption"]
    rows = torch.tensor(kept, dtype=torch.int64, device=batch.prompt_clip.device)
    prompts = batch.prompts
    texts = (prompts.input_ids[rows], prompts.attention_mask[rows], prompts.labels[rows])
    return TextBatch(*texts), batch.prompt_clip[rows]
