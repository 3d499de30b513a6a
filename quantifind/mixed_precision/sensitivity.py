"""What each tensor, and each activation, costs a network when it alone is quantized."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

from quantifind.certification.certificate import degradation
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_increase,
    hessian_increase,
    hessian_traces,
    output_fisher_increases,
)
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.network.activations import fit_activations
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.network.trace import activation_names
from quantifind.quantize import quantize_alone
from quantifind.storage import artifact
from quantifind.tensor.choice import ActivationChoice, Choice
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.batches import joined, regrouped
from quantifind.utils.console import progress

# validation examples on which single tensors are measured first; then twice as many, until the
# standard error of the loss increase is at most this fraction of it
EXAMPLES, PRECISION = 250, 0.25
# examples that say that a tensor changes nothing
UNCHANGED = 2_000
# training examples and random vectors from which derivatives are estimated
PROXY_EXAMPLES, PROXY_BATCH, DRAWS = 256, 128, 8
PROXIES = ("sqnr_db", "hessian_increase", "fisher_increase", "output_fisher_increase")


@dataclass(frozen=True)
class Sensitivity:
    """Every tensor and activation by each of its choices, the rest in float.

    table: a row each, as `measure_sensitivity` has them.
    quantized: by `choice_key`, what the choice has come to.
    """

    table: pd.DataFrame
    quantized: dict[str, QuantizedTensor | QParams]

    @property
    def loss_increases(self) -> dict[str, float]:
        """By `choice_key`."""
        keys = map(choice_key, self.table["kind"], self.table["name"], self.table["choice"])
        return dict(zip(keys, self.table["loss_increase"], strict=True))


def measure_sensitivity(
    measurements: Measurements, space: SearchSpace, *, precision: float = PRECISION
) -> Sensitivity:
    """Quantize each tensor and activation alone by each of its choices, and measure it.

    space: the choices.
    precision: stop measuring once the standard error of the loss increase is this fraction of it;
        0: use every example.
    Returns: with a table of the columns ``kind`` ("tensors" or "activations"), ``name``,
        ``scheme``, ``rounding``, ``bits`` of a code, ``stored_bits`` with scales,
        ``loss_increase``, the mean of `quantifind.metrics.divergence`, those of
        `quantifind.certification.certificate.degradation`, ``sqnr_db`` of the network's outputs
        (arXiv:2302.05397), ``examples``, and ``choice``.
    """
    quantized = quantize_choices(measurements, space)
    todo = {
        choice_key(kind, name, choice): (kind, name, choice)
        for kind, name, choices in space.items()
        for choice in choices
    }
    measured: dict[str, Columns] = {}
    examples = EXAMPLES if precision else measurements.examples
    with progress("sensitivity", total=len(todo)) as step:
        going_on = list(todo)
        while going_on:
            candidates = {
                f"alone {key}": _network(todo[key][1], quantized[key]) for key in going_on
            }
            columns = measurements.all_columns(candidates, examples)
            measured |= {key: columns[f"alone {key}"] for key in going_on}
            left = [key for key in going_on if not _precise(measured[key], precision)]
            if examples >= measurements.examples:
                left = []
            step(steps=len(going_on) - len(left))
            going_on, examples = left, 2 * examples
    rows = [_row(*what, quantized[key], measured[key]) for key, what in todo.items()]
    return Sensitivity(pd.DataFrame(rows), quantized)


def quantize_choices(
    measurements: Measurements, space: SearchSpace
) -> dict[str, QuantizedTensor | QParams]:
    """Every tensor and activation by each of its choices, the rest in float, by `choice_key`.

    What is in the store is taken from it.

    Raises: ValueError naming a tensor or an activation that the network hasn't, or whose choice
        can't be.
    """
    own = named_tensors(measurements.model)
    if unknown := space.tensors.keys() - own.keys():
        raise ValueError(f"unknown tensor {min(unknown)}: the network has {', '.join(own)}")
    met = activation_names(measurements.facts) if space.activations else []
    if unknown := space.activations.keys() - set(met):
        raise ValueError(f"unknown activation {min(unknown)}: the network has {', '.join(met)}")
    found: dict[str, QuantizedTensor | QParams] = {}
    tasks: list[tuple[str, str, Sequence[Choice]]] = []
    for kind, name, choices in space.items():
        missing = []
        for choice in choices:
            key = choice_key(kind, name, choice)
            entry = measurements.store.get(f"quantized {key}")
            if entry is None:
                missing.append(choice)
            else:
                kept = artifact.unpack(*entry)
                found[key] = (kept.tensors | kept.activations)[name]
        # all choices of a tensor share its moments
        together = [missing] if kind == "tensors" and missing else [[c] for c in missing]
        tasks += [(kind, name, some) for some in together]
    # so that no worker is left with a large tensor in the end: test_large_tensors_are_rounded_first
    sizes = {name: tensor.numel() for name, tensor in own.items()}
    tasks.sort(key=lambda task: (task[0] != "tensors", -sizes.get(task[1], 0)))
    with progress("rounding", total=len(tasks)) as step:
        fitted = measurements.workers.map(_quantize_alone, measurements, tasks)
        for (kind, name, choices), made in zip(tasks, fitted, strict=True):
            for choice, one in zip(choices, made, strict=True):
                key = choice_key(kind, name, choice)
                found[key] = one
                measurements.store.put(f"quantized {key}", *artifact.pack(_network(name, one)))
            step(name)
    return found


def _quantize_alone(
    measurements: Measurements, task: tuple[str, str, Sequence[Choice]]
) -> Sequence[QuantizedTensor | QParams]:
    kind, name, choices = task
    model, calibration = measurements.model, measurements.calibration
    if kind == "tensors":
        return quantize_alone(model, name, choices, calibration)
    model, found = plain_copy(model), []
    for choice in choices:
        assert isinstance(choice, ActivationChoice)
        found.append(fit_activations(model, {name: choice}, calibration)[name])
    return found


def _network(name: str, quantized: QuantizedTensor | QParams) -> Quantized:
    if isinstance(quantized, QParams):
        return Quantized({}, {name: quantized})
    return Quantized({name: quantized})


def _precise(columns: Columns, precision: float) -> bool:
    increase = columns["divergence"]
    # few examples may all be of those that don't change: test_no_increase_is_not_taken_for_granted
    seen = increase.any() or len(increase) >= UNCHANGED
    return bool(seen and stats.sem(increase) <= precision * increase.mean())


def _row(
    kind: str, name: str, choice: Choice, quantized: QuantizedTensor | QParams, columns: Columns
) -> dict[str, Any]:
    noise, signal = (columns[c].mean() for c in ("squared_error", "squared_norm"))
    is_tensor, increase = isinstance(quantized, QuantizedTensor), columns["divergence"].mean()
    return {
        "kind": kind,
        "name": name,
        "scheme": choice.scheme,
        "rounding": choice.rounding,
        "bits": quantized.bits,
        "stored_bits": quantized.stored_bits if is_tensor else 0,
        "original_criterion": columns["original_loss"].sum() / columns["weight"].sum(),
        "loss_increase": max(increase, 0.0) if math.isfinite(increase) else math.inf,
        **degradation(columns),
        "sqnr_db": 10 * math.log10(signal / noise) if noise else math.inf,
        "examples": len(columns["loss"]),
        "choice": choice,
    }


def predict_sensitivity(measurements: Measurements, sensitivity: Sensitivity) -> pd.DataFrame:
    """The table with what is predicted of tensors without measuring, from training data.

    Returns: with the columns ``hessian_increase``, ``fisher_increase`` and
        ``output_fisher_increase`` (`quantifind.mixed_precision.proxies`).
    """
    model, criterion, table = measurements.model, measurements.criterion, sensitivity.table
    if criterion is None:
        return table
    # batches stay where the evaluator's do: test_rows_that_are_no_examples_stay_together
    together = measurements.evaluator.whole is not None
    whole = joined(measurements.calibration) if together else None
    if whole is None:
        some = itertools.accumulate(map(len, measurements.calibration), initial=0)
        pairs = zip(measurements.calibration, some, strict=False)
        batches = [batch for batch, before in pairs if before < PROXY_EXAMPLES]
    else:
        batches = regrouped([whole[:PROXY_EXAMPLES]], PROXY_BATCH)
    values = named_tensors(model)
    traces = hessian_traces(model, criterion, batches, draws=DRAWS, seed=measurements.seed)
    information = fisher(model, criterion, batches)
    rows = table[table["kind"] == "tensors"]
    candidates: dict[str, list[Tensor]] = {name: [] for name in rows["name"]}
    for name, choice in zip(rows["name"], rows["choice"], strict=True):
        quantized = sensitivity.quantized[choice_key("tensors", name, choice)]
        assert isinstance(quantized, QuantizedTensor)
        candidates[name].append(quantized.dequantize().to(values[name].device))
    by_output = output_fisher_increases(model, criterion, batches, candidates)
    predicted = [
        {
            "hessian_increase": hessian_increase(traces[name], values[name], candidate),
            "fisher_increase": fisher_increase(information[name], values[name], candidate)
            if name in information
            else math.nan,
            "output_fisher_increase": of_output,
        }
        for name, tried in candidates.items()
        for candidate, of_output in zip(
            tried, by_output.get(name, [math.nan] * len(tried)), strict=True
        )
    ]
    return table.join(pd.DataFrame(predicted, index=rows.index))


def rank_correlations(table: pd.DataFrame) -> dict[str, float]:
    """Spearman's rank correlation of each proxy with the measured loss increase.

    It is over all tensors and choices; of the SQNR, which falls where the increase grows, with its
    sign turned. Missing values are left out; NaN where fewer than three remain.
    """
    correlations = {}
    for proxy in PROXIES:
        if proxy in table:
            both = table[["loss_increase", proxy]].replace([np.inf, -np.inf], np.nan).dropna()
            sign = -1 if proxy == "sqnr_db" else 1
            enough = len(both) > 2
            found = both["loss_increase"].corr(both[proxy], method="spearman") if enough else 0
            correlations[proxy] = float(sign * found) if enough else math.nan
    return correlations
