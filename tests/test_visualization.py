"""The pictures show what their tables say."""

from itertools import combinations, pairwise

import hypothesis.strategies as st
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from matplotlib.text import Annotation, Text

from quantifind.certification import digits
from quantifind.certification.certificate import minimum_safe_bits
from quantifind.certification.measures import MEASURES
from quantifind.utils import palette, plugins
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths
from quantifind.workflow.visualization_workflow import (
    visualize_bit_depth_results,
    visualize_history,
    visualize_weight_error,
)
from stages import plot
from stages.figures import (
    frontier,
    visualize_costs,
    visualize_frontier,
    visualize_prediction,
)
from stages.figures_alone import visualize_sensitivity
from stages.report_tensors import heat


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def said(figure):
    return [text.get_text() for text in figure.findobj(Text)]


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
        assert sum("certified CR" in label for label in said(figure)) == 2
    assert any("float\n" in label for label in said(figures["criterion"]))


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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_limits_that_certify_the_same_are_both_seen(count):
    """Each colour has pixels of its own near the depth, in the mark and in the line."""
    table = pd.DataFrame({"bit_depth": [8, 4, 2], "criterion_ratio_bound": [1.0, 1.0, 2.0]})
    for column in ("criterion", "original_criterion", "signal_to_complexity", "criterion_ratio"):
        table[column] = 1.0
    table = table.assign(criterion_ratio_low=0.99, criterion_ratio_high=1.01)
    limits = [1.01 + 0.01 * place for place in range(count)]
    for figure in visualize_bit_depth_results(table, limits=limits).values():
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
        axes = figure.axes[0]
        x, y = axes.transData.transform((4, 1.0))
        across, down = int(x), pixels.shape[0] - int(y)
        at_mark = pixels[down - 14 : down + 14, across - 14 : across + 14]
        bottom, top = (pixels.shape[0] - int(end) for end in (axes.bbox.y0, axes.bbox.y1))
        line = pixels[top:bottom, across - 1 : across + 2]
        for colour in palette.LIMITS[:count]:
            rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
            for part in (at_mark, line):
                assert (np.abs(part - rgb).sum(axis=-1) < 60).sum() >= 8, colour


def test_nothing_certified_marks_nothing():
    table = pd.DataFrame({"bit_depth": [8, 4], "criterion_ratio_bound": [np.inf, np.inf]})
    for column in ("criterion", "original_criterion", "signal_to_complexity"):
        table[column] = 1.0
    for column in ("criterion_ratio", "criterion_ratio_low", "criterion_ratio_high"):
        table[column] = 2.0
    for figure in visualize_bit_depth_results(table).values():
        assert not any("certified CR" in label for label in said(figure))


def boxes(figure):
    """Where the words of a picture are, in pixels, but those of ticks."""
    figure.canvas.draw()
    words = [*figure.findobj(Annotation), figure._suptitle, *(a.yaxis.label for a in figure.axes)]
    found = [Text.get_window_extent(text) for text in words if text.get_text()]
    return [*found, *(one.get_window_extent() for one in figure.legends)]


VALUES = st.floats(1e-3, 1e3) | st.sampled_from([0.0, -1.0, np.nan, np.inf])


@settings(max_examples=10)
@given(
    limits=st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
    depths=st.lists(st.integers(2, 32), min_size=2, max_size=5, unique=True),
    ends=st.tuples(VALUES, VALUES),
    baseline=st.floats(1e-3, 1e3) | st.just(0.0),
    marked=st.lists(st.floats(0.1, 32), min_size=3, max_size=3, unique=True),
    measure=st.sampled_from(list(MEASURES)),
)
def test_what_a_picture_says_is_apart(limits, depths, ends, baseline, marked, measure):
    """No words lie on others, or are cut by an edge, whatever is marked or can't be drawn."""
    limits = [1 + limit / 1000 for limit in sorted(limits)]
    bounds = [limits[place % len(limits)] - 1e-6 for place in range(len(depths))]
    table = pd.DataFrame({"bit_depth": sorted(depths), "criterion_ratio_bound": sorted(bounds)})
    for column in ("criterion", "signal_to_complexity", "criterion_ratio"):
        table[column] = np.linspace(2, 1, len(table))
    table = table.assign(
        criterion_ratio_low=0.99, criterion_ratio_high=2.01, original_criterion=baseline
    )
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1, ends[0]], "val_loss": [1, ends[1]]})
    first, *others = sorted(marked, reverse=True)
    lossless = MEASURES[measure].lossless
    steps = lossless + np.array([0.001, 0.004])
    ladder = judged([first, others[0]], steps, steps + np.array([0.001, 0.1]), measure)
    widths = judged([others[1]], [lossless + 0.002], [lossless + 0.003], measure)
    name = "a_network_of_some_name"
    random = pd.DataFrame({"mean_bits": [4.0], measure: [lossless + 0.1]})
    how = {"measure": measure, "limit": lossless + 0.01, "random": random}
    for figure in (
        *visualize_bit_depth_results(table, limits=limits, name=name).values(),
        visualize_history(history, name=name),
        visualize_history(history.assign(val_accuracy=[0.5, 0.7]), name=name),
        visualize_frontier(
            ladder.assign(validation_chosen=[False, True]), widths, name=name, **how
        ),
    ):
        found = boxes(figure)
        assert found
        for one, other in combinations(found, 2):
            assert not one.overlaps(other)
        assert all(figure.bbox.containsx(x) for box in found for x in (box.x0, box.x1))
        assert all(figure.bbox.containsy(y) for box in found for y in (box.y0, box.y1))
        plt.close(figure)


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
    assert [text for text in said(figure) if text.endswith(" bits")] == ["2 bits", "8 bits"]


def test_a_width_has_one_colour_in_pictures_and_pages():
    errors = pd.DataFrame({"tensor": ["w"] * 3, "bit_depth": [2, 4, 8], "sqnr_db": [9.0, 20, 40]})
    colours = [line.get_color() for line in visualize_weight_error(errors).axes[0].lines]
    assert colours == [palette.of_width(bits) for bits in (2, 4, 8)]


def test_weight_error_shows_other_depths_where_the_usual_ones_are_not_there():
    errors = pd.DataFrame({"tensor": ["w"] * 2, "bit_depth": [5, 16], "sqnr_db": [20.0, 80.0]})
    texts = said(visualize_weight_error(errors))
    assert [text for text in texts if text.endswith(" bits")] == ["5 bits", "16 bits"]


def judged(bits, values, bounds, measure="criterion_ratio"):
    """Rows of judged strategies, with intervals of 0.002 to each side."""
    values = np.array(values, dtype=float)
    columns = {"mean_bits": bits, measure: values, f"{measure}_bound": bounds}
    ends = {f"{measure}_low": values - 0.002, f"{measure}_high": values + 0.002}
    return pd.DataFrame(columns | ends)


UNIFORM = judged([8.0, 6.0, 4.0], [1.0, 1.005, 2.0], [1.001, 1.008, 2.1])


def drawn(axes, start):
    """The line whose label starts so, or None."""
    lines = (line for line in axes.lines if str(line.get_label()).startswith(start))
    return next(lines, None)


def series(axes, label):
    """Bits and values of what was drawn with intervals."""
    found = next(c for c in axes.containers if c.get_label() == label)
    return [found.lines[0].get_xdata().tolist(), found.lines[0].get_ydata().tolist()]


@pytest.mark.parametrize("measure", MEASURES)
def test_frontier_marks_what_is_certified_at_any_measure(measure):
    lossless, scale = MEASURES[measure].lossless, MEASURES[measure].scale
    tables = [
        judged(bits, lossless + np.array(lost), lossless + np.array(lost) + 0.001, measure)
        for bits, lost in (([9.0, 5.5, 3.0], [0.001, 0.004, 0.5]), ([8.0, 4.0], [0.002, 0.3]))
    ]
    limit = lossless + 0.01
    figure = visualize_frontier(*tables, name="toy", measure=measure, limit=limit)
    for axes in figure.axes:
        for table, label in zip(tables, ("ladder of the search", "uniform depths"), strict=True):
            values = (scale * table[measure]).tolist()
            assert series(axes, label) == [table["mean_bits"].tolist(), values]
        line = drawn(axes, f"limit {digits.limit(measure, limit)}").get_ydata()
        assert line == [scale * limit, scale * limit]
        assert drawn(axes, "float").get_ydata() == [scale * lossless, scale * lossless]
        assert drawn(axes, "certified strategy: 5.5 bits").get_xdata().tolist() == [5.5]
        assert drawn(axes, "certified uniform depth: 8 bits").get_xdata().tolist() == [8.0]
    whole, near = figure.axes
    assert whole.get_yscale() == ("linear" if measure == "accuracy_drop" else "log")
    assert near.get_xscale() == "log"
    assert near.get_xlabel() == "mean bits per parameter"
    label = whole.get_ylabel().replace("\n", " ")
    assert label == f"{MEASURES[measure].words} {MEASURES[measure].unit}"
    assert near.get_ylim()[1] == pytest.approx(scale * (lossless + 0.02))
    assert figure.get_suptitle() == f"Bits and {MEASURES[measure].words}: toy"


def test_frontier_near_the_limit_holds_what_is_certified():
    ladder = judged([9.0, 2.0], [1.0, 0.8], [1.0, 0.9]).assign(criterion_ratio_low=[0.99, 0.7])
    low, high = visualize_frontier(ladder, UNIFORM).axes[1].get_ylim()
    assert low < 0.7
    assert high == pytest.approx(1.02)


def test_frontier_near_the_limit_holds_what_was_chosen():
    """And the random widths."""
    ladder = judged([9.0, 2.0], [1.03, 1.04], [1.04, 1.05]).assign(validation_chosen=[False, True])
    random = pd.DataFrame({"mean_bits": [9.0], "criterion_ratio": [0.9]})
    low, high = visualize_frontier(ladder, UNIFORM, random=random).axes[1].get_ylim()
    assert low < 0.9
    assert high > 1.04


def test_frontier_of_one_row_and_nothing_certified_shows_what_was_chosen():
    ladder = judged([2.5], [3.0], [np.nan]).assign(validation_chosen=True)
    for end in ("low", "high"):
        ladder[f"criterion_ratio_{end}"] = [{"low": -np.inf, "high": np.inf}[end]]
    figure = visualize_frontier(ladder, UNIFORM.iloc[2:])
    assert not any("certified" in label for label in said(figure))
    chosen = drawn(figure.axes[0], "chosen on validation data: 2.5 bits")
    assert chosen.get_xdata().tolist() == [2.5]
    assert figure.axes[1].get_xlim()[0] < 2.5
    figure.canvas.draw()


def test_frontier_shows_the_chosen_one_only_where_another_is_certified():
    ladder = judged([9.0, 5.0, 3.0], [1.0, 1.0, 1.5], [1.001, 1.001, 1.6])
    for chosen, marked in (([False, True, False], False), ([False, False, True], True)):
        figure = visualize_frontier(ladder.assign(validation_chosen=chosen), UNIFORM)
        assert any("chosen" in label for label in said(figure)) == marked


def test_what_is_far_from_the_limit_does_not_hide_it():
    ladder = judged([9.0, 2.0], [1.0, 1e6], [1.0, 1e6]).assign(validation_chosen=[False, True])
    assert visualize_frontier(ladder, UNIFORM).axes[1].get_ylim()[1] < 2


@pytest.mark.parametrize(("measure", "limit"), [("criterion_ratio", 1.05), ("accuracy_drop", 0.1)])
def test_the_limit_has_one_colour(measure, limit):
    """That of the report, whichever it is."""
    first = MEASURES[measure].lossless
    ladder = judged([8.0, 4.0], [first, first], [first, first], measure)
    axes = visualize_frontier(ladder, ladder, measure=measure, limit=limit).axes[0]
    for label in ("limit", "certified strategy", "certified uniform depth"):
        assert drawn(axes, label).get_color() == palette.LIMITS[0]


def alone(*, tensors=2, sites=0, original=0.5):
    """A table of sensitivities: weights also by GPTQ at 2 and 4 bits, biases not."""
    rows = []
    names = [f"{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(tensors)]
    names += [str(i) for i in range(sites)]
    for place, name in enumerate(names):
        for rounding, widths in (("nearest", (2, 4, 8)), ("gptq", (2, 4))):
            if rounding == "nearest" or name.endswith("weight"):
                for bits in widths:
                    increase = original * 4.0**-bits / (1 if rounding == "nearest" else 4)
                    rows.append(
                        {
                            "kind": "tensors" if place < tensors else "activations",
                            "name": name,
                            "rounding": rounding,
                            "bits": float(bits),
                            "loss_increase": increase,
                            "increase_error": 0.0,
                            "original_criterion": original,
                        }
                    )
    return pd.DataFrame(rows)


def rings(axes):
    """Where rings are, by colour."""
    return {(*line.get_xdata(), *line.get_ydata()): line.get_color() for line in axes.lines}


def test_sensitivity_has_a_row_per_tensor_and_a_ring_at_the_minimum_safe_bits():
    table = alone(sites=1)
    limits = (1.01, 1.05)
    found = {limit: minimum_safe_bits(table, limit) for limit in limits}
    assert found[1.01] == {"0.weight": 4.0, "0.bias": 4.0, "input of 0": 4.0}
    assert found[1.05] == {"0.weight": 2.0, "0.bias": 4.0, "input of 0": 4.0}
    figure = visualize_sensitivity(table, limits=limits, name="toy")
    nearest, gptq = figure.axes[:2]
    assert [axes.get_title() for axes in (nearest, gptq)] == ["round to nearest", "GPTQ"]
    assert [text.get_text() for text in nearest.get_yticklabels()] == list(found[1.01])
    assert [text.get_text() for text in nearest.get_xticklabels()] == ["2", "4", "8"]
    assert [text.get_text() for text in gptq.get_xticklabels()] == ["2", "4"]
    assert nearest.images[0].get_array()[0].tolist() == [4.0**-2, 4.0**-4, 4.0**-8]
    assert gptq.images[0].get_array().mask.tolist() == [[False] * 2, [True] * 2, [True] * 2]
    # of the weight where its loss increases least, by GPTQ; by place: 2 bits is 0, 4 bits is 1
    assert rings(gptq) == {(1, 0): palette.LIMITS[0], (0, 0): palette.LIMITS[1]}
    assert set(rings(nearest)) == {(1, 1), (1, 2)}
    assert nearest.get_xlabel() == "bits"
    assert figure.axes[2].get_ylabel() == "loss increase / float loss"
    assert figure.get_suptitle().endswith(": toy")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        *(f"safe by 2 standard errors, predicted, for CR ≤ {x}" for x in limits),
        "not tried",
    ]


def test_sensitivity_of_one_tensor_of_which_no_width_is_safe():
    table = (
        alone(tensors=1).query("rounding == 'nearest'").assign(loss_increase=[np.nan, 0.0, np.inf])
    )
    figure = visualize_sensitivity(table)
    assert rings(figure.axes[0]) == {}
    figure.canvas.draw()


def test_sensitivity_of_forty_tensors_stays_readable():
    table = alone(tensors=40)
    figure = visualize_sensitivity(table, limits=[1.01])
    figure.canvas.draw()
    labels = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 40
    assert all(above.y0 >= below.y1 for above, below in pairwise(labels))
    assert min(label.x0 for label in labels) >= 0


def test_pictures_of_400_tensors_fit_a_page():
    """All have a row; as many as there is room for are named, which the axis says."""
    table = alone(tensors=400)
    errors = pd.DataFrame({"tensor": table["name"].unique(), "bit_depth": 4, "sqnr_db": 9.0})
    for figure in (visualize_sensitivity(table, limits=[1.01]), visualize_weight_error(errors)):
        figure.canvas.draw()
        axes = figure.axes[0]
        labels = [text.get_window_extent() for text in axes.get_yticklabels()]
        assert all(above.y0 >= below.y1 for above, below in pairwise(labels))
        assert figure.get_figheight() < 14
        assert axes.get_ylim() == (399.5, -0.5)
        assert axes.get_ylabel() == "400 tensors, one in 10 named"


def test_names_of_120_characters_leave_room_for_the_picture():
    name = "deep." * 23
    table = alone(tensors=3)
    table["name"] = name + table["name"]
    tensors = pd.DataFrame({"kind": "tensors", "name": table["name"].unique(), "bits": 8.0})
    tensors["becomes"] = "8 bits, one scale, nearest"
    errors = pd.DataFrame({"tensor": table["name"].unique(), "bit_depth": 4, "values": 9})
    drawn_of = [visualize_sensitivity(table, limits=[1.01], tensors=tensors)]
    drawn_of.append(visualize_weight_error(errors.assign(sqnr_db=9.0)))
    for figure in drawn_of:
        figure.canvas.draw()
        assert figure.axes[0].get_position().width > 0.25
        texts = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert all(len(text) <= 40 for text in texts)
        assert len(set(texts)) == len(texts)
    assert "what the answer takes" in [t.get_text() for t in drawn_of[0].legends[0].get_texts()]


def test_a_picture_of_no_sensitivity_says_so():
    figure = visualize_sensitivity(alone().iloc[:0], name="toy")
    assert figure.texts[0].get_text() == "no tensor was measured alone"


def test_every_width_that_a_tensor_has_is_shown():
    """What costs nothing beside them has no column."""
    extra = [alone().query("rounding == 'nearest' and bits == 8").assign(bits=b) for b in (10, 12)]
    table = pd.concat([alone(), *extra, extra[0].assign(bits=16)]).astype({"bits": float})
    table.loc[table["bits"] >= 10, "loss_increase"] = 0.0
    tensors = pd.DataFrame({"kind": "tensors", "name": table["name"].unique(), "bits": 16.0})
    tensors["becomes"] = "16 bits, one scale, nearest"
    figure = visualize_sensitivity(table, limits=[1.01], tensors=tensors)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["2", "4", "8", "10", "16"]
    assert heat(table, tensors)["widths"] == ticks
    assert heat(table, tensors)["unmarked"] == 0


def test_sensitivity_tells_what_was_predicted_and_leaves_out_what_costs_nothing():
    extra = [alone().query("rounding == 'nearest' and bits == 8").assign(bits=b) for b in (12, 16)]
    table = pd.concat([alone(), *extra]).astype({"bits": float})
    table.loc[table["bits"] >= 12, "loss_increase"] = 0.0
    table["examples"] = np.where(table["bits"] == 4, 0, 500)
    figure = visualize_sensitivity(table, limits=[1.01])
    nearest, gptq = figure.axes[:2]
    assert [text.get_text() for text in nearest.get_xticklabels()] == ["2", "4", "8", "12"]
    assert nearest.get_xlabel() == "bits (without 16, which cost nothing)"
    assert {(p.get_x(), p.get_y()) for p in nearest.patches} == {(0.5, -0.5), (0.5, 0.5)}
    assert {(p.get_x(), p.get_y()) for p in gptq.patches} == {(0.5, -0.5)}
    assert "predicted, not measured" in [t.get_text() for t in figure.legends[0].get_texts()]


def candidates():
    table = judged([8.0, 4.0, 3.0, 2.0, 1.5], [1.0, 1.02, 0.9, 1.03, 5.0], 1.0)
    origins = ["uniform", "allocated", "sequential", "following 2 epochs", "uniform"]
    return table.assign(
        origin=origins,
        scales_adjusted=[False, False, True, False, False],
        predicted_fidelity=[0.0, 0.01, 0.02, np.nan, 3.0],
        fidelity=[0.0, 0.02, 0.05, 0.03, 4.0],
        fidelity_low=[0.0, 0.01, 0.04, 0.02, 3.0],
        fidelity_high=[0.0, 0.03, 0.06, 0.04, 5.0],
        examples=[60, 60, 60, 60, 15],
        chosen=[False, True, False, False, False],
    )


def test_prediction_shows_the_predicted_that_were_measured_on_all_examples():
    figure = visualize_prediction(candidates(), name="toy")
    axes = figure.axes[0]
    shown = {c.get_label(): series(axes, c.get_label()) for c in axes.containers}
    expected = {
        "uniform": (0, 0),
        "allocated": (0.01, 0.02),
        "sequential, scales adjusted": (0.02, 0.05),
    }
    assert shown.keys() == expected.keys()
    for origin, (predicted, measured) in expected.items():
        assert shown[origin] == [[pytest.approx(predicted)], [pytest.approx(measured)]]
    assert drawn(axes, "chosen: 4 bits").get_ydata().tolist() == [pytest.approx(0.02)]
    diagonal = drawn(axes, "divergences add up")
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist()
    assert axes.get_xscale() == axes.get_yscale() == "symlog"
    assert "predicted" in axes.get_xlabel()
    assert "measured" in axes.get_ylabel()
    assert figure.get_suptitle().endswith(": toy")


def test_prediction_fills_no_marker_of_adjusted_scales():
    shown = visualize_prediction(candidates()).axes[0].containers
    faces = {one.get_label(): one.lines[0].get_markerfacecolor() for one in shown}
    assert faces["sequential, scales adjusted"] == "white"
    assert "white" not in (faces["uniform"], faces["allocated"])


def test_prediction_of_what_has_no_fidelity_is_empty():
    figure = visualize_prediction(candidates().drop(columns=["fidelity"]))
    figure.canvas.draw()
    assert not figure.axes[0].containers


def test_learned_candidates_stand_on_the_edge_of_the_prediction():
    mark = drawn(visualize_prediction(candidates()).axes[0], "following: no prediction")
    assert mark.get_ydata().tolist() == [pytest.approx(0.03)]
    assert mark.get_color() == palette.ORIGINS["following"][0]


@pytest.mark.parametrize("rows", [[0], [3], []])
def test_prediction_of_one_of_none_predicted_and_of_none(rows):
    figure = visualize_prediction(candidates().iloc[rows])
    figure.canvas.draw()
    assert len(figure.axes[0].containers) == (rows == [0])


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([0.9, 0.95, 1.0, 1.1, 2.0])),
        min_size=1,
        max_size=12,
    ),
)
def test_no_candidate_is_cheaper_and_better_than_the_frontier(rows):
    table = pd.DataFrame(rows, columns=["model_bytes", "criterion_ratio"])
    found = frontier(table, "model_bytes")
    ends = list(zip(found["model_bytes"], found["criterion_ratio"], strict=True))
    assert set(ends) <= set(rows)
    for cost, ratio in rows:
        assert any(c <= cost and r <= ratio for c, r in ends)
    for cost, ratio in ends:
        assert not any(c <= cost and r <= ratio and (c, r) != (cost, ratio) for c, r in rows)


def test_a_panel_for_each_cost():
    costs = plugins.names("costs")
    table = candidates().assign(**{cost: [5.0, 4.0, 3.0, 2.0, 1.0] for cost in costs})
    figure = visualize_costs(table, costs, name="toy")
    labels = {"bit operations", "energy (picojoules)", "model (bytes)"}
    assert {axes.get_xlabel() for axes in figure.axes} == labels
    whole = table[table["examples"] == table["examples"].max()]
    for axes in figure.axes:
        assert drawn(axes, "chosen").get_xdata() == whole.loc[whole["chosen"], costs[0]].tolist()
        assert set(drawn(axes, "frontier").get_xdata()) <= set(whole[costs[0]])
    assert figure.get_suptitle() == "What the candidates cost: toy"


@pytest.mark.parametrize("times", [1.01, 1.5, 3.9, 4.1, 30, 1e4])
def test_costs_have_ticks_whatever_their_range(times):
    table = candidates().assign(model_bytes=np.geomspace(777, 777 * times, 5))
    figure = visualize_costs(table, ["model_bytes"])
    figure.canvas.draw()
    axis, (left, right) = figure.axes[0].xaxis, figure.axes[0].get_xlim()
    ticks = [tick for tick in axis.get_major_ticks() if left <= tick.get_loc() <= right]
    assert 2 <= len(ticks) <= 16
    assert all(tick.label1.get_text() for tick in ticks)


def test_pictures_are_the_same_each_time(tmp_path):
    made = []
    for name in ("one.svg", "two.svg"):
        plot.write_svg(tmp_path / name, visualize_prediction(candidates(), name="toy"))
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert b"<dc:date>" not in made[0]


def test_uniform_depths_have_one_colour_in_all_pictures():
    points = visualize_prediction(candidates()).axes[0].containers
    depths = visualize_frontier(UNIFORM, UNIFORM).axes[0].containers
    assert {
        container.lines[0].get_color()
        for container in (*points, *depths)
        if container.get_label().startswith("uniform")
    } == {palette.UNIFORM}
