"""What the report says of how the answer was judged, and of what other limits would have given."""

from typing import Any

from quantifind.certification import digits
from quantifind.certification.digits import chance
from quantifind.certification.goal import steps_that_keep
from quantifind.certification.measures import MEASURES
from stages.evidence import Evidence
from stages.params import Params

# words of this field, and of this page, that a reader may not know
GLOSSARY = {
    "ladder": "the strategies that test data judge, fixed before on validation data, from most "
    "bytes to fewest; each is a step. The walk down it ends at the first that is not certified.",
    "certified": "with the confidence that is said, what is lost on data like the test data is at "
    "most the limit.",
    "bound": "the most that is lost, with that confidence; the interval beside a value has two "
    "ends.",
    "look": "one ladder judged on a test split. Who looks often finds luck, so each look has less "
    "chance to err than the one before it.",
    "as it is": "rounded with the help of training inputs; nothing was trained.",
    "following": "its codes were trained to follow the float network's outputs, without labels.",
    "trained further": "its codes were trained on labels, too: beside it stands a float network "
    "that had the same training.",
    "uniform": "about the same bits for all tensors: candidates of the search, unlike the plain "
    "rounding of the chart.",
    "allocated": "bits by tensor, from what each costs alone.",
    "sequential": "rounded layer by layer, each on inputs from those before it, already rounded.",
    "nearest, GPTQ": "to the nearest level; or so that later weights make up for the error of "
    "earlier ones (arXiv:2210.17323).",
    "1.6 bits": "three levels: five of them fit in a byte.",
}
# other limits, as multiples of what the asked one allows to be lost
TIMES = (0.1, 0.5, 1, 2, 5, 10)


def meaning(evidence: Evidence) -> str:
    """What the limits are of, in sentences."""
    return " ".join(
        f"{one.words.capitalize()}: {one.meaning}."
        for one in (MEASURES[name] for name in evidence.limits)
    )


def judged(evidence: Evidence, params: Params) -> list[tuple[str, str]]:
    """How the answer was judged, by what."""
    best, found = evidence.best, evidence.answer
    row = evidence.tables["frontier"].iloc[evidence.step]
    look, alone = found["look"], found["certified_alone"]
    data, steps = params.entry.data, len(evidence.tables["frontier"])
    facts = [
        ("limits", digits.limits_in_words(evidence.limits)),
        ("against", f"the float network that was quantized: {_did(row, 'original_')}"),
        ("this network", _did(row, "")),
        ("chosen on", f"{digits.number(row.get('validation_examples'))} validation examples"),
        ("judged on", f"{digits.number(best['examples'])} test examples, which chose nothing"),
        ("data", f"{data}, split into training, validation and test examples"),
        (
            "look",
            f"number {look['k']}: so many ladders were judged on these test examples, and each "
            "gets a smaller part of the chance to err, the k-th one k(k + 1)th of it. That this "
            f"certificate is wrong has a chance of at most {chance(look['level'])}, all of them "
            f"together of {digits.percent(1 - found['confidence'])}",
        ),
        *(
            (
                MEASURES[name].words,
                f"{digits.interval(m['value'], m['low'], m['high'], name)} on test data, "
                f"{digits.amount(name, m['on_validation'])} on validation data"
                + (f"; bound {digits.bound(name, m['look_bound'])}" if "look_bound" in m else ""),
            )
            for name, m in best["measures"].items()
        ),
        (
            "were it the only look",
            "nothing would be certified"
            if alone is None
            else f"{alone['mean_bits']:.3f} bits would be certified",
        ),
        (
            "certificate",
            f"{'step 1' if evidence.kept == 1 else f'steps 1 to {evidence.kept}'} of the ladder's "
            f"{steps}, walked from most bytes to fewest"
            + ("" if evidence.kept == steps else f"; step {evidence.kept + 1}: {_above(evidence)}")
            if evidence.kept
            else f"none: step 1 of the ladder's {steps}: {_above(evidence)}",
        ),
    ]
    for cost, most in (found.get("budget") or {}).items():
        words = f"the least loss with {cost.replace('_', ' ')} ≤ {most:g}"
        facts.insert(0, ("searched for", words))
    return facts


def _above(evidence: Evidence) -> str:
    """Which bounds of the first step that is not certified are above their limits."""
    row = evidence.tables["frontier"].iloc[evidence.kept]
    bounds = {name: row[f"{name}_look_bound"] for name in evidence.limits}
    return ", ".join(
        f"{MEASURES[name].words} "
        + (f"may be up to {digits.bound(name, most)}" if digits.is_number(most) else "has no bound")
        for name, most in bounds.items()
        if not most <= evidence.limits[name]
    )


def _did(row: Any, which: str) -> str:
    """The loss and the accuracy of one of the two networks on test data."""
    said = [f"loss {digits.number(row.get(f'{which}criterion'))}"]
    if digits.is_number(row.get(f"{which}accuracy")):
        said.append(f"accuracy {digits.percent(row[f'{which}accuracy'], 4)}")
    return f"{' and '.join(said)} on test data"


def other_limits(evidence: Evidence) -> dict[str, Any]:
    """What this ladder, and one width for all, would have given for other limits of the first
    measure, each as if it had been asked for."""
    measure, asked = evidence.measure, evidence.limits
    lossless = MEASURES[measure].lossless
    ladder, uniform = evidence.tables["frontier"], evidence.tables["bit_depths"]
    uniform = uniform.sort_values("bit_depth", ascending=False)
    rows = []
    # a limit of nothing lost has no multiples
    for times in TIMES if asked[measure] > lossless else (1,):
        limits = {**asked, measure: lossless + times * (asked[measure] - lossless)}
        kept = steps_that_keep(ladder, limits, "look_bound")
        depths = 0
        if all(f"{name}_look_bound" in uniform for name in limits):
            depths = steps_that_keep(uniform, limits, "look_bound")
        rows.append(
            {
                "limit": digits.limit(measure, round(limits[measure], 10)),
                "asked": times == 1,
                "bits": f"{ladder['mean_bits'].iloc[kept - 1]:.3f}" if kept else "none",
                "depth": f"{uniform['bit_depth'].iloc[depths - 1]:g}" if depths else "none",
            }
        )
    beside = {name: limit for name, limit in asked.items() if name != measure}
    return {"rows": rows, "beside": digits.limits_in_words(beside) if beside else ""}
