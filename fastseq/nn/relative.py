"""Attention that goes by how far a key stands from its query: Transformer-XL's, the Conformer's, XLNet's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..bias import Bias, Order, Segments, TransformerXL


class RelativeMultiheadAttention(torch.nn.Module):
    """Self-attention by relative positions (Dai et al. 2019, Transformer-XL), with a memory of earlier tokens.

    The score of query i and key j is ``((q_i + u) . k_j + (q_i + w) . r_(i-j)) / sqrt(D)``: r is made of a vector that
    stands for the distance, by a projection of its own; u and w, one vector per head each, are what every query asks
    of a key and of a distance. No matrix of positions is ever made: memory grows with the lengths.

    The Conformer (Gulati et al. 2020) is this with a table of both directions; in its published code u is
    ``pos_bias_u``, w is ``pos_bias_v``, ``r_proj`` is ``linear_pos``, and ``in_proj`` is ``linear_q``, ``linear_k``
    and ``linear_v`` below each other. In Transformer-XL's, u is ``r_w_bias``, w ``r_r_bias``, ``in_proj`` ``qkv_net``,
    ``r_proj`` ``r_net`` and ``out_proj`` ``o_net``.

    Args:
        embed_dim: E, the width of tokens and of positions.
        num_heads: N.
        dropout: of the attention weights, in training.
        bias: whether ``in_proj`` and ``out_proj`` have one; the Conformer's do.
        head_dim: D, the width of a head; None for E / N.
        device, dtype: of ``in_proj_weight`` ``[3 * N * D, E]`` (queries, keys, values), ``r_proj``, ``out_proj``, and
            of u and w ``[N, D]``.

    The call takes x ``[B, T, E]``; positions ``[L, E]``, a row per distance, the farthest past first and each one
    nearer than the one before (a :class:`SinusoidalEmbedding` ``at`` descending numbers, say); and memory
    ``[B, M, E]``, tokens before x that x may see, or None. A distance beyond either end of positions takes the end's
    row, so that a short table clamps distances. It returns ``[B, T, E]`` and the weights ``[B, N, T, M + T]``, or
    None. By keyword:

    - ``causal``: whether a token sees none after itself.
    - ``zero``: the row of distance 0; None for the last one if causal, else for the middle one.
    - ``window``: as in :func:`fastseq.functional.scaled_dot_product_attention`, counted from the token itself.
    - ``key_padding_mask``: bool ``[B, M + T]``, true for the keys to ignore.
    - ``attn_mask``: bool ``[T, M + T]`` or ``[B, T, M + T]``, true for the keys that a query may not see.
    - ``need_weights``: whether the weights are returned.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.RelativeMultiheadAttention(16, num_heads=4)
        >>> distance = fastseq.SinusoidalEmbedding(16, interleaved=False)
        >>> x = torch.randn(2, 6, 16)
        >>> whole, _ = attention(x, distance.at(torch.arange(5, -1, -1)), causal=True)
        >>> last, _ = attention(x[:, 4:], distance.at(torch.arange(5, -1, -1)), x[:, :4], causal=True)
        >>> torch.allclose(whole[:, 4:], last, atol=1e-6)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = False,
        head_dim: int | None = None,
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * head_dim
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * inner, embed_dim, **factory))
        self.in_proj_bias = torch.nn.Parameter(torch.empty(3 * inner, **factory)) if bias else None
        self.r_proj = torch.nn.Linear(embed_dim, inner, bias=False, **factory)
        self.out_proj = torch.nn.Linear(inner, embed_dim, bias=bias, **factory)
        self.u = torch.nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        self.w = torch.nn.Parameter(torch.empty(num_heads, head_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.MultiheadAttention``; u and w are zero."""
        torch.nn.init.xavier_uniform_(self.in_proj_weight)
        for linear in (self.r_proj, self.out_proj):
            linear.reset_parameters()
        for vector in (self.in_proj_bias, self.out_proj.bias, self.u, self.w):
            if vector is not None:
                torch.nn.init.zeros_(vector)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor | None = None,
        *,
        causal: bool = False,
        zero: int | None = None,
        window: int | tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._projected(x, memory)
        r = self._distances(positions)
        result = functional.scaled_dot_product_attention(
            q, k, v, self._visible(k, key_padding_mask, attn_mask), self.dropout if self.training else 0.0,
            bias=TransformerXL(r, self.u, self.w, zero=_zero(zero, r, causal)),
            causal="lower_right" if causal else None, window=window, return_weights=need_weights,
        )  # fmt: skip
        out, weights = result if need_weights else (result, None)
        return self._joined(out), weights

    def _projected(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, N, T, D]``; key and value ``[B, N, M + T, D]``."""
        for name, t in (("x", x), ("memory", memory)):
            if t is not None and (t.dim() != 3 or t.shape[0] != x.shape[0] or t.shape[2] != self.embed_dim):
                raise ValueError(f"{name}: expected [B, T, {self.embed_dim}] of one batch, got {list(t.shape)}")
        context = x if memory is None else torch.cat([memory, x], 1)
        inner = self.num_heads * self.head_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[inner:]
        both = F.linear(context, self.in_proj_weight[inner:], bias)
        k, v = both.unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        return self._queries(x), k, v

    def _queries(self, x: Tensor) -> Tensor:
        inner = self.num_heads * self.head_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[:inner]
        q = F.linear(x, self.in_proj_weight[:inner], bias)
        return q.view(*q.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _distances(self, positions: Tensor) -> Tensor:
        """Keys of the distances ``[L, N, D]``."""
        if positions.dim() != 2 or positions.shape[1] != self.embed_dim:
            raise ValueError(f"positions: expected [L, {self.embed_dim}], got {list(positions.shape)}")
        return self.r_proj(positions).unflatten(1, (self.num_heads, self.head_dim))  # type: ignore[no-any-return]

    def _visible(self, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What may be seen, as small as it can be broadcast to ``[B, N, T, M + T]`` from."""
        B, _, K, _ = key.shape
        visible = None
        if key_padding_mask is not None:
            if key_padding_mask.shape != (B, K) or key_padding_mask.dtype != torch.bool:
                got = f"{key_padding_mask.dtype} {list(key_padding_mask.shape)}"
                raise ValueError(f"key_padding_mask: expected torch.bool {[B, K]}, got {got}")
            visible = ~key_padding_mask[:, None, None]
        if attn_mask is not None:
            if attn_mask.dtype != torch.bool or attn_mask.dim() not in (2, 3) or attn_mask.shape[-1] != K:
                got = f"{attn_mask.dtype} {list(attn_mask.shape)}"
                raise ValueError(f"attn_mask: expected torch.bool [T, {K}] or [B, T, {K}], got {got}")
            seen = ~(attn_mask if attn_mask.dim() == 2 else attn_mask[:, None])
            visible = seen if visible is None else visible & seen
        return visible

    def _joined(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout:g}"


class XLNetAttention(RelativeMultiheadAttention):
    """XLNet's attention (Yang et al. 2019): Transformer-XL's, by segments as well, of two streams in a given order.

    Tokens have places in an order of prediction that is not the order in the text. The content stream h holds what
    tokens are: there a token sees itself and those at its own and earlier places. The query stream g holds guesses:
    a guess sees the content at earlier places and not its own token. Both streams ask the same keys. The score has one
    more term, ``(q_i + s) . e / sqrt(D)``, e being ``segment_embed[0]`` where query and key are of one segment and
    ``segment_embed[1]`` where they are not. The order is told by numbers, not by a mask.

    Parameters are those of :class:`RelativeMultiheadAttention` without biases, s ``[N, D]`` and ``segment_embed``
    ``[2, N, D]``. The call takes h ``[B, T, E]``, positions and memory as there, and by keyword:

    - ``g``: the query stream, ``[B, T, E]``, or ``[B, P, E]`` with ``targets``; None for no such stream.
    - ``targets``: the places in the text of the guesses, int64 ``[B, P]``, or a matrix ``[B, P, T]`` that is 1 there.
    - ``order``: int ``[B, T]``, the places in the order of prediction; memory is before all. None: every token sees
      every token, a guess its own too.
    - ``segments``: a number for each query ``[B, T]`` and for each key ``[B, M + T]``.
    - ``attn_mask``: as there; the content stream sees itself whatever it says.
    - ``causal``, ``zero``, ``window``, ``key_padding_mask``: as there.

    It returns both streams, ``[B, T, E]`` and the like of g, or None.

    Raises:
        ValueError: shapes do not fit together.

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.XLNetAttention(16, num_heads=4)
        >>> distance = fastseq.SinusoidalEmbedding(16, interleaved=False).at(torch.arange(4, -5, -1))
        >>> h, g = torch.randn(2, 2, 5, 16)
        >>> h, g = attention(h, distance, g=g, order=torch.tensor([[3, 0, 4, 1, 2]] * 2))
        >>> bool(g[:, 1].any()), bool(g[:, 3].any())  # what comes first is guessed from nothing
        (False, True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        head_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, False, head_dim, device, dtype)
        shape = self.u.shape
        self.s = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.segment_embed = torch.nn.Parameter(torch.empty(2, *shape, device=device, dtype=dtype))
        torch.nn.init.normal_(self.segment_embed, std=0.02)

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        positions: Tensor,
        memory: Tensor | None = None,
        *,
        g: Tensor | None = None,
        targets: Tensor | None = None,
        order: Tensor | None = None,
        segments: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        zero: int | None = None,
        window: int | tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._projected(h, memory)
        r = self._distances(positions)
        B, N, T, K = q.shape[0], self.num_heads, q.shape[2], k.shape[2]
        shape = [B, T if targets is None else targets.shape[1], self.embed_dim]
        if g is not None and list(g.shape) != shape:
            raise ValueError(f"g: expected {shape}, got {list(g.shape)}")
        if order is not None and order.shape != (B, T):
            raise ValueError(f"order: expected [{B}, {T}], got {list(order.shape)}")
        ranks = None if order is None else F.pad(order, (K - T, 0), value=torch.iinfo(torch.int32).min)

        def attend(q: Tensor, visible: Tensor | None, rank: Tensor | None) -> Tensor:
            bias: Bias = TransformerXL(r, self.u, self.w, zero=_zero(zero, r, causal))
            if segments is not None:
                bias = bias + Segments(self.s, self.segment_embed, *segments)
            if rank is not None and ranks is not None:
                bias = bias + Order(rank, ranks)
            out: Tensor = functional.scaled_dot_product_attention(
                q, k, v, visible, self.dropout if self.training else 0.0, enable_gqa=True, bias=bias,
                causal="lower_right" if causal else None, window=window,
            )  # fmt: skip
            return out

        orders = [None, None] if order is None else [order[:, None], order[:, None] - 1]
        guesses = None if g is None else _spread(self._queries(g), targets, T)
        if attn_mask is not None:
            own = torch.eye(T, dtype=torch.bool, device=h.device)
            of_content = attn_mask & ~F.pad(own, (K - T, 0))
            outs = [attend(q, self._visible(k, key_padding_mask, of_content), orders[0])]
            if guesses is not None:
                outs.append(attend(guesses, self._visible(k, key_padding_mask, attn_mask), orders[1]))
        else:
            # Two query heads for each key head: what they read of the keys is read once.
            queries = q if guesses is None else torch.stack([q, guesses], 2).flatten(1, 2)
            streams = queries.shape[1] // N
            rank = None if order is None else torch.cat(orders[:streams], 1).repeat(1, N, 1)  # type: ignore[arg-type]
            out = attend(queries, self._visible(k, key_padding_mask, None), rank)
            outs = list(out.unflatten(1, (N, streams)).unbind(2))
        return self._joined(outs[0]), self._joined(_collected(outs[1], targets)) if guesses is not None else None


def _zero(zero: int | None, r: Tensor, causal: bool) -> int:
    if zero is not None:
        return zero
    return r.shape[0] - 1 if causal else r.shape[0] // 2


def _spread(x: Tensor, targets: Tensor | None, T: int) -> Tensor:
    """What stands for targets, ``[B, N, P, D]``, at their places in the text ``[B, N, T, D]``; elsewhere zeros."""
    if targets is None:
        return x
    if targets.dim() == 3:
        return torch.einsum("bpt,bnpd->bntd", targets.to(x.dtype), x)
    return x.new_zeros(*x.shape[:2], T, x.shape[3]).scatter(2, _places(targets, x), x)


def _collected(x: Tensor, targets: Tensor | None) -> Tensor:
    """What stands at the places of targets: the inverse of ``_spread``."""
    if targets is None:
        return x
    if targets.dim() == 3:
        return torch.einsum("bpt,bntd->bnpd", targets.to(x.dtype), x)
    return x.gather(2, _places(targets, x))


def _places(targets: Tensor, x: Tensor) -> Tensor:
    return targets[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
