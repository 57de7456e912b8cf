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


def choice(query: Tensor, value: Tensor, beyond: bool) -> Choice:
    """Which implementation runs, and why; ``beyond``: more is asked than PyTorch's fused operators do as promised."""

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
            "triton": lambda: attention_refusal(query, value),
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


def _resolve(implementation: str, query: Tensor, value: Tensor) -> str:
    """A compiled graph carries no choice: it is made when the graph runs."""
    if implementation:
        return implementation
    if chosen() == "reference":
        raise Unsupported("reference: not inside a compiled graph")
    return choice(query, value, beyond=True).name


SETTINGS = (
    "float? scale, SymInt left, SymInt right, bool lower_right, float softcap, float dropout_p, "
    "SymInt max_q, SymInt max_k, str weights, bool bias_gradient"
)
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor? mask, Tensor? cu_q, Tensor? cu_k, Tensor? seed"
)  # fmt: skip
NAMES = tuple(declaration.split()[1] for declaration in SETTINGS.split(", "))
LEADING, TENSORS = len(NAMES), len(INPUTS.split(", "))


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
    del settings["bias_gradient"]
    query, _, value, *_ = tensors
    settings["scale"] = scaling(settings["scale"], query)
    engine = _kernels("forward") if _resolve(implementation, query, value) == "triton" else blockwise
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
    (dout, dlse, dweights), inputs = tensors[:3], tensors[3:][:TENSORS]
    out, lse, _ = tensors[3 + TENSORS :]
    query, _, value, *_ = inputs
    settings["scale"] = scaling(settings["scale"], query)
    engine = _kernels("backward") if _resolve(implementation, query, value) == "triton" else blockwise
    dq, dk, dv, dbias = engine.attention_backward(
        dout, dlse, dweights if settings["weights"] else None, *inputs, out, lse, **settings, allow_tf32=_tf32()
    )
    return dq, dk, dv, query.new_empty(0) if dbias is None else dbias


def _gradients(*args: Any) -> tuple[Tensor, ...]:
    settings, tensors, _ = _call(args)
    query, key, value, bias = tensors[3:7]

    def like(t: Tensor) -> Tensor:
        B, N, T, D = t.shape
        return t.new_empty(B, T, N, D).transpose(1, 2)

    return (
        like(query),
        like(key),
        like(value),
        bias.new_empty(bias.shape) if settings["bias_gradient"] else query.new_empty(0),
    )


def _formula(*args: Any) -> tuple[Tensor | None, ...]:
    settings, tensors = dict(zip(NAMES, args, strict=False)), args[LEADING:]
    for name in ("max_q", "max_k", "bias_gradient"):
        del settings[name]
    settings["scale"] = scaling(settings["scale"], tensors[0])
    return reference.attention(*tensors, **settings)


attention = operator(
    "attention",
    settings=SETTINGS,
    inputs=INPUTS,
    differentiable=4,
    outputs=3,  # out, lse, weights
    keeps=False,
    forward=_forward,
    shapes=_shapes,
    backward=_backward,
    gradients=_gradients,
    formula=_formula,
)
