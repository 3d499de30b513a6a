"""A row for each choice of each tensor, as a plain evaluation has it; proxies and menus."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from quantifind.metrics import divergence, outcome
from quantifind.mixed_precision import measurements as measuring
from quantifind.mixed_precision import sensitivity
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.proxies import (
    fisher,
    fisher_increase,
    hessian_increase,
    hessian_traces,
    output_fisher_increases,
    output_sqnr_db,
)
from quantifind.mixed_precision.sensitivity import (
    UNCHANGED,
    _precise,
    choice_key,
    default_search_space,
    measure_sensitivity,
    quantize_choices,
    rank_correlations,
    sensitivities,
)
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize, quantize_model, quantize_tensors
from quantifind.storage import artifact
from quantifind.strategy import Strategy
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


@pytest.fixture(scope="module")
def measured():
    """Measurements, menus, parts and the table of sensitivities."""
    measurements = measurements_of(network())
    menus = default_search_space(measurements, [2, 4], [3])
    parts = quantize_choices(measurements, menus)
    return measurements, menus, parts, sensitivities(measurements, menus, parts, precision=0)


def strategy_of(net, measurements, row):
    """The one tensor, or site, of a row on its levels, all else in float."""
    tensors = dict.fromkeys(named_tensors(net))
    if row["kind"] == "tensors":
        return Strategy(tensors | {row["name"]: row["choice"]})
    menus = default_search_space(measurements, [2], [3])
    return Strategy(tensors, dict.fromkeys(menus["activations"]) | {row["name"]: row["choice"]})


def test_every_tensor_and_site_has_a_row_for_each_choice(measured):
    _, menus, parts, table = measured
    rows = [choice_key(*row) for row in table[["kind", "name", "choice"]].itertuples(index=False)]
    wanted = [
        choice_key(kind, name, choice)
        for kind, menu in menus.items()
        for name, choices in menu.items()
        for choice in choices
    ]
    assert rows == wanted
    assert len(set(rows)) == len(rows)
    assert parts.keys() == set(rows)
    assert set(menus["tensors"]) == set(named_tensors(network())) - {"order", "empty"}


def test_large_tensors_are_rounded_first(measured, monkeypatch):
    """All missing choices of a tensor together, those of a site each by itself."""
    _, menus, parts, _ = measured
    fit, tasks = sensitivity._fit, []
    monkeypatch.setattr(sensitivity, "_fit", lambda *given: tasks.append(given[1]) or fit(*given))
    found = quantize_choices(measurements_of(network()), menus)
    for key, part in parts.items():
        assert torch.equal(found[key].dequantize(), part.dequantize())
    kinds = [kind for kind, *_ in tasks]
    count = len(menus["tensors"])
    assert kinds == ["tensors"] * count + ["activations"] * (len(tasks) - count)
    sizes = [named_tensors(network())[name].numel() for _, name, *_ in tasks[:count]]
    assert sizes == sorted(sizes, reverse=True)
    for _, name, choices, _ in tasks[:count]:
        assert choices == menus["tensors"][name]
    assert all(len(choices) == 1 for _, _, choices, _ in tasks[count:])


def test_rows_are_those_of_a_plain_evaluation(measured):
    measurements, _, _, table = measured
    net, batches = network(), measurements.batches()
    original = outcome(net, batches, CRITERION)
    for row in table.to_dict("records"):
        quantized = quantize(net, strategy_of(net, measurements, row), measurements.calibration)
        rounded = outcome(quantize_model(net, quantized), batches, CRITERION)
        wanted = compare(rounded, original)
        for name in wanted.keys() & row.keys():
            assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
        assert {"criterion_ratio", "relative_error_low", "accuracy_drop_bound"} <= row.keys()
        loss_increase = divergence(rounded, original).mean()
        assert row["loss_increase"] == pytest.approx(max(loss_increase, 0), rel=1e-3, abs=1e-9)
        sqnr = output_sqnr_db(rounded["outputs"], original["outputs"])
        assert row["sqnr_db"] == pytest.approx(sqnr, rel=1e-3)
        (part,) = (quantized.tensors or quantized.activations).values()
        assert row["bits"] == part.bits
        assert row["stored_bits"] == (part.stored_bits if row["kind"] == "tensors" else 0)
        assert row["examples"] == measurements.examples
        assert row["scheme"] == "uniform"
        assert row["rounding"] == row["choice"].get("rounding", "nearest")


def test_fewer_bits_are_worse(measured):
    table = measured[3]
    nearest = table[(table["kind"] == "tensors") & (table["rounding"] == "nearest")]
    by_width = nearest.pivot(index="name", columns="bits", values="loss_increase")
    assert (by_width[2] > by_width[4]).all()


def forbid(*_, **__):
    raise AssertionError("measured again")


def test_what_is_in_the_folder_is_not_measured_again(tmp_path, monkeypatch):
    def run():
        measurements = measurements_of(network(), folder=tmp_path)
        menus = default_search_space(measurements, [2, 3], [4])
        parts = quantize_choices(measurements, menus)
        return sensitivities(measurements, menus, parts), parts

    first, parts = run()
    for owner, name in (
        (measuring, "_measure"),
        (sensitivity, "quantize_alone"),
        (sensitivity, "fit_activations"),
    ):
        monkeypatch.setattr(owner, name, forbid)
    second, kept = run()
    pd.testing.assert_frame_equal(first, second)
    assert parts.keys() == kept.keys()
    for key, part in parts.items():
        if key.startswith("tensors"):
            assert torch.equal(part.dequantize(), kept[key].dequantize())
        else:  # the sample of an activation is not kept
            assert torch.equal(part.scale, kept[key].scale)
            assert torch.equal(part.zero_point, kept[key].zero_point)


@pytest.mark.parametrize("precision", [0, 0.2, 0.5, 10])
def test_examples_are_measured_until_the_rise_is_precise(monkeypatch, precision):
    monkeypatch.setattr(sensitivity, "EXAMPLES", 8)
    measurements, measure, measured = measurements_of(network()), measuring._measure, []

    def counted(measurements, task):
        candidates, first, last = task
        measured.append(len(candidates) * (last - first))
        return measure(measurements, task)

    monkeypatch.setattr(measuring, "_measure", counted)
    menus = default_search_space(measurements, [2, 4], [3])
    parts = quantize_choices(measurements, menus)
    table = sensitivities(measurements, menus, parts, precision=precision)
    assert sum(measured) == table["examples"].sum()
    sensitivities(measurements, menus, parts, precision=0)
    assert sum(measured) == len(table) * measurements.examples
    for row in table.to_dict("records"):
        key = f"alone {choice_key(row['kind'], row['name'], row['choice'])}"
        loss_increases = measurements.store.get(key)[0]["divergence"]
        counts = [8, 16, 32] if precision else []
        for count in (*counts, len(loss_increases)):
            loss_increase = loss_increases[:count].mean().item()
            if loss_increases[:count].std() / count**0.5 <= precision * loss_increase:
                break
        assert row["examples"] == count
        assert row["loss_increase"] == pytest.approx(max(loss_increase, 0))


def test_parts_of_a_menu_are_those_of_a_strategy(measured):
    measurements, menus, parts, _ = measured
    net = network()
    for name, choices in menus["tensors"].items():
        for choice in choices:
            alone = Strategy(dict.fromkeys(named_tensors(net)) | {name: choice})
            wanted = quantize_tensors(net, alone, measurements.calibration)[name]
            assert torch.equal(parts[choice_key("tensors", name, choice)].codes, wanted.codes)


def test_keys_do_not_depend_on_the_order_of_options():
    one, other = {"scheme": "uniform", "bits": 3}, {"bits": 3, "scheme": "uniform"}
    assert choice_key("tensors", "a", one) == choice_key("tensors", "a", other)
    assert choice_key("tensors", "a", one) != choice_key("activations", "a", one)
    assert choice_key("tensors", "a", one) != choice_key("tensors", "a", one | {"bits": 2})


@pytest.fixture(scope="module")
def table():
    return measure_sensitivity(
        network(), *splits(), CRITERION, widths=[1, 2, 4, 8], activation_bits=[4]
    )


def test_proxies_are_those_of_the_training_data(table):
    net, measurements = network(), measurements_of(network())
    x, y = (torch.cat(part)[:256] for part in zip(*measurements.calibration, strict=True))
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


def test_proxies_foretell_the_order_of_the_rises(table):
    correlations = rank_correlations(table)
    assert list(correlations) == list(sensitivity.PROXIES)
    assert correlations["fisher_increase"] > 0.7
    assert correlations["output_fisher_increase"] > 0.8
    assert correlations["sqnr_db"] > 0.8


def hand_made(loss_increases, **columns):
    return pd.DataFrame({"loss_increase": loss_increases} | columns)


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
    return [choice.get(key) for choice in choices]


def test_default_search_space_have_the_widths():
    measurements = measurements_of(network())
    menus = default_search_space(measurements, [2, 3, 8])
    tensors = menus["tensors"]
    assert menus["activations"] == {}
    assert list(tensors) == [
        *("positions", "enter.weight", "enter.bias", "norm.weight", "norm.bias"),
        *("head.weight", "head.bias"),
    ]
    for name, choices in tensors.items():
        nearest = [c for c in choices if "rounding" not in c]
        assert options_of(nearest, "bits") == [2, 3, 8]
        compensated = [c for c in choices if c.get("rounding") == "gptq"]
        assert options_of(compensated, "bits") == (
            [2, 3, None] if name in ("enter.weight", "head.weight") else []
        )
        assert len(nearest) + len(compensated) == len(choices)
        per_channel = name in ("positions", "enter.weight", "head.weight")
        assert all(("axis" in choice) == per_channel for choice in choices)
        assert json.loads(json.dumps(choices)) == choices
    assert tensors["head.weight"][-1]["levels"] == 3


@pytest.mark.parametrize(("widths", "ternary"), [([1, 3, 4], False), ([2], True), ([8], False)])
def test_ternary_comes_with_two_bits(widths, ternary):
    menus = default_search_space(measurements_of(network()), iter(widths))
    assert (3 in options_of(menus["tensors"]["head.weight"], "levels")) == ternary
    for name in ("head.bias", "positions"):
        assert options_of(menus["tensors"][name], "levels") == [None] * len(widths)


def test_wide_menus_have_wide_scales():
    """A step of many bits is subnormal in float16, which a wide code can't make up for."""
    measurements = measurements_of(network())
    menus = default_search_space(measurements, [4, 8, 9, 16, 24])
    for choices in menus["tensors"].values():
        for choice in choices:
            narrow = choice.get("bits", 2) <= 8
            assert choice["scale_dtype"] == ("float16" if narrow else "float32")
    parts, values = quantize_choices(measurements, menus), named_tensors(measurements.model)
    for name, choices in menus["tensors"].items():
        for choice in choices:
            if choice.get("bits", 0) > 8:
                put = parts[choice_key("tensors", name, choice)].dequantize()
                error = (put - values[name]).abs().max() / values[name].abs().max()
                assert error <= max(1.1 * 2.0 ** -choice["bits"], 1e-7)


def test_activations_have_a_menu_of_every_site():
    menus = default_search_space(measurements_of(network()), [4], iter([3, 8]))
    assert list(menus["activations"]) == ["enter.weight", "head.weight"]
    for choices in menus["activations"].values():
        assert options_of(choices, "bits") == [3, 8]
        assert all(choice["zero_point"] for choice in choices)


def test_menus_of_every_module_can_be_fitted():
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
    menus = default_search_space(measurements, [2], [8])
    parts = quantize_choices(measurements, menus)
    assert len(parts) == sum(len(c) for menu in menus.values() for c in menu.values())
    compensated = {key.split()[0] for key in parts if "gptq" in key}
    assert {f"tensors/{n}" for n in ("table.weight", "mix.weight", "head.weight")} <= compensated
    assert "tensors/layer.self_attn.in_proj_weight" in compensated
    table = sensitivities(measurements, menus, parts)
    assert table["loss_increase"].notna().all()


def test_menus_of_a_transposed_convolution_can_be_fitted():
    net = nn.Sequential(nn.ConvTranspose1d(3, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    measurements = measurements_of(net)
    assert quantize_choices(measurements, default_search_space(measurements, [2, 8]))


def test_a_parametrized_weight_has_the_menu_of_a_plain_one():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
    net = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(5, 3))
    menus = default_search_space(measurements_of(net), [2])
    assert menus["tensors"]["1.weight"] == menus["tensors"]["3.weight"]


def test_the_model_and_the_menus_are_left_alone(measured):
    net, measurements = network(), measured[0]
    assert all(
        torch.equal(value, own)
        for value, own in zip(
            net.state_dict().values(), measurements.model.state_dict().values(), strict=True
        )
    )
    menus = default_search_space(measurements, [2, 4], [3])
    assert menus == measured[1]


def test_parts_are_kept_as_artifacts(tmp_path):
    measurements = measurements_of(network(), folder=tmp_path)
    menus = {"tensors": {"head.weight": [{"scheme": "uniform", "bits": 3}]}, "activations": {}}
    ((key, part),) = quantize_choices(measurements, menus).items()
    back = artifact.unpack(*measurements.store.get(f"part {key}")).tensors["head.weight"]
    assert torch.equal(back.dequantize(), part.dequantize())


def test_no_rise_is_not_taken_for_granted():
    """Before it has been seen on a good number of examples."""
    few, many = np.zeros(UNCHANGED - 1), np.zeros(UNCHANGED)
    assert not _precise({"divergence": few}, 0.25)
    assert _precise({"divergence": many}, 0.25)
    assert _precise({"divergence": few + 1}, 0.25)
    assert not _precise({"divergence": np.append(few, 1)}, 0.25)
