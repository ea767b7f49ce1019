"""Stage 2 with another guidance term: KL between the answers of the demonstrator and of the learner.

An example of a new loss in a file of its own: it replaces one term of ``DemonstratorLearnerGuidance``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.losses import answer_kl_loss
from lightning_modules.stages.guidance import DemonstratorLearnerGuidance, GuidanceFeatures


class AnswerGuidance(DemonstratorLearnerGuidance):
    """Demonstrator-Learner Guidance with the KL on next-token distributions instead of features; not of the paper.

    The demonstrator answers the common prompt of the data greedily from y. The KL compares the language model's
    distributions along this caption when it reads y with those when it reads x and F(x). This needs neither aligned
    frames nor text.

    The projector trains on x and F(x), so that y means less and less to it. ``init.exo_projector`` names the projector
    of stage 1; y then passes through that one. ``kl.weight``, ``kl.tau`` and ``kl.warmup_fraction`` apply to this
    KL; the other settings of ``kl`` to the KL of features, which is only logged.

    Args:
        answer_tokens: longest caption.
        **guidance: arguments of ``DemonstratorLearnerGuidance``.
    """

    projects_exo = True

    def __init__(self, answer_tokens: int = 16, **guidance: Any) -> None:
        super().__init__(**guidance)
        self.answer_tokens = answer_tokens

    def kl_loss(self, features: GuidanceFeatures, batch: ClipBatch, feature_kl: Tensor) -> Tensor:
        """Return the KL of answers, averaged over the tokens of each caption and over clips.

        Raises:
            ValueError: the samples of the data have different prompts.
        """
        if batch.prompt is None:
            raise ValueError(
                "model.class_path: AnswerGuidance needs data with one common prompt, and these have none: use "
                "DemonstratorLearnerGuidance"
            )
        language_model = self.model.language_model
        with torch.no_grad():
            exo_tokens = self.model.project_exo(features.exo)
            answers, counts = self.caption(batch.prompt, exo_tokens)
            target = language_model.answer_logits(batch.prompt, exo_tokens, answers)
        logits = language_model.answer_logits(batch.prompt, features.visual, answers)
        kl = answer_kl_loss(target, logits, counts & batch.valid[:, None], self.kl.tau)
        self.step_log["guidance/kl_answers"] = kl.detach()
        return kl

    def caption(self, prompt: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a prompt greedily, with the same number of forward passes on all ranks.

        Args:
            prompt: int64 [L].
            visual: float [B, N, D].

        Returns:
            Tokens int64 [B, ``answer_tokens``], and bool of the same shape, true up to the end of each answer.
        """
        language_model = self.model.language_model
        prompts = prompt.expand(len(visual), -1)
        mask = torch.ones_like(prompts, dtype=torch.bool)
        no_token = int(language_model.causal_lm.config.vocab_size)  # generation never stops early
        tokens = language_model.generate(
            prompts, mask, visual, self.answer_tokens, eos_token_id=no_token, pad_token_id=0
        )
        answers = torch.tensor(tokens, device=prompt.device)
        ended = answers == int(self.tokenizer.eos_token_id)
        return answers, ended.cumsum(1) - ended.long() == 0
