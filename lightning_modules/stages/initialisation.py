"""Stage 0: encoder, projector and language model learn to work together; skipped with released weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batch import ClipBatch
from lightning_modules.losses import vtg_loss
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.stages.base import Stage


class Initialisation(Stage):
    """Initialisation (Exo2Ego, arXiv 2503.09143), on mostly exocentric clips.

    The one encoder that trains here starts both encoders of the later stages, as one CLIP tower starts both in the
    paper. From random weights, captioning alone hardly ever grounds a vision transformer; two departures help it:
    patch filters and positions initialised from data, and a linear head that predicts from all visual tokens at once
    which words the answers hold (classification with the words of the caption as labels, as in SuperClass, arXiv
    2411.03313). The head is dropped afterwards.

    Args:
        words_weight: weight of the word loss; 0 for none. The head's size follows from the data's clips.
        whiten_patches: initialise patch filters and positions from the first frames seen.
        **shared: see ``Stage``.
    """

    uses = ("exo_encoder", "projector", "language_model")
    trains = ("exo_encoder", "projector", "language_model")
    views = ("exo", "ego")

    def __init__(self, words_weight: float = 0.0, whiten_patches: bool = False, **shared: Any) -> None:
        super().__init__(**shared)
        self.words_weight, self.whiten_patches = words_weight, whiten_patches
        if whiten_patches and "exo_encoder" in self.init:
            raise ValueError("model.whiten_patches: got true, but the encoder starts from a hand-off: set it to false")

    def attach(self, model: Exo2EgoModel) -> None:
        """Take a model and add the word head."""
        super().attach(model)
        if self.words_weight:
            tokens = self.network.visual_tokens(self.num_frames)
            model.word_head = nn.Linear(tokens * model.language_model.dim, self.vocab_size)
            nn.init.normal_(model.word_head.weight, std=0.02)

    def on_train_start(self) -> None:
        """Whiten the patch filters, unless training goes on from a checkpoint."""
        if self.whiten_patches and self.trainer.global_step == 0:
            frames = self.trainer.datamodule.sample_frames(200)  # type: ignore[attr-defined]
            generator = torch.Generator().manual_seed(self.seed)
            self.model.exo_encoder.whiten_patches(frames.to(self.device), generator)

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Video-text generation and the words of the answers."""
        assert batch.exo_video is not None
        visual = self.model.demonstrator_tokens(batch.exo_video)
        losses = {"vtg": vtg_loss(*self.read_text(visual, batch), batch.label_tokens)}
        if self.words_weight:
            losses["words"] = self.words_weight * self._words_loss(visual, batch.text.labels)
        return losses

    def _words_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of a softmax over the vocabulary against the words of each row, equally weighted.

        A row without words, as of a clip that could not be read, adds nothing to the mean over rows.
        """
        logits = self.model.word_head(visual.flatten(1))
        eos = int(self.tokenizer.eos_token_id)
        present = torch.zeros_like(logits).scatter(1, labels.where(labels >= 0, eos), 1.0)
        present[:, eos] = 0
        share = present / present.sum(1, keepdim=True).clamp(min=1)
        return -(F.log_softmax(logits, dim=-1) * share).sum(1).mean()
