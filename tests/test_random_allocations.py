"""Widths at random are measured beside a search, and change nothing of it."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from quantifind import find_strategy
from quantifind.mixed_precision.candidates import RACE, Candidates
from quantifind.mixed_precision.random_allocations import AROUND, MIDDLES
from quantifind.utils.loaders import Tensors, create_dataloaders
from quantifind.workflow.evaluation_workflow import evaluate_strategies

COUNT = 5
WIDTHS = [1, 2, 3, 4, 6, 8, 12]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(300, 6)
    loaders = create_dataloaders(Tensors(x, x[:, :3].argmax(1)), batch_size=50)
    how = {"limit": 1.2, "widths": WIDTHS, "effort": 160}
    told = []
    with_them, without = (
        find_strategy(net, *loaders[:2], nn.CrossEntropyLoss(), **how, **more)
        for more in ({"random": COUNT, "told": told.append}, {})
    )
    return net, loaders[1], with_them, without, told


def test_a_search_is_the_same_beside_widths_at_random(made):
    *_, with_them, without, _ = made
    plain = [c for c in without.candidates if c not in ("strategy", "quantized")]
    pd.testing.assert_frame_equal(with_them.candidates[plain], without.candidates[plain])
    assert with_them.strategy == without.strategy
    assert without.random.empty
    # no more than a pass each
    taken = with_them.passes.taken - without.passes.taken
    assert taken == pytest.approx(len(with_them.random), abs=1e-6)


def test_widths_at_random_are_measured_as_any_strategy_is(made):
    net, val, found, *_ = made
    random = found.random
    judged = evaluate_strategies(
        net, random["strategy"], val, nn.CrossEntropyLoss(), quantized=random["quantized"]
    )
    assert random["mean_bits"].to_numpy() == pytest.approx(judged["mean_bits"].to_numpy())
    ratios = judged["criterion_ratio"].to_numpy()
    assert random["criterion_ratio"].to_numpy() == pytest.approx(ratios, rel=1e-6)
    assert set(random["origin"]) == {"random"}


def test_widths_at_random_lie_around_their_middle(made):
    *_, found, _, _ = made
    middles = found.mean_bits * np.geomspace(*MIDDLES, COUNT)
    assert 2 <= len(found.random) <= COUNT  # where few widths are near, two may be the same
    for strategy in found.random["strategy"]:
        widths = [choice.width for choice in strategy.tensors.values()]
        assert any(
            all(AROUND[0] * m <= w <= AROUND[1] * m or w in (WIDTHS[0], WIDTHS[-1]) for w in widths)
            for m in middles
        )


def test_who_is_told_hears_of_ever_better_candidates(made):
    *_, found, _, told = made
    passes = [one["passes"] for one in told]
    assert passes == sorted(passes)
    bits = [one["mean_bits"] for one in told]
    assert bits[-1] == found.mean_bits
    assert told[-1].keys() == {"passes", "mean_bits", found.goal.measure}


def test_a_count_that_is_none_is_refused():
    with pytest.raises(ValueError, match="random is -1: a whole number, 0 or more, is needed"):
        find_strategy(nn.Linear(1, 1), [], [], nn.MSELoss(), random=-1)


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_outlives_an_interrupt(made, monkeypatch, late):
    """Or the end of its time, while widths at random are measured."""
    net, val, _, without, _ = made
    measured = Candidates.measured

    def ended(self, trials, shares=RACE):
        if trials and trials[0].origin == "random":
            if not late:
                raise KeyboardInterrupt
            self.measurements.passes.deadline = 0.0
        return measured(self, trials, shares)

    monkeypatch.setattr(Candidates, "measured", ended)
    how = {"limit": 1.2, "widths": WIDTHS, "effort": 160, "random": COUNT}
    found = find_strategy(net, val, val, nn.CrossEntropyLoss(), **how)
    assert found.strategy.tensors.keys() == without.strategy.tensors.keys()
    assert len(found.random) == late
    said = "allocations at random" if late else "interrupted"
    assert said in found.passes.left_out
