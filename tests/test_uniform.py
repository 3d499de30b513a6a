"""The uniform grid beside its definition, torch's own fake quantization, and onnx's."""

import hypothesis.strategies as st
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from onnx import TensorProto, helper
from test_schemes import BITS, DTYPES, SCALE_DTYPES, sharing, tensors

from quantifind.schemes.uniform import quantize
from quantifind.tensor.quantized import to_rows

LEVELS = st.sampled_from([2, 3, 4, 5, 6, 100, 255, 2**20 + 1, 2**32 - 1, 2**32])


def unit_of(result):
    """One in the last place; 0 beyond the largest finite value."""
    unit = torch.nextafter(result.abs(), torch.full_like(result, torch.inf)).double()
    return (unit - result.abs().double()).nan_to_num(posinf=0)


@given(data=st.data(), zero_point=st.booleans())
def test_error_is_at_most_half_a_step(data, zero_point):
    """Half a step of the scale that is stored, and one unit in the last place of the dtype."""
    values = data.draw(tensors())
    levels = data.draw(LEVELS | BITS.map(lambda bits: 2**bits))
    large = values.numel() and values.abs().max() > 1e4
    dtypes = [name for name in SCALE_DTYPES if name != "float16" or not large]
    quantized = quantize(
        values,
        levels=levels,
        zero_point=zero_point,
        scale_dtype=data.draw(st.sampled_from(dtypes)),
        **data.draw(sharing(values)),
    )
    result = quantized.dequantize()
    error = (result.double() - values.double()).abs()
    room = quantized.qparams.scale.double() / 2 * (1 + 1e-9)
    shared = quantized.qparams.axis, quantized.qparams.group
    assert (to_rows(error - unit_of(result), *shared) <= room).all()


@given(values=tensors(dtypes=(torch.float32,)), levels=LEVELS)
def test_scale_is_the_definition(values, levels):
    """The smallest one that is stored and whose levels reach the largest value."""
    if values.numel() and values.min() != values.max():
        scale = quantize(values, levels=levels).qparams.scale.double()
        defined = 2 * values.double().abs().max() / (levels - 1)
        unit = torch.nextafter(defined.float(), torch.tensor(torch.inf)).double() - defined
        assert defined * (1 - 1e-15) <= scale <= defined + 2 * unit.clamp(min=2**-149)


@pytest.mark.parametrize("levels", [3, 5, 100, 2**20 + 1, 2**32])
def test_levels_need_not_be_a_power_of_two(levels):
    values = torch.linspace(-1, 1, 999, dtype=torch.float64)
    for zero_point in (False, True):
        quantized = quantize(values, levels=levels, zero_point=zero_point)
        codes = quantized.codes.long()
        lowest = -(levels // 2)
        # of an even number the ends are ties
        assert lowest <= codes.min() <= lowest + 1
        assert lowest + levels - 2 <= codes.max() <= lowest + levels - 1
        assert min(levels, 999) - 1 <= len(codes.unique()) <= levels


def test_ternary_levels_are_minus_one_zero_and_one():
    quantized = quantize(torch.tensor([-2.0, -1.1, -0.9, 0.0, 0.9, 1.1]), levels=3)
    assert quantized.codes.tolist() == [-1, -1, 0, 0, 0, 1]
    assert quantized.qparams.scale == 2
    assert quantized.stored_bits == 2 * 8 + 32  # five codes in a byte


def test_half_integer_levels():
    """2 bits: ±½, ±1½ times the scale; 1 bit has them by default, for 0 and below each its own."""
    values = torch.tensor([-3.0, -1.0, -0.1, 0.1, 1.9, 3.0])
    quantized = quantize(values, 2, half_integer=True)
    assert quantized.dequantize().tolist() == [-3, -1, -1, 1, 1, 3]
    assert quantize(values, 1).dequantize().tolist() == [-3, -3, -3, 3, 3, 3]
    whole = quantize(values, 1, half_integer=False, scale=3.0)
    assert whole.dequantize().tolist() == [-3, 0, 0, 0, 0, 0]


@given(values=tensors(), bits=st.integers(1, 32))
def test_half_integer_levels_are_half_a_step_near(values, bits):
    quantized = quantize(values, bits, half_integer=True)
    result = quantized.dequantize()
    error = (result.double() - values.double()).abs()
    assert (error <= quantized.qparams.scale.double() / 2 * (1 + 1e-9) + unit_of(result)).all()
    half_a_step = quantized.qparams.scale.double() / 2
    smallest = torch.nextafter(torch.zeros(1, dtype=values.dtype), values.new_ones(1)).double()
    assert (result != 0).all() or half_a_step <= smallest / 2


@pytest.mark.parametrize("bits", range(2, 9))
@given(values=tensors(dtypes=(torch.float32,)))
def test_equals_torch_fake_quantize(bits, values):
    """Independent oracle; values on a rounding tie are skipped, torch may round them otherwise."""
    quantized = quantize(values, bits)
    scale = quantized.qparams.scale
    if not 1e-30 < scale < 1e30:
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    oracle = torch.fake_quantize_per_tensor_affine(values, float(scale), 0, low, high)
    no_tie = ~near_a_tie(values.double() / scale.double(), 1e-4)
    expected, result = oracle[no_tie], quantized.dequantize()[no_tie]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def near_a_tie(steps, distance):
    return ((steps - steps.floor()) - 0.5).abs() < distance


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_torch_fake_quantize_of_channels(bits, zero_point, axis):
    values = torch.randn(4, 5, 60, generator=torch.Generator().manual_seed(bits)) + 0.3
    quantized = quantize(values, bits, axis=axis, zero_point=zero_point)
    scale = quantized.qparams.scale.flatten()
    zero = torch.zeros(len(scale)) if not zero_point else quantized.qparams.zero_point.flatten()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    oracle = torch.fake_quantize_per_channel_affine(
        values, scale, zero.to(torch.int32), axis, low, high
    )
    shape = [-1 if index == axis else 1 for index in range(3)]
    no_tie = ~near_a_tie(values.double() / scale.reshape(shape).double(), 1e-4)
    assert no_tie.float().mean() >= 0.95  # at 2 bits the largest value of a row is a tie
    torch.testing.assert_close(quantized.dequantize()[no_tie], oracle[no_tie], rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [None, 0])
def test_zero_points_equal_onnx(axis):
    """Of its reference QuantizeLinear, int8, with our scales and zero points; ties skipped."""
    values = torch.randn(4, 250, generator=torch.Generator().manual_seed(1)).exp() - 0.5
    quantized = quantize(values, 8, axis=axis, zero_point=True)
    size = [] if axis is None else [4]
    scale, zero = quantized.qparams.scale.reshape(size), quantized.qparams.zero_point.reshape(size)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 250]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, size),
        helper.make_tensor_value_info("zero", TensorProto.INT8, size),
    ]
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], axis=axis or 0)
    codes = helper.make_tensor_value_info("codes", TensorProto.INT8, [4, 250])
    graph = helper.make_graph([node], "quantize", inputs, [codes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    feed = {"x": values.numpy(), "scale": scale.numpy(), "zero": zero.numpy()}
    (oracle,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    no_tie = ~near_a_tie(values.double() / quantized.qparams.scale.double(), 1e-4)
    assert torch.equal(quantized.codes[no_tie].to(torch.int8), torch.from_numpy(oracle)[no_tie])


@given(data=st.data(), bits=st.integers(1, 32))
def test_zero_is_a_level_of_a_zero_point(data, bits):
    """Padding stays what it is, and values of one sign use all the codes."""
    values = data.draw(tensors(least=1e-3))
    quantized = quantize(values, bits, zero_point=True)
    assert (quantized.dequantize()[values == 0] == 0).all()
    positive = quantize(values.abs(), bits, zero_point=True)
    if values.any() and values.numel():
        assert positive.qparams.zero_point.item() == -(2 ** (bits - 1))
        used = positive.codes.double().max() + 2 ** (bits - 1)
        assert used >= (2**bits - 1) * (1 - 1e-6) - 0.5  # the scale is rounded up to float32


@given(data=st.data(), bits=st.integers(1, 16))
def test_zero_point_of_a_given_scale(data, bits):
    """The levels begin at the lowest value, as far as they reach, and quantizing again is exact."""
    values = data.draw(tensors(dtypes=(torch.float64,), least=1e-3, most=1e4))
    once = quantize(values, bits, scale=2**-6, zero_point=True)
    again = quantize(once.dequantize(), bits, scale=2**-6, zero_point=True)
    assert torch.equal(once.dequantize(), again.dequantize())


@given(values=tensors(), bits=st.integers(2, 32))
def test_sign_symmetric_but_for_ties_and_the_lowest_level(values, bits):
    one, other = quantize(values, bits), quantize(-values, bits)
    steps = values.double() / one.qparams.scale.double().clamp(min=2**-1074)
    tie = near_a_tie(steps, 1e-6)
    assert torch.equal(one.codes[~tie], -other.codes[~tie])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 8, 24, 32])
@pytest.mark.parametrize("scale", ["max_abs", "mse"])
def test_extreme_values_stay_finite(dtype, bits, scale):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.min, -limits.tiny, 0, limits.tiny, limits.max], dtype=dtype)
    assert quantize(values, bits, scale=scale).dequantize().isfinite().all()


def test_a_given_scale_clips():
    quantized = quantize(torch.tensor([-3.0, -0.5, 0.0, 0.4, 3.0]), 4, scale=2 * 1.5 / 15)
    assert quantized.qparams.scale.item() == pytest.approx(2 * 1.5 / 15)
    assert quantized.codes.tolist() == [-8, -2, 0, 2, 7]


def test_stored_bits_count_whole_bytes_scales_and_zero_points():
    assert quantize(torch.arange(10.0), 3).stored_bits == 8 * 4 + 32
    assert quantize(torch.arange(10.0).double(), 3).stored_bits == 8 * 4 + 64
    values = torch.arange(10.0).reshape(2, 5)
    for scale_dtype, width in (("float32", 32), ("float16", 16), ("power_of_two", 8)):
        for bits, zero_width in ((3, 8), (12, 16), (32, 32)):
            shared = {"axis": 0, "group": 2, "scale_dtype": scale_dtype}
            size = 8 * -(-10 * bits // 8) + 6 * width
            assert quantize(values, bits, **shared).stored_bits == size
            with_zero = quantize(values, bits, zero_point=True, **shared)
            assert with_zero.stored_bits == size + 6 * zero_width


@pytest.mark.parametrize("levels", [1, 0, 2**32 + 1, 4.0, True])
def test_a_number_of_levels_that_cannot_be_is_refused(levels):
    with pytest.raises(ValueError, match=r"levels is .* 2 to 4294967296$"):
        quantize(torch.ones(3), levels=levels)


@pytest.mark.parametrize("both", [{}, {"bits": 2, "levels": 4}])
def test_either_bits_or_levels(both):
    with pytest.raises(ValueError, match="either bits or levels"):
        quantize(torch.ones(3), **both)


def test_half_integer_levels_are_even_in_number_and_have_no_zero_point():
    with pytest.raises(ValueError, match="not 3 levels"):
        quantize(torch.ones(3), levels=3, half_integer=True)
    with pytest.raises(ValueError, match="zero_point=True"):
        quantize(torch.ones(3), 2, half_integer=True, zero_point=True)
