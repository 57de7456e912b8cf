"""From a sequence to a sequence: one recurrent layer reads, another writes, with attention between them or without.

Everything is batch first; sequences end where ``lengths`` says, and what lies past an end changes nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from .decoding import generate
from .pretrained import Pretrained
from .recurrent import LAYERS, before_end, expect, joined, mean, recurrent_layer


class AdditiveAttention(torch.nn.Module):
    """Attention by a small network, ``v . tanh(U query + W key)`` (Bahdanau et al. 2015).

    ``keys(memory)`` makes the keys ``[B, S, H]`` once; the call takes query ``[B, Q, H]``, keys, memory ``[B, S, H]``
    and what is visible of it (bool ``[B, S]`` or None), and returns ``[B, Q, H]``; 0 where nothing is visible.

    Example:
        >>> import torch
        >>> from fastseq.models.seq2seq import AdditiveAttention
        >>> attention, memory = AdditiveAttention(8), torch.randn(2, 5, 8)
        >>> attention(torch.randn(2, 3, 8), attention.keys(memory), memory, None).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, hidden_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = torch.nn.Linear(hidden_size, hidden_size, **made)
        self.keys = torch.nn.Linear(hidden_size, hidden_size, bias=False, **made)
        self.score = torch.nn.Linear(hidden_size, 1, bias=False, **made)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, visible: Tensor | None) -> Any:
        scores = self.score((self.query(query)[:, :, None] + keys[:, None]).tanh()).squeeze(-1)
        if visible is None:
            return scores.softmax(-1) @ memory
        hidden = ~visible[:, None]
        # Hidden scores are the smallest number rather than -inf: where all are hidden, -inf would make NaN.
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(hidden, 0.0) @ memory


class DotAttention(torch.nn.Module):
    """Attention by products, ``query . key`` or, ``general``, ``query . W key`` (Luong et al. 2015).

    Called as :class:`AdditiveAttention` is.

    Example:
        >>> import torch
        >>> from fastseq.models.seq2seq import DotAttention
        >>> attention, memory = DotAttention(8, general=True), torch.randn(2, 5, 8)
        >>> attention(torch.randn(2, 3, 8), attention.keys(memory), memory, None).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, hidden_size: int, general: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        linear = torch.nn.Linear(hidden_size, hidden_size, bias=False, **made) if general else None
        self.keys = torch.nn.Identity() if linear is None else linear

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, visible: Tensor | None) -> Any:
        q, k, v = query[:, None], keys[:, None], memory[:, None]  # one head
        mask = None if visible is None else visible[:, None, None]
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=1.0)[:, 0]


@dataclass(frozen=True)
class Seq2SeqConfig:
    """What a :class:`Seq2Seq` is made of.

    Attributes:
        source_size, target_size: of the vocabularies.
        embedding_size, hidden_size: E and H; of a bidirectional encoder each direction has H/2 units.
        cell: ``"rnn"``, ``"lstm"`` or ``"gru"``, in encoder and decoder.
        context: what the decoder is told: the encoder's ``"last"`` states; a ``"transform"`` of them, tanh of a linear
            map; or ``"all"`` states of the last layer: tanh of a linear map of their mean.
        given: the context is the decoder's first ``"state"``, or an ``"input"`` of every step, or ``"both"``.
        attention: None; ``"bahdanau"``: additive, from the state before a step, an input of that step; ``"dot"`` or
            ``"general"`` (Luong et al.): from the state after the step, beside it where the output is made.

    Raises:
        ValueError: a field is none of the above; ``hidden_size`` is odd and ``bidirectional``.

    Example:
        >>> from fastseq.models import Seq2SeqConfig
        >>> Seq2SeqConfig(30, 40, cell="gru", context="all", given="input").attention is None
        True
    """

    source_size: int
    target_size: int
    embedding_size: int = 256
    hidden_size: int = 256
    cell: str = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    context: str = "last"
    given: str = "state"
    attention: str | None = None

    def __post_init__(self) -> None:
        expect("cell", self.cell, LAYERS)
        expect("context", self.context, ("last", "transform", "all"))
        expect("given", self.given, ("state", "input", "both"))
        expect("attention", self.attention, (None, "bahdanau", "dot", "general"))
        if self.bidirectional and self.hidden_size % 2:
            raise ValueError(f"hidden_size: expected an even number for two directions, got {self.hidden_size}")


class Encoded(NamedTuple):
    """What a decoder knows: the encoder's output, and its own states, which move on with every step."""

    memory: Tensor | None  # [B, S, H], for attention, as are
    keys: Tensor | None  # [B, S, H]
    visible: Tensor | None  # bool [B, S]
    context: Tensor | None  # [B, H], where it is an input
    states: tuple[Tensor, ...]  # [L, B, H]; h and, of an LSTM, c

    def rows(self, rows: Tensor) -> "Encoded":
        """The same for these rows of the batch."""
        memory, keys, visible, context = (None if t is None else t[rows] for t in self[:4])
        return Encoded(memory, keys, visible, context, tuple(s[:, rows] for s in self.states))


class Seq2Seq(Pretrained):
    """Read one sequence of tokens and write another (Cho et al. 2014; Sutskever et al. 2014), with attention or not.

    The call takes source ``[B, S]``, target ``[B, T]`` (the start token first), ``lengths`` of the source and
    ``target_lengths``, both ``[B]`` or None, and returns logits ``[B, T, V]``, at t those of the token after
    ``target[:, t]``; past a row's end they mean nothing.

    Raises:
        ValueError: of the configuration; the message names the field.

    Example:
        >>> import torch
        >>> from fastseq.models import Seq2Seq, Seq2SeqConfig
        >>> config = Seq2SeqConfig(30, 40, 16, 32, bidirectional=True, context="transform", attention="bahdanau")
        >>> model, words, ends = Seq2Seq(config), torch.randint(30, (2, 7)), torch.tensor([7, 4])
        >>> model(words, torch.randint(40, (2, 5)), lengths=ends).shape
        torch.Size([2, 5, 40])
        >>> written = model.generate(words, lengths=ends, start=1, end=2, max_new_tokens=9, beams=3)
    """

    Config = Seq2SeqConfig
    model_type = "fastseq_seq2seq"
    architecture = "Seq2Seq"

    def __init__(self, config: Seq2SeqConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config, device, dtype)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        E, H, L = config.embedding_size, config.hidden_size, config.num_layers
        layers = {"num_layers": L, "dropout": config.dropout if L > 1 else 0.0, **made}
        self.dropout = torch.nn.Dropout(config.dropout)
        self.source_embedding = torch.nn.Embedding(config.source_size, E, **made)
        half = H // 2 if config.bidirectional else H
        self.encoder = recurrent_layer(config.cell, E, half, bidirectional=config.bidirectional, **layers)
        # As an input the decoder is told h of the last layer, as its state every state of every layer.
        all_states = config.given != "input"
        maps = 0 if config.context == "last" else 2 if config.cell == "lstm" and all_states else 1
        width = L * H if config.context == "all" and all_states else H
        self.transform = torch.nn.ModuleList(torch.nn.Linear(H, width, **made) for _ in range(maps))
        self.target_embedding = torch.nn.Embedding(config.target_size, E, **made)
        told = (config.given != "state") + (config.attention == "bahdanau")
        self.decoder = recurrent_layer(config.cell, E + told * H, H, **layers)
        if config.attention is not None:
            general = config.attention == "general"
            additive = config.attention == "bahdanau"
            self.attention = AdditiveAttention(H, **made) if additive else DotAttention(H, general, **made)
            self.combine = torch.nn.Linear(2 * H, H, **made)
        self.head = torch.nn.Linear(H, config.target_size, **made)

    def forward(
        self, source: Tensor, target: Tensor, lengths: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Tensor:
        return self.decode(target, self.encode(source, lengths), target_lengths)[0]

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Encoded:
        """What the decoder knows of source ``[B, S]`` before its first step."""
        config = self.config
        memory, state = self.encoder(self.dropout(self.source_embedding(source)), lengths=lengths)
        states, visible = joined(state, self.encoder), before_end(lengths, source)
        told = states
        if config.context == "transform":
            told = tuple(change(s).tanh() for change, s in zip(self.transform, states, strict=False))
        elif config.context == "all":
            made = (change(mean(memory, visible)).tanh() for change in self.transform)
            told = tuple(m.unflatten(1, (-1, config.hidden_size)).transpose(0, 1) for m in made)
        context = None if config.given == "state" else told[0][-1]
        states = tuple(torch.zeros_like(s) for s in states) if config.given == "input" else told
        if config.attention is None:
            return Encoded(None, None, None, context, states)
        return Encoded(memory, self.attention.keys(memory), visible, context, states)

    def decode(self, target: Tensor, encoded: Encoded, lengths: Tensor | None = None) -> tuple[Tensor, Encoded]:
        """The logits ``[B, T, V]`` after each token of target ``[B, T]``, and what is known after the last."""
        x = self.dropout(self.target_embedding(target))
        if encoded.context is not None:
            x = torch.cat([x, encoded.context[:, None].expand(-1, x.shape[1], -1)], -1)
        if self.config.attention == "bahdanau":
            y, states = self._attending_first(x, encoded, lengths)
        else:
            y, states = self._write(x, encoded.states, lengths)
            if self.config.attention is not None:
                y = torch.cat([y, self._attend(y, encoded)], -1)
        if self.config.attention is not None:
            y = self.combine(y).tanh()
        return self.head(self.dropout(y)), encoded._replace(states=states)

    def _attending_first(self, x: Tensor, encoded: Encoded, lengths: Tensor | None) -> Any:
        """What is written ``[B, T, H]`` beside what was seen before it, and the states: one step at a time."""
        steps, states = [], encoded.states
        for t in range(x.shape[1]):
            seen = self._attend(states[0][-1][:, None], encoded)
            ends = None if lengths is None else (lengths - t).clamp(0, 1)
            y, states = self._write(torch.cat([x[:, t : t + 1], seen], -1), states, ends)
            steps.append(torch.cat([y, seen], -1))
        return torch.cat(steps, 1), states

    def _attend(self, query: Tensor, encoded: Encoded) -> Any:
        return self.attention(query, encoded.keys, encoded.memory, encoded.visible)

    def _write(self, x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None) -> Any:
        y, state = self.decoder(x, states if len(states) > 1 else states[0], lengths=lengths)
        return y, state if isinstance(state, tuple) else (state,)

    @torch.no_grad()
    def generate(
        self, source: Tensor, lengths: Tensor | None = None, *, start: int, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Tokens ``[B, n]`` after the token ``start``; the options (``end``, ``beams``, ...) are those of `generate`.

        Raises:
            ValueError: as :func:`fastseq.models.generate`.
        """
        encoded = self.encode(source, lengths)

        def step(tokens: Tensor) -> Tensor:
            nonlocal encoded
            logits, encoded = self.decode(tokens, encoded)
            return logits[:, -1]

        def reorder(rows: Tensor) -> None:
            nonlocal encoded
            encoded = encoded.rows(rows)

        prompt = torch.full((len(source), 1), start, device=source.device)
        return generate(step, prompt, reorder=reorder, max_new_tokens=max_new_tokens, **options)[:, 1:]
