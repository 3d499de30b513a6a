"""Error-compensated rounding of a layer's weight: what one input loses, the next ones make up for,
so that the layer's outputs stay near the float network's (GPTQ, arXiv:2210.17323)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantifind.tensor.choice import Choice
from quantifind.tensor.compensation import TOGETHER, gptq
from quantifind.tensor.matrices import Matrices, moves
from quantifind.tensor.output_error import OutputError
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.rotation import Rotation, rotation_axis
from quantifind.tensor.row_effects import RowEffects
from quantifind.tensor.row_params import RowParams, places
from quantifind.tensor.stored_scales import stored_scale

# of the scale with the least weighted squared error; the one with the least output error is kept
SHARES = (1.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.35)

# of their mean power, what inputs are held to have at least where codes are weighed by what they
# cost, and may go far: test_what_is_hardly_ever_met_stays_near
STEADY = 0.03


@dataclass(frozen=True)
class Moments:
    """Sums over the positions at which some rows of a weight, (rows, inputs), meet an input x.

    inputs: Σ x xᵀ, (inputs, inputs).
    outputs: Σ y xᵀ, (rows, inputs), where y is what the float network has there less the bias that
        is added here.
    positions: how many.
    counts: how often each row is an embedding's output too, (rows,); None where the weight is no
        embedding.
    effects: what errors of outputs do together, (rows, rows), in any unit
        (`quantifind.network.effects.output_effects`); None where that is not known.
    """

    inputs: Tensor
    outputs: Tensor
    positions: int = 0
    counts: Tensor | None = None
    effects: Tensor | None = None


def gptq_layer(
    values: Tensor, moments: Mapping[Matrices, Moments], choices: Sequence[Choice]
) -> list[QuantizedTensor]:
    """A layer's weight rounded so that the error of its outputs on calibration inputs is small, by
    each of several choices.

    values: the weight, any shape.
    moments: by matrix of it, as `quantifind.network.moments.layer_moments` gives them.
    choices: each grid is fitted by rounding to nearest; with the scale "output_mse" that of each
        channel is chosen among `SHARES` of it, by the error of the channel's outputs, unless a
        channel is of several outputs. Inputs are rotated where all of an output's are in one
        matrix.
    """
    found: dict[tuple[float, int | None], _Prepared] = {}
    rounded = []
    for choice in choices:
        kind = STEADY if choice.rate else 0.0, choice.rotation
        if kind not in found:
            found[kind] = _Prepared.of(values, moments, *kind)
        rounded.append(found[kind].rounded(choice))
    return rounded


@dataclass
class _Prepared:
    """What the choices of a weight share.

    target: the weights with the best outputs, float64; rough: in the weight's dtype.
    importance: of each weight.
    errors: by matrix, what its rows' outputs lose.
    effects: by matrix, what that does together, where it is known.
    rotation: of the inputs, which all of these are about.
    """

    target: Tensor
    rough: Tensor
    importance: Tensor
    errors: dict[Matrices, OutputError]
    effects: dict[Matrices, RowEffects | None]
    rotation: Rotation | None

    @classmethod
    def of(
        cls,
        values: Tensor,
        moments: Mapping[Matrices, Moments],
        steady: float,
        seed: int | None = None,
    ) -> "_Prepared":
        """steady: a share of the mean power of inputs, which each input that is ever met is held to
        have at least: else the weights of inputs that are hardly ever met would go far.
        seed: of the rotation of inputs; None for none.
        """
        rotation = None if seed is None else _rotation(moments, values.shape, seed)
        target = values.detach().double().clone(memory_format=torch.contiguous_format)
        importance = torch.zeros_like(target)
        errors: dict[Matrices, OutputError] = {}
        effects: dict[Matrices, RowEffects | None] = {}
        for matrix, parts in _stacked(moments):
            inputs = _joined([part.inputs for part in parts]).reshape(-1, *parts[0].inputs.shape)
            outputs = _joined([part.outputs for part in parts])
            counts = [part.counts for part in parts if part.counts is not None]
            own = _joined(counts) if counts else None
            rows = matrix.of(target).flatten(0, 1)
            if steady:
                inputs = inputs.clone()
                power = inputs.diagonal(dim1=1, dim2=2)
                least = steady * power.mean(1, keepdim=True)
                more = torch.where(power > 0, (least - power).clamp(min=0), 0.0)
                power += more
                outputs = outputs + more.repeat_interleave(len(rows) // len(parts), 0) * rows
            error = OutputError.of(inputs, own)
            best = best_weights(rows, outputs, error)
            matrix.put(target, best.reshape(matrix.shape))
            if rotation is not None:
                inputs = rotation.of_form(inputs)
                error = OutputError.of(inputs)
            power = inputs.diagonal(dim1=1, dim2=2).unsqueeze(1)
            power = power if own is None else power + own.reshape(len(parts), -1, 1)
            positions = target.new_tensor([max(part.positions, 1) for part in parts])
            matrix.put(importance, power / positions.reshape(-1, 1, 1))
            # nothing to compensate with: test_an_embedding_is_rounded_to_nearest
            if own is None or inputs.any():
                errors[matrix] = error
                effects[matrix] = _effects(parts)
        target = target if rotation is None else rotation.of(target)
        return cls(target, target.to(values.dtype), importance, errors, effects, rotation)

    def rounded(self, choice: Choice) -> QuantizedTensor:
        start = choice.quantize(self.rough, self.importance)
        rounded = _rounded(self.target, choice, start, self.errors, self.effects)
        return replace(rounded, rotation=self.rotation)


def _rotation(moments: Mapping[Matrices, Moments], shape: torch.Size, seed: int) -> Rotation | None:
    """None where no matrix has all inputs of an output, for want of memory."""
    try:
        axis = rotation_axis(moments.keys(), shape)
    except ValueError:
        return None
    return Rotation(axis, seed)


def _effects(parts: Sequence[Moments]) -> RowEffects | None:
    """Of matrices that are alike; None where they are not known of all, or a row is an embedding's
    output, too, whose errors do something else."""
    known = [part.effects for part in parts if part.effects is not None and part.counts is None]
    return RowEffects.of(torch.stack(known)) if len(known) == len(parts) else None


def _rounded(
    target: Tensor,
    choice: Choice,
    start: QuantizedTensor,
    errors: Mapping[Matrices, OutputError],
    effects: Mapping[Matrices, RowEffects | None],
) -> QuantizedTensor:
    """The target rounded by GPTQ, from codes rounded to nearest."""
    if choice.rate and start.qparams.scale is None:
        raise ValueError(f"rate is {choice.rate:g}: {choice.scheme} has no scale, which it needs")
    codes = start.codes.clone(memory_format=torch.contiguous_format)
    qparams, shape = start.qparams, target.shape
    channels, scale = _channels(errors, qparams.axis, shape), qparams.scale
    search = channels is not None and scale is not None
    search = search and choice.options.get("scale") == "output_mse"
    shares = {}
    for matrix, error in errors.items():
        rounded, shares[matrix] = gptq(
            matrix.of(target).flatten(0, 1),
            error,
            RowParams.of(start, matrix),
            matrix.of(codes).flatten(0, 1),
            SHARES if search else SHARES[:1],
            choice.rate,
            effects[matrix] if choice.effects else None,
        )
        matrix.put(codes, rounded.reshape(matrix.shape))
    if search and scale is not None and channels is not None:
        share = torch.ones(shape[qparams.axis or 0], 1).to(target)
        for matrix, chosen in shares.items():
            share[channels[matrix]] = chosen
        shared = scale.double().reshape(len(share), -1) * share
        qparams = replace(qparams, scale=stored_scale(shared.reshape(scale.shape), scale.dtype))
    return replace(start, codes=codes, qparams=qparams)


def _stacked(moments: Mapping[Matrices, Moments]) -> Iterator[tuple[Matrices, list[Moments]]]:
    """Matrices that are alike, an even step apart, as groups of one; not too many at a time."""
    kinds: dict[tuple[object, ...], list[Matrices]] = {}
    for matrix, part in moments.items():
        looked_up = None if part.counts is None else bool(part.inputs.any())
        kind = matrix.outputs, matrix.inputs, looked_up
        kinds.setdefault(kind, []).append(matrix)
    for alike in kinds.values():
        _, outputs, inputs = alike[0].shape
        most = max(1, TOGETHER // max(inputs * max(inputs, outputs), 1))
        alike.sort(key=lambda matrix: matrix.offset)
        while alike:
            first, count = alike[0].offset, 1
            step = alike[1].offset - first if len(alike) > 1 else 0
            while count < min(len(alike), most) and alike[count].offset == first + count * step:
                count += 1
            some, alike = alike[:count], alike[count:]
            yield replace(some[0], groups=((count, step),)), [moments[one] for one in some]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _channels(
    matrices: Mapping[Matrices, OutputError], axis: int | None, shape: torch.Size
) -> dict[Matrices, Tensor] | None:
    """The channel that each output of each matrix is, where each is one whole channel."""
    if axis is None:
        return None
    found = {matrix: places(matrix, axis, shape) for matrix in matrices}
    together = torch.cat([*found.values(), torch.arange(0)])
    whole = all(
        not moves(matrix.inputs, axis, shape) and matrix.shape[2] * shape[axis] == shape.numel()
        for matrix in matrices
    )
    return found if whole and len(together.unique()) == len(together) else None


def best_weights(weights: Tensor, outputs: Tensor, error: OutputError) -> Tensor:
    """The weights whose outputs are nearest to the float network's: those given, corrected by least
    squares for what the layer's inputs and its bias have lost so far.

    weights, outputs: Σ y xᵀ, (groups · rows, inputs).
    """
    columns = error.to_order(weights)
    # Σ (y − W x) xᵀ
    missing = torch.baddbmm(error.to_order(outputs) / error.unit, error.form, columns, alpha=-1)
    return error.from_order(columns.add_(torch.cholesky_solve(missing, error.lower)))
