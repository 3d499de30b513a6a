"""What each tensor costs alone, as grids by tensor and width, for the report and the picture."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

# loss increases as shares of the loss, between which colours change; below the first a tensor costs
# nothing that can be seen
SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)


def labelled(table: pd.DataFrame) -> pd.Series:
    """What people read for a tensor or an activation.

    table: with ``kind`` and ``name``.
    """
    return table["name"].where(table["kind"] == "tensors", "input of " + table["name"])


def cost_grid(table: pd.DataFrame) -> pd.DataFrame:
    """By label and width the least loss increase, as a share of the float loss.

    table: of `quantifind.mixed_precision.sensitivity.measure_sensitivity`, or some of its rows.
    """
    if "examples" in table:  # what was measured, where anything was
        most = table.groupby(["kind", "name", "bits"])["examples"].transform("max")
        table = table[(table["examples"] > 0) | (most == 0)]
    share = table["loss_increase"] / table["original_criterion"]
    table = table.assign(label=labelled(table), share=share)
    grid = table.pivot_table(
        index="label", columns="bits", values="share", aggfunc="min", dropna=False
    )
    return grid.reindex(table["label"].unique())


def guessed_cells(table: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Of a grid, in which cells the loss increase was predicted: no example measured it.

    table: of which it was made.
    """
    if "examples" not in table:
        return pd.DataFrame(False, grid.index, grid.columns)
    most = table.assign(label=labelled(table)).pivot_table(
        index="label", columns="bits", values="examples", aggfunc="max"
    )
    return most.reindex(index=grid.index, columns=grid.columns) == 0


def near(bits: Any, width: Any) -> Any:
    """Whether a code has this width; one of three levels has 1.585 bits, and 1.6 when packed."""
    return abs(bits - width) < 0.05


def left_out(grids: Sequence[pd.DataFrame], needed: Iterable[float]) -> list[float]:
    """The widths that need no column: wider than the first that costs no tensor anything that can
    be seen, and not needed.

    grids: as `cost_grid` gives them.
    needed: widths that are shown whatever they cost, such as those that some tensor has.
    """
    widths: list[Any] = sorted({bits for grid in grids for bits in grid.columns.tolist()})
    kept = list(needed)
    costly = [
        place
        for place, bits in enumerate(widths)
        if any((grid[bits] > SHARES[0]).any() for grid in grids if bits in grid)
    ]
    wider = widths[max(costly, default=-1) + 2 :]
    return [bits for bits in wider if not any(near(bits, width) for width in kept)]


def in_spans(widths: Sequence[float]) -> str:
    """Widths in words, those that follow each other as one.

    >>> in_spans([11, 12, 13, 16]), in_spans([9, 10])
    ('11 to 13, 16', '9, 10')
    """
    spans: list[list[float]] = []
    for bits in widths:
        if spans and bits - spans[-1][-1] <= 1:
            spans[-1].append(bits)
        else:
            spans.append([bits])
    return ", ".join(
        f"{span[0]:g} to {span[-1]:g}" if len(span) > 2 else ", ".join(f"{b:g}" for b in span)
        for span in spans
    )
