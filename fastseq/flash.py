"""fastseq as a flash attention of PyTorch: behind ``F.scaled_dot_product_attention`` on CUDA, where it takes one.

PyTorch lets a library replace, below autograd, the operators that its flash attention is made of. They mean what
FlashAttention means: the causal diagonal ends in the lower right corner, and tensors are ``[B, T, N, D]``, or packed
``[tokens, N, D]``; only those named ``_scaled_dot_product_…`` have the heads first. What the gradient has to know of
the dropout travels in ``rng_state``, two uint64, of which ours fills the first.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .implementation import Unsupported
from .ops import attention as attention_ops

__all__ = ["register_flash_attention"]


def register_flash_attention(name: str = "fastseq") -> None:
    """Offer fastseq to PyTorch as an implementation of flash attention; nothing changes until it is activated.

    After ``torch.nn.attention.activate_flash_attention_impl(name)``, fastseq computes on CUDA whatever
    ``F.scaled_dot_product_attention`` gives to its flash backend (half precision, no mask), jagged tensors, and
    ``torch.nn.attention.varlen.varlen_attn``. ``torch.nn.attention.restore_flash_attention_impl()`` takes it back.
    Inside ``fastseq.use`` its choice holds, otherwise the kernels run wherever they can.

    Example:
        >>> import torch, fastseq
        >>> fastseq.register_flash_attention()
        >>> "fastseq" in torch.nn.attention.list_flash_attention_impls()
        True
    """
    torch.nn.attention.register_flash_attention_impl(name, register_fn=Registration)


class Registration:
    """Our functions in the place of PyTorch's, until `remove`."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, function in FUNCTIONS.items():
            self._library.impl(name, function, dispatch_key)

    def remove(self) -> None:
        self._library = None  # which was the last reference: PyTorch's functions are back


def dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    settings = _settings(query, key, dropout_p, is_causal, scale)
    out, lse, *state = _forward(settings, query, key, value, None, None, return_debug_mask)
    return _laid_out(out, query), lse, None, None, query.shape[2], key.shape[2], *state


def dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    inputs = query, key, value
    settings = _settings(query, key, dropout_p, is_causal, scale)
    gradients = _backward(settings, grad_out, *inputs, None, None, philox_seed, out, logsumexp)
    return tuple(_laid_out(g, t) for g, t in zip(gradients, inputs, strict=True))


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Any, ...]:
    for name, given in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if given is not None:
            raise Unsupported(f"{name}: not what fastseq's flash attention does")
    if num_splits is not None and (cum_seq_q is None or num_splits != 1):
        raise Unsupported(f"num_splits: packed sequences are never split (1), others as suits them, got {num_splits}")
    q, k, v = (_heads_first(t) for t in (query, key, value))
    settings = _settings(
        q, k, dropout_p, is_causal, scale, window_size_left, window_size_right,
        lengths=None if cum_seq_q is None else (max_q, max_k),
    )  # fmt: skip
    out, lse, *state = _forward(settings, q, k, v, cum_seq_q, cum_seq_k, return_debug_mask)
    return _laid_out(_heads_last(out, query), query), lse if cum_seq_q is None else lse[0], *state


def flash_forward_into(out: Tensor, *args: Any, **keywords: Any) -> Tensor:
    results: tuple[Tensor, ...] = flash_forward(*args, **keywords)
    out.copy_(results[0])
    return results[1]


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    inputs = query, key, value
    dout, q, k, v, out = (_heads_first(t) for t in (grad_out, *inputs, out))
    settings = _settings(
        q, k, dropout_p, is_causal, scale, window_size_left, window_size_right,
        lengths=None if cum_seq_q is None else (max_q, max_k),
    )  # fmt: skip
    lse = logsumexp if cum_seq_q is None else logsumexp[None]
    gradients = _backward(settings, dout, q, k, v, cum_seq_q, cum_seq_k, rng_state, out, lse)
    return tuple(_laid_out(_heads_last(g, t), t) for g, t in zip(gradients, inputs, strict=True))


FUNCTIONS = {
    "_scaled_dot_product_flash_attention": dense_forward,
    "_scaled_dot_product_flash_attention_backward": dense_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_forward_into,
    "_flash_attention_backward": flash_backward,
}


# ------------------------------------------------------------------------------ theirs to ours: [B, N, T, D] always


def _settings(
    query: Tensor,
    key: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    left: int | None = None,
    right: int | None = None,
    lengths: tuple[int, int] | None = None,
) -> tuple[Any, ...]:
    """What ``fastseq::attention`` takes before its tensors; ``lengths`` are the longest of packed sequences."""
    return (
        1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        -1 if left is None else left,
        0 if is_causal else -1 if right is None else right,
        True,  # lower right
        0.0,  # no soft cap
        dropout_p,
        *(lengths or (query.shape[2], key.shape[2])),
        "",  # no weights
        *(0, 0),  # no tables by position
        *(False, False),  # no gradient of a bias or a table
    )


def _forward(
    settings: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    return_debug_mask: bool,
) -> tuple[Any, ...]:
    """Output, log-sum-exp, and what PyTorch's operators end with: rng_state, a tensor unused, the debug mask."""
    if return_debug_mask:
        raise Unsupported("return_debug_mask: not what fastseq's flash attention does")
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    dropout_p = settings[attention_ops.NAMES.index("dropout_p")]
    if dropout_p:
        state[:1].random_(-(2**63), 2**63 - 1)
    seed = state[:1] if dropout_p else None
    out, lse, _ = attention_ops.attention(*settings, query, key, value, *_rest(cu_q=cu_q, cu_k=cu_k, seed=seed), "")
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, lse, state.view(torch.uint64), unused, query.new_empty(0)


def _backward(
    settings: tuple[Any, ...],
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    state: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    seed = state.view(torch.int64)[:1] if settings[attention_ops.NAMES.index("dropout_p")] else None
    given = query, key, value, *_rest(cu_q=cu_q, cu_k=cu_k, seed=seed)
    grads = torch.ops.fastseq.attention_backward(
        *settings, grad_out, None, None, *given, out, lse, query.new_empty(0), ""
    )
    return grads[:3]  # type: ignore[no-any-return]


def _rest(**given: Tensor | None) -> Iterator[Tensor | None]:
    """What the operator takes after query, key and value: what is given, and None for everything else."""
    return (given.get(name) for name in attention_ops.TENSORS[3:])


def _heads_first(t: Tensor) -> Tensor:
    return (t if t.dim() == 4 else t[None]).transpose(1, 2)


def _heads_last(t: Tensor, model: Tensor) -> Tensor:
    t = t.transpose(1, 2)
    return t if model.dim() == 4 else t[0]


def _laid_out(t: Tensor, model: Tensor) -> Tensor:
    """With the strides that PyTorch's operators give, for a compiled graph counts on them."""
    if t.stride() == torch.empty_like(model, device="meta").stride():
        return t
    return torch.empty_like(model).copy_(t)
