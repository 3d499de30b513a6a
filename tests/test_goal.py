"""What a search may be asked for, and which candidates are judged."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import assume, given

from quantifind.certification.goal import (
    DEFAULT_LIMIT,
    STEP,
    SURE,
    TOP,
    Goal,
    ladder,
    steps_that_keep,
)
from quantifind.certification.measures import MEASURES
from quantifind.utils import plugins

COSTS = ["mean_bits", *plugins.names("costs")]


@pytest.mark.parametrize(
    ("limit", "goal"),
    [
        (1, {"criterion_ratio": 1.0}),
        (1.01, {"criterion_ratio": 1.01}),
        ({"criterion_ratio": 1.01}, {"criterion_ratio": 1.01}),
        ({"accuracy_drop": 0}, {"accuracy_drop": 0.0}),
        ({"relative_error": 0.05}, {"relative_error": 0.05}),
        ({"flips": 0.01, "fidelity": 0.1}, {"flips": 0.01, "fidelity": 0.1}),
        (None, DEFAULT_LIMIT),
    ],
)
def test_limits(limit, goal):
    assert Goal.of(limit, None) == Goal(next(iter(goal)), goal, "model_bytes", None)


@pytest.mark.parametrize("cost", COSTS)
def test_budgets(cost):
    assert Goal.of(None, {cost: 100}) == Goal("criterion_ratio", {}, cost, 100.0)
    assert Goal.of(None, 3) == Goal("criterion_ratio", {}, "mean_bits", 3.0)


NO_NUMBERS = [True, False, "1.01", "", [1.01], (1.01,), 1j, b"1"]


@pytest.mark.parametrize("value", [0.999, 0, -1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_limits_out_of_range(measure, value):
    if 0 <= value < 1 and MEASURES[measure].lossless == 0:
        assert Goal.of({measure: value}, None).limit == value
        return
    with pytest.raises(ValueError, match=f"limit {measure} is {value:g}: [01] or more is needed"):
        Goal.of({measure: value}, None)


@pytest.mark.parametrize("value", [0, -0.0, -1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cost", COSTS)
def test_budgets_out_of_range(cost, value):
    with pytest.raises(ValueError, match=f"budget {cost} is {value:g}: a number above 0"):
        Goal.of(None, {cost: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    for limit in (value, {"criterion_ratio": value}):
        with pytest.raises(ValueError, match=r"limit criterion_ratio is .*: a number is needed"):
            Goal.of(limit, None)
    for budget in (value, {"mean_bits": value}):
        with pytest.raises(ValueError, match=r"budget mean_bits is .*: a number is needed"):
            Goal.of(None, budget)
    with pytest.raises(ValueError, match="limit accuracy_drop is None: a number is needed"):
        Goal.of({"accuracy_drop": None}, None)


@pytest.mark.parametrize(
    "asked", [{}, {"loss": 1.01}, {"criterion_ratio": 1.01, "loss": 0.1}, {1: 1}], ids=str
)
def test_unknown_names_and_too_many(asked):
    with pytest.raises(
        ValueError, match=r"limit is \{.*: a number or some of criterion_ratio, cal"
    ):
        Goal.of(asked, None)
    with pytest.raises(ValueError, match=r"budget is \{.*: a number or some of mean_bits, bit_ope"):
        Goal.of(None, asked)
    with pytest.raises(ValueError, match=r"budget is \{.*: one cost is needed"):
        Goal.of(None, {"mean_bits": 2, "model_bytes": 100})


def test_a_limit_and_a_budget():
    for limit, budget in ((1.01, 4), (1.01, {"model_bytes": 4})):
        with pytest.raises(ValueError, match=r"either a limit or a budget, not limit=.*, budget="):
            Goal.of(limit, budget)


def row(size, value, bound, measure="criterion_ratio"):
    return {"model_bytes": size, "mean_bits": size / 10, measure: value, f"{measure}_bound": bound}


def test_a_limit_is_kept_with_confidence_and_bytes_are_ranked():
    goal = Goal.of(1.01, None)
    assert goal.keeps(row(100, 1.0, 1.01))
    assert not goal.keeps(row(100, 1.0, 1.0101))
    assert not goal.keeps(row(100, 1.0, math.nan))
    rows = [row(90, 1.0, 1.009), row(80, 1.0, 1.008), row(80, 1.0, 1.007)]
    assert min(rows, key=goal.rank) is rows[2]


def test_a_budget_is_kept_and_degradations_are_ranked():
    goal = Goal.of(None, 4)
    assert goal.keeps(row(40, 1.0, 9.0))
    assert not goal.keeps(row(41, 1.0, 1.0))
    rows = [row(10, 1.0, 1.009), row(40, 1.0, 1.002), row(39, 1.0, 1.002)]
    assert min(rows, key=goal.rank) is rows[2]


def test_the_margin_counts_widths_of_the_bound():
    goal = Goal.of(1.01, None)
    assert goal.margin(row(1, 1.0, 1.005)) == pytest.approx(2)
    assert goal.margin(row(1, 1.0, 1.01)) == pytest.approx(1)
    assert goal.margin(row(1, 1.02, 1.03)) == pytest.approx(-1)
    assert goal.margin(row(1, 1.0, 1.0)) > 1e6
    assert goal.margin(row(1, 1.0, math.inf)) == 0
    budget = Goal.of(None, 4)
    assert budget.margin(row(1, 1.0, 1.01)) > budget.margin(row(1, 0.9, 1.02))


def test_what_was_not_learned_is_held_to_lose_its_divergence():
    """Of ratios; less is luck. What has learned may have less."""
    goal, lucky = Goal.of(1.01, None), row(1, 0.99, 1.0) | {"fidelity": 0.004}
    assert goal.margin(lucky | {"answer": "as_is"}) == pytest.approx(0.6)
    assert goal.margin(lucky | {"answer": "trained"}) == pytest.approx(2)
    unlucky = row(1, 1.005, 1.01) | {"fidelity": 0.001, "answer": "as_is"}
    assert goal.margin(unlucky) == pytest.approx(1)
    assert goal.margin(lucky | {"answer": "as_is", "fidelity": math.nan}) == pytest.approx(2)
    drop = Goal.of({"accuracy_drop": 0.003}, None)
    wrong = row(1, -0.001, 0.001, "accuracy_drop") | {"fidelity": 0.1, "answer": "as_is"}
    assert drop.margin(wrong) == pytest.approx(2)


def test_a_lucky_candidate_leaves_steps_above_it():
    rows = [row(size, 1.001, 1.004) | {"fidelity": 0.0005} for size in (150, 130, 115)]
    rows.append(row(100, 0.98, 0.99) | {"fidelity": 0.008})
    rows = [one | {"answer": "as_is"} for one in rows]
    goal = Goal.of(1.01, None)
    assert [one["model_bytes"] for one in ladder(rows, rows[-1], goal)] == [115, 100]
    learned = [one | {"answer": "trained"} for one in rows]
    assert len(ladder(learned, learned[-1], goal)) == 1


@given(st.lists(st.tuples(*[st.floats(-0.05, 0.05)] * 2), min_size=1, max_size=6))
def test_several_limits_are_kept_where_each_is(margins):
    """And a ladder ends where the first of them fails."""
    limits = {"criterion_ratio": 1.01, "accuracy_drop": 0.003}
    goal, rows = Goal.of(limits, None), []
    for ratio, drop in margins:
        rows.append(row(100, 1.0, 1.01 + ratio) | row(100, 0.0, 0.003 + drop, "accuracy_drop"))
    kept = [Goal.of(1.01, None).keeps(r) and r["accuracy_drop_bound"] <= 0.003 for r in rows]
    assert [goal.keeps(r) for r in rows] == kept == [goal.excess(r) <= 0 for r in rows]
    walked = steps_that_keep(pd.DataFrame(rows), limits)
    assert walked == next((i for i, keeps in enumerate(kept) if not keeps), len(kept))


def test_a_ladder_starts_near_the_chosen():
    rows = [row(size, 1.0, 1.0 + 1 / size) for size in range(100, 1000, 20)]
    steps = ladder(rows, rows[0], Goal.of(1.01, None))
    assert TOP * 100 - 20 <= steps[1]["model_bytes"] <= TOP * 100
    sure = [row for row in rows if Goal.of(1.01, None).margin(row) >= SURE]
    assert steps[0] is sure[0]
    assert ladder([row for row in rows if row not in sure], rows[0], Goal.of(1.01, None))[0] is max(
        (row for row in rows if row not in sure), key=Goal.of(1.01, None).margin
    )


@given(data=st.data(), scale=st.floats(0.1, 30))
def test_the_first_step_is_sure_if_any_is(data, scale):
    """So that what is left where all others fail does not fail with them, however far above."""
    goal, rows = Goal.of(1.01, None), data.draw(candidates())
    rows = [{**r, "model_bytes": round(r["model_bytes"] ** scale)} for r in rows]
    keeping = [row for row in rows if goal.keeps(row)]
    assume(keeping)
    chosen = min(keeping, key=goal.rank)
    first = ladder(rows, chosen, goal)[0]
    above = [goal.margin(r) for r in rows if r["model_bytes"] * STEP >= chosen["model_bytes"]]
    assert goal.margin(first) >= min(SURE, max(above, default=-math.inf))


@st.composite
def candidates(draw, measure="criterion_ratio"):
    lowest = MEASURES[measure].lossless
    rows = []
    for size in draw(st.lists(st.integers(100, 400), min_size=1, max_size=12)):
        value = lowest + draw(st.floats(-0.02, 0.04))
        rows.append(row(size, value, value + draw(st.floats(1e-4, 0.02)), measure))
    return rows


def check_ladder(rows, chosen, goal):
    steps = ladder(rows, chosen, goal)
    assert any(step is chosen for step in steps)
    assert all(any(step is row for row in rows) for step in steps)
    sizes = [step["model_bytes"] for step in steps]
    assert all(low <= STEP * high for high, low in pairwise(sizes))
    margins = [goal.margin(step) for step in steps]
    assert all(above > below for above, below in pairwise(margins))


@pytest.mark.parametrize("measure", MEASURES)
@given(data=st.data())
def test_a_ladder_falls_in_bytes_and_margin_to_the_chosen_and_on(measure, data):
    rows = data.draw(candidates(measure))
    goal = Goal.of({measure: MEASURES[measure].lossless + 0.01}, None)
    keeping = [row for row in rows if goal.keeps(row)]
    assume(keeping)
    chosen = min(keeping, key=goal.rank)
    check_ladder(rows, chosen, goal)


@given(rows=candidates(), budget=st.integers(10, 40))
def test_a_ladder_of_a_budget(rows, budget):
    goal = Goal.of(None, budget)
    keeping = [row for row in rows if goal.keeps(row)]
    assume(keeping)
    check_ladder(rows, min(keeping, key=goal.rank), goal)


def test_a_ladder_of_one():
    only = row(100, 1.0, 1.005)
    for goal in (Goal.of(1.01, None), Goal.of(1.001, None), Goal.of(None, 4)):
        assert ladder([only], only, goal) == [only]


def test_a_ladder_by_hand():
    goal = Goal.of(1.01, None)
    rows = [
        row(1000, 1.0, 1.001),  # margin 10
        row(800, 1.0, 1.005),  # 2: smaller than the next
        row(700, 1.0, 1.004),  # 2.5
        row(690, 1.0, 1.0045),  # chosen, and near the one above
        row(500, 1.02, 1.03),
        row(400, 1.5, 1.6),
    ]
    chosen = rows[3]
    assert ladder(rows[::-1], chosen, goal) == [rows[0], chosen, rows[4], rows[5]]
    assert ladder(rows, rows[2], goal) == [rows[0], rows[2], rows[4], rows[5]]
