"""What loaders pad to the longest example of a batch, by its values alone: where each ends."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# of a batch its tensors, (rows, ...) each
Tensors = Sequence[Tensor]
# axes that padding makes equally long, each of a tensor by its number
Axes = tuple[tuple[int, int], ...]
# what so large a share of the examples ends in is taken for padding: with two in a batch it is half
SHARE = 1 / 3


def unpadded(batches: Sequence[Tensors]) -> Iterator[list[Tensor]]:
    """Of each example its tensors, without what pads them along the axes in which batches differ.

    Padding is one value in each tensor, the one that most examples end in. What is taken away goes
    on for as long as many end alike, so that a text's last dot goes, too, padded or not: what is
    left is the same in any batches (test_padding_is_not_in_a_fingerprint_of_examples). Where few
    examples are padded, it can't be told from what they end in, and stays; and so does what all
    batches are padded to alike.

    batches: of each its tensors, with a row for each example.
    """
    lengths = {axes: [_full(batch, axes) for batch in batches] for axes in _varying(batches)}
    while any(_shortened(batches, lengths, axes) for axes in lengths):
        pass
    for number, batch in enumerate(batches):
        for row in range(len(batch[0])):
            parts = [tensor[row] for tensor in batch]
            for axes, found in lengths.items():
                for which, axis in axes:
                    parts[which] = parts[which].narrow(axis - 1, 0, int(found[number][row]))
            yield parts


def _varying(batches: Sequence[Tensors]) -> list[Axes]:
    """Axes in which batches differ, those together that are equally long in every one."""
    kinds = {tuple(tensor.dim() for tensor in batch) for batch in batches}
    if len(kinds) != 1 or not all(tensor.numel() for batch in batches for tensor in batch):
        return []
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for which, tensor in enumerate(batches[0]):
        for axis in range(1, tensor.dim()):
            alike[tuple(batch[which].shape[axis] for batch in batches)].append((which, axis))
    return [tuple(axes) for sizes, axes in alike.items() if len(set(sizes)) > 1]


def _full(batch: Tensors, axes: Axes) -> Tensor:
    which, axis = axes[0]
    return torch.full((len(batch[which]),), batch[which].shape[axis])


def _shortened(batches: Sequence[Tensors], lengths: dict[Axes, list[Tensor]], axes: Axes) -> bool:
    """Take one value from the ends; whether there was one that many end in."""
    rows, found = 0, Counter[bytes]()
    known = [{a: each[number] for a, each in lengths.items()} for number in range(len(batches))]
    for batch, length in zip(batches, known, strict=True):
        ends = _ends(batch, length, axes)
        found.update(ends)
        rows += len(length[axes])
    # of as many the same one, in any order
    padding, count = max(found.items(), key=lambda pair: pair[::-1], default=(b"", 0))
    if not count or count < SHARE * rows:
        return False
    lengths[axes] = [
        _without(batch, length, axes, padding) for batch, length in zip(batches, known, strict=True)
    ]
    return True


def _ends(batch: Tensors, lengths: dict[Axes, Tensor], axes: Axes) -> list[bytes]:
    """What each example ends in along axes, one value of each tensor; of those that do."""
    ends, last = [], (lengths[axes] - 1).clamp(min=0)
    single = lengths[axes] > 0
    for which, axis in axes:
        slices = batch[which].movedim(axis, 1)[torch.arange(len(last)), last][:, None]
        first = _bytes(slices)[:, :, 0]
        single = single & _are(slices, first, _beyond(slices, which, axis, lengths))[:, 0]
        ends.append(first[:, 0])
    return [end.numpy().tobytes() for end in torch.cat(ends, 1)[single]]


def _without(batch: Tensors, lengths: dict[Axes, Tensor], axes: Axes, padding: bytes) -> Tensor:
    """The lengths along axes, without what ends in the padding."""
    index = torch.arange(batch[axes[0][0]].shape[axes[0][1]])
    padded, rest = index >= lengths[axes][:, None], torch.tensor([*padding], dtype=torch.uint8)
    alike = torch.ones_like(padded)
    for which, axis in axes:
        slices = batch[which].movedim(axis, 1)
        value, rest = rest.split([slices.element_size(), len(rest) - slices.element_size()])
        alike &= _are(slices, value, _beyond(slices, which, axis, lengths))
    return ((index + 1) * ~(padded | alike)).amax(1)


def _bytes(slices: Tensor) -> Tensor:
    """Of slices (rows, length, ...) the bytes, (rows, length, values, bytes)."""
    flat = slices.contiguous().flatten().view(torch.uint8)
    return flat.reshape(*slices.shape[:2], -1, slices.element_size())


def _are(slices: Tensor, value: Tensor, beyond: Tensor) -> Tensor:
    """Which slices are of one value, as far as they count, (rows, length)."""
    same = (_bytes(slices) == value[..., None, :]).all(3)
    return (same | beyond.expand(slices.shape).reshape(same.shape)).all(2)


def _beyond(slices: Tensor, which: int, axis: int, lengths: dict[Axes, Tensor]) -> Tensor:
    """What of slices of a tensor along an axis lies beyond the lengths along its other axes."""
    beyond = torch.zeros([1] * slices.dim(), dtype=torch.bool)
    for axes, length in lengths.items():
        for one, other in axes:
            if one == which and other != axis:
                place = other + 1 if other < axis else other
                index = torch.arange(slices.shape[place])
                index = index.reshape(-1, *[1] * (slices.dim() - place - 1))
                beyond = beyond | (index >= length.reshape(-1, *[1] * (slices.dim() - 1)))
    return beyond
