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
MASK_SIZE = 2**20  # elements of a block's mask

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def serves(call: Call) -> bool:
    """Whether the kernel computes what this call asks for."""
    return (
        call.query.device.type == "cpu"
        and call.query.dtype in DTYPES
        and not (call.careful or call.softcap or call.dropout_p or call.weights)
        and call.query.shape[3] == call.value.shape[3] > 0
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    query, key, value = (_rows_dense(t) for t in (call.query, call.key, call.value))
    if _at_once(call):
        out, lse = _attend(query, key, value, _whole_mask(call), call.band[1] >= 0, call.scale)
        out, lse = _heads_last(out), lse.contiguous()
    else:
        out, lse, _ = call.blank()
        for tile in _blocks(call):
            q, k = tile.rows, tile.keys
            out[:, :, q], lse[:, :, q] = _attend(
                query[:, :, q], key[:, :, k], value[:, :, k], _mask(call, tile), False, call.scale
            )
    if call.hides:
        _mark_empty(call, lse)
    return out, lse


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, dout, out = (_rows_dense(t) for t in (call.query, call.key, call.value, dout, out))
    # A query that sees nothing has weights exp(-inf - lse), to be 0 and not NaN.
    lse = lse.clamp_min(torch.finfo(lse.dtype).min)
    if _at_once(call):
        found = _gradients(dout, query, key, value, out, lse, _whole_mask(call), call.band[1] >= 0, call.scale)
        return _heads_last(found[0]), _heads_last(found[1]), _heads_last(found[2])
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
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    if query.shape[1] == key.shape[1]:
        return _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)  # type: ignore[no-any-return]
    # The heads that share a key head stand in a dimension of their own, along which the key head repeats for free.
    parts = [
        _forward(*_grouped(b, query, key, value), 0.0, causal, attn_mask=_of_batch(mask, b, key), scale=scale)
        for b in range(query.shape[0])
    ]
    out, lse = (torch.stack([part[n].flatten(0, 1) for part in parts]) for n in range(2))
    return out, lse


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
) -> tuple[Tensor, ...]:
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    if query.shape[1] == key.shape[1]:
        return _backward(dout, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale)  # type: ignore[no-any-return]
    M = key.shape[1]
    parts = []
    for b in range(query.shape[0]):
        upper, o, total = (t[b].unflatten(0, (M, -1)) for t in (dout, out, lse))
        added = _of_batch(mask, b, key)
        dq, dk, dv = _backward(
            upper, *_grouped(b, query, key, value), o, total, 0.0, causal, attn_mask=added, scale=scale
        )
        parts.append((dq.flatten(0, 1), dk.sum(1), dv.sum(1)))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))


def _grouped(b: int, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    """A batch as ``[M, G, Q, D]`` and twice ``[M, G, K, D]``."""
    grouped = query[b].unflatten(0, (key.shape[1], -1))
    yield grouped
    for t in (key, value):
        yield t[b][:, None].expand(*grouped.shape[:2], *t.shape[2:])


def _of_batch(mask: Tensor | None, b: int, key: Tensor) -> Tensor | None:
    return None if mask is None else mask[b].unflatten(0, (key.shape[1], -1))


# What is hidden.


def _at_once(call: Call) -> bool:
    """Whether one call does it: the band is the kernel's own, and the mask needs no table that is not there."""
    left, right, shift = call.band
    return (
        left < 0
        and (right < 0 or (right == 0 and shift == 0))
        and (call.mask is None or call.mask.shape[2] == 1)
        and (
            call.bias is None
            or (call.mask is None and call.bias.dtype in (call.query.dtype, call.wide) and call.bias.stride(3) in (0, 1))
            or call.bias.shape[2] == 1
        )
    )


def _whole_mask(call: Call) -> Tensor | None:
    added = call.key_mask
    if call.bias is not None:
        added = call.bias if added is None else call.bias + added
    return added


def _blocks(call: Call) -> Iterator[Tile]:
    """The queries in blocks against the keys that the band shows them."""
    B, N, Q, _ = call.query.shape
    left, right, _ = call.band
    rows = Q if left < 0 and right < 0 else Q // 8 if left < 0 or right < 0 else left + right
    planes = call.mask_planes
    rows = max(BLOCK_ROWS, min(rows, MASK_SIZE // (planes[0] * planes[1] * call.key.shape[2])))
    return call.tiles(slice(0, B), slice(0, N), rows)


def _mask(call: Call, tile: Tile) -> Tensor:
    """All that is added to a block's scores, in the least shape that broadcasts to them."""
    shape = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    return call.hide(call.query.new_zeros(*call.mask_planes, *shape, dtype=call.wide), tile)


def _mark_empty(call: Call, lse: Tensor) -> None:
    """Set the log-sum-exp of queries that see nothing, which the kernel leaves at 0, to -inf."""
    suspects = (lse == 0.0).flatten(0, 1).any(0)
    if not suspects.any():
        return
    for tile in _blocks(call):
        if suspects[tile.rows].any():
            lse[:, :, tile.rows].masked_fill_(_mask(call, tile).amax(-1) == -torch.inf, -torch.inf)


# What the kernel takes, and what is returned.


def _rows_dense(x: Tensor) -> Tensor:
    """A tensor whose rows the kernel can read: it asks for no stride within them, and for none between them of 0."""
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def _heads_last(x: Tensor) -> Tensor:
    """``[B, N, T, D]`` in the memory of ``[B, T, N, D]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
