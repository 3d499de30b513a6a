"""Prepare: the selected data set's splits as tensors, and what a network must know of them."""

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from quantifind.utils import plugins
from quantifind.utils.loaders import whole_split
from stages import files
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    # a wrong name in the parameters is found before anything is trained: test_bad_params
    entry = params.entry
    create_model_context = plugins.load("models", entry.network, "create_model_context")
    plugins.arguments(create_model_context, entry.options, {})
    plugins.check("schemes", params.quantize.scheme)
    create_dataloaders = plugins.load("data", entry.data, "create_dataloaders")
    loaders = create_dataloaders(**plugins.arguments(create_dataloaders, {}, {"seed": params.seed}))
    splits = {
        name: dict(zip(("inputs", "targets"), whole_split(loader), strict=True))
        for name, loader in zip(files.SPLITS, loaders, strict=True)
    }
    for name, split in splits.items():
        files.write_tensors(files.DATA / f"{name}.safetensors", split)
    files.write_json(files.DESCRIPTION, describe(splits))
    source = Path(inspect.getfile(create_model_context)).read_bytes()
    files.write(files.NETWORK_SOURCE, lambda path: path.write_bytes(source))


def describe(splits: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """What a network may have to know of its data.

    Returns: ``examples`` by split; ``classes`` where targets are class labels, and ``vocabulary``
    where inputs are integer codes, each the largest over all splits plus one.
    Raises: ValueError naming the split that is empty or has NaN or infinite inputs or targets.
    """
    for name, split in splits.items():
        for kind, values in split.items():
            if not len(values):
                raise ValueError(f"the {name} split has no examples")
            if bad := int((~values.isfinite()).sum()):
                raise ValueError(f"the {name} split: {bad} NaN or infinite {kind}")
    facts: dict[str, Any] = {"examples": {name: len(s["inputs"]) for name, s in splits.items()}}
    for fact, kind in (("classes", "targets"), ("vocabulary", "inputs")):
        tensors = [split[kind] for split in splits.values()]
        if not tensors[0].is_floating_point():
            facts[fact] = 1 + max(int(values.max()) for values in tensors)
    return facts


if __name__ == "__main__":
    files.run(main)
