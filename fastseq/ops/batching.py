"""``torch.vmap`` of an operator whose inputs count independent rows along an axis: one call with more rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Axes = Sequence[int | None]


def rule(
    overload: Any, axes: Axes, of_results: Axes, samples_at: int | None = None, alone: Sequence[int] = ()
) -> Callable[..., Any]:
    """The batching rule of an operator, as ``torch.library.register_vmap`` wants it.

    ``axes`` says where each argument has its rows, ``of_results`` each result; None: the argument is the same for all
    rows, the result has none. Examples are folded into the rows, the examples outermost. Where something that
    is the same for all rows differs between the examples (weights, in an ensemble), the operator runs once for each.

    ``samples_at`` is the place of an argument that says how many groups of rows have a result of their own, stacked
    along a first axis, where a result has no rows (None: all rows have one, 0: it is not wanted). An argument at one
    of the places ``alone`` does not allow for groups.
    """

    def batched(info: Any, in_dims: Axes, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        examples: int = info.batch_size
        known = [
            None if axis is None or not isinstance(value, Tensor) else _rows(value, axis, at is not None)
            for value, axis, at in zip(args, axes, in_dims, strict=True)
        ]
        differ = any(at is not None and axis is None for at, axis in zip(in_dims, known, strict=True))
        samples = None if samples_at is None else args[samples_at]
        if differ or (samples != 0 and any(args[i] is not None for i in alone)):
            return _one_by_one(overload, examples, in_dims, args)
        folded = [
            value if axis is None else _fold(value, axis, at, examples)
            for value, axis, at in zip(args, known, in_dims, strict=True)
        ]
        if samples_at is not None:
            folded[samples_at] = examples * (1 if samples is None else samples)
        results: list[Tensor] = []
        dims: list[int | None] = []
        for result, axis in zip(overload(*folded), of_results, strict=True):
            at = _rows(result, 0 if axis is None else axis, False)
            if at is None or (axis is None and samples == 0):
                results.append(result)
                dims.append(None)
            else:
                grouped = axis is not None or samples is not None
                results.append(result.unflatten(at, (examples, result.shape[at] // examples)) if grouped else result)
                dims.append(at)
        return tuple(results), tuple(dims)

    return batched


def _rows(value: Tensor, axis: int, batched: bool) -> int | None:
    """The axis, unless the value is but a placeholder for nothing, or of fewer dimensions and so for all rows."""
    dims = value.dim() - batched
    return axis if axis < dims and (dims > 1 or value.numel() > 0) else None


def _fold(value: Tensor, axis: int, at: int | None, examples: int) -> Tensor:
    if at is None:
        value = value.unsqueeze(axis).expand(*value.shape[:axis], examples, *value.shape[axis:])
    else:
        value = value.movedim(at, axis)
    return value.flatten(axis, axis + 1)


def _one_by_one(
    overload: Any, examples: int, in_dims: Axes, args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    # Contiguous, as the outputs are that come back to a backward.
    found = [
        overload(*(a if at is None else a.select(at, i).contiguous() for a, at in zip(args, in_dims, strict=True)))
        for i in range(examples)
    ]
    nothing = [_rows(result, 0, False) is None for result in found[0]]
    columns = zip(*found, strict=True)
    results = [each[0] if empty else torch.stack(each) for each, empty in zip(columns, nothing, strict=True)]
    return tuple(results), tuple(None if empty else 0 for empty in nothing)


def each(formula: Callable[..., Any], axes: Axes, samples: int) -> Callable[..., Any]:
    """``formula(*inputs)`` with its rows in ``samples`` groups, each with its own of the inputs that have no rows.

    Those are stacked, one for each group, along a first axis. The outputs have rows where the first input has.
    """
    of_results = axes[0] or 0

    def grouped(*inputs: Tensor | None) -> list[Tensor | None]:
        present: list[bool] = []

        def one(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            outputs = formula(*inputs)
            present[:] = [o is not None for o in outputs]
            return tuple(o for o in outputs if o is not None)

        split, dims = [], []
        for t, axis in zip(inputs, axes, strict=True):
            at = None if t is None else 0 if axis is None else _rows(t, axis, False)
            if t is not None and axis is not None and at is not None:
                t = t.unflatten(at, (samples, t.shape[at] // samples))
            split.append(t)
            dims.append(at)
        found = iter(torch.vmap(one, in_dims=tuple(dims), out_dims=of_results)(*split))
        return [next(found).flatten(of_results, of_results + 1) if there else None for there in present]

    return grouped
