"""Charts of the report: Vega-Lite, drawn as SVG when the report is written, so no script draws.

Colours are CSS variables of the page, by which they follow light and dark; each mark has its words
as `aria-label`, which the page shows where a pointer is.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

# width and height in pixels, of wide screens and of narrow ones
SIZES = {"wide": (760, 360), "narrow": (290, 300)}
BIT_TICKS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
SHARE_TICKS = (0, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)
TRIANGLES = {"below": "triangle-down", "above": "triangle-up"}


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    points: columns ``x``, ``y``, ``words`` and, where there are intervals, ``low`` and ``high``.
    colour: a CSS variable of the page.
    shape: of Vega's symbols.
    size: area in square pixels.
    filled: or only a line around.
    joined: by a line, from left to right.
    """

    points: pd.DataFrame
    colour: str
    shape: str = "circle"
    size: int = 40
    filled: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Level:
    """A line across, such as a limit."""

    y: float
    colour: str
    words: str
    dashed: bool = False


def frontier_chart(
    series: Sequence[Series],
    levels: Sequence[Level],
    *,
    title: str,
    domain: tuple[float, float],
    width: str = "wide",
) -> str:
    """Points over bits on a log axis, those beyond the domain as triangles at its edge, as SVG.

    series: bottom first; their ``x`` are mean bits.
    levels: lines across.
    title: of the axis of what is lost.
    domain: of that axis.
    width: a key of `SIZES`.
    """
    xs = [x for one in series for x in one.points["x"]]
    ends = (min([*xs, 2]) * 0.9, max([*xs, 8]) * 1.1)
    ticks = [tick for tick in BIT_TICKS if ends[0] <= tick <= ends[1]]
    if width == "narrow":
        ticks = [tick for tick in ticks if tick in (0.5, 1, 2, 4, 8, 16, 32)]
    x = alt.X("x:Q").scale(type="log", domain=ends, nice=False).title("mean bits per parameter")
    x = x.axis(values=ticks, format="~g")
    y = alt.Y("y:Q").scale(domain=domain, nice=False, zero=False).title(title)
    y = y.axis(tickCount=6, format="~g")
    layers: list[Any] = [_level(level, ends[1]) for level in levels]
    for one in series:
        if len(one.points):
            layers += _layers(one, x, y, domain)
    return _svg(alt.layer(*layers), width)


def _level(level: Level, end: float) -> Any:
    data = pd.DataFrame({"x": [end], "y": [level.y], "words": [level.words]})
    base = alt.Chart(data)
    dash = [4, 3] if level.dashed else [1, 0]
    line = base.mark_rule(color=level.colour, strokeDash=dash, aria=False).encode(y="y:Q")
    text = base.mark_text(
        align="right", baseline="bottom", dy=-3, color=level.colour, fontSize=12
    ).encode(x="x:Q", y="y:Q", text="words:N")
    return alt.layer(line, text)


def _layers(one: Series, x: alt.X, y: alt.Y, domain: tuple[float, float]) -> list[Any]:
    """Line, intervals and points; beyond the domain a triangle that says where."""
    low, high = domain
    points = one.points.sort_values("x")
    inside = points[points["y"].between(low, high)]
    layers: list[Any] = []
    if one.joined and len(inside) > 1:
        line = alt.Chart(inside).mark_line(color=one.colour, strokeWidth=1.2, aria=False)
        layers.append(line.encode(x=x, y=y))
    if "low" in points and len(inside):
        spans = inside.assign(
            low=inside["low"].fillna(inside["y"]).clip(low, high),
            high=inside["high"].fillna(inside["y"]).clip(low, high),
        )
        rule = alt.Chart(spans).mark_rule(color=one.colour, opacity=0.55, aria=False)
        layers.append(rule.encode(x=x, y=_of(y, "low:Q"), y2="high:Q"))
    fill = one.colour if one.filled else "var(--page)"
    mark: dict[str, Any] = {
        "size": one.size,
        "stroke": one.colour,
        "fill": fill,
        "opacity": 1,
        "strokeWidth": 1.5,
    }
    if len(inside):
        drawn = alt.Chart(inside).mark_point(shape=one.shape, **mark)
        layers.append(drawn.encode(x=x, y=y, description="words:N"))
    for side, edge in (("above", high), ("below", low)):
        outside = points[points["y"] > high] if side == "above" else points[points["y"] < low]
        if len(outside):
            drawn = alt.Chart(outside.assign(y=edge)).mark_point(shape=TRIANGLES[side], **mark)
            layers.append(drawn.encode(x=x, y=y, description="words:N"))
    return layers


def _of(y: alt.Y, field: str) -> alt.Y:
    """The same axis for another field."""
    other = y.copy()
    other["shorthand"] = field
    return other


def prediction_chart(series: Sequence[Series], *, width: str = "wide") -> str:
    """Predicted against measured on axes that are linear near 0, with the line of equality, as SVG.

    series: their ``x`` are predicted, ``y`` measured.
    width: a key of `SIZES`.
    """
    values = [v for one in series for v in (*one.points["x"], *one.points["y"])]
    most = 1.5 * max([*values, 1e-3])
    least = min([*values, 0.0])
    scale: dict[str, Any] = {
        "type": "symlog",
        "constant": 1e-3,
        "domain": (least, most),
        "nice": False,
    }
    ticks = [tick for tick in SHARE_TICKS if tick <= most]
    x = alt.X("x:Q").scale(**scale).title("predicted from single tensors")
    x = x.axis(values=ticks, format="~g")
    y = alt.Y("y:Q").scale(**scale).title("measured on validation data")
    y = y.axis(values=ticks, format="~g")
    ends = pd.DataFrame({"x": [0.0, most], "y": [0.0, most]})
    line = alt.Chart(ends).mark_line(color="var(--float)", strokeDash=[4, 3], aria=False)
    layers: list[Any] = [line.encode(x=x, y=y)]
    for one in series:
        if len(one.points):
            layers += _layers(one, x, y, (-math.inf, math.inf))
    return _svg(alt.layer(*layers), width)


def _svg(chart: Any, width: str) -> str:
    """A chart in the colours of the page, without a background, as wide as there is room."""
    columns, rows = SIZES[width]
    axis: dict[str, Any] = {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
    }
    axis |= {"domainColor": "var(--line)", "tickColor": "var(--line)", "titleFontWeight": "normal"}
    axis |= {"labelFontSize": 12, "titleFontSize": 13}
    chart = chart.properties(width=columns, height=rows, background="transparent")
    chart = chart.configure_view(stroke=None).configure_axis(**axis)
    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    # what it is stands in the figure's words: test_report_is_well_formed
    return re.sub(
        r"<svg ", f'<svg role="group" class="{width}" ', svg.replace(' class="marks"', ""), count=1
    )
