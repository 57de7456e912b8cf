"""Laws of attention that need no second computation to compare with, on every implementation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.reference.attention import dropout_keep

from .support.attention_problems import DEVICE
from .support.poison import poisoned_buffers

pytest.importorskip("triton")

attention = fastseq.functional.scaled_dot_product_attention
B, N, Q, K, D = 2, 1, 20, 40, 8  # more than a tile of the kernels' keys
NOW = 25


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


@pytest.fixture(autouse=True, params=["reference", "torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastseq.use(request.param):
        yield request.param


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE).requires_grad_()


def inputs(Q: int = Q, K: int = K, heads: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, heads, Q, D), draw(B, N, K, D), draw(B, N, K, D)


def coins(*shape: int, p: float = 0.5) -> Tensor:
    return torch.rand(*shape, device=DEVICE) < p


def gradients(result: Tensor, *leaves: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result)
    return torch.autograd.grad(result, leaves, weights)


def with_gradients(*leaves: Tensor, **options: Any) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of query, key, value and, as a fourth leaf, a bias."""
    if len(leaves) > 3:
        options["bias"] = leaves[3]
    out, lse = attention(*leaves[:3], return_lse=True, **options)
    loss = torch.cat([out, lse.masked_fill(lse.isinf(), 0.0)[..., None]], -1)
    return [out, lse, *gradients(loss, *leaves)]


def assert_close(found: Any, expected: Any) -> None:
    """All numbers here are near 1 in float32: what differs is the order of sums."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def assert_equal(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------- parts and the whole


@pytest.mark.parametrize("at", [1, 33])
def test_parts_of_the_keys_merge_by_their_log_sum_exp(at: int) -> None:
    """Gradients as well, so that of the log-sum-exp is right."""
    q, k, v = inputs()
    mask = coins(B, 1, Q, K)
    mask[:, :, 3, :at] = False  # a row that sees nothing of the first part
    whole, lse = attention(q, k, v, mask, return_lse=True)
    parts = [
        attention(q, k[:, :, part], v[:, :, part], mask[..., part], return_lse=True)
        for part in (slice(0, at), slice(at, K))
    ]
    together = torch.stack([part[1] for part in parts]).logsumexp(0)
    merged = sum(out * (of - together).exp()[..., None] for out, of in parts)
    assert_close([merged, together], [whole, lse])
    assert_close(gradients(merged, q, k, v), gradients(whole, q, k, v))


def test_one_query_at_a_time_is_the_whole() -> None:
    """As in decoding: the last query sees the last key."""
    q, k, v = inputs(Q=3)
    whole = attention(q, k, v, causal="lower_right")
    steps = [attention(q[:, :, i : i + 1], k[:, :, : K - 2 + i], v[:, :, : K - 2 + i]) for i in range(3)]
    assert_close([torch.cat(steps, 2)], [whole])


def test_one_query_against_many_keys(implementation: str) -> None:
    q, k, v = inputs(Q=1, K=300)
    mask = coins(B, 1, 1, 300, p=0.9)
    found = with_gradients(q, k, v, attn_mask=mask)
    with fastseq.use("reference"):
        assert_close(found, with_gradients(q, k, v, attn_mask=mask))


def test_the_order_of_the_keys_does_not_matter() -> None:
    q, k, v = inputs()
    mask, bias, order = coins(B, 1, Q, K), draw(1, N, Q, K), torch.randperm(K, device=DEVICE)
    straight = with_gradients(q, k, v, bias, attn_mask=mask)
    bias_there = bias.detach()[..., order].requires_grad_()
    there = [t.detach()[:, :, order].requires_grad_() for t in (k, v)]
    shuffled = with_gradients(q, *there, bias_there, attn_mask=mask[..., order])
    out, lse, dq, dk, dv, dbias = straight
    assert_close(shuffled, [out, lse, dq, dk[:, :, order], dv[:, :, order], dbias[..., order]])


def test_the_order_of_the_batch_is_that_of_the_output() -> None:
    q, k, v = inputs()
    mask, upstream, order = coins(B, 1, Q, K), torch.randn(B, N, Q, D).to(DEVICE), [1, 0]
    out = attention(q, k, v, mask)
    there = [t.detach()[order].requires_grad_() for t in (q, k, v)]
    shuffled = attention(*there, mask[order])
    straight = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    assert_equal([shuffled, *torch.autograd.grad(shuffled, there, upstream[order])], [t[order] for t in straight])


def test_grouped_heads_are_repeated_heads() -> None:
    q, k, v = inputs(heads=3)
    grouped = with_gradients(q, k, v, enable_gqa=True, causal="lower_right")
    repeated = [t.detach().repeat_interleave(3, 1).requires_grad_() for t in (k, v)]
    out, lse, dq, dk, dv = with_gradients(q, *repeated, causal="lower_right")
    assert_close(grouped, [out, lse, dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)])


def test_ways_to_say_the_same() -> None:
    q, k, v = inputs()
    same = {
        "upper left": [{"is_causal": True}, {"causal": "upper_left"}],
        "lower right": [{"causal": "lower_right"}, {"window": (-1, 0)}, {"window": (K, 0)}],
        "window": [{"window": 5}, {"window": (5, 5)}],
        "everything": [{}, {"window": (-1, -1)}, {"window": (K, K)}],
    }
    for ways in same.values():
        first, *others = (with_gradients(q, k, v, **way) for way in ways)
        for other in others:
            assert_close(other, first)


def test_a_band_is_a_mask() -> None:
    q, k, v = inputs()
    offset = torch.arange(K, device=DEVICE) - torch.arange(Q, device=DEVICE)[:, None]
    for options, low, high in (
        ({"is_causal": True}, -K, 0),
        ({"causal": "lower_right"}, -K, K - Q),
        ({"is_causal": True, "window": 9}, -9, 0),
        ({"causal": "lower_right", "window": (0, 3)}, K - Q, K - Q),
        ({"window": (9, 4)}, K - Q - 9, K - Q + 4),
    ):
        assert_close(
            with_gradients(q, k, v, **options), with_gradients(q, k, v, attn_mask=(offset >= low) & (offset <= high))
        )


def test_what_is_added_to_a_row_is_added_to_its_log_sum_exp() -> None:
    q, k, v = inputs()
    plain = with_gradients(q, k, v)
    raised = with_gradients(q, k, v, bias=torch.full((Q, 1), 3.0, device=DEVICE))
    assert_close(raised, [plain[0], plain[1] + 3.0, *plain[2:]])


def test_a_large_cap_is_none() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v, softcap=1e4), attention(q, k, v, window=K), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------- what is not seen


@pytest.mark.parametrize("future", [7.0, torch.nan, torch.inf])
def test_the_future_is_invisible(future: float, implementation: str) -> None:
    q, k, v = inputs(Q=K)
    plain = with_gradients(q, k, v, is_causal=True)
    changed = [t.detach().clone() for t in (k, v)]
    for t in changed:
        t[:, :, NOW:] = future
    seen = with_gradients(q, *(t.requires_grad_() for t in changed), is_causal=True)
    # Bit by bit; but what comes out as NaN is computed once more, with care, in steps that round differently.
    same = assert_equal if implementation == "reference" or future == 7.0 else assert_close
    same([t[:, :, :NOW] for t in seen[:3]], [t[:, :, :NOW] for t in plain[:3]])
    assert future == 7.0 or seen[0][:, :, NOW:].isnan().all()


def test_the_future_has_no_gradient() -> None:
    """And none comes back from it."""
    q, k, v = inputs(Q=K)
    out = attention(q, k, v, is_causal=True)
    dq, dk, dv = gradients(out[:, :, :NOW], q, k, v)
    for t in (dq, dk, dv):
        assert not t[:, :, NOW:].any()
    short = [t.detach()[:, :, :NOW].requires_grad_() for t in (q, k, v)]
    expected = gradients(attention(*short, is_causal=True), *short)
    assert_close([t[:, :, :NOW] for t in (dq, dk, dv)], expected)


@pytest.mark.parametrize(
    ("behind", "side", "softcap"),
    [(torch.nan, "left", None), (torch.nan, "right", 3.0), (torch.inf, "right", None), (torch.inf, "left", 3.0)],
)
def test_padding_is_invisible(behind: float, side: str, softcap: float | None) -> None:
    q, k, v = inputs()
    length = torch.tensor([30, 7], device=DEVICE)[:, None]
    position = torch.arange(K, device=DEVICE)
    mask = (position < length if side == "right" else position >= K - length)[:, None, None]
    hidden = ~mask[:, 0, 0]
    clean = with_gradients(q, k, v, attn_mask=mask, softcap=softcap)
    padded = [t.detach().clone() for t in (k, v)]
    for t in padded:
        t.transpose(1, 2)[hidden] = behind
    seen = with_gradients(q, *(t.requires_grad_() for t in padded), attn_mask=mask, softcap=softcap)
    assert_close(seen, clean)
    for t in seen[3:]:
        assert not t.transpose(1, 2)[hidden].any()
    for b in range(B):  # as if the row had been alone, with nothing behind it
        keys = mask[b, 0, 0]
        alone = attention(q[b : b + 1], k[b : b + 1, :, keys], v[b : b + 1, :, keys], softcap=softcap)
        assert_close([seen[0][b : b + 1]], [alone])


def test_a_dense_mask_hides_nan() -> None:
    """A key that some see and some do not: its NaN reaches those who see it, and nobody else."""
    q, k, v = inputs()
    mask = coins(B, N, Q, K)
    mask[..., 0], mask[:, :, 5, 11], mask[:, :, 6, 11] = True, True, False
    with torch.no_grad():
        plain, lse = attention(q, k, v, mask, return_lse=True)
        k[:, :, 11], v[:, :, 11] = torch.nan, torch.nan
        seen, seen_lse = attention(q, k, v, mask, return_lse=True)
    sees = mask[..., 11]
    assert seen[sees].isnan().all()
    assert seen_lse[sees].isnan().all()
    assert_close([seen[~sees], seen_lse[~sees]], [plain[~sees], lse[~sees]])


def test_nan_behind_the_mask_of_others_leaves_their_gradients() -> None:
    """NaN in a value that only some see spoils no gradient of another query."""
    q, k, v = inputs()
    mask = torch.ones(Q, K, dtype=torch.bool, device=DEVICE)
    mask[:9, 33] = False
    clean = gradients(attention(q, k, v, mask), q)[0]
    with torch.no_grad():
        v[:, :, 33] = torch.nan
    (dq,) = gradients(attention(q, k, v, mask), q)
    assert_close([dq[:, :, :9]], [clean[:, :, :9]])


EMPTY: dict[str, Any] = {
    "bool": lambda rows: {"attn_mask": ~rows[:, None]},
    "bool, all keys": lambda rows: {"attn_mask": (~rows[:, None]).expand(Q, K)},
    "float": lambda rows: {"attn_mask": torch.zeros(Q, K, device=DEVICE).masked_fill(rows[:, None], -torch.inf)},
    "bias": lambda rows: {"bias": torch.zeros(Q, 1, device=DEVICE).masked_fill(rows[:, None], -torch.inf)},
    "mask and causal": lambda rows: {
        "attn_mask": ~rows[:, None] & (torch.arange(K, device=DEVICE) >= 0), "causal": "lower_right"
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EMPTY)
def test_a_row_that_sees_nothing_is_zero(kind: str) -> None:
    """Its output and every gradient; and garbage in it reaches nobody."""
    rows = torch.zeros(Q, dtype=torch.bool, device=DEVICE)
    rows[[0, 5, 6, Q - 1]] = True
    q, k, v = inputs()
    upstream = torch.randn(B, N, Q, D).to(DEVICE)

    def run(q: Tensor, upstream: Tensor) -> list[Tensor]:
        out, weights, lse = attention(q, k, v, return_weights=True, return_lse=True, **EMPTY[kind](rows))
        return [out, weights, lse, *torch.autograd.grad(out, (q, k, v), upstream)]

    found, spoil = run(q, upstream), rows[:, None].expand(Q, D)
    # A product with NaN plus -inf is NaN: only a bool mask hides it.
    garbage = 1e4 if kind in ("float", "bias") else torch.nan
    spoilt = q.detach().masked_fill(spoil, garbage).requires_grad_()
    assert_close(run(spoilt, upstream.masked_fill(spoil, torch.nan)), found)
    out, weights, lse, dq, dk, dv = found
    for t in (out, weights, dq):
        assert not t[:, :, rows].any()
        assert t[:, :, ~rows].any(-1).all()
    assert (lse[:, :, rows] == -torch.inf).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_more_queries_than_keys_leave_rows_that_see_nothing() -> None:
    q, k, v = inputs(Q=K, K=30)
    out, lse, dq, dk, dv = with_gradients(q, k, v, causal="lower_right")
    empty = K - 30
    assert not out[:, :, :empty].any()
    assert (lse[:, :, :empty] == -torch.inf).all()
    assert not dq[:, :, :empty].any()
    short = [q.detach()[:, :, empty:].requires_grad_(), k, v]
    expected = with_gradients(*short, causal="lower_right")
    assert_close([out[:, :, empty:], lse[:, :, empty:]], expected[:2])
    assert all(t.isfinite().all() for t in (dk, dv))


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_whole_batch_that_sees_nothing(mask: str) -> None:
    q, k, v = inputs()
    visible = torch.tensor([True, False], device=DEVICE)[:, None, None, None]
    given = visible if mask == "bool" else torch.zeros(visible.shape, device=DEVICE).masked_fill(~visible, -torch.inf)
    out, lse, *found = with_gradients(q, k, v, attn_mask=given)
    for t in (out, *found):
        assert not t[1].any()
        assert t[0].any()
    assert (lse[1] == -torch.inf).all()


def test_no_keys_and_no_queries() -> None:
    out, lse, *found = with_gradients(*inputs(K=0))
    assert out.shape == (B, N, Q, D)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not found[0].any()
    out, lse, *found = with_gradients(*inputs(Q=0))
    assert (out.shape, lse.shape) == ((B, N, 0, D), (B, N, 0))
    assert not found[1].any()
    assert not found[2].any()


# ------------------------------------------------------------------------------------------- sums


def test_rows_of_the_scores_gradient_sum_to_zero() -> None:
    """A softmax does not see what is added to a whole row."""
    q, k, v = inputs()
    bias = draw(B, N, Q, K)
    (ds,) = gradients(attention(q, k, v, coins(B, 1, Q, K), bias=bias), bias)
    assert ds.abs().sum(-1).max() > 0.1
    torch.testing.assert_close(ds.sum(-1), torch.zeros(B, N, Q, device=DEVICE), atol=1e-5, rtol=0)


def test_the_gradient_of_the_log_sum_exp_is_the_weights() -> None:
    q, k, v = inputs()
    bias = draw(B, N, Q, K)
    _, weights, lse = attention(q, k, v, coins(B, 1, Q, K), bias=bias, return_weights=True, return_lse=True)
    (found,) = torch.autograd.grad(lse.masked_fill(lse.isinf(), 0.0).sum(), bias)
    assert_close([found], [weights])


def test_weights_sum_to_one() -> None:
    q, k, v = inputs()
    mask = coins(B, 1, Q, K)
    mask[0, :, 4] = False
    out, weights = attention(q, k, v, mask, return_weights="each")
    _, mean = attention(q, k, v, mask, return_weights="mean")
    sums = torch.ones(B, N, Q, device=DEVICE)
    sums[0, :, 4] = 0
    assert not weights.masked_select(~mask).any()
    assert (weights >= 0).all()
    assert_close([weights.sum(-1), weights @ v, weights.mean(1)], [sums, out, mean])


def test_values_of_one_give_one() -> None:
    q, k, _ = inputs()
    ones = torch.ones(B, N, K, 3, device=DEVICE)
    assert_close([attention(q, k, ones, window=4)], [torch.ones(B, N, Q, 3, device=DEVICE)])


# ------------------------------------------------------------------------------------------- dropout


def kept(seed: int, rows: int, columns: int, p: float) -> Tensor:
    return dropout_keep(
        torch.tensor([seed], device=DEVICE), torch.arange(B * N, device=DEVICE).view(B, N), rows, columns, p
    )


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3])
def test_dropout_is_a_function_of_the_seed(seed: int) -> None:
    q, k, v = inputs()
    plain, whole = attention(q, k, v, return_weights=True)
    out, weights = attention(q, k, v, dropout_p=0.3, seed=seed, return_weights=True)
    keep = kept(seed, Q, K, 0.3)
    assert torch.equal(weights != 0, keep)
    assert_close([weights, out], [whole * keep / 0.7, weights @ v])
    again = attention(q, k, v, dropout_p=0.3, seed=torch.tensor(seed, device=DEVICE), return_weights=True)
    assert_equal(again, (out, weights))
    other = attention(q, k, v, dropout_p=0.3, seed=seed + 1)
    assert (other - out).abs().max() > 0.01
    assert (out - plain).abs().max() > 0.01


def test_dropout_draws_its_seed_from_torchs_generator() -> None:
    q, k, v = inputs()
    torch.manual_seed(5)
    first, second = (attention(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_as_often_as_it_says(p: float) -> None:
    """Within five standard deviations of the binomial; of every row of the pattern, and of every column, too."""
    q, k, v = inputs()
    drawn = [attention(q, k, v, dropout_p=p, seed=seed, return_weights=True)[1] != 0 for seed in range(3)]
    share = torch.stack(drawn).double()
    for dims in ((0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3), (0, 3, 4)):
        found = share.mean(dims)
        count = share.numel() // found.numel()
        assert ((found - (1 - p)).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all()


def test_what_is_dropped_is_dropped_in_a_larger_problem() -> None:
    """Whatever the tiles: rows and columns are counted, not tiles."""
    q, k, v = (t[:1] for t in inputs(Q=200, K=200))
    small = attention(q[:, :, :70], k[:, :, :90], v[:, :, :90], dropout_p=0.4, seed=9, return_weights=True)[1] != 0
    large = attention(q, k, v, dropout_p=0.4, seed=9, return_weights=True)[1] != 0
    assert torch.equal(large[:, :, :70, :90], small)


def test_dropping_everything_leaves_zero() -> None:
    q, k, v = inputs()
    out, weights, lse = attention(q, k, v, dropout_p=1.0, return_weights=True, return_lse=True)
    assert not out.any()
    assert not weights.any()
    torch.testing.assert_close(lse, attention(q, k, v, return_lse=True)[1])
    for t in gradients(out, q, k, v):
        assert not t.any()


def test_dropout_is_the_same_in_the_gradient() -> None:
    """Where a weight is dropped, its value gets nothing from that row."""
    q, k, v = inputs()
    out = attention(q, k, v, dropout_p=0.5, seed=3)
    for i in (0, 17, Q - 1):
        (dv,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
        assert torch.equal(dv[..., 0] != 0, kept(3, Q, K, 0.5)[:, :, i])


def test_repeated_bit_for_bit() -> None:
    q, k, v = inputs(heads=2)
    bias = draw(1, 2, Q, K)
    options = {"attn_mask": coins(B, 1, Q, K), "dropout_p": 0.2, "seed": 7, "softcap": 4.0, "causal": "lower_right"}
    first, second = (with_gradients(q, k, v, bias, enable_gqa=True, **options) for _ in range(2))
    assert_equal(second, first)
