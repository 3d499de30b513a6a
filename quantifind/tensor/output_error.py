"""What the outputs of a weight's rows lose by what is rounded off them: a quadratic form, factored
so that inputs can be settled one after another."""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01


@dataclass(frozen=True)
class OutputError:
    """The error e · (Σ x xᵀ + own) · eᵀ of rows that are off by e, (inputs,); rows stand in groups,
    one group after another, as many in each, and each group meets inputs x of its own.

    With inputs in order of rising power and some ``added`` to the diagonal it is Σ (e · lower)²: so
    many terms, of which the last has the last input alone, and each before it one input more.

    order: which input is the least powerful, the next, …, (groups, inputs).
    unit: a power of two near the mean of the diagonal, (groups, 1, 1).
    form: Σ x xᵀ in that unit, in order, (groups, inputs, inputs) float64.
    own: what each row adds to the diagonal, (groups, 1, rows) float64 in the unit, for rows that
        are an embedding's outputs too; None where they are none.
    added: (groups, inputs, 1), in order and in the unit.
    lower: (groups, inputs, inputs).
    """

    order: Tensor
    unit: Tensor
    form: Tensor
    own: Tensor | None
    added: Tensor
    lower: Tensor

    @classmethod
    def of(cls, inputs: Tensor, own: Tensor | None = None) -> "OutputError":
        """That of Σ x xᵀ, (inputs, inputs) or (groups, inputs, inputs), and what rows add, (rows,)
        of all groups."""
        inputs = inputs.reshape(-1, *inputs.shape[-2:])
        own = None if own is None else own.to(inputs).reshape(len(inputs), 1, -1)
        power = inputs.diagonal(dim1=1, dim2=2)
        order = power.argsort(dim=1, descending=True, stable=True).flip(1)
        # one diagonal for all rows of a group: a factor of each would take too long
        diagonal = power if own is None else power + own.mean(2)
        alive = diagonal > 0
        mean = diagonal.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
        mean = torch.where(mean > 0, mean, 1.0)
        # dead inputs have a unit like the others': test_the_unit_of_the_inputs_does_not_matter
        damped = torch.where(alive, diagonal, mean) + DAMPING * mean
        unit = torch.exp2(mean.log2().round())
        form = _in_order(inputs, order).div_(unit.unsqueeze(2))
        diagonal = form.diagonal(dim1=1, dim2=2)
        undamped = diagonal.clone()
        diagonal.copy_(damped.gather(1, order) / unit)
        added = (diagonal - undamped).unsqueeze(2)
        lower = torch.linalg.cholesky(form)
        diagonal.copy_(undamped)
        unit = unit.unsqueeze(2)
        return cls(order, unit, form, None if own is None else own / unit, added, lower)

    def to_order(self, rows: Tensor) -> Tensor:
        """Rows (groups · rows, inputs) as columns in order, (groups, inputs, rows)."""
        grouped = rows.reshape(len(self.order), -1, rows.shape[1]).mT
        return grouped.gather(1, self.order.unsqueeze(2).expand_as(grouped))

    def from_order(self, columns: Tensor) -> Tensor:
        """What `to_order` gave, as rows again."""
        back = self.order.argsort(dim=1).unsqueeze(2)
        return columns.gather(1, back.expand_as(columns)).mT.flatten(0, 1)

    def gained(self, target: Tensor, before: Tensor, after: Tensor, rows: Tensor) -> Tensor:
        """By how much the error of some rows of each group fell, (groups, 1, rows), in the unit.

        target, before, after: columns in order, (groups, inputs, rows) float64.
        """
        moved = after - before
        left = (target - before).add_(target).sub_(after)
        # one product tells what two errors would, and more precisely
        slope = torch.bmm(self.form, moved)
        if self.own is not None:
            slope.addcmul_(self.own[:, :, rows], moved)
        return slope.mul_(left).sum(1, keepdim=True)


def _in_order(form: Tensor, order: Tensor) -> Tensor:
    if len(form) == 1:
        return form[0][order[0].unsqueeze(1), order[0]].unsqueeze(0)
    groups = torch.arange(len(form), device=form.device).reshape(-1, 1, 1)
    return form[groups, order.unsqueeze(2), order.unsqueeze(1)]
