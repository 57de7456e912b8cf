"""How an operator of ours is registered, and what all their gradients share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fastseq", "FRAGMENT")

Function = Callable[..., Any]


def operator(schema: str, *, kernel: Function, fake: Function, gradient: type[torch.autograd.Function]) -> Any:
    """Define ``fastseq::<schema>``: what computes it, what its results look like, and its gradient.

    The gradient is registered for the Autograd dispatch key, so that tracing sees the operator as one node, and
    it is skipped when nothing needs one. The operator is returned.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    overload = getattr(torch.ops.fastseq, name).default
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{name}", fake, lib=LIBRARY)

    def autograd(*args: Any) -> Any:
        if needs_gradient(args):
            return gradient.apply(*args)
        refuse_forward_mode(name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    return overload


def below_autograd(overload: Any, *args: Any) -> Any:
    """Call the operator itself, from inside the forward of its own gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def needs_gradient(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def refuse_forward_mode(name: str, values: Sequence[Any]) -> None:
    """An opaque operator would return a tangent of zero without a word; refuse instead."""
    if forward_ad._current_level >= 0:
        for value in values:
            if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise NotImplementedError(
                    f"fastseq::{name} has no forward-mode derivative; use fastseq.use('reference')"
                )


def second_order(
    formula: Function,
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradient of a gradient, from a differentiable formula.

    ``formula(*inputs)`` returns outputs; its gradient for ``cotangents`` was taken elsewhere, and ``tangents`` is
    what has arrived at that gradient. Returns what flows on to the inputs and to the cotangents. With grad mode on
    the result is itself part of the graph, to any order.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view each, so that a tensor given twice is two variables here.
        x = [None if t is None else t.view_as(t) for t in inputs]
        v = [None if t is None else t.view_as(t) for t in cotangents]
        outputs = formula(*x)
        reached = [(o, g) for o, g in zip(outputs, v, strict=True) if o is not None and g is not None]
        wanted = [i for i, t in enumerate(x) if t is not None and t.requires_grad]
        first = torch.autograd.grad(
            [o for o, _ in reached],
            [x[i] for i in wanted],
            [g.to(o.dtype) for o, g in reached],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [(g, tangents[i]) for g, i in zip(first, wanted, strict=True)]
        pairs = [(g, t) for g, t in pairs if g is not None and t is not None and g.requires_grad]
        variables = [t for t in (*x, *v) if t is not None and t.requires_grad]
        if pairs:
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                variables,
                [t for _, t in pairs],
                create_graph=graph,
                allow_unused=True,
            )
        else:
            found = (None,) * len(variables)
    flows = {id(t): g for t, g in zip(variables, found, strict=True)}
    return [flows.get(id(t)) for t in x], [flows.get(id(t)) for t in v]
