"""Batches, outputs and criteria as people have them, judged as a plain loop judges them."""

import copy
import functools
import math
from collections import UserDict
from collections.abc import MutableMapping
from dataclasses import InitVar, dataclass, field, replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from quantifind import certify, evaluate_strategies, find_strategy, quantize_model, uniform_strategy
from quantifind.learning import learn
from quantifind.metrics import outcome
from quantifind.mixed_precision.proxies import hessian_traces
from quantifind.quantize import quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.utils.batches import batches_of, kept
from quantifind.utils.forwards import BatchError, DefaultForward
from quantifind.workflow.evaluation_workflow import compute_test_loss, evaluate_bit_depths

X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3] + 0.3 * X[:, 3:6]).argmax(1)
CROSS_ENTROPY = nn.CrossEntropyLoss()


def pairs(*tensors, size=32):
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


class Two(nn.Linear):
    """Of two inputs; the second may be left out."""

    def __init__(self, give=lambda outputs: outputs):
        super().__init__(8, 3)
        self.give = give

    def forward(self, first, second=None, *, scale=1.0):
        whole = first if second is None else torch.cat([first, second], 1)
        return self.give(super().forward(whole) * scale)


class Both(Two):
    def forward(self, first, second):
        return super().forward(first, second)


@dataclass
class Example:
    first: Tensor
    second: Tensor
    labels: Tensor


class Words(dict):
    """As a tokenizer gives them: a mapping of another kind."""


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


HALVES = X[:, :4], X[:, 4:]
BATCHES = {
    "two inputs": (Two, pairs(*HALVES, Y)),
    "a pair of inputs": (Two, [((a, b), y) for a, b, y in pairs(*HALVES, Y)]),
    "names": (Two, [{"first": a, "second": b, "labels": y} for a, b, y in pairs(*HALVES, Y)]),
    "other targets": (Two, [{"first": a, "second": b, "y": y} for a, b, y in pairs(*HALVES, Y)]),
    "names of inputs": (Two, [({"first": a, "second": b}, y) for a, b, y in pairs(*HALVES, Y)]),
    "dataclass": (Two, [Example(*parts) for parts in pairs(*HALVES, Y)]),
    "mapping": (Two, [Words(first=a, second=b, target=y) for a, b, y in pairs(*HALVES, Y)]),
    "one input by name": (Two, [{"anything": x, "label": y} for x, y in pairs(X, Y)]),
    "uneven": (Two, [*pairs(X[:95], Y[:95], size=19), (X[95:], Y[95:])]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_of_any_kind_are_judged_as_a_plain_loop_does(case):
    torch.manual_seed(0)
    make, batches = BATCHES[case]
    net, plain = make(), Two()
    plain.load_state_dict(net.state_dict())
    for bits in (2, 8):
        strategy = uniform_strategy(net, bits)
        (row,) = evaluate_strategies(net, [strategy], batches, CROSS_ENTROPY).to_dict("records")
        wanted = CROSS_ENTROPY(quantize_model(plain, strategy)(X), Y).item()
        assert row["criterion"] == pytest.approx(wanted, rel=1e-5)
        right = (quantize_model(plain, strategy)(X).argmax(1) == Y).double().mean().item()
        assert row["accuracy"] == pytest.approx(right)
    found = find_strategy(net, batches, batches, CROSS_ENTROPY, limit=2.0, widths=[4, 8])
    wanted = CROSS_ENTROPY(quantize_model(plain, found.quantized)(X), Y) / CROSS_ENTROPY(
        plain(X), Y
    )
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert learn(net, uniform_strategy(net, 2), batches, epochs=1).tensors.keys() == {
        "weight",
        "bias",
    }


@pytest.mark.parametrize(
    ("net", "data", "message"),
    [
        (nn.Linear(8, 3), (X, Y, Y), r"3 parts, .* takes 1: .*forward=lambda"),
        (nn.Linear(8, 3), {"a": X, "b": X, "labels": Y}, r"a batch has a, b, .* takes input: "),
        (nn.Linear(8, 3), {"x": X, "labels": Y, "target": Y}, r"a batch has x, labels, target: "),
        (nn.Linear(8, 3), "text", r"a batch is a str: .*forward=lambda"),
        (Two(), (X, Y, Y, Y), r"4 parts, .* takes 1 to 2: "),
    ],
)
def test_what_the_parts_of_a_batch_are_is_asked(net, data, message):
    for call in (
        lambda: find_strategy(net, [data], [data], CROSS_ENTROPY, limit=1.5),
        lambda: evaluate_bit_depths(net, [data], CROSS_ENTROPY, [4]),
        lambda: learn(net, uniform_strategy(net, 2), [data], epochs=1),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(BatchError):
        DefaultForward(net)(net, data)


def test_inputs_without_targets():
    takes_two = DefaultForward(Both())
    assert [len(part) for part in takes_two.split(HALVES)] == [2, 0, 0]
    assert [len(part) for part in takes_two.split((HALVES, Y))] == [2, 0, 1]
    takes_one = DefaultForward(nn.Linear(8, 3))
    assert [len(part) for part in takes_one.split(X)] == [1, 0, 0]
    assert [len(part) for part in takes_one.split([X])] == [1, 0, 0]


OUTPUTS = {
    "dict": lambda outputs: {"logits": outputs, "hidden": outputs},
    "object": lambda outputs: Output(outputs, outputs),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_torchs_criteria_get_the_logits(case):
    torch.manual_seed(0)
    net = Two(OUTPUTS[case])
    loss = CROSS_ENTROPY(nn.Linear.forward(net, X), Y).item()
    assert compute_test_loss(net, pairs(X, Y), CROSS_ENTROPY) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("give", [lambda o: (o, o.exp()), lambda o: {"a": o, "b": o.exp()}])
def test_a_criterion_of_ones_own_gets_the_outputs_as_they_are(give):
    torch.manual_seed(0)
    net = Two(give)

    def criterion(outputs, labels):
        first, *_ = outputs if isinstance(outputs, tuple) else outputs.values()
        return F.cross_entropy(first, labels)

    found = find_strategy(net, pairs(X, Y), pairs(X, Y), criterion, limit=2.0, widths=[4, 8])
    put = quantize_model(net, found.quantized)
    with torch.no_grad():
        wanted = (criterion(put(X), Y) / criterion(net(X), Y)).item()
        apart = torch.cat([*_parts(put(X))], 1) - torch.cat([*_parts(net(X))], 1)
        error = apart.norm() / torch.cat([*_parts(net(X))], 1).norm()
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    assert found.chosen["relative_error"] == pytest.approx(error.item(), rel=1e-4)
    with pytest.raises(ValueError, match="does not take what it is given"):
        find_strategy(net, pairs(X, Y), pairs(X, Y), CROSS_ENTROPY, limit=2.0)


def _parts(made):
    return made if isinstance(made, tuple) else made.values()


def test_an_error_in_a_forward_of_ones_own_is_the_cause():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("a mistake of mine")

    with pytest.raises(
        ValueError, match=r"does not take a batch of .* a mistake of mine"
    ) as caught:
        find_strategy(Broken(8, 3), pairs(X, Y), pairs(X, Y), CROSS_ENTROPY, limit=1.5)
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any(type(cause) is RuntimeError for cause in causes)


def test_ignored_labels_are_not_judged():
    torch.manual_seed(0)
    net, labels = nn.Linear(8, 3), Y.clone()
    labels[::4] = -100
    kept_ones = labels != -100
    for criterion in (CROSS_ENTROPY, F.cross_entropy, nn.CrossEntropyLoss(torch.rand(3) + 0.1)):
        row = evaluate_bit_depths(net, pairs(X, labels, size=96), criterion, [4]).iloc[0]
        with torch.no_grad():
            assert row["original_criterion"] == pytest.approx(
                criterion(net(X), labels).item(), rel=1e-5
            )
        right = (net(X).argmax(1) == labels)[kept_ones].double().mean().item()
        assert row["original_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_positions_are_judged_as_torch_does(turned, ignored):
    """Outputs (examples, positions, classes), or with the classes second."""
    torch.manual_seed(0)
    x, labels = torch.randn(40, 5, 8), torch.randint(3, (40, 5))
    if ignored:
        labels[:, 3:] = labels[7] = -100

    class Last(nn.Linear):
        def forward(self, x):
            return super().forward(x).movedim(-1, 1) if turned else super().forward(x)

    net = Last(8, 3)
    strategy = uniform_strategy(net, 3)
    batches = pairs(x, labels, size=40)
    (row,) = evaluate_strategies(net, [strategy], batches, CROSS_ENTROPY).to_dict("records")
    losses = []
    for one in (quantize_model(net, strategy), net):
        outputs = one(x) if turned else one(x).movedim(-1, 1)
        losses.append(CROSS_ENTROPY(outputs, labels).item())
    assert row["criterion"] == pytest.approx(losses[0], rel=1e-5)
    assert row["criterion_ratio"] == pytest.approx(losses[0] / losses[1], rel=1e-5)
    assert "accuracy" not in row
    learn(net, strategy, batches, epochs=1)


def test_classes_in_doubt_are_none():
    """A criterion of one's own, and as many positions as classes."""
    x, labels = torch.randn(6, 3, 8), torch.randint(3, (6, 3))

    def criterion(outputs, labels):
        return F.cross_entropy(outputs.reshape(-1, 3), labels.reshape(-1))

    net = nn.Linear(8, 3)
    assert outcome(net, [(x, labels)], criterion).classes is None


@pytest.mark.parametrize("shape", [(96,), (96, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_one_logit_has_two_classes(shape, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 1), nn.Unflatten(1, (1,)) if len(shape) > 1 else nn.Flatten(0))
    labels = (X[:, 0] > 0).to(dtype)
    measured = outcome(net, pairs(X, labels), nn.BCEWithLogitsLoss())
    with torch.no_grad():
        logits = net(X).flatten()
    wanted = F.binary_cross_entropy_with_logits(logits, labels.float()).item()
    assert measured.criterion == pytest.approx(wanted, rel=1e-5)
    assert measured["correct"].tolist() == ((logits > 0) == (X[:, 0] > 0)).tolist()
    assert measured.classes == "sigmoid"


def test_several_labels_at_once_have_no_accuracy():
    net, labels = nn.Linear(8, 3), (X[:, :3] > 0).float()
    measured = outcome(net, pairs(X, labels), nn.BCEWithLogitsLoss())
    assert "correct" not in measured
    found = find_strategy(
        net, pairs(X, labels), pairs(X, labels), nn.BCEWithLogitsLoss(), limit=2.0, widths=[4, 8]
    )
    assert found.loss <= 2


def test_a_criterion_of_a_whole_batch_is_said_to_be():
    def contrast(outputs, _):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    def root(outputs, labels):
        return F.mse_loss(outputs, F.one_hot(labels, 3).float()).sqrt()

    for criterion in (contrast, root):
        message = rf"{criterion.__name__} is .* for a batch, .* whole batch only; one that gives"
        with pytest.raises(ValueError, match=message):
            find_strategy(nn.Linear(8, 3), pairs(X, Y), pairs(X, Y), criterion, limit=1.5)
    net = nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"of one shape, not \[32, 1\] and \[32\]"):
        evaluate_bit_depths(net, pairs(X, X[:, 0]), nn.MSELoss(), [4])


@pytest.mark.parametrize("size", [12, 32])
def test_losses_that_depend_on_the_rest_of_a_batch(size):
    """Are judged in the batches that they come in, as a plain loop does."""
    torch.manual_seed(0)
    net = nn.Linear(8, 4)

    def contrast(outputs, _):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")

    batches = pairs(X, Y, size=size)
    wanted = torch.cat([contrast(net(x), y) for x, y in batches]).mean().item()
    assert compute_test_loss(net, batches, contrast) == pytest.approx(wanted, rel=1e-5)
    found = find_strategy(net, batches, batches, contrast, limit=3.0, widths=[8], effort=30)
    small = quantize_model(net, found.quantized)
    lost = torch.cat([contrast(small(x), y) for x, y in batches]).mean().item()
    assert found.loss == pytest.approx(lost / wanted, rel=1e-4)


SHAPES = [nn.MSELoss, nn.PoissonNLLLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss]


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_that_torch_would_broadcast(kind):
    with pytest.raises(ValueError, match=r"of one shape, not \[32, 1\] and \[32\]"):
        compute_test_loss(nn.Linear(8, 1), pairs(X, X[:, 0].abs()), kind())


class OfParts(nn.Module):
    """Whose text has several lines."""

    def __init__(self):
        super().__init__()
        self.root, self.inner = True, nn.MSELoss()

    def forward(self, outputs, targets):
        return self.inner(outputs, targets).sqrt()


def test_a_criterion_is_named_in_one_line():
    def by_weight(outputs, targets, weight):
        return F.cross_entropy(outputs, targets, weight=weight)

    weighted = functools.partial(by_weight, weight=torch.rand(40))
    for criterion, targets, count in ((OfParts(), torch.randn(96, 40), 40), (weighted, Y, 40)):
        with pytest.raises(ValueError, match="it exists for a whole batch only") as error:
            compute_test_loss(nn.Linear(8, count), pairs(X, targets), criterion)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_a_search_gives_a_criterion_of_ones_own_the_outputs_as_they_are():
    """Of training data, too: not their logits."""

    def loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels)

    torch.manual_seed(0)
    net, batches = Two(lambda outputs: {"logits": outputs}), pairs(X, Y)
    how = {"limit": 3.0, "widths": [8], "effort": 30}
    assert find_strategy(net, batches, batches, loss, **how).loss < 3


class Waves(nn.Module):
    """Of a weight that is no real number."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last((torch.fft.rfft(x) @ self.waves).abs())


def test_what_is_not_quantized_is_said(capsys):
    torch.manual_seed(0)
    batches = pairs(X, Y)
    how = {"limit": 3.0, "widths": [8], "effort": 30}
    found = find_strategy(Waves(), batches, batches, CROSS_ENTROPY, **how)
    assert "Not quantized, since no dense floats of 16 bits or more: waves (complex64)" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert found.strategy.tensors.keys() - {"waves"} == {"last.weight", "last.bias"}
    find_strategy(nn.Linear(8, 3), batches, batches, CROSS_ENTROPY, **how)
    assert "Not quantized" not in capsys.readouterr().err


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


def test_a_last_batch_of_one_that_is_squeezed():
    """Counts as one example; of several classes it is refused in a line."""
    torch.manual_seed(0)
    net, batches = Squeezed(8, 1), pairs(X[:33], X[:33, 0])
    wanted = nn.MSELoss()(nn.Linear.forward(net, X[:33])[:, 0], X[:33, 0]).item()
    assert compute_test_loss(net, batches, nn.MSELoss()) == pytest.approx(wanted, rel=1e-5)
    table = evaluate_bit_depths(net, batches, nn.MSELoss(), [8])
    assert table["original_criterion"].item() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="a pass, or its criterion, fails: "):
        evaluate_bit_depths(Squeezed(8, 3), pairs(X[:33], Y[:33]), CROSS_ENTROPY, [8])
    with pytest.raises(ValueError, match="a row for each example are needed"):
        find_strategy(Squeezed(8, 1), pairs(X[:1]), pairs(X[:1]))


@pytest.mark.parametrize("target", [1, torch.tensor(1)])
def test_a_data_set_is_no_loader(target):
    examples = [(x, target) for x in X]
    with pytest.raises(ValueError, match="is it a data set"):
        find_strategy(nn.Linear(8, 3), examples, examples, CROSS_ENTROPY)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.before = nn.Linear(8, 3), 0.0

    def forward(self, x):
        self.before = 0.5 * self.before + self.layer(x).mean().item()
        return self.layer(x) + self.before


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return F.dropout(self.layer(x))  # whether training or not


@pytest.mark.parametrize("kind", [Remembers, Draws])
def test_outputs_that_are_others_each_time_are_refused(kind):
    """Seeded, they are the same, and judged as a plain loop does."""
    message = "other outputs where the same batch comes again: .*seed or reset it in forward="
    torch.manual_seed(0)
    net, batches = kind(), pairs(X, Y)
    for call in (
        lambda: find_strategy(net, batches, batches, CROSS_ENTROPY, limit=2.0),
        lambda: evaluate_bit_depths(net, batches, CROSS_ENTROPY, [4]),
    ):
        with pytest.raises(ValueError, match=message):
            call()

    def afresh(model, batch):
        torch.manual_seed(1)
        model.before = 0.0
        return model(batch[0]), batch[1]

    wanted = sum(CROSS_ENTROPY(*afresh(net.eval(), one)).item() * len(one[1]) for one in batches)
    found = compute_test_loss(net, batches, CROSS_ENTROPY, forward=afresh)
    assert found == pytest.approx(wanted / len(X), rel=1e-5)


def test_a_criterion_may_give_a_loss_for_each_example():
    torch.manual_seed(0)
    net, one_each = nn.Linear(8, 3), nn.CrossEntropyLoss(reduction="none")
    assert compute_test_loss(net, pairs(X, Y), one_each) == pytest.approx(
        CROSS_ENTROPY(net(X), Y).item(), rel=1e-5
    )


def test_ctc_by_forward():
    torch.manual_seed(0)
    x, labels = torch.randn(24, 12, 8), torch.randint(1, 5, (24, 3))
    net = nn.Sequential(nn.Linear(8, 5), nn.LogSoftmax(-1))

    def forward(net, batch):
        inputs, labels = batch
        lengths = torch.full((len(inputs),), 12), torch.randint(2, 4, (len(inputs),))
        return net(inputs).transpose(0, 1), labels, *lengths

    def fixed(net, batch):
        outputs, labels, times, _ = forward(net, batch)
        return outputs, labels, times, 2 + labels[:, 0] % 2

    criterion = nn.CTCLoss()
    measured = compute_test_loss(net, pairs(x, labels, size=24), criterion, forward=fixed)
    assert measured == pytest.approx(criterion(*fixed(net, (x, labels))).item(), rel=1e-5)
    given = batches_of(pairs(x, labels, size=24), net, criterion, fixed)
    traces = hessian_traces(net, criterion, given, draws=1)
    assert all(math.isnan(trace) for trace in traces.values())


def test_what_has_no_second_derivative_is_missing():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            context.save_for_backward(values)
            return values.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context, gradient):
            return gradient * (1 - context.saved_tensors[0].tanh().square())

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(Once.apply(self.body(x)))

    torch.manual_seed(0)
    traces = hessian_traces(Gated(), CROSS_ENTROPY, pairs(X, Y), draws=2)
    assert {name: math.isnan(trace) for name, trace in traces.items()} == {
        "body.weight": True,
        "body.bias": True,
        "head.weight": False,
        "head.bias": False,
    }


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


class Reusing:
    """Each batch in the same memory."""

    def __iter__(self):
        inputs, labels = torch.empty(32, 8), torch.empty(32, dtype=torch.int64)
        for x, y in pairs(X, Y):
            yield inputs.copy_(x), labels.copy_(y)


LOADERS = {
    "list": lambda: pairs(X, Y),
    "generator": lambda: iter(pairs(X, Y)),
    "stream": lambda: DataLoader(Stream(), batch_size=32),
    "memory again": Reusing,
    "no batches of its own": lambda: DataLoader(TensorDataset(X, Y), batch_size=None),
    "map": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
}


@pytest.mark.parametrize("case", [name for name in LOADERS if name != "no batches of its own"])
def test_a_loader_may_use_its_memory_again(case):
    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    wanted = CROSS_ENTROPY(net(X), Y).item()
    make = LOADERS[case]
    assert compute_test_loss(net, make(), CROSS_ENTROPY) == pytest.approx(wanted, rel=1e-5)
    found = find_strategy(net, make(), make(), CROSS_ENTROPY, limit=2.0, widths=[4, 8])
    put = quantize_model(net, found.quantized)
    assert found.loss == pytest.approx(CROSS_ENTROPY(put(X), Y).item() / wanted, rel=1e-5)
    if case == "generator":
        with pytest.raises(ValueError, match="can be gone through once only: give a DataLoader"):
            find_strategy(net, make(), make(), CROSS_ENTROPY, limit=2.0, learn=1)
    else:
        learn(net, uniform_strategy(net, 2), make(), epochs=1.5)


def test_sequences_of_any_length_stay_in_their_batches():
    torch.manual_seed(0)
    net = nn.LSTM(8, 3)

    def forward(net, batch):
        packed, labels = batch
        return net(packed)[1][0][0], labels

    batches = [
        (
            pack_sequence([torch.randn(n, 8) for n in lengths], enforce_sorted=False),
            Y[: len(lengths)],
        )
        for lengths in ((5, 2, 4), (1, 7), (3,))
    ]
    found = find_strategy(
        net, batches, batches, CROSS_ENTROPY, forward=forward, limit=2.0, widths=[4, 8]
    )
    put = quantize_model(net, found.quantized)
    losses = []
    for one in (put, net):
        each = [F.cross_entropy(*forward(one, batch), reduction="none") for batch in batches]
        losses.append(torch.cat(each).mean().item())
    assert found.loss == pytest.approx(losses[0] / losses[1], rel=1e-5)
    assert found.chosen["examples"] == 6


def test_a_batch_that_counts_as_one_stays():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    torch.manual_seed(0)
    net = Centred(8, 3)
    for size in (16, 1):
        batches = pairs(X, Y, size=size)
        with torch.no_grad():
            each = [F.cross_entropy(net(x), y, reduction="none") for x, y in batches]
        measured = Evaluator(net, batches, CROSS_ENTROPY)
        torch.testing.assert_close(measured.outcome()["loss"], torch.cat(each).double())


def test_without_labels_outputs_are_held_to_the_float_networks():
    torch.manual_seed(0)
    net, batches = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), list(X.split(16))
    found = find_strategy(net, batches, batches, limit={"relative_error": 0.1})
    with torch.no_grad():
        error = (quantize_model(net, found.quantized)(X) - net(X)).norm() / net(X).norm()
    assert found.loss == pytest.approx(error.item(), rel=1e-4)
    own = [(x, net(x).detach()) for x in batches]
    same = find_strategy(net, own, own, nn.MSELoss(), limit={"relative_error": 0.1})
    assert same.mean_bits == found.mean_bits
    for options, message in (
        ({"limit": 1.05}, r"limit criterion_ratio needs a criterion; .*relative_error"),
        ({"limit": {"accuracy_drop": 0.1}}, r"limit accuracy_drop needs a criterion"),
    ):
        with pytest.raises(ValueError, match=message):
            find_strategy(net, batches, batches, **options)
    with pytest.raises(ValueError, match=r"has no targets for .*: give criterion=None"):
        find_strategy(net, batches, batches, CROSS_ENTROPY, limit=1.5)
    with pytest.raises(
        ValueError, match=r"criterion_ratio: a ratio needs .* above 0; .* have relative_error"
    ):
        find_strategy(net, own, own, nn.MSELoss(), limit=1.5)


def test_the_network_is_never_run_itself():
    class Table(nn.Linear):
        """Keeps a table of its first pass, and takes gradients in each."""

        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0)
            given = torch.autograd.functional.jacobian(lambda z: z.square().sum(), x)
            return super().forward(given) + self.table

    net = Table(8, 3)
    before = [parameter.clone() for parameter in net.parameters()]
    find_strategy(net, pairs(X, Y), pairs(X, Y), CROSS_ENTROPY, limit=2.0, widths=[8], proxies=True)
    evaluate_bit_depths(net, pairs(X, Y), CROSS_ENTROPY, [4])
    assert net.table is None
    assert all(map(torch.equal, before, net.parameters()))
    CROSS_ENTROPY(net(X), Y).backward()
    assert net.weight.grad is not None


def test_a_loss_that_is_nan_is_no_answer():
    class Filters(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 6, bias=False), nn.Linear(6, 3)
            self.body.weight.data = torch.full((6, 8), 1e-3)
            self.body.weight.data[range(6), range(6)] = 0.5

        def forward(self, x):
            # 0 at one bit, where every weight is ±½ of a step
            return self.head(torch.log(self.body(x.square()) + 0.05))

    torch.manual_seed(0)
    net = Filters()
    for options in ({"budget": {"mean_bits": 6}}, {"limit": 1.2}):
        found = find_strategy(net, pairs(X, Y), pairs(X, Y), CROSS_ENTROPY, **options)
        put = quantize_model(net, found.quantized)
        assert CROSS_ENTROPY(put(X), Y).isfinite()
        assert found.candidates["criterion_ratio"].map(math.isfinite).all()


def test_certify_walks_the_ladder_on_test_data(classifier):
    net, criterion, (train, val, test) = classifier
    found = find_strategy(net, train, val, criterion, limit=1.2, widths=[2, 4, 8])
    proof = certify(net, found, test)
    passed = 0
    for row in found.ladder.to_dict("records"):
        (judged,) = evaluate_strategies(
            net, [row["strategy"]], test, criterion, quantized=[row["quantized"]]
        ).to_dict("records")
        if not judged["criterion_ratio_bound"] <= 1.2:
            break
        passed += 1
    assert proof.steps["certified"].tolist() == [i < passed for i in range(len(found.ladder))]
    assert proof.quantized is (found.ladder.iloc[passed - 1]["quantized"] if passed else None)
    assert "with 95% confidence on test data" in str(proof) or not passed
    nothing = certify(net, found, test, limit=1)
    assert nothing.strategy is None
    assert str(nothing).startswith("Nothing is certified at criterion ratio 1")
    searched = find_strategy(net, train, val, criterion, budget=6, widths=[2, 4, 8])
    with pytest.raises(ValueError, match="the search had a budget: give the limit"):
        certify(net, searched, test)


def test_certify_counts_the_ladders_that_these_data_judged(classifier, tmp_path):
    net, criterion, (train, val, test) = classifier
    searched = [
        find_strategy(net, train, val, criterion, limit=limit, widths=[2, 4, 8])
        for limit in (1.2, {"calibrated_ratio": 1.3, "accuracy_drop": 0.2})
    ]
    path = tmp_path / "looks.json"
    x, y = test.dataset.tensors
    shuffled = torch.randperm(len(x))
    tests = [test, pairs(x, y), ((x[i : i + 7], y[i : i + 7]) for i in range(0, len(x), 7))]
    tests[1] = [(x[shuffled], y[shuffled])]
    for found, k, test in zip([*searched, searched[0]], [1, 2, 1], tests, strict=True):
        proof = certify(net, found, test, looks=path)
        test = pairs(x, y)
        assert proof.look.k == k
        confident = replace(found, confidence=1 - 0.05 / (k * (k + 1)))
        apart = certify(net, confident, test)
        for name in found.goal.limits:
            wanted = apart.steps[f"{name}_bound"]
            assert proof.steps[f"{name}_look_bound"].tolist() == pytest.approx([*wanted])
        assert proof.steps["certified"].tolist() == apart.steps["certified"].tolist()
        assert f"look {k} at these data" in str(proof) or not any(proof.steps["certified"])


def test_another_test_is_another_look(classifier, tmp_path):
    """Of the same codes and limits: another criterion, float network, forward or temperature."""
    net, criterion, (train, val, test) = classifier
    found = find_strategy(net, train, val, criterion, limit=1.2, widths=[2, 4, 8])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.1, *[1.0] * 9])[: classes_of(test)])
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    warmer = found.candidates.assign(temperature=1.5 * found.candidates["temperature"])
    tests = [
        (net, found),
        (net, replace(found, criterion=weighted)),
        (other, found),
        (net, replace(found, forward=lambda model, batch: (1.1 * model(batch[0]), batch[1]))),
        (net, replace(found, candidates=warmer)),
    ]
    path = tmp_path / "looks.json"
    for _ in range(2):
        looks = [certify(model, one, test, looks=path).look.k for model, one in tests]
        assert looks == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("texts", [False, True])
def test_examples_that_cannot_be_told_apart_are_said_where_looks_are_counted(
    classifier, texts, tmp_path, capsys
):
    net, criterion, (train, val, test) = classifier
    found = find_strategy(net, train, val, criterion, limit=1.2, widths=[2, 4, 8])
    found = replace(found, forward=lambda model, batch: (model(batch[0]), batch[1]))
    batches = [(x, y, ["a text"] * len(x)) if texts else (x, y) for x, y in test]
    certify(net, found, batches)
    assert "told apart" not in capsys.readouterr().err
    certify(net, found, batches, looks=tmp_path / "looks.json")
    assert ("can't be told apart" in " ".join(capsys.readouterr().err.split())) == texts


def classes_of(loader):
    return int(loader.dataset.tensors[1].max()) + 1


def test_what_is_kept_has_memory_of_its_own():
    net, data = nn.Linear(8, 3), X.clone()
    (batch,) = kept(batches_of([(data, Y)], net))
    data.zero_()
    assert torch.equal(batch.data[0], X)


def test_each_width_has_its_own_result_within_autocast():
    torch.manual_seed(0)
    net, depths = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), [8, 3, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate_bit_depths(net, pairs(X, Y), CROSS_ENTROPY, depths)["criterion"]
    for bits, criterion in zip(depths, found, strict=True):
        put = quantize_model(net, uniform_strategy(net, bits))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert criterion == pytest.approx(CROSS_ENTROPY(put(X), Y).item(), rel=5e-3)
    assert found.nunique() == len(depths)


def test_proxies_of_a_forward_within_autocast():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x):
            return self.head(self.body(x).relu()).float()

    net = Mixed()
    options = {"limit": 2.0, "widths": [4], "proxies": True}
    table = find_strategy(net, pairs(X, Y), pairs(X, Y), CROSS_ENTROPY, **options).sensitivity
    rows = table[table["name"].str.contains("weight") & (table["examples"] > 0)]
    assert len(rows)
    assert (rows[["fisher_increase", "output_fisher_increase"]] > 0).all(axis=None)


class Stored(MutableMapping):
    """Whose shallow copy shares its store."""

    def __init__(self, **parts):
        self.store = parts

    def __getitem__(self, key):
        return self.store[key]

    def __setitem__(self, key, value):
        self.store[key] = value

    def __delitem__(self, key):
        del self.store[key]

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)


class Attributes(dict):
    """Whose items are its attributes."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.__dict__ = self


@dataclass(frozen=True)
class Scaled:
    x: Tensor
    y: Tensor
    twice: Tensor = field(init=False)
    scale: InitVar[float] = 0.1

    def __post_init__(self, scale):
        object.__setattr__(self, "x", self.x * scale)
        object.__setattr__(self, "twice", self.x * 2)


KINDS = {
    "its own store": Stored,
    "read only": lambda **parts: MappingProxyType(parts),
    "attributes": Attributes,
    "user dict": lambda **parts: UserDict(parts),
    "made once": Scaled,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_ones_own_kind_is_left_alone(kind):
    """Beside the same parts in a plain dict; a batch is what it was, bit for bit."""
    torch.manual_seed(0)
    net, given = nn.Linear(8, 3), [KINDS[kind](x=x, y=y) for x, y in pairs(X, Y)]

    def part(batch, name):
        return (
            batch[name]
            if kind in ("its own store", "read only", "user dict")
            else getattr(batch, name)
        )

    def forward(net, batch):
        assert type(batch) in (type(given[0]), dict)
        if kind == "made once":
            assert torch.equal(batch.twice, batch.x * 2)
        return net(part(batch, "x")), part(batch, "y")

    plain = [{"x": part(batch, "x").clone(), "y": part(batch, "y").clone()} for batch in given]
    found = compute_test_loss(net, given, CROSS_ENTROPY, forward=forward)
    wanted = CROSS_ENTROPY(net(torch.cat([batch["x"] for batch in plain])), Y).item()
    assert found == pytest.approx(wanted, rel=1e-5)
    for batch, before in zip(given, plain, strict=True):
        assert all(torch.equal(part(batch, name), before[name]) for name in ("x", "y"))


@pytest.mark.parametrize("beside", [list, np.array, tuple, lambda names: {"names": names}])
def test_what_stands_beside_tensors_is_not_cut(beside):
    """A list that has as many things as the tensors have rows, whatever a batch's size."""
    net = nn.Linear(8, 3)

    def forward(net, batch):
        x, names, y = batch
        names = names["names"] if isinstance(names, dict) else names
        assert [int(name) for name in names] == x[:, 0].mul(1e4).long().tolist()
        return net(x), y

    names = [beside(x[:, 0].mul(1e4).long().tolist()) for x, _ in pairs(X, Y, size=12)]
    batches = [(x, n, y) for (x, y), n in zip(pairs(X, Y, size=12), names, strict=True)]
    wanted = CROSS_ENTROPY(net(X), Y).item()
    for some in (batches, [(X, beside(X[:, 0].mul(1e4).long().tolist()), Y)]):
        found = compute_test_loss(net, some, CROSS_ENTROPY, forward=forward)
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "criterion", [F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_torchs_functions_get_the_logits_too(criterion):
    torch.manual_seed(0)
    net = Two(OUTPUTS["object"])
    loss = criterion(nn.Linear.forward(net, X), Y).item()
    assert compute_test_loss(net, pairs(X, Y), criterion) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("square", [0, 1])
@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_as_many_positions_as_classes(turned, square, make):
    """Of (examples, positions, classes), or with the classes second, as the other batches have it;
    where none tells, it is asked, and what forward gives is taken as it is."""
    torch.manual_seed(0)

    class Tagger(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x).log_softmax(-1)
            return outputs.movedim(-1, 1) if turned else outputs

    net, criterion = Tagger(8, 3), make()
    with torch.no_grad():
        net.weight.mul_(4)
    lengths = [4, 5]
    lengths.insert(square, 3)
    batches = [(torch.randn(6, n, 8), torch.randint(3, (6, n))) for n in lengths]
    losses = []
    for x, y in batches:
        outputs = nn.Linear.forward(net, x).log_softmax(-1)
        losses.append(F.nll_loss(outputs.flatten(0, 1), y.flatten(), reduction="none"))
    wanted = torch.cat(losses).mean().item()
    assert compute_test_loss(net, batches, criterion) == pytest.approx(wanted, rel=1e-5)
    assert outcome(net, batches, criterion).criterion == pytest.approx(wanted, rel=1e-5)
    alone = batches[square : square + 1]
    for call in (
        lambda: compute_test_loss(net, alone, criterion),
        lambda: outcome(net, alone, criterion),
    ):
        with pytest.raises(
            ValueError, match="in the second axis or in the last: say so by forward="
        ):
            call()

    def forward(net, batch):
        outputs = net(batch[0])
        return outputs if turned else outputs.movedim(-1, 1), batch[1]

    wanted = losses[square].mean().item()
    found = compute_test_loss(net, alone, criterion, forward=forward)
    assert found == pytest.approx(wanted, rel=1e-5)
    learn(net, uniform_strategy(net, 2), batches, epochs=1)


def masked(outputs, labels):
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=2)


class Inside(nn.Module):
    """Torch's own criterion within one of one's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(ignore_index=-7)

    def forward(self, outputs, labels):
        return self.inner(outputs.movedim(-1, 1), labels)


class Focal(nn.Module):
    """A value for each position, or the mean of those that count."""

    ignore_index, reduction = -7, "mean"

    def forward(self, outputs, labels):
        outputs = outputs.movedim(-1, 1)
        values = F.cross_entropy(outputs, labels, reduction="none", ignore_index=-7)
        values = values * (1 - (-values).exp())
        return values.sum() / (labels != -7).sum() if self.reduction == "mean" else values


OF_LABELS = {
    "module": (nn.CrossEntropyLoss(), -100),
    "weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.3]), label_smoothing=0.1), -100),
    "another label": (nn.CrossEntropyLoss(ignore_index=-7), -7),
    "function": (lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), -100),
    "inside": (Inside(), -7),
    "focal": (Focal(), -7),
}


@pytest.mark.parametrize("case", OF_LABELS)
def test_padding_further_changes_nothing(case):
    """The mean is over all labels of a loader that count, as the criterion of all has it."""
    torch.manual_seed(0)
    criterion, ignored = OF_LABELS[case]
    net = nn.Linear(8, 3)
    with torch.no_grad():
        net.weight.mul_(4)
    batches, rows = [], []
    for number, longest in enumerate((4, 9)):
        x, y = (1 + number) * torch.randn(7, longest, 8), torch.randint(3, (7, longest))
        for row, count in enumerate(torch.randint(1, longest + 1, (7,))):
            y[row, count:] = ignored
        batches.append((x, y))
        rows.append((x.flatten(0, 1), y.flatten()))
    x, y = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
    outputs = net(x).movedim(-1, 1) if isinstance(criterion, nn.CrossEntropyLoss) else net(x)
    wanted = criterion(outputs, y).item()
    assert compute_test_loss(net, batches, criterion) == pytest.approx(wanted, rel=1e-4)
    x, y = batches[1]
    batches[1] = F.pad(x, (0, 0, 0, 13), value=3.0), F.pad(y, (0, 13), value=ignored)
    assert compute_test_loss(net, batches, criterion) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("size", [12, 24, 48])
def test_every_batch_says_whether_a_criterion_is_of_a_whole_batch(size):
    """What it ignores, or weighs, may come in a later batch, or be alike in each."""
    torch.manual_seed(0)
    net, y = nn.Linear(8, 3), torch.randint(2, (48, 5))
    x = torch.randn(48, 5, 8)
    y[-1, 1:] = 2  # which it ignores
    batches = pairs(x, y, size=size)
    # batches that stay, since no two have as many positions
    batches = [
        (x[:, :n], y[:, :n]) if n < 5 else (x, y)
        for n, (x, y) in zip((4, 3, 2, 5)[-len(batches) :], batches, strict=True)
    ]
    with pytest.raises(ValueError, match=r"masked is .* it exists for a whole batch only;"):
        compute_test_loss(net, batches, masked)


def test_whole_numbers_are_not_ignored():
    """Where a criterion has no label that it ignores, -100 is a number like others."""
    torch.manual_seed(0)
    net, numbers = nn.Linear(8, 1), torch.randint(-100, -90, (96,))

    def each(outputs, numbers):
        return (outputs.squeeze(1) - numbers).abs()

    def mean(outputs, numbers):
        return each(outputs, numbers).mean()

    wanted = mean(net(X), numbers).item()
    for criterion in (each, mean):
        found = compute_test_loss(net, pairs(X, numbers), criterion)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_answers_are_judged_where_all_batches_have_some():
    """Labels of 0 and 1 in one batch, shares in the next, which has another length."""
    torch.manual_seed(0)

    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x.mean(1))

    net, criterion = Mean(8, 1), nn.BCEWithLogitsLoss()
    batches = [(torch.randn(8, 5, 8), torch.ones(8)), (torch.randn(8, 3, 8), torch.rand(8))]
    row = evaluate_bit_depths(net, batches, criterion, [8]).iloc[0]
    with torch.no_grad():
        outputs = torch.cat([net(x).flatten() for x, _ in batches])
    wanted = criterion(outputs, torch.cat([y for _, y in batches])).item()
    assert row["original_criterion"] == pytest.approx(wanted, rel=1e-5)
    assert "accuracy" not in row


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, near):
        return self.head(near @ self.body(near @ x).relu())


class Steps(nn.GRU):
    """As many steps as the longest of the batch has."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(super().forward(packed)[0], batch_first=True)[0]


class TimeFirst(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0][-1]


def no_rows():
    """Networks and batches whose tensors have rows that are no examples."""
    x = torch.randn(12, 9, 8)
    lengths = torch.tensor([5, 9, 2, 9, 1, 3, 8, 9, 4, 4, 7, 6])
    yield Graph(), lambda: (torch.randn(12, 8), torch.rand(12, 12), torch.randint(3, (12,)))
    yield Steps(8, 3, batch_first=True), lambda: (x * torch.rand(1), lengths)
    yield Steps(8, 3, batch_first=True), lambda: (x * torch.rand(1), lengths.tolist())
    yield TimeFirst(8, 3), lambda: (torch.randn(12, 12, 8), torch.randint(3, (12,)))


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_are_no_examples_stay_together(case, count):
    torch.manual_seed(0)
    net, make = list(no_rows())[case]
    batches = [make() for _ in range(count)]
    labelled = batches[0][-1] is not None and case in (0, 3)
    quantized = quantize(net, uniform_strategy(net, 4))
    put = quantize_model(net, quantized)
    measured = Evaluator(net, batches, CROSS_ENTROPY if labelled else None).outcome(quantized)
    with torch.no_grad():
        made = [put(*(batch[:-1] if labelled else batch)) for batch in batches]
    torch.testing.assert_close(measured["outputs"], torch.cat(made))
    if labelled:
        wanted = CROSS_ENTROPY(torch.cat(made), torch.cat([batch[-1] for batch in batches]))
        assert measured.criterion == pytest.approx(wanted.item(), rel=1e-5)
        options = {"limit": 2.0, "widths": [4], "proxies": True}
        table = find_strategy(net, batches, batches, CROSS_ENTROPY, **options).sensitivity
        assert table["fisher_increase"].isna().all()
