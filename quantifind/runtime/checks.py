"""Whether a network takes its batches, and whether two passes give the same."""

from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import judged
from quantifind.network.modules import PASS_FAILS, run
from quantifind.utils.batches import Batch, rows_of, tensors_of
from quantifind.utils.criteria import Criterion, CriterionError, check_criterion, name_of

# examples of which it is seen whether the others of a batch count
FEW = 4


def check_batch(model: nn.Module, batch: Batch, criterion: Criterion | None) -> None:
    """Raise ValueError, of one line, unless a network takes a batch, and its criterion what it
    gives."""
    outputs, *targets = run(model, batch)
    if criterion is not None and not targets:
        raise ValueError(f"{batch} has no targets for {name_of(criterion)}: give criterion=None")
    try:
        judged(criterion, outputs, *targets)
        check_criterion(criterion, outputs, *targets)
    except CriterionError:
        raise
    except PASS_FAILS as error:
        reason = str(error).partition("\n")[0]
        given = ", ".join(str(list(tensor.shape)) for tensor in tensors_of([outputs, *targets]))
        raise ValueError(
            f"{name_of(criterion)} does not take what it is given, of shapes {given}: {reason}; "
            "forward=lambda model, batch: (outputs, targets) says what it gets"
        ) from error


def independent(model: nn.Module, batch: Batch) -> bool:
    """Whether an example's outputs are the same in another batch
    (test_a_batch_that_counts_as_one_stays)."""
    some = first_of(batch)
    if rows_of(some.data) is None:
        return False
    if len(some) < 2:
        return True
    try:
        together = tensors_of(some.clone().run(model)[0])
        alone = [tensors_of(some[i : i + 1].clone().run(model)[0]) for i in (0, 1)]
        return all(
            rows_of(whole) == len(some) and _close(torch.cat(parts), whole[:2])
            for whole, *parts in zip(together, *alone, strict=True)
        )
    except PASS_FAILS:
        return False


def first_of(batch: Batch) -> Batch:
    """A few of its examples, where they can be told apart."""
    return batch if rows_of(batch.data) is None else batch[:FEW]


def equal(one: Tensor, other: Tensor) -> bool:
    """NaN is what it was, where it was."""
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def excess(tolerance: float, found: Any, wanted: Any) -> float | None:
    """The largest error of an output, where it is above a tolerance, a share of its largest value;
    else None."""
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        error = torch.where(one == other, 0.0, (one - other).abs()).max().item()
        largest = torch.where(other.isinf(), 0.0, other).abs().max().item()
        if not error <= tolerance * largest and not (one.isnan() & other.isnan()).all():
            return error
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = torch.where(other.isfinite(), other, 0.0).abs().max().item()
    return torch.allclose(one.float(), other.float(), rtol=0, atol=1e-3 * scale, equal_nan=True)


def reason_of(error: Exception) -> str:
    """Its first line."""
    return str(error).partition("\n")[0]
