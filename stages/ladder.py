"""The ladder of a search as files: what each strategy chose, its facts, and its packed codes; the
control of what was trained further."""

import json
import math
from pathlib import Path

import pandas as pd

from quantifind.network.folding import checked_pairs
from quantifind.runtime.control import Control
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
        # the norms that are folded, too: test_a_ladder_comes_back_as_it_was
        choices = (step["tensors"], step["activations"], step.get("folded", ()))
        strategies.append(Strategy(*choices))
        tensors = files.read_tensors(codes_of(number))
        quantized.append(artifact.unpack(tensors, step["description"]))
        # what JSON does not have: test_numbers_that_are_none_come_back_as_missing
        facts.append({k: math.nan if v is None else v for k, v in step["facts"].items()})
    return strategies, quantized, pd.DataFrame(facts)


def write_control(control: Control | None) -> None:
    """Write the control of what was trained further, where there is one.

    control: of a search.
    """
    files.CONTROL.unlink(missing_ok=True)
    if control is not None:
        ratio = None if control.fault else control.ratio
        facts = {"folded": control.folded, "ratio": ratio, "fault": control.fault}
        files.write_tensors(files.CONTROL, dict(control.weights), {"facts": json.dumps(facts)})


def read_control() -> Control | None:
    """What `write_control` wrote; None where nothing was trained further.

    Raises: ValueError where the file is not whole; OSError where it can't be read.
    """
    if not files.CONTROL.exists():
        return None
    facts = json.loads(files.read_facts(files.CONTROL)["facts"])
    folded, ratio = checked_pairs(facts["folded"]), facts["ratio"]
    weights = files.read_tensors(files.CONTROL)
    return Control(weights, folded, math.nan if ratio is None else ratio, facts["fault"])


def codes_of(number: int) -> Path:
    """The file with the codes of a step of the ladder.

    number: from 0.
    """
    return files.LADDER.with_name(f"codes-{number:02d}.safetensors")
