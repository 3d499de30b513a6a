"""Rows rounded input by input, what one input loses made up for by those to come (GPTQ,
arXiv:2210.17323; as nearest planes, arXiv:2507.18553), then improved by coordinate descent."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantifind.tensor.levels import Bounds, Levels, Rounding
from quantifind.tensor.output_error import OutputError
from quantifind.tensor.rates import MOST, Prices
from quantifind.tensor.row_effects import RowEffects
from quantifind.tensor.row_params import RowParams

# inputs that are rounded one by one; more are halved, and what halves owe each other is one product
BLOCK = 32
# how often codes are rounded anew by what they cost as they were
PRICED = 2
# elements of rows and of their copies, each with scales of its own, that are rounded at a time
TOGETHER = 2**21
SWEEPS = 4
# with at most so many, float32 leaves errors within 0.05% of those of float64 (0.2% with 2^16);
# as good on coarse grids: test_float32_is_as_good
LEVELS_OF_FLOAT32 = 2**12


def gptq(
    target: Tensor,
    error: OutputError,
    params: RowParams,
    nearest: Tensor,
    shares: Sequence[float] = (1.0,),
    rate: float = 0.0,
    effects: RowEffects | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes that keep the error of each row's outputs small.

    target: (groups · rows, inputs) float64.
    error: what the rows' outputs lose.
    params: what codes of the rows stand for.
    nearest: codes to start from, than which no row becomes worse.
    shares: of the scales, those to try.
    rate: what a bit of a coded code weighs, in squared steps of an average input; nothing where
        codes span `quantifind.tensor.rates.MOST` or more, which hardly differ. Above 0, codes
        are rounded as without, then `PRICED` times by what they cost as they were before; of a
        grid with scales, at those. Rows may become worse.
    effects: of errors of rows together, which are weighed so where there is a rate; by default all
        rows count alike, each by itself.
    Returns: codes (groups · rows, inputs), and the share of its scales that each row takes,
        (groups · rows, 1).
    """
    groups, inputs = error.order.shape
    work = _Work(error, Levels.of(params, error), shares, target)
    # each (groups, rows, inputs)
    wanted, start = (each.reshape(groups, -1, inputs) for each in (target, nearest))
    codes, share = torch.empty_like(start), wanted.new_empty(groups, wanted.shape[1], 1)

    every = torch.arange(wanted.shape[1], device=wanted.device)

    def settle(rows: Tensor, target: Tensor) -> None:
        for some, part in zip(
            rows.split(work.together), target.split(work.together, 1), strict=True
        ):
            codes[:, some], share[:, some] = work.rounded(part, start[:, some], some)

    settle(every, wanted)
    for left in reversed(range(PRICED if rate and codes.numel() else 0)):
        if codes.max() - codes.min() >= MOST:
            break
        prices = Prices.of(codes.gather(2, error.order.unsqueeze(1).expand_as(codes)))
        if effects is None or left:  # prices alone are needed of all but the last
            work.price(prices, rate)
            settle(every, wanted)
            continue
        lost = torch.zeros_like(wanted)
        for part, (rows, power) in enumerate(zip(effects.rows, effects.powers(), strict=True)):
            work.price(prices, rate, power)
            settle(rows, wanted[:, rows] + effects.made_up(part, lost))
            lost[:, rows] = wanted[:, rows] - work.values(codes[:, rows], rows)
    return codes.reshape(nearest.shape), share.reshape(-1, 1)


class _Work:
    """What the rounding of some rows shares with that of others. Tensors are columns in order,
    (groups, inputs, rows), so that an input's elements lie side by side in memory."""

    def __init__(
        self, error: OutputError, levels: Levels, shares: Sequence[float], target: Tensor
    ) -> None:
        self.error, self.levels, self.shares = error, levels, shares
        coarse = levels.grid.levels <= LEVELS_OF_FLOAT32
        dtype = self.dtype = torch.float32 if coarse else torch.float64
        # far from float32's ends: test_the_size_of_the_weights_does_not_matter
        largest = target.abs().max().item() if target.numel() else 0.0
        self.size = 2.0 ** round(math.log2(largest)) if largest > 0 else 1.0
        self.form, self.added = error.form.to(dtype), error.added.to(dtype)
        self.own = None if error.own is None else error.own.to(dtype)
        root = error.lower.diagonal(dim1=1, dim2=2)
        self.pivots = root.square().unsqueeze(2).to(dtype)
        self.factor = error.lower.to(dtype, copy=True).div_(root.unsqueeze(1).to(dtype))
        self.together = max(1, TOGETHER // max(self.form[:, 0].numel(), 1))
        self.bounds: tuple[Bounds, Bounds] | None = None

    def values(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Of codes of some rows of each group, (groups, rows, inputs)."""
        columns = self.levels.rows(rows).values(self.error.to_order(codes.flatten(0, 1)))
        return self.error.from_order(columns).reshape(codes.shape)

    def price(self, prices: Prices, rate: float, effect: Tensor | None = None) -> None:
        """Weigh, from now on, what codes cost.

        effect: of each group, (groups, 1), what its rows' errors do, as a multiple of the mean.
        """
        power = self.form.diagonal(dim1=1, dim2=2).double()
        power = power if self.own is None else power + self.own.double().mean(2)
        pivots = torch.where(power > 0, self.pivots.squeeze(2).double(), 0.0)
        if self.levels.scale is not None and self.levels.scale.shape[1] > 1:
            steps = self.levels.scale.square().mean(2)
            pivots, power = pivots * steps, power * steps
        bit = rate * pivots[power > 0].mean()

        def bounds(power: Tensor) -> Bounds:
            # what has no say costs nothing: test_dead_inputs_get_zero
            weight = torch.where(power > 0, bit / power, 0.0)
            weight = weight if effect is None else weight / effect
            return Bounds(prices.lowest, prices.bounds(self.levels.grid, weight).to(self.dtype))

        # of an input in turn, whose loss others make up for, and of one with all others settled
        self.bounds = bounds(pivots), bounds(power)

    def rounded(self, target: Tensor, nearest: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and shares of some rows of each group, (groups, rows, inputs) and (…, 1)."""
        error, levels = self.error, self.levels.rows(rows)
        shape = nearest.shape
        target, start = (error.to_order(each.flatten(0, 1)) for each in (target, nearest))
        own = None if self.own is None else self.own[:, :, rows]
        # an input that is always zero has no say: test_dead_inputs_get_zero
        alive = self.form.diagonal(dim1=1, dim2=2).unsqueeze(2) > 0
        alive = alive if own is None else alive | (own > 0)
        wanted = target
        if not alive.all():
            wanted = torch.where(alive, target, 0.0)
            zeros = torch.zeros_like(target, dtype=self.dtype)
            zeros = Rounding(levels, zeros, self.size).all_codes(zeros)
            start = torch.where(alive, start, zeros)
        before = levels.values(start)
        if self.bounds is not None:
            codes = self._priced(wanted, own, levels, self.bounds)
            return error.from_order(codes).reshape(shape), torch.ones_like(wanted[:, :1]).mT
        values, share = self._best_share(wanted, before, own, levels)
        chosen = levels.rescaled(share)
        rounding = Rounding(chosen, values, self.size)
        self._descend((wanted / rounding.unit).to(self.dtype), values, own, rounding)
        codes = rounding.all_codes(values)
        # exactly, whatever float32 has lost on the way
        better = error.gained(target, before, chosen.values(codes), rows) >= 0
        codes = error.from_order(torch.where(better, codes, start))
        return codes.reshape(shape), torch.where(better, share, 1.0).mT

    def _priced(
        self, wanted: Tensor, own: Tensor | None, levels: Levels, bounds: tuple[Bounds, Bounds]
    ) -> Tensor:
        """Codes, (groups, inputs, rows), of the least error and cost."""
        like = wanted.to(self.dtype)
        halfway, in_turn, alone = (
            Rounding(levels, like, self.size, each) for each in (None, *bounds)
        )
        scaled = (wanted / halfway.unit).to(self.dtype)
        values, _ = self._in_turn(scaled, own, in_turn)
        self._descend(scaled, values, own, alone)
        return halfway.all_codes(values)

    def _best_share(
        self, wanted: Tensor, before: Tensor, own: Tensor | None, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        """Values in units of the rounding at the share of its scale that each row takes, and that,
        (groups, 1, rows) float64."""
        unit = Rounding(levels, before, self.size).unit
        values = (before / unit).to(self.dtype)
        lost = (wanted / unit).to(self.dtype) - values
        least = (self._slope(lost, own) * lost).sum(1, keepdim=True) * unit.square()
        share = torch.ones_like(least)
        together = max(1, TOGETHER // max(wanted.numel(), 1))
        for some in torch.tensor(self.shares, dtype=torch.float64).split(together):
            some = some.to(wanted.device)
            rounding = Rounding(levels.rescaled(some), values, self.size)
            # (groups, inputs, copies, rows), one copy of the rows after another
            unit = rounding.unit.unflatten(2, (len(some), -1))
            copies = (wanted.unsqueeze(2) / unit).to(self.dtype)
            tried, cost = self._in_turn(copies.flatten(2), own, rounding)
            cost = cost.unflatten(2, (len(some), -1)) * unit.square()
            cost, best = cost.squeeze(1).min(1, keepdim=True)
            index = best.unsqueeze(1).expand(-1, len(tried[0]), -1, -1)
            tried = tried.unflatten(2, (len(some), -1)).gather(2, index).squeeze(2)
            better = cost < least
            least = torch.where(better, cost, least)
            values = torch.where(better, tried, values)
            share = torch.where(better, some[best], share)
        return values, share

    def _in_turn(
        self, wanted: Tensor, own: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, Tensor]:
        """Values of (copies of) the rows, (groups, inputs, rows), and their error, (groups, 1,
        rows)."""
        values, lost = torch.zeros_like(wanted), torch.empty_like(wanted)
        cost = torch.zeros_like(wanted[:, :1])
        added = self.added
        if own is not None:
            added = added - own.repeat(1, 1, wanted.shape[2] // own.shape[2])

        def settle(start: int, stop: int, corrected: Tensor) -> None:
            if stop - start > BLOCK:
                middle = (start + stop) // 2
                settle(middle, stop, corrected[:, middle - start :])
                owed = self.factor[:, middle:stop, start:middle].mT
                first = corrected[:, : middle - start]
                settle(start, middle, torch.baddbmm(first, owed, lost[:, middle:stop]))
                return
            some, found = wanted[:, start:stop], values[:, start:stop]
            owed = self.factor[:, start:stop, start:stop].tril(-1).mT
            # as if all lost all there is; less what is found as it is
            corrected = torch.baddbmm(corrected, owed, some)
            for i, (column, weights, out) in _backwards(corrected, owed, found):
                rounding.put(torch.baddbmm(column, weights, found, alpha=-1), start + i, out)
            lost[:, start:stop] = some - found
            # each term of the error in turn, less what is added to the form
            term = torch.baddbmm(corrected, owed, found, alpha=-1).sub_(found).square_()
            cost.add_(term.mul_(self.pivots[:, start:stop]).sum(1, keepdim=True))
            more = lost[:, start:stop].square().mul_(added[:, start:stop])
            cost.sub_(more.sum(1, keepdim=True))

        settle(0, wanted.shape[1], wanted)
        return values, cost

    def _slope(self, lost: Tensor, own: Tensor | None) -> Tensor:
        slope = torch.bmm(self.form, lost)
        return slope if own is None else slope.addcmul_(own, lost)

    def _descend(
        self, wanted: Tensor, values: Tensor, own: Tensor | None, rounding: Rounding
    ) -> None:
        """Coordinate descent: one input after another to the level with the least error, the
        others fixed, until nothing moves, at most `SWEEPS` times; ``values`` are improved."""
        form = self.form
        power = form.diagonal(dim1=1, dim2=2).unsqueeze(2)
        power = power if own is None else power + own
        steps = torch.where(power > 0, 1 / power, 0.0)  # (groups, inputs, 1 or rows)
        slope, moves = self._slope(wanted - values, own), torch.empty_like(values)

        def settle(start: int, stop: int) -> bool:
            if stop - start > BLOCK:
                middle, moved = (start + stop) // 2, False
                halves = slice(start, middle), slice(middle, stop)
                for here, there in (halves[::-1], halves):
                    if settle(here.start, here.stop):
                        slope[:, there].baddbmm_(form[:, there, here], moves[:, here])
                        moved = True
                return moved
            within, step = form[:, start:stop, start:stop], steps[:, start:stop]
            old, found = values[:, start:stop], torch.zeros_like(values[:, start:stop])
            owed = within.triu(1)
            ahead = torch.baddbmm(slope[:, start:stop], owed, old)
            if own is None:
                ahead, owed = torch.addcmul(old, ahead, step), owed * step
                for i, (column, weights, out) in _backwards(ahead, owed, found):
                    rounding.put(torch.baddbmm(column, weights, found, alpha=-1), start + i, out)
            else:
                for i, (column, weights, out, at, by) in _backwards(ahead, owed, found, old, step):
                    downhill = torch.baddbmm(column, weights, found, alpha=-1)
                    rounding.put(torch.addcmul(at, downhill, by), start + i, out)
            move = old - found
            moves[:, start:stop] = move
            if not move.any():
                return False
            values[:, start:stop] = found
            slope[:, start:stop].baddbmm_(within, move)
            if own is not None:
                slope[:, start:stop].addcmul_(own, move)
            return True

        for _ in range(SWEEPS):
            if not settle(0, wanted.shape[1]):
                break


def _backwards(*blocks: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Columns of blocks from the last input, which counts most, to the first."""
    each = zip(*(block.split([1] * block.shape[1], 1) for block in blocks), strict=True)
    return reversed([*enumerate(each)])
