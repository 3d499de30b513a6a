"""What a search found can be read: in a line, in a terminal, in a notebook."""

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from quantifind import find_strategy
from quantifind.mixed_precision.shown import LISTED
from quantifind.schemes import uniform
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.loaders import Tensors, create_dataloaders

HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'</script>"
KNOWN = {"div", "p", "code", "svg", "path", "text", "tspan", "circle", "title"}


@pytest.fixture(scope="module", params=["limit", "budget"])
def found(request):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(400, 6)
    train, val, _ = create_dataloaders(Tensors(inputs, inputs[:, :3].argmax(1)))
    goal = {"limit": {"limit": 3.0}, "budget": {"budget": 8.0}}[request.param]
    return find_strategy(net, train, val, nn.CrossEntropyLoss(), widths=[3, 8], effort=60, **goal)


def of(found, names):
    """The same answer of other tensors."""
    values = {name: torch.randn(1 + place) for place, name in enumerate(names)}
    tensors = {name: uniform.quantize(v, 2 + len(name) % 5) for name, v in values.items()}
    choices = {name: {"scheme": "uniform", "bits": 2 + len(name) % 5} for name in names}
    return replace(found, strategy=Strategy(choices), quantized=Quantized(tensors))


@pytest.mark.parametrize(
    "names",
    [["weight"], [f"layer.{n}.weight" for n in range(200)], ["deep." * 24 + "w", "b"], [HOSTILE]],
    ids=["one", "200", "long", "html"],
)
def test_an_answer_is_read_whatever_its_tensors_are(found, names):
    one = of(found, names)
    lines = repr(one).splitlines()
    assert f"{found.mean_bits:.4g} bits per parameter" in lines[0]
    assert len(lines) == 2 + min(len(names), LISTED) + (len(names) > LISTED)
    assert all(len(line) <= 110 for line in lines[1:-1])
    page = ElementTree.fromstring(one._repr_html_())  # every tag is closed, every name escaped
    words = "".join(page.itertext())
    assert f"{found.mean_bits:.4g} bits per parameter" in words
    assert {tag.tag for tag in page.iter()} <= KNOWN
    shown = [tag.get("title") for tag in page.iter("div") if tag.get("title")]
    assert [title.rpartition(": ")[0] for title in shown] == names
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_tensors_in_float_are_counted(found):
    names = ["a", "b"]
    one = of(found, names)
    one = replace(one, strategy=Strategy({**one.strategy.tensors, "c": None, "d": None}))
    for text in (repr(one), one._repr_html_()):
        assert "2 tensors in float, not shown" in text


def test_candidates_without_a_number_are_left_out(found):
    table = found.candidates.copy()
    measure = found.goal.measure
    table.loc[~table["chosen"].to_numpy(bool), measure] = np.nan
    page = ElementTree.fromstring(replace(found, candidates=table)._repr_html_())
    marks = [tag for tag in page.iter() if tag.get("transform")]
    assert len(marks) == 1
    spots = [float(x) for x in re.findall(r"[\d.]+", marks[0].get("transform"))]
    assert all(math.isfinite(x) for x in spots)


def test_cells_of_tables_are_one_line(found):
    for column in ("strategy", "quantized"):
        for cell in found.candidates[column]:
            assert len(str(cell)) < 60
            assert "\n" not in str(cell)


def test_a_strategy_lists_what_each_tensor_becomes(found):
    lines = repr(found.strategy).splitlines()
    assert len(lines) == 1 + len(found.strategy.tensors)
    for line, (name, choice) in zip(lines[1:], found.strategy.tensors.items(), strict=True):
        assert line.split()[0] == name
        assert str(choice or "float") in line
    assert str(Strategy({"a": None})) == "1 tensor in float"


def test_parts_of_an_answer_are_read_without_their_numbers(found):
    assert re.match(r"[\d.]+ passes \(network ", repr(found.passes))
    for name, tensor in found.quantized.tensors.items():
        shape = list(tensor.codes.shape)
        assert repr(tensor) == f"QuantizedTensor: {shape} at {tensor.bits:g} bits", name
