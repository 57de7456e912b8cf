"""One combination of a recurrent module's options: build it, feed it, and name everything that comes out."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq

from .budget import assert_within_budget

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru")
LAYOUTS = ("padded", "unbatched", "sorted", "unsorted")  # the last two: a PackedSequence
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Named = dict[str, Tensor]

# Ways to the numbers other than torch.nn's own module: what `use` names, and the keyword that rules that module out.
WAYS = {
    "reference": ("reference", None),
    "reset": ("auto", "reset"),  # resets that never happen
    "recompute": ("torch", "recompute"),
    "lengths": ("torch", "lengths"),  # every row as long as the input
}

# The budget of one tensor in one combination. Two unbiased roundings of the same sum differ by more than 2 where
# terms cancel (a gradient of 1e-4 from terms of 1e-2); `Errors` holds the average over all combinations much closer.
SLACK = 8.0


@dataclass(frozen=True)
class Case:
    """A combination; its text names what differs from the simplest module."""

    cell: str = "lstm"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    train: bool = True
    layout: str = "padded"
    hx: bool = False
    dtype: torch.dtype = torch.float32
    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741  (the field's letter)
    H: int = 5

    def __str__(self) -> str:
        options = (f"{k}={v}" for k, v in vars(self).items() if k != "cell" and v != getattr(Case, k))
        return " ".join([self.cell, *options])

    @property
    def kind(self) -> str:
        return "RNN" if self.cell.startswith("rnn") else self.cell.split("_")[0].upper()

    @property
    def packed(self) -> bool:
        return self.layout in ("sorted", "unsorted")

    @property
    def projection(self) -> int:
        return max(1, self.H // 2) if self.cell == "lstm_proj" else 0

    @property
    def in_place(self) -> bool:
        """Whether `auto` trains this on a loop of its own, equal to torch within rounding and not bit for bit."""
        stepwise = self.cell in ("rnn_tanh", "rnn_relu", "gru")
        return stepwise and self.T >= 32 and self.layout == "padded" and self.dtype in (torch.float32, torch.float64)

    def options(self) -> dict[str, Any]:
        """The constructor's keywords."""
        options: dict[str, Any] = {
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout if self.num_layers > 1 else 0.0,
            "bidirectional": self.bidirectional,
        }
        if self.projection:
            options["proj_size"] = self.projection
        if self.kind == "RNN":
            options["nonlinearity"] = self.cell[4:]
        return options

    def build(self, library: Any) -> Any:
        """The module of ``torch.nn`` or of ``fastseq``, from the same seed each time."""
        torch.manual_seed(0)
        module = getattr(library, self.kind)(self.I, self.H, **self.options())
        return module.to(self.dtype).train(self.train)

    def lengths(self) -> list[int]:
        """The rows' lengths in a PackedSequence, one of them T."""
        lengths = [self.T if b == 1 % self.B else 1 + (5 * b + 1) % self.T for b in range(self.B)]
        return sorted(lengths, reverse=True) if self.layout == "sorted" else lengths

    def draw(self) -> list[Tensor]:
        """The input, then h_0 (and c_0) if given: values that bfloat16 holds exactly, so all dtypes see the same."""
        torch.manual_seed(1)
        rows = () if self.layout == "unbatched" else (self.B,)
        # batch_first says nothing about unbatched input, which is [T, I] either way.
        x = (*rows, self.T, self.I) if self.batch_first else (self.T, *rows, self.I)
        states = self.num_layers * (2 if self.bidirectional else 1), *rows
        shapes = [x]
        if self.hx:
            shapes.append((*states, self.projection or self.H))
            shapes += [(*states, self.H)] if self.kind == "LSTM" else []
        return [torch.randn(shape).bfloat16().to(self.dtype) for shape in shapes]

    def call(self, module: nn.Module, drawn: Sequence[Tensor], **keywords: Any) -> Any:
        """Run the module as this layout has it."""
        x, states = drawn[0], tuple(drawn[1:])
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor(self.lengths()), self.batch_first, self.layout == "sorted")
        hx = None if not states else states if self.kind == "LSTM" else states[0]
        return module(x, hx, **keywords)

    def way(self, name: str) -> tuple[str, dict[str, Any]]:
        """What to ``use`` and which keywords to give; a PackedSequence has lengths, and takes the reset instead."""
        implementation, keyword = WAYS[name]
        rows = () if self.layout == "unbatched" else (self.B,)
        if keyword == "lengths" and not self.packed:
            return implementation, {"lengths": torch.full(rows, self.T)}
        if keyword == "recompute":
            return implementation, {"recompute": True}
        if keyword is None:
            return implementation, {}
        shape = (*rows, self.T) if self.batch_first else (self.T, *rows)
        return implementation, {"reset": torch.zeros(shape, dtype=torch.bool)}


def _constructions(cell: str) -> Iterator[Case]:
    for num_layers, bidirectional, bias in itertools.product((1, 2, 3), (False, True), (False, True)):
        yield Case(cell, num_layers, bidirectional, bias, batch_first=bidirectional, dropout=0.25)


# Modules of every class, by name: what a constructor is given.
CONSTRUCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{str(c): (c.kind, c.options()) for cell in CELLS for c in _constructions(cell)},
    **{
        f"{kind} {options}": (kind, options)
        for kind in ("RNNCell", "LSTMCell", "GRUCell")
        for options in ({}, {"bias": False}, *([{"nonlinearity": "relu"}] if kind == "RNNCell" else []))
    },
}


def every(**fixed: Any) -> Iterator[Case]:
    """All combinations of options but the fixed ones; dropout is on in every second, which then does not train."""
    booleans = (False, True)
    names = ("num_layers", "bidirectional", "bias", "batch_first", "layout", "hx")
    combinations = itertools.product((1, 2, 3), booleans, booleans, booleans, LAYOUTS, booleans)
    for index, values in enumerate(combinations):
        train = index // 3 % 2 == 0
        yield Case(**dict(zip(names, values, strict=True)), train=train, dropout=0.0 if train else 0.5, **fixed)


def pairwise(**values: Sequence[Any]) -> Iterator[Case]:
    """A few combinations, among which every two values of different options meet."""
    everything = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    meetings = [set(itertools.combinations(options.items(), 2)) for options in everything]
    left = set().union(*meetings)
    while left:
        best = max(range(len(everything)), key=lambda i: len(meetings[i] & left))
        left -= meetings[best]
        yield Case(**everything[best])


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, none for None."""
    if tree is None:
        return []
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in tensors(part)]


def outputs_of(result: Any) -> Named:
    """The output and the final states by name; what belongs to a PackedSequence besides its data, too."""
    y, final = result
    named: Named = {}
    if isinstance(y, PackedSequence):
        named = {k: t for k, t in zip(("batch_sizes", "order", "back"), y[1:], strict=True) if t is not None}
        y = y.data
    return {"y": y, **dict(zip(("h_n", "c_n"), tensors(final), strict=False)), **named}


def run(module: nn.Module, case: Case, drawn: Sequence[Tensor], **keywords: Any) -> Named:
    """Outputs, final states, and the gradients of everything, by name, in the module's dtype and on its device."""
    like = next(module.parameters())
    leaves = [t.detach().to(like).requires_grad_() for t in drawn]
    named = outputs_of(case.call(module, leaves, **keywords))
    wanted = dict(zip(("input", "h_0", "c_0"), leaves, strict=False)) | dict(module.named_parameters())
    return {k: t.detach() for k, t in (named | gradients(named, wanted)).items()}


def gradients(outputs: Named, wanted: Named) -> Named:
    """The gradients of the wanted for random cotangents of the outputs that have one."""
    torch.manual_seed(2)
    roots = [o for o in outputs.values() if o.requires_grad]
    cotangents = [torch.randn(o.shape).bfloat16().to(o) for o in roots]
    found = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
    return {f"gradient of {k}": g for k, g in zip(wanted, found, strict=True) if g is not None}


def run_by(way: str, module: nn.Module, case: Case, drawn: Sequence[Tensor]) -> Named:
    implementation, keywords = case.way(way)
    with fastseq.use(implementation):
        return run(module, case, drawn, **keywords)


def exact_and_peer(module: nn.Module, case: Case, drawn: Sequence[Tensor]) -> tuple[Named, Named]:
    """torch in float64, and torch in the case's dtype, whose error the budget goes by.

    torch's own rounding in float64 cannot be seen from float64: it is that of float32, less by the ratio of the
    units of rounding.
    """
    exact = run(copy.deepcopy(module).double(), case, drawn)
    if case.dtype != torch.float64:
        return exact, run(module, case, drawn)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    single = run(copy.deepcopy(module).float(), case, drawn)
    return exact, {k: e + (single[k].double() - e) * ratio if e.is_floating_point() else e for k, e in exact.items()}


def unequal(got: Named, expected: Named) -> list[str]:
    """What is not bit for bit the same, one sentence each."""
    if list(got) != list(expected):
        return [f"has {list(got)}, expected {list(expected)}"]
    return [
        f"{k}: {g.dtype} {list(g.shape)}, not bitwise {e.dtype} {list(e.shape)}"
        for (k, g), e in zip(got.items(), expected.values(), strict=True)
        if g.dtype != e.dtype or not torch.equal(g, e)
    ]


def beyond_budget(got: Named, exact: Named, peer: Named) -> list[str]:
    """What is further from the exact values than the budget allows, one sentence each."""
    if set(got) != set(peer):
        return [f"has {sorted(got)}, expected {sorted(peer)}"]
    failures = []
    for name, tensor in got.items():
        if not tensor.is_floating_point():
            failures += [] if torch.equal(tensor, peer[name]) else [f"{name}: not {peer[name].tolist()}"]
            continue
        try:
            assert_within_budget(tensor, exact[name], peer[name], name, SLACK)
        except AssertionError as failure:  # collected, so that every failing combination is named
            failures.append(str(failure))
    return failures


def unlike_torch(case: Case, got: Named, exact: Named, peer: Named) -> list[str]:
    """What `auto` in training has that torch has not, bit for bit where torch's own operator runs."""
    if case.in_place:
        return beyond_budget(got, exact, peer)
    return unequal(got, exact if case.dtype == torch.float64 else peer)


class Errors:
    """The relative errors of many tensors, ours and torch's, whose averages say what single ones cannot."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, way: str, got: Named, exact: Named, peer: Named) -> None:
        ours_and_theirs = self.sums.setdefault(way, [0.0, 0.0])
        for name, e in exact.items():
            if e.is_floating_point() and e.numel():
                for which, t in enumerate((got[name], peer[name])):
                    ours_and_theirs[which] += float((t.double() - e).abs().max() / e.abs().max())

    def beyond(self, slack: float) -> list[str]:
        return [
            f"{way}: on average {ours / theirs:.2f} times torch's error"
            for way, (ours, theirs) in self.sums.items()
            if ours > slack * theirs
        ]


def report(failures: list[str]) -> str:
    """The message of a failing assertion: every combination, by name."""
    return "\n".join([f"{len(failures)} failures:", *failures])
