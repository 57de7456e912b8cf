"""How far back in time a gradient reaches: vanishing and exploding gradients (Bengio et al. 1994), measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradient_by_distance(
    layer: Callable[[Tensor], Any], x: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """The length of the gradient of the last output with respect to the input d steps before it, for each d.

    The gradient is that of the last output's product with a random direction, drawn for each row of the batch from
    unit vectors; its length is the root mean square over the rows. Weights get no gradient.

    Args:
        layer: takes x and returns the output ``[B, T, H]``, or a tuple that begins with it, as a recurrent layer with
            ``batch_first`` does.
        x: ``[B, T, I]``.
        generator: of the directions; torch's own if None.

    Returns:
        ``[T]``, that of d = 0 first.

    Raises:
        ValueError: x or the output is of another shape.

    Example:
        >>> import torch, fastseq
        >>> from fastseq.models import gradient_by_distance
        >>> norms = gradient_by_distance(fastseq.RNN(8, 32, batch_first=True), torch.randn(16, 50, 8))
        >>> bool(norms[40] < 1e-3 * norms[0])
        True
    """
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, I], got {list(x.shape)}")
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        if y.dim() != 3 or y.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"layer: expected an output [B, T, H] with B, T = {list(x.shape[:2])}, got {list(y.shape)}"
            )
        last = y[:, -1]
        # Drawn on the CPU, where the generator is, whatever the device.
        direction = torch.randn(last.shape, generator=generator).to(last)
        (gradient,) = torch.autograd.grad(last, x, direction / direction.norm(dim=-1, keepdim=True))
    return gradient.square().sum(-1).mean(0).sqrt().flip(0)
