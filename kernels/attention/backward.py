"""Gradients of attention: of all that its scores are made of, and of the values.

Nothing of the size of the scores was saved: each kernel computes them again, tile by tile, from the log-sum-exp.
``gradients.py`` has what the kernels share; those of tables by relative position are in ``diagonals.py``.

Each program owns the tile that it writes and adds to it in one order: no atomics, the same bits every time.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import NAMES, OPTIONS, configuration, dot
from ..limits import Limits, limits
from .diagonals import diagonals_backward_kernel, table_backward
from .forward import live_ranges
from .gradients import (
    OF_TERMS,
    elsewhere,
    finite,
    load_numbers,
    load_rows,
    load_scores,
    queries_of,
    queries_of_all,
    score_gradients,
    visible_scores,
)
from .plan import Tiles, block, has_any, kept, positions, precision, relative, strides
from .relative import position_scores, positions_of, unskewed
from .scores import LOG2E, at_row, dropout_threshold, keys_of, keys_of_all, sequence_at

FAR = tl.constexpr(1024.0)  # from zero, where fp32 has too few digits for what is in a log-sum-exp beside the maximum

# --- the sum of each row that the gradient of a softmax subtracts ---


@triton.jit(do_not_specialize=["M", "T_q", "T_k", "max_q", *OF_TERMS, "left", "right", "threshold"])
def rows_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    distance_ptr, stride_xb, stride_xn,                     # [B, N, L]     or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,      # [B, R, L, P]  with position_query
    segment_ptr, segment_q_ptr, segment_k_ptr,              # [B, N, Q, 2], [B, Q], [B, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    rank_q_ptr, stride_ab, stride_an,                       # [B, N, Q]     or None
    rank_k_ptr, stride_cb,                                  # [B, K]        with rank_q
    cu_q_ptr, cu_k_ptr,                                     # [Z+1]         or None: not packed
    seed_ptr,                                               # [1]           or None: no dropout
    out_ptr, stride_ob, stride_on, stride_oq, stride_oe,    # [B, N, Q, E]
    lse_ptr, stride_lb, stride_ln, stride_lq,               # [B, N, Q]
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dlse_ptr, stride_rb, stride_rn, stride_rq,              # [B, N, Q]     or None
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    base_ptr,                                               # [B, N, Q]     out: what scores compare with
    excess_ptr,                                             # [B, N, Q]     out, if something is added to the scores
    delta_ptr,                                              # [B, N, Q]     out
    M, T_q, T_k, max_q, R, distance_last, distance_zero, position_last, position_zero, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ADDED: tl.constexpr = excess_ptr is not None
    N = M * GROUP
    blocks = tl.cdiv(max_q, BLOCK_M)
    i0 = tl.program_id(0) % blocks * BLOCK_M
    n = tl.program_id(0) // blocks % N
    z = tl.program_id(0) // blocks // N  # the batch or, packed, the sequence
    b = z if cu_q_ptr is None else 0
    first_q, Q = sequence_at(cu_q_ptr, z, T_q)
    first_k, K = sequence_at(cu_k_ptr, z, T_k)
    i = i0 + tl.arange(0, BLOCK_M)

    lse_ptr = at_row(at_row(at_row(lse_ptr, b, stride_lb), n, stride_ln), first_q, stride_lq)
    lse = tl.load(lse_ptr + i.to(tl.int64) * stride_lq, mask=i < Q, other=float("-inf"))
    alive = lse != float("-inf")
    base = tl.where(lse == float("inf"), float("nan"), lse)
    if not ADDED:
        base = base * LOG2E
    base = tl.where(alive, base, float("inf"))
    out_ptr = at_row(at_row(at_row(out_ptr, b, stride_ob), n, stride_on), first_q, stride_oq)
    dout_ptr = at_row(at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn), first_q, stride_gq)
    out = load_rows((out_ptr, stride_oq, stride_oe), i0, i < Q, E, BLOCK_E)
    do = load_rows((dout_ptr, stride_gq, stride_ge), i0, i < Q, E, BLOCK_E)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptr = at_row(at_row(at_row(dlse_ptr, b, stride_rb), n, stride_rn), first_q, stride_rq)
        delta -= tl.load(dlse_ptr + i.to(tl.int64) * stride_rq, mask=i < Q, other=0.0)

    row = tl.cast(b * N + n, tl.int64) * T_q + first_q
    if ADDED or dweights_ptr is not None:
        band = (Q, K, K - Q if LOWER_RIGHT else 0, left, right)
        added = (
            (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
            (distance_ptr, stride_xb, stride_xn, distance_zero, distance_last),
            (segment_ptr, segment_q_ptr, segment_k_ptr, N),
        )
        hidden = (
            (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
            (rank_q_ptr, stride_ab, stride_an, rank_k_ptr, stride_cb),
        )
        rows = tl.arange(0, BLOCK_M)[:, None]
        columns = tl.arange(0, BLOCK_N)[None, :]
        none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        query_ptr = at_row(at_row(at_row(query_ptr, b, stride_qb), n, stride_qn), first_q, stride_qq)
        key_ptr = at_row(at_row(at_row(key_ptr, b, stride_kb), n // GROUP, stride_km), first_k, stride_kk)
        q = load_rows((query_ptr, stride_qq, stride_qd), i0, i < Q, D, BLOCK_D)
        if position_query_ptr is not None:
            of_queries, table, zero = positions_of(
                (position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,
                 position_key_ptr, stride_tb, stride_tr, stride_tl, R, position_last, position_zero),
                b, n, first_q, N, Q, K,
            )  # fmt: skip
            pq = load_rows(of_queries, i0, i < Q, P, BLOCK_P)
        low, high = keys_of(i0, tl.minimum(i0 + BLOCK_M, Q) - 1, band[2], left, right, K, HAS_LEFT, HAS_RIGHT)
        excess = tl.zeros([BLOCK_M], tl.float32)
        nothing = (None, 0, 0, 0, 0)
    if ADDED:
        # Where the bias is the least number there is, so is the lse, and the sum that was in it is lost: count again.
        total = tl.zeros([BLOCK_M], tl.float32)
        far = alive & (tl.abs(lse) > FAR)
        last = tl.where(tl.max(far.to(tl.int32), 0) != 0, high, low)
        for j0 in tl.range(low, last, BLOCK_N, num_stages=1):
            k = load_rows((key_ptr, stride_kk, stride_kd), j0, j0 + tl.arange(0, BLOCK_N) < K, D, BLOCK_D)
            near = none
            if position_query_ptr is not None:
                near, _, _ = position_scores(pq, table, zero, i0, j0, 1, P, PRECISION)
            p, _, _ = score_gradients(
                dot(q, tl.trans(k), near, PRECISION), none, base[:, None], 0.0, 0.0, (b, n, i0, j0, rows, columns),
                added, hidden, nothing, (None, 0, 1.0, 0), band, scale, softcap, dweights_scale,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
            )  # fmt: skip
            total += tl.sum(p, 1)
        excess = tl.log2(tl.where(far & (total > 0.0), total, 1.0))
        tl.store(excess_ptr + row + i, excess, mask=i < Q)
    if dweights_ptr is not None:
        for j0 in tl.range(low, high, BLOCK_N):
            k = load_rows((key_ptr, stride_kk, stride_kd), j0, j0 + tl.arange(0, BLOCK_N) < K, D, BLOCK_D)
            near = none
            if position_query_ptr is not None:
                near, _, _ = position_scores(pq, table, zero, i0, j0, 1, P, PRECISION)
            _, ds, _ = score_gradients(
                dot(q, tl.trans(k), near, PRECISION), none, base[:, None], excess[:, None], 0.0,
                (b, n, i0, j0, rows, columns), added, hidden,
                (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
                (seed_ptr, threshold, keep_scale, z * N + n), band, scale, softcap, dweights_scale,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
            )  # fmt: skip
            delta += tl.sum(ds, 1)  # which is w * dw, for nothing was subtracted

    tl.store(base_ptr + row + i, base, mask=i < Q)
    tl.store(delta_ptr + row + i, tl.where(alive, delta, 0.0), mask=i < Q)


# --- keys and values ---


@triton.jit
def add_queries(
    dk, dv, k, v, low, high, head, j0, query, dout, numbers,
    added, hidden, position, dweights, dropout, band, scale, softcap, dweights_scale,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, with what the queries from low to high of one head add.

    Scores are ``[keys, queries]`` here. A query that does not see a key multiplies with 0, and 0 * NaN is NaN:
    CAREFUL takes out of the products what is not finite. To those who see it, it still comes: through the lse, for
    a query's NaN is in it, and delta; and to dv through ``spoiled_by_queries``.
    """
    Q = band[0]
    b, n = head
    rows = tl.arange(0, BLOCK_M)[None, :]
    columns = tl.arange(0, dk.shape[0])[:, None]
    none = tl.zeros([dk.shape[0], BLOCK_M], tl.float32)
    for i0 in tl.range(low, high, BLOCK_M, num_stages=1 if CAREFUL else None):  # care needs registers, not speed
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_rows(query, i0, i < Q, D, dk.shape[1])
        do = load_rows(dout, i0, i < Q, E, dv.shape[1])
        base, excess, delta = load_numbers(numbers, i, Q)
        if CAREFUL:
            q = finite(q)
            do = finite(do)
        near = none
        if position[0] is not None:
            of_queries, table, zero = position
            pq = load_rows(of_queries, i0, i < Q, P, BLOCK_P)
            near, _, _ = position_scores(pq, table, zero, i0, j0, 0, P, PRECISION)
            if not MASKED:  # past the last query stands 0, but not for a position that is NaN
                near = tl.where((i < Q)[None, :], near, 0.0)
        w, _, dqk = score_gradients(
            dot(k, tl.trans(q), near, PRECISION), dot(v, tl.trans(do), none, PRECISION),
            base[None, :], excess[None, :], delta[None, :], (b, n, i0, j0, rows, columns),
            added, hidden, dweights, dropout, band, scale, softcap, dweights_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        dv = dot(w.to(do.dtype), do, dv, PRECISION)
        dk = dot(dqk.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def spoiled_by_queries(
    dv, low, high, head, j0, dout, numbers, hidden, band,
    E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dv of a block of keys, with NaN where a query from low to high that sees the key has no finite dO."""
    Q = band[0]
    b, n = head
    rows = tl.arange(0, BLOCK_M)[None, :]
    columns = tl.arange(0, dv.shape[0])[:, None]
    count = tl.zeros_like(dv)
    for i0 in tl.range(low, high, BLOCK_M, num_stages=1):
        i = i0 + tl.arange(0, BLOCK_M)
        do = load_rows(dout, i0, i < Q, E, dv.shape[1])
        base, _, _ = load_numbers(numbers, i, Q)
        visible = visible_scores(base[None, :], (b, n, i0, j0, rows, columns), hidden, band, HAS_LEFT, HAS_RIGHT)
        spoilers = tl.where(tl.abs(do.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.float16)
        count = dot(tl.where(visible, 1.0, 0.0).to(tl.float16), spoilers, count, "ieee")
    return tl.where(count > 0.0, float("nan"), dv)


@triton.jit(do_not_specialize=["M", "T_q", "T_k", "max_k", *OF_TERMS, "left", "right", "threshold"])
def key_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    distance_ptr, stride_xb, stride_xn,                     # [B, N, L]     or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,      # [B, R, L, P]  with position_query
    segment_ptr, segment_q_ptr, segment_k_ptr,              # [B, N, Q, 2], [B, Q], [B, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    live_ptr, stride_lb, stride_ln, stride_lq,              # [B, N, key blocks, 3]  with the mask
    rank_q_ptr, stride_ab, stride_an,                       # [B, N, Q]     or None
    rank_k_ptr, stride_cb,                                  # [B, K]        with rank_q
    cu_q_ptr, cu_k_ptr,                                     # [Z+1]         or None: not packed
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess if something is added
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dkey_ptr,                                               # [B, K, M, D]  out
    dvalue_ptr,                                             # [B, K, M, E]  out
    M, T_q, T_k, max_k, R, distance_last, distance_zero, position_last, position_zero, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(max_k, BLOCK_N)
    block = tl.program_id(0) % blocks
    m = tl.program_id(0) // blocks % M
    z = tl.program_id(0) // blocks // M  # the batch or, packed, the sequence
    b = z if cu_q_ptr is None else 0
    first_q, Q = sequence_at(cu_q_ptr, z, T_q)
    first_k, K = sequence_at(cu_k_ptr, z, T_k)
    j0 = block * BLOCK_N
    if j0 >= K:
        return
    N = M * GROUP
    shift = K - Q if LOWER_RIGHT else 0
    band = (Q, K, shift, left, right)
    added = (
        (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
        (distance_ptr, stride_xb, stride_xn, distance_zero, distance_last),
        (segment_ptr, segment_q_ptr, segment_k_ptr, N),
    )
    hidden = (
        (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
        (rank_q_ptr, stride_ab, stride_an, rank_k_ptr, stride_cb),
    )
    dweights = (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk)
    j = j0 + tl.arange(0, BLOCK_N)

    key_ptr = at_row(at_row(at_row(key_ptr, b, stride_kb), m, stride_km), first_k, stride_kk)
    value_ptr = at_row(at_row(at_row(value_ptr, b, stride_vb), m, stride_vm), first_k, stride_vk)
    k = load_rows((key_ptr, stride_kk, stride_kd), j0, j < K, D, BLOCK_D)
    v = load_rows((value_ptr, stride_vk, stride_ve), j0, j < K, E, BLOCK_E)

    last = tl.minimum(j0 + BLOCK_N, K) - 1
    band_low, band_high = queries_of(j0, last, shift, left, right, Q, HAS_LEFT, HAS_RIGHT)
    all_low, all_high = queries_of_all(j0, last, shift, left, right, Q, HAS_LEFT, HAS_RIGHT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    # Where something is hidden, a NaN in it may have spoiled the sums; then they are made again, with care.
    SOME: tl.constexpr = mask_ptr is not None or rank_q_ptr is not None  # may be hidden anywhere in the band
    HIDES: tl.constexpr = HAS_LEFT or HAS_RIGHT or SOME or excess_ptr is not None
    CAREFUL_M: tl.constexpr = BLOCK_M if BLOCK_M == 16 or position_query_ptr is not None else BLOCK_M // 2
    for CAREFUL in tl.static_range(2 if HIDES else 1):
        heads = GROUP
        if CAREFUL:
            again = tl.max(tl.where((dk != dk) & (j < K)[:, None], 1, 0))  # flat: see forward.py
            again = again | tl.max(tl.where((dv != dv) & (j < K)[:, None], 1, 0))
            heads = GROUP * again
            dk = tl.where(again != 0, 0.0, dk)
            dv = tl.where(again != 0, 0.0, dv)
        for g in tl.range(0, heads):
            n = m * GROUP + g
            low, high, full_low, full_high = band_low, band_high, all_low, all_high
            if live_ptr is not None:
                live = at_row(at_row(at_row(live_ptr, b, stride_lb), n, stride_ln), block, stride_lq)
                live_low = tl.load(live)
                low = tl.maximum(low, live_low)
                high = tl.minimum(high, tl.load(live + 1))
                full_low = tl.maximum(full_low, live_low)
                full_high = tl.minimum(full_high, tl.load(live + 2))
            low = low // BLOCK_M * BLOCK_M
            full_low = tl.minimum(tl.cdiv(full_low, BLOCK_M) * BLOCK_M, high)
            # Queries past the last have no gradient and need no mask: only before the last is the end rounded down.
            full_high = tl.minimum(tl.where(full_high < Q, full_high // BLOCK_M * BLOCK_M, high), high)
            full_high = tl.maximum(full_high, full_low)
            query = at_row(at_row(at_row(query_ptr, b, stride_qb), n, stride_qn), first_q, stride_qq)
            dout = at_row(at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn), first_q, stride_gq)
            numbers = (base_ptr, excess_ptr, delta_ptr, tl.cast(b * N + n, tl.int64) * T_q + first_q)
            if position_query_ptr is None:
                position = (None,)
            else:
                position = positions_of(
                    (position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,
                     position_key_ptr, stride_tb, stride_tr, stride_tl, R, position_last, position_zero),
                    b, n, first_q, N, Q, K,
                )  # fmt: skip
            if CAREFUL or rank_q_ptr is not None:
                full_low = high
                full_high = high
            if CAREFUL:
                dv = spoiled_by_queries(
                    dv, low, high, (b, n), j0, (dout, stride_gq, stride_ge), numbers, hidden, band,
                    E, HAS_LEFT, HAS_RIGHT, CAREFUL_M,
                )  # fmt: skip
            bounds = (low, full_low, full_high, high)
            for PHASE in tl.static_range(3):
                if (
                    (PHASE == 0 and (HAS_RIGHT or SOME or CAREFUL))
                    or (PHASE == 1 and rank_q_ptr is None and not CAREFUL)
                    or (PHASE == 2 and (HAS_LEFT or mask_ptr is not None) and rank_q_ptr is None and not CAREFUL)
                ):
                    dk, dv = add_queries(
                        dk, dv, k, v, bounds[PHASE], bounds[PHASE + 1], (b, n), j0,
                        (query, stride_qq, stride_qd), (dout, stride_gq, stride_ge), numbers, added, hidden, position,
                        dweights, (seed_ptr, threshold, keep_scale, z * N + n), band, scale, softcap, dweights_scale,
                        D, E, P, BLOCK_P, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION,
                        CAREFUL_M if CAREFUL else BLOCK_M, PHASE != 1, CAREFUL,
                    )  # fmt: skip

    rows = tl.arange(0, BLOCK_N)[:, None] * M + m
    first_row = tl.cast(b, tl.int64) * T_k + first_k + j0
    d, e = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_E)[None, :]
    dk = (dk * scale).to(dkey_ptr.dtype.element_ty)
    tl.store(at_row(dkey_ptr, first_row, M * D) + (rows * D + d), dk, mask=(j < K)[:, None] & (d < D))
    dv = dv.to(dvalue_ptr.dtype.element_ty)
    tl.store(at_row(dvalue_ptr, first_row, M * E) + (rows * E + e), dv, mask=(j < K)[:, None] & (e < E))


# --- queries ---


@triton.jit
def with_sums(sums, x, first, second):
    """sums ``[rows, 2]`` and those of each row of x, where first holds and where second does."""
    return sums + tl.sum(tl.join(tl.where(first, x, 0.0), tl.where(second, x, 0.0)), 1)


@triton.jit
def add_keys(
    sums, q, do, base, excess, delta, low, high, head, i0, key, value,
    added, hidden, position, dweights, dropout, band, scale, softcap, dweights_scale,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, DISTANCE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The sums of a block of queries, with what the keys from low to high add; CAREFUL as in ``add_queries``.

    That is dq; then dposition_query, what belongs to the ends of position_key, what belongs to those of the table by
    distance (if DISTANCE), and dsegment, 0 where there is no such thing.
    """
    dq, dposition, position_ends, distance_ends, dsegment = sums
    Q, K = band[0], band[1]
    b, n = head
    mask, segment = hidden[0], added[2]
    rows = tl.arange(0, q.shape[0])[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    none = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    for j0 in tl.range(low, high, BLOCK_N):
        seen = j0 + tl.arange(0, BLOCK_N) < K
        if MASKED and mask[0] is not None and mask[3] is None:  # what is hidden from all is not even read
            offs_n = tl.arange(0, BLOCK_N)
            seen = seen & (load_scores(mask, (b, n, i0, j0, offs_n, offs_n), Q, K) != 0)
        k = load_rows(key, j0, seen, D, q.shape[1])
        v = load_rows(value, j0, seen, E, do.shape[1])
        if CAREFUL:
            k = finite(k)
        near = none
        if position[0] is not None:
            pq, table, zero = position
            near, before, after = position_scores(pq, table, zero, i0, j0, 1, P, PRECISION)
        at = (b, n, i0, j0, rows, columns)
        _, ds, dqk = score_gradients(
            dot(q, tl.trans(k), near, PRECISION), dot(do, tl.trans(v), none, PRECISION), base, excess, delta,
            at, added, hidden, dweights, dropout, band, scale, softcap, dweights_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        dq = dot(dqk.to(k.dtype), k, dq, PRECISION)
        offset = (j0 + columns) - (i0 + rows)
        if position[0] is not None:
            if CAREFUL:
                before = finite(before)
                after = finite(after)
            of_before, of_after = unskewed(dqk.to(pq.dtype), 1)
            dposition = dot(of_before, before, dposition, PRECISION)
            dposition = dot(of_after, after, dposition, PRECISION)
            entry = offset + zero
            position_ends = with_sums(position_ends, dqk, entry <= 0, entry >= tl.maximum(table[2], 1))
        if DISTANCE:
            entry = offset + added[1][3] - (K - Q)
            distance_ends = with_sums(distance_ends, ds, entry <= 0, entry >= tl.maximum(added[1][4], 1))
        if segment[0] is not None:
            differs = elsewhere(segment, at, Q, K)
            dsegment = with_sums(dsegment, ds, differs == 0, differs)
    return dq, dposition, position_ends, distance_ends, dsegment


@triton.jit(do_not_specialize=["M", "T_q", "T_k", "max_q", *OF_TERMS, "left", "right", "threshold"])
def query_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    distance_ptr, stride_xb, stride_xn,                     # [B, N, L]     or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,      # [B, R, L, P]  with position_query
    segment_ptr, segment_q_ptr, segment_k_ptr,              # [B, N, Q, 2], [B, Q], [B, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    live_ptr, stride_lb, stride_ln, stride_lq,              # [B, N, query blocks, 3]  with the mask
    rank_q_ptr, stride_ab, stride_an,                       # [B, N, Q]     or None
    rank_k_ptr, stride_cb,                                  # [B, K]        with rank_q
    cu_q_ptr, cu_k_ptr,                                     # [Z+1]         or None: not packed
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess if something is added
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dquery_ptr,                                             # [B, Q, N, D]  out
    dposition_query_ptr,                                    # [B, Q, N, P]  out, with position_query
    position_ends_ptr,                                      # [B, N, Q, 2]  out, with it: of the ends of its table
    distance_ends_ptr,                                      # [B, N, Q, 2]  out, of the ends of distance, or None
    dsegment_ptr,                                           # [B, N, Q, 2]  out, with segment
    M, T_q, T_k, max_q, R, distance_last, distance_zero, position_last, position_zero, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = M * GROUP
    blocks = tl.cdiv(max_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # in a causal band the last have most to do: they start first
    n = tl.program_id(0) // blocks % N
    z = tl.program_id(0) // blocks // N
    b = z if cu_q_ptr is None else 0
    first_q, Q = sequence_at(cu_q_ptr, z, T_q)
    first_k, K = sequence_at(cu_k_ptr, z, T_k)
    i0 = block * BLOCK_M
    if i0 >= Q:
        return
    shift = K - Q if LOWER_RIGHT else 0
    i = i0 + tl.arange(0, BLOCK_M)

    numbers = (base_ptr, excess_ptr, delta_ptr, tl.cast(b * N + n, tl.int64) * T_q + first_q)
    base, excess, delta = load_numbers(numbers, i, Q)
    query_ptr = at_row(at_row(at_row(query_ptr, b, stride_qb), n, stride_qn), first_q, stride_qq)
    dout_ptr = at_row(at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn), first_q, stride_gq)
    key_ptr = at_row(at_row(at_row(key_ptr, b, stride_kb), n // GROUP, stride_km), first_k, stride_kk)
    value_ptr = at_row(at_row(at_row(value_ptr, b, stride_vb), n // GROUP, stride_vm), first_k, stride_vk)
    q = load_rows((query_ptr, stride_qq, stride_qd), i0, i < Q, D, BLOCK_D)
    do = load_rows((dout_ptr, stride_gq, stride_ge), i0, i < Q, E, BLOCK_E)

    last = tl.minimum(i0 + BLOCK_M, Q) - 1
    low, high = keys_of(i0, last, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
    full_low, full_high = keys_of_all(i0, last, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
    if live_ptr is not None:
        live = at_row(at_row(at_row(live_ptr, b, stride_lb), n, stride_ln), block, stride_lq)
        live_low = tl.load(live)
        low = tl.maximum(low, live_low)
        high = tl.minimum(high, tl.load(live + 1))
        full_low = tl.maximum(full_low, live_low)
        full_high = tl.minimum(full_high, tl.load(live + 2))
    low = low // BLOCK_N * BLOCK_N
    full_low = tl.minimum(tl.cdiv(full_low, BLOCK_N) * BLOCK_N, high)
    full_high = tl.maximum(tl.minimum(full_high // BLOCK_N * BLOCK_N, high), full_low)
    if rank_q_ptr is not None:
        full_low = low
        full_high = low
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dposition, position_ends, distance_ends, dsegment = 0.0, 0.0, 0.0, 0.0
    position = (None,)
    if position_query_ptr is not None:
        of_queries, table, zero = positions_of(
            (position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,
             position_key_ptr, stride_tb, stride_tr, stride_tl, R, position_last, position_zero),
            b, n, first_q, N, Q, K,
        )  # fmt: skip
        position = (load_rows(of_queries, i0, i < Q, P, BLOCK_P), table, zero)
        dposition = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        position_ends = tl.zeros([BLOCK_M, 2], tl.float32)
    if distance_ends_ptr is not None:
        distance_ends = tl.zeros([BLOCK_M, 2], tl.float32)
    if segment_ptr is not None:
        dsegment = tl.zeros([BLOCK_M, 2], tl.float32)
    # Where something is hidden, a NaN in it may have spoiled the sums; then they are made again, with care. Of the
    # positions of a window, there is always some that not every query of a tile meets.
    SOME: tl.constexpr = mask_ptr is not None or rank_q_ptr is not None  # may be hidden anywhere in the band
    HIDES: tl.constexpr = HAS_LEFT or HAS_RIGHT or SOME or position_query_ptr is not None
    for CAREFUL in tl.static_range(2 if HIDES else 1):
        if CAREFUL:
            again = tl.max(tl.where(dq != dq, 1, 0))  # flat: see forward.py
            if position_query_ptr is not None:
                again = again | tl.max(tl.where(dposition != dposition, 1, 0))
                dposition = tl.where(again != 0, 0.0, dposition)
                position_ends = tl.where(again != 0, 0.0, position_ends)
            if distance_ends_ptr is not None:
                distance_ends = tl.where(again != 0, 0.0, distance_ends)
            if segment_ptr is not None:
                dsegment = tl.where(again != 0, 0.0, dsegment)
            dq = tl.where(again != 0, 0.0, dq)
            full_low = low
            full_high = low
            high = tl.where(again != 0, high, low)
        bounds = (low, full_low, full_high, high)
        for PHASE in tl.static_range(3):
            if (
                (PHASE == 0 and (HAS_LEFT or mask_ptr is not None) and rank_q_ptr is None and not CAREFUL)
                or (PHASE == 1 and rank_q_ptr is None and not CAREFUL)
                or PHASE == 2
            ):
                dq, dposition, position_ends, distance_ends, dsegment = add_keys(
                    (dq, dposition, position_ends, distance_ends, dsegment),
                    q, do, base[:, None], excess[:, None], delta[:, None],
                    bounds[PHASE], bounds[PHASE + 1], (b, n), i0,
                    (key_ptr, stride_kk, stride_kd), (value_ptr, stride_vk, stride_ve),
                    (
                        (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
                        (distance_ptr, stride_xb, stride_xn, distance_zero, distance_last),
                        (segment_ptr, segment_q_ptr, segment_k_ptr, N),
                    ),
                    (
                        (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
                        (rank_q_ptr, stride_ab, stride_an, rank_k_ptr, stride_cb),
                    ),
                    position, (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
                    (seed_ptr, threshold, keep_scale, z * N + n), (Q, K, shift, left, right),
                    scale, softcap, dweights_scale, D, E, P, distance_ends_ptr is not None,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, PHASE != 1, CAREFUL,
                )  # fmt: skip

    rows = tl.arange(0, BLOCK_M)[:, None] * N + n
    d = tl.arange(0, BLOCK_D)[None, :]
    first_row = tl.cast(b, tl.int64) * T_q + first_q + i0
    dq = (dq * scale).to(dquery_ptr.dtype.element_ty)
    tl.store(at_row(dquery_ptr, first_row, N * D) + (rows * D + d), dq, mask=(i < Q)[:, None] & (d < D))
    pairs = tl.arange(0, BLOCK_M)[:, None] * 2 + tl.arange(0, 2)[None, :]
    pair_row = tl.cast(b * N + n, tl.int64) * T_q + first_q + i0
    if position_query_ptr is not None:
        p = tl.arange(0, BLOCK_P)[None, :]
        dposition = (dposition * scale).to(dposition_query_ptr.dtype.element_ty)
        dposition_query_ptr = at_row(dposition_query_ptr, first_row, N * P)
        tl.store(dposition_query_ptr + (rows * P + p), dposition, mask=(i < Q)[:, None] & (p < P))
        tl.store(at_row(position_ends_ptr, pair_row, 2) + pairs, position_ends * scale, mask=(i < Q)[:, None])
    if distance_ends_ptr is not None:
        tl.store(at_row(distance_ends_ptr, pair_row, 2) + pairs, distance_ends, mask=(i < Q)[:, None])
    if segment_ptr is not None:
        dsegment = dsegment.to(dsegment_ptr.dtype.element_ty)
        tl.store(at_row(dsegment_ptr, pair_row, 2) + pairs, dsegment, mask=(i < Q)[:, None])


# --- bias ---


@triton.jit(do_not_specialize=[
    "B", "N", "Q", "K", "Bb", "Nb", "Qb", "Kb", *OF_TERMS, "left", "right", "threshold"
])  # fmt: skip
def bias_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]
    distance_ptr, stride_xb, stride_xn,                     # [B, N, L]     or None
    position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,  # [B, N, Q, P]  or None
    position_key_ptr, stride_tb, stride_tr, stride_tl,      # [B, R, L, P]  with position_query
    segment_ptr, segment_q_ptr, segment_k_ptr,              # [B, N, Q, 2], [B, Q], [B, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    rank_q_ptr, stride_ab, stride_an,                       # [B, N, Q]     or None
    rank_k_ptr, stride_cb,                                  # [B, K]        with rank_q
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess if something is added
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dbias_ptr,                                              # [Bb, Nb, Qb, Kb]  out: each 1 or that of the scores
    B, N, Q, K, Bb, Nb, Qb, Kb, R, distance_last, distance_zero, position_last, position_zero, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUM_Q: tl.constexpr,
    SUM_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program adds up a tile of scores' gradients, over batches, heads, queries and keys that share the bias."""
    key_blocks = tl.cdiv(Kb, BLOCK_N)
    query_blocks = tl.cdiv(Qb, BLOCK_M)
    column = tl.program_id(0) % key_blocks
    row = tl.program_id(0) // key_blocks % query_blocks
    n_bias = tl.program_id(0) // key_blocks // query_blocks % Nb
    b_bias = tl.program_id(0) // key_blocks // query_blocks // Nb
    shift = K - Q if LOWER_RIGHT else 0

    # The tiles to add, row_blocks * column_blocks of each head; what the band hides from them all is left out.
    row_blocks = 1
    column_blocks = 1
    if SUM_Q:
        low, high = 0, Q
        if not SUM_K:
            last = tl.minimum((column + 1) * BLOCK_N, K) - 1
            low, high = queries_of(column * BLOCK_N, last, shift, left, right, Q, HAS_LEFT, HAS_RIGHT)
        row = low // BLOCK_M
        row_blocks = tl.maximum(tl.cdiv(high, BLOCK_M) - row, 0)
    if SUM_K or not SUM_Q:
        low, high = 0, K
        if not SUM_Q:
            last = tl.minimum((row + 1) * BLOCK_M, Q) - 1
            low, high = keys_of(row * BLOCK_M, last, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
        if SUM_K:
            column = low // BLOCK_N
            column_blocks = tl.maximum(tl.cdiv(high, BLOCK_N) - column, 0)
        else:
            column_blocks = tl.where((low < (column + 1) * BLOCK_N) & (high > column * BLOCK_N), 1, 0)
    heads = N // Nb
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, B // Bb * heads * row_blocks * column_blocks):
        j0 = (column + step % column_blocks) * BLOCK_N
        i0 = (row + step // column_blocks % row_blocks) * BLOCK_M
        head = step // column_blocks // row_blocks
        n = n_bias + head % heads
        b = b_bias + head // heads
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        query = at_row(at_row(query_ptr, b, stride_qb), n, stride_qn)
        dout = at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn)
        key = at_row(at_row(key_ptr, b, stride_kb), n // GROUP, stride_km)
        value = at_row(at_row(value_ptr, b, stride_vb), n // GROUP, stride_vm)
        q = load_rows((query, stride_qq, stride_qd), i0, i < Q, D, BLOCK_D)
        k = load_rows((key, stride_kk, stride_kd), j0, j < K, D, BLOCK_D)
        do = load_rows((dout, stride_gq, stride_ge), i0, i < Q, E, BLOCK_E)
        v = load_rows((value, stride_vk, stride_ve), j0, j < K, E, BLOCK_E)
        numbers = (base_ptr, excess_ptr, delta_ptr, tl.cast(b * N + n, tl.int64) * Q)
        base, excess, delta = load_numbers(numbers, i, Q)
        near = none
        if position_query_ptr is not None:
            of_queries, table, zero = positions_of(
                (position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,
                 position_key_ptr, stride_tb, stride_tr, stride_tl, R, position_last, position_zero),
                b, n, 0, N, Q, K,
            )  # fmt: skip
            pq = load_rows(of_queries, i0, i < Q, P, BLOCK_P)
            near, _, _ = position_scores(pq, table, zero, i0, j0, 1, P, PRECISION)
        _, ds, _ = score_gradients(
            dot(q, tl.trans(k), near, PRECISION), dot(do, tl.trans(v), none, PRECISION), base[:, None], excess[:, None],
            delta[:, None], (b, n, i0, j0, rows, columns),
            (
                (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
                (distance_ptr, stride_xb, stride_xn, distance_zero, distance_last),
                (segment_ptr, segment_q_ptr, segment_k_ptr, N),
            ),
            (
                (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
                (rank_q_ptr, stride_ab, stride_an, rank_k_ptr, stride_cb),
            ),
            (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
            (seed_ptr, threshold, keep_scale, b * N + n), (Q, K, shift, left, right), scale, softcap, dweights_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
        )  # fmt: skip
        acc += ds

    # A dimension that was added up has one place to be written to, the first.
    i = row * BLOCK_M + rows
    j = column * BLOCK_N + columns
    if SUM_Q:
        acc = tl.sum(acc, 0, keep_dims=True)
        i = tl.zeros([1, 1], tl.int32)
    if SUM_K:
        acc = tl.sum(acc, 1, keep_dims=True)
        j = tl.zeros([1, 1], tl.int32)
    at = ((b_bias.to(tl.int64) * Nb + n_bias) * Qb + i) * Kb + j
    tl.store(dbias_ptr + at, acc.to(dbias_ptr.dtype.element_ty), mask=(i < Qb) & (j < Kb))


# --- launchers ---


@functools.cache
def backward_tiles(
    gradient: str, D: int, E: int, P: int, dtype: torch.dtype, precision: str, dense: bool, limits: Limits
) -> Tiles:
    """The tiles of the kernel that makes a gradient, for heads of width D and E; ``dense``: with more than a band.

    A program keeps the rows that it owns and their gradients, and walks over the others. With relative positions of
    width P, or along diagonals, tiles are square.
    """
    # Before Hopper, products take their operands from registers, so there are fewer for the tiles.
    roomy = limits.shared > 200_000
    if P or gradient == "diagonals":
        row, half = block(max(D, E, P)) * dtype.itemsize, dtype.itemsize == 2
        most = {"rows": 256, "key": 256 if roomy else 128, "diagonals": 256 if half else 128}.get(gradient, 128)
        large = row <= most and (half or precision == "tf32")
        if roomy and half and row == 128 and not P:
            return Tiles(64, 64, 8, 1)
        return Tiles(32, 32, 8, 1) if large else Tiles(16, 16, 4, 1)
    width = max(64, block(max(D, E)))
    if gradient == "key":
        own, walked = 8192 // width, 32 if width < 128 or not dense else 16
        if width >= 128 and not roomy and (dense or width > 128):
            own, walked = 4096 // width, 32
        if width == 64:
            own, walked = (128, 32 if dense else 64) if roomy else (32, 32)
    elif gradient == "query":
        own, walked = min(128, 16384 // width), 64 if width <= 128 and roomy and not dense else 32
    elif gradient == "bias":
        own, walked = 64, min(64, 8192 // width) if roomy else 32
    else:
        own, walked = 64, 32
    if dtype == torch.float32:
        own = max(32, own // 2) if roomy and precision == "tf32" and not dense else 32
        walked = min(walked, 32)
    if dense:
        own = min(own, 64)
    num_stages, row = 2, 2 * width * dtype.itemsize  # of query and dO, or of key and value
    while row * (own + walked * num_stages) > limits.shared and own > 16:
        own, num_stages = (own, 1) if num_stages == 2 else (own // 2, 1)
    block_m, block_n = (walked, own) if gradient == "key" else (own, walked)
    return Tiles(block_m, block_n, 8 if own * width > 2048 or dtype == torch.float32 else 4, num_stages)


def constants(
    D: int, E: int, group: int, left: bool, right: bool, lower_right: bool, softcap: bool, precision: str
) -> dict[str, Any]:
    """The compile-time arguments that all kernels here share."""
    return {
        "D": D,
        "E": E,
        "GROUP": group,
        "HAS_LEFT": left,
        "HAS_RIGHT": right,
        "LOWER_RIGHT": lower_right,
        "HAS_SOFTCAP": softcap,
        "PRECISION": precision,
        "BLOCK_D": block(D),
        "BLOCK_E": block(E),
    }


def sizes(tile: Tiles) -> dict[str, int]:
    """The rest of them, and how to launch it."""
    m, n, num_warps, num_stages = tile
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def score_strides(name: str, tensor: Tensor | None) -> dict[str, int | None]:
    """As ``strides``, of a tensor expanded to the scores' shape; None along queries or keys that share."""
    return {at: stride or (0 if at[-1] in "bn" else None) for at, stride in strides(name, "bnqk", tensor).items()}


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
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
    out: Tensor,
    lse: Tensor,
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
    bias_gradient: bool,
    distance_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, distance, position_query, position_key and segment.

    None of what is not there and, for bias and distance, not asked for; those of queries, position_query, keys and
    values are ``[B, T, N, D]`` in memory. dout, dlse and dweights are gradients of the three results of
    ``attention_forward``, None for zeros; out and lse are two of the results, and the rest are its arguments.
    """
    (B, N, Q, D), (M, K, E) = query.shape, value.shape[1:]
    packed = cu_q is not None
    nothing = 0 in (B, N, Q, K)
    new = functools.partial(torch.zeros if packed or nothing else torch.empty, device=query.device)

    def rows_like(tensor: Tensor) -> Tensor:
        B, N, T, D = tensor.shape
        return new(B, T, N, D, dtype=tensor.dtype).transpose(1, 2)

    dq, dk, dv = rows_like(query), rows_like(key), rows_like(value)
    dbias = new(bias.shape, dtype=bias.dtype) if bias is not None and bias_gradient else None
    dposition_query = None if position_query is None else rows_like(position_query)
    dsegment = None if segment is None else new(segment.shape, dtype=segment.dtype)
    ddistance = new(distance.shape, dtype=distance.dtype) if distance is not None and distance_gradient else None
    dposition_key = None if position_key is None else new(position_key.shape, dtype=position_key.dtype)
    if nothing:
        return dq, dk, dv, dbias, ddistance, dposition_query, dposition_key, dsegment
    # What belongs to the two ends of a table, of each query.
    position_ends, distance_ends = (
        None if gradient is None else new(B, N, Q, 2, dtype=torch.float32) for gradient in (dposition_key, ddistance)
    )
    sequences = cu_q.shape[0] - 1 if cu_q is not None else B
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    if weights == "mean" and dweights is not None:
        dweights = dweights[:, None]
    bias, mask, dweights = (None if t is None else t.expand(B, N, Q, K) for t in (bias, mask, dweights))
    base, excess, delta = torch.empty(3, B, N, Q, dtype=torch.float32, device=query.device)
    device = limits(query.device)
    reads = precision(query.dtype, allow_tf32, device)
    terms = relative(query, distance, segment, segment_q, segment_k, rank_q, rank_k, distance_zero)
    added = any(t is not None for t in (bias, distance, segment))
    tensors = {
        "query_ptr": query, **strides("q", "bnqd", query), "key_ptr": key, **strides("k", "bmkd", key),
        "bias_ptr": bias, **score_strides("b", bias), "mask_ptr": mask, **score_strides("m", mask),
        **terms, **positions(position_query, position_key, position_zero),
        "seed_ptr": seed if dropout_p else None, "base_ptr": base,
        "excess_ptr": excess if added else None, "delta_ptr": delta,
        "dout_ptr": dout, **strides("g", "bnqe", dout), "dweights_ptr": dweights, **score_strides("w", dweights),
    }  # fmt: skip
    values = {"value_ptr": value, **strides("v", "bmke", value)}
    packing = {"cu_q_ptr": cu_q, "cu_k_ptr": cu_k, "M": M, "T_q": Q, "T_k": K}
    options = {
        "left": min(left, 2**30), "right": min(right, 2**30), "threshold": dropout_threshold(dropout_p),
        "keep_scale": kept(dropout_p), "scale": scale, "softcap": softcap,
        "dweights_scale": 1.0 / N if weights == "mean" else 1.0, **OPTIONS,
        **constants(D, E, N // M, left >= 0, right >= 0, lower_right, softcap != 0.0, reads),
    }  # fmt: skip
    how = functools.partial(
        backward_tiles, D=D, E=E, P=0 if position_query is None else position_query.shape[3], dtype=query.dtype,
        precision=reads, dense=bias is not None or mask is not None or dropout_p > 0.0 or has_any(terms), limits=device,
    )  # fmt: skip
    with torch.cuda.device_of(query):  # for a CPU tensor, nothing
        tile = how("rows")
        rows_backward_kernel[triton.cdiv(max_q, tile.block_m) * sequences * N,](
            **tensors, **packing, out_ptr=out, **strides("o", "bnqe", out), lse_ptr=lse, **strides("l", "bnq", lse),
            dlse_ptr=dlse, **strides("r", "bnq", dlse), max_q=max_q, **options, **sizes(tile),
        )  # fmt: skip
        tile = how("key")
        live = None if mask is None else live_ranges(mask.mT, tile.block_n)
        key_backward_kernel[triton.cdiv(max_k, tile.block_n) * sequences * M,](
            **tensors, **values, **packing, live_ptr=live, **strides("l", "bnq", live),
            dkey_ptr=dk, dvalue_ptr=dv, max_k=max_k, **options, **sizes(tile),
        )  # fmt: skip
        tile = how("query")
        live = None if mask is None else live_ranges(mask, tile.block_m)
        query_backward_kernel[triton.cdiv(max_q, tile.block_m) * sequences * N,](
            **tensors, **values, **packing, live_ptr=live, **strides("l", "bnq", live),
            dquery_ptr=dq, dposition_query_ptr=dposition_query, position_ends_ptr=position_ends,
            distance_ends_ptr=distance_ends, dsegment_ptr=dsegment, max_q=max_q, **options, **sizes(tile),
        )  # fmt: skip
        if dbias is not None:
            tile = how("bias")
            Bb, Nb, Qb, Kb = dbias.shape
            bias_backward_kernel[triton.cdiv(Qb, tile.block_m) * triton.cdiv(Kb, tile.block_n) * Bb * Nb,](
                **tensors, **values, dbias_ptr=dbias, B=B, N=N, Q=Q, K=K, Bb=Bb, Nb=Nb, Qb=Qb, Kb=Kb,
                SUM_Q=Qb == 1, SUM_K=Kb == 1, **options, **sizes(tile),
            )  # fmt: skip
    table = functools.partial(
        table_backward, sequences=sequences, tile=how("diagonals"),
        arguments=tensors | values | packing | options,
    )  # fmt: skip
    if distance is not None and distance_ends is not None:
        ddistance = table("distance", distance, distance_zero, distance_ends.sum(2))
    if position_query is not None and position_key is not None and position_ends is not None:
        of_queries = torch.where(position_query.isfinite(), position_query, 0.0).float()  # NaN is in their numbers
        dposition_key = table("position_key", position_key, position_zero, position_ends.mT @ of_queries)
    return dq, dk, dv, dbias, ddistance, dposition_query, dposition_key, dsegment


def configurations(limits: Limits) -> Iterator[dict[str, Any]]:
    """The ways in which these kernels run: head widths and types plain, causal, and with everything but what goes by
    relative position; with a table by distance; and with all else that goes by it, in a causal band.
    """
    half, tf32, ieee = (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    cases = [(D, *half, kind) for D in (64, 128) for kind in ("plain", "causal", "all")]
    cases += [(D, *tf32, kind) for D in (64, 128) for kind in ("causal", "all")]
    cases += [(64, *ieee, "causal"), (128, torch.float16, "ieee", "causal")]
    cases += [(D, *half, "causal") for D in (32, 96, 256)]
    cases += [(D, *half, kind) for D in (64, 128) for kind in ("distance", "relative")]
    cases.append((64, *tf32, "relative"))
    for D, dtype, reads, kind in cases:
        if reads == "tf32" and limits.backend != "cuda":
            continue
        everything, distance, relative = kind == "all", kind == "distance", kind == "relative"
        dense = everything or distance or relative
        tensors = dict.fromkeys(("query_ptr", "key_ptr", "dout_ptr"), dtype) | {
            "bias_ptr": dtype if everything else None,
            "mask_ptr": torch.bool if everything else None,
            "seed_ptr": torch.int64 if dense else None,
            "dweights_ptr": None,
            "base_ptr": torch.float32,
            "excess_ptr": torch.float32 if dense else None,
            "delta_ptr": torch.float32,
            "distance_ptr": dtype if distance else None,
            **dict.fromkeys(("position_query_ptr", "position_key_ptr", "segment_ptr"), dtype if relative else None),
            **dict.fromkeys(("segment_q_ptr", "segment_k_ptr"), torch.int32 if relative else None),
            **dict.fromkeys(("rank_q_ptr", "rank_k_ptr"), torch.int32 if relative else None),
        }
        values = {"value_ptr": dtype}
        packing = {"cu_q_ptr": None, "cu_k_ptr": None}
        live = {"live_ptr": torch.int32 if everything else None}
        rows = {"out_ptr": dtype, "lse_ptr": torch.float32, "dlse_ptr": torch.float32 if everything else None}
        queries = {
            "dquery_ptr": dtype,
            "dposition_query_ptr": dtype if relative else None,
            "position_ends_ptr": torch.float32 if relative else None,
            "distance_ends_ptr": torch.float32 if distance else None,
            "dsegment_ptr": dtype if relative else None,
        }
        unit = dict.fromkeys((f"stride_{at}" for at in ("qd", "kd", "ge", "bk", "mk", "wk", "up")), 1)
        constant = unit | constants(D, D, 1, everything, kind not in ("plain", "distance"), False, everything, reads)
        constant |= {"P": D if relative else 1, "BLOCK_P": D if relative else 16}
        name = f"D={D} {NAMES[dtype]}{' tf32' * (reads == 'tf32')} {kind}"
        of_keys = {"dkey_ptr": dtype, "dvalue_ptr": dtype}
        kernels = [
            ("key", key_backward_kernel, values | packing | live | of_keys, {"stride_ve": 1}),
            ("query", query_backward_kernel, values | packing | live | queries, {"stride_ve": 1}),
        ]
        if everything:
            weights = {"dweights_ptr": dtype}
            sums = {"stride_ve": 1, "SUM_Q": False, "SUM_K": False}
            kernels += [
                ("rows", rows_backward_kernel, rows | packing | weights, {"stride_oe": 1}),
                ("bias", bias_backward_kernel, values | {"dbias_ptr": dtype}, sums),
            ]
        elif kind == "plain" or relative:
            kernels.append(("rows", rows_backward_kernel, rows | packing, {"stride_oe": 1}))
        if distance or relative:
            table = {
                "ddistance_ptr": torch.float32 if distance else None,
                "dposition_key_ptr": torch.float32 if relative else None,
            }
            kernels.append(("diagonals", diagonals_backward_kernel, values | packing | table, {"stride_ve": 1}))
        for of, kernel, more, only in kernels:
            P = D if relative else 0
            block_m, block_n, num_warps, num_stages = backward_tiles(of, D, D, P, dtype, reads, dense, limits)
            block = {"BLOCK": block_m} if of == "diagonals" else {"BLOCK_M": block_m, "BLOCK_N": block_n}
            yield configuration(
                f"attention backward {of} {name}", kernel, tensors | more, constant | only | block,
                num_warps, num_stages,
            )  # fmt: skip
