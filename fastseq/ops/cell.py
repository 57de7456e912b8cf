"""One step of a recurrent cell as the operator ``fastseq::cell``: one kernel launch forward, one backward.

PyTorch's own cells are plain compositions that compile and differentiate as they are, so this operator has the
kernels as its only implementation.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..implementation import Choice, choose, gpu, triton_refusal
from ..reference.recurrent import CELLS, single
from .library import below_autograd, operator, second_order
from .recurrent import SAVED

_INPUTS = "Tensor input, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_N = 7


def choice(cell: str, input: Tensor, w_hh: Tensor) -> Choice:
    """Which implementation runs a step: input ``[B, I]``, w_hh ``[G*H, H]``."""

    def fastest() -> tuple[str, str]:
        if not gpu(input):
            return "torch", "on the CPU PyTorch's own operator is the fastest"
        return "torch", "no measurement shows the kernels to be faster on this device"

    return choose(
        {
            "triton": lambda: triton_refusal(input) or _kernels().unsupported(cell, input, w_hh),
            "torch": lambda: None,
            "reference": lambda: None,
        },
        fastest,
    )


def _kernels() -> ModuleType:
    from ..kernels.recurrent import cell

    return cell  # type: ignore[no-any-return]


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(cell: str, *args: Any) -> tuple[Tensor, ...]:
    *tensors, save = args
    h, c, gates = _kernels().cell_forward(cell, *_contiguous(*tensors), save=save, allow_tf32=_tf32())
    empty = h.new_empty(0)
    return h, empty if c is None else c, empty.clone() if gates is None else gates


def _forward_fake(cell: str, input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    B, H = h.shape
    gates = (B, SAVED[cell], H) if rest[-1] else (0,)
    return input.new_empty(B, H), input.new_empty((0,) if c is None else (B, H)), input.new_empty(gates)


def _backward(
    cell: str,
    dh: Tensor | None,
    dc: Tensor | None,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    c_new: Tensor,
    gates: Tensor,
) -> tuple[Tensor, ...]:
    dh = torch.zeros_like(h) if dh is None else dh
    dc = torch.zeros_like(c) if dc is None and c is not None else dc
    dx_gates, dh_gates, dinput, dh_read, dc_read = _kernels().cell_backward(
        cell,
        *_contiguous(dh, dc, gates, h, c, c_new if c is not None else None, w_ih, w_hh),
        allow_tf32=_tf32(),
    )
    none = input.new_empty(0)
    has_bias = b_ih is not None
    return (
        dinput,
        dh_read,
        none if dc_read is None else dc_read,
        dx_gates.t() @ input,
        dh_gates.t() @ h,
        dx_gates.sum(0) if has_bias else none.clone(),
        dh_gates.sum(0) if has_bias else none.clone(),
    )


def _backward_fake(cell: str, dh: Any, dc: Any, *rest: Any) -> tuple[Tensor, ...]:
    none = rest[0].new_empty(0)
    return tuple(none.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest[:_N])


class Cell(torch.autograd.Function):
    """The gradient of ``fastseq::cell``."""

    @staticmethod
    def forward(ctx: Any, cell: str, *args: Any) -> tuple[Tensor, ...]:
        *tensors, _ = args
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        h, c, gates = below_autograd(step, cell, *tensors, True)
        ctx.save_for_backward(*tensors, c, gates)
        ctx.mark_non_differentiable(gates, *(() if CELLS[cell].states == 2 else (c,)))
        return h, c, gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = step_backward(ctx.cell, *grads[:2], *ctx.saved_tensors)
        kept = [
            g if t is not None and need else None
            for g, t, need in zip(found, ctx.saved_tensors[:_N], ctx.needs_input_grad[1 : _N + 1], strict=True)
        ]
        return None, *kept, None


class CellBackward(torch.autograd.Function):
    """The gradient of ``fastseq::cell_backward``, by the reference formula."""

    @staticmethod
    def forward(ctx: Any, cell: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return below_autograd(step_backward, cell, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        grads, inputs, rest = ctx.saved_tensors[:2], ctx.saved_tensors[2 : 2 + _N], ctx.saved_tensors[2 + _N :]

        def formula(*variables: Tensor) -> Any:
            return single(ctx.cell, *variables)

        to_inputs, to_grads = second_order(formula, inputs, grads, tangents)
        return None, *to_grads, *to_inputs, *(None for _ in rest)


step = operator(
    f"cell(str cell, {_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_forward_fake,
    gradient=Cell,
)
step_backward = operator(
    f"cell_backward(str cell, Tensor? dh, Tensor? dc, {_INPUTS}, Tensor c_new, Tensor gates) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
    gradient=CellBackward,
)
