"""Stage 2: the frozen demonstrator guides the learner through the two mappings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.losses import (
    Axis,
    FeatureStandardizer,
    Pool,
    Standardize,
    answer_kl_loss,
    contrastive_loss,
    cycle_consistency_loss,
    guidance_kl_loss,
    vtg_loss,
    where_valid,
)
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.stages.base import Stage


@dataclass(frozen=True)
class CycleConfig:
    """Cycle consistency, both ways.

    Attributes:
        weight: of the sum of both directions; with 0, G is not run.
        forward, backward: which directions count: x -> F -> G -> x and y -> G -> F -> y.
        detach_target: keep the gradient out of the target x, which could otherwise shrink to lower the loss.
        norm: ``channel_std`` weighs all channels alike.
    """

    weight: float = 1.0
    forward: bool = True
    backward: bool = True
    detach_target: bool = True
    norm: Literal["none", "channel_std"] = "none"


@dataclass(frozen=True)
class KLConfig:
    """KL(y || F(x)), see ``guidance_kl_loss`` and ``FeatureStandardizer``.

    Attributes:
        weight: after the warm-up.
        where: compares ``patches``, the encoder's features and what F makes of them; the ``tokens`` that the projector
            makes of both and the language model reads; or the ``answers`` that it gives: its next-token distributions
            when it reads y and when it reads x and F(x), along the caption that it gives greedily when it reads y. The
            last needs no alignment of pictures and no text; ``axis``, ``pool`` and ``standardize`` are not used.
            Y passes through the projector for ``tokens`` and ``answers``. Where that one trains on x and F(x), y means
            less and less to it: ``init.exo_projector`` names the one that stage 1 left, and y then passes through that.
        warmup_fraction: share of all steps over which the weight rises from 0.
        answer_tokens: longest caption of ``answers``.
    """

    weight: float = 1.0
    tau: float = 1.0
    axis: Axis = "channel"
    pool: Pool = "none"
    standardize: Standardize = "ema"
    where: Literal["patches", "tokens", "answers"] = "patches"
    warmup_fraction: float = 0.0
    answer_tokens: int = 16


@dataclass(frozen=True)
class ContrastiveConfig:
    """Finding y by F(x) among the clips of a micro-batch, see ``contrastive_loss``; not of the paper.

    Compares where the KL does, with features standardised as there.
    """

    weight: float = 0.0
    tau: float = 0.1


class DemonstratorLearnerGuidance(Stage):
    """Demonstrator-Learner Guidance (Exo2Ego, arXiv 2503.09143) on synchronised pairs.

    The ego encoder, F and G learn by video-text generation with the language model reading x and F(x), by cycle
    consistency, and by KL between the demonstrator's features y and F(x). The exo encoder and the language model are
    frozen; gradients pass through the latter. With the weights of all else 0, exocentric video may be left out.

    Args:
        vtg_weight: weight of video-text generation.
        cycle: weight and form of cycle consistency.
        kl: weight and form of the guidance.
        contrastive: weight and temperature of a contrastive term beside the KL.
        **shared: see ``Stage``.
    """

    uses = ("exo_encoder", "ego_encoder", "projector", "ego_to_exo", "exo_to_ego", "language_model")
    optional = ("exo_projector",)
    trains = ("ego_encoder", "projector", "ego_to_exo", "exo_to_ego")
    views = ("ego",)

    def __init__(
        self,
        vtg_weight: float = 1.0,
        cycle: CycleConfig = CycleConfig(),
        kl: KLConfig = KLConfig(),
        contrastive: ContrastiveConfig = ContrastiveConfig(),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if cycle.weight and not (cycle.forward or cycle.backward):
            raise ValueError("model.cycle: got forward and backward false, allowed: one of them true, or weight 0")
        if not 0 <= kl.warmup_fraction <= 1:
            raise ValueError(f"model.kl.warmup_fraction: got {kl.warmup_fraction}, allowed: from 0 to 1")
        if "exo_projector" in self.uses and kl.where == "patches":
            raise ValueError(
                "model.init.exo_projector: model.kl.where is patches, which pass through no projector: leave it out, "
                "or set where to tokens or answers"
            )
        self.vtg_weight, self.cycle, self.kl, self.contrastive = vtg_weight, cycle, kl, contrastive

    def attach(self, model: Exo2EgoModel) -> None:
        """Standardise what the KL compares."""
        super().attach(model)
        dim = model.language_model.dim if self.kl.where == "tokens" else self.network.encoder_shape.dim
        self.standardizer = FeatureStandardizer(dim, self.kl.standardize)

    def on_fit_start(self) -> None:
        """Refuse to compare tokens of F(x) where the language model reads none."""
        super().on_fit_start()
        if self.kl.where == "tokens" and len(self.network.visual_inputs) < 2:
            raise ValueError(
                f"model.kl.where: got tokens, but network.visual_inputs is [{self.network.visual_inputs[0]}]: set "
                "network.visual_inputs to [ego, mapped], or model.kl.where to patches"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's exocentric features count from the next one on."""
        super().on_before_optimizer_step(optimizer)
        self.standardizer.update()

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Video-text generation on x and F(x), KL(y || F(x)), cycle consistency."""
        assert batch.ego_video is not None
        if batch.exo_video is None:
            if self.kl.weight or self.cycle.weight or self.contrastive.weight:
                raise ValueError(
                    "data.views: got ego alone, but the losses compare with exocentric video: add exo, or set the "
                    "weights of model.kl, model.cycle and model.contrastive to 0"
                )
            return {"vtg": self._generation(self.model.learner_tokens(batch.ego_video), batch)}
        model = self.model
        ego = model.ego_encoder(batch.ego_video)  # paper x
        with torch.no_grad():
            exo = model.exo_encoder(batch.exo_video)  # paper y
        ego_as_exo = model.ego_to_exo(ego)  # F(x)
        visual = model.learner_view(ego, ego_as_exo)
        losses = {"vtg": self._generation(visual, batch)}
        losses |= self._guidance(*self._compared(ego, ego_as_exo, exo, visual), batch)
        if self.kl.where == "answers":
            losses["kl"] = self._kl_weight() * self._answer_kl(exo, visual, batch)
        if self.cycle.weight:
            losses["cycle"] = self.cycle.weight * self._cycles(ego, ego_as_exo, exo, batch.valid)
        return losses

    def _generation(self, visual: Tensor, batch: ClipBatch) -> Tensor:
        logits, targets = self.read_text(visual, batch)
        return self.vtg_weight * vtg_loss(logits, targets, batch.label_tokens)

    def _compared(self, ego: Tensor, ego_as_exo: Tensor, exo: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Y, F(x) and x, float [B, T, h, w, C], or the tokens of each as [B, 1, 1, N, D]."""
        if self.kl.where != "tokens":
            return exo, ego_as_exo, ego
        with torch.no_grad():
            target = self.model.project_exo(exo)
        unmapped, mapped = visual.chunk(2, dim=1)
        return target[:, None, None], mapped[:, None, None], unmapped[:, None, None]

    def _guidance(self, exo: Tensor, ego_as_exo: Tensor, ego: Tensor, batch: ClipBatch) -> dict[str, Tensor]:
        """KL(y || F(x)); the curves also show KL(y || x) and how far F is from the identity."""
        valid = batch.valid
        self.standardizer.observe(exo, valid)
        target, mapped, unmapped = (self.standardizer(feature) for feature in (exo, ego_as_exo, ego))
        kl = guidance_kl_loss(target, mapped, valid, self.kl.tau, self.kl.axis, self.kl.pool)
        with torch.no_grad():
            without_mapping = guidance_kl_loss(target, unmapped, valid, self.kl.tau, self.kl.axis, self.kl.pool)
            change, size = (where_valid(valid, f, f.new_zeros(())).norm() for f in (ego_as_exo - ego, ego))
        self.step_log |= {
            "guidance/kl": kl.detach(),
            "guidance/kl_without_mapping": without_mapping,
            "guidance/mapping_change": change / size.clamp(min=1e-12),
        }
        losses = {"kl": self._kl_weight() * kl}
        if self.contrastive.weight:
            clips = {name: number for number, name in enumerate(dict.fromkeys(batch.ids))}
            number = torch.tensor([clips[name] for name in batch.ids], device=valid.device)
            different = number != number[:, None]
            contrastive = contrastive_loss(target, mapped, valid, different, self.contrastive.tau)
            losses["contrastive"] = self.contrastive.weight * contrastive
        return losses

    def _answer_kl(self, exo: Tensor, visual: Tensor, batch: ClipBatch) -> Tensor:
        """KL of what the language model says about y against what it says about x and F(x)."""
        if batch.prompt is None:
            raise ValueError("model.kl.where: got answers, but the data have no common prompt: use patches or tokens")
        with torch.no_grad():
            shown = self.model.project_exo(exo)
            answers, counts = self.caption(batch.prompt, shown)
            target = self.model.language_model.answer_logits(batch.prompt, shown, answers)
        logits = self.model.language_model.answer_logits(batch.prompt, visual, answers)
        kl = answer_kl_loss(target, logits, counts & batch.valid[:, None], self.kl.tau)
        self.step_log["guidance/kl_answers"] = kl.detach()
        return kl

    def caption(self, prompt: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Answer int64 [L] about float [B, N, D] greedily: int64 [B, ``answer_tokens``], and bool, up to its end.

        Nothing stops at an end, so that all processes make as many forward passes.
        """
        language_model, asked = self.model.language_model, prompt.expand(len(visual), -1)
        whole = torch.ones_like(asked, dtype=torch.bool)
        never = int(language_model.causal_lm.config.vocab_size)
        said = language_model.generate(asked, whole, visual, self.kl.answer_tokens, eos_token_id=never, pad_token_id=0)
        answers = torch.tensor(said, device=prompt.device)
        ended = answers == int(self.tokenizer.eos_token_id)
        return answers, ended.cumsum(1) - ended.long() == 0

    def _kl_weight(self) -> float:
        rising = self.kl.warmup_fraction * self.total_steps() if self.kl.warmup_fraction else 0.0
        return self.kl.weight * min(1.0, (self.trainer.global_step + 1) / (rising + 1)) if rising else self.kl.weight

    def _cycles(self, ego: Tensor, ego_as_exo: Tensor, exo: Tensor, valid: Tensor) -> Tensor:
        """Sum of the directions: G(F(x)) against x, F(G(y)) against y."""
        model, directions = self.model, {}
        if self.cycle.forward:
            target = ego.detach() if self.cycle.detach_target else ego
            directions["ego"] = cycle_consistency_loss(target, model.exo_to_ego(ego_as_exo), valid, self.cycle.norm)
        if self.cycle.backward:
            round_trip = model.ego_to_exo(model.exo_to_ego(exo))
            directions["exo"] = cycle_consistency_loss(exo, round_trip, valid, self.cycle.norm)
        self.step_log |= {f"guidance/cycle_{view}": loss.detach() for view, loss in directions.items()}
        return torch.stack(list(directions.values())).sum()
