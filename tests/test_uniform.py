"""The uniform grid beside its definition and beside torch's own fake quantization."""

import pytest
import torch
from hypothesis import given
from test_schemes import BITS, DTYPES, tensors

from quantifind.schemes.uniform import quantize


@given(values=tensors(), bits=BITS)
def test_error_is_at_most_half_a_step(values, bits):
    """Half a step of the scale that is stored, and one unit in the last place of the dtype."""
    quantized = quantize(values, bits)
    exact, result = values.double(), quantized.dequantize()
    unit = torch.nextafter(result.abs(), torch.full_like(result, torch.inf)).double()
    unit = (unit - result.abs().double()).nan_to_num(posinf=0)  # beyond the largest finite value
    error = (result.double() - exact).abs()
    assert (error <= quantized.scale.double() / 2 * (1 + 1e-9) + unit).all()


@given(values=tensors(dtypes=(torch.float32,)), bits=BITS)
def test_scale_is_the_definition(values, bits):
    if values.numel() and values.min() != values.max():
        scale = quantize(values, bits).scale.double()
        defined = 2 * values.double().abs().max() / (2**bits - 1)
        unit = torch.nextafter(defined.float(), torch.tensor(torch.inf)).double() - defined
        assert defined <= scale <= defined + 2 * unit.clamp(min=2**-149)


@pytest.mark.parametrize("bits", range(2, 9))
@given(values=tensors(dtypes=(torch.float32,)))
def test_equals_torch_fake_quantize(bits, values):
    """Independent oracle; values on a rounding tie are skipped, torch may round them otherwise."""
    quantized = quantize(values, bits)
    scale = quantized.scale
    if not 1e-30 < scale < 1e30:
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    oracle = torch.fake_quantize_per_tensor_affine(values, float(scale), 0, low, high)
    steps = values.double() / scale.double()
    no_tie = ((steps - steps.floor()) - 0.5).abs() > 1e-4
    expected, result = oracle[no_tie], quantized.dequantize()[no_tie]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


@given(values=tensors(), bits=BITS)
def test_sign_symmetric_but_for_ties(values, bits):
    one, other = quantize(values, bits), quantize(-values, bits)
    steps = values.double() / one.scale.double().clamp(min=2**-1074)
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-6
    assert torch.equal(one.codes[~tie], -other.codes[~tie])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 8, 24, 32])
def test_extreme_values_stay_finite(dtype, bits):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.min, -limits.tiny, 0, limits.tiny, limits.max], dtype=dtype)
    assert quantize(values, bits).dequantize().isfinite().all()


def test_a_given_largest_value_sets_the_scale_and_clips():
    quantized = quantize(torch.tensor([-3.0, -0.5, 0.0, 0.4, 3.0]), 4, largest=1.5)
    assert quantized.scale.item() == pytest.approx(2 * 1.5 / 15)
    assert quantized.codes.tolist() == [-8, -2, 0, 2, 7]


def test_stored_bits_count_whole_bytes_and_the_scale():
    assert quantize(torch.arange(10.0), 3).stored_bits == 8 * 4 + 32
    assert quantize(torch.arange(10.0).double(), 3).stored_bits == 8 * 4 + 64
