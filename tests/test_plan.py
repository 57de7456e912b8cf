"""Laws of the planner: what it answers for every size, and that it says why not."""

import inspect
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import fastseq
from fastseq.kernels.limits import LIMITS, limits
from fastseq.kernels.recurrent import plan as planning
from fastseq.kernels.recurrent.plan import Plan, Tiles, plan
from fastseq.kernels.recurrent.plans import PLANS
from fastseq.kernels.recurrent.steps import STEPS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plans as search  # noqa: E402  (needs the path above)

TARGETS = ("sm_90", "sm_80")
CELLS = ("lstm", "gru")
DTYPES = (torch.bfloat16, torch.float32)
HIDDEN = (256, 384, 512, 700, 768, 1024)
ROWS = (1, 16, 64)
ALL = list(itertools.product(TARGETS, CELLS, DTYPES, HIDDEN))


def planned(target: str, cell: str, dtype: torch.dtype, H: int, B: int = 16, D: int = 1) -> Plan:
    return plan(cell, H, H, dtype, True, LIMITS[target], B, D)


def programs(how: Plan, H: int, B: int, D: int = 1) -> int:
    return -(-B // how.block_b) * -(-H // how.units) * D


def results(target: str) -> dict[str, Any]:
    return json.loads((search.RESULTS / f"{target}.json").read_text())["rows"]


def row_of(target: str, cell: str, dtype: torch.dtype, H: int, how: Plan) -> dict[str, Any]:
    """What the search found about a plan, at the size of the table that stands for this one."""
    kind = "tf32" if dtype == torch.float32 else "bf16"
    listed = min(size for size in PLANS[LIMITS[target].shared][cell, kind] if size >= H)
    return results(target)[search.name_of(search.Way(cell, kind, listed, how.block_b, how.units, how.num_warps))]


@pytest.mark.parametrize(("target", "cell", "dtype", "H"), ALL)
def test_a_plan_fits_or_says_why(target: str, cell: str, dtype: torch.dtype, H: int) -> None:
    """Every program is on the device at once, fits in its shared memory, spills nothing, multiplies on tensor cores."""
    of = LIMITS[target]
    for B, D in itertools.product(ROWS, (1, 2)):
        how = planned(target, cell, dtype, H, B, D)
        if how.regime != "persistent":
            assert how.regime == "stepwise"
            assert re.search(rf"needs \d+ programs at once .*, this device holds {of.sms}", how.why) or (
                "no split" in how.why and str(of.shared) in how.why
            ), how.why
            continue
        assert programs(how, H, B, D) <= of.sms
        assert how.block_h >= H
        row = row_of(target, cell, dtype, H, how)
        assert "out" not in row
        for way in ("forward", "backward"):
            assert row[way]["shared"] <= of.shared
            assert row[way]["loop_spills"] == 0
            assert row[way]["loop_hgmma"] + row[way]["loop_hmma"] > 0


@pytest.mark.parametrize("H", [256, 384, 512, 700, 768, 1024])
@pytest.mark.parametrize("B", [1, 16])
def test_a_step_is_modelled_within_twice_the_floor(H: int, B: int) -> None:
    how = planned("sm_90", "lstm", torch.bfloat16, H, B)
    assert how.regime == "persistent"
    assert row_of("sm_90", "lstm", torch.bfloat16, H, how)["forward"]["us"] <= 2 * search.floor(H, B)


@pytest.mark.parametrize(("target", "cell", "dtype", "H"), ALL)
def test_rows_choose_among_three_tiles(target: str, cell: str, dtype: torch.dtype, H: int) -> None:
    """Nothing of what is compiled follows from B, but which of at most three widths a tile has."""
    for D in (1, 2):
        answers = {planned(target, cell, dtype, H, B, D)._replace(why="") for B in range(1, 400)}
        persistent = {how for how in answers if how.regime == "persistent"}
        assert len(persistent) == len({how.block_b for how in persistent}) <= 3
    assert "T" not in inspect.signature(plan).parameters


@pytest.mark.parametrize(("target", "cell", "dtype", "H"), ALL)
def test_fewer_rows_fit_where_more_do(target: str, cell: str, dtype: torch.dtype, H: int) -> None:
    for D in (1, 2):
        fits = [planned(target, cell, dtype, H, B, D).regime == "persistent" for B in range(1, 300)]
        assert fits == sorted(fits, reverse=True)
        assert not fits[-1]
    one, two = (planned(target, cell, dtype, H, 16, D).regime for D in (1, 2))
    assert two != "persistent" or one == "persistent"


def test_a_larger_device_fits_what_a_smaller_does() -> None:
    for _, cell, dtype, H in ALL:
        for B in ROWS:
            regimes = [
                plan(cell, H, H, dtype, True, LIMITS["sm_90"]._replace(sms=sms), B, 1).regime
                for sms in range(1, 200, 9)
            ]
            assert regimes == sorted(regimes, key=lambda regime: regime == "persistent")
            assert regimes[0] == "stepwise"


def test_half_of_a_kind_is_cut_alike() -> None:
    for target, cell, H in itertools.product(TARGETS, CELLS, HIDDEN):
        fp16, bf16 = (planned(target, cell, dtype, H) for dtype in (torch.float16, torch.bfloat16))
        assert fp16._replace(why="") == bf16._replace(why="")


def test_small_sizes_stay_in_one_program() -> None:
    for target, cell in itertools.product(TARGETS, STEPS):
        assert planned(target, cell, torch.bfloat16, 64).regime == "resident"
        assert planned(target, cell, torch.bfloat16, 64, B=10_000).regime == "resident"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"P": 128}, "projection"),
        ({"limits": LIMITS["gfx942"]}, "written for CUDA"),
        ({"dtype": torch.float32, "allow_tf32": False}, "leaves the tensor cores idle"),
        ({"cell": "layer_norm_lstm"}, "needs all hidden units at once"),
        ({"H": 5000, "P": 5000}, r"weight is 200000000 bytes, for 132 x 232448 bytes"),
        ({"B": 5000}, r"needs \d+ programs at once \(157 x 32 rows, \d+ x \d+ units, 1 x 1 direction\)"),
        ({"limits": LIMITS["sm_90"]._replace(shared=101_376)}, "for 132 x 101376 bytes"),
        ({"limits": LIMITS["sm_90"]._replace(sms=1)}, r"needs \d+ programs at once .*, this device holds 1$"),
    ],
)
def test_a_refusal_is_a_sentence(asked: dict[str, Any], sentence: str) -> None:
    how = plan(
        **{
            "cell": "lstm", "H": 512, "P": 512, "dtype": torch.bfloat16, "allow_tf32": True,
            "limits": LIMITS["sm_90"], "B": 16, "D": 1,
        } | asked
    )  # fmt: skip
    assert how.regime == "stepwise"
    assert re.search(sentence, how.why), how.why


def test_cells_that_are_not_listed_are_cut_by_their_gates() -> None:
    """A step with fewer gates holds less than what is listed; one with more than any is refused."""
    for cell in ("rnn_tanh", "mgu", "gru"):
        how = planned("sm_90", cell, torch.bfloat16, 512)
        assert how.units == planned("sm_90", "gru", torch.bfloat16, 512).units
    assert (
        planned("sm_90", "peephole_lstm", torch.bfloat16, 512).units
        == planned("sm_90", "lstm", torch.bfloat16, 512).units
    )


def test_programs_that_run_one_after_another_never_wait() -> None:
    """The interpreter would hang in a grid of programs that wait for each other, so its device holds one."""
    if not planning.INTERPRETED:
        pytest.skip("asks the interpreter")
    of = limits(torch.device("cpu"))
    assert of.sms == 1
    for cell, H in itertools.product(STEPS, (64, 256, 512, 1024)):
        assert plan(cell, H, H, torch.bfloat16, True, of, 16, 1).regime != "persistent"


def test_explain_shows_the_regime_and_why() -> None:
    if not planning.INTERPRETED:
        pytest.skip("asks the interpreter")
    with fastseq.use("triton"):
        small, large = (str(fastseq.explain(fastseq.LSTM(4, H), torch.randn(5, 2, 4))) for H in (16, 512))
    assert "; resident: the weight of lstm at hidden size 16" in small
    assert "; stepwise: lstm at hidden size 512" in large


def test_the_table_is_what_the_results_say() -> None:
    """``python benchmarks/plans.py`` wrote both; nobody edited one of them."""
    for target in TARGETS:
        expected = {key: {H: tuple(map(tuple, tiles)) for H, tiles in sizes.items()}
                    for key, sizes in search.chosen(target).items()}  # fmt: skip
        assert PLANS[LIMITS[target].shared] == expected
        for sizes in expected.values():
            for tiles in sizes.values():
                assert len(tiles) <= 3
                assert all(Tiles(*row).shared <= LIMITS[target].shared for row in tiles)


def test_the_search_needs_a_gpu_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert search.measure("lstm", "bf16", 512, 16) == 2
    assert "there is none here" in capsys.readouterr().out
