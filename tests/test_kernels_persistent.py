"""The persistent kernels on a GPU: what programs that really run at once add to ``test_persistent``."""

import pytest
import torch

pytest.importorskip("triton")

from fastseq.kernels.limits import limits
from fastseq.kernels.recurrent.plan import plan
from fastseq.kernels.recurrent.steps import STEPS

from .support.budget import assert_within_budget
from .support.kernels_recurrent import ALLOW_TF32, DEVICE, Layer, by_kernels, by_reference, layer

pytestmark = pytest.mark.gpu
CELLS = [name for name, step in STEPS.items() if not step.whole]
HIDDEN = (200, 256, 500, 768, 1024)


def persistent(cell: str, T: int, B: int, H: int, dtype: torch.dtype, D: int = 1, masked: bool = False) -> Layer:
    how = plan(cell, H, H, dtype, ALLOW_TF32, limits(DEVICE), B, D)
    if how.regime != "persistent":
        pytest.skip(how.why)
    return layer(cell, T, B, H, dtype, D=D, masked=masked)


@pytest.mark.parametrize(("D", "masked", "B"), [(1, False, 16), (2, True, 5), (1, True, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_a_grid_within_budget(cell: str, H: int, dtype: torch.dtype, D: int, masked: bool, B: int) -> None:
    what = persistent(cell, 40, B, H, dtype, D, masked)
    exact, peer, got = by_reference(what, torch.float64), by_reference(what, dtype), by_kernels(what)
    for name, value in got.items():
        assert_within_budget(value, exact[name], peer[name], name)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_thousand_runs_are_the_same_to_the_bit(cell: str) -> None:
    what = persistent(cell, 64, 16, 512, torch.bfloat16)
    first = by_kernels(what)
    for _ in range(1000):
        again = by_kernels(what)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_grid_runs_beside_others() -> None:
    """It has to wait until all of its programs have a place, and none of them may wait for one that has not."""
    what = persistent("lstm", 256, 16, 1024, torch.bfloat16)
    alone = by_kernels(what)
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    aside = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(aside):
            for _ in range(20):
                a @ a
        beside = by_kernels(what)
        assert all(torch.equal(beside[name], value) for name, value in alone.items())
    torch.cuda.synchronize()
