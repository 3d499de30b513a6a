"""The benchmarks of the search: on a small network."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import readme, recipes, search, search_quality, stability
from quantifind.mixed_precision.search_space import default_search_space
from quantifind.search import find_strategy
from quantifind.utils.loaders import Tensors, create_dataloaders, whole_split

WIDTHS = (1, 3, 6)
# so that a search takes a second
quick = partial(find_strategy, widths=WIDTHS, effort=40)


@pytest.fixture
def small():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(900, 6)
    labels = net(4 * x).argmax(1)
    return (net.eval(), nn.CrossEntropyLoss()), create_dataloaders(
        Tensors(x, labels), fractions=(0.4, 0.3, 0.3), batch_size=50
    )


def test_rows_come_one_by_one_and_take_the_place_of_earlier_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LIMITS", (1.5,))
    monkeypatch.setattr(search, "MEASURES", ("calibrated_ratio",))
    monkeypatch.setattr(search, "find_strategy", quick)
    how = {"epochs": {"trained": 1, "as_is": 0}, "folder": tmp_path / "kept"}
    how["looks"] = tmp_path / "looks.json"
    rows = list(search.rows_of("dense_mnist", *small, ["trained", "as_is"], **how))
    rows += search.rows_of("dense_mnist", *small, ["as_is"], storage="coded", **how)
    assert [row["epochs"] for row in rows] == [1, 0, 0]
    assert {*search.EPOCHS} == {*search.ANSWERS}
    # the same ladder is no new look
    assert {row["looks"] for row in rows} == set(range(1, 1 + max(row["looks"] for row in rows)))
    # what was written before there was another storage
    first = {name: value for name, value in rows[0].items() if name != "storage"}
    pd.DataFrame([first]).to_csv(tmp_path / "search.csv", index=False)
    for row in [*rows[1:], rows[0] | {"mean_bits": 7.0}]:
        results = search.put(pd.DataFrame([row]), tmp_path / "search.csv")
    read = pd.read_csv(tmp_path / "search.csv")
    assert list(read.columns[:12]) == [*search.KEY, *search.COLUMNS[:7]]
    assert list(read["answer"]) == ["as_is", "as_is", "trained"]
    assert list(read["storage"]) == ["packed", "coded", "packed"]
    assert read["mean_bits"].to_numpy()[2] == 7.0
    sure = read[read["mean_bits"].notna()]
    assert (sure["bound"] <= 1.5).all()
    assert (sure["low"] < sure["value"]).all()
    assert (read["look_bits"].fillna(np.inf) >= read["mean_bits"].fillna(0)).to_numpy()[0]
    table = search.markdown(results)
    assert table == search.markdown(read)
    assert table.count("\n") == 2 + 3
    assert table.count("as is, coded") == 1


def test_halves_are_disjoint_and_whole(small):
    test = small[1][2]
    first, second = (search.half(test, sealed=sealed) for sealed in (False, True))
    assert torch.equal(whole_split(first)[0], whole_split(search.half(test, sealed=False))[0])
    rows = torch.cat([whole_split(first)[0], whole_split(second)[0]])
    assert len(rows) == len(test.dataset)
    assert sorted(rows[:, 0].tolist()) == sorted(whole_split(test)[0][:, 0].tolist())


def test_random_allocations_are_refined(small, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.grids.trained", lambda _: small[0])
    monkeypatch.setattr("benchmarks.grids.loaders", lambda _: small[1])
    monkeypatch.setattr(search_quality, "BUDGETS", (6.0,))
    monkeypatch.setattr(search_quality, "DRAWN", 5)
    monkeypatch.setattr(search_quality, "find_strategy", quick)
    monkeypatch.setattr(
        search_quality, "default_search_space", lambda *given: default_search_space(*given, WIDTHS)
    )
    (row,) = search_quality.measure("dense_mnist", str(tmp_path))
    assert row["refined_ratio"] <= row["random_ratio"]
    assert row["found_bits"] <= 6.0
    assert search_quality.markdown(pd.DataFrame([row])).count("\n") == 3


def test_a_recipe_and_nine_trainings_as_tables():
    row = {"network": "net", "epochs": 4, "val_loss": 0.5, "val_loss_after": 0.49, "gain": 0.02}
    table = recipes.markdown(
        pd.DataFrame([{**row, "val_accuracy": 0.5}, row]).assign(val_accuracy_after=None)
    )
    assert "| net | 4 | 0.5 | 0.49 | 2.0% | 50.00% | – |" in table
    bits = {(0, 0): 2.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): np.nan}
    nine = [
        {"network": "net", "limit": 1.01, "seed": seed, "split": split, "mean_bits": found}
        for (seed, split), found in bits.items()
    ]
    table = stability.markdown(pd.DataFrame(nine))
    assert "| seed 1 | 2.000 | none |" in table
    assert "Mean 2.333 bits; the furthest is 29% away." in table


ROW = {"mean_bits": 2.5, "value": 0.99, "bound": 1.0, "low": 0.98, "high": 1.0}


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        ({}, "–"),
        ({("coded", "calibrated_ratio"): 2.5}, "**2.500**, 0.9900"),
        ({("coded", "calibrated_ratio"): np.nan}, "none"),
        (
            {("coded", "calibrated_ratio"): np.nan, ("packed", "criterion_ratio"): 3.0},
            "none; **3.000**, 0.9900 (CR, packed)",
        ),
        ({("coded", "criterion_ratio"): np.nan}, "none (CR)"),
    ],
)
def test_a_cell_of_the_summary_says_what_failed_before_it(judged, words):
    rows = {("net", "trained", *key): ROW | {"mean_bits": bits} for key, bits in judged.items()}
    given = ("net", "trained", ("coded", "packed"), "calibrated_ratio")
    assert readme.certified(rows, *given) == words


def test_the_best_peer_is_of_each_kind():
    rows = [("net", 1.01, "a", 3.0), ("net", 1.01, "b", 2.0), ("net", 1.01, "nncodec", 1.5)]
    rows += [("net", 1.05, "a", 1.0), ("net", 1.01, "c", np.nan), ("other", 1.01, "a", np.nan)]
    table = pd.DataFrame(rows, columns=["network", "limit", "peer", "best_bits"])
    assert readme.best_peer(table, "net") == "2.000 (b); 1.500 (nncodec, coded)"
    assert readme.best_peer(table, "other") == "–"


@pytest.mark.parametrize(
    ("looks", "bits", "words"),
    [(np.nan, np.nan, ""), (3, 2.5, ""), (3, 4.0, "; at look 3: 4.000"), (3, np.nan, ": none")],
)
def test_what_a_look_leaves_is_said_where_it_is_other_bits(looks, bits, words):
    found = search.cell(ROW | {"looks": looks, "look_bits": bits})
    assert found.endswith(words)
    assert ("look" in found) == bool(words)
