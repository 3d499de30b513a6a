"""Four networks at uniform depths, from a run of the pipeline for each (cached ones cost nothing).

    make table

Each network runs as a DVC experiment of its own name, in a folder of its own, so that afterwards
`dvc plots diff dense_mnist conv_mnist` compares them. Writes benchmarks/results/networks.csv,
docs/criterion_ratio.png, and the table of docs/results.md.
"""

import subprocess
import sys
from typing import Any

import dvc.api
import pandas as pd

from benchmarks.grids import ROOT, markers, write_table

RESULTS = ROOT / "benchmarks/results/networks.csv"
PICTURE = ROOT / "docs/criterion_ratio.png"
NETWORKS = ("conv_mnist", "dense_mnist", "language_transformer", "simple_dense")
MARKERS = markers("make table")


def run(network: str) -> dict[str, Any]:
    """Run the pipeline for one network; its row of the table."""
    command = [sys.executable, "-m", "dvc", "exp"]
    # an experiment of this name from an earlier call would be in the way
    subprocess.run([*command, "remove", "--quiet", network], cwd=ROOT, stderr=subprocess.DEVNULL)
    options = ["--temp", "--name", network, "--set-param", f"model={network}"]
    subprocess.run([*command, "run", *options], cwd=ROOT, check=True)
    metrics = dvc.api.metrics_show(repo=str(ROOT), rev=network)
    lowest = metrics["lowest_scr"]
    return {
        "network": network,
        "criterion": metrics["float"]["criterion"],
        "accuracy": metrics["float"].get("accuracy"),
        "certified_1.01": metrics["certified_depth"]["at_1.01"],
        "certified_1.05": metrics["certified_depth"]["at_1.05"],
        "lowest_scr": lowest["value"],
        "lowest_scr_depth": lowest["bit_depth"],
        "ratio_4_bits": metrics["criterion_ratio"]["4_bits"],
        "error_4_bits": metrics["relative_error"]["4_bits"],
        "ratio_8_bits": metrics["criterion_ratio"]["8_bits"],
        "error_8_bits": metrics["relative_error"]["8_bits"],
    }


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network."""
    lines = [
        "| network | float criterion | accuracy | certified CR ≤ 1.01 | CR ≤ 1.05 | lowest SCR "
        "| CR (output error) at 8 bits | at 4 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        accuracy = "–" if pd.isna(row["accuracy"]) else f"{100 * row['accuracy']:.2f}%"
        depths = (row["certified_1.01"], row["certified_1.05"])
        certified = ["none" if pd.isna(depth) else f"{depth:.0f} bits" for depth in depths]
        cells = [
            row["network"],
            f"{row['criterion']:.3g}",
            accuracy,
            *certified,
            f"{row['lowest_scr']:.3g} at {row['lowest_scr_depth']:.0f} bits",
            *(f"{row[f'ratio_{b}_bits']:.4g} ({row[f'error_{b}_bits']:.2%})" for b in (8, 4)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results = pd.DataFrame([run(network) for network in NETWORKS])
    RESULTS.parent.mkdir(exist_ok=True)
    results.to_csv(RESULTS, index=False)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(
        dvc.api.read("plots/criterion_ratio.png", repo=str(ROOT), rev="conv_mnist", mode="rb")
    )
    write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
