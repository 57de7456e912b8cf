"""Who computes: `use` is obeyed or refused, in its own thread, task and block; `explain` says so beforehand."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import implementation
from fastseq.kernels import limits
from fastseq.kernels.recurrent import cell as cell_kernels
from fastseq.kernels.recurrent import plan
from fastseq.kernels.recurrent import sequence as sequence_kernels
from fastseq.ops import loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, B, I, H = 4, 2, 3, 5  # noqa: E741  (the field's letter)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="says what holds without a GPU")


def now() -> str:
    return implementation.chosen()


@pytest.fixture(autouse=True)
def _nothing_stays_chosen() -> Iterator[None]:
    yield
    assert now() == "auto"
    assert implementation.named == 0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the implementations that ran, as they run."""
    names: list[str] = []

    def watch(module: Any, function: str, name: str) -> None:
        original = getattr(module, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, watched)

    for direction in ("forward", "backward"):
        watch(sequence_kernels, f"sequence_{direction}", f"triton {direction}")
        watch(cell_kernels, f"cell_{direction}", f"triton {direction}")
        watch(loop, f"sequence_{direction}", f"torch {direction}")
    return names


# ------------------------------------------------------------------------------------------- the block


def test_blocks_nest() -> None:
    with fastseq.use("reference"):
        with fastseq.use("torch"):
            assert now() == "torch"
            with fastseq.use("auto"):
                assert now() == "auto"
            assert now() == "torch"
        assert now() == "reference"


def test_one_object_may_be_entered_twice() -> None:
    chosen = fastseq.use("reference")
    with chosen, fastseq.use("torch"), chosen:
        assert now() == "reference"
    with chosen:
        assert now() == "reference"


def test_an_exception_restores_the_choice() -> None:
    with fastseq.use("torch"):
        with pytest.raises(KeyError), fastseq.use("reference"):
            raise KeyError
        assert now() == "torch"


def test_a_decorated_function_chooses_for_each_call() -> None:
    @fastseq.use("reference")
    def count(n: int) -> list[str]:
        """Down to zero."""
        return [now(), *count(n - 1)] if n else []

    assert count(3) == ["reference"] * 3
    assert (count.__name__, count.__doc__) == ("count", "Down to zero.")

    @fastseq.use("torch")
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_a_decorated_coroutine_chooses_while_it_runs() -> None:
    @fastseq.use("reference")
    async def ask() -> list[str]:
        before = now()
        await asyncio.sleep(0)
        return [before, now()]

    async def main() -> list[Any]:
        return [await ask(), now()]

    assert asyncio.run(main()) == [["reference", "reference"], "auto"]


def test_a_generator_cannot_be_decorated() -> None:
    """Its body runs in pieces, in whatever context asks for the next; a choice would be lost without a word."""

    def letters() -> Iterator[str]:
        yield now()

    with pytest.raises(TypeError, match="generator"):
        fastseq.use("reference")(letters)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_an_unknown_name_is_an_error(name: Any) -> None:
    with pytest.raises(ValueError, match="expected 'auto', 'triton', 'torch' or 'reference'"):
        fastseq.use(name)


def test_a_thread_chooses_for_itself() -> None:
    together, seen = threading.Barrier(3, timeout=30), {}

    def work(name: str) -> None:
        start = now()
        with fastseq.use(name):
            together.wait()  # all three are inside
            seen[name] = start, now()
            together.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch")]
    with fastseq.use("triton"):
        for thread in threads:
            thread.start()
        together.wait()
        together.wait()
        assert now() == "triton"
        for thread in threads:
            thread.join()
    assert seen == {"reference": ("auto", "reference"), "torch": ("auto", "torch")}


def test_threads_may_share_a_decorated_function() -> None:
    together, seen = threading.Barrier(2, timeout=30), []

    @fastseq.use("reference")
    def work() -> None:
        together.wait()
        seen.append(now())
        together.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["reference"] * 2


def test_a_task_chooses_for_itself() -> None:
    async def work(name: str) -> tuple[str, str]:
        start = now()
        with fastseq.use(name):
            await asyncio.sleep(0)
            return start, now()

    async def main() -> list[tuple[str, str]]:
        with fastseq.use("torch"):  # a task starts from a copy of its parent's choice
            return await asyncio.gather(work("reference"), work("triton"), work("auto"))

    assert asyncio.run(main()) == [("torch", "reference"), ("torch", "triton"), ("torch", "auto")]


# ------------------------------------------------------------------------------------------- obeyed or refused


def call(rnn: torch.nn.Module, dtype: torch.dtype = torch.float32, **keywords: Any) -> Tensor:
    one_step = isinstance(getattr(rnn, "_orig_mod", rnn), torch.nn.RNNCellBase)
    x = torch.randn(*((B,) if one_step else (T, B)), I, device=DEVICE, dtype=dtype)
    outputs = rnn(x, **keywords)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_triton_is_obeyed(kind: str, ran: list[str]) -> None:
    rnn = getattr(fastseq, kind)(I, H, device=DEVICE)
    with fastseq.use("triton"):
        y = call(rnn)
    y.sum().backward()  # outside: the gradient goes with the output it is of
    assert ran == ["triton forward", "triton backward"]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_triton_is_refused_and_not_replaced(kind: str, ran: list[str]) -> None:
    rnn = getattr(fastseq, kind)(I, H, device=DEVICE).double()
    with fastseq.use("triton"), pytest.raises(fastseq.Unsupported, match=r"^triton: .*float64"):
        call(rnn, torch.double)
    assert not ran


def test_torch_is_obeyed(ran: list[str]) -> None:
    rnn = fastseq.LSTM(I, H, device=DEVICE)
    with fastseq.use("torch"):
        y = call(rnn, recompute=True)
    with fastseq.use("reference"):
        y.sum().backward()
    assert ran == ["torch forward", "torch backward"]


def test_the_reference_is_obeyed(ran: list[str]) -> None:
    rnn = fastseq.LSTM(I, H, device=DEVICE)
    with fastseq.use("reference"):
        y = call(rnn)
    assert "CatBackward" in type(y.grad_fn).__name__, "the reference ends in a plain torch.cat"
    assert not ran


def test_a_compiled_graph_obeys_or_refuses(ran: list[str]) -> None:
    """It is compiled once, under no choice, and asks when it runs."""
    torch._dynamo.reset()
    rnn = fastseq.GRU(I, H, device=DEVICE)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    call(compiled, reset=torch.zeros(T, B, dtype=torch.bool, device=DEVICE))
    with torch.compiler.set_stance("fail_on_recompile"):
        ran.clear()
        for name in ("triton", "torch"):
            with fastseq.use(name):
                call(compiled, reset=torch.zeros(T, B, dtype=torch.bool, device=DEVICE))
        assert ran == ["triton forward", "torch forward"]
        with fastseq.use("reference"), pytest.raises(fastseq.Unsupported, match=r"^reference: .*compiled"):
            call(compiled, reset=torch.zeros(T, B, dtype=torch.bool, device=DEVICE))
    rnn.double()
    with fastseq.use("triton"), pytest.raises(fastseq.Unsupported, match="float64"):
        call(compiled, torch.double)
    assert ran == ["triton forward", "torch forward"]


def test_a_compiled_cell_obeys_or_refuses(ran: list[str]) -> None:
    torch._dynamo.reset()
    cell = fastseq.LSTMCell(I, H, device=DEVICE)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    call(compiled)
    assert not ran, "torch's own operator compiles as it is"
    for name in ("triton", "torch"):
        with fastseq.use(name):
            call(compiled)
    assert ran == ["triton forward", "torch forward"]
    with fastseq.use("reference"), pytest.raises(fastseq.Unsupported, match=r"^reference: .*compiled"):
        call(compiled)
    call(compiled)
    assert ran == ["triton forward", "torch forward"]


def test_only_auto_falls_back() -> None:
    refusals = {"triton": lambda: "no", "torch": lambda: None, "reference": lambda: None}

    def fastest() -> tuple[str, str]:
        return "triton", "because"

    found = implementation.choose(refusals, fastest)
    assert str(found) == "torch: the fastest that can\n  not triton: no"
    with fastseq.use("triton"), pytest.raises(fastseq.Unsupported, match=r"^triton: no$"):
        implementation.choose(refusals, fastest)
    with pytest.raises(fastseq.Unsupported, match=r"^triton: no; torch: nor I; reference: nor I$"):
        implementation.choose({**refusals, "torch": lambda: "nor I", "reference": lambda: "nor I"}, fastest)


# ------------------------------------------------------------------------------------------- explain


class Watch(TorchDispatchMode):
    """Fails when anything but a view is computed."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.is_view, function
        return function(*args, **(kwargs or {}))


@on_cpu
def test_explain_on_the_cpu() -> None:
    x, rnn, cell = torch.randn(B, T, I), fastseq.LSTM(I, H, batch_first=True), fastseq.GRUCell(I, H)
    reset, plain = torch.zeros(B, T, dtype=torch.bool), "torch: on the CPU PyTorch's own operator is the fastest"
    loops = "torch: on the CPU, a loop over time in PyTorch"
    held = "torch: on the CPU, PyTorch's own operator with gates held open or shut"
    in_place = "torch: on the CPU, a loop over time that works in place"
    gru, long = fastseq.GRU(I, H, batch_first=True), torch.randn(B, 32, I)
    with Watch():
        assert str(fastseq.explain(rnn, x)) == plain
        assert str(fastseq.explain(rnn, x[0])) == plain
        assert str(fastseq.explain(cell, x[0], reset=reset[0])) == plain
        assert str(fastseq.explain(rnn, x, reset=reset)) == held
        assert str(fastseq.explain(rnn, x, lengths=reset)) == held
        assert str(fastseq.explain(gru, x, reset=reset)) == in_place
        assert str(fastseq.explain(gru, x)) == plain
        assert str(fastseq.explain(gru, long)) == in_place
        with torch.no_grad():
            assert str(fastseq.explain(gru, long)) == plain
        with fastseq.use("torch"):
            assert str(fastseq.explain(gru, long)) == "torch: asked for by use('torch')"
        assert str(fastseq.explain(rnn, x, return_cells=True)) == loops
        assert str(fastseq.explain(rnn, x, recompute=True)) == loops
        with fastseq.use("reference"):
            assert str(fastseq.explain(rnn, x)) == "reference: asked for by use('reference')"
    packed = pack_sequence([x[0], x[1]])
    with Watch():
        assert str(fastseq.explain(rnn, packed)) == plain


@on_cpu
def test_explain_refuses_as_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, x = fastseq.RNN(I, H, bias=False), torch.randn(T, B, I)
    with fastseq.use("triton"):
        said = "triton: asked for by use('triton'); resident: the weight of rnn_tanh at hidden size 5 in float32 stays"
        assert str(fastseq.explain(rnn, x)).startswith(said)
        monkeypatch.setattr(plan, "INTERPRETED", False)
        with pytest.raises(fastseq.Unsupported, match="TRITON_INTERPRET=1") as explained:
            fastseq.explain(rnn, x)
        with pytest.raises(fastseq.Unsupported) as called:
            rnn(x)
    assert str(explained.value) == str(called.value)


def test_explain_knows_only_our_modules() -> None:
    with pytest.raises(TypeError, match="swap"):
        fastseq.explain(torch.nn.LSTM(I, H), torch.randn(T, B, I))


def a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(limits, "limits", lambda device: limits.LIMITS["sm_90"])


def test_explain_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory on a device nobody has: the choice reads nothing but their types and sizes."""
    a_hopper(monkeypatch)
    rnn = fastseq.LSTM(I, H)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(T, B, I, device="cuda")
        reset = torch.empty(T, B, dtype=torch.bool, device="cuda")
        plain = fastseq.explain(rnn, x)
        assert (plain.name, "measurement" in plain.reason) == ("torch", True)
        for keywords in ({"reset": reset}, {"recompute": True}, {"return_cells": True}):
            beyond = fastseq.explain(rnn, x, **keywords)
            assert (beyond.name, "PyTorch's own operator cannot" in beyond.reason) == ("triton", True)
        # What the kernels do not do falls back, and says why.
        wide = fastseq.explain(rnn, torch.empty(T, B, I, device="cuda", dtype=torch.double), reset=reset)
        assert (wide.name, wide.others[0][0]) == ("torch", "triton")
        assert "not in float64" in str(wide)
        with fastseq.use("triton"), pytest.raises(fastseq.Unsupported, match="float64"):
            fastseq.explain(rnn, torch.empty(T, B, I, device="cuda", dtype=torch.double))


def test_explain_counts_steps_and_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN fails beyond 65,535 steps, however many rows there are."""
    a_hopper(monkeypatch)
    batch_first, rnn = fastseq.GRU(I, H, batch_first=True), fastseq.GRU(I, H)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(70_000, 2, I, device="cuda")
        assert fastseq.explain(rnn, x).reason.startswith("cuDNN fails beyond 65535 steps; resident: ")
        assert fastseq.explain(batch_first, torch.empty(70_000, I, device="cuda")).name == "triton"
        assert fastseq.explain(batch_first, x).name == "torch"
        data = torch.empty(70_000, I, device="cuda")
    packed = torch.nn.utils.rnn.PackedSequence(data, torch.full((70,), 1000))
    assert fastseq.explain(rnn, packed).name == "torch"
