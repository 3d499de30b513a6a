"""The ratio at each network's own temperature, beside torch and scipy on raw logits."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from scipy import optimize
from torch import nn

from quantifind import certify, evaluate_strategies, find_strategy, quantize_model
from quantifind.certification.digits import limits_in_words
from quantifind.certification.goal import DEFAULT_LIMIT
from quantifind.certification.measures import calibrated, degradation, examples_needed
from quantifind.metrics import columns_of, compared, outcome
from quantifind.utils.loaders import Tensors, create_dataloaders

SEEDS = st.integers(0, 1_000)
CRITERIA = {
    "softmax": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 1.0])),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "sigmoid": nn.BCEWithLogitsLoss(),
    "squares": nn.MSELoss(),
}


def case(kind, scale=3.0, examples=600):
    """Outputs of two networks, and targets."""
    generator = torch.Generator().manual_seed(0)
    outputs = scale * torch.randn(examples, 4, generator=generator)
    noisy = 1.7 * outputs + torch.randn(examples, 4, generator=generator)
    blurred = outputs / scale + torch.randn(examples, 4, generator=generator)
    if kind == "sigmoid":
        targets = (blurred > 0).float()
    elif kind == "squares":
        targets = blurred
    else:
        targets = blurred.argmax(1)
    return outputs, noisy, targets


def judged_pair(kind, **how):
    criterion = CRITERIA[kind]
    outputs, noisy, targets = case(kind, **how)
    float_, other = (
        outcome(nn.Identity(), [(each, targets)], criterion) for each in (outputs, noisy)
    )
    return columns_of(compared(other, float_.calibrated())), (outputs, noisy, targets)


def best_loss(criterion, outputs, targets):
    def loss(logarithm):
        return criterion(outputs.double() * math.exp(logarithm), _exact(targets)).item()

    found = optimize.minimize_scalar(
        loss, bounds=(-2, 1.2), method="bounded", options={"xatol": 1e-9}
    )
    return found.fun, math.exp(-found.x)


def _exact(targets):
    return targets.double() if targets.is_floating_point() else targets


@pytest.mark.parametrize("kind", ["softmax", "smoothed", "sigmoid", "squares"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_calibrated_losses_are_those_of_torch(kind, scale):
    columns, (outputs, noisy, targets) = judged_pair(kind, scale=scale)
    row = degradation(columns)
    (above, temperature), (below, _) = (
        best_loss(CRITERIA[kind], each, targets) for each in (noisy, outputs)
    )
    assert row["calibrated_ratio"] == pytest.approx(above / below, rel=2e-4)
    assert row["temperature"] == pytest.approx(temperature, rel=0.02)


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("softened", [0.5, 0.8, 1.25])
def test_softening_buys_nothing(kind, softened):
    """Outputs multiplied by any number are as good as before, whatever the criterion ratio says."""
    criterion, (outputs, _, targets) = CRITERIA[kind], case(kind)
    float_, other = (
        outcome(nn.Identity(), [(each, targets)], criterion)
        for each in (outputs, softened * outputs)
    )
    row = degradation(columns_of(compared(other, float_.calibrated())))
    assert row["calibrated_ratio"] == pytest.approx(1, abs=1e-3)
    assert abs(row["criterion_ratio"] - 1) > 0.01
    assert row["calibrated_ratio_bound"] < 1.01


def test_fidelity_and_flips_are_those_of_a_loop():
    columns, (outputs, noisy, targets) = judged_pair("softmax")
    row = degradation(columns)
    _, temperature = best_loss(CRITERIA["softmax"], outputs, targets)
    soft = [(each.double() / temperature).log_softmax(1) for each in (outputs, noisy)]
    apart = F.kl_div(soft[1], soft[0], log_target=True, reduction="none").sum(1)
    loss = F.nll_loss(soft[0], targets)
    assert row["fidelity"] == pytest.approx((apart.mean() / loss).item(), rel=2e-3)
    assert row["flips"] == (outputs.argmax(1) != noisy.argmax(1)).double().mean().item()


def test_what_is_measured_on_parts_is_that_of_the_whole():
    """A temperature that validation data fixed is used as it is."""
    columns, (_, noisy, targets) = judged_pair("softmax")
    fixed = calibrated(columns, gain=0.5)["calibrated_loss"]
    wanted = F.cross_entropy(0.5 * noisy, targets, reduction="none").numpy()
    np.testing.assert_allclose(fixed, wanted, atol=0.02 * wanted.mean())


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(-8, 8, width=16), noise=st.sampled_from([0.0, 0.5]), seed=SEEDS)
@example(factor=0.0, noise=0.0, seed=0)
@example(factor=1.0, noise=0.0, seed=0)
def test_the_gain_of_squares_is_that_of_least_squares(factor, noise, seed):
    """Where that is above 0, and more than rounding is left of the loss."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(50, 4, generator=generator)
    targets = factor * outputs + noise * torch.randn(50, 4, generator=generator)
    found = outcome(nn.Identity(), [(outputs, targets)], nn.MSELoss()).calibrated()
    best = (outputs.double() * targets.double()).sum() / outputs.double().square().sum()
    if best <= 0 or (noise == 0 and factor != 1):
        assert found.gain is None
        assert found.calibrated_criterion == found.criterion
    else:
        assert found.gain == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.0, 2.0, 3.0])
def test_what_no_gain_suits_has_other_limits(factor, capsys):
    """Targets that are all 0, or proportional to the outputs."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3), torch.randn(300, 6)
    loader = [(some, factor * net(some).detach()) for some in x.split(60)]
    how = {"widths": [4, 6, 8, 12], "effort": 40}
    found = find_strategy(net, loader, loader, nn.MSELoss(), **how)
    assert found.goal.limits == {"relative_error": 0.05}
    assert found.temperature is None or factor == 1
    assert certify(net, found, loader).strategy is not None
    said = " ".join(capsys.readouterr().err.split())
    assert "There is no calibrated ratio" in said
    with pytest.raises(ValueError, match=r"limit calibrated_ratio.*at the best temperature"):
        find_strategy(
            net, loader, loader, nn.MSELoss(), limit={"calibrated_ratio": 1.1, "fidelity": 1.0}
        )
    if factor != 1:
        ratio = {"criterion_ratio": 1.05}
        found = find_strategy(net, loader, loader, nn.MSELoss(), limit=ratio, **how)
        assert found.chosen["criterion_ratio_bound"] <= 1.05


def test_the_gain_of_a_tiny_error_is_exact():
    """Of a network in float32, whose squared error is in the last digits of its outputs."""
    torch.manual_seed(0)
    net, x = nn.Linear(16, 16), torch.randn(400, 16)
    y = net(x).detach()
    y = y * (1 + 1e-7 * torch.randn_like(y))
    judged = outcome(net, [(x, y)], nn.MSELoss()).calibrated()
    best = optimize.minimize_scalar(
        lambda t: (((1 + t) * net(x).double() - y.double()) ** 2).mean().item(),
        bounds=(-1e-6, 1e-6),
        method="bounded",
        options={"xatol": 1e-13},
    )
    assert judged.gain - 1 == pytest.approx(best.x, abs=1e-10)
    assert judged.calibrated_criterion == pytest.approx(best.fun, rel=1e-3)
    loader = [(x, y)]
    found = find_strategy(net, loader, loader, nn.MSELoss(), limit={"calibrated_ratio": 1.05})
    assert found.mean_bits < 32


def test_a_temperature_that_losses_do_not_give_is_said(capsys):
    """Of a network that is always right the loss falls with every gain."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(1600, 4)
    loader = list(zip(x.split(400), net(x).argmax(1).split(400), strict=True))
    find_strategy(net, loader, loader, nn.CrossEntropyLoss(), limit={"calibrated_ratio": 2})
    assert "still falls at a temperature of 0.262" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["criterion_ratio", "calibrated_ratio", "accuracy_drop", "flips"])
@pytest.mark.parametrize("share", [0.2, 0.7, 1.5])
def test_so_many_examples_as_are_said_are_enough(name, share):
    """And a few less are not, where their proportions stay."""
    columns, _ = judged_pair("softmax", examples=300)
    row = degradation(columns)
    limits = {name: row[name] + share * (row[f"{name}_bound"] - row[name])}
    needed = examples_needed(columns, limits, 0.95)

    def bound(count):
        again = {key: column[np.arange(count) % 300] for key, column in columns.items()}
        return degradation(again, gain=1 / row["temperature"])[f"{name}_bound"]

    assert bound(needed) <= limits[name]
    assert (needed == 300) == (share > 1)
    assert share > 1 or bound(int(0.85 * needed)) > limits[name]
    assert examples_needed(columns, {name: row[name] - 1e-9}, 0.95) is None
    few = {key: column[:12] for key, column in columns.items()}
    examples_needed(few, limits, 0.95)  # ends, however few they are


@pytest.mark.parametrize(
    ("criterion", "labels", "wanted"),
    [
        (nn.NLLLoss(), True, {"criterion_ratio": 1.01, "accuracy_drop": 0.003}),
        (nn.L1Loss(), False, {"relative_error": 0.05}),
        (nn.MSELoss(), False, {"calibrated_ratio": 1.01}),
        (nn.functional.mse_loss, False, {"calibrated_ratio": 1.01}),
        (None, False, {"relative_error": 0.05}),
    ],
)
def test_the_default_limit_of_a_loss_of_ones_own(criterion, labels, wanted, capsys):
    """What takes its place is said."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
    x = torch.randn(1600, 4)
    made = net(x).detach()
    targets = made.argmax(1) if labels else made + 0.1 * torch.randn_like(made)
    loader = list(zip(x.split(400), targets.split(400), strict=True))
    found = find_strategy(net, loader, loader, criterion, widths=[8, 12, 16])
    assert found.goal.limits == wanted
    said = " ".join(capsys.readouterr().err.split())
    replaced = criterion is not None and "calibrated_ratio" not in wanted
    assert ("There is no calibrated ratio" in said) == replaced
    assert not replaced or f"temperature, too: the limit is {limits_in_words(wanted)}" in said


def test_the_default_limit_and_its_certificate():
    torch.manual_seed(0)
    inputs = torch.randn(20_000, 6)
    labels = (inputs[:, :3] + torch.randn(20_000, 3) / 2).argmax(1)
    train, val, test = create_dataloaders(
        Tensors(inputs, labels), batch_size=250, fractions=(0.3, 0.5, 0.2)
    )
    net, criterion = nn.Linear(6, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for some, wanted in train:
        optimizer.zero_grad()
        criterion(net(some), wanted).backward()
        optimizer.step()
    found = find_strategy(net, train, val, criterion)
    assert found.goal.limits == DEFAULT_LIMIT
    assert found.temperature is not None
    assert all(found.chosen[f"{n}_bound"] <= v for n, v in DEFAULT_LIMIT.items())
    proof = certify(net, found, test, limit={"calibrated_ratio": 2.0, "flips": 0.5})
    again = evaluate_strategies(
        net,
        found.ladder["strategy"],
        test,
        criterion,
        quantized=found.ladder["quantized"],
        temperatures=found.ladder["temperature"].tolist(),
        original_temperature=found.temperature,
    )
    assert proof.steps["calibrated_ratio"].tolist() == again["calibrated_ratio"].tolist()
    by_hand = quantize_model(net, found.ladder["quantized"].iloc[-1])
    with torch.no_grad():
        inputs, targets = (torch.cat(each) for each in zip(*test, strict=True))
        above, below = (
            criterion(n(inputs) / t, targets).item()
            for n, t in ((by_hand, found.ladder["temperature"].iloc[-1]), (net, found.temperature))
        )
    assert again["calibrated_ratio"].iloc[-1] == pytest.approx(above / below, rel=1e-3)
