"""LSTM with lengths and resets on a CPU through oneDNN, whose operator knows neither.

``torch.nn.LSTM`` runs there at the speed of its matrix products as long as its input is padded. Two constant columns
beside the input hold gates open or shut at the steps they mark, beyond what a sigmoid tells from 0 or 1. Where a row
has ended, i and o are shut and f is open: the cell stays as it is, bit by bit, and no gradient enters. Where a row is
reset, a step is put in at which all three are shut: h and c are zero, and no gradient passes. What is read from its
end is turned round row by row, so that the operator only ever runs forward.

Letters: T time, B batch, I input, H hidden, S slots: the operator's steps, those put in among them.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import recurrent as reference
from .library import differentiated, needs_gradient

_SHUT = 1e4
_STEP = 6  # rows whose products cost what a step costs besides, whatever the hidden size
_LSTM = 2  # the operator's number for the cell


@dataclass(frozen=True)
class Slots:
    """Where the steps of every row go, in one direction.

    Rows of similar length run together, as groups of slots ``[S, n]``, which lie one after the other: N slots in all.
    """

    order: Tensor  # [B]: the rows, group by group
    groups: list[tuple[int, int]]  # S and n of each
    marks: Tensor  # [N, 2]: a reset; a row that has ended
    steps: Tensor | None  # which steps of [T*B] are not behind an end; None if all
    rows: Tensor  # the slots of those
    every: Tensor  # [T*B]: the slot of each step, any slot for those behind an end
    ends: Tensor  # [B]: the slot of each row's last step
    empty: Tensor  # [B, 1]: whether it has no steps
    behind: Tensor | None  # [T, B, 1]: which steps are behind an end; None if none

    @classmethod
    def of(cls, T: int, B: int, reset: Tensor | None, lengths: Tensor | None, backwards: bool) -> "Slots":
        """reset ``[T, B]`` bool, lengths ``[B]``."""
        at, batch, behind = torch.arange(T)[:, None].expand(T, B), torch.arange(B), None
        if lengths is None:
            lengths = torch.full((B,), T)
        else:
            behind = at >= lengths
            reset = None if reset is None else reset & ~behind
        at = lengths - 1 - at if backwards else at
        inserted = torch.zeros_like(lengths)
        if reset is not None:
            resets = reset.flip(0).cumsum(0).flip(0) if backwards else reset.cumsum(0)
            at, inserted = at + resets, resets[0] if backwards else resets[-1]
        needed = lengths + inserted
        order, groups, width = _grouped(needed)
        place = torch.empty_like(order).index_copy_(0, order, batch)
        begins, total = [], 0
        for S, n in groups:
            begins.append(total)
            total += S * n
        of_group = torch.tensor([[begin, n] for begin, (_, n) in zip(begins, groups, strict=True)])
        begin, stride = of_group[place // width].unbind(1)
        begin = begin + place % width
        every = (begin + at * stride).flatten()
        steps, rows = None, every
        if behind is not None:
            steps = (~behind).flatten().nonzero()[:, 0]
            rows = every[steps]
            every = every.masked_fill(behind.flatten(), 0)
        marks = torch.zeros(total, 2)
        ends = [
            (torch.arange(S)[:, None] >= rest).flatten()
            for (S, _), rest in zip(groups, needed[order].split(width), strict=True)
        ]
        marks[:, 1] = ended = torch.cat(ends)
        if reset is not None:
            marks[:, 0] = torch.ones(total).index_fill_(0, rows, 0.0).masked_fill_(ended, 0.0)
        return cls(
            order, groups, marks, steps, rows, every,
            ends=begin + (needed - 1).clamp_min(0) * stride,
            empty=(lengths == 0)[:, None],
            behind=None if behind is None else behind[:, :, None],
        )  # fmt: skip

    def put(self, values: Tensor, width: int) -> Tensor:
        """Steps ``[T, B, M]`` as slots ``[N, width]``, the rest zeros."""
        flat = values.reshape(-1, values.shape[2])
        if self.steps is not None:
            flat = flat.index_select(0, self.steps)
        slots = values.new_zeros(len(self.marks), width)
        slots[:, : values.shape[2]].index_copy_(0, self.rows, flat)
        return slots

    def take(self, slots: Tensor, B: int) -> Tensor:
        """Slots ``[N, M]`` as steps ``[T, B, M]``, zero behind the ends."""
        steps = slots.new_empty(len(self.every) // B, B, slots.shape[1])
        torch.index_select(slots, 0, self.every, out=steps.flatten(0, 1))
        return steps if self.behind is None else steps.masked_fill_(self.behind, 0)

    def each(self, *slots: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """For each group: where its rows are in ``order``, and its slots ``[S, n, M]``."""
        begin = row = 0
        for S, n in self.groups:
            yield slice(row, row + n), [values[begin : begin + S * n].view(S, n, -1) for values in slots]
            begin, row = begin + S * n, row + n


def _grouped(needed: Tensor) -> tuple[Tensor, list[tuple[int, int]], int]:
    """Rows in order of the slots they need; groups (S, n) of them; and how many rows all groups but the last have."""
    B, best = len(needed), None
    longest, order = needed.sort(descending=True)
    slots = longest.clamp_min(1).tolist()
    for width in {B, (B + 1) // 2, (B + 3) // 4}:
        groups = [(slots[row], min(width, B - row)) for row in range(0, B, max(1, width))]
        cost = sum(S * (n + _STEP) for S, n in groups)
        if best is None or cost < best[0]:
            best = cost, groups, width
    assert best is not None
    return order, *best[1:]


def refusal(*tensors: Tensor) -> str | None:
    """Why oneDNN cannot run an LSTM layer; None if it can."""
    if any(t.dtype != torch.float32 for t in tensors):
        return "it computes in float32 only"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN"
    return None


class Padded(torch.autograd.Function):
    """One layer in one direction: y ``[T, B, H]``, h_n and c_n ``[B, H]``.

    Takes ``(wanted, backwards, reset, lengths, slots, input, h0, c0, w_ih, w_hh, b_ih, b_hh)``, of which ``wanted``
    says whether a gradient will be; behind a row's end the input is finite.
    """

    @staticmethod
    def forward(ctx: Any, wanted: bool, backwards: bool, reset: Any, lengths: Any, slots: Slots, *tensors: Any) -> Any:
        input, h0, c0, w_ih, w_hh, b_ih, b_hh = tensors
        (_, B, I), H = input.shape, w_hh.shape[1]  # noqa: E741  (the field's letter)
        x = slots.put(input, I + 3)
        x[:, I : I + 2] = slots.marks
        x[:, I + 2] = 1.0
        shut = w_ih.new_zeros(4, H, 2)
        shut[0] = shut[3] = shut[1, :, :1] = -_SHUT
        shut[1, :, 1] = _SHUT
        # The biases come as a weight of a column of ones: oneDNN adds their gradient up row by row, a product does not,
        # and errs several times less.
        bias = w_ih.new_zeros(4 * H) if b_ih is None else b_ih + b_hh
        w_in = torch.cat((w_ih, shut.view(4 * H, 2), bias[:, None]), 1)
        none = torch.zeros_like(bias)
        h, c = h0[slots.order], c0[slots.order]
        kept: list[Tensor] = []
        last = torch.empty_like(c)
        # The operator keeps what its gradient needs only while a graph is being recorded.
        with torch.set_grad_enabled(wanted), torch._C._AutoDispatchBelowAutograd():
            for at, (x_group,) in slots.each(x):
                found = torch.ops.aten.mkldnn_rnn_layer(
                    x_group, w_in, w_hh, none, none, h[None, at], c[None, at],
                    False, [], _LSTM, H, 1, True, False, False, wanted,
                )  # fmt: skip
                kept.extend(found if wanted else found[:1])
                last[at] = found[2][0]
        out = torch.cat([o.flatten(0, 1) for o in kept[:: 4 if wanted else 1]])
        ctx.setting = backwards, slots
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(reset, lengths, *tensors, x, w_in, none, h, c, *kept)
        h_n = torch.where(slots.empty, h0, out[slots.ends])
        return slots.take(out, B), h_n, torch.empty_like(c).index_copy_(0, slots.order, last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> Any:
        reset, lengths, *saved = ctx.saved_tensors
        tensors, (x, w_in, none, h, c), kept = saved[:7], saved[7:12], saved[12:]
        backwards, slots = ctx.setting
        if torch.is_grad_enabled():
            formula = functools.partial(_formula, backwards, reset, lengths)
            return *[None] * 5, *differentiated(formula, tensors, (dy, dh_n, dc_n))
        w_hh, (B, H), I = tensors[4], h.shape, x.shape[1] - 3  # noqa: E741  (the field's letter)
        dout = x.new_zeros(len(x), H) if dy is None else slots.put(dy, H)
        dh, dc = torch.zeros_like(h), torch.zeros_like(c)
        if dh_n is not None:
            dout.index_add_(0, slots.ends, dh_n.masked_fill(slots.empty, 0))
        if dc_n is not None:
            dc = dc_n[slots.order]
        dx, totals, states = torch.empty_like(x), None, []
        for g, (at, (x_group, dout_group, dx_group)) in enumerate(slots.each(x, dout, dx)):
            out, h_last, c_last, workspace = kept[4 * g : 4 * g + 4]
            of_x, *of_weights, _, _, of_h, of_c = torch.ops.aten.mkldnn_rnn_layer_backward(
                x_group, w_in, w_hh, none, none, h[None, at], c[None, at], out, h_last, c_last,
                dout_group, dh[None, at], dc[None, at],
                False, _LSTM, H, 1, True, True, False, [], False, workspace,
            )  # fmt: skip
            dx_group.copy_(of_x)
            states.append((of_h[0], of_c[0]))
            totals = of_weights if totals is None else [a.add_(b) for a, b in zip(totals, of_weights, strict=True)]
        dw_in, dw_hh = totals  # type: ignore[misc]
        db = dw_in[:, I + 2]
        dh0, dc0 = (torch.empty_like(h).index_copy_(0, slots.order, torch.cat(s)) for s in zip(*states, strict=True))
        if dh_n is not None:
            dh0 += dh_n.masked_fill(~slots.empty, 0)
        gradients = slots.take(dx, B)[:, :, :I], dh0, dc0, dw_in[:, :I], dw_hh, db, db.clone()
        needs = ctx.needs_input_grad[5:]
        return *[None] * 5, *(g if need else None for g, need in zip(gradients, needs, strict=True))


def _formula(
    backwards: bool, reset: Tensor | None, lengths: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the reference."""
    input, *rest = tensors
    copies = 2 if backwards else 1  # the reference reads backwards only in its second direction
    h0, c0, *weights = (None if t is None else t.expand(copies, *t.shape) for t in rest)
    given: Any = ("lstm", input, *weights, None, h0, c0)
    masks: Any = {"reset": reset, "lengths": lengths}
    y, h_n, c_n, _ = reference.layer(*given, **masks)
    return y[:, :, -h_n.shape[-1] :], h_n[-1], c_n[-1]  # type: ignore[index]


def layer(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """One layer as ``fastseq.reference.recurrent.layer`` of an LSTM; None where a NaN might outlive a reset."""
    (T, B, _), runs = input.shape, []
    wanted = needs_gradient([input, w_ih, w_hh, b_ih, b_hh, h0, c0])
    for d in range(len(w_ih)):
        slots = Slots.of(T, B, reset, lengths, backwards=d == 1)
        weights = (None if w is None else w[d] for w in (w_ih, w_hh, b_ih, b_hh))
        run: Any = Padded.apply(wanted, d == 1, reset, lengths, slots, input, h0[d], c0[d], *weights)  # type: ignore[no-untyped-call]
        if reset is not None and not math.isfinite(run[0].detach().sum().item() + run[2].detach().sum().item()):
            return None
        runs.append(run)
    if len(runs) == 1:
        y, h_n, c_n = runs[0]
        return y, h_n[None], c_n[None]
    ys, hs, cs = zip(*runs, strict=True)
    return torch.cat(ys, dim=-1), torch.stack(hs), torch.stack(cs)
