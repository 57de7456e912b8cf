"""Products with keys of relative positions, and their tiles as the scores have them.

A tile of scores of B queries i and B keys j needs the keys of relative positions from ``1 - B`` to ``B - 1`` around
``j - i`` of its corner: a window of 2B (the last is not read). It is held as two tiles of B, ``before`` and ``after``,
for the next tile of keys has this one's ``after`` as its ``before``. Query i meets key j in place ``j - i + B - 1``, so
each query reads a stretch of B, one further to the left than the query before: the product is read askew.
"""

import triton
import triton.language as tl

from ..jit import dot
from .scores import at_row, load_tile


@triton.jit
def window_of(i0, j0, zero, BLOCK: tl.constexpr):
    """The first relative position that a tile needs with BLOCK queries from i0 and BLOCK keys from j0.

    zero: the row of the table for a key that stands where query 0 is counted from, ``position_zero - (K - Q)``.
    """
    return j0 - i0 - (BLOCK - 1) + zero


@triton.jit
def load_positions(table, first, rows, columns, WIDTH: tl.constexpr):
    """``table[first + rows, columns]``, upright or lying, as rows and columns (the whole width) broadcast.

    table: pointer to a head, stride of its rows, the last row. What lies past either end takes the end's row.
    """
    ptr, stride, last = table
    start = tl.minimum(tl.maximum(first, 0), last)
    rows = tl.minimum(tl.maximum(first + rows, 0), last) - start
    return load_tile(at_row(ptr, start, stride), rows, stride, columns, 1, True, WIDTH, False)


@triton.jit
def turned(BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """Queries, and places within half a window, of a square tile in which places run along AXIS."""
    queries = tl.expand_dims(tl.arange(0, BLOCK), AXIS)
    places = tl.expand_dims(tl.arange(0, BLOCK), 1 - AXIS)
    return queries, places


@triton.jit
def taken(tile, queries, places, AXIS: tl.constexpr):
    """What each query has in these places (modulo B) of a square tile: a tile again.

    Gathered from one row, for that goes through shared memory; along an axis numbers are shuffled between the lanes of
    a warp, which takes more instructions and more registers.
    """
    BLOCK: tl.constexpr = tile.shape[0]
    places = places & (BLOCK - 1)
    index = queries * BLOCK + places if AXIS == 1 else places * BLOCK + queries
    found = tl.gather(tl.reshape(tile, [BLOCK * BLOCK]), tl.reshape(index, [BLOCK * BLOCK]), 0)
    return tl.reshape(found, [BLOCK, BLOCK])


@triton.jit
def skewed(before, after, AXIS: tl.constexpr):
    """Of products ``[queries, window]`` (AXIS 1, or its transpose: 0) in two halves, those of each query with each key.

    Of the two places that lie B apart a query reads one, so one tile holds all that is read, turned by a number of
    places that differs from query to query.
    """
    BLOCK: tl.constexpr = before.shape[0]
    queries, places = turned(BLOCK, AXIS)
    read = tl.where(queries + places >= BLOCK - 1, before, after)
    return taken(read, queries, places - queries + (BLOCK - 1), AXIS)


@triton.jit
def askew(position, i0, j0, COUNT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """What positions add to the products of a tile of queries from i0 with so many keys from j0, from a whole window.

    position: as for ``products``; the last is what ``window_of`` calls zero. There are no more keys than queries.
    """
    BLOCK: tl.constexpr = position[0].shape[0]
    places, columns = tl.arange(0, 2 * BLOCK), tl.arange(0, position[0].shape[1])
    table = (position[1], position[2], position[3])
    keys = load_positions(table, window_of(i0, j0, position[4], BLOCK), places[None, :], columns[:, None], WIDTH)
    product = dot(position[0], keys, tl.zeros([BLOCK, 2 * BLOCK], tl.float32), PRECISION)
    rows = tl.arange(0, BLOCK)[:, None]
    index = rows * (2 * BLOCK) + (tl.arange(0, COUNT)[None, :] - rows + (BLOCK - 1))
    found = tl.gather(tl.reshape(product, [2 * BLOCK * BLOCK]), tl.reshape(index, [BLOCK * COUNT]), 0)
    return tl.reshape(found, [BLOCK, COUNT])


@triton.jit
def products(position, first, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Half a window: the products of a tile of queries with the keys of as many relative positions from the first.

    position: the tile, the pointer to a head of the table, the stride of its rows, the last row, and what follows.
    """
    BLOCK: tl.constexpr = position[0].shape[0]
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, position[0].shape[1])
    table = (position[1], position[2], position[3])
    keys = load_positions(table, first, rows[None, :], columns[:, None], WIDTH)
    return dot(position[0], keys, tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)


@triton.jit
def unskewed(tile, AXIS: tl.constexpr):
    """The reverse of ``skewed``: what each query has for each key, by places in two halves of a window; else zero."""
    BLOCK: tl.constexpr = tile.shape[0]
    queries, places = turned(BLOCK, AXIS)
    read = taken(tile, queries, places + queries + 1, AXIS)
    is_before = queries + places >= BLOCK - 1
    return tl.where(is_before, read, 0.0).to(tile.dtype), tl.where(is_before, 0.0, read).to(tile.dtype)


@triton.jit
def along_diagonals(before, after):
    """Of products ``[keys, queries]`` in two halves of 2B keys and with B queries, the B diagonals from the first.

    That is ``[diagonals, queries]``: query i meets key ``i + l`` on diagonal l.
    """
    BLOCK: tl.constexpr = before.shape[0]
    queries, places = turned(BLOCK, 0)
    read = tl.where(places >= queries, before, after)
    return taken(read, queries, places + queries, 0)


@triton.jit
def positions_of(position, b, n, first_q, N, Q, K):
    """Of a head: its rows of position_query (pointer, strides), its table for ``load_positions``, and the row for a key
    that stands where query 0 is counted from. position: pointers, strides, heads, last row and row of position 0.
    """
    query_ptr, stride_qb, stride_qn, stride_qq, stride_qp, key_ptr, stride_kb, stride_kr, stride_kl, R, last, zero = (
        position
    )
    query_ptr = at_row(at_row(at_row(query_ptr, b, stride_qb), n, stride_qn), first_q, stride_qq)
    key_ptr = at_row(at_row(key_ptr, b, stride_kb), n // (N // R), stride_kr)
    return (query_ptr, stride_qq, stride_qp), (key_ptr, stride_kl, last), zero - (K - Q)


@triton.jit
def load_window(table, i0, j0, zero, BLOCK: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The two halves of the window of a tile of BLOCK queries from i0 and BLOCK keys from j0, ``[BLOCK, BLOCK_P]``."""
    first = window_of(i0, j0, zero, BLOCK)
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_P)[None, :]
    return load_positions(table, first, rows, columns, P), load_positions(table, first + BLOCK, rows, columns, P)


@triton.jit
def position_scores(pq, table, zero, i0, j0, AXIS: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """What positions add to the products of a square tile (AXIS 0: lying), and the two halves of its window."""
    none = tl.zeros([pq.shape[0], pq.shape[0]], tl.float32)
    before, after = load_window(table, i0, j0, zero, pq.shape[0], P, pq.shape[1])
    if AXIS == 1:
        first, second = dot(pq, tl.trans(before), none, PRECISION), dot(pq, tl.trans(after), none, PRECISION)
    else:
        first, second = dot(before, tl.trans(pq), none, PRECISION), dot(after, tl.trans(pq), none, PRECISION)
    return skewed(first, second, AXIS), before, after
