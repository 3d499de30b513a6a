"""How much the certified bits owe to the test examples: a ladder walked on bootstrapped splits."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import special

from quantifind.certification.certificate import Columns, times_more
from quantifind.certification.measures import MEASURES, counts

# splits drawn at a time
CHUNK = 100
# of fewer examples the bound of each split is computed, which a test at the limit alone need not
# agree with: test_of_few_examples_it_is_what_degradation_says
FEW = 100
# one of so many examples is in each drawn split, but for e^-64 of them
FOREMOST = 64

# whether a limit is kept, of weights of the examples: (splits, examples) → (splits,)
Test = Callable[[np.ndarray], np.ndarray]


def bits_interval(
    ladder: Sequence[Columns],
    bits: Sequence[float],
    limits: Mapping[str, float],
    *,
    confidence: float = 0.95,
    splits: int = 1_000,
    share: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """The bits that would be certified, had the test split been drawn anew (bootstrap).

    Examples are drawn with replacement, the same ones for all strategies, and the ladder is walked
    as on the test split itself (`quantifind.certification.certificate.certified_steps`).

    ladder: of each strategy, from most bytes to fewest, the columns by example, as
        `quantifind.certification.measures.calibrated` has them.
    bits: of each strategy.
    limits: by measure, the most that its bound may be; all must be kept.
    confidence: of each test.
    splits: how many are drawn.
    share: of the splits that end within the interval, in the middle: by default from the 5% with
        the fewest bits to the 5% with the most.
    seed: of the draws.
    Returns: fewest and most bits; inf where nothing would be certified.
    """
    examples = len(ladder[0]["loss"])
    generator, certified = np.random.default_rng(seed), []
    tests = [[_test(columns, *one, confidence) for one in limits.items()] for columns in ladder]
    for first in range(0, splits, CHUNK):
        weights = np.stack(
            [
                np.bincount(generator.integers(examples, size=examples), minlength=examples)
                for _ in range(min(CHUNK, splits - first))
            ]
        ).astype(np.float64)
        passed = [np.all([test(weights) for test in each], axis=0) for each in tests]
        steps = np.cumprod(passed, axis=0).sum(axis=0)
        certified.append(np.array([math.inf, *bits])[steps])
    ordered = np.sort(np.concatenate(certified))
    outside = int((1 - share) / 2 * (splits - 1) + 1e-9)
    return float(ordered[outside]), float(ordered[-1 - outside])


def _test(columns: Columns, measure: str, limit: float, confidence: float) -> Test:
    if measure == "accuracy_drop":
        return _drop_test(columns, limit, confidence)
    if measure == "flips":
        return _flips_test(columns, limit, confidence)
    changed, original = (
        np.asarray(columns[name], dtype=np.float64) for name in MEASURES[measure].needs
    )
    if len(changed) < FEW:
        needed = {name: columns[name] for name in MEASURES[measure].needs}
        return _bound_test(needed, measure, limit, confidence)
    # what an example adds to a relative error adds to its square
    ratio = limit**2 if measure == "relative_error" else limit
    return _ratio_test(changed - ratio * original, original, confidence)


def _bound_test(columns: Columns, measure: str, limit: float, confidence: float) -> Test:
    """That of the bound of each split, one by one."""

    def kept(weights: np.ndarray) -> bool:
        drawn = {n: np.repeat(each, weights.astype(int)) for n, each in columns.items()}
        return MEASURES[measure].of(drawn).bound(confidence) <= limit

    return lambda weights: np.array([kept(each) for each in weights])


def _ratio_test(change: np.ndarray, original: np.ndarray, confidence: float) -> Test:
    """The t-test of `quantifind.certification.certificate.ratio_bound`, at the limit alone."""
    examples = len(change)
    t, more = special.stdtrit(examples - 1, confidence), times_more(confidence)
    features = np.stack([change, change**2, original, original**2], axis=1)
    foremost = np.argsort(-change)[:FOREMOST]

    def high(total: np.ndarray, squares: np.ndarray, count: float) -> np.ndarray:
        mean = total / count
        return mean + t * np.sqrt(np.maximum(squares / count - mean**2, 0) / (count - 1))

    def test(weights: np.ndarray) -> np.ndarray:
        total, squares, *originals = (weights @ features).T
        worst = change[foremost][np.argmax(weights[:, foremost] > 0, axis=1)]
        told = high(-originals[0], originals[1], examples) < 0
        again = high(total + more * worst, squares + more * worst**2, examples + more)
        kept: np.ndarray = told & (high(total, squares, examples) <= 0) & (again <= 0)
        return kept

    return test


def _flips_test(columns: Columns, limit: float, confidence: float) -> Test:
    """That of the exact bound of a share."""
    flipped = columns["flipped"].astype(bool)
    judged = counts(columns)
    features = np.stack([judged & flipped, judged], axis=1).astype(np.float64)

    def test(weights: np.ndarray) -> np.ndarray:
        changed, count = (weights @ features).T
        high = np.where(
            changed < count, special.betaincinv(changed + 1, count - changed, confidence), 1
        )
        kept: np.ndarray = high <= limit
        return kept

    return test


def _drop_test(columns: Columns, limit: float, confidence: float) -> Test:
    """That of the bound of `quantifind.certification.certificate.accuracy_drop_interval`."""
    right, was_right = (columns[name].astype(bool) for name in ("correct", "original_correct"))
    judged = counts(columns)
    flips = [judged & was_right & ~right, judged & ~was_right & right, judged]
    features, tail = np.stack(flips, axis=1).astype(np.float64), (1 - confidence) / 2

    def test(weights: np.ndarray) -> np.ndarray:
        lost, won, count = (weights @ features).T
        # where all or none flip, an end of the interval is that of the shares
        high = np.where(lost < count, special.betaincinv(lost + 1, count - lost, 1 - tail), 1)
        low = np.where(won > 0, special.betaincinv(won, count - won + 1, tail), 0)
        kept: np.ndarray = high - low <= limit
        return kept

    return test
