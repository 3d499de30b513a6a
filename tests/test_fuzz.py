"""Networks drawn from a grammar: what a search says of them is what a plain loop says."""

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.grammar import PARTS, Drawn, faults, networks

of_any_parts = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore:LSTM with projections"
)
TOKENS = [
    Drawn("tokens", (), "tensor", bag, tied, 0) for bag in (False, True) for tied in (False, True)
]
# every part of every kind of inputs, four to a network
COVERING = [
    Drawn(kind, tuple((part, number) for part in parts), wrap, False, False, number)
    for (kind, names), wrap in zip(PARTS.items(), 2 * ["tensor", "tuple", "dict"], strict=True)
    for number, parts in enumerate(names[first : first + 4] for first in range(0, len(names), 4))
]


@of_any_parts
@pytest.mark.parametrize("drawn", [*COVERING, *TOKENS], ids=repr)
def test_a_search_of_every_part_is_honest(drawn):
    assert not faults(drawn)


@of_any_parts
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(networks())
def test_a_search_of_any_network_is_honest(drawn):
    """Of parts in any order and number; python -m benchmarks.fuzz draws thousands."""
    assert not faults(drawn)
