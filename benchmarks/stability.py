"""What is certified of dense_mnist as it is, trained and split by chance in other ways.

    python -m benchmarks.stability [--network NAME] [--limit LIMIT]

Three seeds of training (the weights it begins with) times three of the splits into training and
validation data: by default calibrated ratio ≤ 1.01, without learning. The ladder of each is judged
on the half of the test data that is not sealed, as `benchmarks.search` does. Rows of
benchmarks/results/stability.csv are written as they come; a second call goes on.
"""

import argparse
import time
from itertools import product
from typing import Any

import pandas as pd

from benchmarks import grids
from benchmarks.search import half, judged
from quantifind.search import find_strategy

RESULTS = grids.ROOT / "benchmarks/results/stability.csv"
MARKERS = grids.markers("python -m benchmarks.stability")
SEEDS = (0, 1, 2)
MEASURE = "calibrated_ratio"
KEY = ["network", "limit", "seed", "split"]


def measure(network: str, limit: float, seed: int, split: int) -> dict[str, Any]:
    """A row: one training, one split."""
    made, (train, val, test), history = grids.newly_trained(network, seed=seed, split=split)
    started = time.monotonic()
    found = find_strategy(made.net, train, val, made.criterion, limit={MEASURE: limit})
    seconds = time.monotonic() - started
    row = {"network": network, "limit": limit, "seed": seed, "split": split}
    row |= {"val_loss": history["val_loss"].iloc[-1], "chosen_bits": found.mean_bits}
    row |= dict.fromkeys(["mean_bits", "value", "low", "high", "bound"])
    return (
        row
        | judged(made.net, found, half(test, sealed=False), MEASURE, None)
        | {"seconds": seconds}
    )


def markdown(results: pd.DataFrame) -> str:
    """The table: a line per seed of training, a column per split, and how far they are apart."""
    lines = []
    for (network, limit), rows in results.groupby(KEY[:2], sort=False):
        bits, splits = rows.set_index(KEY[2:])["mean_bits"], sorted(set(rows["split"]))
        lines += [
            f"| {network}, certified bits at calibrated ratio ≤ {limit:g} "
            + " ".join(f"| split {split}" for split in splits)
            + " |",
            "|---" * (1 + len(splits)) + "|",
        ]
        for seed in sorted(set(rows["seed"])):
            found = [bits.get((seed, split)) for split in splits]
            cells = ["none" if pd.isna(one) else f"{one:.3f}" for one in found]
            lines.append(f"| seed {seed} | {' | '.join(cells)} |")
        away = (bits / bits.mean() - 1).abs().max()
        lines += ["", f"Mean {bits.mean():.3f} bits; the furthest is {away:.0%} away.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=grids.NETWORKS, default="dense_mnist")
    parser.add_argument("--limit", type=float, default=1.01)
    given = parser.parse_args()
    results = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=KEY)
    for seed, split in product(SEEDS, SEEDS):
        key = (given.network, given.limit, seed, split)
        if key in set(results[KEY].itertuples(index=False, name=None)):
            continue
        row = pd.DataFrame([measure(*key)])
        results = row if results.empty else pd.concat([results, row])
        results.to_csv(RESULTS, index=False)
        print(row.to_string(index=False), flush=True)
    grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
