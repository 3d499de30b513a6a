"""Packed and described, every kind of quantized tensor comes back the same."""

import copy
import math
import pickle
import tempfile

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_schemes import arguments, for_every_case, tensors, widths
from torch import nn

from quantifind.costs import model_bytes
from quantifind.learning import learn
from quantifind.network.activations import QuantizedActivations, fit_activations
from quantifind.quantize import mean_bits, quantize
from quantifind.storage.artifact import pack, unpack
from quantifind.storage.store import Store
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.choice import ActivationChoice
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins
from quantifind.utils.loaders import Tensors, batch_loader

SCHEMES = plugins.names("schemes")
UNIFORM = {"scheme": "uniform", "bits": 3}
CODEBOOK = {"scheme": "codebook", "bits": 3}
CHOICES = [
    *({"scheme": scheme, "bits": 4} for scheme in SCHEMES),
    *({"scheme": scheme, "bits": 4, "axis": 0, "group": 5} for scheme in SCHEMES),
    {"scheme": "uniform", "levels": 3},
    {"scheme": "uniform", "levels": 3, "axis": 1, "scale_dtype": "float16"},
    {"scheme": "uniform", "levels": 5, "axis": -1, "group": 2},
    {"scheme": "uniform", "levels": 4, "half_integer": True},
    {"scheme": "uniform", "bits": 1},
    {"scheme": "uniform", "bits": 32, "zero_point": True},
    *(
        UNIFORM | {"zero_point": True, "axis": axis, "group": group, "scale_dtype": dtype}
        for axis, group in ((None, None), (None, 7), (0, None), (1, None), (0, 4))
        for dtype in (None, "float16", "power_of_two")
    ),
    {"scheme": "uniform", "bits": 12, "zero_point": True, "axis": 0},
    CODEBOOK | {"axis": 0},
    CODEBOOK | {"axis": 0, "group": 4, "table_dtype": "float16"},
    CODEBOOK | {"levels": 3, "axis": 1, "bits": None},
    CODEBOOK | {"centres": "normal", "axis": 0, "scale_dtype": "power_of_two"},
    {"scheme": "minifloat", "bits": 8, "exponent": 4, "scale": 1.0},
    {"scheme": "minifloat", "bits": 4, "axis": 0, "group": 4, "scale_dtype": "power_of_two"},
    {"scheme": "power_of_two", "bits": 4, "terms": 2, "axis": 0},
]


def round_trip(quantized):
    """Through a file, which holds the description as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        Store(folder).put("key", *pack(quantized))
        return unpack(*Store(folder).get("key"))


def bits_of(values):
    return values.contiguous().flatten().view(torch.uint8).tolist()


def assert_same(one, other):
    """Bit for bit, whatever is looked at."""
    assert one.codes.shape == other.codes.shape
    assert torch.equal(one.codes.int(), other.codes.int())
    for part in ("dtype", "bits", "stored_bits"):
        assert getattr(one, part) == getattr(other, part)
    assert_same_qparams(one.qparams, other.qparams)
    assert bits_of(one.dequantize()) == bits_of(other.dequantize())


def assert_same_qparams(one, other):
    for part in ("axis", "group"):
        assert getattr(one, part) == getattr(other, part)
    for part in ("levels", "offset", "stored", "lowest_code"):
        assert getattr(one.grid, part) == getattr(other.grid, part)
    pairs = [(one.scale, other.scale), (one.zero_point, other.zero_point)]
    for a, b in (*pairs, (one.grid.table, other.grid.table)):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert bits_of(a) == bits_of(b)


@for_every_case
@settings(max_examples=25)
@given(data=st.data())
def test_every_scheme_comes_back(module, options, data):
    values, bits = data.draw(tensors()), data.draw(widths(module))
    tensor = module.quantize(values, bits, **data.draw(arguments(module, values, options)))
    back = round_trip(Quantized({"layer.weight": tensor}))
    assert list(back.tensors) == ["layer.weight"]
    assert not back.activations
    assert_same(back.tensors["layer.weight"], tensor)
    assert_same(pickle.loads(pickle.dumps(tensor)), tensor)
    assert_same(copy.deepcopy(tensor), tensor)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_choice_comes_back(choice, dtype):
    torch.manual_seed(0)
    net = nn.Linear(9, 6).to(dtype)
    given = {key: value for key, value in choice.items() if value is not None}
    quantized = quantize(net, Strategy({"weight": given, "bias": None}))
    back = round_trip(quantized)
    assert_same(back.tensors["weight"], quantized.tensors["weight"])
    assert mean_bits(net, back) == mean_bits(net, quantized)


def test_bytes_kept_are_those_counted():
    """But for standard tables, which a reader could make anew."""
    net = nn.Linear(9, 6)
    for choice in ({"levels": 3}, {"bits": 5, "axis": 0, "zero_point": True}, {"bits": 12}):
        quantized = quantize(net, uniform_strategy(net, scheme="uniform", **choice))
        tensors, _ = pack(quantized)
        kept = sum(t.numel() * t.element_size() for t in tensors.values())
        assert 8 * kept == sum(tensor.stored_bits for tensor in quantized.tensors.values())
        assert kept == sum(model_bytes.measure(net, quantized, []).values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_come_back(scheme):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(50, 6)
    choices = {
        "0.weight": ActivationChoice(scheme, 4),
        "2.weight": ActivationChoice.of(UNIFORM | {"zero_point": True}),
    }
    levels = fit_activations(net, choices, [(x,)])
    tensors, _ = pack(Quantized({}, levels))
    assert not any(name.endswith("codes") for name in tensors)
    back = round_trip(Quantized({}, levels))
    assert not back.tensors
    assert list(back.activations) == list(levels)
    for name, fit in levels.items():
        assert_same_qparams(fit, back.activations[name])
    wanted = QuantizedActivations(net, levels)(x)
    assert torch.equal(QuantizedActivations(net, back.activations)(x), wanted)
    assert not torch.equal(net(x), wanted)
    assert mean_bits(net, back) == mean_bits(net, Quantized({}, levels))


def test_learned_codes_come_back():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 6)
    loader = batch_loader(Tensors(x, x[:, :3].argmax(1)), batch_size=32, shuffle=True, seed=0)
    for choice in (UNIFORM | {"scale_dtype": "float16", "axis": 0}, CODEBOOK | {"axis": 0}):
        quantized = learn(net, uniform_strategy(net, **choice), loader, epochs=1)
        back = round_trip(quantized)
        assert list(back.tensors) == list(quantized.tensors)
        for name, tensor in quantized.tensors.items():
            assert_same(back.tensors[name], tensor)


def test_names_and_shapes_of_all_kinds():
    values = {
        "weight": torch.randn(3, 4),
        "weight/codes": torch.randn(2, 1, 3),
        "tensors/weight": torch.randn(5),
        "": torch.tensor(0.5),
        "empty.ä": torch.zeros(0, 3),
    }
    put = plugins.load("schemes", "uniform", "quantize")
    quantized = Quantized({name: put(value, 3) for name, value in values.items()})
    back = round_trip(quantized)
    assert list(back.tensors) == list(values)
    for name, tensor in quantized.tensors.items():
        assert_same(back.tensors[name], tensor)
    assert round_trip(Quantized({})) == Quantized({})


def test_packing_mutates_nothing():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    quantized = quantize(net, uniform_strategy(net, 3, axis=0))
    tensor = quantized.tensors["weight"]
    before = [tensor.codes.clone(), tensor.qparams.scale.clone(), tensor.dequantize()]
    tensors, _ = pack(quantized)
    assert tensors["tensors/weight/codes"].numel() == math.ceil(12 * 3 / 8)
    for was, now in zip(
        before, (tensor.codes, tensor.qparams.scale, tensor.dequantize()), strict=True
    ):
        assert torch.equal(was, now)
