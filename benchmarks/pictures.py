"""Pictures of pages, as a browser shows them: docs/comparison.png of stages.compare, and
docs/plots_diff.png of dvc plots diff: python -m benchmarks.pictures [REVISION …]

Without revisions, of all models that have results. Needs chromium or google-chrome.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import grids
from stages import files, revisions
from stages.comparison import comparison

DOCS = grids.ROOT / "docs"
COMPARISON, PLOTS_DIFF = DOCS / "comparison.png", DOCS / "plots_diff.png"
# of the comparison: the answer, the first chart and where the bits go
ONLY = """() => {
  const shown = [...document.querySelectorAll("section")].filter(
    (one, place) => place !== 1 && !one.querySelector("#where"));
  for (const one of shown) one.remove();
  document.querySelector("header ul").remove();
}"""
# of DVC's page: the chart of the criterion ratio near 1
CHART = "criterion_ratio_near_one"


def shoot(page: Path, picture: Path, *, width: int, change: str = "", part: str = "body") -> None:
    """Write a picture of a page.

    page: a file of HTML.
    picture: a PNG.
    width: of the window, in pixels.
    change: JavaScript that runs before.
    part: a CSS selector of what is shown.
    """
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise ValueError("no chromium or google-chrome is installed: apt-get install chromium")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        size = {"width": width, "height": 900}
        shown = started.new_page(viewport=size, device_scale_factor=1.5, color_scheme="light")
        shown.goto(page.resolve().as_uri(), wait_until="load")
        shown.wait_for_timeout(1000)
        if change:
            shown.evaluate(change)
        shown.locator(part).first.screenshot(path=picture)
        started.close()


def compare(names: list[str], folder: Path) -> None:
    """The picture of the comparison.

    names: of revisions; none for all models.
    folder: for the page.
    """
    page = folder / "comparison.html"
    files.write_text(page, comparison(revisions.results(names)))
    shoot(page, COMPARISON, width=960, change=ONLY, part="main")


def plots_diff(names: list[str], folder: Path) -> None:
    """The picture of a chart in which DVC has two revisions.

    names: of two revisions.
    folder: for the page.
    """
    command = [sys.executable, "-m", "dvc", "plots", "diff", *names, "--out", str(folder)]
    subprocess.run([*command, "--targets", CHART], check=True, stdout=subprocess.DEVNULL)
    shoot(folder / "index.html", PLOTS_DIFF, width=760)


def main() -> None:
    """Write both."""
    names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        compare(names, Path(folder))
        plots_diff(names[:2] or [revisions.WORKSPACE, *revisions.known()][:2], Path(folder))


if __name__ == "__main__":
    main()
