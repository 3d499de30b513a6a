"""Evaluate: judge the ladders on test data, which took no part in choosing anything."""

from typing import Any

from quantifind.certification.certificate import degradation
from quantifind.certification.goal import Goal
from quantifind.certification.resampling import bits_interval
from quantifind.certification.tails import change_skewness
from quantifind.strategy import Strategy
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from stages import files, ladder, looks, networks
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
    table = evaluate_strategies(net, uniform, test, criterion, **how)
    found = evaluate_strategies(
        net, strategies, test, criterion, quantized=quantized, columns=True, **how
    )
    goal = Goal.of(params.search.limit, params.search.budget)
    measure, limit = goal.measure, goal.limit_to_certify(limits)
    look = looks.count({measure: limit}, confidence=confidence)
    columns = list(found.pop("columns"))
    found[f"{measure}_look_bound"] = [
        degradation(c, confidence=look.confidence)[f"{measure}_bound"] for c in columns
    ]
    found["change_skewness"] = [change_skewness(c, measure) for c in columns]
    found["examples"] = [len(c["loss"]) for c in columns]
    frontier = found.join(facts.add_prefix("validation_"))
    answer = recommend(
        frontier,
        table,
        [strategy.choices for strategy in strategies],
        measure=measure,
        limit=limit,
        budget=params.search.budget,
        look=look,
        confidence=confidence,
        bits_interval=bits_interval(
            columns, list(found["mean_bits"]), {measure: limit}, confidence=look.confidence
        ),
    )
    files.write_table(files.PLOTS / "bit_depths.csv", mark_certified(table, limits))
    files.write_table(files.PLOTS / "frontier.csv", frontier)
    files.write_json(files.METRICS / "evaluation.json", summarize(table, limits))
    files.write_json(files.METRICS / "recommendation.json", answer)
    files.write_text(files.METRICS / "recommendation.md", in_words(answer, params.model))


if __name__ == "__main__":
    files.run(main)
