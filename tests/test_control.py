"""The control of what is trained: the same training for float weights."""

import copy
import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch import nn

from quantifind.certification.certificate import ratio_interval
from quantifind.learning import learn, train_control
from quantifind.mixed_precision import learned_candidates as learned_control
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import student as students
from quantifind.runtime.control import Control
from quantifind.search import find_strategy
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.utils.naming import NotFinite
from quantifind.workflow.certification_workflow import certify, judge_ladder
from stages import ladder

RATE, SEED = 3e-3, 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def training(seed=1):
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(seed))
    return batch_loader(Tensors(x, x[:, :4].argmax(1)), batch_size=32, shuffle=True, seed=0)


def own_forward(model, batch):
    """For which no examples are blended."""
    return model(batch[0]), batch[1]


@pytest.mark.parametrize("label_weight", [0.3, 0.7])
def test_a_control_is_what_a_plain_loop_trains(label_weight):
    net, batches, epochs = network(), list(training()), 2
    before = copy.deepcopy(net.state_dict())
    strategy = uniform_strategy(net, 2)
    trained = [name for name, choice in strategy.tensors.items() if choice is not None]
    recipe = {"epochs": epochs, "forward": own_forward, "label_weight": label_weight}
    recipe["learning_rate"] = RATE
    control = train_control(net, strategy, batches, **recipe)
    expected = copy.deepcopy(net).requires_grad_(False)
    weights = [p.requires_grad_() for n, p in expected.named_parameters() if n in trained]
    optimizer, total = torch.optim.Adam(weights), epochs * len(batches)
    for step in range(total):
        x, y = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / total)) / 2
        wanted, found = net(x).detach(), expected(x)
        soft = F.softmax(wanted / 2, 1)
        divergence = (soft * (soft.log() - F.log_softmax(found / 2, 1))).sum(1).mean()
        optimizer.zero_grad()
        (4 * divergence + label_weight * F.cross_entropy(found, y)).backward()
        optimizer.step()
    assert not control.training
    for name, value in expected.state_dict().items():
        assert torch.allclose(control.state_dict()[name], value, atol=1e-4), name
        assert torch.equal(net.state_dict()[name], before[name]), name


def test_a_control_sees_what_the_codes_see(monkeypatch):
    seen, blended = [], students.blended

    def spy(batch):
        batch, blend = blended(batch)
        seen.append(batch.data[0].clone())
        return batch, blend

    monkeypatch.setattr(students, "blended", spy)
    net, recipe = network(), {"epochs": 1.5, "seed": SEED, "label_weight": 1.0}
    learn(net, uniform_strategy(net, 2), training(), **recipe)
    train_control(net, uniform_strategy(net, 4), training(), **recipe)
    assert len(seen) == 2 * 12
    assert all(torch.equal(*pair) for pair in zip(seen[:12], seen[12:], strict=True))


def test_what_stays_in_float_is_not_trained():
    net = network()
    strategy = Strategy({**uniform_strategy(net, 2).tensors, "3.weight": None})
    control = train_control(net, strategy, training(), epochs=1)
    assert torch.equal(control[3].weight, net[3].weight)
    assert not torch.equal(control[0].weight, net[0].weight)


def test_a_control_that_diverges_is_said():
    net = network()
    with pytest.raises(ValueError, match=r"the loss became .* by batch"):
        train_control(net, uniform_strategy(net, 2), training(), epochs=2, learning_rate=1e30)


@torch.no_grad()
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_matched_ratio_is_one_mean_loss_over_the_other(shuffle):
    """Of the same examples: a shuffled loader is gone through once."""
    net, other, criterion = network(), network(), nn.CrossEntropyLoss()
    other[3].bias[0] += 0.3
    x, y = training(2).dataset.tensors
    judged = batch_loader(training(2).dataset, batch_size=64, shuffle=shuffle, seed=0)
    strategies = [uniform_strategy(net, bits) for bits in (3, 8)]
    rows = {"strategy": strategies, "answer": ["trained", "as_is"]}
    rows["quantized"] = [quantize(net, strategy) for strategy in strategies]
    control = Control(dict(other.named_parameters()), (), 1.0)
    limits = {"criterion_ratio": 1.5}
    how = {"limits": limits, "control": control, "confidence": 0.9}
    found = judge_ladder(net, pd.DataFrame(rows), judged, criterion, **how).steps
    assert found.filter(regex="matched|control").iloc[1].isna().all()
    nets = (net, other, quantize_model(net, strategies[0]))
    plain, control, rounded = (F.cross_entropy(one(x), y).item() for one in nets)
    assert found["matched_ratio"][0] == pytest.approx(rounded / control)
    assert found["control_ratio"][0] == pytest.approx(control / plain)
    losses = [F.cross_entropy(one(x), y, reduction="none") for one in nets]
    for name, pair in (("matched_ratio", losses[2:0:-1]), ("control_ratio", losses[1::-1])):
        low, high = ratio_interval(*(each.numpy() for each in pair), confidence=0.9)
        assert found[f"{name}_low"][0] == pytest.approx(low, rel=1e-5)
        assert found[f"{name}_high"][0] == pytest.approx(high, rel=1e-5)


def test_a_search_with_labels_has_the_control_of_what_it_trained(tmp_path, monkeypatch):
    net, train, criterion = network(), training(), nn.CrossEntropyLoss()
    val = batch_loader(training(2).dataset, batch_size=64, shuffle=False, seed=0)
    how = {"limit": 1.5, "labels": True, "folder": tmp_path, "widths": [1, 2], "effort": 60}
    found = find_strategy(net, train, val, criterion, learn=1, **how)
    assert "trained" in set(found.candidates["answer"])
    x, y = val.dataset.tensors
    with torch.no_grad():
        nets = (found.control.network(net), net)
        losses = [F.cross_entropy(one(x), y).item() for one in nets]
    assert found.control.ratio == pytest.approx(losses[0] / losses[1], rel=1e-4)
    assert "float weights trained further by the same recipe" in str(found.control)

    steps = certify(
        net, found, batch_loader(training(3).dataset, batch_size=64, shuffle=False, seed=0)
    ).steps
    trained = found.ladder["answer"].to_numpy() == "trained"
    assert trained.any()
    assert np.array_equal(steps["matched_ratio"].notna(), trained)
    product = steps["matched_ratio"] * steps["control_ratio"]
    assert np.allclose(product[trained], steps["criterion_ratio"][trained])

    monkeypatch.setattr("quantifind.mixed_precision.learned_candidates.train_control", diverged)
    kept = find_strategy(net, train, val, criterion, learn=1, **how).control
    assert kept.ratio == found.control.ratio
    assert all(torch.equal(kept.weights[name], w) for name, w in found.control.weights.items())
    other = find_strategy(net, train, val, criterion, learn=0.5, **how).control
    assert math.isnan(other.ratio)
    assert not other.weights
    assert str(other) == (
        "The control of what was trained gives no matched ratio: the loss became nan by batch 7"
    )
    following = find_strategy(net, train, val, criterion, learn=1, **how | {"labels": False})
    assert following.control is None


def test_labels_that_a_criterion_can_t_be_learned_by_are_not_said_to_be():
    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets)

    val = batch_loader(training(2).dataset, batch_size=64, shuffle=False, seed=0)
    how = {"limit": 2.0, "learn": 0.5, "labels": True, "widths": [1], "effort": 20}
    found = find_strategy(network()[2:], wide(training()), wide(val), criterion, **how)
    assert found.control is None
    assert set(found.candidates["answer"]) == {"as_is", "following"}


def wide(loader):
    """Inputs of a part of `network`."""
    x, y = loader.dataset.tensors
    return batch_loader(Tensors(x.repeat(1, 3)[:, :16], y), batch_size=32, shuffle=False, seed=0)


@pytest.mark.parametrize("fault", ["", "the loss became inf by batch 3"])
def test_a_control_comes_back_from_its_file(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = network()
    weights = (
        {} if fault else {n: p.detach() + 1 for n, p in net.named_parameters() if n != "3.bias"}
    )
    control = Control(weights, (("0", "1"),), math.nan if fault else 0.84, fault)
    ladder.write_control(control)
    read = ladder.read_control()
    assert str(read) == str(control)
    assert read.folded == control.folded
    assert read.weights.keys() == weights.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in weights.items())
    ladder.write_control(None)
    assert ladder.read_control() is None


def diverged(*_args, **_kwargs):
    raise NotFinite("the loss became nan by batch 7")


def test_what_is_no_divergence_is_no_control(tmp_path, monkeypatch):
    """A disk that is full ends the search, which goes on another time."""
    net, train, criterion = network(), training(), nn.CrossEntropyLoss()
    val = batch_loader(training(2).dataset, batch_size=64, shuffle=False, seed=0)
    how = {"limit": 1.5, "labels": True, "folder": tmp_path, "widths": [1, 2], "effort": 60}

    def full(*args, **recipe):
        raise ValueError("checkpoint-0001.pt: can't be written (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr("quantifind.mixed_precision.learned_candidates.train_control", full)
        with pytest.raises(ValueError, match="No space left"):
            find_strategy(net, train, val, criterion, learn=1, **how)
    assert find_strategy(net, train, val, criterion, learn=1, **how).control.ratio > 0


@settings(max_examples=8, deadline=None)
@given(loss=st.sampled_from([0.0, 1e-9, 1e300, math.inf, math.nan]), scale=st.floats(1e-6, 1e6))
@example(loss=None, scale=0.0)
@example(loss=None, scale=1.0)
def test_a_control_far_worse_than_it_began_has_no_matched_ratio(loss, scale):
    """It has one or a fault in words, never both, whatever the losses are."""
    ratio, fault = learned_control.beside(scale if loss is None else loss, scale)
    has = scale > 0 and loss in (None, 0.0, 1e-9)
    assert math.isfinite(ratio) == has == (not fault)
    assert ratio == pytest.approx((scale if loss is None else loss) / scale) if has else fault


def test_a_float_network_without_loss_gives_no_matched_ratio():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 2), torch.randn(96, 4)
    train, val = (
        batch_loader(Tensors(x, net(x).detach()), batch_size=32, shuffle=s, seed=0)
        for s in (True, False)
    )
    found = find_strategy(net, train, val, nn.MSELoss(), learn=1, labels=True, widths=[2, 8])
    assert "trained" in set(found.candidates["answer"])
    assert found.control.fault == "the float network's loss on validation data is 0"
    assert math.isnan(found.control.ratio)
