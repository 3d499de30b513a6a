"""Searches of many drawn networks, each held to a plain loop: what was found.

    python -m benchmarks.fuzz [--networks 5000] [--seed 0] [--processes 2] [--seconds 600]

Draws networks from benchmarks/grammar.py, as tests/test_fuzz.py does with fewer and other ones.
Writes benchmarks/results/fuzz.csv (a row per kind of part: networks that have it, those with a
fault) and the table of docs/results.md; prints each fault with its network. An error that a search
raises is a fault. A core takes about a second for each.
"""

import argparse
import math
import multiprocessing
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks import grids
from benchmarks.grammar import Drawn, faults, networks
from quantifind.utils.console import console
from quantifind.utils.memory import keep_freed_memory

RESULTS = grids.ROOT / "benchmarks/results/fuzz.csv"
MARKERS = grids.markers("python -m benchmarks.fuzz")
ANY = "any"


def faults_of(drawn: Drawn) -> list[str]:
    """What is wrong with a search of a network, an error that it raises included."""
    try:
        return faults(drawn)
    except Exception as error:  # it is what this looks for
        return [f"{type(error).__name__}: {error}"]


def parts_of(drawn: Drawn) -> set[str]:
    """What a network is made of, for the table."""
    named = {f"inputs: {drawn.kind}", f"outputs: {drawn.wrap}"}
    named |= {name for name, _ in drawn.parts}
    named |= {"embedding bag"} if drawn.bag else set()
    return named | ({"tied embedding"} if drawn.tied else set())


def measure(number: int, chosen_seed: int, seconds: float) -> tuple[Counter[str], Counter[str]]:
    """How many networks were searched with each part, and how many of them had faults."""
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    console.quiet = True
    drawn_with, wrong_with = Counter[str](), Counter[str]()
    end = time.monotonic() + seconds

    @seed(chosen_seed)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def search_one(drawn: Drawn) -> None:
        if time.monotonic() > end:
            return
        found = faults_of(drawn)
        drawn_with.update({ANY, *parts_of(drawn)})
        wrong_with.update({ANY, *parts_of(drawn)} if found else ())
        if found:
            print(drawn, *found, sep="\n  ", flush=True)
        if drawn_with[ANY] % 100 == 0:
            print(f"{drawn_with[ANY]} networks, {wrong_with[ANY]} with faults", flush=True)

    search_one()
    return drawn_with, wrong_with


def table(drawn_with: Counter[str], wrong_with: Counter[str]) -> pd.DataFrame:
    """Its rows, the first of all networks."""
    rows = [
        {"part": part, "networks": count, "with_faults": wrong_with[part]}
        for part, count in sorted(drawn_with.items(), key=lambda pair: (pair[0] != ANY, pair))
    ]
    return pd.DataFrame(rows)


def markdown(rows: pd.DataFrame) -> str:
    """How many were drawn with which part, and which had a fault."""
    every, *others = rows.to_dict("records")
    parts = ", ".join(f"{row['part']} {row['networks']:,}" for row in others)
    lines = [
        f"{every['networks']:,} networks, {every['with_faults']:,} with a fault. Drawn were:",
        f"{parts}.",
    ]
    lines += [
        f"- {row['part']}: {row['with_faults']:,} wrong" for row in others if row["with_faults"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="each has a seed of its own")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which none is drawn")
    chosen = parser.parse_args()
    seeds = range(chosen.seed, chosen.seed + chosen.processes)
    each = chosen.networks // chosen.processes
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        counts = pool.map(measure, [each] * len(seeds), seeds, [chosen.seconds] * len(seeds))
        rows = table(*(sum(parts, Counter[str]()) for parts in zip(*counts, strict=True)))
    rows.to_csv(RESULTS, index=False)
    grids.write_table(MARKERS, markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
