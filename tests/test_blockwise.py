"""The engine in plain torch: what the formula says, in tiles, on ATen's flash kernel where that means the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastseq.ops import blockwise, flash
from fastseq.reference import attention as reference

from .support.budget import assert_within_budget

PLAIN: dict[str, Any] = {
    "scale": 0.35, "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0, "weights": "",
}  # fmt: skip
SEED = torch.tensor([2**40 + 12345])
RELATIVE = (
    "distance", "position_query", "position_key", "segment", "segment_q", "segment_k", "rank_q", "rank_k",
)  # fmt: skip
Inputs = dict[str, Tensor | None]


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
    monkeypatch.setattr(flash, "ALONE", 1)


def draw(B=2, N=4, M=2, Q=33, K=40, D=8, E=8, dtype=torch.float64, bias=None, mask=None) -> Inputs:
    """Query, key, value in the layout of a model; ``bias`` and ``mask`` are shapes."""

    def heads(n: int, t: int, d: int) -> Tensor:
        return torch.randn(B, t, n, d, dtype=torch.float64).to(dtype).transpose(1, 2)

    visible = None if mask is None else torch.rand(mask) > 0.4
    added = None if bias is None else torch.randn(bias, dtype=torch.float64).to(dtype)
    return {"query": heads(N, Q, D), "key": heads(M, K, D), "value": heads(M, K, E), "bias": added, "mask": visible}


def ours(x: Inputs, upper: tuple[Tensor | None, ...] | None = None, bias_gradient: bool = False, **options: Any) -> Any:
    """Outputs and, for ``upper`` (gradients of output, log-sum-exp, weights), gradients."""
    cu = {name: options.pop(name, None) for name in ("cu_q", "cu_k")} | dict.fromkeys(RELATIVE)
    settings = PLAIN | options | {"max_q": 0, "max_k": 0, "allow_tf32": False, "distance_zero": 0, "position_zero": 0}
    with torch.no_grad():
        found = blockwise.attention_forward(**x, **cu, seed=SEED, **settings)
        if upper is None:
            return found
        out, lse, _ = found
        wanted = {"bias_gradient": bias_gradient, "distance_gradient": False}
        gradients = blockwise.attention_backward(*upper, **x, **cu, seed=SEED, out=out, lse=lse, **settings | wanted)
    return found, gradients[:4]


def theirs(x: Inputs, upper: tuple[Tensor | None, ...] | None = None, **options: Any) -> Any:
    """The same from the formula."""
    leaves = {name: t if t is None or t.dtype == torch.bool else t.detach().requires_grad_() for name, t in x.items()}
    found = reference.attention(**leaves, seed=SEED, **PLAIN | options)
    if upper is None:
        return tuple(None if t is None else t.detach() for t in found)
    empty = found[1].detach() == -torch.inf
    pairs = [(t, g.to(t.dtype)) for t, g in zip(found, upper, strict=True) if t is not None and g is not None]
    pairs = [(t.masked_fill(empty, 0.0), g) if t is found[1] else (t, g) for t, g in pairs]
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    each = tuple(next(gradients) if t is not None and t.requires_grad else None for t in leaves.values())
    return tuple(None if t is None else t.detach() for t in found), each[:4]


def torch_itself(x: Inputs, upper: tuple[Tensor | None, ...], **options: Any) -> Any:
    """Torch's own way at the same dtype: its function, and where it has none, the formula in tensors of that dtype."""
    o = PLAIN | options
    leaves = {name: t if t is None or t.dtype == torch.bool else t.detach().requires_grad_() for name, t in x.items()}
    query, key, value, bias, mask = leaves.values()
    B, N, Q, _ = query.shape
    K, group = key.shape[2], N // key.shape[1]
    visible = reference.band(Q, K, o["left"], o["right"], o["lower_right"], query.device).expand(B, N, Q, K)
    visible = visible if mask is None else visible & mask
    added = torch.zeros(B, N, Q, K, dtype=query.dtype).masked_fill(~visible, -torch.inf)
    added = added if bias is None else added + bias
    empty = (added.detach() == -torch.inf).all(-1, keepdim=True)
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * o["scale"]
    scores = (o["softcap"] * torch.tanh(scores / o["softcap"]) if o["softcap"] else scores) + added
    scores = scores.masked_fill(empty, 0.0)
    lse = (
        scores.to(torch.promote_types(query.dtype, torch.float32)).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    )
    weights = None
    if o["softcap"] or o["dropout_p"] or o["weights"]:
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        if o["dropout_p"]:
            kept = reference.dropout_keep(SEED, torch.arange(B * N).view(B, N), Q, K, o["dropout_p"])
            weights = weights * kept / (1 - o["dropout_p"]) if o["dropout_p"] < 1 else weights * 0.0
        out = weights @ value
        weights = {"": None, "each": weights, "mean": weights.mean(1)}[o["weights"]]
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=o["scale"])
    found = out, lse, weights
    pairs = [(t, g) for t, g in zip(found, upper, strict=True) if t is not None and g is not None]
    pairs = [(t.masked_fill(empty[..., 0], 0.0), g) if t is lse else (t, g) for t, g in pairs]
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    each = tuple(next(gradients) if t is not None and t.requires_grad else None for t in leaves.values())
    return tuple(None if t is None else t.detach() for t in found), each[:4]


def cotangents(x: Inputs, kinds: str = "out", **options: Any) -> tuple[Tensor | None, ...]:
    """Random gradients of the outputs named; the log-sum-exp of a query that sees nothing has none."""
    out, lse, weights = theirs(x, **options)
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    made = torch.randn_like(out), dlse, None if weights is None else torch.randn_like(weights)
    return tuple(t if name in kinds else None for t, name in zip(made, ("out", "lse", "weights"), strict=True))


def widened(x: Inputs) -> Inputs:
    return {name: t if t is None or t.dtype == torch.bool else t.double() for name, t in x.items()}


def check(x: Inputs, kinds: str = "out", **options: Any) -> None:
    """All outputs and gradients within twice torch's own error at the same dtype."""
    wide = widened(x)
    upper = cotangents(x, kinds, **options)
    exact, exact_gradients = theirs(wide, tuple(None if g is None else g.double() for g in upper), **options)
    peer, peer_gradients = torch_itself(x, upper, **options)
    got, gradients = ours(x, upper, bias_gradient=x["bias"] is not None, **options)
    names = "out", "lse", "weights", "dquery", "dkey", "dvalue", "dbias"
    for name, a, b, c in zip(
        names, (*got, *gradients), (*exact, *exact_gradients), (*peer, *peer_gradients), strict=True
    ):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        hidden = b == -torch.inf
        assert torch.equal(hidden, a == -torch.inf), name
        assert_within_budget(a.masked_fill(hidden, 0), b.masked_fill(hidden, 0), c.masked_fill(hidden, 0), name)


FEATURES: dict[str, list[Any]] = {
    "left": [-1, 0, 3, 50],
    "right": [-1, 0, 2],
    "lower_right": [False, True],
    "softcap": [0.0, 2.0],
    "dropout_p": [0.0, 0.3, 1.0],
    "weights": ["", "each", "mean"],
    "kinds": ["out", "lse", "out lse", "out lse weights"],
    "mask": [None, (2, 1, 1, 40), (1, 1, 33, 40), (2, 4, 33, 40), (1, 4, 33, 1)],
    "bias": [None, (1, 4, 33, 40), (2, 4, 33, 40), (2, 1, 1, 40), (1, 4, 33, 1), (1, 1, 33, 40)],
    "M": [4, 2, 1],
    "E": [8, 5],
}


def covering(features: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Choices in which every pair of values of two features meets."""
    names = list(features)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(features[a]))
        for j in range(len(features[b]))
    }
    rows = []
    while missing:
        chosen = dict(min(missing))
        for name in names:
            if name not in chosen:
                at = {
                    i: sum(
                        tuple(sorted([(name, i), other], key=lambda part: names.index(part[0]))) in missing
                        for other in chosen.items()
                    )
                    for i in range(len(features[name]))
                }
                chosen[name] = max(at, key=lambda i: at[i])
        missing -= {((a, chosen[a]), (b, chosen[b])) for a, b in itertools.combinations(names, 2)}
        rows.append({name: features[name][i] for name, i in chosen.items()})
    return rows


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("row", [pytest.param(row, id=str(n)) for n, row in enumerate(covering(FEATURES))])
def test_every_pair_of_features(row: dict[str, Any]) -> None:
    row = dict(row)
    sizes = {name: row.pop(name) for name in ("mask", "bias", "M", "E")}
    check(draw(**sizes, dtype=torch.float32), row.pop("kinds"), **row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"mask": (2, 1, 1, 40)}, {"right": 0}),
        ({"mask": (2, 1, 33, 40), "bias": (1, 4, 33, 40)}, {"left": 9, "right": 3, "lower_right": True}),
        ({"E": 5, "bias": (1, 4, 33, 40)}, {"softcap": 2.0}),
        ({}, {"dropout_p": 0.3, "weights": "each"}),
        ({"Q": 1, "K": 129}, {"right": 0, "lower_right": True}),
        ({"Q": 129, "K": 65}, {"right": 0, "lower_right": True}),
        ({"Q": 127, "K": 320, "D": 40, "E": 40}, {"left": 16, "right": 16}),
    ],
)
def test_every_dtype(dtype: torch.dtype, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    check(draw(dtype=dtype, **sizes), "out lse weights" if options.get("weights") else "out", **options)


@pytest.mark.parametrize("D", [1, 3, 8, 32, 40, 65, 80, 96, 128, 192, 256])
def test_every_head_width(D: int) -> None:
    check(draw(B=1, Q=17, K=31, D=D, E=D, dtype=torch.float32, mask=(1, 1, 1, 31)), right=0, scale=D**-0.5)


@pytest.mark.parametrize(("Q", "K"), [(1, 1), (1, 63), (63, 1), (64, 64), (65, 127), (128, 129), (7, 320), (320, 7)])
@pytest.mark.parametrize("options", [{"right": 0}, {"right": 0, "lower_right": True}, {"left": 20, "right": 20}])
def test_every_length(Q: int, K: int, options: dict[str, Any]) -> None:
    check(draw(B=1, Q=Q, K=K, dtype=torch.float32), **options)
    check(draw(B=1, Q=Q, K=K, dtype=torch.float32), "out lse", softcap=4.0, **options)


@pytest.mark.parametrize("options", [{}, {"right": 0}, {"dropout_p": 0.3, "weights": "each"}, {"weights": "mean"}])
@pytest.mark.parametrize("empty", ["B", "N", "Q", "K"])
def test_a_size_of_zero(empty: str, options: dict[str, Any]) -> None:
    sizes = {"B": 2, "N": 4, "M": 2, "Q": 5, "K": 6} | {empty: 0} | ({"M": 0} if empty == "N" else {})
    x = draw(**sizes)
    B, N, Q, K = (sizes[name] for name in "BNQK")
    upper = torch.ones(B, N, Q, 8, dtype=torch.float64), None, None
    (out, lse, weights), gradients = ours(x, upper, **options)
    assert out.shape == (B, N, Q, 8)
    assert lse.shape == (B, N, Q)
    assert not out.any()
    assert (lse == -torch.inf).all()
    if options.get("weights"):
        assert weights.shape == ((B, N, Q, K) if options["weights"] == "each" else (B, Q, K))
    for gradient, name in zip(gradients, ("query", "key", "value"), strict=False):
        assert gradient.shape == x[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "tiles"])
def test_memory_lies_with_the_heads_last(softcap: float) -> None:
    for right, mask in ((-1, None), (0, None), (2, (2, 4, 33, 40))):
        x = draw(mask=mask)
        for layout in (x, x | {"query": x["query"].contiguous(), "key": x["key"].contiguous()}):
            (out, lse, _), gradients = ours(layout, cotangents(x, right=right), right=right, softcap=softcap)
            assert lse.is_contiguous()
            assert all(t.transpose(1, 2).is_contiguous() for t in (out, *gradients[:3]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "tiles"])
def test_strides_do_not_matter(softcap: float) -> None:
    x = draw(M=4, mask=(2, 1, 33, 40), bias=(1, 4, 33, 40))
    upper = cotangents(x)
    expected = ours(x, upper, softcap=softcap)

    def odd(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan).to(t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    strided = {name: odd(t) for name, t in x.items()}
    got = ours(strided, tuple(None if t is None else odd(t) for t in upper), softcap=softcap)
    for a, b in zip((*got[0][:2], *got[1][:3]), (*expected[0][:2], *expected[1][:3]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "tiles"])
def test_one_key_given_to_all_by_stride_zero(softcap: float) -> None:
    x = draw(dtype=torch.float32)
    for dims in ((2, 4, 40, 8), (2, 2, 40, 8)):
        key = torch.randn(1, 1, 1, 8).expand(dims)
        check(x | {"key": key, "value": key}, softcap=softcap)


# Laws.


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "tiles"])
def test_the_order_of_keys_does_not_matter(softcap: float) -> None:
    x = draw(mask=(2, 4, 33, 40), bias=(1, 4, 33, 40))
    order = torch.randperm(40)
    permuted = {"query": x["query"]} | {name: x[name][:, :, order] for name in ("key", "value")}
    permuted |= {name: x[name][..., order] for name in ("bias", "mask")}
    upper = cotangents(x, softcap=softcap)
    (out, lse, _), (dq, dk, dv, db) = ours(x, upper, bias_gradient=True, softcap=softcap)
    (out_, lse_, _), (dq_, dk_, dv_, db_) = ours(permuted, upper, bias_gradient=True, softcap=softcap)
    pairs = (out, out_), (lse, lse_), (dq, dq_), (dk[:, :, order], dk_), (dv[:, :, order], dv_), (db[..., order], db_)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"dropout_p": 0.4}])
def test_tiles_of_any_size_give_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(mask=(2, 1, 33, 40))
    upper = cotangents(x)
    whole = ours(x, upper, left=7, right=4, **options)
    monkeypatch.setattr(blockwise, "TILE", 100)
    monkeypatch.setattr(blockwise, "BAND_ROWS", 1)
    monkeypatch.setattr(flash, "BLOCK_ROWS", 5)
    split = ours(x, upper, left=7, right=4, **options)
    for a, b in zip((*whole[0][:2], *whole[1][:3]), (*split[0][:2], *split[1][:3]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_twice() -> None:
    x = draw(dtype=torch.float32, bias=(1, 4, 33, 40))
    upper = cotangents(x)
    first, second = (ours(x, upper, bias_gradient=True, dropout_p=0.2, right=0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0][:2], *first[1]), (*second[0][:2], *second[1]), strict=True))


def test_rows_of_the_bias_gradient_sum_to_zero() -> None:
    x = draw(bias=(2, 4, 33, 40), mask=(2, 1, 1, 40))
    *_, dbias = ours(x, cotangents(x), bias_gradient=True, right=0)[1]
    torch.testing.assert_close(dbias.sum(-1), torch.zeros(2, 4, 33, dtype=torch.float64))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"right": 0, "dropout_p": 0.3}, {"left": 2, "right": 1, "lower_right": True}])
def test_packed_is_one_sequence_after_the_other(options: dict[str, Any]) -> None:
    x = draw(B=1, Q=30, K=40)
    cu = {"cu_q": torch.tensor([0, 7, 7, 19, 28], dtype=torch.int32)}
    cu["cu_k"] = torch.tensor([0, 5, 9, 9, 38], dtype=torch.int32)
    upper = torch.randn(1, 4, 30, 8, dtype=torch.float64), None, None
    expected = theirs(x, upper, **cu, **options)
    got = ours(x, upper, **cu, **options)
    for a, b in zip((*got[0][:2], *got[1][:3]), (*expected[0][:2], *expected[1][:3]), strict=True):
        torch.testing.assert_close(a, b)


# What is hidden.


def poisoned(x: Inputs) -> tuple[Inputs, dict[str, Any]]:
    """The last keys and values NaN or infinite, hidden from all by the mask."""
    bad = {name: t if t is None else t.clone() for name, t in x.items()}
    bad["key"][:, :, -3:], bad["value"][:, :, -3:] = torch.nan, torch.inf
    return bad, {}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "options", [{}, {"right": 0}, {"softcap": 5.0}, {"dropout_p": 0.3}, {"weights": "each"}, {"left": 4, "right": 4}]
)
@pytest.mark.parametrize("rows", [1, 33])
def test_nan_behind_the_mask_is_not_seen(rows: int, options: dict[str, Any]) -> None:
    x = draw(mask=(2, 1, rows, 40), bias=(1, 4, 33, 40))
    x["mask"][..., -3:] = False
    upper = cotangents(x, "out weights", **options)
    expected = ours(x, upper, bias_gradient=True, **options)
    got = ours(poisoned(x)[0], upper, bias_gradient=True, **options)
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "tiles"])
@pytest.mark.parametrize("name", ["query", "key", "value", "dout"])
def test_nan_is_seen_by_those_who_may_and_by_nobody_else(name: str, softcap: float) -> None:
    clean = draw(M=4, Q=40)
    upper = cotangents(clean)
    x = dict(clean)
    dout = upper[0]
    if name == "dout":
        dout = dout.clone()
        dout[:, :, 20] = torch.nan
    else:
        x[name] = clean[name].clone()
        x[name][:, :, 20] = torch.nan
    (out, _, _), (dq, dk, dv, _) = ours(x, (dout, None, None), right=0, softcap=softcap)
    (out_, _, _), (dq_, dk_, dv_, _) = ours(clean, upper, right=0, softcap=softcap)
    position = torch.arange(40)
    of_query = position == 20 if name in ("query", "dout") else position >= 20  # who sees it
    of_key = {"query": position <= 20, "dout": position <= 20, "key": position < 0, "value": position < 0}[name]
    if name != "dout":
        assert torch.equal(out.isnan().all(-1), of_query.expand(2, 4, 40))
        torch.testing.assert_close(out[:, :, ~of_query], out_[:, :, ~of_query])
    assert torch.equal(dq.isnan().any(-1), of_query.expand(2, 4, 40))
    torch.testing.assert_close(dq[:, :, ~of_query], dq_[:, :, ~of_query])
    if name in ("query", "dout"):
        assert torch.equal(dv.isnan().any(-1), of_key.expand(2, 4, 40))
        torch.testing.assert_close(dk[:, :, 21:], dk_[:, :, 21:])
        torch.testing.assert_close(dv[:, :, 21:], dv_[:, :, 21:])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "options",
    [{}, {"right": 0}, {"softcap": 5.0}, {"weights": "each"}, {"weights": "mean"}, {"dropout_p": 0.3}, {"left": 2}],
)
@pytest.mark.parametrize("kind", ["key mask", "mask", "bias"])
def test_a_query_that_sees_nothing_is_zero(kind: str, options: dict[str, Any]) -> None:
    x = draw(mask=(2, 1, 1, 40) if kind == "key mask" else (2, 1, 33, 40), dtype=torch.float32)
    if kind == "key mask":
        x["mask"][0], x["mask"][1, ..., :9] = False, False
    else:
        x["mask"][:, :, 5:9] = False
    if kind == "bias":
        x["bias"], x["mask"] = torch.zeros(2, 1, 33, 40).masked_fill(~x["mask"], -torch.inf), None
    check(x, "out weights", **options)
    out, lse, _ = ours(x, **options)
    assert (lse == -torch.inf).any()
    assert not out[lse == -torch.inf].any()


def test_large_scores_and_masks_of_finite_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        least = torch.finfo(dtype).min
        x = draw(dtype=dtype, mask=(2, 1, 33, 40))
        x["bias"] = torch.zeros(2, 1, 33, 40, dtype=dtype).masked_fill(~x["mask"], least)
        x["mask"] = None
        check(x, scale=15.0)
        check(x, scale=15.0, right=0, weights="each")


# Memory.


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for t in tree_leaves(made):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return made


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"mask": (1, 1, 1, 4096)}, {"right": 0}),
        ({}, {"right": 0, "lower_right": True, "softcap": 5.0}),
        ({}, {"left": 100, "right": 0}),
        ({"E": 8}, {"dropout_p": 0.1}),
        ({"bias": (1, 2, 1, 4096)}, {}),
    ],
)
def test_no_table_of_scores(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    x = draw(B=1, N=2, M=1, Q=2048, K=4096, D=4, **{"E": 4} | sizes, dtype=torch.float32)
    with Largest() as largest:
        ours(x, (torch.ones(1, 2, 2048, sizes.get("E", 4)), None, None), x["bias"] is not None, **options)
    most = max(blockwise.TILE, flash.MASK_SIZE)
    assert 0 < largest.elements <= most < 2 * 2048 * 4096


def test_flash_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile is computed where ATen's kernel means the same, and the kernel is not asked where it does not."""
    calls = []
    for name in ("_forward", "_backward"):
        kernel = getattr(flash, name)
        monkeypatch.setattr(
            flash, name, lambda *a, kernel=kernel, name=name, **k: calls.append(name) or kernel(*a, **k)
        )
    x = draw(mask=(2, 1, 1, 40))
    for options in ({}, {"right": 0}, {"left": 3, "right": 3}, {"right": 0, "lower_right": True}):
        calls.clear()
        ours(x, cotangents(x), **options)
        assert set(calls) == {"_forward", "_backward"}
    for options in ({"softcap": 5.0}, {"dropout_p": 0.1}):
        calls.clear()
        ours(x, cotangents(x, **options), **options)
        assert not calls
    # Weights that were returned have no part in the gradient of the output.
    for kinds, expected in (("out", ["_backward"]), ("out weights", [])):
        calls.clear()
        ours(x, cotangents(x, kinds, weights="mean"), weights="mean")
        assert calls == expected
