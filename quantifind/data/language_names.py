"""Names and the nationality each comes from (datasets/languagenames.tar)."""

from pathlib import Path

import torch

from quantifind.utils.loaders import Loaders, Tensors
from quantifind.utils.loaders import create_dataloaders as split_at_random
from quantifind.utils.name_archive import ARCHIVE, alphabet, read_names

PADDING = 0


def characters() -> list[str]:
    """What each code stands for, nothing for padding; the report shows names by it."""
    return ["", *alphabet(read_names(ARCHIVE))]


def create_dataloaders(*, batch_size: int = 64, seed: int = 0, archive: Path = ARCHIVE) -> Loaders:
    """Train (80%), validation (10%) and test (10%) loaders of names.

    Batches are [character codes (examples, longest name) int64, 0 where the name has ended,
    nationalities (examples,) int64, numbered by sorted file name].
    Raises: ValueError as `quantifind.utils.name_archive.read_names` says.
    """
    names = read_names(archive)
    code = {character: i for i, character in enumerate(alphabet(names), start=PADDING + 1)}
    pairs = [(name, label) for label, group in enumerate(names.values()) for name in group]
    codes = torch.full((len(pairs), max(len(name) for name, _ in pairs)), PADDING)
    for row, (name, _) in zip(codes, pairs, strict=True):
        row[: len(name)] = torch.tensor([code[character] for character in name])
    labels = torch.tensor([label for _, label in pairs])
    return split_at_random(Tensors(codes, labels), batch_size=batch_size, seed=seed)
