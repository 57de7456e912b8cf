"""The laws of the recurrent loop in plain PyTorch, held against fp64 autograd of the reference."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops import loop
from fastseq.reference import recurrent as reference

from .support.budget import assert_within_budget

T, B, H, P = 37, 5, 7, 3  # more than one chunk of steps, the last one short
HALF = (torch.bfloat16, torch.float16)
MASKS = ("plain", "reset", "lengths", "reset+lengths")
SHAPES = [(cell, D, False) for cell in loop.STEPS for D in (1, 2)] + [("lstm", 1, True), ("lstm", 2, True)]
INPUTS = ("x", "w_hh", "b_hh", "w_hr", "h0", "c0")
OUTPUTS = ("y", "h_n", "c_n", "cells")
Case = dict[str, Any]


@pytest.fixture(autouse=True)
def _poisoned_buffers() -> Iterator[None]:
    """Every buffer starts as NaN, so that a value nobody wrote cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(cell: str, D: int = 1, project: bool = False, masks: str = "plain", steps: int = T) -> Case:
    """Inputs in fp64 whose values fp16 and bf16 hold exactly: only the computation differs between dtypes."""
    G, width = loop.STEPS[cell].gates, P if project else H

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.randn(shape) * scale).bfloat16()).half().double()

    case: Case = dict.fromkeys((*INPUTS, "reset", "lengths"))
    case |= {"cell": cell, "x": draw(steps, B, D, G * H), "w_hh": draw(D, G * H, width, scale=width**-0.5)}
    case["h0"] = draw(D, B, width)
    if cell == "gru":
        case["b_hh"] = draw(D, G * H)
    if cell == "lstm":
        case["c0"] = draw(D, B, H)
    if project:
        case["w_hr"] = draw(D, P, H, scale=H**-0.5)
    if "reset" in masks:
        case["reset"] = torch.rand(steps, B) < 0.2
        case["reset"][0, 0] = case["reset"][-1, 0] = True
    if "lengths" in masks:
        case["lengths"] = torch.tensor([steps, 0, 1, 11, steps - 1])[:B]
    return case


def draw_cotangents(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn(t.shape).bfloat16().half().double() for name, t in outputs.items()}


def by_reference(case: Case, cotangents: dict[str, Tensor] | None, dtype: torch.dtype) -> Any:
    """Outputs and, for cotangents, the gradients of all inputs, by autograd of the reference."""
    leaves = {k: case[k].to(dtype).requires_grad_() for k in INPUTS if case[k] is not None}
    get = leaves.get
    D = len(case["w_hh"])
    # Input gates are given: an identity for the input weight of each direction.
    per_direction = [
        reference._direction(
            reference.CELLS[case["cell"]],
            leaves["x"][:, :, d],
            leaves["w_hh"][d],
            None if get("b_hh") is None else leaves["b_hh"][d],
            None if get("w_hr") is None else leaves["w_hr"][d],
            tuple(leaves[s][d] for s in ("h0", "c0") if get(s) is not None),
            case["reset"],
            None if case["lengths"] is None else torch.arange(len(leaves["x"]))[:, None] < case["lengths"],
            backwards=d == 1,
        )
        for d in range(D)
    ]
    every, final = zip(*per_direction, strict=True)
    y, h_n = torch.stack([s[0] for s in every], dim=2), torch.stack([s[0] for s in final])
    outputs = {"y": y, "h_n": h_n}
    if case["c0"] is not None:
        outputs["c_n"] = torch.stack([s[1] for s in final])
        outputs["cells"] = torch.stack([s[1] for s in every], dim=2)
    if cotangents is None:
        return outputs
    loss = [cotangents[k].to(dtype) for k in outputs]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), loss)
    return outputs, dict(zip(leaves, grads, strict=True))


def states_read(case: Case, all_after: Tensor, initial: Tensor) -> Tensor:
    """The state ``[T, B, D, N]`` that each step reads."""
    before = torch.empty_like(all_after)
    steps, rows, D, _ = all_after.shape
    for d in range(D):
        for b in range(rows):
            state = initial[d, b]
            ends = steps if case["lengths"] is None else int(case["lengths"][b])
            for t in reversed(range(steps)) if d else range(steps):
                reset = case["reset"] is not None and case["reset"][t, b] and t < ends
                before[t, b, d] = 0 if reset else state
                state = all_after[t, b, d] if t < ends else state
    return before


def run_forward(case: Case, dtype: torch.dtype, save: bool = True) -> tuple[Any, ...]:
    given = (case[k] if case[k] is None else case[k].to(dtype) for k in INPUTS)
    with torch.no_grad():
        return loop.sequence_forward(case["cell"], *given, case["reset"], case["lengths"], save=save, allow_tf32=False)


def run_backward(
    case: Case, forward: tuple[Any, ...], cotangents: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, ...]:
    y, _, _, cells, gates = forward
    c_prev = None if cells is None else states_read(case, cells, case["c0"].to(cells.dtype))
    h_prev = states_read(case, y, case["h0"].to(dtype))
    dy, dh_n, dc_n, dcells = (cotangents[k].to(dtype) if k in cotangents else None for k in OUTPUTS)
    if dcells is not None:
        dcells = dcells.to(cells.dtype)
    w_hh, w_hr = (None if case[k] is None else case[k].to(dtype) for k in ("w_hh", "w_hr"))
    masks = case["reset"], case["lengths"]
    with torch.no_grad():
        found = loop.sequence_backward(
            case["cell"],
            dy,
            dh_n,
            dc_n,
            dcells,
            gates,
            cells,
            h_prev,
            c_prev,
            w_hh,
            w_hr,
            *masks,
            allow_tf32=False,
        )
    return (*found, h_prev)


def by_loop(case: Case, cotangents: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, Any]:
    """The same through the two functions under test, with the weight gradients that their caller adds."""
    forward = run_forward(case, dtype)
    outputs = {k: t for k, t in zip(OUTPUTS, forward, strict=False) if t is not None}
    dx, dh, dproj, dh0, dc0, h_prev = run_backward(case, forward, cotangents, dtype)
    assert (dx is dh) == (case["cell"] != "gru")

    def product(d: Tensor, value: Tensor) -> Tensor:
        return torch.einsum("tbdm,tbdn->dmn", d.double(), value.double()).to(dtype)

    grads = {"x": dx, "w_hh": product(dh, h_prev), "h0": dh0, "c0": dc0}
    grads["b_hh"] = dh.double().sum((0, 1)).to(dtype) if case["b_hh"] is not None else None
    if case["w_hr"] is not None:
        hidden = forward[4][:, :, :, 3].double() * forward[3].double().tanh()
        grads["w_hr"] = product(dproj, hidden.masked_fill(is_padding(case)[..., None, None], 0))
    return outputs, {k: g for k, g in grads.items() if g is not None}


def is_padding(case: Case) -> Tensor:
    steps, rows = case["x"].shape[:2]
    if case["lengths"] is None:
        return torch.zeros(steps, rows, dtype=torch.bool)
    return torch.arange(steps)[:, None] >= case["lengths"]


def assert_agrees(case: Case, dtype: torch.dtype) -> None:
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    exact_outputs, exact_grads = by_reference(case, cotangents, torch.float64)
    outputs, grads = by_loop(case, cotangents, dtype)
    peer_outputs, peer_grads = by_reference(case, cotangents, dtype)
    assert outputs.keys() == exact_outputs.keys()
    assert grads.keys() == exact_grads.keys()
    for got, exact, peer in ((outputs, exact_outputs, peer_outputs), (grads, exact_grads, peer_grads)):
        for name in exact:
            if dtype == torch.float64:
                torch.testing.assert_close(got[name], exact[name], rtol=1e-12, atol=1e-12)
            else:
                value = got[name].to(dtype) if name == "cells" else got[name]  # those stay in fp32
                assert_within_budget(value, exact[name].detach(), peer[name].detach(), name)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("cell", "D", "project"), SHAPES)
def test_loop_is_the_reference(cell: str, D: int, project: bool, masks: str) -> None:
    assert_agrees(make_case(cell, D, project, masks), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("masks", ["plain", "reset+lengths"])
@pytest.mark.parametrize(("cell", "D", "project"), SHAPES)
def test_error_is_within_twice_torchs(cell: str, D: int, project: bool, masks: str, dtype: torch.dtype) -> None:
    assert_agrees(make_case(cell, D, project, masks), dtype)


@pytest.mark.parametrize("cell", loop.STEPS)
@pytest.mark.parametrize("steps", [1, 31, 32, 33])
def test_any_number_of_steps(cell: str, steps: int) -> None:
    assert_agrees(make_case(cell, 2, steps=steps), torch.float64)


@pytest.mark.parametrize("cell", loop.STEPS)
def test_empty_batch(cell: str) -> None:
    case = make_case(cell, 2, masks="reset+lengths")
    case |= {k: case[k][:, :0] for k in ("x", "h0", "c0", "reset") if case[k] is not None}
    case["lengths"] = case["lengths"][:0]
    assert_agrees(case, torch.float64)


@pytest.mark.parametrize("masks", ["plain", "lengths"])
@pytest.mark.parametrize("cell", loop.STEPS)
def test_no_steps_leave_the_state(cell: str, masks: str) -> None:
    case = make_case(cell, 2, steps=1)
    case |= {"x": case["x"][:0]}
    if masks == "lengths":
        case["lengths"] = torch.zeros(B, dtype=torch.int64)
    y, h_n, c_n, cells, gates = run_forward(case, torch.float64)
    assert torch.equal(h_n, case["h0"])
    assert c_n is None or torch.equal(c_n, case["c0"])
    cotangents = {"y": y, "h_n": torch.randn_like(h_n)}
    if c_n is not None:
        cotangents["c_n"] = torch.randn_like(c_n)
    *_, dh0, dc0, _ = run_backward(case, (y, h_n, c_n, cells, gates), cotangents, torch.float64)
    assert torch.equal(dh0, cotangents["h_n"])
    assert c_n is None or torch.equal(dc0, cotangents["c_n"])


@pytest.mark.parametrize("cell", loop.STEPS)
def test_gradient_of_cells_may_be_absent(cell: str) -> None:
    case = make_case(cell, 2, masks="reset+lengths")
    forward = run_forward(case, torch.float64)
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    zeros = cotangents | {"cells": torch.zeros_like(cotangents["cells"])} if cell == "lstm" else cotangents
    given = {k: v for k, v in cotangents.items() if k != "cells"}
    without = run_backward(case, forward, given, torch.float64)
    for got, expected in zip(without, run_backward(case, forward, zeros, torch.float64), strict=True):
        assert got is expected is None or torch.equal(got, expected)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("cell", loop.STEPS)
def test_chunks_cannot_be_seen(cell: str, masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(cell, 2, masks=masks)
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    expected = by_loop(case, cotangents, torch.float64)
    for steps in (1, 2, 8, T):
        monkeypatch.setattr(loop, "_CHUNK_STEPS", steps)
        for got, wanted in zip(by_loop(case, cotangents, torch.float64), expected, strict=True):
            for name in wanted:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cell", loop.STEPS)
def test_every_step_may_apply_its_masks(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where Python must not look at a mask."""
    case = make_case(cell, 2, masks="reset+lengths")
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    expected = by_loop(case, cotangents, torch.float64)
    monkeypatch.setattr(loop, "_present", lambda mask: [True] * len(mask))
    for got, wanted in zip(by_loop(case, cotangents, torch.float64), expected, strict=True):
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", loop.STEPS)
def test_padding_is_invisible(cell: str, dtype: torch.dtype) -> None:
    case = make_case(cell, 2, masks="lengths")
    padding = is_padding(case)
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    expected, grads = by_loop(case, cotangents, dtype)
    spoilt = case | {"x": case["x"].masked_fill(padding[..., None, None], torch.nan)}
    cotangents["y"] = cotangents["y"].masked_fill(padding[..., None, None], torch.nan)
    got, got_grads = by_loop(spoilt, cotangents, dtype)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(torch.equal(got_grads[name], grads[name]) for name in grads)
    assert not got["y"][padding].any()
    assert not got_grads["x"][padding].any()


def test_projected_gradient_ends_with_the_row() -> None:
    case = make_case("lstm", 2, project=True, masks="lengths")
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    dproj = run_backward(case, run_forward(case, torch.float64), cotangents, torch.float64)[2]
    assert not dproj[is_padding(case)].any()


@pytest.mark.parametrize("cell", loop.STEPS)
def test_reset_forgets_even_nan(cell: str) -> None:
    case = make_case(cell)
    case["reset"] = torch.zeros(T, B, dtype=torch.bool)
    case["reset"][20] = True
    expected = run_forward(case, torch.float32)[0]
    case["x"][:20] = torch.nan
    assert torch.equal(run_forward(case, torch.float32)[0][20:], expected[20:])


@pytest.mark.parametrize(("cell", "D", "project"), [shape for shape in SHAPES if shape[1] == 1])
def test_state_carries_over(cell: str, D: int, project: bool) -> None:
    case = make_case(cell, D, project)
    whole = run_forward(case, torch.float64)
    first = run_forward(case | {"x": case["x"][:20]}, torch.float64)
    second = run_forward(case | {"x": case["x"][20:], "h0": first[1], "c0": first[2]}, torch.float64)
    torch.testing.assert_close(torch.cat((first[0], second[0])), whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second[1:3], whole[1:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("cell", loop.STEPS)
def test_gates_can_be_recomputed(cell: str, dtype: torch.dtype) -> None:
    case = make_case(cell, 2, masks="reset")
    y, _, _, _, gates = run_forward(case, dtype)
    x, w_hh, b_hh, _, h0, _ = (None if case[k] is None else case[k].to(dtype) for k in INPUTS)
    h = torch.einsum("tbdp,dgp->tbdg", states_read(case, y, h0), w_hh)
    h = h if b_hh is None else h + b_hh
    again = loop.step_gates(cell, x.flatten(0, 2), h.flatten(0, 2), None)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(again.view_as(gates), gates, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("cell", loop.STEPS)
def test_saving_changes_nothing(cell: str, dtype: torch.dtype) -> None:
    case = make_case(cell, 2, masks="reset+lengths")
    saved, unsaved = run_forward(case, dtype), run_forward(case, dtype, save=False)
    assert unsaved[4] is None
    assert saved[4].dtype == dtype
    for a, b in zip(saved[:4], unsaved[:4], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert {saved[0].dtype, saved[1].dtype} == {dtype}
    assert saved[3] is None or saved[3].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("cell", loop.STEPS)
def test_nothing_given_is_written(cell: str) -> None:
    case = make_case(cell, 2, masks="reset+lengths")
    forward = run_forward(case, torch.float64)
    cotangents = draw_cotangents(by_reference(case, None, torch.float64))
    given = [t for t in (*case.values(), *cotangents.values(), *forward) if isinstance(t, Tensor)]
    copies = [t.clone() for t in given]
    run_forward(case, torch.float64)
    run_backward(case, forward, cotangents, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True) if not a.isnan().any())
    results = [t for t in (*run_forward(case, torch.float64), *forward) if t is not None]
    storages = [t.untyped_storage().data_ptr() for t in (*results, *case.values()) if isinstance(t, Tensor)]
    assert len(set(storages)) == len(storages)
