"""T5 (Raffel et al. 2020), text to text: version 1.0 (ReLU, a tied head) and 1.1 (gated GELU, a head of its own)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import bias
from ..nn import KVCache, T5Attention
from .encoder_decoder import EncoderDecoder
from .names import Rule
from .pretrained import activation


@dataclass
class T5Config:
    """The sizes of a T5, by the names of its ``config.json``; the defaults are those of T5-small, version 1.0.

    Version 1.1 has ``feed_forward_proj="gated-gelu"`` and ``tie_word_embeddings=False``. A head that is tied to the
    embeddings takes them times d_model ** -0.5, unless ``scale_decoder_outputs`` says otherwise.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # as num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # as tie_word_embeddings
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings


class T5FeedForward(torch.nn.Module):
    """``wo(f(wi x))``, or gated (Shazeer 2020) ``wo(f(wi_0 x) * wi_1 x)``: ``[B, T, E]`` to the same."""

    wi: torch.nn.Linear
    wi_0: torch.nn.Linear
    wi_1: torch.nn.Linear

    def __init__(self, config: T5Config, **factory: Any) -> None:
        super().__init__()
        *gated, name = config.feed_forward_proj.split("-")
        if gated not in ([], ["gated"]):
            got = config.feed_forward_proj
            raise ValueError(f"feed_forward_proj: expected a function's name or 'gated-' and one, got {got!r}")
        # What T5's code calls gated-gelu is the approximation by tanh.
        self.activation = activation("feed_forward_proj", "gelu_new" if gated and name == "gelu" else name)
        self.gated = bool(gated)
        for each in ("wi_0", "wi_1") if gated else ("wi",):
            self.add_module(each, torch.nn.Linear(config.d_model, config.d_ff, bias=False, **factory))
        self.wo = torch.nn.Linear(config.d_ff, config.d_model, bias=False, **factory)
        self.dropout = torch.nn.Dropout(config.dropout_rate)

    def reset_parameters(self, factor: float = 1.0) -> None:
        for module in self.children():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=factor * module.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        return self.wo(self.dropout(x))  # type: ignore[no-any-return]


class T5Layer(torch.nn.Module):
    """Attention to itself, in a decoder also to the encoder's output, and the feed-forward network; norms first."""

    def __init__(self, config: T5Config, decoder: bool, **factory: Any) -> None:
        super().__init__()

        def norm() -> torch.nn.RMSNorm:
            return torch.nn.RMSNorm(config.d_model, config.layer_norm_epsilon, **factory)

        def attention() -> T5Attention:
            return T5Attention(config.d_model, config.num_heads, config.d_kv, config.dropout_rate, **factory)

        self.self_norm, self.self_attn = norm(), attention()
        self.cross_norm = norm() if decoder else None
        self.cross_attn = attention() if decoder else None
        self.ff_norm, self.ff = norm(), T5FeedForward(config, **factory)
        self.dropout = torch.nn.Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None,
        relative: bias.T5,
        memory: Tensor | None,
        memory_padding: Tensor | None,
        cache: tuple[KVCache, KVCache] | None,
    ) -> Tensor:
        own, its = cache if cache is not None else (None, None)
        causal = self.cross_attn is not None
        y = self.self_attn(self.self_norm(x), bias=relative, key_padding_mask=padding, causal=causal, cache=own)
        x = x + self.dropout(y)
        if self.cross_norm is not None and self.cross_attn is not None:
            y = self.cross_attn(self.cross_norm(x), memory, key_padding_mask=memory_padding, cache=its)
            x = x + self.dropout(y)
        return x + self.dropout(self.ff(self.ff_norm(x)))  # type: ignore[no-any-return]


class T5Stack(torch.nn.Module):
    """The layers of an encoder or decoder and the table of relative positions that they share.

    The call takes embedded tokens ``[B, T, E]`` and their mask ``[B, T]`` (with a cache: of all tokens so far), true
    or 1 for tokens; a decoder also the encoder's output ``[B, S, E]``, its mask, and each layer's caches.
    """

    def __init__(self, config: T5Config, decoder: bool, **factory: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.max_distance = config.relative_attention_max_distance
        buckets, count = config.relative_attention_num_buckets, config.num_layers
        if decoder:
            count = config.num_decoder_layers or 0
        self.relative = torch.nn.Parameter(torch.empty(buckets, config.num_heads, **factory))
        self.layers = torch.nn.ModuleList(T5Layer(config, decoder, **factory) for _ in range(count))
        self.norm = torch.nn.RMSNorm(config.d_model, config.layer_norm_epsilon, **factory)
        self.dropout = torch.nn.Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Sequence[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        relative = bias.T5(self.relative, bidirectional=not self.decoder, max_distance=self.max_distance)
        padding, memory_padding = (None if m is None else m == 0 for m in (mask, memory_mask))
        x = self.dropout(x)
        caches: Sequence[tuple[KVCache, KVCache] | None] = cache or [None] * len(self.layers)
        for layer, its in zip(self.layers, caches, strict=True):
            x = layer(x, padding, relative, memory, memory_padding, its)
        return self.dropout(self.norm(x))  # type: ignore[no-any-return]


def _rules(stack: str, *sublayers: str) -> list[Rule]:
    rules = [
        Rule(f"{stack}.relative", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Rule(f"{stack}.norm", f"{stack}.final_layer_norm"),
    ]
    for number, name in enumerate(sublayers):
        ours, theirs = f"{stack}.layers.{{}}.{name}", f"{stack}.block.{{}}.layer.{number}"
        rules.append(Rule(f"{ours}_norm", f"{theirs}.layer_norm"))
        if name == "ff":
            rules.append(Rule(ours, f"{theirs}.DenseReluDense"))
        else:
            inner = f"{theirs}.{'SelfAttention' if name == 'self' else 'EncDecAttention'}"
            rules.append(Rule(f"{ours}_attn.in_proj_weight", tuple(f"{inner}.{each}.weight" for each in "qkv")))
            rules.append(Rule(f"{ours}_attn.out_proj", f"{inner}.o"))
    return rules


class T5(EncoderDecoder):
    """T5 (Raffel et al. 2020), an encoder and a decoder whose attention knows relative positions only.

    Call, ``generate`` and masks: :class:`EncoderDecoder`. It computes in float32 or bfloat16; the published weights
    overflow float16. A folder of version 1.1 may call its head tied, as transformers 5 writes it; the weights tell.

    Raises:
        ValueError: ``feed_forward_proj`` is not known, or a mask's shape is not that of its tokens.

    Example:
        >>> import torch
        >>> from fastseq.models import T5, T5Config
        >>> config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        >>> model = T5(config).eval()
        >>> ids, labels = torch.randint(2, 50, (2, 7)), torch.randint(2, 50, (2, 5))
        >>> model(ids, model.shifted(labels)).shape
        torch.Size([2, 5, 50])
        >>> model.generate(ids, max_new_tokens=4, beams=3).shape[0]
        2
    """

    Config = T5Config
    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    names = (*_rules("encoder", "self", "ff"), *_rules("decoder", "self", "cross", "ff"))
    tied = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    )
    ignored = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)  # in the oldest files
    fixed = EncoderDecoder.fixed | {"is_encoder_decoder": True}
    unused = frozenset(("classifier_dropout", "dense_act_fn", "is_gated_act", "n_positions"))

    def __init__(self, config: T5Config, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        factory = {"device": device, "dtype": dtype}
        self.shared = torch.nn.Embedding(config.vocab_size, config.d_model, **factory)
        self.encoder = T5Stack(config, decoder=False, **factory)
        self.decoder = T5Stack(config, decoder=True, **factory)
        self.lm_head: torch.nn.Linear | None = None
        if not config.tie_word_embeddings:
            self._untie()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initial weights: normal, by the width that a matrix reads."""
        config, factor = self.config, self.config.initializer_factor
        for module in self.modules():
            if isinstance(module, T5Attention | T5FeedForward):
                module.reset_parameters(factor)
            elif isinstance(module, T5Stack):
                torch.nn.init.normal_(module.relative, std=factor * config.d_model**-0.5)
        for table in (self.shared, self.lm_head):
            if table is not None:
                torch.nn.init.normal_(table.weight, std=factor)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(self.shared(input_ids), attention_mask)  # type: ignore[no-any-return]

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Sequence[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        x = self.decoder(self.shared(decoder_input_ids), decoder_attention_mask, memory, attention_mask, cache)
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        return F.linear(x, (self.shared if self.lm_head is None else self.lm_head).weight)

    def new_cache(self, max_length: int) -> list[tuple[KVCache, KVCache]]:
        return [(KVCache(max_length), KVCache()) for _ in self.decoder.layers]

    def _untie(self) -> None:
        config, like = self.config, self.shared.weight
        self.lm_head = torch.nn.Linear(
            config.d_model, config.vocab_size, bias=False, device=like.device, dtype=like.dtype
        )

    def _take(self, weights: Mapping[str, Tensor], fresh: Sequence[str], unread: Sequence[str]) -> None:
        head, embedding = weights.get("lm_head.weight"), weights.get("shared.weight")
        same = head is None or (embedding is not None and torch.equal(head, embedding))
        if not same and self.lm_head is None and not self.config.scale_decoder_outputs:
            self.config.tie_word_embeddings = False
            self._untie()
        super()._take(weights, fresh, unread)
