"""The search finds the best of all strategies where all can be tried; what can't be had is said."""

import copy
import itertools
import math
import re
import statistics

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from conftest import count_measured
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from torch import nn

from quantifind.certification.certificate import minimum_safe_bits
from quantifind.certification.goal import SURE, Goal
from quantifind.metrics import outcome
from quantifind.mixed_precision import candidates as candidates_module
from quantifind.mixed_precision import learned_candidates, refinement
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.exploration import sweep_budgets
from quantifind.mixed_precision.found import found_by
from quantifind.mixed_precision.knapsack import Option
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import SearchSpace, default_search_space
from quantifind.mixed_precision.sensitivity import measure_sensitivity
from quantifind.network.trace import macs, trace
from quantifind.quantize import mean_bits, quantize_model
from quantifind.search import find_strategy
from quantifind.storage.artifact import pack
from quantifind.tensor.choice import Choice
from quantifind.utils import plugins
from quantifind.utils.loaders import Tensors, batch_loader, create_dataloaders, random_split
from quantifind.workflow.evaluation_workflow import compare

PLAIN = {"scheme": "uniform", "axis": 0, "scale_dtype": "float16"}
SEEDS = st.integers(0, 1_000)
CHOICES = [PLAIN | {"bits": bits} for bits in (2, 3, 4, 6, 8)]


def toy(*sizes: int, examples: int = 3_000, seed: int = 0):
    """A trained classifier of noisy data, which is never sure, and its loaders."""
    torch.manual_seed(seed)
    layers = [
        layer
        for before, after in itertools.pairwise(sizes)
        for layer in (nn.Linear(before, after, bias=False), nn.ReLU())
    ]
    net = nn.Sequential(*layers[:-1])
    inputs = torch.randn(examples, sizes[0])
    targets = (inputs[:, : sizes[-1]] + 0.7 * torch.randn(examples, sizes[-1])).argmax(1)
    counts = [examples - 2 * (examples // 3), examples // 3, examples // 3]
    train, val, test = random_split(Tensors(inputs, targets), counts)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    loaders = [
        batch_loader(split, batch_size=100, shuffle=split is train, seed=0)
        for split in (train, val, test)
    ]
    return net.eval(), *loaders


@pytest.fixture(scope="module")
def small():
    return toy(6, 5, 4)


def space(net):
    return {"tensors": {name: CHOICES for name, _ in net.named_parameters()}, "activations": {}}


def all_candidates(net, train, val, goal, given=None):
    """None measured yet."""
    measurements = Measurements.start(net, train, val, nn.CrossEntropyLoss())
    choices = SearchSpace(**(given or space(net)))
    sensitivity = measure_sensitivity(measurements, choices)
    allocation = Allocation.of(measurements, sensitivity, goal)
    return Candidates(measurements, allocation, 0.95)


def plain(found):
    """The table of a search without what is no plain value."""
    return found.candidates.drop(columns=["strategy", "quantized"])


@pytest.fixture(scope="module")
def everything(small):
    """All strategies of the search space, measured on all examples without scale adjustment."""
    net, train, val, _ = small
    candidates = all_candidates(net, train, val, Goal.of(1.0, None))
    options = [range(len(group)) for group in candidates.allocation.groups]
    trials = [candidates.allocated(one) for one in itertools.product(*options)]
    return candidates.measured(trials, race=[1.0])


@pytest.fixture(scope="module")
def sizes(everything):
    """The bytes of all strategies."""
    return [row["model_bytes"] for row in everything]


@pytest.fixture(scope="module")
def found(small):
    """By the default search space, and the network's state before."""
    net, train, val, _ = small
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return find_strategy(net, train, val, nn.CrossEntropyLoss(), limit=1.05), before


def efficient(row, rows):
    """Whether no other has as few bytes, and as small a prediction."""
    own = row["model_bytes"], row["predicted_fidelity"]
    others = [(r["model_bytes"], r["predicted_fidelity"]) for r in rows]
    return not any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in others)


def test_a_search_keeps_within_the_memory_that_is_allowed(small, tmp_path):
    """What GPTQ had none for is rounded to nearest, said in the strategy; more is no other's."""
    net, train, val, _ = small
    choices = [{"scheme": "uniform", "bits": b, "axis": 0, "rounding": "gptq"} for b in (3, 6)]
    tensors = {n: choices for n, _ in net.named_parameters()}
    how = {"limit": 1.2, "search_space": {"tensors": tensors}, "folder": tmp_path}
    found = find_strategy(net, train, val, nn.CrossEntropyLoss(), max_memory=1, **how)
    assert found.quantized.notes.keys() == tensors.keys()
    assert all("rounded to nearest" in note for note in found.quantized.notes.values())
    again = find_strategy(net, train, val, nn.CrossEntropyLoss(), **how)
    assert not again.quantized.notes
    with pytest.raises(ValueError, match="max_memory is 0: a number above 0"):
        find_strategy(net, train, val, nn.CrossEntropyLoss(), max_memory=0, **how)


@pytest.mark.parametrize("limit", [1.003, 1.01, 1.05, 1.2])
def test_a_limit_is_kept_with_no_more_bytes_than_the_best_allocation(small, everything, limit):
    """Of all strategies with fewer bytes, or less that is predicted, than any other."""
    net, train, val, _ = small
    goal = Goal.of(limit, None)
    least = min(r["model_bytes"] for r in everything if goal.keeps(r) and efficient(r, everything))
    found = find_strategy(
        net, train, val, nn.CrossEntropyLoss(), limit=limit, search_space=space(net)
    )
    strategy, table = found.strategy, found.candidates
    chosen = table[table["chosen"]].iloc[0]
    # scales that are fitted may take it below what the plain strategies reach
    assert chosen["model_bytes"] <= least
    assert chosen["criterion_ratio_bound"] <= limit
    assert chosen["strategy"] is strategy
    assert chosen["quantized"] is found.quantized


def test_coded_storage_takes_fewer_bytes_all_of_them_counted():
    net, train, val, _ = toy(20, 60, 6, examples=900)
    small = {"limit": {"relative_error": 0.1}, "effort": 40, "widths": [2, 3, 4, 6, 8]}
    packed, coded = (
        find_strategy(net, train, val, nn.CrossEntropyLoss(), storage=storage, **small)
        for storage in ("packed", "coded")
    )
    assert coded.model_bytes < 0.95 * packed.model_bytes
    assert coded.chosen["relative_error_bound"] <= 0.1
    assert all(
        tensor.storage == coded.strategy.tensors[name].storage
        for name, tensor in coded.quantized.tensors.items()
    )
    parts, _ = pack(coded.quantized)
    kept = sum(part.numel() * part.element_size() for part in parts.values())
    assert coded.model_bytes == kept


@settings(max_examples=40, deadline=None)
@given(power=st.integers(-100, 100), shape=hnp.array_shapes(min_dims=2, max_dims=3), seed=SEEDS)
def test_the_default_space_is_the_same_at_any_power_of_two(power, shape, seed):
    """Of what is coded, too: as many choices, of as many levels, their steps of the same size."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    net = nn.ParameterList([weight, torch.full(shape, 0.5)])
    plain = default_search_space(net, [], storage="coded").tensors
    with torch.no_grad():
        for parameter in net:
            parameter.mul_(2.0**power)
    scaled = default_search_space(net, [], storage="coded").tensors
    for name, choices in plain.items():
        assert [c.plain().get("bits") for c in choices] == [
            c.plain().get("bits") for c in scaled[name]
        ]
        steps = zip(coded(choices), coded(scaled[name]), strict=True)
        for one, other in steps:
            assert other["scale"] == pytest.approx(one["scale"] * 2.0**power, rel=2.0**-11)
            assert other["levels"] == pytest.approx(one["levels"], rel=2.0**-10, abs=2)


def coded(choices):
    found = [choice.plain() for choice in choices if choice.storage == "coded"]
    assert found
    return found


def test_as_many_bits_are_found_at_any_power_of_two():
    net, train, val, _ = toy(12, 24, 5, examples=600)
    how = {"limit": 1.2, "effort": 40, "storage": "coded", "widths": [2, 4, 8]}
    bits = {}
    for power in (0, -30, 20):
        scaled = copy.deepcopy(net)
        with torch.no_grad():
            scaled[0].weight.mul_(2.0**power)
            scaled[2].weight.mul_(2.0**-power)
        bits[power] = find_strategy(scaled, train, val, nn.CrossEntropyLoss(), **how).mean_bits
    parameters = list(net.parameters())
    wider = 16 * len(parameters) / sum(parameter.numel() for parameter in parameters)
    assert -0.02 < bits[-30] - bits[0] < wider + 0.02  # scales of 32 bits, not of 16
    assert bits[20] == pytest.approx(bits[-30], rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_a_budget_is_spent_as_well_as_by_the_best_of_all_strategies(
    small, everything, sizes, share
):
    net, train, val, _ = small
    budget = min(sizes) + share * (max(sizes) - min(sizes))
    goal = Goal.of(None, {"model_bytes": budget})
    least = min(goal.rank(row) for row in everything if goal.keeps(row))
    found = find_strategy(
        net,
        train,
        val,
        nn.CrossEntropyLoss(),
        budget={"model_bytes": budget},
        search_space=space(net),
    )
    table = found.candidates
    chosen = table[table["chosen"]].iloc[0]
    assert chosen["model_bytes"] <= budget
    assert goal.rank(chosen) <= least


def test_a_budget_is_spent_to_the_last_byte(small, sizes):
    net, train, val, _ = small
    most = max(sizes)
    found = find_strategy(
        net,
        train,
        val,
        nn.CrossEntropyLoss(),
        budget={"model_bytes": most},
        search_space=space(net),
    )
    table = found.candidates
    assert (table["model_bytes"] == most).any()


def test_what_is_found_needs_no_calibration_and_is_what_was_measured(small, found):
    (net, _, val, _), criterion = small, nn.CrossEntropyLoss()
    found, before = found
    table = found.candidates
    replica = quantize_model(net, found.quantized)
    measured = compare(outcome(replica, val, criterion), outcome(net, val, criterion))
    chosen = table[table["chosen"]].iloc[0]
    assert measured["criterion_ratio"] == pytest.approx(chosen["criterion_ratio"], rel=1e-6)
    assert mean_bits(net, found.quantized) == chosen["mean_bits"]
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_rows_and_ladder(small, found):
    net, train, *_ = small
    table = found[0].candidates
    assert table["model_bytes"].is_monotonic_decreasing
    products = macs(net, next(iter(train))[0])
    for cost in plugins.names("costs"):
        measure = plugins.load("costs", cost, "measure")
        for row in table.to_dict("records"):
            parts = measure(net, row["quantized"], products)
            assert row[cost] == pytest.approx(sum(parts.values()))
    assert table["chosen"].sum() == 1
    assert table.loc[table["chosen"], "on_ladder"].all()
    assert (table.loc[table["on_ladder"], "examples"] == 1_000).all()
    assert table["examples"].between(1, 1_000).all()
    # what is left where all others fail does not fail with them, if any strategy is so sure
    first, goal = found[0].ladder.iloc[0], found[0].goal
    assert goal.margin(first) >= SURE or first["model_bytes"] == table["model_bytes"].max()
    given_up = table[table["examples"] < 1_000]
    assert (given_up["criterion_ratio_bound"] > 1.05).all()


def test_rows_are_those_of_their_codes_whatever_was_searched_for_before(small, tmp_path):
    net, train, val, _ = small
    criterion = nn.CrossEntropyLoss()
    original = outcome(net, val, criterion)
    for limit in (1.2, 1.3, 1.5):
        how = {"limit": limit, "effort": 60, "folder": tmp_path}
        table = find_strategy(net, train, val, criterion, **how).candidates
        for row in table[table["examples"] == 1_000].to_dict("records"):
            measured = outcome(quantize_model(net, row["quantized"]), val, criterion)
            ratio = measured["loss"].mean() / original["loss"].mean()
            assert row["criterion_ratio"] == pytest.approx(ratio.item(), rel=1e-5)


def test_measures_and_costs(small):
    net, train, val, _ = small
    criterion = nn.CrossEntropyLoss()
    for limit in ({"accuracy_drop": 0.03}, {"relative_error": 0.05}):
        ((measure, value),) = limit.items()
        found = find_strategy(net, train, val, criterion, limit=limit, effort=60)
        table = found.candidates
        assert table.loc[table["chosen"], f"{measure}_bound"].item() <= value
    for cost, few in (("bit_operations", 32 * 4), ("energy_picojoules", None), ("mean_bits", 5.0)):
        whole = every_cost(net, train, val, cost)
        budget = whole / 4 if few is None else few if cost == "mean_bits" else whole * 4 / 32
        bits = [] if cost == "mean_bits" else [4, 8]
        how = {"budget": {cost: budget}, "activation_bits": bits, "effort": 60}
        found = find_strategy(net, train, val, criterion, **how)
        table = found.candidates
        assert (table[cost] <= budget * (1 + 1e-9)).all()
        assert any(s.activations for s in table["strategy"]) == bool(bits)


def every_cost(net, train, val, cost):
    """What the float network costs."""
    from quantifind.tensor.quantized import Quantized

    if cost == "mean_bits":
        return 32.0
    products = macs(net, next(iter(val))[0])
    return sum(plugins.load("costs", cost, "measure")(net, Quantized({}), products).values())


def test_activations_are_chosen_with_weights(small):
    net, train, val, _ = small
    budget = every_cost(net, train, val, "bit_operations") / 64
    found = find_strategy(
        net,
        train,
        val,
        nn.CrossEntropyLoss(),
        budget={"bit_operations": budget},
        activation_bits=[2, 4, 8],
    )
    strategy, table = found.strategy, found.candidates
    assert set(strategy.activations) == {"0.weight", "2.weight"}
    assert any(strategy.activations.values())
    assert table.loc[table["chosen"], "bit_operations"].item() <= budget * (1 + 1e-9)


def test_learning_goes_below_what_rounding_reaches():
    net, train, val, _ = toy(8, 32, 4)
    criterion = nn.CrossEntropyLoss()
    found = find_strategy(net, train, val, criterion, limit=1.05)
    rounded = found.candidates
    found = find_strategy(net, train, val, criterion, limit=1.05, learn=10)
    strategy, learned = found.strategy, found.candidates
    sizes = [table.loc[table["chosen"], "mean_bits"].item() for table in (rounded, learned)]
    assert sizes[1] < sizes[0]
    assert {choice.rounding for choice in strategy.tensors.values()} == {"learned"}
    assert outcome(quantize_model(net, found.quantized), val, criterion)["loss"].isfinite().all()


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("goal", [(2.0, None), (None, 2.2)], ids=["limit", "budget"])
def test_coded_codes_learn_to_be_few(goal, labels, monkeypatch):
    """As few as the goal lets them be, all bytes counted, beside what there was."""
    recipes = []

    def noted(call):
        return lambda *args, **recipe: recipes.append(recipe) or call(*args, **recipe)

    for name in ("learn_codes", "train_control"):
        monkeypatch.setattr(learned_candidates, name, noted(getattr(learned_candidates, name)))
    net, train, val, _ = toy(8, 64, 4, examples=1_500)
    coded = [{"scheme": "uniform", "levels": n, "storage": "coded"} for n in (3, 31)]
    given = {"tensors": {name: coded for name, _ in net.named_parameters()}}
    candidates = all_candidates(net, train, val, Goal.of(*goal), given)
    begun = (0, 0) if goal[1] is None else (1, 1)
    (before,) = candidates.measure([candidates.allocated(begun)])
    learned_candidates.learn_candidates(candidates, 2, labels)
    _, *rows = candidates.rows.values()
    assert len(rows) == learned_candidates.LEARNED
    shares = []
    for row in rows:
        assert row["answer"] == ("trained" if labels else "following")
        assert {c.rounding for c in row["strategy"].tensors.values()} == {"learned"}
        codes = torch.cat([t.codes.flatten() for t in row["quantized"].tensors.values()])
        shares.append((codes != 0).double().mean().item())
        assert shares[-1] == pytest.approx(float(row["origin"].split()[-3][:-1]) / 100, abs=2e-3)
        parts, _ = pack(row["quantized"])
        assert row["model_bytes"] == sum(part.nbytes for part in parts.values())
    # sparser where the goal is kept, or a budget is not
    for (one, row), other in zip(zip(shares, rows, strict=True), shares[1:], strict=False):
        assert (other < one) == (candidates.goal.keeps(row) == (goal[1] is None))
    # never worse than what there was, here better
    better = "mean_bits" if goal[1] is None else "criterion_ratio"
    assert candidates.best()[better] < before[better]
    assert (candidates.control is not None) == labels
    assert len(recipes) == learned_candidates.LEARNED + labels
    learned = recipes[: learned_candidates.LEARNED]
    sparsest_first = sorted(learned, key=lambda recipe: recipe["density"])
    rates = [recipe["learning_rate"] for recipe in sparsest_first]
    assert rates == sorted(rates, reverse=True)
    if labels:  # the control, which has no density, learns by the recipe of the best
        kept = [row for row in rows if candidates.goal.keeps(row)]
        best = rows.index(min(kept, key=candidates.goal.rank)) if kept else None
        own = ("density", "checkpoints")
        plain = [{k: v for k, v in r.items() if k not in own} for r in recipes]
        densest = learned.index(sparsest_first[-1])
        assert plain[-1] == plain[densest if best is None else best]


def test_a_larger_allocation_is_far_from_the_limit(small, monkeypatch):
    """It is looked for until there is one, and no further."""
    net, train, val, _ = small
    monkeypatch.setattr(refinement, "COSTLIER", ())
    candidates = all_candidates(net, train, val, Goal.of(1.05, None))
    sweep_budgets(candidates)
    best = candidates.best()
    value, bound = best["criterion_ratio"], best["criterion_ratio_bound"]
    candidates.goal = goal = Goal.of(value + 1.5 * (bound - value), None)
    candidates.rows = {best["key"]: best}
    refinement.add_safer_allocations(candidates)
    *_, last = candidates.rows.values()
    far = [goal.margin(row) >= SURE for row in candidates.whole()]
    assert goal.margin(last) >= SURE
    assert sum(far) == 1
    refinement.add_safer_allocations(candidates)
    assert len(candidates.whole()) == len(far)


def test_what_was_learned_is_measured_whole(monkeypatch):
    """Even where it looks hopeless: it took long, and says which density is next."""
    monkeypatch.setattr(candidates_module, "hopeless", lambda *args, **options: True)
    net, train, val, _ = toy(8, 16, 4, examples=500)
    coded = [{"scheme": "uniform", "levels": 31, "storage": "coded"}]
    given = {"tensors": {name: coded for name, _ in net.named_parameters()}}
    candidates = all_candidates(net, train, val, Goal.of(1.01, None), given)
    (given_up,) = candidates.measure([candidates.allocated((0, 0))])
    learned_candidates.learn_candidates(candidates, 0.5, False)
    _, *learned = candidates.rows.values()
    assert not candidates.is_whole(given_up)
    assert learned
    assert all(map(candidates.is_whole, learned))


@pytest.mark.parametrize(
    "coded", [{"bits": 8}, {"bits": 4, "zero_point": True}, {"levels": 3, "axis": 0}]
)
def test_what_may_be_coded_learns_to_be_sparse(coded):
    net, train, val, _ = toy(6, 16, 3, examples=300)
    choices = [{"scheme": "uniform", "storage": "coded", "axis": 0, **coded}]
    space = {"tensors": {name: choices for name, _ in net.named_parameters()}}
    how = {"limit": 5.0, "search_space": space, "learn": 0.5}
    found = find_strategy(net, train, val, nn.CrossEntropyLoss(), **how)
    assert "following" in set(found.candidates["answer"])


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ({"scheme": "uniform"}, "a list of choices is needed"),
        ([{"scheme": "unifrom"}], "grids: "),
        ([{"scheme": "uniform", "bits": 2}], "put them in search_space"),
    ],
)
def test_grids_are_looked_at_before_anything_runs(grids, said):
    space = {"tensors": {"0.weight": [{"scheme": "uniform", "bits": 2}]}}
    with pytest.raises(ValueError, match=said):
        find_strategy(None, [], [], nn.CrossEntropyLoss(), grids=grids, search_space=space)


def test_grids_suit_weights_of_any_size():
    """Small ones, and rows shorter than a group."""
    net, train, val, _ = toy(6, 16, 3, examples=300)
    with torch.no_grad():
        net[0].weight.mul_(2.0**-30)
    grids = [
        {"scheme": "codebook", "bits": 3, "axis": 0, "rounding": "gptq"},
        {"scheme": "uniform", "bits": 3, "axis": 0, "group": 12},
    ]
    how = {"limit": 1.5, "grids": grids, "widths": [3, 8]}
    found = find_strategy(net, train, val, nn.CrossEntropyLoss(), **how)
    assert {"codebook", "uniform"} <= {c.scheme for c in found.sensitivity["choice"]}


def test_what_was_searched_with_another_effort_changes_nothing(tmp_path):
    """Of so many layers that the number of waves follows from the passes that are left."""
    torch.manual_seed(0)
    layers = [part for _ in range(24) for part in (nn.Linear(5, 5), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(5, 3)).eval()
    x = torch.randn(600, 5)
    data = Tensors(x, net(x).argmax(1))
    train, val, _ = create_dataloaders(data, batch_size=50)
    how = {"limit": {"relative_error": 0.2}, "widths": [3, 4, 8]}
    criterion = nn.CrossEntropyLoss()
    fresh = find_strategy(net, train, val, criterion, effort=150, **how)
    assert "sequential" in set(fresh.candidates["origin"])
    columns = ["origin", "mean_bits", "relative_error", "examples"]
    for before in (80, 400):
        kept = {"folder": tmp_path / str(before), **how}
        find_strategy(net, train, val, criterion, effort=before, **kept)
        again = find_strategy(net, train, val, criterion, effort=150, **kept)
        assert again.strategy == fresh.strategy
        pd.testing.assert_frame_equal(again.candidates[columns], fresh.candidates[columns])


def test_another_limit_measures_only_what_is_new(small, tmp_path, monkeypatch):
    net, train, val, _ = small
    criterion = nn.CrossEntropyLoss()
    seen = count_measured(monkeypatch)
    first = find_strategy(net, train, val, criterion, limit=1.05, folder=tmp_path)
    count = len(seen)
    again = find_strategy(net, train, val, criterion, limit=1.05, folder=tmp_path)
    assert len(seen) == count  # nothing is measured again
    assert first.strategy == again.strategy
    assert plain(first).equals(plain(again))
    find_strategy(net, train, val, criterion, limit=1.03, folder=tmp_path)
    # tensors alone that are near the other frontier, and some of the candidates
    assert len(seen) - count < 0.6 * count
    find_strategy(net, train, val, nn.CrossEntropyLoss(), limit=1.05)
    assert len(seen) > 2 * count - 2  # without a folder all is


def test_a_killed_search_goes_on(small, tmp_path, monkeypatch):
    net, train, val, _ = small
    criterion = nn.CrossEntropyLoss()
    with monkeypatch.context() as patch:
        everything = count_measured(patch)
        whole = find_strategy(net, train, val, criterion, limit=1.05)
    for stop_after in (1, 40, 70):
        how = {"limit": 1.05, "folder": tmp_path / str(stop_after)}
        with monkeypatch.context() as patch:
            before = count_measured(patch, stop_after)
            try:  # what keeps the goal by then is the answer
                cut = find_strategy(net, train, val, criterion, **how)
                assert cut.passes.left_out == ["interrupted"]
            except KeyboardInterrupt:
                assert stop_after < 100
        with monkeypatch.context() as patch:
            after = count_measured(patch)
            resumed = find_strategy(net, train, val, criterion, **how)
        assert plain(resumed).equals(plain(whole))
        # what was measured before was not again
        assert len(before) + len(after) == len(everything)


def test_other_options_have_a_folder_of_their_own(small, tmp_path):
    net, train, val, _ = small
    for smoothing in (0.0, 0.3):
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        how = {"limit": 1.05, "widths": [2, 4, 8], "effort": 60}
        kept = find_strategy(net, train, val, criterion, folder=tmp_path, **how)
        alone = find_strategy(net, train, val, criterion, **how)
        assert plain(kept).equals(plain(alone))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_learning_search_goes_on(tmp_path, monkeypatch):
    """Each candidate is taught in the same order, and the loader is left as it was."""
    net, train, val, _ = toy(8, 32, 4)
    options = {"budget": 4.2, "learn": 1}
    before = train.generator.get_state()
    whole = find_strategy(net, train, val, nn.CrossEntropyLoss(), **options)
    assert train.generator.get_state().equal(before)
    learn, calls = learned_candidates.learn_codes, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*arguments, **named)

    monkeypatch.setattr(learned_candidates, "learn_codes", killed)
    cut = find_strategy(net, train, val, nn.CrossEntropyLoss(), folder=tmp_path, **options)
    assert cut.passes.left_out == ["interrupted"]
    assert whole.passes.left_out == []
    resumed = find_strategy(net, train, val, nn.CrossEntropyLoss(), folder=tmp_path, **options)
    assert plain(resumed).equals(plain(whole))
    assert not list(tmp_path.glob("*/learning-*"))


def test_a_budget_of_operations_is_kept_when_codes_are_learned(small):
    net, train, val, _ = small
    budget = every_cost(net, train, val, "bit_operations") / 200
    found = find_strategy(
        net,
        train,
        val,
        nn.CrossEntropyLoss(),
        budget={"bit_operations": budget},
        activation_bits=[2, 4, 8],
        learn=1,
    )
    table = found.candidates
    assert table["origin"].str.startswith("following").any()
    assert (table["bit_operations"] <= budget * (1 + 1e-9)).all()


def test_a_loss_below_0_has_no_ratio():
    net = nn.Linear(3, 1)
    data = Tensors(torch.randn(90, 3), torch.randn(90, 1))
    loader = batch_loader(data, batch_size=30, shuffle=False, seed=0)

    def criterion(outputs, targets):
        return (outputs - targets).square().mean() - 100

    with pytest.raises(ValueError, match=r"a ratio needs .* above 0"):
        find_strategy(net, loader, loader, criterion, limit=1.01)
    with pytest.raises(ValueError, match="accuracy_drop: needs targets that are class labels"):
        find_strategy(net, loader, loader, nn.MSELoss(), limit={"accuracy_drop": 0.1})


def test_learning_is_kept(small, tmp_path, monkeypatch):
    net, train, val, _ = small
    options = {"limit": 1.3, "learn": 1, "folder": tmp_path}
    first = find_strategy(net, train, val, nn.CrossEntropyLoss(), **options)
    monkeypatch.setattr(learned_candidates, "learn_codes", None)
    options["learn"] = 1.0
    again = find_strategy(net, train, val, nn.CrossEntropyLoss(), **options)
    assert plain(first).equals(plain(again))


def test_another_limit_learns_nothing_anew(small, tmp_path, monkeypatch):
    """Where what learns, and how sparse, is the same."""
    net, train, val, _ = small
    options = {"learn": 1, "folder": tmp_path, "storage": "coded"}
    loose = {"limit": {"accuracy_drop": 1.0}}
    first = find_strategy(net, train, val, nn.CrossEntropyLoss(), **loose, **options)
    monkeypatch.setattr(learned_candidates, "learn_codes", None)
    for limit in ({"accuracy_drop": 0.9}, {"flips": 1.0}, {"criterion_ratio": 1e6}):
        again = find_strategy(net, train, val, nn.CrossEntropyLoss(), limit=limit, **options)
        learned = [
            list(f.candidates.loc[f.candidates["answer"] == "following", "mean_bits"])
            for f in (first, again)
        ]
        assert learned[0] == learned[1]
        assert len(learned[0]) == learned_candidates.LEARNED


BAD = [
    ({"limit": 1.01, "budget": 4}, "either a limit or a budget"),
    ({"limit": 0.99}, "limit criterion_ratio is 0.99: 1 or more is needed"),
    ({"limit": math.nan}, "limit criterion_ratio is nan"),
    ({"limit": {"loss": 2}}, "some of criterion_ratio, calibrated_ratio"),
    ({"budget": 0.5}, "budget mean_bits is 0.5: the smallest candidate takes"),
    ({"budget": -1}, "budget mean_bits is -1: a number above 0"),
    ({"limit": 1.01, "learn": -1}, "learn is -1"),
    ({"limit": 1.01, "labels": True}, "labels is True: False, or True where learn is above 0"),
    ({"limit": 1.01, "learn": 1, "labels": "no"}, "labels is 'no'"),
    ({"limit": 1.01, "confidence": 95}, "confidence is 95: above 0.5 and below 1"),
    ({"limit": 1.01, "activation_bits": [8]}, "save no model_bytes; give a budget of"),
    ({"limit": 1.01, "storage": "zip"}, "storage is 'zip': packed, coded are allowed"),
    (
        {"limit": 1.01, "search_space": {"tensors": {}, "activations": {}}},
        "no tensor of the network has",
    ),
    (
        {"limit": 1.01, "search_space": {"tensors": {"0.weight": []}, "activations": {}}},
        "0.weight: the search space has no choice",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_limits_and_budgets(small, options, message):
    net, train, val, _ = small
    with pytest.raises(ValueError, match=re.escape(message)):
        find_strategy(net, train, val, nn.CrossEntropyLoss(), **options)


def test_a_limit_that_cannot_be_kept_names_the_nearest(small):
    net, train, val, _ = small
    space = {
        "tensors": {name: CHOICES[:2] for name, _ in net.named_parameters()},
        "activations": {},
    }
    message = r"no candidate keeps criterion_ratio at most 1 with 95% confidence on \d+ .* bits"
    with pytest.raises(ValueError, match=message):
        find_strategy(net, train, val, nn.CrossEntropyLoss(), limit=1.0, search_space=space)


@pytest.mark.parametrize("limits", [1.0, {"criterion_ratio": 1.0, "flips": 0.0}])
def test_the_nearest_is_measured_whole(small, everything, limits):
    """Though a bad one is measured whole already, and the others were given up early."""
    net, train, val, _ = small
    candidates = all_candidates(net, train, val, Goal.of(limits, None))
    options = [range(len(group)) for group in candidates.allocation.groups]
    trials = [candidates.allocated(one) for one in itertools.product(*options)]
    candidates.measure(trials)
    worst = min(everything, key=lambda row: row["mean_bits"])
    bad = next(trial for trial in trials if trial.key == worst["key"])
    candidates.keep(*candidates.measured([bad], race=[1.0]))
    with pytest.raises(ValueError, match=r"no candidate keeps .* at [\d.]+ bits") as error:
        found_by(candidates, pd.DataFrame(), nn.CrossEntropyLoss(), None, random=0, seed=0)
    bits = float(re.search(r"at ([\d.]+) bits", str(error.value))[1])
    named = [row for row in candidates.whole() if row["mean_bits"] == pytest.approx(bits, rel=1e-3)]
    least = min(map(candidates.goal.excess, candidates.whole()))
    assert least in map(candidates.goal.excess, named)
    median = statistics.median(map(candidates.goal.excess, everything))
    assert least < median < candidates.goal.excess(worst)


def test_too_few_examples_say_how_many_it_would_take(small):
    net, train, val, _ = small
    few = batch_loader(Tensors(*val.dataset[:12]), batch_size=4, shuffle=False, seed=0)
    space = {
        "tensors": {name: CHOICES[-1:] for name, _ in net.named_parameters()},
        "activations": {},
    }
    with pytest.raises(ValueError, match=r"on 12 validation examples.*about [0-9,]+ examples"):
        find_strategy(net, train, few, nn.CrossEntropyLoss(), limit=1.003, search_space=space)
    with pytest.raises(ValueError, match=r"or ask for limit=\{'calibrated_ratio': 1.01\}"):
        find_strategy(net, train, few, nn.CrossEntropyLoss(), search_space=space)


def test_the_sensitivities_are_those_of_the_widths_that_were_needed():
    """A regression to float32 precision, which 16 bits are too few for."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    inputs = torch.randn(600, 4)
    with torch.no_grad():
        targets = net(inputs) + 1e-6 * torch.randn(600, 3)
    parts = random_split(Tensors(inputs, targets), [200, 200, 200])
    train, val, _ = (batch_loader(p, batch_size=50, shuffle=False, seed=0) for p in parts)
    found = find_strategy(net, train, val, nn.MSELoss(), limit=1.05)
    assert found.strategy.tensors["weight"].bits > 16
    assert found.sensitivity["bits"].max() == 32
    safe = minimum_safe_bits(found.sensitivity, 1.05)
    assert all(bits is not None for bits in safe.values())
    assert safe["weight"] > 16


@pytest.mark.parametrize("axis", [None, 0])
def test_codes_are_learned_of_weights_by_their_shape(small, axis):
    """However their scales are shared."""
    net, train, val, _ = small
    candidates = all_candidates(net, train, val, Goal.of(2.0, None))

    def learnable(**choice):
        weight = Choice("uniform", axis=axis, **choice)
        return learned_candidates._learnable(candidates, Option({"0.weight": weight}, {}, 1.0, 0.0))

    assert learnable(bits=2, rounding="gptq")
    assert not learnable(bits=2)
    assert not learnable(bits=8, rounding="gptq")
    assert not learnable(bits=8)
    for levels, few in ((3, True), (9, True), (17, False), (200, False)):
        assert learnable(levels=levels, rounding="gptq") == few


def test_every_scheme_can_be_searched(small):
    net, train, val, _ = small
    choices = [{"scheme": scheme, "bits": 4} for scheme in plugins.names("schemes")]
    space = {"tensors": {name: choices for name, _ in net.named_parameters()}}
    found = find_strategy(net, train, val, nn.CrossEntropyLoss(), limit=1.5, search_space=space)
    assert set(found.sensitivity["scheme"]) == set(plugins.names("schemes"))
    uniform = found.candidates[found.candidates["origin"] == "uniform"]
    # but for those that are surely good enough
    tried = {strategy.tensors["0.weight"].scheme for strategy in uniform["strategy"]}
    assert set() < tried <= set(plugins.names("schemes"))
    for choice in choices:  # each is allocated where it alone is allowed
        alone = {"tensors": {name: [choice] for name in space["tensors"]}}
        allocation = all_candidates(net, train, val, Goal.of(1.5, None), alone).allocation
        strategy = allocation.strategy(allocation.solve(allocation.total((0, 0))))
        assert {one.scheme for one in strategy.tensors.values()} == {choice["scheme"]}


@pytest.mark.parametrize("storage", ["packed", "coded"])
@pytest.mark.parametrize("scheme", plugins.names("schemes"))
def test_every_grid_may_be_one_of_the_default_search_space(scheme, storage):
    """Of weights of any kind, each on the axis of its outputs."""
    net = nn.Sequential(nn.ConvTranspose1d(3, 5, 2), nn.Flatten(), nn.Linear(20, 4))
    net.table = nn.Parameter(torch.randn(4, 3))
    grid = {"scheme": scheme, "bits": 3, "axis": 0, "rounding": "gptq", "storage": storage}
    facts = trace(net, [(torch.randn(2, 3, 3),)])
    before, found = (
        default_search_space(net, facts, [2, 8], storage=storage, grids=grids).tensors
        for grids in ((), [grid])
    )
    assert {n: found[n][: len(c)] for n, c in before.items()} == before
    added = {n: found[n][len(c) :] for n, c in before.items()}
    assert added == {
        "0.weight": [Choice.of({**grid, "axis": 1})],
        "2.weight": [Choice.of(grid)],
        "table": [Choice.of({**grid, "rounding": "nearest"})],
        "0.bias": [],
        "2.bias": [],
    }


def test_activations_that_are_not_named_stay_in_float():
    """Of a weight beside others, and of a product beside its other operand."""

    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    net, inputs = Attentive().eval(), torch.randn(400, 5, 8)
    data = Tensors(inputs, inputs[:, 0, :3].argmax(1))
    train, val, _ = create_dataloaders(data, batch_size=64)
    named = ["head.weight", "attention.product.0.right"]
    given = {
        "tensors": {"head.weight": [PLAIN | {"bits": 4, "rounding": "gptq"}]},
        "activations": {name: [{"scheme": "uniform", "bits": 8}] for name in named},
    }
    # little more than the least that there is
    budget = {"bit_operations": 0.899 * every_cost(net, train, val, "bit_operations")}
    found = find_strategy(net, train, val, nn.CrossEntropyLoss(), budget=budget, search_space=given)
    assert {name for name, choice in found.strategy.activations.items() if choice} == set(named)
    assert set(found.quantized.activations) == set(named)
    assert "sequential" in set(found.candidates["origin"])
    (chosen,) = found.candidates[found.candidates["chosen"]].to_dict("records")
    assert chosen["bit_operations"] <= budget["bit_operations"]
