"""One row of a result: a contest gated, timed and written down with what is needed to trace it."""

import math
import re
from dataclasses import asdict
from typing import Any

import torch
from cases import Case, Contest

from fastseq import stopwatch

SAMPLE_S = 2e-3  # a sample of a fast case is as many calls as fill this


def slug(name: str) -> str:
    """A device's name as a folder name: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def ceiling_tflops(device: str, dtype: str, threads: int | None = None) -> float:
    """The fastest matrix product seen here just now, in TFLOP/s: what a per cent of the ceiling refers to."""
    n = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    race = stopwatch.race({"matmul": lambda: a @ b}, rounds=10, budget_s=1.0, again=False, threads=threads)
    return 2e-12 * n**3 / min(race.seconds["matmul"])


def time_sides(
    contest: Contest, *, rounds: int, least_s: float, least_rounds: int, threads: int | None = None
) -> stopwatch.Race:
    """Race the sides for ``least_s`` seconds, or for ``least_rounds`` rounds where these take longer.

    The gate has run every side before, so the long cases need little more warming up.
    """
    sides, peer = contest.sides, contest.peer
    with contest.grad_mode():
        alone = {peer: sides[peer]}
        once = stopwatch.race(alone, rounds=2, calls=1, warmup=0, again=False, threads=threads)
        seconds = min(once.seconds[peer])
        return stopwatch.race(
            sides,
            peer=peer,
            rounds=rounds,
            budget_s=max(least_s, least_rounds * (len(sides) + 1) * seconds),
            calls=max(1, min(1000, math.ceil(SAMPLE_S / max(seconds, 1e-7)))),
            warmup=1 if seconds > 0.05 else 3,
            threads=threads,
        )


def noise(race: stopwatch.Race) -> float:
    """How far a ratio may be off: torch against itself, or twice the standard error of that if it is more.

    The standard error of a median of n values is about 0.93 times their interquartile range over root n.
    """
    same = race.noise()
    assert same is not None
    rounds = len(race.seconds[race.peer])
    return max(abs(same.median - 1), 1.86 * (same.upper - same.lower) / math.sqrt(rounds))


def row(case: Case, race: stopwatch.Race, ceiling: float | None, **more: Any) -> dict[str, Any]:
    """A race as plain data; ``speed`` is torch's time over the side's own: above 1 is faster than torch."""
    sides = {}
    for entry in race.rows():
        ratio = entry.ratio
        sides[entry.name] = {
            "ms": asdict(entry.ms),
            "speed": {"median": 1 / ratio.median, "lower": 1 / ratio.upper, "upper": 1 / ratio.lower},
            "us_per_step": 1e3 * entry.ms.median / case.steps,
            "tflops": case.flops / entry.ms.median * 1e-9,
            "percent_of_ceiling": None if ceiling is None else case.flops / entry.ms.median * 1e-7 / ceiling,
        }
    return {
        "name": case.name,
        "case": asdict(case),
        "sides": sides,
        "rounds": len(race.seconds[race.peer]),
        "calls": race.calls,
        "noise": noise(race),
        **more,
    }
