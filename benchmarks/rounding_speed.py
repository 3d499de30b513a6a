"""How fast rounding and packing are on this machine, beside what it could do at best.

    python -m benchmarks.rounding_speed

Each row is the best of several calls. At best: codes packed as fast as they are copied, weights
rounded as fast as they are copied, GPTQ at the peak of float64 matrix products of 2,048 × 2,048,
counting its own multiply-adds. Untrained networks, since speed does not depend on the weights.
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

from benchmarks.grids import markers, write_table
from quantifind.data import mnist_data
from quantifind.quantize import quantize
from quantifind.schemes import uniform
from quantifind.strategy import uniform_strategy
from quantifind.tensor import packing
from quantifind.tensor.gptq import SWEEPS, RowParams, gptq
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils import plugins

RESULTS = Path(__file__).parent / "results/rounding_speed.csv"
MARKERS = markers("python -m benchmarks.rounding_speed")
CODES = 2**24
SIZE = 4096
GPTQ = {"axis": 0, "rounding": "gptq", "scale": "output_mse"}


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of so many calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
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
    factor = torch.randn(2048, 2048, dtype=torch.float64)
    flops = 2 * 2048**3 / best(lambda: factor @ factor, 3)
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE)
    inputs = torch.randn(SIZE, SIZE).cumsum(1)
    hessian = (inputs.T @ inputs).double()
    del inputs
    nearest: QuantizedTensor = uniform.quantize(weight, 4, axis=0, scale="mse")
    qparams = RowParams.of(nearest)
    target = weight.double()
    del weight
    seconds = best(lambda: gptq(target, hessian, qparams, nearest.codes), 1)
    # factor of the inverse; errors before and after; columns in turn; slopes and sweeps
    products = (1 / 3 + 2 / 3 + 1 / 3) + 2 * 2 + 1 + 2 + 2 * SWEEPS
    at_best = products * SIZE**3 / flops
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return [
        row(f"GPTQ of {SIZE} × {SIZE}", seconds, "s", 60, at_best, at_best / seconds),
        row(f"peak memory of the process with {SIZE} × {SIZE}", megabytes, "MB", 2000, None, None),
    ]


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
    results = pd.DataFrame([*large_layer_row(), *network_rows(), *packing_rows()])
    RESULTS.parent.mkdir(exist_ok=True)
    results.to_csv(RESULTS, index=False, float_format="%.4g")
    write_table(MARKERS, markdown(pd.read_csv(RESULTS)))
    print(results.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
