"""All stages in a clone with few examples and one epoch: caching, faults, what a stage imports."""

import datetime
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, tracked_files
from forked import forked_python
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from test_artifact import assert_same
from torch import nn

from quantifind import uniform_strategy
from quantifind.quantize import quantize
from quantifind.storage.network_reader import NetworkFile
from quantifind.strategy import Strategy, uniform_activations
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins
from stages import answers, deps, evaluate, evidence, files, ladder, plot, prepare, select, train
from stages import quantize as quantize_stage
from stages.params import read_params

FEW_DATA = '''"""Noise and digits read off it, for tests."""

import torch

from quantifind.utils.loaders import Tensors, split_loaders


def create_dataloaders(*, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(300, 1, 28, 28, generator=generator)
    digits = (images[:, 0, :9, 0].argmax(1) + 1) % 10
    parts = [Tensors(images[i : i + 100], digits[i : i + 100]) for i in (0, 100, 200)]
    return split_loaders(*parts, seed=seed)
'''
STAGES = ["prepare", "train", "quantize", "evaluate", "plot"]
SEARCH = {"widths": [2, 4, 8], "effort": 40}
# what the stages that come first and dvc status say to each change of a file, put back afterwards
CHANGES = """
import json, sys
from pathlib import Path
from dvc.repo import Repo
from stages import select
from stages.params import read_params

found = []
for name, text in [*json.load(sys.stdin), ("params.yaml", Path("params.yaml").read_text())]:
    path = Path(name)
    before = path.read_bytes() if path.exists() else None
    path.write_bytes((before or b"") + b"\\n# changed\\n" if text is None else text.encode())
    select.main(read_params())
    found.append(sorted(Repo().status().keys() - {"select"}))
    path.unlink() if before is None else path.write_bytes(before)
assert not found.pop()
print(json.dumps(found))
"""


class Project:
    """A clone of the working tree as a DVC project of its own."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, python
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": "", "CI": "true"}
        for file in tracked_files():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        (folder / "quantifind/data/few_data.py").write_text(FEW_DATA)
        # few_data takes the place of MNIST
        shutil.rmtree(folder / "datasets/MNIST")
        params = yaml.safe_load((folder / "params.yaml").read_text())
        small = {"conv_mnist": {"channels": [4, 4]}, "dense_mnist": {"hidden": 8}}
        for model, options in small.items():
            params["models"][model] |= {"data": "few_data", "epochs": 1, "options": options}
        params["quantize"]["bit_depths"] = [2, 3, 4, 8, 16]
        params["search"] = {"limit": {"criterion_ratio": 1.05}, **SEARCH}
        self.write_params(params)
        for left in ("dvc.lock", "looks.json"):
            (folder / left).unlink(missing_ok=True)
        for command in (
            ["init", "-q", "-b", "main"],
            ["add", "-A"],
            ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start"],
        ):
            subprocess.run(["git", *command], cwd=folder, check=True)

    def write_params(self, params: dict) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def params(self) -> dict:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def run(self, *command: str, given: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.python, *command],
            cwd=self.folder,
            env=self.env,
            input=given,
            capture_output=True,
            text=True,
            timeout=1500,
        )

    def dvc(self, *arguments: str) -> list[str]:
        """Run dvc; the stages that it executed, but for the one that looks what is selected."""
        result = self.run("-m", "dvc", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        lines = result.stdout.splitlines()
        ran = [line.split("'")[1] for line in lines if line.startswith("Running stage")]
        return [stage for stage in ran if stage != "select"]

    def changed(self, changes: list[tuple[str, str | None]]) -> list[set[str]]:
        """The stages that dvc would execute after each change of a file, likewise.

        changes: the file, and what is in it then; None for what is there and a line more.
        """
        result = self.run("-c", CHANGES, given=json.dumps(changes))
        assert result.returncode == 0, result.stderr
        return [set(stages) for stages in json.loads(result.stdout.splitlines()[-1])]

    def keep(self) -> None:
        """A copy of all that a stage reads and writes, as it is now."""
        self.kept = self.folder.with_name("kept")
        for name in ("metrics", "out", "plots", "selected"):
            copied = {"copy_function": shutil.copyfile}
            shutil.copytree(self.folder / name, self.kept / name, **copied)
        shutil.copyfile(self.folder / "params.yaml", self.kept / "params.yaml")

    def metrics(self) -> dict:
        return json.loads((self.folder / "metrics/evaluation.json").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with forked_python() as python:
        project = Project(tmp_path_factory.mktemp("project"), python)
        assert project.dvc("repro") == STAGES
        project.keep()
        yield project


@pytest.fixture
def conv(project, tmp_path, monkeypatch):
    """What the first run left, that of conv_mnist, as the folder that stages run in; a test may
    harm it."""
    shutil.copytree(project.kept, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(main, message: str) -> None:
    """A stage ends with one line that holds the message, and exit code 1, which is what Python does
    with the text of a SystemExit: test_networks_are_compared_on_one_page"""
    with pytest.raises(SystemExit) as ended:
        files.run(main)
    said = str(ended.value)
    assert "\n" not in said
    assert message in said


def test_a_run_leaves_metrics_tables_and_pictures(project, monkeypatch):
    assert set(project.metrics()) == {
        "float",
        "certified_depth",
        "lowest_scr",
        "criterion_ratio",
        "relative_error",
    }
    left = {path.name for path in (project.folder / "plots").iterdir() if path.name[0] != "."}
    assert left == {
        *("bit_depths.csv", "history.csv", "weight_error.csv"),
        *("candidates.csv", "frontier.csv", "sensitivity.csv", "tensors.csv", "report.html"),
        *("random.csv", "training", "search"),
        *("criterion.png", "criterion_ratio.png", "signal_to_complexity.png"),
        *("history.png", "weight_sqnr.png"),
        *("costs.png", "frontier.png", "prediction.png", "sensitivity.png"),
        "changed.csv",
    } | {path.replace(".png", ".svg") for path in left if path.endswith(".png")}
    answer = json.loads((project.folder / "metrics/recommendation.json").read_text())
    assert answer["limit"] == {"criterion_ratio": 1.05}
    frontier = pd.read_csv(project.folder / "plots/frontier.csv")
    best = answer["certified"] or answer["chosen"]
    row = frontier[frontier["mean_bits"] == best["mean_bits"]].iloc[0]
    assert row["criterion_ratio"] == pytest.approx(best["criterion_ratio"])
    assert set(answer["tensors"]) == {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"} | {
        f"3.{kind}" for kind in ("weight", "bias")
    }
    saved = project.folder / "out/network.safetensors"
    with NetworkFile(saved) as file:
        best, said = answer["certified"] or answer["chosen"], answer["file"]
        assert (said["path"], said["bytes"]) == ("out/network.safetensors", file.bytes)
        assert said["packed"] == best["model_bytes"]  # which is the storage that was asked for
        assert 0 < said["coded"] <= said["packed"] + 6  # of each tensor a byte that says how
        assert file.bytes - file.header_bytes == best["model_bytes"] == file.index["model_bytes"]
        assert file.index["judged"]["mean_bits"] == best["mean_bits"]
        assert file.index["strategy"]["tensors"].keys() == answer["tensors"].keys()
    exported = pd.read_csv(project.folder / "out/exports/bytes.csv")
    assert set(exported["tensor"]) <= answer["tensors"].keys()
    assert answer["exports"] == {}
    assert "quantifind.load" in (project.folder / "out/README.md").read_text(encoding="utf-8")
    report = (project.folder / "plots/report.html").read_text(encoding="utf-8")
    assert f"{best['mean_bits']:.3f} bits per parameter" in report
    assert all(f">{name}</th>" in report for name in answer["tensors"])
    words = (project.folder / "metrics/recommendation.md").read_text(encoding="utf-8")
    assert f"{best['model_bytes']:,} bytes" in words
    loads = html.unescape(re.findall(r"<code>(import quantifind.*?)</code>", report, re.DOTALL)[0])
    monkeypatch.chdir(project.folder)
    names: dict = {}
    exec(loads, names)
    assert len(list(names["small_net"].parameters())) == len(answer["tensors"])
    assert not (project.folder / "out/resume").exists() or not any(
        (project.folder / "out/resume").iterdir()
    )


def test_test_data_are_read_by_no_stage_that_chooses(project):
    stages = yaml.safe_load((project.folder / "dvc.yaml").read_text())["stages"]
    readers = {
        name for name, s in stages.items() if any("test.safe" in d for d in s.get("deps", []))
    }
    assert readers == {"evaluate"}
    assert "out/data" not in stages["train"]["deps"] + stages["quantize"]["deps"]


def look(project: Project) -> tuple[int, int]:
    """Of the answer which look at the test data it is; and how many ladders have been counted."""
    answer = json.loads((project.folder / "metrics/recommendation.json").read_text())
    ledger = json.loads((project.folder / "looks.json").read_text())
    (ladders,) = ledger["splits"].values()
    return answer["look"]["k"], len(ladders)


def test_each_ladder_is_a_look_and_the_cache_none(project):
    """Each model is cached; an experiment beside the project counts there."""
    conv, beside = project.metrics(), ("exp", "run", "--temp", "-n", "beside")
    assert look(project) == (1, 1)
    assert project.dvc(*beside, "-S", "model=dense_mnist") == STAGES
    assert project.metrics() == conv
    assert look(project) == (1, 2)
    assert project.dvc("exp", "run", "-n", "dense", "-S", "model=dense_mnist") == []
    assert project.metrics() != conv
    assert look(project) == (2, 2)
    assert project.dvc("exp", "run", "-n", "conv", "-S", "model=conv_mnist") == []
    assert project.metrics() == conv
    assert look(project) == (1, 2)


def test_plots_of_two_models_share_each_chart(project):
    page = project.folder / "dvc_plots/index.html"
    project.dvc("plots", "diff", "dense", "conv", "-o", str(page.parent))
    html = page.read_text(encoding="utf-8")
    charts = html.split("vegaEmbed('#")
    assert len(charts) == 1 + 9
    specs = html.split("var spec = ")[1:]
    # what grows while a stage runs is kept, too
    for name in ("training/val_loss", "search/mean_bits"):
        curve = pd.read_csv(project.folder / f"plots/{name}.tsv", sep="\t")
        assert curve["step"].is_monotonic_increasing
        assert len(curve)
    for spec in specs:
        assert '"rev": "dense"' in spec
        assert '"rev": "conv"' in spec
    assert "https://cdn" not in html


def test_networks_are_compared_on_one_page(project):
    for revisions in ([], ["conv", "dense"]):
        result = project.run("-m", "stages.compare", *revisions)
        assert result.returncode == 0, result.stderr
        assert sorted(result.stdout.split(": ")[1].strip().split(", ")) == [
            "conv_mnist",
            "dense_mnist",
        ]
    # a whole process here: the line that `fails` looks at is all that a user sees
    result = project.run("-m", "stages.compare", "dens")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert "unknown revision 'dens': there are workspace, " in line
    page = project.folder / "plots/comparison.html"
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page.read_text(encoding="utf-8"))
    page.unlink()


def test_a_change_runs_what_depends_on_it_and_no_more(project):
    """Of the code and of the parameters; nothing is trained again for a new search."""
    params = project.params()
    model = {"network": "dense_mnist_model", "data": "few_data", "epochs": 1}
    others = {**params["models"], "new": model, "dense_mnist": model | {"epochs": 7}}
    changed = {
        "stages/templates/report.css": {"plot"},
        "quantifind/search.py": {"quantize"},
        "quantifind/mixed_precision/sensitivity.py": {"quantize"},
        "quantifind/mixed_precision/new.py": {"quantize"},
        "quantifind/models/new_model.py": {"prepare"},
        "quantifind/tensor/gptq.py": {"quantize", "evaluate"},
        "quantifind/schemes/uniform.py": {"quantize", "evaluate"},
        "quantifind/workflow/visualization_workflow.py": {"plot"},
        "stages/figures.py": {"plot"},
        "stages/figures_alone.py": {"plot"},
        "quantifind/workflow/train_workflow.py": {"train"},
        "quantifind/metrics.py": {"train", "quantize", "evaluate"},
    }
    cases: list = [(file, None, stages) for file, stages in changed.items()]
    for change, stages in (
        ({"models": others}, set()),
        ({"quantize": {**params["quantize"], "bit_depths": [2, 3]}}, {"quantize", "plot"}),
        ({"search": {**params["search"], "learn": 1}}, {"quantize", "evaluate", "plot"}),
    ):
        cases.append(("params.yaml", yaml.safe_dump(params | change), stages))
    found = project.changed([(file, text) for file, text, _ in cases])
    for (file, _, stages), others in zip(cases, found, strict=True):
        assert others == stages, file


def test_another_limit_measures_nothing_again(project):
    """What was measured stays in out/search: only the allocation is solved anew."""
    params = project.params()
    params["quantize"]["bit_depths"] = [2, 3, 4, 8]
    params["search"]["limit"] = {"criterion_ratio": 1.2}
    project.write_params(params)
    measured = (project.folder / "out/search").glob("*/*/*.safetensors")
    alone = {path: path.stat().st_mtime_ns for path in measured}
    assert alone
    _, counted = look(project)
    assert project.dvc("repro") == ["quantize", "evaluate", "plot"]
    assert {path: path.stat().st_mtime_ns for path in alone} == alone
    assert look(project) == (counted + 1, counted + 1)


def test_a_failed_stage_loses_nothing(project):
    """A loss that diverges under dvc: its line is shown, dvc checkout brings all results back."""
    kept = ["metrics", "plots", "out/checkpoint", "out/strategies"]
    results = [p for name in kept for p in (project.folder / name).iterdir() if p.is_file()]
    before = {path: path.read_bytes() for path in results}
    model = project.folder / "quantifind/models/conv_mnist_model.py"
    source = model.read_text()
    model.write_text(source.replace("lr=0.001", "lr=1e30"))
    try:
        result = project.run("-m", "dvc", "repro")
        assert result.returncode != 0
        assert "train conv_mnist: the loss became nan" in result.stderr
        assert "training diverged" in result.stderr
        assert "Traceback" not in result.stderr
    finally:
        model.write_text(source)
    project.dvc("checkout", "--force")
    assert {path: path.read_bytes() for path in results} == before


def test_a_ladder_that_is_judged_again_has_the_look_that_it_had(project, monkeypatch):
    ledger, (k, counted) = project.folder / "looks.json", look(project)
    assert k == counted
    monkeypatch.chdir(project.folder)
    files.run(evaluate.main)
    assert look(project) == (k, counted)
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-30])
    fails(evaluate.main, "looks.json: a damaged ledger of looks")
    ledger.write_bytes(whole)


def test_a_new_model_file_leaves_trained_models_standing(project):
    model = project.folder / "quantifind/models/mine_model.py"
    shutil.copy(project.folder / "quantifind/models/dense_mnist_model.py", model)
    assert project.dvc("repro") == ["prepare"]
    model.unlink()


def test_a_limit_that_cannot_be_kept(conv):
    write_params(lambda params: params["search"].update(limit={"criterion_ratio": 1.0}, widths=[2]))
    message = "no candidate keeps criterion_ratio at most 1 with 95% confidence"
    fails(quantize_stage.main, message)
    write_params(lambda params: params["search"].update(limit={"criterion_ratio": 0.9}))
    fails(quantize_stage.main, "limit criterion_ratio is 0.9: 1 or more is needed")


def test_dependencies_are_what_a_stage_imports():
    """So that a changed module re-runs the stages that use it: make deps."""
    text = (ROOT / deps.PIPELINE).read_text(encoding="utf-8")
    assert deps.updated(text) == text
    without = re.sub(r"      - (quantifind|stages)/.*\n", "", text)
    assert deps.updated(without) == text


def test_heavy_imports_are_rare():
    """torch takes seconds, so the plot stage does without it; and only that one draws. What runs
    each time does without pandas and scipy's optimizers too."""
    after = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    # in one process after another, since a module that is imported stays
    for stages in (["select", "plot"], ["prepare", "train", "quantize", "evaluate"]):
        script = "\n".join(f"import stages.{stage}; {after}" for stage in stages)
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for stage, line in zip(stages, result.stdout.splitlines(), strict=True):
            modules = set(json.loads(line))
            assert ("torch" in modules) == (stage not in ("select", "plot"))
            assert stage != "select" or not {"pandas", "scipy.optimize"} & modules
            assert "torchvision" not in modules
            assert ("matplotlib.pyplot" in modules) == (stage == "plot")


def test_what_was_measured_is_of_the_code_in_every_room(tmp_path, monkeypatch):
    sources = [f for f in tracked_files() if re.match(r"quantifind/.*\.py$", f)]
    for file in sources:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    files.write_text(files.NETWORK_SOURCE, "a network\n")
    before = files.measured_folder()
    for file in [*sources, str(files.NETWORK_SOURCE)]:
        source = Path(file).read_text()
        Path(file).write_text(source + "# changed\n")
        matters = file.split("/")[1] not in files.UNMEASURED
        assert (files.measured_folder() != before) == matters, file
        Path(file).write_text(source)
    assert {"learning.py", "tensor", "network", "runtime", "mixed_precision", "schemes"} <= {
        file.split("/")[1] for file in sources
    }


def test_a_killed_training_is_resumed(project, conv):
    """After SIGKILL the next run goes on at the next epoch, to the same end."""
    write_params(lambda params: params["models"]["conv_mnist"].update(epochs=100))
    command = [sys.executable, "-m", "stages.train"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    stage = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 60
    resume = conv / "out/resume"
    while not list(resume.glob("*/checkpoint-00[1-9]?.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    (folder,) = resume.iterdir()
    # the one before may still be there, where the kill came between writing and removing
    last = max(folder.glob("checkpoint-*.pt"))
    assert 10 <= int(last.stem[-4:]) < 100
    left = [
        conv / "plots/history.csv",
        conv / "plots/training/val_loss.tsv",
        conv / "out/checkpoint/weights.safetensors",
    ]
    results = []
    # resumed, and from the start
    for python in (project.python, sys.executable):
        subprocess.run([python, *command[1:]], env=env, check=True)
        assert not folder.exists()
        results.append([path.read_bytes() for path in left])
    assert results[0] == results[1]


def test_ctrl_c_in_a_stage_is_one_line_that_says_what_is_kept(monkeypatch):
    monkeypatch.chdir(ROOT)

    def interrupted(_):
        raise KeyboardInterrupt

    fails(interrupted, f"interrupted; {files.KEPT}")


OWN = {
    "nets/my_net.py": """
import torch; from blocks import block
from torch import nn


def create_model_context():
    return nn.Sequential(block(784, 4), nn.Linear(4, 10)), nn.CrossEntropyLoss()
""",
    "nets/blocks.py": """
from torch import nn


def block(before, after):
    return nn.Sequential(nn.Flatten(), nn.Linear(before, after), nn.ReLU())
""",
}


@pytest.fixture(scope="module")
def own(project):
    """The project with a network, data and weights of one's own selected, all stages run."""
    for file, text in {**OWN, "nets/my_data.py": FEW_DATA}.items():
        (project.folder / file).parent.mkdir(exist_ok=True)
        (project.folder / file).write_text(text)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.ReLU()), nn.Linear(4, 10))
    save_file(net.state_dict(), project.folder / "trained.safetensors")
    before = project.params()
    entry = {
        "network": "nets/my_net.py",
        "data": "nets/my_data.py",
        "weights": "trained.safetensors",
    }
    params = {**before, "model": "own-v1.5", "models": {**before["models"], "own-v1.5": entry}}
    params["search"] = {"limit": {"criterion_ratio": 1.2}, **SEARCH}
    project.write_params(params)
    assert project.dvc("repro") == STAGES
    return project


def test_a_network_of_ones_own_with_its_weights(own):
    """From a file, of a name with a dot; no stage trains, and each copes with that."""
    history = pd.read_csv(own.folder / "plots/history.csv")
    assert list(history) == ["epoch", "train_loss", "val_loss"]
    assert history.empty
    written = load_file(own.folder / "out/checkpoint/weights.safetensors")
    given = load_file(own.folder / "trained.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in given.items())
    training = json.loads((own.folder / "metrics/training.json").read_text())
    assert training.keys() == {"val_loss", "val_accuracy"}
    answer = json.loads((own.folder / "metrics/recommendation.json").read_text())
    assert set(answer["tensors"]) == given.keys()
    page = own.folder / "dvc_plots/index.html"
    own.dvc("plots", "show", "-o", str(page.parent))
    assert "criterion_ratio" in page.read_text(encoding="utf-8")


def test_files_of_ones_own_are_dependencies(own):
    """Of the stages that read them, and of no others; a file that they import too."""
    stages = {
        "nets/my_net.py": {"prepare"},
        "nets/blocks.py": {"prepare"},
        "nets/my_data.py": {"prepare"},
        "nets/beside.py": set(),
        "trained.safetensors": {"train"},
    }
    for file, found in zip(stages, own.changed([(f, None) for f in stages]), strict=True):
        assert found == stages[file], file
    # data that are the same with another source train nothing again, another network does
    (own.folder / "nets/my_data.py").write_text(FEW_DATA + "# changed\n")
    assert own.dvc("repro", "train") == ["prepare"]
    (own.folder / "nets/blocks.py").write_text(OWN["nets/blocks.py"] + "# changed\n")
    assert own.dvc("repro", "train") == ["prepare", "train"]


def test_a_stage_runs_by_itself_in_a_clone(own):
    for path in (own.folder / "selected").glob("*.json"):
        path.unlink()
    assert own.dvc("repro", "--single-item", "--force", "prepare") == ["prepare"]


BAD = {
    "no file": ({"network": "nets/my_nte.py"}, "network: no file 'nets/my_nte.py'"),
    "no .py": ({"network": "nets/my_net"}, "network: no file 'nets/my_net': a path ends in .py"),
    "no data": ({"data": "my_dtaa.py"}, "data: no file 'my_dtaa.py'"),
    "no module": ({"network": "nets.my_nte"}, "no module 'nets.my_nte' can be imported"),
    "no weights": ({"weights": "trianed.pt"}, "weights: no file 'trianed.pt'"),
    "other ending": ({"weights": "my_data.py"}, "weights: 'my_data.py' is not a file of weights"),
    "limit": (
        {"search": {"limit": {"criterion": 2}}},
        "search: limit is {'criterion': 2.0}: a num",
    ),
    "engine": ({"engine": "dask"}, "engine 'dask' with scheduler None: dask needs one"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_choice_is_found_before_anything_runs(case, tmp_path, monkeypatch):
    """In the stages that come first, in one line, from the parameters alone."""
    changed, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    for file in OWN:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(OWN[file])
    Path("my_data.py").write_text("raise SystemExit('imported')")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    entry = {"network": "nets/my_net.py", "data": "my_data.py", "epochs": 1, "weights": None}
    entry |= {key: value for key, value in changed.items() if key in entry}
    beside = {key: value for key, value in changed.items() if key not in entry}
    params |= {"model": "own", "models": {"own": entry}} | beside
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for main in (select.main, prepare.main):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            main(read_params())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "harm", [{"all": np.nan}, {"all": np.inf}, {"first": np.inf, "last": np.nan}], ids=repr
)
def test_what_is_no_number_is_drawn_as_missing(conv, harm, monkeypatch):
    """A depth or a candidate of which nothing could be measured: pictures and numbers cope."""
    kept = {"mean_bits", "examples", "values", *plugins.names("costs")}
    places = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}
    read = files.parse_table

    def harmed(text):
        table = read(text)
        for column in table.select_dtypes("float"):
            if "bit" not in column and column not in kept and not column.startswith("original"):
                for rows, value in harm.items():
                    table.loc[table.index[places[rows]], column] = value
        return table

    monkeypatch.setattr(files, "parse_table", harmed)
    # which the answer, as it was left, is not
    monkeypatch.setattr(evidence, "_check_together", lambda found: None)
    drawn = []
    monkeypatch.setattr(files, "write_figure", lambda path, figure: drawn.append(figure))
    monkeypatch.setattr(plot, "write_svg", lambda path, figure: None)
    plot.main(read_params())
    assert len(drawn) == 9
    for figure in drawn:
        figure.draw_without_rendering()
    plt.close("all")
    results = harmed((files.PLOTS / "bit_depths.csv").read_text(encoding="utf-8"))
    files.write_json(Path("numbers.json"), answers.summarize(results, [1.05]))
    written = json.loads(Path("numbers.json").read_text(), parse_constant=pytest.fail)
    complexity = results["signal_to_complexity"]
    lowest = complexity.min() if np.isfinite(complexity).any() else None
    assert written["lowest_scr"]["value"] == (lowest and pytest.approx(lowest))


NUMBERS = st.floats() | st.integers() | st.booleans() | st.none() | st.text()
NUMPY = (
    st.floats().map(np.float64)
    | st.floats(width=32).map(np.float32)
    | st.integers(0, 9).map(np.int64)
)


@given(
    st.recursive(
        NUMBERS | NUMPY,
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
@settings(max_examples=30)
def test_what_json_does_not_have_is_null(tmp_path_factory, values):
    def wanted(value):
        if isinstance(value, dict):
            return {key: wanted(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [wanted(part) for part in value]
        if isinstance(value, float | np.floating) and not np.isfinite(value):
            return None
        return value

    path = tmp_path_factory.mktemp("json") / "values.json"
    files.write_json(path, values)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == wanted(values)
    assert files.read_json(path) == wanted(values)


def test_what_is_no_plain_value_is_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"values\.json: Object of type date is not JSON"):
        files.write_json(tmp_path / "values.json", {"when": datetime.date(2020, 1, 1)})
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_come_back_as_missing(tmp_path, monkeypatch):
    """In the facts of a ladder, which JSON has as null, and the evaluate stage as a table."""
    monkeypatch.chdir(tmp_path)
    empty = {"strategy": Strategy(), "quantized": Quantized({}, {})}
    facts = [{"ratio": 1.5, "high": np.inf, "none": np.nan}, {"ratio": np.nan, "high": 2.0}]
    ladder.write_ladder(pd.DataFrame([{**empty, **row} for row in facts]))
    *_, read = ladder.read_ladder()
    assert read.dtypes.astype(str).tolist() == ["float64"] * 3
    assert read["ratio"].tolist()[0] == 1.5
    assert read["high"].tolist()[1] == 2.0
    assert read.isna().to_numpy().tolist() == [[False, True, True], [True, False, True]]


def test_a_ladder_comes_back_as_it_was(tmp_path, monkeypatch):
    """Choices of all kinds, folded norms and rounded activations too."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 2))
    batches = [(torch.randn(5, 3, 9),)]
    kinds = ({"bits": 4, "axis": 0}, {"scheme": "codebook", "bits": 3, "storage": "coded"}, None)
    bias = {"scheme": "uniform", "bits": 8}
    rows = []
    for kind in kinds:
        choice = kind and {"scheme": "uniform", **kind}
        plain = Strategy(uniform_strategy(net, 5).tensors, uniform_activations(net, batches, 6))
        named = {"0.weight": choice, "0.bias": bias, "2.weight": choice, "2.bias": None}
        for strategy in (plain, Strategy(named, folded=(("0", "1"),))):
            rows.append(
                {"strategy": strategy, "quantized": quantize(net.eval(), strategy, batches)}
            )
    ladder.write_ladder(pd.DataFrame([row | {"facts": 1.0} for row in rows]))
    strategies, codes, _ = ladder.read_ladder()
    assert strategies == [row["strategy"] for row in rows]
    for read, row in zip(codes, rows, strict=True):
        assert read.folded == row["quantized"].folded == row["strategy"].folded
        assert read.activations.keys() == row["quantized"].activations.keys()
        for name, tensor in row["quantized"].tensors.items():
            assert_same(read.tensors[name], tensor)


def write_params(change) -> None:
    """params.yaml of the folder as it is, changed where it stands."""
    params = yaml.safe_load(files.PARAMS.read_text())
    change(params)
    files.PARAMS.write_text(yaml.safe_dump(params, sort_keys=False))


def test_bad_params(conv):
    entry = {"network": "conv_mnits_model"}
    write_params(lambda params: params["models"]["conv_mnist"].update(entry))
    message = "unknown 'conv_mnits_model': quantifind/models/ has conv_mnist_model"
    fails(prepare.main, message)
    write_params(lambda params: params.update(model="dense_mnits"))
    fails(evaluate.main, "model: unknown 'dense_mnits': models has conv_mnist")


def test_bad_data(conv):
    path = conv / "out/data/train.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    fails(train.main, "train.safetensors: truncated or altered")


def test_a_checkpoint_of_another_architecture(conv):
    path = conv / "out/checkpoint/network.json"
    made_by = json.loads(path.read_text())
    path.write_text(json.dumps(made_by | {"options": {"channels": [4, 5]}}))
    message = "weights.safetensors: a checkpoint of another architecture: 1.0.bias"
    fails(quantize_stage.main, message)


def test_a_weight_that_is_not_a_number(conv):
    weights = files.read_tensors(files.WEIGHTS)
    weights["0.0.bias"][1] = float("nan")
    files.write_tensors(files.WEIGHTS, weights)
    fails(quantize_stage.main, "0.0.bias: 1 of 4 values are NaN or infinite")


def test_a_network_that_does_not_fit_its_data(conv):
    entry = {"network": "simple_dense_model", "options": {}}
    write_params(lambda params: params["models"]["conv_mnist"].update(entry))
    message = "models.conv_mnist: network simple_dense_model does not fit data few_data: "
    fails(train.main, message)


def test_tensors_that_share_memory_are_written(tmp_path):
    values, path = torch.arange(4.0), tmp_path / "same.safetensors"
    files.write_tensors(path, {"inputs": values, "targets": values})
    assert files.read_tensors(path)["targets"].equal(values)
