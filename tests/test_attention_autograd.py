"""Gradients of attention, of every order and by every way, and what torch.func and checkpointing make of it."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention.varlen import AuxRequest
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.functional import scaled_dot_product_attention, varlen_attn

B, N, M, Q, K, D, E = 2, 2, 1, 4, 5, 3, 2
WAYS = ("auto", "torch", "reference")
MASK = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(1)) < 0.6
MASK[1, :, 2] = False
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "lower right": {"causal": "lower_right"},
    "mask and causal": {"attn_mask": MASK, "is_causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "weights": {"return_weights": True},
    "mean weights": {"return_weights": "mean", "dropout_p": 0.3, "seed": 7},
    "lse": {"return_lse": True},
    "everything": {
        "attn_mask": MASK,
        "causal": "lower_right",
        "window": (3, 0),
        "softcap": 2.0,
        "dropout_p": 0.2,
        "seed": 1,
        "return_weights": "mean",
        "return_lse": True,
        "scale": 0.7,
    },
}
BIASES = {"none": None, "full": (B, N, Q, K), "heads": (N, 1, K), "row": (Q, 1), "one": (1, 1)}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def inputs(bias: str = "none") -> list[Tensor]:
    tensors = [draw(B, N, Q, D), draw(B, M, K, D), draw(B, M, K, E)]
    shape = BIASES[bias]
    return tensors if shape is None else [*tensors, draw(*shape)]


def as_function(way: str, options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The public function of its tensors; a log-sum-exp of -inf, which no difference can be taken of, left out."""

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        with fastseq.use(way):
            got = scaled_dot_product_attention(query, key, value, enable_gqa=True, bias=bias, **options)
        return tuple(t[t.isfinite()] for t in (got if isinstance(got, tuple) else (got,)))

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_finite_differences_twice(name: str, way: str) -> None:
    run = as_function(way, OPTIONS[name])
    for bias in ("none", "full") if name != "everything" else BIASES:
        assert torch.autograd.gradcheck(run, inputs(bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs(bias), fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
def test_packed_gradients_are_finite_differences_twice(way: str) -> None:
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        aux = AuxRequest(lse=True)
        with fastseq.use(way):
            return varlen_attn(query, key, value, starts, starts, 3, 3, return_aux=aux, window_size=(1, 0))

    args = [draw(5, 2, D), draw(5, 2, D), draw(5, 2, E)]
    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_third_derivative(way: str) -> None:
    q, k, v = inputs()
    with fastseq.use(way):
        f = scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True).sin().sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(f, q, create_graph=True)
        f = g.square().sum()
    assert f.isfinite()
    assert f > 0


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5, "seed": 3}], ids=str)
def test_one_tensor_in_three_places_collects_three_gradients(options: dict[str, Any]) -> None:
    x = draw(B, N, Q, D)
    three = [x.detach().clone().requires_grad_() for _ in range(3)]
    weight = torch.randn(B, N, Q, D, dtype=torch.double)
    (scaled_dot_product_attention(x, x, x, **options) * weight).sum().backward()
    (scaled_dot_product_attention(*three, **options) * weight).sum().backward()
    assert_close(x.grad, sum(t.grad for t in three))


@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(4), n)], ids=str)
def test_only_what_is_asked_for_gets_a_gradient(wanted: tuple[int, ...]) -> None:
    everything = inputs("full")
    run = as_function("auto", {"is_causal": True})
    expected = torch.autograd.grad(run(*everything)[0].cos().sum(), everything)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(everything)]
    run(*some)[0].cos().sum().backward()
    for i, t in enumerate(some):
        if i in wanted:
            assert_close(t.grad, expected[i])
        else:
            assert t.grad is None


def test_a_checkpoint_replays_what_it_dropped() -> None:
    q, k, v = (t.detach().float().requires_grad_() for t in inputs())

    def run(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, dropout_p=0.5)

    torch.manual_seed(3)
    plain = torch.autograd.grad(run(q).sum(), q)
    torch.manual_seed(3)
    assert_close(torch.autograd.grad(checkpoint(run, q, use_reentrant=False).sum(), q), plain, rtol=0, atol=0)


def test_a_manual_seed_repeats_the_dropout() -> None:
    q = torch.randn(1, 2, 40, 8)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap", "mask and causal"])
def test_transforms_see_through_it(name: str) -> None:
    """vmap, jvp, grad of grad and jacrev, on the composition that they can look into."""
    run, args = as_function("auto", OPTIONS[name]), [t.detach() for t in inputs()]
    tangent = torch.randn_like(args[0])
    _, forward_mode = jvp(lambda q: run(q, *args[1:])[0], (args[0],), (tangent,))
    jacobian = jacrev(lambda q: as_function("reference", OPTIONS[name])(q, *args[1:])[0])(args[0])
    assert_close(forward_mode, (jacobian * tangent).flatten(-4).sum(-1))
    batch = torch.stack([args[0], tangent])
    options = {key: value for key, value in OPTIONS[name].items() if key != "attn_mask"}
    if name != "mask and causal":
        mapped = vmap(lambda q: scaled_dot_product_attention(q, *args[1:], enable_gqa=True, **options))(batch)
        assert_close(mapped, torch.stack([run(q, *args[1:])[0].view(B, N, Q, E) for q in batch]))
    once = grad(lambda q: run(q, *args[1:])[0].cos().sum())(args[0])
    leaf = args[0].clone().requires_grad_()
    assert_close(once, torch.autograd.grad(run(leaf, *args[1:])[0].cos().sum(), leaf)[0])


def test_a_named_implementation_refuses_what_it_cannot_differentiate() -> None:
    """A forward-mode derivative of zero without a word would be worse than none."""
    q, k, v = (t.detach() for t in inputs())
    with fastseq.use("torch"), pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda q: scaled_dot_product_attention(q, k, v, enable_gqa=True, window=1), (q,), (q,))


def test_gradients_through_functional_call() -> None:
    layer = torch.nn.Linear(D, D).double()
    x = torch.randn(B, N, Q, D, dtype=torch.double)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        h = functional_call(layer, weights, (x,))
        return scaled_dot_product_attention(h, h, h, is_causal=True).square().sum()

    weights = dict(layer.named_parameters())
    expected = torch.autograd.grad(loss(weights), list(weights.values()))
    assert_close(list(grad(loss)({n: p.detach() for n, p in weights.items()}).values()), list(expected))


@pytest.mark.parametrize("name", ["plain", "causal", "mask and causal", "dropout", "everything"])
def test_where_pytorchs_operator_on_a_gpu_stops_ours_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is pretended: the way of its calls, around PyTorch's operator in a graph of its own, for CPU tensors."""
    from fastseq.functional import attention

    monkeypatch.setattr(attention, "gpu", lambda tensor: True)
    monkeypatch.setattr(attention, "_way", lambda *args: "")
    args = inputs()
    for way in ("torch", "reference"):
        assert torch.autograd.gradcheck(as_function(way, OPTIONS[name]), args, fast_mode=True)
    assert_close(as_function("torch", OPTIONS[name])(*args), as_function("reference", OPTIONS[name])(*args))
    assert torch.autograd.gradgradcheck(as_function("torch", OPTIONS[name]), args, fast_mode=True)
