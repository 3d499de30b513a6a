"""A batch norm folded into what is before it gives the same outputs; where in doubt, it stays."""

import copy
import json

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from test_artifact import round_trip
from test_strategy import intact
from torch import nn

from quantifind.costs import model_bytes
from quantifind.mixed_precision.measurements import Measurements
from quantifind.network.foldable import foldable
from quantifind.network.folding import Folded, fold, parameter_count, prepared
from quantifind.network.modules import named_tensors, stored_bytes
from quantifind.quantize import Calibration, mean_bits, quantize, quantize_model
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PAIR = (("0", "1"),)


def settle(net, least=1e-3, seed=0):
    """Statistics and affine parameters as of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_var is not None:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(least, 2, generator=generator)
            norm.running_var[0] = least
            norm.num_batches_tracked.fill_(7)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
    return net


@st.composite
def networks(draw):
    """A product, its norm and a head, and inputs."""
    axes, groups = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 4]))
    bias, affine = draw(st.booleans()), draw(st.booleans())
    seed = draw(st.integers(0, 99))
    torch.manual_seed(seed)
    x = torch.randn(5, 4, *(6,) * axes)
    if not axes:
        product = nn.Linear(4, 8, bias=bias)
    elif draw(st.booleans()):
        product = getattr(nn, f"ConvTranspose{axes}d")(
            4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias
        )
    else:
        mode = draw(st.sampled_from(["zeros", "circular"]))
        product = getattr(nn, f"Conv{axes}d")(
            4, 8, 3, padding=2, dilation=2, groups=groups, bias=bias, padding_mode=mode
        )
    norm = NORMS[axes or 1](8, affine=affine, eps=draw(st.sampled_from([1e-5, 1e-3])))
    net = nn.Sequential(product, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    net.eval()(x)
    return settle(net, draw(st.sampled_from([0.0, 1e-6, 0.1])), seed).train(draw(st.booleans())), x


@settings(max_examples=40)
@given(networks())
def test_a_folded_network_gives_the_same(drawn):
    net, x = drawn
    assert intact(net, lambda: foldable(net, lambda model: model(x))) == PAIR
    folded = intact(net, lambda: prepared(net, PAIR))
    modes = [module.training for module in net.modules()]
    assert [module.training for module in folded.modules()] == modes
    assert isinstance(folded[1], Folded)
    with torch.no_grad():
        body, wanted = folded.eval()[:2](x), net.eval()[:2](x)
        # of each channel, since tiny variances make some large
        scale = wanted.abs().transpose(0, 1).flatten(1).amax(1).clamp(min=1e-30)
        error = (body - wanted).abs().transpose(0, 1).flatten(1).amax(1)
        # rounding to float32 of what a norm subtracts, and of what it multiplies
        assert (error <= 1e-5 * scale + 1e-5 * reach(net[1], net[0](x))).all()
        assert (folded(x) - net(x)).abs().max() <= 1e-5 * max(1, reach(net[1], net[0](x)).max())
    wanted = sum(parameter.numel() for parameter in net.parameters())
    assert parameter_count(folded) == parameter_count(net) == wanted
    assert set(stored_bytes(folded)) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert foldable(folded, lambda model: model(x)) == ()
    again = prepared(folded, PAIR)  # what is folded stays
    assert torch.equal(again.eval()(x), folded(x))


def reach(norm, values):
    """By channel, how large what it subtracts from is, as it is multiplied."""
    steps = (norm.running_var + norm.eps).rsqrt() * (norm.weight.abs() if norm.affine else 1)
    largest = values.abs().transpose(0, 1).flatten(1).amax(1)
    return (largest + norm.running_mean.abs()) * steps


class Does(nn.Module):
    """A convolution, a norm and what else is given; the pass is ``compute``."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias)


def remember(net, x):
    net.kept = net.conv(x)
    return net.norm(net.kept)


def autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net.norm(net.conv(x))


def twice(net, x):
    made = net.conv(x)
    return net.norm(made) + made


def tied():
    net = Does(lambda m, x: m.norm(m.conv(x)) + m.other(x), other=nn.Conv2d(3, 3, 1, bias=False))
    net.other.weight = net.conv.weight
    return net


def with_hook():
    net = Does(lambda m, x: m.norm(m.conv(x)))
    net.conv.register_forward_hook(lambda module, args, out: out * 2)
    return net


class Quick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


class Lengths(nn.Sequential):
    """The norm's channels are positions."""

    def __init__(self):
        super().__init__(nn.Linear(9, 9), nn.BatchNorm1d(9))

    def forward(self, x):
        return super().forward(x[:, 0])


DOUBTS = {
    "the result goes elsewhere, too": Does(twice),
    "the result is an output": Does(lambda m, x: (h := m.conv(x), m.norm(h))),
    "the result is kept": Does(remember),
    "the result is looked at as a number": Does(
        lambda m, x: m.norm(h := m.conv(x)) * float(h[0, 0, 0, 0])
    ),
    "unseen by functions": Does(lambda m, x: m.norm(h := m.conv(x)) + Quick.apply(h)),
    "a view between": Does(lambda m, x: m.norm(m.conv(x)[:, :, 1:])),
    "an activation between": Does(lambda m, x: m.norm(m.conv(x).relu_())),
    "the product is used twice": Does(lambda m, x: m.norm(m.conv(m.conv(x)))),
    "the norm is used twice": Does(lambda m, x: m.norm(m.norm(m.conv(x)))),
    "the weight is used elsewhere": Does(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean()),
    "the norm's weight is used elsewhere": Does(
        lambda m, x: m.norm(m.conv(x)) + m.norm.running_mean.mean()
    ),
    "the norm is looked at": Does(lambda m, x: m.norm(m.conv(x)) * m.norm.eps),
    "the weight is tied": tied(),
    "a hook": with_hook(),
    "another forward": Does(lambda m, x: m.norm(m.conv(x))),
    "half": Does(lambda m, x: m.norm(m.conv(x.bfloat16()))).bfloat16(),
    "under autocast": Does(autocast),
    "the norm comes first": Does(lambda m, x: m.conv(m.norm(x))),
    "no statistics": Does(lambda m, x: m.norm(m.conv(x))),
    "in training": Does(lambda m, x: m.norm.train()(m.conv(x))),
    "positions": Lengths(),
    "unbatched": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)),
    "functions only": Does(
        lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var)
    ),
}
DOUBTS["another forward"].conv = Scaled(3, 3, 1, bias=False)
DOUBTS["no statistics"].norm = nn.BatchNorm2d(3, track_running_stats=False)


def test_what_is_in_no_doubt_is_found():
    """What each of the doubts below is beside."""
    net, x = settle(Does(lambda m, x: m.norm(m.conv(x)) * x.shape[1])), torch.randn(4, 3, 9, 9)
    assert foldable(net, lambda model: model(x)) == (("conv", "norm"),)


@pytest.mark.parametrize("kind", DOUBTS)
def test_what_is_in_doubt_stays(kind):
    torch.manual_seed(0)
    net, x = settle(copy.deepcopy(DOUBTS[kind])), torch.randn(4, 3, 9, 9)
    if kind == "unbatched":
        net, x = net[1:], torch.randn(3, 3)
    assert intact(net, lambda: foldable(net, lambda model: model(x))) == ()
    # what a pass leaves out may be what tells
    assert foldable(net, lambda model: (model(x), None)[1]) == ()


class Longer(nn.Module):
    """Two norms, of which one is for longer inputs alone."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.second, self.second_norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(self.first_norm(self.first(x)).relu())
        x = self.second_norm(x) if x.shape[-1] > 10 else x
        return self.head(x.mean(-1))


@pytest.mark.parametrize("short_in", ["train", "val", "both"])
def test_a_norm_that_some_batches_leave_out_stays(short_in):
    """Wherever that batch is; what the search says is then what a plain loop says."""
    torch.manual_seed(0)
    net = settle(Longer()).eval()
    long = [(torch.randn(16, 3, 20), torch.randint(3, (16,)))]
    both = [*long, (torch.randn(16, 3, 8), torch.randint(3, (16,)))]
    train, val = (both if short_in in (kind, "both") else long for kind in ("train", "val"))
    measured = Measurements.start(net, train, val, nn.CrossEntropyLoss())
    assert measured.folded == (("first", "first_norm"),)
    with torch.no_grad():
        each = [F.cross_entropy(net(x), y, reduction="sum").item() for x, y in val]
    wanted = sum(each) / sum(len(y) for _, y in val)
    assert measured.original.criterion == pytest.approx(wanted, rel=1e-5)


class Residual(nn.Module):
    """Several norms to fold beside others, and a branch at random in training."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.deep_norm = nn.BatchNorm2d(8, affine=False)
        self.first = nn.BatchNorm2d(8)
        self.drop, self.head, self.last = nn.Dropout(), nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.stem(x)
        assert x.shape[1] == 8
        x = self.first(x + self.deep_norm(self.deep(x)))
        return {"logits": self.last(self.head(self.drop(x.mean((2, 3))))), "noise": torch.randn(2)}


FOLDED = (("stem.0", "stem.1"), ("deep", "deep_norm"), ("head", "last"))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return settle(Residual()), torch.randn(20, 3, 9, 9)


def test_norms_among_others(residual):
    net, x = residual
    state = torch.random.get_rng_state()
    assert intact(net, lambda: foldable(net, lambda model: model(x))) == FOLDED
    assert torch.equal(torch.random.get_rng_state(), state)
    wanted = net.eval()(x)["logits"]
    torch.testing.assert_close(prepared(net, FOLDED)(x)["logits"], wanted, rtol=1e-4, atol=1e-5)
    compiled = nn.DataParallel(net)
    assert foldable(compiled, lambda model: model(x)) == FOLDED
    for name in plugins.names("models"):
        small = {"classes": 3, "vocabulary": 9} if "language" in name else {}
        model, *_ = plugins.load("models", name, "create_model_context")(**small)
        assert not list(model.buffers())  # so its figures are those of its parameters


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"axis": 0, "rounding": "gptq"}], ids=str)
def test_a_strategy_of_a_folded_network(residual, options):
    """Is that of the copy that was folded first, counted against the parameters of the given."""
    net, x = residual
    plain, batches = prepared(net, FOLDED), [(x,)]
    tensors = uniform_strategy(plain, 4, **options).tensors
    strategy = Strategy(tensors, folded=FOLDED)
    assert Strategy(**json.loads(json.dumps(strategy.choices))) == strategy
    assert "folded" not in Strategy(tensors).choices
    quantized = intact(net, lambda: quantize(net, strategy, batches))
    assert quantized.folded == FOLDED
    assert quantized.with_scales({}).folded == FOLDED
    alone = quantize(plain, Strategy(tensors), batches)
    for name, tensor in alone.tensors.items():
        assert torch.equal(tensor.dequantize(), quantized.tensors[name].dequantize())
    put, wanted = quantize_model(net, strategy, batches), quantize_model(plain, alone)
    assert torch.equal(put.eval()(x)["logits"], wanted.eval()(x)["logits"])
    back = round_trip(quantized)
    assert back.folded == FOLDED
    assert quantize(net, back) is back
    # all codes and scales, and the norm that stays with its statistics
    stored = sum(tensor.stored_bits for tensor in quantized.tensors.values()) + 2 * 8 * 32
    count = sum(parameter.numel() for parameter in net.parameters())
    assert mean_bits(net, quantized) == mean_bits(plain, alone) == stored / count
    assert mean_bits(plain, quantized) == stored / count
    for name in plugins.names("costs"):
        measure = plugins.load("costs", name, "measure")
        assert measure(net, quantized, []) == measure(plain, alone, [])
    assert 8 * sum(model_bytes.measure(net, quantized, []).values()) == stored
    network = Calibration(net, batches, folded=FOLDED)
    assert network.parameters.keys() == named_tensors(network.model).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("stem.0", "nope"),), "folded stem.0, nope: the network has no module nope"),
        ((("nope", "stem.1"),), "folded nope, stem.1: the network has no module nope"),
        ((("drop", "first"),), "folded drop, first: the first is a Dropout: a convolution or"),
        ((("stem.0", "drop"),), "folded stem.0, drop: the second is a Dropout: a BatchNorm"),
        ((("head", "first"),), "folded head, first: 5 outputs beside 8 channels"),
        ("ab", "folded has 'a': pairs of names .module, norm. are needed"),
        ([["a"]], r"folded has \['a'\]: pairs of names"),
        ([["a", 3]], r"folded has \['a', 3\]: pairs of names"),
        (7, "folded has 7: pairs of names"),
    ],
)
def test_pairs_that_are_none_are_named(residual, pairs, message):
    net, _ = residual
    with pytest.raises(ValueError, match=message) as caught:
        intact(net, lambda: quantize_model(net, Strategy({}, folded=pairs)))
    assert len(str(caught.value).splitlines()) == 1
    if isinstance(pairs, tuple):
        for act in (lambda q: mean_bits(net, q), lambda q: model_bytes.measure(net, q, [])):
            with pytest.raises(ValueError, match=message):
                act(Quantized(folded=pairs))
        with pytest.raises(ValueError, match=message):
            fold(copy.deepcopy(net), pairs)
