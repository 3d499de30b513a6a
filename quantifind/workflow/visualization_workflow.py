"""Pictures of what quantization costs, in the colours of `quantifind.utils.palette`."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from quantifind.certification.certificate import certified_depth
from quantifind.utils.naming import short
from quantifind.utils.palette import (
    FLOAT,
    LIMITS,
    STYLE,
    TRAIN,
    UNIFORM,
    limit_line,
    limit_mark,
    of_width,
)

DEPTH_TICKS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
SHOWN_DEPTHS = (2, 3, 4, 6, 8)
# rows of a picture that has one per tensor, up to which it grows; more are thinner
ROOMY = 40
# lines at places lie below the words that name these, and the words below curves
BELOW, NAMED = 1.0, 1.5
# of words in a picture: points of their font and from row to row, and inches of a line, with room
# for a layout that makes axes lower than they are (test_what_a_picture_says_is_apart)
NAMES, ROW, LINE = 10, 16, 0.22
# by limit of the criterion ratio, the lowest depth certified, None where there is none
Certified = dict[float, int | None]
Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")


def styled(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """A function that draws, in the style of all pictures.

    draw: gives a figure, or several.
    """

    @wraps(draw)
    def in_style(*args: Arguments.args, **named: Arguments.kwargs) -> Drawn:
        with plt.rc_context(STYLE):
            return draw(*args, **named)

    return in_style


@styled
def visualize_bit_depth_results(
    results: pd.DataFrame, *, name: str = "", limits: Sequence[float] = (1.01, 1.05)
) -> dict[str, Figure]:
    """Criterion, criterion ratio and signal-to-complexity ratio against bit depth.

    results: a table of `quantifind.workflow.evaluation_workflow.evaluate_bit_depths`.
    name: of the network, for the titles.
    limits: criterion ratios; the lowest depth certified at each is marked.
    Returns: the figures ``criterion``, ``criterion_ratio`` and ``signal_to_complexity``.
    """
    results = results.sort_values("bit_depth")
    certified = {limit: certified_depth(results, limit) for limit in limits}
    figures = {
        "criterion": _criterion(results, certified),
        "criterion_ratio": _criterion_ratio(results, certified),
        "signal_to_complexity": _signal_to_complexity(results, certified),
    }
    for subject, figure in figures.items():
        figure.suptitle(title(subject.replace("_", " ").capitalize(), name))
    return figures


@styled
def visualize_history(history: pd.DataFrame, *, name: str = "") -> Figure:
    """Training and validation loss by epoch; accuracy where there is one.

    history: a table of `quantifind.workflow.train_workflow.train_network`; may have no rows.
    name: of the network, for the title.
    """
    panels = 1 + ("val_accuracy" in history)
    figure, rows = plt.subplots(1, panels, figsize=(8, 4), layout="constrained", squeeze=False)
    for axes in rows.flat:
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3, which="both")
    loss = rows[0, 0]
    if history.empty:
        loss.annotate("no epoch: weights were given", (0.1, 0.5), xycoords="axes fraction")
    lines = (
        ("train_loss", "train, while\nlearning", TRAIN),
        ("val_loss", "validation,\nafter the epoch", UNIFORM),
    )
    for column, label, colour in lines:
        loss.plot(history["epoch"], history[column], "o-", ms=4, color=colour, label=label)
    log_axis(loss, "mean loss")
    # a table without rows has no numbers
    values = [history[column].astype(float) for column, *_ in lines]
    drawn = [one[np.isfinite(one) & (one > 0)] for one in values]
    ends = [(*row, one.iloc[-1]) for row, one in zip(lines, drawn, strict=True) if len(one)]
    name_heights(loss, [(end, label, colour) for _, label, colour, end in ends])
    if panels > 1:
        accuracy = 100 * history["val_accuracy"]
        rows[0, 1].plot(history["epoch"], accuracy, "o-", ms=4, color=UNIFORM)
        rows[0, 1].set(ylabel="validation accuracy (%)")
    figure.suptitle(title("Training history", name))
    return figure


@styled
def visualize_weight_error(
    errors: pd.DataFrame, *, name: str = "", bit_depths: Sequence[int] = SHOWN_DEPTHS
) -> Figure:
    """SQNR of each tensor at some depths: a row per tensor, in the network's order.

    errors: columns ``tensor``, ``bit_depth``, ``sqnr_db``; an infinite SQNR is left out.
    name: of the network, for the title.
    bit_depths: those to show; where the table has none of them, its five lowest.
    """
    tensors = list(dict.fromkeys(errors["tensor"]))
    figure, axes = plt.subplots(
        figsize=(8, max(1.6 + height(len(tensors)), 3)), layout="constrained"
    )
    depths = sorted(set(errors["bit_depth"]))
    shown = [bits for bits in bit_depths if bits in depths] or depths[:5]
    size = max(8 * thinner(len(tensors)), 3)
    for bits in shown:
        rows = errors[(errors["bit_depth"] == bits) & np.isfinite(errors["sqnr_db"])]
        places = [tensors.index(tensor) for tensor in rows["tensor"]]
        look: Any = {"color": of_width(bits), "mec": FLOAT, "label": f"{bits} bits"}
        axes.plot(rows["sqnr_db"], places, "o", ms=size, mew=0.6, **look)
    axes.set(xlabel="signal-to-quantization-noise ratio (dB)", ylim=(len(tensors) - 0.5, -0.5))
    name_rows(axes, tensors)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title("Weight SQNR per tensor", name))
    return figure


def _criterion(results: pd.DataFrame, certified: Certified) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _depth_axis(axes)
    baseline = results["original_criterion"].iloc[0]
    axes.axhline(baseline, color=FLOAT, ls="--", label="float")
    marks = _curve(axes, results, "criterion", certified)
    log_axis(axes, "mean loss on the judged split")
    name_heights(axes, [(baseline, f"float\n{baseline:.4g}", FLOAT)])
    name_places(axes, marks)
    return figure


def _criterion_ratio(results: pd.DataFrame, certified: Certified) -> Figure:
    """The whole range above, and below it the region in which the limits lie."""
    figure, (whole, near) = plt.subplots(
        2, 1, figsize=(8, 6.5), layout="constrained", sharex=True, height_ratios=(2, 3)
    )
    low, high = results["criterion_ratio_low"], results["criterion_ratio_high"]
    for axes in (whole, near):
        _depth_axis(axes)
        axes.axhline(1, color=FLOAT, ls="--", label="float")
        axes.fill_between(results["bit_depth"], low, high, color=UNIFORM, alpha=0.25, lw=0)
        marks = _curve(axes, results, "criterion_ratio", certified)
    log_axis(whole, "criterion ratio")
    whole.set(xlabel="")
    name_heights(whole, [(1, "float", FLOAT)])
    name_places(whole, marks)
    reach = 2 * max(max(certified, default=1) - 1, 0.01)
    # what lies below 1 is shown, and no empty half
    lowest = low[np.isfinite(low)].min()
    bottom = max(1 - reach, np.fmin(lowest, 1) - 0.2 * reach)
    near.set(ylim=(bottom, 1 + reach), ylabel="criterion ratio near 1\n(shaded: interval)")
    levels = [(1.0, "float", FLOAT)]
    for place, limit in enumerate(certified):
        levels.append((limit, f"limit {limit:g}", LIMITS[place % len(LIMITS)]))
        near.axhline(limit, color=levels[-1][2], lw=1)
    name_heights(near, levels)
    return figure


def _signal_to_complexity(results: pd.DataFrame, certified: Certified) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _depth_axis(axes)
    marks = _curve(axes, results, "signal_to_complexity", certified)
    finite = results[np.isfinite(results["signal_to_complexity"].astype(float))]
    if len(finite):
        best = finite.iloc[finite["signal_to_complexity"].argmin()]
        depth = best["bit_depth"]
        axes.plot(depth, best["signal_to_complexity"], "*", ms=14, color="black")
        axes.axvline(depth, color="black", lw=1, ls=":", zorder=BELOW)
        marks.append((depth, f"lowest: {depth:.0f} bits"))
    log_axis(axes, "criterion per bit (lower is better)")
    name_places(axes, marks)
    return figure


def title(subject: str, name: str) -> str:
    """The title of a picture.

    subject: what it shows.
    name: of the network; may be empty.
    """
    return f"{subject}: {name}" if name else subject


def height(rows: int) -> float:
    """Inches of a picture's rows, one per tensor."""
    return 0.27 * min(rows, ROOMY)


def thinner(rows: int) -> float:
    """How high a row is, as a share of one that has all its room."""
    return min(ROOMY / max(rows, 1), 1)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name rows, one per tensor; where there are many, every nth, which the axis says.

    axes: whose rows are at 0, 1, ….
    names: of all rows.
    """
    step = max(-(-len(names) // ROOMY), 1)
    axes.set_yticks(range(0, len(names), step), list(map(short, names[::step])), fontsize=9)
    if step > 1:
        axes.set(ylabel=f"{len(names)} tensors, one in {step} named")


def _depth_axis(axes: Axes) -> None:
    axes.set(xlabel="bit depth (bits per parameter)", xscale="log", xlim=(1.85, 35))
    axes.xaxis.set_major_locator(FixedLocator(DEPTH_TICKS))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")


def log_axis(axes: Axes, label: str) -> None:
    """A log axis for what has been drawn, with ticks between decades where they are few.

    axes: whose y axis it is.
    label: of that axis.
    """
    axes.set(ylabel=label, yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def name_places(axes: Axes, marks: Iterable[tuple[float, str]]) -> None:
    """Name places of a log axis at the top, each in a row of its own, beside its line.

    axes: whose x axis has its limits.
    marks: each place, and its words.
    """
    low, high = np.log(axes.get_xlim())
    named = sorted(marks, key=lambda mark: mark[0], reverse=True)
    for row, (place, words) in enumerate(named):
        # the longest words take somewhat less than half of it
        rightwards = np.log(place) - low < 0.55 * (high - low)
        axes.annotate(
            words, (place, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(4 if rightwards else -4, -3 - ROW * row), va="top",
            ha="left" if rightwards else "right", fontsize=NAMES, zorder=NAMED,
            bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1},
        )  # fmt: skip


def name_heights(axes: Axes, marks: Iterable[tuple[float, str, str]]) -> None:
    """Name heights at the right of axes, each by a line to its words; where these would meet, the
    upper ones are moved up. What lies outside the axis has no words.

    axes: whose y axis has its limits.
    marks: each height, its words, of one line or more, and the colour of the line.
    """
    as_share = axes.transData + axes.transAxes.inverted()
    apart = axes.transAxes + ScaledTranslation(12 / 72, 0, axes.figure.dpi_scale_trans)
    shares = [
        (as_share.transform((1, value))[1], words, colour)
        for value, words, colour in marks
        if np.isfinite(value)
    ]
    end = -np.inf
    for share, words, colour in sorted(shares):
        if not 0 <= share <= 1:
            continue
        half = LINE * (words.count("\n") + 1) / 2 * axes.figure.dpi / axes.bbox.height
        middle = max(share, end + half)
        end = middle + half
        axes.annotate(
            words, (1, share), xycoords="axes fraction", xytext=(1, middle), textcoords=apart,
            va="center", fontsize=NAMES, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _curve(
    axes: Axes, results: pd.DataFrame, column: str, certified: Certified
) -> list[tuple[float, str]]:
    """A quantity against bit depth, with a ring and a line at each limit's certified depth; the
    words of each of these."""
    marks = []
    axes.plot(results["bit_depth"], results[column], "o-", ms=4, color=UNIFORM, label="quantized")
    for place, (limit, depth) in enumerate(certified.items()):
        if depth is None:
            continue
        value = results.loc[results["bit_depth"] == depth, column].iloc[0]
        label = f"certified CR ≤ {limit:g}: {depth} bits"
        # two limits may certify the same: test_limits_that_certify_the_same_are_both_seen
        axes.plot(depth, value, ls="", label=label, **limit_mark(place))
        axes.axvline(depth, **limit_line(place), zorder=BELOW)
        marks.append((float(depth), label))
    return marks
