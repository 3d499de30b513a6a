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
from quantifind.quantize import mean_bits, quantize, quantize_model, quantize_within
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.gptq import Moments, gptq_layer
from quantifind.tensor.matrices import Matrices
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


class Words(nn.Module):
    """Sequences, (examples, positions) whole numbers → classes last; a weight is used twice."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(self.mix(self.table(x)).tanh()).tanh())


def dense():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(40, 5)


def grouped():
    layers = nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*layers), torch.randn(20, 4, 4, 4)


def words():
    return Words(), torch.randint(5, (20, 6))


CASES = {
    "softmax": (dense, nn.CrossEntropyLoss(), torch.zeros(40, dtype=torch.int64)),
    "sigmoid": (dense, nn.BCEWithLogitsLoss(), torch.zeros(40, 3)),
    "numbers": (dense, nn.MSELoss(), torch.zeros(40, 3)),
    "no targets": (dense, None, None),
    "groups": (grouped, nn.CrossEntropyLoss(), torch.zeros(20, dtype=torch.int64)),
    "sequences": (words, nn.CrossEntropyLoss(), torch.zeros(20, 6, dtype=torch.int64)),
}


def pulls(outputs, criterion):
    """The outputs times each column of a root of the divergence's Hessian, at a position each."""
    classes = {nn.CrossEntropyLoss: "softmax", nn.BCEWithLogitsLoss: "sigmoid"}.get(type(criterion))
    for example in range(len(outputs)):
        rows = outputs[example].reshape(-1, outputs.shape[-1])
        for row in rows:
            if classes == "softmax":
                share = row.detach().softmax(0)
                form = share.diag() - share.outer(share)
            elif classes == "sigmoid":
                share = row.detach().sigmoid()
                form = (share * (1 - share)).diag()
            else:
                form = torch.eye(len(row))
            values, vectors = torch.linalg.eigh(form)
            for value, vector in zip(values.clamp(min=0), vectors.T, strict=True):
                yield value.sqrt() * vector @ row


@pytest.mark.parametrize("case", CASES)
def test_effects_are_those_of_all_directions(case, monkeypatch):
    """Beside the exact sums, of each layer, group by group: of gradients of every direction."""
    torch.manual_seed(0)
    make, criterion, targets = CASES[case]
    net, inputs = make()
    draws = 100
    data = [(inputs,) if targets is None else (inputs, targets)] * draws
    monkeypatch.setattr(effects, "EXAMPLES", draws * len(inputs))
    batches = calibration_batches(data, net, criterion=criterion)
    found = output_effects(net, batches, trace(net, batches), criterion)
    seen = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, m, o)))
    wanted: dict[str, torch.Tensor] = {}
    for pull in pulls(net(inputs), criterion):
        gradients = torch.autograd.grad(pull, [o for _, _, o in seen], retain_graph=True)
        for (name, module, _), gradient in zip(seen, gradients, strict=True):
            groups = getattr(module, "groups", 1)
            rows = gradient.movedim(1, -1) if groups > 1 else gradient
            rows = rows.reshape(-1, groups, rows.shape[-1] // groups).movedim(1, 0)
            wanted[f"{name}.weight"] = wanted.get(f"{name}.weight", 0) + rows.mT @ rows
    assert {name for name, _ in found} == wanted.keys()
    for (name, _), each in found.items():
        off = each.float() / draws - wanted[name]
        assert off.norm() < 0.1 * wanted[name].norm(), name


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
    found = output_effects(net, batches, facts, max_memory=800)
    assert [name for name, _ in found] == ["0.weight"]
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
def test_hardly_more_bits_lose_less(step):
    """Beside what takes all outputs' errors for alike, at the same steps."""
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
    # which serve also where none are asked for
    ((_, same),) = network.moments(["0.weight"])
    assert all(same[matrices] is each for matrices, each in moments.items())


def test_effects_are_there_whenever_they_are_asked_for():
    """Whatever was asked for before, with them or without."""
    net, _ = wide()
    network = Calibration(net, [(torch.randn(40, 20),)])

    def asked(name, **how):
        ((_, moments),) = network.moments([name], **how)
        return next(iter(moments.values())).effects

    assert asked("0.weight") is None
    assert asked("0.weight", effects=True) is not None
    asked("2.weight")
    assert asked("2.weight", effects=True) is not None
    network.forget()
    assert asked("0.weight") is None
    assert asked("2.weight", effects=True) is not None


def test_a_forward_that_draws_leaves_the_random_state():
    """So that what is rounded after is the same with effects and without."""

    class Drawing(nn.Linear):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.rand_like(x))

    torch.manual_seed(0)
    net = nn.Sequential(Drawing(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = calibration_batches([(torch.randn(20, 4),)], net)
    facts, before = trace(net, batches), torch.get_rng_state()
    assert output_effects(net, batches, facts)
    assert torch.equal(before, torch.get_rng_state())


def test_of_many_examples_some_are_taken(monkeypatch):
    """But of a batch that a network takes as a whole, all."""
    torch.manual_seed(0)
    seen = []

    class Whole(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size, self.layer = size, nn.Linear(4, 3)

        def forward(self, x):
            seen.append(len(x))
            assert self.size in (None, len(x))
            return self.layer(x)

    monkeypatch.setattr(effects, "EXAMPLES", 64)
    for size, wanted in ((None, [32, 32]), (640, [32, 640])):
        net = Whole(size)
        batches = calibration_batches([(torch.randn(640, 4),)], net)
        facts = trace(net, batches)
        seen.clear()
        assert output_effects(net, batches, facts)
        assert seen == wanted


class Failing(nn.Module):
    """A pass that can't have gradients in some way, or does not take parts of a batch."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        hidden = self.first(x)
        if self.how == "numpy":
            hidden = torch.from_numpy(hidden.numpy())
        elif self.how == "out":
            hidden = torch.mul(hidden, 1, out=torch.empty(0))
        elif self.how == "in place":
            hidden = hidden.exp().mul_(hidden)
        elif self.how == "writes":
            self.mean.mul_(0.9).add_(hidden.mean(0) * 0.1)
            hidden = hidden - self.mean
        elif self.how == "whole":
            hidden = hidden.view(25, 2, 8).tanh().flatten(0, 1)
        elif self.how == "not a number":
            hidden = (hidden * (hidden > 0)).sqrt()
        elif self.how == "frozen":
            self.first.weight.requires_grad_(False).clamp_(-9, 9)
        return self.last(hidden)


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        ("numpy", {"first.weight", "last.weight"}),
        ("out", {"first.weight", "last.weight"}),
        ("not a number", {"first.weight"}),
        ("whole", set()),
        ("writes", set()),
        ("in place", {"first.weight", "last.weight"}),
        ("frozen", set()),
    ],
)
def test_effects_never_keep_a_network_from_being_quantized(how, lost):
    """What of them can't be had is said, and nothing else is."""
    torch.manual_seed(0)
    net, data = Failing(how), [(torch.randn(50, 6),)] * 2
    choice = Choice.of(CODED | {"scale": 0.1, "effects": True})
    tensors = {n: choice if p.dim() > 1 else None for n, p in net.named_parameters()}
    found = quantize(net, Strategy(tensors), data)
    assert {name for name, note in found.notes.items() if "alike" in note} == lost


def test_gradients_of_a_network_s_own_do_not_count():
    """Such as forces, of an energy."""

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x):
            energy = self.last(self.first(x).tanh())
            if torch.is_grad_enabled() and energy.requires_grad:
                torch.autograd.grad(energy.square().sum(), energy, create_graph=True)
            return energy

    torch.manual_seed(0)
    net = Forces()
    plain = nn.Sequential(net.first, nn.Tanh(), net.last)
    found = []
    for each in (net, plain):
        batches = calibration_batches([(torch.arange(30.0).reshape(10, 3) / 30,)], each)
        found.append(list(output_effects(each, batches, trace(each, batches)).values()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_whole_numbers_that_are_no_classes_count():
    """As targets, whatever they are."""
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(8, 4)
    found = []
    for targets in (-torch.ones(8, dtype=torch.int64), torch.ones(8)):
        batches = calibration_batches([(inputs, targets)], net)
        found.append(list(output_effects(net, batches, trace(net, batches)).values()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_an_embedding_that_is_a_head_says_that_its_outputs_are_alike():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, x):
            return self.table(x).mean(1) @ self.table.weight.T

    torch.manual_seed(0)
    net, choice = Tied(), Choice.of(CODED | {"scale": 0.1, "effects": True})
    found = quantize(net, Strategy({"table.weight": choice}), [(torch.randint(7, (30, 3)),)])
    assert "alike" in found.notes["table.weight"]


def test_a_group_without_effects_leaves_others_theirs():
    form = torch.cat([drawn_effects(4, 2, 0), torch.zeros(1, 4, 4).double()])
    both, one = RowEffects.of(form), RowEffects.of(form[:1])
    lost = torch.randn(2, 4, 3).double()
    order = torch.cat(both.rows)
    assert torch.equal(order, torch.cat(one.rows))
    assert torch.allclose(both.made_up(1, lost)[:1], one.made_up(1, lost[:1]))
    assert not both.made_up(1, lost)[1].any()


def test_rows_that_do_more_are_finer():
    """And what a bit weighs is less there."""
    torch.manual_seed(0)
    weights, x = torch.randn(256, 32).double(), torch.randn(200, 32).double()
    power = torch.ones(256).double()
    power[:128] = 30
    moments = Moments(x.T @ x, weights @ x.T @ x, len(x), effects=power.diag())
    choice = Choice.of(CODED | {"scale": 1.0, "rate": 0.5, "effects": True})
    (made,) = gptq_layer(weights, {Matrices.rows(weights.shape): moments}, [choice])
    off = (made.dequantize() - weights).square().mean(1)
    assert off[:128].mean() < 0.9 * off[128:].mean()


def test_a_criterion_says_what_answers_are():
    """As in a search, which knows it, so by hand."""
    torch.manual_seed(0)
    net, data = Words(), [(torch.randint(5, (60, 6)), torch.randint(3, (60, 6)))]
    choice = Choice.of(CODED | {"scale": 0.1, "effects": True})
    tensors = {n: choice if p.dim() > 1 else None for n, p in net.named_parameters()}
    criterion = nn.CrossEntropyLoss()
    found = quantize(net, Strategy(tensors), data, criterion=criterion)
    network = Calibration(net, data, criterion=criterion)
    wanted = quantize_within(network, Strategy(tensors))
    for name, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[name].codes, tensor.codes)


@pytest.mark.parametrize("given", [{"effects": True, "rate": 0.0}, {"effects": 1}])
def test_effects_need_a_rate(given):
    with pytest.raises(ValueError, match=r"effects is .*: False, or True where rate is above 0"):
        Choice.of(CODED | {"scale": 1.0} | given)
