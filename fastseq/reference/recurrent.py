"""The recurrent cells as steps, and the one loop over time that runs them.

Plain differentiable PyTorch, written to be read. Everything faster in this library is tested against it.

Letters: T time, B batch, I input, H hidden, P output width (H, or ``proj_size``), G gates, D directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]


def rnn_tanh_step(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def rnn_relu_step(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


def lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, h: Tensor, state: State) -> State:
    xr, xz, xn = x.chunk(3, dim=-1)
    hr, hz, hn = h.chunk(3, dim=-1)
    z = (xz + hz).sigmoid()
    n = torch.tanh(xn + (xr + hr).sigmoid() * hn)
    return ((1 - z) * n + z * state[0],)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: how many gates it has, how many states it carries (h, then c), and its step.

    ``step(x, h, state)`` takes input gates and recurrent gates ``[B, G*H]`` (biases included) and the states
    ``[B, H]``, and returns the new states.
    """

    gates: int
    states: int
    step: Callable[[Tensor, Tensor, State], State]


CELLS = {
    "rnn_tanh": Cell(gates=1, states=1, step=rnn_tanh_step),
    "rnn_relu": Cell(gates=1, states=1, step=rnn_relu_step),
    "lstm": Cell(gates=4, states=2, step=lstm_step),
    "gru": Cell(gates=3, states=1, step=gru_step),
}


def single(
    cell: str,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: input ``[B, I]``, h and c ``[B, H]``; returns the new h and c (None without one)."""
    state = (h,) if c is None else (h, c)
    new = CELLS[cell].step(linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), state)
    return new[0], new[1] if len(new) > 1 else None


def layer(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer in one or both directions; the weights of the directions are stacked along a first axis D.

    input ``[T, B, I]``; w_ih ``[D, G*H, I]``, w_hh ``[D, G*H, P]``, biases ``[D, G*H]``, w_hr ``[D, P, H]``;
    h0 ``[D, B, P]``, c0 ``[D, B, H]``; reset ``[T, B]`` bool; lengths ``[B]``.
    Returns the output ``[T, B, D*P]``, h_n, c_n, and every c_t ``[T, B, D*H]`` (None for a cell without c).
    """
    alive = None
    if lengths is not None:
        alive = torch.arange(input.shape[0], device=input.device)[:, None] < lengths
    runs = [
        _direction(
            CELLS[cell],
            linear(input, w_ih[d], None if b_ih is None else b_ih[d]),
            w_hh[d],
            None if b_hh is None else b_hh[d],
            None if w_hr is None else w_hr[d],
            (h0[d],) if c0 is None else (h0[d], c0[d]),
            reset,
            alive,
            backwards=d == 1,
        )
        for d in range(w_ih.shape[0])
    ]
    per_step, final = zip(*runs, strict=True)
    y = torch.cat([states[0] for states in per_step], dim=-1)
    h_n = torch.stack([states[0] for states in final])
    if c0 is None:
        return y, h_n, None, None
    return y, h_n, torch.stack([s[1] for s in final]), torch.cat([s[1] for s in per_step], dim=-1)


def _direction(
    cell: Cell,
    x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    state: State,
    reset: Tensor | None,
    alive: Tensor | None,
    backwards: bool,
) -> tuple[list[Tensor], State]:
    steps = range(x.shape[0])
    history: list[State] = []
    for t in reversed(steps) if backwards else steps:
        read = state
        if reset is not None:
            read = tuple(s.masked_fill(reset[t, :, None], 0) for s in read)
        new = cell.step(x[t], linear(read[0], w_hh, b_hh), read)
        if w_hr is not None:
            new = (linear(new[0], w_hr), *new[1:])
        if alive is None:
            state = new
            history.append(new)
        else:
            live = alive[t, :, None]
            state = tuple(torch.where(live, n, s) for n, s in zip(new, state, strict=True))
            history.append(tuple(n.masked_fill(~live, 0) for n in new))
    if backwards:
        history.reverse()
    return [torch.stack(states) for states in zip(*history, strict=True)], state


Stack = list[Tensor | None]  # w_ih, w_hh, b_ih, b_hh, w_hr of a layer, directions stacked; None where absent
Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def stacked(params: Sequence[Tensor], has_biases: bool, num_layers: int, D: int) -> list[Stack]:
    """Sort parameters in ``torch.nn.LSTM``'s order into layers, with the directions stacked along a first axis."""
    each = len(params) // (num_layers * D)
    stacks: list[Stack] = []
    for start in range(0, len(params), each * D):
        groups = [params[start + d * each : start + (d + 1) * each] for d in range(D)]
        stack: Stack = [torch.stack(w) if D > 1 else w[0][None] for w in zip(*groups, strict=True)]
        if not has_biases:
            stack[2:2] = [None, None]
        stacks.append([*stack, None][:5])
    return stacks


def network(
    run: Layer, input: Tensor, hx: State, stacks: list[Stack], dropout: float = 0.0
) -> tuple[Tensor, State, Tensor | None]:
    """Layer upon layer: ``run(input, *stack, h0, c0)`` is one of them; hx ``[L*D, B, P]`` (and ``[L*D, B, H]``).

    Returns the output ``[T, B, D*P]``, the final states like hx, and the last layer's cells.
    """
    D, y, cells, finals = stacks[0][0].shape[0], input, None, []  # type: ignore[union-attr]
    for index, stack in enumerate(stacks):
        if index and dropout:
            y = torch.nn.functional.dropout(y, dropout)
        h0, c0 = (*(state[index * D : (index + 1) * D] for state in hx), None)[:2]
        y, h_n, c_n, cells = run(y, *stack, h0, c0)
        finals.append((h_n, c_n)[: len(hx)])
    final = tuple(torch.cat(states) for states in zip(*finals, strict=True))
    return y, final, cells
