"""The answer of a search, on tables made by hand."""

import json
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantifind.certification.digits import at_most, bound, chance, percent, sure
from quantifind.certification.ledger import Look
from quantifind.certification.measures import MEASURES
from stages.answers import in_words, recommend, words_of
from stages.card import card

UNIFORM = {"scheme": "uniform", "bits": 4, "axis": 0}


LOOK = Look(2, 0.05 / 6)


def judged(bounds, measure="criterion_ratio", chosen=1, apart=0.0, skewness=0.5):
    """A ladder of strategies by their bounds on test data; those of the look are higher."""
    rows = [
        {
            "bit_depth": None,
            "mean_bits": 8.0 - number,
            measure: bound - 0.002,
            f"{measure}_low": bound - 0.005,
            f"{measure}_high": bound + 0.001,
            f"{measure}_bound": bound,
            f"{measure}_look_bound": bound + apart,
            "change_skewness": skewness,
            "examples": 10_000,
            f"validation_{measure}": bound - 0.003,
            "validation_model_bytes": 10_000 - 1_000 * number,
            "validation_bit_operations": 80.0 - number,
            "validation_energy_picojoules": 60.0 - number,
            "validation_origin": f"origin {number}",
            "validation_scales_adjusted": number % 2 == 1,
            "validation_chosen": number == chosen,
        }
        for number, bound in enumerate(bounds)
    ]
    return pd.DataFrame(rows)


def depths(bounds, measure="criterion_ratio"):
    return pd.DataFrame({"bit_depth": bounds.keys(), f"{measure}_look_bound": bounds.values()})


def choices(count):
    return [
        {
            "tensors": {"weight": UNIFORM | {"bits": 8 - number}, "bias": None},
            "activations": {"weight": {"scheme": "uniform", "bits": 8, "zero_point": True}},
        }
        for number in range(count)
    ]


def answer_of(
    bounds,
    *,
    uniform=None,
    limit=1.01,
    measure="criterion_ratio",
    chosen=1,
    interval=(2.0, 6.0),
    **how,
):
    uniform = {8: limit, 4: limit + 1} if uniform is None else uniform
    return recommend(
        judged(bounds, measure, chosen, **how),
        depths(uniform, measure),
        choices(len(bounds)),
        limits={measure: limit},
        look=LOOK,
        bits_interval=interval,
    )


@pytest.mark.parametrize(
    ("bounds", "certified"),
    [
        ([1.0, 1.005, 1.009], 2),
        ([1.0, 1.01, 1.011], 1),
        ([1.0, 1.02, 1.0], 0),  # what passes after a failure doesn't count
        ([1.0, 1.005, 1.02, 1.0, 1.0], 1),
        ([1.02, 1.0, 1.0], None),
        ([float("nan"), 1.0], None),
        ([1.0, float("nan"), 1.0], 0),
        ([1.0, float("inf")], 0),
    ],
)
def test_the_last_one_passed_is_certified(bounds, certified):
    answer = answer_of(bounds)
    best = 1 if certified is None else certified  # the chosen one
    assert answer["tensors"] == {
        "weight": f"{8 - best} bits, a scale per channel, nearest",
        "bias": "float",
    }
    assert answer["activations"] == {"weight": "8 bits, one scale, nearest"}
    if certified is None:
        assert answer["certified"] is None
    else:
        assert answer["certified"] == {
            "mean_bits": 8.0 - best,
            "model_bytes": 10_000 - 1_000 * best,
            "compression": 32 / (8 - best),
            "bit_operations": 80.0 - best,
            "energy_picojoules": 60.0 - best,
            "answer": "as_is",
            "origin": f"origin {best}",
            "scales_adjusted": best % 2 == 1,
            "criterion_ratio": pytest.approx(bounds[best] - 0.002),
            "low": pytest.approx(bounds[best] - 0.005),
            "high": pytest.approx(bounds[best] + 0.001),
            "bound": bounds[best],
            "look_bound": bounds[best],
            "change_skewness": 0.5,
            "examples": 10_000,
            "on_validation": pytest.approx(bounds[best] - 0.003),
            "validation_gap": pytest.approx(0.001),
            "measures": {
                "criterion_ratio": {
                    "value": pytest.approx(bounds[best] - 0.002),
                    "low": pytest.approx(bounds[best] - 0.005),
                    "high": pytest.approx(bounds[best] + 0.001),
                    "bound": bounds[best],
                    "look_bound": bounds[best],
                    "on_validation": pytest.approx(bounds[best] - 0.003),
                }
            },
            "matched": None,
        }


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_chosen_one_stands_beside_the_certified(chosen):
    answer = answer_of([1.0, 1.005, 1.03], chosen=chosen)
    assert answer["chosen"]["model_bytes"] == 10_000 - 1_000 * chosen
    assert answer["certified"]["model_bytes"] == 9_000


@pytest.mark.parametrize(
    ("bounds", "depth"),
    [
        ({8: 1.0, 6: 1.005, 5: 1.03, 4: 1.0}, 6),
        ({4: 1.0, 5: 1.03, 6: 1.005, 8: 1.0}, 6),
        ({8: 1.03, 4: 1.0}, None),
        ({}, None),
    ],
)
def test_uniform_depths_are_walked_alike(bounds, depth):
    assert answer_of([1.0, 1.0], uniform=bounds)["certified_uniform_depth"] == depth


def test_uniform_depths_are_judged_at_the_level_of_the_ladder():
    """Not at that of one look, beside which the search would seem to gain less than it does."""
    ladder, rows = judged([1.001], chosen=0), pd.DataFrame({"bit_depth": [8, 4]})
    rows["criterion_ratio_bound"], rows["criterion_ratio_look_bound"] = 1.0, [1.001, 1.02]
    how = {"limits": {"criterion_ratio": 1.01}, "look": LOOK, "bits_interval": (2.0, 6.0)}
    assert recommend(ladder, rows, choices(1), **how)["certified_uniform_depth"] == 8


CERTIFIED = [[1.0, 1.005, 1.03], [1.02, 1.0]]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bounds", CERTIFIED)
def test_plain_values_that_say_the_same_as_the_words(measure, bounds):
    shift = 1 - MEASURES[measure].lossless
    limit = 1.01 - shift
    answer = answer_of([bound - shift for bound in bounds], measure=measure, limit=limit)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["limit"] == {measure: limit}
    page = in_words(answer, "my_net")
    best = answer["certified"] or answer["chosen"]
    assert page.startswith(f"# my_net: {MEASURES[measure].words} at most {told(measure, limit)}\n")
    for figure in (
        f"{best['model_bytes']:,} bytes",
        "99.16% confidence",
        "This is ladder number 2 that was judged on this test split: the chance that this "
        "certificate is wrong is at most 0.8334%",
        "of all of them together is at most 5%",
        "(bootstrap), 2.000 to 6.000 bits would be certified in 90 of 100",
        f"{told(measure, best[measure])} [{told(measure, best['low'])}, "
        f"{told(measure, best['high'])}]",
        "8 bits would be certified",
        "| bias | float |",
    ):
        assert figure in page
    if answer["certified"]:
        assert f"**{best['mean_bits']:.3f} bits per parameter**" in page
        assert f"{best['compression']:.1f} times smaller" in page
        assert f"at most {told(measure, best['look_bound'])}; on validation" in page
        assert f"it was {told(measure, best['on_validation'])}" in page
    else:
        assert "**Nothing is certified**" in page
        assert "times smaller" not in page
    assert all(f"| {name} | {words} |" in page for name, words in answer["tensors"].items())
    assert page.endswith("|\n")


@pytest.mark.parametrize(
    ("apart", "certified", "alone"),
    [(0.0, 2, 2), (0.002, 1, 2), (0.006, 0, 2), (0.02, None, 2)],
)
def test_the_answer_of_one_look_stands_beside_that_of_this_one(apart, certified, alone):
    """The certified one has the bound of the look within the limit, the other the plain one."""
    answer = answer_of([1.0, 1.005, 1.009], apart=apart)
    assert answer["look"] == {"k": 2, "level": LOOK.level, "confidence": LOOK.confidence}
    page = in_words(answer, "net")
    assert answer["certified_alone"]["mean_bits"] == 8.0 - alone
    assert (
        f"Were it the only one, {8.0 - alone:.3f} bits (at most 1.009) would be certified" in page
    )
    if certified is None:
        assert answer["certified"] is None
    else:
        assert answer["certified"]["mean_bits"] == 8.0 - certified
        assert f"**{8.0 - certified:.3f} bits per parameter**" in page


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((1.94, 3.731), "1.940 to 3.731 bits"),
        ((1.94, math.inf), "1.940 to nothing"),
        ((math.inf, math.inf), "nothing"),
        ((3.0, 3.0), "3.000 bits"),
    ],
)
def test_the_interval_of_the_bits_in_words(interval, words):
    answer = answer_of([1.0, 1.0], interval=interval)
    assert list(answer["certified_bits"].values()) == [
        None if end == math.inf else end for end in interval
    ]
    assert f"(bootstrap), {words} would be certified" in in_words(answer, "net")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("diverged", [True, False])
def test_what_was_trained_stands_beside_its_control(trained, diverged):
    found = judged([1.0, 1.005], chosen=1)
    found["validation_origin"] = ["sequential", "trained 12 epochs" if trained else "allocated"]
    if not diverged:
        for name, value in (("matched_ratio", 1.091), ("control_ratio", 0.841)):
            for end, away in (("", 0.0), ("_low", -0.05), ("_high", 0.05), ("_bound", 0.04)):
                found[f"{name}{end}"] = [math.nan, value + away if trained else math.nan]
    answer = recommend(
        found,
        depths({8: 1.0}),
        choices(2),
        limits={"criterion_ratio": 1.01},
        look=LOOK,
        control="What the control has",
        bits_interval=(2.0, 6.0),
    )
    page = in_words(json.loads(json.dumps(answer)), "net")
    assert ("What the control has" in page) == trained
    both = "on test data 0.841 [0.791, 0.891]", "**1.091 [1.041, 1.141]**"
    assert all((words in page) == (trained and not diverged) for words in both)


@pytest.mark.parametrize("skewness", [0.5, -20.0, 9.5, math.nan])
def test_a_tail_is_warned_of(skewness):
    page = in_words(answer_of([1.0, 1.0], skewness=skewness), "net")
    assert ("Few examples carry the change" in page) == (abs(skewness) > 9.1)


def test_nothing_would_be_certified_alone():
    assert "nothing would be certified" in in_words(answer_of([1.02, 1.0]), "net")


def test_no_uniform_depth_in_words():
    page = in_words(answer_of([1.0, 1.0], uniform={8: 2.0}), "net")
    assert "no depth would be certified" in page


def test_activations_stand_on_the_page():
    page = in_words(answer_of([1.0, 1.0]), "net")
    assert "8 bits, one scale, nearest" in page


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (None, "float"),
        ({"scheme": "uniform", "bits": 4}, "4 bits, one scale, nearest"),
        ({"scheme": "uniform", "bits": 4, "axis": None}, "4 bits, one scale, nearest"),
        ({"scheme": "uniform", "bits": 4, "axis": 0}, "4 bits, a scale per channel, nearest"),
        (
            {"scheme": "uniform", "bits": 2, "axis": 0, "rounding": "gptq"},
            "2 bits, a scale per channel, GPTQ",
        ),
        ({"scheme": "uniform", "bits": 1, "axis": 1}, "binary, a scale per channel, nearest"),
        ({"scheme": "uniform", "levels": 2}, "binary, one scale, nearest"),
        ({"scheme": "uniform", "levels": 3}, "ternary, one scale, nearest"),
        (
            {"scheme": "uniform", "bits": 3, "axis": 0, "group": 64},
            "3 bits, a scale per 64 values, nearest",
        ),
        ({"scheme": "uniform", "bits": 3, "group": 64}, "3 bits, a scale per 64 values, nearest"),
        ({"scheme": "codebook", "bits": 3}, "codebook, 3 bits, one scale, nearest"),
        ({"scheme": "codebook", "levels": 3}, "codebook, ternary, one scale, nearest"),
        ({"scheme": "minifloat", "bits": 8}, "minifloat, 8 bits, one scale, nearest"),
        (
            {"scheme": "power_of_two", "bits": 4, "axis": 0, "rounding": "learned"},
            "power of two, 4 bits, a scale per channel, learned",
        ),
    ],
    ids=str,
)
def test_choices_in_words(choice, words):
    assert words_of(choice) == words


def test_a_number_of_levels_is_not_one_of_bits():
    assert "5 levels" in words_of({"scheme": "uniform", "levels": 5})


def test_the_card_says_what_the_file_is_and_how_to_load_it():
    answer = answer_of([1.0, 1.005, 1.009])
    file = {"path": "out/network.safetensors", "bytes": answer["certified"]["model_bytes"] + 321}
    file |= {"packed": 7001, "coded": 6002}
    exports = {
        "onnx": {"path": "out/exports/network.onnx", "bytes": 1234},
        "pt2": {"reason": "the network can't be traced"},
    }
    bare = in_words(answer, "net")
    whole = answer | {"file": file, "exports": exports}
    page, words = card(whole, "net", bare), in_words(whole, "net")
    assert answer["step"] == 2
    assert 'quantifind.load("network.safetensors", net)' in page
    assert 'quantifind.load("out/network.safetensors", net)' in words
    assert f"{file['bytes']:,} bytes" in words
    assert "a header of 321" in page
    assert '`exports/network.onnx`, 1,234 bytes: `onnxruntime.InferenceSession("exports/' in page
    assert '1,234 bytes: `onnxruntime.InferenceSession("out/exports/network.onnx")`' in words
    for text in (page, words):
        assert "There is no .pt2 of it: the network can't be traced." in text
    assert all(line in page for line in bare.splitlines()[2:])
    assert "codes packed it takes 7,001 bytes, coded 6,002" in words
    assert answer_of([1.02, 1.0])["step"] == 1


def told(measure, value):
    """With its unit, four digits."""
    if measure not in ("accuracy_drop", "flips"):
        return f"{value:.4g}"
    shown = f"{round(100 * value, 10) + 0.0:.4g}"
    if measure == "flips":
        return f"{shown}%"
    return f"{shown} point" if shown == "1" else f"{shown} points"


@given(st.sampled_from(["accuracy_drop", "flips"]), st.floats(1e-6, 1))
def test_a_bound_in_hundredths_is_not_surer_than_it_is(measure, value):
    shown = bound(measure, value)
    assert float(shown.split()[0].rstrip("%")) >= 100 * value * (1 - 1e-11)
    assert bound(measure, math.nan) == "not known"


@given(st.floats(1e-300, 1e6))
def test_what_is_shown_is_not_surer_than_it_is(bound):
    near = 1e-11 * bound
    for value in (bound, -bound):
        assert value - near <= float(at_most(value)) <= value + 1.1e-3 * bound
    confidence = 1 - 1 / (1 + bound)
    shown = float(sure(confidence).removesuffix("%"))
    assert 0.998 * 100 * confidence <= shown <= 100 * confidence * (1 + 1e-11)
    share = 1 / (1 + bound)
    assert float(chance(share).removesuffix("%")) >= 100 * share * (1 - 1e-11) > 0


@given(st.floats(-10, 1e9), st.integers(2, 4))
def test_a_share_in_hundredths_has_no_exponent_and_is_not_rounded_to_all(share, digits):
    shown = percent(share, digits)
    assert "e+" not in shown
    assert share >= 1 or share < 0 or shown != "100%"
    value = float(shown.strip(">%").replace(",", ""))
    assert value == pytest.approx(100 * share, rel=0.06, abs=1e-6)


def test_digits_that_are_known_stay():
    assert [at_most(bound) for bound in (1.01, 1.0052, 0.0)] == ["1.01", "1.006", "0"]
    assert [at_most(bound) for bound in (None, math.nan, math.inf)] == ["not known"] * 3
    assert all(sure(c / 1000) == f"{c / 10:g}%" for c in range(900, 1000))
    assert [chance((1 - 0.95) / n) for n in (2, 20)] == ["2.5%", "0.25%"]
    assert sure(0.9975) == "99.75%"
