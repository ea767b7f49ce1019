"""Stage 1: the demonstrator learns from exocentric clip-text pairs while the language model is frozen."""

from __future__ import annotations

from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.losses import vtg_loss
from lightning_modules.stages.base import Stage


class DemonstratorSelfPreparation(Stage):
    """Demonstrator Self-Preparation (Exo2Ego, arXiv 2503.09143).

    The paper does not state whether the projector trains; it does here, ``train: [exo_encoder]`` turns it off.
    """

    uses = ("exo_encoder", "projector", "language_model")
    trains = ("exo_encoder", "projector")
    views = ("exo", "ego")

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return video-text generation on exocentric clips."""
        visual = self.model.demonstrator_tokens(self.video_of(batch, "exo"))
        return {"vtg": vtg_loss(*self.read_text(visual, batch), batch.label_tokens)}
