"""Every path, the reads and writes that all stages share, and a user's mistake in one line.

Files are written under another name and moved, so a kill leaves no half file. torch and
pandas are imported by the functions that need them, since some stages do without:
test_heavy_imports_are_rare
"""

import hashlib
import io
import json
import math
import numbers
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantifind.utils.memory import keep_freed_memory
from quantifind.utils.whole_files import written_whole
from stages.params import Params, read_params

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

PARAMS = Path("params.yaml")
SPLITS = ("train", "val", "test")
DATA = Path("out/data")
DESCRIPTION = DATA / "description.json"
# the entry that `model` in params.yaml selects, and digests of the files of one's own that it names
SELECTED = Path("selected/model.json")
SELECTED_SOURCES = Path("selected/sources.json")
SELECTED_WEIGHTS = Path("out/weights.json")
NETWORK_SOURCE = Path("out/network.py")
WEIGHTS = Path("out/checkpoint/weights.safetensors")
# what is no tensor in the network's state, where there is such
EXTRA = Path("out/checkpoint/extra_state.pt")
NETWORK = Path("out/checkpoint/network.json")
RESUME = Path("out/resume")
UNIFORM = Path("out/strategies/uniform.json")
LADDER = Path("out/strategies/ladder.json")
# of uniform depths, and of the float network beside them, fitted to validation data
TEMPERATURES = Path("out/strategies/temperatures.json")
# the limits of the search, by measure
LIMITS = Path("out/strategies/limits.json")
# float weights that had the training of what learned from labels
CONTROL = Path("out/strategies/control.safetensors")
MEASURED = Path("out/search")
# what is taken along: the network, and what says what it is
SAVED = Path("out/network.safetensors")
CARD = Path("out/README.md")
# for other runtimes, and beside them what each tensor takes there
EXPORTS = Path("out/exports")
EXPORTED = EXPORTS / "bytes.csv"
# curves of a stage that runs
TRAINING, SEARCHING = Path("plots/training"), Path("plots/search")
METRICS = Path("metrics")
PLOTS = Path("plots")
TEST_BATCH = 250
# what an interrupt leaves: epochs in `RESUME`, measurements in `MEASURED`
KEPT = "whole epochs and what was measured are kept, and dvc repro goes on from there"
# rooms through which no measurement goes; of the models, one is in `NETWORK_SOURCE`
UNMEASURED = ("data", "deployment", "models", "workflow")


def run(main: Callable[[Params], None], *, staged: bool = True) -> None:
    """Run a stage on the parameters; a user's mistake, and Ctrl-C, is one line and exit code 1.

    main: the stage.
    staged: whether DVC runs it.
    Raises: SystemExit, after ValueError, OSError and KeyboardInterrupt; those are its context.
    """
    stage = Path(sys.argv[0]).stem
    keep_freed_memory()
    try:
        params = read_params(PARAMS)
        stage += f" {params.model}" if staged else ""
        main(params)
    except KeyboardInterrupt:
        sys.exit(f"{stage}: interrupted" + (f"; {KEPT}" if staged else ""))
    except (ValueError, OSError) as error:
        # DVC has removed what the stage would write anew: test_a_failed_stage_loses_nothing
        back = " (dvc checkout brings earlier results back)" if staged else ""
        sys.exit(f"{stage}: {error}{back}")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file that is whole or not there.

    path: its name; its folder is made if needed.
    save: writes it, given a temporary path beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8.

    path: as for `write`.
    text: all of it.
    """
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write plain values; NaN and infinity, which JSON does not have, as null.

    path: as for `write`.
    values: dicts, lists, texts and numbers.
    Raises: ValueError naming the file, and the kind of a value that is none of these.
    """
    try:
        text = json.dumps(_in_json(values), indent=2, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n")


def _in_json(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _in_json(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_in_json(value) for value in values]
    if isinstance(values, numbers.Real) and not isinstance(values, numbers.Integral):
        return float(values) if math.isfinite(values) else None
    return values.item() if type(values).__module__ == "numpy" else values


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    path: the file.
    Raises: ValueError naming it where it is not JSON; OSError where it can't be read.
    """
    return parse_json(path, path.read_text(encoding="utf-8"))


def parse_json(path: Path, text: str) -> Any:
    """What `write_json` wrote as a text.

    path: the file that it is from.
    Raises: ValueError naming it where it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run dvc repro") from error


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a table without its index, as CSV.

    path: as for `write`.
    table: of texts and numbers.
    """
    write(path, lambda partial: table.to_csv(partial, index=False))


def parse_table(text: str) -> "pd.DataFrame":
    """The table in a text that `write_table` wrote.

    text: as CSV.
    Raises: ValueError where it is no table.
    """
    import pandas as pd

    table = pd.read_csv(io.StringIO(text))
    # a tensor may be called 0.10 or NA: test_names_that_look_like_numbers_come_back
    if named := [column for column in ("name", "tensor") if column in table]:
        how: Any = {"usecols": named, "dtype": str, "keep_default_na": False}
        table[named] = pd.read_csv(io.StringIO(text), **how)
    return table


def write_tensors(
    path: Path, tensors: dict[str, "Tensor"], facts: dict[str, str] | None = None
) -> None:
    """Write tensors in the safetensors format.

    path: as for `write`.
    tensors: by name.
    facts: texts that stand beside them.
    """
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory: test_tensors_that_share_memory_are_written
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write(path, lambda partial: save_file(whole, partial, facts))


def read_tensors(path: Path, *, advice: str = "run dvc repro --force") -> dict[str, "Tensor"]:
    """What `write_tensors` wrote, on the CPU.

    path: the file.
    advice: what to do where it is not whole.
    Raises: ValueError naming it where it is not whole; OSError where it can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or altered ({error}); {advice}") from error


def read_facts(path: Path) -> dict[str, str]:
    """The texts that `write_tensors` put beside the tensors.

    path: the file.
    Raises: as `read_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or altered ({error})") from error


@contextmanager
def resumable(params: Params) -> Iterator[Path]:
    """A folder for the checkpoints of exactly this training, removed when it has ended well.

    It is not an output of the stage, since DVC removes those before the stage runs. Its name is a
    fingerprint of the parameters, the data and the code that is loaded, so no other training can go
    on from it.

    params: whose selected model is trained.
    """
    data = [DATA / "train.safetensors", DATA / "val.safetensors", DESCRIPTION, NETWORK_SOURCE]
    folder = RESUME / _digest(repr((asdict(params.entry), params.seed)), data)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def measured_folder() -> Path:
    """Where a search keeps what it has measured, for the package and the network as they are.

    It is no output of the stage, as in `resumable`. Networks and data have folders of their own in
    it.
    """
    sources = sorted(
        path for path in Path("quantifind").rglob("*.py") if path.parts[1] not in UNMEASURED
    )
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


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as a PNG.

    path: as for `write`.
    figure: what to draw.
    """
    write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
