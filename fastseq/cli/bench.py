"""`fastseq bench NAME…`: an operation against torch.nn's, by name, checked before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq import functional
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


@dataclass(frozen=True)
class Heads:
    """B batch, N heads, S queries and as many keys, D width of a head; what hides keys from queries."""

    B: int
    N: int
    S: int
    D: int
    causal: bool = False
    padded: bool = False

    def __str__(self) -> str:
        hidden = (" causal" if self.causal else "") + (" padded" if self.padded else "")
        return f"B{self.B} N{self.N} S{self.S} D{self.D}{hidden}"


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False, **masks)[0]
        return y


Pair = tuple[nn.Module, nn.Module, Call]


def recurrent(kind: type[nn.Module], shape: Shape, device: torch.device) -> Pair:
    """Torch's layer or cell, ours, and their input."""
    width = (shape.B,) if shape.T is None else (shape.T, shape.B)
    peer, ours, _ = swapped_pair(kind(shape.I, shape.H).to(device))
    return peer, ours, Call((torch.randn(*width, shape.I).to(device),))


def attention(shape: Heads, device: torch.device) -> Pair:
    """The function; torch's takes one mask, so padding and causality are made one before the clock starts."""
    padding, future = _hidden(shape, device)
    mask = None if padding is None else ~padding[:, None, None]
    ours = functools.partial(functional.scaled_dot_product_attention, attn_mask=mask, is_causal=shape.causal)
    theirs = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=shape.causal)
    if mask is not None and future is not None:
        theirs = functools.partial(F.scaled_dot_product_attention, attn_mask=mask & ~future)
    tensors = (torch.randn(shape.B, shape.S, shape.N, shape.D).to(device).transpose(1, 2) for _ in range(3))
    return Function(theirs), Function(ours), Call(tuple(tensors))


def module(name: str, shape: Heads, device: torch.device) -> Pair:
    """Torch's module without dropout, ours, and their input; in eval, where torch's takes its fast path."""
    width = shape.N * shape.D
    model: nn.Module = SelfAttention(width, shape.N)
    if name == "encoder":
        model = nn.TransformerEncoderLayer(width, shape.N, 4 * width, dropout=0.0, batch_first=True)
    padding, future = _hidden(shape, device)
    masks: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": future, "is_causal": shape.causal}
    if name == "encoder":
        masks = {"src_key_padding_mask": padding, "src_mask": future, "is_causal": shape.causal}
    peer, ours, _ = swapped_pair(model.to(device).eval())
    return peer, ours, Call((torch.randn(shape.B, shape.S, width).to(device),), masks)


def _hidden(shape: Heads, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Padding ``[B, S]``, of which the first row has half and each next one less, and the future ``[S, S]``."""
    lengths = torch.linspace(shape.S / 2, shape.S, shape.B, device=device).ceil()
    padding = torch.arange(shape.S, device=device) >= lengths[:, None]
    future = torch.ones(shape.S, shape.S, dtype=torch.bool, device=device).triu(1)
    return padding if shape.padded else None, future if shape.causal else None


LAYER_SHAPES = (Shape(1, 1, 128, 128), Shape(32, 8, 64, 64), Shape(128, 32, 256, 256))
CELL_SHAPES = (Shape(None, 1, 128, 128), Shape(None, 64, 256, 256))
HEADS = (
    Heads(1, 12, 128, 64), Heads(8, 12, 128, 64, padded=True), Heads(1, 12, 512, 64, causal=True),
    Heads(2, 12, 512, 64, causal=True, padded=True),
)  # fmt: skip

CASES: dict[str, tuple[Callable[[Any, torch.device], Pair], tuple[Shape | Heads, ...]]] = {
    "lstm": (functools.partial(recurrent, nn.LSTM), LAYER_SHAPES),
    "gru": (functools.partial(recurrent, nn.GRU), LAYER_SHAPES),
    "rnn": (functools.partial(recurrent, nn.RNN), LAYER_SHAPES),
    "lstm_cell": (functools.partial(recurrent, nn.LSTMCell), CELL_SHAPES),
    "gru_cell": (functools.partial(recurrent, nn.GRUCell), CELL_SHAPES),
    "rnn_cell": (functools.partial(recurrent, nn.RNNCell), CELL_SHAPES),
    "attention": (attention, HEADS),
    "mha": (functools.partial(module, "mha"), HEADS),
    "encoder": (functools.partial(module, "encoder"), HEADS),
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


def measure(name: str, shape: Shape | Heads, settings: Settings, budget_s: float) -> list[Result]:
    """Check one case, then time it forward only and with its backward. Raises Mismatch."""
    torch.manual_seed(0)
    peer, ours, call = CASES[name][0](shape, settings.device)
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
