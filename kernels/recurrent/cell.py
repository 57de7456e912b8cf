"""One step of a cell in one launch: both matrix products and the gate arithmetic.

Forward: a program computes a tile of hidden units for a tile of the batch; it walks over the input and over the
hidden state, with an accumulator for every gate. Backward: a program computes a tile of the columns of
``[dx | dh]``, walking over the hidden units, whose gates' gradients it computes anew. Tiles are ``[units, batch]``.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import NAMES, OPTIONS, cast_tiles, configuration, dot, load_tiles, on_device, store_tiles
from ..limits import LIMITS, Limits, limits
from .plan import DTYPES, precision, repeats, scalar
from .plan import unsupported as unsupported
from .steps import STEPS, STOCK, Step


@triton.jit
def add_products(
    gates, operand_ptr, w_ptr, h, b, mask_b,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gates[g] + w[g] @ operand^T`` for w ``[G, H, K]`` and an operand ``[B, K]``."""
    k = tl.arange(0, BLOCK_K)
    for k_start in range(0, K, BLOCK_K):
        column, row = (k_start + k)[None, :], (k_start + k)[:, None]
        operand = tl.load(operand_ptr + b * K + row, mask=mask_b & (row < K), other=0.0)
        w = load_tiles(w_ptr, h * K + column, (h < H) & (column < K), G, H * K)
        total = ()
        for g in tl.static_range(G):
            total = total + (dot(w[g], operand, gates[g], PRECISION),)
        gates = total
    return gates


@triton.jit
def start_gates(bias_ptr, h, zeros, G: tl.constexpr, H: tl.constexpr):
    """Accumulators that begin at the bias, or at zero without one."""
    gates = ()
    for g in tl.static_range(G):
        gate = zeros
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + g * H + h, mask=h < H, other=0.0).to(tl.float32)
        gates = gates + (gate,)
    return gates


@triton.jit(do_not_specialize=["B"])
def cell_forward_kernel(
    x_ptr,  # [B, I]         input
    h_ptr,  # [B, H]
    c_ptr,  # [B, H]         or None: a cell without c
    w_ih_ptr,  # [G, H, I]
    w_hh_ptr,  # [G, H, H]
    b_ih_ptr,  # [G, H]      or None
    b_hh_ptr,  # [G, H]      or None
    h_new_ptr,  # [B, H]
    c_new_ptr,  # [B, H]     or None, with c
    gates_ptr,  # [B, S, H]  what backward needs, or None
    B,
    I: tl.constexpr,  # noqa: E741
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,  # the step needs input gates and recurrent gates apart
    READS_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_B
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (h < H) & mask_b
    in_state = start * H + b * H + h
    zeros = tl.zeros([BLOCK_H, BLOCK_B], tl.float32)

    x = start_gates(b_ih_ptr, h, zeros, G, H)
    x = add_products(x, x_ptr + start * I, w_ih_ptr, h, b, mask_b, G, H, I, BLOCK_K, PRECISION)
    recurrent = start_gates(b_hh_ptr, h, zeros, G, H)
    if not SPLITS:  # one set of accumulators holds the sum
        total = ()
        for g in tl.static_range(G):
            total = total + (x[g] + recurrent[g],)
        recurrent = total
        x = start_gates(None, h, zeros, G, H)
    recurrent = add_products(
        recurrent, h_ptr + start * H, w_hh_ptr, h, b, mask_b, G, H, H, BLOCK_K, PRECISION
    )  # fmt: skip

    state = (zeros,)
    if READS_H:
        state = (tl.load(h_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    if c_ptr is not None:
        state = state + (tl.load(c_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    saved, state = STEP(x, recurrent, state, (), H)

    tl.store(h_new_ptr + in_state, state[0].to(h_new_ptr.dtype.element_ty), mask=mask)
    if c_new_ptr is not None:
        tl.store(c_new_ptr + in_state, state[1].to(c_new_ptr.dtype.element_ty), mask=mask)
    if gates_ptr is not None:
        store_tiles(gates_ptr + start * (S * H), b * (S * H) + h, saved, mask, H)


@triton.jit
def gate_gradients(
    dh_new_ptr, dc_new_ptr, gates_ptr, h_ptr, c_ptr, c_new_ptr, start, b, h, mask,
    S: tl.constexpr, H: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The step's backward at the hidden units h."""
    in_state = start * H + b * H + h
    dafter = (tl.load(dh_new_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    kept = ()
    if h_ptr is not None:
        kept = kept + (tl.load(h_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    if c_ptr is not None:
        dafter = dafter + (tl.load(dc_new_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
        kept = kept + (tl.load(c_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
        kept = kept + (tl.load(c_new_ptr + in_state, mask=mask, other=0.0).to(tl.float32),)
    saved = cast_tiles(load_tiles(gates_ptr + start * (S * H), b * (S * H) + h, mask, S, H), tl.float32)
    return STEP(saved, kept, dafter, (), H)


@triton.jit(do_not_specialize=["B"])
def cell_backward_kernel(
    dh_new_ptr,  # [B, H]
    dc_new_ptr,  # [B, H]    or None: a cell without c
    gates_ptr,  # [B, S, H]  what forward saved
    h_ptr,  # [B, H]         or None: the step does not read it
    c_ptr,  # [B, H]         or None, with dc_new
    c_new_ptr,  # [B, H]     or None, with dc_new
    w_ih_ptr,  # [G, H, I]
    w_hh_ptr,  # [G, H, H]
    dx_gates_ptr,  # [B, G, H]  gradient of the input gates
    dh_gates_ptr,  # [B, G, H]  gradient of the recurrent gates, or None: the same
    dx_ptr,  # [B, I]
    dh_ptr,  # [B, H]
    dc_ptr,  # [B, H]        or None, with dc_new
    B,
    I: tl.constexpr,  # noqa: E741
    G: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_B
    tile = tl.program_id(1)  # first the columns of dx, then those of dh
    tiles_x: tl.constexpr = tl.cdiv(I, BLOCK_N)
    of_x = tile < tiles_x
    if of_x:
        w_ptr, out_ptr, width, first = w_ih_ptr, dx_ptr, I, tile * BLOCK_N
    else:
        w_ptr, out_ptr, width, first = w_hh_ptr, dh_ptr, H, (tile - tiles_x) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    DTYPE: tl.constexpr = w_ih_ptr.dtype.element_ty

    acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for k_start in range(0, H, BLOCK_K):
        h = k_start + tl.arange(0, BLOCK_K)[:, None]
        k = k_start + tl.arange(0, BLOCK_K)[None, :]
        mask = (h < H) & mask_b
        dx, dh, dbefore, _ = gate_gradients(
            dh_new_ptr, dc_new_ptr, gates_ptr, h_ptr, c_ptr, c_new_ptr, start, b, h, mask, S, H, STEP
        )  # fmt: skip
        if tile == 0:
            store_tiles(dx_gates_ptr + start * (G * H), b * (G * H) + h, dx, mask, H)
            if dh_gates_ptr is not None:
                store_tiles(dh_gates_ptr + start * (G * H), b * (G * H) + h, dh, mask, H)
            if dc_ptr is not None:
                tl.store(dc_ptr + start * H + b * H + h, dbefore[1].to(dc_ptr.dtype.element_ty), mask=mask)
        for g in tl.static_range(G):
            dgate = dh[g]
            if dh_gates_ptr is not None:
                dgate = tl.where(of_x, dx[g], dgate)
            w = tl.load(w_ptr + (g * H + k) * width + n, mask=(n < width) & (k < H), other=0.0)
            acc = dot(w, dgate.to(DTYPE), acc, PRECISION)
    if h_ptr is not None:  # the step reads h outside the product, too
        dx, dh, dbefore, _ = gate_gradients(
            dh_new_ptr, dc_new_ptr, gates_ptr, h_ptr, c_ptr, c_new_ptr, start, b, n, (n < H) & mask_b, S, H, STEP
        )  # fmt: skip
        acc += tl.where(of_x, 0.0, dbefore[0])
    out = out_ptr + start * width + b * width + n
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=(n < width) & mask_b)


class Tiles(NamedTuple):
    """Rows of the batch, columns of the result, how far one product reaches; and who computes a tile."""

    rows: int
    columns: int
    reach: int
    num_warps: int
    num_stages: int


# Found by compiling: none spills. Backward is not pipelined, as most of what it loads feeds no product.
FORWARD, FORWARD_SCALAR = Tiles(16, 32, 32, 8, 2), Tiles(16, 32, 16, 8, 2)
BACKWARD, BACKWARD_SCALAR = Tiles(16, 64, 32, 4, 1), Tiles(16, 32, 16, 8, 1)


@on_device
def cell_forward(
    cell: str,
    x: Tensor,  # [B, I]
    h: Tensor,  # [B, H]
    c: Tensor | None,  # [B, H]
    w_ih: Tensor,  # [G*H, I]
    w_hh: Tensor,  # [G*H, H]
    b_ih: Tensor | None,  # [G*H]
    b_hh: Tensor | None,  # [G*H]
    *,
    save: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step; every tensor contiguous. Returns h, c (None without one) and, with ``save``, gates ``[B, S, H]``."""
    step = STEPS[cell]
    (B, I), H = x.shape, h.shape[1]  # noqa: E741
    h_new = torch.empty_like(h)
    c_new = None if c is None else torch.empty_like(c)
    gates = torch.empty(B, step.saved, H, dtype=h.dtype, device=h.device) if save else None
    tiles, constants = forward_plan(step, I, H, x.dtype, allow_tf32, limits(x.device))
    cell_forward_kernel[triton.cdiv(B, tiles.rows), triton.cdiv(H, tiles.columns)](
        x_ptr=x, h_ptr=h, c_ptr=c, w_ih_ptr=w_ih, w_hh_ptr=w_hh, b_ih_ptr=b_ih, b_hh_ptr=b_hh,
        h_new_ptr=h_new, c_new_ptr=c_new, gates_ptr=gates, B=B,
        **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **OPTIONS,
    )  # fmt: skip
    return h_new, c_new, gates


@on_device
def cell_backward(
    cell: str,
    dh_new: Tensor,  # [B, H]
    dc_new: Tensor | None,  # [B, H]
    gates: Tensor,  # [B, S, H]
    h: Tensor,  # [B, H]
    c: Tensor | None,  # [B, H]
    c_new: Tensor | None,  # [B, H]
    w_ih: Tensor,  # [G*H, I]
    w_hh: Tensor,  # [G*H, H]
    *,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the input gates and the recurrent gates (one tensor unless the cell splits them), x, h and c."""
    step = STEPS[cell]
    (B, H), I = h.shape, w_ih.shape[1]  # noqa: E741
    dx_gates = torch.empty(B, step.gates * H, dtype=h.dtype, device=h.device)
    dh_gates = torch.empty_like(dx_gates) if step.splits else None
    dx = torch.empty(B, I, dtype=h.dtype, device=h.device)
    dh = torch.empty_like(h)
    dc = None if c is None else torch.empty_like(c)
    tiles, constants = backward_plan(step, I, H, h.dtype, allow_tf32, limits(h.device))
    columns = triton.cdiv(I, tiles.columns) + triton.cdiv(H, tiles.columns)
    cell_backward_kernel[triton.cdiv(B, tiles.rows), columns](
        dh_new_ptr=dh_new, dc_new_ptr=dc_new, gates_ptr=gates, h_ptr=h if step.reads_h else None, c_ptr=c,
        c_new_ptr=c_new, w_ih_ptr=w_ih, w_hh_ptr=w_hh, dx_gates_ptr=dx_gates, dh_gates_ptr=dh_gates,
        dx_ptr=dx, dh_ptr=dh, dc_ptr=dc, B=B,
        **constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **OPTIONS,
    )  # fmt: skip
    return dx_gates, dx_gates if dh_gates is None else dh_gates, dx, dh, dc


def forward_plan(
    step: Step, I: int, H: int, dtype: torch.dtype, allow_tf32: bool, limits: Limits  # noqa: E741
) -> tuple[Tiles, dict[str, Any]]:  # fmt: skip
    """The tiles and the compile-time arguments of the forward kernel."""
    reads = precision(dtype, allow_tf32, limits)
    tiles = FORWARD_SCALAR if scalar(dtype, reads, limits) else FORWARD
    return tiles, {
        "I": I,
        "G": step.gates,
        "S": step.saved,
        "H": H,
        "STEP": step.forward,
        "SPLITS": step.splits,
        "READS_H": step.reads_h,
        "BLOCK_B": tiles.rows,
        "BLOCK_H": tiles.columns,
        "BLOCK_K": tiles.reach,
        "PRECISION": reads,
    }


def backward_plan(
    step: Step, I: int, H: int, dtype: torch.dtype, allow_tf32: bool, limits: Limits  # noqa: E741
) -> tuple[Tiles, dict[str, Any]]:  # fmt: skip
    """The tiles and the compile-time arguments of the backward kernel."""
    reads = precision(dtype, allow_tf32, limits)
    tiles = BACKWARD_SCALAR if scalar(dtype, reads, limits) else BACKWARD
    return tiles, {
        "I": I,
        "G": step.gates,
        "S": step.saved,
        "H": H,
        "STEP": step.backward,
        "BLOCK_B": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.reach,
        "PRECISION": reads,
    }


def configurations(limits: Limits = LIMITS["sm_90"]) -> Iterator[dict[str, Any]]:
    """The ways in which a device of these limits runs the cell kernels, at an even and at an odd size."""
    sizes = ((256, 256), (33, 100))
    for cell, (I, H), dtype, allow_tf32 in itertools.product(STOCK, sizes, DTYPES, (True, False)):  # noqa: E741
        step = STEPS[cell]
        reads = precision(dtype, allow_tf32, limits)
        if (
            (allow_tf32 and reads == "ieee")
            or (repeats(cell, dtype) and H != 100)
            or (H == 256 and dtype == torch.float32)
        ):
            continue
        name = f"{cell} I={I} H={H} {NAMES[dtype]} {reads}"
        c = dtype if step.cells else None
        split = dtype if step.splits else None
        forward = {
            "x_ptr": dtype,
            "h_ptr": dtype,
            "c_ptr": c,
            "w_ih_ptr": dtype,
            "w_hh_ptr": dtype,
            "b_ih_ptr": dtype,
            "b_hh_ptr": dtype,
            "h_new_ptr": dtype,
            "c_new_ptr": c,
            "gates_ptr": dtype,
        }
        plain = forward | {"b_ih_ptr": None, "b_hh_ptr": None, "gates_ptr": None}
        backward = {
            "dh_new_ptr": dtype,
            "dc_new_ptr": c,
            "gates_ptr": dtype,
            "h_ptr": dtype if step.reads_h else None,
            "c_ptr": c,
            "c_new_ptr": c,
            "w_ih_ptr": dtype,
            "w_hh_ptr": dtype,
            "dx_gates_ptr": dtype,
            "dh_gates_ptr": split,
            "dx_ptr": dtype,
            "dh_ptr": dtype,
            "dc_ptr": c,
        }
        tiles, constants = forward_plan(step, I, H, dtype, allow_tf32, limits)
        yield configuration(f"cell forward {name}", cell_forward_kernel, forward, constants, *tiles[3:])
        yield configuration(f"cell forward {name} plain", cell_forward_kernel, plain, constants, *tiles[3:])
        tiles, constants = backward_plan(step, I, H, dtype, allow_tf32, limits)
        yield configuration(f"cell backward {name}", cell_backward_kernel, backward, constants, *tiles[3:])
