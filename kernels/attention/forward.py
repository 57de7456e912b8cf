"""Attention forward: output and log-sum-exp in one pass over the keys, the weights, if wanted, in a second.

A program owns a tile of queries and walks over the keys that any of them sees, keeping a running maximum (m), sum (l)
and output (acc) for each query, as in FlashAttention (Dao et al., 2022) after Milakov and Gimelshein (2018). Tiles of
keys that all of the queries see, in the middle of the walk, are spared the masks.

Letters: B batch, or z the packed sequence; N query heads, M key heads; i numbers queries, j keys, rows and offs_n the
same within a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import NAMES, OPTIONS, configuration, dot
from ..limits import Limits, limits
from .decode import decode_forward, splits
from .plan import (
    Tiles,
    block,
    forward_tiles,
    has_any,
    kept,
    per_query,
    position_tiles,
    position_weights_tiles,
    positions,
    precision,
    relative,
    strides,
    weights_tiles,
)
from .relative import askew, products, skewed, window_of
from .scores import (
    LN2,
    LOG2E,
    at_row,
    dropout_keep,
    dropout_keys,
    dropout_threshold,
    keys_of,
    keys_of_all,
    level_of,
    level_of_lse,
    load_segments,
    load_tile,
    scores_of_tile,
    sequence_at,
    visible_in_tile,
    weight_of,
)


@triton.jit(do_not_specialize=["Q", "K", "blocks", "N"])
def live_ranges_kernel(
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,  # [B, N, Q, K]  bool
    live_ptr,  # [B, N, blocks, 3]
    Q, K, blocks, N,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    n = index // blocks % N
    b = index // blocks // N
    start = index % blocks * BLOCK
    mask_ptr = at_row(at_row(at_row(mask_ptr, b, stride_mb), n, stride_mn), start, stride_mq)
    rows, offs_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    inside = (start + rows < Q)[:, None]
    low, high, gap = K, 0, K
    for first in tl.range(0, K, BLOCK_K):
        j = first + offs_k
        ptrs = at_row(mask_ptr, first, stride_mk) + (rows[:, None] * stride_mq + offs_k[None, :] * stride_mk)
        visible = tl.load(ptrs, mask=inside & (j < K)[None, :], other=0) != 0
        by_any = tl.max(visible.to(tl.int32), 0) != 0
        by_all = tl.min((visible | (inside == 0)).to(tl.int32), 0) != 0
        low = tl.minimum(low, tl.min(tl.where(by_any, j, K), 0))
        high = tl.maximum(high, tl.max(tl.where(by_any, j + 1, 0), 0))
        gap = tl.minimum(gap, tl.min(tl.where((j >= low) & (by_all == 0), j, K), 0))
    live_ptr += index.to(tl.int64) * 3
    tl.store(live_ptr, low)
    tl.store(live_ptr + 1, high)
    tl.store(live_ptr + 2, tl.maximum(low, gap))


def live_columns(rows: int) -> int:
    """Keys of a tile of so many queries: of one row, a mask of keys, as many as keep a program busy."""
    return max(64, 4096 // rows)


def live_ranges(mask: Tensor, block: int) -> Tensor:
    """Which keys a bool mask ``[B, N, Q, K]`` shows to each block of queries: ``[B, N, blocks, 3]`` int32.

    That is ``low, high, gap``: nobody in the block sees a key outside of [low, high), all of it see all of
    [low, gap); the block sees nothing if low >= high. The mask comes expanded: what has stride 0 is computed once,
    and has stride 0 in the result. For the queries that see a block of keys, pass ``mask.mT``.
    """
    shape = mask.shape
    once = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride()[:3])]
    B, N, Q, K = once.shape
    rows = min(block, triton.next_power_of_2(Q))
    blocks = triton.cdiv(Q, block)
    live = torch.empty(B, N, blocks, 3, dtype=torch.int32, device=mask.device)
    with torch.cuda.device_of(mask):
        live_ranges_kernel[(B * N * blocks,)](
            mask_ptr=once, **strides("m", "bnqk", once), live_ptr=live,
            Q=Q, K=K, blocks=blocks, N=N,
            BLOCK=block, ROWS=rows, BLOCK_K=live_columns(rows), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return live.expand(shape[0], shape[1], triton.cdiv(shape[2], block), 3)


@triton.jit
def attend(
    m, l, acc, q, low, high,  # noqa: E741
    k_ptr, stride_kk, stride_kd,
    v_ptr, stride_vk, stride_ve,
    bias_ptr, stride_bq, stride_bk,
    mask_ptr, stride_mq, stride_mk,
    distance, position, segment, ranks,  # tuples whose first is None where there is none
    first_key, second_key,
    start, Q, K, shift, left, right, threshold, scale, softcap,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output after the keys from low to high, of which all are visible if not MASKED."""
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    ADDED: tl.constexpr = HAS_BIAS or distance[0] is not None or segment[0] is not None
    rows, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    i = start + rows
    RING: tl.constexpr = position[0] is not None and not CAREFUL  # tiles are square: half a window serves the next one
    if RING:
        before = products(position, window_of(start, low, position[4], BLOCK_N), P, PRECISION)
    STAGES: tl.constexpr = 1 if CAREFUL else None
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        j = first + offs_n
        seen = j < K
        if MASKED and mask_ptr is not None and not MASK_PER_QUERY:  # what is hidden from all is not even read
            seen = seen & (tl.load(at_row(mask_ptr, first, stride_mk) + offs_n * stride_mk, mask=seen, other=0) != 0)
        k = load_tile(
            at_row(k_ptr, first, stride_kk), offs_n[None, :], stride_kk, offs_d[:, None], stride_kd, seen[None, :],
            D, MASKED,
        )  # fmt: skip
        qk = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if RING:
            after = products(position, window_of(start, first, position[4], BLOCK_N) + BLOCK_N, P, PRECISION)
            qk += skewed(before, after, 1)
            before = after
        elif position[0] is not None:
            qk += askew(position, start, first, BLOCK_N, P, PRECISION)
        visible = seen[None, :]
        if MASKED:
            mask_here = mask_ptr
            if mask_ptr is not None:
                mask_here = at_row(mask_ptr, first, stride_mk)
            visible = visible_in_tile(
                rows, i, offs_n, j, seen, Q, shift, left, right, mask_here, stride_mq, stride_mk, ranks,
                HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY,
            )  # fmt: skip
        bias_here = bias_ptr
        if HAS_BIAS:
            bias_here = at_row(bias_ptr, first, stride_bk)
        distance_here = distance
        if distance[0] is not None:
            distance_here = distance + (first - start - (BLOCK_M - 1) + distance[1],)
        s = scores_of_tile(
            qk, visible, rows, i, offs_n, j, seen, Q, bias_here, stride_bq, stride_bk, distance_here, segment,
            scale, softcap, HAS_SOFTCAP, BIAS_PER_QUERY, MASKED,
        )  # fmt: skip
        m_next = tl.maximum(m, level_of(tl.max(s, 1), scale, ADDED, HAS_SOFTCAP))
        level = m_next
        if MASKED or ADDED:  # a row may have seen nothing yet
            level = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = weight_of(s, level[:, None], scale, ADDED, HAS_SOFTCAP)
        if ADDED:
            decay = tl.exp2((m - level) * LOG2E)
        else:
            decay = tl.exp2(m - level)
        m = m_next
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        acc = acc * decay[:, None]
        if HAS_DROPOUT:
            p = tl.where(dropout_keep(first_key[:, None], second_key[:, None], j[None, :], threshold), p, 0.0)
        v = load_tile(
            at_row(v_ptr, first, stride_vk), offs_n[:, None], stride_vk, offs_e[None, :], stride_ve, seen[:, None],
            E, MASKED,
        )  # fmt: skip
        if CAREFUL:
            v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
    return m, l, acc


@triton.jit
def spoiled(
    low, high,
    v_ptr, stride_vk, stride_ve,
    mask_ptr, stride_mq, stride_mk, ranks,
    start, Q, K, shift, left, right,
    E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """NaN where a query sees a value that is not finite, else 0: an output to begin with."""
    rows, offs_n, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    i = start + rows
    count = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for first in tl.range(low, high, BLOCK_N, num_stages=1):
        j = first + offs_n
        seen = j < K
        mask_here = mask_ptr
        if mask_ptr is not None:
            mask_here = at_row(mask_ptr, first, stride_mk)
            if not MASK_PER_QUERY:
                seen = seen & (tl.load(mask_here + offs_n * stride_mk, mask=seen, other=0) != 0)
        visible = visible_in_tile(
            rows, i, offs_n, j, seen, Q, shift, left, right, mask_here, stride_mq, stride_mk, ranks,
            HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY,
        )  # fmt: skip
        v = load_tile(
            at_row(v_ptr, first, stride_vk), offs_n[:, None], stride_vk, offs_e[None, :], stride_ve, seen[:, None],
            E, True,
        )  # fmt: skip
        bad = (tl.abs(v.to(tl.float32)) < float("inf")) == 0
        count = dot(visible.to(tl.float16), bad.to(tl.float16), count, "ieee")
    return tl.where(count > 0, float("nan"), 0.0)


@triton.jit(
    do_not_specialize=[
        "B", "N", "M", "R", "Q", "K", "blocks", "left", "right", "threshold",
        "distance_zero", "distance_last", "position_zero", "position_last",
    ]
)  # fmt: skip
def attention_forward_kernel(
    q_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    k_ptr, stride_kb, stride_km, stride_kk, stride_kd,  # [B, M, K, D]
    v_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,  # [B, N, Q, K]     or None
    distance_ptr, stride_xb, stride_xn,  # [B, N, distance_last + 1]          or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,  # [B, R, position_last + 1, P]
    segment_ptr,  # [B, N, Q, 2]        or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,  # [B, N, Q, K]     bool, or None
    live_ptr, stride_lb, stride_ln, stride_lq,  # [B, N, blocks, 3]           with mask: of live_ranges
    cu_q_ptr, cu_k_ptr,  # [B+1]        where packed sequences begin, or None; then there is one batch, and B of them
    seed_ptr,  # [1]                    with dropout, or None
    segment_q_ptr, segment_k_ptr,  # [B, Q] [B, K]  with segment
    rank_q_ptr, stride_ab, stride_an,  # [B, N, Q]  or None
    rank_k_ptr, stride_cb,  # [B, K]
    out_ptr,  # [B, Q, N, E]
    lse_ptr,  # [B, N, Q]
    factor_ptr,  # [B, N, Q]            what exp(score - lse) must be multiplied by, for lse is rounded, or None
    N, M, R, Q, K, blocks, left, right, threshold,
    distance_zero, distance_last, position_zero, position_last,
    scale, softcap, kept,  # kept: what a kept weight is multiplied by
    LOWER_RIGHT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    n = index // blocks % N
    z = index // blocks // N
    tile = index % blocks
    if HAS_RIGHT:
        tile = blocks - 1 - tile  # the last queries see the most keys: they begin first
    start = tile * BLOCK_M
    b = z
    if cu_q_ptr is not None:
        b = 0
    first_q, Q_here = sequence_at(cu_q_ptr, z, Q)
    first_k, K_here = sequence_at(cu_k_ptr, z, K)
    if start >= Q_here:
        return
    shift = 0
    if LOWER_RIGHT:
        shift = K_here - Q_here

    rows, offs_d, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    i = start + rows
    q_ptr = at_row(at_row(at_row(q_ptr, b, stride_qb), n, stride_qn), first_q + start, stride_qq)
    k_ptr = at_row(at_row(at_row(k_ptr, b, stride_kb), n // (N // M), stride_km), first_k, stride_kk)
    v_ptr = at_row(at_row(at_row(v_ptr, b, stride_vb), n // (N // M), stride_vm), first_k, stride_vk)
    q = load_tile(q_ptr, rows[:, None], stride_qq, offs_d[None, :], stride_qd, (i < Q_here)[:, None], D, True)

    # Keys [low, high) are seen by any of these queries, keys [all_low, all_high) by all of them.
    last = tl.minimum(start + BLOCK_M, Q_here) - 1
    low, high = keys_of(start, last, shift, left, right, K_here, HAS_LEFT, HAS_RIGHT)
    all_low, all_high = keys_of_all(start, last, shift, left, right, K_here, HAS_LEFT, HAS_RIGHT)
    if bias_ptr is not None:
        bias_ptr = at_row(at_row(at_row(bias_ptr, b, stride_bb), n, stride_bn), start, stride_bq)
    if mask_ptr is not None:
        mask_ptr = at_row(at_row(at_row(mask_ptr, b, stride_mb), n, stride_mn), start, stride_mq)
        live_ptr = at_row(at_row(at_row(live_ptr, b, stride_lb), n, stride_ln), tile, stride_lq)
        live_low = tl.load(live_ptr)
        low, all_low = tl.maximum(low, live_low), tl.maximum(all_low, live_low)
        high, all_high = tl.minimum(high, tl.load(live_ptr + 1)), tl.minimum(all_high, tl.load(live_ptr + 2))
    low = low // BLOCK_N * BLOCK_N
    all_low = tl.minimum(tl.maximum(low, tl.cdiv(all_low, BLOCK_N) * BLOCK_N), tl.maximum(low, high))
    all_high = tl.maximum(all_low, tl.minimum(high, all_high) // BLOCK_N * BLOCK_N)
    RANKED: tl.constexpr = rank_q_ptr is not None
    # What all of them see is not known of ranks; and where more is to be computed than that, one walk is enough.
    ONE_PHASE: tl.constexpr = RANKED or position_query_ptr is not None
    if ONE_PHASE:
        all_high = low

    distance = (distance_ptr, 0, 0)
    position = (position_query_ptr, 0)
    segment = (segment_ptr, 0)
    ranks = (rank_q_ptr, 0)
    if distance_ptr is not None:
        distance_ptr = at_row(at_row(distance_ptr, b, stride_xb), n, stride_xn)
        distance = (distance_ptr, distance_zero - (K_here - Q_here), distance_last)
    if position_query_ptr is not None:
        position_query_ptr = at_row(at_row(position_query_ptr, b, stride_ub), n, stride_un)
        position_query_ptr = at_row(position_query_ptr, first_q + start, stride_uq)
        position_key_ptr = at_row(at_row(position_key_ptr, b, stride_tb), n // (N // R), stride_tr)
        offs_p = tl.arange(0, BLOCK_P)
        seen = (i < Q_here)[:, None]
        pq = load_tile(position_query_ptr, rows[:, None], stride_uq, offs_p[None, :], stride_up, seen, P, True)
        position_zero -= K_here - Q_here
        position = (pq, position_key_ptr, stride_tl, position_last, position_zero)
    if segment_ptr is not None:
        of_queries = load_segments(at_row(segment_ptr, b * N + n, 2 * Q), at_row(segment_q_ptr, b, Q), i, Q)
        segment = of_queries + (at_row(segment_k_ptr, b, K),)
    if RANKED:
        rank_q = tl.load(at_row(at_row(rank_q_ptr, b, stride_ab), n, stride_an) + i, mask=i < Q, other=0)
        ranks = (rank_q, at_row(rank_k_ptr, b, stride_cb))

    first_key, second_key = i, i
    if seed_ptr is not None:
        first_key, second_key = dropout_keys(seed_ptr, z * N + n, i)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    FIRST_PHASE: tl.constexpr = 2 if ONE_PHASE else 0 if HAS_LEFT or mask_ptr is not None else 1
    for phase in tl.static_range(FIRST_PHASE, 3):
        m, l, acc = attend(  # noqa: E741
            m, l, acc, q, (low, all_low, all_high)[phase], (all_low, all_high, high)[phase],
            k_ptr, stride_kk, stride_kd, v_ptr, stride_vk, stride_ve, bias_ptr, stride_bq, stride_bk,
            mask_ptr, stride_mq, stride_mk, distance, position, segment, ranks, first_key, second_key,
            start, Q_here, K_here, shift, left, right, threshold, scale, softcap,
            D, E, P, PRECISION, HAS_SOFTCAP, seed_ptr is not None, HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY, BIAS_PER_QUERY,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, MASKED=phase != 1, CAREFUL=False,
        )  # fmt: skip
    if HAS_LEFT or HAS_RIGHT or RANKED or (mask_ptr is not None and MASK_PER_QUERY):
        # A hidden value has weight 0, but 0 * NaN is NaN: where there is one, only those who see it may get it.
        # This is rare, and should not slow the rest: it takes fewer keys at a time, and all that it needs depends on
        # its condition, or the compiler would compute it ahead of the loops above and keep it in registers.
        FEWER: tl.constexpr = max(16, BLOCK_N // 2)
        bad = tl.max((acc != acc).to(tl.int32))  # flat: triton 3.6 fails on two reductions in a row for sm_100
        if bad != 0:
            zero = (bad - 1) * 16  # so that what was divisible by 16 stays so
            start += zero
            stride_kk += zero
            stride_vk += zero
            seen = (start + rows < Q_here)[:, None]
            q = load_tile(q_ptr, rows[:, None], stride_qq + zero, offs_d[None, :], stride_qd, seen, D, True)
            again = position
            if position_query_ptr is not None:
                stride = stride_uq + zero
                pq_again = load_tile(
                    position_query_ptr, rows[:, None], stride, offs_p[None, :], stride_up, seen, P, True
                )  # fmt: skip
                again = (pq_again, position_key_ptr, stride_tl + zero, position_last, position_zero)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
            acc = spoiled(
                low, high, v_ptr, stride_vk, stride_ve, mask_ptr, stride_mq, stride_mk, ranks,
                start, Q_here, K_here, shift, left, right,
                E, HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY, BLOCK_M, FEWER, BLOCK_E,
            )  # fmt: skip
            m, l, acc = attend(  # noqa: E741
                m, l, acc, q, low, high,
                k_ptr, stride_kk, stride_kd, v_ptr, stride_vk, stride_ve, bias_ptr, stride_bq, stride_bk,
                mask_ptr, stride_mq, stride_mk, distance, again, segment, ranks, first_key, second_key,
                start, Q_here, K_here, shift, left, right, threshold, scale, softcap,
                D, E, P, PRECISION, HAS_SOFTCAP, seed_ptr is not None, HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY,
                BIAS_PER_QUERY, BLOCK_M, FEWER, BLOCK_D, BLOCK_E, MASKED=True, CAREFUL=True,
            )  # fmt: skip

    empty = l == 0.0  # nothing was visible, or nothing but -inf: else the largest score adds 1
    total = tl.where(empty, 1.0, l)
    out = tl.where(empty[:, None], 0.0, acc * (kept / total)[:, None])
    out_ptr = at_row(out_ptr, b.to(tl.int64) * Q + (first_q + start), N * E) + n * E
    out_ptrs = out_ptr + (rows[:, None] * (N * E) + offs_e[None, :])
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < Q_here)[:, None] & (offs_e < E)[None, :])
    ADDED: tl.constexpr = bias_ptr is not None or distance_ptr is not None or segment_ptr is not None
    if ADDED:
        lse = m + tl.log2(total) * LN2
    else:
        lse = (m + tl.log2(total)) * LN2
    tl.store(at_row(lse_ptr, b * N + n, Q) + (first_q + start) + rows, lse, mask=i < Q_here)
    if factor_ptr is not None:
        gap = level_of_lse(lse, ADDED) - m
        if ADDED:
            gap *= LOG2E
        tl.store(at_row(factor_ptr, b * N + n, Q) + i, tl.where(empty, 0.0, tl.exp2(gap) / total), mask=i < Q_here)


@triton.jit(
    do_not_specialize=[
        "N", "M", "R", "Q", "K", "heads", "left", "right", "shift", "threshold",
        "distance_zero", "distance_last", "position_zero", "position_last",
    ]
)  # fmt: skip
def attention_weights_kernel(
    q_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    k_ptr, stride_kb, stride_km, stride_kk, stride_kd,  # [B, M, K, D]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,  # [B, N, Q, K]     or None
    distance_ptr, stride_xb, stride_xn,  # [B, N, distance_last + 1]          or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,  # [B, R, position_last + 1, P]
    segment_ptr,  # [B, N, Q, 2]        or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,  # [B, N, Q, K]     bool, or None
    seed_ptr,  # [1]                    with dropout, or None
    segment_q_ptr, segment_k_ptr,  # [B, Q] [B, K]  with segment
    rank_q_ptr, stride_ab, stride_an,  # [B, N, Q]  or None
    rank_k_ptr, stride_cb,  # [B, K]
    lse_ptr,  # [B, N, Q]
    factor_ptr,  # [B, N, Q]            of the forward kernel
    weights_ptr,  # [B, N / heads, Q, K]
    N, M, R, Q, K, heads, left, right, shift, threshold,  # heads: of which a program stores the sum
    distance_zero, distance_last, position_zero, position_last,
    scale, softcap, kept,  # kept: what a kept weight is multiplied by
    D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(Q, BLOCK_M) * tiles_k
    stored = tl.program_id(0) // tiles  # of [B, N / heads]
    start = tl.program_id(0) % tiles // tiles_k * BLOCK_M
    first = tl.program_id(0) % tiles % tiles_k * BLOCK_N
    b = stored * heads // N
    first_n = stored * heads % N
    rows, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i, j = start + rows, first + offs_n
    low, high = keys_of(start, tl.minimum(start + BLOCK_M, Q) - 1, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
    last_n = tl.where((first >= high) | (first + BLOCK_N <= low), first_n, first_n + heads)
    ADDED: tl.constexpr = bias_ptr is not None or distance_ptr is not None or segment_ptr is not None
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in tl.range(first_n, last_n):  # of a tile that the band hides, none
        seen = j < K
        mask_here, bias_here = mask_ptr, bias_ptr
        if mask_ptr is not None:
            mask_here = at_row(at_row(mask_ptr, b, stride_mb), n, stride_mn)
            mask_here = at_row(at_row(mask_here, start, stride_mq), first, stride_mk)
            if not MASK_PER_QUERY:
                seen = seen & (tl.load(mask_here + offs_n * stride_mk, mask=seen, other=0) != 0)
        if bias_ptr is not None:
            bias_here = at_row(at_row(bias_ptr, b, stride_bb), n, stride_bn)
            bias_here = at_row(at_row(bias_here, start, stride_bq), first, stride_bk)
        distance = (distance_ptr, 0, 0)
        segment = (segment_ptr, 0)
        ranks = (rank_q_ptr, 0)
        if distance_ptr is not None:
            distance_here = at_row(at_row(distance_ptr, b, stride_xb), n, stride_xn)
            zero = distance_zero - (K - Q)
            distance = (distance_here, zero, distance_last, first - start - (BLOCK_M - 1) + zero)
        if segment_ptr is not None:
            of_queries = load_segments(at_row(segment_ptr, b * N + n, 2 * Q), at_row(segment_q_ptr, b, Q), i, Q)
            segment = of_queries + (at_row(segment_k_ptr, b, K),)
        if rank_q_ptr is not None:
            rank_q = tl.load(at_row(at_row(rank_q_ptr, b, stride_ab), n, stride_an) + i, mask=i < Q, other=0)
            ranks = (rank_q, at_row(rank_k_ptr, b, stride_cb))
        q = load_tile(
            at_row(at_row(at_row(q_ptr, b, stride_qb), n, stride_qn), start, stride_qq),
            rows[:, None], stride_qq, offs_d[None, :], stride_qd, (i < Q)[:, None], D, True,
        )  # fmt: skip
        k = load_tile(
            at_row(at_row(at_row(k_ptr, b, stride_kb), n // (N // M), stride_km), first, stride_kk),
            offs_n[None, :], stride_kk, offs_d[:, None], stride_kd, seen[None, :], D, True,
        )  # fmt: skip
        visible = visible_in_tile(
            rows, i, offs_n, j, seen, Q, shift, left, right, mask_here, stride_mq, stride_mk, ranks,
            HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY,
        )  # fmt: skip
        qk = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if position_query_ptr is not None:
            pq = load_tile(
                at_row(at_row(at_row(position_query_ptr, b, stride_ub), n, stride_un), start, stride_uq),
                rows[:, None], stride_uq, tl.arange(0, BLOCK_P)[None, :], stride_up, (i < Q)[:, None], P, True,
            )  # fmt: skip
            table = at_row(at_row(position_key_ptr, b, stride_tb), n // (N // R), stride_tr)
            position = (pq, table, stride_tl, position_last, position_zero - (K - Q))
            qk += askew(position, start, first, BLOCK_N, P, PRECISION)
        s = scores_of_tile(
            qk, visible, rows, i, offs_n, j, seen, Q, bias_here, stride_bq, stride_bk, distance, segment,
            scale, softcap, HAS_SOFTCAP, BIAS_PER_QUERY, True,
        )  # fmt: skip
        level = level_of_lse(tl.load(at_row(lse_ptr, b * N + n, Q) + i, mask=i < Q, other=0.0), ADDED)
        level = tl.where(level == float("-inf"), float("inf"), level)  # a row that sees nothing has weights 0
        factor = tl.load(at_row(factor_ptr, b * N + n, Q) + i, mask=i < Q, other=0.0)
        w = weight_of(s, level[:, None], scale, ADDED, HAS_SOFTCAP)
        w = tl.where(visible, w * factor[:, None], 0.0)
        if seed_ptr is not None:
            first_key, second_key = dropout_keys(seed_ptr, b * N + n, i)
            w = tl.where(dropout_keep(first_key[:, None], second_key[:, None], j[None, :], threshold), w, 0.0)
        total += w
    ptrs = at_row(weights_ptr, stored.to(tl.int64) * Q + start, K) + first + rows.to(tl.int64)[:, None] * K + offs_n
    tl.store(ptrs, (total * kept).to(weights_ptr.dtype.element_ty), mask=(i < Q)[:, None] & (j < K)[None, :])


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    distance: Tensor | None,
    position_query: Tensor | None,
    position_key: Tensor | None,
    segment: Tensor | None,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    rank_q: Tensor | None,
    rank_k: Tensor | None,
    *,
    scale: float,
    left: int,
    right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    weights: str,
    distance_zero: int,
    position_zero: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output ``[B, N, Q, E]``, log-sum-exp ``[B, N, Q]`` in fp32, and the weights: as ``reference.attention``.

    query ``[B, N, Q, D]``, key ``[B, M, K, D]``, value ``[B, M, K, E]``, of any strides; bias and mask broadcast to
    ``[B, N, Q, K]``. distance ``[B, N, L]``, position_query ``[B, N, Q, P]``, position_key ``[B, R, L, P]``, segment
    ``[B, N, Q, 2]``; int32: segment_q ``[B, Q]``, segment_k ``[B, K]``, rank_q ``[B, N, Q]``, rank_k ``[B, K]``. Of
    distance, position_key and the ranks the batch may be 1; of distance and rank_q the heads. cu_q and cu_k ``[Z+1]``
    int32, and then no sequence has more than max_q queries; seed ``[1]`` int64, read where dropout_p is not 0. The
    output lies in memory as ``[B, Q, N, E]``.
    """
    (B, N, Q, _), (M, K) = query.shape, key.shape[1:3]
    if scale <= 0:  # the kernels take the maximum before they scale
        sign, scale = -1.0 if scale < 0 else 0.0, -scale or 1.0
        query, position_query = query * sign, None if position_query is None else position_query * sign
    band = {"left": min(left, 2**30), "right": min(right, 2**30), "lower_right": lower_right}
    bias, mask = (None if t is None else t.expand(B, N, Q, K) for t in (bias, mask))
    seed = seed if dropout_p else None
    terms = relative(query, distance, segment, segment_q, segment_k, rank_q, rank_k, distance_zero)
    places = positions(position_query, position_key, position_zero)
    arguments: dict[str, Any] = band | {
        "terms": terms, "scale": scale, "softcap": softcap, "dropout_p": dropout_p, "allow_tf32": allow_tf32
    }  # fmt: skip
    with torch.cuda.device_of(query):  # for a CPU tensor, nothing
        parts = 1
        if not weights and cu_q is None and position_query is None:
            parts = splits(B, M, Q, N, K, *band.values(), query.device)
        if parts > 1:
            return *decode_forward(query, key, value, bias, mask, seed, splits=parts, **arguments), None
        arguments["places"] = places
        factor = torch.empty(B, N, Q, dtype=torch.float32, device=query.device) if weights else None
        out, lse = tiled_forward(query, key, value, bias, mask, cu_q, cu_k, seed, factor, max_q=max_q, **arguments)
        shown = None
        if weights:
            shown = attention_weights(query, key, bias, mask, seed, lse, factor, mean=weights == "mean", **arguments)
        return out, lse, shown


def tiled_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    factor: Tensor | None,
    *,
    terms: dict[str, Any],
    places: dict[str, Any],
    scale: float,
    left: int,
    right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
    max_q: int,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries in tiles, each with all of its keys; bias and mask are expanded.

    terms and places: of ``relative`` and ``positions``. factor ``[B, N, Q]``, for ``attention_weights``, is written if
    it is there.
    """
    (B, N, Q, D), (M, K, E) = query.shape, value.shape[1:]
    out, lse = query.new_empty(B, Q, N, E), query.new_empty(B, N, Q, dtype=torch.float32)
    if cu_q is not None:  # there may be tokens of no sequence
        B = len(cu_q) - 1
        out.zero_()
        lse.fill_(-torch.inf)
    device = limits(query.device)
    reads = precision(query.dtype, allow_tf32, device)
    if places["position_query_ptr"] is not None:
        tiles = position_tiles(query.dtype, D, E, places["P"], reads, max_q, device)
    else:
        banded = left >= 0 or right >= 0 or mask is not None
        rich = bias is not None or per_query(mask) or softcap != 0 or seed is not None or has_any(terms)
        tiles = forward_tiles(query.dtype, D, E, reads, banded, rich, max_q, device)
    blocks = triton.cdiv(max_q, tiles.block_m)
    if B * N * blocks > 0:
        live = None if mask is None else live_ranges(mask, tiles.block_m)
        attention_forward_kernel[(blocks * N * B,)](
            q_ptr=query, **strides("q", "bnqd", query), k_ptr=key, **strides("k", "bmkd", key),
            v_ptr=value, **strides("v", "bmke", value), bias_ptr=bias, **strides("b", "bnqk", bias),
            mask_ptr=mask, **strides("m", "bnqk", mask), **terms, **places,
            live_ptr=live, **strides("l", "bnq", live), cu_q_ptr=cu_q, cu_k_ptr=cu_k, seed_ptr=seed,
            out_ptr=out, lse_ptr=lse, factor_ptr=factor, N=N, M=M, Q=Q, K=K, blocks=blocks, left=left, right=right,
            threshold=dropout_threshold(dropout_p), scale=scale, softcap=softcap, kept=kept(dropout_p),
            LOWER_RIGHT=lower_right, E=E, BLOCK_E=block(E),
            **constants(tiles, D, reads, softcap != 0, left >= 0, right >= 0, per_query(bias), per_query(mask)),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **OPTIONS,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def attention_weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    factor: Tensor,
    *,
    mean: bool,
    terms: dict[str, Any],
    places: dict[str, Any],
    scale: float,
    left: int,
    right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
    allow_tf32: bool,
) -> Tensor:
    """The weights ``[B, N, Q, K]`` that belong to the log-sum-exp, or their mean over the heads ``[B, Q, K]``."""
    (B, N, Q, D), (M, K) = query.shape, key.shape[1:3]
    weights = query.new_empty(B, 1 if mean else N, Q, K)
    device = limits(query.device)
    reads = precision(query.dtype, allow_tf32, device)
    if places["position_query_ptr"] is not None:
        tiles = position_weights_tiles(query.dtype, D, places["P"], reads, device)
    else:
        tiles = weights_tiles(query.dtype, D, reads, device)
    grid = weights.shape[0] * weights.shape[1] * triton.cdiv(Q, tiles.block_m) * triton.cdiv(K, tiles.block_n)
    if grid > 0:
        attention_weights_kernel[(grid,)](
            q_ptr=query, **strides("q", "bnqd", query), k_ptr=key, **strides("k", "bmkd", key),
            bias_ptr=bias, **strides("b", "bnqk", bias),
            mask_ptr=mask, **strides("m", "bnqk", mask), **terms, **places,
            seed_ptr=seed, lse_ptr=lse, factor_ptr=factor, weights_ptr=weights,
            N=N, M=M, Q=Q, K=K, heads=N if mean else 1,
            left=left, right=right, shift=K - Q if lower_right else 0, threshold=dropout_threshold(dropout_p),
            scale=scale, softcap=softcap, kept=kept(dropout_p) / (N if mean else 1),
            **constants(tiles, D, reads, softcap != 0, left >= 0, right >= 0, per_query(bias), per_query(mask)),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **OPTIONS,
        )  # fmt: skip
    return weights[:, 0] if mean else weights


def constants(
    tiles: Tiles, D: int, reads: str, softcap: bool, left: bool, right: bool, bias_per_query: bool, mask_per_query: bool
) -> dict[str, Any]:
    """The compile-time arguments that the forward and the weights kernel share."""
    return {
        "D": D,
        "PRECISION": reads,
        "HAS_SOFTCAP": softcap,
        "HAS_LEFT": left,
        "HAS_RIGHT": right,
        "BIAS_PER_QUERY": bias_per_query,
        "MASK_PER_QUERY": mask_per_query,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": block(D),
    }


def configurations(limits: Limits) -> Iterator[dict[str, Any]]:
    """The ways in which these kernels run: head widths and types plain, causal, and with everything; and relative."""
    half, tf32, ieee = (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    cases = [(D, *of, kind) for D in (64, 128) for of in (half, tf32) for kind in ("plain", "causal", "all")]
    cases += [(D, *ieee, kind) for D in (64, 128) for kind in ("causal", "all")]
    cases += [(D, torch.float16, "ieee", "causal") for D in (64, 128)]
    cases += [(D, *half, kind) for D, kind in ((32, "plain"), (96, "causal"), (256, "plain"), (256, "causal"))]
    cases += [(D, *of, "T5") for D in (64, 128) for of in (half, tf32)]
    cases += [(64, *of, "Transformer-XL") for of in (half, tf32)]
    cases += [(D, *of, "XLNet") for D in (64, 128) for of in (half, tf32)]
    unit = dict.fromkeys((f"stride_{at}" for at in ("qd", "kd", "bk", "mk", "up")), 1)
    numbers = ("segment_q_ptr", "segment_k_ptr", "rank_q_ptr", "rank_k_ptr")
    for D, dtype, reads, kind in cases:
        if reads == "tf32" and limits.backend != "cuda":
            continue
        everything, xlnet = kind == "all", kind == "XLNet"
        positioned, right = xlnet or kind == "Transformer-XL", kind in ("causal", "all", "Transformer-XL")
        tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype) | {
            "bias_ptr": dtype if everything else None,
            "distance_ptr": dtype if kind == "T5" else None,
            "position_query_ptr": dtype if positioned else None,
            "position_key_ptr": dtype if positioned else None,
            "segment_ptr": dtype if xlnet else None,
            "mask_ptr": torch.bool if everything else None,
            "live_ptr": torch.int32 if everything else None,
            "cu_q_ptr": None,
            "cu_k_ptr": None,
            "seed_ptr": torch.int64 if everything else None,
            **dict.fromkeys(numbers, torch.int32 if xlnet else None),
            "lse_ptr": torch.float32,
            "factor_ptr": None,
        }
        name = f"D={D} {NAMES[dtype]}{' tf32' * (reads == 'tf32')} {kind}"
        rich = everything or kind == "T5"
        tiles = forward_tiles(dtype, D, D, reads, kind != "plain", rich, 4096, limits)
        if positioned:
            tiles = position_tiles(dtype, D, D, D, reads, 4096, limits)
        flags = (everything, everything, right, everything, everything)
        sizes = unit | {"P": D, "BLOCK_P": block(D)}
        of_forward = {"stride_ve": 1, "LOWER_RIGHT": False, "E": D, "BLOCK_E": block(D)}
        yield configuration(
            f"attention forward {name}", attention_forward_kernel, tensors,
            constants(tiles, D, reads, *flags) | sizes | of_forward,
            tiles.num_warps, tiles.num_stages,
        )  # fmt: skip
        if everything or xlnet:
            tiles = weights_tiles(dtype, D, reads, limits)
            if positioned:
                tiles = position_weights_tiles(dtype, D, D, reads, limits)
            others = ("v_ptr", "out_ptr", "live_ptr", "cu_q_ptr", "cu_k_ptr")
            shared = {name: of for name, of in tensors.items() if name not in others}
            yield configuration(
                f"attention weights {name}", attention_weights_kernel,
                shared | {"factor_ptr": torch.float32, "weights_ptr": dtype},
                constants(tiles, D, reads, *flags) | sizes, tiles.num_warps, tiles.num_stages,
            )  # fmt: skip
    yield configuration(
        "live ranges", live_ranges_kernel, {"mask_ptr": torch.bool, "live_ptr": torch.int32},
        {"stride_mk": 1, "BLOCK": 128, "ROWS": 128, "BLOCK_K": live_columns(128)},
    )  # fmt: skip
