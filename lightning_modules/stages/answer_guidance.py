"""Stage 2 with another guidance term: KL between what the demonstrator and the learner would say.

An example of a new loss in a file of its own: it replaces one term of ``DemonstratorLearnerGuidance``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from datamodules.batch import IGNORE_INDEX, ClipBatch, TextBatch
from lightning_modules.losses import Knowledge, NextTokens, answer_kl_loss, vtg_loss
from lightning_modules.stages.guidance import DemonstratorLearnerGuidance, clip_of_tokens, mapping_change
from lightning_modules.strategy import gathered


class AnswerGuidance(DemonstratorLearnerGuidance):
    """Demonstrator-Learner Guidance with the KL on next-token distributions instead of features; not of the paper.

    The KL compares the language model's distributions when it reads y with those when it reads x and F(x): along the
    narration, or along the caption that the demonstrator gives greedily where a pair has no narration. The learner
    reads narration or caption once, for video-text generation and KL alike. The KL needs neither aligned frames nor,
    thanks to the captions, text. Where batches hold the other exocentric cameras of a pair (``data.exo_policy: mean``),
    the demonstrator's distributions are the mean over all of them.

    The projector trains on x and F(x), so that y means less and less to it. ``init.exo_projector`` names the projector
    of stage 1; y then passes through that one. ``kl.weight``, ``kl.tau``, ``kl.warmup_fraction`` and ``selection``
    apply to this KL; the settings of ``kl`` other than its weight to the KL of features, which is only logged unless
    it has a weight of its own: answers teach what to say about x and F(x), and features teach F to map.

    Args:
        feature_weight: of the KL of features, in addition to that of answers.
        answer_tokens: longest caption.
        demonstrations: folder of the demonstrator's answers, computed once by ``make demonstrate``, from which batches
            take them. The demonstrator then does not run: neither its projector and its pass through the language
            model, nor, unless y is needed for another loss, the exocentric encoder and the decoding of its video.
            None computes the answers in every step.
        top_k: the likeliest tokens whose probabilities are stored in the place of each token; all others count as one.
        **guidance: arguments of ``DemonstratorLearnerGuidance``.

    Raises:
        ValueError: with ``demonstrations``, y would pass through a projector that trains; or ``kl.detach_input``
            without ``feature_weight``.
    """

    projects_exo = True

    def __init__(
        self,
        feature_weight: float = 0.0,
        answer_tokens: int = 16,
        demonstrations: str | None = None,
        top_k: int = 64,
        **guidance: Any,
    ) -> None:
        super().__init__(**guidance)
        for key, number in (("answer_tokens", answer_tokens), ("top_k", top_k)):
            if number < 1:
                raise ValueError(f"model.{key}: got {number}, allowed: 1 or more")
        if self.kl.detach_input and not feature_weight:
            raise ValueError(
                "model.kl.detach_input: the KL of answers and video-text generation are read from one pass on x and "
                "F(x), so that both train the ego encoder: set it to false, or model.feature_weight above 0"
            )
        self.feature_weight = feature_weight
        self.answer_tokens, self.demonstrations, self.top_k = answer_tokens, demonstrations, top_k
        if demonstrations is not None:
            self._leave_demonstrator_out()

    def _leave_demonstrator_out(self) -> None:
        """Build no part that stored answers replace."""
        if "exo_projector" not in self.uses:
            raise ValueError(
                "model.demonstrations: y passes through the projector that trains on x and F(x), so that its answers "
                "change: set model.init.exo_projector to the projector of stage 1, or demonstrations to null"
            )
        reads_exo = self.feature_weight or self.contrastive.weight or (self.cycle.weight and self.cycle.backward)
        replaced = {"exo_projector"} if reads_exo else {"exo_projector", "exo_encoder"}
        self.uses = tuple(part for part in self.uses if part not in replaced)
        self.init = {part: sources for part, sources in self.init.items() if part not in replaced}

    @property
    def guides_by_features(self) -> bool:
        """True if the KL of features is a loss, and not only logged."""
        return self.feature_weight > 0

    @property
    def encodes_exo(self) -> bool:
        """True if the stage needs exocentric video."""
        return "exo_encoder" in self.uses

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return video-text generation on x and F(x), KL of answers and of features, and cycle consistency."""
        if self.demonstrations is None and batch.exo_video is None and not self.feature_weight:
            return super().losses(batch)
        model = self.model
        ego = model.ego_encoder(self.video_of(batch, "ego"))
        mapped = model.ego_to_exo(ego)
        exo, others = None, None
        if self.encodes_exo:
            with torch.no_grad():
                exo = model.exo_encoder(self.video_of(batch, "exo"))
            others = self.other_exo(batch)
        answers, demonstrated = self._demonstrated(exo, others, batch)
        visual = model.learner_view(ego, mapped)
        losses = self._text_losses(visual, batch, answers, demonstrated)
        if exo is None:
            self.step_log["guidance/mapping_change"] = mapping_change(ego, mapped, batch.valid)
            _, of_cycle = self._guided_inputs(ego, mapped)
        else:
            mean = self.mean_exo(exo, others, batch)
            features, of_cycle = self.guided_features(ego, mean, mapped, visual)
            target, standardized, feature_kl = self.compare_features(features, batch)
            if self.feature_weight:
                losses["kl_features"] = self.feature_weight * self._rise() * feature_kl
            if self.contrastive.weight:
                losses["contrastive"] = self.contrastive.weight * self._contrastive(target, standardized, batch)
        if self.cycle.weight:
            losses["cycle"] = self.cycle.weight * self._cycles(*of_cycle, exo, batch.valid)
        return losses

    def _demonstrated(
        self, exo: Tensor | None, others: Tensor | None, batch: ClipBatch
    ) -> tuple[TextBatch, NextTokens]:
        """Return the demonstrator's answers and its distributions, stored or computed now.

        The language model is gathered once for all tokens of the captions and for their distributions, on all ranks of
        a sharded run, as some may have captions to generate where others have narrations.
        """
        if self.demonstrations is not None:
            stored = batch.demonstration
            if stored is None:
                raise ValueError(
                    "model.demonstrations: the batch has no demonstrations: use EgoExoClipDataModule through "
                    "`make stage2`, or set demonstrations to null"
                )
            return stored.answers, NextTokens(stored.log_probs, stored.likeliest, stored.log_rest)
        assert exo is not None
        with gathered([] if batch.narrated is None else self.model.language_model.blocks()):
            return self.demonstrate(exo, batch, others)

    def _text_losses(
        self, visual: Tensor, batch: ClipBatch, answers: TextBatch, demonstrated: NextTokens
    ) -> dict[str, Tensor]:
        """Return video-text generation on narrations and the KL along all answers, from one pass.

        Args:
            visual: visual tokens of the learner, float [B, N, D].
            batch: the micro-batch.
            answers: B rows, see ``answers``.
            demonstrated: the demonstrator's distributions at the M supervised tokens of ``answers``.
        """
        logits, targets = self.read_text(visual, replace(batch, text=answers))
        clip, weight = clip_of_tokens(answers.labels, len(targets)), None
        if self.selection.by != "none":
            weight = self.selection.weights(Knowledge.of(demonstrated, targets, clip, len(answers.labels)))
            self.step_log["guidance/selected"] = weight.mean()
        if batch.narrated is not None:
            targets = targets.where(batch.narrated.index_select(0, clip), IGNORE_INDEX)
        kl = answer_kl_loss(demonstrated, logits, clip, len(answers.labels), self.kl.tau, weight)
        self.step_log["guidance/kl_answers"] = kl.detach()
        vtg = vtg_loss(logits, targets, batch.label_tokens)
        return {"vtg": self.vtg_weight * vtg, "kl": self.kl.weight * self._rise() * kl}

    @torch.no_grad()
    def demonstrate(self, exo: Tensor, batch: ClipBatch, others: Tensor | None = None) -> tuple[TextBatch, NextTokens]:
        """Return the demonstrator's answers and its distributions at each of their tokens.

        Captions are those of the pair's own camera. The distributions along a caption or a narration are the mean over
        all cameras.

        Args:
            exo: y, float [B, T, h, w, C].
            batch: the micro-batch.
            others: y of the other cameras, float [B, V, T, h, w, C], if there are any.

        Raises:
            ValueError: pairs without narration have different prompts.
        """
        visual = self.model.project_exo(exo)
        answers = batch.text if batch.narrated is None else self.answers(visual, batch)
        asked = replace(batch, text=answers, source=None)
        logits, targets = self.read_text(visual, asked)
        own = NextTokens.of(logits, self.kl.tau)
        if others is None or batch.other_exo is None:
            return answers, own
        clip, sums = clip_of_tokens(answers.labels, len(targets)), own.log_probs
        for place, there in enumerate(batch.other_exo.unbind(1)):
            logits, _ = self.read_text(self.model.project_exo(others[:, place]), asked)
            log_probs = NextTokens.of(logits, self.kl.tau).log_probs
            counted = there.index_select(0, clip)[:, None]
            sums = torch.logaddexp(sums, log_probs.masked_fill(~counted, -torch.inf))
        cameras = 1 + batch.other_exo.sum(1).index_select(0, clip)
        return answers, NextTokens(sums - cameras[:, None].log())

    def answers(self, visual: Tensor, batch: ClipBatch) -> TextBatch:
        """Return a row for each pair: its narration, or the prompt and the caption that the demonstrator gives.

        Args:
            visual: tokens of y, float [B, N, D].
            batch: the micro-batch, with ``narrated``.

        Returns:
            B rows; narrations and captions are labelled. Those of clips that cannot be read have no label.

        Raises:
            ValueError: the pairs have different prompts.
        """
        if batch.prompt is None or batch.narrated is None:
            raise ValueError(
                "model.class_path: AnswerGuidance needs data with one common prompt where pairs have no narration, and "
                "these have none: narrate all of them (data.narration), or use DemonstratorLearnerGuidance"
            )
        captions = self.captions(batch.prompt, visual, batch.valid & ~batch.narrated)
        prompt = batch.prompt.expand(len(captions), -1)
        given = captions != IGNORE_INDEX
        rows = TextBatch(
            torch.cat([prompt, captions.masked_fill(~given, 0)], dim=1),
            torch.cat([torch.ones_like(prompt, dtype=torch.bool), given], dim=1),
            torch.cat([torch.full_like(prompt, IGNORE_INDEX), captions], dim=1),
        )
        own, text = given.any(1, keepdim=True), batch.text
        return TextBatch(
            _either(own, rows.input_ids, text.input_ids, 0),
            _either(own, rows.attention_mask, text.attention_mask, 0),
            _either(own, rows.labels, text.labels, IGNORE_INDEX),
        )

    def captions(self, prompt: Tensor, visual: Tensor, wanted: Tensor) -> Tensor:
        """Answer a prompt greedily.

        Args:
            prompt: int64 [L].
            visual: float [B, N, D].
            wanted: bool [B], the clips to caption.

        Returns:
            int64 [B, ``answer_tokens``], each with its end token if that fits, then ``IGNORE_INDEX``; nothing else for
            clips that are not wanted.
        """
        captions = torch.full((len(wanted), self.answer_tokens), IGNORE_INDEX)
        clips = wanted.nonzero().flatten()
        if len(clips):
            end = int(self.tokenizer.eos_token_id)
            prompts = prompt.expand(len(clips), -1)
            mask = torch.ones_like(prompts, dtype=torch.bool)
            language_model = self.model.language_model
            generated = language_model.generate(
                prompts, mask, visual.index_select(0, clips), self.answer_tokens, eos_token_id=end, pad_token_id=0
            )
            for clip, tokens in zip(clips.tolist(), generated, strict=True):
                answer = torch.tensor([*tokens, end][: self.answer_tokens])
                captions[clip, : len(answer)] = answer
        return captions.to(prompt.device)


def _either(first: Tensor, one: Tensor, other: Tensor, filling: int) -> Tensor:
    """Return rows of ``one`` where ``first``, bool [B, 1], and of ``other`` elsewhere, filled to the same length."""
    length = max(one.shape[1], other.shape[1])
    one, other = (pad(rows, (0, length - rows.shape[1]), value=filling) for rows in (one, other))
    return torch.where(first, one, other)
