"""Attention by ATen's flash kernel for CPUs, where it means the same.

The kernel adds a float mask and cuts at the upper-left diagonal, both at once. Whatever else may be hidden is
brought to it block by block: some queries of some heads, the keys that the band shows them, and a mask of that size.
It wants values as wide as keys, the elements of a row next to each other and no size of 0, and it reports a
log-sum-exp of 0 for a query that sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blockwise import Call, Tile

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK_ROWS = 128  # fewest queries of a block: each costs a call, and one more sum into the gradients of its keys
FEW_ROWS = 64
MASK_SIZE = 2**20  # elements of a block's mask
RELATIVE_SIZE = 2**18  # the same where it is computed: it stays in the cache until it is read
ALONE = 2**17  # scores of a batch that are worth a call of their own, if queries need not be copied then

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def serves(call: Call) -> bool:
    """Whether the kernel computes what this call asks for, and is the way to do it."""
    Q, N, M = call.query.shape[2], call.query.shape[1], call.key.shape[1]
    if N != M and Q * N // M <= FEW_ROWS:  # all the queries of a key head in one product read the keys once
        return False
    return (
        call.query.device.type == "cpu"
        and call.query.dtype in DTYPES
        and not (call.careful or call.softcap or call.dropout_p or call.weights)
        and call.query.shape[3] == call.value.shape[3] > 0
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    query, key, value = (_rows_dense(t) for t in (call.query, call.key, call.value))
    N, M = query.shape[1], key.shape[1]
    out, lse, masked = None, None, False
    for tile, mask, causal in _parts(call):
        rows, keys = tile.queries, tile.of_keys(N // M)
        found, total = _attend(query[rows], key[keys], value[keys], mask, causal, call.scale)
        masked = masked or mask is not None
        if tile == call.whole and N == M:
            out, lse = _heads_last(found), total.contiguous()
            break
        if out is None or lse is None:
            out, lse, _ = call.blank()
        out[rows], lse[rows] = found, total
    if out is None or lse is None:  # no query sees a key
        out, lse, _ = call.blank()
    if masked:
        _mark_empty(call, lse)
    return out, lse


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, dout, out = (_rows_dense(t) for t in (call.query, call.key, call.value, dout, out))
    N, M = query.shape[1], key.shape[1]
    # A query that sees nothing has weights exp(-inf - lse), to be 0 and not NaN.
    lse = lse.clamp_min(torch.finfo(lse.dtype).min)
    sums: tuple[Tensor, ...] = ()
    for tile, mask, causal in _parts(call):
        rows, keys = tile.queries, tile.of_keys(N // M)
        dq, dk, dv = _gradients(
            dout[rows], query[rows], key[keys], value[keys], out[rows], lse[rows], mask, causal, call.scale
        )
        if tile == call.whole and N == M:
            return _heads_last(dq), _heads_last(dk), _heads_last(dv)
        if not sums:
            sums = tuple(
                t.new_zeros(t.transpose(1, 2).shape, dtype=call.wide).transpose(1, 2) for t in (query, key, value)
            )
        sums[0][rows] = dq
        sums[1][keys] += dk
        sums[2][keys] += dv
    dquery, dkey, dvalue = (t.to(query.dtype) for t in sums)
    return dquery, dkey, dvalue


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    heads = query.shape[1], key.shape[1]
    mask = _spread(mask, query, heads, key)
    query, key, value = _grouped(query, heads), _shared(key, heads), _shared(value, heads)
    out, lse = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return _ungrouped(out, heads), _ungrouped(lse, heads)


def _gradients(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[1], key.shape[1]
    mask = _spread(mask, query, heads, key)
    dout, query, out, lse = (_grouped(t, heads) for t in (dout, query, out, lse))
    key, value = _shared(key, heads), _shared(value, heads)
    dq, dk, dv = _backward(dout, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    if heads[0] == heads[1]:
        return dq, dk, dv
    return _ungrouped(dq, heads), *(t.sum(1).unflatten(0, (-1, heads[1])) for t in (dk, dv))


# Heads that share a key head stand in a dimension of their own, along which the key head repeats for free:
# queries [B * M, G, Q, D], keys and values [B * M, G, K, D] of stride 0 along G. It is free for one batch.


def _grouped(x: Tensor, heads: tuple[int, int]) -> Tensor:
    N, M = heads
    return x if N == M else x.unflatten(1, (M, N // M)).flatten(0, 1)


def _ungrouped(x: Tensor, heads: tuple[int, int]) -> Tensor:
    N, M = heads
    return x if N == M else x.unflatten(0, (-1, M)).flatten(1, 2)


def _shared(x: Tensor, heads: tuple[int, int]) -> Tensor:
    N, M = heads
    return x if N == M else x.flatten(0, 1)[:, None].expand(-1, N // M, -1, -1)


def _spread(mask: Tensor | None, query: Tensor, heads: tuple[int, int], key: Tensor) -> Tensor | None:
    """The mask for grouped heads; it is copied only where it has several batches, or several heads for them."""
    if mask is None:
        return None
    (N, M), (B, _, Q, _), K = heads, query.shape, key.shape[2]
    if N == M:
        return mask.expand(B, N, Q, K)
    parts = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (M, N // M))
    shape = B, M, *parts.shape[2:]
    return parts.expand(shape).flatten(0, 1).expand(-1, N // M, Q, K)


# What is hidden.


def _parts(call: Call) -> Iterator[tuple[Tile, Tensor | None, bool]]:
    """The calls of the kernel: what is in each, what is added there, and whether the kernel's own diagonal cuts."""
    whole = _at_once(call)
    B, N, Q, K = call.whole.shape
    if whole is None:
        for tile in _blocks(call):
            yield tile, _mask(call, tile), False
        return
    mask, causal = whole
    step = 1 if call.key.shape[1] != N and N * Q * K >= ALONE else B
    for b in range(0, B, step):
        tile = replace(call.whole, batches=slice(b, min(b + step, B)))
        yield tile, None if mask is None else tile.of(mask), causal


def _at_once(call: Call) -> tuple[Tensor | None, bool] | None:
    """What is added and whether the kernel's own diagonal cuts, where that is the same for all; None where not."""
    left, right, shift = call.band
    Q, K = call.whole.shape[2:]
    planes = call.mask_planes[0] * call.mask_planes[1]
    causal = right == 0 and shift == 0
    if call.relative:
        return (_mask(call, call.whole), causal) if planes * Q * K <= MASK_SIZE else None
    if left >= 0 or (right >= 0 and not causal):
        return (_mask(call, call.whole), False) if Q * K <= BLOCK_ROWS**2 and planes * Q * K <= MASK_SIZE else None
    if call.bias is None and (call.mask is None or call.key_mask is not None):
        return call.key_mask, causal
    as_is = call.bias is not None and call.bias.dtype in (call.query.dtype, call.wide) and call.bias.stride(3) in (0, 1)
    if as_is and call.mask is None:
        return call.bias, causal
    return (_mask(call, call.whole), causal) if planes * Q * K <= MASK_SIZE else None


def _blocks(call: Call) -> Iterator[Tile]:
    """Some queries of some heads, as many as share a mask or as its size allows, against the keys that they see."""
    B, N, Q, K = call.whole.shape
    left, right, _ = call.band
    batches, heads = call.mask_planes
    rows = Q if left < 0 and right < 0 else Q // 8 if left < 0 or right < 0 else left + right
    most = RELATIVE_SIZE if call.relative else MASK_SIZE
    if call.position_query is not None:  # fewer rows meet fewer positions
        rows = min(rows, BLOCK_ROWS)
    rows = max(1, min(rows, most // K))
    if heads > 1 and call.key.shape[1] == N:
        heads = max(1, min(N, most // (rows * K)))
    if batches > 1:
        batches = max(1, min(B, most // (heads * rows * K)))
    rows = max(BLOCK_ROWS, min(rows, most // (batches * heads * K)))
    step_b, step_n = (size if of_mask == 1 else step for size, of_mask, step in zip(
        (B, N), call.mask_planes, (batches, heads), strict=True))  # fmt: skip
    for b in range(0, B, step_b):
        for n in range(0, N, step_n):
            yield from call.tiles(slice(b, min(b + step_b, B)), slice(n, min(n + step_n, N)), rows)


def _mask(call: Call, tile: Tile) -> Tensor:
    """All that is added to a block's scores, in the least shape that broadcasts to them."""
    if call.position_query is not None:
        return call.hide(call.positions.enter(tile).product(tile, call.scale), tile)
    edges = max(call.band[:2]) >= 0 and call.distance is None
    terms = [*call.added(tile)]
    if call.bias is None and call.mask is None and call.rank_q is None and not edges:
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]  # distances are views, and need no more memory
    if edges or call.mask is None or call.rank_q is not None:
        planes = (min(n, m) for n, m in zip(tile.shape, call.mask_planes, strict=False))
        return call.hide(call.query.new_zeros(*planes, *tile.shape[2:], dtype=call.wide), tile)
    added = additive(tile.of(call.mask), call.wide) if call.key_mask is None else tile.of(call.key_mask)
    return sum(terms, added)


def _mark_empty(call: Call, lse: Tensor) -> None:
    """Set the log-sum-exp of queries that see nothing, which the kernel leaves at 0, to -inf."""
    suspects = lse == 0.0
    if not suspects.any():
        return
    lse.masked_fill_(suspects, -torch.inf)
    for tile in _blocks(call):
        suspect = suspects[tile.queries]
        if suspect.any():
            lse[tile.queries].masked_fill_(suspect & (_mask(call, tile).amax(-1) > -torch.inf), 0.0)


# What the kernel takes, and what is returned.


def limits(Q: int, K: int, left: int, right: int, lower_right: bool) -> tuple[int, int, int]:
    """``left``, ``right`` and ``shift`` of a band, with a side that limits no query not limiting."""
    shift = K - Q if lower_right else 0
    return -1 if left >= Q - 1 + shift else left, -1 if right >= K - 1 - shift else right, shift


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as it is added: 0 and -inf."""
    return torch.where(mask, 0.0, -torch.inf).to(dtype)


def far(lse: Tensor) -> bool:
    """Whether a log-sum-exp has lost the sum beside the maximum, and with it the weights."""
    return bool(((lse < -1e4) & (lse != -torch.inf)).any())


def rows_are_dense(x: Tensor) -> bool:
    """Whether the kernel can read the rows: it asks for no stride within them, and for none between them of 0."""
    return x.stride(3) == 1 and x.stride(2) >= x.shape[3]


def _rows_dense(x: Tensor) -> Tensor:
    return x if rows_are_dense(x) else x.contiguous()


def _heads_last(x: Tensor) -> Tensor:
    """``[B, N, T, D]`` in the memory of ``[B, T, N, D]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
