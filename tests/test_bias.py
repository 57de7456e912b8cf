"""Attention biases as objects: each against formulas of its own, and every implementation against their dense form."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.library import opcheck
from torch.nn.attention.varlen import AuxRequest
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq.bias import T5, ALiBi, Bias, Dense, Order, Segments, TransformerXL, Window
from fastseq.functional import scaled_dot_product_attention, varlen_attn
from fastseq.reference.attention import dropout_keep

from .support.budget import assert_within_budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("auto", "torch", "reference")
SEED = 12345
B, N, M, Q, K, D = 2, 4, 2, 19, 37, 8
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def whole(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, device=DEVICE)


# ---------------------------------------------------------------------------------------- what a bias says it adds

LENGTHS = ((5, 5), (4, 9), (9, 4), (1, 12), (40, 300))


def rows(Q: int, K: int) -> tuple[Tensor, Tensor]:
    """q ``[1, 2, Q, 4]`` and k ``[1, 2, K, 4]``."""
    return draw(1, 2, Q, 4), draw(1, 2, K, 4)


@pytest.mark.parametrize(("Q", "K"), LENGTHS)
def test_alibi_is_a_slope_times_the_distance(Q: int, K: int) -> None:
    expected = [[[s * (j - i - (K - Q)) for j in range(K)] for i in range(Q)] for s in (2**-4, 2**-8)]
    plain, symmetric = (ALiBi(2, symmetric).dense(*rows(Q, K))[0].cpu() for symmetric in (False, True))
    assert_close(plain, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert_close(symmetric, -torch.tensor(expected).double().abs(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_alibis_slopes_are_the_papers(heads: int) -> None:
    """For a power of two ``2**(-8 h / heads)``; else those of the power below, and the odd ones of the power above."""
    below = 2 ** int(math.log2(heads))
    expected = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    expected += [2 ** (-8 * h / (2 * below)) for h in range(1, 2 * below + 1, 2)][: heads - below]
    q, k = draw(1, heads, 1, 4), draw(1, heads, 2, 4)
    assert_close(-ALiBi(heads).dense(q, k)[0, :, 0, 0].cpu(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 64), (6, 5)])
def test_t5s_buckets_are_transformers(buckets: int, max_distance: int, bidirectional: bool) -> None:
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    table = torch.arange(buckets, dtype=torch.float64, device=DEVICE)[:, None].expand(-1, 2).contiguous()
    for Q, K in LENGTHS:
        for offset in (None, 0, 3, 500):
            start = K - Q if offset is None else offset
            positions = torch.arange(K)[None] - (torch.arange(Q) + start)[:, None]
            expected = theirs(positions, bidirectional, buckets, max_distance).double().expand(1, 2, Q, K)
            ours = T5(table, bidirectional=bidirectional, max_distance=max_distance, offset=offset)
            assert torch.equal(ours.dense(*rows(Q, K)).cpu(), expected)


def shifted(x: Tensor) -> Tensor:
    """The paper's trick: a column of zeros in front, and rows read one number later each."""
    *lead, Q, L = x.shape
    padded = torch.cat([x.new_zeros(*lead, Q, 1), x], -1)
    return padded.view(*lead, L + 1, Q)[..., 1:, :].reshape(*lead, Q, L)


@pytest.mark.parametrize(("Q", "K"), LENGTHS)
def test_transformer_xl_is_pad_and_view(Q: int, K: int) -> None:
    (q, k), r, u, w = rows(Q, K), draw(K, 2, 4), draw(2, 4), draw(2, 4)
    content = torch.einsum("bnid,bnjd->bnij", u[None, :, None].expand_as(q), k)
    position = torch.einsum("bnid,jnd->bnij", q + w[:, None], r)
    expected = (content + shifted(position)) / 2
    seen = torch.ones(Q, K, dtype=torch.bool, device=DEVICE).tril(K - Q)  # the trick is right where nothing is ahead
    assert_close(TransformerXL(r, u, w).dense(q, k)[..., seen], expected[..., seen])


@pytest.mark.parametrize(("Q", "K"), LENGTHS)
def test_keys_on_both_sides_are_xlnets_shift(Q: int, K: int) -> None:
    """Embeddings of the distances K to 1 - Q, and the paper's trick without the padding."""
    (q, k), r, w = rows(Q, K), draw(K + Q, 2, 4), draw(2, 4)
    position = torch.einsum("bnid,jnd->bnij", q + w[:, None], r)
    expected = position.reshape(1, 2, K + Q, Q)[..., 1:, :].reshape(1, 2, Q, K + Q - 1)[..., :K]
    assert_close(TransformerXL(r, None, w, zero=K).dense(q, k, scale=1.0), expected)


def test_the_conformer_counts_from_the_other_end() -> None:
    """Distances K - 1 to 1 - K, each query of K: ``zero=K - 1``."""
    (q, k), r, u, w = rows(7, 7), draw(13, 2, 4), draw(2, 4), draw(2, 4)
    found = TransformerXL(r, u, w, zero=6).dense(q, k, scale=1.0)
    for i in range(7):
        for j in range(7):
            expected = ((q[0, :, i] + w) * r[6 - (i - j)]).sum(-1) + (u * k[0, :, j]).sum(-1)
            assert_close(found[0, :, i, j], expected)


def test_segments_are_one_hot() -> None:
    (q, k), s, embed = rows(4, 9), draw(2, 4), draw(2, 2, 4)
    of_q, of_k = whole(3, 1, 4), whole(3, 1, 9)
    one_hot = torch.nn.functional.one_hot((of_q[:, :, None] != of_k[:, None]).long(), 2).double()
    expected = torch.einsum("bijs,bnis->bnij", one_hot, torch.einsum("bnid,snd->bnis", q + s[:, None], embed)) / 2
    assert_close(Segments(s, embed, of_q, of_k).dense(q, k), expected)


def test_order_hides_higher_ranks() -> None:
    rank_q, rank_k = whole(5, 1, 1, 4), whole(5, 1, 9)
    found = Order(rank_q, rank_k).dense(*rows(4, 9))
    for i in range(4):
        for j in range(9):
            assert (found[..., i, j] == (0.0 if rank_k[0, j] <= rank_q[0, 0, i] else -torch.inf)).all()


@pytest.mark.parametrize(
    ("window", "left", "right"), [((2,), 2, 2), ((3, 0), 3, 0), ((-1, 1), 99, 1), ((0, -1), 0, 99)]
)
def test_window_is_a_band(window: tuple[int, ...], left: int, right: int) -> None:
    found = Window(*window).dense(*rows(5, 8))
    for i in range(5):
        for j in range(8):
            assert (found[..., i, j] == (0.0 if -left <= j - i - 3 <= right else -torch.inf)).all()


def test_a_sum_is_the_sum_of_what_it_adds() -> None:
    (q, k), table, tensor = rows(4, 9), draw(8, 2), draw(4, 9)
    one, other = T5(table), Order(whole(3, 1, 1, 4), whole(3, 1, 9))
    expected = one.dense(q, k) + other.dense(q, k) + tensor
    for several in (one + other + tensor, tensor + one + other, one + (other + Dense(tensor))):
        assert_close(several.dense(q, k), expected)


# ------------------------------------------------------------------------------------------- everything in the budget


@dataclass(frozen=True)
class Case:
    """A bias of what is learned, by the shapes of that, and a call of attention that has it."""

    build: Callable[[Leaves], Bias]
    learned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    lengths: tuple[int, int] = (Q, K)
    options: dict[str, Any] = field(default_factory=dict)


def xl(t: Leaves, **options: Any) -> Bias:
    return TransformerXL(t["r"], t["u"], t["w"], **options)


XL = {"r": (K, M, D), "u": (N, D), "w": (N, D)}
OF_Q, OF_K = whole(2, B, Q).cpu(), whole(2, B, K).cpu()
RANK_Q, RANK_K = torch.arange(Q).flip(0).expand(B, N, Q) // 3 + torch.arange(N)[:, None], torch.arange(K)[None] % 11
MASK = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(1)) < 0.7
MASK[1, :, 2] = False


def segments(t: Leaves) -> Bias:
    return Segments(t["s"], t["embed"], OF_Q.to(DEVICE), OF_K.to(DEVICE))


def order() -> Bias:
    return Order(RANK_Q.to(DEVICE), RANK_K.to(DEVICE))


def t5(t: Leaves, **options: Any) -> Bias:
    return T5(t["table"], max_distance=12, **options)


TABLE, SEGMENTS = {"table": (8, N)}, {"s": (N, D), "embed": (2, M, D)}
CASES = {
    "ALiBi": Case(lambda _: ALiBi(N), {}, options={"causal": "lower_right"}),
    "ALiBi, learned": Case(lambda t: ALiBi(t["slopes"], symmetric=True), {"slopes": (N,)}),
    "T5": Case(t5, TABLE),
    "T5, more queries": Case(t5, TABLE, (K, Q)),
    "T5, causal": Case(lambda t: t5(t, bidirectional=False), TABLE, options={"causal": "lower_right"}),
    "T5, offset": Case(lambda t: t5(t, offset=3), TABLE, options={"dropout_p": 0.3, "seed": SEED}),
    "T5, one for all": Case(t5, {"table": (8, 1)}, options={"attn_mask": MASK, "return_lse": True}),
    "Transformer-XL": Case(xl, XL, options={"causal": "lower_right"}),
    "Transformer-XL, both sides": Case(lambda t: xl(t, zero=K), XL | {"r": (Q + K, N, D)}),
    "Transformer-XL, clamped": Case(lambda t: xl(t, zero=9), XL | {"r": (12, 1, D)}, options={"softcap": 3.0}),
    "Transformer-XL, bare": Case(lambda t: TransformerXL(t["r"], None, None), {"r": (B, K, M, D)}, (K, Q)),
    "segments": Case(segments, SEGMENTS),
    "segments, alike": Case(
        lambda t: Segments(None, t["embed"], OF_Q.to(DEVICE), OF_K.to(DEVICE)), {"embed": (2, 1, D)},
        options={"attn_mask": MASK, "is_causal": True, "return_weights": "mean"},
    ),
    "order": Case(lambda _: order(), options={"return_lse": True}),
    "XLNet": Case(
        lambda t: xl(t, zero=K) + segments(t) + order(), XL | SEGMENTS | {"r": (Q + K, M, D)},
        options={"dropout_p": 0.2, "seed": SEED, "return_lse": True},
    ),
    "T5 and ALiBi": Case(lambda t: t5(t) + ALiBi(N) + Window(9, 5), TABLE),
    "everything": Case(
        lambda t: t5(t) + t["penalty"] + xl(t) + segments(t) + order() + Window(20, -1),
        TABLE | XL | SEGMENTS | {"penalty": (N, 1, K)},
        options={"attn_mask": MASK, "softcap": 2.0, "dropout_p": 0.2, "seed": SEED, "return_weights": True,
                 "scale": -0.4},
    ),
}  # fmt: skip
HALVES = ("T5", "T5, offset", "Transformer-XL", "XLNet", "everything")


def outputs_of(case: Case, t: Leaves) -> tuple[Tensor, ...]:
    """As the public function is asked."""
    options = {name: o.to(DEVICE) if isinstance(o, Tensor) else o for name, o in case.options.items()}
    found = scaled_dot_product_attention(
        t["query"], t["key"], t["value"], enable_gqa=True, bias=case.build(t), **options
    )
    return found if isinstance(found, tuple) else (found,)


def formula(case: Case, t: Leaves, fused: bool = False) -> tuple[Tensor, ...]:
    """As a user of torch would write it, of what the bias says it adds, in the dtype of the tensors.

    ``fused``: the weights follow from the log-sum-exp, as fused attention has them for the gradients.
    """
    query, (key, value) = t["query"], (t[name].repeat_interleave(N // M, 1) for name in ("key", "value"))
    (Q, K), o = case.lengths, case.options
    scale = o.get("scale", D**-0.5)
    seen = torch.ones(Q, K, dtype=torch.bool, device=DEVICE)
    if "causal" in o or "is_causal" in o:
        seen = seen.tril(K - Q if "causal" in o else 0)
    seen = seen if "attn_mask" not in o else seen & o["attn_mask"].to(DEVICE)
    parts = case.build(t).parts
    scores = query @ key.mT * scale
    for part in parts:
        if part.kind == "position":
            scores = scores + part.dense(query, t["key"], scale)
    if "softcap" in o:
        scores = o["softcap"] * (scores / o["softcap"]).tanh()
    for part in parts:
        if part.kind != "position":
            scores = scores + part.dense(query, t["key"], scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp() if fused else scores.softmax(-1)
    weights = weights.masked_fill(empty, 0.0)
    if "dropout_p" in o:
        heads = torch.arange(B * N, device=DEVICE).view(B, N)
        kept = dropout_keep(torch.tensor([SEED], device=DEVICE), heads, Q, K, o["dropout_p"])
        weights = weights * kept / (1 - o["dropout_p"])
    found = [(weights.to(value.dtype) @ value)]
    if "return_weights" in o:
        found.append(weights.mean(1) if o["return_weights"] == "mean" else weights)
    if "return_lse" in o:
        lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
        found.append(lse.masked_fill(empty[..., 0], -torch.inf))
    return tuple(found)


def leaves_of(case: Case) -> Leaves:
    """float64 tensors that the narrowest dtype holds exactly: only the computation differs between dtypes."""
    Q, K = case.lengths
    shapes = {"query": (B, N, Q, D), "key": (B, M, K, D), "value": (B, M, K, D), **case.learned}
    return {name: draw(*shape).bfloat16().double() for name, shape in shapes.items()}


def outcome(way: Callable[..., tuple[Tensor, ...]], case: Case, leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """Outputs and gradients of everything."""
    x = {name: leaf.detach().to(dtype, copy=True).requires_grad_() for name, leaf in leaves.items()}
    outputs = way(case, x)
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for t in outputs:
        cotangent = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        loss = loss + (t.masked_fill(t == -torch.inf, 0.0).double() * cotangent).sum()
    gradients = torch.autograd.grad(loss, list(x.values()))
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(x, gradients, strict=True)}


def assert_right(name: str, way: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    leaves = leaves_of(case)
    exact = outcome(formula, case, leaves, torch.float64)
    # How far torch is off is luck, too: the worse of two ways to write it counts.
    peers = [outcome(way, case, leaves, dtype) for way in (formula, partial(formula, fused=True))]
    with fastseq.use(way):
        got = outcome(outputs_of, case, leaves, dtype)
    for what, t in got.items():
        infinite = exact[what].isinf()
        assert torch.equal(t.isinf(), infinite), what
        got_here, right, *others = (
            x.masked_fill(infinite, 0.0) for x in (t, exact[what], *(peer[what].to(t.dtype) for peer in peers))
        )
        peer = max(others, key=lambda x, right=right: (x - right).abs().max())
        assert_within_budget(got_here, right, peer, what)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_every_implementation_is_the_formula(way: str, name: str) -> None:
    assert_right(name, way, torch.float32)


@pytest.mark.parametrize("name", ["T5, causal", "Transformer-XL", "order"])
def test_the_kernels_are_the_formula(name: str) -> None:
    """Where the public function reaches them; their own tests go through everything."""
    pytest.importorskip("triton")
    from .support.interpreter import quick_interpreter

    with quick_interpreter():
        assert_right(name, "triton", torch.float32)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("way", ["torch", "reference"])
def test_half_precision(way: str, name: str) -> None:
    assert_right(name, way, torch.bfloat16)


PACKED = {
    "ALiBi": Case(lambda _: ALiBi(N)),
    "T5": Case(t5, TABLE),
    "Transformer-XL": Case(xl, XL | {"r": (9, M, D)}),
    "both": Case(lambda t: t5(t, bidirectional=False) + xl(t), TABLE | XL),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("way", WAYS)
def test_packed_sequences_are_apart(way: str, name: str) -> None:
    case, lengths_q, lengths_k = PACKED[name], (5, 0, 17, 3), (9, 4, 17, 2)
    shapes = {"query": (25, N, D), "key": (32, M, D), "value": (32, M, D), **case.learned}
    t = {name: draw(*shape) for name, shape in shapes.items()}
    starts = [torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (lengths_q, lengths_k)]
    with fastseq.use(way):
        out, lse = varlen_attn(
            t["query"], t["key"], t["value"], *starts, 17, 17, enable_gqa=True, bias=case.build(t),
            window_size=(-1, 0), return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    for z in range(4):
        rows_q, rows_k = (slice(int(s[z]), int(s[z + 1])) for s in starts)
        q, k, v = (t[n][at].transpose(0, 1)[None] for n, at in (("query", rows_q), ("key", rows_k), ("value", rows_k)))
        with fastseq.use("reference"):
            expected = scaled_dot_product_attention(
                q, k, v, enable_gqa=True, causal="lower_right", bias=case.build(t), return_lse=True
            )
        assert_close(out[rows_q].transpose(0, 1)[None], expected[0])
        assert_close(lse[rows_q].transpose(0, 1)[None], expected[1])
    with fastseq.use("reference"):
        again = varlen_attn(
            t["query"], t["key"], t["value"], *starts, 17, 17, enable_gqa=True, bias=case.build(t), window_size=(-1, 0)
        )
    wanted = list(t.values())
    cotangent = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, wanted, cotangent), torch.autograd.grad(again, wanted, cotangent))


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["T5", "ALiBi, learned", "Transformer-XL", "XLNet", "everything"])
@pytest.mark.parametrize("way", ["torch", "reference"])
def test_gradients_are_finite_differences_twice(way: str, name: str) -> None:
    case = CASES[name]
    leaves = {n: t.detach().requires_grad_() for n, t in leaves_of(case).items()}

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        with fastseq.use(way):
            return tuple(t[t.isfinite()] for t in outputs_of(case, dict(zip(leaves, given, strict=True))))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_tables_gradient_sums_to_zero(way: str) -> None:
    """A row of the scores' gradient sums to zero, and where a row sees all, each of its scores has a bucket."""
    q, k, v, table = draw(B, N, Q, D), draw(B, N, K, D), draw(B, N, K, D), draw(8, N)
    with fastseq.use(way):
        out = scaled_dot_product_attention(q, k, v, bias=T5(table, max_distance=12))
    (gradient,) = torch.autograd.grad(out.sin().sum(), table)
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize("wanted", ["query", "table", "r", "s", "embed"])
def test_only_what_is_asked_for_gets_a_gradient(wanted: str) -> None:
    case = CASES["everything"]
    leaves = leaves_of(case)
    full = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    one = {n: t.detach().requires_grad_(n == wanted) for n, t in leaves.items()}
    expected = torch.autograd.grad(outputs_of(case, full)[0].sin().sum(), full[wanted])
    assert_close(torch.autograd.grad(outputs_of(case, one)[0].sin().sum(), one[wanted]), expected)


def test_transforms_see_through_it() -> None:
    q, k, v, table = (draw(N, Q, D).detach(), draw(N, K, D).detach(), draw(N, K, D).detach(), draw(3, 8, N).detach())

    def loss(table: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, bias=T5(table, max_distance=12)).sin().sum()

    expected = torch.stack([grad(loss)(t) for t in table])
    assert_close(vmap(grad(loss))(table), expected)
    tangent = torch.randn_like(table[0])
    assert_close(jvp(loss, (table[0],), (tangent,))[1], (expected[0] * tangent).sum())
    with fastseq.use("torch"), pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(loss, (table[0],), (tangent,))


# ----------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", ["ALiBi", "T5", "T5, causal", "Transformer-XL", "Transformer-XL, clamped"])
@pytest.mark.parametrize("way", WAYS)
def test_the_last_queries_of_a_long_call_are_a_call_with_memory(way: str, name: str) -> None:
    case = CASES[name]
    q, k, v = (draw(B, n, K, D) for n in (N, M, M))
    bias = case.build({n: draw(*shape) for n, shape in case.learned.items()})
    with fastseq.use(way):
        long = scaled_dot_product_attention(q, k, v, enable_gqa=True, bias=bias, causal="lower_right")
        for last in (1, 5, K - 1):
            found = scaled_dot_product_attention(
                q[:, :, -last:], k, v, enable_gqa=True, bias=bias, causal="lower_right"
            )
            assert_close(found, long[:, :, -last:])


@pytest.mark.parametrize("way", WAYS)
def test_a_table_goes_on_as_it_ends(way: str) -> None:
    q, k, v, r = draw(B, N, Q, D), draw(B, N, K, D), draw(B, N, K, D), draw(9, N, D)
    longer = torch.cat([r[:1].expand(K, -1, -1), r, r[-1:].expand(Q, -1, -1)])
    with fastseq.use(way):
        found = scaled_dot_product_attention(q, k, v, bias=TransformerXL(r, None, None, zero=6))
        expected = scaled_dot_product_attention(q, k, v, bias=TransformerXL(longer, None, None, zero=6 + K))
    assert_close(found, expected)
    cotangent = torch.randn_like(found)
    assert_close(torch.autograd.grad(found, r, cotangent), torch.autograd.grad(expected, r, cotangent))


@pytest.mark.parametrize("far", [-1000, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_an_offset_that_leaves_the_table_is_one_bucket(way: str, far: int) -> None:
    """Every key lies equally far then, and what all scores share changes nothing."""
    q, k, v, table = draw(B, N, Q, D), draw(B, N, K, D), draw(B, N, K, D), draw(8, N)
    with fastseq.use(way):
        found = scaled_dot_product_attention(q, k, v, bias=T5(table, max_distance=12, offset=far))
    assert_close(found, scaled_dot_product_attention(q, k, v))


def test_the_order_of_the_batch_is_that_of_the_output() -> None:
    case = CASES["XLNet"]
    t, turn = leaves_of(case), torch.tensor([1, 0], device=DEVICE)

    def run(t: Leaves, at: Tensor) -> Tensor:
        rank_q, rank_k = RANK_Q.to(DEVICE)[at], RANK_K.to(DEVICE)
        bias = xl(t, zero=K) + Segments(t["s"], t["embed"], OF_Q.to(DEVICE)[at], OF_K.to(DEVICE)[at])
        bias = bias + Order(rank_q, rank_k)
        return scaled_dot_product_attention(t["query"][at], t["key"][at], t["value"][at], enable_gqa=True, bias=bias)

    assert_close(run(t, turn), run(t, turn.flip(0))[turn])


@pytest.mark.parametrize("way", WAYS)
def test_an_order_is_causal_attention_of_the_reordered(way: str) -> None:
    """XLNet's content stream, and its query stream, which sees less by the token itself, from heads that share keys."""
    q, k, v = draw(B, 2, K, D), draw(B, 2, K, D), draw(B, 2, K, D)
    sequence = torch.stack([torch.randperm(K) for _ in range(B)]).to(DEVICE)
    rank = sequence.argsort(-1)  # which place in the order each token has
    streams = torch.stack([rank, rank - 1], 1).repeat(1, 2, 1)  # [B, 4, K]: two heads of two streams each
    both = q.repeat_interleave(2, 1)
    with fastseq.use(way):
        found = scaled_dot_product_attention(both, k, v, enable_gqa=True, bias=Order(streams, rank))

    def ordered(x: Tensor) -> Tensor:
        return x.gather(2, sequence[:, None, :, None].expand_as(x))

    content = scaled_dot_product_attention(*map(ordered, (q, k, v)), is_causal=True)
    before = torch.ones(K, K, dtype=torch.bool, device=DEVICE).tril(-1)
    blind = scaled_dot_product_attention(*map(ordered, (q, k, v)), attn_mask=before)
    assert_close(ordered(found[:, ::2]), content)
    assert_close(ordered(found[:, 1::2]), blind)
    assert not found[:, 1::2].detach().gather(2, sequence[:, None, :1, None].expand(-1, 2, -1, D)).any()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_hidden_has_no_influence(way: str) -> None:
    """NaN in a table where no query sees a key that far, or in what an order hides."""
    case = CASES["Transformer-XL"]
    t = leaves_of(case)
    with torch.no_grad():
        t["r"] = torch.cat([t["r"], torch.full_like(t["r"][:3], torch.nan)])
        t["table"] = draw(16, N).masked_fill(torch.arange(16, device=DEVICE)[:, None] >= 9, torch.nan)  # ahead
    t = {name: x.detach().requires_grad_() for name, x in t.items()}

    def run(bias: Bias) -> Tensor:
        with fastseq.use(way):
            return scaled_dot_product_attention(
                t["query"], t["key"], t["value"], enable_gqa=True, causal="lower_right", bias=bias
            )

    found = run(xl(t, zero=K - 1) + T5(t["table"], max_distance=20))
    t_clean = {name: torch.nan_to_num(x.detach()).requires_grad_() for name, x in t.items()}
    expected = run(xl(t_clean, zero=K - 1) + T5(t_clean["table"], max_distance=20))
    assert_close(found, expected)
    for g in torch.autograd.grad(found.sum(), list(t.values())):
        assert g.isfinite().all()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(K - 1, K)])
def test_a_rank_beyond_int32_is_the_highest(rows: slice) -> None:
    q, k, v = (draw(1, 1, K, D) for _ in range(3))
    rank = torch.arange(K, device=DEVICE)[None].clone()
    rank[:, rows] = 2**40
    found = scaled_dot_product_attention(q, k, v, bias=Order(torch.full((1, 1, K), 50, device=DEVICE), rank))
    seen = torch.ones(K, dtype=torch.bool, device=DEVICE)
    seen[rows] = False
    assert_close(found, scaled_dot_product_attention(q, k, v, seen.expand(K, K)))


# ------------------------------------------------------------------------------------------------- ways and memory


def test_what_attention_has_arguments_for_goes_their_way() -> None:
    """A window or a tensor as an object is that argument: the same bits from the same node."""
    q, k, v, tensor = draw(B, N, Q, D), draw(B, N, K, D), draw(B, N, K, D), torch.randn(Q, K).to(DEVICE, torch.float64)
    same: list[tuple[Bias, dict[str, Any]]] = [
        (Window(4), {"window": 4}),
        (Window(4, 0), {"window": (4, 0)}),
        (Dense(tensor), {"bias": tensor}),
        (Dense(tensor) + tensor + Window(-1, 3), {"bias": tensor + tensor, "window": (-1, 3)}),
    ]
    for bias, keywords in same:
        found, expected = (scaled_dot_product_attention(q, k, v, **o) for o in ({"bias": bias}, keywords))
        assert torch.equal(found, expected)
        assert found.grad_fn.name() == expected.grad_fn.name()


class Largest(TorchDispatchMode):
    """The most numbers that any result of an operator of torch has."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes():
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return results


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels are launched on what a mode may not see")
@pytest.mark.parametrize("name", ["ALiBi", "T5", "Transformer-XL", "segments", "order"])
def test_there_is_no_matrix_of_scores(name: str) -> None:
    T = 2048
    q, k, v = (draw(1, 1, T, D, dtype=torch.float32) for _ in range(3))
    ids = torch.arange(T)[None] // 7
    bias = {
        "ALiBi": lambda: ALiBi(1),
        "T5": lambda: T5(draw(32, 1, dtype=torch.float32)),
        "Transformer-XL": lambda: TransformerXL(draw(T, 1, D, dtype=torch.float32), None, None),
        "segments": lambda: Segments(None, draw(2, 1, D, dtype=torch.float32), ids, ids),
        "order": lambda: Order(ids[None], ids),
    }[name]()
    with Largest() as seen:
        scaled_dot_product_attention(q, k, v, causal="lower_right", bias=bias).sum().backward()
    assert seen.most <= T * T // 8


def test_explain_says_who_runs() -> None:
    head = torch.empty(1, N, 1, D)
    assert fastseq.functional.choose_attention(head, head, True, D).name in ("torch", "triton")
    if DEVICE.type == "cuda":
        wide = torch.empty(1, N, 1, 300, device=DEVICE)
        assert "300" in dict(fastseq.functional.choose_attention(head.to(DEVICE), wide, True, 300).others)["triton"]


# ---------------------------------------------------------------------------------------------- compilers and dtypes


def compiled(q: Tensor, k: Tensor, v: Tensor, table: Tensor, r: Tensor, u: Tensor, embed: Tensor) -> list[Tensor]:
    def attend(bias: Bias, **options: Any) -> Tensor:
        found: Tensor = scaled_dot_product_attention(q, k, v, enable_gqa=True, bias=bias, **options)
        return found

    of_q = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
    of_k = torch.arange(k.shape[2], device=q.device).expand(q.shape[0], -1)
    return [
        attend(T5(table, max_distance=12) + TransformerXL(r, u, None) + Dense(table[:1, :, None, None]), softcap=2.0),
        attend(Segments(None, embed, of_q // 3, of_k // 3) + Order(of_q[:, None], of_k % 5) + Window(3, -1)),
    ]


def of_sizes(B: int, Q: int, K: int) -> list[Tensor]:
    shapes = (B, N, Q, 3), (B, M, K, 3), (B, M, K, 5), (8, N), (21, M, 3), (N, 3), (2, N, 3)
    return [draw(*shape) for shape in shapes]


def with_gradients(run: Any, args: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = list(run(*args))
    return outputs, torch.autograd.grad(sum(t.cos().sum() for t in outputs), args)


def test_one_graph_serves_every_length_and_batch() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    once = torch.compile(compiled, fullgraph=True, dynamic=True, backend=counter)
    for count, size in enumerate(((6, 7, 9), (2, 11, 15))):
        args = of_sizes(*size)
        with torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            got = with_gradients(once, args)
        assert_close(got, with_gradients(compiled, args))
    operator = torch.ops.fastseq.attention.default
    assert sum(node.target is operator for node in counter.graphs[-1].graph.nodes) == 2


def test_export_with_dynamic_lengths() -> None:
    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(8, N, device=DEVICE))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = T5(self.table, max_distance=12) + ALiBi(N)
            found: Tensor = scaled_dot_product_attention(q, k, v, enable_gqa=True, bias=bias)
            return found

    def given(B: int, Q: int, K: int) -> tuple[Tensor, ...]:
        return tuple(t.detach().float() for t in of_sizes(B, Q, K)[:3])

    b, t, s, module = Dim("b", min=2), Dim("t", min=2), Dim("s", min=2), Attend()
    of = {"q": {0: b, 2: t}, "k": {0: b, 2: s}, "v": {0: b, 2: s}}
    program = torch.export.export(module, given(6, 7, 9), dynamic_shapes=of)
    for size in ((6, 7, 9), (2, 11, 15), (10, 8, 6)):
        q, k, v = given(*size)
        assert_close(program.module()(q, k, v), module(q, k, v))


def test_the_operators_pass_opcheck() -> None:
    q, k, v = (draw(2, n, 6 if n == N else 7, D) for n in (N, M, M))
    tensors = (
        q, k, v, None, draw(1, N, 5), draw(2, N, 6, 3), draw(1, M, 9, 3), draw(2, N, 6, 2), None, None, None,
        torch.tensor([3], device=DEVICE), *(whole(3, *s).int() for s in ((2, 6), (2, 7), (2, 1, 6), (1, 7))),
    )  # fmt: skip
    settings = (0.5, 5, 4, True, 1.5, 0.2, 6, 7, "mean", 2, 6, False, True)
    operator, backward = torch.ops.fastseq.attention.default, torch.ops.fastseq.attention_backward.default
    opcheck(operator, (*settings, *tensors, ""))
    out, lse, shown = operator(*settings, *tensors, "")
    grads = (out.detach().requires_grad_(), lse.detach(), shown.detach())
    # What is left out traces the formula's second gradient: ten seconds, which test_attention_compile spends.
    quick = "test_schema", "test_autograd_registration", "test_faketensor"
    opcheck(backward, (*settings, *grads, *tensors, out.detach(), lse.detach(), shown.detach(), ""), test_utils=quick)


@pytest.mark.parametrize("name", ["T5", "Transformer-XL", "XLNet"])
def test_autocast_casts_what_is_learned(name: str) -> None:
    case = CASES[name]
    t = {n: x.detach().float().requires_grad_() for n, x in leaves_of(case).items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outputs_of(case, t)[0]
    exact = outputs_of(case, {n: x.bfloat16() for n, x in t.items()})[0]
    assert found.dtype == torch.bfloat16
    assert_close(found, exact, atol=2e-2, rtol=2e-2)
    for n, g in zip(t, torch.autograd.grad(found.float().sum(), list(t.values())), strict=True):
        assert (g.dtype, g.shape) == (torch.float32, t[n].shape)


@pytest.mark.parametrize("shape", [(N, Q, D), (3, 2, N, Q, D)])
def test_fewer_and_more_dimensions(shape: tuple[int, ...]) -> None:
    q, table = draw(*shape), draw(8, N)
    bias = T5(table, max_distance=12)
    one = scaled_dot_product_attention(q, q, q, bias=bias)
    flat = q.reshape(-1, N, Q, D)
    assert_close(one, scaled_dot_product_attention(flat, flat, flat, bias=bias).reshape(shape))


# --------------------------------------------------------------------------------------------------------- mistakes


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def given(bias: Any, **options: Any) -> Any:
    return scaled_dot_product_attention(zeros(2, 4, 5, 8), *zeros(2, 2, 4, 7, 8), bias=bias, **options)


def packed(bias: Any) -> Any:
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    return varlen_attn(*zeros(3, 5, 4, 8), starts, starts, 3, 3, bias=bias)


R, U = zeros(9, 4, 8), zeros(4, 8)
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "slopes a string": (lambda: ALiBi("4"), TypeError, ("slopes", "str")),
    "slopes none": (lambda: ALiBi(0), ValueError, ("slopes", "0")),
    "slopes of other heads": (lambda: given(ALiBi(8)), RuntimeError, ("slopes", "4 heads", "8")),
    "slopes too many": (lambda: given(ALiBi(zeros(8))), RuntimeError, ("slopes", "[N=4]", "[8]")),
    "slopes whole": (lambda: given(ALiBi(zeros(4).int())), RuntimeError, ("slopes", "float32", "int32")),
    "table a list": (lambda: given(T5([[0.0]])), TypeError, ("table", "Tensor", "list")),
    "table of other heads": (lambda: given(T5(zeros(32, 8))), RuntimeError, ("table", "[buckets, N=4 or 1]")),
    "table 1-D": (lambda: given(T5(zeros(32))), RuntimeError, ("table", "[32]")),
    "table empty": (lambda: given(T5(zeros(0, 4))), RuntimeError, ("table", "[0, 4]")),
    "table small": (lambda: given(T5(zeros(3, 4))), ValueError, ("table", "4 buckets", "3")),
    "table of doubles": (lambda: given(T5(zeros(32, 4).double())), RuntimeError, ("table", "float32", "float64")),
    "table elsewhere": (lambda: given(T5(zeros(32, 4, device="meta"))), RuntimeError, ("table", "cpu", "meta")),
    "max_distance small": (lambda: given(T5(zeros(32, 4), max_distance=8)), ValueError, ("max_distance", "8")),
    "r of another width": (lambda: given(TransformerXL(zeros(9, 4, 6), U, U)), RuntimeError, ("r", "D=8]")),
    "r of three heads": (lambda: given(TransformerXL(zeros(9, 3, 8), U, U)), RuntimeError, ("r", "heads=1 or 2 or 4")),
    "r empty": (lambda: given(TransformerXL(zeros(0, 4, 8), U, U)), RuntimeError, ("r", "[0, 4, 8]")),
    "r of other batches": (lambda: given(TransformerXL(zeros(3, 9, 4, 8), U, U)), RuntimeError, ("r", "[3, 9, 4, 8]")),
    "u of another width": (lambda: given(TransformerXL(R, zeros(4, 6), U)), RuntimeError, ("u", "D=8]", "[4, 6]")),
    "w of three heads": (lambda: given(TransformerXL(R, U, zeros(3, 8))), RuntimeError, ("w", "heads=1 or 2 or 4")),
    "embed of three": (lambda: given(Segments(U, zeros(3, 4, 8), ids(2, 5), ids(2, 7))), RuntimeError, ("embed",)),
    "segment_q of keys": (
        lambda: given(Segments(U, zeros(2, 4, 8), ids(2, 7), ids(2, 7))), RuntimeError, ("segment_q", "[B=2, Q=5]"),
    ),
    "segment_k floats": (
        lambda: given(Segments(U, zeros(2, 4, 8), ids(2, 5), zeros(2, 7))), RuntimeError, ("segment_k", "int64"),
    ),
    "rank_q 2-D": (lambda: given(Order(ids(2, 5), ids(2, 7))), RuntimeError, ("rank_q", "[B=2 or 1, N=4 or 1, Q=5]")),
    "rank_k of queries": (lambda: given(Order(ids(1, 1, 5), ids(2, 5))), RuntimeError, ("rank_k", "K=7]", "[2, 5]")),
    "window negative": (lambda: given(Window(-2)), ValueError, ("window", "-2")),
    "window twice": (lambda: given(Window(2), window=3), ValueError, ("window", "another")),
    "two windows": (lambda: given(Window(2) + Window(3)), ValueError, ("Window", "two")),
    "two of Transformer-XL": (
        lambda: given(TransformerXL(R, U, U) + TransformerXL(R, U, U)), ValueError, ("TransformerXL", "two"),
    ),
    "a tensor of other sizes": (lambda: given(T5(zeros(32, 4)) + zeros(7, 5)), RuntimeError, ("bias", "[7, 5]")),
    "a sum with a number": (lambda: given(ALiBi(4) + 1.0), TypeError, ("+",)),
    "packed: a tensor": (lambda: packed(zeros(5, 5)), TypeError, ("bias", "Tensor")),
    "packed: an order": (lambda: packed(Order(ids(1, 1, 5), ids(1, 5))), ValueError, ("packed", "Order")),
    "packed: an offset": (lambda: packed(T5(zeros(32, 4), offset=2)), ValueError, ("packed", "T5")),
    "packed: a window": (lambda: packed(ALiBi(4) + Window(2)), ValueError, ("packed", "Window")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    call, kind, words = MISTAKES[mistake]
    with pytest.raises(kind) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value} does not say {missing}"
