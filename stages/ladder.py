"""The ladder of a search as files: what each strategy chose, its facts, and its packed codes."""

import math
from pathlib import Path

import pandas as pd

from quantifind.storage import artifact
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from stages import files


def write_ladder(ladder: pd.DataFrame) -> None:
    """Write each candidate's choices and facts, and the packed codes beside them.

    ladder: rows of `quantifind.mixed_precision.found.Found.candidates`, from most bytes to fewest.
    """
    described = []
    for number, row in enumerate(ladder.to_dict("records")):
        strategy, quantized = row.pop("strategy"), row.pop("quantized")
        tensors, description = artifact.pack(quantized)
        files.write_tensors(codes_of(number), tensors)
        described.append({**strategy.choices, "description": description, "facts": row})
    files.write_json(files.LADDER, described)


def read_ladder() -> tuple[list[Strategy], list[Quantized], pd.DataFrame]:
    """What `write_ladder` wrote: the strategies, their codes, and a row of facts for each.

    Raises: ValueError naming a file that is not whole; OSError where it can't be read.
    """
    strategies, quantized, facts = [], [], []
    for number, step in enumerate(files.read_json(files.LADDER)):
        strategies.append(Strategy(step["tensors"], step["activations"]))
        tensors = files.read_tensors(codes_of(number))
        quantized.append(artifact.unpack(tensors, step["description"]))
        # what JSON does not have: test_numbers_that_are_none_come_back_as_missing
        facts.append({k: math.nan if v is None else v for k, v in step["facts"].items()})
    return strategies, quantized, pd.DataFrame(facts)


def codes_of(number: int) -> Path:
    """The file with the codes of a step of the ladder.

    number: from 0.
    """
    return files.LADDER.with_name(f"codes-{number:02d}.safetensors")
