"""Other projects' quantizers beside each other: the fewest bits each finds within a limit of loss.

    python -m benchmarks.peers [--network NAME] [--peer NAME]

Each network is trained as the pipeline trains it; mobilenet_v3_small, of 244 tensors, which only
modelopt is asked for, as `benchmarks.strangers` trains it. Each peer gets the same checkpoint,
calibration examples and validation examples, runs its own search in an environment of its own, on
one thread of the CPU, and answers with networks, whose codes, scales, zero points and float32
values are counted one way. Those are judged here, on validation and on test data, which the peers
never see. Writes benchmarks/results/peers.csv, and the table of docs/peers.md. Its columns, for
each limit of the criterion ratio CR:

- best_bits, best_ratio: the fewest mean bits whose CR on test is within the limit, and that CR:
  what the peer could have found had it known the test data;
- chosen_bits, chosen_validation_ratio, chosen_test_ratio: the fewest mean bits whose CR on
  validation is within the limit, and what came of it on test;
- seconds: of the CPU, for the peer's search on the network, for all limits together.

Of mobilenet_v3_small there are rows of the project itself, too: `find_strategy` for each limit
without learning, on one thread, what is measured shared. Its chosen bits are the fewest that are
certified: validation data fixed a ladder, which test data judge with 95% confidence.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import grids
from benchmarks.peers import exchange
from benchmarks.peers.environments import REQUIREMENTS, python_of
from benchmarks.stranger_networks import STRANGERS
from quantifind import certify, find_strategy
from quantifind.metrics import outcome
from quantifind.utils.loaders import Loaders
from stages.params import read_params

ROOT = grids.ROOT
FOLDER = ROOT / "out/peers"
RESULTS = ROOT / "benchmarks/results/peers.csv"
MARKERS = grids.markers("python -m benchmarks.peers")
NETWORKS = ("dense_mnist", "conv_mnist", "mobilenet_v3_small")
# of many tensors: with who is asked for it
LARGE = {"mobilenet_v3_small": ["modelopt"]}
OWN = "quantifind"
LIMITS = (1.01, 1.05, 1.10)
CALIBRATION_EXAMPLES = 4_096
MOST_SECONDS = 1_800
COLUMNS = ["network", "peer", "version", "limit", "best_bits", "best_ratio", "chosen_bits"]
COLUMNS += ["chosen_validation_ratio", "chosen_test_ratio", "seconds", "note"]


class Judge:
    """Criterion ratios of a network's quantized versions, on validation and on test data."""

    def __init__(self, network: nn.Module, criterion: nn.Module, loaders: Loaders) -> None:
        self.network, self.criterion = network, criterion
        self.loaders = dict(zip(("validation", "test"), loaders[1:], strict=True))
        self.original = {split: self.loss(network, split) for split in self.loaders}

    def loss(self, network: nn.Module, split: str) -> float:
        return outcome(network, self.loaders[split], self.criterion)["loss"].mean().item()

    def ratios(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """By split, with ``weights`` in the place of the network's."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(network.state_dict() | weights)
        return {split: self.loss(network, split) / self.original[split] for split in self.loaders}


def given(name: str) -> tuple[nn.Module, nn.Module, Loaders, dict[str, Any]]:
    """A trained network, its criterion, its data, and what `exchange.created` takes."""
    if name in LARGE:
        stranger = STRANGERS[name][1]()
        assert stranger.criterion is not None
        return stranger.net, stranger.criterion, stranger.loaders, _by(name, num_classes=10)
    entry = read_params(ROOT / "params.yaml").models[name]
    return *grids.trained(name), grids.loaders(name), _by(entry.network, **entry.options)


def _by(network: str, **options: Any) -> dict[str, Any]:
    return {"network": network, "options": options}


def ask(network: nn.Module, name: str, loaders: Loaders, created_by: dict[str, Any]) -> Path:
    """Lay down what every peer is given; the folder it is in."""
    train, validation, _ = loaders

    def examples(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return images, labels

    batches = islice(train, CALIBRATION_EXAMPLES // (train.batch_size or 1))
    exchange.write(
        FOLDER / name / "question",
        network,
        created_by=created_by,
        calibration=examples(batches),
        validation=examples(validation),
    )
    return FOLDER / name / "question"


def asked(peer: str, question: Path) -> Path:
    """Have a peer answer; the folder of its answer.

    Raises: RuntimeError with a line that says why it could not be installed or did not answer.
    """
    folder = question.parent / peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = python_of(peer, FOLDER / "environments")
    command = [str(python), "-m", f"benchmarks.peers.{peer}", str(question), str(folder)]
    # the environment's programs first, and what its packages compile in it
    own = {
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "TORCH_EXTENSIONS_DIR": str(python.parent.parent / "extensions"),
    }
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | own | one_thread,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=MOST_SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"did not end within {MOST_SECONDS} seconds") from error
        except subprocess.CalledProcessError as error:
            lines = (folder / "log.txt").read_text(encoding="utf-8").split("\n")
            raise RuntimeError(next(filter(str.strip, reversed(lines)), "said nothing")) from error
    return folder


def measure(name: str, peers: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a network: for each peer one for each limit."""
    network, criterion, loaders, created_by = given(name)
    judge = Judge(network, criterion, loaders)
    question = ask(network, name, loaders, created_by)
    if name in LARGE:
        rows = list(own(name, network, criterion, loaders))
        show(pd.DataFrame(rows, columns=COLUMNS))
        yield from rows
    for peer in [peer for peer in peers if peer in LARGE.get(name, REQUIREMENTS)]:
        version = REQUIREMENTS[peer][0].partition("==")[2]
        of_peer = {"network": name, "peer": peer, "version": version}
        print(f"{name}: {peer} {version} …", flush=True)
        try:
            folder = asked(peer, question)
        except RuntimeError as error:
            rows = [of_peer | {"limit": limit, "note": str(error)} for limit in LIMITS]
        else:
            rows = [of_peer | row for row in judged(folder, network, judge)]
        show(pd.DataFrame(rows, columns=COLUMNS))
        yield from rows


def own(
    name: str, network: nn.Module, criterion: nn.Module, loaders: Loaders
) -> Iterator[dict[str, Any]]:
    """The project's own rows."""
    train, validation, test = loaders
    search = STRANGERS[name][1]().search
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for limit in LIMITS:
            how = {"limit": {"criterion_ratio": limit}, "folder": folder, **search}
            try:
                found = find_strategy(network, train, validation, criterion, **how)
            except ValueError as error:
                rows.append((limit, None, str(error)))
            else:
                rows.append((limit, found, ""))
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    for limit, found, note in rows:
        row = {"network": name, "peer": OWN, "version": version(OWN), "limit": limit}
        row |= {"seconds": seconds, "note": note}
        steps = certify(network, found, test).steps if found else pd.DataFrame({"certified": []})
        if certified := int(steps["certified"].sum()):
            here, before = steps.iloc[certified - 1], found.ladder.iloc[certified - 1]
            row |= {"chosen_bits": here["mean_bits"], "chosen_test_ratio": here["criterion_ratio"]}
            row["chosen_validation_ratio"] = before["criterion_ratio"]
        yield row


def judged(folder: Path, network: nn.Module, judge: Judge) -> Iterator[dict[str, Any]]:
    """For each limit the fewest bits among an answer's candidates."""
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    candidates = [
        {"candidate": name, "bits": exchange.mean_bits(one["counts"], network)}
        | judge.ratios(load_file(folder / one["file"]))
        for name, one in answer["candidates"].items()
    ]
    table = pd.DataFrame(candidates, columns=["candidate", "bits", "validation", "test"])
    table.sort_values("bits").to_csv(folder / "candidates.csv", index=False)
    for limit in LIMITS:
        row = {"limit": limit, "seconds": answer["seconds"], "note": "; ".join(answer["notes"])}
        best, chosen = (
            table[table[split] <= limit].sort_values(["bits", split]).head(1)
            for split in ("test", "validation")
        )
        for one in best.to_dict("records"):
            row |= {"best_bits": one["bits"], "best_ratio": one["test"]}
        for one in chosen.to_dict("records"):
            row |= {"chosen_bits": one["bits"], "chosen_validation_ratio": one["validation"]}
            row |= {"chosen_test_ratio": one["test"]}
        yield row


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network and peer; the limits one after another in a cell."""
    limits = " / ".join(f"{limit:g}" for limit in sorted(set(results["limit"])))
    lines = [
        f"| CR ≤ {limits} | peer | best on test: mean bits | chosen on validation: mean bits → CR "
        "on test | seconds |",
        "|---|---|---|---|---|",
    ]
    for (network, peer), rows in results.groupby(["network", "peer"], sort=False):
        records = rows.sort_values("limit").to_dict("records")
        best = " / ".join(f"{row['best_bits']:.3f}" for row in records)
        chosen = []
        for row in records:
            broke = row["chosen_test_ratio"] > row["limit"]
            cell = f"{row['chosen_bits']:.3f} → {row['chosen_test_ratio']:.3f}"
            chosen.append(f"**{cell}**" if broke else cell)
        version, seconds = records[0]["version"], records[0]["seconds"]
        lines.append(
            f"| {network} | {peer} {version} | {best} | {' / '.join(chosen)} | {seconds:.0f} |"
        )
    return "\n".join(lines).replace("nan → nan", "–").replace("nan", "–") + "\n"


def show(results: pd.DataFrame) -> None:
    """Print the table, and its notes below it."""
    numbers = results.drop(columns="note")
    print(numbers.to_string(index=False, na_rep="–", float_format="{:.4g}".format))
    noted = results[["network", "peer", "note"]].replace("", None).dropna().drop_duplicates()
    for row in noted.to_dict("records"):
        print(f"{row['network']}, {row['peer']}: {row['note']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="by default all")
    parser.add_argument("--peer", choices=REQUIREMENTS, help="by default all of them")
    chosen = parser.parse_args()
    networks = [name for name in NETWORKS if chosen.network in (None, name)]
    peers = [name for name in REQUIREMENTS if chosen.peer in (None, name)]
    measured = [row for name in networks for row in measure(name, peers)]
    results = pd.DataFrame(measured, columns=COLUMNS)
    if RESULTS.exists():
        kept = pd.read_csv(RESULTS)
        again = kept["network"].isin(networks) & kept["peer"].isin(peers)
        again |= kept["network"].isin(networks) & (kept["peer"] == OWN)
        known = kept["network"].isin(NETWORKS) & kept["peer"].isin([*REQUIREMENTS, OWN])
        results = pd.concat([kept[known & ~again], results])
    known_names = (NETWORKS, (OWN, *REQUIREMENTS))
    order = {name: place for names in known_names for place, name in enumerate(names)}
    by = ["network", "peer", "limit"]
    results = results.sort_values(by, key=lambda column: column.map(order).fillna(column))
    RESULTS.parent.mkdir(exist_ok=True)
    results.to_csv(RESULTS, index=False)
    if not {"dense_mnist", "conv_mnist"} - set(results["network"]):
        grids.write_table(MARKERS, markdown(results))
    show(results)


if __name__ == "__main__":
    main()
