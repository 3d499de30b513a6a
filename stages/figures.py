"""Pictures of a search: what it found, what each tensor costs, and how far costs add up."""

import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from quantifind.certification import digits
from quantifind.certification.goal import steps_that_keep
from quantifind.certification.measures import MEASURES
from quantifind.utils.palette import (
    CERTIFIED,
    CHOSEN,
    FLOAT,
    FOUND,
    LIMITS,
    ORIGINS,
    RANDOM,
    TRIED,
    UNIFORM,
)
from quantifind.workflow.visualization_workflow import (
    BELOW,
    DEPTH_TICKS,
    log_axis,
    name_heights,
    name_places,
    styled,
    title,
)

ADJUSTED = ", scales adjusted"
# ratios nearer to 1 are told apart on a linear scale
LINEAR = 1e-3
# of the range near a limit, how many times it what is marked may be away
FAR = 5
# what a frontier is drawn of, as its legend has it
DEPTHS, LADDER, WIDTHS = SERIES = (
    *("uniform depths", "ladder of the search"),
    "random widths, on validation data",
)
# letters of a line beside an axis: test_what_a_picture_says_is_apart
LABEL = 26
# with which names of costs end
UNITS = ("bytes", "picojoules")


@styled
def visualize_frontier(
    frontier: pd.DataFrame,
    uniform: pd.DataFrame,
    *,
    name: str = "",
    measure: str = "criterion_ratio",
    limit: float = 1.01,
    asked: Mapping[str, float] | None = None,
    random: pd.DataFrame | None = None,
) -> Figure:
    """What is lost on test data against bits: the search's ladder beside the uniform depths.

    frontier: the ladder's rows, from most bytes to fewest, as
        `quantifind.workflow.evaluation_workflow.evaluate_strategies` has them.
    uniform: those of the uniform depths.
    name: of the network, for the title.
    measure: what is certified, one of `quantifind.certification.measures.MEASURES`.
    limit: the most that it may be; what is certified is marked on each of the two.
    asked: all limits that are certified, by measure, by default this one.
    random: rows of `quantifind.mixed_precision.random_allocations`, of validation data.
    Returns: the whole range above, and below it the region in which the limit lies.
    """
    uniform = uniform.sort_values("mean_bits", ascending=False)
    asked = {measure: limit} if asked is None else asked
    said = digits.limit(measure, limit)
    marks = _marks(frontier, uniform, asked)
    shown_as = MEASURES[measure]
    words, unit, scale = shown_as.words, shown_as.unit, shown_as.scale
    label = textwrap.fill(words, LABEL)
    lossless, limit = scale * shown_as.lossless, scale * limit
    frontier, uniform = _as_read(frontier, measure), _as_read(uniform, measure)
    random = frontier.iloc[:0] if random is None else _as_read(random, measure)
    figure, (whole, near) = plt.subplots(
        2, 1, figsize=(8, 7), layout="constrained", sharex=True, height_ratios=(2, 3)
    )
    for axes in (whole, near):
        axes.axhline(lossless, color=FLOAT, ls="--", label="float")
        axes.axhline(limit, color=LIMITS[0], lw=1, label=f"limit {said}")
        if len(random):
            axes.plot(
                random["mean_bits"], random[measure], "x", ms=6, mew=1.5, color=RANDOM,
                label=WIDTHS,
            )  # fmt: skip
        _ladder(axes, uniform, measure, UNIFORM, DEPTHS)
        _ladder(axes, frontier, measure, FOUND, LADDER)
        for row, marker, colour, what in marks:
            axes.plot(
                row["mean_bits"], scale * row[measure], marker, ms=11, mew=2, mfc="none",
                color=colour, label=what,
            )  # fmt: skip
            axes.axvline(row["mean_bits"], color=colour, lw=1, ls=":", zorder=BELOW)
    _bits_axis(near, min(frontier["mean_bits"].min(), uniform["mean_bits"].min()))
    if measure == "accuracy_drop":
        whole.set(ylabel=f"{label}\n{unit}")
    else:
        log_axis(whole, f"{label}\n{unit}")
    name_places(whole, [(row["mean_bits"], what) for row, *_, what in marks])
    handles, labels = whole.get_legend_handles_labels()
    named = [h for h, label in zip(handles, labels, strict=True) if label in SERIES]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named))
    values = [*frontier[measure], *uniform[measure], *random[measure]]
    values += [scale * row[f"{measure}_low"] for row, *_, what in marks if "certified" in what]
    marked = [scale * row[measure] for row, *_ in marks]
    near.set(
        ylim=_near(limit, lossless, values, marked, 0.002 * scale),
        ylabel=f"{label}\nnear the limit",
    )
    at_lossless = (lossless, "float", FLOAT)
    name_heights(whole, [at_lossless])
    name_heights(near, [at_lossless, (limit, f"limit\n{said}", LIMITS[0])])
    figure.suptitle(title(f"Bits and {words}", name))
    return figure


def _marks(
    frontier: pd.DataFrame, uniform: pd.DataFrame, limits: Mapping[str, float]
) -> list[tuple[pd.Series, str, str, str]]:
    """What is certified of each, and what was chosen if that is another: marker, colour, words."""
    best, depth = (_kept(table, limits) for table in (frontier, uniform))
    marks = []
    if best:
        marks.append((frontier.iloc[best - 1], CERTIFIED, LIMITS[0], "certified strategy"))
    if depth:
        marks.append((uniform.iloc[depth - 1], "o", LIMITS[0], "certified uniform depth"))
    if "validation_chosen" in frontier:
        places = np.flatnonzero(frontier["validation_chosen"].astype(bool))
        if len(places) and places[0] != best - 1:
            marks.append((frontier.iloc[places[0]], CHOSEN, FOUND, "chosen on validation data"))
    return [
        (row, marker, colour, f"{what}: {row['mean_bits']:.4g} bits")
        for row, marker, colour, what in marks
    ]


def _near(
    limit: float, lossless: float, values: Sequence[float], marked: Sequence[float], least: float
) -> tuple[float, float]:
    """The range near a limit."""
    reach = 2 * max(limit - lossless, least)
    # a ladder may gain, far below the limit: test_frontier_near_the_limit_holds_what_is_certified
    bottom = min(filter(np.isfinite, (lossless, *values)))
    # what is marked is seen: test_frontier_near_the_limit_holds_what_was_chosen; unless nothing
    # else would be: test_what_is_far_from_the_limit_does_not_hide_it
    seen = [v for v in marked if v - lossless < FAR * reach]
    top = max([lossless + reach, *(v + 0.2 * reach for v in seen)])
    return bottom - 0.1 * max(2 * reach, top - bottom), top


@styled
def visualize_prediction(candidates: pd.DataFrame, *, name: str = "") -> Figure:
    """What single tensors' divergences from the float network add up to, against the divergence
    measured of all together: `fidelity`, over the float loss.

    candidates: those of `quantifind.search.find_strategy`; shown are the predicted ones that were
        measured on all examples, with intervals, by origin. Codes that were learned have no
        prediction: they stand on the left edge.
    name: of the network, for the title.
    """
    shown = candidates[candidates["examples"] == candidates["examples"].max()]
    both = ["predicted_fidelity", "fidelity"]
    # a loss of one's own has no fidelity: test_prediction_of_what_has_no_fidelity_is_empty
    shown = shown.reindex(columns=[*shown.columns.union(both, sort=False)])
    measured = np.isfinite(shown["fidelity"].astype(float))
    learned = shown[measured & shown["predicted_fidelity"].isna()]
    shown = shown[np.isfinite(shown[both].astype(float)).all(axis=1)]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    axes.axhline(0, color=FLOAT, ls="--", label="float")
    labels = shown["origin"]
    labels = labels.where(~shown["scales_adjusted"].astype(bool), labels + ADJUSTED)
    for label, rows in shown.groupby(labels):
        colour, marker = ORIGINS.get(re.split(r"\W", str(label))[0], (FLOAT, "o"))
        axes.errorbar(
            rows["predicted_fidelity"], rows["fidelity"], _interval(rows, "fidelity"), fmt=marker,
            ms=5, color=colour, ecolor=to_rgba(colour, 0.35), label=label,
            mfc="white" if str(label).endswith(ADJUSTED) else colour,
        )  # fmt: skip
    for origin, rows in learned.groupby(learned["origin"].str.split().str[0]):
        colour, marker = ORIGINS.get(str(origin), (FLOAT, "o"))
        axes.plot(
            np.full(len(rows), 0.012), rows["fidelity"], marker, color=colour, ms=6,
            transform=axes.get_yaxis_transform(), label=f"{origin}: no prediction",
        )  # fmt: skip
    chosen = shown[shown["chosen"].astype(bool)]
    if len(chosen):
        axes.plot(
            chosen["predicted_fidelity"], chosen["fidelity"], CHOSEN, ms=11, mew=2, mfc="none",
            color=FOUND, label=f"chosen: {chosen['mean_bits'].iloc[0]:.4g} bits",
        )  # fmt: skip
    most = 2 * max(shown["predicted_fidelity"].max(), LINEAR) if len(shown) else 10 * LINEAR
    diagonal = np.linspace(0, 1, 200) ** 4 * most
    axes.plot(diagonal, diagonal, color=FLOAT, lw=1, label="divergences add up")
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.set(
        xlabel="divergence / float loss, predicted from tensors alone",
        ylabel="divergence / float loss, measured on validation data",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title("Predicted and measured divergence from the float network", name))
    return figure


@styled
def visualize_costs(
    candidates: pd.DataFrame,
    costs: Sequence[str],
    *,
    name: str = "",
    measure: str = "criterion_ratio",
    reach: float = 0.1,
) -> Figure:
    """What the candidates lose against each cost, a panel per cost, and the frontier.

    candidates: those of `quantifind.search.find_strategy`; shown are the ones that were measured on
        all examples.
    costs: the columns of their costs.
    name: of the network, for the title.
    measure: of what is lost, one of `quantifind.certification.measures.MEASURES`.
    reach: losses up to at most so much above lossless are shown.
    """
    shown_as = MEASURES[measure]
    words = f"{shown_as.words} {shown_as.unit}" if shown_as.hundredths else shown_as.words
    lossless, reach = shown_as.scale * shown_as.lossless, shown_as.scale * reach
    shown = candidates[candidates["examples"] == candidates["examples"].max()]
    shown = _as_read(shown, measure)
    figure, panels = plt.subplots(
        1,
        len(costs),
        figsize=(4 * len(costs), 4.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    chosen = shown[shown["chosen"].astype(bool)]
    for axes, cost in zip(panels[0], costs, strict=True):
        axes.axhline(lossless, color=FLOAT, ls="--", label="float")
        same = shown["origin"].astype(str).str.startswith("uniform")
        for rows, look, label in (
            (shown[~same], {"marker": "o", "ms": 5, "color": TRIED}, "candidates"),
            (shown[same], {"marker": "s", "ms": 6, "color": UNIFORM}, "the same bits for all"),
        ):
            axes.plot(rows[cost], rows[measure], ls="", label=label, **look)
        best = frontier(shown, cost, measure)
        axes.step(best[cost], best[measure], where="post", color=FOUND, lw=1.2, label="frontier")
        axes.plot(
            chosen[cost], chosen[measure], CHOSEN, ms=10, mew=2, mfc="none", color=FOUND,
            label="chosen",
        )  # fmt: skip
        what, _, unit = cost.rpartition("_")
        label = f"{what} ({unit})" if unit in UNITS else cost.replace("_", " ")
        axes.set(xlabel=label, xscale="log")
        # few factors of two have few ticks between: test_costs_have_ticks_whatever_their_range
        narrow = shown[cost].max() < 4 * shown[cost].min()
        axes.xaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    # nothing is lower where all are missing: test_what_is_no_number_is_drawn_as_missing
    lowest = np.fmin(shown[measure].min(), lossless - reach / 10)
    inside = shown[measure][shown[measure] <= lossless + reach]
    highest = np.fmax(inside.max(), lossless + reach / 10)
    margin = (highest - lowest) / 10
    if above := int((shown[measure] > lossless + reach).sum()):
        words_above = f"{above} of {len(shown)} candidates lose more than is shown"
        figure.text(0.5, 0.88, words_above, ha="center", va="center", fontsize=9, color=FLOAT)
    panels[0][0].set(ylim=(lowest - margin, highest + margin), ylabel=f"{words} on validation data")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title("What the candidates cost", name))
    return figure


def frontier(candidates: pd.DataFrame, cost: str, measure: str = "criterion_ratio") -> pd.DataFrame:
    """The candidates that lose less than all cheaper or equally cheap ones, the cheapest first.

    candidates: those of `quantifind.search.find_strategy`.
    cost: the column of a cost.
    measure: of what is lost.
    """
    ordered = candidates.sort_values([cost, measure], kind="stable")
    before = ordered[measure].cummin().shift(fill_value=np.inf)
    return ordered[ordered[measure] < before]


def _kept(table: pd.DataFrame, limits: Mapping[str, float]) -> int:
    """How many rows pass when the table is walked from the top."""
    looked = all(f"{measure}_look_bound" in table for measure in limits)
    return steps_that_keep(table, limits, "look_bound" if looked else "bound")


def _as_read(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """With the values of a measure as people read them."""
    columns = [c for c in (measure, f"{measure}_low", f"{measure}_high") if c in table]
    return table.assign(**{c: MEASURES[measure].scale * table[c] for c in columns})


def _ladder(axes: Axes, rows: pd.DataFrame, measure: str, colour: str, label: str) -> None:
    """A line through what was measured, from most bits to fewest, with intervals."""
    rows = rows.sort_values("mean_bits", ascending=False)
    axes.errorbar(
        rows["mean_bits"], rows[measure], _interval(rows, measure), fmt="o-", ms=4, lw=1.2,
        elinewidth=1, capsize=2, color=colour, label=label,
    )  # fmt: skip


def _interval(rows: pd.DataFrame, measure: str) -> np.ndarray:
    """How far a measure's interval reaches down and up; NaN where it has no end. (2, rows)"""
    ends = (rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure])
    reach = np.array(ends, dtype=float)
    # rounding can put an exact value a little outside its interval
    return np.where(np.isfinite(reach), np.maximum(reach, 0), np.nan)


def _bits_axis(axes: Axes, fewest: float) -> None:
    axes.set(xlabel="mean bits per parameter", xscale="log", xlim=(min(1.85, 0.9 * fewest), 35))
    axes.xaxis.set_major_locator(FixedLocator((0.5, 1, 1.5, *DEPTH_TICKS)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
