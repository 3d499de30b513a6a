"""A picture of the rooms, from the import contract in pyproject.toml and the real imports.

    python -m benchmarks.architecture

A floor is a layer of the contract. An arrow says that the upper room imports the lower one; those
that follow from others are left out. Writes docs/architecture.png.
"""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import grimp
import matplotlib.pyplot as plt

from benchmarks.grids import ROOT

PICTURE = ROOT / "docs/architecture.png"
TOP = "stages"
# where a room stands on its floor, and what it is for
PLACES: dict[str, tuple[float, str]] = {
    "stages": (3.5, "files in,\nfiles out"),
    "workflow": (5.8, "the verbs\nof the pipeline"),
    "deployment": (3.35, "files, and other\nruntimes"),
    "search": (1.8, "find_strategy"),
    "mixed_precision": (1.8, "which tensor\ngets which bits"),
    "learning": (1.85, "codes and\nscales trained"),
    "quantize": (1.25, "a network by\na strategy"),
    "runtime": (4.05, "how passes\nare run"),
    "costs": (-0.4, "plug-ins: bytes,\nenergy, …"),
    "strategy": (1.25, "a choice for\neach tensor"),
    "network": (1.25, "what walks\nan nn.Module"),
    "metrics": (2.85, "losses, errors\nof outputs"),
    "storage": (4.45, "packed files,\nfingerprints"),
    "schemes": (6.05, "plug-ins:\ngrids"),
    "certification": (7.65, "statistics,\nno torch"),
    "tensor": (1.95, "one tensor: grid,\nscale, codes"),
    "data": (-0.4, "plug-ins:\nloaders"),
    "models": (1.2, "plug-ins:\nnetworks"),
    "utils": (2.85, "devices, loaders,\nconsole, …"),
}
PLUGINS = ("costs", "schemes", "data", "models")
WIDTH, HEIGHT = 1.5, 0.74
# an arrow as flat as this ends at a box's side
FLAT = 1.38
COLOURS = {"room": "#dbe9f6", "plug-ins": "#fdebd0"}


def floors() -> list[list[str]]:
    """The rooms of each layer, from the top."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == ["quantifind"])
    return [[TOP], *(re.split(r"\s*[|:]\s*", layer) for layer in layers)]


def arrows() -> dict[str, set[str]]:
    """By room, those that a module of it imports."""
    graph = grimp.build_graph("quantifind", TOP, exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            upper, lower = room_of(module), room_of(imported)
            if upper != lower:
                found.setdefault(upper, set()).add(lower)
    return found


def room_of(module: str) -> str:
    return TOP if module.split(".")[0] == TOP else module.split(".")[1]


def reduced(given: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from others."""

    def below(rooms: Iterable[str]) -> set[str]:
        return set().union(*({room} | below(given.get(room, ())) for room in rooms))

    return {
        upper: {room for room in lower if not any(room in below(given.get(o, ())) for o in lower)}
        for upper, lower in given.items()
    }


def ends(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Where the arrow between two boxes ends and begins, of their middles."""
    across, down = end[0] - start[0], start[1] - end[1] - HEIGHT
    aside = max(-0.4, min(0.4, 0.25 * across)) * WIDTH
    begin = (start[0] + aside, start[1] - HEIGHT / 2)
    if abs(across) > max(WIDTH, FLAT * down):
        return [(end[0] - math.copysign(WIDTH / 2, across), end[1]), begin]
    return [(end[0] - aside, end[1] + HEIGHT / 2), begin]


def draw() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(13, 12))
    rooms = floors()
    middles = {n: (PLACES[n][0], -1.0 * floor) for floor, names in enumerate(rooms) for n in names}
    style = {"arrowstyle": "-|>", "color": "#5b6b7a", "linewidth": 1.6, "mutation_scale": 18}
    for upper, lower in sorted(reduced(arrows()).items()):
        for room in sorted(lower):
            both = ends(middles[upper], middles[room])
            axes.annotate("", *both, arrowprops=style | {"shrinkA": 0, "shrinkB": 0}, zorder=1)
    middle: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3}
    for room, (x, y) in middles.items():
        colour = COLOURS["plug-ins" if room in PLUGINS else "room"]
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        box = plt.Rectangle(corner, WIDTH, HEIGHT, facecolor=colour, edgecolor="#34495e", zorder=2)
        axes.add_patch(box)
        axes.text(x, y + 0.21, room, fontsize=12.5, fontweight="bold", **middle)
        axes.text(x, y - 0.12, PLACES[room][1], fontsize=11.5, linespacing=1.05, **middle)
    axes.set_title("The rooms of quantifind/: an arrow is an import, and goes down", fontsize=18)
    axes.set_xlim(-1.2, 8.5)
    axes.set_ylim(-len(rooms) + 0.5, 0.5)
    axes.axis("off")
    figure.savefig(PICTURE, dpi=100, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw()
