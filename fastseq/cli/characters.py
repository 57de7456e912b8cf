"""The character language model of `fastseq compare`: its text, its modules, its training, its samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.cli.show import Mistake

__all__ = ["LAYERS", "RATES", "Characters", "Corpus", "Sizes", "Training", "sample"]

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
RATES = {"lstm": 0.5, "gru": 0.5, "rnn": 0.2}  # learning rates
SEED = 0
PROMPT = "The "
SAMPLE_LENGTH = 320
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Sizes:
    """The model and how it is trained."""

    embedding: int = 64
    hidden: int = 256
    time: int = 64
    batch: int = 32
    momentum: float = 0.9
    clip: float = 1.0


class Corpus:
    """The prose of Python's help pages as characters, and as batches of consecutive pieces."""

    def __init__(self) -> None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise Mistake("this Python lacks pydoc_data.topics, the built-in model's text") from error
        text = "\n\n".join(topics[name] for name in sorted(topics))
        text = re.sub(r"^\s*[|+].*\n", "", text, flags=re.MULTILINE)  # drawn tables are no prose
        self.text = re.sub(r" +", " ", text)
        self.vocabulary = sorted(set(self.text))
        self._index = {character: index for index, character in enumerate(self.vocabulary)}

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, [T]."""
        return torch.tensor([self._index[character] for character in text])

    def batches(self, sizes: Sizes, device: torch.device) -> Tensor:
        """Return [N, B, T + 1] tokens: N steps, each with the next character of its last one."""
        streams = self.encode(self.text)
        width = len(streams) // sizes.batch
        streams = streams[: width * sizes.batch].view(sizes.batch, width)
        return streams.unfold(1, sizes.time + 1, sizes.time).transpose(0, 1).contiguous().to(device)


class Characters(nn.Module):
    """Embedding, recurrent layer, head: tokens [B, T] to logits [B, T, V] and the state."""

    def __init__(self, cell: str, vocabulary: int, sizes: Sizes) -> None:
        super().__init__()
        self.cell = cell
        self.embedding = nn.Embedding(vocabulary, sizes.embedding)
        self.rnn = LAYERS[cell](sizes.embedding, sizes.hidden, batch_first=True)
        self.head = nn.Linear(sizes.hidden, vocabulary)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(tokens), state)
        return self.head(y), state


class Training:
    """One model on its way through the batches; `step` goes one further and keeps the loss."""

    def __init__(self, model: Characters, batches: Tensor, sizes: Sizes) -> None:
        self.model, self.batches, self.sizes = model, batches, sizes
        # Adam learns no better here, but it divides by the gradient's size and so turns the rounding of a small
        # gradient into a whole step: after 300 steps equal runs were hundreds of times further apart.
        self.optimizer = torch.optim.SGD(model.parameters(), RATES[model.cell], momentum=sizes.momentum)
        self.losses: list[Tensor] = []
        self._state: Any = None

    def step(self) -> None:
        position = len(self.losses) % len(self.batches)
        tokens = self.batches[position]
        state = self._state if position else None  # a new pass begins with no state
        self.optimizer.zero_grad(set_to_none=True)
        logits, state = self.model(tokens[:, :-1], state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.sizes.clip)
        self.optimizer.step()
        self._state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        self.losses.append(loss.detach())  # stays on the device: reading it here would wait for it

    def curve(self) -> list[float]:
        return [loss.item() for loss in self.losses]


@torch.no_grad()
def sample(model: Characters, corpus: Corpus) -> str:
    """Return what the model writes after a prompt, a character per call, its state carried along."""
    generator = torch.Generator().manual_seed(SEED)
    device = model.head.weight.device
    text, state = PROMPT, None
    tokens = corpus.encode(PROMPT)
    for _ in range(SAMPLE_LENGTH):
        logits, state = model(tokens[None].to(device), state)
        likely = (logits[0, -1].double().cpu() / TEMPERATURE).softmax(-1)
        tokens = torch.multinomial(likely, 1, generator=generator)
        text += corpus.vocabulary[int(tokens)]
    return text
