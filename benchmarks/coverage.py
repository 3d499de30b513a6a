"""How often the certificate's bound is below the truth, on losses of real networks.

    python -m benchmarks.coverage [--network NAME]

The test split's pairs of losses, of a network and of it at a uniform bit depth, stand for all there
are, so that their criterion ratio is known. Samples as large as the split are drawn from them with
replacement; the bound of 95% confidence should be below that ratio in 5% of the draws. Writes
benchmarks/results/coverage.csv and, of all four networks, the table of docs/results.md.
"""

from typing import Any

import numpy as np
import pandas as pd

from benchmarks import grids
from quantifind.certification.certificate import ratio_bound
from quantifind.quantize import quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy

RESULTS = grids.ROOT / "benchmarks/results/coverage.csv"
MARKERS = grids.markers("python -m benchmarks.coverage")
DEPTHS = (8, 6, 5, 4, 3, 2)
DRAWS = 2_000


def measure(network: str) -> list[dict[str, Any]]:
    """A row per depth."""
    net, criterion = grids.trained(network)
    evaluator = Evaluator(net, grids.loaders(network)[2], criterion)
    original = evaluator.outcome()["loss"].numpy()
    generator, rows = np.random.default_rng(0), []
    for bits in DEPTHS:
        losses = evaluator.outcome(quantize(net, uniform_strategy(net, bits)))["loss"].numpy()
        ratio, wrong = losses.mean() / original.mean(), 0
        for _ in range(DRAWS):
            drawn = generator.integers(len(losses), size=len(losses))
            wrong += ratio_bound(losses[drawn], original[drawn]) < ratio
        rows.append(
            {"network": network, "bits": bits, "criterion_ratio": ratio, "wrong": wrong / DRAWS}
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network and a column per depth."""
    depths = list(dict.fromkeys(results["bits"]))
    lines = [
        f"| bound below the true CR | {' | '.join(f'{bits} bits' for bits in depths)} |",
        "|---" * (1 + len(depths)) + "|",
    ]
    for network, rows in results.groupby("network", sort=False):
        lines.append(f"| {network} | {' | '.join(f'{wrong:.1%}' for wrong in rows['wrong'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = grids.chosen_networks(__doc__)
    measured = [row for name in chosen for row in measure(name)]
    results = grids.write_rows(RESULTS, pd.DataFrame(measured))
    if set(results["network"]) == set(grids.NETWORKS):
        grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
