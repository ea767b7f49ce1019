"""Stage 0: encoder, projector and language model learn to work together; not needed with released weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, supervised_places
from lightning_modules.compat import attached_trainer, needs_every_gradient
from lightning_modules.losses import grounding_loss, vtg_loss
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.stages.base import Stage


class Initialisation(Stage):
    """Initialisation (Exo2Ego, arXiv 2503.09143), on mostly exocentric clips.

    The one encoder that trains here starts both encoders of the later stages, as one CLIP tower starts both in the
    paper. From random weights, captioning alone hardly ever grounds a vision transformer; two departures help it:
    patch filters and positions initialised from data, and a linear head that predicts from all visual tokens at once
    the bag of words of the answer (classification with the words of the caption as labels, as in SuperClass, arXiv
    2411.03313). The head is dropped afterwards. Between a pretrained encoder and a pretrained language model, where
    captioning is slow to leave the text's prior, a third helps: visual tokens are drawn to the embeddings of the words
    of the answer, see ``grounding_loss``.

    Args:
        bow_weight: weight of the bag-of-words loss; 0 for none.
        grounding_weight: weight of the word grounding loss; 0 for none. It compares the clips of a micro-batch.
        grounding_steps: first steps, in which that is the only loss: they cost no pass of the language model.
        whiten_patches: initialise patch filters and positions from frames of the training data.
        num_frames: frames of a clip, which the size of the bag-of-words head depends on; our own runs take it from
            the data.
        **shared: arguments of ``Stage``.

    Raises:
        ValueError: the encoder has weights already, so that its filters cannot be whitened; or there are grounding
            steps without a weight.
    """

    uses = ("exo_encoder", "projector", "language_model")
    trains = ("exo_encoder", "projector", "language_model")
    views = ("exo", "ego")

    def __init__(
        self,
        bow_weight: float = 0.0,
        grounding_weight: float = 0.0,
        grounding_steps: int = 0,
        whiten_patches: bool = False,
        num_frames: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.bow_weight, self.whiten_patches, self.num_frames = bow_weight, whiten_patches, num_frames or 0
        self.grounding_weight, self.partial_steps = grounding_weight, grounding_steps
        if grounding_steps and not grounding_weight:
            raise ValueError(
                f"model.grounding_steps: got {grounding_steps} with model.grounding_weight 0, so that they would have "
                "no loss: set both or neither"
            )
        if whiten_patches and "exo_encoder" in self.init:
            raise ValueError(
                "model.whiten_patches: got true, but model.init.exo_encoder names weights: set one of them to false or "
                "null"
            )

    def configure_model(self) -> None:
        """Refuse a strategy that waits for gradients of the language model in the grounding steps, then build."""
        trainer = attached_trainer(self)
        idle = self.partial_steps if "language_model" in self.trained else 0
        if idle and trainer is not None and needs_every_gradient(trainer.strategy):
            raise ValueError(
                f"trainer.strategy: ddp, but the language model gets no gradient in the first {idle} "
                "steps (model.grounding_steps): set it to ddp_find_unused_parameters_true or fsdp2"
            )
        super().configure_model()

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
        """Return video-text generation, the bag-of-words loss and word grounding."""
        visual = self.model.demonstrator_tokens(self.video_of(batch, "exo"))
        losses: dict[str, Tensor] = {}
        if self.grounding_weight:
            losses["grounding"] = self.grounding_weight * self._grounding_loss(visual, batch)
            trainer = attached_trainer(self)
            if trainer is not None and trainer.global_step < self.partial_steps:
                return losses
        losses["vtg"] = vtg_loss(*self.read_text(visual, batch), batch.label_tokens)
        if self.bow_weight:
            has_video = (batch.text.input_ids == VIDEO_TOKEN_ID).any(1, keepdim=True)
            labels = batch.text.labels.masked_fill(~has_video, IGNORE_INDEX)
            losses["bow"] = self.bow_weight * self._bag_of_words_loss(visual, labels)
        return losses

    def _grounding_loss(self, visual: Tensor, batch: ClipBatch) -> Tensor:
        text = batch.text
        supervised = supervised_places(text.labels) if text.supervised is None else text.supervised
        ids = text.labels.flatten().index_select(0, supervised)
        shown = (text.input_ids == VIDEO_TOKEN_ID).any(1) & batch.valid
        words = self.model.language_model.embed(ids)
        return grounding_loss(visual, words, ids, supervised // text.labels.shape[1], shown)

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
