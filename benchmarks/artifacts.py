"""What a quantized network weighs as a file, in memory, and in other runtimes.

    pip install -e '.[onnx,strangers]'
    python -m benchmarks.artifacts [--network NAME] [--untrained] [--folder FOLDER]

What is measured is what becomes of an answer, so most answers are cheap ones: those of `SEARCHED`
are searched briefly at CR ≤ 1.01, the others are `mixed`, and nothing about these is certified.
That of `JUDGED` is searched as `benchmarks.search` does, coded, and certified on test data; where
that ran with a --folder, what it measured is there. Networks are trained as the pipeline, or
benchmarks/strangers.py, has them; with --untrained those that would be trained keep the weights
that they begin with, since sizes don't depend on these. Writes benchmarks/results/artifacts.csv,
the tables of docs/format.md, and a line of README.md. Columns:

- answer, bits: how it was found; per parameter;
- promised, file, header: bytes of ``model_bytes``, of the file, and of its header;
- float32, onnx, pt2: bytes of the float network, and of the exported ones;
- memory: bytes that the tensors of `quantifind.compressed` take;
- seconds: to load the file, the best of three;
- loaded, compressed, by_onnx, by_pt2: the largest difference of their outputs to the copy's, on
  examples of the test data, and largest: the largest magnitude of an output there;
- in_onnx: by what tensors become there, how many, their bytes there, and in the file;
- note: what can't be exported, and why.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnxruntime
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import grids, search, stranger_networks
from quantifind import (
    Choice,
    Strategy,
    certify,
    compressed,
    export,
    find_strategy,
    load,
    quantize_model,
    save,
)
from quantifind.costs import model_bytes
from quantifind.network.modules import named_tensors
from quantifind.quantize import mean_bits, quantize
from quantifind.storage.network_reader import NetworkFile
from quantifind.strategy import uniform_strategy
from quantifind.tensor.parts import quantizable
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import batches_of, tensors_of
from stages.exports import example_of
from stages.networks import create_network
from stages.params import read_params

RESULTS = grids.ROOT / "benchmarks/results/artifacts.csv"
MARKERS = grids.markers("python -m benchmarks.artifacts")
# of README.md, within one line
LINE = re.compile(r"(?<=<!-- python -m benchmarks.artifacts -->).+?(?=<!-- end -->)")
SEARCHED = ("dense_mnist", "conv_mnist", "simple_dense")
JUDGED, JUDGED_LIMIT = "conv_mnist", 1.05
CERTIFIED = f"as it is, coded, certified at CR ≤ {JUDGED_LIMIT}"
# 100 million weights, as they begin
LARGE, SIDE, LAYERS = "four layers of 5,000 × 5,000", 5_000, 4
NETWORKS = (*grids.NETWORKS, *stranger_networks.STRANGERS, LARGE)
LIMIT, EFFORT, EXAMPLES = 1.01, 20, 4
# of a network whose smallest search takes more
EFFORTS = {"simple_dense": 30}
# of weights, in turn
MIXED: tuple[dict[str, Any], ...] = (
    {"bits": 4, "axis": 0},
    {"bits": 8, "axis": 0},
    {"bits": 2, "axis": 0},
    {"bits": 3, "axis": 0, "group": 32},
    {"scheme": "codebook", "bits": 4},
    {"bits": 5, "axis": 0, "zero_point": True},
    {"levels": 3, "axis": 0},
    {"scheme": "minifloat", "bits": 4, "axis": 0, "scale_dtype": "power_of_two"},
    {"bits": 4, "axis": 0, "storage": "coded"},
    {"bits": 12, "axis": 0},
)


def mixed(net: nn.Module) -> Strategy:
    """Weights by each of `MIXED` in turn, in no groups where rows are shorter; vectors in float."""
    named, choices = named_tensors(net), {}
    weights = [name for name, tensor in named.items() if tensor.dim() > 1 and quantizable(tensor)]
    for number, name in enumerate(weights):
        choice = {"scheme": "uniform", **MIXED[number % len(MIXED)]}
        if named[name][0].numel() < choice.get("group", 0):
            choice.pop("group")
        choices[name] = Choice.of(choice)
    return Strategy({name: choices.get(name) for name in named})


@torch.no_grad()
def artifacts(net: nn.Module, quantized: Quantized, example: Any) -> dict[str, Any]:
    """Sizes, seconds and differences of a quantized network.

    example: what it takes, as `export` takes it.
    """
    wanted = outputs(quantize_model(net, quantized).eval(), example)

    def off(found: list[Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max((one.float() - other.float()).abs().max().item() for one, other in pairs)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        size = save(net, quantized, path)
        with NetworkFile(path) as file:
            header = file.header_bytes
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            loaded = load(path, net)
            seconds.append(time.perf_counter() - started)
        small = compressed(net, quantized).eval()
        own = (tensor.untyped_storage() for tensor in small.state_dict().values())
        storages = {storage.data_ptr(): storage.nbytes() for storage in own}
        row = {
            "promised": sum(model_bytes.measure(net, quantized, []).values()),
            "file": size,
            "header": header,
            "float32": sum(model_bytes.measure(net, Quantized({}), []).values()),
            "memory": sum(storages.values()),
            "seconds": min(seconds),
            "loaded": off(outputs(loaded, example)),
            "compressed": off(outputs(small, example)),
            "largest": max(one.abs().max().item() for one in wanted),
        }
        for kind, run in (("onnx", onnx_outputs), ("pt2", pt2_outputs)):
            path = Path(folder) / f"net.{kind}"
            try:
                table = export(net, quantized, path, example)
                row[kind] = path.stat().st_size
                if kind == "onnx":
                    row["in_onnx"] = json.dumps(by_kind(table))
                row[f"by_{kind}"] = off(run(path, example))
            except Exception as error:  # what a runtime raises, too, is what is to be known
                reason = " ".join(str(error).split()).partition(": quantifind.save and")[0]
                reason = f"{kind}: {reason[:300]}"
                row["note"] = "; ".join(filter(None, [row.get("note"), reason]))
    return row


def by_kind(table: pd.DataFrame) -> dict[str, list[int]]:
    """Of what tensors become: how many, their bytes there, and here."""
    kinds = table.groupby("becomes")
    sums = kinds[["bytes", "model_bytes"]].sum()
    sums.insert(0, "tensors", kinds.size())
    return {str(kind): [int(value) for value in row] for kind, row in sums.iterrows()}


def outputs(net: Any, example: Any) -> list[Tensor]:
    """The tensors that it gives, in order."""
    found = net(**example) if isinstance(example, Mapping) else net(*example)
    return tensors_of(found if isinstance(found, dict | list | tuple) else [found])


def onnx_outputs(path: Path, example: Any) -> list[Tensor]:
    """Of onnxruntime, which is told to compute in float32."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options)
    names = [one.name for one in session.get_inputs()]
    given = example if isinstance(example, Mapping) else {}
    values = [given[name] for name in names if name in given] or tree_leaves(example)
    inputs = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, inputs)]


def pt2_outputs(path: Path, example: Any) -> list[Tensor]:
    """Of the program."""
    return outputs(torch.export.load(path).module(), example)


def measure(name: str, *, untrained: bool, folder: str | None = None) -> pd.DataFrame:
    """The rows of a network, one for each of its answers; a folder keeps what a search measures."""
    if name == LARGE:
        return large()
    begun: list[str] = []
    if name in stranger_networks.STRANGERS:
        _, make = stranger_networks.STRANGERS[name]
        train = stranger_networks.trained

        def load_or_begin(net: nn.Module, file: str, *rest: Any, **options: Any) -> None:
            if untrained and not (stranger_networks.FOLDER / f"{file}.safetensors").is_file():
                begun.append(name)
                for parameter in net.parameters():
                    if parameter.dim() > 1 and not parameter.any():
                        nn.init.normal_(parameter, std=0.1)  # of which every output would be 0
            else:
                train(net, file, *rest, **options)

        with patch.object(stranger_networks, "trained", load_or_begin):
            made = make()
        net, criterion, forward, (*rest, test) = (
            *(made.net, made.criterion, made.forward),
            made.loaders,
        )
    else:
        *rest, test = grids.loaders(name)
        if untrained:
            begun.append(name)
            entry = read_params(grids.ROOT / "params.yaml").models[name]
            torch.manual_seed(0)
            net, criterion, _, forward, _ = create_network(entry.network, entry.options, {})
        else:
            (net, criterion), forward = grids.trained(name), None
    net.eval()
    batch = next(batches_of(test, net, criterion, forward))
    example = example_of(net, batch[:EXAMPLES] if batch.apart else batch)
    notes = ["weights as they begin"] * len(begun)
    answers: dict[str, Quantized] = {}
    if name in SEARCHED and not begun:
        found = find_strategy(net, *rest, criterion, limit=LIMIT, effort=EFFORTS.get(name, EFFORT))
        answers[f"searched briefly, CR ≤ {LIMIT}"] = found.quantized
    else:
        answers["mixed"] = quantize(net, mixed(net))
    if name == JUDGED and not begun:
        answers |= judged(net, rest, test, criterion, folder)
    rows = []
    for answer, quantized in answers.items():
        print(f"{name}, {answer} …", flush=True)
        row = artifacts(net, quantized, example)
        row["note"] = "; ".join(filter(None, [*notes, row.get("note")])) or None
        facts = {"network": name, "answer": answer, "bits": mean_bits(net, quantized)}
        rows.append({**facts, **row})
    return pd.DataFrame(rows)


def large() -> pd.DataFrame:
    """The row of a network that is only large: all its weights in 4 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))).eval()
    quantized = quantize(net, uniform_strategy(net, 4))
    facts = {"network": LARGE, "answer": "4 bits", "bits": mean_bits(net, quantized)}
    row = artifacts(net, quantized, (torch.randn(EXAMPLES, SIDE),))
    return pd.DataFrame([{**facts, **row, "note": "weights as they begin"}])


def judged(
    net: nn.Module, splits: list[Any], test: Any, criterion: Any, folder: str | None
) -> dict[str, Quantized]:
    """What is certified, stored coded, on the half of the test data that is not sealed, were its
    ladder the only one (benchmarks.search counts it); none where nothing is.

    folder: keeps what is measured.
    """
    asked = {"criterion_ratio": JUDGED_LIMIT}
    found = find_strategy(net, *splits, criterion, limit=asked, folder=folder, storage="coded")
    certificate = certify(net, found, search.half(test, sealed=False))
    print(certificate, flush=True)
    if certificate.quantized is None:
        print(f"{JUDGED}: nothing is certified at CR ≤ {JUDGED_LIMIT}", flush=True)
        return {}
    return {CERTIFIED: certificate.quantized}


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network."""
    lines = [
        "| network | answer | bits | promised | file | smaller | in memory | ONNX | .pt2 "
        "| ms to load | largest output | largest difference: loaded, compressed, ONNX, .pt2 |",
        "|---" * 12 + "|",
    ]
    for row in results.to_dict("records"):
        sizes = [
            "–" if pd.isna(row[kind]) else f"{row[kind]:,.0f}"
            for kind in ("promised", "file", "memory", "onnx", "pt2")
        ]
        promised, file, memory, *others = sizes
        differences = [
            "–" if pd.isna(row[kind]) else f"{row[kind]:.1g}"
            for kind in ("loaded", "compressed", "by_onnx", "by_pt2")
        ]
        cells = [row["network"], row["answer"], f"{row['bits']:.3f}", promised, file]
        cells += [f"{row['float32'] / row['file']:.1f} times", memory, *others]
        largest = "–" if pd.isna(row["largest"]) else f"{row['largest']:.3g}"
        cells += [f"{1e3 * row['seconds']:.0f}", largest, ", ".join(differences)]
        lines.append(f"| {' | '.join(cells)} |")
    noted = results[results["note"].notna()]
    notes = [
        f"- {row['network']}, {row['answer']}: {row['note']}" for row in noted.to_dict("records")
    ]
    return "\n".join([*lines, *_kinds(results), *([""] if notes else []), *notes]) + "\n"


def line(results: pd.DataFrame) -> str:
    """What README.md says of all of it."""
    own = results[results["network"] == JUDGED].sort_values("file").iloc[0]
    times = own["float32"] / own["file"]
    exact = results[results[["loaded", "compressed"]].eq(0).all(axis=1)]["network"].nunique()
    counts = []
    for kind in ("onnx", "pt2"):
        ran = results[results[f"by_{kind}"].notna()]
        off = ran[f"by_{kind}"].max()
        step = 10 ** math.floor(math.log10(off)) if off else 0
        near = f"at most {math.ceil(off / step) * step:.0e} off" if off else "bit for bit"
        counts.append(f"{ran['network'].nunique()} ({near})")
    return (
        f"[Take it with you](docs/format.md): {JUDGED}, {own['answer']}, is a file of "
        f"{own['file']:,} bytes, {times:.1f} times smaller than in float32; of "
        f"{results['network'].nunique()} networks {exact} load bit for bit, {counts[0]} run in "
        f"onnxruntime, {counts[1]} by `torch.export`."
    )


def _kinds(results: pd.DataFrame) -> list[str]:
    """What tensors become in ONNX, of all networks of which that is known."""
    sums: dict[str, list[int]] = {}
    for kinds in results["in_onnx"].dropna():
        for kind, values in json.loads(kinds).items():
            before = sums.get(kind, [0] * len(values))
            sums[kind] = [one + other for one, other in zip(before, values, strict=True)]
    if not sums:
        return []
    lines = ["", "| in ONNX | tensors | bytes there | bytes here |", "|---|---|---|---|"]
    return lines + [
        f"| {kind} | {' | '.join(f'{value:,}' for value in values)} |"
        for kind, values in sorted(sums.items())
    ]


def write_rows(path: Path, rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write the rows of a network, and those of the others that are there already."""
    if path.exists():
        kept = pd.read_csv(path)
        rows = pd.concat([kept[kept["network"] != name], rows])
    rows = rows.sort_values("network", key=lambda n: n.map(NETWORKS.index), kind="stable")
    rows.to_csv(path, index=False)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="by default all of them")
    parser.add_argument("--untrained", action="store_true", help="where it would be trained here")
    parser.add_argument("--folder", help="keeps what a search measures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in [chosen.network] if chosen.network else NETWORKS:
        rows = measure(name, untrained=chosen.untrained, folder=chosen.folder)
        results = write_rows(RESULTS, rows, name)
        grids.write_table(MARKERS, markdown(results))
        grids.write_table(LINE, line(results))
        print(rows.T.to_string(), flush=True)


if __name__ == "__main__":
    main()
