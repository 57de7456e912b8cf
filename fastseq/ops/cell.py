"""One step of a recurrent cell as the operator ``fastseq::cell``: one kernel launch forward, one backward.

PyTorch's own cells are plain compositions that compile and differentiate as they are; this operator is for the
kernels, and for a choice that is made when a compiled graph runs.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..implementation import Choice, Unsupported, choose, chosen, gpu, kernel_refusal
from ..reference.recurrent import single
from . import loop
from .library import operator
from .recurrent import SAVED, fold


def choice(cell: str, input: Tensor, w_hh: Tensor) -> Choice:
    """Which implementation runs a step: input ``[B, I]``, w_hh ``[G*H, H]``."""

    def fastest() -> tuple[str, str]:
        if not gpu(input):
            return "torch", "on the CPU PyTorch's own operator is the fastest"
        return "torch", "no measurement shows the kernels to be faster on this device"

    return choose(
        {
            "triton": lambda: kernel_refusal(cell, input, w_hh),
            "torch": lambda: None,
            "reference": lambda: None,
        },
        fastest,
    )


def _kernels() -> ModuleType:
    from ..kernels.recurrent import cell

    return cell  # type: ignore[no-any-return]


def _by_kernels(implementation: str, cell: str, input: Tensor, w_hh: Tensor) -> bool:
    if not implementation:
        if chosen() == "reference":
            raise Unsupported("reference: not inside a compiled graph")
        implementation = choice(cell, input, w_hh).name
    return implementation == "triton"


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(
    cell: str,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    keep: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    (B, H), save, empty = h.shape, keep == "gates", h.new_empty(0)
    if _by_kernels(implementation, cell, input, w_hh):
        new, c_new, gates = _kernels().cell_forward(
            cell,
            *_contiguous(input, h, c, w_ih, w_hh, b_ih, b_hh),
            save=save,
            allow_tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        )
    else:  # a sequence of one step
        bias, recurrent_bias = fold(cell, b_ih, b_hh)
        x = torch.nn.functional.linear(input, w_ih, bias)[None, :, None]
        one: Any = [None if t is None else t[None].contiguous() for t in (w_hh, recurrent_bias, None, h, c)]
        one += [None, None]
        _, new, c_new, _, gates = loop.sequence_forward(cell, x, *one, save=save, allow_tf32=False)
    return (
        new.view(B, H),
        empty if c_new is None else c_new.view(B, H),
        empty.clone() if gates is None else gates.view(B, -1, H),
    )


def _shapes(cell: str, input: Tensor, h: Tensor, c: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    B, H = h.shape
    gates = (B, SAVED[cell], H) if rest[-2] == "gates" else (0,)
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
    h_new: Tensor,
    c_new: Tensor,
    gates: Tensor,
    samples: int | None,
    implementation: str,
) -> tuple[Tensor, ...]:
    (B, H), after = h.shape, None if c is None else c_new
    dh = torch.zeros_like(h) if dh is None else dh
    dc = torch.zeros_like(c) if dc is None and c is not None else dc
    dc = None if c is None else dc
    if _by_kernels(implementation, cell, input, w_hh):
        dx, dr, dinput, dh, dc = _kernels().cell_backward(
            cell,
            *_contiguous(dh, dc, gates, h, c, after, w_ih, w_hh),
            allow_tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        )
    else:
        wide = torch.promote_types(input.dtype, torch.float32)
        dx, dr, _, dh, dc = loop.sequence_backward(
            cell,
            dh.reshape(1, B, 1, H),
            torch.zeros_like(h)[None],
            None if dc is None else dc.contiguous()[None],
            None,
            gates.view(1, B, 1, -1, H),
            None if after is None else after.to(wide).view(1, B, 1, H),
            h.reshape(1, B, 1, H),
            None if c is None else c.to(wide).reshape(1, B, 1, H),
            w_hh.contiguous()[None],
            None,
            None,
            None,
            allow_tf32=False,
        )
        dx, dr = dx.flatten(0, 2), dr.flatten(0, 2)
        dinput, dh, dc = dx @ w_ih, dh.view(B, H), None if dc is None else dc.view(B, H)
    none = input.new_empty(0)
    of_weights: list[Tensor | None] = [None] * 4
    if samples == 0:
        of_weights = [None if w is None else w.new_empty(0, *w.shape) for w in (w_ih, w_hh, b_ih, b_hh)]
    else:
        if samples is not None:  # groups of rows
            dx, dr, input, h = (t.unflatten(0, (samples, B // samples)) for t in (dx, dr, input, h))
        of_weights[:2] = dx.mT @ input, dr.mT @ h
        of_weights[2:] = None if b_ih is None else dx.sum(-2), None if b_hh is None else dr.sum(-2)
    return dinput, dh, none if dc is None else dc, *(none.clone() if g is None else g for g in of_weights)


step = operator(
    "cell",
    settings="str cell",
    inputs="Tensor input, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh",
    differentiable=7,
    outputs=3,  # h, c, gates
    keeps=True,
    forward=_forward,
    shapes=_shapes,
    backward=_backward,
    formula=single,
    rows={"input": 0, "h": 0, "c": 0},
)
