"""params.yaml: what is wrong in it is named, in one line."""

import copy
from functools import partial
from pathlib import Path

import pytest
import yaml

from quantifind.utils import plugins
from stages.params import read_params


@pytest.fixture
def values(root):
    return yaml.safe_load((root / "params.yaml").read_text())


def write(path: Path, values) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_committed_parameters(root):
    params = read_params(root / "params.yaml")
    assert params.model == "conv_mnist"
    assert set(params.quantize.bit_depths) == set(range(2, 33))
    for entry in params.models.values():
        create = plugins.load("models", entry.network, "create_model_context")
        plugins.arguments(create, entry.options, {})
        plugins.load("data", entry.data, "create_dataloaders")
    networks = {entry.network for entry in params.models.values()}
    assert networks == set(plugins.names("models"))


def test_original_size_has_an_entry(root):
    options = read_params(root / "params.yaml").models["language_transformer_original"].options
    assert (options["width"], options["layers"], options["heads"]) == (512, 32, 4)
    assert options["vocabulary"] == 65_535


def test_weights_take_the_place_of_epochs(values, tmp_path):
    entry = values["models"]["conv_mnist"]
    del entry["epochs"]
    path = write(tmp_path / "params.yaml", values)
    with pytest.raises(ValueError, match=r"models\.conv_mnist\.epochs: missing; or give weights"):
        read_params(path)
    entry["weights"] = "trained.safetensors"
    assert read_params(write(path, values)).entry.epochs is None


CASES = {
    "unknown storage": (["search", "storage"], "zip", "search.storage: .*'packed' or 'coded'"),
    "unknown model": (["model"], "dense_mnits", "model: unknown 'dense_mnits': models has conv_mn"),
    "unknown key": (
        ["quantise"],
        {},
        "quantise: unknown key; allowed are engine, evaluate, export",
    ),
    "unknown model key": (
        ["models", "conv_mnist", "epohcs"],
        3,
        "models.conv_mnist.epohcs: unknown key; allowed are batch_size, data, decay, epochs, net",
    ),
    "depth too low": (["quantize", "bit_depths"], [1, 4], "quantize.bit_depths.0: .* 2, not 1"),
    "depth too high": (["quantize", "bit_depths"], [33], "quantize.bit_depths.0: .* 32, not 33"),
    "depth a fraction": (["quantize", "bit_depths"], [2.5], "bit_depths.0: .*integer, not 2.5"),
    "depth a flag": (["quantize", "bit_depths"], [True], "bit_depths.0: .*integer, not True"),
    "no depth": (["quantize", "bit_depths"], [], "quantize.bit_depths: .*at least 1"),
    "no epoch": (["models", "conv_mnist", "epochs"], 0, "models.conv_mnist.epochs: .* 1, not 0"),
    "text": (["models", "conv_mnist", "epochs"], "5", "models.conv_mnist.epochs: .*not '5'"),
    "limit": (["evaluate", "limits"], [0.9], "evaluate.limits.0: .*equal to 1, not 0.9"),
    "confidence": (["evaluate", "confidence"], 1.0, "evaluate.confidence: .*less than 1"),
    "seed": (["seed"], -1, "seed: .*greater than or equal to 0, not -1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_value_is_named(values, tmp_path, case):
    keys, wrong, message = CASES[case]
    section = values = copy.deepcopy(values)
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = wrong
    with pytest.raises(ValueError, match=rf"params.yaml: .*{message}") as caught:
        read_params(write(tmp_path / "params.yaml", values))
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(values, tmp_path):
    del values["evaluate"]["limits"]
    with pytest.raises(ValueError, match=r"evaluate\.limits: missing"):
        read_params(write(tmp_path / "params.yaml", values))


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "model: \tx: y", "3"])
def test_what_is_no_mapping_is_named(tmp_path, text):
    with pytest.raises(ValueError, match=r"params.yaml: (the file|not YAML)") as caught:
        read_params(write(tmp_path / "params.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"params.yaml: missing"):
        read_params(tmp_path / "params.yaml")


def test_plugins_take_their_own_modules():
    load = partial(plugins.load, function="create_model_context")
    assert callable(load("models", "quantifind.models.simple_dense_model"))
    with pytest.raises(ValueError, match=r"no module 'nobodys\.model' can be imported"):
        load("models", "nobodys.model")
    with pytest.raises(ValueError, match=r"quantifind/models/ has conv_mnist_model, dense.*\.py"):
        load("models", "conv_mnist")
    with pytest.raises(ValueError, match=r"quantifind\.utils has no function create_model_context"):
        load("models", "quantifind.utils")


def test_unknown_option_is_named():
    create = plugins.load("models", "dense_mnist_model", "create_model_context")
    with pytest.raises(ValueError, match=r"unknown option hiden: .*has hidden, classes"):
        plugins.arguments(create, {"hiden": 3}, {})
    offered = {"classes": 7, "vocabulary": 9}
    assert plugins.arguments(create, {}, offered) == {"classes": 7}
    assert plugins.arguments(create, {"classes": 2}, offered) == {"classes": 2}
