"""The evaluator gives what a plain loop over a quantized copy gives, in whichever layout."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from quantifind.metrics import outcome
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import evaluator, layouts
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy
from quantifind.tensor.quantized import Quantized

CRITERION = nn.CrossEntropyLoss()
EXAMPLES = 600


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        out = self.second(self.first(x).relu())
        out += x
        return self.head(out)


class Branching(Residual):
    def forward(self, x):
        x = self.first(x)
        return self.head(self.second(x) if x.isfinite().all() else x)


def conv(channels):
    return nn.Sequential(
        *(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)),
    )


class Viewing(nn.Module):
    """A view needs its convolution's output in torch's own layout."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(48, 4)

    def forward(self, x):
        return self.head(self.first(x).view(len(x), -1))


NETWORKS = {
    "viewing": (Viewing, (2, 4, 4)),
    "one channel": (lambda: conv(1), (1, 8, 8)),
    "three channels": (lambda: conv(3), (3, 8, 8)),
    "residual": (Residual, (6,)),
    "branching": (Branching, (6,)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(40, 4)
        ),
        (5, 8),
    ),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    inputs, targets = torch.randn(EXAMPLES, *shape), torch.randint(4, (EXAMPLES,))
    return make().eval(), list(zip(inputs.split(50), targets.split(50), strict=True))


def agree(found, wanted):
    torch.testing.assert_close(found["outputs"], wanted["outputs"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [32, 512])
@pytest.mark.parametrize("layout", layouts.FORMATS)
def test_outcomes_are_those_of_a_plain_loop(case, layout, batch, monkeypatch):
    net, batches = case
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layout, batch))
    measured = Evaluator(net, batches, CRITERION)
    for bits in (2, 8):
        quantized = quantize(net, uniform_strategy(net, bits))
        plain = outcome(quantize_model(net, quantized), batches, CRITERION)
        agree(measured.outcome(quantized), plain)
    agree(measured.outcome(), outcome(net, batches, CRITERION))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_replayed_pass_is_as_a_whole_one(case, capsys):
    net, batches = case
    measured = Evaluator(net, batches, CRITERION)
    measured.outcome()  # in which a layout that fails is left
    capsys.readouterr()
    tensors = quantize(net, uniform_strategy(net, 3)).tensors
    for first, last in ((0, EXAMPLES), (70, 200)):
        for name, part in tensors.items():
            (found,) = measured.one_tensor(name, [part], first, last)
            agree(found, measured.outcome(Quantized({name: part}), first, last))
    said = capsys.readouterr().err.count("Each pass is a whole one")
    assert said == (not measured.replayable) == isinstance(net, Branching)


def test_what_lies_before_a_tensor_is_computed_once():
    class Counted(nn.Linear):
        passes = 0

        def forward(self, x):
            Counted.passes += 1
            return super().forward(x)

    net = nn.Sequential(Counted(6, 6), nn.ReLU(), nn.Linear(6, 4))
    data = [(torch.randn(64, 6), torch.randint(4, (64,)))]
    measured = Evaluator(net, data, CRITERION)
    parts = [quantize(net, uniform_strategy(net, bits)).tensors["2.weight"] for bits in range(2, 9)]
    measured.outcome()  # and once for its side effects
    before = Counted.passes
    measured.one_tensor("2.weight", parts)
    # recorded, and once to compare
    assert Counted.passes - before == 2


def test_a_replay_that_gives_other_outputs_is_not_taken(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "TOLERANCE", -1.0)
    net = Residual().eval()
    data = [(torch.randn(64, 6), torch.randint(4, (64,)))]
    measured = Evaluator(net, data, CRITERION)
    part = quantize(net, uniform_strategy(net, 3)).tensors["second.weight"]
    (found,) = measured.one_tensor("second.weight", [part])
    agree(found, measured.outcome(Quantized({"second.weight": part})))
    assert "other outputs" in capsys.readouterr().err


def test_layout_and_batch_go_by_a_rule():
    for net, shape, layout in (
        (conv(3), (3, 8, 8), layouts.CHANNELS_LAST),
        (nn.Flatten(), (3, 8, 8), layouts.CONTIGUOUS),
        (Residual(), (6,), layouts.CONTIGUOUS),
    ):
        for examples in (2, EXAMPLES):
            found = layouts.layout_and_batch(net, torch.zeros(examples, *shape))
            assert found == (layout, layouts.CPU_BATCH)


DIGITS = """
import hashlib, torch
from torch import nn
from quantifind.quantize import quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4))
data = [(torch.randn(700, 1, 12, 12), torch.randint(4, (700,)))]
measured = Evaluator(net, data, nn.CrossEntropyLoss())
for bits in (3, 6):
    quantized = quantize(net, uniform_strategy(net, bits))
    outcomes = [measured.outcome(quantized)]
    for name, tensor in quantized.tensors.items():
        outcomes += measured.one_tensor(name, [tensor])
    for outcome in outcomes:
        for values in outcome.parts[0].values():
            print(hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""


def test_two_processes_give_the_same_digits(root):
    command = [sys.executable, "-c", DIGITS]
    running = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    assert len(printed[0].split()) >= 2 * 5 * 2


def test_one_channel_is_laid_out_too():
    inputs = torch.randn(3, 1, 4, 5)
    found = layouts.in_layout(inputs, layouts.CHANNELS_LAST)
    assert torch.equal(found, inputs)
    assert found.stride() == torch.empty(3, 1, 4, 5, memory_format=torch.channels_last).stride()
    assert found.stride()[1:] == (1, 5, 1)


def test_a_layout_that_fails_is_left(capsys):
    torch.manual_seed(0)
    net, inputs, targets = Viewing(), torch.randn(70, 2, 4, 4), torch.randint(4, (70,))
    measured = Evaluator(net, [(inputs, targets)], CRITERION)
    tensors = quantize(net, uniform_strategy(net, 3)).tensors
    for replayed in (False, True):
        (found,) = measured.one_tensor("head.weight", [tensors["head.weight"]])
        quantized = Quantized({"head.weight": tensors["head.weight"]})
        agree(found, outcome(quantize_model(net, quantized), [(inputs, targets)], CRITERION))
        assert bool(measured.compared) == replayed
    assert (measured.layout, measured.batch) == (layouts.CONTIGUOUS, layouts.CPU_BATCH)
    assert capsys.readouterr().err.count("going on with contiguous") == 1


class Picky(nn.Linear):
    """Fails for batches of another size than it can take."""

    most, error = 64, RuntimeError("no kernel")

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(
    ("most", "error", "message"),
    [
        (20, torch.OutOfMemoryError("out"), "batches of 16"),
        (100, RuntimeError("not enough memory: you tried"), "batches of 64"),
    ],
)
def test_where_memory_runs_out_batches_are_halved(monkeypatch, capsys, most, error, message):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layouts.CONTIGUOUS, 512))
    monkeypatch.setattr(Picky, "most", 10**6)
    net = Picky(6, 4)
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    plain = outcome(net, data, CRITERION)
    measured = Evaluator(net, data, CRITERION)
    monkeypatch.setattr(Picky, "most", most)
    monkeypatch.setattr(Picky, "error", error)
    for _ in range(2):
        agree(measured.outcome(), plain)
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert said.count(message.split()[-1]) == 1


def test_another_error_is_raised_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layouts.CONTIGUOUS, 512))
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    measured = Evaluator(Picky(6, 4), data, CRITERION)
    monkeypatch.setattr(Picky, "most", 0)
    with pytest.raises(RuntimeError, match="no kernel"):
        measured.outcome()
    assert not capsys.readouterr().err


def test_batches_of_other_shapes_stay_as_they_are():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean(1))

    net = Mean(6, 4)
    data = [(torch.randn(9, length, 6), torch.randint(4, (9,))) for length in (3, 5, 2)]
    measured = Evaluator(net, data, CRITERION)
    quantized = quantize(net, uniform_strategy(net, 3))
    agree(measured.outcome(quantized), outcome(quantize_model(net, quantized), data, CRITERION))
    assert measured.examples == 27
    assert set(named_tensors(net)) == {"weight", "bias"}


def test_a_loader_without_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        Evaluator(nn.Linear(2, 2), [], CRITERION)


def test_what_fails_leaves_nothing_behind():
    net = Residual().eval()
    data = [(torch.randn(64, 6), torch.randint(4, (64,)))]
    measured = Evaluator(net, data, CRITERION)
    plain = measured.outcome()
    tensors = quantize(net, uniform_strategy(net, 3)).tensors
    wrong = {"first.weight": tensors["first.weight"], "second.weight": tensors["head.weight"]}
    with pytest.raises(RuntimeError):
        measured.outcome(Quantized(wrong))
    assert torch.equal(measured.outcome()["outputs"], plain["outputs"])


class Stateful(nn.Module):
    """Works on its inputs in place, and keeps a running mean in eval mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        x.sub_(0.5).div_(0.3)
        self.mean.lerp_(x.mean(0), 0.1)
        return self.head(x - self.mean)


class Reassigns(Stateful):
    """Its running mean is another tensor each time, and moves too little to be seen in a pass."""

    def forward(self, x):
        x.sub_(0.5).div_(0.3)
        self.mean = 0.999 * self.mean + 0.001 * x.mean(0)
        return self.head(x - self.mean)


class Filled(nn.Module):
    """A table that the first pass fills for good, in place or not."""

    def __init__(self, size):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("table", torch.zeros(size))
        self.ready = False

    def forward(self, x):
        if not self.ready:
            if len(self.table):
                self.table.copy_(torch.arange(6.0))
            else:
                self.table = torch.arange(6.0)
            self.ready = True
        return self.head(x * self.table)


@pytest.mark.parametrize("size", [0, 6])
def test_a_table_that_is_filled_once_stays(size):
    torch.manual_seed(0)
    net, data = Filled(size).eval(), [(torch.randn(60, 6), torch.randint(4, (60,)))]
    measured = Evaluator(net, data, CRITERION)
    wanted = outcome(copy.deepcopy(net), data, CRITERION)
    quantized = quantize(net, uniform_strategy(net, 4))
    for _ in range(2):
        agree(measured.outcome(), wanted)
        measured.outcome(quantized)


@pytest.mark.parametrize("make", [Stateful, Reassigns])
@pytest.mark.parametrize("examples", [60, EXAMPLES])
def test_what_a_pass_changes_is_put_back(make, examples):
    torch.manual_seed(0)
    net = make().eval()
    data = [(torch.randn(examples, 6), torch.randint(4, (examples,)))]
    before = data[0][0].clone()
    measured = Evaluator(net, data, CRITERION)
    quantized = quantize(net, uniform_strategy(net, 4))
    plain = [
        outcome(copied, [batch.clone() for batch in measured.batches()], CRITERION)
        for copied in (copy.deepcopy(net), quantize_model(net, quantized))
    ]
    for _ in range(2):
        agree(measured.outcome(), plain[0])
        agree(measured.outcome(quantized), plain[1])
    assert torch.equal(data[0][0], before)
    assert torch.equal(net.mean, torch.zeros(6))


def test_a_failed_replay_leaves_the_layout(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layouts.CONTIGUOUS, 512))

    def fail(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(evaluator.Replay, "outputs", fail)
    net = Residual().eval()
    measured = Evaluator(net, [(torch.randn(EXAMPLES, 6), torch.zeros(EXAMPLES).long())], CRITERION)
    part = quantize(net, uniform_strategy(net, 3)).tensors["second.weight"]
    (found,) = measured.one_tensor("second.weight", [part])
    agree(found, measured.outcome(Quantized({"second.weight": part})))
    assert measured.batch == 512
    assert "whole one: no such operation" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_with_one_example_is_an_error(monkeypatch):
    monkeypatch.setattr(evaluator, "layout_and_batch", lambda *_: (layouts.CONTIGUOUS, 2))
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    measured = Evaluator(Picky(6, 4), data, CRITERION)
    monkeypatch.setattr(Picky, "most", 0)
    monkeypatch.setattr(Picky, "error", torch.OutOfMemoryError("out"))
    with pytest.raises(torch.OutOfMemoryError):
        measured.outcome()
    assert measured.batch == 1
