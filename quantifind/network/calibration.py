"""Calibration examples, and how much of what each weight meets they have."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.modules import own_tensors, run
from quantifind.network.products import Product, visiting
from quantifind.tensor.matrices import Matrices
from quantifind.utils.arguments import check
from quantifind.utils.batches import Batch, Forward, batches_of, kept, tensors_of
from quantifind.utils.devices import evaluating

Batches = Sequence[Batch]


def calibration_batches(
    batches: Iterable[Any] | None,
    model: nn.Module,
    forward: Forward | None = None,
    criterion: Any = None,
) -> Batches:
    """Batches kept, so that every pass sees the same.

    batches: of any kind that `quantifind.utils.batches.batches_of` takes, with a model,
        a forward and a criterion.
    Raises: ValueError where there is none, none with an example, and for inputs with NaN.
    """
    if batches is not None:
        check(
            hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"),
            "calibration",
            batches,
            "batches of training data, such as a loader, are needed",
        )
    given = kept(batches_of([] if batches is None else batches, model, criterion, forward))
    for batch in given:
        first = tensors_of(batch.data)[:1]
        if bad := sum(int((~tensor.isfinite()).sum()) for tensor in first):
            raise ValueError(f"calibration inputs: {bad} are NaN or infinite")
    if not given:
        raise ValueError("calibration has no examples: give batches of training data")
    return given


def second_moments(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By weight, the mean square of the input that each of its elements meets.

    Returns: tensors that broadcast against the weight: of its shape, or (vocabulary, 1), how often
        each entry is looked up, for an embedding.
    """
    weights = own_tensors(model)
    # by weight, its matrices, and whether it is an embedding there
    sums: dict[tuple[str, Matrices, bool], Tensor] = {}

    def visit(product: Product) -> Tensor:
        matrices, entries = product.matrices, product.kind == "embedding"
        if product.weight is not None and matrices is not None and product.used:
            if entries:
                power = look_ups(product, matrices.shape[1])
            else:
                chunks = [x.double().square().sum(1) for x in input_rows(product)]
                power = torch.stack(chunks).sum(0).unsqueeze(1)  # (groups, 1, inputs)
            key = product.weight, matrices, entries
            sums[key] = sums.get(key, 0) + power
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        for batch in batches:
            run(model, batch)
    totals: dict[str, Tensor] = {}
    for (name, matrices, entries), power in sums.items():
        weight = weights[name]
        shape = (len(weight), 1) if entries else weight.shape
        spread = torch.zeros(shape, dtype=torch.float64, device=weight.device)
        if entries:
            first = matrices.offset // weight[0].numel()
            spread[first : first + len(power), 0] = power
        else:
            matrices.put(spread, power)
        totals[name] = totals.get(name, 0) + spread
    return {name: total / total.mean().clamp(min=1e-300) for name, total in totals.items()}


def look_ups(product: Product, count: int) -> Tensor:
    """How often each of so many entries is looked up; in bags, how much its error counts."""
    shares = None if product.shares is None else product.shares()
    return product.operands[0].flatten().bincount(shares, minlength=count).double()


def input_rows(product: Product) -> Iterator[Tensor]:
    """What the weight's matrices are multiplied with, in chunks (groups, positions, inputs)."""
    meeting = product.meet()
    assert meeting is not None
    return meeting.rows(*product.operands)
