"""Make offline.html, the page of `dvc plots`, with Vega (BSD 3-Clause) inlined: no network needed.

The versions are those that DVC's own page loads. Needs npm:

    python .dvc/plots/make_offline_page.py
"""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGES = {"vega": "5.20.2", "vega-lite": "5.2.0", "vega-embed": "6.18.2"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Quantifind plots</title>
<style>body { font-family: sans-serif; } #plots { display: flex; flex-wrap: wrap; }</style>
%s
</head>
<body><div id="plots">
{plot_divs}
</div></body>
</html>
"""


def script(name: str, version: str) -> str:
    """A package's minified code with its licence, as a script element."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        raw = next(Path(folder).glob("*.tgz")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(raw)) as package:
        code, licence = (
            package.extractfile(f"package/{file}").read().decode()
            for file in (f"build/{name}.min.js", "LICENSE")
        )
    # what would end the element, or be filled in by DVC, must not stand in it
    code = code.replace("</script", "<\\/script")
    assert not any(f"{{{field}}}" in code for field in ("scripts", "plot_divs", "refresh_tag"))
    return f"<!-- {name} {version}\n{licence}-->\n<script>{code}</script>"


def main() -> None:
    scripts = "\n".join(script(*package) for package in PACKAGES.items())
    page = Path(__file__).parent / "offline.html"
    page.write_text(PAGE.replace("%s", scripts), encoding="utf-8")
    print(f"{page.name}: {page.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
