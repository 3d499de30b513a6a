"""Quantize: the ladder of strategies to judge, fixed before test data are read; their errors."""

from dataclasses import asdict
from typing import Any

import pandas as pd

from quantifind.metrics import weight_error
from quantifind.params import Params
from quantifind.strategy import quantize_tensors, uniform_strategy
from quantifind.utils import progress
from stages import files


def main(params: Params) -> None:
    net, _ = files.read_network()
    depths = sorted(set(params.quantize.bit_depths), reverse=True)
    ladder = [uniform_strategy(net, bits, scheme=params.quantize.scheme) for bits in depths]
    parameters = dict(net.named_parameters())
    rows = []
    with progress("quantizing", total=len(ladder)) as step:
        for strategy in ladder:
            for name, tensor in quantize_tensors(net, strategy).items():
                row: dict[str, Any] = {"tensor": name, "bit_depth": tensor.bits}
                row["values"] = tensor.codes.numel()
                values = parameters[name].detach()
                rows.append(row | weight_error(values, tensor.dequantize()))
            step()
    files.write_table(files.PLOTS / "weight_error.csv", pd.DataFrame(rows))
    files.write_json(files.LADDER, [asdict(strategy) for strategy in ladder])


if __name__ == "__main__":
    files.run(main)
