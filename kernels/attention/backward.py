"""Gradients of attention: of keys and values, of queries, and of a bias of any broadcast shape.

Nothing of the size of the scores was saved: each kernel computes them again, tile by tile, from the log-sum-exp.
With w the weights after dropout and dw their gradient (``dO V^T`` and what comes from outside), the scores have the
gradient ``ds = p * (dw' - delta)``, dw' through dropout and ``delta = sum(w * dw) - dlse`` of each row.

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
from .forward import live_ranges
from .plan import Tiles, block, kept, precision, strides
from .scores import (
    LOG2E,
    at_row,
    dropout_keep,
    dropout_keys,
    dropout_threshold,
    keys_of,
    keys_of_all,
    load_tile,
    sequence_at,
    tanh,
    visible_in_band,
)

FAR = tl.constexpr(1024.0)  # from zero, where fp32 has too few digits for what is in a log-sum-exp beside the maximum

# --- the pieces ---


@triton.jit
def queries_of(first, last, shift, left, right, Q, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of queries ``[low, high)`` that see any key from first to last in the band."""
    low = 0
    high = Q
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(first - shift - right, 0), Q)
    if HAS_LEFT:
        high = tl.minimum(tl.maximum(last - shift + left + 1, 0), Q)
    return low, high


@triton.jit
def queries_of_all(first, last, shift, left, right, Q, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of queries ``[low, high)`` that see every key from first to last in the band; may be empty."""
    low = 0
    high = Q
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(last - shift - right, 0), Q)
    if HAS_LEFT:
        high = tl.minimum(tl.maximum(first - shift + left + 1, 0), Q)
    return low, high


@triton.jit
def load_rows(tensor, first, seen, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows from the first, zero where not seen; tensor: pointer to a head, strides of row and column."""
    ptr, stride, stride_column = tensor
    rows = tl.arange(0, seen.shape[0])[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    return load_tile(at_row(ptr, first, stride), rows, stride, columns, stride_column, seen[:, None], WIDTH, True)


@triton.jit
def load_scores(scores, at, Q, K):
    """A tile of a tensor ``[B, N, Q, K]``; scores: pointer and strides, None of queries or keys that share."""
    ptr, stride_b, stride_n, stride_q, stride_k = scores
    b, n, i0, j0, rows, columns = at
    ptr = at_row(at_row(ptr, b, stride_b), n, stride_n)
    offsets = rows * 0
    mask = offsets == 0
    if stride_q is not None:
        ptr = at_row(ptr, i0, stride_q)
        offsets = rows * stride_q
        mask = i0 + rows < Q
    if stride_k is not None:
        ptr = at_row(ptr, j0, stride_k)
        offsets = offsets + columns * stride_k
        mask = mask & (j0 + columns < K)
    return tl.load(ptr + offsets, mask=mask, other=0)


@triton.jit
def finite(x):
    """x with zeros for what is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def visible_scores(base, at, mask, band, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """What of a tile of scores is visible; arguments as of ``score_gradients``."""
    Q, K, shift, left, right = band
    _, _, i0, j0, rows, columns = at
    visible = (base != float("inf")) & (j0 + columns < K)
    visible = visible & visible_in_band(i0 + rows, j0 + columns, shift, left, right, HAS_LEFT, HAS_RIGHT)
    if mask[0] is not None:
        visible = visible & (load_scores(mask, at, Q, K) != 0)
    return visible


@triton.jit
def score_gradients(
    qk, dw, base, excess, delta,  # tiles of q.k and of dO.v, and what goes with their queries
    at,                  # batch, head, first query, first key, queries and keys from there (as the tiles have them)
    bias, mask, dweights,  # pointers and strides
    dropout,             # seed, threshold, scale of what is kept, number of heads
    band,                # Q, K, shift, left, right
    scale, softcap, dweights_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile of scores, queries by keys or its transpose: the weights after dropout, the gradient of the scores,
    and that of ``scale * q.k`` in them.
    """
    Q, K = band[0], band[1]
    b, n, i0, j0, rows, columns = at
    visible = base != float("inf")  # a row that sees nothing has no gradient, whatever comes from outside
    if MASKED:
        visible = visible_scores(base, at, mask, band, HAS_LEFT, HAS_RIGHT)
    x, unit = qk, scale
    if HAS_SOFTCAP:
        x, unit = tanh(qk * (scale / softcap)), softcap
    if bias[0] is not None:  # not in units of log 2, where the least number there is would overflow
        exponent = (x * unit + load_scores(bias, at, Q, K).to(tl.float32) - base) * LOG2E - excess
    else:
        exponent = x * (unit * LOG2E) - base
    p = tl.exp2(exponent)
    if MASKED or bias[0] is not None:
        p = tl.where(visible, p, 0.0)

    if dweights[0] is not None:
        dw += load_scores(dweights, at, Q, K).to(tl.float32) * dweights_scale
    w = p
    if dropout[0] is not None:
        seed_ptr, threshold, keep_scale, N = dropout
        first, second = dropout_keys(seed_ptr, b * N + n, i0 + rows)
        keep = dropout_keep(first, second, j0 + columns, threshold)
        w = tl.where(keep, p * keep_scale, 0.0)
        dw = tl.where(keep, dw * keep_scale, 0.0)
    ds = p * (dw - delta)
    if MASKED or bias[0] is not None:
        ds = tl.where(visible, ds, 0.0)
    dqk = ds
    if HAS_SOFTCAP:
        dqk = ds * (1.0 - x * x)
        if MASKED:  # the score of what is hidden may be NaN
            dqk = tl.where(visible, dqk, 0.0)
    return w, ds, dqk


# --- the sum of each row that the gradient of a softmax subtracts ---


@triton.jit(do_not_specialize=["N", "Q", "K", "left", "right", "threshold"])
def rows_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    seed_ptr,                                               # [1]           or None: no dropout
    out_ptr, stride_ob, stride_on, stride_oq, stride_oe,    # [B, N, Q, E]
    lse_ptr, stride_lb, stride_ln, stride_lq,               # [B, N, Q]
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dlse_ptr, stride_rb, stride_rn, stride_rq,              # [B, N, Q]     or None
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    base_ptr,                                               # [B, N, Q]     out: what scores compare with
    excess_ptr,                                             # [B, N, Q]     out, with a bias
    delta_ptr,                                              # [B, N, Q]     out
    N, Q, K, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_M)
    i0 = tl.program_id(0) % blocks * BLOCK_M
    n = tl.program_id(0) // blocks % N
    b = tl.program_id(0) // blocks // N
    i = i0 + tl.arange(0, BLOCK_M)

    lse_ptr = at_row(at_row(lse_ptr, b, stride_lb), n, stride_ln)
    lse = tl.load(lse_ptr + i.to(tl.int64) * stride_lq, mask=i < Q, other=float("-inf"))
    alive = lse != float("-inf")
    base = tl.where(lse == float("inf"), float("nan"), lse)
    if bias_ptr is None:
        base = base * LOG2E
    base = tl.where(alive, base, float("inf"))
    out_ptr = at_row(at_row(out_ptr, b, stride_ob), n, stride_on)
    dout_ptr = at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn)
    out = load_rows((out_ptr, stride_oq, stride_oe), i0, i < Q, E, BLOCK_E)
    do = load_rows((dout_ptr, stride_gq, stride_ge), i0, i < Q, E, BLOCK_E)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptr = at_row(at_row(dlse_ptr, b, stride_rb), n, stride_rn)
        delta -= tl.load(dlse_ptr + i.to(tl.int64) * stride_rq, mask=i < Q, other=0.0)

    if bias_ptr is not None or dweights_ptr is not None:
        band = (Q, K, K - Q if LOWER_RIGHT else 0, left, right)
        bias = (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk)
        mask = (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk)
        rows = tl.arange(0, BLOCK_M)[:, None]
        columns = tl.arange(0, BLOCK_N)[None, :]
        none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        query_ptr = at_row(at_row(query_ptr, b, stride_qb), n, stride_qn)
        key_ptr = at_row(at_row(key_ptr, b, stride_kb), n // GROUP, stride_km)
        q = load_rows((query_ptr, stride_qq, stride_qd), i0, i < Q, D, BLOCK_D)
        low, high = keys_of(i0, tl.minimum(i0 + BLOCK_M, Q) - 1, band[2], left, right, K, HAS_LEFT, HAS_RIGHT)
        excess = tl.zeros([BLOCK_M], tl.float32)
    if bias_ptr is not None:
        # Where the bias is the least number there is, so is the lse, and the sum that was in it is lost: count again.
        total = tl.zeros([BLOCK_M], tl.float32)
        far = alive & (tl.abs(lse) > FAR)
        last = tl.where(tl.max(far.to(tl.int32), 0) != 0, high, low)
        for j0 in tl.range(low, last, BLOCK_N, num_stages=1):
            k = load_rows((key_ptr, stride_kk, stride_kd), j0, j0 + tl.arange(0, BLOCK_N) < K, D, BLOCK_D)
            p, _, _ = score_gradients(
                dot(q, tl.trans(k), none, PRECISION), none, base[:, None], 0.0, 0.0, (b, n, i0, j0, rows, columns),
                bias, mask, (None, 0, 0, 0, 0), (None, 0, 1.0, N), band, scale, softcap, dweights_scale,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
            )  # fmt: skip
            total += tl.sum(p, 1)
        excess = tl.log2(tl.where(far & (total > 0.0), total, 1.0))
        tl.store(at_row(excess_ptr, b * N + n, Q) + i, excess, mask=i < Q)
    if dweights_ptr is not None:
        for j0 in tl.range(low, high, BLOCK_N):
            k = load_rows((key_ptr, stride_kk, stride_kd), j0, j0 + tl.arange(0, BLOCK_N) < K, D, BLOCK_D)
            _, ds, _ = score_gradients(
                dot(q, tl.trans(k), none, PRECISION), none, base[:, None], excess[:, None], 0.0,
                (b, n, i0, j0, rows, columns), bias, mask, (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
                (seed_ptr, threshold, keep_scale, N), band, scale, softcap, dweights_scale,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
            )  # fmt: skip
            delta += tl.sum(ds, 1)  # which is w * dw, for nothing was subtracted

    tl.store(at_row(base_ptr, b * N + n, Q) + i, base, mask=i < Q)
    tl.store(at_row(delta_ptr, b * N + n, Q) + i, tl.where(alive, delta, 0.0), mask=i < Q)


@triton.jit
def load_numbers(numbers, i, Q):
    """The three numbers of queries i, from pointers and the row to count from; past the last no gradient."""
    base_ptr, excess_ptr, delta_ptr, row = numbers
    base = tl.load(base_ptr + row + i, mask=i < Q, other=float("inf"))
    excess = tl.zeros_like(base)
    if excess_ptr is not None:
        excess = tl.load(excess_ptr + row + i, mask=i < Q, other=0.0)
    return base, excess, tl.load(delta_ptr + row + i, mask=i < Q, other=0.0)


# --- keys and values ---


@triton.jit
def add_queries(
    dk, dv, k, v, low, high, head, j0, query, dout, numbers,
    bias, mask, dweights, dropout, band, scale, softcap, dweights_scale,
    D: tl.constexpr, E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
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
        w, _, dqk = score_gradients(
            dot(k, tl.trans(q), none, PRECISION), dot(v, tl.trans(do), none, PRECISION),
            base[None, :], excess[None, :], delta[None, :], (b, n, i0, j0, rows, columns),
            bias, mask, dweights, dropout, band, scale, softcap, dweights_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        dv = dot(w.to(do.dtype), do, dv, PRECISION)
        dk = dot(dqk.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def spoiled_by_queries(
    dv, low, high, head, j0, dout, numbers, mask, band,
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
        visible = visible_scores(base[None, :], (b, n, i0, j0, rows, columns), mask, band, HAS_LEFT, HAS_RIGHT)
        spoilers = tl.where(tl.abs(do.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.float16)
        count = dot(tl.where(visible, 1.0, 0.0).to(tl.float16), spoilers, count, "ieee")
    return tl.where(count > 0.0, float("nan"), dv)


@triton.jit(do_not_specialize=["M", "T_q", "T_k", "max_k", "left", "right", "threshold"])
def key_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    live_ptr, stride_lb, stride_ln, stride_lq,              # [B, N, key blocks, 3]  with the mask
    cu_q_ptr, cu_k_ptr,                                     # [Z+1]         or None: not packed
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess with a bias
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dkey_ptr,                                               # [B, K, M, D]  out
    dvalue_ptr,                                             # [B, K, M, E]  out
    M, T_q, T_k, max_k, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
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
    bias = (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk)
    mask = (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk)
    dweights = (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk)
    dropout = (seed_ptr, threshold, keep_scale, N)
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
    HIDES: tl.constexpr = HAS_LEFT or HAS_RIGHT or mask_ptr is not None or bias_ptr is not None
    CAREFUL_M: tl.constexpr = 16 if BLOCK_M == 16 else BLOCK_M // 2
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
            if CAREFUL:
                full_low = high
                full_high = high
                dv = spoiled_by_queries(
                    dv, low, high, (z, n), j0, (dout, stride_gq, stride_ge), numbers, mask, band,
                    E, HAS_LEFT, HAS_RIGHT, CAREFUL_M,
                )  # fmt: skip
            bounds = (low, full_low, full_high, high)
            for PHASE in tl.static_range(3):
                if (
                    (PHASE == 0 and (HAS_RIGHT or mask_ptr is not None or CAREFUL))
                    or (PHASE == 1 and not CAREFUL)
                    or (PHASE == 2 and (HAS_LEFT or mask_ptr is not None) and not CAREFUL)
                ):
                    dk, dv = add_queries(
                        dk, dv, k, v, bounds[PHASE], bounds[PHASE + 1], (z, n), j0,
                        (query, stride_qq, stride_qd), (dout, stride_gq, stride_ge), numbers,
                        bias, mask, dweights, dropout, band, scale, softcap, dweights_scale,
                        D, E, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION,
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
def add_keys(
    dq, q, do, base, excess, delta, low, high, head, i0, key, value,
    bias, mask, dweights, dropout, band, scale, softcap, dweights_scale,
    D: tl.constexpr, E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, with what the keys from low to high add; CAREFUL as in ``add_queries``."""
    Q, K = band[0], band[1]
    b, n = head
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
        _, _, dqk = score_gradients(
            dot(q, tl.trans(k), none, PRECISION), dot(do, tl.trans(v), none, PRECISION), base, excess, delta,
            (b, n, i0, j0, rows, columns), bias, mask, dweights, dropout, band, scale, softcap, dweights_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        dq = dot(dqk.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["M", "T_q", "T_k", "max_q", "left", "right", "threshold"])
def query_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]  or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    live_ptr, stride_lb, stride_ln, stride_lq,              # [B, N, query blocks, 3]  with the mask
    cu_q_ptr, cu_k_ptr,                                     # [Z+1]         or None: not packed
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess with a bias
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dquery_ptr,                                             # [B, Q, N, D]  out
    M, T_q, T_k, max_q, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
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
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Where something is hidden, a NaN in it may have spoiled the sums; then they are made again, with care.
    HIDES: tl.constexpr = HAS_LEFT or HAS_RIGHT or mask_ptr is not None
    for CAREFUL in tl.static_range(2 if HIDES else 1):
        if CAREFUL:
            again = tl.max(tl.where(dq != dq, 1, 0))  # flat: see forward.py
            dq = tl.where(again != 0, 0.0, dq)
            full_low = low
            full_high = low
            high = tl.where(again != 0, high, low)
        bounds = (low, full_low, full_high, high)
        for PHASE in tl.static_range(3):
            if (
                (PHASE == 0 and (HAS_LEFT or mask_ptr is not None) and not CAREFUL)
                or (PHASE == 1 and not CAREFUL)
                or PHASE == 2
            ):
                dq = add_keys(
                    dq, q, do, base[:, None], excess[:, None], delta[:, None],
                    bounds[PHASE], bounds[PHASE + 1], (z, n), i0,
                    (key_ptr, stride_kk, stride_kd), (value_ptr, stride_vk, stride_ve),
                    (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
                    (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
                    (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
                    (seed_ptr, threshold, keep_scale, N), (Q, K, shift, left, right), scale, softcap, dweights_scale,
                    D, E, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, BLOCK_N, PHASE != 1, CAREFUL,
                )  # fmt: skip

    rows = tl.arange(0, BLOCK_M)[:, None] * N + n
    d = tl.arange(0, BLOCK_D)[None, :]
    dq = (dq * scale).to(dquery_ptr.dtype.element_ty)
    dquery_ptr = at_row(dquery_ptr, tl.cast(b, tl.int64) * T_q + first_q + i0, N * D)
    tl.store(dquery_ptr + (rows * D + d), dq, mask=(i < Q)[:, None] & (d < D))


# --- bias ---


@triton.jit(do_not_specialize=["B", "N", "Q", "K", "Bb", "Nb", "Qb", "Kb", "left", "right", "threshold"])
def bias_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,   # [B, N, Q, K]
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,   # [B, N, Q, K]  or None
    seed_ptr,                                               # [1]           or None: no dropout
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess with a bias
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    dbias_ptr,                                              # [Bb, Nb, Qb, Kb]  out: each 1 or that of the scores
    B, N, Q, K, Bb, Nb, Qb, Kb, left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
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
        _, ds, _ = score_gradients(
            dot(q, tl.trans(k), none, PRECISION), dot(do, tl.trans(v), none, PRECISION), base[:, None], excess[:, None],
            delta[:, None], (b, n, i0, j0, rows, columns), (bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk),
            (mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk),
            (dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk),
            (seed_ptr, threshold, keep_scale, N), (Q, K, shift, left, right), scale, softcap, dweights_scale,
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
    gradient: str, D: int, E: int, dtype: torch.dtype, precision: str, dense: bool, limits: Limits
) -> Tiles:
    """The tiles of the kernel that makes a gradient, for heads of width D and E; ``dense``: with more than a band.

    A program keeps the rows that it owns and their gradients, and walks over the others.
    """
    width = max(64, block(max(D, E)))
    # Before Hopper, products take their operands from registers, so there are fewer for the tiles.
    roomy = limits.shared > 200_000
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
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
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
    allow_tf32: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, where asked for, bias; ``[B, T, N, D]`` in memory.

    dout, dlse and dweights are gradients of the three results of ``attention_forward``, None for zeros; out and lse
    are two of the results, and the rest are its arguments.
    """
    (B, N, Q, D), (M, K, E) = query.shape, value.shape[1:]
    packed = cu_q is not None
    dq = query.new_empty(B, Q, N, D)
    dk, dv = key.new_empty(B, K, M, D), value.new_empty(B, K, M, E)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_gradient else None
    if packed or 0 in (B, N, Q, K):  # not every row has a program
        for gradient in (dq, dk, dv, dbias):
            if gradient is not None:
                gradient.zero_()
    views = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias
    if 0 in (B, N, Q, K):
        return views
    sequences = cu_q.shape[0] - 1 if packed else B
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    if weights == "mean" and dweights is not None:
        dweights = dweights[:, None]
    bias, mask, dweights = (None if t is None else t.expand(B, N, Q, K) for t in (bias, mask, dweights))
    base, excess, delta = torch.empty(3, B, N, Q, dtype=torch.float32, device=query.device)
    device = limits(query.device)
    reads = precision(query.dtype, allow_tf32, device)
    tensors = {
        "query_ptr": query, **strides("q", "bnqd", query), "key_ptr": key, **strides("k", "bmkd", key),
        "bias_ptr": bias, **score_strides("b", bias), "mask_ptr": mask, **score_strides("m", mask),
        "seed_ptr": seed if dropout_p else None, "base_ptr": base,
        "excess_ptr": None if bias is None else excess, "delta_ptr": delta,
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
    dense = bias is not None or mask is not None or dropout_p > 0.0
    how = functools.partial(backward_tiles, D=D, E=E, dtype=query.dtype, precision=reads, dense=dense, limits=device)
    with torch.cuda.device_of(query):  # for a CPU tensor, nothing
        tile = how("rows")
        rows_backward_kernel[triton.cdiv(Q, tile.block_m) * B * N,](
            **tensors, out_ptr=out, **strides("o", "bnqe", out), lse_ptr=lse, **strides("l", "bnq", lse),
            dlse_ptr=dlse, **strides("r", "bnq", dlse), N=N, Q=Q, K=K, **options, **sizes(tile),
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
            dquery_ptr=dq, max_q=max_q, **options, **sizes(tile),
        )  # fmt: skip
        if dbias is not None:
            tile = how("bias")
            Bb, Nb, Qb, Kb = dbias.shape
            bias_backward_kernel[triton.cdiv(Qb, tile.block_m) * triton.cdiv(Kb, tile.block_n) * Bb * Nb,](
                **tensors, **values, dbias_ptr=dbias, B=B, N=N, Q=Q, K=K, Bb=Bb, Nb=Nb, Qb=Qb, Kb=Kb,
                SUM_Q=Qb == 1, SUM_K=Kb == 1, **options, **sizes(tile),
            )  # fmt: skip
    return views


def configurations(limits: Limits) -> Iterator[dict[str, Any]]:
    """The ways in which these kernels run: head widths and types plain, causal, and with everything."""
    half, tf32, ieee = (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    cases = [(D, *half, kind) for D in (64, 128) for kind in ("plain", "causal", "all")]
    cases += [(D, *tf32, kind) for D in (64, 128) for kind in ("causal", "all")]
    cases += [(64, *ieee, "causal"), (128, torch.float16, "ieee", "causal")]
    cases += [(D, *half, "causal") for D in (32, 96, 256)]
    for D, dtype, reads, kind in cases:
        if reads == "tf32" and limits.backend != "cuda":
            continue
        everything = kind == "all"
        tensors = dict.fromkeys(("query_ptr", "key_ptr", "dout_ptr"), dtype) | {
            "bias_ptr": dtype if everything else None,
            "mask_ptr": torch.bool if everything else None,
            "seed_ptr": torch.int64 if everything else None,
            "dweights_ptr": None,
            "base_ptr": torch.float32,
            "excess_ptr": torch.float32 if everything else None,
            "delta_ptr": torch.float32,
        }
        values = {"value_ptr": dtype}
        packing = {"live_ptr": torch.int32 if everything else None, "cu_q_ptr": None, "cu_k_ptr": None}
        rows = {"out_ptr": dtype, "lse_ptr": torch.float32, "dlse_ptr": torch.float32 if everything else None}
        unit = dict.fromkeys((f"stride_{at}" for at in ("qd", "kd", "ge", "bk", "mk", "wk")), 1)
        constant = unit | constants(D, D, 1, everything, kind != "plain", False, everything, reads)
        name = f"D={D} {NAMES[dtype]}{' tf32' * (reads == 'tf32')} {kind}"
        kernels = [
            ("key", key_backward_kernel, values | packing | {"dkey_ptr": dtype, "dvalue_ptr": dtype}, {"stride_ve": 1}),
            ("query", query_backward_kernel, values | packing | {"dquery_ptr": dtype}, {"stride_ve": 1}),
        ]
        if everything:
            weights = {"dweights_ptr": dtype}
            sums = {"stride_ve": 1, "SUM_Q": False, "SUM_K": False}
            kernels += [
                ("rows", rows_backward_kernel, rows | weights, {"stride_oe": 1}),
                ("bias", bias_backward_kernel, values | {"dbias_ptr": dtype}, sums),
            ]
        elif kind == "plain":
            kernels.append(("rows", rows_backward_kernel, rows, {"stride_oe": 1}))
        for of, kernel, more, only in kernels:
            block_m, block_n, num_warps, num_stages = backward_tiles(of, D, D, dtype, reads, everything, limits)
            yield configuration(
                f"attention backward {of} {name}", kernel, tensors | more,
                constant | only | {"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages,
            )  # fmt: skip
