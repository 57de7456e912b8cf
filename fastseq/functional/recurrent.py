"""The recurrent operators as functions.

The stateless counterparts of the modules in ``fastseq.nn``; each takes what ``torch.lstm`` and its sisters take.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import implementation
from ..implementation import Choice, chosen, transforms
from ..ops import cell as cell_ops
from ..ops import crossover
from ..ops import recurrent as sequence_ops
from ..ops.library import needs_gradient
from ..ops.stock import stock
from ..reference import recurrent as reference
from .autocast import autocasting, plainly

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

# What CPU autocast leaves in fp32; everything else, and all of it on a GPU, runs in the autocast dtype.
_NOT_CAST_ON_CPU = {"gru", "gru_cell", "lstm_cell"}


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """Long short-term memory (Hochreiter & Schmidhuber 1997), as ``torch.lstm``.

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` when ``batch_first``.
        hx: h_0 ``[L*D, B, P]`` and c_0 ``[L*D, B, H]``, for L layers of D directions.
        params: the weights of each layer and direction in ``torch.nn.LSTM``'s order.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as in ``torch.lstm``.
        reset: bool ``[T, B]`` (``[B, T]`` when ``batch_first``); where true the state is zero before the step
            reads it, in each direction's own order.
        lengths: integers ``[B]``; steps past a row's end output zeros and leave its state as it is.
        return_cells: also return every c_t of the last layer, ``[T, B, D*H]``.
        recompute: keep no gates for the gradient but compute them again: less memory, one more matrix product.

    Returns:
        output ``[T, B, D*P]``, h_n ``[L*D, B, P]``, c_n ``[L*D, B, H]``, and the cells if asked for.

    Raises:
        TypeError, ValueError: ``reset`` or ``lengths`` have the wrong dtype, shape or values.
        Unsupported: ``use`` names an implementation that cannot.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.LSTM(4, 8)
        >>> hx = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
        >>> y, h, c = fastseq.functional.lstm(
        ...     torch.randn(5, 2, 4), hx, m._flat_weights, True, 1, 0.0, False, False, False,
        ...     lengths=torch.tensor([5, 3]))
    """
    return sequence(
        "lstm", input, tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        reset=reset, lengths=lengths, return_cells=return_cells, recompute=recompute,
    )  # fmt: skip


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """Gated recurrent unit (Cho et al. 2014, with the reset after the product), as ``torch.gru``.

    Arguments, errors and results as in :func:`lstm`, with ``hx`` the one tensor h_0 ``[L*D, B, H]``. The state is
    h, so the cells are the output itself.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.GRU(4, 8)
        >>> y, h = fastseq.functional.gru(
        ...     torch.randn(5, 2, 4), torch.zeros(1, 2, 8), m._flat_weights, True, 1, 0.0, False, False, False)
    """
    return sequence(
        "gru", input, (hx,), params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
        reset=reset, lengths=lengths, return_cells=return_cells, recompute=recompute,
    )  # fmt: skip


def rnn(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """Elman network (Elman 1990), as ``torch.rnn_tanh`` and ``torch.rnn_relu``.

    Arguments, errors and results as in :func:`gru`; ``nonlinearity`` is ``"tanh"`` or ``"relu"``, anything else a
    ValueError.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.RNN(4, 8)
        >>> y, h = fastseq.functional.rnn(
        ...     torch.randn(5, 2, 4), torch.zeros(1, 2, 8), m._flat_weights, True, 1, 0.0, False, False, False)
    """
    return sequence(
        _rnn(nonlinearity), input, (hx,), params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first, reset=reset, lengths=lengths, return_cells=return_cells, recompute=recompute,
    )  # fmt: skip


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as ``torch.lstm_cell``: input ``[B, I]``, h and c ``[B, H]``; returns the new h and c.

    ``reset`` is bool ``[B]``: where true, the state is zero before the step reads it.

    Raises:
        TypeError, ValueError: ``reset`` has the wrong dtype or shape.
        Unsupported: ``use`` names an implementation that cannot.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.LSTMCell(4, 8)
        >>> h, c = fastseq.functional.lstm_cell(
        ...     torch.randn(2, 4), (torch.zeros(2, 8), torch.zeros(2, 8)), *m.parameters())
    """
    h, c = single("lstm", input, (hx[0], hx[1]), (w_ih, w_hh, b_ih, b_hh), reset)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.gru_cell``: input ``[B, I]``, h ``[B, H]``; returns the new h.

    ``reset``, errors: as in :func:`lstm_cell`.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.GRUCell(4, 8)
        >>> h = fastseq.functional.gru_cell(torch.randn(2, 4), torch.zeros(2, 8), *m.parameters())
    """
    return single("gru", input, (hx,), (w_ih, w_hh, b_ih, b_hh), reset)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reset: Tensor | None = None,
) -> Tensor:
    """One step of an Elman network, as ``torch.rnn_tanh_cell`` and ``torch.rnn_relu_cell``.

    Shapes, ``reset`` and errors as in :func:`gru_cell`; ``nonlinearity`` as in :func:`rnn`.

    Example:
        >>> import torch, fastseq
        >>> m = torch.nn.RNNCell(4, 8)
        >>> h = fastseq.functional.rnn_cell(torch.randn(2, 4), torch.zeros(2, 8), *m.parameters())
    """
    return single(_rnn(nonlinearity), input, (hx,), (w_ih, w_hh, b_ih, b_hh), reset)[0]


def _rnn(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


# ----------------------------------------------------------------------------------------------- below the face


def sequence(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_cells: bool = False,
    recompute: bool = False,
    own: int = 0,
    recurrent_dropout: float | None = None,  # floats by default would be symbols to torch.compile
    zoneout: tuple[float, float] | None = None,
) -> tuple[Tensor, ...]:
    """All cells, packed or padded: ``batch_sizes`` says that the input is the data of a sorted PackedSequence.

    hx is h, or h and the cells side by side; the last ``own`` params of each layer and direction are the step's.
    ``recurrent_dropout`` and ``zoneout`` (of h and of the cells) are probabilities.
    """
    dtype = _autocast_dtype(cell, input, hx[0])
    if dtype is not None:
        input, *rest = (t.to(dtype) for t in (input, *hx, *params))
        hx, params = tuple(rest[: len(hx)]), rest[len(hx) :]
        with torch.autocast(input.device.type, enabled=False):
            return sequence(
                cell, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first,
                batch_sizes=batch_sizes, reset=reset, lengths=lengths, return_cells=return_cells,
                recompute=recompute, own=own, recurrent_dropout=recurrent_dropout, zoneout=zoneout,
            )  # fmt: skip

    if batch_sizes is None:
        T, B = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
        check_reset(reset, tuple(input.shape[:2]), "[B, T]" if batch_first else "[T, B]", input.device)
        check_lengths(lengths, (B,), "[B]", T)
    beyond = bool(return_cells or recompute or cell not in sequence_ops.SAVED or recurrent_dropout or zoneout)
    plain = reset is None and lengths is None and not beyond
    name = way = ""  # a compiled graph carries no choice: it is made when the graph runs
    if not torch.compiler.is_compiling():
        steps = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
        rows = input.shape[0 if batch_first else 1] if batch_sizes is None else int(not plain)
        way = crossover.engine(
            cell, input, hx, params, rows, steps, reset=reset is not None,
            lengths=lengths is not None or (batch_sizes is not None and not plain), beyond=beyond,
        )  # fmt: skip
        mapped, forward_mode = transforms()
        plain = plain and not mapped  # PyTorch's own operators have no batching rule
        name = choose_sequence(cell, input, params, steps, not plain, way).name
        if forward_mode and chosen() == "auto":
            name = "reference"  # operators, PyTorch's fused ones included, have no forward mode
        way = way if name == "torch" else ""
        if plain and name == "torch":
            settings = (has_biases, num_layers, dropout, train, bidirectional)
            return stock(cell, input, hx, params, settings, batch_first, batch_sizes)

    packed_lengths = None
    if batch_sizes is not None:
        input, packed_lengths = pad_packed_sequence(PackedSequence(input, batch_sizes))
        lengths = packed_lengths
    elif batch_first:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    if lengths is not None:
        lengths = lengths.to(input.device, torch.int64, non_blocking=True)
        # Whatever stands behind a row's end, NaN included, must not be seen, nor reach the weights' gradients.
        if way != "packed":
            behind = torch.arange(input.shape[0], device=input.device)[:, None] >= lengths
            input = input.masked_fill(behind[:, :, None], 0)

    if needs_gradient((input, *hx, *params)):
        keep = "cells" if recompute else "gates"
    else:
        keep = "cells" if return_cells else "nothing"

    def run(*args: Any) -> Any:
        *given, rows = (*args, None)[:9]
        (T, B), (D, _, P) = args[0].shape[:2], args[2].shape
        scale = stay = None
        if train and recurrent_dropout:
            kept = torch.empty(D, B, P, dtype=torch.bool, device=input.device).bernoulli(1 - recurrent_dropout)
            scale = kept.to(input.dtype) / ((1 - recurrent_dropout) or 1.0)
        if zoneout:
            stay = _staying(zoneout, reference.CELLS[cell].cells, (T, B, D, 1, P) if train else None, input.device)
        if way in ("training", "packed", "onednn"):
            found = crossover.run(way, cell, given, reset, lengths)
            if found is not None:
                return found
        everything: Any = (cell, *given, rows, scale, stay, reset, lengths)
        if name == "reference":
            return reference.layer(*everything)
        return sequence_ops.recurrent(*everything, keep, name)[:4]

    stacks = reference.stacked(params, has_biases, num_layers, 2 if bidirectional else 1, own)
    with plainly(input.device.type):
        y, final, cells = reference.network(run, input, hx, stacks, dropout if train else 0.0)
    cells = cells.to(y.dtype) if len(hx) == 2 and cells is not None else y
    outputs = [y, cells] if return_cells else [y]
    if packed_lengths is not None:
        outputs = [pack_padded_sequence(t, packed_lengths).data for t in outputs]
    elif batch_first:
        outputs = [t.transpose(0, 1) for t in outputs]
    return (outputs[0], *final, *outputs[1:])


def _staying(rates: tuple[float, float], C: int, size: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """Zoneout: which values of which states stay, bool ``[T, B, D, 1 + C, H]``; without a size, how much of each does.

    One draw serves all cells of a unit, which mean nothing without each other.
    """
    if size is None:
        return torch.cat(
            [torch.full((n,), p, dtype=torch.float32, device=device) for n, p in zip((1, C), rates, strict=True)]
        )
    h, c = (torch.empty(size, dtype=torch.bool, device=device).bernoulli(p) for p in rates)
    return torch.cat((h, *[c] * C), dim=3)


def choose_sequence(
    cell: str, input: Tensor, params: Sequence[Tensor], steps: int, beyond: bool, on_cpu: str = "loop"
) -> Choice:
    """Which implementation runs a whole sequence, all layers alike; ``beyond`` if a keyword of ours is used."""
    return sequence_ops.choice(cell, input, params[1], steps, beyond, on_cpu)


def choose_single(cell: str, input: Tensor, w_hh: Tensor) -> Choice:
    """Which implementation runs one step."""
    return cell_ops.choice(cell, input, w_hh)


def check_reset(reset: Any, shape: tuple[int, ...], letters: str, device: torch.device) -> None:
    """Raise unless ``reset`` is None or a bool tensor of this shape (named by letters) on this device."""
    if reset is None:
        return
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset: expected a bool tensor {letters}, got {got}")
    if tuple(reset.shape) != shape:
        raise ValueError(f"reset: expected {letters} = {list(shape)}, got {list(reset.shape)}")
    if reset.device != device:
        raise ValueError(f"reset: expected device {device} as the input, got {reset.device}")


def check_lengths(lengths: Any, shape: tuple[int, ...], letters: str, longest: int) -> None:
    """Raise unless ``lengths`` is None or integers of this shape; values are checked where that costs no sync."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected an integer tensor {letters}, got {got}")
    if tuple(lengths.shape) != shape:
        raise ValueError(f"lengths: expected {letters} = {list(shape)}, got {list(lengths.shape)}")
    by_value = not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(lengths)
    if by_value and lengths.device.type == "cpu" and lengths.numel():
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > longest:
            raise ValueError(f"lengths: expected values from 0 to T = {longest}, got {low} to {high}")


def single(
    cell: str,
    input: Tensor,
    hx: tuple[Tensor, ...],
    weights: Any,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    """One step of any cell with its four weights (None for an absent bias); returns its states."""
    if reset is not None:
        check_reset(reset, (input.shape[0],), "[B]", input.device)
        hx = tuple(state.masked_fill(reset[:, None], 0) for state in hx)
    mapped = False
    if not torch.compiler.is_compiling():
        name = choose_single(cell, input, weights[1]).name
        mapped, forward_mode = transforms()
        if forward_mode and chosen() == "auto":
            name = "reference"
    else:  # PyTorch's own cells compile as they are; a choice by name is obeyed when the graph runs
        name = "" if implementation.named else "torch"
    if name == "torch" and not mapped:
        states = getattr(torch, f"{cell}_cell")(input, hx if cell == "lstm" else hx[0], *weights)
        return states if cell == "lstm" else (states,)
    new: Any
    dtype = _autocast_dtype(f"{cell}_cell", input, hx[0])
    if dtype is not None:
        input, hx = input.to(dtype), tuple(state.to(dtype) for state in hx)
        weights = [None if w is None else w.to(dtype) for w in weights]
    state: Any = (*hx, None)[:2]
    with plainly(input.device.type):
        if name == "reference":
            new = reference.single(cell, input, *state, *weights)
        else:
            keep = "gates" if needs_gradient((input, *hx, *weights)) else "nothing"
            new = cell_ops.step(cell, input, *state, *weights, keep, name)
    return tuple(new[: len(hx)])


def _autocast_dtype(cell: str, input: Tensor, state: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of this cell, as PyTorch's own operators follow it; None to leave it alone."""
    device = input.device.type
    if not autocasting(device) or input.dtype == torch.float64:
        return None
    if device == "cpu" and cell in _NOT_CAST_ON_CPU:
        return state.dtype  # these add cast products to a state that is not cast: its dtype wins
    return torch.get_autocast_dtype(device)
