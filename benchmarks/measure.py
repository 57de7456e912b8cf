"""One row of a result: a contest gated, timed and written down with what is needed to trace it."""

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from contest import Contest

from fastseq import stopwatch

SAMPLE_S = 2e-3  # a sample of a fast case is as many calls as fill this


def slug(name: str) -> str:
    """A device's name as a folder name: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def ceilings(device: str, dtypes: Iterable[str], threads: int | None = None) -> dict[str, float]:
    """The fastest seen here just now of a matrix product in each dtype, in TFLOP/s, and of a copy, in GB/s.

    What a per cent of the ceiling refers to; the copy's is called ``copy``, and counts what is read and written.
    """
    n, size = (8192, 2**30) if device != "cpu" else (1024, 2**28)

    def fastest(run: Callable[[], object]) -> float:
        return min(stopwatch.race({"run": run}, rounds=10, budget_s=1.0, again=False, threads=threads).seconds["run"])

    found = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2e-12 * n**3 / fastest(functools.partial(torch.matmul, a, b))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return found | {"copy": 2e-9 * size / fastest(lambda: target.copy_(source))}


def time_sides(
    contest: Contest, *, rounds: int, least_s: float, least_rounds: int, threads: int | None = None
) -> stopwatch.Race:
    """Race the sides for ``least_s`` seconds, or for ``least_rounds`` rounds where these take longer.

    The gate has run every side before, so the long cases need little more warming up.
    """
    sides, peer = contest.sides, contest.peer
    with contest.context():
        alone = {peer: sides[peer]}
        once = stopwatch.race(alone, rounds=2, calls=1, warmup=0, again=False, setup=contest.setups, threads=threads)
        seconds = min(once.seconds[peer])
        return stopwatch.race(
            sides,
            peer=peer,
            rounds=rounds,
            budget_s=max(least_s, least_rounds * (len(sides) + 1) * seconds),
            calls=max(1, min(1000, math.ceil(SAMPLE_S / max(seconds, 1e-7)))),
            warmup=1 if seconds > 0.05 else 3,
            setup=contest.setups,
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


def peak_mib(contest: Contest) -> dict[str, float]:
    """What one run of each side adds to the memory allocated on the GPU, at its peak."""
    peaks = {}
    with contest.context():
        for side in contest.sides:
            contest.run(side)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contest.run(side)
            torch.cuda.synchronize()
            peaks[side] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peaks


def row(
    contest: Contest,
    race: stopwatch.Race,
    ceilings: dict[str, float],
    peaks: dict[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A race as plain data; ``speed`` is torch's time over the side's own: above 1 is faster than torch.

    ``best`` is the fastest of the sides that are not ours, and ``speed_beside_best`` compares with it.
    """
    case, peaks = contest.case, peaks or {}
    best = min((name for name in contest.sides if name not in contest.ours), key=lambda name: race.time(name).median)
    sides = {}
    for entry in race.rows():
        seconds = entry.ms.median * 1e-3
        side = {"ms": asdict(entry.ms), "speed": _speed(race, race.peer, entry.name)}
        side |= {"us_per_step": 1e6 * seconds / case.steps}
        if case.moved:
            rate = case.moved / seconds * 1e-9
            side |= {"gb_per_s": rate, "percent_of_ceiling": 100 * rate / ceilings["copy"]}
        else:
            rate = case.flops / seconds * 1e-12
            side |= {"tflops": rate, "percent_of_ceiling": 100 * rate / ceilings[case.dtype]}
        if entry.name in contest.ours:
            side["speed_beside_best"] = _speed(race, best, entry.name)
        if entry.name in peaks:
            side["peak_mib"] = peaks[entry.name]
        sides[entry.name] = side
    return {
        "name": case.name,
        "case": asdict(case),
        "best": best,
        "sides": sides,
        "rounds": len(race.seconds[race.peer]),
        "calls": race.calls,
        "noise": noise(race),
        **contest.facts,
        **({"cannot": contest.cannot} if contest.cannot else {}),
        **more,
    }


def _speed(race: stopwatch.Race, other: str, own: str) -> dict[str, float]:
    """How many times as fast as another: the median and quartiles over the rounds."""
    pairs = zip(race.seconds[other], race.seconds[own], strict=True)
    return asdict(stopwatch.Spread.of(theirs / mine for theirs, mine in pairs))
