"""PyTorch's own recurrent operators; on a GPU with the two things added that cuDNN refuses to do.

cuDNN has no backward in ``eval()`` (pytorch/pytorch#5878) and no double backward (#5261). Here the operator runs in
a graph of its own, in training mode with its dropout off, and a second gradient comes from the reference formula.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..implementation import gpu
from ..reference import recurrent as reference
from .crossover import trained
from .library import needs_gradient

Settings = tuple[bool, int, float, bool, bool]  # has_biases, num_layers, dropout, train, bidirectional


def stock(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...],
    params: Sequence[Tensor],
    settings: Settings,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """What ``torch.lstm`` and its sisters return, for padded input or (with ``batch_sizes``) packed data."""

    def run(train: bool, input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(hx)], list(rest[len(hx) :])
        state = states if cell == "lstm" else states[0]
        has_biases, num_layers, dropout, _, bidirectional = settings
        # In evaluation cuDNN gets its training mode, for the sake of a gradient, and no dropout.
        dropout = dropout if settings[3] else 0.0
        arguments = (state, weights, has_biases, num_layers, dropout, train, bidirectional)
        operator = getattr(torch, cell)
        if batch_sizes is None:
            return operator(input, *arguments, batch_first)  # type: ignore[no-any-return]
        return operator(input, batch_sizes, *arguments)  # type: ignore[no-any-return]

    if cell != "lstm" and batch_sizes is None:
        found: tuple[Tensor, ...] | None = trained(cell, input, hx[0], params, *settings, batch_first)
        if found is not None:
            return found
    tensors = (input, *hx, *params)
    if not gpu(input) or not needs_gradient(tensors) or torch._C._are_functorch_transforms_active():
        return run(settings[3], *tensors)

    def formula(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return _formula(cell, input, rest[: len(hx)], rest[len(hx) :], settings, batch_first, batch_sizes)

    return Stock.apply(lambda *t: run(True, *t), formula, *tensors)  # type: ignore[no-any-return,no-untyped-call]


def _formula(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    settings: Settings,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """The same by the reference."""
    has_biases, num_layers, dropout, train, bidirectional = settings
    if dropout and train:
        raise RuntimeError("cuDNN's dropout between layers cannot be replayed for a second gradient: set dropout=0")
    lengths = on_device = None
    if batch_sizes is not None:
        input, lengths = pad_packed_sequence(PackedSequence(input, batch_sizes))
        on_device = lengths.to(input.device, non_blocking=True)
    elif batch_first:
        input = input.transpose(0, 1)
    stacks = reference.stacked(params, has_biases, num_layers, 2 if bidirectional else 1)

    def run(*args: Any) -> Any:
        everything: Any = (cell, *args)
        masks: Any = {"lengths": on_device}
        return reference.layer(*everything, **masks)

    y, final, _ = reference.network(run, input, tuple(hx), stacks)
    if lengths is not None:
        y = pack_padded_sequence(y, lengths).data
    elif batch_first:
        y = y.transpose(0, 1)
    return (y, *final)


class Stock(torch.autograd.Function):
    """An operator with a graph of its own for the first gradient, and a formula for the further ones."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], formula: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.formula = formula
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with torch.enable_grad():
            outputs = run(*leaves)
        ctx.graph = leaves, outputs
        return tuple(o.detach() for o in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # raises if the graph has been freed
        if torch.is_grad_enabled():
            leaves: Any = [t.view_as(t) for t in saved]
            outputs = ctx.formula(*leaves)
        else:
            leaves, outputs = ctx.graph
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.graph = None  # its memory need not wait for the loss to go out of scope
        wanted = [t for t in leaves if t.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                retain_graph=keep,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if t.requires_grad else None for t in leaves)
