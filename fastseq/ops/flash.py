"""Attention by ATen's flash kernel for CPUs, where it means the same.

The kernel adds a float mask and cuts at the upper-left diagonal, both at once. Whatever else may be hidden is
brought to it block by block: some queries, the keys that the band shows them, and a mask of that size. It wants
values as wide as keys, the elements of a row next to each other and no size of 0, and it reports a log-sum-exp of 0
for a query that sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blockwise import Call, Tile

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK_ROWS = 128  # fewest queries of a block: each costs a call, and one more sum into the gradients of its keys
FEW_ROWS = 64
MASK_SIZE = 2**20  # elements of a block's mask

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
    whole = _at_once(call)
    if whole is not None:
        mask, causal = whole
        out, lse = _attend(query, key, value, mask, causal, call.scale)
        out, lse = _heads_last(out), lse.contiguous()
    else:
        out, lse, _ = call.blank()
        for tile in _blocks(call):
            q, k = tile.rows, tile.keys
            out[:, :, q], lse[:, :, q] = _attend(
                query[:, :, q], key[:, :, k], value[:, :, k], _mask(call, tile), False, call.scale
            )
    if whole is None or mask is not None:
        _mark_empty(call, lse)
    return out, lse


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, dout, out = (_rows_dense(t) for t in (call.query, call.key, call.value, dout, out))
    # A query that sees nothing has weights exp(-inf - lse), to be 0 and not NaN.
    lse = lse.clamp_min(torch.finfo(lse.dtype).min)
    whole = _at_once(call)
    if whole is not None:
        dq, dk, dv = _gradients(dout, query, key, value, out, lse, *whole, call.scale)
        return _heads_last(dq), _heads_last(dk), _heads_last(dv)
    dquery, dkey, dvalue = (
        t.new_zeros(t.transpose(1, 2).shape, dtype=call.wide).transpose(1, 2) for t in (query, key, value)
    )
    for tile in _blocks(call):
        q, k = tile.rows, tile.keys
        dq, dk, dv = _gradients(
            dout[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], lse[:, :, q],
            _mask(call, tile), False, call.scale,
        )  # fmt: skip
        dquery[:, :, q] = dq
        dkey[:, :, k] += dk
        dvalue[:, :, k] += dv
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


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
# queries [B * M, G, Q, D], keys and values [B * M, G, K, D] of stride 0 along G.


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


def _at_once(call: Call) -> tuple[Tensor | None, bool] | None:
    """What is added and whether the kernel's own diagonal cuts, where a single call does it; None where not."""
    left, right, shift = call.band
    B, N, Q, K = call.whole.shape
    planes = call.mask_planes[0] * call.mask_planes[1]
    causal = right == 0 and shift == 0
    if left >= 0 or (right >= 0 and not causal):
        return (_mask(call, call.whole), False) if Q * K <= BLOCK_ROWS**2 and planes * Q * K <= MASK_SIZE else None
    if call.bias is None and (call.mask is None or call.key_mask is not None):
        return call.key_mask, causal
    as_is = call.bias is not None and call.bias.dtype in (call.query.dtype, call.wide) and call.bias.stride(3) in (0, 1)
    if as_is and call.mask is None and (B == 1 or call.key.shape[1] == N):
        return call.bias, causal
    return (_mask(call, call.whole), causal) if planes * Q * K <= MASK_SIZE else None


def _blocks(call: Call) -> Iterator[Tile]:
    """The queries in blocks against the keys that the band shows them."""
    B, N, Q, K = call.whole.shape
    left, right, _ = call.band
    rows = Q if left < 0 and right < 0 else Q // 8 if left < 0 or right < 0 else left + right
    planes = call.mask_planes
    rows = max(BLOCK_ROWS, min(rows, MASK_SIZE // (planes[0] * planes[1] * K)))
    return call.tiles(slice(0, B), slice(0, N), rows)


def _mask(call: Call, tile: Tile) -> Tensor:
    """All that is added to a block's scores, in the least shape that broadcasts to them."""
    if call.mask is not None and call.bias is None and max(call.band[:2]) < 0:
        return call.additive(tile.of(call.mask))
    return call.hide(call.query.new_zeros(*call.mask_planes, *tile.shape[2:], dtype=call.wide), tile)


def _mark_empty(call: Call, lse: Tensor) -> None:
    """Set the log-sum-exp of queries that see nothing, which the kernel leaves at 0, to -inf."""
    suspects = (lse == 0.0).flatten(0, 1).any(0)  # of the queries
    if not suspects.any():
        return
    empty = suspects.expand(*call.mask_planes, -1).clone()
    for tile in _blocks(call):
        if suspects[tile.rows].any():
            empty[:, :, tile.rows] = _mask(call, tile).amax(-1) == -torch.inf
    lse.masked_fill_(empty, -torch.inf)


# What the kernel takes, and what is returned.


def rows_are_dense(x: Tensor) -> bool:
    """Whether the kernel can read the rows: it asks for no stride within them, and for none between them of 0."""
    return x.stride(3) == 1 and x.stride(2) >= x.shape[3]


def _rows_dense(x: Tensor) -> Tensor:
    return x if rows_are_dense(x) else x.contiguous()


def _heads_last(x: Tensor) -> Tensor:
    """``[B, N, T, D]`` in the memory of ``[B, T, N, D]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
