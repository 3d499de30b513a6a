"""What candidates lose beside a plain evaluation; nothing is measured twice, nothing is changed."""

import copy
import functools
import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import count_measured
from hypothesis import given
from test_strategy import intact
from torch import nn

from quantifind.metrics import columns_of as columns_in
from quantifind.metrics import compared, outcome
from quantifind.mixed_precision import measurements as measuring
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import layouts
from quantifind.strategy import Strategy, uniform_activations, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.loaders import Tensors, batch_loader, create_dataloaders

CRITERION = nn.CrossEntropyLoss()


class Counted(nn.Module):
    """Counts the examples that it, or a copy of it, is given."""

    seen = 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        Counted.seen += len(x)
        return self.inner(x)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr(layouts, "CPU_BATCH", 16)


def network():
    torch.manual_seed(0)
    # what comes after a ReLU is not folded
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)]
    net = nn.Sequential(*layers)
    for tensor in (net[2].weight.data, net[2].bias.data, net[2].running_mean):
        tensor += torch.randn(8) * 0.1
    return Counted(net)


def splits(examples=500, *, classes=True):
    x = torch.randn(examples, 6, generator=torch.Generator().manual_seed(1))
    data = Tensors(x, x[:, :3].argmax(1) if classes else x[:, :3].tanh())
    return create_dataloaders(data, batch_size=32)[:2]


def measurements_of(net, **options):
    train, val = splits()
    return Measurements.start(net, train, val, CRITERION, **options)


def at(net, bits, **options):
    return quantize(net, uniform_strategy(net, bits, **options))


def examples_in_order(val, seed):
    inputs, targets = val.dataset.tensors
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    return inputs[order], targets[order]


def columns_of(quantized, original):
    return columns_in(compared(quantized, original))


def assert_columns(found, wanted):
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        narrow = name == "scaled_loss" and column.shape[1] > 3
        assert found[name].dtype == (np.float32 if narrow else column.dtype)
        # the last digits depend on the size of a batch
        np.testing.assert_allclose(found[name], column, rtol=1e-4, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("seed", [0, 3])
def test_columns_are_those_of_a_plain_evaluation_in_a_seeded_order(classes, seed):
    net, (train, val) = network(), splits(classes=classes)
    criterion = CRITERION if classes else nn.MSELoss()
    measured = Measurements.start(net, train, val, criterion, seed=seed)
    whole = [examples_in_order(val, seed)]
    original = outcome(net, whole, criterion).calibrated()
    assert measured.examples == len(val.dataset)
    for bits in (2, 4):
        quantized = at(net, bits, axis=0)
        wanted = columns_of(outcome(quantize_model(net, quantized), whole, criterion), original)
        assert_columns(measured.columns(f"{bits} bits", quantized), wanted)
        first = {name: column[:10] for name, column in wanted.items()}
        assert_columns(measured.columns(f"{bits} bits", quantized, 10), first)
        few = Measurements.start(net, train, val, criterion, seed=seed).columns(
            "few", quantized, 10
        )
        assert_columns(few, first)
    assert len(measured.columns("many", quantized, 10**6)["loss"]) == measured.examples


@pytest.mark.parametrize("in_a_folder", [True, False])
def test_steps_give_what_one_measurement_does_and_nothing_is_measured_twice(tmp_path, in_a_folder):
    net = network()
    folder = tmp_path if in_a_folder else None
    measured, quantized = measurements_of(net, folder=folder), at(net, 3)
    wanted = measurements_of(net).columns("whole", quantized)

    def forwards(examples):
        before = Counted.seen
        columns = measured.columns("steps", quantized, examples)
        return columns, Counted.seen - before

    for examples, fresh in ((10, 10), (10, 0), (5, 0), (30, 20), (None, 20), (None, 0), (12, 0)):
        columns, seen = forwards(examples)
        assert seen == fresh
        assert_columns(columns, {n: c[: examples or len(c)] for n, c in wanted.items()})
    if in_a_folder:
        measured = measurements_of(net, folder=tmp_path)
        columns, seen = forwards(None)
        assert seen == 0
        assert_columns(columns, wanted)


def each_alone(net):
    """Candidates of one tensor each, of several, and of none, in turn."""
    coarse, fine = at(net, 2).tensors, at(net, 3).tensors
    alone = {f"{n} {i}": Quantized({n: p[n]}) for i, p in enumerate((coarse, fine)) for n in p}
    return {"fine": Quantized(fine), "none": Quantized({})} | alone | {"coarse": Quantized(coarse)}


def test_many_are_measured_as_each_is():
    net = network()
    candidates, measured, alone = each_alone(net), measurements_of(net), measurements_of(net)
    for key in [*candidates][::3]:
        measured.columns(key, candidates[key], 20)
    for examples in (10, 35, None):
        found = measured.all_columns(candidates, examples)
        assert list(found) == list(candidates)
        for key, columns in found.items():
            assert_columns(columns, alone.columns(f"{key} {examples}", candidates[key], examples))
    before = Counted.seen
    measured.all_columns(candidates)
    assert Counted.seen == before


@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_what_was_measured_before_a_kill_is_kept(tmp_path, monkeypatch, killed_at):
    net = network()
    candidates = each_alone(net)
    with monkeypatch.context() as patch:
        seen = count_measured(patch, killed_at)
        with pytest.raises(KeyboardInterrupt):
            measurements_of(net, folder=tmp_path).all_columns(candidates)
    resumed = measurements_of(net, folder=tmp_path)
    kept = [key for key in candidates if resumed.store.get(key) is not None]
    assert len(kept) == len(seen) >= killed_at
    found, wanted = (m.all_columns(candidates) for m in (resumed, measurements_of(net)))
    for key, columns in wanted.items():
        assert_columns(found[key], columns)


def test_a_folder_is_shared_by_what_is_alike_alone(tmp_path):
    net, (train, val) = network(), splits()
    other = copy.deepcopy(net)
    other.inner[2].running_mean[0] += 1
    less = batch_loader(Tensors(*(t[:-1] for t in val.dataset.tensors)), **ORDERED)
    relabelled = Tensors(val.dataset.tensors[0], val.dataset.tensors[1].flip(0))

    def folder(net=net, train=train, val=val, criterion=CRITERION, **options):
        return Measurements.start(
            net, train, val, criterion, folder=tmp_path, **options
        ).store.folder

    assert folder() == folder() == folder(net=copy.deepcopy(net))
    assert folder() == folder(criterion=nn.functional.cross_entropy)  # has the same losses
    different = [
        folder(),
        folder(net=other),
        folder(val=less),
        folder(val=batch_loader(relabelled, **ORDERED)),
        folder(train=less),
        folder(criterion=nn.MultiMarginLoss()),
        folder(seed=1),
    ]
    assert len(set(different)) == len(different)
    assert {path.parent for path in different} == {tmp_path}


ORDERED = {"batch_size": 32, "shuffle": False, "seed": 0}


def smoothed(smoothing, outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)


class Smoothed:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, outputs, targets):
        return smoothed(self.smoothing, outputs, targets)


CRITERIA = {
    "smoothing": [nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.2)],
    "weights": [nn.CrossEntropyLoss(w) for w in (None, torch.tensor([1.0, 2.0, 3.0]))],
    "margin": [nn.MultiMarginLoss(margin=m) for m in (1.0, 2.0)],
    "lambda": [lambda o, t: smoothed(0.0, o, t), lambda o, t: smoothed(0.2, o, t)],
    "partial": [functools.partial(smoothed, s) for s in (0.0, 0.2)],
    "object": [Smoothed(0.0), Smoothed(0.2)],
}


@pytest.mark.parametrize("kind", CRITERIA)
def test_criteria_with_other_settings_do_not_share_what_they_measured(tmp_path, kind):
    net, (train, val) = network(), splits()
    first, second = CRITERIA[kind]
    quantized = at(net, 2)
    Measurements.start(net, train, val, first, folder=tmp_path).columns("2 bits", quantized)
    shared = Measurements.start(net, train, val, second, folder=tmp_path).columns(
        "2 bits", quantized
    )
    assert_columns(shared, Measurements.start(net, train, val, second).columns("2 bits", quantized))


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divergences_that_were_others_are_measured_anew(tmp_path, monkeypatch, kind, reduction):
    """What was kept of any other criterion is found where it was."""
    x = torch.randn(40, 3)
    data, net = [(x, (x[:, :2] > 0).float())], nn.Linear(3, 2)
    folders = []
    for words in (measuring.BY_SHARES, ""):
        monkeypatch.setattr(measuring, "BY_SHARES", words)
        made = Measurements.start(net, data, data, kind(reduction=reduction), folder=tmp_path)
        folders.append(made.store.folder)
    changed = reduction == "sum" or kind is nn.MultiLabelSoftMarginLoss
    assert (folders[0] != folders[1]) == changed


def test_divergences_of_positions_are_measured_anew(tmp_path, monkeypatch):
    """By a criterion of one's own, which were the mean over positions."""
    x = torch.randn(40, 5, 3)
    data, net = [(x, (x[..., 0] > 0).long())], nn.Linear(3, 2)

    def own(outputs, labels):
        return nn.functional.cross_entropy(outputs.transpose(1, 2), labels)

    folders = set()
    for words in (measuring.BY_SHARES, ""):
        monkeypatch.setattr(measuring, "BY_SHARES", words)
        folders.add(Measurements.start(net, data, data, own, folder=tmp_path).store.folder)
    assert len(folders) == 2


@pytest.mark.parametrize("place", [3, 150, 299])
def test_a_label_that_is_rare_has_a_say_in_the_folder(tmp_path, place):
    """Two criteria that differ for one example alone, wherever it is."""
    net, (train, val) = network(), splits()
    inputs, labels = val.dataset.tensors
    labels = torch.where(torch.arange(len(labels)) == place % len(labels), 2, labels % 2)
    rare = [(inputs, labels)]
    folders = set()
    for weight in (1.0, 3.0):
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, weight]))
        measured = Measurements.start(net, train, rare, criterion, folder=tmp_path)
        folders.add(measured.store.folder)
    assert len(folders) == 2


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_left_as_it_was(train):
    net = network().train(train)
    net.inner[3].eval()

    def measure():
        measured = measurements_of(net)
        strategy = Strategy(
            uniform_strategy(net, 2).tensors, uniform_activations(net, measured.calibration, 3)
        )
        measured.columns("a", at(net, 2))
        measured.columns("b", quantize(net, strategy, measured.calibration))

    intact(net, measure)


@pytest.mark.parametrize("bits", [2, 8])
def test_activations(bits):
    net, (train, val) = network(), splits()
    measured = Measurements.start(net, train, val, CRITERION)
    levels = uniform_activations(net, measured.calibration, bits)
    for tensors in (
        uniform_strategy(net, 4).tensors,
        dict.fromkeys(uniform_strategy(net, 4).tensors),
    ):
        quantized = quantize(net, Strategy(tensors, levels), measured.calibration)
        whole = [examples_in_order(val, 0)]
        rounded = outcome(quantize_model(net, quantized), whole, CRITERION)
        wanted = columns_of(rounded, outcome(net, whole, CRITERION).calibrated())
        assert_columns(measured.columns(str(len(quantized.tensors)), quantized), wanted)
        assert wanted["squared_error"].sum() > 0


def test_what_stays_in_float_has_its_values_back():
    """Whatever was measured before: parameters, buffers and tied tensors."""
    net = network()
    net.inner[4].register_buffer("idle", torch.ones(3))
    net.inner.append(nn.Linear(3, 3))
    net.inner.append(nn.Linear(3, 3))
    net.inner[6].weight = net.inner[5].weight
    whole, coarse = at(net, 2).tensors, {"scheme": "uniform", "bits": 1}
    choices = dict.fromkeys(uniform_strategy(net, 4).tensors)
    buffers = quantize(net, Strategy(choices | {"inner.2.running_mean": coarse})).tensors
    candidates = [
        *({name: tensor} for name, tensor in (whole | buffers).items()),
        whole | buffers,
        {},
        buffers,
        {},
    ]
    measured = measurements_of(net)
    for number, tensors in enumerate(candidates):
        quantized = Quantized(tensors)
        wanted = measurements_of(net).columns("alone", quantized)
        assert_columns(measured.columns(str(number), quantized), wanted)
        assert (wanted["squared_error"].sum() == 0) == (not tensors)


def test_the_order_is_of_the_seed_alone():
    net = network()
    first, same, other = (measurements_of(net, seed=seed) for seed in (1, 1, 2))
    torch.rand(3)
    inputs, again, others = (
        torch.cat([batch.data[0] for batch in m.evaluator.batches()]) for m in (first, same, other)
    )
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, others)
    assert torch.equal(inputs.sort(0)[0], others.sort(0)[0])
    targets, again = (
        torch.cat([batch.data[1] for batch in m.evaluator.batches()]) for m in (first, same)
    )
    assert torch.equal(targets, again)
    for one, another in zip(first.calibration, same.calibration, strict=True):
        assert torch.equal(one.data[0], another.data[0])


def refused(message, *, net=None, val=None, criterion=CRITERION):
    train, own = splits()
    with pytest.raises(ValueError, match=message) as caught:
        Measurements.start(net or network(), train, own if val is None else val, criterion)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("label", [3, -1, 7])
def test_labels_out_of_range(label):
    _, val = splits()
    inputs, targets = val.dataset.tensors
    targets = targets.clone()
    targets[5] = label
    message = f"1 labels are out of range, such as {label}: .* outputs for 0 to 2"
    refused(message, val=[(inputs, targets)])


def test_labels_of_several_positions_out_of_range():
    x, y = torch.randn(20, 2, 5), torch.randint(3, (20, 5))
    y[3, 2] = 7
    train = batch_loader(Tensors(x, y), **ORDERED)
    with pytest.raises(ValueError, match="1 labels are out of range, such as 7"):
        Measurements.start(nn.Conv1d(2, 3, 1), train, [(x, y)], CRITERION)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda outputs: outputs.mean(),
        lambda outputs, targets: 1.0,
        lambda outputs, targets: outputs @ targets,
    ],
)
def test_criteria_without_a_loss_per_example(criterion):
    net, (train, val) = network(), splits(classes=False)
    message = r"the criterion <lambda> does not take what it is given, of shapes .*; forward="
    with pytest.raises(ValueError, match=message):
        Measurements.start(net, train, val, criterion)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_float_loss_without_a_ratio(loss):
    def criterion(outputs, targets):
        return torch.where(outputs.sum().isnan(), outputs.sum(), loss)

    message = f"float network's loss on validation data is {loss}: a finite one is needed"
    refused(message, criterion=criterion)


def test_no_examples():
    refused("validation data: the loader has no examples", val=[])
    inputs, targets = splits()[1].dataset.tensors
    refused("no examples", val=[(inputs[:0], targets[:0])])
    _, val = splits()
    empty = batch_loader(Tensors(inputs[:0], targets[:0]), **ORDERED)
    with pytest.raises(ValueError, match="no examples"):
        Measurements.start(network(), empty, val, CRITERION)


def test_inputs_of_different_shapes():
    y = torch.zeros(2, dtype=torch.int64)
    val = [(torch.randn(2, 6), y), (torch.randn(2, 5, 6), y)]
    refused(r"float network on validation data: ", val=val)
    refused(r"does not take a batch of \[2, 5\], \[2\]", val=[(torch.randn(2, 5), y)])


def test_a_loader_of_any_kind_of_batches():
    net, (train, val) = network(), splits()
    pairs = [tuple(batch) for batch in val]
    wanted = Measurements.start(net, train, val, CRITERION).columns("a", at(net, 2))
    named = [{"inputs": inputs, "labels": labels} for inputs, labels in pairs]
    for batches in (pairs, iter(pairs), named):
        assert_columns(
            Measurements.start(net, train, batches, CRITERION).columns("a", at(net, 2)), wanted
        )


def test_a_folder_is_the_same_in_any_layout(monkeypatch, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 3)]
    x = torch.randn(900, 2, 8, 8)
    train, val, _ = create_dataloaders(Tensors(x, x[:, 0, 0, :3].argmax(1)), batch_size=32)
    folders = set()
    for found in itertools.product(layouts.FORMATS, (32, 512)):
        monkeypatch.setattr(
            "quantifind.runtime.evaluator.layout_and_batch", lambda *_, found=found: found
        )
        net, criterion = nn.Sequential(*layers), nn.CrossEntropyLoss()
        folders.add(Measurements.start(net, train, val, criterion, folder=tmp_path).store.folder)
    assert len(folders) == 1


@given(
    first=st.integers(0, 20),
    more=st.integers(1, 30),
    batch=st.integers(1, 9),
    shares=st.integers(1, 6),
    pace=st.sampled_from([0.001, 1.0]),
)
def test_spans_are_of_whole_batches(measurements, first, more, batch, shares, pace):
    measured = measurements
    measured.evaluator.batch, measured.pace = batch, pace
    spans = measured._spans(first, first + more, shares, 3)
    whole = measured.evaluator.batches(first, first + more)
    split = [part for span in spans for part in measured.evaluator.batches(*span)]
    assert list(map(len, whole)) == list(map(len, split))
    assert len(spans) <= shares
    assert len(spans) <= max(1, 3 * pace * more / measuring.BRIEF + 1e-9)
    assert spans[0][0] == first
    assert spans[-1][1] == first + more


@pytest.fixture(scope="module")
def measurements():
    return Measurements.start(network(), *splits(), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("name", "value"),
    [("0.weight", math.nan), ("0.weight", math.inf), ("1.running_var", math.nan)],
)
def test_what_is_not_finite_in_a_network_is_named(name, value):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        net.state_dict()[name].flatten()[0] = value
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    with pytest.raises(ValueError, match=rf"{name}: 1 of \d+ values are NaN or infinite"):
        Measurements.start(net, data, data, nn.CrossEntropyLoss())
