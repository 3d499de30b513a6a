"""What is learned from targets is the criterion's own loss, and what it ignores is not learned."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantifind.learning import learn, train_control
from quantifind.mixed_precision import learned_candidates
from quantifind.mixed_precision.learned_candidates import _recipe
from quantifind.quantize import quantize
from quantifind.runtime.control import FloatStudent
from quantifind.runtime.student import Student
from quantifind.search import find_strategy
from quantifind.storage.store import fingerprint
from quantifind.strategy import uniform_strategy
from quantifind.utils.batches import Batch, as_batch
from quantifind.utils.criteria import BY_CLASS

CLASSES = 4
WEIGHT = torch.tensor([0.5, 3.0, 1.0, 2.0])
OPTIONS = {
    "plain": {},
    "weighted": {"weight": WEIGHT},
    "smoothed": {"label_smoothing": 0.2},
    "both": {"weight": WEIGHT, "label_smoothing": 0.2},
    "ignoring": {"ignore_index": 0},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 2},
}
PLACES = {"examples": (), "positions": (3,)}


def network(places=()):
    torch.manual_seed(0)
    kind = (lambda i, o: nn.Conv1d(i, o, 1)) if places else nn.Linear
    return nn.Sequential(kind(6, 16), nn.ReLU(), kind(16, CLASSES))


def examples(places=(), count=33):
    torch.manual_seed(1)
    x = torch.randn(count, 6, *places)
    return x, x[:, :CLASSES].argmax(1)


def batches(x, targets):
    return list(zip(x.split(8), targets.split(8), strict=True))


def shares_of(labels):
    """The same labels as shares of classes."""
    shares = F.one_hot(labels, CLASSES).float()
    return shares.movedim(-1, 1) if labels.dim() > 1 else shares


def learned(net, data, criterion, label_weight):
    """Codes, and the control's weights."""
    strategy = uniform_strategy(net, 3)
    how = {"epochs": 2, "label_weight": label_weight, "learning_rate": 1e-2}
    quantized = learn(net, strategy, data, criterion=criterion, **how)
    control = train_control(net, strategy, data, criterion=criterion, **how)
    return [t.dequantize() for t in quantized.tensors.values()] + [*control.parameters()]


def assert_alike(one, other, tolerance=1e-5):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "label_weight"), [*((kind, 0.0) for kind in BY_CLASS), (nn.CrossEntropyLoss, 1.0)]
)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("ignored", [0, CLASSES - 1, 255, -7])
def test_any_label_may_be_ignored_in_learning(kind, places, ignored, label_weight):
    """It is learned as torch's own -100, and of examples that have no other nothing is."""
    (x, labels), net = examples(places), network(places)
    left_out = torch.rand(labels.shape) < 0.3
    labels = labels.clamp(1, CLASSES - 2)
    found, usual = (
        learned(net, batches(x, labels.masked_fill(left_out, one)), criterion, label_weight)
        for one, criterion in ((ignored, kind(ignore_index=ignored)), (-100, None))
    )
    assert_alike(found, usual, 0)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("as_shares", [False, True])
def test_the_loss_to_targets_is_the_criterions(places, option, as_shares):
    """That of torch, added up by the weights, over all positions."""
    options = dict(OPTIONS[option])
    if as_shares:
        options.pop("ignore_index", None)  # which torch takes with labels alone
    (x, labels), net = examples(places), network(places)
    targets = shares_of(labels) if as_shares else labels
    start = quantize(net, uniform_strategy(net, 3))
    student = FloatStudent(net, start, 0.5, None, None, nn.CrossEntropyLoss(**options))
    # for which no examples are blended
    loss = student.backward(Batch((x, targets), lambda model, data: (model(data[0]), data[1])))
    oracle = nn.CrossEntropyLoss(**options, reduction="sum")
    expected = 0.5 * oracle(net(x), targets) / labels.numel()
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    for name, own in net.named_parameters():
        torch.testing.assert_close(student.latents[name].grad, own.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("option", ["plain", "both"])
@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_shares_of_one_class_are_learned_as_its_label(places, option, label_weight):
    """Blends of examples, too."""
    (x, labels), net = examples(places), network(places)
    criterion = nn.CrossEntropyLoss(**OPTIONS[option])
    found = [
        learned(net, batches(x, targets), criterion, label_weight)
        for targets in (labels, shares_of(labels))
    ]
    assert_alike(*found, 1e-3)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("as_shares", [False, True])
def test_parts_of_a_batch_add_up_by_any_criterion(option, as_shares):
    (x, labels), net = examples((3,)), network((3,))
    data = x, shares_of(labels) if as_shares else labels
    start, criterion = (
        quantize(net, uniform_strategy(net, 3)),
        nn.CrossEntropyLoss(**OPTIONS[option]),
    )
    found = []
    for size in (None, 1, 7):
        student = Student(net, start, 0.5, size, None, criterion)
        torch.manual_seed(2)
        loss = student.backward(as_batch(data, net))
        found.append([loss, *(latent.grad for latent in student.latents.values())])
    for parts in found[1:]:
        assert_alike(parts, found[0])


class Own(nn.Module):
    """Of one's own, that ignores a class."""

    ignore_index = 3

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=self.ignore_index)


def recipe(criterion, targets, labels, density=None):
    net, x = network(), examples()[0]
    measurements = SimpleNamespace(
        criterion=criterion, model=net, calibration=batches(x, targets), forward=None, seed=0
    )
    measurements.train_loader = batches(x, targets)
    return _recipe(measurements, 2, labels, density)


@pytest.mark.parametrize("labels", [False, True])
def test_what_a_plain_criterion_learned_is_found_again(labels):
    """Its key is of epochs, weight and rate, as it was when these were all; others have others."""
    targets = examples()[1]
    plain = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.L1Loss()]
    plain += [] if labels else [nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT)]
    plain += [nn.CrossEntropyLoss(ignore_index=-1), lambda outputs, targets: outputs.sum(1)]
    for criterion in plain:
        key, how = recipe(criterion, targets, labels)
        assert key == fingerprint(2.0, float(labels), 1e-3)
        assert "criterion" not in how
    key, how = recipe(nn.MSELoss(), shares_of(targets), labels)
    assert (key, "criterion" in how) == (fingerprint(2.0, float(labels), 1e-3), False)
    others = [(nn.CrossEntropyLoss(ignore_index=i), targets) for i in (0, 1)]
    others += [(Own(), targets), (nn.CrossEntropyLoss(), shares_of(targets))]
    if labels:
        others += [(nn.CrossEntropyLoss(weight=w), targets) for w in (WEIGHT, 2 * WEIGHT)]
        others += [(nn.CrossEntropyLoss(label_smoothing=s), targets) for s in (0.1, 0.2)]
    found = [recipe(*other, labels) for other in others]
    assert len({key for key, _ in found} | {key}) == len(others) + 1
    assert [how["criterion"] for _, how in found] == [criterion for criterion, _ in others]


@pytest.mark.parametrize(("labels", "most"), [(False, 2.0), (True, 4.0)])
def test_sparser_codes_take_larger_steps(labels, most):
    """By the root of how much sparser, up to twice, and with labels four times, those of all codes
    (without labels more followed worse: learned_candidates.FASTER)."""
    densities = [0.5, 0.25, 0.05, 0.005]
    rates = [
        recipe(nn.CrossEntropyLoss(), examples()[1], labels, density)[1]["learning_rate"]
        for density in densities
    ]
    wanted = [1e-3 * min(most, (0.5 / density) ** 0.5) for density in densities]
    assert rates == pytest.approx(wanted)
    assert recipe(nn.CrossEntropyLoss(), examples()[1], labels)[1]["learning_rate"] == 1e-3


@pytest.mark.parametrize("option", ["plain", "ignoring", "shares"])
def test_a_search_learns_by_its_criterion(option, monkeypatch):
    """And so does the control."""
    (x, labels), seen = examples(count=600), []
    targets = shares_of(labels) if option == "shares" else labels
    criterion = nn.CrossEntropyLoss(**OPTIONS.get(option, {}))
    for place, name in [(learned_candidates, n) for n in ("learn_codes", "train_control")]:
        own = getattr(place, name)

        def spy(*args, own=own, **recipe):
            seen.append(recipe.get("criterion"))
            return own(*args, **recipe)

        monkeypatch.setattr(place, name, spy)
    how = {"limit": 3.0, "learn": 0.5, "labels": True, "widths": [2, 8], "effort": 20}
    data = batches(x, targets)
    found = find_strategy(network(), data, data, criterion, **how)
    assert found.control is not None
    assert len(seen) > 1
    assert set(seen) == {None if option == "plain" else criterion}


def test_labels_are_learned_by_what_has_such_a_loss():
    net, data = network(), batches(*examples())
    with pytest.raises(ValueError, match="label_weight is 1: labels are learned with CrossEntropy"):
        learn(net, uniform_strategy(net, 3), data, epochs=1, label_weight=1, criterion=nn.L1Loss())
