"""Quantize: the ladders of strategies to judge, fixed before test data are read; and what each
tensor costs the network."""

from dataclasses import asdict
from typing import Any

import pandas as pd

from quantifind.metrics import weight_error
from quantifind.mixed_precision.sensitivity import measure_sensitivity, rank_correlations
from quantifind.quantize import quantize_tensors
from quantifind.search import find_strategy
from quantifind.strategy import uniform_strategy
from quantifind.utils.console import progress
from stages import files, ladder, networks
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    net, criterion = networks.read_network()
    depths = sorted(set(params.quantize.bit_depths), reverse=True)
    uniform = [uniform_strategy(net, bits, scheme=params.quantize.scheme) for bits in depths]
    parameters = dict(net.named_parameters())
    rows = []
    with progress("quantizing", total=len(uniform)) as step:
        for strategy in uniform:
            for name, tensor in quantize_tensors(net, strategy).items():
                row: dict[str, Any] = {"tensor": name, "bit_depth": tensor.bits}
                row["values"] = tensor.codes.numel()
                values = parameters[name].detach()
                rows.append(row | weight_error(values, tensor.dequantize()))
            step()

    train = networks.read_loader("train", batch_size=params.entry.batch_size, seed=params.seed)
    val = networks.read_loader("val", batch_size=params.entry.batch_size)
    search: Any = asdict(params.search) | {"folder": files.measured_folder(), "seed": params.seed}
    search["confidence"] = params.evaluate.confidence
    who: Any = {"engine": params.engine, "scheduler": params.scheduler}
    _, candidates = find_strategy(net, train, val, criterion, **search, **who)
    menus = {key: search[key] for key in ("widths", "activation_bits", "folder", "seed")}
    sensitivity = measure_sensitivity(net, train, val, criterion, **menus)
    steps: list[Any] = candidates[candidates["on_ladder"]].to_dict("records")

    files.write_table(files.PLOTS / "weight_error.csv", pd.DataFrame(rows))
    files.write_table(files.PLOTS / "candidates.csv", candidates.drop(columns="strategy"))
    files.write_table(files.PLOTS / "sensitivity.csv", sensitivity.drop(columns="choice"))
    correlations = {"rank_correlation": rank_correlations(sensitivity)}
    files.write_json(files.METRICS / "sensitivity.json", correlations)
    files.write_json(files.UNIFORM, [strategy.choices for strategy in uniform])
    ladder.write_ladder([(row.pop("strategy"), row) for row in steps])


if __name__ == "__main__":
    files.run(main)
