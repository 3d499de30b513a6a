"""What each tensor, and each activation, costs a network when it alone is put on few levels."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantifind.certification.certificate import degradation
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_rise,
    hessian_rise,
    hessian_traces,
    output_fisher_rises,
)
from quantifind.network.activations import activation_sites, fit_activations
from quantifind.network.calibration import compensable_weights
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.quantize import quantize_alone
from quantifind.storage import artifact
from quantifind.strategy import Choice
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.console import progress

# validation examples on which single tensors are measured first; then twice as many, until the
# standard error of the rise is at most this share of it
EXAMPLES, PRECISION = 250, 0.25
# examples that say that a tensor changes nothing
UNCHANGED = 2_000
# training examples and random vectors from which derivatives are estimated
PROXY_EXAMPLES, DRAWS = 256, 8
PROXIES = ("sqnr_db", "hessian_rise", "fisher_rise", "output_fisher_rise")
Parts = dict[str, QuantizedTensor]
# "tensors" and "activations", by name of the tensor or site the choices it has
Menus = Mapping[str, Mapping[str, Sequence[Choice]]]


WIDTHS = range(1, 17)
WIDER = range(1, 33)
PER_CHANNEL: dict[str, Any] = {"scheme": "uniform", "axis": 0, "scale_dtype": "float16"}
NEAREST = PER_CHANNEL | {"scale": "squared_error"}
COMPENSATED = PER_CHANNEL | {"scale": "output_error", "rounding": "compensated"}
PER_TENSOR: dict[str, Any] = {
    "scheme": "uniform",
    "scale_dtype": "float16",
    "scale": "squared_error",
}
ACTIVATION: dict[str, Any] = {"scheme": "uniform", "zero_point": True, "scale": "squared_error"}
# the most bits with float16 scales
FLOAT16_BITS = 8
# widths at which compensated rounding is tried; above, rounding to nearest is as good
COMPENSATED_WIDTHS = (1, 2, 3, 4)


def default_menus(
    measurements: Measurements,
    widths: Iterable[int] = WIDTHS,
    activation_bits: Iterable[int] = (),
) -> Menus:
    """What each tensor may become: weights with a scale per channel, rounded to nearest at each
    width and compensated at the low ones, ternary among them; others with one scale.

    activation_bits: widths that every activation may have besides float; none by default.
    """
    widths, model = list(widths), measurements.model
    weight = [NEAREST | _width(bits) for bits in widths]
    weight += [COMPENSATED | {"bits": bits} for bits in widths if bits in COMPENSATED_WIDTHS]
    if 2 in widths:
        weight.append(COMPENSATED | {"levels": 3})
    single = [PER_TENSOR | _width(bits) for bits in widths]
    able = compensable_weights(plain_copy(model), measurements.calibration)
    tensors = {
        name: [
            dict(choice)
            for choice in (weight if tensor.dim() > 1 else single)
            if name in able or "rounding" not in choice
        ]
        for name, tensor in named_tensors(model).items()
        if tensor.is_floating_point() and tensor.numel()
    }
    bits = list(activation_bits)
    sites = activation_sites(model, measurements.calibration) if bits else []
    return {
        "tensors": tensors,
        "activations": {site: [ACTIVATION | {"bits": b} for b in bits] for site in sites},
    }


def _width(bits: int) -> dict[str, Any]:
    # a step of many bits is too small for float16: test_wide_menus_have_wide_scales
    return {"bits": bits} if bits <= FLOAT16_BITS else {"bits": bits, "scale_dtype": "float32"}


def part_key(kind: str, name: str, choice: Choice) -> str:
    """Names a choice for a tensor or a site for ever."""
    return f"{kind}/{name} {json.dumps(dict(choice), sort_keys=True)}"


def quantized_parts(measurements: Measurements, menus: Menus) -> Parts:
    """Every tensor and site by each of its choices, the rest in float, by `part_key`.

    menus: "tensors" and "activations", by name the choices. What is in the store is taken from it.
    """
    parts: Parts = {}
    missing: list[tuple[str, str, list[Choice]]] = []
    for kind, menu in menus.items():
        for name, choices in menu.items():
            left = []
            for choice in choices:
                key = part_key(kind, name, choice)
                entry = measurements.store.get(f"part {key}")
                if entry is None:
                    left.append(choice)
                else:
                    parts[key] = getattr(artifact.unpack(*entry), kind)[name]
            # all choices of a tensor share its moments
            together = [left] if kind == "tensors" and left else [[choice] for choice in left]
            missing += [(kind, name, choices) for choices in together]
    # so that no worker is left with a large tensor in the end: test_large_tensors_are_rounded_first
    own = dict(measurements.model.named_buffers()) | named_tensors(measurements.model)
    sizes = {name: tensor.numel() for name, tensor in own.items()}
    missing.sort(key=lambda task: (task[0] != "tensors", -sizes.get(task[1], 0)))
    sites = list(menus["activations"])
    tasks = [(*task, sites) for task in missing]
    with progress("rounding", total=len(tasks)) as step:
        fitted = measurements.workers.map(_fit, measurements, tasks)
        for (kind, name, choices, _), made in zip(tasks, fitted, strict=True):
            for choice, part in zip(choices, made, strict=True):
                key = part_key(kind, name, choice)
                parts[key] = part
                packed = artifact.pack(_quantized(kind, name, part))
                measurements.store.put(f"part {key}", *packed)
            step(name)
    return parts


def _fit(
    measurements: Measurements, task: tuple[str, str, Sequence[Choice], Sequence[str]]
) -> list[QuantizedTensor]:
    kind, name, choices, sites = task
    model, calibration = measurements.model, measurements.calibration
    if kind == "tensors":
        return quantize_alone(model, name, choices, calibration)
    alone: dict[str, Choice | None] = dict.fromkeys(sites)
    return [fit_activations(model, alone | {name: choice}, calibration)[name] for choice in choices]


def _quantized(kind: str, name: str, part: QuantizedTensor) -> Quantized:
    return Quantized({name: part}) if kind == "tensors" else Quantized({}, {name: part})


def sensitivities(
    measurements: Measurements, menus: Menus, parts: Parts, *, precision: float = PRECISION
) -> pd.DataFrame:
    """A row for each choice of each tensor and site, measured alone.

    precision: as soon as the standard error of the rise is at most this share of it, no further
        examples are measured; 0 for all of them.
    Columns: ``kind`` ("tensors" or "activations"), ``name``, ``scheme``, ``rounding``, ``bits`` of
    a code, ``stored_bits`` with scales, ``loss_increase`` the mean divergence
    (`quantifind.metrics.divergence`), those of
    `quantifind.certification.certificate.degradation`, ``sqnr_db`` of the network's outputs
    (arXiv:2302.05397), ``examples``, and ``choice``.
    """
    todo = {
        part_key(kind, name, choice): (kind, name, choice)
        for kind, menu in menus.items()
        for name, choices in menu.items()
        for choice in choices
    }
    measured: dict[str, Columns] = {}
    examples = EXAMPLES if precision else measurements.examples
    with progress("sensitivity", total=len(todo)) as step:
        going_on = list(todo)
        while going_on:
            candidates = {
                f"alone {key}": _quantized(*todo[key][:2], parts[key]) for key in going_on
            }
            columns = measurements.all_columns(candidates, examples)
            measured |= {key: columns[f"alone {key}"] for key in going_on}
            left = [key for key in going_on if not _precise(measured[key], precision)]
            if examples >= measurements.examples:
                left = []
            step(steps=len(going_on) - len(left))
            going_on, examples = left, 2 * examples
    return pd.DataFrame([_row(*what, parts[key], measured[key]) for key, what in todo.items()])


def _precise(columns: Columns, precision: float) -> bool:
    rise = columns["divergence"]
    # few examples may all be of those that don't change: test_no_rise_is_not_taken_for_granted
    seen = rise.any() or len(rise) >= UNCHANGED
    return bool(seen and stats.sem(rise) <= precision * rise.mean())


def _row(
    kind: str, name: str, choice: Choice, part: QuantizedTensor, columns: Columns
) -> dict[str, Any]:
    noise, signal = (columns[c].mean() for c in ("squared_error", "squared_norm"))
    return {
        "kind": kind,
        "name": name,
        "scheme": choice["scheme"],
        "rounding": choice.get("rounding", "nearest"),
        "bits": part.bits,
        "stored_bits": part.stored_bits if kind == "tensors" else 0,
        "original_criterion": columns["original_loss"].mean(),
        "loss_increase": max(columns["divergence"].mean(), 0.0),
        **degradation(columns),
        "sqnr_db": 10 * math.log10(signal / noise) if noise else math.inf,
        "examples": len(columns["loss"]),
        "choice": choice,
    }


def measure_sensitivity(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: Iterable[Any],
    criterion: Any,
    *,
    widths: Iterable[int] | None = None,
    activation_bits: Iterable[int] = (),
    menus: Menus | None = None,
    folder: Path | str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The table of `sensitivities`, and for tensors what is predicted of them without measuring:
    ``hessian_rise``, ``fisher_rise`` and ``output_fisher_rise`` (`quantifind.mixed_precision.proxies`), from
    training data.

    Arguments as for `quantifind.search.find_strategy`, with which it shares what it measured.
    """
    measurements = Measurements(
        model, train_loader, val_loader, criterion, folder=folder, seed=seed
    )
    menus = menus or default_menus(measurements, widths or WIDTHS, activation_bits)
    parts = quantized_parts(measurements, menus)
    table = sensitivities(measurements, menus, parts)
    return table.join(_proxies(table, measurements, parts))


def _proxies(table: pd.DataFrame, measurements: Measurements, parts: Parts) -> pd.DataFrame:
    model, criterion = measurements.model, measurements.criterion
    examples = [
        t[:PROXY_EXAMPLES] for t in map(torch.cat, zip(*measurements.calibration, strict=True))
    ]
    batches = list(zip(*(t.split(128) for t in examples), strict=True))
    values = named_tensors(model)
    traces = hessian_traces(model, criterion, batches, draws=DRAWS, seed=measurements.seed)
    information = fisher(model, criterion, batches)
    rows = table[table["kind"] == "tensors"]
    candidates: dict[str, list[Tensor]] = {name: [] for name in rows["name"]}
    for row in rows.to_dict("records"):
        part = parts[part_key("tensors", row["name"], row["choice"])]
        candidates[row["name"]].append(part.dequantize().to(values[row["name"]].device))
    by_output = output_fisher_rises(model, criterion, batches, candidates)
    predicted = []
    for name, quantized in candidates.items():
        of_outputs = by_output.get(name, [math.nan] * len(quantized))
        for put, of_output in zip(quantized, of_outputs, strict=True):
            predicted.append(
                {
                    "hessian_rise": hessian_rise(traces[name], values[name], put),
                    "fisher_rise": fisher_rise(information[name], values[name], put),
                    "output_fisher_rise": of_output,
                }
            )
    return pd.DataFrame(predicted, index=rows.index)


def rank_correlations(table: pd.DataFrame) -> dict[str, float]:
    """Spearman's rank correlation of each proxy with the measured rise, over all tensors and
    choices; of the SQNR, which falls where the rise grows, with its sign turned. Missing values are
    left out; NaN where fewer than three remain."""
    correlations = {}
    for proxy in PROXIES:
        if proxy in table:
            both = table[["loss_increase", proxy]].replace([np.inf, -np.inf], np.nan).dropna()
            sign = -1 if proxy == "sqnr_db" else 1
            enough = len(both) > 2
            found = (
                sign * both["loss_increase"].corr(both[proxy], method="spearman")
                if enough
                else math.nan
            )
            correlations[proxy] = float(found)
    return correlations
