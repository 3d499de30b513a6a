"""One working copy gives what a plain loop over copies does, in any layout and batch size."""

import copy
import json
from contextlib import suppress

import pytest
import torch
from test_strategy import Zoo, intact
from torch import nn

from quantifind import evaluator
from quantifind.evaluator import CHANNELS_LAST, CONTIGUOUS, Evaluator
from quantifind.loaders import Tensors, batch_loader
from quantifind.metrics import outcome
from quantifind.models.language_transformer_model import LanguageTransformer
from quantifind.products import own_tensors
from quantifind.strategy import (
    Quantized,
    Strategy,
    quantize,
    uniform_activations,
    uniform_strategy,
    with_quantized,
)

CRITERION = nn.CrossEntropyLoss()
EXAMPLES, LAYOUT, BATCH = 70, (CHANNELS_LAST, 16), 16


class Net(nn.Module):
    """A forward, and the layers that it takes, by name."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def convolutional(channels):
    first = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(4, 5, 2, groups=1), nn.ReLU(), nn.Dropout(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(20, 3))


def dense():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


def transformer():
    options = {"width": 8, "layers": 2, "heads": 2, "dropout": 0.1, "neighbours": True}
    return LanguageTransformer(3, 9, **options)


def tied():
    def run(net, x):
        return nn.functional.linear(net.mix(net.embedding(x)).mean(1), net.out.weight)

    net = Net(run, embedding=nn.Embedding(9, 8), mix=nn.Linear(8, 8), out=nn.Linear(8, 9))
    net.out.weight = net.embedding.weight
    return net


def numbers(*shape, examples=EXAMPLES):
    return torch.randn(examples, *shape, generator=torch.Generator().manual_seed(1))


def words():
    codes = torch.randint(1, 9, (EXAMPLES, 7), generator=torch.Generator().manual_seed(1))
    lengths = 1 + torch.arange(EXAMPLES) % 6
    return codes * (torch.arange(7) < lengths.unsqueeze(1))


NETWORKS = {
    "three channels": (lambda: convolutional(3), numbers(3, 6, 6)),
    "one channel": (lambda: convolutional(1), numbers(1, 6, 6)),
    "strided inputs": (lambda: convolutional(3), numbers(6, 6, 3).permute(0, 3, 1, 2)),
    "dense": (dense, numbers(6)),
    "any module": (Zoo, numbers(6)),
    "padding mask": (transformer, words()),
    "tied": (tied, words()),
    "float64": (lambda: convolutional(1).double(), numbers(1, 6, 6).double()),
    "regression": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.ReLU()), numbers(2, 5)),
}


def case(kind):
    """A network whose buffers are not what they were made with, and a loader."""
    make, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    net = make()
    for tensor in own_tensors(net).values():
        if tensor.is_floating_point():
            tensor.data += torch.rand(tensor.shape) / 4
    targets = torch.arange(EXAMPLES) % 3
    if kind == "regression":
        targets = numbers(3, 6)
    return net.eval(), list(zip(inputs.split(13), targets.split(13), strict=True))


def criterion_of(kind):
    return nn.MSELoss() if kind == "regression" else CRITERION


def alone_on_grid(net, bits):
    """Each of the network's tensors, buffers among them, on few levels."""
    choice = {"scheme": "uniform", "bits": bits}
    choices = {
        name: choice if tensor.is_floating_point() and tensor.numel() else None
        for name, tensor in own_tensors(net).items()
    }
    named = {**uniform_strategy(net).tensors, **dict(net.named_buffers())}
    return quantize(net, Strategy({n: c for n, c in choices.items() if n in named})).tensors


def candidates(net, loader):
    """On levels: several tensors, buffers, activations, single tensors, and nothing in between."""
    coarse, none = alone_on_grid(net, 2), Quantized({})
    buffers = {name: part for name, part in coarse.items() if name in dict(net.named_buffers())}
    levels = uniform_activations(net, loader, 4)
    strategy = Strategy(uniform_strategy(net, 3).tensors, levels)
    everything = quantize(net, strategy, loader)
    single = [Quantized({name: part}) for name, part in coarse.items()]
    return [none, everything, Quantized(coarse), none, Quantized(buffers), everything, *single]


def assert_alike(found, wanted, dtype=torch.float32):
    assert found.keys() == wanted.keys()
    for name in ("loss", "outputs"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"].mean(), wanted["loss"].mean(), rtol=1e-5, atol=0)
    if "correct" in wanted:
        assert torch.equal(found["correct"], wanted["correct"])


def span(measured, first, last):
    return {name: column[first:last] for name, column in measured.items()}


def laid_out(monkeypatch, layout, batch):
    """Evaluators with this layout and batch size, as if they were remembered."""
    monkeypatch.setattr(evaluator, "_fastest", lambda *_: (layout, batch))


def said(capsys):
    """What the console says, in one line."""
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("layout", [(CONTIGUOUS, 64), (CHANNELS_LAST, 16), (CHANNELS_LAST, 1)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_outcomes_are_those_of_a_plain_loop(monkeypatch, kind, layout):
    laid_out(monkeypatch, *layout)
    (net, loader), criterion = case(kind), criterion_of(kind)
    measured = Evaluator(net, loader, criterion)
    assert measured.examples == EXAMPLES
    for quantized in candidates(net, loader):
        wanted = outcome(with_quantized(net, quantized), loader, criterion)
        assert_alike(measured.outcome(quantized), wanted)
        assert_alike(measured.outcome(quantized, 5, 38), span(wanted, 5, 38))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_model_is_left_as_it_was(monkeypatch, kind, train):
    monkeypatch.setattr(evaluator, "TIMED", 32)
    net, loader = case(kind)
    net.train(train)
    next(net.children()).train(not train)

    def measure():
        measured = Evaluator(net, loader, criterion_of(kind))
        for quantized in candidates(net, loader)[:5]:
            measured.outcome(quantized)
        measured.alone(list(alone_on_grid(net, 2).items()))

    intact(net, measure)


def test_a_loader_is_read_once_in_one_order():
    net, loader = case("dense")
    inputs, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    shuffled = batch_loader(Tensors(inputs, targets), batch_size=13, shuffle=True, seed=0)
    quantized = quantize(net, uniform_strategy(net, 3))
    for batches in (shuffled, iter(loader)):
        measured = Evaluator(net, batches, CRITERION)
        own = [(x.clone(), y.clone()) for x, y in measured.batches()]
        assert torch.equal(torch.cat([x for x, _ in own]), inputs) == (batches is not shuffled)
        for one in (quantized, Quantized({})):
            assert_alike(measured.outcome(one), outcome(with_quantized(net, one), own, CRITERION))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_inputs_are_changed_batch_by_batch(monkeypatch, layout):
    laid_out(monkeypatch, layout, BATCH)
    net, loader = case("one channel")
    quantized = quantize(net, uniform_strategy(net, 3))
    changed = [(x.round(), y) for x, y in loader]
    measured = Evaluator(net, loader, CRITERION)
    wanted = outcome(with_quantized(net, quantized), changed, CRITERION)
    assert_alike(measured.outcome(quantized, change_inputs=torch.round), wanted)
    assert_alike(measured.outcome(), outcome(net, loader, CRITERION))


def test_inputs_of_several_shapes_stay_in_their_own_batches(monkeypatch):
    monkeypatch.setattr(evaluator, "_fastest", None)
    torch.manual_seed(0)
    pooled = [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    net = nn.Sequential(*pooled, nn.Linear(4, 3)).eval()
    loader = [(torch.randn(n, 2, 3 + n), torch.arange(n) % 3) for n in (5, 9, 2)]
    measured = Evaluator(net, iter(loader), CRITERION)
    assert measured.examples == 16
    for (x, y), (own_x, own_y) in zip(loader, measured.batches(), strict=True):
        assert torch.equal(x, own_x)
        assert torch.equal(y, own_y)
    for quantized in candidates(net, loader):
        wanted = outcome(with_quantized(net, quantized), loader, CRITERION)
        assert_alike(measured.outcome(quantized), wanted)
        if len(quantized.tensors) == 1:
            assert_alike(measured.alone([*quantized.tensors.items()])[0], wanted)


@pytest.mark.parametrize("loader", [[], [(torch.ones(0, 6), torch.ones(0))]])
def test_no_examples(loader):
    with pytest.raises(ValueError, match="the loader has no examples"):
        Evaluator(dense(), loader, CRITERION).outcome()


@pytest.mark.parametrize("memory", [-1, 2_000, evaluator.MEMORY])
@pytest.mark.parametrize("kind", NETWORKS)
def test_each_tensor_alone_is_as_in_a_whole_pass(monkeypatch, capsys, kind, memory):
    monkeypatch.setattr(evaluator, "MEMORY", memory)
    laid_out(monkeypatch, *LAYOUT)
    (net, loader), criterion = case(kind), criterion_of(kind)
    parts = [*alone_on_grid(net, 2).items(), *alone_on_grid(net, 3).items()]
    measured = Evaluator(net, loader, criterion)
    assert measured.alone([]) == []
    for first, last in ((0, None), (5, 38), (60, 61)):
        found = measured.alone(parts, first, last)
        for (name, part), one in zip(parts, found, strict=True):
            wanted = outcome(with_quantized(net, Quantized({name: part})), loader, criterion)
            assert_alike(one, span(wanted, first, last))
        assert_alike(measured.outcome(), outcome(net, loader, criterion))
    assert measured.repeatable
    assert not said(capsys)


def test_little_memory_takes_one_tensor_and_one_batch_at_a_time(monkeypatch):
    net, loader = case("dense")
    parts = [*alone_on_grid(net, 2).items()]
    taped, alive, tape_of = [], [], evaluator.Tape
    laid_out(monkeypatch, CONTIGUOUS, BATCH)

    def tape(model, inputs, names):
        taped.append(list(names))
        return tape_of(model, inputs, names)

    def chunks(self, *arguments):
        for tapes in of_batches(self, *arguments):
            alive.append(len(tapes))
            yield tapes

    of_batches = Evaluator._chunks
    monkeypatch.setattr(evaluator, "Tape", tape)
    monkeypatch.setattr(Evaluator, "_chunks", chunks)
    names, batches = [name for name, _ in parts], len(Evaluator(net, loader, CRITERION).batches())
    Evaluator(net, loader, CRITERION).alone(parts)
    assert taped == [names] * (1 + batches)
    assert alive == [batches]
    monkeypatch.setattr(evaluator, "MEMORY", -1)
    for seen in (taped, alive):
        seen.clear()
    Evaluator(net, loader, CRITERION).alone(parts)
    assert taped[:3] == [names, names[:2], names[:1]]
    assert alive == [1] * batches * len(names)


def test_what_lies_before_a_tensor_is_computed_once(monkeypatch):
    laid_out(monkeypatch, CONTIGUOUS, BATCH)
    net, loader = case("dense")
    measured, calls = Evaluator(net, loader, CRITERION), []
    measured.work[0].register_forward_hook(lambda *_: calls.append(1))
    for bits, fresh in (([2], 1), ([2], 0), ([*range(2, 9)], 0)):
        calls.clear()
        measured.alone([("3.weight", alone_on_grid(net, b)["3.weight"]) for b in bits])
        # one to look at it, and a whole one to compare the first with
        assert len(calls) == len(measured.batches()) + 1 + fresh


class ByNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() * 2)


def by_course(net, x):
    x = net.first(x)
    return net.second(x if x.sum() > 0 else x * 2)


def at_random(net, x):
    return net.second(net.first(x) * torch.rand_like(net.first(x)).ceil())


def without(net, x):
    return net.second(ByNumpy()(net.first(x)))


@pytest.mark.parametrize("run", [by_course, at_random, without])
def test_a_pass_that_cannot_be_gone_through_again_is_a_whole_one(monkeypatch, capsys, run):
    laid_out(monkeypatch, CONTIGUOUS, BATCH)
    torch.manual_seed(0)
    net = Net(run, first=nn.Linear(6, 4), second=nn.Linear(4, 3)).eval()
    loader = case("dense")[1]
    parts = [*alone_on_grid(net, 2).items()]
    measured = Evaluator(net, loader, CRITERION)
    for _ in range(2):
        for (name, part), one in zip(parts, measured.alone(parts), strict=True):
            whole = with_quantized(net, Quantized({name: part}))
            assert_alike(one, outcome(whole, measured.batches(), CRITERION))
    assert said(capsys).count("Each pass is a whole one: ") == 1


def test_other_outputs_than_a_whole_pass_has_are_not_taken(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "TOLERANCE", -1.0)
    net, loader = case("dense")
    parts = [*alone_on_grid(net, 2).items()]
    measured = Evaluator(net, loader, CRITERION)
    for (name, part), one in zip(parts, measured.alone(parts), strict=True):
        assert_alike(one, outcome(with_quantized(net, Quantized({name: part})), loader, CRITERION))
    text = said(capsys)
    assert text.startswith("Each pass is a whole one: going on from 0.weight gives other outputs")
    assert text.count("whole one") == 1


@pytest.fixture
def timing(monkeypatch, tmp_path):
    """How often layouts are timed, with a memory of its own and three sizes of batches."""
    timed, own = [], evaluator._timed
    monkeypatch.setattr(evaluator, "BATCHES", (16, 8, 32))
    monkeypatch.setattr(evaluator, "TIMED", 32)
    monkeypatch.setattr(evaluator, "REMEMBERED", tmp_path / "not" / "there" / "layouts.json")

    def counted(*arguments):
        timed.append(own(*arguments))
        return timed[-1]

    monkeypatch.setattr(evaluator, "_timed", counted)
    return timed


def test_a_layout_is_timed_once_and_remembered(timing):
    net, loader = case("one channel")
    first = Evaluator(net, loader, CRITERION)
    assert first.layout in evaluator.FORMATS
    assert first.batch in evaluator.BATCHES
    for other in (copy.deepcopy(net), net):
        again = Evaluator(other, loader, CRITERION)
        assert timing == [[first.layout, first.batch]]
        assert [again.layout, again.batch] == timing[0]
    assert [p.name for p in evaluator.REMEMBERED.parent.iterdir()] == ["layouts.json"]
    for kind in ("three channels", "strided inputs", "dense"):
        Evaluator(*case(kind), CRITERION)
    assert len(timing) == 3
    Evaluator(net, loader, CRITERION)
    assert len(timing) == 3


@pytest.mark.parametrize("kind", ["dense", "padding mask", "regression"])
def test_there_are_layouts_of_images_alone(timing, kind):
    assert Evaluator(*case(kind), criterion_of(kind)).layout == CONTIGUOUS


def test_few_examples_time_nothing(timing):
    net, loader = case("one channel")
    measured = Evaluator(net, loader[:2], CRITERION)
    assert (measured.layout, measured.batch, timing) == (CONTIGUOUS, 16, [])
    assert not evaluator.REMEMBERED.exists()
    assert_alike(measured.outcome(), outcome(net, loader[:2], CRITERION))


HARM = {
    "empty": lambda _: "",
    "truncated": lambda text: text[:-5],
    "a list": lambda _: "[1]",
    "nothing": lambda _: "null",
    "another batch": lambda text: text.replace(str(json.loads(text).popitem()[1][1]), "7"),
    "another layout": lambda text: text.replace("c", "k"),
    "a longer entry": lambda text: text.replace("]", ", 1]"),
    "entries of no kind": lambda text: json.dumps(dict.fromkeys(json.loads(text), 3)),
    "layouts of no kind": lambda text: json.dumps(dict.fromkeys(json.loads(text), [[], 16])),
    "bytes": lambda _: b"\xff\xfe",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_memory_of_layouts_is_none(timing, harm):
    net, loader = case("one channel")
    Evaluator(net, loader, CRITERION)
    harmed = HARM[harm](evaluator.REMEMBERED.read_text())
    evaluator.REMEMBERED.write_bytes(harmed if isinstance(harmed, bytes) else harmed.encode())
    for _ in range(2):
        measured = Evaluator(net, loader, CRITERION)
        assert len(timing) == 2
        assert [measured.layout, measured.batch] == timing[1]
    assert_alike(measured.outcome(), outcome(net, loader, CRITERION))


def test_a_folder_that_cannot_be_written_is_no_error(timing):
    net, loader = case("one channel")
    evaluator.REMEMBERED.parent.parent.write_text("a file")
    for count in (1, 2):
        assert_alike(Evaluator(net, loader, CRITERION).outcome(), outcome(net, loader, CRITERION))
        assert len(timing) == count


def flat(net, x):
    """As many networks are written; channels last can't be viewed so."""
    return net.head(net.conv(x).view(len(x), -1))


def viewing():
    torch.manual_seed(0)
    net = Net(flat, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(64, 3)).eval()
    return net, [(numbers(2, 6, 6), torch.arange(EXAMPLES) % 3)]


def test_what_fails_while_timed_is_not_taken(timing, capsys):
    net, loader = viewing()
    net.conv.register_forward_pre_hook(up_to(16, torch.OutOfMemoryError("CUDA out of memory")))
    measured = Evaluator(net, loader, CRITERION)
    assert measured.layout == CONTIGUOUS
    assert measured.batch <= 16
    assert_alike(measured.outcome(), outcome(net, [(x[:9], y[:9]) for x, y in loader], CRITERION))
    assert not said(capsys)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_channel_is_laid_out_too(monkeypatch, layout, channels):
    """A convolution goes by the strides, which of one channel are the same memory in any order."""
    laid_out(monkeypatch, layout, BATCH)
    net, loader = case("one channel" if channels == 1 else "three channels")
    measured = Evaluator(net, loader, CRITERION)
    last = layout == CHANNELS_LAST
    strides = (36 * channels, 1, 6 * channels, channels) if last else (36 * channels, 36, 6, 1)
    found = measured.batches(3)
    assert all(x.stride() == strides for x, _ in found)
    assert torch.equal(torch.cat([x for x, _ in found]), torch.cat([x for x, _ in loader])[3:])
    computed = measured.work[0](found[0][0])
    assert computed.is_contiguous(memory_format=evaluator.FORMATS[layout])


@pytest.mark.parametrize("alone", [True, False])
def test_a_layout_that_fails_gives_way_to_the_default(monkeypatch, capsys, alone):
    laid_out(monkeypatch, CHANNELS_LAST, BATCH)
    net, loader = viewing()
    measured = Evaluator(net, loader, CRITERION)
    for name, part in alone_on_grid(net, 2).items():
        quantized = Quantized({name: part})
        wanted = outcome(with_quantized(net, quantized), loader, CRITERION)
        assert_alike(measured.alone([(name, part)])[0] if alone else measured.outcome(quantized),
                     wanted)  # fmt: skip
    assert (measured.layout, measured.batch) == (CONTIGUOUS, evaluator.BATCHES[0])
    text = said(capsys)
    assert text.startswith("channels_last, batches of 16 failed (view size is not compatible")
    assert text.endswith("going on with contiguous, batches of 64")
    assert text.count("going on") == 1


def up_to(most, error):
    """A hook that raises for batches of more examples."""

    def check(_, inputs):
        if len(inputs[0]) > most:
            raise error

    return check


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError("no more"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_batches_are_halved_where_memory_runs_out(monkeypatch, capsys, error, alone, layout):
    laid_out(monkeypatch, layout, 64)
    net, loader = case("three channels")
    (name, part), *_ = alone_on_grid(net, 2).items()
    wanted = outcome(with_quantized(net, Quantized({name: part})), loader, CRITERION)
    net[0].register_forward_pre_hook(up_to(20, error))
    measured = Evaluator(net, loader, CRITERION)
    for _ in range(2):
        found = measured.alone([(name, part)])[0] if alone else measured.outcome(Quantized({name: part}))
        assert_alike(found, wanted)
    assert (measured.layout, measured.batch, measured.repeatable) == (layout, 16, True)
    steps = [f"Out of memory: going on with batches of {size}" for size in (32, 16)]
    assert said(capsys) == " ".join(steps)


@pytest.mark.parametrize("layout", [(CONTIGUOUS, 64), (CHANNELS_LAST, 64), (CONTIGUOUS, 16)])
def test_another_error_is_raised_as_it_is(monkeypatch, capsys, layout):
    laid_out(monkeypatch, *layout)
    net, loader = case("three channels")
    error = RuntimeError("its own")
    net[0].register_forward_pre_hook(up_to(0, error))
    measured = Evaluator(net, loader, CRITERION)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            measured.outcome()
        assert caught.value is error
    assert not said(capsys)


def test_memory_that_one_example_needs_is_not_there(monkeypatch):
    laid_out(monkeypatch, CHANNELS_LAST, 16)
    net, loader = case("three channels")
    error = torch.OutOfMemoryError("CUDA out of memory")
    net[0].register_forward_pre_hook(up_to(0, error))
    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(net, loader, CRITERION).outcome()


def test_an_interrupted_measurement_leaves_nothing_behind(monkeypatch):
    net, loader = case("dense")
    parts = alone_on_grid(net, 2)
    measured = Evaluator(net, loader, CRITERION)
    for act in (
        lambda: measured.outcome(Quantized(parts | {"unknown": parts["0.weight"]})),
        lambda: measured.outcome(Quantized(parts | {"0.bias": parts["0.weight"]})),
        lambda: measured.alone([("0.weight", parts["0.weight"]), ("3.bias", parts["0.weight"])]),
    ):
        with suppress(KeyError, RuntimeError):
            act()
        assert_alike(measured.outcome(), outcome(net, loader, CRITERION))
