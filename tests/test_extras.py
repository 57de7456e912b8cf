"""reset, lengths and return_cells: every cell, direction and layer, on every implementation, against a plain loop."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

from .support.budget import assert_within_budget
from .support.rows import by_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = {
    "rnn_tanh": lambda **k: fastseq.RNN(3, 5, **k),
    "rnn_relu": lambda **k: fastseq.RNN(3, 5, nonlinearity="relu", **k),
    "lstm": lambda **k: fastseq.LSTM(3, 5, **k),
    "lstm_proj": lambda **k: fastseq.LSTM(3, 5, proj_size=2, **k),
    "gru": lambda **k: fastseq.GRU(3, 5, **k),
}
SHAPES = [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "bias": False}]
T, B = 6, 4


def case(make: Any, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Tensor, Any, Tensor, Tensor]:
    """A module in float64, input, initial state, resets (first and last step included), lengths (0 and T included)."""
    module = make(**options).double()
    D = module.num_layers * (2 if module.bidirectional else 1)
    width = getattr(module, "proj_size", 0) or 5
    x = torch.randn(T, B, 3, dtype=torch.float64)
    h = torch.randn(D, B, width, dtype=torch.float64)
    hx = (h, torch.randn(D, B, 5, dtype=torch.float64)) if module.mode == "LSTM" else h
    reset = torch.rand(T, B) < 0.3
    reset[0, 0] = reset[-1, 1] = True
    lengths = torch.tensor([T, 0, 3, 1])
    return module, x, hx, reset, lengths


def flat(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def outcome(run: Any, module: Any, x: Tensor, hx: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Every output and gradient of ``run(module, x, hx)`` at a dtype, by name; the loss weighs all outputs."""
    module = copy.deepcopy(module).to(device, dtype)
    x = x.to(device, dtype).requires_grad_()
    states = [s.to(device, dtype).requires_grad_() for s in flat(hx)]
    results = flat(run(module, x, tuple(states) if len(states) == 2 else states[0]))
    names = ["output", *["h_n", "c_n"][: len(states)], "cells"]
    weight = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=weight).to(r)).sum() for r in results)
    sources = {"input": x, **{f"state {i}": s for i, s in enumerate(states)}, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(loss, list(sources.values()))
    return {
        **dict(zip(names, results, strict=True)),
        **{f"gradient of {n}": g for n, g in zip(sources, gradients, strict=True)},
    }


@pytest.mark.parametrize("extras", ["reset", "lengths", "both", "neither"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("implementation", ["reference", "torch", "auto", "triton"])
def test_as_a_plain_loop_over_rows(implementation: str, cell: str, extras: str) -> None:
    kernels = implementation == "triton"
    dtype = torch.float32 if kernels else torch.float64
    for options in SHAPES[:3:2] if kernels and DEVICE == "cpu" else SHAPES:
        module, x, hx, reset, lengths = case(CELLS[cell], options, dtype)
        keywords = {}
        if extras in ("reset", "both"):
            keywords["reset"] = reset
        if extras in ("lengths", "both"):
            keywords["lengths"] = lengths
        device = DEVICE if kernels else "cpu"

        def ours(m: Any, x: Tensor, hx: Any, keywords: Any = keywords, device: str = device) -> Any:
            moved = {k: v.to(device) for k, v in keywords.items()}
            with fastseq.use(implementation):
                return m(x, hx, **moved, return_cells=True)

        def loop(m: Any, x: Tensor, hx: Any, keywords: Any = keywords) -> Any:
            return by_rows(m, x, hx, **keywords)

        got = outcome(ours, module, x, hx, dtype, device)
        exact = outcome(loop, module, x, hx, torch.float64, "cpu")
        peer = outcome(loop, module, x, hx, dtype, "cpu") if kernels else exact
        for name, value in got.items():
            slack = 2.0 if kernels else 64.0  # in float64 the peer is exact: the floor of rounding over six steps
            assert_within_budget(value, exact[name], peer[name], f"{cell} {options} {extras}: {name}", slack)


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_changes_nothing(cell: str) -> None:
    module, x, hx, reset, lengths = case(CELLS[cell], {"bidirectional": True}, torch.float64)
    outcomes = [
        outcome(
            lambda m, x, hx, again=again: m(x, hx, reset=reset, lengths=lengths, return_cells=True, recompute=again),
            module, x, hx, torch.float64, "cpu",
        )
        for again in (False, True)
    ]  # fmt: skip
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_packing(cell: str) -> None:
    module, x, hx, _, _ = case(CELLS[cell], {"num_layers": 2, "bidirectional": True}, torch.float64)
    lengths = torch.tensor([2, T, 1, 4])
    y, state = module(x, hx, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, expected_state = module(packed, hx)
    padded, _ = pad_packed_sequence(expected, total_length=T)
    torch.testing.assert_close(y, padded)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_packed_sequence_takes_resets_and_gives_packed_cells(cell: str, batch_first: bool) -> None:
    module, x, hx, reset, _ = case(CELLS[cell], {"bidirectional": True, "batch_first": batch_first}, torch.float64)
    lengths = torch.tensor([2, T, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    layout = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    y, state, cells = module(packed, hx, reset=layout(reset), return_cells=True)
    expected, expected_state, expected_cells = module(
        layout(x), hx, reset=layout(reset), lengths=lengths, return_cells=True
    )
    assert torch.equal(y.sorted_indices, packed.sorted_indices)
    torch.testing.assert_close(pad_packed_sequence(y, batch_first, total_length=T)[0], expected)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(pad_packed_sequence(cells, batch_first, total_length=T)[0], expected_cells)


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_takes_the_extras_too(cell: str) -> None:
    for batch_first in (False, True):
        module, x, hx, reset, _ = case(CELLS[cell], {"batch_first": batch_first}, torch.float64)
        row = [s[:, 2] for s in flat(hx)]
        hx_row = tuple(row) if len(row) == 2 else row[0]
        got = module(x[:, 2], hx_row, reset=reset[:, 2], lengths=torch.tensor(4), return_cells=True)
        whole = [s[:, 2:3] for s in flat(hx)]
        expected = by_rows(module, x[:, 2:3], whole if len(row) == 2 else whole[0], reset[:, 2:3], torch.tensor([4]))
        for a, b in zip(flat(got), expected, strict=True):
            torch.testing.assert_close(a, b.squeeze(1))


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_is_a_transpose(cell: str) -> None:
    module, x, hx, reset, lengths = case(CELLS[cell], {"bidirectional": True}, torch.float64)
    y, state, cells = module(x, hx, reset=reset, lengths=lengths, return_cells=True)
    module.batch_first = True
    y2, state2, cells2 = module(x.transpose(0, 1), hx, reset=reset.t(), lengths=lengths, return_cells=True)
    assert torch.equal(y, y2.transpose(0, 1))
    assert torch.equal(cells, cells2.transpose(0, 1))
    for a, b in zip(flat(state), flat(state2), strict=True):
        assert torch.equal(a, b)


def test_the_last_cell_is_c_n() -> None:
    rnn = fastseq.LSTM(3, 5)
    _, (_, c), cells = rnn(torch.randn(T, B, 3), return_cells=True)
    assert torch.equal(cells[-1], c[0])


@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("implementation", ["auto", "torch", "reference", "triton"])
def test_a_cell_resets_its_rows(cell: str, implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    step = getattr(fastseq, cell)(3, 5).to(device)
    x, h, c = (torch.randn(B, n, device=device) for n in (3, 5, 5))
    reset = torch.tensor([True, False, True, False], device=device)
    kept = (~reset)[:, None]
    with fastseq.use(implementation):
        got = step(x, (h, c) if cell == "LSTMCell" else h, reset=reset)
        expected = step(x, (h * kept, c * kept) if cell == "LSTMCell" else h * kept)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b)


def test_any_integer_dtype_of_lengths() -> None:
    rnn, x = fastseq.GRU(3, 5), torch.randn(T, B, 3)
    expected = rnn(x, lengths=torch.tensor([6, 0, 3, 1]))[0]
    for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        assert torch.equal(rnn(x, lengths=torch.tensor([6, 0, 3, 1], dtype=dtype))[0], expected)


def test_extras_agree_in_lower_precision() -> None:
    for dtype, make in itertools.product((torch.bfloat16, torch.float16), CELLS.values()):
        module, x, hx, reset, lengths = case(make, {"bidirectional": True}, dtype)
        keywords = {"reset": reset, "lengths": lengths}
        got = outcome(lambda m, x, hx, k=keywords: m(x, hx, **k, return_cells=True), module, x, hx, dtype, "cpu")
        exact = outcome(lambda m, x, hx, k=keywords: by_rows(m, x, hx, **k), module, x, hx, torch.float64, "cpu")
        peer = outcome(lambda m, x, hx, k=keywords: by_rows(m, x, hx, **k), module, x, hx, dtype, "cpu")
        for name, value in got.items():
            assert_within_budget(value, exact[name], peer[name], f"{module} {dtype}: {name}")
