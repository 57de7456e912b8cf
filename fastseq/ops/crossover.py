"""Who runs a recurrent layer on a CPU: PyTorch's operator, or a way of ours where that was measured to be faster.

The numbers are those of ``python benchmarks/auto.py training``: ``training-threads1.json`` and ``-threads2.json`` in
``benchmarks/results/amd-epyc``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..implementation import chosen, gpu, transformed
from . import onednn, training
from .library import needs_gradient

REASONS = {
    "operator": "on the CPU PyTorch's own operator is the fastest",
    "training": "on the CPU, a loop over time that works in place",
    "packed": "on the CPU, PyTorch's own operator on packed rows",
    "onednn": "on the CPU, PyTorch's own operator with gates held open or shut",
    "loop": "on the CPU, a loop over time in PyTorch",
}
# B*H up to which a step of training in place beats PyTorch's: beyond, both are their matrix products.
_MOST = {"gru": 64 * 256, "rnn_tanh": 64 * 512, "rnn_relu": 64 * 512}
# Steps from which the call's own cost, that of a graph node of Python, is made up for.
_FEWEST = {"gru": 16, "rnn_tanh": 32, "rnn_relu": 32}
_MEASURED_THREADS = 2
_MOST_THREADED = 64 * 64  # where more threads could help neither: a step's operations run on one


def trains(cell: str, T: int, B: int, H: int, threads: int) -> bool:
    """Whether training a layer without resets and lengths is faster in place than through PyTorch's operator."""
    if cell not in _MOST or _FEWEST[cell] > T:
        return False
    most = _MOST[cell]
    if threads > _MEASURED_THREADS:
        most = min(most, _MOST_THREADED)
    return most >= B * H


def engine(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    batch: int,
    steps: int,
    *,
    reset: bool = False,
    lengths: bool = False,
    beyond: bool = False,
) -> str:
    """Which of the ways named in ``REASONS`` runs; ``beyond``: more is asked than resets and lengths."""
    plain = not (reset or lengths or beyond)
    otherwise = "operator" if plain else "loop"
    if beyond or batch == 0 or steps == 0 or input.device.type != "cpu" or transformed() or torch._C._is_tracing():
        return otherwise
    tensors = (input, *hx, *params)
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return otherwise
    if cell == "lstm":
        projected = params[1].shape[0] != 4 * params[1].shape[1]
        return otherwise if plain or projected or onednn.refusal(*tensors) else "onednn"
    if lengths and not reset and not needs_gradient(tensors) and training.refusal(cell, False, *tensors) is None:
        return "packed"
    if training.refusal(cell, lengths, *tensors) is not None:
        return otherwise
    if not plain:
        return "training"
    faster = trains(cell, steps, batch, params[1].shape[1], torch.get_num_threads())
    faster = faster and chosen() == "auto" and needs_gradient(tensors)
    return "training" if faster else otherwise


def trained(
    cell: str,
    input: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """What ``torch.gru`` and its sisters return, where training in place is faster; None where it is not."""
    if not torch.is_grad_enabled() or gpu(input) or torch._C._is_any_autocast_enabled() or input.dim() != 3:
        return None
    T, B = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    size = (num_layers * (2 if bidirectional else 1), B, params[1].shape[1])
    if input.shape[2] != params[0].shape[1] or h0.shape != size:
        return None
    if engine(cell, input, (h0,), params, B, T) != "training":
        return None
    settings = has_biases, num_layers, dropout, train, bidirectional, batch_first
    return training.network(cell, input, h0, params, *settings)


def run(way: str, cell: str, layer: Sequence[Any], reset: Tensor | None, lengths: Tensor | None) -> Any:
    """A layer as ``fastseq.reference.recurrent.layer``, without its cells; None if it cannot after all.

    ``layer`` is input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0.
    """
    input, w_ih, w_hh, b_ih, b_hh, _, h0, c0 = layer
    if way == "onednn":
        found = onednn.layer(input, w_ih, w_hh, b_ih, b_hh, h0, c0, reset, lengths)
        return None if found is None else (*found, None)
    if way == "packed":
        return _packed(cell, input, (w_ih, w_hh, b_ih, b_hh), h0, lengths)
    absent = [None] * len(w_ih)
    b_ih, b_hh = (absent if b is None else b for b in (b_ih, b_hh))
    return (*training.layer(cell, input, w_ih, w_hh, b_ih, b_hh, h0, reset, lengths), None, None)


def _packed(cell: str, input: Tensor, stacks: Sequence[Any], h0: Tensor, lengths: Any) -> Any:
    """A layer without a gradient: the rows sorted by length and packed, as PyTorch's operator wants them.

    What stands behind a row's end is not looked at.
    """
    needed, order = lengths.clamp_min(1).sort(descending=True)
    data, sizes = torch._pack_padded_sequence(input.index_select(1, order), needed, False)
    weights = [w[d] for d in range(len(h0)) for w in stacks if w is not None]
    state = h0.index_select(1, order)
    settings = stacks[2] is not None, 1, 0.0, False, len(h0) == 2
    y, h_n = getattr(torch, cell)(data, sizes, state, weights, *settings)
    y, _ = torch._pad_packed_sequence(y, sizes, False, 0.0, input.shape[0])
    back, none = order.argsort(), (lengths == 0)[:, None]
    y, h_n = y.index_select(1, back), h_n.index_select(1, back)
    if none.any():
        y, h_n = y.masked_fill_(none, 0), torch.where(none, h0, h_n)
    return y, h_n, None, None
