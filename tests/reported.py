"""Tables such as a run leaves, made by hand, for tests of what people see."""

import json

import numpy as np
import pandas as pd
from conftest import ROOT

from quantifind.certification.ledger import Look
from stages import files
from stages.answers import recommend
from stages.evidence import read_evidence
from stages.params import read_params
from stages.report import report

LOOK = Look(1, 0.025)
WIDTHS = (1, 2, 3, 4, 6, 8)


def measured(values, measure, spread=0.002):
    """Columns of a measure with intervals and bounds."""
    values = np.array(values, dtype=float)
    ends = {"_low": -spread, "_high": spread, "_bound": 0.8 * spread, "_look_bound": spread}
    return {measure: values} | {f"{measure}{end}": values + by for end, by in ends.items()}


def leave(
    names=("0.weight", "0.bias", "2.weight", "2.bias"),
    *,
    measure="calibrated_ratio",
    lost=(0.001, 0.004, 0.03),
    predicted=True,
    accuracy=True,
    sensitive=True,
    activations=(),
    origins=("allocated", "following 1 epochs", "trained 1 epochs"),
    shown=({},),
    drawn=2,
    turned=(3.0, 2.0),
):
    """Write all tables and facts into the folder as it is; the second step is certified.

    lost: by step of the ladder what is above lossless.
    turned: answers that became wrong, and right.
    Returns: the bits and values of each tensor.
    """
    rng = np.random.default_rng(0)
    lossless = 1.0 if measure.endswith("ratio") else 0.0
    bits = rng.choice(WIDTHS, len(names)).astype(float)
    values = rng.integers(1, 5000, len(names))
    lost = lossless + np.array(lost)
    ladder = pd.DataFrame({"mean_bits": [6.5, 4.25, 2.5][: len(lost)], **measured(lost, measure)})
    if measure != "criterion_ratio":
        ladder = ladder.assign(**measured(1 + lost - lossless, "criterion_ratio"))
    facts = {
        "origin": list(origins)[: len(lost)],
        "model_bytes": [9000, 6000, 4000][: len(lost)],
        "bit_operations": 1.0,
        "energy_picojoules": 1.0,
        "scales_adjusted": False,
        "chosen": [step == min(1, len(lost) - 1) for step in range(len(lost))],
        "examples": 500,
        measure: lost,
        "criterion_ratio": ladder["criterion_ratio"],
    }
    ladder = ladder.assign(change_skewness=0.1, examples=1000)
    if accuracy:
        ladder = ladder.assign(right_to_wrong=turned[0], wrong_to_right=turned[1])
    frontier = ladder.join(pd.DataFrame(facts).add_prefix("validation_"))
    depths = pd.DataFrame({"bit_depth": [8, 4, 2], "mean_bits": [8.1, 4.1, 2.1]})
    depths = depths.assign(criterion=1.0, original_criterion=1.0, signal_to_complexity=0.1)
    for name, first in ((measure, lossless), ("criterion_ratio", 1.0)):
        depths = depths.assign(**measured(first + np.array([0.001, 0.5, 9.0]), name))
    choices = [
        {
            "tensors": {
                name: {"scheme": "uniform", "bits": int(b)}
                for name, b in zip(names, bits, strict=True)
            },
            "activations": {},
        }
    ] * len(frontier)
    answer = recommend(
        frontier, depths, choices, limits={measure: lossless + 0.01}, look=LOOK,
        bits_interval=(3.0, 6.0),
    )  # fmt: skip
    widest = {"kind": "tensors", "name": list(names), "values": values, "bits": bits}
    tensors = pd.DataFrame(widest | {"stored_bits": bits * values + 32, "becomes": "by test"})
    inputs = pd.DataFrame({"kind": "activations", "name": list(activations), "bits": 8.0})
    tensors = pd.concat([tensors, inputs.assign(becomes="by test")], ignore_index=True)
    steps = [tensors.assign(step=step) for step in range(len(frontier))]
    grid = pd.MultiIndex.from_product([names if sensitive else [], WIDTHS], names=["name", "bits"])
    alone = grid.to_frame(index=False).assign(kind="tensors", rounding="nearest")
    alone = alone.assign(increase_error=0.0, original_criterion=0.5)
    alone["loss_increase"] = 0.5 * 4.0 ** -alone["bits"].astype(float)
    candidates = pd.DataFrame(facts).drop(columns=["bit_operations"])
    candidates = candidates.assign(mean_bits=ladder["mean_bits"], bit_operations=1.0)
    for name in {measure, "criterion_ratio"}:
        candidates = candidates.assign(**measured(frontier[name], name))
    candidates["predicted_fidelity"] = [0.001, 0.004, np.nan][: len(lost)] if predicted else np.nan
    candidates["on_ladder"] = True
    candidates["fidelity"] = [0.0011, 0.005, 0.02][: len(lost)]
    candidates = candidates.assign(fidelity_low=0.0, fidelity_high=0.1)
    example = {"example": 7, "original_loss": 0.1, "loss": 0.4, "was": np.nan, "became": np.nan}
    example |= {"target": np.nan, "kind": "numbers", "shape": np.nan, "input": '"0.1 0.2"'}
    changed = pd.DataFrame([example | each for each in shown], columns=list(example))
    history = pd.DataFrame({"epoch": [1], "train_loss": [1.0], "val_loss": [0.9]})
    errors = pd.DataFrame({"tensor": list(names), "bit_depth": 4, "values": values, "sqnr_db": 9.0})
    tables = {"frontier": frontier, "bit_depths": depths, "candidates": candidates}
    random = candidates.iloc[[0] * drawn].assign(origin="random", mean_bits=9.5)
    random["widths"] = "1 × 3, 3 × 8"
    tables |= {
        "random": random,
        "tensors": pd.concat(steps),
        "sensitivity": alone,
        "changed": changed,
    }
    for name, table in (tables | {"history": history, "weight_error": errors}).items():
        files.write_table(files.PLOTS / f"{name}.csv", table)
    files.write_json(files.METRICS / "recommendation.json", answer)
    files.write_json(files.METRICS / "versions.json", {"python": "3", "torch": "2"})
    return bits, values


def page():
    """The report of what stands in the folder."""
    return report(read_evidence(), read_params(ROOT / "params.yaml"))


def alter(name, change):
    """A table, or facts, changed where they stand."""
    if name.endswith(".csv"):
        table = files.parse_table((files.PLOTS / name).read_text(encoding="utf-8"))
        files.write_table(files.PLOTS / name, change(table))
    else:
        path = files.METRICS / name
        files.write_json(path, change(json.loads(path.read_text())))
