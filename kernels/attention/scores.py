"""What a query sees and how much: the pieces that all attention kernels share.

Letters: i numbers queries, j keys; a tile of scores is ``[BLOCK_M, BLOCK_N]``, queries by keys, or its transpose
where a kernel walks over queries. Scores are kept in units of log 2, for ``exp2`` is what the hardware has.
"""

import triton
import triton.language as tl

from ..jit import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_in_band(i, j, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether key j is in the band of query i: ``-left <= j - i - shift <= right``; i and j broadcast."""
    offset = j - i - shift
    visible = offset == offset
    if HAS_LEFT:
        visible = visible & (offset >= -left)
    if HAS_RIGHT:
        visible = visible & (offset <= right)
    return visible


@triton.jit
def keys_of(first, last, shift, left, right, K, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of keys ``[low, high)`` that any query from first to last sees in the band."""
    low = 0
    high = K
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(first + shift - left, 0), K)
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(last + shift + right + 1, 0), K)
    return low, high


@triton.jit
def keys_of_all(first, last, shift, left, right, K, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The range of keys ``[low, high)`` that every query from first to last sees in the band; may be empty."""
    low = 0
    high = K
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(last + shift - left, 0), K)
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(first + shift + right + 1, 0), K)
    return low, high


@triton.jit
def capped(qk, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The score of a product, in units of log 2: scaled, and bent below the cap where there is one."""
    if HAS_SOFTCAP:
        return softcap * tanh(qk * (scale / softcap)) * LOG2E
    return qk * (scale * LOG2E)


@triton.jit
def capped_gradient(score, softcap, HAS_SOFTCAP: tl.constexpr):
    """The derivative of ``capped`` with respect to ``scale * qk``, from its own result; 1 without a cap."""
    if HAS_SOFTCAP:
        bent = score * (LN2 / softcap)
        return 1.0 - bent * bent
    return tl.full(score.shape, 1.0, tl.float32)


@triton.jit
def mix(x):
    """MurmurHash3's finaliser (Appleby), of uint32."""
    x = x ^ (x >> 16)
    x = x * tl.full(x.shape, 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full(x.shape, 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def dropout_keys(seed_ptr, head, i):
    """Two words for each row i (a tensor) of a head ``b * N + n``: all that its dropout depends on."""
    seed = tl.load(seed_ptr)
    low = tl.full(i.shape, 0, tl.uint32) + (seed & 0xFFFFFFFF).to(tl.uint32)
    high = tl.full(i.shape, 0, tl.uint32) + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    head = tl.full(i.shape, 0, tl.uint32) + head.to(tl.uint32)
    of_head = mix(mix(head * tl.full(i.shape, 0x9E3779B9, tl.uint32) + low) ^ high)
    first = mix(of_head + i.to(tl.uint32) * tl.full(i.shape, 0x85EBCA77, tl.uint32))
    return first, mix(first + tl.full(i.shape, 0xC2B2AE3D, tl.uint32))


@triton.jit
def dropout_keep(first, second, j, threshold):
    """Whether the weight of row i (its two keys) and column j is kept; they broadcast. As the reference draws it."""
    x = first ^ (j.to(tl.uint32) * tl.full(j.shape, 0x9E3779B9, tl.uint32))
    x = x ^ (x >> 16)
    x = (x * tl.full(x.shape, 0x85EBCA6B, tl.uint32)) ^ second
    x = x ^ (x >> 13)
    x = x * tl.full(x.shape, 0xC2B2AE35, tl.uint32)
    x = x ^ (x >> 16)
    return x.to(tl.int32, bitcast=True) >= threshold
