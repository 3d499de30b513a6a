"""What the report says of each tensor: strip, heat map and table, as plain values."""

from typing import Any

import numpy as np
import pandas as pd

from quantifind.utils import palette
from stages import findings

# loss increases as shares of the loss, between which the heat map's colours change
SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)


def strip(tensors: pd.DataFrame) -> dict[str, Any]:
    """Tensors as wide as they are large, and the widths that they have."""
    weights = tensors[(tensors["kind"] == "tensors") & (tensors["values"] > 0)]
    total = weights["values"].sum()
    parts = [
        {
            "name": row["name"],
            "share": float(row["values"] / total),
            "bits": f"{row['bits']:.3g}",
            "words": f"{row['name']}: {findings.width(row)}, "
            f"{findings.percent(row['values'] / total)} of the parameters",
            "colour": palette.of_width(row["bits"]),
            "ink": palette.ink_on(palette.of_width(row["bits"])),
        }
        for row in weights.to_dict("records")
    ]
    held: dict[Any, float] = (weights.groupby("bits")["values"].sum() / total).to_dict()
    key = [
        {"bits": f"{bits:.3g}", "share": findings.percent(share), "colour": palette.of_width(bits)}
        for bits, share in held.items()
    ]
    return {"parts": parts, "key": key, "thin": sum(part["share"] < 0.002 for part in parts)}


def sensitivity_grid(table: pd.DataFrame) -> pd.DataFrame:
    """By label and width the least loss increase of all roundings, as a share of the float loss.

    table: of `quantifind.mixed_precision.sensitivity.measure_sensitivity`.
    """
    label = table["name"].where(table["kind"] == "tensors", "input of " + table["name"])
    table = table.assign(label=label, share=table["loss_increase"] / table["original_criterion"])
    grid = table.pivot_table(
        index="label", columns="bits", values="share", aggfunc="min", dropna=False
    )
    return grid.reindex(label.unique())


def predicted_cells(table: pd.DataFrame) -> pd.DataFrame:
    """By label and width, whether the loss increase was predicted: no example measured it.

    table: as `sensitivity_grid` takes it.
    """
    label = table["name"].where(table["kind"] == "tensors", "input of " + table["name"])
    examples = table["examples"] if "examples" in table else pd.Series(1, table.index)
    table = table.assign(label=label, examples=examples)
    return table.pivot_table(index="label", columns="bits", values="examples", aggfunc="max") == 0


def heat(grid: pd.DataFrame, tensors: pd.DataFrame, predicted: pd.DataFrame) -> dict[str, Any]:
    """Cells by tensor and width, the chosen width marked, and those of `predicted_cells`."""
    labels = tensors["name"].where(tensors["kind"] == "tensors", "input of " + tensors["name"])
    # what costs nothing from here on, and was not chosen, is left out
    matters = [b for b in grid if (grid[b] > SHARES[0]).any() or _near(tensors["bits"], b).any()]
    wider = list(grid)[list(grid).index(matters[-1]) + 2 :] if matters else []
    grid = grid.drop(columns=wider)
    guesses = predicted.reindex(index=grid.index, columns=grid.columns, fill_value=False)
    chosen = dict(zip(labels, tensors["bits"], strict=True))
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "cells": [
                _cell(share, bool(_near(chosen.get(str(label), np.nan), bits)))
                | {"guess": bool(guess)}
                for (bits, share), guess in zip(shares.items(), guessed, strict=True)
            ],
        }
        for (label, shares), guessed in zip(grid.iterrows(), guesses.to_numpy(), strict=True)
    ]
    marked = sum(any(cell["chosen"] for cell in row["cells"]) for row in rows)
    return {
        "widths": [f"{b:.3g}" for b in grid],
        "wider": [f"{b:g}" for b in wider],
        "rows": rows,
        "guesses": any(cell["guess"] for row in rows for cell in row["cells"]),
        "unmarked": len(rows) - marked,
    }


def _near(bits: Any, width: Any) -> Any:
    """Whether a code has this width; one of three levels has 1.585 bits, and 1.6 when packed."""
    return abs(bits - width) < 0.05


def _cell(share: float, chosen: bool) -> dict[str, Any]:
    if np.isnan(share):
        return {"text": "–", "level": "none", "chosen": chosen}
    level = int(np.searchsorted(SHARES, share))
    if np.isinf(share) or share > 10:
        text = "∞" if np.isinf(share) else f"× {findings.number(1 + share, 2)}"
    else:
        text = findings.percent(share, 2 if share < 1 else 3)
        if abs(share) < 1e-4:
            text = "0%" if share <= SHARES[0] else "<0.01%"
    return {"text": text.replace("-", "−"), "level": level, "chosen": chosen}


def rows_of(tensors: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the table, as plain values."""
    total = tensors["values"].sum()
    return [
        {
            "name": row["name"] if row["kind"] == "tensors" else f"input of {row['name']}",
            "values": None if np.isnan(row["values"]) else int(row["values"]),
            "share": None if np.isnan(row["values"]) or not total else row["values"] / total,
            "bits": round(float(row["bits"]), 3),
            "bytes": None if np.isnan(row["stored_bits"]) else int(-(-row["stored_bits"] // 8)),
            "becomes": row["becomes"],
        }
        for row in tensors.to_dict("records")
    ]
