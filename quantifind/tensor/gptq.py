"""Error-compensated rounding: what one weight loses, the next ones make up for, so that a layer's
outputs stay near the float network's (GPTQ, arXiv:2210.17323)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantifind.tensor.choice import Choice
from quantifind.tensor.matrices import Matrices, moves
from quantifind.tensor.qparams import QParams, from_rows
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.stored_scales import stored_scale

BLOCK = 128
ROWS = 512
# elements of a weight's copies, each with scales of its own, that are rounded at a time
TOGETHER = 2**22
DAMPING = 0.01
SWEEPS = 4
# of the scale with the least weighted squared error; the one with the least output error is kept
SHARES = (1.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.35)


@dataclass
class Moments:
    """Sums over the positions at which some rows of a weight, (rows, inputs), meet an input x.

    inputs: Σ x xᵀ, (inputs, inputs).
    outputs: Σ y xᵀ, (rows, inputs), where y is what the float network has there less the bias that
        is added here.
    positions: how many.
    counts: how often each row is an embedding's output too, (rows,); None where the weight is no
        embedding.
    """

    inputs: Tensor
    outputs: Tensor
    positions: int = 0
    counts: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs (positions, inputs) and wanted outputs (positions, rows)."""
        self.inputs += x.T @ x
        self.outputs += y.T @ x
        self.positions += len(x)


def gptq_layer(
    values: Tensor, moments: Mapping[Matrices, Moments], choice: Choice
) -> QuantizedTensor:
    """A layer's weight rounded so that the error of its outputs on calibration inputs is small.

    values: the weight, any shape.
    moments: by matrix of it, as `quantifind.network.calibration.layer_moments` gives them.
    choice: its grid, fitted by rounding to nearest; with the scale "output_mse" that of each
        channel is chosen among `SHARES` of it, by the error of the channel's outputs, unless a
        channel is of several outputs.
    """
    target = values.detach().double().clone(memory_format=torch.contiguous_format)
    importance = torch.zeros_like(target)
    for matrix, part in moments.items():
        matrix.put(target, best_weights(matrix.of(target)[0], part))
        matrix.put(importance, (part.inputs.diagonal() + _own(part)) / max(part.positions, 1))
    start = choice.quantize(target.to(values.dtype), importance)
    codes = start.codes.clone(memory_format=torch.contiguous_format)
    channels = _channels(moments, start.qparams.axis, values.shape)
    scale = start.qparams.scale
    search = channels is not None and scale is not None
    search = search and choice.options.get("scale") == "output_mse"
    shares = {}
    for matrix, part in moments.items():
        rounded, shares[matrix] = gptq(
            matrix.of(target)[0],
            part.inputs,
            RowParams.of(start, matrix),
            matrix.of(codes)[0],
            SHARES if search else SHARES[:1],
            own=part.counts,
        )
        matrix.put(codes, rounded)
    qparams = start.qparams
    if search and scale is not None and channels is not None:
        share = torch.ones(values.shape[qparams.axis or 0], 1).to(target)
        for matrix, chosen in shares.items():
            share[channels[matrix]] = chosen
        shared = scale.double().reshape(len(share), -1) * share
        qparams = replace(qparams, scale=stored_scale(shared.reshape(scale.shape), scale.dtype))
    return replace(start, codes=codes, qparams=qparams)


def _channels(
    moments: Mapping[Matrices, Moments], axis: int | None, shape: torch.Size
) -> dict[Matrices, Tensor] | None:
    """The channel that each output of each matrix is, where each is one whole channel."""
    if axis is None:
        return None
    size = shape[axis]
    found = {matrix: matrix.places(axis, shape) for matrix in moments}
    together = torch.cat([*found.values(), torch.arange(0)])
    whole = all(
        not moves(matrix.inputs, axis, shape) and matrix.shape[2] * size == shape.numel()
        for matrix in moments
    )
    return found if whole and len(together.unique()) == len(together) else None


def best_weights(weights: Tensor, moments: Moments) -> Tensor:
    """The weights, (rows, inputs), whose outputs are nearest to the float network's: those given,
    corrected by least squares for what the layer's inputs and its bias have lost so far."""
    # one matrix for all rows: what is looked up has no error to make up for
    more = 0.0 if moments.counts is None else moments.counts.mean().item()
    hessian = _damped(moments.inputs, more)
    missing = moments.outputs - weights @ moments.inputs  # Σ (y − W x) xᵀ
    return weights + torch.linalg.solve(hessian, missing.T).T


def _own(moments: Moments) -> Tensor | float:
    return 0.0 if moments.counts is None else moments.counts.unsqueeze(1)


@dataclass(frozen=True)
class RowParams(QParams):
    """Quantization parameters of each element of some rows of a weight.

    scale, zero_point: (rows, 1) or (rows, inputs) float64; None where there is none.
    scale_dtype: what the scale is stored in.
    table_of: where rows have tables of their own, which one, (rows, 1) or (rows, inputs).
    """

    scale_dtype: torch.dtype | None = None
    table_of: Tensor | None = None

    @classmethod
    def of(cls, tensor: QuantizedTensor, matrix: Matrices | None = None) -> "RowParams":
        """Those of a matrix of a quantized weight, by default its rows, flattened."""
        given, shape = tensor.qparams, tensor.codes.shape
        matrix = Matrices.rows(shape) if matrix is None else matrix
        _, outputs, _ = matrix.shape
        axis, group = given.axis, given.group

        def spread(each: Tensor | None) -> Tensor | None:
            if each is None:
                return None
            if each.numel() == 1:
                return each.double().reshape(1, 1).expand(outputs, 1)
            if axis is not None and group is None and not moves(matrix.inputs, axis, shape):
                return each.double()[matrix.places(axis, shape).to(each.device)]
            return matrix.of(from_rows(each.double(), shape, axis, group))[0]

        table, table_of = given.grid.table, None
        if table is not None and table.dim() == 2:
            table_of = spread(torch.arange(len(table), device=table.device).unsqueeze(1))
        return cls(
            given.grid,
            spread(given.scale),
            spread(given.zero_point),
            scale_dtype=None if given.scale is None else given.scale.dtype,
            table_of=table_of,
        )

    def repeated(self, count: int) -> "RowParams":
        """Those of so many copies of the rows, one copy after another."""
        if count == 1:
            return self
        named = {"scale": self.scale, "zero_point": self.zero_point, "table_of": self.table_of}
        copies = {name: each.repeat(count, 1) for name, each in named.items() if each is not None}
        return replace(self, **copies)  # type: ignore[arg-type]

    def rescaled(self, share: float | Tensor) -> "RowParams":
        """With the scales that are stored for so many times these."""
        if self.scale is None or self.scale_dtype is None:
            return self
        return replace(self, scale=stored_scale(self.scale * share, self.scale_dtype).double())

    def column(self, index: int) -> QParams:
        """Those of one input, (rows, 1)."""

        def at(each: Tensor | None) -> Tensor | None:
            return each if each is None or each.shape[1] == 1 else each[:, index : index + 1]

        grid, table_of = self.grid, at(self.table_of)
        if table_of is not None and grid.table is not None:
            grid = replace(grid, table=grid.table[table_of[:, 0].long()])
        return QParams(grid, at(self.scale), at(self.zero_point))


def gptq(
    target: Tensor,
    hessian: Tensor,
    levels: RowParams,
    nearest: Tensor,
    shares: Sequence[float] = (1.0,),
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes that keep (target − rounded) · hessian · (target − rounded)ᵀ of each row small.

    target: (rows, inputs) float64.
    hessian: Σ x xᵀ, (inputs, inputs) float64.
    levels: what codes of the rows stand for.
    nearest: codes to start from, than which no row becomes worse.
    shares: of the scales, those to try.
    own: what each row adds to the diagonal of the hessian, (rows,), for a row that is an
        embedding's output too.
    Returns: codes (rows, inputs), and the share of its scales that each row takes, (rows, 1).
    """
    share = torch.ones_like(target[:, :1])
    each = torch.zeros_like(share) if own is None else own.to(target).unsqueeze(1)
    if own is not None and not hessian.any():
        # nothing to compensate with: test_an_embedding_is_rounded_to_nearest
        return nearest.clone(), share
    # an input that is always zero has no say: test_dead_inputs_get_zero
    alive = hessian.diagonal() + each > 0
    wanted, codes = target, nearest.clone()
    if not alive.all():
        wanted = torch.where(alive, target, 0.0)
        codes = torch.where(alive, codes, _nearest_columns(levels, torch.zeros_like(target)))
    values = _all_columns(levels, codes)
    least = _errors(target, values, hessian, each)
    factor, order = _factor(hessian, each.mean().item())
    # several shares at a time, as copies of the rows: each step is one operation for all of them
    together = max(1, TOGETHER // max(target.numel(), 1))
    for first in range(0, len(shares), together):
        some = target.new_tensor(shares[first : first + together])
        copies = levels.repeated(len(some)).rescaled(
            some.repeat_interleave(len(target)).unsqueeze(1)
        )
        again = wanted if len(some) == 1 else wanted.repeat(len(some), 1)
        tried, tried_values = _in_turn(again, factor, order, copies)
        for i, tried_share in enumerate(some):
            rows = slice(i * len(target), (i + 1) * len(target))
            error = _errors(target, tried_values[rows], hessian, each)
            better = error < least
            least = torch.where(better, error, least)
            codes = torch.where(better, tried[rows], codes)
            values = torch.where(better, tried_values[rows], values)
            share = torch.where(better, tried_share, share)
        del again, tried, tried_values  # a layer of 4,096 × 4,096 takes 134 MB each
    del factor, wanted
    codes, values = codes.T.contiguous(), values.T.contiguous()
    _descend(target, hessian, each, levels.rescaled(share), codes, values)
    return codes.T.contiguous(), share


def _nearest_columns(levels: RowParams, values: Tensor) -> Tensor:
    if levels.table_of is None:
        return levels.nearest(values).int()
    columns = [levels.column(i).nearest(values[:, i : i + 1]) for i in range(values.shape[1])]
    return torch.cat(columns, 1).int()


def _all_columns(levels: RowParams, codes: Tensor) -> Tensor:
    if levels.table_of is None:
        return levels.values(codes)
    columns = [levels.column(i).values(codes[:, i : i + 1]) for i in range(codes.shape[1])]
    return torch.cat(columns, 1)


def _errors(target: Tensor, values: Tensor, hessian: Tensor, own: Tensor) -> Tensor:
    """Each row's error, (rows, 1); some rows at a time, to take less memory."""
    parts = zip(*(tensor.split(ROWS) for tensor in (target, values, own)), strict=True)
    errors = []
    for wanted, rounded, more in parts:
        difference = wanted - rounded
        errors.append(_slope(difference, hessian, more).mul_(difference).sum(1, keepdim=True))
    return torch.cat(errors)


def _slope(difference: Tensor, hessian: Tensor, own: Tensor) -> Tensor:
    return (difference @ hessian).addcmul_(own, difference)


def _damped(hessian: Tensor, more: float = 0.0) -> Tensor:
    """A copy with ``more``, and a share of its mean, added to the diagonal."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += more
    # dead inputs have a unit like the others': test_the_unit_of_the_inputs_does_not_matter
    alive = diagonal[diagonal > 0]
    mean = alive.mean() if len(alive) else diagonal.new_ones(())
    diagonal[diagonal == 0] = mean
    diagonal += DAMPING * mean
    return damped


def _factor(hessian: Tensor, more: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse, inputs in order of falling power; that order."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _damped(hessian[order.unsqueeze(1), order], more)
    # one matrix after another, so that each is freed
    factor = torch.linalg.cholesky(factor)
    factor = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky(factor, upper=True), order


def _in_turn(
    target: Tensor, factor: Tensor, order: Tensor, levels: RowParams
) -> tuple[Tensor, Tensor]:
    """GPTQ: columns rounded one by one, what each loses taken over by those to come."""
    # columns are rows here, whose elements lie side by side in memory
    rest = target.T[order]
    codes = torch.empty_like(rest, dtype=torch.int32)
    values = torch.empty_like(rest)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        block = rest[start:stop]
        lost = torch.empty_like(block)
        columns = order[start:stop].tolist()
        own = factor[start:stop, start:stop]
        for i, index in enumerate(columns):
            column = levels.column(index)
            rounded = column.nearest(block[i].unsqueeze(1))
            value = column.values(rounded)
            torch.div(block[i] - value[:, 0], own[i, i], out=lost[i])
            block[i + 1 :].addcmul_(own[i, i + 1 :].unsqueeze(1), lost[i], value=-1)
            codes[index] = rounded[:, 0]
            values[index] = value[:, 0]
        rest[stop:] -= factor[start:stop, stop:].T @ lost
    return codes.T, values.T


def _descend(
    target: Tensor, hessian: Tensor, own: Tensor, levels: RowParams, codes: Tensor, values: Tensor
) -> None:
    """Coordinate descent: one column after another to the level with the least error, the others
    fixed; ``codes`` and ``values``, (inputs, rows), are improved in place, no row becomes worse."""
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    order = order[power[order] > 0]
    slope = _slope(target - values.T, hessian, own).T.contiguous()  # (inputs, rows)
    own = own[:, 0]
    for _ in range(SWEEPS):
        for columns in order.split(BLOCK):
            among = hessian[columns]
            within, own_slope = among[:, columns], slope[columns]
            moves = torch.empty_like(own_slope)
            for i, index in enumerate(columns.tolist()):
                column, old = levels.column(index), values[index]
                wanted = old + own_slope[i] / (power[index] + own)
                rounded = column.nearest(wanted.unsqueeze(1))
                value = column.values(rounded)[:, 0]
                torch.sub(value, old, out=moves[i])
                own_slope[i + 1 :].addcmul_(within[i, i + 1 :].unsqueeze(1), moves[i], value=-1)
                codes[index] = rounded[:, 0]
                values[index] = value
            slope -= among.T @ moves
            slope[columns] -= own * moves
