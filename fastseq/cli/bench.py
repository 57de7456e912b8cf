"""`fastseq bench NAME…`: an operation against torch.nn's, by name, checked before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from fastseq.cli.compare import RUNS, Settings, share_weights, swapped_pair, switches
from fastseq.cli.equality import Call, compare_models
from fastseq.cli.show import Mistake, interval, milliseconds, print_json, progress, say, show_table, show_text
from fastseq.stopwatch import Spread, provenance, race

__all__ = ["CASES", "bench"]

ROUNDS = 100


@dataclass(frozen=True)
class Shape:
    """T time (None: a cell, one step), B batch, I input, H hidden."""

    T: int | None
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        time = "" if self.T is None else f"T{self.T} "
        return f"{time}B{self.B} I{self.I} H{self.H}"


LAYER_SHAPES = (Shape(1, 1, 128, 128), Shape(32, 8, 64, 64), Shape(128, 32, 256, 256))
CELL_SHAPES = (Shape(None, 1, 128, 128), Shape(None, 64, 256, 256))

CASES: dict[str, tuple[type[nn.Module], tuple[Shape, ...]]] = {
    "lstm": (nn.LSTM, LAYER_SHAPES),
    "gru": (nn.GRU, LAYER_SHAPES),
    "rnn": (nn.RNN, LAYER_SHAPES),
    "lstm_cell": (nn.LSTMCell, CELL_SHAPES),
    "gru_cell": (nn.GRUCell, CELL_SHAPES),
    "rnn_cell": (nn.RNNCell, CELL_SHAPES),
}


@dataclass(frozen=True)
class Result:
    """One line: a case, a way to run it, both times, their ratio, and the ratio of torch with itself."""

    case: str
    shape: str
    run: str
    torch_ms: Spread
    fastseq_ms: Spread
    ratio: Spread
    noise: Spread
    rounds: int
    calls: int


def bench(names: Sequence[str], settings: Settings, *, budget_s: float, as_json: bool) -> bool:
    """Time the named cases (none: all) against torch.nn; the result says whether all agree with it."""
    for name in names:
        if name not in CASES:
            raise Mistake(f"no case {name!r}; there are {', '.join(CASES)}")
    todo = [(name, shape) for name in dict.fromkeys(names or CASES) for shape in CASES[name][1]]
    results: list[Result] = []
    mismatches: list[str] = []
    with switches(settings), progress("bench", len(todo)) as advance:
        for done, (name, shape) in enumerate(todo):
            advance(done, f"{name} {shape}")
            try:
                results += measure(name, shape, settings, budget_s)
            except Mismatch as mismatch:
                mismatches += mismatch.reasons
        advance(len(todo), "")
        facts = provenance(settings.device)
    if as_json:
        record = {"provenance": facts, "settings": settings.record()}
        print_json({**record, "rows": [asdict(result) for result in results], "mismatches": mismatches})
    else:
        _show(results, settings)
    for reason in mismatches:
        say(f"mismatch: {reason}")
    return not mismatches


class Mismatch(Exception):  # noqa: N818  (a finding, not an error)
    """A case whose two sides disagree: it gets no times."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def measure(name: str, shape: Shape, settings: Settings, budget_s: float) -> list[Result]:
    """Check one case, then time it forward only and with its backward. Raises Mismatch."""
    torch.manual_seed(0)
    width = (shape.B,) if shape.T is None else (shape.T, shape.B)
    peer, ours, _ = swapped_pair(CASES[name][0](shape.I, shape.H).to(settings.device))
    call = Call((torch.randn(*width, shape.I).to(settings.device),))
    equality = compare_models(peer, ours, call)
    if not equality.passed:
        raise Mismatch([f"{name} {shape}: {reason}" for reason in equality.reasons()])
    share_weights(peer, ours)
    results = []
    for run, step in RUNS.items():
        result = race(
            {"torch": step(peer, call), "fastseq": step(ours, call)},
            rounds=ROUNDS, budget_s=budget_s, threads=settings.threads,
        )  # fmt: skip
        noise = result.noise()
        assert noise is not None  # the race has run the peer twice
        results.append(
            Result(
                name, str(shape), run, result.time("torch"), result.time("fastseq"), result.ratio(), noise,
                len(result.seconds["torch"]), result.calls,
            )
        )  # fmt: skip
    return results


def _show(results: Sequence[Result], settings: Settings) -> None:
    rows = [
        [
            f"{result.case} {result.shape}", result.run, *milliseconds(result.torch_ms),
            *milliseconds(result.fastseq_ms), f"{result.ratio.median:.3f}", interval(result.ratio),
            interval(result.noise),
        ]
        for result in results
    ]  # fmt: skip
    times = ["torch ms", "quartiles", "fastseq ms", "quartiles"]
    columns = ["case", "", *times, "time / torch", "quartiles", "noise"]
    show_table(f"fastseq against torch.nn; {settings}", columns, rows, words=2)
    show_text("Noise: quartiles of torch's second run over its first; a ratio inside them is no difference.")
