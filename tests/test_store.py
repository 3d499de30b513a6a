"""What was put comes back, from memory and from a folder; a fingerprint tells things apart."""

import hashlib
import itertools
import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis.extra import numpy as hnp
from torch import nn

from quantifind.storage.store import Store, _bytes, fingerprint, fingerprint_of_examples
from quantifind.utils.batches import Batch

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e8m0fnu),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abé/ "), inner),
    max_leaves=8,
)  # fmt: skip


@st.composite
def tensors(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    numbers = draw(hnp.arrays("float32", shape, elements=st.floats(0, 9, width=32)))
    return torch.zeros(shape).copy_(torch.from_numpy(numbers)).to(draw(st.sampled_from(DTYPES)))


def in_bytes(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.fixture
def entry():
    return {"weight": torch.linspace(-1, 1, 50), "codes": torch.arange(9)}, {"of": ["a", None, 0.1]}


@settings(max_examples=40)
@given(named=st.dictionaries(st.text("ab./é", min_size=1), tensors(), max_size=3), values=PLAIN)
def test_what_was_put_comes_back(tmp_path_factory, named, values):
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    store.put("key", named, values)
    for kept in (store, Store(folder), Store(str(folder))):
        back, plain = kept.get("key")
        assert {n: in_bytes(t) for n, t in back.items()} == {
            n: in_bytes(t) for n, t in named.items()
        }
        assert plain == values
        assert kept.get("another key") is None


def test_the_last_one_put_counts(tmp_path, entry):
    for store in (Store(), Store(tmp_path)):
        store.put("key", *entry)
        store.put("key", {"weight": torch.zeros(2)})
        for kept in (store, *([Store(tmp_path)] if store.folder else [])):
            back, plain = kept.get("key")
            assert (list(back), back["weight"].tolist(), plain) == (["weight"], [0, 0], None)


def test_any_string_is_a_key(tmp_path, entry):
    keys = ["", "a/b", "../a", "ä" * 300, "a\0b", "A", "a"]
    store = Store(tmp_path)
    for number, key in enumerate(keys):
        store.put(key, {"number": torch.tensor(number)})
    again = Store(tmp_path)
    assert [again.get(key)[0]["number"].item() for key in keys] == list(range(len(keys)))
    assert len(list(tmp_path.iterdir())) == len(keys)


def test_tensors_may_share_memory_and_need_gradients(tmp_path):
    weight = torch.arange(12.0, requires_grad=True)
    table = weight.reshape(3, 4)
    named = {"whole": weight, "again": weight, "turned": table.T, "part": table[1:, ::2]}
    Store(tmp_path).put("key", named)
    back, _ = Store(tmp_path).get("key")
    assert all(torch.equal(back[name], tensor.detach()) for name, tensor in named.items())


def test_a_memory_alone_writes_nothing(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    store = Store()
    store.put("key", *entry)
    assert store.get("key") is not None
    assert Store().get("key") is None
    assert not list(tmp_path.iterdir())


def test_the_folder_is_made_when_it_is_needed(tmp_path, entry):
    folder = tmp_path / "a" / "b"
    store = Store(folder)
    assert store.get("key") is None
    assert not folder.exists()
    store.put("key", *entry)
    assert Store(folder).get("key") is not None


def test_a_damaged_entry_is_measured_again(tmp_path, entry):
    """However short the file is cut, and whatever stands in its place; then it is whole again."""
    Store(tmp_path).put("key", *entry)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    for damaged in (*(raw[:length] for length in range(len(raw))), b"\0" * 99, b"\xff" * 99):
        path.write_bytes(damaged)
        store = Store(tmp_path)
        assert store.get("key") is None
    store.put("key", *entry)
    assert path.read_bytes() == raw
    assert Store(tmp_path).get("key")[1] == entry[1]


@pytest.mark.parametrize("metadata", [None, {"other": "1"}])
def test_a_file_of_something_else_counts_as_none(tmp_path, entry, metadata):
    from safetensors.torch import save_file

    Store(tmp_path).put("key", *entry)
    (path,) = tmp_path.iterdir()
    save_file({"weight": torch.zeros(2)}, path, metadata)
    assert Store(tmp_path).get("key") is None


def test_what_was_put_stays_when_the_tensor_changes(tmp_path):
    weight, store = torch.ones(3), Store(tmp_path)
    store.put("key", {"weight": weight})
    weight.zero_()
    assert Store(tmp_path).get("key")[0]["weight"].tolist() == [1, 1, 1]
    assert store.get("key")[0]["weight"].tolist() == [1, 1, 1]


class KilledError(Exception):
    pass


def test_a_kill_leaves_no_half_file(tmp_path, monkeypatch, entry):
    """Neither in place of nothing nor in place of what was there before."""

    def kill(*_):
        raise KilledError

    def put(*changed):
        store = Store(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            with pytest.raises(KilledError):
                store.put("key", *changed)

    put(*entry)
    assert not list(tmp_path.glob("*.safetensors"))
    assert Store(tmp_path).get("key") is None
    Store(tmp_path).put("key", *entry)
    put({"weight": torch.zeros(9)})
    (path,) = tmp_path.glob("*.safetensors")
    assert torch.equal(Store(tmp_path).get("key")[0]["weight"], entry[0]["weight"])
    Store(tmp_path).put("key", {"weight": torch.zeros(9)})
    assert list(tmp_path.glob("*.safetensors")) == [path]
    assert Store(tmp_path).get("key")[0]["weight"].shape == (9,)


class Buffered(nn.Module):
    def __init__(self, weight=(1.0, 2.0), shift=(0.0, 0.0), dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
        self.register_buffer("shift", torch.tensor(shift))


# the same numbers, or the same bytes, each time
DIFFERENT = [
    Buffered(),
    Buffered(weight=(1.0, 2.0000002)),
    Buffered(weight=((1.0, 2.0),)),
    Buffered(weight=((1.0,), (2.0,))),
    Buffered(shift=(0.0, 1e-45)),
    Buffered(dtype=torch.float64),
    Buffered(weight=(0.0, 0.0), shift=(1.0, 2.0)),
    torch.zeros(4),
    torch.zeros(2, 2),
    torch.zeros(4, dtype=torch.float16),
    torch.zeros(4, dtype=torch.int32),
    torch.zeros(2, dtype=torch.float64),
    torch.tensor([1.0, 2.0]),
    torch.tensor([2.0, 1.0]),
    torch.tensor([[1.0], [2.0]]),
    torch.zeros(0),
    torch.zeros(0, 2),
    torch.tensor(0.0),
    *(None, 0, 0.0, False, "", "0", [], {}, [0], [[0]], ["a", "b"], ["ab"], 1, 1.5, True, "a"),
    *({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"scheme": "uniform", "bits": 4}),
]


def test_different_things_have_different_fingerprints():
    alone = [fingerprint(part) for part in DIFFERENT]
    assert len(set(alone)) == len(alone)
    lists = [(), *((part,) for part in DIFFERENT), ("a", "b"), ("b", "a"), ("ab",), ("a", "a")]
    assert len({fingerprint(*parts) for parts in lists}) == len(lists)


@settings(max_examples=40)
@given(one=tensors(), other=tensors())
def test_tensors_have_one_fingerprint_where_they_are_alike(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (in_bytes(one) == in_bytes(other))


def test_an_empty_tensor_of_any_stride_has_a_fingerprint():
    odd = torch.zeros(0, dtype=torch.float16).as_strided((0,), (0,))
    assert fingerprint(odd) == fingerprint(torch.zeros(0, dtype=torch.float16))


@given(one=PLAIN, other=PLAIN)
def test_plain_values_have_one_fingerprint_where_they_are_alike(one, other):
    # 1, 1.0 and True are equal, but not alike
    assert (fingerprint(one) == fingerprint(other)) == (repr_sorted(one) == repr_sorted(other))


def repr_sorted(value):
    if isinstance(value, dict):
        return f"dict {sorted((key, repr_sorted(item)) for key, item in value.items())}"
    return repr([repr_sorted(item) for item in value] if isinstance(value, list) else value)


def things():
    """A network and all else that a fingerprint takes, made anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(2, 1, 5, 5))
    plain = {"scheme": "uniform", "bits": 3, "axis": None, "share": 0.1}
    return [net, torch.randn(3, 2).T, torch.tensor(True), plain, [1, 2.5, "é"], None]


def test_equal_copies_have_the_same_fingerprint():
    net, *others = things()
    same = fingerprint(net, *others)
    assert fingerprint(*things()) == same
    net.eval().requires_grad_(False)
    assert fingerprint(net, *others) == same
    others[0] = others[0].contiguous()
    others[2] = dict(reversed(others[2].items()))
    assert fingerprint(net, *others) == same
    net[1].running_mean[0] += 1
    assert fingerprint(net, *others) != same


def test_tensors_by_name_are_told_apart_by_every_value():
    one = {"codes": torch.zeros(5_000), "scale": torch.ones(1)}
    other = one | {"codes": one["codes"].index_fill(0, torch.tensor([2_500]), 1e-7)}
    assert fingerprint(one) == fingerprint(dict(one)) != fingerprint(other)
    assert fingerprint(one) != fingerprint({"scale": one["scale"], "code": one["codes"]})


def test_another_process_has_the_same_fingerprint():
    code = "from test_store import *; print(fingerprint(*things(), 'end'))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == fingerprint(*things(), "end")


def batches_in(examples, sizes):
    """Examples, each some tensors, padded to the longest in each batch."""
    found, start = [], 0
    for size in itertools.cycle(sizes):
        some, start = examples[start : start + size], start + size
        if not some:
            return found
        found.append(Batch([padded(parts) for parts in zip(*some, strict=True)], None))


def padded(parts):
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    whole = parts[0].new_zeros(len(parts), *shape)
    for row, part in zip(whole, parts, strict=True):
        row[tuple(map(slice, part.shape))] = part
    return whole


def unlike(batches):
    """By axis, whether batches differ in their size."""
    shapes = [batch.data[0].shape[1:] for batch in batches]
    return [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]


def some_examples(kind, generator, examples=60):
    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(examples):
        length = number(2, 40)
        tokens = torch.randint(1, 9, (length,), generator=generator)
        label = torch.tensor(number(0, 3))
        if kind == "texts":  # that end as most do
            tokens[-1] = 9 if number(0, 3) else 7
            yield tokens, torch.ones(length, dtype=torch.bool), tokens % 6 - 100, label
        elif kind == "tokens":
            yield tokens, label
        elif kind == "vectors":
            yield torch.randn(length, 3, generator=generator), label
        else:  # on paper whose margins are white
            image = torch.rand(3, length, number(2, 40), generator=generator)
            image[:, :, -1] = image[:, -1] = 1.0
            yield image, label


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["texts", "tokens", "vectors", "images"]),
    seed=st.integers(0, 10_000),
    sizes=st.sampled_from([[1], [4], [7], [8, 20], [32]]),
    changed=st.integers(0, 59),
)
def test_padding_is_not_in_a_fingerprint_of_examples(kind, seed, sizes, changed):
    """Padded to the longest of a batch, whatever their order; other examples are others."""
    generator = torch.Generator().manual_seed(seed)
    examples = list(some_examples(kind, generator))
    plain = batches_in(examples, [16])
    wanted = fingerprint_of_examples(plain)
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = batches_in([examples[i] for i in order], sizes)
    # what all batches are padded to alike stays as it is
    assume(unlike(plain) == unlike(batches) == unlike(batches_in(examples, [1])))
    assert fingerprint_of_examples(batches) == wanted
    first, *others = examples[changed]
    other = first.clone()
    other[0] = 9 - other[0]
    changed_ones = [*examples[:changed], (other, *others), *examples[changed + 1 :]]
    assert fingerprint_of_examples(batches_in(changed_ones, sizes)) != wanted
    assert fingerprint_of_examples(batches_in(examples[1:], sizes)) != wanted


@settings(max_examples=20, deadline=None)
@given(data=tensors().filter(lambda t: t.dim() and len(t)), size=st.integers(1, 3))
def test_batches_that_are_alike_are_taken_as_they_are(data, size):
    """As earlier versions took them, whose looks have been counted."""
    batches = [Batch([some], None) for some in data.split(size)]
    digests = sorted(hashlib.sha256(_bytes(row)).digest() for row in data)
    assert fingerprint_of_examples(batches) == hashlib.sha256(b"".join(digests)).hexdigest()
