"""Stage 0: encoder, projector and language model learn to work together; not needed with released weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch
from lightning_modules.losses import vtg_loss
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.stages.base import Stage


class Initialisation(Stage):
    """Initialisation (Exo2Ego, arXiv 2503.09143), on mostly exocentric clips.

    The one encoder that trains here starts both encoders of the later stages, as one CLIP tower starts both in the
    paper. From random weights, captioning alone hardly ever grounds a vision transformer; two departures help it:
    patch filters and positions initialised from data, and a linear head that predicts from all visual tokens at once
    the bag of words of the answer (classification with the words of the caption as labels, as in SuperClass, arXiv
    2411.03313). The head is dropped afterwards.

    Args:
        bow_weight: weight of the bag-of-words loss; 0 for none.
        whiten_patches: initialise patch filters and positions from frames of the training data.
        num_frames: frames of a clip, which the size of the bag-of-words head depends on; our own runs take it from
            the data.
        **shared: arguments of ``Stage``.

    Raises:
        ValueError: the encoder has weights already, so that its filters cannot be whitened.
    """

    uses = ("exo_encoder", "projector", "language_model")
    trains = ("exo_encoder", "projector", "language_model")
    views = ("exo", "ego")

    def __init__(
        self, bow_weight: float = 0.0, whiten_patches: bool = False, num_frames: int | None = None, **shared: Any
    ) -> None:
        super().__init__(**shared)
        self.bow_weight, self.whiten_patches, self.num_frames = bow_weight, whiten_patches, num_frames or 0
        if whiten_patches and "exo_encoder" in self.init:
            raise ValueError(
                "model.whiten_patches: got true, but model.init.exo_encoder names weights: set one of them to false or "
                "null"
            )

    def attach(self, model: Exo2EgoModel) -> None:
        """Set the model and add the bag-of-words head."""
        super().attach(model)
        if self.bow_weight:
            if not self.num_frames:
                raise ValueError("model.num_frames: got none: set it to the frames of a clip, or bow_weight to 0")
            tokens = self.network.visual_tokens(self.num_frames)
            model.word_head = nn.Linear(tokens * model.language_model.dim, self.vocab_size)
            nn.init.normal_(model.word_head.weight, std=0.02)

    def on_train_start(self) -> None:
        """Whiten the patch filters, unless training resumes from a checkpoint."""
        if self.whiten_patches and self.trainer.global_step == 0:
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            if not hasattr(datamodule, "sample_frames"):
                raise ValueError("model.whiten_patches: got true, which needs a datamodule with sample_frames()")
            frames = datamodule.sample_frames(200)
            generator = torch.Generator().manual_seed(self.seed)
            self.model.exo_encoder.whiten_patches(frames.to(self.device), generator)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return video-text generation and the bag-of-words loss."""
        visual = self.model.demonstrator_tokens(self.video_of(batch, "exo"))
        losses = {"vtg": vtg_loss(*self.read_text(visual, batch), batch.label_tokens)}
        if self.bow_weight:
            has_video = (batch.text.input_ids == VIDEO_TOKEN_ID).any(1, keepdim=True)
            labels = batch.text.labels.masked_fill(~has_video, IGNORE_INDEX)
            losses["bow"] = self.bow_weight * self._bag_of_words_loss(visual, labels)
        return losses

    def _bag_of_words_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of a softmax over the vocabulary against the words of each row, equally weighted.

        A row without words, as of a corrupt clip, adds nothing to the mean over rows.

        Args:
            visual: float [B, N, D].
            labels: int64 [B, L], ``IGNORE_INDEX`` where not supervised.
        """
        logits = self.model.word_head(visual.flatten(1))
        eos = int(self.tokenizer.eos_token_id)
        present = torch.zeros_like(logits).scatter(1, labels.where(labels >= 0, eos), 1.0)
        present[:, eos] = 0
        share = present / present.sum(1, keepdim=True).clamp(min=1)
        return -(F.log_softmax(logits, dim=-1) * share).sum(1).mean()
