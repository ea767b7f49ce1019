"""What the stages share: which parts train, the optimiser, the schedule, and how held-out clips are answered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import IGNORE_INDEX, BenchmarkBatch, ClipBatch, QuestionBatch, TextBatch
from datamodules.clips.dataset import ClipConfig
from datamodules.text import load_tokenizer
from lightning_modules.callbacks.health import FiniteCheck
from lightning_modules.egobench.evaluator import Evaluator
from lightning_modules.egobench.scoring import score_results
from lightning_modules.losses import loss_by_source
from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel, NetworkConfig
from lightning_modules.model.language_model import transformers_config
from lightning_modules.strategy import shard
from lightning_modules.validation.report import markdown_table
from lightning_modules.validation.scores import HeldOutMeans, Outcome, judge_choice, judge_text, score_names
from lightning_modules.weights.loading import load_weights, require_fit
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import FoundWeights, WeightsError

MAX_ANSWER_TOKENS = 32
Found = TypeVar("Found")


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        learning_rate: peak.
        warmup_fraction: share of all steps.
        weight_decay: on matrices; vectors (norms, biases) are never decayed.
        betas: of Adam.
        lr_mult: factor on the rate of single parts.
    """

    learning_rate: float
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    lr_mult: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.learning_rate <= 0:
            raise ValueError(f"optim.learning_rate: got {self.learning_rate}, allowed: above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"optim.warmup_fraction: got {self.warmup_fraction}, allowed: from 0 to below 1")
        if unknown := set(self.lr_mult) - set(PARTS):
            raise ValueError(f"optim.lr_mult: got {', '.join(sorted(unknown))}, allowed: {', '.join(PARTS)}")


class Stage(L.LightningModule, ABC):
    """A training stage: the shared model, what of it trains, and which losses are summed.

    Making a stage reads nothing; ``check`` looks at everything it will read.

    Args:
        network: shapes of all parts.
        tokenizer: folder or hub name, the one the data is tokenised with.
        optim: optimiser and schedule.
        init: initial weights: part to a source, see ``find_weights``, or to a list of sources of which the first that
            holds the part is taken. Parts not named, or with null, start at random.
        train: parts that train instead of the stage's own ``trains``.
        seed: of weights that are drawn and of dropout.
        frozen_dtype: type of the parts that do not train. The trained ones are float32.
        activation_checkpointing: compute activations inside the blocks of every part twice rather than hold them.

    Raises:
        ValueError: ``init`` or ``train`` names a part the stage has not.
    """

    uses: tuple[str, ...]
    """Parts of the model that the stage builds."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that it builds too where ``init`` says where they start."""
    trains: ClassVar[tuple[str, ...]]
    """Parts that train."""
    views: ClassVar[tuple[str, ...]]
    """Views that the trained model can be asked about."""

    def __init__(
        self,
        network: NetworkConfig,
        tokenizer: str,
        optim: OptimConfig,
        init: dict[str, str | list[str] | None] | None = None,
        train: list[str] | None = None,
        seed: int = 0,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.optim, self.seed = network, optim, seed
        self.tokenizer_name, self.activation_checkpointing = tokenizer, activation_checkpointing
        self.frozen_dtype: torch.dtype = getattr(torch, frozen_dtype)
        sources = {**(init or {})}
        sources.setdefault("language_model", network.language_model.pretrained)
        self.init = {part: [s] if isinstance(s, str) else s for part, s in sources.items() if s is not None}
        self.trained = tuple(self.trains if train is None else train)
        self.uses += tuple(part for part in self.optional if part in self.init)
        for key, names in (("init", self.init), ("train", self.trained)):
            if unknown := [name for name in names if name not in self.uses]:
                allowed = dict.fromkeys(self.uses + self.optional)
                raise ValueError(f"model.{key}: got {', '.join(unknown)}, allowed: {', '.join(allowed)}")
        self.strict_loading = False  # checkpoints hold trained parts only
        self.step_log: dict[str, Tensor] = {}
        self.micro_batches: list[tuple[list[str], Tensor]] = []
        self.finite = FiniteCheck()
        self.source_losses: Tensor | None = None
        self.num_frames = 0

    # ------------------------------------------------------------------------------------------------ what stages say

    @abstractmethod
    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Losses of a micro-batch, already weighted; their sum is minimised."""

    def forward(self, video: Tensor, view: str = "ego") -> Tensor:
        """Return the visual tokens of clips of one view: uint8 [B, T, S, S, 3] to float [B, N, D]."""
        tokens: Tensor = self.model(video, view)
        return tokens

    # ---------------------------------------------------------------------------------------------------------- model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read on first use."""
        return load_tokenizer(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Tokens that the language model knows."""
        given = self.network.language_model.overrides.get("vocab_size")
        return len(self.tokenizer) if given is None else int(given)

    def on_meta(self) -> Exo2EgoModel:
        """The model with shapes and without memory."""
        with torch.device("meta"):
            return Exo2EgoModel(self.network, self.vocab_size, self.uses)

    @cached_property
    def sources(self) -> dict[str, FoundWeights]:
        """What each part of ``init`` starts from; names and shapes agree with the model, nothing is read yet.

        Raises:
            WeightsError: weights are missing or do not fit; the message names the command that writes or fetches them.
        """
        found = {part: find_weights(sources, part, self.network) for part, sources in self.init.items()}
        if found:
            model = self.on_meta()
            for part, source in found.items():
                require_fit(source, model.part(part))
        return found

    def start_from(self, sources: dict[str, str]) -> None:
        """Let parts start elsewhere than ``init`` said."""
        self.init |= {part: [source] for part, source in sources.items()}
        self.__dict__.pop("sources", None)

    def check(self, clips: ClipConfig, max_text_tokens: int) -> None:
        """Look at everything that the stage will read, and at whether the data suits the model.

        Args:
            clips: of the data.
            max_text_tokens: longest text of the data.

        Raises:
            ValueError: something is missing or does not fit; see also ``sources``.
        """
        model, encoder = self.network.language_model, self.network.encoder_shape
        if clips.image_size != encoder.image_size:
            raise ValueError(
                f"clips.image_size: got {clips.image_size}, but network.encoder.image_size is {encoder.image_size}: "
                "make them agree"
            )
        if len(self.tokenizer) > self.vocab_size:
            raise ValueError(
                f"tokenizer: {self.tokenizer_name} has {len(self.tokenizer)} tokens, but "
                f"network.language_model.overrides.vocab_size is {self.vocab_size}: make them agree"
            )
        settings = transformers_config(model, self.vocab_size)
        if settings.vocab_size < len(self.tokenizer):
            raise ValueError(
                f"language_model: {model.pretrained} has {settings.vocab_size} tokens, the tokenizer "
                f"{len(self.tokenizer)}; make network.language_model.pretrained and tokenizer agree"
            )
        visual = self.network.visual_tokens(clips.num_frames) * self.num_visual_inputs
        longest = settings.max_position_embeddings
        if visual + max_text_tokens > longest:
            raise ValueError(
                f"data.max_text_tokens: {max_text_tokens} of text and {visual} visual tokens exceed the "
                f"{longest} positions of the language model: lower data.init_args.max_text_tokens to at most "
                f"{longest - visual}"
            )
        self.num_frames = clips.num_frames
        assert self.sources is not None

    @property
    def num_visual_inputs(self) -> int:
        """Number of projected features that the language model reads."""
        return len(self.network.visual_inputs) if "ego_to_exo" in self.uses else 1

    def configure_model(self) -> None:
        """Build the parts, read their weights unit by unit, freeze what does not train.

        No process ever holds more than one unit beside what it keeps: its share where the strategy shards, else all.
        """
        if hasattr(self, "model"):
            return
        torch.manual_seed(self.seed)
        model = Exo2EgoModel(self.network, self.vocab_size, self.uses, empty=self.sources)
        if self.activation_checkpointing:
            model.checkpoint_activations()
        self.attach(model)
        for part in model.parts:
            if part in self.sources:
                rank_zero_only(print)(self.sources[part].summary)
        device = self._trainer.strategy.root_device if self._trainer else torch.device("cpu")

        def shard_unit(unit: nn.Module) -> None:
            if self.device_mesh is not None:
                shard(unit, self.device_mesh, self.trainer.precision)

        load_weights(model, self.sources, self.trained, self.frozen_dtype, device, shard_unit)
        self.train(self.training)

    def attach(self, model: Exo2EgoModel) -> None:
        """Take a model; stages with layers of their own add them to it here, so that they are sharded with it."""
        self.model = model

    def train(self, mode: bool = True) -> Stage:
        """As ``nn.Module.train``, but frozen parts stay in evaluation mode."""
        super().train(mode)
        if hasattr(self, "model"):
            for part in self.model.parts:
                names = (part, "lora") if part == "language_model" else (part,)
                if part != "lora" and not set(names) & set(self.trained):
                    self.model.get_submodule(part).eval()
        return self

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name, parameter) of everything that trains."""
        for part in self.model.parts:
            for name, parameter in self.model.part(part).items():
                if parameter.requires_grad:
                    yield part, name, parameter
        of_parts = {id(parameter) for part in self.model.parts for parameter in self.model.part(part).values()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in of_parts and parameter.requires_grad:
                yield "stage", name, parameter

    def read_text(self, visual: Tensor, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Logits float32 [M, V] and targets int64 [M] of the batch's supervised tokens, given float [B, N, D].

        Where samples are mixed, their losses by source are kept in ``source_losses`` for the curves.
        """
        text, language_model = batch.text, self.model.language_model
        spliced = language_model.splice(text.input_ids, text.attention_mask, text.labels, visual)
        logits, targets = language_model.supervised_logits(spliced)
        if batch.source is not None:
            tokens = (text.labels != IGNORE_INDEX).sum(1)
            source = batch.source.repeat_interleave(tokens, output_size=len(targets))
            self.source_losses = loss_by_source(logits.detach(), targets, source, len(batch.source_names))
        return logits, targets

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Sum of the stage's losses."""
        losses = self.model.run(self.losses, batch)
        total = torch.stack(list(losses.values())).sum()
        self.micro_batches.append((batch.ids, total.detach()))
        self.step_log = {f"train/loss_{name}": loss.detach() for name, loss in losses.items()} | self.step_log
        self.step_log["train/loss"] = total.detach()
        return total

    def on_train_batch_start(self, batch: ClipBatch, batch_idx: int) -> None:
        """Draw dropout from (seed, step, rank), so that a resumed run draws the same."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        on_gpu = self.device.type == "cuda"
        generator = torch.cuda.default_generators[self.device.index] if on_gpu else torch.default_generator
        generator.manual_seed(self.seed + 1_000_003 * done + self.global_rank)
        self.step_log, self.source_losses = {}, None

    def configure_optimizers(self) -> Any:
        """AdamW over a group for each part, matrices apart from vectors; rate by step."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for part, _, parameter in self.trainable():
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
        o = self.optim
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": o.learning_rate * o.lr_mult.get(part, 1.0),
                    "weight_decay": o.weight_decay if matrices else 0.0,
                    "name": part if matrices else f"{part}_vectors",
                }
                for (part, matrices), parameters in groups.items()
            ],
            betas=o.betas,
        )
        total = self.total_steps()
        warmup = o.warmup_fraction * total

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the whole stage.

        Not ``trainer.estimated_stepping_batches``: that builds the loader before its state is restored.
        """
        if self.trainer.max_steps >= 0:
            return self.trainer.max_steps
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return int(datamodule.steps_per_epoch() * (self.trainer.max_epochs or 1))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients and keep the norm for the curves."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf).detach()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.step_log["optim/grad_norm"] = norm
        self.finite.expect(self.trainer.global_step, norm, self.micro_batches)
        self.micro_batches = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Report, once, parameters that should train and get no gradient."""
        if self.trainer.global_step == 0:
            idle = [f"{part}.{name}" for part, name, parameter in self.trainable() if parameter.grad is None]
            if idle:
                rank_zero_warn(f"{len(idle)} trained parameters get no gradient, e.g. {', '.join(idle[:3])}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains and what this stage counts, and name the optimiser's state by parameters."""
        self.finite.settle()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        own = {name for name, _ in self.named_buffers() if not name.startswith("model.")}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained | own}
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        optimizer = self.trainer.optimizers[0]
        checkpoint["optimizer"] = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
        checkpoint["learning_rates"] = {group["name"]: group["lr"] for group in optimizer.param_groups}
        del checkpoint["optimizer_states"]
        checkpoint["started_from"] = self.started_from()
        checkpoint["accumulate"] = self.trainer.accumulate_grad_batches
        checkpoint["sharded"] = self.device_mesh is not None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that began from other hand-offs than there are now; count batches as this run does."""
        before, now = checkpoint["started_from"], self.started_from()
        if changed := sorted(part for part in now if before.get(part) != now[part]):
            raise WeightsError(
                f"checkpoint: it began from another {', '.join(changed)} than {self.sources[changed[0]].where} holds: "
                "train anew with FORCE=1"
            )
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            begun = counts["processed"]
            micro_batches = begun // checkpoint["accumulate"] * self.trainer.accumulate_grad_batches
            for event in ("ready", "started", "processed", "completed"):
                counts[event] += micro_batches - begun

    # ------------------------------------------------------------------------------------------------------- held-out

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._begin_questions()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._begin_questions()

    def validation_step(
        self, batch: QuestionBatch | list[BenchmarkBatch], batch_idx: int = 0, dataloader_idx: int = 0
    ) -> None:
        """Answer held-out questions, or the requests of a benchmark."""
        if isinstance(batch, QuestionBatch):
            self.model.run(self._ask, batch)
        else:
            self.answers[dataloader_idx] += [answer for clip in batch for answer in self.predict_step(clip)]

    def test_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        """Answer held-out questions."""
        self.model.run(self._ask, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means, at the number of optimiser steps made; Lightning's own count lags by one inside an epoch."""
        means = {f"val/{name}": value for name, value in self.means.compute().items()} | self._benchmark_scores()
        self.log_dict(means, logger=False)
        if not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics({name: float(value) for name, value in means.items()}, step=self.trainer.global_step)

    def on_test_epoch_end(self) -> None:
        """Take the means over all held-out clips and ranks, while everything is where it computes."""
        self.held_out_metrics = {name: float(value) for name, value in self.means.compute().items()}

    def all_outcomes(self) -> list[Outcome]:
        """Every answer since the last start, of all ranks, in the order of the clips' names."""
        return sorted(_of_all_ranks(self.outcomes), key=lambda o: (o.clip, o.view))

    def _benchmark_scores(self) -> dict[str, Tensor]:
        """Of the benchmarks that were asked, over all ranks."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        found: dict[str, Tensor] = {}
        for number, dataset in enumerate(datamodule.benchmarks, start=int(datamodule.held_out is not None)):
            scores = score_results(dataset.loaded, _of_all_ranks(self.answers[number]))
            found |= {
                f"val/{dataset.loaded.name}_{s.metric}": torch.tensor(s.value, device=self.device) for s in scores
            }
        return found

    def _begin_questions(self) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        questions = [] if datamodule.held_out is None else datamodule.held_out_set().all_questions()
        self.means = HeldOutMeans(score_names(questions, self.views)).to(self.device)
        self.outcomes: list[Outcome] = []
        self.answers: dict[int, list[dict[str, Any]]] = defaultdict(list)

    @torch.no_grad()
    def _ask(self, batch: QuestionBatch) -> None:
        """Put a batch's questions about every view; answers go to ``outcomes`` and ``means``."""
        outcomes: list[Outcome] = []
        for view in self.views:
            video = batch.ego_video if view == "ego" else batch.exo_video
            if video is None:
                continue
            visual = self.model.encode(video, view)
            texts = iter(self.generate(batch.prompts, visual[batch.prompt_clip]))
            scores = iter(self.score(batch.options, visual[batch.option_clip]))
            for question in batch.questions:
                row = question.clip
                where = {"clip": batch.ids[row], "ego_visible": batch.ego_visible[row], "view": view}
                if question.options:
                    log_p = [next(scores) for _ in question.options]
                    outcomes.append(judge_choice(question, log_p, **where))
                else:
                    outcomes.append(judge_text(question, next(texts), **where))
        for outcome in outcomes:
            self.means.add(outcome)
        self.outcomes += outcomes

    def predict_step(self, batch: BenchmarkBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Run the requests of a benchmark about one egocentric clip, see ``Evaluator``."""
        rows: list[dict[str, Any]] = self.model.run(self._evaluate_batch, batch)
        return rows

    @torch.no_grad()
    def _evaluate_batch(self, batch: BenchmarkBatch) -> list[dict[str, Any]]:
        visual = None if batch.video is None else self.model.encode(batch.video)[0]
        return Evaluator(self.model.language_model, self.tokenizer).evaluate(batch, visual)

    def generate(self, prompts: TextBatch, visual: Tensor) -> list[str]:
        """Greedy answers to R prompts about float [R, N, D]."""
        eos = int(self.tokenizer.eos_token_id)
        ids = self.model.language_model.generate(
            prompts.input_ids, prompts.attention_mask, visual, MAX_ANSWER_TOKENS, eos, eos
        )
        return [str(text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def score(self, options: TextBatch, visual: Tensor) -> list[tuple[float, int]]:
        """Log-likelihood and number of tokens of R given answers about float [R, N, D]."""
        if not len(options.input_ids):
            return []
        log_p, count = self.model.language_model.token_log_likelihood(
            options.input_ids, options.attention_mask, options.labels, visual
        )
        return list(zip(log_p.tolist(), count.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------------- summary

    def started_from(self) -> dict[str, str]:
        """Digest of what each part starts from."""
        return {part: source.digest for part, source in self.sources.items()}

    def describe(self) -> list[dict[str, Any]]:
        """A row for each part: parameters in all, and trained ones."""
        rows = []
        for part in self.model.parts:
            parameters = self.model.part(part).values()
            total = sum(p.numel() for p in parameters)
            rows.append({"part": part, "parameters": total, "trained": total if part in self.trained else 0})
        return rows

    def on_fit_start(self) -> None:
        """Print and keep what trains."""
        rows = self.describe()
        together = {"part": "together", **{key: sum(row[key] for row in rows) for key in ("parameters", "trained")}}
        cells = [[row["part"], f"{row['parameters']:,}", f"{row['trained']:,}"] for row in [*rows, together]]
        table = markdown_table([["part", "parameters", "trained"], *cells])
        rank_zero_only(print)(table)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("model/parts", table, self.global_step)


def _of_all_ranks(found: list[Found]) -> list[Found]:
    """What every rank found, joined."""
    gathered = [found]
    if dist.is_initialized():
        gathered = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, found)
    return [one for of_rank in gathered for one in of_rank]
