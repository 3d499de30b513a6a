"""How fast candidates are measured, beside a naive loop and beside what this machine can do.

    python -m benchmarks.speed [--parts NAME …]

The naive loop: a deep copy of the network per candidate, batches of 32 put together from single
items of a data set of tensors, the default layout, four threads over the candidates. Peak: float32
matrix products of 2,048 × 2,048, timed in the same process; a share of it counts the network's own
multiply-adds. Each part runs in a process of its own, whose peak memory stands beside it; ours is
timed before and after the naive loop, and the mean is given; of the naive sensitivities a third of
the candidates is timed, and taken three times. Writes benchmarks/results/speed.csv (seconds, but
for rates, whose name says so), and benchmarks/results/speed_growth.csv with its picture
docs/speed_growth.png: seconds against examples, parameters and tensors. The part `rooms` writes
benchmarks/results/rooms.csv: what each device for speed gains (`benchmarks.rooms`).
"""

import argparse
import copy
import io
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import grids
from benchmarks.rooms import rooms
from quantifind.data import mnist_data
from quantifind.metrics import outcome
from quantifind.mixed_precision.found import Found
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.rounded_options import network_of
from quantifind.mixed_precision.search_space import NEAREST, PER_TENSOR, SearchSpace
from quantifind.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from quantifind.network.modules import named_tensors
from quantifind.network.trace import macs
from quantifind.quantize import mean_bits, quantize_model
from quantifind.search import find_strategy
from quantifind.utils import plugins
from quantifind.utils.criteria import losses
from quantifind.utils.devices import device
from quantifind.utils.loaders import Tensors, batch_loader, split_loaders
from quantifind.utils.memory import keep_freed_memory
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths
from quantifind.workflow.quantize_workflow import BIT_DEPTHS, BitQuantizer
from quantifind.workflow.train_workflow import train_network

RESULTS = grids.ROOT / "benchmarks/results/speed.csv"
GROWTH = grids.ROOT / "benchmarks/results/speed_growth.csv"
PICTURE = grids.ROOT / "docs/speed_growth.png"
MARKERS = grids.markers("python -m benchmarks.speed")
NAIVE_BATCH, NAIVE_THREADS = 32, 4
WIDTHS = range(2, 17)
TRAINED_EXAMPLES, EPOCHS = 12_800, 4


def seconds(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def peak() -> float:
    """Multiply-adds a second of matrix products of 2,048 × 2,048, the best of several."""
    left, right = torch.rand(2, 2048, 2048, device=device())
    return 2048**3 / min(seconds(lambda: left @ right) for _ in range(9))


def side_by_side(ours: Callable[[], Any], naive: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of both: ours the mean of a call before and one after the naive one."""
    before, other, after = seconds(ours), seconds(naive), seconds(ours)
    return (before + after) / 2, other


def row(what: str, ours: float, naive: float, *, work: float = 0.0) -> dict[str, Any]:
    """work: multiply-adds of ours; 0 where a share of the peak says nothing."""
    return {
        "what": what,
        "ours": ours,
        "naive": naive,
        "ratio": naive / ours,
        "share_of_peak": work / ours / peak() if work else np.nan,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def pass_work(net: nn.Module, inputs: torch.Tensor) -> float:
    """Multiply-adds of one example's pass."""
    some = inputs[:2].to(device())
    return sum(product.macs for product in macs(net, some))


def naive_losses(net: nn.Module, data: TensorDataset, criterion: Any) -> float:
    """The mean loss, item by item into batches of 32."""
    loader, total = DataLoader(data, batch_size=NAIVE_BATCH), 0.0
    with torch.no_grad():
        for inputs, targets in loader:
            inputs, targets = inputs.to(device()), targets.to(device())
            total += losses(criterion, net(inputs), targets).sum().item()
    return total / len(data)


def naively(net: nn.Module, candidates: list[Any], data: TensorDataset, criterion: Any) -> None:
    """Each candidate, a function of a network, on a deep copy in the default layout."""
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format).eval()

    def one(quantized: Callable[[nn.Module], nn.Module]) -> float:
        return naive_losses(quantized(copy.deepcopy(plain)), data, criterion)

    with ThreadPoolExecutor(NAIVE_THREADS) as threads:
        list(threads.map(one, candidates))


def sweep(network: str) -> list[dict[str, Any]]:
    """All 31 bit depths on the whole test split."""
    net, criterion = grids.trained(network)
    test = grids.loaders(network)[2]
    inputs, targets = test.dataset.tensors
    quantizers = [BitQuantizer(bits).quantize_model for bits in BIT_DEPTHS]
    outcome(net, islice(test, 1), criterion)
    evaluate_bit_depths(net, test, criterion, [8])
    ours, naive = side_by_side(
        lambda: evaluate_bit_depths(net, test, criterion),
        lambda: naively(net, quantizers, TensorDataset(inputs, targets), criterion),
    )
    work = pass_work(net, inputs) * len(inputs) * (1 + len(quantizers))
    return [row(f"sweep of 31 depths, {network}", ours, naive, work=work)]


def sensitivity(network: str) -> list[dict[str, Any]]:
    """Every tensor alone at 15 widths on the validation split."""
    net, criterion = grids.trained(network)
    train, val, _ = grids.loaders(network)
    space = SearchSpace(
        {
            name: [replace(NEAREST if t.dim() > 1 else PER_TENSOR, bits=bits) for bits in WIDTHS]
            for name, t in named_tensors(net).items()
        }
    )
    measurements = Measurements.start(net, train, val, criterion)

    def measure(precision: float) -> Sensitivity:
        forget(measurements)
        return measure_sensitivity(measurements, space, precision=precision)

    rounded = measure(0.5).rounded_options
    alone = [network_of(rounded.choices[key][1], one) for key, one in rounded.items()]

    def whole_passes() -> None:
        for quantized in alone:
            measurements.evaluator.outcome(quantized)

    what = f"sensitivity, {len(space.tensors)} tensors at 15 widths, {network}"
    ours, naive = side_by_side(lambda: measure(0), whole_passes)
    rows = [row(f"{what}: beside whole passes", ours, naive)]
    data = TensorDataset(*val.dataset.tensors)
    if network == "conv_mnist":
        # a third of the candidates, since each takes as long
        candidates = [lambda copied, q=q: quantize_model(copied, q) for q in alone[::3]]
        few = seconds(lambda: naively(net, candidates, data, criterion))
        naive = few * len(alone) / len(candidates)
        rows.append(row(f"{what}: beside the naive loop", ours, naive))
        early = seconds(lambda: measure(0.25))
        rows.append(row(f"{what}: stopped early, beside the naive loop", early, naive))
    return rows


def forget(measurements: Measurements) -> None:
    """What was measured, but not what was quantized."""
    entries = measurements.store.entries
    for key in [key for key in entries if key.startswith("alone ")]:
        del entries[key]


def search_rate() -> list[dict[str, Any]]:
    """Candidates a second of a search without learning, and what stopping early changes."""
    net, criterion = grids.trained("conv_mnist")
    train, val, _ = grids.loaders("conv_mnist")
    judged: list[int] = []
    counted = Measurements.all_columns

    def count(self: Measurements, candidates: Any, *span: Any, **how: Any) -> Any:
        judged.append(sum(self.store.get(key) is None for key in candidates))
        return counted(self, candidates, *span, **how)

    found: dict[float, Found] = {}
    took, number = {}, {}
    for precision in (0.25, 0.0):
        judged.clear()

        def once(precision: float = precision) -> None:
            found[precision] = find_strategy(
                net, train, val, criterion, limit=1.01, precision=precision
            )

        with patch.object(Measurements, "all_columns", count):
            took[precision] = seconds(once)
        number[precision] = sum(judged)
    bits = {precision: mean_bits(net, one.quantized) for precision, one in found.items()}
    same = "the same" if found[0.25].strategy == found[0.0].strategy else "another"
    inputs, targets = val.dataset.tensors
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    naive = seconds(lambda: naive_losses(plain, TensorDataset(inputs, targets), criterion))
    rate = number[0.25] / took[0.25]
    result = row("search of conv_mnist: candidates a second", rate, 1 / naive)
    result["ratio"] = rate * naive
    whole = row("search of conv_mnist: seconds, beside all tensors on all examples", *took.values())
    print(
        f"{number[0.25]} candidates; stopped early: {bits[0.25]:.4f} bits, on all examples "
        f"{bits[0.0]:.4f}: {same} strategy",
        flush=True,
    )
    return [result, whole]


def training() -> list[dict[str, Any]]:
    """Examples a second of training conv_mnist, and the accuracy of three seeds."""
    train, val, test = mnist_data.create_dataloaders()
    inputs, targets = (part[:TRAINED_EXAMPLES] for part in train.dataset.tensors)
    create = plugins.load("models", "conv_mnist_model", "create_model_context")
    accuracy: dict[str, list[float]] = {"ours": [], "naive": []}

    def context(seed: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(seed)
        return create()

    def ours(seed: int) -> None:
        net, criterion, optimizer = context(seed)
        loader = batch_loader(Tensors(inputs, targets), batch_size=64, shuffle=True, seed=seed)
        few = batch_loader(
            Tensors(*(t[:64] for t in val.dataset.tensors)), batch_size=64, shuffle=False, seed=0
        )
        train_network(net, criterion, optimizer, loader, few, epochs=EPOCHS)
        trained["ours"] = net, criterion

    def naive(seed: int) -> None:
        net, criterion, optimizer = context(seed)
        net = net.to(memory_format=torch.contiguous_format).train()
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=NAIVE_BATCH, shuffle=True)
        for some, wanted in chain.from_iterable(repeat(loader, EPOCHS)):
            some, wanted = some.to(device()), wanted.to(device())
            optimizer.zero_grad()
            criterion(net(some), wanted).backward()
            optimizer.step()
        trained["naive"] = net.eval(), criterion

    trained: dict[str, Any] = {}
    taken: dict[str, list[float]] = {"ours": [], "naive": []}
    for seed in range(3):
        for name, call in (("ours", ours), ("naive", naive)):
            taken[name].append(seconds(lambda call=call, seed=seed: call(seed)))
            measured = outcome(trained[name][0], test, trained[name][1])
            accuracy[name].append(measured["correct"].double().mean().item())
    print(
        f"accuracy after {EPOCHS} epochs:",
        {n: np.round(a, 4).tolist() for n, a in accuracy.items()},
    )
    done = EPOCHS * TRAINED_EXAMPLES
    rates = [done / np.mean(taken[name]) for name in ("ours", "naive")]
    result = row("training of conv_mnist: examples a second", *rates)
    return [result | {"ratio": rates[0] / rates[1]}]


# with nothing imported but what a sweep needs; the values of images don't matter
MEMORY = """
import resource, sys, time, torch
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.models import conv_mnist_model
from quantifind.utils.memory import keep_freed_memory
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths
keep_freed_memory()
net, criterion, _ = conv_mnist_model.create_model_context()
examples = int(sys.argv[1])
data = Tensors(torch.rand(examples, 1, 28, 28), torch.randint(10, (examples,)))
loader = batch_loader(data, batch_size=64, shuffle=False, seed=0)
started = time.perf_counter()
evaluate_bit_depths(net, loader, criterion, [2, 4, 8])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(examples: int) -> list[dict[str, Any]]:
    """Peak memory of a sweep of conv_mnist."""
    command = [sys.executable, "-c", MEMORY, str(examples)]
    done = subprocess.run(command, cwd=grids.ROOT, capture_output=True, text=True, check=True)
    took, megabytes = map(float, done.stdout.split())
    result = row(f"sweep of 3 depths, conv_mnist on {examples:,} examples", took, np.nan)
    return [result | {"peak_megabytes": megabytes}]


def cluster() -> list[dict[str, Any]]:
    """A search by two Dask workers on loopback beside one, each with one thread."""
    from distributed import LocalCluster

    torch.set_num_threads(1)
    net, criterion = grids.trained("conv_mnist")
    train, val, _ = grids.loaders("conv_mnist")
    took, found = {}, {}
    for workers in (1, 2):
        with LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as local:
            local.wait_for_workers(workers)
            how = {"engine": "dask", "scheduler": local.scheduler_address}
            took[workers] = seconds(
                lambda how=how, workers=workers: found.update(
                    {workers: find_strategy(net, train, val, criterion, limit=1.01, **how)}
                )
            )
    same = "the same" if found[1].strategy == found[2].strategy else "another"
    print(f"two workers find {same} strategy", flush=True)
    return [row("search of conv_mnist by two Dask workers, beside one", took[2], took[1])]


def growth() -> list[dict[str, Any]]:
    """Seconds of sensitivities against examples, parameters and tensors, at three sizes each."""
    generator = torch.Generator().manual_seed(0)
    found = []

    def measure(examples: int, width: int, layers: int) -> float:
        inputs = torch.randn(examples, width, generator=generator)
        data = Tensors(inputs, torch.randint(10, (examples,), generator=generator))
        train, val, _ = split_loaders(data, data, data)
        torch.manual_seed(0)
        body = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
        net = nn.Sequential(*body, nn.Linear(width, 10)).eval()
        space = SearchSpace(
            {
                name: [replace(PER_TENSOR, bits=bits) for bits in range(2, 8)]
                for name, t in named_tensors(net).items()
                if t.dim() > 1
            }
        )
        measurements = Measurements.start(net, train, val, nn.CrossEntropyLoss())
        measurements.evaluator.replayable = False  # each candidate is a whole pass

        def once() -> None:
            measurements.store.entries.clear()
            measure_sensitivity(measurements, space, precision=0)

        return min(seconds(once) for _ in range(3))

    for examples in (10_000, 20_000, 40_000):
        found.append(("examples", examples, measure(examples, 256, 4)))
    for width in (256, 512, 1024):
        size = 4 * width * (width + 1) + 10 * (width + 1)
        found.append(("parameters", size, measure(4_000, width, 4)))
    for layers in (4, 8, 16):
        # a candidate is a tensor at a width, and a pass has as many tensors: square, so that the
        # seconds of one candidate are what is linear
        found.append(("tensors", layers + 1, measure(4_000, 256, layers) / (layers + 1)))
    table = pd.DataFrame(found, columns=["of", "size", "seconds"])
    table.to_csv(GROWTH, index=False)
    draw(table)
    print(table.to_string(index=False), flush=True)
    return []


def draw(table: pd.DataFrame) -> None:
    """Seconds against each size, and the line through the first."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for panel, (of, rows) in zip(panels, table.groupby("of", sort=False), strict=True):
        size, taken = rows["size"].to_numpy(), rows["seconds"].to_numpy()
        panel.plot(size, taken[0] * size / size[0], color="0.6", linestyle="--", label="linear")
        panel.plot(size, taken, marker="o", label="measured")
        panel.set(xlabel=of, xlim=(0, None), ylim=(0, None))
        power = np.polyfit(np.log(size), np.log(taken), 1)[0]
        panel.set_title(f"grows with the power {power:.2f}")
    panels[0].set_ylabel("seconds, all candidates")
    panels[2].set_ylabel("seconds per tensor")
    panels[0].legend(frameon=False)
    figure.suptitle("Seconds of measuring every tensor at six widths")
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "sweep_conv": lambda: sweep("conv_mnist"),
    "sweep_dense": lambda: sweep("dense_mnist"),
    "sensitivity_conv": lambda: sensitivity("conv_mnist"),
    "sensitivity_language": lambda: sensitivity("language_transformer"),
    "search": search_rate,
    "training": training,
    "memory": lambda: memory(10_000),
    "memory_tenfold": lambda: memory(100_000),
    "cluster": cluster,
    "growth": growth,
    "rooms": rooms,
}


def markdown(results: pd.DataFrame) -> str:
    """The table of README.md."""
    lines = ["| | ours | beside it | ratio | share of peak | peak memory |", "|---" * 6 + "|"]
    for line in results.to_dict("records"):
        naive, ratio, share = (
            "–" if pd.isna(line[key]) else form.format(line[key])
            for key, form in (
                ("naive", "{:#.3g}"),
                ("ratio", "{:.2f}×"),
                ("share_of_peak", "{:.0%}"),
            )
        )
        lines.append(
            f"| {line['what']} | {line['ours']:#.3g} | {naive} | {ratio} | {share} "
            f"| {line['peak_megabytes']:,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    # one of them in this process, whose rows are printed for the process that asked
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    arguments = parser.parse_args()
    part = arguments.part
    if part:
        keep_freed_memory()
        print("ROWS" + pd.DataFrame(PARTS[part]()).to_json(orient="records"), flush=True)
        return
    kept = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame({"what": []})
    for name in arguments.parts:
        print(name, flush=True)
        command = [sys.executable, "-m", "benchmarks.speed", "--part", name]
        # this folder's modules, whatever is installed
        environment = {**os.environ, "PYTHONPATH": str(grids.ROOT)}
        done = subprocess.run(
            command, cwd=grids.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        text, _, found = done.stdout.partition("ROWS")
        print(text, end="")
        if found.strip() != "[]":
            rows = pd.read_json(io.StringIO(found))
            print(rows.to_string(index=False), flush=True)
            kept = pd.concat([kept[~kept["what"].isin(rows["what"])], rows], ignore_index=True)
            kept.to_csv(RESULTS, index=False)
            grids.write_table(MARKERS, markdown(pd.read_csv(RESULTS)))


if __name__ == "__main__":
    main()
