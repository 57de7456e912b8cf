"""Which kernel runs a size, with which tiles: pure functions of the size and the device's limits.

A regime is a way to run the loop over time:

resident   one kernel, a program per tile of the batch, all of the recurrent weight loaded before the loop
stepwise   a library matrix product and one fused pointwise kernel for every step

A regime that spreads the weight over the programs of a grid ("persistent") would be a third answer here.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ..jit import INTERPRETED
from ..limits import Limits
from .steps import STEPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def repeats(cell: str, dtype: torch.dtype) -> bool:
    """Whether a kernel compiles to what another does, but for an instruction: fp16 as bf16, ReLU as tanh."""
    return dtype == torch.float16 or cell == "rnn_relu"


class Plan(NamedTuple):
    regime: str  # "resident" or "stepwise"
    why: str
    block_b: int = 0
    block_h: int = 0
    num_warps: int = 0
    precision: str = "ieee"  # how a product reads fp32 operands


def precision(dtype: torch.dtype, allow_tf32: bool, limits: Limits) -> str:
    """How a matrix product reads fp32 operands; constant where it makes no difference, so nothing compiles twice."""
    return "tf32" if dtype == torch.float32 and allow_tf32 and limits.backend == "cuda" else "ieee"


def block_b(limits: Limits) -> int:
    """Rows of the batch a resident program walks: the least the matrix units take, as a step's time is latency."""
    return 16 if limits.backend == "hip" else 8


def resident_bytes(cell: str, block_h: int, dtype: torch.dtype, limits: Limits) -> int:
    """Bytes of shared memory, at most, that a resident program needs.

    On CUDA the whole weight and the moving operands; on AMD the weight ends up in registers and passes through
    shared memory one gate at a time.
    """
    G, tile = STEPS[cell].gates, block_h * block_h * dtype.itemsize
    if limits.backend == "hip":
        return tile
    return G * tile + (G + 1) * block_h * block_b(limits) * 4


def scalar(dtype: torch.dtype, precision: str, limits: Limits) -> bool:
    """Whether products run as chains of scalar multiplications, unrolled, where a smaller tile is wanted."""
    return dtype == torch.float32 and precision == "ieee" and limits.backend == "cuda"


@functools.cache
def plan(cell: str, H: int, P: int, dtype: torch.dtype, allow_tf32: bool, limits: Limits) -> Plan:
    """The regime, and for the resident one its tiles, for a layer of hidden size H and output width P.

    The rules are figures read off the compiled kernels, every resident size for every target: inside them no
    register is spilled, and shared memory stays under ``resident_bytes``.
    """
    if P != H:
        return Plan("stepwise", "a projection puts a second product into every step")
    size = f"{cell} at hidden size {H} in {str(dtype).removeprefix('torch.')}"
    block_h = max(16, triton.next_power_of_2(H))
    needed = resident_bytes(cell, block_h, dtype, limits)
    if needed > limits.shared:
        return Plan("stepwise", f"{size} needs {needed} bytes in one program, this device has {limits.shared}")
    if limits.backend == "hip" and STEPS[cell].gates * block_h * block_h * dtype.itemsize > 196_608:
        return Plan("stepwise", f"{size} has a recurrent weight that spills from this device's registers")
    reads = precision(dtype, allow_tf32, limits)
    unrolled = scalar(dtype, reads, limits)
    if unrolled and block_h > 64:
        return Plan("stepwise", f"{size} without TF32 is too much for one program")
    if block_h > 128 or (block_h > 64 and dtype == torch.float32 and limits.backend == "cuda"):
        num_warps = 16
    elif block_h > 64 or (unrolled and block_h > 32):
        num_warps = 8
    else:
        num_warps = 4
    why = f"the weight of {size} stays in one program"
    return Plan("resident", why, block_b(limits), block_h, num_warps, reads)


def unsupported(cell: str, dtype: torch.dtype, device: torch.device, *sizes: int) -> str | None:
    """Why the recurrent kernels cannot run this, as a sentence, or None if they can."""
    if cell not in STEPS:
        return f"there is no kernel for the cell {cell!r}"
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and not INTERPRETED:
        return "the tensors are on the CPU, where kernels run only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for device type {device.type!r}"
    if 0 in sizes:
        return "a tensor of size zero leaves nothing to launch"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later"
    return None
