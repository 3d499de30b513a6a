"""What each tensor becomes in each strategy of a ladder, as a table."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from quantifind.network.modules import named_tensors
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from stages.answers import words_of

FLOAT_BITS = 32


def tensor_table(
    model: nn.Module, strategies: Sequence[Strategy], quantized: Sequence[Quantized]
) -> pd.DataFrame:
    """A row for each strategy and tensor, and then each activation, in the network's order.

    model: in float.
    strategies: of the ladder, from most bytes to fewest.
    quantized: what they made of the network.
    Returns: ``step`` from 0, ``kind`` (tensors or activations), ``name``, ``values``, ``bits`` of a
        code, ``stored_bits`` (codes, scales, zero points and codebook), ``becomes`` in words. What
        stays in float has 32 bits a value; an activation's values are not known.
    """
    floats = {name: tensor.numel() for name, tensor in named_tensors(model).items()}
    rows: list[dict[str, Any]] = []
    for step, (strategy, made) in enumerate(zip(strategies, quantized, strict=True)):
        choices = strategy.choices
        for name, choice in choices["tensors"].items():
            tensor = made.tensors.get(name)
            values = floats.get(name, 0) if tensor is None else tensor.codes.numel()
            bits = FLOAT_BITS if tensor is None else tensor.bits
            stored = FLOAT_BITS * values if tensor is None else tensor.stored_bits
            rows.append(_row(step, "tensors", name, values, bits, stored, choice))
        for name, choice in choices["activations"].items():
            activation = made.activations.get(name)
            bits = FLOAT_BITS if activation is None else activation.bits
            rows.append(_row(step, "activations", name, math.nan, bits, math.nan, choice))
    return pd.DataFrame(rows)


def _row(
    step: int, kind: str, name: str, values: float, bits: float, stored: float, choice: Any
) -> dict[str, Any]:
    return {
        "step": step,
        "kind": kind,
        "name": name,
        "values": values,
        "bits": bits,
        "stored_bits": stored,
        "becomes": words_of(choice),
    }
