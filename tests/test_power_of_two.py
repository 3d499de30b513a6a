"""Powers of two and their sums beside their definition."""

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from test_schemes import tensors

from quantifind.schemes.power_of_two import levels, quantize


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_zero_and_powers_of_two(bits):
    table = levels(bits)
    positive = table[table > 0]
    assert len(table) == 2**bits - 1
    assert torch.equal(positive.flip(0), 2.0 ** -torch.arange(2 ** (bits - 1) - 1).double())
    assert torch.equal(table, -table.flip(0))


@pytest.mark.parametrize(("bits", "terms"), [(b, t) for b in range(2, 9) for t in range(1, b)])
def test_levels_are_sums_of_one_power_for_each_term(bits, terms):
    """APoT's equation 3, written out: the terms' powers never overlap, so no sum comes twice."""
    own = [(bits - 1) // terms + (term < (bits - 1) % terms) for term in range(terms)]
    choices = [
        [0.0] + [2.0 ** -(term + terms * k) for k in range(2**width - 1)]
        for term, width in enumerate(own)
    ]
    sums = {sum(each) for each in product(*choices)}
    table = levels(bits, terms)
    assert table.tolist() == sorted(sums | {-each for each in sums})
    assert len(table) <= 2**bits - 1


@given(values=tensors(dtypes=(torch.float64,)), bits=st.integers(2, 8), terms=st.integers(1, 7))
def test_each_value_has_its_nearest_level(values, bits, terms):
    quantized = quantize(values, bits, terms=min(terms, bits - 1))
    table = quantized.qparams.grid.table * quantized.qparams.scale.double()
    nearest = (values.flatten().unsqueeze(1) - table).abs().amin(1)
    error = (values - quantized.dequantize()).abs().flatten()
    assert (error <= nearest * (1 + 1e-9) + 1e-15 * table.max()).all()


@pytest.mark.parametrize("terms", [0, 4, 1.0, True])
def test_a_number_of_terms_that_cannot_be_is_refused(terms):
    with pytest.raises(ValueError, match=r"terms is .*: 4 bits take whole numbers 1 to 3"):
        quantize(torch.ones(3), 4, terms=terms)


def test_a_numpy_integer_is_a_whole_number():
    assert quantize(torch.ones(3), 4, terms=np.int64(2)).bits == 4
