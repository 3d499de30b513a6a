"""What gradients predict, what is measured of it, and what a search may cost."""

import itertools
import math
import os
import random
import re
import signal
import statistics

import pandas as pd
import pytest
import torch
from torch import nn

from quantifind.certification.goal import Goal
from quantifind.certification.measures import degradation
from quantifind.mixed_precision import exploration
from quantifind.mixed_precision import survey as survey_module
from quantifind.mixed_precision.anchors import near_limit
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.passes import Passes
from quantifind.mixed_precision.rounded_options import RoundedOptions
from quantifind.mixed_precision.scores import score_options
from quantifind.mixed_precision.search_space import choice_key, default_search_space
from quantifind.mixed_precision.sensitivity import (
    increase_of,
    measure_sensitivity,
    rank_correlations,
)
from quantifind.mixed_precision.survey import survey
from quantifind.search import find_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.loaders import Tensors, create_dataloaders


class Sequences(nn.Module):
    """A recurrent layer used twice; classes at each position, in the second axis."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x)[0])[0]).movedim(-1, 1)


def images(classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, 6, 6, generator=generator)
    signs, labels = (x[:, 0, :2, 0] > 0).float(), x[:, 0, 0, :3].argmax(1)
    return {
        "softmax": (images(3), x, labels, nn.CrossEntropyLoss()),
        "sigmoid": (images(2), x, signs, nn.BCEWithLogitsLoss()),
        "numbers": (images(2), x, x[:, 0, :2, 0].sin(), nn.MSELoss()),
        "positions": (Sequences(), x[:, 0], x[:, 0, :, :3].argmax(-1), nn.CrossEntropyLoss()),
    }


def measurements_of(name, **options):
    torch.manual_seed(0)
    net, inputs, targets, criterion = cases()[name]
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        optimizer.step()
    train, val, _ = create_dataloaders(
        Tensors(inputs, targets), batch_size=32, fractions=(0.3, 0.6, 0.1)
    )
    return Measurements.start(net, train, val, criterion, **options)


@pytest.mark.parametrize("name", list(cases()))
def test_small_changes_are_predicted(name):
    """On the same examples, in the mean over what is drawn; the measured value is the oracle."""
    measurements = measurements_of(name)
    space = default_search_space(measurements.model, measurements.facts, [5, 7])
    found = measure_sensitivity(measurements, space, precision=0)
    options = {n: [c for c in some if c.rounding == "nearest"] for n, some in space.tensors.items()}
    keys = {n: [choice_key("tensors", n, c) for c in some] for n, some in options.items()}
    quantized = {n: [found.rounded_options[key] for key in some] for n, some in keys.items()}
    judged = measurements.evaluator.batches()
    batches = [batch[i : i + 8] for batch in judged for i in range(0, len(batch), 8)]
    model, criterion = measurements.model, measurements.criterion
    gain = measurements.original.gain or 1.0
    draws = [
        score_options(model, criterion, batches, quantized, gain=gain, seed=s) for s in range(4)
    ]
    off = []
    for n, some in keys.items():
        for i, key in enumerate(some):
            predicted = statistics.mean(scores[n][i] for scores in draws)
            off.append(math.log(predicted / found.loss_increases[key]))
    assert abs(statistics.median(off)) < math.log(1.3)
    assert all(abs(one) < math.log(3) for one in off)


def test_what_no_change_reaches_is_scored_0():
    model = nn.LSTM(3, 2)
    model.unused = nn.Linear(2, 2)
    measurements = Measurements.start(model, [torch.randn(8, 3)] * 2, [torch.randn(8, 3)] * 2, None)
    space = default_search_space(measurements.model, measurements.facts, [2])
    found = survey(measurements, space, Goal.of({"relative_error": 0.1}, None))[0]
    assert (
        found.predicted[choice_key("tensors", "unused.weight", space.tensors["unused.weight"][0])]
        == 0
    )


def test_options_near_the_frontier_are_enough():
    """The best allocation by what was measured near the frontier is that of all measured."""
    measurements, goal = measurements_of("softmax"), Goal.of(1.05, None)
    space = default_search_space(measurements.model, measurements.facts, range(1, 11))
    sensitivity, allocation = survey(measurements, space, goal, 0)
    whole = measure_sensitivity(measurements, space, precision=0)
    count = sum(len(choices) for *_, choices in space.items())
    assert len(sensitivity.measured) < 0.75 * count
    budget = allocation.cost(
        allocation.alone(allocation.strategy([len(g) // 2 for g in allocation.groups]).tensors, {})
    )
    assignment = allocation.solve(budget)
    assert assignment is not None
    chosen = allocation.strategy(assignment).tensors
    found = sum(
        whole.loss_increases[choice_key("tensors", n, c)]
        for n, c in chosen.items()
        if c is not None
    )
    best = type(allocation).of(measurements, whole, goal)
    least = best.solve(budget)
    assert found <= 1.25 * sum(g[i].loss_increase for g, i in zip(best.groups, least, strict=True))


def test_the_table_says_what_is_predicted_alone():
    measurements = measurements_of("softmax")
    space = default_search_space(measurements.model, measurements.facts, range(1, 11))
    table = survey(measurements, space, Goal.of(1.05, None))[0].table
    predicted = table[table["examples"] == 0]
    assert 0 < len(predicted) < len(table)
    assert predicted["criterion_ratio"].isna().all()
    assert table[["loss_increase", "original_criterion", "predicted_increase"]].notna().all().all()


@pytest.mark.parametrize("limit", [1.0, 1.3, 1e9])
def test_something_is_measured_whatever_the_limit(softmax, limit):
    space = default_search_space(softmax.model, softmax.facts, [4, 8])
    found, _ = survey(softmax, space, Goal.of(limit, None))
    assert found.measured


def test_what_is_predicted_alone_is_not_correlated():
    rows = [{"loss_increase": x, "sqnr_db": -x, "examples": 9} for x in (1.0, 2.0, 3.0)]
    predicted = [{"loss_increase": x, "sqnr_db": x, "examples": 0} for x in (4.0, 5.0, 6.0)]
    assert rank_correlations(pd.DataFrame(rows + predicted))["sqnr_db"] == pytest.approx(1)


def test_passes_are_counted_within_their_phases():
    passes = Passes(examples=100, effort=10)
    passes.add(100)
    with passes.of("one", 0.5):
        assert passes.left == pytest.approx(4.5)
        passes.add(200)
        with passes.of("inner", 0.1):
            assert passes.left == pytest.approx(0.25)
        passes.add(300)
        assert passes.left == 0
    with passes.of("rest"):
        assert passes.left == pytest.approx(4)
    with passes.of("free", math.inf):
        passes.add(10**6)
        assert passes.left == math.inf
    assert passes.taken == pytest.approx(1 + 5 + 10**4)
    assert passes.by_phase == {"network": 1, "one": 5, "free": 10**4}


def search(measurements, effort=10_000, **options):
    return find_strategy(
        measurements.model,
        measurements.train_loader,
        list(measurements.evaluator.batches()),
        measurements.criterion,
        effort=effort,
        **{"limit": 1.1, "widths": [2, 3, 4, 8], **options},
    )


@pytest.fixture(scope="module")
def softmax():
    return measurements_of("softmax")


def test_effort_bounds_the_passes(softmax):
    """But for the wave of candidates that is under way; what is left out is said."""
    found = search(softmax, effort=60)
    assert found.passes.taken <= 70
    assert found.passes.left_out
    assert found.goal.keeps(found.chosen)
    with pytest.raises(ValueError, match=r"effort is 3: the smallest search .* takes \d+ passes"):
        search(softmax, effort=3)


@pytest.mark.parametrize("few", [4, 20, 60])
def test_few_validation_examples_are_searched_with(few):
    """By default, whatever a pass of so many training examples costs; an effort says why not."""
    torch.manual_seed(0)
    net, x = nn.Linear(8, 4), torch.randn(4_096 + few, 8)
    y = net(x).detach() + torch.randn(len(x), 4)
    train, val = [(x[few:], y[few:])], [(x[:few], y[:few])]
    how = {"limit": 3.0, "widths": [4, 8]}
    found = find_strategy(net, train, val, nn.MSELoss(), **how)
    assert found.goal.keeps(found.chosen)
    assert math.isfinite(found.passes.effort)
    least = survey_module.CANDIDATES + 4_096 / few
    assert found.passes.effort > least
    said = f"a pass is only {few} validation examples and 4,096 training examples calibrate"
    with pytest.raises(ValueError, match=f"effort is 9: .*{said}"):
        find_strategy(net, train, val, nn.MSELoss(), effort=9, **how)


def test_an_effort_too_small_for_wider_widths(softmax):
    """Says what is nearest of the narrow ones, not that an effort that was enough is too small."""
    needed = re.compile(r"takes (\d+) passes")
    with pytest.raises(ValueError, match=needed) as error:
        search(softmax, effort=3, widths=None)
    least = int(needed.search(str(error.value))[1])
    with pytest.raises(ValueError, match=r"no candidate keeps .* time: .*more than 16 bits"):
        search(softmax, effort=least, widths=None, limit={"relative_error": 1e-9})


def test_what_is_kept_counts_as_it_did(softmax, tmp_path):
    first, again = (search(softmax, effort=60, folder=tmp_path) for _ in range(2))
    assert first.passes.by_phase == pytest.approx(again.passes.by_phase)
    assert first.strategy == again.strategy


def test_time_ends_a_search(softmax, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"seconds is 0\.001: over before .*; give a folder"):
        search(softmax, seconds=0.001)
    with pytest.raises(ValueError, match="what was done is in"):
        search(softmax, seconds=0.001, folder=tmp_path)
    # time is up once there is an answer
    walk, times = exploration._walk_down, []

    def late(candidates, budgets):
        times.append(walk(candidates, budgets))
        candidates.measurements.passes.deadline = 0.0

    monkeypatch.setattr(exploration, "_walk_down", late)
    found = search(softmax, seconds=10_000)
    assert found.goal.keeps(found.chosen)
    assert found.passes.left_out
    assert len(times) == 2


def test_an_interrupt_gives_the_best_so_far(softmax, tmp_path, monkeypatch):
    whole = search(softmax)
    assert whole.passes.left_out == []
    moves, before = exploration.neighbours, signal.getsignal(signal.SIGTERM)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from moves(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(exploration, "neighbours", interrupted)
        found = search(softmax, folder=tmp_path, proxies=True)
    assert found.passes.left_out == ["interrupted"]
    assert "hessian_increase" not in found.sensitivity
    assert found.goal.keeps(found.chosen)
    assert signal.getsignal(signal.SIGTERM) == before
    again = search(softmax, folder=tmp_path)
    assert again.strategy == whole.strategy


def test_between_what_keeps_the_limit_and_what_does_not_it_is_halved(softmax, monkeypatch):
    tried = []
    halve = exploration._halve

    def noted(candidates):
        before = dict(candidates.assignments)
        high = candidates.allocation.total(candidates.best_assignment())
        halve(candidates)
        new = [a for key, a in candidates.assignments.items() if key not in before]
        tried.extend((candidates.allocation.total(a), high) for a in new)

    monkeypatch.setattr(exploration, "_halve", noted)
    search(softmax)
    assert len(tried) <= exploration.HALVINGS
    assert all(cost < high for cost, high in itertools.islice(tried, 1))


@pytest.mark.parametrize("seed", range(2))
def test_bad_predictions_cost_no_answer(seed, monkeypatch):
    """By scores fewer bits of some tensors lose less, and no passes are left to notice it in the
    survey: an allocation keeps what one depth for all keeps, in at most a tenth more bytes."""
    generator, turned = random.Random(seed), dict[str, bool]()

    def wrong(model, criterion, batches, options, **how):
        scores = score_options(model, criterion, batches, options, **how)
        for name in scores:
            turned.setdefault(name, generator.random() < 0.5)
        return {n: sorted(some, reverse=not turned[n]) for n, some in scores.items()}

    monkeypatch.setattr(survey_module, "score_options", wrong)
    measurements, goal = measurements_of("softmax"), Goal.of(1.05, None)
    measurements.passes.effort = 150
    space = default_search_space(measurements.model, measurements.facts, range(2, 11))
    with measurements.passes.of("sensitivity", 1e-9):
        sensitivity, allocation = survey(measurements, space, goal)
    assert not sensitivity.measured
    candidates = Candidates(measurements, allocation, 0.95)
    exploration.explore(candidates, sensitivity, 0.25)
    best, uniform = candidates.best("allocated"), candidates.best("uniform")
    assert best is not None
    assert uniform is None or best["model_bytes"] <= 1.1 * uniform["model_bytes"]


def test_what_keeps_a_limit_diverges_by_what_is_near_it():
    """Of one depth for all, as an oracle: the first that keeps the goal, and the next that does
    not, are within what is near; whatever the measure."""
    measurements = measurements_of("softmax")
    space = default_search_space(measurements.model, measurements.facts, range(1, 13))
    rounded_options, depths = RoundedOptions(measurements, space), []
    for bits in range(1, 13):
        choices = {n: [c for c in some if c.width == bits] for n, some in space.tensors.items()}
        keys = {n: choice_key("tensors", n, some[0]) for n, some in choices.items()}
        quantized = Quantized({n: rounded_options[key] for n, key in keys.items()})
        depths.append(measurements.columns(f"all at {bits}", quantized))
    limits = {"calibrated_ratio": 1.01, "criterion_ratio": 1.1, "accuracy_drop": 0.02}
    limits |= {"flips": 0.05, "fidelity": 0.02, "relative_error": 0.05}
    for name, limit in limits.items():
        goal = Goal.of({name: limit}, None)
        low, high = near_limit(rounded_options, goal)
        kept = [increase_of(one) for one in depths if goal.keeps(degradation(one))]
        lost = [increase_of(one) for one in depths if not goal.keeps(degradation(one))]
        assert (low > 0) == bool(kept), name
        assert not kept or low <= max(kept), name
        assert not lost or min(lost) <= high < math.inf, name


def test_the_table_has_its_columns_whatever_the_effort():
    measurements = measurements_of("softmax")
    measurements.passes.effort = 150
    space = default_search_space(measurements.model, measurements.facts, range(2, 9))
    with measurements.passes.of("sensitivity", 1e-9):
        found, _ = survey(measurements, space, Goal.of(1.05, None))
    assert not found.measured
    wanted = {"loss_increase", "increase_error", "original_criterion", "predicted_increase"}
    assert wanted <= set(found.table.columns)
