"""Attention biases as small objects: what is added to the scores, or hides, without a matrix of the size of the scores.

Each is given as ``bias=`` to ``fastseq.functional.scaled_dot_product_attention``, alone or as a sum, with tensors too:
``T5(table) + Segments(...) + penalties``. All of them learn: gradients reach their tensors. ``dense`` says what each
means: what it adds to the scores, every one of them, with -inf where it hides.

Letters: B batch, N query heads, Q and K lengths, D head width. ``rel = j - i - (K - Q)`` is how far key j stands after
query i when the last query stands at the last key, as with a memory or a cache in front of the keys.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["T5", "ALiBi", "Bias", "Dense", "Order", "Segments", "TransformerXL", "Window"]


class Bias:
    """What attention adds to its scores or hides, as an object; the base of all that this module offers.

    Biases add up, to each other and with tensors that broadcast to ``[B, N, Q, K]``. At most one of a kind has a
    place in a sum, but for tensors and those that go by distance alone, :class:`ALiBi` and :class:`T5`.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> bias = fastseq.bias.ALiBi(8) + fastseq.bias.Window(4, 0) + torch.zeros(10, 10)
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, bias=bias).shape
        torch.Size([2, 8, 10, 16])
    """

    kind: ClassVar[str]  # what the operator calls it
    packable: bool = False  # whether packed sequences can have it: it asks for nothing but ``rel``

    @property
    def parts(self) -> tuple["Bias", ...]:
        """What this is the sum of."""
        return (self,)

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        """What is added to the scores of query ``[B, N, Q, D]`` and key ``[B, M, K, D]``: ``[B or 1, N, Q, K]``.

        The query is not scaled; ``scale`` multiplies the products, 1/sqrt(D) if None.
        """
        raise NotImplementedError

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        """What the operator is given, for the same."""
        raise NotImplementedError

    def __add__(self, other: "Bias | Tensor") -> "Bias":
        return _Sum((*self.parts, *_bias(other).parts)) if isinstance(other, Bias | Tensor) else NotImplemented

    def __radd__(self, other: "Bias | Tensor") -> "Bias":
        return _Sum((*_bias(other).parts, *self.parts)) if isinstance(other, Bias | Tensor) else NotImplemented


@dataclass(frozen=True, eq=False)
class _Sum(Bias):
    several: tuple[Bias, ...]

    @property
    def parts(self) -> tuple[Bias, ...]:
        return self.several

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        first, *others = (part.dense(query, key, scale) for part in self.several)
        for other in others:
            first = first + other
        return first


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """A tensor as a bias. Attention and sums take the tensor itself as well, but sums inside ``torch.compile`` do not.

    Args:
        tensor: float, broadcastable to ``[B, N, Q, K]``.

    Example:
        >>> import torch, fastseq
        >>> q, k = torch.randn(2, 1, 2, 5, 8)
        >>> fastseq.bias.Dense(torch.zeros(5, 5)).dense(q, k).shape
        torch.Size([1, 2, 5, 5])
    """

    tensor: Tensor
    kind = "dense"

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        full = self.tensor[(None,) * (4 - self.tensor.dim())]
        return full.expand(-1, query.shape[1], query.shape[2], key.shape[2])


@dataclass(frozen=True, eq=False)
class ALiBi(Bias):
    """Penalties that grow with the distance (Press et al. 2022): adds ``slope * rel`` to every score of a head.

    Meant for causal attention, where rel is 0 at most.

    Args:
        slopes: a number of heads, which then have the paper's slopes; or a slope for each, ``[N]``, learned or not.
        symmetric: add ``-slope * |rel|``, for attention that sees both sides.

    Raises:
        ValueError: the number of heads is not positive.
        RuntimeError: the number of slopes is not that of the query's heads; or their dtype or device does not fit.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, is_causal=True, bias=fastseq.bias.ALiBi(8)).shape
        torch.Size([2, 8, 10, 16])
    """

    slopes: int | Tensor
    symmetric: bool = False
    kind = "distance"
    packable = True

    def __post_init__(self) -> None:
        if not isinstance(self.slopes, int | Tensor):
            raise TypeError(f"slopes: expected a number of heads or a Tensor, got {type(self.slopes).__name__}")
        if isinstance(self.slopes, int) and self.slopes < 1:
            raise ValueError(f"slopes: expected a positive number of heads, got {self.slopes}")

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        return self._at(_rel(query, key), query)

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        Q, K = query.shape[2], key.shape[2]
        return self._at(torch.arange(-K, Q + 1, device=query.device), query), K

    def _at(self, rel: Tensor, query: Tensor) -> Tensor:
        slopes = self.slopes
        if isinstance(slopes, Tensor):
            _check("slopes", slopes, query, N=[query.shape[1]])
        elif slopes != query.shape[1]:
            raise RuntimeError(f"slopes: expected {query.shape[1]} heads as query, got {slopes}")
        else:
            slopes = _slopes(slopes, query.device)
        slopes = slopes.to(_wide(query)).view(1, -1, *[1] * rel.dim())
        return slopes * (-rel.abs() if self.symmetric else rel)


def _slopes(heads: int, device: torch.device) -> Tensor:
    """The paper's: a geometric series that ends at 2**-8, and every other of the next finer one for what is left."""
    power = 1 << heads.bit_length() - 1

    def series(n: int) -> Tensor:
        return torch.exp2(torch.arange(1, n + 1, device=device) * (-8 / n))

    return torch.cat([series(power), series(2 * power)[: 2 * (heads - power) : 2]])


@dataclass(frozen=True, eq=False)
class T5(Bias):
    """A learned number for each head and bucket of distances (Raffel et al. 2020).

    Half the buckets of a side hold one distance each, the others grow logarithmically up to ``max_distance``, and the
    last holds what lies beyond.

    Args:
        table: ``[buckets, N]`` (or of one column for all heads), the weight of the embedding that T5 keeps.
        bidirectional: half the buckets are for keys after the query; else those count as distance 0.
        max_distance: from which on all keys share a bucket.
        offset: the key position at which query 0 stands, K - Q if None: then the last query stands at the last key.

    Raises:
        ValueError: there are too few buckets, or ``max_distance`` lies within those of one distance each.
        RuntimeError: the table's shape, dtype or device does not fit the query's.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> table = torch.nn.Embedding(32, 8).weight
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, bias=fastseq.bias.T5(table)).shape
        torch.Size([2, 8, 10, 16])
    """

    table: Tensor
    _: KW_ONLY
    bidirectional: bool = True
    max_distance: int = 128
    offset: int | None = None
    kind = "distance"

    @property
    def packable(self) -> bool:  # type: ignore[override]
        return self.offset is None

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        Q, K = query.shape[2], key.shape[2]
        offset = K - Q if self.offset is None else self.offset
        bucket = _bucket(_rel(query, key) + (K - Q) - offset, *self._checked(query))
        return self._at(bucket, query).expand(-1, query.shape[1], -1, -1)

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        moved = 0 if self.offset is None else key.shape[2] - query.shape[2] - self.offset
        # Kept from call to call, unless tensors are no plain ones here: in a graph, in torch.func, in fake mode.
        plain = type(self.table) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        plain = plain and not torch._C._are_functorch_transforms_active()
        buckets_of = _buckets if plain else _buckets.__wrapped__
        bucket = buckets_of(query.device, *self._checked(query))
        return self._at(bucket, query), self.max_distance + moved

    def _checked(self, query: Tensor) -> tuple[int, int, bool]:
        """How many buckets a side has, from which distance on all share one, and whether there are two sides."""
        _check("table", self.table, query, buckets=None, N=[query.shape[1], 1])
        buckets = self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]
        if buckets < 2:
            raise ValueError(f"table: expected {4 if self.bidirectional else 2} buckets or more, got {len(self.table)}")
        if self.max_distance <= buckets // 2:
            raise ValueError(f"max_distance: expected more than {buckets // 2}, got {self.max_distance}")
        return buckets, self.max_distance, self.bidirectional

    def _at(self, bucket: Tensor, query: Tensor) -> Tensor:
        return self.table.to(_wide(query))[bucket].movedim(-1, 0)[None].contiguous()


def _bucket(rel: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    exact = buckets // 2
    behind = rel.abs() if bidirectional else (-rel).clamp(min=0)
    # In float32 whatever the query's type: on the edge of two buckets rounding decides, and T5 was trained so.
    growth = torch.log(behind.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wider = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(behind < exact, behind, wider)
    return bucket + (rel > 0) * buckets if bidirectional else bucket


@lru_cache(maxsize=16)
def _buckets(device: torch.device, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Of the distances from which on nothing changes, and those between."""
    with torch.inference_mode(False):  # what is kept may be needed by a graph
        rel = torch.arange(-max_distance, max_distance + 1 if bidirectional else 1, device=device)
        return _bucket(rel, buckets, max_distance, bidirectional)


@dataclass(frozen=True, eq=False)
class TransformerXL(Bias):
    """Products of the query with embeddings of relative positions (Dai et al. 2019; XLNet, Conformer).

    The score becomes ``scale * ((q + u) . k + (q + w) . r[rel + zero])``; beyond either end of r its last row there
    holds, which is the paper's clamp_len.

    Args:
        r: ``[L, R, D]``, projected embeddings, of which each of R heads serves N/R; or ``[B, L, R, D]``.
        u: the content bias, for all heads or a divisor of N, ``[heads, D]``; None for zeros.
        w: the position bias, likewise.
        zero: which row of r belongs to rel = 0; the last if None, as for a causal memory, whose earlier rows lie
            further back. With keys on both sides it is K - 1 where row 0 is the furthest behind.

    Raises:
        RuntimeError: a shape, dtype or device does not fit the query's.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(2, 8, 4, 16), *torch.randn(2, 2, 8, 10, 16)
        >>> r, u, w = torch.randn(10, 8, 16), torch.zeros(8, 16), torch.zeros(8, 16)
        >>> bias = fastseq.bias.TransformerXL(r, u, w)
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, causal="lower_right", bias=bias).shape
        torch.Size([2, 8, 4, 16])
    """

    r: Tensor
    u: Tensor | None
    w: Tensor | None
    _: KW_ONLY
    zero: int | None = None
    kind = "position"
    packable = True

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        of_content, of_position, r, zero = self.term(query, key, 1.0)
        N = query.shape[1]
        k, r = (t.repeat_interleave(N // t.shape[1], 1) for t in (key, r))
        at = (_rel(query, key) + zero).clamp(0, r.shape[2] - 1)
        products = torch.einsum("bnid,bnijd->bnij", of_position, r[:, :, at].expand(len(query), -1, -1, -1, -1))
        content: Tensor = (of_content - query) @ k.mT
        return _scale(scale, query) * (products + content)

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        B, N, _, D = query.shape
        batches = {"B": [B, 1]} if isinstance(self.r, Tensor) and self.r.dim() == 4 else {}
        _check("r", self.r, query, **batches, L=None, heads=_divisors(N), D=[D])
        r = self.r.to(query.dtype).transpose(-3, -2)
        zero = r.shape[-2] - 1 if self.zero is None else self.zero
        return _plus(query, "u", self.u), _plus(query, "w", self.w), r if batches else r[None], zero


@dataclass(frozen=True, eq=False)
class Segments(Bias):
    """Whether query and key stand in the same segment (Yang et al. 2019, XLNet).

    Adds ``scale * (q + s) . embed[0]`` where they do and ``scale * (q + s) . embed[1]`` where they do not.

    Args:
        s: the bias of the query, for all heads or a divisor of N, ``[heads, D]``; None for zeros.
        embed: ``[2, heads, D]``, likewise.
        segment_q, segment_k: int ``[B, Q]`` and ``[B, K]``, in which segment each query and key stands.

    Raises:
        RuntimeError: a shape, dtype or device does not fit the query's.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> segments = torch.arange(10).expand(2, -1) // 6
        >>> bias = fastseq.bias.Segments(None, torch.randn(2, 8, 16), segments, segments)
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, bias=bias).shape
        torch.Size([2, 8, 10, 16])
    """

    s: Tensor | None
    embed: Tensor
    segment_q: Tensor
    segment_k: Tensor
    kind = "segment"

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        same_or_not, segment_q, segment_k = self.term(query, key, _scale(scale, query))
        differs = segment_q[:, None, :, None] != segment_k[:, None, None]
        return torch.where(differs, same_or_not[..., 1:], same_or_not[..., :1])

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        B, N, Q, D = query.shape
        K = key.shape[2]
        _check("embed", self.embed, query, kinds=[2], heads=_divisors(N), D=[D])
        embed = self.embed.to(query.dtype).permute(1, 2, 0)  # [heads, D, 2]
        embed = embed.repeat_interleave(N // embed.shape[0], 0)
        _check("segment_q", self.segment_q, query, _INTEGERS, B=[B], Q=[Q])
        _check("segment_k", self.segment_k, query, _INTEGERS, B=[B], K=[K])
        return _plus(query, "s", self.s) @ embed * scale, *map(_int32, (self.segment_q, self.segment_k))


@dataclass(frozen=True, eq=False)
class Order(Bias):
    """Hides by rank: query i sees key j where ``rank_k[j] <= rank_q[i]`` (Yang et al. 2019, XLNet).

    With ranks that are a permutation's this is XLNet's order of factorization: its content stream has the ranks of
    the queries themselves, its query stream those less 1. A prefix that all see has rank 0.

    Args:
        rank_q: int ``[B or 1, N or 1, Q]``.
        rank_k: int ``[B or 1, K]``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit the query's.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> rank = torch.randperm(10)[None]
        >>> fastseq.functional.scaled_dot_product_attention(q, k, v, bias=fastseq.bias.Order(rank[None], rank)).shape
        torch.Size([2, 8, 10, 16])
    """

    rank_q: Tensor
    rank_k: Tensor
    kind = "rank"

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        rank_q, rank_k = self.term(query, key, 1.0)
        return _hidden(rank_k[:, None, None] > rank_q[..., None], query)

    def term(self, query: Tensor, key: Tensor, scale: float) -> tuple[Any, ...]:
        B, N, Q, _ = query.shape
        K = key.shape[2]
        _check("rank_q", self.rank_q, query, _INTEGERS, B=[B, 1], N=[N, 1], Q=[Q])
        _check("rank_k", self.rank_k, query, _INTEGERS, B=[B, 1], K=[K])
        return _int32(self.rank_q), _int32(self.rank_k)


@dataclass(frozen=True, eq=False)
class Window(Bias):
    """A sliding window (Beltagy et al. 2020): hides keys further than so many positions from the query's own.

    The same as the argument ``window``, and as that one counted from the diagonal that a ``causal`` beside it names.

    Args:
        left: how many keys a query sees before its own position, -1 for no limit.
        right: how many after it, likewise; as many as to the left if None.

    Raises:
        ValueError: not whole numbers, or less than -1.

    Example:
        >>> import torch, fastseq
        >>> q, k = torch.randn(2, 1, 1, 3, 8)
        >>> fastseq.bias.Window(1, 0).dense(q, k)[0, 0]
        tensor([[0., -inf, -inf],
                [0., 0., -inf],
                [-inf, 0., 0.]])
    """

    left: int
    right: int | None = None
    kind = "window"

    def dense(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        rel, right = _rel(query, key), self.left if self.right is None else self.right
        hidden = (rel < -self.left) & (self.left >= 0) | (rel > right) & (right >= 0)
        return _hidden(hidden[None, None], query)


# ------------------------------------------------------------------------------------------------- what attention asks


def taken_apart(bias: Bias) -> tuple[Tensor | None, tuple[int, int] | None, list[Bias]]:
    """A sum as what attention has arguments for without it, a tensor and a window, and the rest."""
    tensor, window, rest = None, None, []
    for part in bias.parts:
        if isinstance(part, Dense):
            tensor = part.tensor if tensor is None else tensor + part.tensor
        elif not isinstance(part, Window):
            rest.append(part)
        elif window is not None:
            raise ValueError("bias: expected one Window, got two")
        else:
            window = part.left, part.left if part.right is None else part.right
    return tensor, window, rest


def terms(parts: Iterable[Bias], query: Tensor, key: Tensor, scale: float) -> dict[str, tuple[Any, ...]]:
    """What the operator is given: by kind, of

    distance: the table ``[1, N or 1, L]`` and its zero;
    position: the queries of content and position ``[B, N, Q, D]``, the table ``[B or 1, R, L, D]`` and its zero;
    segment: what is added, ``[B, N, Q, 2]``, and the segments of queries ``[B, Q]`` and keys ``[B, K]``;
    rank: of queries ``[B or 1, N or 1, Q]`` and keys ``[B or 1, K]``.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for part in parts:
        term = part.term(query, key, scale)
        if part.kind not in found:
            found[part.kind] = term
        elif part.kind == "distance":
            found["distance"] = _joined(*found["distance"], *term)
        else:
            raise ValueError(f"bias: expected one {type(part).__name__}, got two")
    return found


def _joined(one: Tensor, zero: int, other: Tensor, other_zero: int) -> tuple[Tensor, int]:
    """Two tables by distance as one that spans both."""
    first = max(zero, other_zero)
    last = max(one.shape[2] - zero, other.shape[2] - other_zero)
    rel = torch.arange(-first, last, device=one.device)
    both = ((one, zero), (other, other_zero))
    a, b = (table[..., (rel + start).clamp(0, table.shape[2] - 1)] for table, start in both)
    return a + b, first


# ---------------------------------------------------------------------------------------------------------- pieces


def _bias(x: Bias | Tensor) -> Bias:
    return x if isinstance(x, Bias) else Dense(x)


def _rel(query: Tensor, key: Tensor) -> Tensor:
    Q, K = query.shape[2], key.shape[2]
    return torch.arange(K, device=query.device) - torch.arange(Q, device=query.device)[:, None] - (K - Q)


def _hidden(where: Tensor, query: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=_wide(query), device=query.device)
    return torch.where(where, -torch.inf, zero).expand(-1, query.shape[1], -1, -1)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _int32(x: Tensor) -> Tensor:
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    return x.clamp(least, most).to(torch.int32).contiguous()


def _divisors(heads: int) -> list[int]:
    return [n for n in range(1, heads + 1) if heads % n == 0]


def _plus(query: Tensor, name: str, learned: Tensor | None) -> Tensor:
    """The query and a bias ``[heads, D]`` that is learned."""
    if learned is None:
        return query
    N, D = query.shape[1], query.shape[3]
    _check(name, learned, query, heads=_divisors(N), D=[D])
    return query + learned.to(query.dtype).repeat_interleave(N // learned.shape[0], 0)[:, None]


_INTEGERS = (torch.int32, torch.int64)


def _check(
    name: str, t: Any, query: Tensor, dtypes: Sequence[torch.dtype] = (), /, **sizes: Sequence[int] | None
) -> None:
    """Hold a tensor to the sizes that its dimensions may have (None: any but 0), and to the query's device and type."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.device != query.device:
        raise RuntimeError(f"{name}: expected device {query.device} as query, got {t.device}")
    dtypes = dtypes or (query.dtype, torch.float32)
    if t.dtype not in dtypes:
        raise RuntimeError(f"{name}: expected {' or '.join(sorted(set(map(str, dtypes))))}, got {t.dtype}")
    # Not "in", and no text before it is needed: either would make a number of what is a symbol in a compiled graph.
    fits = len(sizes) == t.dim() and all(
        size > 0 if may_be is None else any(size == n for n in may_be)
        for size, may_be in zip(t.shape, sizes.values(), strict=True)
    )
    if not fits:
        shape = ", ".join(
            letter if may_be is None else f"{letter}={' or '.join(map(str, may_be))}"
            for letter, may_be in sizes.items()
        )
        raise RuntimeError(f"{name}: expected [{shape}], got {list(t.shape)}")
