"""How benchmarks/peers counts what other quantizers answer with."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.peers import exchange
from benchmarks.peers.environments import REQUIREMENTS
from benchmarks.peers.exchange import Candidate, Decoded, OnGrid

NETWORK = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))  # 38 parameters
WHOLE = {name: Decoded(values.detach()) for name, values in NETWORK.named_parameters()}


def on_grid(bits=2, levels=4):
    values = torch.arange(24).remainder(levels).reshape(4, 6).float()
    return OnGrid(values, bits, exchange.rows(values), scales=(4, 16))


def test_each_peer_has_a_script():
    for peer in REQUIREMENTS:
        assert importlib.util.find_spec(f"benchmarks.peers.{peer}"), peer


def test_codes_scales_and_what_is_left_are_counted():
    bits = exchange.mean_bits(Candidate("one", {"0.weight": on_grid()}).counts, NETWORK)
    assert bits == pytest.approx((24 * 2 + 4 * 16 + 32 * 14) / 38)


def test_of_a_bitstream_its_bytes_are_counted():
    assert exchange.mean_bits(Candidate("all", WHOLE, 19).counts, NETWORK) == 19 * 8 / 38
    part = {"0.weight": WHOLE["0.weight"]}
    left = exchange.mean_bits(Candidate("a part", part, 19).counts, NETWORK)
    assert left == pytest.approx((19 * 8 + 32 * 14) / 38)
    with pytest.raises(AssertionError):
        _ = Candidate("for nothing", WHOLE).counts


def test_what_no_code_can_mean_is_off_the_grid():
    assert exchange.off_grid(Candidate("one", {"0.weight": on_grid()})) is None
    reason = exchange.off_grid(Candidate("one", {"0.weight": on_grid(bits=1)}))
    assert reason == "0.weight has 4 levels for a scale, 2 fit its bits"
    # a bitstream's values may be any, if finite
    assert exchange.off_grid(Candidate("all", WHOLE, 19)) is None
    broken = WHOLE | {"0.bias": Decoded(torch.tensor([0.0, 0.0, 0.0, torch.nan]))}
    assert exchange.off_grid(Candidate("all", broken, 19)) == "0.bias is not finite"


def test_an_answer_in_a_bitstream_is_read_as_it_was_written(tmp_path, monkeypatch):
    question = exchange.Question(NETWORK, [], [])
    monkeypatch.setattr(exchange, "read", lambda folder: question)
    monkeypatch.setattr("sys.argv", ["a peer", "question", str(tmp_path)])
    exchange.answer(lambda question: iter([Candidate("all", WHOLE, 19)]))
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["notes"] == []
    one = found["candidates"]["all"]
    assert exchange.mean_bits(one["counts"], NETWORK) == 19 * 8 / 38
    weights = load_file(tmp_path / one["file"])
    assert all(torch.equal(weights[name], decoded.values) for name, decoded in WHOLE.items())
