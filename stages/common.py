"""What networks have in common and where they differ, in sentences computed from their tables."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from quantifind.certification.digits import amount
from quantifind.certification.measures import MEASURES
from stages.evidence import Evidence

Found = Mapping[str, Evidence]


def answer(found: Found) -> str:
    """Which networks need the fewest and the most bits, of those with a certificate.

    found: by name what each network's run left, as everywhere here.
    """
    bits = certified(found)
    own = "" if alike(found) else ", each at its own limits"
    if not bits:
        return f"Nothing is certified for {listed(list(found))}"
    fewest, most = min(bits, key=bits.__getitem__), max(bits, key=bits.__getitem__)
    without = [name for name in found if name not in bits]
    more = f"; nothing is certified for {listed(without)}" if without else ""
    if len(bits) == 1:
        return f"{fewest} needs {bits[fewest]:.3g} bits per parameter{more}"
    times = bits[most] / bits[fewest]
    if times == 1:
        return f"{listed(list(bits))} need {bits[most]:.3g} bits per parameter each{own}{more}"
    times_more = f": {times:.2g} times as many" if times >= 1.05 else ""
    return (
        f"{fewest} needs the fewest bits per parameter, {bits[fewest]:.3g}, and {most} the most, "
        f"{bits[most]:.3g}{own}{times_more}{more}"
    )


def alike(found: Found) -> bool:
    """Whether all networks are held to the same limits."""
    return len({tuple(sorted(evidence.limits.items())) for evidence in found.values()}) == 1


def certified(found: Found) -> dict[str, float]:
    """By name the certified bits of those that have a certificate."""
    answers = {name: evidence.answer["certified"] for name, evidence in found.items()}
    return {name: float(one["mean_bits"]) for name, one in answers.items() if one is not None}


def listed(names: list[str]) -> str:
    """Names as words.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def reach(found: Found, measure: str) -> str:
    """Between what a measure lies where networks are certified."""
    best = {
        name: evidence.tables["frontier"][measure].iloc[evidence.step]
        for name, evidence in found.items()
        if evidence.kept
    }
    known = {name: value for name, value in best.items() if np.isfinite(value)}
    words = MEASURES[measure].words
    if not known:
        return f"{words.capitalize()}: nothing is certified"
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    least, largest = (amount(measure, known[name]) for name in (low, high))
    if low == high:
        return f"{words.capitalize()} is {least} for {low}"
    return f"{words.capitalize()} of what is certified: from {least} ({low}) to {largest} ({high})"


def uniform(found: Found) -> str:
    """The widths that are certified for all tensors alike."""
    depths = {n: e.answer["certified_uniform_depth"] for n, e in found.items()}
    known = {name: depth for name, depth in depths.items() if depth is not None}
    if not known:
        return "One width for all tensors is certified for none"
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    own = "" if alike(found) else ", each at its own limits"
    if known[low] == known[high]:
        return f"One width for all tensors: {known[low]} bits for {listed(list(known))}{own}"
    ends = f"from {known[low]} bits ({low}) to {known[high]} ({high})"
    return f"One width for all tensors: {ends}{own}"


def sentences(found: Found) -> list[str]:
    """What holds for all, for some, or for none."""
    said = []
    gains = {
        name: uniform_bits / bits
        for name, bits in certified(found).items()
        if (uniform_bits := found[name].uniform_bits) is not None
    }
    if gains:
        most = max(gains, key=gains.__getitem__)
        least = min(gains, key=gains.__getitem__)
        ends = [f"{gains[name]:.2g} ({name})" for name in dict.fromkeys((least, most))]
        times = " to ".join(ends)
        said.append(f"One width for all tensors needs {times} times the bits of mixed widths.")
    pairs = {name: _by_kind(evidence.tensors) for name, evidence in found.items()}
    said += _holds(pairs, "biases have wider codes, on average, than weights")
    outer = {name: _ends(evidence.tensors) for name, evidence in found.items()}
    said += _holds(
        {name: end and (end[0], end[2]) for name, end in outer.items()},
        "the first weights have wider codes than all weights on average",
    )
    said += _holds(
        {name: end and (end[1], end[2]) for name, end in outer.items()},
        "the last weights have wider codes than all weights on average",
    )
    weights = (e.tensors[e.tensors["kind"] == "tensors"] for e in found.values())
    widths = [each["bits"].nunique() for each in weights]
    few, many = min(widths), max(widths)
    count = f"{few}" if few == many else f"{few} to {many}"
    words = "one width" if many == 1 else f"{count} different widths"
    return [*said, f"Each network's tensors have {words}."]


def _holds(pairs: Mapping[str, tuple[float, float] | None], claim: str) -> list[str]:
    """Of how many networks the first number is larger, with both numbers."""
    known = {name: pair for name, pair in pairs.items() if pair is not None}
    if not known:
        return []
    true = [name for name, (one, other) in known.items() if one > other]
    numbers = "; ".join(f"{name} {one:.3g} and {other:.3g}" for name, (one, other) in known.items())
    if len(known) == 1:
        return [f"{'In' if true else 'Not in'} {next(iter(known))}: {claim} ({numbers})."]
    how = "all" if len(true) == len(known) else f"{len(true) or 'none'} of"
    how += f" {len(known)}"
    return [f"In {how} networks {claim} ({numbers})."]


def _by_kind(tensors: pd.DataFrame) -> tuple[float, float] | None:
    """Mean bits of biases and of all else, by their values."""
    weights = tensors[(tensors["kind"] == "tensors") & (tensors["values"] > 0)]
    biases = weights["name"].str.endswith("bias")
    if biases.all() or not biases.any():
        return None
    return _mean(weights[biases]), _mean(weights[~biases])


def _ends(tensors: pd.DataFrame) -> tuple[float, float, float] | None:
    """Bits of the first and the last weights, and of all on average."""
    weights = tensors[(tensors["kind"] == "tensors") & (tensors["values"] > 0)]
    weights = weights[~weights["name"].str.endswith("bias")]
    if len(weights) < 3:
        return None
    return float(weights["bits"].iloc[0]), float(weights["bits"].iloc[-1]), _mean(weights)


def _mean(tensors: pd.DataFrame) -> float:
    return float(np.average(tensors["bits"], weights=tensors["values"]))
