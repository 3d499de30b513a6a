"""Pictures of what quantization costs; the same thing has the same colour in all of them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quantifind.certificate import certified_depth

QUANTIZED, FLOAT, TRAIN = "tab:blue", "tab:gray", "tab:orange"
CERTIFIED = ("tab:green", "tab:red", "tab:purple", "tab:brown")
SHOWN_DEPTHS = (2, 3, 4, 6, 8)


def visualize_bit_depth_results(
    results: pd.DataFrame, *, name: str = "", limits: Sequence[float] = (1.01, 1.05)
) -> dict[str, Figure]:
    """Criterion, criterion ratio and signal-to-complexity ratio against bit depth.

    results: a table of `evaluate_bit_depths`. limits: criterion ratios at which to mark the lowest
    certified depth. name: of the network, for the titles.
    Returns: the figures ``criterion``, ``criterion_ratio`` and ``signal_to_complexity``.
    """
    results = results.sort_values("bit_depth")
    depths = results["bit_depth"]

    criterion, axes = _depth_axes(_title("Criterion", name), "criterion (mean loss)", depths)
    baseline = results["original_criterion"].iloc[0]
    axes.plot(depths, results["criterion"], "o-", ms=4, color=QUANTIZED, label="quantized")
    axes.axhline(baseline, color=FLOAT, ls="--", label=f"float, {baseline:.4g}")
    _mark_certified(axes, results, "criterion", limits)

    ratio, axes = _depth_axes(
        _title("Criterion ratio", name), "criterion ratio (1 is lossless)", depths
    )
    low, high = results["criterion_ratio_low"], results["criterion_ratio_high"]
    axes.fill_between(depths, low, high, color=QUANTIZED, alpha=0.25, lw=0, label="95% interval")
    axes.plot(depths, results["criterion_ratio"], "o-", ms=4, color=QUANTIZED, label="quantized")
    axes.axhline(1, color=FLOAT, ls="--", label="float")
    _mark_certified(axes, results, "criterion_ratio", limits)

    complexity, axes = _depth_axes(
        _title("Signal-to-complexity ratio", name), "criterion per bit (lower is better)", depths
    )
    scr = results["signal_to_complexity"]
    axes.plot(depths, scr, "o-", ms=4, color=QUANTIZED, label="quantized")
    best = scr.idxmin()
    axes.plot(
        depths[best], scr[best], "*", ms=14, color="black", label=f"lowest: {depths[best]:.0f} bits"
    )
    _mark_certified(axes, results, "signal_to_complexity", limits)

    figures = {
        "criterion": criterion,
        "criterion_ratio": ratio,
        "signal_to_complexity": complexity,
    }
    for figure in figures.values():
        figure.axes[0].legend()
    return figures


def visualize_history(history: pd.DataFrame, *, name: str = "") -> Figure:
    """Training and validation loss by epoch, from `train_network`; accuracy where there is one."""
    classifier = "val_accuracy" in history
    figure, panels = plt.subplots(
        1, 1 + classifier, figsize=(8 if classifier else 6.4, 4), layout="constrained", squeeze=False
    )
    loss = panels[0, 0]
    loss.plot(history["epoch"], history["train_loss"], "o-", ms=4, color=TRAIN, label="train")
    loss.plot(history["epoch"], history["val_loss"], "o-", ms=4, color=QUANTIZED, label="validation")
    loss.set(ylabel="mean loss", yscale="log")
    loss.legend()
    if classifier:
        accuracy = panels[0, 1]
        accuracy.plot(history["epoch"], 100 * history["val_accuracy"], "o-", ms=4, color=QUANTIZED)
        accuracy.set(ylabel="validation accuracy (%)")
    for axes in panels.flat:
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.suptitle(_title("Training history", name))
    return figure


def visualize_weight_error(
    errors: pd.DataFrame, *, name: str = "", bit_depths: Sequence[int] = SHOWN_DEPTHS
) -> Figure:
    """SQNR of each tensor at some depths: a row per tensor, in the network's order.

    errors: columns ``tensor``, ``bit_depth``, ``sqnr_db``; an infinite SQNR is left out.
    """
    tensors = list(dict.fromkeys(errors["tensor"]))
    height = 1.6 + 0.24 * len(tensors)
    figure, axes = plt.subplots(figsize=(8, max(height, 3)), layout="constrained")
    shown = [bits for bits in bit_depths if bits in set(errors["bit_depth"])]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(shown), 1)))
    for bits, colour in zip(shown, colours, strict=False):
        rows = errors[(errors["bit_depth"] == bits) & np.isfinite(errors["sqnr_db"])]
        places = [tensors.index(tensor) for tensor in rows["tensor"]]
        axes.plot(rows["sqnr_db"], places, "o", color=colour, label=f"{bits} bits")
    axes.set(xlabel="signal-to-quantization-noise ratio of the weights (dB)", ylim=(len(tensors) - 0.5, -0.5))
    axes.set_yticks(range(len(tensors)), tensors, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(_title("Weight SQNR per tensor", name))
    return figure


def _title(subject: str, name: str) -> str:
    return f"{subject}: {name}" if name else subject


def _depth_axes(title: str, ylabel: str, depths: pd.Series) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set(title=title, xlabel="bit depth (bits per parameter)", ylabel=ylabel, yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _mark_certified(
    axes: Axes, results: pd.DataFrame, column: str, limits: Sequence[float]
) -> None:
    for limit, colour in zip(limits, CERTIFIED, strict=False):
        depth = certified_depth(results, limit)
        if depth is not None:
            value = results.loc[results["bit_depth"] == depth, column].iloc[0]
            label = f"certified CR ≤ {limit:g}: {depth} bits"
            axes.plot(depth, value, "o", ms=10, mew=2, mfc="none", color=colour, label=label)
            axes.axvline(depth, color=colour, lw=1, ls=":")
