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
    cycle_consistency_loss,
    guidance_kl_loss,
    vtg_loss,
)
from lightning_modules.stage import Stage


@dataclass(frozen=True)
class CycleConfig:
    """Cycle consistency, both ways.

    Attributes:
        weight: of the sum of both directions; 0 leaves G without a loss.
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
    """KL(y || F(x)), see ``guidance_kl_loss`` and ``FeatureStandardizer``."""

    weight: float = 1.0
    tau: float = 1.0
    axis: Axis = "channel"
    pool: Pool = "none"
    standardize: Standardize = "ema"


class DemonstratorLearnerGuidance(Stage):
    """Demonstrator-Learner Guidance (Exo2Ego, arXiv 2503.09143) on synchronised pairs.

    The ego encoder, F and G learn by video-text generation with the language model reading x and F(x), by cycle
    consistency, and by KL between the demonstrator's features y and F(x). The exo encoder and the language model are
    frozen; gradients pass through the latter.

    Args:
        vtg_weight: weight of video-text generation.
        cycle: weight and form of cycle consistency.
        kl: weight and form of the guidance.
        **shared: see ``Stage``.
    """

    uses = ("exo_encoder", "ego_encoder", "projector", "ego_to_exo", "exo_to_ego", "language_model")
    trains = ("ego_encoder", "projector", "ego_to_exo", "exo_to_ego")
    views = ("ego",)

    def __init__(
        self,
        vtg_weight: float = 1.0,
        cycle: CycleConfig = CycleConfig(),
        kl: KLConfig = KLConfig(),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.vtg_weight, self.cycle, self.kl = vtg_weight, cycle, kl
        self.standardizer = FeatureStandardizer(self.network.encoder.width, kl.standardize)

    def visual_tokens(self, video: Tensor, view: str) -> Tensor:
        """Egocentric clips only: x, then F(x)."""
        return self.model.learner_tokens(video)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Video-text generation on x and F(x), cycle consistency, KL(y || F(x))."""
        assert batch.ego_video is not None and batch.exo_video is not None
        model = self.model
        ego = model.ego_encoder(batch.ego_video)  # paper x
        with torch.no_grad():
            exo = model.exo_encoder(batch.exo_video)  # paper y
        ego_as_exo, exo_as_ego = model.ego_to_exo(ego), model.exo_to_ego(exo)  # F(x), G(y)
        self.standardizer.update(exo)
        target, mapped, unmapped = (self.standardizer(feature) for feature in (exo, ego_as_exo, ego))
        kl = guidance_kl_loss(target, mapped, self.kl.tau, self.kl.axis, self.kl.pool)
        with torch.no_grad():
            self.step_log["guidance/kl_without_mapping"] = guidance_kl_loss(
                target, unmapped, self.kl.tau, self.kl.axis, self.kl.pool
            )
            self.step_log["guidance/mapping_change"] = (ego_as_exo - ego).norm() / ego.norm()

        cycles = []
        if self.cycle.forward:
            ego_target = ego.detach() if self.cycle.detach_target else ego
            cycles.append(cycle_consistency_loss(ego_target, model.exo_to_ego(ego_as_exo), self.cycle.norm))
            self.step_log["guidance/cycle_ego"] = cycles[-1].detach()
        if self.cycle.backward:
            cycles.append(cycle_consistency_loss(exo, model.ego_to_exo(exo_as_ego), self.cycle.norm))
            self.step_log["guidance/cycle_exo"] = cycles[-1].detach()
        self.step_log["guidance/kl"] = kl.detach()

        visual = model.learner_view(ego, ego_as_exo)
        losses = {
            "vtg": self.vtg_weight * vtg_loss(*self.read_text(visual, batch), batch.label_tokens),
            "kl": self.kl.weight * kl,
        }
        if cycles:
            losses["cycle"] = self.cycle.weight * torch.stack(cycles).sum()
        return losses
