"""The persistent kernels under the concurrent interpreter: the numbers, and the synchronisation behind them."""

import ast
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastseq.kernels.recurrent import persistent, sequence
from fastseq.kernels.recurrent.plan import DTYPES, Plan
from fastseq.kernels.recurrent.steps import STEPS

from .support.budget import assert_within_budget
from .support.concurrent_interpreter import concurrent_programs
from .support.kernels_recurrent import Layer, by_kernels, by_reference, layer
from .support.poison import poisoned_buffers

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="about the interpreter")

CELLS = [name for name, step in STEPS.items() if not step.whole]
SPLITS = [(1, 2), (2, 2), (1, 4), (2, 3)]  # batch groups, hidden slices
HIDDEN = {2: (48, 64, 100), 3: (48,), 4: (64, 100)}  # by hidden slices: a slice is a power of two
BATCH = (3, 16, 20)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says among how many programs the sequences that follow are spread."""

    def spread(groups: int, slices: int, H: int, B: int) -> None:
        units = triton.next_power_of_2(triton.cdiv(H, slices))
        block_b = triton.next_power_of_2(triton.cdiv(B, groups))
        assert (triton.cdiv(B, block_b), triton.cdiv(H, units)) == (groups, slices)
        how = Plan("persistent", "the test asks for it", block_b, triton.cdiv(H, 32) * 32, 4, "ieee", units)
        monkeypatch.setattr(sequence, "plan", lambda *_: how)

    return spread


def cases() -> list[Any]:
    """Every cell over every split; sizes, types, directions and masks take turns."""
    listed = []
    for (i, cell), (j, (groups, slices)) in itertools.product(enumerate(CELLS), enumerate(SPLITS)):
        H, B = HIDDEN[slices][(i + j) % len(HIDDEN[slices])], BATCH[(i + 2 * j) % 3]
        listed.append((cell, groups, slices, H, B, DTYPES[(i + j) % 3], 1 + (i + j) % 2, (i // 2 + j) % 2 == 0))
    return listed


@pytest.mark.parametrize(("cell", "groups", "slices", "H", "B", "dtype", "D", "masked"), cases())
def test_persistent_within_budget(
    split: Any, cell: str, groups: int, slices: int, H: int, B: int, dtype: torch.dtype, D: int, masked: bool
) -> None:
    split(groups, slices, H, B)
    check(layer(cell, 3, B, H, dtype, D=D, masked=masked), dtype)


@pytest.mark.parametrize(("cell", "stay"), [("lstm", "masks"), ("gru", "mean")])
def test_dropout_and_zoneout_within_budget(split: Any, cell: str, stay: str) -> None:
    split(2, 2, 20, 5)
    check(layer(cell, 3, 5, 20, torch.float32, D=2, masked=True, scaled=True, stay=stay), torch.float32)


def check(layer: Layer, dtype: torch.dtype) -> None:
    exact, peer = by_reference(layer, torch.float64), by_reference(layer, dtype)
    with concurrent_programs(weak=True):
        got = by_kernels(layer)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_within_budget(value, exact[name], peer[name], name)


def test_padding_cannot_be_seen(split: Any) -> None:
    split(2, 2, 12, 5)
    padded = layer("lstm", 4, 5, 12, torch.float32, D=2, masked=True)
    past = torch.arange(4)[:, None] >= padded.lengths
    clean = run(padded, 0)
    padded.tensors["input"] = padded.tensors["input"].masked_fill(past[..., None], float("nan"))
    padded.gradients[0] = padded.gradients[0].masked_fill(past[..., None], float("nan"))
    padded.reset = padded.reset | past
    seen = run(padded, 1)
    assert not seen["y"][past].any()
    for name in clean.keys() - {"w_ih"}:  # whose product meets the NaN of the input itself
        assert torch.equal(clean[name], seen[name]), name


def test_time_and_batch_are_not_specialised() -> None:
    for kernel in (persistent.persistent_forward_kernel, persistent.persistent_backward_kernel):
        assert set(kernel.kwargs["do_not_specialize"]) == {"T", "B"}


@pytest.fixture
def small(split: Any) -> Layer:
    split(1, 4, 16, 2)
    return layer("rnn_tanh", 2, 2, 16, torch.float32)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def run(layer: Layer, seed: int, weak: bool = True) -> dict[str, torch.Tensor]:
    with concurrent_programs(seed, weak=weak, limit_s=10.0):
        return by_kernels(layer)


def test_order_does_not_matter(small: Layer) -> None:
    first = run(small, 0)
    for seed in range(1, 50):
        assert same(first, run(small, seed)), seed


@triton.jit
def hasty_wait(counter_ptr, expected, stuck_ptr, patience, SPIN_LIMIT: tl.constexpr):
    while persistent.arrivals(counter_ptr) < expected - 1:
        pass
    return patience


@triton.jit
def relaxed_arrive(counter_ptr):
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def relaxed_arrivals(counter_ptr):
    return tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu")


@triton.jit
def only_buffer(s):
    return 0


@triton.jit
def arrive_but_one(counter_ptr):
    if tl.program_id(0) != 1:
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@pytest.mark.parametrize(
    ("name", "broken", "weak"),
    [
        ("wait", hasty_wait, False),
        ("buffer_of", only_buffer, False),
        ("arrive", relaxed_arrive, True),
        ("arrivals", relaxed_arrivals, True),
    ],
)
def test_missing_synchronisation_is_caught(
    small: Layer, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, weak: bool
) -> None:
    right = run(small, 0)
    monkeypatch.setattr(persistent, name, broken)
    assert sum(not same(right, run(small, seed, weak)) for seed in range(8)) >= 6


def test_spin_limit_reports_instead_of_hanging(small: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent, "SPIN_LIMIT", 200)
    run(small, 0)
    monkeypatch.setattr(persistent, "arrive", arrive_but_one)
    with pytest.raises(RuntimeError, match=r"direction 0, group 0, slice \d saw 3 of 4 arrivals"):
        run(small, 0)


def test_atomics_only_count_arrivals() -> None:
    """No gradient is added up by atomics, whose order would show in its bits."""
    for path in sorted(Path(persistent.__file__).parent.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                atomics = [n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and "atomic" in n.attr]
                counts = path.name == "persistent.py" and function.name in ("arrive", "arrivals")
                assert atomics == (["atomic_add"] if counts else []), f"{path.name}: {function.name}"
