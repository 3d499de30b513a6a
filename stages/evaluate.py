"""Evaluate: judge the ladders on test data, which took no part in choosing anything."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from quantifind.certification.goal import answer_of
from quantifind.certification.measures import bounds_at, calibrated, examples_needed
from quantifind.certification.resampling import bits_interval
from quantifind.certification.tails import change_skewness
from quantifind.strategy import Strategy
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from quantifind.workflow.matched_workflow import matched_ratios
from stages import files, ladder, looks, networks
from stages.answers import in_words, mark_certified, recommend, summarize
from stages.params import Params
from stages.tensors import tensor_table
from stages.versions import versions


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    made = networks.read_network()
    net, criterion = made.net, made.criterion
    uniform = [Strategy(**choices) for choices in files.read_json(files.UNIFORM)]
    strategies, quantized, facts = ladder.read_ladder()
    test = networks.read_loader("test", batch_size=files.TEST_BATCH)
    limits, confidence = params.evaluate.limits, params.evaluate.confidence
    how: Any = {"confidence": confidence, "forward": made.forward, **params.workers}
    temperatures: dict[str, Any] = {}
    table = evaluate_strategies(net, uniform, test, criterion, **how)
    gains: list[float | None] = [None] * len(strategies)
    if "temperature" in facts:
        # fixed by validation data, as the strategies are
        temperatures = {
            "temperatures": facts["temperature"].tolist(),
            "original_temperature": float(facts["original_temperature"].iloc[0]),
        }
        gains = [1 / temperature for temperature in facts["temperature"]]
    how |= {"quantized": quantized, "columns": True}
    found = evaluate_strategies(net, strategies, test, criterion, **temperatures, **how)
    asked = files.read_json(files.LIMITS) or {"criterion_ratio": limits[0]}
    look = looks.count(asked, confidence=confidence)
    columns = [calibrated(*pair) for pair in zip(found.pop("columns"), gains, strict=True)]
    again = [
        bounds_at(each, asked, look.confidence, gain)
        for each, gain in zip(columns, gains, strict=True)
    ]
    found = found.join(pd.DataFrame(again))
    found["change_skewness"] = [change_skewness(c, next(iter(asked))) for c in columns]
    found["examples"] = [len(c["loss"]) for c in columns]
    control = ladder.read_control()
    if control is not None and not control.fault:
        trained = [
            one if answer_of(origin) == "trained" else None
            for one, origin in zip(columns, facts["origin"], strict=True)
        ]
        options: Any = {"forward": made.forward, "confidence": confidence}
        beside = matched_ratios(trained, control.network(net), test, criterion, **options)
        found = found.join(beside)
    frontier = found.join(facts.add_prefix("validation_"))
    answer = recommend(
        frontier,
        table,
        [strategy.choices for strategy in strategies],
        limits=asked,
        budget=params.search.budget,
        look=look,
        confidence=confidence,
        control=None if control is None else f"{control}",
        bits_interval=bits_interval(
            columns, list(found["mean_bits"]), asked, confidence=look.confidence
        ),
    )
    if answer["certified"] is None:
        answer["needed"] = examples_needed(columns[0], asked, look.confidence, gains[0])
    files.write_table(files.PLOTS / "tensors.csv", tensor_table(net, strategies, quantized))
    _write(params, table, frontier, answer)


def _write(
    params: Params, uniform: pd.DataFrame, frontier: pd.DataFrame, answer: Mapping[str, Any]
) -> None:
    limits = params.evaluate.limits
    files.write_table(files.PLOTS / "bit_depths.csv", mark_certified(uniform, limits))
    files.write_table(files.PLOTS / "frontier.csv", frontier)
    files.write_json(files.METRICS / "versions.json", versions())
    files.write_json(files.METRICS / "evaluation.json", summarize(uniform, limits))
    files.write_json(files.METRICS / "recommendation.json", answer)
    files.write_text(files.METRICS / "recommendation.md", in_words(answer, params.model))


if __name__ == "__main__":
    files.run(main)
