"""What a quantized network weighs as a file, in memory, and in other runtimes.

    python -m benchmarks.artifacts [--network NAME]

Each network is trained as the pipeline trains it, and searched briefly at CR ≤ 1.01, since only
what becomes of the answer is measured. Writes benchmarks/results/artifacts.csv and, of the networks
in it, the table of docs/format.md. Columns:

- promised, file, header: bytes of ``model_bytes``, of the file, and of its header;
- float32, onnx, pt2: bytes of the float network, and of the exported ones;
- memory: bytes that the tensors of `quantifind.compressed` take;
- seconds: to load the file, the best of three;
- loaded, compressed, by_onnx, by_pt2: the largest difference of their outputs to the copy's;
- note: what can't be exported, and why.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import grids
from quantifind import compressed, export, find_strategy, load, quantize_model, save
from quantifind.costs import model_bytes
from quantifind.storage.network_reader import NetworkFile
from quantifind.tensor.quantized import Quantized

RESULTS = grids.ROOT / "benchmarks/results/artifacts.csv"
MARKERS = grids.markers("python -m benchmarks.artifacts")
LIMIT, EFFORT = 1.01, 20


@torch.no_grad()
def artifacts(net: nn.Module, quantized: Quantized, example: Tensor) -> dict[str, Any]:
    """Sizes, seconds and differences of a quantized network.

    example: what it takes.
    """
    wanted = quantize_model(net, quantized).eval()(example)

    def off(outputs: Tensor) -> float:
        return (outputs - wanted).abs().max().item()

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
        row = {
            "promised": sum(model_bytes.measure(net, quantized, []).values()),
            "file": size,
            "header": header,
            "float32": sum(model_bytes.measure(net, Quantized({}), []).values()),
            "memory": sum(t.untyped_storage().nbytes() for t in small.state_dict().values()),
            "seconds": min(seconds),
            "loaded": off(loaded(example)),
            "compressed": off(small(example)),
        }
        for kind, outputs in (("onnx", onnx_outputs), ("pt2", pt2_outputs)):
            path = Path(folder) / f"net.{kind}"
            try:
                export(net, quantized, path, example)
                row |= {kind: path.stat().st_size, f"by_{kind}": off(outputs(path, example))}
            except ValueError as error:
                row["note"] = "; ".join(filter(None, [row.get("note"), f"{kind}: {error}"]))
    return row


def onnx_outputs(path: Path, example: Tensor) -> Tensor:
    """Of onnxruntime, which is told to compute in float32."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options)
    (name,) = (one.name for one in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: example.numpy()})[0])


def pt2_outputs(path: Path, example: Tensor) -> Tensor:
    """Of the program."""
    outputs: Tensor = torch.export.load(path).module()(example)
    return outputs


def measure(name: str) -> dict[str, Any]:
    """A row of the table."""
    net, criterion = grids.trained(name)
    train, val, test = grids.loaders(name)
    found = find_strategy(net, train, val, criterion, limit=LIMIT, effort=EFFORT)
    example = next(iter(test))[0]
    return {"network": name, "bits": found.mean_bits, **artifacts(net, found.quantized, example)}


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per network."""
    lines = [
        "| network | bits | promised | file | smaller | in memory | ONNX | .pt2 | ms to load "
        "| largest difference: loaded, compressed, ONNX, .pt2 |",
        "|---" * 10 + "|",
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
        cells = [row["network"], f"{row['bits']:.3f}", promised, file]
        cells += [f"{row['float32'] / row['file']:.1f} times", memory, *others]
        cells += [f"{1e3 * row['seconds']:.0f}", ", ".join(differences)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = grids.chosen_networks(__doc__)
    torch.set_num_threads(1)
    results = grids.write_rows(RESULTS, pd.DataFrame([measure(name) for name in chosen]))
    grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
