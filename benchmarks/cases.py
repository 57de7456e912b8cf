"""The cases of the recurrent benchmarks: what runs against what, and the check that precedes the clock.

A :class:`Case` is a name and sizes; :func:`prepare` turns it into a :class:`Contest`: torch's side and ours
as callables over the same weights and inputs, and the exact result in float64. The pytest suites, ``auto.py``
and ``gpu.py`` all run these.

Letters: T time, B batch, H hidden and input width.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import workarounds
from torch import Tensor, nn

import fastseq

Tensors = tuple[Tensor, ...]
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
CELLS = tuple(GATES)
MODES = ("forward", "train")
_LAYERS = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}


@dataclass(frozen=True)
class Case:
    """One benchmark: ``kind`` is ``layer``, ``step`` (a single step of a cell) or ``reset``."""

    kind: str
    cell: str
    B: int
    T: int
    H: int
    dtype: str = "float32"
    mode: str = "forward"
    layers: int = 1
    directions: int = 1
    density: float = 0.02  # of resets: an episode starts at one step in fifty

    @property
    def name(self) -> str:
        words = [self.kind, self.cell, f"B{self.B}", f"T{self.T}", f"H{self.H}", self.dtype, self.mode]
        words += [f"p{self.density:g}"] if self.kind == "reset" else []
        words += [f"L{self.layers}"] if self.layers > 1 else []
        words += ["bidirectional"] if self.directions > 1 else []
        return "-".join(words)

    @property
    def steps(self) -> int:
        """Steps that wait for one another: the layers of a stack do, the directions of a layer do not."""
        return self.T * self.layers

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products; a backward pass costs two forward passes."""
        widths = [self.H] + [self.directions * self.H] * (self.layers - 1)
        rows = self.T * self.B * self.directions * GATES[self.cell] * self.H
        forward = sum(2.0 * rows * (width + self.H) for width in widths)
        return forward * (3 if self.mode == "train" else 1)


@dataclass
class Contest:
    """Callables that do the same work, torch's first, and what they should compute.

    ``tensors`` flattens what a side returns; ``exact`` computes the same tensors in float64.
    """

    case: Case
    sides: dict[str, Callable[[], Any]]
    exact: Callable[[], Tensors]
    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    _red: dict[str, str | None] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        return next(iter(self.sides))

    def grad_mode(self) -> torch.set_grad_enabled:
        """The context every side runs in: entered around a whole race, so it is not part of the timing."""
        return torch.set_grad_enabled(self.case.mode == "train")

    def explain(self) -> fastseq.Choice:
        with self.grad_mode():
            return fastseq.explain(self.module, *self.inputs, **self.keywords)

    def disagreement(self, side: str) -> str | None:
        """A sentence on where ``side`` misses the budget, or None: no side is timed before this says None."""
        if not self._red:
            with self.grad_mode():
                results = {name: _flat(run()) for name, run in self.sides.items()}
            exact = self.exact()
            peer = results.pop(self.peer)
            self._red = {name: outside_budget(result, exact, peer) for name, result in results.items()}
            self._red[self.peer] = None
        return self._red[side]


def outside_budget(got: Tensors, exact: Tensors, peer: Tensors, slack: float = 2.0) -> str | None:
    """Where ``got`` errs more than ``slack`` times what torch does at the same dtype plus one rounding."""
    if len(got) != len(peer):
        return f"{len(got)} results, torch returns {len(peer)}"
    for i, (g, e, p) in enumerate(zip(got, exact, peer, strict=True)):
        if g.shape != p.shape or g.dtype != p.dtype:
            return f"result {i}: {g.dtype} {tuple(g.shape)}, torch {p.dtype} {tuple(p.shape)}"
        floor = torch.finfo(p.dtype).eps * e.abs().max()
        theirs, error = (p.double() - e).abs().max(), (g.double() - e).abs().max()
        budget = slack * (theirs + floor)
        if not error <= budget:  # written so that NaN is outside
            return f"result {i}: off by {error:.2e}, torch by {theirs:.2e}, budget {budget:.2e}"
    return None


def prepare(case: Case, device: str = "cpu", implementations: tuple[str, ...] = ("auto",)) -> Contest:
    """Build the sides of a case; ours once per implementation (``auto`` is called ``fastseq``)."""
    build = {"layer": _layer, "step": _step, "reset": _reset}[case.kind]
    torch.manual_seed(case.H + case.B)
    return build(case, device, implementations)


def _modules(case: Case, device: str, suffix: str = "", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Torch's module and ours on the same parameters, not equal ones.

    Two copies of a weight differ in speed by where they lie: on huge pages or not, in a cache or evicted by
    the other. On a CPU such a copy alone made the same step take 1.8 times as long.
    """
    name, dtype = _LAYERS[case.cell] + suffix, getattr(torch, case.dtype)
    theirs = getattr(nn, name)(case.H, case.H, **options).to(device, dtype)
    ours = getattr(fastseq, name)(case.H, case.H, **options).to(device, dtype)
    for key, parameter in theirs.named_parameters():
        setattr(ours, key, parameter)
    return theirs, ours


def _layer(case: Case, device: str, implementations: tuple[str, ...]) -> Contest:
    options = {"num_layers": case.layers, "bidirectional": case.directions > 1}
    theirs, ours = _modules(case, device, **options)
    x = _random(case, device, case.T, case.B, case.H)
    dy = _random(case, device, case.T, case.B, case.H * case.directions)
    return _contest(case, theirs, ours, (x,), dy, implementations)


def _step(case: Case, device: str, implementations: tuple[str, ...]) -> Contest:
    theirs, ours = _modules(case, device, "Cell")
    x, h, c, dy = (_random(case, device, case.B, case.H) for _ in range(4))
    return _contest(case, theirs, ours, (x, (h, c) if case.cell == "lstm" else h), dy, implementations)


def _contest(
    case: Case,
    theirs: nn.Module,
    ours: nn.Module,
    inputs: tuple[Any, ...],
    dy: Tensor,
    names: tuple[str, ...],
) -> Contest:
    sides = {"torch": _runner(case, theirs, inputs, dy)}
    for name in names:
        run = _runner(case, ours, inputs, dy)
        sides["fastseq" if name == "auto" else name] = run if name == "auto" else fastseq.use(name)(run)

    def exact() -> Tensors:
        double = copy.deepcopy(theirs).double()
        with torch.set_grad_enabled(case.mode == "train"):
            return _flat(_runner(case, double, _double(inputs), dy.double())())

    return Contest(case, sides, exact, ours, inputs)


def _runner(case: Case, module: nn.Module, inputs: tuple[Any, ...], dy: Tensor) -> Callable[[], Any]:
    """A call of the module, and in training the gradients of its output for the input and every parameter."""
    if case.mode == "forward":
        return lambda: module(*inputs)
    x = inputs[0].detach().requires_grad_()  # as in the middle of a model: the gradient goes on below
    wanted, rest = [x, *module.parameters()], inputs[1:]

    def train() -> Any:
        result = module(x, *rest)
        y = result[0] if isinstance(result, tuple) else result
        return result, torch.autograd.grad(y, wanted, dy)

    return train


def _reset(case: Case, device: str, implementations: tuple[str, ...]) -> Contest:
    """``reset=`` beside the ways around it; only the outputs count, so pad-and-split need not pack."""
    theirs, ours = _modules(case, device)
    cell = getattr(nn, _LAYERS[case.cell] + "Cell")(case.H, case.H).to(device, getattr(torch, case.dtype))
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    x = _random(case, device, case.T, case.B, case.H)
    dy = _random(case, device, case.T, case.B, case.H)
    reset = torch.rand(case.T, case.B, device=device) < case.density
    reset[case.T // 2, 0] = True  # a short case has at least one

    def trained(run: Callable[..., Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
        if case.mode == "forward":
            return lambda: run(module, x, reset)
        x = x.detach().requires_grad_()
        wanted = [x, *module.parameters()]

        def train() -> Any:
            y = run(module, x, reset)
            return y, torch.autograd.grad(y, wanted, dy)

        return train

    def exact() -> Tensors:
        with torch.set_grad_enabled(case.mode == "train"):
            double = copy.deepcopy(cell).double()
            return _flat(trained(workarounds.python_loop, double, x.double(), dy.double())())

    sides = {
        "pad_and_split": trained(workarounds.pad_and_split, theirs, x, dy),
        "stretches": trained(workarounds.stretches, theirs, x, dy),
        "python_loop": trained(workarounds.python_loop, cell, x, dy),
    }
    for name in implementations:
        run = trained(lambda module, x, reset: module(x, reset=reset)[0], ours, x, dy)
        sides["fastseq" if name == "auto" else name] = run if name == "auto" else fastseq.use(name)(run)
    return Contest(case, sides, exact, ours, (x,), {"reset": reset})


def _random(case: Case, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, case.dtype))


def _double(value: Any) -> Any:
    return tuple(_double(v) for v in value) if isinstance(value, tuple) else value.double()


def _flat(value: Any) -> Tensors:
    """The tensors of a nested result, detached, in order."""
    if isinstance(value, Tensor):
        return (value.detach(),)
    return tuple(t for v in value for t in _flat(v))


def grid(kind: str, cells: tuple[str, ...] = CELLS, **axes: tuple[Any, ...]) -> Iterator[Case]:
    """Every combination of the axes, given as tuples of values; the last axis varies fastest."""
    names = list(axes)
    for cell, *values in product(cells, *axes.values()):
        for mode in MODES:
            yield Case(kind, cell, mode=mode, **dict(zip(names, values, strict=True)))
