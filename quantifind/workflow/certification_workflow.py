"""Walk down the ladder of a search on test data: what it certifies."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from quantifind.certification.digits import amount, bound, limit
from quantifind.certification.goal import Goal, Limit, steps_that_keep
from quantifind.certification.ledger import Look, look
from quantifind.certification.measures import (
    MEASURES,
    Columns,
    bounds_at,
    calibrated,
    examples_needed,
    matched,
)
from quantifind.certification.tails import change_skewness
from quantifind.runtime.control import Control
from quantifind.runtime.evaluator import Evaluator
from quantifind.storage.artifact import pack
from quantifind.storage.store import fingerprint, fingerprint_of_examples
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.arguments import check
from quantifind.utils.batches import Batch, Forward
from quantifind.utils.console import console
from quantifind.workflow.evaluation_workflow import evaluate_strategies

if TYPE_CHECKING:  # so that a new search judges nothing again
    from quantifind.mixed_precision.found import Found


@dataclass(frozen=True)
class Certificate:
    """What test data say of what a search found.

    limits, confidence: what is certified: that each measure is at most its limit.
    look: which of the ladders judged on these data it is, where they are counted; its level is what
        counts, and all of them together have the confidence.
    needed: where nothing is certified, about how many examples it would take for the first.
    steps: a row per strategy of the ladder, from most bytes to fewest: the columns of
        `judge_ladder`, and ``certified``.
    strategy, quantized: the last that passed, None where none did.
    """

    limits: Mapping[str, float]
    confidence: float
    steps: pd.DataFrame
    strategy: Strategy | None
    quantized: Quantized | None
    look: Look | None = None
    needed: int | None = None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        certified = self.steps[self.steps["certified"]]
        row = self.steps.iloc[0] if certified.empty else certified.iloc[-1]
        bits = f"{row['mean_bits']:.4g} bits per parameter"
        limits = " and ".join(f"{MEASURES[n].words} {limit(n, v)}" for n, v in self.limits.items())
        end = "bound" if self.look is None else "look_bound"
        found = "; ".join(
            f"{MEASURES[n].words} {amount(n, row[n])}, at most {bound(n, row[f'{n}_{end}'])}"
            for n in self.limits
        )
        counted = ""
        if self.look is not None:
            counted = (
                f" (look {self.look.k} at these data; the confidence is of all looks together)"
            )
        if certified.empty:
            more = "" if self.needed is None else f"; it takes about {self.needed:,} examples"
            more = _no_number(row, self.limits) or more
            return f"Nothing is certified at {limits}: {bits} have {found}{more}"
        return (
            f"{bits} are certified at {limits}: {found} "
            f"with {self.confidence:.0%} confidence on test data{counted}"
        )


@dataclass(frozen=True)
class Judged:
    """A ladder on test data.

    steps: a row per strategy, from most bytes to fewest: the columns of `evaluate_strategies`,
        ``change_skewness`` and ``examples``; ``…_look_bound`` where looks are counted; and of what
        was trained further those of `quantifind.certification.measures.matched`.
    columns: of each strategy, by example, with ``calibrated_loss``.
    gains: of each, what its outputs are multiplied with; None where none suits them.
    look: which of the ladders judged on these data it is, where they are counted.
    """

    steps: pd.DataFrame
    columns: Sequence[Columns]
    gains: Sequence[float | None]
    look: Look | None

    def passed(self, limits: Mapping[str, float]) -> int:
        """How many of its steps keep the limits, walked from the top."""
        return steps_that_keep(self.steps, limits, "bound" if self.look is None else "look_bound")

    def needed(self, limits: Mapping[str, float], confidence: float) -> int | None:
        """About how many examples it takes to certify the first step."""
        sure = confidence if self.look is None else self.look.confidence
        return examples_needed(self.columns[0], limits, sure, self.gains[0])


def _no_number(row: "pd.Series[Any]", limits: Iterable[str]) -> str:
    """Why a measure of a step is NaN, in words; nothing where none is."""
    if not any(math.isnan(row[name]) for name in limits):
        return ""
    if math.isnan(row["relative_error"]):
        return "; outputs of the quantized network are NaN"
    if not math.isfinite(row["criterion"]):
        return f"; the quantized network's loss is {row['criterion']}"
    if row["original_criterion"] == 0:
        return "; the float network's loss is 0: it has no ratios"
    return "; no temperature suits the outputs, or no example has a label that counts"


def certify(
    model: nn.Module,
    found: "Found",
    test_loader: Iterable[Any],
    *,
    limit: Limit | None = None,
    looks: Path | str | None = None,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> Certificate:
    """Walk down the ladder of a search on test data, for as long as each step keeps the limit.

    Several strategies are tried, and what passes last is certified at the level of a single test
    (`quantifind.certification.goal.steps_that_keep`).

    model: the network of the search.
    found: of `quantifind.search.find_strategy`, whose measure, criterion and confidence count.
    test_loader: batches of test data, which took no part in the search.
    limit: as `quantifind.search.find_strategy` takes it, by default that of the search; one is
        needed where that had a budget. A number is of the search's measure.
    looks: as `judge_ladder` takes it. By default this is taken to be the only ladder.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Raises: ValueError as `judge_ladder`, and where there is no limit.
    """
    check(hasattr(found, "ladder"), "found", found, "what find_strategy returned is needed")
    limits, measure = found.goal.limits, found.goal.measure
    if limit is not None:
        limits = Goal.of(limit if isinstance(limit, Mapping) else {measure: limit}, None).limits
    if not limits:
        raise ValueError(f"the search had a budget: give the limit of {measure} to certify")
    judged = judge_ladder(
        model,
        found.ladder,
        test_loader,
        found.criterion,
        limits=limits,
        confidence=found.confidence,
        control=found.control,
        looks=looks,
        forward=found.forward,
        engine=engine,
        scheduler=scheduler,
    )
    passed = judged.passed(limits)
    steps = judged.steps.assign(certified=[number < passed for number in range(len(judged.steps))])
    last = found.ladder.iloc[passed - 1] if passed else {"strategy": None, "quantized": None}
    needed = None if passed else judged.needed(limits, found.confidence)
    kept = last["strategy"], last["quantized"]
    return Certificate(limits, found.confidence, steps, *kept, judged.look, needed)


def judge_ladder(
    model: nn.Module,
    ladder: pd.DataFrame,
    test_loader: Iterable[Any],
    criterion: Any,
    *,
    limits: Mapping[str, float],
    confidence: float = 0.95,
    control: Control | None = None,
    looks: Path | str | None = None,
    forward: Forward | None = None,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> Judged:
    """Judge the ladder of a search beside the float network, at the temperatures of the search.

    ladder: rows of `quantifind.mixed_precision.found.Found.candidates`.
    test_loader, criterion, forward: as `evaluate_strategies` takes them.
    limits: what is to be certified, by measure.
    confidence: of the intervals; and of all looks together.
    control: of what was trained further.
    looks: a file in which each ladder that is judged on these examples, in whatever order, is
        counted (`quantifind.certification.ledger`): the k-th is certified at 5%/(k(k + 1)), so that
        all answers together have the confidence.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Raises: ValueError as `evaluate_strategies`, and for a limit of what the data do not have.
    """
    # gone through once, as shuffled loaders have another order each time:
    # test_the_matched_ratio_is_one_mean_loss_over_the_other
    batches = Evaluator(model, test_loader, criterion, forward=forward).given_batches()
    fixed: dict[str, Any] = {}
    gains: list[float | None] = [None] * len(ladder)
    if "temperature" in ladder:
        fixed["temperatures"] = ladder["temperature"].tolist()
        fixed["original_temperature"] = float(ladder["original_temperature"].iloc[0])
        gains = [1 / temperature for temperature in fixed["temperatures"]]
    steps = evaluate_strategies(
        model,
        ladder["strategy"],
        batches,
        criterion,
        quantized=ladder["quantized"],
        **fixed,
        forward=forward,
        confidence=confidence,
        columns=True,
        engine=engine,
        scheduler=scheduler,
    )
    columns = [calibrated(*pair) for pair in zip(steps.pop("columns"), gains, strict=True)]
    if missing := [name for name in limits if f"{name}_bound" not in steps]:
        have = ", ".join(name for name in MEASURES if f"{name}_bound" in steps)
        raise ValueError(f"limit {', '.join(missing)}: this network and these data have {have}")
    tested = [columns[0]["original_loss"].mean(), columns[0]["squared_norm"].mean()]
    if "temperature" in ladder:
        tested += [fixed["original_temperature"], ladder["temperature"].mean()]
    counted = None
    if looks is not None:
        counted = _counted(looks, ladder, batches, limits, tested, confidence)
    added: list[dict[str, float]] = [
        {
            "change_skewness": change_skewness(each, next(iter(limits))),
            "examples": len(each["loss"]),
        }
        for each in columns
    ]
    if counted is not None:
        for row, each, gain in zip(added, columns, gains, strict=True):
            row |= bounds_at(each, limits, counted.confidence, gain)
    if control is not None and not control.fault:
        beside = Evaluator(control.network(model), batches, criterion, forward=forward)
        losses = beside.outcome()["loss"].cpu().numpy()
        for row, each, answer in zip(added, columns, ladder["answer"], strict=True):
            row |= matched(each, losses, confidence=confidence) if answer == "trained" else {}
    return Judged(steps.join(pd.DataFrame(added)), columns, gains, counted)


def with_look_bounds(rows: pd.DataFrame, limits: Iterable[str], counted: Look) -> pd.DataFrame:
    """Other strategies than those of the ladder, judged on the same examples at the level of its
    look.

    rows: of `evaluate_strategies` with ``columns``.
    limits: the measures.
    counted: the look.
    Returns: the rows with ``…_look_bound`` in place of the columns.
    """
    gains = 1 / rows["temperature"] if "temperature" in rows else [None] * len(rows)
    judged = [
        bounds_at(each, limits, counted.confidence, gain)
        for each, gain in zip(rows["columns"], gains, strict=True)
    ]
    return rows.drop(columns="columns").join(pd.DataFrame(judged, index=rows.index))


def _counted(
    looks: Path | str,
    ladder: pd.DataFrame,
    batches: Sequence[Batch],
    limits: Mapping[str, float],
    tested: Sequence[float],
    confidence: float,
) -> Look:
    """The look of a ladder, of codes and limits; and of what the criterion, the float network and
    temperatures make of the examples (test_another_test_is_another_look)."""
    if not all(batch.apart for batch in batches):
        console.print(
            "The examples of some batches can't be told apart: in other batches the same test data "
            "would be counted anew, and the looks together would err more often than they say",
            markup=False,
        )
    parts = (part for quantized in ladder["quantized"] for part in pack(quantized))
    split, judged = fingerprint_of_examples(batches), fingerprint(*parts, dict(limits))
    finite = [number for number in map(float, tested) if math.isfinite(number)]
    return look(looks, split[:24], judged[:24], tested=finite, confidence=confidence)
