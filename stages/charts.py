"""Charts of the report: Vega-Lite, drawn as SVG when the report is written, so no script draws.

Colours are CSS variables of the page, by which they follow light and dark; each mark has its words
as `aria-label`, which the page shows where a pointer is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import vl_convert

Spec = dict[str, Any]
# width and height in pixels, of wide screens and of narrow ones
SIZES = {"wide": (760, 360), "narrow": (290, 300)}
BIT_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
SHARE_TICKS = (0, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000)
# a symbol of one's own, within a square from -1 to 1: an x, which no filling hides
SALTIRE = "M-.7,-.7L.7,.7M-.7,.7L.7,-.7"
FEW_TICKS = (0, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
# of those, whose labels meet where there is little room
CROWDED = (5e-4, 2e-3)


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    points: columns ``x``, ``y``, ``words``; where there are intervals ``low`` and ``high``, and
        where there are bounds ``bound``.
    colour: a CSS variable of the page.
    shape: of Vega's symbols.
    size: area in square pixels.
    filled: or only a line around.
    joined: by a line, from left to right.
    label: beside the first point, below it.
    right: the label is to the right of it, where that of another may be to the left.
    """

    points: pd.DataFrame
    colour: str
    shape: str = "circle"
    size: int = 40
    filled: bool = True
    joined: bool = False
    label: str = ""
    right: bool = False


@dataclass(frozen=True)
class Level:
    """A line across, such as a limit."""

    y: float
    colour: str
    words: str
    dashed: bool = False
    # whether its words are below it, since another is near above
    below: bool = False


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
        ticks = [tick for tick in ticks if tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32)]
    x = _axis("x", "mean bits per parameter", ends, {"values": ticks}, {"type": "log"})
    y = _axis("y", title, domain, {"tickCount": 6})
    layers = [layer for level in levels for layer in _level(level, ends[1], x, y)]
    for one in series:
        layers += _layers(one, x, y, domain)
    return _svg(layers, width)


def prediction_chart(series: Sequence[Series], *, width: str = "wide") -> str:
    """Predicted against measured on axes that are linear near 0, with the line of equality, as SVG.

    series: their ``x`` are predicted, ``y`` measured.
    width: a key of `SIZES`.
    """
    values = [v for one in series for v in (*one.points["x"], *one.points["y"])]
    ends = (min([*values, 0.0]), 1.5 * max([*values, 1e-3]))
    scale = {"type": "symlog", "constant": 1e-3}
    ticks = [tick for tick in (SHARE_TICKS if ends[1] > 0.1 else FEW_TICKS) if tick <= ends[1]]
    if width == "narrow":
        ticks = [tick for tick in ticks if tick not in CROWDED]
    x = _axis("x", "predicted from single tensors", ends, {"values": ticks}, scale)
    y = _axis("y", "measured on validation data", ends, {"values": ticks}, scale)
    line = {"type": "line", "color": "var(--float)", "strokeDash": [4, 3], "aria": False}
    equal = pd.DataFrame({"x": [0.0, ends[1]], "y": [0.0, ends[1]]})
    layers = [_layer(equal, line, x=x, y=y)]
    for one in series:
        layers += _layers(one, x, y, (-math.inf, math.inf))
    return _svg(layers, width)


def _axis(field: str, title: str, domain: Any, axis: Spec, scale: Spec | None = None) -> Spec:
    scale = {"domain": list(domain), "nice": False, "zero": False} | (scale or {})
    named = {"field": field, "type": "quantitative", "title": title}
    return named | {"scale": scale, "axis": {"format": "~g"} | axis}


def _layer(data: pd.DataFrame, mark: Spec, **encoding: Spec) -> Spec:
    # no other column: what is no number is no JSON
    fields = [channel["field"] for channel in encoding.values()]
    return {
        "data": {"values": data[fields].to_dict("records")},
        "mark": mark,
        "encoding": encoding,
    }


def _words(points: pd.DataFrame, x: Spec, y: Spec, **place: Any) -> list[Spec]:
    """The words of points beside them, on a rim of the page's colour: lines behind are hidden."""
    looks = ({"stroke": "var(--page)", "strokeWidth": 4}, {"color": "var(--ink)"})
    text = {"field": "words", "type": "nominal"}
    return [
        _layer(
            points,
            {"type": "text", "fontSize": 12, "baseline": "bottom", "aria": False} | place | look,
            x=x, y=y, text=text,
        )
        for look in looks
    ]  # fmt: skip


def _level(level: Level, end: float, x: Spec, y: Spec) -> list[Spec]:
    data = pd.DataFrame({"x": [end], "y": [level.y], "words": [level.words]})
    dash = [4, 3] if level.dashed else [1, 0]
    place: Spec = {"baseline": "top", "dy": 5} if level.below else {"dy": -3}
    rule = {"type": "rule", "color": level.colour, "strokeDash": dash, "aria": False}
    return [_layer(data, rule, y=y), *_words(data, x, y, align="right", **place)]


def _layers(one: Series, x: Spec, y: Spec, domain: tuple[float, float]) -> list[Spec]:
    """Line, intervals and points; beyond the domain a triangle that says where."""
    low, high = domain
    points = one.points.sort_values("x")
    inside = points[points["y"].between(low, high)]
    layers = []
    if one.joined and len(inside) > 1:
        line = {"type": "line", "color": one.colour, "strokeWidth": 1.2, "aria": False}
        layers.append(_layer(inside, line, x=x, y=y))
    if "low" in points and len(inside):
        spans = inside.assign(
            low=inside["low"].fillna(inside["y"]).clip(low, high),
            high=inside["high"].fillna(inside["y"]).clip(low, high),
        )
        rule = {"type": "rule", "color": one.colour, "opacity": 0.55, "aria": False}
        ends = {"y": y | {"field": "low"}, "y2": {"field": "high"}}
        layers.append(_layer(spans, rule, x=x, **ends))
    if "bound" in points:
        met = points[points["bound"].between(low, high)]
        across = {"type": "tick", "orient": "horizontal", "color": one.colour, "size": 12}
        across |= {"thickness": 2, "aria": False}
        layers.append(_layer(met, across, x=x, y=y | {"field": "bound"}))
    fill = one.colour if one.filled else "var(--page)"
    mark = {"type": "point", "size": one.size, "stroke": one.colour, "fill": fill}
    mark |= {"opacity": 1, "strokeWidth": 1.5}
    above, below = points[points["y"] > high], points[points["y"] < low]
    for shape, shown in (
        (one.shape, inside),
        ("triangle-up", above.assign(y=high)),
        ("triangle-down", below.assign(y=low)),
    ):
        if len(shown):
            words = {"field": "words", "type": "nominal"}
            layers.append(_layer(shown, mark | {"shape": shape}, x=x, y=y, description=words))
    if one.label and len(inside):
        place = _beside(one.right, inside["x"].iloc[0], *x["scale"]["domain"])
        layers += _words(inside.head(1).assign(words=one.label), x, y, **place)
    return layers


def _beside(right: bool, at: float, low: float, high: float) -> Spec:
    """Where the label of a point is: below it, where the curves, which fall to the right, are not;
    on the other side of it, and a line lower, where it would leave the axis."""
    share = math.log(at / low) / math.log(high / low)
    to_right = share < 0.25 or (right and share < 0.6)
    side: Spec = {"align": "left", "dx": 9} if to_right else {"align": "right", "dx": -9}
    return side | {"baseline": "top", "dy": 5 if to_right == right else 20}


def _svg(layers: list[Spec], width: str) -> str:
    """A chart in the colours of the page, without a background, as wide as there is room."""
    columns, rows = SIZES[width]
    axis = {"labelColor": "var(--ink)", "titleColor": "var(--ink)", "gridColor": "var(--line)"}
    axis |= {"domainColor": "var(--line)", "tickColor": "var(--line)", "titleFontWeight": "normal"}
    # a page's font is wider than the one that labels are measured with
    sizes = {"labelFontSize": 12, "titleFontSize": 13, "titlePadding": 14}
    look = {"view": {"stroke": None}, "axis": axis | sizes}
    chart = {"width": columns, "height": rows, "background": "transparent", "layer": layers}
    svg = vl_convert.vegalite_to_svg(chart | {"config": look})
    return svg.replace(' class="marks"', f' class="{width}"', 1)
