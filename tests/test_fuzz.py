"""Networks drawn from a grammar: what a search says of them is what a plain loop says."""

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.grammar import faults, networks


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:LSTM with projections")
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(networks())
def test_a_search_of_any_network_is_honest(drawn):
    assert not faults(drawn)
