"""Scaled dot-product attention as the operator ``fastseq::attention``, and its gradient.

Shapes and meaning are those of ``fastseq.reference.attention``. The operator is opaque to ``torch.compile`` and
``torch.export``; its gradient is a second operator, whose own gradient is the reference formula's.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..implementation import Choice, Unsupported, attention_refusal, choose, chosen, gpu
from ..reference import attention as reference
from . import blockwise
from .library import operator


def choice(query: Tensor, value: Tensor, beyond: bool, P: int | None = None) -> Choice:
    """Which implementation runs, and why.

    ``beyond``: more is asked than PyTorch's fused operators do as promised; P: the width of relative positions.
    """

    def fastest() -> tuple[str, str]:
        if not gpu(query):
            if beyond:
                return "torch", "on the CPU, PyTorch tile by tile, or its fused operator where that means the same"
            return "torch", "on the CPU PyTorch's own operator is the fastest"
        if beyond:
            return "triton", "PyTorch's fused operators cannot do this, or not with every promise kept"
        return "torch", "no measurement shows the kernels to be faster on this device"

    return choose(
        {
            "triton": lambda: attention_refusal(query, value, P),
            "torch": lambda: None,
            "reference": lambda: None,
        },
        fastest,
    )


def _kernels(name: str) -> ModuleType:
    if name == "forward":
        from ..kernels.attention import forward

        return forward  # type: ignore[no-any-return]
    from ..kernels.attention import backward

    return backward  # type: ignore[no-any-return]


def _engine(name: str, implementation: str, tensors: tuple[Any, ...]) -> ModuleType:
    """Who computes; a compiled graph carries no choice: it is made when the graph runs."""
    if not implementation:
        if chosen() == "reference":
            raise Unsupported("reference: not inside a compiled graph")
        query, _, value, _, _, position_query, *_ = tensors
        P = None if position_query is None else position_query.shape[3]
        implementation = choice(query, value, True, P).name
    return _kernels(name) if implementation == "triton" else blockwise


SETTINGS = (
    "float? scale, SymInt left, SymInt right, bool lower_right, float softcap, float dropout_p, "
    "SymInt max_q, SymInt max_k, str weights, SymInt distance_zero, SymInt position_zero, "
    "bool bias_gradient, bool distance_gradient"
)
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor? distance, Tensor? position_query, Tensor? position_key, Tensor? segment, "
    "Tensor? mask, Tensor? cu_q, Tensor? cu_k, Tensor? seed, "
    "Tensor? segment_q, Tensor? segment_k, Tensor? rank_q, Tensor? rank_k"
)
NAMES = tuple(declaration.split()[1] for declaration in SETTINGS.split(", "))
TENSORS = tuple(declaration.split()[1] for declaration in INPUTS.split(", "))
LEADING = len(NAMES)
DIFFERENTIABLE = 8


def scaling(scale: float | None, query: Tensor) -> float:
    """The scale, if none is given computed here: a graph of dynamic shapes would hold it as a symbol."""
    return scale if scale is not None else query.shape[-1] ** -0.5 if query.shape[-1] else 1.0


def _call(args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...], str]:
    """The settings by name, the tensors, and the implementation."""
    return dict(zip(NAMES, args, strict=False)), args[LEADING:-1], args[-1]


def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _forward(*args: Any) -> tuple[Tensor, ...]:
    settings, tensors, implementation = _call(args)
    del settings["bias_gradient"], settings["distance_gradient"]
    query = tensors[0]
    settings["scale"] = scaling(settings["scale"], query)
    engine = _engine("forward", implementation, tensors)
    out, lse, weights = engine.attention_forward(*tensors, **settings, allow_tf32=_tf32())
    return out, lse, query.new_empty(0) if weights is None else weights


def _shapes(*args: Any) -> tuple[Tensor, ...]:
    settings, (query, key, value, *_), _ = _call(args)
    B, N, Q, _ = query.shape
    K = key.shape[2]
    return (
        query.new_empty(B, Q, N, value.shape[3]).transpose(1, 2),
        query.new_empty(B, N, Q, dtype=torch.promote_types(query.dtype, torch.float32)),
        query.new_empty({"": (0,), "each": (B, N, Q, K), "mean": (B, Q, K)}[settings["weights"]]),
    )


def _backward(*args: Any) -> tuple[Tensor, ...]:
    settings, tensors, implementation = _call(args)
    (dout, dlse, dweights), inputs = tensors[:3], tensors[3:][: len(TENSORS)]
    out, lse, _ = tensors[3 + len(TENSORS) :]
    query = inputs[0]
    settings["scale"] = scaling(settings["scale"], query)
    engine = _engine("backward", implementation, inputs)
    found = engine.attention_backward(
        dout, dlse, dweights if settings["weights"] else None, *inputs, out, lse, **settings, allow_tf32=_tf32()
    )
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in found)


def _gradients(*args: Any) -> tuple[Tensor, ...]:
    settings, tensors, _ = _call(args)
    query, key, value, bias, distance, position_query, position_key, segment = tensors[3:][:DIFFERENTIABLE]

    def heads_last(t: Tensor) -> Tensor:
        B, N, T, D = t.shape
        return t.new_empty(B, T, N, D).transpose(1, 2)

    def plain(t: Tensor | None, wanted: bool = True) -> Tensor:
        return query.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)

    return (
        heads_last(query),
        heads_last(key),
        heads_last(value),
        plain(bias, settings["bias_gradient"]),
        plain(distance, settings["distance_gradient"]),
        plain(position_query) if position_query is None else heads_last(position_query),
        plain(position_key),
        plain(segment),
    )


def _formula(*args: Any) -> tuple[Tensor | None, ...]:
    settings, tensors = dict(zip(NAMES, args, strict=False)), args[LEADING:]
    for name in ("max_q", "max_k", "bias_gradient", "distance_gradient"):
        del settings[name]
    settings["scale"] = scaling(settings["scale"], tensors[0])
    return reference.attention(*tensors, **settings)


attention = operator(
    "attention",
    settings=SETTINGS,
    inputs=INPUTS,
    differentiable=DIFFERENTIABLE,
    outputs=3,  # out, lse, weights
    keeps=False,
    forward=_forward,
    shapes=_shapes,
    backward=_backward,
    gradients=_gradients,
    formula=_formula,
)
