"""From examples to the train, validation and test loaders."""

from quantifind.utils.loaders import create_dataloaders

__all__ = ["create_dataloaders"]
