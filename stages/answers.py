"""What to do with a network: the strategy that test data certify, in numbers and in words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from quantifind.certification.certificate import certified_depth
from quantifind.certification.digits import (
    amount,
    bound,
    chance,
    interval,
    limits_in_words,
    percent,
    sure,
)
from quantifind.certification.goal import ANSWERS, answer_of, steps_that_keep
from quantifind.certification.ledger import Look
from quantifind.certification.measures import MEASURES
from quantifind.certification.tails import tail_warning
from quantifind.utils import plugins
from stages.card import export_in_words, file_in_words

# what a quantized tensor becomes: its scheme, bits and options; None stays in float
Choice = Mapping[str, Any] | None


def recommend(
    found: pd.DataFrame,
    uniform: pd.DataFrame,
    choices: Sequence[Mapping[str, Mapping[str, Choice]]],
    *,
    limits: Mapping[str, float],
    budget: Mapping[str, float] | None = None,
    look: Look,
    confidence: float = 0.95,
    control: str | None = None,
    bits_interval: tuple[float, float],
) -> dict[str, Any]:
    """The answer of a search, judged on test data.

    found: of the search's ladder, from most bytes to fewest, the rows of
        `quantifind.workflow.evaluation_workflow.evaluate_strategies`, with the columns of the
        candidates under ``validation_…``; with ``…_look_bound``, the measure's bound at the level
        of the look, ``change_skewness`` and ``examples``.
    uniform: those rows of the uniform depths, with ``…_look_bound``, too.
    choices: of each row of found, "tensors" and "activations", by name the choice.
    limits: what is certified: by measure of `quantifind.certification.measures.MEASURES`, the most
        that it may be.
    budget: what was searched for, if it was no limit.
    look: which one it is of the ladders that were judged on the test split.
    confidence: of all looks together; and of the intervals, and of what is certified alone.
    control: where codes were trained further, what is said of float weights with the same training.
    bits_interval: as `quantifind.certification.resampling.bits_interval` has it, for this look.
    Returns: plain values; ``certified`` is the last strategy of the ladder that passes at the level
    of the look when it is walked from the top, or None; ``certified_alone`` likewise, were this the
    only ladder that was ever judged on the split; ``chosen`` the one chosen on validation data;
    ``step`` the row of the certified one, else of the chosen one.
    """
    steps = steps_that_keep(found, limits, "look_bound")
    alone = steps_that_keep(found, limits)
    uniform = uniform.sort_values("bit_depth", ascending=False)
    depths = steps_that_keep(uniform, limits, "look_bound")
    rows = found.to_dict("records")
    chosen = next(i for i, row in enumerate(rows) if row["validation_chosen"])
    best = steps - 1 if steps else chosen
    return {
        "limit": dict(limits),
        "budget": budget,
        "confidence": confidence,
        "look": {"k": look.k, "level": look.level, "confidence": look.confidence},
        "certified": _facts(rows[best], limits) if steps else None,
        "certified_bits": dict(zip(("low", "high"), map(_known, bits_interval), strict=True)),
        "certified_alone": _facts(rows[alone - 1], limits) if alone else None,
        "chosen": _facts(rows[chosen], limits),
        "control": control if _facts(rows[best], limits)["answer"] == "trained" else None,
        "step": best,
        "certified_uniform_depth": int(uniform["bit_depth"].iloc[depths - 1]) if depths else None,
        **{
            kind: {name: words_of(choice) for name, choice in choices[best][kind].items()}
            for kind in ("tensors", "activations")
        },
    }


def _facts(row: Mapping[Any, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """A judged strategy: its costs, and its degradation on test beside that on validation data; of
    the first measure of the limits flat, of all under ``measures``."""
    measures = {
        name: {
            "value": float(row[name]),
            **{
                end: float(row[f"{name}_{end}"])
                for end in ("low", "high", "bound", "look_bound")
                if f"{name}_{end}" in row
            },
            "on_validation": float(row[f"validation_{name}"]),
        }
        for name in MEASURES
        if name in row and f"validation_{name}" in row
    }
    measure = next(iter(limits))
    first = dict(measures[measure])
    return {
        "mean_bits": float(row["mean_bits"]),
        "model_bytes": int(row["validation_model_bytes"]),
        "compression": 32 / float(row["mean_bits"]),
        **{
            cost: float(row[f"validation_{cost}"])
            for cost in plugins.names("costs")
            if cost != "model_bytes"
        },
        "answer": answer_of(str(row["validation_origin"])),
        "origin": str(row["validation_origin"]),
        "scales_adjusted": bool(row["validation_scales_adjusted"]),
        measure: first.pop("value"),
        **first,
        "validation_gap": measures[measure]["value"] - first["on_validation"],
        "change_skewness": _known(row["change_skewness"]),
        "examples": int(row["examples"]),
        "measures": measures,
        "matched": _matched(row),
    }


def _matched(row: Mapping[Any, Any]) -> dict[str, Any] | None:
    """The ratios to float weights that had the same training, and of these; None where there are
    none."""
    if not math.isfinite(row.get("matched_ratio", math.nan)):
        return None
    return {
        name: {"value": float(row[name])}
        | {end: float(row[f"{name}_{end}"]) for end in ("low", "high", "bound")}
        for name in ("matched_ratio", "control_ratio")
    }


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def words_of(choice: Choice) -> str:
    """A choice in words.

    choice: as `quantifind.strategy.Strategy` has it.

    >>> words_of({"scheme": "uniform", "levels": 3, "axis": 0, "rounding": "learned"})
    'ternary, a scale per channel, learned'
    """
    if choice is None:
        return "float"
    levels = choice.get("levels") or 2 ** choice["bits"]
    width = f"{choice['bits']} bits" if "bits" in choice else f"{levels} levels"
    width = {2: "binary", 3: "ternary"}.get(levels, width)
    scheme = "" if choice["scheme"] == "uniform" else f"{choice['scheme'].replace('_', ' ')}, "
    axis, group = choice.get("axis"), choice.get("group")
    scale = "one scale" if axis is None else "a scale per channel"
    if group is not None:
        scale = f"a scale per {group} values"
    rounding = choice.get("rounding", "nearest").replace("gptq", "GPTQ")
    coded = ", coded" if choice.get("storage") == "coded" else ""
    return f"{scheme}{width}, {scale}, {rounding}{coded}"


def in_words(answer: Mapping[str, Any], name: str) -> str:
    """The recommendation as a page of Markdown.

    answer: what `recommend` returns, and perhaps the ``path`` and ``bytes`` of a ``file``, and by
        kind those of ``exports``, or the ``reason`` why there is none.
    name: of the network.
    """
    measure, best = next(iter(answer["limit"])), answer["certified"]
    what, uniform = MEASURES[measure].words, answer["certified_uniform_depth"]
    lines = [f"# {name}: {limits_in_words(answer['limit'])}", ""]
    if answer["budget"] is not None:
        ((cost, most),) = answer["budget"].items()
        lines += [f"Searched for the least {what} with {cost.replace('_', ' ')} ≤ {most:g}.", ""]
    confidence = f"{sure(answer['look']['confidence'])} confidence"
    if best is None:
        best = answer["chosen"]
        lines.append(
            f"**Nothing is certified** with {confidence} on test data. "
            f"The strategy chosen on validation data, {best['mean_bits']:.3f} bits per parameter, "
            f"{_size(best)}, has a {what} of {_interval(best, measure)} there."
        )
        if answer.get("needed") is not None:
            lines.append(
                f"With about {answer['needed']:,} test examples like these, the first step of the "
                "ladder would be."
            )
    else:
        lines.append(
            f"**{best['mean_bits']:.3f} bits per parameter**, with {confidence}: {_size(best)}, "
            f"{best['compression']:.1f} times smaller than in float32. "
            f"Its {what} on test data is {_interval(best, measure)}, with this confidence at most "
            f"{bound(measure, best['look_bound'])}; on validation data, which chose it, it was "
            f"{amount(measure, best['on_validation'])}."
        )
    lines += ["", f"This answer is {ANSWERS[best['answer']]}."]
    lines += ["", _control(answer["control"], best["matched"])] if answer["control"] else []
    lines += ["", _looks(answer)]
    skewness = best["change_skewness"]
    warning = "" if skewness is None else tail_warning(skewness, best["examples"])
    lines += ["", warning] if warning else []
    lines += ["", file_in_words(answer["file"])] if "file" in answer else []
    for kind, file in answer.get("exports", {}).items():
        lines += ["", export_in_words(kind, file)]
    lines += [
        "",
        "| measure | test data | at most, one-sided | validation data |",
        "|---|---|---|---|",
        *(
            f"| {MEASURES[name].words} | {_interval(found, name)} | {bound(name, found['bound'])} "
            f"| {amount(name, found['on_validation'])} |"
            for name, found in best["measures"].items()
        ),
        "",
        f"With the same bit depth for all tensors, rounded to nearest, "
        f"{'no depth' if uniform is None else f'{uniform} bits'} would be certified.",
        "",
        "| tensor | becomes |",
        "|---|---|",
        *(f"| {tensor} | {words} |" for tensor, words in answer["tensors"].items()),
        *(f"| input of {name} | {words} |" for name, words in answer["activations"].items()),
    ]
    return "\n".join(lines) + "\n"


def _control(said: str, matched: Mapping[str, Mapping[str, float]] | None) -> str:
    """What the same training makes of float weights, and what quantization costs beside them."""
    if matched is None:
        return f"{said}."
    control, ratio = (
        f"{matched[name]['value']:.4g} [{matched[name]['low']:.4g}, {matched[name]['high']:.4g}]"
        for name in ("control_ratio", "matched_ratio")
    )
    return (
        f"{said}; on test data {control}. Beside them, which had all that this answer had but the "
        f"quantization, its loss is **{ratio}** times as large (matched ratio)."
    )


def _looks(answer: Mapping[str, Any]) -> str:
    """How often the test split was looked at, and what the examples that it has by chance do."""
    look, alone, bits = answer["look"], answer["certified_alone"], answer["certified_bits"]
    count = "the first ladder" if look["k"] == 1 else f"ladder number {look['k']}"
    all_looks, this = percent(1 - answer["confidence"]), chance(look["level"])
    plain = "nothing" if alone is None else f"{alone['mean_bits']:.3f} bits (at most "
    plain += "" if alone is None else f"{bound(next(iter(answer['limit'])), alone['bound'])})"
    low, high = ("nothing" if end is None else f"{end:.3f}" for end in (bits["low"], bits["high"]))
    drawn = low if low == high else f"{low} to {high}"
    drawn += "" if high == "nothing" else " bits"
    return (
        f"This is {count} that was judged on this test split: the chance that this certificate is "
        f"wrong is at most {this}, so that of all of them together is at most {all_looks}. Were it "
        f"the only one, {plain} would be certified. Had other examples been drawn for the test "
        f"(bootstrap), {drawn} would be certified in 90 of 100 draws."
    )


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['model_bytes']:,} bytes"


def _interval(row: Mapping[str, Any], measure: str) -> str:
    value = row.get("value", row.get(measure))
    return interval(value, row["low"], row["high"], measure)


def summarize(results: pd.DataFrame, limits: Iterable[float]) -> dict[str, Any]:
    """The answer in few numbers, from a table of `evaluate_strategies`, most bits first.

    Returns: ``float`` criterion and accuracy; ``certified_depth`` by limit, None where not even the
    first strategy passes; ``lowest_scr``, the lowest signal-to-complexity ratio, and the depth that
    has it, None where none has one; the ``criterion_ratio`` and ``relative_error`` of the depths
    2, 4 and 8.
    """
    first = results.iloc[0]
    floats = {"criterion": first["original_criterion"]}
    if "original_accuracy" in results:
        floats["accuracy"] = first["original_accuracy"]
    complexity = results["signal_to_complexity"]
    best = results.iloc[complexity.argmin()] if complexity.notna().any() else None
    shown = results[results["bit_depth"].isin([2, 4, 8])].sort_values("bit_depth")
    by_depth = [f"{depth:g}_bits" for depth in shown["bit_depth"]]
    return {
        "float": floats,
        "certified_depth": {f"at_{limit:g}": certified_depth(results, limit) for limit in limits},
        "lowest_scr": {
            "value": None if best is None else best["signal_to_complexity"],
            "bit_depth": None if best is None else int(best["bit_depth"]),
        },
        "criterion_ratio": dict(zip(by_depth, shown["criterion_ratio"], strict=True)),
        "relative_error": dict(zip(by_depth, shown["relative_error"], strict=True)),
    }


def mark_certified(results: pd.DataFrame, limits: Sequence[float]) -> pd.DataFrame:
    """The table with a column ``certified_at``: the limit that a depth is the lowest certified for.

    It is the lowest limit, where a depth is that of several, and missing elsewhere.

    results: a table of `quantifind.workflow.evaluation_workflow.evaluate_bit_depths`.
    limits: of the criterion ratio.
    """
    certified_at = pd.Series(np.nan, index=results.index)
    for most in sorted(limits, reverse=True):
        certified_at[results["bit_depth"] == certified_depth(results, most)] = most
    return results.assign(certified_at=certified_at)
