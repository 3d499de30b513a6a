"""What quantization costs is the same whatever the reduction, and whichever label is ignored."""

import pytest
import torch
from conftest import divergence
from torch import nn

from quantifind.certification.measures import degradation
from quantifind.metrics import judged, paired
from quantifind.utils.criteria import BY_CLASS, BY_LOGIT, ELEMENTWISE

EXAMPLES, CLASSES = 12, 5
SHAPES = {"examples": (), "positions": (4,), "pixels": (4, 3)}
# the usual one, one beyond the classes, the first class and the last
IGNORED = (-100, 255, 0, CLASSES - 1)
WEIGHTS = {
    "weighted": torch.linspace(0.5, 2, CLASSES),
    "some of no weight": torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0]),
    "all alike": None,
}


def labelled(shape, ignored=-100):
    """Outputs of two networks, and labels of which some are ignored, as are all of an example."""
    torch.manual_seed(0)
    wanted = torch.randn(EXAMPLES, CLASSES, *shape)
    labels = torch.randint(1, CLASSES - 1, (EXAMPLES, *shape))
    left_out = torch.rand(labels.shape) < 0.4
    left_out[0], left_out[1] = True, False
    outputs = wanted + 0.1 * torch.randn_like(wanted)
    return outputs, wanted, labels.masked_fill(left_out, ignored)


def numbers(shape):
    torch.manual_seed(0)
    wanted = torch.rand(EXAMPLES, CLASSES, *shape)
    outputs = wanted + 0.1 * torch.rand_like(wanted) * (1 - wanted)
    return outputs, wanted, (torch.rand_like(wanted) > 0.5).float()


def measured(criterion, outputs, wanted, targets):
    quantized, original = judged(criterion, outputs, targets), judged(criterion, wanted, targets)
    original = original.calibrated()
    columns = paired(quantized, original) | {"divergence": divergence(quantized, original)}
    return degradation(columns)


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), name


@pytest.mark.parametrize("kind", [*BY_CLASS, *ELEMENTWISE])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_measure_depends_on_the_reduction(kind, shape):
    data = labelled(shape) if kind in BY_CLASS else numbers(shape)
    for weight in WEIGHTS.values() if kind in BY_CLASS else (None,):
        own = {} if weight is None else {"weight": weight}
        assert_alike(*(measured(kind(reduction=how, **own), *data) for how in ("sum", "mean")))


@pytest.mark.parametrize("kind", BY_CLASS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_label_may_be_the_ignored_one(kind, shape, weight, reduction):
    """The loss is torch's, and what it costs is the same."""
    each = []
    for ignored in IGNORED:
        outputs, wanted, labels = labelled(shape, ignored)
        criterion = kind(weight=weight, ignore_index=ignored, reduction=reduction)
        found = judged(criterion, outputs, labels)
        total = criterion(outputs, labels).item()
        # of a sum the mean over examples that have a label of some weight
        counts = labels != ignored
        if weight is not None:
            counts &= weight[labels.where(counts, 0)] > 0
        some = int(counts.reshape(EXAMPLES, -1).any(1).sum())
        total /= some if reduction == "sum" else 1
        assert found.criterion == pytest.approx(total, rel=1e-5)
        each.append(measured(criterion, outputs, wanted, labels))
    for one in each[1:]:
        assert_alike(one, each[0])


@pytest.mark.parametrize("kind", BY_CLASS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("there", [1e3, float("nan"), float("inf")])
def test_what_is_ignored_is_not_in_a_divergence(kind, shape, reduction, there):
    outputs, wanted, labels = labelled(shape)
    other = outputs.masked_fill((labels == -100)[:, None], there)
    criterion = kind(reduction=reduction)
    original = judged(criterion, wanted, labels)
    one, same = (divergence(judged(criterion, o, labels), original) for o in (outputs, other))
    assert one.sum() > 0
    assert one.tolist() == same.tolist()


@pytest.mark.parametrize("kind", BY_LOGIT)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_criteria_of_logits_of_two_classes_are_alike(kind, reduction):
    """Each is the same mean of the same cross entropies."""
    data = numbers(())
    found = measured(kind(reduction=reduction), *data)
    assert_alike(found, measured(nn.BCEWithLogitsLoss(), *data))
