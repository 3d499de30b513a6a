"""The names people use: the face, their signatures, and the notebook blocks for all four pairs."""

import importlib
import inspect
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, run_block

import quantifind

PAIRS = {
    "simple_dense": "simple_dense_data",
    "conv_mnist": "mnist_data",
    "dense_mnist": "mnist_data",
    "language_transformer": "language_names",
}
# Positional parameters, in order; a parameter in brackets has a default.
SIGNATURES = {
    "workflow.data_workflow.create_dataloaders": "dataset",
    "workflow.train_workflow.train_network": (
        "net criterion optimizer train_loader val_loader [epochs]"
    ),
    "workflow.train_workflow.save_train_context": "directory net optimizer",
    "workflow.train_workflow.load_train_context": "directory net optimizer",
    "workflow.quantize_workflow.BitQuantizer": "bit_depth",
    "workflow.quantize_workflow.BitQuantizer.quantize": "self tensor",
    "workflow.quantize_workflow.BitQuantizer.quantize_model": "self model",
    "workflow.quantize_workflow.BitQuantizer.quantized_dataloader": "self loader",
    "workflow.evaluation_workflow.compute_test_loss": "model test_loader criterion",
    "workflow.evaluation_workflow.evaluate_quantized_model": (
        "model test_loader criterion bit_depth"
    ),
    "workflow.evaluation_workflow.evaluate_bit_depths": "model test_loader criterion [bit_depths]",
    "workflow.visualization_workflow.visualize_bit_depth_results": "results",
    **{f"data.{data}.create_dataloaders": "" for data in PAIRS.values()},
    **{f"models.{model}_model.create_model_context": "" for model in PAIRS},
}
BLOCK = """
from quantifind.data import {data}
from quantifind.models import {model}_model
from quantifind.workflow.train_workflow import train_network
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths
from quantifind.workflow.visualization_workflow import visualize_bit_depth_results

train_loader, val_loader, test_loader = {data}.create_dataloaders()
net, crit, optim = {model}_model.create_model_context()
train_network(net, crit, optim, train_loader, val_loader, epochs=8)
visualize_bit_depth_results(evaluate_bit_depths(net, test_loader, crit))
"""


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    module, _, attributes = name.partition("_workflow.")
    if not attributes:
        module, _, attributes = name.rpartition(".")
    else:
        module += "_workflow"
    found = importlib.import_module(f"quantifind.{module}")
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    positional = [
        p.name if p.default is p.empty else f"[{p.name}]"
        for p in inspect.signature(found).parameters.values()
        if p.kind is not p.KEYWORD_ONLY
    ]
    assert " ".join(positional) == SIGNATURES[name]


@pytest.mark.parametrize("model", PAIRS)
def test_notebook_block(model, monkeypatch):
    names = run_block(BLOCK.format(data=PAIRS[model], model=model), monkeypatch)
    assert names["result"].keys() == {"criterion", "criterion_ratio", "signal_to_complexity"}
    plt.close("all")


@pytest.mark.parametrize("name", quantifind.__all__)
def test_every_name_of_the_face_is_there(name):
    assert name in dir(quantifind)
    assert name in str(quantifind.__doc__)
    assert getattr(quantifind, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'quantifind' has no attribute 'nothing'"):
        _ = quantifind.nothing


def test_importing_the_package_imports_no_torch():
    code = "import quantifind, sys; dir(quantifind); print(sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "'quantifind'" in result.stdout
    assert not {"'torch'", "'numpy'", "'pandas'"} & set(result.stdout.strip("[]\n").split(", "))
