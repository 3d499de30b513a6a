"""The answer of a search for people: lines for a terminal, and HTML for a notebook."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from quantifind.certification.digits import amount, bound, limit
from quantifind.certification.measures import MEASURES
from quantifind.utils.naming import printable, short
from quantifind.utils.palette import FOUND, LIMITS, UNIFORM, ink_on, of_width

if TYPE_CHECKING:
    from quantifind.mixed_precision.found import Found

# tensors that are listed, and characters of the longest bar
LISTED, BAR = 24, 24
# of the chart, in pixels: its size, and what is left free on the left, at the top and below
WIDTH, HEIGHT, LEFT, TOP, BELOW = 640, 260, 64, 18, 40
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)


class Share(NamedTuple):
    """A tensor of the chosen strategy.

    bits: of a code.
    part: of all values that are on a grid, from 0 to 1.
    """

    name: str
    bits: float
    part: float


def sentence(found: "Found") -> str:
    """The answer in one sentence; what it says is of validation data, which chose it."""
    row, goal = found.chosen, found.goal
    times = f"{32 / row['mean_bits']:.3g} times smaller than float32"
    text = f"{row['mean_bits']:.4g} bits per parameter, {row['model_bytes']:,.0f} bytes, {times}"
    lost = [
        f"{MEASURES[name].words} {amount(name, row[name])}, at most "
        + bound(name, row[f"{name}_bound"])
        + (f" (limit {limit(name, goal.limits[name])})" if goal.limits else "")
        for name in goal.limits or [goal.measure]
    ]
    sure = f"with {100 * found.confidence:.4g}% confidence"
    examples = f"on {row['examples']:,.0f} validation examples"
    return f"{text}: {'; '.join(lost)}, {sure} {examples}."


def shares(found: "Found") -> list[Share]:
    """The tensors that are on a grid, in the network's order."""
    tensors = found.quantized.tensors
    total = max(sum(tensor.codes.numel() for tensor in tensors.values()), 1)
    return [
        Share(name, float(tensor.bits), tensor.codes.numel() / total)
        for name in found.strategy.tensors
        if (tensor := tensors.get(name)) is not None
    ]


def in_lines(found: "Found") -> str:
    """For a terminal: the sentence, a bar for each tensor, and what the search has cost."""
    every = shares(found)
    names = [short(one.name) for one in every[:LISTED]]
    wide = max(map(len, names), default=0)
    most = max((one.bits for one in every), default=1)
    lines = [
        f"  {name:<{wide}}  {_width(one.bits):>9}  {'█' * max(round(BAR * one.bits / most), 1)}"
        f"  {one.part:.2%} of the values"
        for name, one in zip(names, every, strict=False)
    ]
    if len(every) > LISTED:
        lines.append(f"  … and {len(every) - LISTED:,} more tensors")
    if floats := _in_float(found):
        lines.append(f"  {floats}")
    tables = (
        f"{len(found.candidates):,} candidates, {len(found.ladder):,} of them to judge on test data"
    )
    return "\n".join([sentence(found), *lines, f"{tables}; {found.passes}"])


def in_html(found: "Found") -> str:
    """For a notebook: the sentence, the candidates over bits, and a strip of bits per tensor."""
    return (
        '<div style="max-width: 44rem; font-family: system-ui, sans-serif; line-height: 1.4">'
        f'<p style="font-size: 1.1em; margin: 0 0 0.6em">{escape(sentence(found))}</p>'
        f"{_chart(found)}{_strip(shares(found), _in_float(found))}"
        '<p style="opacity: 0.75; font-size: 0.85em; margin: 0.5em 0 0">'
        "Chosen on validation data, not yet certified: "
        "<code>certify(net, found, test_loader)</code>. "
        f"It has taken {escape(str(found.passes))}.</p></div>"
    )


def _width(bits: float) -> str:
    return f"{bits:.3g} {'bit' if bits == 1 else 'bits'}"


def _in_float(found: "Found") -> str:
    """How many tensors stay in float, in words; nothing where none does."""
    count = sum(choice is None for choice in found.strategy.tensors.values())
    return f"{_tensors(count)} in float, not shown" if count else ""


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count:,} tensors"


def _strip(every: Sequence[Share], floats: str) -> str:
    """Tensors as wide as they are large, from the network's input to its output."""
    if not every:
        return "<p>No tensor is on a grid.</p>"
    parts = []
    for one in every:
        colour = of_width(one.bits)
        words = f"{printable(one.name)}: {_width(one.bits)}, {one.part:.2%}"
        text = f"{one.bits:.3g}" if one.part > 0.03 else ""
        # neighbours of the same width are told apart, where there is room for a line
        apart = "box-shadow: inset -1px 0 Canvas; " if one.part > 0.01 else ""
        parts.append(
            f'<div title="{escape(words)} of the values" style="flex: {one.part:.6f} 1 0; '
            f"{apart}min-width: 1px; overflow: hidden; text-align: center; background: {colour}; "
            f'color: {ink_on(colour)}; padding: 0.5em 0">{text}</div>'
        )
    which = "1 tensor on a grid" if len(every) == 1 else f"each of {len(every)} tensors on a grid"
    said = f"Bits of {which}, as wide as it is large, from input to output"
    said += f"; {floats}" if floats else ""
    return (
        f'<div role="img" aria-label="{said}" style="display: flex; border-radius: 4px; '
        f'overflow: hidden; margin-top: 0.4em">{"".join(parts)}</div>'
        f'<p style="opacity: 0.75; font-size: 0.85em; margin: 0.2em 0 0">{said}.</p>'
    )


def _chart(found: "Found") -> str:
    """The candidates over bits as SVG, in the colours of the page, which may be dark."""
    table, measure = found.candidates, found.goal.measure
    table = table[table["examples"] == table["examples"].max()]
    rows: list[Any] = [r for r in table.to_dict("records") if math.isfinite(r[measure])]
    lossless, most = MEASURES[measure].lossless, found.goal.limit
    ends = [row["mean_bits"] for row in rows]
    left, right = 0.9 * min(ends), 1.1 * max(ends)
    inside = sorted(row[measure] for row in rows)[: max(1, round(0.8 * len(rows)))]
    top = max(inside[-1], lossless) if most is None else most
    low = min(inside[0], lossless)
    reach = max(top - low, 1e-9)
    low, top = low - 0.15 * reach, top + 0.5 * reach

    def x(bits: float) -> float:
        span = math.log(right / left)
        return LEFT + (WIDTH - LEFT - 10) * math.log(bits / left) / span

    def y(lost: float) -> float:
        part = (min(max(lost, low), top) - low) / (top - low)
        return HEIGHT - BELOW - (HEIGHT - TOP - BELOW) * part

    def text(across: float, down: float, words: str, more: str = "") -> str:
        place = f'x="{across:.1f}" y="{down:.1f}"'
        return f'<text {place} font-size="12" fill="currentColor" {more}>{escape(words)}</text>'

    marks = [
        f'<path d="M{x(tick):.1f} {TOP}V{HEIGHT - BELOW}" stroke="currentColor" opacity="0.15"/>'
        + text(x(tick), HEIGHT - BELOW + 16, f"{tick:g}", 'text-anchor="middle"')
        for tick in TICKS
        if left <= tick <= right
    ]
    levels = [(lossless, "float", "currentColor", ' stroke-dasharray="5 4"')]
    said = "" if most is None else f"limit {limit(measure, most)}"
    levels += [] if most is None else [(most, said, LIMITS[0], "")]
    # two lines that nearly meet have their words on two sides
    near = most is not None and y(lossless) - y(most) < 16
    for level, words, colour, dash in levels:
        below = 12 if near and level == lossless else 0
        marks.append(f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - 10}" stroke="{colour}"{dash}/>')
        marks.append(text(WIDTH - 12, y(level) - 4 + 1.4 * below, words, 'text-anchor="end"'))
        value = amount(measure, level).removesuffix(MEASURES[measure].hundredths)
        place = y(level) + 4 + below * 0.7 - (6 if near and not below else 0)
        marks.append(text(LEFT - 6, place, value, 'text-anchor="end"'))
    steps = sorted((r for r in rows if r["on_ladder"]), key=lambda row: -row["mean_bits"])
    line = "L".join(f"{x(r['mean_bits']):.1f} {y(r[measure]):.1f}" for r in steps)
    marks.append(f'<path d="M{line}" fill="none" stroke="currentColor"/>' if steps else "")
    marks += [_mark(row, measure, x(row["mean_bits"]), y(row[measure])) for row in rows]
    marks.append(text((LEFT + WIDTH) / 2, HEIGHT - 6, "mean bits", 'text-anchor="middle"'))
    shown = MEASURES[measure]
    unit = f" {shown.unit}" if shown.hundredths else ""
    marks.append(text(0, TOP - 6, f"{shown.words}{unit} on validation data"))
    marks.append(
        f'<text x="{WIDTH - 10}" y="{TOP - 6}" font-size="12" fill="currentColor" '
        f'text-anchor="end"><tspan fill="{UNIFORM}">■</tspan> same bits for all  ● to judge  '
        f'○ others  <tspan fill="{LIMITS[0]}">◆</tspan> chosen</text>'
    )
    label = f"{len(rows)} candidates: {MEASURES[measure].words} against mean bits"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="width: 100%; height: auto">{"".join(marks)}</svg>'
    )


def _mark(row: Any, measure: str, across: float, down: float) -> str:
    """A candidate, with its words where the pointer is; beyond the chart it stands at its edge."""
    words = f"{row['origin']}: {row['mean_bits']:.4g} bits, {amount(measure, row[measure])}"
    place = f'transform="translate({across:.1f} {down:.1f})"'
    tag = "path"
    if row["chosen"]:
        look = f'd="M0-8L8 0 0 8-8 0z" fill="{LIMITS[0]}" stroke="{FOUND}"'
    elif row["origin"] == "uniform":
        look = f'd="M-4-4h8v8h-8z" fill="{UNIFORM}"'
    else:
        fill = "currentColor" if row["on_ladder"] else "none"
        tag, look = "circle", f'r="4" fill="{fill}" stroke="currentColor"'
    return f"<{tag} {look} {place}><title>{escape(words)}</title></{tag}>"
