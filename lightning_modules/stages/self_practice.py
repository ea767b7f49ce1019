"""Stage 3: the learner practises on instructions, with egocentric video only."""

from __future__ import annotations

from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.losses import vtg_loss
from lightning_modules.stages.base import Stage


class LearnerSelfPractice(Stage):
    """Learner Self-Practice (Exo2Ego, arXiv 2503.09143): instruction tuning with adapters on the language model.

    The ego encoder and F continue to learn. Nothing exocentric is needed any more, here or at inference.
    """

    uses = ("ego_encoder", "projector", "ego_to_exo", "language_model", "lora")
    trains = ("ego_encoder", "projector", "ego_to_exo", "lora")
    views = ("ego",)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return video-text generation on the answers."""
        visual = self.model.learner_tokens(self.video_of(batch, "ego"))
        return {"vtg": vtg_loss(*self.read_text(visual, batch), batch.label_tokens)}
