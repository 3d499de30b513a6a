"""A network that computes with packed codes gives bit for bit what the copy gives."""

import copy
import pickle
import shutil
import sys

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from test_saving import Zoo
from torch import nn

from quantifind import Strategy, compressed, export, quantize_model, uniform_strategy
from quantifind.costs import model_bytes
from quantifind.quantize import quantize
from quantifind.strategy import uniform_activations
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized, QuantizedTensor


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.inner = kind(6, 5, batch_first=True, **options)

    def forward(self, x):
        return self.inner(x)[0]


class Convolutions(nn.Sequential):
    """With weights that do not lie in order."""

    def __init__(self):
        super().__init__(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 3, 2))
        self[0].weight = nn.Parameter(torch.randn(3, 6, 8).permute(2, 1, 0))

    def forward(self, x):
        return super().forward(x.mT)


class Slices(nn.Module):
    """A weight in parts, and one by hand in a list."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(10, 6))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(5, 5))])

    def forward(self, x):
        left, right = (x @ part.T for part in self.both.chunk(2))
        return left.tanh() @ self.more[0] + right


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
    "convolutions": Convolutions,
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
    "slices": Slices,
}
STRATEGIES = [
    {"bits": 4, "axis": 0},
    {"levels": 3},
    {"scheme": "codebook", "bits": 3},
    {"scheme": "minifloat", "bits": 4, "axis": 0, "scale_dtype": "power_of_two"},
]


def made(kind):
    torch.manual_seed(0)
    net = NETS[kind]()
    net(torch.randn(20, 9, 6))
    return net.eval(), torch.randn(3, 9, 6)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("choice", STRATEGIES, ids=str)
def test_compressed_networks_give_the_same(kind, choice):
    net, x = made(kind)
    given = copy.deepcopy(net.state_dict())
    quantized = quantize(net, uniform_strategy(net, **choice))
    small, same = compressed(net, quantized), quantize_model(net, quantized)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            wanted = same(x)
            assert torch.equal(small(x), wanted)
            assert torch.equal(copy.deepcopy(small)(x), wanted)
    assert not torch.equal(net(x), wanted)
    assert all(torch.equal(given[name], value) for name, value in net.state_dict().items())
    stored = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    held = sum(t.untyped_storage().nbytes() for t in small.state_dict().values())
    assert held == stored
    single = ("tracked", "_grid")
    counters = sum(8 for n, t in small.state_dict().items() if n.endswith(single))
    assert stored - counters == sum(model_bytes.measure(net, quantized, []).values())


def test_recurrent_weights_are_made_few_times_in_a_pass(monkeypatch):
    net, x = made("gru")
    small, made_of = compressed(net, uniform_strategy(net, 4)), []
    dequantize = QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self: made_of.append(1) or dequantize(self)
    )
    small(x)
    assert len(made_of) <= 3 * len(list(net.parameters()))


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_activations_are_rounded_in_compressed_networks(kind):
    net, x = made(kind)
    strategy = Strategy(uniform_strategy(net, 6).tensors, uniform_activations(net, [(x,)], 4))
    quantized = quantize(net, strategy, [(x,)])
    wanted = quantize_model(net, quantized)(x)
    small = compressed(net, quantized)
    for _ in range(2):
        assert torch.equal(small(x), wanted)
    assert not torch.equal(compressed(net, Quantized(quantized.tensors))(x), wanted)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@torch.no_grad()
def test_tied_weights_and_buffers_of_all_kinds():
    torch.manual_seed(0)
    net, words = Zoo().eval(), torch.randint(7, (6, 8))
    strategy = uniform_strategy(net, 3, axis=0)
    small = compressed(net, strategy)
    assert torch.equal(small(words), quantize_model(net, strategy)(words))
    assert small.head.weight_codes is small.embedding.weight_codes
    assert small.conv.weight.stride() == net.conv.weight.stride()


@pytest.mark.parametrize("choice", STRATEGIES, ids=str)
@torch.no_grad()
def test_a_compressed_network_is_compiled_whole(choice):
    net, x = made("convolutions")
    small = compressed(net, uniform_strategy(net, **choice))
    torch._dynamo.reset()
    graph = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.equal(graph(x), small(x))


@pytest.mark.parametrize("kind", [kind for kind in NETS if kind != "slices"])
@torch.no_grad()
def test_compressed_networks_are_traced_by_fx(kind):
    """As their float networks are: modules of torch are leaves, and stay codes."""
    net, x = made(kind)
    net = nn.Sequential(net)
    small = compressed(net, uniform_strategy(net, 4))
    traced, plain = (torch.fx.symbolic_trace(each) for each in (small, net))
    assert torch.equal(traced(x), small(x))
    called = [[n.target for n in t.graph.nodes if n.op == "call_module"] for t in (traced, plain)]
    assert called[0] == called[1]
    assert traced.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("kind", ["linear", "convolutions", "slices"])
@torch.no_grad()
def test_activations_are_rounded_where_a_network_is_compiled(kind):
    net, x = made(kind)
    strategy = Strategy(uniform_strategy(net, 6).tensors, uniform_activations(net, [(x,)], 2))
    codes = quantize(net, strategy, [(x,)])
    wanted = quantize_model(net, codes)(x)
    assert not torch.equal(quantize_model(net, Quantized(codes.tensors))(x), wanted)
    for small in (compressed(net, codes), quantize_model(net, codes)):
        torch._dynamo.reset()
        found = torch.compile(small, backend="eager")(x)
        assert (found != wanted).float().mean() <= 0.05
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_a_compressed_network_is_compiled_to_code():
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3, bias=False), torch.randn(2, 6)
    small = compressed(net, uniform_strategy(net, 4))
    torch._dynamo.reset()
    assert (torch.compile(small, fullgraph=True)(x) - small(x)).abs().max() <= 1e-6


class Sizes(nn.Module):
    """Linear maps that torchao's kernels take, and one of sizes that they don't."""

    def __init__(self):
        super().__init__()
        self.first, self.odd = nn.Linear(64, 48), nn.Linear(48, 9, bias=False)
        self.tied = nn.Linear(64, 48)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.odd(self.first(x) + self.tied(-x))


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_torchaos_kernels_multiply_codes(bits):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net, x = Sizes().eval(), torch.randn(5, 64)
    strategy = Strategy(
        {
            n: c if "weight" in n else None
            for n, c in uniform_strategy(net, bits, axis=0).tensors.items()
        }
    )
    wanted = quantize_model(net, strategy)(x)
    small = compressed(net, strategy, kernels="torchao")
    assert (small(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert type(small.first.weight).__module__.startswith("torchao")
    assert small.tied.weight is small.first.weight
    assert small.first.weight.qdata.nbytes == 48 * 64 * bits // 8
    assert hasattr(small.odd, "weight_codes") == (bits == 4)
    turned = Choice("uniform", bits=bits, axis=0, rounding="gptq", rotation=0)
    strategy = Strategy({n: turned if "weight" in n else None for n in strategy.tensors})
    rotated = quantize(net, strategy, [(x,)])
    other = compressed(net, rotated, kernels="torchao")
    assert torch.equal(other(x), quantize_model(net, rotated)(x))
    double = compressed(Sizes().double().eval(), uniform_strategy(net, bits), kernels="torchao")
    assert double(x.double()).isfinite().all()
    for choice in ({"levels": 3}, {"bits": bits, "zero_point": True, "axis": 0}, {"bits": 6}):
        other = compressed(net, uniform_strategy(net, **choice), kernels="torchao")
        assert hasattr(other.first, "weight_codes")
    activations = uniform_activations(net, [(x,)], 8)
    rounded = quantize(net, Strategy(strategy.tensors, activations), [(x,)])
    with pytest.raises(ValueError, match="kernels is 'torchao': activations are rounded"):
        compressed(net, rounded, kernels="torchao")


def test_kernels_that_are_not_there_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"pip install quantifind\[kernels\]"):
        compressed(net, uniform_strategy(net, 8), kernels="torchao")


@torch.no_grad()
def test_codes_go_from_one_to_another():
    net, x = made("linear")
    other, _ = NETS["linear"](), None
    strategy = uniform_strategy(net, 4, axis=0)
    small, fresh = compressed(net, strategy), compressed(other, strategy)
    assert not torch.equal(small(x), fresh(x))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(small(x), fresh(x))
    state = small.state_dict()
    parts = ("codes", "scale", "grid")
    assert {name.rpartition(".")[2] for name in state} == {
        f"{name}_{part}" for name in ("weight", "bias") for part in parts
    }
    # of before there were checksums of grids
    fresh.load_state_dict({name: t for name, t in state.items() if not name.endswith("_grid")})
    assert torch.equal(small(x), fresh(x))


GRIDS = [
    {"scheme": "minifloat", "bits": 4},
    {"scheme": "power_of_two", "bits": 4},
    {"scheme": "codebook", "bits": 4, "centres": "normal"},
    {"bits": 4},
    {"bits": 4, "half_integer": True},
    {"levels": 15},
    {"bits": 4, "rotation": 0, "rounding": "gptq"},
    {"bits": 4, "rotation": 1, "rounding": "gptq"},
]


@torch.no_grad()
def test_codes_of_another_grid_are_refused():
    """Where the state dict has the same names and shapes; as they are, and as a file has them."""
    torch.manual_seed(0)
    net, x = nn.Linear(7, 7, bias=False), torch.randn(3, 7)
    smalls = [
        compressed(net, Strategy({"weight": {"scheme": "uniform", **grid}}), [(x,)])
        for grid in GRIDS
    ]
    turned = nn.Linear(49, 1, bias=False)
    smalls.append(compressed(turned, uniform_strategy(turned, 4)))
    for place, one in enumerate(smalls):
        for other in (*smalls[:place], *smalls[place + 1 :]):
            fresh = copy.deepcopy(other)
            with pytest.raises(
                RuntimeError, match=r"weight: the codes are of another grid|Missing"
            ):
                fresh.load_state_dict(one.state_dict())
        fresh = copy.deepcopy(one)
        fresh.weight_codes.zero_()
        fresh.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
        if place < len(GRIDS):
            assert torch.equal(fresh(x), one(x))


class Finds(nn.Module):
    """Its weights in all ways in which code can come to them."""

    def __init__(self, how):
        super().__init__()
        self.how, self.one, self.other = how, nn.Linear(6, 6), nn.Linear(6, 6)
        weight = self.one.weight
        self.kept, self.part, self.turned = [weight], weight.detach()[:3], weight.detach().t()
        self.call = self.one.forward
        self.other.register_forward_hook(lambda module, inputs, output: output @ weight)

    def forward(self, x):
        return {
            "a list": lambda: F.linear(x, self.kept[0]),
            "a part": lambda: F.linear(x, self.part),
            "a view": lambda: x @ self.turned,
            "a method": lambda: self.call(x),
            "a hook": lambda: self.other(x),
        }[self.how]()


@pytest.mark.parametrize("how", ["a list", "a part", "a view", "a method", "a hook"])
@torch.no_grad()
def test_however_a_network_finds_its_weights(how, tmp_path):
    torch.manual_seed(0)
    net, x = Finds(how).eval(), torch.randn(5, 6)
    codes = quantize(net, uniform_strategy(net, 2))
    wanted = quantize_model(net, codes)(x)
    assert not torch.equal(net(x), wanted)
    assert torch.equal(compressed(net, codes)(x), wanted)
    export(net, codes, tmp_path / "net.pt2", x)
    assert torch.allclose(torch.export.load(tmp_path / "net.pt2").module()(x), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_a_compressed_network_is_pickled(kind, tmp_path):
    """By pickle, torch.save and cloudpickle, with activations that are rounded or without."""
    net, x = made(kind)
    activations = uniform_activations(net, [(x,)], 4)
    for strategy in (
        uniform_strategy(net, 4),
        Strategy(uniform_strategy(net, 4).tensors, activations),
    ):
        small = compressed(net, strategy, [(x,)])
        torch.save(small, tmp_path / "small.pt")
        others = [module.loads(module.dumps(small)) for module in (pickle, cloudpickle)]
        others.append(torch.load(tmp_path / "small.pt", weights_only=False))
        for other in others:
            assert torch.equal(other(x), small(x))
            assert other.state_dict().keys() == small.state_dict().keys()


@torch.no_grad()
def test_scales_are_never_cast():
    """A cast that would round them is refused, or leaves them as they are."""
    torch.manual_seed(0)
    net, words = nn.Embedding(7, 6), torch.arange(7)
    small = compressed(net, uniform_strategy(net, 4, axis=0))
    wanted = small(words)
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"weight: its codes are of torch.float32, and can't"):
            cast(small)
        assert torch.equal(small(words), wanted)
    net = nn.Sequential(net.half())
    small = compressed(net, uniform_strategy(net, 4, axis=0))
    wanted, (scale,) = small(words), [t for n, t in small.named_buffers() if "scale" in n]
    assert scale.dtype == torch.float32
    for same in (small.half(), small.to("cpu"), small.share_memory()):
        assert torch.equal(same(words), wanted)


@torch.no_grad()
def test_scales_of_activations_are_never_cast():
    net, x = made("linear")
    strategy = Strategy(uniform_strategy(net, 8).tensors, uniform_activations(net, [(x,)], 8))
    small = quantize_model(net, strategy, [(x,)])
    before = small.scales.clone()
    assert torch.equal(small.half().scales, before)


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_derivatives_by_what_goes_in_are_those_of_the_copy(kind):
    net, x = made(kind)
    codes = quantize(net, uniform_strategy(net, 4))
    small, same = (
        torch.func.jacrev(n) for n in (compressed(net, codes), quantize_model(net, codes))
    )
    assert torch.allclose(small(x), same(x), atol=1e-6)


def test_what_is_no_strategy_is_refused():
    with pytest.raises(ValueError, match="quantized is a dict: what find_strategy or quantize"):
        compressed(nn.Linear(2, 2), {})


def test_a_module_of_two_names_is_compressed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    codes = quantize(net, uniform_strategy(net, 4))
    x = torch.randn(7, 4)
    assert torch.equal(compressed(net, codes)(x), quantize_model(net, codes)(x))


def test_codes_of_another_dtype_are_refused():
    net = nn.Linear(4, 4)
    codes = quantize(net, uniform_strategy(net, 4))
    with pytest.raises(ValueError, match=r"weight: its codes are of torch.float32, the network"):
        compressed(net.bfloat16(), codes)
