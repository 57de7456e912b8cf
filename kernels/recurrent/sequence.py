"""A whole sequence of a recurrent layer, forward and backward.

The kernels here keep the recurrent weight resident: a program loads all of it before the loop over time and walks its
rows of the batch through every step alone; nothing is synchronised. Other sizes run ``stepwise``; ``plan`` decides.

Tiles are transposed, ``[BLOCK_H, BLOCK_B]``: the weight is the left operand of every product, which may stay in
registers, and the batch is on the side that the matrix units pad least.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import (
    NAMES,
    OPTIONS,
    cast_tiles,
    configuration,
    dot,
    keep_tiles,
    load_tiles,
    on_device,
    row_of,
    select_tiles,
    store_tiles,
    time_of,
)
from ..limits import LIMITS, Limits, limits
from .plan import DTYPES, Plan, plan, repeats
from .plan import unsupported as unsupported
from .pointwise import step_gates as step_gates
from .steps import STEPS, Step
from .stepwise import stepwise_backward, stepwise_forward


@triton.jit
def recurrent_gates(w, bias, state, dtype: tl.constexpr, PRECISION: tl.constexpr):
    gates = ()
    operand = state.to(dtype)
    for g in tl.static_range(len(w)):
        gate = dot(w[g], operand, tl.zeros_like(state), PRECISION)
        if len(bias) > 0:
            gate += bias[g]
        gates = gates + (gate,)
    return gates


@triton.jit(do_not_specialize=["T", "B"])
def sequence_forward_kernel(
    x_ptr,  # [T, B, D, G, H]   input gates
    w_ptr,  # [D, G, H, H]      recurrent weight
    bias_ptr,  # [D, G, H]      recurrent bias, or None
    h0_ptr,  # [D, B, H]
    c0_ptr,  # [D, B, H]        or None: a cell without c
    reset_ptr,  # [T, B]        or None
    lengths_ptr,  # [B]         or None
    y_ptr,  # [T, B, D, H]      output
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [D, B, H]       or None, with c0
    cells_ptr,  # [T, B, D, H]  every c, or None, with c0
    gates_ptr,  # [T, B, D, S, H]  what backward needs, or None
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_B
    d = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)[:, None]
    k = tl.arange(0, BLOCK_H)[None, :]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (h < H) & mask_b
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty

    w = load_tiles(w_ptr + d * (G * H * H), h * H + k, (h < H) & (k < H), G, H * H)
    bias = ()
    if bias_ptr is not None:
        bias = cast_tiles(load_tiles(bias_ptr + d * (G * H), h, h < H, G, H), tl.float32)
    initial = (B.to(tl.int64) * d + start) * H
    state = (tl.load(h0_ptr + initial + b * H + h, mask=mask, other=0.0).to(tl.float32),)
    if c0_ptr is not None:
        state = state + (tl.load(c0_ptr + initial + b * H + h, mask=mask, other=0.0).to(tl.float32),)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    t = time_of(0, T, d)
    x = load_tiles(x_ptr + row_of(t, start, d, B, D) * (G * H), b * (D * G * H) + h, mask, G, H)
    reset = mask_b
    if reset_ptr is not None:
        reset = tl.load(reset_ptr + B.to(tl.int64) * t + start + b, mask=mask_b, other=0)
    for s in range(T):
        t = time_of(s, T, d)
        row = row_of(t, start, d, B, D)
        # The next step's reads begin before this step's chain of products; the last step reads its own again.
        t_next = time_of(tl.minimum(s + 1, T - 1), T, d)
        row_next = row_of(t_next, start, d, B, D)
        x_next = load_tiles(x_ptr + row_next * (G * H), b * (D * G * H) + h, mask, G, H)
        reset_next = mask_b
        read = state
        if reset_ptr is not None:
            reset_next = tl.load(reset_ptr + B.to(tl.int64) * t_next + start + b, mask=mask_b, other=0)
            read = keep_tiles(reset == 0, state)

        gates, new = STEP(cast_tiles(x, tl.float32), recurrent_gates(w, bias, read[0], DTYPE, PRECISION), read)

        if lengths_ptr is not None:
            alive = t < length
            state = select_tiles(alive, new, state)
            new = keep_tiles(alive, new)
        else:
            state = new
        tl.store(y_ptr + row * H + b * (D * H) + h, new[0].to(y_ptr.dtype.element_ty), mask=mask)
        if cells_ptr is not None:
            tl.store(cells_ptr + row * H + b * (D * H) + h, new[1], mask=mask)
        if gates_ptr is not None:
            store_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, gates, mask, H)
        x = x_next
        reset = reset_next

    tl.store(h_n_ptr + initial + b * H + h, state[0].to(h_n_ptr.dtype.element_ty), mask=mask)
    if c_n_ptr is not None:
        tl.store(c_n_ptr + initial + b * H + h, state[1].to(c_n_ptr.dtype.element_ty), mask=mask)


@triton.jit
def arriving(
    dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row, b, h, mask,
    D: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """What backward reads at one step: the gradients of its outputs, the saved gates, and ``kept``."""
    in_row = b * (D * H) + h
    dout = load_tiles(dy_ptr + row * H, in_row, mask, 1, 0)
    if dcells_ptr is not None:
        dout = dout + load_tiles(dcells_ptr + row * H, in_row, mask, 1, 0)
    saved = load_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, mask, S, H)
    kept = ()
    if h_prev_ptr is not None:
        kept = kept + load_tiles(h_prev_ptr + row * H, in_row, mask, 1, 0)
    if c_prev_ptr is not None:
        kept = kept + load_tiles(c_prev_ptr + row * H, in_row, mask, 1, 0)
        kept = kept + load_tiles(cells_ptr + row * H, in_row, mask, 1, 0)
    return dout, saved, kept


@triton.jit(do_not_specialize=["T", "B"])
def sequence_backward_kernel(
    dy_ptr,  # [T, B, D, H]      gradient of the output
    dh_n_ptr,  # [D, B, H]
    dc_n_ptr,  # [D, B, H]       or None: a cell without c
    dcells_ptr,  # [T, B, D, H]  gradient of every c, or None
    gates_ptr,  # [T, B, D, S, H]  what forward saved
    cells_ptr,  # [T, B, D, H]   every c, or None, with dc_n
    h_prev_ptr,  # [T, B, D, H]  the h that each step read, or None: the cell does not need it
    c_prev_ptr,  # [T, B, D, H]  the c that each step read, or None, with dc_n
    w_ptr,  # [D, G, H, H]       recurrent weight
    reset_ptr,  # [T, B]         or None
    lengths_ptr,  # [B]          or None
    dx_ptr,  # [T, B, D, G, H]   gradient of the input gates
    dh_ptr,  # [T, B, D, G, H]   gradient of the recurrent gates, or None: the same
    dh0_ptr,  # [D, B, H]
    dc0_ptr,  # [D, B, H]        or None, with dc_n
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_B
    d = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)[:, None]
    k = tl.arange(0, BLOCK_H)[None, :]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (h < H) & mask_b
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty

    w = load_tiles(w_ptr + d * (G * H * H), k * H + h, (h < H) & (k < H), G, H * H)  # transposed
    initial = (B.to(tl.int64) * d + start) * H
    dstate = (tl.load(dh_n_ptr + initial + b * H + h, mask=mask, other=0.0).to(tl.float32),)
    if dc_n_ptr is not None:
        dstate = dstate + (tl.load(dc_n_ptr + initial + b * H + h, mask=mask, other=0.0).to(tl.float32),)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    t = time_of(T - 1, T, d)
    row = row_of(t, start, d, B, D)
    dout, saved, kept = arriving(
        dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row, b, h, mask, D, S, H
    )  # fmt: skip
    for s in range(T):
        t = time_of(T - 1 - s, T, d)
        row = row_of(t, start, d, B, D)
        row_next = row_of(time_of(tl.maximum(T - 2 - s, 0), T, d), start, d, B, D)
        dout_next, saved_next, kept_next = arriving(
            dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row_next, b, h, mask, D, S, H
        )  # fmt: skip

        dafter = (dstate[0] + dout[0].to(tl.float32),)
        if dcells_ptr is not None:
            dafter = dafter + (dstate[1] + dout[1],)
        else:
            dafter = dafter + dstate[1:]
        dx, dh, dbefore = STEP(cast_tiles(saved, tl.float32), cast_tiles(kept, tl.float32), dafter)
        if lengths_ptr is not None:
            alive = t < length
            dx = keep_tiles(alive, dx)
            dh = keep_tiles(alive, dh)
        store_tiles(dx_ptr + row * (G * H), b * (D * G * H) + h, dx, mask, H)
        if dh_ptr is not None:
            store_tiles(dh_ptr + row * (G * H), b * (D * G * H) + h, dh, mask, H)

        through = dbefore[0]
        for g in tl.static_range(G):
            through = dot(w[g], dh[g].to(DTYPE), through, PRECISION)
        dbefore = (through,) + dbefore[1:]
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + B.to(tl.int64) * t + start + b, mask=mask_b, other=0)
            dbefore = keep_tiles(reset == 0, dbefore)
        if lengths_ptr is not None:
            dbefore = select_tiles(alive, dbefore, dstate)
        dstate = dbefore
        dout = dout_next
        saved = saved_next
        kept = kept_next

    tl.store(dh0_ptr + initial + b * H + h, dstate[0].to(dh0_ptr.dtype.element_ty), mask=mask)
    if dc0_ptr is not None:
        tl.store(dc0_ptr + initial + b * H + h, dstate[1].to(dc0_ptr.dtype.element_ty), mask=mask)


@on_device
def sequence_forward(
    cell: str,
    x: Tensor,  # [T, B, D, G*H]  input gates
    w_hh: Tensor,  # [D, G*H, P]
    b_hh: Tensor | None,  # [D, G*H]
    w_hr: Tensor | None,  # [D, P, H]
    h0: Tensor,  # [D, B, P]
    c0: Tensor | None,  # [D, B, H]
    reset: Tensor | None,  # [T, B]
    lengths: Tensor | None,  # [B]
    *,
    save: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer over a sequence; every tensor contiguous, every ``[T, B, D, ...]`` in the order of time.

    Returns y ``[T, B, D, P]``, h_n ``[D, B, P]``, c_n ``[D, B, H]`` and cells ``[T, B, D, H]`` (None without c)
    and, with ``save``, the gates ``[T, B, D, S, H]`` that ``sequence_backward`` reads.
    """
    step, how = STEPS[cell], plan_for(cell, x, w_hh, w_hr, allow_tf32)
    if how.regime == "stepwise":
        return stepwise_forward(cell, x, w_hh, b_hh, w_hr, h0, c0, reset, lengths, save)
    T, B, D, _ = x.shape
    H = w_hh.shape[2]
    like = {"dtype": x.dtype, "device": x.device}
    y = torch.empty(T, B, D, H, **like)
    h_n = torch.empty_like(h0)
    c_n = None if c0 is None else torch.empty_like(c0)
    cells = None if c0 is None else torch.empty(T, B, D, H, dtype=torch.float32, device=x.device)
    gates = torch.empty(T, B, D, step.saved, H, **like) if save else None
    sequence_forward_kernel[triton.cdiv(B, how.block_b), D](
        x_ptr=x, w_ptr=w_hh, bias_ptr=b_hh, h0_ptr=h0, c0_ptr=c0, reset_ptr=reset, lengths_ptr=lengths,
        y_ptr=y, h_n_ptr=h_n, c_n_ptr=c_n, cells_ptr=cells, gates_ptr=gates, T=T, B=B,
        **constants(step, step.forward, how, D, H), num_warps=how.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return y, h_n, c_n, cells, gates


@on_device
def sequence_backward(
    cell: str,
    dy: Tensor,  # [T, B, D, P]
    dh_n: Tensor,  # [D, B, P]
    dc_n: Tensor | None,  # [D, B, H]
    dcells: Tensor | None,  # [T, B, D, H]
    gates: Tensor,  # [T, B, D, S, H]
    cells: Tensor | None,  # [T, B, D, H]
    h_prev: Tensor,  # [T, B, D, P]
    c_prev: Tensor | None,  # [T, B, D, H]
    w_hh: Tensor,  # [D, G*H, P]
    w_hr: Tensor | None,  # [D, P, H]
    reset: Tensor | None,  # [T, B]
    lengths: Tensor | None,  # [B]
    *,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """The gradients that need the loop over time; those of the weights are products of what this returns.

    h_prev and c_prev are the states each step read. Returns the gradients of the input gates and of the
    recurrent gates ``[T, B, D, G*H]`` (one tensor unless the cell splits them), of the projection's product
    ``[T, B, D, P]`` or None, of h0 and of c0.
    """
    step, how = STEPS[cell], plan_for(cell, dy, w_hh, w_hr, allow_tf32)
    if how.regime == "stepwise":
        return stepwise_backward(
            cell, dy, dh_n, dc_n, dcells, gates, cells, h_prev, c_prev, w_hh, w_hr, reset, lengths
        )  # fmt: skip
    T, B, D, H = dy.shape
    dx = torch.empty(T, B, D, step.gates * H, dtype=dy.dtype, device=dy.device)
    dh = torch.empty_like(dx) if step.splits else None
    dh0 = torch.empty_like(dh_n)
    dc0 = None if dc_n is None else torch.empty_like(dc_n)
    sequence_backward_kernel[triton.cdiv(B, how.block_b), D](
        dy_ptr=dy, dh_n_ptr=dh_n, dc_n_ptr=dc_n, dcells_ptr=dcells, gates_ptr=gates, cells_ptr=cells,
        h_prev_ptr=h_prev if step.reads_h else None, c_prev_ptr=c_prev, w_ptr=w_hh, reset_ptr=reset,
        lengths_ptr=lengths, dx_ptr=dx, dh_ptr=dh, dh0_ptr=dh0, dc0_ptr=dc0, T=T, B=B,
        **constants(step, step.backward, how, D, H), num_warps=how.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return dx, dx if dh is None else dh, None, dh0, dc0


def plan_for(cell: str, x: Tensor, w_hh: Tensor, w_hr: Tensor | None, allow_tf32: bool) -> Plan:
    """The plan of a call."""
    P = w_hh.shape[2]
    H = P if w_hr is None else w_hr.shape[2]
    return plan(cell, H, P, x.dtype, allow_tf32, limits(x.device))


def constants(step: Step, function: triton.JITFunction, how: Plan, D: int, H: int) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    return {
        "D": D,
        "G": step.gates,
        "S": step.saved,
        "H": H,
        "STEP": function,
        "BLOCK_B": how.block_b,
        "BLOCK_H": how.block_h,
        "PRECISION": how.precision,
    }


def configurations(limits: Limits = LIMITS["sm_90"]) -> Iterator[dict[str, Any]]:
    """The ways in which a device of these limits runs the resident kernels: every plan, plain and with everything."""
    sizes = (64, 100, 128, 256)
    for (cell, step), H, dtype, allow_tf32 in itertools.product(STEPS.items(), sizes, DTYPES, (True, False)):
        if repeats(cell, dtype) and H != 64:
            continue
        how = plan(cell, H, H, dtype, allow_tf32, limits)
        if how.regime != "resident" or (allow_tf32 and how.precision == "ieee"):
            continue
        c, c32 = (dtype, torch.float32) if step.has_c else (None, None)
        for all_options in (False, True):
            D = 2 if all_options else 1
            name = f"{cell} H={H} {NAMES[dtype]} {how.precision}{' all options' if all_options else ''}"
            masks = {
                "reset_ptr": torch.bool if all_options else None,
                "lengths_ptr": torch.int64 if all_options else None,
            }
            forward = masks | {
                "x_ptr": dtype,
                "w_ptr": dtype,
                "bias_ptr": dtype if step.splits else None,
                "h0_ptr": dtype,
                "c0_ptr": c,
                "y_ptr": dtype,
                "h_n_ptr": dtype,
                "c_n_ptr": c,
                "cells_ptr": c32,
                "gates_ptr": dtype if all_options else None,
            }
            backward = masks | {
                "dy_ptr": dtype,
                "dh_n_ptr": dtype,
                "dc_n_ptr": c,
                "dcells_ptr": c32 if all_options else None,
                "gates_ptr": dtype,
                "cells_ptr": c32,
                "h_prev_ptr": dtype if step.reads_h else None,
                "c_prev_ptr": c32,
                "w_ptr": dtype,
                "dx_ptr": dtype,
                "dh_ptr": dtype if step.splits else None,
                "dh0_ptr": dtype,
                "dc0_ptr": c,
            }
            yield configuration(
                f"sequence forward {name}", sequence_forward_kernel, forward,
                constants(step, step.forward, how, D, H), how.num_warps,
            )  # fmt: skip
            yield configuration(
                f"sequence backward {name}", sequence_backward_kernel, backward,
                constants(step, step.backward, how, D, H), how.num_warps,
            )  # fmt: skip
