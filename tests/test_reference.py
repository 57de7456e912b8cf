"""The reference is the oracle of every other test; here it is held to PyTorch itself, and to calculus."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.reference import recurrent as reference

STOCK: dict[str, Any] = {
    "rnn_tanh": lambda **k: torch.nn.RNN(3, 5, **k),
    "rnn_relu": lambda **k: torch.nn.RNN(3, 5, nonlinearity="relu", **k),
    "lstm": lambda **k: torch.nn.LSTM(3, 5, **k),
    "gru": lambda **k: torch.nn.GRU(3, 5, **k),
}


def initial(module: Any, B: int) -> tuple[Tensor, ...]:
    D = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(D, B, module.proj_size or 5, dtype=torch.float64)
    return (h, torch.randn(D, B, 5, dtype=torch.float64)) if module.mode == "LSTM" else (h,)


@pytest.mark.parametrize("cell", STOCK)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "bias": False}])
def test_equals_pytorch_in_float64(cell: str, options: dict[str, Any]) -> None:
    variants = [options, {**options, "proj_size": 2}] if cell == "lstm" else [options]
    for chosen in variants:
        module = STOCK[cell](**chosen).double()
        x, hx = torch.randn(6, 4, 3, dtype=torch.float64), initial(module, 4)
        D = 2 if module.bidirectional else 1
        stacks = reference.stacked(module._flat_weights, module.bias, module.num_layers, D)

        def run(*args: Any, cell: str = cell) -> Any:
            return reference.layer(cell, *args)

        y, final, _ = reference.network(run, x, hx, stacks)
        expected, state = module(x, hx if len(hx) == 2 else hx[0])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(final, state if len(hx) == 2 else (state,), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", STOCK)
def test_a_step_equals_pytorchs_cell(cell: str) -> None:
    module = STOCK[cell]().double()
    x, (h, *c) = torch.randn(4, 3, dtype=torch.float64), initial(module, 4)
    weights = module._flat_weights
    new = reference.single(cell, x, h[0], c[0][0] if c else None, *weights)
    expected = getattr(torch, f"{cell}_cell")(x, (h[0], c[0][0]) if c else h[0], *weights)
    for ours, theirs in zip(new, expected if c else (expected, None), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cell", STOCK)
@pytest.mark.parametrize("extras", [False, True])
def test_differentiates_twice(cell: str, extras: bool) -> None:
    module = STOCK[cell](bidirectional=True).double()
    stack = reference.stacked(module._flat_weights, True, 1, 2)[0]
    x, hx = torch.randn(3, 2, 3, dtype=torch.float64), initial(module, 2)
    reset = torch.tensor([[False, False], [True, False], [False, False]]) if extras else None
    lengths = torch.tensor([3, 2]) if extras else None
    given = [x, *(w.detach() for w in stack if w is not None), *hx]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, states = rest[:4], rest[4:]
        found = reference.layer(cell, x, *weights, None, *(*states, None)[:2], reset=reset, lengths=lengths)
        return tuple(t for t in found if t is not None)

    variables = tuple(t.clone().requires_grad_() for t in given)
    if cell == "rnn_relu":  # a kink would fail the finite differences by chance
        variables = tuple((t.detach().abs() + 0.1).requires_grad_() for t in variables)
    assert torch.autograd.gradcheck(run, variables, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, variables, fast_mode=True)
