"""A dense MNIST classifier, 784-512-512-10 with ReLU."""

from torch import nn
from torch.optim import Adam, Optimizer

from quantifind.utils.devices import device


def create_model_context(
    *, hidden: int = 512, classes: int = 10
) -> tuple[nn.Module, nn.Module, Optimizer]:
    """Network, images (examples, 1, 28, 28) → logits (examples, classes); criterion, optimizer."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    ).to(device())
    return model, nn.CrossEntropyLoss(), Adam(model.parameters(), lr=0.001)
