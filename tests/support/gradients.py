"""Small float64 networks for the tests of gradients, their inputs, and a loss of all their outputs."""

from typing import Any

import torch
from torch import Tensor

import fastseq

T, B, I, H = 3, 2, 2, 3  # noqa: E741  (the field's letter)
KINDS = ("RNN", "LSTM", "GRU")
WAYS = ("torch", "reference")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "lstm-proj": ("LSTM", {"proj_size": 2}),
    "lstm-deep": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "gru-deep": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn-deep": ("RNN", {"num_layers": 2, "bidirectional": True, "bias": False}),
    "lstm-proj-deep": ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
}
MASKS = {
    "nothing": {},
    "reset": {"reset": torch.tensor([[False, True], [True, False], [False, False]])},
    "lengths": {"lengths": torch.tensor([3, 1])},
    "both": {"reset": torch.tensor([[False, True], [True, False], [True, True]]), "lengths": torch.tensor([3, 2])},
}


def build(shape: str, **more: Any) -> Any:
    kind, settings = SHAPES[shape]
    return getattr(fastseq, kind)(I, H, **settings, **more).double()


def states_of(rnn: Any, batch: int = B) -> tuple[Tensor, ...]:
    rows = rnn.num_layers * (1 + rnn.bidirectional)
    sizes = [(rows, batch, rnn.proj_size or rnn.hidden_size)]
    if rnn.mode == "LSTM":
        sizes.append((rows, batch, rnn.hidden_size))
    return tuple(torch.randn(size, dtype=torch.double, requires_grad=True) for size in sizes)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for part in outputs for t in flat(part)]


def loss_of(outputs: Any) -> Tensor:
    return torch.stack([(0.5 * t).cos().sum() for t in flat(outputs)]).sum()


def gradients(rnn: Any, *leaves: Tensor, outputs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(outputs), [*leaves, *rnn.parameters()])
