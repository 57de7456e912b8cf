"""PyTorch's own fused attention on a CPU, in PyTorch's own graph, and a hook on its node for what it lacks.

It has no second gradient (pytorch/pytorch#116350), and multiplies NaN behind a mask by 0. Both are rare, so both are
looked for and computed anew: in the result, and in the gradients when its node has found them. An operator of ours
around it would keep the same promises at several times the overhead.
"""

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference.attention import band
from . import blockwise
from .flash import BLOCK_ROWS, DTYPES, additive, far, limits, rows_are_dense

_flash = torch._scaled_dot_product_flash_attention_for_cpu
LARGEST = 2**18  # elements of a boolean mask that is turned into a float one as a whole
SUMMED = 2**21  # elements of a mask and a bias added together, if only for the time of the call


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    of_band: tuple[int, int, bool],
    scale: float | None,
) -> Tensor | None:
    """The output for CPU tensors ``[B, N, T, D]``, equal but for Q and K; None where this is not the way.

    ``of_band`` is what the reference calls left, right and lower_right.
    """
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
    left, right, lower_right = of_band
    shift = 0
    if left >= 0 or right > 0 or lower_right:
        left, right, shift = limits(shape[2], of_keys[2], *of_band)
    is_causal = left < 0 and right == shift == 0
    terms = [_additive(t, query) for t in (attn_mask, bias) if t is not None]
    if left >= 0 or (right >= 0 and not is_causal):
        terms.append(_edges(shape[2], of_keys[2], left, right, shift, dtype))
    added = None
    try:
        for i, term in enumerate(terms):
            added = term if i == 0 or term is None else _sum(added, term, query)
            if added is None:
                return None
        if added is not None:
            added = added.expand(*shape[:3], of_keys[2])
    except RuntimeError:  # who reports it names the argument
        return None
    # The operator takes a mask and is_causal together; the function in front of it does not.
    out, lse = _flash(query, key, value, 0.0, is_causal, attn_mask=added, scale=scale)
    if (added is not None or is_causal) and not (_no_nan(out, -1) and (added is None or torch.equal(lse, lse))):
        # A query of NaN that sees nothing spoils its own row only, which its log-sum-exp tells.
        return None
    node = out.grad_fn
    if node is not None:
        by_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        adds = bias is not None or (attn_mask is not None and not by_bool)
        hides = by_bool or left >= 0 or right >= 0
        node.register_hook(partial(_again, hides, adds) if hides or adds else _of_whole)
    return out


def _additive(mask: Tensor, query: Tensor) -> Tensor | None:
    """A mask as four dimensions that are added to the scores; None where that is impossible or would be large."""
    if mask.requires_grad or not 2 <= mask.dim() <= 4:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool and mask.numel() <= LARGEST:
        return additive(mask, query.dtype)
    return mask if mask.dtype == query.dtype and mask.stride(3) in (0, 1) else None


def _sum(one: Any, other: Tensor, query: Tensor) -> Tensor | None:
    """Two such masks as one; None where that would be large, and less is so where a graph would keep it."""
    size = math.prod(map(max, one.shape, other.shape))
    kept = torch.is_grad_enabled() and query.requires_grad
    return one + other if size <= (LARGEST if kept else SUMMED) else None


@lru_cache(maxsize=16)
def _edges(Q: int, K: int, left: int, right: int, shift: int, dtype: torch.dtype) -> Tensor | None:
    """A band as a mask that is added; None where it pays to skip keys."""
    if Q * K > BLOCK_ROWS**2:
        return None
    with torch.inference_mode(False):  # what is kept may be needed by a graph
        visible = band(Q, K, left, right, shift != 0, torch.device("cpu"))
        return additive(visible, dtype)[None, None]


def _no_nan(x: Tensor, row: int) -> bool:
    """Whether this row of ``[B, N, T, D]`` is free of NaN in all heads.

    It speaks for all rows: hidden values are multiplied too, by 0, and the last query meets every key that any query
    meets, as the first key meets every query.
    """
    one = x.detach().select(2, row)
    return torch.equal(one, one)


def _clean(found: tuple[Any, ...]) -> bool:
    """Whether gradients of query, key and value are free of NaN."""
    return all(g is None or _no_nan(g, row) for g, row in zip(found, (-1, 0, 0), strict=True))


def _of_whole(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    return _anew(given[0], False, False) if torch.is_grad_enabled() else None


def _again(hides: bool, adds: bool, found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    """The hook where the mask hides, or adds, or both: the gradients, if they have to be computed anew."""
    node: Any = torch._C._current_autograd_node()
    if torch.is_grad_enabled() or not _clean(found) or (adds and far(node._saved_logsumexp)):
        return _anew(given[0], hides, adds)
    return None


def _anew(dout: Tensor, hides: bool, adds: bool) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value of the node at work, whose mask hides with -inf, or adds, or both."""
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
        "distance_zero": 0,
        "position_zero": 0,
    }
    mask = added > -torch.inf if hides and added is not None else None
    rest: Any = (added if adds else None, *[None] * 4, mask, *[None] * 7)
    if torch.is_grad_enabled():
        leaves = [t.view_as(t) for t in (query, key, value)]  # views: a tensor given twice is two variables here
        out, _, _ = reference.attention(*leaves, *rest, **settings)
        wanted = [t for t in leaves if t.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
        return tuple(next(gradients) if t.requires_grad else None for t in leaves)
    settings |= {"max_q": query.shape[2], "max_k": key.shape[2], "allow_tf32": False}
    out, lse, _ = blockwise.attention_forward(query, key, value, *rest, **settings)
    given: Any = (dout, None, None, query, key, value, *rest, out, lse)
    found = blockwise.attention_backward(*given, **settings, bias_gradient=False, distance_gradient=False)
    return tuple(g if t.requires_grad else None for g, t in zip(found, (query, key, value), strict=False))
