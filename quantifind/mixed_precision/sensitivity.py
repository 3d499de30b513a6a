"""What each tensor, and each activation, costs a network when it alone is quantized."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from quantifind.certification.measures import degradation
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_increase,
    hessian_increase,
    hessian_traces,
    output_fisher_increases,
)
from quantifind.mixed_precision.rounded_options import RoundedOptions, network_of
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.network.modules import named_tensors
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.console import progress

# validation examples on which single tensors are measured first; then twice as many, until the
# standard error of the loss increase is at most this fraction of it. Who stops where that looks
# small stops more often where a tail has not been met: by simulation the increase of lognormal
# divergences of spread 2 comes out 4% too low, and 8% with 250, which an eighth of them is at least
# (test_stopping_early_takes_little_off_the_increase)
EXAMPLES, FEWEST, PRECISION = 500, 250, 0.25
# tensors measured at a time by each worker
AT_A_TIME = 4
# examples that say that a tensor changes nothing
UNCHANGED = 2_000
# training examples and random vectors from which derivatives are estimated
PROXY_EXAMPLES, PROXY_BATCH, DRAWS = 256, 128, 8
PROXIES = ("sqnr_db", "hessian_increase", "fisher_increase", "output_fisher_increase")


@dataclass(frozen=True)
class Sensitivity:
    """Every tensor and activation by each of its choices, the rest in float.

    rounded_options: what the choices have come to.
    measured: by `choice_key`, the columns of those that were measured.
    predicted: by `choice_key`, the loss increase by the gradients, where that is known.
    """

    rounded_options: RoundedOptions
    measured: dict[str, Columns]
    predicted: dict[str, float]

    @cached_property
    def loss_increases(self) -> dict[str, float]:
        """By `choice_key`, as measured; else as predicted, by what the prediction of the same
        tensor's nearest option, or of others, was off, and in order with what was measured."""
        increases = {key: increase_of(columns) for key, columns in self.measured.items()}
        off, alike = self._off(), defaultdict[Any, list[tuple[int, float]]](list)
        choices = self.rounded_options.choices
        for key, measured in increases.items():
            alike[_kind(*choices[key])].append((choices[key][2].count, measured))
        for key, predicted in self.predicted.items():
            if key not in increases:
                value = predicted * off.factor(*_place(self.rounded_options, key))
                increases[key] = _in_order(
                    value, choices[key][2].count, alike[_kind(*choices[key])]
                )
        return increases

    def _off(self) -> "_Off":
        found = [
            (*_place(self.rounded_options, key), math.log(measured / self.predicted[key]))
            for key, columns in self.measured.items()
            if self.predicted.get(key, 0) > 0 and 0 < (measured := increase_of(columns)) < math.inf
        ]
        return _Off(found)

    def with_measured(self, keys: Sequence[str], precision: float) -> "Sensitivity":
        """That with some more choices measured, as `measure_options` takes them."""
        found = measure_options(self.rounded_options, keys, precision)
        return replace(self, measured=self.measured | found)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each that was measured or predicted, as `measure_sensitivity` has them."""
        increases = self.loss_increases
        original = self.rounded_options.measurements.original.criterion
        return pd.DataFrame(
            [
                _row(self.rounded_options, key, self.measured.get(key))
                | {"loss_increase": increases[key], "predicted_increase": self.predicted.get(key)}
                | ({} if key in self.measured else {"original_criterion": original})
                for key in self.rounded_options
                if key in increases
            ]
        )


@dataclass(frozen=True)
class _Off:
    """By how much predictions are off: (tensor, rounding, bits, logarithm of the factor) each."""

    found: Sequence[tuple[str, str, int, float]]

    def factor(self, name: str, rounding: str, bits: int) -> float:
        """That of the same tensor at the nearest width; else the median of others there."""
        own = [(abs(b - bits), r != rounding, off) for n, r, b, off in self.found if n == name]
        if own:
            return math.exp(min(own)[2])
        if not self.found:
            return 1.0
        nearest = min(abs(b - bits) for _, _, b, _ in self.found)
        alike = [off for _, _, b, off in self.found if abs(b - bits) == nearest]
        return math.exp(statistics.median(alike))


def _place(rounded_options: RoundedOptions, key: str) -> tuple[str, str, int]:
    _, name, choice = rounded_options.choices[key]
    return name, choice.rounding, choice.width


def _kind(kind: str, name: str, choice: Any) -> tuple[str, str, str]:
    """A key that two options share if they differ only in their levels and the width of their
    step."""
    plain = {n: value for n, value in choice.plain().items() if n not in ("bits", "levels")}
    # float16 scales hold the steps of few levels alone: test_wide_choices_have_wide_scales
    plain.pop("scale_dtype", None)
    if isinstance(plain.get("scale"), float):
        del plain["scale"]
    return kind, name, json.dumps(plain, sort_keys=True)


def _in_order(value: float, levels: int, measured: Sequence[tuple[int, float]]) -> float:
    """A predicted increase at least that of the next one with more levels, and at most what that of
    the next one with fewer comes to, where errors fall with the square of their number."""
    fewer = max((one for one in measured if one[0] < levels), default=None)
    more = min((one for one in measured if one[0] > levels), default=None)
    if fewer is not None:
        value = min(value, fewer[1] * (fewer[0] / levels) ** 2)
    return value if more is None else max(value, more[1])


def measure_sensitivity(
    measurements: Measurements, space: SearchSpace, *, precision: float = PRECISION
) -> Sensitivity:
    """Quantize each tensor and activation alone by each of its choices, and measure it.

    space: the choices.
    precision: stop measuring once the standard error of the loss increase is this fraction of it,
        on `EXAMPLES` or more; 0: use every example. It is no bound: in about one of three cases
        the increase is further off, and where few examples carry it, it tends to be too low.
    Returns: with a table of the columns ``kind`` ("tensors" or "activations"), ``name``,
        ``scheme``, ``rounding``, ``bits`` of a code, ``stored_bits`` with scales,
        ``loss_increase``, the mean by weight of `quantifind.utils.divergences.divergences`, its
        standard error ``increase_error``, missing where it is predicted alone, those of
        `quantifind.certification.measures.degradation`, ``sqnr_db`` of the network's outputs
        (arXiv:2302.05397), ``examples``, 0 where it is predicted alone, ``predicted_increase`` by
        the gradients, and ``choice``.
    """
    rounded_options = RoundedOptions(measurements, space)
    return Sensitivity(
        rounded_options, measure_options(rounded_options, list(rounded_options), precision), {}
    )


def measure_options(
    rounded_options: RoundedOptions, keys: Sequence[str], precision: float = PRECISION
) -> dict[str, Columns]:
    """The columns of some choices, each alone; of as many as the passes allow, the first first."""
    measurements = rounded_options.measurements
    rounded_options.make(keys)
    measured: dict[str, Columns] = {}
    examples = min(EXAMPLES, max(FEWEST, measurements.examples // 8))
    if not precision:
        examples = measurements.examples
    with progress("sensitivity", total=len(keys)) as step:
        going_on = list(keys)
        while going_on:
            for some in _few_at_a_time(rounded_options, going_on):
                if measurements.passes.left <= 0:
                    return measured
                candidates = {
                    f"alone {key}": network_of(
                        rounded_options.choices[key][1], rounded_options[key]
                    )
                    for key in some
                }
                columns = measurements.all_columns(candidates, examples, gains=False)
                measured |= {key: columns[f"alone {key}"] for key in some}
            left = [key for key in going_on if not _precise(measured[key], precision)]
            if examples >= measurements.examples:
                left = []
            step(steps=len(going_on) - len(left))
            going_on, examples = left, 2 * examples
    return measured


def _few_at_a_time(rounded_options: RoundedOptions, keys: Sequence[str]) -> Iterator[list[str]]:
    """Some at a time: all of a tensor, of as many tensors as there are workers to keep busy."""
    by_name: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        by_name.setdefault(rounded_options.choices[key][:2], []).append(key)
    count = AT_A_TIME * rounded_options.measurements.workers.places
    for first in range(0, len(by_name), count):
        yield [k for same in [*by_name.values()][first : first + count] for k in same]


def _precise(columns: Columns, precision: float) -> bool:
    increase = columns["divergence"]
    # few examples may all be of those that don't change: test_no_increase_is_not_taken_for_granted
    seen = increase.any() or len(increase) >= UNCHANGED
    return bool(seen and len(increase) > 1 and _mean_error(increase) <= precision * increase.mean())


def _mean_error(values: np.ndarray) -> float:
    """The standard error of the mean of two values or more."""
    # as scipy.stats.sem, which takes long to import
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def increase_of(columns: Columns) -> float:
    """The mean divergence, by weight; infinite where it is no number."""
    increase = float(columns["divergence"].sum() / columns["weight"].sum())
    return max(increase, 0.0) if math.isfinite(increase) else math.inf


def _increase_error(columns: Columns) -> float:
    """The standard error of what `increase_of` gives, a ratio of sums."""
    increase, weight = increase_of(columns), columns["weight"]
    if not math.isfinite(increase) or len(weight) < 2:
        return math.nan
    off = columns["divergence"] - increase * weight
    return float(_mean_error(off) / weight.mean())


def _row(rounded_options: RoundedOptions, key: str, columns: Columns | None) -> dict[str, Any]:
    kind, name, choice = rounded_options.choices[key]
    made = rounded_options[key if rounded_options.has_made(key) else rounded_options.stand_in(key)]
    row = {
        "kind": kind,
        "name": name,
        "scheme": choice.scheme,
        "rounding": choice.rounding,
        "bits": made.bits,
        "stored_bits": made.stored_bits if isinstance(made, QuantizedTensor) else 0,
        # also where nothing is measured: test_the_table_has_its_columns_whatever_the_effort
        "increase_error": math.nan,
    }
    if columns is not None:
        noise, signal = (columns[c].mean() for c in ("squared_error", "squared_norm"))
        row |= {
            "original_criterion": columns["original_loss"].sum() / columns["weight"].sum(),
            "increase_error": _increase_error(columns),
            **degradation(columns),
            "sqnr_db": 10 * math.log10(signal / noise) if noise else math.inf,
        }
    return row | {"examples": 0 if columns is None else len(columns["loss"]), "choice": choice}


def predict_sensitivity(measurements: Measurements, sensitivity: Sensitivity) -> pd.DataFrame:
    """The table with what is predicted of tensors without measuring, from training data.

    Returns: with the columns ``hessian_increase``, ``fisher_increase`` and
        ``output_fisher_increase`` (`quantifind.mixed_precision.proxies`).
    """
    model, criterion, table = measurements.model, measurements.criterion, sensitivity.table
    rounded_options = sensitivity.rounded_options
    if criterion is None:
        return table
    batches = measurements.some_calibration(PROXY_EXAMPLES, PROXY_BATCH)
    values = named_tensors(model)
    traces = hessian_traces(model, criterion, batches, draws=DRAWS, seed=measurements.seed)
    information = fisher(model, criterion, batches)
    rows = table[(table["kind"] == "tensors") & (table["examples"] > 0)]
    candidates: dict[str, list[Tensor]] = {name: [] for name in rows["name"]}
    for name, choice in zip(rows["name"], rows["choice"], strict=True):
        quantized = rounded_options[choice_key("tensors", name, choice)]
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
            # of what was measured: test_what_is_predicted_alone_is_not_correlated
            measured = table[table["examples"] > 0]
            both = measured[["loss_increase", proxy]].replace([np.inf, -np.inf], np.nan).dropna()
            sign = -1 if proxy == "sqnr_db" else 1
            enough = len(both) > 2
            found = both["loss_increase"].corr(both[proxy], method="spearman") if enough else 0
            correlations[proxy] = float(sign * found) if enough else math.nan
    return correlations
