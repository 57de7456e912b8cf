"""What goes by position in the scores, tile by tile: a table along diagonals, and products that are moved onto them.

A tile of R rows and C keys meets R + C - 1 relative positions, each along a diagonal. Of a matrix ``[R, R + C - 1]``
with a column for each position, a row needs C columns next to each other, from row to row one column earlier: in
memory that is a tile whose rows are R + C - 2 apart, so that moving between the two is a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blockwise import Call, Tile


def stretch(table: Tensor, first: int, count: int, dim: int) -> Tensor:
    """``count`` entries from ``first`` on of a table that goes on beyond either end as it ends."""
    length = table.shape[dim]
    if first >= 0 and first + count <= length:
        return table.narrow(dim, first, count)
    entries = torch.arange(first, first + count, device=table.device)
    return table.index_select(dim, entries.clamp_(0, length - 1))


def gather(table: Tensor, stretched: Tensor, first: int) -> None:
    """Add to ``table [..., L]`` what came to a stretch of it: the transpose of ``stretch``."""
    length, count = table.shape[-1], stretched.shape[-1]
    low, high = (max(0, min(end, count)) for end in (-first, length - first))
    table[..., 0] += stretched[..., :low].sum(-1)
    table[..., -1] += stretched[..., high:].sum(-1)
    if low < high:
        table[..., low + first : high + first] += stretched[..., low:high]


def along_diagonals(line: Tensor, keys: int) -> Tensor:
    """``[..., R + C - 1]`` as ``[..., R, C]``: the last row starts at the first entry, each row above one later."""
    return line.unfold(-1, keys, 1).flip(-2)


class Positions:
    """The terms by position of a call's tiles, and sums for the gradients of their tables.

    What is made of the tables serves all tiles of the heads that read the same part of them.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        # Batches that share a table of keys stand below each other.
        self.swapped = call.position_key is not None and call.position_key.shape[0] == 1
        self.space = self.cleared = call.query.new_empty(0, dtype=call.wide)
        self.cleared_for: tuple[int, ...] = ()
        self.part: tuple[slice | None, ...] | None = None
        self.rows = self.last = 0  # of the tiles, and the first of the last one
        self.totals: tuple[Tensor | None, Tensor | None] = None, None  # gradients of distance and position_key

    def enter(self, tile: Tile) -> Positions:
        """Make ready what the tiles of these heads need, of which this is the first."""
        call = self.call
        tables = [t.shape for t in (call.distance, call.position_key) if t is not None]
        of_heads = enumerate((tile.batches, tile.heads))
        part = tuple(at if any(shape[d] > 1 for shape in tables) else None for d, at in of_heads)
        if part == self.part and tile.shape[2] <= self.rows and tile.rows.start <= self.last:
            return self
        self.gather()
        self.part, self.batches, self.heads, self.rows = part, tile.batches, tile.heads, tile.shape[2]
        Q, K = call.whole.shape[2:]
        # Stretches reach from the last tile's last row (which may be beyond the last query) to the first row.
        self.last = (Q - 1) // self.rows * self.rows
        self.low, count = -(self.last + self.rows - 1) - (K - Q), self.last + self.rows + K - 1
        if call.distance is not None:
            line = stretch(self._of_heads(call.distance).to(call.wide), self.low + call.distance_zero, count, -1)
            self.distances = along_diagonals(self._within_band(line), K + self.last)
            self.distance_sums = torch.zeros_like(line)
        if call.position_key is not None:
            of_keys = stretch(self._of_heads(call.position_key), self.low + call.position_zero, count, 2)
            self.keys = call.operand(of_keys).flatten(0, 1).contiguous()
            self.key_sums = self.keys.new_zeros(self.keys.mT.shape)
        return self

    def _of_heads(self, table: Tensor) -> Tensor:
        """The part of a table ``[B or 1, N or 1, ...]`` that these heads read."""
        parts = zip(table.shape, (self.batches, self.heads), strict=False)
        return table[tuple(slice(None) if n == 1 else part for n, part in parts)]

    def _within_band(self, line: Tensor) -> Tensor:
        """A band is a matter of position too: -inf outside of it costs nothing more."""
        left, right, shift = self.call.band
        if max(left, right) < 0:
            return line
        Q, K = self.call.whole.shape[2:]
        offset = torch.arange(self.low, self.low + line.shape[-1], device=line.device) + (K - Q - shift)
        outside = (offset < -left) & (left >= 0) | (offset > right) & (right >= 0)
        return line.masked_fill(outside, -torch.inf)

    def added(self, tile: Tile) -> Tensor:
        """The distances of a tile, ``[b or 1, n or 1, rows, keys]``, of which other tiles are views too."""
        first = tile.keys.start - tile.rows.start + self.last
        return self.distances[..., : tile.shape[2], first : first + tile.shape[3]]

    def product(self, tile: Tile, scale: float) -> Tensor:
        """Position queries times position keys, ``[b, n, rows, keys]``, until the next call."""
        rows, (matrix, moved) = self._position_rows(tile), self._in_space(tile)
        matrix = self._stacked(matrix)
        torch.baddbmm(matrix, rows, self.keys[:, self._columns(tile)].mT, beta=0, alpha=scale, out=matrix)
        return moved

    def bad(self, tile: Tile) -> Tensor:
        """Where that product has a factor that is not finite."""
        query, key = self.call.position_query, self.call.position_key
        assert query is not None
        assert key is not None
        start = self.low + self._columns(tile).start + self.call.position_zero
        line = stretch(~self._of_heads(key).isfinite().all(-1), start, sum(tile.shape[2:]) - 1, -1)
        return along_diagonals(line, tile.shape[3]) | ~query[tile.queries].isfinite().all(-1)[..., None]

    def by_position(self, scores: Tensor, tile: Tile) -> Tensor:
        """A tile of a gradient with a column for each position: ``[b, n, rows, rows + keys - 1]``."""
        if self.cleared_for != tile.shape:
            self.cleared, self.cleared_for = self._room(self.cleared, tile), tile.shape
            self.cleared.zero_()  # and only within the tile is it written
        matrix, moved = self._matrix(self.cleared, tile)
        moved.copy_(scores)
        return matrix

    def add_distance_gradient(self, matrix: Tensor, tile: Tile) -> None:
        part = self.distance_sums[..., self._columns(tile)]
        part += matrix.sum(2).sum_to_size(part.shape)

    def product_gradient(self, matrix: Tensor, tile: Tile, scale: float) -> Tensor:
        """The gradient of the tile's position queries; that of the keys is added to their sums."""
        rows, columns = self._position_rows(tile), self._columns(tile)
        b, h, *_ = tile.shape
        matrix = self._stacked(matrix)
        self.key_sums[..., columns].baddbmm_(rows.mT, matrix, alpha=scale)
        found = torch.bmm(matrix, self.keys[:, columns]).mul_(scale)
        shape = *tile.shape[2:3], found.shape[-1]
        return found.view(h, b, *shape).transpose(0, 1) if self.swapped else found.view(b, h, *shape)

    def gather(self) -> None:
        """Bring the sums to the gradients of the tables."""
        distance, position_key = self.totals
        if self.part is None:
            return
        if distance is not None:
            gather(self._of_heads(distance), self.distance_sums, self.low + self.call.distance_zero)
        if position_key is not None:
            table = self._of_heads(position_key)
            gather(table.mT, self.key_sums.unflatten(0, table.shape[:2]), self.low + self.call.position_zero)

    def _columns(self, tile: Tile) -> slice:
        """The part of the stretches that a tile meets."""
        first = tile.keys.start - tile.rows.stop + self.last + self.rows
        return slice(first, first + tile.shape[2] + tile.shape[3] - 1)

    def _in_space(self, tile: Tile) -> tuple[Tensor, Tensor]:
        self.space = self._room(self.space, tile)
        return self._matrix(self.space, tile)

    @staticmethod
    def _room(space: Tensor, tile: Tile) -> Tensor:
        b, h, rows, keys = tile.shape
        size = b * h * rows * (rows + keys - 1)
        return space if space.numel() >= size else space.new_empty(size)

    def _matrix(self, space: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """A tile with a column for each position, ``[b, n, rows, rows + keys - 1]``, and the tile in it."""
        b, h, rows, keys = tile.shape
        width = rows + keys - 1
        space = space[: b * h * rows * width]
        matrix = space.view(h, b, rows, width).transpose(0, 1) if self.swapped else space.view(b, h, rows, width)
        return matrix, matrix.as_strided(tile.shape, (*matrix.stride()[:2], width - 1, 1), rows - 1)

    def _stacked(self, x: Tensor) -> Tensor:
        """``[b, n, rows, ...]`` with all the rows that read the same keys below each other."""
        return (x.transpose(0, 1) if self.swapped else x).reshape(self.keys.shape[0], -1, x.shape[-1])

    def _position_rows(self, tile: Tile) -> Tensor:
        assert self.call.position_query is not None
        return self._stacked(self.call.operand(self.call.position_query[tile.queries]))
