"""fastseq as a flash attention of torch: what torch's operators promise, kept by ours in their place.

Without a GPU our functions stand in for the CPU, where torch has none of these operators: dispatch, autograd and
everything below are the same.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import fastseq
from fastseq.flash import FUNCTIONS, Registration, register_flash_attention
from fastseq.reference.attention import attention as reference

from .support.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
flash = torch.ops.aten._scaled_dot_product_flash_attention
packed = torch.ops.aten._flash_attention_forward


@pytest.fixture
def ours() -> Iterator[None]:
    """Our functions behind torch's operators, on the device at hand."""
    registration = Registration(DEVICE.upper())
    yield
    registration.remove()


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_() for shape in shapes]


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, cotangent.to(out.dtype))]


def formula(**settings: Any) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference(query, key, value, scale=query.shape[-1] ** -0.5, lower_right=True, **settings)[0]

    return attend


def assert_same(function: Callable[..., Tensor], exact: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Output and gradients within budget of ``exact`` in float64; its own error at this dtype is the peer's."""
    cotangent = torch.randn_like(function(*tensors))
    got = gradients(function, tensors, cotangent)
    peer = gradients(exact, tensors, cotangent)
    truth = gradients(exact, [t.double() for t in tensors], cotangent)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, truth, peer, strict=True):
        assert_within_budget(a, b, c, name)


# ------------------------------------------------------------------------------------------------ torch's registry


def test_activates_and_restores() -> None:
    register_flash_attention()
    keys = [f"aten::{name}" for name in FUNCTIONS]
    before = [torch._C._dispatch_has_kernel_for_dispatch_key(key, "CUDA") for key in keys]
    activate_flash_attention_impl("fastseq")
    try:
        assert current_flash_attention_impl() == "fastseq"
        assert all(torch._C._dispatch_has_kernel_for_dispatch_key(key, "CUDA") for key in keys)
        activate_flash_attention_impl("fastseq")  # twice is once
    finally:
        restore_flash_attention_impl()
    assert current_flash_attention_impl() is None
    assert [torch._C._dispatch_has_kernel_for_dispatch_key(key, "CUDA") for key in keys] == before


def test_takes_what_the_operators_take() -> None:
    """Names, order and defaults of the parameters are those of the schema."""
    for name, function in FUNCTIONS.items():
        if name.endswith("inplace"):
            continue  # takes what the one beside it takes
        schema = getattr(torch.ops.aten, name).default._schema
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters] == [a.name for a in schema.arguments], name
        for parameter, argument in zip(parameters, schema.arguments, strict=True):
            assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only, (name, parameter.name)
            if argument.has_default_value():
                assert parameter.default == argument.default_value, (name, parameter.name)


# --------------------------------------------------------------------------------------------- the heads come first


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
def test_dense(ours: None, is_causal: bool, implementation: str, heads: tuple[int, int]) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    N, M = heads
    tensors = inputs((2, N, 17, 8), (2, M, 17, 8), (2, M, 17, 8))
    with fastseq.use(implementation):
        assert_same(lambda q, k, v: flash(q, k, v, 0.0, is_causal)[0], formula(right=0 if is_causal else -1), tensors)


def test_results_are_what_the_fake_operator_says(ours: None) -> None:
    """Sizes, dtypes and strides: a compiled graph is laid out by them."""

    def describe(results: Any) -> list[Any]:
        return [(r.shape, r.dtype, r.stride()) if isinstance(r, Tensor) else r for r in results]

    for order in ("heads first", "heads last", "fused"):
        with torch.no_grad():
            if order == "fused":
                q, k, v = torch.randn(2, 5, 3, 4, 8, device=DEVICE).permute(2, 0, 3, 1, 4)
            elif order == "heads last":
                q, k, v = (torch.randn(2, 5, 4, 8, device=DEVICE).transpose(1, 2) for _ in range(3))
            else:
                q, k, v = (torch.randn(2, 4, 5, 8, device=DEVICE) for _ in range(3))
            real = flash(q, k, v)
            with FakeTensorMode() as mode:
                fake = flash(*(mode.from_tensor(t) for t in (q, k, v)))
        assert describe(real) == describe(fake), order
        dense = torch.ops.aten._scaled_dot_product_flash_attention_backward
        for grad, t in zip(
            dense(real[0], q, k, v, *real[:2], None, None, 5, 5, 0.0, False, *real[6:8]), (q, k, v), strict=True
        ):
            assert grad.stride() == torch.empty_like(t).stride(), order


def test_dropout_is_replayed_by_the_gradient(ours: None) -> None:
    """The gradient of v is the transposed weights times the cotangent: those that the output was made with."""
    q, k = inputs((1, 2, 9, 16), (1, 2, 16, 16))
    v = torch.eye(16, device=DEVICE).expand(1, 2, 16, 16).clone().requires_grad_()
    weights = flash(q, k, v, 0.5)[0]
    assert not torch.equal(weights, flash(q, k, v, 0.5)[0])
    assert 0.3 < (weights == 0).float().mean() < 0.7
    dv = torch.autograd.grad(weights, v, torch.eye(9, 16, device=DEVICE).expand(1, 2, 9, 16))[0]
    torch.testing.assert_close(dv[..., :9], weights.mT)


# ------------------------------------------------------------------------------------------- packed, and heads last


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_varlen(ours: None, window: tuple[int, int], implementation: str) -> None:
    """torch's own ``varlen_attn``, whose operators ours then are, on sequences of which one is empty."""
    if implementation == "triton":
        pytest.importorskip("triton")
    starts = torch.tensor([0, 5, 5, 17], dtype=torch.int32, device=DEVICE)
    tensors = inputs((17, 4, 8), (17, 2, 8), (17, 2, 8))

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        settings: Any = {"left": window[0], "right": window[1], "lower_right": True, "scale": 8**-0.5}
        return reference(q, k, v, cu_q=starts, cu_k=starts, **settings)[0][0].transpose(0, 1)

    with fastseq.use(implementation):
        assert_same(
            lambda q, k, v: varlen_attn(q, k, v, starts, starts, 12, 12, window_size=window, enable_gqa=True),
            exact,
            tensors,
        )  # fmt: skip


def test_varlen_log_sum_exp_and_out(ours: None) -> None:
    starts = torch.tensor([0, 5, 17], dtype=torch.int32, device=DEVICE)
    q, k, v = (t.detach() for t in inputs((17, 4, 8), (17, 4, 8), (17, 4, 8)))
    out, lse = varlen_attn(q, k, v, starts, starts, 12, 12, return_aux=AuxRequest(lse=True))
    scores = torch.einsum("qnd,knd->nqk", q, k)[:, :5, :5] * 8**-0.5
    torch.testing.assert_close(lse[:, :5], scores.logsumexp(-1))
    into = torch.full_like(q, torch.nan)
    varlen_attn_out(into, q, k, v, starts, starts, 12, 12)
    assert torch.equal(into, out)


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_last(ours: None, is_causal: bool) -> None:
    """``_flash_attention_forward`` without packing; its causal diagonal ends in the lower right corner."""
    tensors = inputs((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = formula(right=0 if is_causal else -1)
        return attend(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)

    assert_same(lambda q, k, v: packed(q, k, v, None, None, 5, 9, 0.0, is_causal, False)[0], exact, tensors)


def test_compiles_in_one_graph(ours: None) -> None:
    tensors = inputs((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash(q, k, v, 0.0, True)[0]

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    cotangent = torch.randn_like(tensors[0])
    for a, b in zip(gradients(compiled, tensors, cotangent), gradients(attend, tensors, cotangent), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "keywords",
    [
        {"alibi_slopes": torch.ones(4)},
        {"seqused_k": torch.ones(2, dtype=torch.int32)},
        {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        {"num_splits": 2},
    ],
    ids=lambda k: next(iter(k)),
)
def test_the_rest_is_refused_by_name(ours: None, keywords: dict[str, Any]) -> None:
    q, k, v = (t.detach() for t in inputs((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8)))
    keywords = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in keywords.items()}
    with pytest.raises(fastseq.Unsupported, match=next(iter(keywords))):
        packed(q, k, v, None, None, 5, 5, 0.0, False, False, **keywords)


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_attention_of_torch_is_ours(dtype: torch.dtype, is_causal: bool) -> None:
    tensors = inputs((2, 4, 130, 64), (2, 4, 130, 64), (2, 4, 130, 64), dtype=dtype)
    cotangent = torch.randn_like(tensors[0])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_attention(q, k, v, is_causal=is_causal)

    register_flash_attention()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        peer = gradients(attend, tensors, cotangent)
        activate_flash_attention_impl("fastseq")
        try:
            got = gradients(attend, tensors, cotangent)
            compiled = gradients(torch.compile(attend, fullgraph=True), tensors, cotangent)
            with fastseq.use("reference"), pytest.raises(fastseq.Unsupported):
                attend(*tensors)  # so it is ours that runs
        finally:
            restore_flash_attention_impl()
        attend(*tensors)
    exact = gradients(attend, [t.double() for t in tensors], cotangent)
    for name, a, b, c, d in zip(("out", "dq", "dk", "dv"), got, exact, peer, compiled, strict=True):
        assert_within_budget(a, b, c, name)
        assert_within_budget(d, b, c, f"{name}, compiled")


@pytest.mark.gpu
def test_jagged_tensors_are_ours() -> None:
    rows = [torch.randn(n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (7, 130, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    register_flash_attention()
    activate_flash_attention_impl("fastseq")
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            got = torch_attention(nested, nested, nested).transpose(1, 2).unbind()
    finally:
        restore_flash_attention_impl()
    for a, row in zip(got, rows, strict=True):
        q = row.transpose(0, 1)[None]
        peer = torch_attention(q, q, q)[0].transpose(0, 1)
        exact = torch_attention(q.double(), q.double(), q.double())[0].transpose(0, 1)
        assert_within_budget(a, exact, peer, "out")
