"""Splits of data as files: every tensor of the batches, whole, and how a batch is made of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten_with_path,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)
from torch.utils.data import DataLoader, Dataset

from quantifind.utils.loaders import Tensors, batch_loader, in_order, whole_tensors
from stages import files

PAIR = ("inputs", "targets")


class Examples(Dataset):
    """Examples from which a loader takes a whole batch, a tree of tensors, at once.

    leaves: (examples, …) each, in the order of the tree.
    tree: how a batch is made of them.
    """

    def __init__(self, leaves: list[Tensor], tree: TreeSpec) -> None:
        self.leaves, self.tree = leaves, tree

    def __len__(self) -> int:
        return len(self.leaves[0])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        return tree_unflatten([leaf[indices] for leaf in self.leaves], self.tree)


def split_of(loader: Any) -> tuple[dict[str, Tensor], TreeSpec | None]:
    """All examples behind a loader: tensors by the places that they have in a batch, and how a
    batch is made of them; None for a pair, whose tensors are "inputs" and "targets".

    loader: a DataLoader; or any batches, which are taken as they come.
    Raises: ValueError for examples that are not tensors of one shape, in tuples, lists and dicts;
    and as `quantifind.utils.loaders.in_order` does.
    """
    tensors = whole_tensors(loader) if isinstance(loader, DataLoader) else None
    if tensors is not None and len(tensors) == 2:
        return dict(zip(PAIR, tensors, strict=True)), None
    parts: dict[str, list[Tensor]] = {}
    trees = []
    for batch in map(_plain, in_order(loader) if isinstance(loader, DataLoader) else loader):
        leaves, tree = tree_flatten_with_path(batch)
        trees.append(tree)
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"batch{keystr(path)} is a {type(leaf).__name__}: tensors are needed, in "
                    "tuples, lists and dicts"
                )
            # a copy, since a loader may use its memory again
            parts.setdefault(f"batch{keystr(path)}", []).append(leaf.detach().cpu().clone())
    if not trees:
        raise ValueError("the loader has no batches")
    if any(tree != trees[0] for tree in trees):
        raise ValueError("batches differ in what they hold: the pipeline needs them alike")
    whole = {name: _joined(name, tensors) for name, tensors in parts.items()}
    counts = {name: len(tensor) for name, tensor in whole.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the tensors of a batch are not of as many examples each: {counts}")
    if list(whole) == ["batch[0]", "batch[1]"]:
        return dict(zip(PAIR, whole.values(), strict=True)), None
    return whole, trees[0]


def _joined(name: str, tensors: list[Tensor]) -> Tensor:
    if not tensors[0].dim() or len({tensor.shape[1:] for tensor in tensors}) > 1:
        shapes = ", ".join(sorted({str(list(tensor.shape)) for tensor in tensors})[:3])
        raise ValueError(
            f"{name} has the shapes {shapes}: the pipeline needs (examples, …), alike but for the "
            "first; pad them to one length, or call find_strategy from Python"
        )
    return torch.cat(tensors)


def write_split(path: Path, tensors: dict[str, Tensor], tree: TreeSpec | None) -> None:
    """Write what `split_of` gave.

    path: as for `stages.files.write`.
    """
    facts = None if tree is None else {"tree": treespec_dumps(tree), "names": "\n".join(tensors)}
    files.write_tensors(path, tensors, facts)


def read_split(path: Path, *, batch_size: int, shuffle: bool, seed: int) -> DataLoader:
    """A loader of the batches that `write_split` wrote.

    path: the file.
    batch_size: in examples.
    shuffle: whether their order is drawn, by a generator of the loader's own.
    seed: of that.
    Raises: ValueError naming the file where it is not whole; OSError where it can't be read.
    """
    tensors = files.read_tensors(path)
    facts = files.read_facts(path)
    if "tree" not in facts:
        pair = Tensors(*(tensors[name] for name in PAIR))
        return batch_loader(pair, batch_size=batch_size, shuffle=shuffle, seed=seed)
    leaves = [tensors[name] for name in facts["names"].split("\n")]
    return DataLoader(
        Examples(leaves, treespec_loads(facts["tree"])),
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _plain(batch: Any) -> Any:
    """A batch whose mappings, such as those of tokenizers, are dicts."""
    if isinstance(batch, Mapping):
        return {str(key): _plain(value) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(map(_plain, batch))
    return batch
