"""What all kernels of attention's backward share: loading tiles, and the gradient of a tile of scores.

With w the weights after dropout and dw their gradient (``dO V^T`` and what comes from outside), the scores have the
gradient ``ds = p * (dw' - delta)``, dw' through dropout and ``delta = sum(w * dw) - dlse`` of each row.

Tensors of a call go from function to function as tuples that begin with their pointers, None where there is none.
``added``: what is added to the scores, a bias (pointer, strides), a table by distance (pointer, strides of batch and
head, the place of distance 0, the last place) and segments (pointers of what they add and of those of queries and keys,
number of heads). ``hidden``: what hides, a mask (pointer, strides) and ranks (of queries: pointer, strides of batch and
head; of keys: pointer, stride of batch).
"""

import triton
import triton.language as tl

from .scores import LOG2E, at_row, distances, dropout_keep, dropout_keys, load_tile, tanh, visible_in_band

OF_TERMS = ("R", "distance_last", "distance_zero", "position_last", "position_zero")  # numbers that vary per call


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
def load_numbers(numbers, i, Q):
    """The three numbers of queries i, from pointers and the row to count from; past the last no gradient."""
    base_ptr, excess_ptr, delta_ptr, row = numbers
    base = tl.load(base_ptr + row + i, mask=i < Q, other=float("inf"))
    excess = tl.zeros_like(base)
    if excess_ptr is not None:
        excess = tl.load(excess_ptr + row + i, mask=i < Q, other=0.0)
    return base, excess, tl.load(delta_ptr + row + i, mask=i < Q, other=0.0)


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
def elsewhere(segment, at, Q, K):
    """Which queries and keys of a tile are in different segments."""
    _, segment_q_ptr, segment_k_ptr, _ = segment
    b, _, i0, j0, rows, columns = at
    i, j = i0 + rows, j0 + columns
    segment_q = tl.load(at_row(segment_q_ptr, b, Q) + i, mask=i < Q, other=0)
    return segment_q != tl.load(at_row(segment_k_ptr, b, K) + j, mask=j < K, other=0)


@triton.jit
def added_to_scores(added, at, Q, K):
    """The sum of all that is added to a tile of scores."""
    bias, distance, segment = added
    b, n, i0, j0, rows, columns = at
    total = 0.0
    if bias[0] is not None:
        total = load_scores(bias, at, Q, K).to(tl.float32)
    if distance[0] is not None:
        ptr, stride_b, stride_n, zero, last = distance
        ptr = at_row(at_row(ptr, b, stride_b), n, stride_n)
        total += distances((ptr, zero - (K - Q), last), i0 + rows, j0 + columns)
    if segment[0] is not None:
        ptrs = at_row(segment[0], tl.cast(b, tl.int64) * segment[3] + n, 2 * Q) + 2 * (i0 + rows)
        same = tl.load(ptrs, mask=i0 + rows < Q, other=0.0).to(tl.float32)
        other = tl.load(ptrs + 1, mask=i0 + rows < Q, other=0.0).to(tl.float32)
        total += tl.where(elsewhere(segment, at, Q, K), other, same)
    return total


@triton.jit
def visible_scores(base, at, hidden, band, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """What of a tile of scores is visible; arguments as of ``score_gradients``."""
    Q, K, shift, left, right = band
    b, n, i0, j0, rows, columns = at
    mask, ranks = hidden
    visible = (base != float("inf")) & (j0 + columns < K)
    visible = visible & visible_in_band(i0 + rows, j0 + columns, shift, left, right, HAS_LEFT, HAS_RIGHT)
    if mask[0] is not None:
        visible = visible & (load_scores(mask, at, Q, K) != 0)
    if ranks[0] is not None:
        rank_q_ptr, stride_qb, stride_qn, rank_k_ptr, stride_kb = ranks
        rank_q_ptr = at_row(at_row(rank_q_ptr, b, stride_qb), n, stride_qn)
        rank_q = tl.load(rank_q_ptr + (i0 + rows), mask=i0 + rows < Q, other=0)
        rank_k = tl.load(at_row(rank_k_ptr, b, stride_kb) + (j0 + columns), mask=j0 + columns < K, other=0)
        visible = visible & (rank_k <= rank_q)
    return visible


@triton.jit
def score_gradients(
    qk, dw, base, excess, delta,  # tiles of q.k and of dO.v, and what goes with their queries
    at,                  # batch, head, first query, first key, queries and keys from there (as the tiles have them)
    added, hidden, dweights,
    dropout,             # seed, threshold, scale of what is kept, number of the head
    band,                # Q, K, shift, left, right
    scale, softcap, dweights_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile of scores, queries by keys or its transpose: the weights after dropout, the gradient of the scores,
    and that of ``scale * q.k`` in them.
    """
    Q, K = band[0], band[1]
    _, _, i0, j0, rows, columns = at
    ADDED: tl.constexpr = added[0][0] is not None or added[1][0] is not None or added[2][0] is not None
    visible = base != float("inf")  # a row that sees nothing has no gradient, whatever comes from outside
    if MASKED:
        visible = visible_scores(base, at, hidden, band, HAS_LEFT, HAS_RIGHT)
    x, unit = qk, scale
    if HAS_SOFTCAP:
        x, unit = tanh(qk * (scale / softcap)), softcap
    if ADDED:  # not in units of log 2, where the least number there is would overflow
        exponent = (x * unit + added_to_scores(added, at, Q, K) - base) * LOG2E - excess
    else:
        exponent = x * (unit * LOG2E) - base
    p = tl.exp2(exponent)
    if MASKED or ADDED:
        p = tl.where(visible, p, 0.0)

    if dweights[0] is not None:
        dw += load_scores(dweights, at, Q, K).to(tl.float32) * dweights_scale
    w = p
    if dropout[0] is not None:
        seed_ptr, threshold, keep_scale, head = dropout
        first, second = dropout_keys(seed_ptr, head, i0 + rows)
        keep = dropout_keep(first, second, j0 + columns, threshold)
        w = tl.where(keep, p * keep_scale, 0.0)
        dw = tl.where(keep, dw * keep_scale, 0.0)
    ds = p * (dw - delta)
    if MASKED or ADDED:
        ds = tl.where(visible, ds, 0.0)
    dqk = ds
    if HAS_SOFTCAP:
        dqk = ds * (1.0 - x * x)
        if MASKED:  # the score of what is hidden may be NaN
            dqk = tl.where(visible, dqk, 0.0)
    return w, ds, dqk
