"""Small jit functions that every kernel may use, and the few facts about Triton that launchers need."""

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret  # fixed when a kernel is decorated, so read once, here

# Contracting a multiply and an add into one instruction is more exact and faster. Said at every launch, because
# the default differs between Triton's versions and backends.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0  # a quotient of two exponentials would overflow to NaN


@triton.jit
def load_tiles(ptr, offsets, mask, N: tl.constexpr, STRIDE: tl.constexpr):
    """N tiles, STRIDE elements apart: the gates of a step, or the gate blocks of a weight."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offsets + n * STRIDE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptr, offsets, tiles, mask, STRIDE: tl.constexpr):
    for n in tl.static_range(len(tiles)):
        tl.store(ptr + offsets + n * STRIDE, tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def cast_tiles(tiles, dtype: tl.constexpr):
    cast = ()
    for n in tl.static_range(len(tiles)):
        cast = cast + (tiles[n].to(dtype),)
    return cast


@triton.jit
def keep_tiles(condition, tiles):
    """The tiles where the condition holds, zero elsewhere: a selection, not a product, so NaN cannot leak."""
    kept = ()
    for n in tl.static_range(len(tiles)):
        kept = kept + (tl.where(condition, tiles[n], 0.0),)
    return kept


@triton.jit
def select_tiles(condition, tiles, others):
    selected = ()
    for n in tl.static_range(len(tiles)):
        selected = selected + (tl.where(condition, tiles[n], others[n]),)
    return selected


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How a matrix product reads fp32 operands; for other dtypes the flag would only compile a kernel twice."""
    return "tf32" if dtype == torch.float32 and allow_tf32 and not torch.version.hip else "ieee"
