"""Attention as its formula says, ``softmax(q k + bias) v``, with the whole matrix of scores: the definition of correct.

Shapes: query ``[B, N, Q, D]``, key ``[B, M, K, D]``, value ``[B, M, K, E]``, where M divides N and each key head
serves N/M query heads; bias and mask broadcast to ``[B, N, Q, K]``. Differentiable any number of times.

What a query may see is one idea: a band around the diagonal, ``-left <= j - i - shift <= right``, where a negative
``left`` or ``right`` does not limit and ``shift`` is 0 or, with ``lower_right``, ``K - Q``; of that, where the boolean
mask is true; and of that, the keys whose rank is no higher than the query's. What is not seen has no influence, NaN
included; a query that sees nothing gets zeros.

What stands by position goes by ``rel = j - i - (K - Q)``, how far the key stands after the query when the last query
stands at the last key. A table of L entries with its ``zero`` has that of rel at ``clamp(rel + zero, 0, L - 1)``:
beyond either end it goes on as it ends.
"""

from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    distance: Tensor | None = None,
    position_query: Tensor | None = None,
    position_key: Tensor | None = None,
    segment: Tensor | None = None,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    seed: Tensor | None = None,
    segment_q: Tensor | None = None,
    segment_k: Tensor | None = None,
    rank_q: Tensor | None = None,
    rank_k: Tensor | None = None,
    *,
    scale: float,
    left: int = -1,
    right: int = -1,
    lower_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    weights: str = "",
    distance_zero: int = 0,
    position_zero: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output ``[B, N, Q, E]``, log-sum-exp ``[B, N, Q]`` and attention weights.

    The score of query i and key j is ``softcap(scale * (query . key + position_query . position_key[rel])) + bias
    + distance[rel] + segment``. ``distance`` ``[B or 1, N or 1, L]`` is a table. ``position_query`` ``[B, N, Q, P]``
    meets the row of rel of ``position_key`` ``[B or 1, R, L', P]``, a table of which each of R heads serves N/R
    query heads. ``segment`` ``[B, N, Q, 2]`` is added, its second number where ``segment_q[i] != segment_k[j]``
    (``[B, Q]`` and ``[B, K]``), else its first. Key j is hidden unless ``rank_k[j] <= rank_q[i]`` (``[B or 1, K]``
    and ``[B or 1, N or 1, Q]``).

    The weights are those that multiply the values, after dropout: ``weights="each"`` gives ``[B, N, Q, K]``,
    ``"mean"`` their mean over the heads ``[B, Q, K]``, ``""`` None. Half precision is computed in float32, and
    the log-sum-exp stays in it.

    ``cu_q`` and ``cu_k`` ``[Z+1]`` say that Z sequences are packed one after the other in a batch of one: sequence
    z has queries ``cu_q[z]:cu_q[z+1]`` and keys ``cu_k[z]:cu_k[z+1]``. Weights, bias, mask, segment and rank are not
    offered packed.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "lower_right": lower_right,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "distance_zero": distance_zero,
        "position_zero": position_zero,
    }
    if cu_q is None or cu_k is None:
        tables = distance, position_query, position_key
        rest = segment, mask, seed, segment_q, segment_k, rank_q, rank_k
        return _attention(query, key, value, bias, *tables, *rest, first=0, weights=weights, **options)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    # What no sequence covers is zero, like a query that sees nothing.
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    for z in range(len(starts_q) - 1):
        q, k = slice(starts_q[z], starts_q[z + 1]), slice(starts_k[z], starts_k[z + 1])
        of_position = None if position_query is None else position_query[:, :, q]
        one = _attention(
            query[:, :, q], key[:, :, k], value[:, :, k], None, distance, of_position, position_key,
            None, None, seed, None, None, None, None, first=z, weights="", **options,
        )  # fmt: skip
        out = torch.cat([out[:, :, : q.start], one[0], out[:, :, q.stop :]], 2)
        lse = torch.cat([lse[:, :, : q.start], one[1], lse[:, :, q.stop :]], 2)
    return out, lse, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    distance: Tensor | None,
    position_query: Tensor | None,
    position_key: Tensor | None,
    segment: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    rank_q: Tensor | None,
    rank_k: Tensor | None,
    *,
    first: int,
    scale: float,
    left: int,
    right: int,
    lower_right: bool,
    softcap: float,
    dropout_p: float,
    weights: str,
    distance_zero: int,
    position_zero: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    B, N, Q, _ = query.shape
    M, K = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, (k, v) = query.to(wide), (t.to(wide).repeat_interleave(N // max(M, 1), 1) for t in (key, value))

    visible = band(Q, K, left, right, lower_right, query.device).expand(B, N, Q, K)
    if mask is not None:
        visible = visible & mask
    if rank_q is not None and rank_k is not None:
        visible = visible & (rank_k[:, None, None] <= rank_q[..., None])

    products = _products(q, k)
    if position_query is not None and position_key is not None:
        table = position_key.to(wide).repeat_interleave(N // position_key.shape[1], 1)
        at = entry(Q, K, position_zero, table.shape[2], query.device).expand(B, N, Q, K)
        products = products + _products(position_query.to(wide), table).gather(-1, at)
    scores = products * scale
    if softcap:
        scores = softcap * torch.tanh(scores.masked_fill(~visible, 0.0) / softcap)  # else 0 * NaN in its gradient
    added = [] if bias is None else [bias]
    if distance is not None:
        added.append(distance[..., entry(Q, K, distance_zero, distance.shape[2], query.device)])
    if segment is not None and segment_q is not None and segment_k is not None:
        differs = segment_q[:, None, :, None] != segment_k[:, None, None]
        added.append(torch.where(differs, segment[..., 1:], segment[..., :1]))
    for term in added:
        scores = scores + torch.where(visible, term.to(wide), 0.0)
    scores = scores.masked_fill(~visible, -torch.inf)

    # A row of nothing but -inf has no softmax: it is computed on zeros, and its results are put in place.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    # torch.logsumexp would take its gradient from the rounded result, wrong by n in a row of n times the least number.
    most = scores.detach().amax(-1, keepdim=True) if K else scores.new_zeros(B, N, Q, 1)
    lse = ((scores - most).exp().sum(-1).log() + most[..., 0]).masked_fill(empty[..., 0], -torch.inf)
    w = scores.softmax(-1).masked_fill(empty | ~visible, 0.0)
    if dropout_p:
        assert seed is not None
        kept = dropout_keep(seed, (torch.arange(B * N, device=q.device) + first * N).view(B, N), Q, K, dropout_p)
        w = w * kept / (1.0 - dropout_p) if dropout_p < 1.0 else w * 0.0

    # A value that is not finite is seen only by the queries that may see it: 0 * NaN would show it to all.
    spoiled = (visible.to(wide) @ (~v.isfinite()).to(wide)) > 0
    out = (w @ _finite(v) + _nan_where(spoiled)).masked_fill(empty, 0.0)
    shown = None
    if weights:
        shown = (w if weights == "each" else w.mean(1)).to(query.dtype)
    return out.to(query.dtype), lse, shown


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Of each row with each column: NaN where one of the two is not finite, which spoils no other product."""
    spoiled = ~rows.isfinite().all(-1, keepdim=True) | ~columns.isfinite().all(-1)[:, :, None]
    return _finite(rows) @ _finite(columns).mT + _nan_where(spoiled)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _nan_where(condition: Tensor) -> Tensor:
    return torch.zeros((), device=condition.device).masked_fill(condition, torch.nan)


def band(Q: int, K: int, left: int, right: int, lower_right: bool, device: torch.device) -> Tensor:
    """Which keys the band shows to which queries: bool ``[Q, K]``."""
    offset = _offset(Q, K, K - Q if lower_right else 0, device)
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        visible = visible & (offset >= -left)
    if right >= 0:
        visible = visible & (offset <= right)
    return visible


def entry(Q: int, K: int, zero: int, length: int, device: torch.device) -> Tensor:
    """Which entry of a table by position each query and key have: int64 ``[Q, K]``."""
    return (_offset(Q, K, K - Q, device) + zero).clamp(0, length - 1)


def _offset(Q: int, K: int, shift: int, device: torch.device) -> Tensor:
    return torch.arange(K, device=device) - torch.arange(Q, device=device)[:, None] - shift


def dropout_keep(seed: Tensor, heads: Tensor, Q: int, K: int, dropout_p: float, q0: int = 0, k0: int = 0) -> Tensor:
    """Which weights dropout keeps: bool ``[*heads, Q, K]``, for rows from q0 and columns from k0.

    A function of (seed ``[1]`` int64, head, row, column) and of nothing else, so that tiles of any size, on any
    device, draw the same. ``heads`` numbers the pairs of batch and head, ``b * N + n``. Two 32-bit keys per row,
    then per element one round of MurmurHash3's finaliser (Appleby) with the second key between its halves.
    """
    first, second = dropout_rows(seed, heads, Q, q0)
    words = dropout_words(first, second, dropout_columns(K, heads.device, k0), dropout_p)
    return words >= dropout_threshold(dropout_p)


def dropout_rows(seed: Tensor, heads: Tensor, Q: int, q0: int = 0) -> tuple[Tensor, Tensor]:
    """The two keys of each row, int32 ``[*heads, Q]``, the first one halfway through the round."""
    row = torch.arange(q0, q0 + Q, device=heads.device)
    low, high = (seed & _MASK).to(heads.device), (seed >> 32 & _MASK).to(heads.device)
    of_head = _mix(_mix(heads.long() * 0x9E3779B9 + low & _MASK) ^ high)
    first = _mix(of_head[..., None] + row * 0x85EBCA77 & _MASK)
    second = _mix(first + 0xC2B2AE3D & _MASK)
    # (a ^ b) ^ (a ^ b) >> 16 is (a ^ a >> 16) ^ (b ^ b >> 16): a row and a column each bring their own part.
    return _signed(first ^ first >> 16), _signed(second)


def dropout_columns(K: int, device: torch.device, k0: int = 0) -> Tensor:
    """What each column adds to its row's first key, int32 ``[K]``."""
    column = torch.arange(k0, k0 + K, device=device) * 0x9E3779B9 & _MASK
    return _signed(column ^ column >> 16)


def dropout_words(first: Tensor, second: Tensor, column: Tensor, dropout_p: float) -> Tensor:
    """Words int32 ``[*first, *column]`` that stand on the same side of the threshold as those of the round."""
    # 32-bit words that wrap: int32, since PyTorch has no arithmetic for uint32. In place, for that is faster.
    x = first[..., None] ^ column
    x.mul_(-2048144789).bitwise_xor_(second[..., None])  # 0x85EBCA6B
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF))
    x.mul_(-1028477387)  # 0xC2B2AE35
    # The last x ^ x >> 16 leaves the upper half, and the lower decides only where the upper half is the threshold's.
    return x.bitwise_xor_(dropout_threshold(dropout_p) >> 16 & 0xFFFF)


def dropout_threshold(dropout_p: float) -> int:
    """The least word, read as a signed 32-bit integer, that is kept: the words below are dropout_p of all."""
    return min(round(dropout_p * 2**32) - 2**31, 2**31 - 1)


_MASK = 0xFFFFFFFF


def _signed(x: Tensor) -> Tensor:
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser, of 32-bit words in int64; a product's low 32 bits survive the wrap of 64."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & _MASK
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & _MASK
    return x ^ x >> 16
