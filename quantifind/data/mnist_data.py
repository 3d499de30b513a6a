"""The MNIST digits (LeCun, Cortes and Burges, CC BY-SA 3.0), images in [0, 1], no transforms."""

import gzip
import hashlib
import tempfile
from pathlib import Path

from torchvision.datasets import MNIST

from quantifind.utils.loaders import Loaders, Tensors, random_split, split_loaders

DATASETS = Path(__file__).parent.parent.parent / "datasets"
VALIDATION_EXAMPLES = 6_000


def create_dataloaders(*, batch_size: int = 64, seed: int = 0, root: Path = DATASETS) -> Loaders:
    """The train (54,000), validation (6,000) and test (MNIST's own 10,000) loaders.

    Batches are [images (examples, 1, 28, 28) float32 in [0, 1], digits (examples,) int64].
    root: the folder that holds ``MNIST/raw/*.gz`` and their checksums in ``SHA256SUMS``.
    Raises: ValueError naming the file that is missing, truncated or altered.
    """
    # torchvision reads the IDX files uncompressed only
    with tempfile.TemporaryDirectory() as folder:
        for file in verified_files(Path(root)):
            target = Path(folder) / "MNIST" / "raw" / file.stem
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(gzip.decompress(file.read_bytes()))
        splits = [MNIST(folder, train=train, download=False) for train in (True, False)]
    train, test = (Tensors(s.data.unsqueeze(1).float().div(255), s.targets) for s in splits)
    sizes = [len(train) - VALIDATION_EXAMPLES, VALIDATION_EXAMPLES]
    train, val = random_split(train, sizes, seed=seed)
    return split_loaders(train, val, test, batch_size=batch_size, seed=seed)


def verified_files(root: Path) -> list[Path]:
    """MNIST's files that SHA256SUMS lists, each found to have its checksum."""
    lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    files = [root / name for name in sums if name.startswith("MNIST/")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing; bring it back with git checkout")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != (expected := sums[file.relative_to(root).as_posix()]):
            raise ValueError(
                f"{file}: truncated or altered: its SHA-256 is {digest}, "
                f"{root / 'SHA256SUMS'} says {expected}"
            )
    return files
