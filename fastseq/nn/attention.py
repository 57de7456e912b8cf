"""``torch.nn.MultiheadAttention`` with the one line that computes replaced, and more by keyword.

Constructor, parameters, initialisation and repr are inherited. There is one path: the same numbers in training and
in evaluation, with weights and without a second computation of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from .. import functional
from ..implementation import Choice
from .cache import KVCache
from .nested import nested, padded
from .position import RotaryEmbedding
from .tracing import Traced


class MultiheadAttention(Traced, torch.nn.MultiheadAttention):
    """Multi-head attention, a drop-in ``torch.nn.MultiheadAttention`` (Vaswani et al. 2017) with more by keyword.

    Constructor, parameters and results as ``torch.nn.MultiheadAttention``; a query that every mask hides from every
    key gets zeros (there: NaN), masks of different kinds combine, and nested input is taken in training too. The
    constructor takes, by keyword only:

    - ``num_kv_heads``: fewer heads for keys and values, each serving ``num_heads / num_kv_heads`` query heads
      (Ainslie et al. 2023, GQA). ``in_proj_weight`` is then ``[(num_heads + 2 * num_kv_heads) * head_dim, E]``.
    - ``window``: how many keys a query sees to its left and right, one number or a pair, -1 for no limit.
    - ``rotary``: rotary positions: a :class:`RotaryEmbedding`, or the base of one over the whole head width.

    And the call:

    - ``causal``: ``"upper_left"`` (query i sees keys 0 to i) or ``"lower_right"`` (the last query sees the last
      key), without a mask to go with it.
    - ``cache``: a :class:`KVCache`, to which the keys and values are appended; the queries are its last tokens.

    ``is_causal`` says, as in torch, that ``attn_mask`` is the causal mask; it is believed, and the mask not read.

    Raises:
        As ``torch.nn.MultiheadAttention``; ValueError for a wrong option above; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.MultiheadAttention(16, 4, batch_first=True, num_kv_heads=2, rotary=10000.0)
        >>> x = torch.randn(2, 5, 16)
        >>> y, weights = attention(x, x, x, causal="upper_left")
        >>> y.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
    """

    # What a module that torch built, and swap turned, goes by.
    num_kv_heads: int | None = None
    window: int | tuple[int, int] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        window: int | tuple[int, int] | None = None,
        rotary: float | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._extend(num_kv_heads, window, rotary)

    def _extend(
        self,
        num_kv_heads: int | None = None,
        window: int | tuple[int, int] | None = None,
        rotary: float | torch.nn.Module | None = None,
    ) -> None:
        """Give a module that is still as torch.nn builds it the options that torch.nn lacks."""
        if num_kv_heads is not None:
            if num_kv_heads < 1 or self.num_heads % num_kv_heads:
                raise ValueError(
                    f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {num_kv_heads}"
                )
            self.num_kv_heads = num_kv_heads
            if num_kv_heads != self.num_heads:
                self._narrow(num_kv_heads * self.head_dim)
        if window is not None:
            if self.bias_k is not None or self.add_zero_attn:
                raise ValueError("window: the keys of add_bias_kv and add_zero_attn have no place in one")
            self.window = window
        if rotary is not None:
            if not isinstance(rotary, torch.nn.Module):
                rotary = RotaryEmbedding(self.head_dim, rotary)
            self._modules["rotary"] = rotary

    def _narrow(self, width: int) -> None:
        """Keys and values of this width for all their heads together."""

        def parameter(like: Tensor, *shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(like.new_empty(shape))

        rows = self.embed_dim + 2 * width
        if self.in_proj_weight is not None:
            self.in_proj_weight = parameter(self.in_proj_weight, rows, self.embed_dim)
        else:
            self.k_proj_weight = parameter(self.k_proj_weight, width, self.kdim)
            self.v_proj_weight = parameter(self.v_proj_weight, width, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = parameter(self.in_proj_bias, rows)
        if self.bias_k is not None and self.bias_v is not None:
            self.bias_k, self.bias_v = (parameter(bias, 1, 1, width) for bias in (self.bias_k, self.bias_v))
        self._reset_parameters()

    @property
    def rotary(self) -> torch.nn.Module | None:
        """The rotary positions; None on a module without."""
        return self._modules.get("rotary")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._extras() if name != "rotary")

    def _extras(self) -> tuple[str, ...]:
        narrow = self.num_kv_heads not in (None, self.num_heads)
        used = {"num_kv_heads": narrow, "window": self.window is not None, "rotary": self.rotary is not None}
        return tuple(name for name, is_used in used.items() if is_used)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        causal: str | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, Proxy):
            positional = (key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self._leaf(query, *positional, causal=causal, cache=cache)
        itself, memory = query is key, key is value
        if query.is_nested or key.is_nested or value.is_nested:
            plain = key_padding_mask is None and attn_mask is None and cache is None
            if not (itself and memory and self.batch_first and plain):
                raise AssertionError("nested tensors: expected self-attention, batch_first, no masks and no cache")
            x, padding = padded(query)
            out, weights = self.forward(x, x, x, padding, need_weights, None, average_attn_weights, causal=causal)
            if weights is not None:  # what stands for no query gives no weights
                rows = padding[:, :, None] if average_attn_weights else padding[:, None, :, None]
                weights = weights.masked_fill(rows, 0.0)
            return nested(out, query), weights

        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_first = self.batch_first or not batched
        B, L = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
        held = 0 if cache is None else cache.length
        filled = cache is not None and cache.filled
        S = held if filled else held + key.shape[1 if batch_first else 0]
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal, causal, (B, L, S), batch_first)

        extra = self.bias_k is not None or self.add_zero_attn
        if cache is not None and cache.max_length is not None:
            if causal == "upper_left":
                raise ValueError("causal: with a cache that grows it is 'lower_right', got 'upper_left'")
            causal, is_causal = "lower_right", False
        elif is_causal and causal is None and not extra:
            attn_mask = None
        else:
            is_causal = False
        mask, bias = _masks(attn_mask, key_padding_mask, B, self.num_heads)

        q, k, v = self._projected(query, key, value, itself, memory, batch_first, filled)
        rotary = self.rotary
        if rotary is not None:
            q = rotary(q, offset=S - L if causal == "lower_right" else 0)
            k = k if k is None else rotary(k, offset=held)
        if L == 1 and causal == "lower_right":
            causal = None  # the last query sees every key: the common case of decoding is the plain one
        if cache is not None:
            k, v = (cache.key, cache.value) if filled else cache.append(k, v)  # type: ignore[arg-type]
        if extra:
            k, v = self._with_own(k, v)  # type: ignore[arg-type]
            mask, bias = _shown(mask, bias, L, S, causal, k)
            causal = None

        result = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal,  # type: ignore[arg-type]
            enable_gqa=self.num_kv_heads is not None, bias=bias, causal=causal, window=self.window,
            return_weights=need_weights and ("mean" if average_attn_weights else "each"),
        )  # fmt: skip
        out, weights = result if need_weights else (result, None)
        # The heads of a token lie side by side in memory, so that only a batch that is not first must be copied.
        out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.reshape(B * L, self.embed_dim), self.out_proj.weight, self.out_proj.bias)
        return (out.view(query.shape), weights) if batched else (out, None if weights is None else weights[0])

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        causal: str | None,
        sizes: tuple[int, int, int],
        batch_first: bool,
    ) -> None:
        """The errors of torch.nn.MultiheadAttention, in type."""
        B, L, S = sizes
        if query.shape[2] != self.embed_dim:
            raise AssertionError(f"query: expected embed_dim={self.embed_dim} features, got {query.shape[2]}")
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key, value: expected one shape, got {list(key.shape)}, {list(value.shape)}")
        else:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(f"key, value: expected one length, got {list(key.shape)}, {list(value.shape)}")
            if (key.shape[2], value.shape[2]) != (self.kdim, self.vdim):
                raise AssertionError(
                    f"key, value: expected kdim={self.kdim} and vdim={self.vdim} features, "
                    f"got {key.shape[2]} and {value.shape[2]}"
                )
        if key.shape[0 if batch_first else 1] != B:
            raise RuntimeError(f"key: expected batch {B} as query, got {list(key.shape)}")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal: it says that attn_mask is the causal mask; causal= needs none")
        if causal not in (None, "upper_left", "lower_right"):
            raise ValueError(f"causal: expected 'upper_left', 'lower_right' or None, got {causal!r}")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"{name}: expected bool or a floating dtype, got {mask.dtype}")
        if attn_mask is not None:
            expected = (L, S) if attn_mask.dim() == 2 else (B * self.num_heads, L, S)
            if attn_mask.shape != expected:
                raise RuntimeError(f"attn_mask: expected {list(expected)}, got {list(attn_mask.shape)}")
        if key_padding_mask is not None and key_padding_mask.shape != (B, S):
            raise AssertionError(f"key_padding_mask: expected {[B, S]}, got {list(key_padding_mask.shape)}")

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, itself: bool, memory: bool, batch_first: bool, filled: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Query ``[B, N, L, D]``, key and value ``[B, M, S, D]``: views of as few matrix products as can be."""
        N, D = self.num_heads, self.head_dim
        M = self.num_kv_heads or N
        weight, bias = self.in_proj_weight, self.in_proj_bias

        def heads(x: Tensor, weight: Tensor, bias: Tensor | None, *parts: int) -> list[Tensor]:
            y = F.linear(x, weight, bias).view(*x.shape[:2], sum(parts), D)
            each = (y,) if len(parts) == 1 else y.split_with_sizes(parts, 2)
            return [y.transpose(1, 2) if batch_first else y.permute(1, 2, 0, 3) for y in each]

        if weight is not None and itself and memory and not filled:
            q, k, v = heads(query, weight, bias, N, M, M)
            return q, k, v
        rows = [N * D, M * D, M * D]
        if weight is not None and memory:
            rows = [N * D, 2 * M * D]
        weights = (
            weight.split(rows) if weight is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = bias.split(rows) if bias is not None else (None, None, None)
        (q,) = heads(query, weights[0], biases[0], N)
        if filled:
            return q, None, None
        if len(weights) == 2:
            k, v = heads(key, weights[1], biases[1], M, M)
        else:
            (k,), (v,) = heads(key, weights[1], biases[1], M), heads(value, weights[2], biases[2], M)
        return q, k, v

    def _with_own(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values with the module's own after them: the learned ones, then zeros."""
        B, M, _, D = key.shape
        parts = []
        for given, learned in ((key, self.bias_k), (value, self.bias_v)):
            own = [given]
            if learned is not None:
                own.append(learned.to(given.dtype).view(1, M, 1, D).expand(B, M, 1, D))
            if self.add_zero_attn:
                own.append(given.new_zeros(B, M, 1, D))
            parts.append(torch.cat(own, 2))
        return parts[0], parts[1]

    def _explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        causal: str | None = None,
        cache: KVCache | None = None,
    ) -> Choice:
        hinted = is_causal and cache is None and causal is None
        extra = self.bias_k is not None or self.add_zero_attn
        beyond = (
            need_weights or key_padding_mask is not None or (attn_mask is not None and not hinted) or extra
            or causal is not None or cache is not None or self.window is not None or query.is_nested
        )  # fmt: skip
        head = torch.empty((), dtype=query.dtype, device=query.device).expand(1, self.num_heads, 1, self.head_dim)
        return functional.choose_attention(head, head, beyond)


def _masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int, N: int
) -> tuple[Tensor | None, Tensor | None]:
    """What may be seen, bool, and what is added to the scores, each as small as it can be broadcast from."""
    mask = bias = None
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(B, N, *attn_mask.shape[1:])
        if attn_mask.dtype == torch.bool:
            mask = ~attn_mask
        else:
            bias = attn_mask
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
        if key_padding_mask.dtype == torch.bool:
            mask = ~key_padding_mask if mask is None else mask & ~key_padding_mask
        else:
            bias = key_padding_mask if bias is None else bias + key_padding_mask
    return mask, bias


def _shown(
    mask: Tensor | None, bias: Tensor | None, L: int, S: int, causal: str | None, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The masks, and what is causal as a mask, made wider by keys that every query sees."""
    if causal is not None:
        seen = torch.ones(L, S, dtype=torch.bool, device=key.device).tril(S - L if causal == "lower_right" else 0)
        mask = seen[None, None] if mask is None else mask & seen
    wider = (0, key.shape[2] - S)
    mask = None if mask is None else F.pad(mask, wider, value=True)
    return mask, None if bias is None else F.pad(bias, wider)
