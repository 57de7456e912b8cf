"""The gate arithmetic of one step, forward and backward, for all directions at once; and around a projection.

``stepwise.py`` alternates these kernels with matrix products of the library. What passes from a step to the next
stays in small buffers ``[D, B, ...]``, written ready for the next product: a row that the next step resets is
already zero, and a row that is over is left alone. Direction d is at its own time.
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
    keep_tiles,
    load_tiles,
    on_device,
    row_of,
    store_tiles,
    time_of,
)
from .steps import STEPS, Step

ELEMENTS = 512  # of a program's tile


@triton.jit
def alive_at(lengths_ptr, t, b, mask_b):
    """Whether the step at time t is inside each row."""
    alive = mask_b
    if lengths_ptr is not None:
        alive = mask_b & (t < tl.load(lengths_ptr + b, mask=mask_b, other=0))
    return alive


@triton.jit
def reset_at(reset_ptr, lengths_ptr, t, b, mask_b, B):
    """Whether the step at time t starts from zeros. Past a row's end nothing reads the state, nothing resets it."""
    reset = b < 0  # nowhere
    if reset_ptr is not None:
        flag = tl.load(reset_ptr + B.to(tl.int64) * t + b, mask=mask_b, other=0)
        reset = alive_at(lengths_ptr, t, b, mask_b) & (flag != 0)
    return reset


@triton.jit
def reset_after(reset_ptr, lengths_ptr, s, T, d, b, B):
    """Whether the step after the s-th starts from zeros; after the last step no row does."""
    rows = tl.where(s + 1 < T, B, 0)
    return reset_at(reset_ptr, lengths_ptr, time_of(s + 1, T, d), b, b < rows, B)


@triton.jit(do_not_specialize=["s", "T", "B"])
def step_forward_kernel(
    x_ptr,  # [T, B, D, G, H]   input gates
    product_ptr,  # [D, B, G, H]  recurrent product of this step
    bias_ptr,  # [D, G, H]      recurrent bias, or None
    h_ptr,  # [D, B, H]         out: the operand of the next product
    h_exact_ptr,  # [D, B, H]   in and out: h in fp32, or None: the step does not read it
    c_ptr,  # [D, B, H]         in and out: c in fp32, or None: a cell without c
    reset_ptr,  # [T, B]        or None
    lengths_ptr,  # [B]         or None
    y_ptr,  # [T, B, D, H]      output, or None: a projection follows, and h is only its operand
    cells_ptr,  # [T, B, D, H]  every c, or None, with c
    gates_ptr,  # [T, B, D, S, H]  what backward needs, or None
    s,
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    ONLY_GATES: tl.constexpr,  # the states are read, nothing but the gates is written
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    d = tl.program_id(1)
    start = tl.program_id(0) // tl.cdiv(H, BLOCK_H) * BLOCK_B
    h = tl.program_id(0) % tl.cdiv(H, BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    mask_b = start + b < B
    mask = mask_b & (h < H)
    t = time_of(s, T, d)
    row = row_of(t, start, d, B, D)
    state_row = B.to(tl.int64) * d + start  # of [D, B, ...]
    in_state = state_row * H + b * H + h

    x = cast_tiles(load_tiles(x_ptr + row * (G * H), b * (D * G * H) + h, mask, G, H), tl.float32)
    gates = cast_tiles(load_tiles(product_ptr + state_row * (G * H), b * (G * H) + h, mask, G, H), tl.float32)
    if bias_ptr is not None:
        bias = cast_tiles(load_tiles(bias_ptr + d * (G * H), h, h < H, G, H), tl.float32)
        biased = ()
        for g in tl.static_range(G):
            biased = biased + (gates[g] + bias[g],)
        gates = biased
    state = (tl.zeros_like(x[0]),)
    if h_exact_ptr is not None:
        state = (tl.load(h_exact_ptr + in_state, mask=mask, other=0.0),)
    if c_ptr is not None:
        state = state + (tl.load(c_ptr + in_state, mask=mask, other=0.0),)

    saved, state = STEP(x, gates, state)

    if gates_ptr is not None:
        store_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, saved, mask, H)
    if not ONLY_GATES:
        alive = alive_at(lengths_ptr, t, start + b, mask_b)
        in_row = row * H + b * (D * H) + h
        if cells_ptr is not None:
            tl.store(cells_ptr + in_row, tl.where(alive, state[1], 0.0), mask=mask)
        # A row that is over keeps its state: nothing is written, unless the next step resets it.
        reset = reset_after(reset_ptr, lengths_ptr, s, T, d, start + b, B)
        left = keep_tiles(reset == 0, state)
        write = mask & (alive | reset)
        if c_ptr is not None:
            tl.store(c_ptr + in_state, left[1], mask=write)
        if h_exact_ptr is not None:
            tl.store(h_exact_ptr + in_state, left[0], mask=write)
        if y_ptr is None:
            tl.store(h_ptr + in_state, state[0].to(h_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(h_ptr + in_state, left[0].to(h_ptr.dtype.element_ty), mask=write)
            tl.store(y_ptr + in_row, tl.where(alive, state[0], 0.0).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["s", "T", "B"])
def project_forward_kernel(
    projected_ptr,  # [D, B, P]  the projection's product
    reset_ptr,  # [T, B]         or None
    lengths_ptr,  # [B]          or None
    h_ptr,  # [D, B, P]          out: the operand of the next recurrent product
    y_ptr,  # [T, B, D, P]       output
    s,
    T,
    B,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    d = tl.program_id(1)
    start = tl.program_id(0) // tl.cdiv(P, BLOCK_P) * BLOCK_B
    p = tl.program_id(0) % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    mask_b = start + b < B
    mask = mask_b & (p < P)
    t = time_of(s, T, d)
    in_state = (B.to(tl.int64) * d + start) * P + b * P + p

    h = tl.load(projected_ptr + in_state, mask=mask, other=0.0)
    alive = alive_at(lengths_ptr, t, start + b, mask_b)
    reset = reset_after(reset_ptr, lengths_ptr, s, T, d, start + b, B)
    tl.store(h_ptr + in_state, tl.where(reset, 0.0, h), mask=mask & (alive | reset))
    tl.store(y_ptr + row_of(t, start, d, B, D) * P + b * (D * P) + p, tl.where(alive, h, 0.0), mask=mask)


@triton.jit(do_not_specialize=["s", "T", "B"])
def project_backward_kernel(
    dy_ptr,  # [T, B, D, P]      gradient of the output
    product_ptr,  # [D, B, P]    gradient of h through the recurrent product of the step after
    direct_ptr,  # [D, B, P]     in and out: gradient of h around it, fp32
    lengths_ptr,  # [B]          or None
    dprojected_ptr,  # [D, B, P]  out: gradient of the projection's product, the next operand
    dproj_ptr,  # [T, B, D, P]   the same, every step's
    s,
    T,
    B,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    d = tl.program_id(1)
    start = tl.program_id(0) // tl.cdiv(P, BLOCK_P) * BLOCK_B
    p = tl.program_id(0) % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    mask_b = start + b < B
    mask = mask_b & (p < P)
    t = time_of(s, T, d)
    in_state = (B.to(tl.int64) * d + start) * P + b * P + p
    in_row = row_of(t, start, d, B, D) * P + b * (D * P) + p

    dh = tl.load(direct_ptr + in_state, mask=mask, other=0.0)
    dh += tl.load(product_ptr + in_state, mask=mask, other=0.0).to(tl.float32)
    alive = alive_at(lengths_ptr, t, start + b, mask_b)
    total = tl.where(alive, dh + tl.load(dy_ptr + in_row, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(direct_ptr + in_state, tl.where(alive, 0.0, dh), mask=mask)
    tl.store(dprojected_ptr + in_state, total.to(dprojected_ptr.dtype.element_ty), mask=mask)
    tl.store(dproj_ptr + in_row, total.to(dproj_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["s", "T", "B"])
def step_backward_kernel(
    dy_ptr,  # [T, B, D, H]      gradient of the output, or None: a projection, whose product is all there is
    product_ptr,  # [D, B, H]    gradient of h through the product of the step after (or of the projection)
    direct_ptr,  # [D, B, H]     in and out: gradient of h around it, fp32, or None, with dy
    dc_ptr,  # [D, B, H]         in and out: gradient of c, fp32, or None: a cell without c
    dcells_ptr,  # [T, B, D, H]  gradient of every c, or None
    gates_ptr,  # [T, B, D, S, H]  what forward saved
    cells_ptr,  # [T, B, D, H]   every c, or None, with dc
    h_prev_ptr,  # [T, B, D, H]  the h that each step read, or None: the cell does not need it
    c_prev_ptr,  # [T, B, D, H]  the c that each step read, or None, with dc
    reset_ptr,  # [T, B]         or None
    lengths_ptr,  # [B]          or None
    operand_ptr,  # [D, B, G, H]  out: the recurrent gates' gradient, operand of the next product
    dx_ptr,  # [T, B, D, G, H]   gradient of the input gates
    dh_ptr,  # [T, B, D, G, H]   gradient of the recurrent gates, or None: the same
    s,
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    d = tl.program_id(1)
    start = tl.program_id(0) // tl.cdiv(H, BLOCK_H) * BLOCK_B
    h = tl.program_id(0) % tl.cdiv(H, BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    b = tl.arange(0, BLOCK_B)[:, None]
    mask_b = start + b < B
    mask = mask_b & (h < H)
    t = time_of(s, T, d)
    row = row_of(t, start, d, B, D)
    state_row = B.to(tl.int64) * d + start
    in_state = state_row * H + b * H + h
    in_row = row * H + b * (D * H) + h

    dafter = (tl.load(product_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    if dy_ptr is not None:
        through = dafter[0] + tl.load(direct_ptr + in_state, mask=mask, other=0.0)
        dafter = (through + tl.load(dy_ptr + in_row, mask=mask, other=0.0).to(tl.float32),)
    kept = ()
    if h_prev_ptr is not None:
        kept = kept + (tl.load(h_prev_ptr + in_row, mask=mask, other=0.0).to(tl.float32),)
    if dc_ptr is not None:
        dc = tl.load(dc_ptr + in_state, mask=mask, other=0.0)
        if dcells_ptr is not None:
            dc += tl.load(dcells_ptr + in_row, mask=mask, other=0.0).to(tl.float32)
        dafter = dafter + (dc,)
        kept = kept + (tl.load(c_prev_ptr + in_row, mask=mask, other=0.0).to(tl.float32),)
        kept = kept + (tl.load(cells_ptr + in_row, mask=mask, other=0.0).to(tl.float32),)
    saved = cast_tiles(load_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, mask, S, H), tl.float32)

    dx, dh, dbefore = STEP(saved, kept, dafter)

    alive = alive_at(lengths_ptr, t, start + b, mask_b)
    fresh = reset_at(reset_ptr, lengths_ptr, t, start + b, mask_b, B)
    store_tiles(dx_ptr + row * (G * H), b * (D * G * H) + h, keep_tiles(alive, dx), mask, H)
    if dh_ptr is not None:
        store_tiles(dh_ptr + row * (G * H), b * (D * G * H) + h, keep_tiles(alive, dh), mask, H)
    # Nothing flows back through a reset; in a row that is over everything flows around the product.
    onward = alive & (fresh == 0)
    store_tiles(operand_ptr + state_row * (G * H), b * (G * H) + h, keep_tiles(onward, dh), mask, H)
    dbefore = keep_tiles(onward, dbefore)
    if dy_ptr is not None:
        tl.store(direct_ptr + in_state, tl.where(alive, dbefore[0], through), mask=mask)
    if dc_ptr is not None:
        tl.store(dc_ptr + in_state, dbefore[1], mask=mask & alive)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a pointwise program's tile."""
    columns = min(triton.next_power_of_2(width), 128)
    return ELEMENTS // columns, columns


def grid(B: int, D: int, width: int) -> tuple[int, int]:
    rows, columns = tile(width)
    return triton.cdiv(B, rows) * triton.cdiv(width, columns), D


def constants(step: Step, function: triton.JITFunction, D: int, H: int) -> dict[str, Any]:
    """The compile-time arguments that the two step kernels share."""
    rows, columns = tile(H)
    return {
        "D": D,
        "G": step.gates,
        "S": step.saved,
        "H": H,
        "STEP": function,
        "BLOCK_B": rows,
        "BLOCK_H": columns,
    }


def projection_constants(D: int, P: int) -> dict[str, Any]:
    """The compile-time arguments of the two projection kernels."""
    rows, columns = tile(P)
    return {"D": D, "P": P, "BLOCK_B": rows, "BLOCK_P": columns}


@on_device
def step_gates(cell: str, x: Tensor, h: Tensor, c_prev: Tensor | None) -> Tensor:
    """The saved gates ``[N, S, H]`` of N steps at once, from their pre-activations.

    x and h ``[N, G*H]`` are the input gates and the recurrent gates, biases included; c_prev ``[N, H]`` fp32 is
    the c that each step read.
    """
    step = STEPS[cell]
    N, H = x.shape[0], x.shape[1] // step.gates
    gates = torch.empty(N, step.saved, H, dtype=x.dtype, device=x.device)
    step_forward_kernel[grid(N, 1, H)](
        x_ptr=x, product_ptr=h, bias_ptr=None, h_ptr=None, h_exact_ptr=None, c_ptr=c_prev, reset_ptr=None,
        lengths_ptr=None, y_ptr=None, cells_ptr=None, gates_ptr=gates, s=0, T=1, B=N,
        **constants(step, step.forward, 1, H), ONLY_GATES=True, **OPTIONS,
    )  # fmt: skip
    return gates


def configurations() -> Iterator[dict[str, Any]]:
    """The ways in which the pointwise kernels run: every cell and type, plain and with everything."""
    H = 100  # of which these kernels make nothing but offsets and a mask
    for (cell, step), dtype in itertools.product(STEPS.items(), (torch.float32, torch.bfloat16)):
        c = torch.float32 if step.has_c else None
        for all_options in (False, True):
            D = 2 if all_options else 1
            name = f"{cell} H={H} {NAMES[dtype]}{' all options' if all_options else ''}"
            masks = {
                "reset_ptr": torch.bool if all_options else None,
                "lengths_ptr": torch.int64 if all_options else None,
            }
            forward = masks | {
                "x_ptr": dtype,
                "product_ptr": dtype,
                "bias_ptr": dtype if step.splits else None,
                "h_ptr": dtype,
                "h_exact_ptr": torch.float32 if step.reads_h else None,
                "c_ptr": c,
                "y_ptr": dtype,
                "cells_ptr": c,
                "gates_ptr": dtype if all_options else None,
            }
            backward = masks | {
                "dy_ptr": dtype,
                "product_ptr": dtype,
                "direct_ptr": torch.float32,
                "dc_ptr": c,
                "dcells_ptr": c if all_options else None,
                "gates_ptr": dtype,
                "cells_ptr": c,
                "h_prev_ptr": dtype if step.reads_h else None,
                "c_prev_ptr": c,
                "operand_ptr": dtype,
                "dx_ptr": dtype,
                "dh_ptr": dtype if step.splits else None,
            }
            of_forward = constants(step, step.forward, D, H) | {"ONLY_GATES": False}
            of_backward = constants(step, step.backward, D, H)
            yield configuration(f"step forward {name}", step_forward_kernel, forward, of_forward)
            yield configuration(f"step backward {name}", step_backward_kernel, backward, of_backward)
            if cell == "lstm":
                yield configuration(
                    f"step forward {name} projected", step_forward_kernel, forward | {"y_ptr": None}, of_forward
                )  # fmt: skip
                yield configuration(
                    f"step backward {name} projected", step_backward_kernel,
                    backward | {"dy_ptr": None, "direct_ptr": None}, of_backward,
                )  # fmt: skip
                projection = {"projected_ptr": dtype, "h_ptr": dtype, "y_ptr": dtype} | masks
                yield configuration(
                    f"project forward {name}", project_forward_kernel, projection, projection_constants(D, H)
                )  # fmt: skip
                projection = {
                    "dy_ptr": dtype,
                    "product_ptr": dtype,
                    "direct_ptr": torch.float32,
                    "lengths_ptr": masks["lengths_ptr"],
                    "dprojected_ptr": dtype,
                    "dproj_ptr": dtype,
                }
                yield configuration(
                    f"project backward {name}", project_backward_kernel, projection, projection_constants(D, H)
                )  # fmt: skip
        absent = dict.fromkeys(a for a in forward if a not in ("x_ptr", "product_ptr", "c_ptr", "gates_ptr"))
        yield configuration(
            f"step gates {cell} H={H} {NAMES[dtype]}", step_forward_kernel, forward | absent,
            constants(step, step.forward, 1, H) | {"ONLY_GATES": True},
        )  # fmt: skip
