"""Networks whose passes differ: experts that some tokens, batches or nobody reach."""

import copy

import pytest
import torch
from torch import nn

from quantifind.mixed_precision.search_space import default_search_space
from quantifind.network.moments import layer_moments
from quantifind.network.trace import activation_names, gptq_weights, trace, weight_uses
from quantifind.quantize import quantize
from quantifind.strategy import Strategy, uniform_strategy


def moments_of(net, name, batches, **options):
    ((_, found),) = layer_moments(net, [name], batches, trace(net, batches), **options)
    return found.values()


class Experts(nn.Module):
    """Each token to the expert with the highest score, by masks or by sorting."""

    def __init__(self, count=2, how="masks", called_without=False):
        super().__init__()
        self.gate = nn.Linear(4, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(count))
        self.how, self.called_without = how, called_without

    def forward(self, x):
        chosen, out = self.gate(x).argmax(1), x.new_zeros(len(x), 3)
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        if self.how == "sorted":
            order = chosen.argsort(stable=True)
            parts = x[order].split(counts)
            done = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
            return out.index_copy(0, order, torch.cat(done))
        for number, expert in enumerate(self.experts):
            own = chosen == number
            if not counts[number] and not self.called_without:
                continue
            if self.how == "masks":
                out[own] = expert(x[own])
            else:
                rows = own.nonzero().squeeze(1)
                out.index_add_(0, rows, expert(x.index_select(0, rows)))
        return out


def mirrored():
    """Tokens of which each of two experts always has half."""
    torch.manual_seed(0)
    net, x = Experts(), torch.randn(512, 4)
    row = torch.tensor([0.9, 0.5, 0.2, -0.3])
    with torch.no_grad():
        net.gate.weight.copy_(torch.stack([row, -row]))
    return net, torch.cat([x, -x])


@pytest.mark.parametrize("how", ["masks", "rows", "sorted"])
def test_tokens_that_go_elsewhere_are_not_paired(how):
    """As many as in the float network, but others: its own are taken, by a loop over them."""
    net, x = mirrored()
    net.how = how
    work = copy.deepcopy(net)
    with torch.no_grad():
        row = torch.tensor([1.0, 0, 0, -1.0])
        work.gate.weight.copy_(torch.stack([row, -row]))
    chosen = net.gate(x).argmax(1)
    assert (work.gate(x).argmax(1) != chosen).any()
    for number in range(2):
        name = f"experts.{number}.weight"
        (found,) = moments_of(net, name, [(x,)], work=work)
        own = x[chosen == number].double()
        torch.testing.assert_close(found.inputs, own.T @ own, rtol=1e-5, atol=1e-3)
        weight = net.experts[number].weight.detach().double()
        wanted = weight @ own.T @ own
        torch.testing.assert_close(found.outputs, wanted, rtol=1e-4, atol=1e-2)


def test_tokens_that_go_where_they_did_are_paired():
    """The experts meet what the rounded layer before them gives."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts = nn.Linear(4, 4), Experts()

        def forward(self, x):
            # by the sign of what came in, which rounding leaves as it is
            inside = self.experts.experts[0](self.first(x)[x[:, 0] > 0])
            return inside

    torch.manual_seed(0)
    net, x = Net(), torch.randn(50, 4)
    work = copy.deepcopy(net)
    with torch.no_grad():
        work.first.weight.mul_(4).round_().div_(4)
    name = "experts.experts.0.weight"
    (found,) = moments_of(net, name, [(x,)], work=work)
    met = work.first(x[x[:, 0] > 0]).detach().double()
    torch.testing.assert_close(found.inputs, met.T @ met, rtol=1e-5, atol=1e-4)


def test_what_a_later_batch_meets():
    """Experts that the first batch misses are known, in their place before the head; how often
    each batch reaches them may differ."""
    torch.manual_seed(0)
    net = nn.Sequential(Experts(3), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].gate.weight.copy_(torch.eye(4)[:3])
    to = torch.eye(4)[:3] * 5
    batches = [(to[[0, 0]],), (to[[0, 2, 2, 2]],), (to[[2, 0]],)]
    facts = trace(net, batches)
    assert weight_uses(facts) == {
        "0.gate.weight": (1, 1, 1),
        "0.experts.0.weight": (1, 1, 1),
        "0.experts.2.weight": (0, 1, 1),
        "1.weight": (1, 1, 1),
    }
    assert list(weight_uses(facts)) == sorted(weight_uses(facts), key=lambda n: (n[0], "x" in n, n))
    counted = {p.weight: p.macs for p in facts}
    assert counted["0.experts.0.weight"] == 12 * 4 / 8
    assert counted["0.experts.2.weight"] == 12 * 4 / 8
    (found,) = moments_of(net, "0.experts.2.weight", batches)
    assert found.positions == 4


@pytest.mark.parametrize("called_without", [False, True])
@pytest.mark.parametrize("how", ["masks", "sorted"])
def test_experts_without_a_token(called_without, how):
    """Are not compensated, and no error in what is there by default."""
    torch.manual_seed(0)
    net = Experts(3, how, called_without)
    with torch.no_grad():
        net.gate.weight.copy_(torch.eye(4)[:3])
    batches = [(torch.eye(4)[[0, 2, 0]] * 5,)]
    facts = trace(net, batches)
    assert gptq_weights(facts) == {"gate.weight", "experts.0.weight", "experts.2.weight"}
    assert "experts.1.weight" not in activation_names(facts)
    space = default_search_space(net, facts, [2], [8])
    tensors = {name: choices[-1] for name, choices in space.tensors.items()}
    assert tensors["experts.0.weight"].rounding == "gptq"
    assert tensors["experts.1.weight"].rounding == "nearest"
    quantized = quantize(net, Strategy(tensors), batches).tensors["experts.1.weight"]
    nearest = tensors["experts.1.weight"].quantize(net.experts[1].weight)
    assert torch.equal(quantized.codes, nearest.codes)
    compensated = {**tensors, "experts.1.weight": tensors["experts.0.weight"]}
    with pytest.raises(ValueError, match=r"experts\.1\.weight: .* no .* of a pass uses it"):
        quantize(net, Strategy(compensated), batches)


def test_an_expert_in_a_stack_without_a_token_is_rounded_to_nearest():
    """Not to zeros, though its part of the weight meets none."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x):
            return torch.cat([part @ w for part, w in zip(x.split(2), self.weight, strict=False)])

    torch.manual_seed(0)
    net, x = Stack(), torch.randn(4, 4)
    choice = {"scheme": "uniform", "bits": 4, "axis": 2, "rounding": "gptq"}
    found = quantize(net, Strategy({"weight": choice}), [(x,)]).tensors["weight"].dequantize()
    assert (found[2] - net.weight[2]).norm() < 0.2 * net.weight[2].norm()


def test_what_vmap_runs_is_not_seen():
    """It is computed as it is, and rounded to nearest."""

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 8)), nn.Parameter(torch.ones(3))
            self.mix = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = torch.vmap(lambda example: self.mix(example, example, example)[0])(x)
            member = lambda w: nn.functional.linear(x, w, self.bias)  # noqa: E731
            return torch.vmap(member)(self.weight).mean(0)

    torch.manual_seed(0)
    net, x = Ensemble(), torch.randn(6, 5, 8)
    assert trace(net, [(x,)]) == []
    quantize(net, uniform_strategy(net, 4, axis=0), [(x,)])
