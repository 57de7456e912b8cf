"""PyTorch's own fused attention on a CPU with a hook on its node: second gradients, NaN, and nothing kept alive."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.functional import scaled_dot_product_attention
from fastseq.ops import native
from fastseq.reference.attention import band

B, N, Q, K, D = 2, 2, 5, 6, 3
SHOWN = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(3)) < 0.6
SHOWN[0, :, 2] = False
ADDED = torch.randn(N, Q, K, dtype=torch.double, generator=torch.Generator().manual_seed(4))
ARGUMENTS: dict[str, tuple[Tensor | None, bool]] = {
    "plain": (None, False),
    "causal": (None, True),
    "keys": (SHOWN[:, :, :1], False),
    "dense": (SHOWN, False),
    "float": (ADDED, False),
    "-inf": (ADDED.masked_fill(~SHOWN, -torch.inf), False),
    "keys and causal": (SHOWN[:, :, :1], True),
    "dense and causal": (SHOWN, True),
    "float and causal": (ADDED, True),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def inputs() -> list[Tensor]:
    return [draw(B, N, Q, D), draw(B, N, K, D), draw(B, N, K, D)]


def attend(name: str, way: str = "auto") -> Any:
    mask, is_causal = ARGUMENTS[name]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        with fastseq.use(way):
            return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)

    return run


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_is_pytorchs_own_node(name: str) -> None:
    assert attend(name)(*inputs()).grad_fn.name() == "ScaledDotProductFlashAttentionForCpuBackward0"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_reference_agrees_to_the_third_derivative(name: str) -> None:
    args = inputs()
    mine, theirs = ([attend(name, way)(*args)] for way in ("auto", "reference"))
    for _ in range(3):
        for found in (mine, theirs):
            found[:] = torch.autograd.grad(sum(t.sin().sum() for t in found), args, create_graph=True)
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_gradients_are_finite_differences_twice(name: str) -> None:
    assert torch.autograd.gradcheck(attend(name), inputs(), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend(name), inputs(), fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "causal", "dense", "keys and causal"])
@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(3), n)], ids=str)
def test_only_what_is_asked_for_gets_a_gradient(name: str, wanted: tuple[int, ...]) -> None:
    everything = inputs()
    expected = torch.autograd.grad(attend(name)(*everything).cos().sum(), everything)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(everything)]
    asked = [some[i] for i in wanted]
    found = torch.autograd.grad(attend(name)(*some).cos().sum(), asked, create_graph=True)
    assert_close(list(found), [expected[i] for i in wanted])
    assert all(g.requires_grad for g in found)


@pytest.mark.parametrize("name", ["plain", "causal", "float"])
def test_one_tensor_in_three_places(name: str) -> None:
    x = draw(B, N, Q, D)
    three = [x.detach().clone().requires_grad_() for _ in range(3)]
    mask, is_causal = ARGUMENTS[name]
    mask = None if mask is None else mask[..., :Q]

    def second(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = scaled_dot_product_attention(*tensors, mask, is_causal=is_causal)
        leaves = list(dict.fromkeys(tensors))
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(first).square().sum(), leaves)

    assert_close(second(x, x, x)[0], sum(second(*three)))


HIDING = ["causal", "keys", "dense", "keys and causal", "dense and causal"]


@pytest.mark.parametrize("where", range(4), ids=["query", "key", "value", "output gradient"])
@pytest.mark.parametrize("name", HIDING)
def test_nan_reaches_only_who_sees_it(name: str, where: int) -> None:
    """A row of NaN: queries that it is hidden from, and keys that only such queries see, have what they had."""
    mask, is_causal = ARGUMENTS[name]
    visible = torch.ones(B, N, Q, K, dtype=torch.bool) if mask is None else mask.expand(B, N, Q, K)
    check_nan(attend(name), visible.tril() if is_causal else visible, where)


def check_nan(run: Any, visible: Tensor, where: int) -> None:
    hidden_from_some = ~visible.flatten(0, 2).all(0)
    row = 2 if where in (0, 3) else int(hidden_from_some.nonzero()[-1])
    spoiled = torch.zeros(B, N, Q, dtype=torch.bool)
    if where in (0, 3):
        spoiled[:, :, row] = visible[:, :, row].any(-1)
    else:
        spoiled = visible[..., row]
    untouched = ~(visible & spoiled[..., None]).any(2)  # keys
    args, dout = inputs(), torch.randn(B, N, Q, D, dtype=torch.double)
    clean = run(*args)
    expected = [clean, *torch.autograd.grad(clean, args, dout)]
    (args[where].data if where < 3 else dout)[:, :, row] = torch.nan
    out = run(*args)
    found = [out, *torch.autograd.grad(out, args, dout)]
    alike = [~spoiled, ~spoiled, untouched, untouched]
    for mine, theirs, same in zip(found, expected, alike, strict=True):
        assert_close(mine[same], theirs[same])
    assert alike[1].any()
    if where == 3:
        assert_close(found[0], expected[0])
    elif where > 0:  # of a query that is NaN, and fewer keys than a vector holds, ATen's kernel makes 0
        assert found[0][spoiled].isnan().all()


KEYS = SHOWN[:, :, :1]
BEYOND: dict[str, dict[str, Any]] = {
    "window": {"window": 1},
    "to the left": {"window": (1, -1)},
    "lower right": {"causal": "lower_right"},
    "window and keys": {"window": 1, "attn_mask": KEYS},
    "window and bias": {"window": (2, 1), "bias": ADDED},
    "bias": {"bias": ADDED},
    "bias and keys": {"bias": ADDED, "attn_mask": KEYS},
    "bias, dense and causal": {"bias": ADDED, "attn_mask": SHOWN, "is_causal": True},
    "bias and float": {"bias": ADDED, "attn_mask": ADDED.square()},
}


@pytest.mark.parametrize("name", BEYOND)
def test_masks_beyond_pytorchs_are_still_its_own_node(name: str) -> None:
    args, keywords = inputs(), BEYOND[name]
    out = scaled_dot_product_attention(*args, **keywords)
    assert out.grad_fn.name() == "ScaledDotProductFlashAttentionForCpuBackward0"
    found = [out]
    with fastseq.use("reference"):
        expected = [scaled_dot_product_attention(*args, **keywords)]
    for _ in range(2):
        for each in (found, expected):
            each[:] = [each[0], *torch.autograd.grad(sum(t.sin().sum() for t in each), args, create_graph=True)]
        assert_close(found, expected)


@pytest.mark.parametrize("where", range(4), ids=["query", "key", "value", "output gradient"])
@pytest.mark.parametrize("name", [name for name in BEYOND if name not in ("bias", "bias and float")])
def test_nan_behind_masks_beyond_pytorchs(name: str, where: int) -> None:
    keywords = BEYOND[name]
    window, lower_right = keywords.get("window", (-1, -1)), "is_causal" not in keywords
    left, right = (window, window) if isinstance(window, int) else window
    right = 0 if {"causal", "is_causal"} & set(keywords) else right
    visible = band(Q, K, left, right, lower_right, torch.device("cpu")) & keywords.get("attn_mask", torch.tensor(True))
    check_nan(lambda *args: scaled_dot_product_attention(*args, **keywords), visible.expand(B, N, Q, K), where)


def test_a_band_made_in_inference_mode_serves_training() -> None:
    native._edges.cache_clear()
    args = inputs()
    with torch.inference_mode():
        scaled_dot_product_attention(*args, window=1)
    scaled_dot_product_attention(*args, window=1).sum().backward()
    assert all(t.grad is not None for t in args)


def test_large_masks_are_not_added_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LARGEST", B * N * Q * K - 1)
    args = inputs()
    out = scaled_dot_product_attention(*args, KEYS, bias=ADDED)
    assert "Flash" not in out.grad_fn.name(), "a graph would keep the sum"
    with torch.no_grad():
        assert_close(scaled_dot_product_attention(*args, KEYS, bias=ADDED), out)


def test_rows_at_the_least_number_share_their_weight() -> None:
    """A log-sum-exp beside finfo.min cannot hold log n; the weights are 1/n all the same."""
    args = [t.detach().float().requires_grad_() for t in inputs()]
    mask = torch.zeros(Q, K)
    mask[2] = torch.finfo(torch.float32).min
    dout = torch.randn(B, N, Q, D)
    grads = []
    for way in ("auto", "reference"):
        with fastseq.use(way):
            grads.append(torch.autograd.grad(scaled_dot_product_attention(*args, mask), args, dout))
    assert_close(grads[0], grads[1])


def test_nothing_is_kept_alive_by_the_hook() -> None:
    args = inputs()
    query = args[0] * 1
    out = attend("keys and causal")(query, *args[1:])
    alive = weakref.ref(query)
    del query
    assert alive() is not None, "autograd saved it"
    out.sum().backward()
    gc.collect()
    assert alive() is None, "and let go of it after backward, though the output is still there"
    assert out.isfinite().all()


def test_a_checkpoint_drops_and_recomputes() -> None:
    args = inputs()
    for name in ("plain", "dense", "keys and causal"):
        plain = torch.autograd.grad(attend(name)(*args).sin().sum(), args)
        again = checkpoint(attend(name), *args, use_reentrant=False)
        assert_close(torch.autograd.grad(again.sin().sum(), args), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_of_half_precision_are_not_taken_for_nan(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("computed anew")

    monkeypatch.setattr(native, "_anew", never)
    q, k = (torch.randn(1, 2, 64, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.full_like(q, 3e4).requires_grad_()
    out = native.attention(q, k, v, None, None, (-1, 0, False), None)
    assert out is not None
    out.sum().backward()
