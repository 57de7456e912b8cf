"""A recurrent cell of the user's own, as a module like all others."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .nn.cells import Recurrent
from .reference.recurrent import CELLS, Cell

_TAKEN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_PIECES = {"forward", "backward", "saved", "reads_h", "whole"}


def cell(
    name: str,
    step: Callable[..., tuple[Tensor, ...]],
    *,
    gates: int,
    cells: int = 0,
    parameters: Mapping[str, tuple[int, float | None]] | None = None,
    splits: bool = False,
    kernel: Mapping[str, Any] | None = None,
) -> type[Recurrent]:
    """Make a recurrent layer of a step: a class with layers, directions, resets, lengths, ``state_dict`` and options.

    The class is called as :class:`fastseq.PeepholeLSTM` is, on every implementation; without ``kernel`` its loop runs
    in PyTorch. Assign it to its own name, so that it can be pickled; ``fastseq.testing.check_cell`` tests it.

    Args:
        name: of the class and of the cell; no other cell has it.
        step: ``step(x, h, state, params)`` with the input gates and the recurrent gates ``[B, gates*H]``, biases
            included, the states (h, cells) ``[B, H]`` and the rows of own parameters ``[H]``; returns the new
            states. Differentiable PyTorch; no row of the batch may look at another.
        gates: pre-activations per hidden unit.
        cells: states beside h.
        parameters: the step's own, by name: how many rows ``[H]``, and the value to start from (None: drawn like the
            weights).
        splits: the step does more with x and h than add them up.
        kernel: the same step for the GPU: ``forward`` and ``backward``, jit functions as ``kernels/README.md`` has
            them; ``saved``, how many values forward saves; ``reads_h`` if backward, and ``whole`` if forward needs more
            than a product gives: the old h, all hidden units in one tile.

    Raises:
        TypeError: the step or the kernel is of another kind.
        ValueError: the name is taken, the step returns other shapes, or does not add up what it is said to.

    Example:
        >>> import torch, fastseq
        >>> def leaky(x, h, state, params):
        ...     rate = params[0].sigmoid()
        ...     return ((1 - rate) * state[0] + rate * torch.tanh(x + h),)
        >>> LeakyRNN = fastseq.cell("LeakyRNN", leaky, gates=1, parameters={"rate": (1, 0.0)})
        >>> y, h = LeakyRNN(4, 8, bidirectional=True)(torch.randn(5, 2, 4), lengths=torch.tensor([5, 3]))
    """
    own = dict(parameters or {})
    if not name.isidentifier():
        raise ValueError(f"name: expected one that a class can have, got {name!r}")
    if name in CELLS:
        raise ValueError(f"name: there is a cell {name!r} already; take another")
    if gates < 1 or cells < 0:
        raise ValueError(f"gates, cells: expected at least one gate and no fewer than no cells, got {gates}, {cells}")
    for key, (rows, _) in own.items():
        if not key.isidentifier() or key in _TAKEN or rows < 1:
            raise ValueError(
                f"parameters: expected names other than {', '.join(_TAKEN)} with rows, got {key!r}: {rows}"
            )
    described = Cell(gates, cells, step, own, splits)
    _try(name, described)
    if kernel is not None:
        _register(name, described, dict(kernel))
    CELLS[name] = described
    space = {
        "__module__": sys._getframe(1).f_globals.get("__name__", __name__),
        "__doc__": inspect.getdoc(step) or f"A recurrent layer of the step ``{name}``.",
        "cell": name,
    }
    return type(name, (Recurrent,), space)


@torch.no_grad()
def _try(name: str, cell: Cell) -> None:
    """Run a step once, on numbers that no program has seen, and look at what comes back."""
    B, H = 2, 3
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, h, moved = (draw(B, cell.gates * H) for _ in range(3))
    state = tuple(draw(B, H) for _ in range(1 + cell.cells))
    params = tuple(draw(H) for _ in range(sum(rows for rows, _ in cell.parameters.values())))
    new = cell.step(x, h, state, params)
    if not isinstance(new, tuple) or not all(isinstance(n, Tensor) for n in new):
        raise TypeError(f"step: expected a tuple of {1 + cell.cells} tensors (h and the cells), got {_described(new)}")
    if [tuple(n.shape) for n in new] != [(B, H)] * (1 + cell.cells) or any(n.dtype != x.dtype for n in new):
        wanted = f"{1 + cell.cells} states [B, H] = {[B, H]} of the input's dtype"
        raise ValueError(f"step: expected {wanted} from x {[B, cell.gates * H]}, got {_described(new)}")
    if not cell.splits:
        again = cell.step(x + moved, h - moved, state, params)
        if not all(torch.allclose(a, n, equal_nan=True) for a, n in zip(again, new, strict=True)):
            raise ValueError(f"splits: {name} does more with x and h than add them up; say splits=True")


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(_described(v) for v in value)})"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _register(name: str, cell: Cell, pieces: dict[str, Any]) -> None:
    """Have the kernels know the step; whoever has its jit functions has triton."""
    missing, unknown = {"forward", "backward", "saved"} - pieces.keys(), pieces.keys() - _PIECES
    if missing or unknown:
        raise ValueError(f"kernel: expected forward, backward, saved and perhaps reads_h, whole; got {sorted(pieces)}")
    for piece in ("forward", "backward"):
        if not hasattr(pieces[piece], "fn"):
            raise TypeError(f"kernel: expected a function under triton.jit as {piece}, got {_described(pieces[piece])}")
    from .kernels.recurrent.steps import Step, register

    described = {
        "gates": cell.gates,
        "cells": cell.cells,
        "params": sum(rows for rows, _ in cell.parameters.values()),
        "splits": cell.splits,
        "reads_h": False,
        "whole": False,
    }
    register(name, Step(**{**described, **pieces}))
