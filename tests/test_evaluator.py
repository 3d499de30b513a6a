"""The evaluator gives what a plain loop over a quantized copy gives, in whichever layout."""

import copy
import json

import pytest
import torch
from torch import nn

from quantifind.metrics import outcome
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize, with_quantized
from quantifind.runtime import evaluator, layouts, onednn
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


@pytest.fixture(autouse=True)
def weights_laid_out_once_in_small_networks_too(monkeypatch):
    monkeypatch.setattr(onednn, "WORTH", 0)


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
    monkeypatch.setattr(evaluator, "fastest", lambda *_: (layout, batch))
    measured = Evaluator(net, batches, CRITERION)
    for bits in (2, 8):
        quantized = quantize(net, uniform_strategy(net, bits))
        plain = outcome(with_quantized(net, quantized), batches, CRITERION)
        agree(measured.outcome(quantized), plain)
    agree(measured.outcome(), outcome(net, batches, CRITERION))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_one_tensor_alone_is_as_in_a_whole_pass(case, capsys):
    net, batches = case
    measured = Evaluator(net, batches, CRITERION)
    tensors = quantize(net, uniform_strategy(net, 3)).tensors
    for first, last in ((0, EXAMPLES), (70, 200)):
        for name, part in tensors.items():
            (found,) = measured.alone(name, [part], first, last)
            agree(found, measured.outcome(Quantized({name: part}), first, last))
    said = capsys.readouterr().err.count("Each pass is a whole one")
    assert said == (not measured.repeatable) == isinstance(net, Branching)


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
    before = Counted.passes
    measured.alone("2.weight", parts)
    # recorded, and once to compare
    assert Counted.passes - before == 2


def test_a_pass_that_gives_other_outputs_is_not_gone_on_with(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "TOLERANCE", -1.0)
    net = Residual().eval()
    data = [(torch.randn(64, 6), torch.randint(4, (64,)))]
    measured = Evaluator(net, data, CRITERION)
    part = quantize(net, uniform_strategy(net, 3)).tensors["second.weight"]
    (found,) = measured.alone("second.weight", [part])
    agree(found, measured.outcome(Quantized({"second.weight": part})))
    assert "other outputs" in capsys.readouterr().err


def test_layouts_are_timed_once(monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "new" / "layouts.json")
    timed, whole = [], layouts._timed
    monkeypatch.setattr(layouts, "_timed", lambda *given: timed.append(1) or whole(*given))
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    for _ in range(2):
        Evaluator(Residual(), data, CRITERION)
    assert len(timed) == 1
    few = [(data[0][0][:100], data[0][1][:100])]
    assert Evaluator(Residual(), few, CRITERION).batch == layouts.DEFAULT
    assert len(timed) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": ["sideways", 64]}'])
def test_a_damaged_memory_of_layouts_is_none(text, monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "layouts.json")
    layouts.REMEMBERED.write_text(text)
    assert layouts._remembered() == {}
    Evaluator(Residual(), [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))], CRITERION)
    assert len(json.loads(layouts.REMEMBERED.read_text())) == 1


def test_one_channel_is_laid_out_too():
    inputs = torch.randn(3, 1, 4, 5)
    found = layouts.in_layout(inputs, layouts.CHANNELS_LAST)
    assert torch.equal(found, inputs)
    assert found.stride() == torch.empty(3, 1, 4, 5, memory_format=torch.channels_last).stride()
    assert found.stride()[1:] == (1, 5, 1)


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
        (64, RuntimeError("no kernel"), "no kernel"),
        (20, torch.OutOfMemoryError("out"), "batches of 16"),
        (100, RuntimeError("not enough memory: you tried"), "batches of 64"),
    ],
)
def test_what_fails_is_done_otherwise(monkeypatch, capsys, most, error, message):
    monkeypatch.setattr(evaluator, "fastest", lambda *_: (layouts.CONTIGUOUS, 512))
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
    monkeypatch.setattr(evaluator, "fastest", lambda *_: (layouts.CONTIGUOUS, 512))
    monkeypatch.setattr(Picky, "most", 0)
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    measured = Evaluator(Picky(6, 4), data, CRITERION)
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
    agree(measured.outcome(quantized), outcome(with_quantized(net, quantized), data, CRITERION))
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


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "file" / "layouts.json")
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    assert Evaluator(Residual(), data, CRITERION).batch in layouts.SIZES


def test_what_fails_while_timed_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "layouts.json")
    monkeypatch.setattr(Picky, "most", 64)
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    assert Evaluator(Picky(6, 4), data, CRITERION).batch <= 64


def test_sizes_that_take_too_long_are_not_tried(monkeypatch):
    class Slow(nn.Linear):
        largest = 0

        def forward(self, x):
            Slow.largest = max(Slow.largest, len(x))
            return super().forward(x)

    monkeypatch.setattr(layouts, "LONGEST", 0.0)
    assert layouts._timed(Slow(6, 4), torch.randn(3_000, 6)) == (layouts.CONTIGUOUS, 32)
    assert Slow.largest == 32


def test_no_timing_of_others_is_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "layouts.json")

    def timed(*_):
        layouts.REMEMBERED.write_text('{"of another": ["contiguous", 64]}')
        return layouts.CONTIGUOUS, 32

    monkeypatch.setattr(layouts, "_timed", timed)
    assert layouts.fastest(Residual(), torch.randn(EXAMPLES, 6)) == (layouts.CONTIGUOUS, 32)
    assert len(json.loads(layouts.REMEMBERED.read_text())) == 2


def test_networks_of_other_precision_are_timed_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "REMEMBERED", tmp_path / "layouts.json")
    tokens = torch.randint(9, (EXAMPLES, 3))
    for dtype in (torch.float32, torch.bfloat16):
        layouts.fastest(nn.Sequential(nn.Embedding(9, 4)).to(dtype), tokens)
    assert len(json.loads(layouts.REMEMBERED.read_text())) == 2


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


@pytest.mark.parametrize("examples", [60, EXAMPLES])
def test_what_a_pass_changes_is_put_back(examples):
    torch.manual_seed(0)
    net = Stateful().eval()
    data = [(torch.randn(examples, 6), torch.randint(4, (examples,)))]
    before = data[0][0].clone()
    measured = Evaluator(net, data, CRITERION)
    quantized = quantize(net, uniform_strategy(net, 4))
    plain = [
        outcome(copied, [(x.clone(), t) for x, t in measured.batches()], CRITERION)
        for copied in (copy.deepcopy(net), with_quantized(net, quantized))
    ]
    for _ in range(2):
        agree(measured.outcome(), plain[0])
        agree(measured.outcome(quantized), plain[1])
    assert torch.equal(data[0][0], before)
    assert torch.equal(net.mean, torch.zeros(6))


def test_a_pass_that_cannot_go_on_leaves_the_layout(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "fastest", lambda *_: (layouts.CONTIGUOUS, 512))

    def fail(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(evaluator.Tape, "outputs", fail)
    net = Residual().eval()
    measured = Evaluator(net, [(torch.randn(EXAMPLES, 6), torch.zeros(EXAMPLES).long())], CRITERION)
    part = quantize(net, uniform_strategy(net, 3)).tensors["second.weight"]
    (found,) = measured.alone("second.weight", [part])
    agree(found, measured.outcome(Quantized({"second.weight": part})))
    assert measured.batch == 512
    assert "whole one: no such operation" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_with_one_example_is_an_error(monkeypatch):
    monkeypatch.setattr(evaluator, "fastest", lambda *_: (layouts.CONTIGUOUS, 2))
    monkeypatch.setattr(Picky, "most", 0)
    monkeypatch.setattr(Picky, "error", torch.OutOfMemoryError("out"))
    data = [(torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,)))]
    measured = Evaluator(Picky(6, 4), data, CRITERION)
    with pytest.raises(torch.OutOfMemoryError):
        measured.outcome()
    assert measured.batch == 1
