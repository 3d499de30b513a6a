"""Losses, ratios and errors beside what they are defined as."""

import math
import weakref

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import divergence
from hypothesis import given
from torch import nn

from quantifind import metrics
from quantifind.metrics import (
    Outcome,
    columns_of,
    is_classification,
    outcome,
    paired,
    weight_error,
)
from quantifind.quantize import quantize
from quantifind.runtime import evaluator, layouts
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.criteria import losses
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.evaluation_workflow import (
    compare,
    compute_test_loss,
    evaluate_bit_depths,
    evaluate_quantized_model,
    evaluate_strategies,
)
from quantifind.workflow.quantize_workflow import BitQuantizer
from stages.answers import summarize

CRITERIA = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.L1Loss(reduction="sum"),
    nn.HuberLoss(),
    nn.functional.mse_loss,
    lambda outputs, targets: (outputs - targets).square().mean(),
]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses_of_examples_make_the_criterion(criterion):
    torch.manual_seed(0)
    outputs = torch.randn(7, 3)
    labels = isinstance(criterion, nn.CrossEntropyLoss)
    targets = torch.randint(3, (7,)) if labels else torch.randn(7, 3)
    each = losses(criterion, outputs, targets)
    assert each.shape == (7,)
    total = each.sum() if getattr(criterion, "reduction", "mean") == "sum" else each.mean()
    torch.testing.assert_close(total, criterion(outputs, targets))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 40])
def test_loss_is_weighted_by_examples(classifier, batch_size):
    net, criterion, (_, _, test) = classifier
    inputs, targets = test.dataset.tensors
    loader = batch_loader(Tensors(inputs, targets), batch_size=batch_size, shuffle=False, seed=0)
    whole = criterion(net.eval()(inputs), targets).item()
    assert compute_test_loss(net, loader, criterion) == pytest.approx(whole, rel=1e-6)


def test_evaluation_leaves_the_mode_and_gradients_alone(classifier):
    net, criterion, (_, _, test) = classifier
    net.train()
    net[0].eval()
    first = compute_test_loss(net, test, criterion)
    assert first == compute_test_loss(net, test, criterion)  # dropout is off
    assert [module.training for module in net] == [False, True, True, True]
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_either_order_of_loader_and_criterion(classifier):
    net, criterion, (_, _, test) = classifier
    assert compute_test_loss(net, test, criterion) == compute_test_loss(net, criterion, test)
    by_loader = evaluate_bit_depths(net, test, criterion, [3])
    by_criterion = evaluate_bit_depths(net, criterion, test, [3])
    pd.testing.assert_frame_equal(by_loader, by_criterion)
    assert evaluate_quantized_model(net, test, criterion, 3) == by_loader["criterion"][0]
    assert evaluate_quantized_model(net, criterion, test, 3) == by_loader["criterion"][0]


def test_bit_depths_are_judged_as_their_definitions_say(classifier):
    net, criterion, (_, _, test) = classifier
    net.eval()
    results = evaluate_bit_depths(net, test, criterion)
    assert results["bit_depth"].tolist() == list(range(32, 1, -1))
    inputs, targets = test.dataset.tensors
    outputs = net(inputs)
    for row in results.to_dict("records"):
        quantized = BitQuantizer(row["bit_depth"]).quantize_model(net)(inputs)
        loss, original = criterion(quantized, targets).item(), criterion(outputs, targets).item()
        assert row["criterion"] == pytest.approx(loss, rel=1e-5)
        assert row["original_criterion"] == pytest.approx(original, rel=1e-5)
        assert row["criterion_ratio"] == pytest.approx(loss / original, rel=1e-5)
        assert row["signal_to_complexity"] == pytest.approx(loss / row["bit_depth"], rel=1e-5)
        low, high = row["criterion_ratio_low"], row["criterion_ratio_high"]
        assert low <= row["criterion_ratio"] <= high
        assert row["criterion_ratio"] <= row["criterion_ratio_bound"]
        right, was_right = quantized.argmax(1) == targets, outputs.argmax(1) == targets
        assert row["accuracy"] == pytest.approx(right.float().mean().item())
        flips = row["right_to_wrong"] - row["wrong_to_right"]
        assert row["accuracy_drop"] == pytest.approx(flips / len(targets))
        assert row["right_to_wrong"] == (was_right & ~right).sum()
        relative = ((quantized - outputs).norm() / outputs.norm()).item()
        assert row["relative_error"] == pytest.approx(relative, rel=1e-3, abs=1e-6)


def test_a_shuffled_loader_is_judged_in_pairs(classifier):
    net, criterion, (_, _, test) = classifier
    shuffled = batch_loader(test.dataset, batch_size=7, shuffle=True, seed=0)
    (row,) = evaluate_bit_depths(net, shuffled, criterion, [32]).to_dict("records")
    assert row["relative_error"] < 1e-6
    assert row["right_to_wrong"] == row["wrong_to_right"] == 0
    assert row["criterion_ratio_high"] == pytest.approx(1, abs=1e-6)


def test_regression_has_no_accuracy():
    net = nn.Linear(3, 2)
    data = Tensors(torch.randn(20, 3), torch.randn(20, 2))
    loader = batch_loader(data, batch_size=8, shuffle=False, seed=0)
    measured = outcome(net, loader, nn.MSELoss())
    assert not is_classification(measured)
    assert "accuracy" not in compare(measured, measured)
    summary = summarize(evaluate_bit_depths(net, loader, nn.MSELoss(), [8, 4]), [1.01])
    assert summary["float"].keys() == {"criterion"}


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        compute_test_loss(nn.Linear(1, 1), [], nn.MSELoss())


def test_no_strategy_is_an_empty_table(classifier):
    net, criterion, (_, _, test) = classifier
    assert evaluate_strategies(net, [], test, criterion).empty


def test_weight_error_is_its_definition():
    values, quantized = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5])
    errors = weight_error(values, quantized)
    assert errors["sqnr_db"] == pytest.approx(10 * math.log10(25 / 0.25))
    assert errors["mean_squared_error"] == pytest.approx(0.125)
    assert errors["largest_error"] == pytest.approx(0.5)
    assert weight_error(values, values)["sqnr_db"] == math.inf


def outcomes_of(criterion, targets, *, classes=5, examples=40):
    """Those of a network and of one with a little noise."""
    torch.manual_seed(0)
    net = nn.Linear(6, classes)
    noisy = nn.Linear(6, classes)
    with torch.no_grad():
        for own, other in zip(noisy.parameters(), net.parameters(), strict=True):
            own.copy_(other + 0.2 * torch.randn_like(other))
    batches = [(torch.randn(examples, 6), targets)]
    return outcome(noisy, batches, criterion), outcome(net, batches, criterion)


def test_paired_columns_of_a_classifier_are_their_definitions():
    torch.manual_seed(1)
    quantized, original = outcomes_of(nn.CrossEntropyLoss(), torch.randint(5, (40,)))
    columns = paired(quantized, original)
    names = "loss original_loss weight squared_error squared_norm correct original_correct flipped"
    assert list(columns) == names.split()
    columns["divergence"] = divergence(quantized, original)
    outputs, wanted = quantized["outputs"].double(), original["outputs"].double()
    pair = outputs.log_softmax(1), wanted.softmax(1)
    divergences = nn.functional.kl_div(*pair, reduction="none").sum(1)
    for name, column in (
        ("loss", quantized["loss"]),
        ("original_loss", original["loss"]),
        ("squared_error", (outputs - wanted).norm(dim=1).square()),
        ("squared_norm", wanted.norm(dim=1).square()),
        ("divergence", divergences),
    ):
        assert columns[name].shape == (40,)
        assert columns[name].dtype == "float64"
        torch.testing.assert_close(torch.from_numpy(columns[name]), column)
    assert columns["correct"].tolist() == quantized["correct"].tolist()
    assert columns["original_correct"].tolist() == original["correct"].tolist()
    assert (columns["divergence"] > 0).all()


def test_divergence_is_the_rise_of_the_loss_if_the_originals_outputs_were_the_truth():
    torch.manual_seed(1)
    quantized, original = outcomes_of(nn.CrossEntropyLoss(), torch.randint(5, (40,)))
    truth = original["outputs"].double().softmax(1)
    loss, least = (
        nn.functional.cross_entropy(measured["outputs"].double(), truth, reduction="none")
        for measured in (quantized, original)
    )
    loss_increase = torch.from_numpy(divergence(quantized, original))
    torch.testing.assert_close(loss_increase, loss - least)
    shifted = Outcome(
        [original.parts[0] | {"outputs": original["outputs"] + 3.0}], "softmax"
    )  # softmax knows no shift
    assert abs(divergence(shifted, original)).max() < 1e-6


def test_paired_columns_of_a_regression():
    quantized, original = outcomes_of(nn.MSELoss(), torch.randn(40, 5))
    columns = paired(quantized, original)
    assert not {"correct", "original_correct"} & columns.keys()
    outputs, wanted = quantized["outputs"].double(), original["outputs"].double()
    each = nn.functional.mse_loss(outputs, wanted, reduction="none").mean(1)
    torch.testing.assert_close(torch.from_numpy(divergence(quantized, original)), each)
    ones = {"loss": torch.ones(7).double(), "weight": torch.ones(7)}
    shape = Outcome([{"outputs": torch.randn(7, 2, 3), **ones}])
    columns = paired(shape, shape)
    assert columns["squared_norm"].shape == (7,)
    norms = shape["outputs"].double().square().sum((1, 2))
    torch.testing.assert_close(torch.from_numpy(columns["squared_norm"]), norms)
    assert not divergence(shape, shape).any()


@pytest.mark.parametrize("classes", [True, False])
def test_columns_stand_in_the_order_of_the_examples(classes):
    torch.manual_seed(1)
    criterion = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    targets = torch.randint(5, (40,)) if classes else torch.randn(40, 5)
    quantized, original = outcomes_of(criterion, targets)
    columns, order = paired(quantized, original), torch.randperm(40)
    moved = paired(
        *(
            Outcome([{n: t[order] for n, t in o.parts[0].items()}], o.classes)
            for o in (quantized, original)
        )
    )
    assert moved.keys() == columns.keys()
    for name, column in columns.items():
        assert moved[name].tolist() == column[order].tolist()


class Several(nn.Linear):
    """Outputs in two tensors."""

    def forward(self, x):
        whole = super().forward(x)
        return whole[:, :2], whole[:, 2:].tanh()


class Lengths(nn.Linear):
    """Outputs (examples, length, …) of sequences."""

    def forward(self, x):
        return super().forward(x.cumsum(1))


def several_apart(outputs, targets):
    return sum((part.mean(1) - targets).square() for part in outputs)


def lengths(kind, criterion):
    made = [torch.randn(9, size, 6) for size in (3, 3, 5)]
    labels = [torch.randint(4, x.shape[:2]) for x in made]
    labels[0][:, 1] = -100
    targets = labels if kind == "labels" else [torch.randn(*x.shape[:2], 4) for x in made]
    return Lengths(6, 4), list(zip(made, targets, strict=True)), criterion


def flat(kind, criterion, net=None):
    x = torch.randn(45, 6)
    targets = {
        "labels": torch.randint(4, (45,)),
        "bits": torch.randint(2, (45, 4)).float(),
        "numbers": torch.randn(45, 4),
        "number": torch.randn(45),
    }[kind]
    return net or nn.Linear(6, 4), [(x, targets)], criterion


BESIDE = {
    "softmax": lambda: flat("labels", nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]))),
    "sigmoid": lambda: flat("bits", nn.BCEWithLogitsLoss()),
    "regression": lambda: flat("numbers", nn.MSELoss()),
    "several outputs": lambda: flat("number", several_apart, Several(6, 4)),
    "no criterion": lambda: flat("number", None),
    "positions of other lengths": lambda: lengths("labels", nn.CrossEntropyLoss()),
    "numbers of other lengths": lambda: lengths("numbers", nn.MSELoss()),
}


def by_hand(name, measured, original):
    """The columns of an outcome that has all outputs, example by example."""
    columns = {"squared_error": [], "squared_norm": [], "divergence": []}
    for part, other in zip(measured.parts, original.parts, strict=True):
        pairs = zip(part["outputs"].double(), other["outputs"].double(), strict=True)
        for number, (f_b, f) in enumerate(pairs):
            columns["squared_error"].append(((f_b - f) ** 2).sum().item())
            columns["squared_norm"].append((f**2).sum().item())
            if name == "softmax" or name.startswith("positions"):  # (classes, …)
                p, q = f.softmax(0), f_b.softmax(0)
                each = other["weight"][number].double() * (p * (p / q).log()).sum(0)
                columns["divergence"].append(each.sum().item())
            elif name == "sigmoid":
                p, q = f.sigmoid(), f_b.sigmoid()
                each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
                columns["divergence"].append(each.mean().item())
            else:
                columns["divergence"].append(((f_b - f) ** 2).mean().item())
    columns |= {"loss": measured["loss"].tolist(), "original_loss": original["loss"].tolist()}
    if is_classification(original):
        columns["correct"] = measured["correct"].tolist()
        columns["original_correct"] = original["correct"].tolist()
        columns["flipped"] = (measured["answer"] != original["answer"]).tolist()
    return columns


@pytest.mark.parametrize("bytes_kept", [2**30, 0, 200])
@pytest.mark.parametrize("name", BESIDE)
def test_columns_made_batch_by_batch_are_those_of_the_whole_split(name, bytes_kept, monkeypatch):
    monkeypatch.setattr(layouts, "CPU_BATCH", 7)
    monkeypatch.setattr(evaluator, "KEPT", bytes_kept)
    monkeypatch.setattr(evaluator, "AGAIN", bytes_kept)
    monkeypatch.setattr(metrics, "COMPARED", 9)
    torch.manual_seed(2)
    net, batches, criterion = BESIDE[name]()
    judge = Evaluator(net, batches, criterion)
    original, whole = judge.original(), judge.outcome()
    assert ("outputs" in original) == (bytes_kept > 1000)
    assert original.nans == 0
    tensors = quantize(net, uniform_strategy(net, 3)).tensors
    weight = Quantized({"weight": tensors["weight"]})
    span = (9, 18) if "lengths" in name else (10, 38)
    for first, last in ((0, None), span):
        both = judge.outcome(Quantized(tensors), first, last, beside=original)
        (alone,) = judge.one_tensor("weight", [tensors["weight"]], first, last, beside=original)
        for quantized, reduced in ((Quantized(tensors), both), (weight, alone)):
            wanted = by_hand(
                name, judge.outcome(quantized, first, last), whole.span(first, last or len(whole))
            )
            found = columns_of(reduced)
            assert found.keys() == wanted.keys() | {"weight"}
            for column, values in wanted.items():
                # a replayed pass may have other last digits in float32
                atol = 1e-12 if reduced is both else 1e-5
                np.testing.assert_allclose(
                    found[column], values, rtol=0, atol=atol, err_msg=column, equal_nan=True
                )


def test_outputs_of_one_batch_are_kept_at_a_time(monkeypatch):
    """Of a candidate; those of the float network once."""
    monkeypatch.setattr(layouts, "CPU_BATCH", 5)
    kept, most = [], 0

    class Watched(nn.Linear):
        def forward(self, x):
            nonlocal most
            most = max(most, sum(one() is not None for one in kept))
            outputs = super().forward(x)
            kept.append(weakref.ref(outputs))
            return outputs

    net = Watched(6, 4)
    judge = Evaluator(net, [(torch.randn(60, 6), torch.randint(4, (60,)))], nn.CrossEntropyLoss())
    quantized = quantize(net, uniform_strategy(net, 3))
    for bytes_kept, others in ((2**30, 0), (0, 1)):
        monkeypatch.setattr(evaluator, "KEPT", bytes_kept)
        monkeypatch.setattr(evaluator, "AGAIN", bytes_kept)
        original = judge.original()
        kept, most = [], 0
        judge.outcome(quantized, beside=original)
        assert len(kept) == 12 * (1 + others)
        assert most <= others


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    ends=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_a_span_is_of_the_examples_in_order(sizes, ends):
    first, last = sorted(ends)
    loss = torch.arange(sum(sizes)).double().split(sizes)
    span = Outcome([{"loss": part} for part in loss]).span(first, last)
    assert [x for part in span.parts for x in part["loss"].tolist()] == list(
        range(first, min(last, sum(sizes)))
    )
