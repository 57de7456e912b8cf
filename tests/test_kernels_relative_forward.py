"""Laws of the attention kernels' forward and weights where scores know of distances, positions, segments and ranks.

Under the interpreter, or on a GPU with the same tests.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastseq.kernels.attention import decode, forward
from fastseq.kernels.attention.plan import DTYPES, Tiles, unsupported
from fastseq.reference import attention as reference

from .support.budget import assert_within_budget
from .support.poison import poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 products are exact under the interpreter whatever it is told.
ALLOW_TF32 = DEVICE.type == "cpu"
SEED = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
NAN = float("nan")
NAMES = (
    "query", "key", "value", "bias", "distance", "position_query", "position_key", "segment",
    "mask", "cu_q", "cu_k", "seed", "segment_q", "segment_k", "rank_q", "rank_k",
)  # fmt: skip
PLAIN = {
    "scale": 0.3, "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0, "weights": "",
    "distance_zero": 0, "position_zero": 0,
}  # fmt: skip
TERMS = ("distance", "position", "segment", "rank")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def numbers(*shape: int, least: int, most: int) -> Tensor:
    return torch.randint(least, most, shape, dtype=torch.int32, device=DEVICE)


def problem(
    terms: tuple[str, ...],
    lengths: tuple[int, int] = (33, 47),
    widths: tuple[int, int, int] = (8, 8, 8),
    heads: tuple[int, int, int] = (1, 1, 1),
    dtype: torch.dtype = torch.float32,
    table: int = 0,
    B: int = 1,
    shared: bool = False,
) -> dict[str, Tensor]:
    """What a call with these terms takes; tables of so many entries, by default all that there are.

    ``shared``: tables and ranks are the same for the batch and, where they may be, for the heads.
    """
    (Q, K), (D, E, P), (N, M, R) = lengths, widths, heads
    L = table or max(1, Q + K - 1)
    b, n = (1, 1) if shared else (B, N)
    x = {"query": draw(B, N, Q, D, dtype=dtype), "seed": SEED}
    x |= {"key": draw(B, M, K, D, dtype=dtype), "value": draw(B, M, K, E, dtype=dtype)}
    if "distance" in terms:
        x["distance"] = draw(b, n, L, dtype=dtype)
    if "position" in terms:
        x |= {"position_query": draw(B, N, Q, P, dtype=dtype), "position_key": draw(b, R, L, P, dtype=dtype)}
    if "segment" in terms:
        x["segment"] = draw(B, N, Q, 2, dtype=dtype)
        x |= {"segment_q": numbers(B, Q, least=0, most=2), "segment_k": numbers(B, K, least=0, most=2)}
    if "rank" in terms:
        x |= {"rank_q": numbers(b, n, Q, least=-1, most=K + 1), "rank_k": numbers(b, K, least=0, most=K + 1)}
    return x


def centre(x: dict[str, Tensor], at: float = 0.5) -> dict[str, int]:
    """Where relative position 0 is in the tables: so far along them."""
    lengths = {"distance_zero": x.get("distance"), "position_zero": None}
    if "position_key" in x:
        lengths["position_zero"] = x["position_key"][0, 0, :, 0]
    return {name: int(at * t.shape[-1]) for name, t in lengths.items() if t is not None}


def by_kernels(x: dict[str, Tensor], **options: Any) -> Any:
    lengths = {"max_q": x["query"].shape[2], "max_k": x["key"].shape[2]}
    options = PLAIN | lengths | {"allow_tf32": ALLOW_TF32} | options
    return forward.attention_forward(*(x.get(name) for name in NAMES), **options)


def by_formula(x: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> Any:
    x = {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}
    return reference.attention(*(x.get(name) for name in NAMES), **PLAIN | options)


def check(x: dict[str, Tensor], **options: Any) -> Any:
    """Every output within the budget; the -inf of a log-sum-exp where it belongs, NaN nowhere."""
    options = centre(x) | options
    got = by_kernels(x, **options)
    options.pop("max_q", None)
    exact, peer = (by_formula(x, dtype, **options) for dtype in (torch.float64, x["query"].dtype))
    for name, *three in zip(("output", "lse", "weights"), got, exact, peer, strict=True):
        if three[0] is None:
            assert three[1] is None
            continue
        infinite = three[1].isinf()
        assert torch.equal(three[0].isinf(), infinite), name
        assert_within_budget(*(t.masked_fill(infinite, 0.0) for t in three), name)
    return got


LENGTHS = [(1, 1), (7, 7), (31, 31), (33, 33), (65, 65), (127, 127), (1, 65), (65, 1), (33, 127), (127, 31)]


@pytest.mark.parametrize(("lengths", "dtype"), list(zip(LENGTHS, itertools.cycle(DTYPES), strict=False)))
def test_every_length(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    check(problem(TERMS, lengths, dtype=dtype))
    if lengths[0] in (7, 65):
        check(problem(("position",), lengths, dtype=dtype), right=0, lower_right=True)


@pytest.mark.parametrize("lengths", [(0, 17), (17, 0), (0, 0)])
def test_nothing_to_attend(lengths: tuple[int, int]) -> None:
    check(problem(TERMS, lengths, B=2), weights="each")


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("shared", [False, True])
def test_each_alone(term: str, shared: bool) -> None:
    check(problem((term,), (9, 20), heads=(2, 2, 2), B=2, shared=shared), weights="each")


FEATURES: list[dict[str, Any]] = [
    {"right": 0, "lower_right": True, "softcap": 2.0, "weights": "mean"},
    {"left": 9, "right": 5, "dropout_p": 0.3, "weights": "each", "heads": (4, 2, 1)},
    {"bias": True, "mask": "B11K", "heads": (4, 1, 2), "scale": -0.2},
    {"mask": "BNQK", "bias": True, "softcap": 1.5, "dropout_p": 0.2, "right": 20, "weights": "each"},
    {"widths": (40, 16, 24), "left": 30, "scale": 0.0},
    {"widths": (16, 80, 96), "mask": "11Q1", "shared": True, "weights": "mean"},
]


@pytest.mark.parametrize(("features", "dtype"), list(zip(FEATURES, itertools.cycle(DTYPES), strict=False)))
def test_all_with_everything_else(features: dict[str, Any], dtype: torch.dtype) -> None:
    options = dict(features)
    of_problem = {name: options.pop(name) for name in ("heads", "widths", "shared") if name in options}
    x = problem(TERMS, (20, 40), dtype=dtype, B=2, **of_problem)
    size = {"B": 2, "N": x["query"].shape[1], "Q": 20, "K": 40, "1": 1}
    if options.pop("bias", False):
        x["bias"] = draw(2, 1, 20, 40, dtype=dtype)
    if letters := options.pop("mask", ""):
        x["mask"] = torch.rand([size[letter] for letter in letters], device=DEVICE) < 0.6
    check(x, **options)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("table", [1, 2, 30])
def test_beyond_its_ends_a_table_goes_on(table: int, at: float) -> None:
    """Also where relative position 0 itself is beyond them."""
    check(problem(("distance", "position"), (33, 100), table=table))
    x = problem(("distance", "position"), (17, 33), table=table)
    check(x, **centre(x, at))
    if table == 2:
        check(x, distance_zero=-50, position_zero=60)


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 4, 1), Tiles(64, 64, 4, 1)])
def test_tiles_do_not_matter(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward_tiles", "weights_tiles", "position_tiles", "position_weights_tiles"):
        monkeypatch.setattr(forward, name, lambda *_: tiles)
    lengths = 3 * tiles.block_m // 2, 5 * tiles.block_m // 2
    check(problem(TERMS, lengths), left=2 * tiles.block_m, weights="each")
    check(problem(("distance", "position"), lengths))
    check(problem(("distance",), lengths, table=3), right=0, lower_right=True)  # and most tiles lie past its ends


@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_a_position_is_part_of_the_product(scale: float) -> None:
    """Of one relative position, the same for all, it is as wide a query and key more."""
    x = problem(("position",), (17, 33), table=1)
    got, _, _ = by_kernels(x, scale=scale, softcap=2.0)
    wide = {
        "query": torch.cat([x["query"], x["position_query"]], -1),
        "key": torch.cat([x["key"], x["position_key"].expand(-1, -1, 33, -1)], -1),
    }
    joined, _, _ = by_kernels({"value": x["value"], **wide}, scale=scale, softcap=2.0)
    torch.testing.assert_close(got, joined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_have_their_own_positions(dtype: torch.dtype) -> None:
    lengths = [5, 0, 40, 1], [9, 3, 33, 0]
    ends = [torch.tensor([0, *n]).cumsum(0).int().to(DEVICE) for n in lengths]
    spare = 3  # tokens that belong to no sequence
    sizes = sum(lengths[0]) + spare, sum(lengths[1]) + spare
    x = problem(("distance", "position"), sizes, heads=(2, 1, 1), dtype=dtype, table=60)
    for name in ("query", "key", "value", "position_query"):
        x[name][:, :, -spare:] = NAN
    x |= {"cu_q": ends[0], "cu_k": ends[1]}
    out, lse, _ = check(x, max_q=40, right=2, left=20, lower_right=True, softcap=5.0)
    assert not out[:, :, -spare:].any()
    assert (lse[:, :, -spare:] == -torch.inf).all()


@pytest.mark.parametrize("terms", [("distance",), ("segment", "rank"), ("distance", "segment", "rank")])
def test_few_queries_of_many_keys_are_split(terms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LEAST", 40)
    for Q, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        x = problem(terms, (Q, 90), heads=(4, 2, 1), dtype=dtype, table=80)
        assert decode.splits(1, 2, Q, 4, 90, -1, -1, False, DEVICE) > 1
        check(x, dropout_p=0.2, right=0, lower_right=True, distance_zero=70)


def test_few_queries_with_positions_take_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LEAST", 40)
    x = problem(("position", "segment"), (1, 90), heads=(2, 1, 1))
    check(x, right=0, left=70, lower_right=True)


def test_who_sees_nothing_gets_zeros() -> None:
    x = problem(TERMS, (33, 65))
    x["rank_q"][:, :, ::3] = -1
    out, lse, weights = check(x, right=0, weights="each")
    empty = lse == -torch.inf
    assert empty[:, :, ::3].all()
    assert not empty.all()
    assert not out[empty].any()
    assert not weights[empty].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_may_hide(dtype: torch.dtype) -> None:
    x = problem(("distance",), (17, 70), dtype=dtype)
    x["distance"][..., 40:] = -torch.inf
    x["distance"][..., :20] = torch.finfo(dtype).min
    check(x, weights="each")


@pytest.mark.parametrize("few", [False, True])
def test_hidden_numbers_have_no_influence(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key 30 is NaN, and what it would meet: nobody who may not see it, by its rank, is any the worse."""
    terms = ("distance", "segment", "rank") if few else TERMS
    monkeypatch.setattr(decode, "LEAST", 40)
    x = problem(terms, (3, 90) if few else (40, 40), heads=(2, 1, 1))
    x["rank_k"][:, 30] = 1000
    x["rank_q"][:, :, 2:] = 1000
    clean = by_kernels(x, weights="" if few else "each")
    x["key"][:, :, 30], x["value"][:, :, 30, 3:] = NAN, NAN
    spoiled = by_kernels(x, weights="" if few else "each")
    for before, after in zip(clean, spoiled, strict=True):
        if before is not None:
            assert torch.allclose(before[:, :, :2], after[:, :, :2], rtol=1e-5, atol=1e-6)
            assert after[0, 0, 2:].isnan().reshape(after.shape[2] - 2, -1).any(-1).all()


def test_positions_that_nobody_reads_have_no_influence() -> None:
    """What stands for the future in a causal table, and what lies beyond the farthest pair."""
    x = problem(("distance", "position"), (33, 33), table=100)
    options = {"right": 0, "distance_zero": 50, "position_zero": 50, "weights": "each"}
    clean = by_kernels(x, **options)
    for at in (slice(51, None), slice(18)):
        x["distance"][..., at], x["position_key"][:, :, at] = NAN, NAN
    for before, after in zip(clean, by_kernels(x, **options), strict=True):
        torch.testing.assert_close(before, after)


def test_a_query_of_nan_is_alone() -> None:
    for name in ("position_query", "segment"):
        x = problem(TERMS, (40, 40))
        x["rank_q"].fill_(100)
        x[name][:, :, 7] = NAN
        out, lse, _ = by_kernels(x)
        wrong = torch.arange(40, device=DEVICE) == 7
        assert torch.equal(out.isnan().any(-1)[0, 0], wrong)
        assert torch.equal(lse.isnan()[0, 0], wrong)


def test_strides_do_not_matter() -> None:
    """Heads inside, rows of a wider tensor, columns first: nothing is copied by whoever calls, and nothing differs."""
    x = problem(TERMS, (17, 30), heads=(2, 2, 2), B=2)
    straight = by_kernels(x, weights="each")
    wide = torch.full((2, 17, 2, 13), NAN, device=DEVICE)
    wide[..., 3:-2] = x["position_query"].transpose(1, 2)
    apart = {
        "position_query": wide.transpose(1, 2)[..., 3:-2],
        "position_key": x["position_key"].permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        **{name: x[name].mT.contiguous().mT for name in ("distance", "segment", "rank_q", "segment_q", "rank_k")},
    }
    for a, b in zip(straight, by_kernels(x | apart, weights="each"), strict=True):
        assert torch.equal(a, b)


def test_a_permutation_is_a_mask() -> None:
    """Of XLNet: the content stream sees what comes no later in its order, the query stream what comes before."""
    order = torch.randperm(40, device=DEVICE).int()
    x = problem(("position",), (40, 40), heads=(2, 1, 1))
    ranked = x | {"rank_q": torch.stack([order, order - 1])[None], "rank_k": order[None]}
    seen = torch.stack([order[None] <= order[:, None], order[None] < order[:, None]])
    for a, b in zip(by_kernels(ranked), by_kernels(x | {"mask": seen[None]}), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


def test_repeats_bit_for_bit() -> None:
    x = problem(TERMS, (17, 40))
    for a, b in zip(*(by_kernels(x, dropout_p=0.3, right=3, weights="each") for _ in "12"), strict=True):
        assert torch.equal(a, b)


def test_a_refusal_is_a_sentence() -> None:
    assert unsupported(torch.float32, DEVICE, 64, 64, 256) is None
    assert "257" in unsupported(torch.bfloat16, DEVICE, 64, 64, 257)
    assert "zero" in unsupported(torch.bfloat16, DEVICE, 64, 64, 0)
