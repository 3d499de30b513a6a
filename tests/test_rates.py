"""Rounding that weighs what codes cost: the least sum, and so fewer bytes for less error."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_gptq import GRIDS, correlated, on_grid, output_error
from torch import nn

import quantifind.tensor.gptq as gptq_module
from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.coding import encode
from quantifind.tensor.compensation import gptq
from quantifind.tensor.gptq import Moments, gptq_layer
from quantifind.tensor.matrices import Matrices
from quantifind.tensor.output_error import OutputError
from quantifind.tensor.qparams import Grid
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.rates import Prices
from quantifind.tensor.row_params import RowParams

RATE = 0.06


@settings(max_examples=50)
@given(data=st.data())
def test_bounds_give_the_least_error_and_cost(data):
    """Beside all codes tried, of evenly spaced levels and of a table."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    spread = data.draw(st.floats(0.1, 8))
    codes = (torch.randn(2, 30, 7, generator=generator) * spread).round().long().clamp(-20, 20)
    grid = Grid(41)
    if data.draw(st.booleans()):
        table = torch.randn(41, dtype=torch.float64, generator=generator).sort().values
        codes, grid = codes + 20, Grid(41, table=table)
    prices = Prices.of(codes)
    weight = torch.rand(2, 7, dtype=torch.float64, generator=generator)
    values = torch.randn(2, 7, 200, dtype=torch.float64, generator=generator) * 2 * spread
    between = prices.bounds(grid, weight)
    assert (between.diff(dim=2) >= 0).all()
    found = torch.searchsorted(between, values)  # (groups, inputs, values)
    levels = grid.values(prices.lowest + torch.arange(prices.bits.shape[1]))
    cost = (values.unsqueeze(3) - levels).square()
    cost += (weight.unsqueeze(2) * prices.bits[prices.class_of]).unsqueeze(2)
    least = cost.min(3).values
    assert torch.allclose(cost.gather(3, found.unsqueeze(3)).squeeze(3), least, atol=1e-9)


def size_and_error(x, weights, choice, rate):
    start = on_grid(weights, choice)
    codes, _ = gptq(weights, OutputError.of(x.T @ x), RowParams.of(start), start.codes, rate=rate)
    rounded = QuantizedTensor(codes.int(), start.qparams, weights.dtype)
    lost = output_error(x, weights, rounded.dequantize()).sum().item()
    return 8 * len(encode(codes.long() - start.qparams.grid.lowest_code, 999)), lost


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0, 4.0])
def test_fewer_bytes_and_less_error(step):
    """Than any step without weighing them."""
    x = correlated(400, 64) * torch.logspace(-1.5, 0.5, 64, dtype=torch.float64)
    weights = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).double()

    def found(step, rate=0.0):
        return size_and_error(x, weights, {"scheme": "uniform", "levels": 999, "scale": step}, rate)

    size, lost = found(step, RATE)
    for share in torch.logspace(-0.3, 0.6, 15).tolist():
        other_size, other_lost = found(step * share)
        assert other_size > size or other_lost > lost


ABLE = [g for g in GRIDS if g["scheme"] != "codebook" or "centres" in g]


@pytest.mark.parametrize("choice", ABLE, ids=str)
def test_every_grid_with_scales_takes_fewer_bytes(choice):
    x, weights = correlated(60, 30), torch.randn(40, 30).double()
    x[:, 3] = 0
    error, start = OutputError.of(x.T @ x), on_grid(weights, choice)
    few, less = (gptq(weights, error, RowParams.of(start), start.codes, rate=r)[0] for r in (0, 1))
    grid = start.qparams.grid
    assert grid.lowest_code <= less.min() <= less.max() <= grid.highest_code
    few, less = (len(encode(codes.long() - grid.lowest_code, grid.levels)) for codes in (few, less))
    assert less <= few


def test_what_is_hardly_ever_met_stays_near(monkeypatch):
    """An input of one example: else its weights make up for all that others lose there."""
    torch.manual_seed(0)
    x, weights = correlated(200, 40), torch.randn(60, 40).double()
    x[:, 7] = 0
    x[3, 7] = 0.05
    moments = Moments(x.T @ x, weights @ x.T @ x, len(x))
    choice = Choice("uniform", levels=99, rounding="gptq", rate=RATE, options={"scale": 1.0})
    lost = []
    for steady in (gptq_module.STEADY, 0.0):
        monkeypatch.setattr(gptq_module, "STEADY", steady)
        (rounded,) = gptq_layer(weights, {Matrices.rows(weights.shape): moments}, [choice])
        lost.append((rounded.dequantize() - weights)[:, 7].square().mean())
    assert lost[0] < 0.5 < lost[1]


def test_dead_inputs_stay_zero():
    x, weights = correlated(60, 30), torch.randn(40, 30).double() + 3
    x[:, 3] = 0
    start = on_grid(weights, {"scheme": "uniform", "levels": 99, "scale": 0.5})
    codes, _ = gptq(weights, OutputError.of(x.T @ x), RowParams.of(start), start.codes, rate=RATE)
    assert not codes[:, 3].any()
    assert codes.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1.0}, "rate is -1.0: a number from 0 up"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": 0.1, "rounding": "nearest"}, "rate is 0.1: it needs rounding 'gptq'"),
        ({"rate": 0.1, "scale": "output_mse", "axis": 0}, "not 'output_mse'"),
        ({"storage": "zipped"}, "storage is 'zipped': packed, coded are allowed"),
    ],
)
def test_what_can_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Choice.of({"scheme": "uniform", "bits": 3, "rounding": "gptq"} | options)


def test_tables_without_a_scale_are_refused_by_name():
    net, x = nn.Linear(6, 4), torch.randn(20, 6)
    choice = {"scheme": "codebook", "bits": 2, "rounding": "gptq", "rate": 0.1}
    with pytest.raises(ValueError, match=r"^weight: rate is 0.1: codebook has no scale"):
        quantize(net, Strategy({"weight": choice, "bias": None}), [(x,)])
