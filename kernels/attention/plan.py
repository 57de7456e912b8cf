"""Which tiles a size gets, what there is no kernel for, and what launchers pass: pure functions."""

import functools
from typing import NamedTuple

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

    ``banded``: something may be hidden; ``rich``: each score takes more than that, a bias, a mask of its own, a cap
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


def unsupported(dtype: torch.dtype, device: torch.device, D: int, E: int) -> str | None:
    """Why the attention kernels cannot run this, as a sentence, or None if they can."""
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if max(D, E) > WIDEST:
        return f"the kernels take heads of width {WIDEST} at most, not {max(D, E)}"
    if min(D, E) == 0:
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
