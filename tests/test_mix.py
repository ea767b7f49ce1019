"""Shares of sources in an epoch, and turns of samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from datamodules.egoit.mix import NATURAL, Mix, MixConfig, MixSource, epoch_counts, mix_source


def plain(count):
    return [MixSource(f"{n}.jsonl") for n in range(count)]


def weights(*values):
    return [MixSource(f"{n}.jsonl", weight=value) for n, value in enumerate(values)]


def test_by_default_every_sample_comes_once():
    assert epoch_counts([5, 0, 7], plain(3), NATURAL) == [5, 0, 7]


def test_numbers_replace_sizes():
    sources = [MixSource("a", samples=3), MixSource("b"), MixSource("c", samples=70)]
    assert epoch_counts([5, 6, 7], sources, NATURAL) == [3, 6, 70]


def test_weights_share_the_samples_there_are():
    # 100 + 300 samples, a quarter and three quarters; then one half each, which repeats the first twice
    assert epoch_counts([100, 300], weights(1, 3), NATURAL) == [100, 300]
    assert epoch_counts([100, 300], weights(5, 5), NATURAL) == [200, 200]


def test_the_others_fill_the_rest_above_the_cap():
    # half of 1000 would be 500 of the 10, at most 4 times 10 are taken; the other 960 are shared 1 to 2
    assert epoch_counts([10, 390, 600], weights(3, 1, 2), NATURAL) == [40, 320, 640]
    # a second source runs into its cap only then: 2 x 10 and 2 x 20, the rest is the third's
    assert epoch_counts([10, 20, 970], weights(10, 1, 10), MixConfig(max_repeat=2)) == [20, 40, 940]
    assert epoch_counts([10, 10], weights(1, 1), MixConfig(max_repeat=1)) == [10, 10]


def test_alpha_by_hand():
    # square roots of 100 and 900 are 10 and 30: a quarter and three quarters of 1000
    assert epoch_counts([100, 900], plain(2), MixConfig(alpha=0.5)) == [250, 750]
    assert epoch_counts([100, 900], plain(2), MixConfig(alpha=1.0)) == [100, 900]
    assert epoch_counts([400, 600], plain(2), MixConfig(alpha=0.0)) == [500, 500]
    assert epoch_counts([100, 900], plain(2), MixConfig(alpha=0.0)) == [400, 600]  # four times 100 at most


@pytest.mark.parametrize(
    ("alpha", "shares"),
    [(0.7, [0.484, 0.322, 0.143, 0.039, 0.013]), (0.5, [0.416, 0.311, 0.174, 0.069, 0.031])],
)
def test_alpha_over_the_five_sources_of_egoit(alpha, shares):
    sizes = [303_000, 168_913, 53_000, 8_299, 1_636]
    counts = epoch_counts(sizes, plain(5), MixConfig(alpha=alpha, max_repeat=100))
    assert sum(counts) == sum(sizes)
    np.testing.assert_allclose(np.array(counts) / sum(counts), shares, atol=1e-3)
    capped = epoch_counts(sizes, plain(5), MixConfig(alpha=alpha))
    assert capped[4] == (4 * 1636 if alpha == 0.5 else pytest.approx(4 * 1636, abs=300))
    assert sum(capped) == sum(sizes)


@pytest.mark.parametrize(
    ("sources", "mix", "message"),
    [
        (weights(1, None), NATURAL, r"no weight for 1\.jsonl"),
        ([*weights(1), MixSource("b", samples=2)], NATURAL, "weight and samples exclude each other"),
        (weights(1, 1), MixConfig(alpha=0.0), r"weight and mix\.alpha exclude each other"),
        (
            [MixSource("a", samples=2), MixSource("b")],
            MixConfig(alpha=0.5),
            r"samples and mix\.alpha exclude each other",
        ),
    ],
)
def test_contradictions_are_refused(sources, mix, message):
    with pytest.raises(ValueError, match=rf"^data\.sources: .*{message}"):
        epoch_counts([1, 1], sources, mix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mix_source(5, "data.sources[0]"), r"^data\.sources\[0\]: got 5, allowed: a path, or a mapping"),
        (lambda: MixSource("a", weight=0), "a: weight is 0, allowed: above 0"),
        (lambda: MixSource("a", samples=0), "a: samples is 0, allowed: 1 or more"),
        (lambda: MixConfig(alpha=1.5), r"data\.mix\.alpha: got 1\.5, allowed: from 0 to 1"),
        (lambda: MixConfig(max_repeat=0.5), r"data\.mix\.max_repeat: got 0\.5, allowed: 1 or more"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samples_take_turns():
    mix = Mix(sizes=[5, 4], counts=[2, 7], seed=1)
    assert len(mix) == 9
    seen = Counter()
    for epoch in range(5):
        drawn = mix.samples(epoch).tolist()
        assert (len([i for i in drawn if i < 5]), len([i for i in drawn if 5 <= i < 9])) == (2, 7)
        seen.update(drawn)
        for first, last in ((0, 5), (5, 9)):
            counts = [seen[index] for index in range(first, last)]
            assert max(counts) - min(counts) <= 1
    assert [seen[index] for index in range(5)] == [2] * 5  # five epochs of two are two passes over five
    assert mix.samples(3).tolist() == Mix([5, 4], [2, 7], seed=1).samples(3).tolist()
    assert mix.samples(3).tolist() != Mix([5, 4], [2, 7], seed=2).samples(3).tolist()


def test_a_source_without_samples_gives_none():
    assert Mix([3, 0], [3, 0], seed=0).samples(4).max() == 2
