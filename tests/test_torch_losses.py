"""A function of torch's is the criterion that its module is."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import loss as torch_losses

from quantifind.learning import learn
from quantifind.metrics import outcome
from quantifind.mixed_precision.measurements import Measurements
from quantifind.strategy import uniform_strategy
from quantifind.utils.torch_losses import as_module
from quantifind.workflow.evaluation_workflow import evaluate_strategies

# by each module that can be made without options the function that it calls itself
PAIRS = {
    name: (kind, function)
    for name, kind in vars(torch_losses).items()
    if name.endswith("Loss") and not name.startswith("_") and kind is not nn.LinearCrossEntropyLoss
    for function in vars(F).values()
    if inspect.isfunction(function) and f"F.{function.__name__}(" in inspect.getsource(kind.forward)
}
OPTIONS = {
    "CrossEntropyLoss": [
        {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 1.0, 3.0])},
        {"ignore_index": 0, "reduction": "sum"},
    ],
    "NLLLoss": [{"weight": torch.tensor([0.5, 1.0, 3.0]), "ignore_index": 1}],
    "BCEWithLogitsLoss": [{"pos_weight": torch.tensor([0.5, 1.0, 3.0])}, {"reduction": "sum"}],
    "MSELoss": [{"reduction": "sum"}, {"reduction": "none"}],
    "HuberLoss": [{"delta": 0.3}],
    "SmoothL1Loss": [{"beta": 0.3}],
    "PoissonNLLLoss": [{"log_input": False}],
    "MultiMarginLoss": [{"p": 2, "margin": 0.5}],
}


def test_most_losses_are_there():
    assert len(PAIRS) >= 19
    assert OPTIONS.keys() <= PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_a_function_is_its_module(name):
    """With the module's options, and those that it has by default."""
    kind, function = PAIRS[name]
    for options in ({}, *OPTIONS.get(name, [])):
        made, own = as_module(functools.partial(function, **options)), kind(**options)
        assert type(made) is kind
        # what torch gives each module to work with, buffers of weights among it
        for key in inspect.signature(kind).parameters.keys() - {"size_average", "reduce"}:
            assert str(getattr(made, key, None)) == str(getattr(own, key, None)), key
    assert type(as_module(function)) is kind


def test_any_other_criterion_stays():
    def own(outputs, targets):
        return F.mse_loss(outputs, targets)

    partial = functools.partial
    others = [None, own, nn.CrossEntropyLoss(), partial(own), partial(nn.MSELoss()), F.relu]
    others += [partial(F.mse_loss, weight=torch.ones(3)), partial(F.cross_entropy, torch.ones(2))]
    for other in others:
        assert as_module(other) is other


TARGETS = {
    "CrossEntropyLoss": lambda made: made.argmax(1),
    "BCEWithLogitsLoss": lambda made: (made > 0).float(),
    "MSELoss": lambda made: made + 1,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in TARGETS for options in ({}, *OPTIONS[name])],
    ids=str,
)
def test_wherever_a_criterion_is_given(name, options):
    torch.manual_seed(0)
    kind, function = PAIRS[name]
    net, x = nn.Linear(4, 3), torch.randn(24, 4)
    with torch.no_grad():
        targets = TARGETS[name](net(x) + torch.randn(24, 3))
    data, strategy = [(x, targets)], uniform_strategy(net, 3)
    own, given = kind(**options), functools.partial(function, **options)
    how = {"epochs": 2, "label_weight": float(name != "BCEWithLogitsLoss")}
    for asked in (
        lambda c: outcome(net, data, c).calibrated().gain,
        lambda c: evaluate_strategies(net, [strategy], data, c).to_dict("list"),
        lambda c: Measurements.start(net, data, data, c).original.calibrated_criterion,
        lambda c: learn(net, strategy, data, criterion=c, **how).tensors["weight"].codes.tolist(),
    ):
        assert str(asked(given)) == str(asked(own))
