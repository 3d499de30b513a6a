"""A network of one's own, from a file or a module: found, read with its weights, or named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

from quantifind.utils import plugins
from quantifind.utils.sources import own_sources
from stages import files, prepare, train
from stages.networks import create_network, read_network
from stages.params import read_params
from stages.weights import load_weights, read_weights

NETWORK = """
from torch import nn

def create_model_context(*, size=3):
    return nn.Linear(size, 2), nn.MSELoss()
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def write(files):
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def test_the_files_of_a_module_are_those_it_imports():
    write(
        {
            "nets/__init__.py": "from nets import shared",
            "nets/shared.py": "import torch, json",
            "nets/net.py": "from .parts import block\nfrom nets.parts.deep import x\nimport lone",
            "nets/parts/__init__.py": "def f():\n    from . import lazy",
            "nets/parts/block.py": "",
            "nets/parts/deep.py": "from ..net import y\nimport quantifind.metrics, stages.files",
            "nets/parts/lazy.py": "",
            "nets/other.py": "",
            "lone.py": "import no_such_module",
            "single/net.py": "import beside, lone",
            "single/beside.py": "not python (",
        }
    )
    parts = {f"nets/parts/{name}.py" for name in ("__init__", "block", "deep", "lazy")}
    wanted = {
        "nets.net": {"nets/__init__.py", "nets/shared.py", "nets/net.py", "lone.py"} | parts,
        "nets/net.py": {"nets/__init__.py", "nets/shared.py", "nets/net.py", "lone.py"} | parts,
        "single/net.py": {"single/net.py", "single/beside.py", "lone.py"},
        "conv_mnist_model": set(),
        "quantifind.models.conv_mnist_model": set(),
    }
    for name, paths in wanted.items():
        found = own_sources(name)
        assert {path.resolve() for path in found} == {Path(f).resolve() for f in paths}, name
        assert len(found) == len(paths)
    assert own_sources("nets/net.py")[0] == Path("nets/net.py")
    assert own_sources("json.decoder")[0].name == "decoder.py"


@pytest.mark.parametrize("name", ["random.py", "torch.py", "a folder/my net.py", "nets.v2/net.py"])
def test_a_file_may_be_called_as_a_module_of_python(name):
    write({name: NETWORK})
    for given in (name, str(Path(name).resolve())):
        made = create_network(given, {"size": 5}, {"classes": 9})
        assert made.net.in_features == 5
        assert made.options == {"size": 5}
        assert made.optimizer is made.forward is None


def test_a_network_of_a_file_reaches_other_processes():
    source = "import beside\ndef create():\n    return helped() * beside.Seven().value()\n"
    source += "def helped():\n    return 2"
    write(
        {
            "far/net.py": source,
            "far/beside.py": "class Seven:\n    def value(self):\n        return 7",
        }
    )
    packed = cloudpickle.dumps(plugins.load("models", "far/net.py", "create"))
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
    there = subprocess.run(
        [sys.executable, "-c", script], input=packed, cwd="/", capture_output=True, check=True
    )
    assert there.stdout.strip() == b"14"


IMPORTS = {
    "import": "import shared\ndef value():\n    return shared.K",
    "from": "from shared import K\ndef value():\n    return K",
    "when it runs": "def value():\n    import shared\n    return shared.K",
    "relative": "from .shared import K\ndef value():\n    return K",
    "a package": "import inner.deep\ndef value():\n    return inner.deep.K",
    "from a package": "from inner import deep\ndef value():\n    return deep.K",
    "under a name": "import inner.deep as d\ndef value():\n    return d.K",
    "through another": "import through\ndef value():\n    return through.value()",
    "a folder": "from loose.part import K\ndef value():\n    return K",
    "as python's": "import random\ndef value():\n    return random.K",
}


@pytest.mark.parametrize("how", IMPORTS)
def test_a_file_imports_what_stands_beside_it(how):
    """Of two files each its own, also where the project's root has another of that name; and what
    is run is what their sources are."""
    names = ("shared.py", "inner/deep.py", "inner/__init__.py", "loose/part.py", "random.py")
    through = {"through.py": "import shared\ndef value():\n    import shared\n    return shared.K"}
    for number, folder in enumerate(("", "one/", "two/")):
        write({f"{folder}{name}": f"K = {number}" for name in names})
        write({f"{folder}{name}": text for name, text in through.items()})
        write({f"{folder}net.py": IMPORTS[how]})
    for number, folder in ((1, "one"), (2, "two"), (1, "one")):
        assert plugins.load("models", f"{folder}/net.py", "value")() == number
        sources = own_sources(f"{folder}/net.py")
        assert len(sources) > 1
        assert {path.resolve().relative_to(Path.cwd()).parts[0] for path in sources} == {folder}


def test_a_module_may_say_what_a_batch_is():
    write(
        {"net.py": NETWORK + "def forward(model, batch):\n    return model(batch['x']), batch['y']"}
    )
    forward = create_network("net.py", {}, {}).forward
    outputs, targets = forward(nn.Identity(), {"x": 1, "y": 2})
    assert (outputs, targets) == (1, 2)


BROKEN = {
    "syntax": ("def create_model_context(:", "net.py can't be imported: SyntaxError"),
    "name": ("\n\nlayers = nn.Linear", "NameError: name 'nn' is not defined (net.py, line 3)"),
    "package": ("import no_such_package", "net.py can't be imported: ModuleNotFoundError: No mod"),
    "function": ("x = 1", "net.py has no function create_model_context()"),
    "number": ("create_model_context = 3", "net.py has no function create_model_context()"),
    "error": (
        "def create_model_context():\n    raise RuntimeError('no\\nmemory')",
        "net.py can't be made with options {}: RuntimeError: no (net.py, line 2)",
    ),
    "nothing": (
        "def create_model_context(): pass",
        "create_model_context() gives NoneType: model,",
    ),
    "only a network": (
        "from torch import nn\ndef create_model_context():\n    return nn.ReLU()",
        "create_model_context() gives ReLU: model, criterion and optimizer are needed",
    ),
    "no network": (
        "def create_model_context():\n    return 1, len, None",
        "create_model_context() gives int, builtin_function_or_method, NoneType: model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_module_is_named_in_one_line(case):
    source, message = BROKEN[case]
    write({"net.py": source})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        create_network("net.py", {}, {})
    assert "\n" not in str(caught.value)


def test_weights_are_read_from_what_people_save():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = net.state_dict()
    save_file(state, "w.safetensors")
    torch.save(state, "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, "checkpoint.pth")
    torch.save({"model": state, "optimizer": {}}, "model.pt")
    for file in ("w.safetensors", "plain.pt", "checkpoint.pth", "model.pt"):
        fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        load_weights(fresh, file)
        assert all(torch.equal(fresh.state_dict()[name], t) for name, t in state.items()), file


def test_weights_that_are_none_are_named():
    torch.save(nn.Linear(3, 2), "module.pt")
    torch.save({"epoch": 3, "loss": 0.5}, "other.pt")
    torch.save([1], "list.pt")
    write({"text.pt": "hello", "text.safetensors": "hello"})
    torch.save(nn.Linear(3, 3).state_dict(), "wide.pt")
    save_file({"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, "more.safetensors")
    wanted = {
        "module.pt": "module.pt: not a file of weights alone",
        "other.pt": "other.pt: a dict of epoch, loss, not a state dict, nor one under ",
        "list.pt": "list.pt: a list, not a state dict",
        "text.pt": "text.pt: not a file of weights alone",
        "text.safetensors": "text.safetensors: truncated or altered",
        "wide.pt": "wide.pt: a checkpoint of another architecture: bias is [3], not [2]; weight is",
        "more.safetensors": "bias is missing, not [2]; extra is [1], not missing",
    }
    for file, message in wanted.items():
        net = nn.Linear(3, 2)
        before = net.weight.clone()
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_weights(net, file)
        assert "\n" not in str(caught.value)
        assert torch.equal(net.weight, before)
    with pytest.raises(OSError, match=r"gone\.pt"):
        read_weights(Path("gone.pt"))


DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def create_dataloaders():
    x = torch.ones(8, 3)
    return [DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)] * 3
"""


def test_weights_are_judged_before_anything_is_written():
    """By the first stage that reads them; and by the next what they give."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    entry = {"network": "net.py", "data": "data.py", "weights": "w.safetensors"}
    params |= {"model": "v1.5", "models": {"v1.5": entry}}
    write({"net.py": NETWORK, "data.py": DATA, "params.yaml": yaml.safe_dump(params)})
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: .*weight is \[2, 4\], not \[2, 3\]"):
        prepare.main(read_params())
    assert not Path("out").exists()
    save_file({"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}, "w.safetensors")
    prepare.main(read_params())
    with pytest.raises(
        ValueError, match=r"weights w\.safetensors the loss on validation data is n"
    ):
        train.main(read_params())
    assert not files.WEIGHTS.exists()
    save_file({"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, "w.safetensors")
    train.main(read_params())
    assert json.loads((files.METRICS / "training.json").read_text()) == {"val_loss": 0.0}
    read = read_network()
    assert torch.equal(read.net.bias, torch.ones(2))
    assert not read.net.training


def test_what_is_trained_needs_an_optimizer():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    entry = {"network": "net.py", "data": "data.py", "epochs": 1}
    params |= {"model": "own", "models": {"own": entry}}
    write({"net.py": NETWORK, "data.py": DATA, "params.yaml": yaml.safe_dump(params)})
    with pytest.raises(ValueError, match=r"models\.own\.network: .* no optimizer: give weights"):
        prepare.main(read_params())
    assert not Path("out").exists()
