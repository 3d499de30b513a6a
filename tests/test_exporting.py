"""Other runtimes give what the quantized copy gives."""

import math
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_compressed import made
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from quantifind import (
    Strategy,
    compressed,
    export,
    load,
    quantize_model,
    save,
    uniform_strategy,
)
from quantifind.deployment import onnx_graph
from quantifind.deployment.onnx_runs import check_runs
from quantifind.quantize import quantize
from quantifind.strategy import uniform_activations
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch
from stages import files
from stages.exports import write_exports

WEIGHTS = [
    *({"bits": bits, **axis} for bits in (1, 2, 3, 4, 7, 8, 12, 20) for axis in ({}, {"axis": 0})),
    {"levels": 3, "axis": 1},
    {"bits": 2, "half_integer": True},
    *({"bits": 4, "axis": axis, "group": 4} for axis in (0, 1, None)),
    {"bits": 4, "zero_point": True, "axis": 0},
    {"bits": 8, "zero_point": True, "group": 5},
    *({"scheme": "codebook", "bits": 3, **axis} for axis in ({}, {"axis": 1}, {"group": 5})),
    {"scheme": "codebook", "centres": "normal", "bits": 4, "axis": 0, "group": 4},
    {"scheme": "minifloat", "bits": 4, "axis": 0, "group": 4, "scale_dtype": "power_of_two"},
    {"scheme": "minifloat", "bits": 8, "scale": 1.0},
    {"scheme": "power_of_two", "bits": 4, "axis": 1},
]


class OneOfEach(nn.Module):
    """A product for each choice of a weight, of 3 axes and of 2."""

    def __init__(self):
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(10, 6) for _ in WEIGHTS)
        self.convs = nn.ModuleList(nn.Conv1d(6, 5, 3, bias=False) for _ in WEIGHTS)

    def forward(self, x):
        return [c(one(x).mT).flatten(1) for one, c in zip(self.lines, self.convs, strict=True)]


def onnx_outputs(path, *inputs):
    options = onnxruntime.SessionOptions()
    # else it rounds what meets codes of linear maps to 8 bits, too
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options)
    names = [one.name for one in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, given)]


@pytest.mark.parametrize("opset", [21, 25])
@torch.no_grad()
def test_every_choice_is_the_same_in_onnxruntime(tmp_path, opset):
    torch.manual_seed(0)
    net = OneOfEach().eval()
    choices = {name: None for name, _ in net.named_parameters()}
    for number, choice in enumerate(WEIGHTS):
        for kind in ("lines", "convs"):
            choices[f"{kind}.{number}.weight"] = {"scheme": "uniform", **choice}
    quantized = quantize(net, Strategy(choices))
    path = tmp_path / "net.onnx"
    table = export(net, quantized, path, torch.randn(3, 9, 10), opset=opset).set_index("tensor")
    onnx.checker.check_model(path, full_check=True)
    for count in (1, 4):
        x = torch.randn(count, 9, 10)
        wanted = quantize_model(net, quantized)(x)
        for number, (one, other) in enumerate(zip(onnx_outputs(path, x), wanted, strict=True)):
            assert (one - other).abs().max() <= 1e-4, WEIGHTS[number]
    becomes = table["becomes"]
    assert becomes["lines.6.weight"] == "int4"
    assert becomes["lines.0.weight"] == ("int2" if opset == 25 else "int4")
    assert becomes["lines.14.weight"] == "float"
    assert becomes[f"lines.{len(WEIGHTS) - 1}.weight"] == "codebook"
    assert table.loc["lines.6.weight", "bytes"] == 30 + 4
    assert set(table["becomes"].str.split(" ").str[0]) >= {"int4", "int8", "int16", "codebook"}


# an LSTM traces, too, but the unrolled steps of its layers take a minute
@pytest.mark.parametrize("kind", ["convolutions", "attention", "gru"])
@torch.no_grad()
def test_networks_run_in_other_runtimes(tmp_path, kind):
    net, x = made(kind)
    x = x[:, :2] if kind == "gru" else x
    quantized = quantize(net, uniform_strategy(net, 8 if kind == "gru" else 4, axis=0))
    wanted = quantize_model(net, quantized)(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export(net, quantized, tmp_path / "net.onnx", x)
    assert (onnx_outputs(tmp_path / "net.onnx", x)[0] - wanted).abs().max() <= 1e-4
    table = export(net, quantized, tmp_path / "net.pt2", x)
    assert (table["bytes"] == table["model_bytes"]).all()
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert (program(x) - wanted).abs().max() <= 1e-6
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@torch.no_grad()
def test_a_program_runs_without_this_package(tmp_path):
    net, x = made("convolutions")
    strategy = uniform_strategy(net, levels=3)
    export(net, strategy, tmp_path / "net.pt2", (x,))
    assert b".py" not in (tmp_path / "net.pt2").read_bytes()
    assert torch.export.load(tmp_path / "net.pt2").example_inputs is None
    torch.save([x, quantize_model(net, strategy)(x)], tmp_path / "both.pt")
    code = (
        "import sys, torch; x, wanted = torch.load('both.pt')\n"
        "assert torch.equal(torch.export.load('net.pt2').module()(x), wanted)\n"
        "assert 'quantifind' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={})


@pytest.mark.parametrize(("kind", "bits"), [("linear", 4), ("convolutions", 8), ("linear", 10)])
@torch.no_grad()
def test_activations_are_rounded_in_onnxruntime(tmp_path, kind, bits):
    net, x = made(kind)
    activations = uniform_activations(net, [(x,)], bits)
    quantized = quantize(net, Strategy(uniform_strategy(net, 8).tensors, activations), [(x,)])
    wanted = quantize_model(net, quantized)(x)
    path = tmp_path / "net.onnx"
    export(net, quantized, path, x)
    found = (onnx_outputs(path, x)[0] - wanted).abs()
    # a value on the border of two levels may fall to either
    assert found.median() <= 1e-5
    assert (found > 1e-4).float().mean() <= 0.05
    plain = quantize_model(net, Quantized(quantized.tensors, {}, quantized.folded))(x)
    assert (plain - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_activations_of_all_dtypes_are_rounded_in_onnx(tmp_path, dtype):
    """Of bfloat16, in which onnxruntime has few products, the rounding is there."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3).to(dtype), torch.randn(9, 6, dtype=dtype)
    activations = uniform_activations(net, [(x,)], 6)
    quantized = quantize(net, Strategy(uniform_strategy(net, 8).tensors, activations), [(x,)])
    export(net, quantized, tmp_path / "net.onnx", x)
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    if dtype != torch.bfloat16:
        (found,) = onnx_outputs(tmp_path / "net.onnx", x)
        assert found.dtype == dtype
        assert (found - quantize_model(net, quantized)(x)).abs().max() <= 2e-3


class Lengths(nn.Linear):
    """What it computes may depend on the first length of what it takes."""

    def __init__(self, rule):
        super().__init__(6, 3)
        self.rule = rule

    def forward(self, x):
        return self.rule(super().forward(x))


RULES = {
    "any": lambda y: y / y.shape[0],
    "by the last": lambda y: torch.cat([y, y[-1:]]),
    "a threshold": lambda y: y * 2 if y.shape[0] > 2 else y,
    "one": lambda y: y * 2 if y.shape[0] == 1 else y,
    "parity": lambda y: y * 2 if y.shape[0] % 2 else y,
    "its number": lambda y: y * float(len(y)),
    "a loop": lambda y: torch.stack([part * number for number, part in enumerate(y)]),
    "a shape": lambda y: y.reshape(4, -1),
}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_another_length_gives_the_same_or_is_refused(tmp_path, kind, rule):
    torch.manual_seed(0)
    net = Lengths(RULES[rule]).eval()
    path = tmp_path / f"net.{kind}"
    quantized = quantize(net, uniform_strategy(net, 8))
    export(net, quantized, path, torch.randn(4, 6))
    copy, ran = quantize_model(net, quantized), []
    for length in (4, 1, 2, 3, 7):
        x = torch.randn(length, 6)
        try:
            found = (
                onnx_outputs(path, x) if kind == "onnx" else [torch.export.load(path).module()(x)]
            )
        except Exception:  # of a runtime
            continue
        assert torch.allclose(found[0], copy(x), atol=1e-5)
        ran.append(length)
    assert ran == ([4, 1, 2, 3, 7] if rule in ("any", "by the last") else [4])


class Arguments(nn.Linear):
    """Of all kinds."""

    def forward(self, first, *more, times=1, **named):
        inside = super().forward(first["x"]) * times + more[0]
        return {"b": [inside, None], "a": (named["last"] - inside,)}


@torch.no_grad()
def test_arguments_of_all_kinds_are_exported(tmp_path):
    """What a tuple can't say, named ones can; outputs come in the order in which they are made."""

    class Named(Arguments):
        def forward(self, first, *, last, times):
            return super().forward(first, last, times=times, last=last)

    class More(Arguments):
        def forward(self, first, *more):
            return super().forward(first, *more[:-1], times=more[-1], last=more[0])

    torch.manual_seed(0)
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    for net, example in (
        (Named(6, 3), {"first": {"x": x}, "last": y, "times": 3}),
        (More(6, 3), ({"x": x}, y, 3)),
    ):
        strategy = uniform_strategy(net, 8)
        copy = quantize_model(net, strategy)
        args, named = (example, {}) if isinstance(example, tuple) else ((), example)
        wanted = copy(*args, **named)
        export(net, strategy, tmp_path / "net.pt2", example)
        found = torch.export.load(tmp_path / "net.pt2").module()(*args, **named)
        assert torch.equal(found["b"][0], wanted["b"][0])
        assert torch.equal(found["a"][0], wanted["a"][0])
        export(net, strategy, tmp_path / "net.onnx", example)
        one, other = onnx_outputs(tmp_path / "net.onnx", x, y)
        assert torch.allclose(one, wanted["b"][0], atol=1e-5)
        assert torch.allclose(other, wanted["a"][0], atol=1e-5)


@pytest.mark.parametrize("kind", ["convolutions", "attention", "slices"])
@torch.no_grad()
def test_activations_are_rounded_in_programs(tmp_path, kind):
    """Those inside attention, and of whole and minifloat levels, too."""
    net, x = made(kind)
    activations: dict = uniform_activations(net, [(x,)], 4)
    *_, last = activations
    activations[last] = {"scheme": "minifloat", "bits": 4}
    strategy = Strategy(uniform_strategy(net, 5, axis=0).tensors, activations)
    quantized = quantize(net, strategy, [(x,)])
    export(net, quantized, tmp_path / "net.pt2", x)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for given in (x, torch.cat([x, -x])):
        wanted = quantize_model(net, quantized)(given)
        assert (program(given) - wanted).abs().max() <= 1e-6
        plain = quantize_model(net, Quantized(quantized.tensors, {}, quantized.folded))(given)
        assert (plain - wanted).abs().max() > 1e-3


class Tied(nn.Module):
    """One weight for two, and one module twice; a large and a small codebook."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inside, self.head = (
            nn.Embedding(9, 20),
            nn.Linear(20, 20),
            nn.Linear(20, 9),
        )
        self.head.weight = self.embedding.weight
        self.again = self.inside
        self.small = nn.Linear(9, 2)

    def forward(self, words):
        return self.small(self.head(self.again(self.inside(self.embedding(words)))))


@torch.no_grad()
def test_tied_weights_are_in_onnx_once_and_codebooks_where_they_are_smaller(tmp_path):
    torch.manual_seed(0)
    net, words = Tied().eval(), torch.randint(9, (3, 4))
    path = tmp_path / "net.onnx"
    codebook = {"scheme": "codebook", "bits": 4}
    named = {"embedding.weight": {"scheme": "uniform", "bits": 4, "axis": 0}}
    named |= {"inside.weight": codebook, "small.weight": codebook | {"axis": 0}}
    biases = {f"{name}.bias": None for name in ("inside", "head", "small")}
    quantized = quantize(net, Strategy(named | biases))
    table = export(net, quantized, path, words).set_index("tensor")
    wanted = quantize_model(net, quantized)(words)
    assert (onnx_outputs(path, words)[0] - wanted).abs().max() <= 1e-5
    assert table["becomes"].to_dict() == {
        "embedding.weight": "int4",
        "inside.weight": "codebook",
        # 16 levels of 4 bytes for each row of 9
        "small.weight": "float",
    }
    assert table.loc["embedding.weight", "bytes"] == 90 + 4 * 9
    assert table.loc["inside.weight", "bytes"] >= 200 + 4 * 16
    assert table.loc["small.weight", "bytes"] == 72
    large = [one.name for one in onnx.load(path).graph.initializer if len(one.raw_data) > 80]
    assert sorted(large) == ["embedding.weight/codes", "inside.weight/codes"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)
        self.other.weight = self.one.weight

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.one, lambda x: self.other(-x), (x,))


@torch.no_grad()
def test_branches_of_tied_weights_run_in_onnx(tmp_path):
    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(3, 6)
    quantized = quantize(net, uniform_strategy(net, 4, axis=0))
    table = export(net, quantized, tmp_path / "net.onnx", x).set_index("tensor")
    assert table.loc["one.weight", "becomes"] == "int4"
    for given in (x, -x):
        wanted = quantize_model(net, quantized)(given)
        assert (onnx_outputs(tmp_path / "net.onnx", given)[0] - wanted).abs().max() <= 1e-5


class Untraceable(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else super().forward(-x)


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(6, 3, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.inner(packed)[1]


class Beside(nn.Module):
    """Norms, ties and equal tensors beside a branch."""

    def __init__(self, branch):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.branch = nn.Linear(6, 6, bias=False), branch
        self.tied.weight = self.first.weight
        self.second.load_state_dict(self.first.state_dict())
        self.look = nn.EmbeddingBag(20, 6, mode="mean")
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 1, 2)

    def forward(self, x, indices, offsets):
        x = self.norm(self.conv(x)).mT
        x = self.tied(self.second(self.first(x).relu()).relu())
        return x.mean(1) + (self.look(indices, offsets) if self.branch else 0)


@pytest.mark.parametrize("rounded", [False, True])
@torch.no_grad()
def test_what_stands_beside_a_branch_stays_as_it_is(tmp_path, rounded):
    """The same codes, by the same names, as without it."""
    example = torch.randn(3, 4, 8), torch.arange(10), torch.tensor([0, 3, 7])
    tables = []
    for branch in (False, True):
        torch.manual_seed(5)
        net = Beside(branch).eval()
        tensors = {**uniform_strategy(net, 8).tensors, "second.weight": None}
        how = {"forward": lambda model, batch: model(*batch)}
        inputs = uniform_activations(net, [example], 8, **how) if rounded else {}
        codes = quantize(net, Strategy(tensors, inputs), [example], **how)
        tables.append(export(net, codes, tmp_path / "net.onnx", example).set_index("tensor"))
        (found,) = onnx_outputs(tmp_path / "net.onnx", *example)
        assert torch.allclose(found, quantize_model(net, codes)(*example), atol=1e-4)
    plain, beside = (table.drop("look.weight") for table in tables)
    assert beside.equals(plain)


class Bags(nn.Module):
    """Embeddings of which some are summed, from where each bag begins."""

    def __init__(self, **options):
        super().__init__()
        self.look, self.last = nn.EmbeddingBag(20, 8, **options), nn.Linear(8, 3)

    def forward(self, indices, offsets):
        return self.last(self.look(indices, offsets))


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"include_last_offset": True}])
@torch.no_grad()
def test_a_bag_of_embeddings_runs(tmp_path, mode, options, caplog):
    net = Bags(mode=mode, **options).eval()
    strategy = uniform_strategy(net, 8)
    small = quantize_model(net, strategy)
    end = [10] if "include_last_offset" in options else []
    example = torch.arange(10), torch.tensor([0, 3, 7, *end])
    export(net, strategy, tmp_path / "bags.onnx", example)
    assert not [said for said in caplog.records if said.name.startswith("onnx")]
    # with the end in them, their number is that of the example
    others = [[0, 1, 5, 10], [0, 4, 4, 10]] if end else [[0, 1], [0, 4, 4, 9]]
    for offsets in ([0, 3, 7, *end], *others):
        given = torch.arange(10).flip(0), torch.tensor(offsets)
        (found,) = onnx_outputs(tmp_path / "bags.onnx", *given)
        assert torch.allclose(found, small(*given), atol=1e-5)


LAYERS = {
    **{
        f"{kind.__name__}{' with a bias' * bias}": (kind, bias, size)
        for kind, size in (
            *((nn.Conv1d, 7), (nn.Conv2d, 7), (nn.Conv3d, 5), (nn.ConvTranspose1d, 7)),
            *((nn.ConvTranspose2d, 7), (nn.ConvTranspose3d, 5)),
        )
        for bias in (False, True)
    },
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_layers_of_all_kinds_run(tmp_path, kind, groups):
    torch.manual_seed(0)
    layer, bias, size = LAYERS[kind]
    net = layer(4, 6, 2, bias=bias, groups=groups).eval()
    x = torch.randn(2, 4, *(size,) * (net.weight.dim() - 2))
    strategy = uniform_strategy(net, 8)
    export(net, strategy, tmp_path / "net.onnx", x)
    (found,) = onnx_outputs(tmp_path / "net.onnx", x)
    assert torch.allclose(found, quantize_model(net, strategy)(x), atol=1e-4)


class Recurs(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@torch.no_grad()
def test_what_onnxruntime_does_not_run_is_said_and_the_old_file_stays(tmp_path, monkeypatch):
    """torch writes an LSTM with a projection wrongly; and a file that gives other values."""
    path = tmp_path / "net.onnx"
    path.write_text("old")
    net, x = Recurs(6, 5, proj_size=3).eval(), torch.randn(3, 2, 6)
    with pytest.raises(ValueError, match="onnxruntime doesn't run what ONNX has for it"):
        export(net, uniform_strategy(net, 8), path, x)
    net, y = made("linear")
    put_codes = onnx_graph.put_codes

    def put_wrong_codes(graph, quantized, *, opset):
        found = put_codes(graph, quantized, opset=opset)
        scale = next(one for one in graph.initializer if one.name == "2.bias/scale")
        scale.raw_data = bytes(3) + b"\x3f"
        return found

    monkeypatch.setattr(onnx_graph, "put_codes", put_wrong_codes)
    with pytest.raises(ValueError, match="onnxruntime gives other values than the network, by up"):
        export(net, uniform_strategy(net, 8), path, y)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    export(net, uniform_strategy(net, 8), path, y)


class Uses(nn.Module):
    """A weight whole in one product, and in another way in a second."""

    def __init__(self, how):
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(6, 6))

    def forward(self, x, y):
        return F.linear(x, self.w), self.how(y, self.w)


USES = {
    "whole": F.linear,
    "a slice": lambda y, w: F.linear(y, w[:4]),
    "chunks": lambda y, w: F.linear(F.linear(y, w), torch.cat([*w.chunk(2)])[:, :6].flip(0)),
    "its chunks": lambda y, w: [F.linear(y, part) for part in w.chunk(3)],
    "split": lambda y, w: [F.linear(y, part) for part in w.split([1, 5])],
    "a row": lambda y, w: y @ w[1],
    "rows": lambda y, w: [y @ row for row in w.unbind()],
    "turned": lambda y, w: y @ w.T,
    "einsum": lambda y, w: torch.einsum("bi,oi->bo", y, w),
    "einsum of three": lambda y, w: torch.einsum("bi,oi,o->bo", y, w, w[0]),
    "scaled": lambda y, w: F.linear(y, w * 2),
    "a sum": lambda y, w: y.sum() + w,
    "itself": lambda y, w: y.sum() * (w @ w.T),
    "a look-up": lambda y, w: F.embedding((y[:, 0] > 0).long(), w),
    "an index": lambda y, w: F.linear(y, w[torch.tensor([2, 0])]),
    "a branch": lambda y, w: torch.cond(
        y.sum() > 0, F.linear, lambda y, w: F.linear(-y, w), (y, w)
    ),
}
SAID = ("chunks", "einsum of three")


@pytest.mark.parametrize("how", USES)
@torch.no_grad()
def test_onnx_rounds_all_that_meets_a_weight_or_says_that_it_cannot(tmp_path, how):
    torch.manual_seed(0)
    net, given = Uses(USES[how]).eval(), (torch.randn(5, 6), 3 * torch.randn(5, 6))
    options = {"forward": lambda model, batch: (model(*batch)[0], batch[1])}
    fitted = uniform_activations(net, [given] * 2, 3, **options)
    # products of what was computed ONNX doesn't round
    rounded = {name: choice if name == "w" else None for name, choice in fitted.items()}
    strategy = Strategy(uniform_strategy(net, 8, axis=0).tensors, rounded)
    codes = quantize(net, strategy, [given] * 2, **options)
    copy = quantize_model(net, codes)
    if how in SAID:
        with pytest.raises(
            ValueError, match=r"isn't rounded; leave it None, or use quantifind.comp"
        ):
            export(net, codes, tmp_path / "net.onnx", given)
        return
    export(net, codes, tmp_path / "net.onnx", given)
    wanted, found = tree_leaves(copy(*given)), onnx_outputs(tmp_path / "net.onnx", *given)
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


class Remembers(nn.Linear):
    """Its passes change a buffer."""

    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("kept", torch.zeros(6))

    def forward(self, x):
        self.kept.mul_(0.5).add_(x.mean(0))
        return super().forward(x) + self.kept


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_a_pass_here_changes_no_state_that_is_written(tmp_path, count):
    torch.manual_seed(0)
    net, x = Remembers().eval(), torch.randn(count, 6)
    strategy = uniform_strategy(net, 8)
    same = quantize_model(net, strategy)
    export(net, strategy, tmp_path / "net.pt2", x)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for _ in range(3):
        assert torch.allclose(program(x), same(x), atol=1e-6)
    assert not net.kept.any()
    with pytest.raises(
        ValueError, match="kept: a pass changes it, and ONNX keeps no state: export"
    ):
        export(net, strategy, tmp_path / "net.onnx", x)
    assert not (tmp_path / "net.onnx").exists()


class Counts(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


@torch.no_grad()
def test_a_counter_that_nothing_reads_is_exported(tmp_path):
    net, x = Counts().eval(), torch.randn(3, 6)
    export(net, uniform_strategy(net, 8), tmp_path / "net.onnx", x)
    (found,) = onnx_outputs(tmp_path / "net.onnx", x)
    assert torch.allclose(found, quantize_model(net, uniform_strategy(net, 8))(x), atol=1e-5)


def test_a_wrong_value_beside_an_infinity(monkeypatch):
    """Is seen as any other is; infinities that are the same are none."""

    class Session:
        def __init__(self, *given):
            pass

        def get_inputs(self):
            return []

        def run(self, *given):
            return [found.numpy()]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    wanted = torch.tensor([1.0, -math.inf, math.inf, math.nan])
    found = wanted.clone()
    check_runs(b"", [], [wanted])
    for place, value in ((0, 1.1), (0, math.nan), (0, math.inf), (1, 0.0), (2, -math.inf), (3, 0)):
        found = wanted.clone()
        found[place] = value
        with pytest.raises(ValueError, match="gives other values"):
            check_runs(b"", [], [wanted])


class Stops(nn.Linear):
    """However its own forward calls it."""

    def forward(this, x):
        return super().forward(x) if x.sum() > 0 else x


class StopsOutside(nn.Sequential):
    def forward(me, x, *more):
        own = [me for _ in range(2)]
        return own[0][0](x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(Stops(6, 6)), r"in 0, `.* \(Stops\)"),
        (StopsOutside(nn.Linear(6, 6)), r"in the network, `.* \(StopsOutside\)"),
    ],
)
@torch.no_grad()
def test_where_tracing_stops_is_said_however_forward_is_written(tmp_path, net, says, capfd):
    with pytest.raises(ValueError, match=says):
        export(net, uniform_strategy(net, 4), tmp_path / "net.pt2", torch.randn(3, 6))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@torch.no_grad()
def test_where_tracing_stops_is_said_and_what_works_instead(tmp_path, kind):
    torch.manual_seed(0)
    cases = [
        (
            nn.Sequential(nn.Linear(6, 6), Untraceable(6, 3)),
            (torch.randn(2, 6),),
            "in 1, `return super",
        ),
        (
            Packs(),
            (torch.randn(2, 5, 6), torch.tensor([5, 3])),
            "in the network, `return self.inner",
        ),
    ]
    for net, example, says in cases:
        strategy = uniform_strategy(net, 4, axis=0)
        with pytest.raises(
            ValueError, match=f"can't be traced .*{says}.* quantifind.save and"
        ) as found:
            export(net, strategy, tmp_path / f"net.{kind}", example)
        assert "\n" not in str(found.value)
        assert str(ROOT) not in str(found.value)
        wanted = quantize_model(net, strategy)(*example)
        assert torch.equal(compressed(net, strategy)(*example), wanted)
        save(net, strategy, tmp_path / "net.safetensors")
        assert torch.equal(load(tmp_path / "net.safetensors", net)(*example), wanted)


@torch.no_grad()
def test_what_cannot_be_exported_is_said_in_a_line(tmp_path):
    net, x = made("linear")
    strategy = uniform_strategy(net, 4)
    attention, y = made("attention")
    inside = uniform_activations(attention, [(y,)], 4)
    inside = quantize(attention, Strategy(uniform_strategy(attention, 4).tensors, inside), [(y,)])
    untraceable = Untraceable(6, 3)
    cases = [
        (net, strategy, "net.pth", x, {}, "its ending is '.pth': .onnx or .pt2"),
        (net, strategy, "net.onnx", x, {"opset": 20}, "opset is 20: 21 or later"),
        (net, strategy, "net.pt2", x[:, :, :5], {}, "example: the network doesn't take it"),
        (net, strategy, "net.onnx", x.double(), {}, "example: the network doesn't take it"),
        (net, strategy, "net.pt2", x.long(), {}, "example: the network doesn't take it"),
        (net, strategy, "net.pt2", x[:0], {}, "example is .*: at least one example is needed"),
        (untraceable, uniform_strategy(untraceable, 4), "net.onnx", x, {}, "can't be traced"),
        (net, strategy, "no/net.pt2", x, {}, "can't be written"),
        (attention, inside, "net.onnx", y, {}, r"activations of self_attn\S*: in ONNX only those"),
        (net, {"bits": 4}, "net.onnx", x, {}, "quantized is a dict"),
    ]
    for given, quantized, name, example, options, says in cases:
        with pytest.raises(ValueError, match=says) as found:
            export(given, quantized, tmp_path / name, example, **options)
        assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_is_asked_for_is_exported_and_the_rest_survives(tmp_path, monkeypatch):
    """In one folder that is there whatever is asked for, with the network's own arguments."""
    monkeypatch.chdir(tmp_path)

    class Named(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    def forward(model, batch):
        return model(batch["x"], scale=batch["scale"]), batch["y"]

    net, untraceable = Named(6, 3), Untraceable(6, 3)
    data = {"x": torch.randn(2, 6), "scale": torch.tensor(2.0), "y": torch.ones(2)}
    batch = Batch(data, forward)
    quantized = quantize(net, uniform_strategy(net, 4))
    assert write_exports([], net, quantized, batch) == {}
    assert [path.name for path in files.EXPORTS.iterdir()] == ["bytes.csv"]
    found = write_exports(["pt2"], net, quantized, batch)
    path = files.EXPORTS / "network.pt2"
    assert found == {"pt2": {"path": str(path), "bytes": path.stat().st_size}}
    program = torch.export.load(path).module()
    assert torch.equal(
        program(x=data["x"], scale=data["scale"]), forward(quantize_model(net, quantized), data)[0]
    )
    table = files.parse_table(files.EXPORTED.read_text(encoding="utf-8"))
    assert (table["pt2_bytes"] == table["model_bytes"]).all()
    batch = Batch(data["x"], lambda model, x: model(x))
    found = write_exports(["onnx", "pt2"], untraceable, quantized, batch)
    for kind in ("onnx", "pt2"):
        assert "can't be traced" in found[kind]["reason"]
        assert "quantifind.save and quantifind.compressed work" in found[kind]["reason"]
    assert [path.name for path in files.EXPORTS.iterdir()] == ["bytes.csv"]
    parts = Batch(data["x"], lambda model, x: F.linear(x, model.weight))
    assert (
        "doesn't call the network" in write_exports(["pt2"], net, quantized, parts)["pt2"]["reason"]
    )
