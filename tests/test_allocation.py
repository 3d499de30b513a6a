"""Allocations beside a look at every one there is."""

import ctypes
import itertools
import math
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from quantifind.mixed_precision.knapsack import Option, allocate, neighbours, pareto, total_cost
from quantifind.utils.silence import silent

NUMBERS = st.integers(0, 40).map(float) | st.floats(0, 40)


def total_rise(units, assignment):
    return sum(unit[i].loss_increase for unit, i in zip(units, assignment, strict=True))


def option(cost, loss_increase):
    return Option(
        {"weight": {"scheme": "uniform", "cost": cost}}, {}, float(cost), float(loss_increase)
    )


OPTIONS = st.builds(option, NUMBERS, NUMBERS)
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=4)


def everything(units):
    return itertools.product(*(range(len(unit)) for unit in units))


def least_rise(units, budget):
    """Of all combinations that cost no more, the least rise, or None."""
    within = [a for a in everything(units) if total_cost(units, a) <= budget]
    return min((total_rise(units, a) for a in within), default=None)


@given(units=UNITS, share=st.floats(0.05, 1.2))
def test_no_combination_within_the_budget_is_better(units, share):
    highest = sum(max(o.cost for o in unit) for unit in units)
    budget = share * highest + 1
    # a solver takes what is within a millionth of the budget for as much as it:
    # test_the_budget_is_kept_to_the_last_byte
    assume(least_rise(units, budget) == least_rise(units, budget * (1 + 2e-6)))
    found, least = allocate(units, budget), least_rise(units, budget)
    assert (found is None) == (least is None)
    if found is not None:
        assert total_cost(units, found) <= budget * (1 + 2e-6)
        assert total_rise(units, found) == pytest.approx(least, rel=1e-4, abs=1e-12)


@given(units=UNITS)
def test_none_where_even_the_cheapest_cost_more(units):
    cheapest = sum(min(o.cost for o in unit) for unit in units)
    assume(cheapest > 0.01)
    assert allocate(units, 0.99 * cheapest) is None
    found = allocate(units, cheapest)
    assert total_cost(units, found) == pytest.approx(cheapest, rel=1e-5)


@settings(max_examples=30)
@given(units=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=2, max_size=3))
def test_whole_numbers_meet_a_budget_exactly(units):
    """Costs of bytes, a budget of bytes; many allocations are equally good."""
    options = [[option(cost, 9 - cost) for cost in unit] for unit in units]
    for budget in range(sum(map(min, units)), sum(map(max, units)) + 1):
        found = allocate(options, budget)
        assert total_cost(options, found) <= budget
        assert total_rise(options, found) == pytest.approx(least_rise(options, budget))


def test_what_is_best_is_taken_where_the_budget_is_large():
    units = [[option(8, 0), option(4, 0.1)], [option(8, 0.3), option(4, 0.1)]]
    assert allocate(units, 1e9) == (0, 1)


def test_equally_good_ones_are_interchangeable():
    unit = [option(4, 1), option(4, 1), option(2, 3)]
    found = allocate([unit, unit, unit], 8)
    assert sorted(unit[i].cost for i in found) == [2, 2, 4]


@pytest.mark.parametrize("size", [0.1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
def test_loss_increases_of_any_size_are_told_apart(size):
    """Beside options that raise the loss by 1, those that raise it by next to nothing."""
    units = [[option(9, 0), option(8, step * size), option(1, 1)] for step in (3, 2, 1)]
    assert allocate(units, 26) == (0, 0, 1)
    assert allocate(units, 25) == (0, 1, 1)
    assert allocate(units, 24) == (1, 1, 1)
    assert allocate(units, 27) == (0, 0, 0)


@settings(max_examples=30)
@given(data=st.data(), units=UNITS)
def test_loss_increases_over_many_orders_of_magnitude(data, units):
    powers = [[data.draw(st.integers(-9, 0)) for _ in unit] for unit in units]
    units = [
        [
            option(round(o.cost) + 1, (0.1 + o.loss_increase) * 10.0**p)
            for o, p in zip(unit, own, strict=True)
        ]
        for unit, own in zip(units, powers, strict=True)
    ]
    budget = sum(max(o.cost for o in unit) + min(o.cost for o in unit) for unit in units) // 2
    least = least_rise(units, budget)
    assert total_rise(units, allocate(units, budget)) == pytest.approx(least, rel=1e-4)


def test_the_budget_is_kept_to_the_last_byte():
    units = [[option(2_000_000, 0), option(10, 1)], [option(1, 0), option(0, 1e-3)]]
    assert total_cost(units, allocate(units, 2_000_000)) <= 2_000_000


def test_a_budget_of_nothing_is_enough_for_what_costs_nothing():
    assert allocate([[option(0, 1), option(0, 0.5)], [option(1, 0), option(0, 1)]], 0) == (1, 1)


def test_a_network_of_one_option_each():
    units = [[option(3, 1)], [option(4, 0)]]
    assert allocate(units, 7) == (0, 0)
    assert allocate(units, 6.9) is None


@given(unit=st.lists(OPTIONS, min_size=1, max_size=12))
def test_what_no_other_beats_is_kept(unit):
    kept = pareto(unit)
    assert kept == sorted(kept, key=lambda o: -o.cost)
    points = {(o.cost, o.loss_increase) for o in unit}
    front = {(a, b) for a, b in points if not any(c <= a and d <= b for c, d in points - {(a, b)})}
    assert [(o.cost, o.loss_increase) for o in kept] == sorted(front, reverse=True)
    assert all(any(o is given for given in unit) for o in kept)
    assert pareto(kept) == kept


@given(units=UNITS, budget=st.floats(1, 200))
def test_nothing_is_lost_with_what_is_beaten(units, budget):
    assert least_rise([pareto(unit) for unit in units], budget) == least_rise(units, budget)


def test_what_is_no_number_is_left():
    """An option that gave NaN or infinity, unless there is no other."""
    cheap, dear = Option({}, {}, 2.0, math.inf), Option({}, {}, 8.0, 0.1)
    assert pareto([cheap, dear]) == [dear]
    assert pareto([cheap]) == [cheap]
    assert allocate([[dear], [cheap]], 10.0) == (0, 0)


def test_nothing_of_nothing():
    assert pareto([]) == []


@given(data=st.data(), units=UNITS)
def test_moves_are_single_steps_and_pairs(data, units):
    units = [pareto(unit) for unit in units]
    start = tuple(data.draw(st.integers(0, len(unit) - 1)) for unit in units)
    moves = list(neighbours(units, start))
    found = [assignment for assignment, *_ in moves]
    steps = [tuple(to - at for to, at in zip(a, start, strict=True)) for a in found]
    assert len(set(found)) == len(found)
    assert start not in found
    for step in steps:
        assert sorted(s for s in step if s) in ([1], [-1, 1])
    # and all of them that there are
    inside = {
        a
        for a in everything(units)
        if sorted(to - at for to, at in zip(a, start, strict=True) if to != at) in ([1], [-1, 1])
    }
    assert set(found) == inside
    for assignment, down, saved in moves:
        assert assignment[down] == start[down] + 1
        less = total_cost(units, start) - total_cost(units, assignment)
        assert saved == pytest.approx(less, abs=1e-9)


@given(data=st.data(), units=UNITS)
def test_moves_that_save_most_for_their_rise_come_first(data, units):
    units = [pareto(unit) for unit in units]
    start = tuple(data.draw(st.integers(0, len(unit) - 1)) for unit in units)
    saved, prices = [], []
    for assignment, *_ in neighbours(units, start):
        less = total_cost(units, start) - total_cost(units, assignment)
        saved.append(less > 1e-9)
        if less > 1e-9:
            prices.append((total_rise(units, assignment) - total_rise(units, start)) / less)
    assert saved == sorted(saved, reverse=True)
    assert prices == pytest.approx(sorted(prices), rel=1e-6, abs=1e-9)


def test_no_way_down_from_the_cheapest():
    unit = [option(8, 0), option(4, 1)]

    def moves(start):
        return {assignment for assignment, *_ in neighbours([unit, unit], start)}

    assert moves((1, 1)) == set()
    assert moves((0, 0)) == {(0, 1), (1, 0)}
    assert (1, 0) in moves((0, 1))


def test_many_groups_are_allocated_nearly_as_well(monkeypatch):
    generator = np.random.default_rng(0)
    units = [
        pareto(
            [
                option(size * bits / 8, rise * 4.0**-bits * generator.uniform(0.5, 2))
                for bits in (1, 1.6, 2, 3, 4, 6, 8)
            ]
        )
        for size, rise in zip(
            10 ** generator.uniform(2, 5, 80), 10 ** generator.uniform(-4, 0, 80), strict=True
        )
    ]
    low, high = (sum(unit[end].cost for unit in units) for end in (-1, 0))
    budgets = [low * (high / low) ** share for share in (0, 0.1, 0.4, 0.8, 1)]
    nearly = [allocate(units, budget) for budget in budgets]
    assert allocate(units, 0.99 * low) is None
    monkeypatch.setattr("quantifind.mixed_precision.knapsack.EXACT", 100)
    for budget, found in zip(budgets, nearly, strict=True):
        assert total_cost(units, found) <= budget * (1 + 1e-9)
        assert total_rise(units, found) <= 1.02 * total_rise(units, allocate(units, budget))


def test_the_solver_says_nothing(capfd):
    generator = np.random.default_rng(0)
    for _ in range(20):
        units = []
        for _ in range(29):
            size = generator.choice([96, 2304, 27648])
            options = [
                Option({}, {}, size * bits / 8, size**0.5 * 4.0**-bits * generator.lognormal())
                for bits in range(1, 17)
            ]
            units.append(pareto(options))
        low, high = (sum(unit[end].cost for unit in units) for end in (-1, 0))
        allocate(units, low * (high / low) ** generator.uniform(0.05, 0.9))
    library = ctypes.CDLL(None)
    with silent():
        library.puts(b"unheard")
    library.puts(b"heard")
    library.fflush(None)
    print("still heard")
    assert capfd.readouterr() == ("heard\nstill heard\n", "")


def test_silence_within_silence_ends(capfd):
    library = ctypes.CDLL(None)
    first, second = silent(), silent()
    with first:
        second.__enter__()
    library.puts(b"unheard")
    second.__exit__(None, None, None)
    library.puts(b"heard")
    library.fflush(None)
    assert capfd.readouterr().out == "heard\n"


def test_silence_without_an_output():
    program = (
        "import os, sys\n"
        "os.close(1); sys.stdout = None\n"
        "from quantifind.utils.silence import silent\n"
        "with silent():\n    print('x', file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "x\n")
