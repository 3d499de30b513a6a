"""The names people use: their signatures, and the notebook blocks for all four pairs."""

import importlib
import inspect
import re

import matplotlib.pyplot as plt
import pytest
import torch

from quantifind.utils.loaders import Tensors, split_loaders, whole_split

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


def run_block(block: str, monkeypatch) -> dict:
    """Execute a notebook block with the data cut to a few hundred examples."""
    data = re.search(r"from quantifind\.data import (\w+)", block)
    assert data is not None
    module = importlib.import_module(f"quantifind.data.{data[1]}")
    create = module.create_dataloaders

    def create_few(**options):
        parts = [
            Tensors(*(tensor[:count] for tensor in whole_split(loader)))
            for loader, count in zip(create(**options), (384, 64, 128), strict=True)
        ]
        return split_loaders(*parts, batch_size=32)

    monkeypatch.setattr(module, "create_dataloaders", create_few)
    torch.manual_seed(0)
    names: dict = {}
    lines = block.strip().splitlines()
    exec("\n".join([*lines[:-1], f"result = {lines[-1]}"]), names)
    return names


@pytest.mark.parametrize("model", PAIRS)
def test_notebook_block(model, monkeypatch):
    names = run_block(BLOCK.format(data=PAIRS[model], model=model), monkeypatch)
    assert names["result"].keys() == {"criterion", "criterion_ratio", "signal_to_complexity"}
    plt.close("all")


def test_notebook_block_of_the_readme(root, monkeypatch):
    readme = (root / "README.md").read_text(encoding="utf-8")
    search, block, rounding = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    names = run_block(block, monkeypatch)
    assert names["result"]
    plt.close("all")
    exec(search, names)  # goes on with the network and the loaders of the notebook
    assert names["candidates"]["chosen"].sum() == 1
    exec(rounding, names)
    assert 1.6 < names["bits"] < 1.65
    assert len(names["small_net"][0][0].weight[0].unique()) <= 3


def test_model_of_the_readme(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    names: dict = {}
    exec(block[1], names)
    net, _, _ = names["create_model_context"](classes=7)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
