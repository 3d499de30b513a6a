"""Whether a network takes its batches, and whether two passes give the same."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import judged
from quantifind.network.modules import PASS_FAILS, own_tensors, run
from quantifind.utils.batches import Batch, joined, rows_of, tensors_of, with_tensors
from quantifind.utils.criteria import (
    Criterion,
    CriterionError,
    check_criterion,
    name_of,
    settled,
)
from quantifind.utils.devices import evaluating, is_out_of_memory
from quantifind.utils.forwards import DefaultForward
from quantifind.utils.naming import first_line
from quantifind.utils.torch_losses import as_module

# examples of which it is seen whether the others of a batch count
FEW = 4
# of a larger batch so many are tried before everything, or fewer where that many fail
PARTS = (256, 64, 16, 4)


def checked(
    model: nn.Module, given: Sequence[Batch], criterion: Criterion | None
) -> tuple[Batch, Batch | None, Criterion | None]:
    """What is tried before everything: one batch through a network and its criterion.

    given: all batches.
    Returns: that batch; one of all examples, None where they can't be in other batches; and the
        criterion, as `quantifind.utils.criteria.settled`.
    """
    first, criterion = first_of(model, given[0]), as_module(criterion)
    check_batch(model, first, criterion)
    literal = not isinstance(first.forward, DefaultForward)
    some = itertools.chain([first], given[1:])
    criterion, _ = settled(criterion, some, lambda batch: run(model, batch), literal=literal)
    whole = joined(given)
    if whole is not None:
        # several examples, also where each is a batch: test_a_batch_that_counts_as_one_stays
        several = first if len(first) > 1 else whole[:FEW]
        alike = independent(model, several) and judges_each(criterion, *run(model, several))
        whole = whole if alike else None
    return first, whole, criterion


def check_batch(model: nn.Module, batch: Batch, criterion: Criterion | None) -> None:
    """Raise ValueError, of one line, unless a network takes a batch, and its criterion what it
    gives."""
    outputs, *targets = run(model, batch)
    if criterion is not None and not targets:
        raise ValueError(
            f"{batch} has no targets for {name_of(criterion)}: give criterion=None, or "
            "forward=lambda model, batch: (outputs, targets), which says what it gets"
        )
    try:
        judged(criterion, outputs, *targets)
        check_criterion(criterion, outputs, *targets)
    except CriterionError:
        raise
    except PASS_FAILS as error:
        reason = first_line(error)
        given = ", ".join(str(list(tensor.shape)) for tensor in tensors_of([outputs, *targets]))
        if any(
            isinstance(t, int | float) or (isinstance(t, Tensor) and not t.dim()) for t in targets
        ):
            reason += (
                "; targets are a single number, as of one example: is it a data set? Give batches"
            )
        raise ValueError(
            f"{name_of(criterion)} does not take what it is given, of shapes {given}: {reason}; "
            "forward=lambda model, batch: (outputs, targets) says what it gets"
        ) from error


def first_of(model: nn.Module, batch: Batch) -> Batch:
    """All of a batch; of a large one a part, where its examples are `independent` there."""
    if batch.apart and len(batch) > PARTS[0]:
        for part in (batch[:size] for size in PARTS):
            if independent(model, part):
                return part
    return batch


def independent(model: nn.Module, batch: Batch) -> bool:
    """Whether a few examples' outputs are the same, each alone, as in their batch
    (test_a_batch_that_counts_as_one_stays, test_rows_that_are_no_examples_stay_together)."""
    if not batch.apart:
        return False
    few = range(min(FEW, len(batch)))
    try:
        together = tensors_of(batch.clone().run(model)[0])
        alone = [tensors_of(batch[i : i + 1].clone().run(model)[0]) for i in few]
    except PASS_FAILS:
        return False
    if any(len(one) != len(together) for one in alone):
        return False
    return all(
        rows_of(whole) == len(batch)
        and all(part.shape[:1] == (1,) for part in parts)
        and len({part.shape for part in parts}) == 1
        and _close(torch.cat(parts), whole[: len(parts)])
        for whole, *parts in zip(together, *alone, strict=True)
    )


def judges_each(criterion: Criterion | None, outputs: Any, *targets: Any) -> bool:
    """Whether a few examples' losses are the same, each alone, as in their batch
    (test_losses_that_depend_on_the_rest_of_a_batch)."""
    if criterion is None:
        return True
    everything = (outputs, *targets)
    loss = judged(criterion, *everything)["loss"]
    if rows_of(everything) != len(loss):
        return True  # as of CTC, whose first axis is time
    alone = []
    try:
        for i in range(min(FEW, len(loss))):
            one = with_tensors(lambda t, i=i: t[i : i + 1] if rows_of(t) else t, everything)
            alone.append(judged(criterion, *one)["loss"])
    except PASS_FAILS:
        return False
    return _close(torch.cat(alone), loss[: len(alone)])


def side_effects(
    model: nn.Module, values: dict[str, Tensor], given: Batch
) -> tuple[set[str], bool]:
    """The tensors that a pass changes, such as running means, and whether it changes its inputs
    (test_what_a_pass_changes_is_put_back).

    values: the network's own, which it has again in the end; tables that its first pass fills for
        good are there as that has filled them (test_a_table_that_is_filled_once_stays).
    Raises: ValueError where a second pass gives other outputs.
    """
    some = given

    def once_more() -> Any:
        nonlocal some
        some = given.clone()
        with evaluating(model):
            return some.run(model)[0]

    def changed(since: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = own_tensors(model)  # anew: a pass may have put another in its place
        found = {name: own[name].detach() for name in since if name in own}
        return {name: t.clone() for name, t in found.items() if not equal(t, since[name])}

    def put_back(names: Iterable[str]) -> None:
        own = own_tensors(model)
        for name in names:
            own[name].detach().copy_(values[name])

    first, once = once_more(), changed(values)
    # those of another shape now
    for name in [name for name, value in once.items() if value.shape != values[name].shape]:
        values[name] = once.pop(name)
    put_back(once)
    second, stateful = once_more(), set(changed(values))
    if (filled := once.keys() - stateful) and not _same(first, second):
        values |= {name: once.pop(name) for name in filled}
        put_back(filled | stateful)
        second = once_more()
        stateful |= changed(values).keys()
    stateful |= once.keys()
    put_back(stateful)
    _check_repeats(first, second)
    pairs = zip(tensors_of(some.data), tensors_of(given.data), strict=True)
    return stateful, not all(equal(a, b) for a, b in pairs)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Within it, what a network's or a criterion's own code raises is a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except PASS_FAILS as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"a pass, or its criterion, fails: {first_line(error)}") from error


def _same(once: Any, again: Any) -> bool:
    one, other = tensors_of(once), tensors_of(again)
    return len(one) == len(other) and all(map(_close, one, other))


def _check_repeats(once: Any, again: Any) -> None:
    """Raise ValueError unless the outputs of a batch that comes twice are the same."""
    if not _same(once, again):
        raise ValueError(
            "the network gives other outputs where the same batch comes again: in eval mode it "
            "draws at random, or keeps what came before; seed or reset it in forward=lambda "
            "model, batch: (outputs, targets)"
        )


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
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not other.numel():
        return True
    scale = torch.where(other.isfinite(), other, 0.0).abs().max().item()
    return torch.allclose(one.float(), other.float(), rtol=0, atol=1e-3 * scale, equal_nan=True)
