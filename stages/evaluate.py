"""Evaluate: judge the ladders on test data, which took no part in choosing anything."""

from typing import Any

from quantifind.strategy import Strategy
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from stages import files, ladder, networks
from stages.answers import in_words, mark_certified, recommend, summarize
from stages.params import Params


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
    if "temperature" in facts:
        # fixed by validation data, as the strategies are
        temperatures = {
            "temperatures": facts["temperature"].tolist(),
            "original_temperature": float(facts["original_temperature"].iloc[0]),
        }
    found = evaluate_strategies(
        net, strategies, test, criterion, quantized=quantized, **temperatures, **how
    )
    frontier = found.join(facts.add_prefix("validation_"))
    answer = recommend(
        frontier,
        table,
        [strategy.choices for strategy in strategies],
        limits=files.read_json(files.LIMITS) or {"criterion_ratio": limits[0]},
        budget=params.search.budget,
        confidence=confidence,
    )
    files.write_table(files.PLOTS / "bit_depths.csv", mark_certified(table, limits))
    files.write_table(files.PLOTS / "frontier.csv", frontier)
    files.write_json(files.METRICS / "evaluation.json", summarize(table, limits))
    files.write_json(files.METRICS / "recommendation.json", answer)
    files.write_text(files.METRICS / "recommendation.md", in_words(answer, params.model))


if __name__ == "__main__":
    files.run(main)
