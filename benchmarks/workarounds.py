"""What people write today for episodes that start inside a batch, since torch's modules know no reset.

Each takes a module of torch's, an input ``[T, B, I]`` and ``reset`` ``[T, B]`` bool, starts from zeros and
returns the output ``[T, B, H]``. They are written as fast as we can write them: a benchmark against a slow
competitor shows nothing.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


def pad_and_split(module: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    """Cut every row at its resets, pad the pieces to the longest and run them as one larger batch.

    The way of rsl_rl (``split_and_pad_trajectories``), but with one indexed copy each way: ``split`` and
    ``pad_sequence`` cost a copy of the whole gradient per piece in the backward pass. On a GPU the number of
    pieces and the longest length have to come to the host.
    """
    T, B, I = x.shape  # noqa: E741  (I: input width)
    starts = reset.t().clone()
    starts[:, 0] = True
    starts = starts.flatten()
    begins = starts.nonzero().squeeze(1)
    longest = int(torch.diff(begins, append=begins.new_tensor([T * B])).max())
    piece = starts.cumsum(0) - 1
    place = piece * longest + torch.arange(T * B, device=x.device) - begins[piece]
    rows = x.transpose(0, 1).reshape(T * B, I)
    padded = x.new_zeros(len(begins) * longest, I).index_copy(0, place, rows)
    y = module(padded.view(len(begins), longest, I).transpose(0, 1).contiguous())[0]
    y = y.transpose(0, 1).flatten(0, 1).index_select(0, place)
    return y.view(B, T, -1).transpose(0, 1)


def stretches(module: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    """Call the layer once for every stretch of time in which no row resets, clearing states in between.

    The way of on-policy MAPPO. With many rows a stretch is a few steps long.
    """
    cuts = [0, *(reset[1:].any(dim=1).nonzero().squeeze(1) + 1).tolist(), x.shape[0]]
    outputs, state = [], None
    for begin, end in pairwise(cuts):
        if state is not None:
            fresh = reset[begin, :, None]
            state = (
                tuple(s.masked_fill(fresh, 0) for s in state)
                if isinstance(state, tuple)
                else state.masked_fill(fresh, 0)
            )
        y, state = module(x[begin:end], state)
        outputs.append(y)
    return torch.cat(outputs)


def python_loop(cell: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    """A loop over a torch cell (``LSTMCell`` and so on), clearing the states of the rows that reset."""
    two_states = isinstance(cell, nn.LSTMCell)
    h = c = x.new_zeros(x.shape[1], cell.hidden_size)
    outputs = []
    for step, fresh in zip(x.unbind(), reset.unsqueeze(-1).unbind(), strict=True):
        if two_states:
            h, c = cell(step, (h.masked_fill(fresh, 0), c.masked_fill(fresh, 0)))
        else:
            h = cell(step, h.masked_fill(fresh, 0))
        outputs.append(h)
    return torch.stack(outputs)
