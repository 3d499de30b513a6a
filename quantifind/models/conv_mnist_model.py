"""A convolutional MNIST classifier: three blocks of 3×3 convolution, ReLU and 2×2 max pooling."""

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from quantifind.utils.devices import device


def create_model_context(
    *, channels: tuple[int, ...] = (32, 64, 128), classes: int = 10
) -> tuple[nn.Module, nn.Module, Optimizer]:
    """Network, images (examples, 1, 28, 28) → logits (examples, classes); criterion, optimizer."""
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        for before, after in zip((1, *channels), channels, strict=False)
    ]
    side = 28 // 2 ** len(channels)
    head = nn.Linear(channels[-1] * side * side, classes)
    model = nn.Sequential(*blocks, nn.Flatten(), head)
    # convolutions read this layout faster
    model = model.to(device()).to(memory_format=torch.channels_last)
    return model, nn.CrossEntropyLoss(), Adam(model.parameters(), lr=0.001)
