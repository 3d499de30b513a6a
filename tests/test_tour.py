"""docs/tour.ipynb runs in a kernel, with few examples; it holds no outputs."""

import re

import nbformat
import pytest
from conftest import ROOT

TOUR = nbformat.read(ROOT / "docs/tour.ipynb", as_version=4)
# of each data set few examples, and of arguments those that take little time
FEW = """
import importlib
import torch
from quantifind.utils.loaders import Tensors, split_loaders, whole_split

def few(create):
    def create_few(**options):
        parts = [
            Tensors(*(tensor[:count] for tensor in whole_split(loader)))
            for loader, count in zip(create(**options), (192, 64, 64), strict=True)
        ]
        return split_loaders(*parts, batch_size=32)
    return create_few

torch.set_num_threads(1)
for name in ("language_names", "mnist_data", "simple_dense_data"):
    module = importlib.import_module(f"quantifind.data.{name}")
    module.create_dataloaders = few(module.create_dataloaders)
"""
LESS = {
    r"epochs=\d": "epochs=1",
    r"(limit=1\.2, )?effort=60": "effort=40, limit=5.0, widths=[4]",
    "net, test_loader, crit\\)\\)": "net, test_loader, crit, (2, 32)))",
    r"randn\(6000": "randn(600",
}


def test_the_tour_is_stripped_and_names_each_pair():
    sources = "".join(cell.source for cell in TOUR.cells)
    for name in ("simple_dense", "language_transformer", "conv_mnist", "dense_mnist"):
        assert f"import {name}_model" in sources
    for cell in TOUR.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_the_tour_runs(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient").NotebookClient
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FEW)])
    for cell in TOUR.cells:
        if cell.cell_type == "code":
            for pattern, less in LESS.items():
                cell.source = re.sub(pattern, less, cell.source)
            notebook.cells.append(cell)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # debugpy warns of frozen modules on some builds of Python
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    client(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    rich = [out.data["text/html"] for out in shown if "text/html" in out.get("data", {})]
    assert sum("<svg" in html for html in rich) == 2
    said = "".join(out.text for out in shown if out.get("name") == "stdout")
    assert re.search(r"certified at|is certified", said)
    assert said.endswith("True\n")
