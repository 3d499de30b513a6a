"""Codes side by side in bytes: widths 0 to 32 bits, and ternary, five codes in a byte."""

from collections.abc import Callable

import torch
from torch import Tensor

TERNARY_BITS = 1.6
# so many codes are whole bytes, whatever the levels
TOGETHER = 40
# in a 64-bit word: the even bytes, the even pairs of bytes, the lower four bytes
_EVEN = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}


def width(levels: int) -> int | float:
    """Bits of one packed code that tells ``levels`` levels apart: whole, or 1.6 for three.

    >>> [width(levels) for levels in (2, 3, 4, 5, 256)]
    [1, 1.6, 2, 3, 8]
    """
    return TERNARY_BITS if levels == 3 else (levels - 1).bit_length()


def packed_bytes(count: int, levels: int) -> int:
    """How many bytes `pack` makes of ``count`` codes."""
    return -(-count // 5) if levels == 3 else -(-count * (levels - 1).bit_length() // 8)


def pack(codes: Tensor, levels: int) -> Tensor:
    """Whole numbers 0 to levels − 1, any shape → bytes (`packed_bytes`,) uint8.

    A code of b ≤ 8 bits takes bits i·b to (i + 1)·b − 1 of the bytes, the lowest bit of each first.
    Of wider codes come all the lowest bytes, then what is left of the codes, packed likewise. Three
    levels are digits to base 3, the lowest first.

    >>> pack(torch.tensor([1, 0, 3, 2]), 4).tolist()
    [177]
    """
    flat = codes.reshape(-1)
    if levels == 3:
        digits = _by(flat.to(torch.uint8), 5)
        packed = digits[:, 4].clone()
        for place in (3, 2, 1, 0):
            packed.mul_(3).add_(digits[:, place])
        return packed
    bits = (levels - 1).bit_length()
    if bits > 8:
        rest = pack(flat >> 8, 2 ** (bits - 8))
        return torch.cat([(flat & 255).to(torch.uint8), rest])
    words = _by(flat.to(torch.uint8), 8).view(torch.int64)
    for lane, even in _EVEN.items() if bits < 8 else ():
        low = words & even
        # each second lane moves down to the bits of the lane before it
        words = (
            words.bitwise_xor(low).bitwise_right_shift_(lane - lane // 8 * bits).bitwise_or_(low)
        )
    return words.view(torch.uint8)[:, :bits].flatten()[: packed_bytes(flat.numel(), levels)]


def check_size(size: int, levels: int, count: int) -> None:
    """Raise ValueError unless ``count`` codes take so many bytes."""
    if size != (needed := packed_bytes(count, levels)):
        raise ValueError(f"{size} bytes: {count} codes of {levels} levels take {needed}")


def unpack(packed: Tensor, levels: int, count: int) -> Tensor:
    """The first ``count`` codes, (count,), of what `pack` made.

    Returns: uint8 up to 256 levels, int32 up to 2^31, else int64.

    Raises: ValueError when the number of bytes is not that of so many codes.

    >>> unpack(torch.tensor([177], dtype=torch.uint8), 4, 4).tolist()
    [1, 0, 3, 2]
    """
    check_size(packed.numel(), levels, count)
    if levels == 3:
        byte = torch.arange(3**5, device=packed.device).unsqueeze(1)
        powers = 3 ** torch.arange(5, device=packed.device)
        digits = (byte // powers % 3).to(torch.uint8)  # (byte, place)
        return digits[packed.int()].flatten()[:count]
    bits = (levels - 1).bit_length()
    if bits > 8:
        rest = unpack(packed[count:], 2 ** (bits - 8), count)
        wide = rest.to(torch.int32 if bits < 32 else torch.int64)
        return wide.bitwise_left_shift_(8).bitwise_or_(packed[:count])
    if not bits:
        return torch.zeros(count, dtype=torch.uint8, device=packed.device)
    groups = torch.nn.functional.pad(_by(packed, bits), (0, 8 - bits))
    words = groups.view(torch.int64).flatten()
    for lane, even in reversed(_EVEN.items()) if bits < 8 else ():
        taken = lane // 8 * bits
        low = words & (even & ~(even << taken))
        words = words.bitwise_xor(low).bitwise_left_shift_(lane - taken).bitwise_or_(low)
    return words.view(torch.uint8)[:count]


def unpack_some(
    read: Callable[[int, int], Tensor], levels: int, count: int, *, first: int, last: int
) -> Tensor:
    """Codes ``first`` to ``last`` − 1, of the ``count`` that `pack` made bytes of; as `unpack`.

    read: (first, last) → so many of the bytes, uint8.
    first: a multiple of `TOGETHER`.
    """
    if (bits := (levels - 1).bit_length()) > 8:
        rest = unpack_some(
            lambda a, b: read(count + a, count + b),
            2 ** (bits - 8),
            count,
            first=first,
            last=last,
        )
        wide = rest.to(torch.int32 if bits < 32 else torch.int64)
        return wide.bitwise_left_shift_(8).bitwise_or_(read(first, last))
    start, number = packed_bytes(first, levels), last - first
    return unpack(read(start, start + packed_bytes(number, levels)), levels, number)


def _by(values: Tensor, length: int) -> Tensor:
    """(values,) → (groups, length), the last filled up with zeros."""
    missing = -values.numel() % length
    return torch.nn.functional.pad(values, (0, missing)).reshape(-1, length)
