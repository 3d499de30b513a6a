"""A choice is checked when it is made, and comes back from JSON."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantifind.tensor.choice import ROUNDINGS, ActivationChoice, Choice, per_tensor
from quantifind.utils import plugins
from quantifind.utils.naming import naming

SCHEMES = plugins.names("schemes")


def choices():
    shared = {
        "bits": st.integers(3, 8),
        "axis": st.none() | st.integers(-2, 2),
        "group": st.none() | st.integers(1, 9),
        "rounding": st.sampled_from(ROUNDINGS),
        "scale_dtype": st.sampled_from(["float16", "float32"]),
        "scale": st.sampled_from(["max_abs", "mse", "weighted_mse", "output_mse"]) | st.just(0.5),
    }
    return st.builds(dict, scheme=st.sampled_from(SCHEMES), **shared)


@given(given=choices())
def test_a_choice_comes_back_from_json(given):
    choice = Choice.of(given)
    plain = json.loads(json.dumps(choice.plain()))
    assert Choice.of(plain) == choice
    assert plain["scheme"] == given["scheme"]
    assert choice.plain().items() <= given.items()
    for name, value in given.items():
        assert plain.get(name, {"rounding": "nearest"}.get(name)) == value
    assert repr(choice).startswith(f"Choice(scheme='{given['scheme']}', bits=")


@given(given=choices())
def test_for_one_axis_nothing_is_asked_of_channels_or_inputs(given):
    choice = per_tensor(Choice.of(given))
    assert choice.axis is choice.group is choice.needs is None
    assert choice.rounding == ("nearest" if given["rounding"] == "gptq" else given["rounding"])
    assert per_tensor(choice) == choice


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 4}, "a choice needs a scheme: codebook, "),
        ({"scheme": "nope"}, "unknown 'nope': quantifind/schemes/ has codebook, "),
        ({"scheme": "uniform", "terms": 2}, "unknown option terms: uniform takes bits, "),
        ({"scheme": "uniform", "axis": True}, "axis is True: whole numbers and None"),
        ({"scheme": "uniform", "rounding": "up"}, "rounding is 'up': nearest, gptq, learned"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, message):
    for kind in (Choice, ActivationChoice):
        with pytest.raises(ValueError, match=message) as caught:
            kind.of(given)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"axis": 0}, "axis: activations have one scale"),
        ({"group": 4}, "group: activations have one scale"),
        ({"percentile": 101}, "percentile is 101: 50 to 100"),
        ({"rounding": "gptq"}, "rounding is 'gptq': activations are rounded to nearest"),
    ],
)
def test_activations_have_one_scale_and_are_rounded_to_nearest(option, message):
    with pytest.raises(ValueError, match=message):
        ActivationChoice.of({"scheme": "uniform", "bits": 4} | option)


def test_a_value_of_another_type_is_named():
    choice = Choice("minifloat", 4, options={"exponent": "two"})
    with pytest.raises(ValueError, match="exponent is 'two'"):
        choice.quantize(torch.ones(3))
    with pytest.raises(ValueError, match="bits stands among the options"):
        Choice("uniform", 4, options={"bits": 8})
    for wrong in (None, 4, "uniform"):
        with pytest.raises(ValueError, match="a choice needs a scheme"):
            Choice.of(wrong)


def test_an_error_keeps_its_cause():
    with pytest.raises(ValueError, match=r"^weight: bits is 40") as caught, naming("weight"):
        Choice("uniform", 40).quantize(torch.ones(3))
    assert isinstance(caught.value.__cause__, ValueError)
