"""Keys and values that decoding, a few tokens at a time, does not compute again."""

import torch
from torch import Tensor


class KVCache:
    """The keys and values that one attention has seen, for decoding step by step.

    With ``max_length`` it grows: memory for so many tokens is taken at the first call, each call's keys and values
    are appended in place, and a query sees its own token and all before it. Without, it is filled by the first call
    and stays: the memory that a decoder attends to is then projected once.

    ``length`` is the number of tokens held; setting it lower takes back the latest, 0 all.

    Args:
        max_length: the most tokens it can hold; None for as many as the first call brings.

    Raises:
        ValueError: the tokens do not fit, or the batch, heads or width change.
        RuntimeError: the keys require a gradient: a cache is written in place and holds none.

    Example:
        >>> import torch, fastseq
        >>> attention = fastseq.MultiheadAttention(16, 2, batch_first=True)
        >>> x, cache = torch.randn(1, 3, 16), fastseq.KVCache(max_length=8)
        >>> with torch.no_grad():
        ...     whole, _ = attention(x, x, x, causal="lower_right")
        ...     steps = [attention(t, t, t, cache=cache)[0] for t in x.split(1, dim=1)]
        >>> torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-6)
        True
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether it holds what the first call brought, for good."""
        return self.max_length is None and self.length > 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take key ``[B, M, T, D]`` and value ``[B, M, T, E]`` in; all so far are returned, as views."""
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("cache: it holds no gradients; decode under torch.no_grad()")
        start, end = self.length, self.length + key.shape[2]
        if self.max_length is None:
            if start:
                raise ValueError("cache: filled by the first call; give max_length to one that should grow")
            self.key, self.value, self.length = key, value, end
            return key, value
        if end > self.max_length:
            raise ValueError(f"cache: holds {start} of max_length={self.max_length} tokens, {key.shape[2]} do not fit")
        if self.key is None or self.value is None:
            self.key, self.value = (t.new_empty(*t.shape[:2], self.max_length, t.shape[3]) for t in (key, value))
        for name, held, new in (("key", self.key, key), ("value", self.value, value)):
            got, expected = [*new.shape[:2], new.shape[3]], [*held.shape[:2], held.shape[3]]
            if got != expected:
                raise ValueError(f"cache: {name}s of batch, heads and width {expected}, got {got}")
            held[:, :, start:end] = new
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, a row any number of times: a step of beam search."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)

    def __repr__(self) -> str:
        return f"KVCache(max_length={self.max_length}, length={self.length})"
