"""Small floating point beside ml_dtypes, by other hands."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from test_schemes import tensors

from quantifind.schemes.minifloat import levels, quantize

# exponent and mantissa bits, specials, and the scale that makes up for another exponent bias
FORMATS = {
    "float8_e3m4": (3, 4, "infinity", 1.0),
    "float8_e4m3": (4, 3, "infinity", 1.0),
    "float8_e4m3fn": (4, 3, "nan", 1.0),
    "float8_e4m3fnuz": (4, 3, "none", 2.0**-1),
    "float8_e4m3b11fnuz": (4, 3, "none", 2.0**-4),
    "float8_e5m2": (5, 2, "infinity", 1.0),
    "float8_e5m2fnuz": (5, 2, "none", 2.0**-1),
    "float6_e2m3fn": (2, 3, "none", 1.0),
    "float6_e3m2fn": (3, 2, "none", 1.0),
    "float4_e2m1fn": (2, 1, "none", 1.0),
    "bfloat16": (8, 7, "infinity", 1.0),
}


def test_every_format_is_here():
    """But for scales without sign or mantissa, which are no grid of this kind."""
    theirs = {name for name in dir(ml_dtypes) if name.startswith(("float8_", "float6_", "float4_"))}
    assert theirs - {"float8_e8m0fnu"} == FORMATS.keys() - {"bfloat16"}


def ours(values, name):
    exponent, mantissa, specials, scale = FORMATS[name]
    return quantize(
        values, 1 + exponent + mantissa, exponent=exponent, specials=specials, scale=scale
    ).dequantize()


def theirs(values, name):
    dtype = getattr(ml_dtypes, name)
    largest = float(ml_dtypes.finfo(dtype).max)
    return torch.from_numpy(values.clamp(-largest, largest).numpy().astype(dtype).astype("float64"))


@pytest.mark.parametrize("name", FORMATS)
def test_levels_are_those_of_the_format(name):
    exponent, mantissa, specials, scale = FORMATS[name]
    dtype = np.dtype(getattr(ml_dtypes, name))
    codes = np.arange(2 ** (1 + exponent + mantissa)).astype(f"uint{8 * dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # some codes are NaN
        values = torch.from_numpy(codes.view(dtype).astype("float64"))
    expected = values[values.isfinite()].unique()
    assert torch.equal(levels(exponent, mantissa, specials) * scale, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_even_as_in_the_format(name):
    """Levels, the middles between them, and to either side of those."""
    exponent, mantissa, specials, scale = FORMATS[name]
    own = levels(exponent, mantissa, specials) * scale
    own = own[
        own.abs() < 2.0**100
    ]  # float64 holds the middles of bfloat16's, ml_dtypes rounds twice
    middles = (own[1:] + own[:-1]) / 2
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    values = torch.cat([own, middles])
    if name != "bfloat16":
        values = torch.cat([values, middles.nextafter(infinity), middles.nextafter(-infinity)])
        values = values.float().double()
    assert torch.equal(ours(values, name), theirs(values, name))


@pytest.mark.parametrize("name", FORMATS)
@given(values=tensors(dtypes=(torch.float32,), most=1e4))
def test_equals_the_format(name, values):
    assert torch.equal(ours(values.double(), name), theirs(values, name))


def test_float16_is_torch_float16():
    values = torch.randn(999, generator=torch.Generator().manual_seed(0)).double() * 1e-4
    result = quantize(values, 16, exponent=5, specials="infinity", scale=1.0).dequantize()
    assert torch.equal(result, values.half().double())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mx_blocks_share_a_power_of_two(bits):
    """OCP MX: 32 values and 8 bits of scale; the levels reach each block's largest value."""
    values = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    quantized = quantize(values, bits, axis=0, group=32, scale_dtype="power_of_two")
    assert quantized.stored_bits == 8 * (3 * 80 * bits // 8) + 9 * 8
    blocks = torch.nn.functional.pad(values, (0, 16)).reshape(9, 32)
    scale = quantized.qparams.scale.double().flatten()
    reached = scale * quantized.qparams.grid.reach
    assert (blocks.abs().amax(1) <= reached).all()
    assert (blocks.abs().amax(1) > reached / 2).all()
    assert torch.equal(scale.log2(), scale.log2().round())


@given(st.data())
def test_all_widths_of_exponent_and_mantissa(data):
    bits = data.draw(st.integers(3, 16))
    exponent = data.draw(st.integers(1, min(bits - 1, 8)))
    specials = data.draw(st.sampled_from(["none", "nan", "infinity"]))
    table = levels(exponent, bits - 1 - exponent, specials)
    kept = {"none": 0, "nan": 2, "infinity": 2 ** (bits - exponent)}[specials]
    assert len(table) == 2**bits - 1 - kept  # 0 once, though it has two codes
    assert (table.diff() > 0).all()
    assert torch.equal(table, -table.flip(0))
    again = quantize(table, bits, exponent=exponent, specials=specials, scale=1.0)
    assert torch.equal(again.dequantize(), table)


@pytest.mark.parametrize("exponent", [0, 8, 2.0, True, "4"])
def test_an_exponent_that_cannot_be_is_refused(exponent):
    with pytest.raises(ValueError, match=r"exponent is .*: 8 bits take whole numbers 1 to 7"):
        quantize(torch.ones(3), 8, exponent=exponent)


def test_a_numpy_integer_is_a_whole_number():
    assert quantize(torch.ones(3), 8, exponent=np.int64(4)).bits == 8


def test_unknown_specials_are_refused():
    with pytest.raises(ValueError, match="specials is 'nans': none, nan, infinity are allowed"):
        quantize(torch.ones(3), 8, specials="nans")


def test_a_zero_point_is_refused():
    with pytest.raises(ValueError, match="zero_point"):
        quantize(torch.ones(3), 8, zero_point=True)
