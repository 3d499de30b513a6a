"""What the report's charts show, from the tables of a run."""

import numpy as np
import pandas as pd

from quantifind.certification import digits
from quantifind.certification.measures import MEASURES
from stages.charts import SALTIRE, Level, Series, frontier_chart, prediction_chart
from stages.evidence import Evidence
from stages.mixtures import mixture

# by the first word of a candidate's origin, those of matplotlib's markers in the palette
SHAPES = {
    "uniform": "square",
    "sequential": "triangle-up",
    "following": "triangle-down",
    "trained": "cross",
}


SPREAD = ["low", "high", "bound"]


def mark(evidence: Evidence) -> tuple[str, str]:
    """Shape and colour of the network that the report is about, as in matplotlib's pictures."""
    return ("diamond", "var(--limit)") if evidence.kept else ("square", "var(--ink)")


def _points(table: pd.DataFrame, measure: str, words: pd.Series) -> pd.DataFrame:
    """Those of a table that have a value, as people read it."""
    ends = {"y": "", "low": "_low", "high": "_high", "bound": "_look_bound"}
    scale = MEASURES[measure].scale
    columns = {to: scale * table.get(f"{measure}{end}", np.nan) for to, end in ends.items()}
    points = pd.DataFrame({"x": table["mean_bits"], **columns, "words": words})
    points = points.replace([np.inf, -np.inf], np.nan)
    return points[points["y"].notna()]


def frontier(evidence: Evidence, size: str) -> str:
    """What is lost against bits: candidates, the same bits for all, the ladder, the certified."""
    measure, tables = evidence.measure, evidence.tables
    scale, words = MEASURES[measure].scale, MEASURES[measure].words
    lossless, limit = scale * MEASURES[measure].lossless, scale * evidence.limits[measure]
    candidates, uniform, ladder = (tables[n] for n in ("candidates", "bit_depths", "frontier"))
    candidates = candidates[candidates["examples"] == candidates["examples"].max()]
    drawn = tables["random"]

    def said(table: pd.DataFrame, what: pd.Series, split: str) -> pd.Series:
        bits = table["mean_bits"].map("{:.4g} bits".format)
        found = table[measure] if measure in table else pd.Series(np.nan, table.index)
        text = (
            what
            + ": "
            + bits
            + f", {words} "
            + found.map(lambda value: digits.amount(measure, value))
            + f" on {split}"
        )
        # earlier runs did not leave them
        held = "; tensors by bits: " + table["widths"].fillna("none") if "widths" in table else ""
        return text + held

    held = tables["tensors"].query("kind == 'tensors'").groupby("step")["bits"].agg(mixture)
    ladder = ladder.assign(widths=held.reindex(ladder.index))
    texts = said(ladder, ladder["validation_origin"], "test data")
    steps = _points(ladder, measure, texts)
    depths = uniform["bit_depth"].map("{:g} bits for all".format)
    judged_depths = _points(uniform, measure, said(uniform, depths, "test data"))
    tried = _points(
        candidates, measure, said(candidates, candidates["origin"], "validation data")
    ).drop(columns=SPREAD)
    blind = _points(drawn, measure, said(drawn, drawn["origin"] + " widths", "validation data"))
    marked = steps[steps.index == evidence.step].drop(columns=SPREAD)
    shape, colour = mark(evidence)
    label = f"{evidence.best['mean_bits']:.3g} bits"
    series = [
        Series(tried, "var(--tried)", size=28),
        Series(blind.drop(columns=SPREAD), "var(--random)", shape=SALTIRE, size=60),
        Series(judged_depths, "var(--uniform)", shape="square", joined=True),
        Series(steps, "var(--ink)", joined=True),
        *_certified_depth(evidence, judged_depths),
        Series(marked, colour, shape, size=170, filled=False, label=label),
    ]
    reach = limit - lossless
    lowest = min([*steps["y"], *judged_depths["y"], lossless], default=lossless)
    low = lowest - 0.35 * max(reach, lossless - lowest)
    high = limit + max(1.5 * reach, 0.3 * (limit - low), 0.002 * scale)
    levels = [
        Level(lossless, "var(--float)", "float", dashed=True, below=reach < (high - low) / 12),
        Level(limit, "var(--limit)", f"limit {digits.limit(measure, evidence.limits[measure])}"),
    ]
    return frontier_chart(series, levels, title=axis(measure), domain=(low, high), width=size)


def axis(measure: str) -> str:
    """The title of an axis of a measure."""
    shown = MEASURES[measure]
    return f"{shown.words} {shown.unit}" if shown.hundredths else shown.words


def _certified_depth(evidence: Evidence, depths: pd.DataFrame) -> list[Series]:
    """A mark around the same bits for all that are certified, if any are."""
    depth = evidence.answer["certified_uniform_depth"]
    of_depth = evidence.tables["bit_depths"]["bit_depth"] == depth
    marked = depths[of_depth.reindex(depths.index)].drop(columns=SPREAD)
    label = f"{depth} bits for all"
    return [Series(marked, "var(--limit)", "square", 150, filled=False, label=label, right=True)]


def predicted(evidence: Evidence) -> pd.DataFrame:
    """The candidates whose divergence was predicted, and measured on all examples; ``marked`` is
    that which the report is about."""
    candidates = evidence.tables["candidates"]
    steps = candidates.index[candidates["on_ladder"].astype(bool)]
    step = steps[evidence.step : evidence.step + 1]
    candidates = candidates.assign(marked=candidates.index.isin(step))
    both = ["predicted_fidelity", "fidelity"]
    shown = candidates[candidates["examples"] == candidates["examples"].max()]
    shown = shown.reindex(columns=[*shown.columns.union(both, sort=False)])
    return shown[np.isfinite(shown[both].astype(float)).all(axis=1)]


def prediction(evidence: Evidence, size: str) -> str:
    """Predicted against measured, by origin."""
    shown = predicted(evidence)
    words = shown["origin"] + ": " + shown["mean_bits"].map("{:.4g} bits".format)
    words += ", predicted " + shown["predicted_fidelity"].map(digits.number)
    words += ", measured " + shown["fidelity"].map(digits.number)
    points = pd.DataFrame(
        {"x": shown["predicted_fidelity"], "y": shown["fidelity"], "words": words}
    )
    # below, so that the mark of its origin is seen
    chosen = points[shown["marked"]]
    shape, colour = mark(evidence)
    series = [Series(chosen, colour, shape, size=170, filled=False)]
    for origin, part in points.groupby(shown["origin"].str.split().str[0]):
        origin_shape = SHAPES.get(str(origin), "circle")
        series.append(Series(part, f"var(--{origin}, var(--tried))", origin_shape, size=45))
    return prediction_chart(series, width=size)
