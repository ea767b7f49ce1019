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
    where_readable,
)
from lightning_modules.stage import Stage


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
        if cycle.weight and not (cycle.forward or cycle.backward):
            raise ValueError("model.cycle: got forward and backward false, allowed: one of them true, or weight 0")
        self.vtg_weight, self.cycle, self.kl = vtg_weight, cycle, kl
        self.standardizer = FeatureStandardizer(self.network.encoder.width, kl.standardize)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's exocentric features count from the next one on."""
        super().on_before_optimizer_step(optimizer)
        self.standardizer.update()

    def visual_tokens(self, video: Tensor, view: str) -> Tensor:
        """Egocentric clips only: x, then F(x)."""
        return self.model.learner_tokens(video)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Video-text generation on x and F(x), KL(y || F(x)), cycle consistency."""
        assert batch.ego_video is not None and batch.exo_video is not None
        model = self.model
        ego = model.ego_encoder(batch.ego_video)  # paper x
        with torch.no_grad():
            exo = model.exo_encoder(batch.exo_video)  # paper y
        ego_as_exo = model.ego_to_exo(ego)  # F(x)
        logits, targets = self.read_text(model.learner_view(ego, ego_as_exo), batch)
        losses = {
            "vtg": self.vtg_weight * vtg_loss(logits, targets, batch.label_tokens),
            "kl": self.kl.weight * self._guidance(ego, ego_as_exo, exo, batch.readable),
        }
        if self.cycle.weight:
            losses["cycle"] = self.cycle.weight * self._cycles(ego, ego_as_exo, exo, batch.readable)
        return losses

    def _guidance(self, ego: Tensor, ego_as_exo: Tensor, exo: Tensor, readable: Tensor) -> Tensor:
        """KL(y || F(x)); the curves also show KL(y || x) and how far F is from the identity."""
        self.standardizer.observe(exo, readable)
        target, mapped, unmapped = (self.standardizer(feature) for feature in (exo, ego_as_exo, ego))
        kl = guidance_kl_loss(target, mapped, readable, self.kl.tau, self.kl.axis, self.kl.pool)
        with torch.no_grad():
            without_mapping = guidance_kl_loss(target, unmapped, readable, self.kl.tau, self.kl.axis, self.kl.pool)
            change, size = (where_readable(readable, f, f.new_zeros(())).norm() for f in (ego_as_exo - ego, ego))
        self.step_log |= {
            "guidance/kl": kl.detach(),
            "guidance/kl_without_mapping": without_mapping,
            "guidance/mapping_change": change / size.clamp(min=1e-12),
        }
        return kl

    def _cycles(self, ego: Tensor, ego_as_exo: Tensor, exo: Tensor, readable: Tensor) -> Tensor:
        """Sum of the directions: G(F(x)) against x, F(G(y)) against y."""
        model, directions = self.model, {}
        if self.cycle.forward:
            target = ego.detach() if self.cycle.detach_target else ego
            directions["ego"] = cycle_consistency_loss(target, model.exo_to_ego(ego_as_exo), readable, self.cycle.norm)
        if self.cycle.backward:
            round_trip = model.ego_to_exo(model.exo_to_ego(exo))
            directions["exo"] = cycle_consistency_loss(exo, round_trip, readable, self.cycle.norm)
        self.step_log |= {f"guidance/cycle_{view}": loss.detach() for view, loss in directions.items()}
        return torch.stack(list(directions.values())).sum()
