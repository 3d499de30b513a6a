"""Laws that every grid in quantifind/schemes/ keeps, found by being there, whatever its options."""

import importlib
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from quantifind.tensor.quantized import QuantizedTensor, from_rows, to_rows
from quantifind.utils import plugins

MODULES = [importlib.import_module(f"quantifind.schemes.{n}") for n in plugins.names("schemes")]
SCHEMES = [module.quantize for module in MODULES]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALE_DTYPES = [None, "float32", "float16", "power_of_two"]
BITS = st.integers(1, 32)
# options of one scheme alone, by what they need; a scheme that isn't here is tested without
OPTIONS = {
    "uniform": [{}, {"zero_point": True}],
    "minifloat": [{}, {"exponent": 1}, {"exponent": 2, "specials": "infinity"}],
    "power_of_two": [{}, {"terms": 1}],
    "codebook": [{}, {"centres": "normal"}, {"centres": "weighted_k_means"}],
}
CASES = [
    pytest.param(module, options, id="-".join([name, *map(str, options.values())]))
    for module, name in zip(MODULES, plugins.names("schemes"), strict=True)
    for options in OPTIONS.get(name, [{}])
]
for_every_case = pytest.mark.parametrize(("module", "options"), CASES)
for_every_scheme = pytest.mark.parametrize("module", MODULES, ids=plugins.names("schemes"))


@st.composite
def tensors(draw, dtypes=tuple(DTYPES), shape=None, least=1e-40, most=1e30):
    """Of any shape, empty too, and any magnitude; some are constant, 0, or have equal values."""
    if shape is None:
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    magnitudes = [1e-40, 1e-30, 1e-3, 1.0, 1e4, 1e30]
    scale = draw(st.sampled_from([m for m in magnitudes if least <= m <= most]))
    values = draw(hnp.arrays("float64", shape, elements=st.floats(-1, 1)))
    dtype = draw(st.sampled_from(dtypes))
    limits = torch.finfo(dtype)
    return (torch.from_numpy(values) * scale).clamp(limits.min, limits.max).to(dtype)


@st.composite
def sharing(draw, values):
    """What shares a scale: any axis, or none, and any group of a row's values, or none."""
    axis = draw(st.sampled_from([None, *range(-values.dim(), values.dim())]))
    length = to_rows(values, axis, None).shape[1]
    return {"axis": axis, "group": draw(st.none() | st.integers(1, max(length, 1)))}


def widths(module):
    return st.integers(module.MIN_BITS, module.MAX_BITS)


def has_scale(module, options):
    return not module.__name__.endswith("codebook") or options.get("centres") == "normal"


@st.composite
def arguments(draw, module, values, options, fits=("max_abs", "mse")):
    """Any that the scheme has, but for the width."""
    chosen = {
        **options,
        **draw(sharing(values)),
        "importance": values.double().abs().clamp(max=1e9),
    }
    if has_scale(module, options):
        chosen["scale"] = draw(st.sampled_from(fits))
        # float16 holds the scales of what is below its largest value
        limit = 1e4 if not values.numel() else values.double().abs().max()
        allowed = [d for d in SCALE_DTYPES if d != "float16" or limit <= 1e4]
        chosen["scale_dtype"] = draw(st.sampled_from(allowed))
    return chosen


def rows_of(tensor, quantized):
    return to_rows(tensor, quantized.qparams.axis, quantized.qparams.group)


def real_rows(quantized):
    return rows_of(torch.ones_like(quantized.codes, dtype=torch.bool), quantized)


def unpack(quantized, packed):
    """What the bytes of a tensor's codes stand for."""
    facts = quantized.codes.shape, quantized.qparams, quantized.dtype
    return QuantizedTensor.unpack(packed, *facts)


@for_every_case
@given(data=st.data())
def test_shape_dtype_finite_and_number_of_levels(module, options, data):
    values, bits = data.draw(tensors()), data.draw(widths(module))
    quantized = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    result = quantized.dequantize()
    assert (result.shape, result.dtype) == (values.shape, values.dtype)
    assert result.isfinite().all()
    assert quantized.qparams.grid.levels <= 2**bits
    rows, real = rows_of(result, quantized), real_rows(quantized)
    assert all(
        len(row[there].unique()) <= quantized.qparams.grid.levels
        for row, there in zip(rows, real, strict=True)
    )


@for_every_case
@given(data=st.data())
def test_order_is_kept_within_a_scale(module, options, data):
    values, bits = data.draw(tensors()), data.draw(widths(module))
    quantized = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    rows, result, real = (
        rows_of(values, quantized),
        rows_of(quantized.dequantize(), quantized),
        real_rows(quantized),
    )
    for row, rounded, there in zip(rows, result, real, strict=True):
        order = row[there].argsort()
        assert (rounded[there][order].diff() >= 0).all()


@for_every_case
@given(data=st.data())
def test_pack_and_unpack_and_what_is_stored(module, options, data):
    """The bits counted are those of the bytes, and of what stands beside them."""
    values, bits = data.draw(tensors()), data.draw(widths(module))
    quantized = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    packed = quantized.pack()
    unpacked = unpack(quantized, packed)
    assert torch.equal(unpacked.codes, quantized.codes)
    assert unpacked.codes.dtype == quantized.codes.dtype
    beside = [quantized.qparams.scale, quantized.qparams.zero_point]
    beside += [quantized.qparams.grid.table] if quantized.qparams.grid.stored else []
    tables = sum(t.numel() * t.element_size() for t in beside if t is not None)
    assert packed.dtype == torch.uint8
    assert quantized.stored_bits == 8 * (packed.numel() + tables)
    assert quantized.bits <= bits


@for_every_case
@given(data=st.data(), value=st.floats(0.5, 1), magnitude=st.sampled_from([1e-30, 1, -1e4, 1e30]))
def test_constant_tensor_keeps_its_value(module, options, data, value, magnitude):
    """To a unit in the last place of the scale or table; also where a last group is smaller."""
    dtype = data.draw(st.sampled_from(DTYPES))
    limits = torch.finfo(dtype)
    constant = torch.full((3, 5), value * magnitude, dtype=torch.float64)
    constant = constant.clamp(limits.min, limits.max).to(dtype)
    shared = data.draw(sharing(constant)) | {"importance": torch.ones(5)} | options
    result = module.quantize(constant, data.draw(widths(module)), **shared).dequantize()
    torch.testing.assert_close(result, constant, rtol=2e-7, atol=1e-45)


@for_every_case
@pytest.mark.parametrize(
    ("value", "dtype"), [(1e-40, torch.float32), (1e-40, torch.bfloat16), (1e-320, torch.float64)]
)
def test_subnormals_survive(module, options, value, dtype):
    """To an eighth, as scales of the same dtype are subnormal too."""
    for sign in (1, -1):
        constant = sign * torch.full((3,), value, dtype=dtype)
        for bits in range(module.MIN_BITS, module.MAX_BITS + 1):
            result = module.quantize(constant, bits, importance=torch.ones(3), **options)
            error = (result.dequantize().double() - constant.double()).abs()
            assert (error <= constant.double().abs() / 8).all()


@for_every_case
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_zeros_stay_zero(module, options, scale_dtype):
    """A power of two is never 0: half of the smallest is what half-integer levels have at least."""
    if has_scale(module, options):
        options = options | {"scale_dtype": scale_dtype}
    zeros, importance = torch.zeros(2, 3), torch.ones(3)
    for bits in range(module.MIN_BITS, module.MAX_BITS + 1):
        result = module.quantize(zeros, bits, axis=0, importance=importance, **options).dequantize()
        least = 0 if scale_dtype != "power_of_two" else 2**-127
        assert (result.abs() <= least).all()


@for_every_case
@given(data=st.data())
def test_idempotent_on_a_given_scale(module, options, data):
    """A scale that is a power of two, or centres that are the values, lose nothing again."""
    values = data.draw(tensors((torch.float32, torch.float64), least=1e-3, most=1e4))
    bits = data.draw(widths(module).filter(lambda bits: bits <= 16))
    scale = {"scale": 2.0 ** data.draw(st.integers(-20, 10))} if has_scale(module, options) else {}
    shared = data.draw(sharing(values)) | options | scale
    if options.get("centres") == "weighted_k_means":
        shared["importance"] = torch.ones(())
    once = module.quantize(values, bits, **shared).dequantize()
    assert torch.equal(module.quantize(once, bits, **shared).dequantize(), once)


@for_every_case
@given(data=st.data())
def test_sign_symmetric_where_the_levels_are(module, options, data):
    values = data.draw(tensors(dtypes=(torch.float32,)))
    bits, shared = data.draw(widths(module)), data.draw(sharing(values)) | options
    if not has_scale(module, options) or "zero_point" in options:
        return
    one = module.quantize(values, bits, **shared)
    low, high = one.qparams.grid.ends
    table = one.qparams.grid.table
    if low == -high and (table is None or torch.equal(table, -table.flip(0))):
        other = module.quantize(-values, bits, **shared)
        # 0 is a tie between half-integer levels
        not_tied = values.abs() > 1e-12 * (values.abs().max() if values.numel() else 0)
        assert torch.equal(one.dequantize()[not_tied], -other.dequantize()[not_tied])


@for_every_case
@settings(max_examples=40)
@given(data=st.data())
def test_squared_error_is_never_more_than_that_of_the_largest(module, options, data):
    """In float64, where rounding the values to their dtype has no say; the least scales too."""
    if not has_scale(module, options):
        return
    values = data.draw(tensors((torch.float64,), least=1e-30))
    bits = data.draw(widths(module))
    weights = data.draw(
        hnp.arrays("float64", values.shape, elements=st.sampled_from([0, 1e-60, 0.5, 1, 3]))
    )
    weights = torch.from_numpy(weights)
    shared = data.draw(arguments(module, values, options)) | {"importance": weights}
    largest, squared, weighted = (
        module.quantize(values, bits, **shared | {"scale": scale})
        for scale in ("max_abs", "mse", "weighted_mse")
    )
    unit = 1 if not values.numel() or not values.any() else values.abs().max()
    values = values / unit

    def error(quantized, weights=None):
        errors = (quantized.dequantize() / unit - values).square()
        return rows_of(errors if weights is None else errors * weights, quantized).sum(1)

    room = 1 + 1e-9
    assert (error(squared) <= error(largest) * room + 1e-30).all()
    bound = error(largest, weights) * room + 1e-30 * rows_of(weights, largest).sum(1)
    assert (error(weighted, weights) <= bound).all()


@for_every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_stay_finite(module, options, dtype):
    """Half of the largest value is left, 1 bit's step being twice the largest magnitude."""
    limits = torch.finfo(dtype)
    extremes = [limits.min / 2, -limits.tiny, 0, limits.tiny, limits.max / 2]
    values = torch.tensor(extremes, dtype=dtype)
    for bits in range(module.MIN_BITS, module.MAX_BITS + 1):
        for fit in ("max_abs", "mse") if has_scale(module, options) else (None,):
            scale = {} if fit is None else {"scale": fit}
            quantized = module.quantize(values, bits, importance=torch.ones(5), **options, **scale)
            assert quantized.dequantize().isfinite().all()


@for_every_case
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("group", [None, 1, 2])
def test_an_empty_tensor_stays_as_it_is(module, options, shape, axis, group):
    empty = torch.zeros(shape)
    shared = {"axis": axis, "group": group, "importance": empty, **options}
    for scale in ({}, {"scale": 0.5}, {"scale": "mse"}):
        if has_scale(module, options) or not scale:
            quantized = module.quantize(empty, 4, **shared, **scale)
            assert torch.equal(quantized.dequantize(), empty)
            assert torch.equal(unpack(quantized, quantized.pack()).codes, quantized.codes)


@for_every_case
@pytest.mark.parametrize("fit", ["max_abs", "mse", "weighted_mse"])
def test_a_last_group_may_be_smaller(module, options, fit):
    """It is quantized as a tensor of its own would be."""
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) + 2
    importance = values.square()
    scale = {"scale": fit} if has_scale(module, options) else {}
    whole = module.quantize(
        values, 3, axis=0, group=4, importance=importance, **scale, **options
    ).dequantize()
    for row, weights, result in zip(values, importance, whole, strict=True):
        for part in (slice(0, 4), slice(4, 7)):
            alone = module.quantize(row[part], 3, importance=weights[part], **scale, **options)
            assert torch.equal(alone.dequantize(), result[part])


@for_every_case
def test_an_axis_may_be_counted_from_the_end(module, options):
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for axis in range(3):
        one, other = (
            module.quantize(values, 3, axis=a, group=2, importance=values.square(), **options)
            for a in (axis, axis - 3)
        )
        assert torch.equal(one.dequantize(), other.dequantize())
        moved = module.quantize(
            values.movedim(axis, 0),
            3,
            axis=0,
            group=2,
            importance=values.square().movedim(axis, 0),
            **options,
        )
        assert torch.equal(moved.dequantize(), one.dequantize().movedim(axis, 0))


@for_every_case
def test_nothing_passed_in_is_changed(module, options):
    values, importance = torch.linspace(-1, 2, 12).reshape(3, 4), torch.ones(4)
    before = values.clone()
    module.quantize(values, 3, axis=0, importance=importance, **options).dequantize()
    assert torch.equal(values, before)
    assert torch.equal(importance, torch.ones(4))


@given(data=st.data())
def test_rows_and_back(data):
    values = data.draw(tensors())
    shared = data.draw(sharing(values))
    rows = to_rows(values, **shared)
    assert torch.equal(from_rows(rows, values.shape, **shared), values)


@for_every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_range_are_refused(module, options, bad):
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        module.quantize(torch.tensor([0.0, bad, 1.0]), 4, importance=torch.ones(3), **options)


@for_every_scheme
def test_a_width_may_be_a_numpy_integer(module):
    quantized = module.quantize(torch.arange(5.0), np.int64(4))
    assert quantized.bits == 4
    assert type(quantized.bits) is int


@for_every_scheme
@pytest.mark.parametrize("bits", [-1, 0, 33, 4.0, True, "4"])
def test_a_width_the_grid_has_not_is_refused(module, bits):
    allowed = f"{module.MIN_BITS} to {module.MAX_BITS}"
    with pytest.raises(ValueError, match=rf"bits is .* {allowed}$"):
        module.quantize(torch.ones(3), bits)
    for bits in (module.MIN_BITS - 1, module.MAX_BITS + 1):
        with pytest.raises(ValueError, match=rf"bits is {bits}: .* {allowed}$"):
            module.quantize(torch.ones(3), bits)


@for_every_case
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_not_floating_point_is_refused(module, options, dtype):
    with pytest.raises(ValueError, match="only floating point"):
        module.quantize(torch.ones(3, dtype=dtype), 4, importance=torch.ones(3), **options)


@for_every_case
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"axis": 2}, r"axis is 2: the tensor's shape is \[2, 3\]"),
        ({"axis": -3}, r"axis is -3: the tensor's shape is \[2, 3\]"),
        ({"group": 7}, "group is 7: whole numbers 1 to 6 "),
        ({"axis": 0, "group": 4}, "group is 4: whole numbers 1 to 3 "),
        ({"group": 0}, "group is 0: whole numbers 1 to 6 "),
    ],
)
def test_what_cannot_share_a_scale_is_refused(module, options, wrong, message):
    with pytest.raises(ValueError, match=message):
        module.quantize(torch.ones(2, 3), 4, importance=torch.ones(3), **options | wrong)


@for_every_scheme
def test_an_unknown_option_is_refused(module):
    with pytest.raises((ValueError, TypeError), match="colour"):
        module.quantize(torch.ones(3), 4, colour="red")
