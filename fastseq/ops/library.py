"""How an operator of ours is registered, and what all their gradients share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fastseq", "FRAGMENT")

Function = Callable[..., Any]


def operator(
    name: str,
    *,
    inputs: str,
    differentiable: int,
    outputs: int,
    forward: Function,
    shapes: Function,
    backward: Function,
    formula: Function,
) -> Any:
    """Define the operator ``fastseq::<name>`` and its gradient ``fastseq::<name>_backward``; return the operator.

    Both are opaque to tracing, and their gradients are registered for the Autograd dispatch key, so that a graph
    shows each as one node and a call that needs no gradient does not pay for one.

    The operator takes ``(cell, *inputs, keep, implementation)``: what to keep for the gradient ("gates", "cells" to
    recompute the gates, or "nothing"), and who computes ("" to choose when it runs). ``inputs`` is their schema, the
    first ``differentiable`` of them have gradients. It returns ``outputs`` tensors, empty where there is nothing to
    return, the last of which (the gates) has no gradient. ``forward`` computes them, ``shapes`` says what they look
    like. ``backward(cell, *gradients, *inputs, *outputs, implementation)`` computes the gradients of the inputs, empty
    where there is none; the gradient of that is ``formula(cell, *inputs)``'s, differentiated twice.
    """
    kinds = [declaration.split()[0] for declaration in inputs.split(", ")]
    several = ", ".join(["Tensor"] * outputs)
    gradients = ", ".join(f"Tensor? grad_{i}" for i in range(outputs - 1))
    results = ", ".join(f"Tensor output_{i}" for i in range(outputs))
    of_inputs = ", ".join(["Tensor"] * differentiable)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, cell: str, *args: Any) -> Any:
            *tensors, keep, implementation = args
            ctx.settings = cell, implementation
            ctx.set_materialize_grads(False)
            keep = "gates" if keep == "nothing" else keep
            with torch._C._AutoDispatchBelowAutograd():
                found = overload(cell, *tensors, keep, implementation)
            ctx.save_for_backward(*tensors, *found)
            ctx.mark_non_differentiable(found[-1])
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            cell, implementation = ctx.settings
            saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor no second time
            found = overload_backward(cell, *grads[: outputs - 1], *saved, implementation)
            wanted = zip(found, saved, ctx.needs_input_grad[1:], strict=False)
            kept = [g if t is not None and need else None for g, t, need in wanted]
            return None, *kept, *(None for _ in kinds[differentiable:]), None, None

    class SecondGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, cell: str, *args: Any) -> Any:
            *tensors, implementation = args
            ctx.cell = cell
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            with torch._C._AutoDispatchBelowAutograd():
                return overload_backward(cell, *tensors, implementation)

        @staticmethod
        def backward(ctx: Any, *tangents: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            grads, given = saved[: outputs - 1], saved[outputs - 1 :][: len(kinds)]
            variables, constants = given[:differentiable], given[differentiable:]
            to_inputs, to_grads = second_order(lambda *x: formula(ctx.cell, *x, *constants), variables, grads, tangents)
            rest = (None for _ in range(len(constants) + outputs + 1))
            return None, *to_grads, *to_inputs, *rest

    overload = _define(
        f"{name}(str cell, {inputs}, str keep, str implementation) -> ({several})", forward, shapes, Gradient
    )
    overload_backward = _define(
        f"{name}_backward(str cell, {gradients}, {inputs}, {results}, str implementation) -> ({of_inputs})",
        backward,
        lambda cell, *args: _like(args[outputs - 1 :][:differentiable]),
        SecondGradient,
    )
    return overload


def _like(inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    first = next(t for t in inputs if t is not None)
    return tuple(first.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _define(schema: str, kernel: Function, shapes: Function, gradient: type[torch.autograd.Function]) -> Any:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    overload = getattr(torch.ops.fastseq, name).default
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{name}", shapes, lib=LIBRARY)

    def autograd(*args: Any) -> Any:
        _refuse_forward_mode(name, args)
        if needs_gradient(args):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"fastseq::{name} has no gradient under torch.func; use fastseq.use('reference')"
                )
            return gradient.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    return overload


def needs_gradient(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _refuse_forward_mode(name: str, values: Sequence[Any]) -> None:
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
        reached: list[tuple[Tensor, Tensor]] = [
            (o, g) for o, g in zip(outputs, v, strict=True) if o is not None and g is not None
        ]
        wanted = [i for i, t in enumerate(x) if t is not None and t.requires_grad]
        first = torch.autograd.grad(
            [o for o, _ in reached],
            [t for t in x if t is not None and t.requires_grad],
            [g.to(o.dtype) for o, g in reached],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [(g, tangents[i]) for g, i in zip(first, wanted, strict=True)]
        pairs = [(g, t) for g, t in pairs if g is not None and t is not None and g.requires_grad]
        variables = [t for t in (*x, *v) if t is not None and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(variables)
        if pairs:
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                variables,
                [t for _, t in pairs],
                create_graph=graph,
                allow_unused=True,
            )
    flows = {id(t): g for t, g in zip(variables, found, strict=True)}
    return [flows.get(id(t)) for t in x], [flows.get(id(t)) for t in v]
