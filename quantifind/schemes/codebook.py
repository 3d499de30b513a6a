"""Levels from a table: k-means centres (Deep Compression, arXiv:1510.00149; sensitivity-weighted,
SqueezeLLM, arXiv:2306.07629), and quantiles of the normal distribution (QLoRA,
arXiv:2305.14314)."""

from typing import Any

import torch
from torch import Tensor

from quantifind.tensor.qparams import Grid, QParams, from_rows
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.scales import (
    check_values,
    filled_rows,
    importance_rows,
    level_count,
    quantize_to_grid,
)
from quantifind.tensor.stored_scales import storage_dtype

MIN_BITS, MAX_BITS = 1, 8
CENTRES = ("k_means", "weighted_k_means", "normal")
ITERATIONS = 100


def quantize(
    values: Tensor,
    bits: int | None = None,
    *,
    levels: int | None = None,
    centres: str = "k_means",
    axis: int | None = None,
    group: int | None = None,
    importance: Tensor | None = None,
    table_dtype: str | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Round to the nearest entry of a table.

    bits: 1 to 8.
    levels: instead of bits, how many entries, 2 to 256.
    centres: "k_means", the entries with the least squared error, stored with the tensor;
        "weighted_k_means", each error weighted with ``importance``; "normal", equally likely
        quantiles of the normal distribution, times a scale: NF4 is 4 bits in groups of 64.
    axis, group: what shares a table, or a scale, as in `quantifind.tensor.qparams.to_rows`.
    importance: not negative, broadcasts against ``values``: second moments of the inputs, or
        squared gradients.
    table_dtype: what k-means centres are stored in, "float32" (default; float64 for float64 values)
        or "float16".
    options: for "normal", `scale` and `scale_dtype`, as
        `quantifind.tensor.scales.quantize_to_grid` has them.
    Raises: ValueError naming the option that is out of range, and as `quantize_to_grid`.

    >>> quantize(torch.tensor([0.1, 0.2, 0.9, 5.0]), levels=3).dequantize().tolist()
    [0.15000000596046448, 0.15000000596046448, 0.8999999761581421, 5.0]
    """
    count = level_count("codebook", bits, levels, low=MIN_BITS, high=MAX_BITS)
    if centres not in CENTRES:
        raise ValueError(f"centres is {centres!r}: {', '.join(CENTRES)} are allowed")
    if centres == "normal":
        grid = Grid(count, table=normal_levels(count).to(values.device))
        options |= {"axis": axis, "group": group, "importance": importance}
        return quantize_to_grid(values, grid, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: k-means centres have no scale and no zero point")
    check_values(values)
    values = values.detach()
    dtype = storage_dtype("table_dtype", table_dtype, values.dtype)
    rows, real = filled_rows(values, axis, group)
    weights = torch.ones_like(rows) if real is None else real.double()
    if centres == "weighted_k_means":
        weights = importance_rows(importance, values, axis, group)
    kept = k_means(rows, weights, count).to(dtype)
    if kept.isinf().any():
        raise ValueError(
            f"a centre is too large for table_dtype {table_dtype!r}: "
            f"at most {torch.finfo(dtype).max:.3g} is allowed"
        )
    grid = Grid(count, table=kept[0] if len(kept) == 1 else kept, stored=True)
    codes = from_rows(grid.codes(rows).to(torch.int32), values.shape, axis, group)
    return QuantizedTensor(codes, QParams(grid, axis=axis, group=group), values.dtype)


def normal_levels(count: int) -> Tensor:
    """Quantiles of the standard normal distribution in rising order, −1 to 1 with 0, float64; of
    two, −1 and 1.

    Half of them, and one more if the number is even, are above or at 0; the outermost probability
    is the mean of those at which the two halves would end (QLoRA, section 3).

    >>> [round(level, 4) for level in normal_levels(4).tolist()]
    [-1.0, 0.0, 0.4358, 1.0]
    """
    if count == 2:
        # with 0 there would be none below it: test_constant_tensor_keeps_its_value
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    above, below = count // 2, (count - 1) // 2
    outer = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    half = torch.tensor(0.5, dtype=torch.float64)
    up, down = (
        torch.special.ndtri(torch.linspace(half.item(), outer, n + 1, dtype=torch.float64))[1:]
        for n in (above, below)
    )
    quantiles = torch.cat([-down.flip(0), torch.zeros(1, dtype=torch.float64), up])
    return quantiles / quantiles.abs().max()


def k_means(rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """Centres of each row's values, in rising order, (rows, count) (Lloyd 1982).

    rows, weights: (rows, length) float64; a value's squared error counts by its weight. From four
    starts, quantiles of the values, of the distinct ones, and of a density that is flatter by the
    cube root (Panter and Dite 1951), and even steps over their range, the one that ends best is
    taken, and its centres are moved to where they are needed more. As many distinct values as
    centres, or fewer, are the centres.
    """
    if rows.numel() == 0:
        return rows.new_zeros(len(rows), count)
    heaviest = weights.amax(1, keepdim=True)
    weights = torch.where(heaviest > 0, weights / heaviest, 1.0)
    values, order = rows.contiguous().sort(1)
    weights = weights.gather(1, order)
    unit = values.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    values = values / unit
    sums = [_running(weights), _running(weights * values), _running(weights * values.square())]
    best, least = values[:, :0], torch.full_like(unit, torch.inf)
    for centres in _starts(values, sums[0], count):
        for _ in range(ITERATIONS):
            moved, error = _lloyd(values, sums, centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        _, error = _lloyd(values, sums, centres)
        best = torch.where(error < least, centres, best) if best.numel() else centres
        least = torch.minimum(error, least)
    for _ in range(ITERATIONS if count > 2 else 0):
        moved, _ = _lloyd(values, sums, _swap(values, sums, best))
        if torch.equal(moved, best):
            break
        best = moved
    return best * unit


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, …, length values of each row."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _starts(values: Tensor, mass: Tensor, count: int) -> list[Tensor]:
    """Centres to begin with, (rows, count) each."""
    middle = (torch.arange(count, dtype=values.dtype, device=values.device) + 0.5) / count
    low, high = values[:, :1], values[:, -1:]
    starts = [low + (high - low) * middle]
    gaps = (values[:, 1:] - values[:, :-1]).pow(2 / 3) * (mass[:, 2:] - mass[:, 1:-1]).pow(1 / 3)
    new = torch.nn.functional.pad((values[:, 1:] > values[:, :-1]).double(), (1, 0), value=1.0)
    for measure in (mass, _running(new), _running(torch.nn.functional.pad(gaps, (1, 0)))):
        target = middle * measure[:, -1:]
        position = torch.searchsorted(measure, target.contiguous()) - 1
        starts.append(values.gather(1, position.clamp(0, values.shape[1] - 1)))
    return starts


def _ends(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the row what is nearest to each centre begins, and ends, (rows, count) each."""
    inner = torch.searchsorted(values, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
    pad = torch.nn.functional.pad
    return pad(inner, (1, 0)), pad(inner, (0, 1), value=values.shape[1])


def _mean(
    values: Tensor, sums: list[Tensor], start: Tensor, end: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Mass and mean of each part of a row; an empty one's is ``empty``."""
    mass, moment = (total.gather(1, end) - total.gather(1, start) for total in sums[:2])
    # differences of sums may be far off where weights are: test_centres_are_among_the_values
    last = values.shape[1] - 1
    low = values.gather(1, start.clamp(max=last))
    high = values.gather(1, (end - 1).clamp(min=0))
    mean = torch.minimum(torch.maximum(moment / mass, low), high)
    return mass, torch.where((mass > 0) & (end > start), mean, empty)


def _lloyd(values: Tensor, sums: list[Tensor], centres: Tensor) -> tuple[Tensor, Tensor]:
    """One step: each centre moves to the mean of what is nearest to it; the error before that."""
    start, end = _ends(values, centres)
    mass, moment, square = (total.gather(1, end) - total.gather(1, start) for total in sums)
    error = (square - 2 * centres * moment + centres.square() * mass).sum(1, keepdim=True)
    return _mean(values, sums, start, end, centres)[1].sort(1)[0], error


def _swap(values: Tensor, sums: list[Tensor], centres: Tensor) -> Tensor:
    """Where it lessens the error, two neighbours become one, and another is parted at its mean."""
    start, end = _ends(values, centres)
    mass, mean = _mean(values, sums, start, end, centres)
    cut = torch.searchsorted(values, mean.contiguous()).clamp(start, end)
    below, low = _mean(values, sums, start, cut, mean)
    above, high = _mean(values, sums, cut, end, mean)
    gain = below * above / mass.clamp(min=2**-1022) * (high - low).square()
    both = (mass[:, 1:] + mass[:, :-1]).clamp(min=2**-1022)
    cost = mass[:, 1:] * mass[:, :-1] / both * mean.diff(dim=1).square()
    parted = gain.argmax(1, keepdim=True)
    for neighbour in (parted.clamp(max=cost.shape[1] - 1), (parted - 1).clamp(min=0)):
        cost = cost.scatter(1, neighbour, torch.inf)
    joined = cost.argmin(1, keepdim=True)
    end_of_both = end.gather(1, joined + 1)
    one = _mean(values, sums, start.gather(1, joined), end_of_both, mean.gather(1, joined))[1]
    swapped = mean.scatter(1, joined, one).scatter(1, joined + 1, high.gather(1, parted))
    swapped = swapped.scatter(1, parted, low.gather(1, parted)).sort(1)[0]
    better = gain.gather(1, parted) > cost.gather(1, joined) * (1 + 1e-9)
    return torch.where(better, swapped, centres)
