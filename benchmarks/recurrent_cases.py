"""The cases of the recurrent benchmarks: layers, single steps of cells, lengths and resets, against torch.nn.

Letters: T time, B batch, H hidden and input width.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import workarounds
from contest import MODES, Contest, Tensors, flat, implementations_of, random
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

GATES = {"rnn": 1, "relu": 1, "lstm": 4, "gru": 3}
CELLS = ("rnn", "lstm", "gru")
_LAYERS = {"rnn": "RNN", "relu": "RNN", "lstm": "LSTM", "gru": "GRU"}


@dataclass(frozen=True)
class Recurrent:
    """One benchmark: ``kind`` is ``layer``, ``step`` (a single step of a cell), ``lengths`` or ``reset``."""

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

    @property
    def moved(self) -> float:
        return 0.0

    @property
    def family(self) -> str:
        return f"{self.kind}-{self.cell}-H{self.H}"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.kind})

    @property
    def features(self) -> frozenset[str]:
        return frozenset({self.cell})

    def compiled(self) -> "Recurrent":
        return replace(self, kind="step" if self.kind == "step" else "layer", T=min(self.T, 2))

    def contest(self, device: str = "cpu", implementations: tuple[str, ...] = ("auto",)) -> Contest:
        """Torch's side, and ours once per implementation (``auto`` is called ``fastseq``)."""
        torch.manual_seed(self.H + self.B)
        build = {"layer": _layer, "step": _step, "lengths": _lengths, "reset": _reset}[self.kind]
        return build(self, device, implementations)


def _modules(case: Recurrent, device: str, suffix: str = "", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Torch's module and ours on the same parameters, not equal ones.

    Two copies of a weight differ in speed by where they lie: on huge pages or not, in a cache or evicted by
    the other. On a CPU such a copy alone made the same step take 1.8 times as long.
    """
    name, dtype = _LAYERS[case.cell] + suffix, getattr(torch, case.dtype)
    options |= {"nonlinearity": "relu"} if case.cell == "relu" else {}
    theirs = getattr(nn, name)(case.H, case.H, **options).to(device, dtype)
    ours = getattr(fastseq, name)(case.H, case.H, **options).to(device, dtype)
    for key, parameter in theirs.named_parameters():
        setattr(ours, key, parameter)
    return theirs, ours


def _layer(case: Recurrent, device: str, implementations: tuple[str, ...]) -> Contest:
    options = {"num_layers": case.layers, "bidirectional": case.directions > 1}
    theirs, ours = _modules(case, device, **options)
    x = random(case.dtype, device, case.T, case.B, case.H)
    dy = random(case.dtype, device, case.T, case.B, case.H * case.directions)
    return _contest(case, theirs, ours, (x,), dy, implementations)


def _step(case: Recurrent, device: str, implementations: tuple[str, ...]) -> Contest:
    theirs, ours = _modules(case, device, "Cell")
    x, h, c, dy = (random(case.dtype, device, case.B, case.H) for _ in range(4))
    return _contest(case, theirs, ours, (x, (h, c) if case.cell == "lstm" else h), dy, implementations)


def _contest(
    case: Recurrent,
    theirs: nn.Module,
    ours: nn.Module,
    inputs: tuple[Any, ...],
    dy: Tensor,
    names: tuple[str, ...],
) -> Contest:
    def exact() -> Tensors:
        double = copy.deepcopy(theirs).double()
        with torch.set_grad_enabled(case.mode == "train"):
            return flat(_runner(case, double, _double(inputs), dy.double())())

    mine = implementations_of(_runner(case, ours, inputs, dy), names)
    return Contest(
        case,
        {"torch": _runner(case, theirs, inputs, dy), **mine},
        exact,
        lambda: fastseq.explain(ours, *inputs),
        tuple(mine),
    )


def _runner(case: Recurrent, module: nn.Module, inputs: tuple[Any, ...], dy: Tensor) -> Callable[[], Any]:
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


def _train(run: Callable[..., Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """The output of ``run(module, x)``, and its gradients for the input and every parameter."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]

    def train() -> Any:
        y = run(module, x)
        return y, torch.autograd.grad(y, wanted, dy)

    return train


def _lengths(case: Recurrent, device: str, implementations: tuple[str, ...]) -> Contest:
    """``lengths=`` beside packing, as it is used: pack, run, pad. Lengths are drawn from 1 to T, one of them T."""
    theirs, ours = _modules(case, device, num_layers=case.layers, bidirectional=case.directions > 1)
    x = random(case.dtype, device, case.T, case.B, case.H)
    dy = random(case.dtype, device, case.T, case.B, case.H * case.directions)
    lengths = torch.randint(1, case.T + 1, (case.B,))
    lengths[0] = case.T

    def packed(module: nn.Module, x: Tensor) -> Tensor:
        y, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=case.T)[0]

    def run(run: Callable[..., Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
        return _train(run, module, x, dy) if case.mode == "train" else lambda: run(module, x)

    def exact() -> Tensors:
        with torch.set_grad_enabled(case.mode == "train"):
            return flat(run(packed, copy.deepcopy(theirs).double(), x.double(), dy.double())())

    mine = implementations_of(run(lambda module, x: module(x, lengths=lengths)[0], ours, x, dy), implementations)
    sides = {"torch": run(packed, theirs, x, dy), **mine}
    return Contest(case, sides, exact, lambda: fastseq.explain(ours, x, lengths=lengths), tuple(mine))


def reset_or_none(case: Recurrent) -> dict[str, Callable[[], Any]]:
    """Our layer without resets and with them: what resets cost."""
    torch.manual_seed(case.H + case.B)
    _, ours = _modules(case, "cpu")
    x, dy = (random(case.dtype, "cpu", case.T, case.B, case.H) for _ in range(2))
    reset = torch.rand(case.T, case.B) < case.density
    reset[case.T // 2, 0] = True
    ways = {"none": lambda module, x: module(x)[0], "reset": lambda module, x: module(x, reset=reset)[0]}
    if case.mode == "train":
        return {name: _train(way, ours, x, dy) for name, way in ways.items()}
    return {name: functools.partial(way, ours, x) for name, way in ways.items()}


def _reset(case: Recurrent, device: str, implementations: tuple[str, ...]) -> Contest:
    """``reset=`` beside the ways around it; only the outputs count, so pad-and-split need not pack."""
    theirs, ours = _modules(case, device)
    cell = getattr(nn, _LAYERS[case.cell] + "Cell")(case.H, case.H).to(device, getattr(torch, case.dtype))
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    x = random(case.dtype, device, case.T, case.B, case.H)
    dy = random(case.dtype, device, case.T, case.B, case.H)
    reset = torch.rand(case.T, case.B, device=device) < case.density
    reset[case.T // 2, 0] = True  # a short case has at least one

    def trained(run: Callable[..., Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
        if case.mode == "forward":
            return lambda: run(module, x, reset)
        return _train(lambda module, x: run(module, x, reset), module, x, dy)

    def exact() -> Tensors:
        with torch.set_grad_enabled(case.mode == "train"):
            double = copy.deepcopy(cell).double()
            return flat(trained(workarounds.python_loop, double, x.double(), dy.double())())

    sides = {
        "pad_and_split": trained(workarounds.pad_and_split, theirs, x, dy),
        "stretches": trained(workarounds.stretches, theirs, x, dy),
        "python_loop": trained(workarounds.python_loop, cell, x, dy),
    }
    mine = implementations_of(trained(lambda module, x, reset: module(x, reset=reset)[0], ours, x, dy), implementations)
    return Contest(case, sides | mine, exact, lambda: fastseq.explain(ours, x, reset=reset), tuple(mine))


def _double(value: Any) -> Any:
    return tuple(_double(v) for v in value) if isinstance(value, tuple) else value.double()


def grid(
    kind: str, cells: tuple[str, ...] = CELLS, modes: tuple[str, ...] = MODES, **axes: tuple[Any, ...]
) -> Iterator[Recurrent]:
    """Every combination of the axes, given as tuples of values; the last axis varies fastest."""
    names = list(axes)
    for cell, *values in product(cells, *axes.values()):
        for mode in modes:
            yield Recurrent(kind, cell, mode=mode, **dict(zip(names, values, strict=True)))
