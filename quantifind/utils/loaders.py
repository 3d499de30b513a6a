"""The split and the loaders behind all three data sets: whole splits kept as tensors."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from quantifind.utils.batches import copied, rows_of

Loaders = tuple[DataLoader, DataLoader, DataLoader]


class Tensors(TensorDataset):
    """A TensorDataset from which a DataLoader takes a whole batch by one indexing operation."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[indices]


def batch_loader(dataset: Tensors, *, batch_size: int, shuffle: bool, seed: int) -> DataLoader:
    """Batches ``[inputs, targets]``; the order is drawn from a generator of the loader's own."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list,
    )


def split_loaders(
    train: Tensors, val: Tensors, test: Tensors, *, batch_size: int = 64, seed: int = 0
) -> Loaders:
    """The train (shuffled), validation and test loaders of three splits."""
    return (
        batch_loader(train, batch_size=batch_size, shuffle=True, seed=seed),
        batch_loader(val, batch_size=batch_size, shuffle=False, seed=seed),
        batch_loader(test, batch_size=batch_size, shuffle=False, seed=seed),
    )


def random_split(dataset: TensorDataset, sizes: Sequence[int], *, seed: int = 0) -> list[Tensors]:
    """Disjoint random parts of ``sizes`` examples; the global random state is left as it was.

    Raises: ValueError when sizes don't add up to the number of examples, or one is not positive.
    """
    if sum(sizes) != len(dataset) or min(sizes) < 1:
        raise ValueError(
            f"cannot split {len(dataset)} examples into {list(sizes)}: "
            "each part needs an example, and the parts must add up"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return [Tensors(*(t[part] for t in dataset.tensors)) for part in order.split(list(sizes))]


def create_dataloaders(
    dataset: TensorDataset,
    *,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    batch_size: int = 64,
    seed: int = 0,
) -> Loaders:
    """Split a TensorDataset of (inputs, targets) at random into train, val and test loaders.

    fractions: shares of train, val and test, adding up to 1.
    Raises: ValueError when a share is not positive or leaves its part without examples.
    """
    if abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions {fractions} add up to {sum(fractions)}, not to 1")
    val, test = (round(len(dataset) * fraction) for fraction in fractions[1:])
    parts = random_split(dataset, [len(dataset) - val - test, val, test], seed=seed)
    return split_loaders(*parts, batch_size=batch_size, seed=seed)


def whole_split(loader: DataLoader) -> tuple[Tensor, Tensor]:
    """All inputs and all targets behind a loader, in the order of its data set.

    Raises: ValueError for a loader whose sampler leaves examples out or repeats them: what it would
    have drawn is not the whole data set (split that with torch.utils.data.Subset instead).
    """
    tensors = whole_tensors(loader)
    if tensors is not None:
        inputs, targets = tensors
        return inputs, targets
    batches = [copied(batch) for batch in in_order(loader)]
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([t for _, t in batches])


def whole_tensors(loader: DataLoader) -> tuple[Tensor, ...] | None:
    """The tensors whose rows a loader's batches are; None where the data set, or what collates its
    examples, has code of its own (test_code_of_a_loaders_own_is_run).

    Raises: ValueError as `in_order`.
    """
    dataset: Any = loader.dataset
    plain = type(dataset) in (TensorDataset, Tensors) and not _has_own_batches(loader)
    if not plain or loader.collate_fn not in (default_collate, list):
        return None
    check_draws_all(loader)
    return dataset.tensors


def in_order(loader: DataLoader) -> Iterable[Any]:
    """All batches of a loader, in the order of the data set where it is not the loader's own.

    Raises: ValueError as `check_draws_all`.
    """
    if _has_own_batches(loader):
        return loader
    check_draws_all(loader)
    return DataLoader(loader.dataset, batch_size=256, collate_fn=loader.collate_fn)


def _has_own_batches(loader: DataLoader) -> bool:
    """Whether the batches are made by the data set, or by an iteration of the loader's own."""
    return (
        type(loader).__iter__ is not DataLoader.__iter__
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    )


def check_draws_all(loader: DataLoader) -> None:
    """Raise ValueError for a loader whose sampler leaves examples out or repeats them."""
    if not _draws_all(loader):
        raise ValueError(
            f"a loader draws its examples by a {type(loader.sampler).__name__}: give each split "
            "a data set of its own, such as torch.utils.data.Subset"
        )


def sample(loader: Iterable[Any], examples: int, *, seed: int = 0) -> list[Any]:
    """Batches of so many examples, or of all there are, always the same for a seed; random state
    is left as it was. Of what doesn't draw each example of a data set once, the first batches,
    which are the same where its sampler has no generator of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(loader, DataLoader) and _draws_all(loader):
            dataset: Any = loader.dataset
            chosen = Subset(dataset, torch.randperm(len(dataset))[:examples].tolist())
            size = loader.batch_size or 64
            return list(DataLoader(chosen, batch_size=size, collate_fn=loader.collate_fn))
        found: list[Any] = []
        for batch in loader:
            # a loader may use its memory again: test_a_loader_may_use_its_memory_again
            found.append(copied(batch))
            examples -= rows_of(batch) or 1
            if examples <= 0:
                break
        return found


def length_of(loader: Iterable[Any]) -> int:
    """How many batches an epoch has; of a loader that doesn't say so, those it gives are counted.

    Raises: ValueError for what can be gone through once only.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            f"training data are a {type(loader).__name__}, which can be gone through once only: "
            "give a DataLoader, or a list of its batches"
        )
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in loader)


def _draws_all(loader: DataLoader) -> bool:
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    if _has_own_batches(loader):
        return False
    if (
        type(loader.batch_sampler) is not BatchSampler
        or loader.batch_sampler.sampler is not sampler
    ):
        return False
    return isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(dataset)
    )
