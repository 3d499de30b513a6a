"""What a search was asked for, as far as its data have it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantifind.certification.digits import limits_in_words
from quantifind.certification.goal import Goal, Limit
from quantifind.metrics import Outcome, is_classification
from quantifind.utils.console import console
from quantifind.utils.gains import gains_of

# where the data have no other measure, and no limit is given
RELATIVE_ERROR = 0.05
# what a measure takes
_LABELS = "needs targets that are class labels, one for each example"
_LOSS = "a ratio needs a float network whose mean loss is above 0"
_LOGITS = "needs logits, with cross entropy, or a squared error; and a loss above 0, at the best "
_LOGITS += "temperature, too"
_WANTS = {"accuracy_drop": _LABELS, "flips": _LABELS, "criterion_ratio": _LOSS}
_WANTS |= {"calibrated_ratio": _LOGITS, "fidelity": _LOGITS}


def asked_goal(limit: Limit | None, budget: Limit | None, criterion: Any) -> Goal:
    """The goal of what `quantifind.search.find_strategy` was asked for.

    Raises: ValueError as `Goal.of`, and for a limit that takes a criterion where there is none.
    """
    if limit is None and budget is None and criterion is None:
        limit = {"relative_error": RELATIVE_ERROR}
    goal = Goal.of(limit, budget)
    if criterion is not None:
        return goal
    if not goal.limits:
        return replace(goal, measure="relative_error")
    if goal.limits.keys() != {"relative_error"}:
        raise ValueError(
            f"limit {', '.join(goal.limits)} needs a criterion; without one, limit "
            "{'relative_error': 0.05} holds the outputs to the float network's"
        )
    return goal


def measurable(goal: Goal, original: Outcome, *, default: bool) -> Goal:
    """The goal, with those of the default limits that the data can be judged by. What takes the
    place of one that they have not is said, and so is a temperature at the end of what is tried.

    Raises: ValueError for a measure that the data have not.
    """
    have = ["relative_error"]
    if original.criterion > 0:
        have.append("criterion_ratio")
        if original.gain is not None:
            have += ["calibrated_ratio", "fidelity"]
    if is_classification(original):
        have += ["accuracy_drop", "flips"]
    limits = {name: limit for name, limit in goal.limits.items() if name in have}
    if default and "calibrated_ratio" in goal.limits.keys() - limits.keys():
        # a loss that no gain suits: test_the_default_limit_of_a_loss_of_ones_own
        ratio = {"criterion_ratio": goal.limits["calibrated_ratio"]}
        limits = ratio | limits if limits and original.criterion > 0 else {}
        limits = limits or {"relative_error": RELATIVE_ERROR}
        _say_instead(limits)
    if not goal.limits and goal.measure not in have:
        # a budget: the loss itself is 0, so nothing is a ratio to it
        return replace(goal, measure="relative_error")
    if len(limits) == len(goal.limits) or default:
        goal = replace(goal, measure=next(iter(limits), goal.measure), limits=limits)
        _say_temperature(goal, original)
        return goal
    missing = ", ".join(name for name in goal.limits if name not in limits)
    raise ValueError(
        f"limit {missing}: {_WANTS[next(n for n in goal.limits if n not in limits)]}; this network "
        f"and its data have {', '.join(have)}"
    )


def _say_instead(limits: Mapping[str, float]) -> None:
    """Say which limits take the place of the default ones."""
    console.print(
        f"There is no calibrated ratio, which {_LOGITS}: the limit is {limits_in_words(limits)}",
        markup=False,
    )


def _say_temperature(goal: Goal, original: Outcome) -> None:
    """Print a note where the float network's temperature is at the end of the values tried."""
    if "calibrated_ratio" not in goal.limits or original.gain is None:
        return
    if gains_of(original["scaled_loss"]).is_at_an_end(original.gain):
        console.print(
            f"The float network's loss on validation data still falls at a temperature of "
            f"{1 / original.gain:.3g}, the last that is tried: calibrated ratios use that one",
            markup=False,
        )
