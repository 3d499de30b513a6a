"""Choices are data that JSON holds, and are refused in one line when they are made."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.choice import ROUNDINGS, ActivationChoice, Choice
from quantifind.utils import plugins
from quantifind.utils.naming import naming

GRID = {
    "scale": st.sampled_from(["max_abs", "mse", "weighted_mse", "output_mse"]) | st.floats(0, 1e9),
    "scale_dtype": st.sampled_from([None, "float16", "power_of_two"]),
}
# by scheme what is there besides the fields
OPTIONS = {
    "uniform": GRID | {"half_integer": st.sampled_from([None, True]), "zero_point": st.booleans()},
    "minifloat": GRID | {"exponent": st.integers(1, 8), "specials": st.sampled_from(["none"])},
    "power_of_two": GRID | {"terms": st.integers(1, 7)},
    "codebook": GRID | {"centres": st.sampled_from(["k_means", "normal", "weighted_k_means"])},
}
MADE = st.one_of(
    st.fixed_dictionaries(
        {"scheme": st.just(scheme)},
        optional={
            "bits": st.none() | st.integers(1, 32),
            **({"levels": st.integers(2, 2**32)} if scheme in ("uniform", "codebook") else {}),
            **OPTIONS.get(scheme, {}),
        },
    )
    for scheme in plugins.names("schemes")
)
SHARING = st.fixed_dictionaries(
    {},
    optional={
        "axis": st.none() | st.integers(-3, 3),
        "group": st.none() | st.integers(1, 64),
        "rounding": st.sampled_from(ROUNDINGS),
    },
)


def through_json(values):
    return json.loads(json.dumps(values))


@given(made=MADE, sharing=SHARING)
def test_a_choice_comes_back_through_json(made, sharing):
    choice = Choice.of(made | sharing)
    assert Choice.of(through_json(choice.plain())) == choice
    assert Choice.of(choice) == choice
    both = Strategy({"weight": choice, "bias": None})
    assert Strategy(**through_json(both.choices)) == both


@given(made=MADE, percentile=st.floats(50, 100) | st.integers(50, 100))
def test_an_activations_choice_comes_back_through_json(made, percentile):
    choice = ActivationChoice.of(made | {"percentile": percentile})
    assert ActivationChoice.of(through_json(choice.plain())) == choice
    both = Strategy({}, {"weight": choice, "product.0.left": None})
    assert Strategy(**through_json(both.choices)) == both


WRONG = [
    ({"rounding": "up"}, "rounding is 'up': nearest, gptq, learned are allowed"),
    ({"rounding": None}, "rounding is None: nearest, gptq, learned are allowed"),
    ({"axis": 0.5}, "axis is 0.5: whole numbers and None are allowed"),
    ({"axis": True}, "axis is True: whole numbers and None are allowed"),
    ({"group": "2"}, "group is '2': whole numbers and None are allowed"),
    ({"colour": 1, "axsi": 0}, r"unknown option axsi, colour: \w+ takes bits"),
    ({"percentile": 99}, r"unknown option percentile: \w+ takes bits"),
    ({"scheme": "unifrom"}, "unknown 'unifrom': quantifind/schemes/ has codebook, minifloat"),
    ({"scheme": 4}, "scheme is 4: codebook, .*, or a dotted path, are allowed"),
]
WRONG_ACTIVATION = [
    *(case for case in WRONG if "percentile" not in case[0]),
    *(
        ({"percentile": value}, f"percentile is {value!r}: 50 to 100 are allowed")
        for value in (20, 100.5, "99", True, None)
    ),
    ({"axis": 0}, "axis: activations have one scale each"),
    ({"group": 2}, "group: activations have one scale each"),
    ({"rounding": "gptq"}, "rounding is 'gptq': activations are rounded to nearest"),
]


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        *((Choice, *case) for case in WRONG),
        *((ActivationChoice, *case) for case in WRONG_ACTIVATION),
    ],
)
@given(made=MADE)
def test_a_choice_that_cannot_be_says_why_in_one_line(kind, wrong, message, made):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        kind.of(made | wrong)
    assert len(str(caught.value).splitlines()) == 1
    field, prefix = ("tensors", "a") if kind is Choice else ("activations", "activations of a")
    with pytest.raises(ValueError, match=f"^{prefix}: {message}"):
        Strategy(**{field: {"a": made | wrong}})


@pytest.mark.parametrize("values", [{}, {"bits": 4}, 4, "uniform", None, []])
def test_what_names_no_scheme_is_no_choice(values):
    with pytest.raises(ValueError, match=r"^a choice needs a scheme: codebook, minifloat"):
        Choice.of(values)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"scheme": "minifloat"}, r"weight: {'scheme': 'minifloat'} can't be: .*'bits'"),
        ({"scheme": "uniform", "bits": 4, "scale_dtype": []}, r"weight: scale_dtype is \[\]"),
        (
            {"scheme": "uniform", "bits": 4, "scale": "weighted_mse", "importance": "x"},
            "weight: {'scheme': .* can't be: ",
        ),
    ],
)
def test_a_value_of_another_type_is_named_in_one_line(choice, message):
    strategy = Strategy({"weight": choice})
    with pytest.raises(ValueError, match=message) as caught:
        quantize(nn.Linear(3, 2, bias=False), strategy, [(torch.ones(2, 3),)])
    assert len(str(caught.value).splitlines()) == 1


def test_naming_keeps_the_cause():
    error = ValueError("bits is 40")
    pattern = r"^net: weight: bits is 40$"
    with pytest.raises(ValueError, match=pattern) as caught, naming("net"), naming("weight"):
        raise error
    assert str(caught.value.__cause__) == "weight: bits is 40"
    assert caught.value.__cause__.__cause__ is error
    with pytest.raises(KeyError), naming("weight"):  # of another kind, an error stays as it is
        raise KeyError("bits")


def test_the_cause_of_a_tensors_error_is_that_of_its_scheme():
    strategy = Strategy({"weight": {"scheme": "uniform", "bits": 40}})
    with pytest.raises(ValueError, match=r"^weight: bits is 40") as caught:
        quantize(nn.Linear(3, 2, bias=False), strategy)
    assert str(caught.value.__cause__).startswith("bits is 40")
