"""What models of an encoder and a decoder share: the way through both, and writing against the encoder's output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import KVCache
from .decoding import generate
from .pretrained import Pretrained


class EncoderDecoder(Pretrained):
    """An encoder and a decoder that attends to its output; a subclass says what each does.

    The call takes ``input_ids`` ``[B, S]`` and ``decoder_input_ids`` ``[B, T]``, with masks of the same shapes that
    are true or 1 for tokens and false or 0 for padding, and returns logits ``[B, T, vocab_size]``: at t those of the
    token after ``decoder_input_ids[:, t]``. The configuration has ``pad_token_id``, ``eos_token_id`` and
    ``decoder_start_token_id``.

    Example:
        >>> import torch
        >>> from fastseq.models import EncoderDecoder, Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(50, d_model=16, nhead=2)).eval()
        >>> ids, padded = torch.tensor([[7, 8, 9], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> written = model.generate(ids, padded, max_new_tokens=4)  # the start token, and what follows it
        >>> isinstance(model, EncoderDecoder), written[:, 0]
        (True, tensor([2, 2]))
    """

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The encoder's output ``[B, S, E]``."""
        raise NotImplementedError

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Sequence[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        """Logits of the encoder's output ``[B, S, E]`` and its mask; with a cache, of the tokens that follow its."""
        raise NotImplementedError

    def new_cache(self, max_length: int) -> list[tuple[KVCache, KVCache]]:
        """For each layer of the decoder the cache of the tokens, up to so many, and that of the encoder's output."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        memory = self.encode(input_ids, attention_mask)
        return self.decode(decoder_input_ids, memory, attention_mask, decoder_attention_mask)

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to say the labels ``[B, T]``: them, one later; -100 in them stands for padding."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)], 1)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """What the decoder writes, ``[B, 1 + n]`` with the start token; the options are :func:`generate`'s.

        Raises:
            ValueError: as :func:`generate`.
        """
        config = self.config
        memory, mask, cache = self.encode(input_ids, attention_mask), attention_mask, self.new_cache(max_new_tokens)
        sentence = torch.arange(input_ids.shape[0], device=input_ids.device)

        def step(tokens: Tensor) -> Tensor:
            return self.decode(tokens, memory, mask, cache=cache)[:, -1]

        def reorder(rows: Tensor) -> None:
            nonlocal memory, mask, sentence
            moved = sentence[rows]
            same = moved.shape == sentence.shape and torch.equal(moved, sentence)
            for own, its in cache:
                own.reorder(rows)
                if not same:  # but the beams of one sentence share what was made of it
                    its.reorder(rows)
            if not same:
                memory, sentence = memory[rows], moved
                mask = mask if mask is None else mask[rows]

        start = input_ids.new_full((input_ids.shape[0], 1), config.decoder_start_token_id)
        options = {"end": config.eos_token_id, "pad": config.pad_token_id, **options}
        return generate(step, start, max_new_tokens=max_new_tokens, reorder=reorder, **options)
