"""Intervals and certificates beside scipy, and by simulation of what they promise."""

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from scipy import stats

from quantifind.certificate import (
    certified_depth,
    certified_steps,
    mark_certified,
    ratio_bound,
    ratio_interval,
)


def paired_losses(seed: int, examples: int = 300, ratio: float = 1.05):
    generator = np.random.default_rng(seed)
    original = generator.exponential(size=examples)
    noise = generator.exponential(size=examples)
    return ratio * (0.8 * original + 0.2 * noise), original


@given(seed=st.integers(0, 10_000), limit=st.floats(0.9, 1.3))
def test_bound_is_the_limit_at_which_scipy_starts_to_reject(seed, limit):
    losses, original = paired_losses(seed)
    bound = ratio_bound(losses, original)
    test = stats.ttest_1samp(losses - limit * original, 0, alternative="less")
    assert (bound <= limit) == (test.pvalue <= 0.05)


@pytest.mark.parametrize("seed", range(3))
def test_interval_agrees_with_scipys_paired_bootstrap(seed):
    losses, original = paired_losses(seed, examples=2000)
    low, high = ratio_interval(losses, original)
    interval = stats.bootstrap(
        (losses, original),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        n_resamples=4000,
        batch=500,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    width = interval.high - interval.low
    assert low == pytest.approx(interval.low, abs=0.1 * width)
    assert high == pytest.approx(interval.high, abs=0.1 * width)


def test_interval_covers_the_true_ratio_as_often_as_it_says():
    covered, above = 0, 0
    for seed in range(1000):
        losses, original = paired_losses(seed)
        low, high = ratio_interval(losses, original)
        covered += low <= 1.05 <= high
        above += ratio_bound(losses, original) >= 1.05
    # two standard errors of 1,000 draws are 1.4 points
    assert covered / 1000 == pytest.approx(0.95, abs=0.014)
    assert above / 1000 == pytest.approx(0.95, abs=0.014)


def test_ratio_of_equal_losses_is_one():
    _, original = paired_losses(0)
    assert ratio_interval(original, original) == (1, 1)


def test_too_little_to_tell():
    assert ratio_interval([1.0], [1.0]) == (-np.inf, np.inf)
    assert ratio_interval([1.0, 2.0], [0.0, 0.0]) == (-np.inf, np.inf)


@given(bounds=st.lists(st.floats(0.5, 2)), limit=st.floats(0.5, 2))
def test_walk_passes_until_the_first_failure(bounds, limit):
    steps = certified_steps(bounds, limit)
    assert all(bound <= limit for bound in bounds[:steps])
    assert steps == len(bounds) or bounds[steps] > limit


def test_walk_stops_at_a_ratio_that_is_not_known():
    assert certified_steps([1.0, float("nan"), 1.0], 1.01) == 1


def test_walk_on_a_ladder_errs_in_at_most_five_percent():
    """The last strategy passed truly breaks the limit in at most 5% of 1,000 simulated ladders."""
    ratios, limit, wrong = [0.99, 1.0, 1.009, 1.012, 1.011, 1.03, 1.2], 1.01, 0
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        original = generator.exponential(size=400)
        noises = generator.exponential(size=(len(ratios), 400))
        bounds = [
            ratio_bound(ratio * (0.95 * original + 0.05 * noise), original)
            for ratio, noise in zip(ratios, noises, strict=True)
        ]
        passed = ratios[: certified_steps(bounds, limit)]
        wrong += bool(passed) and passed[-1] > limit
    assert wrong / 1000 <= 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


def test_certified_depth_walks_from_most_bits_whatever_the_order():
    bounds = {8: 1.0, 6: 1.005, 5: 1.03, 4: 1.002}
    table = pd.DataFrame({"bit_depth": bounds.keys(), "criterion_ratio_bound": bounds.values()})
    for results in (table, table.iloc[::-1]):
        assert certified_depth(results, 1.01) == 6
        assert certified_depth(results, 1.05) == 4
        assert certified_depth(results, 1.001) == 8
    assert certified_depth(table, 0.9) is None
    marked = mark_certified(table, [1.05, 1.01, 1.0055, 0.9]).set_index("bit_depth")
    assert marked["certified_at"].dropna().to_dict() == {6: 1.0055, 4: 1.05}
