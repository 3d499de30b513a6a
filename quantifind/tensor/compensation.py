"""Rows rounded input by input, what one input loses made up for by those to come (GPTQ,
arXiv:2210.17323; as nearest planes, arXiv:2507.18553), then improved by coordinate descent."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantifind.tensor.levels import Levels, Rounding
from quantifind.tensor.output_error import OutputError
from quantifind.tensor.row_params import RowParams

# inputs that are rounded one by one; more are halved, and what halves owe each other is one product
BLOCK = 32
# elements of rows and of their copies, each with scales of its own, that are rounded at a time
TOGETHER = 2**22
SWEEPS = 4
# of finer grids float32 keeps too little of a step: test_float32_is_as_good
LEVELS_OF_FLOAT32 = 2**12


def gptq(
    target: Tensor,
    error: OutputError,
    params: RowParams,
    nearest: Tensor,
    shares: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Codes that keep the error of each row's outputs small.

    target: (groups · rows, inputs) float64.
    error: what the rows' outputs lose.
    params: what codes of the rows stand for.
    nearest: codes to start from, than which no row becomes worse.
    shares: of the scales, those to try.
    Returns: codes (groups · rows, inputs), and the share of its scales that each row takes,
        (groups · rows, 1).
    """
    groups, inputs = error.order.shape
    coarse = params.grid.levels <= LEVELS_OF_FLOAT32
    work = _Work(error, Levels.of(params, error), shares, target, coarse)
    # each (groups, rows, inputs)
    wanted, start = (each.reshape(groups, -1, inputs) for each in (target, nearest))
    codes, share = torch.empty_like(start), wanted.new_empty(groups, wanted.shape[1], 1)
    for first in range(0, wanted.shape[1], work.rows_together):
        rows = slice(first, first + work.rows_together)
        codes[:, rows], share[:, rows] = work.rounded(wanted[:, rows], start[:, rows], rows)
    return codes.reshape(nearest.shape), share.reshape(-1, 1)


class _Work:
    """What rounding of some rows shares with that of others. Tensors are columns in order,
    (groups, inputs, rows), so that an input's elements lie side by side in memory.

    dtype: of all but the last comparison.
    """

    def __init__(
        self,
        error: OutputError,
        levels: Levels,
        shares: Sequence[float],
        target: Tensor,
        coarse: bool,
    ) -> None:
        self.error, self.levels, self.shares = error, levels, shares
        self.dtype = torch.float32 if coarse else torch.float64
        largest = target.abs().max() if target.numel() else target.new_zeros(())
        # small and large weights keep clear of float32's ends: test_the_size_of_weights_…
        self.unit = torch.exp2(largest.log2().round()).item() if largest > 0 else 1.0
        self.form = error.form(self.dtype)
        self.factor = error.lower.to(self.dtype)
        root = self.factor.diagonal(dim1=1, dim2=2)
        self.pivots = root.square().unsqueeze(2)
        self.factor = self.factor / root.unsqueeze(1)
        self.added = error.added.to(self.dtype).unsqueeze(2)
        own = None if error.own is None else (error.own.mT / error.unit).to(self.dtype)
        self.own = own  # (groups, 1, rows)
        groups, inputs = error.order.shape
        self.rows_together = max(1, TOGETHER // max(groups * inputs, 1))

    def rounded(self, target: Tensor, nearest: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Codes and shares of some rows of each group, (groups, rows, inputs) and (…, 1)."""
        error, levels = self.error, self.levels.rows(rows)
        target, start = (error.to_order(each.flatten(0, 1)) for each in (target, nearest))
        own = None if self.own is None else self.own[:, :, rows]
        inputs = target.shape[1]
        # an input that is always zero has no say: test_dead_inputs_get_zero
        alive = self.form.diagonal(dim1=1, dim2=2).unsqueeze(2) > 0
        if own is not None:
            alive = alive | (own > 0)
        wanted = (target / self.unit).to(self.dtype)
        if not alive.all():
            wanted = torch.where(alive, wanted, 0.0)
            rounding = Rounding(levels, inputs, self.unit, self.dtype)
            start = torch.where(alive, start, _codes(rounding, torch.zeros_like(wanted)))
        before = levels.values(start)
        values = (before / self.unit).to(self.dtype)
        values, share = self._best_share(wanted, values, own, levels)
        chosen = levels.rescaled(share.double())
        rounding = Rounding(chosen, inputs, self.unit, self.dtype)
        values = self._descended(wanted, values, own, rounding)
        codes = _codes(rounding, values)
        # exactly, whatever was lost on the way
        better = error.gained(target, before, chosen.values(codes), rows) >= 0
        codes = error.from_order(torch.where(better, codes, start))
        share = torch.where(better, share, 1.0).mT
        return codes.reshape(len(share), -1, inputs), share.double()

    def _best_share(
        self, wanted: Tensor, start: Tensor, own: Tensor | None, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        """Values, and the share of its scale that each row has them from, (groups, 1, rows)."""
        groups, inputs, rows = wanted.shape
        lost = wanted - start
        least = (self._slope(lost, own) * lost).sum(1, keepdim=True)
        share = torch.ones_like(least)
        together = max(1, TOGETHER // max(wanted.numel(), 1))
        for some in torch.tensor(self.shares).split(together):
            some = some.to(wanted.device, torch.float64)
            rounding = Rounding(levels.rescaled(some), inputs, self.unit, self.dtype)
            tried, cost = self._in_turn(wanted, own, rounding, len(some))
            cost = cost.reshape(groups, len(some), rows)
            least_cost, best = cost.min(1, keepdim=True)
            index = best.unsqueeze(1).expand(-1, inputs, -1, -1)
            tried = tried.reshape(groups, inputs, len(some), rows).gather(2, index).squeeze(2)
            better = least_cost < least
            least = torch.where(better, least_cost, least)
            lost = torch.where(better, tried, lost)
            share = torch.where(better, some.to(share)[best], share)
        return wanted - lost, share

    def _in_turn(
        self, wanted: Tensor, own: Tensor | None, rounding: Rounding, copies: int
    ) -> tuple[Tensor, Tensor]:
        """What copies of the rows lose, (groups, inputs, copies · rows), and the error of that,
        (groups, 1, copies · rows)."""
        lost = torch.cat([wanted] * copies, 2)
        cost = torch.zeros_like(lost[:, :1])

        def settle(start: int, stop: int, corrected: Tensor) -> None:
            if stop - start > BLOCK:
                middle = (start + stop) // 2
                settle(middle, stop, corrected[:, middle - start :])
                owed = self.factor[:, middle:stop, start:middle].mT
                first = corrected[:, : middle - start]
                settle(start, middle, torch.baddbmm(first, owed, lost[:, middle:stop]))
                return
            target, found = lost[:, start:stop], torch.zeros_like(corrected)
            owed = self.factor[:, start:stop, start:stop].tril(-1).mT
            columns = [each.split(1, 1) for each in (corrected, owed, target, found)]
            for i, (column, weights, exact, out) in _backwards(columns):
                value = rounding(torch.baddbmm(column, weights, found), start + i)
                torch.sub(exact, value, out=out)
            # each term of the error in turn, less what is added to the form
            term = torch.baddbmm(corrected, owed, found).sub_(target).add_(found)
            cost.add_(term.square_().mul_(self.pivots[:, start:stop]).sum(1, keepdim=True))
            more = self.added[:, start:stop] if own is None else self.added[:, start:stop] - spread
            cost.sub_(found.square().mul_(more).sum(1, keepdim=True))
            lost[:, start:stop] = found

        spread = None if own is None else own.repeat(1, 1, copies)
        settle(0, lost.shape[1], lost)
        return lost, cost

    def _slope(self, lost: Tensor, own: Tensor | None) -> Tensor:
        slope = torch.bmm(self.form, lost)
        return slope if own is None else slope.addcmul_(own, lost)

    def _descended(
        self, wanted: Tensor, values: Tensor, own: Tensor | None, rounding: Rounding
    ) -> Tensor:
        """Coordinate descent: one input after another to the level with the least error, the
        others fixed, until nothing moves, at most `SWEEPS` times."""
        form = self.form
        power = form.diagonal(dim1=1, dim2=2).unsqueeze(2)
        power = power if own is None else power + own
        steps = torch.where(power > 0, 1 / power, 0.0)
        slope = self._slope(wanted - values, own)
        values, moves = values.clone(), torch.zeros_like(values)

        def settle(start: int, stop: int) -> bool:
            if stop - start > BLOCK:
                middle, moved = (start + stop) // 2, False
                parts = (slice(middle, stop), slice(start, middle))
                for part, other in zip(parts, reversed(parts), strict=True):
                    if settle(part.start, part.stop):
                        slope[:, other].baddbmm_(form[:, other, part], moves[:, part])
                        moved = True
                return moved
            within = form[:, start:stop, start:stop]
            found, old = torch.zeros_like(slope[:, start:stop]), values[:, start:stop]
            new = [old] * (stop - start)
            columns = [
                each.split(1, 1)
                for each in (slope[:, start:stop], within.triu(1), old, steps[:, start:stop], found)
            ]
            for i, (column, weights, value, step, out) in _backwards(columns):
                downhill = torch.baddbmm(column, weights, found)
                new[i] = rounding(torch.addcmul(value, downhill, step), start + i)
                torch.sub(value, new[i], out=out)
            moves[:, start:stop] = found
            if not found.any():
                return False
            values[:, start:stop] = torch.cat(new, 1)
            slope[:, start:stop].baddbmm_(within, found)
            if own is not None:
                slope[:, start:stop].addcmul_(own, found)
            return True

        for _ in range(SWEEPS):
            if not settle(0, wanted.shape[1]):
                break
        return values


def _backwards(columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """From the last input, which counts most, to the first."""
    each = [*enumerate(zip(*columns, strict=True))]
    return reversed(each)


def _codes(rounding: Rounding, values: Tensor) -> Tensor:
    columns = [rounding.codes(column, i) for i, column in enumerate(values.split(1, 1))]
    return torch.cat(columns, 1).int()
