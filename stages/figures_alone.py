"""Picture of what each tensor costs alone, in the colours of `quantifind.utils.palette`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from quantifind.certification.certificate import minimum_safe_bits
from quantifind.utils.palette import NOT_TRIED, limit_mark
from quantifind.workflow.visualization_workflow import styled, title

# titles of the panels of `visualize_sensitivity`
ROUNDINGS = {"nearest": "round to nearest", "gptq": "GPTQ"}
# standard errors by which a tensor is to be safe
SURE = 2
# loss increases as shares of the loss: below the first a tensor costs nothing that can be seen
SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)
# how cells are marked that no example measured
PREDICTED: dict[str, Any] = {"fill": False, "hatch": "////", "ec": "#7a8794", "lw": 0, "alpha": 0.6}


@styled
def visualize_sensitivity(
    sensitivity: pd.DataFrame, *, name: str = "", limits: Sequence[float] = (1.01, 1.05)
) -> Figure:
    """What each tensor alone costs at each width: a row per tensor, a panel per kind of rounding.

    The `quantifind.certification.certificate.minimum_safe_bits` at each limit, with `SURE` standard
    errors added to what was measured, are marked in the panel in which the loss increases least.

    sensitivity: a table of `quantifind.mixed_precision.sensitivity.measure_sensitivity`; the least
        loss increase of a width is shown.
    name: of the network, for the title.
    limits: of the criterion ratio.
    """
    table, grids = _grids(sensitivity)
    labels = table["label"]
    safe = {limit: minimum_safe_bits(sensitivity, limit, errors=SURE) for limit in limits}
    ringed = [bits for found in safe.values() for bits in found.values() if bits is not None]
    if wide := _without_cost(grids, max(ringed, default=0)):
        grids = {
            rounding: grid.drop(columns=wide, errors="ignore") for rounding, grid in grids.items()
        }
    guessed = _guessed(table, grids)
    rows = labels.nunique()
    figure, panels = plt.subplots(
        1, len(grids), figsize=(9, max(2 + 0.27 * rows, 3.6)), layout="constrained", sharey=True,
        squeeze=False, width_ratios=[len(grid.columns) for grid in grids.values()],
    )  # fmt: skip
    colours = plt.get_cmap("Blues").resampled(256)
    norm = BoundaryNorm(SHARES, colours.N, extend="both")
    for axes, (rounding, grid) in zip(panels[0], grids.items(), strict=True):
        cells = axes.imshow(grid.to_numpy(), aspect="auto", cmap=colours, norm=norm)
        axes.set(xlabel="bits", title=ROUNDINGS.get(rounding, rounding), facecolor=NOT_TRIED)
        axes.set_xticks(range(len(grid.columns)), [f"{bits:g}" for bits in grid.columns])
        axes.set_yticks(range(rows), list(labels.unique()), fontsize=9)
        for row, column in zip(*np.nonzero(guessed[rounding].to_numpy()), strict=True):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **PREDICTED))
    figure.colorbar(
        cells, ax=panels[0].tolist(), label="loss increase / float loss", format="%g",
        fraction=0.04,
    )  # fmt: skip
    rings: list[Artist] = []
    for number, limit in enumerate(limits):
        ring = limit_mark(number) | {"ls": ""}
        label = f"safe by {SURE} standard errors, predicted, for CR ≤ {limit:g}"
        rings.append(Line2D([], [], label=label, **ring))
        for row, tensor in enumerate(labels.unique()):
            bits = safe[limit][tensor]
            reached = {
                r: grid.loc[tensor, bits]
                for r, grid in grids.items()
                if bits in grid and np.isfinite(grid.loc[tensor, bits])
            }
            if reached:
                rounding = min(reached, key=reached.__getitem__)
                place = grids[rounding].columns.get_loc(bits)
                panels[0][list(grids).index(rounding)].plot(place, row, **ring)
    if any(grid.any(axis=None) for grid in guessed.values()):
        rings.append(Patch(label="predicted, not measured", **PREDICTED))
    if wide:
        panels[0][0].set(xlabel=f"bits (up to {wide[-1]:g}: as the widest shown)")
    if any(grid.isna().any(axis=None) for grid in grids.values()):
        rings.append(Patch(facecolor=NOT_TRIED, label="not tried"))
    figure.legend(handles=rings, loc="outside lower center", ncols=2)
    figure.suptitle(title("Loss increase from each tensor alone, by rounding", name))
    return figure


def _grids(sensitivity: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The table with a ``label`` and the ``share`` of the loss; and by rounding the least share of
    each label and width."""
    labels = sensitivity["name"].where(
        sensitivity["kind"] == "tensors", "input of " + sensitivity["name"]
    )
    table = sensitivity.assign(
        label=labels, share=sensitivity["loss_increase"] / sensitivity["original_criterion"]
    )
    grids = {
        str(rounding): part.pivot_table(
            index="label", columns="bits", values="share", aggfunc="min", dropna=False
        ).reindex(labels.unique())
        for rounding, part in table.groupby("rounding", sort=False)
    }
    return table, grids


def _without_cost(grids: Mapping[str, pd.DataFrame], ringed: float) -> list[float]:
    """The widest codes, from the second on that cost nothing that can be seen, of any tensor.

    ringed: the widest that has a ring.
    """
    widths: list[Any] = sorted({bits for grid in grids.values() for bits in grid.columns.tolist()})

    def costs(bits: float) -> bool:
        tried = [grid[bits].dropna() for grid in grids.values() if bits in grid]
        return any(not (shares <= SHARES[0]).all() for shares in tried)

    seen = [bits for bits in widths if bits <= ringed or costs(bits)]
    return widths[widths.index(seen[-1]) + 2 :] if seen else []


def _guessed(table: pd.DataFrame, grids: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Of each grid, in which cells the loss increase was predicted: no example measured it."""
    if "examples" not in table:
        return {name: pd.DataFrame(False, grid.index, grid.columns) for name, grid in grids.items()}
    return {
        rounding: table[table["rounding"] == rounding]
        .pivot_table(index="label", columns="bits", values="examples", aggfunc="max")
        .reindex(index=grid.index, columns=grid.columns)
        == 0
        for rounding, grid in grids.items()
    }
