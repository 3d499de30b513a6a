"""How fast rounding and packing are on this machine, beside what it could do at best.

    python -m benchmarks.rounding_speed

Each row is the best of several calls. At best: codes packed as fast as they are copied, weights
rounded as fast as they are copied, GPTQ at the peak of matrix products of 2,048 × 2,048, counting
its own multiply-adds in float64 and in float32; of the kinds of layers, in CPU time on one thread,
each weight as fast as those of the linear one of 1,024 inputs. A weight with more inputs takes
longer, as the linear layers with as many as the convolutions show. Untrained networks, since speed
does not depend on the weights.
Writes benchmarks/results/rounding_speed.csv and the table of docs/speed.md.
"""

import resource
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.grids import markers, write_table
from quantifind.data import mnist_data
from quantifind.network.trace import output_axes
from quantifind.quantize import Calibration, quantize
from quantifind.schemes import uniform
from quantifind.strategy import uniform_strategy
from quantifind.tensor import packing
from quantifind.tensor.choice import Choice
from quantifind.tensor.compensation import SWEEPS, gptq
from quantifind.tensor.gptq import gptq_layer
from quantifind.tensor.output_error import OutputError
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.row_params import RowParams
from quantifind.utils import plugins

RESULTS = Path(__file__).parent / "results/rounding_speed.csv"
MARKERS = markers("python -m benchmarks.rounding_speed")
CODES = 2**24
SIZE = 4096
GPTQ = {"axis": 0, "rounding": "gptq", "scale": "output_mse"}


# as slow as a kind of layer may be, beside the linear one
SLOWEST_KIND = 1.6


def best(
    call: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of the fastest of so many calls."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        call()
        seconds.append(clock() - started)
    return min(seconds)


def packing_rows() -> list[dict[str, Any]]:
    rows = []
    for levels in (2, 3, 4, 8, 16, 32, 64, 128, 256, 2**10, 2**12, 2**16):
        generator = torch.Generator().manual_seed(0)
        kept = torch.uint8 if levels <= 256 else torch.int32
        codes = torch.randint(levels, (CODES,), generator=generator).to(kept)
        packed = packing.pack(codes, levels)
        at_best = CODES / best(codes.clone, 5) / 1e6
        for what, call in (
            ("packing", lambda codes=codes, levels=levels: packing.pack(codes, levels)),
            ("unpacking", lambda p=packed, levels=levels: packing.unpack(p, levels, CODES)),
        ):
            rate = CODES / best(call, 5) / 1e6
            name = f"{what}, {packing.width(levels)} bits"
            rows.append(row(name, rate, "million codes/s", 200, at_best, rate / at_best))
    return rows


def network_rows() -> list[dict[str, Any]]:
    rows = []
    train, *_ = mnist_data.create_dataloaders()
    calibration = list(islice(train, 64))
    for network, limit in (("dense_mnist", 5), ("conv_mnist", 10)):
        torch.manual_seed(0)
        net, *_ = plugins.load("models", f"{network}_model", "create_model_context")()
        if network == "dense_mnist":
            strategy = uniform_strategy(net, 4)
            milliseconds = 1000 * best(lambda net=net, s=strategy: quantize(net, s), 7)
            weights = [parameter.detach() for parameter in net.parameters()]
            copied = 1000 * best(lambda w=weights: [weight.clone() for weight in w], 7)
            name = "round to nearest, all of dense_mnist, 4 bits"
            rows.append(row(name, milliseconds, "ms", 25, copied, copied / milliseconds))
        strategy = uniform_strategy(net, 3, **GPTQ)
        seconds = best(lambda net=net, s=strategy: quantize(net, s, calibration), 2)
        name = f"GPTQ of all of {network}, 4,096 examples"
        rows.append(row(name, seconds, "s", limit, None, None))
    return rows


def large_layer_row() -> list[dict[str, Any]]:
    rates = {}
    for dtype in (torch.float32, torch.float64):
        factor = torch.randn(2048, 2048, dtype=dtype)
        rates[dtype] = 2 * 2048**3 / best(lambda factor=factor: factor @ factor, 3)
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE)
    inputs = torch.randn(SIZE, SIZE).cumsum(1)
    hessian = (inputs.T @ inputs).double()
    del inputs
    nearest: QuantizedTensor = uniform.quantize(weight, 4, axis=0, scale="mse")
    qparams = RowParams.of(nearest)
    target = weight.double()
    del weight
    seconds = best(lambda: gptq(target, OutputError.of(hessian), qparams, nearest.codes), 1)
    # the factor and the last comparison; the first error, inputs in turn, slopes and sweeps
    products = {torch.float64: 1 / 3 + 2, torch.float32: 2 + 1 + 2 + 2 * SWEEPS}
    at_best = sum(count * SIZE**3 / rates[dtype] for dtype, count in products.items())
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return [
        row(f"GPTQ of {SIZE} × {SIZE}", seconds, "s", 60, at_best, at_best / seconds),
        row(f"peak memory of the process with {SIZE} × {SIZE}", megabytes, "MB", 2000, None, None),
    ]


class Product(nn.Module):
    """x @ w, or that by heads."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.weight.dim() == 2 else x.unsqueeze(1) @ self.weight


class Tied(nn.Module):
    """A table that is looked up and gives logits."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(entries, width)

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes).cumsum(1) @ self.table.weight.T


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def kinds() -> dict[str, tuple[nn.Module, str, Tensor]]:
    """By kind of layer one, its weight, and inputs."""
    codes = torch.randint(10_000, (20, 100))
    steps, sequence = torch.randn(64, 32, 128), torch.randn(32, 64, 512)
    lstm = nn.LSTM(128, 512, batch_first=True)
    image, small = torch.randn(4, 256, 34, 34), torch.randn(4, 512, 18, 18)
    long = torch.randn(8, 64, 1000)
    return {
        "linear 1024 → 1024": (nn.Linear(1024, 1024), "weight", torch.randn(4096, 1024)),
        "linear 2304 → 256": (nn.Linear(2304, 256), "weight", torch.randn(4096, 2304)),
        "linear 4096 → 64": (nn.Linear(4096, 64), "weight", torch.randn(8192, 4096)),
        "convolution 3 × 3, 256 → 256": (nn.Conv2d(256, 256, 3), "weight", image),
        "the same in 32 groups": (nn.Conv2d(256, 256, 3, groups=32), "weight", image),
        "depthwise 3 × 3, 512": (nn.Conv2d(512, 512, 3, groups=512), "weight", small),
        "convolution of 64 taps, 64 → 64": (nn.Conv1d(64, 64, 64), "weight", long),
        "embedding and head, 10,000 × 64": (Tied(10_000, 64), "table.weight", codes),
        "LSTM 128 → 512, inputs": (lstm, "weight_ih_l0", steps),
        "LSTM 128 → 512, states": (lstm, "weight_hh_l0", steps),
        "attention 512, 8 heads": (Attention(512, 8), "attention.in_proj_weight", sequence),
        "x @ w, 512 × 512": (Product(512, 512), "weight", sequence),
        "x @ w of 8 heads, 512 × 64": (Product(8, 512, 64), "weight", sequence),
    }


def kind_rows() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for kind, (model, name, inputs) in kinds().items():
        with torch.no_grad():
            calibration = Calibration(model.eval(), [(inputs,)])
            values, ((_, moments),) = calibration.tensors[name], calibration.moments([name])
            axis = output_axes(calibration.facts).get(name, 0)
            scale = "output_mse" if axis < 2 else "weighted_mse"
            choice = Choice.of(
                {"scheme": "uniform", "bits": 3} | GPTQ | {"axis": axis, "scale": scale}
            )
            seconds = best(
                lambda v=values, m=moments, c=choice: gptq_layer(v, m, [c]), 3, time.process_time
            )
        each = 1e6 * seconds / values.numel()
        linear = rows[0]["measured"] if rows else each
        what = f"GPTQ of a weight: {kind}"
        rows.append(row(what, each, "µs", SLOWEST_KIND * linear, linear, linear / each))
    torch.set_num_threads(threads)
    return rows


def row(
    what: str, measured: float, unit: str, limit: float, at_best: float | None, share: float | None
) -> dict[str, Any]:
    return {
        "what": what,
        "measured": measured,
        "unit": unit,
        "asked": limit,
        "at_best": at_best,
        "share_of_best": share,
    }


def markdown(results: pd.DataFrame) -> str:
    """The table, a line for each row of it."""
    lines = ["| | measured | at best | share of best |", "|---|---|---|---|"]
    for one in results.to_dict("records"):
        best_cell = "–" if pd.isna(one["at_best"]) else f"{one['at_best']:.4g}"
        share = "–" if pd.isna(one["share_of_best"]) else f"{one['share_of_best']:.0%}"
        lines.append(
            f"| {one['what']} | {one['measured']:.4g} {one['unit']} | {best_cell} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    # the large layer first: the peak memory is the whole process's so far
    results = pd.DataFrame([*large_layer_row(), *kind_rows(), *network_rows(), *packing_rows()])
    RESULTS.parent.mkdir(exist_ok=True)
    results.to_csv(RESULTS, index=False, float_format="%.4g")
    write_table(MARKERS, markdown(pd.read_csv(RESULTS)))
    print(results.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
