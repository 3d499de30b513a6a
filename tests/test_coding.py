"""Entropy coded codes come back, at the size that was promised; damaged ones do not come at all."""

import math
from binascii import crc_hqx
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from test_artifact import assert_same, round_trip
from test_schemes import arguments, for_every_case, tensors, widths

from quantifind.storage.artifact import pack, unpack
from quantifind.tensor import coding, packing
from quantifind.tensor.choice import Choice
from quantifind.tensor.coding import decode, encode
from quantifind.tensor.quantized import Quantized


@st.composite
def coded(draw):
    """Codes of any shape, few levels or many, spread or all alike; and how many levels there are"""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    levels = draw(st.integers(1, 20) | st.integers(1, 32).map(lambda bits: 2**bits))
    low = draw(st.integers(0, levels - 1))
    high = draw(st.integers(low, levels - 1) | st.just(min(low + 3, levels - 1)))
    codes = draw(hnp.arrays("int64", shape, elements=st.integers(low, high)))
    return torch.from_numpy(codes), levels


@given(given_codes=coded())
def test_codes_come_back(given_codes):
    codes, levels = given_codes
    stream = encode(codes, levels)
    assert len(stream) <= packing.packed_bytes(codes.numel(), levels) + 1
    assert torch.equal(decode(stream, levels, codes.shape).long(), codes)


@for_every_case
@settings(max_examples=25)
@given(data=st.data())
def test_every_scheme_comes_back_at_the_size_that_is_counted(module, options, data):
    values, bits = data.draw(tensors()), data.draw(widths(module))
    packed = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    tensor = replace(packed, storage="coded")
    assert_same(round_trip(Quantized({"weight": tensor})).tensors["weight"], tensor)
    size = 8 * len(tensor.pack()) + tensor.qparams.stored_bits
    assert tensor.stored_bits == size <= packed.stored_bits + 8


def drawn(shape, spread, seed=0):
    """Normally distributed codes, of 64 levels, columns as wide as ``spread`` says."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).round().clamp(-32, 31).long() + 32


def entropy(codes):
    """Bits of all, by how often each occurs."""
    shares = torch.bincount(codes.flatten()).double() / codes.numel()
    return float(torch.special.entr(shares).sum() / math.log(2)) * codes.numel()


@pytest.mark.parametrize("spread", [0.25, 0.5, 1.5, 6.0])
@pytest.mark.parametrize("shape", [(512, 256), (64, 40, 3, 3), (30_000,), (10, 3000)])
def test_codes_take_what_their_entropy_says(spread, shape):
    codes = drawn(shape, spread)
    assert 8 * len(encode(codes, 64)) < 1.02 * entropy(codes) + 8 * 40


@pytest.mark.parametrize("axis", [0, 1])
def test_what_differs_by_channel_takes_less_than_that(axis):
    """Inputs, or outputs, some of which hardly matter, and all whose codes are 0."""
    spread = torch.logspace(-2, 1, 300).unsqueeze(1 - axis)
    codes = drawn((300, 300), spread)
    assert 8 * len(encode(codes, 64)) < 0.8 * entropy(codes)


@pytest.mark.parametrize(
    ("codes", "levels"),
    [
        (torch.full((700, 900), 3), 7),
        (torch.full((), 3), 7),
        (torch.zeros(0, 5, dtype=torch.int64), 7),
        (torch.arange(10**6).reshape(1000, 1000), 10**6),
        (torch.full((1000, 1000), 2**32 - 1), 2**32),
        (torch.tensor([0] * 5000 + [2**20] * 5000), 2**20 + 1),
        (torch.tensor([2**32 - 1, 2**32 - 3] * 5000), 2**32),
    ],
    ids=[
        "one level",
        "no dimension",
        "empty",
        "a million levels",
        "the last of all",
        "far apart",
        "the last two",
    ],
)
def test_extremes_come_back(codes, levels):
    stream = encode(codes, levels)
    assert torch.equal(decode(stream, levels, codes.shape).long(), codes)
    if codes.numel() > 1 and codes.eq(codes.flatten()[0]).all():
        assert len(stream) < 20


STREAMS = {
    "coded": drawn((40, 30), 0.7),
    "by inputs": drawn((40, 30), 0.7 * torch.logspace(-2, 0.5, 40).unsqueeze(1)),
    "all alike": torch.full((40, 30), 5),
}


@pytest.mark.parametrize("codes", STREAMS.values(), ids=STREAMS)
def test_a_damaged_stream_is_refused(codes):
    """Any byte another, any end missing, anything behind it, or told of another shape."""
    stream = encode(codes, 64)
    damaged = [stream[:end] for end in range(len(stream))]
    damaged += [torch.cat([stream, torch.tensor([byte], dtype=torch.uint8)]) for byte in (0, 1)]
    for place in range(len(stream)):
        for bit in range(8):
            other = stream.clone()
            other[place] ^= 1 << bit
            damaged.append(other)
    for one in damaged:
        with pytest.raises(ValueError, match=r"damaged|bytes"):
            decode(one, 64, codes.shape)
    for shape, levels in (((30, 40), 64), ((10**9, 10**9), 64), ((40, 30), 63), ((0, 3), 64)):
        with pytest.raises(ValueError, match=r"damaged.* bytes are not those of"):
            decode(stream, levels, torch.Size(shape))


@settings(max_examples=300)
@given(body=st.binary(max_size=40), way=st.sampled_from([coding.BY_OUTPUTS, coding.BY_INPUTS]))
def test_what_was_never_coded_is_refused_or_read(body, way):
    """Bytes that match their check, but come from elsewhere."""
    shape = torch.Size([7, 5])
    check = crc_hqx(body, coding._seed(way, shape, 16)).to_bytes(2, "little")
    stream = torch.frombuffer(bytearray(bytes([way]) + check + body), dtype=torch.uint8)
    try:
        codes = decode(stream, 16, shape)
    except ValueError as error:
        if "damaged" not in str(error):
            raise
    else:
        assert codes.shape == shape
        assert codes.min() >= 0
        assert codes.max() < 16


def test_a_damaged_tensor_is_named():
    values = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    tensor = Choice("uniform", 3, storage="coded").quantize(values)
    parts, description = pack(Quantized({"0.weight": tensor}))
    parts["tensors/0.weight/codes"] = parts["tensors/0.weight/codes"][:-1]
    with pytest.raises(ValueError, match=r"^0\.weight: the coded stream is damaged"):
        unpack(parts, description)


def test_tables_are_the_same_everywhere():
    """A stream as it was once written."""
    codes = torch.arange(60).reshape(6, 10) % 7 % 4
    stream = bytes.fromhex("0168660000037e25f2e5e4862fea2d61ee8af0c0d70977f0326802")
    assert bytes(encode(codes, 64).tolist()) == stream
    assert torch.equal(decode(torch.tensor([*stream], dtype=torch.uint8), 64, codes.shape), codes)
