"""On each device there is: the results of the CPU, without waiting for the device batch by batch.
On a GPU besides: what happens where its memory runs out."""

import warnings
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_evaluator import NETWORKS, Branching
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantifind.learning import learn
from quantifind.metrics import columns_of
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import evaluator, layouts
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.scale_fitting import fit_scales
from quantifind.search import find_strategy
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import batches_of
from quantifind.utils.loaders import Tensors, batch_loader, create_dataloaders
from quantifind.workflow.train_workflow import train_network

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CRITERION = nn.CrossEntropyLoss()
GPTQ = {"rounding": "gptq", "axis": 0, "scale": "output_mse"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return request.param


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return make().eval(), torch.randn(300, *shape), torch.randint(4, (300,))


def on_both(net, device):
    return net, plain_copy(net).to(device)


@contextmanager
def memory(megabytes):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(megabytes * 2**20 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def agree(found, wanted):
    assert [part.keys() for part in found.parts] == [part.keys() for part in wanted.parts]
    for kind in ("outputs", "loss"):
        assert found[kind].device.type == "cpu"
        torch.testing.assert_close(found[kind], wanted[kind], rtol=1e-4, atol=1e-5)
    mean, other = found["loss"].mean(), wanted["loss"].mean()
    torch.testing.assert_close(mean, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", layouts.FORMATS)
def test_outcomes_are_those_of_the_cpu(case, layout, device, monkeypatch):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layout, 128))
    net, inputs, targets = case
    on_cpu, there = (Evaluator(n, [(inputs, targets)], CRITERION) for n in on_both(net, device))
    quantized = [quantize(net, uniform_strategy(net, bits)) for bits in (2, 8)]
    for one in quantized:
        agree(there.outcome(one), on_cpu.outcome(one))
    for name in quantized[0].tensors:
        values = [one.tensors[name] for one in quantized]
        for found, value in zip(there.one_tensor(name, values), values, strict=True):
            agree(found, on_cpu.outcome(Quantized({name: value})))


class Asking(TorchDispatchMode):
    """Counts what would wait for a GPU: values, or numbers of values, that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


def waits(call, device):
    """How often a call waits for the device."""
    call()
    if device == "cpu":
        with Asking() as asking:
            call()
        return asking.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


@pytest.mark.parametrize("on_device", [True, False])
def test_no_batch_waits_for_the_device(case, on_device, device, monkeypatch):
    net, inputs, targets = case
    if isinstance(net, Branching):
        pytest.skip("it waits for the values by which it branches")
    quantized = quantize(net, uniform_strategy(net, 4))
    if not on_device:
        monkeypatch.setattr(evaluator, "on_device", lambda _, tensor: tensor)
    found = []
    for batch in (150, 10):
        monkeypatch.setattr(
            evaluator, "layout_and_batch", lambda *_, batch=batch: ("contiguous", batch)
        )
        measured = Evaluator(on_both(net, device)[1], [(inputs, targets)], CRITERION)
        found.append(waits(lambda measured=measured: measured.outcome(quantized), device))
    assert found[1] <= found[0]


def test_no_batch_of_training_waits_for_the_device(device):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)
    # Adam's steps are counted on the host: torch asks for them there, where nothing waits
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
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
                ),
                device,
            )
        )
    assert found[1] <= found[0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_codes_are_as_good_as_those_of_the_cpu(case, rounding, device):
    net, inputs, targets = case
    options = GPTQ if rounding == "gptq" else {"axis": 0}
    tensors = {
        name: {"scheme": "uniform", "bits": 4} | (options if tensor.dim() > 1 else {})
        for name, tensor in named_tensors(net).items()
    }
    strategy, errors = Strategy(tensors), []
    for one in on_both(net, device):
        quantized = quantize(one, strategy, [(inputs[:256], targets[:256])])
        measured = Evaluator(one, [(inputs, targets)], CRITERION)
        assert all(t.codes.device == measured.device for t in quantized.tensors.values())
        outputs = [measured.outcome(q)["outputs"] for q in (quantized, None)]
        errors.append((outputs[0] - outputs[1]).norm())
    # sums are taken in another order, ties fall to either side, and what makes up for them goes
    # another way, to as good an end
    torch.testing.assert_close(*errors, rtol=0.02 if rounding == "nearest" else 0.3, atol=0)


def test_a_search_finds_what_the_cpu_finds(classifier, device, tmp_path):
    net, criterion, (train, val, _) = classifier
    train_network(net, criterion, torch.optim.Adam(net.parameters(), 0.02), train, val, epochs=10)
    how = {"limit": 1.5, "widths": (2, 4, 8)}
    here, there = (
        find_strategy(one, train, val, criterion, folder=tmp_path / str(number), **how)
        for number, one in enumerate(on_both(net, device))
    )
    assert there.passes.left_out == here.passes.left_out
    assert there.mean_bits == pytest.approx(here.mean_bits, rel=0.1)


def test_scales_of_kept_codes_are_fitted(classifier, device):
    """They come from a store, in the memory of the host."""
    net, _, (train, *_) = classifier
    quantized = quantize(net, uniform_strategy(net, 2))
    here, there = (
        fit_scales(one, quantized, list(batches_of(train, one)), CRITERION)
        for one in on_both(net, device)
    )
    assert not there.note
    assert all(t.qparams.scale.device.type == "cpu" for t in there.quantized.tensors.values())
    assert there.after < there.before
    assert there.after == pytest.approx(here.after, rel=0.1)


def test_training_and_learning(device):
    torch.manual_seed(0)
    inputs = torch.randn(400, 6)
    train, val, _ = create_dataloaders(Tensors(inputs, inputs[:, :3].argmax(1)), batch_size=32)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    history = train_network(net, CRITERION, optimizer, train, val, epochs=10)
    assert history["val_accuracy"].iloc[-1] > 0.8
    strategy = uniform_strategy(net, 3)
    quantized = learn(net, strategy, train, epochs=1, label_weight=0.5)
    assert all(tensor.codes.device.type == device for tensor in quantized.tensors.values())


class Noted(nn.Linear):
    seen: ClassVar[set] = set()

    def forward(self, x):
        outputs = super().forward(x)
        Noted.seen.add((torch.is_grad_enabled(), outputs.dtype))
        return outputs


def test_learning_has_products_in_bfloat16_where_a_gpu_has_it(device):
    has_it = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(0)
    Noted.seen.clear()
    net = nn.Sequential(Noted(6, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    loader = [(torch.randn(64, 6), torch.randint(4, (64,))) for _ in range(16)]
    strategy, inputs = uniform_strategy(net, 3), torch.randn(500, 6).to(device)
    start, learned = (
        quantize_model(net, one)
        for one in (strategy, learn(net, strategy, loader, epochs=10, learning_rate=3e-3))
    )
    products = torch.bfloat16 if has_it else torch.float32
    assert Noted.seen == {(True, products), (False, torch.float32)}
    with torch.no_grad():
        far, near = ((one(inputs) - net(inputs)).norm() for one in (start, learned))
    assert near < far


@needs_gpu
def test_out_of_memory_takes_learning_to_parts_of_a_batch(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(torch.randn(2, 1, 32, 32))
    net.cuda()
    loader = [(torch.randn(2048, 1, 32, 32), torch.randint(4, (2048,)))]
    with memory(600):
        learn(net, uniform_strategy(net, 4), loader, epochs=2, calibration=[])
    assert "Out of memory: learning goes on with" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [2**30, 0])
def test_columns_are_those_of_the_cpu(case, kept, device, monkeypatch):
    monkeypatch.setattr(evaluator, "KEPT", kept)
    net, inputs, targets = case
    quantized, columns = quantize(net, uniform_strategy(net, 4)), []
    for one in on_both(net, device):
        measured = Evaluator(one, [(inputs, targets)], CRITERION)
        columns.append(columns_of(measured.outcome(quantized, beside=measured.original())))
    for name, column in columns[0].items():
        if column.dtype != bool:
            np.testing.assert_allclose(columns[1][name], column, rtol=1e-2, atol=1e-4)


@needs_gpu
def test_out_of_memory_halves_the_batch(capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: ("contiguous", 2048))
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.Flatten(), nn.LazyLinear(4)).eval()
    net(torch.randn(2, 1, 32, 32))
    inputs, targets = torch.randn(2048, 1, 32, 32), torch.randint(4, (2048,))
    on_cpu, there = (Evaluator(n, [(inputs, targets)], CRITERION) for n in on_both(net, "cuda"))
    with memory(400):
        found = there.outcome()
    assert there.batch < 2048
    assert "Out of memory: going on with batches of 1024" in capsys.readouterr().err
    agree(found, on_cpu.outcome())
