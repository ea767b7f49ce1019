"""The losses of Exo2Ego (arXiv 2503.09143), video-text generation, cycle consistency and guidance, and word grounding.

Clips that could not be read are masked (``ClipBatch.valid``): they add nothing to a loss and give no gradient, while
the other clips keep their weight, so that it matters neither how a batch is split nor which ranks know of the failure.

Letters: ``B`` clips, ``T`` frames, ``h`` and ``w`` patch rows and columns, ``C`` encoder width, ``M`` supervised
tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["none", "time", "all"]
Axis = Literal["channel", "spatial"]
Standardize = Literal["ema", "token", "none"]
CycleForm = Literal["l1", "huber", "squared"]
Statistics = Literal["delayed", "immediate"]


def vtg_loss(logits: Tensor, targets: Tensor, label_tokens: float) -> Tensor:
    """Video-text generation: next-token cross-entropy of the text given the clip.

    Args:
        logits: float32 [M, V].
        targets: int64 [M].
        label_tokens: divisor of the sum, see ``ClipBatch.label_tokens``.

    Returns:
        float scalar; averaged over ranks and accumulated micro-batches it is the mean over the global batch's tokens.
    """
    return F.cross_entropy(logits, targets, reduction="sum") / label_tokens


def grounding_loss(
    visual: Tensor, words: Tensor, ids: Tensor, clip: Tensor, shown: Tensor, scale: float = 20.0
) -> Tensor:
    """Word grounding: in which clips of the micro-batch does the answer have a word, told from the visual tokens?

    A clip's score for a word is the log-mean-exp over its visual tokens of ``scale`` times the cosine between the token
    and the word's embedding, so that visual tokens turn into words that the language model knows. Words are compared
    between the clips of the micro-batch alone: embeddings are centred on their mean, scores on theirs, and a word that
    all or none of the clips have adds nothing. FILIP (arXiv 2111.07783) compares images and captions by tokens, too.

    Args:
        visual: float [B, N, D].
        words: float [M, D], embeddings of the answers' tokens; they are targets and get no gradient.
        ids: int64 [M], the tokens.
        clip: int64 [M], the row of each token's clip.
        shown: bool [B], whether a row has a video, and it could be read.
        scale: of the cosine.

    Returns:
        float scalar >= 0: binary cross-entropy, summed over different words and averaged over the clips with video.
    """
    some = shown.sum().clamp(min=1)
    same = (ids[:, None] == ids).float()
    in_clip = (torch.arange(len(visual), device=clip.device)[:, None] == clip).float()  # [B, M]
    present = ((in_clip @ same) > 0).float() * shown[:, None]  # [B, M]
    share = present.sum(0) / some
    tells = (share > 0) & (share < 1)
    weight = tells / same.sum(0)  # a word that occurs several times counts once
    words = words.detach().float()
    centre = (weight[:, None] * words).sum(0) / weight.sum().clamp(min=1)
    words = F.normalize(words - centre, dim=-1)
    scores = scale * F.normalize(visual.float(), dim=-1) @ words.T  # [B, N, M]
    scores = scores.logsumexp(1) - math.log(visual.shape[1])
    scores = scores - (scores * shown[:, None]).sum(0) / some
    logits = scores + torch.logit(share.where(tells, 0.5))
    each = F.binary_cross_entropy_with_logits(logits, present, reduction="none") * shown[:, None]
    return (each.sum(0) * weight).sum() / some


class NextTokens(NamedTuple):
    """Distributions of the next token at M positions: all of the vocabulary, or the likeliest tokens and the rest.

    Attributes:
        log_probs: float32 [M, K].
        tokens: int64 [M, K], the tokens that ``log_probs`` are of; None for all, in the order of the vocabulary.
        log_rest: float32 [M], of all other tokens together; None with ``tokens``.
    """

    log_probs: Tensor
    tokens: Tensor | None = None
    log_rest: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, tau: float) -> NextTokens:
        """Return the softmax at temperature ``tau`` of logits, float32 [M, V]; carries no gradient."""
        return cls((logits.detach() / tau).log_softmax(-1))

    def top(self, count: int) -> NextTokens:
        """Keep the ``count`` likeliest tokens of each position, and the probability of all others together."""
        assert self.tokens is None, "of all of the vocabulary"
        log_probs, tokens = self.log_probs.topk(min(count, self.log_probs.shape[-1]), dim=-1)
        return NextTokens(log_probs, tokens, _log_rest(self.log_probs, tokens))


class Knowledge(NamedTuple):
    """Likelihood and correctness of the texts of some clips to a demonstrator.

    Attributes:
        likelihood: float32 [B], geometric mean of the probabilities of a clip's tokens; 0 for clips without any.
        right: bool [B], every token is the likeliest one in its place; false for clips without any.
    """

    likelihood: Tensor
    right: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, given: NextTokens, tokens: Tensor, clip: Tensor, clips: int) -> Knowledge:
        """Measure how well distributions predict the tokens of a text.

        Args:
            given: of M tokens. A token that is not among the likeliest ones counts as all of these others.
            tokens: int64 [M], the text.
            clip: int64 [M], the row of each token's clip.
            clips: B.
        """
        if given.tokens is None:
            log_p, likeliest = given.log_probs.gather(-1, tokens[:, None])[:, 0], given.log_probs.argmax(-1)
        else:
            assert given.log_rest is not None
            among = given.tokens == tokens[:, None]
            log_p = given.log_probs.masked_fill(~among, -torch.inf).amax(-1)
            log_p = log_p.where(among.any(-1), given.log_rest)
            likeliest = given.tokens.gather(-1, given.log_probs.argmax(-1, keepdim=True))[:, 0]
        sums = log_p.new_zeros(clips, 3)
        each = torch.stack([log_p, (likeliest != tokens).to(log_p.dtype), torch.ones_like(log_p)], dim=1)
        log_likelihood, wrong, count = sums.index_add(0, clip, each).unbind(1)
        some = count > 0
        return cls((log_likelihood / count.clamp(min=1)).exp().where(some, 0.0), some & (wrong == 0))


def answer_kl_loss(
    target: NextTokens, logits: Tensor, clip: Tensor, clips: int, tau: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """KL of next-token distributions, the demonstrator's first: averaged over each clip's tokens, then over clips.

    Where the target has the likeliest tokens alone, all others count as one, which can only lower the KL.

    Args:
        target: of M tokens, at temperature ``tau``.
        logits: float32 [M, V], those that read x and F(x) before the same tokens.
        clip: int64 [M], the row of each token's clip. Clips without any token, such as corrupt ones, add nothing and
            the others keep their weight.
        clips: B.
        tau: temperature; the loss is multiplied by its square.
        weight: float [B], weights of the clips; None for 1.

    Returns:
        float scalar >= 0.
    """
    log_q = (logits / tau).log_softmax(-1)
    log_p, kept = target.log_probs, log_q if target.tokens is None else log_q.gather(-1, target.tokens)
    divergence = (log_p.exp() * (log_p - kept)).sum(-1)
    if target.tokens is not None and target.log_rest is not None:
        rest = target.log_rest
        divergence = divergence + rest.exp() * (rest - _log_rest(log_q, target.tokens))
    tokens = divergence.new_zeros(clips).index_add(0, clip, torch.ones_like(divergence))
    if weight is not None:
        divergence = divergence * weight.index_select(0, clip)
    return tau**2 * (divergence / tokens.index_select(0, clip)).sum() / clips


def _log_rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of all tokens but the given ones, float [M]; the lowest number if there are none."""
    lowest = torch.finfo(log_probs.dtype).min
    if tokens.shape[-1] == log_probs.shape[-1]:
        return log_probs.new_full(log_probs.shape[:-1], lowest)
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1).clamp(min=lowest)


@torch.no_grad()
def loss_by_source(logits: Tensor, targets: Tensor, source: Tensor, sources: int) -> Tensor:
    """Return the sums behind ``vtg_loss`` source by source; for curves only.

    Args:
        logits: float32 [M, V].
        targets: int64 [M].
        source: int64 [M], the source of each token.
        sources: S, number of sources.

    Returns:
        float32 [S, 2], on the device and without waiting for it: sum of the token losses, and number of tokens.
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    of_source = source == torch.arange(sources, device=source.device)[:, None]  # [S, M]
    return of_source.float() @ torch.stack([losses, torch.ones_like(losses)], dim=1)


def cycle_consistency_loss(
    feature: Tensor, round_trip: Tensor, valid: Tensor, form: CycleForm = "l1", delta: float = 1.0
) -> Tensor:
    """Distance of features to themselves after a round trip through both mappings.

    The paper writes an L1 norm; averaged over elements here, so that the weight does not depend on the number of
    patches. The gradient of L1 has the same size however small the error, so that mappings near the identity are
    pushed around by its signs; the other two forms are smooth at zero.

    Args:
        feature: float [B, T, h, w, C], the target.
        round_trip: the same shape, after F then G or G then F.
        valid: bool [B], the clips that count.
        form: ``l1``: absolute error; ``huber``: squared below ``delta``, with the slope of L1 above it; ``squared``.
        delta: error at which ``huber`` turns from squared to absolute, in the unit of the features.

    Returns:
        float scalar >= 0.

    Raises:
        ValueError: the round trip changed the shape.
    """
    if feature.shape != round_trip.shape:
        raise ValueError(f"round trip gave {tuple(round_trip.shape)}, expected {tuple(feature.shape)}")
    counted = where_valid(valid, round_trip, feature)
    if form == "huber":
        return F.smooth_l1_loss(counted, feature, beta=delta)
    return F.mse_loss(counted, feature) if form == "squared" else F.l1_loss(counted, feature)


def where_valid(valid: Tensor, feature: Tensor, other: Tensor) -> Tensor:
    """Feature, float [B, T, h, w, C], with the clips that are not valid taken from ``other``."""
    return torch.where(valid[:, None, None, None, None], feature, other)


def guidance_kl_loss(
    target: Tensor,
    mapped: Tensor,
    valid: Tensor,
    tau: float = 1.0,
    axis: Axis = "channel",
    pool: Pool = "none",
    weight: Tensor | None = None,
) -> Tensor:
    """KL(y || F(x)): the exocentric features' distribution against that of the mapped egocentric ones.

    Softmax at temperature tau over the channels of each position (or over the positions of each channel), divergence
    with the target first, averaged over distributions, times tau squared. The target is detached.

    Args:
        target: float [B, T, h, w, C], standardised y.
        mapped: the same shape, F(x) standardised with the same statistics.
        valid: bool [B], the clips that count.
        tau: temperature.
        axis: ``channel``: distributions over C; ``spatial``: over h and w.
        pool: average over ``time``, or over ``all`` positions, before the softmax.
        weight: float [B], weights of the clips; None for 1.

    Returns:
        float32 scalar >= 0.
    """
    target = target.detach()
    log_p, log_q = (
        log_distributions(f, tau, axis, pool).flatten(0, 2) for f in (target, where_valid(valid, mapped, target))
    )
    if weight is None:
        return tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    of_each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return tau**2 * (of_each.view(len(weight), -1).mean(1) * weight).mean()


def log_distributions(features: Tensor, tau: float = 1.0, axis: Axis = "channel", pool: Pool = "none") -> Tensor:
    """Return the distributions that ``guidance_kl_loss`` compares, as logarithms.

    Args:
        features: float [B, T, h, w, C], standardised.
        tau, axis, pool: as there.

    Returns:
        float32 [B, T, P, K]: with ``channel``, P = h * w positions and K = C; with ``spatial``, P = C and K = h * w.
        Dimensions that ``pool`` averages over are 1.
    """
    x = features.float().flatten(2, 3)
    if pool == "time":
        x = x.mean(1, keepdim=True)
    elif pool == "all":
        x = x.mean((1, 2), keepdim=True)
    if axis == "spatial":
        x = x.transpose(2, 3)
    return F.log_softmax(x / tau, dim=-1)


@torch.no_grad()
def cross_view_attention(target: Tensor, mapped: Tensor, tau: float) -> Tensor:
    """Return y as it is seen from the positions of F(x): for each of them a mean over y's positions in the same frame.

    Its weights are a softmax of cosines, so that positions that show alike things meet wherever two cameras have them.
    There is nothing to train, and nothing of it is left at inference.

    Args:
        target: float [B, T, h, w, C], standardised y.
        mapped: the same shape, F(x) standardised with the same statistics.
        tau: temperature; with a large one every position meets the mean of the frame.

    Returns:
        float32, the same shape.
    """
    keys = target.float().flatten(2, 3)  # [B, T, P, C]
    queries = F.normalize(mapped.float().flatten(2, 3), dim=-1)
    weights = (queries @ F.normalize(keys, dim=-1).transpose(-1, -2) / tau).softmax(-1)
    return (weights @ keys).view(target.shape)


class KLBars:
    """KL of y to what knows nothing of the clip: bars that KL(y || F(x)) must be below to mean something.

    The first bar is the mean of y's distributions at each position over the clips and frames seen before: no constant
    is closer to y. The second is the uniform distribution. For curves only: nothing of it is kept in checkpoints, and
    each rank has its own mean.

    Args:
        longest: number of batches that the mean is taken over; later ones count as one of as many.
    """

    def __init__(self, longest: int = 50) -> None:
        self.longest, self.batches = longest, 0
        self.mean: Tensor | None = None  # [P, K]

    @torch.no_grad()
    def observe(self, log_p: Tensor, valid: Tensor) -> None:
        """Add the distributions of a batch, of the clips that bool [B] marks, to the mean."""
        counted = valid[:, None, None, None]
        clips = valid.sum()
        mean = (log_p.exp() * counted).sum((0, 1)) / (clips.clamp(min=1) * log_p.shape[1])
        self.batches += 1
        if self.mean is None:
            self.mean = mean
        else:
            share = torch.where(clips > 0, 1 / min(self.batches, self.longest), 0.0)
            self.mean = self.mean.lerp(mean, share)

    @torch.no_grad()
    def of(self, log_p: Tensor, valid: Tensor, tau: float = 1.0) -> dict[str, Tensor]:
        """Return the KL of a batch to each bar by name, scaled and averaged as ``guidance_kl_loss`` does.

        Args:
            log_p: float32 [B, T, P, K], see ``log_distributions``.
            valid: bool [B], the clips that count.
            tau: temperature of the distributions.

        Returns:
            ``mean``, once a batch has been observed, and ``uniform``; float32 scalars.
        """
        p = log_p.exp()
        bars = {"uniform": torch.full_like(log_p[0, 0], -math.log(log_p.shape[-1]))}
        if self.mean is not None:
            bars["mean"] = self.mean.clamp(min=torch.finfo(self.mean.dtype).tiny).log()
        found = {}
        for name, log_q in bars.items():
            of_clips = (p * (log_p - log_q)).sum(-1).mean((1, 2))
            found[name] = tau**2 * of_clips.where(valid, 0.0).mean()
        return found


def contrastive_loss(target: Tensor, mapped: Tensor, valid: Tensor, different: Tensor, tau: float = 0.1) -> Tensor:
    """Find y by F(x) among the micro-batch's other clips, by the cosine of features averaged over all positions.

    Not of the paper. A clip is told apart from the other clips of its micro-batch on its rank, so that
    unlike the other losses this one depends on how a global batch is split. The target is detached.

    Args:
        target: float [B, T, h, w, C], standardised y.
        mapped: the same shape, F(x) standardised with the same statistics.
        valid: bool [B], the clips that count.
        different: bool [B, B], clips that show different things; others are no counterexamples to each other.
        tau: temperature.

    Returns:
        float32 scalar >= 0: cross-entropy, summed over valid clips and divided by B.
    """
    y, x = (
        F.normalize(where_valid(valid, f, f.new_zeros(())).float().mean((1, 2, 3)), dim=-1)
        for f in (target.detach(), mapped)
    )
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = (x @ y.T / tau).masked_fill(~(itself | different & valid), -torch.inf)
    log_p = logits.log_softmax(dim=1).diagonal()
    return -log_p.where(valid, 0.0).sum() / len(x)


class FeatureStandardizer(nn.Module):
    """Bring features to zero mean and unit deviation per channel, by the statistics of a target, such as y.

    CLIP features carry a few channels far larger than the rest, on which an unstandardised softmax would spend all its
    mass. ``ema`` keeps running statistics of the target, averaged over ranks, fixed within an optimiser step so that
    they do not depend on how its batch is split, and fixed in evaluation. ``token`` standardises each position over its
    channels; ``none`` leaves features as they are.

    Args:
        dim: C.
        kind: which statistics.
        momentum: share of the running statistics that stays at each update.
        statistics: ``delayed``: the first step has none yet, and the variance is E[x^2] - E[x]^2 in float32, which
            loses its digits where a channel's mean is far above its deviation. ``immediate``: the first step is
            standardised by what was observed in it so far, on all ranks, and the variance is that of centred
            features, combined as by Chan, Golub and LeVeque (1979).
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, dim: int, kind: Standardize, momentum: float = 0.99, statistics: Statistics = "delayed") -> None:
        super().__init__()
        self.kind, self.momentum, self.statistics = kind, momentum, statistics
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("updates", torch.zeros(1))
        self._observed: list[Tensor] = []  # a row for each micro-batch of this rank since the last update
        self._started = False  # True once ``updates`` is known to be above 0

    @torch.no_grad()
    def observe(self, target: Tensor, valid: Tensor) -> None:
        """Record float [B, T, h, w, C], of the clips that bool [B] marks, for the next update."""
        if self.kind != "ema" or not self.training or target.is_meta:
            return
        flat = where_valid(valid, target.float(), target.new_zeros(())).flatten(0, -2)
        positions = valid.sum().to(flat.dtype) * (len(flat) // len(target))
        if self.statistics == "delayed":
            self._observed.append(torch.cat([flat.sum(0), flat.square().sum(0), positions[None]]))
            return
        mean = flat.sum(0) / positions.clamp(min=1)
        counted = valid.repeat_interleave(len(flat) // len(target), output_size=len(flat))[:, None]
        self._observed.append(torch.cat([mean, ((flat - mean).square() * counted).sum(0), positions[None]]))
        self._started = self._started or bool(self.updates > 0)
        if not self._started:
            mean, variance, positions = self._of_observed()
            self.mean.copy_(mean.where(positions > 0, self.mean))
            self.variance.copy_(variance.where(positions > 0, self.variance))

    @torch.no_grad()
    def update(self) -> None:
        """Update the running statistics with the features that all ranks observed since the last update."""
        if not self._observed:
            return
        mean, variance, positions = self._of_observed()
        self._observed = []
        keep = torch.where(self.updates > 0, self.momentum, 0.0).where(positions > 0, 1.0)
        self.mean.lerp_(mean, (1 - keep).expand_as(self.mean))
        self.variance.lerp_(variance, (1 - keep).expand_as(self.variance))
        self.updates += positions > 0

    def _of_observed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance, float [C], and number of positions of what all ranks observed."""
        rows = torch.stack(self._observed)
        if self.statistics == "delayed":
            sums = _over_ranks(rows.sum(0))
            positions = sums[-1]
            mean, square = (sums[:-1] / positions.clamp(min=1)).chunk(2)
            return mean, (square - mean.square()).clamp(min=0), positions
        counts = rows[:, -1:]
        means, squares = rows[:, :-1].chunk(2, dim=1)
        sums = _over_ranks(torch.cat([(counts * means).sum(0), counts.sum(0)]))
        positions = sums[-1]
        mean = sums[:-1] / positions.clamp(min=1)
        centred = _over_ranks((squares + counts * (means - mean).square()).sum(0))
        return mean, centred / positions.clamp(min=1), positions

    def forward(self, features: Tensor) -> Tensor:
        """Standardise float [B, T, h, w, C]."""
        if self.kind == "none":
            return features
        if self.kind == "token":
            return F.layer_norm(features.float(), features.shape[-1:])
        return (features.float() - self.mean) / (self.variance + 1e-6).sqrt()


def _over_ranks(sums: Tensor) -> Tensor:
    """Add up the sums of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
