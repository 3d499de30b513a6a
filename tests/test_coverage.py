"""The tests that the simulations of coverage count are those of the bounds."""

import numpy as np
import pytest

from benchmarks.coverage import BOUNDS, kept
from quantifind.certification.certificate import ratio_bound, ratio_interval


@pytest.mark.parametrize("confidence", [0.9, 0.975])
def test_what_is_counted_are_the_bounds_of_the_product(confidence):
    generator, limit = np.random.default_rng(0), 1.02
    original = generator.gamma(0.5, size=200)
    losses = limit * original * np.exp(0.5 * generator.standard_normal((3, 200)) - 0.15)
    drawn = [generator.integers(200, size=200) for _ in range(50)]
    weights = np.stack([np.bincount(one, minlength=200) for one in drawn]).astype(float)
    found = kept(losses - limit * original, weights, confidence=confidence)
    counted = dict(zip(BOUNDS, found, strict=True))
    pairs = [[(rung[one], original[one]) for rung in losses] for one in drawn]
    bounds = [[ratio_bound(*pair, confidence=confidence) for pair in each] for each in pairs]
    level = 2 * confidence - 1
    plain = [[ratio_interval(*p, confidence=level)[1] for p in each] for each in pairs]
    assert (counted["worst once more"] == (np.array(bounds) <= limit)).all()
    assert (counted["t"] == (np.array(plain) <= limit)).all()
    assert 0 < counted["worst once more"].mean() < counted["t"].mean() < 1
    assert (counted["worst twice more"] <= counted["worst once more"]).all()
