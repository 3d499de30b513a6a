"""Laws that every grid in quantifind/schemes/ keeps, found by being there."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from quantifind import plugins

SCHEMES = [plugins.load("schemes", name, "quantize") for name in plugins.names("schemes")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = st.integers(2, 32)


@st.composite
def tensors(draw, dtypes=tuple(DTYPES)):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    scale = draw(st.sampled_from([1e-40, 1e-30, 1e-3, 1.0, 1e4, 1e30]))
    values = draw(hnp.arrays("float64", shape, elements=st.floats(-1, 1)))
    dtype = draw(st.sampled_from(dtypes))
    limits = torch.finfo(dtype)
    return (torch.from_numpy(values) * scale).clamp(limits.min, limits.max).to(dtype)


@pytest.mark.parametrize("quantize", SCHEMES)
@given(values=tensors(), bits=BITS)
def test_shape_dtype_and_number_of_levels(quantize, values, bits):
    quantized = quantize(values, bits)
    result = quantized.dequantize()
    assert (result.shape, result.dtype) == (values.shape, values.dtype)
    assert result.isfinite().all()
    assert len(quantized.codes.unique()) <= 2**bits
    assert quantized.stored_bits >= bits * values.numel()


@pytest.mark.parametrize("quantize", SCHEMES)
@given(values=tensors(), bits=BITS)
def test_order_is_kept(quantize, values, bits):
    order = values.flatten().argsort()
    result = quantize(values, bits).dequantize().flatten()[order]
    assert (result.diff() >= 0).all()


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(-1e4, 1e4), bits=BITS)
def test_constant_tensor_keeps_its_value(quantize, dtype, value, bits):
    constant = torch.full((3, 2), value, dtype=torch.float64).to(dtype)
    result = quantize(constant, bits).dequantize()
    torch.testing.assert_close(result, constant, rtol=1e-7, atol=1e-45)


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_range_are_refused(quantize, bad):
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        quantize(torch.tensor([0.0, bad, 1.0]), 4)


@pytest.mark.parametrize("quantize", SCHEMES)
def test_a_width_may_be_a_numpy_integer(quantize):
    quantized = quantize(torch.arange(5.0), np.int64(4))
    assert quantized.bits == 4
    assert type(quantized.bits) is int


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("bits", [-1, 0, 1, 33, 4.0, True, "4"])
def test_a_width_the_grid_has_not_is_refused(quantize, bits):
    with pytest.raises(ValueError, match=r"bits is .* 2 to 32"):
        quantize(torch.ones(3), bits)


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_not_floating_point_is_refused(quantize, dtype):
    with pytest.raises(ValueError, match="only floating point"):
        quantize(torch.ones(3, dtype=dtype), 4)
