"""Laws that every cost in quantifind/costs/ keeps, found by being there, and numbers by hand."""

import copy
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from quantifind.costs import bit_operations, energy_picojoules, model_bytes
from quantifind.network import trace as counting
from quantifind.network.modules import named_tensors
from quantifind.network.trace import macs
from quantifind.quantize import mean_bits, quantize
from quantifind.schemes import codebook, uniform
from quantifind.strategy import Strategy, uniform_activations, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins
from quantifind.utils.devices import device_of

for_every_cost = pytest.mark.parametrize(
    "measure",
    [plugins.load("costs", name, "measure") for name in plugins.names("costs")],
    ids=plugins.names("costs"),
)
for_every_model = pytest.mark.parametrize("name", plugins.names("models"))
FLOAT = Quantized({})


class Net(nn.Module):
    """Characters → an embedding, attention, a norm, a convolution, a product of its own, and a head
    tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        x = self.embedding(codes)
        x = self.norm(self.attention(x, x, x, need_weights=False)[0])
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x @ x.transpose(1, 2) @ x)


CODES = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def network(name):
    """One of quantifind/models/, as large as it is, the transformer smaller; and inputs for it."""
    torch.manual_seed(0)
    create = plugins.load("models", name, "create_model_context")
    small = {"classes": 3, "vocabulary": 9, "width": 8, "heads": 2}
    model, *_ = create(**small if name == "language_transformer_model" else {})
    shape = (3, 256) if name == "simple_dense_model" else (3, 1, 28, 28)
    inputs = CODES if name == "language_transformer_model" else torch.randn(shape)
    return model.eval(), inputs.to(device_of(model))


def on_levels(model, inputs, bits, scheme="uniform", activation_bits=8):
    activations = uniform_activations(model, [(inputs,)], activation_bits)
    tensors = uniform_strategy(model, bits, scheme=scheme).tensors
    return quantize(model, Strategy(tensors, activations), [(inputs,)])


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@for_every_cost
@for_every_model
def test_every_parameter_has_a_cost_that_is_not_negative(measure, name):
    model, inputs = network(name)
    products = macs(model, inputs)
    for quantized in (FLOAT, on_levels(model, inputs, 3)):
        cost = measure(model, quantized, products)
        own = set(named_tensors(model))
        assert own <= cost.keys() <= own | {site for p in products for site in p.activations}
        assert all(type(value) is float and 0 <= value < math.inf for value in cost.values())


@for_every_cost
@pytest.mark.parametrize("scheme", plugins.names("schemes"))
def test_fewer_bits_never_cost_more(measure, scheme, net):
    """Of parameters on any grid, of activations, and more in float than at 8 bits."""
    module = importlib.import_module(f"quantifind.schemes.{scheme}")
    products = macs(net, CODES)
    widths = range(module.MIN_BITS, min(module.MAX_BITS, 8) + 1)
    steps = [on_levels(net, CODES, bits, scheme) for bits in widths]
    steps += [on_levels(net, CODES, widths[-1], scheme, bits) for bits in (9, 12, 16)]
    costs = [measure(net, quantized, products) for quantized in (*steps, FLOAT)]
    for few, more in itertools.pairwise(costs[:-1]):
        assert all(few[name] <= more[name] for name in few)
    # a codebook of 256 values is more than a bias of 8
    assert scheme == "codebook" or sum(costs[-2].values()) <= sum(costs[-1].values())


@for_every_cost
def test_a_parameter_has_a_say_in_its_own_entry_alone(measure, net):
    products = macs(net, CODES)
    few, many = on_levels(net, CODES, 2), on_levels(net, CODES, 7)
    whole = measure(net, many, products)
    for name in few.tensors:
        for tensors in (
            many.tensors | {name: few.tensors[name]},
            {other: tensor for other, tensor in many.tensors.items() if other != name},
        ):
            cost = measure(net, Quantized(tensors, many.activations), products)
            assert changed(whole, cost) <= {name}


@for_every_cost
def test_an_activation_has_a_say_in_what_it_meets_alone(measure, net):
    products = macs(net, CODES)
    few, many = (on_levels(net, CODES, 4, activation_bits=bits) for bits in (2, 7))
    whole = measure(net, many, products)
    for site, levels in few.activations.items():
        meets = {product.name for product in products if site in product.activations}
        cost = measure(net, Quantized(many.tensors, many.activations | {site: levels}), products)
        assert changed(whole, cost) <= meets


@for_every_cost
def test_the_network_costs_what_its_parts_do(measure, net):
    """A mixed network, from entries of networks at one width, as an integer programme does it."""
    products = macs(net, CODES)
    by_bits = {bits: on_levels(net, CODES, bits) for bits in (2, 3, 5)}
    entries = {bits: measure(net, quantized, products) for bits, quantized in by_bits.items()}
    widths = {name: (2, 3, 5)[index % 3] for index, name in enumerate(by_bits[2].tensors)}
    mixed = {name: by_bits[bits].tensors[name] for name, bits in widths.items()}
    cost = measure(net, Quantized(mixed, by_bits[2].activations), products)
    assert cost == {name: entries[widths.get(name, 2)][name] for name in entries[2]}


@for_every_cost
def test_nothing_passed_in_is_changed(measure, net):
    net.train()
    before = copy.deepcopy(net.state_dict())
    measure(net, on_levels(net, CODES, 3), macs(net, CODES))
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_model_bytes_are_mean_bits(net):
    net.register_buffer("table", torch.randn(40))
    activations = uniform_activations(net, [(CODES,)], 5)
    choices = uniform_strategy(net, 3, axis=0).tensors
    mixed = choices | {
        "mix.weight": None,
        "attention.in_proj_weight": {"scheme": "codebook", "bits": 2},
        "head.bias": {"scheme": "uniform", "levels": 3},
        "table": {"scheme": "uniform", "bits": 4},
    }
    for strategy in (
        Strategy(dict.fromkeys(choices)),
        Strategy(choices, activations),
        Strategy({name: mixed[name] for name in choices}, activations),
    ):
        quantized = quantize(net, strategy, [(CODES,)])
        cost = model_bytes.measure(net, quantized, [])
        assert cost["table"] == 40 * 4
        count = sum(tensor.numel() for tensor in named_tensors(net).values())
        assert sum(cost.values()) * 8 / count == pytest.approx(mean_bits(net, quantized))
    quantized = quantize(net, Strategy(mixed, activations), [(CODES,)])
    cost = model_bytes.measure(net, quantized, [])
    assert cost["table"] == 20 + 4
    assert sum(cost.values()) * 8 / count == pytest.approx(mean_bits(net, quantized))


def levels(bits=None, **options):
    """Of activations: a scale of 4 bytes, no zero point."""
    return uniform.quantize(torch.linspace(-1, 1, 7), bits, **options).qparams


# 5 → 3: 15 MACs
LINEAR = nn.Linear(5, 3)
# (4, 9, 9) → (6, 5, 5), each from 2 channels of 3 × 3: 150 · 18 = 2,700 MACs
CONV = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU())
COUNTS = [
    (LINEAR, torch.zeros(7, 5), "weight", "bias", 15),
    (CONV, torch.zeros(2, 4, 9, 9), "0.weight", "0.bias", 2_700),
]
by_hand = pytest.mark.parametrize(("model", "inputs", "weight", "bias", "count"), COUNTS)


@by_hand
def test_costs_of_a_float_network_by_hand(model, inputs, weight, bias, count):
    products = macs(model, inputs)
    values, biases = (named_tensors(model)[name].numel() for name in (weight, bias))
    assert model_bytes.measure(model, FLOAT, products) == {weight: 4 * values, bias: 4 * biases}
    assert bit_operations.measure(model, FLOAT, products) == {weight: count * 32 * 32, bias: 0}
    assert energy_picojoules.measure(model, FLOAT, products) == pytest.approx(
        {weight: count * (3.7 + 0.9) + values * 640, bias: biases * 640}
    )
    halves = copy.deepcopy(model).half()
    products = macs(halves, inputs.half())
    assert bit_operations.measure(halves, FLOAT, products) == {weight: count * 16 * 16, bias: 0}
    assert model_bytes.measure(halves, FLOAT, products) == {weight: 2 * values, bias: 2 * biases}


@by_hand
def test_costs_of_whole_numbers_by_hand(model, inputs, weight, bias, count):
    """Weights of 4 bits, or ternary, packed five in a byte, each tensor with a scale of 4 bytes."""
    products = macs(model, inputs)
    parameters = named_tensors(model)
    values, biases = parameters[weight].numel(), parameters[bias].numel()
    eight = {weight: levels(8)}
    for options, width, size in (
        ({"bits": 4}, 4, math.ceil(values / 2)),
        ({"levels": 3}, 2, math.ceil(values / 5)),
    ):
        tensors = {weight: uniform.quantize(parameters[weight], **options)}
        assert model_bytes.measure(model, Quantized(tensors, eight), products) == {
            weight: size + 4 + 4,
            bias: 4 * biases,
        }
        cost = bit_operations.measure(model, Quantized(tensors, eight), products)
        assert cost == {weight: count * width * 8, bias: 0}
        cost = bit_operations.measure(model, Quantized(tensors), products)
        assert cost == {weight: count * width * 32, bias: 0}
        cost = energy_picojoules.measure(model, Quantized(tensors), products)
        assert cost[weight] == pytest.approx(count * 4.6 + 160 * (size + 4))
    tensors = {weight: uniform.quantize(parameters[weight], 8)}
    cost = energy_picojoules.measure(model, Quantized(tensors, eight), products)
    read = (values + 4) * 8 * 20
    assert cost == pytest.approx({weight: count * (0.2 + 0.1) + read, bias: biases * 640})


def test_a_stored_codebook_multiplies_floats():
    tensors = {"weight": codebook.quantize(LINEAR.weight.detach(), 2)}
    quantized = Quantized(tensors, {"weight": levels(8)})
    products = macs(LINEAR, torch.zeros(1, 5))
    cost = energy_picojoules.measure(LINEAR, quantized, products)
    assert cost["weight"] == pytest.approx(15 * 4.6 + 20 * tensors["weight"].stored_bits)
    assert bit_operations.measure(LINEAR, quantized, products)["weight"] == 15 * 2 * 8


def test_a_product_of_two_activations_is_entered_at_its_left_site(net):
    left, right = "product.0.left", "product.0.right"
    products = macs(net, CODES)
    quantized = Quantized({}, {left: levels(4), right: levels(3)})
    count = 5 * 5 * 8
    cost = bit_operations.measure(net, quantized, products)
    assert cost[left] == count * 4 * 3
    assert right not in cost
    cost = energy_picojoules.measure(net, quantized, products)
    each = energy_picojoules.multiply_integers(4, 3) + 0.1
    assert cost[left] == pytest.approx(count * each)
    cost = model_bytes.measure(net, quantized, products)
    assert (cost[left], cost[right]) == (4, 4)


def test_published_energies():
    multiply = energy_picojoules.multiply_integers
    assert multiply(8, 8) == 0.2
    assert multiply(32, 32) == pytest.approx(3.1)
    assert 0 < multiply(1, 1) < multiply(1, 2) == multiply(2, 1) < multiply(2, 2)


def test_macs_by_hand(net):
    """Length 5, width 8, 2 heads of 4, 9 characters; the tied weight at both its uses."""
    counted = {(p.kind, p.name): p.macs for p in macs(net, CODES)}
    assert counted == {
        ("embedding", "embedding.weight"): 0,
        ("linear", "attention.in_proj_weight"): 5 * 8 * 24,
        ("matrix_product", "attention.product.0.left"): 2 * 5 * 4 * 5,
        ("matrix_product", "attention.product.1.left"): 2 * 5 * 5 * 4,
        ("linear", "attention.out_proj.weight"): 5 * 8 * 8,
        ("convolution", "mix.weight"): 5 * 8 * 4 * 3,
        ("matrix_product", "product.0.left"): 5 * 8 * 5,
        ("matrix_product", "product.1.left"): 5 * 5 * 8,
        ("linear", "embedding.weight"): 5 * 8 * 9,
    }


class Calls(nn.Module):
    """A function of an input and a weight as a network."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.function(x, self.weight)


SUMMAND, RIGHT = torch.zeros(2, 4), torch.randn(3, 4)
FUNCTIONS = [
    (lambda x, w: x @ w, 24),
    (lambda x, w: w.t() @ x.t(), 24),
    (lambda x, w: x.expand(7, 2, 3) @ w, 7 * 24),
    (lambda x, w: x.expand(7, 2, 3) @ w.expand(7, 3, 4), 7 * 24),
    (lambda x, w: torch.mm(x, w[:, :2]), 12),
    (lambda x, w: F.linear(x, w.t()), 24),
    (lambda x, w: torch.inner(x, w.t()), 24),
    (lambda x, w: torch.tensordot(x, w, dims=1), 24),
    (lambda x, w: torch.einsum("ij,jk->ik", x, w), 24),
    (lambda x, w: torch.einsum("bij,bjk->bik", x.expand(7, 2, 3), w.expand(7, 3, 4)), 7 * 24),
    (lambda x, w: torch.einsum("i,j->ij", x[0], w[0]), 12),
    (lambda x, w: torch.addmm(SUMMAND, x, w, beta=0.5, alpha=2), 24),
    (lambda x, w: torch.bmm(x[None], w[None]), 24),
    (lambda x, w: torch.baddbmm(SUMMAND[None], x[None], w[None], alpha=2), 24),
    (lambda x, w: torch.addbmm(SUMMAND, x.expand(7, 2, 3), w.expand(7, 3, 4), alpha=2), 7 * 24),
    (lambda x, w: torch.addmv(SUMMAND[:, 0], x, w[:, 0], alpha=2), 6),
    (lambda x, w: torch.mv(x, w[:, 0]), 6),
    (lambda x, w: x[0] @ w, 12),
    (lambda x, w: torch.dot(x[0], w[:, 0]), 3),
]


@pytest.mark.parametrize(("function", "count"), FUNCTIONS)
def test_macs_of_functional_products(function, count):
    """With a weight, and of two activations; both for a batch of 2."""
    for net in (Calls(function, 3, 4), Calls(lambda x, _: function(x, RIGHT), 1)):
        (product,) = macs(net, torch.randn(2, 3))
        assert product.macs == count / 2


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_macs_of_convolutions(axes, transposed, groups):
    """Of what is not padded each value of one side meets the kernel and the other's channels."""
    layer = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    net = layer(4, 6, 3, stride=2, groups=groups)
    inputs = torch.randn(5, 4, *(7,) * axes)
    with torch.no_grad():
        moved = inputs if transposed else net(inputs)
    (product,) = macs(net, inputs)
    others = 6 if transposed else 4
    assert product.macs == moved[0].numel() * 3**axes * others // groups


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("strides", list(itertools.permutations([1, 2, 4])))
def test_macs_of_one_kernel_with_other_options(axes, strides):
    """Each use counts by its own result, in whatever order."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, *(3,) * axes))

        def forward(self, x):
            function = getattr(F, f"conv{axes}d")
            self.made = [function(x, self.weight, stride=stride) for stride in strides]
            return sum(result.flatten(1).sum(1) for result in self.made)

    net, x = Several(), torch.randn(2, 5, *(11,) * axes)
    net(x)
    each = sum(result[0].numel() * 5 * 3**axes for result in net.made)
    assert sum(product.macs for product in macs(net, x)) == each


@for_every_model
def test_macs_are_those_of_torchs_own_counter(name):
    """Of the whole pass, without the fused attention that it doesn't see into."""
    model, inputs = network(name)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    products = macs(model, inputs)
    each = sum(product.macs for product in products)
    assert each > 0
    assert 2 * each * len(inputs) == pytest.approx(flops.get_total_flops(), rel=1e-12)
    assert macs(model, inputs[:1].repeat(4, *(1,) * (inputs.dim() - 1))) == macs(model, inputs[:1])


def test_uses_of_a_weight_add_up():
    layer = nn.Linear(4, 4)
    (product,) = macs(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4))
    assert (product.weight, product.macs) == ("0.weight", 32)


def test_a_parametrized_weight_has_the_name_that_strategies_give_it():
    net = parametrizations.weight_norm(nn.Linear(4, 2))
    products = macs(net, torch.zeros(3, 4))
    assert [product.name for product in products] == ["weight"]
    assert bit_operations.measure(net, FLOAT, products) == {"weight": 8 * 32 * 32, "bias": 0}


def test_inputs_that_cannot_be_counted_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"\[0, 5\] has no example"):
        macs(LINEAR, torch.zeros(0, 5))
    with pytest.raises(ValueError, match=r"the network does not take a batch of \[2, 4\]: mat1"):
        macs(LINEAR, torch.zeros(2, 4))
    monkeypatch.setattr(counting, "_ALSO_COUNTED", {})
    with pytest.raises(ValueError, match=r"weight: a matrix_product of unknown MACs"):
        macs(Calls(lambda x, w: x @ w, 5), torch.ones(2, 5))
    (product,) = macs(Calls(lambda x, w: x @ w, 0, 3), torch.ones(2, 0))
    assert product.macs == 0
