"""Quantize: the ladders of strategies to judge, fixed before test data are read; and what each
tensor costs the network."""

from quantifind.mixed_precision.sensitivity import rank_correlations
from quantifind.search import find_strategy
from quantifind.strategy import uniform_strategy
from quantifind.workflow.quantize_workflow import weight_errors
from stages import files, ladder, networks
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    net, criterion = networks.read_network()
    train = networks.read_loader("train", batch_size=params.entry.batch_size, seed=params.seed)
    val = networks.read_loader("val", batch_size=params.entry.batch_size)
    depths = sorted(set(params.quantize.bit_depths), reverse=True)
    uniform = [uniform_strategy(net, bits, scheme=params.quantize.scheme) for bits in depths]
    errors = weight_errors(net, uniform)
    folder = files.measured_folder()
    found = find_strategy(net, train, val, criterion, folder=folder, **params.search_options)
    objects = ["strategy", "quantized"]
    files.write_table(files.PLOTS / "weight_error.csv", errors)
    files.write_table(files.PLOTS / "candidates.csv", found.candidates.drop(columns=objects))
    files.write_table(files.PLOTS / "sensitivity.csv", found.sensitivity.drop(columns="choice"))
    correlations = {"rank_correlation": rank_correlations(found.sensitivity)}
    files.write_json(files.METRICS / "sensitivity.json", correlations)
    files.write_json(files.UNIFORM, [strategy.choices for strategy in uniform])
    ladder.write_ladder(found.ladder)


if __name__ == "__main__":
    files.run(main)
