"""A seeded linear map F: R^256 → R^256 and inputs it is applied to."""

import torch

from quantifind.utils.loaders import Loaders, Tensors
from quantifind.utils.loaders import create_dataloaders as split_at_random

SIZE = 256
EXAMPLES = 48_000


def create_dataloaders(*, batch_size: int = 64, seed: int = 0) -> Loaders:
    """Train (80%), validation (10%) and test (10%) loaders of pairs (x, F x).

    Batches are [x (examples, 256), F x (examples, 256)], float32; every coordinate of x and of
    F x has mean 0 and variance 1. The same seed gives the same F and the same inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    inputs = torch.randn(EXAMPLES, SIZE, generator=generator)
    return split_at_random(Tensors(inputs, inputs @ matrix.T), batch_size=batch_size, seed=seed)
