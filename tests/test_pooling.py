"""Pooling before ReLU changes no value, no gradient and no name, and is undone."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from quantifind.runtime.pooling import POOLS, pool_first, pooling_first


@st.composite
def pools(draw):
    """A max pooling, and inputs for it with many zeros and ties."""
    kind, kernel = draw(st.sampled_from(POOLS)), draw(st.integers(1, 4))
    axes = POOLS.index(kind) + 1
    strides = st.integers(1, 4)
    pool = kind(
        kernel,
        stride=draw(strides | st.tuples(*[strides] * axes)),
        padding=draw(st.integers(0, kernel // 2)),
        dilation=draw(st.integers(1, 2)),
        ceil_mode=draw(st.booleans()),
    )
    shape = [draw(st.integers(1, 3)) for _ in range(2)] + [draw(st.integers(1, 7))] * axes
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    inputs = torch.randint(-2, 3, shape, generator=generator) / 2
    if draw(st.booleans()):
        inputs = inputs + torch.randn(shape, generator=generator).relu()
    return pool, inputs


def outputs_and_gradients(net, inputs):
    inputs = inputs.clone().requires_grad_()
    outputs = net(inputs * 1)
    weights = torch.arange(1.0, outputs.numel() + 1).view_as(outputs)
    parameters = [inputs, *net.parameters()]
    return [outputs, *torch.autograd.grad((outputs * weights).sum(), parameters)]


@given(pools(), st.booleans())
def test_values_and_gradients_are_the_same_bit_for_bit(given, inplace):
    pool, inputs = given
    net = nn.Sequential(nn.ReLU(inplace), pool)
    try:
        wanted = outputs_and_gradients(net, inputs)
    except RuntimeError:  # a window larger than the input
        assume(False)
    swaps = not (pool.padding and pool.dilation > 1)
    assert pool_first(net) == [(net, 0)] * swaps
    assert net[not swaps] is pool
    assert all(map(torch.equal, outputs_and_gradients(net, inputs), wanted))


def network():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    second = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1))
    second += nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 4, 3))
    return nn.Sequential(first, second, nn.ReLU()).eval()


def test_every_pair_of_a_network_is_swapped_and_restored():
    net, inputs = network(), torch.randn(5, 2, 12, 12)
    layers = [[*net[0]], [*net[1]]]
    wanted, state = outputs_and_gradients(net, inputs), copy.deepcopy(net.state_dict())
    with pooling_first(net):
        # the second ReLU comes after both poolings that follow it
        kinds = [type(module).__name__ for module in net[1]]
        assert kinds == ["Conv2d", "MaxPool2d", "MaxPool2d", "ReLU", "Flatten", "Linear"]
        assert type(net[0][2]) is nn.MaxPool2d
        assert list(net.state_dict()) == list(state)
        assert all(map(torch.equal, outputs_and_gradients(net, inputs), wanted))
    assert [[*net[0]], [*net[1]]] == layers
    assert list(net.state_dict()) == list(state)
    assert all(map(torch.equal, net.state_dict().values(), state.values()))


def test_an_exception_restores_too():
    net = network()
    layers = [*net[0], *net[1]]

    def fail():
        with pooling_first(net):
            assert [*net[0], *net[1]] != layers
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [*net[0], *net[1]] == layers


class OwnReLU(nn.ReLU):
    pass


LEFT = {
    "indices": (nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
    "mean": (nn.ReLU(), nn.AvgPool2d(2)),
    "adaptive": (nn.ReLU(), nn.AdaptiveMaxPool2d(2)),
    "another activation": (nn.GELU(), nn.MaxPool2d(2)),
    "a class of its own": (OwnReLU(), nn.MaxPool2d(2)),
    "pooled already": (nn.MaxPool2d(2), nn.ReLU()),
    "between them": (nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("kind", LEFT)
def test_others_are_left_alone(kind):
    net = nn.Sequential(*LEFT[kind])
    assert pool_first(net) == []
    assert (*net,) == LEFT[kind]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_what_has_hooks_is_left_alone(which, kind):
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    handle = getattr(net[which], f"register_{kind}")(lambda *_: None)
    assert pool_first(net) == []
    handle.remove()
    assert pool_first(net) == [(net, 0)]


def test_a_forward_of_its_own_is_left_alone():
    """Only what a plain Sequential runs in order follows each other for certain."""

    class Own(nn.Sequential):
        def forward(self, x):
            return x + self[0](x)

    assert pool_first(Own(nn.ReLU(), nn.MaxPool2d(2))) == []


def test_what_may_be_gone_through_in_part_stays():
    """Features are taken from the middle of a body, or its input is used once more."""

    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))

        def forward(self, x):
            return x, self.body[0](x), self.body(x)

    assert pool_first(Tapped()) == []
    assert pool_first(nn.Sequential(Tapped())) == []


def test_a_window_of_padding_alone_stays():
    net, inputs = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2, dilation=3, padding=1)), torch.ones(1, 2)
    assert net(inputs).isinf().any()
    assert pool_first(net) == []
