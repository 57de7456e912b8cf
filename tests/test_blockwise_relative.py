"""The engine in plain torch with what goes by position, segment and rank: as the formula says, in tiles of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.ops import blockwise, flash
from fastseq.reference import attention as reference

from .support.budget import assert_within_budget
from .test_blockwise import SEED, Largest, covering

PLAIN: dict[str, Any] = {
    "scale": 0.35, "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0, "weights": "",
    "distance_zero": 0, "position_zero": 0,
}  # fmt: skip
LEARNED = "query", "key", "value", "bias", "distance", "position_query", "position_key", "segment"
GIVEN = "mask", "cu_q", "cu_k", "segment_q", "segment_k", "rank_q", "rank_k"
RESULTS = "out", "lse", "weights", *(f"d{name}" for name in LEARNED)
Inputs = dict[str, Tensor]
Upper = tuple[Tensor | None, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks so small that few numbers fill many of them."""
    monkeypatch.setattr(blockwise, "TILE", 700)
    monkeypatch.setattr(blockwise, "FEWEST_ROWS", 3)
    monkeypatch.setattr(blockwise, "BAND_ROWS", 5)
    monkeypatch.setattr(flash, "BLOCK_ROWS", 7)
    monkeypatch.setattr(flash, "MASK_SIZE", 200)


def draw(
    B=2, N=4, M=4, Q=33, K=40, D=8, E=8, P=5, dtype=torch.float64, bias=None, mask=None,
    distance=None, position=None, segment=False, rank=None,
) -> Inputs:  # fmt: skip
    """Inputs in the layout of a model. ``bias``, ``mask``, ``distance`` and ``position`` (of the keys) are shapes,
    ``rank`` the first two dimensions of ``rank_q``."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    x = {name: numbers(B, t, n, d).transpose(1, 2) for name, n, t, d in (
        ("query", N, Q, D), ("key", M, K, D), ("value", M, K, E))}  # fmt: skip
    if bias is not None:
        x["bias"] = numbers(*bias)
    if mask is not None:
        x["mask"] = torch.rand(mask) > 0.4
    if distance is not None:
        x["distance"] = numbers(*distance)
    if position is not None:
        x["position_query"] = numbers(B, Q, N, P).transpose(1, 2)
        x["position_key"] = numbers(*position, P)
    if segment:
        x |= {
            "segment": numbers(B, N, Q, 2),
            "segment_q": torch.randint(3, (B, Q)),
            "segment_k": torch.randint(3, (B, K)),
        }
    if rank is not None:
        x |= {
            "rank_q": torch.randint(max(K, 1), (*rank, Q)),
            "rank_k": torch.stack([torch.randperm(K) for _ in range(rank[0])]),
        }
    return x


def ours(x: Inputs, upper: Upper | None = None, **options: Any) -> tuple[Tensor | None, ...]:
    """The three outputs and, for ``upper`` (their gradients), eight gradients."""
    tensors = [x.get(name) for name in (*LEARNED, *GIVEN)]
    tensors.insert(len(LEARNED) + 3, SEED)
    settings = PLAIN | options | {"max_q": 0, "max_k": 0, "allow_tf32": False}
    with torch.no_grad():
        found = blockwise.attention_forward(*tensors, **settings)
        if upper is None:
            return found
        gradients = blockwise.attention_backward(
            *upper, *tensors, *found[:2], **settings, bias_gradient="bias" in x, distance_gradient="distance" in x
        )
    return *found, *gradients


def differentiated(attend: Any, x: Inputs, upper: Upper, empty: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """What a formula gives, and its gradients; the log-sum-exp of a query that sees nothing has none."""
    leaves = {name: t.detach().requires_grad_() if name in LEARNED else t for name, t in x.items()}
    out, lse, weights = attend(leaves)
    hidden = lse.detach() == -torch.inf
    pairs = ((out, upper[0]), (lse.masked_fill(hidden, 0.0), upper[1]), (weights, upper[2]))
    results = [(t, g.to(t.dtype)) for t, g in pairs if t is not None and g is not None]
    names = [name for name in LEARNED if name in x]
    found = torch.autograd.grad(
        [t for t, _ in results], [leaves[name] for name in names], [g for _, g in results], materialize_grads=True
    )
    gradients = dict(zip(names, found, strict=True))
    outputs = (None if t is None else t.detach() for t in (out, lse, weights))
    return *outputs, *(gradients.get(name) for name in LEARNED)


def theirs(x: Inputs, upper: Upper | None = None, **options: Any) -> Any:
    def attend(leaves: Inputs) -> Any:
        return reference.attention(**leaves, seed=SEED, **PLAIN | options)

    return attend(x) if upper is None else differentiated(attend, x, upper)


def eager(x: Inputs, upper: Upper, **options: Any) -> Any:
    """What a user of torch writes, in tensors of the inputs' own dtype."""
    o = PLAIN | options

    def attend(x: Inputs) -> Any:
        query, (key, value) = x["query"], (t.repeat_interleave(x["query"].shape[1] // t.shape[1], 1) for t in
            (x["key"], x["value"]))  # fmt: skip
        B, N, Q, _ = query.shape
        K = key.shape[2]
        rel = torch.arange(K) - torch.arange(Q)[:, None] - (K - Q)
        visible = reference.band(Q, K, o["left"], o["right"], o["lower_right"], query.device).expand(B, N, Q, K)
        scores = query @ key.mT
        if "position_query" in x:
            table = x["position_key"]
            table = table.repeat_interleave(N // table.shape[1], 1)
            at = (rel + o["position_zero"]).clamp(0, table.shape[2] - 1)
            scores = scores + (x["position_query"] @ table.mT).gather(-1, at.expand(B, N, Q, K))
        scores = scores * o["scale"]
        scores = o["softcap"] * torch.tanh(scores / o["softcap"]) if o["softcap"] else scores
        if "bias" in x:
            scores = scores + x["bias"]
        if "distance" in x:
            scores = scores + x["distance"][..., (rel + o["distance_zero"]).clamp(0, x["distance"].shape[2] - 1)]
        if "segment" in x:
            differs = x["segment_q"][:, None, :, None] != x["segment_k"][:, None, None]
            scores = scores + torch.where(differs, x["segment"][..., 1:], x["segment"][..., :1])
        if "mask" in x:
            visible = visible & x["mask"]
        if "rank_q" in x:
            visible = visible & (x["rank_k"][:, None, None] <= x["rank_q"][..., None])
        empty = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf).masked_fill(empty, 0.0)
        wide = scores.to(torch.promote_types(query.dtype, torch.float32))
        lse = wide.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        if o["dropout_p"]:
            kept = reference.dropout_keep(SEED, torch.arange(B * N).view(B, N), Q, K, o["dropout_p"])
            weights = weights * kept / (1 - o["dropout_p"])
        return weights @ value, lse, {"": None, "each": weights, "mean": weights.mean(1)}[o["weights"]]

    return differentiated(attend, x, upper)


def cotangents(x: Inputs, kinds: str = "out", **options: Any) -> Upper:
    """Random gradients of the outputs named; the log-sum-exp of a query that sees nothing has none."""
    out, lse, weights = theirs(x, **options)
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    made = torch.randn_like(out), dlse, None if weights is None else torch.randn_like(weights)
    return tuple(t if name in kinds else None for t, name in zip(made, ("out", "lse", "weights"), strict=True))


def check(x: Inputs, kinds: str = "out", **options: Any) -> None:
    """All outputs and gradients within twice torch's own error at the same dtype; the formula's own in float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    upper = cotangents(x, kinds, **options)
    exact = theirs(wide, tuple(None if g is None else g.double() for g in upper), **options)
    got = ours(x, upper, **options)
    if x["query"].dtype == torch.float64:
        assert_same(got, exact)
        return
    peer = eager(x, upper, **options)
    for name, a, b, c in zip(RESULTS, got, exact, peer, strict=True):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        hidden = b == -torch.inf
        assert torch.equal(hidden, a == -torch.inf), name
        assert_within_budget(a.masked_fill(hidden, 0), b.masked_fill(hidden, 0), c.masked_fill(hidden, 0), name)


def assert_same(got: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for name, a, b in zip(RESULTS, got, expected, strict=False):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


# Against the formula.

FEATURES: dict[str, list[Any]] = {
    "distance": [None, (1, 4, 72), (2, 1, 9), (1, 4, 1), (2, 4, 100)],
    "distance_zero": [39, 4, -7, 120],
    "position": [None, (1, 1, 72), (1, 4, 72), (2, 2, 11), (1, 2, 90), (2, 4, 3), (2, 1, 200)],
    "position_zero": [39, 5, -3, 80],
    "segment": [False, True],
    "rank": [None, (1, 1), (2, 4), (2, 1)],
    "band": [
        {},
        {"right": 0, "lower_right": True},
        {"right": 0},
        {"left": 3, "right": 2, "lower_right": True},
        {"left": 9},
    ],
    "softcap": [0.0, 2.0],
    "dropout_p": [0.0, 0.3],
    "weights": ["", "each", "mean"],
    "kinds": ["out", "out lse", "out lse weights"],
    "mask": [None, (2, 1, 1, 40), (1, 4, 33, 40)],
    "bias": [None, (1, 4, 33, 40), (2, 1, 1, 40)],
    "M": [4, 2, 1],
    "E": [8, 5],
}
SHAPES = "distance", "position", "segment", "rank", "mask", "bias", "M", "E"


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("row", [pytest.param(row, id=str(n)) for n, row in enumerate(covering(FEATURES))])
def test_every_pair_of_features(row: dict[str, Any]) -> None:
    row = dict(row)
    x = draw(**{name: row.pop(name) for name in SHAPES})
    kinds, options = row.pop("kinds"), row.pop("band") | row
    upper = cotangents(x, kinds, **options)
    assert_same(ours(x, upper, **options), theirs(x, upper, **options))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "T5": ({"distance": (1, 4, 21)}, {"scale": 1.0, "distance_zero": 10}),
    "ALiBi": ({"distance": (1, 4, 40)}, {"distance_zero": 39, "right": 0, "lower_right": True}),
    "Transformer-XL": ({"position": (1, 4, 40)}, {"position_zero": 39, "right": 0, "lower_right": True}),
    "Conformer": ({"position": (1, 1, 72), "mask": (2, 1, 1, 40)}, {"position_zero": 39}),
    "XLNet": (
        {"N": 8, "M": 4, "position": (1, 4, 72), "segment": True, "rank": (2, 8)},
        {"position_zero": 39, "dropout_p": 0.1},
    ),
    "all": (
        {"position": (2, 4, 20), "distance": (2, 4, 20), "segment": True, "rank": (2, 4), "mask": (2, 1, 33, 40)},
        {"position_zero": 9, "distance_zero": 9, "softcap": 3.0, "left": 20, "weights": "each"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case: str, dtype: torch.dtype) -> None:
    sizes, options = CASES[case]
    check(draw(dtype=dtype, **sizes), "out lse weights" if options.get("weights") else "out", **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("Q", "K"), [(1, 1), (1, 63), (63, 1), (64, 64), (65, 127), (7, 320), (320, 7)])
@pytest.mark.parametrize("case", ["T5", "Transformer-XL", "Conformer"])
def test_every_length(Q: int, K: int, case: str) -> None:
    sizes, options = CASES[case]
    check(draw(B=1, Q=Q, K=K, dtype=torch.float32, **sizes | {"mask": None}), "out lse", **options)


@pytest.mark.parametrize(("N", "M", "R"), [(6, 3, 2), (6, 2, 3), (6, 1, 6), (6, 6, 1), (12, 4, 6), (4, 4, 2)])
def test_heads_of_keys_and_of_positions_are_shared_apart(N: int, M: int, R: int) -> None:
    for batches in (1, 2):
        check(draw(N=N, M=M, position=(batches, R, 72), dtype=torch.float32), position_zero=39)


@pytest.mark.parametrize("empty", ["B", "N", "Q", "K"])
@pytest.mark.parametrize("case", ["T5", "XLNet", "all"])
def test_a_size_of_zero(empty: str, case: str) -> None:
    sizes = {"B": 2, "N": 4, "M": 4, "Q": 5, "K": 6, "distance": (1, 1, 3), "position": (1, 1, 3), "segment": True}
    sizes |= {"rank": (1, 1), empty: 0} | ({"M": 0} if empty == "N" else {})
    x = draw(**sizes)
    upper = torch.ones(*x["query"].shape[:3], 8, dtype=torch.float64), None, None
    out, lse, _, *gradients = ours(x, upper)
    assert not out.any()
    assert (lse == -torch.inf).all()
    for gradient, name in zip(gradients, LEARNED, strict=True):
        assert (gradient is None) == (name not in x)
        if gradient is not None:
            assert gradient.shape == x[name].shape
            assert not gradient.any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"right": 0, "dropout_p": 0.3}, {"left": 2, "right": 1, "lower_right": True}])
@pytest.mark.parametrize(
    "shapes", [{"distance": (1, 4, 9)}, {"position": (1, 2, 13)}, {"distance": (1, 1, 99), "position": (1, 4, 60)}]
)
def test_packed_is_one_sequence_after_the_other(shapes: dict[str, Any], options: dict[str, Any]) -> None:
    x = draw(B=1, N=4, M=2, Q=30, K=40, **shapes)
    x["cu_q"] = torch.tensor([0, 7, 7, 19, 28], dtype=torch.int32)
    x["cu_k"] = torch.tensor([0, 5, 9, 9, 38], dtype=torch.int32)
    upper = torch.randn(1, 4, 30, 8, dtype=torch.float64), None, None
    zeros = {"distance_zero": 6, "position_zero": 10}
    assert_same(ours(x, upper, **options, **zeros), theirs(x, upper, **options, **zeros))


@pytest.mark.usefixtures("small_tiles")
def test_dropout_draws_as_the_formula_does() -> None:
    sizes, options = CASES["XLNet"]
    options = options | {"dropout_p": 0.4, "weights": "each"}
    x = draw(**sizes)
    (_, _, got), (_, _, expected) = ours(x, **options), theirs(x, **options)
    assert torch.equal(got == 0, expected == 0)


# Laws.


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_gradients_of_rows_of_scores_sum_to_zero(softcap: float) -> None:
    """A table that every score reads once a row gets nothing in all, and so does a segment's pair."""
    x = draw(distance=(1, 4, 72), segment=True, mask=(2, 1, 33, 40))
    found = dict(zip(RESULTS, ours(x, cotangents(x), distance_zero=39, softcap=softcap), strict=True))
    torch.testing.assert_close(found["ddistance"].sum(-1), torch.zeros(1, 4, dtype=torch.float64))
    torch.testing.assert_close(found["dsegment"].sum(-1), torch.zeros(2, 4, 33, dtype=torch.float64))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["T5", "ALiBi", "Transformer-XL", "Conformer"])
def test_queries_after_a_memory_are_the_last_of_all(case: str) -> None:
    """With the keys of a memory in front, the later queries find what they find when all queries are there."""
    sizes, options = CASES[case]
    x = draw(Q=40, dtype=torch.float64, **sizes)
    late = x | {name: x[name][:, :, 27:] for name in ("query", "position_query") if name in x}
    for whole, part in zip(ours(x, **options)[:2], ours(late, **options)[:2], strict=True):
        torch.testing.assert_close(whole[:, :, 27:], part)


@pytest.mark.usefixtures("small_tiles")
def test_a_long_table_with_equal_ends_is_a_short_one() -> None:
    short = draw(distance=(1, 4, 9), position=(1, 4, 7))
    rows = torch.arange(-40, 60)
    long = short | {"distance": short["distance"][..., rows.clamp(0, 8)]}
    long["position_key"] = short["position_key"][:, :, rows.clamp(0, 6)]
    upper = cotangents(short)
    got = ours(long, upper, distance_zero=44, position_zero=43)
    expected = ours(short, upper, distance_zero=4, position_zero=3)
    assert_same(got[:6], expected[:6])
    torch.testing.assert_close(got[7].sum(-1), expected[7].sum(-1))
    torch.testing.assert_close(got[9].sum(2), expected[9].sum(2))


def test_a_table_of_distances_is_a_bias() -> None:
    x = draw(distance=(2, 4, 72))
    rel = torch.arange(40) - torch.arange(33)[:, None] - 7
    dense = {name: t for name, t in x.items() if name != "distance"} | {"bias": x["distance"][..., rel + 39]}
    upper = cotangents(x, distance_zero=39)
    got, expected = ours(x, upper, distance_zero=39), ours(dense, upper)
    assert_same(got[:6], expected[:6])
    summed = torch.zeros(2, 4, 72, dtype=torch.float64).index_add_(2, (rel + 39).flatten(), expected[6].flatten(2))
    torch.testing.assert_close(got[7], summed)


@pytest.mark.parametrize("case", CASES)
def test_tiles_of_any_size_give_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, options = CASES[case]
    x = draw(**sizes)
    upper = cotangents(x, **options)
    whole = ours(x, upper, **options)
    monkeypatch.setattr(blockwise, "TILE", 100)
    monkeypatch.setattr(blockwise, "FEWEST_ROWS", 2)
    monkeypatch.setattr(blockwise, "BAND_ROWS", 1)
    monkeypatch.setattr(flash, "BLOCK_ROWS", 5)
    monkeypatch.setattr(flash, "MASK_SIZE", 100)
    assert_same(ours(x, upper, **options), whole)


def test_the_same_twice() -> None:
    for sizes, options in CASES.values():
        x = draw(dtype=torch.float32, **sizes)
        upper = cotangents(x, **options)
        first, second = ours(x, upper, **options), ours(x, upper, **options)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_strides_do_not_matter(case: str) -> None:
    sizes, options = CASES[case]
    x = draw(**sizes)

    def odd(t: Tensor) -> Tensor:
        wide = torch.zeros((*t.shape[:-1], 2 * t.shape[-1]), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    upper = cotangents(x, **options)
    assert_same(ours({name: odd(t) for name, t in x.items()}, upper, **options), ours(x, upper, **options))


# What is hidden.


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"dropout_p": 0.3}, {"weights": "each"}])
@pytest.mark.parametrize("hidden_by", ["mask", "rank", "band"])
def test_nan_that_is_hidden_is_not_seen(hidden_by: str, options: dict[str, Any]) -> None:
    """A key, and the entries of tables that only hidden pairs of query and key have."""
    shapes = {"distance": (1, 4, 72), "position": (1, 4, 72), "segment": True}
    options = options | {"distance_zero": 39, "position_zero": 39}
    x = draw(
        **shapes, mask=(2, 1, 1, 40) if hidden_by == "mask" else None, rank=(2, 1) if hidden_by == "rank" else None
    )
    if hidden_by == "band":
        options |= {"right": 2, "lower_right": True}
    elif hidden_by == "mask":
        x["mask"][..., -3:] = False
    else:
        x["rank_k"][:, -3:] = 99
    upper = cotangents(x, "out weights", **options)
    expected = ours(x, upper, **options)
    bad = x | {name: t.clone() for name, t in x.items()}
    beyond = slice(42, None) if hidden_by == "band" else slice(69, None)
    bad["distance"][..., beyond] = torch.nan
    bad["position_key"][:, :, beyond] = torch.inf
    if hidden_by != "band":
        bad["key"][:, :, -3:], bad["value"][:, :, -3:] = torch.nan, torch.inf
    assert_same(ours(bad, upper, **options), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
@pytest.mark.parametrize("name", ["distance", "position_query", "position_key", "segment"])
def test_nan_is_seen_by_those_who_may_and_by_nobody_else(name: str, options: dict[str, Any]) -> None:
    options = options | {"distance_zero": 39, "position_zero": 39}
    x = draw(distance=(1, 4, 72), position=(1, 4, 72), segment=True, mask=(2, 1, 33, 40))
    upper = cotangents(x)
    if name in ("distance", "position_key"):
        x[name][:, :, 20] = torch.nan
    else:
        x[name][:, :, 20, -1] = torch.nan
    own = {f"d{name}": x[name].isnan()}  # of what is not a number itself, the gradient is not either, or zero
    got, expected = (
        tuple(t if f not in own else t.masked_fill(own[f], 0.0) for f, t in zip(RESULTS, found, strict=True))
        for found in (ours(x, upper, **options), theirs(x, upper, **options))
    )
    assert_same(got, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"weights": "mean"}, {"dropout_p": 0.3}, {"left": 2}])
@pytest.mark.parametrize("kind", ["rank", "distance"])
def test_a_query_that_sees_nothing_is_zero(kind: str, options: dict[str, Any]) -> None:
    x = draw(distance=(1, 4, 9), position=(1, 4, 9), segment=True, rank=(2, 4) if kind == "rank" else None)
    if kind == "rank":
        x["rank_q"][:, :, 5:9] = -1
        empty = slice(5, 9)
    else:
        x["distance"][..., :1] = -torch.inf
        empty = slice(0, 0)
    options = options | {"distance_zero": 4, "position_zero": 4}
    got, expected = ours(x, cotangents(x, **options), **options), None
    assert not got[0][:, :, empty].any()
    assert (got[1][:, :, empty] == -torch.inf).all()
    assert all(t is None or not t[t != -torch.inf].isnan().any() for t in got)
    if kind == "rank":
        torch.manual_seed(0)
        upper = cotangents(x, **options)
        expected = theirs(x, upper, **options)
        assert_same(ours(x, upper, **options), expected)


# Memory.


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"distance": (1, 2, 257)}, {"distance_zero": 128}),
        ({"distance": (1, 2, 4096)}, {"distance_zero": 4095, "right": 0, "lower_right": True}),
        ({"position": (1, 2, 6143)}, {"position_zero": 4095}),
        ({"position": (1, 1, 4096), "segment": True}, {"position_zero": 4095, "right": 0, "lower_right": True}),
        ({"rank": (1, 2), "segment": True}, {"softcap": 5.0}),
    ],
)
def test_no_table_of_scores(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    x = draw(B=1, N=2, M=2, Q=2048, K=4096, D=4, E=4, P=4, **sizes, dtype=torch.float32)
    with Largest() as largest:
        ours(x, (torch.ones(1, 2, 2048, 4), None, None), **options)
    assert 0 < largest.elements <= 2 * max(blockwise.TILE, flash.MASK_SIZE) < 2 * 2048 * 4096
