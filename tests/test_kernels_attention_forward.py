"""Laws of the attention kernels' forward and weights: under the interpreter, or on a GPU with the same tests."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastseq.kernels.attention import decode, forward
from fastseq.kernels.attention.plan import DTYPES, Tiles, unsupported
from fastseq.kernels.limits import LIMITS
from fastseq.reference import attention as reference

from .support.budget import assert_within_budget
from .support.poison import poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 products are exact under the interpreter whatever it is told.
ALLOW_TF32 = DEVICE.type == "cpu"
SEED = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
NAN = float("nan")
NOTHING = {
    "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0, "weights": "",
    "distance_zero": 0, "position_zero": 0,
}  # fmt: skip

LENGTHS = [*((n, n) for n in (0, 1, 17, 63, 64, 65, 127, 128, 129)), (1, 129), (129, 1), (17, 64), (65, 129), (128, 63)]
LENGTHS += [(0, 17), (17, 0)]
WIDTHS = [*((n, n) for n in (1, 8, 32, 40, 64, 80, 96, 128, 192, 256)), (40, 8), (16, 96)]
FEATURES: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "heads": ((2, 2), (4, 2), (3, 1)),
    "right": (-1, 0, 3),
    "left": (-1, 5, 40),
    "lower_right": (False, True),
    "softcap": (0.0, 2.0),
    "dropout_p": (0.0, 0.3),
    "bias": (None, "BNQK", "111K", "1NQ1", "B1QK"),
    "mask": (None, "BNQK", "B11K", "11QK", "1NQ1"),
    "weights": ("", "each", "mean"),
    "scale": (0.3, -0.2),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def problem(
    lengths: tuple[int, int] = (17, 33),
    widths: tuple[int, int] = (8, 8),
    heads: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
    bias: str | None = None,
    mask: str | None = None,
    B: int = 2,
) -> list[Tensor | None]:
    """query, key, value, bias and mask; the letters of the last two say which dimensions do not broadcast."""
    (Q, K), (D, E), (N, M) = lengths, widths, heads
    size = {"B": B, "N": N, "Q": Q, "K": K, "1": 1}
    shapes = [None if letters is None else [size[letter] for letter in letters] for letters in (bias, mask)]
    return [
        draw(B, N, Q, D, dtype=dtype),
        draw(B, M, K, D, dtype=dtype),
        draw(B, M, K, E, dtype=dtype),
        None if shapes[0] is None else draw(*shapes[0], dtype=dtype),
        None if shapes[1] is None else torch.rand(shapes[1], device=DEVICE) < 0.6,
    ]


def by_kernels(tensors: list[Tensor | None], cu: Any = (None, None), **options: Any) -> Any:
    q, k, v, bias, mask = tensors
    given = q, k, v, bias, *[None] * 4, mask, *cu, SEED, *[None] * 4
    options = NOTHING | {"scale": 0.3, "max_q": q.shape[2], "max_k": k.shape[2]} | options
    return forward.attention_forward(*given, **options, allow_tf32=ALLOW_TF32)


def by_reference(tensors: list[Tensor | None], dtype: torch.dtype, cu: Any = (None, None), **options: Any) -> Any:
    *of_scores, mask = (t if t is None or t.dtype == torch.bool else t.to(dtype) for t in tensors)
    options = NOTHING | {"scale": 0.3} | options
    return reference.attention(*of_scores, mask=mask, cu_q=cu[0], cu_k=cu[1], seed=SEED, **options)


def check(tensors: list[Tensor | None], **options: Any) -> Any:
    """Every output within the budget; the -inf of a log-sum-exp where it belongs, NaN nowhere."""
    got = by_kernels(tensors, **options)
    options.pop("max_q", None)
    exact = by_reference(tensors, torch.float64, **options)
    peer = by_reference(tensors, tensors[0].dtype, **options)
    for name, *three in zip(("output", "lse", "weights"), got, exact, peer, strict=True):
        if three[0] is None:
            assert three[1] is None
            continue
        infinite = three[1].isinf()
        assert torch.equal(three[0].isinf(), infinite), name
        assert_within_budget(*(t.masked_fill(infinite, 0.0) for t in three), name)
    return got


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which any two levels of any two factors meet: of all rows, greedily, those that bring most new pairs."""

    def pairs(row: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(row.items(), 2))

    generator = torch.Generator().manual_seed(0)
    missing = set().union(*(pairs({a: x, b: y}) for a, b in itertools.combinations(factors, 2)
                            for x in factors[a] for y in factors[b]))  # fmt: skip
    rows = []
    while missing:
        drawn = [
            {name: levels[int(torch.randint(len(levels), (), generator=generator))] for name, levels in factors.items()}
            for _ in range(40)
        ]
        rows.append(max(drawn, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


@pytest.mark.parametrize(("lengths", "dtype"), zip(LENGTHS, itertools.cycle(DTYPES), strict=False))
def test_every_length(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    check(problem(lengths, B=1))
    check(problem(lengths, dtype=dtype, B=1), right=0, left=70, lower_right=dtype == torch.float32)


@pytest.mark.parametrize(("widths", "dtype"), zip(WIDTHS, itertools.cycle(DTYPES), strict=False))
def test_every_width(widths: tuple[int, int], dtype: torch.dtype) -> None:
    check(problem((17, 65), widths, dtype=dtype, B=1), weights="each", scale=widths[0] ** -0.5)


@pytest.mark.parametrize("features", covering(FEATURES), ids=lambda f: " ".join(map(str, f.values())))
def test_features_alone_and_together(features: dict[str, Any]) -> None:
    options = dict(features)
    of_problem = {name: options.pop(name) for name in ("dtype", "heads", "bias", "mask")}
    check(problem((17, 70), **of_problem), **options)


@pytest.mark.parametrize("right", [-1, 0])
def test_logits_of_120(right: int) -> None:
    tensors = problem((65, 129), B=1)
    highest = (tensors[0] @ tensors[1].mT).abs().max()
    check(tensors, scale=float(120 / highest), right=right, weights="each")


def test_no_scale_is_an_even_mean() -> None:
    check(problem(), scale=0.0, weights="each")


@pytest.mark.parametrize("low", ["-inf", "least"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_that_hide(dtype: torch.dtype, low: str) -> None:
    tensors = problem((33, 70), dtype=dtype, bias="BNQK", B=1)
    hidden = torch.rand(tensors[3].shape, device=DEVICE) < 0.3
    hidden[:, :, ::5] = True
    tensors[3].masked_fill_(hidden, -torch.inf if low == "-inf" else torch.finfo(dtype).min)
    check(tensors, weights="each")


@pytest.mark.parametrize("kind", ["band", "mask of queries", "mask of keys", "both"])
def test_who_sees_nothing_gets_zeros(kind: str) -> None:
    mask = {"band": None, "mask of queries": "11Q1", "mask of keys": "B11K", "both": "B11K"}[kind]
    tensors = problem((129, 65), mask=mask)
    if mask == "B11K":
        tensors[4][0] = False
    right = 0 if kind in ("band", "both") else -1
    out, lse, weights = check(tensors, right=right, lower_right=True, weights="each")
    empty = lse == -torch.inf
    assert empty.any()
    assert not empty.all()
    assert not out[empty].any()
    assert not weights[empty].any()


# By each of these key 80 is hidden from the queries below 40, and visible to queries 80 to 83.
HIDING: dict[str, dict[str, Any]] = {
    "causal": {"right": 0},
    "window": {"left": 3, "right": 40},
    "mask of keys": {"mask": "keys"},
    "mask": {"mask": "queries"},
    "mask and causal": {"mask": "queries", "right": 0},
    "dropout, cap, bias and causal": {"right": 0, "dropout_p": 0.3, "softcap": 2.0, "bias": "BNQK"},
}


@pytest.mark.parametrize(("kind", "bad"), [*((kind, NAN) for kind in HIDING), ("causal", float("inf"))])
def test_hidden_numbers_have_no_influence(kind: str, bad: float) -> None:
    options = dict(HIDING[kind])
    tensors = problem((129, 129), bias=options.pop("bias", None), B=1)
    kind = options.pop("mask", None)
    if kind is not None:
        tensors[4] = torch.ones(1, 1, 129 if kind == "queries" else 1, 129, dtype=torch.bool, device=DEVICE)
        tensors[4][:, :, :40, 80] = False
    clean = by_kernels(tensors, **options, weights="each")
    tensors[1][:, :, 80], tensors[2][:, :, 80, 3:] = bad, bad
    seen = by_kernels(tensors, **options, weights="each")
    rows = slice(None) if kind == "keys" else slice(40)
    for before, after in zip(clean, seen, strict=True):
        assert torch.allclose(before[:, :, rows], after[:, :, rows], rtol=1e-5, atol=1e-6)
    if kind != "keys" and bad != bad:
        for after in seen:
            assert after[0, 0, 80:84].isnan().reshape(4, -1).any(-1).all()


def test_a_visible_value_of_nan_shows_where_it_is() -> None:
    tensors = problem((129, 129), heads=(2, 2), B=1)
    tensors[2][0, 1, 80, 5] = NAN
    out, lse, _ = by_kernels(tensors, right=0)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 1, 80:, 5] = True
    assert torch.equal(out.isnan(), expected)
    assert lse.isfinite().all()


def test_queries_of_nan_are_alone() -> None:
    tensors = problem((129, 65), B=1)
    tensors[0][:, :, 7] = NAN
    out, lse, weights = by_kernels(tensors, left=20, weights="each")
    wrong = torch.arange(129, device=DEVICE) == 7
    assert torch.equal(out.isnan().any(-1)[0, 0], wrong)
    assert torch.equal(lse.isnan()[0, 0], wrong)
    assert torch.equal(weights.isnan().any(-1)[0, 0], wrong)


def laid_out(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers with other strides, and NaN beside them."""
    if kind == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns":
        return tensor.mT.contiguous().mT
    B, N, T, D = tensor.shape
    wide = torch.full((B, T, N, D + 5), NAN, dtype=tensor.dtype, device=DEVICE)
    wide[..., 3:-2] = tensor.transpose(1, 2)
    return wide.transpose(1, 2)[..., 3:-2]


@pytest.mark.parametrize("kind", ["transposed", "columns", "slices"])
def test_strides_do_not_matter(kind: str) -> None:
    tensors = problem((33, 70), (8, 40), bias="BNQK", mask="BNQK")
    straight = by_kernels(tensors, weights="each")
    tensors = [*(laid_out(t, kind) for t in tensors[:4]), tensors[4].mT.contiguous().mT]
    for a, b in zip(straight, by_kernels(tensors, weights="each"), strict=True):
        assert torch.equal(a, b)


def test_expanded_is_as_good_as_copied() -> None:
    q, k, v = (draw(*shape) for shape in ((1, 2, 33, 8), (2, 1, 70, 8), (1, 1, 1, 8)))
    tensors = [q.expand(2, -1, -1, -1), k.expand(-1, 2, -1, -1), v.expand(2, 2, 70, -1), None, None]
    copies = [None if t is None else t.contiguous() for t in tensors]
    for a, b in zip(by_kernels(tensors, weights="mean"), by_kernels(copies, weights="mean"), strict=True):
        assert torch.equal(a, b)


def test_output_lies_with_the_heads_inside() -> None:
    out, *_ = by_kernels(problem())
    assert out.transpose(1, 2).is_contiguous()


def test_repeats_bit_for_bit() -> None:
    tensors = problem((33, 70), bias="111K", mask="11QK", B=1)
    for a, b in zip(*(by_kernels(tensors, dropout_p=0.3, right=3, weights="each") for _ in "12"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tiles", [Tiles(16, 32, 4, 1), Tiles(64, 16, 4, 1)])
def test_tiles_do_not_matter(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any tiles the numbers are the same to rounding, and what dropout keeps is the same."""
    for name in ("forward_tiles", "weights_tiles"):
        monkeypatch.setattr(forward, name, lambda *_: tiles)
    for mask in (None, "B11K"):
        _, _, weights = check(problem((33, 100), mask=mask, B=1), dropout_p=0.5, right=60, left=30, weights="each")
        kept = reference.dropout_keep(SEED, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 33, 100, 0.5)
        assert not weights[~kept].any()
        assert (weights[kept] > 0).sum() > 500


def test_dropout_of_everything() -> None:
    out, lse, weights = check(problem(), dropout_p=1.0, weights="mean")
    assert not out.any()
    assert not weights.any()
    assert lse.isfinite().all()


@pytest.mark.parametrize("lengths", [([5, 0, 70, 1], [9, 3, 65, 0]), ([64], [64])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_alone(lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    ends = [torch.tensor([0, *n]).cumsum(0).int().to(DEVICE) for n in lengths]
    spare = 3  # tokens that belong to no sequence
    tensors = problem((sum(lengths[0]) + spare, sum(lengths[1]) + spare), (8, 16), (4, 2), dtype=dtype, B=1)
    for t in tensors[:3]:
        t[:, :, -spare:] = NAN
    options = {"right": 2, "left": 50, "lower_right": True, "dropout_p": 0.2, "softcap": 5.0}
    out, lse, _ = check(tensors, cu=ends, max_q=max(lengths[0]), **options)
    assert not out[:, :, -spare:].any()
    assert (lse[:, :, -spare:] == -torch.inf).all()


def test_few_queries_of_many_keys_are_split() -> None:
    tensors = problem((1, 520), heads=(4, 2), mask="B11K", B=1)
    assert decode.splits(1, 2, 1, 4, 520, -1, -1, False, DEVICE) > 1
    check(tensors, dropout_p=0.2)


def test_live_ranges_are_what_the_mask_says() -> None:
    mask = torch.zeros(2, 1, 150, 90, dtype=torch.bool, device=DEVICE)
    mask[0, :, :70, 5:40] = True  # a document
    mask[0, :, 70:, 40:] = True
    mask[0, :, 3, 17] = False
    mask[1, :, :64] = torch.rand(64, 90, device=DEVICE) < 0.5
    for seen, block in itertools.product((mask, mask.mT, mask[:, :, :1], mask[:, :, 70:71, :70]), (16, 64)):
        B, _, Q, K = seen.shape
        live = forward.live_ranges(seen.expand(-1, 3, -1, -1), block)
        assert live.stride(1) == 0
        for b, first in itertools.product(range(B), range(0, Q, block)):
            rows = seen[b, 0, first : first + block]
            low, high, gap = live[b, 2, first // block].tolist()
            some, every = rows.any(0), rows.all(0)
            assert not some[:low].any()
            assert not some[high:].any()
            if some.any():
                assert some[low]
                assert some[high - 1]
                assert every[low:gap].all()
                assert gap == K or not every[gap]
            else:
                assert (low, high) == (K, 0)


def test_padding_is_not_read() -> None:
    """Of keys that no query sees not even the tiles are visited: garbage in them costs nothing."""
    tensors = problem((17, 300))
    tensors[4] = (torch.arange(300, device=DEVICE) < torch.tensor([[100], [300]], device=DEVICE))[:, None, None]
    assert forward.live_ranges(tensors[4].expand(2, 2, 17, 300), 64)[:, 0, 0].tolist() == [[0, 100, 100], [0, 300, 300]]
    tensors[1][0, :, 100:], tensors[2][0, :, 100:] = NAN, NAN
    out, *_ = by_kernels(tensors)
    alone = by_kernels([tensors[0][:1], tensors[1][:1, :, :100], tensors[2][:1, :, :100], None, None])
    assert torch.equal(out[:1], alone[0])


def test_a_refusal_is_a_sentence() -> None:
    assert unsupported(torch.float32, DEVICE, 64, 256) is None
    assert "float64" in unsupported(torch.float64, DEVICE, 64, 64)
    assert "257" in unsupported(torch.bfloat16, DEVICE, 64, 257)
    assert "zero" in unsupported(torch.bfloat16, DEVICE, 0, 64)
    assert "meta" in unsupported(torch.bfloat16, torch.device("meta"), 64, 64)


@pytest.mark.parametrize("target", LIMITS)
def test_configurations_have_names(target: str) -> None:
    names = [c["name"] for c in forward.configurations(LIMITS[target])]
    assert len(names) == len(set(names))
