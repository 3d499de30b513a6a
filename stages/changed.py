"""The test examples that quantization changed most, as a table of few rows: what the report shows
of raw data, and no more."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from quantifind.metrics import judged
from quantifind.quantize import quantize_model
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch, batches_of, joined, kept, tensors_of
from quantifind.utils.criteria import Criterion
from quantifind.utils.devices import evaluating
from quantifind.utils.torch_losses import as_module
from stages import files, networks

# pixels of the longer side of a picture, and characters of a text
SIDE, LONG = 64, 160
COLUMNS = ("example", "original_loss", "loss", "target", "was", "became", "kind", "shape", "input")


def changed_table(
    made: networks.Context,
    quantized: Quantized,
    loader: Any,
    columns: Mapping[str, np.ndarray],
    *,
    count: int,
    characters: Sequence[str] | None = None,
) -> pd.DataFrame:
    """A row for each of the examples that changed most, those with another answer first.

    made: the float network, what judges it, and how it takes a batch.
    quantized: what has become of it.
    loader: of test data, in the order of the columns.
    columns: by example, as `quantifind.metrics.paired` has them.
    count: of the examples, at most.
    characters: what the codes of texts stand for, where inputs are such.
    Returns: `COLUMNS`; ``target``, ``was`` and ``became`` are classes, and missing where there are
        none; ``kind`` is "picture", whose ``input`` is bytes of its ``shape`` in base64, or "text"
        or "numbers", whose input is a text as JSON has it, since a name may be NA. No row where
        batches can't be cut into examples.
    """
    criterion, forward = made.criterion, made.forward
    whole = joined(kept(batches_of(loader, made.net, criterion, forward)))
    if not count or whole is None or len(whole) != len(columns["loss"]):
        return pd.DataFrame(columns=list(COLUMNS))
    rows = most_changed(columns, count)
    few = whole[torch.from_numpy(rows)]
    small = quantize_model(made.net, quantized)
    was, target = _answers(few, made.net, criterion)
    became, _ = _answers(few, small, criterion)
    table = pd.DataFrame(dict.fromkeys(COLUMNS, np.nan), index=range(len(rows)))
    table["example"] = rows
    for name in ("original_loss", "loss"):
        table[name] = columns[name][rows]
    for name, values in (("was", was), ("became", became), ("target", target)):
        if values is not None:
            table[name] = values.tolist()
    inputs = tensors_of(few.data)[0].cpu()
    shown = pd.DataFrame([_shown(one, characters) for one in inputs], index=table.index)
    return table.drop(columns=["kind", "shape", "input"]).join(shown)


def most_changed(columns: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Which examples changed most, at most so many: other answers first, then other losses.

    columns: as `changed_table` takes them.
    """
    by = np.nan_to_num(np.abs(columns["loss"] - columns["original_loss"]), nan=np.inf)
    flipped = np.asarray(columns.get("flipped", np.zeros(len(by), dtype=bool)))
    return np.lexsort((np.arange(len(by)), -by, ~flipped))[:count].copy()


def _answers(
    few: Batch, net: nn.Module, criterion: Criterion | None
) -> tuple[Tensor | None, Tensor | None]:
    """The class that a network gives each example, as `quantifind.metrics.judged` has it, and the
    true one; None where there are none."""
    with evaluating(net):
        outputs, *targets = few.run(net)
        found = judged(as_module(criterion), outputs, *targets).parts[0]
    if "answer" not in found:
        return None, None
    return found["answer"].long().cpu(), targets[0].reshape(-1).long().cpu()


def _shown(values: Tensor, characters: Sequence[str] | None) -> dict[str, Any]:
    """An input as plain values: a picture, a text, or the first numbers."""
    pixels = values.dim() == 3 and values.shape[0] in (1, 3) and min(values.shape[1:]) > 3
    if pixels and values.is_floating_point():
        step = -(-max(values.shape[1:]) // SIDE)
        picture = values[:, ::step, ::step].double()
        low, high = min(picture.min().item(), 0.0), max(picture.max().item(), 1e-12)
        high = 1.0 if 0.5 < high <= 1 and low == 0 else high
        raw = ((picture - low) / (high - low) * 255).round().clamp(0, 255).byte()
        raw = raw.permute(1, 2, 0).contiguous()
        text = base64.b64encode(raw.numpy().tobytes()).decode()
        return {"kind": "picture", "shape": "x".join(map(str, raw.shape)), "input": text}
    flat = values.flatten()[:LONG].tolist()
    if characters is not None and values.dim() == 1 and not values.is_floating_point():
        known = [characters[c] if 0 <= c < len(characters) else "?" for c in flat]
        return {"kind": "text", "shape": np.nan, "input": json.dumps("".join(known))}
    text = " ".join(f"{value:.3g}" for value in flat[:8]) + (" …" if values.numel() > 8 else "")
    return {"kind": "numbers", "shape": np.nan, "input": json.dumps(text)}


def read_characters() -> list[str] | None:
    """What the codes of texts stand for, as the stage prepare wrote it; None for other data."""
    found: list[str] | None = files.read_json(files.DATA / "characters.json")
    return found
