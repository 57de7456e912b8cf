"""T5's attention: no bias in its projections, no scale, and where a token stands told by a learned relative bias."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..bias import Bias
from ..implementation import Choice
from .cache import KVCache


class T5Attention(torch.nn.Module):
    """Multi-head attention of T5 (Raffel et al. 2020): to itself or to a memory, with a shared relative bias.

    The scores are the products themselves: what 1/sqrt(D) does elsewhere is part of the initial weights here. The
    relative bias is given by the caller, since one table serves all layers of a stack; without it, as to a memory,
    nothing tells positions apart.

    Args:
        embed_dim: E, the width of input and output.
        num_heads: N.
        head_dim: D, the width of a head; N * D need not be E. None for E / N.
        dropout: of the attention weights, in training.
        device, dtype: of ``in_proj_weight`` ``[3 * N * D, E]`` (queries, keys, values) and of ``out_proj``,
            ``[E, N * D]``.

    The call takes x ``[B, Q, E]`` and, to attend to it, ``memory`` ``[B, K, E]``; it returns ``[B, Q, E]``. By keyword:

    - ``bias``: a :class:`fastseq.bias.T5`, or None.
    - ``key_padding_mask``: bool ``[B, K]``, true for the keys to ignore; with a cache, of all keys so far.
    - ``causal``: whether a query sees no key after its own token, the last query standing at the last key.
    - ``cache``: a :class:`KVCache`, to which the keys and values are appended; one that grows is causal.

    Raises:
        ValueError: widths, mask or options do not fit together.

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.T5Attention(16, num_heads=4, head_dim=8)
        >>> table = torch.nn.Parameter(torch.zeros(32, 4))
        >>> attention(torch.randn(2, 5, 16), bias=fastseq.bias.T5(table, bidirectional=False), causal=True).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
            head_dim = embed_dim // num_heads
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        inner = num_heads * head_dim
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * inner, embed_dim, device=device, dtype=dtype))
        self.out_proj = torch.nn.Linear(inner, embed_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, factor: float = 1.0) -> None:
        """T5's initial weights; the queries' are the smaller by sqrt(D), which stands for the scale."""
        E, inner = self.embed_dim, self.out_proj.in_features
        query, key_value = self.in_proj_weight.split([inner, 2 * inner])
        torch.nn.init.normal_(query, std=factor * (E * self.head_dim) ** -0.5)
        torch.nn.init.normal_(key_value, std=factor * E**-0.5)
        torch.nn.init.normal_(self.out_proj.weight, std=factor * inner**-0.5)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        bias: Bias | None = None,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        B = x.shape[0]
        for name, t in (("x", x), ("memory", memory)):
            if t is not None and (t.dim() != 3 or t.shape[0] != B or t.shape[2] != self.embed_dim):
                raise ValueError(f"{name}: expected [B, T, {self.embed_dim}] of one batch, got {list(t.shape)}")
        q, k, v = self._projected(x, memory, cache is not None and cache.filled)
        if cache is not None:
            k, v = (cache.key, cache.value) if k is None or v is None else cache.append(k, v)
            causal = causal or cache.max_length is not None
        K = k.shape[2]  # type: ignore[union-attr]
        mask = None
        if key_padding_mask is not None:
            if key_padding_mask.shape != (B, K) or key_padding_mask.dtype != torch.bool:
                got = f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
                raise ValueError(f"key_padding_mask: expected torch.bool {[B, K]}, got {got}")
            mask = ~key_padding_mask[:, None, None]
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, scale=1.0, bias=bias,  # type: ignore[arg-type]
            causal="lower_right" if causal and x.shape[1] > 1 else None,  # the last query sees every key anyway
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _projected(self, x: Tensor, memory: Tensor | None, filled: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Query ``[B, N, Q, D]``, key and value ``[B, N, K, D]``: views of as few matrix products as can be."""
        inner = self.out_proj.in_features

        def heads(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            y = F.linear(x, weight).view(*x.shape[:2], len(weight) // inner, self.num_heads, self.head_dim)
            return y.permute(2, 0, 3, 1, 4).unbind()

        if memory is None and not filled:
            q, k, v = heads(x, self.in_proj_weight)
            return q, k, v
        of_query, of_memory = self.in_proj_weight.split([inner, 2 * inner])
        (q,) = heads(x, of_query)
        if memory is None or filled:
            return q, None, None
        k, v = heads(memory, of_memory)
        return q, k, v

    def _explain(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Choice:
        head = torch.empty((), dtype=x.dtype, device=x.device).expand(1, self.num_heads, 1, self.head_dim)
        beyond = any(option is not None and option is not False for option in options.values())
        return functional.choose_attention(head, head, beyond)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout:g}"
