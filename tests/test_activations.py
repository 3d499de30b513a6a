"""What goes into each product is on few levels, each activation with its own width and range."""

import copy

import pytest
import torch
from torch import nn

from quantifind.network.activations import (
    QuantizedActivations,
    fit_activations,
)
from quantifind.network.modules import plain_copy
from quantifind.network.products import visiting
from quantifind.network.trace import activation_names, trace
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.strategy import Strategy, uniform_activations
from quantifind.tensor.choice import ActivationChoice
from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.ste import round_through
from quantifind.utils import plugins

SCHEMES = plugins.names("schemes")


class Net(nn.Module):
    """A linear map, attention, a convolution, and a product of its own."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.mix = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.enter(x).transpose(1, 2)).transpose(1, 2)
        x = self.mix(self.layer(x).transpose(1, 2))
        return x @ x.transpose(1, 2)


ATTENTION = "layer.self_attn"
NAMES = [
    "enter.weight",
    f"{ATTENTION}.in_proj_weight",
    *(f"{ATTENTION}.product.{i}.{side}" for i in (0, 1) for side in ("left", "right")),
    f"{ATTENTION}.out_proj.weight",
    "layer.linear1.weight",
    "layer.linear2.weight",
    "mix.weight",
    "product.0.left",
    "product.0.right",
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, 6, generator=generator) + 1,) for _ in range(3)]


def names_of(net, inputs):
    return activation_names(trace(plain_copy(net), [(inputs,)]))


def fitted(net, choices, batches):
    choices = {name: ActivationChoice.of(choice) for name, choice in choices.items()}
    return fit_activations(net, choices, batches)


def floats(net):
    return dict.fromkeys(dict(net.named_parameters()))


def operands_seen(model, inputs):
    """By name, what the products of a pass through rounded activations are computed of."""
    seen = {}

    def visit(product):
        rounded = model.rounded(product)
        seen.update(zip(rounded.activations, rounded.operands, strict=True))
        return rounded.compute(*rounded.operands)

    with torch.no_grad(), visiting(model.model, visit):
        outputs = model.model(inputs)
    torch.testing.assert_close(outputs, model(inputs).detach())
    return seen


def test_names_are_those_of_linear_maps_convolutions_and_attention_in_order(net, batches):
    assert names_of(net, batches[0][0]) == NAMES


def test_the_language_network_has_activations_inside_its_attention():
    create = plugins.load("models", "language_transformer_model", "create_model_context")
    net, *_ = create(classes=3, vocabulary=9, width=8, layers=2, heads=2)
    names = names_of(net, torch.tensor([[1, 2, 3], [4, 8, 0]]))
    for layer in (0, 1):
        for product in (0, 1):
            for side in ("left", "right"):
                name = f"encoder.layers.{layer}.self_attn.product.{product}.{side}"
                assert name in names
    assert "embedding.weight" not in names
    assert {"neighbours.weight", "head.weight"} <= set(names)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", ["max_abs", "mse"])
def test_every_operand_has_few_values(net, batches, scheme, scale):
    widths = {name: 3 + index % 4 for index, name in enumerate(NAMES)}
    options = {} if scheme == "codebook" else {"scale": scale}
    choices = {name: {"scheme": scheme, "bits": b} | options for name, b in widths.items()}
    rounded = quantize_model(net, Strategy(floats(net), choices), batches)
    seen = operands_seen(rounded, torch.randn(7, 5, 6))
    assert list(seen) == NAMES
    for name, operand in seen.items():
        assert 1 < len(operand.unique()) <= 2 ** widths[name]


def test_only_named_activations_are_rounded(net, batches):
    choices = dict.fromkeys(NAMES) | {"mix.weight": {"scheme": "uniform", "bits": 2}}
    rounded = quantize_model(net, Strategy(floats(net), choices), batches)
    x = torch.randn(7, 5, 6)
    counts = {name: len(values.unique()) for name, values in operands_seen(rounded, x).items()}
    assert counts.pop("mix.weight") <= 4
    assert min(counts.values()) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_16_bits_are_near_float(net, batches, dtype):
    net, batches = net.to(dtype), [(x.to(dtype),) for x, *_ in batches]
    choices = uniform_activations(net, batches, 16)
    assert list(choices) == NAMES
    rounded = quantize_model(net, Strategy(floats(net), choices), batches)
    (x,) = batches[0]
    wanted, found = net(x), rounded(x)
    assert found.dtype == dtype
    assert (found - wanted).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()


def test_every_batch_has_its_say_in_every_activation(net, batches):
    """Products too, the range of which is that over all batches."""
    few, many = batches[:1], [*batches, (10 * batches[0][0],)]
    choices = uniform_activations(net, few, 8)
    narrow, wide = (fitted(net, choices, b) for b in (few, many))
    for name in (
        "product.0.left",
        "product.0.right",
        f"{ATTENTION}.product.0.left",
        "enter.weight",
    ):
        assert wide[name].scale > narrow[name].scale


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_by_largest_percentile_and_squared_error(sign):
    net = nn.Linear(1, 1)
    values = torch.linspace(0, 1, 2001).unsqueeze(1) * sign
    values[-1] = 50 * sign

    def fit(**options):
        choice = {"scheme": "uniform", "bits": 4, "zero_point": True} | options
        return fitted(net, {"weight": choice}, [(values,)])["weight"]

    largest, cut, least = fit(), fit(percentile=99.9), fit(scale="mse")
    assert largest.scale == pytest.approx(50 / 15)
    assert cut.scale == pytest.approx(0.999 / 15, rel=1e-2)
    assert least.scale == largest.scale  # so far out, the one value counts most
    values[-1] = 2 * sign
    rows = values.double().reshape(1, -1)
    rounded = [q.values(q.nearest(rows)) for q in (fit(), fit(scale="mse"))]
    error = [(found - rows).square().sum() for found in rounded]
    assert error[1] < 0.9 * error[0]


def test_a_sample_stands_for_many_values(monkeypatch):
    monkeypatch.setattr("quantifind.network.activations.SAMPLE", 1000)
    net, choice = nn.Linear(10, 1), {"scheme": "uniform", "bits": 4}
    batches = [(torch.rand(300, 10),) for _ in range(10)]
    batches[7][0][5] = 9.0
    fit = fitted(net, {"weight": choice}, batches)["weight"]
    assert fit.scale == pytest.approx(9 / 7.5)  # the largest of all is seen


def test_gradients_pass_to_what_lies_within_the_levels():
    values = torch.tensor([-3.0, -0.6, 0.2, 0.7, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    result = round_through(values, QParams(Grid(4), scale))  # -1, -½, 0, ½
    assert result.tolist() == [-1, -0.5, 0, 0.5, 0.5]
    result.sum().backward()
    # ½ is the highest level
    assert values.grad.tolist() == [0, 1, 1, 0, 0]
    # the level itself beyond the ends, else its distance from the value
    expected = -2 + (-1 + 1.2) + (0 - 0.4) + 1 + 1
    assert scale.grad.item() == pytest.approx(expected)


def test_gradients_reach_inputs_and_weights(net, batches):
    rounded = quantize_model(
        net, Strategy(floats(net), uniform_activations(net, batches, 8)), batches
    )
    x = torch.randn(2, 5, 6, requires_grad=True)
    rounded(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in rounded.parameters())


def test_modes_stay(net, batches):
    net.train()
    net.norm.eval()
    modes = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    rounded = quantize_model(
        net, Strategy(floats(net), uniform_activations(net, batches, 8)), batches
    )
    assert [module.training for module in net.modules()] == modes
    assert [module.training for module in rounded.model.modules()] == modes
    assert rounded.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_ranges_are_saved_with_the_network_and_counted(net, batches):
    strategy = Strategy(floats(net), uniform_activations(net, batches, 8))
    quantized = quantize(net, strategy, batches)
    rounded = QuantizedActivations(net, quantized.activations)
    assert len(rounded.state_dict()["scales"]) == len(NAMES)
    size = sum(p.numel() for p in net.parameters())
    running = net.norm.running_mean.numel() + net.norm.running_var.numel()
    stored = 32 * (size + running) + len(NAMES) * (32 + 8)
    assert mean_bits(net, quantized) == stored / size


CHOICE = {"scheme": "uniform", "bits": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mxi": CHOICE}, "names activations mxi: the network has enter.weight, "),
        ({"mix.weight": ...}, "leaves activations mix.weight unnamed: None says"),
        ({"mix.weight": CHOICE | {"axis": 0}}, "mix.weight: axis: activations have one scale"),
        ({"mix.weight": CHOICE | {"percentile": 20}}, "mix.weight: percentile is 20: 50 to 100"),
        (
            {"mix.weight": CHOICE | {"rounding": "gptq"}},
            "mix.weight: rounding is 'gptq': activations are",
        ),
        ({"mix.weight": CHOICE | {"bits": 40}}, "mix.weight: bits is 40"),
        ({"mix.weight": {"bits": 4}}, "mix.weight: a choice needs a scheme: codebook, "),
        ({"mix.weight": {"scheme": "un"}}, "mix.weight: unknown 'un': quantifind/schemes/ has cod"),
        ({"mix.weight": CHOICE | {"scale": None}}, "mix.weight: scale is None"),
    ],
)
def test_errors_name_the_activation(net, batches, change, message):
    choices = {k: v for k, v in (dict.fromkeys(NAMES) | change).items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        quantize(net, Strategy(floats(net), choices), batches)


def test_activations_need_calibration(net):
    with pytest.raises(ValueError, match="activations: calibration has no examples"):
        quantize(net, Strategy(floats(net), dict.fromkeys(NAMES)))


def test_activations_that_are_not_finite_are_named():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    net[0].weight.data[:] = 3e38
    choices = {"1.weight": CHOICE}
    with pytest.raises(ValueError, match=r"activations of 1.weight: 2 values are NaN or infinite"):
        fitted(net, choices, [(torch.full((2, 1), 9.0),)])


def test_ranges_are_of_values_before_they_change():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y + x.mul_(100)

    choice, x = ActivationChoice("uniform", 8), torch.randn(9, 4)
    fit = fit_activations(InPlace(), {"layer.weight": choice}, [(x,)])["layer.weight"]
    assert fit.scale == choice.quantize(x).qparams.scale
