"""``torch.nn.Transformer`` and its parts on fastseq's attention, in training and in evaluation the same.

Constructors, parameters and the mathematics of the blocks are inherited. Masks stay what they are, bool or float,
down to the attention; padded positions are computed as they are in training, and no output is cut.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..implementation import Choice, explain
from .attention import MultiheadAttention
from .cache import KVCache
from .nested import nested, padded
from .tracing import Traced

_Activation = str | Callable[[Tensor], Tensor]


class _Explained(Traced):
    """What layers and stacks share: the explanation, which is that of the (first) self-attention."""

    def _explain(self, *args: Any, **keywords: Any) -> Choice:
        given = inspect.signature(self.forward).bind(*args, **keywords).arguments
        x = next(given[name] for name in ("src", "tgt") if name in given)
        options = {name.removeprefix("src_").removeprefix("tgt_"): value for name, value in given.items()}
        masks = {"attn_mask": options.get("mask"), "key_padding_mask": options.get("key_padding_mask")}
        more = _given(is_causal=options.get("is_causal"), causal=options.get("causal"), cache=options.get("cache"))
        block: Any = self.layers[0] if hasattr(self, "layers") else self  # type: ignore[index]
        return explain(block.self_attn, x, x, x, need_weights=False, **masks, **more)


class TransformerEncoderLayer(_Explained, torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network, a drop-in ``torch.nn.TransformerEncoderLayer``.

    Constructor, parameters and results as there (Vaswani et al. 2017; ``norm_first``: Xiong et al. 2020), in
    training as in evaluation. ``num_kv_heads``, ``window`` and ``rotary``, by keyword, are those of
    :class:`MultiheadAttention`, and so are ``causal`` and ``cache`` of the call.

    Raises:
        As ``torch.nn.TransformerEncoderLayer`` and :class:`MultiheadAttention`.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerEncoderLayer(16, 4, batch_first=True, norm_first=True, rotary=10000.0)
        >>> layer(torch.randn(2, 5, 16), causal="upper_left").shape
        torch.Size([2, 5, 16])
    """

    self_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        window: int | tuple[int, int] | None = None,
        rotary: float | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _adopt(self.self_attn, num_kv_heads, window, rotary)

    def new_cache(self, max_length: int) -> KVCache:
        """A cache for decoding up to this many tokens."""
        return KVCache(max_length)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        causal: str | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if isinstance(src, Proxy):
            return self._leaf(src, src_mask, src_key_padding_mask, is_causal, causal=causal, cache=cache)
        if src.is_nested:
            x, padding = _padded(src, src_mask, src_key_padding_mask)
            return nested(self.forward(x, None, padding, causal=causal), src)
        more = _given(causal=causal, cache=cache)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal, **more)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal, **more))
        return self.norm2(x + self._ff_block(x))  # type: ignore[no-any-return]

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False, **more: Any
    ) -> Tensor:
        x = self.self_attn(
            x, x, x, key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=is_causal, **more
        )[0]
        return self.dropout1(x)  # type: ignore[no-any-return]


class TransformerDecoderLayer(_Explained, torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory and a feed-forward network, a drop-in ``torch.nn.TransformerDecoderLayer``.

    Constructor, parameters and results as there. By keyword: ``num_kv_heads`` (of both attentions), ``window`` and
    ``rotary`` (of the self-attention) as in :class:`MultiheadAttention`; in the call ``causal`` (the
    self-attention's) and ``cache``, the pair that ``new_cache`` makes, for the self-attention and for the memory.

    Raises:
        As ``torch.nn.TransformerDecoderLayer`` and :class:`MultiheadAttention`.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerDecoderLayer(16, 4, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 7, 16), causal="upper_left").shape
        torch.Size([2, 5, 16])
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        window: int | tuple[int, int] | None = None,
        rotary: float | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _adopt(self.self_attn, num_kv_heads, window, rotary)
        _adopt(self.multihead_attn, num_kv_heads)

    def new_cache(self, max_length: int) -> tuple[KVCache, KVCache]:
        """Caches for decoding up to this many tokens: the tokens', and the memory's, which is projected once."""
        return KVCache(max_length), KVCache()

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        causal: str | None = None,
        cache: tuple[KVCache, KVCache] | None = None,
    ) -> Tensor:
        if isinstance(tgt, Proxy):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            hints = (tgt_is_causal, memory_is_causal)
            return self._leaf(tgt, memory, *masks, *hints, causal=causal, cache=cache)
        own, its = cache if cache is not None else (None, None)
        at_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        at_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
        more, its_more = _given(causal=causal, cache=own), _given(cache=its)
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *at_self, **more)
            x = x + self._mha_block(self.norm2(x), memory, *at_memory, **its_more)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *at_self, **more))
        x = self.norm2(x + self._mha_block(x, memory, *at_memory, **its_more))
        return self.norm3(x + self._ff_block(x))  # type: ignore[no-any-return]

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False, **more: Any
    ) -> Tensor:
        x = self.self_attn(
            x, x, x, key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=is_causal, **more
        )[0]
        return self.dropout1(x)  # type: ignore[no-any-return]

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        x = self.multihead_attn(
            x, mem, mem, key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=is_causal, **more
        )[0]
        return self.dropout2(x)  # type: ignore[no-any-return]


class TransformerEncoder(_Explained, torch.nn.TransformerEncoder):
    """A stack of encoder layers, a drop-in ``torch.nn.TransformerEncoder``.

    Constructor and results as there, in training as in evaluation: padding is never taken out and put back as
    zeros, so ``enable_nested_tensor`` and ``mask_check`` are accepted and change nothing. The call takes, by
    keyword, ``causal`` as :class:`TransformerEncoderLayer`, and ``cache``, the list that ``new_cache`` makes.

    With ``is_causal=None`` a mask is compared with the causal one, as torch does, but not while compiling.

    Raises:
        As ``torch.nn.TransformerEncoder`` and :class:`MultiheadAttention`.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerEncoderLayer(16, 4, batch_first=True)
        >>> encoder = fastseq.TransformerEncoder(layer, num_layers=2)
        >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding).shape
        torch.Size([2, 5, 16])
    """

    def new_cache(self, max_length: int) -> list[Any]:
        """What each layer's ``new_cache`` makes."""
        return [layer.new_cache(max_length) for layer in self.layers]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        causal: str | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        if isinstance(src, Proxy):
            return self._leaf(src, mask, src_key_padding_mask, is_causal, causal=causal, cache=cache)
        if src.is_nested:
            x, padding = _padded(src, mask, src_key_padding_mask)
            return nested(self.forward(x, None, padding, causal=causal), src)
        is_causal = _is_causal(mask, is_causal, src, self.layers)
        output = src
        for layer, its in zip(self.layers, _per_layer(cache, self.layers), strict=True):
            output = layer(
                output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask,
                **_given(causal=causal, cache=its),
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(_Explained, torch.nn.TransformerDecoder):
    """A stack of decoder layers, a drop-in ``torch.nn.TransformerDecoder``.

    Constructor and results as there. The call takes, by keyword, ``causal`` (the self-attention's) as
    :class:`TransformerDecoderLayer`, and ``cache``, the list that ``new_cache`` makes. ``tgt_is_causal=None`` is
    treated as in :class:`TransformerEncoder`.

    Raises:
        As ``torch.nn.TransformerDecoder`` and :class:`MultiheadAttention`.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.TransformerDecoderLayer(16, 4, batch_first=True, dropout=0.0)
        >>> decoder = fastseq.TransformerDecoder(layer, num_layers=2)
        >>> tgt, memory, cache = torch.randn(2, 5, 16), torch.randn(2, 7, 16), decoder.new_cache(max_length=5)
        >>> with torch.no_grad():
        ...     steps = [decoder(t, memory, cache=cache) for t in tgt.split(1, dim=1)]
        >>> torch.allclose(torch.cat(steps, dim=1), decoder(tgt, memory, causal="upper_left"), atol=1e-5)
        True
    """

    def new_cache(self, max_length: int) -> list[Any]:
        """What each layer's ``new_cache`` makes."""
        return [layer.new_cache(max_length) for layer in self.layers]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        causal: str | None = None,
        cache: Sequence[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        if isinstance(tgt, Proxy):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            hints = (tgt_is_causal, memory_is_causal)
            return self._leaf(tgt, memory, *masks, *hints, causal=causal, cache=cache)
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers)
        output = tgt
        for layer, its in zip(self.layers, _per_layer(cache, self.layers), strict=True):
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal, **_given(causal=causal, cache=its),
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)


class Transformer(Traced, torch.nn.Transformer):
    """Encoder and decoder, a drop-in ``torch.nn.Transformer`` (Vaswani et al. 2017).

    Constructor, parameters and results as there; encoder and decoder are a :class:`TransformerEncoder` and a
    :class:`TransformerDecoder`, whose calls take more by keyword, unless custom ones are given.

    Raises:
        As ``torch.nn.Transformer`` and :class:`MultiheadAttention`.

    Example:
        >>> import torch, fastseq
        >>> model = fastseq.Transformer(16, 4, 2, 2, 32, batch_first=True)
        >>> model(torch.randn(2, 7, 16), torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        for stack, custom in ((self.encoder, custom_encoder), (self.decoder, custom_decoder)):
            for module in stack.modules() if custom is None else ():
                module.__class__ = _OURS.get(type(module), type(module))

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        paddings = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
        rest = (src_mask, tgt_mask, memory_mask, *paddings, src_is_causal, tgt_is_causal, memory_is_causal)
        if isinstance(src, Proxy):
            return self._leaf(src, tgt, *rest)
        return super().forward(src, tgt, *rest)

    def _explain(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        **keywords: Any,
    ) -> Choice:
        return explain(self.encoder, src, src_mask, src_key_padding_mask, keywords.get("src_is_causal"))


_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
}


def _adopt(attention: torch.nn.Module, *options: Any) -> None:
    """Turn what torch.nn's constructor built into ours; the options are those of ``MultiheadAttention._extend``."""
    attention.__class__ = MultiheadAttention
    attention._extend(*options)  # type: ignore[operator]


def _given(**keywords: Any) -> dict[str, Any]:
    """The keywords that are not None: a layer or block of the user's own knows torch's arguments only."""
    return {name: value for name, value in keywords.items() if value is not None}


def _per_layer(cache: Sequence[Any] | None, layers: Any) -> Sequence[Any]:
    if cache is None:
        return [None] * len(layers)
    if len(cache) != len(layers):
        raise ValueError(f"cache: expected one for each of {len(layers)} layers, got {len(cache)}")
    return cache


def _padded(sequences: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
    if any(mask is not None for mask in masks):
        raise AssertionError("nested tensors: expected no masks besides")
    return padded(sequences)


def _is_causal(mask: Tensor | None, hint: bool | None, x: Tensor, layers: Any) -> bool:
    """Whether the mask is the causal one: the hint, or else, as torch does it, by looking."""
    if hint is not None or mask is None:
        return hint is True
    known = mask.dtype == torch.bool or mask.is_floating_point()
    if torch.compiler.is_compiling() or mask.requires_grad or not known:
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # looking would have to wait for the mask
    T = x.shape[0 if x.dim() == 2 or not layers[0].self_attn.batch_first else 1]
    if mask.shape != (T, T):
        return False
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T, mask.device, mask.dtype)
    return bool((mask == causal).all())
