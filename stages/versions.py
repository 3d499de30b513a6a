"""What a run depended on that is no file of it: versions and the kind of system."""

import platform
from importlib import metadata

PACKAGES = ("quantifind", "torch", "torchvision", "numpy", "scipy", "pandas", "dvc")


def versions() -> dict[str, str]:
    """By name the version of Python, of the packages that results depend on, and of the system."""
    known = {name: _version(name) for name in PACKAGES}
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), **known, "system": system}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
