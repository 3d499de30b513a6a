"""What several test files share."""

import importlib
import math
import os
import re
import subprocess
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import settings
from torch import nn

from quantifind.metrics import columns_of, compared
from quantifind.network.calibrated import Calibration
from quantifind.quantize import quantize_each
from quantifind.runtime.evaluator import Evaluator
from quantifind.utils.loaders import Tensors, create_dataloaders, split_loaders, whole_split
from quantifind.utils.memory import keep_freed_memory

matplotlib.use("Agg")
# waking a second thread for a few hundred values takes longer than all else; nor do processes that
# tests start
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
keep_freed_memory()
settings.register_profile("quantifind", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("quantifind")

ROOT = Path(__file__).parent.parent
# files that take minutes, the longest first, so that no process is left with one at the end
LONG = ["test_pipeline.py", "test_fuzz.py", "test_workers.py", "test_search.py", "test_docs.py"]


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def classifier():
    """A small trained-by-nobody classifier, its criterion and loaders of 400 examples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    inputs = torch.randn(400, 6)
    data = Tensors(inputs, inputs[:, :3].argmax(1))
    return net, nn.CrossEntropyLoss(), create_dataloaders(data, batch_size=32)


def count_measured(monkeypatch, stop_after=math.inf):
    """(Tensor that alone is quantized or None, first example, last) of each candidate that is
    measured from here on, until a kill."""
    seen: list[tuple] = []
    outcome, one_tensor = Evaluator.outcome, Evaluator.one_tensor

    def note(what, count):
        if len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend([what] * count)

    def noted(evaluator, quantized=None, *span, **how):
        if quantized is not None:  # which the float network isn't
            note((None, *span), 1)
        return outcome(evaluator, quantized, *span, **how)

    def noted_alone(evaluator, name, values, *span, **how):
        note((name, *span), len(values))
        return one_tensor(evaluator, name, values, *span, **how)

    monkeypatch.setattr(Evaluator, "outcome", noted)
    monkeypatch.setattr(Evaluator, "one_tensor", noted_alone)
    return seen


def divergence(quantized, original):
    """(examples,), of an outcome from that of the float network."""
    return columns_of(compared(quantized, original))["divergence"]


def quantize_alone(model, name, choices, calibration=None):
    """One tensor by each of several choices."""
    ((_, tensors),) = quantize_each(Calibration(model, calibration), {name: choices})
    return tensors


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [file for file in listed.stdout.splitlines() if (ROOT / file).exists()]


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
