"""What a run left in tables and JSON, from which everything that people see is drawn."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from quantifind.certification.goal import steps_that_keep
from stages import files

JUDGED = ("mean_bits", "criterion_ratio", "criterion_ratio_bound")
INCREASE = ("loss_increase", "increase_error", "original_criterion")
CERTIFIED = ("certified_bits", "certified_alone", "certified_uniform_depth")
# by table the stage that writes it, and columns without which nothing can be drawn
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "history": ("train", ("epoch", "train_loss", "val_loss")),
    "weight_error": ("quantize", ("tensor", "bit_depth", "values", "sqnr_db")),
    "candidates": (
        "quantize",
        ("origin", "examples", "on_ladder", "chosen", "scales_adjusted", *JUDGED),
    ),
    "random": ("quantize", ("origin", "examples", "mean_bits", "model_bytes", "criterion_ratio")),
    "sensitivity": (
        "quantize",
        ("kind", "name", "rounding", "bits", *INCREASE),
    ),
    "bit_depths": ("evaluate", ("bit_depth", "original_criterion", *JUDGED)),
    "frontier": ("evaluate", ("validation_origin", "validation_chosen", *JUDGED)),
    "changed": (
        "evaluate",
        (
            *("example", "original_loss", "loss", "target", "was", "became"),
            "kind",
            "shape",
            "input",
        ),
    ),
    "tensors": ("evaluate", ("step", "kind", "name", "values", "bits", "stored_bits", "becomes")),
}
FACTS = {
    "recommendation": (
        "evaluate",
        ("limit", "confidence", "look", "control", "chosen", "certified", "step", *CERTIFIED),
    ),
    "versions": ("evaluate", ("python", "torch")),
}
# by key of the answer, what it has where it is there
FOUND = ("mean_bits", "model_bytes", "compression", "answer", "origin", "examples", "measures")
PARTS = {"certified": FOUND, "chosen": FOUND, "look": ("k", "level", "confidence")}
# without a row there is nothing to draw; weights that were given have no history
MAY_BE_EMPTY = ("changed", "history", "random", "sensitivity", "weight_error")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Evidence:
    """The tables of a run by name, and its answer.

    tables: those of `TABLES`.
    answer: metrics/recommendation.json, as `stages.answers.recommend` has it.
    versions: metrics/versions.json.
    """

    tables: Mapping[str, pd.DataFrame]
    answer: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def limits(self) -> dict[str, float]:
        """What the answer is judged by: by measure the most that it may be."""
        return dict(self.answer["limit"])

    @property
    def measure(self) -> str:
        """The first of the limits'."""
        return next(iter(self.limits))

    @property
    def kept(self) -> int:
        """How many steps of the ladder are certified, walked from the top."""
        return steps_that_keep(self.tables["frontier"], self.limits, "look_bound")

    @property
    def step(self) -> int:
        """The step of the ladder that the report is about: the certified one, or the chosen."""
        chosen = self.tables["frontier"]["validation_chosen"].astype(bool)
        return self.kept - 1 if self.kept else int(chosen.to_numpy().argmax())

    @property
    def best(self) -> Mapping[str, Any]:
        """Its facts, of `stages.answers.recommend`."""
        found: Mapping[str, Any] = self.answer["certified"] or self.answer["chosen"]
        return found

    @property
    def uniform_bits(self) -> float | None:
        """Mean bits, with scales, of the one width for all that is certified; None for none."""
        depth = self.answer["certified_uniform_depth"]
        depths = self.tables["bit_depths"].set_index("bit_depth")["mean_bits"]
        return None if depth is None else float(depths[depth])

    @property
    def tensors(self) -> pd.DataFrame:
        """What each tensor and activation becomes in it, in the network's order."""
        table = self.tables["tensors"]
        return table[table["step"] == self.step]


def read_evidence(
    read: Callable[[Path], str] = _text, *, without: Collection[str] = ()
) -> Evidence:
    """All of it.

    read: the text of a file of the project; by default as it stands in the folder.
    without: tables that nobody asks for, which earlier runs may not have left.
    Raises: ValueError, one line, naming a file that is missing, empty or of an older version, and
    the stage to run.
    """
    tables = {
        name: _table(read, name, *needs) for name, needs in TABLES.items() if name not in without
    }
    facts = {name: _facts(read, name, *needs) for name, needs in FACTS.items()}
    found = Evidence(tables, facts["recommendation"], facts["versions"])
    if "random" not in without:
        _check(files.PLOTS / "random.csv", found.tables["random"], tuple(found.limits), "quantize")
    for measure in found.limits:
        columns = (measure, *(f"{measure}_{end}" for end in ("low", "high", "look_bound")))
        needs = {"frontier": columns, "bit_depths": columns, "candidates": (measure,)}
        for name in needs.keys() & tables.keys():
            _check(files.PLOTS / f"{name}.csv", tables[name], needs[name], TABLES[name][0])
    _check_together(found)
    return found


def _check_together(found: Evidence) -> None:
    """Raises: ValueError where the tables and the answer are of different runs."""
    kept, certified = found.kept, found.answer["certified"]
    bits = found.tables["frontier"]["mean_bits"].iloc[found.step]
    together = bool(kept) == (certified is not None) and found.answer["step"] == found.step
    if (
        not together
        or found.tensors.empty
        or not math.isclose(bits, found.best["mean_bits"], rel_tol=1e-6)
    ):
        tables = [files.PLOTS / f"{name}.csv" for name in ("frontier", "tensors")]
        raise ValueError(
            f"{files.METRICS / 'recommendation.json'}: of another run than {tables[0]} and "
            f"{tables[1]}; {_advice('evaluate')}"
        )


def _found(read: Callable[[Path], str], path: Path, stage: str) -> str:
    try:
        text = read(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; {_advice(stage)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text ({error}); {_advice(stage)}") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; {_advice(stage)}")
    return text


def _table(
    read: Callable[[Path], str], name: str, stage: str, columns: tuple[str, ...]
) -> pd.DataFrame:
    path = files.PLOTS / f"{name}.csv"
    text = _found(read, path, stage)
    try:
        table = files.parse_table(text)
    except pd.errors.ParserError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: no table ({said}); {_advice(stage)}") from error
    _check(path, table, columns, stage)
    if table.empty and name not in MAY_BE_EMPTY:
        raise ValueError(f"{path}: has no rows; {_advice(stage)}")
    return table


def _facts(read: Callable[[Path], str], name: str, stage: str, keys: tuple[str, ...]) -> Any:
    path = files.METRICS / f"{name}.json"
    facts = files.parse_json(path, _found(read, path, stage))
    facts = facts if isinstance(facts, dict) else {}
    _check(path, facts, keys, stage)
    for key in PARTS.keys() & facts.keys():
        if key == "certified" and facts[key] is None:
            continue
        part = facts[key] if isinstance(facts[key], dict) else {}
        _check(path, {f"{key} {name}" for name in part}, (f"{key} {n}" for n in PARTS[key]), stage)
    if "limit" in facts and not (isinstance(facts["limit"], dict) and facts["limit"]):
        raise ValueError(f"{path}: limit is {facts['limit']!r}, none by measure; {_advice(stage)}")
    return facts


def _check(path: Path, found: Any, needed: Iterable[str], stage: str) -> None:
    if missing := [name for name in needed if name not in found]:
        lacks = ", ".join(missing)
        raise ValueError(f"{path}: lacks {lacks}, as of an older version; {_advice(stage)}")


def _advice(stage: str) -> str:
    return f"run dvc repro --force {stage}"
