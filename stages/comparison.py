"""The comparison: networks beside each other, on one page, from their tables alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from quantifind.certification import digits
from quantifind.certification.goal import steps_that_keep
from quantifind.certification.measures import MEASURES
from quantifind.utils import palette
from stages import common, report_tensors
from stages.charts import SIZES, Level, Series, frontier_chart
from stages.evidence import Evidence
from stages.pages import render
from stages.report_charts import axis

# of the criterion ratio; each network's own limits stand beside them
LIMITS = (1.001, 1.01, 1.05, 1.1)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")


def comparison(found: Mapping[str, Evidence]) -> str:
    """The page, as HTML.

    found: by name what each network's run left.
    """
    measures = [m for m in MEASURES if all(m in e.tables["frontier"] for e in found.values())]
    return render(
        "comparison.html",
        {
            "names": list(found),
            "answer": common.answer(found),
            "sentences": common.sentences(found),
            "rows": [_row(name, evidence) for name, evidence in found.items()],
            "limits": LIMITS,
            "charts": [
                {
                    "id": measure,
                    "measure": MEASURES[measure],
                    "heading": common.reach(found, measure),
                    "svgs": {size: _ladders(found, measure, size) for size in SIZES},
                }
                for measure in measures
            ],
            "uniform": {size: _uniform(found, size) for size in SIZES},
            "uniform_heading": common.uniform(found),
            "strips": {name: report_tensors.strip(e.tensors) for name, e in found.items()},
            "key": [
                {"name": name, "colour": _colour(place), "shape": _shape(place)}
                for place, name in enumerate(found)
            ],
        },
    )


def certified_bits(frontier: pd.DataFrame, limits: Mapping[str, float]) -> float | None:
    """The bits of the last step of a ladder that keeps limits, as one look certifies it.

    frontier: the ladder, from most bytes to fewest.
    limits: by measure.
    Returns: None where not even the first does.
    """
    kept = steps_that_keep(frontier, limits)
    return float(frontier["mean_bits"].iloc[kept - 1]) if kept else None


def _row(name: str, evidence: Evidence) -> dict[str, Any]:
    best, depth = evidence.best, evidence.answer["certified_uniform_depth"]
    certified = evidence.answer["certified"] is not None
    frontier = evidence.tables["frontier"]
    at = [certified_bits(frontier, {"criterion_ratio": limit}) for limit in LIMITS]
    return {
        "name": name,
        "limits": digits.limits_in_words(evidence.limits),
        "bits": f"{best['mean_bits']:.3f}" if certified else "none",
        "smaller": f"{best['compression']:.1f} ×" if certified else "–",
        "uniform": "none" if depth is None else f"{depth}",
        "at": ["none" if bits is None else f"{bits:.3f}" for bits in at],
    }


def _colour(place: int) -> str:
    return palette.NETWORKS[place % len(palette.NETWORKS)]


def _shape(place: int) -> str:
    return SHAPES[place % len(SHAPES)]


def _points(table: pd.DataFrame, measure: str, name: str) -> pd.DataFrame:
    words = f"{name}: " + table["mean_bits"].map("{:.4g} bits, ".format)
    words += f"{MEASURES[measure].words} "
    words += table[measure].map(lambda value: digits.amount(measure, value))
    lost = MEASURES[measure].scale * table[measure]
    points = pd.DataFrame({"x": table["mean_bits"], "y": lost, "words": words})
    return points[np.isfinite(points["y"])]


def _ladders(found: Mapping[str, Evidence], measure: str, size: str) -> str:
    """Each network's ladder on test data; a ring at what is certified for its own limits."""
    series = []
    for place, (name, evidence) in enumerate(found.items()):
        points = _points(evidence.tables["frontier"], measure, name)
        look: dict[str, Any] = {"colour": _colour(place), "shape": _shape(place)}
        series.append(Series(points, joined=True, **look))
        if evidence.kept:
            best = points[points.index == evidence.step]
            series.append(Series(best, size=170, filled=False, **look))
    lossless = MEASURES[measure].scale * MEASURES[measure].lossless
    values = [y for one in series for y in one.points["y"]]
    high = max(np.quantile(values, 0.9), lossless) if values else lossless + 1
    low = min([*values, lossless])
    reach = max(high - low, 1e-6)
    levels = [Level(lossless, "var(--float)", "float", dashed=True)]
    domain = (low - 0.2 * reach, high + 0.1 * reach)
    return frontier_chart(series, levels, title=axis(measure), domain=domain, width=size)


def _uniform(found: Mapping[str, Evidence], size: str) -> str:
    """The same bits for all tensors: from where on the loss grows."""
    series = []
    for place, (name, evidence) in enumerate(found.items()):
        points = _points(evidence.tables["bit_depths"], "criterion_ratio", name)
        look: dict[str, Any] = {"colour": _colour(place), "shape": _shape(place)}
        series.append(Series(points, joined=True, **look))
    levels = [Level(1.0, "var(--float)", "float", dashed=True)]
    return frontier_chart(
        series, levels, title=MEASURES["criterion_ratio"].words, domain=(0.7, 2.0), width=size
    )
