"""The recurrent loop for any cell that is given as a step in PyTorch and as nothing else.

What the derivative is, autograd finds out: backward runs each step once more, on the states that it read, and asks for
the vector product of that one step. So nothing but the states is kept, and no graph is longer than a step. Half
precision is computed in fp32, with h rounded wherever it is stored.

Letters: T time, B batch, H hidden, G gates, D directions, C cells, N = C + 1 states, K rows of own parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..reference.recurrent import CELLS


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, inside an operator that was called below it."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        yield


def _times(T: int, d: int, backward: bool = False) -> range:
    """The order in which direction d takes the steps, or their gradients."""
    return range(T)[::-1] if (d == 1) != backward else range(T)


def _states(h: Tensor, c: Tensor | None, cells: int, wide: torch.dtype) -> list[Tensor]:
    """h, and apart from each other the cells that lie side by side in c."""
    return [h.to(wide), *(() if c is None else c.to(wide).chunk(cells, dim=-1))]


def _together(cells: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(cells), dim=-1).to(dtype)


def _staying(stay: Tensor | None, t: int, d: int) -> Sequence[Tensor] | None:
    """What of each state stays: a mask ``[B, H]`` or a number."""
    return None if stay is None else stay.unbind() if stay.dim() == 1 else stay[t, :, d].unbind(1)


def _blend(stay: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """All or nothing is a selection, which NaN does not pass."""
    return torch.where(stay, old, new) if stay.dtype == torch.bool else torch.lerp(new, old, stay.to(new.dtype))


def _alive(T: int, lengths: Tensor | None) -> Sequence[Tensor | None]:
    """For each step, which rows it is inside of ``[B, 1]``; None for all."""
    if lengths is None:
        return [None] * T
    return (torch.arange(T, device=lengths.device)[:, None, None] < lengths[:, None]).unbind()


def _keep(rows: Tensor | None, states: Sequence[Tensor]) -> list[Tensor]:
    """The states in these rows, zero elsewhere."""
    return list(states) if rows is None else [s.masked_fill(~rows, 0) for s in states]


def _select(rows: Tensor | None, states: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    if rows is None:
        return list(states)
    return [torch.where(rows, s, o) for s, o in zip(states, others, strict=True)]


def sequence_forward(
    cell: str,
    x: Tensor,  # [T, B, D, G*H]  input gates
    w_hh: Tensor,  # [D, G*H, H]
    b_hh: Tensor | None,  # [D, G*H]
    h0: Tensor,  # [D, B, H]
    c0: Tensor | None,  # [D, B, C*H]
    params: Tensor | None,  # [D, K, H]
    scale: Tensor | None,  # [D, B, H]
    stay: Tensor | None,  # [T, B, D, N, H] bool, or [N]
    reset: Tensor | None,  # [T, B] bool
    lengths: Tensor | None,  # [B] int64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one layer: y ``[T, B, D, H]``, h_n, c_n and cells ``[T, B, D, C*H]``."""
    step, C = CELLS[cell].step, CELLS[cell].cells
    (T, B, D, _), H = x.shape, h0.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(T, B, D, H)
    cells = None if c0 is None else x.new_empty(T, B, D, C * H, dtype=wide)
    kept = None if reset is None else (~reset)[:, :, None].unbind()
    alive, h_n, c_n = _alive(T, lengths), [], []
    for d in range(D):
        w, own = w_hh[d].to(wide).t(), () if params is None else params[d].to(wide).unbind()
        bias = None if b_hh is None else b_hh[d].to(wide)
        state = _states(h0[d], None if c0 is None else c0[d], C, wide)
        for t in _times(T, d):
            read = _keep(None if kept is None else kept[t], state)
            operand = read[0] if scale is None else read[0] * scale[d]
            h = operand @ w if bias is None else torch.addmm(bias, operand, w)
            new = step(x[t, :, d].to(wide), h, tuple(read), own)
            staying = _staying(stay, t, d)
            if staying is not None:
                new = tuple(_blend(s, r, n) for s, r, n in zip(staying, read, new, strict=True))
            new = (new[0].to(x.dtype).to(wide), *new[1:])
            left = _keep(alive[t], new)
            y[t, :, d] = left[0]
            if cells is not None:
                torch.cat(left[1:], dim=-1, out=cells[t, :, d])
            state = _select(alive[t], new, state)
        h_n.append(state[0].to(x.dtype))
        c_n += [] if c0 is None else [_together(state[1:], x.dtype)]
    return y, torch.stack(h_n), torch.stack(c_n) if c_n else None, cells


def sequence_backward(
    cell: str,
    dy: Tensor,  # [T, B, D, H]
    dh_n: Tensor,  # [D, B, H]
    dc_n: Tensor | None,  # [D, B, C*H]
    dcells: Tensor | None,  # [T, B, D, C*H]
    x: Tensor,  # [T, B, D, G*H]  input gates
    h: Tensor,  # [T, B, D, G*H]  recurrent gates
    h_prev: Tensor,  # [T, B, D, H]  the state each step read
    c_prev: Tensor | None,  # [T, B, D, C*H]
    w_hh: Tensor,  # [D, G*H, H]
    params: Tensor | None,  # [D, K, H]
    scale: Tensor | None,  # [D, B, H]
    stay: Tensor | None,  # [T, B, D, N, H] bool, or [N]
    reset: Tensor | None,  # [T, B] bool
    lengths: Tensor | None,  # [B] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input gates and the recurrent gates ``[T, B, D, G*H]``, of h0 and c0, and of the parameters."""
    step, C, wide = CELLS[cell].step, CELLS[cell].cells, torch.promote_types(x.dtype, torch.float32)
    T, D = x.shape[0], x.shape[2]
    dx, dh = torch.empty_like(x), torch.empty_like(h)
    kept = None if reset is None else (~reset)[:, :, None].unbind()
    alive, dh0, dc0, dparams = _alive(T, lengths), [], [], []
    for d in range(D):
        w, own = w_hh[d].to(wide), () if params is None else params[d].to(wide).unbind()
        down = [torch.zeros_like(row) for row in own]
        after = _states(dh_n[d], None if dc_n is None else dc_n[d], C, wide)
        for t in _times(T, d, backward=True):
            arriving = _states(dy[t, :, d], None if dcells is None else dcells[t, :, d], C, wide)
            dnew = [a + o for a, o in zip(after, arriving, strict=False)] + after[len(arriving) :]
            dnew = _keep(alive[t], dnew)
            staying = _staying(stay, t, d)
            around = [torch.zeros_like(g) for g in dnew]  # zoneout's way past the step
            if staying is not None:
                around = [_blend(s, g, z) for s, g, z in zip(staying, dnew, around, strict=True)]
                dnew = [_blend(s, torch.zeros_like(g), g) for s, g in zip(staying, dnew, strict=True)]
            read = _states(h_prev[t, :, d], None if c_prev is None else c_prev[t, :, d], C, wide)
            with _recording():
                leaves = [v.detach().requires_grad_() for v in (x[t, :, d].to(wide), h[t, :, d].to(wide), *read, *own)]
                new = step(leaves[0], leaves[1], tuple(leaves[2 : 3 + C]), tuple(leaves[3 + C :]))
                reached = [(n, g) for n, g in zip(new, dnew, strict=True) if n.requires_grad]
                outputs, cotangents = zip(*reached, strict=True)
                found = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
            dgates = _keep(alive[t], found[:2])
            dx[t, :, d], dh[t, :, d] = dgates
            through = dgates[1] @ w
            before = [a + g for a, g in zip(around, found[2 : 3 + C], strict=True)]
            before[0] = before[0] + (through if scale is None else through * scale[d])
            after = _select(alive[t], _keep(None if kept is None else kept[t], before), after)
            down = [total + g for total, g in zip(down, found[3 + C :], strict=True)]
        dh0.append(after[0].to(x.dtype))
        dc0 += [] if dc_n is None else [_together(after[1:], x.dtype)]
        dparams += [torch.stack(down)] if own else []
    return dx, dh, torch.stack(dh0), torch.stack(dc0) if dc0 else None, torch.stack(dparams) if dparams else None
