"""How often a bound is below the truth, what it costs in bits, and how often many looks err.

    python -m benchmarks.coverage [--network NAME]

The test split's pairs of losses, of a network and of it quantized, stand for all there are, so that
their criterion ratio is known. Samples as large as the split are drawn from them with replacement;
a bound of 95% confidence should be below that ratio in 5% of the draws. Beside the networks stand
losses that are drawn: gamma (0.2) and lognormal (1.5) ones, each times lognormal noise of a spread.

- errors: each strategy at the limit that it truly breaks by nothing, by itself; and, in the rows
  "ladder", walked to from more bits, as what is certified is.
- bits: what the ladder's walk certifies on average at the limits of `LIMITS`.
- looks: how often at least one of so many strategies at the edge is certified on one split.

Writes benchmarks/results/coverage.csv and, of all four networks, the tables of docs/statistics.md.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from benchmarks import grids
from quantifind.certification.ledger import level_of
from quantifind.quantize import mean_bits, quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy

RESULTS = grids.ROOT / "benchmarks/results/coverage.csv"
MARKERS = grids.markers("python -m benchmarks.coverage")
DEPTHS = (8, 6, 5, 4, 3, 2)
LADDER_BITS = (8, 6, 5, 4, 3, 2)
DRAWS, LADDER_DRAWS, LOOK_DRAWS = 2_000, 1_000, 1_000
EXAMPLES, SPREADS = 10_000, (0.2, 1.0, 1.5)
ONCE = np.ones((1, EXAMPLES))
Draw = Callable[[np.random.Generator, int], np.ndarray]
LOSSES: dict[str, Draw] = {
    "gamma": lambda generator, size: generator.gamma(0.2, size=size),
    "lognormal": lambda generator, size: generator.lognormal(-4, 1.5, size=size),
}
LIMITS, LIMIT = (1.01, 1.05), 1.01
LOOKS = (1, 2, 5, 10, 20)
BOUNDS = ("t", "t, Johnson's", "worst once more", "worst twice more")
CHUNK = 100
# one of so many examples is in each drawn split, but for e^-64 of them
FOREMOST = 64


def kept(
    changes: np.ndarray, weights: np.ndarray, *, confidence: float | np.ndarray = 0.95
) -> np.ndarray:
    """Whether each of `BOUNDS` keeps a limit.

    changes: (cases, examples), losses − limit · original losses.
    weights: (draws, examples), how often each draw has an example.
    confidence: of the bounds; or (levels, 1, 1, cases).
    Returns: (bounds, draws, cases), or (levels, bounds, draws, cases).
    """
    examples = changes.shape[1]
    total, squares, cubes = (weights @ power.T for power in (changes, changes**2, changes**3))
    few = np.argpartition(-changes, FOREMOST, axis=1)[:, :FOREMOST]
    order = np.take_along_axis(few, np.argsort(-np.take_along_axis(changes, few, 1), axis=1), 1)
    first = [np.argmax(weights[:, foremost] > 0, axis=1) for foremost in order]
    worst = np.transpose([c[o][f] for c, o, f in zip(changes, order, first, strict=True)])

    def of_t(more: Any) -> np.ndarray:
        count = examples + more
        mean = (total + more * worst) / count
        spread = np.sqrt((squares + more * worst**2) / count - mean**2)
        result: np.ndarray = mean / spread * np.sqrt(count - 1)
        return result

    plain, mean = of_t(0), total / examples
    spread = np.sqrt(squares / examples - mean**2)
    skew = (cubes / examples - 3 * mean * squares / examples + 2 * mean**3) / spread**3
    # Johnson 1978
    off = skew / (6 * examples) + skew * (mean / spread) ** 2 / 3
    more = np.log(1 - confidence) / np.log(0.05)
    once, twice = (np.maximum(plain, of_t(times * more)) for times in (1, 2))
    corrected = plain + off * np.sqrt(examples)
    found = np.stack(np.broadcast_arrays(plain, corrected, once, twice), axis=-3)
    found = found if np.ndim(confidence) == 0 else found[:, 0]
    result: np.ndarray = found <= -special.stdtrit(examples - 1, confidence)
    return result


def measure(network: str) -> Iterator[dict[str, Any]]:
    """The rows of a network: single depths, then the ladder."""
    net, criterion = grids.trained(network)
    train, _, test = grids.loaders(network)
    evaluator = Evaluator(net, test, criterion)
    original = evaluator.outcome()["loss"].numpy()
    depths = [quantize(net, uniform_strategy(net, bits)) for bits in DEPTHS]
    losses = np.stack([evaluator.outcome(quantized)["loss"].numpy() for quantized in depths])
    changes = losses - losses.mean(axis=1, keepdims=True) / original.mean() * original
    shares = _over_draws(changes, DRAWS).mean(axis=1)
    for i, bits in enumerate(DEPTHS):
        case = {"network": network, "table": "errors", "case": f"{bits} bits"}
        yield from _rows(case, shares[:, i])
    calibration = list(islice(train, grids.CALIBRATION_BATCHES))
    strategies = [uniform_strategy(net, **grids.GPTQ, bits=bits) for bits in LADDER_BITS]
    ladder = [quantize(net, strategy, calibration) for strategy in strategies]
    steps = np.stack([evaluator.outcome(quantized)["loss"].numpy() for quantized in ladder])
    yield from of_ladder(network, steps, [mean_bits(net, one) for one in ladder], original)


def _over_draws(changes: np.ndarray, draws: int) -> np.ndarray:
    """`kept`, of splits drawn from the examples with replacement."""
    generator, examples, found = np.random.default_rng(0), changes.shape[1], []
    for _ in range(0, draws, CHUNK):
        drawn = (generator.integers(examples, size=examples) for _ in range(CHUNK))
        weights = np.stack([np.bincount(one, minlength=examples) for one in drawn])
        found.append(kept(changes, weights.astype(float)))
    return np.concatenate(found, axis=1)


def _rows(case: dict[str, Any], values: Iterable[float]) -> Iterator[dict[str, Any]]:
    for bound, value in zip(BOUNDS, values, strict=True):
        yield case | {"bound": bound, "value": value}


def of_ladder(
    network: str, steps: np.ndarray, widths: list[float], original: np.ndarray
) -> Iterator[dict[str, Any]]:
    """How often a walk ends at what truly breaks the limit, and the bits that it certifies.

    For the errors the limit is the ratio of each step in turn, the hardest for it.
    """
    ratios, bits = steps.mean(axis=1) / original.mean(), np.array([32.0, *widths])
    edges, wrong = [r for r in ratios[1:] if r > ratios[0]], []
    for limit in (*edges, *LIMITS):
        passed = _over_draws(steps - limit * original, LADDER_DRAWS)
        reached = np.cumprod(passed, axis=2).sum(axis=2)
        if limit in edges:
            wrong.append(np.array([False, *(ratios >= limit)])[reached].mean(axis=1))
        if limit in LIMITS:
            case = {"network": network, "table": "bits", "case": f"CR ≤ {limit:g}"}
            yield from _rows(case, bits[reached].mean(axis=1))
    yield from _rows({"network": network, "table": "errors", "case": "ladder"}, np.max(wrong, 0))


def synthetic() -> Iterator[dict[str, Any]]:
    """The rows of losses that are drawn, whose true ratio is the limit."""
    for name, draw in LOSSES.items():
        for spread in SPREADS:
            generator = np.random.default_rng(0)
            found = [kept(_change(generator, draw, spread), ONCE)[:, 0] for _ in range(DRAWS)]
            case = {"network": f"{name} losses", "table": "errors", "case": f"spread {spread:g}"}
            yield from _rows(case, np.mean(found, axis=(0, 2)))


def _change(generator: np.random.Generator, draw: Draw, spread: float, looks: int = 1) -> Any:
    """LIMIT · (losses − original losses), of a true ratio of LIMIT. (looks, examples)"""
    original = draw(generator, EXAMPLES)
    normal = generator.standard_normal((looks, EXAMPLES))
    return LIMIT * original * (np.exp(spread * normal - spread**2 / 2) - 1)


def looks() -> Iterator[dict[str, Any]]:
    """How often one of the first k strategies, all of which just break the limit, is certified."""
    once = BOUNDS.index("worst once more")
    each = np.array([level_of(k + 1) for k in range(max(LOOKS))])
    levels = {"5% each": np.full_like(each, 0.05), "5% / (k (k + 1))": each}
    confidence = 1 - np.array(list(levels.values()))[:, None, None]
    for name, draw in LOSSES.items():
        for spread in SPREADS:
            generator, found = np.random.default_rng(0), []
            for _ in range(LOOK_DRAWS):
                changes = _change(generator, draw, spread, max(LOOKS))
                found.append(kept(changes, ONCE, confidence=confidence)[:, once, 0])
            wrong = np.cumsum(found, axis=2) > 0
            for i, level in enumerate(levels):
                for k in LOOKS:
                    case = {"network": f"{name} losses, spread {spread:g}", "table": "looks"}
                    value = wrong[:, i, k - 1].mean()
                    yield case | {"case": str(k), "bound": level, "value": value}


def markdown(results: pd.DataFrame) -> str:
    """The three tables, one below the other."""
    errors, bits, looked = (results[results["table"] == t] for t in ("errors", "bits", "looks"))
    bounds = list(BOUNDS)
    lines = [
        f"| bound below the true CR: | {' | '.join(bounds)} |",
        "|---" * (1 + len(bounds)) + "|",
    ]
    for network, rows in errors.groupby("network", sort=False):
        single = rows[rows["case"].str.endswith("bits")]
        if not single.empty:
            by_bound = single.groupby("bound")["value"]
            cells = [f"{by_bound.min()[b]:.1%} to {by_bound.max()[b]:.1%}" for b in bounds]
            lines.append(f"| {network}, one depth | {' | '.join(cells)} |")
        for case, of_case in rows[~rows["case"].str.endswith("bits")].groupby("case", sort=False):
            values = of_case.set_index("bound")["value"]
            cells = [f"{values[bound]:.1%}" for bound in bounds]
            lines.append(f"| {network}, {case} | {' | '.join(cells)} |")
    lines += ["", f"| mean bits certified: | {' | '.join(bounds)} |", "|---" * 5 + "|"]
    for (network, case), rows in bits.groupby(["network", "case"], sort=False):
        values = rows.set_index("bound")["value"]
        cells = [f"{values[bound]:.2f}" for bound in bounds]
        lines.append(f"| {network}, {case} | {' | '.join(cells)} |")
    heads = " | ".join(f"{k} look{'s' * (k > 1)}" for k in LOOKS)
    lines += ["", f"| one at least certified wrongly: | {heads} |", "|---" * (1 + len(LOOKS)) + "|"]
    for (network, level), rows in looked.groupby(["network", "bound"], sort=False):
        values = rows.set_index(rows["case"].astype(int))["value"]
        cells = [f"{values[k]:.1%}" for k in LOOKS]
        lines.append(f"| {network}, level {level} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    chosen = grids.chosen_networks(__doc__)
    measured = []
    for name in chosen:
        measured += measure(name)
        print(pd.DataFrame(measured[-16:]).to_string(index=False), flush=True)
    drawn = pd.DataFrame([*synthetic(), *looks()])
    print(drawn.to_string(index=False), flush=True)
    of_networks = pd.DataFrame(measured)
    if RESULTS.exists():
        kept = pd.read_csv(RESULTS)
        kept = kept[kept["network"].isin(grids.NETWORKS) & ~kept["network"].isin(chosen)]
        of_networks = pd.concat([kept, of_networks])
    of_networks = of_networks.sort_values(
        "network", key=lambda n: n.map(grids.NETWORKS.index), kind="stable"
    )
    results = pd.concat([of_networks, drawn])
    results.to_csv(RESULTS, index=False)
    if set(grids.NETWORKS) <= set(results["network"]):
        grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
