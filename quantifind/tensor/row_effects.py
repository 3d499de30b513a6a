"""What errors of a weight's outputs do together, so that rows make up for what those before them
lost, as inputs do (a Kronecker-factored Hessian, arXiv:1503.05671; both its sides as in YAQA,
arXiv:2505.22988)."""

from dataclasses import dataclass

import torch
from torch import Tensor

# parts of the rows that are rounded one after another; with 16 the error is no less
PARTS = 4
# of the mean effect, what each output is held to have besides, since the form is true for small
# errors alone: where codes are few, less lost more, and three times as much about the same
DAMPING = 1.0


@dataclass(frozen=True)
class RowEffects:
    """The error Σ e_r · E_rs · e_s of rows that are off by e, one part of the rows after another:
    rows with the largest effect first, and what a part loses made up for by those to come.

    rows: of each part, which they are, in the order in which they are settled.
    root: (groups, rows, rows) in that order, upper, root · rootᵀ = E.
    """

    rows: tuple[Tensor, ...]
    root: Tensor

    @classmethod
    def of(cls, effects: Tensor) -> "RowEffects | None":
        """Of E, (groups, rows, rows), symmetric and positive semidefinite; rows of a group without
        an effect are alike. None where no group has one, or one that is no number, or there is but
        one row."""
        count = effects.shape[1]
        power = effects.diagonal(dim1=1, dim2=2).double()
        mean = power.mean(1, keepdim=True)
        if count < 2 or not mean.any() or not effects.isfinite().all():
            return None
        mean = torch.where(mean > 0, mean, 1.0)
        order = (power / mean).mean(0).argsort(descending=True, stable=True)
        damped = (effects.double() / mean.unsqueeze(2))[:, order][:, :, order]
        damped.diagonal(dim1=1, dim2=2).add_(DAMPING)
        root = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
        return cls(order.tensor_split(min(PARTS, count)), root)

    def powers(self) -> list[Tensor]:
        """Of each part what an error of one of its rows does, those to come made up for, over that
        of all rows in the mean, (groups, 1)."""
        found = [self._own(part).square().sum(2) for part in range(len(self.rows))]
        mean = torch.cat(found, 1).mean(1, keepdim=True)
        return [each.mean(1, keepdim=True) / mean for each in found]

    def made_up(self, part: int, lost: Tensor) -> Tensor:
        """What is best added to a part of the rows, (groups, rows of the part, inputs).

        lost: by which the parts before are off, (groups, rows, inputs), 0 elsewhere.
        """
        start = self._start(part)
        before = lost[:, torch.cat(self.rows)[:start]]
        across = self.root[:, :start, start : start + len(self.rows[part])]
        return torch.linalg.solve_triangular(self._own(part).mT, across.mT @ before, upper=False)

    def _start(self, part: int) -> int:
        return sum(len(rows) for rows in self.rows[:part])

    def _own(self, part: int) -> Tensor:
        here = slice(self._start(part), self._start(part + 1))
        return self.root[:, here, here]
