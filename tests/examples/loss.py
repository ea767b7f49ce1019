"""A loss of your own in stage 2, and a fourth stage."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datamodules import ClipBatch
from lightning_modules import DemonstratorLearnerGuidance, Stage
from lightning_modules.losses import vtg_loss
from lightning_modules.stages.guidance import GuidanceFeatures


class CosineGuidance(DemonstratorLearnerGuidance):
    """Stage 2 with one more term: the cosine distance of F(x) and y, each averaged over the clip.

    Args:
        cosine_weight: weight of the term, relative to that of the KL.
        **others: arguments of ``DemonstratorLearnerGuidance``.
    """

    def __init__(self, cosine_weight: float = 0.1, **others: Any) -> None:
        super().__init__(**others)
        self.cosine_weight = cosine_weight

    def kl_loss(self, features: GuidanceFeatures, batch: ClipBatch, feature_kl: Tensor) -> Tensor:
        """Return the KL of features plus the cosine distance."""
        mapped = features.mapped.mean(dim=(1, 2, 3))  # F(x): [B, T, h, w, C] to [B, C]
        target = features.exo.mean(dim=(1, 2, 3))  # y, from the frozen demonstrator
        distance = 1 - F.cosine_similarity(mapped, target, dim=-1)
        # Clips that could not be read stay in the batch but must not count.
        distance = distance.where(batch.valid, 0.0).mean()
        self.step_log["guidance/cosine"] = distance.detach()
        return feature_kl + self.cosine_weight * distance


class LearnerRefinement(Stage):
    """Stage 4: tune only the projector, after the adapters of stage 3 are trained."""

    uses = ("ego_encoder", "ego_to_exo", "projector", "language_model", "lora")
    trains = ("projector",)
    views = ("ego",)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the generation loss of the answers."""
        visual_tokens = self.model(batch.ego_video, "ego")  # x and F(x): [B, 2 N, D]
        logits, targets = self.read_text(visual_tokens, batch)
        return {"vtg": vtg_loss(logits, targets, batch.label_tokens)}
