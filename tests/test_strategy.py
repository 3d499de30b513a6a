"""A strategy on any network: what it names is quantized, the rest and the original are not."""

import copy
import json

import pytest
import torch
from conftest import quantize_alone
from torch import nn

from quantifind.network.modules import named_tensors
from quantifind.quantize import (
    mean_bits,
    quantize,
    quantize_model,
)
from quantifind.strategy import Strategy, uniform_activations, uniform_strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins

MODELS = plugins.names("models")
SCHEMES = plugins.names("schemes")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_quantized_on_a_copy(name):
    torch.manual_seed(0)
    net, *_ = plugins.load("models", name, "create_model_context")()
    net.train()
    before = copy.deepcopy(net.state_dict())
    strategy = uniform_strategy(net, 3)
    quantized = quantize_model(net, strategy)
    assert strategy.tensors.keys() == dict(net.named_parameters()).keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert quantized.training
    for parameter in quantized.parameters():
        assert len(parameter.unique()) <= 8
    assert 3 < mean_bits(net, quantize(net, strategy)) < 3.2


def test_what_is_named_none_stays_in_float_and_is_counted():
    net = nn.Linear(3, 2)
    strategy = Strategy({"weight": {"scheme": "uniform", "bits": 4}, "bias": None})
    quantized = quantize_model(net, strategy)
    assert torch.equal(quantized.bias, net.bias)
    assert strategy.bit_depth == 4
    assert mean_bits(net, quantize(net, strategy)) == (6 * 4 + 32 + 2 * 32) / 8


def test_tied_weights_are_counted_once_and_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    strategy = uniform_strategy(net, 4)
    quantized = quantize_model(net, strategy)
    assert list(strategy.tensors) == ["0.weight"]
    assert quantized[1].weight is quantized[0].weight
    assert mean_bits(net, quantize(net, strategy)) == (16 * 4 + 32) / 16


def test_widths_may_differ():
    choices = {"weight": {"scheme": "uniform", "bits": 2}, "bias": {"scheme": "uniform", "bits": 8}}
    assert Strategy(choices).bit_depth is None


def test_json_round_trip(classifier):
    strategy = uniform_strategy(classifier[0], 5)
    assert Strategy(**json.loads(json.dumps(strategy.choices))) == strategy
    assert strategy.choices["tensors"]["0.weight"] == {"scheme": "uniform", "bits": 5}


def intact(net, act):
    """What ``act`` returns, after which ``net`` is bit for bit, and in its modes, as it was."""
    before = copy.deepcopy(net.state_dict())
    kept = [(p.requires_grad, p.grad, p.data_ptr()) for p in net.parameters()]
    modes = [module.training for module in net.modules()]
    try:
        return act()
    finally:
        after = net.state_dict()
        assert list(after) == list(before)
        assert all(a.dtype == b.dtype for a, b in zip(after.values(), before.values(), strict=True))
        assert all(torch.equal(before[key], value) for key, value in after.items())
        assert [(p.requires_grad, p.grad, p.data_ptr()) for p in net.parameters()] == kept
        assert [module.training for module in net.modules()] == modes


class Zoo(nn.Module):
    """What a network may be made of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.limited = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        frozen = nn.Linear(6, 6).requires_grad_(False)
        self.both = nn.utils.parametrizations.weight_norm(frozen).requires_grad_(False)
        self.idle = nn.Sequential(nn.ReLU(), nn.Identity())
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.order = nn.Parameter(torch.tensor([5, 4, 3, 2, 1, 0]), requires_grad=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, x):
        x = self.idle(self.norm(self.layer(self.layer(x[:, self.order]))))
        return self.limited(self.normed(self.both(self.frozen(x)))) * self.scale + self.shift


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    net = Zoo()
    net(torch.randn(9, 6))  # a pass in training gives spectral_norm and the norm something to keep
    net.norm.eval()
    return net


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("train", [True, False])
def test_any_module_is_quantized(zoo, scheme, rounding, train):
    if not train:
        zoo.eval()
    x = torch.randn(20, 6)
    strategy = uniform_strategy(zoo, 3, scheme=scheme, rounding=rounding)
    assert strategy.tensors["order"] is None
    assert {"normed.weight", "limited.weight", "both.weight"} <= strategy.tensors.keys()
    quantized = intact(zoo, lambda: quantize_model(zoo, strategy, [(x,)]))
    modes = {name: module.training for name, module in zoo.named_modules()}
    for name, module in quantized.named_modules():
        assert module.training == modes[name]
    for name, parameter in quantized.named_parameters():
        if name == "order":
            assert torch.equal(parameter, zoo.order)
        else:
            assert len(parameter.unique()) <= 8
    assert torch.equal(quantized.shift, zoo.shift)
    assert torch.equal(quantized.norm.running_var, zoo.norm.running_var)
    for name in ("frozen", "both"):
        assert not quantized.get_submodule(name).weight.requires_grad
    assert quantized.layer.weight.requires_grad
    assert quantized.normed.weight.requires_grad
    assert quantized(x).isfinite().all()


def test_parametrized_weights_are_taken_as_in_evaluation(zoo):
    fine = quantize_model(zoo, uniform_strategy(zoo, 24))
    wanted = zoo.eval().limited.weight
    torch.testing.assert_close(fine.limited.weight, wanted, rtol=1e-5, atol=1e-6)


def test_buffers_are_quantized_where_they_are_named(zoo):
    choices = dict.fromkeys(uniform_strategy(zoo, 3).tensors)
    strategy = Strategy(choices | {"shift": {"scheme": "uniform", "bits": 2}})
    quantized = intact(zoo, lambda: quantize_model(zoo, strategy))
    assert len(quantized.shift.unique()) <= 4
    assert mean_bits(zoo, quantize(zoo, strategy)) > 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_dtypes_stay(dtype, rounding):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).to(dtype)
    x = torch.randn(20, 6).to(dtype)
    strategy = uniform_strategy(net, 4, axis=0, rounding=rounding)
    quantized = quantize_model(net, strategy, [(x,)])
    assert all(p.dtype == dtype for p in quantized.parameters())
    assert all(len(row.unique()) <= 16 for row in quantized[0].weight)
    assert (quantized(x) - net(x)).norm() < 0.3 * net(x).norm()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_parameters_over_the_same_memory_are_one(rounding):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[2].weight = nn.Parameter(net[0].weight.detach())
    strategy = uniform_strategy(net, 4, rounding=rounding)
    x = torch.randn(20, 4)
    quantized = intact(net, lambda: quantize_model(net, strategy, [(x,)]))
    assert list(strategy.tensors) == ["0.weight"]
    assert torch.equal(quantized[0].weight, quantized[2].weight)
    assert len(quantized[2].weight.unique()) <= 16
    assert mean_bits(net, quantize(net, strategy, [(x,)])) == (16 * 4 + 32) / 16


def test_a_network_without_parameters_stays():
    net = nn.Sequential(nn.ReLU())
    assert torch.equal(quantize_model(net, uniform_strategy(net, 4))(torch.ones(2)), torch.ones(2))


WEIGHT = {"scheme": "uniform", "bits": 4}
GOOD = [(torch.ones(2, 2),)]


@pytest.mark.parametrize(
    ("choice", "calibration", "message"),
    [
        (WEIGHT | {"bits": 40}, None, "weight: bits is 40"),
        ({"bits": 4}, None, "weight: a choice needs a scheme: codebook, "),
        (
            {"scheme": "unifrom"},
            None,
            "weight: unknown 'unifrom': quantifind/schemes/ has codebook",
        ),
        (
            WEIGHT | {"axsi": 0},
            None,
            "weight: unknown option axsi: uniform takes bits, levels, half",
        ),
        (WEIGHT | {"terms": 2}, None, "weight: unknown option terms: uniform takes bits"),
        (WEIGHT | {"percentile": 99}, None, "weight: unknown option percentile"),
        (WEIGHT | {"axis": 2}, None, r"weight: axis is 2: the tensor's shape is \[2, 2\]"),
        (WEIGHT | {"axis": 0.5}, None, "weight: axis is 0.5: whole numbers"),
        (WEIGHT | {"axis": 0, "group": 3}, None, "weight: group is 3: .*1 to 2"),
        (WEIGHT | {"axis": 0, "group": "2"}, None, "weight: group is '2': whole numbers"),
        (WEIGHT | {"scale": "large"}, None, "weight: scale is 'large'"),
        (
            WEIGHT | {"scale": "output_mse"},
            GOOD,
            "weight: scale 'output_mse' needs rounding 'gptq'",
        ),
        (WEIGHT | {"rounding": "up"}, None, "weight: rounding is 'up': nearest, gptq, learned are"),
        (
            WEIGHT | {"rounding": "gptq"},
            None,
            "weight: rounding 'gptq': calibration h",
        ),
        (
            WEIGHT | {"rounding": "gptq"},
            [],
            "weight: rounding 'gptq': calibration has",
        ),
        (
            WEIGHT | {"rounding": "gptq"},
            [(torch.ones(2, 5),)],
            r"the network does not take a batch of \[\d, 5\]: mat1",
        ),
        (
            WEIGHT | {"scale": "weighted_mse"},
            None,
            "weight: scale 'weighted_mse'",
        ),
        ({"scheme": "minifloat", "bits": 4, "exponent": 9}, None, "weight: exponent is 9"),
        ({"scheme": "power_of_two", "bits": 4, "terms": 9}, None, "weight: terms is 9"),
        ({"scheme": "codebook", "bits": 4, "scale": "max_abs"}, None, "weight: .*scale.*k-means"),
    ],
)
def test_errors_name_the_tensor_and_the_option(choice, calibration, message):
    net = nn.Linear(2, 2)

    def act():
        return quantize_model(net, Strategy({"weight": choice, "bias": None}), calibration)

    with pytest.raises(ValueError, match=message) as caught:
        intact(net, act)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        (None, {}, "uniform takes either bits or levels"),
        (4, {"levels": 3}, "uniform takes either bits or levels"),
        ("4", {}, "bits is '4': uniform takes whole numbers 1 to 32"),
        (64, {}, "bits is 64: uniform takes"),
        (0, {}, "bits is 0: uniform takes"),
        (2.5, {}, "bits is 2.5: uniform takes"),
        (True, {}, "bits is True: uniform takes"),
        (None, {"levels": 1}, "levels is 1: uniform takes"),
        (17, {"scheme": "minifloat"}, "bits is 17: minifloat takes"),
        (None, {"scheme": "minifloat"}, "minifloat"),
        (1, {"scheme": "power_of_two"}, "bits is 1: power_of_two takes"),
        (9, {"scheme": "codebook"}, "bits is 9: codebook takes"),
    ],
)
def test_widths_that_a_scheme_lacks_are_refused_at_once(bits, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        uniform_strategy(nn.Linear(2, 2), bits, **options)
    assert len(str(caught.value).splitlines()) == 1
    if "scheme" not in options:
        with pytest.raises(ValueError, match=message):
            uniform_activations(nn.Linear(2, 2), GOOD, bits, **options)


def test_unknown_and_unnamed_tensors_are_named():
    net, choice = nn.Linear(2, 2), {"scheme": "uniform", "bits": 4}
    with pytest.raises(ValueError, match=r"names tensors wieght: the network has weight, bias"):
        quantize_model(net, Strategy({"wieght": choice, "weight": None, "bias": None}))
    with pytest.raises(ValueError, match=r"leaves tensors bias unnamed: None says"):
        quantize_model(net, Strategy({"weight": choice}))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_values_that_cannot_be_quantized_are_named(rounding):
    net = nn.Linear(2, 2)
    net.weight.data[0] = torch.tensor([torch.nan, torch.inf])
    strategy = uniform_strategy(net, 4, rounding=rounding)
    with pytest.raises(ValueError, match=r"weight: 2 of 4 values are NaN or infinite"):
        quantize_model(net, strategy, [(torch.ones(1, 2),)])
    net.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight: values are torch.int64: only floating point"):
        quantize_model(net, strategy, [(torch.ones(1, 2),)])


def test_importance_is_for_what_a_pass_multiplies():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.head = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(x + self.positions)

    net, batches = Positions(), [(torch.randn(4, 3, 2),)]
    for options in ({"scale": "weighted_mse"}, {"rounding": "gptq"}):
        strategy = uniform_strategy(net, 4, **options)
        with pytest.raises(
            ValueError, match=r"positions: .*: no linear or convolution or embedding"
        ):
            quantize_model(net, strategy, batches)
        some = Strategy(dict(strategy.tensors) | {"positions": None})
        assert len(quantize_model(net, some, batches).head.weight.unique()) <= 16


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def test_what_is_quantized_is_taken_as_it_is():
    net, x = small(), torch.randn(40, 5)
    strategy = uniform_strategy(net, 3, axis=0, rounding="gptq")
    quantized = quantize(net, strategy, [(x,)])
    assert quantize(net, quantized) is quantized  # without calibration
    wanted = quantize_model(net, strategy, [(x,)])
    assert torch.equal(quantize_model(net, quantized)(x), wanted(x))
    levels = uniform_activations(net, [(x,)], 4)
    both = Strategy(strategy.tensors, levels)
    fitted = quantize(net, both, [(x,)])
    assert torch.equal(quantize_model(net, fitted)(x), quantize_model(net, both, [(x,)])(x))


def test_codes_of_another_network_are_refused():
    net, narrow = small(), nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    quantized = quantize(net, uniform_strategy(net, 3))
    message = r"0.weight: codes of shape \[6, 5\], the network's are \[4, 5\]"
    with pytest.raises(ValueError, match=message):
        quantize(narrow, quantized)
    more = Quantized(quantized.tensors | {"more": quantized.tensors["0.bias"]})
    with pytest.raises(ValueError, match=r"quantized tensors more: the network has 0\.weight, "):
        quantize(net, more)


def test_learned_codes_have_to_be_there():
    net = small()
    with pytest.raises(ValueError, match=r"0.weight: rounding 'learned' without codes: quan"):
        quantize(net, uniform_strategy(net, 3, rounding="learned"), [(torch.randn(40, 5),)])
    with pytest.raises(ValueError, match=r"0.weight: rounding 'learned' without codes"):
        quantize_alone(net, "0.weight", [Choice.of(WEIGHT | {"rounding": "learned"})])


ALONE = [
    *({"scheme": scheme, "bits": 3, "axis": 0} for scheme in SCHEMES),
    {"scheme": "uniform", "levels": 3, "scale": "mse"},
    {"scheme": "uniform", "bits": 3, "axis": 0, "rounding": "gptq"},
    {"scheme": "codebook", "bits": 3, "axis": 0, "rounding": "gptq"},
    {"scheme": "uniform", "bits": 2, "axis": 0, "rounding": "gptq", "scale": "output_mse"},
    {"scheme": "uniform", "levels": 3, "axis": 0, "rounding": "gptq",
     "scale": "output_mse", "scale_dtype": "float16"},
    {"scheme": "uniform", "bits": 3, "axis": 0, "scale": "weighted_mse"},
    {"scheme": "uniform", "bits": 3, "axis": 0, "group": 2, "scale": "weighted_mse"},
    {"scheme": "codebook", "bits": 2, "centres": "weighted_k_means"},
]  # fmt: skip
ALONE = [Choice.of(choice) for choice in ALONE]


class Varied(nn.Module):
    """An embedding, a convolution, a norm and a linear map that is used twice."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 6)
        self.register_buffer("gain", torch.linspace(0.5, 2, 6))

    def forward(self, codes):
        x = self.mix(self.table(codes).transpose(1, 2)).transpose(1, 2).relu()
        return self.head(self.head(self.norm(x)) * self.gain)


@pytest.mark.parametrize("name", ["table.weight", "mix.weight", "head.weight"])
def test_one_tensor_alone_is_as_in_a_strategy_with_the_rest_in_float(name):
    torch.manual_seed(0)
    net = Varied()
    batches = [(torch.randint(9, (30, 4)),), (torch.randint(9, (20, 4)),)]
    found = intact(net, lambda: quantize_alone(net, name, ALONE, iter(batches)))
    for choice, tensor in zip(ALONE, found, strict=True):
        alone = Strategy(dict.fromkeys(named_tensors(net)) | {name: choice})
        wanted = quantize(net, alone, batches).tensors[name]
        assert torch.equal(tensor.codes, wanted.codes)
        assert torch.equal(tensor.dequantize(), wanted.dequantize())
        (single,) = quantize_alone(net, name, [choice], batches)
        assert torch.equal(single.dequantize(), wanted.dequantize())


@pytest.mark.parametrize("name", ["head.bias", "norm.weight", "gain"])
def test_a_bias_or_a_buffer_alone(name):
    torch.manual_seed(0)
    net, choice = Varied(), Choice("uniform", 3)
    alone = Strategy(dict.fromkeys(named_tensors(net)) | {name: choice})
    (tensor,) = quantize_alone(net, name, [choice])
    assert torch.equal(tensor.dequantize(), quantize(net, alone).tensors[name].dequantize())
    assert quantize_alone(net, name, []) == []


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (WEIGHT | {"bits": 40}, "head.weight: bits is 40"),
        (WEIGHT | {"axis": 3}, "head.weight: axis is 3"),
        (WEIGHT | {"scale": "output_mse", "axis": 0}, "head.weight: scale 'output_mse' needs"),
    ],
)
def test_errors_of_one_tensor_alone(choice, message):
    batches = [(torch.randint(9, (3, 4)),)]
    with pytest.raises(ValueError, match=message):
        quantize_alone(Varied(), "head.weight", [Choice.of(choice)], batches)
    gptq = Choice.of(WEIGHT | {"rounding": "gptq"})
    with pytest.raises(ValueError, match=r"head.weight: rounding 'gptq': calibration has no ex"):
        quantize_alone(Varied(), "head.weight", [gptq])
    with pytest.raises(ValueError, match="gain: rounding 'gptq' is for weights"):
        quantize_alone(Varied(), "gain", [gptq], batches)


def test_an_unknown_tensor_alone_is_named():
    with pytest.raises(ValueError, match="nope"):
        quantize_alone(small(), "nope", [Choice.of(WEIGHT)])


def test_a_tensor_alone_that_no_product_uses_is_named():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.head = nn.Parameter(torch.randn(3, 2)), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(x + self.positions)

    choice = Choice.of(WEIGHT | {"scale": "weighted_mse"})
    with pytest.raises(ValueError, match=r"positions: .*: no linear or convolution or embedding"):
        quantize_alone(Positions(), "positions", [choice], [(torch.randn(4, 3, 2),)])


@pytest.mark.parametrize("options", [{"rounding": "gptq"}, {"scale": "weighted_mse"}], ids=str)
def test_a_parametrized_weight_alone(options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    batches, choice = [(torch.randn(30, 4),)], Choice.of(WEIGHT | {"axis": 0} | options)
    alone = Strategy(dict.fromkeys(named_tensors(net)) | {"0.weight": choice})
    wanted = quantize(net, alone, batches).tensors["0.weight"]
    (tensor,) = quantize_alone(net, "0.weight", [choice], batches)
    assert torch.equal(tensor.dequantize(), wanted.dequantize())
