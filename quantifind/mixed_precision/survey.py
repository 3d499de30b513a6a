"""Which choices a search measures: those that an allocation for its goal may take, by what
gradients predict; the rest is predicted alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from quantifind.certification.goal import Goal
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.anchors import near_limit
from quantifind.mixed_precision.knapsack import Option
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.rounded_options import RoundedOptions
from quantifind.mixed_precision.scores import score_options
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.mixed_precision.sensitivity import PRECISION, Sensitivity, measure_options

# training examples that predict, so many at a time
SCORED, TOGETHER = 256, 16
# of what rounding to nearest loses, GPTQ loses about so much: until it is rounded
BY_GPTQ = 0.1
# rounds of rounding and scoring, and of measuring, what has come near the frontier
ROUNDS = 5
# costs of allocations that are looked at, as shares of a budget
WITHIN = (0.6, 1.2)
# whole candidates that the smallest search measures
CANDIDATES = 8
# sensitivities that are looked at along the frontier
SLOPES = 40


def survey(
    measurements: Measurements, space: SearchSpace, goal: Goal, precision: float = PRECISION
) -> tuple[Sensitivity, Allocation]:
    """Score every choice by gradients, round and measure those near the frontier of the goal.

    precision: as `quantifind.mixed_precision.sensitivity.measure_options` takes it.
    Returns: the sensitivities, and the problem that they make.
    Raises: ValueError for an effort below `least_effort`.
    """
    rounded_options = RoundedOptions(measurements, space)
    scores: dict[str, float] = {}
    activations = [
        key for key, (kind, *_) in rounded_options.choices.items() if kind == "activations"
    ]
    stand_ins = {
        key: rounded_options.stand_in(key) for key in rounded_options if key not in activations
    }
    effort, least = measurements.passes.effort, least_effort(measurements, space, goal)
    if effort < least:
        raise ValueError(
            f"effort is {effort:g}: the smallest search of this network and these data takes "
            f"{least} passes{_because(measurements)}"
        )
    rounded_options.make(stand_ins.values())
    scored = _scored(rounded_options, dict.fromkeys(stand_ins.values()))
    scores = {k: scored[s] for k, s in stand_ins.items() if k == s}
    measured = measure_options(rounded_options, activations, precision)
    near = near_limit(rounded_options, goal)
    for _ in range(ROUNDS):
        hoped = scores | {
            key: _hoped(rounded_options, key, scored[other], scores)
            for key, other in stand_ins.items()
            if key not in scores
        }
        allocation = Allocation.of(
            measurements, Sensitivity(rounded_options, measured, hoped), goal, near
        )
        new = [key for key in near_frontier(allocation) if not rounded_options.has_made(key)]
        if not new:
            break
        rounded_options.make(new)
        scores |= _scored(rounded_options, new)
    scores = hoped | scores
    for _ in range(ROUNDS):
        sensitivity = Sensitivity(rounded_options, measured, scores)
        allocation = Allocation.of(measurements, sensitivity, goal, near)
        increases = sensitivity.loss_increases
        new = [key for key in near_frontier(allocation) if key not in measured]
        if not new or measurements.passes.left <= 0:
            break
        # what is off most where it counts: large increases leave the second order
        new.sort(key=lambda key: -increases[key])
        measured |= measure_options(rounded_options, new, precision)
    measurements.network.forget()
    sensitivity = Sensitivity(rounded_options, measured, scores)
    return sensitivity, Allocation.of(measurements, sensitivity, goal, near)


def _hoped(
    rounded_options: RoundedOptions, key: str, nearest: float, scores: Mapping[str, float]
) -> float:
    """A low guess of what rounding by GPTQ loses: a share of what rounding to nearest loses; or
    less, from what GPTQ with fewer levels lost, as errors fall with the square of their number.

    Without the second, two bits are never tried where three levels do well.
    """
    _, name, choice = rounded_options.choices[key]
    found = [BY_GPTQ * nearest]
    for other, score in scores.items():
        _, own, tried = rounded_options.choices[other]
        if own == name and tried.rounding == "gptq" and tried.count < choice.count:
            found.append(score * (tried.count / choice.count) ** 2)
    return min(found)


def least_effort(measurements: Measurements, space: SearchSpace, goal: Goal) -> int:
    """Passes of the smallest search: those taken, the scores, the depths that are halved, and a few
    candidates."""
    most = max(map(len, space.tensors.values()))
    examples = sum(map(len, measurements.some_calibration(SCORED, TOGETHER)))
    least = measurements.passes.taken + CANDIDATES
    least += (3 + most) * examples / measurements.examples
    if goal.budget is None:
        choices = space.tensors.values()
        least += len({choice.width for some in choices for choice in some}).bit_length()
    return math.ceil(least)


def _because(measurements: Measurements) -> str:
    """Why the smallest search takes many passes, in words; nothing where it doesn't."""
    trained, examples = sum(map(len, measurements.calibration)), measurements.examples
    if trained <= examples:
        return ""
    return (
        f", as a pass is only {examples:,} validation examples and {trained:,} training examples "
        "calibrate: give more of the one, or fewer of the other"
    )


def _scored(
    rounded_options: RoundedOptions, keys: Sequence[str] | dict[str, None]
) -> dict[str, float]:
    """By key, of tensors, what gradients predict; kept in the store."""
    measurements, found = rounded_options.measurements, dict[str, float]()
    by_name: dict[str, list[str]] = {}
    for key in keys:
        kept = measurements.store.get(f"score {key}")
        if kept is not None:
            found[key] = kept[1]
        else:
            by_name.setdefault(rounded_options.choice(key)[1], []).append(key)
    batches = measurements.some_calibration(SCORED, TOGETHER)
    # forward and back, and the products again for each option
    most = max(Counter(rounded_options.choice(key)[1] for key in keys).values(), default=0)
    measurements.passes.add(sum(map(len, batches)) * (3 + most) if keys else 0.0)
    if not by_name:
        return found
    options = {name: [rounded_options[key] for key in same] for name, same in by_name.items()}
    scores = score_options(
        measurements.model,
        measurements.criterion,
        batches,
        options,  # type: ignore[arg-type]
        gain=measurements.original.gain or 1.0,
        seed=measurements.seed,
    )
    for name, same in by_name.items():
        for key, score in zip(same, scores[name], strict=True):
            measurements.store.put(f"score {key}", {}, score)
            found[key] = score
    return found


def near_frontier(allocation: Allocation) -> list[str]:
    """The keys of the choices that the best allocations near the goal take, and of the next ones up
    and down from these."""
    goal, groups = allocation.goal, allocation.groups
    slopes = sorted({s for group in groups for s in _slopes(group)})
    if len(slopes) > SLOPES:
        slopes = [slopes[i] for i in np.linspace(0, len(slopes) - 1, SLOPES).round().astype(int)]
    low, high = allocation.near
    found: set[tuple[int, int]] = set()
    # of those outside, the nearest on each side: test_something_is_measured_whatever_the_limit
    outside: dict[bool, list[int]] = {}
    for slope in (0.0, *slopes):
        chosen = [_best(group, slope) for group in groups]
        picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
        increase = sum(option.loss_increase for option in picked)
        cost = allocation.fixed + sum(option.cost for option in picked)
        if goal.budget is None:
            inside = low <= increase <= high
        else:
            inside = WITHIN[0] * goal.budget <= cost <= WITHIN[1] * goal.budget
        if not inside and (increase < low or True not in outside):
            outside[increase >= low] = chosen
        if inside:
            found |= {(g, i + step) for g, i in enumerate(chosen) for step in (-1, 0, 1)}
    if not found:
        found = {(g, i) for chosen in outside.values() for g, i in enumerate(chosen)}
    keys = []
    for g, i in sorted(found):
        if 0 <= i < len(groups[g]):
            for name, choice in groups[g][i].tensors.items():
                if choice is not None:
                    keys.append(choice_key("tensors", name, choice))
    return list(dict.fromkeys(keys))


def _slopes(group: Sequence[Option]) -> list[float]:
    """Loss increases per saved cost along the lower convex hull of a group's options."""
    found, at = [], 0
    while at < len(group) - 1:
        each = [
            (option.loss_increase - group[at].loss_increase) / (group[at].cost - option.cost)
            for option in group[at + 1 :]
        ]
        least = min(range(len(each)), key=lambda i: (each[i], -i))
        found.append(each[least])
        at += 1 + least
    return found


def _best(group: Sequence[Option], slope: float) -> int:
    return min(range(len(group)), key=lambda i: group[i].loss_increase + slope * group[i].cost)
