"""The recurrent loop in plain PyTorch: every dtype, every device, no kernel of our own.

At the sizes where a loop pays, a step costs the dispatch of its operations rather than their arithmetic. So a step
is one matrix product and a few in-place operations on views made once; what does not depend on the step before is
done for a chunk of steps at a time. A chunk is small enough for its buffers to stay in the cache, and the buffers
serve every chunk. Half precision is computed in fp32, with h rounded wherever it is stored.

Nothing here records a graph or waits for a device. Letters: T time, B batch, H hidden, P output width (H, or
``proj_size``), G gates, S saved values per hidden unit, D directions, C steps in a chunk.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .steps import STEPS

_CHUNK_STEPS = 32  # more steps would not hide more overhead
_CHUNK_VALUES = {"cpu": 1 << 17}  # pre-activations of a chunk: 512 KiB of fp32, half of a common L2 cache
_CHUNK_VALUES_ELSEWHERE = 1 << 24  # a GPU wants few, large launches


class _Masks:
    """The exceptions: rows that a step resets, or that have ended. Per step, a value for each row ``[T, B, 1]``.

    Zeros are made by AND with a mask of bits: as fast as a product, which would let NaN through.
    """

    def __init__(self, reset: Tensor | None, lengths: Tensor | None, T: int, wide: torch.dtype) -> None:
        self.bits = torch.int64 if wide == torch.float64 else torch.int32
        self.begins = self.pads = self.resets = [False] * T  # for each step, whether any row is concerned
        if lengths is not None:
            self.lengths = lengths
            steps = torch.arange(T, device=lengths.device)[:, None, None]
            pad = steps >= lengths[:, None]
            self.begin = steps == lengths[:, None] - 1  # where the backward direction starts
            self.pad = pad.to(wide)
            self.pad_bits = pad.to(self.bits) - 1
            self.begins, self.pads = _present(self.begin), _present(pad)
        if reset is not None:
            reset = reset[:, :, None] if lengths is None else reset[:, :, None] & ~pad
            self.reset_bits = reset.to(self.bits) - 1
            self.resets = _present(reset)

    def zero_padding(self, values: Tensor, steps: slice) -> None:
        """In place, in values ``[C, B, N]`` of the wide dtype."""
        if any(self.pads[steps]):
            values.view(self.bits).bitwise_and_(self.pad_bits[steps])

    def last(self, states: Tensor, initial: Tensor, backwards: bool) -> Tensor:
        """From the states ``[T, B, N]`` of every step, with lengths: each row's final one."""
        at = (self.lengths - 1).clamp_min_(0) * (not backwards)
        rows = torch.arange(len(at), device=at.device)
        return torch.where(self.lengths[:, None] == 0, initial, states[at, rows])


def _present(mask: Tensor) -> list[bool]:
    """For each step, whether any row is set. Only on the CPU may Python look; elsewhere every step may have one."""
    if mask.device.type != "cpu":
        return [True] * len(mask)
    return mask.flatten(1).any(1).tolist()


def _chunks(C: int, T: int, descending: bool) -> Iterator[tuple[slice, range]]:
    """Cut T steps into chunks of C: the steps of each, and the order in which to take them, from the chunk's start."""
    starts = range(0, T, C)
    for start in reversed(starts) if descending else starts:
        steps = range(min(C, T - start))
        yield slice(start, start + len(steps)), steps[::-1] if descending else steps


def _chunk_size(x: Tensor) -> int:
    T, B, _, GH = x.shape
    values = _CHUNK_VALUES.get(x.device.type, _CHUNK_VALUES_ELSEWHERE)
    return max(1, min(_CHUNK_STEPS, T, values // max(1, B * GH)))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def sequence_forward(
    cell: str,
    x: Tensor,  # [T, B, D, G*H]  input gates, biases included
    w_hh: Tensor,  # [D, G*H, P]
    b_hh: Tensor | None,  # [D, G*H], of a cell that keeps its recurrent gates apart
    w_hr: Tensor | None,  # [D, P, H]
    h0: Tensor,  # [D, B, P]
    c0: Tensor | None,  # [D, B, H]
    reset: Tensor | None,  # [T, B] bool
    lengths: Tensor | None,  # [B] int64
    *,
    save: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run one layer: y ``[T, B, D, P]``, h_n, c_n, cells ``[T, B, D, H]`` and, if ``save``, gates ``[T, B, D, S, H]``.

    ``allow_tf32`` is for the kernels; matrix products here obey torch's own switch.
    """
    step = STEPS[cell]
    T, B, D, GH = x.shape
    P, H = w_hh.shape[2], GH // step.gates
    wide = _wide_dtype(x)
    y = x.new_empty(T, B, D, P)
    cells = x.new_empty(T, B, D, H, dtype=wide) if step.has_c else None
    gates = x.new_empty(T, B, D, step.saved, H) if save else None
    masks = _Masks(reset, lengths, T, wide)

    C = _chunk_size(x)
    product = x.new_empty(C, B, step.gates, H, dtype=wide)
    spare, c_new = (x.new_empty(C, B, H, dtype=wide) for _ in range(2))
    h_new = x.new_empty(C, B, P, dtype=wide)
    wide_h = h_new if w_hr is None else torch.empty_like(spare)  # before the projection
    rounded = None if x.dtype == wide else x.new_empty(B, P)
    views, products = step.views(product, spare), product.flatten(2).unbind()
    h_at, wide_h_at, c_at = h_new.unbind(), wide_h.unbind(), c_new.unbind()
    h_n, c_n = [], []
    if reset is not None:
        h_read, c_read = torch.empty_like(h_new[0]), torch.empty_like(c_new[0])
        h_read_bits, c_read_bits = h_read.view(masks.bits), c_read.view(masks.bits)

    for d in range(D):
        w = w_hh[d].to(wide).t()
        w_out = None if w_hr is None else w_hr[d].to(wide).t()
        bias = None if b_hh is None else b_hh[d].to(wide)
        h = h_first = h0[d].to(wide)
        c = c_first = h if c0 is None else c0[d].to(wide)
        for steps, order in _chunks(C, T, descending=d == 1):
            n = len(order)
            inputs = list(step.inputs(x[steps, :, d].to(wide), bias))
            for k in order:
                t = steps.start + k
                if d == 1 and masks.begins[t]:
                    h = torch.where(masks.begin[t], h_first, h)
                    c = torch.where(masks.begin[t], c_first, c) if step.has_c else c
                if masks.resets[t]:
                    stays = masks.reset_bits[t]
                    torch.bitwise_and(h.view(masks.bits), stays, out=h_read_bits)
                    h = h_read
                    if step.has_c:
                        torch.bitwise_and(c.view(masks.bits), stays, out=c_read_bits)
                        c = c_read
                torch.addmm(inputs[k][0], h, w, out=products[k])
                step.forward(views[k], inputs[k], h, c, wide_h_at[k], c_at[k])
                h, c = h_at[k], c_at[k]
                if w_out is not None:
                    torch.mm(wide_h_at[k], w_out, out=h)
                if rounded is not None:
                    h.copy_(rounded.copy_(h))
            masks.zero_padding(h_new[:n], steps)
            y[steps, :, d].copy_(h_new[:n])
            if cells is not None:
                masks.zero_padding(c_new[:n], steps)
                cells[steps, :, d].copy_(c_new[:n])
            if gates is not None:
                step.save(product[:n], spare[:n], h_new[:n], gates[steps, :, d])
        if lengths is not None and T > 0:
            h = masks.last(y[:, :, d], h0[d], backwards=d == 1)
            c = c if cells is None else masks.last(cells[:, :, d], c_first, backwards=d == 1)
        h_n.append(h.to(x.dtype, copy=True))
        c_n.append(c.to(x.dtype, copy=True))
    return y, torch.stack(h_n), torch.stack(c_n) if step.has_c else None, cells, gates


def sequence_backward(
    cell: str,
    dy: Tensor,  # [T, B, D, P]
    dh_n: Tensor,  # [D, B, P]
    dc_n: Tensor | None,  # [D, B, H]
    dcells: Tensor | None,  # [T, B, D, H]
    gates: Tensor,  # [T, B, D, S, H]
    cells: Tensor | None,  # [T, B, D, H]
    h_prev: Tensor,  # [T, B, D, P]  the state each step read
    c_prev: Tensor | None,  # [T, B, D, H]
    w_hh: Tensor,  # [D, G*H, P]
    w_hr: Tensor | None,  # [D, P, H]
    reset: Tensor | None,  # [T, B] bool
    lengths: Tensor | None,  # [B] int64
    *,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of input gates and recurrent gates ``[T, B, D, G*H]`` (one tensor, unless the cell tells them
    apart), of every projected h ``[T, B, D, P]`` (with ``w_hr``), and of h0 and c0.
    """
    step = STEPS[cell]
    T, B, D, P = dy.shape
    GH, H = w_hh.shape[1], gates.shape[4]
    wide = _wide_dtype(dy)
    dh_gates = dy.new_empty(T, B, D, GH)
    dx = torch.empty_like(dh_gates) if step.splits else dh_gates
    dproj = None if w_hr is None else torch.empty_like(dy)
    masks = _Masks(reset, lengths, T, wide)

    C = _chunk_size(dh_gates)
    factors = dy.new_empty(C, B, step.gates, H, dtype=wide)
    extra = H if step.has_c or step.keeps_h else 0
    via, keep = (dy.new_empty(C, B, extra, dtype=wide) for _ in range(2))
    dh = dy.new_empty(C, B, P, dtype=wide)  # of the h that y holds
    dh_wide = dh if w_hr is None else dy.new_empty(C, B, H, dtype=wide)  # of h before the projection
    views, dgates_at = step.backward_views(factors, via, keep), factors.flatten(2).unbind()
    dh_at, dh_wide_at, dh_rows = dh.unbind(), dh_wide.unbind(), dh_wide.unsqueeze(2).unbind()
    keep_at: Sequence[Tensor] = keep.unbind() if step.keeps_h else ()
    dh0, dc0 = [], []

    for d in range(D):
        w = w_hh[d].to(wide)
        w_out = None if w_hr is None else w_hr[d].to(wide)
        carry = dh_n[d].to(wide, copy=True)
        carry_bits = carry.view(masks.bits)
        dc = carry[:, :0] if dc_n is None else dc_n[d].to(wide, copy=True)
        dc_rows = dc.unsqueeze(1)
        for steps, order in _chunks(C, T, descending=d == 0):
            n = len(order)
            padded = any(masks.pads[steps])
            dy_chunk = dy[steps, :, d].to(wide, copy=padded)
            dcells_chunk = None
            if dcells is not None:
                dcells_chunk = dcells[steps, :, d].to(wide, copy=padded)
            c = () if c_prev is None or cells is None else (c_prev[steps, :, d], cells[steps, :, d])
            step.derive(
                factors[:n],
                via[:n],
                keep[:n],
                gates[steps, :, d].to(wide),
                h_prev[steps, :, d].to(wide),
                c,
            )
            if any(masks.resets[steps]):
                keep[:n].view(masks.bits).bitwise_and_(masks.reset_bits[steps])
            masks.zero_padding(factors[:n].flatten(2), steps)
            masks.zero_padding(dy_chunk, steps)
            if dcells_chunk is not None:
                masks.zero_padding(dcells_chunk, steps)
            if extra and padded:
                masks.zero_padding(via[:n], steps)
                masks.zero_padding(keep[:n], steps)
                keep[:n].add_(masks.pad[steps])
            dy_at = dy_chunk.unbind()
            dcells_at = None if dcells_chunk is None else dcells_chunk.unbind()
            for k in order:
                t = steps.start + k
                torch.add(carry, dy_at[k], out=dh_at[k])
                if w_out is not None:
                    torch.mm(dh_at[k], w_out, out=dh_wide_at[k])
                if dcells_at is not None:
                    dc.add_(dcells_at[k])
                step.backward(views[k], dh_rows[k], dc_rows)
                torch.mm(dgates_at[k], w, out=carry)
                if masks.resets[t]:
                    carry_bits.bitwise_and_(masks.reset_bits[t])
                if step.keeps_h:
                    carry.addcmul_(dh_at[k], keep_at[k])
                elif masks.pads[t]:
                    carry.addcmul_(dh_at[k], masks.pad[t])
            dh_gates[steps, :, d].copy_(factors[:n].flatten(2))
            if step.splits:
                step.input_gradient(factors[:n], via[:n], dh[:n], dx[steps, :, d].unflatten(2, (step.gates, H)))
            if dproj is not None:
                masks.zero_padding(dh[:n], steps)
                dproj[steps, :, d].copy_(dh[:n])
        dh0.append(carry.to(dy.dtype))
        dc0.append(dc.to(dy.dtype))
    return dx, dh_gates, dproj, torch.stack(dh0), None if dc_n is None else torch.stack(dc0)


def step_gates(cell: str, x: Tensor, h: Tensor, c_prev: Tensor | None) -> Tensor:
    """The gates ``[N, S, H]`` of independent steps, from input gates and recurrent gates ``[N, G*H]``."""
    step, wide = STEPS[cell], _wide_dtype(x)
    gates = step.activate(*(v.to(wide).unflatten(1, (step.gates, -1)) for v in (x, h)))
    return gates.to(x.dtype)
