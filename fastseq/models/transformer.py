"""The Transformer of "Attention is all you need" (Vaswani et al. 2017), and how the paper trained it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nn
from ..nn import KVCache, SinusoidalEmbedding
from .encoder_decoder import EncoderDecoder


@dataclass
class TransformerConfig:
    """The sizes of a Transformer; the defaults are the paper's base model, with the names of torch.nn.Transformer.

    Source and target share one vocabulary and one embedding, unless ``source_vocab_size`` gives the source its own.
    """

    vocab_size: int
    source_vocab_size: int | None = None
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 2


class Transformer(EncoderDecoder):
    """The Transformer (Vaswani et al. 2017): sinusoidal positions, norms after each sublayer, one table of embeddings.

    The table serves source, target and, as in section 3.4 of the paper, the logits; on the way in it is multiplied by
    sqrt(d_model). The layers are a :class:`fastseq.nn.Transformer`, which has, as torch's, one more norm at the end of
    encoder and decoder than the paper. Call, ``generate`` and masks: :class:`EncoderDecoder`.

    Raises:
        AssertionError: a mask's shape is not that of its tokens.

    Example:
        >>> import torch
        >>> from fastseq.models import Transformer, TransformerConfig
        >>> config = TransformerConfig(50, d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2)
        >>> model = Transformer(config).eval()
        >>> ids, labels = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 5))
        >>> model(ids, model.shifted(labels)).shape
        torch.Size([2, 5, 50])
        >>> model.generate(ids, max_new_tokens=4, beams=3).shape[0]
        2
    """

    Config = TransformerConfig
    model_type = "transformer"
    architecture = "Transformer"
    fixed = EncoderDecoder.fixed | {"is_encoder_decoder": True}

    def __init__(self, config: TransformerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        width, factory = config.d_model, {"device": device, "dtype": dtype}
        self.embedding = torch.nn.Embedding(config.vocab_size, width, **factory)
        self.source_embedding: torch.nn.Embedding | None = None
        if config.source_vocab_size is not None:
            self.source_embedding = torch.nn.Embedding(config.source_vocab_size, width, **factory)
        for table in (self.embedding, self.source_embedding):
            if table is not None:
                torch.nn.init.normal_(table.weight, std=width**-0.5)  # of size 1 after the scale, and as logits
        self.positions = SinusoidalEmbedding(width)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.layers = nn.Transformer(
            width, config.nhead, config.num_encoder_layers, config.num_decoder_layers, config.dim_feedforward,
            config.dropout, batch_first=True, **factory,
        )  # fmt: skip

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        table = self.embedding if self.source_embedding is None else self.source_embedding
        x = self._embedded(table, input_ids, 0)
        return self.layers.encoder(x, src_key_padding_mask=_hidden(attention_mask))  # type: ignore[no-any-return]

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Sequence[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        x = self._embedded(self.embedding, decoder_input_ids, cache[0][0].length if cache else 0)
        x = self.layers.decoder(
            x, memory, tgt_key_padding_mask=_hidden(decoder_attention_mask),
            memory_key_padding_mask=_hidden(attention_mask), causal="lower_right", cache=cache,
        )  # fmt: skip
        return F.linear(x, self.embedding.weight)

    def new_cache(self, max_length: int) -> list[tuple[KVCache, KVCache]]:
        return self.layers.decoder.new_cache(max_length)  # type: ignore[no-any-return]

    def _embedded(self, table: torch.nn.Embedding, ids: Tensor, offset: int) -> Tensor:
        x = table(ids) * math.sqrt(self.config.d_model)
        return self.dropout(self.positions(x, offset))  # type: ignore[no-any-return]


def _hidden(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask == 0


def smoothed_loss(logits: Tensor, labels: Tensor, *, pad: int, smoothing: float = 0.1) -> Tensor:
    """The cross entropy with smoothed labels (Szegedy et al. 2016), by which the paper trained; padding is left out.

    Of logits ``[B, T, V]`` and labels ``[B, T]``: a label is believed to ``1 - smoothing``, and what is left is
    spread over the whole vocabulary.

    Example:
        >>> import torch
        >>> from fastseq.models import smoothed_loss
        >>> smoothed_loss(torch.zeros(1, 2, 8), torch.tensor([[5, 0]]), pad=0)
        tensor(2.0794)
    """
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad, label_smoothing=smoothing)


def learning_rate(step: int, d_model: int, warmup: int = 4000) -> float:
    """The paper's learning rate at a step, the first being 1: linear warm-up, then one over its square root.

    Example:
        >>> import torch
        >>> from fastseq.models import learning_rate
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(done + 1, d_model=512))
        >>> f"{learning_rate(4000, d_model=512):.6f}"  # the highest
        '0.000699'
    """
    return float(d_model**-0.5 * min(step**-0.5, step * warmup**-1.5))
