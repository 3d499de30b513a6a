"""Moments of many weights in few passes, with those of each weight alone and of all positions, of
torch's own sums, as oracles."""

import copy
import itertools
import math
import os

import pytest
import torch
from conftest import quantize_alone
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from quantifind.mixed_precision.search_space import default_search_space
from quantifind.network import calibrated as calibrated_module
from quantifind.network import parts as parts_module
from quantifind.network.inputs import Inputs
from quantifind.network.moments import layer_moments
from quantifind.network.parts import EXAMPLES, all_parts, enough, passes, waves
from quantifind.network.trace import trace, weight_uses
from quantifind.quantize import (
    Calibration,
    quantize,
    quantize_each,
    quantize_within,
    sequential_examples,
)
from quantifind.storage import artifact
from quantifind.strategy import Strategy, uniform_activations
from quantifind.tensor.choice import Choice
from quantifind.tensor.matrices import Matrices
from quantifind.utils import memory
from quantifind.utils.devices import LEAST, allowed_bytes

NEAREST = {"scheme": "uniform", "bits": 3, "axis": 0}
GPTQ = NEAREST | {"rounding": "gptq"}


class Many(nn.Module):
    """A table that is the head too, three maps of the same input, an attention's packed ones, and
    convolutions of one input, whole and in groups."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, groups=4)
        self.narrow, self.again = nn.Conv1d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, codes):
        x = self.table(codes)
        x = torch.tanh(self.q(x) * self.k(x) + self.v(x))
        x = x + self.attention(x, x, x)[0]
        y = x.transpose(1, 2)
        y = self.wide(y)[..., 1:-1] + self.grouped(y) + self.narrow(y)[..., 1:-1]
        x = self.again(self.again(y.transpose(1, 2)).relu())
        return x @ self.table.weight.t()


@pytest.fixture
def many():
    torch.manual_seed(0)
    net = Many().eval()
    batches = [(torch.randint(9, (n, 7)),) for n in (5, 3)]
    work = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            if name in ("q.weight", "k.bias", "wide.weight", "again.bias"):
                parameter.mul_(8).round_().div_(8)
    facts = trace(net, batches)
    return net, work, batches, facts, list(weight_uses(facts))


def counting(act):
    """How many passes of a network ``act`` begins."""
    count, _depth = 0, 0

    def enter(module, _):
        nonlocal count
        count += isinstance(module, Many | Deep)

    handle = register_module_forward_pre_hook(enter)
    try:
        act()
    finally:
        handle.remove()
    return count


def assert_equal(found, wanted):
    assert list(found) == list(wanted)
    for one, other in zip(found.values(), wanted.values(), strict=True):
        assert one.positions == other.positions
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.outputs, other.outputs)
        assert (one.counts is None) == (other.counts is None)
        assert one.counts is None or torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("most", [math.inf, 7_000, 5_000])
def test_moments_of_many_are_those_of_each(many, partly, most):
    net, work, batches, facts, names = many
    options = {"work": work if partly else None}
    found = {}
    count = counting(
        lambda: found.update(layer_moments(net, names, batches, facts, max_memory=most, **options))
    )
    assert list(found) == names
    for name in names:
        (wanted,) = layer_moments(net, [name], batches, facts, **options)
        assert_equal(found[name], wanted[1])
    needed = len([*passes(all_parts(names, facts, most), most)])
    assert (needed == 1) == (most == math.inf)
    assert count == needed * len(batches) * (1 + partly)


@pytest.mark.parametrize("partly", [False, True])
def test_what_meets_the_same_has_the_same_moments(many, partly):
    net, work, batches, facts, names = many
    found = dict(layer_moments(net, names, batches, facts, work=work if partly else None))
    first = {name: next(iter(moments.values())).inputs for name, moments in found.items()}
    same = {frozenset(n for n in names if first[n] is first[name]) for name in names}
    assert {"q.weight", "k.weight", "v.weight"} in same
    # the head's, of another form: its weight is the table
    assert {"table.weight"} in same
    assert {"wide.weight"} in same
    assert {"grouped.weight"} in same
    three = found["attention.in_proj_weight"].values()
    assert len({id(moments.inputs) for moments in three}) == 1


@pytest.mark.parametrize("between", ["nothing", "in place", "a view in place", "other values"])
def test_what_changes_between_two_is_not_shared(between):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            first = self.one(x)
            if between == "in place":
                x += 1
            elif between == "a view in place":
                x[1:].mul_(2)
            elif between == "other values":
                del x
                x = torch.ones_like(first)  # in the memory of the one before, perhaps
            return first + self.two(x)

    torch.manual_seed(0)
    net, batches = Two(), [(torch.randn(20, 4),)] * 3
    facts = trace(net, batches)
    assert (facts[0].meets == facts[1].meets) == (between == "nothing")
    found = dict(layer_moments(net, ["one.weight", "two.weight"], batches, facts))
    one, two = (next(iter(found[name].values())).inputs for name in found)
    assert (one is two) == (between == "nothing")
    (alone,) = dict(layer_moments(net, ["two.weight"], batches, facts))["two.weight"].values()
    assert torch.equal(two, alone.inputs)


def test_memory_used_anew_is_another():
    inputs = Inputs()
    numbers = [inputs.number(torch.zeros(1000)) for _ in range(50)]
    assert len(set(numbers)) == 50
    x = torch.zeros(4, 6)
    assert inputs.number(x) == inputs.number(x)
    assert inputs.number(x.view(-1)) == inputs.number(x.view(-1)) != inputs.number(x)
    assert inputs.number(x[1:]) == inputs.number(x[1:]) != inputs.number(x[:3])
    assert inputs.number(x, 1) != inputs.number(x, 2)
    with torch.inference_mode():
        y = torch.zeros(3)
        assert inputs.number(y) != inputs.number(y)


def test_what_is_met_together_in_float_alone_is_summed_apart():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.one(x) + self.two(x if bool((x > -9).all()) else x - 1)

    torch.manual_seed(0)
    net, batches = Choosing(), [(torch.randn(20, 4),), (torch.randn(20, 4),)]
    facts, names = trace(net, batches), ["one.weight", "two.weight"]
    assert facts[1].meets == facts[2].meets
    work = copy.deepcopy(net)
    with torch.no_grad():
        work.first.bias.sub_(20)
    found = dict(layer_moments(net, names, batches, facts, work=work))
    x = torch.cat([x for (x,) in batches])
    for name, seen in zip(names, (work.first(x), net.first(x)), strict=True):
        seen = seen.detach().double()
        (moments,) = found[name].values()
        torch.testing.assert_close(moments.inputs, seen.T @ seen, rtol=1e-5, atol=1e-3)


@st.composite
def weights(draw):
    """A contiguous tensor and matrices of it: its axes dealt to groups, outputs and inputs."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(math.prod(sizes)).reshape(sizes)
    order = draw(st.permutations(range(len(sizes))))
    dealt = [draw(st.sampled_from(["groups", "outputs", "inputs"])) for _ in order]
    axes = {
        kind: tuple(
            (sizes[a], tensor.stride(a)) for a, to in zip(order, dealt, strict=True) if to == kind
        )
        for kind in ("groups", "outputs", "inputs")
    }
    return tensor, Matrices(0, **axes)


@given(weights(), st.integers(1, 30))
def test_blocks_are_the_inputs_one_after_another(weight, most):
    tensor, matrices = weight
    blocks = list(matrices.blocks(most))
    assert all(1 <= block.shape[2] <= most for block in blocks)
    assert torch.equal(torch.cat([b.of(tensor) for b in blocks], 2), matrices.of(tensor))
    if len(matrices.inputs) == 1:
        counts = [block.shape[2] for block in blocks]
        assert len(counts) == -(-matrices.shape[2] // most)
        assert max(counts) - min(counts) <= 1


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv1d(6, 24, 3, padding=1), nn.Conv1d(24, 8, 5, groups=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.conv(self.first(x).cumsum(1)).relu().mean(-1))


@pytest.fixture
def wide():
    torch.manual_seed(0)
    net, batches = Wide(), [(torch.randn(n, 6, 16),) for n in (40, 30)]
    return net, batches


def test_blocks_of_inputs_where_memory_is_short(wide):
    net, batches = wide
    facts, name = trace(net, batches), "conv.weight"
    work = copy.deepcopy(net)
    with torch.no_grad():
        work.first.weight.mul_(8).round_().div_(8)
    ((_, whole),) = layer_moments(net, [name], batches, facts, work=work)
    most = 8 * 2 * 60 * 25  # of 60 inputs of each group
    ((_, found),) = layer_moments(net, [name], batches, facts, work=work, max_memory=most)
    assert sum(8 * m.inputs.numel() for m in found.values()) <= most
    (matrices,) = (p.matrices for p in facts if p.weight == name)
    assert list(found) == [m for block in matrices.blocks(25) for m in block.each()]
    by_group = list(whole.values())
    for index, (block, moments) in enumerate(found.items()):
        group, first = index % 2, 20 * (index // 2)
        wanted = by_group[group].inputs[first : first + 20, first : first + 20]
        torch.testing.assert_close(moments.inputs, wanted, rtol=1e-5, atol=1e-4)
        outputs = block.of(net.conv.weight.detach())[0].double() @ moments.inputs
        torch.testing.assert_close(moments.outputs, outputs)


@pytest.mark.parametrize("scale", ["max_abs", "output_mse"])
def test_what_is_short_of_memory_is_said_and_loses_little(wide, scale):
    """Less in blocks than rounded to nearest, and no more than that with no memory at all."""
    net, batches = wide
    x = torch.cat([x for (x,) in batches])
    choices = dict.fromkeys(n for n, _ in net.named_parameters()) | {
        "conv.weight": GPTQ | {"scale": scale}
    }
    error, notes = {}, {}
    for most in (math.inf, 8 * 2 * 60 * 25, 100):
        found = quantize(net, Strategy(choices), batches, max_memory=most)
        rounded = copy.deepcopy(net)
        rounded.conv.weight.data = found.tensors["conv.weight"].dequantize()
        with torch.no_grad():
            met = net.first(x).cumsum(1)
            error[most] = (rounded.conv(met) - net.conv(met)).square().sum().item()
        notes[most] = found.notes
        assert artifact.unpack(*artifact.pack(found)).notes == found.notes
    whole, blocks, none = error
    assert error[whole] < error[blocks] < error[none]
    assert notes[whole] == {}
    assert "in blocks of 20 of its 60 inputs" in notes[blocks]["conv.weight"]
    assert "rounded to nearest" in notes[none]["conv.weight"]


@pytest.mark.parametrize("storage", ["packed", "coded"])
def test_inputs_that_are_never_met_are_said(storage):
    """And take next to nothing coded, whatever the weights there were."""
    torch.manual_seed(0)
    net, x = nn.Linear(1000, 64), torch.randn(200, 1000)
    x[:, 300:] = 0
    choice = {"scheme": "uniform", "levels": 9, "rounding": "gptq", "storage": storage}
    sizes = []
    for inputs in (x, x[:, :300]):
        net = nn.Linear(inputs.shape[1], 64)
        found = quantize(net, Strategy({"weight": choice, "bias": None}), [(inputs,)])
        sizes.append(found.tensors["weight"].stored_bits)
        said = found.notes.get("weight", "")
        assert said.startswith("700 of its 1,000 inputs are 0" if len(sizes) == 1 else "")
        assert (said == "") == (len(sizes) == 2)
    assert sizes[0] < (1.08 * sizes[1] if storage == "coded" else math.inf)


def test_many_inputs_are_offered_to_gptq():
    """Of which the moments of all together would take 34 GB."""
    net = nn.Conv1d(1024, 2, 64)
    space = default_search_space(net, trace(net, [(torch.zeros(1, 1024, 64),)]))
    assert any(choice.rounding == "gptq" for choice in space.tensors["weight"])
    (parts,) = all_parts(["weight"], trace(net, [(torch.zeros(1, 1024, 64),)]), 2**40).values()
    assert max(block.shape[2] for block in parts[0].blocks) <= parts_module.BLOCK


@pytest.mark.parametrize("partly", [False, True])
def test_some_positions_tell_what_all_do(monkeypatch, partly):
    """Inputs and wanted outputs are of the same positions, which stand for all in the mean."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    batches = [(torch.randn(20, 3, 12, 12).cumsum(-1) + 1,) for _ in range(4)]
    facts, names = trace(net, batches), ["0.weight", "2.weight"]
    options = {"work": copy.deepcopy(net) if partly else None}
    every = dict(layer_moments(net, names, batches, facts, **options))
    monkeypatch.setattr(parts_module, "POSITIONS", 3_000)
    monkeypatch.setattr(parts_module, "POSITIONS_PER_INPUT", 16)
    monkeypatch.setattr(parts_module, "VALUES", 0)
    some = dict(layer_moments(net, names, batches, facts, **options))
    for name in names:
        (wanted,), (found,) = every[name].values(), some[name].values()
        assert found.positions == wanted.positions > 6_000
        assert not torch.equal(found.inputs, wanted.inputs)
        weight = net.get_parameter(name).detach().double().flatten(1)
        for moments in (wanted, found):
            outputs = weight @ moments.inputs
            scale = outputs.abs().max().item()
            torch.testing.assert_close(moments.outputs, outputs, rtol=0, atol=1e-5 * scale)
        # errors of 1 in the root of the positions taken, and those of neighbours
        lost = (found.inputs - wanted.inputs).norm() / wanted.inputs.norm()
        assert lost < 4 / math.sqrt(3_000)


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20))
def test_waves_are_few_and_what_meets_the_same_is_together(changes, most):
    inputs = [sum(changes[: i + 1]) for i in range(len(changes))]
    names = [f"{i}" for i in range(len(inputs))]

    class Fake:
        met = True

        def __init__(self, meets):
            self.meets = meets

    found = waves(names, {n: [Fake(m)] for n, m in zip(names, inputs, strict=True)}, most)
    assert [name for wave in found for name in wave] == names
    assert len(found) <= most
    assert all(found)
    if len(names) <= most:
        assert found == [[name] for name in names]
        return
    wave_of = {name: i for i, wave in enumerate(found) for name in wave}
    for a, b in itertools.pairwise(names):
        if inputs[int(a)] == inputs[int(b)]:
            assert wave_of[a] == wave_of[b]


@pytest.mark.parametrize(("depth", "count"), [(3, 1 + 5), (40, 1 + 31)])
def test_passes_of_a_strategy_do_not_grow_with_its_depth(depth, count):
    torch.manual_seed(0)
    net, x = Deep(depth), torch.randn(64, 4)
    choices = {n: GPTQ if p.dim() > 1 else None for n, p in net.named_parameters()}
    found = []
    assert counting(lambda: found.append(quantize(net, Strategy(choices), [(x,)]))) == count
    work, nearest = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for name, tensor in found[0].tensors.items():
            work.get_parameter(name).copy_(tensor.dequantize())
            parameter = nearest.get_parameter(name)
            parameter.copy_(Choice.of(NEAREST).quantize(parameter).dequantize())
        lost = [(other(x) - net(x)).square().sum() for other in (work, nearest)]
    assert lost[0] < lost[1]


class Counted(nn.Linear):
    rows = 0

    def forward(self, x):
        Counted.rows += len(x)
        return super().forward(x)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("depth", "waves"), [(3, 16), (12, 12), (12, 4), (12, 1), (30, 16)])
def test_what_sequential_rounding_takes_is_what_goes_through(depth, waves, beside):
    torch.manual_seed(0)
    model = nn.Sequential(*(Counted(6, 6) for _ in range(depth))).eval()
    network = Calibration(model, [(torch.randn(40, 6),) for _ in range(5)])
    choices = dict.fromkeys(network.tensors)
    choices |= {
        n: Choice.of({"scheme": "uniform", "bits": 3, "axis": 0, "rounding": "gptq"})
        for n in choices
        if "w" in n
    }
    if beside:  # biases that are rounded first
        choices |= {n: Choice.of({"scheme": "uniform", "bits": 8}) for n in choices if "bias" in n}
    strategy = Strategy(choices)
    taken = sequential_examples(network, strategy, waves)
    Counted.rows = 0
    quantize_within(network, strategy, waves)
    assert taken == pytest.approx(Counted.rows / depth, rel=1e-9)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.floats(1e-4, 1))
def test_as_many_batches_as_tell_enough(examples, share):
    class Fake:
        enough = share

    chosen = enough({"weight": [Fake()]}, examples)
    wanted = max(share, EXAMPLES / sum(examples))
    assert chosen == sorted(set(chosen))
    assert chosen[-1] < len(examples)
    if wanted >= 1:
        assert chosen == list(range(len(examples)))
    else:
        assert len(chosen) == math.ceil(wanted * len(examples))
        # one of each stretch
        for i, place in enumerate(chosen):
            assert math.floor(i * len(examples) / len(chosen)) <= place
            assert place < (i + 1) * len(examples) / len(chosen)


def test_what_few_batches_use_is_seen():
    """A convolution for inputs of one size, another for another, one batch after the other."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return (self.a if x.shape[-1] % 2 else self.b)(x)

    torch.manual_seed(0)
    batches = [(torch.randn(32, 1, size, size),) for size in (32, 33) * 32]
    choice = Choice.of({"scheme": "uniform", "bits": 4, "axis": 0, "rounding": "gptq"})
    net = Two().eval()
    strategy = Strategy(
        {name: choice if "weight" in name else None for name, _ in net.named_parameters()}
    )
    quantized = quantize(net, strategy, batches)
    assert not quantized.notes
    for name in ("a.weight", "b.weight"):
        off = quantized.tensors[name].dequantize() - net.get_parameter(name)
        assert off.norm() < 0.2 * net.get_parameter(name).norm()


def test_many_positions_of_few_examples_tell_what_all_do():
    torch.manual_seed(0)
    model = nn.Conv1d(3, 5, 3)
    batches = [(torch.randn(64, 3, 402).cumsum(1),) for _ in range(24)]
    network, seen = Calibration(model.eval(), batches), []
    assert len(network.facts) == 1
    hook = network.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    ((_, found),) = network.moments(["weight"])
    hook.remove()
    assert sum(seen) == network.examples(["weight"]) < 64 * 24 / 2
    x = torch.cat([x for (x,) in batches]).unfold(2, 3, 1).movedim(1, 2).flatten(2).flatten(0, 1)
    (moments,) = found.values()
    whole = x.double().T @ x.double()
    part = moments.inputs / moments.positions * len(x)
    assert (part - whole).norm() <= 0.1 * whole.norm()


@pytest.mark.parametrize("most", [math.inf, 5_000])
def test_each_of_many_is_as_alone(many, most):
    net, _, batches, _, names = many
    kinds = [GPTQ, NEAREST | {"scale": "weighted_mse"}, GPTQ | {"bits": 2}, NEAREST]
    kinds = [Choice.of(kind) for kind in kinds]
    choices = dict.fromkeys(reversed(names), kinds) | {"q.bias": [Choice("uniform", 3)]}
    network = Calibration(net, batches, max_memory=most)
    found = dict(quantize_each(network, choices))
    assert found.keys() == choices.keys()
    for name, some in choices.items():
        alone = quantize_alone(net, name, some, batches)
        for one, other in zip(found[name], alone, strict=True):
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.dequantize(), other.dequantize())


def test_rounded_activations_meet_on_their_levels(many):
    """Each weight on those of its own activation, whatever it meets together with others."""
    net, _, batches, _, _names = many
    activations = uniform_activations(net, batches, 3)
    tensors = dict.fromkeys(n for n, _ in net.named_parameters())
    together = quantize(
        net, Strategy(tensors | {"k.weight": GPTQ, "v.weight": GPTQ}, activations), batches
    )
    alone = quantize(net, Strategy(tensors | {"k.weight": GPTQ}, activations), batches)
    assert torch.equal(
        together.tensors["k.weight"].dequantize(), alone.tensors["k.weight"].dequantize()
    )


def test_free_memory_is_what_the_system_and_a_group_leave(monkeypatch, tmp_path):
    every = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_bytes() <= every
    for name, text in (("max", "5000"), ("now", "4000"), ("memory.stat", "anon 7\nfiles 300\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_GROUPS", [(str(tmp_path), "max", "now", "files")])
    assert memory.free_bytes() == 1300
    assert allowed_bytes(torch.device("cpu")) == LEAST  # rather than nothing
    (tmp_path / "max").write_text("max\n")
    assert memory.free_bytes() > 1300


def test_moments_are_kept_as_long_as_all_fit(monkeypatch):
    """Those of the network as it is; what is asked for again takes no pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [(torch.randn(32, 6),) for _ in range(2)]
    asked, passed = ["0.weight", "2.weight"], []
    monkeypatch.setattr(
        calibrated_module,
        "layer_moments",
        lambda *given, **options: passed.append(given[1]) or layer_moments(*given, **options),
    )
    # of inputs 6² and 8², of outputs 8 · 6 and 4 · 8
    enough = 8 * (36 + 64 + 48 + 32)
    for most, again in ((enough, []), (enough - 8, [asked])):
        network = Calibration(net, batches, max_memory=most)
        first = dict(network.moments(asked[:1])) | dict(network.moments(asked[1:]))
        passed.clear()
        kept = dict(network.moments(asked))
        assert passed == again
        for name in asked:
            for matrix, moments in kept[name].items():
                torch.testing.assert_close(moments.inputs, first[name][matrix].inputs)
                torch.testing.assert_close(moments.outputs, first[name][matrix].outputs)
        held = [m for each in network._kept.values() for m in each.values()]
        size = sum(m.inputs.nbytes + m.outputs.nbytes for m in held)
        assert size == (0 if again else enough)
        # what meets the inputs of a network in part quantized has its own
        dict(network.moments(asked, work=copy.deepcopy(net)))
        passed.clear()
        dict(network.moments(asked))
        assert passed == [asked]
