"""Evaluate: judge the ladder on test data, which took no part in choosing anything."""

from quantifind.certificate import mark_certified
from quantifind.params import Params
from quantifind.strategy import Strategy
from quantifind.workflow.evaluation_workflow import evaluate_strategies, summarize
from stages import files


def main(params: Params) -> None:
    net, criterion = files.read_network()
    ladder = [Strategy(**strategy) for strategy in files.read_json(files.LADDER)]
    test = files.read_loader("test", batch_size=files.TEST_BATCH)
    limits, confidence = params.evaluate.limits, params.evaluate.confidence
    table = evaluate_strategies(net, ladder, test, criterion, confidence=confidence)
    files.write_table(files.PLOTS / "bit_depths.csv", mark_certified(table, limits))
    files.write_json(files.METRICS / "evaluation.json", summarize(table, limits))


if __name__ == "__main__":
    files.run(main)
