"""Plot: pictures from the tables alone."""

from quantifind.utils import plugins
from quantifind.workflow.visualization_workflow import (
    visualize_bit_depth_results,
    visualize_history,
    visualize_weight_error,
)
from stages import files
from stages.figures import (
    visualize_costs,
    visualize_frontier,
    visualize_prediction,
    visualize_sensitivity,
)
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    tables = ("bit_depths", "history", "weight_error", "frontier", "candidates", "sensitivity")
    results, history, weight_error, frontier, candidates, sensitivity = (
        files.read_table(files.PLOTS / f"{table}.csv") for table in tables
    )
    name, limits = params.model, params.evaluate.limits
    asked = files.read_json(files.METRICS / "recommendation.json")["limit"]
    measure, limit = next(iter(asked.items()))
    figures = visualize_bit_depth_results(results, name=name, limits=limits)
    figures["history"] = visualize_history(history, name=name)
    figures["weight_sqnr"] = visualize_weight_error(weight_error, name=name)
    figures["frontier"] = visualize_frontier(
        frontier, results, name=name, measure=measure, limit=limit, asked=asked, limits=limits
    )
    figures["sensitivity"] = visualize_sensitivity(sensitivity, name=name, limits=limits)
    figures["prediction"] = visualize_prediction(candidates, name=name)
    figures["costs"] = visualize_costs(candidates, plugins.names("costs"), name=name)
    for picture, figure in figures.items():
        files.write_figure(files.PLOTS / f"{picture}.png", figure)


if __name__ == "__main__":
    files.run(main)
