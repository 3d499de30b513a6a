"""Picture of what each tensor costs alone, in the colours of `quantifind.utils.palette`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from quantifind.certification.certificate import minimum_safe_bits
from quantifind.utils.palette import FOUND, NOT_TRIED, limit_mark
from quantifind.workflow.visualization_workflow import (
    height,
    name_rows,
    styled,
    thinner,
    title,
)
from stages.alone import SHARES, cost_grid, guessed_cells, in_spans, labelled, left_out, near

# titles of the panels of `visualize_sensitivity`
ROUNDINGS = {"nearest": "round to nearest", "gptq": "GPTQ"}
# standard errors by which a tensor is to be safe
SURE = 2
# how cells are marked that no example measured
PREDICTED: dict[str, Any] = {"fill": False, "hatch": "////", "ec": "#7a8794", "lw": 0, "alpha": 0.6}


@styled
def visualize_sensitivity(
    sensitivity: pd.DataFrame,
    *,
    name: str = "",
    limits: Sequence[float] = (1.01, 1.05),
    tensors: pd.DataFrame | None = None,
) -> Figure:
    """What each tensor alone costs at each width: a row per tensor, a panel per kind of rounding.

    The `quantifind.certification.certificate.minimum_safe_bits` at each limit, with `SURE` standard
    errors added to what was measured, are marked in the panel in which the loss increases least.

    sensitivity: a table of `quantifind.mixed_precision.sensitivity.measure_sensitivity`; the least
        loss increase of a width is shown.
    name: of the network, for the title.
    limits: of the criterion ratio.
    tensors: what they become in the answer (`stages.tensors.tensor_table`); these cells are
        outlined.
    """
    if sensitivity.empty:
        figure = plt.figure(figsize=(9, 3.6))
        figure.text(0.5, 0.5, "no tensor was measured alone", ha="center")
        figure.suptitle(title("Loss increase from each tensor alone", name))
        return figure
    labels = labelled(sensitivity)
    parts = dict(tuple(sensitivity.groupby("rounding", sort=False)))
    grids = {
        str(rounding): cost_grid(part).reindex(labels.unique()) for rounding, part in parts.items()
    }
    safe = {limit: minimum_safe_bits(sensitivity, limit, errors=SURE) for limit in limits}
    ringed = [bits for found in safe.values() for bits in found.values() if bits is not None]
    given = [] if tensors is None else tensors["bits"].tolist()
    if wide := left_out(list(grids.values()), [*ringed, *given]):
        grids = {
            rounding: grid.drop(columns=wide, errors="ignore") for rounding, grid in grids.items()
        }
    guessed = {r: guessed_cells(parts[r], grid) for r, grid in grids.items()}
    rows = labels.nunique()
    figure, panels = plt.subplots(
        1, len(grids), figsize=(9, max(2 + height(rows), 3.6)), layout="constrained", sharey=True,
        squeeze=False, width_ratios=[len(grid.columns) for grid in grids.values()],
    )  # fmt: skip
    colours = plt.get_cmap("Blues").resampled(256)
    norm = BoundaryNorm(SHARES, colours.N, extend="both")
    for axes, (rounding, grid) in zip(panels[0], grids.items(), strict=True):
        cells = axes.imshow(grid.to_numpy(), aspect="auto", cmap=colours, norm=norm)
        axes.set(xlabel="bits", title=ROUNDINGS.get(rounding, rounding), facecolor=NOT_TRIED)
        axes.set_xticks(range(len(grid.columns)), [f"{bits:.2g}" for bits in grid.columns])
        for row, column in zip(*np.nonzero(guessed[rounding].to_numpy()), strict=True):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **PREDICTED))
    name_rows(panels[0][0], labels.unique().tolist())
    figure.colorbar(
        cells, ax=panels[0].tolist(), label="loss increase / float loss", format="%g",
        fraction=0.04,
    )  # fmt: skip
    by_rounding = dict(zip(grids, panels[0], strict=True))
    rings: list[Artist] = []
    for number, limit in enumerate(limits):
        rings.append(_ring(by_rounding, grids, safe[limit], number, limit))
    if tensors is not None:
        rings += _outline(by_rounding, grids, tensors)
    if any(grid.any(axis=None) for grid in guessed.values()):
        rings.append(Patch(label="predicted, not measured", **PREDICTED))
    if wide:
        panels[0][0].set(xlabel=f"bits (without {in_spans(wide)}, which cost nothing)")
    if any(grid.isna().any(axis=None) for grid in grids.values()):
        rings.append(Patch(facecolor=NOT_TRIED, label="not tried"))
    figure.legend(handles=rings, loc="outside lower center", ncols=2)
    figure.suptitle(title("Loss increase from each tensor alone, by rounding", name))
    return figure


def _ring(
    panels: Mapping[str, Axes],
    grids: Mapping[str, pd.DataFrame],
    safe: Mapping[str, Any],
    number: int,
    limit: float,
) -> Artist:
    """Mark the safe bits of each tensor in the panel in which it loses least; the entry in the
    legend."""
    look = limit_mark(number) | {"ls": ""}
    tensors = next(iter(grids.values())).index
    share = thinner(len(tensors))
    thin = look | {"ms": max(look["ms"] * share, 3), "mew": max(look["mew"] * share, 0.8)}
    for row, tensor in enumerate(tensors):
        bits = safe[tensor]
        reached = {
            r: grid.loc[tensor, bits]
            for r, grid in grids.items()
            if bits in grid and np.isfinite(grid.loc[tensor, bits])
        }
        if reached:
            rounding = min(reached, key=reached.__getitem__)
            panels[rounding].plot(grids[rounding].columns.tolist().index(bits), row, **thin)
    label = f"safe by {SURE} standard errors, predicted, for CR ≤ {limit:g}"
    return Line2D([], [], label=label, **look)


def _outline(
    panels: Mapping[str, Axes], grids: Mapping[str, pd.DataFrame], tensors: pd.DataFrame
) -> list[Artist]:
    """Outline what tensors become, in the panel of their rounding; its entry in the legend, if it
    is any."""
    share = thinner(len(next(iter(grids.values()))))
    look: dict[str, Any] = {"fill": False, "ec": FOUND, "lw": max(2.5 * share, 0.8)}
    found = False
    for label, row in zip(labelled(tensors), tensors.to_dict("records"), strict=True):
        how = row["becomes"].split(", ")
        for rounding, grid in grids.items():
            columns = [place for place, bits in enumerate(grid) if near(row["bits"], bits)]
            if label in grid.index and rounding in [word.lower() for word in how] and columns:
                place = (columns[0] - 0.46, list(grid.index).index(label) - 0.46)
                panels[rounding].add_patch(Rectangle(place, 0.92, 0.92, **look))
                found = True
    return [Patch(label="what the answer takes", **look)] if found else []
