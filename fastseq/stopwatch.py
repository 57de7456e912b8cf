"""The one way to measure: interleaved, warmed up, synchronised, with its own noise and with provenance."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import timeit
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.benchmark.utils.common import set_torch_threads
from torch.utils.benchmark.utils.timer import timer as synchronised_clock

import fastseq

__all__ = ["Race", "Row", "Spread", "provenance", "race"]

SHORTEST_SAMPLE_S = 2e-3  # a sample is at least this long: clock and synchronisation do not show
MOST_CALLS = 1000
FEWEST_ROUNDS = 3  # below this there are no quartiles, whatever the budget


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Row:
    """One contestant in a table: milliseconds per call, and its time as a multiple of the peer's."""

    name: str
    ms: Spread
    ratio: Spread
    rounds: int


@dataclass(frozen=True)
class Race:
    """What `race` measured.

    `seconds[name][k]` is the time of one call in round k, so equal indices were measured next to each other.
    `again` names the peer's second run, which shows what the noise alone does; it is None if there was none.
    """

    seconds: Mapping[str, tuple[float, ...]]
    peer: str
    again: str | None
    calls: int
    threads: int

    def time(self, name: str) -> Spread:
        """Return milliseconds per call."""
        return Spread.of(1e3 * seconds for seconds in self.seconds[name])

    def ratio(self, name: str | None = None) -> Spread:
        """Return time divided by the peer's time in the same round: below 1 is faster than the peer.

        Without a name: that of the only contestant besides the peer.
        """
        if name is None:
            others = [other for other in self.seconds if other not in (self.peer, self.again)]
            if len(others) != 1:
                raise ValueError(f"ratio() needs a name, one of {', '.join(self.seconds)}")
            name = others[0]
        return Spread.of(own / peer for own, peer in zip(self.seconds[name], self.seconds[self.peer], strict=True))

    def noise(self) -> Spread | None:
        """Return the ratio of the peer against itself: what differs from 1 here is not a result."""
        return None if self.again is None else self.ratio(self.again)

    def rows(self) -> list[Row]:
        """Return a row per contestant, in the order given, the peer's second run last."""
        return [Row(name, self.time(name), self.ratio(name), len(own)) for name, own in self.seconds.items()]

    def record(self) -> dict[str, object]:
        """Return everything as plain data for a JSON file."""
        return {
            "peer": self.peer,
            "again": self.again,
            "calls": self.calls,
            "threads": self.threads,
            "rows": [asdict(row) for row in self.rows()],
        }


def race(
    contestants: Mapping[str, Callable[[], object]],
    *,
    peer: str | None = None,
    rounds: int = 30,
    budget_s: float | None = None,
    calls: int | None = None,
    warmup: int = 3,
    again: bool = True,
    setup: Mapping[str, Callable[[], object]] | None = None,
    threads: int | None = None,
    clock: Callable[[], float] = synchronised_clock,
    after_round: Callable[[int], object] | None = None,
) -> Race:
    """Time functions side by side: every round takes one sample of each, in an order that turns and reverses.

    `peer` (default: the first) is what the others are compared with; with `again` it takes part twice, so
    that the noise is measured together with the result. A sample is the mean over `calls` calls (default: as
    many as fill 2 ms), with the garbage collector off. `budget_s` ends the race early, after three rounds at
    the soonest. `setup[name]` runs untimed before each sample of that contestant. `threads` pins torch's
    threads meanwhile. The default clock is torch's, which waits for the accelerator. `after_round(k)` is
    called after round k, for a progress bar.

    Raises ValueError for no contestants, an unknown peer, or less than one round.

    >>> x = torch.ones(64)
    >>> result = race({"torch": lambda: x.softmax(0), "fastseq": lambda: x.log_softmax(0).exp()}, rounds=3)
    >>> result.ratio().median > 0
    True
    """
    if not contestants:
        raise ValueError("race: nothing to time")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    peer = next(iter(contestants)) if peer is None else peer
    if peer not in contestants:
        raise ValueError(f"peer: {peer!r} is not one of {', '.join(contestants)}")

    entries = dict(contestants)
    setups = dict(setup or {})
    second = f"{peer} again" if again else None
    if second is not None:
        entries[second] = entries[peer]
        setups[second] = setups.get(peer, _nothing)
    timers = {name: timeit.Timer(entry, setups.get(name, _nothing), timer=clock) for name, entry in entries.items()}

    with set_torch_threads(torch.get_num_threads() if threads is None else threads):
        for _ in range(warmup):
            for timer in timers.values():
                timer.timeit(1)
        if calls is None:
            fastest = min(timer.timeit(1) for timer in timers.values())
            calls = MOST_CALLS if fastest <= 0 else min(MOST_CALLS, math.ceil(SHORTEST_SAMPLE_S / fastest))

        seconds: dict[str, list[float]] = {name: [] for name in entries}
        start = clock()
        for k in range(rounds):
            for name in _order(list(timers), k):
                seconds[name].append(timers[name].timeit(calls) / calls)
            if after_round is not None:
                after_round(k)
            if budget_s is not None and k + 1 >= FEWEST_ROUNDS and clock() - start >= budget_s:
                break
        threads = torch.get_num_threads()
    return Race({name: tuple(values) for name, values in seconds.items()}, peer, second, calls, threads)


def provenance(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return what a number must carry to be traced: commit, versions, device, threads, date.

    `commit` is None outside a git checkout of this package; `modified` says whether files differ from it.

    >>> sorted(provenance())[:4]
    ['commit', 'cores', 'cpu', 'cuda']
    """
    device = torch.device(device)
    commit, modified = _checkout()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "modified": modified,
        "fastseq": fastseq.__version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """Return the name its maker gave the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux; elsewhere platform.processor() knows
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nothing() -> None:
    pass


def _order(names: list[str], k: int) -> list[str]:
    """Turn the names by one place every second round and reverse them in odd rounds: AB BA BA AB …"""
    turn = (k // 2) % len(names)
    turned = names[turn:] + names[:turn]
    return turned[::-1] if k % 2 else turned


def _triton_version() -> str | None:
    # Read from the metadata: asking must not import triton.
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _checkout() -> tuple[str | None, bool | None]:
    """Return the commit this file is checked out from, and whether tracked files were changed since."""
    # An installed copy may lie inside somebody else's repository, so this very file must be tracked.
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    commit = _git(here.parent, "rev-parse", "--verify", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return commit, None if commit is None or changes is None else changes != ""


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git answered, or None where there is no git or it refused."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
