"""Data as people have them, as files and back: what a batch holds, in what it holds it."""

import re
from collections import UserDict
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from quantifind.utils.loaders import sample, whole_split
from stages.prepare import create_splits, describe
from stages.splits import read_split, split_of, write_split

A, B, LABELS = torch.arange(14.0).reshape(7, 2), torch.arange(7) * 3, torch.arange(7) % 4


class Rows(Dataset):
    """Examples made by a function of their number."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return self.make(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": A[i], "labels": LABELS[i]} for i in range(7)])


def reused():
    """Batches in memory that is written over."""
    memory = torch.empty(2)
    for row in A:
        memory.copy_(row)
        yield {"x": memory[None]}


# what a data set gives for an example, and a loader, but for a tuple of it, for a batch
FORMS = {
    "three tensors": lambda i: (A[i], B[i], LABELS[i]),
    "a pair in a pair": lambda i: ((A[i], B[i]), LABELS[i]),
    "a dict": lambda i: {"x": A[i], "labels": LABELS[i]},
    "inputs alone": lambda i: A[i],
    "a list in a dict": lambda i: {"x": [A[i], B[i]]},
}


def plain(batch):
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(part) for part in batch] if isinstance(batch, list | tuple) else batch.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_back_as_they_were(form, tmp_path):
    make = FORMS[form]
    path = tmp_path / "split.safetensors"
    write_split(path, *split_of(DataLoader(Rows(make), batch_size=2, shuffle=True)))
    batches = list(read_split(path, batch_size=3, shuffle=False, seed=0))
    assert [plain(b) for b in batches] == [
        plain(make(torch.tensor(part))) for part in ([0, 1, 2], [3, 4, 5], [6])
    ]
    one, again, other = (
        [plain(b) for b in read_split(path, batch_size=7, shuffle=True, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert one == again != other


@pytest.mark.parametrize("seen", [TensorDataset(A, LABELS), Rows(lambda i: (A[i], LABELS[i]))])
def test_a_pair_is_inputs_and_targets(seen):
    tensors, tree = split_of(DataLoader(seen, batch_size=3))
    assert tree is None
    assert torch.equal(tensors["inputs"], A)
    assert torch.equal(tensors["targets"], LABELS)


class Halves(TensorDataset):
    """Tensors, of which it gives the half."""

    def __getitem__(self, index):
        return tuple(tensor[index] / 2 for tensor in self.tensors)


class Whole(Dataset):
    """Has tensors by that name, which are not its examples."""

    tensors = (A, LABELS)

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return A[index] / 2, LABELS[index] / 2


def halved(examples):
    return [torch.stack(parts) / 2 for parts in zip(*examples, strict=True)]


class Halving(DataLoader):
    def __iter__(self):
        return ([part / 2 for part in batch] for batch in super().__iter__())


OWN = {
    "data set": lambda **how: DataLoader(Halves(A, LABELS), **how),
    "tensors by name": lambda **how: DataLoader(Whole(), **how),
    "collate": lambda **how: DataLoader(TensorDataset(A, LABELS), collate_fn=halved, **how),
    "iteration": lambda **how: Halving(TensorDataset(A, LABELS), **how),
    "none": lambda **how: DataLoader(TensorDataset(A / 2, LABELS / 2), **how),
}


@pytest.mark.parametrize("kind", OWN)
def test_code_of_a_loaders_own_is_run(kind):
    """Whatever reads a loader gives what going through it gives."""
    loader = OWN[kind](batch_size=3)
    wanted = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert torch.equal(wanted[0], A / 2)
    tensors, tree = split_of(loader)
    sampled = sample(loader, 7)
    for found in (
        [tensors["inputs"], tensors["targets"]],
        whole_split(loader),
        [torch.cat(parts).sort(0)[0] for parts in zip(*sampled, strict=True)],
    ):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].sort()[0], wanted[1].sort()[0])
    assert tree is None


LOADERS = {
    "a stream": lambda: DataLoader(Stream(), batch_size=3),
    "a list": lambda: [{"x": A[:4], "labels": LABELS[:4]}, {"x": A[4:], "labels": LABELS[4:]}],
    "a generator": lambda: ({"x": A[i][None], "labels": LABELS[i][None]} for i in range(7)),
    "reused memory": reused,
    "another mapping": lambda: [UserDict({"x": A, "labels": LABELS})],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_any_loader_is_read_whole(kind):
    tensors, _ = split_of(LOADERS[kind]())
    assert torch.equal(tensors["batch['x']"], A)
    assert kind == "reused memory" or torch.equal(tensors["batch['labels']"], LABELS)


REFUSED = {
    "texts": ([{"x": A, "text": ["a"] * 7}], "batch['text'][0] is a str: tensors are needed"),
    "lengths": ([{"x": A}, {"x": torch.ones(7, 3)}], "batch['x'] has the shapes [7, 2], [7, 3]"),
    "no axis": ([{"x": A, "rate": torch.tensor(1.0)}], "batch['rate'] has the shapes []"),
    "counts": (
        [(A, B[:3], LABELS)],
        "the tensors of a batch are not of as many examples",
    ),
    "kinds": ([{"x": A}, {"y": A}], "batches differ in what they hold"),
    "nothing": ([], "the loader has no batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_pipeline_cannot_hold_is_named(case):
    batches, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(f"own: the train split: {message}")) as caught:
        create_splits(lambda: [batches] * 3, "own", 0)
    assert "\n" not in str(caught.value)


def test_a_data_module_that_fails_is_named():
    def broken():
        return {}["root"]

    with pytest.raises(ValueError, match=r"own: create_dataloaders\(\): KeyError: 'root' \(test_"):
        create_splits(broken, "own", 0)
    with pytest.raises(ValueError, match=r"own: create_dataloaders\(\) gives 2 loaders, not tr"):
        create_splits(lambda: [[], []], "own", 0)
    uneven = [[{"x": A}], [{"x": A}], [{"y": A}]]
    with pytest.raises(ValueError, match="own: batches differ from split to split: train has"):
        create_splits(lambda: uneven, "own", 0)
    with pytest.raises(OSError, match="gone"):
        create_splits(lambda: Path("gone").read_bytes(), "own", 0)


def test_a_network_is_told_what_its_batches_have():
    split = {"batch['input_ids']": B, "batch['mask']": LABELS, "batch['labels']": LABELS}
    splits = dict.fromkeys(("train", "val", "test"), split)
    assert describe(splits) == {
        "examples": dict.fromkeys(splits, 7), "classes": 4, "vocabulary": 19,
    }  # fmt: skip
    assert "classes" not in describe({"train": {"inputs": A, "targets": A}})
