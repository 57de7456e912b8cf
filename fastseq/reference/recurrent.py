"""The recurrent cells as steps, and the one loop over time that runs them.

Plain differentiable PyTorch, written to be read. Everything faster in this library is tested against it.

Letters: T time, B batch, I input, H hidden, P output width (H, or ``proj_size``), G gates, D directions, C cells (the
states beside h), N = C + 1 states, K rows of parameters that a step has of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid

State = tuple[Tensor, ...]
Params = tuple[Tensor, ...]


def rnn_tanh_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    return (torch.tanh(x + h),)


def rnn_relu_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    return (torch.relu(x + h),)


def lstm_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    xr, xz, xn = x.chunk(3, dim=-1)
    hr, hz, hn = h.chunk(3, dim=-1)
    z = (xz + hz).sigmoid()
    n = torch.tanh(xn + (xr + hr).sigmoid() * hn)
    return ((1 - z) * n + z * state[0],)


def peephole_lstm_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    """The gates see the cell (Gers & Schmidhuber 2000)."""
    xi, xf, xg, xo = (x + h).chunk(4, dim=-1)
    pi, pf, po = params
    c = (xf + pf * state[1]).sigmoid() * state[1] + (xi + pi * state[1]).sigmoid() * xg.tanh()
    return (xo + po * c).sigmoid() * c.tanh(), c


def layer_norm_lstm_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    """Both products and the cell are normalised over the layer (Ba, Kiros & Hinton 2016)."""
    gain_x, gain_h, bias = (torch.cat(params[k : k + 4]) for k in (0, 4, 8))
    gates = _normalised(x) * gain_x + _normalised(h) * gain_h + bias
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * torch.tanh(_normalised(c) * params[12] + params[13]), c


def layer_norm_gru_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    """The GRU above on normalised products (Ba, Kiros & Hinton 2016)."""
    gain_x, gain_h, bias, bias_h = (torch.cat(params[k : k + 3]) for k in (0, 3, 6, 9))
    return gru_step(_normalised(x) * gain_x + bias, _normalised(h) * gain_h + bias_h, state, ())


def mgu_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    """Minimal gated unit (Zhou et al. 2016), with the reset after the product as in the GRU above."""
    xf, xn = x.chunk(2, dim=-1)
    hf, hn = h.chunk(2, dim=-1)
    f = (xf + hf).sigmoid()
    n = torch.tanh(xn + f * hn)
    return ((1 - f) * state[0] + f * n,)


def slstm_step(x: Tensor, h: Tensor, state: State, params: Params) -> State:
    """Exponential gates (Beck et al. 2024, xLSTM); c and n are kept in units of exp(m), where n = 0 says: no past."""
    i, f, z, o = (x + h).chunk(4, dim=-1)
    _, c, n, m = state
    past = logsigmoid(f) + m
    wins = (n != 0) & (past > i)
    m = torch.where(wins, past, i)
    keep = (past - m).masked_fill(n == 0, -torch.inf).exp()
    enter = (i - m).exp()
    c = keep * c + enter * z.tanh()
    n = keep * n + enter
    return o.sigmoid() * c / n, c, n, m


def _normalised(values: Tensor) -> Tensor:
    return layer_norm(values, values.shape[-1:])


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: how many gates it has, how many states it carries beside h, its step and its parameters.

    ``step(x, h, state, params)`` takes input gates and recurrent gates ``[B, G*H]`` (biases included), the states
    ``[B, H]`` and K parameters ``[H]``, and returns the new states. ``parameters`` names them: how many rows each
    has, and the value it starts from (None: drawn like the weights). ``splits``: the step does more with the two kinds
    of gates than add them up.
    """

    gates: int
    cells: int
    step: Callable[[Tensor, Tensor, State, Params], State]
    parameters: dict[str, tuple[int, float | None]] = field(default_factory=dict)
    splits: bool = False


CELLS = {
    "rnn_tanh": Cell(gates=1, cells=0, step=rnn_tanh_step),
    "rnn_relu": Cell(gates=1, cells=0, step=rnn_relu_step),
    "lstm": Cell(gates=4, cells=1, step=lstm_step),
    "gru": Cell(gates=3, cells=0, step=gru_step, splits=True),
    "peephole_lstm": Cell(gates=4, cells=1, step=peephole_lstm_step, parameters={"peephole": (3, None)}),
    "layer_norm_lstm": Cell(
        gates=4,
        cells=1,
        step=layer_norm_lstm_step,
        parameters={"gain_x": (4, 1.0), "gain_h": (4, 1.0), "bias": (4, 0.0), "gain_c": (1, 1.0), "bias_c": (1, 0.0)},
        splits=True,
    ),
    "layer_norm_gru": Cell(
        gates=3,
        cells=0,
        step=layer_norm_gru_step,
        parameters={"gain_x": (3, 1.0), "gain_h": (3, 1.0), "bias": (3, 0.0), "bias_h": (3, 0.0)},
        splits=True,
    ),
    "mgu": Cell(gates=2, cells=0, step=mgu_step, splits=True),
    "slstm": Cell(gates=4, cells=3, step=slstm_step),
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
    """One step of a stock cell: input ``[B, I]``, h and c ``[B, H]``; returns the new h and c (None without one)."""
    state = (h,) if c is None else (h, c)
    new = CELLS[cell].step(linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), state, ())
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
    params: Tensor | None = None,
    scale: Tensor | None = None,
    stay: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer in one or both directions; the weights of the directions are stacked along a first axis D.

    input ``[T, B, I]``; w_ih ``[D, G*H, I]``, w_hh ``[D, G*H, P]``, biases ``[D, G*H]``, w_hr ``[D, P, H]``;
    h0 ``[D, B, P]``, c0 ``[D, B, C*H]``, the cells side by side; params ``[D, K, H]``; reset ``[T, B]`` bool;
    lengths ``[B]``. scale ``[D, B, P]`` multiplies h where it enters the recurrent product (Gal & Ghahramani 2016).
    stay (zoneout, Krueger et al. 2017) says what each of the N states keeps of what the step read: bool
    ``[T, B, D, N, H]``, all or nothing, or numbers ``[N]``, a share.
    Returns the output ``[T, B, D*P]``, h_n, c_n, and all cells ``[T, B, D*C*H]`` (None for a cell without).
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
            (h0[d],) if c0 is None else (h0[d], *c0[d].chunk(CELLS[cell].cells, dim=-1)),
            reset,
            alive,
            backwards=d == 1,
            params=() if params is None else params[d].unbind(),
            scale=None if scale is None else scale[d],
            stay=stay if stay is None or stay.dim() == 1 else stay[:, :, d],
        )
        for d in range(w_ih.shape[0])
    ]
    per_step, final = zip(*runs, strict=True)
    y = torch.cat([states[0] for states in per_step], dim=-1)
    h_n = torch.stack([states[0] for states in final])
    if c0 is None:
        return y, h_n, None, None
    c_n = torch.stack([torch.cat(states[1:], dim=-1) for states in final])
    return y, h_n, c_n, torch.cat([c for states in per_step for c in states[1:]], dim=-1)


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
    params: Params = (),
    scale: Tensor | None = None,
    stay: Tensor | None = None,
) -> tuple[list[Tensor], State]:
    steps = range(x.shape[0])
    history: list[State] = []
    for t in reversed(steps) if backwards else steps:
        read = state
        if reset is not None:
            read = tuple(s.masked_fill(reset[t, :, None], 0) for s in read)
        operand = read[0] if scale is None else read[0] * scale
        new = cell.step(x[t], linear(operand, w_hh, b_hh), read, params)
        if w_hr is not None:
            new = (linear(new[0], w_hr), *new[1:])
        if stay is not None and stay.dim() == 1:
            new = tuple(p.to(n.dtype) * r + (1 - p).to(n.dtype) * n for n, r, p in zip(new, read, stay, strict=True))
        elif stay is not None:
            new = tuple(torch.where(s, r, n) for n, r, s in zip(new, read, stay[t].unbind(1), strict=True))
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


Stack = list[Tensor | None]  # w_ih, w_hh, b_ih, b_hh, w_hr of a layer, directions stacked, and params if it has own
Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def stacked(params: Sequence[Tensor], has_biases: bool, num_layers: int, D: int, own: int = 0) -> list[Stack]:
    """Sort parameters in ``torch.nn.LSTM``'s order into layers, with the directions stacked along a first axis.

    The last ``own`` of every layer and direction, each ``[rows * H]``, are the step's; None stands where one is absent.
    """
    each = len(params) // (num_layers * D)
    stacks: list[Stack] = []
    for start in range(0, len(params), each * D):
        groups = [params[start + d * each : start + (d + 1) * each] for d in range(D)]
        stack: Stack = [torch.stack(w) if D > 1 else w[0][None] for w in zip(*groups, strict=True)]
        rows: Stack = []
        if own:
            H = groups[0][1].shape[1]
            rows = [torch.cat(stack[-own:], dim=1).view(D, -1, H)]  # type: ignore[arg-type]
            del stack[-own:]
        if not has_biases:
            stack[2:2] = [None, None]
        stacks.append([*stack, None][:5] + rows)
    return stacks


def network(
    run: Layer, input: Tensor, hx: State, stacks: list[Stack], dropout: float = 0.0
) -> tuple[Tensor, State, Tensor | None]:
    """Layer upon layer: ``run(input, *stack, h0, c0, *own)`` is one of them; hx ``[L*D, B, P]`` (``[L*D, B, C*H]``).

    Returns the output ``[T, B, D*P]``, the final states like hx, and the last layer's cells.
    """
    D, y, cells, finals = stacks[0][0].shape[0], input, None, []  # type: ignore[union-attr]
    for index, stack in enumerate(stacks):
        if index and dropout:
            y = torch.nn.functional.dropout(y, dropout)
        h0, c0 = (*(state[index * D : (index + 1) * D] for state in hx), None)[:2]
        y, h_n, c_n, cells = run(y, *stack[:5], h0, c0, *stack[5:])
        finals.append((h_n, c_n)[: len(hx)])
    final = tuple(torch.cat(states) for states in zip(*finals, strict=True))
    return y, final, cells
