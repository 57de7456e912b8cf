"""Gradients of every order by every way, and what must never happen to them: zeros for a refusal, NaN from padding."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.ops.recurrent import SAVED
from fastseq.reference.recurrent import CELLS

from .support.gradients import KINDS, MASKS, SHAPES, WAYS, B, H, I, T, build, draw, flat, gradients, loss_of, states_of


def as_function(rnn: Any, way: str, **keywords: Any) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The module as a function of its input, states and weights, and arguments for it."""
    names = [name for name, _ in rnn.named_parameters()]
    states = states_of(rnn)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = tuple(rest[: len(states)])
        weights = dict(zip(names, rest[len(states) :], strict=True))
        call = (x, hx if len(hx) == 2 else hx[0])
        with fastseq.use(way):
            return tuple(flat(torch.func.functional_call(rnn, weights, call, keywords)))

    weights = tuple(p.detach().clone().requires_grad_() for p in rnn.parameters())
    return run, (draw(T, B, I), *states, *weights)


# Deeper networks are layers in a row: with all masks at once, or none.
CASES = [(s, m) for s in SHAPES for m in MASKS if not s.endswith("deep") or m in ("nothing", "both")]


# ------------------------------------------------------------------------------------------- against finite differences


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shape", "masks"), CASES)
def test_gradients_are_finite_differences(shape: str, masks: str, way: str) -> None:
    run, args = as_function(build(shape), way, **MASKS[masks], return_cells=True)
    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


@pytest.mark.parametrize(("shape", "masks"), CASES)
def test_recomputed_gates_give_the_same_gradients(shape: str, masks: str) -> None:
    run, args = as_function(build(shape), "torch", **MASKS[masks], recompute=True)
    assert torch.autograd.gradcheck(run, args, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_gates_give_second_gradients(shape: str) -> None:
    run, args = as_function(build(shape), "torch", **MASKS["both"], recompute=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


@pytest.mark.parametrize("shape", ["rnn", "relu", "lstm", "gru", "lstm-proj"])
def test_every_entry_of_the_jacobian_is_right(shape: str) -> None:
    """Without fast_mode's random projections: slow, so the smallest case that has everything."""
    rnn = build(shape, bidirectional=True)
    run, args = as_function(rnn, "torch", **MASKS["both"], return_cells=True)
    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_gradients_of_a_step_are_finite_differences(kind: str, way: str) -> None:
    cell = getattr(fastseq, kind)(I, H).double()
    reset = torch.tensor([True, False])

    def run(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip((name for name, _ in cell.named_parameters()), weights, strict=True))
        call = (x, (h, h) if kind == "LSTMCell" else h)
        with fastseq.use(way):
            return tuple(flat(torch.func.functional_call(cell, named, call, {"reset": reset})))

    args = draw(B, I), draw(B, H), *cell.parameters()
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SAVED)
def test_the_step_operator_is_torchs_cell(name: str, bias: bool) -> None:
    """What a compiled graph runs under a choice by name; in eager mode only kernels get there."""
    GH, pair = CELLS[name].gates * H, CELLS[name].cells == 1
    weights = draw(GH, I), draw(GH, H), *((draw(GH), draw(GH)) if bias else (None, None))
    args = [draw(B, I), draw(B, H), draw(B, H) if pair else None, *weights]
    given = [t for t in args if t is not None]

    def ours(*_: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.fastseq.cell(name, *args, "gates", "torch")[: 1 + pair]

    got = ours()
    x, h, c = args[:3]
    expected = flat(getattr(torch, f"{name}_cell")(x, (h, c) if pair else h, *weights))
    assert_close(list(got), expected)
    assert_close(torch.autograd.grad(loss_of(got), given), torch.autograd.grad(loss_of(expected), given))
    assert torch.autograd.gradcheck(ours, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, given, fast_mode=True)


@pytest.mark.parametrize("masks", ["nothing", "both"])
@pytest.mark.parametrize("shape", ["rnn", "lstm-proj", "gru-deep"])
def test_third_derivatives_are_the_reference_s(shape: str, masks: str) -> None:
    rnn, x = build(shape), draw(T, B, I)
    states = states_of(rnn)
    hx = states if len(states) == 2 else states[0]
    leaves = [x, *states, *rnn.parameters()]
    found = []
    for way in WAYS:
        with fastseq.use(way):
            value = loss_of(rnn(x, hx, **MASKS[masks], return_cells=True))
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g**3).sum() for g in grads)
        found.append(grads)
    assert max(g.abs().max() for g in found[0]) > 0
    assert_close(*found)


# ------------------------------------------------------------------------------------------- who asks, and how often


@pytest.mark.parametrize("masks", MASKS)
def test_one_tensor_as_both_states_gets_both_gradients(masks: str) -> None:
    rnn, x, h = build("lstm"), draw(T, B, I), draw(1, B, H)
    apart = [h.detach().clone().requires_grad_() for _ in range(2)]
    together = gradients(rnn, x, h, outputs=rnn(x, (h, h), **MASKS[masks], recompute=True))
    dx, dh, dc, *weights = gradients(rnn, x, *apart, outputs=rnn(x, tuple(apart), **MASKS[masks]))
    assert_close(together, (dx, dh + dc, *weights))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_in_eval_is_that_in_training(kind: str, masks: str) -> None:
    rnn, x = getattr(fastseq, kind)(I, H, 2).double(), draw(T, B, I)
    expected = gradients(rnn, x, outputs=rnn(x, **MASKS[masks]))
    rnn.eval()
    rnn.dropout = 0.5
    assert_close(gradients(rnn, x, outputs=rnn(x, **MASKS[masks])), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_serves_again_and_a_freed_one_refuses(kind: str, recompute: bool) -> None:
    rnn, x = getattr(fastseq, kind)(I, H).double(), draw(T, B, I)
    loss, leaves = loss_of(rnn(x, **MASKS["both"], recompute=recompute)), [x, *rnn.parameters()]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), once)
    assert_close(torch.autograd.grad(loss, leaves), once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_weights_changed_before_the_backward_are_noticed() -> None:
    rnn, x = build("lstm"), draw(T, B, I)
    loss = loss_of(rnn(x, **MASKS["reset"]))
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", ["rnn", "lstm-deep", "gru", "lstm-proj"])
def test_only_what_asks_gets_a_gradient(shape: str, masks: str) -> None:
    """Each leaf alone, the others frozen: what it gets when all ask."""
    rnn, x = build(shape), draw(T, B, I)
    states = states_of(rnn)
    hx = states if len(states) == 2 else states[0]
    leaves = [x, *states, *rnn.parameters()]
    expected = gradients(rnn, x, *states, outputs=rnn(x, hx, **MASKS[masks], return_cells=True))
    for index, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        loss_of(rnn(x, hx, **MASKS[masks], return_cells=True)).backward()
        assert [i for i, other in enumerate(leaves) if other.grad is not None] == [index]
        assert_close(leaf.grad, expected[index])
        leaf.grad = None
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(rnn(x, hx, **MASKS[masks])))


def test_each_output_alone_has_its_gradient() -> None:
    rnn, x = build("lstm-deep"), draw(T, B, I)
    for index in range(4):  # y, h_n, c_n, cells
        found = []
        for way in WAYS:
            with fastseq.use(way):
                output = flat(rnn(x, **MASKS["both"], return_cells=True))[index]
            grads = torch.autograd.grad(loss_of(output), [x, *rnn.parameters()], materialize_grads=True)
            found.append(grads)
        assert_close(*found)


def test_checkpointing_gives_the_same_gradients() -> None:
    rnn, x = build("gru"), draw(T, B, I)
    expected = gradients(rnn, x, outputs=rnn(x, **MASKS["both"]))
    outputs = checkpoint(lambda x: rnn(x, **MASKS["both"]), x, use_reentrant=False)
    assert_close(gradients(rnn, x, outputs=outputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_keeps_less(kind: str) -> None:
    rnn, x = getattr(fastseq, kind)(8, 16), torch.randn(20, 4, 8)

    def measure(recompute: bool) -> tuple[int, tuple[Tensor, ...]]:
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            outputs = rnn(x, reset=torch.zeros(20, 4, dtype=torch.bool), recompute=recompute)
        return sum(kept.values()), gradients(rnn, outputs=outputs)

    (most, expected), (less, got) = measure(False), measure(True)
    gates = 20 * 4 * 16 * {"RNN": 0, "LSTM": 4, "GRU": 4}[kind] * 4  # an RNN in place keeps none anyway
    assert most - less >= gates, (most, less)
    assert_close(got, expected)


# ------------------------------------------------------------------------------------------- torch.func, forward mode


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
        return torch.zeros_like(f(x)) if tangent is None else tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).cos().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x).detach())[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).cos().sum())(x),
    "vmap-grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).cos().sum()))(torch.stack([x, 2 * x])),
    "dual": dual,
}


FORWARD_MODE = ("jvp", "jacfwd", "hessian", "dual")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_is_right_or_refused(kind: str, name: str, frozen: bool) -> None:
    """An operator that torch.func cannot look into would return zeros without a word."""
    rnn = getattr(fastseq, kind)(I, H).double().requires_grad_(not frozen)
    x = torch.randn(T, B, I, dtype=torch.double)

    def run(x: Tensor) -> Tensor:
        return rnn(x, **MASKS["reset"])[0]

    with fastseq.use("reference"):
        expected = TRANSFORMS[name](run, x)
    assert expected.abs().max() > 0
    for mode in (contextlib.nullcontext, torch.no_grad):
        if mode is torch.no_grad and name not in ("jvp", "jacfwd", "dual"):
            continue
        with mode():
            got = TRANSFORMS[name](run, x)
            assert_close(got, expected)
            refused = name in FORWARD_MODE
            with (
                fastseq.use("torch"),
                pytest.raises(NotImplementedError, match="reference") if refused else contextlib.nullcontext(),
            ):
                assert_close(TRANSFORMS[name](run, x), expected)
    if name == "vmap" and not frozen:  # the weights, which vmap does not touch, still get their gradient
        assert_close(gradients(rnn, outputs=got), gradients(rnn, outputs=expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_transforms_of_a_step_are_right(kind: str, name: str) -> None:
    cell = getattr(fastseq, kind)(I, H).double()
    x, h = torch.randn(B, I, dtype=torch.double), torch.randn(B, H, dtype=torch.double)
    hx = (h, h) if kind == "LSTMCell" else h

    def run(x: Tensor) -> Tensor:
        return flat(cell(x, hx, reset=torch.tensor([True, False])))[0]

    with fastseq.use("reference"):
        expected = TRANSFORMS[name](run, x)
    assert expected.abs().max() > 0
    assert_close(TRANSFORMS[name](run, x), expected)


# ------------------------------------------------------------------------------------------- laws of sequences


LONG = 70_000  # cuDNN stops at 65,535 steps


@pytest.mark.parametrize("keywords", [{}, {"recompute": True}], ids=["stock", "general"])
def test_a_very_long_sequence_is_its_pieces(keywords: dict[str, Any]) -> None:
    rnn = fastseq.LSTM(1, 2)
    x, weight = torch.randn(LONG, 1, 1), torch.randn(LONG, 1, 2)

    def run(*pieces: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs, state = [], None
        for piece in pieces:
            y, state = rnn(piece, state, **keywords)
            outputs.append(y)
        whole = torch.cat(outputs)
        return whole, torch.autograd.grad((whole * weight).sum() / LONG**0.5, list(rnn.parameters()))

    (y, grads), (pieces, expected) = run(x), run(*x.split(23_456))
    assert_close(y, pieces)
    assert_close(grads, expected, rtol=1e-4, atol=1e-4)


def segments(starts: Sequence[bool]) -> list[slice]:
    edges = [0, *(t for t, start in enumerate(starts) if start and t), len(starts)]
    return [slice(a, b) for a, b in pairwise(edges)]


@pytest.mark.parametrize("shape", ["rnn", "lstm", "gru", "lstm-proj"])
def test_resets_make_separate_sequences(shape: str) -> None:
    """By torch.nn alone: each row and segment on its own, from a state of zeros."""
    kind, settings = SHAPES[shape]
    rnn, stock_rnn, x = build(shape), getattr(torch.nn, kind)(I, H, **settings).double(), draw(7, B, I)
    stock_rnn.load_state_dict(rnn.state_dict())
    reset = torch.rand(7, B) < 0.4
    y = rnn(x, reset=reset)[0]
    rows = [torch.cat([stock_rnn(x[part, b])[0] for part in segments(reset[:, b].tolist())]) for b in range(B)]
    expected = torch.stack(rows, dim=1)
    assert_close(y, expected)
    assert_close(gradients(rnn, x, outputs=y), gradients(stock_rnn, x, outputs=expected))


@pytest.mark.parametrize("shape", ["rnn", "lstm", "gru", "lstm-proj"])
def test_the_state_carries_over(shape: str) -> None:
    rnn, x = build(shape, num_layers=2), draw(9, B, I)
    reset = torch.rand(9, B) < 0.3
    whole = rnn(x, reset=reset)
    first, state = rnn(x[:4], reset=reset[:4])
    second, state = rnn(x[4:], state, reset=reset[4:])
    parts = torch.cat([first, second]), state
    assert_close(flat(parts), flat(whole))
    assert_close(gradients(rnn, x, outputs=parts), gradients(rnn, x, outputs=whole))


@pytest.mark.parametrize("shape", ["relu", "lstm-deep", "gru-deep", "lstm-proj-deep"])
def test_the_order_of_the_batch_does_not_matter(shape: str) -> None:
    rnn, x, order = build(shape), draw(5, 4, I), torch.tensor([2, 0, 3, 1])
    keywords = {"reset": torch.rand(5, 4) < 0.3, "lengths": torch.tensor([5, 0, 3, 1])}
    y, state = rnn(x, **keywords)
    permuted = {"reset": keywords["reset"][:, order], "lengths": keywords["lengths"][order]}
    y_permuted, state_permuted = rnn(x[:, order], **permuted)
    assert_close(y_permuted, y[:, order])
    assert_close(flat(state_permuted), [s[:, order] for s in flat(state)])
    assert_close(gradients(rnn, x, outputs=(y_permuted, state_permuted)), gradients(rnn, x, outputs=(y, state)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", ["rnn-deep", "relu", "lstm-deep", "gru-deep", "lstm-proj-deep"])
def test_what_stands_behind_the_end_is_never_seen(shape: str, recompute: bool, way: str) -> None:
    """NaN in the input, and NaN in the gradient of the output, behind each row's end."""
    rnn, x, lengths = build(shape), draw(5, 4, I), torch.tensor([5, 0, 3, 1])
    behind = (torch.arange(5)[:, None] >= lengths)[..., None]
    poisoned = x.detach().masked_fill(behind, torch.nan).requires_grad_()
    found = []
    for given, noise in ((x, 0.0), (poisoned, torch.nan)):
        with fastseq.use(way):
            y, *final, cells = flat(rnn(given, lengths=lengths, return_cells=True, recompute=recompute))
        assert not y.masked_select(behind).any()
        assert not cells.masked_select(behind).any()
        cotangents = [t.detach().cos().masked_fill(behind, noise) for t in (y, cells)]
        cotangents += [t.detach().cos() for t in final]
        found.append(torch.autograd.grad([y, cells, *final], [given, *rnn.parameters()], cotangents))
    assert_close(*found)
    assert not found[1][0].masked_select(behind).any()


@pytest.mark.parametrize("way", WAYS)
def test_each_example_of_a_vmap_has_its_own_masks(way: str) -> None:
    rnn, x = build("gru"), torch.randn(4, T, B, I, dtype=torch.double)
    reset, lengths = torch.rand(4, T, B) < 0.3, torch.randint(0, T + 1, (4, B))
    with fastseq.use(way):
        got = torch.vmap(lambda x, r, n: rnn(x, reset=r, lengths=n))(x, reset, lengths)
        expected = [rnn(x[i], reset=reset[i], lengths=lengths[i]) for i in range(4)]
    assert_close(got[0], torch.stack([y for y, _ in expected]))
    assert_close(got[1], torch.stack([h for _, h in expected]))


def test_a_reset_forgets_nan() -> None:
    rnn, x = build("lstm"), torch.randn(4, B, I, dtype=torch.double)
    x[1] = torch.nan
    y = rnn(x, reset=torch.tensor([False, False, True, False])[:, None].expand(4, B))[0]
    assert y[1].isnan().all()
    assert_close(y[2:], rnn(x[2:])[0])
