"""Gradients of what goes by relative position: of a table by distance, and of position_key.

An entry of such a table belongs to a diagonal of the scores. A program owns a block of diagonals and walks along them:
with B queries at a time and the 2B keys that they meet there, of whose products it reads the diagonals' stretch. The
entries at a table's ends stand for all that lies past them; their sums arise in the kernel of the queries, row by row,
so that the walk is as wide as the table and no wider.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import dot
from .gradients import finite, load_numbers, load_rows, score_gradients
from .plan import Tiles
from .relative import along_diagonals, load_positions, positions_of
from .scores import at_row, sequence_at

PROGRAMS = 1024  # that keep a large device busy; what more of them would bring is not worth their partial sums


@triton.jit(do_not_specialize=[
    "M", "R", "T_q", "T_k", "sequences", "parts", "last", "zero", "left", "right", "threshold",
    "distance_last", "distance_zero", "position_last", "position_zero",
])  # fmt: skip
def diagonals_backward_kernel(
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qd,  # [B, N, Q, D]
    key_ptr, stride_kb, stride_km, stride_kk, stride_kd,    # [B, M, K, D]
    value_ptr, stride_vb, stride_vm, stride_vk, stride_ve,  # [B, M, K, E]
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
    base_ptr, excess_ptr, delta_ptr,                        # [B, N, Q]     of the rows; excess if something is added
    dout_ptr, stride_gb, stride_gn, stride_gq, stride_ge,   # [B, N, Q, E]
    dweights_ptr, stride_wb, stride_wn, stride_wq, stride_wk,  # [B, N, Q, K]  or None
    ddistance_ptr,                                          # [parts, N, L-2]     out, or None: of position_key
    dposition_key_ptr,                                      # [parts, N, L-2, P]  out, or None: of distance
    M, R, T_q, T_k, sequences, parts, last, zero, distance_last, distance_zero, position_last, position_zero,
    left, right, threshold,
    keep_scale: tl.float32, scale: tl.float32, softcap: tl.float32, dweights_scale: tl.float32,
    D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program adds up the diagonals of a block of entries, those at the ends left out, of a part of the sequences.

    last and zero: the last entry and that of position 0 in the table whose gradient is made.
    """
    N = M * GROUP
    blocks = tl.cdiv(last - 1, BLOCK)
    own = tl.program_id(0) % blocks * BLOCK
    n = tl.program_id(0) // blocks % N
    part = tl.program_id(0) // blocks // N
    first = own + 1 - zero  # the relative position of the first diagonal
    rows = tl.arange(0, BLOCK)[None, :]
    entries = tl.arange(0, BLOCK)[:, None]
    none = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = none
    if dposition_key_ptr is not None:
        acc = tl.zeros([BLOCK, BLOCK_P], tl.float32)
    for z in tl.range(part, sequences, parts):
        b = z if cu_q_ptr is None else 0
        first_q, Q = sequence_at(cu_q_ptr, z, T_q)
        first_k, K = sequence_at(cu_k_ptr, z, T_k)
        shift = K - Q if LOWER_RIGHT else 0
        start = first + K - Q  # the key that query 0 meets on the first diagonal
        low = tl.minimum(tl.maximum(1 - BLOCK - start, 0), Q)
        high = tl.minimum(tl.maximum(K - start, 0), Q)
        if HAS_LEFT:
            high = tl.where(start + BLOCK - 1 - shift < -left, low, high)
        if HAS_RIGHT:
            high = tl.where(start - shift > right, low, high)
        query = at_row(at_row(at_row(query_ptr, b, stride_qb), n, stride_qn), first_q, stride_qq)
        dout = at_row(at_row(at_row(dout_ptr, b, stride_gb), n, stride_gn), first_q, stride_gq)
        key = at_row(at_row(at_row(key_ptr, b, stride_kb), n // GROUP, stride_km), first_k, stride_kk)
        value = at_row(at_row(at_row(value_ptr, b, stride_vb), n // GROUP, stride_vm), first_k, stride_vk)
        numbers = (base_ptr, excess_ptr, delta_ptr, tl.cast(b * N + n, tl.int64) * T_q + first_q)
        if position_query_ptr is not None:
            of_queries, table, _zero = positions_of(
                (position_query_ptr, stride_ub, stride_un, stride_uq, stride_up,
                 position_key_ptr, stride_tb, stride_tr, stride_tl, R, position_last, position_zero),
                b, n, first_q, N, Q, K,
            )  # fmt: skip
            pk = load_positions(table, first + position_zero, entries, tl.arange(0, BLOCK_P)[None, :], P)
        for i0 in tl.range(low, high, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            j0 = i0 + start
            j = j0 + tl.arange(0, BLOCK)
            q = load_rows((query, stride_qq, stride_qd), i0, i < Q, D, BLOCK_D)
            do = load_rows((dout, stride_gq, stride_ge), i0, i < Q, E, BLOCK_E)
            seen, seen_after = (j >= 0) & (j < K), (j + BLOCK >= 0) & (j + BLOCK < K)
            k = load_rows((key, stride_kk, stride_kd), j0, seen, D, BLOCK_D)
            k_after = load_rows((key, stride_kk, stride_kd), j0 + BLOCK, seen_after, D, BLOCK_D)
            v = load_rows((value, stride_vk, stride_ve), j0, seen, E, BLOCK_E)
            v_after = load_rows((value, stride_vk, stride_ve), j0 + BLOCK, seen_after, E, BLOCK_E)
            qk = along_diagonals(dot(k, tl.trans(q), none, PRECISION), dot(k_after, tl.trans(q), none, PRECISION))
            dw = along_diagonals(dot(v, tl.trans(do), none, PRECISION), dot(v_after, tl.trans(do), none, PRECISION))
            if position_query_ptr is not None:
                pq = load_rows(of_queries, i0, i < Q, P, BLOCK_P)
                qk = dot(pk, tl.trans(pq), qk, PRECISION)
            base, excess, delta = load_numbers(numbers, i, Q)
            columns = entries + rows
            columns = tl.where(j0 + columns < 0, K - j0, columns)  # hidden, like what is past the last
            _w, ds, dqk = score_gradients(
                qk, dw, base[None, :], excess[None, :], delta[None, :], (b, n, i0, j0, rows, columns),
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
                (seed_ptr, threshold, keep_scale, z * N + n), (Q, K, shift, left, right),
                scale, softcap, dweights_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, True,
            )  # fmt: skip
            if dposition_key_ptr is not None:
                # Where a query is not finite, so is its log-sum-exp: those who see it have NaN without the product.
                acc = dot(dqk.to(pq.dtype), finite(pq), acc, PRECISION)
            else:
                acc += ds

    row = (tl.cast(part, tl.int64) * N + n) * (last - 1) + own
    inside = own + entries < last - 1
    if dposition_key_ptr is not None:
        p = tl.arange(0, BLOCK_P)[None, :]
        tl.store(at_row(dposition_key_ptr, row, P) + (entries * P + p), acc * scale, mask=inside & (p < P))
    else:
        tl.store(ddistance_ptr + row + entries, tl.sum(acc, 1, keep_dims=True), mask=inside)


def table_backward(
    name: str, like: Tensor, zero: int, ends: Tensor, sequences: int, tile: Tiles, arguments: dict[str, Any]
) -> Tensor:
    """The gradient of a table ``[B or 1, N or fewer, L, ...]``, called name, that is like another.

    ends ``[B, N, 2, ...]``: what belongs to its first and last entry. sequences: batches, or those that are packed.
    arguments: all that ``diagonals_backward_kernel`` takes from its launcher's caller.
    """
    N, length = ends.shape[1], like.shape[2]
    blocks = triton.cdiv(max(length - 2, 0), tile.block_m)
    parts = sequences
    if like.shape[0] == 1 and blocks:  # sequences share it, so a program may add up many
        parts = min(sequences, triton.cdiv(PROGRAMS, N * blocks))
    inner = ends.new_empty(parts, N, max(length - 2, 0), *like.shape[3:])
    if blocks:
        with torch.cuda.device_of(like):
            diagonals_backward_kernel[(blocks * N * parts,)](
                **arguments, **{"ddistance_ptr": None, "dposition_key_ptr": None, f"d{name}_ptr": inner},
                sequences=sequences, parts=parts, last=length - 1, zero=zero,
                BLOCK=tile.block_m, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    if length == 1:
        ends = ends.sum(2, keepdim=True)
    inner, ends = (
        t.sum_to_size(like.shape[0], *t.shape[1:]).unflatten(1, (like.shape[1], -1)).sum(2) for t in (inner, ends)
    )
    return torch.cat([ends[:, :, :1], inner, ends[:, :, 1:]], 2).to(like.dtype)
