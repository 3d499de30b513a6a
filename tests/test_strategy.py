"""A strategy on any network: what it names is quantized, the rest and the original are not."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from quantifind import plugins
from quantifind.strategy import (
    Strategy,
    mean_bits,
    quantize_model,
    quantize_tensors,
    uniform_strategy,
)

MODELS = plugins.names("models")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_quantized_on_a_copy(name):
    torch.manual_seed(0)
    net, *_ = plugins.load("models", name, "create_model_context")()
    net.train()
    before = copy.deepcopy(net.state_dict())
    strategy = uniform_strategy(net, 3)
    quantized = quantize_model(net, strategy)
    assert strategy.tensors.keys() == dict(net.named_parameters()).keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert quantized.training
    for parameter in quantized.parameters():
        assert len(parameter.unique()) <= 8
    assert 3 < mean_bits(net, quantize_tensors(net, strategy)) < 3.2


def test_what_is_not_named_stays_in_float_and_is_counted():
    net = nn.Linear(3, 2)
    strategy = Strategy({"weight": {"scheme": "uniform", "bits": 4}})
    quantized = quantize_model(net, strategy)
    assert torch.equal(quantized.bias, net.bias)
    assert strategy.bit_depth == 4
    assert mean_bits(net, quantize_tensors(net, strategy)) == (6 * 4 + 32 + 2 * 32) / 8


def test_tied_weights_are_counted_once_and_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    strategy = uniform_strategy(net, 4)
    quantized = quantize_model(net, strategy)
    assert list(strategy.tensors) == ["0.weight"]
    assert quantized[1].weight is quantized[0].weight
    assert mean_bits(net, quantize_tensors(net, strategy)) == (16 * 4 + 32) / 16


def test_widths_may_differ():
    choices = {"weight": {"scheme": "uniform", "bits": 2}, "bias": {"scheme": "uniform", "bits": 8}}
    assert Strategy(choices).bit_depth is None


def test_json_round_trip(classifier):
    strategy = uniform_strategy(classifier[0], 5)
    assert Strategy(**json.loads(json.dumps(asdict(strategy)))) == strategy


def test_errors_name_the_tensor():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"names wieght: the network has weight, bias"):
        quantize_model(net, Strategy({"wieght": {"scheme": "uniform", "bits": 4}}))
    with pytest.raises(ValueError, match=r"weight: bits is 40"):
        quantize_model(net, Strategy({"weight": {"scheme": "uniform", "bits": 40}}))
    with pytest.raises(ValueError, match=r"unknown 'unifrom': quantifind/schemes/ has uniform"):
        quantize_model(net, Strategy({"weight": {"scheme": "unifrom", "bits": 4}}))
    net.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"bias: 1 of 2 values are NaN or infinite"):
        quantize_model(net, uniform_strategy(net, 4))
