"""PyTorch's own fused attention on a CPU, in PyTorch's own graph, and a hook on its node for what it lacks.

It has no second gradient (pytorch/pytorch#116350), and multiplies NaN behind a mask by 0. Both are rare, so both are
looked for and computed anew: in the result, and in the gradients when its node has found them. An operator of ours
around it would keep the same promises at several times the overhead.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention as reference
from . import blockwise
from .library import needs_gradient

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_NODE = "ScaledDotProductFlashAttentionForCpuBackward0"
_FAR = -1e4  # log-sum-exps beyond have lost the sum beside the maximum, and with it the weights


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor | None:
    """The output for CPU tensors ``[B, N, T, D]``, equal but for Q and K; None where this is not the way."""
    sizes = query.shape[:2]
    if query.dim() != 4 or key.shape != value.shape or key.shape[:2] != sizes or key.shape[3] != query.shape[3]:
        return None
    if attn_mask is not None:
        if attn_mask.requires_grad or not 2 <= attn_mask.dim() <= 4:
            return None
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if attn_mask is not None and is_causal:
        # The operator takes both, the function in front of it does not.
        shape = *query.shape[:3], key.shape[2]
        added = _additive(attn_mask, query) if math.prod(shape) and query.shape[3] else None
        if added is None or not all(t.stride(3) == 1 for t in (query, key, value)):
            return None
        if not all(a in (1, b) for a, b in zip(added.shape, shape, strict=True)):
            return None
        out = _FLASH(query, key, value, 0.0, True, attn_mask=added.expand(shape), scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    whole = attn_mask is None and not is_causal
    if not whole and not _finite(out):
        return None
    if needs_gradient((query, key, value)):
        node = out.grad_fn
        if node.name() != _NODE:
            return None
        by_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        node.register_hook(_of_whole if whole else _of_shown if by_bool or attn_mask is None else _of_added)
    return out  # type: ignore[no-any-return]


def _additive(mask: Tensor, query: Tensor) -> Tensor | None:
    """A mask as it is added to the scores; None if it is not one."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return mask if mask.dtype == query.dtype else None


def _finite(x: Tensor) -> bool:
    """False if any element is NaN or infinite; a sum in half precision might overflow without one."""
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def _of_whole(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    return _anew(given[0], False) if torch.is_grad_enabled() else None


def _of_shown(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    if torch.is_grad_enabled() or not all(g is None or _finite(g) for g in found):
        return _anew(given[0], True)
    return None


def _of_added(found: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    node: Any = torch._C._current_autograd_node()
    bad = not all(g is None or _finite(g) for g in found) or bool((node._saved_logsumexp < _FAR).any())
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
