"""The cells beyond torch.nn's, and what the loops add to every cell: under the interpreter, or on a GPU."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastseq.kernels.recurrent import pointwise, sequence
from fastseq.kernels.recurrent.plan import Plan
from fastseq.kernels.recurrent.steps import STEPS, STOCK, register

from .support.budget import assert_within_budget
from .support.kernels_recurrent import ON_GPU, Layer, by_kernels, by_reference, layer
from .support.poison import poisoned_buffers

NEW = [cell for cell in STEPS if cell not in STOCK]
T, B = (100, 33) if ON_GPU else (3, 3)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"masked": True},
    {"scaled": True, "D": 2},
    {"stay": "masks", "masked": True},
    {"stay": "mean"},
    {"D": 2, "masked": True, "scaled": True, "stay": "masks"},
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


@pytest.fixture(params=["resident", "stepwise"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both regimes at every size; a program of the first holds up to 64 units of any cell."""

    def planned(cell: str, H: int, *_: Any) -> Plan:
        return Plan(request.param, "the test asks for it", 8, max(16, 1 << (H - 1).bit_length()), 4)

    monkeypatch.setattr(sequence, "plan", planned)
    return request.param


def check(layer: Layer, dtype: torch.dtype) -> None:
    exact, peer = by_reference(layer, torch.float64), by_reference(layer, dtype)
    got = by_kernels(layer)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_within_budget(value, exact[name], peer[name], name)


def cases() -> list[Any]:
    """Every new cell at every size in both types; the options take turns, another turn for each cell."""
    everything = itertools.product(NEW, (7, 33, 64), (torch.float32, torch.bfloat16))
    return [(*case, OPTIONS[(i + i // 6) % 6]) for i, case in enumerate(everything)]


@pytest.mark.parametrize(("cell", "H", "dtype", "options"), cases())
def test_new_cells_within_budget(
    cell: str, H: int, dtype: torch.dtype, options: dict[str, Any], regime: str
) -> None:  # fmt: skip
    check(layer(cell, T, B, H, dtype, **options), dtype)


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[5]])
@pytest.mark.parametrize("cell", STOCK)
def test_dropouts_within_budget(cell: str, options: dict[str, Any], regime: str) -> None:
    check(layer(cell, T, B, 33, torch.float32, **options), torch.float32)


@pytest.mark.parametrize("cell", [cell for cell in NEW if STEPS[cell].params])
def test_gradients_of_parameters_are_summed_over_the_batch(cell: str, regime: str) -> None:
    check(layer(cell, 2, 9, 33, torch.float32, masked=True), torch.float32)  # more than one tile of rows


@pytest.mark.parametrize("cell", [cell for cell in NEW if STEPS[cell].whole])
def test_a_step_over_all_units_has_them_in_one_program(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, num_warps = pointwise.tile(300, whole=True)
    assert (rows, columns, num_warps) == (1, 512, 4)
    monkeypatch.setattr(sequence, "plan", lambda *_: Plan("stepwise", "the test asks for it"))
    check(layer(cell, 2, 2, 300, torch.float32, D=2), torch.float32)


@pytest.mark.parametrize("cell", ["lstm", "layer_norm_gru"])
def test_no_dropout_is_no_dropout(cell: str, regime: str) -> None:
    case = layer(cell, T, B, 7, torch.float32, masked=True)
    plain = by_kernels(case)
    N = 1 + STEPS[cell].cells
    case.scale = torch.ones_like(case.tensors["h0"])
    for stay in (torch.zeros(T, B, 1, N, 7, dtype=torch.bool), torch.zeros(N)):
        case.stay = stay.to(case.scale.device)
        for name, value in by_kernels(case).items():
            torch.testing.assert_close(value, plain[name], atol=2e-6, rtol=2e-6, msg=f"{cell} {name}")


@pytest.mark.parametrize("cell", ["lstm", "layer_norm_gru", "slstm"])
def test_a_state_that_stays_is_the_first_one(cell: str, regime: str) -> None:
    case = layer(cell, T, B, 7, torch.float32)
    case.stay = torch.ones(T, B, 1, 1 + STEPS[cell].cells, 7, dtype=torch.bool, device=case.tensors["h0"].device)
    got = by_kernels(case)
    assert torch.equal(got["y"], case.tensors["h0"].expand(T, -1, -1))
    assert torch.equal(got["h_n"], case.tensors["h0"])
    torch.testing.assert_close(got["h0"][0], case.gradients[0].sum(0) + case.gradients[1][0])
    assert not got["w_hh"].any()
    assert not got["input"].any()


def test_exponential_gates_do_not_overflow(regime: str) -> None:
    """Pre-activations of some hundreds, from no past (n = 0) and past resets."""
    case = layer("slstm", 3, B, 7, torch.float32, masked=True)
    case.tensors["input"] *= 300
    case.tensors["c0"].zero_()
    check(case, torch.float32)
    assert all(value.isfinite().all() for value in by_kernels(case).values())


@pytest.mark.parametrize("cell", [cell for cell in NEW if STEPS[cell].whole])
def test_variance_survives_a_large_mean(cell: str, regime: str) -> None:
    case = layer(cell, T, B, 33, torch.float32)
    case.tensors["b_ih"] += 100
    check(case, torch.float32)


def test_a_step_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.kernels.recurrent.steps.STEPS", dict(STEPS))
    register("leaky", STEPS["rnn_tanh"])
    register("leaky", STEPS["rnn_tanh"])  # once more is no harm
    with pytest.raises(ValueError, match="'lstm'"):
        register("lstm", STEPS["gru"])
