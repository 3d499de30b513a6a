"""The fewest bits that are certified, of each network in each of the three answers.

    python -m benchmarks.search [--network NAME] [--answer NAME] [--seconds SECONDS] [--epochs N]
                                [--folder FOLDER] [--storage {packed,coded}] [--sealed]

Each network is trained as the pipeline trains it. The search sees train and validation data; the
ladder it fixes is judged on one half of the test data; with --sealed on the other, which is kept
for what is published (benchmarks/results/search_sealed.csv). Answers are
`quantifind.certification.goal.ANSWERS`, limits those of `LIMITS` of each of `MEASURES`; the
searches of a network share what they measure, so that the seconds of all but the first leave that
out. Weights are stored packed, or as --storage says. Rows of benchmarks/results/search.csv are
written as they come. Of a row: `mean_bits`, `value`, `low`, `high` and `bound` are those of the
strategy that is certified with 95% confidence, were its ladder the only one; it was number `looks`
that was judged on this half (benchmarks/results/looks.json), and `look_bits` are certified at the
level that is left for it. Of what was trained further, `control_ratio` is the loss of float weights
that had the same training over the float network's, `matched_ratio` the strategy's loss over
theirs.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import grids
from quantifind.certification.goal import ANSWERS, steps_that_keep
from quantifind.search import find_strategy
from quantifind.tensor.choice import STORAGES
from quantifind.utils.loaders import Loaders, Tensors, batch_loader, whole_split
from quantifind.workflow.certification_workflow import certify

RESULTS = grids.ROOT / "benchmarks/results/search.csv"
SEALED = grids.ROOT / "benchmarks/results/search_sealed.csv"
LOOKS = grids.ROOT / "benchmarks/results/looks.json"
MARKERS = grids.markers("python -m benchmarks.search")
SEALED_MARKERS = grids.markers("python -m benchmarks.search --sealed")
MEASURES = ("criterion_ratio", "calibrated_ratio")
LIMITS = (1.01, 1.05, 1.10)
# of learned rounding, chosen on validation data: with twice as many dense_mnist follows better
LEARNED = {"dense_mnist": 12, "conv_mnist": 12, "language_transformer": 16, "simple_dense": 2}
EPOCHS = {
    "as_is": dict.fromkeys(LEARNED, 0),
    "following": LEARNED | {"dense_mnist": 24},
    "trained": LEARNED,
}
# a row is of these
KEY = ["network", "answer", "measure", "limit", "storage"]
COLUMNS = ["mean_bits", "value", "low", "high", "bound", "looks", "seconds", "epochs", "look_bits"]
MATCHED = [
    f"{name}{end}" for name in ("control_ratio", "matched_ratio") for end in ("", "_low", "_high")
]
# by which the halves of the test data are drawn
SPLIT = 18


def half(test: DataLoader, *, sealed: bool) -> DataLoader:
    """One half of the test data, drawn at random and always the same; with sealed the other."""
    inputs, targets = whole_split(test)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT))
    chosen = order.tensor_split(2)[int(sealed)].sort().values
    return batch_loader(
        Tensors(inputs[chosen], targets[chosen]), batch_size=250, shuffle=False, seed=0
    )


def rows_of(
    network: str,
    made: tuple[nn.Module, nn.Module],
    splits: Loaders,
    answers: Sequence[str],
    *,
    epochs: Mapping[str, float],
    seconds: float | None = None,
    folder: Path | str | None = None,
    looks: Path | None = None,
    storage: str = "packed",
) -> Iterator[dict[str, Any]]:
    """A row for each answer, measure and limit.

    made: the trained network, and its criterion.
    splits: training and validation data, and test data to judge on.
    epochs: of learning, by answer.
    seconds: that each search may take.
    folder: keeps what is measured.
    looks: a ledger.
    storage: of weights, one of `quantifind.tensor.choice.STORAGES`.
    """
    net, criterion = made
    train, val, test = splits
    for answer in answers:
        learn = epochs[answer]
        how: Any = {"learn": learn, "labels": answer == "trained", "seconds": seconds}
        how["storage"] = storage
        for measure in MEASURES:
            for limit in LIMITS:
                row = dict(zip(KEY, (network, answer, measure, limit, storage), strict=True))
                row |= dict.fromkeys([*COLUMNS, *MATCHED], np.nan)
                started = time.monotonic()
                try:
                    asked = {measure: limit}
                    found = find_strategy(
                        net, train, val, criterion, limit=asked, folder=folder, **how
                    )
                except ValueError as error:  # that nothing keeps the limit is a result, too
                    print(f"{network} {answer} {measure} {limit:g}: {error}", flush=True)
                    yield {**row, "epochs": learn, "seconds": time.monotonic() - started}
                    continue
                row |= {"epochs": learn, "seconds": time.monotonic() - started}
                yield row | judged(net, found, test, measure, looks)


def judged(
    net: nn.Module, found: Any, test: DataLoader, measure: str, looks: Path | None
) -> dict[str, Any]:
    """What test data say of a search's ladder."""
    certificate = certify(net, found, test, looks=looks)
    steps, limits = certificate.steps, certificate.limits
    passed, row = steps_that_keep(steps, limits), {}
    if certificate.look is not None:
        at_look = steps_that_keep(steps, limits, "look_bound")
        bits = steps["mean_bits"].iloc[at_look - 1] if at_look else np.nan
        row = {"looks": certificate.look.k, "look_bits": bits}
    if not passed:
        return row
    best = steps.iloc[passed - 1]
    row |= {"mean_bits": best["mean_bits"], "value": best[measure]}
    row |= {end: best[f"{measure}_{end}"] for end in ("low", "high", "bound")}
    return row | {name: best[name] for name in MATCHED if name in best}


def put(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Write rows in place of those there are of the same `KEY`; all rows, in the order of networks
    and answers.

    path: of the table to add to.
    """
    if path.exists():
        before = with_storage(pd.read_csv(path))
        rows = pd.concat([before, rows]).drop_duplicates(KEY, keep="last")
    places: dict[str, tuple[str, ...]] = {"network": grids.NETWORKS, "answer": tuple(ANSWERS)}
    places |= {"measure": MEASURES, "storage": STORAGES}
    rows = rows.sort_values(
        KEY, key=lambda c: c.map(places[c.name].index) if c.name in places else c, kind="stable"
    )
    partial = path.with_suffix(".partial")
    rows.to_csv(partial, index=False)
    partial.replace(path)
    return rows


def with_storage(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that may be from before there was another storage than packed."""
    if "storage" not in rows:
        rows.insert(KEY.index("storage"), "storage", STORAGES[0])
    return rows


def markdown(results: pd.DataFrame) -> str:
    """The table of certified strategies, a line per network, answer, measure and storage, and a
    column per limit."""
    results = with_storage(results.copy())
    limits = sorted(set(results["limit"]))
    lines = [
        "| certified on test: mean bits, the ratio, 95% interval | answer | ratio "
        + " ".join(f"| ≤ {limit:g}" for limit in limits)
        + " | of these, matched ratio |",
        "|---" * (4 + len(limits)) + "|",
    ]
    lined = [name for name in KEY if name != "limit"]
    for (network, answer, measure, storage), rows in results.groupby(lined, sort=False):
        by_limit = {row["limit"]: row for row in rows.to_dict("records")}
        cells = [cell(by_limit.get(limit)) for limit in limits]
        ratios = [
            f"{row['matched_ratio']:#.4g}"
            for row in by_limit.values()
            if not pd.isna(row["matched_ratio"])
        ]
        stored = "" if storage == STORAGES[0] else f", {storage}"
        named = f"{answer.replace('_', ' ')}{stored} | {measure.split('_')[0]}"
        beside = ", ".join(ratios) or "–"
        lines.append(f"| {network} | {named} | {' | '.join(cells)} | {beside} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    """A certified strategy in the table."""
    if row is None:
        return "–"
    if pd.isna(row["mean_bits"]):
        return "none"
    return f"**{row['mean_bits']:.3f}** bits, {interval(row)}{earlier(row)}{at_its_look(row)}"


def at_its_look(row: dict[str, Any]) -> str:
    """What is certified at the level that was left for the look, where that is other bits."""
    if pd.isna(row["looks"]) or row["look_bits"] == row["mean_bits"]:
        return ""
    bits = "none" if pd.isna(row["look_bits"]) else f"{row['look_bits']:.3f}"
    return f"; at look {row['looks']:.0f}: {bits}"


def earlier(row: dict[str, Any]) -> str:
    """A mark of what is of an earlier recipe, judged on all test data."""
    return " †" if pd.isna(row["bound"]) else ""


def interval(row: dict[str, Any]) -> str:
    """The ratio with its interval."""
    return f"{row['value']:#.4g} [{row['low']:#.4g}, {row['high']:#.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=grids.NETWORKS, help="by default all of them")
    parser.add_argument("--answer", choices=ANSWERS, help="by default all three")
    parser.add_argument("--seconds", type=float, help="of each search, without end by default")
    parser.add_argument("--epochs", type=float, help="of learning, by default those of EPOCHS")
    parser.add_argument("--folder", help="keeps what is measured, by default until the end")
    parser.add_argument("--storage", choices=STORAGES, default=STORAGES[0], help="of weights")
    parser.add_argument("--sealed", action="store_true", help="judge on the half that is kept back")
    given = parser.parse_args()
    path, place = (SEALED, SEALED_MARKERS) if given.sealed else (RESULTS, MARKERS)
    for network in [given.network] if given.network else grids.NETWORKS:
        made, (train, val, test) = grids.trained(network), grids.loaders(network)
        epochs = {answer: by_network[network] for answer, by_network in EPOCHS.items()}
        if given.epochs is not None:
            epochs |= dict.fromkeys(("following", "trained"), given.epochs)
        splits = train, val, half(test, sealed=given.sealed)
        with tempfile.TemporaryDirectory() as temporary:
            for row in rows_of(
                network,
                made,
                splits,
                [given.answer] if given.answer else list(ANSWERS),
                epochs=epochs,
                seconds=given.seconds,
                folder=given.folder or temporary,
                looks=LOOKS,
                storage=given.storage,
            ):
                results = put(pd.DataFrame([row]), path)
                print(pd.DataFrame([row]).to_string(index=False), flush=True)
        grids.write_table(place, markdown(results))
        print(markdown(results))


if __name__ == "__main__":
    main()
