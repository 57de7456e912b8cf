"""Which tiles a size gets, what there is no kernel for, and what launchers pass: pure functions."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..jit import INTERPRETED
from ..limits import Limits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # head


class Tiles(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


def precision(dtype: torch.dtype, allow_tf32: bool, limits: Limits) -> str:
    """How a matrix product reads fp32 operands; constant where it makes no difference, so nothing compiles twice."""
    return "tf32" if dtype == torch.float32 and allow_tf32 and limits.backend == "cuda" else "ieee"


def block(width: int) -> int:
    """The columns of a tile that holds a head of this width: a power of two, and what a matrix unit takes."""
    return max(16, triton.next_power_of_2(width))


@functools.cache
def forward_tiles(
    dtype: torch.dtype, D: int, E: int, precision: str, banded: bool, rich: bool, max_q: int, limits: Limits
) -> Tiles:
    """The tiles of the forward kernel for heads of width D and E and at most max_q queries.

    ``banded``: something may be hidden; ``rich``: each score takes more than that: a term that is added, a mask or
    or dropout. The rules are figures read off the compiled kernels: the largest tiles that spill no register in a
    loop and fit in shared memory.
    """
    width = block(max(D, E))
    large = limits.shared > 200_000
    if limits.backend == "hip":
        tiles = Tiles(128, 32, 4, 1)
    elif dtype == torch.float32 and precision == "ieee":  # products are chains of scalar multiplications
        tiles = Tiles(64, 32, 8, 1) if width <= 64 else Tiles(32, 16 if rich else 32, 8, 1)
    elif dtype == torch.float32:
        if width <= 64:
            tiles = Tiles(128, 32 if rich else 64, 8, 2)
        else:
            tiles = Tiles(64 if rich and large else 128, 32, 8, 2)
    elif width <= 64:
        tiles = Tiles(128, 128, 8, 2) if large and not rich else Tiles(128, 64, 8, 3)
    elif width == 128 and large:
        tiles = Tiles(128, 32, 8, 3) if rich else Tiles(128, 128, 8, 2)
    elif width == 128:
        tiles = Tiles(128, 32, 8, 3) if banded or rich else Tiles(128, 64, 8, 2)
    elif large:
        tiles = Tiles(128, 32, 8, 2)
    else:
        tiles = Tiles(64, 32, 8, 2)
    if max_q <= 64 < tiles.block_m:  # the least that a warp group multiplies
        tiles = tiles._replace(block_m=64, num_warps=4)
    return tiles


@functools.cache
def weights_tiles(dtype: torch.dtype, D: int, precision: str, limits: Limits) -> Tiles:
    """The tiles of the weights kernel for heads of width D."""
    if dtype == torch.float32 and precision == "ieee":
        tiles = Tiles(64 if D <= 64 else 32, 32, 8, 1)
    else:
        tiles = Tiles(64, 64 if D <= 128 or limits.shared > 100_000 else 32, 8, 1)
    return tiles


@functools.cache
def position_tiles(dtype: torch.dtype, D: int, E: int, P: int, precision: str, max_q: int, limits: Limits) -> Tiles:
    """The tiles of the forward kernel with relative positions of width P, which are square; read off as above."""
    width = block(max(D, E, P))
    if dtype == torch.float32 and precision == "ieee":  # products are chains of scalar multiplications
        tiles = Tiles(16, 16, 8, 1)
    elif dtype == torch.float32 or limits.backend == "hip" or width > (128 if limits.shared > 200_000 else 64):
        tiles = Tiles(32, 32, 8 if width > 64 else 4, 2)
    else:
        tiles = Tiles(64, 64, 8, 2)
    if limits.backend == "hip":
        tiles = tiles._replace(num_stages=1)
    size = min(tiles.block_m, max(16, triton.next_power_of_2(max_q)))
    return tiles._replace(block_m=size, block_n=size)


@functools.cache
def position_weights_tiles(dtype: torch.dtype, D: int, P: int, precision: str, limits: Limits) -> Tiles:
    """The tiles of the weights kernel with relative positions of width P: no more keys than queries."""
    size, _, num_warps, _ = position_tiles(dtype, D, D, P, precision, 64, limits)
    return Tiles(size, max(16, size // 2), num_warps, 1)


def unsupported(dtype: torch.dtype, device: torch.device, D: int, E: int, P: int | None = None) -> str | None:
    """Why the attention kernels cannot run this, as a sentence, or None if they can.

    D, E and P: the widths of queries and keys, of values, and of relative positions where there are any. What has
    relative positions runs in the kernel for queries in tiles, however few there are: ``decode.py`` knows none.
    """
    widths = (D, E) if P is None else (D, E, P)
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if max(widths) > WIDEST:
        return f"the kernels take heads of width {WIDEST} at most, not {max(widths)}"
    if min(widths) == 0:
        return "heads of width zero leave nothing to multiply"
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU, where kernels run only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for device type {device.type!r}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later"
    return None


def strides(name: str, dims: str, tensor: Tensor | None) -> dict[str, int]:
    """The strides of a tensor by the names that the kernels give them; of no tensor, zeros."""
    return {f"stride_{name}{d}": 0 if tensor is None else tensor.stride(at) for at, d in enumerate(dims)}


def per_query(tensor: Tensor | None) -> bool:
    """Whether an expanded bias or mask ``[B, N, Q, K]`` says something else to each query."""
    return tensor is not None and tensor.shape[2] > 1 and tensor.stride(2) != 0


def kept(dropout_p: float) -> float:
    """What dropout multiplies the weights by that it keeps."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def relative(
    query: Tensor,
    distance: Tensor | None = None,
    segment: Tensor | None = None,
    segment_q: Tensor | None = None,
    segment_k: Tensor | None = None,
    rank_q: Tensor | None = None,
    rank_k: Tensor | None = None,
    distance_zero: int = 0,
) -> dict[str, Any]:
    """What kernels are told of distances ``[B, N, L]``, segments ``[B, N, Q, 2]`` and ranks ``[B, N, Q]``.

    Their dimensions of batch and head may be 1: then their stride is 0.
    """
    B, N = query.shape[:2]
    distance, rank_q = (None if t is None else of_rows(t).expand(B, N, -1) for t in (distance, rank_q))
    rank_k = None if rank_k is None else of_rows(rank_k).expand(B, -1)
    segment, segment_q, segment_k = (None if t is None else t.contiguous() for t in (segment, segment_q, segment_k))
    return {
        "distance_ptr": distance, **strides("x", "bn", distance),
        "distance_last": 0 if distance is None else distance.shape[2] - 1, "distance_zero": distance_zero,
        "segment_ptr": segment, "segment_q_ptr": segment_q, "segment_k_ptr": segment_k,
        "rank_q_ptr": rank_q, **strides("a", "bn", rank_q), "rank_k_ptr": rank_k, **strides("c", "b", rank_k),
    }  # fmt: skip


def positions(position_query: Tensor | None, position_key: Tensor | None, position_zero: int) -> dict[str, Any]:
    """What kernels are told of the product with relative positions, ``[B, N, Q, P]`` with ``[B, R, L, P]``."""
    if position_query is None or position_key is None:
        sizes = {"R": 1, "position_last": 0, "position_zero": 0, "P": 1, "BLOCK_P": 16}
    else:
        position_key = of_rows(position_key).expand(len(position_query), -1, -1, -1)
        (R, L, P) = position_key.shape[1:]
        sizes = {"R": R, "position_last": L - 1, "position_zero": position_zero, "P": P, "BLOCK_P": block(P)}
    return {
        "position_query_ptr": position_query, **strides("u", "bnqp", position_query),
        "position_key_ptr": position_key, **strides("t", "brl", position_key), **sizes,
    }  # fmt: skip


def of_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose rows lie without gaps between their numbers."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def has_any(terms: dict[str, Any]) -> bool:
    """Whether there are distances, segments or ranks."""
    return any(terms[f"{name}_ptr"] is not None for name in ("distance", "segment", "rank_q"))
