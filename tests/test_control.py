"""The control of what is trained: the same training for float weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantifind.learning import learn, train_control
from quantifind.runtime import student as students
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.utils.loaders import Tensors, batch_loader

RATE, SEED = 3e-3, 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def training():
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    return batch_loader(Tensors(x, x[:, :4].argmax(1)), batch_size=32, shuffle=True, seed=0)


def own_forward(model, batch):
    """For which no examples are blended."""
    return model(batch[0]), batch[1]


@pytest.mark.parametrize("label_weight", [0.0, 0.7])
def test_a_control_is_what_a_plain_loop_trains(label_weight):
    net, batches, epochs = network(), list(training()), 2
    before = copy.deepcopy(net.state_dict())
    strategy = uniform_strategy(net, 2)
    trained = [name for name, choice in strategy.tensors.items() if choice is not None]
    recipe = {"epochs": epochs, "forward": own_forward, "temperature": 1.5}
    recipe |= {"label_weight": label_weight, "learning_rate": RATE}
    control = train_control(net, strategy, batches, **recipe)
    expected = copy.deepcopy(net).requires_grad_(False)
    weights = [p.requires_grad_() for n, p in expected.named_parameters() if n in trained]
    optimizer, total = torch.optim.Adam(weights), epochs * len(batches)
    for step in range(total):
        x, y = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / total)) / 2
        wanted, found = net(x).detach() / 1.5, expected(x)
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
    seen, blended = [], students._blended

    def spy(batch):
        batch, blend = blended(batch)
        seen.append(batch.data[0].clone())
        return batch, blend

    monkeypatch.setattr(students, "_blended", spy)
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
    with pytest.raises(ValueError, match="the loss became .* by batch"):
        train_control(net, uniform_strategy(net, 2), training(), epochs=2, learning_rate=1e30)
