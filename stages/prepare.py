"""Prepare: the selected data set's splits as tensors, and what a network must know of them."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantifind.storage.states import check_plain
from quantifind.utils import plugins
from quantifind.utils.naming import naming
from quantifind.utils.sources import own_sources
from stages import files, selection
from stages.networks import create_network
from stages.params import Params
from stages.splits import split_of, write_split
from stages.weights import check_weights, read_weights

# what a network is told the number of classes and the vocabulary of, by its place in a batch
TARGETS = ("targets", "batch['labels']", "batch['targets']")
INPUTS = ("inputs", "batch['input_ids']", "batch['inputs']")
WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    # a wrong name in the parameters is found before anything is trained: test_bad_params
    selection.check(params)
    entry, key = params.entry, f"{files.PARAMS}: models.{params.model}"
    with naming(f"{key}.network"):
        create_model_context = plugins.load("models", entry.network, "create_model_context")
        plugins.arguments(create_model_context, entry.options, {})
    with naming(f"{key}.data"):
        create_dataloaders = plugins.load("data", entry.data, "create_dataloaders")
    with naming(f"{files.PARAMS}: quantize.bit_depths"):
        check_depths(params.quantize.bit_depths, params.quantize.scheme)
    if entry.weights is not None:
        with naming(f"{key}.weights"):
            read_weights(Path(entry.weights))
    splits = create_splits(create_dataloaders, entry.data, params.seed)
    description = describe({name: tensors for name, (tensors, _) in splits.items()})
    made = create_network(entry.network, entry.options, description)
    check_plain(made.net.state_dict())
    if entry.weights is not None:
        with naming(f"{key}.weights"):
            check_weights(made.net, entry.weights)
    elif made.optimizer is None:
        raise ValueError(f"{key}.network: {entry.network} gives no optimizer: give weights, or one")
    for name, split in splits.items():
        write_split(files.DATA / f"{name}.safetensors", *split)
    files.write_json(files.DESCRIPTION, description)
    characters = plugins.find("data", entry.data, "characters")
    files.write_json(files.DATA / "characters.json", characters and list(characters()))
    sources = own_sources(entry.network) or [Path(inspect.getfile(create_model_context))]
    source = b"\n".join(path.read_bytes() for path in sources)
    files.write(files.NETWORK_SOURCE, lambda path: path.write_bytes(source))


def check_depths(depths: Sequence[int], scheme: str) -> None:
    """Raise ValueError unless a scheme has all the depths.

    depths: bits of a code.
    scheme: a module of `quantifind.schemes`, or anyone's; one without limits has all.
    """
    module = sys.modules[plugins.load("schemes", scheme, "quantize").__module__]
    low, high = getattr(module, "MIN_BITS", min(depths)), getattr(module, "MAX_BITS", max(depths))
    if wrong := [bits for bits in depths if not low <= bits <= high]:
        given = ", ".join(map(str, wrong))
        raise ValueError(f"scheme {scheme} takes {low} to {high} bits, not {given}")


def create_splits(
    create_dataloaders: Callable[..., Any], data: str, seed: int
) -> dict[str, tuple[dict[str, Tensor], Any]]:
    """All examples of a data set, by split, as `stages.splits.split_of` gives them.

    create_dataloaders: gives the three loaders.
    data: the name that an error has.
    seed: what it is called with, where it takes one.
    Raises: ValueError where that fails, or gives something else.
    """
    offered = plugins.arguments(create_dataloaders, {}, {"seed": seed})
    try:
        loaders = list(create_dataloaders(**offered))
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{data}: create_dataloaders(): {plugins.reason(error)}") from error
    if len(loaders) != len(files.SPLITS):
        wanted = ", ".join(files.SPLITS)
        raise ValueError(f"{data}: create_dataloaders() gives {len(loaders)} loaders, not {wanted}")
    splits = {}
    for name, loader in zip(files.SPLITS, loaders, strict=True):
        with naming(f"{data}: the {name} split"):
            splits[name] = split_of(loader)
    if len({tuple(tensors) for tensors, _ in splits.values()}) > 1:
        held = "; ".join(f"{name} has {', '.join(s)}" for name, (s, _) in splits.items())
        raise ValueError(f"{data}: batches differ from split to split: {held}")
    return splits


def describe(splits: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """What a network may have to know of its data.

    splits: tensors by their places in a batch, as `stages.splits.split_of` names them.
    Returns: ``examples`` by split; ``classes`` where targets are class labels, and ``vocabulary``
    where inputs are integer codes, each the largest over all splits plus one.
    Raises: ValueError naming the split that is empty or has NaN or infinite values.
    """
    for name, split in splits.items():
        for kind, values in split.items():
            if not len(values):
                raise ValueError(f"the {name} split has no examples")
            if bad := int((~values.isfinite()).sum()):
                raise ValueError(f"the {name} split: {bad} NaN or infinite {kind}")
    facts: dict[str, Any] = {
        "examples": {name: len(next(iter(s.values()))) for name, s in splits.items()}
    }
    for fact, kinds in (("classes", TARGETS), ("vocabulary", INPUTS)):
        for kind in kinds:
            tensors = [split[kind] for split in splits.values() if kind in split]
            if tensors and tensors[0].dtype in WHOLE_NUMBERS:
                facts[fact] = 1 + max(int(values.max()) for values in tensors)
    return facts


if __name__ == "__main__":
    files.run(main)
