"""PyTorch's own fused attention on a CPU, in PyTorch's own graph, and a hook on its node for what it lacks.

It has no second gradient (pytorch/pytorch#116350), and multiplies NaN behind a mask by 0. Both are rare, so both are
looked for and computed anew: in the result, and in the gradients when its node has found them. An operator of ours
around it would keep the same promises at several times the overhead.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from . import blockwise
from .flash import DTYPES, rows_are_dense

_flash = torch._scaled_dot_product_flash_attention_for_cpu
_WIDE = (torch.float32, torch.float64)
LARGEST = 2**18  # elements of a boolean mask that is turned into a float one as a whole
_FAR = -1e4  # log-sum-exps beyond have lost the sum beside the maximum, and with it the weights


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """The output for CPU tensors ``[B, N, T, D]``, equal but for Q and K; None where this is not the way."""
    shape, of_keys = query.shape, key.shape
    if len(shape) != 4 or len(of_keys) != 4 or of_keys != value.shape or shape[0] != of_keys[0]:
        return None
    if shape[1] != of_keys[1] or shape[3] != of_keys[3] or 0 in shape or 0 in of_keys:
        return None
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return None
    if not (rows_are_dense(query) and rows_are_dense(key) and rows_are_dense(value)):
        return None
    added = None
    if attn_mask is not None:
        added = _additive(attn_mask, query)
        if added is None:
            return None
        try:
            added = added.expand(*shape[:3], of_keys[2])
        except RuntimeError:  # who reports it names the argument
            return None
    # The operator takes a mask and is_causal together; the function in front of it does not.
    out, lse = _flash(query, key, value, 0.0, is_causal, attn_mask=added, scale=scale)
    if added is not None or is_causal:
        # A query of NaN that sees nothing spoils its own row only, which its log-sum-exp tells.
        total = _row_sum(out, -1)
        if not math.isfinite((total if added is None else total + lse.sum()).item()):
            return None
    node = out.grad_fn
    if node is not None:
        by_bool = attn_mask is None or attn_mask.dtype == torch.bool
        hook = _of_whole if attn_mask is None and not is_causal else _of_shown if by_bool else _of_added
        node.register_hook(hook)
    return out


def _additive(mask: Tensor, query: Tensor) -> Tensor | None:
    """A mask as four dimensions that are added to the scores; None where that is impossible or would be large."""
    if mask.requires_grad or not 2 <= mask.dim() <= 4:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool and mask.numel() <= LARGEST:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return mask if mask.dtype == query.dtype and mask.stride(3) in (0, 1) else None


def _row_sum(x: Tensor, row: int) -> Tensor:
    """The sum of this row of ``[B, N, T, D]`` in all heads, finite if it is free of NaN and infinity.

    It speaks for all rows: hidden values are multiplied too, by 0, and the last query meets every key that any query
    meets, as the first key meets every query. (A sum in half precision might overflow without a NaN.)
    """
    one = x.detach().select(2, row)
    return one.sum() if x.dtype in _WIDE else one.sum(dtype=torch.float32)


def _finite(found: tuple[Any, ...]) -> bool:
    """Whether gradients of query, key and value are."""
    sums = [_row_sum(g, row) for g, row in zip(found, (-1, 0, 0), strict=True) if g is not None]
    return not sums or math.isfinite(sum(sums[1:], sums[0]).item())


def _of_whole(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    return _anew(given[0], False) if torch.is_grad_enabled() else None


def _of_shown(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    if torch.is_grad_enabled() or not _finite(found):
        return _anew(given[0], True)
    return None


def _of_added(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    node: Any = torch._C._current_autograd_node()
    bad = not _finite(found) or bool((node._saved_logsumexp < _FAR).any())
    return _anew(given[0], False) if torch.is_grad_enabled() or bad else None


def _anew(dout: Tensor, shows: bool) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value of the node at work; ``shows``: its mask came from a boolean one."""
    node: Any = torch._C._current_autograd_node()
    query, key, value, added = node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask
    if added is not None:  # what is the same along a dimension, once
        added = added[tuple(slice(1) if stride == 0 else slice(None) for stride in added.stride())]
    settings: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale,
        "left": -1,
        "right": 0 if node._saved_is_causal else -1,
        "lower_right": False,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "weights": "",
    }
    rest: Any = (None if shows else added, added == 0 if shows and added is not None else None, None, None, None)
    if torch.is_grad_enabled():
        leaves = [t.view_as(t) for t in (query, key, value)]  # views: a tensor given twice is two variables here
        out, _, _ = reference.attention(*leaves, *rest, **settings)
        wanted = [t for t in leaves if t.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
        return tuple(next(gradients) if t.requires_grad else None for t in leaves)
    settings |= {"max_q": query.shape[2], "max_k": key.shape[2], "allow_tf32": False}
    out, lse, _ = blockwise.attention_forward(query, key, value, *rest, **settings)
    given: Any = (dout, None, None, query, key, value, *rest, out, lse)
    found = blockwise.attention_backward(*given, **settings, bias_gradient=False)
    return tuple(g if t.requires_grad else None for g, t in zip(found, (query, key, value), strict=False))
