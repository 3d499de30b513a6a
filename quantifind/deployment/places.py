"""Where in the code of a network an error was raised."""

import linecache
import traceback
from pathlib import Path

import torch
from torch import nn

TORCH = str(Path(torch.__file__).parent)


def where(error: BaseException, model: nn.Module) -> str:
    """The module in which an error was raised, and the line of code, in words that follow others.

    It is the last line that is not torch's own, if there is one. Empty where no module was running.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[bool, str] = {}
    for frame, number in traceback.walk_tb(error.__traceback__):
        # whatever it is called: test_where_tracing_stops_is_said_however_forward_is_written
        module = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
        file = frame.f_code.co_filename
        if id(module) in names and frame.f_code.co_name != "_call_impl":
            line = linecache.getline(file, number).strip()
            own = f" `{line}` of {Path(file).name}:{number}" if line else ""
            name = names[id(module)].removeprefix("model.") or "the network"
            found[file.startswith(TORCH)] = f", in {name},{own} ({type(module).__name__})"
    return found.get(False, found.get(True, ""))
