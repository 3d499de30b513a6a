"""Recurrent layers and cells as their linear products: the inputs of all steps meet their weight in
one, the states in one for each step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[..., Tensor]
# (what a step's input, and its last state, project to; last state) → state, the output first
Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _lstm(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    let_in, forget, new, let_out = (x + h).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + let_in.sigmoid() * new.tanh()
    return let_out.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    keep = (x_keep + h_keep).sigmoid()
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return ((1 - keep) * new + keep * state[0],)


def _tanh(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x + h).relu(),)


LAYERS: dict[Any, Cell] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
CELLS: dict[Any, Cell] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}


def is_packed(args: Sequence[Any]) -> bool:
    """Whether a layer is called with (data, batch sizes, …), instead of padded inputs."""
    return not isinstance(args[3], bool)


def weights_of(args: Sequence[Any]) -> Sequence[Tensor]:
    """Of a layer's arguments, its weights and biases."""
    return args[3] if is_packed(args) else args[2]


def layer(cell: Cell, linear: Linear, *args: Any) -> tuple[Tensor, ...]:
    """torch.lstm, gru, rnn_tanh or rnn_relu.

    linear: F.linear, as each product is to be computed.
    args: those of the function, padded or packed.
    """
    if is_packed(args):
        data, lengths, states, weights, biased, count, dropout, train, both = args
        sizes = lengths.tolist()
        output, last = _stack(
            cell, linear, data, sizes, states, weights, biased, count, dropout, train, both
        )
        return output, *last
    inputs, states, weights, biased, count, dropout, train, both, batch_first = args
    inputs = inputs.transpose(0, 1) if batch_first else inputs
    steps, examples, _ = inputs.shape
    output, last = _stack(
        *(cell, linear, inputs.flatten(0, 1), [examples] * steps, states, weights),
        *(biased, count, dropout, train, both),
    )
    output = output.unflatten(0, (steps, examples))
    return output.transpose(0, 1) if batch_first else output, *last


def single(cell: Cell, linear: Linear, inputs: Tensor, state: Any, *weights: Any) -> Any:
    """torch.lstm_cell, gru_cell, rnn_tanh_cell or rnn_relu_cell."""
    w_in, w_state, *biases = weights
    b_in, b_state = biases or (None, None)
    states = tuple(state) if isinstance(state, tuple | list) else (state,)
    new = cell(linear(inputs, w_in, b_in), linear(states[0], w_state, b_state), states)
    return new if len(new) > 1 else new[0]


def _stack(
    cell: Cell,
    linear: Linear,
    data: Tensor,
    sizes: Sequence[int],
    states: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biased: bool,
    count: int,
    dropout: float,
    train: bool,
    both: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Layers one on the other: the last one's outputs, and the last states of all of them.

    data: (positions, inputs), step by step.
    sizes: how many examples each step has, never more than that before.
    states: the first ones, (layers · directions, examples, …) each.
    """
    first = (states,) if isinstance(states, Tensor) else tuple(states)
    directions = 1 + both
    each = len(weights) // (count * directions)
    last: list[tuple[Tensor, ...]] = []
    for index in range(count):
        outputs = []
        for direction in range(directions):
            number = index * directions + direction
            own = weights[number * each : (number + 1) * each]
            start = tuple(state[number] for state in first)
            output, end = _direction(cell, linear, data, sizes, start, own, biased, direction == 1)
            outputs.append(output)
            last.append(end)
        data = torch.cat(outputs, -1) if both else outputs[0]
        if index < count - 1:
            data = F.dropout(data, dropout, train)
    return data, [torch.stack(ends) for ends in zip(*last, strict=True)]


def _direction(
    cell: Cell,
    linear: Linear,
    data: Tensor,
    sizes: Sequence[int],
    start: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biased: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: its outputs (positions, …), and its last state."""
    w_in, w_state, *rest = weights
    b_in, b_state = rest[:2] if biased else (None, None)
    projection = rest[2 * biased :]
    projected = list(linear(data, w_in, b_in).split(list(sizes)))
    state = tuple(each[: sizes[-1] if backwards else sizes[0]] for each in start)
    outputs, ended = [], []
    for step in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        size, now = sizes[step], len(state[0])
        if size < now:  # the shorter examples have ended
            ended.append(tuple(each[size:] for each in state))
            state = tuple(each[:size] for each in state)
        elif size > now:  # their ends come into play
            more = [each[now:size] for each in start]
            state = tuple(torch.cat(pair) for pair in zip(state, more, strict=True))
        state = cell(projected[step], linear(state[0], w_state, b_state), state)
        if projection:  # of an LSTM
            state = linear(state[0], *projection), *state[1:]
        outputs.append(state[0])
    if backwards:
        outputs.reverse()
    parts = [state, *reversed(ended)]
    return torch.cat(outputs), tuple(torch.cat(each) for each in zip(*parts, strict=True))
