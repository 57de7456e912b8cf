"""The ways of a recurrent layer that only a CPU takes: in place, and by oneDNN with gates held open or shut."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops import crossover, onednn, training
from fastseq.reference import recurrent as reference

from .support.budget import assert_within_budget
from .support.modules_cases import exact_and_peer, pairwise, report, run, unlike_torch

T, B, I, H = 37, 6, 3, 7  # noqa: E741  (the field's letter); more than one chunk of steps, the last one short
MASKS = ("plain", "reset", "lengths", "reset+lengths")
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
NAMES = ("input", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
Case = dict[str, Any]


@pytest.fixture(autouse=True)
def _poisoned_buffers() -> Iterator[None]:
    """Every buffer starts as NaN, so that a value nobody wrote cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(cell: str, D: int = 1, masks: str = "plain", bias: bool = True, steps: int = T, rows: int = B) -> Case:
    G = reference.CELLS[cell].gates

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.5).double()

    case: Case = dict.fromkeys((*NAMES, "reset", "lengths"))
    case |= {"cell": cell, "input": draw(steps, rows, I), "h0": draw(D, rows, H)}
    case |= {"w_ih": draw(D, G * H, I), "w_hh": draw(D, G * H, H) / 2}  # errors do not grow from step to step
    if bias:
        case |= {"b_ih": draw(D, G * H), "b_hh": draw(D, G * H)}
    if cell == "lstm":
        case["c0"] = 3 * draw(D, rows, H)
    if "reset" in masks:
        case["reset"] = torch.rand(steps, rows) < 0.2
        case["reset"][0, 0] = case["reset"][-1, 0] = case["reset"][1:4, -1] = True
    if "lengths" in masks:
        case["lengths"] = torch.tensor([steps, 0, 1, steps // 3, steps - 1, 2] * rows)[:rows].clamp_max(steps)
    return case


def pairs() -> Iterator[tuple[str, str]]:
    for cell in CELLS:
        for masks in MASKS:
            if (cell != "lstm" or masks != "plain") and (cell != "rnn_relu" or "lengths" not in masks):
                yield cell, masks


every = pytest.mark.parametrize(("cell", "masks"), list(pairs()))


def leaves_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: case[k].to(dtype).requires_grad_() for k in NAMES if case[k] is not None}


def outputs_by(way: str, case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    given: Any = [leaves.get(k) for k in NAMES]
    masks = {"reset": case["reset"], "lengths": case["lengths"]}
    if way == "reference":
        found = reference.layer(case["cell"], *given[:5], None, *given[5:], **masks)
    else:
        which = "onednn" if case["cell"] == "lstm" else "training"
        found = crossover.run(which, case["cell"], [*given[:5], None, *given[5:]], **masks)
    return tuple(t for t in found[:3] if t is not None)


def gradients_by(way: str, case: Case, dtype: torch.dtype, used: tuple[int, ...] = (0, 1, 2)) -> Any:
    leaves = leaves_of(case, dtype)
    outputs = outputs_by(way, case, leaves)
    torch.manual_seed(5)
    cotangents = [torch.randn(o.shape).to(o) for o in outputs]
    chosen = [i for i in used if i < len(outputs)]
    found = torch.autograd.grad(
        [outputs[i] for i in chosen], list(leaves.values()), [cotangents[i] for i in chosen], materialize_grads=True
    )
    return outputs, dict(zip(leaves, found, strict=True))


def assert_agrees(case: Case, used: tuple[int, ...] = (0, 1, 2)) -> None:
    exact = gradients_by("reference", case, torch.float64, used)
    peer = gradients_by("reference", case, torch.float32, used)
    got = gradients_by("ours", case, torch.float32, used)
    for i, (g, e, p) in enumerate(zip(got[0], exact[0], peer[0], strict=True)):
        assert_within_budget(g.detach(), e.detach(), p.detach(), f"output {i}")
    for name in exact[1]:
        # Sums of a few thousand terms in another order: where they cancel, two roundings differ by more than 2.
        assert_within_budget(got[1][name], exact[1][name], peer[1][name], f"gradient of {name}", slack=4.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("D", [1, 2])
@every
def test_a_layer_is_the_reference(cell: str, masks: str, D: int, bias: bool) -> None:
    assert_agrees(make_case(cell, D, masks, bias))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
@pytest.mark.parametrize("D", [1, 2])
def test_in_float64_it_is_the_reference_to_the_last_digits(cell: str, D: int) -> None:
    case = make_case(cell, D, "reset" if cell == "rnn_relu" else "reset+lengths")
    (outputs, grads), (exact, exact_grads) = (gradients_by(way, case, torch.float64) for way in ("ours", "reference"))
    torch.testing.assert_close((outputs, grads), (exact, exact_grads), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("used", [(0,), (1,), (2,)])
@every
def test_a_loss_may_use_one_output(cell: str, masks: str, used: tuple[int, ...]) -> None:
    if used == (2,) and cell != "lstm":
        pytest.skip("it has no c")
    assert_agrees(make_case(cell, 2, masks), used)


@pytest.mark.parametrize("steps", [1, 32, 33, 65])
@every
def test_any_number_of_steps(cell: str, masks: str, steps: int) -> None:
    if steps < 4 and "reset" in masks:
        pytest.skip("no room for the resets")
    assert_agrees(make_case(cell, 2, masks, steps=steps))


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("masks", ["lengths", "reset+lengths"])
def test_rows_may_run_in_groups(rows: int, masks: str) -> None:
    case = make_case("lstm", 2, masks, rows=rows)
    case["lengths"] = torch.randint(0, T + 1, (rows,))
    assert_agrees(case)


def test_groups_cover_every_row_and_spare_steps() -> None:
    needed = torch.randint(1, 129, (64,))
    order, groups, width = onednn._grouped(needed)
    assert sorted(order.tolist()) == list(range(64))
    assert sum(n for _, n in groups) == 64
    for (S, _), rows in zip(groups, needed[order].split(width), strict=True):
        assert int(rows.max()) == S
    assert sum(S * n for S, n in groups) < 0.8 * 64 * int(needed.max())
    assert onednn._grouped(torch.full((64,), 100))[1] == [(100, 64)], "rows of one length stay together"


@pytest.mark.parametrize("D", [1, 2])
@every
def test_second_gradients_are_the_references(cell: str, masks: str, D: int) -> None:
    case, found = make_case(cell, D, masks, steps=9), []
    for way, dtype in (("ours", torch.float32), ("reference", torch.float64)):
        leaves = leaves_of(case, dtype)
        outputs = outputs_by(way, case, leaves)
        first = torch.autograd.grad(sum((o**2).sum() for o in outputs), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), list(leaves.values())))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@every
def test_padding_is_invisible(cell: str, masks: str) -> None:
    """Whatever stands behind a row's end, in the input or the gradient of the output."""
    if "lengths" not in masks:
        pytest.skip("has no padding")
    case = make_case(cell, 2, masks)
    behind = torch.arange(T)[:, None] >= case["lengths"]
    kind = {"rnn_tanh": fastseq.RNN, "gru": fastseq.GRU, "lstm": fastseq.LSTM}[cell]
    torch.manual_seed(0)
    rnn, found = kind(I, H, 2, bidirectional=True), []
    for spoilt in (False, True):
        x = case["input"].float()
        x = (x.masked_fill(behind[..., None], torch.nan) if spoilt else x).requires_grad_()
        y, final = rnn(x, lengths=case["lengths"], reset=case["reset"])
        torch.manual_seed(1)
        dy = torch.randn_like(y)
        dy = dy.masked_fill(behind[..., None], torch.nan) if spoilt else dy
        grads = torch.autograd.grad(y, [x, *rnn.parameters()], dy)
        assert not y[behind].any()
        assert not grads[0][behind].any()
        found.append([y, *([final] if isinstance(final, Tensor) else final), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_closed_gate_keeps_the_cell_to_the_last_bit() -> None:
    case = make_case("lstm")
    case["c0"] = 1e3 * torch.randn(1, B, H, dtype=torch.float64)
    case["lengths"] = torch.tensor([T, 0, 1, 11, T - 1, 2])
    leaves = leaves_of(case, torch.float32)
    _, _, c_n = outputs_by("ours", case, leaves)
    for row, n in enumerate(case["lengths"].tolist()):
        alone = leaves["c0"][:, row] if n == 0 else None
        if n:
            short = case | {"lengths": torch.full((B,), n), "input": case["input"][:n]}
            alone = outputs_by("ours", short, leaves_of(short, torch.float32))[2][:, row]
        torch.testing.assert_close(c_n[:, row], alone, rtol=1e-6, atol=0)
    assert torch.equal(c_n[0, 1], leaves["c0"][0, 1])


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_reset_forgets_even_nan(kind: str) -> None:
    rnn, x = getattr(fastseq, kind)(I, H), torch.randn(T, B, I)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[20] = True
    expected = rnn(x, reset=reset)[0]
    x[:20] = torch.nan
    torch.testing.assert_close(rnn(x, reset=reset)[0][20:], expected[20:])


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_outputs_belong_to_the_caller(kind: str) -> None:
    """Written to in place, as torch.nn's may be, they do not change the gradient."""
    rnn, x, found = getattr(fastseq, kind)(I, H), torch.randn(T, B, I, requires_grad=True), []
    for write in (False, True):
        for keywords in ({}, {"lengths": torch.full((B,), T)})[kind == "LSTM" :]:  # torch.nn's own may not
            y, final = rnn(x, **keywords)
            h = final if isinstance(final, Tensor) else final[0]
            loss = (y * 2).sum() + (h * 2).sum()
            if write:
                y.mul_(2)
                h.mul_(2)
                loss = y.sum() + h.sum()
            found.append(torch.autograd.grad(loss, [x, *rnn.parameters()]))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("retain", [False, True])
def test_a_graph_lives_as_torchs_does(kind: str, retain: bool) -> None:
    rnn, x = getattr(fastseq, kind)(I, H), torch.randn(T, B, I)
    y = rnn(x, lengths=torch.full((B,), T) if kind == "LSTM" else None)[0]
    first = torch.autograd.grad(y.sum(), rnn.weight_hh_l0, retain_graph=retain)[0]
    if retain:
        assert torch.equal(first, torch.autograd.grad(y.sum(), rnn.weight_hh_l0)[0])
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), rnn.weight_hh_l0)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_a_changed_weight_is_noticed(kind: str) -> None:
    rnn = getattr(fastseq, kind)(I, H)
    y = rnn(torch.randn(T, B, I))[0]
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_compiled_it_is_the_same(kind: str) -> None:
    torch._dynamo.reset()
    rnn, x = getattr(fastseq, kind)(I, H), torch.randn(9, B, I)
    lengths = torch.tensor([9, 0, 1, 5, 8, 2])
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths=lengths), rnn(x, lengths=lengths))
    torch.testing.assert_close(compiled(x), rnn(x))


def test_modules_trained_in_place_compute_what_torch_computes() -> None:
    """Every two options meet in some combination."""
    failures, both = [], (False, True)
    for case in pairwise(
        cell=("rnn_tanh", "rnn_relu", "gru"), num_layers=(1, 2), bidirectional=both, bias=both, batch_first=both,
        hx=both, dtype=(torch.float32, torch.float64), T=(33,),
    ):  # fmt: skip
        assert case.in_place
        drawn, ours = case.draw(), case.build(fastseq)
        exact, peer = exact_and_peer(case.build(torch.nn), case, drawn)
        got = run(ours, case, drawn)
        failures += [f"{case}: {f}" for f in unlike_torch(case, got, exact, peer)]
    assert not failures, report(failures)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_dropout_in_place_draws_torchs_numbers(kind: str) -> None:
    x, found = torch.randn(T, B, I), []
    for library in (torch.nn, fastseq):
        torch.manual_seed(0)
        module = getattr(library, kind)(I, H, 3, dropout=0.4)
        torch.manual_seed(1)
        found.append((module(x)[0], torch.rand(1)))
    torch.testing.assert_close(found[1], found[0])


# ------------------------------------------------------------------------------------------------------ the choice


def engine(
    cell: str, rows: int = 4, steps: int = 32, width: int = 16, dtype: torch.dtype = torch.float32, **asked: Any
) -> str:
    G = reference.CELLS[cell].gates
    params = [torch.zeros(G * width, n, dtype=dtype, requires_grad=True) for n in (I, width)]
    input = torch.empty(1, dtype=dtype).expand(steps, rows, I)
    return crossover.engine(cell, input, (), params, rows, steps, **asked)


def test_who_runs_what() -> None:
    assert engine("lstm") == "operator"
    assert engine("lstm", lengths=True) == engine("lstm", reset=True) == "onednn"
    assert engine("lstm", reset=True, dtype=torch.float64) == "loop"
    assert engine("gru") == engine("rnn_tanh") == engine("rnn_relu") == "training"
    assert engine("gru", dtype=torch.bfloat16) == "operator"
    assert engine("gru", dtype=torch.bfloat16, reset=True) == "loop"
    assert engine("rnn_relu", lengths=True) == "loop", "a state that runs on might overflow"
    assert engine("gru", beyond=True) == engine("lstm", reset=True, beyond=True) == "loop"
    with torch.no_grad():
        assert engine("gru") == "operator"
        assert engine("gru", reset=True) == "training"
    with fastseq.use("torch"):
        assert engine("gru") == "operator"
    assert engine("gru", rows=0) == engine("gru", steps=0) == "operator"
    with torch.autograd.forward_ad.dual_level():
        assert engine("gru") == "operator"


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
def test_larger_layers_and_more_threads_never_turn_torch_into_ours(cell: str) -> None:
    sizes = [2**k for k in range(13)]
    for threads in (1, 2, 4, 64):
        for rows in sizes:
            chosen = [crossover.trains(cell, 32, rows, width, threads) for width in sizes]
            assert chosen == sorted(chosen, reverse=True)
            assert not any(
                ours and not crossover.trains(cell, 32, rows, w, 1) for ours, w in zip(chosen, sizes, strict=True)
            )
    assert crossover.trains(cell, 32, 1, 64, 64)
    assert not crossover.trains(cell, 8, 1, 64, 1), "a short call is mostly its own cost"
    assert not crossover.trains("lstm", 32, 1, 64, 1)


def test_exploding_states_behind_an_end_stay_unseen() -> None:
    """tanh and the gates keep a state that runs on bounded, whatever the weights."""
    for kind in (fastseq.GRU, fastseq.RNN):
        rnn = kind(I, H)
        with torch.no_grad():
            for p in rnn.parameters():
                p.mul_(100)
        x = torch.randn(T, B, I, requires_grad=True)
        y, _ = rnn(x, lengths=torch.tensor([T, 1, 2, 3, 4, 5]))
        grads = torch.autograd.grad(y.sum(), [x, *rnn.parameters()])
        assert all(math.isfinite(float(g.sum())) for g in grads)


def test_training_says_what_it_refuses() -> None:
    half, whole = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert training.refusal("gru", False, whole, whole) is None
    assert "float32" in str(training.refusal("gru", False, half))
    assert "float32" in str(training.refusal("gru", False, whole, whole.double()))
    assert "operator of its own" in str(training.refusal("lstm", False, whole))
