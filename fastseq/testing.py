"""The laws that a recurrent cell must keep, as one call for a test of the user's own."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .implementation import kernel_refusal, use
from .nn.cells import Recurrent

T, B, I, H = 5, 3, 2, 5  # noqa: E741  (the field's letter)
WIDE = 20  # hidden units for the kernels: more than a tile, and enough for their rounding to be that of many
_SLACK = 2.0  # a kernel may be off by twice what PyTorch is, in float32 against float64,
_PEERS = 5  # the worst of so many times: one rounding may decide about all gradients of a cell that normalises


def check_cell(cell: type[Recurrent] | str) -> dict[str, str]:
    """Hold a cell to the laws of all recurrent layers, on every implementation that can run here.

    The gradients are the derivative, of first and second order; a sequence in two parts is the whole; no row of the
    batch sees another; a reset starts afresh; nothing is read behind a row's end; the loop in PyTorch agrees with the
    reference; and the kernels, on a GPU or under ``TRITON_INTERPRET=1``, are off by at most twice what PyTorch is
    in float32, in the outputs and every gradient.

    Args:
        cell: a class that :func:`fastseq.cell` made or one of fastseq's own, or the name of such a cell.

    Returns:
        For each law "holds", or for the last why it could not be checked; a warning says so of a kernel that there is.

    Raises:
        AssertionError: a law is broken; a sentence says which, where and by how much.
        ValueError: there is no cell of this name.

    Example:
        >>> import fastseq
        >>> fastseq.testing.check_cell(fastseq.MGU)["whole"]
        'holds'
    """
    made = _class_of(cell) if isinstance(cell, str) else cell
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        laws: dict[str, Callable[[type[Recurrent]], str]] = {
            "gradient": _gradient, "whole": _whole, "rows": _rows, "reset": _reset, "lengths": _lengths,
            "reference": _reference, "kernel": _kernel,
        }  # fmt: skip
        return {law: check(made) for law, check in laws.items()}


def _class_of(name: str) -> type[Recurrent]:
    def below(kind: type[Recurrent]) -> Iterator[type[Recurrent]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    for kind in below(Recurrent):
        if kind.cell == name:
            return kind
    raise ValueError(f"cell: there is no layer of a cell {name!r}")


def _layer(kind: type[Recurrent], dtype: torch.dtype = torch.float64, device: str = "cpu", units: int = H) -> Recurrent:
    """A layer in both directions, with numbers everywhere."""
    layer = kind(I, units, bidirectional=True, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return layer


def _inputs(layer: Recurrent, steps: int = T) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A sequence, and the states it leaves: of a cell's own making, for it may not take others."""
    with torch.no_grad():
        before = layer(torch.randn(3, B, I, dtype=torch.float64))[1]
    states = before if isinstance(before, tuple) else (before,)
    return torch.randn(steps, B, I, dtype=torch.float64), states


def _run(layer: Recurrent, x: Tensor, states: tuple[Tensor, ...] | None, **keywords: Any) -> tuple[Tensor, ...]:
    """The output and the final states, side by side."""
    hx = None if states is None else states if len(states) > 1 else states[0]
    y, final = layer(x, hx, **keywords)
    return (y, *final) if isinstance(final, tuple) else (y, final)


def _same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], law: str) -> None:
    for a, e in zip(got, expected, strict=True):
        off = (a - e).abs().max().item()
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-9), f"{law}; off by {off:.2e}"


def _gradient(kind: type[Recurrent]) -> str:
    layer = _layer(kind)
    x, states = _inputs(layer, 3)
    names, weights = zip(*layer.named_parameters(), strict=True)
    leaves = [t.detach().requires_grad_() for t in (x, *states, *weights)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = rest[0] if len(states) == 1 else rest[: len(states)]
        y, final = torch.func.functional_call(layer, dict(zip(names, rest[len(states) :], strict=True)), (x, hx))
        return (y, *final) if isinstance(final, tuple) else (y, final)

    for name, check in (("gradient", torch.autograd.gradcheck), ("gradient's gradient", torch.autograd.gradgradcheck)):
        try:
            check(run, leaves, fast_mode=True)
        except RuntimeError as error:
            raise AssertionError(f"{kind.__name__}: the {name} is not the derivative; {error}") from error
    return "holds"


def _whole(kind: type[Recurrent]) -> str:
    layer = kind(I, H, dtype=torch.float64)
    x, states = _inputs(layer)
    first, *middle = _run(layer, x[:2], states)
    second, *final = _run(layer, x[2:], tuple(middle))
    law = f"{kind.__name__}: a sequence in two parts is not the whole, so the states are not all that a step goes by"
    _same((torch.cat((first, second)), *final), _run(layer, x, states), law)
    return "holds"


def _rows(kind: type[Recurrent]) -> str:
    layer = _layer(kind)
    x, states = _inputs(layer)
    rows = [2, 0]
    y, *final = _run(layer, x, states)
    alone = _run(layer, x[:, rows], tuple(s[:, rows] for s in states))
    _same(alone, tuple(t[:, rows] for t in (y, *final)), f"{kind.__name__}: a row of the batch depends on the others")
    return "holds"


def _reset(kind: type[Recurrent]) -> str:
    layer = kind(I, H, dtype=torch.float64)
    x, states = _inputs(layer)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    y, *final = _run(layer, x, states, reset=reset)
    _same((y[2:], *final), _run(layer, x[2:], None), f"{kind.__name__}: a step at a reset is not a fresh start")
    return "holds"


def _lengths(kind: type[Recurrent]) -> str:
    layer = _layer(kind)
    x, states = _inputs(layer)
    x[3:, 1] = torch.nan
    y, *final = _run(layer, x, states, lengths=torch.tensor([T, 3, 0]))
    short = _run(layer, x[:3, 1:2], tuple(s[:, 1:2] for s in states))
    law = f"{kind.__name__}: a row with a length is not the shorter sequence"
    _same((y[:3, 1:2], *(s[:, 1:2] for s in final)), short, law)
    _same((y[:, 2], *(s[:, 2] for s in final)), (torch.zeros_like(y[:, 2]), *(s[:, 2] for s in states)), law)
    return "holds"


def _everything(layer: Recurrent, x: Tensor, states: tuple[Tensor, ...], **keywords: Any) -> dict[str, Tensor]:
    """Outputs and all gradients of a run with resets and lengths."""
    generator = torch.Generator().manual_seed(1)
    reset, lengths = torch.rand(T, B, generator=generator) < 0.3, torch.tensor([T, 3, 0])
    leaves = [t.detach().requires_grad_() for t in (x, *states)]
    outputs = _run(layer, leaves[0], tuple(leaves[1:]), reset=reset.to(x.device), lengths=lengths, **keywords)
    into = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    names = ["input", *(f"state {i}" for i in range(len(states)))]
    given = dict(zip(names, leaves, strict=True)) | dict(layer.named_parameters())
    gradients = torch.autograd.grad(outputs, list(given.values()), into)
    named = {"the output": outputs[0]} | {f"the final state {i}": s for i, s in enumerate(outputs[1:])}
    return named | {f"the gradient of {n}": g for n, g in zip(given, gradients, strict=True)}


def _reference(kind: type[Recurrent]) -> str:
    layer = _layer(kind)
    x, states = _inputs(layer)
    with use("reference"):
        expected = _everything(layer, x, states)
    with use("torch"):
        for recompute in (False, True):
            got = _everything(layer, x, states, recompute=recompute)
            for name, exact in expected.items():
                _same((got[name],), (exact,), f"{kind.__name__}: {name} in PyTorch's loop is not the reference's")
    return "holds"


def _nudged(layer: Recurrent, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Recurrent, Tensor, tuple[Tensor, ...]]:
    """The same layer and inputs, each number at most a rounding off: all that float32 says about a number."""

    def nudge(t: Tensor) -> Tensor:
        return t.detach() * (1 + torch.finfo(t.dtype).eps * torch.empty_like(t).uniform_(-1, 1))

    other = copy.deepcopy(layer)
    other.load_state_dict({name: nudge(t) for name, t in layer.state_dict().items()})
    return other, nudge(x), tuple(nudge(s) for s in states)


def _kernel(kind: type[Recurrent]) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact_layer = _layer(kind, units=WIDE)
    x, states = _inputs(exact_layer)
    layer = _layer(kind, torch.float32, device, WIDE)
    layer.load_state_dict(exact_layer.state_dict())
    exact_layer.load_state_dict(layer.state_dict())  # rounded, and so the same numbers
    x32, *states32 = (t.to(device, torch.float32) for t in (x, *states))
    refusal = kernel_refusal(kind.cell, x32)
    if refusal is not None:
        if "there is no kernel" not in refusal:
            warnings.warn(f"{kind.__name__}: the kernel was not checked: {refusal}", stacklevel=3)
        return f"not checked: {refusal}"
    with use("reference"):
        exact = _everything(exact_layer, x32.double().cpu(), tuple(s.double().cpu() for s in states32))
        peers = [_everything(*_nudged(layer, x32, tuple(states32))) for _ in range(_PEERS)]

    def error(of: dict[str, Tensor], name: str) -> Tensor:
        return (of[name].double().cpu() - exact[name]).abs().max()

    with use("triton"):
        for recompute in (False, True):
            got = _everything(layer, x32, tuple(states32), recompute=recompute)
            for name, value in exact.items():
                floor = torch.finfo(torch.float32).eps * value.abs().max()
                budget = _SLACK * (max(error(peer, name) for peer in peers) + floor)
                off = error(got, name)
                law = f"{kind.__name__}: {name} by the kernel is off by {off:.2e}, where {budget:.2e} is allowed"
                assert off <= budget, law
    return "holds"
