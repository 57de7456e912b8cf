"""Errors of attention: the type that torch raises for the same mistake, and sentences about what torch lacks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq

B, N, Q, K, D, E = 2, 4, 5, 7, 8, 6
IMPLEMENTATIONS = ("auto", "torch", "reference", "triton")
attention = fastseq.functional.scaled_dot_product_attention


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


q, k, v = zeros(B, N, Q, D), zeros(B, N, K, D), zeros(B, N, K, E)
cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)

# What torch refuses as well: arguments and keywords for either, and what our sentence must name if it is ours.
SHARED: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "query a list": (([[0.0]], k, v), {}, ("query",)),
    "query None": ((None, k, v), {}, ("query",)),
    "value a number": ((q, k, 1.0), {}, ("value",)),
    "value missing": ((q, k), {}, ("value",)),
    "query 1-D": ((zeros(D), k, v), {}, ("query", "[8]")),
    "key 0-D": ((q, zeros(), v), {}, ("key", "[]")),
    "value 1-D": ((q, k, zeros(E)), {}, ("value", "[6]")),
    "query of another width": ((zeros(B, N, Q, D + 1), k, v), {}, ("query", "key", "[2, 4, 5, 9]", "[2, 4, 7, 8]")),
    "key longer than value": ((q, zeros(B, N, K + 1, D), v), {}, ("key", "value", "[2, 4, 8, 8]")),
    "batches that do not broadcast": ((q, zeros(3, N, K, D), zeros(3, N, K, E)), {}, ("query", "key", "[3, 4, 7, 8]")),
    "heads that do not broadcast": ((q, zeros(B, 3, K, D), zeros(B, 3, K, E)), {}, ("key", "[2, 3, 7, 8]")),
    "grouped heads without enable_gqa": ((q, k[:, :2], v[:, :2]), {}, ("key", "[2, 2, 7, 8]")),
    "heads that do not divide": (
        (q, zeros(B, 3, K, D), zeros(B, 3, K, E)), {"enable_gqa": True}, ("heads", "divides 4", "3"),
    ),
    "key of doubles": ((q, k.double(), v), {}, ("key", "float32", "float64")),
    "value of half precision": ((q, k, v.half()), {}, ("value", "float32", "float16")),
    "all of integers": ((q.long(), k.long(), v.long()), {}, ("query", "floating", "int64")),
    "all of bools": ((q.bool(), k.bool(), v.bool()), {}, ("query", "floating", "bool")),
    "key on another device": ((q, k.to("meta"), v), {}, ("key", "cpu", "meta")),
    "mask on another device": ((q, k, v, zeros(Q, K, device="meta")), {}, ("attn_mask", "cpu", "meta")),
    "mask of doubles": ((q, k, v, zeros(Q, K).double()), {}, ("attn_mask", "float32", "bool", "float64")),
    "mask of integers": ((q, k, v, zeros(Q, K).long()), {}, ("attn_mask", "float32", "bool", "int64")),
    "mask of bytes": ((q, k, v, zeros(Q, K).byte()), {}, ("attn_mask", "float32", "bool", "uint8")),
    "mask of the transposed shape": ((q, k, v, zeros(K, Q)), {}, ("attn_mask", "[2, 4, 5, 7]", "[7, 5]")),
    "mask per batch without its dimensions": ((q, k, v, zeros(B, K)), {}, ("attn_mask", "[2, 4, 5, 7]", "[2, 7]")),
    "mask of too many keys": ((q, k, v, zeros(Q, K + 1)), {}, ("attn_mask", "[2, 4, 5, 7]", "[5, 8]")),
    "mask of too many heads": ((q, k, v, zeros(B, 2, Q, K)), {}, ("attn_mask", "[2, 4, 5, 7]", "[2, 2, 5, 7]")),
    "mask of too many dimensions": ((q, k, v, zeros(3, B, N, Q, K)), {}, ("attn_mask", "[3, 2, 4, 5, 7]")),
    "mask a list": ((q, k, v, [[True]]), {}, ("attn_mask",)),
    "dropout above 1": ((q, k, v), {"dropout_p": 1.5}, ("dropout_p", "1.5")),
    "dropout a string": ((q, k, v), {"dropout_p": "much"}, ("dropout_p",)),
    "scale a string": ((q, k, v), {"scale": "large"}, ("scale",)),
    "scale by position": ((q, k, v, None, 0.0, False, 0.5), {}, ("positional",)),
    "keyword unknown": ((q, k, v), {"mask": None}, ("mask",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SHARED)
def test_fails_as_torchs(mistake: str) -> None:
    arguments, keywords, words = SHARED[mistake]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever torch raises is what we want to know)
        F.scaled_dot_product_attention(*arguments, **keywords)
    for implementation in IMPLEMENTATIONS:
        # Asked for more than torch does, the sentence is ours.
        for more in ({}, {"return_lse": True}):
            with fastseq.use(implementation), pytest.raises(theirs.type) as ours:
                attention(*arguments, **keywords, **more)
        missing = [word for word in words if word not in str(ours.value)]
        assert not missing, f"{implementation}: {ours.value} does not say {missing}"


Mistake = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def packed(*arguments: Any, **keywords: Any) -> Any:
    given = dict(enumerate((zeros(5, N, D), zeros(7, N, D), zeros(7, N, E), cu_q, cu_k, 3, 4)))
    return fastseq.functional.varlen_attn(*(given | dict(arguments)).values(), **keywords)


OURS: dict[str, Mistake] = {
    "dropout negative": (lambda: attention(q, k, v, dropout_p=-0.1), RuntimeError, ("dropout_p", "-0.1")),
    "bias a list": (lambda: attention(q, k, v, bias=[0.0]), TypeError, ("bias", "Tensor", "list")),
    "bias of bools": (lambda: attention(q, k, v, bias=zeros(Q, K).bool()), RuntimeError, ("bias", "float32", "bool")),
    "bias of doubles": (lambda: attention(q, k, v, bias=zeros(Q, K).double()), RuntimeError, ("bias", "float64")),
    "bias 1-D": (lambda: attention(q, k, v, bias=zeros(K)), IndexError, ("bias", "2 dimensions", "[7]")),
    "bias of another shape": (
        lambda: attention(q, k, v, bias=zeros(K, Q)), RuntimeError, ("bias", "[2, 4, 5, 7]", "[7, 5]"),
    ),
    "bias on another device": (
        lambda: attention(q, k, v, bias=zeros(Q, K, device="meta")), RuntimeError, ("bias", "cpu", "meta"),
    ),
    "causal unknown": (
        lambda: attention(q, k, v, causal="left"), ValueError, ("causal", "'upper_left'", "'lower_right'", "'left'"),
    ),
    "causal a bool": (lambda: attention(q, k, v, causal=True), ValueError, ("causal", "'lower_right'", "True")),
    "window negative": (lambda: attention(q, k, v, window=-2), ValueError, ("window", "-1 or more", "-2")),
    "window of three": (lambda: attention(q, k, v, window=(1, 2, 3)), ValueError, ("window", "left", "(1, 2, 3)")),
    "window of floats": (lambda: attention(q, k, v, window=(1.5, 2.0)), ValueError, ("window", "(1.5, 2.0)")),
    "window a float": (lambda: attention(q, k, v, window=2.5), ValueError, ("window", "number", "2.5")),
    "softcap zero": (lambda: attention(q, k, v, softcap=0.0), ValueError, ("softcap", "positive", "0.0")),
    "softcap negative": (lambda: attention(q, k, v, softcap=-5.0), ValueError, ("softcap", "positive", "-5.0")),
    "weights unknown": (
        lambda: attention(q, k, v, return_weights="all"), ValueError, ("return_weights", "'each'", "'mean'", "'all'"),
    ),
    "seed a string": (lambda: attention(q, k, v, dropout_p=0.5, seed="seed"), TypeError, ("seed",)),
    "seed of two": (
        lambda: attention(q, k, v, dropout_p=0.5, seed=torch.tensor([1, 2])), ValueError, ("seed", "one", "[2]"),
    ),
    "extras by position": (lambda: attention(q, k, v, None, 0.0, False, None, False), TypeError, ("positional",)),
    "packed: query 4-D": (lambda: packed((0, q)), ValueError, ("query", "[tokens, heads, width]", "[2, 4, 5, 8]")),
    "packed: key of another width": (lambda: packed((1, zeros(7, N, 9))), ValueError, ("key", "[7, 4, 9]")),
    "packed: value shorter": (lambda: packed((2, zeros(6, N, E))), ValueError, ("value", "[6, 4, 6]")),
    "packed: grouped heads": (
        lambda: packed((1, zeros(7, 2, D)), (2, zeros(7, 2, E))), ValueError, ("key", "4 heads", "enable_gqa", "2"),
    ),
    "packed: heads that do not divide": (
        lambda: packed((1, zeros(7, 3, D)), (2, zeros(7, 3, E)), enable_gqa=True), ValueError, ("key", "divisor", "3"),
    ),
    "packed: starts of int64": (lambda: packed((3, cu_q.long())), TypeError, ("cu_seq_q", "int32", "int64")),
    "packed: starts of another number": (lambda: packed((4, cu_k[:2])), ValueError, ("cu_seq_k", "[3]", "[2]")),
    "packed: starts 2-D": (lambda: packed((3, cu_q[None])), ValueError, ("cu_seq_q", "[1, 3]")),
    "packed: starts empty": (lambda: packed((3, cu_q[:0]), (4, cu_k[:0])), ValueError, ("cu_seq_q", "[0]")),
    "packed: softcap negative": (lambda: packed(softcap=-1.0), ValueError, ("softcap", "positive", "-1.0")),
    "packed: dropout above 1": (lambda: packed(dropout_p=1.5), RuntimeError, ("dropout_p", "1.5")),
    "packed: window of three": (lambda: packed(window_size=(1, 2, 3)), ValueError, ("window_size", "(1, 2, 3)")),
    "packed: starts a list": (lambda: packed((3, [0, 2, 5])), TypeError, ("cu_seq_q", "int32", "list")),
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mistake", OURS)
def test_our_own_arguments_are_checked(mistake: str, implementation: str) -> None:
    call, kind, words = OURS[mistake]
    with fastseq.use(implementation), pytest.raises(kind) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert type(error.value) is kind


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (lambda: attention(q.double(), k.double(), v.double()), "float64"),
    "too wide": (
        lambda: attention(zeros(1, 1, 2, 257), zeros(1, 1, 2, 257), zeros(1, 1, 2, 8)),
        "256 at most, not 257",
    ),
    "no width": (lambda: attention(zeros(1, 1, 2, 0), zeros(1, 1, 2, 0), zeros(1, 1, 2, 8)), "zero"),
    "meta": (lambda: attention(*(t.to("meta") for t in (q, k, v))), "meta"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_triton_refuses_with_a_sentence(what: str) -> None:
    call, words = REFUSED[what]
    with fastseq.use("triton"), pytest.raises(fastseq.Unsupported, match=rf"^triton: \w+.* .*{words}") as refusal:
        call()
    assert isinstance(refusal.value, RuntimeError)
    call()  # without the name it falls back


def test_a_mistake_changes_nothing() -> None:
    """Neither what was given, nor torch's generator, nor the choice."""
    given = [torch.randn(t.shape) for t in (q, k, v)]
    before = [t.clone() for t in given]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="window"), fastseq.use("reference"):
        attention(*given, dropout_p=0.5, window=-7)
    with pytest.raises(RuntimeError, match="attn_mask"):
        attention(*given, zeros(K, Q), dropout_p=0.5, return_lse=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert fastseq.functional.choose_attention(q, v, True).reason != "asked for by use('reference')"
