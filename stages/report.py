"""The report: one page that answers, without a request, made from tables alone."""

import shlex
from dataclasses import asdict
from typing import Any

from quantifind.certification import digits
from quantifind.certification.digits import amount, sure
from quantifind.certification.goal import ANSWERS, answer_of
from quantifind.certification.measures import MEASURES
from stages import (
    files,
    findings,
    report_changed,
    report_charts,
    report_judged,
    report_tensors,
)
from stages.card import export_in_words, file_in_words
from stages.charts import SIZES
from stages.evidence import Evidence
from stages.pages import render
from stages.params import Params

# of the table of tensors: key in its rows, words, whether it is a number
COLUMNS = (
    ("place", "#", True),
    ("name", "tensor", False),
    ("values", "values", True),
    ("share", "share", True),
    ("bits", "bits", True),
    ("bytes", "bytes", True),
    ("becomes", "becomes", False),
)


def report(evidence: Evidence, params: Params) -> str:
    """The page, as HTML.

    evidence: what a run left.
    params: that it ran with.
    """
    tensors = evidence.tensors
    sensitivity = evidence.tables["sensitivity"]
    shown = report_charts.predicted(evidence)
    context = {
        "name": params.model,
        "bits": evidence.best["mean_bits"],
        "certified": evidence.answer["certified"] is not None,
        "mark": report_charts.mark(evidence)[0],
        "confidence": sure(evidence.answer["confidence"]),
        "look_confidence": sure(evidence.answer["look"]["confidence"]),
        "answer": findings.answer(evidence, params.model),
        "numbers": _numbers(evidence),
        "kind": ANSWERS[answer_of(evidence.best["origin"])],
        "control": _control(evidence),
        "by_answer": _by_answer(evidence),
        "headings": {
            "frontier": findings.frontier(evidence),
            "where": findings.where(tensors),
            "tensors": findings.tensors(tensors),
            "sensitivity": findings.sensitivity(sensitivity),
            "prediction": findings.prediction(shown),
            "changed": findings.changed(evidence),
            "judged": findings.judged(evidence),
        },
        "frontier": {size: report_charts.frontier(evidence, size) for size in SIZES},
        "drawn": findings.drawn(evidence),
        "measure": MEASURES[evidence.measure],
        "ladder": _ladder(evidence),
        "strip": report_tensors.strip(tensors),
        "grid": report_tensors.heat(sensitivity, tensors),
        "tensors": report_tensors.rows_of(tensors),
        "columns": COLUMNS,
        "prediction": {size: report_charts.prediction(evidence, size) for size in SIZES}
        if len(shown)
        else None,
        "marked": bool(shown["marked"].any()),
        "origins": sorted(set(shown["origin"].str.split().str[0])) if len(shown) else [],
        "changed": report_changed.examples(evidence.tables["changed"]),
        "changed_note": report_changed.note(evidence.tables["changed"]),
        "judged": report_judged.judged(evidence, params),
        "meaning": report_judged.meaning(evidence),
        "others": report_judged.other_limits(evidence),
        "parameters": _parameters(evidence, params),
        "words": report_judged.GLOSSARY,
        "versions": dict(evidence.versions),
        "file": str(files.SAVED),
        "kept": _kept(evidence),
        "command": f"dvc exp run -S {shlex.quote(f'model={params.model}')}",
    }
    return render("report.html", context)


def _numbers(evidence: Evidence) -> list[dict[str, str]]:
    """The three that answer: bits, bytes, and what is lost."""
    best, look, bits = evidence.best, evidence.answer["look"], evidence.answer["certified_bits"]
    measure = evidence.measure
    drawn = [digits.number(end) for end in (bits["low"], bits["high"])]
    drawn = ["nothing" if end == digits.UNKNOWN else end for end in drawn]
    return [
        {
            "value": f"{best['mean_bits']:.3f}",
            "what": "bits per parameter",
            "more": "scales and padding counted; had other examples been drawn for the test: "
            f"{drawn[0]} to {drawn[1]} in 90 of 100 draws",
        },
        {
            "value": f"{best['compression']:.1f} ×",
            "what": "smaller than float32",
            "more": f"{digits.number(best['model_bytes'])} bytes of "
            f"{digits.number(round(best['model_bytes'] * best['compression']))}",
        },
        {
            # as many digits as its interval has; none of what is no number
            "value": f"{best[measure]:#.4g}"
            if not MEASURES[measure].hundredths and digits.is_number(best[measure])
            else amount(measure, best[measure]),
            "what": MEASURES[measure].words
            + ("" if MEASURES[measure].hundredths else f" {MEASURES[measure].unit}"),
            "more": f"{sure(evidence.answer['confidence'])} interval "
            f"{amount(measure, best['low'])} to {amount(measure, best['high'])}; with "
            f"{sure(look['confidence'])} confidence at most "
            f"{digits.bound(measure, best['look_bound'])}, the limit is "
            f"{digits.limit(measure, evidence.limits[measure])}",
        },
    ]


def _control(evidence: Evidence) -> str | None:
    """What float weights that had the same training reach, where that was done."""
    said, matched = evidence.answer["control"], evidence.best.get("matched")
    if said is None or matched is None:
        return said if said is None else f"{said}."
    ratio, control = (
        digits.interval(*(matched[name][end] for end in ("value", "low", "high")))
        for name in ("matched_ratio", "control_ratio")
    )
    beside = f"Beside them this network's loss is {ratio} times as large."
    return f"{said}; on test data {control}. {beside}"


def _by_answer(evidence: Evidence) -> list[dict[str, str]]:
    """Of each kind of answer the certified step with the fewest bytes, or that there is none."""
    frontier = evidence.tables["frontier"]
    kinds = frontier["validation_origin"].map(answer_of)
    rows = []
    for kind, words in findings.KINDS.items():
        of_kind = frontier[kinds == kind]
        kept = of_kind[of_kind.index < evidence.kept]
        said = (
            "not tried, or not on the ladder"
            if of_kind.empty
            else "on the ladder, but not certified"
        )
        row = {"words": words, "bits": "none", "bytes": "–", "size": "–", "lost": said}
        if len(kept):
            best = kept.iloc[-1]
            row |= {"bits": f"{best['mean_bits']:.3f}", "lost": _lost(best, evidence.measure)}
            row |= {"bytes": digits.number(best.get("validation_model_bytes"))}
            row |= {"size": f"{32 / best['mean_bits']:.1f} ×"}
        rows.append(row)
    return rows


def _lost(row: Any, measure: str) -> str:
    value, low, high = (row[f"{measure}{end}"] for end in ("", "_low", "_high"))
    return digits.interval(value, low, high, measure)


def _kept(evidence: Evidence) -> list[str]:
    """Where the network is, in words."""
    file, exports = evidence.answer.get("file"), evidence.answer.get("exports", {})
    said = [] if file is None else [file_in_words(file)]
    said += [export_in_words(kind, other) for kind, other in exports.items()]
    return [words.replace("`", "") for words in said]


def _ladder(evidence: Evidence) -> list[dict[str, Any]]:
    """Each step in numbers."""
    measure, kept = evidence.measure, evidence.kept
    return [
        {
            "bits": f"{row['mean_bits']:.3f}",
            "bytes": digits.number(row.get("validation_model_bytes")),
            "kind": findings.kind(row),
            "lost": _lost(row, measure),
            "bound": digits.bound(measure, row[f"{measure}_look_bound"]),
            "certified": "yes" if place < kept else "no",
            "best": place == evidence.step,
        }
        for place, row in enumerate(evidence.tables["frontier"].to_dict("records"))
    ]


def _parameters(evidence: Evidence, params: Params) -> list[tuple[str, str]]:
    """By key of params.yaml what the run was given, and the limit that it had by default."""
    search = asdict(params.search)
    if search["limit"] is None and search["budget"] is None:
        search["limit"] = f"the default: {digits.limits_in_words(evidence.limits)}"
    sections = {
        "": {"model": params.model, "seed": params.seed},
        f"models.{params.model}.": asdict(params.entry),
        "quantize.": asdict(params.quantize),
        "search.": search,
        "evaluate.": asdict(params.evaluate),
    }
    return [
        (f"{section}{key}", "–" if value is None else f"{value}")
        for section, values in sections.items()
        for key, value in values.items()
    ]
