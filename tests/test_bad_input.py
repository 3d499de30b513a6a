"""Whatever is given wrong is a line that says what, and what was there is still whole."""

import re
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from test_whole_files import full_disk
from torch import nn

import quantifind
from quantifind import Strategy, export, load, save, uniform_strategy
from quantifind.quantize import quantize

PATHS = [3, None, True, "", ".", "..", "a\0b", b"net.onnx", ["net.onnx"], nn.Linear(2, 2)]
MODELS = [None, {}, nn.Linear, "net", torch.ones(2), lambda x: x]
STRATEGIES = [None, 4, "4 bits", {"bits": 4}, Strategy, nn.Linear(2, 2), pd.DataFrame([[1]])]
CALLED = [3, "forward", torch.ones(2)]
BATCHES = [3, 0.5, len]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


NET, X = network(), torch.randn(3, 9)
STRATEGY = uniform_strategy(NET, 4, axis=0)
CODES = quantize(NET, STRATEGY)
GPTQ = uniform_strategy(NET, 4, rounding="gptq")
# by function: its arguments, and of each those that can't be
FUNCTIONS = {
    "save": (
        {"model": NET, "quantized": STRATEGY, "path": "net.safetensors"},
        {"path": PATHS, "model": MODELS, "quantized": STRATEGIES, "forward": CALLED}
        | {"judged": [3, "row", len], "strategy": [3, "row", {}]},
    ),
    "load": ({"path": "old.safetensors", "model": NET}, {"path": PATHS, "model": MODELS}),
    "compressed": (
        {"model": NET, "quantized": CODES},
        {"model": MODELS, "quantized": STRATEGIES, "forward": CALLED, "kernels": [3, "cuda"]},
    ),
    **{
        f"export {kind}": (
            {"model": NET, "quantized": CODES, "path": f"net.{kind}", "example": X},
            {"path": [*PATHS, "net.pth", "net"], "model": MODELS, "quantized": STRATEGIES}
            # traced alike by both
            | (
                {"opset": [None, "21", 21.5, True, 20, 99]}
                if kind == "onnx"
                else {"example": [None, 3, "x", (), (X, X), {"y": X}, X[:, :8], X.numpy()]}
            ),
        )
        for kind in ("onnx", "pt2")
    },
    "quantize_model": (
        {"model": NET, "strategy": GPTQ, "calibration": [(X,)]},
        {"model": MODELS, "strategy": STRATEGIES, "calibration": BATCHES, "forward": CALLED},
    ),
    "mean_bits": ({"model": NET, "quantized": CODES}, {"model": MODELS, "quantized": STRATEGIES}),
    "uniform_strategy": ({"model": NET, "bits": 4}, {"model": MODELS}),
    "Strategy": ({}, {"tensors": [3, [1], "a", None], "activations": [3, [1], "a", None]}),
    "SearchSpace": ({"tensors": {"a": [{"scheme": "uniform", "bits": 4}]}}, {"tensors": [3, "a"]}),
    "certify": ({"model": NET, "test_loader": [(X, X)]}, {"found": [None, 3, CODES]}),
    "evaluate_strategies": (
        {"model": NET, "test_loader": [(X, X)], "criterion": nn.MSELoss()},
        {"strategies": [None, 3, STRATEGY, [None], {"a": STRATEGY}]},
    ),
}


@contextmanager
def all_as_it_was(folder):
    """Nothing in a folder is another after it, or new."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    values = {name: value.clone() for name, value in NET.state_dict().items()}
    yield
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert all(torch.equal(value, values[name]) for name, value in NET.state_dict().items())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("old.safetensors", "net.safetensors"):
        save(NET, STRATEGY, name)
    for name in ("net.onnx", "net.pt2"):
        (tmp_path / name).write_bytes(b"what was there")
    (tmp_path / "folder.onnx").mkdir()
    return tmp_path


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_of_a_wrong_kind_is_named_in_a_line(function, folder):
    given, wrong = FUNCTIONS[function]
    called = getattr(quantifind, function.split()[0])
    for argument, values in wrong.items():
        for value in values:
            with all_as_it_was(folder), pytest.raises(ValueError) as found:  # noqa: PT011
                called(**{**given, argument: value})
            assert "\n" not in str(found.value), (argument, value)
            says = "network" if argument == "model" else argument.removesuffix("egies")
            assert says in str(found.value) or "ending" in str(found.value), found.value


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_what_cannot_be_written_leaves_the_old_file_whole(kind, folder):
    """On a full disk, in a folder that isn't there, may not be written, or has that name."""

    def write(path):
        if kind == "safetensors":
            save(NET, STRATEGY, path)
        else:
            export(NET, CODES, path, X)

    (folder / f"folder.{kind}").mkdir(exist_ok=True)
    cases = [(200, f"net.{kind}"), (2**30, f"missing/net.{kind}"), (2**30, f"folder.{kind}")]
    if kind == "safetensors":  # the others are traced each time
        cases += [(0, f"net.{kind}"), (2**30, f"net.{kind}/below"), (2**30, f"/proc/net.{kind}")]
    for size, path in cases:
        refused = pytest.raises(ValueError, match="can't be written")
        with all_as_it_was(folder), refused as found, full_disk(size):
            write(path)
        assert "\n" not in str(found.value)
        assert str(path) in str(found.value)
    write(f"net.{kind}")
    assert (folder / f"net.{kind}").stat().st_size > 200


def parts_of_file(path):
    """By what it is, a byte of it: of the length, the header, data, and the index."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return {"length": 0, "header": 9, "data": start, "index": len(whole) - 9, "end": len(whole) - 1}


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_in_any_part_of_a_file_is_seen_and_nothing_half_loaded(bit, folder):
    path = folder / "old.safetensors"
    whole = path.read_bytes()
    for part, place in parts_of_file(path).items():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        for content in (bytes(damaged), whole[:place], whole + whole[place:]):
            path.write_bytes(content)
            says = re.escape(str(path))
            with all_as_it_was(folder), pytest.raises(ValueError, match=says) as found:
                load(path, NET)
            assert "\n" not in str(found.value), part


@pytest.mark.parametrize("missing", ["0.weight", "2.bias"])
def test_a_file_one_tensor_short_is_named(missing, folder):
    short = network()
    where, _, name = missing.rpartition(".")
    short.get_submodule(where).register_parameter(name, None)
    save(short, uniform_strategy(short, 4), "short.safetensors")
    with (
        all_as_it_was(folder),
        pytest.raises(ValueError, match=f"{missing} is missing in the file"),
    ):
        load("short.safetensors", NET)
    with (
        all_as_it_was(folder),
        pytest.raises(ValueError, match=rf"{missing} is .* in the file, mis"),
    ):
        load("old.safetensors", short)


def test_names_of_the_package_are_all_tried():
    """Those that take a network, a strategy or a path."""
    tried = {name.split()[0] for name in FUNCTIONS}
    elsewhere = {"Choice", "Found", "find_strategy", "learn"}
    assert tried | elsewhere == set(quantifind.__all__)
