"""The wrapper that stock operators wear on a GPU, tried on the CPU, where it is not needed: it must not be noticed."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastseq.ops import stock

from .support.gradients import KINDS, B, H, I, T, draw, loss_of, states_of


def stock_call(kind: str, settings: stock.Settings, packed: bool = False, **module: Any) -> Any:
    """``ops.stock.Stock`` as ``stock`` calls it for CUDA tensors, the same by torch alone, and the leaves."""
    rnn, pair = getattr(torch.nn, kind)(I, H, **module).double(), kind == "LSTM"
    x, cell = draw(T, B, I), rnn.mode.lower()
    states = states_of(rnn)
    sizes = pack_padded_sequence(x, torch.tensor([3, 1])).batch_sizes if packed else None
    data = pack_padded_sequence(x, torch.tensor([3, 1])).data.detach().requires_grad_() if packed else x
    leaves = [data, *states, *rnn.parameters()]
    has_biases, layers, dropout, train, bidirectional = settings

    def run(input: Tensor, *rest: Tensor) -> Any:
        hx, weights = rest[: 1 + pair], list(rest[1 + pair :])
        arguments = hx if pair else hx[0], weights, has_biases, layers, dropout, train, bidirectional
        if sizes is not None:
            return getattr(torch, cell)(input, sizes, *arguments)
        return getattr(torch, cell)(input, *arguments, False)

    def formula(input: Tensor, *rest: Tensor) -> Any:
        return stock._formula(cell, input, rest[: 1 + pair], rest[1 + pair :], settings, False, sizes)

    return lambda: stock.Stock.apply(run, formula, *leaves), lambda: run(*leaves), leaves


STOCK = {
    "plain": ((True, 1, 0.0, True, False), {}),
    "deep": ((True, 2, 0.0, True, True), {"num_layers": 2, "bidirectional": True}),
    "eval": ((True, 2, 0.5, False, False), {"num_layers": 2}),
    "packed": ((True, 2, 0.0, True, True), {"num_layers": 2, "bidirectional": True, "packed": True}),
}


@pytest.mark.parametrize("case", STOCK)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_stock_operator_is_stock(kind: str, case: str) -> None:
    settings, module = STOCK[case]
    wrapped, plain, leaves = stock_call(kind, settings, **module)
    got, expected = wrapped(), plain()
    assert_close(list(got), list(expected))
    once = torch.autograd.grad(loss_of(got), leaves, retain_graph=True)
    assert_close(once, torch.autograd.grad(loss_of(expected), leaves))
    assert_close(torch.autograd.grad(loss_of(got), leaves), once)
    penalties = []
    for run in (wrapped, plain):
        first = torch.autograd.grad(loss_of(run()), leaves, create_graph=True)
        penalties.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    assert_close(*penalties)


def test_a_wrapped_stock_operator_frees_its_graph_once_used() -> None:
    wrapped, _, leaves = stock_call("LSTM", STOCK["plain"][0])
    loss = wrapped()[0].sum()  # whose own graph keeps nothing that could be missed
    torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
    inner = weakref.ref(next(f for f in nodes_of(loss) if hasattr(f, "graph")).graph[1][0])
    assert inner() is not None
    torch.autograd.grad(loss, leaves)
    gc.collect()
    assert inner() is None, "the loss is alive, its graph should not be"
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def nodes_of(loss: Tensor) -> list[Any]:
    found, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        found.append(node)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def test_a_wrapped_stock_operator_will_not_guess_a_dropout() -> None:
    wrapped, _, leaves = stock_call("GRU", (True, 2, 0.5, True, False), num_layers=2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss_of(wrapped()), leaves))
    with pytest.raises(RuntimeError, match="dropout"):
        torch.autograd.grad(loss_of(wrapped()), leaves, create_graph=True)


def test_a_wrapped_stock_operator_can_be_checkpointed() -> None:
    wrapped, plain, leaves = stock_call("GRU", STOCK["plain"][0])
    outputs = checkpoint(wrapped, use_reentrant=False)
    assert_close(torch.autograd.grad(loss_of(outputs), leaves), torch.autograd.grad(loss_of(plain()), leaves))


def test_a_wrapped_stock_operator_asks_only_what_is_wanted() -> None:
    wrapped, plain, leaves = stock_call("LSTM", STOCK["plain"][0])
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    for index in range(3):
        got, expected = (torch.autograd.grad(run()[index].sum(), leaves[0]) for run in (wrapped, plain))
        assert_close(got, expected)
