"""Hugging Face transformers on fastseq's attention: ``register()``, then ``attn_implementation="fastseq"``."""

from typing import Any

import torch
from torch import Tensor

from ..bias import Bias
from ..functional import scaled_dot_product_attention
from ..implementation import Unsupported

__all__ = ["register"]

NAME = "fastseq"  # of the implementation that fastseq.swap sets

# From this version on T5 hands over its position bias, and BERT its attention.
_OLDEST = (5, 15)

# What models pass on to their attention that changes no attention: how the model is called and what it returns,
# positions that are in queries, keys and mask already. `deterministic` we always are.
_OF_NO_CONCERN = {
    "cache_position",
    "deterministic",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}

# Packed sequences. A mask says it all, as transformers makes one from position_ids; without it they are left alone.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

_REFUSED = {"s_aux": "attention sinks", "cache": "a paged cache", **dict.fromkeys(_PACKING, "packing without a mask")}


def register(name: str = NAME) -> None:
    """Make fastseq an attention implementation of transformers, for every model that lets one be chosen.

    Models ask for it with ``from_pretrained(..., attn_implementation=name)`` or
    ``model.set_attn_implementation(name)``. Masks are made as for PyTorch's own attention; padding on either side,
    grouped heads, T5's learned position bias, soft-capped scores, caches of either kind and ``output_attentions=True``
    are served. What is not, such as attention sinks, raises :class:`fastseq.Unsupported` when the model calls it.
    ``register("sdpa")`` puts fastseq in the place of transformers' default. Registering twice is once.

    Raises:
        ImportError: transformers is not installed, or older than 5.15.
        ValueError: transformers would take the name for another kind of implementation.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import torch, fastseq.huggingface
        >>> fastseq.huggingface.register()
        >>> config = BertConfig(num_hidden_layers=1, attn_implementation="fastseq")
        >>> y = BertModel(config)(torch.tensor([[101, 7592, 102]])).last_hidden_state
    """
    needed = "fastseq.huggingface: needs transformers >= {}.{} (pip install 'fastseq-kernels[hf]')".format(*_OLDEST)
    try:
        import transformers
    except ImportError as missing:
        raise ImportError(needed) from missing
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
        raise ImportError(f"{needed}, got {transformers.__version__}")
    if any(kind in name for kind in ("flash", "flex", "paged|", "/")):
        raise ValueError(f"name: expected one without 'flash', 'flex', 'paged|' and '/', got {name!r}")
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register(name, attention)
    # Without a mask function of its own a name gets no masks at all: padding would be seen.
    transformers.AttentionMaskInterface.register(name, sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | Bias | float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model calls: query ``[B, N, Q, D]``, key and value ``[B, M, K, D]``; output ``[B, Q, N, D]``, weights.

    The mask is what transformers' ``sdpa_mask`` made: None, or bool ``[B, 1, Q, K]``, true where a query may look;
    or what the user passed in its place, bool or float. The bias may be one of ``fastseq.bias``, which no model of
    transformers knows but those that ``fastseq.swap`` turned, or a number, which changes no weight.

    Raises:
        Unsupported: a keyword asks for what fastseq's attention does not do.
    """
    for name, given in keywords.items():
        if given is None or given is False or name in _OF_NO_CONCERN:
            continue
        if name not in _PACKING or attention_mask is None:
            what = f" ({_REFUSED[name]})" if name in _REFUSED else ""
            raise Unsupported(f"{name}{what}: not what fastseq's attention does; 'sdpa' or 'eager' may")

    causal, window = False, None
    if attention_mask is None:
        # transformers leaves out the mask only where this says the same: in a first call, whose queries start where
        # the keys do (behind which a static cache may have room), and for a single query, which sees all keys.
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal = bool(is_causal and query.shape[2] > 1)
        # A window that hides anything is in the mask; where it is not, it means what it means for flash attention.
        if sliding_window is not None and key.shape[2] > sliding_window:
            window = (sliding_window - 1, sliding_window - 1)

    results = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scale=scaling,
        enable_gqa=getattr(module, "num_key_value_groups", 1) > 1, window=window,
        bias=None if isinstance(position_bias, int | float) else position_bias,
        softcap=softcap, return_weights=_weights_are_wanted(keywords),
    )  # fmt: skip
    out, weights = results if isinstance(results, tuple) else (results, None)
    return out.transpose(1, 2).contiguous(), weights


def _weights_are_wanted(keywords: dict[str, Any]) -> bool:
    """Whether the caller of the model wants the attention weights.

    Some models (GPT-2) keep ``output_attentions`` to themselves and listen for weights by a hook; where none come,
    they return an empty tuple. The hook's collector knows.
    """
    if keywords.get("output_attentions"):
        return True
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and any("attentions" in key for key in collected)
