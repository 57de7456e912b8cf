"""Attention of few queries to many keys: the keys are split among programs, and a second kernel combines the parts.

The query heads that share a key head, times their few queries, are the rows of one tile, so a program reads its
keys and values once for all of them. Each leaves its unnormalised output with the maximum and the sum that go with
it, in fp32; they are added up in the order of the keys, so the result is the same every time.

Row r of a tile is query ``r // GROUP`` of the group's head ``r % GROUP``.
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
from .plan import Tiles, block, has_any, kept, precision, strides
from .scores import (
    LN2,
    LOG2E,
    at_row,
    dropout_keep,
    dropout_keys,
    dropout_threshold,
    level_of,
    load_segments,
    load_tile,
    scores_of_tile,
    visible_in_tile,
    weight_of,
)

ROWS = 64  # at most, in a tile
LEAST = 256  # keys that are worth a program of their own
BLOCK_S = 16  # parts that are combined at a time


@triton.jit
def attend_to_keys(
    acc, q, i, begin, end,
    key_ptr, stride_kk, stride_kd,
    value_ptr, stride_vk, stride_ve,
    bias_ptr, bias_rows, stride_bk,
    mask_ptr, mask_rows, stride_mk,
    distance, segment, ranks,  # tuples whose first is None where there is none
    seed_ptr, head, threshold, Q, shift, left, right, scale, softcap,
    D: tl.constexpr, E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BIAS_PER_ROW: tl.constexpr, MASK_PER_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Unnormalised output (added to acc), maximum and sum of the keys from begin to end.

    A value that is hidden is multiplied by 0, and 0 * NaN is NaN: CAREFUL takes what is not finite out of the product.
    """
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    ADDED: tl.constexpr = HAS_BIAS or distance[0] is not None or segment[0] is not None
    offs_n, offs_d, offs_e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, acc.shape[1])
    if seed_ptr is not None:
        first_word, second_word = dropout_keys(seed_ptr, head, i)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    for first in tl.range(begin, end, BLOCK_N):
        seen = seen_from(first, end, offs_n, mask_ptr, stride_mk, MASK_PER_ROW)
        k = load_tile(
            at_row(key_ptr, first, stride_kk), offs_n[None, :], stride_kk, offs_d[:, None], stride_kd, seen[None, :],
            D, True,
        )  # fmt: skip
        visible = visible_to_rows(
            first, i, offs_n, seen, mask_ptr, mask_rows, stride_mk, ranks, Q, shift, left, right,
            HAS_LEFT, HAS_RIGHT, MASK_PER_ROW,
        )  # fmt: skip
        bias_here = bias_ptr
        if HAS_BIAS:
            bias_here = at_row(bias_ptr, first, stride_bk)
        s = scores_of_tile(
            dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION), visible, bias_rows, i, offs_n,
            first + offs_n, seen, Q, bias_here, 1, stride_bk, distance, segment, scale, softcap,
            HAS_SOFTCAP, BIAS_PER_ROW, True,
        )  # fmt: skip
        m_next = tl.maximum(m, level_of(tl.max(s, 1), scale, ADDED, HAS_SOFTCAP))
        level = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = weight_of(s, level[:, None], scale, ADDED, HAS_SOFTCAP)
        decay = tl.exp2((m - level) * (LOG2E if ADDED else 1.0))
        m = m_next
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        acc = acc * decay[:, None]
        if seed_ptr is not None:
            j = first + offs_n
            p = tl.where(dropout_keep(first_word[:, None], second_word[:, None], j[None, :], threshold), p, 0.0)
        v = load_tile(
            at_row(value_ptr, first, stride_vk), offs_n[:, None], stride_vk, offs_e[None, :], stride_ve, seen[:, None],
            E, True,
        )  # fmt: skip
        if CAREFUL:
            v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
        acc = dot(p.to(v.dtype), v, acc, PRECISION)
    return acc, m, l


@triton.jit
def spoiled(
    i, begin, end,
    value_ptr, stride_vk, stride_ve,
    mask_ptr, mask_rows, stride_mk, ranks,
    Q, shift, left, right,
    E: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """NaN where a row sees a value that is not finite, else 0: an output to begin with."""
    offs_n, offs_e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        seen = seen_from(first, end, offs_n, mask_ptr, stride_mk, MASK_PER_ROW)
        visible = visible_to_rows(
            first, i, offs_n, seen, mask_ptr, mask_rows, stride_mk, ranks, Q, shift, left, right,
            HAS_LEFT, HAS_RIGHT, MASK_PER_ROW,
        )  # fmt: skip
        v = load_tile(
            at_row(value_ptr, first, stride_vk), offs_n[:, None], stride_vk, offs_e[None, :], stride_ve, seen[:, None],
            E, True,
        )  # fmt: skip
        bad = (tl.abs(v.to(tl.float32)) < float("inf")) == 0
        count = dot(visible.to(tl.float16), bad.to(tl.float16), count, "ieee")
    return tl.where(count > 0, float("nan"), 0.0)


@triton.jit
def seen_from(first, end, offs_n, mask_ptr, stride_mk, MASK_PER_ROW: tl.constexpr):
    """Which keys of a tile are read: those before the end, that a mask for all rows does not hide."""
    seen = first + offs_n < end
    if mask_ptr is not None and not MASK_PER_ROW:
        seen = seen & (tl.load(at_row(mask_ptr, first, stride_mk) + offs_n * stride_mk, mask=seen, other=0) != 0)
    return seen


@triton.jit
def visible_to_rows(
    first, i, offs_n, seen, mask_ptr, mask_rows, stride_mk, ranks, Q, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_ROW: tl.constexpr,
):  # fmt: skip
    mask_here = mask_ptr
    if mask_ptr is not None:
        mask_here = at_row(mask_ptr, first, stride_mk)
    return visible_in_tile(
        mask_rows, i, offs_n, first + offs_n, seen, Q, shift, left, right, mask_here, 1, stride_mk, ranks,
        HAS_LEFT, HAS_RIGHT, MASK_PER_ROW,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "N", "Q", "K", "S", "threshold", "low", "high", "span", "shift", "left", "right",
        "distance_zero", "distance_last",
    ]
)  # fmt: skip
def decode_forward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_kn, stride_kk, stride_kd,  # [B, M, K, D]
    value_ptr, stride_vb, stride_vn, stride_vk, stride_ve,  # [B, M, K, E]
    bias_ptr, stride_bb, stride_bn, stride_bq, stride_bk,  # [B, N, Q, K]     or None
    distance_ptr, stride_xb, stride_xn,  # [B, N, distance_last + 1]   or None
    segment_ptr,  # [B, N, Q, 2]           or None
    mask_ptr, stride_mb, stride_mn, stride_mq, stride_mk,  # [B, N, Q, K]     bool, or None
    seed_ptr,  # [1]                       with dropout, or None
    segment_q_ptr, segment_k_ptr,  # [B, Q] [B, K]  with segment
    rank_q_ptr, stride_ab, stride_an,  # [B, N, Q]  or None
    rank_k_ptr, stride_cb,  # [B, K]
    acc_ptr,  # [B, N, Q, S, E]            unnormalised output of each part
    max_ptr,  # [B, N, Q, S]               its largest score
    sum_ptr,  # [B, N, Q, S]               the sum of its weights
    N, Q, K, S, threshold, low, high, span, shift, left, right, distance_zero, distance_last,
    scale, softcap,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BIAS_PER_ROW: tl.constexpr, MASK_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % S
    kv_head = tl.program_id(0) // S % (N // GROUP)
    b = tl.program_id(0) // S // (N // GROUP)
    begin = low + part * span
    end = tl.minimum(begin + span, high)

    rows, offs_d, offs_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    i, g = rows // GROUP, rows % GROUP
    n = kv_head * GROUP
    query_ptr = at_row(at_row(query_ptr, b, stride_qb), n, stride_qn)
    key_ptr = at_row(at_row(key_ptr, b, stride_kb), kv_head, stride_kn)
    value_ptr = at_row(at_row(value_ptr, b, stride_vb), kv_head, stride_vn)
    query_rows = g.to(tl.int64) * stride_qn + i * stride_qq
    q = load_tile(query_ptr, query_rows[:, None], 1, offs_d[None, :], stride_qd, (i < Q)[:, None], D, True)
    bias_rows, mask_rows = rows, rows
    if bias_ptr is not None:
        bias_ptr = at_row(at_row(bias_ptr, b, stride_bb), n, stride_bn)
        bias_rows = g.to(tl.int64) * stride_bn + i * stride_bq
    if mask_ptr is not None:
        mask_ptr = at_row(at_row(mask_ptr, b, stride_mb), n, stride_mn)
        mask_rows = g.to(tl.int64) * stride_mn + i * stride_mq

    distance = (distance_ptr, 0, 0)
    segment = (segment_ptr, 0)
    ranks = (rank_q_ptr, 0)
    head = b * N + n + g
    if distance_ptr is not None:
        distance_rows = at_row(at_row(distance_ptr, b, stride_xb), n, stride_xn) + g.to(tl.int64) * stride_xn
        distance = (distance_rows[:, None], distance_zero - (K - Q), distance_last, None)
    if segment_ptr is not None:
        of_queries = load_segments(at_row(segment_ptr, head, 2 * Q), at_row(segment_q_ptr, b, Q), i, Q)
        segment = of_queries + (at_row(segment_k_ptr, b, K),)
    if rank_q_ptr is not None:
        rank_rows = at_row(at_row(rank_q_ptr, b, stride_ab), n, stride_an) + g.to(tl.int64) * stride_an
        ranks = (tl.load(rank_rows + i, mask=i < Q, other=0), at_row(rank_k_ptr, b, stride_cb))
    acc, m, l = attend_to_keys(  # noqa: E741
        tl.zeros([BLOCK_M, BLOCK_E], tl.float32), q, i, begin, end, key_ptr, stride_kk, stride_kd,
        value_ptr, stride_vk, stride_ve, bias_ptr, bias_rows, stride_bk, mask_ptr, mask_rows, stride_mk,
        distance, segment, ranks,
        seed_ptr, head, threshold, Q, shift, left, right, scale, softcap, D, E, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        BIAS_PER_ROW, MASK_PER_ROW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    RANKED: tl.constexpr = rank_q_ptr is not None
    if HAS_LEFT or HAS_RIGHT or MASK_PER_ROW or RANKED:  # noqa: SIM102  (what compiles it in; then what runs it)
        # Some value was read that is hidden from some row.
        if tl.max((acc != acc).to(tl.int32)) != 0:  # flat: see forward.py
            acc = spoiled(
                i, begin, end, value_ptr, stride_vk, stride_ve, mask_ptr, mask_rows, stride_mk, ranks,
                Q, shift, left, right,
                E, HAS_LEFT, HAS_RIGHT, MASK_PER_ROW, BLOCK_M, BLOCK_N, BLOCK_E,
            )  # fmt: skip
            acc, m, l = attend_to_keys(  # noqa: E741
                acc, q, i, begin, end, key_ptr, stride_kk, stride_kd,
                value_ptr, stride_vk, stride_ve, bias_ptr, bias_rows, stride_bk, mask_ptr, mask_rows, stride_mk,
                distance, segment, ranks,
                seed_ptr, head, threshold, Q, shift, left, right, scale, softcap, D, E, HAS_LEFT, HAS_RIGHT,
                HAS_SOFTCAP, BIAS_PER_ROW, MASK_PER_ROW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip

    stored = (head.to(tl.int64) * Q + i) * S + part
    tl.store(
        acc_ptr + stored[:, None] * E + offs_e[None, :], acc, mask=(i < Q)[:, None] & (offs_e[None, :] < E)
    )  # fmt: skip
    tl.store(max_ptr + stored, m, mask=i < Q)
    tl.store(sum_ptr + stored, l, mask=i < Q)


@triton.jit(do_not_specialize=["N", "Q", "S"])
def decode_combine_kernel(
    acc_ptr,                                           # [B, N, Q, S, E]
    max_ptr,                                           # [B, N, Q, S]
    sum_ptr,                                           # [B, N, Q, S]
    out_ptr, stride_ob, stride_on, stride_oq,          # [B, N, Q, E]
    lse_ptr,                                           # [B, N, Q]
    N, Q, S,
    log2_unit, log_unit, kept,  # the unit of the largest scores, in log 2 and in log; what dropout multiplies by
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E], tl.float32)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)  # noqa: E741
    for start in range(0, S, BLOCK_S):
        mask_s = start + offs_s < S
        part = row * S + start + offs_s
        m_part = tl.load(max_ptr + part, mask=mask_s, other=float("-inf"))
        l_part = tl.load(sum_ptr + part, mask=mask_s, other=0.0)
        acc_part = tl.load(
            acc_ptr + part[:, None] * E + offs_e[None, :], mask=mask_s[:, None] & (offs_e[None, :] < E), other=0.0
        )
        m_next = tl.maximum(m, tl.max(m_part, 0))
        origin = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight = tl.exp2((m_part - origin) * log2_unit)
        decay = tl.exp2((m - origin) * log2_unit)
        m = m_next
        l = l * decay + tl.sum(weight * l_part, 0)  # noqa: E741
        acc = acc * decay + tl.sum(weight[:, None] * acc_part, 0)
    blind = l == 0.0  # a row that sees nothing
    l = tl.where(blind, 1.0, l)  # noqa: E741
    out_ptr += row // Q // N * stride_ob + row // Q % N * stride_on + row % Q * stride_oq
    out = tl.where(blind, 0.0, acc * kept / l)
    tl.store(out_ptr + offs_e, out.to(out_ptr.dtype.element_ty), mask=offs_e < E)
    tl.store(lse_ptr + row + tl.arange(0, 1), tl.where(blind, float("-inf"), m * log_unit + tl.log2(l) * LN2))


@functools.cache
def decode_tiles(rows: int, D: int, E: int, dtype: torch.dtype, reads: str, dense: bool, limits: Limits) -> Tiles:
    """The tiles of a program with so many rows; ``dense``: with a bias or a mask for each row.

    As many keys in flight as half of the shared memory holds, so that two programs run at a time, and no more in a
    tile than the registers hold (read off the compiled kernels).
    """
    block_m, width = block(rows), max(block(D), block(E))
    exact = dtype == torch.float32 and reads == "ieee"
    block_n, num_stages = 32 if dense or exact else 64, 3
    wide = block_m * width * dtype.itemsize >= 64 * 128 * 2
    if wide and (width > 128 or exact or (dense and dtype == torch.float32)):
        block_n = 16
    while block_n * 2 * width * dtype.itemsize * num_stages > limits.shared // 2 and (block_n, num_stages) != (16, 2):
        block_n, num_stages = (block_n, 2) if num_stages == 3 else (block_n // 2, 3)
    return Tiles(block_m, block_n, 8 if wide else 4, num_stages)


def splits(
    B: int, M: int, Q: int, N: int, K: int, left: int, right: int, lower_right: bool, device: torch.device
) -> int:
    """Among how many programs the keys of a kv head are best split; 1 where there is nothing to gain here.

    B batches of M key and N query heads, Q queries and K keys with a band of left and right. As many programs as
    the device runs at a time, two on each multiprocessor; and not one for fewer than LEAST keys.
    """
    if 0 in (B, M, Q, N) or Q * (N // M) > ROWS:
        return 1
    low, high, _ = seen(Q, K, left, right, lower_right)
    wanted = 2 * multiprocessors(device) // (B * M)
    if N > M:  # apart, the heads of a group would read the same keys again: worth combining two parts for
        wanted = max(wanted, 2)
    return max(1, min(wanted, (high - low) // LEAST))


def seen(Q: int, K: int, left: int, right: int, lower_right: bool) -> tuple[int, int, int]:
    """The keys ``[low, high)`` that the band shows to any query, and the band's shift."""
    shift = K - Q if lower_right else 0
    low = min(max(shift - left, 0), K) if left >= 0 else 0
    high = min(max(Q + shift + right, 0), K) if right >= 0 else K
    return low, max(low, high), shift


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; under the interpreter, which has none, as many as a Hopper GPU."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def decode_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    *,
    terms: dict[str, Any],
    scale: float,
    left: int,
    right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
    allow_tf32: bool,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, N, Q, E]`` and log-sum-exp ``[B, N, Q]`` fp32, from at most ``splits`` programs for a kv head.

    query ``[B, N, Q, D]`` with Q * N/M <= ROWS, key ``[B, M, K, D]``, value ``[B, M, K, E]``, all of any strides;
    bias and mask broadcast to ``[B, N, Q, K]``; seed ``[1]`` int64, read where dropout_p is not 0; terms: of
    ``relative``.
    """
    (B, N, Q, D), (M, K, E) = query.shape, value.shape[1:]
    out = query.new_empty(B, Q, N, E).transpose(1, 2)
    lse = torch.empty(B, N, Q, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    group = N // M
    low, high, shift = seen(Q, K, left, right, lower_right)
    device = limits(query.device)
    bias, mask = (None if t is None else t.expand(B, N, Q, K) for t in (bias, mask))
    dense = per_row(bias, group), per_row(mask, group)
    rich = any(dense) or has_any(terms)
    added = any(t is not None for t in (bias, terms["distance_ptr"], terms["segment_ptr"]))
    reads = precision(query.dtype, allow_tf32, device)
    tiles = decode_tiles(Q * group, D, E, query.dtype, reads, rich, device)
    span = triton.cdiv(triton.cdiv(high - low, splits), tiles.block_n) * tiles.block_n
    parts = triton.cdiv(high - low, span) if span else 1
    acc, m, l = (query.new_empty(B, N, Q, parts, *last, dtype=torch.float32) for last in ((E,), (), ()))  # noqa: E741
    with torch.cuda.device_of(query):  # for a CPU tensor, nothing
        decode_forward_kernel[(B * M * parts,)](
            query_ptr=query, **strides("q", "bnqd", query), key_ptr=key, **strides("k", "bnkd", key),
            value_ptr=value, **strides("v", "bnke", value), bias_ptr=bias, **strides("b", "bnqk", bias),
            mask_ptr=mask, **strides("m", "bnqk", mask), **terms, seed_ptr=seed if dropout_p else None,
            acc_ptr=acc, max_ptr=m, sum_ptr=l, N=N, Q=Q, K=K, S=parts, threshold=dropout_threshold(dropout_p),
            low=low, high=high, span=span, shift=shift, left=left, right=right, scale=scale, softcap=softcap,
            # A single query sees all keys from low to high.
            **constants(
                tiles, D, E, group, reads, softcap != 0, left >= 0 and Q > 1, right >= 0 and Q > 1, *dense
            ),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **OPTIONS,
        )  # fmt: skip
        decode_combine_kernel[(B * N * Q,)](
            acc_ptr=acc, max_ptr=m, sum_ptr=l, out_ptr=out, **strides("o", "bnq", out), lse_ptr=lse,
            N=N, Q=Q, S=parts, log2_unit=LOG2E.value if added else 1.0,
            log_unit=1.0 if added else LN2.value, kept=kept(dropout_p),
            E=E, BLOCK_S=BLOCK_S, BLOCK_E=block(E), **OPTIONS,
        )  # fmt: skip
    return out, lse


def per_row(tensor: Tensor | None, group: int) -> bool:
    """Whether an expanded bias or mask ``[B, N, Q, K]`` says something else to each row of a tile."""
    return tensor is not None and any(
        size > 1 and tensor.stride(dim) != 0 for dim, size in ((1, group), (2, tensor.shape[2]))
    )


def constants(
    tiles: Tiles, D: int, E: int, group: int, reads: str,
    softcap: bool, left: bool, right: bool, bias_per_row: bool, mask_per_row: bool,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of the forward kernel."""
    return {
        "D": D,
        "E": E,
        "GROUP": group,
        "PRECISION": reads,
        "HAS_SOFTCAP": softcap,
        "HAS_LEFT": left,
        "HAS_RIGHT": right,
        "BIAS_PER_ROW": bias_per_row,
        "MASK_PER_ROW": mask_per_row,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": block(D),
        "BLOCK_E": block(E),
    }


def configurations(limits: Limits) -> Iterator[dict[str, Any]]:
    """The ways in which the decode kernels run: a query without and with a group, and several; plain and with all."""
    half, tf32, ieee = (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")
    cases = [
        (*half, 64, 1, 1, "plain"),
        *((*of, D, 1, 8, "plain") for D in (64, 128) for of in (half, tf32, ieee)),
        *((*of, D, 8, 8, "all") for D in (64, 128) for of in (half, tf32, ieee)),
        *((*half, D, 8, 8, "causal") for D in (64, 128)),
        *((*half, D, 1, 8, "plain") for D in (32, 96, 256)),
        *((*half, D, 1, 8, "all") for D in (128, 256)),
        (*half, 256, 8, 8, "all"),
        (torch.float16, "ieee", 64, 8, 8, "causal"),
        (torch.float16, "ieee", 128, 1, 8, "key mask"),
        *((*of, 64, 1, 1, "T5") for of in (half, tf32)),
    ]
    for dtype, reads, D, Q, group, has in cases:
        if reads == "tf32" and limits.backend != "cuda":
            continue
        everything, masked = has == "all", has in ("all", "key mask")
        tiles = decode_tiles(Q * group, D, D, dtype, reads, everything or has == "T5", limits)
        tensors = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), dtype) | {
            "bias_ptr": dtype if everything else None,
            "distance_ptr": dtype if has == "T5" else None,
            **dict.fromkeys(("segment_ptr", "segment_q_ptr", "segment_k_ptr", "rank_q_ptr", "rank_k_ptr")),
            "mask_ptr": torch.bool if masked else None,
            "seed_ptr": torch.int64 if everything else None,
            "acc_ptr": torch.float32,
            "max_ptr": torch.float32,
            "sum_ptr": torch.float32,
        }
        band = Q > 1 and everything, Q > 1 and has in ("all", "causal")
        yield configuration(
            f"decode D={D} Q={Q} G={group} {NAMES[dtype]}{' tf32' * (reads == 'tf32')} {has}", decode_forward_kernel,
            tensors,
            constants(tiles, D, D, group, reads, everything, *band, everything, everything)
            | dict.fromkeys(("stride_qd", "stride_kd", "stride_ve", "stride_bk", "stride_mk"), 1),
            tiles.num_warps, tiles.num_stages,
        )  # fmt: skip
    for dtype, E in ((torch.bfloat16, 64), (torch.float32, 128)):
        tensors = dict.fromkeys(("acc_ptr", "max_ptr", "sum_ptr", "lse_ptr"), torch.float32) | {"out_ptr": dtype}
        sizes = {"E": E, "BLOCK_S": BLOCK_S, "BLOCK_E": E}
        yield configuration(f"decode combine E={E} {NAMES[dtype]}", decode_combine_kernel, tensors, sizes)
