"""Allocations that nobody chose: what widths at random reach, beside those of a search."""

import numpy as np
import pandas as pd

from quantifind.mixed_precision.candidates import Candidates, Row, Trial
from quantifind.mixed_precision.search_space import choice_key
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.utils.console import progress

# the lowest and the highest middle width, as shares of the answer's mean bits; and how far from its
# middle a tensor's width lies, as shares of that: from half to one and a half times
MIDDLES, AROUND = (0.75, 3.0), (0.5, 1.5)
# each is measured on all examples: rows of a part could not be compared
WHOLE = (1.0,)


def random_allocations(
    candidates: Candidates, mean_bits: float, count: int, *, seed: int
) -> pd.DataFrame:
    """Measure allocations whose widths are drawn, around as many middles from few bits to many.

    Each tensor's width is drawn from those around the middle, all as likely; of the choices at that
    width that the search has rounded already, the tensor gets the one that cost least alone.
    Activations stay in float. None of these allocations can be chosen.

    candidates: of a search that is over.
    mean_bits: of its answer.
    count: how many, or fewer where there are few widths; each takes a pass over the validation
        data.
    seed: of the draws.
    Returns: rows as those of the candidates, but for the costs; by middle, fewest bits first.
    """
    options = _options(candidates)
    generator = np.random.default_rng(seed)
    trials: dict[str, Trial] = {}
    for middle in np.geomspace(*MIDDLES, count) * mean_bits:
        tensors: dict[str, Choice | None] = dict.fromkeys(candidates.allocation.values)
        for name, by_width in options.items():
            widths = [w for w in by_width if AROUND[0] * middle <= w <= AROUND[1] * middle]
            nearest = min(by_width, key=lambda width: abs(width - middle))
            tensors[name] = by_width[generator.choice(widths) if widths else nearest]
        strategy = Strategy(tensors, folded=candidates.allocation.folded)
        quantized = candidates.allocation.alone(strategy.tensors, {})
        trial = candidates.trial("random", strategy, quantized)
        trials[trial.key] = trial
    rows, passes = list[Row](), candidates.measurements.passes
    with progress("random allocations", total=len(trials)) as step:
        for trial in trials.values():
            if passes.out_of_time:
                passes.stopped("allocations at random")
                break
            try:
                rows += candidates.measured([trial], WHOLE)
            except KeyboardInterrupt:  # the answer is there: test_an_answer_outlives_an_interrupt
                passes.stopped("interrupted")
                break
            step()
    return pd.DataFrame(rows).drop(columns="key", errors="ignore")


def _options(candidates: Candidates) -> dict[str, dict[float, Choice]]:
    """By tensor and width the choice that costs least alone, of those that were rounded."""
    allocation = candidates.allocation
    found: dict[str, dict[float, Choice]] = {}
    for name, choices in allocation.rounded_options.space.tensors.items():
        by_width = found.setdefault(name, {})
        for choice in choices:
            if not allocation.rounded_options.has_made(choice_key("tensors", name, choice)):
                continue
            other = by_width.get(choice.width)
            costs = [allocation.loss_increase({name: c}, {}) for c in (choice, other) if c]
            if other is None or costs[0] < costs[1]:
                by_width[choice.width] = choice
    return found
