"""Cases of attention, and what each of them must give: the definition in float64, and torch's own at the same dtype.

A case is a few sizes and flags; its numbers follow from it alone. ``pairwise`` combines the levels of factors so that
any two levels of two factors meet in some case.
"""

import functools
import itertools
import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq.reference import attention as reference

from .budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
HALF = (torch.bfloat16, torch.float16)
SEED = -0x123456789ABCDEF

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, int] = (17, 17)  # of queries and of keys
    widths: tuple[int, int] = (8, 8)  # of keys and of values
    batch: int = 2
    heads: tuple[int, int] = (2, 2)  # of queries and of keys
    mask: str = "none"
    causal: str = "none"
    window: int | tuple[int, int] | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"
    outputs: str = "out"
    scale: float | None = None
    logits: float | None = None  # the largest product, where it matters

    @property
    def groups(self) -> int:
        return self.heads[0] // self.heads[1]

    def __str__(self) -> str:
        said = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value, usual in said if value != usual)


# A mask named by "bias" is learned; the letters say which of [B, N, Q, K] it has, 1 where it broadcasts.
MASKS = (
    "none", "keys", "batch", "heads", "-inf", "min",
    "bias BNQK", "bias 1NQK", "bias B11K", "bias 1N1K", "keys and bias 1NQK",
)  # fmt: skip
SQUARE = tuple((length, length) for length in (0, 1, 17, 63, 64, 65, 127, 128, 129, 320))
UNEQUAL = ((1, 320), (320, 1), (17, 64), (65, 129), (128, 63), (0, 17), (17, 0), (129, 320), (320, 65))
WIDTHS = (*((width, width) for width in (1, 8, 32, 40, 64, 80, 96, 128, 192, 256)), (40, 8), (16, 96))
FLAGS: dict[str, tuple[Any, ...]] = {
    "mask": MASKS,
    "causal": ("none", "is_causal", "upper_left", "lower_right"),
    "window": (None, 5, (40, -1), (-1, 3)),
    "layout": ("contiguous", "transposed", "fused", "columns", "expanded"),
    "outputs": ("out", "lse", "each", "mean", "each lse"),
    "dtype": (torch.float32, *HALF),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "softcap": (None, 5.0),
    "dropout_p": (0.0, 0.3),
    "scale": (None, 0.3, -0.2),
    "logits": (None, 120.0),
}


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Cases in which any two levels of any two factors meet; greedy, and the same each time."""
    draw = random.Random(0)
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.permutations(factors, 2) for x in factors[a] for y in factors[b]
    )
    cases = []
    while missing:
        row = dict(next(iter(missing)))  # a pair that no case has yet, and what meets most others with it
        for name in factors:
            if name not in row:
                news = {level: sum(((name, level), met) in missing for met in row.items()) for level in factors[name]}
                row[name] = max(news, key=lambda level, news=news: (news[level], draw.random()))
        for pair in itertools.permutations(row.items(), 2):
            missing.pop(pair, None)
        cases.append(Case(**row))
    return cases


@functools.cache
def all_cases() -> list[Case]:
    """Sizes and flags pairwise; in float64 as well, which the kernels do not take."""
    dtypes = (*FLAGS["dtype"], torch.float64)
    return pairwise({"lengths": SQUARE + UNEQUAL, "widths": WIDTHS, **FLAGS, "dtype": dtypes})


@functools.cache
def few_cases() -> list[Case]:
    """The flags pairwise, and each size at least once: fewer and smaller, for an interpreter of kernels."""
    lengths, widths = itertools.chain(SQUARE + UNEQUAL, itertools.cycle(((17, 33), (40, 17)))), itertools.cycle(WIDTHS)
    found = []
    for case in pairwise(FLAGS):
        (Q, K), small = next(lengths), (2, 2) if case.groups == 1 else (2, 1)
        large = Q * K > 2048
        heads = (1, 1) if large and case.groups == 1 else small
        batch = 2 if not large and (case.mask == "batch" or case.layout == "expanded") else 1
        found.append(replace(case, lengths=(Q, K), widths=next(widths), batch=batch, heads=heads))
    return found


# ------------------------------------------------------------------------------------------- the numbers of a case


@dataclass
class Problem:
    """float64 tensors whose values the case's dtype holds exactly: only the computation differs between dtypes."""

    case: Case
    leaves: Tensors  # what gradients are taken of: query, key, value as they lie in memory, and a learned bias
    mask: Tensor | None  # bool
    bias: Tensor | None  # float, not learned
    hidden: Tensor | None  # [B, K]: keys that no query sees
    gradients: Tensors  # of the outputs

    def tensors(self, leaves: Tensors) -> Tensors:
        """query, key and value as attention takes them, bias and mask, all in the dtype of the leaves."""
        B, (N, M) = self.case.batch, self.case.heads
        q, k, v = (leaves[name] for name in ("query", "key", "value"))
        if self.case.layout == "transposed":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        elif self.case.layout == "fused":  # slices of wider rows
            q, k, v = (t.transpose(1, 2)[..., 3:-2] for t in (q, k, v))
        elif self.case.layout == "columns":
            q, k, v = (t.mT for t in (q, k, v))
        elif self.case.layout == "expanded":
            q, k, v = q.expand(-1, N, -1, -1), k.expand(B, -1, -1, -1), v.expand(-1, M, -1, -1)
        found = {"query": q, "key": k, "value": v}
        bias = leaves["bias"] if "bias" in leaves else None if self.bias is None else self.bias.to(q.dtype)
        return found | {n: t for n, t in (("bias", bias), ("mask", self.mask)) if t is not None}

    def at(self, dtype: torch.dtype) -> Tensors:
        """The leaves in a dtype, to be differentiated."""
        return {name: leaf.to(dtype, copy=True).requires_grad_() for name, leaf in self.leaves.items()}

    def poisoned(self, dtype: torch.dtype) -> Tensors:
        """The same, with NaN in the keys that no query sees and in their values."""
        leaves = self.at(dtype)
        if self.hidden is not None and self.case.layout != "expanded":  # there all batches share the keys
            tensors = self.tensors({name: leaf.detach() for name, leaf in leaves.items()})
            for name in ("key", "value"):
                tensors[name].transpose(1, 2)[self.hidden] = torch.nan
        return leaves


def problem(case: Case) -> Problem:
    (Q, K), (D, E), (N, M), B = case.lengths, case.widths, case.heads, case.batch
    generator = torch.Generator().manual_seed(sum(map(ord, str(case))))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).double().to(DEVICE)

    def coin(*shape: int, p: float) -> Tensor:
        return (torch.rand(*shape, generator=generator) < p).to(DEVICE)

    def lying(heads: int, length: int, width: int, shared_by_batches: bool = False) -> Tensor:
        if case.layout == "fused":
            wide = draw(B, length, heads, width + 5)
            wide[..., :3], wide[..., -2:] = torch.nan, torch.nan  # what lies beside the slice is not to be read
            return wide
        shapes = {
            "contiguous": (B, heads, length, width),
            "transposed": (B, length, heads, width),
            "columns": (B, heads, width, length),
            "expanded": (1, heads, length, width) if shared_by_batches else (B, 1, length, width),
        }
        return draw(*shapes[case.layout])

    leaves = {"query": lying(N, Q, D), "key": lying(M, K, D, shared_by_batches=True), "value": lying(M, K, E)}
    made = Problem(case, leaves, None, None, None, {})
    if case.logits is not None and Q and K:
        t = made.tensors(leaves)
        highest = (t["query"] @ t["key"].repeat_interleave(N // M, 1).mT).abs().max() * abs(scale_of(case))
        leaves["query"] = (leaves["query"] * (case.logits / highest)).to(case.dtype).double()

    if case.mask.startswith(("keys", "batch")):
        made.mask = coin(B, 1, 1, K, p=0.7)
        made.mask[..., : K // 3] = False  # padding on the left
        if case.mask == "batch":
            made.mask[-1] = False
        made.hidden = ~made.mask[:, 0, 0]
    elif case.mask in ("heads", "-inf", "min"):
        mask = coin(B, 1 if case.mask == "min" else N, Q, K, p=0.6)
        mask[:, :, Q // 2 :: 7] = False
        if case.mask == "heads":
            made.mask = mask
        else:
            low = -torch.inf if case.mask == "-inf" else torch.finfo(case.dtype).min
            made.bias = draw(*mask.shape).masked_fill(~mask, low)
    if "bias" in case.mask:
        sizes = dict(zip("BNQK", (B, N, Q, K), strict=True)) | {"1": 1}
        leaves["bias"] = draw(*(sizes[letter] for letter in case.mask[-4:]))

    weights = (B, Q, K) if case.outputs == "mean" else (B, N, Q, K)
    made.gradients = {"output": draw(B, N, Q, E), "lse": draw(B, N, Q), "weights": draw(*weights)}
    return made


def scale_of(case: Case) -> float:
    return case.widths[0] ** -0.5 if case.scale is None else case.scale


def band_of(case: Case) -> dict[str, Any]:
    """How far a query sees to either side of which diagonal, as the definition takes it."""
    left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
    left, right = (-1 if side is None else side for side in (left, right))
    if case.causal == "none":
        return {"left": left, "right": right, "lower_right": case.window is not None}
    return {"left": left, "right": 0, "lower_right": case.causal == "lower_right"}


def names_of(case: Case) -> list[str]:
    asked = case.outputs.split()
    return ["output", *["weights"] * (asked[0] in ("each", "mean")), *["lse"] * ("lse" in asked)]


# ------------------------------------------------------------------------------------------- four ways to compute it


def by_fastseq(case: Case, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, mask: Any = None) -> Tensors:
    """The public function, asked as its user would."""
    keywords: dict[str, Any] = {"attn_mask": mask, "is_causal": case.causal == "is_causal"}
    if bias is not None:
        keywords["bias" if mask is not None or case.softcap else "attn_mask"] = bias
    if case.causal in ("upper_left", "lower_right"):
        keywords["causal"] = case.causal
    if "weights" in names_of(case):
        keywords["return_weights"] = case.outputs.split()[0]
    results = fastseq.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=case.dropout_p, scale=case.scale, enable_gqa=case.heads[0] != case.heads[1],
        window=case.window, softcap=case.softcap, seed=SEED if case.dropout_p else None,
        return_lse="lse" in names_of(case), **keywords,
    )  # fmt: skip
    return dict(zip(names_of(case), (results,) if isinstance(results, Tensor) else results, strict=True))


def by_definition(case: Case, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, mask: Any = None) -> Tensors:
    out, lse, shown = reference.attention(
        query, key, value, bias, mask=mask, seed=torch.tensor([SEED], device=query.device), scale=scale_of(case),
        softcap=case.softcap or 0.0, dropout_p=case.dropout_p,
        weights=case.outputs.split()[0] if "weights" in names_of(case) else "", **band_of(case),
    )  # fmt: skip
    found = {"output": out, "weights": shown, "lse": lse}
    return {name: found[name] for name in names_of(case)}


def visible_of(case: Case, mask: Tensor | None) -> Tensor:
    """What each query may see ``[B, N, Q, K]``, by triangles."""
    (Q, K), band = case.lengths, band_of(case)
    visible = torch.ones(case.batch, case.heads[0], Q, K, dtype=torch.bool, device=DEVICE)
    shift = K - Q if band["lower_right"] else 0
    if band["left"] >= 0:
        visible = visible.triu(shift - band["left"])
    if band["right"] >= 0:
        visible = visible.tril(shift + band["right"])
    return visible if mask is None else visible & mask


def by_formula(
    case: Case,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any = None,
    mask: Any = None,
    backwards: bool = False,
    recomputed: bool = False,
) -> Tensors:
    """What a user of torch would write, in the dtype of the tensors.

    ``backwards``: its products sum from last to first. ``recomputed``: the weights follow from the log-sum-exp and
    from products computed again, last to first, as torch's fused operators have them for the gradients.
    """
    (N, M), (Q, K) = case.heads, case.lengths
    key, value = (t.repeat_interleave(N // M, 1) for t in (key, value))
    hidden = ~visible_of(case, mask)

    def product(a: Tensor, b: Tensor, backwards: bool) -> Tensor:
        return a.flip(-1) @ b.flip(-2) if backwards else a @ b

    def scores_of(backwards: bool) -> Tensor:
        scores = product(query, key.mT, backwards) * scale_of(case)
        if case.softcap:
            scores = case.softcap * (scores / case.softcap).tanh()
        if bias is not None:
            scores = scores + bias
        return scores.masked_fill(hidden, -torch.inf)

    scores = scores_of(backwards)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    # torch.logsumexp's gradient goes by its rounded result: it is off by n in a row of n times the least number.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    most = wide.detach().amax(-1, keepdim=True) if K else wide.new_zeros(*wide.shape[:-1], 1)
    lse = (wide - most).exp().sum(-1).log() + most[..., 0]
    if recomputed:
        weights = (scores_of(not backwards) - lse[..., None].to(scores.dtype)).exp().masked_fill(empty, 0.0)
    else:
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
    if case.dropout_p:
        heads = torch.arange(case.batch * N, device=query.device).view(-1, N)
        kept = reference.dropout_keep(torch.tensor([SEED], device=query.device), heads, Q, K, case.dropout_p)
        weights = weights * kept / (1 - case.dropout_p)
    shown = weights.mean(1) if case.outputs == "mean" else weights
    found = {
        "output": product(weights, value, backwards),
        "weights": shown,
        "lse": lse.masked_fill(empty[..., 0], -torch.inf),
    }
    return {name: found[name] for name in names_of(case)}


def torch_means_the_same(case: Case) -> bool:
    """Whether torch's operator can be asked for this, and gets it right."""
    if case.softcap or case.dropout_p or case.outputs != "out" or 0 in case.lengths:
        return False
    return case.mask != "min"  # where torch's CPU path multiplies the gradient of a row of nothing else by its length


def by_torch(case: Case, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, mask: Any = None) -> Tensors:
    key, value = (t.repeat_interleave(case.groups, 1) for t in (key, value))
    added = added_of(case, query.dtype, bias, mask)
    return {"output": F.scaled_dot_product_attention(query, key, value, added, scale=scale_of(case))}


def added_of(case: Case, dtype: torch.dtype, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """All that is hidden and all that is added, as one float mask."""
    visible = visible_of(case, mask)
    added = torch.zeros_like(visible, dtype=dtype) if bias is None else bias
    return added.masked_fill(~visible, -torch.inf)


# ------------------------------------------------------------------------------------------- held against each other


def outcome(way: Any, made: Problem, leaves: Tensors) -> Tensors:
    """Outputs and the gradient of every leaf, by name."""
    results = way(made.case, **made.tensors(leaves))
    gradients = torch.autograd.grad(
        list(results.values()), list(leaves.values()), [made.gradients[n].to(t.dtype) for n, t in results.items()]
    )
    named = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {n: t.detach() for n, t in results.items()} | named


@functools.lru_cache(maxsize=2)
def expected(case: Case) -> tuple[Problem, Tensors, Tensors]:
    """The problem, what is exact, and what torch makes of it at the case's dtype.

    How far torch is off is luck, too: of the ways in which torch can be asked, the one that is further off counts.
    """
    made = problem(case)
    exact = outcome(by_definition, made, made.at(torch.float64))
    peers = [outcome(by_formula, made, made.at(case.dtype))]
    if case.dtype not in HALF:
        peers.append(outcome(functools.partial(by_formula, backwards=True), made, made.at(case.dtype)))
        if case.mask != "min":  # whose log-sum-exp holds nothing of the scores
            peers.append(outcome(functools.partial(by_formula, recomputed=True), made, made.at(case.dtype)))
            peers[-1]["output"] = peers[0]["output"]  # which no fused operator makes of weights computed again
    if torch_means_the_same(case):
        fused = outcome(by_torch, made, made.at(case.dtype))
        if case.dtype in HALF:  # which the formula rounds at every step
            peers.clear()
        peers.append(fused)
    peer = {name: max((p[name] for p in peers), key=lambda t, e=e: _error(t, e)) for name, e in exact.items()}
    if "lse" in peer and case.dtype in HALF:
        peer["lse"] = max(_lse_of_half(case, made), key=lambda t: _error(t, exact["lse"]))
    if case.lengths[1] == 1:
        # A single key has weight 1 whatever its score: where the gradients of the scores cancel, torch's formula is
        # exact by luck. What a unit of rounding of the parts that cancel makes of them is its error otherwise.
        t, rounding = made.tensors(made.leaves), torch.finfo(case.dtype).eps
        for name, other in (("query", "key"), ("key", "query")):
            parts = abs(scale_of(case)) * t["value"].abs().amax() * t[other].abs().amax() * case.widths[1] ** 0.5
            exactly = exact[f"gradient of {name}"]
            peer[f"gradient of {name}"] = (exactly + parts * rounding).to(case.dtype)
    if case.mask.startswith("bias") and case.mask.endswith("1"):
        # So do they for a bias that is the same for all keys, up to what comes by the log-sum-exp.
        t, rounding = made.tensors(made.leaves), torch.finfo(case.dtype).eps
        exactly, found = (x["gradient of bias"] for x in (exact, peer))
        parts = (exactly + t["value"].abs().amax() * case.widths[1] ** 0.5 * rounding).to(case.dtype)
        peer["gradient of bias"] = max(found, parts, key=lambda x: _error(x, exactly))
    return made, exact, peer


def _lse_of_half(case: Case, made: Problem) -> list[Tensor]:
    """The log-sum-exp of inputs in half precision: in float32 by the formula, and as torch's fused operator has it."""
    with torch.no_grad():
        t = made.tensors(made.at(torch.float32))
        found = [by_formula(case, **t, backwards=backwards)["lse"] for backwards in (False, True)]
        if DEVICE == "cpu" and not case.softcap and case.widths[0] == case.widths[1] and 0 not in case.lengths:
            t = made.tensors(made.at(case.dtype))
            k, v = (t[n].repeat_interleave(case.groups, 1).contiguous() for n in ("key", "value"))
            added = added_of(case, case.dtype, t.get("bias"), t.get("mask"))
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            lse = fused(t["query"].contiguous(), k, v, attn_mask=added, scale=scale_of(case))[1]
            found.append(torch.where(found[0].isinf(), found[0], lse))  # a row that sees nothing has 0 there
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).nan_to_num(0.0).abs().max()) if exact.numel() else 0.0


def assert_right(case: Case, implementation: str) -> None:
    """Every output and gradient of an implementation is within the budget, with NaN behind the mask."""
    made, exact, peer = expected(case)
    with fastseq.use(implementation):
        got = outcome(by_fastseq, made, made.poisoned(case.dtype))
    assert got.keys() == exact.keys()
    # In float64 the oracle is rounded as well, and what happens near a logit of 120 to 120 times the rounding. The
    # interpreter of kernels cuts float32 off to bfloat16 where a device rounds: twice the error.
    cuts = implementation == "triton" and not ON_GPU and case.dtype == torch.bfloat16
    slack = 256.0 if case.dtype == torch.float64 else 4.0 if cuts else 2.0
    for name, value in got.items():
        assert_as_good(value, exact[name], peer[name], f"{implementation}: {name}", slack)


def assert_as_good(got: Tensor, exact: Tensor, peer: Tensor, name: str, slack: float = 2.0) -> None:
    """The budget for what is finite; -inf, of an empty row's log-sum-exp, is an exact answer."""
    assert not exact.isnan().any(), f"{name}: what is expected must be numbers"
    assert not peer.isnan().any(), f"{name}: what is expected must be numbers"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} are NaN"
    infinite = exact.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinite elsewhere"
    assert_within_budget(*(t.masked_fill(infinite, 0.0) for t in (got, exact, peer)), name, slack)
