"""However a weight is used, what its elements meet is known: the network run with a change of the
weight is the oracle, and its Jacobian."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from quantifind.network.calibration import second_moments
from quantifind.network.moments import layer_moments
from quantifind.network.trace import gptq_weights, output_axes, trace
from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.matrices import Matrices, compatible


class Calls(nn.Module):
    """A function of an input and a weight as a network."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.function(x, self.weight)


def layer(kind, *args, **options):
    return lambda: kind(*args, bias=False, **options)


def calls(function, *shape):
    return lambda: Calls(function, *shape)


SQUARE = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
TABLE = torch.tensor([[0, 3, 1], [2, 0, 4]])
# what makes a network with a weight, the shape of its inputs, the axis of its outputs
USES = {
    "linear": (layer(nn.Linear, 4, 3), (2, 5, 4), 0),
    "one output": (layer(nn.Linear, 4, 1), (5, 4), 0),
    "one input": (layer(nn.Linear, 1, 4), (5, 1), 0),
    "conv1d": (layer(nn.Conv1d, 4, 6, 3, groups=2, dilation=2), (2, 4, 9), 0),
    "conv2d": (layer(nn.Conv2d, 2, 3, (3, 1), stride=2, padding="valid"), (2, 2, 5, 6), 0),
    "unbatched": (layer(nn.Conv2d, 2, 3, 2), (2, 5, 6), 0),
    "circular": (layer(nn.Conv2d, 2, 4, 3, padding=1, padding_mode="circular"), (2, 2, 4, 5), 0),
    "conv3d": (layer(nn.Conv3d, 2, 4, 2, padding=1), (2, 2, 3, 2, 3), 0),
    "channels last": (
        lambda: nn.Conv2d(3, 4, (2, 3), bias=False).to(memory_format=torch.channels_last),
        *((2, 3, 4, 5), 0),
    ),
    "transposed1d": (layer(nn.ConvTranspose1d, 4, 3, 3, stride=2, padding=1), (2, 4, 5), 1),
    "transposed2d": (
        layer(nn.ConvTranspose2d, 2, 3, (3, 2), stride=(2, 3), output_padding=(1, 2)),
        *((2, 2, 3, 4), 1),
    ),
    "transposed3d": (layer(nn.ConvTranspose3d, 2, 3, 2, dilation=2), (2, 2, 2, 3, 2), 1),
    "cropped": (layer(nn.ConvTranspose1d, 2, 3, 2, padding=3, stride=2), (2, 2, 7), 1),
    "transposed groups": (layer(nn.ConvTranspose1d, 4, 6, 3, groups=2), (2, 4, 5), 1),
    "transposed depthwise": (layer(nn.ConvTranspose1d, 4, 4, 3, groups=4), (2, 4, 5), 0),
    "unbatched transposed": (layer(nn.ConvTranspose1d, 4, 3, 3), (4, 5), 1),
    "x @ w": (calls(lambda x, w: x @ w, 4, 3), (2, 5, 4), 1),
    "w @ x": (calls(lambda x, w: w @ x, 3, 4), (2, 4, 5), 0),
    "vector @ w": (calls(lambda x, w: x @ w, 4, 3), (4,), 1),
    "w @ vector": (calls(lambda x, w: torch.mv(w, x), 3, 4), (4,), 0),
    "addmm": (calls(lambda x, w: torch.addmm(SQUARE[0], x, w), 4, 4), (5, 4), 1),
    "addmv": (calls(lambda x, w: torch.addmv(SQUARE[0], w, x), 4, 4), (4,), 0),
    "addbmm": (calls(lambda x, w: torch.addbmm(SQUARE, x, w), 2, 3, 4), (2, 4, 3), 2),
    "baddbmm": (calls(lambda x, w: torch.baddbmm(SQUARE, x, w), 2, 3, 4), (2, 4, 3), 2),
    "linear of w.t()": (calls(lambda x, w: F.linear(x, w.t()), 4, 3), (5, 4), 1),
    "x @ w.t()": (calls(lambda x, w: x @ w.t(), 3, 4), (5, 4), 0),
    "inner": (calls(lambda x, w: torch.inner(x, w), 3, 4), (2, 5, 4), 0),
    "tensordot": (calls(lambda x, w: torch.tensordot(x, w, 2), 4, 3, 5), (2, 4, 3), 2),
    "tensordot of axes": (
        calls(lambda x, w: torch.tensordot(x, w, ([0, 2], [2, 0])), 3, 5, 4),
        *((4, 2, 3), 1),
    ),
    "einsum": (calls(lambda x, w: torch.einsum("bsi, io -> bos", x, w), 4, 3), (2, 5, 4), 1),
    "einsum, the weight first": (
        calls(lambda x, w: torch.einsum("hdi,b...i->b...hd", w, x), 2, 3, 4),
        *((2, 5, 4), 1),
    ),
    # "az": the weight's axis comes first in the result
    "implicit einsum": (calls(lambda x, w: torch.einsum("zi,ia", x, w), 4, 3), (5, 4), 1),
    "stacked experts": (calls(lambda x, w: torch.bmm(x, w), 2, 4, 3), (2, 5, 4), 2),
    "stacked, one input": (calls(lambda x, w: x @ w, 2, 4, 3), (5, 4), 2),
    "stacked, one of them": (calls(lambda x, w: x @ w, 1, 4, 3), (2, 5, 4), 2),
    "repeated": (calls(lambda x, w: torch.bmm(x, w.expand(2, -1, -1)), 4, 3), (2, 5, 4), 1),
    "a view": (calls(lambda x, w: F.linear(x, w.view(3, 4)), 3, 4, 1, 1), (5, 4), 0),
    "some columns": (calls(lambda x, w: x @ w[:, 1:3], 4, 5), (5, 4), 1),
    "some rows": (calls(lambda x, w: F.linear(x, w[1:3]), 5, 4), (5, 4), 0),
    "every other": (calls(lambda x, w: F.linear(x, w[::2]), 6, 4), (5, 4), 0),
    "conv of a transpose": (
        calls(lambda x, w: F.conv1d(x, w.transpose(0, 1)), 4, 3, 2),
        *((2, 4, 6), 1),
    ),
}
BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "weighted": {"mode": "sum", "per_sample_weights": torch.rand(2, 3).double()},
    "padded": {"mode": "mean", "padding_idx": 3},
}
for mode, options in BAGS.items():
    function = lambda x, w, options=options: F.embedding_bag(x, w, **options)  # noqa: E731
    USES[f"bags, {mode}"] = (calls(function, 6, 3), TABLE, 0)
USES["bags by offsets"] = (
    calls(lambda x, w: F.embedding_bag(x.flatten(), w, torch.tensor([0, 2, 2])), 6, 3),
    *(TABLE, 0),
)
every_use = pytest.mark.parametrize("name", USES)


def made(name):
    torch.manual_seed(0)
    make, shape, axis = USES[name]
    inputs = shape if isinstance(shape, torch.Tensor) else torch.randn(shape).double()
    return make().double().eval(), inputs, axis


def moments_of(net, batches):
    ((_, found),) = layer_moments(net, ["weight"], batches, trace(net, batches))
    return found


@every_use
def test_second_moments_are_the_squares_of_the_jacobian(name):
    net, inputs, _ = made(name)
    weight = net.weight.detach()
    slopes = jacobian(lambda w: functional_call(net, {"weight": w}, (inputs,)), weight)
    wanted = slopes.flatten(0, -1 - weight.dim()).square().sum(0)
    if "bags" in name:
        wanted = wanted.mean(1, keepdim=True)
    found = second_moments(net, [(inputs,)])["weight"]
    torch.testing.assert_close(found, wanted / wanted.mean())


@every_use
def test_moments_tell_what_a_change_of_the_weight_does(name):
    net, inputs, _ = made(name)
    if "bags" in name:
        return
    batches = [(inputs,), (-2 * inputs,)]
    torch.manual_seed(1)
    change = torch.randn_like(net.weight)
    changed = functional_call(net, {"weight": net.weight + change}, (inputs,)) - net(inputs)
    wanted, found = 5 * changed.square().sum(), 0.0
    for matrix, moments in moments_of(net, batches).items():
        rows = matrix.of(change.detach())[0]
        found += ((rows @ moments.inputs) * rows).sum()
        weights = matrix.of(net.weight.detach())[0]
        torch.testing.assert_close(moments.outputs, weights @ moments.inputs)
    torch.testing.assert_close(found, wanted.detach())


@every_use
def test_the_axis_is_that_of_the_outputs(name):
    net, inputs, axis = made(name)
    assert output_axes(trace(net, [(inputs,)])) == {"weight": axis}


@every_use
@pytest.mark.parametrize("scale", ["max_abs", "output_mse"])
def test_compensated_weights_lose_less_than_rounded_ones(name, scale):
    """By running the network with what rounding has changed."""
    net, _, axis = made(name)
    if "bags" in name:
        return
    inputs = torch.randn(64, *USES[name][1]).double().cumsum(-1)
    choice = {"scheme": "uniform", "bits": 2, "axis": axis}
    error = {}
    for rounding in ("nearest", "gptq"):
        own = {"scale": scale} if rounding == "gptq" else {}
        strategy = Strategy({"weight": choice | {"rounding": rounding} | own})
        rounded = quantize(net, strategy, [(x,) for x in inputs]).tensors["weight"].dequantize()
        outputs = [functional_call(net, {"weight": rounded}, (x,)) - net(x) for x in inputs]
        error[rounding] = sum(o.square().sum().item() for o in outputs)
    assert error["gptq"] <= error["nearest"] * (1 + 1e-6) + 1e-20


@every_use
def test_macs_are_what_the_weight_has_times_how_often_it_is_met(name):
    net, inputs, _ = made(name)
    if "bags" in name:
        assert [p.macs for p in trace(net, [(inputs,)])] == [0]
        return
    (product,) = trace(net, [(inputs,)])
    ones = torch.ones_like(inputs)
    slopes = jacobian(lambda w: functional_call(net, {"weight": w}, (ones,)), net.weight.detach())
    count = (slopes != 0).sum().item() / len(inputs)
    if "transposed" not in name and name != "cropped":
        assert product.positions * math.prod(product.matrices.shape) == product.macs * len(inputs)
    padded = "conv" in name or "transposed" in name or name in ("circular", "cropped")
    assert product.macs >= count if padded else product.macs == count


@pytest.mark.parametrize(
    ("use", "able"),
    [
        (lambda x, w: x @ w @ w.t(), False),
        (lambda x, w: x @ w[:, :2] @ w[:2], False),
        (lambda x, w: F.linear(x @ w.t(), w.t()), False),
        (lambda x, w: F.linear(x, w) + x @ w.t(), True),
        (lambda x, w: torch.cat([x @ w[:, :2], x @ w[:, 2:]], 1), True),
        (lambda x, w: torch.einsum("bi,ii->b", x, w), False),
        (lambda x, w: torch.addmm(x, x, w, alpha=2), False),
    ],
)
def test_a_weight_of_several_orientations_is_not_compensated(use, able):
    torch.manual_seed(0)
    net = Calls(use, 4, 4)
    facts = trace(net, [(torch.randn(3, 4),)])
    assert gptq_weights(facts) == ({"weight"} if able else set())
    strategy = Strategy({"weight": {"scheme": "uniform", "bits": 3, "rounding": "gptq"}})
    if not able:
        with pytest.raises(ValueError, match=r"weight: rounding 'gptq': .* round it to 'nearest'"):
            quantize(net, strategy, [(torch.randn(3, 4),)])


def test_a_table_looked_up_and_a_head_by_its_transpose_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)

        def forward(self, codes):
            return self.table(codes).cumsum(1) @ self.table.weight.t()

    torch.manual_seed(0)
    net, codes = Tied(), torch.randint(6, (20, 5))
    facts = trace(net, [(codes,)])
    assert (gptq_weights(facts), output_axes(facts)) == ({"table.weight"}, {"table.weight": 0})
    ((_, moments),) = layer_moments(net, ["table.weight"], [(codes,)], facts)
    (found,) = moments.values()
    assert found.counts.tolist() == codes.flatten().bincount(minlength=6).tolist()
    x = net.table(codes).detach().cumsum(1).flatten(0, 1).double()
    torch.testing.assert_close(found.inputs, x.T @ x, rtol=1e-5, atol=1e-4)


def test_matrices_that_differ_are_compatible_where_nothing_is_common():
    rows = [Matrices.rows((6, 4), first, last) for first, last in ((0, 2), (2, 6), (0, 6), (1, 3))]
    assert compatible([rows[0], rows[1], rows[0]], 24)
    assert compatible([rows[2]] * 2, 24)
    assert not compatible([rows[0], rows[2]], 24)
    assert not compatible([rows[0], rows[3]], 24)
