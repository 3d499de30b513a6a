"""What the report says of each tensor: strip, heat map and table, as plain values."""

from typing import Any

import numpy as np
import pandas as pd

from quantifind.certification import digits
from quantifind.utils import palette
from quantifind.utils.naming import printable, short
from stages import findings
from stages.alone import SHARES, cost_grid, guessed_cells, in_spans, labelled, left_out, near

# of a strip's width, what a tensor needs for its bits
NUMBERED = 0.04


def strip(tensors: pd.DataFrame) -> dict[str, Any]:
    """Tensors as wide as they are large, and the widths that they have."""
    weights = tensors[(tensors["kind"] == "tensors") & (tensors["values"] > 0)]
    total = weights["values"].sum()
    parts = [
        {
            "name": printable(row["name"]),
            "share": float(row["values"] / total),
            "bits": f"{row['bits']:.3g}",
            "numbered": row["values"] > NUMBERED * total,
            "words": f"{printable(row['name'])}: {findings.width(row)}, "
            f"{digits.percent(row['values'] / total)} of the parameters",
            "colour": _colour(row),
            "ink": palette.ink_on(_colour(row)),
        }
        for row in weights.to_dict("records")
    ]
    # by width as it is written, so that no two lines are alike
    held: dict[str, dict[str, Any]] = {}
    for row in weights.sort_values("bits").to_dict("records"):
        one = held.setdefault(findings.width(row), {"values": 0, "colour": _colour(row)})
        one["values"] += row["values"]
    key = [
        {"bits": bits, "share": digits.percent(one["values"] / total), "colour": one["colour"]}
        for bits, one in held.items()
    ]
    # said below the strip: test_the_strip_says_how_many_it_does_not_name
    return {"parts": parts, "key": key, "thin": sum(not part["numbered"] for part in parts)}


def _colour(row: Any) -> str:
    return palette.FLOAT if row["becomes"] == "float" else palette.of_width(row["bits"])


def heat(sensitivity: pd.DataFrame, tensors: pd.DataFrame) -> dict[str, Any]:
    """Cells by tensor and width, of all roundings the least, the chosen width marked, and what was
    predicted.

    sensitivity: as `stages.alone.cost_grid` takes it.
    """
    grid = cost_grid(sensitivity)
    wider = left_out([grid], tensors["bits"])
    grid = grid.drop(columns=wider)
    guesses = guessed_cells(sensitivity, grid)
    chosen = dict(zip(labelled(tensors), tensors["bits"], strict=True))
    rows: list[dict[str, Any]] = [
        {
            # whole in the table of tensors: here it would make rows of many lines
            "label": short(str(label)),
            "cells": [
                _cell(share, bool(near(chosen.get(str(label), np.nan), bits)))
                | {"guess": bool(guess)}
                for (bits, share), guess in zip(shares.items(), guessed, strict=True)
            ],
        }
        for (label, shares), guessed in zip(grid.iterrows(), guesses.to_numpy(), strict=True)
    ]
    marked = sum(any(cell["chosen"] for cell in row["cells"]) for row in rows)
    return {
        "widths": [f"{b:.3g}" for b in grid],
        "without": in_spans(wider),
        "rows": rows,
        "gaps": any(cell["level"] == "none" for row in rows for cell in row["cells"]),
        "guesses": any(cell["guess"] for row in rows for cell in row["cells"]),
        "unmarked": len(rows) - marked,
    }


def _cell(share: float, chosen: bool) -> dict[str, Any]:
    if np.isnan(share):
        return {"text": "–", "level": "none", "chosen": chosen}
    level = int(np.searchsorted(SHARES, share))
    if np.isinf(share) or share > 10:
        text = "∞" if np.isinf(share) else f"× {digits.number(1 + share, 2)}"
    else:
        text = digits.percent(share, 2 if share < 1 else 3)
        if abs(share) < 1e-4:
            text = "0%" if share <= SHARES[0] else "<0.01%"
    return {"text": text.replace("-", "−"), "level": level, "chosen": chosen}


def rows_of(tensors: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the table, as plain values."""
    total = tensors["values"].sum()
    return [
        {
            "name": ("" if row["kind"] == "tensors" else "input of ") + printable(row["name"]),
            "values": None if np.isnan(row["values"]) else int(row["values"]),
            "share": None if np.isnan(row["values"]) or not total else row["values"] / total,
            "bits": round(float(row["bits"]), 3),
            "bytes": None if np.isnan(row["stored_bits"]) else int(-(-row["stored_bits"] // 8)),
            "becomes": row["becomes"],
        }
        for row in tensors.to_dict("records")
    ]
