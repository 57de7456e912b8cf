"""One recurrent layer, in one or both directions, as the operator ``fastseq::recurrent``, and its gradient.

The operator is opaque to ``torch.compile`` and ``torch.export``. Its gradient is a second operator, whose own
gradient (when a graph is asked for) is the reference formula's. The weights of the directions are stacked along a
first axis D; the other letters are those of ``fastseq.reference.recurrent``.
"""

import dataclasses
from types import ModuleType
from typing import Any

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
from torch import Tensor

from ..implementation import Choice, Unsupported, choose, chosen, gpu, kernel_refusal
from ..reference.recurrent import CELLS, layer
from . import crossover, derived, loop
from .library import operator

SAVED = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}  # values a stock cell's step saves per hidden unit
CUDNN_LONGEST = 65_535  # steps; cuDNN fails beyond (pytorch/pytorch#133751)


def choice(cell: str, input: Tensor, w_hh: Tensor, steps: int, beyond: bool, on_cpu: str = "loop") -> Choice:
    """Which implementation runs a layer, and why.

    w_hh ``[..., G*H, P]``; ``steps``: of time, which packed data hides;
    ``beyond``: more is asked than PyTorch's own operator does; ``on_cpu``: what ``crossover.engine`` says.
    """

    def fastest() -> tuple[str, str]:
        if not gpu(input):
            return "torch", crossover.REASONS[on_cpu]
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


def explained(choice: Choice, cell: str, input: Tensor, w_hh: Tensor, rows: int, directions: int) -> Choice:
    """A choice that fell on the kernels, with the regime in which they run on so many rows, and why that one."""
    if choice.name != "triton":
        return choice
    from ..kernels.limits import limits
    from ..kernels.recurrent.plan import plan

    GH, P = w_hh.shape[-2:]
    H = GH // CELLS[cell].gates
    how = plan(cell, H, P, input.dtype, _tf32(), limits(input.device), rows, directions)
    return dataclasses.replace(choice, reason=f"{choice.reason}; {how.regime}: {how.why}")


def _kernels() -> ModuleType:
    from ..kernels.recurrent import sequence

    return sequence  # type: ignore[no-any-return]


def _engine(name: str) -> Any:
    return loop if name == "torch" else _kernels()


def _derived(name: str, cell: str, scale: Tensor | None, stay: Tensor | None) -> bool:
    """Whether PyTorch's loop has nothing but the step to go by."""
    return name == "torch" and (cell not in SAVED or scale is not None or stay is not None)


def _rows_saved(cell: str, scale: Tensor | None, stay: Tensor | None, keep: str, implementation: str) -> int:
    """How many values per hidden unit forward keeps beside the states.

    Under zoneout none, as backward needs states that were not kept. Nor where only the running graph will know whether
    kernels run, which save, or a loop that saves nothing.
    """
    if keep != "gates" or stay is not None:
        return 0
    if cell in SAVED and scale is None:
        return SAVED[cell]
    return int(_kernels().STEPS[cell].saved) if implementation == "triton" else 0


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
    if b_ih is None or b_hh is None or CELLS[cell].splits:
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
    params: Tensor | None,
    scale: Tensor | None,
    stay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    keep: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    name = _resolve(implementation, cell, input, w_hh)
    empty, gates = input.new_empty(0), None
    bias, recurrent_bias = fold(cell, b_ih, b_hh)
    if _derived(name, cell, scale, stay):
        y, h_n, c_n, cells = derived.sequence_forward(
            cell, _input_gates(input, w_ih, bias), w_hh, recurrent_bias, h0, c0, params, scale, stay, reset, lengths
        )
    elif name == "torch" and keep == "nothing" and reset is None and lengths is None:
        y, *final = _stock(cell, input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)
        return (y, *final, *([empty] if c0 is None else []), _wide(empty), empty.clone())
    else:
        own = () if name == "torch" else (params, scale, stay)
        y, h_n, c_n, cells, gates = _engine(name).sequence_forward(
            cell,
            _input_gates(input, w_ih, bias),
            *_contiguous(w_hh, recurrent_bias, w_hr, h0, c0, *own, reset, lengths),
            save=_rows_saved(cell, scale, stay, keep, implementation) > 0,
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


def _shapes(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    params: Tensor | None,
    scale: Tensor | None,
    stay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    keep: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    T, B, _ = input.shape
    (D, GH, _), P = w_ih.shape, w_hh.shape[2]
    H, C = GH // CELLS[cell].gates, CELLS[cell].cells
    S = _rows_saved(cell, scale, stay, keep, implementation)
    return (
        input.new_empty(T, B, D * P),
        input.new_empty(D, B, P),
        input.new_empty((D, B, C * H) if C else (0,)),
        input.new_empty((T, B, D * C * H) if C and keep != "nothing" else (0,), dtype=_wide_dtype(input)),
        input.new_empty((T, B, D, S, H) if S else (0,)),
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
    params: Tensor | None,
    scale: Tensor | None,
    stay: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor,
    gates: Tensor,
    samples: int | None,
    implementation: str,
) -> tuple[Tensor, ...]:
    T, B, I = input.shape  # noqa: E741  (the field's letter)
    (D, GH, _), P, H = w_ih.shape, w_hh.shape[2], w_ih.shape[1] // CELLS[cell].gates
    name = _resolve(implementation, cell, input, w_hh)
    h_prev = _previous(y.view(T, B, D, P), h0, reset, lengths)
    c_prev = after = None
    if c0 is not None:
        after = cells.view(T, B, D, CELLS[cell].cells * H)
        c_prev = _previous(after, c0.to(cells.dtype), reset, lengths)
    operand = h_prev if scale is None else h_prev * scale.transpose(0, 1)
    from_gates = _derived(name, cell, scale, stay)
    if from_gates or gates.numel() == 0:
        x, h = _gates(cell, input, w_ih, w_hh, b_ih, b_hh, operand)
        if not from_gates:
            gates, after = _gates_again(name, cell, x, h, h_prev, c_prev, params, after)
    if dy is None:
        dy = torch.zeros_like(y)
    if dh_n is None:
        dh_n = torch.zeros_like(h0)
    if c0 is not None and dc_n is None:
        dc_n = torch.zeros_like(c0)
    arriving = (
        dy.contiguous().view(T, B, D, P),
        *_contiguous(dh_n, dc_n if c0 is not None else None),
        None if dcells is None or c0 is None else dcells.contiguous().view(T, B, D, CELLS[cell].cells * H),
    )
    dproj: Any = None
    if from_gates:
        everything: Any = (*arriving, x, h, h_prev, c_prev, w_hh, params, scale, stay, reset, lengths)
        dx, dh, dh0, dc0, *rest = derived.sequence_backward(cell, *everything)
    else:
        own = () if name == "torch" else (params, scale, stay)
        dx, dh, dproj, dh0, dc0, *rest = _engine(name).sequence_backward(
            cell,
            *arriving,
            gates,
            after,
            h_prev,
            c_prev,
            *_contiguous(w_hh, w_hr, *own, reset, lengths),
            allow_tf32=_tf32(),
        )
    dparams = rest[0] if rest else None
    none = input.new_empty(0)
    of_weights: list[Tensor | None] = [None] * 6
    if samples == 0:
        of_weights = [None if w is None else w.new_empty(0, *w.shape) for w in (w_ih, w_hh, b_ih, b_hh, w_hr, params)]
    else:
        of_input = _weight_gradient(dx.view(T, B, 1, D * GH), input[:, :, None], samples)
        of_weights[:2] = of_input.view(*of_input.shape[:-3], D, GH, I), _weight_gradient(dh, operand, samples)
        if b_ih is not None:
            db = _bias_gradient(dx, samples)
            of_weights[2:4] = db, db.clone() if dh is dx else _bias_gradient(dh, samples)
        if w_hr is not None:
            hidden = gates[:, :, :, 3].to(cells.dtype) * cells.view(T, B, D, H).tanh()
            of_weights[4] = _weight_gradient(dproj, hidden.to(dproj.dtype), samples)
        of_weights[5] = None if dparams is None else dparams.to(input.dtype)
    *of_layer, of_params = [none.clone() if g is None else g for g in of_weights]
    return (
        (dx.view(T * B, D * GH) @ w_ih.reshape(D * GH, I)).view(T, B, I),
        *of_layer,
        dh0,
        none if dc0 is None else dc0,
        of_params,
    )


def _gates(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    operand: Tensor,
) -> tuple[Tensor, Tensor]:
    """The input gates and the recurrent gates of every step, from what entered its product: one in place of T."""
    bias, recurrent_bias = fold(cell, b_ih, b_hh)
    h = torch.einsum("tbdp,dgp->tbdg", operand, w_hh)
    return _input_gates(input, w_ih, bias), h if recurrent_bias is None else h + recurrent_bias


def _gates_again(
    name: str,
    cell: str,
    x: Tensor,
    h: Tensor,
    h_prev: Tensor,
    c_prev: Tensor | None,
    params: Tensor | None,
    after: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What the steps would have saved, and the cells that they left: not those kept, under zoneout."""
    T, B, D, GH = x.shape
    H = GH // CELLS[cell].gates
    if name == "torch":
        before = None if c_prev is None else c_prev.view(-1, H)
        gates = loop.step_gates(cell, x.view(-1, GH), h.reshape(-1, GH), before)
        return gates.view(T, B, D, SAVED[cell], H), after
    flat = [None if t is None else t.contiguous().flatten(0, 1) for t in (x, h, c_prev)]
    gates, after = _kernels().step_gates(cell, *flat, *_contiguous(params), state=h_prev.flatten(0, 1))
    return gates.unflatten(0, (T, B)), None if after is None else after.unflatten(0, (T, B))


def _weight_gradient(d: Tensor, x: Tensor, samples: int | None) -> Tensor:
    """The sum over time and batch of d ⊗ x, for each direction: ``[T, B, D, M], [T, B, D, N] -> [D, M, N]``.

    With samples, groups of rows that lie one after another: ``[samples, D, M, N]``.
    """
    T, B, D, M = d.shape
    if samples is None and D == 1:
        return (d.view(T * B, M).t() @ x.reshape(T * B, x.shape[-1]))[None]
    if samples is None:
        return torch.bmm(d.view(T * B, D, M).permute(1, 2, 0), x.flatten(0, 1).transpose(0, 1))
    groups = [t.unflatten(1, (samples, B // samples)).permute(1, 3, 0, 2, 4).flatten(2, 3) for t in (d, x)]
    return torch.matmul(groups[0].mT, groups[1])


def _bias_gradient(d: Tensor, samples: int | None) -> Tensor:
    if samples is None:
        return d.sum((0, 1))
    return torch.sum(d.unflatten(1, (samples, d.shape[1] // samples)), (0, 2))


recurrent = operator(
    "recurrent",
    settings="str cell",
    inputs="Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h0, Tensor? c0, "
    "Tensor? params, Tensor? scale, Tensor? stay, Tensor? reset, Tensor? lengths",
    differentiable=9,
    outputs=5,  # y, h_n, c_n, cells, gates
    keeps=True,
    forward=_forward,
    shapes=_shapes,
    backward=_backward,
    formula=layer,
    rows={"input": 1, "h0": 1, "c0": 1, "scale": 1, "stay": 1, "reset": 1, "lengths": 0},
    summed=("params",),
)
