"""Laws of the attention kernels' backward: under the interpreter, or on a GPU with the same tests."""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastseq.kernels.attention.backward import attention_backward
from fastseq.reference import attention as reference

from .support.budget import assert_within_budget
from .support.interpreter import quick_interpreter
from .support.poison import poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 products are exact under the interpreter whatever it is told.
ALLOW_TF32 = DEVICE.type == "cpu"
SEED = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
NAN = float("nan")
NOTHING: dict[str, Any] = {
    "scale": 0.3, "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0, "weights": "",
}  # fmt: skip
CAUSAL = {"right": 0}
NAMES = ("query", "key", "value", "bias")

LENGTHS = [*((n, n) for n in (0, 1, 17, 63, 64, 65, 127, 128, 129)), (1, 129), (129, 1), (17, 64), (65, 129), (128, 63)]
LENGTHS += [(0, 17), (17, 0)]
WIDTHS = [*((n, n) for n in (1, 8, 32, 40, 64, 80, 96, 128, 192, 256)), (40, 8), (16, 96)]
BROADCASTS = ["".join(letters) for letters in itertools.product("B1", "N1", "Q1", "K1")]
FEATURES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "right": (-1, 0, 3),
    "left": (-1, 5, 40),
    "lower_right": (False, True),
    "softcap": (0.0, 2.0),
    "dropout_p": (0.0, 0.3),
    "bias": (None, "BNQK", "111K", "1N1K"),
    "mask": (None, "BNQK", "B11K", "1NQ1"),
    "outputs": ("out", "out lse", "out each", "out mean lse"),
    "scale": (0.3, -0.2),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers(), quick_interpreter():
        yield


class Case:
    """Tensors of random numbers; what is exact, what torch makes of them at their dtype, and what the kernels do.

    The letters of bias and mask say which of their dimensions do not broadcast; outputs, what has a gradient.
    """

    def __init__(
        self,
        lengths: tuple[int, int] = (17, 33),
        widths: tuple[int, int] = (8, 8),
        heads: tuple[int, int] = (2, 2),
        dtype: torch.dtype = torch.float32,
        bias: str | None = None,
        mask: str | None = None,
        outputs: str = "out",
        B: int = 1,
        **options: Any,
    ) -> None:
        (Q, K), (D, E), (N, M), sizes = lengths, widths, heads, {"1": 1, "B": B}
        sizes |= dict(zip("NQK", (heads[0], *lengths), strict=True))
        self.options = NOTHING | options
        self.query, self.key, self.value = (
            torch.randn(shape, device=DEVICE).to(dtype) for shape in ((B, N, Q, D), (B, M, K, D), (B, M, K, E))
        )
        self.bias = None if bias is None else torch.randn([sizes[at] for at in bias], device=DEVICE).to(dtype)
        self.mask = None if mask is None else torch.rand([sizes[at] for at in mask], device=DEVICE) < 0.6
        asked = outputs.split()
        self.dout = torch.randn(B, N, Q, E, device=DEVICE).to(dtype) if "out" in asked else None
        self.dlse = torch.randn(B, N, Q, device=DEVICE) if "lse" in asked else None
        self.dweights: Tensor | None = None
        if "each" in asked:
            self.options["weights"], self.dweights = "each", torch.randn(B, N, Q, K, device=DEVICE).to(dtype)
        if "mean" in asked:
            self.options["weights"], self.dweights = "mean", torch.randn(B, Q, K, device=DEVICE).to(dtype)

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.value, self.bias) if t is not None]

    def differentiated(self, way: Any, dtype: torch.dtype) -> list[Tensor]:
        """The gradients of a way to compute attention, in a dtype."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.inputs]
        bias = leaves[3] if self.bias is not None else None
        results = way(*leaves[:3], bias, self.mask, None, None, SEED, **self.options)
        given = [
            (r.masked_fill(r == -torch.inf, 0.0), g.to(r.dtype))
            for r, g in zip(results, (self.dout, self.dlse, self.dweights), strict=True)
            if g is not None
        ]
        found = torch.autograd.grad([r for r, _ in given], leaves, [g for _, g in given], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    @torch.no_grad()
    def by_kernels(self, cu: tuple[Tensor | None, Tensor | None] = (None, None), **other: Any) -> list[Tensor]:
        """What the kernels make of what the reference's forward gives."""
        tensors = self.query, self.key, self.value, self.bias, *[None] * 4, self.mask, *cu, SEED, *[None] * 4
        out, lse, _ = reference.attention(*tensors, **self.options)
        longest = {"max_q": self.query.shape[2], "max_k": self.key.shape[2]} | other
        gradients = attention_backward(
            self.dout, self.dlse, self.dweights, *tensors, out, lse, **self.options, **longest,
            allow_tf32=ALLOW_TF32, bias_gradient=self.bias is not None, distance_gradient=False,
            distance_zero=0, position_zero=0,
        )  # fmt: skip
        assert (gradients[3] is None) == (self.bias is None)
        for gradient, like in zip(gradients, (self.query, self.key, self.value), strict=False):
            assert gradient.shape == like.shape
            assert gradient.transpose(1, 2).is_contiguous()
        return [g for g in gradients if g is not None]

    def check(self) -> list[Tensor]:
        exact = self.differentiated(definition, torch.float64)
        peers = [self.differentiated(formula, self.query.dtype)]
        if self.query.dtype == torch.float32:  # how far torch is off is luck, too: the worse of two ways counts
            peers.append(self.differentiated(functools.partial(formula, fused=True), self.query.dtype))
        peer = [max(some, key=lambda t, e=e: _error(t, e)) for e, *some in zip(exact, *peers, strict=True)]
        got = self.by_kernels()
        for name, one, right, other in zip(NAMES, got, exact, peer, strict=False):
            # Of a single key the weight is 1 whatever the score: dO.v - dO.out is 0 but for the rounding of either.
            if right.numel() and self.key.shape[2] == 1 and not right.any():
                dp = (self.dout.double().abs() @ self.value.double().abs().mT).max() * torch.finfo(one.dtype).eps
                assert one.abs().max() <= 2 * dp * abs(self.options["scale"]) * self.query.abs().max().clamp(min=5.0)
            else:
                assert_within_budget(one, right, other, f"gradient of {name}")
        return got


def definition(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, mask: Any, cu_q: Any, cu_k: Any, seed: Tensor, **options: Any
) -> Any:
    given = {"mask": mask, "cu_q": cu_q, "cu_k": cu_k, "seed": seed}
    return reference.attention(query, key, value, bias, **given, **options)


def formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, mask: Any, cu_q: None, cu_k: None, seed: Tensor,
    *, scale: float, left: int, right: int, lower_right: bool, softcap: float, dropout_p: float, weights: str,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a user of torch would write, in the dtype of the tensors.

    ``fused``: with the gradient as fused attention has it, where weights come from the log-sum-exp, and the sum that
    a softmax subtracts from the output.
    """
    (B, N, Q, _), (M, K) = query.shape, key.shape[1:3]
    key, value = (t.repeat_interleave(N // M, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    visible = reference.band(Q, K, left, right, lower_right, query.device)
    scores = scores.masked_fill(~(visible if mask is None else visible & mask), -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1)
    p = ((scores - lse[..., None].detach()).exp() if fused else scores.softmax(-1)).masked_fill(empty, 0.0)
    w = p
    if dropout_p:
        heads = torch.arange(B * N, device=query.device).view(B, N)
        w = p * reference.dropout_keep(seed, heads, Q, K, dropout_p) / (1 - dropout_p)
    out, shown = w @ value, w * 1
    if fused:
        sums: list[Tensor] = []
        out.register_hook(lambda g: sums.append((g * out.detach()).sum(-1, keepdim=True)))
        shown.register_hook(lambda g: sums.append((g * w.detach()).sum(-1, keepdim=True)))
        scores.register_hook(lambda g: g - p.detach() * sum(sums))
    return out, lse.masked_fill(empty[..., 0], -torch.inf), shown.mean(1) if weights == "mean" else shown


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max()) if exact.numel() else 0.0


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Cases in which any two levels of two factors meet: of random rows around a missing pair always the best."""
    draw, rows = random.Random(0), []
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]
    )

    def completed(row: dict[str, Any]) -> list[Any]:
        return [pair for pair in itertools.combinations(row.items(), 2) if pair in missing]

    while missing:
        around = dict(next(iter(missing)))
        drawn = [{name: draw.choice(levels) for name, levels in factors.items()} | around for _ in range(300)]
        rows.append(max(drawn, key=lambda row: len(completed(row))))
        for pair in completed(rows[-1]):
            del missing[pair]
    return rows


# --- every size, type and feature ---


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_length(lengths: tuple[int, int]) -> None:
    Case(lengths, heads=(1, 1)).check()
    Case(lengths, heads=(1, 1), right=0, left=40, lower_right=True).check()


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_head_width(widths: tuple[int, int]) -> None:
    Case((17, 40), widths, heads=(1, 1), scale=widths[0] ** -0.5, dtype=torch.bfloat16, **CAUSAL).check()
    if max(widths) <= 64:
        Case((17, 40), widths, heads=(1, 1), scale=widths[0] ** -0.5).check()


@pytest.mark.parametrize("row", pairwise(FEATURES), ids=str)
def test_features_in_pairs(row: dict[str, Any]) -> None:
    Case((20, 70), **row).check()


@pytest.mark.parametrize("bias", BROADCASTS)
def test_bias_of_every_broadcast_shape(bias: str) -> None:
    Case((20, 33), bias=bias, B=2, outputs="out lse", **CAUSAL).check()


def test_bias_over_several_tiles() -> None:
    for bias in ("1NQK", "11Q1", "1N1K", "1111"):
        Case((70, 140), bias=bias, outputs="out lse", heads=(2, 1), left=30, right=20, lower_right=True).check()


@pytest.mark.parametrize("outputs", ["lse", "each", "mean", "lse mean"])
def test_any_result_alone_has_gradients(outputs: str) -> None:
    Case((20, 70), (8, 8), (2, 1), outputs=outputs, bias="1NQK", dropout_p=0.2, right=40).check()


def test_no_result_with_a_gradient_gives_zeros() -> None:
    assert not any(gradient.any() for gradient in Case(outputs="none", bias="BNQK").by_kernels())


@pytest.mark.parametrize("sizes", [{"B": 0}, {"lengths": (0, 0)}, {"heads": (0, 0)}], ids=str)
def test_nothing_at_all(sizes: dict[str, Any]) -> None:
    case = Case(**sizes, bias="111K")
    for gradient, like in zip(case.by_kernels(), case.inputs, strict=True):
        assert gradient.shape == like.shape
        assert not gradient.any()


# --- laws ---


def test_rows_of_the_scores_gradient_sum_to_that_of_the_lse() -> None:
    case = Case(
        (40, 130), heads=(2, 1), bias="BNQK", mask="B11K", outputs="out lse mean", dropout_p=0.3, softcap=2.0, left=30
    )
    dbias = case.by_kernels()[3]
    seen = definition(*case.inputs, case.mask, None, None, SEED, **case.options)[1] > -torch.inf
    torch.testing.assert_close(dbias.sum(-1), case.dlse * seen, atol=2e-5, rtol=0)


def test_everything_dropped_has_no_gradient() -> None:
    assert not any(gradient.any() for gradient in Case(dropout_p=1.0, outputs="out each", bias="BNQK").by_kernels())


def test_the_same_bits_every_time() -> None:
    case = Case((33, 70), heads=(2, 1), bias="1NQK", mask="B11K", outputs="out mean", dtype=torch.bfloat16)
    for first, second in zip(case.by_kernels(), case.by_kernels(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("hiding", ["mask", "bias", "band"])
def test_a_query_that_sees_nothing_has_no_gradient(hiding: str) -> None:
    """Whatever comes in for it, NaN included."""
    case = Case((40, 33), mask="BNQK", bias="BNQK", outputs="out lse each", lower_right=True)
    rows = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    if hiding == "band":  # the first 7 queries are before the first key
        case.options["right"] = 0
        rows[:7] = True
    else:
        rows[3::5] = True
        if hiding == "mask":
            case.mask[:, :, rows] = False
        else:
            case.bias[:, :, rows] = -torch.inf
    case.mask |= rows[:, None] & (hiding != "mask") | (~rows[:, None] & (torch.arange(33, device=DEVICE) == 0))
    got = case.check()
    assert not got[0][:, :, rows].any()
    assert not got[3][:, :, rows].any()
    for gradient in (case.dout, case.dlse, case.dweights):
        gradient[:, :, rows] = NAN
    for poisoned, clean in zip(case.by_kernels(), got, strict=True):  # which sums in another order to avoid it
        torch.testing.assert_close(poisoned, clean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spoiled", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("hiding", ["causal", "window", "padding", "dense"])
def test_nan_reaches_only_who_sees_it(hiding: str, spoiled: str) -> None:
    Q, K, at = 50, 70, 37
    options = {
        "causal": CAUSAL,
        "window": {"left": 6, "right": 4},
        "padding": {"mask": "B11K"},
        "dense": {"mask": "11QK"},
    }
    case = Case((Q, K), heads=(2, 1), outputs="out lse", **options[hiding])
    visible = reference.band(Q, K, case.options["left"], case.options["right"], False, DEVICE)
    if hiding == "padding":
        case.mask[..., at] = False
    if hiding == "dense":
        case.mask[0, 0, ::3, at] = False
    if case.mask is not None:
        visible = visible & case.mask[0, 0]
    clean = case.by_kernels()
    getattr(case, spoiled)[0, :, at, 2] = NAN if hiding != "dense" else torch.inf

    queries = torch.arange(Q, device=DEVICE) == at
    if spoiled in ("query", "dout"):
        rows = queries & visible.any(1)
    else:
        rows = visible[:, at]  # these have NaN in their log-sum-exp or output
    columns = visible[rows].any(0)
    values = torch.zeros(K, 8, dtype=torch.bool, device=DEVICE)
    if spoiled in ("query", "key"):
        values |= columns[:, None]
    elif spoiled == "dout":
        values[columns, 2] = True
    expected = [rows[:, None].expand(Q, 8), columns[:, None].expand(K, 8), values]
    for name, got, before, bad in zip(NAMES, case.by_kernels(), clean, expected, strict=False):
        assert torch.equal(~got.isfinite(), bad.expand_as(got)), f"{spoiled} is seen in the wrong places of d{name}"
        torch.testing.assert_close(got.masked_fill(bad, 0.0), before.masked_fill(bad, 0.0), atol=1e-6, rtol=1e-5)


def test_hidden_bias_is_invisible() -> None:
    case = Case((33, 40), mask="BNQK", bias="BNQK")
    clean = case.by_kernels()
    case.bias = case.bias.masked_fill(~case.mask, NAN)
    for got, before in zip(case.by_kernels(), clean, strict=True):
        assert torch.equal(got, before)


def test_the_least_bias_there_is_counts_as_any_other() -> None:
    case = Case((17, 33), bias="B1QK")
    case.bias[..., 20:] = torch.finfo(torch.float32).min
    case.bias[:, :, 5:9] = torch.finfo(torch.float32).min  # all the same: as if there were none
    case.check()


def test_large_scores() -> None:
    Case((33, 40), scale=6.0, bias="BNQK").check()


# --- how tensors lie in memory ---


@pytest.mark.parametrize("layout", ["transposed", "columns", "fused", "expanded"])
def test_any_strides(layout: str) -> None:
    case = Case((33, 40), (8, 8), outputs="out lse", B=2, mask="B11K", bias="1NQK")
    for name in ("query", "key", "value", "dout", "bias", "mask"):
        tensor = getattr(case, name)
        if layout == "transposed":
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "columns":
            tensor = tensor.mT.contiguous().mT
        elif layout == "fused":
            wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
            wide[..., 1::2] = tensor
            tensor = wide[..., 1::2]
        else:
            tensor = tensor[:1].expand_as(tensor)
        setattr(case, name, tensor)
    strided = case.by_kernels()
    for name in ("query", "key", "value", "dout", "bias", "mask"):
        setattr(case, name, getattr(case, name).contiguous())
    for got, contiguous in zip(strided, case.by_kernels(), strict=True):
        assert torch.equal(got, contiguous)


# --- packed sequences ---


@pytest.mark.parametrize("options", [{}, {"right": 0, "lower_right": True, "dropout_p": 0.3, "softcap": 2.0}], ids=str)
def test_packed_sequences_are_apart(options: dict[str, Any]) -> None:
    """And what lies after the last of them belongs to none."""
    cu_q = torch.tensor([0, 5, 5, 75, 80], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 9, 20, 50, 50], dtype=torch.int32, device=DEVICE)
    case = Case((85, 60), heads=(4, 2), outputs="out lse", **options)

    def packed(q: Tensor, k: Tensor, v: Tensor, bias: None, mask: None, *_: Any, **kw: Any) -> Any:
        return definition(q, k, v, None, None, cu_q, cu_k, SEED, **kw)

    case.dlse[:, :, 75:] = 0.0  # of rows that see nothing
    case.dlse[:, :, :] *= packed(*case.inputs, None, None, **case.options)[1] > -torch.inf
    exact, peer = (case.differentiated(packed, dtype) for dtype in (torch.float64, torch.float32))
    case.dout[:, :, 80:] = NAN
    got = case.by_kernels((cu_q, cu_k), max_q=70, max_k=30)
    for name, *three in zip(NAMES, got, exact, peer, strict=False):
        assert_within_budget(*three, f"gradient of {name}")
