"""The project's own rules: one list of dependencies, clean code, rooms of a size and in order."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tracked_files

PLUGINS = {"costs", "data", "models", "schemes"}
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
        *PYPROJECT["project"]["optional-dependencies"]["docs"],
        *PYPROJECT["project"]["optional-dependencies"]["kernels"],
        *PYPROJECT["project"]["optional-dependencies"]["onnx"],
        *PYPROJECT["project"]["optional-dependencies"]["strangers"],
    ]
    names = {re.split(r"[\[<>=]", item)[0].replace("-", "_") for item in listed}
    # what benchmarks/peers/ installs in environments of their own
    names |= {"modelopt", "optimum", "hqq", "aimet_torch", "nncf", "torchao", "nncodec"}
    names |= {"yaml", "sklearn", "vl_convert", "griffe", "quantifind", "stages", "benchmarks"}
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
        if file.endswith("__init__.py") and file != "quantifind/__init__.py":
            assert not (ROOT / file).read_text().strip(), file


def test_an_arrow_upward_fails(tmp_path):
    for folder in ("quantifind", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    low = tmp_path / "quantifind/tensor/packing.py"
    low.write_text(low.read_text() + "\nimport quantifind.search\n")
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [str(program), "--no-cache"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "arrows between rooms run down only BROKEN" in result.stdout
    assert "quantifind.tensor is not allowed to import quantifind.search" in result.stdout


def test_rooms_at_the_top_are_few():
    entries = {file.split("/")[1] for file in tracked_files() if file.startswith("quantifind/")}
    assert len(entries - PLUGINS - {"__init__.py", "workflow"}) <= 13


@pytest.mark.parametrize(
    "file", [f for f in tracked_files() if f.startswith(("quantifind/", "stages/")) and ".py" in f]
)
def test_modules_and_functions_are_short(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node, text) <= 60, node.name


def code_lines(function: ast.FunctionDef, text: str) -> int:
    """Lines of a function but for docstrings, blank lines and comments."""
    lines = dict(enumerate(text.splitlines(), start=1))
    documented = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(function):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for number in range(docstring.lineno, docstring.end_lineno + 1):
                lines.pop(number)
    own = range(function.lineno, function.end_lineno + 1)
    return sum(lines.get(n, "").strip()[:1] not in ("", "#") for n in own)


def test_no_path_of_one_machine_and_no_large_file():
    for file in tracked_files():
        path = ROOT / file
        assert path.stat().st_size < 12_000_000, file
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".lock", ""}:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|Users|work)/\w", text), file


def test_analytics_are_off():
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()
