"""Values on a grid: the scale of each row, and the codes (OMSE, arXiv:1902.06822)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, overload

import torch
from torch import Tensor

from quantifind.tensor.qparams import POWER_OF_TWO, Grid, QParams, from_rows, to_rows
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.stored_scales import check_storable, storage_dtype, stored_scale

INTEGERS = (torch.int8, torch.int16, torch.int32)
FITS = ("max_abs", "mse", "weighted_mse")
# tried besides the scale that reaches the largest value, as shares of it; 1/64 of it is the
# standard deviation of some millions of weights with few outliers
SHARES = torch.logspace(-5, 0.25, 43, base=2, dtype=torch.float64).tolist()
REFINEMENTS = 6


def level_count(scheme: str, bits: Any, levels: Any, *, low: int, high: int) -> int:
    """How many levels ``bits`` or ``levels`` ask for.

    scheme: its name, for the error.
    bits, levels: one of them, the other None.
    low, high: the widths the scheme has, in bits.
    Raises: ValueError unless exactly one is given, a whole number that the scheme has.
    """
    if (bits is None) == (levels is None):
        raise ValueError(f"{scheme} takes either bits or levels, not bits={bits}, levels={levels}")
    given, least, most = (bits, low, high) if levels is None else (levels, 2**low, 2**high)
    name = "bits" if levels is None else "levels"
    count = whole_number(name, given, f"{scheme} takes", least, most)
    return 2**count if levels is None else count


def whole_number(name: str, given: Any, takes: str, low: int, high: int) -> int:
    """An option as an int.

    name: of the option.
    takes: who allows ``low`` to ``high``, for the error: "uniform takes".
    Raises: ValueError unless ``given`` is a whole number in that range.
    """
    whole = isinstance(given, Integral) and not isinstance(given, bool)
    if not whole or not low <= given <= high:
        raise ValueError(f"{name} is {given!r}: {takes} whole numbers {low} to {high}")
    return int(given)


def check_values(values: Tensor) -> None:
    """Raise ValueError unless ``values`` are floating point and finite."""
    if not values.is_floating_point():
        raise ValueError(f"values are {values.dtype}: only floating point can be quantized")
    # what has a NaN has it for its least and its largest (test_one_value_without_a_range_is_found);
    # a mask takes ten times as long
    if values.numel() and not all(end.isfinite() for end in values.detach().aminmax()):
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{bad} of {values.numel()} values are NaN or infinite")


def filled_rows(
    values: Tensor, axis: int | None, group: int | None
) -> tuple[Tensor, Tensor | None]:
    """`to_rows` in float64, and, unless all of them are values, which are, bool.

    What fills up a group repeats its first value, so as to have no say in its range.
    """
    rows = to_rows(values.double(), axis, group)
    if rows.numel() == values.numel():
        return rows, None
    real = to_rows(torch.ones_like(values, dtype=torch.bool), axis, group)
    return torch.where(real, rows, rows[:, :1]), real


def importance_rows(
    importance: Tensor | None, values: Tensor, axis: int | None, group: int | None
) -> Tensor:
    """The importance of each value, float64, as `to_rows` has them; 0 for what fills up a group.

    Raises: ValueError where there is none, or it can't broadcast, or is negative, NaN or infinite.
    """
    if importance is None:
        raise ValueError("weighted errors need the importance of each value: calibration inputs")
    # of plain values it is a number or a list: test_importance_may_be_plain_values
    given = torch.as_tensor(importance, dtype=torch.float64, device=values.device)
    try:
        each = given.expand_as(values)
    except RuntimeError as error:
        raise ValueError(
            f"importance has shape {list(given.shape)}: {list(values.shape)}, or what "
            "broadcasts to it, is allowed"
        ) from error
    if bad := int((~((given >= 0) & given.isfinite())).sum()):
        raise ValueError(f"{bad} values of importance are negative, NaN or infinite")
    return to_rows(each, axis, group)


def quantize_to_grid(
    values: Tensor,
    grid: Grid,
    *,
    axis: int | None = None,
    group: int | None = None,
    scale: str | float = "max_abs",
    importance: Tensor | None = None,
    scale_dtype: str | None = None,
    zero_point: bool = False,
) -> QuantizedTensor:
    """Each value's nearest level of ``grid`` times the scale of its row.

    values: floating point, finite, any shape. axis, group: what shares a scale, as in
    `quantifind.tensor.qparams.to_rows`: the tensor by default, a channel, or a group of its inputs.
    scale: "max_abs", the last level half a step below the row's largest magnitude; "mse", with the
        least sum of squared errors among those tried, never more than that of "max_abs";
        "weighted_mse", each error weighted with ``importance``; or the scale itself, a number.
    importance: not negative, broadcasts against ``values``: the inputs' second moments.
    scale_dtype: what the scale is stored in: "float32" (default; float64 for float64 values),
        "float16", or "power_of_two", 2^−127 to 2^127 in 8 bits.
    zero_point: shift the levels by a whole number of codes, so that they span the row's lowest to
        its largest value, and 0 (Jacob et al. 2018, arXiv:1712.05877); of a given ``scale``, as far
        as it reaches from the lowest.
    Raises: ValueError naming the option that is out of range, for values that are not floating
    point, and for NaN or infinity, saying how many there are.
    """
    check_values(values)
    values = values.detach()
    if zero_point and (grid.table is not None or grid.offset):
        raise ValueError("zero_point is True: only the uniform grid's whole levels have one")
    dtype = storage_dtype("scale_dtype", scale_dtype, values.dtype)
    # test_a_last_group_may_be_smaller
    rows, real = filled_rows(values, axis, group)
    zero = None
    if isinstance(scale, str) and scale in FITS:
        weights = None if real is None else real.double()
        if scale == "weighted_mse":
            weights = importance_rows(importance, values, axis, group)
        step, zero = _largest(rows, grid, dtype, zero_point)
        if scale != "max_abs" and rows.numel():
            step, zero = _least_error(rows, grid, dtype, step, zero, weights)
    elif isinstance(scale, Real) and not isinstance(scale, bool) and 0 <= scale < torch.inf:
        step = rows.new_full((len(rows), 1), float(scale))
        check_storable(step, dtype)
        step = stored_scale(step, dtype)
        if zero_point and rows.numel():
            zero = _zero_point(rows.amin(1, keepdim=True).clamp(max=0), step, grid)
    else:
        fits = ", ".join(FITS)
        raise ValueError(f"scale is {scale!r}: a finite number from 0 up, {fits} are allowed")
    codes = QParams(grid, step, zero).nearest(rows)
    codes = from_rows(codes.to(torch.int32), values.shape, axis, group)
    if axis is None and group is None:
        step = step.reshape(())
    return QuantizedTensor(codes, QParams(grid, step, zero, axis, group), values.dtype)


def _largest(
    rows: Tensor, grid: Grid, dtype: torch.dtype, zero_point: bool
) -> tuple[Tensor, Tensor | None]:
    """The smallest storable scale (rows, 1) with which the levels reach each row's values."""
    if rows.numel() == 0:
        return stored_scale(rows.new_zeros(len(rows), 1), dtype), None
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if zero_point:
        return _spanning(low.clamp(max=0), high.clamp(min=0), grid, dtype)
    largest = torch.maximum(high, -low)
    step = _covering(largest, grid.reach)
    if grid.table is None and grid.levels % 2 == 0 and not grid.offset:
        # a constant row is its own step, the reach being no level, unless storing that step takes
        # more from it than half of the smaller one: test_constant_tensor_keeps_its_value
        own = stored_scale(largest.clamp(max=torch.finfo(dtype).max), dtype, up=True).double()
        near = (own - largest).abs() <= largest / (grid.levels - 1)
        step = torch.where((low == high) & (low <= largest * grid.ends[1]) & near, own, step)
    return stored_scale(step, dtype, up=True), None


def _covering(extent: Tensor, steps: float) -> Tensor:
    """The smallest step, so many of which are ``extent`` or more."""
    step = extent / steps
    # subnormal quotients are coarse: test_subnormals_survive
    return torch.where(
        step * steps < extent, step.nextafter(torch.full_like(step, torch.inf)), step
    )


def _spanning(
    low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype, *, up: bool = True
) -> tuple[Tensor, Tensor]:
    step = stored_scale(_covering(high - low, grid.levels - 1), dtype, up=up)
    return step, _zero_point(low, step, grid)


def _zero_point(low: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """The code of 0 with which the lowest code is nearest to ``low``, which isn't above 0."""
    zero = grid.lowest_code - low / step.double().clamp(min=2**-1074)
    width = next(t for t in INTEGERS if grid.levels <= 2 ** torch.iinfo(t).bits)
    highest = grid.lowest_code + grid.levels - 1
    return zero.round().clamp(grid.lowest_code, highest).to(width)


def _least_error(
    rows: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    largest: Tensor,
    zero: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Of the scales tried, each row's with the least (weighted) sum of squared errors."""
    exact = _Errors.of(rows, grid, largest, weights)
    # squares of the levels of 7 exponent bits are beyond float32:
    # test_squared_error_is_less_for_every_exponent
    precise = grid.levels > 2**16 or grid.reach > 2**32
    errors = exact if precise else exact.in_float32()
    best = _Best(largest, zero, *errors(largest, zero))
    for step, shift in _candidates(rows, grid, dtype, largest, zero):
        best.try_also(step, shift, *errors(step, shift))
    for _ in range(REFINEMENTS if dtype != POWER_OF_TWO else 0):
        step = stored_scale(torch.where(best.refined > 0, best.refined, best.step.double()), dtype)
        if not best.try_also(step, best.zero, *errors(step, best.zero)):
            break
    if precise:
        return best.step, best.zero
    # what float32 took for better may not be
    better = exact(best.step, best.zero)[0] < exact(largest, zero)[0]
    return _where(better, best.step, largest), _where(better, best.zero, zero)


@dataclass(frozen=True)
class _Errors:
    """What rounding makes of rows, (rows, length), by scale and zero point.

    unit: of the values, (rows, 1): the largest scale, so that squares neither overflow nor vanish
        (test_extreme_scales_are_found_as_others_are).
    weights: of the squared errors, at most 1 in each row.
    """

    grid: Grid
    values: Tensor
    unit: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, grid: Grid, largest: Tensor, weights: Tensor | None) -> "_Errors":
        unit = torch.where(largest.double() > 0, largest.double(), 1.0)
        if weights is not None:
            weights = weights / weights.amax(1, keepdim=True).clamp(min=2**-1022)
        return cls(grid, rows / unit, unit, weights)

    def in_float32(self) -> "_Errors":
        weights = None if self.weights is None else self.weights.float()
        return replace(self, values=self.values.float(), weights=weights)

    def __call__(self, step: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each row's error, and its best scale for the codes that ``step`` gives."""
        values, weights = self.values, self.weights
        step = (step.double() / self.unit).to(values.dtype)
        scaled = values / step
        codes = self.grid.codes(scaled if shift is None else scaled + shift)
        levels = self.grid.values(codes).to(values.dtype)
        levels = levels if shift is None else levels - shift
        weighted = levels if weights is None else levels * weights
        power = (weighted * levels).sum(1, keepdim=True)
        product = (weighted * values).sum(1, keepdim=True)
        residual = (values - step * levels).square_()
        residual = residual if weights is None else residual.mul_(weights)
        best = torch.where(power > 0, product / power, step).double() * self.unit
        return residual.sum(1, keepdim=True), best


@dataclass
class _Best:
    """Of what was tried for each row: scale, zero point, error, and the best scale for its codes;
    (rows, 1) each."""

    step: Tensor
    zero: Tensor | None
    error: Tensor
    refined: Tensor

    def try_also(self, step: Tensor, zero: Tensor | None, error: Tensor, refined: Tensor) -> bool:
        """Keep what is better; whether it is for any row."""
        better = error < self.error
        self.step = _where(better, step, self.step)
        self.zero = _where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)
        self.refined = torch.where(better, refined, self.refined)
        return bool(better.any())


def _candidates(
    rows: Tensor, grid: Grid, dtype: torch.dtype, largest: Tensor, zero: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    shares = SHARES if dtype != POWER_OF_TWO else [2.0**-k for k in range(1, 7)]
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    for share in shares:
        if zero is None:
            yield stored_scale(largest.double() * share, dtype), None
        else:
            yield _spanning(low * share, high * share, grid, dtype, up=share < 1)


@overload
def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor: ...
@overload
def _where(condition: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None: ...
def _where(condition: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return None
    # torch.where knows no float8: through float32, which holds every power of two it has
    if one.dtype == POWER_OF_TWO:
        return torch.where(condition, one.float(), other.float()).to(POWER_OF_TWO)
    return torch.where(condition, one, other)
