"""Weights that are laid out once give what torch's own operations give, and only where they may."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantifind.runtime import onednn
from quantifind.runtime.onednn import laying_out_once

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN"
)


@pytest.fixture(autouse=True, scope="module")
def small_ones_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "WORTH", 0)
        yield


class Counting(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).split(".")[1]
        self.calls[name] = self.calls.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def calls(run):
    with torch.inference_mode(), Counting() as counting:
        run()
    return counting.calls


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def convolutions(draw):
    """Inputs, weight, bias and options."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    padding = draw(st.integers(0, 2) | st.sampled_from(["same", "valid"]))
    # torch warns of an even kernel where the padding is the same
    kernel = draw(st.just((3, 1)) if padding == "same" else pair)
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stride = 1 if padding == "same" else draw(st.integers(1, 3) | pair)
    options = (stride, padding, draw(st.integers(1, 2) | pair), groups)
    layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])
    images, weight = (
        numbers(*shape).contiguous(memory_format=draw(layouts))
        for shape in (
            (draw(st.integers(0, 4)), inputs, *size),
            (outputs, inputs // groups, *kernel),
        )
    )
    return images, weight, draw(biases(outputs)), options


def biases(outputs):
    """None, or one whose numbers may not lie side by side."""
    packed = numbers(2 * outputs, seed=2)
    return st.sampled_from([None, packed[:outputs], packed[::2], packed[:1].expand(outputs)])


@given(convolutions(), st.booleans())
def test_convolutions_are_those_of_torch(given, batched):
    images, weight, bias, options = given
    images = images if batched or not len(images) else images[0]
    with torch.inference_mode():
        try:
            wanted = F.conv2d(images, weight, bias, *options)
        except RuntimeError:  # a kernel larger than the input
            assume(False)
        found = onednn.conv2d(images, weight, bias, *options)
    for layout in (torch.contiguous_format, torch.channels_last):
        if wanted.dim() == 4 and wanted.is_contiguous(memory_format=layout):
            assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 40), st.integers(1, 9), st.data())
def test_linear_maps_are_those_of_torch(shape, inputs, outputs, data):
    values, weight = numbers(*shape, inputs), numbers(outputs, inputs, seed=1)
    bias = data.draw(biases(outputs))
    with torch.inference_mode():
        found, wanted = onednn.linear(values, weight, bias), F.linear(values, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding_mode="circular")]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_each_value_of_a_weight_is_laid_out_once():
    net = network()
    images = numbers(6, 2, 4, 4).contiguous(memory_format=torch.channels_last)

    def several():
        with laying_out_once(net):
            for part in images.split(2):
                net(part)

    found = calls(several)
    # two linear maps and a convolution, the circular one aside, three times
    assert (found["_reorder_linear_weight"], found["_linear_pointwise"]) == (2, 6)
    assert (found["_reorder_convolution_weight"], found["_convolution_pointwise"]) == (1, 3)
    assert "_reorder_linear_weight" not in calls(several)
    for edit in (
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", -weight.data),
    ):
        with torch.no_grad():
            edit(net[4].weight)
        with torch.inference_mode():
            wanted = net(images)
            with laying_out_once(net):
                torch.testing.assert_close(net(images), wanted)


def test_afterwards_a_model_is_as_it_was():
    net = network()
    net[0].forward = own = nn.Conv2d(2, 4, 3, padding=1).forward

    def replaced():
        return [i for i, module in enumerate(net) if "forward" in vars(module)]

    def fails():
        assert replaced() == [0, 4, 6]
        assert net[0].forward is own
        raise KeyError

    with pytest.raises(KeyError), laying_out_once(net):
        fails()
    assert replaced() == [0]


def test_a_kind_of_ones_own_stays():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(3, 4))
    with torch.inference_mode(), laying_out_once(net):
        assert torch.equal(net(torch.ones(2, 3)), 2 * F.linear(torch.ones(2, 3), *net.parameters()))


def test_a_bias_may_be_a_part_of_something():
    net, x = nn.Linear(3, 4), numbers(5, 3)
    del net.bias
    net.register_buffer("bias", numbers(8)[::2])
    with torch.inference_mode():
        wanted = net(x)
        with laying_out_once(net):
            torch.testing.assert_close(net(x), wanted)


def test_a_weight_may_be_of_several_convolutions():
    weight, images = numbers(4, 2, 3, 3), numbers(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for groups in (1, 2, 1):
            some = images[:, : 2 * groups].contiguous(memory_format=torch.channels_last)
            found = onednn.conv2d(some, weight, padding=1, groups=groups)
            torch.testing.assert_close(found, F.conv2d(some, weight, padding=1, groups=groups))


def autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x)
    assert outputs.dtype == torch.bfloat16


def nested(net, x):
    return net(torch.nested.as_nested_tensor(list(x.split(2))))


PLAIN = {
    "gradients": torch.enable_grad()(lambda net, x: net(x)),
    "another dtype": lambda net, x: copy.deepcopy(net).double()(x.double()),
    "one example": lambda net, x: net(x[0]),
    "sparse": lambda net, x: net(x.to_sparse_csr()),
    "nested": nested,
    "autocast": autocast,
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", PLAIN)
def test_what_it_is_not_for_is_left_to_torch(case):
    net, x = nn.Sequential(nn.Linear(6, 4)), numbers(6, 6)

    def run(call):
        with torch.inference_mode(False), torch.no_grad(), laying_out_once(net):
            call(net, x)

    assert "_linear_pointwise" in calls(lambda: run(lambda net, x: net(x)))
    assert (
        not {"_linear_pointwise", "_reorder_linear_weight"} & calls(lambda: run(PLAIN[case])).keys()
    )


@pytest.mark.parametrize("operation", [F.linear, onednn.linear])
def test_another_width_is_refused_in_the_words_of_torch(operation):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        operation(numbers(2, 7), numbers(4, 5))


def test_weights_made_in_inference_mode_are_left_to_torch():
    with torch.inference_mode():
        weight, x = numbers(4, 6), numbers(5, 6)
        assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
        weight.mul_(2)  # which has no version
        assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(onednn, "WORTH", 100)
    weight = numbers(5, 4)
    for examples, worth in ((4, False), (5, True)):
        found = calls(lambda examples=examples: onednn.linear(numbers(examples, 4), weight))
        assert ("_linear_pointwise" in found) == worth


def test_what_onednn_cannot_lay_out_is_left_to_torch(monkeypatch):
    tried = []

    def fails(*_, **__):
        tried.append(True)
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fails)
    weight, x = numbers(4, 6), numbers(5, 6)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    assert len(tried) == 1


def test_it_can_be_switched_off(monkeypatch):
    weight, x = numbers(4, 6), numbers(5, 6)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "_linear_pointwise" not in calls(lambda: onednn.linear(x, weight))
    monkeypatch.undo()
    assert "_linear_pointwise" in calls(lambda: onednn.linear(x, weight))


def test_nothing_is_kept_of_weights_that_are_gone():
    gc.collect()
    before = len(onednn._laid_out)
    weight = numbers(4, 6)
    with torch.inference_mode():
        onednn.linear(numbers(5, 6), weight)
    assert len(onednn._laid_out) == before + 1
    del weight
    gc.collect()
    assert len(onednn._laid_out) == before
