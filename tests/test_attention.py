"""Attention through the public function, on every implementation, against the definition in float64."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

import fastseq
from fastseq.reference import attention as reference

from .support import attention_problems as problems
from .support.attention_problems import DEVICE, HALF, ON_GPU, Case, all_cases, assert_as_good, assert_right, few_cases
from .support.poison import poisoned_buffers

pytest.importorskip("triton")

attention = fastseq.functional.scaled_dot_product_attention
IMPLEMENTATIONS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


# ------------------------------------------------------------------------------------------- the oracle is right


@pytest.mark.parametrize("case", [c for c in all_cases() if c.dtype == torch.float64], ids=str)
def test_the_oracle_is_the_formula(case: Case) -> None:
    """And, where torch's operator can be asked, that one."""
    made = problems.problem(case)
    exact = problems.outcome(problems.by_definition, made, made.at(torch.float64))
    ways = [problems.by_formula, *[problems.by_torch] * problems.torch_means_the_same(case)]
    for way in ways:
        found = problems.outcome(way, made, made.at(torch.float64))
        for name, value in found.items():
            assert_as_good(value, exact[name], exact[name], f"{way.__name__}: {name}", slack=256.0)


def test_the_oracle_differentiates() -> None:
    q, k, v = draw(2, 4, 3, 2), draw(2, 2, 5, 2), draw(2, 2, 5, 3)
    bias, mask = draw(1, 4, 3, 5), torch.rand(2, 1, 3, 5, device=DEVICE) < 0.6
    mask[1, :, 1] = False

    def all_of_it(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, lse, weights = reference.attention(
            q, k, v, bias, mask=mask, seed=torch.tensor([3], device=DEVICE), scale=0.7, left=2, right=1,
            softcap=2.0, dropout_p=0.3, weights="each",
        )  # fmt: skip
        return out, lse.masked_fill(lse.isinf(), 0.0), weights

    assert torch.autograd.gradcheck(all_of_it, (q, k, v, bias))


def test_the_oracle_drops_what_its_description_says() -> None:
    """The hash in whole numbers of Python."""

    def mixed(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ x >> shift) * factor % 2**32
        return x

    def kept(seed: int, head: int, i: int, j: int, p: float) -> bool:
        of_head = mixed(mixed((head * 0x9E3779B9 + seed) % 2**32) ^ (seed >> 32) % 2**32)
        first = mixed((of_head + i * 0x85EBCA77) % 2**32)
        x = first ^ j * 0x9E3779B9 % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32 ^ mixed((first + 0xC2B2AE3D) % 2**32)
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        x ^= x >> 16
        return (x - 2**32 if x >= 2**31 else x) >= round(p * 2**32) - 2**31

    for seed in (0, 1, -1, 2**62 + 12345):
        heads = torch.tensor([[0, 1], [7, 70000]])
        found = reference.dropout_keep(torch.tensor([seed]), heads, 9, 11, 0.4)
        where = itertools.product(range(2), range(2), range(9), range(11))
        assert all(found[b, n, i, j] == kept(seed, int(heads[b, n]), i, j, 0.4) for b, n, i, j in where)


# ------------------------------------------------------------------------------------------- everything in the budget


def shares() -> list[Any]:
    """Each implementation's cases; all of a case next to each other, for they share what is expected."""
    found = []
    for turn, case in enumerate(all_cases()):
        ways = ["reference", "torch", *["auto"] * (turn % 4 == 0), *["triton"] * (ON_GPU and case.dtype.itemsize < 8)]
        found += [pytest.param(way, case, id=f"{way} {case}") for way in ways]
    return found + [pytest.param("triton", case, id=f"triton {case}") for case in few_cases()]


@pytest.mark.parametrize(("implementation", "case"), shares())
def test_within_budget(implementation: str, case: Case) -> None:
    assert_right(case, implementation)


def test_the_cases_cover_what_they_should() -> None:
    lengths = {0, 1, 17, 63, 64, 65, 127, 128, 129, 320}
    widths = {1, 8, 32, 40, 64, 80, 96, 128, 192, 256}
    for cases in (all_cases(), few_cases()):
        assert {c.lengths[0] for c in cases if c.lengths[0] == c.lengths[1]} >= lengths
        assert any(c.lengths[0] < c.lengths[1] for c in cases)
        assert any(c.lengths[0] > c.lengths[1] > 0 for c in cases)
        assert {c.widths[0] for c in cases} >= widths
        for a, b in itertools.combinations(set(problems.FLAGS) - {"heads"}, 2):
            met = {(getattr(c, a), getattr(c, b)) for c in cases}
            assert met >= set(itertools.product(problems.FLAGS[a], problems.FLAGS[b])), (a, b)


SHAPES = ["".join(letters) for letters in itertools.product("B1", "N1", "Q1", "K1")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_of_every_shape(implementation: str, shape: str) -> None:
    # With the log-sum-exp asked for, or what is the same for all keys would have a gradient of zero.
    case = Case(mask=f"bias {shape}", outputs="lse", lengths=(5, 20), causal="lower_right", heads=(2, 1))
    assert_right(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_in_float32_for_half_precision(implementation: str) -> None:
    q, k, v = (draw(1, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    bias = draw(2, 5, 5, dtype=torch.float32)
    with fastseq.use(implementation):
        found = attention(q, k, v, bias)
        (gradient,) = torch.autograd.grad(found.float().square().sum(), bias)
    wide = [t.detach().double() for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, bias.double())
    (expected,) = torch.autograd.grad(exact.square().sum(), bias)
    assert (found.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.double(), exact, atol=2e-2, rtol=0)
    torch.testing.assert_close(gradient, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_and_bias_both_float_add_up(implementation: str) -> None:
    q, k, v = (draw(1, 2, 5, 8, dtype=torch.float32) for _ in range(3))
    a, b = draw(5, 5, dtype=torch.float32), draw(2, 1, 5, dtype=torch.float32)
    with fastseq.use(implementation):
        found = torch.autograd.grad(attention(q, k, v, a, bias=b).square().sum(), (q, k, v, a, b))
        expected = torch.autograd.grad(attention(q, k, v, a + b).square().sum(), (q, k, v, a, b))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# Shapes of query, key, value and mask as torch takes them.
FEWER = {
    "2-D": ((5, 8), (7, 8), (7, 4), (5, 7)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 4), (3, 5, 7)),
    "3-D, mask 2-D": ((3, 5, 8), (3, 7, 8), (3, 7, 4), (5, 7)),
    "5-D": ((2, 3, 1, 5, 8), (2, 3, 1, 7, 8), (2, 3, 1, 7, 4), (2, 1, 1, 5, 7)),
    "5-D, mask 2-D": ((1, 2, 2, 5, 8), (1, 2, 2, 7, 8), (1, 2, 2, 7, 4), (5, 7)),
    "batches broadcast": ((2, 2, 5, 8), (1, 2, 7, 8), (2, 2, 7, 4), (2, 1, 1, 7)),
    "heads broadcast": ((1, 4, 5, 8), (1, 1, 7, 8), (1, 1, 7, 4), (4, 5, 7)),
    "mask of one": ((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 4), (1, 1)),
}


@pytest.mark.parametrize("shapes", FEWER)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dimensions_as_torch_takes_them(implementation: str, shapes: str) -> None:
    q, k, v, bias = (draw(*shape, dtype=torch.float32) for shape in FEWER[shapes])
    with fastseq.use(implementation):
        found = attention(q, k, v, bias)
        gradients = torch.autograd.grad(found.square().sum(), (q, k, v, bias))
        out, weights, lse = attention(q, k, v, bias, return_lse=True, return_weights=True)
    exact = F.scaled_dot_product_attention(q, k, v, bias)
    expected = torch.autograd.grad(exact.square().sum(), (q, k, v, bias))
    for x, y in zip((found, *gradients), (exact, *expected), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
    assert torch.equal(out, found)
    assert weights.shape == (*out.shape[:-1], 7)
    assert lse.shape == out.shape[:-1]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_results_lie_as_projections_read_them(implementation: str) -> None:
    """What our operator returns are views of ``[B, T, N, D]``: joining the heads copies nothing."""
    q, k, v = (draw(2, 2, 5, 8, dtype=torch.float32) for _ in range(3))
    with fastseq.use(implementation):
        out = attention(q, k, v, window=2, softcap=5.0)
    for t in (out, *torch.autograd.grad(out.square().sum(), (q, k, v))):
        assert t.transpose(1, 2).is_contiguous()


# ------------------------------------------------------------------------------------------- packed sequences

PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window_size": (-1, 0)},
    "window": {"window_size": (3, 2)},
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "all": {"window_size": (20, 0), "softcap": 2.0, "dropout_p": 0.4, "seed": 5},
}
LENGTHS_Q, LENGTHS_K = (3, 0, 17, 5, 4), (8, 2, 17, 0, 70)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What packing means: each sequence by itself, and zeros for the tokens after the last."""
    N, drops = q.shape[1], options.get("dropout_p", 0.0)
    left, right = options.get("window_size", (-1, -1))
    outs, lses, i, j = [], [], 0, 0
    for z, (length_q, length_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        a, (b, c) = q[i : i + length_q], (t[j : j + length_k].repeat_interleave(N // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("ind,jnd->nij", a, b) * options.get("scale", q.shape[2] ** -0.5)
        if "softcap" in options:
            scores = options["softcap"] * (scores / options["softcap"]).tanh()
        offset = torch.arange(length_k) - torch.arange(length_q)[:, None] - (length_k - length_q)
        hidden = (offset < -left) & (left >= 0) | (offset > right) & (right >= 0)
        scores = scores.masked_fill(hidden.to(DEVICE), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        if drops:
            heads = torch.arange(N) + z * N
            kept = reference.dropout_keep(torch.tensor([options["seed"]]), heads, length_q, length_k, drops)
            weights = weights * kept.to(DEVICE) / (1 - drops)
        outs.append(torch.einsum("nij,jne->ine", weights, c))
        lses.append(scores.logsumexp(-1).T)
        i, j = i + length_q, j + length_k
    rest = q.shape[0] - i
    return (
        torch.cat([*outs, q.new_zeros(rest, N, v.shape[2])]),
        torch.cat([*lses, q.new_full((rest, N), -torch.inf)]),
    )


@pytest.mark.parametrize("options", PACKED)
@pytest.mark.parametrize("implementation", ["reference", "torch", "auto", "triton"])
def test_packed_is_one_by_one(implementation: str, options: str) -> None:
    numbers = [draw(31, 2, 16), draw(99, 1, 16), draw(99, 1, 8)]  # tokens to spare at the end
    starts = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (LENGTHS_Q, LENGTHS_K)]
    starts = [t.to(DEVICE, torch.int32) for t in starts]
    gradients = draw(31, 2, 8), draw(31, 2)
    results = {}
    for kind, dtype in (("exact", torch.float64), ("peer", torch.float32), ("got", torch.float32)):
        q, k, v = (t.detach().float().to(dtype).requires_grad_() for t in numbers)
        if kind == "got":
            with fastseq.use(implementation):
                out, lse = fastseq.functional.varlen_attn(
                    q, k, v, *starts, 17, 70, enable_gqa=True, return_aux=AuxRequest(lse=True), **PACKED[options]
                )
        else:
            out, lse = one_by_one(q, k, v, PACKED[options])
        weighed = (out * gradients[0]).sum() + (lse.masked_fill(lse.isinf(), 0.0) * gradients[1]).sum()
        results[kind] = out, lse, *torch.autograd.grad(weighed, (q, k, v))
    for name, got, exact, peer in zip(
        ("output", "lse", "q", "k", "v"), *(results[k] for k in ("got", "exact", "peer")), strict=True
    ):
        assert_as_good(got.detach(), exact.detach(), peer.detach().nan_to_num(0.0, neginf=-torch.inf), name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_packed_in_half_precision(implementation: str, dtype: torch.dtype) -> None:
    """Sequences of one length are a batch."""
    q, k, v = (draw(2, 20, 2, 16, dtype=dtype) for _ in range(3))
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    with fastseq.use(implementation):
        packed = fastseq.functional.varlen_attn(*(t.flatten(0, 1) for t in (q, k, v)), starts, starts, 20, 20)
        batched = attention(*(t.transpose(1, 2) for t in (q, k, v)), return_lse=True)[0]
    found, expected = (torch.autograd.grad(t.float().square().sum(), (q, k, v)) for t in (packed, batched))
    for x, y in zip((packed, *found), (batched.transpose(1, 2).flatten(0, 1), *expected), strict=True):
        torch.testing.assert_close(x, y, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
