"""A whole sequence of a recurrent layer with the weight spread over the programs of a grid.

For weights too large for one program. A program owns ``UNITS`` hidden units of one direction and a tile of the batch:
all gate rows of these units stay with it through the whole sequence, and so do their cells. What crosses programs is
the operand of the recurrent product: in forward the state h, in backward the gradients of the recurrent gates. It goes
through memory, in the type of the product, in two buffers that take turns; the programs that share a tile of the batch
(a group) wait for each other once per step, no others. Every program must be on the device at the same time, so the
launch is cooperative, and ``plan`` refuses a grid that does not fit.

The idea of keeping recurrent weights on chip is Diamos et al.'s (Persistent RNNs, 2016).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import (
    INTERPRETED,
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
from .plan import Plan
from .steps import STEPS, Step

LINE = tl.constexpr(32)  # counters are so many int32 apart: none shares a cache line with another
SPIN_LIMIT = 0  # for debugging: how often a program looks before it gives up and the launcher raises; 0 for ever

# Only the first thread looks. The others go on to the barrier behind the loop, which orders them after its acquire.
ARRIVALS = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    mov.u32 $0, 0x7fffffff;
    @first ld.acquire.gpu.global.u32 $0, [$1];
}""")


# --- waiting for each other ---


@triton.jit
def arrive(counter_ptr):
    """Makes what this program has published visible to its group, and says so."""
    tl.debug_barrier()  # the release is one thread's, the stores were everybody's
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def arrivals(counter_ptr):
    if INTERPRETED:  # which knows no other way to acquire
        return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    else:
        return tl.inline_asm_elementwise(ARRIVALS, "=r,l", [counter_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(counter_ptr, expected, stuck_ptr, patience, SPIN_LIMIT: tl.constexpr):
    """Waits for so many arrivals. Returns the patience left: none after a wait in vain, which is noted."""
    if SPIN_LIMIT == 0:
        while arrivals(counter_ptr) < expected:
            pass
    else:
        seen = arrivals(counter_ptr)
        looks = 0
        while (seen < expected) & (looks < patience):
            seen = arrivals(counter_ptr)
            looks += 1
        if (seen < expected) & (patience > 0):
            tl.store(stuck_ptr, expected)
            tl.store(stuck_ptr + 1, seen)
            patience = 0
    tl.debug_barrier()
    return patience


@triton.jit
def buffer_of(s):
    """Which of the two buffers holds what step s reads; the one before may still be read by the slow."""
    return s % 2


# --- the product ---


@triton.jit
def rows_of(M: tl.constexpr, PARTS: tl.constexpr):
    """The numbers of the rows of a weight tile, ``[M, 1]`` or ``[1, M, 1]``."""
    r = tl.arange(0, M)[:, None]
    if PARTS > 1:
        r = r[None, :, :]
    return r


@triton.jit
def depth_of(j, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """What the j-th chunk of a product adds up, ``[BLOCK_K]`` or ``[PARTS, BLOCK_K // PARTS]``."""
    if PARTS > 1:  # not a reshape, in which Triton 3.6 loses sight of neighbours
        PART: tl.constexpr = BLOCK_K // PARTS
        return j * BLOCK_K + tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    else:
        return j * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def multiply(
    w, exchange_ptr, buffer, lane, lanes,
    M: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``w @`` what the group has published, ``[M, BLOCK_B]``.

    It is read past the first-level cache, which may hold what was. The tiles of w are ``[M, BLOCK_K]``, or as many
    parts as there are warps, ``[PARTS, M, BLOCK_K // PARTS]``: then each warp adds up a part, in a shorter chain.
    """
    b = tl.arange(0, BLOCK_B)[None, :]
    product = tl.zeros([M, BLOCK_B], tl.float32)
    if PARTS > 1:
        b = b[None, :, :]
        product = tl.zeros([PARTS, M, BLOCK_B], tl.float32)
    slot = exchange_ptr + (lanes.to(tl.int64) * buffer + lane) * (BLOCK_B * WIDTH)
    for j in tl.static_range(len(w)):
        k = tl.expand_dims(depth_of(j, BLOCK_K, PARTS), -1)
        operand = tl.load(slot + b * WIDTH + k, mask=k < K, other=0.0, cache_modifier=".cg")
        product = dot(w[j], operand, product, PRECISION)
    if PARTS > 1:
        product = tl.sum(product, axis=0)
    return product


@triton.jit
def split_rows(product, N: tl.constexpr, UNITS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The N tiles ``[UNITS, BLOCK_B]`` that lie one upon the other; N is a power of two."""
    if N == 1:
        tiles = (product,)
    elif N == 2:
        tiles = tl.split(tl.permute(tl.reshape(product, (2, UNITS, BLOCK_B)), (1, 2, 0)))
    elif N == 4:
        even, odd = tl.split(tl.permute(tl.reshape(product, (2, 2, UNITS, BLOCK_B)), (2, 3, 0, 1)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        tiles = (first, second, third, fourth)
    else:
        tl.static_assert(N == 8, "a step has at most eight gates")
        low, high = tl.split(tl.permute(tl.reshape(product, (2, 4 * UNITS, BLOCK_B)), (1, 2, 0)))
        tiles = split_rows(low, 4, UNITS, BLOCK_B) + split_rows(high, 4, UNITS, BLOCK_B)
    return tiles


@triton.jit
def publish(
    exchange_ptr, buffer, tiles, u, b, lane, lanes, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """This program's units of what the group multiplies next."""
    slot = exchange_ptr + (lanes.to(tl.int64) * buffer + lane) * (BLOCK_B * WIDTH)
    store_tiles(slot, b * WIDTH + u, tiles, u < H, H)


# --- forward ---


@triton.jit(do_not_specialize=["T", "B"])
def persistent_forward_kernel(
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
    exchange_ptr,  # [2, D, groups, BLOCK_B, WIDTH]  the operand of the product
    counters_ptr,  # [D, groups, LINE]  arrivals, from zero
    stuck_ptr,  # [D, groups, SLICES, 2]  what a program waited for in vain, what it saw; or None
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
    UNITS: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    group = tl.program_id(0) // SLICES
    d = tl.program_id(1)
    lanes = tl.num_programs(0) // SLICES * D
    lane = d * (tl.num_programs(0) // SLICES) + group
    start = group * BLOCK_B
    own = tl.program_id(0) % SLICES * UNITS
    u = own + tl.arange(0, UNITS)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (u < H) & mask_b
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDTH: tl.constexpr = CHUNKS * BLOCK_K
    counter_ptr = counters_ptr + lane * LINE
    if SPIN_LIMIT > 0:
        stuck_ptr += (d * tl.num_programs(0) + tl.program_id(0)) * 2
    patience = tl.full((), SPIN_LIMIT, tl.int32)

    w = ()  # the rows of a gate lie together, so that the product's tiles can be told apart
    r = rows_of(ROWS * UNITS, PARTS)
    for j in tl.static_range(CHUNKS):
        k = tl.expand_dims(depth_of(j, BLOCK_K, PARTS), -2)
        mask_w = (r < G * UNITS) & (own + r % UNITS < H) & (k < H)
        at = (r // UNITS * H + own + r % UNITS) * H + k
        w = w + (tl.load(w_ptr + d * (G * H * H) + at, mask=mask_w, other=0.0),)
    bias = ()
    if bias_ptr is not None:
        bias = cast_tiles(load_tiles(bias_ptr + d * (G * H), u, u < H, G, H), tl.float32)
    params = ()
    if params_ptr is not None:
        params = cast_tiles(load_tiles(params_ptr + d * (K * H), u, u < H, K, H), tl.float32)
    first = B.to(tl.int64) * d + start
    state = initial_state(h0_ptr, c0_ptr, first, b, u, mask, C, H)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + first * H + b * H + u, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    t = time_of(0, T, d)
    x = load_tiles(x_ptr + row_of(t, start, d, B, D) * (G * H), b * (D * G * H) + u, mask, G, H)
    read = state
    if reset_ptr is not None:
        read = keep_tiles(tl.load(reset_ptr + B.to(tl.int64) * t + start + b, mask=mask_b, other=0) == 0, state)
    operand = ((read[0] * scale).to(DTYPE),)
    publish(exchange_ptr, buffer_of(0), operand, u, b, lane, lanes, WIDTH, BLOCK_B, H)
    arrive(counter_ptr)
    for s in range(T):
        t = time_of(s, T, d)
        row = row_of(t, start, d, B, D)
        # What is read from here to the wait comes while the others are awaited; the last step reads its own again.
        t_next = time_of(tl.minimum(s + 1, T - 1), T, d)
        x_next = load_tiles(x_ptr + row_of(t_next, start, d, B, D) * (G * H), b * (D * G * H) + u, mask, G, H)
        if reset_ptr is not None:
            reset_next = tl.load(reset_ptr + B.to(tl.int64) * t_next + start + b, mask=mask_b, other=0)
        stay = staying(stay_ptr, row, b, u, mask, D, C + 1, H)
        patience = wait(counter_ptr, (s + 1) * SLICES, stuck_ptr, patience, SPIN_LIMIT)

        product = multiply(
            w, exchange_ptr, buffer_of(s), lane, lanes, ROWS * UNITS, WIDTH, H, BLOCK_B, BLOCK_K, PARTS, PRECISION
        )
        h = split_rows(product, ROWS, UNITS, BLOCK_B)
        if bias_ptr is not None:
            h = add_tiles(bias, h)
        gates, new = STEP(cast_tiles(x, tl.float32), h, read, params, H)
        if stay_ptr is not None:
            new = zone_out(stay, new, read)
        if lengths_ptr is not None:
            alive = t < length
            state = select_tiles(alive, new, state)
            new = keep_tiles(alive, new)
        else:
            state = new
        read = state
        if reset_ptr is not None:
            read = keep_tiles(reset_next == 0, state)

        operand = ((read[0] * scale).to(DTYPE),)
        publish(exchange_ptr, buffer_of(s + 1), operand, u, b, lane, lanes, WIDTH, BLOCK_B, H)
        arrive(counter_ptr)
        # For these nobody waits: they come after what the others wait for.
        store_tiles(y_ptr + row * H, b * (D * H) + u, new[:1], mask, H)
        if cells_ptr is not None:
            store_tiles(cells_ptr + row * (C * H), b * (D * C * H) + u, new[1:], mask, H)
        if gates_ptr is not None:
            store_tiles(gates_ptr + row * (S * H), b * (D * S * H) + u, gates, mask, H)
        x = x_next

    store_state(h_n_ptr, c_n_ptr, first, b, u, state, mask, C, H)


# --- backward ---


@triton.jit(do_not_specialize=["T", "B"])
def persistent_backward_kernel(
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
    dparams_ptr,  # [groups, D, K, H]  fp32, sums over a group's rows and time, or None, with params
    exchange_ptr,  # [2, D, groups, BLOCK_B, WIDTH]  the operand of the product
    counters_ptr,  # [D, groups, LINE]  arrivals, from zero
    stuck_ptr,  # [D, groups, SLICES, 2]  what a program waited for in vain, what it saw; or None
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
    UNITS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    group = tl.program_id(0) // SLICES
    d = tl.program_id(1)
    lanes = tl.num_programs(0) // SLICES * D
    lane = d * (tl.num_programs(0) // SLICES) + group
    start = group * BLOCK_B
    own = tl.program_id(0) % SLICES * UNITS
    u = own + tl.arange(0, UNITS)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask_b = start + b < B
    mask = (u < H) & mask_b
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDTH: tl.constexpr = CHUNKS * BLOCK_K
    counter_ptr = counters_ptr + lane * LINE
    if SPIN_LIMIT > 0:
        stuck_ptr += (d * tl.num_programs(0) + tl.program_id(0)) * 2
    patience = tl.full((), SPIN_LIMIT, tl.int32)

    w = ()  # transposed: of all gate rows the columns of these units
    r = own + rows_of(UNITS, PARTS)
    for j in tl.static_range(CHUNKS):
        k = tl.expand_dims(depth_of(j, BLOCK_K, PARTS), -2)
        w = w + (tl.load(w_ptr + d * (G * H * H) + k * H + r, mask=(r < H) & (k < G * H), other=0.0),)
    params = ()
    if params_ptr is not None:
        params = cast_tiles(load_tiles(params_ptr + d * (K * H), u, u < H, K, H), tl.float32)
    total = ()  # of the parameters' gradients
    for _ in tl.static_range(K):
        total = total + (tl.zeros([UNITS, BLOCK_B], tl.float32),)
    first = B.to(tl.int64) * d + start
    dstate = initial_state(dh_n_ptr, dc_n_ptr, first, b, u, mask, C, H)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + first * H + b * H + u, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + start + b, mask=mask_b, other=0)

    row = row_of(time_of(T - 1, T, d), start, d, B, D)
    dout, saved, kept = arriving(
        dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row, b, u, mask, D, S, C, H
    )  # fmt: skip
    stay = staying(stay_ptr, row, b, u, mask, D, C + 1, H)
    for s in range(T):
        t = time_of(T - 1 - s, T, d)
        row = row_of(t, start, d, B, D)
        dafter = (dstate[0] + dout[0].to(tl.float32),)
        if dcells_ptr is not None:
            dafter = dafter + add_tiles(dstate[1:], dout[1:])
        else:
            dafter = dafter + dstate[1:]
        around = ()  # the step, through zoneout
        if stay_ptr is not None:
            dafter, around = zone_out_backward(stay, dafter)
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
        total = add_tiles(total, dparams)
        publish(exchange_ptr, buffer_of(s), cast_tiles(dh, DTYPE), u, b, lane, lanes, WIDTH, BLOCK_B, H)
        arrive(counter_ptr)

        # For these nobody waits, and what is read from here to the wait comes while the others are awaited.
        store_tiles(dx_ptr + row * (G * H), b * (D * G * H) + u, dx, mask, H)
        if dh_ptr is not None:
            store_tiles(dh_ptr + row * (G * H), b * (D * G * H) + u, dh, mask, H)
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + B.to(tl.int64) * t + start + b, mask=mask_b, other=0)
        row_next = row_of(time_of(tl.maximum(T - 2 - s, 0), T, d), start, d, B, D)
        dout, saved, kept = arriving(
            dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row_next, b, u, mask, D, S, C, H
        )  # fmt: skip
        stay = staying(stay_ptr, row_next, b, u, mask, D, C + 1, H)
        patience = wait(counter_ptr, (s + 1) * SLICES, stuck_ptr, patience, SPIN_LIMIT)

        through = multiply(
            w, exchange_ptr, buffer_of(s), lane, lanes, UNITS, WIDTH, G * H, BLOCK_B, BLOCK_K, PARTS, PRECISION
        )
        dbefore = (dbefore[0] + through * scale,) + dbefore[1:]
        if reset_ptr is not None:
            dbefore = keep_tiles(reset == 0, dbefore)
        if lengths_ptr is not None:
            dbefore = select_tiles(alive, dbefore, dstate)
        dstate = dbefore

    store_state(dh0_ptr, dc0_ptr, first, b, u, dstate, mask, C, H)
    if dparams_ptr is not None:
        out = dparams_ptr + (group * D + d).to(tl.int64) * (K * H) + own + tl.arange(0, UNITS)
        for n in tl.static_range(K):
            tl.store(out + n * H, tl.sum(tl.where(mask, total[n], 0.0), axis=1), mask=own + tl.arange(0, UNITS) < H)


# --- launching ---


@on_device
def persistent_forward(
    cell: str,
    x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    params: Tensor | None,
    scale: Tensor | None,
    stay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    save: bool,
    how: Plan,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``sequence_forward`` of a layer without a projection, over a grid of programs."""
    step = STEPS[cell]
    T, B, D, _ = x.shape
    H = w_hh.shape[2]
    like = {"dtype": x.dtype, "device": x.device}
    y = torch.empty(T, B, D, H, **like)
    h_n = torch.empty_like(h0)
    c_n = None if c0 is None else torch.empty_like(c0)
    cells = None if c0 is None else torch.empty(T, B, D, step.cells * H, dtype=torch.float32, device=x.device)
    gates = torch.empty(T, B, D, step.saved, H, **like) if save else None
    fixed = forward_constants(step, how, D, H)
    meeting = Meeting(x, how, fixed)
    persistent_forward_kernel[meeting.grid](
        x_ptr=x, w_ptr=w_hh, bias_ptr=b_hh, h0_ptr=h0, c0_ptr=c0, params_ptr=params, scale_ptr=scale, stay_ptr=stay,
        reset_ptr=reset, lengths_ptr=lengths, y_ptr=y, h_n_ptr=h_n, c_n_ptr=c_n, cells_ptr=cells, gates_ptr=gates,
        **meeting.tensors, T=T, B=B, **fixed,
        num_warps=how.num_warps, num_stages=1, launch_cooperative_grid=True, **OPTIONS,
    )  # fmt: skip
    meeting.check()
    return y, h_n, c_n, cells, gates


@on_device
def persistent_backward(
    cell: str,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    gates: Tensor,
    after: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor | None,
    w_hh: Tensor,
    params: Tensor | None,
    scale: Tensor | None,
    stay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    how: Plan,
) -> tuple[Tensor, Tensor, None, Tensor, Tensor | None, Tensor | None]:
    """``sequence_backward`` of a layer without a projection, over a grid of programs."""
    step = STEPS[cell]
    T, B, D, H = dy.shape
    dx = torch.empty(T, B, D, step.gates * H, dtype=dy.dtype, device=dy.device)
    dh = torch.empty_like(dx) if step.splits else None
    dh0 = torch.empty_like(dh_n)
    dc0 = None if dc_n is None else torch.empty_like(dc_n)
    fixed = backward_constants(step, how, D, H)
    meeting = Meeting(dy, how, fixed)
    dparams = None
    if params is not None:
        dparams = torch.empty(meeting.groups, *params.shape, dtype=torch.float32, device=dy.device)
    persistent_backward_kernel[meeting.grid](
        dy_ptr=dy, dh_n_ptr=dh_n, dc_n_ptr=dc_n, dcells_ptr=dcells, gates_ptr=gates, cells_ptr=after,
        h_prev_ptr=h_prev if step.reads_h else None, c_prev_ptr=c_prev, w_ptr=w_hh, params_ptr=params,
        scale_ptr=scale, stay_ptr=stay, reset_ptr=reset, lengths_ptr=lengths, dx_ptr=dx, dh_ptr=dh, dh0_ptr=dh0,
        dc0_ptr=dc0, dparams_ptr=dparams, **meeting.tensors, T=T, B=B, **fixed,
        num_warps=how.num_warps, num_stages=1, launch_cooperative_grid=True, **OPTIONS,
    )  # fmt: skip
    meeting.check()
    dparams = None if params is None else dparams.sum(0).to(params.dtype)
    return dx, dx if dh is None else dh, None, dh0, dc0, dparams


class Meeting:
    """The grid of one launch and the memory through which its programs meet."""

    def __init__(self, like: Tensor, how: Plan, fixed: dict[str, Any]) -> None:
        self.B, self.D, self.slices = like.shape[1], like.shape[2], fixed["SLICES"]
        self.groups = triton.cdiv(self.B, how.block_b)
        self.grid = (self.groups * self.slices, self.D)
        lanes, width = self.D * self.groups, fixed["CHUNKS"] * fixed["BLOCK_K"]
        self.tensors = {
            "exchange_ptr": torch.empty(2, lanes, how.block_b, width, dtype=like.dtype, device=like.device),
            "counters_ptr": torch.zeros(lanes, LINE.value, dtype=torch.int32, device=like.device),
            "stuck_ptr": None,
        }
        if SPIN_LIMIT:
            shape = self.D, self.groups, self.slices, 2
            self.tensors["stuck_ptr"] = torch.zeros(shape, dtype=torch.int32, device=like.device)

    def check(self) -> None:
        """When debugging, say who waited in vain."""
        stuck = self.tensors["stuck_ptr"]
        if stuck is None or not stuck.any():
            return
        waits = [
            f"direction {d}, group {group}, slice {piece} saw {stuck[d, group, piece, 1]} of "
            f"{stuck[d, group, piece, 0]} arrivals"
            for d, group, piece in stuck[..., 0].nonzero().tolist()
        ]
        raise RuntimeError(f"programs waited in vain: {'; '.join(waits)}")


def forward_constants(step: Step, how: Plan, D: int, H: int) -> dict[str, Any]:
    rows = triton.next_power_of_2(step.gates)
    return constants(step, step.forward, how, D, H) | {"ROWS": rows} | product_constants(how, rows * how.units, H)


def backward_constants(step: Step, how: Plan, D: int, H: int) -> dict[str, Any]:
    return constants(step, step.backward, how, D, H) | product_constants(how, how.units, step.gates * H)


def constants(step: Step, function: triton.JITFunction, how: Plan, D: int, H: int) -> dict[str, Any]:
    """The compile-time arguments of both kernels, but for those of the product."""
    return {
        "D": D,
        "G": step.gates,
        "S": step.saved,
        "C": step.cells,
        "K": step.params,
        "H": H,
        "STEP": function,
        "BLOCK_B": how.block_b,
        "UNITS": how.units,
        "SLICES": triton.cdiv(H, how.units),
        "PRECISION": how.precision,
        "SPIN_LIMIT": SPIN_LIMIT,
    }


def product_constants(how: Plan, rows: int, depth: int) -> dict[str, int]:
    """How a product of so many rows is divided over its depth.

    The chunks are the largest powers of two that pad the depth no more than those of ``block_h`` do, up to 512: of
    larger ones the operand takes too many registers. A warp group multiplies 64 rows at once; where there are fewer,
    each warp takes a part of the depth.
    """
    least = min(how.block_h & -how.block_h, 512)
    sizes = [size for size in (512, 256, 128, 64, 32, 16) if size >= least]
    chunk = next((size for size in sizes if -depth % size == -depth % least), least)
    parts = 1 if rows % 64 == 0 else min(how.num_warps, chunk // 16)
    return {"BLOCK_K": chunk, "CHUNKS": triton.cdiv(depth, chunk), "PARTS": parts}


def configurations_for(
    cell: str, H: int, dtype: torch.dtype, allow_tf32: bool, how: Plan, all_options: bool = False
) -> list[dict[str, Any]]:
    """How forward and backward of a plan are launched, plain or with everything, as compiling them wants it."""
    step, D = STEPS[cell], 2 if all_options else 1
    c, c32 = (dtype, torch.float32) if step.cells else (None, None)
    params = dtype if step.params else None
    common = {
        "params_ptr": params,
        "scale_ptr": dtype if all_options else None,
        "stay_ptr": torch.bool if all_options else None,
        "reset_ptr": torch.bool if all_options else None,
        "lengths_ptr": torch.int64 if all_options else None,
        "exchange_ptr": dtype,
        "counters_ptr": torch.int32,
        "stuck_ptr": torch.int32 if SPIN_LIMIT else None,
    }
    forward = common | {
        "x_ptr": dtype,
        "w_ptr": dtype,
        "bias_ptr": dtype if step.splits else None,
        "h0_ptr": dtype,
        "c0_ptr": c,
        "y_ptr": dtype,
        "h_n_ptr": dtype,
        "c_n_ptr": c,
        "cells_ptr": c32,
        "gates_ptr": dtype,
    }
    backward = common | {
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
        "dparams_ptr": torch.float32 if step.params else None,
    }
    split = f"{how.block_b}x{how.units} {how.num_warps} warps"
    name = f"{cell} H={H} {NAMES[dtype]} {how.precision} {split}{' all options' if all_options else ''}"
    return [
        configuration(
            f"persistent forward {name}", persistent_forward_kernel, forward,
            forward_constants(step, how, D, H), how.num_warps,
        ),
        configuration(
            f"persistent backward {name}", persistent_backward_kernel, backward,
            backward_constants(step, how, D, H), how.num_warps,
        ),
    ]  # fmt: skip
