"""What the concurrent interpreter must catch, shown on a kernel whose programs wait for each other."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from .support.concurrent_interpreter import concurrent_programs

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="about the interpreter")

PROGRAMS, STEPS = 4, 6


@triton.jit
def exchange_kernel(
    slots_ptr,  # [SLOTS, PROGRAMS]
    counter_ptr,  # [1]
    out_ptr,  # [PROGRAMS]
    steps,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    RELEASE: tl.constexpr,
    ACQUIRE: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Every step each program adds up what all published, and publishes a number that depends on it."""
    program = tl.program_id(0)
    value = program + 1
    for s in range(steps):
        slot = slots_ptr + (s % SLOTS) * PROGRAMS
        tl.store(slot + program, value)
        tl.atomic_add(counter_ptr, 1, sem=RELEASE)
        while tl.atomic_add(counter_ptr, 0, sem=ACQUIRE) < (s + 1) * PROGRAMS - MISSING:
            pass
        value = tl.sum(tl.load(slot + tl.arange(0, PROGRAMS)), axis=0) % 1009 + program
    tl.store(out_ptr + program, value)


def exchanged(
    seed: int,
    *,
    weak: bool = False,
    slots: int = 2,
    release: str = "release",
    acquire: str = "acquire",
    missing: int = 0,
) -> list[int]:
    out = torch.zeros(PROGRAMS, dtype=torch.int32)
    with concurrent_programs(seed, weak=weak, limit_s=5.0):
        exchange_kernel[(PROGRAMS,)](
            torch.zeros(slots, PROGRAMS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), out, STEPS,
            PROGRAMS=PROGRAMS, SLOTS=slots, RELEASE=release, ACQUIRE=acquire, MISSING=missing,
        )  # fmt: skip
    return out.tolist()


def expected() -> list[int]:
    values = [program + 1 for program in range(PROGRAMS)]
    for _ in range(STEPS):
        values = [sum(values) % 1009 + program for program in range(PROGRAMS)]
    return values


@pytest.mark.parametrize(("seed", "weak"), list(itertools.product(range(10), (False, True))))
def test_synchronised_programs_agree(seed: int, weak: bool) -> None:
    assert exchanged(seed, weak=weak) == expected()


@pytest.mark.parametrize(
    "broken",
    [
        {"missing": 1},  # a barrier that does not wait for the last
        {"slots": 1},  # the fast overwrite what the slow have yet to read
        {"release": "relaxed", "weak": True},
        {"acquire": "relaxed", "weak": True},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_missing_synchronisation_is_caught(broken: dict[str, Any]) -> None:
    wrong = sum(exchanged(seed, **broken) != expected() for seed in range(10))
    assert wrong >= 8


def test_a_seed_repeats_its_order() -> None:
    first, again, other = (exchanged(seed, missing=2) for seed in (1, 1, 2))
    assert first == again != other


def test_endless_waiting_fails() -> None:
    with pytest.raises(TimeoutError, match="still running"), concurrent_programs(limit_s=0.2):
        exchange_kernel[(2,)](
            torch.zeros(2, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32),
            1, PROGRAMS=2, SLOTS=2, RELEASE="release", ACQUIRE="acquire", MISSING=-1,
        )  # fmt: skip
    assert exchanged(0) == expected()  # and leaves nothing behind


@triton.jit
def failing_kernel(out_ptr):
    tl.static_assert(tl.program_id(0) != 1, "the second fails")  # which is interpreted like everything else
    tl.store(out_ptr, 1)


def test_a_failure_is_the_launch_s_own() -> None:
    with pytest.raises((AssertionError, InterpreterError), match="the second fails"), concurrent_programs():
        failing_kernel[(3,)](torch.zeros(1))
