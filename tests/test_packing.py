"""Codes side by side in bytes, beside Python's own whole numbers."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from quantifind.tensor.packing import pack, packed_bytes, unpack, width


@given(data=st.data(), levels=st.integers(1, 40) | st.integers(1, 32).map(lambda b: 2**b))
def test_unpacking_gives_the_codes_back(data, levels):
    codes = data.draw(st.lists(st.integers(0, levels - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.int64), levels)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(len(codes), levels)
    assert packed.numel() == math.ceil(len(codes) * width(levels) / 8)
    assert unpack(packed, levels, len(codes)).tolist() == codes


@given(bits=st.integers(1, 8), data=st.data())
def test_packed_bytes_are_one_long_number(bits, data):
    """The first code in its lowest bits."""
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    number = sum(code << (bits * index) for index, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), 2**bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.int64), 2**bits).tolist()) == expected


@given(codes=st.lists(st.integers(0, 2), max_size=40))
def test_five_ternary_codes_are_digits_of_a_byte(codes):
    packed = pack(torch.tensor(codes, dtype=torch.int64), 3).tolist()
    digits = [byte // 3**place % 3 for byte in packed for place in range(5)]
    assert digits[: len(codes)] == codes
    assert not any(digits[len(codes) :])


@pytest.mark.parametrize("levels", [3, *(2**bits for bits in range(1, 17))])
def test_bytes_may_lie_anywhere(levels):
    """In the middle of a file, or every other of a longer tensor, and codes in any order."""
    codes = torch.randint(levels, (7, 11), generator=torch.Generator().manual_seed(0))
    packed = pack(codes.T, levels)
    assert torch.equal(packed, pack(codes.T.contiguous(), levels))
    behind = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])[3:]
    spread = torch.stack([packed, packed], 1)[:, 0]
    for there in (behind, spread):
        assert torch.equal(unpack(there, levels, 77), codes.T.flatten())


@pytest.mark.parametrize("levels", [3, 4, 2**12])
def test_a_wrong_number_of_bytes_is_refused(levels):
    packed = pack(torch.zeros(10, dtype=torch.int64), levels)
    for there in (packed[:-1], torch.nn.functional.pad(packed, (0, 1))):
        with pytest.raises(ValueError, match=f"{len(there)} bytes: 10 codes of {levels} levels"):
            unpack(there, levels, 10)
