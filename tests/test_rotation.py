"""Rotated weights: the same outputs, less lost by rounding, and the same bits wherever they are
turned back."""

import pickle
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_artifact import assert_same, bits_of, round_trip
from test_compressed import made
from test_exporting import onnx_outputs
from test_gptq import correlated
from test_saving import path, read_by_docs  # noqa: F401
from torch import nn

import quantifind.tensor.rotation as rotation_module
from quantifind import Strategy, compressed, export, load, quantize_model, save, uniform_strategy
from quantifind.costs import model_bytes
from quantifind.learning import learn
from quantifind.mixed_precision.search_space import default_search_space
from quantifind.network.calibrated import Calibration
from quantifind.quantize import quantize
from quantifind.storage.network_reader import NetworkFile
from quantifind.storage.network_writer import write_network
from quantifind.tensor.choice import ActivationChoice, Choice
from quantifind.tensor.gptq import Moments, gptq_layer
from quantifind.tensor.matrices import Matrices
from quantifind.tensor.quantized import Quantized
from quantifind.tensor.rotation import SEEDS, Rotation, mixed
from quantifind.utils.loaders import Tensors, batch_loader

CODED = {"scheme": "uniform", "levels": 99, "scale": 0.4, "storage": "coded", "rate": 0.06}
CHOICES = [
    {"scheme": "uniform", "bits": 3, "axis": 0, "scale": "output_mse"},
    {"scheme": "codebook", "bits": 3, "axis": 0, "group": 4},
    {"scheme": "uniform", "bits": 4, "zero_point": True},
    CODED,
]
ROTATED = {"rounding": "gptq", "rotation": 5}


def oracle(seed, inputs):
    """The matrix of a rotation, of Kronecker products, and signs of whole numbers of Python."""

    def sign(place):
        bits = (place + seed * 0x9E3779B1) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = (bits ^ bits >> shift) * factor % 2**32
        return -1.0 if bits % 2 else 1.0

    size, whole, hadamard = 1, np.eye(inputs), np.ones((1, 1))
    while 2 * size <= inputs:
        size, hadamard = 2 * size, np.kron([[1.0, 1.0], [1.0, -1.0]], hadamard)
    for number, start in enumerate(sorted({0, inputs - size})):
        step = np.eye(inputs)
        signs = np.diag([sign(number * size + i) for i in range(size)])
        step[start : start + size, start : start + size] = signs @ hadamard / size**0.5
        whole = whole @ step
    return torch.from_numpy(whole)


@settings(max_examples=60)
@given(data=st.data())
def test_it_is_orthogonal_and_the_oracles(data):
    """Whatever the shape and the axis."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    axis, seed = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(0, SEEDS - 1))
    weight = torch.randn(shape, dtype=torch.float64)
    inputs = weight.numel() // shape[axis]
    rotation, matrix = Rotation(axis, seed), oracle(seed, inputs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(inputs, dtype=torch.float64))
    rows = weight.movedim(axis, 0).reshape(shape[axis], -1)
    turned = rotation.of(weight)
    torch.testing.assert_close(turned.movedim(axis, 0).reshape(rows.shape), rows @ matrix)
    torch.testing.assert_close(rotation.undone(turned, torch.float64), weight)
    form = torch.randn(inputs, inputs, dtype=torch.float64)
    form = form @ form.T
    torch.testing.assert_close(rotation.of_form(form), matrix.T @ form @ matrix)


def test_seeds_differ_and_mix():
    """All signs of half of the seeds and places differ; of one input every other has its share."""
    found = torch.stack([mixed(torch.eye(64).double(), seed) for seed in range(200)])
    assert (found.abs() - 1 / 8).abs().max() < 1e-12
    agree = (found[:-1].sign() == found[1:].sign()).double().mean()
    assert 0.45 < agree < 0.55
    assert mixed(torch.eye(100).double(), 3).abs().max() < 0.5


def layer(x, weights, *choices):
    inputs = x.T @ x
    moments = {Matrices.rows(weights.shape): Moments(inputs, weights.double() @ inputs, len(x))}
    return gptq_layer(weights, moments, [Choice.of(choice) for choice in choices])


def lost(x, weights, tensor):
    return ((tensor.dequantize() - weights).double() @ x.T).square().sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_weights_that_stand_out_lose_less(seed):
    """Where few inputs have large weights, as many levels lose less when all share them."""
    torch.manual_seed(seed)
    x, weights = correlated(400, 48, seed), torch.randn(32, 48)
    weights[:, torch.randperm(48)[:3]] *= 12
    for choice in CHOICES[:1]:
        given = {**choice, "rounding": "gptq"}
        plain, rotated = layer(x, weights, given, {**given, "rotation": seed})
        assert lost(x, weights, rotated) < 0.5 * lost(x, weights, plain)
        assert rotated.stored_bits == plain.stored_bits


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_outputs_are_those_of_mixed_weights_for_mixed_inputs(choice):
    torch.manual_seed(0)
    x, weights = correlated(300, 30), torch.randn(20, 30)
    (tensor,) = layer(x, weights, choice | ROTATED)
    inner = replace(tensor, rotation=None).dequantize().double()
    mixed_inputs = x @ oracle(5, 30)
    found = x @ tensor.dequantize().double().T
    torch.testing.assert_close(found, mixed_inputs @ inner.T, rtol=1e-4, atol=1e-4)
    assert tensor.stored_bits == replace(tensor, rotation=None).stored_bits


def test_more_codes_than_inputs_that_are_met_lose_less():
    """Inputs that are always 0 take part, and what is lost along them is not met."""
    torch.manual_seed(0)
    x, weights = correlated(300, 32), torch.randn(24, 32)
    wide, more = torch.zeros(300, 64, dtype=torch.float64), torch.randn(24, 64)
    wide[:, ::2], more[:, ::2] = x, weights
    choice = {**CHOICES[0], **ROTATED}
    (few,), (many,) = layer(x, weights, choice), layer(wide, more, choice)
    assert lost(wide, more, many) < 0.5 * lost(x, weights, few)


def strategy_of(net, choice):
    tensors = {
        name: {**choice, **ROTATED} if one.dim() > 1 else None
        for name, one in net.named_parameters()
    }
    return Strategy(tensors)


@pytest.mark.parametrize("kind", ["linear", "convolutions", "attention", "gru"])
@torch.no_grad()
def test_the_same_bits_everywhere(path, tmp_path, kind):  # noqa: F811
    """In the copy, from the store, the file and its reader in numpy, and compressed."""
    net, x = made(kind)
    counters = sum(t.numel() * 8 for n, t in net.named_buffers() if n.endswith("tracked"))
    for choice in CHOICES if kind == "linear" else CHOICES[-1:]:
        quantized = quantize(net, strategy_of(net, choice), [(x,)])
        tensors = quantized.tensors
        assert all(tensor.rotation is not None for tensor in tensors.values())
        wanted = quantize_model(net, quantized)(x)
        assert not torch.equal(net(x), wanted)
        back = round_trip(quantized)
        save(net, quantized, path)
        with NetworkFile(path) as file:
            stored = file.bytes - file.header_bytes - counters
            assert stored == sum(model_bytes.measure(net, quantized, []).values())
            for name, tensor in tensors.items():
                for other in (
                    back.tensors[name],
                    file.tensor(name),
                    pickle.loads(pickle.dumps(tensor)),
                ):
                    assert_same(other, tensor)
                    assert other.rotation.seed == 5
                file.put(name, parts := torch.empty(tensor.codes.shape))
                assert bits_of(parts) == bits_of(tensor.dequantize())
        assert torch.equal(load(path, net)(x), wanted)
        small = compressed(net, quantized)
        assert torch.equal(small(x), wanted)
        state = {n: t for n, t in small.state_dict().items() if not n.endswith("_grid")}
        stored = sum(t.numel() * t.element_size() for t in state.values())
        packed = quantized.stored("packed")
        assert stored - counters == sum(model_bytes.measure(net, packed, []).values())
        save(net, packed, path)
        read = read_by_docs(path)
        for name, tensor in tensors.items():
            assert np.array_equal(read[name], tensor.dequantize().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_by_others(path, dtype):  # noqa: F811
    torch.manual_seed(0)
    x, weights = correlated(300, 27), torch.randn(12, 27).to(dtype)
    (tensor,) = layer(x, weights, CHOICES[0] | ROTATED)
    assert tensor.dequantize().dtype == dtype
    write_network(path, Quantized({"w": tensor}), {}, {})
    with NetworkFile(path) as file:
        assert_same(file.tensor("w"), tensor)
    wanted = tensor.dequantize()
    wanted = wanted.float() if dtype == torch.bfloat16 else wanted
    assert np.array_equal(read_by_docs(path)["w"], wanted.numpy())


def test_rotated_tensors_are_dequantized_in_parts(monkeypatch):
    torch.manual_seed(0)
    (tensor,) = layer(correlated(90, 21), torch.randn(17, 21), CODED | ROTATED)
    whole = tensor.dequantize()
    monkeypatch.setattr(rotation_module, "AT_A_TIME", 50)
    assert torch.equal(tensor.dequantize(), whole)


@torch.no_grad()
def test_other_runtimes_have_them_in_float_or_turn_them(tmp_path):
    net, x = made("linear")
    quantized = quantize(net, strategy_of(net, CODED), [(x,)])
    wanted = quantize_model(net, quantized)(x)
    table = export(net, quantized, tmp_path / "net.onnx", x)
    assert set(table["becomes"]) == {"float"}
    assert (onnx_outputs(tmp_path / "net.onnx", x)[0] - wanted).abs().max() <= 1e-4
    export(net, quantized, tmp_path / "net.pt2", x)
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert (program(x) - wanted).abs().max() <= 1e-6


def test_learned_codes_stay_rotated():
    """And outputs come nearer to the float network's."""
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(),
        torch.randn(512, 6),
    )
    loader = batch_loader(Tensors(x, net(x).argmax(1)), batch_size=32, shuffle=True, seed=0)
    strategy = strategy_of(net, {"scheme": "uniform", "levels": 3, "axis": 0})
    before = quantize(net, strategy, loader)
    after = learn(net, strategy, loader, epochs=16, calibration=list(loader))
    apart = []
    for found in (before, after):
        assert {tensor.rotation.seed for tensor in found.tensors.values()} == {5}
        with torch.no_grad():
            apart.append((quantize_model(net, found)(x) - net(x)).square().mean().item())
    assert apart[1] < apart[0]
    for name, tensor in after.tensors.items():
        assert not torch.equal(before.tensors[name].codes, tensor.codes)


class Looked(nn.Module):
    """What is looked up, what is multiplied whole, and what has inputs in no one axis."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.line = nn.Linear(4, 3)
        self.grouped = nn.ConvTranspose1d(3, 6, 2, groups=3)

    def forward(self, words):
        return self.grouped(self.line(self.embedding(words)).mT)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("embedding.weight", "embedding.weight: rotation: an embedding is looked up"),
        ("grouped.weight", "grouped.weight: rotation: its inputs can't be rotated: its outputs"),
        ("line.bias", r"line.bias: rounding 'gptq' is for weights"),
    ],
)
def test_what_has_no_inputs_to_rotate_is_refused_in_a_line(name, says):
    net = Looked()
    words = torch.randint(9, (5, 7))
    tensors = dict.fromkeys((n for n, _ in net.named_parameters()), None)
    with pytest.raises(ValueError, match=says) as found:
        quantize(net, Strategy(tensors | {name: CODED | ROTATED}), [(words,)])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rotation": -1, "rounding": "gptq"}, "rotation is -1: a seed"),
        ({"rotation": True, "rounding": "gptq"}, "rotation is True: a seed"),
        ({"rotation": 2**31, "rounding": "gptq"}, "rotation is 2147483648: a seed"),
        ({"rotation": 0}, "rotation is 0: it needs rounding 'gptq'"),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Choice.of({"scheme": "uniform", "bits": 3, **given})


@torch.no_grad()
def test_a_search_rotates_what_can_be():
    net, words = Looked(), torch.randint(9, (5, 7))
    facts = Calibration(net, [(words,)]).facts
    space = default_search_space(net, facts, [4], grids=[CODED | ROTATED])
    turned = {name: choices[-1].rotation for name, choices in space.tensors.items()}
    assert turned["line.weight"] == 5
    assert turned["embedding.weight"] is turned["grouped.weight"] is turned["line.bias"] is None


def test_where_memory_is_short_it_is_said():
    torch.manual_seed(0)
    net, x = nn.Linear(64, 3), torch.randn(200, 64)
    strategy = Strategy({"weight": CODED | ROTATED, "bias": None})
    short = quantize(net, strategy, [(x,)], max_memory=64 * 20 * 8)
    assert short.tensors["weight"].rotation is None
    assert short.notes["weight"].endswith("; its inputs not rotated")
    assert quantize(net, strategy, [(x,)]).tensors["weight"].rotation == Rotation(0, 5)


def test_biases_are_not_rotated():
    net = nn.Linear(4, 3)
    tensors = uniform_strategy(net, 3, rounding="gptq", rotation=1).tensors
    assert (tensors["weight"].rotation, tensors["bias"].rotation) == (1, None)
    with pytest.raises(ValueError, match="rounding is 'gptq': activations"):
        ActivationChoice("uniform", 4, rounding="gptq", rotation=1)


def test_a_rotation_that_a_file_cannot_have_is_refused(path):  # noqa: F811
    (tensor,) = layer(correlated(90, 9), torch.randn(4, 9), CODED | ROTATED)
    bad = [Rotation(2, 5), Rotation(-1, 5), Rotation(0, SEEDS), Rotation(0, True)]
    for rotation in bad:
        write_network(path, Quantized({"w": replace(tensor, rotation=rotation)}), {}, {})
        with pytest.raises(ValueError, match=r"rotation is|no count"), NetworkFile(path) as file:
            file.tensor("w")
