"""Quantize: the ladders of strategies to judge, fixed before test data are read; and what each
tensor costs the network."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from quantifind.metrics import weight_error
from quantifind.mixed_precision.sensitivity import rank_correlations
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize
from quantifind.search import find_strategy
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.utils.console import progress
from quantifind.workflow.evaluation_workflow import evaluate_strategies
from stages import files, ladder, networks
from stages.live import live
from stages.mixtures import mixture
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    made = networks.read_network()
    net, criterion = made.net, made.criterion
    train = networks.read_loader("train", batch_size=params.entry.batch_size, seed=params.seed)
    val = networks.read_loader("val", batch_size=params.entry.batch_size)
    depths = sorted(set(params.quantize.bit_depths), reverse=True)
    uniform = [uniform_strategy(net, bits, scheme=params.quantize.scheme) for bits in depths]
    errors = weight_errors(net, uniform)
    folder = files.measured_folder()
    how: Any = {"forward": made.forward, "folder": folder, **params.search_options}
    with live(files.SEARCHING, ["mean_bits"], step="passes") as log:
        found = find_strategy(net, train, val, criterion, told=log, **how)
    if "interrupted" in found.passes.left_out:
        raise KeyboardInterrupt
    files.write_table(files.PLOTS / "weight_error.csv", errors)
    files.write_table(files.PLOTS / "candidates.csv", in_words(found.candidates))
    files.write_table(files.PLOTS / "random.csv", in_words(found.random))
    files.write_table(files.PLOTS / "sensitivity.csv", found.sensitivity.drop(columns="choice"))
    correlations = {"rank_correlation": rank_correlations(found.sensitivity)}
    files.write_json(files.METRICS / "sensitivity.json", correlations)
    files.write_json(files.UNIFORM, [strategy.choices for strategy in uniform])
    how = {"forward": made.forward, **params.workers}
    files.write_json(files.TEMPERATURES, temperatures(net, uniform, val, criterion, **how))
    files.write_json(files.LIMITS, dict(found.goal.limits))
    ladder.write_ladder(found.ladder)
    ladder.write_control(found.control)


def in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Candidates as a table of texts and numbers.

    rows: of `quantifind.mixed_precision.found.Found`.
    Returns: ``widths``, how many tensors have which bits, in place of strategies and codes.
    """
    held = [mixture(t.bits for t in q.tensors.values()) for q in rows["quantized"]]
    return rows.drop(columns=["strategy", "quantized"]).assign(widths=held)


def temperatures(
    model: nn.Module, uniform: Sequence[Strategy], val: Any, criterion: Any, **how: Any
) -> dict[str, Any]:
    """What networks' logits are divided by for calibrated ratios, fitted to validation data.

    how: further arguments of `quantifind.workflow.evaluation_workflow.evaluate_strategies`.
    Returns: what that takes on test data; nothing where no temperature suits the loss.
    """
    table = evaluate_strategies(model, uniform, val, criterion, **how)
    if "temperature" not in table:
        return {}
    return {
        "temperatures": table["temperature"].tolist(),
        "original_temperature": table["original_temperature"].iloc[0],
    }


def weight_errors(model: nn.Module, strategies: Sequence[Strategy]) -> pd.DataFrame:
    """How far quantized values are from the float ones.

    strategies: such as `quantifind.strategy.uniform_strategy` gives them.
    Returns: a row for each strategy and tensor: ``tensor``, ``bit_depth`` of a code, ``values``,
        and those of `quantifind.metrics.weight_error`.
    """
    values = named_tensors(model)
    rows = []
    with progress("quantizing", total=len(strategies)) as step:
        for strategy in strategies:
            for name, tensor in quantize(model, strategy).tensors.items():
                row: dict[str, Any] = {
                    "tensor": name,
                    "bit_depth": tensor.bits,
                    "values": tensor.codes.numel(),
                }
                rows.append(row | weight_error(values[name], tensor.dequantize()))
            step()
    return pd.DataFrame(rows)


if __name__ == "__main__":
    files.run(main)
