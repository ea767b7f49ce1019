"""Base class of the training stages: parts of the model, losses and optimiser.

A stage is an ordinary ``LightningModule``: it works with a plain ``lightning.Trainer`` and any DataLoader of
``ClipBatch``. What our own runs add (checkpoints of trained parameters only, exported stage weights, curves, checks of
the gradients) is done by callbacks, see ``lightning_modules.callbacks``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from datamodules.batch import BenchmarkBatch, ClipBatch, QuestionBatch
from datamodules.text import load_tokenizer
from lightning_modules.compat import allow_compiled_shapes, attached_trainer
from lightning_modules.egobench.evaluator import evaluate_clip
from lightning_modules.losses import loss_by_source
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig
from lightning_modules.model.quantize import Quantization
from lightning_modules.stages.optim import OptimConfig
from lightning_modules.strategy import FSDP2, shard
from lightning_modules.validation.consistency import Comparison
from lightning_modules.validation.evaluator import QAEvaluator
from lightning_modules.validation.scores import Prediction, QAResults
from lightning_modules.weights.loading import load_weights, require_fit
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import FoundWeights

_COMPILED_SHAPES = 32
"""Shapes that the blocks of a class are compiled for; those of further ones run as they are."""


class Stage(L.LightningModule, ABC):
    """A training stage: the shared model, which of its parts train, and the losses that are summed.

    A subclass sets the class attributes and implements ``losses``. Creating a stage reads no weights; they are read
    when the Trainer calls ``configure_model``.

    Args:
        network: shapes of all parts.
        tokenizer: folder or hub name of the tokenizer, the same as that of the data.
        optim: optimiser and learning rate schedule.
        init: initial weights by part: a source, see ``find_weights``, or a list of sources of which the first that
            has the part is used. Parts that are not named, or null, are initialised at random.
        train: parts that train instead of those in ``trains``.
        seed: of random weights and of dropout.
        frozen_dtype: type of the parts that do not train. Trained parts are float32. ``int8`` and ``nf4`` store the
            linear layers of a frozen language model in 8 or 4 bits, and what else is frozen in bfloat16.
        compile_blocks: compile the blocks of every part for training, see ``Exo2EgoModel.compile_blocks``.
        activation_checkpointing: recompute activations inside the blocks of every part during the backward pass
            instead of keeping them; or the parts whose blocks do so; or ``auto``: the parts with which a device's
            memory suffices and the least is recomputed, as ``make plan`` counts, in our own runs.

    Attributes:
        step_log: values of the last training step for the curves, detached scalars by name.
        measures: ``TrainingMonitor`` sets it in the steps after which it writes, and a stage then adds to ``step_log``
            what costs a little more.
        source_losses: float32 [S, 2], loss and number of tokens by source of the last micro-batch, see
            ``loss_by_source``; None if the samples are not mixed.
        results: answers to validation questions since the start of the last evaluation.
        comparisons: answers to them from each visual input alone, since the start of the last test; empty without a
            learner.
        num_frames: frames of a clip, 0 if unknown.
        gradient_norm: norm of all gradients of the step, if it was computed before they are clipped.

    Raises:
        ValueError: ``init`` or ``train`` names a part that the stage does not have.
    """

    uses: tuple[str, ...]
    """Parts of the model that the stage builds."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that are built only if ``init`` names weights for them."""
    trains: ClassVar[tuple[str, ...]]
    """Parts that train."""
    views: ClassVar[tuple[str, ...]] = ("ego",)
    """Views that the validation questions are asked about."""
    partial_steps: int = 0
    """First steps, in which some of the trained parts get no gradient."""

    def __init__(
        self,
        network: NetworkConfig,
        tokenizer: str,
        optim: OptimConfig,
        init: dict[str, str | list[str] | None] | None = None,
        train: list[str] | None = None,
        seed: int = 0,
        frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32",
        activation_checkpointing: bool | Literal["auto"] | list[str] = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self._save_plain_hyperparameters()
        self.network, self.optim, self.seed = network, optim, seed
        self.tokenizer_name, self.activation_checkpointing = tokenizer, activation_checkpointing
        self.compile_blocks = compile_blocks
        self.quantization: Quantization | None = frozen_dtype if frozen_dtype in ("int8", "nf4") else None
        self.frozen_dtype: torch.dtype = torch.bfloat16 if self.quantization else getattr(torch, frozen_dtype)
        sources = {**(init or {})}
        sources.setdefault("language_model", network.language_model.pretrained)
        self.init = {part: [s] if isinstance(s, str) else s for part, s in sources.items() if s is not None}
        self.trained = tuple(self.trains if train is None else train)
        self.uses += tuple(part for part in self.optional if part in self.init)
        recomputed = activation_checkpointing if isinstance(activation_checkpointing, list) else []
        for key, names in (
            ("init", self.init),
            ("train", self.trained),
            ("activation_checkpointing", recomputed),
        ):
            if unknown := [name for name in names if name not in self.uses]:
                allowed = dict.fromkeys(self.uses + self.optional)
                raise ValueError(f"model.{key}: got {', '.join(unknown)}, allowed: {', '.join(allowed)}")
        self.step_log: dict[str, Tensor] = {}
        self.measures = False
        self.source_losses: Tensor | None = None
        self.results = QAResults()
        self.comparisons: list[Comparison] = []
        self.num_frames = 0
        self.gradient_norm: Tensor | None = None

    def _save_plain_hyperparameters(self) -> None:
        """Fill ``hparams`` as LightningCLI does, with plain values that ``torch.load(weights_only=True)`` accepts.

        ``load_from_checkpoint`` turns them into dataclasses again, by the types of the arguments.
        """
        self.save_hyperparameters(logger=False)
        for name, value in self.hparams.items():
            if is_dataclass(value) and not isinstance(value, type):
                self.hparams[name] = asdict(value)
        self.hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"

    @abstractmethod
    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return the weighted losses of a micro-batch by name; their sum is minimised."""

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """Return lines about the end of a training run that its summary must not leave out.

        Args:
            values: the last values of the curves by name.
        """
        return []

    def forward(self, video: Tensor, view: str = "ego") -> Tensor:
        """Return the visual tokens of clips of one view: uint8 [B, T, S, S, 3] to float [B, N, D]."""
        tokens: Tensor = self.model(video, view)
        return tokens

    # ---------------------------------------------------------------------------------------------------------- model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return load_tokenizer(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the language model has embeddings for."""
        given = self.network.language_model.overrides.get("vocab_size")
        return len(self.tokenizer) if given is None else int(given)

    @property
    def num_visual_inputs(self) -> int:
        """Number of projected features that the language model reads."""
        return len(self.network.visual_inputs) if "ego_to_exo" in self.uses else 1

    def on_meta(self) -> Exo2EgoModel:
        """Build the model on the meta device: shapes without memory."""
        with torch.device("meta"):
            return Exo2EgoModel(self.network, self.vocab_size, self.uses)

    @cached_property
    def sources(self) -> dict[str, FoundWeights]:
        """Weight files of each part that ``init`` names; opened, not read.

        Raises:
            WeightsError: weights are missing; the message names the command that writes or fetches them.
        """
        return {part: find_weights(sources, part, self.network) for part, sources in self.init.items()}

    def check_sources(self) -> None:
        """Compare names and shapes in the weight files with the model.

        Raises:
            WeightsError: weights are missing, or do not fit.
        """
        if self.sources:
            model = self.on_meta()
            for part, source in self.sources.items():
                require_fit(source, model.part(part))

    def check_data(self, datamodule: object) -> None:
        """Check that the losses suit the data, before any weights are read.

        Args:
            datamodule: of the run.

        Raises:
            ValueError: they do not; the message names the key to change.
        """

    def on_fit_start(self) -> None:
        """Check the data once more, for a Trainer that was not built by ``run``."""
        self.check_data(getattr(self.trainer, "datamodule", None))

    def start_from(self, sources: dict[str, str]) -> None:
        """Replace the initial weights of some parts."""
        self.init |= {part: [source] for part, source in sources.items()}
        self.__dict__.pop("sources", None)

    def started_from(self) -> dict[str, str]:
        """Return the digest of the initial weights of each part that ``init`` names."""
        return {part: source.digest for part, source in self.sources.items()}

    def configure_model(self) -> None:
        """Build the parts, load their weights unit by unit, and freeze the parts that do not train.

        A process never holds more than one whole unit in addition to its own share: its shard where the strategy
        shards, else everything.
        """
        if hasattr(self, "model"):
            return
        self.check_sources()
        torch.manual_seed(self.seed)
        model = Exo2EgoModel(self.network, self.vocab_size, self.uses, empty=self.sources)
        if self.compile_blocks:
            allow_compiled_shapes(_COMPILED_SHAPES)
            model.compile_blocks()
        recomputed = self.activation_checkpointing
        if recomputed:
            model.checkpoint_activations(recomputed if isinstance(recomputed, list) else None)
        self.attach(model)
        for part in model.parts:
            if part in self.sources:
                rank_zero_only(print)(self.sources[part].summary)

        def shard_unit(unit: nn.Module) -> None:
            if self.device_mesh is not None:
                strategy = self.trainer.strategy
                offload = isinstance(strategy, FSDP2) and strategy.cpu_offload
                shard(unit, self.device_mesh, self.trainer.precision, offload)

        trainer = attached_trainer(self)
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        load_weights(
            model, self.sources, self.trained, self.frozen_dtype, device, shard_unit, quantization=self.quantization
        )
        self.train(self.training)

    def attach(self, model: Exo2EgoModel) -> None:
        """Set ``self.model``; a stage with layers of its own adds them to the model here, so that they are sharded."""
        self.model = model

    def train(self, mode: bool = True) -> Stage:
        """Switch to training mode, except for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        if hasattr(self, "model"):
            for part in self.model.parts:
                names = (part, "lora") if part == "language_model" else (part,)
                if part != "lora" and not set(names) & set(self.trained):
                    self.model.get_submodule(part).eval()
        return self

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield (part, name, parameter) of everything that trains; layers of a stage itself are part ``stage``."""
        of_parts: set[int] = set()
        for part in self.model.parts:
            for name, parameter in self.model.part(part).items():
                of_parts.add(id(parameter))
                if parameter.requires_grad:
                    yield part, name, parameter
        for name, parameter in self.named_parameters():
            if id(parameter) not in of_parts and parameter.requires_grad:
                yield "stage", name, parameter

    @staticmethod
    def video_of(batch: ClipBatch, view: str) -> Tensor:
        """Return the video of one view, uint8 [B, T, S, S, 3].

        Raises:
            ValueError: the data do not have the view.
        """
        video = batch.ego_video if view == "ego" else batch.exo_video
        if video is None:
            raise ValueError(f"data.views: the batch has no {view} video, which this stage needs: add {view}")
        return video

    def read_text(self, visual: Tensor, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Run the language model on visual tokens and text.

        Where samples are mixed, ``source_losses`` is set for the curves.

        Args:
            visual: float [B, N, D].
            batch: the text is read.

        Returns:
            Logits float32 [M, V] and targets int64 [M] of the M supervised tokens.
        """
        text, language_model = batch.text, self.model.language_model
        spliced = language_model.splice(text.input_ids, text.attention_mask, text.labels, visual, text.supervised)
        logits, targets = language_model.supervised_logits(spliced)
        if batch.source is not None:
            source = batch.source.index_select(0, spliced.supervised // spliced.labels.shape[1])
            self.source_losses = loss_by_source(logits.detach(), targets, source, len(batch.source_names))
        return logits, targets

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the sum of the stage's losses."""
        self.step_log, self.source_losses = {}, None
        losses = self.model.run(self.losses, batch)
        total = torch.stack(list(losses.values())).sum()
        self.step_log |= {f"train/loss_{name}": loss.detach() for name, loss in losses.items()}
        self.step_log["train/loss"] = total.detach()
        # TrainingMonitor writes the curves: one call of log() costs more than all of its work in a step.
        if attached_trainer(self) is not None:
            self.log("train/loss", total.detach(), prog_bar=True, logger=False)
        return total

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which advances with optimiser steps."""
        # A scaler of float16 would have to look at the gradients between the backward pass and a fused step.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = self.optim.optimizer(((part, parameter) for part, _, parameter in self.trainable()), fused)
        schedule = self.optim.schedule(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; by the norm that ``FiniteCheck`` computed, if it did.

        Lightning would refuse to clip by norm with a fused optimiser.
        """
        norm, self.gradient_norm = self.gradient_norm, None
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if norm is None:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def total_steps(self) -> int:
        """Return the number of optimiser steps of the whole stage: the nearer limit of max_steps and max_epochs.

        Raises:
            ValueError: the Trainer has no limit.
        """
        max_steps, max_epochs = self.trainer.max_steps, self.trainer.max_epochs
        if max_steps >= 0 and max_epochs == -1:
            return max_steps
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "steps_per_epoch") and max_epochs is not None and max_epochs >= 0:
            # Not Lightning's estimate: that makes the loader before its state is restored, and the state is lost.
            in_epochs = int(datamodule.steps_per_epoch()) * max_epochs
            return in_epochs if max_steps < 0 else min(max_steps, in_epochs)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 0:
            raise ValueError("trainer.max_steps: got no limit: set max_steps or max_epochs, the schedule depends on it")
        return int(steps)

    # ----------------------------------------------------------------------------------------------------- evaluation

    @property
    def evaluator(self) -> QAEvaluator:
        """Answers validation questions with the model as it is."""
        return QAEvaluator(self.model, self.tokenizer, self.views)

    def on_validation_epoch_start(self) -> None:
        """Discard earlier results."""
        self.results = QAResults()

    def on_test_epoch_start(self) -> None:
        """Discard earlier results."""
        self.results, self.comparisons = QAResults(), []

    def validation_step(
        self, batch: QuestionBatch | list[BenchmarkBatch], batch_idx: int = 0, dataloader_idx: int = 0
    ) -> dict[str, list[Any]]:
        """Answer validation questions, or the requests of a benchmark.

        Returns:
            ``predictions``: a ``Prediction`` for each question and view, or a row for each request.
        """
        if isinstance(batch, QuestionBatch):
            return {"predictions": self._answer_questions(batch)}
        rows: list[Any] = []
        for clip in batch:
            rows += self.predict_step(clip)
        return {"predictions": rows}

    def test_step(self, batch: QuestionBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, list[Any]]:
        """Answer validation questions, and from each visual input alone, too."""
        return {"predictions": self._answer_questions(batch, compare=True)}

    def _answer_questions(self, batch: QuestionBatch, compare: bool = False) -> list[Prediction]:
        def work() -> tuple[list[Prediction], list[Comparison]]:
            evaluator = self.evaluator
            visual = evaluator.encode(batch)
            answers = evaluator.answer(batch, visual)
            return answers, evaluator.compare(batch, visual, answers) if compare else []

        predictions, comparisons = self.model.run(work)
        self.results.predictions += predictions
        self.comparisons += comparisons
        return predictions  # type: ignore[no-any-return]

    def predict_step(self, batch: BenchmarkBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Run the requests of a benchmark about one egocentric clip, see ``Evaluator``."""
        rows: list[dict[str, Any]] = self.model.run(evaluate_clip, self.model, self.tokenizer, batch)
        return rows

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        means = {f"val/{name}": value for name, value in self.results.means().items()}
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(means, logger=not fitting)
        # Inside fit, Lightning would write them one optimiser step too early.
        if fitting and not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(means, step=self.trainer.global_step)
