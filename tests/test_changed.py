"""The examples that changed most are those that a loop of one's own finds."""

import base64
import json

import numpy as np
import pytest
import torch
from torch import nn

from quantifind import quantize_model, uniform_strategy
from quantifind.quantize import quantize
from quantifind.utils.loaders import Tensors, create_dataloaders
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from stages.changed import COLUMNS, changed_table
from stages.networks import Context


def context(net, criterion):
    return Context(net.eval(), criterion, None, None, {})


def judged(net, criterion, test, bits=3):
    """What has become of the network, and what was measured of each example."""
    strategy = uniform_strategy(net, bits)
    table = evaluate_strategies(net, [strategy], test, criterion, columns=True)
    return quantize(net, strategy), table["columns"][0]


@pytest.mark.parametrize("count", [0, 5, 12])
def test_other_answers_come_first_and_then_other_losses(classifier, count):
    net, criterion, (_, _, test) = classifier
    quantized, columns = judged(net, criterion, test, bits=2)
    table = changed_table(context(net, criterion), quantized, test, columns, count=count)
    small = quantize_model(net, quantized).eval()
    inputs, labels = (torch.cat(part) for part in zip(*test, strict=True))
    with torch.no_grad():
        was, became = (one(inputs).argmax(1) for one in (net, small))
        losses = [nn.functional.cross_entropy(one(inputs), labels, reduction="none")
                  for one in (net, small)]  # fmt: skip
    moved = (losses[1] - losses[0]).abs().tolist()
    order = sorted(range(len(labels)), key=lambda i: (was[i] == became[i], -moved[i]))
    assert table["example"].tolist() == order[:count]
    for name, expected in (("was", was), ("became", became), ("target", labels)):
        assert table[name].tolist() == expected[order[:count]].tolist()
    for name, expected in zip(("original_loss", "loss"), losses, strict=True):
        np.testing.assert_allclose(table[name].astype(float), expected[order[:count]], rtol=1e-4)
    assert set(table["kind"]) == ({"numbers"} if count else set())


@pytest.mark.parametrize("criterion", [nn.BCELoss(), nn.BCEWithLogitsLoss()])
def test_two_classes_by_one_output_are_cut_as_they_are_judged(criterion):
    torch.manual_seed(0)
    end = [nn.Sigmoid()] if isinstance(criterion, nn.BCELoss) else []
    net = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0), *end)
    x = torch.randn(400, 6)
    batches = [(x, (x[:, 0] > 0).float())]
    quantized, columns = judged(net, criterion, batches, bits=2)
    table = changed_table(context(net, criterion), quantized, batches, columns, count=400)
    flipped = columns["flipped"][table["example"]]
    assert flipped.any()
    assert ((table["was"] != table["became"]) == flipped).all()
    right = columns["correct"][table["example"]]
    assert ((table["became"] == table["target"]) == right).all()


def test_a_picture_comes_back():
    torch.manual_seed(0)
    images = torch.rand(40, 1, 9, 7)
    net = nn.Sequential(nn.Flatten(), nn.Linear(63, 2))
    _, _, test = create_dataloaders(Tensors(images, torch.arange(40) % 2))
    quantized, columns = judged(net, nn.CrossEntropyLoss(), test)
    table = changed_table(context(net, nn.CrossEntropyLoss()), quantized, test, columns, count=9)
    given = torch.cat([batch[0] for batch in test])
    for row in table.to_dict("records"):
        assert (row["kind"], row["shape"]) == ("picture", "9x7x1")
        raw = np.frombuffer(base64.b64decode(row["input"]), dtype=np.uint8).reshape(9, 7)
        assert np.abs(raw / 255 - given[row["example"], 0].numpy()).max() < 0.01


def test_a_text_comes_back():
    codes = torch.tensor([[1, 2, 0], [2, 2, 1]] * 10)
    net = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(12, 2))
    batches = [(codes, torch.arange(20) % 2)]
    quantized, columns = judged(net, nn.CrossEntropyLoss(), batches)
    made = context(net, nn.CrossEntropyLoss())
    for characters, texts in ((["", "a", "ß"], {"aß", "ßßa"}), (["", "a"], {"a?", "??a"})):
        table = changed_table(made, quantized, batches, columns, count=20, characters=characters)
        assert set(map(json.loads, table["input"])) == texts
    assert set(changed_table(made, quantized, batches, columns, count=3)["kind"]) == {"numbers"}


@pytest.mark.parametrize("lengths", [(3, 3), (3, 4)])
def test_a_regression_has_no_answers_and_batches_that_stay_no_rows(lengths):
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(1)

    batches = [(torch.randn(5, n, 4), torch.randn(5, 2)) for n in lengths]
    net = Mean(4, 2)
    quantized, columns = judged(net, nn.MSELoss(), batches)
    table = changed_table(context(net, nn.MSELoss()), quantized, batches, columns, count=12)
    assert list(table) == list(COLUMNS)
    assert len(table) == (10 if lengths == (3, 3) else 0)
    assert table[["was", "became", "target"]].isna().all(axis=None)
