"""Intervals and certificates beside scipy, and by simulation of what they promise."""

import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from scipy import stats

from quantifind.certification.certificate import (
    accuracy_drop_interval,
    certified_depth,
    certified_steps,
    minimum_safe_bits,
    ratio_bound,
    ratio_interval,
)
from quantifind.certification.measures import degradation
from quantifind.certification.race import hopeless
from stages.answers import mark_certified


def paired_losses(seed: int, examples: int = 300, ratio: float = 1.05):
    generator = np.random.default_rng(seed)
    original = generator.exponential(size=examples)
    noise = generator.exponential(size=examples)
    return ratio * (0.8 * original + 0.2 * noise), original


def rejects(losses, original, limit, confidence, more):
    """Whether scipy's t-test of the examples, the worst at this limit counted more, rejects it, and
    that of the examples as they are does."""
    change = losses - limit * original
    test, plain = (
        stats.ttest_1samp(values, 0).statistic
        for values in (np.append(change, [change.max()] * more), change)
    )
    return max(test, plain) <= stats.t.ppf(1 - confidence, len(change) - 1)


@given(
    seed=st.integers(0, 10_000),
    examples=st.integers(2, 300),
    tail=st.floats(0.1, 2),
    near=st.sampled_from([0.0, 1.0]),
    more=st.integers(1, 3),
)
def test_bound_is_the_limit_at_which_scipy_starts_to_reject(seed, examples, tail, near, more):
    """At 5%, and at the levels where the worst counts two or three times more."""
    losses, original = paired_losses(seed, examples)
    losses = losses * np.exp(tail * np.random.default_rng(seed).standard_normal(examples))
    confidence = 1 - 0.05**more
    bound = ratio_bound(losses, original, confidence=confidence, near=near)
    one_sided = ratio_interval(losses, original, confidence=2 * confidence - 1)[1]
    assert bound >= one_sided - 1e-9
    if np.isfinite(bound):
        for off in (1e-6, 0.01, 0.1, 1.0):
            assert rejects(losses, original, bound * (1 + off), confidence, more)
        assert not rejects(losses, original, bound * (1 - 1e-6), confidence, more)


@given(seed=st.integers(0, 10_000), confidences=st.tuples(*[st.floats(0.6, 0.9999)] * 2))
def test_bounds_of_more_confidence_are_higher(seed, confidences):
    losses, original = paired_losses(seed)
    low, high = (ratio_bound(losses, original, confidence=c) for c in sorted(confidences))
    assert low <= high


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
    covered, above, bounded = 0, 0, 0
    for seed in range(1000):
        losses, original = paired_losses(seed)
        low, high = ratio_interval(losses, original)
        covered += low <= 1.05 <= high
        above += ratio_interval(losses, original, confidence=0.9)[1] >= 1.05
        bounded += ratio_bound(losses, original) >= 1.05
    # two standard errors of 1,000 draws are 1.4 points
    assert covered / 1000 == pytest.approx(0.95, abs=0.014)
    assert above / 1000 == pytest.approx(0.95, abs=0.014)
    assert bounded / 1000 >= 0.95


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


LIMIT = 1.01
JUST_ABOVE = LIMIT + 1e-7
LADDERS = {
    "above after the first": [1.0, JUST_ABOVE, JUST_ABOVE, 1.01001, 1.0101, 1.011, 1.2],
    "at the limit before above": [0.99, 1.0, LIMIT, LIMIT, JUST_ABOVE, JUST_ABOVE, 1.0101],
    "up and down": [1.005, 1.0101, 0.99, JUST_ABOVE, 1.0, LIMIT, 1.02],
    "above at once": [JUST_ABOVE, LIMIT, 1.0, 1.02],
}
# a trained classifier's: most examples cost next to nothing, a few nearly all
LOSSES = {
    "gamma": lambda generator: generator.gamma(0.2, size=2_000),
    "lognormal": lambda generator: generator.lognormal(-4, 1.5, size=2_000),
}


def share_of_wrong_certificates(ratios, draw, spread, runs=1_000):
    """How often the last strategy passed breaks the limit: each example's loss is multiplied with
    the ratio, and lognormal noise of mean 1."""
    wrong = 0
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        original, bounds = draw(generator), []
        for ratio in ratios:
            normal = generator.standard_normal(len(original))
            noise = np.exp(spread * normal - spread**2 / 2)
            bounds.append(ratio_bound(ratio * original * noise, original))
            if bounds[-1] > LIMIT:
                break  # the walk sees none below
        steps = certified_steps(bounds, LIMIT)
        wrong += steps > 0 and ratios[steps - 1] > LIMIT
    return wrong / runs


ALLOWED = 0.05 + 3 * (0.05 * 0.95 / 1_000) ** 0.5


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_a_certificate_is_wrong_in_at_most_five_percent(ladder, losses, spread):
    """By simulation on synthetic losses with known ratio: the certified strategy truly violates the
    limit in at most 5% of 1,000 runs (plus sampling error)."""
    assert share_of_wrong_certificates(LADDERS[ladder], LOSSES[losses], spread) <= ALLOWED


def test_certificates_are_wrong_nearly_as_often_as_they_may():
    """A walk that certifies next to nothing would keep any limit."""
    ratios = LADDERS["above after the first"]
    assert share_of_wrong_certificates(ratios, LOSSES["gamma"], 0.02) > 0.02


@pytest.mark.parametrize("losses", LOSSES)
def test_a_certificate_under_noise_as_large_as_the_losses(losses):
    """Of a few examples that carry mean and noise, where Student's t alone errs in 10% to 13%."""
    assert share_of_wrong_certificates([JUST_ABOVE, 1.2], LOSSES[losses], 1.0) <= ALLOWED


def flips(examples, lost, won):
    """Answers of which so many were right and aren't, and weren't and are."""
    was_right = np.arange(examples) < examples - won
    right = was_right.copy()
    right[:lost] = False
    right[examples - won :] = True
    assert (was_right & ~right).sum() == lost
    assert (~was_right & right).sum() == won
    return right, was_right


@pytest.mark.parametrize("examples", [60, 1_000])
@pytest.mark.parametrize(
    ("lost", "won"),
    [(0.0, 0.0), (0.0005, 0.0), (0.001, 0.001), (0.0, 0.01), (0.02, 0.015), (0.3, 0.05)],
)
def test_an_accuracy_drops_interval_covers_the_true_one(examples, lost, won):
    """In 95% of simulations at least, with few flips or none too."""
    generator = np.random.default_rng(0)
    draws = generator.multinomial(examples, [lost, won, 1 - lost - won], size=1_000)
    counts, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    covered = below = 0
    for (wrong, right), often in zip(counts, times, strict=True):
        low, high = accuracy_drop_interval(*flips(examples, wrong, right))
        covered += often * (low <= lost - won <= high)
        bound = accuracy_drop_interval(*flips(examples, wrong, right), confidence=0.9)[1]
        below += often * (lost - won <= bound)
    assert covered >= 950
    assert below >= 950


@given(examples=st.integers(1, 500))
def test_no_flip_is_no_proof(examples):
    low, high = accuracy_drop_interval(*flips(examples, 0, 0))
    assert low < 0 < high
    assert low == -high


@settings(max_examples=30)
@given(data=st.data(), examples=st.integers(1, 400), confidence=st.floats(0.5, 0.999))
def test_a_share_has_the_interval_of_scipy(data, examples, confidence):
    """Of flips all one way: that of Clopper and Pearson for each way, at half the error."""
    count = data.draw(st.integers(0, examples // 2))
    level = 1 - (1 - confidence) / 2
    flipped, not_flipped = (
        stats.binomtest(k, examples).proportion_ci(level, method="exact") for k in (count, 0)
    )
    low, high = accuracy_drop_interval(*flips(examples, count, 0), confidence=confidence)
    assert low == pytest.approx(flipped.low - not_flipped.high, abs=1e-9)
    assert high == pytest.approx(flipped.high, abs=1e-9)
    turned = accuracy_drop_interval(*flips(examples, 0, count), confidence=confidence)
    assert turned == (-high, -low)


@settings(max_examples=30)
@given(data=st.data(), examples=st.integers(2, 300))
def test_an_accuracy_drops_interval_holds_it_and_turns_with_it(data, examples):
    lost, won = (data.draw(st.integers(0, examples // 2)) for _ in range(2))
    right, was_right = flips(examples, lost, won)
    low, high = accuracy_drop_interval(right, was_right)
    assert low <= was_right.mean() - right.mean() <= high
    assert accuracy_drop_interval(was_right, right) == (-high, -low)
    narrow = accuracy_drop_interval(right, was_right, confidence=0.8)
    assert low <= narrow[0] <= narrow[1] <= high


def columns_of(seed=0, examples=400, classes=True):
    losses, original = paired_losses(seed, examples)
    generator = np.random.default_rng(seed + 1)
    columns = {
        "loss": losses,
        "original_loss": original,
        "squared_error": 0.01 * generator.gamma(0.5, size=examples),
        "squared_norm": generator.gamma(2.0, size=examples),
    }
    if classes:
        columns["original_correct"] = generator.random(examples) < 0.9
        flipped = generator.random(examples) < 0.03
        columns["correct"] = columns["original_correct"] ^ flipped
    return columns


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_degradation_is_that_of_each_measure(seed, confidence):
    columns = columns_of(seed)
    row = degradation(columns, confidence=confidence)
    names = ["criterion_ratio", "accuracy_drop", "relative_error"]
    assert list(row) == [name + end for name in names for end in ("", "_low", "_high", "_bound")]
    losses, original = columns["loss"], columns["original_loss"]
    assert row["criterion_ratio"] == losses.mean() / original.mean()
    interval = row["criterion_ratio_low"], row["criterion_ratio_high"]
    assert interval == ratio_interval(losses, original, confidence=confidence)
    bound = ratio_bound(losses, original, confidence=confidence)
    assert row["criterion_ratio_bound"] == bound
    error, norm = columns["squared_error"], columns["squared_norm"]
    assert row["relative_error"] == pytest.approx(math.sqrt(error.sum() / norm.sum()))
    interval = row["relative_error_low"], row["relative_error_high"]
    wanted = np.sqrt(ratio_interval(error, norm, confidence=confidence))
    assert interval == pytest.approx(tuple(wanted))
    bound = math.sqrt(ratio_bound(error, norm, confidence=confidence))
    assert row["relative_error_bound"] == pytest.approx(bound)
    right, was_right = columns["correct"], columns["original_correct"]
    assert row["accuracy_drop"] == pytest.approx(was_right.mean() - right.mean())
    interval = row["accuracy_drop_low"], row["accuracy_drop_high"]
    assert interval == accuracy_drop_interval(right, was_right, confidence=confidence)
    for name in names:
        low, high, bound = (row[f"{name}_{end}"] for end in ("low", "high", "bound"))
        assert low <= row[name] <= min(bound, high)


def test_degradation_of_a_network_without_classes_and_of_one_that_lost_nothing():
    columns = columns_of(classes=False)
    assert not any(name.startswith("accuracy") for name in degradation(columns))
    same = columns | {"loss": columns["original_loss"], "squared_error": np.zeros(400)}
    row = degradation(same)
    assert [row[f"criterion_ratio{end}"] for end in ("", "_low", "_high", "_bound")] == [1] * 4
    assert [row[f"relative_error{end}"] for end in ("", "_low", "_high", "_bound")] == [0] * 4


def test_degradation_without_a_unit_is_not_known():
    zeros = np.zeros(5)
    names = ["loss", "original_loss", "squared_error", "squared_norm"]
    row = degradation(dict.fromkeys(names, zeros))
    assert math.isnan(row["criterion_ratio"])
    assert math.isnan(row["relative_error"])
    assert row["criterion_ratio_bound"] == row["relative_error_bound"] == math.inf


MEASURED = {"criterion_ratio": 1.05, "relative_error": 0.3, "accuracy_drop": 0.02}


def seen(columns, examples):
    return {name: column[:examples] for name, column in columns.items()}


def near_the_limit(generator, examples):
    """A candidate near each of the limits of MEASURED."""
    original = generator.gamma(0.5, size=examples)
    error = generator.uniform(0.07, 0.1) * generator.gamma(1, size=examples)
    was_right = generator.random(examples) < 0.9
    flipped = generator.random(examples) < generator.uniform(0, 0.06)
    losses = original * generator.uniform(1, 1.1) + generator.normal(0, 0.5, examples)
    return {
        "loss": losses,
        "original_loss": original,
        "squared_error": original * error,
        "squared_norm": original,
        "original_correct": was_right,
        "correct": was_right & ~flipped,
    }


@pytest.mark.parametrize("measure", MEASURED)
def test_few_that_would_keep_the_limit_are_hopeless(measure):
    """Candidates near the limit, each seen on a growing part of its examples."""
    limit, whole, generator = MEASURED[measure], 2_000, np.random.default_rng(0)
    wrong = keeping = early = 0
    for _ in range(300):
        columns = near_the_limit(generator, whole)
        given_up = {
            examples: hopeless(seen(columns, examples), measure, limit, whole)
            for examples in (250, 500, 1_000, whole)
        }
        kept = degradation(columns)[f"{measure}_bound"] <= limit
        assert given_up[whole] == (not kept)
        keeping += kept
        wrong += kept and any(given_up.values())
        early += given_up[500]
    assert wrong <= 0.1 * keeping
    assert keeping > 30
    assert early > 30


@pytest.mark.parametrize("measure", ["criterion_ratio", "relative_error"])
def test_one_example_is_too_few_to_be_hopeless(measure):
    columns = seen(near_the_limit(np.random.default_rng(0), 2_000), 1)
    assert not hopeless(columns, measure, -1, 2_000)


def curve(name, loss_increases, kind="tensors", original=0.5):
    return pd.DataFrame(
        [
            {
                "kind": kind,
                "name": name,
                "bits": bits,
                "loss_increase": loss_increase,
                "original_criterion": original,
            }
            for bits, loss_increase in loss_increases
        ]
    )


@pytest.mark.parametrize(
    ("loss_increases", "bits"),
    [
        ([(8, 0.0), (4, 0.001), (3, 0.004), (2, 0.006), (1, 1.0)], 3.0),
        ([(8, 0.0), (4, 0.1), (3, 0.001)], 8.0),  # 3 bits stand below it
        ([(8, 0.1), (4, 0.2)], None),
        ([(8, 0.1), (4, 0.0)], None),  # even the widest doesn't keep it
        ([(8, 0.0), (4, 0.001), (1, 0.005)], 1.0),
        ([(1, 0.0), (8, 0.0), (4, 0.1)], 8.0),  # in any order
        ([(4, 0.1), (4, 0.001), (2, 0.1)], 4.0),  # the better of two choices
        ([(3, 0.0), (2, 0.1), (1.6, 0.2), (2, 0.004)], 2.0),
        ([(3, 0.0), (2, 0.003), (1.6, 0.004), (1, 0.1)], 1.6),
        ([(4, 0.0)], 4.0),
    ],
)
def test_minimum_safe_bits(loss_increases, bits):
    assert minimum_safe_bits(curve("a", loss_increases), 1.01) == {"a": bits}


def test_minimum_safe_bits_of_several_tensors_and_activations():
    table = pd.concat(
        [
            curve("b", [(4, 0.001), (2, 1.0)]),
            curve("a", [(4, 0.001), (2, 0.004)]),
            curve("a", [(4, 1.0)], kind="activations"),
        ]
    )
    assert list(minimum_safe_bits(table, 1.01).items()) == [
        ("b", 4.0),
        ("a", 2.0),
        ("input of a", None),
    ]
    assert minimum_safe_bits(table, 4) == {"b": 2.0, "a": 2.0, "input of a": 4.0}
    assert minimum_safe_bits(table, 1) == {"b": None, "a": None, "input of a": None}


def test_minimum_safe_bits_are_relative_to_the_float_loss():
    loss_increases = [(4, 0.003), (2, 0.03)]
    assert minimum_safe_bits(curve("a", loss_increases, original=1.0), 1.01) == {"a": 4.0}
    assert minimum_safe_bits(curve("a", loss_increases, original=10.0), 1.01) == {"a": 2.0}


@pytest.mark.parametrize(
    ("errors", "bits"), [(-2, 2.0), (-1, 3.0), (0, 3.0), (1, 4.0), (2, 4.0), (9, None)]
)
def test_minimum_safe_bits_with_what_their_increases_may_be_off(errors, bits):
    """At most 0.005 is allowed; of what was predicted alone no error is known."""
    table = curve("a", [(8, 0.0), (4, 0.002), (3, 0.004), (2, 0.008)])
    table["increase_error"] = [0.001, 0.0015, 0.002, 0.0016]
    assert minimum_safe_bits(table, 1.01, errors=errors) == {"a": bits}
    table["increase_error"] = math.nan
    assert minimum_safe_bits(table, 1.01, errors=errors) == {"a": 3.0}


@pytest.mark.parametrize("measure", ["accuracy_drop", "flips"])
def test_where_all_is_ignored_nothing_is_known(measure):
    columns = {**columns_of(), "flipped": np.zeros(400, dtype=bool), "weight": np.zeros(400)}
    row = degradation(columns)
    assert math.isnan(row[measure])
    assert row[f"{measure}_bound"] == 1
