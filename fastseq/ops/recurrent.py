"""One recurrent layer, in one or both directions, as the operator ``fastseq::recurrent``, and its gradient.

The operator is opaque to ``torch.compile`` and ``torch.export``. Its gradient is a second operator, whose own
gradient (when a graph is asked for) is the reference formula's. The weights of the directions are stacked along a
first axis D; the other letters are those of ``fastseq.reference.recurrent``.
"""

from types import ModuleType
from typing import Any

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
from torch import Tensor

from ..implementation import Choice, Unsupported, choose, chosen, gpu, kernel_refusal
from ..reference.recurrent import CELLS, layer
from . import loop
from .library import operator

SAVED = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}  # values a step saves per hidden unit
CUDNN_LONGEST = 65_535  # steps; cuDNN fails beyond (pytorch/pytorch#133751)


def choice(cell: str, input: Tensor, w_hh: Tensor, steps: int, beyond: bool) -> Choice:
    """Which implementation runs a layer, and why.

    w_hh ``[..., G*H, P]``; ``steps``: of time, which packed data hides;
    ``beyond``: more is asked than PyTorch's own operator does.
    """

    def fastest() -> tuple[str, str]:
        if not gpu(input):
            if beyond:
                return "torch", "on the CPU, a loop over time in PyTorch"
            return "torch", "on the CPU PyTorch's own operator is the fastest"
        if beyond:
            return "triton", "PyTorch's own operator cannot do this, and a loop in Python is slower than kernels"
        if steps > CUDNN_LONGEST:
            return "triton", f"cuDNN fails beyond {CUDNN_LONGEST} steps"
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
    from ..kernels.recurrent import sequence

    return sequence  # type: ignore[no-any-return]


def _engine(name: str) -> Any:
    return loop if name == "torch" else _kernels()


def _resolve(implementation: str, cell: str, input: Tensor, w_hh: Tensor) -> str:
    """A compiled graph carries no choice: it is made when the graph runs."""
    if implementation:
        return implementation
    if chosen() == "reference":
        raise Unsupported("reference: a compiled graph would unroll its loop over time")
    return choice(cell, input, w_hh, input.shape[0], beyond=True).name


def _tf32() -> bool:
    return bool(cudnn_rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]  # made at import


def fold(cell: str, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the input gates and that of the recurrent gates: one, where the step only adds the gates up."""
    if b_ih is None or b_hh is None or cell == "gru":
        return b_ih, b_hh
    return b_ih + b_hh, None


def _input_gates(input: Tensor, w_ih: Tensor, bias: Tensor | None) -> Tensor:
    """All input gates of both directions in one matrix product: ``[T, B, D, G*H]``."""
    T, B, _ = input.shape
    D, GH, _ = w_ih.shape
    flat = None if bias is None else bias.reshape(-1)
    return torch.nn.functional.linear(input, w_ih.reshape(D * GH, -1), flat).view(T, B, D, GH)


def _previous(after: Tensor, initial: Tensor, reset: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The state that each step read, from the states ``[T, B, D, N]`` the steps wrote and the initial ``[D, B, N]``."""
    before = torch.empty_like(after)
    before[1:, :, 0] = after[:-1, :, 0]
    before[0, :, 0] = initial[0]
    if after.shape[2] == 2:
        before[:-1, :, 1] = after[1:, :, 1]
        before[-1, :, 1] = initial[1]
        if lengths is not None:
            steps = torch.arange(after.shape[0], device=after.device)[:, None]
            before[:, :, 1] = torch.where((steps == lengths - 1)[..., None], initial[1], before[:, :, 1])
    if reset is not None:
        before.masked_fill_(reset[:, :, None, None], 0)
    return before


def _forward(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    keep: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    name = _resolve(implementation, cell, input, w_hh)
    empty = input.new_empty(0)
    if name == "torch" and keep == "nothing" and reset is None and lengths is None:
        y, *final = _stock(cell, input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)
        return (y, *final, *([empty] if c0 is None else []), _wide(empty), empty.clone())
    bias, recurrent_bias = fold(cell, b_ih, b_hh)
    y, h_n, c_n, cells, gates = _engine(name).sequence_forward(
        cell,
        _input_gates(input, w_ih, bias),
        *_contiguous(w_hh, recurrent_bias, w_hr, h0, c0, reset, lengths),
        save=keep == "gates",
        allow_tf32=_tf32(),
    )
    return (
        y.flatten(2),
        h_n,
        empty if c_n is None else c_n,
        _wide(empty) if cells is None or keep == "nothing" else cells.flatten(2),
        empty.clone() if gates is None else gates,
    )


def _stock(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
) -> Any:
    """The layer as PyTorch ships it."""
    bidirectional = w_ih.shape[0] == 2
    weights = [w[d] for d in range(w_ih.shape[0]) for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    hx = h0 if c0 is None else (h0, c0)
    return getattr(torch, cell)(input, hx, weights, b_ih is not None, 1, 0.0, False, bidirectional, False)


def _wide(like: Tensor) -> Tensor:
    """Cells are kept in fp32, or fp64 when everything is."""
    return like.to(_wide_dtype(like), copy=True)


def _wide_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _shapes(cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    T, B, _ = input.shape
    (D, GH, _), P = w_ih.shape, w_hh.shape[2]
    H = GH // CELLS[cell].gates
    keep, has_c = rest[-2], CELLS[cell].states == 2
    gates = (T, B, D, SAVED[cell], H) if keep == "gates" else (0,)
    cells = (T, B, D * H) if has_c and keep != "nothing" else (0,)
    return (
        input.new_empty(T, B, D * P),
        input.new_empty(D, B, P),
        input.new_empty((D, B, H) if has_c else (0,)),
        input.new_empty(cells, dtype=_wide_dtype(input)),
        input.new_empty(gates),
    )


def _backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor,
    gates: Tensor,
    implementation: str,
) -> tuple[Tensor, ...]:
    T, B, I = input.shape  # noqa: E741  (the field's letter)
    (D, GH, _), P, H = w_ih.shape, w_hh.shape[2], w_ih.shape[1] // CELLS[cell].gates
    engine = _engine(_resolve(implementation, cell, input, w_hh))
    h_prev = _previous(y.view(T, B, D, P), h0, reset, lengths)
    c_prev = after = None
    if c0 is not None:
        after = cells.view(T, B, D, H)
        c_prev = _previous(after, c0.to(cells.dtype), reset, lengths)
    if gates.numel() == 0:
        gates = _gates_again(engine, cell, input, w_ih, w_hh, b_ih, b_hh, h_prev, c_prev)
    if dy is None:
        dy = torch.zeros_like(y)
    if dh_n is None:
        dh_n = torch.zeros_like(h0)
    if c0 is not None and dc_n is None:
        dc_n = torch.zeros_like(c0)
    dx, dh, dproj, dh0, dc0 = engine.sequence_backward(
        cell,
        dy.contiguous().view(T, B, D, P),
        *_contiguous(dh_n, dc_n if c0 is not None else None),
        None if dcells is None or c0 is None else dcells.contiguous().view(T, B, D, H),
        gates,
        after,
        h_prev,
        c_prev,
        *_contiguous(w_hh, w_hr, reset, lengths),
        allow_tf32=_tf32(),
    )
    flat = dx.view(T * B, D * GH)
    db = dx.sum((0, 1)) if b_ih is not None else None
    dw_hr = None
    if w_hr is not None:
        hidden = gates[:, :, :, 3].to(cells.dtype) * cells.view(T, B, D, H).tanh()
        dw_hr = _weight_gradient(dproj, hidden.to(dproj.dtype))
    none = input.new_empty(0)
    return (
        (flat @ w_ih.reshape(D * GH, I)).view(T, B, I),
        (flat.t() @ input.reshape(T * B, I)).view(D, GH, I),
        _weight_gradient(dh, h_prev),
        none if db is None else db,
        none.clone() if db is None else (db.clone() if dh is dx else dh.sum((0, 1))),
        none.clone() if dw_hr is None else dw_hr,
        dh0,
        none.clone() if dc0 is None else dc0,
    )


def _gates_again(
    engine: Any,
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor | None,
) -> Tensor:
    """The gates of every step, recomputed from the states they read: one matrix product in place of T."""
    T, B, D, _ = h_prev.shape
    bias, recurrent_bias = fold(cell, b_ih, b_hh)
    x = _input_gates(input, w_ih, bias)
    h = torch.einsum("tbdp,dgp->tbdg", h_prev, w_hh)
    if recurrent_bias is not None:
        h = h + recurrent_bias
    GH, H = x.shape[-1], x.shape[-1] // CELLS[cell].gates
    before = None if c_prev is None else c_prev.view(-1, H)
    gates = engine.step_gates(cell, x.view(-1, GH), h.reshape(-1, GH), before)
    return gates.view(T, B, D, SAVED[cell], H)  # type: ignore[no-any-return]


def _weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """The sum over time and batch of d ⊗ x, for each direction: ``[T, B, D, M], [T, B, D, N] -> [D, M, N]``."""
    T, B, D, M = d.shape
    return torch.bmm(d.view(T * B, D, M).permute(1, 2, 0), x.flatten(0, 1).transpose(0, 1))


recurrent = operator(
    "recurrent",
    settings="str cell",
    inputs="Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h0, Tensor? c0, "
    "Tensor? reset, Tensor? lengths",
    differentiable=8,
    outputs=5,  # y, h_n, c_n, cells, gates
    keeps=True,
    forward=_forward,
    shapes=_shapes,
    backward=_backward,
    formula=layer,
)
