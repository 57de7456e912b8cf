"""Recurrent networks from a sequence to a vector and from a vector to a sequence.

Everything is batch first; sequences end where ``lengths`` says, and what lies past an end changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from ..nn import GRU, LSTM, RNN
from .decoding import generate

LAYERS: dict[str, type[RNN] | type[LSTM] | type[GRU]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def expect(name: str, got: object, among: Any) -> None:
    if got not in among:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, among))}, got {got!r}")


def recurrent_layer(cell: str, input_size: int, hidden_size: int, **options: Any) -> RNN | LSTM | GRU:
    expect("cell", cell, LAYERS)
    return LAYERS[cell](input_size, hidden_size, batch_first=True, **options)


def before_end(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """Which steps of x ``[B, T, ...]`` are before their row's end: bool ``[B, T]``; None if all are."""
    if lengths is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]


def joined(state: Any, layer: RNN | LSTM | GRU) -> tuple[Tensor, ...]:
    """Each of the final states as ``[L, B, D*H]``, the D directions of a layer side by side."""
    states = state if isinstance(state, tuple) else (state,)
    return tuple(s.unflatten(0, (layer.num_layers, -1)).transpose(1, 2).flatten(2) for s in states)


def mean(y: Tensor, visible: Tensor | None) -> Tensor:
    """The mean over the visible steps of y ``[B, T, H]``, which is 0 elsewhere; 0 where there is none."""
    if visible is None:
        return y.mean(1)
    return y.sum(1) / visible.sum(1, keepdim=True).clamp(min=1)


def largest(y: Tensor, visible: Tensor | None) -> Tensor:
    """The largest value of each unit over the visible steps of y ``[B, T, H]``; 0 where there is none."""
    if visible is None:
        return y.amax(1)
    largest = y.masked_fill(~visible[..., None], -torch.inf).amax(1)
    return largest.masked_fill(~visible.any(1, keepdim=True), 0.0)


class SequenceToVector(torch.nn.Module):
    """Read a sequence and say one thing about it: a recurrent layer, a summary of its steps, a linear map.

    Args:
        input_size, hidden_size, output_size: I, H and O; with ``bidirectional`` each direction has H units.
        cell: ``"rnn"``, ``"lstm"`` or ``"gru"``.
        summary: of the last layer's steps: ``"last"``, its state at each row's own end (of the backward direction: at
            the row's start); ``"mean"`` or ``"max"`` over the steps before the end.
        options: further keywords of the layer: ``num_layers``, ``bidirectional``, ``dropout``, ``forget_bias``, ...

    The call takes x ``[B, T, I]`` and ``lengths`` ``[B]``, and returns ``[B, O]``.

    Raises:
        ValueError: ``cell`` or ``summary`` is none of the above.

    Example:
        >>> import torch
        >>> from fastseq.models import SequenceToVector
        >>> model = SequenceToVector(12, 48, 9, "gru", summary="max", bidirectional=True)
        >>> model(torch.randn(2, 29, 12), lengths=torch.tensor([29, 7])).shape
        torch.Size([2, 9])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        cell: str = "lstm",
        *,
        summary: str = "last",
        **options: Any,
    ) -> None:
        super().__init__()
        expect("summary", summary, ("last", "mean", "max"))
        self.summary = summary
        self.rnn = recurrent_layer(cell, input_size, hidden_size, **options)
        self.head = torch.nn.Linear(hidden_size * (2 if self.rnn.bidirectional else 1), output_size)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        y, state = self.rnn(x, lengths=lengths)
        if self.summary == "last":
            return self.head(joined(state, self.rnn)[0][-1])
        return self.head((mean if self.summary == "mean" else largest)(y, before_end(lengths, x)))


class VectorToSequence(torch.nn.Module):
    """Unfold a vector into a sequence: it is added to the first input of a recurrent layer, or to every one.

    Without tokens the other inputs are zero; with tokens (Vinyals et al. 2015, Show and Tell) each step reads the one
    before, and the outputs are the logits of the next.

    Args:
        input_size, hidden_size, output_size: I, H, and O: features of a step, or the size of the vocabulary.
        cell: ``"rnn"``, ``"lstm"`` or ``"gru"``.
        every_step: the vector is an input of every step, not of the first only.
        tokens: the steps read tokens.
        options: further keywords of the layer, ``num_layers`` and ``dropout`` for instance.

    The call takes the vector ``[B, I]``, the number of steps T or, with tokens, tokens ``[B, T]`` of which the first is
    the start, and ``lengths`` ``[B]``; it returns ``[B, T, O]``.

    Raises:
        ValueError: ``cell`` is none of the above.
        TypeError: a number of steps where tokens are read, or the other way about.

    Example:
        >>> import torch
        >>> from fastseq.models import VectorToSequence
        >>> VectorToSequence(4, 16, 2, "gru", every_step=True)(torch.randn(3, 4), 10).shape
        torch.Size([3, 10, 2])
        >>> caption = VectorToSequence(4, 16, 30, tokens=True)
        >>> caption.generate(torch.randn(3, 4), start=1, end=2, max_new_tokens=5, beams=2).shape[0]
        3
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        cell: str = "lstm",
        *,
        every_step: bool = False,
        tokens: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.every_step = every_step
        self.enter = torch.nn.Linear(input_size, hidden_size)
        self.embedding = torch.nn.Embedding(output_size, hidden_size) if tokens else None
        self.rnn = recurrent_layer(cell, hidden_size, hidden_size, **options)
        self.head = torch.nn.Linear(hidden_size, output_size)

    def forward(self, vector: Tensor, steps: int | Tensor, lengths: Tensor | None = None) -> Any:
        if isinstance(steps, Tensor) != (self.embedding is not None):
            wanted = "a number, as the model reads no tokens" if self.embedding is None else "tokens [B, T]"
            raise TypeError(f"steps: expected {wanted}, got {type(steps).__name__}")
        return self.head(self._run(vector, steps, None, lengths)[0])

    def _run(self, vector: Tensor, steps: int | Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        """The layer's output ``[B, T, H]`` and state; with a state the steps are not the first."""
        entered = self.enter(vector)[:, None]
        if isinstance(steps, Tensor):
            assert self.embedding is not None
            x = self.embedding(steps)
        else:
            x = entered.new_zeros(len(vector), steps, self.rnn.input_size)
        if self.every_step:
            x = x + entered
        elif state is None:
            x = torch.cat([x[:, :1] + entered, x[:, 1:]], 1)
        return self.rnn(x, state, lengths=lengths)

    @torch.no_grad()
    def generate(self, vector: Tensor, *, start: int, max_new_tokens: int, **options: Any) -> Tensor:
        """Tokens ``[B, n]`` after the token ``start``; the options (``end``, ``beams``, ...) are those of `generate`.

        Raises:
            ValueError: as :func:`fastseq.models.generate`; the model reads no tokens.
        """
        if self.embedding is None:
            raise ValueError("tokens: expected a model that reads them, got tokens=False")
        state: Any = None

        def step(tokens: Tensor) -> Any:
            nonlocal state
            y, state = self._run(vector, tokens, state)
            return self.head(y[:, -1])

        def reorder(rows: Tensor) -> None:
            nonlocal state, vector
            vector = vector[rows]
            state = tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]

        prompt = torch.full((len(vector), 1), start, device=vector.device)
        return generate(step, prompt, reorder=reorder, max_new_tokens=max_new_tokens, **options)[:, 1:]
