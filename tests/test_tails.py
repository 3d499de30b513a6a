"""How skew a change is, and what that does to a t-test."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from quantifind.certification.measures import MEASURES
from quantifind.certification.tails import change_skewness, excess_error, tail_warning

RATIOS = {name: measure.needs for name, measure in MEASURES.items() if measure.ratio}


@given(seed=st.integers(0, 10_000), examples=st.integers(3, 300), tail=st.floats(0.1, 2))
@pytest.mark.parametrize("measure", RATIOS)
def test_skewness_is_that_of_scipy(measure, seed, examples, tail):
    generator = np.random.default_rng(seed)
    original = generator.exponential(size=examples)
    changed = original * np.exp(tail * generator.standard_normal(examples))
    columns = dict(zip(RATIOS[measure], (changed, original), strict=True))
    change = changed - changed.mean() / original.mean() * original
    assert change_skewness(columns, measure) == pytest.approx(stats.skew(change), rel=1e-6)


def test_what_has_no_skewness():
    ones = np.ones(5)
    assert change_skewness({"loss": ones, "original_loss": ones}) == 0
    assert math.isnan(change_skewness({"loss": ones, "original_loss": 0 * ones}))
    assert math.isnan(change_skewness({}, "accuracy_drop"))
    assert tail_warning(math.nan, 100) == ""


@pytest.mark.parametrize("examples", [100, 400])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_a_t_test_errs_by_the_first_term_more_often(examples, confidence):
    """Of gamma changes, of which a test of 'not below the truth' errs by simulation."""
    shape, runs = 0.5, 20_000
    draws = np.random.default_rng(0).gamma(shape, size=(runs, examples))
    t = (draws.mean(axis=1) - shape) / (draws.std(axis=1, ddof=1) / math.sqrt(examples))
    errs = np.mean(t <= stats.t.ppf(1 - confidence, examples - 1))
    predicted = excess_error(2 / math.sqrt(shape), examples, confidence=confidence)
    assert errs - (1 - confidence) == pytest.approx(predicted, abs=0.008)


@given(skewness=st.floats(-100, 100), examples=st.integers(2, 100_000))
def test_a_warning_where_a_hundredth_or_more_is_lost(skewness, examples):
    lost = 0.11 * abs(skewness) / math.sqrt(examples)
    if abs(lost - 0.01) > 1e-4:
        assert bool(tail_warning(skewness, examples)) == (lost > 0.01)
