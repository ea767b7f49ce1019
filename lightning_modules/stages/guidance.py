"""Stage 2: the frozen demonstrator guides the learner through the two mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX, ClipBatch
from lightning_modules.losses import (
    Axis,
    CycleForm,
    FeatureStandardizer,
    KLBars,
    Knowledge,
    NextTokens,
    Pool,
    Standardize,
    Statistics,
    contrastive_loss,
    cross_view_attention,
    cycle_consistency_loss,
    guidance_kl_loss,
    log_distributions,
    vtg_loss,
    where_valid,
)
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.stages.base import Stage

_LEAST_CHANGE = 0.05
"""Change of x by F, over the norm of x, below which a run says so at its end."""


@dataclass(frozen=True)
class CycleConfig:
    """Cycle consistency in both directions.

    Attributes:
        weight: of the sum of both directions; with 0, G is not run.
        forward, backward: the directions that count: x -> F -> G -> x and y -> G -> F -> y.
        detach_target: keep the gradient out of the target x, which could otherwise shrink to lower the loss.
        norm: ``channel_std`` gives all channels the same weight: features are divided by running deviations of the
            target, see ``FeatureStandardizer``, which has none yet in the very first step if ``statistics`` is
            ``delayed``.
        form: ``l1`` as in the paper; ``huber`` and ``squared`` are smooth at zero, see ``cycle_consistency_loss``.
        delta: error at which ``huber`` turns from squared to absolute, in deviations with ``channel_std``.
        detach_input: train F and G on x, but not the ego encoder.
    """

    weight: float = 1.0
    forward: bool = True
    backward: bool = True
    detach_target: bool = True
    norm: Literal["none", "channel_std"] = "none"
    form: CycleForm = "l1"
    delta: float = 1.0
    detach_input: bool = False


@dataclass(frozen=True)
class KLConfig:
    """KL(y || F(x)), see ``guidance_kl_loss`` and ``FeatureStandardizer``.

    Attributes:
        weight: after the warm-up.
        tau: temperature.
        axis, pool, standardize: form of the distributions.
        where: ``patches`` compares features of the encoder, y and F(x); ``tokens`` compares the visual tokens that the
            projector makes of both. The projector trains on x and F(x), so that y means less and less to it:
            ``init.exo_projector`` names the projector of stage 1, and y then passes through that one.
        align: ``attention`` compares each position of F(x) with the mean of y that it attends to in the same frame, as
            two cameras show a thing at different positions; ``none`` compares equal positions.
        align_tau: temperature of that attention.
        warmup_fraction: fraction of all steps over which the weight rises from 0.
        detach_input: train F, and with ``tokens`` the projector, but not the ego encoder.
    """

    weight: float = 1.0
    tau: float = 1.0
    axis: Axis = "channel"
    pool: Pool = "none"
    standardize: Standardize = "ema"
    where: Literal["patches", "tokens"] = "patches"
    align: Literal["none", "attention"] = "none"
    align_tau: float = 0.1
    warmup_fraction: float = 0.0
    detach_input: bool = False


@dataclass(frozen=True)
class ContrastiveConfig:
    """Retrieval of y by F(x) among the clips of a micro-batch, see ``contrastive_loss``; not of the paper.

    It compares the same features as the KL, standardised in the same way, with x detached if ``kl.detach_input``.
    """

    weight: float = 0.0
    tau: float = 0.1


@dataclass(frozen=True)
class SelectionConfig:
    """Weight of each pair in the KL by how well the demonstrator knows its text; not of the paper.

    UNIEGO (arXiv 2606.20559) distils, sample by sample, only from teachers that are right and confident. The text is
    the narration. Where a pair has none, the KL of answers follows the demonstrator's own caption, which is right by
    definition, and the KL of features counts the pair fully. Weights are not normalised, so that it does not matter
    how a batch is split: ``guidance/selected`` is their mean.

    Attributes:
        by: ``likelihood``: the probability that the demonstrator gives to the text, as geometric mean over its tokens;
            ``right``: 1 if each token is the demonstrator's likeliest one, else 0; ``none``: 1 for all pairs.
        least: likelihood below which a pair has weight 0.
    """

    by: Literal["none", "likelihood", "right"] = "none"
    least: float = 0.0

    def weights(self, known: Knowledge) -> Tensor:
        """Return the weights of clips, float32 [B]."""
        weight = known.likelihood if self.by == "likelihood" else known.right.to(known.likelihood.dtype)
        return weight * (known.likelihood >= self.least)


@dataclass(frozen=True)
class GuidanceFeatures:
    """Features of one micro-batch of pairs.

    Attributes:
        ego: x, float [B, T, h, w, C].
        exo: y, the same shape; carries no gradient.
        mapped: F(x), the same shape.
        visual: visual tokens of x and F(x), float [B, N, D], those that the language model reads.

    x and F(x) carry no gradient into the ego encoder if ``kl.detach_input``.
    """

    ego: Tensor
    exo: Tensor
    mapped: Tensor
    visual: Tensor


class DemonstratorLearnerGuidance(Stage):
    """Demonstrator-Learner Guidance (Exo2Ego, arXiv 2503.09143) on synchronised pairs.

    The ego encoder, F and G learn by video-text generation with the language model reading x and F(x), by cycle
    consistency, and by KL between the demonstrator's features y and F(x). The exo encoder and the language model are
    frozen; gradients pass through the latter. If all other weights are 0, exocentric video may be missing.

    Where batches hold the other exocentric cameras of a pair (``data.exo_policy: mean``), the KL's target is the mean
    of y over all of them. Patches of two cameras do not show the same place, so that ``kl.pool: all`` belongs to it.

    Args:
        vtg_weight: weight of video-text generation.
        cycle: weight and form of cycle consistency.
        kl: weight and form of the guidance.
        contrastive: weight and temperature of a contrastive term in addition to the KL.
        selection: weight of each pair in the KL. The KL of features then needs a pass of the language model on y, which
            ``init.exo_projector`` projects if it is named; otherwise the projector that trains on x and F(x) does.
        statistics: of the features that are standardised, see ``FeatureStandardizer``.
        **shared: arguments of ``Stage``.

    Raises:
        ValueError: a setting is impossible, or two contradict each other.
    """

    uses: tuple[str, ...] = (
        "exo_encoder",
        "ego_encoder",
        "projector",
        "ego_to_exo",
        "exo_to_ego",
        "language_model",
    )
    optional = ("exo_projector",)
    trains = ("ego_encoder", "projector", "ego_to_exo", "exo_to_ego")
    views = ("ego",)

    def __init__(
        self,
        vtg_weight: float = 1.0,
        cycle: CycleConfig = CycleConfig(),
        kl: KLConfig = KLConfig(),
        contrastive: ContrastiveConfig = ContrastiveConfig(),
        selection: SelectionConfig = SelectionConfig(),
        statistics: Statistics = "delayed",
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if cycle.weight and not (cycle.forward or cycle.backward):
            raise ValueError("model.cycle: got forward and backward false, allowed: one of them true, or weight 0")
        if not 0 <= kl.warmup_fraction <= 1:
            raise ValueError(f"model.kl.warmup_fraction: got {kl.warmup_fraction}, allowed: from 0 to 1")
        if kl.align_tau <= 0:
            raise ValueError(f"model.kl.align_tau: got {kl.align_tau}, allowed: above 0")
        if kl.align != "none" and kl.pool == "all":
            raise ValueError(
                f"model.kl.align: got {kl.align}, but model.kl.pool is all, which leaves no positions: set one to none"
            )
        if kl.where == "tokens" and len(self.network.visual_inputs) < 2:
            raise ValueError(
                f"model.kl.where: got tokens, but network.visual_inputs is [{self.network.visual_inputs[0]}], without "
                "F(x): set network.visual_inputs to [ego, mapped], or model.kl.where to patches"
            )
        if cycle.delta <= 0:
            raise ValueError(f"model.cycle.delta: got {cycle.delta}, allowed: above 0")
        if not 0 <= selection.least <= 1:
            raise ValueError(f"model.selection.least: got {selection.least}, allowed: from 0 to 1")
        if selection.by == "none" and selection.least:
            raise ValueError(
                f"model.selection.least: got {selection.least}, but model.selection.by is none: set by to likelihood "
                "or right"
            )
        if selection.by != "none" and not kl.weight:
            raise ValueError(
                f"model.selection.by: got {selection.by}, but model.kl.weight is 0: set by to none, or the weight "
                "above 0"
            )
        self.vtg_weight, self.cycle, self.kl, self.contrastive = vtg_weight, cycle, kl, contrastive
        self.selection = selection
        self.statistics, self.kl_bars = statistics, KLBars()
        if "exo_projector" in self.uses and not self.projects_exo:
            raise ValueError(
                "model.init.exo_projector: model.kl.where is patches, which pass through no projector: leave it out, "
                "set where to tokens or model.selection.by to likelihood, or use AnswerGuidance"
            )

    @property
    def projects_exo(self) -> bool:
        """True if y passes through a projector."""
        return self.kl.where == "tokens" or self.selection.by != "none"

    @property
    def guides_by_features(self) -> bool:
        """True if the KL of features is a loss, and not only logged."""
        return self.kl.weight > 0

    def attach(self, model: Exo2EgoModel) -> None:
        """Set the model, and add the statistics that standardise the features of the KL and of the cycles."""
        super().attach(model)
        dim = model.language_model.dim if self.kl.where == "tokens" else self.network.encoder_shape.dim
        self.standardizer = FeatureStandardizer(dim, self.kl.standardize, statistics=self.statistics)
        width = self.network.encoder_shape.dim
        views = ("ego", "exo") if self.cycle.norm == "channel_std" else ()
        self.cycle_standardizers = nn.ModuleDict(
            {view: FeatureStandardizer(width, "ema", statistics=self.statistics) for view in views}
        )

    def check_data(self, datamodule: object) -> None:
        """Refuse losses that compare instants of views that are not synchronised."""
        compares_instants = self.guides_by_features and self.kl.pool != "all"
        if compares_instants and not getattr(datamodule, "synchronised", True):
            raise ValueError(
                f"model.kl.pool: got {self.kl.pool}, which compares y and F(x) at the same instants, but the views of "
                "data.index are not synchronised: set model.kl.pool to all, model.kl.weight to 0, or use AnswerGuidance"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the statistics with the features of this step, for the next one."""
        super().on_before_optimizer_step(optimizer)
        for standardizer in (self.standardizer, *self.cycle_standardizers.values()):
            assert isinstance(standardizer, FeatureStandardizer)
            standardizer.update()

    def remarks(self, values: Mapping[str, float]) -> list[str]:
        """Say if F is still close to the identity, or its KL not below that of a constant."""
        found = []
        change, gain = values.get("guidance/mapping_change"), values.get("guidance/gain_over_mean")
        if change is not None and change < _LEAST_CHANGE:
            found.append(f"F changes x by {100 * change:.1f} % of its norm: F(x) is nearly x, so that x is read twice")
        if gain is not None and gain <= 0 and self.guides_by_features:
            found.append(
                f"KL(y || F(x)) is {-gain:.3f} above the KL to the mean of y at each position: F(x) tells less about y "
                "than a constant does"
            )
        return found

    def losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Return video-text generation on x and F(x), KL(y || F(x)) and cycle consistency."""
        ego_video = self.video_of(batch, "ego")
        if batch.exo_video is None:
            if self.kl.weight or self.cycle.weight or self.contrastive.weight:
                raise ValueError(
                    "data.views: got ego alone, but the losses compare with exocentric video: add exo, or set the "
                    "weights of model.kl, model.cycle and model.contrastive to 0"
                )
            return {"vtg": self._generation(self.model.learner_tokens(ego_video), batch)}
        model = self.model
        ego = model.ego_encoder(ego_video)  # paper: x
        with torch.no_grad():
            exo = model.exo_encoder(batch.exo_video)  # paper: y
        mapped = model.ego_to_exo(ego)  # paper: F(x)
        visual = model.learner_view(ego, mapped)
        mean = self.mean_exo(exo, self.other_exo(batch), batch)
        features, of_cycle = self.guided_features(ego, mean, mapped, visual)
        losses = {"vtg": self._generation(visual, batch)}
        target, standardized, feature_kl = self.compare_features(features, batch)
        if self.selection.by != "none":
            form = (self.kl.tau, self.kl.axis, self.kl.pool)
            feature_kl = guidance_kl_loss(target, standardized, batch.valid, *form, self._weights(exo, batch))
        losses["kl"] = self.kl.weight * self._rise() * self.kl_loss(features, batch, feature_kl)
        if self.contrastive.weight:
            losses["contrastive"] = self.contrastive.weight * self._contrastive(target, standardized, batch)
        if self.cycle.weight:
            losses["cycle"] = self.cycle.weight * self._cycles(*of_cycle, exo, batch.valid)
        return losses

    def guided_features(
        self, ego: Tensor, exo: Tensor, mapped: Tensor, visual: Tensor
    ) -> tuple[GuidanceFeatures, tuple[Tensor, Tensor]]:
        """Return the features that the KL compares, and x and F(x) for the cycles, detached from x as configured.

        Args:
            ego, exo, mapped: x, y and F(x), float [B, T, h, w, C].
            visual: visual tokens of x and F(x), float [B, N, D].
        """
        of_kl, of_cycle = self._guided_inputs(ego, mapped)
        read_again = self.kl.detach_input and self.kl.where == "tokens"
        compared = self.model.learner_view(*of_kl) if read_again else visual
        return GuidanceFeatures(of_kl[0], exo, of_kl[1], compared), of_cycle

    def _guided_inputs(self, ego: Tensor, mapped: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return x and F(x) for the KL, and for the cycles; F runs once more on x without its gradient if asked to."""
        of_kl, of_cycle = self.kl.detach_input, bool(self.cycle.weight) and self.cycle.detach_input
        inputs = ego, mapped
        if not (of_kl or of_cycle):
            return inputs, inputs
        detached = ego.detach(), self.model.ego_to_exo(ego.detach())
        return (detached if of_kl else inputs), (detached if of_cycle else inputs)

    @torch.no_grad()
    def _weights(self, exo: Tensor, batch: ClipBatch) -> Tensor:
        """Return the weight of each pair, float32 [B], by what the language model says of y along the narration."""
        logits, targets = self.read_text(self.model.project_exo(exo), replace(batch, source=None))
        clip = clip_of_tokens(batch.text.labels, len(targets))
        known = Knowledge.of(NextTokens.of(logits, self.kl.tau), targets, clip, len(exo))
        weights = self.selection.weights(known)
        if batch.narrated is not None:
            weights = weights.where(batch.narrated, 1.0)
        self.step_log["guidance/selected"] = weights.where(batch.valid, 0.0).mean()
        return weights

    @torch.no_grad()
    def other_exo(self, batch: ClipBatch) -> Tensor | None:
        """Return y of the other exocentric cameras, float [B, V, T, h, w, C]; None if the batch has none."""
        videos = batch.other_exo_video
        if videos is None:
            return None
        encoded = self.model.exo_encoder(videos.flatten(0, 1))
        others: Tensor = encoded.unflatten(0, videos.shape[:2])
        return others

    @staticmethod
    def mean_exo(exo: Tensor, others: Tensor | None, batch: ClipBatch) -> Tensor:
        """Return the mean of y over the exocentric cameras that there are of each pair.

        Args:
            exo: y of the pair's own camera, float [B, T, h, w, C].
            others: see ``other_exo``.
            batch: the micro-batch.
        """
        there = batch.other_exo
        if others is None or there is None:
            return exo
        mean: Tensor = exo + (others * there[..., None, None, None, None]).sum(1)
        return mean / (1 + there.sum(1))[:, None, None, None, None]

    def kl_loss(self, features: GuidanceFeatures, batch: ClipBatch, feature_kl: Tensor) -> Tensor:
        """Return the guidance term before it is weighted; a subclass may return another one.

        Args:
            features: of the micro-batch.
            batch: the micro-batch.
            feature_kl: KL(y || F(x)), float scalar.
        """
        return feature_kl

    def _generation(self, visual: Tensor, batch: ClipBatch) -> Tensor:
        logits, targets = self.read_text(visual, batch)
        return self.vtg_weight * vtg_loss(logits, targets, batch.label_tokens)

    def compare_features(self, features: GuidanceFeatures, batch: ClipBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the features; log KL(y || F(x)), KL(y || x), the bars, and the distance of F from the identity.

        Returns:
            Standardised y and F(x), and KL(y || F(x)).
        """
        valid, form = batch.valid, (self.kl.tau, self.kl.axis, self.kl.pool)
        exo, mapped, ego = self.compared_features(features)
        self.standardizer.observe(exo, valid)
        target, standardized, unmapped = (self.standardizer(feature) for feature in (exo, mapped, ego))
        if self.kl.align == "attention":
            target = cross_view_attention(target, standardized, self.kl.align_tau)
        kl = guidance_kl_loss(target, standardized, valid, *form)
        with torch.no_grad():
            without_mapping = guidance_kl_loss(target, unmapped, valid, *form)
        self.step_log |= {
            "guidance/kl": kl.detach(),
            "guidance/kl_without_mapping": without_mapping,
            "guidance/mapping_change": mapping_change(ego, mapped, valid),
        }
        if self.measures:
            log_p = log_distributions(target.detach(), *form)
            bars = self.kl_bars.of(log_p, valid, self.kl.tau)
            self.step_log |= {f"guidance/kl_{name}": bar for name, bar in bars.items()}
            if "mean" in bars:
                self.step_log["guidance/gain_over_mean"] = bars["mean"] - kl.detach()
            self.kl_bars.observe(log_p, valid)
        return target, standardized, kl

    def compared_features(self, features: GuidanceFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, F(x) and x, float [B, T, h, w, C], or their visual tokens as [B, 1, 1, N, D]."""
        if self.kl.where != "tokens":
            return features.exo, features.mapped, features.ego
        with torch.no_grad():
            target = self.model.project_exo(features.exo)
        unmapped, mapped = features.visual.chunk(2, dim=1)
        return target[:, None, None], mapped[:, None, None], unmapped[:, None, None]

    def _contrastive(self, target: Tensor, mapped: Tensor, batch: ClipBatch) -> Tensor:
        """Return the contrastive loss; samples of the same clip are no counterexamples to each other."""
        clips = {name: number for number, name in enumerate(dict.fromkeys(batch.ids))}
        number = torch.tensor([clips[name] for name in batch.ids]).to(batch.valid.device, non_blocking=True)
        return contrastive_loss(target, mapped, batch.valid, number != number[:, None], self.contrastive.tau)

    def _rise(self) -> float:
        """Return the factor on the weight of the KL, which rises to 1 during the warm-up."""
        rising = self.kl.warmup_fraction * self.total_steps() if self.kl.warmup_fraction else 0.0
        return min(1.0, (self.trainer.global_step + 1) / (rising + 1)) if rising else 1.0

    def _cycles(self, ego: Tensor, mapped: Tensor, exo: Tensor | None, valid: Tensor) -> Tensor:
        """Return the sum of the directions: G(F(x)) against x, F(G(y)) against y, for which y must be there."""
        model, directions = self.model, {}
        if self.cycle.forward:
            target = ego.detach() if self.cycle.detach_target else ego
            round_trip = model.exo_to_ego(mapped)
            if self.measures and not self.cycle.backward:
                self.step_log["guidance/mapping_change_back"] = mapping_change(mapped, round_trip, valid)
            directions["ego"] = self._cycle("ego", target, round_trip, valid)
        if self.cycle.backward:
            assert exo is not None
            as_ego = model.exo_to_ego(exo)
            if self.measures:
                self.step_log["guidance/mapping_change_back"] = mapping_change(exo, as_ego, valid)
            round_trip = model.ego_to_exo(as_ego)
            directions["exo"] = self._cycle("exo", exo, round_trip, valid)
        self.step_log |= {f"guidance/cycle_{view}": loss.detach() for view, loss in directions.items()}
        return torch.stack(list(directions.values())).sum()

    def _cycle(self, view: str, target: Tensor, round_trip: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of one direction; its statistics do not depend on how a global batch is split."""
        if self.cycle.norm == "channel_std":
            standardizer = self.cycle_standardizers[view]
            assert isinstance(standardizer, FeatureStandardizer)
            standardizer.observe(target, valid)
            target, round_trip = standardizer(target), standardizer(round_trip)
        return cycle_consistency_loss(target, round_trip, valid, self.cycle.form, self.cycle.delta)


def clip_of_tokens(labels: Tensor, count: int) -> Tensor:
    """Return the row of each supervised token, int64 [M], in the order of ``Stage.read_text``.

    Args:
        labels: int64 [B, L].
        count: M; the first token of a row is never one of them.
    """
    tokens = (labels[:, 1:] != IGNORE_INDEX).sum(1)
    return torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens, output_size=count)


@torch.no_grad()
def mapping_change(features: Tensor, mapped: Tensor, valid: Tensor) -> Tensor:
    """Return the norm of the difference over that of the features, of the clips that are valid; 0 for the identity."""
    change, size = (where_valid(valid, f, f.new_zeros(())).norm() for f in (mapped - features, features))
    share: Tensor = change / size.clamp(min=1e-12)
    return share
