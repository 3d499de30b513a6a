"""The project's own rules: one list of dependencies, clean code, a README that is true."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, tracked_files

from benchmarks import coverage, grids, search, speed, table
from benchmarks.peers import __main__ as peers

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_conda_installs_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, by_pip = environment["dependencies"]
    assert conda == [f"python{PYPROJECT['project']['requires-python']}", "pip"]
    assert by_pip == {"pip": ["--editable .[test]"]}
    assert "'.[test]'" in (ROOT / "Makefile").read_text()


def test_every_import_is_a_dependency():
    listed = [
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"]["test"],
        *PYPROJECT["project"]["optional-dependencies"]["cluster"],
        *PYPROJECT["project"]["optional-dependencies"]["datasets"],
    ]
    names = {re.split(r"[\[<>=]", item)[0].replace("-", "_") for item in listed}
    # what benchmarks/peers/ installs in environments of their own
    names |= {"modelopt", "optimum", "hqq", "aimet_torch", "nncf", "torchao"}
    names |= {"yaml", "sklearn", "quantifind", "stages", "benchmarks"}
    names |= {path.stem for path in (ROOT / "tests").glob("*.py")}
    for file in tracked_files():
        if file.endswith(".py"):
            text = (ROOT / file).read_text(encoding="utf-8")
            for module in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE):
                assert module in names | set(sys.stdlib_module_names), f"{file}: {module}"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_code_is_clean(command):
    program = [sys.executable, "-m", *command]
    if command == ["lint-imports"]:  # has no module to run
        program = [str(Path(sys.executable).with_name("lint-imports"))]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_tests_that_comments_name_are_there():
    tests = "".join((ROOT / f).read_text() for f in tracked_files() if f.startswith("tests/"))
    for file in tracked_files():
        if file.startswith(("quantifind/", "stages/")) and file.endswith(".py"):
            for name in re.findall(r"test_\w+", (ROOT / file).read_text(encoding="utf-8")):
                found = f"def {name.rstrip('_')}" in tests or f"{name}.py" in tests
                assert found, f"{file}: {name}"


def test_packages_are_empty_of_code():
    for file in tracked_files():
        if file.endswith("__init__.py"):
            assert not (ROOT / file).read_text().strip(), file


def test_readme_names_the_commands_that_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert {"repro", "test"} <= set(re.findall(r"^make (\w+)", readme, re.MULTILINE)) <= targets
    for model in re.findall(r"model=(\w+)", readme):
        assert model in yaml.safe_load((ROOT / "params.yaml").read_text())["models"]
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"python -m ([\w.]+)", readme):
        path = ROOT / script.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), script
    for script in re.findall(r"python (benchmarks/\w+\.py)", readme.replace("\n", " ")):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("benchmark", [table, grids, search, coverage, peers, speed])
def test_readme_table_is_what_its_command_measured(benchmark):
    measured = benchmark.markdown(pd.read_csv(benchmark.RESULTS))
    assert measured in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_path_of_one_machine_and_no_large_file():
    for file in tracked_files():
        path = ROOT / file
        assert path.stat().st_size < 12_000_000, file
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".lock", ""}:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|Users|work)/\w", text), file


def test_analytics_are_off():
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()
