"""The pages of the documentation can be made: every link is checked, and nothing is a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import quantifind


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder: Path = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_stands_in_the_contents(made):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": (\w+)\.md$", text, re.MULTILINE))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index", "tour", "api", "contributing", "datasets"} == named
    assert all((made / f"{name}.html").exists() for name in named)
    assert yaml.safe_load(text)["strict"]


def test_the_api_has_each_name_of_the_face(made):
    text = (made / "api.html").read_text(encoding="utf-8")
    for name in quantifind.__all__:
        assert f'id="quantifind.{quantifind._HOMES[name]}.{name}"' in text
    assert "<strong>calibration</strong>" in text  # arguments are lists


def test_pages_ask_nobody(made):
    for page in made.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        asked = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', text)
        asked += re.findall(r'<link[^>]* rel="(?:stylesheet|icon)"[^>]* href="([^"]+)"', text)
        assert not [one for one in asked if one.startswith(("http", "//"))], page.name
