"""The plainest way to say what resets and lengths mean: a Python loop over rows and steps, with PyTorch's own cells."""

from typing import Any

import torch
from torch import Tensor


def by_rows(
    module: Any, x: Tensor, hx: Any = None, reset: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What ``module(x, hx, reset=..., lengths=..., return_cells=True)`` should be: output, states, cells.

    x is ``[T, B, I]``; every row is run by itself, and a step past its end is simply not taken.
    """
    T, B, _ = x.shape
    L, D = module.num_layers, 2 if module.bidirectional else 1
    lstm = module.mode == "LSTM"
    initial = (hx if lstm else (hx,)) if hx is not None else None
    finals: list[list[Tensor]] = []
    y, cells = x, x
    for layer in range(L):
        outputs, inner = [], []
        for d in range(D):
            index = layer * D + d
            rows_y, rows_c, rows_final = [], [], []
            for b in range(B):
                n = T if lengths is None else int(lengths[b])
                states = _initial(module, initial, index, b, x)
                ys = [torch.zeros(0)] * T
                cs = [torch.zeros(0)] * T
                for t in range(n) if d == 0 else reversed(range(n)):
                    if reset is not None and bool(reset[t, b]):
                        states = [torch.zeros_like(s) for s in states]
                    states = _step(module, index, y[t, b], states)
                    ys[t], cs[t] = states[0], states[-1]
                for t in range(n, T):
                    ys[t], cs[t] = torch.zeros_like(states[0]), torch.zeros_like(states[-1])
                rows_y.append(torch.stack(ys))
                rows_c.append(torch.stack(cs))
                rows_final.append(states)
            outputs.append(torch.stack(rows_y, 1))
            inner.append(torch.stack(rows_c, 1))
            finals.append([torch.stack(s) for s in zip(*rows_final, strict=True)])
        y, cells = torch.cat(outputs, -1), torch.cat(inner, -1)
    final = [torch.stack(s) for s in zip(*finals, strict=True)]
    return (y, *final, cells)


def _initial(module: Any, initial: Any, index: int, b: int, x: Tensor) -> list[Tensor]:
    if initial is not None:
        return [s[index, b] for s in initial]
    widths = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    return [x.new_zeros(w) for w in widths[: 2 if module.mode == "LSTM" else 1]]


def _step(module: Any, index: int, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    names = module._all_weights[index]
    weights = {name.split("_l")[0]: getattr(module, name) for name in names}
    core = [weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh")]
    h = states[0][None]
    if module.mode == "LSTM":
        if "weight_hr" not in weights:
            return [s[0] for s in torch.lstm_cell(x[None], (h, states[1][None]), *core)]
        gates = torch.nn.functional.linear(x, core[0], core[2]) + torch.nn.functional.linear(h[0], core[1], core[3])
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return [weights["weight_hr"] @ (o.sigmoid() * c.tanh()), c]
    cell = {"GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell}[module.mode]
    return [cell(x[None], h, *core)[0]]
