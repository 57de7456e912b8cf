"""How an operator of ours is registered, and what all their gradients share."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import batching

LIBRARY = torch.library.Library("fastseq", "FRAGMENT")

Function = Callable[..., Any]


def operator(
    name: str,
    *,
    settings: str,
    inputs: str,
    differentiable: int,
    outputs: int,
    keeps: bool,
    forward: Function,
    shapes: Function,
    backward: Function,
    gradients: Function | None = None,
    formula: Function,
    rows: Mapping[str, int] | None = None,
    summed: Collection[str] = (),
) -> Any:
    """Define the operator ``fastseq::<name>`` and its gradient ``fastseq::<name>_backward``; return the operator.

    Both are opaque to tracing, and their gradients are registered for the Autograd dispatch key, so that a graph
    shows each as one node and a call that needs no gradient does not pay for one.

    The operator takes ``(*settings, *inputs, implementation)``, the last saying who computes ("" to choose when it
    runs). ``settings`` and ``inputs`` are their schemas: numbers and names, then tensors, the first
    ``differentiable`` of which have gradients. It returns ``outputs`` tensors, empty where there is nothing to return.
    ``forward`` computes them, ``shapes`` says what they look like. ``backward(*settings, *gradients, *inputs,
    *outputs, implementation)`` computes the gradients of the inputs, empty where there is none; ``gradients``
    of the same says what they look like, if not like the inputs and contiguous; their own gradient is that of
    ``formula(*settings, *inputs)``, differentiated twice.

    An operator that ``keeps`` something for its gradient takes, before the implementation, what: "gates", "cells" (to
    recompute the gates) or "nothing"; the last output is what it kept and has no gradient.

    ``rows`` says which axis of an input counts independent rows; in the outputs it is the first input's. Then
    ``torch.vmap`` is one call with more rows, and ``backward`` and ``gradients`` take ``samples`` before the
    implementation: None, or how many equal groups of rows have a gradient each, stacked along a first axis, of the
    inputs without rows (of which none is wanted if it is 0). ``summed`` names those of them whose gradient
    ``backward`` can but add up over all rows: where one of them is given, vmap calls it once per example.
    """
    leading = len(settings.split(", "))
    names = [declaration.split()[1] for declaration in inputs.split(", ")]
    axes = [None if rows is None else rows.get(name) for name in names]
    shared = [i for i in range(differentiable) if axes[i] is None]
    results = outputs - keeps  # those that have gradients
    trailing = "str keep, str implementation" if keeps else "str implementation"
    sampled = "" if rows is None else "SymInt? samples, "
    several = ", ".join(["Tensor"] * outputs)
    incoming = ", ".join(f"Tensor? grad_{i}" for i in range(results))
    returned = ", ".join(f"Tensor output_{i}" for i in range(outputs))
    of_inputs = ", ".join(["Tensor"] * differentiable)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            fixed, tensors, rest = args[:leading], args[leading:][: len(names)], list(args[leading + len(names) :])
            ctx.settings = fixed, rest[-1]
            ctx.set_materialize_grads(False)
            if keeps and rest[0] == "nothing":
                rest[0] = "gates"
            found = _below_autograd(overload, *fixed, *tensors, *rest)
            ctx.save_for_backward(*tensors, *found)
            if keeps:
                ctx.mark_non_differentiable(found[-1])
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            fixed, implementation = ctx.settings
            saved = ctx.saved_tensors  # read once: a checkpoint unpacks a tensor no second time
            needs = ctx.needs_input_grad[leading:]
            samples = [] if rows is None else [None if any(needs[i] for i in shared) else 0]
            found = overload_backward(*fixed, *grads[:results], *saved, *samples, implementation)
            wanted = zip(found, saved, needs, strict=False)
            kept = [g if t is not None and need else None for g, t, need in wanted]
            absent = [None] * (len(names) - differentiable + 1 + keeps)
            return *([None] * leading), *kept, *absent

    class SecondGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.fixed = args[:leading]
            ctx.samples = None if rows is None else args[-2]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*args[leading : leading + results + len(names) + outputs])
            return _below_autograd(overload_backward, *args)

        @staticmethod
        def backward(ctx: Any, *tangents: Tensor | None) -> Any:
            saved = ctx.saved_tensors
            grads, given = saved[:results], saved[results:][: len(names)]
            variables, constants = given[:differentiable], given[differentiable:]

            def function(*x: Tensor | None) -> Any:
                return formula(*ctx.fixed, *x)

            if ctx.samples:
                function = batching.each(function, axes, ctx.samples)
                with torch.enable_grad():
                    variables = [
                        t if t is None or axis is not None else t.expand(ctx.samples, *t.shape)
                        for t, axis in zip(variables, axes, strict=False)
                    ]
            to_inputs, to_grads = second_order(lambda *x: function(*x, *constants), variables, grads, tangents)
            if ctx.samples:
                sums = {i: g.sum(0) for i in shared if (g := to_inputs[i]) is not None}
                to_inputs = [sums.get(i, g) for i, g in enumerate(to_inputs)]
            absent = [None] * (len(constants) + outputs + 1 + (rows is not None))
            return *([None] * leading), *to_grads, *to_inputs, *absent

    def like(*args: Any) -> tuple[Tensor, ...]:
        given = args[leading + results :][:differentiable]
        first = next(t for t in given if t is not None)
        samples = None if rows is None else args[-2]
        stacked = [() if samples is None or axis is not None else (samples,) for axis in axes]
        return tuple(
            first.new_empty(0) if t is None else t.new_empty(*several, *t.shape)
            for t, several in zip(given, stacked, strict=False)
        )

    overload = _define(f"{name}({settings}, {inputs}, {trailing}) -> ({several})", forward, shapes, Gradient)
    overload_backward = _define(
        f"{name}_backward({settings}, {incoming}, {inputs}, {returned}, {sampled}str implementation) -> ({of_inputs})",
        backward,
        gradients or like,
        SecondGradient,
    )
    if rows is not None:
        fixed, of_rows = [None] * leading, axes[0]
        results_axes = [of_rows] * outputs
        of_arguments = [*fixed, *axes, *[None] * (1 + keeps)]
        of_backward = [*fixed, *results_axes[:results], *axes, *results_axes, None, None]
        forward_rule = batching.rule(overload, of_arguments, results_axes)
        alone = [leading + results + names.index(name) for name in summed]
        backward_rule = batching.rule(
            overload_backward, of_backward, axes[:differentiable], len(of_backward) - 2, alone
        )
        torch.library.register_vmap(f"fastseq::{name}", forward_rule, lib=LIBRARY)
        torch.library.register_vmap(f"fastseq::{name}_backward", backward_rule, lib=LIBRARY)
    return overload


def _below_autograd(overload: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # off in a Function's forward, but the levels further down may want theirs
                return overload(*args)
        return overload(*args)


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
                with enable_single_level_autograd_function():  # the dispatcher takes the levels apart, one at a time
                    return super(torch.autograd.Function, gradient).apply(*args)  # type: ignore[misc]
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
        x = [None if t is None else _variable(t, tangents[i] is not None) for i, t in enumerate(inputs)]
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
        given = zip((*x, *v), (*inputs, *cotangents), strict=True)
        variables = [t for t, source in given if t is not None and source is not None and source.requires_grad]
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


def differentiated(
    formula: Function, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> Iterator[Tensor | None]:
    """The gradients of ``formula(*inputs)`` with a graph of their own, for a Function whose own gradient has none."""
    # A view each, so that a tensor given twice is two variables here.
    leaves = [None if t is None else t.view_as(t) for t in inputs]
    pairs = [(o, g) for o, g in zip(formula(*leaves), cotangents, strict=True) if g is not None]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return (next(found) if t is not None and t.requires_grad else None for t in leaves)


def _variable(t: Tensor, wanted: bool) -> Tensor:
    """A view with a gradient if ``wanted``, even where t has none: at this level of torch.func, as it had above."""
    if t.requires_grad or not wanted:
        return t.view_as(t)
    with enable_inplace_requires_grad(True):
        return t.detach().requires_grad_()
