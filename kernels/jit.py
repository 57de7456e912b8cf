"""Small jit functions that every kernel may use, and the few facts about Triton that launchers need."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # fixed when a kernel is decorated, so read once, here

# Contracting a multiply and an add into one instruction is more exact and faster. Said at every launch, because
# the default differs between Triton's versions and backends.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """A quotient of two exponentials would overflow to NaN; this form cancels near zero, where its series stands in."""
    s = x * x
    series = -0.0539682540 + s * (0.0218694885 - s * 0.00886323553)
    near = x + x * s * (-0.333333333 + s * (0.133333333 + s * series))
    return tl.where(tl.abs(x) < 0.3, near, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, accumulated in fp32."""
    if INTERPRETED:  # whose product would take bf16 for the integers that hold its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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


@triton.jit
def add_tiles(tiles, others):
    total = ()
    for n in tl.static_range(len(tiles)):
        total = total + (tiles[n] + others[n],)
    return total


@triton.jit
def staying(stay_ptr, row, b, h, mask, D: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """Zoneout of the N states of a step: where each stays as it was (tiles), or how much of it (N numbers)."""
    stay = ()
    if stay_ptr is not None:
        if stay_ptr.dtype.element_ty == tl.float32:
            for n in tl.static_range(N):
                stay = stay + (tl.load(stay_ptr + n),)
        else:
            stay = load_tiles(stay_ptr + row * (N * H), b * (D * N * H) + h, mask, N, H)
    return stay


@triton.jit
def zone_out(stay, new, old):
    """The states that a step leaves (Krueger et al. 2017), from its own and those it read."""
    states = ()
    for n in tl.static_range(len(new)):
        if stay[n].dtype == tl.float32:
            states = states + (stay[n] * old[n] + (1.0 - stay[n]) * new[n],)
        else:
            states = states + (tl.where(stay[n] != 0, old[n], new[n]),)
    return states


@triton.jit
def zone_out_backward(stay, dstates):
    """Gradients of the states that the step made, and of those it read."""
    dnew = ()
    dold = ()
    for n in tl.static_range(len(dstates)):
        if stay[n].dtype == tl.float32:
            dnew = dnew + ((1.0 - stay[n]) * dstates[n],)
            dold = dold + (stay[n] * dstates[n],)
        else:
            dnew = dnew + (tl.where(stay[n] != 0, 0.0, dstates[n]),)
            dold = dold + (tl.where(stay[n] != 0, dstates[n], 0.0),)
    return dnew, dold


@triton.jit
def time_of(s, T, d):
    """The time that direction d reads at its s-th step: s, or T-1-s in the backward direction."""
    return s + d * (T - 1 - 2 * s)


@triton.jit
def row_of(t, start, d, B, D: tl.constexpr):
    """The row of ``[T, B, D, ...]`` at which a program's tile begins; 64 bits, for T*B*D*width may be large."""
    return (B.to(tl.int64) * t + start) * D + d


@triton.jit
def initial_state(h_ptr, c_ptr, first, b, h, mask, C: tl.constexpr, H: tl.constexpr):
    """h ``[D, B, H]`` and the cells ``[D, B, C, H]`` of a program's rows."""
    state = load_tiles(h_ptr + first * H, b * H + h, mask, 1, H)
    if c_ptr is not None:
        state = state + load_tiles(c_ptr + first * (C * H), b * (C * H) + h, mask, C, H)
    return cast_tiles(state, tl.float32)


@triton.jit
def store_state(h_ptr, c_ptr, first, b, h, state, mask, C: tl.constexpr, H: tl.constexpr):
    store_tiles(h_ptr + first * H, b * H + h, state[:1], mask, H)
    if c_ptr is not None:
        store_tiles(c_ptr + first * (C * H), b * (C * H) + h, state[1:], mask, H)


@triton.jit
def arriving(
    dy_ptr, dcells_ptr, gates_ptr, cells_ptr, h_prev_ptr, c_prev_ptr, row, b, h, mask,
    D: tl.constexpr, S: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """What backward reads at one step: the gradients of its outputs, the saved gates, and ``kept``."""
    in_row = b * (D * H) + h
    in_cells = b * (D * C * H) + h
    dout = load_tiles(dy_ptr + row * H, in_row, mask, 1, 0)
    if dcells_ptr is not None:
        dout = dout + load_tiles(dcells_ptr + row * (C * H), in_cells, mask, C, H)
    saved = load_tiles(gates_ptr + row * (S * H), b * (D * S * H) + h, mask, S, H)
    kept = ()
    if h_prev_ptr is not None:
        kept = kept + load_tiles(h_prev_ptr + row * H, in_row, mask, 1, 0)
    if c_prev_ptr is not None:
        kept = kept + load_tiles(c_prev_ptr + row * (C * H), in_cells, mask, C, H)
        kept = kept + load_tiles(cells_ptr + row * (C * H), in_cells, mask, C, H)
    return dout, saved, kept


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher ``(cell, tensor, ...)`` that launches where the tensor lives; Triton takes the current device."""

    @functools.wraps(launcher)
    def inside(cell: str, tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tensor):  # for a CPU tensor, nothing
            return launcher(cell, tensor, *arguments, **options)

    return inside


NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}  # of element types, as Triton's signatures spell them


def configuration(
    name: str,
    kernel: Any,
    tensors: Mapping[str, torch.dtype | None],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 1,
) -> dict[str, Any]:
    """One way in which a kernel is launched, as compiling it without a device wants it.

    tensors gives the element type of every pointer argument, or None where the launcher passes None; arguments
    named in neither are the numbers that vary per call; a signature says i32 for each.
    """
    missing = {a for a in kernel.arg_names if a.endswith("_ptr")} ^ tensors.keys()
    assert not missing, f"{name}: pointers {missing} are not those of the kernel"
    constexprs = dict(constants) | {a: None for a, dtype in tensors.items() if dtype is None}
    pointers = {a: "*" + NAMES[dtype] for a, dtype in tensors.items() if dtype is not None}
    signature = {a: "constexpr" if a in constexprs else pointers.get(a, "i32") for a in kernel.arg_names}
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
