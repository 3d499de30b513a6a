"""Fitted scales: nearer to the float network on inputs held out, or as they were."""

import copy

import pytest
import torch
from conftest import divergence
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from test_replay import NETWORKS
from test_survey import cases, measurements_of
from torch import nn

from quantifind.certification.goal import Goal
from quantifind.metrics import outcome
from quantifind.mixed_precision import adjusted_scales
from quantifind.mixed_precision.adjusted_scales import adjust_scales
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.search_space import default_search_space
from quantifind.mixed_precision.sensitivity import measure_sensitivity
from quantifind.network.modules import named_tensors
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.runtime import scale_fitting
from quantifind.runtime.scale_fitting import HELD_OUT, Fitted, fit_scales
from quantifind.search import find_strategy
from quantifind.strategy import Strategy, uniform_activations
from quantifind.tensor.stored_scales import stored_scale
from quantifind.utils.batches import batches_of

OTHERS = ["tied", "attention", "turned weight", "residual", "transformer", "batch's own statistics"]
CHOICES = [
    {"bits": 2, "half_integer": True},
    {"bits": 2, "axis": 0, "scale_dtype": "float16"},
    {"bits": 3, "axis": 0, "scale_dtype": "power_of_two"},
    {"bits": 3, "axis": 0, "group": 2, "zero_point": True},
    {"scheme": "codebook", "bits": 2},
    {"scheme": "minifloat", "bits": 4, "axis": 0},
]


def case(name):
    """A network, its criterion, and a batch of all examples."""
    torch.manual_seed(0)
    if name in cases():
        net, inputs, targets, criterion = cases()[name]
        return net.eval(), criterion, (inputs, targets)
    net, inputs = NETWORKS[name]()
    return net.eval(), None, (inputs,)


def on_grid(net, choice, **more):
    choices = {
        name: {"scheme": "uniform", **choice} if p.dim() > 1 else None
        for name, p in named_tensors(net).items()
    }
    return Strategy(choices, **more)


def fitted(net, criterion, data, start, **options):
    return fit_scales(net, start, list(batches_of([data], net)), criterion, **options)


def mean_divergence(net, criterion, data, quantized):
    ours = outcome(quantize_model(net, quantized), [data], criterion)
    wanted = outcome(net, [data], criterion)
    return divergence(ours, wanted).sum() / float(wanted["weight"].double().sum())


def held_out(data, seed):
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    rows = order[: len(order) // HELD_OUT]
    return tuple(part[rows] for part in data)


@given(
    st.sampled_from([*cases(), *OTHERS]),
    st.sampled_from(CHOICES),
    st.integers(0, 3),
    st.sampled_from([1e-3, 1e-2, 1.0]),
)
@given_settings(max_examples=12)
def test_outputs_of_inputs_held_out_are_never_further(name, choice, seed, rate):
    net, criterion, data = case(name)
    state, start = copy.deepcopy(net.state_dict()), quantize(net, on_grid(net, choice))
    before = torch.get_rng_state()
    found = fitted(net, criterion, data, start, seed=seed, learning_rate=rate)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    if found.note or found.after == found.before:
        assert found.quantized is start
    if found.note:
        assert name == "batch's own statistics" or choice.get("scheme") == "codebook"
        return
    assert found.after <= found.before
    unseen = held_out(data, seed)
    for quantized, apart in ((start, found.before), (found.quantized, found.after)):
        wanted = mean_divergence(net, criterion, unseen, quantized)
        assert apart == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert mean_bits(net, found.quantized) == mean_bits(net, start)
    for key, tensor in found.quantized.tensors.items():
        old = start.tensors[key]
        assert torch.equal(tensor.codes, old.codes)
        if old.qparams.scale is not None:
            new = tensor.qparams.scale
            assert (new.dtype, new.shape) == (old.qparams.scale.dtype, old.qparams.scale.shape)
            assert torch.equal(new.float().sign(), old.qparams.scale.float().sign())
    again = fitted(net, criterion, data, start, seed=seed, learning_rate=rate)
    assert (again.before, again.after, again.examples) == (
        found.before,
        found.after,
        found.examples,
    )
    for key, tensor in found.quantized.tensors.items():
        assert torch.equal(tensor.dequantize(), again.quantized.tensors[key].dequantize())


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("softmax", {"bits": 3}),
        ("numbers", {"bits": 3, "axis": 0, "group": 3}),
        ("positions", {"bits": 3, "axis": 0}),
        ("attention", {"bits": 3, "axis": 0}),
    ],
    ids=str,
)
def test_scales_that_are_wrong_by_known_factors_are_found_again(name, choice):
    """Of a network that its codes represent exactly."""
    net, criterion, data = case(name)
    exact = quantize(net, on_grid(net, choice))
    net = quantize_model(net, exact)
    generator = torch.Generator().manual_seed(1)
    wrong = {}
    for key, tensor in exact.tensors.items():
        scale = tensor.qparams.scale
        factors = 4 ** torch.rand(scale.shape, generator=generator) / 2
        wrong[key] = stored_scale(scale.double() * factors, scale.dtype)
    start = exact.with_scales(wrong)
    found = fitted(net, criterion, data, start, epochs=20, learning_rate=3e-2)
    assert found.after < 1e-2 * found.before
    whole = [mean_divergence(net, criterion, data, q) for q in (start, found.quantized)]
    assert whole[1] < 1e-2 * whole[0]


class Turned(nn.Module):
    """A parameter over the memory of another."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.turned = nn.Parameter(self.weight.detach().t())

    def forward(self, x):
        return (x @ self.weight).tanh() @ self.turned[:, :3]


@pytest.mark.parametrize("name", [*cases(), "tied", "turned"])
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    net, criterion, data = (
        (Turned(), None, (torch.randn(20, 6),)) if name == "turned" else case(name)
    )
    batch = next(batches_of([tuple(part[:20] for part in data)], net))
    start = quantize(net, on_grid(net, {"bits": 3, "axis": 0}))
    names = list(start.tensors)
    fit = scale_fitting._Fit(net, start, names, criterion, 1.0)
    with fit.differentiable():
        assert fit.backward(batch, 1.0)

    def loss(key, moved):
        scale = start.tensors[key].qparams.scale
        other = start.with_scales({key: (scale.double() * (moved * step).exp()).float()})
        with torch.no_grad():
            apart, count = scale_fitting._Fit(net, other, names, criterion, 1.0).divergence(
                batch, scale_fitting.SOFTENING
            )
        return apart.item() / count

    for key in names:
        step = torch.linspace(0.5, 1.5, len(fit.log_factors[key])).double()[:, None]
        wanted = (loss(key, 1e-2) - loss(key, -1e-2)) / 2e-2
        found = (fit.log_factors[key].grad * step).sum().item()
        assert found == pytest.approx(wanted, rel=0.1, abs=1e-5)


def test_labels_say_nothing():
    net, criterion, (inputs, labels) = case("softmax")
    start = quantize(net, on_grid(net, {"bits": 2, "axis": 0}))
    one, other = (
        fitted(net, criterion, (inputs, given), start) for given in (labels, labels.flip(0))
    )
    assert one.after < one.before
    for key, tensor in one.quantized.tensors.items():
        assert torch.equal(tensor.dequantize(), other.quantized.tensors[key].dequantize())


def test_activations_stay():
    net, criterion, data = case("softmax")
    activations = uniform_activations(net, [data], 4)
    start = quantize(net, on_grid(net, {"bits": 3}, activations=activations), [data])
    found = fitted(net, criterion, data, start)
    assert found.quantized.activations is start.activations
    assert found.after < found.before


class Hard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()


class NoGradient(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.head = kind, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        if self.kind == "function":
            return Hard.apply(self.head(self.layer(x)))
        with torch.no_grad() if self.kind == "no_grad" else torch.inference_mode():
            return self.head(self.layer(x))


@pytest.mark.parametrize("kind", ["function", "no_grad", "inference_mode"])
def test_without_gradients_scales_stay_and_the_search_says_so(kind):
    torch.manual_seed(0)
    net, batches = NoGradient(kind).eval(), [torch.randn(50, 4)] * 2
    start = quantize(net, on_grid(net, {"bits": 2}))
    found = fit_scales(net, start, list(batches_of(batches, net)))
    assert found.quantized is start
    assert "gradient" in found.note
    if kind == "function":
        return
    answer = find_strategy(
        net, batches, batches, limit={"relative_error": 0.3}, widths=[2, 4, 8], effort=1e4
    )
    assert any("gradient" in said for said in answer.passes.left_out)


def test_one_batch_that_stays_whole_holds_nothing_out():
    net, _, data = case("batch's own statistics")
    found = fitted(net, None, data, quantize(net, on_grid(net, {"bits": 2})))
    assert "too few batches" in found.note


def some_candidates(name, bits):
    measurements = measurements_of(name)
    space = default_search_space(measurements.model, measurements.facts, [bits])
    sensitivity = measure_sensitivity(measurements, space)
    allocation = Allocation.of(measurements, sensitivity, Goal.of(None, 32.0))
    candidates = Candidates(measurements, allocation, 0.95)
    strategies = list(allocation.uniform_strategies())
    return candidates, candidates.measure(
        [candidates.trial("uniform", s, allocation.alone(s.tensors, {})) for s in strategies]
    )


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", list(cases()))
def test_adjusted_scales_are_never_worse(name, drawn, monkeypatch):
    """By the goal, the divergence, and right answers; whatever scales were fitted."""
    if drawn:
        generator = torch.Generator().manual_seed(0)

        def draw(model, quantized, batches, criterion, **options):
            spread = 0.1 * torch.rand(1, generator=generator).item()
            scales = {
                key: (
                    tensor.qparams.scale.double()
                    * (spread * torch.randn(tensor.qparams.scale.shape, generator=generator)).exp()
                ).to(tensor.qparams.scale.dtype)
                for key, tensor in quantized.tensors.items()
            }
            return Fitted(quantized.with_scales(scales))

        monkeypatch.setattr(adjusted_scales, "fit_scales", draw)
    kept = tried = 0
    candidates, rows = some_candidates(name, 2)
    for row in rows:
        if candidates.is_whole(row):
            other, tried = adjust_scales(candidates, row), tried + 1
            kept += other is not row
            assert other["scales_adjusted"] == (other is not row)
            assert candidates.rows[other["key"]] is other
            ours, theirs = (candidates.columns(one) for one in (row, other))
            assert other["criterion_ratio_bound"] <= row["criterion_ratio_bound"]
            assert theirs["divergence"].sum() <= ours["divergence"].sum()
            if "correct" in ours:
                assert theirs["correct"].sum() >= ours["correct"].sum()
    assert tried
    assert drawn or kept


def test_one_that_was_given_up_stays():
    candidates, (row, *_) = some_candidates("softmax", 2)
    assert adjust_scales(candidates, {**row, "examples": 1})["examples"] == 1
