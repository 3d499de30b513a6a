"""Any network is copied as it is, or refused in one line; what inference needs is counted once."""

import copy
import pickle
import threading
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import quantize_alone
from hypothesis import given
from test_strategy import intact
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from quantifind.costs import model_bytes
from quantifind.network.memory import owners, view_places
from quantifind.network.modules import named_buffers, named_tensors, plain_copy, stored_bytes
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.runtime import workers
from quantifind.runtime.student import Student
from quantifind.storage.store import fingerprint
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import as_batch
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.utils.pickling import dumps
from quantifind.workflow.evaluation_workflow import evaluate_strategies

UNIFORM = Choice("uniform", 4)


class Holds(nn.Module):
    """Parameters and buffers of any kind, and a pass that goes through ``compute``."""

    def __init__(self, compute, **tensors):
        super().__init__()
        self.compute = compute
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Module | nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return self.compute(self, x)


def parameter(values, trained=True):
    return nn.Parameter(values, trained and (values.is_floating_point() or values.is_complex()))


def transposed_head():
    words = nn.Embedding(8, 8)
    head = parameter(words.weight.detach().t())
    return Holds(lambda m, x: m.words(x.argmax(1)) @ m.head + x, words=words, head=head)


def flat_parts():
    flat = torch.randn(72)
    parts = {"a": parameter(flat[:64].view(8, 8)), "b": parameter(flat[64:])}
    return Holds(lambda m, x: F.linear(x, m.a, m.b) + m.flat[0], **parts, flat=flat)


def columns():
    whole = torch.randn(8, 8)
    halves = {"a": parameter(whole[:, :3]), "b": parameter(whole[:, 3:])}
    return Holds(lambda m, x: torch.cat([x @ m.a, x @ m.b], 1), **halves)


def numpys():
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    one, other = (parameter(torch.from_numpy(values)) for _ in range(2))
    return Holds(lambda m, x: F.linear(F.linear(x, m.one).relu(), m.other), one=one, other=other)


def views_in_buffers():
    weight = parameter(torch.randn(8, 8))
    row, turned = weight.detach()[2], weight.detach().t()
    return Holds(lambda m, x: x @ m.turned + m.row, weight=weight, row=row, turned=turned)


def all_kinds():
    dense = torch.randn(8, 8)
    sparse = dense.relu().to_sparse()
    return Holds(
        lambda m, x: (
            torch.sparse.mm(m.coo, x.T).T
            + (m.csr @ x.T).T
            + F.linear(x, m.narrow.float())
            + x[:, m.order]
            + (m.turns * x).real
            + m.single
            + torch.where(m.mask, x, 0)
            + m.few.dequantize()
            + m.nested.to_padded_tensor(0.0)[:1]
        ),
        coo=parameter(sparse),
        csr=sparse.to_sparse_csr(),
        narrow=parameter(dense.to(torch.float8_e4m3fn), False),
        order=parameter(torch.arange(7, -1, -1)),
        turns=parameter(torch.randn(8, dtype=torch.complex64)),
        single=parameter(torch.tensor(0.3)),
        empty=parameter(torch.zeros(0, 3)),
        mask=parameter(dense[0] > 0),
        few=torch.quantize_per_tensor(dense[0], 0.1, 0, torch.qint8),
        nested=torch.nested.nested_tensor([dense[0], dense[1, :3]]),
        expanded=parameter(torch.ones(1).expand(8)),
        short=parameter(dense.half()),
        rough=dense.bfloat16(),
    )


def closing_over():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first, second = net
    second.act = lambda x: x * second.weight[0]
    second.acts = {"one": [second.act, partial(lambda y, x: y + first(x), 0.0)]}
    forward = first.forward
    first.forward = lambda x: second.act(forward(x))
    second.register_forward_hook(lambda m, args, out: out + second.acts["one"][1](args[0]))
    second.register_forward_pre_hook(partial(lambda w, m, args: (args[0] @ w,), first.weight))
    return net


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), []
        self.turned = self.layer.weight.t()

    def forward(self, x):
        self.seen = [self.layer(x)]
        return x @ self.turned + self.seen[0]


def cached():
    net = Cached()
    net(torch.ones(1, 8))
    return net


def hooked(change):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    change(net[0])
    net(torch.randn(4, 8))
    return net


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_inside():
    net = nn.Sequential(compiled(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    net[1].compile(backend="eager")
    return nn.DataParallel(compiled(net))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(8, 4, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.cells(x[None])[0][0]


def normed():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    parametrizations.weight_norm(net[0])
    net(torch.randn(9, 8))
    return net


KINDS = {
    "transposed head": transposed_head,
    "parts of a flat buffer": flat_parts,
    "columns": columns,
    "memory of numpy": numpys,
    "views in buffers": views_in_buffers,
    "all kinds of tensors": all_kinds,
    "closing over": closing_over,
    "results of a pass": cached,
    "weight norm": lambda: hooked(weight_norm),
    "spectral norm": lambda: hooked(spectral_norm),
    "pruned": lambda: hooked(lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "parametrized": normed,
    "compiled": lambda: compiled(nn.Linear(8, 8)),
    "compiled inside": compiled_inside,
    "recurrent": Recurrent,
}


def made(kind):
    torch.manual_seed(0)
    return KINDS[kind]()


def pieces(net):
    return [*net.parameters(), *net.buffers()]


def dense(tensor):
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor
    return tensor.to_dense().double() if not tensor.is_complex() else tensor.to_dense()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_gives_the_same_and_is_apart(kind):
    net = made(kind)
    x, classes = torch.randn(4, 8), [type(module) for module in net.modules()]
    before = [dense(tensor).clone() for tensor in pieces(net)]
    replica = plain_copy(net)
    trained = [module.training for module in net.modules()]
    net.eval()
    replica.eval()
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(replica(x), wanted)
        assert not any("_orig_mod" in name for name in replica.state_dict())
        for tensor in replica.parameters():
            if tensor.dtype == torch.float32 and tensor.layout == torch.strided:
                tensor.mul_(0.5)
        assert not torch.equal(replica(x), wanted)
        assert torch.equal(net(x), wanted)
        assert torch.equal(plain_copy(plain_copy(net))(x), wanted)
    for was, now in zip(before, pieces(net), strict=True):
        assert torch.equal(was, dense(now))
    assert classes == [type(module) for module in net.modules()]
    assert trained == [True] * len(classes)


def test_results_of_a_pass_are_no_obstacle():
    net = made("results of a pass")
    replica = plain_copy(net)
    assert not replica.seen[0].requires_grad
    with torch.no_grad():
        replica.layer.weight.fill_(2.0)
    assert (replica.turned == 2).all()
    assert not (net.turned == 2).any()
    pickle.dumps(replica)  # a worker gets it


def test_functions_of_a_copy_are_its_own():
    net, x = made("closing over"), torch.randn(4, 8)
    replica = plain_copy(net)
    with torch.no_grad():
        for tensor in replica.parameters():
            tensor.zero_()
    assert not replica(x).any()
    assert net(x).all()
    assert replica[1].acts["one"][0] is replica[1].act


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def apply(self, x):
        return x @ self.weight


def by_default(w):
    return lambda x, *, w=w: x @ w


def by_name(w):
    names = {"held": w}
    exec("def f(x): return (lambda y: y @ held)(x)", names)
    return names["f"]


HOLDING = {
    "itself": lambda w: lambda x: x @ w,
    "a list": lambda w: (lambda held: lambda x: x @ held[0])([w]),
    "a set in a dict": lambda w: (lambda held: lambda x: x @ next(iter(held["w"])))({"w": {w}}),
    "a partial": lambda w: (lambda held: lambda x: held(x))(partial(torch.matmul, other=w)),
    "an object": lambda w: (lambda held: lambda x: x @ held.w)(SimpleNamespace(w=w)),
    "slots": lambda w: (lambda held: lambda x: x @ held.weight)(Slotted(w)),
    "a method": lambda w: (lambda held: lambda x: held(x))(Slotted(w).apply),
    "a function in a list": lambda w: (lambda held: lambda x: held[0](x))([lambda x: x @ w]),
    "a partial of a function": lambda w: partial(lambda f, x: f(x), lambda x: x @ w),
    "an object of functions": lambda w: SimpleNamespace(f=lambda x: x @ w).f,
    "a default": lambda w: lambda x, w=w: x @ w,
    "a named default": by_default,
    "a global name": by_name,
}


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize("within", [False, True])
def test_what_functions_close_over_is_the_copys(kind, within):
    """The copy's function computes with the copy's weight, the network's with its own."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            function = HOLDING[kind](self.weight)
            self.function = SimpleNamespace(inner=[function]) if within else function

        def forward(self, x):
            return (self.function.inner[0] if within else self.function)(x)

    net, x = Holds(), torch.randn(5, 4)
    wanted = net(x)
    replica = plain_copy(plain_copy(net))
    with torch.no_grad():
        replica.weight.fill_(2.0)
    torch.testing.assert_close(replica(x), x @ replica.weight)
    assert torch.equal(net(x), wanted)


def test_what_holds_a_networks_tensors_and_cannot_be_copied_is_named():
    class Held:
        def __init__(self, weight):
            self.weight, self.lock = weight, threading.Lock()

    net = nn.Linear(3, 3)
    held = Held(net.weight)
    net.act = lambda x: x * held.weight
    with pytest.raises(
        ValueError, match=r"closes over a Held, .* can't be copied \(TypeError: "
    ) as e:
        plain_copy(net)
    assert "\n" not in str(e.value)
    other = Held(torch.ones(3))  # which is none of the network's
    net.act = lambda x: x * other.weight
    assert plain_copy(net).act.__closure__[0].cell_contents is other


def test_attributes_of_parameters_are_kept():
    net = nn.Linear(2, 2)
    net.weight.is_shared = True
    assert plain_copy(net).weight.is_shared


@st.composite
def views(draw):
    """Some views of one memory, and of each the places that it has there."""
    memory, found = torch.randn(24), {}
    for number in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        steps = draw(st.sampled_from([(columns, 1), (1, rows), (6, 1), (8, 2), (0, 1)]))
        most = 23 - (rows - 1) * steps[0] - (columns - 1) * steps[1]
        start = draw(st.integers(0, min(most, 6)))
        view = memory.as_strided((rows, columns), steps, start)
        places = [start + i * steps[0] + j * steps[1] for i in range(rows) for j in range(columns)]
        found[f"part{number}"] = view, places
    return found


@given(views())
def test_whose_memory_it_is(drawn):
    """Sets of places tell who owns, who is a view, and who is refused."""
    parameters = {name: nn.Parameter(view) for name, (view, _) in drawn.items()}
    sets = {name: set(places) for name, (_, places) in drawn.items()}
    repeats = {name for name, (_, places) in drawn.items() if len(places) > len(set(places))}
    net = nn.ParameterDict(parameters)

    # the largest first, those that repeat nothing before those that do
    def rank(name):
        return -len(sets[name]), name in repeats, not parameters[name].is_contiguous(), name

    order = sorted(sets, key=rank)
    own, wanted, refused = [], {}, False
    for name in order:
        meets = [other for other in own if sets[name] & sets[other]]
        if not meets:
            own.append(name)
        elif len(meets) > 1 or not sets[name] <= sets[meets[0]] or meets[0] in repeats:
            refused = True
        else:
            wanted[name] = meets[0]
    if refused:
        with pytest.raises(ValueError, match="shares a part of its memory with part") as caught:
            plain_copy(net)
        assert len(str(caught.value).splitlines()) == 1
        return
    assert owners(dict(net.named_parameters())) == wanted
    assert list(named_tensors(net)) == [name for name in sets if name not in wanted]
    # an expanded one that is alone has memory for all its values once it is copied
    alone = sum(len(drawn[n][1]) if n in repeats else len(sets[n]) for n in named_tensors(net))
    replica = plain_copy(net)
    assert sum(stored_bytes(replica).values()) == 4 * alone
    places = view_places(dict(replica.named_parameters()))
    with torch.no_grad():
        for name in named_tensors(net):
            replica[name].copy_(torch.randn(replica[name].shape))
        for name, owner in wanted.items():
            values = dict(zip(drawn[owner][1], replica[owner].flatten().tolist(), strict=True))
            assert replica[name].flatten().tolist() == [values[p] for p in drawn[name][1]]
            if name in places:  # not one with another that is the same view
                of, index = places[name]
                assert of == owner
                assert torch.equal(replica[owner].flatten()[index], replica[name])


def test_views_stay_views_on_a_worker():
    for kind in ("transposed head", "columns", "views in buffers", "recurrent"):
        net, x = plain_copy(made(kind)).eval(), torch.randn(4, 8)
        back = pickle.loads(dumps({"net": net, "again": net}))
        assert back["again"] is back["net"]
        wanted = net(x)
        assert torch.equal(back["net"](x), wanted)
        with torch.no_grad():
            for model in (net, back["net"]):
                for tensor in named_tensors(model).values():
                    tensor.mul_(0.5)
        assert not torch.equal(net(x), wanted)
        assert torch.equal(back["net"](x), net(x))


def test_the_first_of_the_same_is_the_owner():
    memory = torch.randn(4, 4)
    net = nn.ParameterDict({"turned": nn.Parameter(memory.t())})
    net["b"], net["a"], net["row"] = map(nn.Parameter, (memory, memory, memory[1]))
    assert owners(dict(net.items())) == {"a": "b", "row": "b", "turned": "b"}
    replica = plain_copy(net)
    assert replica["a"] is replica["b"]
    assert list(uniform_strategy(net, 4).tensors) == ["b"]


def test_a_view_follows_its_owner():
    net, x = made("transposed head"), torch.randn(30, 8)
    for options in ({}, {"axis": 0}):
        strategy = uniform_strategy(net, 3, **options)
        assert list(strategy.tensors) == ["words.weight"]
        put = intact(net, partial(quantize_model, net, strategy))
        assert not torch.equal(put(x), net(x))
        assert torch.equal(put.head, put.words.weight.t())
        assert len(put.head.unique()) <= (8 if not options else 64)
        bits = 64 * 3 + 32 * (8 if options else 1)
        assert mean_bits(net, quantize(net, strategy)) == bits / 64
    places = view_places(dict(net.named_parameters()))
    owner, index = places["head"]
    assert torch.equal(dict(net.named_parameters())[owner].flatten()[index], net.head)


def by_hand(net):
    """Bytes of a state dict, in which nothing is shared, without counters of one value."""
    return sum(t.numel() * t.element_size() for t in net.state_dict().values() if t.dim())


COUNTED = {
    "batch norm": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    "batch norm without more": nn.BatchNorm1d(5, affine=False),
    "batch norm without statistics": nn.BatchNorm1d(5, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    "positions": Holds(None, weight=parameter(torch.ones(3)), index=torch.arange(9).view(3, 3)),
    "masks": Holds(None, weight=parameter(torch.ones(3)), mask=torch.ones(5) > 0),
    "half": nn.BatchNorm1d(5).half(),
    "integers": Holds(None, order=parameter(torch.arange(5)), turn=torch.ones(2) * 1j),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_all_that_a_state_dict_has_is_counted_but_for_counters(kind):
    net = COUNTED[kind]
    cost = model_bytes.measure(net, Quantized(), [])
    assert cost == stored_bytes(net)
    assert sum(cost.values()) == by_hand(net)
    count = sum(tensor.numel() for tensor in net.parameters())
    if count:
        assert mean_bits(net, Quantized()) == 8 * by_hand(net) / count
    else:
        with pytest.raises(ValueError, match="has no parameters: there are no bits of any"):
            mean_bits(net, Quantized())


def test_what_is_shared_or_made_anew_is_counted_as_it_is():
    net = made("views in buffers")
    net.register_buffer("angles", torch.ones(6), persistent=False)
    net.register_buffer("range", torch.arange(6), persistent=False)
    net.register_buffer("counter", torch.tensor(3))
    assert stored_bytes(net) == {"weight": 256, "angles": 24}
    assert set(named_buffers(net)) == {"angles", "range", "counter"}
    # the flat buffer has what its parts have
    assert stored_bytes(made("parts of a flat buffer")) == {"a": 256, "b": 32}
    with pytest.raises(ValueError, match="names tensors row: the network has weight"):
        quantize(net, Strategy({"weight": None, "row": UNIFORM}))
    sparse = torch.eye(8).to_sparse()
    held = Holds(None, a=parameter(sparse), b=sparse.to_sparse_csr())
    assert stored_bytes(held) == {"a": 2 * 8 * 8 + 8 * 4, "b": 9 * 8 + 8 * 8 + 8 * 4}
    assert mean_bits(held, Quantized()) == 8 * (160 + 168) / 8


def test_tensors_of_every_kind():
    """What can't be quantized stays as it is, and says so where it is asked for."""
    net, x = made("all kinds of tensors"), torch.randn(4, 8)
    strategy = uniform_strategy(net, 4)
    on_levels = {name for name, choice in strategy.tensors.items() if choice is not None}
    assert on_levels == {"single", "empty", "expanded", "short"}
    put = quantize_model(net, strategy)
    for name in strategy.tensors.keys() - on_levels:
        one, other = (dense(dict(n.named_parameters())[name]) for n in (net, put))
        assert torch.equal(one, other)
    assert put(x).shape == net(x).shape
    for name in ("coo", "narrow", "csr"):
        with pytest.raises(
            ValueError, match=rf"{name}: values are torch\.\w+ in layout torch"
        ) as e:
            quantize_alone(net, name, [UNIFORM])
        assert len(str(e.value).splitlines()) == 1
    assert fingerprint(net) == fingerprint(plain_copy(net))
    for name in ("coo", "narrow", "nested"):
        other = plain_copy(net)
        tensor = getattr(other, name).data
        changed = tensor.float() * 2 if name == "narrow" else tensor * 2
        getattr(other, name).data = changed.to(tensor.dtype)
        assert fingerprint(net) != fingerprint(other), name


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.kept = {"lock": threading.Lock()}


def partly():
    flat = torch.randn(9)
    return nn.ParameterDict({"a": nn.Parameter(flat[:6]), "b": nn.Parameter(flat[3:])})


REFUSED = {
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "the network is scripted or traced"),
    "trace": (
        lambda: nn.Sequential(nn.ReLU(), torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
        "^1 is scripted or traced, .*: give the nn.Module that it was made from",
    ),
    "exported": (
        lambda: torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)),
        "the network is a ExportedProgram: an nn.Module is needed",
    ),
    "function": (lambda: torch.relu, "the network is a builtin_function_or_method: an nn.Module"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device.*to_empty"),
    "meta buffer": (
        lambda: Holds(None, table=torch.ones(2, device="meta")),
        "table is on the meta device",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape yet: pass one batch"),
    "packed": (
        lambda: nn.Sequential(torch.ao.nn.quantized.Linear(2, 2)),
        "0 is quantized already .torch.ao.nn.quantized.*: give the float network",
    ),
    "lock": (
        lambda: nn.Sequential(nn.ReLU(), Locked()),
        "1.kept, a dict, can't be copied .TypeError: cannot pickle '_thread.lock' object.: keep",
    ),
    "partly": (partly, "b shares a part of its memory with a, and none has all of it: register"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_network_to_copy_is_refused_in_a_line(kind):
    make, message = REFUSED[kind]
    net = make()
    for act in (
        plain_copy,
        lambda net: uniform_strategy(net, 4),
        lambda net: quantize(net, Strategy({}), [(torch.ones(1, 2),)]),
        lambda net: quantize_model(net, Quantized()),
        lambda net: quantize_alone(net, "weight", [UNIFORM]),
        lambda net: mean_bits(net, Quantized()),
        lambda net: model_bytes.measure(net, Quantized(), []),
    ):
        if kind == "lock" and act is not plain_copy:
            continue  # it has tensors to look at
        with pytest.raises(ValueError, match=message) as caught:
            act(net)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "wrap", [compiled, nn.DataParallel, lambda n: nn.DataParallel(compiled(n))]
)
def test_a_wrapped_network_is_the_plain_one(wrap):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(9, 4)
    strategy = uniform_strategy(wrap(net), 3, rounding="gptq")
    assert strategy == uniform_strategy(net, 3, rounding="gptq")
    wanted = quantize_model(net, strategy, [(x,)])
    found = quantize_model(wrap(net), strategy, [(x,)])
    assert list(found.state_dict()) == list(net.state_dict())
    assert torch.equal(found(x), wanted(x))
    quantized = quantize(net, strategy, [(x,)])
    assert mean_bits(wrap(net), quantized) == mean_bits(net, quantized)
    assert copy.deepcopy(found)(x).isfinite().all()


class Turned(nn.Module):
    """A convolution whose weight, turned, is another's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Parameter(self.first.weight.detach().transpose(0, 1))

    def forward(self, x):
        return F.conv2d(self.first(x).relu(), self.second).mean((2, 3))


def test_views_follow_wherever_they_are_measured():
    """In another layout, on workers, and while codes are learned."""
    torch.manual_seed(0)
    net, x = Turned(), torch.randn(60, 6, 5, 5)
    targets = torch.randn(60, 6)
    loader = batch_loader(Tensors(x, targets), batch_size=20, shuffle=False, seed=0)
    strategies = [uniform_strategy(net, bits) for bits in (2, 4)]
    put = [quantize_model(net, strategy) for strategy in strategies]
    with torch.no_grad():
        wanted = [F.mse_loss(model(x), targets).item() for model in put]
        far = F.mse_loss(put[0](x[:1]), net(x[:1])).item()
    table = evaluate_strategies(net, strategies, loader, nn.MSELoss())
    assert table["criterion"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert workers.dumps is dumps
    student = Student(net, quantize(net, strategies[0]), 0.0)
    assert list(student.latents) == ["first.weight", "first.bias"]
    # one example, since of more some are blended
    loss = student.backward(as_batch((x[:1], targets[:1]), net))
    assert loss.item() == pytest.approx(far, rel=1e-4)
