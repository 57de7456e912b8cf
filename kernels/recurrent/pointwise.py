"""The gate arithmetic of one step, forward and backward, for all directions at once; and around a projection.

``stepwise.py`` alternates these kernels with matrix products of the library. What passes from a step to the next
stays in small buffers ``[D, B, ...]``, written ready for the next product: a row that the next step resets is
already zero, and a row that is over is left alone. Direction d is at its own time. A program holds a tile of units
and rows, ``[BLOCK_H, BLOCK_B]``: of all units, if the step reduces over them.
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
    cast_tiles,
    configuration,
    keep_tiles,
    load_tiles,
    on_device,
    row_of,
    staying,
    store_tiles,
    time_of,
    zone_out,
    zone_out_backward,
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
    params_ptr,  # [D, K, H]    the step's own parameters, or None
    scale_ptr,  # [D, B, H]     of h where it enters the product, or None
    stay_ptr,  # [T, B, D, N, H] bool, or [N] fp32: zoneout, or None
    h_ptr,  # [D, B, H]         out: the operand of the next product
    h_exact_ptr,  # [D, B, H]   in and out: h in fp32, or None: nothing but the product reads it
    c_ptr,  # [D, B, C, H]      in and out: the cells in fp32, or None: a cell that carries h alone
    reset_ptr,  # [T, B]        or None
    lengths_ptr,  # [B]         or None
    y_ptr,  # [T, B, D, H]      output, or None: a projection follows, and h is only its operand
    cells_ptr,  # [T, B, D, C, H]  every step's, or None, with c
    gates_ptr,  # [T, B, D, S, H]  what backward needs, or None
    s,
    T,
    B,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    ONLY_GATES: tl.constexpr,  # one step of each row; buffers are [B, D, ...]; only gates and cells are written
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    d = tl.program_id(1)
    start = tl.program_id(0) // tl.cdiv(H, BLOCK_H) * BLOCK_B
    h = tl.program_id(0) % tl.cdiv(H, BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (h < H) & mask_b
    t = time_of(s, T, d)
    row = row_of(t, start, d, B, D)
    first = row if ONLY_GATES else B.to(tl.int64) * d + start  # of the buffers, and the way to their next row
    ROW: tl.constexpr = D if ONLY_GATES else 1
    in_state = first * H + b * (ROW * H) + h
    in_cells = b * (ROW * C * H) + h

    x = cast_tiles(load_tiles(x_ptr + row * (G * H), b * (D * G * H) + h, mask, G, H), tl.float32)
    gates = cast_tiles(load_tiles(product_ptr + first * (G * H), b * (ROW * G * H) + h, mask, G, H), tl.float32)
    if bias_ptr is not None:
        gates = add_tiles(gates, cast_tiles(load_tiles(bias_ptr + d * (G * H), h, h < H, G, H), tl.float32))
    params = ()
    if params_ptr is not None:
        params = cast_tiles(load_tiles(params_ptr + d * (K * H), h, h < H, K, H), tl.float32)
    read = (tl.zeros_like(x[0]),)
    if h_exact_ptr is not None:
        read = (tl.load(h_exact_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    if c_ptr is not None:
        read = read + load_tiles(c_ptr + first * (C * H), in_cells, mask, C, H)

    saved, state = STEP(x, gates, read, params, H)

    if gates_ptr is not None:
        store_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, saved, mask, H)
    if ONLY_GATES:
        if cells_ptr is not None:
            store_tiles(cells_ptr + row * (C * H), b * (D * C * H) + h, state[1:], mask, H)
    else:
        if stay_ptr is not None:
            state = zone_out(staying(stay_ptr, row, b, h, mask, D, C + 1, H), state, read)
        alive = alive_at(lengths_ptr, t, start + b, mask_b)
        if cells_ptr is not None:
            cells = keep_tiles(alive, state[1:])
            store_tiles(cells_ptr + row * (C * H), b * (D * C * H) + h, cells, mask, H)
        # A row that is over keeps its state: nothing is written, unless the next step resets it.
        reset = reset_after(reset_ptr, lengths_ptr, s, T, d, start + b, B)
        left = keep_tiles(reset == 0, state)
        write = mask & (alive | reset)
        if c_ptr is not None:
            store_tiles(c_ptr + first * (C * H), in_cells, left[1:], write, H)
        if h_exact_ptr is not None:
            tl.store(h_exact_ptr + in_state, left[0], mask=write)
        if y_ptr is None:
            tl.store(h_ptr + in_state, state[0].to(h_ptr.dtype.element_ty), mask=mask)
        else:
            operand = left[0]
            if scale_ptr is not None:
                operand = operand * tl.load(scale_ptr + in_state, mask=mask, other=0.0).to(tl.float32)
            tl.store(h_ptr + in_state, operand.to(h_ptr.dtype.element_ty), mask=write)
            y = tl.where(alive, state[0], 0.0)
            tl.store(y_ptr + row * H + b * (D * H) + h, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    p = tl.program_id(0) % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
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
    p = tl.program_id(0) % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
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
    dc_ptr,  # [D, B, C, H]      in and out: gradient of the cells, fp32, or None: a cell that carries h alone
    dcells_ptr,  # [T, B, D, C, H]  gradient of every step's, or None
    gates_ptr,  # [T, B, D, S, H]  what forward saved
    cells_ptr,  # [T, B, D, C, H]  the cells that each step left, or None, with dc
    h_prev_ptr,  # [T, B, D, H]  the h that each step read, or None: the step does not need it
    c_prev_ptr,  # [T, B, D, C, H]  the cells that each step read, or None, with dc
    params_ptr,  # [D, K, H]     the step's own parameters, or None
    scale_ptr,  # [D, B, H]      of h where it enters the product, or None
    stay_ptr,  # [T, B, D, N, H] bool, or [N] fp32: zoneout, or None
    reset_ptr,  # [T, B]         or None
    lengths_ptr,  # [B]          or None
    operand_ptr,  # [D, B, G, H]  out: the recurrent gates' gradient, operand of the next product
    dx_ptr,  # [T, B, D, G, H]   gradient of the input gates
    dh_ptr,  # [T, B, D, G, H]   gradient of the recurrent gates, or None: the same
    dparams_ptr,  # [blocks, D, K, H]  in and out: fp32, the sum over a tile's rows and time, or None, with params
    s,
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
):
    d = tl.program_id(1)
    block = tl.program_id(0) // tl.cdiv(H, BLOCK_H)
    start = block * BLOCK_B
    unit = tl.program_id(0) % tl.cdiv(H, BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)
    h = unit[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (h < H) & mask_b
    t = time_of(s, T, d)
    row = row_of(t, start, d, B, D)
    first = B.to(tl.int64) * d + start
    in_state = first * H + b * H + h
    in_row = row * H + b * (D * H) + h
    in_cells = b * (D * C * H) + h

    through = tl.load(product_ptr + in_state, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        through *= tl.load(scale_ptr + in_state, mask=mask, other=0.0).to(tl.float32)
    dafter = (through,)
    if dy_ptr is not None:
        through += tl.load(direct_ptr + in_state, mask=mask, other=0.0)
        dafter = (through + tl.load(dy_ptr + in_row, mask=mask, other=0.0).to(tl.float32),)
    kept = ()
    if h_prev_ptr is not None:
        kept = kept + load_tiles(h_prev_ptr + row * H, b * (D * H) + h, mask, 1, 0)
    if dc_ptr is not None:
        dc = load_tiles(dc_ptr + first * (C * H), b * (C * H) + h, mask, C, H)
        if dcells_ptr is not None:
            dc = add_tiles(dc, load_tiles(dcells_ptr + row * (C * H), in_cells, mask, C, H))
        dafter = dafter + dc
        kept = kept + load_tiles(c_prev_ptr + row * (C * H), in_cells, mask, C, H)
        kept = kept + load_tiles(cells_ptr + row * (C * H), in_cells, mask, C, H)
    saved = cast_tiles(load_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, mask, S, H), tl.float32)
    params = ()
    if params_ptr is not None:
        params = cast_tiles(load_tiles(params_ptr + d * (K * H), h, h < H, K, H), tl.float32)
    around = ()  # the step, through zoneout
    if stay_ptr is not None:
        dafter, around = zone_out_backward(staying(stay_ptr, row, b, h, mask, D, C + 1, H), dafter)

    dx, dh, dbefore, dparams = STEP(saved, cast_tiles(kept, tl.float32), dafter, params, H)

    if stay_ptr is not None:
        dbefore = add_tiles(dbefore, around)
    alive = alive_at(lengths_ptr, t, start + b, mask_b)
    fresh = reset_at(reset_ptr, lengths_ptr, t, start + b, mask_b, B)
    store_tiles(dx_ptr + row * (G * H), b * (D * G * H) + h, keep_tiles(alive, dx), mask, H)
    if dh_ptr is not None:
        store_tiles(dh_ptr + row * (G * H), b * (D * G * H) + h, keep_tiles(alive, dh), mask, H)
    # Nothing flows back through a reset; in a row that is over everything flows around the product.
    onward = alive & (fresh == 0)
    store_tiles(operand_ptr + first * (G * H), b * (G * H) + h, keep_tiles(onward, dh), mask, H)
    dbefore = keep_tiles(onward, dbefore)
    if dy_ptr is not None:
        tl.store(direct_ptr + in_state, tl.where(alive, dbefore[0], through), mask=mask)
    if dc_ptr is not None:
        store_tiles(dc_ptr + first * (C * H), b * (C * H) + h, dbefore[1:], mask & alive, H)
    if dparams_ptr is not None:  # this program's own place, as the steps before left it
        out = dparams_ptr + (block * D + d).to(tl.int64) * (K * H) + unit
        for k in tl.static_range(K):
            total = tl.load(out + k * H, mask=unit < H, other=0.0)
            total += tl.sum(tl.where(mask & alive, dparams[k], 0.0), axis=1)
            tl.store(out + k * H, total, mask=unit < H)


def tile(width: int, whole: bool = False) -> tuple[int, int, int]:
    """Rows and columns of a pointwise program's tile, and its warps; whole: all columns in one tile."""
    columns = triton.next_power_of_2(width)
    if not whole:
        columns = min(columns, 128)
    return max(ELEMENTS // columns, 1), columns, min(max(columns // 128, 4), 32)


def grid(B: int, D: int, width: int, whole: bool = False) -> tuple[int, int]:
    rows, columns, _ = tile(width, whole)
    return triton.cdiv(B, rows) * triton.cdiv(width, columns), D


def constants(step: Step, function: triton.JITFunction, D: int, H: int) -> dict[str, Any]:
    """The compile-time arguments that the two step kernels share."""
    rows, columns, _ = tile(H, step.whole)
    return {
        "D": D,
        "G": step.gates,
        "S": step.saved,
        "C": step.cells,
        "K": step.params,
        "H": H,
        "STEP": function,
        "BLOCK_B": rows,
        "BLOCK_H": columns,
    }


def projection_constants(D: int, P: int) -> dict[str, Any]:
    """The compile-time arguments of the two projection kernels."""
    rows, columns, _ = tile(P)
    return {"D": D, "P": P, "BLOCK_B": rows, "BLOCK_P": columns}


@on_device
def step_gates(
    cell: str,
    x: Tensor,  # [R, D, G*H]  input gates
    h: Tensor,  # [R, D, G*H]  recurrent gates, biases included
    before: Tensor | None,  # [R, D, C*H]  fp32, the cells that each step read
    params: Tensor | None,  # [D, K, H]
    state: Tensor,  # [R, D, H]  the h that each step read
) -> tuple[Tensor, Tensor | None]:
    """R steps at once: the saved gates ``[R, D, S, H]``, and the cells that they leave ``[R, D, C*H]`` (or None)."""
    step = STEPS[cell]
    R, D, H = x.shape[0], x.shape[1], x.shape[2] // step.gates
    gates = torch.empty(R, D, step.saved, H, dtype=x.dtype, device=x.device)
    after = None if before is None else torch.empty_like(before)
    step_forward_kernel[grid(R, D, H, step.whole)](
        x_ptr=x, product_ptr=h, bias_ptr=None, params_ptr=params, scale_ptr=None, stay_ptr=None, h_ptr=None,
        h_exact_ptr=state if step.reads_h else None, c_ptr=before, reset_ptr=None, lengths_ptr=None, y_ptr=None,
        cells_ptr=after, gates_ptr=gates, s=0, T=1, B=R,
        **constants(step, step.forward, D, H), ONLY_GATES=True, num_warps=tile(H, step.whole)[2], **OPTIONS,
    )  # fmt: skip
    return gates, after


def variants(step: Step, dtype: torch.dtype) -> dict[str, dict[str, torch.dtype | None]]:
    """The optional tensors of a launch, present or not, in the combinations that are published."""
    plain = {
        "params_ptr": dtype if step.params else None,
        "scale_ptr": None,
        "stay_ptr": None,
        "reset_ptr": None,
        "lengths_ptr": None,
    }
    masks = plain | {"reset_ptr": torch.bool, "lengths_ptr": torch.int64}
    dropouts = {"scale_ptr": dtype, "stay_ptr": torch.bool}
    return {"": plain, " all options": masks, " dropouts": plain | dropouts}


def configurations() -> Iterator[dict[str, Any]]:
    """The ways in which the pointwise kernels run: every cell and type, plain and with everything."""
    for (cell, step), dtype in itertools.product(STEPS.items(), (torch.float32, torch.bfloat16)):
        c, sums = (torch.float32 if some else None for some in (step.cells, step.params))
        H = 1000 if step.whole else 100  # of which these kernels make nothing but offsets, a mask, and sums
        num_warps = tile(H, step.whole)[2]
        for suffix, options in variants(step, dtype).items():
            if suffix == " dropouts" and dtype != torch.bfloat16:
                continue
            full = suffix == " all options"
            D = 2 if full else 1
            name = f"{cell} H={H} {NAMES[dtype]}{suffix}"
            exact = step.reads_h or options["scale_ptr"]
            forward = options | {
                "x_ptr": dtype,
                "product_ptr": dtype,
                "bias_ptr": dtype if step.splits else None,
                "h_ptr": dtype,
                "h_exact_ptr": torch.float32 if exact else None,
                "c_ptr": c,
                "y_ptr": dtype,
                "cells_ptr": c,
                "gates_ptr": dtype if full else None,
            }
            backward = options | {
                "dy_ptr": dtype,
                "product_ptr": dtype,
                "direct_ptr": torch.float32,
                "dc_ptr": c,
                "dcells_ptr": c if suffix else None,
                "gates_ptr": dtype,
                "cells_ptr": c,
                "h_prev_ptr": dtype if step.reads_h else None,
                "c_prev_ptr": c,
                "operand_ptr": dtype,
                "dx_ptr": dtype,
                "dh_ptr": dtype if step.splits else None,
                "dparams_ptr": sums,
            }
            of_forward = constants(step, step.forward, D, H) | {"ONLY_GATES": False}
            of_backward = constants(step, step.backward, D, H)
            yield configuration(f"step forward {name}", step_forward_kernel, forward, of_forward, num_warps)
            yield configuration(f"step backward {name}", step_backward_kernel, backward, of_backward, num_warps)
            if cell == "lstm" and suffix != " dropouts":
                yield configuration(
                    f"step forward {name} projected", step_forward_kernel, forward | {"y_ptr": None}, of_forward
                )  # fmt: skip
                yield configuration(
                    f"step backward {name} projected", step_backward_kernel,
                    backward | {"dy_ptr": None, "direct_ptr": None}, of_backward,
                )  # fmt: skip
                masks = {name: options[name] for name in ("reset_ptr", "lengths_ptr")}
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
        given = {
            "x_ptr": dtype,
            "product_ptr": dtype,
            "params_ptr": options["params_ptr"],
            "h_exact_ptr": dtype if step.reads_h else None,
            "c_ptr": c,
            "cells_ptr": c,
            "gates_ptr": dtype,
        }
        yield configuration(
            f"step gates {cell} H={H} {NAMES[dtype]}", step_forward_kernel, dict.fromkeys(forward) | given,
            constants(step, step.forward, 1, H) | {"ONLY_GATES": True}, num_warps,
        )  # fmt: skip
