"""An environment for each peer: its pinned packages, and the project's torch beside them."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# the peer itself first
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    # its import asks for huggingface_hub, which its requirements leave out
    "modelopt": ("nvidia-modelopt==0.47.0", "huggingface_hub==2.4.0"),
    "quanto": ("optimum-quanto==0.2.7",),
    "hqq": ("hqq==0.2.8.post1",),
    "aimet": ("aimet-torch==2.42.0",),
    "nncf": ("nncf==3.4.0",),
    "torchao": ("torchao==0.18.0",),
    # from source, which needs a C++ compiler; its numpy is older than the project's
    "nncodec": ("nncodec==2.1.3",),
}
# HQQ would try to build CUDA kernels, which nothing here uses
WITHOUT_KERNELS = {"DISABLE_CUDA": "1"}


def python_of(peer: str, environments: Path) -> Path:
    """The Python of a peer's environment, which is made where it is not there as pinned.

    Packages of the project's environment are seen from it, behind its own: torch is installed once
    more only for a peer whose requirements rule out the project's.
    Raises: RuntimeError with the last line of what pip said, if it could not install the peer.
    """
    folder = environments / peer
    python = folder / "bin" / "python"
    installed = folder / "installed"
    wanted = "\n".join(REQUIREMENTS[peer])
    if installed.is_file() and installed.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]]
    pip = subprocess.run(
        command, env=os.environ | WITHOUT_KERNELS, capture_output=True, text=True, check=False
    )
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError((errors or pip.stderr.splitlines() or ["pip said nothing"])[-1])
    installed.write_text(wanted, encoding="utf-8")
    return python
