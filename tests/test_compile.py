"""Our modules under torch.compile, torch.export, opcheck and autocast: one graph, whatever T and B are."""

import contextlib
import itertools
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.library import opcheck
from torch.testing import assert_close

import fastseq
from fastseq.ops.recurrent import SAVED
from fastseq.reference.recurrent import CELLS

from .support.budget import assert_within_budget

ROOT = Path(__file__).parents[1]
I, H = 3, 5  # noqa: E741  (the field's letter)
SIZES = ((7, 6), (9, 2), (4, 8))  # T, B; none equal to I, H or each other: equal sizes share a symbol at first
RECURRENT, STEP = torch.ops.fastseq.recurrent.default, torch.ops.fastseq.cell.default
RECURRENT_BACKWARD, STEP_BACKWARD = (
    torch.ops.fastseq.recurrent_backward.default,
    torch.ops.fastseq.cell_backward.default,
)

NETWORKS = {
    "rnn": ("RNN", {}),
    "relu-batch_first": ("RNN", {"nonlinearity": "relu", "batch_first": True}),
    "lstm-deep": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm-proj": ("LSTM", {"proj_size": 2, "batch_first": True, "bidirectional": True}),
    "gru": ("GRU", {"bias": False}),
    "gru-deep": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
}


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor | None):
        return [] if outputs is None else [outputs]
    return [t for part in outputs for t in flat(part)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def build(name: str) -> Any:
    kind, settings = NETWORKS[name]
    return getattr(fastseq, kind)(I, H, **settings).double().eval()


def inputs_of(rnn: Any, T: int, B: int) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Input, hx, reset and lengths; hx of an LSTM is the same tensor twice wherever the shapes allow."""
    x = draw(B, T, I) if rnn.batch_first else draw(T, B, I)
    rows = rnn.num_layers * (1 + rnn.bidirectional)
    h = draw(rows, B, rnn.proj_size or H)
    c = draw(rows, B, H) if rnn.proj_size else h
    return x, (h, c) if rnn.mode == "LSTM" else h, torch.rand(x.shape[:2]) < 0.3, torch.randint(0, T + 1, (B,))


def outputs_and_gradients(run: Any, rnn: torch.nn.Module, *args: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = flat(run(*args))
    leaves = {id(t): t for t in flat(args) if t.requires_grad}
    loss = sum(output.cos().sum() for output in outputs)
    return outputs, torch.autograd.grad(loss, [*leaves.values(), *rnn.parameters()])


def opaque_nodes(counter: CompileCounterWithBackend) -> int:
    return sum(node.target is RECURRENT for graph in counter.graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_graph_serves_every_length_and_batch(name: str) -> None:
    rnn, counter = build(name), CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, hx: Any, reset: Tensor, lengths: Tensor) -> list[Any]:
        return [
            rnn(x),
            rnn(x, hx),
            rnn(x, hx, reset=reset),
            rnn(x, lengths=lengths),
            rnn(x, hx, return_cells=True),
            rnn(x, recompute=True, reset=reset, lengths=lengths),
        ]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for count, (T, B) in enumerate(SIZES):
        args = inputs_of(rnn, T, B)
        with torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            got = outputs_and_gradients(compiled, rnn, *args)
        assert_close(got, outputs_and_gradients(run, rnn, *args))
    assert counter.frame_count == 1
    assert opaque_nodes(counter) == 6 * rnn.num_layers, "a layer is one node, not a loop"


def test_a_module_compiles_by_itself_without_gradients() -> None:
    rnn = fastseq.LSTM(I, H, num_layers=2, proj_size=2)
    compiled = torch.compile(rnn, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, (T, B) in enumerate(SIZES):
        x = torch.randn(T, B, I)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            assert_close(compiled(x), rnn(x))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_unbatched_input_compiles(kind: str) -> None:
    rnn = getattr(fastseq, kind)(I, H, bidirectional=True, batch_first=True).double()

    def run(x: Tensor, reset: Tensor, length: Tensor) -> list[Any]:
        return [rnn(x), rnn(x, reset=reset, lengths=length)]

    args = draw(7, I), torch.rand(7) < 0.3, torch.tensor(4)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, rnn, *args), outputs_and_gradients(run, rnn, *args))


class Tagger(torch.nn.Module):
    """An ordinary model around recurrent layers, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, I)
        self.encode = fastseq.LSTM(I, H, bidirectional=True, batch_first=True)
        self.norm = torch.nn.LayerNorm(2 * H)
        self.decode = fastseq.GRU(2 * H, H, batch_first=True)
        self.out = torch.nn.Linear(H, 11)

    def forward(self, tokens: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        encoded, (h, _) = self.encode(self.embed(tokens), lengths=lengths)
        y, _ = self.decode(self.norm(encoded), h[:1], reset=reset)
        return self.out(y).log_softmax(-1)


def tokens_of(T: int, B: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 11, (B, T)), torch.randint(0, T + 1, (B,)), torch.rand(B, T) < 0.3


def test_a_larger_model_is_one_graph() -> None:
    model, counter = Tagger().double(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for count, (T, B) in enumerate(SIZES):
        args = tokens_of(T, B)
        with torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            got = outputs_and_gradients(compiled, model, *args)
        assert_close(got, outputs_and_gradients(model, model, *args))
    assert opaque_nodes(counter) == 2


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_inductor_gives_the_same_numbers() -> None:
    rnn = fastseq.GRU(I, H).double()

    def run(x: Tensor, reset: Tensor) -> Tensor:
        return rnn(2 * x, reset=reset)[0] + 1

    args = draw(7, 6, I), torch.rand(7, 6) < 0.3
    # A precompiled header pays from the second kernel on, and there are two small ones.
    with torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "compile_threads": 1}):
        got = outputs_and_gradients(torch.compile(run, fullgraph=True), rnn, *args)
    assert_close(got, outputs_and_gradients(run, rnn, *args))


def test_cells_compile() -> None:
    cells = torch.nn.ModuleList([fastseq.RNNCell(I, H), fastseq.GRUCell(I, H), fastseq.LSTMCell(I, H)]).double()

    def run(x: Tensor, h: Tensor, reset: Tensor) -> list[Any]:
        states = h, h, (h, h)
        calls = zip(cells, states, strict=True)
        return [cell(x, state, reset=at) for cell, state in calls for at in (None, reset)] + [cell(x) for cell in cells]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, B in enumerate((7, 2)):
        args = draw(B, I), draw(B, H), torch.rand(B) < 0.5
        with torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            got = outputs_and_gradients(compiled, cells, *args)
        assert_close(got, outputs_and_gradients(run, cells, *args))
    with fastseq.use("torch"):  # a choice by name is made inside the graph, by an operator of ours
        got = outputs_and_gradients(compiled, cells, *args)
    assert_close(got, outputs_and_gradients(run, cells, *args))


class Residual(fastseq.LSTM):
    def forward(self, x: Tensor, hx: Any = None, **keywords: Any) -> Any:
        y, *rest = super().forward(x, hx, **keywords)
        return (x + y, *rest)


def test_a_users_subclass_compiles() -> None:
    rnn = Residual(H, H).double()
    args = draw(7, 6, H), None
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, rnn, *args), outputs_and_gradients(rnn, rnn, *args))


def test_a_swapped_model_compiles() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(I, I), torch.nn.LSTM(I, H)).double()
    args = (draw(7, 6, I),)
    expected = outputs_and_gradients(model, model, *args)
    fastseq.swap(model)
    assert_close(
        outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), model, *args), expected
    )


IMPORT_ORDERS = {"dynamo-first": ("torch._dynamo", "fastseq"), "fastseq-first": ("fastseq", "torch._dynamo")}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_torchs_own_modules_stay_as_they_were(order: str) -> None:
    """Ours compile and torch.nn's are refused as before, whichever of Dynamo and fastseq is imported first."""
    script = """
        import importlib, sys, torch

        def refusal():
            torch._dynamo.reset()
            try:
                torch.compile(torch.nn.LSTM(3, 5), fullgraph=True, backend="eager")(torch.zeros(7, 6, 3))
            except torch._dynamo.exc.Unsupported as error:
                return str(error).split("from user code")[0]

        first, second = sys.argv[1:]
        importlib.import_module(first)
        before = refusal() if first == "torch._dynamo" else None
        importlib.import_module(second)
        import fastseq

        class Mine(fastseq.GRU): pass
        for rnn in (fastseq.LSTM(3, 5), Mine(3, 5)):
            compiled = torch.compile(rnn, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(torch.ones(7, 6, 3))[0], rnn(torch.ones(7, 6, 3))[0])
        assert "LSTM" in (after := refusal()), after
        assert before in (None, after), (before, after)
        assert torch._dynamo.config.allow_rnn is False
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *IMPORT_ORDERS[order]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_an_exported_program_takes_other_sizes(strict: bool) -> None:
    model = Tagger().double()
    T, B = Dim("T", min=2, max=512), Dim("B", min=2, max=64)
    shapes = {0: B, 1: T}, {0: B}, {0: B, 1: T}
    program = torch.export.export(model, tokens_of(*SIZES[0]), dynamic_shapes=shapes, strict=strict)
    assert sum(node.target is RECURRENT for node in program.graph.nodes) == 2
    for T, B in SIZES:
        args = tokens_of(T, B)
        assert_close(program.module()(*args), model(*args))
    assert_close(program.run_decompositions().module()(*args), model(*args))


def operator_arguments(name: str, full: bool) -> tuple[Any, ...]:
    """The differentiable arguments of ``fastseq::recurrent``, bare or with all that is optional, then the masks."""
    T, B, D, cell = 2, 3, 1 + full, CELLS[name]  # opcheck also traces the gradient of the gradient, a loop
    P = 2 if full and name == "lstm" else H
    weights = [draw(D, cell.gates * H, I), draw(D, cell.gates * H, P)]
    weights += [draw(D, cell.gates * H) for _ in range(2)] if full else [None, None]
    weights.append(draw(D, P, H) if P != H else None)
    states = draw(D, B, P), draw(D, B, H) if cell.cells == 1 else None
    masks = (torch.rand(T, B) < 0.3, torch.tensor([2, 1, 0])) if full else (None, None)
    return (draw(T, B, I), *weights, *states, None, None, None, *masks)


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("name", SAVED)
def test_layer_operators_keep_the_rules(name: str, full: bool) -> None:
    args, keep = operator_arguments(name, full), "cells" if full else "gates"
    opcheck(RECURRENT, (name, *args, keep, "torch"))
    found = [t.detach() for t in RECURRENT(name, *args, keep, "torch")]
    cotangents = [torch.randn_like(t) if t.numel() else None for t in found[:4]]
    # Tracing the gradient of this gradient takes seconds, a loop with twice the nodes at every turn; once will do.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += ("test_aot_dispatch_dynamic",) if (name, full) == ("gru", False) else ()
    opcheck(RECURRENT_BACKWARD, (name, *cotangents, *args, *found, None, "torch"), test_utils=tests)
    for samples in (0, 3):  # no gradients of weights, or those of every row
        opcheck(RECURRENT_BACKWARD, (name, *cotangents, *args, *found, samples, "torch"), test_utils=tests[:3])
    without = tuple(None if t is None else t.detach() for t in args)
    opcheck(RECURRENT, (name, *without, "nothing", ""))


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("name", SAVED)
def test_step_operators_keep_the_rules(name: str, full: bool) -> None:
    B, GH = 3, CELLS[name].gates * H
    states = draw(B, H), draw(B, H) if CELLS[name].cells == 1 else None
    args = draw(B, I), *states, draw(GH, I), draw(GH, H), *((draw(GH), draw(GH)) if full else (None, None))
    opcheck(STEP, (name, *args, "gates", "torch"))
    found = [t.detach() for t in STEP(name, *args, "gates", "torch")]
    assert found[2].shape == (B, SAVED[name], H)
    cotangents = [torch.randn_like(t) if t.numel() else None for t in found[:2]]
    opcheck(STEP_BACKWARD, (name, *cotangents, *args, *found, None, "torch"))
    for samples in (0, 3):
        arguments = (name, *cotangents, *args, *found, samples, "torch")
        opcheck(STEP_BACKWARD, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    opcheck(STEP, (name, *(None if t is None else t.detach() for t in args), "nothing", ""))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_autocast_follows_torchs_table(kind: str, implementation: str) -> None:
    """dtype and error of what torch cannot do are those of what it can: no reset, and every row to its end."""
    stock = getattr(torch.nn, kind)(I, H, 2)
    ours, exact = getattr(fastseq, kind)(I, H, 2), getattr(torch.nn, kind)(I, H, 2).double()
    ours.load_state_dict(stock.state_dict())
    exact.load_state_dict(stock.state_dict())
    x, h = torch.randn(7, 6, I), torch.randn(2, 6, H)
    hx = (h, h) if kind == "LSTM" else h
    wide = (h.double(), h.double()) if kind == "LSTM" else h.double()
    nothing = {"reset": torch.zeros(7, 6, dtype=torch.bool), "lengths": torch.full((6,), 7)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        peer = flat(stock(x, hx))
        with fastseq.use(implementation):
            got = flat(ours(x, hx, **nothing))
    torch.stack([t.float().sum() for t in got]).sum().backward()
    torch.stack([t.float().sum() for t in peer]).sum().backward()
    results = flat(exact(x.double(), wide))
    torch.stack([t.sum() for t in results]).sum().backward()
    for index, (a, b, c) in enumerate(zip(got, results, peer, strict=True)):
        assert_within_budget(a, b, c, f"output {index}")
    for (key, a), b, c in zip(ours.named_parameters(), exact.parameters(), stock.parameters(), strict=True):
        assert_within_budget(a.grad, b.grad, c.grad, key)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_autocast_gives_torchs_dtypes(kind: str, implementation: str) -> None:
    """Whatever the dtypes of input and state: torch.nn.GRU and two cells on the CPU go by the state's."""
    ours, stock = getattr(fastseq, kind)(I, H), getattr(torch.nn, kind)(I, H)
    one_step = kind.endswith("Cell")
    for x_dtype, h_dtype in itertools.product((torch.float32, torch.bfloat16), (None, torch.float32, torch.bfloat16)):
        x, hx = torch.randn(*(() if one_step else (7,)), 6, I, dtype=x_dtype), None
        if h_dtype is not None:
            h = torch.randn(*(() if one_step else (1,)), 6, H, dtype=h_dtype)
            hx = (h, h) if "LSTM" in kind else h
        with torch.autocast("cpu", dtype=torch.bfloat16), fastseq.use(implementation):
            got = flat(ours(x, hx, reset=torch.zeros(x.shape[:-1], dtype=torch.bool)))
            expected = flat(stock(x, hx))
        assert [t.dtype for t in got] == [t.dtype for t in expected], (x_dtype, h_dtype)


def test_autocast_compiles() -> None:
    model = torch.nn.ModuleList([fastseq.LSTM(I, H), fastseq.GRU(H, H), fastseq.GRUCell(I, H)])

    def run(x: Tensor, reset: Tensor) -> list[Tensor]:
        lstm, gru, cell = model
        y = lstm(x, reset=reset)[0]
        return [y, gru(y, reset=reset)[0], cell(x[0])]

    args = torch.randn(7, 6, I), torch.rand(7, 6) < 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
        expected = run(*args)
    assert_close(got, expected)  # dtypes too
