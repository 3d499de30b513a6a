"""A saved network comes back bit for bit, from the bytes promised, or is refused in a line."""

import copy
import json
import os
import pickle
import re
import zlib
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from safetensors import safe_open
from test_artifact import CHOICES, assert_same, assert_same_qparams, bits_of
from test_schemes import DTYPES, arguments, for_every_case, tensors, widths
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from quantifind import (
    Strategy,
    compressed,
    export,
    find_strategy,
    load,
    quantize_model,
    save,
    uniform_strategy,
)
from quantifind.costs import model_bytes
from quantifind.deployment import saving
from quantifind.quantize import quantize
from quantifind.storage import network_reader
from quantifind.storage.network_reader import NetworkFile
from quantifind.storage.network_writer import write_network
from quantifind.strategy import uniform_activations
from quantifind.tensor import packing
from quantifind.tensor.quantized import Quantized

USE, READER = re.findall(r"```py\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "net.safetensors"


def read_by_docs(path):
    names: dict = {}
    exec(READER, names)
    return names["read"](path)


def test_the_reader_of_the_docs_is_short_and_needs_only_numpy():
    assert sum(bool(line.strip()) for line in READER.splitlines()) <= 90
    assert set(re.findall(r"^(?:import|from) (\w+)", READER, re.MULTILINE)) == {
        *("json", "zlib", "numpy")
    }


@for_every_case
@settings(max_examples=25)
@given(data=st.data())
def test_every_scheme_comes_back_and_is_read_by_others(path, module, options, data):
    """Whatever the shape, granularity, dtype and scales."""
    values, bits = data.draw(tensors()), data.draw(widths(module))
    tensor = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    others = {"stays": values.t() if values.dim() == 2 else values, "one": torch.tensor(3)}
    size = write_network(path, Quantized({"a.b": tensor, "again": tensor}), others, {"judged": [1]})
    with NetworkFile(path) as file:
        assert size == os.path.getsize(path) == file.bytes
        stored = 2 * tensor.stored_bits // 8 + values.numel() * values.element_size() + 8
        assert file.bytes - file.header_bytes == stored
        assert file.index["judged"] == [1]
        for name in ("again", "a.b"):
            assert_same(file.tensor(name), tensor)
            assert file.described(name) == (values.dtype, tuple(values.shape))
        with patch.object(network_reader, "STEP", packing.TOGETHER):
            for name in ("a.b", *others):
                whole = file.values(name).contiguous()
                file.put(name, parts := torch.empty_like(whole))
                assert bits_of(parts) == bits_of(whole)
        for name, value in others.items():
            assert bits_of(file.values(name)) == bits_of(value)
            assert file.values(name).shape == value.shape
    read = read_by_docs(path)
    for name, value in {"a.b": tensor.dequantize(), **others}.items():
        wanted = value.float() if value.dtype == torch.bfloat16 else value
        assert np.array_equal(read[name], wanted.numpy())
        assert read[name].dtype == wanted.numpy().dtype


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_those_of_the_copy(path, choice, dtype):
    torch.manual_seed(0)
    choice = {key: value for key, value in choice.items() if value is not None}
    net, fresh = nn.Linear(9, 6).to(dtype), nn.Linear(9, 6).to(dtype)
    before = copy.deepcopy(fresh.state_dict())
    strategy = Strategy({"weight": choice, "bias": None})
    save(net, strategy, path)
    x = torch.randn(5, 9, dtype=dtype)
    assert torch.equal(load(path, fresh)(x), quantize_model(net, strategy)(x))
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


class Zoo(nn.Module):
    """Tied, transposed, zero-dim, empty and integer tensors, buffers of all kinds, a batch norm, a
    state of its own."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7)
        if tied:
            self.head.weight = self.embedding.weight
        self.conv, self.norm = nn.Conv1d(6, 4, 3, bias=False), nn.BatchNorm1d(4)
        self.conv.weight = nn.Parameter(torch.randn(3, 6, 4).permute(2, 1, 0))
        self.gain = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("shift", torch.randn(4, 1))
        self.register_buffer("made", torch.randn(4, 1), persistent=False)
        self.register_buffer("order", torch.randperm(7))
        self.register_buffer("times", torch.randint(1, 9, ()))
        self.register_buffer("sparse", torch.randn(4, 4).relu().to_sparse_csr())
        self.register_buffer("view", self.conv.weight.detach()[:2, 0])
        self.power = int(torch.randint(1, 4, ()))

    def get_extra_state(self):
        return {"power": self.power}

    def set_extra_state(self, state):
        self.power = state["power"]

    def forward(self, words):
        inside = self.embedding(self.order[words]).mT
        inside = self.norm(self.conv(inside)) * self.gain + self.shift + self.made
        inside = self.sparse @ inside.flatten(1).T.reshape(4, -1) + self.view.sum()
        return self.head(inside.reshape(-1, 6)) * self.times**self.power


@pytest.fixture
def zoo():
    torch.manual_seed(1)
    net = Zoo()
    for _ in range(3):
        net(torch.randint(7, (6, 8)))
    return net.eval()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("folded", [(), (("conv", "norm"),)])
def test_all_that_inference_needs_is_there(path, zoo, folded):
    strategy = uniform_strategy(zoo, 4, axis=0)
    if folded:
        tensors = dict(strategy.tensors)
        tensors = {n: c for n, c in tensors.items() if not n.startswith("norm")}
        strategy = Strategy(tensors | {"conv.bias": None}, folded=folded)
    words, quantized = torch.randint(7, (6, 8)), quantize(zoo, strategy)
    size = save(zoo, strategy, path, judged={"ratio": np.float32(1), "none": float("nan")})
    torch.manual_seed(2)
    for tied in (True, False):
        back = load(path, Zoo(tied))
        assert torch.equal(back(words), quantize_model(zoo, strategy)(words))
        assert not back.training
    with NetworkFile(path) as file:
        promised = sum(model_bytes.measure(zoo, quantized, []).values())
        counters = 8 * (1 if folded else 2)
        state = file.others["_extra_state"].size
        assert file.index["model_bytes"] == promised == size - file.header_bytes - counters - state
        assert file.header_bytes < 1200
        assert "head.weight" not in {*file.tensors, *file.others}
        assert file.index["judged"] == {"ratio": 1.0, "none": None}
        assert Strategy(**file.index["strategy"]) == strategy


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parametrized_networks_leave_as_they_are_used(path, wrap, dtype):
    torch.manual_seed(0)
    net, fresh = (wrap(nn.Linear(8, 6)).to(dtype).eval() for _ in range(2))
    strategy, x = uniform_strategy(net, 4, axis=0), torch.randn(5, 8, dtype=dtype)
    wanted = quantize_model(net, strategy)(x)
    save(net, strategy, path)
    for target in (fresh, nn.Linear(8, 6).to(dtype)):
        assert torch.equal(load(path, target)(x), wanted)
    assert torch.equal(compressed(net, strategy)(x), wanted)
    export(net, strategy, path.with_suffix(".pt2"), x)
    program = torch.export.load(path.with_suffix(".pt2")).module()
    assert torch.equal(program(x), wanted)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_weights_are_tied_or_not(path, zoo):
    untied = Zoo(tied=False).eval()
    save(untied, uniform_strategy(untied, 4), path)
    with pytest.raises(ValueError, match=r"head.weight is float32 \[7, 6\] in the file, the same"):
        load(path, zoo)
    assert torch.equal(
        load(path, Zoo(tied=False)).head.weight,
        quantize_model(untied, uniform_strategy(untied, 4)).head.weight,
    )


def test_activations_are_rounded_in_the_loaded_network(path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(50, 6)
    activations = uniform_activations(net, [(x,)], 4)
    strategy = Strategy(uniform_strategy(net, 5).tensors, activations)
    quantized = quantize(net, strategy, [(x,)])
    save(net, quantized, path)
    assert torch.equal(load(path, copy.deepcopy(net))(x), quantize_model(net, quantized)(x))
    with NetworkFile(path) as file:
        for name, fit in file.quantized().activations.items():
            assert_same_qparams(fit, quantized.activations[name])


def test_any_reader_of_safetensors_opens_it(path):
    net = nn.Linear(3, 2)
    save(net, uniform_strategy(net, 4), path)
    with safe_open(path, "pt") as file, NetworkFile(path) as ours:
        assert set(file.keys()) == {"data", "index"}
        assert file.metadata()["format"] == "quantifind"
        index = json.loads(zlib.decompress(file.get_tensor("index").numpy().tobytes()))
        assert index == ours.index


def small(path, net=None):
    net = net or nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 4))
    save(net, uniform_strategy(net, 4, axis=0), path)
    return net


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(9, 6)), r"1.bias is float32 \[4\] in the file, missing"),
        (lambda: nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 5)), r"1.weight is float32 \[4, 6\]"),
        (lambda: nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 4)).double(), "float64"),
        (
            lambda: nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 4), nn.BatchNorm1d(4)),
            "2.bias is missing in the file",
        ),
    ],
)
def test_another_architecture_is_named(path, other, says):
    small(path)
    with pytest.raises(ValueError, match=says) as found:
        load(path, other())
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def json_of(content):
    """Of its header, None where there is none; members that nobody reads may differ."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = [header[name]["data_offsets"] for name in ("data", "index")]
        return header["__metadata__"], facts
    except (ValueError, KeyError, TypeError):
        return None


@given(data=st.data())
def test_no_altered_or_truncated_file_is_read(path, data):
    """Neither a bit nor an end is missed, wherever it is; but for spaces after the header."""
    torch.manual_seed(0)
    net = small(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    wanted = [bits_of(tensor) for tensor in load(path, net).state_dict().values()]
    for content in (bytes(damaged), whole[:place]):
        path.write_bytes(content)
        whole_header = len(content) == len(whole) and place < start
        if whole_header and json_of(content) == json_of(whole):
            assert [bits_of(t) for t in load(path, net).state_dict().values()] == wanted
        else:
            with pytest.raises(ValueError, match=re.escape(str(path))) as found:
                load(path, net)
            assert "\n" not in str(found.value)


def forged(path, change):
    """The file with another index, whose checksums are right."""
    small(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    data, (first, last) = header["data"]["data_offsets"], header["index"]["data_offsets"]
    index = json.loads(zlib.decompress(whole[start + first : start + last]))
    packed = change(index)
    packed = packed if isinstance(packed, bytes) else zlib.compress(json.dumps(index).encode())
    header["index"]["data_offsets"] = [data[1], data[1] + len(packed)]
    header["__metadata__"]["index_crc32"] = str(zlib.crc32(packed))
    first = json.dumps(header).encode()
    body = whole[start : start + data[1]]
    path.write_bytes(len(first).to_bytes(8, "little") + first + body + packed)


def weight(index):
    return index["tensors"]["0.weight"]


ROUNDED = {"levels": 4, "parts": {}, "crc32": 0}
BOMBS = [
    (lambda index: weight(index).update(shape=[2**40, 2**40]), "bytes for shape"),
    (lambda index: weight(index).update(shape=[6, -9]), "no count"),
    (lambda index: weight(index).update(shape=[6, 9.0]), "no count"),
    (lambda index: weight(index).update(levels=2**80), "levels"),
    (lambda index: weight(index).update(levels=7), "crc|bytes"),
    (lambda index: weight(index).update(axis=7), "range"),
    (lambda index: weight(index).update(group=0), "zero"),
    (lambda index: weight(index).update(group=1), "rows"),
    (lambda index: weight(index).update(dtype="object"), "object"),
    (lambda index: weight(index).update(table="9"), "9"),
    (lambda index: weight(index).update(storage="magic"), "magic"),
    (lambda index: weight(index)["parts"].update(scale=["float32", 2**50, 1]), "rows"),
    (lambda index: weight(index)["parts"].update(codes=["uint8", 2**62]), "not whole"),
    (lambda index: index.pop("others"), "others"),
    (lambda index: index["tensors"].pop("1.bias"), "not whole"),
    (lambda index: zlib.compress(b"[" * 100_000), "recursion|nested|index can't be read"),
    (lambda index: zlib.compress(b" " * (2**26 + 1)), "longer than"),
    (lambda index: b"no zlib at all", "index can't be read"),
    (lambda index: zlib.compress(b"[]"), "index can't be read"),
    (lambda index: index.update(folded=7), "index can't be read"),
    (lambda index: index.update(folded=[["0"]]), "index can't be read"),
    (lambda index: index.update(folded=[[1, 2]]), "of other than texts"),
    (lambda index: index.update(same=7), "index can't be read"),
    (lambda index: index.update(same={"0.bias": 7}), "index can't be read"),
    (lambda index: index.update(views=["0"]), "index can't be read"),
    (lambda index: index.update(same={"0.bias": "1.weight"}), "another architecture|not whole"),
    (lambda index: index.update(made=5), "index can't be read"),
    (lambda index: index.update(made={"mask": "1"}), "of other than whole numbers"),
    (lambda index: index.update(modules={"0": 1}), "of other than facts"),
    (lambda index: index.update(modules=[1]), "index can't be read"),
    (lambda index: index.update(more={}), "it has 'more', which is not known"),
    (lambda index: weight(index).update(axis=True), "axis is True"),
    (lambda index: zlib.compress(b'{"a":[' + b"{}," * 2**22 + b"{}]}"), "longer than"),
    (lambda index: index.update(activations={"a": ROUNDED}), "no such tensor"),
    (lambda index: index.update(activations={"a.product.0.left": ROUNDED}), "no module a"),
]


@pytest.mark.parametrize(("change", "says"), BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_refused_before_memory_is_taken(path, change, says):
    forged(path, change)
    with pytest.raises(ValueError, match=says) as found:
        load(path, nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 4)))
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


def test_an_index_of_many_tensors_is_read(path):
    """With long names that are alike, whose index is packed by most."""
    one = quantize(nn.Linear(2, 2), uniform_strategy(nn.Linear(2, 2), 4)).tensors["weight"]
    names = [f"model.encoder.layers.{i}.self_attention.projection.weight" for i in range(10_000)]
    choices = {name: {"scheme": "uniform", "bits": 4, "rounding": "nearest"} for name in names}
    about = {"strategy": {"tensors": choices}, "modules": {n: {"class": "Linear"} for n in names}}
    write_network(path, Quantized(dict.fromkeys(names, one)), {}, about)
    with NetworkFile(path) as file:
        assert len(file.tensors) == len(names)


@pytest.mark.parametrize("version", ["0", "-1", 2.5, 1, "x", None, "9" * 5000])
def test_what_is_no_version_is_refused(path, version):
    small(path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    header["__metadata__"]["version"] = version
    first = json.dumps(header).encode()
    path.write_bytes(len(first).to_bytes(8, "little") + first + whole[length:])
    with pytest.raises(ValueError, match=r"no file that quantifind\.save wrote"):
        load(path, nn.Linear(2, 2))


class Meets(nn.Module):
    """A product of what was computed, in a module of a name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.inner = name, nn.Linear(6, 6)
        self.add_module(name, Multiplies())

    def forward(self, x):
        return self.get_submodule(self.name)(self.inner(x), x)


class Multiplies(nn.Module):
    def forward(self, a, b):
        return a @ b.T


def test_activations_that_are_not_there_are_named(path):
    torch.manual_seed(0)
    net, x = Meets("core").eval(), torch.randn(3, 6)
    strategy = Strategy(uniform_strategy(net, 8).tensors, uniform_activations(net, [(x,)], 3))
    codes = quantize(net, strategy, [(x,)])
    save(net, codes, path)
    assert torch.equal(load(path, Meets("core"))(x), quantize_model(net, codes)(x))
    with pytest.raises(ValueError, match=r"core.product.0.left: the network has no module core"):
        load(path, Meets("kernel"))


# pairs of networks with the same tensors, that compute other things
PAIRS = [
    (lambda: nn.MultiheadAttention(8, 2), lambda: nn.MultiheadAttention(8, 4), "num_heads is 2 in"),
    (lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 3, stride=2), "stride is 1 in the file"),
    (lambda: nn.Conv1d(4, 4, 3), lambda: nn.ConvTranspose1d(4, 4, 3), "1 is Conv1d in the file,"),
    (lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 3, padding=1), "padding is 0 in the file"),
    (lambda: nn.LayerNorm(4), lambda: nn.LayerNorm(4, eps=1e-3), "eps is 1e-05 in the file, 0.001"),
    (lambda: nn.GroupNorm(1, 4), lambda: nn.GroupNorm(2, 4), "num_groups is 1 in the file, 2"),
    (lambda: nn.ReLU(), lambda: nn.GELU(), "is ReLU in the file, GELU in the network"),
    (lambda: nn.GELU(), lambda: nn.GELU("tanh"), "approximate is none in the file, tanh"),
    (lambda: nn.Softmax(0), lambda: nn.Softmax(1), "dim is 0 in the file, 1 in the network"),
    (lambda: nn.GRU(4, 4), lambda: nn.GRU(4, 4, batch_first=True), "batch_first is False in the"),
    (
        lambda: nn.TransformerEncoderLayer(4, 2, 4),
        lambda: nn.TransformerEncoderLayer(4, 2, 4, norm_first=True),
        "norm_first is False in the file, True",
    ),
]


@pytest.mark.parametrize(("one", "other", "says"), PAIRS, ids=range(len(PAIRS)))
def test_modules_that_compute_other_things_are_named(path, one, other, says, monkeypatch):
    """Of a file of before, that has none of it, only the tensors are compared."""
    net = nn.Sequential(nn.Linear(4, 4), one())
    save(net, uniform_strategy(net, 8), path)
    load(path, nn.Sequential(nn.Linear(4, 4), one()))
    with pytest.raises(ValueError, match=re.escape(says)) as found:
        load(path, nn.Sequential(nn.Linear(4, 4), other()))
    assert "\n" not in str(found.value)
    monkeypatch.setattr(saving, "module_facts", lambda model: {})
    save(net, uniform_strategy(net, 8), path)
    load(path, nn.Sequential(nn.Linear(4, 4), other()))


def test_what_changes_no_output_is_not_compared(path):
    """What concerns training, networks wrapped or parametrized, and classes of one's own."""

    class Own(nn.Linear):
        pass

    def net(dropout, inplace, linear, momentum):
        norm = nn.BatchNorm1d(6, momentum=momentum)
        return nn.Sequential(
            linear(6, 6), norm, nn.ReLU(inplace), nn.Dropout(dropout), nn.GRU(6, 6, dropout=0.0)
        )

    one, other = net(0.5, False, nn.Linear, 0.1), net(0.0, True, Own, 0.3)
    for model in (one, nn.DataParallel(one), weight_normed(one)):
        save(model, uniform_strategy(model, 8), path)
        for fresh in (other, copy.deepcopy(other).train(), copy.deepcopy(other).double().float()):
            load(path, fresh)


def test_what_hangs_on_a_module_is_nobodys_to_know(path):
    """Nor whether it was trained on one GPU or on several, and sides as one number or two."""

    def net(norm, size, path):
        made = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.AdaptiveAvgPool2d(size))
        made[0].path = path
        return made.eval()

    one, other = net(nn.SyncBatchNorm, (1, 1), "a secret path"), net(nn.BatchNorm2d, 1, None)
    save(one, uniform_strategy(one, 8), path)
    load(path, other)
    with NetworkFile(path) as file:
        assert "a secret path" not in str(file.index)
    wider = net(nn.BatchNorm2d, (2, 2), None)
    with pytest.raises(ValueError, match=r"2's output_size is 1 in the file, 2 in the network"):
        load(path, wider)


@pytest.mark.parametrize("judged", [{"p": [0] * 100_000}, {"p": "x" * 200_000}, {"p": [0] * 10**7}])
def test_what_is_said_of_a_network_is_read_or_refused(path, judged):
    net = nn.Linear(2, 2)
    if len(judged["p"]) > 10**6:
        with pytest.raises(ValueError, match=r"judged takes .* bytes: too many"):
            save(net, uniform_strategy(net, 4), path, judged=judged)
        return
    save(net, uniform_strategy(net, 4), path, judged=judged)
    load(path, net)


def weight_normed(net):
    net = copy.deepcopy(net)
    weight_norm(net[0])
    return net


def test_what_contains_itself_is_said(path):
    net, judged = nn.Linear(2, 2), {}
    judged["again"] = judged
    with pytest.raises(ValueError, match="judged contains itself"):
        save(net, uniform_strategy(net, 4), path, judged=judged)


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps(Executed()), "no file that quantifind.save wrote"),
        (b"", "no file that"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"data": [], 1: ', "no file that"),
        ((2**63).to_bytes(8, "little"), "no file that"),
        (b"PK\x03\x04" + bytes(100), "no file that"),
    ],
)
def test_no_other_file_is_read_or_executed(path, content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load(path, nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_a_later_version_is_refused(path):
    small(path)
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"3"'))
    with pytest.raises(ValueError, match=r"version 3 of the format.* up to 2"):
        load(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="can't be read"):
        load(path.with_name("missing"), nn.Linear(2, 2))


def test_a_path_that_cannot_be_written_is_named(path):
    net = small(path)
    for bad in (path.parent / "no" / "folder", path / "below", path.with_name("long" * 99)):
        with pytest.raises(ValueError, match="can't be written") as found:
            save(net, uniform_strategy(net, 4), bad)
        assert "\n" not in str(found.value)


def test_a_state_that_is_not_plain_is_named(path):
    class Keeps(nn.Linear):
        def get_extra_state(self):
            return Executed()

    with pytest.raises(ValueError, match="Executed"):
        small(path, nn.Sequential(Keeps(9, 6)))


def test_a_tensor_is_decoded_when_it_is_asked_for(path, monkeypatch):
    """Of a file damaged in another place the rest is read."""
    small(path)
    with NetworkFile(path) as file:
        place = file.tensors["1.weight"].start
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with NetworkFile(path) as file:
        assert file.tensor("0.weight").codes.shape == (6, 9)
        with pytest.raises(ValueError, match=r"1\.weight: it was altered"):
            file.tensor("1.weight")


def test_large_tensors_are_dequantized_in_little_memory(monkeypatch):
    """The same values, from parts of rows, or of one row."""
    monkeypatch.setattr("quantifind.tensor.quantized.AT_A_TIME", 7)
    torch.manual_seed(0)
    values = torch.randn(5, 3, 4)
    for choice in CHOICES:
        choice = {key: value for key, value in choice.items() if value is not None}
        net = nn.Module()
        net.weight = nn.Parameter(values)
        (tensor,) = quantize(net, Strategy({"weight": choice})).tensors.values()
        found = tensor.dequantize()
        monkeypatch.undo()
        assert torch.equal(tensor.dequantize(), found)
        monkeypatch.setattr("quantifind.tensor.quantized.AT_A_TIME", 7)


@pytest.mark.parametrize(
    "choice", [{"bits": 4, "axis": 0}, {"bits": 16, "axis": 1, "group": 64}, {"levels": 3}, None]
)
def test_a_large_tensor_is_loaded_in_little_memory(path, choice, monkeypatch):
    """Of what torch makes and what is read at once, only the weight of the network that is returned
    is more than a thirtieth of it."""
    monkeypatch.setattr(network_reader, "STEP", 2**7 * packing.TOGETHER)
    net = nn.Linear(512, 1024)
    choice = choice and {"scheme": "uniform", **choice}
    save(net, Strategy({"weight": choice, "bias": None}), path)
    most, large, read = net.weight.nbytes / 30, {}, []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() > most:
                large[made.untyped_storage().data_ptr()] = func
            return made

    def counted(self, start, count, bytes_of=NetworkFile._bytes):
        read.append(count)
        return bytes_of(self, start, count)

    monkeypatch.setattr(NetworkFile, "_bytes", counted)
    with Watching():
        loaded = load(path, net)
    allowed = {one.weight.untyped_storage().data_ptr() for one in (net, loaded)}
    assert loaded.weight.untyped_storage().data_ptr() in large
    assert large.keys() <= allowed, large
    assert 0 < max(read) <= most


def test_expanded_tensors_are_loaded(path):
    class Holds(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.bias = nn.Parameter(torch.randn(1).expand(4))
            self.register_buffer("shift", torch.randn(3, 1, 4).expand(3, 2, 4))

    net, fresh = Holds(), Holds()
    save(net, Strategy({"weight": None, "bias": None}), path)
    loaded = load(path, fresh)
    for name in ("bias", "shift"):
        assert torch.equal(getattr(loaded, name), getattr(net, name))
        assert not torch.equal(getattr(loaded, name), getattr(fresh, name))


def test_what_no_file_has_is_looked_at(path):
    """Whole numbers and masks that the network's own code makes, and makes otherwise."""

    class Makes(nn.Linear):
        def __init__(self, mask):
            super().__init__(4, 4)
            self.register_buffer("mask", mask, persistent=False)

        def forward(self, x):
            return super().forward(x) * self.mask

    mask = torch.tensor([True, False, True, True])
    net = Makes(mask)
    save(net, uniform_strategy(net, 4), path)
    x = torch.randn(2, 4)
    wanted = quantize_model(net, uniform_strategy(net, 4))(x)
    assert torch.equal(load(path, Makes(mask.clone()))(x), wanted)
    load(path, Makes(torch.ones(2, 1, 4).bool()))  # one that grows with what is seen
    load(path, Makes(None))
    with pytest.raises(
        ValueError, match=r"mask \(bool \[4\]\) has other values in the network"
    ) as found:
        load(path, Makes(~mask))
    assert str(path) in str(found.value)


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pt", ".pth"])
def test_an_ending_of_another_format_is_refused(tmp_path, ending):
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"its ending is '{ending}': a file in the safetensors"):
        save(net, uniform_strategy(net, 4), tmp_path / f"net{ending}")
    assert not list(tmp_path.iterdir())


def test_a_dense_file_and_a_sparse_buffer_are_of_different_kinds(path):
    class Holds(nn.Linear):
        def __init__(self, shift):
            super().__init__(4, 4)
            self.register_buffer("shift", shift)

    dense = torch.ones(4, 4)
    kinds = {"": Holds(dense), "sparse_coo ": Holds(dense.to_sparse())}
    for one, net in kinds.items():
        for other, fresh in kinds.items():
            save(net, uniform_strategy(net, 4), path)
            if one == other:
                assert torch.equal(load(path, fresh).shift.to_dense(), dense)
                continue
            says = rf"shift is {one}float32 \[4, 4\] in the file, {other}float32 \[4, 4\] in the"
            with pytest.raises(ValueError, match=says) as found:
                load(path, fresh)
            assert "\n" not in str(found.value)


def test_what_a_search_found_is_saved_with_how_it_was_judged(path, classifier, monkeypatch):
    net, criterion, (train, val, _) = classifier
    found = find_strategy(net.eval(), train, val, criterion, limit=3.0, widths=[2, 4])
    size = save(net, found, path)
    with NetworkFile(path) as file:
        assert size == found.model_bytes + file.header_bytes
        assert file.index["judged"]["limits"] == {"criterion_ratio": 3.0}
        assert file.index["judged"]["on"] == "validation data"
        assert Strategy(**file.index["strategy"]) == found.strategy
    x = torch.randn(5, 6)
    wanted = quantize_model(net, found.quantized)(x)
    monkeypatch.chdir(path.parent)
    names = {"net": net, "found": found, "inputs": x}
    exec(USE, names)
    assert names["size"] == size
    assert torch.equal(names["loaded"](x), wanted)
    assert torch.equal(names["small"](x), wanted)
    by_others = copy.deepcopy(net)
    read = read_by_docs(path)
    by_others.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in read.items()})
    assert torch.equal(by_others(x), wanted)
    assert len(names["table"]) == len(found.quantized.tensors)
