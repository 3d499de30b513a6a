"""Losses with a network's outputs multiplied by the gain that suits them best, the inverse of a
temperature, so that a ratio can't be bought by softening them (Guo et al. 2017, arXiv:1706.04599).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# of the losses at the values that are tried, what rounding to float32 leaves of squares
ROUNDING = 1e-13


@dataclass(frozen=True)
class Gains:
    """What outputs are multiplied with, at a few values, between which losses are interpolated.

    tried: the values, rising.
    weights: gain → of the losses at each of ``tried``, its weight in the loss at the gain.
    """

    tried: tuple[float, ...]
    weights: Callable[[float], np.ndarray]

    def fitted(self, losses: np.ndarray) -> float:
        """The gain above 0 with the least mean loss; NaN where there is none.

        losses: (examples, tried), summed over an example's positions.
        """
        mean = losses.mean(0)
        if not np.isfinite(mean).all():
            return math.nan
        if self.tried == _THREE:
            # of a square the lowest point: test_the_gain_of_a_tiny_error_is_exact
            slope, curve = (mean[2] - mean[0]) / 2, mean[0] - 2 * mean[1] + mean[2]
            found = float(1 - slope / curve) if curve > 0 else 1.0
            # targets that are all 0, or turned about: test_what_no_gain_suits_has_other_limits
            return found if found > 0 else math.nan
        # not for the stage that always runs: test_heavy_imports_are_rare
        from scipy import optimize

        first, last = math.log(self.tried[0]), math.log(self.tried[-1])

        def loss(logarithm: float) -> float:
            return float(mean @ self.weights(math.exp(logarithm)))

        # near the best of those tried: the mean has one valley
        best = math.log(self.tried[int(mean.argmin())])
        step = (last - first) / (len(self.tried) - 1)
        ends = max(first, best - 1.5 * step), min(last, best + 1.5 * step)
        options = {"xatol": 1e-6}
        found = optimize.minimize_scalar(loss, bounds=ends, method="bounded", options=options).x
        return math.exp(min((found, best), key=loss))

    def suiting(self, losses: np.ndarray) -> float | None:
        """That which is `fitted`; None where there is none, or where it takes away all of a loss
        but rounding, to which nothing has a ratio."""
        gain, mean = self.fitted(losses), losses.mean(0)
        if math.isnan(gain):
            return None
        left, loss = (float(mean @ self.weights(one)) for one in (gain, 1.0))
        # targets proportional to the outputs: test_what_no_gain_suits_has_other_limits
        return None if left < loss / 2 and left <= ROUNDING * mean.max() else gain

    def is_at_an_end(self, gain: float) -> bool:
        """Whether the loss may fall further beyond the values that are tried."""
        return self.tried != _THREE and not (self.tried[0] * 1.001 < gain < self.tried[-1] / 1.001)

    def at(self, losses: np.ndarray, gain: float) -> np.ndarray:
        """The loss of each example, (examples,), with outputs multiplied by a gain."""
        return losses @ self.weights(gain)


def _lagrange(nodes: np.ndarray, at: float) -> np.ndarray:
    """The weights of the polynomial through values at nodes."""
    apart = nodes[:, None] - nodes[None, :]
    np.fill_diagonal(apart, 1.0)
    share = np.broadcast_to(at - nodes, apart.shape).copy()
    np.fill_diagonal(share, 1.0)
    weights: np.ndarray = (share / apart).prod(1)
    return weights


def _cubic(gain: float) -> np.ndarray:
    """Weights of the four values about a gain, by its logarithm."""
    nodes = np.log(_GEOMETRIC)
    at = min(max(math.log(gain), nodes[0]), nodes[-1])
    first = min(max(int(np.searchsorted(nodes, at)) - 2, 0), len(nodes) - 4)
    weights = np.zeros(len(nodes))
    weights[first : first + 4] = _lagrange(nodes[first : first + 4], at)
    return weights


# in steps of a quarter: test_calibrated_losses_are_those_of_torch
_GEOMETRIC = tuple(1.25**i for i in range(-10, 7))
_THREE = (0.0, 1.0, 2.0)
OF_LOGITS = Gains(_GEOMETRIC, _cubic)
# squared errors are a square of the gain
OF_SQUARES = Gains(_THREE, lambda gain: _lagrange(np.array(_THREE), gain))


def gains_of(losses: Any) -> Gains:
    """Those at which losses are, (examples, tried)."""
    return OF_SQUARES if losses.shape[1] == len(_THREE) else OF_LOGITS
