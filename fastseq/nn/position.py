"""Where in the sequence a token stands, told to the attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RotaryEmbedding(torch.nn.Module):
    """Rotary positions: turns pairs of features of a query or key by angles that grow with its position.

    The product of a query at i and a key at j then depends on the position by i - j alone (Su et al. 2021,
    RoFormer). Feature pair p of ``dim`` turns by ``position * base ** (-2 p / dim)``; features past ``dim`` stay.
    There are no parameters and no buffers, and the angles are computed in float32 whatever the input's type.

    Args:
        dim: how many features turn; even, at most the head width.
        base: of the geometric series of angles.
        interleaved: pairs are neighbours (2p, 2p + 1), as in the paper; else (p, p + dim / 2), as in most
            published weights.

    The call takes x ``[..., T, D]`` and ``offset``, the position of its first token, and returns the like of x.

    Raises:
        ValueError: ``dim`` is not even and positive, or exceeds D.

    Example:
        >>> import torch, fastseq
        >>> rotary = fastseq.RotaryEmbedding(8)
        >>> q, k = torch.randn(2, 1, 8)
        >>> near, far = (rotary(q, offset=t + 2) @ rotary(k, offset=t).mT for t in (0, 1000))
        >>> bool(torch.isclose(near, far, atol=1e-4).all())
        True
    """

    def __init__(self, dim: int, base: float = 10000.0, *, interleaved: bool = False) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim: expected an even number of features, got {dim}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        dim = self.dim
        if x.shape[-1] < dim:
            raise ValueError(f"x: expected at least dim={dim} features, got {x.shape[-1]}")
        wide = torch.promote_types(x.dtype, torch.float32)
        position = torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=wide)
        rate = self.base ** (torch.arange(0, dim, 2, device=x.device, dtype=wide) / -dim)
        angle = position[:, None] * rate
        cos, sin = angle.cos(), angle.sin()
        turning = x[..., :dim].to(wide)
        if self.interleaved:
            a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned.to(x.dtype), x[..., dim:]], -1) if x.shape[-1] > dim else turned.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}" + (", interleaved=True" if self.interleaved else "")


class SinusoidalEmbedding(torch.nn.Module):
    """Sinusoidal positions: adds sines and cosines of the position to a token's features (Vaswani et al. 2017).

    Feature pair p of position t is the sine and the cosine of ``t * base ** (-2 p / dim)``, so that moving by a
    fixed distance is a rotation of each pair. There are no parameters and no buffers, and the angles are computed
    in float32 at least.

    Args:
        dim: the number of features, even.
        base: of the geometric series of angles.
        interleaved: sine and cosine are neighbours (2p, 2p + 1), as in the paper; else all sines, then all cosines,
            as in Transformer-XL (Dai et al. 2019).

    The call takes x ``[..., T, dim]`` and ``offset``, the position of its first token, and returns x with the
    positions added. ``at(positions)`` gives the vectors alone, ``[..., dim]`` for ``[...]``: of any positions, in
    any order, fractions included; descending ones are Transformer-XL's distances.

    Raises:
        ValueError: ``dim`` is not even and positive, or x has another width.

    Example:
        >>> import torch, fastseq
        >>> positions = fastseq.SinusoidalEmbedding(8)
        >>> x = torch.randn(2, 5, 8)
        >>> whole, last = positions(x), positions(x[:, 4:], offset=4)
        >>> torch.equal(whole[:, 4:], last)
        True
        >>> positions.at(torch.arange(4, -1, -1)).shape
        torch.Size([5, 8])
    """

    def __init__(self, dim: int, base: float = 10000.0, *, interleaved: bool = True) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim: expected an even number of features, got {dim}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def at(self, positions: Tensor) -> Tensor:
        wide = torch.promote_types(positions.dtype, torch.float32)
        rate = self.base ** (torch.arange(0, self.dim, 2, device=positions.device, dtype=wide) / -self.dim)
        angle = positions.to(wide)[..., None] * rate
        if self.interleaved:
            return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
        return torch.cat([angle.sin(), angle.cos()], -1)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        _check_width(x, self.dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x + self.at(torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=wide)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}" + ("" if self.interleaved else ", interleaved=False")


class LearnedEmbedding(torch.nn.Module):
    """Learned positions: adds a vector of its own for each position (Gehring et al. 2017; BERT's and GPT's).

    Args:
        max_length: how many positions there are.
        dim: the number of features.
        device, dtype: of the table ``weight``, ``[max_length, dim]``, drawn from N(0, 0.02²) as BERT's and GPT-2's.

    The call takes x ``[..., T, dim]`` and ``offset``, the position of its first token, and returns x with the
    positions added. ``at(positions)`` gives the vectors alone, ``[..., dim]`` for integers ``[...]``.

    Raises:
        ValueError: x reaches past ``max_length`` or has another width.
        IndexError: ``at`` is asked for a position that is not in the table.

    Example:
        >>> import torch, fastseq
        >>> positions = fastseq.LearnedEmbedding(max_length=16, dim=8)
        >>> x = torch.randn(2, 5, 8)
        >>> whole, last = positions(x), positions(x[:, 4:], offset=4)
        >>> torch.equal(whole[:, 4:], last)
        True
    """

    def __init__(self, max_length: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.dim = dim
        self.weight = torch.nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def at(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        _check_width(x, self.dim)
        end = offset + x.shape[-2]
        if not 0 <= offset <= end <= self.max_length:
            raise ValueError(f"x: expected positions within max_length={self.max_length}, got {offset} to {end - 1}")
        return x + self.weight[offset:end]

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.dim}"


def _check_width(x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"x: expected [..., T, dim={dim}], got {list(x.shape)}")
