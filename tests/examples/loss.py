"""A loss of your own in stage 2, and a fourth stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules import ClipBatch
from lightning_modules import DemonstratorLearnerGuidance, Stage
from lightning_modules.losses import vtg_loss


class CosineGuidance(DemonstratorLearnerGuidance):
    """Stage 2 with one more term: the cosine distance of F(x) and y, each averaged over the clip.

    Args:
        cosine_weight: weight of the term.
        **others: arguments of ``DemonstratorLearnerGuidance``.
    """

    def __init__(self, cosine_weight: float = 0.1, **others: Any) -> None:
        super().__init__(**others)
        self.cosine_weight = cosine_weight

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the losses of stage 2 and the cosine distance."""
        losses = super().losses(batch)
        x = self.model.ego_encoder(batch.ego_video)  # [B, T, h, w, C]
        mapped = self.model.ego_to_exo(x).mean(dim=(1, 2, 3))
        with torch.no_grad():  # the demonstrator is frozen
            y = self.model.exo_encoder(batch.exo_video).mean(dim=(1, 2, 3))
        distance = 1 - F.cosine_similarity(mapped, y, dim=-1)
        # Clips that could not be read are in the batch but must not count.
        losses["cosine"] = self.cosine_weight * distance.where(batch.valid, 0.0).mean()
        return losses


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
