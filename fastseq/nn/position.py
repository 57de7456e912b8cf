"""Where in the sequence a token stands, told to the attention."""

import torch
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
