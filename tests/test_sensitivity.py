"""A row for each choice of each tensor, as a plain evaluation has it; proxies and search spaces."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import count_measured, divergence
from scipy import stats
from torch import nn

from quantifind.metrics import outcome, weight_error
from quantifind.mixed_precision import rounded_options, sensitivity
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_increase,
    hessian_increase,
    hessian_traces,
    output_fisher_increases,
)
from quantifind.mixed_precision.rounded_options import RoundedOptions
from quantifind.mixed_precision.search_space import (
    SearchSpace,
    choice_key,
    default_search_space,
)
from quantifind.mixed_precision.sensitivity import (
    EXAMPLES,
    PRECISION,
    UNCHANGED,
    _precise,
    measure_sensitivity,
    predict_sensitivity,
    rank_correlations,
)
from quantifind.network.activations import fit_activations
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize, quantize_each, quantize_model
from quantifind.storage import artifact
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.loaders import Tensors, create_dataloaders
from quantifind.workflow.evaluation_workflow import compare

CRITERION = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Weights in products, one that is in none, a norm, and what can't be quantized."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(3, 4) / 4)
        self.enter, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        x = self.norm(self.enter(x + self.positions)).relu()
        return self.head(x.mean(1))[:, self.order]


def network():
    torch.manual_seed(0)
    net = Net().eval()
    for parameter in net.norm.parameters():
        parameter.data += torch.randn(5) / 4
    return net


def splits(examples=500):
    x = torch.randn(examples, 3, 4, generator=torch.Generator().manual_seed(1))
    return create_dataloaders(Tensors(x, x[:, 0, :3].argmax(1)), batch_size=32)[:2]


def measurements_of(net, **options):
    return Measurements.start(net, *splits(), CRITERION, **options)


def space_of(measurements, widths, activation_bits=()):
    return default_search_space(measurements.model, measurements.facts, widths, activation_bits)


@pytest.fixture(scope="module")
def measured():
    """Measurements, search space, what is quantized, and the table."""
    measurements = measurements_of(network())
    space = space_of(measurements, [2, 4], [3])
    found = measure_sensitivity(measurements, space, precision=0)
    return measurements, space, found.rounded_options, found.table


def strategy_of(net, measurements, row):
    """The one tensor, or activation, of a row on its levels, all else in float."""
    tensors = dict.fromkeys(named_tensors(net))
    if row["kind"] == "tensors":
        return Strategy(tensors | {row["name"]: row["choice"]})
    names = space_of(measurements, [2], [3]).activations
    return Strategy(tensors, dict.fromkeys(names) | {row["name"]: row["choice"]})


def test_every_tensor_and_activation_has_a_row_for_each_choice(measured):
    _, space, quantized, table = measured
    rows = [choice_key(*row) for row in table[["kind", "name", "choice"]].itertuples(index=False)]
    wanted = [
        choice_key(kind, name, choice)
        for kind, name, choices in space.items()
        for choice in choices
    ]
    assert rows == wanted
    assert len(set(rows)) == len(rows)
    assert quantized.keys() == set(rows)
    assert set(space.tensors) == set(named_tensors(network())) - {"order", "empty"}


def values_of(quantized):
    if isinstance(quantized, QuantizedTensor):
        return [quantized.dequantize()]
    return [quantized.scale, quantized.zero_point]


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert all(map(torch.equal, values_of(one[key]), values_of(other[key])))


def count_rounded(monkeypatch):
    """(Names and choices) of what is rounded together from here on."""
    seen = []

    def rounded(network, choices):
        seen.append(dict(choices))
        return quantize_each(network, choices)

    def fitted(model, choices, batches):
        seen.append(dict(choices))
        return fit_activations(model, choices, batches)

    monkeypatch.setattr(rounded_options, "quantize_each", rounded)
    monkeypatch.setattr(rounded_options, "fit_activations", fitted)
    return seen


def test_tensors_are_rounded_together(measured, monkeypatch):
    """Those of an activation each by itself."""
    _, space, quantized, _ = measured
    rounded = count_rounded(monkeypatch)
    again = RoundedOptions(measurements_of(network()), space)
    again.make(again)
    same(again, quantized)
    assert rounded[0] == space.tensors
    assert rounded[1:] == [{n: c} for n, some in space.activations.items() for c in some]


@pytest.mark.parametrize("places", [1, 2, 3, 100])
def test_workers_round_as_much(measured, monkeypatch, places):
    """Each tensor once, and no worker much more than another."""
    _, space, *_ = measured
    measurements = measurements_of(network())
    monkeypatch.setattr(type(measurements.workers), "places", places)
    found = RoundedOptions(measurements, space)
    tasks = found._tasks({("tensors", name): some for name, some in space.tensors.items()})
    assert sorted(n for _, names in tasks for n in names) == sorted(space.tensors)
    assert len(tasks) == min(places, len(space.tensors))
    sizes = [sum(found.sizes[name] for name in names) for _, names in tasks]
    assert max(sizes) - min(sizes) <= max(found.sizes.values())


def test_rows_are_those_of_a_plain_evaluation(measured):
    measurements, _, _, table = measured
    net, batches = network(), list(measurements.evaluator.batches())
    original = outcome(net, batches, CRITERION).calibrated()
    for row in table.to_dict("records"):
        quantized = quantize(net, strategy_of(net, measurements, row), measurements.calibration)
        rounded = outcome(quantize_model(net, quantized), batches, CRITERION)
        wanted = compare(rounded, original)
        assert "calibrated_ratio" not in row
        for name in wanted.keys() & row.keys():
            assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
        assert {"criterion_ratio", "relative_error_low", "accuracy_drop_bound"} <= row.keys()
        loss_increase = divergence(rounded, original).mean()
        assert row["loss_increase"] == pytest.approx(max(loss_increase, 0), rel=1e-3, abs=1e-9)
        sqnr = weight_error(original["outputs"], rounded["outputs"])["sqnr_db"]
        assert row["sqnr_db"] == pytest.approx(sqnr, rel=1e-3)
        (one,) = (quantized.tensors or quantized.activations).values()
        assert row["bits"] == one.bits
        assert row["stored_bits"] == (one.stored_bits if row["kind"] == "tensors" else 0)
        assert row["examples"] == measurements.examples
        assert row["scheme"] == "uniform"
        assert row["rounding"] == row["choice"].rounding


def test_fewer_bits_are_worse(measured):
    table = measured[3]
    nearest = table[(table["kind"] == "tensors") & (table["rounding"] == "nearest")]
    by_width = nearest.pivot(index="name", columns="bits", values="loss_increase")
    assert (by_width[2] > by_width[4]).all()


def test_what_is_in_the_folder_is_not_measured_again(tmp_path, monkeypatch):
    def run():
        measurements = measurements_of(network(), folder=tmp_path)
        return measure_sensitivity(measurements, space_of(measurements, [2, 3], [4]))

    rounded, seen = count_rounded(monkeypatch), count_measured(monkeypatch)
    first, work = run(), (len(rounded), len(seen))
    assert min(work) > 0
    second = run()
    assert (len(rounded), len(seen)) == work
    pd.testing.assert_frame_equal(first.table, second.table)
    same(first.rounded_options, second.rounded_options)


@pytest.mark.parametrize("precision", [0, 0.2, 0.5, 10])
def test_examples_are_measured_until_the_increase_is_precise(monkeypatch, precision):
    monkeypatch.setattr(sensitivity, "EXAMPLES", 8)
    seen, measurements = count_measured(monkeypatch), measurements_of(network())
    space = space_of(measurements, [2, 4], [3])
    table = measure_sensitivity(measurements, space, precision=precision).table

    def measured():
        return sum(last - first for _, first, last in seen)

    assert measured() == table["examples"].sum()
    measure_sensitivity(measurements, space, precision=0)
    assert measured() == len(table) * measurements.examples
    for row in table.to_dict("records"):
        key = f"alone {choice_key(row['kind'], row['name'], row['choice'])}"
        increases = measurements.store.get(key)[0]["divergence"]
        counts = [8, 16, 32] if precision else []
        for count in (*counts, len(increases)):
            increase = increases[:count].mean().item()
            if increases[:count].std() / count**0.5 <= precision * increase:
                break
        assert row["examples"] == count
        assert row["loss_increase"] == pytest.approx(max(increase, 0))


def test_choices_alone_are_those_of_a_strategy(measured):
    measurements, space, quantized, _ = measured
    net = network()
    for name, choices in space.tensors.items():
        for choice in choices:
            alone = Strategy(dict.fromkeys(named_tensors(net)) | {name: choice})
            wanted = quantize(net, alone, measurements.calibration).tensors[name]
            assert torch.equal(quantized[choice_key("tensors", name, choice)].codes, wanted.codes)


def test_keys_do_not_depend_on_the_order_of_options():
    options = {"scale": "mse", "scale_dtype": "float16"}
    one = Choice("uniform", 3, options=options)
    other = Choice.of(dict(reversed(options.items())) | {"bits": 3, "scheme": "uniform"})
    assert choice_key("tensors", "a", one) == choice_key("tensors", "a", other)
    assert choice_key("tensors", "a", one) != choice_key("activations", "a", one)
    assert choice_key("tensors", "a", one) != choice_key(
        "tensors", "a", Choice("uniform", 2, options=options)
    )


@pytest.fixture(scope="module")
def table():
    measurements = measurements_of(network())
    space = space_of(measurements, [1, 2, 4, 8], [4])
    return predict_sensitivity(measurements, measure_sensitivity(measurements, space))


def test_proxies_are_those_of_the_training_data(table):
    net, measurements = network(), measurements_of(network())
    pairs = zip(*(batch.data for batch in measurements.calibration), strict=True)
    x, y = (torch.cat(part)[:256] for part in pairs)
    batches = [(x[:128], y[:128]), (x[128:], y[128:])]
    traces = hessian_traces(net, CRITERION, batches, draws=sensitivity.DRAWS, seed=0)
    information, values = fisher(net, CRITERION, batches), named_tensors(net)
    for row in table[table["kind"] == "tensors"].iloc[::3].to_dict("records"):
        name, alone = row["name"], strategy_of(net, measurements, row)
        put = quantize(net, alone, measurements.calibration).tensors[name].dequantize()
        assert row["hessian_increase"] == pytest.approx(
            hessian_increase(traces[name], values[name], put), rel=1e-3, abs=1e-12
        )
        assert row["fisher_increase"] == pytest.approx(
            fisher_increase(information[name], values[name], put), rel=1e-3, abs=1e-12
        )
        by_output = output_fisher_increases(net, CRITERION, batches, {name: [put]})
        wanted = by_output[name][0] if name in by_output else math.nan
        assert row["output_fisher_increase"] == pytest.approx(
            wanted, rel=1e-3, abs=1e-12, nan_ok=True
        )


def test_proxies_of_what_has_none_are_missing(table):
    activations = table[table["kind"] == "activations"]
    proxies = ["hessian_increase", "fisher_increase", "output_fisher_increase"]
    assert len(activations) > 0
    assert activations[proxies].isna().all(axis=None)
    assert not table[table["kind"] == "tensors"][proxies[:2]].isna().any(axis=None)
    in_products = {"enter.weight", "enter.bias", "head.weight", "head.bias"}
    missing = table[table["output_fisher_increase"].isna() & (table["kind"] == "tensors")]
    assert set(missing["name"]).isdisjoint(in_products)
    assert set(missing["name"]) == {"positions", "norm.weight", "norm.bias"}


def test_proxies_foretell_the_order_of_the_increases(table):
    correlations = rank_correlations(table)
    assert list(correlations) == list(sensitivity.PROXIES)
    assert correlations["fisher_increase"] > 0.7
    assert correlations["output_fisher_increase"] > 0.8
    assert correlations["sqnr_db"] > 0.8


def hand_made(loss_increases, **columns):
    return pd.DataFrame({"loss_increase": loss_increases, "examples": 9} | columns)


def test_rank_correlations_are_of_ranks():
    loss_increases = [0.1, 0.4, 0.2, 3.0]
    table = hand_made(
        loss_increases,
        hessian_increase=loss_increases,
        fisher_increase=[loss_increase**3 for loss_increase in loss_increases],
        output_fisher_increase=[-loss_increase for loss_increase in loss_increases],
        sqnr_db=[-10 * math.log10(loss_increase) for loss_increase in loss_increases],
    )
    assert rank_correlations(table) == pytest.approx(
        {"sqnr_db": 1, "hessian_increase": 1, "fisher_increase": 1, "output_fisher_increase": -1}
    )
    half = hand_made([1.0, 2.0, 3.0, 4.0], hessian_increase=[1.0, 2.0, 4.0, 3.0])
    assert rank_correlations(half) == pytest.approx({"hessian_increase": 0.8})


def test_missing_and_infinite_proxies_are_left_out():
    table = hand_made(
        [0.1, 0.2, 0.3, 0.4, 0.0],
        fisher_increase=[1.0, 2.0, 3.0, math.nan, math.nan],
        sqnr_db=[3.0, 2.0, 1.0, 0.0, math.inf],
        hessian_increase=[1.0, 2.0, math.nan, math.nan, math.nan],
    )
    found = rank_correlations(table)
    assert found["fisher_increase"] == pytest.approx(1)
    assert found["sqnr_db"] == pytest.approx(1)
    assert math.isnan(found["hessian_increase"])  # two are too few


def options_of(choices, key):
    return [choice.plain().get(key) for choice in choices]


def test_the_default_search_space_has_the_widths():
    space = space_of(measurements_of(network()), [2, 3, 8])
    assert space.activations == {}
    assert list(space.tensors) == [
        *("positions", "enter.weight", "enter.bias", "norm.weight", "norm.bias"),
        *("head.weight", "head.bias"),
    ]
    for name, choices in space.tensors.items():
        nearest = [choice for choice in choices if choice.rounding == "nearest"]
        assert options_of(nearest, "bits") == [2, 3, 8]
        gptq = [choice for choice in choices if choice.rounding == "gptq"]
        assert options_of(gptq, "bits") == (
            [2, 3, None] if name in ("enter.weight", "head.weight") else []
        )
        assert len(nearest) + len(gptq) == len(choices)
        per_channel = name in ("positions", "enter.weight", "head.weight")
        assert all((choice.axis == 0) == per_channel for choice in choices)
        plain = json.loads(json.dumps([choice.plain() for choice in choices]))
        assert [Choice.of(one) for one in plain] == choices
    assert space.tensors["head.weight"][-1].levels == 3


@pytest.mark.parametrize(("widths", "ternary"), [([1, 3, 4], False), ([2], True), ([8], False)])
def test_ternary_comes_with_two_bits(widths, ternary):
    space = space_of(measurements_of(network()), iter(widths))
    assert (3 in options_of(space.tensors["head.weight"], "levels")) == ternary
    for name in ("head.bias", "positions"):
        assert options_of(space.tensors[name], "levels") == [None] * len(widths)


def test_wide_choices_have_wide_scales():
    """A step of many bits is subnormal in float16, which a wide code can't make up for."""
    measurements = measurements_of(network())
    space = space_of(measurements, [4, 8, 9, 16, 24])
    for choices in space.tensors.values():
        for choice in choices:
            narrow = (choice.bits or 2) <= 8
            assert choice.options["scale_dtype"] == ("float16" if narrow else "float32")
    quantized, values = RoundedOptions(measurements, space), named_tensors(measurements.model)
    for name, choices in space.tensors.items():
        for choice in choices:
            if (choice.bits or 0) > 8:
                put = quantized[choice_key("tensors", name, choice)].dequantize()
                error = (put - values[name]).abs().max() / values[name].abs().max()
                assert error <= max(1.1 * 2.0**-choice.bits, 1e-7)


def test_every_activation_has_choices():
    space = space_of(measurements_of(network()), [4], iter([3, 8]))
    assert list(space.activations) == ["enter.weight", "head.weight"]
    for choices in space.activations.values():
        assert options_of(choices, "bits") == [3, 8]
        assert all(choice.options["zero_point"] for choice in choices)


def test_every_module_can_be_quantized_alone():
    """Those of a convolution, an embedding, attention and a norm among them."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(7, 8), nn.Conv1d(8, 8, 3, padding=1)
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, codes):
            x = self.mix(self.table(codes).transpose(1, 2)).transpose(1, 2)
            return self.head(self.layer(x).mean(1))

    torch.manual_seed(0)
    net, codes = Mixed().eval(), torch.randint(7, (300, 5))
    train, val, _ = create_dataloaders(Tensors(codes, codes[:, 0] % 3), batch_size=64)
    measurements = Measurements.start(net, train, val, CRITERION)
    space = space_of(measurements, [2], [8])
    found = measure_sensitivity(measurements, space)
    assert len(found.rounded_options) == sum(len(choices) for *_, choices in space.items())
    gptq = {key.split()[0] for key in found.rounded_options if "gptq" in key}
    assert {f"tensors/{n}" for n in ("table.weight", "mix.weight", "head.weight")} <= gptq
    assert "tensors/layer.self_attn.in_proj_weight" in gptq
    assert found.table["loss_increase"].notna().all()


def test_a_transposed_convolution_can_be_quantized_alone():
    net = nn.Sequential(nn.ConvTranspose1d(3, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    measurements = measurements_of(net)
    found = RoundedOptions(measurements, space_of(measurements, [2, 8]))
    assert all(quantized.stored_bits for quantized in found.values())


def test_a_parametrized_weight_has_the_choices_of_a_plain_one():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
    net = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(5, 3))
    tensors = space_of(measurements_of(net), [2]).tensors
    assert tensors["1.weight"] == tensors["3.weight"]


def test_the_model_and_the_search_space_are_left_alone(measured):
    net, measurements = network(), measured[0]
    assert all(
        torch.equal(value, own)
        for value, own in zip(
            net.state_dict().values(), measurements.model.state_dict().values(), strict=True
        )
    )
    assert space_of(measurements, [2, 4], [3]) == measured[1]


def test_what_is_quantized_is_kept_packed(tmp_path):
    measurements = measurements_of(network(), folder=tmp_path)
    space = SearchSpace({"head.weight": [{"scheme": "uniform", "bits": 3}]})
    ((key, quantized),) = RoundedOptions(measurements, space).items()
    kept = artifact.unpack(*measurements.store.get(f"quantized {key}"))
    assert torch.equal(kept.tensors["head.weight"].dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"tensors": {name: [Choice("uniform", 3)] for name in ("head.weight", "nope")}},
            "unknown tensor nope: the network has positions, order, empty, enter.weight",
        ),
        ({"tensors": {"head.weight": [{"scheme": "unifrom"}]}}, "head.weight: unknown 'unifrom'"),
        (
            {
                "tensors": {"head.weight": [{"scheme": "uniform", "bits": 3}]},
                "activations": {"nope": [{"scheme": "uniform", "bits": 3}]},
            },
            "unknown activation nope: the network has enter.weight, head.weight",
        ),
    ],
)
def test_a_search_space_of_something_else_is_refused(space, message, monkeypatch):
    """Before anything is rounded or measured."""
    rounded, seen = count_rounded(monkeypatch), count_measured(monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        measure_sensitivity(measurements_of(network()), SearchSpace(**space))
    assert len(str(caught.value).splitlines()) == 1
    assert rounded == seen == []


def test_no_increase_is_not_taken_for_granted():
    """Before it has been seen on a good number of examples."""
    few, many = np.zeros(UNCHANGED - 1), np.zeros(UNCHANGED)
    assert not _precise({"divergence": few}, 0.25)
    assert _precise({"divergence": many}, 0.25)
    assert _precise({"divergence": few + 1}, 0.25)
    assert not _precise({"divergence": np.append(few, 1)}, 0.25)


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: generator.lognormal(-2, 2, size=5_000),  # of mean exp(-2 + 2² / 2)
        lambda generator: (
            generator.exponential(1 / 1.99, size=5_000)
            * np.where(generator.random(5_000) < 0.01, 100, 1)
        ),
    ],
    ids=["lognormal", "one of a hundred"],
)
def test_stopping_early_takes_little_off_the_increase(draw):
    """Though it is likelier where a tail has not been met: 1 is the true mean, of 600 draws."""
    generator, found = np.random.default_rng(0), []
    for _ in range(600):
        values, count = draw(generator), EXAMPLES
        while count < 5_000 and not _precise({"divergence": values[:count]}, PRECISION):
            count *= 2
        found.append(values[:count].mean())
    assert 0.92 < np.mean(found) < 1


def test_the_error_of_an_increase_is_that_of_its_mean(measured):
    """scipy's, where examples count alike."""
    measurements, *_, table = measured
    for row in table.to_dict("records"):
        key = f"alone {choice_key(row['kind'], row['name'], row['choice'])}"
        divergences = measurements.store.get(key)[0]["divergence"].numpy()
        assert row["increase_error"] == pytest.approx(stats.sem(divergences))
