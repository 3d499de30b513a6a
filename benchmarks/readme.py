"""What README.md shows of results: a table of four networks, what `make repro` leaves, an example.

    python -m benchmarks.readme [--example]

The table is made from benchmarks/results/, the first lines of metrics/recommendation.md are as the
last run of the pipeline left them. With --example the first block of Python runs on `NETWORK`,
trained as the pipeline trains it, and what it prints is put below it.
"""

import argparse
import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import pandas as pd

from benchmarks import grids, search, table
from benchmarks.peers import __main__ as peers
from quantifind.certification.measures import MEASURES
from quantifind.tensor.choice import STORAGES

README = grids.ROOT / "README.md"
RECOMMENDATION = grids.ROOT / "metrics/recommendation.md"
SUMMARY_MARKERS = grids.markers("python -m benchmarks.readme")
RECOMMENDATION_MARKERS = grids.markers("metrics/recommendation.md")
EXAMPLE_MARKERS = grids.markers("python -m benchmarks.readme --example")
BLOCK = re.compile(r"```py\n(.*?)```", re.DOTALL)
NETWORK, LIMIT = "dense_mnist", 1.01
# the peers that entropy code
CODED_PEERS = ("nncodec",)
# lines of metrics/recommendation.md: the answer and the looks, below the title
FIRST, LAST = 2, 7


def summary(found: pd.DataFrame, of_peers: pd.DataFrame, networks: pd.DataFrame) -> str:
    """The table of what is certified, a line per network.

    found: benchmarks/results/search.csv. of_peers: peers.csv. networks: networks.csv.
    """
    found = search.with_storage(found.copy())
    measure = headline(found)
    lines = [
        f"| network | certified bits at {MEASURES[measure].words} ≤ {LIMIT}, as it is | the same, "
        "coded | following, coded | trained further, coded | one depth for all, CR "
        "| best peer, CR |",
        "|---" * 7 + "|",
    ]
    asked = found[found["limit"] == LIMIT].set_index(["network", "answer", "storage", "measure"])
    by_key = asked.to_dict("index")
    depths = networks.set_index("network")[f"certified_{LIMIT}"]
    packed, coded = STORAGES
    columns = {
        "as_is": [(packed,), (coded,)],
        "following": [(coded, packed)],
        "trained": [(coded, packed)],
    }
    for name in networks["network"]:
        cells = [
            certified(by_key, name, answer, storages, measure)
            for answer, several in columns.items()
            for storages in several
        ]
        uniform = "none" if pd.isna(depths[name]) else f"{depths[name]:.0f}"
        lines.append(f"| {name} | {' | '.join([*cells, uniform, best_peer(of_peers, name)])} |")
    return "\n".join(lines) + "\n"


def headline(found: pd.DataFrame) -> str:
    """The calibrated ratio, where all networks have been judged by it."""
    calibrated = found[found["measure"] == "calibrated_ratio"]
    whole = set(calibrated["network"]) == set(found["network"])
    return "calibrated_ratio" if whole else "criterion_ratio"


def certified(
    rows: Mapping[tuple[str, ...], dict[Any, Any]],
    network: str,
    answer: str,
    storages: tuple[str, ...],
    measure: str,
) -> str:
    """The bits of the first row of some storages that is certified, with the ratio on test data: by
    a measure, or else by the criterion ratio; before it, which were judged without success.

    rows: by network, answer, storage and measure, of benchmarks/results/search.csv.
    """
    failed: list[str] = []
    for storage in storages:
        for by in (measure, "criterion_ratio"):
            row = rows.get((network, answer, storage, by))
            if row is None:
                continue
            notes = ["CR"] * (by != measure) + [storage] * (storage != storages[0])
            noted = f" ({', '.join(notes)})" if notes else ""
            if pd.isna(row["mean_bits"]):
                failed.append(f"none{noted}; ")
                continue
            said = f"**{row['mean_bits']:.3f}**, {row['value']:#.4g}{search.earlier(row)}{noted}"
            return "".join(failed) + said
    return "".join(failed).rstrip("; ") or "–"


def best_peer(of_peers: pd.DataFrame, network: str) -> str:
    """The fewest bits that any peer has within the limit, picked on test data, and whose: of those
    with codes of fixed width, and of those that code them."""
    rows = of_peers[(of_peers["network"] == network) & (of_peers["limit"] == LIMIT)]
    said = []
    for coded in (False, True):
        some = rows[rows["best_bits"].notna() & (rows["peer"].isin(CODED_PEERS) == coded)]
        if len(some):
            best = some.loc[some["best_bits"].idxmin()]
            said.append(f"{best['best_bits']:.3f} ({best['peer']}{', coded' * coded})")
    return "; ".join(said) or "–"


def recommendation(text: str) -> str:
    """The first lines of a recommendation, as a quotation."""
    lines = text.splitlines()
    return "".join(f"> {line}\n" for line in lines[FIRST:LAST] if line)


def example(block: str) -> str:
    """What a block of Python prints, which has a trained network, its loss and its loaders."""
    net, crit = grids.trained(NETWORK)
    train_loader, val_loader, _ = grids.loaders(NETWORK)
    names = {"net": net, "crit": crit, "train_loader": train_loader, "val_loader": val_loader}
    return printed(block, names)


def printed(block: str, names: dict[str, object]) -> str:
    """What a block of Python prints, as a block of text."""
    with redirect_stdout(io.StringIO()) as output:
        exec(block, names)
    return f"```text\n{output.getvalue().rstrip()}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--example", action="store_true", help="run the first block of Python too")
    results = (pd.read_csv(one.RESULTS) for one in (search, peers, table))
    grids.write_table(SUMMARY_MARKERS, summary(*results))
    if RECOMMENDATION.is_file():
        text = RECOMMENDATION.read_text(encoding="utf-8")
        grids.write_table(RECOMMENDATION_MARKERS, recommendation(text))
    if parser.parse_args().example:
        block = BLOCK.search(README.read_text(encoding="utf-8"))
        assert block is not None
        grids.write_table(EXAMPLE_MARKERS, example(block[1]))


if __name__ == "__main__":
    main()
