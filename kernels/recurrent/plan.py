"""Which kernel runs a size, with which tiles: pure functions of the size and the device's limits.

A regime is a way to run the loop over time:

resident    one kernel, a program per tile of the batch, all of the recurrent weight loaded before the loop
persistent  one kernel, the weight spread over the programs of a grid, which exchange h after every step
stepwise    a library matrix product and one fused pointwise kernel for every step

A plan is refused before it is launched: programs that wait for each other must all be on the device, or they wait for
ever. What fits is read off the table in ``plans.py``, nothing else.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ..jit import INTERPRETED
from ..limits import Limits
from .plans import PLANS
from .steps import STEPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def repeats(cell: str, dtype: torch.dtype) -> bool:
    """Whether a kernel compiles to what another does, but for an instruction: fp16 as bf16, ReLU as tanh."""
    return dtype == torch.float16 or cell == "rnn_relu"


class Plan(NamedTuple):
    regime: str  # "resident", "persistent" or "stepwise"
    why: str
    block_b: int = 0
    block_h: int = 0  # hidden units with their padding
    num_warps: int = 0
    precision: str = "ieee"  # how a product reads fp32 operands
    units: int = 0  # hidden units that a persistent program owns, all gate rows of each


class Tiles(NamedTuple):
    """A row of the table: how a persistent kernel is cut."""

    block_b: int  # rows of the batch that a group of programs walks
    units: int  # hidden units a program owns
    num_warps: int
    shared: int  # bytes, the larger of forward's and backward's
    us: float  # a step, forward and backward together: measured, or by the model of benchmarks/plans.py


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


@functools.lru_cache(maxsize=4096)
def plan(cell: str, H: int, P: int, dtype: torch.dtype, allow_tf32: bool, limits: Limits, B: int, D: int) -> Plan:
    """The regime, and its tiles, for a layer of hidden size H and output width P, on B rows in D directions.

    Of what is compiled, B decides at most which one of the ``PLANS`` for a size is taken, and there is one for
    each width of a tile of the batch: three.
    """
    if P != H:
        return Plan("stepwise", "a projection puts a second product into every step")
    reads = precision(dtype, allow_tf32, limits)
    one = resident(cell, H, dtype, reads, limits)
    if one.regime == "resident":
        return one
    many = persistent(cell, H, dtype, reads, limits, B, D)
    return many if many.regime == "persistent" else Plan("stepwise", f"{one.why}; {many.why}")


def size_of(cell: str, H: int, dtype: torch.dtype) -> str:
    return f"{cell} at hidden size {H} in {str(dtype).removeprefix('torch.')}"


def resident(cell: str, H: int, dtype: torch.dtype, reads: str, limits: Limits) -> Plan:
    """The plan for one program that holds the weight, or, as "stepwise", why there is none.

    The rules are figures read off the compiled kernels, every resident size for every target: inside them no
    register is spilled, and shared memory stays under ``resident_bytes``.
    """
    size = size_of(cell, H, dtype)
    block_h = max(16, triton.next_power_of_2(H))
    needed = resident_bytes(cell, block_h, dtype, limits)
    if needed > limits.shared:
        return Plan("stepwise", f"{size} needs {needed} bytes in one program, this device has {limits.shared}")
    if limits.backend == "hip" and STEPS[cell].gates * block_h * block_h * dtype.itemsize > 196_608:
        return Plan("stepwise", f"{size} has a recurrent weight that spills from this device's registers")
    unrolled = scalar(dtype, reads, limits)
    if unrolled and block_h > 64:
        return Plan("stepwise", f"{size} without TF32 is too much for one program")
    # With 16 warps a thread has half the registers, too few for a step that keeps as much as a layer norm.
    light = STEPS[cell].saved + STEPS[cell].params <= 12
    if light and (block_h > 128 or (block_h > 64 and dtype == torch.float32 and limits.backend == "cuda")):
        num_warps = 16
    elif block_h > 64 or (unrolled and block_h > 32) or (dtype == torch.float32 and not light):
        num_warps = 8
    else:
        num_warps = 4
    why = f"the weight of {size} stays in one program"
    return Plan("resident", why, block_b(limits), block_h, num_warps, reads)


WIDEST = 16  # rows of the batch for cells that keep more than those in the table


def listed(cell: str, H: int, dtype: torch.dtype, limits: Limits) -> list[Tiles]:
    """The tiles that the table has for a size, for each width of the batch one; the next larger size stands in.

    A cell that is not in the table takes the tiles of the one with as many gates or the next more: what a program
    keeps and moves goes by the gates. A device takes the list of the largest that has no more shared memory.
    """
    devices = [shared for shared in PLANS if shared <= limits.shared]
    if not devices:
        return []
    table, kind = PLANS[max(devices)], "tf32" if dtype == torch.float32 else "bf16"
    alike = [name for name, of in table if of == kind and STEPS[name].gates >= STEPS[cell].gates]
    sizes = table[min(alike, key=lambda name: STEPS[name].gates), kind] if alike else {}
    enough = [size for size in sizes if size >= H]
    tiles = [Tiles(*row) for row in sizes[min(enough)]] if enough else []
    more = STEPS[cell].params > 0 or STEPS[cell].cells > 1
    return [t for t in tiles if not more or t.block_b <= WIDEST]


def persistent(cell: str, H: int, dtype: torch.dtype, reads: str, limits: Limits, B: int, D: int) -> Plan:
    """The plan for a grid of programs that hold the weight together, or, as "stepwise", why there is none.

    Every program waits for the others, so all of them have to be on the device at once: one per multiprocessor.
    """
    size = size_of(cell, H, dtype)
    if limits.backend != "cuda":
        return Plan("stepwise", "programs that wait for each other are written for CUDA")
    if STEPS[cell].whole:
        return Plan("stepwise", f"a step of {cell} needs all hidden units at once, a program of a grid has a slice")
    if scalar(dtype, reads, limits):
        return Plan("stepwise", f"{size} without TF32 leaves the tensor cores idle")
    tiles = listed(cell, H, dtype, limits)
    if not tiles:
        needed = STEPS[cell].gates * H * H * dtype.itemsize
        return Plan(
            "stepwise",
            f"no split of {size} is listed that this device could hold: its weight is {needed} bytes,"
            f" for {limits.sms} x {limits.shared} bytes",
        )
    grids = [triton.cdiv(B, t.block_b) * triton.cdiv(H, t.units) * D for t in tiles]
    fitting = [(t.us, grid, t) for t, grid in zip(tiles, grids, strict=True) if grid <= limits.sms]
    if not fitting:
        least, t = min(zip(grids, tiles, strict=True))
        return Plan(
            "stepwise",
            f"{size} needs {least} programs at once ({triton.cdiv(B, t.block_b)} x {t.block_b} rows,"
            f" {triton.cdiv(H, t.units)} x {t.units} units, {D} x 1 direction), this device holds {limits.sms}",
        )
    _, grid, t = min(fitting)
    why = (
        f"the weight of {size} stays in {triton.cdiv(H, t.units)} programs of {t.units} units,"
        f" {grid} programs for {B} rows in tiles of {t.block_b}"
    )
    return Plan("persistent", why, t.block_b, padded(H), t.num_warps, reads, t.units)


def padded(H: int) -> int:
    """Hidden units as the product of a persistent program counts them, in chunks of a power of two."""
    return triton.cdiv(H, 128) * 128


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
