"""Whether all is a number that the float network makes of a split."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quantifind.metrics import Outcome
from quantifind.network.modules import PASS_FAILS, named_buffers, named_tensors
from quantifind.runtime.evaluator import Evaluator
from quantifind.utils.batches import tensors_of
from quantifind.utils.devices import evaluating
from quantifind.utils.naming import first_line


def float_outcome(evaluator: Evaluator, split: str) -> Outcome:
    """The float network's outcome on all examples.

    split: of which data they are, in words.
    Raises: ValueError for a pass that fails, and for outputs or losses that are not finite: both
        networks would have the same answer there (test_data_that_are_no_numbers_are_refused).
    """
    try:
        original = evaluator.original()
    except PASS_FAILS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the float network on {split}: {first_line(error)}") from error
    if original.nans:
        examples = sum(int(_has_nan(part).sum()) for part in original.parts)
        raise ValueError(
            f"the float network on {split}: {original.nans:,} of its outputs are NaN, in "
            f"{examples:,} of {len(original):,} examples{_because(evaluator)}"
        )
    if evaluator.criterion is not None and not math.isfinite(original.criterion):
        examples = int((~original["loss"].isfinite()).sum())
        if not examples:
            raise ValueError(
                f"the float network's loss on {split} is {original.criterion}: none of the "
                f"{len(original):,} examples has a label or a weight that counts"
            )
        raise ValueError(
            f"the float network's loss on {split} is {original.criterion}: a finite one is needed, "
            f"and {examples:,} of {len(original):,} examples have none{_because(evaluator)}"
        )
    return original


def _has_nan(part: dict[str, Tensor]) -> Tensor:
    if "nans" in part:
        return part["nans"] > 0
    return part["outputs"].isnan().reshape(len(part["outputs"]), -1).any(1)


def _because(evaluator: Evaluator) -> str:
    """What is not finite in a network, or else in its data, in words; nothing where all is."""
    for name, values in _own(evaluator.work).items():
        if bad := _bad([values]):
            return f"; {name}: {bad:,} of {values.numel():,} values are NaN or infinite"
    advice = "values that are NaN or infinite: leave these examples out, or mend them"
    given = targets = 0
    with evaluating(evaluator.work):
        for batch in evaluator.given_batches():
            given += _bad(tensors_of(batch.data))
            targets += _bad(tensors_of(batch.clone().run(evaluator.work)[1:]))
    if targets:
        return f"; the targets have {targets:,} {advice}"
    return f"; the batches have {given:,} {advice}" if given else ""


def _own(model: nn.Module) -> dict[str, Tensor]:
    return named_tensors(model) | named_buffers(model)


def _bad(tensors: Iterable[Tensor]) -> int:
    return sum(int((~values.isfinite()).sum()) for values in tensors)
