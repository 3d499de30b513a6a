"""What errors of outputs do, together, to the answers; and rounding by it, which loses less."""

import copy
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_replay import NETWORKS, RECURRENT, network
from torch import nn
from torch.autograd.functional import hessian

from quantifind.metrics import outcome
from quantifind.network import effects
from quantifind.network.calibrated import Calibration
from quantifind.network.calibration import calibration_batches
from quantifind.network.effects import output_effects
from quantifind.network.trace import trace
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.row_effects import DAMPING, RowEffects
from quantifind.utils.divergences import divergences
from quantifind.workflow.evaluation_workflow import compare

CODED = {"scheme": "uniform", "levels": 999, "rounding": "gptq", "storage": "coded", "rate": 0.06}


@pytest.mark.parametrize("classes", ["softmax", "sigmoid", None])
def test_directions_vary_as_a_divergence_curves(classes):
    torch.manual_seed(0)
    outputs = torch.randn(1, 4)
    ones = torch.ones(1)

    def apart(moved):
        if classes is None:  # where both are equal, the divergence is cut from its gradient
            return (moved - outputs).square().mean()
        return divergences(moved[None], outputs, ones, classes).sum()

    wanted = hessian(apart, outputs[0].double())
    drawn = effects._direction(
        outputs.expand(20_000, 4), classes, torch.Generator().manual_seed(0)
    ).double()
    found = drawn.T @ drawn / len(drawn)
    found, wanted = found / found.trace(), wanted / wanted.trace()
    assert torch.allclose(found, wanted, atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(40, dtype=torch.int64)),
        (nn.BCEWithLogitsLoss(), torch.zeros(40, 3)),
        (nn.MSELoss(), torch.zeros(40, 3)),
        (None, None),
    ],
    ids=["softmax", "sigmoid", "numbers", "no targets"],
)
def test_effects_are_those_of_all_directions(criterion, targets, monkeypatch):
    """Beside the exact sum, of an output's Jacobian and the divergence's Hessian."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = torch.randn(40, 5)
    data = [(inputs,) if targets is None else (inputs, targets)] * 100
    monkeypatch.setattr(effects, "EXAMPLES", 4_000)
    batches = calibration_batches(data, net, criterion=criterion)
    found = output_effects(net, batches, trace(net, batches), criterion)
    classes = {nn.CrossEntropyLoss: "softmax", nn.BCEWithLogitsLoss: "sigmoid"}.get(type(criterion))
    wanted = torch.zeros(6, 6)
    for hidden in net[0](inputs).detach():
        outputs = net[1:](hidden)[None].detach()

        def apart(moved, outputs=outputs):
            now = net[1:](moved)[None]
            if classes is None:
                return (now - outputs).square().sum()
            return divergences(now, outputs, torch.ones(1), classes).sum()

        wanted += hessian(apart, hidden)
    first = found[next(key for key in found if key[0] == "0.weight")][0].float()
    first, wanted = first / first.trace(), wanted / wanted.trace()
    assert (first - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("name", [*NETWORKS, *RECURRENT])
def test_every_network_has_effects(name):
    """Of each weight that outputs have a gradient to; the network and all it has stay as they
    are."""
    if name in RECURRENT:
        torch.manual_seed(0)
        inner = RECURRENT[name]()

        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x)[0][:, -1]

        net, inputs = Last(), torch.randn(8, 3, 4)
    else:
        net, inputs = network(name)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    batches = calibration_batches([(inputs,)], net)
    facts = trace(net, batches)
    found = output_effects(net, batches, facts)
    several = {
        (p.weight, p.matrices)
        for p in facts
        if p.weight and p.kind != "embedding" and p.matrices and p.matrices.shape[1] > 1
    }
    # what is taken by .data has no gradient, nor has what works in place on what one needs
    lost = several if name in ("data", "filled") else set()
    assert several - lost <= found.keys() <= several
    for (_, matrices), each in found.items():
        groups, outputs, _ = matrices.shape
        assert each.shape == (groups, outputs, outputs)
        assert torch.linalg.eigvalsh(each).min() > -1e-6 * each.abs().max()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_has_no_gradients_has_no_effects():
    """It is rounded as if all outputs' errors were alike, which a note says."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.first(x).relu().detach())

    torch.manual_seed(0)
    net, data = Cut(), [(torch.randn(50, 6),)]
    choice = Choice.of(CODED | {"scale": 0.1})

    def rounded(weighed):
        own = replace(choice, effects=weighed)
        biases = Choice("uniform", bits=8)
        tensors = {n: own if p.dim() > 1 else biases for n, p in net.named_parameters()}
        return quantize(net, Strategy(tensors), data)

    found, alike = rounded(True), rounded(False)
    assert torch.equal(found.tensors["first.weight"].codes, alike.tensors["first.weight"].codes)
    assert "alike" in found.notes["first.weight"]
    assert not any("alike" in note for note in alike.notes.values())
    assert "alike" not in found.notes.get("last.weight", "")


def test_ignored_labels_have_no_say():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    criterion = nn.CrossEntropyLoss(ignore_index=2)
    inputs = torch.randn(60, 4)
    labels = torch.arange(60) % 2
    labels[30:] = 2

    def found(inputs, labels):
        batches = calibration_batches([(inputs, labels)], net, criterion=criterion)
        return output_effects(net, batches, trace(net, batches), criterion)

    others = inputs.clone()
    others[30:] *= 100
    one, other = found(inputs, labels), found(others, labels)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key]) for key in one)


def test_no_more_memory_than_is_allowed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 5))
    batches = calibration_batches([(torch.randn(9, 4),)], net)
    facts = trace(net, batches)
    assert [name for name, _ in output_effects(net, batches, facts, max_memory=800)] == ["0.weight"]
    assert not output_effects(net, batches, facts, max_memory=100)


def drawn_effects(rows, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, rank, generator=generator).double()
    return (mix @ mix.T)[None]


@settings(max_examples=30)
@given(rows=st.integers(2, 12), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_is_made_up_is_the_least_error(rows, rank, seed):
    """Of a part's rows and all those to come, were they not rounded: of a linear solve."""
    form = drawn_effects(rows, rank, seed)
    found = RowEffects.of(form)
    damped = form[0] / form[0].diagonal().mean() + DAMPING * torch.eye(rows).double()
    assert sorted(torch.cat(found.rows).tolist()) == list(range(rows))
    lost = torch.zeros(1, rows, 3, dtype=torch.float64)
    done: list[int] = []
    for part, some in enumerate(found.rows):
        if done:
            left = [row for row in range(rows) if row not in done]
            best = -torch.linalg.solve(damped[left][:, left], damped[left][:, done] @ lost[0, done])
            at = [left.index(row) for row in some.tolist()]
            assert torch.allclose(-best[at], found.made_up(part, lost)[0], atol=1e-8)
        done += some.tolist()
        lost[0, some] = torch.randn(len(some), 3).double()
    mean = sum(len(r) * p.item() for r, p in zip(found.rows, found.powers(), strict=True)) / rows
    assert mean == pytest.approx(1)


def test_no_effects_are_none():
    assert RowEffects.of(torch.zeros(1, 4, 4)) is None
    assert RowEffects.of(torch.ones(2, 1, 1)) is None
    assert RowEffects.of(torch.full((1, 2, 2), torch.nan)) is None


def wide(seed=0):
    """A wide network of few answers, whose hidden outputs do much the same, and its inputs."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    with torch.no_grad():
        net[4].weight *= 6
    return net, torch.randn(2_000, 20) @ torch.randn(20, 20)


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0])
def test_the_same_bits_lose_less(step):
    """Beside what takes all outputs' errors for alike."""
    net, inputs = wide()
    labels = net(inputs).argmax(1).detach()
    train, val = [(inputs[:1000], labels[:1000])], [(inputs[1000:], labels[1000:])]
    criterion = nn.CrossEntropyLoss()
    float_outcome, found = outcome(net, val, criterion), {}
    for weighed in (False, True):
        tensors = {
            name: Choice.of(CODED | {"scale": step * p.std().item(), "effects": weighed})
            if name in ("0.weight", "2.weight")
            else Choice("uniform", bits=8)
            for name, p in net.named_parameters()
        }
        quantized = quantize(net, Strategy(tensors), train)
        measured = compare(outcome(quantize_model(net, quantized), val, criterion), float_outcome)
        found[weighed] = mean_bits(net, quantized), measured["fidelity"]
    assert found[True][0] < 1.1 * found[False][0]
    assert found[True][1] < 0.85 * found[False][1]


def test_outputs_that_seem_to_do_nothing_stay_near():
    """An output whose effect on the examples is 0 is not rounded to anything."""
    net, inputs = wide()
    with torch.no_grad():
        net[2].weight[:, 5] = 0.0
        net[0].weight[5] = torch.randn(20)
    choice = Choice.of(CODED | {"scale": 0.3, "effects": True})
    tensors = {n: choice if n == "0.weight" else None for n, _ in net.named_parameters()}
    made = quantize(net, Strategy(tensors), [(inputs,)]).tensors["0.weight"].dequantize()
    off = (made - net[0].weight).square().mean(1)
    assert off[5] < 4 * off.mean()


def test_groups_of_a_convolution_have_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    batches = calibration_batches([(torch.randn(20, 4, 5, 5),)], net)
    network = Calibration(net, batches)
    ((_, moments),) = network.moments(["0.weight"], effects=True)
    found = [each.effects for each in moments.values()]
    assert [tuple(each.shape) for each in found] == [(3, 3), (3, 3)]
    assert not torch.equal(*found)
    # asked for without, as they were
    ((_, moments),) = network.moments(["0.weight"])
    assert all(each.effects is None for each in moments.values())


@pytest.mark.parametrize("given", [{"effects": True, "rate": 0.0}, {"effects": 1}])
def test_effects_need_a_rate(given):
    with pytest.raises(ValueError, match=r"effects is .*: False, or True where rate is above 0"):
        Choice.of(CODED | {"scale": 1.0} | given)
