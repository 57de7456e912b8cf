"""GRU and RNN in training on a CPU, where what a small step costs is its dispatches and not its arithmetic.

PyTorch's operators record a graph of every small operation of every step. Here a step works in place, in the buffer
that holds its input gates before it and what its gradient needs after it: two operations for an RNN and two on the
way back, five and three for a GRU. The gradient's pointwise factors are made for a chunk of steps at a time, on views
made once, and the gradients of weights and input are one matrix product each, after the loop. A row that has ended
runs on unseen: no gradient enters behind its end, so none leaves.

Letters: T time, B batch, I input, H hidden, C steps in a chunk, S saved values per hidden unit.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..reference import recurrent as reference
from .library import differentiated

_CHUNK_STEPS = 32  # more would not hide more overhead
_CHUNK_VALUES = 1 << 17  # of a chunk's gates: 512 KiB of fp32, half of a common L2 cache
_TRANSPOSED = 256  # up to this width the product of a step is worth a transposed copy of the weight
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Resets:
    """The rows that a step resets. Zeros are made by AND with a mask of bits, which lets no NaN through."""

    def __init__(self, reset: Tensor, like: Tensor) -> None:
        self.bits = _BITS[like.dtype]
        self.any = reset.any(1).tolist()
        self.stays = reset[:, :, None].to(self.bits) - 1

    def zero(self, state: Tensor, t: int) -> Tensor:
        """In place."""
        state.view(self.bits).bitwise_and_(self.stays[t])
        return state


class _RNN:
    """A row of the states holds the input gates before its step, and h after it, which is all that is saved."""

    gates: ClassVar[int] = 1
    saved: ClassVar[int] = 0  # besides h
    gradients: ClassVar[int] = 1  # per hidden unit, those of the recurrent gates first

    def inputs(self, x: Tensor, gates: Tensor, h: Tensor, w: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        """The input gates of a chunk: x ``[C*B, I]``, gates ``[C, B, S, H]``, h ``[C, B, H]``."""
        torch.addmm(b_ih + b_hh, x, w.t(), out=h.flatten(0, 1))

    def views(self, gates: Tensor, h: Tensor) -> Sequence[Any]:
        """For each step of a chunk, what ``forward`` works on; h is what it writes."""
        return h.unbind()

    def forward(self, views: Any, h: Tensor, w: Tensor) -> None:
        """One step, from the state read."""
        raise NotImplementedError

    def derive(self, factors: Tensor, keep: Tensor, gates: Tensor, before: Tensor, after: Tensor) -> None:
        """For a chunk, what turns the gradient of h into that of the gates ``[C, B, gradients, H]``."""
        raise NotImplementedError

    def backward_views(self, factors: Tensor, keep: Tensor) -> Sequence[Any]:
        return factors[:, :, 0].unbind()

    def backward(self, views: Any, dh: Tensor, dh_row: Tensor, before: Tensor, w: Tensor) -> None:
        """Factors become gradients, in place; that of the h read is added to ``before``. dh_row ``[B, 1, H]``."""
        before.addmm_(views.mul_(dh), w)

    def input_gradients(self, d: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and w_ih, from d ``[T*B, gradients*H]``."""
        return d @ w, d.t() @ x

    def input_gates(self, d: Tensor) -> Tensor:
        """Of a sum ``[gradients*H]`` the part of the input gates, as a copy."""
        return d.clone()


class _Tanh(_RNN):
    def forward(self, views: Any, h: Tensor, w: Tensor) -> None:
        views.addmm_(h, w).tanh_()

    def derive(self, factors: Tensor, keep: Tensor, gates: Tensor, before: Tensor, after: Tensor) -> None:
        torch.addcmul(after.new_ones(()), after, after, value=-1, out=factors[:, :, 0])


class _Relu(_RNN):
    def forward(self, views: Any, h: Tensor, w: Tensor) -> None:
        views.addmm_(h, w).relu_()

    def derive(self, factors: Tensor, keep: Tensor, gates: Tensor, before: Tensor, after: Tensor) -> None:
        torch.gt(after, 0, out=factors[:, :, 0])


class _GRU(_RNN):
    """Saves r, z, the recurrent gate of n, and n; their gradients lie in the same order. Keeps z."""

    gates, saved, gradients = 3, 4, 4

    def inputs(self, x: Tensor, gates: Tensor, h: Tensor, w: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        rows, H = gates.flatten(0, 1).flatten(1), h.shape[2]
        torch.addmm((b_ih + b_hh)[: 2 * H], x, w[: 2 * H].t(), out=rows[:, : 2 * H])
        torch.addmm(b_ih[2 * H :], x, w[2 * H :].t(), out=rows[:, 3 * H :])
        gates[:, :, 2].copy_(b_hh[2 * H :])

    def views(self, gates: Tensor, h: Tensor) -> Sequence[Any]:
        parts = gates[:, :, :3].flatten(2), gates[:, :, :2].flatten(2), *gates.unbind(2), h
        return list(zip(*(part.unbind() for part in parts), strict=True))

    def forward(self, views: Any, h: Tensor, w: Tensor) -> None:
        recurrent, r_and_z, r, z, h_n, n, h_new = views
        recurrent.addmm_(h, w)
        r_and_z.sigmoid_()
        n.addcmul_(r, h_n).tanh_()
        torch.lerp(n, h, z, out=h_new)

    def derive(self, factors: Tensor, keep: Tensor, gates: Tensor, before: Tensor, after: Tensor) -> None:
        r, z, h_n, n = gates.unbind(2)
        dr, dz, dh_n, dn = factors.unbind(2)
        torch.sub(gates.new_ones(()), gates[:, :, :2], out=factors[:, :, :2])
        torch.mul(n, dz, out=dn)
        torch.addcmul(dz, dn, n, value=-1, out=dn)  # (1 - z) (1 - n²)
        torch.mul(dn, r, out=dh_n)
        dr.mul_(dh_n).mul_(h_n)
        torch.sub(before, n, out=keep)
        dz.mul_(z).mul_(keep)
        keep.copy_(z)

    def backward_views(self, factors: Tensor, keep: Tensor) -> Sequence[Any]:
        parts = factors, factors[:, :, :3].flatten(2), keep
        return list(zip(*(part.unbind() for part in parts), strict=True))

    def backward(self, views: Any, dh: Tensor, dh_row: Tensor, before: Tensor, w: Tensor) -> None:
        every, recurrent, keep = views
        every.mul_(dh_row)
        before.addcmul_(dh, keep).addmm_(recurrent, w)

    def input_gradients(self, d: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        H = d.shape[1] // 4
        of_rz, of_n, dw = d[:, : 2 * H], d[:, 3 * H :], torch.empty_like(w)
        torch.mm(of_rz.t(), x, out=dw[: 2 * H])
        torch.mm(of_n.t(), x, out=dw[2 * H :])
        return (of_rz @ w[: 2 * H]).addmm_(of_n, w[2 * H :]), dw

    def input_gates(self, d: Tensor) -> Tensor:
        r, z, _, n = d.chunk(4)
        return torch.cat((r, z, n))


STEPS: dict[str, _RNN] = {"rnn_tanh": _Tanh(), "rnn_relu": _Relu(), "gru": _GRU()}


def refusal(cell: str, lengths: bool, *tensors: Tensor) -> str | None:
    """Why a layer cannot be trained here; None if it can."""
    if cell not in STEPS:
        return f"{cell} has an operator of its own"
    if cell == "rnn_relu" and lengths:
        return "a state that runs on behind a row's end might overflow"
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= _BITS.keys():
        return "it computes in float32 and float64 only"
    return None


class Trained(torch.autograd.Function):
    """One layer in one direction: y ``[T, B, H]`` and h_n ``[B, H]``.

    Takes ``(cell, reset, lengths, input, h0, w_ih, w_hh, b_ih, b_hh)``; behind a row's end the input is finite.
    """

    @staticmethod
    def forward(ctx: Any, cell: str, reset: Tensor | None, lengths: Tensor | None, *tensors: Any) -> Any:
        input, h0, w_ih, w_hh, b_ih, b_hh = tensors
        step = STEPS[cell]
        (T, B, _), H = input.shape, w_hh.shape[1]
        if b_ih is None:
            b_ih = b_hh = input.new_zeros(step.gates * H)
        w = w_hh.t().contiguous() if B > 1 and H <= _TRANSPOSED else w_hh.t()
        states, gates = input.new_empty(T + 1, B, H), input.new_empty(T, B, step.saved, H)
        states[0].copy_(h0)
        C, chunks = _chunks(T, B, max(1, step.saved) * H)
        rows, chunk = states, gates
        if C < T:  # else the chunk is the result
            rows, chunk = input.new_empty(C + 1, B, H), input.new_empty(C, B, step.saved, H)
        views, at = step.views(chunk, rows[1:]), rows.unbind()
        resets = None if reset is None else _Resets(reset, h0)
        h = states[0]
        for start, n in chunks:
            x = input[start : start + n].reshape(n * B, -1)
            step.inputs(x, chunk[:n], rows[1 : n + 1], w_ih, b_ih, b_hh)
            for k in range(n):
                if resets is not None and resets.any[start + k]:
                    h = resets.zero(h.clone(), start + k)
                step.forward(views[k], h, w)
                h = at[k + 1]
            if C < T:
                states[start + 1 : start + n + 1].copy_(rows[1 : n + 1])
                gates[start : start + n].copy_(chunk[:n])
                h = states[start + n]
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(reset, lengths, *tensors, states, gates)
        # Copies: what is saved for the gradient is nobody's to change.
        if lengths is None:
            return states[1:].clone(), h.clone()
        y = states[1:].masked_fill(_behind(T, lengths)[:, :, None], 0)
        return y, states[lengths, torch.arange(B)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # it may be on around the gradient too
            return Trained._backward(ctx, dy, dh_n)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> Any:
        reset, lengths, *tensors, states, gates = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = functools.partial(_formula, ctx.cell, reset, lengths)
            return None, None, None, *differentiated(formula, tensors, (dy, dh_n))
        input, h0, w_ih, w_hh, b_ih, _ = tensors
        step, needs = STEPS[ctx.cell], ctx.needs_input_grad[3:]
        (T, B, _), H = input.shape, w_hh.shape[1]
        before, after, resets = states[:-1], states[1:], None
        if reset is not None:
            resets, before = _Resets(reset, h0), before.masked_fill(reset[:, :, None], 0)
        at_once = torch.zeros_like(h0) if dh_n is None else dh_n  # of h0, where a row has no steps
        if lengths is not None:
            dy, at_once = _ending(T, lengths, dy, at_once)
        if dy is None:
            dy = states.new_zeros(()).expand(T, B, H)
        carry = (dy[-1] + at_once if lengths is None else dy[-1].clone()).unsqueeze(1)

        C, chunks = _chunks(T, B, step.gradients * H)
        d = states.new_empty(T, B, step.gradients, H)
        factors = d if C == T else d.new_empty(C, B, step.gradients, H)
        keep, dh_rows = d.new_empty(C, B, H if step.saved else 0), d.new_empty(C, B, 1, H)
        views, row_at, at = step.backward_views(factors, keep), dh_rows.unbind(), dh_rows[:, :, 0].unbind()
        # A single row times a matrix is added up term by term; where the matrix lies transposed, in several parts,
        # which errs less.
        w = w_hh.t().contiguous().t() if B == 1 else w_hh
        for start, n in reversed(chunks):
            now = slice(start, start + n)
            step.derive(factors[:n], keep[:n], gates[now], before[now], after[now])
            if start:
                dh_rows[:n, :, 0].copy_(dy[start - 1 : start + n - 1])
            else:
                at[0].zero_()
                dh_rows[1:n, :, 0].copy_(dy[: n - 1])
            row, dh = carry, carry[:, 0]
            for k in range(n - 1, -1, -1):
                if resets is None or not resets.any[start + k]:
                    step.backward(views[k], dh, row, at[k], w)
                else:
                    carried = torch.zeros_like(dh)
                    step.backward(views[k], dh, row, carried, w)
                    at[k].add_(resets.zero(carried, start + k))
                dh, row = at[k], row_at[k]
            carry = row.clone()
            if C < T:
                d[now].copy_(factors[:n])
        dh0 = carry[:, 0] if lengths is None else carry[:, 0] + at_once

        flat = d.view(T * B, -1)
        of_h = flat[:, : step.gates * H]
        dx, dw_ih = step.input_gradients(flat, input.reshape(T * B, -1), w_ih)
        dw_hh = of_h.t() @ before.reshape(T * B, H)
        db_ih = db_hh = None
        if b_ih is not None:
            total = flat.sum(0)
            db_ih, db_hh = step.input_gates(total), total[: step.gates * H]
        gradients = (dx.view(input.shape), dh0, dw_ih, dw_hh, db_ih, db_hh)
        return None, None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True))


def _chunks(T: int, B: int, values: int) -> tuple[int, list[tuple[int, int]]]:
    """The size of a chunk, and where each begins and how many steps it has."""
    C = max(1, min(_CHUNK_STEPS, T, _CHUNK_VALUES // max(1, B * values)))
    return C, [(start, min(C, T - start)) for start in range(0, T, C)]


def _behind(T: int, lengths: Tensor) -> Tensor:
    return torch.arange(T)[:, None] >= lengths


def _ending(T: int, lengths: Tensor, dy: Tensor | None, dh_n: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the output, with that of each row's final state where it ends; and that of h0, where at once."""
    if dy is None:
        dy = dh_n.new_zeros(T, *dh_n.shape)
    else:
        dy = dy.masked_fill(_behind(T, lengths)[:, :, None], 0)
    ends = (lengths - 1).clamp_min(0), torch.arange(len(lengths))
    none = (lengths == 0)[:, None]
    dy.index_put_(ends, dh_n.masked_fill(none, 0), accumulate=True)
    return dy, dh_n.masked_fill(~none, 0)


def _formula(cell: str, reset: Tensor | None, lengths: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by the reference."""
    input, *rest = tensors
    h0, *weights = (None if t is None else t[None] for t in rest)
    given: Any = (cell, input, *weights, None, h0, None)
    masks: Any = {"reset": reset, "lengths": lengths}
    y, h_n, *_ = reference.layer(*given, **masks)
    return y, h_n[0]


def layer(
    cell: str,
    input: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor | None],
    b_hh: Sequence[Tensor | None],
    h0: Tensor,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer, a weight of each kind per direction: y ``[T, B, D*H]`` and h_n ``[D, B, H]``."""
    runs: list[Any] = []
    for d, weights in enumerate(zip(w_ih, w_hh, b_ih, b_hh, strict=True)):
        if d == 0:
            runs.append(Trained.apply(cell, reset, lengths, input, h0[d], *weights))  # type: ignore[no-untyped-call]
            continue
        back = _backwards(input.shape[0], lengths)
        turned = None if reset is None else _take(reset, back)
        y, h_n = Trained.apply(cell, turned, lengths, _take(input, back), h0[d], *weights)  # type: ignore[no-untyped-call]
        runs.append((_take(y, back), h_n))
    if len(runs) == 1:
        return runs[0][0], runs[0][1][None]
    return torch.cat([y for y, _ in runs], dim=-1), torch.stack([h_n for _, h_n in runs])


def _backwards(T: int, lengths: Tensor | None) -> Tensor | None:
    """For every step of every row ``[T, B]``, the one that takes its place when the row is read from its end."""
    if lengths is None:
        return None
    steps = torch.arange(T)[:, None]
    return torch.where(steps < lengths, lengths - 1 - steps, steps)


def _take(values: Tensor, back: Tensor | None) -> Tensor:
    if back is None:
        return values.flip(0)
    return values.gather(0, back[(..., *(None,) * (values.dim() - 2))].expand_as(values))


def network(
    cell: str,
    input: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """All layers: what ``torch.gru`` and its sisters take and return."""
    y = input.transpose(0, 1) if batch_first else input
    each, D, final = 4 if has_biases else 2, 2 if bidirectional else 1, []
    for index in range(num_layers):
        if index and dropout and train:
            y = torch.nn.functional.dropout(y, dropout)
        groups = [params[k * each : (k + 1) * each] for k in range(index * D, (index + 1) * D)]
        weights: Any = (*zip(*groups, strict=True), [None] * D, [None] * D)[:4]
        w_ih, w_hh, b_ih, b_hh = weights
        y, h_n = layer(cell, y, w_ih, w_hh, b_ih, b_hh, h0[index * D : (index + 1) * D])
        final.append(h_n)
    h_n = final[0] if num_layers == 1 else torch.cat(final)
    return y.transpose(0, 1) if batch_first else y, h_n
