"""What is no number is refused, and named, on whichever data."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from quantifind.metrics import compared, judged
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import quantize
from quantifind.strategy import uniform_strategy
from quantifind.workflow.certification_workflow import Certificate, judge_ladder
from quantifind.workflow.evaluation_workflow import compare, evaluate_strategies

EXAMPLES, BAD = 20, 7
CRITERIA = {
    "labels": (nn.CrossEntropyLoss(), "flips"),
    "shares": (nn.CrossEntropyLoss(), "calibrated_ratio"),
    "bits": (nn.BCEWithLogitsLoss(), "criterion_ratio"),
    "numbers": (nn.MSELoss(), "relative_error"),
}


def examples(name, where=""):
    """Inputs and targets, of which the last have NaN somewhere."""
    torch.manual_seed(0)
    x, targets = torch.randn(EXAMPLES, 3), torch.randn(EXAMPLES, 4)
    targets = {
        "labels": targets.argmax(1),
        "shares": targets.softmax(1),
        "bits": (targets > 0).float(),
        "numbers": targets,
    }[name]
    if where:
        {"batches": x, "targets": targets}[where][-BAD:, 1] = math.nan
    return [(x[:12], targets[:12]), (x[12:], targets[12:])]


@pytest.mark.parametrize(
    ("name", "where"),
    [(n, w) for n in CRITERIA for w in ("batches", "targets") if (n, w) != ("labels", "targets")],
)
def test_data_that_are_no_numbers_are_refused(name, where, tmp_path):
    """Before a look at them is counted; the examples are counted in words."""
    torch.manual_seed(0)
    (criterion, measure), net, looks = CRITERIA[name], nn.Linear(3, 4), tmp_path / "looks.json"
    good, bad, strategy = examples(name), examples(name, where), uniform_strategy(net, 4)
    ladder = pd.DataFrame({"strategy": [strategy], "quantized": [quantize(net, strategy)]})
    ladder["answer"] = "as_is"
    for data, message in (
        (bad, rf"on these data.* {BAD} of {EXAMPLES} examples.*the {where} have {BAD} values"),
        (good, None),
    ):
        calls = (
            lambda data=data: evaluate_strategies(net, [strategy], data, criterion),
            lambda data=data: judge_ladder(
                net, ladder, data, criterion, limits={measure: 2.0}, looks=looks
            ),
        )
        for call in calls:
            if message is None:
                call()
            else:
                with pytest.raises(ValueError, match=message) as caught:
                    call()
                assert len(str(caught.value).splitlines()) == 1
        assert looks.exists() == (message is None)
    with pytest.raises(ValueError, match=rf"on validation data.* {BAD} of {EXAMPLES} examples"):
        Measurements.start(net, good, bad, criterion)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=str)
@pytest.mark.parametrize("original_too", [True, False])
def test_an_output_that_is_no_number_is_a_wrong_answer(criterion, original_too):
    """And another one than the float network's, whatever that is."""
    torch.manual_seed(0)
    classes = 4 if isinstance(criterion, nn.CrossEntropyLoss) else 1
    wanted = torch.randn(EXAMPLES, classes)
    labels = wanted.argmax(1) if classes > 1 else (wanted > 0).float()
    outputs = wanted.clone()
    outputs[-BAD:, 0] = math.nan
    quantized = judged(criterion, outputs, labels)
    original = judged(criterion, outputs if original_too else wanted, labels)
    flipped = compared(quantized, original).parts[0]["flipped"]
    assert flipped.tolist() == [False] * (EXAMPLES - BAD) + [True] * BAD
    assert compare(quantized, original)["accuracy"] == pytest.approx(1 - BAD / EXAMPLES)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"relative_error": math.nan, "criterion": math.nan}, "outputs of the quantized network"),
        ({"relative_error": 0.1, "criterion": math.inf}, "the quantized network's loss is inf"),
        ({"relative_error": 0.1, "criterion": 1.0}, "the float network's loss is 0: it has no"),
    ],
)
def test_a_ratio_that_is_no_number_has_its_reason(step, reason):
    limits = {"criterion_ratio": 1.1}
    row = {"criterion_ratio": math.nan, "criterion_ratio_bound": math.inf, "certified": False}
    row |= {"mean_bits": 4.0, "original_criterion": 0.0}
    said = str(Certificate(limits, 0.95, pd.DataFrame([row | step]), None, None))
    assert said.startswith("Nothing is certified at criterion ratio 1.1")
    assert f"; {reason}" in said
