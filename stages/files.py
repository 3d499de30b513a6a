"""Every path, every read and write of the stages, and a user's mistake in one line.

Files are written under another name and moved, so a kill leaves no half file.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from quantifind.utils import plugins
from quantifind.utils.memory import keep_freed_memory
from stages.params import Params, read_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from quantifind.strategy import Strategy

PARAMS = Path("params.yaml")
SPLITS = ("train", "val", "test")
DATA = Path("out/data")
DESCRIPTION = DATA / "description.json"
NETWORK_SOURCE = Path("out/network.py")
WEIGHTS = Path("out/checkpoint/weights.safetensors")
NETWORK = Path("out/checkpoint/network.json")
RESUME = Path("out/resume")
LADDER = Path("out/strategies/ladder.json")
FOUND = Path("out/strategies/found.json")
MEASURED = Path("out/search")
METRICS = Path("metrics")
PLOTS = Path("plots")
TEST_BATCH = 250


def run(main: Callable[[Params], None]) -> None:
    """Run a stage on the parameters; a user's mistake is one line and exit code 1."""
    stage = Path(sys.argv[0]).stem
    keep_freed_memory()
    try:
        params = read_params(PARAMS)
        stage += f" {params.model}"
        main(params)
    except (ValueError, OSError) as error:
        # DVC has removed what the stage would write anew: test_a_failed_stage_loses_nothing
        sys.exit(f"{stage}: {error} (dvc checkout brings earlier results back)")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Call ``save`` on a temporary path beside ``path``, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save(partial)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run dvc repro") from None


def write_table(path: Path, table: pd.DataFrame) -> None:
    write(path, lambda partial: table.to_csv(partial, index=False))


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> None:
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory: test_tensors_that_share_memory_are_written
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write(path, lambda partial: save_file(whole, partial))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or altered ({error}); run dvc repro --force") from None


def read_loader(split: str, *, batch_size: int, seed: int = 0) -> "DataLoader":
    """A prepared split; train is shuffled, by ``seed``."""
    from quantifind.utils.loaders import Tensors, batch_loader

    tensors = read_tensors(DATA / f"{split}.safetensors")
    dataset = Tensors(tensors["inputs"], tensors["targets"])
    return batch_loader(dataset, batch_size=batch_size, shuffle=split == "train", seed=seed)


def create_context(
    network: str, options: Mapping[str, Any], offered: Mapping[str, Any]
) -> tuple["nn.Module", "nn.Module", "Optimizer", dict[str, Any]]:
    """A network's model, criterion and optimizer, and the options they were made with."""
    create_model_context = plugins.load("models", network, "create_model_context")
    arguments = plugins.arguments(create_model_context, options, offered)
    try:
        return *create_model_context(**arguments), arguments
    except Exception as error:
        raise ValueError(f"{network} can't be made with options {arguments}: {error}") from None


def check_fit(
    net: "nn.Module", criterion: "nn.Module", loader: "DataLoader", params: Params
) -> None:
    """Raise ValueError, naming the entry, unless the network and its criterion take the data."""
    from quantifind.metrics import outcome

    try:
        outcome(net, [next(iter(loader))], criterion)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"params.yaml: models.{params.model}: network {params.entry.network} "
            f"does not fit data {params.entry.data}: {reason}"
        ) from None


def write_network(net: "nn.Module", network: str, options: Mapping[str, Any]) -> None:
    """The weights, and the module and options that make the network they belong to."""
    write_tensors(WEIGHTS, {name: tensor.cpu() for name, tensor in net.state_dict().items()})
    write_json(NETWORK, {"network": network, "options": dict(options)})


def read_network() -> tuple["nn.Module", "nn.Module"]:
    """The trained network and its criterion."""
    from quantifind.storage.checkpoints import check_same_architecture

    made_by = read_json(NETWORK)
    net, criterion, *_ = create_context(made_by["network"], made_by["options"], {})
    weights = read_tensors(WEIGHTS)
    check_same_architecture(net, weights, WEIGHTS)
    net.load_state_dict(weights)
    return net.eval(), criterion


@contextmanager
def resumable(params: Params) -> Iterator[Path]:
    """A folder for the checkpoints of exactly this training, removed when it has ended well.

    It is not an output of the stage, since DVC removes those before the stage runs; its name is a
    fingerprint of the parameters, the data and the code that is loaded, so no other training
    can go on from it.
    """
    data = [DATA / "train.safetensors", DATA / "val.safetensors", DESCRIPTION, NETWORK_SOURCE]
    folder = RESUME / _digest(repr((asdict(params.entry), params.seed)), data)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def measured_folder() -> Path:
    """Where a search keeps what it has measured, for the package and the network as they are.

    No output of the stage, as in `resumable`; networks and data have folders of their own in it.
    """
    rooms = (Path("quantifind"), Path("quantifind/schemes"), Path("quantifind/costs"))
    sources = sorted(path for room in rooms for path in room.glob("*.py"))
    return MEASURED / _digest("", [NETWORK_SOURCE, *sources])


def _digest(values: str, data: list[Path]) -> str:
    """Of values, data, and the code that is loaded."""
    digest = hashlib.sha256(values.encode())
    sources = {
        str(module.__file__)
        for name, module in sys.modules.items()
        if name.startswith(("quantifind.", "stages."))
    }
    for path in [*data, *map(Path, sorted(sources))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_ladder(rungs: list[tuple["Strategy", dict[str, Any]]]) -> None:
    """A search's ladder: each strategy's choices and facts, and the packed codes beside them."""
    from quantifind.storage import artifact

    described = []
    for number, (strategy, facts) in enumerate(rungs):
        assert strategy.fitted is not None
        tensors, codes = artifact.pack(strategy.fitted)
        write_tensors(_codes(number), tensors)
        described.append({**strategy.choices, "codes": codes, **facts})
    write_json(FOUND, described)


def read_ladder() -> list[tuple["Strategy", dict[str, Any]]]:
    """What `write_ladder` wrote."""
    from quantifind.storage import artifact
    from quantifind.strategy import Strategy

    rungs = []
    for number, facts in enumerate(read_json(FOUND)):
        tensors, activations, codes = (facts.pop(k) for k in ("tensors", "activations", "codes"))
        fitted = artifact.unpack(read_tensors(_codes(number)), codes)
        rungs.append((Strategy(tensors, activations, fitted), facts))
    return rungs


def _codes(number: int) -> Path:
    return FOUND.with_name(f"codes-{number:02d}.safetensors")


def write_figure(path: Path, figure: "Figure") -> None:
    write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
