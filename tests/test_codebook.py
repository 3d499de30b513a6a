"""Codebooks beside scikit-learn's k-means, the best partition, and QLoRA's constants."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sklearn.cluster import KMeans
from test_schemes import tensors

from quantifind.schemes.codebook import k_means, normal_levels, quantize

# Dettmers et al. 2023, appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def samples(count=300):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return {"normal": normal, "cubed": normal**3, "positive": normal.exp()}


def test_nf4_is_that_of_the_paper():
    torch.testing.assert_close(normal_levels(16), torch.tensor(NF4).double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("count", [3, 4, 5, 16, 100, 256])
def test_normal_levels_rise_from_minus_one_to_one(count):
    table = normal_levels(count)
    assert len(table) == count
    assert (table.diff() > 0).all()
    assert (table[0] >= -1, table[-1]) == (True, 1)
    assert 0 in table
    if count % 2:
        torch.testing.assert_close(table, -table.flip(0), rtol=0, atol=1e-12)


def test_nf4_in_groups_is_stored_with_scales_alone():
    quantized = quantize(torch.randn(2, 128), 4, centres="normal", axis=0, group=64)
    assert quantized.stored_bits == 8 * 128 + 4 * 32


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_near_that_of_scikit_learn(name, bits, weighted):
    """Its best of ten random starts; ours, from four fixed ones, is at most a fifth worse."""
    values = samples()[name]
    weights = samples()["positive"].flip(0) if weighted else torch.ones_like(values)
    oracle = KMeans(2**bits, n_init=10, random_state=0)
    oracle.fit(values.unsqueeze(1).numpy(), sample_weight=weights.numpy())
    centres = "weighted_k_means" if weighted else "k_means"
    result = quantize(values, bits, centres=centres, importance=weights).dequantize()
    assert (weights * (result - values).square()).sum() <= 1.2 * oracle.inertia_


def test_two_centres_are_near_the_best_of_all_partitions():
    """Sorted values are parted at one place; every place is tried."""
    for values in samples(40).values():
        parts = [
            sum(len(part) * part.var(correction=0) for part in (values[:cut], values[cut:]))
            for values in [values.sort()[0]]
            for cut in range(1, len(values))
        ]
        error = (quantize(values, 1).dequantize() - values).square().sum()
        assert error <= 1.05 * min(parts)


@given(data=st.data(), bits=st.integers(1, 8))
def test_no_more_distinct_values_than_centres_are_kept(data, bits):
    """However unequal they are in number and distance."""
    distinct = data.draw(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=2**bits))
    often = data.draw(st.lists(st.sampled_from([1, 2, 50]), min_size=len(distinct)))
    often = torch.tensor(often[: len(distinct)])
    values = torch.tensor(distinct).repeat_interleave(often)
    result = quantize(values, bits).dequantize()
    torch.testing.assert_close(result, values, rtol=1e-6, atol=1e-12)


def test_distinct_values_that_no_start_but_their_own_would_find():
    values = torch.tensor([0.0] * 100 + [0.001] + [0.01] * 9 + [1.0])
    torch.testing.assert_close(quantize(values, 2).dequantize(), values)


@given(values=tensors(dtypes=(torch.float64,)), bits=st.integers(1, 4), data=st.data())
def test_centres_are_among_the_values(values, bits, data):
    """Also where weights lie so far apart that sums lose the small ones."""
    if not values.numel():
        return
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 1e-17, 1e-16, 1.0, 1e9]), min_size=values.numel())
    )
    rows = values.reshape(1, -1)
    weights = torch.tensor(weights[: values.numel()], dtype=torch.float64).reshape(1, -1)
    centres = k_means(rows, weights, 2**bits)
    room = 1e-12 * rows.abs().max()
    assert (centres >= rows.min() - room).all()
    assert (centres <= rows.max() + room).all()
    assert (centres.diff() >= 0).all()


def test_more_important_values_lie_nearer():
    values = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    importance = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e6])
    plain = quantize(values, 1).dequantize()
    weighted = quantize(values, 1, centres="weighted_k_means", importance=importance).dequantize()
    assert plain[4] == 11
    assert weighted[4] == pytest.approx(12, abs=1e-3)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 32), ("float16", 16), (None, 32)])
def test_tables_are_stored_and_counted_at_their_width(dtype, width):
    values = torch.randn(2, 20)
    assert quantize(values, 2, table_dtype=dtype).stored_bits == 80 + 4 * width
    assert quantize(values, 2, axis=0, table_dtype=dtype).stored_bits == 80 + 8 * width


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"centres": "mean"}, "centres is 'mean': k_means, weighted_k_means, normal are allowed"),
        ({"centres": "weighted_k_means"}, "importance"),
        ({"table_dtype": "float8"}, "table_dtype is 'float8': float32, float16 are allowed"),
        ({"table_dtype": "power_of_two"}, "table_dtype is 'power_of_two'"),
        ({"scale": "max_abs"}, "scale"),
        ({"zero_point": True}, "zero_point"),
        ({"centres": "normal", "zero_point": True}, "zero_point"),
    ],
)
def test_an_option_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.arange(5.0), 2, **wrong)


def test_a_centre_too_large_for_its_table_is_refused():
    with pytest.raises(ValueError, match=r"too large for table_dtype 'float16': at most 6.55e\+04"):
        quantize(torch.tensor([1e6, -1e6]), 1, table_dtype="float16")
