"""Whether each network is trained to the end: what one more epoch would take off its loss.

    python -m benchmarks.recipes [--network NAME]

A float network that is not trained to the end makes a criterion ratio measure training: what
learns codes goes on with it. Each network is trained as params.yaml says, then for one epoch more,
over which the learning rate falls from where the recipe starts to zero. Writes
benchmarks/results/recipes.csv, judged on validation data: `gain` is the fraction of its loss that
the epoch took off, below 0 where it added some; an end is where that is below 2%.
"""

import time
from typing import Any

import pandas as pd
import torch

from benchmarks import grids
from quantifind.workflow.train_workflow import train_network

RESULTS = grids.ROOT / "benchmarks/results/recipes.csv"
MARKERS = grids.markers("python -m benchmarks.recipes")
# the most that one more epoch may take off
GAIN = 0.02


def measure(network: str) -> dict[str, Any]:
    """A network's row."""
    started = time.monotonic()
    made, splits, history = grids.newly_trained(network)
    seconds, last = time.monotonic() - started, history.iloc[-1]
    options: dict[str, Any] = {"epochs": 1, "decay": True, "forward": made.forward}
    more = train_network(*made[:3], *splits[:2], **options).iloc[-1]
    return {
        "network": network,
        "epochs": len(history),
        "val_loss": last["val_loss"],
        "val_loss_after": more["val_loss"],
        "gain": 1 - more["val_loss"] / last["val_loss"],
        "val_accuracy": last.get("val_accuracy"),
        "val_accuracy_after": more.get("val_accuracy"),
        "seconds": seconds,
    }


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network."""
    lines = [
        "| network | epochs | validation loss | after one more | taken off | accuracy | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        right = [row[name] for name in ("val_accuracy", "val_accuracy_after")]
        cells = [
            row["network"],
            f"{row['epochs']}",
            f"{row['val_loss']:.4g}",
            f"{row['val_loss_after']:.4g}",
            f"{row['gain']:.1%}",
            *("–" if pd.isna(accuracy) else f"{accuracy:.2%}" for accuracy in right),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for network in grids.chosen_networks(__doc__):
        rows.append(measure(network))
        results = grids.write_rows(RESULTS, pd.DataFrame(rows))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
        if rows[-1]["gain"] >= GAIN:
            print(f"{network} is not trained to the end: more epochs, or a rate that falls")
    print(markdown(results))


if __name__ == "__main__":
    main()
