"""The colours of all pictures and pages: the same thing has the same colour everywhere.

Hues are those of Okabe and Ito 2008 (jfly.uni-koeln.de/color), darkened where they would be faint
on white; people with any kind of colour blindness tell those apart that stand in one picture:
test_colours_of_a_picture_are_told_apart_by_everyone
"""

import math
from bisect import bisect_left
from typing import Any

# the same bits for all; the float network; losses while training; what the search found
UNIFORM, FLOAT, TRAIN, FOUND = "#0072b2", "#767676", "#e69f00", "#000000"
# by place of a limit; with a marker of its own, so that none is told by its colour alone
LIMITS = ("#d55e00", "#009e73", "#cc79a7", "#56b4e9")
LIMIT_MARKERS = ("o", "s", "^", "D")
# by the first word of a candidate's origin, likewise
ORIGINS = {
    "uniform": (UNIFORM, "s"),
    "allocated": ("#56b4e9", "o"),
    "sequential": ("#cc79a7", "^"),
    "following": ("#009e73", "v"),
    "trained": ("#d55e00", "P"),
}
# by place of a network on a page of several, on light and on dark
NETWORKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# allocations that nobody chose
RANDOM = "#882255"
# what no limit and no network has: candidates beside those that count
TRIED = "#8a909c"
NOT_TRIED = "#d9d9d9"
# matplotlib's settings for all pictures; ids in an SVG are the same each time, so that DVC sees no
# change
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.titlesize": 13,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 10,
    "legend.framealpha": 0.9,
    "svg.hashsalt": "quantifind",
}
# what counts has one marker in all of matplotlib's pictures: what is certified, and what validation
# data chose
CERTIFIED, CHOSEN = "D", "s"
# by width in bits, between which the others lie: dark is much (viridis, Smith and van der Walt
# 2015, and a darker end)
WIDTHS = {
    1: "#fde725",
    1.6: "#b5de2b",
    2: "#6ece58",
    3: "#35b779",
    4: "#1f9e89",
    5: "#26828e",
    6: "#31688e",
    8: "#3e4989",
    12: "#482878",
    16: "#440154",
    32: "#1a0020",
}


def limit_mark(place: int) -> dict[str, Any]:
    """How matplotlib marks a limit: those of other limits at the same point are seen, too, since
    each has its own shape and is smaller than the one before.

    place: among the limits, from 0.
    """
    return {
        "marker": LIMIT_MARKERS[place % len(LIMIT_MARKERS)],
        "ms": max(14 - 4 * place, 4),
        "mew": 2,
        "mfc": "none",
        "color": LIMITS[place % len(LIMITS)],
    }


def limit_line(place: int) -> dict[str, Any]:
    """How matplotlib draws a limit's line: with dashes where those of other limits have gaps.

    place: as `limit_mark` takes it.
    """
    place %= len(LIMITS)
    dash = 4
    return {
        "color": LIMITS[place],
        "lw": 1,
        "ls": (dash * place, (dash, dash * (len(LIMITS) - 1))),
    }


def of_width(bits: float) -> str:
    """The colour of a width on a grid, each width its own; what stays in float has `FLOAT`.

    bits: of a code.

    >>> of_width(4) == WIDTHS[4], of_width(0.2) == WIDTHS[1], of_width(7)
    (True, True, '#38578b')
    """
    widths, colours = list(WIDTHS), list(WIDTHS.values())
    above = bisect_left(widths, bits)
    if above in (0, len(widths)):
        return colours[min(above, len(widths) - 1)]
    low, high = widths[above - 1], widths[above]
    part = math.log(bits / low) / math.log(high / low)
    ends = zip(_parts(colours[above - 1]), _parts(colours[above]), strict=True)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in ends)


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour (WCAG 2.2's contrast).

    colour: ``#rrggbb``.

    >>> ink_on("#fde725"), ink_on("#440154")
    ('#000000', '#ffffff')
    """
    light = luminance(colour)
    return "#000000" if (light + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of a colour, from 0 to 1 (WCAG 2.2).

    colour: ``#rrggbb``.
    """
    return sum(
        weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True)
    )


def linear(colour: str) -> list[float]:
    """The parts red, green and blue of a colour in linear sRGB, each from 0 to 1.

    colour: ``#rrggbb``.
    """
    parts = [part / 255 for part in _parts(colour)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def _parts(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
