"""On a GPU: the results of the CPU, without waiting for the device batch by batch. Skipped where
there is none."""

import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_evaluator import NETWORKS, Branching
from torch import nn

from quantifind.learning import learn
from quantifind.metrics import columns_of
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import evaluator, layouts
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.scale_fitting import fit_scales
from quantifind.search import find_strategy
from quantifind.strategy import uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import batches_of
from quantifind.utils.loaders import Tensors, batch_loader, create_dataloaders
from quantifind.workflow.train_workflow import train_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CRITERION = nn.CrossEntropyLoss()
GPTQ = {"rounding": "gptq", "axis": 0, "scale": "output_mse"}


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return make().eval(), torch.randn(600, *shape), torch.randint(4, (600,))


def on_both(net):
    return net, evaluator.plain_copy(net).cuda()


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for kind in ("outputs", "loss"):
        assert found[kind].device.type == "cpu"
        torch.testing.assert_close(found[kind], wanted[kind], rtol=1e-4, atol=1e-5)
    mean, other = found["loss"].mean(), wanted["loss"].mean()
    torch.testing.assert_close(mean, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", layouts.FORMATS)
def test_outcomes_are_those_of_the_cpu(case, layout, monkeypatch):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layout, 128))
    net, inputs, targets = case
    on_cpu, on_gpu = (Evaluator(n, [(inputs, targets)], CRITERION) for n in on_both(net))
    parts = []
    for bits in (2, 8):
        quantized = quantize(net, uniform_strategy(net, bits))
        agree(on_gpu.outcome(quantized), on_cpu.outcome(quantized))
        parts += quantized.tensors.items()
    for name, part in parts:
        (found,) = on_gpu.one_tensor(name, [part])
        agree(found, on_cpu.outcome(Quantized({name: part})))


def waits(call):
    """How often a call waits for the device."""
    call()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


@pytest.mark.parametrize("on_device", [True, False])
def test_no_batch_waits_for_the_device(case, on_device, monkeypatch):
    net, inputs, targets = case
    if isinstance(net, Branching):
        pytest.skip("it waits for the values by which it branches")
    quantized = quantize(net, uniform_strategy(net, 4))
    if not on_device:
        monkeypatch.setattr(evaluator, "on_device", lambda _, tensor: tensor)
    found = []
    for batch in (300, 10):
        monkeypatch.setattr(
            evaluator, "layout_and_batch", lambda *_, batch=batch: ("contiguous", batch)
        )
        measured = Evaluator(on_both(net)[1], [(inputs, targets)], CRITERION)
        found.append(waits(lambda measured=measured: measured.outcome(quantized)))
    assert found[1] <= found[0]


def test_no_batch_of_training_waits_for_the_device():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).cuda()
    optimizer = torch.optim.Adam(net.parameters())
    found = []
    for examples in (128, 1280):
        inputs = torch.randn(examples, 6)
        loader = batch_loader(
            Tensors(inputs, inputs[:, :3].argmax(1)), batch_size=32, shuffle=True, seed=0
        )
        found.append(
            waits(
                lambda loader=loader: train_network(
                    net, CRITERION, optimizer, loader, list(loader)[:1], epochs=1
                )
            )
        )
    assert found[1] <= found[0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_codes_are_as_good_as_those_of_the_cpu(case, rounding):
    net, inputs, targets = case
    options = GPTQ if rounding == "gptq" else {"axis": 0}
    tensors = {
        name: {"scheme": "uniform", "bits": 4} | (options if tensor.dim() > 1 else {})
        for name, tensor in named_tensors(net).items()
    }
    strategy = uniform_strategy(net, 4)
    strategy.tensors.update(tensors)
    errors = []
    for one in on_both(net):
        quantized = quantize(one, strategy, [(inputs[:256], targets[:256])])
        measured = Evaluator(one, [(inputs, targets)], CRITERION)
        assert all(t.codes.device == measured.device for t in quantized.tensors.values())
        outputs = [measured.outcome(q)["outputs"] for q in (quantized, None)]
        errors.append((outputs[0] - outputs[1]).norm())
    # sums are taken in another order, ties fall to either side, and what is compensated after them
    # goes another way, to as good an end
    torch.testing.assert_close(*errors, rtol=0.02 if rounding == "nearest" else 0.3, atol=0)


def test_a_search_on_the_gpu_finds_what_the_cpu_finds(classifier, tmp_path):
    net, criterion, (train, val, _) = classifier
    train_network(net, criterion, torch.optim.Adam(net.parameters(), 0.02), train, val, epochs=20)
    found = [
        find_strategy(
            one, train, val, criterion, limit=1.5, widths=range(1, 9), folder=tmp_path / kind
        )
        for one, kind in zip(on_both(net), ("cpu", "gpu"), strict=True)
    ]
    assert found[1].passes.left_out == found[0].passes.left_out
    assert found[1].mean_bits == pytest.approx(found[0].mean_bits, rel=0.1)


def test_scales_of_kept_codes_are_fitted(classifier):
    """They come from a store, in the memory of the host."""
    net, _, (train, *_) = classifier
    quantized = quantize(net, uniform_strategy(net, 2))
    here, there = (
        fit_scales(one, quantized, list(batches_of(train, one)), CRITERION) for one in on_both(net)
    )
    assert not there.note
    assert all(t.qparams.scale.device.type == "cpu" for t in there.quantized.tensors.values())
    assert there.after == pytest.approx(here.after, rel=0.1)


def test_training_and_learning_on_the_gpu():
    torch.manual_seed(0)
    inputs = torch.randn(400, 6)
    train, val, _ = create_dataloaders(Tensors(inputs, inputs[:, :3].argmax(1)), batch_size=32)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).cuda()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    history = train_network(net, CRITERION, optimizer, train, val, epochs=10)
    assert history["val_accuracy"].iloc[-1] > 0.8
    strategy = uniform_strategy(net, 3)
    quantized = learn(net, strategy, train, epochs=1, label_weight=0.5)
    assert all(tensor.codes.device.type == "cuda" for tensor in quantized.tensors.values())


class Noted(nn.Linear):
    seen: ClassVar[set] = set()

    def forward(self, x):
        outputs = super().forward(x)
        Noted.seen.add((torch.is_grad_enabled(), outputs.dtype))
        return outputs


def test_learning_has_products_in_bfloat16_where_there_are_some():
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bfloat16")
    torch.manual_seed(0)
    net = nn.Sequential(Noted(6, 64), nn.ReLU(), nn.Linear(64, 4)).cuda()
    loader = [(torch.randn(64, 6), torch.randint(4, (64,))) for _ in range(16)]
    strategy, inputs = uniform_strategy(net, 3), torch.randn(500, 6).cuda()
    start, learned = (
        quantize_model(net, one)
        for one in (strategy, learn(net, strategy, loader, epochs=20, learning_rate=3e-3))
    )
    assert Noted.seen == {(True, torch.bfloat16), (False, torch.float32)}
    with torch.no_grad():
        far, near = ((one(inputs) - net(inputs)).norm() for one in (start, learned))
    assert near < far


def test_out_of_memory_takes_learning_to_parts_of_a_batch(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(torch.randn(2, 1, 32, 32))
    net.cuda()
    loader = [(torch.randn(2048, 1, 32, 32), torch.randint(4, (2048,)))]
    strategy, total = uniform_strategy(net, 4), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(600 * 2**20 / total)
    try:
        learn(net, strategy, loader, epochs=2, calibration=[])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: learning goes on with" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [2**30, 0])
def test_columns_are_those_of_the_cpu(case, kept, monkeypatch):
    monkeypatch.setattr(evaluator, "KEPT", kept)
    net, inputs, targets = case
    quantized, columns = quantize(net, uniform_strategy(net, 4)), []
    for one in on_both(net):
        measured = Evaluator(one, [(inputs, targets)], CRITERION)
        columns.append(columns_of(measured.outcome(quantized, beside=measured.original())))
    for name, column in columns[0].items():
        if column.dtype != bool:
            np.testing.assert_allclose(columns[1][name], column, rtol=1e-2, atol=1e-4)


def test_out_of_memory_halves_the_batch(capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: ("contiguous", 2048))
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.Flatten(), nn.LazyLinear(4)).eval()
    net(torch.randn(2, 1, 32, 32))
    inputs, targets = torch.randn(2048, 1, 32, 32), torch.randint(4, (2048,))
    on_cpu, on_gpu = (Evaluator(n, [(inputs, targets)], CRITERION) for n in on_both(net))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(400 * 2**20 / total)
    try:
        found = on_gpu.outcome()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert on_gpu.batch < 2048
    assert "Out of memory: going on with batches of 1024" in capsys.readouterr().err
    agree(found, on_cpu.outcome())
