"""Plot: pictures and the report, from tables and facts alone."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from quantifind.certification.measures import MEASURES
from quantifind.utils import plugins
from quantifind.utils.palette import STYLE
from quantifind.workflow.visualization_workflow import (
    visualize_bit_depth_results,
    visualize_history,
    visualize_weight_error,
)
from stages import files
from stages.evidence import read_evidence
from stages.figures import (
    visualize_costs,
    visualize_frontier,
    visualize_prediction,
)
from stages.figures_alone import visualize_sensitivity
from stages.params import Params
from stages.report import report


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    evidence = read_evidence()
    name, limits, tables = params.model, params.evaluate.limits, evidence.tables
    # of those that were certified, the first
    measure, limit = evidence.measure, evidence.limits[evidence.measure]
    results = tables["bit_depths"]
    figures = visualize_bit_depth_results(results, name=name, limits=limits)
    figures["history"] = visualize_history(tables["history"], name=name)
    figures["weight_sqnr"] = visualize_weight_error(tables["weight_error"], name=name)
    figures["frontier"] = visualize_frontier(
        tables["frontier"],
        results,
        name=name,
        measure=measure,
        limit=limit,
        asked=evidence.limits,
        random=tables["random"],
    )
    figures["sensitivity"] = visualize_sensitivity(
        tables["sensitivity"], name=name, limits=limits, tensors=evidence.tensors
    )
    figures["prediction"] = visualize_prediction(tables["candidates"], name=name)
    figures["costs"] = visualize_costs(
        tables["candidates"],
        plugins.names("costs"),
        name=name,
        measure=measure,
        reach=max(10 * (limit - MEASURES[measure].lossless), 0.01),
    )
    for picture, figure in figures.items():
        files.write_figure(files.PLOTS / f"{picture}.png", figure)
        write_svg(files.PLOTS / f"{picture}.svg", figure)
    files.write_text(files.PLOTS / "report.html", report(evidence, params))


def write_svg(path: Path, figure: Figure) -> None:
    """Write a figure as an SVG, the same one each time: test_pictures_are_the_same_each_time

    path: as for `stages.files.write`.
    figure: what to draw.
    """
    how: Any = {"format": "svg", "metadata": {"Date": None, "Creator": None}}
    with plt.rc_context(STYLE):
        files.write(path, lambda partial: figure.savefig(partial, **how))


if __name__ == "__main__":
    files.run(main)
