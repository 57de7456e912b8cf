"""Attention under torch.compile, torch.export, opcheck and autocast: one graph, whatever the lengths are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.library import opcheck
from torch.testing import assert_close

import fastseq
from fastseq.functional import scaled_dot_product_attention, varlen_attn

N, M, D, E = 4, 2, 3, 5
SIZES = ((6, 7, 9), (2, 11, 8), (10, 8, 12))  # B, Q, K; unequal to each other and to the widths: see README
OPERATOR = torch.ops.fastseq.attention.default


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def inputs(B: int, Q: int, K: int) -> tuple[Tensor, ...]:
    """Query, key, value, a mask of keys and a learned bias."""
    return draw(B, N, Q, D), draw(B, M, K, D), draw(B, M, K, E), torch.rand(B, 1, 1, K) < 0.7, draw(N, Q, K)


def outputs_and_gradients(run: Any, *args: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = list(run(*args))
    loss = sum(t[t.isfinite()].cos().sum() for t in outputs)
    return outputs, torch.autograd.grad(loss, [t for t in args if t.requires_grad])


def everything(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> list[Tensor]:
    def attend(*args: Any, **options: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, *args, enable_gqa=True, **options)

    return [
        attend(),
        attend(is_causal=True),
        attend(mask, is_causal=True),
        attend(mask, bias=bias, causal="lower_right", softcap=2.0),
        attend(window=(2, 1), dropout_p=0.5, seed=3),
        *attend(bias, return_lse=True, return_weights="mean"),
        attend(return_weights=True)[1],
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length_and_batch(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)
    sizes = SIZES if backend == "aot_eager" else SIZES[:2]
    for count, size in enumerate(sizes):
        args = inputs(*size)
        with torch.compiler.set_stance("fail_on_recompile") if count else contextlib.nullcontext():
            got = outputs_and_gradients(compiled, *args)
        assert_close(got, outputs_and_gradients(everything, *args))
    # Not asked: how often the first compilation began anew, which it does for a float (dropout_p) that is an argument.
    nodes = counter.graphs[-1].graph.nodes
    assert sum(node.target is OPERATOR for node in nodes) == 6, "each call is one node; the plain one is PyTorch's"


def test_packed_sequences_of_any_number_are_one_graph() -> None:
    def run(x: Tensor, starts: Tensor, longest: int) -> Tensor:
        return varlen_attn(x, x, x, starts, starts, longest, longest, window_size=(-1, 0))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, lengths in enumerate(([3, 4, 7], [9, 2], [5, 0, 1, 8])):
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        args = draw(sum(lengths), N, D), starts, max(lengths)
        with torch.compiler.set_stance("fail_on_recompile") if count > 1 else contextlib.nullcontext():
            assert_close(compiled(*args), run(*args))


def test_dropout_without_a_seed_compiles_and_follows_the_generator() -> None:
    q = torch.randn(2, N, 9, D)
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(compiled(q))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_lengths(strict: bool) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, is_causal=True)

    q, k, v, mask, _ = (t.detach() for t in inputs(*SIZES[0]))
    b, t, s = Dim("b", min=2), Dim("t", min=2), Dim("s", min=2)
    of = {"q": {0: b, 2: t}, "k": {0: b, 2: s}, "v": {0: b, 2: s}, "mask": {0: b, 3: s}}
    program = torch.export.export(Attend(), (q, k, v, mask), dynamic_shapes=of, strict=strict)
    for size in SIZES:
        q, k, v, mask, _ = (t.detach() for t in inputs(*size))
        assert_close(program.module()(q, k, v, mask), Attend()(q, k, v, mask))


CHECKS = {
    "plain": ((False, 0.0, 0.0, ""), {}),
    "mask, bias, weights": ((True, 1.5, 0.0, "mean"), {"bias": (1, N, 6, 7), "mask": (2, 1, 1, 7)}),
    "dropout, each": ((False, 0.0, 0.3, "each"), {"mask": (2, 1, 6, 7)}),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_operators_pass_opcheck(name: str) -> None:
    (lower_right, softcap, dropout_p, weights), given = CHECKS[name]
    q, k, v = draw(2, N, 6, D), draw(2, M, 7, D), draw(2, M, 7, E)
    bias = draw(*given["bias"]) if "bias" in given else None
    mask = torch.rand(given["mask"]) < 0.8 if "mask" in given else None
    seed = torch.tensor([3]) if dropout_p else None
    settings = (0.5, 3, 1, lower_right, softcap, dropout_p, 6, 7, weights, 0, 0, bias is not None, False)
    tensors = (q, k, v, bias, *[None] * 4, mask, None, None, seed, *[None] * 4)
    opcheck(OPERATOR, (*settings, *tensors, ""))
    out, lse, shown = OPERATOR(*settings, *tensors, "")
    grads = (out.detach().requires_grad_(), lse.detach(), shown.detach() if weights else None)
    backward = torch.ops.fastseq.attention_backward.default
    opcheck(backward, (*settings, *grads, *tensors, out.detach(), lse.detach(), shown.detach(), ""))


def test_the_packed_operator_passes_opcheck() -> None:
    q, k, v = draw(1, N, 7, D), draw(1, M, 9, D), draw(1, M, 9, E)
    cu_q, cu_k = (torch.tensor(s, dtype=torch.int32) for s in ([0, 3, 3, 7], [0, 4, 6, 9]))
    settings = (0.5, -1, 0, True, 0.0, 0.0, 4, 4, "", 0, 0, False, False)
    opcheck(OPERATOR, (*settings, q, k, v, *[None] * 6, cu_q, cu_k, *[None] * 5, ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_torch_gives(dtype: torch.dtype, cast: torch.dtype) -> None:
    q, k, v = (torch.randn(2, N, 6, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(6, 6, dtype=dtype)
    with torch.autocast("cpu", cast):
        expected = F.scaled_dot_product_attention(q, k, v, bias)
        got = scaled_dot_product_attention(q, k, v, bias)
        beyond = scaled_dot_product_attention(q, k, v, bias, is_causal=True, window=3, softcap=3.0)
    assert got.dtype == beyond.dtype == expected.dtype
    beyond.sum().backward()
    assert q.grad.dtype == dtype


def test_a_compiled_graph_obeys_a_choice_by_name() -> None:
    """Dynamo cannot read the choice, so the graph makes it when it runs; only the reference it cannot hold."""
    q = torch.randn(2, N, 9, 8)
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    plain = compiled(q)
    with fastseq.use("torch"):
        assert_close(compiled(q), plain)
    with fastseq.use("reference"), pytest.raises(fastseq.Unsupported, match="compiled graph"):
        compiled(q)
