"""Losses against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.losses import (
    FeatureStandardizer,
    KLBars,
    Knowledge,
    NextTokens,
    answer_kl_loss,
    contrastive_loss,
    cross_view_attention,
    cycle_consistency_loss,
    grounding_loss,
    guidance_kl_loss,
    log_distributions,
    vtg_loss,
)

LN3 = math.log(3)
VALID = torch.tensor([True])
KL_QUARTERS = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # KL((3/4, 1/4) || (1/2, 1/2))


def features(rows, frames=1):
    """[positions of all frames][channels] to [1, T, 1, w, C]."""
    values = torch.tensor(rows)
    return values.view(1, frames, 1, len(values) // frames, -1)


def test_vtg_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, LN3]])  # p(target) 1/2 and 1/4
    loss = vtg_loss(logits, torch.tensor([0, 0]), label_tokens=2)
    torch.testing.assert_close(loss, torch.tensor(1.5 * math.log(2)))


def grounding(visual, texts, shown=None, scale=3.0):
    """Clips of visual tokens and the token ids of their answers; the word of id i has the unit vector of axis i."""
    visual = torch.tensor(visual, dtype=torch.float)
    ids = torch.tensor([token for text in texts for token in text])
    clip = torch.tensor([row for row, text in enumerate(texts) for _ in text])
    shown = torch.ones(len(texts), dtype=torch.bool) if shown is None else torch.tensor(shown)
    words = torch.eye(visual.shape[-1])[ids]
    return grounding_loss(visual, words, ids, clip, shown, scale)


def test_grounding_by_hand():
    # Words 0 and 1, centred, point opposite ways, and each clip has one visual token along its own word.
    along = [[[1.0, 0.0]], [[0.0, 1.0]]]
    score = 3 / math.sqrt(2)  # the cosine of 45 degrees
    expected = 2 * math.log1p(math.exp(-score))  # two words, averaged over two clips that are equally wrong
    torch.testing.assert_close(grounding(along, [[0], [1]]), torch.tensor(expected))
    swapped = grounding(along, [[1], [0]])
    torch.testing.assert_close(swapped, torch.tensor(2 * math.log1p(math.exp(score))))


def test_grounding_takes_the_log_mean_exp_over_visual_tokens():
    first = [[1.0, -1.0], [-1.0, 1.0]]  # one token for word 0, one against it
    score = math.log((math.exp(3) + math.exp(-3)) / 2)
    other = [[-1.0, 1.0], [-1.0, 1.0]]
    centred = (score + 3) / 2  # of both clips' scores for word 0
    both = math.log1p(math.exp(-centred)) + math.log1p(math.exp(-(3 - score) / 2))
    torch.testing.assert_close(grounding([first, other], [[0], [1]]), torch.tensor(both))


def test_grounding_starts_at_the_entropy_of_the_words():
    """Equal visual tokens tell nothing, so that each word is as likely as it is frequent."""
    same = [[[1.0, 2.0, 3.0, 4.0]]] * 4
    loss = grounding(same, [[0, 1], [0, 1], [0, 2], [0]])
    entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.5, 0.25)]
    torch.testing.assert_close(loss, torch.tensor(sum(entropy)))


def test_grounding_counts_each_word_once_and_rows_with_video_alone():
    visual = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).tolist()
    expected = grounding(visual, [[0, 1], [0, 2], [3]])
    torch.testing.assert_close(grounding(visual, [[0, 1, 1, 0], [2, 0], [3, 3]]), expected)
    hidden = [*visual, [[9.0, 9.0, 9.0, 9.0]] * 2]
    torch.testing.assert_close(grounding(hidden, [[0, 1], [0, 2], [3], []], [True, True, True, False]), expected)


@pytest.mark.parametrize("texts", [[[0]], [[]]])
def test_grounding_of_a_single_clip_is_zero_with_zero_gradients(texts):
    visual = torch.ones(1, 2, 3, requires_grad=True)
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.long)
    loss = grounding_loss(visual, torch.eye(3)[ids], ids, torch.zeros_like(ids), torch.tensor([True]))
    loss.backward()
    assert loss == 0 and not visual.grad.any()


def test_grounding_leaves_the_embeddings_alone():
    visual, words = torch.randn(2, 1, 3, requires_grad=True), torch.eye(3)[:2].requires_grad_()
    one_each = torch.tensor([0, 1])
    grounding_loss(visual, words, one_each, one_each, torch.tensor([True, True])).backward()
    assert words.grad is None and visual.grad.any()


def test_vtg_of_unequal_micro_batches_averages_to_the_mean_over_all_tokens():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    per_micro_batch = 7 / 2
    parts = [vtg_loss(logits[rows], targets[rows], per_micro_batch) for rows in (slice(0, 6), slice(6, 7))]
    averaged = torch.stack(parts).mean()
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(averaged, expected)
    (gradient,) = torch.autograd.grad(averaged, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_cycle_by_hand():
    feature = features([[1.0, 2.0], [3.0, 4.0]])
    round_trip = feature + torch.tensor([0.5, -0.25])
    torch.testing.assert_close(cycle_consistency_loss(feature, round_trip, VALID), torch.tensor(0.375))
    assert cycle_consistency_loss(feature, feature, VALID) == 0


@pytest.mark.parametrize(
    ("form", "delta", "expected"),
    [
        ("l1", 1.0, 0.375),
        ("squared", 1.0, (0.5**2 + 0.25**2) / 2),
        ("huber", 1.0, (0.5**2 + 0.25**2) / 4),
        ("huber", 0.3, (0.5 - 0.15 + 0.25**2 / 0.6) / 2),  # absolute above 0.3
    ],
)
def test_cycle_forms_by_hand(form, delta, expected):
    feature = features([[1.0, 2.0], [3.0, 4.0]])
    round_trip = (feature + torch.tensor([0.5, -0.25])).requires_grad_()
    loss = cycle_consistency_loss(feature, round_trip, VALID, form, delta)
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize(("form", "vanishes"), [("l1", False), ("huber", True), ("squared", True)])
def test_the_gradient_of_a_smooth_cycle_loss_vanishes_with_the_error(form, vanishes):
    feature, sizes = torch.randn(1, 1, 2, 2, 4, generator=torch.Generator().manual_seed(0)), []
    for error in (1e-1, 1e-4):
        round_trip = (feature + error).requires_grad_()
        cycle_consistency_loss(feature, round_trip, VALID, form).backward()
        sizes.append(float(round_trip.grad.norm()))
    assert (sizes[1] < 0.01 * sizes[0]) == vanishes
    assert (sizes[1] == pytest.approx(sizes[0])) != vanishes


def test_cycle_refuses_a_changed_shape():
    with pytest.raises(ValueError, match=r"round trip gave \(1, 1, 1, 1, 2\), expected \(1, 1, 1, 2, 2\)"):
        cycle_consistency_loss(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 1, 2), VALID)


@pytest.mark.parametrize(
    ("rows", "axis", "expected"),
    [
        ([[LN3, 0.0], [0.0, 0.0]], "channel", KL_QUARTERS / 2),  # one position of two
        ([[LN3, 0.0], [LN3, 0.0]], "channel", KL_QUARTERS),
        ([[LN3, 0.0], [LN3, 0.0]], "spatial", 0.0),  # both positions alike
        ([[LN3, LN3], [0.0, 0.0]], "spatial", KL_QUARTERS),
        ([[LN3, LN3], [0.0, 0.0]], "channel", 0.0),
        ([[LN3, 0.0], [0.0, 0.0]], "spatial", KL_QUARTERS / 2),  # one channel of two
    ],
)
def test_kl_axis_by_hand(rows, axis, expected):
    loss = guidance_kl_loss(features(rows), torch.zeros(1, 1, 1, 2, 2), VALID, axis=axis)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_kl_has_the_target_first():
    target, mapped = features([[LN3, 0.0]]), features([[math.log(9), 0.0]])  # (3/4, 1/4) and (9/10, 1/10)
    expected = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    torch.testing.assert_close(guidance_kl_loss(target, mapped, VALID), torch.tensor(expected))
    reverse = 0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)
    torch.testing.assert_close(guidance_kl_loss(mapped, target, VALID), torch.tensor(reverse))


def test_kl_temperature_divides_logits_and_scales_the_loss_by_its_square():
    target = features([[2 * LN3, 0.0]])
    loss = guidance_kl_loss(target, torch.zeros_like(target), VALID, tau=2.0)
    torch.testing.assert_close(loss, torch.tensor(4 * KL_QUARTERS))


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("none", (81 / 82 * math.log(81 / 41) + 1 / 82 * math.log(1 / 41)) / 4),  # (81/82, 1/82), one position of four
        ("time", (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2),  # averages to 2 ln 3: (9/10, 1/10)
        ("all", KL_QUARTERS),  # averages to ln 3
    ],
)
def test_kl_pooling_by_hand(pool, expected):
    target = features([[4 * LN3, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], frames=2)
    loss = guidance_kl_loss(target, torch.zeros_like(target), VALID, pool=pool)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_kl_moves_the_mapped_features_only():
    target, mapped = features([[LN3, 0.0]]).requires_grad_(), features([[0.0, 0.0]]).requires_grad_()
    guidance_kl_loss(target, mapped, VALID).backward()
    assert target.grad is None
    torch.testing.assert_close(mapped.grad, features([[-0.25, 0.25]]))  # q - p


def test_kl_of_equal_features_is_zero():
    feature = torch.randn(2, 3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    for axis in ("channel", "spatial"):
        assert abs(guidance_kl_loss(feature, feature.clone(), VALID.repeat(2), axis=axis)) < 1e-6


def step(standardizer, target, valid):
    standardizer.observe(target, valid)
    standardizer.update()


def test_standardizer_is_fixed_within_a_step_and_then_takes_all_of_it_in():
    whole, split = FeatureStandardizer(1, "ema", momentum=0.5), FeatureStandardizer(1, "ema", momentum=0.5)
    batch = features([[1.0], [3.0], [8.0], [4.0]])
    step(whole, batch, VALID)
    for half in batch.split(2, dim=3):
        split.observe(half, VALID)
        assert (split.mean.item(), split.variance.item()) == (0.0, 1.0)
    split.update()
    assert (split.mean.item(), split.variance.item()) == (whole.mean.item(), whole.variance.item()) == (4.0, 6.5)
    split.update()
    assert (split.mean.item(), split.updates.item()) == (4.0, 1.0)


def test_standardizer_starts_with_the_first_batch_then_averages():
    standardizer = FeatureStandardizer(2, "ema", momentum=0.9)
    step(standardizer, features([[1.0, 10.0], [3.0, 30.0]]), VALID)
    torch.testing.assert_close(standardizer.mean, torch.tensor([2.0, 20.0]))
    torch.testing.assert_close(standardizer.variance, torch.tensor([1.0, 100.0]))
    step(standardizer, features([[4.0, 20.0], [4.0, 20.0]]), VALID)
    torch.testing.assert_close(standardizer.mean, torch.tensor([2.2, 20.0]))
    torch.testing.assert_close(standardizer.variance, torch.tensor([0.9, 90.0]))
    expected = torch.tensor([(4.2 - 2.2) / math.sqrt(0.9), (20 - 90) / math.sqrt(90)])
    torch.testing.assert_close(standardizer(features([[4.2, -50.0]])).flatten(), expected)


def test_immediate_statistics_serve_the_first_step_and_no_split_changes_those_after_it():
    whole, split = (FeatureStandardizer(1, "ema", momentum=0.5, statistics="immediate") for _ in range(2))
    batch = torch.tensor([1.0, 3.0, 8.0, 4.0]).view(2, 1, 1, 2, 1)
    whole.observe(batch, torch.ones(2, dtype=torch.bool))
    assert (whole.mean.item(), whole.variance.item(), whole.updates.item()) == (4.0, 6.5, 0.0)
    for clip, expected in zip(batch.split(1), [(2.0, 1.0), (4.0, 6.5)], strict=True):
        split.observe(clip, VALID)
        assert (split.mean.item(), split.variance.item()) == expected
    for standardizer in (whole, split):
        standardizer.update()
        assert (standardizer.mean.item(), standardizer.variance.item(), standardizer.updates.item()) == (4.0, 6.5, 1.0)
        standardizer.observe(batch + 2, torch.tensor([True, False]))
        assert standardizer.mean.item() == 4.0  # fixed within a later step
        standardizer.update()
        assert (standardizer.mean.item(), standardizer.variance.item()) == (4.0, 3.75)


def test_immediate_statistics_keep_the_digits_of_a_large_mean():
    feature = 4000 + torch.randn(8, 1, 16, 16, 2, generator=torch.Generator().manual_seed(0))
    variance = feature.double().var((0, 1, 2, 3), correction=0)
    errors = {}
    for statistics in ("delayed", "immediate"):
        standardizer = FeatureStandardizer(2, "ema", statistics=statistics)
        for clip in feature.split(1):
            standardizer.observe(clip, VALID)
        standardizer.update()
        errors[statistics] = float((standardizer.variance - variance).abs().max())
    assert errors["immediate"] < 1e-4 < 0.05 < errors["delayed"]


def test_immediate_statistics_leave_corrupt_clips_out_and_resume():
    standardizer = FeatureStandardizer(1, "ema", momentum=0.5, statistics="immediate")
    standardizer.observe(features([[9.0], [9.0]]), ~VALID)
    assert (standardizer.mean.item(), standardizer.variance.item()) == (0.0, 1.0)
    step(standardizer, features([[1.0], [3.0]]), VALID)
    read = FeatureStandardizer(1, "ema", momentum=0.5, statistics="immediate")
    read.load_state_dict(standardizer.state_dict())
    read.observe(features([[6.0], [6.0]]), VALID)
    assert read.mean.item() == 2.0
    read.update()
    assert (read.mean.item(), read.variance.item()) == (4.0, 0.5)


def test_standardizer_is_fixed_in_evaluation():
    standardizer = FeatureStandardizer(1, "ema")
    step(standardizer, features([[1.0], [3.0]]), VALID)
    standardizer.eval()
    step(standardizer, features([[100.0], [300.0]]), VALID)
    assert (standardizer.mean.item(), standardizer.variance.item()) == (2.0, 1.0)


def test_standardizer_by_token_and_none():
    feature = features([[1.0, 3.0], [50.0, 10.0]])
    expected = features([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(FeatureStandardizer(2, "token")(feature), expected, atol=1e-4, rtol=0)
    for kind in ("token", "none"):
        standardizer = FeatureStandardizer(2, kind)
        step(standardizer, feature, VALID)
        assert standardizer.mean.tolist() == [0.0, 0.0]
    assert FeatureStandardizer(2, "none")(feature) is feature


def test_standardizer_state_travels_with_checkpoints():
    written = FeatureStandardizer(1, "ema", momentum=0.5)
    step(written, features([[1.0], [3.0]]), VALID)
    read = FeatureStandardizer(1, "ema", momentum=0.5)
    read.load_state_dict(written.state_dict())
    step(read, features([[6.0], [6.0]]), VALID)
    assert (read.mean.item(), read.variance.item()) == (4.0, 0.5)


# --------------------------------------------------------------------------------------------------------------- bars


def test_bars_by_hand():
    """The mean of (3/4, 1/4) and (1/4, 3/4) is uniform; that of the first alone is the first."""
    bars = KLBars()
    first, second = (log_distributions(features(rows)) for rows in ([[LN3, 0.0]], [[0.0, LN3]]))
    to_uniform = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert bars.of(first, VALID).keys() == {"uniform"}
    bars.observe(first, VALID)
    found = bars.of(second, VALID, tau=2.0)
    assert found["uniform"].item() == pytest.approx(4 * to_uniform)
    assert found["mean"].item() == pytest.approx(4 * (0.75 * math.log(3) + 0.25 * math.log(1 / 3)))
    bars.observe(second, VALID)
    assert bars.of(first, VALID)["mean"].item() == pytest.approx(to_uniform, abs=1e-6)


@pytest.mark.parametrize("axis", ["channel", "spatial"])
@pytest.mark.parametrize("pool", ["none", "time", "all"])
def test_no_constant_is_closer_than_the_mean_of_what_was_observed(axis, pool):
    y = 2 * torch.randn(6, 2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    y += 3 * torch.randn(1, 1, 2, 3, 5, generator=torch.Generator().manual_seed(1))  # positions differ
    valid, bars = torch.ones(6, dtype=torch.bool), KLBars()
    log_p = log_distributions(y, 1.5, axis, pool)
    bars.observe(log_p, valid)
    best = bars.of(log_p, valid, 1.5)["mean"]
    means = y.mean((0, 1), keepdim=True).expand_as(y)
    for constant in (means, 0.9 * means, torch.zeros_like(y)):
        assert best <= guidance_kl_loss(y, constant, valid, 1.5, axis, pool) + 1e-6
    uniform = guidance_kl_loss(y, torch.zeros_like(y), valid, 1.5, axis, pool)
    torch.testing.assert_close(bars.of(log_p, valid, 1.5)["uniform"], uniform)


def test_bars_leave_corrupt_clips_out():
    y = torch.randn(2, 1, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    masked, kept = KLBars(), KLBars()
    masked.observe(log_distributions(y), torch.tensor([True, False]))
    masked.observe(log_distributions(y), torch.tensor([False, False]))
    kept.observe(log_distributions(y[:1]), VALID)
    torch.testing.assert_close(masked.mean, kept.mean)
    of_both = masked.of(log_distributions(y), torch.tensor([True, False]))
    torch.testing.assert_close(2 * of_both["uniform"], kept.of(log_distributions(y[:1]), VALID)["uniform"])


# -------------------------------------------------------------------------------------------------------- contrastive


def apart(clips):
    return ~torch.eye(clips, dtype=torch.bool)


def test_contrastive_by_hand():
    y = torch.stack([features([[2.0, 0.0], [4.0, 0.0]])[0], features([[0.0, 1.0], [0.0, 1.0]])[0]])
    x = torch.stack([features([[1.0, 0.0], [1.0, 0.0]])[0], features([[6.0, 2.0], [2.0, 4.0]])[0]])
    # averaged over positions and normalised: y (1, 0), (0, 1); x (1, 0), (0.8, 0.6)
    loss = contrastive_loss(y, x, torch.ones(2, dtype=torch.bool), apart(2), tau=0.5)
    rows = [math.log(1 + math.exp(-1 / 0.5)), math.log(1 + math.exp((0.8 - 0.6) / 0.5))]
    torch.testing.assert_close(loss, torch.tensor(sum(rows) / 2))


def test_contrastive_does_not_tell_a_clip_from_itself():
    y, x = (torch.randn(3, 1, 2, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    valid, different = torch.ones(3, dtype=torch.bool), apart(3)
    different[0, 2] = different[2, 0] = False
    together = contrastive_loss(y, x, valid, different)
    pair = torch.ones(2, dtype=torch.bool)
    first = contrastive_loss(y[:2], x[:2], pair, apart(2))  # rows 0 and 1 see only each other
    assert not torch.isclose(together, contrastive_loss(y, x, valid, apart(3)))
    y[2] = y[0]
    x[2] = x[0]
    rows = [contrastive_loss(y[i:2], x[i:2], pair[i:], apart(2)[i:, i:]) for i in (0, 1)]
    assert rows[0] == first and rows[1] == 0
    alone = contrastive_loss(y[[0, 2]], x[[0, 2]], pair, torch.zeros(2, 2, dtype=torch.bool))
    assert alone == 0


def test_contrastive_moves_the_mapped_features_only():
    y, x = (torch.randn(2, 1, 2, 2, 4).requires_grad_() for _ in range(2))
    contrastive_loss(y, x, torch.ones(2, dtype=torch.bool), apart(2)).backward()
    assert y.grad is None and x.grad.abs().max() > 0


def test_contrastive_leaves_corrupt_clips_out():
    y, x = (torch.randn(3, 1, 2, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    x.requires_grad_()
    valid = torch.tensor([True, False, True])
    masked = contrastive_loss(y, x, valid, apart(3))
    kept = contrastive_loss(y[valid], x[valid], valid[valid], apart(2))
    torch.testing.assert_close(masked, kept * 2 / 3)
    (gradient,) = torch.autograd.grad(masked, x)
    assert gradient[1].abs().max() == 0 and gradient.isfinite().all()


# ------------------------------------------------------------------------------------- clips that could not be read

ONE_OF_TWO = torch.tensor([True, False])


def two_clips(seed):
    return torch.randn(2, 1, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


def cycle(target, other, valid):
    return cycle_consistency_loss(target, other, valid)


@pytest.mark.parametrize("loss", [cycle, guidance_kl_loss])
def test_a_corrupt_clip_adds_nothing_and_leaves_the_weight_of_the_others(loss):
    target, other = two_clips(0), two_clips(1).requires_grad_()
    masked = loss(target, other, ONE_OF_TWO)
    torch.testing.assert_close(masked, loss(target[:1], other[:1], VALID) / 2)
    (gradient,) = torch.autograd.grad(masked, other)
    (alone,) = torch.autograd.grad(loss(target[:1], other[:1], VALID), other)
    torch.testing.assert_close(gradient, alone / 2)
    assert gradient[1].abs().max() == 0


@pytest.mark.parametrize("loss", [cycle, guidance_kl_loss])
def test_without_any_valid_clip_losses_and_gradients_are_zero(loss):
    target, other = two_clips(0), two_clips(1).requires_grad_()
    nothing = loss(target, other, torch.tensor([False, False]))
    (gradient,) = torch.autograd.grad(nothing, other)
    assert nothing == 0
    assert gradient.abs().max() == 0


def test_standardizer_leaves_corrupt_clips_out():
    standardizer = FeatureStandardizer(1, "ema", momentum=0.5)
    clips = torch.cat([features([[1.0], [3.0]]), features([[100.0], [300.0]])])
    step(standardizer, clips, ONE_OF_TWO)
    assert (standardizer.mean.item(), standardizer.variance.item()) == (2.0, 1.0)
    step(standardizer, clips, torch.tensor([False, False]))
    assert (standardizer.mean.item(), standardizer.variance.item(), standardizer.updates.item()) == (2.0, 1.0, 1.0)


def test_standardizer_starts_with_the_first_valid_batch():
    standardizer = FeatureStandardizer(1, "ema", momentum=0.5)
    step(standardizer, features([[9.0], [9.0]]), ~VALID)
    step(standardizer, features([[1.0], [3.0]]), VALID)
    assert (standardizer.mean.item(), standardizer.variance.item()) == (2.0, 1.0)


def test_answer_kl_by_hand():
    """Clip 0 has two tokens with KL log 2 and 0, clip 1 one token with KL 0, clip 2 none."""
    sure, even = [0.0, -1e9], [0.0, 0.0]
    target, clip = torch.tensor([sure, even, even]), torch.tensor([0, 0, 1])
    logits = torch.zeros(3, 2)
    assert answer_kl_loss(NextTokens.of(target, 1.0), logits, clip, 3).item() == pytest.approx(math.log(2) / 2 / 3)
    assert answer_kl_loss(NextTokens.of(target, 1.0), target, clip, 3).item() == pytest.approx(0.0, abs=1e-7)
    nothing = NextTokens.of(target[:0], 1.0)
    assert answer_kl_loss(nothing, logits[:0], clip[:0], 3).item() == 0.0


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=generator) for _ in range(2)]


def test_answer_kl_takes_the_demonstrator_first_and_teaches_it_nothing():
    target, logits = (part.requires_grad_() for part in random_logits(4, 5))
    loss = answer_kl_loss(NextTokens.of(target, 2.0), logits, torch.tensor([0, 0, 0, 1]), 2, tau=2.0)
    each = F.kl_div((logits / 2).log_softmax(-1), (target / 2).log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    assert loss.item() == pytest.approx(4 * float(each[:3].mean() + each[3]) / 2, rel=1e-5)
    loss.backward()
    assert target.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_answer_kl_of_the_likeliest_tokens_counts_all_others_as_one(tau):
    target, logits = random_logits(6, 9)
    clip, whole = torch.arange(6), NextTokens.of(target, tau)
    by_hand = []
    for p, q in zip((target / tau).softmax(-1), (logits / tau).softmax(-1), strict=True):
        first = p.argsort(descending=True)[:3]
        p, q = (torch.cat([part[first], 1 - part[first].sum(0, keepdim=True)]) for part in (p, q))
        by_hand.append((p * (p / q).log()).sum())
    expected = tau**2 * torch.stack(by_hand).mean()
    full, kept = (answer_kl_loss(part, logits, clip, 6, tau) for part in (whole, whole.top(3)))
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-6)
    assert kept < full


def test_answer_kl_of_all_tokens_in_another_order_is_the_same():
    """Also its gradient, and no probability that rounds to zero gives NaN."""
    target, logits = random_logits(6, 9)
    whole, values, gradients = NextTokens.of(target, 1.0), [], []
    for part in (whole, whole.top(9), whole.top(100), whole.top(8)):
        leaf = logits.clone().requires_grad_()
        values.append(answer_kl_loss(part, leaf, torch.arange(6), 6))
        gradients.append(torch.autograd.grad(values[-1], leaf)[0])
    for value, gradient in zip(values[1:], gradients[1:], strict=True):  # of 8 tokens, the rest is a single one
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(gradient, gradients[0])
    sure = NextTokens.of(torch.tensor([[0.0, -1e9, -1e9]]), 1.0).top(1)
    assert answer_kl_loss(sure, torch.zeros(1, 3), torch.tensor([0]), 1).item() == pytest.approx(math.log(3))


def test_attention_finds_what_the_other_view_shows_elsewhere():
    y = torch.randn(2, 3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    elsewhere = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = y.flatten(2, 3)[:, :, elsewhere].view(y.shape)
    torch.testing.assert_close(cross_view_attention(moved, 3 * y, tau=1e-3), y)  # scale does not matter to cosines
    frame = moved.mean((2, 3), keepdim=True).expand(y.shape)
    torch.testing.assert_close(cross_view_attention(moved, y, tau=1e6), frame)
    some = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 1, 2, 2)
    weight = 1 / (1 + math.exp(-1 / 0.5))
    expected = torch.tensor([[weight, 1 - weight], [1 - weight, weight]]).view(some.shape)
    torch.testing.assert_close(cross_view_attention(some, some, tau=0.5), expected)


# ----------------------------------------------------------------------------------------------------------- selection


def known_by_hand():
    """Three tokens of clip 0, two of clip 2, none of clip 1, over four words."""
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]] + [[0.7, 0.1, 0.1, 0.1]] * 2)
    return NextTokens(p.log()), torch.tensor([0, 1, 3, 0, 1]), torch.tensor([0, 0, 0, 2, 2])


def test_what_a_demonstrator_knows_by_hand():
    given, tokens, clip = known_by_hand()
    known = Knowledge.of(given, tokens, clip, 3)
    torch.testing.assert_close(known.likelihood, torch.tensor([(0.5 * 0.6 * 0.4) ** (1 / 3), 0.0, 0.07**0.5]))
    assert known.right.tolist() == [True, False, False]  # the second token of the last clip is not the likeliest
    whole = Knowledge.of(given.top(4), tokens, clip, 3)
    torch.testing.assert_close(whole.likelihood, known.likelihood)
    assert torch.equal(whole.right, known.right)
    few = Knowledge.of(given.top(1), tokens, clip, 3)  # the others together have a probability of 0.3
    torch.testing.assert_close(few.likelihood[2], torch.tensor((0.7 * 0.3) ** 0.5))
    assert torch.equal(few.right, known.right)


def test_weights_of_clips_scale_their_share_of_both_kls():
    weight = torch.tensor([0.5, 1.0, 0.0])
    target, _, clip = known_by_hand()
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def answers(rows, weight=None):
        part = torch.isin(clip, torch.tensor(rows))
        return answer_kl_loss(NextTokens(target.log_probs[part]), logits[part], clip[part], 3, weight=weight)

    torch.testing.assert_close(answers([0, 1, 2], weight), 0.5 * answers([0]))
    y, x = torch.randn(2, 3, 2, 4, 4, 5, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([True, True, True])
    for form in ((1.0, "channel", "none"), (0.5, "spatial", "time"), (2.0, "channel", "all")):
        of_clip = torch.stack([guidance_kl_loss(y[i, None], x[i, None], valid[:1], *form) for i in range(3)])
        weighted = guidance_kl_loss(y, x, valid, *form, weight)
        torch.testing.assert_close(weighted, (weight * of_clip).mean())
        torch.testing.assert_close(guidance_kl_loss(y, x, valid, *form, torch.ones(3)), of_clip.mean())
