"""What a query sees and how much: the pieces that all attention kernels share.

Letters: i numbers queries, j keys; a tile of scores is ``[BLOCK_M, BLOCK_N]``, queries by keys, or its transpose
where a kernel walks over queries. Scores are kept in units of log 2, for ``exp2`` is what the hardware has.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_in_band(i, j, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether key j is in the band of query i: ``-left <= j - i - shift <= right``; i and j broadcast."""
    offset = j - i - shift
    visible = offset == offset
    if HAS_LEFT:
        visible = visible & (offset >= -left)
    if HAS_RIGHT:
        visible = visible & (offset <= right)
    return visible


@triton.jit
def keys_of(first, last, shift, left, right, K, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of keys ``[low, high)`` that any query from first to last sees in the band."""
    low = 0
    high = K
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(first + shift - left, 0), K)
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(last + shift + right + 1, 0), K)
    return low, high


@triton.jit
def keys_of_all(first, last, shift, left, right, K, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of keys ``[low, high)`` that every query from first to last sees in the band; may be empty."""
    low = 0
    high = K
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(last + shift - left, 0), K)
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(first + shift + right + 1, 0), K)
    return low, high


@triton.jit
def tanh(x):
    """More exact near one than the recurrent kernels', for a cap's gradient ``1 - tanh(x)**2`` cancels there.

    Of one exponential, which may overflow to infinity but not to NaN. It cancels near zero, where the series is.
    """
    s = x * x
    series = -0.0539682540 + s * (0.0218694885 - s * 0.00886323553)
    near = x + x * s * (-0.333333333 + s * (0.133333333 + s * series))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(qk, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The score of a product, in units of log 2: scaled, and bent below the cap where there is one."""
    if HAS_SOFTCAP:
        return softcap * tanh(qk * (scale / softcap)) * LOG2E
    return qk * (scale * LOG2E)


@triton.jit
def mix(x):
    """MurmurHash3's finaliser (Appleby), of uint32."""
    x = x ^ (x >> 16)
    x = x * tl.full(x.shape, 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full(x.shape, 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def dropout_keys(seed_ptr, head, i):
    """Two words for each row i (a tensor) of a head ``b * N + n``: all that its dropout depends on."""
    seed = tl.load(seed_ptr)
    low = tl.full(i.shape, 0, tl.uint32) + (seed & 0xFFFFFFFF).to(tl.uint32)
    high = tl.full(i.shape, 0, tl.uint32) + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    head = tl.full(i.shape, 0, tl.uint32) + head.to(tl.uint32)
    of_head = mix(mix(head * tl.full(i.shape, 0x9E3779B9, tl.uint32) + low) ^ high)
    first = mix(of_head + i.to(tl.uint32) * tl.full(i.shape, 0x85EBCA77, tl.uint32))
    return first, mix(first + tl.full(i.shape, 0xC2B2AE3D, tl.uint32))


@triton.jit
def dropout_keep(first, second, j, threshold):
    """Whether the weight of row i (its two keys) and column j is kept; they broadcast. As the reference draws it."""
    x = first ^ (j.to(tl.uint32) * tl.full(j.shape, 0x9E3779B9, tl.uint32))
    x = x ^ (x >> 16)
    x = (x * tl.full(x.shape, 0x85EBCA6B, tl.uint32)) ^ second
    x = x ^ (x >> 13)
    x = x * tl.full(x.shape, 0xC2B2AE35, tl.uint32)
    x = x ^ (x >> 16)
    return x.to(tl.int32, bitcast=True) >= threshold


def dropout_threshold(dropout_p: float) -> int:
    """The least word that ``dropout_keep`` keeps, as a signed 32-bit integer: below it lie dropout_p of all."""
    return min(round(dropout_p * 2**32) - 2**31, 2**31 - 1)


@triton.jit
def at_row(ptr, row, stride):
    """The pointer to a row, which may be more than 2**31 elements away."""
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def sequence_at(cu_ptr, z, length):
    """First row and length of packed sequence z; not packed, there is one sequence, which is all."""
    first = 0
    if cu_ptr is not None:
        first = tl.load(cu_ptr + z)
        length = tl.load(cu_ptr + z + 1) - first
    return first, length


@triton.jit
def load_tile(ptr, rows, stride_row, columns, stride_column, seen, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """A tile ``ptr[rows, columns]``, upright or lying, as rows and columns (the whole width) broadcast.

    Columns past WIDTH are zero and so, if CHECKED, are rows that are not seen; neither is read.
    """
    ptrs = ptr + (rows * stride_row + columns * stride_column)
    if CHECKED:
        tile = tl.load(ptrs, mask=seen & (columns < WIDTH), other=0.0)
    elif columns.numel != WIDTH:
        tile = tl.load(ptrs, mask=columns < WIDTH, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def visible_in_tile(
    rows, i, offs_n, j, seen, Q, shift, left, right, mask_ptr, stride_mq, stride_mk, ranks,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
):  # fmt: skip
    """What of a tile of scores is visible, of the keys that are seen; it broadcasts to the tile.

    rows and offs_n count from where mask_ptr points to; i and j are the same, counted in the sequence. ranks: those
    of the queries, or None, and the pointer to those of the keys.
    """
    visible = seen[None, :]
    if HAS_LEFT or HAS_RIGHT:
        band = visible_in_band(i[:, None], j[None, :], shift, left, right, HAS_LEFT, HAS_RIGHT)
        visible = visible & band
    if mask_ptr is not None and MASK_PER_QUERY:
        ptrs = mask_ptr + (rows[:, None] * stride_mq + offs_n[None, :] * stride_mk)
        visible = visible & (tl.load(ptrs, mask=(i < Q)[:, None] & seen[None, :], other=0) != 0)
    if ranks[0] is not None:
        rank_k = tl.load(ranks[1] + j, mask=seen, other=0)
        visible = visible & (rank_k[None, :] <= ranks[0][:, None])
    return visible


@triton.jit
def distances(table, i, j):
    """What a table adds to the scores of queries i and keys j, which broadcast: ``table[clamp(j - i + zero)]``.

    table: pointer to a head, or to the head of each row; zero, for i and j as they are counted; the last place.
    """
    ptr, zero, last = table
    return tl.load(ptr + tl.minimum(tl.maximum(j - i + zero, 0), last)).to(tl.float32)


@triton.jit
def add_distances(s, table, least, i, j):
    """A tile of scores and what a table adds to it; least: the tile's first place in it, None if it differs by row.

    Of a short table most tiles lie past an end: then one number does.
    """
    if least is None:
        s += distances(table, i, j)
    else:
        ptr, _, last = table
        if (least + (s.shape[0] + s.shape[1] - 2) <= 0) | (least >= last):
            s += tl.load(ptr + tl.minimum(tl.maximum(least, 0), last)).to(tl.float32)
        else:
            s += distances(table, i, j)
    return s


@triton.jit
def load_segments(segment_ptr, segment_q_ptr, i, Q):
    """What queries i add to keys of their own segment and to those of others, and which segment is theirs.

    segment_ptr ``[Q, 2]``: pointer to a head, or to the head of each row.
    """
    same = tl.load(segment_ptr + 2 * i, mask=i < Q, other=0.0).to(tl.float32)
    other = tl.load(segment_ptr + 2 * i + 1, mask=i < Q, other=0.0).to(tl.float32)
    return same, other, tl.load(segment_q_ptr + i, mask=i < Q, other=0)


@triton.jit
def scores_of_tile(
    qk, visible, rows, i, offs_n, j, seen, Q, bias_ptr, stride_bq, stride_bk, distance, segment, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The scores of a product, for ``weight_of``, and in its unit.

    That is the product itself if it is only to be scaled, for then the scaling and what follows are one
    instruction; log 2 with a cap; and 1 where something is added, for another unit could overflow: a bias may be the
    least number there is.

    distance: as for ``add_distances``, table and least, or a pointer None. segment: as of ``load_segments``, or None
    first; then the pointer to the segments of the keys.
    """
    if bias_ptr is not None or distance[0] is not None or segment[0] is not None:
        if HAS_SOFTCAP:
            s = softcap * tanh(qk * (scale / softcap))
        else:
            s = qk * scale
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + offs_n[None, :] * stride_bk
            if BIAS_PER_QUERY:
                bias = tl.load(bias_ptrs + rows[:, None] * stride_bq, mask=(i < Q)[:, None] & seen[None, :], other=0.0)
            else:
                bias = tl.load(bias_ptrs, mask=seen[None, :], other=0.0)
            s += bias.to(tl.float32)
        if distance[0] is not None:
            s = add_distances(s, (distance[0], distance[1], distance[2]), distance[3], i[:, None], j[None, :])
        if segment[0] is not None:
            same, other, segment_q, segment_k_ptr = segment
            segment_k = tl.load(segment_k_ptr + j, mask=seen, other=0)
            s += tl.where(segment_q[:, None] != segment_k[None, :], other[:, None], same[:, None])
    elif HAS_SOFTCAP:
        s = capped(qk, scale, softcap, HAS_SOFTCAP)
    else:
        s = qk
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def level_of(s, scale, ADDED: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """A score as what ``weight_of`` compares with: scaled, in units of log 2, or of 1 if something is ADDED to the
    product; scale > 0.
    """
    if ADDED or HAS_SOFTCAP:
        level = s
    else:
        level = s * (scale * LOG2E)
    return level


@triton.jit
def level_of_lse(lse, ADDED: tl.constexpr):
    """A log-sum-exp as what ``weight_of`` compares with."""
    if ADDED:
        level = lse
    else:
        level = lse * LOG2E
    return level


@triton.jit
def weight_of(s, level, scale, ADDED: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """``exp(score - level)``."""
    if ADDED:
        exponent = (s - level) * LOG2E
    elif HAS_SOFTCAP:
        exponent = s - level
    else:
        exponent = s * (scale * LOG2E) - level
    return tl.exp2(exponent)
