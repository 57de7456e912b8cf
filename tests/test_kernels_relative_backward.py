"""Laws of the attention kernels' backward with relative positions, segments and ranks: see the tests without them."""

import functools
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
ALLOW_TF32 = DEVICE.type == "cpu"  # fp32 products are exact under the interpreter whatever it is told
SEED = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
NAN = float("nan")
GRADIENTS = ("query", "key", "value", "bias", "distance", "position_query", "position_key", "segment")
REST = ("mask", "cu_q", "cu_k", "seed", "segment_q", "segment_k", "rank_q", "rank_k")
CAUSAL = {"right": 0, "lower_right": True}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers(), quick_interpreter():
        yield


class Case:
    """Random tensors; what is exact, what torch makes of them at their dtype, and what the kernels do.

    distance: the table's first two letters, B, N or 1, its length and zero; position: B or 1, R, length and zero, None
    for a table in which each pair finds its own row. outputs: what has a gradient.
    """

    def __init__(
        self,
        lengths: tuple[int, int] = (17, 40),
        widths: tuple[int, int, int] = (8, 8, 8),
        heads: tuple[int, int] = (2, 2),
        dtype: torch.dtype = torch.float32,
        distance: tuple[str, int, int] | None = None,
        position: tuple[str, int, int | None, int] | None = None,
        segment: bool = False,
        ranks: str = "",
        bias: bool = False,
        mask: str = "",
        outputs: str = "out lse",
        B: int = 1,
        **options: Any,
    ) -> None:
        (Q, K), (D, E, P), (N, M), sizes = lengths, widths, heads, {"1": 1, "B": B, "N": heads[0]}
        sizes |= {"Q": Q, "K": K}
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(dtype)

        self.options: dict[str, Any] = {
            "scale": 0.3, "left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0,
            "weights": "", "distance_zero": distance[2] if distance else 0,
            "position_zero": position[3] if position else 0,
        } | options  # fmt: skip
        self.query, self.key, self.value = normal(B, N, Q, D), normal(B, M, K, D), normal(B, M, K, E)
        self.bias = normal(1, N, Q, K) if bias else None
        self.distance = normal(*(sizes[at] for at in distance[0]), distance[1]) if distance else None
        self.position_query = self.position_key = self.segment = None
        if position:
            of, R, length, _ = position
            if length is None:
                length, self.options["position_zero"] = Q + K - 1, K - 1
            self.position_query, self.position_key = normal(B, N, Q, P), normal(sizes[of], R, length, P)
        self.segment_q = self.segment_k = self.rank_q = self.rank_k = self.mask = None
        if segment:
            self.segment = normal(B, N, Q, 2)
            self.segment_q, self.segment_k = (torch.randint(0, 2, (B, n), device=DEVICE).int() for n in (Q, K))
        if ranks:
            self.rank_k = torch.argsort(torch.rand(sizes[ranks[0]], K, device=DEVICE)).int()
            self.rank_q = torch.randint(-1, K, [sizes[at] for at in ranks] + [Q], device=DEVICE).int()
        if mask:
            self.mask = torch.rand([sizes[at] for at in mask], device=DEVICE) < 0.6
        self.cu_q = self.cu_k = None
        self.seed = SEED
        asked = outputs.split()
        self.dout = normal(B, N, Q, E) if "out" in asked else None
        self.dlse = torch.randn(B, N, Q, device=DEVICE) if "lse" in asked else None
        self.dweights = normal(B, N, Q, K) if "each" in asked else None
        if "each" in asked:
            self.options["weights"] = "each"

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in GRADIENTS + REST}

    def differentiated(self, way: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The gradients of a way to compute attention, in a dtype."""
        tensors = self.tensors
        leaves = {name: tensors[name] for name in GRADIENTS if tensors[name] is not None}
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
        results = way(**tensors | leaves, **self.options)
        given = [
            (r.masked_fill(r == -torch.inf, 0.0), g.to(r.dtype))
            for r, g in zip(results, (self.dout, self.dlse, self.dweights), strict=True)
            if g is not None
        ]
        found = torch.autograd.grad([r for r, _ in given], list(leaves.values()), [g for _, g in given])
        return dict(zip(leaves, found, strict=True))

    @torch.no_grad()
    def by_kernels(self, **other: Any) -> dict[str, Tensor]:
        """What the kernels make of what the reference's forward gives."""
        tensors = self.tensors
        out, lse, _ = reference.attention(**tensors, **self.options)
        longest = {"max_q": self.query.shape[2], "max_k": self.key.shape[2]} | other
        gradients = attention_backward(
            self.dout, self.dlse, self.dweights, *tensors.values(), out, lse, **self.options, **longest,
            allow_tf32=ALLOW_TF32, bias_gradient=self.bias is not None, distance_gradient=self.distance is not None,
        )  # fmt: skip
        for name, gradient in zip(GRADIENTS, gradients, strict=True):
            assert (gradient is None) == (tensors[name] is None)
            assert gradient is None or (gradient.shape, gradient.dtype) == (tensors[name].shape, tensors[name].dtype)
        return {name: g for name, g in zip(GRADIENTS, gradients, strict=True) if g is not None}

    def check(self, **other: Any) -> dict[str, Tensor]:
        exact = self.differentiated(reference.attention, torch.float64)
        peers = [self.differentiated(formula, self.query.dtype)]
        if self.query.dtype == torch.float32:  # how far torch is off is luck, too: the worse of two ways counts
            peers.append(self.differentiated(functools.partial(formula, fused=True), self.query.dtype))
        got = self.by_kernels(**other)
        for name, right in exact.items():
            peer = max((some[name] for some in peers), key=lambda t, e=right: _error(t, e))
            assert_within_budget(got[name], right, peer, f"gradient of {name}")
        return got


def formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, distance: Any, position_query: Any, position_key: Any,
    segment: Any, mask: Any, cu_q: Any, cu_k: Any, seed: Tensor, segment_q: Any, segment_k: Any, rank_q: Any,
    rank_k: Any, *, scale: float, left: int, right: int, lower_right: bool, softcap: float, dropout_p: float,
    weights: str, distance_zero: int, position_zero: int, fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a user of torch would write, in the dtype of the tensors; ``fused``: see the tests without positions."""
    if cu_q is not None:
        return packed_formula(**locals())
    (B, N, Q, _), (M, K) = query.shape, key.shape[1:3]
    offset = torch.arange(K, device=DEVICE) - torch.arange(Q, device=DEVICE)[:, None] - (K - Q)
    key, value = (t.repeat_interleave(N // M, 1) for t in (key, value))
    scores = query @ key.mT
    if position_query is not None:
        table = position_key.repeat_interleave(N // position_key.shape[1], 1)
        at = (offset + position_zero).clamp(0, table.shape[2] - 1).expand(B, N, Q, K)
        scores = scores + (position_query @ table.mT).gather(-1, at)
    scores = scores * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    if distance is not None:
        scores = scores + distance[..., (offset + distance_zero).clamp(0, distance.shape[2] - 1)]
    if segment is not None:
        differs = segment_q[:, None, :, None] != segment_k[:, None, None]
        scores = scores + torch.where(differs, segment[..., 1:], segment[..., :1])
    visible = reference.band(Q, K, left, right, lower_right, DEVICE)
    if mask is not None:
        visible = visible & mask
    if rank_q is not None:
        visible = visible & (rank_k[:, None, None] <= rank_q[..., None])
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1)
    p = ((scores - lse[..., None].detach()).exp() if fused else scores.softmax(-1)).masked_fill(empty, 0.0)
    w = p
    if dropout_p:
        heads = torch.arange(B * N, device=DEVICE).view(B, N)
        w = p * reference.dropout_keep(seed, heads, Q, K, dropout_p) / (1 - dropout_p)
    out, shown = w @ value, w * 1
    if fused:
        sums: list[Tensor] = []
        out.register_hook(lambda g: sums.append((g * out.detach()).sum(-1, keepdim=True)))
        shown.register_hook(lambda g: sums.append((g * w.detach()).sum(-1, keepdim=True)))
        scores.register_hook(lambda g: g - p.detach() * sum(sums))
    return out, lse.masked_fill(empty[..., 0], -torch.inf), shown


def packed_formula(
    query: Tensor, key: Tensor, value: Tensor, position_query: Any, cu_q: Tensor, cu_k: Tensor, **rest: Any
) -> tuple[Tensor, Tensor, None]:
    """The formula of each sequence; without dropout, which would have to know the number of the sequence."""
    outs, lses, at = [], [], cu_q.tolist()
    for z, (q, k) in enumerate(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)):
        of_q, of_k = slice(at[z], at[z] + q), slice(int(cu_k[z]), int(cu_k[z]) + k)
        position = None if position_query is None else position_query[:, :, of_q]
        out, lse, _ = formula(
            query[:, :, of_q], key[:, :, of_k], value[:, :, of_k], position_query=position, cu_q=None, cu_k=None, **rest
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2), None


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max()) if exact.numel() else 0.0


CASES: dict[str, dict[str, Any]] = {
    "table of each batch and head": {"distance": ("BN", 56, 38), "B": 2},
    "saturated table": {"distance": ("1N", 9, 4), "lengths": (70, 33), "mask": "B11K", "heads": (1, 1), "B": 2},
    "one table for all": {"distance": ("11", 20, 19), "B": 2, "dropout_p": 0.3, **CAUSAL},
    "table of two entries": {"distance": ("1N", 2, 1), "left": 5, "right": 9},
    "table and bias": {"distance": ("1N", 30, 40), "bias": True, "softcap": 2.0},
    "table far away": {"distance": ("1N", 9, 400)},
    "all positions": {"position": ("1", 2, None, 0), "B": 2},
    "memory": {"position": ("1", 2, 40, 39), "B": 2, "dropout_p": 0.2, **CAUSAL},
    "clamped positions": {"position": ("1", 4, 7, 3), "heads": (4, 2), "lengths": (20, 65), "softcap": 2.0},
    "one head of positions": {"position": ("B", 1, 30, 10), "heads": (2, 1), "B": 2, "mask": "BNQK", "bias": True},
    "as many as keys": {"position": ("1", 2, 21, 20), "heads": (4, 2), "left": 9, "right": 3, "outputs": "out each"},
    "one position": {"position": ("1", 2, 1, 0), "distance": ("1N", 3, 1)},
    "other widths": {"position": ("1", 2, None, 0), "widths": (40, 16, 24), "distance": ("1N", 12, 8)},
    "segments": {"segment": True, "B": 2, "heads": (4, 2), "mask": "B11K"},
    "ranks": {"ranks": "BN", "B": 2, "heads": (4, 2), "outputs": "out lse each"},
    "ranks shared": {"ranks": "11", "B": 2, **CAUSAL},
    "all at once": {
        "position": ("1", 1, None, 0), "distance": ("B1", 9, 4), "segment": True, "ranks": "BN", "mask": "BNQK",
        "bias": True, "heads": (4, 2), "softcap": 2.0, "dropout_p": 0.2, "left": 20, "right": 15,
        "outputs": "out lse", "lengths": (20, 40),
    },
    "half": {
        "position": ("1", 2, None, 0), "segment": True, "ranks": "1N", "dtype": torch.bfloat16, "lengths": (33, 40)
    },
    "half table": {"distance": ("1N", 21, 10), "dtype": torch.float16, "lengths": (40, 70), **CAUSAL},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(case: str) -> None:
    Case(**CASES[case]).check()


def test_the_least_number_there_is_counts_as_any_other() -> None:
    """In a table, where the log-sum-exp loses what is in it beside the maximum."""
    case = Case((20, 40), position=("1", 2, 9, 4), distance=("1N", 9, 4), segment=True)
    case.distance[:] = torch.finfo(torch.float32).min
    case.check()


@pytest.mark.parametrize("lengths", [(1, 1), (1, 65), (65, 1), (31, 33), (64, 64), (0, 5), (5, 0)], ids=str)
def test_every_length(lengths: tuple[int, int]) -> None:
    case = Case(lengths, heads=(1, 1), position=("1", 1, 40, 20), distance=("1N", 40, 30), segment=True, ranks="1N")
    if lengths[1] == 1:  # of one key the weight is 1 whatever the score, and exact is 0
        case.value.zero_()
    case.check()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_sequences_are_apart(dropout_p: float) -> None:
    """And what lies after the last of them belongs to none."""
    case = Case(
        (60, 60), heads=(2, 1), position=("1", 2, 17, 8), distance=("1N", 12, 3), dropout_p=dropout_p, right=0,
        lower_right=True,
    )  # fmt: skip
    case.cu_q = torch.tensor([0, 5, 5, 40, 55], dtype=torch.int32, device=DEVICE)
    case.cu_k = torch.tensor([0, 9, 20, 55, 55], dtype=torch.int32, device=DEVICE)
    case.dlse[:, :, 40:] = 0.0  # of rows that see nothing
    exact = case.differentiated(reference.attention, torch.float64)
    peer = case.differentiated(reference.attention if dropout_p else formula_padded(case), torch.float32)
    for tensor in (case.dout, case.query, case.position_query):
        tensor[:, :, 55:] = NAN
    got = case.by_kernels(max_q=35, max_k=35)
    for name, right in exact.items():
        assert_within_budget(got[name], right, peer[name], f"gradient of {name}")


def formula_padded(case: Case) -> Any:
    """The formula, with zeros for what no sequence covers."""

    def padded(**given: Any) -> tuple[Tensor, Tensor, None]:
        out, lse, _ = formula(**given)
        missing = case.query.shape[2] - out.shape[2]
        return torch.nn.functional.pad(out, (0, 0, 0, missing)), torch.nn.functional.pad(lse, (0, missing)), None

    return padded


# --- laws ---


def test_rows_of_the_scores_gradient_sum_to_zero() -> None:
    """So do the gradients of a table and of segments, in whose entries the rows are added up."""
    case = Case(
        (20, 40), position=("1", 2, None, 0), distance=("1N", 9, 4), segment=True, mask="B11K", outputs="out",
        dropout_p=0.3, left=30,
    )  # fmt: skip
    got = case.by_kernels()
    torch.testing.assert_close(got["distance"].sum(-1), torch.zeros(1, 2, device=DEVICE), atol=2e-5, rtol=0)
    torch.testing.assert_close(got["segment"].sum(-1), torch.zeros(1, 2, 20, device=DEVICE), atol=5e-6, rtol=0)


def test_positions_are_one_with_a_product_of_their_own() -> None:
    """Where a position's query is one-hot, its scores are a table, and so is the gradient."""
    case = Case((33, 40), heads=(1, 1), position=("1", 1, 16, 8), widths=(8, 8, 16), scale=1.0)
    case.position_query = torch.zeros_like(case.position_query)
    case.position_query[..., 0] = 1.0
    table = Case((33, 40), heads=(1, 1), distance=("1N", 16, 8), scale=1.0)
    for name in ("query", "key", "value", "dout", "dlse"):
        setattr(table, name, getattr(case, name))
    table.distance = case.position_key[..., 0].clone()
    got, expected = case.by_kernels(), table.by_kernels()
    torch.testing.assert_close(got["position_key"][..., 0], expected["distance"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["query"], expected["query"], atol=1e-5, rtol=1e-5)


def test_the_same_bits_every_time() -> None:
    case = Case(
        (20, 33), heads=(2, 1), position=("1", 1, 40, 20), distance=("11", 9, 4), segment=True, dtype=torch.bfloat16
    )
    first, second = case.by_kernels(), case.by_kernels()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    """Whatever comes in for it, NaN included, and whatever stands in its own rows."""
    case = Case((20, 33), heads=(1, 1), position=("1", 1, 30, 15), distance=("1N", 9, 4), segment=True, ranks="1N")
    rows = torch.arange(20, device=DEVICE) % 5 == 3
    case.rank_q[..., rows] = -1
    case.rank_q[..., ~rows] = case.rank_q[..., ~rows].clamp(min=0)
    got = case.check()
    for tensor in (case.dout, case.dlse, case.position_query, case.segment):
        tensor[:, :, rows] = NAN
    after = case.by_kernels()
    for name in ("query", "position_query", "segment"):
        assert not after[name][:, :, rows].any()
    for name, gradient in after.items():  # which sums in another order to avoid it
        torch.testing.assert_close(gradient, got[name], atol=2e-6, rtol=1e-5)


def test_hidden_positions_are_invisible() -> None:
    """In a band, those that no query meets may be NaN; so may the number for a segment that nobody is in."""
    case = Case(
        (33, 40), heads=(1, 1), position=("1", 1, None, 0), distance=("1N", 72, 39), segment=True, left=20, **CAUSAL
    )  # fmt: skip
    case.segment_q[:] = case.segment_k[:] = 1
    clean = case.by_kernels()
    for table in (case.position_key, case.distance):
        table[:, :, 40:] = NAN
        table[:, :, :19] = NAN
    case.segment[..., 1] = NAN
    for name, gradient in case.by_kernels().items():
        torch.testing.assert_close(gradient, clean[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("spoiled", ["position_query", "position_key", "distance"])
def test_nan_reaches_only_who_sees_it(spoiled: str) -> None:
    Q, K, at = 33, 40, 30
    case = Case((Q, K), heads=(1, 1), position=("1", 1, None, 0), distance=("1N", Q + K - 1, K - 1), **CAUSAL)
    clean = case.by_kernels()
    visible = reference.band(Q, K, -1, 0, True, DEVICE)
    entry = reference.entry(Q, K, K - 1, Q + K - 1, DEVICE)
    if spoiled == "position_query":
        case.position_query[:, :, at] = NAN
        rows = torch.arange(Q, device=DEVICE) == at
    else:
        getattr(case, spoiled)[:, :, at] = NAN
        rows = (visible & (entry == at)).any(1)
    columns = visible[rows].any(0)
    entries = torch.zeros(Q + K - 1, dtype=torch.bool, device=DEVICE)
    entries[entry[visible & rows[:, None]]] = True
    expected = dict.fromkeys(("query", "position_query"), rows[:, None])
    expected |= {"key": columns[:, None], "position_key": entries[:, None], "distance": entries}
    got = case.by_kernels()
    for name, bad in expected.items():
        bad = bad.expand_as(got[name])
        assert torch.equal(~got[name].isfinite(), bad), f"{spoiled} is seen in the wrong places of d{name}"
        torch.testing.assert_close(
            got[name].masked_fill(bad, 0.0), clean[name].masked_fill(bad, 0.0), atol=5e-6, rtol=1e-5
        )


def test_any_strides() -> None:
    case = Case((17, 33), position=("1", 2, 30, 15), distance=("1N", 9, 4), segment=True)
    contiguous = case.by_kernels()
    for name in ("position_query", "position_key", "distance", "segment"):
        tensor = getattr(case, name)
        setattr(case, name, tensor.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT)
    for name, gradient in case.by_kernels().items():
        assert torch.equal(gradient, contiguous[name])
