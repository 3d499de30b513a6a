"""What a run shows, in sentences computed from its tables; the headings of the report."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from quantifind.certification.digits import (
    UNKNOWN,
    chance,
    is_number,
    kept_in_words,
    limits_in_words,
    number,
    percent,
    sure,
)
from quantifind.certification.goal import answer_of
from quantifind.utils.naming import short
from stages.alone import cost_grid, guessed_cells
from stages.evidence import Evidence

# the first words of `quantifind.certification.goal.ANSWERS`
KINDS = {"as_is": "as it is", "following": "following", "trained": "trained further"}


def answer(evidence: Evidence, name: str) -> str:
    """The answer in one sentence.

    name: of the network.
    """
    best, found = evidence.best, evidence.answer
    confidence = sure(found["look"]["confidence"])
    examples = number(best["examples"])
    if found["certified"] is None:
        needed = found.get("needed")
        more = (
            f" About {number(needed)} test examples like these would certify it." if needed else ""
        )
        return (
            f"Nothing is certified for {name}: no strategy of the search is known with "
            f"{confidence} confidence, on {examples} test examples, to keep "
            f"{limits_in_words(evidence.limits)}.{more}"
        )
    within, beyond = "", ""
    for cost, most in (found.get("budget") or {}).items():
        words = f"{cost.replace('_', ' ')} ≤ {most:,g}"
        if best[cost] <= most:
            within = f"Within {words}, "
        else:
            beyond = f" That is more than was searched for: with {words} nothing is certified."
    return (
        f"{within}{name} needs {best['mean_bits']:.3f} bits per parameter, "
        f"{best['compression']:.1f} times fewer than float32: with {confidence} confidence, on "
        f"{examples} test examples, {kept_in_words(evidence.limits)}.{beyond}"
    )


def frontier(evidence: Evidence) -> str:
    """What the search has gained beside the same bits for all tensors."""
    best, depth = evidence.best, evidence.answer["certified_uniform_depth"]
    if evidence.answer["certified"] is None:
        uniform = "nor is any width for all" if depth is None else f"{depth} bits for all are"
        return f"No step of the ladder is certified, {uniform}"
    if depth is None:
        return f"Certified at {best['mean_bits']:.4g} bits; no one width for all is"
    uniform_bits = evidence.uniform_bits
    assert uniform_bits is not None
    times = uniform_bits / best["mean_bits"]
    return (
        f"The search needs {best['mean_bits']:.4g} bits; plain rounding to one width for all needs "
        f"{depth}, judged alike: {times:.2g} times as many"
    )


def drawn(evidence: Evidence) -> str | None:
    """What widths at random reach; None where none were measured."""
    table, best = evidence.tables["random"], evidence.best
    if table.empty:
        return None
    keeps = np.logical_and.reduce([table[m] <= most for m, most in evidence.limits.items()])
    text = f"Of {_count(len(table), 'network')} with random widths (each tensor's drawn between "
    text += "half and one and a half times a middle, each rounded alone) "
    if not keeps.any():
        fewest = table["mean_bits"].min()
        return f"{text}none keeps the limits on validation data, from {fewest:.3g} bits on."
    fewest = table["mean_bits"][keeps].min()
    times = fewest / best["mean_bits"]
    said = (
        f"{text}{keeps.sum()} {'keeps' if keeps.sum() == 1 else 'keep'} the limits on validation "
        f"data, the smallest with {fewest:.3g} "
        f"bits, {times:.2g} times those of the answer"
    )
    more = ""
    if times < 1:
        more = ". They are not judged as the answer is: its bounds, not only its values, keep the "
        more += "limits, on test data, too"
    return f"{said}{more}."


def where(tensors: pd.DataFrame) -> str:
    """Where the bits go: what holds most of the parameters, and what has the widest codes.

    tensors: of one strategy, as `stages.tensors.tensor_table` has them.
    """
    weights = tensors[tensors["kind"] == "tensors"]
    if weights.empty or not weights["values"].sum():
        return "No tensor is quantized"
    rows = weights.to_dict("records")
    largest = max(rows, key=lambda row: row["values"])
    share = percent(largest["values"] / weights["values"].sum())
    text = f"{short(largest['name'])} holds {share} of the parameters, at {width(largest)}"
    widest = max(rows, key=lambda row: row["bits"])
    if widest["bits"] == weights["bits"].min():
        return text if len(weights) == 1 else f"{text}, as all others"
    if widest["bits"] == largest["bits"]:
        return f"{text}, the widest there are"
    others = sum(row["bits"] == widest["bits"] for row in rows) - 1
    more = f" and {_count(others, 'other')}" if others else ""
    return f"{text}; the widest codes, {width(widest)}, are those of {short(widest['name'])}{more}"


def tensors(table: pd.DataFrame) -> str:
    """How many there are, and how many bits of all are no codes.

    table: as `where` takes it.
    """
    weights = table[table["kind"] == "tensors"]
    inputs = len(table) - len(weights)
    codes = (weights["values"] * weights["bits"]).sum()
    beside = 1 - codes / max(weights["stored_bits"].sum(), 1)
    text = f"{_count(len(weights), 'tensor')}, {number(weights['values'].sum())} values"
    text += f", {_count(inputs, 'activation')}" if inputs else ""
    if beside < 0:
        return f"{text}; coding them saves {percent(-beside / (1 - beside), 2)} of their widths"
    return f"{text}; scales and padding are {percent(beside, 2)} of what is stored"


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def width(row: Any) -> str:
    """The bits of a code, with its word; float for 32 that are on no grid."""
    if row["becomes"] == "float":
        return "32 bits (float)"
    return "1 bit" if row["bits"] == 1 else f"{row['bits']:.3g} bits"


def sensitivity(table: pd.DataFrame) -> str:
    """Which tensor alone costs most at the lowest width that most tensors were measured at.

    table: as `stages.alone.cost_grid` takes it.
    """
    grid = cost_grid(table)
    grid = grid.mask(guessed_cells(table, grid))
    tried = grid.replace([np.inf, -np.inf], np.nan).notna()
    enough: list[Any] = [bits for bits in grid if tried[bits].sum() >= max(1, len(grid) / 2)]
    if grid.empty or not enough:
        return "What each tensor costs alone was not measured"
    shares = grid[enough[0]][tried[enough[0]]].to_dict()
    most = max(shares, key=lambda name: shares[name])
    at = "1 bit" if enough[0] == 1 else f"{enough[0]:g} bits"
    if len(shares) == 1:
        return f"Measured at {at}, {short(most)} costs {cost(shares[most])}"
    least = min(shares, key=lambda name: shares[name])
    if shares[most] == shares[least]:
        return f"Measured at {at} alone, each tensor costs {cost(shares[most])}"
    ends = f"{short(most)} costs most, {cost(shares[most])}; "
    ends += f"{short(least)} least, {cost(shares[least])}"
    return f"Measured at {at} alone, {ends}"


def cost(share: float) -> str:
    """A loss increase as a share of the float loss, in words."""
    if not math.isfinite(share):
        return UNKNOWN
    if share > 10:
        return f"{number(1 + share, 2)} times the loss"
    if abs(share) < 5e-5:
        return "under 0.01% of the loss"
    return f"{'a gain of ' if share < 0 else ''}{percent(abs(share), 2)} of the loss"


def prediction(shown: pd.DataFrame) -> str:
    """How far what was measured is from what was predicted.

    shown: of the candidates those with both, ``predicted_fidelity`` and ``fidelity``.
    """
    both = shown[(shown["predicted_fidelity"] > 0) & (shown["fidelity"] > 0)]
    if both.empty:
        return "No candidate has both a predicted and a measured divergence"
    ratio = (both["fidelity"] / both["predicted_fidelity"]).to_numpy(dtype=float)
    factor = np.median(np.maximum(ratio, 1 / ratio))
    return (
        f"Single tensors foretell the whole within a factor of {factor:.2g} "
        f"{f'for half of {len(both)} candidates' if len(both) > 1 else 'for the one candidate'}"
    )


def changed(evidence: Evidence) -> str:
    """How many answers changed on test data, and which way; of a loss alone, how far it moved."""
    row = evidence.tables["frontier"].iloc[evidence.step]
    examples = evidence.best["examples"]
    wrong, right = (row.get(f"{way}", math.nan) for way in ("right_to_wrong", "wrong_to_right"))
    if wrong == right == 0:
        return f"No answer of {number(examples)} became wrong or right"
    if is_number(wrong) and is_number(right):
        return (
            f"Of {number(examples)} answers {number(wrong)} became wrong and {number(right)} "
            "became right"
        )
    table = evidence.tables["changed"]
    if table.empty:
        return "Which examples changed is not known"
    moves = (table["loss"] - table["original_loss"]).abs()
    if lost := int((~np.isfinite(moves)).sum()):
        return f"The loss of {number(lost)} examples or more is no number"
    moved = moves.max()
    return f"No example's loss moved by more than {number(moved, 3)}"


def judged(evidence: Evidence) -> str:
    """How sure the answer is."""
    look, best = evidence.answer["look"], evidence.best
    return (
        f"Judged on {number(best['examples'])} test examples that chose nothing; "
        f"{'the first ladder' if look['k'] == 1 else 'ladder ' + str(look['k'])} on them: the "
        f"chance that its certificate is wrong is at most {chance(look['level'])}"
    )


def kind(row: Mapping[Any, Any]) -> str:
    """Which of the answers a row of the ladder is, in words."""
    return KINDS[answer_of(str(row["validation_origin"]))]
