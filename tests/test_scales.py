"""Scales: how they are stored, and found."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from quantifind.schemes import minifloat, uniform
from quantifind.tensor.scales import POWER_OF_TWO, check_values, stored_scale

DTYPES = [torch.float16, torch.float32, torch.float64, POWER_OF_TWO]
SAMPLE = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))


def stored(scale, dtype, **options):
    return (
        stored_scale(torch.tensor([scale], dtype=torch.float64), dtype, **options).double().item()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(scale=st.floats(0, 1e38))
def test_scales_are_stored_to_nearest_or_up_and_never_to_zero(dtype, scale):
    largest = torch.finfo(dtype).max
    near = stored(scale, dtype)
    assert near > 0 or (scale == 0 and dtype != POWER_OF_TWO)
    assert near <= largest
    if scale <= largest:
        assert stored(scale, dtype, up=True) >= scale
        assert abs(near - scale) <= abs(stored(scale, dtype, up=True) - scale)


@pytest.mark.parametrize("power", range(-127, 128))
def test_powers_of_two_are_stored_exactly(power):
    assert (
        stored(2.0**power, POWER_OF_TWO) == stored(2.0**power, POWER_OF_TWO, up=True) == 2.0**power
    )


def test_between_powers_of_two():
    assert [stored(scale, POWER_OF_TWO) for scale in (1.4, 1.5, 1.6, 1e-50, 0.0)] == [
        *(1, 1, 2),
        *(2.0**-127, 2.0**-127),
    ]
    assert stored(1.01, POWER_OF_TWO, up=True) == 2


@pytest.mark.parametrize("scale", ["max_abs", "mse"])
def test_a_scale_too_large_to_store_is_refused(scale):
    values = torch.tensor([1e6, -2e6])
    with pytest.raises(ValueError, match=r"scale of 1.33e\+06 is too large for .*float16: at most"):
        uniform.quantize(values, 2, scale=scale, scale_dtype="float16")
    with pytest.raises(ValueError, match="too large for scale_dtype float16"):
        uniform.quantize(values, 2, scale=1e5, scale_dtype="float16")
    with pytest.raises(ValueError, match="too large for scale_dtype float32"):
        uniform.quantize(torch.tensor([3e38, 1.0]), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_without_a_range_is_found(dtype, bad):
    """Wherever it is, in as many values as vectors and threads share."""
    for place in (0, 40_001, 99_999):
        values = torch.ones(100_000, dtype=dtype)
        values[place] = bad
        for laid_out in (values, values.reshape(250, 400).T, values.expand(2, -1)[:1]):
            with pytest.raises(ValueError, match="1 of 100000 values are NaN or infinite"):
                check_values(laid_out)


@pytest.mark.parametrize("zero_point", [False, True])
def test_scales_near_the_largest_that_can_be_stored_are_found(zero_point):
    """Of those tried, larger ones than the one that reaches all can't be stored."""
    values = torch.tensor([6.5e4 * 3 / 2, -9e4]) if not zero_point else torch.tensor([1.9e5, 1e3])
    options = {"scale_dtype": "float16", "zero_point": zero_point}
    assert uniform.quantize(values, 2, **options).qparams.scale > 6e4
    assert uniform.quantize(values, 2, scale="mse", **options).qparams.scale.isfinite().all()


@pytest.mark.parametrize("exponent", range(1, 9))
def test_squared_error_is_less_for_every_exponent(exponent):
    """Levels of 7 exponent bits have squares beyond float32."""
    shared = {"exponent": exponent, "axis": 0}
    errors = [
        (minifloat.quantize(SAMPLE, 10, scale=fit, **shared).dequantize() - SAMPLE).square().sum()
        for fit in ("max_abs", "mse")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_squared_error_is_near_the_least_of_all_scales(bits):
    """A thousand scales tried, for each row of normal values, are at most 5 % better."""
    for row in SAMPLE.double():

        def error(scale, row=row):
            return (uniform.quantize(row, bits, scale=scale).dequantize() - row).square().sum()

        largest = uniform.quantize(row, bits).qparams.scale.item()
        best = min(error(largest * share / 300) for share in range(10, 400, 1))
        assert error("mse") <= 1.05 * best


def test_weighted_error_is_less_where_importance_is():
    importance = torch.logspace(-3, 3, 40)
    results = [
        uniform.quantize(SAMPLE, 3, axis=0, scale=scale, importance=importance).dequantize()
        for scale in ("mse", "weighted_mse")
    ]
    plain, weighted = ((r - SAMPLE).square() * importance for r in results)
    assert weighted.sum() < plain.sum()


@pytest.mark.parametrize("factor", [1e-60, 1e60])
def test_weights_matter_by_their_ratios(factor):
    importance = torch.logspace(-3, 3, 40, dtype=torch.float64)
    one, other = (
        uniform.quantize(SAMPLE, 3, scale="weighted_mse", importance=importance * f)
        for f in (1.0, factor)
    )
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("fit", ["mse", "weighted_mse"])
@pytest.mark.parametrize("magnitude", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_scales_are_found_as_others_are(fit, magnitude):
    importance = torch.logspace(-3, 3, 40)
    one, other = (
        uniform.quantize(SAMPLE.double() * m, 3, axis=0, scale=fit, importance=importance)
        for m in (1.0, magnitude)
    )
    torch.testing.assert_close(
        one.qparams.scale * magnitude, other.qparams.scale, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": "biggest"}, "scale is 'biggest': .*number.*, max_abs, mse, weighted_mse"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": None}, "scale is None"),
        ({"scale": True}, "scale is True"),
        ({"scale_dtype": "float8"}, "scale_dtype is 'float8': float32, float16, power_of_two"),
        ({"scale": "weighted_mse"}, "importance"),
    ],
)
def test_an_option_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        uniform.quantize(SAMPLE, 4, **wrong)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(3), r"importance has shape \[3\]: \[16, 40\]"),
        (-torch.ones(40), "40 values of importance are negative"),
        (torch.full((16, 1), torch.nan), "16 values of importance are negative, NaN"),
    ],
)
def test_importance_that_cannot_weigh_is_refused(importance, message):
    with pytest.raises(ValueError, match=message):
        uniform.quantize(SAMPLE, 4, scale="weighted_mse", importance=importance)


def test_importance_may_be_plain_values():
    """As JSON has them."""
    one, other = (
        uniform.quantize(SAMPLE, 3, axis=1, scale="weighted_mse", importance=importance)
        for importance in (torch.arange(1.0, 41), list(range(1, 41)))
    )
    assert torch.equal(one.dequantize(), other.dequantize())
