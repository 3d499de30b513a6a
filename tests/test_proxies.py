"""Predicted rises of the loss beside Hessians, gradients and rises computed in full."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_increase,
    hessian_increase,
    hessian_traces,
    output_fisher_increases,
)
from quantifind.network.modules import named_tensors
from quantifind.utils import plugins

OPTIONS = {
    "conv_mnist_model": {"channels": (4, 4)},
    "dense_mnist_model": {"hidden": 8},
    "language_transformer_model": {"classes": 3, "vocabulary": 7, "width": 16, "layers": 1},
    "simple_dense_model": {"size": 8},
}
CROSS_ENTROPY = nn.CrossEntropyLoss()


def mlp(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    if tied:
        net[2].weight = net[0].weight
    return net.double()


def labelled(*sizes: int):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def network(name: str):
    """A small one of quantifind/models/, its criterion, and batches of 4 and 2 examples."""
    torch.manual_seed(0)
    net, criterion, _ = plugins.load("models", name, "create_model_context")(**OPTIONS[name])
    net = net.cpu()
    if name == "simple_dense_model":
        return net, criterion, [(torch.randn(n, 8), torch.randn(n, 8)) for n in (4, 2)]
    if name == "language_transformer_model":
        codes = torch.tensor([[3, 1, 2, 0, 0], [5, 0, 0, 0, 0], [1, 2, 6, 4, 0], [2, 2, 0, 0, 0]])
        return net, criterion, [(codes[:n], torch.arange(n) % 3) for n in (4, 2)]
    return net, criterion, [(torch.randn(n, 1, 28, 28), torch.arange(n)) for n in (4, 2)]


def moved(net: nn.Module) -> dict[str, list[torch.Tensor]]:
    """For each tensor itself, and twice itself moved a little."""
    return {
        name: [value, value + 0.01 * torch.randn_like(value), value * 0.9 + 0.01]
        for name, value in named_tensors(net).items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_hessian_traces_are_those_of_the_whole_hessian(tied):
    net, batches, draws = mlp(tied), labelled(5, 2), 800
    estimates = hessian_traces(net, CROSS_ENTROPY, batches, draws=draws)
    values = named_tensors(net)
    assert estimates.keys() == values.keys()
    for name, value in values.items():
        trace, variance = 0.0, 0.0
        for inputs, targets in batches:

            def loss(flat, name=name, value=value, inputs=inputs, targets=targets):
                weights = {name: flat.reshape(value.shape)}
                return CROSS_ENTROPY(functional_call(net, weights, (inputs,)), targets)

            hessian = torch.autograd.functional.hessian(loss, value.flatten()) * len(inputs) / 7
            trace += hessian.trace().item()
            variance += 2 * (hessian - hessian.diag().diag()).square().sum().item() / draws
        within = 4 * math.sqrt(variance) + 1e-12
        assert estimates[name] * value.numel() == pytest.approx(trace, abs=within)


def test_a_diagonal_hessian_needs_one_draw():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

        def forward(self, inputs):
            return self.weight * inputs

    inputs = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    batches = list(zip(inputs.split(2), torch.zeros(3, 3).split(2), strict=True))
    traces = hessian_traces(Scale(), nn.MSELoss(), batches, draws=1)
    expected = 2 / 3 * inputs.square().mean(0).mean()  # of the mean of (w·x)² over 3 outputs
    assert traces == {"weight": pytest.approx(expected.item(), rel=1e-6)}


def test_the_prediction_is_the_mean_rise_of_a_quadratic_loss():
    torch.manual_seed(0)
    net, criterion = nn.Linear(3, 2).double(), nn.MSELoss()
    inputs, targets = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    weight = net.weight.detach()
    mean_trace = hessian_traces(net, criterion, [(inputs, targets)], draws=2000)["weight"]
    loss_increases, predictions = [], []
    for signs in itertools.product((-0.1, 0.1), repeat=6):
        changed = weight + torch.tensor(signs, dtype=torch.float64).reshape(2, 3)
        outputs = functional_call(net, {"weight": changed}, (inputs,))
        loss_increases.append(
            (criterion(outputs, targets) - criterion(net(inputs), targets)).item()
        )
        predictions.append(hessian_increase(mean_trace, weight, changed))
    assert predictions[0] == pytest.approx(sum(loss_increases) / len(loss_increases), rel=0.03)
    assert predictions == pytest.approx(predictions[:1] * len(predictions))


def test_a_loss_without_curvature_has_none():
    def total(outputs, targets):
        return outputs.sum()

    traces = hessian_traces(nn.Linear(4, 3).double(), total, labelled(3))
    assert traces == {"weight": 0, "bias": 0}


def test_signs_are_the_seed_s():
    arguments = mlp(), CROSS_ENTROPY, labelled(4)
    first = hessian_traces(*arguments, draws=2)
    assert first == hessian_traces(*arguments, draws=2)
    assert first != hessian_traces(*arguments, draws=2, seed=1)


def test_fisher_is_the_mean_of_squared_gradients():
    net, batches = mlp(), labelled(5, 2)
    names = list(named_tensors(net))
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for inputs, targets in batches:
        for i in range(len(inputs)):
            loss = CROSS_ENTROPY(net(inputs[i : i + 1]), targets[i : i + 1])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for name, gradient in zip(names, gradients, strict=True):
                expected[name] += gradient.square() / 7
    torch.testing.assert_close(fisher(net, CROSS_ENTROPY, batches), expected)


def test_fisher_of_some_examples():
    net, batches = mlp(), labelled(5, 2)
    each = [
        fisher(net, CROSS_ENTROPY, [(inputs[i : i + 1], targets[i : i + 1])])["0.bias"]
        for inputs, targets in batches
        for i in range(len(inputs))
    ]
    some = fisher(net, CROSS_ENTROPY, batches, examples=2)["0.bias"]
    pairs = [(a + b) / 2 for a, b in itertools.combinations(each, 2)]
    assert sum(torch.allclose(some, pair) for pair in pairs) == 1


def test_fisher_of_half_precision_is_summed_in_full():
    net = nn.Linear(4, 3).bfloat16()
    inputs, targets = labelled(6)[0]
    information = fisher(net, CROSS_ENTROPY, [(inputs.bfloat16(), targets)])
    assert {value.dtype for value in information.values()} == {torch.float32}


def output_fisher_by_hand(net, criterion, batches, module, name, candidate):
    """½·Σ g²·(y − y_q)² at the output of one module, an example at a time, with hooks."""
    total, examples = 0.0, 0
    for inputs, targets in batches:
        for i in range(len(inputs)):
            seen = []
            handle = module.register_forward_hook(
                lambda _, args, output, seen=seen: seen.append((args, output))
            )
            loss = criterion(net(inputs[i : i + 1]), targets[i : i + 1])
            handle.remove()
            for args, output in seen:
                (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
                changed = functional_call(module, {name: candidate}, args)
                total += 0.5 * (gradient * (changed - output)).square().sum().item()
            examples += 1
    return total / examples


@pytest.mark.parametrize("name", OPTIONS)
def test_output_fisher_is_its_definition(name):
    net, criterion, batches = network(name)
    net.eval()
    candidates = moved(net)
    loss_increases = output_fisher_increases(net, criterion, batches, candidates)
    for path, module in net.named_modules():
        # attention's own projections are functions without a module
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and "attn" not in path:
            for own, _ in module.named_parameters():
                full = f"{path}.{own}" if path else own
                arguments = net, criterion, batches, module, own
                by_hand = [output_fisher_by_hand(*arguments, c) for c in candidates[full]]
                assert loss_increases[full] == pytest.approx(by_hand, rel=1e-3, abs=1e-12)


def test_output_fisher_of_a_tied_weight_is_the_sum_of_its_uses():
    net, batches = mlp(tied=True), labelled(5, 2)
    candidate = net[0].weight.detach() * 1.1
    by_hand = sum(
        output_fisher_by_hand(net, CROSS_ENTROPY, batches, net[i], "weight", candidate)
        for i in (0, 2)
    )
    loss_increases = output_fisher_increases(net, CROSS_ENTROPY, batches, {"0.weight": [candidate]})
    assert loss_increases == {"0.weight": [pytest.approx(by_hand)]}


def test_output_fisher_of_an_output_bias_is_its_fisher():
    net, batches = mlp(), labelled(5, 2)
    bias = net[4].bias.detach()
    information = fisher(net, CROSS_ENTROPY, batches)["4.bias"]
    loss_increases = output_fisher_increases(
        net, CROSS_ENTROPY, batches, {"4.bias": [bias + 0.1, bias]}
    )
    assert loss_increases["4.bias"] == pytest.approx(
        [fisher_increase(information, bias, bias + 0.1), 0]
    )


class Attention(nn.Module):
    """One head, as `nn.MultiheadAttention` with its packed weight in three."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
        self.out_proj = packed.out_proj
        for part, weight, bias in zip(
            self.parts, packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True
        ):
            part.weight, part.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())

    def forward(self, *inputs):
        query, key, value = (part(x) for part, x in zip(self.parts, inputs, strict=True))
        shares = (query @ key.transpose(1, 2) / 2).softmax(-1)
        return self.out_proj(shares @ value), shares


class Reader(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, inputs):
        inputs = inputs.unflatten(1, (3, 4))
        return self.attention(inputs, inputs[:, :2], inputs[:, :2])[0].mean(1)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_output_fisher_of_a_packed_projection_is_that_of_its_parts(parameter):
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(4, 1, batch_first=True).double()
    apart = Attention(packed)
    batches = [(torch.randn(5, 12).double(), torch.arange(5) % 4)]
    name = f"attention.in_proj_{parameter}"
    candidate = getattr(packed, f"in_proj_{parameter}").detach() * 0.9 + 0.01
    loss_increases = output_fisher_increases(
        Reader(packed), CROSS_ENTROPY, batches, {name: [candidate]}
    )
    parts = {
        f"attention.parts.{i}.{parameter}": [part] for i, part in enumerate(candidate.chunk(3))
    }
    of_parts = output_fisher_increases(Reader(apart), CROSS_ENTROPY, batches, parts)
    assert loss_increases[name] == pytest.approx(
        [sum(loss_increase for (loss_increase,) in of_parts.values())]
    )


def test_an_activation_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    in_place = copy.deepcopy(net)
    in_place[1].inplace = True
    arguments = CROSS_ENTROPY, labelled(4), moved(net)
    assert output_fisher_increases(in_place, *arguments) == output_fisher_increases(net, *arguments)


def test_an_embedding_of_padding_counts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(3, 2, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.tensor([[1, 0], [2, 0]]), torch.tensor([0, 2]))]
    assert (fisher(net, CROSS_ENTROPY, batches)["0.weight"] > 0).all()
    assert net[0].padding_idx == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_every_network(name):
    net, criterion, batches = network(name)
    net.train()  # with dropout, which is off
    next(net.modules()).training = False
    first, *others = net.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    candidates = moved(net)
    torch.set_rng_state(random)

    with torch.no_grad():
        traces = hessian_traces(net, criterion, batches, draws=2)
        information = fisher(net, criterion, batches)
        loss_increases = output_fisher_increases(net, criterion, batches, candidates)

    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in net.modules()]
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * len(others)
    assert (others[0].grad == 1).all()
    assert all(p.grad is None for p in (first, *others[1:]))
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    values = named_tensors(net)
    assert traces.keys() == information.keys() == values.keys()
    assert loss_increases.keys() == {name for name in values if ".norm" not in name}
    assert all(math.isfinite(trace) for trace in traces.values())
    for name, value in values.items():
        assert information[name].shape == value.shape
        assert not information[name].requires_grad
        assert information[name].isfinite().all()
        assert (information[name] >= 0).all()
        assert information[name].sum() > 0
    for unchanged, *changed in loss_increases.values():
        assert unchanged == pytest.approx(0, abs=1e-12)
        assert all(math.isfinite(loss_increase) and loss_increase > 0 for loss_increase in changed)


@pytest.mark.parametrize(
    "predict",
    [
        hessian_traces,
        fisher,
        lambda *arguments: output_fisher_increases(*arguments, {}),
    ],
)
def test_what_can_not_be_predicted_from_is_an_error(predict):
    def broken(outputs, targets):
        return outputs.mean() * math.nan

    net = mlp()
    with pytest.raises(ValueError, match=r"broken.*: 1 of 1 losses are NaN|: 3 of 3 losses"):
        predict(net, broken, labelled(3)[:1])
    with pytest.raises(ValueError, match="no examples"):
        predict(net, CROSS_ENTROPY, [])
    with pytest.raises(ValueError, match="has no targets for the criterion CrossEntropyLoss"):
        predict(net, CROSS_ENTROPY, [(torch.zeros(2, 4).double(),)])
    with torch.no_grad():
        net[4].bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"CrossEntropyLoss\(\): .* losses are NaN or infinite"):
        predict(net, CROSS_ENTROPY, labelled(3))


def test_numbers_and_candidates_are_checked():
    net, batches = mlp(), labelled(2)
    with pytest.raises(ValueError, match="draws is 0"):
        hessian_traces(net, CROSS_ENTROPY, batches, draws=0)
    with pytest.raises(ValueError, match="examples is 0"):
        fisher(net, CROSS_ENTROPY, batches, examples=0)
    with pytest.raises(ValueError, match=r"unknown tensor '9\.bias': there are 0\.weight"):
        output_fisher_increases(net, CROSS_ENTROPY, batches, {"9.bias": []})
    with pytest.raises(ValueError, match=r"4\.bias: a candidate is \[1\], the tensor \[3\]"):
        output_fisher_increases(net, CROSS_ENTROPY, batches, {"4.bias": [torch.zeros(1)]})
