"""Evaluate: judge the ladders on test data, which took no part in choosing anything."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from torch import nn

from quantifind.certification.resampling import bits_interval
from quantifind.costs import model_bytes
from quantifind.deployment.saving import save
from quantifind.strategy import Strategy
from quantifind.tensor.choice import STORAGES
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import batches_of
from quantifind.workflow.certification_workflow import judge_ladder, with_look_bounds
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from stages import files, ladder, looks, networks
from stages.answers import in_words, mark_certified, recommend, summarize
from stages.card import card
from stages.changed import changed_table, read_characters
from stages.exports import check_packages, write_exports
from stages.params import Params
from stages.tensors import tensor_table
from stages.versions import versions


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    check_packages(params.export)
    made = networks.read_network()
    net, criterion = made.net, made.criterion
    uniform = [Strategy(**choices) for choices in files.read_json(files.UNIFORM)]
    strategies, quantized, facts = ladder.read_ladder()
    test = networks.read_loader("test", batch_size=files.TEST_BATCH)
    limits, confidence = params.evaluate.limits, params.evaluate.confidence
    how: Any = {"confidence": confidence, "forward": made.forward, **params.workers}
    fixed = fitted_temperatures(files.read_json(files.TEMPERATURES))
    table = evaluate_strategies(net, uniform, test, criterion, columns=True, **fixed, **how)
    asked = files.read_json(files.LIMITS) or {"criterion_ratio": limits[0]}
    control = ladder.read_control()
    judged = judge_ladder(
        net,
        facts.assign(strategy=pd.Series(strategies), quantized=pd.Series(quantized)),
        test,
        criterion,
        limits=asked,
        control=control,
        looks=looks.ledger(),
        **how,
    )
    found, look = judged.steps, judged.look
    assert look is not None
    table = with_look_bounds(table, asked, look)
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
            judged.columns, list(found["mean_bits"]), asked, confidence=look.confidence
        ),
    )
    if answer["certified"] is None:
        answer["needed"] = judged.needed(asked, confidence)
    best = answer["certified"] or answer["chosen"]
    proof = {"on": "test data", "certified": answer["certified"] is not None, **best}
    proof |= {key: answer[key] for key in ("limit", "confidence", "look")}
    step, path, words = answer["step"], files.SAVED, in_words(answer, params.model)
    size = save(net, quantized[step], path, strategy=strategies[step], judged=proof)
    answer["file"] = {"path": str(path), "bytes": size, **_bytes(net, quantized[step])}
    some = networks.read_loader("test", batch_size=2)
    example = next(batches_of(some, net, criterion, made.forward))
    answer["exports"] = write_exports(params.export, net, quantized[step], example)
    files.write_text(files.CARD, card(answer, params.model, words))
    files.write_table(files.PLOTS / "tensors.csv", tensor_table(net, strategies, quantized))
    few: Any = {"count": params.evaluate.examples, "characters": read_characters()}
    changed = changed_table(made, quantized[step], test, judged.columns[step], **few)
    files.write_table(files.PLOTS / "changed.csv", changed)
    _write(params, table, frontier, answer)


def fitted_temperatures(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Temperatures as they were fitted to validation data: what suited none there is NaN, not None,
    for which one would be fitted to test data."""

    def known(value: Any) -> Any:
        return math.nan if value is None else value

    return {
        name: [known(each) for each in value] if isinstance(value, list) else known(value)
        for name, value in kept.items()
    }


def _bytes(net: nn.Module, quantized: Quantized) -> dict[str, int]:
    """What the same codes take by storage, all of the network counted."""
    costs = {s: model_bytes.measure(net, quantized.stored(s), []) for s in STORAGES}
    return {storage: int(sum(cost.values())) for storage, cost in costs.items()}


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
