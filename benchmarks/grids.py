"""What each way of putting a network on few levels costs, all its tensors at the same width.

    python -m benchmarks.grids [--network NAME]

Each network is trained as the pipeline trains it (a DVC experiment, from the cache where it ran
before). Scales, codes and rounding come from train data alone; each row is judged once on test
data. Writes benchmarks/results/grids.csv and, of all four networks, the table of docs/results.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import dvc.api
import pandas as pd
import torch
from safetensors.torch import load
from torch import nn

from quantifind.learning import learn
from quantifind.metrics import outcome
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.strategy import Strategy, uniform_activations, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins
from quantifind.utils.loaders import Loaders
from quantifind.workflow.evaluation_workflow import compare
from quantifind.workflow.train_workflow import train_network
from stages.networks import Context, create_network
from stages.params import read_params

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/grids.csv"
NETWORKS = ("dense_mnist", "conv_mnist", "language_transformer", "simple_dense")


def markers(command: str) -> re.Pattern[str]:
    """Finds what stands in a page after the marker with a command, up to the next end."""
    return re.compile(rf"(?<=<!-- {re.escape(command)} -->\n).*?(?=<!-- end -->)", re.DOTALL)


MARKERS = markers("python -m benchmarks.grids")
CALIBRATION_BATCHES = 64
NEAREST = {"axis": 0, "scale_dtype": "float16"}
GPTQ = NEAREST | {"rounding": "gptq", "scale": "output_mse"}
# by row: a choice for all tensors, the bits of activations, epochs of learning
ROWS: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "per channel + GPTQ, 3 bits": (GPTQ | {"bits": 3}, None, None),
    "per channel + GPTQ, 2 bits": (GPTQ | {"bits": 2}, None, None),
    "learned, 2 bits, 2 epochs": (GPTQ | {"bits": 2, "half_integer": True}, None, 2),
    "learned, ternary, 2 epochs": (GPTQ | {"levels": 3}, None, 2),
    "learned, binary, 4 epochs": (GPTQ | {"bits": 1}, None, 4),
    "8-bit weights and activations": (NEAREST | {"bits": 8}, 8, None),
    "4-bit weights (GPTQ) and activations": (GPTQ | {"bits": 4}, 4, None),
}


def trained(network: str) -> tuple[nn.Module, nn.Module]:
    """The network as `dvc exp run` trains it, in eval mode, and its criterion."""
    command = [sys.executable, "-m", "dvc", "exp"]
    name = f"trained-{network}"
    # an experiment of this name from an earlier call would be in the way
    subprocess.run([*command, "remove", "--quiet", name], cwd=ROOT, stderr=subprocess.DEVNULL)
    options = ["--temp", "--name", name, "--set-param", f"model={network}"]
    # the stages' python is this one, the environment activated or not
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    subprocess.run([*command, "run", *options, "train"], cwd=ROOT, env=environment, check=True)

    def read(file: str) -> bytes:
        return dvc.api.read(f"out/checkpoint/{file}", repo=str(ROOT), rev=name, mode="rb")

    made_by = json.loads(read("network.json"))
    create = plugins.load("models", made_by["network"], "create_model_context")
    net, criterion, _ = create(**made_by["options"])
    net.load_state_dict(load(read("weights.safetensors")))
    return net.eval(), criterion


def newly_trained(
    network: str, *, seed: int | None = None, split: int | None = None
) -> tuple[Context, Loaders, pd.DataFrame]:
    """A network trained here, as the pipeline trains it: what it is made of, the loaders that it
    has seen, and the history of the epochs.

    seed, split: of the weights it begins with, and of the splits and the order of the examples; by
    default those of params.yaml.
    """
    params = read_params(ROOT / "params.yaml")
    entry, splits = params.models[network], loaders(network, seed=split)
    torch.manual_seed(params.seed if seed is None else seed)
    made = create_network(entry.network, entry.options, {})
    how: Any = {"epochs": entry.epochs, "decay": entry.decay, "forward": made.forward}
    return made, splits, train_network(*made[:3], *splits[:2], **how)


def loaders(network: str, *, seed: int | None = None) -> Loaders:
    """The loaders of train, validation and test that the pipeline prepares for it.

    seed: of the splits and the order of training data, by default that of params.yaml.
    """
    params = read_params(ROOT / "params.yaml")
    entry = params.models[network]
    create = plugins.load("data", entry.data, "create_dataloaders")
    return create(batch_size=entry.batch_size, seed=params.seed if seed is None else seed)


def measure(network: str) -> list[dict[str, Any]]:
    """A row of the table for each of `ROWS`."""
    net, criterion = trained(network)
    *_, test = loaders(network)
    original = outcome(net, test, criterion)
    rows = []
    for row, (choice, activation_bits, epochs) in ROWS.items():
        train, *_ = loaders(network)  # anew, so that no row depends on those before it
        started = time.monotonic()
        quantized = put_on(net, train, choice, activation_bits, epochs)
        seconds = time.monotonic() - started
        judged = compare(outcome(quantize_model(net, quantized), test, criterion), original)
        rows.append(
            {
                "network": network,
                "row": row,
                "mean_bits": mean_bits(net, quantized),
                "criterion_ratio": judged["criterion_ratio"],
                "low": judged["criterion_ratio_low"],
                "high": judged["criterion_ratio_high"],
                "seconds": seconds,
            }
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def put_on(
    net: nn.Module,
    train: Any,
    choice: dict[str, Any],
    activation_bits: int | None,
    epochs: int | None,
) -> Quantized:
    """The network with every tensor as ``choice`` says."""
    calibration = list(islice(train, CALIBRATION_BATCHES))
    strategy = uniform_strategy(net, **choice)
    if activation_bits is not None:
        options = {"bits": activation_bits, "scale": "mse"}
        strategy = Strategy(strategy.tensors, uniform_activations(net, calibration, **options))
    if epochs is None:
        return quantize(net, strategy, calibration)
    return learn(net, strategy, train, epochs=epochs, calibration=calibration)


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per row of it and a column per network."""
    networks = list(dict.fromkeys(results["network"]))
    lines = [f"| CR on test, 95% interval, mean bits | {' | '.join(networks)} |"]
    lines.append("|---" * (1 + len(networks)) + "|")
    for row, of_row in results.groupby("row", sort=False):
        cells = {
            one["network"]: f"{ratio(one)}, {one['mean_bits']:.3f}"
            for one in of_row.to_dict("records")
        }
        lines.append(f"| {row} | {' | '.join(cells.get(name, '–') for name in networks)} |")
    return "\n".join(lines) + "\n"


def ratio(row: Mapping[str, Any]) -> str:
    """A criterion ratio with its interval, of a row with `low` and `high`."""
    return f"{row['criterion_ratio']:#.4g} [{row['low']:#.4g}, {row['high']:#.4g}]"


def measured(
    rows_of: Callable[..., Iterable[Mapping[str, Any]]], networks: Iterable[str], path: Path
) -> pd.DataFrame:
    """The rows of networks, each trained as the pipeline trains it, and of those there are already
    in ``path``; written and printed as they come.

    rows_of: (network, (the trained network, its criterion), its loaders) → rows.
    networks: their names, one or more.
    """
    torch.manual_seed(0)
    for network in networks:
        rows = pd.DataFrame(rows_of(network, trained(network), loaders(network)))
        print(rows.to_string(index=False), flush=True)
        results = write_rows(path, rows)
    return results


def write_rows(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Write the rows of some networks, and those of the others that are there already; all rows, in
    the order of `NETWORKS`."""
    if path.exists():
        kept = pd.read_csv(path)
        rows = pd.concat([kept[~kept["network"].isin(rows["network"])], rows])
    rows = rows.sort_values("network", key=lambda n: n.map(NETWORKS.index), kind="stable")
    path.parent.mkdir(exist_ok=True)
    rows.to_csv(path, index=False)
    return rows


def write_table(place: re.Pattern[str], table: str) -> None:
    """Put a table between the markers of the page that has them."""
    (page,) = (page for page in pages() if place.search(page.read_text(encoding="utf-8")))
    text = page.read_text(encoding="utf-8")
    page.write_text(place.sub(lambda _: table, text, count=1), encoding="utf-8")


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def chosen_networks(description: str | None) -> list[str]:
    """The one that --network names, or all of them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="by default all of them")
    chosen = parser.parse_args().network
    return [chosen] if chosen else list(NETWORKS)


def main() -> None:
    chosen = chosen_networks(__doc__)
    torch.manual_seed(0)
    measured = [row for name in chosen for row in measure(name)]
    results = write_rows(RESULTS, pd.DataFrame(measured))
    results = results[results["row"].isin(ROWS)]
    if set(results["network"]) == set(NETWORKS):
        write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
