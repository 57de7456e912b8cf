"""Attention and its gradient tile by tile in plain torch, on any device: memory grows with Q + K, not with Q times K.

A tile is some queries of some heads against all the keys that they may see, so that torch's own softmax and its
gradient work on whole rows. Letters: B batch, N query heads, M key heads, G = N / M query heads that share a key
head, Q and K lengths, D and E head widths of keys and values. ``reference/attention.py`` says what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import dropout_columns, dropout_rows, dropout_threshold, dropout_words
from . import flash
from .relative import Positions

TILE = 2**18  # scores at a time and core: with what accompanies them they stay in its second-level cache
CORES = 4  # that a tile is made for at most: it is memory that a call takes
FEWEST_ROWS = 16  # of a tile, however long its rows are: a matrix product needs them
BAND_ROWS = 64  # of a tile at the edge of a band, where rows see different keys

Forward = tuple[Tensor, Tensor, Tensor | None]
Maybe = Tensor | None
Gradients = tuple[Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe, Maybe]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    distance: Tensor | None,
    position_query: Tensor | None,
    position_key: Tensor | None,
    segment: Tensor | None,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    rank_q: Tensor | None,
    rank_k: Tensor | None,
    *,
    max_q: int,
    max_k: int,
    allow_tf32: bool,
    **settings: Any,
) -> Forward:
    """Output ``[B, N, Q, E]``, log-sum-exp ``[B, N, Q]`` and weights, as ``reference.attention.attention`` defines."""
    call = Call(
        query, key, value, bias, distance, position_query, _per_head(position_key, query), segment, mask, seed,
        segment_q, segment_k, rank_q, rank_k, **settings,
    )  # fmt: skip
    if cu_q is None or cu_k is None:
        return call.forward()
    out, lse, _ = call.blank()
    for z, (q, k) in enumerate(_sequences(cu_q, cu_k)):
        out[:, :, q], lse[:, :, q], _ = call.sequence(z, q, k).forward()
    return out, lse, None


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    distance: Tensor | None,
    position_query: Tensor | None,
    position_key: Tensor | None,
    segment: Tensor | None,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    rank_q: Tensor | None,
    rank_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    max_q: int,
    max_k: int,
    weights: str,
    allow_tf32: bool,
    **settings: Any,
) -> Gradients:
    """Gradients of the first eight tensors, each in its own shape; None for one that is not there.

    Those of bias and distance are None, too, unless ``bias_gradient`` and ``distance_gradient`` ask for them.
    """
    call = Call(
        query, key, value, bias, distance, position_query, _per_head(position_key, query), segment, mask, seed,
        segment_q, segment_k, rank_q, rank_k, **settings,
    )  # fmt: skip
    if dweights is not None and weights == "mean":
        dweights = dweights[:, None]
    if cu_q is None or cu_k is None:
        found = call.backward(dout, dlse, dweights, out, lse)
    else:
        found = call.blank_gradients()
        for z, (q, k) in enumerate(_sequences(cu_q, cu_k)):
            upper, upper_lse = (None if t is None else t[:, :, q] for t in (dout, dlse))
            parts = call.sequence(z, q, k).backward(upper, upper_lse, None, out[:, :, q], lse[:, :, q])
            for whole, part, rows in zip(found, parts, (q, k, k, None, None, q, None, None), strict=True):
                if whole is None or part is None:
                    continue
                if rows is None:
                    whole += part
                else:
                    whole[:, :, rows] = part
    dquery, dkey, dvalue, dbias, ddistance, dposition_query, dposition_key, dsegment = found
    if dposition_key is not None and position_key is not None:
        heads = position_key.shape[1]
        if heads != dposition_key.shape[1]:
            dposition_key = dposition_key.unflatten(1, (heads, -1)).sum(2)
        dposition_key = dposition_key.contiguous()
    tables = _to(dbias, bias), _to(ddistance, distance), dposition_query, _to(dposition_key, position_key)
    return dquery, dkey, dvalue, *tables, dsegment


def _per_head(position_key: Tensor | None, query: Tensor) -> Tensor | None:
    """With one head for all or one for each, as tiles of any heads can take."""
    if position_key is None or position_key.shape[1] in (1, query.shape[1]):
        return position_key
    return position_key.repeat_interleave(query.shape[1] // position_key.shape[1], 1)


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for z in range(len(starts_q) - 1):
        yield slice(starts_q[z], starts_q[z + 1]), slice(starts_k[z], starts_k[z + 1])


def _zeros(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros ``[B, N, T, D]`` that lie in memory as ``[B, T, N, D]``, the layout in which models join the heads."""
    B, N, T, D = like.shape
    return like.new_zeros(B, T, N, D, dtype=dtype).transpose(1, 2)


@dataclass(frozen=True)
class Tile:
    """Some queries of some heads, and the keys that they see: the part of the scores that one step computes."""

    batches: slice
    heads: slice
    rows: slice
    keys: slice

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.batches, self.heads, self.rows

    def of_keys(self, group: int) -> tuple[slice, slice, slice]:
        """Where its keys and values are, each head of which ``group`` heads of queries share."""
        return self.batches, slice(self.heads.start // group, self.heads.stop // group), self.keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, n, q, k = self.batches, self.heads, self.rows, self.keys
        return b.stop - b.start, n.stop - n.start, q.stop - q.start, k.stop - k.start

    def of(self, x: Tensor) -> Tensor:
        """This part of a tensor that broadcasts to ``[B, N, Q, K]``."""
        where = *self.queries, self.keys
        return x[tuple(slice(None) if n == 1 else part for n, part in zip(x.shape, where, strict=True))]


@dataclass(frozen=True)
class Call:
    """One call: its tensors, and what is asked for. ``first`` counts the batches before this one (for dropout)."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    distance: Tensor | None
    position_query: Tensor | None
    position_key: Tensor | None
    segment: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    segment_q: Tensor | None
    segment_k: Tensor | None
    rank_q: Tensor | None
    rank_k: Tensor | None
    scale: float
    left: int
    right: int
    lower_right: bool
    softcap: float
    dropout_p: float
    weights: str = ""
    distance_zero: int = 0
    position_zero: int = 0
    bias_gradient: bool = False
    distance_gradient: bool = False
    first: int = 0
    careful: bool = False

    def sequence(self, z: int, q: slice, k: slice) -> Call:
        query, key, value = self.query[:, :, q], self.key[:, :, k], self.value[:, :, k]
        of_position = None if self.position_query is None else self.position_query[:, :, q]
        return replace(self, query=query, key=key, value=value, position_query=of_position, first=z)

    def forward(self) -> Forward:
        if self.nothing:
            return self.blank()
        found = (*flash.forward(self), None) if flash.serves(self) else self._forward()
        if self.hides and not _finite_sum(found[0]):
            return replace(self, careful=True)._forward()
        return found

    def backward(
        self, dout: Tensor | None, dlse: Tensor | None, dweights: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Those of tables are wide, and the one of position keys has their shape in ``position_key``."""
        if self.nothing:
            return self.blank_gradients()
        more = self.bias_gradient, self.distance_gradient, self.position_query is not None, self.segment is not None
        simple = not any(more) and dlse is None and dweights is None
        added = self.bias is not None or self.distance is not None
        # With the least number in a bias the log-sum-exp cannot hold the sum beside it; tiles do not go by it.
        if simple and dout is not None and flash.serves(self) and not (added and flash.far(lse)):
            found: Gradients = (*flash.backward(self, dout, out, lse), None, None, None, None, None)
        else:
            found = self._backward(dout, dlse, dweights, lse)
        if self.hides and not all(_finite_sum(t) for t in found if t is not None):
            return replace(self, careful=True)._backward(dout, dlse, dweights, lse)
        return found

    # What follows from the tensors.

    @property
    def nothing(self) -> bool:
        """Whether no query sees a key, for there is none of the one or of the other."""
        return self.query.shape[:3].numel() == 0 or self.key.shape[2] == 0

    @property
    def whole(self) -> Tile:
        B, N, Q, _ = self.query.shape
        return Tile(slice(0, B), slice(0, N), slice(0, Q), slice(0, self.key.shape[2]))

    @cached_property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.query.dtype, torch.float32)

    @cached_property
    def band(self) -> tuple[int, int, int]:
        return flash.limits(self.query.shape[2], self.key.shape[2], self.left, self.right, self.lower_right)

    @cached_property
    def hides(self) -> bool:
        # A position that a query does not meet is hidden from it as well.
        may = self.mask, self.bias, self.distance, self.position_query, self.segment, self.rank_q
        return max(self.band[:2]) >= 0 or any(t is not None for t in may)

    @cached_property
    def key_mask(self) -> Tensor | None:
        """The mask as it is added, where it is the same for all queries."""
        return flash.additive(self.mask, self.wide) if self.mask is not None and self.mask.shape[2] == 1 else None

    @cached_property
    def relative(self) -> bool:
        """Whether anything is added or hidden by position, segment or rank."""
        return any(t is not None for t in (self.distance, self.position_query, self.segment, self.rank_q))

    @property
    def mask_planes(self) -> tuple[int, int]:
        """Batches and heads that do not share what is added to the scores."""
        ranks = None if self.rank_k is None else self.rank_k[:, None]
        tensors = self.mask, self.bias, self.distance, self.position_query, self.segment, self.rank_q, ranks
        shapes = [t.shape for t in tensors if t is not None]
        return max([1, *(s[0] for s in shapes)]), max([1, *(s[1] for s in shapes)])

    @cached_property
    def positions(self) -> Positions:
        return Positions(self)

    def blank(self) -> Forward:
        """The results of queries that see nothing: what no tile writes stays like this."""
        B, N, Q, _ = self.query.shape
        K, E = self.value.shape[2:]
        out = self.query.new_zeros(B, Q, N, E).transpose(1, 2)
        lse = self.query.new_full((B, N, Q), -torch.inf, dtype=self.wide)
        shape = {"": None, "each": (B, N, Q, K), "mean": (B, Q, K)}[self.weights]
        return out, lse, None if shape is None else self.query.new_zeros(shape)

    def blank_gradients(self) -> Gradients:
        return _zeros(self.query), _zeros(self.key), _zeros(self.value), *self._blank_terms()

    def _blank_terms(self) -> tuple[Maybe, Maybe, Maybe, Maybe, Maybe]:
        """Zeros for the gradients of all that is not query, key or value: wide where tiles are summed."""
        bias = self.bias if self.bias_gradient else None
        distance = self.distance if self.distance_gradient else None
        position, keys, segment = self.position_query, self.position_key, self.segment
        return (
            None if bias is None else bias.new_zeros(bias.shape, dtype=self.wide),
            None if distance is None else distance.new_zeros(distance.shape, dtype=self.wide),
            None if position is None else _zeros(position),
            None if keys is None else keys.new_zeros(keys.mT.shape, dtype=self.wide).mT,
            None if segment is None else torch.zeros_like(segment),
        )

    # The walk over tiles.

    @cached_property
    def _steps(self) -> tuple[int, int, int, int]:
        """Batches, key heads and rows of a tile, and the elements of the largest."""
        B, N, Q, _ = self.query.shape
        M, K = self.key.shape[1:3]
        left, right, _ = self.band
        group = N // M
        tile = TILE * min(torch.get_num_threads(), CORES)
        rows, span = Q, K
        if left >= 0 and right >= 0:
            rows = max(BAND_ROWS, left + right)
            span = min(K, rows + left + right)
        elif left >= 0 or right >= 0:
            rows = max(BAND_ROWS, Q // 8)
        together = N if self.weights == "mean" else group  # the fewest heads of a tile
        fewest = FEWEST_ROWS
        if together > group:  # better a tile that leaves that cache than one of few rows
            fewest = max(FEWEST_ROWS, min(4 * FEWEST_ROWS, 8 * tile // (together * span)))
        rows = min(Q, rows, max(fewest, tile // (together * span)))
        if self.position_query is not None:  # fewer rows, of more heads, meet fewer positions
            rows = min(rows, max(fewest, span // 4, tile // (N * span)))
        rows = math.ceil(Q / math.ceil(Q / rows))
        if left >= 0 and right >= 0:
            span = min(K, rows + left + right)
        kv_heads = max(together // group, min(B * M, tile // (group * rows * span)))
        batches, kv_heads = max(1, kv_heads // M), min(M, kv_heads)
        return batches, kv_heads, rows, batches * kv_heads * group * rows * span

    def tiles(self, batches: slice, heads: slice, rows: int) -> Iterator[Tile]:
        """The tiles of these heads, but for those that see no key."""
        Q, K = self.query.shape[2], self.key.shape[2]
        left, right, shift = self.band
        for i in range(0, Q, rows):
            last = min(i + rows, Q)
            low = max(0, i + shift - left) if left >= 0 else 0
            high = min(K, last + shift + right) if right >= 0 else K
            if low < high:
                yield Tile(batches, heads, slice(i, last), slice(low, high))

    def _pieces(self) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
        """Batches, key heads and query heads of a tile, with their keys and values ``[b * m, K, D]``."""
        B, M = self.key.shape[:2]
        group = self.query.shape[1] // M
        batches, kv_heads, rows, _ = self._steps
        apart = any(t.stride(0) != M * t.stride(1) for t in (self.key, self.value))
        if apart and M * group * rows * self.key.shape[2] >= flash.ALONE:
            batches = 1  # else keys and values are copied to stand below each other, cheaper than steps of few scores
        for b in range(0, B, batches):
            for m in range(0, M, kv_heads):
                part = slice(b, min(b + batches, B)), slice(m, min(m + kv_heads, M))
                key, value = (self.operand(t[part].flatten(0, 1)) for t in (self.key, self.value))
                if 4 * rows <= self.query.shape[2]:
                    key, value = key.contiguous(), value.contiguous()
                yield *part, slice(part[1].start * group, part[1].stop * group), key, value

    # What a tile is computed from.

    def operand(self, x: Tensor) -> Tensor:
        x = x.to(self.wide)
        return torch.where(x.isfinite(), x, 0.0) if self.careful else x

    def _rows(self, x: Tensor, tile: Tile, pairs: int, scale: float) -> Tensor:
        """A tile's rows of ``[B, N, Q, D]``, the heads of a group below each other: ``[b * m, G * rows, D]``."""
        rows = self.operand(x[tile.queries].reshape(pairs, -1, x.shape[3]))
        return rows if scale == 1.0 else rows * scale

    def _scores(
        self, tile: Tile, query: Tensor, key: Tensor, space: Tensor, bends: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scores ``[b * m, G * rows, keys]`` in space, hidden ones -inf; and the tanh of the cap, in bends."""
        shape = *query.shape[:2], key.shape[1]
        scores = space[: math.prod(shape)].view(shape)
        table = scores.view(tile.shape)
        by_position = self.position_query is not None
        if by_position:
            table.copy_(self.positions.enter(tile).product(tile, self._inner_scale))
        # The scale after the sum, as formulas have it: a query scaled before would be rounded once more, in each term.
        torch.baddbmm(scores, query, key.mT, beta=int(by_position), alpha=self._inner_scale, out=scores)
        if self.careful:
            bad = self._bad(self.query, tile, True) | self._bad(self.key, tile, False)
            table.masked_fill_(bad | self.positions.bad(tile) if by_position else bad, torch.nan)
        bent = None
        if self.softcap:
            bent = scores.tanh_() if bends is None else torch.tanh(scores, out=bends[: scores.numel()].view(shape))
            torch.mul(bent, self.softcap, out=scores)
        self.hide(table, tile)
        return scores, bent

    def added(self, tile: Tile) -> Iterator[Tensor]:
        """What is added to a tile's scores, in shapes that broadcast to it."""
        if self.bias is not None:
            yield tile.of(self.bias)
        if self.distance is not None:
            yield self.positions.enter(tile).added(tile)
        if self.segment is not None:
            same, other = self.segment[tile.queries].to(self.wide).split(1, -1)
            yield torch.where(self._differs(tile), other, same)

    def hide(self, scores: Tensor, tile: Tile) -> Tensor:
        """Add what is added and hide what is hidden, in place; scores broadcast to the tile."""
        if self.careful:
            visible = self._visible(tile)
            for term in self.added(tile):
                scores.add_(torch.where(visible, term, 0.0))
            return scores.masked_fill_(~visible, -torch.inf)
        for term in self.added(tile):
            scores.add_(term)
        if self.rank_q is not None:
            scores.masked_fill_(~self._in_order(tile), -torch.inf)
        if self.mask is not None:
            key_mask = self.key_mask
            scores.add_(flash.additive(tile.of(self.mask), self.wide) if key_mask is None else tile.of(key_mask))
        if self.distance is not None:  # which has the band in it
            return scores
        # Only the edges of a band cost something: in between, all the tile's queries see the key.
        left, right, shift = self.band
        rows, keys = tile.shape[2:]
        diagonal = tile.rows.start - tile.keys.start + shift
        if right >= 0:
            edge = max(0, min(diagonal + right + 1, keys))
            scores[..., edge:] += scores.new_full((rows, keys - edge), -torch.inf).triu_(diagonal + right + 1 - edge)
        if left >= 0:
            edge = max(0, min(diagonal + rows - 1 - left, keys))
            scores[..., :edge] += scores.new_full((rows, edge), -torch.inf).tril_(diagonal - left - 1)
        return scores

    def _visible(self, tile: Tile) -> Tensor:
        """What a tile may see, bool, broadcasts to its shape."""
        left, right, shift = self.band
        device = self.query.device
        i = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None]
        offset = torch.arange(tile.keys.start, tile.keys.stop, device=device) - i - shift
        visible = torch.ones_like(offset, dtype=torch.bool)
        if left >= 0:
            visible &= offset >= -left
        if right >= 0:
            visible &= offset <= right
        visible = visible[None, None] if self.mask is None else visible & tile.of(self.mask)
        return visible if self.rank_q is None else visible & self._in_order(tile)

    def _differs(self, tile: Tile) -> Tensor:
        """Where the segments of query and key are not the same, ``[b, 1, rows, keys]``."""
        assert self.segment_q is not None
        assert self.segment_k is not None
        return tile.of(self.segment_q[:, None, :, None]) != tile.of(self.segment_k[:, None, None])

    def _in_order(self, tile: Tile) -> Tensor:
        """Which keys have no higher rank than the query."""
        assert self.rank_q is not None
        assert self.rank_k is not None
        return tile.of(self.rank_k[:, None, None]) <= tile.of(self.rank_q[..., None])

    def _bad(self, x: Tensor, tile: Tile, of_queries: bool) -> Tensor:
        """Which rows of query or output gradient, or which keys or values, are not finite; broadcasts to the tile."""
        if of_queries:
            return ~x[tile.queries].isfinite().all(-1)[..., None]
        bad = ~x[tile.batches, :, tile.keys].isfinite().all(-1)
        group = self.query.shape[1] // self.key.shape[1]
        return bad.repeat_interleave(group, 1)[:, tile.heads, None]

    @cached_property
    def _dropout_rows(self) -> tuple[Tensor, Tensor]:
        assert self.seed is not None
        B, N, Q, _ = self.query.shape
        heads = torch.arange(self.first * N, (self.first + B) * N, device=self.query.device).view(B, N)
        return dropout_rows(self.seed, heads, Q)

    @cached_property
    def _dropout_columns(self) -> Tensor:
        return dropout_columns(self.key.shape[2], self.query.device)

    def _keep(self, tile: Tile) -> Tensor:
        """1 where dropout keeps a weight and 0 where not: int32 ``[b, n, rows, keys]``."""
        first, second = (t[tile.queries] for t in self._dropout_rows)
        words = dropout_words(first, second, self._dropout_columns[tile.keys], self.dropout_p)
        return words.ge_(dropout_threshold(self.dropout_p))

    @property
    def _kept(self) -> float:
        """What dropout multiplies with where it keeps."""
        return 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0

    @property
    def _inner_scale(self) -> float:
        """What multiplies a product of query and key, before the cap."""
        return self.scale / self.softcap if self.softcap else self.scale

    def _forward(self) -> Forward:
        out, lse, weights = self.blank()
        *_, rows, size = self._steps
        space = self.query.new_empty(size, dtype=self.wide)
        for batches, _, heads, key, value in self._pieces():
            for tile in self.tiles(batches, heads, rows):
                query = self._rows(self.query, tile, key.shape[0], 1.0)
                p, _ = self._scores(tile, query, key[:, tile.keys], space, None)
                most = p.amax(-1, keepdim=True)
                torch.softmax(p, -1, out=p)
                # The largest weight is exp(largest score - log-sum-exp).
                total = most - p.amax(-1, keepdim=True).log_()
                table = p.view(tile.shape)
                if self.hides:
                    empty = most == -torch.inf
                    total.masked_fill_(empty, -torch.inf)
                    if empty.any():
                        p.masked_fill_(empty, 0.0)
                if self.careful:
                    table.masked_fill_(~self._visible(tile), 0.0)
                if self.dropout_p:
                    _drop(table, self._keep(tile))
                if weights is not None:
                    if self.weights == "each":
                        tile.of(weights).copy_(table)
                    else:
                        weights[batches, tile.rows, tile.keys] = table.mean(1)
                if self.careful:
                    table.masked_fill_(self._bad(self.value, tile, False) & self._visible(tile), torch.nan)
                    if self.hides:
                        p.masked_fill_(empty, 0.0)
                found = torch.bmm(p, value[:, tile.keys])
                out[tile.queries] = found.view(*tile.shape[:3], -1)
                lse[tile.queries] = total.view(tile.shape[:3])
        if self.dropout_p:
            out *= self._kept
            if weights is not None:
                weights *= self._kept
        return out, lse, weights

    def _backward(self, dout: Tensor | None, dlse: Tensor | None, dweights: Tensor | None, lse: Tensor) -> Gradients:
        dquery = _zeros(self.query)
        dbias, ddistance, dposition_query, dposition_key, dsegment = terms = self._blank_terms()
        if dout is None:
            dout = self.query.new_zeros(()).expand(*self.query.shape[:3], self.value.shape[3])
        positions = self.positions
        positions.totals = ddistance, dposition_key
        some_empty = self.hides and bool((lse == -torch.inf).any())
        *_, rows, size = self._steps
        space, dspace, bends = (self.query.new_empty(size, dtype=self.wide) for _ in range(3))
        # Sums over tiles are lying, [B, M, D, K]: a product with transposed scores takes up to half as long again.
        lying = rows < self.query.shape[2]
        dkey, dvalue = (
            t.new_zeros(t.mT.shape, dtype=self.wide) if lying else _zeros(t) for t in (self.key, self.value)
        )
        for batches, kv_heads, heads, key, value in self._pieces():
            for tile in self.tiles(batches, heads, rows):
                k = tile.keys
                part = (batches, kv_heads, slice(None), k) if lying else (batches, kv_heads, k)
                query = self._rows(self.query, tile, key.shape[0], 1.0)
                upper = self._rows(dout, tile, key.shape[0], self._kept)
                p, bent = self._scores(tile, query, key[:, k], space, bends)
                torch.softmax(p, -1, out=p)
                # The gradient of the weights, then of the softmax, then of the cap: one tile that changes its meaning.
                d = torch.bmm(upper, value[:, k].mT, out=dspace[: p.numel()].view(p.shape))
                table, dtable = p.view(tile.shape), d.view(tile.shape)
                empty = (lse[tile.queries] == -torch.inf)[..., None] if some_empty else None
                hidden = None
                if self.careful:
                    hidden = ~self._visible(tile)
                    hidden = hidden if empty is None else hidden | empty
                elif empty is not None:
                    table.masked_fill_(empty, 0.0)
                if dweights is not None:
                    # One head for all, where they are of the mean.
                    dtable.add_(tile.of(dweights), alpha=self._kept * dweights.shape[1] / self.query.shape[1])
                if hidden is not None:
                    bad = self._bad(self.value, tile, False) | self._bad(dout, tile, True)
                    table.masked_fill_(hidden, 0.0)
                    dtable.masked_fill_(bad, torch.nan).masked_fill_(hidden, 0.0)
                keep = self._keep(tile) if self.dropout_p else None
                if keep is not None:
                    _drop(dtable, keep)
                torch._softmax_backward_data(d, p, -1, p.dtype, grad_input=d)
                if dlse is not None:
                    dtable.addcmul_(table, dlse[tile.queries][..., None])
                if keep is not None:
                    _drop(table, keep)
                if hidden is not None:
                    table.masked_fill_(self._bad(dout, tile, True) & ~hidden, torch.nan)
                    dtable.masked_fill_(hidden, 0.0)
                _gather(dvalue[part], p, upper, 1.0, lying)
                if dbias is not None:
                    where = tile.of(dbias)
                    where += dtable.sum_to_size(where.shape)
                if dsegment is not None:
                    differs = self._differs(tile)
                    parts = (torch.where(of, dtable, 0.0).sum(-1) for of in (~differs, differs))
                    dsegment[tile.queries] = torch.stack(tuple(parts), -1)
                if ddistance is not None:
                    by_position = positions.by_position(dtable, tile)
                    positions.add_distance_gradient(by_position, tile)
                if bent is not None:
                    d *= bent.square_().neg_().add_(1.0).mul_(self.softcap)
                    if hidden is not None:
                        dtable.masked_fill_(hidden, 0.0)
                if dposition_query is not None:
                    if ddistance is None or bent is not None:
                        by_position = positions.by_position(dtable, tile)
                    dposition_query[tile.queries] = positions.product_gradient(by_position, tile, self._inner_scale)
                _gather(dkey[part], d, query, self._inner_scale, lying)
                dquery[tile.queries] = torch.bmm(d, key[:, k]).mul_(self._inner_scale).view(*tile.shape[:3], -1)
        positions.gather()
        if lying:
            dkey, dvalue = _standing(dkey).to(self.key.dtype), _standing(dvalue).to(self.value.dtype)
        return dquery, dkey, dvalue, *terms


def _gather(total: Tensor, scores: Tensor, queries: Tensor, scale: float, lying: bool) -> None:
    """Bring a tile's products of scores and queries to the gradients of its keys, where it adds or is alone."""
    if lying:
        total.view(-1, *total.shape[2:]).baddbmm_(queries.mT, scores, alpha=scale)
    else:
        total.copy_(torch.bmm(scores.mT, queries).mul_(scale).view(total.shape))


def _standing(lying: Tensor) -> Tensor:
    """``[B, M, D, K]`` as ``[B, M, K, D]`` in the memory of ``[B, K, M, D]``."""
    B, M, D, K = lying.shape
    turned = lying.new_empty(B, K, M * D)
    for one, other in zip(turned, lying, strict=True):
        one.copy_(other.view(M * D, K).mT)  # of two dimensions, which torch turns several times faster than three
    return turned.view(B, K, M, D).transpose(1, 2)


def _to(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return x if x is None or like is None else x.to(like.dtype)


def _drop(table: Tensor, keep: Tensor) -> None:
    """Multiply by 0 or 1. The bits of a float32 are multiplied as integers: torch does that many times faster."""
    if table.dtype == torch.float32:
        table = table.view(torch.int32)
    table.mul_(keep)


def _finite_sum(x: Tensor) -> bool:
    # A sum is NaN or infinite if an element is: one pass, and no table of booleans.
    return math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())
