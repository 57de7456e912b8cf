"""Offsets are 64 bits wide where T*B*H may be large: every address a kernel touches lies in the tensor it belongs to.

A kernel runs in the interpreter on tensors that do not exist, far too large to: memory is replaced by a list of the
addresses asked for. A tensor's shape is the one that the kernel's signature states.
"""

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import interpreter

from fastseq.kernels.jit import NAMES
from fastseq.kernels.limits import LIMITS, limits
from fastseq.kernels.recurrent import persistent, pointwise, sequence
from fastseq.kernels.recurrent.plan import Plan, plan

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="asks the interpreter")
T, B = 3, 2**24 + 1  # so that T*B*H is above 2**31 for every H here
LINE = persistent.LINE.value
FAR = 2**44  # bytes between the tensors: none reaches the next, whatever its offsets wrap to


class Memory:
    """Takes the place of memory: notes the addresses, reads zeros, and lets everybody pass who waits."""

    def __init__(self) -> None:
        self.touched: dict[int, tuple[int, int]] = {}  # of each tensor the least and the greatest, in bytes

    def note(self, pointers: Any, mask: Any) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        for tensor in np.unique((addresses + FAR // 2) // FAR).tolist():  # a negative offset stays with its tensor
            own = addresses[(addresses + FAR // 2) // FAR == tensor] - tensor * FAR
            low, high = self.touched.get(tensor, (0, 0))
            self.touched[tensor] = (min(low, int(own.min())), max(high, int(own.max())))

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.note(pointers, mask)
        return np.full(pointers.shape, T if dtype == np.int64 else 0, dtype)  # a row's length: whole

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        self.note(pointers, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        self.note(pointers, mask)
        return np.full(pointers.shape, 2**31 - 1, np.int32)


def stated(kernel: Any) -> dict[str, str]:
    """The shapes in a kernel's signature, by argument."""
    found = re.findall(r"^    (\w+_ptr),  # \[([^]]*)\]", inspect.getsource(kernel.fn), re.MULTILINE)
    return dict(found)


def sizes_of(configuration: dict[str, Any]) -> dict[str, int]:
    """What the letters of the shapes stand for."""
    constants = {name: n for name, n in configuration["constexprs"].items() if isinstance(n, int)}
    groups = triton.cdiv(B, constants["BLOCK_B"])
    width = constants.get("CHUNKS", 0) * constants.get("BLOCK_K", 0)
    ours = {"T": T, "B": B, "N": constants.get("C", 0) + 1, "WIDTH": width, "LINE": LINE}
    return constants | ours | {"groups": groups, "blocks": groups}


def addresses(configuration: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """Of each tensor its name, its number of elements, and the first and the last element that were touched.

    The last programs of the grid run, at every step or at the last one.
    """
    kernel, sizes = configuration["fn"], sizes_of(configuration)
    types = {name: kind for name, kind in configuration["signature"].items() if kind.startswith("*")}
    dtypes = {f"*{name}": dtype for dtype, name in NAMES.items()}
    tensors = {name: torch.empty(1, dtype=dtypes[kind]) for name, kind in types.items()}
    places = {tensor.data_ptr(): i * FAR for i, tensor in enumerate(tensors.values())}
    units, block = ("P", "BLOCK_P") if "BLOCK_P" in sizes else ("H", "BLOCK_H")
    slices = sizes.get("SLICES") or (1 if "sequence" in kernel.fn.__name__ else triton.cdiv(sizes[units], sizes[block]))
    builder, memory = interpreter.interpreter_builder, Memory()
    convert, place = interpreter._implicit_cvt, builder.set_grid_idx

    def far(argument: Any) -> Any:
        made = convert(argument)
        if isinstance(argument, torch.Tensor):
            made.handle.data[:] = places[argument.data_ptr()]
        return made

    def last(x: int, y: int, z: int) -> None:
        builder.grid_dim = (sizes["groups"] * slices, *builder.grid_dim[1:])
        place(builder.grid_dim[0] - 1, y, z)

    with (
        patch.object(interpreter, "_interpreter", memory),
        patch.object(interpreter, "_implicit_cvt", far),
        patch.object(builder, "set_grid_idx", last),
    ):
        for s in (T - 2, T - 1):
            numbers = {"T": T, "B": B, "s": s}
            kernel[(1, sizes["D"])](
                **tensors,
                **configuration["constexprs"],
                **{name: n for name, n in numbers.items() if name in configuration["signature"]},
            )
            if "s" not in configuration["signature"]:
                break  # it walked through all of them
    shapes = stated(kernel)
    for i, (name, tensor) in enumerate(tensors.items()):
        elements = math.prod(sizes.get(size) or int(size) for size in shapes[name].split(", "))
        low, high = memory.touched[i]
        yield name, elements, low // tensor.itemsize, high // tensor.itemsize


def configurations() -> list[Any]:
    """Each kernel with all that it may be given, of cells with every kind of state."""
    how = Plan("persistent", "the test asks for it", 16, 64, 4, "ieee", 32)
    listed = [
        *sequence.configurations(LIMITS["sm_90"]),
        *pointwise.configurations(),
        *(
            configuration
            for cell in ("lstm", "gru")
            for configuration in persistent.configurations_for(cell, 128, torch.bfloat16, False, how, all_options=True)
        ),
    ]
    wanted = [c for c in listed if re.search(r" (lstm|gru|peephole_lstm) .*bf16.* all options", c["name"])]
    once = {(c["fn"].fn.__name__, c["name"].split(" H=")[0]): c for c in reversed(wanted)}
    return [pytest.param(c, id=c["name"]) for c in once.values()]


@interpreted
@pytest.mark.parametrize("configuration", configurations())
def test_addresses_stay_inside(configuration: dict[str, Any]) -> None:
    large = 0
    for name, elements, first, last in addresses(configuration):
        assert first >= 0, f"{name}: {first}"
        assert last < elements, f"{name}: {last} of {elements}"
        if elements > B:
            assert last >= elements - max(elements // B, LINE), f"{name}: the last program reached {last} of {elements}"
        large += elements > 2**31
    assert large >= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "B", "H", "regime"),
    [(2**11 + 8, 2**14, 64, "resident"), (2**18 + 8, 16, 512, "persistent"), (2**6 + 8, 2**16, 512, "stepwise")],
)
def test_the_end_of_a_large_tensor_is_computed_like_its_beginning(T: int, B: int, H: int, regime: str) -> None:
    """The last steps again, from the state before them: of this cell the state is the output, to the bit."""
    assert T * B * H > 2**31
    device = torch.device("cuda")
    assert plan("rnn_tanh", H, H, torch.bfloat16, True, limits(device), B, 1).regime == regime
    x = torch.randn(T, B, 1, H, dtype=torch.bfloat16, device=device)
    w = torch.randn(1, H, H, dtype=torch.bfloat16, device=device) / H**0.5
    h0 = torch.randn(1, B, H, dtype=torch.bfloat16, device=device)
    nothing = [None] * 6

    def forward(x: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = sequence.sequence_forward(
            "rnn_tanh", x, w, None, None, h0, *nothing, save=False, allow_tf32=True
        )[0]  # fmt: skip
        return y

    y = forward(x, h0)
    assert torch.equal(y[:4], forward(x[:4], h0))
    assert torch.equal(y[-4:], forward(x[-4:], y[-5].transpose(0, 1).contiguous()))
