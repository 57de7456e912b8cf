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
    add_tiles,
    arriving,
    cast_tiles,
    configuration,
    dot,
    initial_state,
    keep_tiles,
    load_tiles,
    on_device,
    row_of,
    select_tiles,
    staying,
    store_state,
    store_tiles,
    time_of,
    zone_out,
    zone_out_backward,
)
from ..limits import LIMITS, Limits, limits
from .persistent import persistent_backward, persistent_forward
from .plan import DTYPES, Plan, plan, repeats
from .plan import unsupported as unsupported
from .pointwise import step_gates as step_gates
from .pointwise import variants
from .steps import STEPS, STOCK, Step
from .stepwise import stepwise_backward, stepwise_forward


@triton.jit
def recurrent_gates(w, bias, operand, PRECISION: tl.constexpr):
    gates = ()
    for g in tl.static_range(len(w)):
        gate = dot(w[g], operand, tl.zeros([w[0].shape[0], operand.shape[1]], tl.float32), PRECISION)
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
    c0_ptr,  # [D, B, C, H]     or None: a cell that carries h alone
    params_ptr,  # [D, K, H]    the step's own parameters, or None
    scale_ptr,  # [D, B, H]     of h where it enters the product, or None
    stay_ptr,  # [T, B, D, N, H] bool, or [N] fp32: zoneout, or None
    reset_ptr,  # [T, B]        or None
    lengths_ptr,  # [B]         or None
    y_ptr,  # [T, B, D, H]      output
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [D, B, C, H]    or None, with c0
    cells_ptr,  # [T, B, D, C, H]  every step's, or None, with c0
    gates_ptr,  # [T, B, D, S, H]  what backward needs, or None
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
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
    params = ()
    if params_ptr is not None:
        params = cast_tiles(load_tiles(params_ptr + d * (K * H), h, h < H, K, H), tl.float32)
    first = B.to(tl.int64) * d + start
    state = initial_state(h0_ptr, c0_ptr, first, b, h, mask, C, H)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + first * H + b * H + h, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    t = time_of(0, T, d)
    row = row_of(t, start, d, B, D)
    x = load_tiles(x_ptr + row * (G * H), b * (D * G * H) + h, mask, G, H)
    stay = staying(stay_ptr, row, b, h, mask, D, C + 1, H)
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
        stay_next = staying(stay_ptr, row_next, b, h, mask, D, C + 1, H)
        reset_next = mask_b
        read = state
        if reset_ptr is not None:
            reset_next = tl.load(reset_ptr + B.to(tl.int64) * t_next + start + b, mask=mask_b, other=0)
            read = keep_tiles(reset == 0, state)
        operand = read[0]
        if scale_ptr is not None:
            operand = operand * scale

        recurrent = recurrent_gates(w, bias, operand.to(DTYPE), PRECISION)
        gates, new = STEP(cast_tiles(x, tl.float32), recurrent, read, params, H)

        if stay_ptr is not None:
            new = zone_out(stay, new, read)
        if lengths_ptr is not None:
            alive = t < length
            state = select_tiles(alive, new, state)
            new = keep_tiles(alive, new)
        else:
            state = new
        tl.store(y_ptr + row * H + b * (D * H) + h, new[0].to(y_ptr.dtype.element_ty), mask=mask)
        if cells_ptr is not None:
            store_tiles(cells_ptr + row * (C * H), b * (D * C * H) + h, new[1:], mask, H)
        if gates_ptr is not None:
            store_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, gates, mask, H)
        x = x_next
        stay = stay_next
        reset = reset_next

    store_state(h_n_ptr, c_n_ptr, first, b, h, state, mask, C, H)


@triton.jit
def add_pairs(totals, tiles):
    """Totals half as wide as the tiles: a thread holds two neighbours of a row, and registers are short."""
    sums = ()
    for n in tl.static_range(len(tiles)):
        pairs = tiles[n].reshape(tiles[n].shape[0], tiles[n].shape[1] // 2, 2)
        sums = sums + (totals[n] + tl.sum(pairs, axis=2),)
    return sums


@triton.jit(do_not_specialize=["T", "B"])
def sequence_backward_kernel(
    dy_ptr,  # [T, B, D, H]      gradient of the output
    dh_n_ptr,  # [D, B, H]
    dc_n_ptr,  # [D, B, C, H]    or None: a cell that carries h alone
    dcells_ptr,  # [T, B, D, C, H]  gradient of every step's, or None
    gates_ptr,  # [T, B, D, S, H]  what forward saved
    cells_ptr,  # [T, B, D, C, H]  the cells that each step left, or None, with dc_n
    h_prev_ptr,  # [T, B, D, H]  the h that each step read, or None: the step does not need it
    c_prev_ptr,  # [T, B, D, C, H]  the cells that each step read, or None, with dc_n
    w_ptr,  # [D, G, H, H]       recurrent weight
    params_ptr,  # [D, K, H]     the step's own parameters, or None
    scale_ptr,  # [D, B, H]      of h where it enters the product, or None
    stay_ptr,  # [T, B, D, N, H] bool, or [N] fp32: zoneout, or None
    reset_ptr,  # [T, B]         or None
    lengths_ptr,  # [B]          or None
    dx_ptr,  # [T, B, D, G, H]   gradient of the input gates
    dh_ptr,  # [T, B, D, G, H]   gradient of the recurrent gates, or None: the same
    dh0_ptr,  # [D, B, H]
    dc0_ptr,  # [D, B, C, H]     or None, with dc_n
    dparams_ptr,  # [blocks, D, K, H]  fp32, each program's sum over its rows and time, or None, with params
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
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
    total = ()  # of the parameters' gradients
    for _ in tl.static_range(K):
        total = total + (tl.zeros([BLOCK_H, BLOCK_B // 2], tl.float32),)
    first = B.to(tl.int64) * d + start
    dstate = initial_state(dh_n_ptr, dc_n_ptr, first, b, h, mask, C, H)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + first * H + b * H + h, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    t = time_of(T - 1, T, d)
    row = row_of(t, start, d, B, D)
    dout, saved, kept = arriving(
        dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row, b, h, mask, D, S, C, H
    )  # fmt: skip
    stay = staying(stay_ptr, row, b, h, mask, D, C + 1, H)
    for s in range(T):
        t = time_of(T - 1 - s, T, d)
        row = row_of(t, start, d, B, D)
        row_next = row_of(time_of(tl.maximum(T - 2 - s, 0), T, d), start, d, B, D)
        dout_next, saved_next, kept_next = arriving(
            dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row_next, b, h, mask, D, S, C, H
        )  # fmt: skip
        stay_next = staying(stay_ptr, row_next, b, h, mask, D, C + 1, H)

        dafter = (dstate[0] + dout[0].to(tl.float32),)
        if dcells_ptr is not None:
            dafter = dafter + add_tiles(dstate[1:], dout[1:])
        else:
            dafter = dafter + dstate[1:]
        around = ()  # the step, through zoneout
        if stay_ptr is not None:
            dafter, around = zone_out_backward(stay, dafter)
        params = ()  # read anew each step: registers are short
        if params_ptr is not None:
            params = cast_tiles(load_tiles(params_ptr + d * (K * H), h, h < H, K, H), tl.float32)
        dx, dh, dbefore, dparams = STEP(
            cast_tiles(saved, tl.float32), cast_tiles(kept, tl.float32), dafter, params, H
        )  # fmt: skip
        if stay_ptr is not None:
            dbefore = add_tiles(dbefore, around)
        if lengths_ptr is not None:
            alive = t < length
            dx = keep_tiles(alive, dx)
            dh = keep_tiles(alive, dh)
            dparams = keep_tiles(alive, dparams)
        total = add_pairs(total, dparams)
        store_tiles(dx_ptr + row * (G * H), b * (D * G * H) + h, dx, mask, H)
        if dh_ptr is not None:
            store_tiles(dh_ptr + row * (G * H), b * (D * G * H) + h, dh, mask, H)

        through = dbefore[0]
        if scale_ptr is not None:
            through = tl.zeros([BLOCK_H, BLOCK_B], tl.float32)
        for g in tl.static_range(G):
            through = dot(w[g], dh[g].to(DTYPE), through, PRECISION)
        if scale_ptr is not None:
            through = dbefore[0] + through * scale
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
        stay = stay_next

    store_state(dh0_ptr, dc0_ptr, first, b, h, dstate, mask, C, H)
    if dparams_ptr is not None:
        out = dparams_ptr + (tl.program_id(0) * D + d).to(tl.int64) * (K * H) + tl.arange(0, BLOCK_H)
        for n in tl.static_range(K):
            tl.store(out + n * H, tl.sum(total[n], axis=1), mask=tl.arange(0, BLOCK_H) < H)


@on_device
def sequence_forward(
    cell: str,
    x: Tensor,  # [T, B, D, G*H]  input gates
    w_hh: Tensor,  # [D, G*H, P]
    b_hh: Tensor | None,  # [D, G*H]
    w_hr: Tensor | None,  # [D, P, H]
    h0: Tensor,  # [D, B, P]
    c0: Tensor | None,  # [D, B, C*H]
    params: Tensor | None,  # [D, K, H]   the step's own parameters
    scale: Tensor | None,  # [D, B, P]    of h where it enters the recurrent product
    stay: Tensor | None,  # [T, B, D, N, H] bool, where the state stays as it is, or [N] fp32, how much of it
    reset: Tensor | None,  # [T, B]
    lengths: Tensor | None,  # [B]
    *,
    save: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer over a sequence; every tensor contiguous, every ``[T, B, D, ...]`` in the order of time.

    Returns y ``[T, B, D, P]``, h_n ``[D, B, P]``, c_n ``[D, B, C*H]`` and cells ``[T, B, D, C*H]`` (None for a cell
    that carries h alone) and, with ``save``, the gates ``[T, B, D, S, H]`` that ``sequence_backward`` reads.
    """
    step, how = STEPS[cell], plan_for(cell, x, w_hh, w_hr, allow_tf32)
    if how.regime == "stepwise":
        return stepwise_forward(cell, x, w_hh, b_hh, w_hr, h0, c0, params, scale, stay, reset, lengths, save)
    if how.regime == "persistent":
        return persistent_forward(cell, x, w_hh, b_hh, h0, c0, params, scale, stay, reset, lengths, save, how)
    T, B, D, _ = x.shape
    H = w_hh.shape[2]
    like = {"dtype": x.dtype, "device": x.device}
    y = torch.empty(T, B, D, H, **like)
    h_n = torch.empty_like(h0)
    c_n = None if c0 is None else torch.empty_like(c0)
    cells = None if c0 is None else torch.empty(T, B, D, step.cells * H, dtype=torch.float32, device=x.device)
    gates = torch.empty(T, B, D, step.saved, H, **like) if save else None
    sequence_forward_kernel[triton.cdiv(B, how.block_b), D](
        x_ptr=x, w_ptr=w_hh, bias_ptr=b_hh, h0_ptr=h0, c0_ptr=c0, params_ptr=params, scale_ptr=scale, stay_ptr=stay,
        reset_ptr=reset, lengths_ptr=lengths, y_ptr=y, h_n_ptr=h_n, c_n_ptr=c_n, cells_ptr=cells, gates_ptr=gates,
        T=T, B=B,
        **constants(step, step.forward, how, D, H), num_warps=how.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return y, h_n, c_n, cells, gates


@on_device
def sequence_backward(
    cell: str,
    dy: Tensor,  # [T, B, D, P]
    dh_n: Tensor,  # [D, B, P]
    dc_n: Tensor | None,  # [D, B, C*H]
    dcells: Tensor | None,  # [T, B, D, C*H]
    gates: Tensor,  # [T, B, D, S, H]
    after: Tensor | None,  # [T, B, D, C*H]
    h_prev: Tensor,  # [T, B, D, P]
    c_prev: Tensor | None,  # [T, B, D, C*H]
    w_hh: Tensor,  # [D, G*H, P]
    w_hr: Tensor | None,  # [D, P, H]
    params: Tensor | None,  # [D, K, H]
    scale: Tensor | None,  # [D, B, P]
    stay: Tensor | None,  # [T, B, D, N, H] bool or [N] fp32
    reset: Tensor | None,  # [T, B]
    lengths: Tensor | None,  # [B]
    *,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """The gradients that need the loop over time; those of the weights are products of what this returns.

    h_prev and c_prev are the states each step read; after, the cells it left, before zoneout. Returns the gradients
    of the input gates and of the recurrent gates ``[T, B, D, G*H]`` (one tensor unless the cell splits them), of the
    projection's product ``[T, B, D, P]`` or None, of h0, of c0 and of params.
    """
    step, how = STEPS[cell], plan_for(cell, dy, w_hh, w_hr, allow_tf32)
    if how.regime == "stepwise":
        return stepwise_backward(
            cell, dy, dh_n, dc_n, dcells, gates, after, h_prev, c_prev, w_hh, w_hr, params, scale, stay, reset, lengths
        )  # fmt: skip
    if how.regime == "persistent":
        return persistent_backward(
            cell, dy, dh_n, dc_n, dcells, gates, after, h_prev, c_prev, w_hh, params, scale, stay, reset, lengths, how
        )
    T, B, D, H = dy.shape
    dx = torch.empty(T, B, D, step.gates * H, dtype=dy.dtype, device=dy.device)
    dh = torch.empty_like(dx) if step.splits else None
    dh0 = torch.empty_like(dh_n)
    dc0 = None if dc_n is None else torch.empty_like(dc_n)
    blocks = triton.cdiv(B, how.block_b)
    dparams = None if params is None else torch.empty(blocks, *params.shape, dtype=torch.float32, device=dy.device)
    sequence_backward_kernel[blocks, D](
        dy_ptr=dy, dh_n_ptr=dh_n, dc_n_ptr=dc_n, dcells_ptr=dcells, gates_ptr=gates, cells_ptr=after,
        h_prev_ptr=h_prev if step.reads_h else None, c_prev_ptr=c_prev, w_ptr=w_hh, params_ptr=params,
        scale_ptr=scale, stay_ptr=stay, reset_ptr=reset, lengths_ptr=lengths, dx_ptr=dx, dh_ptr=dh,
        dh0_ptr=dh0, dc0_ptr=dc0, dparams_ptr=dparams, T=T, B=B,
        **constants(step, step.backward, how, D, H), num_warps=how.num_warps, num_stages=1, **OPTIONS,
    )  # fmt: skip
    return dx, dx if dh is None else dh, None, dh0, dc0, None if dparams is None else dparams.sum(0).to(params.dtype)


def plan_for(cell: str, x: Tensor, w_hh: Tensor, w_hr: Tensor | None, allow_tf32: bool) -> Plan:
    """The plan of a call."""
    P = w_hh.shape[2]
    H = P if w_hr is None else w_hr.shape[2]
    return plan(cell, H, P, x.dtype, allow_tf32, limits(x.device), x.shape[1], x.shape[2])


def constants(step: Step, function: triton.JITFunction, how: Plan, D: int, H: int) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    return {
        "D": D,
        "G": step.gates,
        "S": step.saved,
        "C": step.cells,
        "K": step.params,
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
        if (repeats(cell, dtype) and H != 64) or (cell not in STOCK and (H == 100 or dtype == torch.float16)):
            continue
        how = plan(cell, H, H, dtype, allow_tf32, limits, 1, 1)
        if how.regime != "resident" or (allow_tf32 and how.precision == "ieee"):
            continue
        c, c32 = (dtype, torch.float32) if step.cells else (None, None)
        for suffix, options in variants(step, dtype).items():
            if suffix == " dropouts" and (H, dtype) != (64, torch.bfloat16):
                continue
            full = suffix == " all options"
            D = 2 if full else 1
            name = f"{cell} H={H} {NAMES[dtype]} {how.precision}{suffix}"
            forward = options | {
                "x_ptr": dtype,
                "w_ptr": dtype,
                "bias_ptr": dtype if step.splits else None,
                "h0_ptr": dtype,
                "c0_ptr": c,
                "y_ptr": dtype,
                "h_n_ptr": dtype,
                "c_n_ptr": c,
                "cells_ptr": c32,
                "gates_ptr": dtype if full else None,
            }
            backward = options | {
                "dy_ptr": dtype,
                "dh_n_ptr": dtype,
                "dc_n_ptr": c,
                "dcells_ptr": c32 if suffix else None,
                "gates_ptr": dtype,
                "cells_ptr": c32,
                "h_prev_ptr": dtype if step.reads_h else None,
                "c_prev_ptr": c32,
                "w_ptr": dtype,
                "dx_ptr": dtype,
                "dh_ptr": dtype if step.splits else None,
                "dh0_ptr": dtype,
                "dc0_ptr": c,
                "dparams_ptr": torch.float32 if step.params else None,
            }
            yield configuration(
                f"sequence forward {name}", sequence_forward_kernel, forward,
                constants(step, step.forward, how, D, H), how.num_warps,
            )  # fmt: skip
            yield configuration(
                f"sequence backward {name}", sequence_backward_kernel, backward,
                constants(step, step.backward, how, D, H), how.num_warps,
            )  # fmt: skip
