"""The bits that would be certified on other test splits, beside a walk that counts one by one."""

import math
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from quantifind.certification.certificate import certified_steps
from quantifind.certification.measures import degradation
from quantifind.certification.resampling import bits_interval

LIMITS = {"criterion_ratio": 1.02, "relative_error": 0.3, "accuracy_drop": 0.02}


def ladder_near(seed, rungs, examples):
    """Strategies of which each loses a little more than the one before."""
    generator = np.random.default_rng(seed)
    original = generator.gamma(0.3, size=examples)
    was_right = generator.random(examples) < 0.9
    ladder = []
    for grown in np.linspace(0, 1, rungs):
        flipped = generator.random(examples) < 0.04 * grown
        ladder.append(
            {
                "loss": original * (1 + 0.03 * grown + 0.1 * generator.standard_normal(examples)),
                "original_loss": original,
                "squared_error": 0.12 * grown * original * generator.gamma(1, size=examples),
                "squared_norm": original,
                "weight": (generator.random(examples) < 0.9).astype(float),
                "original_correct": was_right,
                "correct": was_right ^ flipped,
            }
        )
    return ladder


def bits_one_by_one(ladder, bits, limits, confidence, splits, seed):
    generator, examples = np.random.default_rng(seed), len(ladder[0]["loss"])
    found = []
    for _ in range(splits):
        drawn = generator.integers(examples, size=examples)
        steps = []
        rows = [
            degradation({name: c[drawn] for name, c in columns.items()}, confidence=confidence)
            for columns in ladder
        ]
        for measure, limit in limits.items():
            steps.append(certified_steps([row[f"{measure}_bound"] for row in rows], limit))
        found.append(bits[min(steps) - 1] if min(steps) else math.inf)
    return sorted(found)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 1_000),
    rungs=st.integers(1, 6),
    measures=st.lists(st.sampled_from(sorted(LIMITS)), min_size=1, max_size=3, unique=True),
    confidence=st.sampled_from([0.9, 0.975]),
)
def test_it_is_what_degradation_says_of_splits_drawn_anew(seed, rungs, measures, confidence):
    ladder, bits = ladder_near(seed, rungs, 300), [8.0 - rung for rung in range(rungs)]
    limits = {measure: LIMITS[measure] for measure in measures}
    found = bits_one_by_one(ladder, bits, limits, confidence, 41, seed)
    how = {"confidence": confidence, "splits": 41, "seed": seed}
    assert bits_interval(ladder, bits, limits, share=1.0, **how) == (found[0], found[-1])
    assert bits_interval(ladder, bits, limits, share=0.5, **how) == (found[10], found[30])
    assert bits_interval(ladder, bits, limits, share=0.9, **how) == (found[2], found[38])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    examples=st.integers(1, 40),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "criterion_ratio": st.sampled_from([1.0, 1.01, 1.1, 5.0]),
            "relative_error": st.sampled_from([0.1, 0.5, 2.0]),
            "accuracy_drop": st.sampled_from([0.02, 0.3]),
        },
    ).filter(len),
    confidence=st.sampled_from([0.9, 0.9975]),
)
def test_of_few_examples_it_is_what_degradation_says(seed, examples, limits, confidence):
    ladder, bits = ladder_near(seed, 3, examples), [8.0, 7.0, 6.0]
    found = bits_one_by_one(ladder, bits, limits, confidence, 41, seed)
    how = {"confidence": confidence, "splits": 41, "seed": seed}
    assert bits_interval(ladder, bits, limits, share=1.0, **how) == (found[0], found[-1])
    assert bits_interval(ladder, bits, limits, share=0.5, **how) == (found[10], found[30])


def test_few_bits_come_first_and_nothing_is_infinite():
    ladder = ladder_near(0, 5, 3_000)
    low, high = bits_interval(ladder, [8, 6, 4, 3, 2], {"criterion_ratio": 1.025})
    assert 2 <= low < high <= 8
    assert bits_interval(ladder, [8, 6, 4, 3, 2], {"criterion_ratio": 0.5}) == (math.inf,) * 2
    assert bits_interval(ladder, [8, 6, 4, 3, 2], {"criterion_ratio": 9.0}) == (2, 2)


def test_what_lost_nothing_is_certified_on_every_split():
    same = ladder_near(0, 1, 300)[0] | {"squared_error": np.zeros(300)}
    same["loss"], same["correct"] = same["original_loss"], same["original_correct"]
    limits = {"criterion_ratio": 1.0, "relative_error": 0.0}
    assert bits_interval([same], [3.0], limits) == (3.0, 3.0)
    zeros = same | {"loss": np.zeros(300), "original_loss": np.zeros(300)}
    assert bits_interval([zeros], [3.0], {"criterion_ratio": 2.0}) == (math.inf, math.inf)


@pytest.mark.parametrize("measure", LIMITS)
def test_a_thousand_splits_take_about_a_second(measure):
    ladder = ladder_near(0, 10, 10_000)
    started = time.process_time()
    bits_interval(ladder, list(range(12, 2, -1)), {measure: LIMITS[measure]})
    assert time.process_time() - started < 3  # on a busy machine; alone it takes 0.6
