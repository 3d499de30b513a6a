"""Plot: pictures from the tables alone."""

from quantifind.params import Params
from quantifind.workflow.visualization_workflow import (
    visualize_bit_depth_results,
    visualize_history,
    visualize_weight_error,
)
from stages import files


def main(params: Params) -> None:
    results = files.read_table(files.PLOTS / "bit_depths.csv")
    history = files.read_table(files.PLOTS / "history.csv")
    weight_error = files.read_table(files.PLOTS / "weight_error.csv")
    name, limits = params.model, params.evaluate.limits
    figures = visualize_bit_depth_results(results, name=name, limits=limits)
    figures["history"] = visualize_history(history, name=name)
    figures["weight_sqnr"] = visualize_weight_error(weight_error, name=name)
    for picture, figure in figures.items():
        files.write_figure(files.PLOTS / f"{picture}.png", figure)


if __name__ == "__main__":
    files.run(main)
