"""Hooks of mkdocs.yml: pages that stand elsewhere, links out of docs/, and docstrings as lists."""

import re
from pathlib import Path
from typing import Any

import griffe
import nbformat
from mkdocs.structure.files import File

import quantifind
from quantifind.utils import plugins

ROOT = Path(__file__).resolve().parent.parent
# pages of the project's other folders, by their name here
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "datasets/README.md": "datasets.md",
}
LINK = re.compile(r"\]\((?!http|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
# modules of the API beside the face of the package, by what they have of everyone's
WORKFLOW = ("data", "train", "quantize", "evaluation", "certification", "visualization")


def on_files(files: Any, config: Any) -> Any:
    """Add what is made: pages from elsewhere, the tour, the API, and files that pages link to."""
    made = {here: ROOT / path for path, here in PAGES.items()}
    texts = {here: path.read_text(encoding="utf-8") for here, path in made.items()}
    texts |= {"tour.md": tour(ROOT / "docs/tour.ipynb"), "api.md": api()}
    for here, text in texts.items():
        folder = made.get(here, ROOT / "docs/x").parent
        files.append(File.generated(config, here, content=moved(text, folder)))
    linked = {path for page in (ROOT / "docs").glob("*.md") for path in outside(page)}
    linked |= {path for page in made.values() for path in outside(page)}
    for path in sorted(linked):
        files.append(
            File.generated(config, f"source/{path.relative_to(ROOT)}", abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page of docs/, as they are here."""
    return markdown if page.file.generated_by else moved(markdown, ROOT / "docs")


def outside(page: Path) -> set[Path]:
    """Files that a page links to, and that are no pages here."""
    paths = {(page.parent / path).resolve() for path, _ in LINK.findall(page.read_text("utf-8"))}
    docs = ROOT / "docs"
    names = {ROOT / path for path in PAGES}
    return {p for p in paths if p.is_file() and not p.is_relative_to(docs) and p not in names}


def moved(text: str, folder: Path) -> str:
    """A page with its links as they are from the folder of all pages.

    folder: of the page, in the project.

    >>> moved("[a](docs/method.md#x), [b](LICENSE), [c](quantifind/schemes)", ROOT)
    '[a](method.md#x), [b](source/LICENSE), [c](api.md)'
    """

    def here(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve().relative_to(ROOT)
        anchor = link[2] or ""
        if (ROOT / path).is_dir():
            return "](api.md)"
        if path.parts[0] == "docs":
            return f"]({Path(*path.parts[1:])}{anchor})"
        return f"]({PAGES.get(str(path), f'source/{path}')}{anchor})"

    return LINK.sub(here, text).replace('src="docs/', 'src="')


def tour(path: Path) -> str:
    """A notebook as a page: its words, and its code, which tests run.

    path: of the notebook.
    """
    cells = nbformat.read(path, as_version=4).cells
    parts = [f"```py\n{c.source}\n```" if c.cell_type == "code" else c.source for c in cells]
    parts.insert(1, f"[The notebook]({path.name}), to run it.")
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """The page of the API: the face of the package, and the modules that are chosen by name."""
    parts = ["# API", quantifind.__doc__.split("\n", 1)[0], "## The package"]
    parts += [f"::: quantifind.{quantifind._HOMES[name]}.{name}" for name in quantifind.__all__]
    parts += ["## Workflow"]
    parts += [f"::: quantifind.workflow.{name}_workflow" for name in WORKFLOW]
    for folder in ("schemes", "costs", "data", "models"):
        parts.append(f"## {folder.capitalize()}")
        parts += [f"::: quantifind.{folder}.{name}" for name in plugins.names(folder)]
    return "\n\n".join(parts) + "\n"


class Arguments(griffe.Extension):
    """Docstrings whose arguments stand one a line, as lists."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """A docstring in which a line of an argument, of what is returned or raised, is a list's, and
    an example is code.

    >>> print(listed("Do it.\\n\\nbits: 1 to\\n    32.\\nReturns: it."))
    Do it.
    <BLANKLINE>
    - **bits**: 1 to
        32.
    - **Returns**: it.
    """
    lines: list[str] = []
    example = False
    for line in docstring.splitlines():
        if line.startswith(">>>") and not example:
            lines.append("```pycon")
        elif example and not line:
            lines.append("```")
        example = line.startswith(">>>") or (example and bool(line))
        found = None if example else re.match(r"([\w*]+(?:, [\w*]+)*): (.*)", line)
        if found:
            if lines and lines[-1] and not lines[-1].startswith(("- ", " ")):
                lines.append("")
            line = f"- **{found[1]}**: {found[2]}"
        lines.append(line)
    return "\n".join([*lines, "```"] if example else lines)
