"""GPT-2 (Radford et al. 2019): a Transformer that reads from left to right and guesses each next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import KVCache, TransformerEncoder, TransformerEncoderLayer
from . import decoding
from .names import Rule, under
from .pretrained import Pretrained, activation


@dataclass
class GPT2Config:
    """What GPT-2's ``config.json`` says, by its names; the defaults are those of the smallest GPT-2.

    Example:
        >>> from fastseq.models import GPT2Config
        >>> GPT2Config(n_layer=24, n_embd=1024, n_head=16).n_positions
        1024
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None


class _GPT2(Pretrained):
    """What both of GPT-2's models state."""

    Config = GPT2Config
    model_type = "gpt2"
    prefix = "transformer."
    # In old files: the causal mask, and what it used to write into the scores.
    ignored = tuple(
        f"{inside}h.{{}}.attn.{name}" for inside in ("", "transformer.") for name in ("bias", "masked_bias")
    )
    fixed: ClassVar = {
        **Pretrained.fixed,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    # The scores in float32 under autocast, which ours always are; the sizes of other heads; n_positions' old name.
    unused = frozenset(
        ("n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_last_dropout",
         "summary_proj_to_labels", "summary_type", "summary_use_proj")
    )  # fmt: skip


class GPT2Model(_GPT2):
    """GPT-2 without the head, as transformers' ``GPT2Model``: the same mathematics and files.

    The call takes ``input_ids`` int64 ``[B, T]`` and returns the last states ``[B, T, n_embd]``. Besides:

    - ``attention_mask`` ``[B, T]``: 0 or False for padding; with a cache ``[B, K]``, for all K tokens so far.
    - ``position_ids`` ``[B, T]``: 0 to T-1 if None, with a cache from the number of tokens in it on. Texts that are
      padded on the left want the position counted without the padding.
    - ``cache``: what :meth:`new_cache` made, which takes the tokens in; under ``torch.no_grad()``.

    Raises:
        ValueError: more tokens than ``n_positions`` or than the cache holds, or an activation that is not known.

    Example:
        >>> import torch
        >>> from fastseq.models import GPT2Config, GPT2Model
        >>> gpt = GPT2Model(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2)).eval()
        >>> tokens, cache = torch.randint(100, (2, 5)), gpt.new_cache(max_length=5)
        >>> with torch.no_grad():
        ...     steps = [gpt(token, cache=cache) for token in tokens.split(1, dim=1)]
        >>> torch.allclose(torch.cat(steps, dim=1), gpt(tokens), atol=1e-5)
        True
    """

    architecture = "GPT2Model"
    names = (
        Rule("word", "wte"),
        Rule("position", "wpe"),
        Rule("encoder.layers.{}.norm1", "h.{}.ln_1"),
        Rule("encoder.layers.{}.self_attn.in_proj_weight", "h.{}.attn.c_attn.weight", transposed=True),
        Rule("encoder.layers.{}.self_attn.in_proj_bias", "h.{}.attn.c_attn.bias"),
        Rule("encoder.layers.{}.self_attn.out_proj", "h.{}.attn.c_proj", transposed=True),
        Rule("encoder.layers.{}.norm2", "h.{}.ln_2"),
        Rule("encoder.layers.{}.linear1", "h.{}.mlp.c_fc", transposed=True),
        Rule("encoder.layers.{}.linear2", "h.{}.mlp.c_proj", transposed=True),
        Rule("encoder.norm", "ln_f"),
    )

    def __init__(self, config: GPT2Config, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        E, kind = config.n_embd, {"device": device, "dtype": dtype}
        self.word = torch.nn.Embedding(config.vocab_size, E, **kind)
        self.position = torch.nn.Embedding(config.n_positions, E, **kind)
        self.dropout = torch.nn.Dropout(config.embd_pdrop)
        layer = TransformerEncoderLayer(
            E, config.n_head, config.n_inner or 4 * E, config.resid_pdrop,
            activation("activation_function", config.activation_function), config.layer_norm_epsilon,
            batch_first=True, norm_first=True, **kind,
        )  # fmt: skip
        layer.self_attn.dropout = config.attn_pdrop
        layer.dropout.p = 0.0  # GPT-2 has none within the feed-forward network
        norm = torch.nn.LayerNorm(E, config.layer_norm_epsilon, **kind)
        self.encoder = TransformerEncoder(layer, config.n_layer, norm, enable_nested_tensor=False)
        self._initialise(config.initializer_range)
        # What is added to the states is the smaller, the more there are to add to them (section 2.3 of the paper).
        std = config.initializer_range / math.sqrt(2 * config.n_layer)
        for module in self.encoder.layers:
            torch.nn.init.normal_(module.self_attn.out_proj.weight, std=std)
            torch.nn.init.normal_(module.linear2.weight, std=std)

    def new_cache(self, max_length: int) -> list[KVCache]:
        """Caches of all layers for up to this many tokens."""
        return self.encoder.new_cache(max_length)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        held = 0 if cache is None else cache[0].length
        end, longest = held + input_ids.shape[1], self.config.n_positions
        if position_ids is None and end > longest:
            raise ValueError(f"input_ids: expected at most n_positions={longest} tokens, got {end}")
        place = self.position.weight[held:end] if position_ids is None else self.position(position_ids)
        padding = None if attention_mask is None else attention_mask == 0
        x = self.dropout(self.word(input_ids) + place)
        causal = "upper_left" if cache is None else "lower_right"
        return self.encoder(x, src_key_padding_mask=padding, causal=causal, cache=cache)  # type: ignore[no-any-return]


class GPT2LMHeadModel(_GPT2):
    """GPT-2 that guesses the next token; the tokens' embeddings are the weight of the last layer as well.

    The call takes what :class:`GPT2Model` takes and returns logits ``[B, T, vocab_size]``, at each token those of the
    next.

    Raises:
        ValueError: as :class:`GPT2Model`.

    Example:
        >>> import torch
        >>> from fastseq.models import GPT2Config, GPT2LMHeadModel
        >>> gpt = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2)).eval()
        >>> gpt(torch.randint(100, (2, 5))).shape
        torch.Size([2, 5, 100])
        >>> gpt.generate(torch.randint(100, (2, 5)), max_new_tokens=3, temperature=0.8, top_p=0.9).shape
        torch.Size([2, 8])
    """

    architecture = "GPT2LMHeadModel"
    names = under("transformer.", GPT2Model.names)
    tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config, device, dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        return self._logits(self.transformer(input_ids, attention_mask, position_ids, cache))

    def _logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.transformer.word.weight)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue the texts ``[B, t]``, which may be padded on the left, with a cache of keys and values.

        Args:
            input_ids: int64 ``[B, t]``.
            max_new_tokens: at least 1.
            attention_mask: ``[B, t]``, 0 or False for padding; positions are counted without it.
            options: those of :func:`fastseq.models.generate`: ``end``, ``temperature``, ``top_p``, ``beams`` and more.

        Returns:
            int64 ``[B, t + n]``, the texts with what follows them.

        Raises:
            ValueError: padding that is not on the left, more tokens than ``n_positions``, or a wrong option.
        """
        most = self.config.n_positions - input_ids.shape[1] + 1  # the last is not read again
        if max_new_tokens > most:
            raise ValueError(f"max_new_tokens: expected at most {most} with this n_positions, got {max_new_tokens}")
        cache = self.transformer.new_cache(input_ids.shape[1] + max_new_tokens)
        shown = None
        if attention_mask is not None:
            shown = attention_mask != 0
            if not shown[:, -1].all():
                raise ValueError("attention_mask: expected padding on the left, got some on the right")

        def step(tokens: Tensor) -> Tensor:
            nonlocal shown
            positions = None
            if shown is not None:
                if cache[0].length:
                    shown = F.pad(shown, (0, 1), value=True)
                positions = (shown.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            states = self.transformer(tokens, shown, positions, cache)
            return self._logits(states[:, -1])

        def reorder(rows: Tensor) -> None:
            nonlocal shown
            for each in cache:
                each.reorder(rows)
            if shown is not None:
                shown = shown[rows]

        return decoding.generate(step, input_ids, max_new_tokens=max_new_tokens, reorder=reorder, **options)
