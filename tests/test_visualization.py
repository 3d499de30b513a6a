"""The pictures show what their tables say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from quantifind.workflow.evaluation_workflow import evaluate_bit_depths
from quantifind.workflow.visualization_workflow import (
    visualize_bit_depth_results,
    visualize_history,
    visualize_weight_error,
)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_curves_are_the_table_and_the_certified_depth_is_marked(classifier):
    net, criterion, (_, _, test) = classifier
    results = evaluate_bit_depths(net, test, criterion)
    figures = visualize_bit_depth_results(results, name="toy", limits=(1.001, 1.5))
    for name, figure in figures.items():
        axes = figure.axes[0]
        curve = next(line for line in axes.lines if line.get_label() == "quantized")
        assert curve.get_xdata().tolist() == list(range(2, 33))
        assert curve.get_ydata().tolist() == results[name].tolist()[::-1]
        assert axes.get_yscale() == "log"
        assert "bit depth" in figure.axes[-1].get_xlabel()
        assert axes.get_ylabel()
        assert figure.get_suptitle().endswith(": toy")
        assert sum("certified CR" in label for label in legend(figure)) == 2
    assert any("float: " in label for label in legend(figures["criterion"]))


def test_a_limit_has_one_colour_whether_others_are_certified_or_not():
    table = pd.DataFrame({"bit_depth": [8, 4], "criterion_ratio_bound": [1.02, 2.0]})
    for column in ("criterion", "original_criterion", "signal_to_complexity"):
        table[column] = 1.0
    for column in ("criterion_ratio", "criterion_ratio_low", "criterion_ratio_high"):
        table[column] = 1.0
    limits = (1.01, 1.05, 1.1, 1.2, 1.3, 1.4)
    near = visualize_bit_depth_results(table, limits=limits)["criterion_ratio"].axes[1]
    rings = [line for line in near.lines if "certified" in str(line.get_label())]
    levels = [line for line in near.lines if line.get_ydata()[0] in limits]
    assert len(levels) == len(limits)
    assert [ring.get_color() for ring in rings] == [line.get_color() for line in levels[1:]]


def test_nothing_certified_marks_nothing():
    table = pd.DataFrame({"bit_depth": [8, 4], "criterion_ratio_bound": [np.inf, np.inf]})
    for column in ("criterion", "original_criterion", "signal_to_complexity"):
        table[column] = 1.0
    for column in ("criterion_ratio", "criterion_ratio_low", "criterion_ratio_high"):
        table[column] = 2.0
    for figure in visualize_bit_depth_results(table).values():
        assert not any("certified CR" in label for label in legend(figure))


@pytest.mark.parametrize("classifier", [True, False])
def test_history(classifier):
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_loss": [0.9, 0.6]})
    if classifier:
        history["val_accuracy"] = [0.5, 0.7]
    figure = visualize_history(history, name="toy")
    assert len(figure.axes) == 1 + classifier
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0.9, 0.6]


def test_weight_error_has_a_row_per_tensor_and_leaves_out_the_infinite():
    errors = pd.DataFrame(
        {
            "tensor": ["a.weight", "a.bias"] * 2,
            "bit_depth": [2, 2, 8, 8],
            "sqnr_db": [5.0, 6.0, 40.0, np.inf],
        }
    )
    figure = visualize_weight_error(errors)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a.weight", "a.bias"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[5.0, 6.0], [40.0]]
    assert legend(figure) == ["2 bits", "8 bits"]


def test_weight_error_shows_other_depths_where_the_usual_ones_are_not_there():
    errors = pd.DataFrame({"tensor": ["w"] * 2, "bit_depth": [5, 16], "sqnr_db": [20.0, 80.0]})
    assert legend(visualize_weight_error(errors)) == ["5 bits", "16 bits"]
