"""One combination of a recurrent layer's options: build it, feed it, and name everything that comes out."""

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq

from .budget import assert_within_budget

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru")
LAYOUTS = ("padded", "unbatched", "sorted", "unsorted")  # the last two: a PackedSequence
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A combination; its text names what differs from the simplest module."""

    cell: str = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    train: bool = True
    layout: str = "padded"
    hx: bool = False
    dtype: torch.dtype = torch.float32
    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741  (the field's letter)
    H: int = 5

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in vars(self).items() if k != "cell" and v != getattr(Case, k)]
        return " ".join([self.cell, *options])

    def build(self, library: Any) -> nn.Module:
        """The module of ``torch.nn`` or of ``fastseq``, with the same parameters each time."""
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout if self.num_layers > 1 else 0.0,
            "bidirectional": self.bidirectional,
        }
        if self.cell == "lstm_proj":
            options["proj_size"] = max(1, self.H // 2)
        if self.cell.startswith("rnn"):
            options["nonlinearity"] = self.cell[4:]
        kind = self.cell[:4].rstrip("_").upper()
        module = getattr(library, kind)(self.I, self.H, **options)
        return module.to(self.dtype).train(self.train)

    def lengths(self) -> list[int]:
        """The rows' lengths in a PackedSequence: the longest is T, and where it can be the order is unsorted."""
        lengths = [self.T if b == 1 % self.B else 1 + (b * 5 + 1) % self.T for b in range(self.B)]
        return sorted(lengths, reverse=True) if self.layout == "sorted" else lengths

    def draw(self) -> list[Tensor]:
        """The input, then h_0 (and c_0) if given: values that bfloat16 holds exactly, so no dtype sees other ones."""
        torch.manual_seed(1)
        rows = () if self.layout == "unbatched" else (self.B,)
        x = (*rows, self.T, self.I) if self.batch_first else (self.T, *rows, self.I)
        states = self.num_layers * (2 if self.bidirectional else 1), *rows
        P = max(1, self.H // 2) if self.cell == "lstm_proj" else self.H
        shapes = [x]
        if self.hx:
            shapes.append((*states, P))
            shapes += [(*states, self.H)] if self.cell.startswith("lstm") else []
        return [torch.randn(shape).bfloat16().to(self.dtype) for shape in shapes]

    def mask(self) -> Tensor:
        """A reset that never resets, in the shape the module wants."""
        if self.layout == "unbatched":
            return torch.zeros(self.T, dtype=torch.bool)
        return torch.zeros((self.B, self.T) if self.batch_first else (self.T, self.B), dtype=torch.bool)


def every(**fixed: Any) -> Iterator[Case]:
    """All combinations of the options that do not matter to a cell's kind or dtype; ``fixed`` gives the rest."""
    booleans = (False, True)
    for num_layers, bidirectional, bias, batch_first, layout, hx in itertools.product(
        (1, 2, 3), booleans, booleans, booleans, LAYOUTS, booleans
    ):
        options = {
            "num_layers": num_layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first,
            "layout": layout, "hx": hx,
        }  # fmt: skip
        yield Case(**options, **fixed)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples; of a PackedSequence the data and the order of its rows."""
    if isinstance(tree, PackedSequence):
        return [t for t in tree if t is not None]
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in tensors(part)]


def run(module: nn.Module, case: Case, drawn: list[Tensor], **keywords: Any) -> Named:
    """Outputs, final states, and the gradients of everything, by name."""
    dtype = next(module.parameters()).dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in drawn]
    x, states = leaves[0], tuple(leaves[1:])
    if case.layout.endswith("sorted"):
        x = pack_padded_sequence(x, torch.tensor(case.lengths()), case.batch_first, case.layout == "sorted")
    hx = None if not states else states if case.cell.startswith("lstm") else states[0]
    y, final = module(x, hx, **keywords)
    named: Named = {}
    if isinstance(y, PackedSequence):
        named = {k: t for k, t in zip(("batch_sizes", "order", "back"), y[1:], strict=True) if t is not None}
        y = y.data
    outputs = {"y": y, **dict(zip(("h_n", "c_n"), [final] if isinstance(final, Tensor) else final, strict=False))}
    torch.manual_seed(2)
    cotangents = [torch.randn(o.shape).bfloat16().to(o.dtype) for o in outputs.values()]
    wanted = dict(zip(("input", "h_0", "c_0"), leaves, strict=False)) | dict(module.named_parameters())
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), cotangents)
    named |= outputs | {f"gradient of {k}": g for k, g in zip(wanted, gradients, strict=True)}
    return {k: t.detach() for k, t in named.items()}
